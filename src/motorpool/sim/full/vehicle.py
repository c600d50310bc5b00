"""One simulated vehicle: the real machine and the real guard in a car that its owner uses, with an agent that can die.

Decides: nothing that a vehicle decides; ``core.vehicle`` and ``core.guard`` do. It is to them what ``agent.loop`` and
``agent.delivery`` are in a real car: it brings events in, performs commands in their order, and gets finished work into
the stream, which outlives the agent's process as far as the spool has it.
Called by: ``sim.full.run``, ``sim.full.faults`` (what befalls it), ``sim.full.network`` (what arrives).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec

from motorpool import wire
from motorpool.agent.delivery import CATCH_UP_S, RETRY_MAX_S, RETRY_MIN_S, SETTLE_S, SPOOL_AFTER_S
from motorpool.agent.judge import Judge
from motorpool.agent.runtime.engine import (
    EXIT_SILENCE,
    Cancelled,
    Died,
    EngineEvent,
    Finished,
    Progressed,
    Ready,
)
from motorpool.agent.signals.car import Action, CarSpec, SimulatedCar
from motorpool.agent.spool import MemorySpool
from motorpool.core.guard import ConsentView, Policy
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import (
    Arrived,
    CancelAttempts,
    Command,
    EngineDied,
    EngineReady,
    EngineWorked,
    Event,
    FreezeEngine,
    KillEngine,
    LimitEngine,
    LinkChanged,
    PublishLive,
    PublishState,
    PublishWork,
    SpoolFilled,
    StartEngine,
    SubmitAttempts,
    ThawEngine,
    Ticked,
    VehicleConfig,
    VerdictGiven,
    WakeAt,
    WorkPublished,
)
from motorpool.errors import ConflictError, MotorpoolError
from motorpool.sim.full.clock import Clock
from motorpool.sim.full.engine import EngineSpec, SimEngine
from motorpool.sim.full.network import Network
from motorpool.types import Reason, ReasonCode, VehicleState

WATTS_W: Final = 100
CONSENT: Final = ConsentView(refusal=None, granted_ms=1, expires_ms=1 << 53, max_watts_w=WATTS_W, floor_pct=30.0)


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How often a vehicle looks and tells. The engine hears at each look that it may go on, for ``lifeline_ms``.

    ``denied_ms`` is how soon the guard looks again after a "no" of a car that stands at its cable; after any act of the
    owner it looks at once. ``step_ms`` is the longest step of the car's physics. ``reliable``: nothing gets lost in
    this world, so nothing is sent twice.
    """

    look_ms: int = 2_000
    denied_ms: int = 2_000
    step_ms: int = 60_000
    lifeline_ms: int = 3_000
    permit_ms: int = 4_500
    config: VehicleConfig
    reliable: bool = False


class Watcher(Protocol):
    """Who checks what must always hold; ``sim.full.checks``."""

    def handled(self, vehicle: Vehicle, event: Event, commands: Sequence[Command]) -> None:
        """The machine has taken an event."""

    def arrived(self, vehicle: Vehicle, grant: wire.Grant) -> None:
        """A grant is about to be handed in."""

    def judged(self, vehicle: Vehicle, verdict: VerdictGiven, now_ms: int) -> None:
        """The guard has looked; ``now_ms`` by the vehicle's clock."""

    def computed(self, vehicle: Vehicle, from_ms: int, to_ms: int) -> None:
        """The engine used the processor in this stretch of true time."""

    def started(self, vehicle: Vehicle) -> None:
        """A new incarnation."""


class _Waiting:
    """One message on its way to the stream."""

    __slots__ = ("data", "is_kept", "is_old", "message_id", "wait_ms")

    def __init__(self, message_id: str, data: bytes, *, is_old: bool) -> None:
        self.message_id = message_id
        self.data = data
        self.is_old = self.is_kept = is_old
        self.wait_ms = int(RETRY_MIN_S * 1000)


