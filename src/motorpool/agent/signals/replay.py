"""A vehicle's signals from recorded charging sessions, at a chosen speed: plug in, charge, stand, unplug, drive away.

Decides: what a car did that charged as recorded, and when. The sessions say only when the cable went in and out, how
much energy flowed and, in part, charge and capacity; doors, gear and heat are those of ``car.SimulatedCar``.
Must not: read a clock (time is handed in; ``run`` is given one), or let one session run into the next.
Called by: ``agent.main``, demonstrations and tests; ``agent.signals.sessions`` reads the files.

The owner comes 30 s before plug-in; on leaving, the door opens so early that the cable is out at plug-out. At a speed
of 60 an hour passes in a minute, for the energy that the computer draws, too.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Final, Self

import msgspec

from motorpool.agent.signals.car import COARSE_STEP_S, Action, CarSpec, SimulatedCar
from motorpool.agent.signals.sessions import Session
from motorpool.core.signals import LowVoltage, Occupancy, Reading, Signals
from motorpool.errors import SetupError

ARRIVES_MS: Final = 30_000  # before plug-in
LEAVES_MS: Final = 1_500  # before plug-out: what the owner does before the cable is out
SHORTEST_MS: Final = 60_000  # a shorter session is no stay
FULL_PCT: Final = 95.0  # taken for the end of a session whose charge is not known, as the authors of the data do
CHARGED_SHARE: Final = 0.88  # of the recorded energy, which is that of the socket, reaches the battery
MIN_CAPACITY_WH: Final = 5_000.0
DONE_MS: Final = 1 << 62


def of_user(sessions: Sequence[Session], user: str) -> list[Session]:
    """One user's sessions in order, without those that are too short or overlap the one before."""
    mine: list[Session] = []
    for session in sorted((s for s in sessions if s.user == user), key=lambda s: s.plug_in_ms):
        free_ms = mine[-1].plug_out_ms if mine else -DONE_MS
        long = session.plug_out_ms - session.plug_in_ms >= SHORTEST_MS
        if long and session.plug_in_ms - free_ms > ARRIVES_MS + LEAVES_MS:
            mine.append(session)
    if not mine:
        raise SetupError("the data set has no usable session of that user: choose another", code="no_sessions")
    return mine


def spec_of(session: Session, base: CarSpec) -> CarSpec:
    """The car that charges what was recorded: it takes that energy, at that power, and then stands."""
    capacity_wh = max(MIN_CAPACITY_WH, session.capacity_wh or base.capacity_wh)
    gained_pct = session.energy_kwh * 1000.0 * CHARGED_SHARE / capacity_wh * 100.0
    start_pct = session.soc_start_pct
    if start_pct is None:
        start_pct = FULL_PCT - gained_pct
    start_pct = min(100.0, max(5.0, start_pct))
    charger_w = session.charger_w or base.battery_accepts_w / CHARGED_SHARE
    return msgspec.structs.replace(
        base,
        plugged=False,
        driving_speedup=0.0,  # the next session says what is left after the trip
        soc_pct=start_pct,
        capacity_wh=capacity_wh,
        charge_limit_pct=min(100.0, max(1.0, start_pct + gained_pct)),
        battery_accepts_w=charger_w * CHARGED_SHARE,
        charger_ac_w=max(base.charger_ac_w, charger_w),
        circuit_w=max(base.circuit_w, charger_w),
    )


