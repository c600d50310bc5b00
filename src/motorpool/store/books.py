"""What the scheduler commits, in SQL: leases, results, checkpoints, counts, transfers, stories; and reading it back.

Every function works inside the caller's transaction. Called by: ``server.loop``, ``server.assembly``, ``server.admin``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.core import events as ev
from motorpool.core.attribution import Footprint
from motorpool.core.ledger import Transfer, vehicle_of
from motorpool.core.ledger import job as job_rest
from motorpool.core.pricing import Price, Shares
from motorpool.store.owners import DAY_MS, forget_owner

LINE_BITS: Final = 32
MAX_STORY_ENTRIES: Final = 2_000  # of one vehicle or job; the oldest go first
_shares = msgspec.json.Decoder(list[tuple[str, int]])
_base = msgspec.json.Decoder(dict[str, int])
_OPEN: Final = "('validating', 'in_progress', 'finalizing', 'cancelling')"


MAX_DROPPED: Final = 1_000  # lines in one transaction


def line_key(batch_no: int, line: int) -> int:
    """The primary key of a line over all batches."""
    return batch_no << LINE_BITS | line


ResultRow = tuple[int, int, bytes, str | None, int, int, int, int, int, int, int]


def insert_results(db: sqlite3.Connection, rows: list[ResultRow]) -> None:
    """Finished lines: (line_key, status, body, vehicle_id, prompt, completion, carried tokens, cost_micro,
    energy_uwh, energy_is_measured, co2_ug).

    A line that is there already raises sqlite3.IntegrityError: the books refuse to count it twice.
    """
    db.executemany("INSERT INTO result VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def drop_checkpoints(db: sqlite3.Connection, keys: Iterable[int]) -> None:
    """These lines have ended; nobody needs what was generated of them."""
    db.executemany("DELETE FROM checkpoint WHERE line_key = ?", ((key,) for key in keys))


def save_checkpoint(db: sqlite3.Connection, key: int, tokens: int, data: bytes, shares: Shares) -> None:
    """The newest checkpoint of a line."""
    db.execute(
        "INSERT OR REPLACE INTO checkpoint (line_key, tokens, data, shares) VALUES (?, ?, ?, ?)",
        (key, tokens, data, msgspec.json.encode(shares).decode()),
    )


def read_checkpoints(db: sqlite3.Connection, batch_no: int, lines: list[int]) -> dict[int, bytes]:
    """The checkpoints of these lines, as far as there are any."""
    found: dict[int, bytes] = {}
    for line in lines:
        row = db.execute("SELECT data FROM checkpoint WHERE line_key = ?", (line_key(batch_no, line),)).fetchone()
        if row is not None:
            found[line] = row[0]
    return found


def save_held(db: sqlite3.Connection, held: ev.SaveHeld) -> None:
    """Lines were taken from a vehicle."""
    rows = [(line_key(held.job_no, line), held.vehicle_id) for line in held.lines]
    db.executemany("INSERT OR IGNORE INTO held VALUES (?, ?)", rows)


def held(db: sqlite3.Connection, batch_no: int) -> dict[int, tuple[str, ...]]:
    """Which vehicles lines of a batch were taken from."""
    low, high = _range(batch_no)
    found: dict[int, tuple[str, ...]] = {}
    for key, vehicle_id in db.execute(
        "SELECT line_key, vehicle_id FROM held WHERE line_key >= ? AND line_key < ?", (low, high)
    ):
        found[key - low] = (*found.get(key - low, ()), vehicle_id)
    return found


def save_lease(db: sqlite3.Connection, lease: ev.SaveLease) -> None:
    """A new lease, or one that has lost lines."""
    db.execute(
        "INSERT OR REPLACE INTO lease VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            lease.lease_id,
            lease.job_no,
            lease.vehicle_id,
            lease.incarnation,
            lease.granted_ms,
            lease.expires_ms,
            np.array(lease.lines, dtype="<u4").tobytes(),
            msgspec.json.encode({str(line): tokens for line, tokens in lease.base.items()}).decode(),
        ),
    )


def drop_lease(db: sqlite3.Connection, lease_id: str) -> None:
    """A lease is over."""
    db.execute("DELETE FROM lease WHERE lease_id = ?", (lease_id,))


def add_job_counts(db: sqlite3.Connection, counts: ev.SaveJobCounts) -> None:
    """Add to the totals of a batch."""
    db.execute(
        "UPDATE batch SET completed = completed + ?, failed = failed + ?, prompt_tokens = prompt_tokens + ?,"
        " cached_tokens = cached_tokens + ?, completion_tokens = completion_tokens + ?,"
        " carried_tokens = carried_tokens + ?, cost_micro = cost_micro + ?, energy_uwh = energy_uwh + ?,"
        " measured_uwh = measured_uwh + ?, co2_ug = co2_ug + ? WHERE batch_no = ?",
        (
            counts.completed,
            counts.failed,
            counts.prompt_tokens,
            counts.cached_tokens,
            counts.completion_tokens,
            counts.carried_tokens,
            counts.cost_micro,
            counts.energy_uwh,
            counts.measured_uwh,
            counts.co2_ug,
            counts.job_no,
        ),
    )


def add_vehicle_counts(db: sqlite3.Connection, counts: ev.SaveVehicleCounts, now_ms: int) -> None:
    """Add to the totals of a vehicle, and to its day."""
    db.execute(
        "UPDATE vehicle SET lines_done = lines_done + ?, tokens_generated = tokens_generated + ?,"
        " tokens_handed_on = tokens_handed_on + ?, tokens_taken_over = tokens_taken_over + ?,"
        " energy_uwh = energy_uwh + ?, co2_ug = co2_ug + ? WHERE vehicle_id = ?",
        (
            counts.lines_done,
            counts.tokens_generated,
            counts.tokens_handed_on,
            counts.tokens_taken_over,
            counts.energy_uwh,
            counts.co2_ug,
            counts.vehicle_id,
        ),
    )
    done = (counts.lines_done, counts.tokens_generated, counts.energy_uwh, counts.co2_ug)
    db.execute(_DAY, (counts.vehicle_id, now_ms // DAY_MS, 0, *done))


_DAY: Final = (
    "INSERT INTO vehicle_day VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (vehicle_id, day) DO UPDATE SET"
    " earned_micro = earned_micro + excluded.earned_micro, lines_done = lines_done + excluded.lines_done,"
    " tokens_generated = tokens_generated + excluded.tokens_generated, energy_uwh = energy_uwh + excluded.energy_uwh,"
    " co2_ug = co2_ug + excluded.co2_ug"
)
_STATUS_TIMES: Final = {
    "in_progress": "in_progress_ms",
    "finalizing": "finalizing_ms",
    "cancelling": "cancelling_ms",
    "completed": "completed_ms",
    "expired": "expired_ms",
    "cancelled": "cancelled_ms",
    "failed": "failed_ms",
}


def set_status(db: sqlite3.Connection, batch_no: int, status: str, now_ms: int) -> None:
    """A batch changes its status; the time of each change is kept."""
    column = _STATUS_TIMES[status]  # one of our own names, never input
    db.execute(
        f"UPDATE batch SET status = ?, {column} = ? WHERE batch_no = ?",  # noqa: S608
        (status, now_ms, batch_no),
    )


def fail_batch(db: sqlite3.Connection, batch_no: int, now_ms: int, *, code: str, message: str, param: str) -> None:
    """An open batch ends without its files, for a named reason."""
    errors = msgspec.json.encode([{"code": code, "message": message, "param": param, "line": None}]).decode()
    db.execute("UPDATE batch SET errors = ? WHERE batch_no = ?", (errors, batch_no))
    set_status(db, batch_no, "failed", now_ms)


def is_open(db: sqlite3.Connection, batch_no: int) -> bool:
    """Whether a batch is not at its end."""
    query = f"SELECT 1 FROM batch WHERE batch_no = ? AND status IN {_OPEN}"  # noqa: S608
    return db.execute(query, (batch_no,)).fetchone() is not None


def post_transfers(db: sqlite3.Connection, transfers: list[Transfer], now_ms: int) -> None:
    """Move money; an id that is there already raises sqlite3.IntegrityError: nobody is paid twice."""
    db.executemany(
        "INSERT INTO transfer VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(t.transfer_id, t.kind, t.debit, t.credit, t.amount_micro, t.reference, now_ms) for t in transfers],
    )
    # The sum is kept beside the transfers, which only ever grow.
    earned = [(t.amount_micro, vehicle_of(t.credit)) for t in transfers if t.kind == "earning"]
    db.executemany("UPDATE vehicle SET earned_micro = earned_micro + ? WHERE vehicle_id = ?", earned)
    day = now_ms // DAY_MS
    db.executemany(_DAY, [(vehicle_id, day, amount, 0, 0, 0, 0) for amount, vehicle_id in earned])


def save_rests(db: sqlite3.Connection, rests: dict[str, int]) -> None:
    """What is below a millionth now, of each of these names."""
    db.executemany(
        "INSERT INTO rest VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET atto = excluded.atto", rests.items()
    )


def rests(db: sqlite3.Connection) -> Iterator[tuple[str, int]]:
    """All rests that are not zero."""
    cursor = db.cursor()
    cursor.row_factory = None  # there may be a million: plain tuples take half the time
    return cursor.execute("SELECT name, atto FROM rest WHERE atto > 0")


def note_paid(db: sqlite3.Connection, request_id: str) -> None:
    """A live request is paid; one that was paid before raises sqlite3.IntegrityError, whatever it came to."""
    db.execute("INSERT INTO paid_request VALUES (?)", (request_id,))


def balance_micro(db: sqlite3.Connection, account: str) -> int:
    """What an account has received less what it has paid."""
    row = db.execute(
        "SELECT (SELECT coalesce(sum(amount_micro), 0) FROM transfer WHERE credit = :a)"
        " - (SELECT coalesce(sum(amount_micro), 0) FROM transfer WHERE debit = :a)",
        {"a": account},
    ).fetchone()
    return int(row[0])


def add_story(db: sqlite3.Connection, subject: str, at_ms: int, cause_id: str, what: str) -> None:
    """One more entry in the story of a vehicle or job, which keeps its newest entries."""
    cursor = db.execute(
        "INSERT INTO story (subject, at_ms, cause_id, what) VALUES (?, ?, ?, ?)", (subject, at_ms, cause_id, what)
    )
    if cursor.lastrowid is not None and cursor.lastrowid % 500 == 0:
        db.execute(
            "DELETE FROM story WHERE subject = ? AND n <= coalesce((SELECT n FROM story WHERE subject = ?"
            " ORDER BY n DESC LIMIT 1 OFFSET ?), 0)",
            (subject, subject, MAX_STORY_ENTRIES),
        )


def drop_story(db: sqlite3.Connection, subject: str) -> None:
    """Forget the story of a vehicle."""
    db.execute("DELETE FROM story WHERE subject = ?", (subject,))


def read_story(db: sqlite3.Connection, subject: str, limit: int) -> list[sqlite3.Row]:
    """The newest entries, oldest first."""
    rows = db.execute(
        "SELECT at_ms, cause_id, what FROM story WHERE subject = ? ORDER BY n DESC LIMIT ?", (subject, limit)
    ).fetchall()
    return rows[::-1]


def next_epoch(db: sqlite3.Connection) -> int:
    """A number that no start before has had."""
    row = db.execute(
        "INSERT INTO meta VALUES ('epoch', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1 RETURNING value"
    ).fetchone()
    return int(row[0])


# -- vehicles ----------------------------------------------------------------------------------------------------------


def add_vehicle(db: sqlite3.Connection, vehicle_id: str, name: str, owner_key: str, now_ms: int) -> None:
    """Enrol a vehicle, or enrol it again under the same id.

    While its owner's key stays the same, so do the owner's words: enrolling again is no way around a withdrawal.
    """
    known = db.execute("SELECT owner_key, revoked_ms FROM vehicle WHERE vehicle_id = ?", (vehicle_id,)).fetchone()
    if known is not None and known["revoked_ms"] is None:
        owner_key = owner_key or known["owner_key"]
    db.execute(
        "INSERT INTO vehicle (vehicle_id, name, owner_key, enrolled_ms) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (vehicle_id) DO UPDATE SET name = excluded.name, owner_key = excluded.owner_key,"
        " revoked_ms = NULL",
        (vehicle_id, name, owner_key, now_ms),
    )
    if known is not None and owner_key != known["owner_key"]:
        forget_owner(db, vehicle_id)


def save_region(db: sqlite3.Connection, vehicle_id: str, region: str) -> None:
    """Where a vehicle is, as coarsely as it says."""
    db.execute("UPDATE vehicle SET region = ? WHERE vehicle_id = ?", (region, vehicle_id))


def revoke_vehicle(db: sqlite3.Connection, vehicle_id: str, now_ms: int) -> bool:
    """Strike a vehicle off; False if there was none."""
    cursor = db.execute(
        "UPDATE vehicle SET revoked_ms = ? WHERE vehicle_id = ? AND revoked_ms IS NULL", (now_ms, vehicle_id)
    )
    return cursor.rowcount > 0


def list_vehicles(db: sqlite3.Connection) -> list[sqlite3.Row]:
    """All enrolled vehicles, with their totals and what their owners have earned."""
    return db.execute("SELECT * FROM vehicle WHERE revoked_ms IS NULL ORDER BY vehicle_id").fetchall()


# -- reading a batch back ----------------------------------------------------------------------------------------------


def open_batches(db: sqlite3.Connection) -> list[sqlite3.Row]:
    """Batches that are not at their end, oldest first."""
    return db.execute(f"SELECT * FROM batch WHERE status IN {_OPEN} ORDER BY batch_no").fetchall()  # noqa: S608


def recent_batches(db: sqlite3.Connection, limit: int) -> list[sqlite3.Row]:
    """The newest batches, newest first, open or not."""
    return db.execute("SELECT * FROM batch ORDER BY batch_no DESC LIMIT ?", (limit,)).fetchall()


class LineIndex(msgspec.Struct, frozen=True, kw_only=True):
    """Where the lines of a batch are in its input file, how long they are, and how long their answers may be (tokens).

    Shape of each: (lines,).
    """

    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint32]
    limits: npt.NDArray[np.uint32]


def read_index(db: sqlite3.Connection, batch_no: int) -> LineIndex:
    """The index of a batch; empty if it has none (any more)."""
    row = db.execute("SELECT offsets, lengths, limits FROM line_index WHERE batch_no = ?", (batch_no,)).fetchone()
    offsets, lengths, limits = (b"", b"", b"") if row is None else row
    return LineIndex(
        offsets=np.frombuffer(offsets, dtype="<u8").astype(np.uint64),
        lengths=np.frombuffer(lengths, dtype="<u4").astype(np.uint32),
        limits=np.frombuffer(limits, dtype="<u4").astype(np.uint32),
    )


def write_index(db: sqlite3.Connection, batch_no: int, index: LineIndex) -> None:
    """Keep where the lines of a batch are, and how many there are."""
    db.execute(
        "INSERT OR REPLACE INTO line_index VALUES (?, ?, ?, ?)",
        (
            batch_no,
            index.offsets.astype("<u8").tobytes(),
            index.lengths.astype("<u4").tobytes(),
            index.limits.astype("<u4").tobytes(),
        ),
    )
    db.execute("UPDATE batch SET total = ? WHERE batch_no = ?", (len(index.lengths), batch_no))


def write_model(db: sqlite3.Connection, batch_no: int, model: str, price: Price) -> None:
    """What a batch runs on, and what that costs, whatever the catalogue says later."""
    db.execute(
        "UPDATE batch SET model = ?, input_micro = ?, output_micro = ?, owner_share_bp = ? WHERE batch_no = ?",
        (model, price.input_micro, price.output_micro, price.owner_share_bp, batch_no),
    )


class BatchTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What a customer asked of a batch, and what the cell has answered.

    ``regions``: where alone it may run, empty for anywhere. ``promised_ms``: by when it will be done, None without a
    promise; ``quote_known`` False: there was no history to promise by.
    """

    regions: tuple[str, ...] = ()
    min_trust: int = 0
    best_effort: bool = False
    promised_ms: int | None = None
    quote_known: bool | None = None


