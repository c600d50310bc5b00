"""Long worlds of the full gear without faults: thousands of vehicles for days, with the production core in the middle.

Decides: what the fleet is made of and what customers hand in. Must not: decide who runs what, or when a car may work.
Called by: ``cli.sim_faults`` (``motorpool sim run --gear full``), the tests.

Every message is made, sent and read as in production. What makes it quick is only how seldom things are told: the
guard looks when something changes and at long intervals otherwise, a vehicle with a link need not say that it is still
there, engines tell of finished lines in batches and in any case before something stops them, and cars that are on the
road sleep. What has ended is forgotten: a long world holds no more than a short one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from motorpool import wire
from motorpool.agent.signals.car import Action, CarSpec
from motorpool.core import events as ev
from motorpool.core.guard import Policy
from motorpool.core.scheduler import Scheduler
from motorpool.core.signals import NetworkClass
from motorpool.core.vehicle_events import VehicleConfig, VerdictGiven
from motorpool.server.entries import Entry
from motorpool.sim.full import cell as control
from motorpool.sim.full import vehicle as parts
from motorpool.sim.full.books import LightBooks
from motorpool.sim.full.checks import Checks
from motorpool.sim.full.clock import Clock, Draws, Trace
from motorpool.sim.full.engine import EngineSpec
from motorpool.sim.full.network import Network, Weather
from motorpool.sim.full.vehicle import Vehicle
from motorpool.sim.full.work import Job, Line, with_bodies
from motorpool.sim.people import People

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
BEGIN_MS: Final = 1_760_918_400_000  # a Monday, 00:00
LEAVE_MS: Final = 20_000  # from the door to the road
ASLEEP_AFTER_MS: Final = 60_000
COMPILED_FROM: Final = 2_000  # vehicles; below, compiling takes longer than it saves
CLOSED_LEASES: Final = 64  # that a vehicle remembers; grants come once here
CHECK_PER_VEHICLE: Final = 20  # a look at all invariants takes the longer the more vehicles there are
JITTER_MS: Final = 600_000
SAMPLE_MS: Final = 300_000  # between two looks at whether lines wait, and two calls of ``tell``
Tell = Callable[[float], None]


class WeekSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet and its customers.

    ``load`` is the work handed in over what the fleet could do in all the time that it is plugged in. A line takes
    about ``line_s`` seconds of one slot, a job ``job_lines`` lines. ``report_ms`` is how often a vehicle reports that
    nothing urgent has changed (its link tells the cell that it is there), ``look_ms`` how often its guard looks when
    nothing has, ``batch_ms`` how often an engine tells what it has finished while others wait for its slots,
    ``plan_ms`` how old the order of the jobs may be. ``check_every``: the states' own invariants are asked for at every
    so many events, or more of a large fleet.
    """

    vehicles: int
    days: float
    seed: int = 0
    load: float = 0.8
    line_s: float = 60.0
    job_lines: int = 2_000
    slots: int = 4
    tokens_s: float = 30.0
    report_ms: int = 900_000
    plan_ms: int = 60_000
    look_ms: int = HOUR_MS
    batch_ms: int = 180_000
    tick_ms: int = 15_000
    check_every: int = 5_000