class ReplaySource:
    """A SignalSource that lives through ``sessions`` (of one user, in order) from the first arrival at ``start_ms``.

    ``speed`` is how many recorded seconds pass in one. ``longest_gap_ms`` shortens longer times on the road. With a
    ``clock`` it can be entered as a context, in which it tells of each act by itself.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        start_ms: int,
        *,
        speed: float = 1.0,
        longest_gap_ms: int | None = None,
        base: CarSpec | None = None,
        drawn_w: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], int] | None = None,
    ) -> None:
        if not sessions or speed <= 0:
            raise SetupError("a replay needs a session and a speed above 0", code="bad_replay")
        self._stays = _timeline(sessions, longest_gap_ms)
        self._base = base or CarSpec()
        self._drawn_w = drawn_w
        self._start_ms = start_ms
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._speed = speed
        self._origin_ms = self._stays[0].plug_in_ms - ARRIVES_MS
        self._events: list[tuple[int, int, str]] = []
        for number, stay in enumerate(self._stays):
            self._events += [
                (stay.plug_in_ms - ARRIVES_MS, number, "arrive"),
                (stay.plug_in_ms, number, "plug_in"),
                (stay.plug_out_ms - LEAVES_MS, number, "leave"),
            ]
        self._next = 0
        self._car = self._new_car(0)
        _on_the_road(self._car)
        self._callbacks: list[Callable[[], None]] = []

    def recorded_ms(self, now_ms: int) -> int:
        """The recorded time that is being replayed now."""
        return self._origin_ms + round((now_ms - self._start_ms) * self._speed)

    def next_event_ms(self) -> int:
        """When the owner does the next thing; far away when all is told."""
        if self._next >= len(self._events):
            return DONE_MS
        ahead_ms = self._events[self._next][0] - self._origin_ms
        return self._start_ms + math.ceil(ahead_ms / self._speed)

    def read(self, now_ms: int) -> Signals:
        """The car as it stands in the recording, measured now."""
        self._catch_up(now_ms)
        signals = self._car.read(self._car_ms(now_ms))
        stamped = {}
        for name in Signals.__struct_fields__:
            reading = getattr(signals, name)
            if reading is not None:
                stamped[name] = Reading(reading.value, now_ms)
        return Signals(**stamped)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever the owner has done something."""
        self._callbacks.append(callback)

    def tick(self, now_ms: int) -> None:
        """Let time pass; tells of the owner's acts."""
        if self._catch_up(now_ms):
            for callback in self._callbacks:
                callback()

    async def __aenter__(self) -> Self:
        assert self._clock is not None, "a replay that runs by itself needs a clock"
        self._task = asyncio.create_task(self.run(self._clock))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def run(self, clock: Callable[[], int]) -> None:
        """Tell of each act at its time, until all sessions are told."""
        while (due_ms := self.next_event_ms()) < DONE_MS:
            await asyncio.sleep(max(0, due_ms - clock()) / 1000)
            self.tick(clock())

    def _car_ms(self, now_ms: int) -> int:
        at_ms = self.recorded_ms(now_ms)
        self._car.advance(at_ms, COARSE_STEP_S)
        return at_ms

    def _catch_up(self, now_ms: int) -> bool:
        """Do what the owner did up to now, each act at its own time."""
        at_ms = self.recorded_ms(now_ms)
        acted = False
        while self._next < len(self._events) and self._events[self._next][0] <= at_ms:
            due_ms, number, what = self._events[self._next]
            self._next += 1
            acted = True
            self._car.advance(due_ms, COARSE_STEP_S)
            if what == "arrive":
                self._car = self._new_car(number)
            else:
                self._car.do(Action.PLUG_IN if what == "plug_in" else Action.DRIVE_OFF, due_ms)
        return acted

    def _new_car(self, number: int) -> SimulatedCar:
        stay = self._stays[number]
        return SimulatedCar(spec_of(stay, self._base), stay.plug_in_ms - ARRIVES_MS, self._drawn_w)


def _timeline(sessions: Sequence[Session], longest_gap_ms: int | None) -> list[Session]:
    """The sessions one after another, with long times on the road cut."""
    stays: list[Session] = []
    for session in sessions:
        length_ms = session.plug_out_ms - session.plug_in_ms
        if length_ms < SHORTEST_MS:
            raise SetupError("a session of less than a minute cannot be replayed: leave it out", code="bad_replay")
        plug_in_ms = session.plug_in_ms
        if stays:
            before = stays[-1]
            gap_ms = session.plug_in_ms - sessions[len(stays) - 1].plug_out_ms
            if gap_ms <= ARRIVES_MS + LEAVES_MS:
                raise SetupError("two sessions of a replay overlap: choose those of one user", code="bad_replay")
            cut_ms = gap_ms if longest_gap_ms is None else max(2 * ARRIVES_MS, min(gap_ms, longest_gap_ms))
            plug_in_ms = before.plug_out_ms + cut_ms
        stays.append(msgspec.structs.replace(session, plug_in_ms=plug_in_ms, plug_out_ms=plug_in_ms + length_ms))
    return stays


def _on_the_road(car: SimulatedCar) -> None:
    """Before the first session the car is somewhere else."""
    car.gear_is_park = False
    car.speed_kmh = 50.0
    car.ignition = LowVoltage.ON
    car.seat = Occupancy.OCCUPIED
    car.locked = False
