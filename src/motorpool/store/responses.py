"""Stored responses: the rows, and every SQL statement that reads or changes them.

Each function takes a connection and is quick; those that write run inside a transaction that the caller opened. Times
are milliseconds since 1970 (UTC). Must not: look into a BLOB, or log one; they are customers' private data.

Called by: ``server.openai.responses``.
"""

from __future__ import annotations

from sqlite3 import Connection
from typing import Any, Final

import msgspec

DAY_MS: Final = 86_400_000
KEPT_MS: Final = 30 * DAY_MS  # how long a response is kept after its creation
PIECES_KEPT_MS: Final = DAY_MS  # how long the events of a background response can be told again after its end
MAX_KEPT: Final = 100_000  # responses of one account; beyond it the oldest ones go
MAX_KEPT_BYTES: Final = 1 << 30  # of one account; beyond it the oldest ones go
MAX_CHAIN: Final = 1_000  # responses of one conversation
MAX_CHAIN_BYTES: Final = 32 * 1024 * 1024  # that they take
MAX_DROPPED: Final = 500  # responses that one transaction removes
# A response and those that it goes on with, newest first.
_CHAIN: Final = (
    "WITH RECURSIVE chain (response_no, previous_id, depth) AS ("
    "SELECT response_no, previous_id, 1 FROM response WHERE response_id = :response_id AND account = :account"
    " UNION ALL SELECT r.response_no, r.previous_id, depth + 1 FROM response AS r"
    " JOIN chain ON r.response_id = chain.previous_id AND r.account = :account WHERE depth < :most)"
)
_CONVERSATION: Final = (
    f"{_CHAIN} SELECT response.* FROM chain"  # noqa: S608 - constants alone
    " JOIN response USING (response_no) ORDER BY depth DESC"
)
_MEASURE: Final = (
    f"{_CHAIN} SELECT count(*), sum(length(items) + coalesce(length(result), 0))"  # noqa: S608 - constants alone
    " FROM chain JOIN response USING (response_no)"
)
_EXTEND: Final = (
    f"{_CHAIN} UPDATE response SET expires_ms = max(expires_ms, :expires_ms)"  # noqa: S608 - constants alone
    " WHERE response_no IN (SELECT response_no FROM chain)"
)


class ResponseRow(msgspec.Struct, frozen=True, kw_only=True):
    """One response. ``body`` is None from its end on, ``result`` before it."""

    response_no: int = 0
    response_id: str
    account: str
    previous_id: str | None
    status: str
    background: bool
    created_ms: int
    ended_ms: int | None
    expires_ms: int
    facts: bytes
    items: bytes
    body: bytes | None
    result: bytes | None
    size_bytes: int = 0


def _row(values: dict[str, Any]) -> ResponseRow:
    return ResponseRow(**(values | {"background": bool(values["background"])}))


def insert_response(connection: Connection, row: ResponseRow) -> int:
    """Keep a new response, and the conversation that it goes on with for as long; returns its number.

    When the account keeps more than MAX_KEPT or MAX_KEPT_BYTES, its oldest ended responses go.
    """
    size = sum(len(part) for part in (row.facts, row.items, row.body, row.result) if part is not None)
    number = connection.execute(
        "INSERT INTO response (response_id, account, previous_id, status, background, created_ms, ended_ms,"
        " expires_ms, facts, items, body, result, size_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            row.response_id,
            row.account,
            row.previous_id,
            row.status,
            int(row.background),
            row.created_ms,
            row.ended_ms,
            row.expires_ms,
            row.facts,
            row.items,
            row.body,
            row.result,
            size,
        ),
    ).lastrowid
    assert number is not None
    if row.previous_id is not None:
        _keep_conversation(connection, row.account, row.previous_id, row.expires_ms)
    _make_room(connection, row.account, number)
    return number


def _keep_conversation(connection: Connection, account: str, response_id: str, expires_ms: int) -> None:
    connection.execute(
        _EXTEND,
        {"account": account, "response_id": response_id, "most": MAX_CHAIN, "expires_ms": expires_ms},
    )


def _make_room(connection: Connection, account: str, newest: int) -> None:
    kept, size = space(connection, account)
    if kept <= MAX_KEPT and size <= MAX_KEPT_BYTES:
        return
    rows = connection.execute(
        "SELECT response_no, size_bytes FROM response WHERE account = ? AND ended_ms IS NOT NULL AND response_no <> ?"
        " ORDER BY expires_ms, response_no LIMIT ?",
        (account, newest, MAX_DROPPED),
    ).fetchall()
    for number, part in rows:
        if kept <= MAX_KEPT and size <= MAX_KEPT_BYTES:
            return
        connection.execute("DELETE FROM response WHERE response_no = ?", (number,))
        kept, size = kept - 1, size - part


def space(connection: Connection, account: str) -> tuple[int, int]:
    """How many responses an account keeps, and how many bytes they take."""
    row = connection.execute(
        "SELECT responses, size_bytes FROM response_space WHERE account = ?", (account,)
    ).fetchone()
    return (0, 0) if row is None else (int(row[0]), int(row[1]))


