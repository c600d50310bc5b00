"""The vehicle machine in random interleavings against its invariants, which are checked after every event."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.vehicle_trial import (
    CONFIG,
    DOOR,
    GONE,
    denial,
    finished,
    grant,
    grown,
    opened,
    permit,
)

from motorpool.agent.runtime.engine import Finished
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
    WorkPublished,
)
from motorpool.types import (
    ModelTier,
    Reason,
    Usage,
    VehicleState,
)
from motorpool.wire import (
    Close,
    Revoke,
    encode,
)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: nothing runs without a permit, and every line ends exactly once.

    Nothing runs in an engine that is larger or hungrier than the permit allows, either.
    """

    small_model: str | None = "s"

    def __init__(self) -> None:
        super().__init__()
        config = msgspec.structs.replace(
            CONFIG,
            max_queued=12,
            max_outbox_items=6,
            max_leases=6,
            max_live=2,
            flush_items=3,
            small_model=self.small_model,
            switch_back_ms=1_000,
        )
        self.machine = VehicleMachine(config, "inc")
        self.now_ms = 1_000
        self.leases = 0
        self.requests = 0
        self.granted: set[tuple[str, int]] = set()
        self.ended: Counter[tuple[str, int]] = Counter()
        self.engine: dict[str, bool] = {}  # the attempts in the engine
        self.engine_on = self.engine_ready = self.frozen = False
        self.permitted_until_ms = 0
        self.tier = ModelTier.FULL
        self.watts_w = 0
        self.limit_w: int | None = None
        self.model = ""
        self.drawn_mws = 0
        self.unconfirmed: list[str] = []
        self.live_open: set[str] = set()

    def hand(self, event: Event) -> None:
        will_freeze = self.machine.will_freeze(event, self.now_ms)
        commands = self.machine.handle(event, self.now_ms)
        assert will_freeze == (FreezeEngine() in commands), "the shell knows of a freeze before"
        for command in commands:
            self.perform(command)
        self.machine.validate()

    def perform(self, command: Command) -> None:  # one branch a command
        if isinstance(command, PublishWork | PublishLive | PublishState):
            encode(command.message)  # raises for what no message can carry
        if isinstance(command, SubmitAttempts):
            assert self.permitted_until_ms > self.now_ms, "work without a permit"
            assert self.engine_ready
            assert not self.frozen
            self.held_to_the_permit()
            for one in command.attempts:
                assert one.key not in self.engine
                self.engine[one.key] = True
        elif isinstance(command, CancelAttempts):
            for key in command.keys:
                self.engine.pop(key, None)
        elif isinstance(command, StartEngine):
            assert not self.engine_on
            assert self.permitted_until_ms > self.now_ms
            self.engine_on, self.model, self.limit_w = True, command.model, None
            assert self.model == ("s" if self.tier is ModelTier.SMALL else "m")
        elif isinstance(command, LimitEngine):
            assert self.engine_on
            assert command.watts_w != self.limit_w
            self.limit_w = command.watts_w
        elif isinstance(command, FreezeEngine):
            assert self.engine_ready
            assert not self.frozen
            self.frozen = True
        elif isinstance(command, ThawEngine):
            assert self.frozen
            assert not self.engine, "handed back work would go on"
            self.held_to_the_permit()
            self.frozen = False
        elif isinstance(command, KillEngine):
            assert self.engine_on
            self.engine_gone()
        elif isinstance(command, PublishWork):
            self.unconfirmed.append(command.message.message_id)
            for item in command.message.items:
                self.ended[command.message.lease_id, item.line] += 1

    def held_to_the_permit(self) -> None:
        assert self.limit_w == self.watts_w
        assert self.model == "s" or self.tier is not ModelTier.SMALL

    def engine_gone(self) -> None:
        self.engine.clear()
        self.engine_on = self.engine_ready = self.frozen = False

    @rule(watts=st.sampled_from([50, 100]), for_ms=st.integers(1, 5_000), tier=st.sampled_from(ModelTier))
    def guard_permits(self, watts: int, for_ms: int, tier: ModelTier) -> None:
        possible = tier is not ModelTier.SMALL or self.small_model is not None
        self.permitted_until_ms = self.now_ms + for_ms if possible else 0
        self.tier, self.watts_w = tier, watts
        self.hand(permit(watts, self.now_ms + for_ms, tier, stay_bound_ms=for_ms))

    @rule(reasons=st.sampled_from([DOOR, GONE]))
    def guard_denies(self, reasons: tuple[Reason, ...]) -> None:
        self.permitted_until_ms = 0
        self.hand(denial(reasons))

    @precondition(lambda self: self.engine_on and not self.engine_ready)
    @rule(slots=st.integers(1, 3))
    def engine_loads(self, slots: int) -> None:
        self.engine_ready = True
        before = self.machine.state
        self.hand(EngineReady(model=self.model, slots=slots, fingerprint="f"))
        assert before is VehicleState.STARTING

    @precondition(lambda self: self.engine_on)
    @rule()
    def engine_dies(self) -> None:
        self.engine_gone()
        self.hand(EngineDied(exit_code=1))

    @rule(
        count=st.integers(1, 8),
        ttl_ms=st.sampled_from([50, 5_000, 60_000]),
        max_offline_ms=st.sampled_from([0, 400, 10**8]),
        wrong=st.sampled_from(["", "", "m", "i"]),
    )
    def cell_grants(self, count: int, ttl_ms: int, max_offline_ms: int, wrong: str) -> None:
        self.leases += 1
        name = f"l{self.leases}"
        self.granted |= {(name, line) for line in range(count)}
        changes = {"m": {"model": "other"}, "i": {"incarnation": "old"}}.get(wrong, {"model": self.model or "m"})
        self.hand(grant(*range(count), lease=name, ttl_ms=ttl_ms, max_offline_ms=max_offline_ms, **changes))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def cell_repeats_the_latest_grant(self, data: st.DataObject) -> None:
        self.hand(grant(*range(data.draw(st.integers(1, 8))), lease=f"l{self.leases}"))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), keep=st.booleans(), lines=st.none() | st.lists(st.integers(0, 8), max_size=4))
    def cell_revokes(self, data: st.DataObject, keep: bool, lines: list[int] | None) -> None:
        name = f"l{data.draw(st.integers(1, self.leases))}"
        self.hand(Arrived(message=Revoke(lease_id=name, lines=lines, keep_running=keep)))

    @rule(stream=st.booleans())
    def customer_asks(self, stream: bool) -> None:
        self.requests += 1
        self.hand(opened(f"r{self.requests}", stream=stream, model=self.model or "m"))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def customer_leaves(self, data: st.DataObject) -> None:
        self.hand(Arrived(message=Close(request_id=f"r{data.draw(st.integers(1, self.requests))}")))

    @precondition(lambda self: self.engine and not self.frozen)
    @rule(data=st.data(), grow=st.booleans(), busy_ms=st.integers(0, 100_000))
    def engine_works(self, data: st.DataObject, grow: bool, busy_ms: int) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.engine)), unique=True, min_size=1))
        if grow:
            self.hand(EngineWorked(progressed=[grown(key, "t") for key in keys], busy_ms=busy_ms))
            return
        for key in keys:
            del self.engine[key]
        self.drawn_mws += busy_ms
        drawn = self.drawn_mws if busy_ms % 2 else None
        self.hand(
            EngineWorked(finished=finished(*keys), busy_ms=busy_ms, drawn_mws=drawn, is_measured=busy_ms % 3 == 0)
        )

    @precondition(lambda self: self.engine)
    @rule(data=st.data())
    def engine_gives_one_up(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.engine)))
        if not self.frozen:
            del self.engine[key]
            self.hand(EngineWorked(cancelled=[key]))

    @rule(stale=st.integers(0, 30))
    def a_late_event_of_an_old_engine(self, stale: int) -> None:
        key = f"{stale}-0"
        if key not in self.engine:
            done = [Finished(key=key, status=200, body=b"", usage=Usage())]
            self.hand(EngineWorked(progressed=[grown(key, "x")], finished=done, cancelled=[key]))

    @precondition(lambda self: self.unconfirmed)
    @rule(data=st.data())
    def stream_confirms(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(self.unconfirmed), unique=True))
        self.unconfirmed = [one for one in self.unconfirmed if one not in ids]
        self.hand(WorkPublished(message_ids=ids))

    @rule(up=st.booleans())
    def link_changes(self, up: bool) -> None:
        self.hand(LinkChanged(up=up))

    @rule(full=st.booleans())
    def spool_fills_or_drains(self, full: bool) -> None:
        self.hand(SpoolFilled(full=full))

    @rule(passed_ms=st.sampled_from([0, 1, 50, 500, 3_000, 70_000]))
    def time_passes(self, passed_ms: int) -> None:
        self.now_ms += passed_ms
        self.hand(Ticked())

    @invariant()
    def every_granted_line_ends_once_or_is_held(self) -> None:
        held = set(self.machine.held)
        for entry in self.granted:
            assert self.ended[entry] <= 1, "a line ended twice"
            assert self.ended[entry] == 1 or entry[0] in held, "a line was lost"
        assert all(entry in self.granted for entry in self.ended), "a line that was never granted"

    @invariant()
    def what_the_engine_runs_is_what_the_machine_thinks(self) -> None:
        if not self.frozen:
            assert set(self.engine) == {*self.machine._running, *self.machine._live}

    def teardown(self) -> None:
        self.hand(StopAsked())
        self.every_granted_line_ends_once_or_is_held()
        assert not self.engine_on
        self.hand(WorkPublished(message_ids=self.unconfirmed))
        assert self.machine.held == []
        assert sum(self.ended.values()) == len(self.granted)


class WithoutSmallModel(AnyOrder):
    """The same with a vehicle that has no smaller model to go on with."""

    small_model = None


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestWithoutSmallModel = WithoutSmallModel.TestCase
TestWithoutSmallModel.settings = settings(max_examples=30, stateful_step_count=60, deadline=None)