NO_TERMS: Final = BatchTerms()
_regions: Final = msgspec.json.Decoder(tuple[str, ...])


def save_terms(db: sqlite3.Connection, batch_no: int, terms: BatchTerms) -> None:
    """Keep what was asked and answered; a batch that asks for nothing needs no row."""
    if terms != NO_TERMS:
        db.execute(
            "INSERT OR REPLACE INTO batch_terms VALUES (?, ?, ?, ?, ?, ?)",
            (
                batch_no,
                msgspec.json.encode(terms.regions).decode(),
                terms.min_trust,
                int(terms.best_effort),
                terms.promised_ms,
                None if terms.quote_known is None else int(terms.quote_known),
            ),
        )


def terms_of(db: sqlite3.Connection, batch_no: int) -> BatchTerms:
    """The terms of a batch."""
    row = db.execute("SELECT * FROM batch_terms WHERE batch_no = ?", (batch_no,)).fetchone()
    if row is None:
        return NO_TERMS
    return BatchTerms(
        regions=_regions.decode(row["regions"]),
        min_trust=row["min_trust"],
        best_effort=bool(row["best_effort"]),
        promised_ms=row["promised_ms"],
        quote_known=None if row["quote_known"] is None else bool(row["quote_known"]),
    )


def price_of(batch: sqlite3.Row) -> Price:
    """What a batch in progress costs."""
    return Price(
        input_micro=batch["input_micro"], output_micro=batch["output_micro"], owner_share_bp=batch["owner_share_bp"]
    )


