"""The scheduler against messages that come late, twice, doubled in themselves or from another lease."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from motorpool import wire
from motorpool.core import events as ev
from motorpool.core import granting
from motorpool.core import scheduler as sch
from motorpool.core.pricing import Price
from motorpool.core.scheduler import Scheduler
from motorpool.core.vehicle_leases import Growth, join
from motorpool.errors import CallerError, TooLargeError
from motorpool.types import MAX_CHECKPOINT_BYTES, MAX_ITEMS_PER_MESSAGE, Kind, ReturnReason, VehicleState

PRICE = Price(input_micro=1_000_000, output_micro=2_000_000)


def started(lines: int, length: int = 100, expires_ms: int = 3_600_000) -> ev.JobStarted:
    return ev.JobStarted(
        cause_id="c", job_no=1, job_id="batch_1", account="acme", kind=Kind.CHAT, model="m", price=PRICE,
        expires_ms=expires_ms, lengths=np.full(lines, length, dtype=np.uint32),
        limits=np.full(lines, 10_000, dtype=np.uint32),
    )  # fmt: skip


def report(vehicle: str, seq: int, **changes: Any) -> ev.VehicleReported:
    fields: dict[str, Any] = {"incarnation": "i1", "state": VehicleState.READY, "model": "m", "slots": 1}
    return ev.VehicleReported(cause_id="c", vehicle_id=vehicle, state=wire.State(seq=seq, **(fields | changes)))


def results(lease: ev.SendGrant, lines: list[int], statuses: list[int], message_id: str = "m1") -> ev.ResultsArrived:
    n = len(lines)
    return ev.ResultsArrived(
        cause_id="c", vehicle_id=lease.vehicle_id, lease_id=lease.lease_id, job_id="batch_1", message_id=message_id,
        lines=lines, statuses=statuses, prompt_tokens=[10] * n, completion_tokens=[5] * n, cached_tokens=[0] * n,
        carried_tokens=[0] * n, energy_mwh=0,
    )  # fmt: skip


def returned(lease: ev.SendGrant, lines: list[int], reason: ReturnReason, tokens: int = 0) -> ev.WorkReturned:
    n = len(lines)
    return ev.WorkReturned(
        cause_id="c", vehicle_id=lease.vehicle_id, lease_id=lease.lease_id, job_id="batch_1", reason=reason,
        lines=lines, tokens=[tokens] * n, sizes=[50] * n, started=[True] * n,
    )  # fmt: skip


def grants(commands: list[ev.Command]) -> list[ev.SendGrant]:
    return [command for command in commands if isinstance(command, ev.SendGrant)]


def of(commands: list[ev.Command], kind: type[ev.Command]) -> list[Any]:
    return [command for command in commands if isinstance(command, kind)]


def leased(lines: int, **changes: Any) -> tuple[Scheduler, ev.SendGrant]:
    scheduler = Scheduler()
    scheduler.handle(started(lines), 0)
    return scheduler, grants(scheduler.handle(report("v1", 1, **changes), 0))[0]


@pytest.mark.parametrize("statuses", [[500, 500], [500, 200], [200, 500], [200, 200]])
def test_a_line_that_stands_twice_in_one_message_counts_once(statuses: list[int]) -> None:
    scheduler, lease = leased(4)
    commands = scheduler.handle(results(lease, [0, 0], statuses), 10)
    scheduler.validate()
    assert sum(len(saved.picks) for saved in of(commands, ev.SaveResults)) == (statuses[0] == 200)


def test_a_line_that_is_handed_back_twice_in_one_message_waits_once() -> None:
    scheduler, lease = leased(4)
    scheduler.handle(returned(lease, [0, 0, 1, 1], ReturnReason.GUARD), 10)
    scheduler.validate()
    again = grants(scheduler.handle(report("v2", 1), 20))[0]
    assert again.lines == [0, 1]


def test_a_late_or_repeated_failure_is_not_held_against_a_line_that_runs_elsewhere() -> None:
    scheduler, lease = leased(2)
    failed = results(lease, [0], [500])
    scheduler.handle(failed, 10)
    scheduler.handle(report("v2", 1), 20)
    for _ in range(sch.MAX_STRIKES + 1):
        commands = scheduler.handle(failed, 30)
        assert not of(commands, ev.SaveResults)
    assert scheduler.jobs[1].strikes == {0: ["v1"]}
    scheduler.validate()


def test_a_long_answer_that_outlives_its_leases_goes_on_as_long_as_it_grows() -> None:
    scheduler, lease = leased(1)
    now = 0
    for turn in range(1, 3 * sch.MAX_STRIKES):
        now += sch.MIN_LEASE_MS
        commands = scheduler.handle(returned(lease, [0], ReturnReason.EXPIRED, tokens=100 * turn), now)
        assert not of(commands, ev.SaveFailures)
        lease = grants(commands)[0]
    lengths_ms = []
    while not of(commands, ev.SaveFailures):  # and one that does not grow any more gets more time, and then ends
        lengths_ms.append(lease.ttl_ms)
        now += lease.ttl_ms
        commands = scheduler.handle(returned(lease, [0], ReturnReason.EXPIRED), now)
        lease = grants(commands)[0] if grants(commands) else lease
    assert lengths_ms[:3] == [sch.MIN_LEASE_MS, 2 * sch.MIN_LEASE_MS, 4 * sch.MIN_LEASE_MS]
    assert lengths_ms.count(sch.MAX_LEASE_MS) == sch.MAX_STRIKES


def test_a_grant_counts_its_checkpoints_too() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(64), 0)
    lease = grants(scheduler.handle(report("v1", 1, slots=32), 0))[0]
    assert len(lease.lines) == 64
    size = granting.MAX_GRANT_BYTES // 8
    back = msgspec.structs.replace(
        returned(lease, lease.lines, ReturnReason.GUARD, tokens=9), sizes=[size] * len(lease.lines)
    )
    scheduler.handle(back, 10)
    given = grants(scheduler.handle(report("v2", 1, slots=32), 20))
    assert {len(grant.lines) for grant in given} == {7}, "seven with their bodies are below the bound, eight are not"


def test_after_a_start_what_was_finished_in_time_may_still_arrive() -> None:
    scheduler, lease = leased(2)
    saved = ev.SaveLease(
        lease_id=lease.lease_id, job_no=1, vehicle_id="v1", incarnation="i1", granted_ms=0, expires_ms=300_000,
        lines=[0, 1], base={},
    )  # fmt: skip
    scheduler = Scheduler(1)
    late = 4_000_000
    scheduler.restore_job(
        started(2), done=np.zeros(0, dtype=np.int64), carried={}, checkpoint_bytes={}, held={}, cancelling_ms=None
    )
    scheduler.restore_lease(saved)
    scheduler.resume(late, settled_ms=late + sch.SETTLE_MS)
    assert not of(scheduler.handle(ev.Ticked(cause_id="t"), late + 1_000), ev.AssembleFiles)
    assert of(scheduler.handle(results(lease, [0], [200]), late + 2_000), ev.SaveResults)
    assert of(scheduler.handle(ev.Ticked(cause_id="t"), late + sch.SETTLE_MS), ev.AssembleFiles)


def test_a_cancellation_is_told_again_after_a_start() -> None:
    scheduler = Scheduler(1)
    scheduler.restore_job(
        started(2), done=np.zeros(0, dtype=np.int64), carried={}, checkpoint_bytes={}, held={}, cancelling_ms=5
    )
    scheduler.restore_lease(
        ev.SaveLease(
            lease_id="l",
            job_no=1,
            vehicle_id="v1",
            incarnation="i1",
            granted_ms=0,
            expires_ms=300_000,
            lines=[0],
            base={},
        )
    )
    assert scheduler.resume(10, settled_ms=10) == [ev.SendRevoke(vehicle_id="v1", lease_id="l", keep_running=True)]


def test_a_live_answer_without_a_token_of_its_own_still_pays_for_the_prompt() -> None:
    scheduler = Scheduler()
    ended = ev.LiveEnded(
        cause_id="r", request_id="r", account="acme", price=PRICE, prompt_tokens=100, completion_tokens=0,
        finisher="v1", shares=[],
    )  # fmt: skip
    transfers = of(scheduler.handle(ended, 0), ev.PostTransfers)[0].transfers
    assert {transfer.credit: transfer.amount_micro for transfer in transfers} == {"platform": 100, "owner:v1": 70}
    carried = msgspec.structs.replace(ended, completion_tokens=50, finisher="v2", shares=[("v1", 50)])
    transfers = of(scheduler.handle(carried, 0), ev.PostTransfers)[0].transfers
    assert {transfer.credit: transfer.amount_micro for transfer in transfers} == {
        "platform": 200, "owner:v1": 70, "owner:v2": 70,
    }  # fmt: skip


def test_models_that_nobody_has_any_more_are_forgotten() -> None:
    scheduler = Scheduler()
    for seq in range(1, 50):
        scheduler.handle(report("v1", seq, model=f"m{seq}"), seq)
    assert (scheduler.serving("m49"), scheduler.serving("m48")) == (1, 0)
    assert len(scheduler.cell.model_names) <= 4, "whatever names a vehicle makes up"
    scheduler.validate()


@pytest.mark.parametrize(
    "item",
    [
        {"line": -1, "status": 200, "body": b""},
        {"line": 1 << 31, "status": 200, "body": b""},
        {"line": 0, "status": 0, "body": b""},
        {"line": 0, "status": 200, "body": b"", "prompt_tokens": -5},
        {"line": 0, "status": 200, "body": b"", "completion_tokens": 1 << 62},
    ],
)
def test_numbers_that_the_books_could_not_hold_are_refused_at_the_link(item: dict[str, Any]) -> None:
    message = wire.Results(incarnation="i", message_id="m", lease_id="l", job_id="j", items=[wire.ResultItem(**item)])
    with pytest.raises(CallerError):
        wire.decode(wire.UP_WORK, wire.encode(message))


def test_more_items_than_the_bound_are_refused_on_arrival_too() -> None:
    items = [wire.ReturnItem(line=0)] * (MAX_ITEMS_PER_MESSAGE + 1)
    message = wire.Returned(
        incarnation="i", message_id="m", lease_id="l", job_id="j", reason=ReturnReason.GUARD, items=items
    )
    with pytest.raises(TooLargeError):
        wire.decode(wire.UP_WORK, msgspec.msgpack.encode(message))


def test_a_checkpoint_that_fits_no_message_is_left_at_what_was_carried() -> None:
    growth = Growth()
    growth.add([wire.Delta(index=0, text="x" * (MAX_CHECKPOINT_BYTES - 200), token_ids=[1])])
    packed, tokens = join(None, 0, growth)
    assert packed is not None
    assert tokens == 1
    growth.add([wire.Delta(index=0, text="y" * 400, token_ids=[2])])
    carried = wire.encode_checkpoint(wire.Checkpoint(text="a", tokens=7, token_ids=[1] * 7))
    assert join(carried, 7, growth) == (carried, 7)
    assert join(None, 0, growth) == (None, 0)
