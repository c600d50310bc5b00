"""The vehicle machine: events in, the whole list of commands out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.vehicle_trial import (
    CONFIG,
    DOOR,
    GONE,
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

from motorpool.agent.runtime.engine import Finished, Progressed
from motorpool.core import vehicle_leases
from motorpool.core.vehicle_events import (
    Arrived,
    Attempt,
    CancelAttempts,
    EngineDied,
    EngineWorked,
    FreezeEngine,
    KillEngine,
    LinkChanged,
    PublishLive,
    PublishState,
    PublishWork,
    StopAsked,
    SubmitAttempts,
    ThawEngine,
    Ticked,
    WakeAt,
    WorkPublished,
)
from motorpool.core.vehicle_states import TRANSITIONS, Trigger
from motorpool.types import (
    MAX_BODY_BYTES,
    MAX_CHECKPOINT_BYTES,
    MAX_ITEMS_PER_MESSAGE,
    MAX_MESSAGE_BYTES,
    Kind,
    ReasonCode,
    ReturnReason,
    Usage,
    VehicleState,
)
from motorpool.wire import (
    Answered,
    Broken,
    Checkpoint,
    Close,
    Delta,
    Item,
    Progress,
    ResultItem,
    Results,
    Returned,
    ReturnItem,
    Revoke,
    State,
    Sync,
    Tokens,
    decode_checkpoint,
    encode,
    encode_checkpoint,
)

# -- the whole list of commands ----------------------------------------------------------------------------------------


def test_each_command_of_a_short_life_in_its_order() -> None:
    driver = Driver()
    t = driver.now_ms
    told = State(incarnation="inc", seq=1, state=VehicleState.STARTING, permit_w=100, soc_pct=80.0, plugged=True)
    assert driver.raw(permit()) == [*START, PublishState(message=told), WakeAt(at_ms=t + 5_000)]
    told = msgspec.structs.replace(told, seq=2, state=VehicleState.READY, model="m", slots=2, engine="null")
    assert driver.raw(READY) == [PublishState(message=told)]
    assert driver.raw(grant(1)) == [
        SubmitAttempts(attempts=[attempt(1)], created_s=1_000),
        WakeAt(at_ms=t + 100),
    ]
    assert driver.raw(EngineWorked(finished=finished("1-1"), busy_ms=72), after_ms=50) == [
        results(1, result(1), energy_mwh=2)
    ]
    told = msgspec.structs.replace(told, seq=3, tokens_generated=3, energy_mwh=2)
    assert driver.raw(WorkPublished(message_ids=["inc-1"]), after_ms=50) == [
        PublishState(message=told),
        WakeAt(at_ms=t + 5_100),
    ]


def test_a_permit_starts_the_engine_and_work_flows_through() -> None:
    driver = Driver()
    assert driver.do(Ticked()) == []
    assert driver.do(permit()) == START
    assert driver.do(permit()) == []
    assert driver.do(READY) == []
    submitted = SubmitAttempts(attempts=[attempt(1), attempt(2)], created_s=1_000)
    assert driver.do(grant(1, 2, 3)) == [submitted]
    assert driver.do(grant(1, 2, 3)) == []
    assert driver.do(EngineWorked(finished=finished("1-1"))) == [SubmitAttempts(attempts=[attempt(3)], created_s=1_000)]
    assert driver.do(Ticked(), after_ms=49) == []
    assert driver.do(Ticked(), after_ms=1) == [results(1, result(1))]
    assert driver.do(EngineWorked(finished=finished("1-2", "1-3"))) == [results(2, result(2), result(3))]
    assert driver.machine.held == ["l1"]
    assert driver.do(WorkPublished(message_ids=["inc-1"])) == []
    assert driver.machine.held == ["l1"]
    assert driver.do(WorkPublished(message_ids=["inc-2", "unknown"])) == []
    assert driver.machine.held == []
    assert driver.do(grant(1, 2, 3)) == []
    assert [state.state for state in driver.states] == [
        VehicleState.DENIED,
        VehicleState.STARTING,
        VehicleState.READY,
    ]


def test_the_owner_comes_and_everything_goes_back_after_the_freeze() -> None:
    driver = Driver().ready()
    driver.do(grant(1, 2, 3, 4))
    driver.do(opened())
    driver.do(EngineWorked(progressed=[grown("1-2", "ab", "c"), grown("live-1", "x")], finished=finished("1-1")))
    checkpoint = encode_checkpoint(Checkpoint(text="abc", tokens=2, token_ids=[2, 1]))
    live = encode_checkpoint(Checkpoint(text="x", tokens=1, token_ids=[1]))
    assert driver.do(denial()) == [
        FreezeEngine(),
        results(1, result(1)),
        returned(
            2,
            ReturnReason.GUARD,
            ReturnItem(line=2, tokens=2, checkpoint=checkpoint, started=True),
            ReturnItem(line=3, started=True),
            ReturnItem(line=4),
        ),
        PublishLive(message=Broken(request_id="r1", attempt=0, reason=ReturnReason.GUARD, checkpoint=live)),
    ]
    assert driver.states[-1].state is VehicleState.YIELDING
    assert driver.states[-1].reasons == list(DOOR)
    assert driver.states[-1].held == ["l1"]
    assert driver.do(Ticked(), after_ms=4_999) == []
    assert driver.do(Ticked(), after_ms=1) == [KillEngine()]
    assert driver.machine.state is VehicleState.DENIED
    assert driver.do(EngineWorked(finished=finished("1-2"))) == []
    assert driver.do(permit()) == START


def test_an_engine_that_cannot_be_frozen_is_killed_once_its_work_has_gone_back() -> None:
    driver = Driver(msgspec.structs.replace(CONFIG, freeze_grace_ms=0)).ready()
    driver.do(grant(1, 2))
    driver.do(EngineWorked(progressed=[grown("1-1", "abc")]))
    checkpoint = encode_checkpoint(Checkpoint(text="abc", tokens=1, token_ids=[3]))
    assert driver.do(denial()) == [
        FreezeEngine(),
        returned(
            1,
            ReturnReason.GUARD,
            ReturnItem(line=1, tokens=1, checkpoint=checkpoint, started=True),
            ReturnItem(line=2, started=True),
        ),
        KillEngine(),
    ]
    assert driver.machine.state is VehicleState.DENIED


def test_an_owner_who_really_leaves_gets_the_memory_back_at_once() -> None:
    driver = Driver().ready()
    driver.do(grant(1))
    assert driver.do(denial(GONE)) == [
        FreezeEngine(),
        returned(1, ReturnReason.GUARD, ReturnItem(line=1, started=True)),
        KillEngine(),
    ]
    waiting = Driver().ready()
    assert waiting.do(denial()) == [FreezeEngine()]
    assert waiting.do(denial(GONE)) == [KillEngine()]
    loading = Driver()
    loading.do(permit())
    assert loading.do(denial()) == [KillEngine()]
    assert loading.do(READY) == []
    assert loading.machine.state is VehicleState.DENIED


def test_a_thawed_engine_does_not_continue_what_was_handed_back() -> None:
    driver = Driver().ready()
    driver.do(grant(1, 2, 3))
    driver.do(opened())
    driver.do(denial())
    assert driver.do(permit(), after_ms=1_000) == [CancelAttempts(keys=["1-1", "1-2", "live-1"]), ThawEngine()]
    assert driver.machine.state is VehicleState.READY
    assert driver.do(EngineWorked(finished=finished("1-1"), cancelled=["1-2"])) == []
    assert driver.do(grant(1, lease="l2")) == [SubmitAttempts(attempts=[attempt(1, "l2", 2)], created_s=1_001)]


def test_a_permit_that_is_not_renewed_ends_by_itself() -> None:
    driver = Driver().ready()
    driver.do(permit(until_ms=driver.now_ms + 2_000))
    driver.do(grant(1))
    back = returned(1, ReturnReason.GUARD, ReturnItem(line=1, started=True))
    assert driver.do(Ticked(), after_ms=1_999) == []
    assert driver.do(grant(9, lease="l2"), after_ms=1)[:2] == [FreezeEngine(), back]
    assert [reason.code for reason in driver.machine.reasons] == [ReasonCode.SIGNAL_STALE]


def test_what_cannot_run_here_is_refused() -> None:
    cold = Driver()
    item = ReturnItem(line=1)
    assert cold.do(grant(1)) == [returned(1, ReturnReason.REFUSED, item)]
    assert cold.do(grant(1)) == []
    driver = Driver(msgspec.structs.replace(CONFIG, max_queued=2)).ready()
    refusals: list[dict[str, Any]] = [{"incarnation": "old"}, {"model": "other"}, {"ttl_ms": 0}]
    for number, changes in enumerate(refusals, start=1):
        refused = returned(number, ReturnReason.REFUSED, item, lease=f"x{number}")
        assert driver.do(grant(1, lease=f"x{number}", **changes)) == [refused]
    too_many = driver.do(grant(1, 2, 3, lease="x4"))
    assert too_many == [returned(4, ReturnReason.REFUSED, *[ReturnItem(line=line) for line in (1, 2, 3)], lease="x4")]
    twice = driver.do(grant(1, 1, lease="x5"))
    assert twice == [returned(5, ReturnReason.REFUSED, item, lease="x5")]
    driver.do(WorkPublished(message_ids=[f"inc-{number}" for number in range(1, 6)]))
    assert driver.machine.held == []


def test_the_checkpoints_that_wait_count_in_the_bound_of_what_is_held() -> None:
    large = encode_checkpoint(Checkpoint(text="x" * 1_000, tokens=7))
    config = msgspec.structs.replace(CONFIG, max_queued_bytes=3 * len(large))
    driver = Driver(config).ready()
    items = [Item(line=line, body=b"b", checkpoint=large) for line in range(2)]
    for lease in ("l1", "l2"):
        driver.do(grant(lease=lease, items=items))  # the engine takes two, two wait
    refused = driver.do(grant(lease="l3", items=items))
    back = [ReturnItem(line=line, tokens=7, checkpoint=large) for line in range(2)]
    assert refused == [returned(1, ReturnReason.REFUSED, *back, lease="l3")]
    driver.do(EngineWorked(finished=finished("1-0", "1-1")))
    driver.do(Ticked(), after_ms=50)
    assert driver.do(grant(lease="l4", items=items)) == []


def test_what_comes_with_a_lease_is_read_when_it_comes_and_not_on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver().ready()
    carried = encode_checkpoint(Checkpoint(text="one two", tokens=2, token_ids=[1, 2]))
    driver.do(grant(items=[Item(line=line, body=b"b", checkpoint=carried) for line in range(4)]))

    def too_late(_data: bytes) -> int:
        raise AssertionError("the owner waits")

    monkeypatch.setattr(vehicle_leases, "checkpoint_tokens", too_late)
    monkeypatch.setattr(vehicle_leases, "decode_checkpoint", too_late)
    back = [ReturnItem(line=line, tokens=2, checkpoint=carried, started=line < 2) for line in range(4)]
    assert driver.do(denial()) == [FreezeEngine(), returned(1, ReturnReason.GUARD, *back)]


def test_damaged_checkpoints_go_back_as_they_came() -> None:
    driver = Driver().ready()
    sound = encode_checkpoint(Checkpoint(text="abcd", tokens=3))
    damaged = [sound.replace(b"abcd", b"\xff\xfe\xfd\xfc"), sound[:-1], b"\x91" * 100_000 + b"\xc0", b""]
    driver.do(grant(items=[Item(line=line, body=b"b", checkpoint=data) for line, data in enumerate(damaged)]))
    back = [ReturnItem(line=line, checkpoint=data, started=line < 2) for line, data in enumerate(damaged)]
    assert driver.do(denial()) == [FreezeEngine(), returned(1, ReturnReason.GUARD, *back)]


def test_closed_leases_are_remembered_up_to_a_bound() -> None:
    driver = Driver(msgspec.structs.replace(CONFIG, max_closed=1)).ready()
    for lease in ("l1", "l2"):
        driver.do(grant(1, lease=lease))
        driver.do(Arrived(message=Revoke(lease_id=lease)))
    driver.do(WorkPublished(message_ids=["inc-1", "inc-2"]))
    assert driver.do(grant(1, lease="l2")) == []
    assert driver.do(grant(1, lease="l1")) == [SubmitAttempts(attempts=[attempt(1, "l1", 3)], created_s=1_000)]


def test_a_lease_that_runs_out_is_cancelled_and_goes_back() -> None:
    driver = Driver().ready()
    driver.do(grant(1, 2, 3, ttl_ms=1_000))
    driver.do(EngineWorked(progressed=[grown("1-1", "hello")]))
    checkpoint = encode_checkpoint(Checkpoint(text="hello", tokens=1, token_ids=[5]))
    assert driver.do(Ticked(), after_ms=1_000) == [
        CancelAttempts(keys=["1-1", "1-2"]),
        returned(
            1,
            ReturnReason.EXPIRED,
            ReturnItem(line=1, tokens=1, checkpoint=checkpoint, started=True),
            ReturnItem(line=2, started=True),
            ReturnItem(line=3),
        ),
    ]


def test_a_revocation_takes_what_it_names() -> None:
    driver = Driver().ready()
    driver.do(grant(1, 2, 3, 4))
    kept = Arrived(message=Revoke(lease_id="l1", lines=None, keep_running=True))
    assert driver.do(Arrived(message=Revoke(lease_id="l1", lines=[3]))) == [
        returned(1, ReturnReason.REVOKED, ReturnItem(line=3))
    ]
    assert driver.do(kept) == [returned(2, ReturnReason.REVOKED, ReturnItem(line=4))]
    assert driver.do(Arrived(message=Revoke(lease_id="l1", lines=[1]))) == [
        CancelAttempts(keys=["1-1"]),
        returned(3, ReturnReason.REVOKED, ReturnItem(line=1, started=True)),
    ]
    assert driver.do(Arrived(message=Revoke(lease_id="unknown"))) == []
    assert driver.do(EngineWorked(finished=finished("1-1", "1-2"))) == [results(4, result(2))]


def test_an_engine_that_missed_its_agents_word_is_held_against_no_line() -> None:
    driver = Driver().ready()
    driver.do(grant(1))
    assert driver.do(EngineDied(exit_code=5, unheard=True)) == [
        returned(1, ReturnReason.GUARD, ReturnItem(line=1, started=True))
    ]
    assert driver.machine.state is VehicleState.STARTING


def test_a_dead_engine_gives_back_and_starts_again_more_and_more_slowly() -> None:
    driver = Driver().ready()
    driver.do(grant(1, 2, 3))
    driver.do(opened(stream=False))
    assert driver.do(EngineDied(exit_code=-9)) == [
        returned(
            1,
            ReturnReason.ENGINE_DIED,
            ReturnItem(line=1, started=True),
            ReturnItem(line=2, started=True),
            ReturnItem(line=3),
        ),
        PublishLive(message=Broken(request_id="r1", attempt=0, reason=ReturnReason.ENGINE_DIED)),
    ]
    assert driver.machine.state is VehicleState.STARTING
    for wait_ms in (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000):
        assert driver.do(Ticked(), after_ms=wait_ms - 1) == []
        assert driver.do(Ticked(), after_ms=1) == START
        assert driver.do(EngineDied(exit_code=1)) == []
    driver.do(Ticked(), after_ms=60_000)
    driver.do(READY)
    driver.do(Ticked(), after_ms=60_000)
    driver.do(EngineDied(exit_code=1))
    assert driver.do(Ticked(), after_ms=1_000) == START


def test_a_stop_gives_everything_back_and_nothing_starts_again() -> None:
    driver = Driver().ready()
    driver.do(grant(1))
    assert driver.do(StopAsked()) == [
        FreezeEngine(),
        returned(1, ReturnReason.SHUTDOWN, ReturnItem(line=1, started=True)),
        KillEngine(),
    ]
    assert driver.do(permit()) == []
    assert driver.do(grant(1, lease="l2")) == [returned(2, ReturnReason.REFUSED, ReturnItem(line=1), lease="l2")]
    assert driver.machine.undelivered == 2


# -- text, tokens, energy ----------------------------------------------------------------------------------------------


def test_a_checkpoint_goes_on_where_the_carried_one_ended() -> None:
    driver = Driver().ready()
    carried = Checkpoint(text="one", tokens=1, token_ids=[7], logprobs=b'[{"a":1}]', prompt_tokens=9)
    items = [Item(line=1, body=b"", checkpoint=encode_checkpoint(carried)), Item(line=2, body=b"", checkpoint=b"bad")]
    driver.do(grant(items=items))
    progressed = [grown("1-1", " two", logprobs=b' [ {"b":2} ] '), grown("1-2", "x"), grown("1-1", " three")]
    driver.do(EngineWorked(progressed=progressed))
    back = driver.do(denial())[1]
    assert isinstance(back, PublishWork)
    first, second = back.message.items
    assert isinstance(first, ReturnItem)
    assert isinstance(second, ReturnItem)
    assert decode_checkpoint(first.checkpoint or b"") == Checkpoint(
        text="one two three", tokens=3, token_ids=[7, 4, 6], logprobs=b'[{"a":1},{"b":2}]', prompt_tokens=9
    )
    begun_anew = Checkpoint(text="x", tokens=1, token_ids=[1])  # as the engine did, which could not read it either
    assert (second.checkpoint, second.tokens) == (encode_checkpoint(begun_anew), 1)


def test_ids_that_are_not_all_known_are_left_out_and_each_of_several_choices_is_handed_back() -> None:
    driver = Driver().ready()
    driver.do(grant(1, 2))
    without_ids = Progressed(key="1-1", deltas=[Delta(index=0, text="a"), Delta(index=0, text="b", token_ids=[1])])
    driver.do(EngineWorked(progressed=[without_ids, grown("1-2", "p"), grown("1-2", "q", index=1)]))
    back = driver.do(denial())[1]
    assert isinstance(back, PublishWork)
    first, second = back.message.items
    assert isinstance(first, ReturnItem)
    assert decode_checkpoint(first.checkpoint or b"") == Checkpoint(text="ab", tokens=2)
    assert isinstance(second, ReturnItem)
    assert second.tokens == 2
    assert [each.text for each in decode_checkpoint(second.checkpoint or b"").choices] == ["p", "q"]


def test_long_answers_are_told_every_two_seconds_when_they_have_grown() -> None:
    driver = Driver().ready()
    driver.do(grant(1, 2))
    driver.do(EngineWorked(progressed=[grown("1-1", "a")]), after_ms=500)
    (progress,) = driver.do(Ticked(), after_ms=1_500)
    assert isinstance(progress, PublishState)
    assert isinstance(progress.message, Progress)
    (item,) = progress.message.items
    assert (item.line, item.tokens, decode_checkpoint(item.checkpoint).text) == (1, 1, "a")
    assert driver.do(Ticked(), after_ms=2_000) == []


def test_energy_is_working_time_at_the_permits_power_and_no_part_is_lost() -> None:
    driver = Driver().ready()
    driver.do(grant(*range(10)))
    told = 0
    for line in range(10):
        commands = driver.do(EngineWorked(finished=finished(f"1-{line}"), busy_ms=(line + 1) * 1_000))
        for command in commands + driver.do(Ticked(), after_ms=60):
            if isinstance(command, PublishWork) and isinstance(command.message, Results):
                told += command.message.energy_mwh
    driver.do(Arrived(message=Sync()))
    assert driver.states[-1].energy_mwh == told == 10 * 1_000 * 100 // 3600
    assert not driver.states[-1].energy_is_measured
    assert driver.states[-1].tokens_generated == 30


def test_full_messages_go_out_at_once_and_an_answer_beyond_the_bound_becomes_an_error() -> None:
    config = msgspec.structs.replace(CONFIG, flush_items=2, flush_bytes=100)
    driver = Driver(config).ready()
    driver.do(grant(*range(6)))
    assert driver.do(EngineWorked(finished=finished("1-0")))[0:] == [
        SubmitAttempts(attempts=[attempt(2)], created_s=1_000)
    ]
    assert driver.do(EngineWorked(finished=finished("1-1")))[0] == results(1, result(0), result(1))
    (first, *_) = driver.do(EngineWorked(finished=finished("1-2", body=b"x" * 100)))
    assert isinstance(first, PublishWork)
    (big, *_) = driver.do(EngineWorked(finished=finished("1-3", body=b"x" * (4 * 1024 * 1024 + 1))))
    assert isinstance(big, PublishWork)
    (item,) = big.message.items
    assert isinstance(item, ResultItem)
    assert item.status == 413
    assert msgspec.json.decode(item.body)["error"]["code"] == "body_too_large"


def test_a_full_outbox_stops_new_work_until_it_drains() -> None:
    driver = Driver(msgspec.structs.replace(CONFIG, max_outbox_items=2)).ready()
    driver.do(grant(1, 2, 3, 4))
    assert driver.do(EngineWorked(finished=finished("1-1", "1-2"))) == [
        SubmitAttempts(attempts=[attempt(3), attempt(4)], created_s=1_000)
    ]
    driver.do(grant(5, lease="l2"))
    driver.do(Ticked(), after_ms=50)
    assert driver.do(EngineWorked(finished=finished("1-3", "1-4"))) == [results(2, result(3), result(4))]
    assert driver.machine.state is VehicleState.READY
    assert driver.do(WorkPublished(message_ids=["inc-1", "inc-2"])) == [
        SubmitAttempts(attempts=[attempt(5, "l2", 2)], created_s=1_000)
    ]


def test_a_fast_engine_gets_a_deeper_window() -> None:
    driver = Driver().ready()
    driver.do(grant(*range(5_000)))
    waiting = ["1-0", "1-1"]
    deepest = 0
    for _ in range(100):
        commands = driver.do(EngineWorked(finished=finished(*waiting)), after_ms=1)
        waiting = [a.key for c in commands if isinstance(c, SubmitAttempts) for a in c.attempts]
        deepest = max(deepest, len(waiting))
    assert deepest > 20


# -- live requests -----------------------------------------------------------------------------------------------------


def live(request: str, stream: bool, number: int = 1) -> SubmitAttempts:
    one = Attempt(key=f"live-{number}", kind=Kind.CHAT, body=b"live", response_id=f"chatcmpl-{request}", stream=stream)
    return SubmitAttempts(attempts=[one], created_s=1_000)


def test_a_stream_from_open_to_usage() -> None:
    driver = Driver().ready()
    driver.do(grant(1, 2, 3))
    assert driver.do(opened()) == [live("r1", stream=True)]
    assert driver.do(opened()) == []
    delta = grown("live-1", "hi")
    tokens = Tokens(request_id="r1", attempt=0, seq=0, deltas=delta.deltas, engine="null")
    assert driver.do(EngineWorked(progressed=[delta])) == [PublishLive(message=tokens)]
    (end,) = driver.do(EngineWorked(finished=finished("live-1")))
    usage = Usage(prompt_tokens=5, completion_tokens=3)
    assert end == PublishLive(message=Tokens(request_id="r1", attempt=0, seq=1, deltas=[], usage=usage, engine="null"))


def test_plain_answers_errors_and_those_that_nobody_waits_for() -> None:
    driver = Driver().ready()
    driver.do(opened(stream=False))
    usage = Usage(prompt_tokens=5, completion_tokens=3)
    answer = Answered(request_id="r1", attempt=0, status=200, body=b"{}", usage=usage)
    assert driver.do(EngineWorked(finished=finished("live-1"))) == [PublishLive(message=answer)]
    driver.do(opened("r2"))
    error = Finished(key="live-2", status=400, body=b"no", usage=Usage())
    assert driver.do(EngineWorked(finished=[error])) == [
        PublishLive(message=Answered(request_id="r2", attempt=0, status=400, body=b"no"))
    ]
    driver.do(opened("r3"))
    assert driver.do(Arrived(message=Close(request_id="r3"))) == [CancelAttempts(keys=["live-3"])]
    assert driver.do(Arrived(message=Close(request_id="r3"))) == []
    driver.do(opened("r4"))
    assert driver.do(opened("r4", attempt=1)) == [CancelAttempts(keys=["live-4"]), live("r4", True, 5)]
    refused = Broken(request_id="r5", attempt=0, reason=ReturnReason.REFUSED)
    assert driver.do(opened("r5", model="other")) == [PublishLive(message=refused)]


def test_a_dead_link_ends_streams_and_tells_so_when_it_is_back() -> None:
    driver = Driver().ready()
    driver.do(opened())
    driver.do(grant(1))
    driver.do(EngineWorked(progressed=[grown("live-1", "hi")]))
    assert driver.do(LinkChanged(up=False)) == [CancelAttempts(keys=["live-1"])]
    checkpoint = encode_checkpoint(Checkpoint(text="hi", tokens=1, token_ids=[2]))
    broken = Broken(request_id="r1", attempt=0, reason=ReturnReason.EXPIRED, checkpoint=checkpoint)
    told = len(driver.states)
    assert driver.do(LinkChanged(up=True)) == [PublishLive(message=broken)]
    assert len(driver.states) == told + 1
    assert driver.states[-1].held == ["l1"]


# -- what is told, and when --------------------------------------------------------------------------------------------


def test_state_is_told_on_change_and_every_few_seconds() -> None:
    driver = Driver().ready()
    told = len(driver.states)
    driver.do(grant(1, 2, 3))
    assert len(driver.states) == told
    driver.do(Ticked(), after_ms=100)
    assert len(driver.states) == told + 1
    assert (driver.states[-1].running, driver.states[-1].queued, driver.states[-1].held) == (2, 1, ["l1"])
    driver.do(Ticked(), after_ms=4_999)
    assert len(driver.states) == told + 1
    driver.do(Ticked(), after_ms=1)
    driver.do(Arrived(message=Sync()))
    assert len(driver.states) == told + 3
    assert [state.seq for state in driver.states] == list(range(1, len(driver.states) + 1))


def test_it_asks_to_be_woken_for_whatever_is_due_first() -> None:
    driver = Driver()
    driver.raw(permit())
    driver.raw(READY)
    driver.raw(Ticked(), after_ms=200)
    start_ms = driver.now_ms
    driver.raw(grant(1, 2, ttl_ms=900))
    driver.raw(EngineWorked(finished=finished("1-1")))
    due = []
    for _ in range(4):
        commands = driver.raw(Ticked(), after_ms=0)
        wake = driver.machine._wake_at_ms
        assert wake is not None
        due.append(wake - start_ms)
        driver.now_ms = max(driver.now_ms, wake)
        del commands
    assert due[0] <= 50
    assert due == sorted(due)
    assert 900 in due


def test_the_table_names_every_state_and_leads_out_of_each() -> None:
    assert {state for state, _ in TRANSITIONS} == set(VehicleState)
    assert set(TRANSITIONS.values()) == set(VehicleState)
    assert {trigger for _, trigger in TRANSITIONS} == set(Trigger)


def test_an_engine_without_a_sign_of_life_is_killed_and_its_work_goes_back() -> None:
    driver = Driver(msgspec.structs.replace(CONFIG, stall_ms=60_000)).ready()
    driver.do(grant(1, 2, 3))
    driver.do(EngineWorked(busy_ms=50_000), after_ms=59_999)  # that time passes is no sign of life
    back = returned(
        1,
        ReturnReason.ENGINE_DIED,
        ReturnItem(line=1, started=True),
        ReturnItem(line=2, started=True),
        ReturnItem(line=3),
    )
    assert driver.do(Ticked(), after_ms=1) == [KillEngine(), back]
    assert driver.machine.state is VehicleState.STARTING
    assert driver.do(Ticked(), after_ms=CONFIG.restart_min_ms) == START


def test_an_engine_that_moves_or_has_nothing_to_do_is_left_alone() -> None:
    driver = Driver(msgspec.structs.replace(CONFIG, stall_ms=60_000)).ready()
    assert driver.do(Ticked(), after_ms=200_000) == []
    driver.do(grant(1))
    for _ in range(5):
        assert KillEngine() not in driver.do(EngineWorked(progressed=[grown("1-1", "x")]), after_ms=40_000)
    driver.do(EngineWorked(finished=finished("1-1")))
    assert KillEngine() not in driver.do(Ticked(), after_ms=200_000)
    driver.do(grant(1, lease="l2"))
    driver.do(denial(), after_ms=50_000)
    driver.do(permit(), after_ms=1_000)
    assert KillEngine() not in driver.do(Ticked(), after_ms=50_000)


def test_work_that_was_taken_from_a_hanging_engine_does_not_excuse_it() -> None:
    driver = Driver(msgspec.structs.replace(CONFIG, stall_ms=60_000)).ready()
    driver.do(grant(1, ttl_ms=40_000))
    assert CancelAttempts(keys=["1-1"]) in driver.do(Ticked(), after_ms=40_000)  # and it never says that it is done
    driver.do(grant(1, lease="l2"))
    assert KillEngine() in driver.do(Ticked(), after_ms=20_000)


def test_answers_that_no_message_can_carry_end_in_an_error() -> None:
    driver = Driver().ready()
    driver.do(opened("plain", stream=False))
    driver.do(opened("stream", stream=True))
    driver.do(opened("other", stream=True))
    (told,) = driver.do(EngineWorked(finished=finished("live-1", body=b"x" * (MAX_BODY_BYTES + 1))))
    assert isinstance(told, PublishLive)
    assert isinstance(told.message, Answered)
    assert (told.message.request_id, told.message.status) == ("plain", 413)
    assert b"body_too_large" in told.message.body
    huge = grown("live-2", "x", logprobs=b"[" + b" " * MAX_BODY_BYTES + b"]")
    cancel, told = driver.do(EngineWorked(progressed=[huge, grown("live-3", "y")]))[:2]
    assert cancel == CancelAttempts(keys=["live-2"])
    assert isinstance(told, PublishLive)
    assert isinstance(told.message, Answered)
    assert (told.message.request_id, told.message.status) == ("stream", 413)
    (told,) = driver.do(EngineWorked(progressed=[grown("live-3", "z")], cancelled=["live-2"]))
    assert isinstance(told, PublishLive)
    assert isinstance(told.message, Tokens)
    assert (told.message.request_id, told.message.seq) == ("other", 1)


def test_everything_that_is_told_fits_into_a_message() -> None:
    driver = Driver().ready()
    large = encode_checkpoint(Checkpoint(text="x" * (MAX_CHECKPOINT_BYTES - 100), tokens=3))
    for lease in range(4):
        driver.do(grant(lease=f"l{lease}", items=[Item(line=n, body=b"b", checkpoint=large) for n in range(2)]))
    driver.do(opened("r", stream=True))
    parts = [grown("live-1", "x" * 100_000, logprobs=b"[" + b" " * 1_000_000 + b"]") for _ in range(9)]
    out = driver.do(EngineWorked(progressed=[*parts, grown("1-0", "y" * 5_000)]))
    streamed = [c.message for c in out if isinstance(c, PublishLive) and isinstance(c.message, Tokens)]
    assert [message.seq for message in streamed] == list(range(9))
    joined = [Delta(index=0, text="x" * 100_000, logprobs=b"[" + b" " * 1_000_000 + b"]") for _ in range(9)]
    driver.do(opened("s", stream=True))
    out += driver.do(EngineWorked(progressed=[Progressed(key="live-2", deltas=joined)]))
    out += driver.do(Ticked(), after_ms=5_000)
    out += driver.do(denial())
    told = [c.message for c in out if isinstance(c, PublishWork | PublishLive | PublishState)]
    assert all(len(encode(message)) <= MAX_MESSAGE_BYTES for message in told)
    items = [item for m in told if isinstance(m, Returned) for item in m.items]
    assert sorted(item.line for item in items) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(item.checkpoint == large for item in items)  # with 5,000 more it would have been too long


def test_more_leases_than_a_state_can_name_are_not_taken() -> None:
    driver = Driver()  # refuses everything, and nothing that it says gets through
    for number in range(MAX_ITEMS_PER_MESSAGE + 5):
        driver.do(grant(1, lease=f"l{number}"))
    assert len(driver.machine.held) == MAX_ITEMS_PER_MESSAGE
