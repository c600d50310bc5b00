"""How an owner's key speaks to the cell: the answer to a challenge, and the signed word that ends a pause.

Decides: whether a signature is the owner's, for this purpose and this vehicle. Must not: keep a key, a nonce or a
document, or raise on what is forged: that is a plain no.
Called by: ``server.owner`` (checks), the owner's device (signs), the vehicle, which checks ``Resume`` itself.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from motorpool.trust.consent import MAX_DOCUMENT_BYTES, OwnerKey

# No signature for one purpose can be used for another.
CHALLENGE_DOMAIN: Final = b"motorpool owner challenge v1\n"
RESUME_DOMAIN: Final = b"motorpool owner resume v1\n"
_PUBLIC_KEY: Final = re.compile(r"[0-9a-f]{64}")


class Resume(msgspec.Struct, frozen=True, kw_only=True, tag="resume", forbid_unknown_fields=True):
    """The owner ends every pause that was asked for up to ``resumed_ms``; it allows nothing that a consent does not."""

    vehicle_id: str
    resumed_ms: int


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    document: str
    signature: str


_resume: Final = msgspec.json.Decoder(Resume)
_envelope: Final = msgspec.json.Decoder(_Envelope)


def public_key(text: str) -> bytes | None:
    """The bytes of a public key in hexadecimal, as in ``owner.pub``; None if it is none."""
    if not _PUBLIC_KEY.fullmatch(text):
        return None
    data = bytes.fromhex(text)
    try:
        Ed25519PublicKey.from_public_bytes(data)
    except ValueError:
        return None
    return data


def sign_challenge(key: OwnerKey, vehicle_id: str, nonce: str) -> str:
    """The owner's answer to a challenge, base64."""
    signature = Ed25519PrivateKey.from_private_bytes(key.private).sign(_challenge(vehicle_id, nonce))
    return base64.b64encode(signature).decode()


def answers_challenge(public: bytes, vehicle_id: str, nonce: str, signature: str) -> bool:
    """Whether the holder of this key has answered this challenge."""
    try:
        raw = base64.b64decode(signature, validate=True)
        Ed25519PublicKey.from_public_bytes(public).verify(raw, _challenge(vehicle_id, nonce))
    except (binascii.Error, InvalidSignature, ValueError):
        return False
    return True


def sign_resume(key: OwnerKey, resume: Resume) -> bytes:
    """Sign the end of a pause."""
    text = msgspec.json.encode(resume)
    signature = Ed25519PrivateKey.from_private_bytes(key.private).sign(RESUME_DOMAIN + text)
    return msgspec.json.encode(_Envelope(document=text.decode(), signature=base64.b64encode(signature).decode()))


def open_resume(data: bytes, public: bytes, vehicle_id: str) -> Resume | None:
    """The end of a pause, if the owner signed it for this vehicle. The signature is checked before the document."""
    if len(data) > MAX_DOCUMENT_BYTES:
        return None
    try:
        envelope = _envelope.decode(data)
        text = envelope.document.encode()
        signature = base64.b64decode(envelope.signature, validate=True)
        Ed25519PublicKey.from_public_bytes(public).verify(signature, RESUME_DOMAIN + text)
        resume = _resume.decode(text)
    except (msgspec.DecodeError, binascii.Error, InvalidSignature, ValueError, RecursionError):
        return None
    return resume if resume.vehicle_id == vehicle_id else None


def _challenge(vehicle_id: str, nonce: str) -> bytes:
    return CHALLENGE_DOMAIN + vehicle_id.encode() + b"\n" + nonce.encode()
