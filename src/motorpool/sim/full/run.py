"""Builds a world of the full gear, lets it happen, and says what came of it.

Decides: how a world is put together from its seed. Must not: decide who runs what, or what counts as broken.
Called by: ``cli.sim_faults``, the tests.
"""

from __future__ import annotations

import logging
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from motorpool.agent.signals.car import CarSpec
from motorpool.core.guard import Policy
from motorpool.core.scheduler import Scheduler
from motorpool.core.signals import NetworkClass
from motorpool.core.vehicle_events import VehicleConfig
from motorpool.sim.full import vehicle as parts
from motorpool.sim.full.books import SqlBooks
from motorpool.sim.full.cell import Cell
from motorpool.sim.full.checks import ENDED, Checks, InvariantError
from motorpool.sim.full.clock import Clock, Draws, Trace
from motorpool.sim.full.engine import EngineSpec
from motorpool.sim.full.faults import ALL, Gremlin, Kind, Plan, make_plan
from motorpool.sim.full.network import Network, Weather
from motorpool.sim.full.vehicle import Vehicle
from motorpool.sim.full.work import Fate, Job, Line, with_bodies

BEGIN_MS: Final = 1_761_000_000_000  # some day in October: neither hot nor cold
LOOK_AFTER_MS: Final = 10_000  # between two looks at whether everything has finished
MAX_AFTER_MS: Final = 2 * 3_600_000  # so long at most from the heal to the end of the last job
CAR: Final = CarSpec(soc_pct=86.0, regions=())
POLICY: Final = Policy(
    watts_w=parts.WATTS_W, dwell_ms=1_000, dwell_max_ms=10_000, fault_wait_ms=10_000, network=NetworkClass.UNMETERED
)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one world of faults. ``broken`` is empty, or names the promise that was."""

    seed: int
    vehicles: int
    without: tuple[str, ...]
    broken: str
    detail: str
    at_ms: int  # of the world, from its beginning
    events: int
    simulated_ms: int
    lines: int
    jobs: dict[str, int]
    trace: str
    story: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What replays it."""
        without = "".join(f" --without {kind}" for kind in self.without)
        return f"motorpool sim faults --seed {self.seed} --vehicles {self.vehicles}{without}"


class World:
    """One world with faults, ready to begin. The parts are open to tests, which plant bugs in them."""

    def __init__(
        self,
        seed: int,
        vehicles: int,
        folder: Path,
        kinds: frozenset[Kind] = frozenset(ALL),
        *,
        keep: int = 40,
        new_scheduler: Callable[[int], Scheduler] = Scheduler,
    ) -> None:
        self.seed = seed
        self.clock = Clock(BEGIN_MS)
        self.trace = Trace(keep)
        names = [f"v{number}" for number in range(1, vehicles + 1)]
        self.plan = make_plan(seed, names, kinds)
        self.checks = Checks(self.clock, self.trace, liars=self.plan.liars | self.plan.cheats)
        self.network = Network(self.clock, seed, Weather())
        self.books = SqlBooks(folder)
        self.books.enrol(names, BEGIN_MS)
        self.cell = Cell(
            clock=self.clock,
            network=self.network,
            trace=self.trace,
            watcher=self.checks,
            books=self.books,
            new_scheduler=new_scheduler,
        )
        self.vehicles = {name: self._vehicle(name, number) for number, name in enumerate(names)}
        self.jobs = make_jobs(seed, self.plan, poison=Kind.POISON in kinds)
        self.checks.scheduler = lambda: self.cell.scheduler
        self.checks.job_of = self.cell.job
        ends = self.network.ends
        ends.to_cell, ends.work_to_cell = self.cell.on_state, self.cell.on_work
        ends.to_vehicle = lambda name, data: self.vehicles[name].on_down(data)
        ends.confirmed = lambda name, message_ids: self.vehicles[name].on_confirmed(message_ids)
        ends.link = lambda name, up: self.vehicles[name].on_link(up)
        self.gremlin = Gremlin(
            plan=self.plan,
            clock=self.clock,
            trace=self.trace,
            network=self.network,
            cell=self.cell,
            books=self.books,
            vehicles=self.vehicles,
            seed=seed,
        )

    def _vehicle(self, name: str, number: int) -> Vehicle:
        draws = Draws(self.seed, "vehicle", name)
        model = "m" if number == 0 or draws.chance(0.7) else "s"
        config = VehicleConfig(
            model=model,
            freeze_grace_ms=3_000,
            state_interval_ms=draws.pick((1_000, 5_000)),
            progress_interval_ms=draws.pick((1_000, 4_000)),
            stall_ms=15_000,
            restart_max_ms=8_000,
            max_queued=draws.pick((200, 50_000)),
            max_outbox_items=draws.pick((20, 50_000)),
        )
        vehicle = Vehicle(
            name,
            clock=self.clock,
            network=self.network,
            watcher=self.checks,
            pace=parts.Pace(config=config),
            engine=EngineSpec(slots=draws.between(1, 4), tokens_s=float(draws.between(8, 40)), report_ms=600),
            policy=POLICY,
            car=CAR,
            spool_bytes=self.plan.spool_bytes,
        )
        vehicle.skew_ms = self.plan.skews_ms[name]
        return vehicle

    def begin(self) -> None:
        """Every part starts, and the plan begins."""
        self.cell.start()
        for vehicle in self.vehicles.values():
            vehicle.start()
        for job in self.jobs:
            self.clock.at(job.handed_ms, self.cell.hand_in, job)
            if job.cancel_ms is not None:
                self.clock.at(job.cancel_ms, self.cell.cancel, job)
        self.gremlin.begin()

    def live(self) -> None:
        """Let it happen, heal it, and demand that everything ends; raises InvariantError."""
        self.begin()
        heal_ms = BEGIN_MS + self.plan.heal_ms
        self.clock.run(heal_ms)
        self.gremlin.heal()
        while not self.finished():
            if self.clock.now_ms >= heal_ms + MAX_AFTER_MS:
                self.checks.all_ended(self.books.db)
                raise self.checks.broken("work is left for no job", f"{len(self.network.stream)} messages")
            self.clock.run(self.clock.now_ms + LOOK_AFTER_MS)
        self.checks.all_ended(self.books.db)
        self.checks.audit(self.books.db)
        self.checks.audit_answers(self.books.db)

    def finished(self) -> bool:
        """Whether every job has its last status and no message of work is on its way."""
        if not all(self.cell.is_kept(job) for job in self.jobs) or len(self.network.stream):
            return False
        rows = self.books.db.execute("SELECT status FROM batch").fetchall()
        return all(row[0] in ENDED for row in rows)

    def close(self) -> None:
        """Close the books."""
        self.books.close()


