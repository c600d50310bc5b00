"""When a live request has waited for too long, when it may be asked for twice, and who waits first.

Theory. A vehicle that drives off says so; one that froze, died or lost its network says nothing. Only time tells it
from one that is slow, and how long is too long depends on the model, the vehicle's class and the length of the prompt.
So each arrival is measured, and a deadline is a multiple of a high quantile of what was measured. Until enough is known
the deadline is a long one, and it never falls below a floor: a false alarm costs a prompt that is read twice. A first
token that is late is asked for once more on a second vehicle, and the first of the two to speak is kept; a budget that
grows with the requests bounds how often, so that in an outage, when everything is late, this stops by itself. A stream
that pauses for longer than streams like it do is doubted before its deadline: a second vehicle goes on with it, out of
the same budget, and again the first to speak is kept. If it turns out that the first one was gone indeed, nothing was
asked for twice, and the budget has its hedge back.

Decides: deadlines, hedges, how often a request may be tried, which vehicles to avoid, the order of those who wait. Must
not: choose a vehicle, which is ``core.scheduler``'s, or know clocks. Called by: ``server.live``.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from enum import IntEnum
from math import ceil, log
from typing import Final

from motorpool.types import VehicleState

# -- what is measured --------------------------------------------------------------------------------------------------

SKETCH_LEAST_MS: Final = 0.1
SKETCH_GROWTH: Final = 1.08  # a quantile is at most so many times too large
SKETCH_BUCKETS: Final = 208  # up to a quarter of an hour
SKETCH_MEMORY: Final = 8_192  # of so many samples the older half counts half
KNOWN_AFTER: Final = 24  # samples; fewer say nothing of a 95th percentile
MAX_PACES: Final = 2_048
MAX_PROMPT_CLASSES: Final = 12

FLOOR_FIRST_MS: Final = 250
FLOOR_GAP_MS: Final = 30
FLOOR_DOUBT_MS: Final = 15
FLOOR_HEDGE_MS: Final = 50
CEILING_MS: Final = 600_000
PRIOR_FIRST_MS: Final = 10_000  # a vehicle that was never measured; and for each byte of the prompt:
PRIOR_BYTE_MS: Final = 5
PRIOR_GAP_MS: Final = 10_000
PRIOR_HEDGE_MS: Final = 2_000
FIRST_TIMES: Final = 3.0  # of the 99th percentile
GAP_TIMES: Final = 2.0  # of the 99.9th percentile: an answer has hundreds of gaps
GAP_LEAST_TIMES: Final = 3.0  # of the 99th
GAP_MOST_TIMES: Final = 6.0  # of the 99th: vehicles that freeze now and then do not make us patient with all
DOUBT_TIMES: Final = 1.25  # of the 99th: the least pause that is doubted
DOUBTED: Final = 0.05  # pauses of one stream that are doubted though its vehicle lives, at most, by what was measured
LOOK_AGAIN_AFTER: Final = 64  # samples: a quantile costs a look at every bucket, a token does not
_LOG_GROWTH: Final = log(SKETCH_GROWTH)
_EDGES: Final = tuple(SKETCH_LEAST_MS * SKETCH_GROWTH**at for at in range(SKETCH_BUCKETS))


class Sketch:
    """Quantiles of a stream of durations, in a bounded place: counts in buckets that grow by a constant factor.

    Older samples fade, so that the answer follows a vehicle that becomes slower or faster.
    """

    __slots__ = ("_counts", "_looked", "_total", "added")

    def __init__(self) -> None:
        self._counts: list[int] = [0] * SKETCH_BUCKETS
        self._total = 0
        self.added = 0  # samples in all, those that have faded too
        self._looked: dict[float, tuple[int, float]] = {}  # what was found before, after how many samples

    def __len__(self) -> int:
        return self._total

    def add(self, value_ms: float) -> None:
        """Take one duration in milliseconds; what lies outside the buckets counts in the last or first of them."""
        at = 0
        if value_ms > SKETCH_LEAST_MS:
            at = ceil(min(log(value_ms / SKETCH_LEAST_MS) / _LOG_GROWTH - 1e-9, SKETCH_BUCKETS - 1))
        self._counts[at] += 1
        self._total += 1
        self.added += 1
        if self._total >= SKETCH_MEMORY:
            self._counts = [count // 2 for count in self._counts]
            self._total = sum(self._counts)

    def lately_ms(self, share: float) -> float:
        """The same quantile, as it was up to LOOK_AGAIN_AFTER samples or an eighth of them ago."""
        looked, found_ms = self._looked.get(share, (0, 0.0))
        if self.added - looked >= min(LOOK_AGAIN_AFTER, max(1, looked // 8)):
            found_ms = self.quantile_ms(share)
            self._looked[share] = (self.added, found_ms)
        return found_ms

    def quantile_ms(self, share: float) -> float:
        """The duration that ``share`` of the samples (0 to 1) do not exceed; 0 without samples.

        It is never less than the true one and at most SKETCH_GROWTH times as much, within the range of the buckets.
        """
        if self._total == 0:
            return 0.0
        wanted = max(1, ceil(share * self._total - 1e-9))
        seen = 0
        for at, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return _EDGES[at]
        return _EDGES[-1]


class _Pace:
    """What was measured of one model on one class of vehicles."""

    __slots__ = ("first", "gap", "streams")

    def __init__(self) -> None:
        self.first: dict[int, Sketch] = {}  # by the class of the prompt's length
        self.gap = Sketch()
        self.streams = 0  # that the gaps are of


class Paces:
    """How fast each model answers on each class of vehicles; the classes that were used last are remembered.

    ``waves``: how many requests deep the vehicle is, this one included, counted in its slots. A first token waits for
    those before it, so it is measured in waves, and its deadline is counted in them.
    """

    def __init__(self) -> None:
        self._paces: OrderedDict[tuple[str, str], _Pace] = OrderedDict()

    def __len__(self) -> int:
        return len(self._paces)

    def first(self, model: str, kind: str, prompt_bytes: int, waves: int, took_ms: float) -> None:
        """A first token, or a whole plain answer, came after ``took_ms``."""
        pace = self._of(model, kind)
        pace.streams += 1
        first = pace.first
        prompt = prompt_class(prompt_bytes)
        sketch = first.get(prompt)
        if sketch is None:
            sketch = first[prompt] = Sketch()
        sketch.add(took_ms / max(1, waves))

    def gap(self, model: str, kind: str, took_ms: float) -> None:
        """Between two messages of one stream lay ``took_ms``."""
        self._of(model, kind).gap.add(took_ms)

    def first_deadline_ms(self, model: str, kind: str, prompt_bytes: int, waves: int, more_ms: int = 0) -> int:
        """After how long without a first token its vehicle is given up.

        ``more_ms`` is what a whole plain answer may take longer than a first token, while nothing is measured.
        """
        sketch = self._first(model, kind, prompt_bytes)
        if sketch is None:
            wait_ms = float(PRIOR_FIRST_MS + PRIOR_BYTE_MS * prompt_bytes + more_ms)
        else:
            wait_ms = FIRST_TIMES * sketch.lately_ms(0.99)
        return _between(wait_ms * max(1, waves), FLOOR_FIRST_MS)

    def hedge_after_ms(self, model: str, kind: str, prompt_bytes: int, waves: int, more_ms: int = 0) -> int:
        """After how long without a first token a second vehicle may be asked: the 95th percentile."""
        sketch = self._first(model, kind, prompt_bytes)
        if sketch is None:
            wait_ms = float(PRIOR_HEDGE_MS + PRIOR_BYTE_MS * prompt_bytes + more_ms)
        else:
            wait_ms = sketch.lately_ms(0.95)
        return _between(wait_ms * max(1, waves), FLOOR_HEDGE_MS)

    def gap_deadline_ms(self, model: str, kind: str) -> int:
        """After how long without a further token a stream's vehicle is given up."""
        pace = self._paces.get((model, kind))
        if pace is None or len(pace.gap) < KNOWN_AFTER:
            return PRIOR_GAP_MS
        p99_ms = pace.gap.lately_ms(0.99)
        wait_ms = max(GAP_TIMES * pace.gap.lately_ms(0.999), GAP_LEAST_TIMES * p99_ms)
        return _between(min(wait_ms, GAP_MOST_TIMES * p99_ms), FLOOR_GAP_MS)

    def doubt_after_ms(self, model: str, kind: str) -> int:
        """After how long without a further token a second vehicle may go on with a stream; before its deadline.

        So long that of DOUBTED streams one is doubted in vain: the longer the streams, the rarer the pause.
        """
        pace = self._paces.get((model, kind))
        if pace is None or len(pace.gap) < KNOWN_AFTER:
            return PRIOR_GAP_MS
        gaps = 1 << (pace.gap.added // max(1, pace.streams)).bit_length()  # of a stream, at least
        wait_ms = max(pace.gap.lately_ms(1.0 - DOUBTED / gaps), DOUBT_TIMES * pace.gap.lately_ms(0.99))
        return min(_between(wait_ms, FLOOR_DOUBT_MS), self.gap_deadline_ms(model, kind))

    def _first(self, model: str, kind: str, prompt_bytes: int) -> Sketch | None:
        """What is known of prompts like this, or of longer ones; None if that is too little."""
        pace = self._paces.get((model, kind))
        if pace is None:
            return None
        wanted = prompt_class(prompt_bytes)
        for prompt in sorted(pace.first):
            if prompt >= wanted and len(pace.first[prompt]) >= KNOWN_AFTER:
                return pace.first[prompt]
        return None

    def _of(self, model: str, kind: str) -> _Pace:
        key = (model, kind)
        pace = self._paces.get(key)
        if pace is None:
            pace = self._paces[key] = _Pace()
            if len(self._paces) > MAX_PACES:
                self._paces.popitem(last=False)
        else:
            self._paces.move_to_end(key)
        return pace


def prompt_class(prompt_bytes: int) -> int:
    """Prompts of one class differ by at most four times in length; the reading of a prompt grows with its length."""
    return min(MAX_PROMPT_CLASSES - 1, max(0, prompt_bytes).bit_length() // 2)


def _between(wait_ms: float, floor_ms: int) -> int:
    return int(min(max(wait_ms, floor_ms), CEILING_MS))


# -- how often ---------------------------------------------------------------------------------------------------------

HEDGE_PERCENT: Final = 5  # of requests may be asked for twice
HEDGE_SAVED: Final = 10  # hedges that quiet times may save up
MAX_DEPARTED: Final = 10  # vehicles that left, one after another, with one request
MAX_STALLED: Final = 4  # vehicles that fell silent
MAX_FAILED: Final = 3  # vehicles whose engines failed on it
_OWN_FAULT_BUT: Final = frozenset({408, 409, 425, 429})  # they speak of the moment, not of the request


class HedgeBudget:
    """A token bucket: each request pays in HEDGE_PERCENT hundredths of a hedge. It starts empty."""

    __slots__ = ("_hundredths",)

    def __init__(self) -> None:
        self._hundredths = 0

    def earn(self) -> None:
        """A request came."""
        self._hundredths = min(self._hundredths + HEDGE_PERCENT, 100 * HEDGE_SAVED)

    def spend(self) -> bool:
        """Take one hedge out; False if there is none."""
        if self._hundredths < 100:
            return False
        self._hundredths -= 100
        return True

    def give_back(self) -> None:
        """A hedge was none: the first vehicle was gone."""
        self._hundredths = min(self._hundredths + 100, 100 * HEDGE_SAVED)


def is_own_fault(status: int) -> bool:
    """Whether an HTTP status blames the request itself, so that every vehicle would say the same."""
    return 400 <= status < 500 and status not in _OWN_FAULT_BUT


class Tries:
    """How often one request was broken off, and by what."""

    __slots__ = ("departed", "failed", "stalled")

    def __init__(self) -> None:
        self.departed = 0
        self.stalled = 0
        self.failed = 0

    @property
    def used_up(self) -> bool:
        """Whether it is given up."""
        return self.departed >= MAX_DEPARTED or self.stalled >= MAX_STALLED or self.failed >= MAX_FAILED

    def patience(self, deadline_ms: int) -> int:
        """The deadline of its next vehicle: twice as long after each silence, as the measure may have been wrong."""
        return min(deadline_ms << min(self.stalled, MAX_STALLED), CEILING_MS)


DOUBT_MS: Final = (
    1_000  # a vehicle that fell silent and reports within it was only slow: it hears that nobody waits any more
)
SUSPECT_MS: Final = 2_000
MAX_SUSPECT_DOUBLINGS: Final = 5
MAX_SUSPECTS: Final = 4_096


class Suspects:
    """Vehicles that fell silent in the middle of a request: avoided for a while, twice as long each time."""

    def __init__(self) -> None:
        self._until_ms: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until_ms)

    def stalled(self, vehicle_id: str, now_ms: int) -> None:
        """It did not speak in time. Several requests that it drops at once are one offence."""
        until_ms, times = self._until_ms.get(vehicle_id, (0, 0))
        if now_ms < until_ms:
            return
        self._until_ms[vehicle_id] = (now_ms + (SUSPECT_MS << min(times, MAX_SUSPECT_DOUBLINGS)), times + 1)
        self._until_ms.move_to_end(vehicle_id)
        if len(self._until_ms) > MAX_SUSPECTS:
            self._until_ms.popitem(last=False)

    def spoke(self, vehicle_id: str) -> None:
        """It has given a first token."""
        if self._until_ms:
            self._until_ms.pop(vehicle_id, None)

    def avoided(self, now_ms: int) -> frozenset[str]:
        """Those that get nothing now, unless there is nobody else."""
        if not self._until_ms:
            return frozenset()
        return frozenset(vehicle_id for vehicle_id, (until_ms, _) in self._until_ms.items() if now_ms < until_ms)


# -- departures that announce themselves -------------------------------------------------------------------------------

RISK_BOUND: Final = 0.5  # of leaving within 15 minutes: from here on a stream is handed over before the break
RISK_GAIN: Final = 0.2  # by so much the next vehicle must be safer, or streams would wander
MAX_BEHIND_TOKENS: Final = 4  # the hand-over is made when the next vehicle has read all but so much
MAX_READINGS: Final = 6  # of a prompt, ahead of one hand-over: each reads what came during the one before


def is_leaving(state: VehicleState, risk_15min: float | None) -> bool:
    """Whether a vehicle's report announces that it will soon break off what it does."""
    return state is VehicleState.YIELDING or (risk_15min is not None and risk_15min >= RISK_BOUND)


def is_safer(risk_15min: float | None, than: float | None) -> bool:
    """Whether it gains enough to hand over from a vehicle with the risk ``than``; unknown risks are none here."""
    return (risk_15min or 0.0) + RISK_GAIN <= (1.0 if than is None else than) + 1e-9


def has_caught_up(read_tokens: int, emitted_tokens: int, readings: int) -> bool:
    """Whether the next vehicle has read enough of the answer to go on without a visible pause."""
    return emitted_tokens - read_tokens <= MAX_BEHIND_TOKENS or readings >= MAX_READINGS


# -- alarms ------------------------------------------------------------------------------------------------------------


class Alarms:
    """Which of many deadlines is next, when most are moved long before they are due.

    Moving one costs a table entry: the heap still has its old time and is put right when that comes.
    """

    def __init__(self) -> None:
        self._due_ms: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []
        self._queued: dict[int, int] = {}  # the earliest time at which the heap has each key

    def __len__(self) -> int:
        return len(self._due_ms)

    def set(self, key: int, due_ms: int) -> bool:
        """Set or move a deadline; True if it is earlier than the key's place in the heap, so the next one may be."""
        self._due_ms[key] = due_ms
        queued = self._queued.get(key)
        if queued is not None and queued <= due_ms:
            return False
        self._queued[key] = due_ms
        heapq.heappush(self._heap, (due_ms, key))
        return True

    def drop(self, key: int) -> None:
        """Forget a deadline."""
        self._due_ms.pop(key, None)

    def next_ms(self) -> int | None:
        """When to look again; None if there is nothing to wait for."""
        return self._heap[0][0] if self._heap else None

    def due(self, now_ms: int) -> list[int]:
        """The keys whose time has come, the earliest first; they are forgotten."""
        out: list[int] = []
        while self._heap and self._heap[0][0] <= now_ms:
            at_ms, key = heapq.heappop(self._heap)
            if self._queued.get(key) != at_ms:
                continue  # it is also further up or down the heap, or was forgotten
            del self._queued[key]
            due_ms = self._due_ms.get(key)
            if due_ms is None:
                continue
            if due_ms <= now_ms:
                del self._due_ms[key]
                out.append(key)
            else:
                self._queued[key] = due_ms
                heapq.heappush(self._heap, (due_ms, key))
        return out


# -- who waits ---------------------------------------------------------------------------------------------------------

MAX_WAITING: Final = 1_024
DRAIN_SMOOTHING: Final = 0.2
MIN_RETRY_MS: Final = 250
MAX_RETRY_MS: Final = 60_000


class Tier(IntEnum):
    """How urgent a request is; the values of ``service_tier`` are mapped to them, and less goes first."""

    GOING_ON = 0  # it runs already and has lost its vehicle
    PRIORITY = 1
    DEFAULT = 2
    FLEX = 3


# How long each may wait for a vehicle, and how many requests a slot that it is put on: those that run there and wait
# there. What is cheap waits here, where it is in nobody's way, for a slot that is free.
WAIT_MS: Final = {Tier.GOING_ON: 20_000, Tier.PRIORITY: 10_000, Tier.DEFAULT: 10_000, Tier.FLEX: 60_000}
PER_SLOT: Final = {Tier.GOING_ON: 64, Tier.PRIORITY: 4, Tier.DEFAULT: 2, Tier.FLEX: 1}
_TIERS: Final = {"flex": Tier.FLEX, "priority": Tier.PRIORITY, "fast": Tier.PRIORITY}


def tier_of(service_tier: str | None) -> Tier:
    """What a customer's ``service_tier`` means here; ``auto``, ``default``, ``scale`` and none are the default."""
    return _TIERS.get(service_tier or "", Tier.DEFAULT)


def name_of(tier: Tier) -> str:
    """The ``service_tier`` that a response states for it."""
    return {Tier.FLEX: "flex", Tier.PRIORITY: "priority"}.get(tier, "default")


class WaitingRoom:
    """Requests that wait for a vehicle: the more urgent first, then by arrival; each until its deadline."""

    def __init__(self, bound: int = MAX_WAITING) -> None:
        self._bound = bound
        self._lines: dict[Tier, OrderedDict[str, int]] = {tier: OrderedDict() for tier in Tier}
        self._tiers: dict[str, Tier] = {}
        self._served_ms: int | None = None
        self._interval_ms = 0.0

    def __len__(self) -> int:
        return len(self._tiers)

    def __iter__(self) -> Iterator[str]:
        """Everybody, in the order in which they are served."""
        for tier in Tier:
            yield from list(self._lines[tier])

    def enter(self, key: str, tier: Tier, now_ms: int) -> str | None:
        """Let one in until ``WAIT_MS`` from now; who has to leave for it, itself if it finds no place."""
        out: str | None = None
        if len(self._tiers) >= self._bound:
            last = next((at for at in reversed(Tier) if self._lines[at]), tier)
            if last <= tier:
                return key
            out = next(reversed(self._lines[last]))
            self.leave(out)
        self._lines[tier][key] = now_ms + WAIT_MS[tier]
        self._tiers[key] = tier
        return out

    def leave(self, key: str) -> None:
        """It waits no more, for whatever reason."""
        tier = self._tiers.pop(key, None)
        if tier is not None:
            del self._lines[tier][key]

    def served(self, key: str, now_ms: int) -> None:
        """It has its vehicle."""
        self.leave(key)
        if self._served_ms is not None:
            passed_ms = now_ms - self._served_ms
            self._interval_ms += DRAIN_SMOOTHING * (passed_ms - self._interval_ms)
        self._served_ms = now_ms

    def overdue(self, now_ms: int) -> list[str]:
        """Those whose deadline has passed; they are still there."""
        out: list[str] = []
        for line in self._lines.values():
            for key, until_ms in line.items():
                if until_ms > now_ms:
                    break  # those of one tier wait equally long, so later ones have time too
                out.append(key)
        return out

    def retry_after_ms(self) -> int:
        """When somebody who was turned away should come back: when those who wait now will have been served."""
        return int(min(max(self._interval_ms * (len(self._tiers) + 1), MIN_RETRY_MS), MAX_RETRY_MS))
