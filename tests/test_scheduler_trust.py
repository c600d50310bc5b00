"""The scheduler and vehicles that lie, fail or hoard: what they say of lines that were never theirs changes nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from tests.test_scheduler import LIMIT_TOKENS, grants, of, report, results, returned, started

from motorpool.core import events as ev
from motorpool.core import granting
from motorpool.core import scheduler as sch
from motorpool.core.accepted import MAX_TEMPLATE_TOKENS
from motorpool.core.granting import BACKOFF_MS
from motorpool.core.kernels import work_of
from motorpool.core.scheduler import Scheduler
from motorpool.types import ReturnReason, VehicleState


def tick(scheduler: Scheduler, now_ms: int) -> list[ev.Command]:
    return scheduler.handle(ev.Ticked(cause_id="t"), now_ms)


def progress(vehicle: str, lease: str, line: int, tokens: int) -> ev.ProgressMade:
    return ev.ProgressMade(
        cause_id="c", vehicle_id=vehicle, lease_id=lease, job_id="batch_1", lines=[line], tokens=[tokens], sizes=[10]
    )


def two_vehicles(lines: int = 8) -> tuple[Scheduler, ev.SendGrant]:
    """``good`` holds the first lines, ``evil`` is enrolled and denied."""
    scheduler = Scheduler()
    scheduler.handle(started(lines), 0)
    lease = grants(scheduler.handle(report("good", 1), 0))[0]
    scheduler.handle(report("evil", 1, state=VehicleState.DENIED), 0)
    return scheduler, lease


@pytest.mark.parametrize("tokens", [5, LIMIT_TOKENS])
def test_who_never_held_a_line_cannot_finish_return_or_continue_it(tokens: int) -> None:
    scheduler, lease = two_vehicles()
    for line in range(8):
        assert scheduler.handle(results("evil", lease.lease_id, [line]), 10) == []
        assert scheduler.handle(progress("evil", lease.lease_id, line, tokens), 10) == []
        assert scheduler.handle(returned("evil", lease.lease_id, [line], tokens=[tokens]), 10) == []
        scheduler.validate()
    assert of(scheduler.handle(progress("good", lease.lease_id, 0, 1), 20), ev.SaveCheckpoints)


@pytest.mark.parametrize("job", ["batch_2", "nonsense"])
@pytest.mark.parametrize("vehicle", ["good", "evil"])
def test_a_message_that_names_a_lease_of_another_job_changes_nothing(job: str, vehicle: str) -> None:
    scheduler, lease = two_vehicles()
    scheduler.handle(started(8, job_no=2), 0)
    wrong = msgspec.structs.replace(returned(vehicle, lease.lease_id, lease.lines), job_id=job)
    commands = scheduler.handle(wrong, 10)
    assert not of(commands, ev.DropLease) + of(commands, ev.SaveHeld)
    assert lease.lease_id in scheduler.leases
    assert not of(scheduler.handle(results(vehicle, lease.lease_id, [7], job=job), 20), ev.SaveResults)
    scheduler.validate()


def test_who_held_a_line_once_may_still_finish_it_also_after_a_restart() -> None:
    scheduler, lease = two_vehicles(2)
    back = scheduler.handle(returned("good", lease.lease_id, lease.lines), 10)
    assert of(back, ev.SaveHeld) == [ev.SaveHeld(job_no=1, vehicle_id="good", lines=[0, 1])]
    assert of(scheduler.handle(results("good", lease.lease_id, [0]), 20), ev.SaveResults)
    scheduler = Scheduler(1)
    scheduler.restore_job(
        started(2),
        done=np.array([0], dtype=np.int64),
        carried={},
        checkpoint_bytes={},
        held={0: ("good",), 1: ("good",)},
        cancelling_ms=None,
    )
    scheduler.resume(30, settled_ms=30)
    assert not of(scheduler.handle(results("evil", lease.lease_id, [1]), 40), ev.SaveResults)
    assert of(scheduler.handle(results("good", lease.lease_id, [1]), 50), ev.SaveResults)


def test_nobody_pays_for_more_tokens_than_a_line_can_have() -> None:
    scheduler, lease = two_vehicles()
    claimed = results("good", lease.lease_id, [0], prompt_tokens=[1 << 24], completion_tokens=[1 << 24])
    commands = scheduler.handle(claimed, 10)
    counts = of(commands, ev.SaveJobCounts)[0]
    assert (counts.prompt_tokens, counts.completion_tokens) == (100 + MAX_TEMPLATE_TOKENS, LIMIT_TOKENS)
    assert any("claimed more tokens" in note.what for note in of(commands, ev.Note))
    assert scheduler.handle(progress("good", lease.lease_id, 1, LIMIT_TOKENS + 1), 20) == []


@pytest.mark.parametrize("how", ["500", "died"])
def test_a_vehicle_at_which_everything_fails_fails_no_batch_beside_a_healthy_one(how: str) -> None:
    scheduler = Scheduler()
    scheduler.handle(started(200), 0)
    pending = {"bad": grants(scheduler.handle(report("bad", 1), 0)), "good": []}
    pending["good"] = grants(scheduler.handle(report("good", 1), 0))
    failures: list[Any] = []
    seq = now = 1
    for _ in range(2_000):
        if not scheduler.jobs:
            break
        now += 250
        for vehicle in ("bad", "good"):
            leases, pending[vehicle] = pending[vehicle], []
            commands = []
            for lease in leases:
                seq += 1
                event: ev.SchedulerEvent = results("good", lease.lease_id, lease.lines, message_id=str(seq))
                if vehicle == "bad" and how == "500":
                    event = results("bad", lease.lease_id, lease.lines, statuses=[500] * len(lease.lines))
                elif vehicle == "bad":
                    event = returned("bad", lease.lease_id, lease.lines, reason=ReturnReason.ENGINE_DIED)
                commands += scheduler.handle(event, now)
            seq += 1
            commands += scheduler.handle(report(vehicle, seq), now) + tick(scheduler, now)
            failures += of(commands, ev.SaveFailures)
            for grant in grants(commands):
                pending[grant.vehicle_id].append(grant)
        scheduler.validate()
    assert not scheduler.jobs
    assert not failures


def test_a_vehicle_with_too_much_to_do_is_no_fault_of_the_line() -> None:
    scheduler, lease = two_vehicles(1)
    now = 0
    for _ in range(2 * sch.MAX_STRIKES_IN_ALL):
        now += 1_000
        commands = scheduler.handle(results("good", lease.lease_id, [0], statuses=[503]), now)
        assert not of(commands, ev.SaveFailures) + of(commands, ev.SaveResults)
        now += sch.MIN_LEASE_MS
        lease = grants(scheduler.handle(report("good", now), now))[0]
    assert of(scheduler.handle(results("good", lease.lease_id, [0]), now), ev.SaveResults)


def test_lines_do_not_stick_to_a_vehicle_that_never_takes_them() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(1), 0)
    scheduler.handle(report("deaf", 1), 0)
    given: list[str] = []
    for step in range(1, 60):
        now = step * 1_000
        commands = scheduler.handle(report("deaf", 1 + step), now)
        commands += scheduler.handle(report("good", step), now) + tick(scheduler, now)
        given += [grant.vehicle_id for grant in grants(commands)]
        if "good" in given:
            break
    assert given == ["deaf"] * (sch.MAX_SENDS - 1) + ["good"], "sent again a few times, and then to another one"


def test_speed_is_measured_over_time_and_not_between_two_messages() -> None:
    scheduler, lease = two_vehicles(1_000)
    scheduler.handle(results("good", lease.lease_id, [0]), 10_000)
    assert scheduler.vehicles["good"].speed == pytest.approx(0.1 * work_of(10, 5))
    scheduler.handle(results("good", lease.lease_id, [1], message_id="m2"), 10_000)
    assert scheduler.vehicles["good"].speed == pytest.approx(0.1 * work_of(10, 5))


def test_a_vehicle_gets_no_more_than_its_part_however_many_slots_it_claims() -> None:
    scheduler = Scheduler()
    for number in range(9):
        scheduler.handle(report(f"good{number}", 1, slots=4), 0)
    scheduler.handle(report("evil", 1, slots=4096), 0)
    first = grants(scheduler.handle(started(10_000), 10))
    held = {vehicle_id: vehicle.outstanding for vehicle_id, vehicle in scheduler.vehicles.items()}
    assert held["evil"] <= 1_000
    assert all(held[f"good{number}"] == 8 for number in range(9))
    assert first


def test_a_grant_of_a_cancelled_job_that_got_lost_is_not_sent_again() -> None:
    scheduler, lease = two_vehicles(8)
    scheduler.handle(ev.CancelAsked(cause_id="c", job_no=1), 10)
    commands = scheduler.handle(report("good", 2), sch.RESEND_AFTER_MS)
    assert not grants(commands)
    assert ev.DropLease(lease_id=lease.lease_id) in commands
    assert ev.AssembleFiles(job_no=1) in commands


def a_late_line() -> tuple[Scheduler, ev.SendGrant, ev.SendGrant]:
    """``slow`` holds the only line of a job and does not come to an end with it; so ``quick`` has got it too."""
    scheduler = Scheduler()
    scheduler.handle(started(1), 0)
    first = grants(scheduler.handle(report("slow", 1), 0))[0]
    now = granting.MIN_LATE_MS + 1_000
    scheduler.handle(report("slow", 2, [first.lease_id], state=VehicleState.WORKING), now)
    assert not grants(scheduler.handle(report("quick", 1, model="other"), now)), "it could not run it"
    commands = scheduler.handle(report("quick", 2), now)
    second = grants(commands)[0]
    assert (second.vehicle_id, second.lines) == ("quick", [0])
    assert of(commands, ev.SaveHeld) == [ev.SaveHeld(job_no=1, vehicle_id="quick", lines=[0])], "its answer will count"
    assert not grants(scheduler.handle(report("third", 1), now)), "twice and no more"
    assert scheduler.jobs[1].leased == 1
    scheduler.validate()
    return scheduler, first, second


@pytest.mark.parametrize("winner", ["slow", "quick"])
def test_a_late_last_line_is_run_twice_and_counts_and_is_paid_once(winner: str) -> None:
    scheduler, first, second = a_late_line()
    won, lost = (first, second) if winner == "slow" else (second, first)
    commands = scheduler.handle(results(winner, won.lease_id, [0]), 40_000)
    assert [saved.vehicle_id for saved in of(commands, ev.SaveResults)] == [winner]
    assert {t.credit for post in of(commands, ev.PostTransfers) for t in post.transfers} == {
        "platform",
        f"owner:{winner}",
    }
    assert ev.SendRevoke(vehicle_id=lost.vehicle_id, lease_id=lost.lease_id, lines=[0]) in commands
    assert {drop.lease_id for drop in of(commands, ev.DropLease)} == {first.lease_id, second.lease_id}
    assert ev.AssembleFiles(job_no=1) in commands
    late = scheduler.handle(results(lost.vehicle_id, lost.lease_id, [0], message_id="m2"), 41_000)
    assert late == []
    scheduler.validate()


@pytest.mark.parametrize("gives_up", ["slow", "quick"])
@pytest.mark.parametrize("how", ["handed back", "an error", "silent", "the owner"])
def test_of_two_that_run_a_line_either_may_leave_and_the_other_goes_on(gives_up: str, how: str) -> None:
    scheduler, first, second = a_late_line()
    gone, other = (first, second) if gives_up == "slow" else (second, first)
    now = 40_000
    if how == "handed back":
        scheduler.handle(returned(gives_up, gone.lease_id, [0]), now)
    elif how == "an error":
        scheduler.handle(results(gives_up, gone.lease_id, [0], statuses=[500]), now)
    elif how == "the owner":
        spoke = ev.OwnerSpoke(cause_id="c", vehicle_id=gives_up, withdrawn=False, paused_until_ms=10**9, what="paused")
        scheduler.handle(spoke, now)
    else:
        stays = report(other.vehicle_id, 9, [other.lease_id], state=VehicleState.WORKING)
        scheduler.handle(stays, now + sch.SILENT_AFTER_MS)
        tick(scheduler, now + sch.SILENT_AFTER_MS)
    scheduler.validate()
    assert gone.lease_id not in scheduler.leases
    commands = scheduler.handle(results(other.vehicle_id, other.lease_id, [0], message_id="m2"), now + 30_000)
    assert [saved.vehicle_id for saved in of(commands, ev.SaveResults)] == [other.vehicle_id]
    assert not scheduler.jobs
    assert not scheduler.leases


def test_after_a_restart_a_line_that_was_run_twice_has_one_holder_and_both_may_still_answer() -> None:
    _, first, second = a_late_line()
    for answers in ("slow", "quick"):
        scheduler = Scheduler(1)
        scheduler.restore_job(
            started(1), done=np.zeros(0, np.int64), carried={}, checkpoint_bytes={}, held={0: ("quick",)},
            cancelling_ms=None,
        )  # fmt: skip
        for lease in (first, second):
            scheduler.restore_lease(
                ev.SaveLease(
                    lease_id=lease.lease_id, job_no=1, vehicle_id=lease.vehicle_id, incarnation="i1", granted_ms=0,
                    expires_ms=300_000, lines=[0], base={},
                )
            )  # fmt: skip
        assert ev.DropLease(lease_id=second.lease_id) in scheduler.resume(50_000, settled_ms=50_000)
        scheduler.validate()
        lease = first if answers == "slow" else second
        commands = scheduler.handle(results(answers, lease.lease_id, [0]), 51_000)
        assert [saved.vehicle_id for saved in of(commands, ev.SaveResults)] == [answers]
        assert not scheduler.jobs


def test_a_vehicle_that_refuses_a_grant_as_too_much_gets_half_of_it_next_time() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(64), 0)
    now, sizes = 0, []
    for turn in range(8):
        lease = grants(scheduler.handle(report("small", 1 + turn, slots=16), now))[0]
        sizes.append(len(lease.lines))
        if len(lease.lines) <= 3:
            break
        started_none = [False] * len(lease.lines)
        refused = returned("small", lease.lease_id, lease.lines, reason=ReturnReason.REFUSED, started=started_none)
        scheduler.handle(refused, now)
        now += BACKOFF_MS
    assert sizes == [32, 16, 8, 4, 2]
    lease = grants(scheduler.handle(report("small", 99, slots=16, incarnation="new"), now))[0]
    assert len(lease.lines) == 32, "another agent may take more"


def test_a_failing_vehicle_waits_longer_each_time_until_something_succeeds() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(2), 0)
    waits = []
    now = 0
    for turn in range(12):
        lease = grants(scheduler.handle(report("v", 1 + turn), now))[0]
        vehicle = scheduler.vehicles["v"]
        scheduler.handle(results("v", lease.lease_id, lease.lines, statuses=[503] * len(lease.lines)), now)
        waits.append(vehicle.blocked_until_ms - now)
        now = vehicle.blocked_until_ms
    assert waits[:4] == [BACKOFF_MS, 2 * BACKOFF_MS, 4 * BACKOFF_MS, 8 * BACKOFF_MS]
    assert waits[-1] == waits[-2] <= 300_000
    lease = grants(scheduler.handle(report("v", 99), now))[0]
    scheduler.handle(results("v", lease.lease_id, [0]), now)
    assert vehicle.failures == 0
