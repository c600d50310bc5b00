"""What a batch is promised when it is handed in, by what the cell has learnt of its fleet.

Every minute the vehicles that are ready are counted by class: model, region and tier of trust. Every hour their mean
goes into ``core.forecast``, which is kept in the books. A new batch is laid beside all that was promised
(``core.admission``): it gets a time by which it will be done, or is refused with the soonest time that could be
promised. Where the cell has no history everything is admitted, and nothing stands behind the promise.

Called by: ``server.loop``. Must not: refuse what promises nothing, or take a promise back.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Protocol, TypeVar

import msgspec
import numpy as np

from motorpool.core.admission import HOUR_MS, Admitted, Book, Capacity, Load, Refused
from motorpool.core.cell import USUAL_WORK, Cell
from motorpool.core.columns import BEST_EFFORT, NONE, TIERS, Ints
from motorpool.core.forecast import STAYING_H, Floats, Forecast, staying_tokens_s
from motorpool.core.scheduler import Scheduler
from motorpool.errors import CallerError, MotorpoolError
from motorpool.server.cell import ValidBatch
from motorpool.store import books, fleet_settings

log = logging.getLogger(__name__)
T = TypeVar("T")

MINUTE_MS: Final = 60_000
MIN_SAMPLES: Final = 20  # minutes of an hour that must have been seen for it to count
MAX_CLASSES: Final = 64  # about 70 kB each
HOURS: Final = 169  # the longest window, and the hour that runs
HARVEST: Final = 0.9  # of what vehicles could do: the rest goes to live requests, starts and losses
BOOK_MS: Final = 60_000  # what was laid out is good for so long
HALF: Final = 0.5
NAME: Final = "capacity"  # in the books
KEPT_VERSION: Final = 1
REFUSED: Final = "deadline_not_feasible"

Class = tuple[str, str, int]  # model, region, tier of trust
Kind = tuple[str, tuple[str, ...], int]  # model, regions (none: all), least trust


class _Kept(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    version: int
    classes: list[Class]
    usual: dict[str, float]
    forecast: bytes


class Hour:
    """The sums of an hour that runs."""

    def __init__(self, hour: int) -> None:
        self.hour = hour
        self.samples = 0
        self.sums: dict[Class, tuple[float, float, float]] = {}  # ready, measured, their speed

    def add(self, cell: Cell) -> None:
        """Look at the fleet once more."""
        self.samples += 1
        for name, now in present(cell).items():
            ready, measured, speed = self.sums.get(name, (0.0, 0.0, 0.0))
            self.sums[name] = (ready + now[0], measured + now[1], speed + now[2])


class Learner:
    """The forecast of a cell, and the names of its classes. Pure but for what it remembers; at most MAX_CLASSES."""

    def __init__(self) -> None:
        self.classes: list[Class] = []
        self.forecast = Forecast(0)
        self.usual: dict[str, float] = {}  # work of a line, by model
        self.overflowed: set[str] = set()  # models of which not all classes are here
        self.last_hour = -1
        self._hour = Hour(-1)

    def sample(self, cell: Cell, now_ms: int) -> Hour | None:
        """Look at the fleet; called about once a minute. The hour that has ended with it, for ``learn``."""
        hour = now_ms // HOUR_MS
        over = None
        if hour != self._hour.hour:
            over, self._hour = self._hour if self._hour.samples else None, Hour(hour)
        self._hour.add(cell)
        for row, model in enumerate(cell.model_names):
            known = float(cell.t.models["usual_work"][row])
            if known > 0 and (model in self.usual or len(self.usual) < MAX_CLASSES):
                self.usual[model] = known
        return over

    def learn(self, over: Hour, fleet: Fleet, names: list[Class]) -> bool:
        """An hour is over: learn from it, if enough of it was seen. ``names``: of the places in ``fleet``."""
        if over.samples < MIN_SAMPLES or over.hour <= self.last_hour:
            return False
        self._meet(over)
        if not self.classes:
            return False
        known = np.nan_to_num(self.forecast.bands(over.hour * HOUR_MS, 1).per_vehicle)
        ready, tokens_s = np.zeros(len(self.classes)), np.zeros(len(self.classes))
        for number, name in enumerate(self.classes):
            present_, measured, speed = over.sums.get(name, (0.0, 0.0, 0.0))
            each = speed / measured if measured else known[number]
            ready[number] = present_ / over.samples
            tokens_s[number] = (speed + (present_ - measured) * each) / over.samples
        self.forecast.observe(over.hour, ready, tokens_s, self._staying(fleet, names))
        self.last_hour = over.hour
        return True

    def _meet(self, over: Hour) -> None:
        """Classes that were seen for the first time; of one whose speed nobody knows nothing can be learnt yet."""
        for name in sorted(over.sums):
            if name in self.classes or not over.sums[name][1]:
                continue
            if len(self.classes) == MAX_CLASSES:
                self.overflowed.add(name[0])
                continue
            self.classes.append(name)
        self.forecast.grow(len(self.classes))

    def _staying(self, fleet: Fleet, names: list[Class]) -> Floats:
        """What of the vehicles that are here will still be here; NaN where most of a class do not say."""
        number_of = {name: number for number, name in enumerate(self.classes)}
        class_of = np.array([number_of.get(name, NONE) for name in names], dtype=np.int64)[fleet.places]
        ours = class_of != NONE
        class_of, speed, stay_min, risk = (
            column[ours] for column in (class_of, fleet.speeds, fleet.stay_min, fleet.risk_pct)
        )
        says = stay_min > 0
        count = len(self.classes)
        found = staying_tokens_s(class_of[says], speed[says], stay_min[says] * MINUTE_MS, risk[says] / 100.0, count)
        all_of = np.bincount(class_of, weights=speed, minlength=count)
        said = np.bincount(class_of[says], weights=speed[says], minlength=count)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.where(said > HALF * all_of, all_of / said, np.nan)
        scaled: Floats = found * factor[:, None]
        assert scaled.shape == (count, STAYING_H)
        return scaled

    def dump(self) -> bytes:
        """Everything but the hour that runs, for the books."""
        kept = _Kept(version=KEPT_VERSION, classes=self.classes, usual=self.usual, forecast=self.forecast.dump())
        return zlib.compress(msgspec.msgpack.encode([kept, self.last_hour]), 1)

    @classmethod
    def load(cls, data: bytes) -> Learner:
        """What ``dump`` wrote; of anything else nothing is learnt."""
        found = cls()
        try:
            kept, last_hour = msgspec.msgpack.decode(zlib.decompress(data), type=tuple[_Kept, int])
        except (zlib.error, msgspec.MsgspecError):
            return found
        forecast = Forecast.load(kept.forecast)
        if kept.version == KEPT_VERSION and forecast is not None and forecast.classes == len(kept.classes):
            found.classes, found.usual, found.forecast, found.last_hour = kept.classes, kept.usual, forecast, last_hour
        return found


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """The vehicles that are ready, in columns of equal length: copies, which another thread may read.

    ``places``: in the cell's table of speeds; ``speeds``: work tokens a second, 0 while unknown.
    """

    places: Ints
    speeds: Floats
    stay_min: Floats
    risk_pct: Floats

    @classmethod
    def of(cls, cell: Cell) -> Fleet:
        """As it is now."""
        vehicles = cell.t.vehicles[: cell.ids.rows]
        places = vehicles["counted_place"]
        here = np.flatnonzero(places != NONE)
        return cls(
            places=places[here].astype(np.int64),
            speeds=vehicles["speed"][here].astype(np.float64),
            stay_min=vehicles["stay_min"][here].astype(np.float64),
            risk_pct=vehicles["risk_pct"][here].astype(np.float64),
        )


def present(cell: Cell) -> dict[Class, tuple[float, float, float]]:
    """Of each class that has ready vehicles: how many, how many of them have a measured speed, and its sum."""
    fleet = Fleet.of(cell)
    ready = np.bincount(fleet.places)
    measured = np.bincount(fleet.places, weights=fleet.speeds > 0)
    speed = np.bincount(fleet.places, weights=fleet.speeds)
    found: dict[Class, tuple[float, float, float]] = {}
    for place in map(int, np.flatnonzero(ready)):
        found[name_of(cell, place)] = (float(ready[place]), float(measured[place]), float(speed[place]))
    return found


def name_of(cell: Cell, place: int) -> Class:
    """The class of a place in the cell's table of speeds."""
    regions = cell.t.speeds.shape[1]
    model = place // (regions * TIERS)
    name = cell.model_names[model] if model < len(cell.model_names) else ""
    return name, cell.region_name(place // TIERS % regions), place % TIERS


def names_of(cell: Cell) -> list[Class]:
    """The class of every place."""
    return [name_of(cell, place) for place in range(len(cell.t.models) * cell.t.speeds.shape[1] * TIERS)]


class Quoting(Protocol):
    """What this room needs from the loop."""

    @property
    def scheduler(self) -> Scheduler:
        """The state of the cell."""

    @property
    def reader(self) -> sqlite3.Connection:
        """Committed state."""

    def now_ms(self) -> int:
        """Milliseconds since 1970 (UTC)."""

    async def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``change`` in the next transaction."""


class Quotes:
    """What new batches are promised."""

    def __init__(self, cell: Quoting) -> None:
        self._cell = cell
        self._learner = Learner()
        self._lock = asyncio.Lock()
        self._sampled_ms = 0
        self._kinds: list[Kind] = []
        self._book: Book | None = None
        self._book_ms = 0
        self._asked: dict[int, tuple[Kind, int, int]] = {}  # promised and not begun: kind, tokens, deadline
        self._task: asyncio.Task[None] | None = None

    def restore(self) -> None:
        """Go on with what was learnt before the start."""
        data = fleet_settings.read_learnt(self._cell.reader, NAME)
        if data is not None:
            self._learner = Learner.load(data)

    def on_tick(self) -> None:
        """About once a second: look at the fleet once a minute, and keep what was learnt once an hour."""
        now = self._cell.now_ms()
        if now - self._sampled_ms < MINUTE_MS or (self._task is not None and not self._task.done()):
            return
        self._sampled_ms = now
        self._task = asyncio.create_task(self._look(now))

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self, now_ms: int) -> None:
        async with self._lock:
            learner, cell = self._learner, self._cell.scheduler.cell
            over = learner.sample(cell, now_ms)
            if over is None:
                return
            fleet, names = Fleet.of(cell), names_of(cell)
            if not await asyncio.to_thread(learner.learn, over, fleet, names):
                return
            self._book = None
            data = await asyncio.to_thread(learner.dump)
        try:
            await self._cell.write(lambda db: fleet_settings.save_learnt(db, NAME, data, now_ms))
        except MotorpoolError as error:
            log.warning("what the cell has learnt could not be kept this time: %s", error.code)

    # -- quotes --------------------------------------------------------------------------------------------------------

    async def admit(self, batch: ValidBatch, terms: books.BatchTerms, expires_ms: int) -> books.BatchTerms:
        """The terms with a promise; raises CallerError ``deadline_not_feasible`` if the window cannot be met.

        ``begun`` follows, whatever became of the batch.
        """
        if terms.best_effort:
            return terms
        kind: Kind = (batch.model, tuple(sorted(set(terms.regions))), terms.min_trust)
        tokens = self._tokens(batch)
        async with self._lock:
            now = self._cell.now_ms()
            if batch.model in self._learner.overflowed or not self._serves(kind):
                return msgspec.structs.replace(terms, promised_ms=expires_ms, quote_known=False)
            book = self._book_for(kind, now)
            verdict = book.quote(self._kinds.index(kind), tokens, expires_ms)
            if isinstance(verdict, Refused):
                raise CallerError(_no(verdict, now), code=REFUSED, param="completion_window")
            assert isinstance(verdict, Admitted)
            book.take(self._kinds.index(kind), tokens, expires_ms)
            self._asked[batch.batch_no] = (kind, tokens, expires_ms)
            return msgspec.structs.replace(terms, promised_ms=verdict.finish_ms, quote_known=verdict.known)

    def begun(self, batch_no: int) -> None:
        """The batch is the scheduler's now, or nobody's."""
        self._asked.pop(batch_no, None)

    def _tokens(self, batch: ValidBatch) -> int:
        """The work of a batch, as the scheduler will reckon it: in work tokens."""
        cell = self._cell.scheduler.cell
        row = cell.find_model(batch.model)
        usual = float(cell.t.models["usual_work"][row]) if row != NONE else 0.0
        usual = usual or self._learner.usual.get(batch.model, USUAL_WORK)
        return int(len(batch.limits) * min(usual, float(batch.limits.mean())))

    def _serves(self, kind: Kind) -> bool:
        """Whether anything was ever learnt of vehicles that may run this kind of job."""
        return any(_fits(kind, name) for name in self._learner.classes)

    def _book_for(self, kind: Kind, now_ms: int) -> Book:
        """What is promised, laid out over what can be done; made anew when it is old or does not know the kind."""
        if self._book is not None and now_ms - self._book_ms < BOOK_MS and kind in self._kinds:
            return self._book
        scheduler, learner = self._cell.scheduler, self._learner
        load = [each for number, each in self._asked.items() if number not in scheduler.jobs]
        jobs = scheduler.cell.t.jobs
        for job in scheduler.jobs.values():
            if int(jobs["flags"][job.row]) & BEST_EFFORT or job.cancelling_ms is not None:
                continue
            left = int((job.total - job.done) * float(jobs["work_per_line"][job.row]))
            regions = tuple(sorted(set(scheduler.residency.get(job.job_no, ()))))
            load.append(((job.model, regions, int(jobs["min_trust"][job.row])), left, job.expires_ms))
        self._kinds = sorted({each[0] for each in load} | {kind})
        number_of = {name: number for number, name in enumerate(self._kinds)}
        eligible = np.array([[_fits(each, name) for name in learner.classes] for each in self._kinds], dtype=np.bool_)
        self._book = Book(
            Capacity.of(learner.forecast.bands(now_ms, HOURS), HARVEST),
            eligible,
            Load(
                tokens=np.array([each[1] for each in load], dtype=np.int64),
                deadline_ms=np.array([each[2] for each in load], dtype=np.int64),
                kind=np.array([number_of[each[0]] for each in load], dtype=np.int64),
            ),
            now_ms,
        )
        self._book_ms = now_ms
        return self._book


def _fits(kind: Kind, name: Class) -> bool:
    """Whether vehicles of a class may run a kind of job."""
    model, regions, trust = kind
    return name[0] == model and (not regions or name[1] in regions) and name[2] >= trust


def _no(verdict: Refused, now_ms: int) -> str:
    """A refusal in words."""
    reason = "by what is expected of the fleet and was promised to others, this cannot be done before the window closes"
    flex = 'hand it in with priority "flex", which promises nothing'
    if verdict.soonest_ms is None:
        return f"{reason}, nor within seven days: make it smaller, or {flex}"
    hours = -(-(verdict.soonest_ms - now_ms) // HOUR_MS)
    at = datetime.fromtimestamp(verdict.soonest_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{reason}; the soonest end that can be promised is {at}: ask for a completion_window of {hours}h, or {flex}"
