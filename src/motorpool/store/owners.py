"""What the books know of owners, in SQL: their keys, their words to the cell, and their statements.

Every function works inside the caller's transaction. Must not: check signatures, or log a key, a code or a document.
Called by: ``server.loop``, ``server.owner``, ``server.admin``.
"""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec

from motorpool.errors import ConflictError, NotFoundError

DAY_MS: Final = 86_400_000
MAX_CODES: Final = 8  # of one vehicle that were not used yet; the oldest go first
CONSENT: Final = "consent"
RESUME: Final = "resume"


class Word(msgspec.Struct, frozen=True, kw_only=True):
    """The last word of an owner of one kind. ``document`` is None for what needs no signature."""

    kind: str
    dated_ms: int
    until_ms: int | None = None
    document: bytes | None = None


class Day(msgspec.Struct, frozen=True, kw_only=True):
    """What a vehicle did on one day, counted in days since 1970 (UTC)."""

    day: int
    earned_micro: int
    lines_done: int
    tokens_generated: int
    energy_uwh: int
    co2_ug: int


# -- keys --------------------------------------------------------------------------------------------------------------


def find_vehicle(db: sqlite3.Connection, vehicle_id: str) -> sqlite3.Row | None:
    """An enrolled vehicle's row."""
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM vehicle WHERE vehicle_id = ? AND revoked_ms IS NULL", (vehicle_id,)
    ).fetchone()
    return row


def owner_key(db: sqlite3.Connection, vehicle_id: str) -> str:
    """The public key of a vehicle's owner in hexadecimal; empty if there is no such vehicle, or nobody has one."""
    row = find_vehicle(db, vehicle_id)
    return "" if row is None else str(row["owner_key"])


def add_code(db: sqlite3.Connection, digest: bytes, vehicle_id: str, expires_ms: int) -> None:
    """A new code for a vehicle that has no owner's key yet; raises NotFoundError or ConflictError."""
    row = find_vehicle(db, vehicle_id)
    if row is None:
        raise NotFoundError("there is no such vehicle", code="vehicle_not_found", param="vehicle_id")
    if row["owner_key"]:
        raise ConflictError(
            "this vehicle has its owner's key: strike it off and enrol it again to give it to another owner",
            code="owner_known",
        )
    db.execute("INSERT INTO owner_code VALUES (?, ?, ?)", (digest, vehicle_id, expires_ms))
    db.execute(
        "DELETE FROM owner_code WHERE vehicle_id = ? AND hash NOT IN"
        " (SELECT hash FROM owner_code WHERE vehicle_id = ? ORDER BY expires_ms DESC LIMIT ?)",
        (vehicle_id, vehicle_id, MAX_CODES),
    )


def use_code(db: sqlite3.Connection, digest: bytes, key: str, now_ms: int) -> str | None:
    """Register an owner's key with a code, which ends all codes of its vehicle; the vehicle, None if it is no good."""
    db.execute("DELETE FROM owner_code WHERE expires_ms <= ?", (now_ms,))
    row = db.execute("SELECT vehicle_id FROM owner_code WHERE hash = ?", (digest,)).fetchone()
    if row is None or owner_key(db, row[0]) or find_vehicle(db, row[0]) is None:
        return None
    vehicle_id = str(row[0])
    db.execute("DELETE FROM owner_code WHERE vehicle_id = ?", (vehicle_id,))
    db.execute("UPDATE vehicle SET owner_key = ? WHERE vehicle_id = ?", (key, vehicle_id))
    return vehicle_id


def forget_owner(db: sqlite3.Connection, vehicle_id: str) -> None:
    """The vehicle is enrolled anew: what an owner before said does not bind this one."""
    db.execute("DELETE FROM owner_word WHERE vehicle_id = ?", (vehicle_id,))
    db.execute("DELETE FROM owner_code WHERE vehicle_id = ?", (vehicle_id,))
    db.execute(
        "UPDATE vehicle SET withdrawn_ms = NULL, withdrawal_seen = 0, paused_until_ms = 0 WHERE vehicle_id = ?",
        (vehicle_id,),
    )