def _range(batch_no: int) -> tuple[int, int]:
    return line_key(batch_no, 0), line_key(batch_no + 1, 0)


def done_lines(db: sqlite3.Connection, batch_no: int) -> npt.NDArray[np.int64]:
    """The lines of a batch that have ended."""
    low, high = _range(batch_no)
    rows = db.execute("SELECT line_key FROM result WHERE line_key >= ? AND line_key < ?", (low, high))
    return np.fromiter((row[0] - low for row in rows), dtype=np.int64)


def carried(db: sqlite3.Connection, batch_no: int) -> tuple[dict[int, Shares], dict[int, int]]:
    """Of the lines that have checkpoints: who generated what, and how many bytes the checkpoints are."""
    low, high = _range(batch_no)
    rows = db.execute(
        "SELECT line_key, shares, length(data) FROM checkpoint WHERE line_key >= ? AND line_key < ?", (low, high)
    ).fetchall()
    return {row[0] - low: _shares.decode(row[1]) for row in rows}, {row[0] - low: row[2] for row in rows}


def leases(db: sqlite3.Connection) -> list[ev.SaveLease]:
    """All leases in the books, oldest first."""
    rows = db.execute("SELECT * FROM lease ORDER BY granted_ms, lease_id").fetchall()
    return [
        ev.SaveLease(
            lease_id=row["lease_id"],
            job_no=row["batch_no"],
            vehicle_id=row["vehicle_id"],
            incarnation=row["incarnation"],
            granted_ms=row["granted_ms"],
            expires_ms=row["expires_ms"],
            lines=np.frombuffer(row["lines"], dtype="<u4").tolist(),
            base={int(line): tokens for line, tokens in _base.decode(row["carried"]).items()},
        )
        for row in rows
    ]


