"""The vehicle machine on the thermal ladder, held to changing watts, and what it tells of energy and of the stay."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.vehicle_trial import (
    CONFIG,
    DOOR,
    READY,
    START,
    Driver,
    attempt,
    denial,
    finished,
    grant,
    grown,
    opened,
    permit,
    result,
    results,
    returned,
)

from motorpool.agent.runtime.engine import Finished
from motorpool.core.vehicle_events import (
    Arrived,
    CancelAttempts,
    Command,
    EngineDied,
    EngineReady,
    EngineWorked,
    FreezeEngine,
    KillEngine,
    LimitEngine,
    PublishLive,
    PublishState,
    PublishWork,
    StartEngine,
    SubmitAttempts,
    ThawEngine,
    Ticked,
    VerdictGiven,
)
from motorpool.core.vehicle_states import LEAVING, PASSING
from motorpool.types import ModelTier, Permit, Reason, ReasonCode, ReturnReason, Usage, VehicleState
from motorpool.wire import (
    Answered,
    Broken,
    Checkpoint,
    Results,
    ReturnItem,
    State,
    Statement,
    Sync,
    Tokens,
    encode_checkpoint,
)

BOTH = msgspec.structs.replace(CONFIG, small_model="s")
SMALL = EngineReady(model="s", slots=4, fingerprint="small")
START_SMALL: list[Command] = [StartEngine(model="s"), LimitEngine(watts_w=40)]


def small(**also: Any) -> VerdictGiven:
    return permit(40, tier=ModelTier.SMALL, **also)


def on_small(driver: Driver) -> Driver:
    driver.do(small())
    driver.do(SMALL)
    assert driver.machine.state is VehicleState.READY
    return driver


# -- the thermal ladder ------------------------------------------------------------------------------------------------


def test_a_hot_vehicle_hands_back_and_goes_on_with_its_small_model() -> None:
    driver = Driver(BOTH).ready()
    driver.do(grant(1, 2, 3))
    driver.do(opened())
    driver.do(EngineWorked(progressed=[grown("1-1", "abc")]))
    assert driver.do(permit(60, tier=ModelTier.REDUCED)) == [LimitEngine(watts_w=60)]
    checkpoint = encode_checkpoint(Checkpoint(text="abc", tokens=1, token_ids=[3]))
    assert driver.do(small()) == [
        KillEngine(),
        returned(
            1,
            ReturnReason.GUARD,
            ReturnItem(line=1, tokens=1, checkpoint=checkpoint, started=True),
            ReturnItem(line=2, started=True),
            ReturnItem(line=3),
        ),
        PublishLive(message=Broken(request_id="r1", attempt=0, reason=ReturnReason.GUARD)),
        *START_SMALL,
    ]
    assert driver.states[-1].state is VehicleState.STARTING
    assert (driver.states[-1].tier, driver.states[-1].permit_w, driver.states[-1].model) == (ModelTier.SMALL, 40, None)
    assert driver.do(READY) == []  # a late word of the engine that was killed
    assert driver.machine.state is VehicleState.STARTING
    assert driver.do(SMALL) == []
    assert driver.states[-1].model == "s"
    (refused,) = driver.do(grant(1, lease="l2"))
    assert refused == returned(2, ReturnReason.REFUSED, ReturnItem(line=1), lease="l2")
    submitted = SubmitAttempts(attempts=[attempt(1, "l3", 3)], created_s=1_000)
    assert driver.do(grant(1, lease="l3", model="s")) == [submitted]


def test_without_a_small_model_too_hot_for_the_full_one_is_a_no() -> None:
    driver = Driver().ready()
    driver.do(grant(1))
    assert driver.machine.will_freeze(small(), driver.now_ms)
    back = returned(1, ReturnReason.GUARD, ReturnItem(line=1, started=True))
    assert driver.do(small()) == [FreezeEngine(), back]
    assert [reason.code for reason in driver.machine.reasons] == [ReasonCode.TOO_HOT]
    assert driver.machine.state is VehicleState.YIELDING
    assert driver.do(permit(60, tier=ModelTier.REDUCED)) == [
        CancelAttempts(keys=["1-1"]),
        LimitEngine(watts_w=60),
        ThawEngine(),
    ]
    cold = Driver()
    assert cold.do(small()) == []
    assert cold.machine.state is VehicleState.DENIED


def test_an_idle_engine_goes_back_to_the_full_model_at_once_and_a_busy_one_when_it_is_done() -> None:
    driver = on_small(Driver(BOTH))
    assert driver.do(permit()) == [KillEngine(), *START]
    driver = on_small(Driver(BOTH))
    driver.do(grant(1, model="s"))
    assert driver.do(permit(90)) == [LimitEngine(watts_w=90)]  # the tier is full, the model stays the small one
    assert driver.machine.state is VehicleState.WORKING
    start: list[Command] = [StartEngine(model="m"), LimitEngine(watts_w=90)]
    assert driver.do(EngineWorked(finished=finished("1-1"))) == [results(1, result(1)), KillEngine(), *start]
    driver.do(READY)
    assert driver.states[-1].model == "m"


def test_a_busy_small_model_is_left_alone_for_a_while_and_not_for_ever() -> None:
    driver = on_small(Driver(msgspec.structs.replace(BOTH, stall_ms=10**9)))
    driver.do(grant(*range(9), model="s", ttl_ms=10**8))
    driver.do(permit(40))
    for _ in range(5):  # hot again, cool again: each time the wait begins anew, and nothing is thrown away
        assert driver.do(small(), after_ms=BOTH.switch_back_ms - 1) == []
        assert driver.do(permit(40), after_ms=1_000) == []
    driver.raw(Ticked(), after_ms=BOTH.switch_back_ms - 1)
    assert driver.machine._wake_at_ms is not None
    assert driver.machine._wake_at_ms <= driver.now_ms + 1
    kill, back, *start = driver.do(Ticked(), after_ms=1)
    assert (kill, start) == (KillEngine(), [StartEngine(model="m"), LimitEngine(watts_w=40)])
    assert isinstance(back, PublishWork)
    assert [item.line for item in back.message.items] == list(range(9))


def test_an_engine_that_loads_or_is_frozen_changes_its_model_as_well() -> None:
    driver = Driver(BOTH)
    assert driver.do(permit()) == START
    assert driver.do(small()) == [KillEngine(), *START_SMALL]
    assert driver.do(permit()) == [KillEngine(), *START]
    driver.do(READY)
    assert driver.do(denial()) == [FreezeEngine()]
    assert driver.do(small()) == [KillEngine(), *START_SMALL]
    driver.do(SMALL)
    driver.do(denial())
    assert driver.do(small()) == [ThawEngine()]


def test_a_switch_does_not_shorten_the_wait_after_a_crash() -> None:
    driver = Driver(BOTH).ready()
    driver.do(EngineDied(exit_code=1))
    assert driver.do(small()) == []
    assert driver.do(Ticked(), after_ms=CONFIG.restart_min_ms) == START_SMALL


# -- watts -------------------------------------------------------------------------------------------------------------


def test_every_change_of_the_watts_is_told_to_the_engine_once() -> None:
    driver = Driver()
    assert driver.do(permit(80)) == [StartEngine(model="m"), LimitEngine(watts_w=80)]
    assert driver.do(permit(80)) == []
    assert driver.do(permit(60)) == [LimitEngine(watts_w=60)]  # also while it loads
    driver.do(READY)
    assert driver.do(denial()) == [FreezeEngine()]
    assert driver.do(permit(60)) == [ThawEngine()]
    driver.do(denial())
    assert driver.do(permit(50)) == [LimitEngine(watts_w=50), ThawEngine()]
    driver.do(EngineDied(exit_code=1))
    assert driver.do(permit(40)) == []
    started = driver.do(Ticked(), after_ms=CONFIG.restart_min_ms)
    assert started == [StartEngine(model="m"), LimitEngine(watts_w=40)]


# -- reasons -----------------------------------------------------------------------------------------------------------


def test_every_reason_is_of_somebody_who_leaves_or_of_something_that_may_pass() -> None:
    assert set(ReasonCode) == LEAVING | PASSING
    assert not LEAVING & PASSING


@pytest.mark.parametrize("code", list(ReasonCode))
def test_the_memory_goes_back_at_once_when_the_owner_leaves_and_after_the_grace_otherwise(code: ReasonCode) -> None:
    driver = Driver().ready()
    driver.do(grant(1))
    back = returned(1, ReturnReason.GUARD, ReturnItem(line=1, started=True))
    kill = [KillEngine()] if code in LEAVING else []
    assert driver.do(denial((Reason(code=code),))) == [FreezeEngine(), back, *kill]
    if code in PASSING:
        assert driver.do(Ticked(), after_ms=CONFIG.freeze_grace_ms) == [KillEngine()]
    assert driver.machine.state is VehicleState.DENIED


# -- energy ------------------------------------------------------------------------------------------------------------


def shares(commands: list[Command]) -> list[tuple[int, bool]]:
    return [
        (command.message.energy_mwh, command.message.energy_is_measured)
        for command in commands
        if isinstance(command, PublishWork) and isinstance(command.message, Results)
    ]


def worked(line: int, **energy: Any) -> EngineWorked:
    return EngineWorked(finished=finished(f"1-{line}"), busy_ms=10**9, **energy)


def test_energy_that_the_shell_tells_takes_the_place_of_the_model() -> None:
    driver = Driver().ready()
    driver.do(grant(*range(8)))
    got = shares(driver.do(worked(0, drawn_mws=36_000, is_measured=True)) + driver.do(Ticked(), after_ms=60))
    assert got == [(10, True)]
    driver.do(permit(drawn_mws=72_000, is_measured=False))  # a part of it is modelled: so is the share
    got = shares(driver.do(worked(1, drawn_mws=108_000, is_measured=True)) + driver.do(Ticked(), after_ms=60))
    assert got == [(20, False)]
    got = shares(driver.do(worked(2, drawn_mws=144_000, is_measured=True)) + driver.do(Ticked(), after_ms=60))
    assert got == [(10, True)]
    got = shares(driver.do(worked(3, drawn_mws=90_000, is_measured=True)) + driver.do(Ticked(), after_ms=60))
    assert got == [(0, True)]  # a count that goes back takes nothing back
    driver.do(Arrived(message=Sync()))
    assert (driver.states[-1].energy_mwh, driver.states[-1].energy_is_measured) == (40, False)


def test_all_measured_is_said_so_in_the_state() -> None:
    driver = Driver().ready()
    driver.do(permit(drawn_mws=7_200, is_measured=True))
    driver.do(Arrived(message=Sync()))
    assert (driver.states[-1].energy_mwh, driver.states[-1].energy_is_measured) == (2, True)


def test_a_guess_is_replaced_by_what_is_told_later_and_no_joule_counts_twice() -> None:
    driver = Driver().ready()
    driver.do(grant(*range(8)))
    got = shares(driver.do(EngineWorked(finished=finished("1-0"), busy_ms=3_600)) + driver.do(Ticked(), after_ms=60))
    assert got == [(100, False)]  # 3.6 s at 100 W
    driver.do(permit(drawn_mws=72_000, is_measured=True))  # in truth it was a fifth of that
    got = shares(driver.do(worked(1, drawn_mws=540_000, is_measured=True)) + driver.do(Ticked(), after_ms=60))
    assert got == [(50, True)]


def test_a_live_answer_carries_the_energy_since_the_last_one() -> None:
    driver = Driver().ready()
    driver.do(opened(stream=False))
    driver.do(permit(drawn_mws=1_234, is_measured=True))
    (answer,) = driver.do(EngineWorked(finished=finished("live-1")))
    assert isinstance(answer, PublishLive)
    assert isinstance(answer.message, Answered)
    said = answer.message.usage
    assert (said.energy_uwh, said.energy_is_measured) == (1_234 * 10 // 36, True)
    driver.do(opened("r2"))
    (end,) = driver.do(EngineWorked(finished=finished("live-2"), drawn_mws=4_834))
    assert isinstance(end, PublishLive)
    assert isinstance(end.message, Tokens)
    assert end.message.usage == Usage(prompt_tokens=5, completion_tokens=3, energy_uwh=1_000)
    error = Finished(key="live-3", status=400, body=b"{}", usage=Usage())
    driver.do(opened("r3"))
    (wrong,) = driver.do(EngineWorked(finished=[error], drawn_mws=10**15))
    assert isinstance(wrong, PublishLive)
    assert isinstance(wrong.message, Answered)
    assert wrong.message.usage.energy_uwh == 10**10  # more than one answer can carry


# -- what is told of the stay ------------------------------------------------------------------------------------------


def told(commands: list[Command]) -> list[State]:
    return [
        command.message
        for command in commands
        if isinstance(command, PublishState) and isinstance(command.message, State)
    ]


def test_a_new_bound_alone_is_told_once_a_minute_and_never_at_each_look() -> None:
    driver = Driver(msgspec.structs.replace(CONFIG, state_interval_ms=300_000)).ready()
    start_ms = driver.now_ms
    seen = []
    for look in range(480):  # two minutes
        bound = permit(stay_bound_ms=3_600_000 - look * 250, risk_15min=0.01)
        seen += told(driver.raw(bound, after_ms=250))
    assert [state.stay_bound_ms for state in seen] == [3_600_000 - look * 250 for look in (239, 479)]
    assert driver.now_ms - start_ms == 120_000
    assert seen[-1].risk_15min == 0.01
    watts = permit(90, stay_bound_ms=1, risk_15min=0.5)
    (urgent,) = told(driver.raw(watts, after_ms=250))
    assert (urgent.permit_w, urgent.stay_bound_ms, urgent.risk_15min) == (90, 1, 0.5)


def test_a_permit_from_the_battery_is_told_at_once() -> None:
    driver = Driver().ready()
    fed = VerdictGiven(permit=Permit(watts_w=100, until_ms=10**9, battery_fed=True), soc_pct=80.0, plugged=True)
    (state,) = told(driver.raw(fed))
    assert state.battery_fed
    (state,) = told(driver.raw(denial(DOOR)))
    assert not state.battery_fed


def test_messages_that_are_for_the_owner_change_nothing_here() -> None:
    driver = Driver().ready()
    assert driver.raw(Arrived(message=Statement(as_of_ms=1, earned_micro=2))) == []
