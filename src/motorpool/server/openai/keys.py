"""Who is calling: the account behind an API key, and the making of keys.

Decides only whether a key is good. Must not: keep, log or show a key; only ``create_key`` returns one, once.

Called by: ``app`` for every request, and the ``motorpool keys`` command.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable
from typing import Final

from motorpool.errors import AuthenticationError
from motorpool.store.customer import KeyRow, account_of_key, insert_key
from motorpool.trust import apikeys

MAX_CACHED_KEYS: Final = 10_000
MAX_KEY_BYTES: Final = 512


def create_key(connection: sqlite3.Connection, account: str, name: str, now_ms: int) -> tuple[str, KeyRow]:
    """Make a key for an account; the key itself is returned here and cannot be had again."""
    key = apikeys.mint()
    row = KeyRow(
        key_id="key_" + secrets.token_hex(8),
        account=account,
        name=name,
        hash=apikeys.digest(key.encode()),
        hint=apikeys.hint(key),
        created_ms=now_ms,
    )
    insert_key(connection, row)
    return key, row


class KeyRing:
    """Finds the account of a key. A good key is believed for ``ttl_ms``, so that a revoked one stops soon after."""

    def __init__(self, reader: Callable[[], sqlite3.Connection], clock: Callable[[], int], ttl_ms: int) -> None:
        self._reader = reader
        self._clock = clock
        self._ttl_ms = ttl_ms
        self._known: dict[bytes, tuple[str, int]] = {}

    def account(self, authorization: bytes) -> str:
        """The account of an ``Authorization`` header; raises AuthenticationError that says what is wrong with it."""
        if authorization[:7].lower() != b"bearer ":
            raise AuthenticationError(
                "no API key was sent: send the header Authorization: Bearer YOUR_KEY", code="missing_api_key"
            )
        key = authorization[7:].strip()
        if not key or len(key) > MAX_KEY_BYTES:
            raise AuthenticationError("the API key is empty or too long", code="invalid_api_key")
        digest = apikeys.digest(key)
        now_ms = self._clock()
        known = self._known.get(digest)
        if known is not None and now_ms - known[1] < self._ttl_ms:
            return known[0]
        account = account_of_key(self._reader(), digest)
        if account is None:
            self._known.pop(digest, None)
            raise AuthenticationError(
                "the API key is unknown or revoked: motorpool keys create makes a new one", code="invalid_api_key"
            )
        if len(self._known) >= MAX_CACHED_KEYS:
            self._known.clear()
        self._known[digest] = (account, now_ms)
        return account
