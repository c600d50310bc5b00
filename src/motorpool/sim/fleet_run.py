"""A run of the fleet gear: from a world to what was harvested, wasted, missed and paid for.

Called by: the command line, ``sim.plan``, ``bench``. Must not: hold a policy; ``core.kernels`` has them all.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.core import kernels
from motorpool.core.cell import Cell
from motorpool.core.columns import ANY_REGION, BEST_EFFORT, NEVER, VEHICLE, WHOLE, empty, grown
from motorpool.core.jit import compiled
from motorpool.sim import fleet_gear as gear
from motorpool.sim.arrivals import BEST_EFFORT as WITHOUT_PROMISE
from motorpool.sim.arrivals import ROUND
from motorpool.sim.fleet_gear import Arena, Switches
from motorpool.sim.world import NO_MODEL, World

LOAD_GB_PER_S: Final = 1.0  # from the disk into memory
TELL_EVERY: Final = 64


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run. Work is in tokens, shares are of all that was computed, misses of jobs with a deadline.

    ``idle``: what could have been made while vehicles had nothing to do, by why not.
    """

    vehicles: int
    available: float
    useful: float
    lost: float
    doubled: float
    late: float
    switching: float
    failed_whole: float
    jobs: int
    jobs_missed: int
    lines_missed_share: float
    whole_units: int
    whole_done: int
    events: int
    grants: int
    switches: int
    taken_back: int
    recalled: int
    energy_kwh: float
    cost_micro: float
    idle: dict[str, float]
    useful_by_hour: list[float]
    vehicles_at_work: list[float]
    digest: str

    @property
    def computed(self) -> float:
        """All that vehicles did."""
        return self.useful + self.lost + self.doubled + self.late + self.failed_whole

    @property
    def wasted_share(self) -> float:
        """What of it was for nothing."""
        return 1.0 - self.useful / self.computed if self.computed > 0 else 0.0

    @property
    def missed_share(self) -> float:
        """Jobs that were not whole at their deadline."""
        return self.jobs_missed / self.jobs if self.jobs else 0.0


