"""The shell of one vehicle: brings events to the machine, one at a time, and performs its commands in order.

Decides nothing: no policy lives here. Whatever arrives (messages, engine events, a changed signal, time) is queued, and
one callback of the event loop takes a bounded number of events a turn, the guard's verdict before all others. From a
changed signal to the freeze there is no await, and it comes before the machine has put together what goes back.
Must not: judge, schedule, or touch the machine anywhere but in ``_turn``.
Called by: ``agent.main``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from motorpool import wire
from motorpool.agent.runtime.engine import (
    EXIT_SILENCE,
    Cancelled,
    Died,
    Engine,
    EngineEvent,
    Finished,
    Progressed,
    Ready,
    Watched,
    Work,
)
from motorpool.agent.signals.source import SignalSource
from motorpool.bus import BusError
from motorpool.core.guard import ConsentView, History, Policy, decide
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
    LinkChanged,
    PublishLive,
    PublishState,
    PublishWork,
    StartEngine,
    StopAsked,
    SubmitAttempts,
    ThawEngine,
    Ticked,
    VerdictGiven,
    WakeAt,
    WorkPublished,
)
from motorpool.errors import MotorpoolError, TooLargeError
from motorpool.types import Permit, VehicleState

log = logging.getLogger(__name__)

GUARD_INTERVAL_MS: Final = 250
MAX_EVENTS_A_TURN: Final = 64
MAX_ATTEMPTS_A_TURN: Final = 1_024
MAX_TURN_MS: Final = 20  # then whoever waits outside, first of all a changed signal, is heard
MAX_WAITING_MESSAGES: Final = 10_000  # of the cell; more are dropped, and the cell sends them again
MAX_WAITING_BYTES: Final = 256 * 1024 * 1024  # of these messages
PUBLISHERS: Final = 8  # messages on their way to the durable stream at one time
RETRY_MIN_S: Final = 0.25
RETRY_MAX_S: Final = 2.0
DRAIN_S: Final = 4.0  # less than a supervisor's patience between SIGTERM and SIGKILL


class Link(Protocol):
    """The vehicle's end of the link to its cell."""

    @property
    def connected(self) -> bool:
        """Whether the link is up now."""

    def publish_state(self, data: bytes) -> None:
        """Send; lost when the link is down."""

    def publish_live(self, data: bytes) -> None:
        """Send; lost when the link is down."""

    async def publish_work(self, data: bytes, message_id: str) -> None:
        """Send, and wait until it is durable; raises BusError: then try again."""

    async def close(self) -> None:
        """Leave."""


Connect = Callable[[Callable[[bytes], None], Callable[[bool], None]], Awaitable[Link]]


class Clock:
    """Unix time in milliseconds that never goes back, and goes on while the machine sleeps."""

    def __init__(self) -> None:
        self._base_ms = self._wall_ms() - self._running_ms()

    @staticmethod
    def _wall_ms() -> int:
        return time.time_ns() // 1_000_000

    @staticmethod
    def _running_ms() -> int:
        source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        return time.clock_gettime_ns(source) // 1_000_000

    def __call__(self) -> int:
        """Now. A wall clock that was set forward is followed, one that was set back is not."""
        now_ms = self._base_ms + self._running_ms()
        wall_ms = self._wall_ms()
        if wall_ms > now_ms + 1_000:
            self._base_ms += wall_ms - now_ms
            return wall_ms
        return now_ms


