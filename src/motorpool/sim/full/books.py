"""The books of a simulated cell: the real ones in SQLite, and light ones that hold totals alone.

Decides: nothing. Must not: know who runs what.
Called by: ``sim.full.cell``.

The real books are ``store.database``, ``store.books`` and ``server.writing`` as the control plane uses them, on a file
in a folder of the world, so that a crash of the cell loses what was not committed and nothing else. Nothing in a
simulation can lose the machine's power, so SQLite need not wait for a disk. A full disk is SQLite's own: the file may
not grow. The light ones cannot be restored and are for long worlds without crashes.
"""

from __future__ import annotations

import sqlite3
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol

from motorpool.core import events as ev
from motorpool.core.ledger import vehicle_of
from motorpool.core.scheduler import Scheduler
from motorpool.server.entries import Entry
from motorpool.server.writing import write
from motorpool.sim.full.work import PRICE, Job
from motorpool.store import books, customer
from motorpool.store.database import Database

FILE: Final = "cell.db"
NO_LIMIT: Final = 1 << 30  # pages


class Books(Protocol):
    """What the cell needs of its books."""

    def begin(self) -> None:
        """Begin a transaction."""

    def write(self, command: ev.Command, entry: Entry, now_ms: int) -> bool:
        """Write one command; False if it is an act for after the commit."""

    def note(self, subject: str, now_ms: int, cause: str, what: str) -> None:
        """One more entry in a story."""

    def commit(self) -> None:
        """Make it durable; raises what SQLite raises on a full disk."""

    def roll_back(self) -> None:
        """Undo what was not committed."""

    def enrol(self, vehicle_ids: list[str], now_ms: int) -> None:
        """Enrol vehicles."""

    def hand_in(self, job: Job) -> bool:
        """Keep a job whose lines have passed their checks; False if that was done before."""

    def finish(self, job_no: int, now_ms: int) -> str:
        """The files of a job are written: its last status."""

    def checkpoints(self, job_no: int, lines: list[int]) -> dict[int, bytes]:
        """Checkpoints, as far as there are any."""


class SqlBooks:
    """The real books."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._path.write_bytes(_empty())
        self.database = self._open()

    def _open(self) -> Database:
        database = Database(self._path)
        for connection in (database.writer, database.reader):
            connection.execute("PRAGMA synchronous = OFF")
        return database

    @property
    def db(self) -> sqlite3.Connection:
        """The writing connection."""
        return self.database.writer

    def reopen(self) -> None:
        """The process has died: what was not committed is gone."""
        self.database.close()
        self.database = self._open()

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def limit(self, more_pages: int | None) -> None:
        """A disk with room for so many more pages, or (None) for all."""
        pages = int(self.db.execute("PRAGMA page_count").fetchone()[0])
        most = NO_LIMIT if more_pages is None else pages + more_pages
        self.db.execute(f"PRAGMA max_page_count = {most}")

    def begin(self) -> None:
        """Begin a transaction."""
        self.db.execute("BEGIN IMMEDIATE")

    def write(self, command: ev.Command, entry: Entry, now_ms: int) -> bool:
        """Write one command."""
        return write(self.db, command, entry, now_ms)

    def note(self, subject: str, now_ms: int, cause: str, what: str) -> None:
        """One more entry in a story."""
        books.add_story(self.db, subject, now_ms, cause, what)

    def commit(self) -> None:
        """Make it durable."""
        self.db.execute("COMMIT")

    def roll_back(self) -> None:
        """Undo what was not committed."""
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")

    def enrol(self, vehicle_ids: list[str], now_ms: int) -> None:
        """Enrol vehicles."""
        self.begin()
        for vehicle_id in vehicle_ids:
            books.add_vehicle(self.db, vehicle_id, vehicle_id, "", now_ms)
        self.commit()

    def hand_in(self, job: Job) -> bool:
        """Keep a job, inside the cell's transaction."""
        row = self.db.execute("SELECT batch_no FROM batch WHERE batch_id = ?", (job.job_id,)).fetchone()
        if row is not None:
            return False
        file_id = f"file-{job.number}"
        size = sum(len(body) for body in job.bodies)
        customer.insert_file(
            self.db,
            customer.FileRow(
                file_id=file_id,
                account=job.account,
                purpose="batch",
                filename=f"{job.number}.jsonl",
                bytes=size,
                blob=file_id,
                created_ms=job.handed_ms,
            ),
        )
        kept = customer.insert_batch(
            self.db,
            customer.BatchRow(
                batch_no=0,
                batch_id=job.job_id,
                account=job.account,
                endpoint="/v1/chat/completions",
                input_file_id=file_id,
                completion_window="24h",
                status="validating",
                created_ms=job.handed_ms,
                expires_ms=job.expires_ms,
            ),
        )
        job.job_no = kept.batch_no
        books.write_index(self.db, kept.batch_no, job.index())
        books.write_model(self.db, kept.batch_no, job.model, PRICE)
        return True

    def finish(self, job_no: int, now_ms: int) -> str:
        """As ``server.assembly`` does, without the files; a transaction of its own."""
        row = self.db.execute("SELECT * FROM batch WHERE batch_no = ?", (job_no,)).fetchone()
        if books.is_open(self.db, job_no):
            if row["cancelling_ms"] is not None:
                final = "cancelled"
            else:
                final = "completed" if row["completed"] + row["failed"] == row["total"] else "expired"
            self.begin()
            books.set_status(self.db, job_no, final, now_ms)
            self.commit()
        else:
            final = row["status"]
        return str(final)

    def checkpoints(self, job_no: int, lines: list[int]) -> dict[int, bytes]:
        """Checkpoints, as far as there are any."""
        return books.read_checkpoints(self.db, job_no, lines)


