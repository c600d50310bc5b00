"""What a cell has learnt and the books do not say: how fast vehicles are, how long they fall silent, what work takes.

A snapshot holds nothing else, so nothing of it can contradict the books: without one a cell starts as if it met its
vehicles for the first time, and is only less good at sharing work out for some minutes. There is nothing in it about
where a car is, when it comes and goes, or why it may not work; vehicles whose consent is withdrawn are left out.

As bytes: a mark with the version, a checksum, and the columns. What is damaged or of another version is refused as a
whole. Pure: the shell reads and writes.

Called by: ``server.snapshots``, the benchmark. Must not: know files.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.core.columns import WITHDRAWN, Records
from motorpool.core.ids import raws_of
from motorpool.core.scheduler import Scheduler
from motorpool.errors import StoreError

MARK: Final = b"motorpool learnt 1\n"  # the version is part of it
DIGEST_BYTES: Final = 32
LEARNT: Final = np.dtype(
    [
        ("result_ms", "<i8"),
        ("speed", "<f4"),
        ("finished", "<f4"),
        ("blocked_until_s", "<u4"),
        ("outage_s", "<u2"),
        ("failures", "u1"),
        ("narrowed", "u1"),
    ]
)
MAX_SPEED: Final = 1e9  # work tokens a second
MAX_WORK: Final = 1e18


class SnapshotError(StoreError):
    """A snapshot that cannot be used: damaged, or of another version."""

    default_code = "snapshot_unusable"


class JobLearnt(msgspec.Struct, frozen=True, array_like=True):
    """What the lines of a job have taken that had ended, and how many ended in a second."""

    job_no: int
    done: int
    done_work: float
    lines_per_s: float


class Learnt(msgspec.Struct, frozen=True, kw_only=True):
    """What a cell has learnt, of vehicles in columns.

    ``names``: one after the other, ``ends`` where each ends ("<u4"); ``vehicles``: of LEARNT, a row each.
    """

    at_ms: int
    names: bytes
    ends: bytes
    vehicles: bytes
    models: dict[str, float]  # work of a line
    customers: dict[str, float]  # work that each has had
    jobs: list[JobLearnt]

    def rows(self) -> Records:
        """The columns of ``vehicles``."""
        return np.frombuffer(self.vehicles, LEARNT)


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """Copies of columns, of all vehicles: taken between two events, and made less by another thread.

    ``kept``: of which vehicles there is anything to keep.
    """

    names: bytes
    ends: npt.NDArray[np.uint32]
    vehicles: Records
    kept: npt.NDArray[np.bool_]
    rest: Learnt  # without vehicles

    def learnt(self) -> Learnt:
        """What there is to keep."""
        rows = np.flatnonzero(self.kept)
        names = raws_of(self.names, self.ends)
        mine = [names[row] for row in rows.tolist()]
        ends = np.cumsum(np.fromiter(map(len, mine), np.int64, len(mine)))
        vehicles = self.vehicles[rows].tobytes()
        more = {"names": b"".join(mine), "ends": ends.astype("<u4").tobytes(), "vehicles": vehicles}
        return msgspec.structs.replace(self.rest, **more)


def take(scheduler: Scheduler, now_ms: int) -> Taken:
    """What a scheduler has learnt by now."""
    cell = scheduler.cell
    vehicles = cell.t.vehicles[: cell.ids.rows]
    kept = (
        (vehicles["speed"] > 0) | (vehicles["outage_s"] > 0) | (vehicles["failures"] > 0) | (vehicles["narrowed"] > 0)
    )
    learnt = np.zeros(len(vehicles), LEARNT)
    for name in LEARNT.names or ():
        learnt[name] = vehicles[name]
    names, ends = cell.ids.joined()
    used = cell.t.tenants["used"]
    rest = Learnt(
        at_ms=now_ms,
        names=b"",
        ends=b"",
        vehicles=b"",
        models={name: float(cell.t.models["usual_work"][row]) for row, name in enumerate(cell.model_names)},
        customers={name: float(used[row]) for row, name in enumerate(cell.tenant_names)},
        jobs=[
            JobLearnt(job.job_no, job.done, float(cell.t.jobs["done_work"][job.row]), job.lines_per_s)
            for job in scheduler.jobs.values()
        ],
    )
    kept &= vehicles["flags"] & WITHDRAWN == 0
    return Taken(names=names, ends=ends, vehicles=learnt, kept=kept, rest=rest)


def to_bytes(learnt: Learnt) -> bytes:
    """What is kept of a snapshot."""
    data = msgspec.msgpack.encode(learnt)
    return b"".join((MARK, hashlib.sha256(data).digest(), data))


def from_bytes(kept: bytes) -> Learnt:
    """The snapshot in what was kept; SnapshotError if a single bit of it is wrong, or it is of another version."""
    start = len(MARK) + DIGEST_BYTES
    data = memoryview(kept)[start:]
    if not kept.startswith(MARK):
        raise SnapshotError("it is of another version, or no snapshot")
    if hashlib.sha256(data).digest() != kept[len(MARK) : start]:
        raise SnapshotError("it is damaged")
    try:
        learnt = msgspec.msgpack.decode(data, type=Learnt)
        rows = len(learnt.rows())
    except (msgspec.MsgspecError, ValueError) as error:
        raise SnapshotError("it cannot be understood") from error
    whole = len(learnt.ends) == 4 * rows
    marks = np.frombuffer(learnt.ends, "<u4").astype(np.int64) if whole else np.zeros(0, np.int64)
    if not whole or (np.diff(marks, prepend=0) < 0).any() or (int(marks[-1]) if rows else 0) != len(learnt.names):
        raise SnapshotError("its columns do not fit together")
    return learnt


def apply(scheduler: Scheduler, learnt: Learnt, now_ms: int) -> int:
    """Give a scheduler that was filled from the books what it had learnt before; of how many vehicles.

    Only of vehicles, customers, models and jobs that are in the books: nothing comes into being here.
    """
    cell = scheduler.cell
    found = cell.ids.find_all(raws_of(learnt.names, np.frombuffer(learnt.ends, "<u4")))
    here = np.flatnonzero(found >= 0)
    here = here[cell.t.vehicles["flags"][found[here]] & WITHDRAWN == 0]
    rows, vehicles = learnt.rows()[here], cell.t.vehicles
    for name in ("outage_s", "failures", "narrowed"):
        vehicles[name][found[here]] = rows[name]
    vehicles["result_ms"][found[here]] = np.minimum(rows["result_ms"], now_ms)
    if learnt.at_ms <= now_ms:  # else the clock was set back, and they would wait for good
        vehicles["blocked_until_s"][found[here]] = rows["blocked_until_s"]
    for name, limit in (("speed", MAX_SPEED), ("finished", MAX_WORK)):
        vehicles[name][found[here]] = np.nan_to_num(np.clip(rows[name], 0.0, limit), nan=0.0)
    for name, work in learnt.models.items():
        if (model := cell.find_model(name)) >= 0 and 0.0 < work < MAX_WORK:
            cell.t.models["usual_work"][model] = work
    for name, work in learnt.customers.items():
        if name in cell.tenant_names and 0.0 <= work < MAX_WORK:
            cell.t.tenants["used"][cell.tenant(name)] = work
    for known in learnt.jobs:
        job = scheduler.jobs.get(known.job_no)
        if job is None or not 0 < known.done <= job.total or not 0.0 < known.done_work < MAX_WORK:
            continue
        per_line = known.done_work / known.done
        jobs = cell.t.jobs
        jobs["work_per_line"][job.row] = per_line
        jobs["done_work"][job.row] = per_line * job.done  # more may have ended since
        job.lines_per_s = max(known.lines_per_s, 0.0)
    return len(here)
