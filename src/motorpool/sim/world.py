"""The world of a simulated fleet: vehicles, the windows in which they may work, jobs, prices. Physics and people only.

Decides: what is so and what happens. Must not: know of scheduling, or judge. A world is arrays, the same to the last
bit for the same scenario, people, number of vehicles and seed.
Called by: ``sim.fleet_gear``, the full gear, ``bench``.

Each vehicle lives a week of a real (or made-up) user again, moved by a few minutes. A window is the time in which its
guard says yes: from plugging in, once the doors are locked and the battery is above its floor, until the owner's first
touch. Outages of the network and deaths of the engine are not stored: they are drawn as time goes on from the seed, the
vehicle, its window and a counter, by the kernels at the end of this module, which reckon with integers alone.

Time is in milliseconds from the first Monday, 00:00 local time.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from motorpool.core.departures import DAY_MS, HOUR_MS, MINUTE_MS, WEEK_HOURS
from motorpool.core.jit import kernel
from motorpool.errors import SetupError
from motorpool.sim import arrivals, prices
from motorpool.sim.arrivals import Capacity, Jobs, pick
from motorpool.sim.people import SHARED, WORK, People, Stay
from motorpool.sim.scenario import Scenario

MIN_WINDOW_MS: Final = MINUTE_MS  # a shorter one is over before it is noticed
CHUNK: Final = 65_536  # vehicles that are filled in at once
NO_MODEL: Final = 65_535
HONEST, CHEATER, SLEEPER, LIAR = 0, 1, 2, 3
NEW, PROVEN, ATTESTED = 0, 1, 2
CRASH, PARTITION = 0, 1
LEVELS: Final = 4096  # of a log-normal: a table, so that no function of a machine's maths library decides
OUTAGE_SIGMA: Final = 0.8  # networks of vehicles differ

U8: TypeAlias = NDArray[np.uint8]
U16: TypeAlias = NDArray[np.uint16]
I32: TypeAlias = NDArray[np.int32]
I64: TypeAlias = NDArray[np.int64]
F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]
Columns: TypeAlias = dict[str, NDArray[Any]]
Windows: TypeAlias = tuple[I64, I64, I64, U8]


class World(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A world in columns: first of vehicles, then of windows, users, hours, the cell's troubles, and jobs.

    ``site`` 0 is no car park. ``on_disk`` has a bit for each model, ``resident`` is the model in memory (``NO_MODEL``:
    none). ``speed`` is true, ``declared`` is what the vehicle claims, both in tokens a second. ``first[v]`` to
    ``first[v + 1]`` are the windows of vehicle ``v``; ``silent`` 1: at its end the vehicle says nothing, it is gone.
    ``table_hour[h]`` is the hour of the week, in its user's tables, that a vehicle takes hour ``h`` of the world for.
    ``heat`` times the speed is what a vehicle of the region reaches in that hour. Shares are in millionths of vehicles.
    """

    scenario: Scenario
    seed: int
    horizon_ms: int
    user: I32
    region: U8
    zone: U8
    site: U16
    hw: U8
    memory_gb: U8
    on_disk: NDArray[np.uint32]
    resident: U16
    speed: F32
    declared: F32
    slow: U8
    cheat: U8
    trust: U8
    permit_w: U16
    outage_per_h: F32
    first: I64
    start_ms: I64
    end_ms: I64
    silent: U8
    stay_bound_min: U16
    risk_pct: U8
    table_hour: U8
    heat: F32
    price_micro_kwh: I32
    carbon_g_kwh: I32
    site_w: I32
    brownout_from_ms: I64
    brownout_to_ms: I64
    brownout_share: I32
    brownout_regions: U16
    control_kind: U8
    control_from_ms: I64
    control_to_ms: I64
    control_share: I32
    jobs: Jobs

    def __len__(self) -> int:
        return len(self.user)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        columns = [getattr(self, name) for name in self.__struct_fields__]
        columns += [getattr(self.jobs, name) for name in self.jobs.__struct_fields__]
        return sum(column.nbytes for column in columns if isinstance(column, np.ndarray))


