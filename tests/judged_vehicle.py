"""Guard, machine and an engine that does what it is told, joined as the agent's loop joins them, step by step."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from motorpool import wire
from motorpool.agent.judge import Judge
from motorpool.agent.signals.source import SignalSource
from motorpool.core.guard import ConsentView, Policy
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import (
    Arrived,
    CancelAttempts,
    Command,
    EngineReady,
    EngineWorked,
    Event,
    FreezeEngine,
    KillEngine,
    StartEngine,
    SubmitAttempts,
    ThawEngine,
    Ticked,
    VehicleConfig,
    VerdictGiven,
    WakeAt,
)
from motorpool.types import Kind, Permit

MODEL = "m"
INCARNATION = "inc"
WORK = (StartEngine, SubmitAttempts, ThawEngine)  # what gives processor time to the engine


class Done(msgspec.Struct, frozen=True):
    """One step: what was handed in, whether the engine computed before, and what came back."""

    now_ms: int
    event: Event
    computing: bool
    commands: list[Command]


class JudgedVehicle:
    """One vehicle. ``look`` is the guard's turn; ``steps`` is all that was ever handed in and came back."""

    def __init__(
        self,
        source: SignalSource,
        consent: Callable[[int], ConsentView],
        policy: Policy,
        machine: VehicleMachine | None = None,
    ) -> None:
        self.machine = machine or a_machine()
        self.judge = Judge(source, consent, policy, offset_min=lambda _: 0)
        self.now_ms = 0
        self.steps: list[Done] = []
        self.permit: Permit | None = None
        self.on = self.frozen = False
        self.in_engine: set[str] = set()
        self._wake_ms = 0

    @property
    def computing(self) -> bool:
        """Does the engine have processor time: it loads, or it holds attempts and is not frozen."""
        return self.on and not self.frozen

    def look(self, now_ms: int) -> VerdictGiven:
        """The guard looks; while the vehicle works its engine tells of it."""
        self.now_ms = now_ms
        verdict = self.judge.look(now_ms, self.machine.state, lambda: 0)
        self.permit = verdict.permit
        self.hand(verdict)
        if self.machine.watts_now_w:
            self.hand(EngineWorked(busy_ms=now_ms % 10**6))
        self.judge.afterwards(now_ms, self.machine.state)
        if now_ms >= self._wake_ms:
            self.hand(Ticked())
        return verdict

    def tick(self, now_ms: int) -> None:
        """Time passes without a look of the guard."""
        self.now_ms = now_ms
        self.hand(Ticked())

    def say(self, message: wire.Down) -> None:
        """A message of the cell."""
        self.hand(Arrived(message=message))

    def hand(self, event: Event) -> None:
        """One step of the machine, and the engine does what comes back."""
        before = self.computing
        commands = self.machine.handle(event, self.now_ms)
        self.steps.append(Done(self.now_ms, event, before, commands))
        loads = False
        for command in commands:
            loads = self._perform(command) or loads
        self.machine.validate()
        if loads and self.on:
            self.hand(EngineReady(model=MODEL, slots=2, fingerprint="f"))

    def _perform(self, command: Command) -> bool:
        if isinstance(command, WakeAt):
            self._wake_ms = command.at_ms
        elif isinstance(command, SubmitAttempts):
            self.in_engine |= {attempt.key for attempt in command.attempts}
        elif isinstance(command, CancelAttempts):
            self.in_engine -= set(command.keys)
        elif isinstance(command, FreezeEngine):
            self.frozen = True
        elif isinstance(command, ThawEngine):
            self.frozen = False
        elif isinstance(command, KillEngine):
            self.on = self.frozen = False
            self.in_engine.clear()
        elif isinstance(command, StartEngine):
            self.on, self.frozen = True, False
            return True
        return False

    @property
    def work(self) -> list[Command]:
        """Every command so far that gave processor time to the engine."""
        return [command for step in self.steps for command in step.commands if isinstance(command, WORK)]


def a_machine() -> VehicleMachine:
    """A machine of a vehicle with one model."""
    return VehicleMachine(VehicleConfig(model=MODEL), INCARNATION)


def grant(lease: str, lines: int = 4, **changes: object) -> wire.Grant:
    """Work for a while."""
    items = [wire.Item(line=line, body=b"{}") for line in range(lines)]
    message = wire.Grant(
        lease_id=lease,
        incarnation=INCARNATION,
        job_id="job",
        kind=Kind.CHAT,
        model=MODEL,
        ttl_ms=10**9,
        items=items,
    )
    return msgspec.structs.replace(message, **changes)


def asked(request: str) -> wire.Open:
    """A live request."""
    return wire.Open(request_id=request, attempt=0, kind=Kind.CHAT, model=MODEL, stream=True, body=b"{}")
