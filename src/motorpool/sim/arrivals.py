"""What customers hand in: jobs with deadlines, work without one, rounds of training.

Decides: when each job comes, what it needs and how much it is, so that all of it together is the scenario's load. Must
not: know how work is scheduled. It does know what the fleet can do, as customers have learnt it: nobody hands in half
of the world for the next hour.
Called by: ``sim.world``.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from motorpool.sim.scenario import Rounds, Scenario, Stream

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
BATCH, ROUND, BEST_EFFORT = 0, 1, 2  # kinds of work
MAX_LINES: Final = 2**31 - 1
LONG_LINE: Final = 2_000.0  # tokens; for work without a deadline on fleets so large that lines would be too many
# Jobs handed in by hour of a weekday, as parts of each other; on weekends a quarter of them.
OFFICE: Final = (2, 1, 1, 1, 1, 1, 2, 4, 8, 10, 10, 9, 8, 9, 10, 10, 9, 7, 5, 4, 4, 3, 3, 2)
WEEKEND: Final = 0.25

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Jobs(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Jobs in columns, in order of release.

    ``kind``: 0 a batch, whose lines are independent; 1 a round, each line of which is done on one vehicle in one go or
    not at all, and of which ``quorum_pct`` of the lines are enough; 2 work without a deadline (``deadline_ms`` is the
    end of the world then). ``value`` is the price of a million tokens, ``download_s`` how long a vehicle takes to get
    what it needs first: the model if it is not there, or the weights of a round, always. Bits of ``region_mask`` are
    the regions in which it may run.
    """

    release_ms: I64
    deadline_ms: I64
    lines: NDArray[np.int32]
    tokens_per_line: NDArray[np.float32]
    tenant: NDArray[np.uint16]
    model: NDArray[np.uint16]
    region_mask: NDArray[np.uint16]
    min_trust: NDArray[np.uint8]
    memory_gb: NDArray[np.uint8]
    kind: NDArray[np.uint8]
    quorum_pct: NDArray[np.uint8]
    value: NDArray[np.float32]
    download_s: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.release_ms)

    @property
    def tokens(self) -> F64:
        """All work of each job."""
        return self.lines.astype(np.float64) * self.tokens_per_line


