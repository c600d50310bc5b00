"""Who an owner is: challenges, short-lived tokens, enrolment codes, and how often an address may ask.

A challenge and a token carry all that they say, under a secret that this process made at its start and keeps nowhere:
nothing has to be remembered for who only asks, and a restart ends all tokens. Decides only whether they are good.
Must not: keep, log or show a key or a code. Called by: ``server.owner.routes``, ``server.admin``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Final

import msgspec

from motorpool.errors import AuthenticationError, RateLimitError

CHALLENGE_MS: Final = 120_000
TOKEN_MS: Final = 15 * 60_000
CODE_MS: Final = 24 * 3_600_000
MAX_USED: Final = 10_000  # answered challenges that are remembered, so that none is answered twice
BURST: Final = 20  # requests of one address that needs no token, at once
REFILL_MS: Final = 3_000  # and one more each so often
MAX_ADDRESSES: Final = 10_000
MAX_TOKEN_BYTES: Final = 512
_MAC_BYTES: Final = 32
_PREFIX: Final = "mpo-"


class _Challenge(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    vehicle_id: str
    expires_ms: int
    salt: str


class _Token(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    vehicle_id: str
    expires_ms: int
    key: str  # of the owner: another owner's key ends it


_sealed: Final = msgspec.msgpack.Decoder(_Challenge | _Token)


def new_code() -> tuple[str, bytes]:
    """A new enrolment code, and what is kept of it."""
    code = secrets.token_urlsafe(24)
    return code, code_digest(code)


def code_digest(code: str) -> bytes:
    """What is kept of an enrolment code. It is 192 random bits, so no salt is needed."""
    return hashlib.sha256(code.encode()).digest()


class Sessions:
    """Challenges and tokens of one process."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self._secret = secrets.token_bytes(32)
        self._used: dict[str, int] = {}  # when each answered challenge expires

    def challenge(self, vehicle_id: str) -> tuple[str, int]:
        """A nonce to sign, and until when it is good."""
        expires_ms = self._now_ms() + CHALLENGE_MS
        return self._seal(_Challenge(vehicle_id, expires_ms, secrets.token_hex(16))), expires_ms

    def is_open(self, vehicle_id: str, nonce: str) -> bool:
        """Whether this nonce was given for this vehicle, is good still, and was not used."""
        sealed = self._open(nonce)
        good = isinstance(sealed, _Challenge) and sealed.vehicle_id == vehicle_id
        return good and nonce not in self._used

    def token(self, vehicle_id: str, key: str, nonce: str) -> tuple[str, int]:
        """A token for the owner with this key, who has answered this challenge; no second one follows from it."""
        now_ms = self._now_ms()
        self._used[nonce] = now_ms + CHALLENGE_MS
        if len(self._used) > MAX_USED:
            self._used = {name: until_ms for name, until_ms in self._used.items() if until_ms > now_ms}
        return _PREFIX + self._seal(_Token(vehicle_id, now_ms + TOKEN_MS, key)), now_ms + TOKEN_MS

    def owner_of(self, authorization: bytes) -> tuple[str, str]:
        """The vehicle and the key that an ``Authorization`` header is good for; raises AuthenticationError."""
        scheme, _, text = authorization[:MAX_TOKEN_BYTES].decode("ascii", "replace").partition(" ")
        token = self._open(text.strip().removeprefix(_PREFIX)) if scheme.lower() == "bearer" else None
        if not isinstance(token, _Token):
            raise AuthenticationError(
                "the owner's token is missing, wrong or over: answer a new challenge", code="invalid_owner_token"
            )
        return token.vehicle_id, token.key

    def _seal(self, value: _Challenge | _Token) -> str:
        data = msgspec.msgpack.encode(value)
        return base64.urlsafe_b64encode(self._mac(data) + data).decode().rstrip("=")

    def _open(self, text: str) -> _Challenge | _Token | None:
        try:
            raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except (binascii.Error, ValueError):
            return None
        mac, data = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(data)):
            return None
        value = _sealed.decode(data)
        return value if self._now_ms() < value.expires_ms else None

    def _mac(self, data: bytes) -> bytes:
        return hmac.digest(self._secret, data, "sha256")


class Throttle:
    """How often one address may ask without a token: BURST at once, then one each REFILL_MS."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self._full_ms: dict[str, int] = {}  # when each address has all of its requests again

    def take(self, address: str) -> None:
        """Count one request; raises RateLimitError when there were too many."""
        now_ms = self._now_ms()
        full_ms = max(self._full_ms.get(address, 0), now_ms)
        wait_ms = full_ms + REFILL_MS - now_ms - BURST * REFILL_MS
        if wait_ms > 0:
            raise RateLimitError("too many requests from this address: try again in a moment", retry_after_ms=wait_ms)
        if address not in self._full_ms and len(self._full_ms) >= MAX_ADDRESSES:
            self._full_ms = {name: at_ms for name, at_ms in self._full_ms.items() if at_ms > now_ms}
            while len(self._full_ms) >= MAX_ADDRESSES:
                del self._full_ms[next(iter(self._full_ms))]
        self._full_ms[address] = full_ms + REFILL_MS
