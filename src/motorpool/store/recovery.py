"""Reading the books in columns, for a cell that starts: a million vehicles and what they hold, in a few long strings.

SQLite puts a column together faster than Python can make a row of it, and keeps the order of the rows while it does.

Called by: ``server.loop``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Container
from itertools import compress
from typing import Any, Final

import msgspec
import numpy as np

from motorpool.core.columns import Ints
from motorpool.core.recovery import LeaseRows, VehicleRows
from motorpool.store.books import line_key

END: Final = "\x1f"  # between two names; no name holds it
LINE: Final = np.dtype("<u4")
_base: Final = msgspec.json.Decoder(dict[str, int])
# Columns of one query fit together in whatever order the rows come; a table that is read as it lies comes by rowid.
_VEHICLES: Final = (
    "SELECT group_concat(vehicle_id, char(31)), group_concat(region, char(31)), group_concat(site, char(31)),"
    " group_concat((withdrawn_ms IS NOT NULL) + 2 * (withdrawal_seen <> 0) + 4 * (reserve <> 0) + 8 * max(trust, 0)),"
    " group_concat(paused_until_ms) FROM vehicle WHERE revoked_ms IS NULL"
)
_DONE: Final = "SELECT group_concat(line_key - :low) FROM result WHERE line_key >= :low AND line_key < :high"
_LEASES: Final = (
    "SELECT group_concat(lease_id, char(31)), group_concat(vehicle_id, char(31)), group_concat(incarnation, char(31)),"
    " group_concat(batch_no), group_concat(granted_ms), group_concat(expires_ms), group_concat(length(lines)),"
    " group_concat(hex(lines), '')"
    " FROM (SELECT lease_id, vehicle_id, incarnation, batch_no, granted_ms, expires_ms, lines"
    " FROM lease ORDER BY granted_ms, lease_id)"
)


def vehicles(db: sqlite3.Connection) -> tuple[list[str], VehicleRows]:
    """The names of all enrolled vehicles, as they were enrolled; and what is known of those of which anything is."""
    found = db.execute(_VEHICLES).fetchone()
    names, regions, sites = _words(found[0]), _words(found[1]), _words(found[2])
    bits, paused_ms = _numbers(found[3]), _numbers(found[4])
    known = (bits != 0) | (paused_ms != 0)
    known |= np.fromiter(map(bool, regions), np.bool_, len(names)) | np.fromiter(map(bool, sites), np.bool_, len(names))
    chosen = (
        [names, regions, sites] if known.all() else [list(compress(each, known)) for each in (names, regions, sites)]
    )
    bits = bits[known]
    return names, VehicleRows(
        names=chosen[0],
        regions=chosen[1],
        sites=chosen[2],
        withdrawn=bits & 1 != 0,
        withdrawal_seen=bits & 2 != 0,
        paused_until_ms=paused_ms[known],
        trust=bits >> 3,
        reserve=bits & 4 != 0,
    )


def leases(db: sqlite3.Connection, jobs: Container[int], enrolled: Container[str]) -> tuple[LeaseRows, list[str]]:
    """Leases of these jobs by these vehicles, oldest first; and the names of all others."""
    found = db.execute(_LEASES).fetchone()
    words: list[list[str]] = [_words(found[place]) for place in (0, 1, 2)]
    job_nos, granted_ms, expires_ms, sizes = (_numbers(found[place]) for place in (3, 4, 5, 6))
    lines = np.frombuffer(bytes.fromhex(found[7] or ""), LINE).astype(np.int64)
    counts = sizes // LINE.itemsize
    known = np.fromiter(map(jobs.__contains__, job_nos.tolist()), np.bool_, len(counts))
    known &= np.fromiter(map(enrolled.__contains__, words[1]), np.bool_, len(counts))
    dropped = list(compress(words[0], ~known))
    if dropped:
        lines = lines[np.repeat(known, counts)]
        words = [list(compress(each, known)) for each in words]
        job_nos, granted_ms, expires_ms, counts = (each[known] for each in (job_nos, granted_ms, expires_ms, counts))
    rows = LeaseRows(
        lease_ids=words[0],
        vehicle_ids=words[1],
        incarnations=words[2],
        job_nos=job_nos,
        granted_ms=granted_ms,
        expires_ms=expires_ms,
        lines=lines,
        counts=counts,
        bases=_bases(db, words[0]),
    )
    return rows, dropped


def done_lines(db: sqlite3.Connection, batch_no: int) -> Ints:
    """The lines of a batch that have ended."""
    ends = {"low": line_key(batch_no, 0), "high": line_key(batch_no + 1, 0)}
    return _numbers(db.execute(_DONE, ends).fetchone()[0])


def _bases(db: sqlite3.Connection, lease_ids: list[str]) -> dict[int, dict[int, int]]:
    """Tokens of the checkpoints that came with leases, by the place of the lease."""
    found: dict[str, Any] = dict(db.execute("SELECT lease_id, carried FROM lease WHERE carried <> '{}'").fetchall())
    return {
        place: {int(line): tokens for line, tokens in _base.decode(found[lease_id]).items()}
        for place, lease_id in enumerate(lease_ids if found else ())
        if lease_id in found
    }


def _words(joined: str | None) -> list[str]:
    return [] if joined is None else joined.split(END)


def _numbers(joined: str | None) -> Ints:
    return np.zeros(0, np.int64) if joined is None else np.fromstring(joined, np.int64, sep=",")