class DoneLine(msgspec.Struct, frozen=True):
    """A finished line as it goes into a customer's file; no footprint where no vehicle ran it."""

    line: int
    status: int
    body: bytes
    footprint: Footprint | None = None


def results_between(
    db: sqlite3.Connection, batch_no: int, first: int, last: int, max_bytes: int
) -> tuple[list[DoneLine], int]:
    """Finished lines from ``first`` on, and the line before which they are complete.

    That line is ``last``, or less if the bodies came to ``max_bytes`` before.
    """
    low, _ = _range(batch_no)
    cursor = db.execute(
        "SELECT line_key, status, body, vehicle_id, energy_uwh, co2_ug, energy_is_measured FROM result"
        " WHERE line_key >= ? AND line_key < ? ORDER BY line_key",
        (low + first, low + last),
    )
    found: list[DoneLine] = []
    size = 0
    try:
        for key, status, body, vehicle_id, energy_uwh, co2_ug, measured in cursor:
            footprint = Footprint(energy_uwh=energy_uwh, co2_ug=co2_ug, is_measured=bool(measured))
            found.append(DoneLine(key - low, status, body, None if vehicle_id is None else footprint))
            size += len(body)
            if size >= max_bytes:
                return found, key - low + 1
    finally:
        cursor.close()
    return found, last


