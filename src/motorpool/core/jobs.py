"""A job and its lines in columns.

About 13 bytes a line: state, length, limit of its tokens, row of the lease that holds it. Lines never granted are those
from ``cursor`` on; lines that came back wait in ``again``, lowest first, and go before them.

Called by: ``core.scheduler``.
"""

from __future__ import annotations

import heapq
from typing import Final

import numpy as np
import numpy.typing as npt

from motorpool.core.cell import Cell
from motorpool.core.columns import SHADOW
from motorpool.core.pricing import Price, Shares
from motorpool.types import Kind

PENDING: Final = 0
LEASED: Final = 1
DONE: Final = 2
NOBODY: Final = -1


class Job:
    """One batch in progress: its lines here, what is reckoned with in its row of the cell's table."""

    def __init__(
        self,
        cell: Cell,
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
        self.expelled: set[str] = set()  # leases that ended where the job may not run: nothing of them counts
        self.shadows: dict[int, int] = {}  # lines that run a second time: the row of the lease
        self.strikes: dict[int, list[str]] = {}  # the vehicles that failed over a line, in order
        self.overruns: dict[int, int] = {}  # how often a lease was over before a line showed one more token
        self.held: dict[int, tuple[str, ...]] = {}  # the vehicles that a line was taken from; they may still finish it
        self.carried: dict[int, Shares] = {}
        self.checkpoint_bytes: dict[int, int] = {}
        self.cancelling_ms: int | None = None
        self.lines_per_s = 0.0  # over all vehicles, smoothed, for the estimate of the time left
        self.rate_at_ms = 0
        self.rate_done = 0
        self._cell = cell
        self.row = cell.enter_job(
            job_no=job_no,
            expires_ms=expires_ms,
            model=model,
            tenant=account,
            total=self.total,
            most_work=float(limits.mean()) if len(limits) else 0.0,
        )

    def leave(self) -> None:
        """Give the row back: the job is over."""
        self._cell.leave_job(self.row)

    @property
    def done(self) -> int:
        """Lines that have ended."""
        return int(self._cell.t.jobs["done"][self.row])

    @property
    def leased(self) -> int:
        """Lines that a vehicle holds."""
        return int(self._cell.t.jobs["leased"][self.row])

    @property
    def pending(self) -> int:
        """Lines that wait for a vehicle."""
        return self.total - self.done - self.leased

    def take(self, count: int, max_bytes: int) -> list[int]:
        """Up to ``count`` pending lines of at most ``max_bytes`` together (but at least one), in ascending parts.

        The caller leases them. A line counts with its checkpoint: both travel in one message.
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
        return taken

    def lease(self, lines: list[int], row: int) -> None:
        """These lines are held under the lease of this row from now on; the row's counts are the caller's."""
        self.state[lines] = LEASED
        self.holder[lines] = row
        first, last = min(lines), max(lines)
        leases = self._cell.t.leases
        leases["first"][row], leases["span"][row] = first, last + 1 - first

    def lines_of(self, row: int) -> list[int]:
        """The lines that a lease still holds."""
        leases = self._cell.t.leases
        if leases["flags"][row] & SHADOW:
            return sorted(line for line, shadow in self.shadows.items() if shadow == row)
        first = int(leases["first"][row])
        window = self.holder[first : first + int(leases["span"][row])]
        return (np.flatnonzero(window == row) + first).tolist()

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
        self._cell.t.jobs["done"][self.row] = len(done)
        self.cursor = self.total

    def requeue(self) -> None:
        """After a restart: what has not ended and is in no lease waits.

        Lines behind the last one that anybody ever had count as never granted: a number for each would take more room
        than all the columns. One that somebody had may still come in, and is none of them.
        """
        touched = np.flatnonzero(self.state != PENDING)
        self.cursor = max(int(touched[-1]) if len(touched) else -1, *self.carried, *self.held, -1) + 1
        self.again = np.flatnonzero(self.state[: self.cursor] == PENDING).tolist()

    def put_back(self, lines: list[int]) -> None:
        """These leased lines wait again."""
        for line in lines:
            self.state[line] = PENDING
            self.holder[line] = NOBODY
            heapq.heappush(self.again, line)
        self._cell.t.jobs["leased"][self.row] -= len(lines)

    def finish(self, lines: list[int], work: float = 0.0) -> None:
        """Lines have ended, whether they were leased or waiting, and took so much work together."""
        if not lines:
            return
        leased = int(np.count_nonzero(self.state[lines] == LEASED))
        self._cell.t.jobs["leased"][self.row] -= leased
        self.state[lines] = DONE
        self.holder[lines] = NOBODY
        self._cell.k.finished(self._cell.t, self.row, len(lines), work)
        for known in (self.carried, self.checkpoint_bytes, self.strikes, self.overruns, self.held):
            if known:
                for line in lines:
                    known.pop(line, None)

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
