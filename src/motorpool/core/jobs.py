"""A job and its lines in columns, and the leases that vehicles hold on them.

About 13 bytes a line: state, length, limit of its tokens, holder. Lines never granted are those from ``cursor`` on;
lines that came back wait in ``again``, lowest first, and go before them.

Called by: ``core.scheduler``.
"""

from __future__ import annotations

import heapq
from typing import Final

import numpy as np
import numpy.typing as npt

from motorpool.core.pricing import Price, Shares
from motorpool.types import Kind

PENDING: Final = 0
LEASED: Final = 1
DONE: Final = 2
NOBODY: Final = -1


class Lease:
    """The right of one vehicle to run some lines of one job until ``expires_ms``; ``lines`` shrinks as they end."""

    __slots__ = (
        "base",
        "excused",
        "expires_ms",
        "granted_ms",
        "incarnation",
        "job",
        "lease_id",
        "lines",
        "missing_ms",
        "number",
        "seen",
        "sent_ms",
        "sent_times",
        "vehicle_id",
    )

    def __init__(
        self,
        *,
        number: int,
        lease_id: str,
        job: Job,
        vehicle_id: str,
        incarnation: str,
        lines: set[int],
        base: dict[int, int],
        granted_ms: int,
        expires_ms: int,
    ) -> None:
        self.number = number
        self.lease_id = lease_id
        self.job = job
        self.vehicle_id = vehicle_id
        self.incarnation = incarnation
        self.lines = lines
        self.base = base
        self.granted_ms = granted_ms
        self.expires_ms = expires_ms
        self.seen = False  # the vehicle has said that it holds it
        self.sent_ms = granted_ms
        self.sent_times = 1
        self.missing_ms: int | None = None  # since when the vehicle does not say so any more
        self.excused = False  # it went missing because the owner took the car: no fault of the vehicle's