class FleetRun:
    """One run, which can be looked at on the way."""

    def __init__(self, world: World, *, switches: Switches | None = None, fast: bool = True) -> None:
        self.world = world
        self.cell = Cell(fast=fast)
        self._k: Any = compiled(gear) if fast else gear
        self._out = np.zeros(2, np.int64)
        self._rows: list[int] = []
        self._models = [model.name for model in world.scenario.models]
        self._enter_names()
        self._enter_vehicles()
        self.arena = _arena(world, switches or Switches(), self.cell)
        self._slot = 0
        for v in range(len(world)):
            self.arena.cars["window"][v] = world.first[v]
        has = world.first[1:] > world.first[:-1]
        self.arena.cars["end_ms"][has] = world.start_ms[world.first[:-1][has]]
        self._k.schedule_all(self.arena)

    def _enter_names(self) -> None:
        world, cell = self.world, self.cell
        for region in world.scenario.regions:
            cell.region(region.code)
        for model in world.scenario.models:
            cell.t.models["load_ms"][cell.model(model.name)] = round(model.memory_gb / LOAD_GB_PER_S * 1000)
        for tenant in world.scenario.tenants:
            row = cell.tenant(tenant.name)
            cell.t.tenants["weight"][row] = tenant.weight

    def _enter_vehicles(self) -> None:
        world, cell = self.world, self.cell
        vehicles = empty(VEHICLE, len(world))
        resident = np.where(world.resident == NO_MODEL, 0, world.resident)
        vehicles["model"] = resident
        vehicles["on_disk"] = world.on_disk
        vehicles["region"] = world.region + 1  # 0 stands for no region
        vehicles["trust"] = world.trust
        vehicles["memory_gb"] = world.memory_gb
        vehicles["site"] = world.site
        if int(world.site.max()) >= len(cell.t.sites):
            cell.t = cell.t._replace(sites=grown(cell.t.sites, int(world.site.max()) + 1))
        cell.t.sites["limit_w"][: len(world.site_w)] = world.site_w
        cell.t = cell.t._replace(vehicles=vehicles)

    def run(self, tell: Callable[[float], None] | None = None) -> Outcome:
        """To the end of the world; ``tell`` hears how much of it is over, from 0 to 1."""
        world = self.world
        jobs = world.jobs
        ends: list[tuple[int, int, int]] = []  # when, number, row
        release = 0
        horizon = world.horizon_ms
        step_ms = max(horizon // (TELL_EVERY * 4), gear.PLAN_MS)
        now = 0
        while now < horizon:
            while release < len(jobs) and jobs.release_ms[release] <= now:
                row = self._enter_job(release)
                heapq.heappush(ends, (int(jobs.deadline_ms[release]), release, row))
                release += 1
            while ends and ends[0][0] <= now:
                _, _, row = heapq.heappop(ends)
                self._end_job(row, now)
            until = min(now + step_ms, horizon)
            if release < len(jobs):
                until = min(until, int(jobs.release_ms[release]))
            if ends:
                until = min(until, ends[0][0])
            until = max(-(-until // gear.SLOT_MS) * gear.SLOT_MS, now + gear.SLOT_MS)
            self._until(until)
            now = until
            if tell is not None:
                tell(min(1.0, now / horizon))
        for _, _, row in sorted(ends):
            self._end_job(row, horizon)
        return self._outcome()

    def _until(self, until_ms: int) -> None:
        """Let time pass; the table of leases grows on the way."""
        rows = np.array(self._rows, np.int64)
        self._k.plan(self.cell.t, rows, self._slot * gear.SLOT_MS)
        while True:
            slot = int(self._k.run_until(self.cell.t, self.arena, rows, self._slot, until_ms, self._out))
            if slot >= 0:
                self._slot = slot
                return
            self._slot = -1 - slot
            self.cell.more_leases()

    def _enter_job(self, number: int) -> int:
        jobs = self.world.jobs
        kind = int(jobs.kind[number])
        every = (1 << len(self.world.scenario.regions)) - 1
        mask = int(jobs.region_mask[number])
        flags = (BEST_EFFORT if kind == WITHOUT_PROMISE else 0) | (WHOLE if kind == ROUND else 0)
        row = self.cell.enter_job(
            job_no=number,
            expires_ms=int(jobs.deadline_ms[number]),
            model=self._models[int(jobs.model[number])],
            tenant=self.world.scenario.tenants[int(jobs.tenant[number])].name,
            total=int(jobs.lines[number]),
            most_work=float(jobs.tokens_per_line[number]) * 4,
            regions=ANY_REGION if mask == every else mask << 1,
            min_trust=int(jobs.min_trust[number]),
            memory_gb=int(jobs.memory_gb[number]),
            flags=flags,
        )
        if kind == ROUND:  # how long a unit takes is stated with it
            self.cell.t.jobs["work_per_line"][row] = jobs.tokens_per_line[number]
            self.cell.t.jobs["overhead_ms"][row] = round(float(jobs.download_s[number]) * 1000)
        needed = gear.COUNTS + row + 1
        if needed > len(self.arena.counts):
            more = np.zeros(needed * 2, np.float64)
            more[: len(self.arena.counts)] = self.arena.counts
            self.arena = self.arena._replace(counts=more)
        self.arena.counts[gear.COUNTS + row] = jobs.tokens_per_line[number]
        self._rows.append(row)
        return row

    def _end_job(self, row: int, now_ms: int) -> None:
        self._k.close_job(self.cell.t, self.arena, row, now_ms)
        self._rows.remove(row)
        self.cell.leave_job(row)

    def _outcome(self) -> Outcome:
        world, counts, jobs = self.world, self.arena.counts, self.world.jobs
        on_time = self.arena.job_on_time
        promised = jobs.kind == 0
        missed = promised & (on_time < jobs.lines)
        lines = float(jobs.lines[promised].sum())
        whole = jobs.kind == ROUND
        digest = hashlib.sha256()
        for array in (counts, on_time, self.arena.hours, self.arena.cars):
            digest.update(np.ascontiguousarray(array).tobytes())
        return Outcome(
            vehicles=len(world),
            available=available(world),
            useful=float(counts[gear.USEFUL]),
            lost=float(counts[gear.LOST]),
            doubled=float(counts[gear.DOUBLED]),
            late=float(counts[gear.LATE]),
            switching=float(counts[gear.SWITCHING]),
            failed_whole=float(counts[gear.FAILED_WHOLE]),
            jobs=int(promised.sum()),
            jobs_missed=int(missed.sum()),
            lines_missed_share=1.0 - float(on_time[promised].sum()) / lines if lines else 0.0,
            whole_units=int(jobs.lines[whole].sum()),
            whole_done=int(on_time[whole].sum()),
            events=int(counts[gear.EVENTS]),
            grants=int(counts[gear.GRANTS]),
            switches=int(counts[gear.SWITCHES]),
            taken_back=int(counts[gear.TAKEN_BACK]),
            recalled=int(counts[gear.RECALLED]),
            energy_kwh=float(counts[gear.ENERGY]) / 3.6e6,
            cost_micro=float(counts[gear.COST]),
            idle={name: float(counts[gear.IDLE + code]) for name, code in kernels.REASONS.items()},
            useful_by_hour=[float(value) for value in self.arena.hours[0]],
            vehicles_at_work=[float(value) / 3600.0 for value in self.arena.hours[1]],
            digest=digest.hexdigest(),
        )


def available(world: World) -> float:
    """U0: all tokens that the vehicles could make while they are permitted."""
    from motorpool.sim.world import tokens_by_slot  # noqa: PLC0415 - the sum of one table

    return float(tokens_by_slot(world, np.zeros(len(world), np.int64), 1).sum())


def _arena(world: World, switches: Switches, cell: Cell) -> Arena:
    faults = world.scenario.faults
    settings = np.zeros(gear.SETTINGS, np.int64)
    settings[gear.SEED] = world.seed
    settings[gear.HORIZON] = world.horizon_ms
    settings[gear.CRASH_MEAN] = round(gear.HOUR_MS / faults.crash_per_h) if faults.crash_per_h > 0 else 0
    settings[gear.RESTART] = round(faults.restart_s * 1000)
    settings[gear.OUTAGE_MEAN] = round(faults.outage_mean_min * 60_000)
    settings[gear.NO_STREAMING] = not switches.streaming
    settings[gear.NO_FORECAST] = not switches.forecast
    settings[gear.NO_REVOKE] = not switches.revoke
    settings[gear.NO_LEARNING] = not switches.measured
    cars = np.zeros(len(world), gear.CAR)
    for name in ("due_ms", "end_ms", "outage_ms", "crash_ms", "pull_ms", "check_ms"):
        cars[name] = NEVER
    for name in gear.OF_WORLD:
        cars[name] = getattr(world, name)
    cars["next"] = -1
    cars["previous"] = -2
    if not switches.measured:
        cell.t.vehicles["speed"] = world.declared
    columns = gear.columns_of(world)
    hours = world.horizon_ms // gear.HOUR_MS
    slots: npt.NDArray[np.int32] = np.full(world.horizon_ms // gear.SLOT_MS, -1, np.int32)
    return Arena(
        cars=cars,
        slots=slots,
        job_on_time=np.zeros(len(world.jobs), np.float64),
        counts=np.zeros(gear.COUNTS + 64, np.float64),
        hours=np.zeros((2, hours), np.float64),
        recalled=np.zeros(4096, np.int64),
        settings=settings,
        **columns,
    )