class Week(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. Work is measured in slot-hours: the time that one slot of the vehicle that did it takes.

    ``possible_slot_h`` is the time with a permit while lines waited, and the time at work while none did; ``harvest``
    is useful work over it. ``waste`` is work without use over all work. ``lost`` are lines that came back begun and
    unfinished, ``doubled`` are results that did not count.
    """

    vehicles: int
    days: float
    seed: int
    lines: int
    done: int
    lost: int
    doubled: int
    handed_slot_h: float
    permitted_slot_h: float
    possible_slot_h: float
    worked_slot_h: float
    useful_slot_h: float
    harvest: float
    waste: float
    jobs: dict[str, int]
    earned_micro: int
    events: int
    seconds: float
    trace: str

    @property
    def events_s(self) -> float:
        """Events a second of this machine's time."""
        return self.events / max(1e-9, self.seconds)


class Tally(Checks):
    """The checks of a long world, and sums of what was done, lost and done twice."""

    def __init__(self, clock: Clock, trace: Trace, *, sample: int) -> None:
        super().__init__(clock, trace, sample=sample, books=False)
        self.done = self.lost = self.doubled = 0
        self.useful_ms = self.permitted_ms = 0
        self.vehicles: dict[str, Vehicle] = {}
        self._permitted: dict[str, int] = {}
        self._held: dict[str, dict[str, set[int]]] = {}  # by vehicle and lease

    def decided(self, entry: Entry, commands: Sequence[ev.Command], now_ms: int) -> None:
        """Count what this event has brought."""
        super().decided(entry, commands, now_ms)
        event = entry.event
        if isinstance(event, ev.ResultsArrived):
            picked = 0
            for command in commands:
                if isinstance(command, ev.SaveResults):
                    picked += len(command.picks)
                    engine = self.vehicles[event.vehicle_id].engine
                    self.useful_ms += sum(
                        engine.time_ms(event.prompt_tokens[place], event.completion_tokens[place])
                        for place in command.picks
                    )
            self.done += picked
            self.doubled += len(event.lines) - picked
            self._trace.add(now_ms, f"{event.vehicle_id} {event.lease_id} {picked}")
        elif isinstance(event, ev.WorkReturned):
            self.lost += sum(event.started)

    def started(self, vehicle: Vehicle) -> None:
        """A new incarnation holds nothing."""
        self._held[vehicle.vehicle_id] = {}

    def arrived(self, vehicle: Vehicle, grant: wire.Grant) -> None:
        """The lines that a vehicle holds from now on: each ends once, and is forgotten then."""
        self._held[vehicle.vehicle_id].setdefault(grant.lease_id, {item.line for item in grant.items})

    def _given(self, vehicle: Vehicle, message: wire.Results | wire.Returned) -> None:
        held = self._held[vehicle.vehicle_id]
        left = held.get(message.lease_id, set())
        before = len(left)
        left.difference_update([item.line for item in message.items])
        if before - len(left) != len(message.items):
            raise self.broken("a vehicle speaks of lines that it does not hold", message.message_id)
        if not left:
            held.pop(message.lease_id, None)

    def judged(self, vehicle: Vehicle, verdict: VerdictGiven, now_ms: int) -> None:
        """Add up the time with a permit."""
        since_ms = self._permitted.pop(vehicle.vehicle_id, None)
        if since_ms is not None:
            self.permitted_ms += now_ms - since_ms
        if verdict.permit is not None:
            self._permitted[vehicle.vehicle_id] = now_ms
        super().judged(vehicle, verdict, now_ms)


class WeekWorld:
    """One long world. ``new_scheduler`` makes the core; without it a large fleet's has compiled kernels."""

    def __init__(
        self, spec: WeekSpec, people: People, *, new_scheduler: Callable[[int], Scheduler] | None = None
    ) -> None:
        self.spec = spec
        self.end_ms = BEGIN_MS + int(spec.days * DAY_MS)
        self.clock = Clock(BEGIN_MS)
        self.trace = Trace()
        sample = max(spec.check_every, CHECK_PER_VEHICLE * spec.vehicles)
        self.tally = Tally(self.clock, self.trace, sample=sample)
        self.network = Network(self.clock, spec.seed, Weather(quick_ms=(5, 5)), reliable=True)
        self.books = LightBooks()
        self.cell = control.Cell(
            clock=self.clock,
            network=self.network,
            trace=self.trace,
            watcher=self.tally,
            books=self.books,
            pace=control.Pace(turn_ms=20, tick_ms=spec.tick_ms, plan_ms=spec.plan_ms, hears_links=True),
            new_scheduler=new_scheduler or (lambda epoch: Scheduler(epoch, fast=spec.vehicles >= COMPILED_FROM)),
        )
        self._people = people
        self.plugged_ms = self._possible_ms = 0
        self.vehicles: dict[str, Vehicle] = {}
        self._stays: dict[str, list[tuple[int, int]]] = {}
        for number in range(spec.vehicles):
            self._add(f"v{number:06}")
        self.cell.enrolled = set(self.vehicles)
        self.tally.vehicles = self.vehicles
        self.tally.scheduler = lambda: self.cell.scheduler
        self.tally.job_of = self.cell.job
        self._lines = 0
        self._handed_ms = 0.0
        ends = self.network.ends
        ends.to_cell, ends.work_to_cell = self.cell.on_state, self.cell.on_work
        ends.to_vehicle = lambda name, data: self.vehicles[name].on_down(data)
        ends.confirmed = lambda name, message_ids: self.vehicles[name].on_confirmed(message_ids)
        ends.link = lambda name, up: self.vehicles[name].on_link(up)
        ends.linked = self.cell.on_linked

    def _add(self, name: str) -> None:
        spec, draws = self.spec, Draws(self.spec.seed, "fleet", name)
        config = VehicleConfig(
            model="m",
            freeze_grace_ms=5_000,
            state_interval_ms=spec.report_ms,
            state_min_ms=spec.report_ms,
            stay_interval_ms=spec.report_ms,
            progress_interval_ms=DAY_MS,
            flush_ms=0,
            window_ms=int(1_500 * spec.line_s) + 2 * spec.batch_ms,
            max_closed=CLOSED_LEASES,
            stall_ms=DAY_MS,
        )
        policy = Policy(
            watts_w=parts.WATTS_W,
            dwell_ms=10_000,
            blind_ms=2 * spec.look_ms + HOUR_MS,
            network=NetworkClass.UNMETERED,
        )
        vehicle = Vehicle(
            name,
            clock=self.clock,
            network=self.network,
            watcher=self.tally,
            pace=parts.Pace(
                look_ms=spec.look_ms,
                denied_ms=HOUR_MS // 3,
                lifeline_ms=spec.look_ms,
                permit_ms=spec.look_ms + 60_000,
                step_ms=HOUR_MS // 6,
                config=config,
                reliable=True,
            ),
            engine=EngineSpec(
                slots=spec.slots,
                tokens_s=round(spec.tokens_s * (0.6 + 0.8 * draws.unit()), 2),
                load_ms=20_000,
                report_ms=spec.batch_ms,
                terse=True,
            ),
            policy=policy,
            car=CarSpec(soc_pct=float(draws.between(40, 90)), plugged=False, driving_speedup=1.0, regions=()),
            twin=False,
        )
        self.vehicles[name] = vehicle
        self._stays[name] = self._week_of(draws)
        self.plugged_ms += sum(end_ms - begin_ms for begin_ms, end_ms in self._stays[name])

    def _week_of(self, draws: Draws) -> list[tuple[int, int]]:
        """The stays of one user from one of its Mondays on, a few minutes earlier or later."""
        people = self._people
        user = draws.below(len(people))
        first, last = int(people.first[user]), int(people.first[user + 1])
        weeks = max(1, int(people.weeks[user]) - -(-int(self.spec.days) // 7))
        shift_ms = draws.below(weeks) * 7 * DAY_MS - draws.below(2 * JITTER_MS) + JITTER_MS
        found = []
        for row in range(first, last):
            begin_ms = BEGIN_MS + int(people.start_ms[row]) - shift_ms
            end_ms = BEGIN_MS + int(people.end_ms[row]) - shift_ms
            begin_ms, end_ms = max(begin_ms, BEGIN_MS + 60_000), min(end_ms, self.end_ms)
            if end_ms - begin_ms > 10 * 60_000:
                found.append((begin_ms, end_ms))
        return found

    # -- owners --------------------------------------------------------------------------------------------------------

    def _arrive(self, vehicle: Vehicle, stays: list[tuple[int, int]], number: int) -> None:
        draws = Draws(self.spec.seed, "arrive", vehicle.vehicle_id, number)
        if vehicle.machine is None:
            vehicle.start()
        if vehicle.car.away:
            vehicle.car.advance(self.clock.now_ms, DAY_MS / 1000)
            vehicle.car.do(Action.COME_BACK, self.clock.now_ms)
        vehicle.wake_up()
        self.clock.after(5_000, self._plug_in, vehicle, draws.between(35, 80))
        self.clock.at(stays[number][1] - LEAVE_MS, self._leave, vehicle, stays, number)

    def _plug_in(self, vehicle: Vehicle, soc_pct: int) -> None:
        vehicle.car.advance(self.clock.now_ms)
        vehicle.car.energy_wh = min(vehicle.car.energy_wh, soc_pct / 100 * 60_000.0)
        vehicle.act(Action.PLUG_IN)

    def _leave(self, vehicle: Vehicle, stays: list[tuple[int, int]], number: int) -> None:
        vehicle.act(Action.DRIVE_OFF)
        for after_ms in (1_500, 5_000):
            self.clock.after(after_ms, vehicle.look)
        self.clock.after(ASLEEP_AFTER_MS, self._sleep, vehicle)
        if number + 1 < len(stays):
            begin_ms = max(stays[number + 1][0], self.clock.now_ms + 2 * ASLEEP_AFTER_MS)
            self.clock.at(begin_ms, self._arrive, vehicle, stays, number + 1)

    def _sleep(self, vehicle: Vehicle) -> None:
        if not vehicle.engine.on and vehicle.machine is not None and not vehicle.machine.undelivered:
            vehicle.sleep()

    # -- customers -----------------------------------------------------------------------------------------------------

    def _hand_in(self) -> None:
        """Jobs at even intervals, so that in the end ``load`` of all plugged time was handed in."""
        spec = self.spec
        wanted_lines = spec.load * self.plugged_ms * spec.slots / (spec.line_s * 1000)
        count = max(1, round(wanted_lines / spec.job_lines))
        lines_each = max(1, round(wanted_lines / count))
        gap_ms = (self.end_ms - BEGIN_MS) * 9 // 10 // count
        for number in range(1, count + 1):
            self.clock.at(BEGIN_MS + (number - 1) * gap_ms, self._hand_in_one, number, lines_each)

    def _hand_in_one(self, number: int, count: int) -> None:
        """One job, which nobody keeps once it has ended."""
        spec, draws = self.spec, Draws(self.spec.seed, "job", number)
        mean = spec.line_s * spec.tokens_s
        lines = [
            Line(number, line, draws.between(100, 2_000), max(1, int(mean * (0.5 + draws.unit()))))
            for line in range(count)
        ]
        self._lines += count
        self._handed_ms += sum(line.tokens + line.prompt / 10 for line in lines) / spec.tokens_s * 1000
        now_ms = self.clock.now_ms
        self.cell.hand_in(with_bodies(Job(number=number, model="m", lines=lines, handed_ms=now_ms, window_ms=DAY_MS)))

    # -- the run -------------------------------------------------------------------------------------------------------

    def live(self, tell: Tell = lambda _: None) -> Week:
        """Let it happen; ``tell`` hears how much of it is over, from 0 to 1. Raises InvariantError."""
        begun_s = time.perf_counter()
        self._hand_in()
        self.cell.start()
        for name, vehicle in self.vehicles.items():
            if self._stays[name]:
                self.clock.at(self._stays[name][0][0], self._arrive, vehicle, self._stays[name], 0)
        now_ms = BEGIN_MS
        while now_ms < self.end_ms:
            now_ms = min(self.end_ms, now_ms + SAMPLE_MS)
            self.clock.run(now_ms)
            self._sample()
            tell((now_ms - BEGIN_MS) / (self.end_ms - BEGIN_MS))
        self.cell.scheduler.validate()
        return self._result(time.perf_counter() - begun_s)

    def _sample(self) -> None:
        """How many slots could work now: all with a permit while lines wait, those that do while none does."""
        waits = any(job.pending > 0 for job in self.cell.scheduler.jobs.values())
        for vehicle in self.vehicles.values():
            if self.clock.now_ms < vehicle.permit_until_ms:
                slots = self.spec.slots if waits else min(vehicle.engine.attempts, self.spec.slots)
                self._possible_ms += slots * SAMPLE_MS

    def _result(self, seconds: float) -> Week:
        spec, tally = self.spec, self.tally
        for vehicle in self.vehicles.values():
            vehicle.engine.worked_ms()
        worked_ms = sum(vehicle.engine.worked_slot_ms for vehicle in self.vehicles.values())
        permitted_ms = tally.permitted_ms * spec.slots
        in_engines_ms = sum(vehicle.engine.unfinished_ms() for vehicle in self.vehicles.values())
        statuses = list(self.books.status.values())
        return Week(
            vehicles=spec.vehicles,
            days=spec.days,
            seed=spec.seed,
            lines=self._lines,
            done=tally.done,
            lost=tally.lost,
            doubled=tally.doubled,
            handed_slot_h=self._handed_ms / HOUR_MS,
            permitted_slot_h=permitted_ms / HOUR_MS,
            possible_slot_h=self._possible_ms / HOUR_MS,
            worked_slot_h=worked_ms / HOUR_MS,
            useful_slot_h=tally.useful_ms / HOUR_MS,
            harvest=tally.useful_ms / max(1, self._possible_ms),
            waste=max(0, worked_ms - tally.useful_ms - in_engines_ms) / max(1, worked_ms),
            jobs={status: statuses.count(status) for status in sorted(set(statuses))},
            earned_micro=sum(self.books.earned_micro.values()),
            events=self.clock.events,
            seconds=seconds,
            trace=self.trace.digest(),
        )
