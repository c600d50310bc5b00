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
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from motorpool import wire
from motorpool.agent.delivery import RETRY_MAX_S, RETRY_MIN_S, Delivery
from motorpool.agent.judge import Judge
from motorpool.agent.runtime.build import SwitchableEngine
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
from motorpool.agent.spool import MemorySpool, Spool
from motorpool.bus import BusError
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
    StopAsked,
    SubmitAttempts,
    ThawEngine,
    Ticked,
    WakeAt,
    WorkPublished,
)
from motorpool.errors import MotorpoolError, TooLargeError
from motorpool.types import ReturnReason, VehicleState

log = logging.getLogger(__name__)

GUARD_INTERVAL_MS: Final = 250
MAX_EVENTS_A_TURN: Final = 64
MAX_ATTEMPTS_A_TURN: Final = 1_024
MAX_TURN_MS: Final = 20  # then whoever waits outside, first of all a changed signal, is heard
MAX_WAITING_MESSAGES: Final = 10_000  # of the cell; more are dropped, and the cell sends them again
MAX_WAITING_BYTES: Final = 256 * 1024 * 1024  # of these messages
MAX_SPOOL_BYTES: Final = 256 * 1024 * 1024  # of what waits for a link, in memory, if nobody says where else
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
OnOwner = Callable[[wire.Statement | wire.OwnerDocument | wire.OwnerAsked], None]


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
        judge: Judge,
        clock: Callable[[], int],
        guard_interval_ms: int = GUARD_INTERVAL_MS,
        spool: Spool | None = None,
        limit: Callable[[int], None] = lambda _: None,
        on_owner: OnOwner = lambda _: None,
    ) -> None:
        self._name = name
        self._machine = machine
        self._engine = engine
        self._source = source
        self._judging = judge
        self._clock = clock
        self._guard_interval_ms = guard_interval_ms
        self._inbox: deque[bytes | Event | tuple[int, list[EngineEvent]]] = deque()
        self._messages_waiting = 0
        self._bytes_waiting = 0
        self._judge_at_ms = 0
        self._wake_at_ms = 0
        self._turn_handle: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_ms = 0
        self._generation = 0  # of the engine: events of one that was killed are dropped
        self._frozen = False
        self._engine_task: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self._limit = limit
        self._on_owner = on_owner
        self._delivery = Delivery(
            name=name,
            spool=MemorySpool(MAX_SPOOL_BYTES) if spool is None else spool,
            ready=self._may_deliver,
            send=self._send_work,
            on_published=self._on_published,
            on_full=lambda full: self._put(SpoolFilled(full=full)),
            watch=self._watch,
        )
        self._catching_up: asyncio.Task[None] | None = None
        self._published: list[str] = []
        self._stop_asked = False
        self._finished: asyncio.Future[None] | None = None
        self._told: tuple[object, ...] = ()
        self._perform_one: dict[type, Callable[..., None]] = {
            StartEngine: self._start_engine,
            LimitEngine: lambda command: self._limit(command.watts_w),
            FreezeEngine: lambda _: self._freeze(),
            ThawEngine: self._thaw,
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
        self._delivery.start()
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
        waiting = [linking]
        if self._catching_up is not None:
            self._catching_up.cancel()
            waiting.append(self._catching_up)
        if self._engine_task is not None:
            waiting.append(self._engine_task)
        await asyncio.gather(*waiting, return_exceptions=True)
        await self._delivery.close()
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
        self._delivery.link_changed(up=up)
        if not (up and self._delivery.is_behind):
            self._put(LinkChanged(up=up))
        elif self._catching_up is None:
            self._catching_up = asyncio.get_running_loop().create_task(self._catch_up())
            self._catching_up.add_done_callback(self._watch)

    async def _catch_up(self) -> None:
        """Report only when the cell has what an earlier process finished: else it would have it computed again."""
        await self._delivery.catch_up()
        self._catching_up = None
        if self._link is not None and self._link.connected:
            self._put(LinkChanged(up=True))

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
        verdict = self._judging.look(now_ms, self._machine.state, self._engine.cpu_ms)
        if verdict.permit is not None and isinstance(self._engine, Watched):
            self._engine.beat()
        self._handle(verdict, now_ms)
        if self._machine.state is VehicleState.WORKING:
            self._handle(self._worked(), now_ms)
        self._judging.afterwards(now_ms, self._machine.state)

    def _worked(
        self,
        progressed: Sequence[Progressed] = (),
        finished: Sequence[Finished] = (),
        cancelled: Sequence[str] = (),
    ) -> EngineWorked:
        """What the engine has done since the last time."""
        return EngineWorked(
            progressed=progressed,
            finished=finished,
            cancelled=cancelled,
            busy_ms=self._engine.busy_ms(),
            drawn_mws=self._judging.drawn_mws,
            is_measured=self._judging.is_measured,
        )

    def _take_message(self, data: bytes, now_ms: int) -> None:
        self._judging.passed(len(data), now_ms)
        try:
            message = wire.decode(wire.DOWN, data)
        except MotorpoolError as error:
            log.warning("%s: a message was not understood: %s", self._name, error.code)
            return
        if isinstance(message, wire.Grant | wire.Open):
            if not self._judging.may_send:
                self._turn_down(message)
                return
            self._judging.granted(message)
        elif isinstance(message, wire.Statement | wire.OwnerDocument | wire.OwnerAsked):
            self._on_owner(message)
            return
        self._handle(Arrived(message=message), now_ms)

    def _turn_down(self, message: wire.Grant | wire.Open) -> None:
        """No byte of a job may be sent now, so none is taken. The cell sends a grant again, and an Open elsewhere."""
        log.info("%s: a %s was not taken: nothing may be sent now", self._name, type(message).__name__)
        if isinstance(message, wire.Open):
            broken = wire.Broken(request_id=message.request_id, attempt=message.attempt, reason=ReturnReason.OFFLINE)
            self._publish_live(PublishLive(message=broken))

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
                self._handle(self._worked(), now_ms)  # to load is to work
                self._handle(EngineReady(model=event.model, slots=event.slots, fingerprint=event.fingerprint), now_ms)
            else:
                died = event
        if progressed or finished or cancelled:
            self._handle(self._worked(progressed, finished, cancelled), now_ms)
        if died is not None:
            log.warning("%s: the engine ended (exit code %s): %s", self._name, died.exit_code, died.message)
            self._generation += 1
            unheard = died.exit_code == EXIT_SILENCE
            self._handle(EngineDied(exit_code=died.exit_code, unheard=unheard), now_ms)

    def _handle(self, event: Event, now_ms: int) -> None:
        """Hand an event in and perform what comes back; a freeze does not wait for what goes back with it."""
        if self._machine.will_freeze(event, now_ms):
            self._freeze()
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

    def _freeze(self) -> None:
        self._frozen = True
        self._engine.freeze()

    def _thaw(self, _: Command) -> None:
        self._frozen = False
        self._engine.thaw()

    def _start_engine(self, command: StartEngine) -> None:
        self._generation += 1
        self._frozen = False
        start = self._run_start(command.model, self._generation, self._engine_task)
        self._engine_task = asyncio.get_running_loop().create_task(start)
        self._engine_task.add_done_callback(self._watch)

    async def _run_start(self, model: str, generation: int, before: asyncio.Task[None] | None) -> None:
        """Start the engine, after an earlier start has come to its end."""
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        if generation != self._generation:
            return
        try:
            if isinstance(self._engine, SwitchableEngine):
                self._engine.select(model)
            await self._engine.start(lambda events: self._on_engine(generation, events))
        except MotorpoolError as error:
            self._on_engine(generation, [Died(exit_code=None, message=error.message)])
        if generation != self._generation:
            self._engine.kill()  # it was killed while it was starting
        elif self._frozen:
            self._engine.freeze()  # there was no process yet when it was frozen

    def _on_engine(self, generation: int, events: list[EngineEvent]) -> None:
        if generation == self._generation:
            self._put((generation, events))

    def _kill_engine(self, _: Command | None) -> None:
        self._generation += 1
        self._frozen = False
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
        if isinstance(command.message, wire.Progress) and not self._judging.may_send:
            return  # it carries text of a job
        if self._link is not None and self._link.connected and self._catching_up is None:
            self._tell(self._link.publish_state, command.message)

    def _publish_live(self, command: PublishLive) -> None:
        message = command.message
        if self._link is None or not self._link.connected:
            return
        if not self._judging.may_send:  # a request that goes on elsewhere costs a few bytes; its answer would cost more
            message = wire.Broken(request_id=message.request_id, attempt=message.attempt, reason=ReturnReason.OFFLINE)
        elif isinstance(message, wire.Tokens | wire.Answered):
            self._judging.delivered(message, self._clock())
        self._tell(self._link.publish_live, message)

    def _tell(self, publish: Callable[[bytes], None], message: wire.UpState | wire.UpLive) -> None:
        """These may get lost on the way, so one that no message can hold is lost here instead of ending the agent."""
        try:
            data = wire.encode(message)
        except TooLargeError as error:
            log.warning("%s: a %s was dropped: %s", self._name, type(message).__name__, error.message)
        else:
            publish(data)
            self._judging.passed(len(data), self._clock())

    def _publish_work(self, command: PublishWork) -> None:
        if isinstance(command.message, wire.Results):
            self._judging.delivered(command.message, self._clock())
        self._delivery.add(command.message.message_id, wire.encode(command.message))

    def _may_deliver(self) -> bool:
        return self._link is not None and self._link.connected and self._judging.may_send

    async def _send_work(self, data: bytes, message_id: str) -> None:
        assert self._link is not None, "ready only with a link"
        await self._link.publish_work(data, message_id)
        self._judging.passed(len(data), self._clock())

    def _on_published(self, message_id: str) -> None:
        self._published.append(message_id)
        self._schedule()

    def _wake_at(self, command: WakeAt) -> None:
        self._wake_at_ms = command.at_ms
