"""The null engine: deterministic words at a set rate, for tests, benchmarks and simulated fleets.

Decides: when each token leaves. Must not: decide what it says (``null_answer`` does).
Called by: ``host`` in a child process, and as ``InlineNullEngine`` by whoever wants thousands of engines in a process.

Time is engine time: it advances with the clock but never by more than ``MAX_STEP_S`` at once and not while frozen, so
that a process which was stopped does not find its work done when it goes on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from motorpool.agent.runtime import answer, null_answer
from motorpool.agent.runtime.answer import HOLD_S
from motorpool.agent.runtime.backend import Emit
from motorpool.agent.runtime.engine import Cancelled, EngineEvent, Finished, OnEvents, Progressed, Ready, Work
from motorpool.agent.runtime.meter import BusyMeter
from motorpool.agent.runtime.null_answer import Plan, Quick
from motorpool.agent.runtime.spec import EngineSpec
from motorpool.core.energy import Limits
from motorpool.errors import EngineError, MotorpoolError
from motorpool.types import Kind
from motorpool.wire import Delta

MAX_STEP_S: Final = 0.25
GATHER_S: Final = 0.02  # deltas that nobody streams are gathered for this long
CHUNK: Final = 256  # requests that are answered before the loop may look at something else


class NullBackend:
    """Runs attempts in the calling event loop."""

    def __init__(self, spec: EngineSpec, emit: Emit) -> None:
        self._spec = spec
        self._emit = emit
        self._slots = spec.slots
        self._quick = Quick(spec)
        self._queue: deque[Work] = deque()
        self._running: dict[str, _Run] = {}
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._clock_s = 0.0
        self._seen_s = 0.0
        self._frozen = False

    async def load(self) -> Ready:
        """There is nothing to load."""
        return Ready(
            model=self._spec.model,
            slots=self._spec.slots,
            context_tokens=self._spec.context_tokens,
            fingerprint=null_answer.name_of(self._spec),
        )

    def submit(self, work: list[Work]) -> None:
        """Queue attempts; one that goes on from a held place comes first, as that place is its own."""
        held = {run.plan.work.response_id for run in self._running.values() if run.plan.holds}
        if held:
            self._queue.extendleft([one for one in reversed(work) if one.response_id in held])
            work = [one for one in work if one.response_id not in held]
        self._queue.extend(work)
        self._wake(0)

    def cancel(self, keys: list[str]) -> None:
        """Drop attempts, running or queued."""
        wanted = set(keys)
        gone = [key for key in self._running if key in wanted]
        for key in gone:
            del self._running[key]
        queued = [work.key for work in self._queue if work.key in wanted]
        if queued:
            self._queue = deque(work for work in self._queue if work.key not in wanted)
        self._emit([Cancelled(key=key) for key in gone + queued])
        self._wake(0)

    def limit(self, slots: int) -> None:
        """Have fewer attempts at a time, or more again."""
        self._slots = max(1, min(slots, self._spec.slots))
        self._wake(0)

    def freeze(self) -> None:
        """Stop engine time. For the engine in this process; a hosted one is stopped with its process."""
        self._tick()
        self._frozen = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def thaw(self) -> None:
        """Let engine time go on."""
        self._frozen = False
        self._seen_s = asyncio.get_running_loop().time()
        self._wake(0)

    def close(self) -> None:
        """Drop everything without a word."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._queue.clear()
        self._running.clear()
        self._frozen = True

    def _wake(self, delay_s: float) -> None:
        """Look at the work in ``delay_s``; an earlier appointment stays, a later one is moved."""
        if self._frozen or not self._has_work:
            return
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if not isinstance(self._timer, asyncio.TimerHandle) or self._timer.when() <= loop.time() + delay_s:
                return
            self._timer.cancel()
        self._timer = loop.call_later(delay_s, self._pump) if delay_s > 0 else loop.call_soon(self._pump)

    @property
    def _has_work(self) -> bool:
        """Whether time brings anything: an attempt that holds its place waits for others."""
        waiting = len(self._running) < self._slots and bool(self._queue)
        return waiting or any(not run.plan.holds for run in self._running.values())

    def _tick(self) -> None:
        now_s = asyncio.get_running_loop().time()
        self._clock_s += min(max(0.0, now_s - self._seen_s), MAX_STEP_S)
        self._seen_s = now_s

    def _pump(self) -> None:
        self._timer = None
        if self._spec.rate_tokens_per_s <= 0:
            self._emit(self._rush())
            self._wake(0)
            return
        self._tick()
        events: list[EngineEvent] = []
        self._advance(events)
        self._fill(events)
        if events:
            self._emit(events)
        if self._running:
            self._wake(self._next_s())  # nothing, if all of them hold

    def _rush(self) -> list[EngineEvent]:
        """Answer up to CHUNK attempts at once."""
        events: list[EngineEvent] = []
        for _ in range(min(CHUNK, len(self._queue))):
            if len(self._running) >= self._slots:
                break
            work = self._queue.popleft()
            quick_or_run = self._begin(work, 0.0, quick=True)
            if isinstance(quick_or_run, Finished):
                events.append(quick_or_run)
                continue
            run = quick_or_run
            if run.plan.holds:
                self._hold(run, events)
                continue
            if work.stream:
                events.extend(run.progress(run.left) or run.closing())
            events.append(null_answer.finish(self._spec, run.plan))
        return events

    def _begin(self, work: Work, started_s: float, *, quick: bool = False) -> _Run | Finished:
        """An attempt that can run, or its end: the quick answer, or what is wrong with it."""
        try:
            if work.kind is Kind.EMBEDDING:
                return null_answer.embed(self._spec, work)
            done = self._quick.finish(work) if quick else None
            return done or _Run(null_answer.plan(self._spec, work), started_s)
        except MotorpoolError as error:
            return answer.failed(work.key, error)
        except Exception as error:  # noqa: BLE001  # whatever a body makes of us, its attempt ends and no other does
            trouble = MotorpoolError(f"the null engine failed: {type(error).__name__}", code="engine_error")
            return answer.failed(work.key, trouble)

    def _fill(self, events: list[EngineEvent]) -> None:
        """Start queued attempts in free slots."""
        while self._queue and len(self._running) < self._slots:
            work = self._queue.popleft()
            run = self._begin(work, self._clock_s)
            if isinstance(run, Finished):
                events.append(run)
                continue
            if run.plan.holds:
                self._hold(run, events)
                continue
            if run.left == 0:
                events.extend(run.closing())
                events.append(null_answer.finish(self._spec, run.plan))
                continue
            self._running[work.key] = run

    def _hold(self, run: _Run, events: list[EngineEvent]) -> None:
        """Say that the prompt is read, and keep the slot until somebody cancels it."""
        key = run.plan.work.key
        self._running[key] = run
        asyncio.get_running_loop().call_later(HOLD_S, self._let_go, key)
        events.append(Progressed(key=key, deltas=[]))

    def _let_go(self, key: str) -> None:
        """Nobody has come for a held place; keys are never used twice, so it is still the same one."""
        if key in self._running:
            self.cancel([key])

    def _advance(self, events: list[EngineEvent]) -> None:
        """Give out the tokens that are due."""
        rate = self._spec.rate_tokens_per_s
        for key, run in list(self._running.items()):
            if run.plan.holds:
                continue
            due = min(int((self._clock_s - run.started_s) * rate + 1e-6), run.left) - run.given
            if due > 0:
                events.extend(run.progress(due))
            if run.given >= run.left:
                del self._running[key]
                events.append(null_answer.finish(self._spec, run.plan))

    def _next_s(self) -> float:
        """Seconds of engine time until something is due."""
        rate = self._spec.rate_tokens_per_s
        waits = []
        for run in self._running.values():
            if run.plan.holds:
                continue
            token = run.started_s + (run.given + 1) / rate
            end = run.started_s + run.left / rate
            soonest = token if run.plan.work.stream else min(end, max(token, self._clock_s + GATHER_S))
            waits.append(soonest)
        return max(0.0005, min(min(waits, default=self._clock_s + MAX_STEP_S) - self._clock_s, MAX_STEP_S))