def open_count(connection: Connection, account: str | None = None) -> int:
    """How many responses have not ended, of one account or of all."""
    query = "SELECT count(*) FROM response WHERE ended_ms IS NULL"
    if account is None:
        return int(connection.execute(query).fetchone()[0])
    return int(connection.execute(query + " AND account = ?", (account,)).fetchone()[0])


def find_response(connection: Connection, account: str, response_id: str, now_ms: int) -> ResponseRow | None:
    """A response that ``account`` may see; None if there is none, or its time is over."""
    row = connection.execute(
        "SELECT * FROM response WHERE response_id = ? AND account = ? AND (expires_ms > ? OR ended_ms IS NULL)",
        (response_id, account, now_ms),
    ).fetchone()
    return None if row is None else _row(dict(row))


def conversation(connection: Connection, account: str, response_id: str) -> list[ResponseRow]:
    """A response and those that it goes on with, oldest first: at most MAX_CHAIN, and as far as they are still kept."""
    rows = connection.execute(
        _CONVERSATION,
        {"account": account, "response_id": response_id, "most": MAX_CHAIN},
    )
    return [_row(dict(row)) for row in rows]


def conversation_size(connection: Connection, account: str, response_id: str) -> tuple[int, int]:
    """Of the same conversation: how many responses it has, and how many bytes of them would have to be read."""
    row = connection.execute(_MEASURE, {"account": account, "response_id": response_id, "most": MAX_CHAIN}).fetchone()
    return int(row[0]), int(row[1] or 0)


def unfinished_responses(connection: Connection) -> list[tuple[str, str]]:
    """Account and id of every background response that has not ended, oldest first."""
    rows = connection.execute("SELECT account, response_id FROM response WHERE ended_ms IS NULL ORDER BY response_no")
    return [(row[0], row[1]) for row in rows]


def append_pieces(connection: Connection, number: int, first: int, pieces: bytes) -> None:
    """More of what the events of a response are told from; it is in progress from then on."""
    connection.execute(
        "INSERT OR REPLACE INTO response_piece SELECT response_no, ?, ? FROM response WHERE response_no = ?",
        (first, pieces, number),
    )
    connection.execute("UPDATE response SET status = 'in_progress' WHERE response_no = ?", (number,))


def read_pieces(connection: Connection, number: int) -> list[bytes]:
    """What the events of a response are told from, in order; empty if it is gone."""
    rows = connection.execute("SELECT pieces FROM response_piece WHERE response_no = ? ORDER BY first", (number,))
    return [row[0] for row in rows]


def finish_response(connection: Connection, number: int, status: str, result: bytes, now_ms: int) -> bool:
    """The end of a response; False if it has ended before, or was deleted meanwhile."""
    changed = connection.execute(
        "UPDATE response SET status = :status, result = :result, ended_ms = :now_ms, body = NULL,"
        " size_bytes = length(facts) + length(items) + length(:result) + (SELECT coalesce(sum(length(pieces)), 0)"
        " FROM response_piece WHERE response_piece.response_no = :number)"
        " WHERE response_no = :number AND ended_ms IS NULL",
        {"status": status, "result": result, "now_ms": now_ms, "number": number},
    )
    return changed.rowcount == 1


def is_there(connection: Connection, number: int) -> bool:
    """Whether a response was not deleted."""
    return connection.execute("SELECT 1 FROM response WHERE response_no = ?", (number,)).fetchone() is not None


def delete_response(connection: Connection, account: str, response_id: str) -> bool:
    """Forget a response with all that belongs to it; whether it was there."""
    gone = connection.execute("DELETE FROM response WHERE response_id = ? AND account = ?", (response_id, account))
    return gone.rowcount == 1


def is_time_over(connection: Connection, now_ms: int) -> bool:
    """Whether there is something for ``drop_expired`` to do."""
    return bool(_expired(connection, now_ms, 1) or _told_out(connection, now_ms, 1))


def drop_expired(connection: Connection, now_ms: int) -> int:
    """Remove responses and events whose time is over, at most MAX_DROPPED of each; returns how many."""
    expired = _expired(connection, now_ms, MAX_DROPPED)
    connection.executemany("DELETE FROM response WHERE response_no = ?", ((number,) for number in expired))
    told_out = _told_out(connection, now_ms, MAX_DROPPED)
    for number in told_out:
        connection.execute("DELETE FROM response_piece WHERE response_no = ?", (number,))
        connection.execute(
            "UPDATE response SET size_bytes = length(facts) + length(items) + length(result) WHERE response_no = ?",
            (number,),
        )
    return len(expired) + len(told_out)


def _expired(connection: Connection, now_ms: int, limit: int) -> list[int]:
    rows = connection.execute(
        "SELECT response_no FROM response WHERE ended_ms IS NOT NULL AND expires_ms <= ? LIMIT ?", (now_ms, limit)
    )
    return [row[0] for row in rows]


def _told_out(connection: Connection, now_ms: int, limit: int) -> list[int]:
    # Few responses have pieces, and only for a day: they are looked at one by one.
    rows = connection.execute(
        "SELECT DISTINCT response_piece.response_no FROM response_piece JOIN response USING (response_no)"
        " WHERE ended_ms <= ? LIMIT ?",
        (now_ms - PIECES_KEPT_MS, limit),
    )
    return [row[0] for row in rows]