class AgentLoop:
    """One vehicle in one event loop. ``run`` returns after ``stop``, when all is handed back and delivered."""

    def __init__(
        self,
        *,
        name: str,
        machine: VehicleMachine,
        engine: Engine,
        source: SignalSource,
        consent: Callable[[int], ConsentView],
        policy: Policy,
        clock: Callable[[], int],
        guard_interval_ms: int = GUARD_INTERVAL_MS,
    ) -> None:
        self._name = name
        self._machine = machine
        self._engine = engine
        self._source = source
        self._consent = consent
        self._policy = policy
        self._clock = clock
        self._guard_interval_ms = guard_interval_ms
        self._history = History()
        self._inbox: deque[bytes | Event | tuple[int, list[EngineEvent]]] = deque()
        self._messages_waiting = 0
        self._bytes_waiting = 0
        self._judge_at_ms = 0
        self._wake_at_ms = 0
        self._turn_handle: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_ms = 0
        self._generation = 0  # of the engine: events of one that was killed are dropped
        self._engine_task: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self._work: deque[tuple[str, bytes]] = deque()
        self._publishers: set[asyncio.Task[None]] = set()
        self._published: list[str] = []
        self._stop_asked = False
        self._finished: asyncio.Future[None] | None = None
        self._told: tuple[object, ...] = ()
        self._perform_one: dict[type, Callable[..., None]] = {
            StartEngine: self._start_engine,
            FreezeEngine: lambda _: self._engine.freeze(),
            ThawEngine: lambda _: self._engine.thaw(),
            KillEngine: self._kill_engine,
            SubmitAttempts: self._submit,
            CancelAttempts: lambda command: self._engine.cancel(command.keys),
            PublishWork: self._publish_work,
            PublishState: self._publish_state,
            PublishLive: self._publish_live,
            WakeAt: self._wake_at,
        }

    # -- the shell's own life ------------------------------------------------------------------------------------------

    async def run(self, connect: Connect) -> None:
        """Work until ``stop``; raises what went wrong in a turn, after killing the engine."""
        self._finished = asyncio.get_running_loop().create_future()
        self._source.on_change(self.look_now)
        self._put(LinkChanged(up=False))
        self.look_now()
        linking = asyncio.create_task(self._connect(connect))
        linking.add_done_callback(self._watch)
        try:
            await self._finished
        finally:
            linking.cancel()
            await self._leave(linking)

    async def _connect(self, connect: Connect) -> None:
        """Connect, for as long as it takes; the guard does not wait for it."""
        wait_s = RETRY_MIN_S
        while True:
            try:
                self._link = await connect(self._on_down, self._on_link)
            except BusError as error:
                log.warning("%s: %s", self._name, error.message)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RETRY_MAX_S)
            else:
                self._on_link(True)
                return

    async def _leave(self, linking: asyncio.Task[None]) -> None:
        for handle in (self._turn_handle, self._timer):
            if handle is not None:
                handle.cancel()
        for task in self._publishers:
            task.cancel()
        waiting = [linking, *self._publishers]
        if self._engine_task is not None:
            waiting.append(self._engine_task)
        await asyncio.gather(*waiting, return_exceptions=True)
        await self._engine.close()
        if self._link is not None:
            await self._link.close()

    def stop(self) -> None:
        """Hand everything back, deliver it, and end; whatever cannot be delivered in DRAIN_S is left."""
        if not self._stop_asked:
            self._stop_asked = True
            self._put(StopAsked())
            asyncio.get_running_loop().call_later(DRAIN_S, self._finish)

    def _finish(self) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    def _fail(self, error: BaseException) -> None:
        self._engine.kill()
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(error)

    def _watch(self, task: asyncio.Task[None]) -> None:
        """A task of this shell never fails by design; if one does, the agent ends, and its engine with it."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._fail(error)

    def look_now(self) -> None:
        """A signal has changed: let the guard judge in the next turn, before anything else."""
        self._judge_at_ms = 0
        self._schedule()

    # -- what arrives --------------------------------------------------------------------------------------------------

    def _put(self, event: bytes | Event | tuple[int, list[EngineEvent]]) -> None:
        self._inbox.append(event)
        self._schedule()

    def _schedule(self) -> None:
        if self._turn_handle is None:
            self._turn_handle = asyncio.get_running_loop().call_soon(self._turn)

    def _on_down(self, data: bytes) -> None:
        if self._messages_waiting >= MAX_WAITING_MESSAGES or self._bytes_waiting + len(data) > MAX_WAITING_BYTES:
            log.warning("%s: too many messages wait; one was dropped", self._name)
            return
        self._messages_waiting += 1
        self._bytes_waiting += len(data)
        self._put(data)

    def _on_link(self, up: bool) -> None:
        log.info("%s: link %s", self._name, "up" if up else "down")
        self._put(LinkChanged(up=up))

    # -- one turn ------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Take the guard's verdict and a bounded number of events. The only place where the machine is touched."""
        self._turn_handle = None
        if self._finished is None or self._finished.done():
            return
        try:
            self._take_events()
        except Exception as error:  # noqa: BLE001  # whatever it was: no engine outlives a broken agent
            self._fail(error)
            return
        if self._inbox or self._published:
            self._schedule()
        self._set_timer()

    def _take_events(self) -> None:
        now_ms = self._clock()
        if now_ms >= self._judge_at_ms:
            self._judge(now_ms)
        if self._published:
            published, self._published = self._published, []
            self._handle(WorkPublished(message_ids=published), now_ms)
        attempts = 0
        for _ in range(min(MAX_EVENTS_A_TURN, len(self._inbox))):
            entry = self._inbox.popleft()
            if isinstance(entry, bytes):
                self._messages_waiting -= 1
                self._bytes_waiting -= len(entry)
                self._take_message(entry, now_ms)
            elif isinstance(entry, tuple):
                attempts += len(entry[1])
                self._take_engine_events(*entry, now_ms)
            else:
                self._handle(entry, now_ms)
            if attempts >= MAX_ATTEMPTS_A_TURN or self._clock() - now_ms >= MAX_TURN_MS:
                break
        if now_ms >= self._wake_at_ms:
            self._handle(Ticked(), now_ms)
        self._tell_state()
        if self._stop_asked and not self._inbox and self._machine.undelivered == 0:
            # One more round of the event loop, so that the last state is on its way before the link is closed.
            asyncio.get_running_loop().call_soon(self._finish)

    def _judge(self, now_ms: int) -> None:
        self._judge_at_ms = now_ms + self._guard_interval_ms
        consent = self._consent(now_ms)
        signals = self._source.read(now_ms)
        verdict, self._history = decide(self._policy, consent, signals, self._history, now_ms)
        permit = verdict if isinstance(verdict, Permit) else None
        soc, plugged = signals.soc_displayed_pct, signals.cable_connected
        event = VerdictGiven(
            permit=permit,
            reasons=() if isinstance(verdict, Permit) else verdict,
            soc_pct=None if soc is None else round(soc.value, 1),
            plugged=None if plugged is None else plugged.value,
        )
        if permit is not None and isinstance(self._engine, Watched):
            self._engine.beat()
        self._handle(event, now_ms)
        if self._machine.state is VehicleState.WORKING:
            self._handle(EngineWorked(busy_ms=self._engine.busy_ms()), now_ms)

    def _take_message(self, data: bytes, now_ms: int) -> None:
        try:
            message = wire.decode(wire.DOWN, data)
        except MotorpoolError as error:
            log.warning("%s: a message was not understood: %s", self._name, error.code)
            return
        self._handle(Arrived(message=message), now_ms)

    def _take_engine_events(self, generation: int, events: list[EngineEvent], now_ms: int) -> None:
        if generation != self._generation:
            return
        progressed: list[Progressed] = []
        finished: list[Finished] = []
        cancelled: list[str] = []
        died: Died | None = None
        for event in events:
            if isinstance(event, Finished):
                finished.append(event)
            elif isinstance(event, Progressed):
                progressed.append(event)
            elif isinstance(event, Cancelled):
                cancelled.append(event.key)
            elif isinstance(event, Ready):
                log.info("%s: engine ready: %s", self._name, event.fingerprint)
                self._handle(EngineWorked(busy_ms=self._engine.busy_ms()), now_ms)  # to load is to work
                self._handle(EngineReady(model=event.model, slots=event.slots, fingerprint=event.fingerprint), now_ms)
            else:
                died = event
        if progressed or finished or cancelled:
            worked = EngineWorked(
                progressed=progressed,
                finished=finished,
                cancelled=cancelled,
                busy_ms=self._engine.busy_ms(),
            )
            self._handle(worked, now_ms)
        if died is not None:
            log.warning("%s: the engine ended (exit code %s): %s", self._name, died.exit_code, died.message)
            self._generation += 1
            unheard = died.exit_code == EXIT_SILENCE
            self._handle(EngineDied(exit_code=died.exit_code, unheard=unheard), now_ms)

    def _handle(self, event: Event, now_ms: int) -> None:
        """Hand an event in and perform what comes back; a freeze does not wait for what goes back with it."""
        if self._machine.will_freeze(event, now_ms):
            self._engine.freeze()
        for command in self._machine.handle(event, now_ms):
            self._perform_one[type(command)](command)

    def _set_timer(self) -> None:
        """One timer for the guard and for the machine's wish, whichever is first."""
        at_ms = min(self._judge_at_ms, self._wake_at_ms)
        if self._timer is not None:
            if self._timer_at_ms <= at_ms:
                return
            self._timer.cancel()
        delay_s = max(at_ms - self._clock(), 1) / 1000
        self._timer_at_ms = at_ms
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._schedule()

    def _tell_state(self) -> None:
        machine = self._machine
        told = (machine.state, machine.reasons)
        if told != self._told:
            self._told = told
            if machine.state not in {VehicleState.READY, VehicleState.WORKING}:
                codes = ", ".join(reason.code for reason in machine.reasons)
                log.info("%s: %s%s", self._name, machine.state.value, f" ({codes})" if codes else "")

    # -- commands ------------------------------------------------------------------------------------------------------

    def _start_engine(self, _: Command) -> None:
        self._generation += 1
        self._engine_task = asyncio.get_running_loop().create_task(self._run_start(self._generation, self._engine_task))
        self._engine_task.add_done_callback(self._watch)

    async def _run_start(self, generation: int, before: asyncio.Task[None] | None) -> None:
        """Start the engine, after an earlier start has come to its end."""
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        if generation != self._generation:
            return
        try:
            await self._engine.start(lambda events: self._on_engine(generation, events))
        except MotorpoolError as error:
            self._on_engine(generation, [Died(exit_code=None, message=error.message)])
        if generation != self._generation:
            self._engine.kill()  # it was killed while it was starting

    def _on_engine(self, generation: int, events: list[EngineEvent]) -> None:
        if generation == self._generation:
            self._put((generation, events))

    def _kill_engine(self, _: Command | None) -> None:
        self._generation += 1
        self._engine.kill()

    def _submit(self, command: SubmitAttempts) -> None:
        created_s = command.created_s
        work = [
            Work(
                key=attempt.key,
                kind=attempt.kind,
                body=attempt.body,
                response_id=attempt.response_id,
                created_s=created_s,
                stream=attempt.stream,
                checkpoint=attempt.checkpoint,
            )
            for attempt in command.attempts
        ]
        try:
            self._engine.submit(work)
        except MotorpoolError as error:  # it has just ended, or takes no more: either way it is of no use
            self._kill_engine(None)
            self._put((self._generation, [Died(exit_code=None, message=error.message)]))

    def _publish_state(self, command: PublishState) -> None:
        if self._link is not None and self._link.connected:
            self._tell(self._link.publish_state, command.message)

    def _publish_live(self, command: PublishLive) -> None:
        if self._link is not None and self._link.connected:
            self._tell(self._link.publish_live, command.message)

    def _tell(self, publish: Callable[[bytes], None], message: wire.UpState | wire.UpLive) -> None:
        """These may get lost on the way, so one that no message can hold is lost here instead of ending the agent."""
        try:
            publish(wire.encode(message))
        except TooLargeError as error:
            log.warning("%s: a %s was dropped: %s", self._name, type(message).__name__, error.message)

    def _publish_work(self, command: PublishWork) -> None:
        self._work.append((command.message.message_id, wire.encode(command.message)))
        if len(self._publishers) < PUBLISHERS:
            task = asyncio.get_running_loop().create_task(self._publish_waiting())
            self._publishers.add(task)
            task.add_done_callback(self._publishers.discard)
            task.add_done_callback(self._watch)

    async def _publish_waiting(self) -> None:
        """Deliver until nothing waits. A message is tried until the stream has it; its id makes repeats harmless."""
        while self._work:
            message_id, data = self._work.popleft()
            wait_s = RETRY_MIN_S
            while not await self._delivered(data, message_id):
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RETRY_MAX_S)
            self._published.append(message_id)
            self._schedule()

    async def _delivered(self, data: bytes, message_id: str) -> bool:
        if self._link is None or not self._link.connected:
            return False
        try:
            await self._link.publish_work(data, message_id)
        except BusError as error:
            log.info("%s: %s", self._name, error.message)
            return False
        return True

    def _wake_at(self, command: WakeAt) -> None:
        self._wake_at_ms = command.at_ms
