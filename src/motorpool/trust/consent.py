"""The owner's consent: a signed document, bytes in and a verdict out.

Decides: whether a document is the owner's own, names this vehicle and this purpose, and holds now. Anything else
(absent, unreadable, signed by another key, for another vehicle, expired, withdrawn) means no.
Must not: read files, keep state, or talk to anybody. The owner's public key is pinned when the owner is enrolled.
Called by: ``agent.loop`` (verdict), ``agent.enrolment`` (key, grant, withdrawal).
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from motorpool.core.guard import ConsentView
from motorpool.errors import TrustError
from motorpool.types import ReasonCode

PURPOSE_COMPUTE: Final = "compute"
MAX_DOCUMENT_BYTES: Final = 16 * 1024
CLOCK_TOLERANCE_MS: Final = 60_000  # a grant may be dated this much ahead of the vehicle's clock
_DOMAIN: Final = b"motorpool consent v1\n"  # so that no signature for another purpose can be used here


class ConsentLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds that the owner signed. ``ready_by_minute`` is a minute of the local day, None without a time."""

    max_watts_w: int
    floor_pct: float = 30.0
    ready_by_minute: int | None = None
    target_pct: float = 80.0


class ConsentGrant(msgspec.Struct, frozen=True, kw_only=True, tag="grant", forbid_unknown_fields=True):
    """The owner allows ``purposes`` on one vehicle, within ``limits``, until ``expires_ms``."""

    vehicle_id: str
    purposes: tuple[str, ...]
    limits: ConsentLimits
    granted_ms: int
    expires_ms: int


class ConsentWithdrawal(msgspec.Struct, frozen=True, kw_only=True, tag="withdrawal", forbid_unknown_fields=True):
    """The owner takes back every grant dated up to ``withdrawn_ms``."""

    vehicle_id: str
    withdrawn_ms: int


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    document: str
    signature: str


class ConsentVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """``refusal`` is None when the consent holds; ``withdrawn_ms`` is set by a genuine withdrawal.

    ``document`` is the owner's own grant for this vehicle, whether or not it holds; ``grant`` is one that holds.
    """

    refusal: ReasonCode | None
    grant: ConsentGrant | None = None
    withdrawn_ms: int | None = None
    document: ConsentGrant | None = None

    @property
    def valid(self) -> bool:
        """Does the consent hold."""
        return self.refusal is None

    def view(self) -> ConsentView:
        """The same verdict as the guard takes it."""
        if self.refusal is not None or self.grant is None:
            return ConsentView(refusal=self.refusal or ReasonCode.CONSENT_INVALID)
        limits = self.grant.limits
        return ConsentView(
            refusal=None,
            max_watts_w=limits.max_watts_w,
            floor_pct=limits.floor_pct,
            ready_by_minute=limits.ready_by_minute,
            target_pct=limits.target_pct,
            expires_ms=self.grant.expires_ms,
        )


class OwnerKey(msgspec.Struct, frozen=True, kw_only=True):
    """The owner's key pair, 32 raw bytes each. The private half belongs to the owner and never leaves its file."""

    private: bytes
    public: bytes

    def __repr__(self) -> str:
        return "OwnerKey(...)"


_Document = ConsentGrant | ConsentWithdrawal
_document: msgspec.json.Decoder[_Document] = msgspec.json.Decoder(_Document)
_envelope = msgspec.json.Decoder(_Envelope)


def create_owner_key() -> OwnerKey:
    """A new key pair for an owner."""
    key = Ed25519PrivateKey.generate()
    return OwnerKey(private=key.private_bytes_raw(), public=key.public_key().public_bytes_raw())


def owner_key(private: bytes) -> OwnerKey:
    """The key pair of a private half; raise TrustError if it is none."""
    try:
        key = Ed25519PrivateKey.from_private_bytes(private)
    except ValueError as error:
        raise TrustError("not an owner's key: 32 bytes are expected", code="owner_key_invalid") from error
    return OwnerKey(private=private, public=key.public_key().public_bytes_raw())


def grant_consent(key: OwnerKey, grant: ConsentGrant) -> bytes:
    """Sign a grant; raise TrustError if it allows nothing or could never hold."""
    if grant.expires_ms <= grant.granted_ms or grant.limits.max_watts_w <= 0 or not grant.purposes:
        raise TrustError("a consent needs a purpose, some power and an end after its beginning", code="consent_empty")
    return _sign(key, grant)


def withdraw_consent(key: OwnerKey, withdrawal: ConsentWithdrawal) -> bytes:
    """Sign a withdrawal."""
    return _sign(key, withdrawal)


def check_consent(
    data: bytes | None, public_key: bytes | None, vehicle_id: str, now_ms: int, *, withdrawn_ms: int | None = None
) -> ConsentVerdict:
    """Judge a consent document for ``vehicle_id`` at ``now_ms``; never raises.

    ``withdrawn_ms`` is the latest withdrawal that the caller has seen: an older grant that is put back stays withdrawn.
    """
    if data is None or public_key is None:
        return ConsentVerdict(refusal=ReasonCode.CONSENT_MISSING)
    document = _open(data, public_key)
    if document is None or document.vehicle_id != vehicle_id:
        return ConsentVerdict(refusal=ReasonCode.CONSENT_INVALID)
    if isinstance(document, ConsentWithdrawal):
        return ConsentVerdict(refusal=ReasonCode.CONSENT_WITHDRAWN, withdrawn_ms=document.withdrawn_ms)
    if withdrawn_ms is not None and document.granted_ms <= withdrawn_ms:
        return ConsentVerdict(refusal=ReasonCode.CONSENT_WITHDRAWN, document=document)
    if PURPOSE_COMPUTE not in document.purposes or document.granted_ms > now_ms + CLOCK_TOLERANCE_MS:
        return ConsentVerdict(refusal=ReasonCode.CONSENT_INVALID, document=document)
    if now_ms >= document.expires_ms:
        return ConsentVerdict(refusal=ReasonCode.CONSENT_EXPIRED, document=document)
    return ConsentVerdict(refusal=None, grant=document, document=document)


def _sign(key: OwnerKey, document: ConsentGrant | ConsentWithdrawal) -> bytes:
    text = msgspec.json.encode(document)
    signature = Ed25519PrivateKey.from_private_bytes(key.private).sign(_DOMAIN + text)
    envelope = _Envelope(document=text.decode(), signature=base64.b64encode(signature).decode())
    return msgspec.json.encode(envelope)


def _open(data: bytes, public_key: bytes) -> ConsentGrant | ConsentWithdrawal | None:
    """The document if the owner signed it. The signature is checked before the document is read."""
    if len(data) > MAX_DOCUMENT_BYTES:
        return None
    try:
        envelope = _envelope.decode(data)
        text = envelope.document.encode()
        signature = base64.b64decode(envelope.signature, validate=True)
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _DOMAIN + text)
        return _document.decode(text)
    except (msgspec.DecodeError, binascii.Error, InvalidSignature, ValueError):
        return None
