"""A simulated engine: attempts go on in its slots at a measured speed, and are told of in batches.

Decides: how long loading and each attempt take, and what an engine does when it is frozen, killed, struck or not told
that it may go on. Must not: know of permits, leases or the cell.
Called by: ``sim.full.vehicle``.

Between two looks everything is reckoned exactly, so a report may be as rare as the world wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace
from typing import Final, Protocol

import msgspec

from motorpool.agent.runtime.engine import EXIT_SILENCE, Cancelled, Died, EngineEvent, Finished, Progressed, Ready
from motorpool.core.vehicle_events import Attempt
from motorpool.errors import CallerError
from motorpool.sim.full.clock import Clock
from motorpool.sim.full.work import Fate, Line, answer_body, answer_text, read_line
from motorpool.types import Usage
from motorpool.wire import Delta, decode_checkpoint

POISON_MS: Final = 200  # an engine lives so long with a line that kills it
BAD_BODY: Final = b'{"error":{"message":"the request is not one that this model can answer"}}'


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine can do. ``tokens_s`` is for each of its ``slots``; prompts are read ten times as fast.

    ``terse``: answers are not written out and nothing is told of an attempt before its end.
    """

    slots: int = 4
    tokens_s: float = 40.0
    load_ms: int = 1_500
    report_ms: int = 400
    terse: bool = False


class Watch(Protocol):
    """Who is told of every stretch of computing."""

    def computed(self, from_ms: int, to_ms: int) -> None:
        """The engine used the processor, without a break, in true time."""


class _Run:
    """One attempt. ``text`` is what it came with; ``done`` counts the tokens of the whole answer."""

    __slots__ = ("carried", "done", "key", "left_ms", "line", "ran_ms", "text", "told", "whole_ms")

    def __init__(self, key: str, line: Line, carried: int, text: str, whole_ms: int) -> None:
        self.key = key
        self.line = line
        self.carried = carried
        self.text = text
        self.done = self.told = carried
        self.whole_ms = self.left_ms = whole_ms
        self.ran_ms = 0


