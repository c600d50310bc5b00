"""A cell that refuses at hand-in what it cannot promise: the fleet gear with the product's admission before it.

Decides: how a forecast comes to know its fleet, and when it is told. Must not: judge a job (``core.admission`` does) or
look ahead: the forecast learns from other weeks and from the hours of this one that are over.
Called by: ``bench.cell_harvest``.

A week of history is a world with another seed: other vehicles of the same people in other weeks of theirs. Classes are
groups of vehicles that may run the same kinds of jobs: by region, trust, memory, and the models on their disks.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from motorpool.core import admission
from motorpool.core.admission import Admitted, Book, Capacity, Load
from motorpool.core.departures import DAY_MS, EPOCH_WEEKDAY, HOUR_MS, WEEK_HOURS
from motorpool.core.forecast import Forecast
from motorpool.core.jit import compiled
from motorpool.sim.arrivals import BATCH
from motorpool.sim.fleet_run import FleetRun
from motorpool.sim.world import World, tokens_by_slot

MONDAY_MS: Final = (7 - EPOCH_WEEKDAY) * DAY_MS
HARVEST: Final = 0.95  # of the capacity that is foretold becomes results
HISTORY: Final = 4  # weeks
REFUSED: Final = -1

I64 = NDArray[np.int64]


class Classes(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Who may do what: ``eligible[kind, class]``; ``kind`` of each job; the classes by what they may run."""

    eligible: NDArray[np.bool_]
    kind: I64
    kinds: I64
    known: dict[bytes, int]

    @classmethod
    def of(cls, made: World) -> Classes:
        """Those of a world."""
        jobs = made.jobs
        columns: list[NDArray[Any]] = [jobs.region_mask, jobs.model, jobs.min_trust, jobs.memory_gb]
        kinds, kind = np.unique(np.stack(columns, axis=1).astype(np.int64), axis=0, return_inverse=True)
        may = np.unique(_may(made, kinds), axis=0)
        return cls(
            eligible=np.ascontiguousarray(may.T),
            kind=kind.reshape(-1).astype(np.int64),
            kinds=kinds,
            known={row.tobytes(): at for at, row in enumerate(may)},
        )

    def of_vehicles(self, made: World) -> I64:
        """The class of each vehicle; one more than there are for a vehicle that no class fits."""
        rows, place = np.unique(_may(made, self.kinds), axis=0, return_inverse=True)
        number = np.array([self.known.get(row.tobytes(), len(self.known)) for row in rows], np.int64)
        found: I64 = number[place.reshape(-1)]
        return found


def _may(made: World, kinds: I64) -> NDArray[np.bool_]:
    """Which kinds of jobs each vehicle may run [vehicles, kinds]."""
    mask, model, trust, memory = kinds.T
    may = (mask[None, :] >> made.region[:, None].astype(np.int64)) & 1 == 1
    may &= (made.on_disk[:, None].astype(np.int64) >> model[None, :]) & 1 == 1
    may &= (made.trust[:, None] >= trust[None, :]) & (made.memory_gb[:, None] >= memory[None, :])
    found: NDArray[np.bool_] = np.ascontiguousarray(may)
    return found


def hourly(made: World, classes: Classes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens a second, and vehicles that were ready, by class and hour."""
    key, count = classes.of_vehicles(made), len(classes.known)
    tokens_s = tokens_by_slot(made, key, count + 1)[:count] / 3600.0
    alike = msgspec.structs.replace(made, speed=np.ones(len(made), np.float32), heat=np.ones_like(made.heat))
    ready = tokens_by_slot(alike, key, count + 1)[:count] / 3600.0
    return tokens_s, ready


def learnt(classes: Classes, history: list[World]) -> tuple[Forecast, int]:
    """A forecast that has lived through these weeks, and the hour since 1970 with which the next one begins."""
    found = Forecast(len(classes.known))
    hour = MONDAY_MS // HOUR_MS
    for made in history:
        tokens_s, ready = hourly(made, classes)
        for at in range(tokens_s.shape[1]):
            found.observe(hour + at, ready[:, at], tokens_s[:, at])
        hour += -(-tokens_s.shape[1] // WEEK_HOURS) * WEEK_HOURS  # the next one begins on a Monday too
    return found, hour


class AdmittingRun(FleetRun):
    """A run of the fleet gear in which each job with a deadline asks first."""

    def __init__(self, world: World, history: list[World], *, fast: bool = True, harvest: float = HARVEST) -> None:
        super().__init__(world, fast=fast)
        self.refused: list[int] = []
        self._harvest = harvest
        self._classes = Classes.of(world)
        self._hourly = hourly(world, self._classes)
        self._forecast, self._first_hour = learnt(self._classes, history)
        self._seen = 0  # hours of this world that the forecast knows
        self._open: dict[int, int] = {}  # row of each promised job, and its number
        self._lay_out: Any = compiled(admission).lay_out if fast else admission.lay_out

    def _enter_job(self, number: int) -> int:
        jobs = self.world.jobs
        now_ms = int(jobs.release_ms[number])
        if int(jobs.kind[number]) == BATCH and not self._promise(number, now_ms):
            self.refused.append(number)
            return REFUSED
        row = super()._enter_job(number)
        if int(jobs.kind[number]) == BATCH:
            self._open[row] = number
        return row

    def _end_job(self, row: int, now_ms: int) -> None:
        if row != REFUSED:
            self._open.pop(row, None)
            super()._end_job(row, now_ms)

    def _promise(self, number: int, now_ms: int) -> bool:
        jobs, start_ms = self.world.jobs, self._first_hour * HOUR_MS
        self._observe(now_ms // HOUR_MS)
        hours = self.world.horizon_ms // HOUR_MS - now_ms // HOUR_MS
        bands = self._forecast.bands(start_ms + now_ms, max(1, hours))
        book = Book(
            Capacity.of(bands, self._harvest),
            self._classes.eligible,
            self._load(start_ms),
            start_ms + now_ms,
            allocate=self._lay_out,
        )
        tokens = int(jobs.tokens[number])
        verdict = book.quote(int(self._classes.kind[number]), tokens, start_ms + int(jobs.deadline_ms[number]))
        return isinstance(verdict, Admitted)

    def _observe(self, hour: int) -> None:
        """Tell the forecast of the hours that are over."""
        tokens_s, ready = self._hourly
        while self._seen < hour:
            self._forecast.observe(self._first_hour + self._seen, ready[:, self._seen], tokens_s[:, self._seen])
            self._seen += 1

    def _load(self, start_ms: int) -> Load:
        """What was promised and is not done."""
        jobs, table = self.world.jobs, self.cell.t.jobs
        rows = np.array(sorted(self._open), np.int64)
        numbers = np.array([self._open[int(row)] for row in rows], np.int64)
        left = table["total"][rows].astype(np.int64) - table["done"][rows]
        return Load(
            tokens=np.ceil(left * jobs.tokens_per_line[numbers].astype(np.float64)).astype(np.int64),
            deadline_ms=start_ms + jobs.deadline_ms[numbers],
            kind=self._classes.kind[numbers],
        )
