"""A customer's API keys: how one is made, what is kept of it, and what people may see of it.

A key is ``mp-`` and 256 random bits. Only its SHA-256 is stored: with that many random bits nobody can guess back from
the hash, so neither salt nor a slow hash would add anything.

Called by: ``server.openai.keys``. Must not: store anything, or put a key into a log or an error text.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

PREFIX: Final = "mp-"
KEY_BYTES: Final = 32
HINT_CHARS: Final = 4


def mint() -> str:
    """A new key, to be shown once and then forgotten: ``mp-`` and 43 characters that are safe in URLs and headers."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest(key: bytes) -> bytes:
    """What is stored and looked up: SHA-256 of the whole key, 32 bytes."""
    return hashlib.sha256(key).digest()


def hint(key: str) -> str:
    """The last four characters, so that a person can tell keys apart in a list."""
    return key[-HINT_CHARS:]
