"""Parts: placements a second, the slowest of single decisions, memory a vehicle, and how time and memory grow.

The loops are this file's, the kernels in them are the product's. Called by: ``bench.run_cell``.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench import report
from bench.cell_bench import Bench, Point, Size, one
from motorpool.core import kernels
from motorpool.core.cell import Cell
from motorpool.core.columns import DENIED, JOB, NONE, VEHICLE, WORKING, Ints, Records, Tables, empty
from motorpool.core.jit import allocating_kernel, compiled, kernel
from motorpool.core.kernels import close_lease, open_lease, place, pull, recount, shrink_lease
from motorpool.core.planning import plan

PLACED_AIM: Final = 500_000
P99_AIM_US: Final = 10.0
BYTES_AIM: Final = 150
READY: Final = 0.3  # of a fleet, at any moment: what real sessions give
MODELS: Final = ("small", "middle", "large")
REGIONS: Final = ("DE", "FR", "NO", "GB")
NOW_MS: Final = 1_760_000_000_000
SLOTS: Final = 8
HOUR_MS: Final = 3_600_000
MONOTONIC: Final = 1  # the clock, as Linux numbers it
JOBS: Final = 1_000  # in progress, where vehicles grow
VEHICLES: Final = 100_000  # where jobs grow
PLANS: Final = 5
PULLS: Final = 200_000
MOST_LOOKS: Final = 50_000_000
NOBODYS: Final = 10


# -- a fleet and its jobs ----------------------------------------------------------------------------------------------


@kernel
def enter_all(t: Tables, vehicles: int) -> None:
    """Every vehicle is counted and stands in its bucket."""
    for v in range(vehicles):
        recount(t, v)


def fleet_of(vehicles: int, jobs: int, *, fast: bool = True, seed: int = 1) -> Cell:
    """A cell with so many vehicles, of which READY are here, and so many jobs in progress."""
    cell = Cell(fast=fast)
    for region in REGIONS:
        cell.region(region)
    for model in MODELS:
        cell.model(model)
    draw = np.random.Generator(np.random.Philox(key=[seed, 1]))
    table = empty(VEHICLE, vehicles)
    ready = draw.random(vehicles) < READY
    table["flags"] = 0
    table["state"] = np.where(ready, WORKING, DENIED)
    table["model"] = draw.choice(len(MODELS), vehicles, p=(0.6, 0.3, 0.1))
    table["region"] = 1 + draw.choice(len(REGIONS), vehicles, p=(0.35, 0.25, 0.2, 0.2))
    table["risk_pct"] = np.minimum(draw.exponential(3.0, vehicles), 99).astype(np.uint8)
    table["speed"] = 200.0 * np.exp(0.5 * draw.standard_normal(vehicles))
    table["trust"] = draw.choice(3, vehicles, p=(0.2, 0.6, 0.2))
    table["memory_gb"] = draw.choice((16, 32, 64), vehicles, p=(0.35, 0.5, 0.15))
    table["slots"] = SLOTS
    table["seen_ms"] = NOW_MS
    table["stay_min"] = 240
    cell.t = cell.t._replace(vehicles=table)
    enter_jobs(cell, jobs, draw)
    loops(fast=fast).enter_all(cell.t, vehicles)
    return cell


def enter_jobs(cell: Cell, jobs: int, draw: np.random.Generator) -> None:
    """Jobs of 1 to 24 hours, half of them bound to a region, larger than what is granted of them here."""
    for number in range(jobs):
        cell.enter_job(
            job_no=number,
            expires_ms=NOW_MS + int((1 + 23 * draw.random()) * HOUR_MS),
            model=MODELS[int(draw.choice(len(MODELS), p=(0.6, 0.3, 0.1)))],
            tenant=f"customer-{number % 50}",
            total=10_000_000,
            most_work=1_000.0,
            regions=int(2 << draw.integers(len(REGIONS))) if draw.random() < 0.5 else 0,
            min_trust=int(draw.choice(3, p=(0.7, 0.25, 0.05))),
        )


def rows_of(cell: Cell) -> Ints:
    """The rows of the jobs in progress, the older first."""
    table: Records = cell.t.jobs
    return np.flatnonzero(table["total"] > 0).astype(np.int64)


# -- loops -------------------------------------------------------------------------------------------------------------


@kernel
def place_many(t: Tables, models: int, regions: int, count: int, ring: Ints, tried: Ints) -> int:
    """So many live requests, one after the other; each holds its slot until ``len(ring)`` more have come.

    ``regions`` 0: any region will do. How many found a vehicle.
    """
    placed = 0
    for n in range(count):
        at = n % len(ring)
        before = int(ring[at])
        if before != NONE:
            t.vehicles["live"][before] -= 1
        word = ((n + 1) * 2654435761) & 0xFFFFFFFF
        region = 1 + (word >> 8) % regions if regions > 0 else NONE
        v = place(t, (word >> 16) % models, region, NOW_MS, tried)
        ring[at] = v
        if v != NONE:
            t.vehicles["live"][v] += 1
            placed += 1
    return placed


@kernel
def pull_many(t: Tables, rows: Ints, count: int, out: Ints) -> int:
    """So many vehicles come for more and get a lease, which ends at once, its lines waiting again. How many got one."""
    granted = 0
    for n in range(count):
        v = int(rows[n % len(rows)])
        j = pull(t, v, NOW_MS, out)
        if j == NONE:
            continue
        lines = int(out[0])
        work = lines * float(t.jobs["work_per_line"][j])
        row = open_lease(t, v, j, lines, work, NOW_MS, NOW_MS + HOUR_MS)
        if row == NONE:
            continue
        granted += 1
        t.jobs["leased"][j] -= lines
        t.models["waiting_work"][int(t.jobs["model"][j])] += work
        shrink_lease(t, row, lines)
        close_lease(t, row)
    return granted


@allocating_kernel
def plan_many(t: Tables, rows: Ints, count: int) -> None:
    """So many plans."""
    for _ in range(count):
        plan(t, rows, NOW_MS)


def loops(*, fast: bool) -> Any:
    """The loops of this file, compiled with the product's kernels or as they stand."""
    here = sys.modules[__name__]
    return compiled(here) if fast else here


