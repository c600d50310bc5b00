"""Invariant 5 where the guard meets the machine: the first thing that a "no" leads to is that the engine stops."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests import invariant_world
from tests.invariant_world import CONSENT, CONSENTS, POLICY, START_MS, Step, many, simple_traces, trace
from tests.judged_vehicle import WORK, JudgedVehicle, a_machine, asked, grant

from motorpool import wire
from motorpool.core.guard import ConsentView, Signals
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import (
    Arrived,
    Command,
    EngineDied,
    Event,
    FreezeEngine,
    KillEngine,
    LinkChanged,
    Ticked,
    VerdictGiven,
)

# What may happen between two looks of the guard, whatever those said. A number is time without any look, in ms.
HAPPENS: tuple[int | Event | str, ...] = (
    "grant",
    "open",
    Ticked(),
    Arrived(message=wire.Sync()),
    Arrived(message=wire.Revoke(lease_id="l1", keep_running=True)),
    Arrived(message=wire.Close(request_id="r1")),
    LinkChanged(up=False),
    LinkChanged(up=True),
    EngineDied(exit_code=1),
    500,
    2_500,
    90_000,
)


class TraceSource:
    """A car whose signals are those of a trace."""

    def __init__(self) -> None:
        self.changes: dict[str, object] = {}
        self.since_ms: dict[str, int] = {}

    def read(self, now_ms: int) -> Signals:
        return invariant_world._read(now_ms, self.changes, self.since_ms)

    def on_change(self, callback: object) -> None:
        """Every step of the trace is looked at anyway."""


def run(steps: list[Step], happens: list[int | Event | str], machine: VehicleMachine | None = None) -> JudgedVehicle:
    """A vehicle at work, then a trace; after each look one of the other things happens."""
    source, consents = TraceSource(), [CONSENT]

    def consent(_now_ms: int) -> ConsentView:
        return consents[-1]

    vehicle = JudgedVehicle(source, consent, POLICY, machine)
    now_ms = START_MS
    for _ in range(4):
        vehicle.look(now_ms)
        now_ms += 500
    vehicle.say(grant("l1"))
    assert vehicle.machine.watts_now_w > 0
    turn = 0
    for step in steps:
        now_ms = max(now_ms, now_ms + step.dt_ms)  # the agent's clock never goes back
        if step.well:
            source.changes, source.since_ms = {}, {}
        for name, value in step.changes:
            source.changes[name] = value
            source.since_ms[name] = now_ms
        consents.append(msgspec.structs.replace(CONSENT, **CONSENTS[step.consent]))
        for look_ms in (0, 600, 600):
            now_ms += look_ms
            vehicle.look(now_ms)
            if happens:
                now_ms = let_happen(vehicle, happens[turn % len(happens)], now_ms, turn)
                turn += 1
    return vehicle


def let_happen(vehicle: JudgedVehicle, what: int | Event | str, now_ms: int, turn: int) -> int:
    if isinstance(what, int):
        vehicle.tick(now_ms + what)
        return now_ms + what
    if isinstance(what, str):
        vehicle.say(grant(f"lease-{turn}") if what == "grant" else asked(f"request-{turn}"))
    elif not isinstance(what, EngineDied):
        vehicle.hand(what)
    elif vehicle.on:
        vehicle.on = vehicle.frozen = False
        vehicle.hand(what)
    return now_ms


def stops(command: Command) -> bool:
    return isinstance(command, FreezeEngine | KillEngine)


def check(vehicle: JudgedVehicle) -> int:
    """How often a "no" met an engine that computed; raises where something came before the stop, or work after it."""
    until_ms, met = 0, 0
    for step in vehicle.steps:
        no = False
        if isinstance(step.event, VerdictGiven):
            until_ms = 0 if step.event.permit is None else step.event.permit.until_ms
            no = until_ms <= step.now_ms
        elif until_ms and until_ms <= step.now_ms:  # the permit ran out, and nobody looked
            until_ms, no = 0, True
        if no and step.computing:
            met += 1
            assert step.commands, "an engine went on computing after a no"
            assert stops(step.commands[0]), "something came before the stop"
        if until_ms <= step.now_ms:
            assert not [command for command in step.commands if isinstance(command, WORK)], "work without a permit"
    return met


@many
@given(trace, st.lists(st.sampled_from(HAPPENS), max_size=12))
def test_invariant_05_the_first_command_after_a_no_is_to_stop(
    steps: list[Step], happens: list[int | Event | str]
) -> None:
    check(run(steps, happens))


def test_every_single_change_that_means_no_stops_an_engine_that_computes() -> None:
    met = [check(run(steps, [])) for steps in simple_traces()]
    assert sum(count > 0 for count in met) > 60, "otherwise the property above would hold of nothing"


class HandsBackFirst(VehicleMachine):
    """What must not be: the work goes back before the engine stops."""

    def handle(self, event: Event, now_ms: int) -> list[Command]:
        commands = super().handle(event, now_ms)
        return [*(c for c in commands if not stops(c)), *(c for c in commands if stops(c))]


def test_a_machine_that_hands_back_before_it_freezes_would_be_found() -> None:
    config = a_machine()._config
    found = 0
    for steps in simple_traces():
        try:
            check(run(steps, [], HandsBackFirst(config, "inc")))
        except AssertionError as error:
            found += "before the stop" in str(error)
    assert found > 60
