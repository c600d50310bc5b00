"""What a key may ask of models in a minute: the rows, and every SQL statement that reads or changes them.

Each function takes a connection and is quick; those that write run inside a transaction that the caller opened.

Called by: ``server.openai.ratelimits``, the ``motorpool keys`` command.
"""

from __future__ import annotations

from sqlite3 import Connection

import msgspec

from motorpool.errors import NotFoundError


class KeyLimit(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one key; None: no limit."""

    key_id: str
    requests_a_minute: int | None = None
    tokens_a_minute: int | None = None

    @property
    def is_none(self) -> bool:
        """Whether it limits nothing."""
        return self.requests_a_minute is None and self.tokens_a_minute is None


def limit_of_key(connection: Connection, digest: bytes) -> KeyLimit | None:
    """The limits of a key by its SHA-256; None if it has none."""
    row = connection.execute(
        "SELECT key_limit.* FROM key_limit JOIN api_key USING (key_id) WHERE hash = ?", (digest,)
    ).fetchone()
    return None if row is None else KeyLimit(**dict(row))


def limits(connection: Connection) -> dict[str, KeyLimit]:
    """Every limit, by the id of its key."""
    return {str(row["key_id"]): KeyLimit(**dict(row)) for row in connection.execute("SELECT * FROM key_limit")}


def set_limit(connection: Connection, limit: KeyLimit) -> None:
    """Give a key these limits and no others. Raises NotFoundError ``key_not_found``."""
    if connection.execute("SELECT 1 FROM api_key WHERE key_id = ?", (limit.key_id,)).fetchone() is None:
        raise NotFoundError("there is no key with this id: see motorpool keys list", code="key_not_found")
    if limit.is_none:
        connection.execute("DELETE FROM key_limit WHERE key_id = ?", (limit.key_id,))
        return
    connection.execute(
        "INSERT INTO key_limit (key_id, requests_a_minute, tokens_a_minute) VALUES (?, ?, ?) ON CONFLICT (key_id) DO"
        " UPDATE SET requests_a_minute = excluded.requests_a_minute, tokens_a_minute = excluded.tokens_a_minute",
        (limit.key_id, limit.requests_a_minute, limit.tokens_a_minute),
    )