def single_ns(cell: Cell, count: int, ring: Ints, rows: Ints) -> tuple[Ints, Ints, float]:
    """How long each of so many placements and pulls takes, by a clock that is read between them; and the clock itself.

    A decision is what a request or a vehicle waits for: to find the vehicle, or the job and the lines.
    """
    import numba  # noqa: PLC0415 - only for compiled kernels

    k: SimpleNamespace = compiled(kernels)
    find_vehicle, find_job = k.place, k.pull
    clock = ctypes.CDLL(None).clock_gettime
    clock.argtypes = (ctypes.c_int, ctypes.c_void_p)
    clock.restype = ctypes.c_int
    models, regions = len(MODELS), len(REGIONS)

    def measure(t: Any, rows: Any, ring: Any, out: Any, tried: Any, times: Any) -> None:
        stamp = np.zeros(4, np.int64)
        begin, end = stamp[:2], stamp[2:]
        for n in range(times.shape[1]):
            clock(MONOTONIC, begin.ctypes)
            clock(MONOTONIC, end.ctypes)
            times[2, n] = (end[0] - begin[0]) * 1_000_000_000 + end[1] - begin[1]
            at = n % len(ring)
            if ring[at] != NONE:
                t.vehicles["live"][ring[at]] -= 1
            word = ((n + 1) * 2654435761) & 0xFFFFFFFF
            region = 1 + (word >> 8) % regions
            clock(MONOTONIC, begin.ctypes)
            v = find_vehicle(t, (word >> 16) % models, region, NOW_MS, tried)
            clock(MONOTONIC, end.ctypes)
            times[0, n] = (end[0] - begin[0]) * 1_000_000_000 + end[1] - begin[1]
            ring[at] = v
            if v != NONE:
                t.vehicles["live"][v] += 1
            clock(MONOTONIC, begin.ctypes)
            find_job(t, rows[n % len(rows)], NOW_MS, out)
            clock(MONOTONIC, end.ctypes)
            times[1, n] = (end[0] - begin[0]) * 1_000_000_000 + end[1] - begin[1]

    loop: Any = numba.njit(measure)
    tried, out = np.zeros(0, np.int64), np.zeros(2, np.int64)
    loop(cell.t, rows, ring, out, tried, np.zeros((3, 8), np.int64))
    times = np.zeros((3, count), np.int64)
    loop(cell.t, rows, ring, out, tried, times)
    return times[0], times[1], float(np.median(times[2]))


def asking(cell: Cell) -> Ints:
    """The vehicles that are here, in an order without rhyme."""
    rows = np.flatnonzero(cell.t.vehicles["counted_place"] != NONE).astype(np.int64)
    return np.random.Generator(np.random.Philox(key=[7, 7])).permutation(rows)


