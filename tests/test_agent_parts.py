"""The parts around an agent's loop: watts and the engine, the owner's words by the cell, accounts, outlook, network."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.test_agent_loop import Alone

from motorpool import wire
from motorpool.agent import judge as judge_module
from motorpool.agent import parts as parts_module
from motorpool.agent.accounts import AccountsConfig, Delivery
from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME, ConsentFile, enrol_owner, give_consent
from motorpool.agent.judge import OFFSETS_MS, Judge
from motorpool.agent.owner.acts import load_acts
from motorpool.agent.owner.entries import Entry, EntryKind
from motorpool.agent.parts import Desk, NodeConfig, Parts, PartsConfig
from motorpool.agent.power.model import PowerModel, Source
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.signals.source import AlwaysParked
from motorpool.core import guard
from motorpool.core.economics import Tariff
from motorpool.core.energy import Limits
from motorpool.core.guard import ConsentView, Policy, Reading, Signals
from motorpool.core.policy import Quiet, ReadyBy
from motorpool.core.signals import NetworkClass
from motorpool.core.vehicle_events import PublishLive
from motorpool.core.wear import WearPrices
from motorpool.errors import CallerError
from motorpool.trust.consent import (
    PURPOSE_COMPUTE,
    ConsentGrant,
    ConsentLimits,
    OwnerKey,
    create_owner_key,
    grant_consent,
)
from motorpool.types import Kind, Permit, ReasonCode, Usage, VehicleState

NOW_MS = 1_790_000_000_000
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
MODEL = "m"
FULL = PartsConfig(
    accounts=AccountsConfig(tariff=Tariff.flat(250_000)),
    node=NodeConfig(idle_w=20.0, max_w=120.0),
    owner_desk=True,
    forecast=True,
)


class Car(AlwaysParked):
    """All is well but what a test changes."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: dict[str, Any] = {}

    def read(self, now_ms: int) -> Signals:
        changed = {name: None if value is None else Reading(value, now_ms) for name, value in self.changes.items()}
        return msgspec.structs.replace(super().read(now_ms), **changed)