# -- words -------------------------------------------------------------------------------------------------------------


def save_word(db: sqlite3.Connection, vehicle_id: str, word: Word) -> bool:
    """Keep a word of an owner unless one of its kind has a later date; whether it is the last one now.

    Of two pauses the longer holds: ending one early needs a signature.
    """
    cursor = db.execute(
        "INSERT INTO owner_word VALUES (?, ?, ?, ?, ?) ON CONFLICT (vehicle_id, kind) DO UPDATE SET"
        " dated_ms = excluded.dated_ms, until_ms = max(until_ms, excluded.until_ms), document = excluded.document"
        " WHERE excluded.dated_ms >= owner_word.dated_ms",
        (vehicle_id, word.kind, word.dated_ms, word.until_ms, word.document),
    )
    return cursor.rowcount > 0


def words(db: sqlite3.Connection, vehicle_id: str, now_ms: int) -> list[Word]:
    """The words that a vehicle must hear, oldest first; pauses only while they last."""
    rows = db.execute(
        "SELECT kind, dated_ms, until_ms, document FROM owner_word WHERE vehicle_id = ?"
        " AND (until_ms IS NULL OR until_ms > ?) ORDER BY dated_ms, kind",
        (vehicle_id, now_ms),
    )
    return [Word(**dict(row)) for row in rows]


def withdraw(db: sqlite3.Connection, vehicle_id: str, withdrawn_ms: int) -> None:
    """The owner has taken the consent back."""
    db.execute(
        "UPDATE vehicle SET withdrawn_ms = ?, withdrawal_seen = 0 WHERE vehicle_id = ?",
        (withdrawn_ms, vehicle_id),
    )


def save_withdrawal(db: sqlite3.Connection, vehicle_id: str, *, seen: bool) -> None:
    """The vehicle knows of the withdrawal (``seen``), or has a new consent since."""
    if seen:
        db.execute("UPDATE vehicle SET withdrawal_seen = 1 WHERE vehicle_id = ?", (vehicle_id,))
    else:
        restore_consent(db, vehicle_id)


def restore_consent(db: sqlite3.Connection, vehicle_id: str) -> None:
    """The owner has given a new consent."""
    db.execute("UPDATE vehicle SET withdrawn_ms = NULL, withdrawal_seen = 0 WHERE vehicle_id = ?", (vehicle_id,))


def pause(db: sqlite3.Connection, vehicle_id: str, until_ms: int) -> None:
    """No work before ``until_ms``; 0 ends a pause."""
    db.execute("UPDATE vehicle SET paused_until_ms = ? WHERE vehicle_id = ?", (until_ms, vehicle_id))


def drop_pauses(db: sqlite3.Connection, vehicle_id: str, resumed_ms: int) -> None:
    """Pauses that were asked for up to ``resumed_ms`` are over."""
    db.execute(
        "DELETE FROM owner_word WHERE vehicle_id = ? AND document IS NULL AND dated_ms <= ?", (vehicle_id, resumed_ms)
    )


def latest_pause_ms(db: sqlite3.Connection, vehicle_id: str, now_ms: int) -> tuple[int, int]:
    """When the last pause was asked for and until when pauses last; zeros without one."""
    row = db.execute(
        "SELECT coalesce(max(dated_ms), 0), coalesce(max(until_ms), 0) FROM owner_word"
        " WHERE vehicle_id = ? AND document IS NULL AND until_ms > ?",
        (vehicle_id, now_ms),
    ).fetchone()
    return int(row[0]), int(row[1])


# -- statements --------------------------------------------------------------------------------------------------------


def days(db: sqlite3.Connection, vehicle_id: str, limit: int) -> list[Day]:
    """The newest days on which a vehicle did something, oldest first."""
    rows = db.execute(
        "SELECT day, earned_micro, lines_done, tokens_generated, energy_uwh, co2_ug FROM vehicle_day"
        " WHERE vehicle_id = ? ORDER BY day DESC LIMIT ?",
        (vehicle_id, limit),
    ).fetchall()
    return [Day(**dict(row)) for row in rows[::-1]]