def ring_of(cell: Cell) -> Ints:
    """Live requests that are open at one time: one for each three slots."""
    open_ones = max(1, int((cell.t.vehicles["counted_place"] != NONE).sum()) * SLOTS // 3)
    return np.full(min(open_ones, 100_000), NONE, np.int64)


# -- placements --------------------------------------------------------------------------------------------------------


def placement_steps(size: Size) -> int:
    """Steps of the part."""
    return 2 + size.rounds


def placements(bench: Bench) -> list[report.Figure]:
    """Placements and pulls a second on one core, and single decisions."""
    size = bench.size
    with bench.step(f"{size.index:,} vehicles"):
        cell = fleet_of(size.index, JOBS)
        loop, tried = loops(fast=True), np.zeros(0, np.int64)
        ring, rows = ring_of(cell), asking(cell)
        loop.plan_many(cell.t, rows_of(cell), 1)
        loop.place_many(cell.t, len(MODELS), len(REGIONS), 1_000, ring, tried)
        loop.place_many(cell.t, len(MODELS), 0, 1_000, ring, tried)
        cell.more_leases()
        loop.pull_many(cell.t, rows, 1_000, cell.out)
    placed = report.Samples(f"Placements a second on one core, {size.index:,} vehicles", "placements/s")
    anywhere = report.Samples("The same, where any region will do", "placements/s")
    pulled = report.Samples(f"Leases a second that vehicles pull, {JOBS:,} jobs", "leases/s")
    for _ in range(size.rounds):
        with bench.step("placements and pulls"):
            for samples, regions in ((placed, len(REGIONS)), (anywhere, 0)):
                begun_s = time.process_time()
                found = loop.place_many(cell.t, len(MODELS), regions, size.placements, ring, tried)
                took_s = time.process_time() - begun_s
                assert found == size.placements, "there is room for every request"
                samples.add(report.OURS, found / took_s, count=size.placements)
            begun_s = time.process_time()
            found = loop.pull_many(cell.t, rows, size.placements, cell.out)
            pulled.add(report.OURS, found / (time.process_time() - begun_s), count=size.placements)
    with bench.step("single decisions"):
        place_ns, pull_ns, clock_ns = single_ns(cell, size.single, ring, rows)
    slowest = max(float(np.quantile(place_ns, 0.99)), float(np.quantile(pull_ns, 0.99))) / 1000.0
    figures = [
        placed.figure(aim=f"{PLACED_AIM:,}", met=(placed.median(report.OURS) or 0) >= PLACED_AIM),
        anywhere.figure(),
        pulled.figure(),
    ]
    for name, times in (("placement", place_ns), ("pull", pull_ns)):
        p50, p99, p999 = (float(np.quantile(times, q)) / 1000.0 for q in (0.5, 0.99, 0.999))
        figures.append(
            one(
                f"A single {name}, 99th percentile",
                "us",
                p99,
                less_is_better=True,
                aim=f"{P99_AIM_US:g} us" if name == "placement" else "",
                met=slowest <= P99_AIM_US,
                note=f"median {p50:.2f}, 99.9th percentile {p999:.2f}, of {len(times):,}; the clock {clock_ns:.0f} ns",
            )
        )
    return figures


# -- memory ------------------------------------------------------------------------------------------------------------


def id_of(number: int) -> str:
    """A name as long as operators give: 20 letters, digits and dashes."""
    return f"car-{(number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF:016x}"


def memory_steps(size: Size) -> int:
    """Steps of the part."""
    del size
    return 1


def filled(vehicles: int) -> tuple[Cell, dict[str, float]]:
    """A cell with named vehicles, READY of which hold a lease; and its bytes a vehicle by what holds them."""
    cell = Cell()
    region, model = cell.region("DE"), cell.model("small")
    job = cell.enter_job(
        job_no=1, expires_ms=NOW_MS + HOUR_MS, model="small", tenant="a", total=1 << 30, most_work=100.0
    )
    for number in range(vehicles):
        cell.vehicle(id_of(number))
    cell.t.vehicles["region"][:vehicles], cell.t.vehicles["model"][:vehicles] = region, model
    leased = np.flatnonzero(np.arange(vehicles) % 10 < 10 * READY)
    for v in leased:
        cell.lease(int(v), job, 8, 800.0, now_ms=NOW_MS, expires_ms=NOW_MS + HOUR_MS)
    t = cell.t
    used = vehicles * t.vehicles.itemsize + len(leased) * t.leases.itemsize
    parts = {
        "vehicles": t.vehicles.nbytes / vehicles,
        "leases": t.leases.nbytes / vehicles,
        "names": cell.ids.nbytes / vehicles,
        "other": (cell.nbytes - t.vehicles.nbytes - t.leases.nbytes - cell.ids.nbytes) / vehicles,
        "empty rows": (t.vehicles.nbytes + t.leases.nbytes - used) / vehicles,
    }
    return cell, parts


def memory(bench: Bench) -> list[report.Figure]:
    """Bytes a vehicle in the core."""
    size = bench.size
    with bench.step(f"memory of {size.index:,} vehicles"):
        cell, parts = filled(size.index)
    value = cell.nbytes / size.index
    note = ", ".join(f"{name} {number:.0f}" for name, number in parts.items())
    figures = [
        one(
            f"Memory a vehicle in the core, {size.index:,} vehicles, {READY:.0%} with a lease".replace("%", " %"),
            "bytes",
            value,
            less_is_better=True,
            aim=f"{BYTES_AIM} bytes",
            met=value <= BYTES_AIM,
            note=note,
        )
    ]
    bench.remarks.append(
        "Memory a vehicle: the columns of the cell and the names of its vehicles. Tables grow by a sixteenth, small "
        "ones by half, so rows stand empty, which count in their tables and stand apart once more."
    )
    return figures


# -- growth ------------------------------------------------------------------------------------------------------------


def growth_steps(size: Size) -> int:
    """Steps of the part."""
    return len(size.by_vehicles) + len(size.by_jobs)


def growth(bench: Bench) -> list[report.Figure]:
    """Plan, pull and memory, from few vehicles to many and from few jobs to many."""
    size = bench.size
    figures: list[report.Figure] = []
    for axis, places in (("vehicles", size.by_vehicles), ("jobs", size.by_jobs)):
        planned = report.Samples(f"A plan as {axis} grow", "ms", less_is_better=True)
        pulled = report.Samples(f"A pull as {axis} grow", "us", less_is_better=True)
        nothing = report.Samples(f"A pull that finds nothing that fits as {axis} grow", "us", less_is_better=True)
        held = report.Samples(f"Memory of the columns as {axis} grow", "MB", less_is_better=True)
        for at in places:
            word = f"{at:,} {axis}"
            with bench.step(f"growth: {word}"):
                vehicles, jobs = (at, JOBS) if axis == "vehicles" else (min(VEHICLES, size.index), at)
                values = grown_to(vehicles, jobs, size.rounds)
            for samples, name in (
                (planned, "plan_ms"),
                (pulled, "pull_us"),
                (nothing, "nothing_us"),
                (held, "mb"),
            ):
                for value in values[name]:
                    samples.add(word, value)
            medians = {name: statistics.median(found) for name, found in values.items()}
            bench.raw.points.append(Point(axis=axis, at=at, values=medians))
        figures += [figure for samples in (planned, pulled, nothing, held) for figure in samples.points()]
    bench.remarks.append(
        f"Where vehicles grow there are {JOBS:,} jobs in progress, where jobs grow {min(VEHICLES, size.index):,} "
        f"vehicles; {READY:.0%} of the vehicles are here and ask in turns.".replace("%", " %", 1)
    )
    return figures


def grown_to(vehicles: int, jobs: int, rounds: int, *, fast: bool = True) -> dict[str, list[float]]:
    """Milliseconds of a plan, microseconds of a pull with its lease and of one in vain, megabytes of the columns."""
    cell = fleet_of(vehicles, jobs, fast=fast)
    loop, rows, who = loops(fast=fast), rows_of(cell), asking(cell)
    cell.more_leases()
    loop.plan_many(cell.t, rows, 1)
    loop.pull_many(cell.t, who, 100, cell.out)
    found: dict[str, list[float]] = {"plan_ms": [], "pull_us": [], "nothing_us": [], "mb": []}
    count = min(PULLS, 20 * len(who)) if fast else len(who)
    in_vain = max(1, min(count, MOST_LOOKS // jobs))
    for _ in range(rounds):
        begun_s = time.process_time()
        loop.plan_many(cell.t, rows, PLANS)
        planned_s = time.process_time()
        loop.pull_many(cell.t, who, count, cell.out)
        found["plan_ms"].append((planned_s - begun_s) * 1e3 / PLANS)
        pulled_s = time.process_time()
        cell.t.jobs["min_trust"] += NOBODYS  # every job asks for more than any vehicle has
        tried_s = time.process_time()
        granted = loop.pull_many(cell.t, who, in_vain, cell.out)
        ended_s = time.process_time()
        cell.t.jobs["min_trust"] -= NOBODYS
        assert granted == 0, "nobody may run any of them"
        found["pull_us"].append((pulled_s - planned_s) * 1e6 / count)
        found["nothing_us"].append((ended_s - tried_s) * 1e6 / in_vain)
        found["mb"].append(cell.nbytes / 1e6)
    return found


def jobs_waiting(cell: Cell) -> NDArray[np.int64]:
    """Lines of each job that nobody holds; for the tests."""
    table: Records = cell.t.jobs
    assert table.dtype == JOB
    found: NDArray[np.int64] = table["total"].astype(np.int64) - table["done"] - table["leased"]
    return found