class World:
    """The parts of one vehicle with an owner, on a clock that the test moves."""

    def __init__(
        self,
        folder: Path,
        config: PartsConfig = FULL,
        *,
        policy: Policy | None = None,
        threads: int = 4,
        slots: int = 4,
        max_watts_w: int = 150,
    ) -> None:
        self.folder = folder
        self.now_ms = NOW_MS
        self.state = VehicleState.READY
        self.cpu_ms = 0
        self.car = Car()
        self.key: OwnerKey = enrol_owner(folder)
        limits = ConsentLimits(max_watts_w=max_watts_w)
        give_consent(folder, "v1", limits, now_ms=NOW_MS - 1, expires_ms=NOW_MS + 100 * DAY_MS)
        spec = EngineSpec(backend=Backend.NULL, model=MODEL, threads=threads, slots=slots, hosted=False)
        self.parts = Parts(
            config=config,
            agent_dir=folder,
            vehicle_id="v1",
            papers=ConsentFile(folder / CONSENT_NAME, folder / PUBLIC_NAME, "v1"),
            policy=policy or Policy(dwell_ms=0, watts_w=100, network=NetworkClass.UNMETERED),
            specs={MODEL: spec},
            source=self.car,
            clock=lambda: self.now_ms,
            state=lambda: self.state,
        )
        self.looks = 0
        self.parts.look_now(self._look_now)
        self.limits: list[Limits] = []
        self.parts.engine.limit = self.limits.append  # type: ignore[assignment,method-assign]

    def _look_now(self) -> None:
        self.looks += 1

    def look(self, after_ms: int = 250) -> Any:
        """The guard looks; the engine computes on one core while the vehicle works."""
        self.now_ms += after_ms
        self.cpu_ms += after_ms if self.state is VehicleState.WORKING else 0
        verdict = self.parts.judge.look(self.now_ms, self.state, lambda: self.cpu_ms)
        self.parts.judge.afterwards(self.now_ms, self.state)
        return verdict

    def run(self, for_ms: int) -> None:
        for _ in range(for_ms // 250):
            self.look()

    async def hear(self, *messages: wire.Statement | wire.OwnerDocument | wire.OwnerAsked) -> None:
        """What has come by the cell, until it is done or refused."""
        before = self.looks
        asked = [message for message in messages if not isinstance(message, wire.Statement)]
        for message in messages:
            self.parts.on_owner(message)
        await asyncio.gather(*self.parts._tasks)
        assert self.looks == before + len(asked), "the guard looks at once"

    def why(self) -> set[ReasonCode]:
        return {reason.code for reason in self.look().reasons}

    def entries(self, kind: EntryKind) -> list[Entry]:
        assert self.parts.desk is not None
        self.parts.desk.log.close(self.now_ms)
        return [entry for entry in self.parts.desk.log.reader.entries(0, 1_000) if entry.kind is kind]


def play(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


# -- watts -------------------------------------------------------------------------------------------------------------


def test_fewer_watts_are_fewer_threads_and_then_less_of_the_time(tmp_path: Path) -> None:
    world = World(tmp_path)  # 25 W for each of 4 cores
    for watts_w in (150, 100, 80, 50, 25, 10, 3):
        world.parts.limit(watts_w)
    threads = [limits.threads for limits in world.limits]
    duties = [limits.duty for limits in world.limits]
    assert threads == [4, 4, 3, 2, 1, 1, 1]
    assert duties == [1, 1, 1, 1, 1, pytest.approx(0.4), pytest.approx(0.12)]
    assert [limits.slots for limits in world.limits] == [4, 4, 4, 4, 4, 2, 1]
    drawn = [limits.threads * limits.duty * 25 for limits in world.limits]
    assert all(draw <= limits.watts_w for draw, limits in zip(drawn, world.limits, strict=True))
    assert [limits.expected_w for limits in world.limits] == pytest.approx(drawn)


def test_the_engines_memory_is_held_as_configured(tmp_path: Path) -> None:
    world = World(tmp_path, msgspec.structs.replace(FULL, memory_bytes=123))
    world.parts.limit(100)
    assert world.limits[0].memory_bytes == 123


def test_less_than_the_engine_can_be_held_to_is_never_permitted(tmp_path: Path) -> None:
    node = NodeConfig(idle_w=0.0, max_w=800.0)  # 400 W for each of 2 cores: 20 W at a twentieth of the time
    config = msgspec.structs.replace(FULL, node=node)
    for name in "ab":
        (tmp_path / name).mkdir()
    too_little = World(tmp_path / "a", config, threads=2, max_watts_w=20)
    assert too_little.why() == {ReasonCode.CONSENT_INVALID}
    assert "21 W" in too_little.look().reasons[0].detail
    enough = World(tmp_path / "b", config, threads=2, max_watts_w=21)
    permit = enough.look().permit
    assert permit is not None
    enough.parts.limit(permit.watts_w)
    assert enough.limits[0].expected_w <= 21
    # heat halves the permit: then it is too little
    enough.car.changes["computer_temp_c"] = 76.0
    assert enough.why() == {ReasonCode.TOO_HOT}


def test_a_calibrated_model_holds_for_the_engine_that_runs_and_for_what_is_permitted(tmp_path: Path) -> None:
    world = World(tmp_path, max_watts_w=30)
    world.parts.limit(30)
    assert world.limits[-1].threads == 1
    assert world.look().permit is not None
    found = PowerModel(idle_w=20.0, per_core_w=600.0, cores=4, source=Source.RAPL)
    world.parts._take_model(found)
    assert world.limits[-1].duty == pytest.approx(0.05), "planned anew at once"
    assert world.why() == {ReasonCode.CONSENT_INVALID}, "31 W is the least from now on"


def test_the_computer_is_measured_only_while_a_permit_holds_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "CALIBRATE_S", 0.0)
    seen: list[tuple[bool, bool, bool, float | None]] = []
    world = World(tmp_path)
    world.car.changes["computer_power_w"] = 55.0

    def calibrate(gauges: Any, fallback: PowerModel, *, permitted: Callable[[], bool], clock_ms: Any) -> PowerModel:
        now = permitted()
        world.now_ms += 3_000  # nobody looks again: the agent hangs
        late = permitted()
        world.now_ms -= 3_000
        world.state = VehicleState.WORKING
        busy = permitted()
        seen.append((now, late, busy, gauges[0].read(clock_ms())))
        return msgspec.structs.replace(fallback, source=Source.VEHICLE)

    monkeypatch.setattr(parts_module, "calibrate", calibrate)

    async def scenario() -> None:
        world.look()
        await asyncio.wait_for(world.parts._calibrate(), 20)

    play(scenario())
    assert seen == [(True, False, False, 55.0)], "and it reads the car's own signal, by the agent's clock"


# -- the owner, by way of the cell -------------------------------------------------------------------------------------


def signed(key: OwnerKey, at_ms: int, *, watts_w: int = 60, vehicle: str = "v1") -> wire.OwnerDocument:
    grant = ConsentGrant(
        vehicle_id=vehicle,
        purposes=(PURPOSE_COMPUTE,),
        limits=ConsentLimits(max_watts_w=watts_w),
        granted_ms=at_ms,
        expires_ms=at_ms + 10 * DAY_MS,
    )
    return wire.OwnerDocument(document=grant_consent(key, grant))


def test_a_paper_that_the_owner_has_signed_counts_and_any_other_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        good = signed(world.key, NOW_MS + 5)
        tampered = good.document.replace(b'\\"max_watts_w\\":60', b'\\"max_watts_w\\":90')
        assert tampered != good.document
        bad = (
            wire.OwnerDocument(document=b""),
            wire.OwnerDocument(document=tampered),
            signed(create_owner_key(), NOW_MS + 5),
            signed(world.key, NOW_MS + 5, vehicle="v2"),
            signed(world.key, NOW_MS - DAY_MS),  # older than the one in place
        )
        assert world.look().permit.watts_w == 100
        for message in bad:
            await world.hear(message)
            assert world.look().permit.watts_w == 100
        await world.hear(good)
        assert world.look().permit.watts_w == 60

    with caplog.at_level(logging.WARNING):
        play(scenario())
    assert caplog.text.count("was not done: TrustError") == 5
    assert "max_watts" not in caplog.text


def test_a_wish_that_the_cell_passes_on_only_makes_the_car_rest(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        assert world.look().permit is not None
        over = wire.OwnerAsked(act=wire.OwnerAct.PAUSE, asked_ms=NOW_MS - HOUR_MS, until_ms=NOW_MS)
        await world.hear(over)
        assert world.look().permit is not None
        pause = wire.OwnerAsked(act=wire.OwnerAct.PAUSE, asked_ms=world.now_ms, until_ms=world.now_ms + HOUR_MS)
        await world.hear(pause)
        assert world.why() == {ReasonCode.PAUSED}
        world.now_ms += HOUR_MS
        world.run(3_000)
        assert world.look().permit is not None
        need = wire.OwnerAsked(act=wire.OwnerAct.NEED_CAR, asked_ms=world.now_ms, until_ms=world.now_ms + HOUR_MS)
        await world.hear(need)
        world.now_ms += 2 * HOUR_MS
        world.run(3_000)
        assert world.why() == {ReasonCode.PAUSED}, "until the car was driven"
        assert load_acts(tmp_path).need_car_ms
        told = [entry.what for entry in world.entries(EntryKind.ACT)]
        assert told[0].startswith("paused until ")
        assert told[-1].startswith("you need the car")

    play(scenario())


def test_the_cells_statement_is_kept_across_a_start_and_of_two_the_later_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        later = wire.Statement(as_of_ms=2, earned_micro=70, lines_done=3)
        await world.hear(later, wire.Statement(as_of_ms=1, earned_micro=10))
        accounts = world.parts.accounts
        assert accounts is not None
        assert accounts.statement == later
        world.look()
        accounts.close()
        again = World(tmp_path).parts.accounts
        assert again is not None
        assert again.statement == later

    play(scenario())


def test_without_accounts_desk_and_forecast_the_guard_works_all_the_same(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, PartsConfig())
        verdict = world.look()
        assert verdict.permit.watts_w == 100
        assert (verdict.drawn_mws, verdict.stay_bound_ms, verdict.risk_15min) == (None, None, None)
        world.parts.on_owner(wire.Statement(as_of_ms=1, earned_micro=1))
        await world.hear(signed(world.key, NOW_MS + 1))
        assert world.look().permit.watts_w == 60
        world.parts.judge.delivered(results(), world.now_ms)
        world.parts.judge.passed(10, world.now_ms)

    play(scenario())


# -- accounts and the owner's log --------------------------------------------------------------------------------------


GRANT = wire.Grant(
    lease_id="l1",
    incarnation="i",
    job_id="j",
    kind=Kind.CHAT,
    model=MODEL,
    ttl_ms=1,
    items=[],
    pay_input_micro=1_000_000,
    pay_output_micro=4_000_000,
    customer_class="batch documents",
)


def results(tokens: int = 100, energy_mwh: int = 4_000) -> wire.Results:
    item = wire.ResultItem(line=0, status=200, body=b"", prompt_tokens=10, completion_tokens=tokens)
    return wire.Results(incarnation="i", message_id="m", lease_id="l1", job_id="j", items=[item], energy_mwh=energy_mwh)


def test_what_is_delivered_stands_in_the_owners_log_by_class_of_customer(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.look()
    world.parts.judge.granted(GRANT)
    world.parts.judge.delivered(results(), world.now_ms)
    odd = msgspec.structs.replace(GRANT, lease_id="l2", customer_class="ACME Ltd., Oslo")
    world.parts.judge.granted(odd)
    world.parts.judge.delivered(msgspec.structs.replace(results(), lease_id="l2"), world.now_ms)
    unknown = wire.Answered(request_id="r", attempt=0, status=200, body=b"", usage=Usage(completion_tokens=5))
    world.parts.judge.delivered(unknown, world.now_ms)
    world.run(1_000)
    (span,) = world.entries(EntryKind.SPAN)
    assert set(span.jobs) == {"batch documents", parts_module.OTHER_WORK}, "a customer's name is no class"
    mine, others = span.jobs["batch documents"], span.jobs[parts_module.OTHER_WORK]
    assert (mine.lines, mine.tokens, mine.energy_mwh) == (1, 100, 4_000)
    assert (mine.earned_micro, mine.electricity_micro) == (10 + 400, 1_000)
    assert (others.lines, others.tokens) == (2, 105)


def test_wear_is_told_with_the_delivery_that_it_was_for(tmp_path: Path) -> None:
    prices = WearPrices(battery_micro_kwh=100_000, silicon_micro_h=3_600_000)
    accounts = AccountsConfig(tariff=Tariff.flat(0), prices=prices)
    world = World(tmp_path, msgspec.structs.replace(FULL, accounts=accounts))
    world.state = VehicleState.WORKING
    world.car.changes["computer_temp_c"] = 70.0
    world.run(60_000)
    kept = world.parts.accounts
    assert kept is not None
    first = kept.delivered(results(), world.now_ms, 0)
    assert first is not None
    weighted_micro = kept.used.weighted_ms
    assert first.wear_micro == pytest.approx(weighted_micro, abs=2) != 0
    second = kept.delivered(results(), world.now_ms, 0)
    assert second is not None
    assert second.wear_micro == 0, "nothing is told twice"


def test_the_time_for_a_second_look_is_not_given_again_by_a_new_start(tmp_path: Path) -> None:
    accounts = AccountsConfig(tariff=Tariff.flat(10_000_000))
    world = World(tmp_path, msgspec.structs.replace(FULL, accounts=accounts))
    world.parts.judge.granted(msgspec.structs.replace(GRANT, pay_input_micro=0, pay_output_micro=4_000_000))
    world.state = VehicleState.WORKING

    def worth_it(of: World) -> bool:
        return not any(reason.code is ReasonCode.NOT_WORTH_IT for reason in of.look().reasons)

    tried_s = 0
    while tried_s < 400 and worth_it(world):
        tried_s += 1
        world.run(1_000)
        world.parts.judge.delivered(results(tokens=250), world.now_ms)
    assert 200 < tried_s < 400, "five minutes of work"
    kept = world.parts.accounts
    assert kept is not None
    kept.close()
    again = World(tmp_path, msgspec.structs.replace(FULL, accounts=accounts))
    again.now_ms = world.now_ms
    assert not worth_it(again)


def test_what_the_vehicle_has_drawn_reaches_the_machine_and_the_budgets(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.look()
    before = world.look().drawn_mws
    world.state = VehicleState.WORKING
    world.run(10_000)
    after = world.look()
    # 25 W of one core, with losses and with the car that is awake for it
    assert after.drawn_mws - before > 25 * 10_000
    assert not after.is_measured
    world.car.changes["computer_power_w"] = 70.0
    world.run(1_000)
    assert world.look().is_measured
    kept = world.parts.accounts
    assert kept is not None
    assert kept.used.compute_ms == pytest.approx(11_500, abs=500)


def test_bytes_of_the_spool_count_as_written_to_flash(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, msgspec.structs.replace(FULL, spool_bytes=1_000_000))
        async with world.parts:
            world.look()
            spool, kept = world.parts.spool, world.parts.accounts
            assert spool is not None
            assert kept is not None
            before = kept.used.flash_bytes
            assert await asyncio.to_thread(spool.put, "m1", b"x" * 10_000)
            await asyncio.sleep(0)
            written = kept.used.flash_bytes - before
            assert written >= 10_000
            await asyncio.to_thread(spool.remove, "m1")
            await asyncio.sleep(0)
            assert kept.used.flash_bytes - before > written
        assert b"xxxx" not in b"".join(path.read_bytes() for path in (tmp_path / "spool").iterdir())

    play(scenario())


def test_a_part_that_ends_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        world = World(tmp_path)

        async def broken() -> None:
            raise ValueError("with a secret")

        world.parts._spawn(broken())
        await asyncio.gather(*world.parts._tasks, return_exceptions=True)

    play(scenario())
    assert "a part of the agent has ended: ValueError" in caplog.text
    assert "secret" not in caplog.text


# -- the network -------------------------------------------------------------------------------------------------------


def test_a_network_that_costs_stops_all_bytes_of_jobs_and_what_passes_is_counted(tmp_path: Path) -> None:
    world = World(tmp_path)
    kept, judge = world.parts.accounts, world.parts.judge
    assert kept is not None
    assert world.look().permit is not None
    assert judge.may_send
    judge.passed(500, world.now_ms)
    assert kept.used.metered_bytes == 0
    world.car.changes["network"] = NetworkClass.METERED
    assert world.why() == {ReasonCode.METERED_NETWORK}
    assert not judge.may_send
    judge.passed(500, world.now_ms)
    assert kept.used.metered_bytes == 500
    world.car.changes["network"] = NetworkClass.NONE
    world.look()
    assert judge.may_send
    judge.passed(500, world.now_ms)
    assert kept.used.metered_bytes == 500


@pytest.mark.parametrize(("network", "counted"), [(NetworkClass.UNMETERED, 0), (NetworkClass.UNKNOWN, 9)])
def test_without_a_signal_the_network_is_what_the_configuration_says(
    tmp_path: Path, network: NetworkClass, counted: int
) -> None:
    world = World(tmp_path, policy=Policy(dwell_ms=0, network=network))
    world.car.changes["network"] = None
    world.look()
    world.parts.judge.passed(9, world.now_ms)
    kept = world.parts.accounts
    assert kept is not None
    assert kept.used.metered_bytes == counted
    assert world.parts.judge.may_send is (counted == 0)


# -- looks -------------------------------------------------------------------------------------------------------------


def test_how_long_the_car_stays_reaches_the_state_after_one_look(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.look().stay_bound_ms is None, "before anything was seen"
    told = world.look()
    assert told.stay_bound_ms is not None
    assert 0 < told.stay_bound_ms <= DAY_MS
    assert 0 <= told.risk_15min <= 1
    world.car.changes["departure_ms"] = world.now_ms + 20 * 60_000
    world.look()
    assert world.look().stay_bound_ms <= 20 * 60_000
    world.car.changes |= {"cable_connected": False, "grid_power_available": False}
    world.look()
    gone = world.look()
    assert (gone.stay_bound_ms, gone.risk_15min) == (None, None)


def judged(offsets_min: Callable[[int], int], view: ConsentView) -> Judge:
    return Judge(AlwaysParked(), lambda _: view, Policy(dwell_ms=0), offset_min=offsets_min)


def allowed(judge: Judge, now_ms: int) -> bool:
    return judge.look(now_ms, VehicleState.READY, lambda: 0).permit is not None


def test_local_time_is_followed_within_a_minute() -> None:
    """Quiet from 01:00 to 02:00 local time, at 00:30 UTC: it is quiet while the clocks are an hour ahead."""
    offset_min = 0
    half_past_ms = NOW_MS // DAY_MS * DAY_MS + 30 * 60_000
    view = ConsentView(
        refusal=None,
        max_watts_w=100,
        floor_pct=10,
        expires_ms=NOW_MS * 2,
        quiet=(Quiet(from_minute=60, to_minute=120),),
    )
    judge = judged(lambda _: offset_min, view)
    assert allowed(judge, half_past_ms)
    offset_min = 60
    assert allowed(judge, half_past_ms + 1_000), "it does not ask at each look"
    assert not allowed(judge, half_past_ms + OFFSETS_MS)
    offset_min = 0
    assert not allowed(judge, half_past_ms + OFFSETS_MS + 1_000)
    assert not allowed(judge, half_past_ms + 2 * OFFSETS_MS - 1)
    judge.look(half_past_ms + 2 * OFFSETS_MS, VehicleState.READY, lambda: 0)
    assert allowed(judge, half_past_ms + 2 * OFFSETS_MS + 250)


def test_the_night_in_which_clocks_change_is_planned_with_the_less_convenient_offset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[int, int | None]] = []

    def decide(policy: Policy, *rest: Any) -> Any:
        told.append((policy.utc_offset_min, policy.utc_offset_next_min))
        return guard.decide(policy, *rest)

    monkeypatch.setattr(judge_module, "decide", decide)
    view = ConsentView(refusal=None, max_watts_w=100, expires_ms=NOW_MS * 2, schedule=(ReadyBy(minute=420),))
    judge = judged(lambda at_ms: 60 if at_ms < NOW_MS + DAY_MS else 120, view)
    judge.look(NOW_MS, VehicleState.DENIED, lambda: 0)
    assert told == [(60, 120)]


def test_a_permit_is_known_to_end_without_another_look() -> None:
    view = ConsentView(refusal=None, max_watts_w=100, floor_pct=10, expires_ms=NOW_MS * 2)
    judge = judged(lambda _: 0, view)
    assert not judge.permits(NOW_MS)
    permit = judge.look(NOW_MS, VehicleState.READY, lambda: 0).permit
    assert isinstance(permit, Permit)
    assert judge.permits(permit.until_ms - 1)
    assert not judge.permits(permit.until_ms)


class RefusingLog:
    """A log that takes nothing but ``other``."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def worked(self, kind: str, _now_ms: int, **_done: object) -> None:
        self.kinds.append(kind)
        if kind != parts_module.OTHER_WORK:
            raise CallerError("no")


def test_work_of_no_class_is_other_work() -> None:
    class Owners:
        log = RefusingLog()

    owners = Owners()
    delivered = Delivery(
        customer_class="",
        lines=1,
        tokens=1,
        energy_mwh=1,
        measured=False,
        earned_micro=1,
        electricity_micro=None,
        wear_micro=None,
    )
    Desk(owners).worked(delivered, NOW_MS)  # type: ignore[arg-type]
    Desk(owners).worked(msgspec.structs.replace(delivered, customer_class="A"), NOW_MS)  # type: ignore[arg-type]
    assert owners.log.kinds == ["other", "A", "other"]


# -- at the loop -------------------------------------------------------------------------------------------------------


class Counted(Alone):
    """An agent's loop that keeps which bytes its guard's side was told of, and which work."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self.delivered: list[object] = []
        self.judge.passed = lambda count, _now_ms: self.bytes.append(count)  # type: ignore[assignment,method-assign]
        self.judge.delivered = lambda message, _now_ms: self.delivered.append(message)  # type: ignore[assignment,method-assign]


def test_bytes_that_are_no_message_have_cost_as_much_as_others() -> None:
    async def scenario() -> None:
        counted = Counted()
        async with counted.running():
            counted.bytes.clear()
            counted.hand(b"x" * 12_345)
            counted.hand(wire.encode(wire.Sync()))
            await counted.diary.until(lambda: counted.loop._messages_waiting == 0)
            assert 12_345 in counted.bytes

    play(scenario())


@pytest.mark.parametrize(("sending", "connected"), [(True, True), (False, True), (True, False)])
def test_an_answer_counts_as_delivered_only_if_it_is_sent(*, sending: bool, connected: bool) -> None:
    async def scenario() -> None:
        counted = Counted()
        async with counted.running():
            await counted.diary.until(lambda: counted.loop._link is not None)
            counted.judge.sending, counted.link.connected = sending, connected
            counted.link.live.clear()
            answer = wire.Answered(request_id="r", attempt=0, status=200, body=b"")
            counted.loop._publish_live(PublishLive(message=answer))
            assert counted.delivered == ([answer] if sending and connected else [])
            sent = [wire.decode(wire.UP_LIVE, data) for data in counted.link.live]
            kind = wire.Answered if sending else wire.Broken
            assert [type(message) for message in sent] == ([kind] if connected else [])
            counted.judge.sending = counted.link.connected = True

    play(scenario())