class Capacity(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What the fleet can do: ``tokens[region, memory, trust, hour]``; ``memory_gb`` are the sizes, in order."""

    memory_gb: tuple[int, ...]
    tokens: F64

    def eligible(self, region_mask: int, memory_gb: int, min_trust: int) -> F64:
        """Tokens by hour of all vehicles that may run such work."""
        regions = [bit for bit in range(self.tokens.shape[0]) if region_mask >> bit & 1]
        sizes = [at for at, size in enumerate(self.memory_gb) if size >= memory_gb]
        found: F64 = self.tokens[np.ix_(regions, sizes)][:, :, min_trust:].sum(axis=(0, 1, 2))
        return found


def draw_jobs(scenario: Scenario, capacity: Capacity, vehicles: int, draw: np.random.Generator) -> Jobs:
    """All work of a scenario for a fleet of this capacity."""
    total = float(capacity.tokens.sum())
    parts = [
        _stream(scenario, stream, capacity, scenario.load * stream.share * total, draw)
        for stream in scenario.streams
        if stream.jobs and scenario.load > 0
    ]
    if scenario.best_effort > 0:
        parts.append(_best_effort(scenario, scenario.best_effort * total))
    if scenario.rounds is not None and scenario.rounds.count:
        parts.append(_rounds(scenario, scenario.rounds, vehicles, draw))
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts]) if parts else np.zeros(0)
        for name in Jobs.__struct_fields__
    }
    order = np.argsort(columns["release_ms"], kind="stable")
    return _jobs(**{name: column[order] for name, column in columns.items()})


def _jobs(**columns: NDArray[np.generic]) -> Jobs:
    """Jobs of columns of any numbers."""
    dtypes = {
        "release_ms": np.int64,
        "deadline_ms": np.int64,
        "lines": np.int32,
        "tokens_per_line": np.float32,
        "tenant": np.uint16,
        "model": np.uint16,
        "region_mask": np.uint16,
        "min_trust": np.uint8,
        "memory_gb": np.uint8,
        "kind": np.uint8,
        "quorum_pct": np.uint8,
        "value": np.float32,
        "download_s": np.float32,
    }
    return Jobs(**{name: columns[name].astype(dtype) for name, dtype in dtypes.items()})


def pick(draw: np.random.Generator, weights: tuple[float, ...] | F64, count: int) -> I64:
    """Numbers from 0 on, as often as their weights say."""
    edges = np.cumsum(np.array(weights, np.float64))
    found = np.searchsorted(edges, draw.random(count) * edges[-1], side="right")
    numbers: I64 = np.minimum(found, len(edges) - 1).astype(np.int64)
    return numbers


def _stream(scenario: Scenario, stream: Stream, capacity: Capacity, tokens: float, draw: np.random.Generator) -> Jobs:
    count = stream.jobs
    deadline_h = np.array(stream.deadlines_h)[pick(draw, stream.deadline_weights, count)]
    release_ms = _releases(scenario, stream, deadline_h, draw)
    window_ms = np.rint(deadline_h * HOUR_MS).astype(np.int64)
    model = pick(draw, stream.model_weights, count)
    trust = pick(draw, stream.trust_weights, count)
    everywhere = scenario.region_mask(())
    mask = np.full(count, everywhere)
    locked = draw.random(count) < stream.locked_share
    chosen = pick(draw, tuple(region.share for region in scenario.regions), count)
    if stream.locked_region is not None:
        chosen[:] = scenario.region_mask([stream.locked_region]).bit_length() - 1
    mask[locked] = 1 << chosen[locked]
    memory = np.array([entry.memory_gb for entry in scenario.models])[model]
    share, most = _what_can_be_done(
        capacity, np.stack([mask, memory, trust], axis=1), release_ms, release_ms + window_ms
    )
    wished = np.exp(stream.size_sigma * draw.standard_normal(count)) * deadline_h**stream.size_exponent * share
    sizes = _sized(wished, most * stream.max_part, tokens)
    low, high = stream.tokens_per_line
    tokens_per_line = low * (high / low) ** draw.random(count)
    return _jobs(
        release_ms=release_ms,
        deadline_ms=release_ms + window_ms,
        lines=np.clip(np.rint(sizes / tokens_per_line), 1, MAX_LINES),
        tokens_per_line=tokens_per_line,
        tenant=pick(draw, tuple(tenant.demand for tenant in scenario.tenants), count),
        model=model,
        region_mask=mask,
        min_trust=trust,
        memory_gb=memory,
        kind=np.full(count, BATCH),
        quorum_pct=np.full(count, 100),
        value=np.full(count, stream.value),
        download_s=_download_s(scenario)[model],
    )


def _download_s(scenario: Scenario) -> F64:
    return np.array([model.file_gb for model in scenario.models]) * 8_000.0 / scenario.speed.link_mbps


def _releases(scenario: Scenario, stream: Stream, deadline_h: F64, draw: np.random.Generator) -> I64:
    """When each job is handed in: so that its deadline lies within the scenario."""
    hours = scenario.days * 24
    if stream.due_clock is not None:
        return _due_releases(scenario, stream, deadline_h, draw)
    at = np.arange(hours)
    weights = np.array(OFFICE, np.float64)[at % 24] if stream.arrivals == "office" else np.ones(hours)
    weekend = at // 24 % 7 >= 5
    weights[weekend] *= 0.0 if stream.weekdays_only else WEEKEND if stream.arrivals == "office" else 1.0
    until_h = hours if stream.hours is None else min(hours, stream.from_h + stream.hours)
    share = np.clip(np.minimum(at + 1, until_h) - np.maximum(at, stream.from_h), 0.0, 1.0)
    edges = np.concatenate([[0.0], np.cumsum(weights * share)])
    # The part of each hour before ``latest`` counts for jobs that must be handed in until then.
    latest = np.minimum(hours - deadline_h, until_h)
    last = np.interp(latest, np.arange(hours + 1), edges)
    if edges[-1] <= 0.0 or last.min() <= 0.0:
        last = np.maximum(last, 1e-9)
    chosen = np.interp(draw.random(len(deadline_h)) * last, edges + np.arange(hours + 1) * 1e-12, np.arange(hours + 1))
    release_ms: I64 = np.clip(np.rint(np.minimum(chosen, latest) * HOUR_MS), 0, None).astype(np.int64)
    return release_ms


def _due_releases(scenario: Scenario, stream: Stream, deadline_h: F64, draw: np.random.Generator) -> I64:
    """For jobs that are due at a time of the day: one deadline before it, on a day on which that is possible."""
    assert stream.due_clock is not None
    hour, minute = stream.due_clock.split(":")
    clock_h = int(hour) + int(minute) / 60
    days = [day for day in range(scenario.days) if not (stream.weekdays_only and day % 7 >= 5)] or [0]
    due_h = np.array([day * 24.0 + clock_h for day in days])
    due_h = due_h[(due_h >= stream.from_h) & (stream.hours is None or due_h <= stream.from_h + (stream.hours or 0.0))]
    if not len(due_h):
        due_h = np.array([clock_h])
    chosen = due_h[draw.integers(len(due_h), size=len(deadline_h))]
    release_ms: I64 = np.clip(np.rint((chosen - deadline_h) * HOUR_MS), 0, None).astype(np.int64)
    return release_ms


def _what_can_be_done(capacity: Capacity, kinds: I64, release_ms: I64, deadline_ms: I64) -> tuple[F64, F64]:
    """For each job: which part of the fleet may run it, and what that part can do between release and deadline.

    A row of ``kinds`` is a job's region mask, memory and trust.
    """
    total = capacity.tokens.sum()
    share, most = np.zeros(len(kinds)), np.zeros(len(kinds))
    for kind in np.unique(kinds, axis=0):
        rows = np.flatnonzero((kinds == kind).all(axis=1))
        by_hour = capacity.eligible(*(int(value) for value in kind))
        edges = np.concatenate([[0.0], np.cumsum(by_hour)])
        hours = np.arange(len(edges))
        share[rows] = by_hour.sum() / total if total > 0 else 0.0
        until, since = (np.interp(at[rows] / HOUR_MS, hours, edges) for at in (deadline_ms, release_ms))
        most[rows] = until - since
    return share, most


def _sized(wished: F64, most: F64, tokens: float) -> F64:
    """Sizes in proportion to the wishes, together ``tokens``, and none above ``most`` unless there is no other way."""
    if wished.sum() <= 0.0:
        return np.zeros(len(wished))
    if most.sum() <= tokens:
        above: F64 = most * (tokens / max(float(most.sum()), 1e-9))
        return above
    low, high = 0.0, 1.0
    while np.minimum(wished * high, most).sum() < tokens and high < 1e300:
        high *= 2.0
    for _ in range(100):
        middle = (low + high) / 2
        if np.minimum(wished * middle, most).sum() < tokens:
            low = middle
        else:
            high = middle
    sizes: F64 = np.minimum(wished * high, most)
    return sizes


def _best_effort(scenario: Scenario, tokens: float) -> Jobs:
    """One job a customer, with the smallest model, on any vehicle, from the beginning to the end."""
    count = len(scenario.tenants)
    model = int(np.argmin([entry.memory_gb for entry in scenario.models]))
    demand = np.array([tenant.demand for tenant in scenario.tenants])
    sizes = tokens * demand / demand.sum()
    per_line = max(LONG_LINE, float(sizes.max()) / (MAX_LINES / 2))
    ones = np.ones(count)
    return _jobs(
        release_ms=0 * ones,
        deadline_ms=scenario.days * DAY_MS * ones,
        lines=np.ceil(sizes / per_line),
        tokens_per_line=per_line * ones,
        tenant=np.arange(count),
        model=model * ones,
        region_mask=scenario.region_mask(()) * ones,
        min_trust=0 * ones,
        memory_gb=scenario.models[model].memory_gb * ones,
        kind=BEST_EFFORT * ones,
        quorum_pct=100 * ones,
        value=0.02 * ones,
        download_s=_download_s(scenario)[model] * ones,
    )


def _rounds(scenario: Scenario, rounds: Rounds, vehicles: int, draw: np.random.Generator) -> Jobs:
    """Rounds are bound to one region each: those who share their weights stay in one place."""
    count = rounds.count
    shares = np.array([region.share for region in scenario.regions])
    region = pick(draw, shares, count)
    model = int(np.argmin([entry.memory_gb for entry in scenario.models]))
    middle = sorted(hardware.tokens_s for hardware in scenario.hardware)[len(scenario.hardware) // 2]
    window_h = rounds.window_min / 60
    until_h = scenario.days * 24.0 - window_h
    if rounds.hours is not None:
        until_h = min(until_h, rounds.from_h + rounds.hours)
    release_h = rounds.from_h + draw.random(count) * max(0.0, until_h - rounds.from_h)
    release_ms = np.rint(release_h * HOUR_MS)
    ones = np.ones(count)
    return _jobs(
        release_ms=release_ms,
        deadline_ms=release_ms + round(window_h * HOUR_MS),
        lines=np.clip(np.rint(vehicles * rounds.vehicles_share * shares[region] / shares.sum()), 1, MAX_LINES),
        tokens_per_line=rounds.unit_s * middle * ones,
        tenant=pick(draw, tuple(tenant.demand for tenant in scenario.tenants), count),
        model=model * ones,
        region_mask=1 << region,
        min_trust=ones,
        memory_gb=scenario.models[model].memory_gb * ones,
        kind=ROUND * ones,
        quorum_pct=round(100 * rounds.quorum) * ones,
        value=rounds.value * ones,
        download_s=rounds.transfer_s * ones,
    )