class _Run:
    """One attempt under way. ``left`` tokens are to be given out here, ``given`` of them were.

    Choices are given out one after the other, each from where an earlier vehicle left it.
    """

    def __init__(self, plan: Plan, started_s: float) -> None:
        self.plan = plan
        self.started_s = started_s
        self.left = plan.total - plan.carried
        self.given = 0

    def progress(self, count: int) -> list[EngineEvent]:
        """The next ``count`` tokens."""
        deltas: list[Delta] = []
        plan = self.plan
        first, last = self.given, self.given + count
        at = 0  # of what is to be given out here
        for index, pieces in enumerate(plan.choices):
            rest = len(pieces) - plan.given[index]
            begin, end = max(0, first - at), min(rest, last - at)
            at += rest
            if begin < end:
                part = pieces[plan.given[index] + begin : plan.given[index] + end]
                deltas.append(plan.delta_of(index, part, plan.reasons[index] if end == rest else None))
            elif rest == 0 and first <= at <= last and not plan.ended[index]:
                # Its text is all out, but nobody has said so yet; said twice at a border, it is said once.
                plan.ended[index] = True
                deltas.append(Delta(index=index, text="", finish_reason=plan.reasons[index]))
        self.given += count
        return [Progressed(key=plan.work.key, deltas=deltas)] if deltas else []

    def closing(self) -> list[EngineEvent]:
        """The end of an answer to which nothing is left to add."""
        plan = self.plan
        deltas = [
            Delta(index=index, text="", finish_reason=reason)
            for index, reason in enumerate(plan.reasons)
            if not plan.ended[index]
        ]
        return [Progressed(key=plan.work.key, deltas=deltas)] if deltas else []


