"""The vehicle machine: everything that a vehicle decides about its work, as one pure function of events.

Decides: when the engine is started, frozen and killed; which attempts run; what goes back, with what text; what is told
to the cell and when. Must not: do I/O, read a clock, verify anything, or judge signals (``core.guard`` does).
Called by: ``agent.loop``, which hands in events one by one and performs the returned commands in their order.

Why there is no way around it: ``handle`` is the only mutation path. A permit is a value with an end; without a living
permit no command that gives work to the engine is ever returned, and the first command after a "no" is FreezeEngine.
Putting together what goes back takes a while: ``will_freeze`` tells the shell before, so that the engine stops first.
Every line of a lease ends exactly once, in a Results or in a Returned message, and a lease is held until the last of
its messages is in the durable stream. Any message of the cell may come twice or late and then changes nothing. Without
a link the work goes on, for as long as each lease allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

from motorpool.core.outside import charge_outside_pct, reasons_outside
from motorpool.core.vehicle_engine import EngineRecord
from motorpool.core.vehicle_events import (
    Arrived,
    Attempt,
    CancelAttempts,
    Command,
    EngineDied,
    EngineReady,
    EngineWorked,
    Event,
    FinishedAttempt,
    KillEngine,
    LinkChanged,
    PublishState,
    SpoolFilled,
    StopAsked,
    SubmitAttempts,
    Ticked,
    VehicleConfig,
    VerdictGiven,
    WakeAt,
    WorkPublished,
)
from motorpool.core.vehicle_leases import Growth, Lease, LiveRun, Run, bytes_of, interrupted, join, unstarted
from motorpool.core.vehicle_live import TOO_LARGE, LiveRequests, forget_oldest, response_id
from motorpool.core.vehicle_outbox import Meter, Outbox, Rate, chunks
from motorpool.core.vehicle_states import LEAVING, TRANSITIONS, Trigger
from motorpool.errors import TooLargeError
from motorpool.types import (
    MAX_BODY_BYTES,
    MAX_ITEMS_PER_MESSAGE,
    ModelTier,
    Permit,
    Reason,
    ReasonCode,
    ReturnReason,
    VehicleState,
)
from motorpool.wire import (
    Close,
    Grant,
    Item,
    Open,
    Progress,
    ProgressItem,
    ResultItem,
    ReturnItem,
    Revoke,
    State,
    Sync,
)

_UP: Final = frozenset({VehicleState.READY, VehicleState.WORKING})
_NOT_JUDGED: Final = (Reason(code=ReasonCode.SIGNAL_MISSING, detail="not judged yet"),)
_NO_SMALL_MODEL: Final = (Reason(code=ReasonCode.TOO_HOT, detail="only a small model is allowed, and there is none"),)
_OUTDATED: Final = (Reason(code=ReasonCode.SIGNAL_STALE, detail="the permit ran out without a new decision"),)


class VehicleMachine:
    """One incarnation of one vehicle. ``incarnation`` is random and minted by the shell at start."""

    def __init__(self, config: VehicleConfig, incarnation: str) -> None:
        self._config = config
        self._incarnation = incarnation
        self._now_ms = 0
        self._out: list[Command] = []
        self._wake_at_ms: int | None = None
        # what the guard said
        self._state = VehicleState.DENIED
        self._permit: Permit | None = None
        self._watts_w = 0
        self._reasons: tuple[Reason, ...] = _NOT_JUDGED
        self._soc_pct: float | None = None
        self._plugged: bool | None = None
        self._region = config.region
        self._stay: tuple[int | None, float | None] = (None, None)  # how long the car stays, and the risk that it goes
        self._stopping = False
        # the engine
        self._meter = Meter()
        self._engine = EngineRecord(config, self._meter, self._out)
        self._back_since_ms: int | None = None  # the small model runs, and the full one is allowed again
        # the work
        self._leases: dict[str, Lease] = {}
        self._waiting: dict[int, Lease] = {}  # leases that may have queued items, oldest first
        self._closed: dict[str, None] = {}
        self._lease_count = 0
        self._running: dict[str, Run] = {}
        self._queued = 0
        self._queued_bytes = 0
        self._live = LiveRequests(config, self._meter, self._out)
        self._down_since_ms: int | None = None  # the link
        self._expiry_ms: int | None = None
        self._progress_ms = 0
        # what has to arrive
        self._outbox = Outbox(config, incarnation, self._meter, self._out)
        # what is told
        self._seq = 0
        self._told: tuple[object, ...] | None = None
        self._told_ms = 0
        self._changed = False
        self._stay_changed = False
        # counters
        self._finish_rate = Rate(50, 200)
        self._token_rate = Rate(1_000, 4_000)
        self._tokens = 0

    # -- what the shell and the tests may look at ----------------------------------------------------------------------

    @property
    def state(self) -> VehicleState:
        """The state of the table above."""
        return self._state

    @property
    def watts_now_w(self) -> int:
        """What the engine draws by the model of this machine: the permit's power while it works."""
        return self._watts_w if self._state is VehicleState.WORKING else 0

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why there is no permit."""
        return self._reasons

    @property
    def undelivered(self) -> int:
        """Messages that the durable stream does not have yet."""
        return len(self._outbox)

    @property
    def held(self) -> list[str]:
        """The leases that this vehicle holds: unfinished, or not all of it in the durable stream."""
        return list(self._leases)

    # -- the only way in -----------------------------------------------------------------------------------------------

    def will_freeze(self, event: Event, now_ms: int) -> bool:
        """Whether ``handle`` would return FreezeEngine: the shell may freeze before it hands the event in."""
        if self._state not in _UP:
            return False
        if isinstance(event, VerdictGiven):
            permit = event.permit
            return permit is None or permit.until_ms <= now_ms or self._model_for(permit) is None
        return isinstance(event, StopAsked) or self._ran_out(now_ms)

    def _model_for(self, permit: Permit) -> str | None:
        """The model that a permit allows; None if this vehicle has none that is small enough."""
        return self._config.small_model if permit.tier is ModelTier.SMALL else self._config.model

    def _ran_out(self, now_ms: int) -> bool:
        return self._permit is not None and now_ms >= self._permit.until_ms

    def handle(self, event: Event, now_ms: int) -> list[Command]:
        """Take one event and return what to do, in order. ``now_ms`` never decreases."""
        assert now_ms >= self._now_ms, "time went back"
        self._now_ms = now_ms
        if self._ran_out(now_ms) and not isinstance(event, VerdictGiven):
            self._deny(_OUTDATED, now_ms)
        if isinstance(event, EngineWorked):
            self._on_worked(event, now_ms)
        elif isinstance(event, VerdictGiven):
            self._on_verdict(event, now_ms)
        elif isinstance(event, WorkPublished):
            for message_id in event.message_ids:
                delivered = self._outbox.published(message_id)
                if delivered is not None:
                    self._close_if_over(delivered)
        elif isinstance(event, Arrived):
            self._on_message(event, now_ms)
        elif isinstance(event, EngineReady):
            self._on_ready(event, now_ms)
        elif isinstance(event, EngineDied):
            self._on_died(event, now_ms)
        elif isinstance(event, LinkChanged):
            self._on_link(event, now_ms)
        elif isinstance(event, SpoolFilled):
            self._outbox.spool_full = event.full
        elif isinstance(event, StopAsked):
            self._on_stop(now_ms)
        else:
            assert isinstance(event, Ticked)
        self._on_time(now_ms)
        self._fill(now_ms)
        self._settle(now_ms)
        commands = self._out.copy()
        self._out.clear()
        return commands

    def _go(self, trigger: Trigger) -> None:
        following = TRANSITIONS.get((self._state, trigger))
        assert following is not None, f"no way from {self._state} by {trigger}"
        self._state = following

    # -- the guard -----------------------------------------------------------------------------------------------------

    def _on_verdict(self, event: VerdictGiven, now_ms: int) -> None:
        if event.drawn_mws is not None:
            self._meter.draw(event.drawn_mws, is_measured=event.is_measured)
        self._soc_pct = event.soc_pct
        if event.region is not None and event.region != self._region:
            self._region = event.region
            self._changed = True
        stay = (event.stay_bound_ms, event.risk_15min)
        if stay != self._stay:
            self._stay = stay
            self._stay_changed = True
        if event.plugged != self._plugged:
            self._plugged = event.plugged
            self._changed = True
        if event.permit is None or self._stopping:
            self._deny(event.reasons, now_ms)
        elif event.permit.until_ms <= now_ms:
            self._deny(_OUTDATED, now_ms)
        elif self._model_for(event.permit) is None:
            self._deny(_NO_SMALL_MODEL, now_ms)
        else:
            self._allow(event.permit, now_ms)

    def _allow(self, permit: Permit, now_ms: int) -> None:
        self._permit = permit
        self._watts_w = permit.watts_w
        self._reasons = ()
        if self._state is VehicleState.DENIED:
            self._go(Trigger.PERMITTED)
        elif self._state is VehicleState.YIELDING:
            if self._engine.loading != self._model_for(permit):
                self._switch(now_ms)
                return
            self._engine.thaw(self._watts_w)
            self._go(Trigger.PERMITTED)

    def _deny(self, reasons: tuple[Reason, ...], now_ms: int) -> None:
        """Stop. The engine is frozen before anything else happens; then what was generated goes back."""
        self._permit = None
        self._reasons = reasons
        self._back_since_ms = None
        self._engine.quiet_since_ms = None
        if self._state is VehicleState.DENIED:
            return
        leaving = self._stopping or any(reason.code in LEAVING for reason in reasons)
        was = self._state
        if was in _UP:
            self._engine.freeze([*self._running, *self._live], now_ms)
            self._return_everything(ReturnReason.SHUTDOWN if self._stopping else ReturnReason.GUARD)
        if was is VehicleState.YIELDING and not leaving:
            return
        if leaving or was is VehicleState.STARTING:
            self._engine.kill()
        self._go(Trigger.LEAVING if leaving else Trigger.DENIED)

    def _on_stop(self, now_ms: int) -> None:
        self._stopping = True
        self._deny((), now_ms)

    # -- the engine ----------------------------------------------------------------------------------------------------

    def _follow_tier(self, now_ms: int) -> None:
        """Let the engine run the model that the permit's tier names.

        Down the ladder at once. Up again when nothing is lost by it, or after a while: otherwise a machine that is just
        warm enough would throw its work away again and again.
        """
        permit, engine = self._permit, self._engine
        wanted = None if permit is None else self._model_for(permit)
        if wanted is None or not engine.on or engine.loading == wanted:
            self._back_since_ms = None
            return
        if wanted == self._config.model and (self._running or self._queued or self._live):
            if self._back_since_ms is None:
                self._back_since_ms = now_ms
            if now_ms - self._back_since_ms < self._config.switch_back_ms:
                return
        self._switch(now_ms)

    def _switch(self, now_ms: int) -> None:
        """End the engine, give its work back, and let one with the other model take its place."""
        self._out.append(KillEngine())
        if self._state in _UP:
            self._return_everything(ReturnReason.GUARD)
        self._engine.gone()
        self._engine.start_at_ms = now_ms
        self._back_since_ms = None
        self._go(Trigger.SWITCH)

    def _on_ready(self, event: EngineReady, now_ms: int) -> None:
        if self._state is VehicleState.STARTING and self._engine.loaded(event, now_ms):
            self._live.engine = event.fingerprint
            self._go(Trigger.LOADED)

    def _on_died(self, event: EngineDied, now_ms: int) -> None:
        if not self._engine.on:
            return
        was_up = self._state in _UP
        if was_up:
            # An engine that missed its agent's word is no fault of what it ran: it is held against no line.
            self._return_everything(ReturnReason.GUARD if event.unheard else ReturnReason.ENGINE_DIED)
        self._engine.died(now_ms, was_up=was_up)
        self._go(Trigger.DIED)

    def _on_worked(self, event: EngineWorked, now_ms: int) -> None:
        if event.drawn_mws is not None:
            self._meter.draw(event.drawn_mws, is_measured=event.is_measured, busy_ms=event.busy_ms)
        elif self._engine.on:
            self._meter.count(event.busy_ms, self._watts_w)
        tokens = 0
        for progressed in event.progressed:
            run = self._running.get(progressed.key) or self._live.get(progressed.key)
            if run is None:
                continue
            if run.growth is None:
                run.growth = Growth()
            tokens += run.growth.add(progressed.deltas)
            if isinstance(run, LiveRun):
                self._live.progressed(run, progressed.deltas)
        if event.progressed or event.finished or event.cancelled:
            self._engine.heard()
        if event.finished:
            tokens += self._on_finished(event.finished, now_ms)
        if event.cancelled:
            self._on_cancelled(event.cancelled)
        self._tokens += tokens
        self._token_rate.add(tokens, now_ms)

    def _on_finished(self, finished: Sequence[FinishedAttempt], now_ms: int) -> int:
        """Gather results; the number of tokens that were not seen before."""
        running, gather = self._running, self._outbox.gather
        tokens = count = 0
        for done in finished:
            run = running.pop(done.key, None)
            if run is None:
                tokens += self._live.finished(done)
                continue
            count += 1
            usage, lease, growth = done.usage, run.lease, run.growth
            tokens += max(0, usage.completion_tokens - usage.carried_tokens - (growth.tokens if growth else 0))
            lease.running -= 1
            fits = len(done.body) <= MAX_BODY_BYTES
            result = ResultItem(
                line=run.line,
                status=done.status if fits else TooLargeError.status,
                body=done.body if fits else TOO_LARGE,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
                carried_tokens=usage.carried_tokens,
            )
            gather(lease, result, now_ms)
            if not lease.unfinished:
                self._outbox.flush(lease)
        self._finish_rate.add(count, now_ms)
        return tokens

    def _on_cancelled(self, keys: Sequence[str]) -> None:
        """Attempts that we cancelled are forgotten already; any other is one that the engine gave up by itself."""
        for key in keys:
            run = self._running.get(key)
            if run is not None:
                item = self._take_running(key, run, started=True)
                self._outbox.give_back(run.lease, [item], ReturnReason.ENGINE_DIED)
            else:
                self._live.break_off(key, ReturnReason.ENGINE_DIED)

    # -- leases --------------------------------------------------------------------------------------------------------

    def _on_message(self, event: Arrived, now_ms: int) -> None:
        message = event.message
        if isinstance(message, Grant):
            self._on_grant(message, now_ms)
        elif isinstance(message, Revoke):
            self._on_revoke(message)
        elif isinstance(message, Open):
            accepted = self._state in _UP and message.model == self._engine.model
            self._live.open(message, accepted=accepted, created_s=now_ms // 1000)
        elif isinstance(message, Close):
            self._live.close(message.request_id)
        elif isinstance(message, Sync):
            self._told = None
        # what is for the owner is the shell's to pass on

    def _on_grant(self, grant: Grant, now_ms: int) -> None:
        if grant.lease_id in self._leases or grant.lease_id in self._closed:
            return
        if len(self._leases) >= MAX_ITEMS_PER_MESSAGE:  # a State could not name it: as if it had never come
            return
        self._lease_count += 1
        lease = Lease(grant, self._lease_count, now_ms)
        self._leases[lease.lease_id] = lease
        self._changed = True
        size = sum(bytes_of(item) for item in grant.items)
        lines = {item.line for item in grant.items}
        if len(lines) < len(grant.items) or not grant.items or not self._accepts(grant, size):
            first = {item.line: item for item in reversed(grant.items)}
            back = [unstarted(lease, first[line]) for line in sorted(first)]
            self._outbox.give_back(lease, back, ReturnReason.REFUSED)
            self._close_if_over(lease)
            return
        lease.queue.extend(grant.items)
        self._waiting[lease.number] = lease
        self._queued += len(grant.items)
        self._queued_bytes += size
        ends_ms = lease.ends_ms(self._down_since_ms)
        self._expiry_ms = ends_ms if self._expiry_ms is None else min(self._expiry_ms, ends_ms)

    def _accepts(self, grant: Grant, size: int) -> bool:
        config = self._config
        return (
            self._state in _UP
            and grant.incarnation == self._incarnation
            and grant.model == self._engine.model
            and grant.ttl_ms > 0
            and len(self._leases) <= config.max_leases
            and self._queued + len(grant.items) <= config.max_queued
            and self._queued_bytes + size <= config.max_queued_bytes
        )

    def _on_revoke(self, message: Revoke) -> None:
        lease = self._leases.get(message.lease_id)
        if lease is None:
            return
        lines = None if message.lines is None else frozenset(message.lines)
        self._stop_lease(lease, lines, ReturnReason.REVOKED, keep_running=message.keep_running)

    def _stop_lease(
        self, lease: Lease, lines: frozenset[int] | None, reason: ReturnReason, *, keep_running: bool = False
    ) -> None:
        """Give lines of a lease back: queued ones, and running ones unless ``keep_running``."""
        items: list[ReturnItem] = []
        if lease.running and not keep_running:
            started = self._started_keys()
            keys = [
                key for key, run in self._running.items() if run.lease is lease and (lines is None or run.line in lines)
            ]
            if keys:
                self._out.append(CancelAttempts(keys=keys))
            items.extend(self._take_running(key, self._running[key], started=key in started) for key in keys)
        kept: list[Item] = []
        for item in lease.queue:
            if lines is None or item.line in lines:
                items.append(unstarted(lease, item))
                self._queued -= 1
                self._queued_bytes -= bytes_of(item)
            else:
                kept.append(item)
        lease.queue.clear()
        lease.queue.extend(kept)
        if not lease.unfinished:
            self._outbox.flush(lease)
        self._outbox.give_back(lease, items, reason)

    def _return_everything(self, reason: ReturnReason) -> None:
        """Give back all that runs and waits; finished results go out as well, since the link is no computing."""
        started = self._started_keys()
        items: dict[int, list[ReturnItem]] = {}
        for key, run in self._running.items():
            items.setdefault(run.lease.number, []).append(interrupted(run, started=key in started))
            run.lease.running = 0
        self._running = {}
        for lease in list(self._leases.values()):
            back = items.get(lease.number, [])
            back.extend(unstarted(lease, item) for item in lease.queue)
            lease.queue.clear()
            self._outbox.flush(lease)
            self._outbox.give_back(lease, back, reason)
        self._waiting = {}
        self._queued = self._queued_bytes = 0
        self._live.break_all(reason)

    def _started_keys(self) -> frozenset[str]:
        """Those that the engine has really begun: it runs ``slots`` at a time, in order."""
        return frozenset(islice(self._running, self._engine.slots))

    def _take_running(self, key: str, run: Run, *, started: bool) -> ReturnItem:
        del self._running[key]
        run.lease.running -= 1
        return interrupted(run, started=started)

    def _close_if_over(self, lease: Lease) -> None:
        if lease.over and lease.lease_id in self._leases:
            del self._leases[lease.lease_id]
            self._closed[lease.lease_id] = None
            forget_oldest(self._closed, self._config.max_closed)
            self._changed = True

    # -- time ----------------------------------------------------------------------------------------------------------

    def _on_link(self, event: LinkChanged, now_ms: int) -> None:
        self._live.link_changed(up=event.up)
        if event.up:
            self._told = None
            self._down_since_ms = None
        elif self._down_since_ms is None:
            self._down_since_ms = now_ms
        self._find_expiry()

    def _find_expiry(self) -> None:
        ends = (lease.ends_ms(self._down_since_ms) for lease in self._leases.values() if lease.unfinished)
        self._expiry_ms = min(ends, default=None)

    def _expire(self, now_ms: int) -> None:
        """Give up what is unfinished of leases whose time is over, or that were too long without a link."""
        for lease in list(self._leases.values()):
            if lease.unfinished and now_ms >= lease.ends_ms(self._down_since_ms):
                over = now_ms >= lease.expires_ms
                self._stop_lease(lease, None, ReturnReason.EXPIRED if over else ReturnReason.OFFLINE)
        self._find_expiry()

    def _on_time(self, now_ms: int) -> None:
        engine = self._engine
        if self._state is VehicleState.YIELDING and now_ms >= engine.kill_at_ms:
            engine.kill()
            self._go(Trigger.GRACE_OVER)
        if engine.is_silent(now_ms):
            self._out.append(KillEngine())
            self._on_died(EngineDied(), now_ms)
        if self._expiry_ms is not None and now_ms >= self._expiry_ms:
            self._expire(now_ms)
        self._run_engine(now_ms)
        if self._outbox.gathering:
            self._outbox.flush_gathered(now_ms - self._config.flush_ms)
        if self._running and now_ms >= self._progress_ms:
            self._progress_ms = now_ms + self._config.progress_interval_ms
            self._tell_progress()

    def _run_engine(self, now_ms: int) -> None:
        """Have the engine that the permit allows, held to the permit's watts."""
        if self._permit is None:
            return
        self._follow_tier(now_ms)
        if self._state is VehicleState.STARTING and not self._engine.on and now_ms >= self._engine.start_at_ms:
            model = self._model_for(self._permit)
            assert model is not None, "a permit names a model that there is"
            self._engine.start(model, self._watts_w)
        self._engine.limit(self._watts_w)

    def _tell_progress(self) -> None:
        """Send the checkpoints that have grown since the last time."""
        grown: dict[int, tuple[Lease, list[ProgressItem]]] = {}
        for run in self._running.values():
            growth = run.growth
            if growth is None or growth.tokens == run.told_tokens:
                continue
            checkpoint, tokens = join(run.carried, run.carried_tokens, growth)
            if checkpoint is None or checkpoint is run.carried:
                continue
            run.told_tokens = growth.tokens
            item = ProgressItem(line=run.line, tokens=tokens, checkpoint=checkpoint)
            grown.setdefault(run.lease.number, (run.lease, []))[1].append(item)
        for lease, items in grown.values():
            for part, _ in chunks(items, self._config.flush_bytes):
                message = Progress(
                    incarnation=self._incarnation, lease_id=lease.lease_id, job_id=lease.job_id, items=part
                )
                self._out.append(PublishState(message=message))

    def _fill(self, now_ms: int) -> None:
        """Keep the engine supplied: ``slots`` attempts, or more when they finish faster than we can look."""
        if not self._waiting or self._state not in _UP or self._outbox.full:
            return
        config = self._config
        ahead = int(self._finish_rate.value * config.window_ms / 1000)
        room = min(max(self._engine.slots, ahead), config.max_window) - len(self._running)
        attempts: list[Attempt] = []
        if room > 0 and not self._running:
            self._progress_ms = now_ms + config.progress_interval_ms
        while room > 0 and self._waiting:
            lease = next(iter(self._waiting.values()))
            queue = lease.queue
            take = min(room, len(queue))
            room -= take
            self._submit_from(lease, take, attempts)
            if not queue:
                del self._waiting[lease.number]
        if attempts:
            self._out.append(SubmitAttempts(attempts=attempts, created_s=now_ms // 1000))

    def _submit_from(self, lease: Lease, count: int, attempts: list[Attempt]) -> None:
        kind, number, running = lease.kind, lease.number, self._running
        prefix = response_id(kind, lease.lease_id)
        for _ in range(count):
            item = lease.queue.popleft()
            key = f"{number}-{item.line}"
            running[key] = Run(lease, item)
            self._queued_bytes -= bytes_of(item)
            attempts.append(
                Attempt(
                    key=key,
                    kind=kind,
                    body=item.body,
                    response_id=f"{prefix}-{item.line}",
                    checkpoint=item.checkpoint,
                )
            )
        lease.running += count
        self._queued -= count

    # -- the end of every step -----------------------------------------------------------------------------------------

    def _settle(self, now_ms: int) -> None:
        busy = bool(self._running or self._live)
        if busy and self._engine.quiet_since_ms is None:
            self._engine.quiet_since_ms = now_ms
        if busy and self._state is VehicleState.READY:
            self._go(Trigger.BUSY)
        elif not busy and self._state is VehicleState.WORKING:
            self._go(Trigger.IDLE)
        if not self._running and self._outbox.gathering:
            self._outbox.flush_gathered(now_ms)
        permit = self._permit
        allowed = None if permit is None else (permit.watts_w, permit.tier, permit.battery_fed)
        urgent = (self._state in _UP or self._state, allowed, self._reasons, self._engine.model)
        if urgent != self._told or now_ms >= self._tell_at_ms():
            self._told = urgent
            self._told_ms = now_ms
            self._changed = self._stay_changed = False
            self._out.append(PublishState(message=self._state_message(now_ms)))
        due_ms = self._due_ms()
        if self._wake_at_ms is None or self._wake_at_ms <= now_ms or due_ms < self._wake_at_ms:
            self._wake_at_ms = due_ms
            self._out.append(WakeAt(at_ms=due_ms))

    def _tell_at_ms(self) -> int:
        """When the next State is due, if nothing urgent happens."""
        config = self._config
        after_ms = config.state_interval_ms
        if self._stay_changed:
            after_ms = min(after_ms, config.stay_interval_ms)
        if self._changed:
            after_ms = min(after_ms, config.state_min_ms)
        return self._told_ms + after_ms

    def _state_message(self, now_ms: int) -> State:
        self._seq += 1
        running = len(self._running) + len(self._live)
        engine, permit = self._engine, self._permit
        in_slots = min(running, engine.slots)
        on_disk = self._config.models_on_disk
        return State(
            incarnation=self._incarnation,
            seq=self._seq,
            state=self._state,
            region=self._region,
            permit_w=permit.watts_w if permit else 0,
            reasons=reasons_outside(self._reasons),
            model=engine.model,
            slots=engine.slots,
            running=in_slots,
            queued=self._queued + running - in_slots,
            held=list(self._leases),
            tokens_generated=self._tokens,
            tokens_per_s=round(self._token_rate.add(0, now_ms), 2),
            energy_mwh=self._meter.total_mwh,
            energy_is_measured=self._meter.is_measured,
            engine=engine.fingerprint,
            soc_pct=charge_outside_pct(self._soc_pct),
            plugged=self._plugged,
            tier=permit.tier if permit else ModelTier.FULL,
            battery_fed=permit.battery_fed if permit else False,
            stay_bound_ms=self._stay[0],
            risk_15min=self._stay[1],
            memory_gb=self._config.memory_gb,
            models_on_disk=None if on_disk is None else list(on_disk),
        )

    def _due_ms(self) -> int:
        """When something is due next, without any event."""
        engine = self._engine
        due_ms = self._tell_at_ms()
        if self._permit is not None:
            due_ms = min(due_ms, self._permit.until_ms)
        if self._state is VehicleState.YIELDING:
            due_ms = min(due_ms, engine.kill_at_ms)
        elif self._state is VehicleState.STARTING and not engine.on:
            due_ms = min(due_ms, engine.start_at_ms)
        if self._back_since_ms is not None:
            due_ms = min(due_ms, self._back_since_ms + self._config.switch_back_ms)
        if self._expiry_ms is not None:
            due_ms = min(due_ms, self._expiry_ms)
        if engine.quiet_since_ms is not None:
            due_ms = min(due_ms, engine.quiet_since_ms + self._config.stall_ms)
        if self._running:
            due_ms = min(due_ms, self._progress_ms)
        gathered_ms = self._outbox.due_ms()
        return due_ms if gathered_ms is None else min(due_ms, gathered_ms)

    # -- what must always hold -----------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every invariant; raise AssertionError at the first that does not hold. For tests and simulations."""
        assert (self._state is VehicleState.WORKING) == bool(self._running or self._live), "works iff attempts run"
        alive = self._permit is not None and self._permit.until_ms > self._now_ms
        assert alive or self._state in {VehicleState.DENIED, VehicleState.YIELDING}, "nothing runs without a permit"
        assert self._permit is None or not self._reasons, "a permit has no reasons against it"
        assert not (self._stopping and self._permit), "a stopping vehicle has no permit"
        self._validate_engine()
        assert self._state in _UP or not (self._queued or self._running), "no work is kept without an engine"
        assert not self._leases.keys() & self._closed.keys(), "a lease is held or closed"
        assert len(self._closed) <= self._config.max_closed
        self._validate_counts()

    def _validate_engine(self) -> None:
        state, engine = self._state, self._engine
        assert engine.on or state in {VehicleState.DENIED, VehicleState.STARTING}, "an engine to run in"
        assert not (engine.on and state is VehicleState.DENIED), "no engine without a permit"
        assert not engine.ghosts or state is VehicleState.YIELDING, "only a frozen engine keeps handed back work"
        assert engine.quiet_since_ms is None or state in _UP, "only a running engine owes a sign of life"
        assert engine.quiet_since_ms is not None or state is not VehicleState.WORKING, "a working one does"
        if self._permit is not None and engine.on:
            wanted = self._model_for(self._permit)
            assert wanted in {engine.loading, self._config.model}, "no larger model than the tier allows"
            assert engine.loading == wanted or self._back_since_ms is not None, "the way back up has an end"

    def _validate_counts(self) -> None:
        running: dict[int, set[int]] = {}
        for key, run in self._running.items():
            assert self._leases.get(run.lease.lease_id) is run.lease, "each attempt belongs to one held lease"
            assert key == f"{run.lease.number}-{run.line}"
            running.setdefault(run.lease.number, set()).add(run.line)
        queued = queued_bytes = 0
        for lease in self._leases.values():
            assert not lease.over, "a lease that is over is closed"
            lines = [item.line for item in lease.queue]
            lines += running.get(lease.number, set())
            lines += [item.line for item in lease.gathered]
            assert len(lines) == len(set(lines)), "a line is in one place"
            assert lease.running == len(running.get(lease.number, ()))
            assert not lease.queue or lease.number in self._waiting, "a queue is looked at"
            if lease.unfinished:
                assert self._expiry_ms is not None, "a lease ends at its time"
                assert self._expiry_ms <= lease.ends_ms(self._down_since_ms), "or before, without a link"
            queued += len(lease.queue)
            queued_bytes += sum(bytes_of(item) for item in lease.queue)
        assert queued_bytes <= self._config.max_queued_bytes, "no more is held than the bound says"
        assert (queued, queued_bytes) == (self._queued, self._queued_bytes)
        self._live.validate()
        self._outbox.validate(self._leases)
        self._meter.validate()
