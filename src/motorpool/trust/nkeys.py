"""NATS identities: nkeys (Ed25519 keys in a checked base32 coat) and the JWTs that say what each may do.

An operator signs accounts, an account signs users; a NATS server that knows the operator needs no list of users. So
enrolling a vehicle touches no server, and a vehicle's permissions are inside what it presents. The official ``nkeys``
package has no wheel and brings a second crypto library; the coat is forty lines over ``cryptography``.

Formats: NATS's documentation of nkeys and of its JWTs (version 2). Must not: read clocks or files.
Called by: ``bus``, ``trust.credentials``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from motorpool.errors import TrustError

OPERATOR: Final = 14 << 3
ACCOUNT: Final = 0
USER: Final = 20 << 3
_SEED: Final = 18 << 3


def _coat(raw: bytes) -> str:
    checksum = binascii.crc_hqx(raw, 0).to_bytes(2, "little")
    return base64.b32encode(raw + checksum).decode().rstrip("=")


def _uncoat(text: str) -> bytes:
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except binascii.Error as error:
        raise TrustError("not an nkey: the text is not base32", code="invalid_nkey") from error
    if len(raw) < 4 or binascii.crc_hqx(raw[:-2], 0).to_bytes(2, "little") != raw[-2:]:
        raise TrustError("not an nkey: the checksum is wrong", code="invalid_nkey")
    return raw[:-2]


class KeyPair:
    """An Ed25519 key of one role (``OPERATOR``, ``ACCOUNT`` or ``USER``)."""

    def __init__(self, role: int, secret: bytes) -> None:
        self.role = role
        self._secret = secret
        self._private = Ed25519PrivateKey.from_private_bytes(secret)
        public = self._private.public_key().public_bytes_raw()
        self.public = _coat(bytes([role]) + public)

    @classmethod
    def generate(cls, role: int) -> KeyPair:
        """A new random key."""
        return cls(role, Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def from_seed(cls, seed: str) -> KeyPair:
        """The key of a seed (``S...``); raises TrustError if it is none."""
        raw = _uncoat(seed)
        if len(raw) != 34 or raw[0] & 0xF8 != _SEED:
            raise TrustError("not the seed of an nkey", code="invalid_nkey")
        return cls(((raw[0] & 7) << 5) | (raw[1] >> 3), raw[2:])

    @property
    def seed(self) -> str:
        """The secret in its coat: keep it private."""
        return _coat(bytes([_SEED | (self.role >> 5), (self.role & 31) << 3]) + self._secret)

    def sign(self, data: bytes) -> bytes:
        """The 64 bytes of the signature."""
        return self._private.sign(data)

    def answer(self, nonce: str) -> bytes:
        """The signature of a server's challenge as nats-py wants it."""
        return base64.b64encode(self.sign(nonce.encode()))


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def issue(issuer: KeyPair, subject: str, name: str, claims: dict[str, Any], issued_s: int) -> str:
    """A signed JWT by which ``issuer`` vouches for ``subject``."""
    body: dict[str, Any] = {"iat": issued_s, "iss": issuer.public, "name": name, "nats": claims, "sub": subject}
    digest = hashlib.sha512(msgspec.json.encode(body)).digest()[:32]
    body["jti"] = base64.b32encode(digest).decode().rstrip("=")
    head = _b64(b'{"typ":"JWT","alg":"ed25519-nkey"}')
    signed = f"{head}.{_b64(msgspec.json.encode(body))}"
    return f"{signed}.{_b64(issuer.sign(signed.encode()))}"


def operator_claims(system_account: str) -> dict[str, Any]:
    """Claims of an operator."""
    return {"type": "operator", "version": 2, "system_account": system_account}


def account_claims(*, streams: bool) -> dict[str, Any]:
    """Claims of an account without limits; ``streams`` opens JetStream to it."""
    storage = -1 if streams else 0
    return {
        "type": "account",
        "version": 2,
        "default_permissions": {"pub": {}, "sub": {}},
        "limits": {
            "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True, "conn": -1,
            "leaf": -1, "mem_storage": storage, "disk_storage": storage, "streams": storage, "consumer": storage,
        },
    }  # fmt: skip


def user_claims(*, publish: list[str] | None = None, subscribe: list[str] | None = None) -> dict[str, Any]:
    """Claims of a user that may publish and subscribe to these subjects alone; None means everything."""
    return {
        "type": "user",
        "version": 2,
        "pub": {} if publish is None else {"allow": publish},
        "sub": {} if subscribe is None else {"allow": subscribe},
        "subs": -1,
        "data": -1,
        "payload": -1,
    }