def leftover_batches(db: sqlite3.Connection) -> list[int]:
    """Batches that have ended while ``drop_line_data`` has not come to its end."""
    rows = db.execute(
        f"SELECT batch_no FROM line_index JOIN batch USING (batch_no) WHERE status NOT IN {_OPEN}"  # noqa: S608
    )
    return [row[0] for row in rows]


def drop_line_data(db: sqlite3.Connection, batch_no: int, first: int, max_bytes: int) -> int | None:
    """The files of a batch are written: forget answers from line ``first`` on, about ``max_bytes`` of them.

    Returns where to go on, None at the end. The rows stay as proof of what was paid; the customer deletes the answers
    by deleting the file. Checkpoints and the index of the lines go too, the index last: where it is there, the rest may
    be as well. What is left of the job below a millionth is not charged any more, and forgotten.
    """
    low, high = _range(batch_no)
    cursor = db.execute(
        "SELECT line_key, length(body) FROM result WHERE line_key >= ? AND line_key < ? ORDER BY line_key",
        (low + first, high),
    )
    size = 0
    more: int | None = None
    try:
        for count, (key, length) in enumerate(cursor, start=1):
            size += length
            if size >= max_bytes or count >= MAX_DROPPED:
                more = key - low + 1
                break
    finally:
        cursor.close()
    db.execute(
        "UPDATE result SET body = x'' WHERE line_key >= ? AND line_key < ? AND length(body) > 0",
        (low + first, high if more is None else low + more),
    )
    if more is None:
        db.execute("DELETE FROM checkpoint WHERE line_key >= ? AND line_key < ?", (low, high))
        db.execute("DELETE FROM held WHERE line_key >= ? AND line_key < ?", (low, high))
        batch = db.execute("SELECT batch_id FROM batch WHERE batch_no = ?", (batch_no,)).fetchone()
        db.execute("DELETE FROM rest WHERE name = ?", (job_rest(batch["batch_id"]),))
        db.execute("DELETE FROM line_index WHERE batch_no = ?", (batch_no,))
    return more