class _Traces(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What there is to live again: from each week of each user on, so many days. ``of_user[u]`` is the first one."""

    of_user: I64
    first: I64
    start_ms: I64
    end_ms: I64
    wait_ms: I64


def build(scenario: Scenario, people: People, vehicles: int | None = None, seed: int = 0) -> World:
    """The world of a scenario with these people. Raises SetupError if none of the scenario's kinds is among them."""
    count = scenario.vehicles if vehicles is None else vehicles
    if not 1 <= count <= 2_000_000:
        raise SetupError(f"a world has 1 to 2,000,000 vehicles, not {count}", code="bad_fleet")
    fleet = _vehicles(scenario, people, count, seed)
    traces = _traces(scenario, people)
    first, start_ms, end_ms, silent = _windows(scenario, fleet, traces, seed)
    del fleet["kind"], fleet["week"], fleet["moved_ms"]
    price, carbon = prices.hourly(scenario, _stream(seed, "prices"))
    heat = _heat(scenario)
    capacity = _capacity_by_class(scenario, fleet, (first, start_ms, end_ms), heat)
    jobs = arrivals.draw_jobs(scenario, capacity, count, _stream(seed, "jobs"))
    site_w = np.full(int(fleet["site"].max()) + 1, scenario.sites.watts_w, np.int32)
    return World(
        scenario=scenario,
        seed=seed,
        horizon_ms=scenario.days * DAY_MS,
        **fleet,
        first=first,
        start_ms=start_ms,
        end_ms=end_ms,
        silent=silent,
        stay_bound_min=people.stay_bound_min,
        risk_pct=people.risk_pct,
        table_hour=_table_hour(scenario),
        heat=heat,
        price_micro_kwh=price,
        carbon_g_kwh=carbon,
        site_w=site_w,
        **_troubles(scenario),
        jobs=jobs,
    )


_STREAMS: Final = ("kinds", "hardware", "models", "speed", "trust", "network", "silent", "grid", "prices", "jobs")


def _stream(seed: int, name: str, part: int = 0) -> np.random.Generator:
    """A stream of random numbers of its own for each purpose: more of one does not change another."""
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), _STREAMS.index(name) << 32 | part]))


# -- vehicles ----------------------------------------------------------------------------------------------------------


def _vehicles(scenario: Scenario, people: People, count: int, seed: int) -> Columns:
    columns = _owners(scenario, people, count, _stream(seed, "kinds"))
    draw = _stream(seed, "hardware")
    hardware = scenario.hardware
    hw = pick(draw, tuple(entry.share for entry in hardware), count)
    memory = np.array([entry.memory_gb for entry in hardware], np.uint8)[hw]
    zone_region = prices.zone_regions(scenario)
    homes = [scenario.regions[int(index)] for index in zone_region]
    weights = np.array([home.share / home.zones for home in homes])
    zone = pick(draw, weights, count)
    columns |= {
        "hw": hw.astype(np.uint8),
        "memory_gb": memory,
        "permit_w": np.array([entry.watts_w for entry in hardware], np.uint16)[hw],
        "zone": zone.astype(np.uint8),
        "region": zone_region[zone],
        "site": _sites(scenario, columns["kind"], zone),
    }
    columns |= _on_disk(scenario, memory, _stream(seed, "models"))
    columns |= _speeds(scenario, hw, _stream(seed, "speed"))
    columns |= _honesty(scenario, columns["declared"], _stream(seed, "trust"))
    level = _stream(seed, "network").integers(LEVELS, size=count, dtype=np.uint16)
    networks = _log_normal(OUTAGE_SIGMA) * math.exp(-OUTAGE_SIGMA * OUTAGE_SIGMA / 2)
    columns["outage_per_h"] = (scenario.faults.outage_per_h * networks).astype(np.float32)[level]
    return columns