class SimEngine:
    """At most one process at a time; ``on_events`` hears what the process says while it lives."""

    def __init__(self, clock: Clock, spec: EngineSpec, watch: Watch, on_events: Callable[[list[EngineEvent]], None]):
        self._clock = clock
        self.spec = spec
        self._watch = watch
        self._on_events = on_events
        self._runs: list[_Run] = []
        self._cancelled: list[str] = []
        self._at_ms = 0
        self._life = 0  # of the process: what an earlier one had planned is void
        self._reporting = False
        self._report_no = 0  # of the planned report: an earlier one is void
        self._ready_at_ms: int | None = None
        self._ready_at_freeze_ms = 0
        self.on = self.loaded = self.frozen = self.hung = False
        self.model = ""
        self.busy_ms = 0
        self.worked_slot_ms = 0  # over all slots and lives
        self.speed = 1.0  # 0.2 is an engine that is five times as slow as usual

    # -- what the agent asks for ---------------------------------------------------------------------------------------

    def start(self, model: str) -> None:
        """Begin to load."""
        self.kill()
        self.on, self.model, self.busy_ms = True, model, 0
        self._at_ms = self._clock.now_ms
        self._plan_ready(self.spec.load_ms)

    def _plan_ready(self, after_ms: int) -> None:
        self._ready_at_ms = self._clock.now_ms + after_ms
        self._clock.after(after_ms, self._ready, self._life, self._ready_at_ms)

    def submit(self, attempts: Sequence[Attempt]) -> None:
        """Queue attempts."""
        self._advance()
        for attempt in attempts:
            line = read_line(attempt.body)
            carried, text = self._continued(attempt)
            tokens = max(0, line.tokens - carried)
            self._runs.append(_Run(attempt.key, line, carried, text, self.time_ms(line.prompt, tokens)))
        if self.spec.terse and not self._cancelled:
            self._reporting = False  # something waits again, so that there is time
        self._plan_report()

    def time_ms(self, prompt: int, tokens: int) -> int:
        """How long a slot takes for so many tokens read and generated."""
        return max(1, round((tokens + prompt / 10) / self.spec.tokens_s / self.speed * 1000))

    def _continued(self, attempt: Attempt) -> tuple[int, str]:
        """What an attempt came with; a checkpoint that cannot be read is of no use."""
        if attempt.checkpoint is None:
            return 0, ""
        try:
            checkpoint = decode_checkpoint(attempt.checkpoint)
        except CallerError:
            return 0, ""
        return checkpoint.tokens, checkpoint.text

    def cancel(self, keys: Sequence[str]) -> None:
        """Stop attempts; each answers that it was cancelled."""
        self._advance()
        wanted = set(keys)
        self._cancelled += [run.key for run in self._runs if run.key in wanted]
        self._runs = [run for run in self._runs if run.key not in wanted]
        if self._cancelled:
            self._plan_report()

    def freeze(self) -> None:
        """No more processor time."""
        if self.frozen or not self.on:
            return
        self._advance()
        self.frozen = True
        if self._ready_at_ms is not None:
            self._ready_at_freeze_ms = max(1, self._ready_at_ms - self._clock.now_ms)

    def thaw(self) -> None:
        """Go on."""
        if not self.frozen:
            return
        self._at_ms = self._clock.now_ms
        self.frozen = False
        if self._ready_at_ms is not None:
            self._plan_ready(self._ready_at_freeze_ms)
        self._plan_report()

    def kill(self) -> None:
        """End the process; nothing more is heard of it."""
        if self.on:
            self._advance()
        self._life += 1
        self._runs.clear()
        self._cancelled.clear()
        self._ready_at_ms = None
        self.on = self.loaded = self.frozen = self.hung = self._reporting = False

    def worked_ms(self) -> int:
        """The engine's working time since its start."""
        self._advance()
        return self.busy_ms

    @property
    def attempts(self) -> int:
        """How many it holds."""
        return len(self._runs)

    def unfinished_ms(self) -> int:
        """What was worked on attempts that are not at their end yet, over all slots."""
        return sum(run.ran_ms for run in self._runs)

    # -- what befalls it -----------------------------------------------------------------------------------------------

    def die(self, exit_code: int) -> None:
        """The process ends by itself."""
        if self.on:
            self.kill()
            self._on_events([Died(exit_code=exit_code, message="the simulated engine ended")])

    def go_unheard(self) -> None:
        """The agent has not said for too long that it may go on: it ends itself. A frozen one cannot."""
        if not self.frozen:
            self.die(EXIT_SILENCE)

    def hang(self) -> None:
        """The process computes nothing useful any more, and says nothing, until it is killed."""
        self._advance()
        self.hung = True

    # -- time ----------------------------------------------------------------------------------------------------------

    def _ready(self, life: int, at_ms: int) -> None:
        if life != self._life or at_ms != self._ready_at_ms or self.frozen or self.hung:
            return
        self._advance()
        self._ready_at_ms, self.loaded = None, True
        fingerprint = f"sim/{self.model}"
        self._on_events([Ready(model=self.model, slots=self.spec.slots, context_tokens=4_096, fingerprint=fingerprint)])

    def _plan_report(self) -> None:
        if not self._reporting and self.on and not self.frozen and not self.hung:
            self._reporting = True
            self._report_no += 1
            self._clock.after(self._report_after_ms(), self._report, self._life, self._report_no)

    def _report_after_ms(self) -> int:
        """In batches; where these are long, as soon as a slot is free for which nothing waits."""
        runs, spec = self._runs, self.spec
        if not spec.terse or not runs:
            return spec.report_ms
        ends = [run.left_ms for run in runs[: spec.slots]]
        heapify(ends)
        for run in runs[spec.slots :]:
            if ends[0] >= spec.report_ms:
                return spec.report_ms
            heapreplace(ends, ends[0] + run.left_ms)
        return max(1, min(spec.report_ms, ends[0]))

    def tell(self) -> None:
        """Tell of what has finished, however long the batches are: a real engine has told it long ago."""
        self._advance()
        if self._reporting and any(run.left_ms <= 0 for run in self._runs):
            self._report(self._life, self._report_no)

    def _report(self, life: int, number: int) -> None:
        if life != self._life or number != self._report_no or not self._reporting:
            return
        self._reporting = False
        if self.frozen or self.hung:
            return
        self._advance()
        poison = next((run for run in self._runs[: self.spec.slots] if run.line.fate == Fate.POISON), None)
        if poison is not None and poison.ran_ms >= POISON_MS:
            self.die(139)
            return
        events: list[EngineEvent] = [Cancelled(key=key) for key in self._cancelled]
        self._cancelled.clear()
        left = []
        for run in self._runs:
            if run.left_ms <= 0:
                events.append(self._finished(run))
            else:
                if not self.spec.terse:
                    self._grow(run, events)
                left.append(run)
        self._runs = left
        if self._runs:
            self._plan_report()
        if events:
            self._on_events(events)

    def _grow(self, run: _Run, events: list[EngineEvent]) -> None:
        """Tell of the tokens that are new."""
        whole = max(0, run.line.tokens - run.carried)
        run.done = run.carried + whole * (run.whole_ms - run.left_ms) // run.whole_ms
        if run.done > run.told and run.line.fate == Fate.FINE:
            text = answer_text(run.line.job, run.line.line, run.line.tokens)[run.told : run.done]
            delta = Delta(index=0, text=text, token_ids=[ord(letter) for letter in text])
            events.append(Progressed(key=run.key, deltas=[delta]))
            run.told = run.done

    def _finished(self, run: _Run) -> Finished:
        line = run.line
        if line.fate == Fate.BAD:
            return Finished(key=run.key, status=400, body=BAD_BODY, usage=Usage(prompt_tokens=line.prompt))
        tokens = max(line.tokens, run.carried)
        usage = Usage(prompt_tokens=line.prompt, completion_tokens=tokens, carried_tokens=run.carried)
        if self.spec.terse:
            return Finished(key=run.key, status=200, body=b"{}", usage=usage)
        text = run.text + answer_text(line.job, line.line, line.tokens)[run.carried :]
        return Finished(key=run.key, status=200, body=answer_body(line, text), usage=usage)

    def _advance(self) -> None:
        """Let the time since the last look pass in the slots."""
        now_ms, since_ms = self._clock.now_ms, self._at_ms
        self._at_ms = now_ms
        if now_ms <= since_ms or not self.on or self.frozen:
            return
        busy = self._ready_at_ms is not None or self.hung or bool(self._runs)
        if not busy:
            return
        self.busy_ms += now_ms - since_ms
        self._watch.computed(since_ms, now_ms)
        if not self.loaded or self.hung:
            return
        left_ms, first = now_ms - since_ms, 0
        runs, slots = self._runs, self.spec.slots
        active: list[_Run] = []
        while left_ms > 0:
            while len(active) < slots and first < len(runs):
                if runs[first].left_ms > 0:
                    active.append(runs[first])
                first += 1
            if not active:
                return
            slots_used = len(active)
            step_ms = min(left_ms, *(run.left_ms for run in active))
            for run in active:
                run.left_ms -= step_ms
                run.ran_ms += step_ms
            active = [run for run in active if run.left_ms > 0]
            left_ms -= step_ms
            self.worked_slot_ms += step_ms * slots_used