class InlineNullEngine:
    """The null engine in the caller's process, behind the protocol of every engine."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._limits: Limits | None = None
        self._backend: NullBackend | None = None
        self._on_events: OnEvents | None = None
        self._meter = BusyMeter(spec.slots)

    async def start(self, on_events: OnEvents) -> None:
        """Be ready at once."""
        if self._backend is not None:
            raise EngineError("the engine is already started")
        backend = NullBackend(self._spec, self._deliver)
        self._backend, self._on_events = backend, on_events
        self._meter = BusyMeter(self._spec.slots)
        self._meter.run()
        if self._limits is not None:
            self.limit(self._limits)
        on_events([await backend.load()])

    def submit(self, work: list[Work]) -> None:
        """Queue attempts."""
        if self._backend is None:
            raise EngineError("the engine is not started")
        self._meter.add(len(work))
        self._backend.submit(work)

    def cancel(self, keys: list[str]) -> None:
        """Drop attempts."""
        if self._backend is not None:
            self._backend.cancel(keys)

    def freeze(self) -> None:
        """Stop at once."""
        if self._backend is not None:
            self._backend.freeze()
            self._meter.stop()

    def thaw(self) -> None:
        """Go on."""
        if self._backend is not None:
            self._backend.thaw()
            self._meter.run()

    def kill(self) -> None:
        """Drop everything."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
            self._on_events = None
            self._meter.clear()

    def limit(self, limits: Limits) -> None:
        """Have fewer slots, or more again. There is no process to hold to the rest, and nothing that computes."""
        self._limits = limits
        if self._backend is not None:
            self._backend.limit(limits.slots)
            self._meter.hold_to(slots=max(1, min(limits.slots, self._spec.slots)), share=1.0)

    def busy_ms(self) -> int:
        """Slot-seconds spent on attempts, divided by the slots."""
        return self._meter.busy_ms()

    def cpu_ms(self) -> int:
        """None of its own: it runs in the caller's process and computes next to nothing."""
        return 0

    async def close(self) -> None:
        """Kill."""
        self.kill()

    def _deliver(self, events: list[EngineEvent]) -> None:
        self._meter.count(events)
        if self._on_events is not None and events:
            self._on_events(events)