def _owners(scenario: Scenario, people: People, count: int, draw: np.random.Generator) -> Columns:
    """Whose car each is, which week of theirs it begins with, and by how much it is moved."""
    groups = [people.of_kind(kind) for kind in range(3)]
    wished = (scenario.people.home, scenario.people.shared, scenario.people.work)
    weights = tuple(weight if len(group) else 0.0 for weight, group in zip(wished, groups, strict=True))
    if sum(weights) <= 0.0:
        raise SetupError("the sessions have no user of a kind that the scenario wants", code="no_sessions")
    kind = pick(draw, weights, count)
    user = np.zeros(count, np.int32)
    lot = draw.random(count)
    for which, group in enumerate(groups):
        rows = kind == which
        if len(group):
            user[rows] = group[(lot[rows] * len(group)).astype(np.int64)]
    week = (draw.random(count) * people.weeks[user]).astype(np.int64)
    most_ms = round(scenario.people.jitter_min * MINUTE_MS)
    moved_ms = draw.integers(-most_ms, most_ms + 1, size=count)
    return {"user": user, "kind": kind.astype(np.uint8), "week": week, "moved_ms": moved_ms}


def _sites(scenario: Scenario, kind: NDArray[Any], zone: I64) -> U16:
    """Vehicles at shared chargers and work places stand in car parks of one kind and zone each; 0 is none."""
    site = np.zeros(len(zone), np.int64)
    last = 0
    for which in (SHARED, WORK):
        for index in range(scenario.zones):
            rows = np.flatnonzero((kind == which) & (zone == index))
            site[rows] = last + 1 + np.arange(len(rows)) // scenario.sites.vehicles
            last += -(-len(rows) // scenario.sites.vehicles)
    if last > 65_535:
        raise SetupError(f"{last} car parks are too many: let more vehicles share one", param="sites.vehicles")
    return site.astype(np.uint16)


def _on_disk(scenario: Scenario, memory_gb: U8, draw: np.random.Generator) -> Columns:
    """Which models are there, and one of them in memory."""
    count = len(memory_gb)
    on_disk = np.zeros(count, np.uint32)
    resident, best = np.full(count, NO_MODEL, np.uint16), np.full(count, -1.0)
    for index, model in enumerate(scenario.models):
        there = (draw.random(count) < model.on_disk_share) & (memory_gb >= model.memory_gb)
        on_disk[there] |= np.uint32(1 << index)
        lot = draw.random(count)
        wins = there & (lot > best)
        resident[wins] = index
        best[wins] = lot[wins]
    return {"on_disk": on_disk, "resident": resident}


def _speeds(scenario: Scenario, hw: I64, draw: np.random.Generator) -> Columns:
    count = len(hw)
    usual = np.array([entry.tokens_s for entry in scenario.hardware])[hw]
    declared = usual * _log_normal(scenario.speed.sigma)[draw.integers(LEVELS, size=count, dtype=np.uint16)]
    slow = draw.random(count) < scenario.speed.slow_share
    speed = np.where(slow, declared / scenario.speed.slow_factor, declared)
    return {
        "speed": speed.astype(np.float32),
        "declared": declared.astype(np.float32),
        "slow": slow.astype(np.uint8),
    }


def _honesty(scenario: Scenario, declared: NDArray[Any], draw: np.random.Generator) -> Columns:
    count = len(declared)
    trust = scenario.trust
    tier = pick(draw, (trust.new, trust.proven, trust.attested), count)
    lot = draw.random(count)
    edges = np.cumsum([trust.cheater_share, trust.sleeper_share, trust.liar_share])
    cheat = np.select([lot < edge for edge in edges], [CHEATER, SLEEPER, LIAR], HONEST).astype(np.uint8)
    # An attested computer runs what it says it runs: who cheats is at most proven.
    tier[(cheat == CHEATER) | (cheat == SLEEPER)] = np.minimum(tier[(cheat == CHEATER) | (cheat == SLEEPER)], PROVEN)
    claimed = np.where(cheat == LIAR, declared * np.float32(trust.lie_factor), declared)
    return {"trust": tier.astype(np.uint8), "cheat": cheat, "declared": claimed.astype(np.float32)}


def _log_normal(sigma: float) -> F64:
    """Quantiles of a log-normal with median 1."""
    normal = NormalDist()
    return np.array([math.exp(sigma * normal.inv_cdf((at + 0.5) / LEVELS)) for at in range(LEVELS)])


# -- windows -----------------------------------------------------------------------------------------------------------


def _traces(scenario: Scenario, people: People) -> _Traces:
    of_user, first = [0], [0]
    found: list[Stay] = []
    for user in range(len(people)):
        rows = slice(int(people.first[user]), int(people.first[user + 1]))
        columns = (people.start_ms[rows], people.end_ms[rows], people.wait_ms[rows])
        stays = [Stay(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        by_day = _by_day(stays, int(people.weeks[user]) * 7)
        for week in range(int(people.weeks[user])):
            found += _shifted(_lived_again(by_day, week, scenario), scenario)
            first.append(len(found))
        of_user.append(len(first) - 1)
    return _Traces(
        of_user=np.array(of_user, np.int64),
        first=np.array(first, np.int64),
        start_ms=np.array([stay.begin_ms for stay in found], np.int64),
        end_ms=np.array([stay.end_ms for stay in found], np.int64),
        wait_ms=np.array([stay.wait_ms for stay in found], np.int64),
    )


def _by_day(stays: list[Stay], days: int) -> list[list[Stay]]:
    """The stays cut at midnight, in times of their day."""
    by_day: list[list[Stay]] = [[] for _ in range(days)]
    for stay in stays:
        for day in range(stay.begin_ms // DAY_MS, min(days - 1, (stay.end_ms - 1) // DAY_MS) + 1):
            begin_ms, end_ms = max(stay.begin_ms, day * DAY_MS), min(stay.end_ms, (day + 1) * DAY_MS)
            wait_ms = max(0, stay.begin_ms + stay.wait_ms - begin_ms)
            by_day[day].append(Stay(begin_ms - day * DAY_MS, end_ms - day * DAY_MS, wait_ms))
    return by_day


def _lived_again(by_day: list[list[Stay]], week: int, scenario: Scenario) -> list[Stay]:
    """The days of a scenario: from a week on, around in a circle, with a Sunday in place of each holiday."""
    found: list[Stay] = []
    for day in range(scenario.days):
        of_week = 6 if day in scenario.calendar.holidays else day % 7
        source = ((week + day // 7) * 7 + of_week) % len(by_day)
        for begin_ms, end_ms, wait_ms in by_day[source]:
            at_ms = day * DAY_MS
            if found and found[-1].end_ms == at_ms + begin_ms:
                found[-1] = found[-1]._replace(end_ms=at_ms + end_ms)
            else:
                found.append(Stay(at_ms + begin_ms, at_ms + end_ms, wait_ms))
    return found


def _shifted(stays: list[Stay], scenario: Scenario) -> list[Stay]:
    """After a change of clocks people live by the new time."""
    calendar = scenario.calendar
    if calendar.clock_change_day is None:
        return stays
    change_ms = calendar.clock_change_day * DAY_MS + 2 * HOUR_MS
    earlier_ms = calendar.clock_change_min * MINUTE_MS
    found: list[Stay] = []
    for stay in stays:
        both = (stay.begin_ms, stay.end_ms)
        begin_ms, end_ms = (at_ms - earlier_ms if at_ms >= change_ms else at_ms for at_ms in both)
        begin_ms = max(begin_ms, found[-1].end_ms if found else 0)
        if end_ms > begin_ms:
            found.append(Stay(begin_ms, end_ms, stay.wait_ms))
    return found


def _windows(scenario: Scenario, fleet: Columns, traces: _Traces, seed: int) -> Windows:
    """When each vehicle may work, vehicle by vehicle: first of each, start, end, whether the end is silent."""
    count = len(fleet["user"])
    starts, ends, silents, counts = [], [], [], []
    for part, low in enumerate(range(0, count, CHUNK)):
        rows = slice(low, min(count, low + CHUNK))
        trace = traces.of_user[fleet["user"][rows]] + fleet["week"][rows]
        number = traces.first[trace + 1] - traces.first[trace]
        at = np.arange(number.sum()) + np.repeat(traces.first[trace] - np.cumsum(number) + number, number)
        vehicle = np.repeat(np.arange(len(trace)), number)
        start, end = _permitted(scenario, traces, at, fleet["moved_ms"][rows][vehicle])
        silent = (_stream(seed, "silent", part).random(len(at)) < scenario.people.silent_share).astype(np.uint8)
        vehicle, start, end, silent = _grid_events(
            scenario, fleet["zone"][rows], (vehicle, start, end, silent), seed, part
        )
        keep = end - start >= MIN_WINDOW_MS
        starts.append(start[keep])
        ends.append(end[keep])
        silents.append(silent[keep])
        counts.append(np.bincount(vehicle[keep], minlength=len(trace)))
    first = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return first, np.concatenate(starts), np.concatenate(ends), np.concatenate(silents)


def _permitted(scenario: Scenario, traces: _Traces, at: I64, moved_ms: I64) -> tuple[I64, I64]:
    """From a stay to the window in which the guard says yes."""
    settle_ms, leave_ms = round(scenario.people.settle_s * 1000), round(scenario.people.leave_s * 1000)
    horizon_ms = scenario.days * DAY_MS
    start = traces.start_ms[at] + np.maximum(traces.wait_ms[at], settle_ms) + moved_ms
    end = traces.end_ms[at] - leave_ms + moved_ms
    # Who stands there when the world begins or ends has stood there before, or goes on to.
    start[(traces.start_ms[at] == 0) & (traces.wait_ms[at] == 0)] = 0
    end[traces.end_ms[at] == horizon_ms] = horizon_ms
    return np.clip(start, 0, horizon_ms), np.clip(end, 0, horizon_ms)


def _grid_events(scenario: Scenario, zone: NDArray[Any], windows: Windows, seed: int, part: int) -> Windows:
    """Cut the windows of vehicles that feed the grid. They say so: such an end is not silent."""
    vehicle, start, end, silent = windows
    draw = _stream(seed, "grid", part)
    for event in scenario.grid_events:
        from_ms, to_ms = round(event.from_h * HOUR_MS), round((event.from_h + event.hours) * HOUR_MS)
        feeds = (zone == event.zone) & (draw.random(len(zone)) < event.share)
        cut = feeds[vehicle] & (start < to_ms) & (end > from_ms)
        after = cut & (end > to_ms)
        rest = (vehicle[after], np.full(int(after.sum()), to_ms), end[after], silent[after])
        silent[cut] = 0
        end[cut] = np.minimum(end[cut], from_ms)  # a window that began in the event ends before it began
        vehicle, start = np.concatenate([vehicle, rest[0]]), np.concatenate([start, rest[1]])
        end, silent = np.concatenate([end, rest[2]]), np.concatenate([silent, rest[3]])
        order = np.lexsort((start, vehicle))
        vehicle, start, end, silent = vehicle[order], start[order], end[order], silent[order]
    return vehicle, start, end, silent


# -- what is the same for many -----------------------------------------------------------------------------------------


def _table_hour(scenario: Scenario) -> U8:
    """One hour more than the world has, for looks ahead from its last one."""
    hours = np.arange(scenario.days * 24 + 1)
    calendar = scenario.calendar
    if calendar.clock_change_day is not None and calendar.vehicles_know:
        changed = hours >= calendar.clock_change_day * 24 + 2
        hours = hours + changed * round(calendar.clock_change_min / 60)
    return (hours % WEEK_HOURS).astype(np.uint8)


def _heat(scenario: Scenario) -> F32:
    hours = np.arange(scenario.days * 24)
    clock_h = hours % 24
    heat = np.ones((len(scenario.regions), len(hours)), np.float32)
    for wave in scenario.heat:
        hot = (hours >= wave.from_h) & (hours < wave.from_h + wave.hours)
        hot &= (clock_h >= wave.clock_from_h) & (clock_h < wave.clock_to_h)
        mask = scenario.region_mask(wave.regions)
        for region in range(len(scenario.regions)):
            if mask >> region & 1:
                heat[region, hot] *= np.float32(wave.factor)
    return heat


def _troubles(scenario: Scenario) -> Columns:
    gone = [
        (
            round(brownout.from_h * HOUR_MS + at * brownout.every_min * MINUTE_MS),
            round(brownout.from_h * HOUR_MS + (at * brownout.every_min + brownout.minutes) * MINUTE_MS),
            round(brownout.share * 1_000_000),
            scenario.region_mask(brownout.regions),
        )
        for brownout in scenario.brownouts
        for at in range(brownout.times)
    ]
    control = [
        (
            PARTITION if fault.kind == "partition" else CRASH,
            round(fault.from_h * HOUR_MS),
            round(fault.from_h * HOUR_MS + fault.seconds * 1000),
            round(fault.share * 1_000_000),
        )
        for fault in scenario.control_faults
    ]
    gone_columns = np.array(sorted(gone), np.int64).reshape(-1, 4)
    control_columns = np.array(sorted(control, key=lambda row: row[1]), np.int64).reshape(-1, 4)
    return {
        "brownout_from_ms": gone_columns[:, 0].copy(),
        "brownout_to_ms": gone_columns[:, 1].copy(),
        "brownout_share": gone_columns[:, 2].astype(np.int32),
        "brownout_regions": gone_columns[:, 3].astype(np.uint16),
        "control_kind": control_columns[:, 0].astype(np.uint8),
        "control_from_ms": control_columns[:, 1].copy(),
        "control_to_ms": control_columns[:, 2].copy(),
        "control_share": control_columns[:, 3].astype(np.int32),
    }


# -- what the fleet can do ---------------------------------------------------------------------------------------------


def tokens_by_slot(world: World, key: I64, keys: int, slot_ms: int = HOUR_MS) -> F64:
    """Tokens that vehicles with each key can make in each slot of time: ``[keys, slots]``. Slots divide an hour."""
    windows = (world.first, world.start_ms, world.end_ms)
    return _by_slot(key, keys, (world.speed, world.region), windows, world.heat, slot_ms=slot_ms)


def _by_slot(
    key: I64, keys: int, vehicles: tuple[F32, U8], windows: tuple[I64, I64, I64], heat: F32, *, slot_ms: int
) -> F64:
    assert HOUR_MS % slot_ms == 0
    speed, region = vehicles
    first, start_ms, end_ms = windows
    regions, hours = heat.shape
    slots = hours * (HOUR_MS // slot_ms)
    width = slots + 2
    level, part = np.zeros(keys * regions * width), np.zeros(keys * regions * width)
    both = key * regions + region
    for low in range(0, len(key), CHUNK):
        high = min(len(key), low + CHUNK)
        rows = slice(int(first[low]), int(first[high]))
        vehicle = np.repeat(np.arange(low, high), np.diff(first[low : high + 1]))
        rate = speed[vehicle] / 1000.0
        base = both[vehicle] * width
        for sign, times in ((1.0, start_ms[rows]), (-1.0, end_ms[rows])):
            slot = times // slot_ms
            level += sign * np.bincount(base + slot + 1, rate, len(level))
            part += sign * np.bincount(base + slot, rate * ((slot + 1) * slot_ms - times), len(part))
    tokens = (np.cumsum(level.reshape(-1, width), axis=1) * slot_ms + part.reshape(-1, width))[:, :slots]
    tokens = tokens.reshape(keys, regions, slots) * np.repeat(heat, HOUR_MS // slot_ms, axis=1)
    found: F64 = np.clip(tokens.sum(axis=1), 0.0, None)
    return found


def _capacity_by_class(scenario: Scenario, fleet: Columns, windows: tuple[I64, I64, I64], heat: F32) -> Capacity:
    sizes = tuple(sorted({entry.memory_gb for entry in scenario.hardware}))
    regions = len(scenario.regions)
    size = np.searchsorted(sizes, fleet["memory_gb"])
    key = (fleet["region"].astype(np.int64) * len(sizes) + size) * 3 + fleet["trust"]
    vehicles = (fleet["speed"], fleet["region"])
    tokens = _by_slot(key, regions * len(sizes) * 3, vehicles, windows, heat, slot_ms=HOUR_MS)
    return Capacity(memory_gb=sizes, tokens=tokens.reshape(regions, len(sizes), 3, -1))


# -- what is drawn as time goes on: kernels, integers only -------------------------------------------------------------

OUTAGE_GAP, OUTAGE_LENGTH, ENGINE_GAP, BROWNOUT, CONTROL, BAD_RESULT, OTHER = 1, 2, 3, 4, 5, 6, 7
NEVER_MS: Final = 1 << 60
_WORD: Final = 0xFFFFFFFF
_HALF: Final = 1 << 31
_UNIT: Final = 1 << 20  # fixed point of logarithms
_LN2: Final = round(math.log(2.0) * _UNIT)
# -ln of 0.5 to 1.0 in 256 steps.
_LOGS: Final[I64] = np.array([round(-math.log(0.5 + at / 512) * _UNIT) for at in range(257)], np.int64)


@kernel
def mixed(word: int) -> int:
    """A number below 2**32 of which each bit depends on each bit of ``word``'s lowest 32."""
    word = int(word) & _WORD
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _WORD
    return word ^ (word >> 16)


@kernel
def drawn(seed: int, stream: int, vehicle: int, window: int, k: int) -> int:
    """A random number below 2**32; the same five numbers give the same one."""
    word = mixed(int(seed) & _WORD)
    word = mixed(word ^ ((int(seed) >> 32) & _WORD))
    word = mixed(word + 0x9E3779B9 + int(stream))
    word = mixed(word + 0x9E3779B9 + int(vehicle))
    word = mixed(word + 0x9E3779B9 + int(window))
    return mixed(word + 0x9E3779B9 + int(k))


@kernel
def exponential(word: int, mean_ms: int) -> int:
    """Milliseconds until something that happens every ``mean_ms`` on average, from a random number below 2**32."""
    word = max(1, int(word))
    halvings = 0
    while word < _HALF:
        word *= 2
        halvings += 1
    at, rest = (word - _HALF) >> 23, (word - _HALF) & 0x7FFFFF
    low, high = int(_LOGS[at]), int(_LOGS[at + 1])
    minus_ln = halvings * _LN2 + low - (((low - high) * rest) >> 23)
    return (int(mean_ms) * minus_ln) >> 20


@kernel
def outage_gap_ms(seed: int, vehicle: int, window: int, k: int, mean_ms: int) -> int:
    """Time from the end of outage ``k - 1`` of a window (or its beginning) to outage ``k``. ``mean_ms`` 0: never."""
    if mean_ms <= 0:
        return NEVER_MS
    return exponential(drawn(seed, OUTAGE_GAP, vehicle, window, k), mean_ms)


@kernel
def outage_length_ms(seed: int, vehicle: int, window: int, k: int, mean_ms: int) -> int:
    """How long outage ``k`` of a window lasts; at least a second."""
    return max(1000, exponential(drawn(seed, OUTAGE_LENGTH, vehicle, window, k), mean_ms))


@kernel
def engine_gap_ms(seed: int, vehicle: int, window: int, k: int, mean_ms: int) -> int:
    """Time from the start of the engine after death ``k - 1`` of a window to death ``k``. ``mean_ms`` 0: never."""
    if mean_ms <= 0:
        return NEVER_MS
    return exponential(drawn(seed, ENGINE_GAP, vehicle, window, k), mean_ms)


@kernel
def chosen(seed: int, stream: int, vehicle: int, event: int, share_ppm: int) -> bool:
    """Whether an event (a brown-out, a partition, a check) hits a vehicle; it hits so many of a million."""
    return ((drawn(seed, stream, vehicle, event, 0) * 1_000_000) >> 32) < share_ppm


@kernel
def stay_bound_ms(stay_bound_min: U16, table_hour: U8, user: int, now_ms: int) -> int:
    """What the vehicle would report now, from its user's table: between the values of this hour and the next."""
    hour = int(now_ms) // HOUR_MS
    last = len(table_hour) - 1
    past_ms = int(now_ms) - hour * HOUR_MS
    here = int(stay_bound_min[user, table_hour[min(hour, last)]]) * MINUTE_MS
    ahead = int(stay_bound_min[user, table_hour[min(hour + 1, last)]]) * MINUTE_MS
    # The moment until which it stays never moves back: that is the first term.
    return max(here - past_ms, here + (ahead - here) * past_ms // HOUR_MS, 0)
