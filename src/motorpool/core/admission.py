"""Whether a job can be promised: a quote at hand-in, or a "no" with its reason and the soonest time that could be met.

Decides: admission, by what the fleet will be able to do with 90 % certainty and by what was promised already. Must not:
run or order jobs, or take a promise back. Called by: ``core.cell`` when a batch is handed in, ``sim.plan``.

Theory. Capacity comes in classes that share no vehicle; a kind of job (its model, regions and trust) may use some of
them. Within one class work is fluid, so earliest deadline first meets all deadlines exactly if for every moment d what
is due by d is no more than the capacity up to d. Jobs that may use several classes are laid out one after the other,
earliest deadline first, each filling the classes that the fewest kinds may use before the others. If all fit, this is a
schedule that meets every deadline; that it might miss another one, which a solver would find, makes the rule cautious
and never wrong. What a class can still give up to a moment d, without making any promise late, is

    R(d) = the least of capacity(t) - due(t) over all t >= d

and a new job fits if its classes' R(deadline) add up to its tokens. R never falls with d, and the layout of the
promised jobs does not depend on the new one. So less work or a later deadline never turns a yes into a no.

Costs: O(J log J + J K) for a book of J jobs and K classes, O(log (J + hours)) for a quote after the first of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.core.forecast import Bands
from motorpool.core.jit import allocating_kernel

HOUR_MS: Final = 3_600_000
MAX_TOKENS_H: Final = 2_000_000_000_000  # of a class: times the milliseconds of an hour it still fits 64 bits
WHOLE_BP: Final = 10_000
BUSY_FROM_BP: Final = 5_000  # of the capacity up to the deadline: from here on work costs more
MAX_FACTOR_BP: Final = 20_000

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Why(StrEnum):
    """Why a job is refused."""

    NO_CLASS = "no_class"  # no class of vehicles has its model, regions and trust
    PAST_DEADLINE = "past_deadline"  # the deadline is not in the future
    NOT_ENOUGH = "not_enough"  # what is left up to the deadline is less than the job


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """The job can be done.

    ``finish_ms``: by when it can be promised, no later than its deadline. ``price_bp``: what its price is to be
    multiplied by, in hundredths of a percent; 10,000 while up to half of the capacity is promised, rising to 20,000.
    ``known`` False: there is no history of some of its classes, and nothing stands behind the promise.
    """

    finish_ms: int
    price_bp: int
    known: bool


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """The job cannot be promised. ``soonest_ms``: the soonest deadline that could be; None: none that is foretold."""

    why: Why
    soonest_ms: int | None = None


Verdict = Admitted | Refused


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What each class can do in each hour, in tokens [classes, hours]; column 0 begins at ``start_ms``.

    ``known`` [classes, hours]: False where nothing is known, and tokens are 0.
    """

    start_ms: int
    tokens: Ints
    known: Bools

    @classmethod
    def of(cls, bands: Bands, harvest: float = 1.0) -> Capacity:
        """The 10 % band of a forecast, of which the share ``harvest`` becomes results."""
        tokens = np.clip(np.floor(bands.low * 3600.0 * harvest), 0, MAX_TOKENS_H).astype(np.int64)
        return cls(start_ms=bands.start_ms, tokens=np.where(bands.known, tokens, 0), known=bands.known)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs that were promised, in columns of equal length: tokens left, deadline, kind (row of ``eligible``)."""

    tokens: Ints
    deadline_ms: Ints
    kind: Ints

    @classmethod
    def none(cls) -> Load:
        """No jobs."""
        empty = np.zeros(0, dtype=np.int64)
        return cls(tokens=empty, deadline_ms=empty, kind=empty)


@allocating_kernel
def lay_out(  # noqa: PLR0917  # kernels take no keywords
    order: Ints, tokens: Ints, kind: Ints, eligible: Bools, first: Ints, reach: Ints, out: Ints
) -> int:
    """Lay jobs out over classes; returns how many tokens find no place in time.

    ``order``: jobs by deadline; ``first``: classes, those that the fewest kinds may use first; ``reach`` [jobs,
    classes]: capacity up to each job's deadline; ``out`` [jobs, classes]: tokens of each job in each class. What finds
    no place is put into the job's first class, where it is late and stands in the way of new promises.
    """
    used = np.zeros(len(first), dtype=np.int64)
    late = 0
    for place in range(len(order)):
        j = order[place]
        left = int(tokens[j])
        home = -1
        for n in range(len(first)):
            k = first[n]
            if not eligible[kind[j], k]:
                continue
            if home < 0:
                home = k
            take = min(left, int(reach[j, k]) - int(used[k]))
            if take > 0:
                out[j, k] += take
                used[k] += take
                left -= take
            if left == 0:
                break
        if left > 0 and home >= 0:
            out[j, home] += left
            used[home] += left
            late += left
    return late


class Book:
    """What is promised, laid out over what can be done: asked for quotes, and told of new promises.

    Made anew when the forecast or the jobs' progress has changed. Not thread-safe.
    """

    def __init__(
        self,
        capacity: Capacity,
        eligible: Bools,
        load: Load,
        now_ms: int,
        *,
        allocate: Callable[..., int] = lay_out,
    ) -> None:
        """``eligible`` [kinds, classes]: which classes a kind may use. ``allocate``: ``lay_out``, compiled or not."""
        classes, hours = capacity.tokens.shape
        assert eligible.shape[1] == classes
        self._capacity = capacity
        self._eligible = eligible
        self._now_ms = max(now_ms, capacity.start_ms)
        self._end_ms = capacity.start_ms + hours * HOUR_MS
        self._cumulated = np.zeros((classes, hours + 1), dtype=np.int64)
        np.cumsum(np.clip(capacity.tokens, 0, MAX_TOKENS_H), axis=1, out=self._cumulated[:, 1:])
        self._before = self._up_to(np.array([self._now_ms]))[:, 0]
        self._first = np.lexsort((np.arange(classes), eligible.sum(axis=0))).astype(np.int64)
        due_ms = np.clip(load.deadline_ms, self._now_ms, self._end_ms)
        laid = np.zeros((len(due_ms), classes), dtype=np.int64)
        reach = np.ascontiguousarray((self._up_to(due_ms) - self._before[:, None]).T)
        order = np.argsort(due_ms, kind="stable").astype(np.int64)
        self.late_tokens = allocate(order, load.tokens, load.kind, eligible, self._first, reach, laid)
        """Tokens that were promised and will be late by the forecast: it has become worse since."""
        points, index = np.unique(due_ms, return_inverse=True)
        due = np.zeros((len(points), classes), dtype=np.int64)
        np.add.at(due, index, laid)
        self._due: dict[int, Ints] = {int(at): due[n] for n, at in enumerate(points)}
        self._draw_curves()

    def quote(self, kind: int, tokens: int, deadline_ms: int) -> Verdict:
        """Whether a job of so many tokens can be promised by then."""
        mine = self._eligible[kind]
        if not mine.any():
            return Refused(why=Why.NO_CLASS)
        if deadline_ms <= self._now_ms:
            return Refused(why=Why.PAST_DEADLINE, soonest_ms=self._soonest(kind, tokens))
        soonest = self._soonest(kind, tokens)
        if soonest is not None and soonest <= deadline_ms:
            return Admitted(finish_ms=soonest, price_bp=self._price(kind, tokens, soonest, deadline_ms), known=True)
        last = -(-(min(deadline_ms, self._end_ms) - self._capacity.start_ms) // HOUR_MS)
        from_hour = (self._now_ms - self._capacity.start_ms) // HOUR_MS
        if not self._capacity.known[mine, from_hour:last].all():
            return Admitted(finish_ms=deadline_ms, price_bp=WHOLE_BP, known=False)
        return Refused(why=Why.NOT_ENOUGH, soonest_ms=soonest)

    def take(self, kind: int, tokens: int, deadline_ms: int) -> None:
        """The job was promised: it counts from now on. One that does not fit is late in its first class."""
        due_ms = min(max(deadline_ms, self._now_ms), self._end_ms)
        free = self._left(due_ms)
        placed = np.zeros(len(free), dtype=np.int64)
        mine = [int(k) for k in self._first if self._eligible[kind, k]]
        left = tokens
        for k in mine:
            placed[k] = min(left, int(free[k]))
            left -= int(placed[k])
        if left > 0 and mine:
            placed[mine[0]] += left
            self.late_tokens += left
        self._due[due_ms] = self._due.get(due_ms, 0) + placed
        self._draw_curves()

    # -- curves --------------------------------------------------------------------------------------------------------

    def _up_to(self, at_ms: Ints) -> Ints:
        """Capacity of each class from the beginning of the forecast up to moments within it [classes, moments]."""
        passed = np.clip(at_ms, self._capacity.start_ms, self._end_ms) - self._capacity.start_ms
        hour = np.minimum(passed // HOUR_MS, self._capacity.tokens.shape[1] - 1)
        part = np.clip(self._capacity.tokens, 0, MAX_TOKENS_H)[:, hour] * (passed - hour * HOUR_MS) // HOUR_MS
        found: Ints = self._cumulated[:, hour] + part
        return found

    def _draw_curves(self) -> None:
        """``_at``: full hours and deadlines from now on; ``_dues`` and ``_rest`` [classes, moments]: due and R."""
        hours = np.arange(self._now_ms // HOUR_MS + 1, -(-self._end_ms // HOUR_MS) + 1) * HOUR_MS
        own = np.array(sorted(self._due), dtype=np.int64)
        self._at = np.unique(np.concatenate([[self._now_ms, self._end_ms], np.minimum(hours, self._end_ms), own]))
        step = np.zeros((len(self._cumulated), len(self._at)), dtype=np.int64)
        if len(own):
            step[:, np.searchsorted(self._at, own)] = np.stack([self._due[int(at)] for at in own], axis=1)
        self._dues = np.cumsum(step, axis=1)
        self._reach = self._up_to(self._at) - self._before[:, None]
        self._rest = np.minimum.accumulate((self._reach - self._dues)[:, ::-1], axis=1)[:, ::-1]
        self._totals: dict[int, Ints] = {}
        self._wholes: dict[int, Ints] = {}

    def _left(self, at_ms: int) -> Ints:
        """R of each class at a moment; nothing that is late makes it less than 0."""
        at_ms = min(max(at_ms, self._now_ms), self._end_ms)
        n = int(np.searchsorted(self._at, at_ms, side="right")) - 1
        if int(self._at[n]) == at_ms:
            rest = self._rest[:, n]
        else:
            here = self._up_to(np.array([at_ms]))[:, 0] - self._before - self._dues[:, n]
            rest = np.minimum(here, self._rest[:, n + 1])
        found: Ints = np.maximum(rest, 0)
        return found

    def _total(self, kind: int) -> Ints:
        """What is left for a kind of job up to each moment of ``_at``."""
        if kind not in self._totals:
            self._totals[kind] = np.maximum(self._rest[self._eligible[kind]], 0).sum(axis=0)
        found: Ints = self._totals[kind]
        return found

    def _soonest(self, kind: int, tokens: int) -> int | None:
        """The soonest moment by which so many tokens can be promised, within the forecast."""
        n = int(np.searchsorted(self._total(kind), tokens))
        if n == len(self._at):
            return None
        if n == 0:
            return self._now_ms
        low, high = int(self._at[n - 1]), int(self._at[n])
        mine = self._eligible[kind]
        while high - low > 1:  # to the millisecond
            middle = (low + high) // 2
            low, high = (low, middle) if int(self._left(middle)[mine].sum()) >= tokens else (middle, high)
        return high

    def _price(self, kind: int, tokens: int, soonest_ms: int, deadline_ms: int) -> int:
        """Dearer, the more of what can be done is promised: at the moment up to the deadline where that is least."""
        mine = self._eligible[kind]
        if kind not in self._wholes:
            self._wholes[kind] = self._reach[mine].sum(axis=0)
        within = (self._at >= soonest_ms) & (self._at <= deadline_ms) & (self._at > self._now_ms)
        last_ms = min(deadline_ms, self._end_ms)
        left = np.append(self._total(kind)[within], int(self._left(last_ms)[mine].sum()))
        last = (self._up_to(np.array([last_ms]))[:, 0] - self._before)[mine].sum()
        whole = np.append(self._wholes[kind][within], last)
        parts = (left - tokens) / np.maximum(whole, 1)  # one division: it never falls when the dividend rises
        best = int(parts[whole > 0].max(initial=0.0) * WHOLE_BP) if (whole > 0).any() else WHOLE_BP
        busy_bp = min(max(WHOLE_BP - best, BUSY_FROM_BP), WHOLE_BP)
        return WHOLE_BP + (busy_bp - BUSY_FROM_BP) * (MAX_FACTOR_BP - WHOLE_BP) // (WHOLE_BP - BUSY_FROM_BP)