class Job:
    """One batch in progress."""

    def __init__(
        self,
        *,
        job_no: int,
        job_id: str,
        account: str,
        kind: Kind,
        model: str,
        price: Price,
        expires_ms: int,
        lengths: npt.NDArray[np.uint32],
        limits: npt.NDArray[np.uint32],
    ) -> None:
        self.job_no = job_no
        self.job_id = job_id
        self.account = account
        self.kind = kind
        self.model = model
        self.price = price
        self.expires_ms = expires_ms
        self.lengths = lengths
        self.limits = limits
        self.total = len(lengths)
        self.state = np.zeros(self.total, dtype=np.uint8)
        self.holder = np.full(self.total, NOBODY, dtype=np.int32)
        self.cursor = 0
        self.again: list[int] = []
        self.done = 0
        self.leased = 0
        self.strikes: dict[int, list[str]] = {}  # the vehicles that failed over a line, in order
        self.overruns: dict[int, int] = {}  # how often a lease was over before a line showed one more token
        self.held: dict[int, tuple[str, ...]] = {}  # the vehicles that a line was taken from; they may still finish it
        self.carried: dict[int, Shares] = {}
        self.checkpoint_bytes: dict[int, int] = {}
        self.cancelling_ms: int | None = None
        self.grants = 0  # makes lease ids of this job unique
        self.lines_per_s = 0.0  # over all vehicles, smoothed, for the estimate of the time left
        self.rate_at_ms = 0
        self.rate_done = 0

    @property
    def pending(self) -> int:
        """Lines that wait for a vehicle."""
        return self.total - self.done - self.leased

    def take(self, count: int, max_bytes: int) -> list[int]:
        """Up to ``count`` pending lines of at most ``max_bytes`` together (but at least one), now LEASED.

        A line counts with its checkpoint: both travel in one message.
        """
        taken: list[int] = []
        size = 0
        while self.again and len(taken) < count:
            line = self.again[0]
            if self.state[line] != PENDING:  # it ended after it had come back
                heapq.heappop(self.again)
                continue
            size += int(self.lengths[line]) + self.checkpoint_bytes.get(line, 0)
            if taken and size > max_bytes:
                break
            heapq.heappop(self.again)
            taken.append(line)
        if len(taken) < count and self.cursor < self.total and size <= max_bytes:
            taken.extend(self._take_fresh(count - len(taken), max_bytes - size, must=not taken))
        if taken:
            self.state[taken] = LEASED
            self.leased += len(taken)
        return taken

    def _take_fresh(self, count: int, max_bytes: int, *, must: bool) -> list[int]:
        window = self.lengths[self.cursor : self.cursor + count].astype(np.int64)
        fits = int(np.searchsorted(np.cumsum(window), max_bytes, side="right"))
        fits = min(max(fits, 1 if must else 0), len(window))
        first = self.cursor
        self.cursor += fits
        return list(range(first, first + fits))

    def restore(self, done: npt.NDArray[np.int64]) -> None:
        """After a restart: these lines have ended. ``restore_lease`` and ``requeue`` follow."""
        self.state[done] = DONE
        self.done = len(done)
        self.cursor = self.total

    def restore_lease(self, lease: Lease) -> None:
        """After a restart: a lease from the books holds those of its lines that have not ended."""
        lease.lines = {line for line in lease.lines if self.state[line] == PENDING}
        held = sorted(lease.lines)
        self.state[held] = LEASED
        self.holder[held] = lease.number
        self.leased += len(held)

    def requeue(self) -> None:
        """After a restart: what has not ended and is in no lease waits."""
        self.again = np.flatnonzero(self.state == PENDING).tolist()

    def put_back(self, lines: list[int]) -> None:
        """These leased lines wait again."""
        for line in lines:
            self.state[line] = PENDING
            self.holder[line] = NOBODY
            heapq.heappush(self.again, line)
        self.leased -= len(lines)

    def finish(self, line: int) -> None:
        """A line has ended, whether it was leased or waiting."""
        if self.state[line] == LEASED:
            self.leased -= 1
        self.state[line] = DONE
        self.holder[line] = NOBODY
        self.done += 1
        self.carried.pop(line, None)
        self.checkpoint_bytes.pop(line, None)
        self.strikes.pop(line, None)
        self.overruns.pop(line, None)
        self.held.pop(line, None)

    def measure(self, now_ms: int) -> None:
        """Smooth the rate of finished lines; called about once a second."""
        if self.rate_at_ms:
            rate = (self.done - self.rate_done) * 1000 / max(1, now_ms - self.rate_at_ms)
            self.lines_per_s = rate if self.lines_per_s == 0 else 0.8 * self.lines_per_s + 0.2 * rate
        self.rate_at_ms, self.rate_done = now_ms, self.done

    def left_ms(self) -> int | None:
        """The estimated time until the last line ends, or None while nothing is known."""
        if self.lines_per_s <= 0:
            return None
        return int((self.total - self.done) * 1000 / self.lines_per_s)

    def validate(self) -> None:
        """Every count agrees with the columns."""
        assert int((self.state == DONE).sum()) == self.done
        assert int((self.state == LEASED).sum()) == self.leased
        assert int((self.holder != NOBODY).sum()) == self.leased
        waiting = {line for line in self.again if self.state[line] == PENDING}
        fresh = set(np.flatnonzero(self.state[self.cursor :] == PENDING) + self.cursor)
        assert len(waiting) == sum(1 for line in self.again if self.state[line] == PENDING), "a line waits twice"
        assert len(waiting | fresh) == self.pending, "a pending line would never be granted"


class Waiting:
    """The jobs that may have waiting lines, the most urgent of each model first; those that have none go later."""

    def __init__(self) -> None:
        self._heaps: dict[str, list[tuple[int, int]]] = {}
        self._jobs: dict[int, Job] = {}

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def __contains__(self, job: Job) -> bool:
        return job.job_no in self._jobs

    def add(self, job: Job) -> None:
        """This job has waiting lines (again)."""
        if job.pending > 0 and job.job_no not in self._jobs:
            self._jobs[job.job_no] = job
            heapq.heappush(self._heaps.setdefault(job.model, []), (job.expires_ms, job.job_no))

    def drop(self, job: Job) -> None:
        """This job is over."""
        self._jobs.pop(job.job_no, None)
        if not self._jobs:
            self._heaps.clear()

    def first(self, model: str | None) -> Job | None:
        """The most urgent job of a model that has waiting lines and is not cancelled."""
        heap = self._heaps.get(model or "")
        while heap:
            job = self._jobs.get(heap[0][1])
            if job is not None and job.pending > 0 and job.cancelling_ms is None:
                return job
            _, number = heapq.heappop(heap)
            self._jobs.pop(number, None)
        self._heaps.pop(model or "", None)
        return None
