"""The owner's consent: a signed document, bytes in and a verdict out.

Decides: whether a document is the owner's own, names this vehicle and this purpose, and holds now. Anything else
(absent, unreadable, signed by another key, for another vehicle, with a limit that this program does not know or that
is no sensible number, older than a grant that was seen, expired, withdrawn) means no.
Must not: read files, keep state, or talk to anybody. The owner's public key is pinned when the owner is enrolled.
Called by: ``agent.loop`` (verdict), ``agent.enrolment`` (key, grant, withdrawal).
"""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from motorpool.core.budgets import BudgetLimits
from motorpool.core.policy import EVERY_DAY, MAX_WISHES, MINUTES_A_DAY, ConsentView, Quiet, ReadyBy
from motorpool.errors import TrustError
from motorpool.types import ReasonCode

PURPOSE_COMPUTE: Final = "compute"
MAX_DOCUMENT_BYTES: Final = 16 * 1024
CLOCK_TOLERANCE_MS: Final = 60_000  # a grant may be dated this much ahead of the vehicle's clock
DOMAIN: Final = b"motorpool consent v1\n"  # so that no signature for another purpose can be used here
# What leaves the vehicle for scheduling and accounts; nothing runs for an owner who does not allow all of it.
DATA_CLASSES: Final = ("availability", "energy", "region")
MAX_PURPOSES: Final = 16
MAX_WATTS_W: Final = 100_000
MAX_BYTES_MONTH: Final = 1 << 50
MAX_MS: Final = 1 << 53  # what a browser can say exactly


class ConsentLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounds that the owner signed. A field that is unknown may be a bound: such a paper does not hold.

    ``ready_by_minute`` is a minute of every local day, None without a time; ``schedule`` adds times by weekday.
    ``quiet`` are hours without work. ``battery_watts_w`` above 0 is the separate leave to compute from the battery, not
    below ``battery_floor_pct``. ``share_while_charging``: computing may take a part of the charging power where the
    battery is full in time all the same. ``budgets`` are the most of each within a week or a month.
    """

    max_watts_w: int
    floor_pct: float = 30.0
    ready_by_minute: int | None = None
    target_pct: float = 80.0
    schedule: tuple[ReadyBy, ...] = ()
    quiet: tuple[Quiet, ...] = ()
    share_while_charging: bool = False
    battery_watts_w: int = 0
    battery_floor_pct: float = 50.0
    budgets: BudgetLimits = BudgetLimits()


class ConsentGrant(msgspec.Struct, frozen=True, kw_only=True, tag="grant", forbid_unknown_fields=True):
    """The owner allows ``purposes`` on one vehicle, within ``limits``, until ``expires_ms``.

    ``data_classes`` is what may leave the vehicle: see DATA_CLASSES.
    """

    vehicle_id: str
    purposes: tuple[str, ...]
    data_classes: tuple[str, ...] = DATA_CLASSES
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
            granted_ms=self.grant.granted_ms,
            expires_ms=self.grant.expires_ms,
            max_watts_w=limits.max_watts_w,
            floor_pct=limits.floor_pct,
            ready_by_minute=limits.ready_by_minute,
            target_pct=limits.target_pct,
            schedule=limits.schedule,
            quiet=limits.quiet,
            share_while_charging=limits.share_while_charging,
            battery_watts_w=limits.battery_watts_w,
            battery_floor_pct=limits.battery_floor_pct,
            limits=limits.budgets,
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
    """Sign a grant; raise TrustError if it allows nothing, could never hold, or says what makes no sense."""
    if grant.expires_ms <= grant.granted_ms or grant.limits.max_watts_w <= 0 or not grant.purposes:
        raise TrustError("a consent needs a purpose, some power and an end after its beginning", code="consent_empty")
    odd = oddity(grant)
    if odd is not None:
        raise TrustError(f"this consent cannot be signed: {odd}", code="consent_odd")
    return _sign(key, grant)


def withdraw_consent(key: OwnerKey, withdrawal: ConsentWithdrawal) -> bytes:
    """Sign a withdrawal."""
    return _sign(key, withdrawal)


def oddity(grant: ConsentGrant) -> str | None:
    """What makes no sense in a grant, for people; None when all of it does."""
    limits, budgets = grant.limits, grant.limits.budgets
    bounds: tuple[tuple[str, float, float], ...] = (
        ("the power", limits.max_watts_w, MAX_WATTS_W),
        ("the charge floor", limits.floor_pct, 100),
        ("the charge by your time", limits.target_pct, 100),
        ("the ready-by time", limits.ready_by_minute or 0, MINUTES_A_DAY - 1),
        ("the power from the battery", limits.battery_watts_w, MAX_WATTS_W),
        ("the floor for work from the battery", limits.battery_floor_pct, 100),
        ("the hours a week", budgets.compute_h_week, 168),
        ("the hours a week by heat", budgets.weighted_h_week, 10_000),
        ("the battery's energy a week", budgets.battery_wh_week, 10_000_000),
        ("the bytes written a month", budgets.flash_bytes_month, MAX_BYTES_MONTH),
        ("the mobile data a month", budgets.metered_bytes_month, MAX_BYTES_MONTH),
        *(("a time of the schedule", wish.minute, MINUTES_A_DAY - 1) for wish in limits.schedule),
        *(("the charge of the schedule", wish.target_pct, 100) for wish in limits.schedule),
        *(("a quiet hour", minute, MINUTES_A_DAY - 1) for q in limits.quiet for minute in (q.from_minute, q.to_minute)),
        ("its beginning", grant.granted_ms, MAX_MS),
        ("its end", grant.expires_ms, MAX_MS),
    )
    for what, value, most in bounds:
        if not (math.isfinite(value) and 0 <= value <= most):
            return f"{what} must be from 0 to {most:g}"
    weekdays = [wish.weekdays for wish in limits.schedule] + [quiet.weekdays for quiet in limits.quiet]
    if any(not 1 <= mask <= EVERY_DAY for mask in weekdays):
        return "a time of the schedule or a quiet hour names no weekday"
    if len(limits.schedule) + len(limits.quiet) > MAX_WISHES:
        return f"there are more than {MAX_WISHES} times and quiet hours"
    if len(grant.purposes) > MAX_PURPOSES or set(DATA_CLASSES) != set(grant.data_classes):
        return f"the data that leave the car are {', '.join(DATA_CLASSES)}"
    return None


def check_consent(
    data: bytes | None,
    public_key: bytes | None,
    vehicle_id: str,
    now_ms: int,
    *,
    withdrawn_ms: int | None = None,
    newest_ms: int | None = None,
) -> ConsentVerdict:
    """Judge a consent document for ``vehicle_id`` at ``now_ms``; never raises.

    ``withdrawn_ms`` is the latest withdrawal that the caller has seen: an older grant that is put back stays withdrawn.
    ``newest_ms`` is the date of the newest grant that was seen to hold: no older one, with other limits, follows it.
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
    odd = oddity(document) is not None or PURPOSE_COMPUTE not in document.purposes
    older = newest_ms is not None and document.granted_ms < newest_ms
    if odd or older or document.granted_ms > now_ms + CLOCK_TOLERANCE_MS:
        return ConsentVerdict(refusal=ReasonCode.CONSENT_INVALID, document=document)
    if now_ms >= document.expires_ms:
        return ConsentVerdict(refusal=ReasonCode.CONSENT_EXPIRED, document=document)
    return ConsentVerdict(refusal=None, grant=document, document=document)


def _sign(key: OwnerKey, document: ConsentGrant | ConsentWithdrawal) -> bytes:
    text = msgspec.json.encode(document)
    signature = Ed25519PrivateKey.from_private_bytes(key.private).sign(DOMAIN + text)
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
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, DOMAIN + text)
        found = _document.decode(text)
        if not _all_known(msgspec.json.decode(text), msgspec.to_builtins(found)):
            return None
    except (msgspec.DecodeError, binascii.Error, InvalidSignature, ValueError, RecursionError):
        return None
    return found


def _all_known(said: Any, understood: Any) -> bool:
    """Is everything that the paper says understood, down to each time of the schedule."""
    if isinstance(said, dict):
        return all(name in understood and _all_known(value, understood[name]) for name, value in said.items())
    if isinstance(said, list):
        return all(_all_known(*pair) for pair in zip(said, understood, strict=True))
    return True
