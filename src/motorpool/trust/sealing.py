"""Jobs sealed for one vehicle in one region: HPKE (RFC 9180; X25519, HKDF-SHA256, AES-128-GCM).

Decides: for whom a job may be sealed, and which vehicle may open it. A job with a residency is sealed only for a key
whose region a verifier has attested to be just that one, and is opened only with such a paper; an unknown region is
none. Must not: hold keys, read clocks or files, or say why something did not open.
This is a library: the running cell and its vehicles do not seal their lines yet.

What holds it: whoever has a vehicle's private key can decrypt what was sealed for it, wherever that key is. So the
sealing side is the gate, and the context (job, region, key), which HPKE binds into the ciphertext, sees to it that
nothing sealed for one job, region or vehicle opens as another's. The opening side adds the vehicle's own refusal: after
a border, it has no paper for the former region, and none for the new one fits. Papers are short-lived for that reason.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from msgspec import Meta

from motorpool.errors import TrustError

DOMAIN: Final = b"motorpool sealed job v1\n"
REGION_DOMAIN: Final = b"motorpool attested region v1\n"
KEY_BYTES: Final = 32
MAX_PAPER_BYTES: Final = 2 * 1024
SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)
_Region = Annotated[str, Meta(min_length=1, max_length=64)]


class AttestedRegion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A verifier's word: the holder of this key (X25519, hexadecimal) is in this region, until then.

    ``region`` None: the verifier knows the vehicle but not where it is.
    """

    vehicle_key: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    region: _Region | None
    issued_ms: int
    expires_ms: int

    def holds(self, now_ms: int) -> bool:
        """Does it hold at this moment."""
        return self.issued_ms <= now_ms < self.expires_ms


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is sealed: its id, and the region that its data may not leave; None: it may go anywhere."""

    job_id: str
    residency: str | None = None


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    document: str
    signature: str


def attest_region(verifier_private: bytes, paper: AttestedRegion) -> bytes:
    """Sign a paper."""
    text = msgspec.json.encode(paper)
    signature = Ed25519PrivateKey.from_private_bytes(verifier_private).sign(REGION_DOMAIN + text)
    return msgspec.json.encode(_Envelope(document=text.decode(), signature=base64.b64encode(signature).decode()))


def open_region(data: bytes | None, verifier_public: bytes, now_ms: int) -> AttestedRegion | None:
    """The paper, if the verifier signed it and it holds now. The signature is checked before the paper is read."""
    if data is None or len(data) > MAX_PAPER_BYTES:
        return None
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
        text = envelope.document.encode()
        signature = base64.b64decode(envelope.signature, validate=True)
        Ed25519PublicKey.from_public_bytes(verifier_public).verify(signature, REGION_DOMAIN + text)
        paper = msgspec.json.decode(text, type=AttestedRegion)
    except (msgspec.DecodeError, binascii.Error, InvalidSignature, ValueError, RecursionError):
        return None
    return paper if paper.holds(now_ms) else None


def may_hold(job: Job, paper: AttestedRegion | None, now_ms: int) -> bool:
    """May a vehicle with this paper have the data of this job."""
    if paper is None or not paper.holds(now_ms):
        return False
    return job.residency is None or paper.region == job.residency


def seal(plaintext: bytes, job: Job, paper: AttestedRegion | None, now_ms: int) -> bytes:
    """Seal for the vehicle of the paper; raises TrustError if the job may not go there."""
    if paper is None or not may_hold(job, paper, now_ms):
        raise TrustError("this vehicle is not attested to be where the job has to stay", code="residency_refused")
    public = bytes.fromhex(paper.vehicle_key)
    try:
        return SUITE.encrypt(plaintext, X25519PublicKey.from_public_bytes(public), context(job, public))
    except ValueError as error:  # a point of small order, which is nobody's key
        raise TrustError("this vehicle's key is none", code="vehicle_key_invalid") from error


def open_sealed(sealed: bytes, private: bytes, job: Job, paper: AttestedRegion | None, now_ms: int) -> bytes | None:
    """The job's data, in the vehicle that it was sealed for and in its region; None anywhere else."""
    key = X25519PrivateKey.from_private_bytes(private)
    public = key.public_key().public_bytes_raw()
    if paper is None or paper.vehicle_key != public.hex() or not may_hold(job, paper, now_ms):
        return None
    try:
        return SUITE.decrypt(sealed, key, context(job, public))
    except (InvalidTag, ValueError):
        return None


def context(job: Job, vehicle_public: bytes) -> bytes:
    """What the ciphertext is bound to. As JSON, so that no two contexts have the same bytes."""
    return DOMAIN + msgspec.json.encode([job.job_id, job.residency, vehicle_public.hex()])
