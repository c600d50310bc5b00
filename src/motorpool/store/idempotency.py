"""Answers that are kept for idempotency keys: the rows, and every SQL statement that reads or changes them.

Each function takes a connection and is quick; those that write run inside a transaction that the caller opened. What is
kept is bounded: each account by number and by bytes, the oldest going first; all by time.

Called by: ``server.openai.idempotency``.
"""

from __future__ import annotations

from sqlite3 import Connection
from typing import Final

import msgspec

LIFE_MS: Final = 24 * 3600 * 1000
MAX_ANSWERS: Final = 10_000  # of one account
MAX_ACCOUNT_BYTES: Final = 256 * 1024 * 1024
ROW_BYTES: Final = 256  # of a row beside its headers and body
SWEPT_AT_ONCE: Final = 200

_headers: Final = msgspec.json.Decoder(list[tuple[str, str]])


class KeptAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer. ``name`` and ``request`` are SHA-256, of the key and of what was asked."""

    account: str
    name: bytes
    request: bytes
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    expires_ms: int


def find(connection: Connection, account: str, name: bytes, now_ms: int) -> KeptAnswer | None:
    """The answer kept under a name, if it has not expired."""
    row = connection.execute(
        "SELECT account, name, request, status, headers, body, expires_ms FROM kept_answer"
        " WHERE account = ? AND name = ? AND expires_ms > ?",
        (account, name, now_ms),
    ).fetchone()
    if row is None:
        return None
    return KeptAnswer(**(dict(row) | {"headers": _headers.decode(row["headers"])}))


def keep(connection: Connection, answer: KeptAnswer, now_ms: int) -> None:
    """Keep an answer in the place of any older one of this name, and drop what is over the bounds."""
    headers = msgspec.json.encode(answer.headers).decode()
    size = ROW_BYTES + len(headers) + len(answer.body)
    connection.execute(
        "INSERT OR REPLACE INTO kept_answer (account, name, request, status, headers, body, bytes, expires_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (answer.account, answer.name, answer.request, answer.status, headers, answer.body, size, answer.expires_ms),
    )
    sweep(connection, now_ms)
    _bound(connection, answer.account)


def sweep(connection: Connection, now_ms: int) -> int:
    """Drop some of those that have expired; return how many."""
    done = connection.execute(
        "DELETE FROM kept_answer WHERE answer_no IN"
        " (SELECT answer_no FROM kept_answer WHERE expires_ms <= ? ORDER BY expires_ms LIMIT ?)",
        (now_ms, SWEPT_AT_ONCE),
    )
    return done.rowcount


def _bound(connection: Connection, account: str) -> None:
    count, size = connection.execute(
        "SELECT count(*), coalesce(sum(bytes), 0) FROM kept_answer WHERE account = ?", (account,)
    ).fetchone()
    while count > MAX_ANSWERS or size > MAX_ACCOUNT_BYTES:
        number, freed = connection.execute(
            "SELECT answer_no, bytes FROM kept_answer WHERE account = ? ORDER BY answer_no LIMIT 1", (account,)
        ).fetchone()
        connection.execute("DELETE FROM kept_answer WHERE answer_no = ?", (number,))
        count -= 1
        size -= freed