class Vehicle:
    """A car with a computer. What survives its agent: the car, the owner's words, the spool and the set of the clock.

    ``tamper`` is what a lying agent does with what it sends: bytes in, the bytes that are really sent out.
    """

    def __init__(
        self,
        vehicle_id: str,
        *,
        clock: Clock,
        network: Network,
        watcher: Watcher,
        pace: Pace,
        engine: EngineSpec,
        policy: Policy,
        car: CarSpec,
        spool_bytes: int = 1 << 24,
        twin: bool = True,
    ) -> None:
        self.vehicle_id = vehicle_id
        self._clock = clock
        self._network = network
        self._watcher = watcher
        self.pace = pace
        self.policy = msgspec.structs.replace(policy, permit_ms=pace.permit_ms)
        self.car = SimulatedCar(car, clock.now_ms, drawn_w=self._drawn_w)
        self.twin = SimulatedCar(car, clock.now_ms) if twin else None
        self.engine = SimEngine(clock, engine, self, self._on_engine)
        self.consent = CONSENT
        self.spool = MemorySpool(spool_bytes)
        self.skew_ms = 0
        self._lives = 0
        self._generation = self._started = 0  # of the engine: events of one that was killed are dropped
        self.machine: VehicleMachine | None = None
        self.tamper: Callable[[str, bytes], bytes] | None = None
        self.hung = self.asleep = False
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._perform: dict[type, Callable[[Any], None]] = {
            StartEngine: self._start_engine,
            LimitEngine: lambda _: None,
            FreezeEngine: lambda _: self.engine.freeze(),
            ThawEngine: lambda _: self.engine.thaw(),
            KillEngine: self._kill_engine,
            SubmitAttempts: lambda command: self.engine.submit(command.attempts),
            CancelAttempts: lambda command: self.engine.cancel(command.keys),
            PublishWork: self._publish_work,
            PublishState: self._publish_state,
            PublishLive: lambda _: None,
            WakeAt: self._wake,
        }
        self._reset()

    def _reset(self) -> None:
        self._messages: dict[str, _Waiting] = {}
        self._old: set[str] = set()
        self._catching_up = False
        self._wake_at_ms = self._look_planned_ms = -1
        self._spool_full = False
        self._heard_ms = 0
        self._last_ms = 0
        self.permit_until_ms = 0  # in true time
        self._inbox.clear()

    # -- the agent's life ----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether there is an agent that does something."""
        return self.machine is not None and not self.hung and not self.asleep

    @property
    def incarnation(self) -> str:
        """The name of the agent's current life."""
        return f"{self.vehicle_id}-{self._lives}"

    def own_ms(self) -> int:
        """The vehicle's clock, which is never set back while an agent runs."""
        self._last_ms = max(self._last_ms, self._clock.now_ms + self.skew_ms)
        return self._last_ms

    def start(self) -> None:
        """The agent starts; what an earlier one left in the spool is delivered first."""
        self._lives += 1
        self._reset()
        self.hung = self.asleep = False
        self.machine = VehicleMachine(self.pace.config, self.incarnation)
        self.judge = Judge(self.car, lambda _: self.consent, self.policy, offset_min=lambda _: 0)
        self._watcher.started(self)
        for message_id in self.spool.waiting():
            data = self.spool.read(message_id)
            if data is not None:
                self._old.add(message_id)
                waiting = self._messages[message_id] = _Waiting(message_id, data, is_old=True)
                self._send(self._lives, waiting)
        self._handle(LinkChanged(up=False))
        self.look()
        self._network.connect(self.vehicle_id)

    def crash(self) -> None:
        """The agent's process dies, and the kernel ends its engine with it."""
        self.engine.kill()
        self.machine = None
        self._reset()
        self._network.leave(self.vehicle_id)

    def hang(self, for_ms: int) -> None:
        """The agent does nothing for a while; its engine is not told that it may go on, and ends itself."""
        if self.machine is None or self.hung:
            return
        self.hung = True
        self._clock.at(self._heard_ms + self.pace.lifeline_ms, self._unheard, self._lives, self._heard_ms)
        self._clock.after(for_ms, self._go_on, self._lives)

    def _unheard(self, lives: int, heard_ms: int) -> None:
        if lives == self._lives and self.hung and self._heard_ms == heard_ms:
            self.engine.go_unheard()

    def _go_on(self, lives: int) -> None:
        if lives != self._lives or not self.hung:
            return
        self.hung = False
        self.look()
        while self._inbox and self.alive:
            act, args = self._inbox.popleft()
            act(*args)
        self._on_wake(self._lives, self._wake_at_ms)

    def sleep(self) -> None:
        """The car's computer goes to sleep: nothing runs and nothing is told until ``wake_up``."""
        self.asleep = True
        self._network.leave(self.vehicle_id)

    def wake_up(self) -> None:
        """The computer is on again."""
        if self.asleep:
            self.asleep = False
            self._handle(LinkChanged(up=False))
            self.look()
            self._network.connect(self.vehicle_id)

    def _later(self, act: Callable[..., None], *args: Any) -> bool:
        """Whether this has to wait, or is lost, because no agent takes it now."""
        if self.machine is None or self.asleep:
            return True
        if self.hung:
            self._inbox.append((act, args))
        return self.hung

    # -- the owner -----------------------------------------------------------------------------------------------------

    def act(self, action: Action) -> bool:
        """The owner does something at the car; False where it was not possible."""
        now_ms = self.own_ms()
        if self.pace.reliable:
            self.car.advance(now_ms, self.pace.step_ms / 1000)  # or it would go there in steps of seconds
        try:
            self.car.do(action, now_ms)
        except ConflictError:
            return False
        if self.twin is not None:
            self.twin.do(action, now_ms)
        self.look()
        return True

    def look(self) -> None:
        """The guard judges now."""
        if self._later(self._look_once):
            return
        self._look_once()

    def plan_look(self, after_ms: int) -> None:
        """The guard judges again then, unless something happens before."""
        at_ms = self._look_planned_ms = self._clock.now_ms + after_ms
        self._clock.at(at_ms, self._on_look, self._lives, at_ms)

    def _on_look(self, lives: int, at_ms: int) -> None:
        if lives == self._lives and at_ms == self._look_planned_ms and self.alive:
            self._look_once()

    def _look_once(self) -> None:
        machine = self.machine
        assert machine is not None
        now_ms = self.own_ms()
        self.car.advance(now_ms, self.pace.step_ms / 1000)
        if self.twin is not None:
            self.twin.advance(now_ms, self.pace.step_ms / 1000)
        self.engine.worked_ms()  # up to here under the permit before
        if self.engine.spec.terse:
            self.engine.tell()
        verdict = self.judge.look(now_ms, machine.state, lambda: 0)
        permit = verdict.permit
        self.permit_until_ms = 0 if permit is None else self._clock.now_ms + permit.until_ms - now_ms
        if permit is not None:
            self._heard_ms = self._clock.now_ms
        self._watcher.judged(self, verdict, now_ms)
        self._handle(verdict)
        if machine.state is VehicleState.WORKING:
            self._handle(EngineWorked(busy_ms=self.engine.worked_ms()))
        self.plan_look(self.pace.look_ms if permit is not None else self._look_after_no(verdict.reasons))

    def _look_after_no(self, reasons: Sequence[Reason]) -> int:
        """How soon a "no" may become a "yes" without any act of the owner."""
        pace = self.pace
        if len(reasons) == 1 and reasons[0].code is ReasonCode.DWELL:
            return min(self.policy.dwell_ms + 10, pace.denied_ms)
        away = pace.reliable and not self.car.plugged
        return pace.look_ms if away else pace.denied_ms

    def _drawn_w(self) -> float:
        return float(WATTS_W) if self.engine.on and not self.engine.frozen else 0.0

    # -- what arrives --------------------------------------------------------------------------------------------------

    def on_down(self, data: bytes) -> None:
        """A message of the cell."""
        if self._later(self.on_down, data):
            return
        try:
            message = wire.decode(wire.DOWN, data)
        except MotorpoolError:
            return
        if isinstance(message, wire.Statement | wire.OwnerDocument | wire.OwnerAsked):
            self._on_owner(message)
            return
        if isinstance(message, wire.Grant):
            if not self.judge.may_send:
                return
            self._watcher.arrived(self, message)
        elif self.engine.spec.terse:
            self.engine.tell()
        self._handle(Arrived(message=message))

    def _on_owner(self, message: wire.Statement | wire.OwnerDocument | wire.OwnerAsked) -> None:
        """The owner's desk: pauses by the cell, and documents that are what they say in a world without forgers."""
        view, now_ms = self.consent, self.own_ms()
        if isinstance(message, wire.OwnerAsked) and message.until_ms > max(now_ms, view.paused_until_ms):
            view = msgspec.structs.replace(view, paused_until_ms=message.until_ms)
        elif isinstance(message, wire.OwnerDocument):
            what, _, dated = message.document.partition(b" ")
            dated_ms = int(dated)
            if what == b"withdraw" and dated_ms > view.granted_ms:
                view = msgspec.structs.replace(view, refusal=ReasonCode.CONSENT_WITHDRAWN, granted_ms=dated_ms)
            elif what == b"grant" and dated_ms > view.granted_ms:
                view = msgspec.structs.replace(view, refusal=None, granted_ms=dated_ms, paused_until_ms=0)
        if view is not self.consent:
            self.consent = view
            self._look_once()

    def on_link(self, up: bool) -> None:
        """The link went down, or is back."""
        if self._later(self.on_link, up):
            return
        if up and self._old and not self._catching_up:
            self._catching_up = True
            self._clock.after(int(CATCH_UP_S * 1000), self._caught_up, self._lives)
        elif not (up and self._catching_up):
            self._handle(LinkChanged(up=up))
        if up and self.pace.reliable:  # elsewhere each message is tried again and again anyway
            for waiting in list(self._messages.values()):
                self._send(self._lives, waiting)

    def _caught_up(self, lives: int) -> None:
        if lives != self._lives or not self._catching_up or self._later(self._caught_up, lives):
            return
        self._catching_up = False
        if self._network.connected(self.vehicle_id):
            self._handle(LinkChanged(up=True))

    def on_confirmed(self, message_ids: list[str]) -> None:
        """The stream has these messages."""
        if self._later(self.on_confirmed, message_ids):
            return
        new: list[str] = []
        for message_id in message_ids:
            waiting = self._messages.pop(message_id, None)
            if waiting is None:
                continue
            if waiting.is_kept:
                self.spool.remove(message_id)
            if not waiting.is_old:
                new.append(message_id)
            self._old.discard(message_id)
        if new:
            self._handle(WorkPublished(message_ids=new))
        if self._spool_full and all(each.is_kept for each in self._messages.values()):
            self._tell_full(False)
        if self._catching_up and not self._old:
            self._clock.after(int(SETTLE_S * 1000), self._caught_up, self._lives)

    def _on_engine(self, events: list[EngineEvent]) -> None:
        if not self._later(self._take_engine, self._started, events):
            self._take_engine(self._started, events)

    def _take_engine(self, generation: int, events: list[EngineEvent]) -> None:
        if generation != self._generation:
            return  # it was killed meanwhile
        progressed: list[Progressed] = []
        finished: list[Finished] = []
        cancelled: list[str] = []
        for event in events:
            if isinstance(event, Finished):
                finished.append(event)
            elif isinstance(event, Progressed):
                progressed.append(event)
            elif isinstance(event, Cancelled):
                cancelled.append(event.key)
            elif isinstance(event, Ready):
                self._handle(EngineReady(model=event.model, slots=event.slots, fingerprint=event.fingerprint))
            elif isinstance(event, Died):
                self._generation += 1
                self._handle(EngineDied(exit_code=event.exit_code, unheard=event.exit_code == EXIT_SILENCE))
        if progressed or finished or cancelled:
            busy_ms = self.engine.worked_ms()
            self._handle(EngineWorked(progressed=progressed, finished=finished, cancelled=cancelled, busy_ms=busy_ms))

    def computed(self, from_ms: int, to_ms: int) -> None:
        """The engine's own word of what it did."""
        self._watcher.computed(self, from_ms, to_ms)

    # -- the machine ---------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        """Hand an event in and perform what comes back."""
        machine, now_ms = self.machine, self.own_ms()
        assert machine is not None
        if machine.will_freeze(event, now_ms):
            self.engine.freeze()
        commands = machine.handle(event, now_ms)
        self._watcher.handled(self, event, commands)
        perform = self._perform
        for command in commands:
            perform[type(command)](command)

    def _start_engine(self, command: StartEngine) -> None:
        self._generation += 1
        self._started = self._generation
        self.engine.start(command.model)

    def _kill_engine(self, _: KillEngine) -> None:
        self._generation += 1
        self.engine.kill()

    def _wake(self, command: WakeAt) -> None:
        self._wake_at_ms = command.at_ms
        self._clock.at(command.at_ms - self.skew_ms, self._on_wake, self._lives, command.at_ms)

    def _on_wake(self, lives: int, at_ms: int) -> None:
        if lives != self._lives or at_ms != self._wake_at_ms or not self.alive:
            return
        now_ms = self.own_ms()
        if now_ms >= at_ms:
            if self.engine.spec.terse:
                self.engine.tell()  # or a lease that ends now would take finished lines with it
            self._handle(Ticked())
        else:
            self._clock.after(at_ms - now_ms, self._on_wake, lives, at_ms)

    # -- what goes out -------------------------------------------------------------------------------------------------

    def _publish_state(self, command: PublishState) -> None:
        message = command.message
        if isinstance(message, wire.Progress) and not self.judge.may_send:
            return
        if self._network.connected(self.vehicle_id) and not self._catching_up:
            data = wire.encode(message)
            self._network.up(self.vehicle_id, data if self.tamper is None else self.tamper("state", data))

    def _publish_work(self, command: PublishWork) -> None:
        data = wire.encode(command.message)
        if self.tamper is not None:
            data = self.tamper("work", data)
        waiting = _Waiting(command.message.message_id, data, is_old=False)
        self._messages[waiting.message_id] = waiting
        self._send(self._lives, waiting)
        if not self.pace.reliable:
            self._clock.after(int(SPOOL_AFTER_S * 1000), self._keep, self._lives, waiting)

    def _send(self, lives: int, waiting: _Waiting) -> None:
        """Towards the stream, again and again until it is confirmed."""
        if lives != self._lives or waiting.message_id not in self._messages or self.machine is None:
            return
        if not self.hung and not self.asleep and self.judge.may_send and self._network.connected(self.vehicle_id):
            self._network.publish(self.vehicle_id, waiting.message_id, waiting.data)
        if not self.pace.reliable:
            self._clock.after(waiting.wait_ms, self._send, lives, waiting)
            waiting.wait_ms = min(waiting.wait_ms * 2, int(RETRY_MAX_S * 1000))

    def _keep(self, lives: int, waiting: _Waiting) -> None:
        """Put what could not be delivered for a while into the spool."""
        if lives != self._lives or waiting.message_id not in self._messages or self.machine is None:
            return
        if self.hung:
            self._clock.after(int(RETRY_MAX_S * 1000), self._keep, lives, waiting)
            return
        waiting.is_kept = self.spool.put(waiting.message_id, waiting.data)
        if not waiting.is_kept:
            self._clock.after(int(RETRY_MAX_S * 1000), self._keep, lives, waiting)
        self._tell_full(not waiting.is_kept)

    def _tell_full(self, full: bool) -> None:
        if full != self._spool_full:
            self._spool_full = full
            self._handle(SpoolFilled(full=full))