@lru_cache(maxsize=1)
def _empty() -> bytes:
    """Books without an entry: their schema is applied once a process."""
    with tempfile.TemporaryDirectory(prefix="motorpool-sim-") as folder:
        path = Path(folder) / FILE
        Database(path).close()
        return path.read_bytes()


def restore(db: sqlite3.Connection, scheduler: Scheduler, enrolled: set[str], jobs: dict[str, Job]) -> list[ev.Command]:
    """Put the books back into a new scheduler, as ``server.loop`` does; what has to be written because of it.

    Jobs that only wait for their files are not put back; the caller finishes them.
    """
    scheduler.rests.restore(books.rests(db))
    for row in books.list_vehicles(db):
        enrolled.add(row["vehicle_id"])
        withdrawn = row["withdrawn_ms"] is not None
        if withdrawn or row["region"] or row["paused_until_ms"]:
            scheduler.restore_vehicle(
                row["vehicle_id"],
                region=row["region"],
                withdrawn=withdrawn,
                withdrawal_seen=bool(row["withdrawal_seen"]),
                paused_until_ms=row["paused_until_ms"],
            )
    for row in books.open_batches(db):
        if row["status"] not in {"finalizing", "validating"}:
            number = row["batch_no"]
            carried, checkpoint_bytes = books.carried(db, number)
            scheduler.restore_job(
                jobs[row["batch_id"]].started(),
                done=books.done_lines(db, number),
                carried=carried,
                checkpoint_bytes=checkpoint_bytes,
                held=books.held(db, number),
                cancelling_ms=row["cancelling_ms"],
            )
    commands: list[ev.Command] = []
    for lease in books.leases(db):
        if lease.job_no in scheduler.jobs and lease.vehicle_id in enrolled:
            scheduler.restore_lease(lease)
        else:
            commands.append(ev.DropLease(lease_id=lease.lease_id))
    return commands


_ACTS: Final = frozenset((ev.SendGrant, ev.SendRevoke, ev.SendOwnerNews, ev.AssembleFiles))
_NOT_COUNTED: Final = _ACTS | {ev.SaveLease, ev.DropLease}


class LightBooks:
    """Totals by job and by vehicle, and the sum of all money; nothing that was committed can be read back."""

    def __init__(self) -> None:
        self.status: dict[int, str] = {}
        self.lines: dict[int, list[int]] = {}  # total, completed, failed
        self.done_by: dict[str, int] = {}
        self.earned_micro: dict[str, int] = {}
        self.paid_micro = 0
        self.tokens = 0
        self.lost_tokens = 0
        self._checkpoints: dict[tuple[int, int], bytes] = {}
        self._job_no = 0
        self.db = sqlite3.connect(":memory:")  # never written: for whoever wants a connection

    def begin(self) -> None:
        """Begin a transaction."""

    def commit(self) -> None:
        """Always works."""

    def roll_back(self) -> None:
        """Never needed."""
        raise AssertionError("light books cannot be rolled back")

    def enrol(self, vehicle_ids: list[str], now_ms: int) -> None:
        """Every vehicle is."""

    def note(self, subject: str, now_ms: int, cause: str, what: str) -> None:
        """Stories are not kept."""

    def write(self, command: ev.Command, entry: Entry, now_ms: int) -> bool:  # noqa: ARG002  # as the real ones
        """Count."""
        if type(command) in _NOT_COUNTED:
            return type(command) not in _ACTS
        match command:
            case ev.SaveJobCounts():
                counts = self.lines[command.job_no]
                counts[1] += command.completed
                counts[2] += command.failed
                self.tokens += command.completion_tokens
            case ev.SaveVehicleCounts():
                done = self.done_by.get(command.vehicle_id, 0)
                self.done_by[command.vehicle_id] = done + command.lines_done
            case ev.PostTransfers():
                self._post(command)
            case ev.SaveCheckpoints():
                for line, place in zip(command.lines, command.picks, strict=True):
                    self._checkpoints[command.job_no, line] = entry.bodies[place]
            case ev.SaveJobStatus():
                self.status[command.job_no] = command.status
            case ev.SaveResults():
                for line in command.with_checkpoint:
                    self._checkpoints.pop((command.job_no, line), None)
        return True

    def _post(self, command: ev.PostTransfers) -> None:
        for transfer in command.transfers:
            if transfer.kind == "earning":
                vehicle_id = vehicle_of(transfer.credit)
                self.earned_micro[vehicle_id] = self.earned_micro.get(vehicle_id, 0) + transfer.amount_micro
            else:
                self.paid_micro += transfer.amount_micro

    def hand_in(self, job: Job) -> bool:
        """Keep a job."""
        self._job_no += 1
        job.job_no = self._job_no
        self.lines[job.job_no] = [len(job.lines), 0, 0]
        return True

    def finish(self, job_no: int, now_ms: int) -> str:  # noqa: ARG002  # as the real ones
        """Its last status."""
        total, completed, failed = self.lines[job_no]
        cancelled = self.status.get(job_no) == "cancelling"
        final = "cancelled" if cancelled else "completed" if completed + failed == total else "expired"
        self.status[job_no] = final
        return final

    def checkpoints(self, job_no: int, lines: list[int]) -> dict[int, bytes]:
        """Checkpoints, as far as there are any."""
        return {line: self._checkpoints[job_no, line] for line in lines if (job_no, line) in self._checkpoints}