def make_jobs(seed: int, plan: Plan, *, poison: bool = True) -> list[Job]:
    """One to three jobs of one seed's customers."""
    draws = Draws(seed, "jobs")
    cancels, windows, bad = Draws(seed, "cancels"), Draws(seed, "windows"), Draws(seed, Kind.POISON.value)
    jobs = []
    for number in range(1, draws.between(1, 3) + 1):
        handed_ms = BEGIN_MS + draws.below(plan.heal_ms * 2 // 3)
        lines = []
        for line in range(draws.between(5, 60)):
            fate = Fate.FINE
            if bad.chance(0.03):
                fate = Fate.BAD
            elif poison and bad.chance(0.01):
                fate = Fate.POISON
            tokens = draws.between(1, 200) if draws.chance(0.8) else draws.between(200, 600)
            lines.append(Line(number, line, draws.between(1, 60), max(tokens, 20 if fate else 1), fate))
        short = windows.chance(0.2)
        jobs.append(
            with_bodies(
                Job(
                    number=number,
                    model="m",
                    lines=lines,
                    handed_ms=handed_ms,
                    window_ms=windows.between(15_000, 90_000) if short else 24 * 3_600_000,
                    cancel_ms=handed_ms + cancels.between(0, 60_000) if cancels.chance(0.1) else None,
                )
            )
        )
    return jobs


def run_seed(
    seed: int,
    vehicles: int | None = None,
    without: Iterable[Kind] = (),
    *,
    new_scheduler: Callable[[int], Scheduler] = Scheduler,
    plant: Callable[[World], None] = lambda _: None,
) -> Outcome:
    """One world of faults from its beginning to its end. ``plant`` may put a bug into it before it begins."""
    without = tuple(sorted(without))
    size = Draws(seed, "size")
    count = vehicles or min(size.between(3, 8), size.between(3, 8))
    kind = detail = ""
    at_ms = 0
    with tempfile.TemporaryDirectory(prefix="motorpool-sim-") as folder, _quiet():
        world = World(seed, count, Path(folder), frozenset(ALL) - set(without), new_scheduler=new_scheduler)
        plant(world)
        try:
            world.live()
        except InvariantError as error:
            kind, detail, at_ms = error.kind, str(error), error.at_ms - BEGIN_MS
        except Exception as error:  # noqa: BLE001  # whatever ends a state machine is a broken promise
            last = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} in {Path(last.filename).stem}.{last.name}"
            detail, at_ms = f"{kind}: {error}", world.clock.now_ms - BEGIN_MS
        finally:
            world.close()
    statuses = list(world.checks.ended_jobs.values())
    return Outcome(
        seed=seed,
        vehicles=count,
        without=tuple(str(each) for each in without),
        broken=kind,
        detail=detail,
        at_ms=at_ms,
        events=world.clock.events,
        simulated_ms=world.clock.now_ms - BEGIN_MS,
        lines=sum(len(job.lines) for job in world.jobs),
        jobs={status: statuses.count(status) for status in sorted(set(statuses))},
        trace=world.trace.digest(),
        story=tuple(world.trace.tail[-40:]) if kind else (),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """What liars send is logged by the parts that refuse it: here that is no news."""
    log = logging.getLogger("motorpool")
    handler, before = logging.NullHandler(), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before


def shrink(found: Outcome, tell: Callable[[Outcome], None] = lambda _: None) -> Outcome:
    """A smaller world that breaks the same promise: fewer kinds of faults, then fewer vehicles."""
    without = {Kind(kind) for kind in found.without}
    best = found
    for kind in ALL:
        if kind not in without:
            tried = run_seed(found.seed, best.vehicles, without | {kind})
            if tried.broken == found.broken:
                best, without = tried, without | {kind}
                tell(best)
    for count in range(1, best.vehicles):
        tried = run_seed(found.seed, count, without)
        if tried.broken == found.broken:
            tell(tried)
            return tried
    return best
