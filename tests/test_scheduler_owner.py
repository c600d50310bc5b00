"""The scheduler and a vehicle's owner: who drives off loses nothing, and who has withdrawn is left alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_scheduler import PRICE, grants, of, report, results, returned, started

from motorpool.core import events as ev
from motorpool.core import scheduler as sch
from motorpool.core.granting import BACKOFF_MS
from motorpool.core.scheduler import Scheduler
from motorpool.types import Reason, ReasonCode, ReturnReason, VehicleState

LEAVING = [ReturnReason.GUARD, ReturnReason.SHUTDOWN, ReturnReason.REFUSED, ReturnReason.OFFLINE, ReturnReason.REVOKED]
WITHDRAWN = [Reason(code=ReasonCode.CONSENT_WITHDRAWN)]


def spoke(vehicle: str, *, withdrawn: bool = False, paused_until_ms: int = 0) -> ev.OwnerSpoke:
    return ev.OwnerSpoke(
        cause_id="owner", vehicle_id=vehicle, withdrawn=withdrawn, paused_until_ms=paused_until_ms, what="said"
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(LEAVING), st.integers(0, 4), st.booleans()), max_size=30))
def test_invariant_17_driving_away_costs_the_owner_nothing(turns: list[tuple[int, ReturnReason, int, bool]]) -> None:
    """However often a car leaves in the middle: what it did is paid, nothing is charged, and its standing stays."""
    scheduler = Scheduler()
    scheduler.handle(started(500), 0)
    now, seq = 0, 1
    commands = scheduler.handle(report("v1", seq, slots=4), now)
    paid = earned = 0
    for done, reason, tokens, told in turns:
        leases = grants(commands)
        assert leases, "it gets work again as soon as it is here again"
        posted: list[ev.Command] = []
        for lease in leases:
            finished, unfinished = lease.lines[:done], lease.lines[done:]
            if finished:
                posted += scheduler.handle(results("v1", lease.lease_id, finished, message_id=f"m{now}"), now + 10)
                paid += len(finished) * (20 * 7 // 10)
            back = returned(
                "v1", lease.lease_id, unfinished, reason=reason, tokens=[tokens] * len(unfinished),
                started=[tokens > 0] * len(unfinished),
            )  # fmt: skip
            # The owner may be gone before the car has told: then it is silent, or says first that it may not work.
            posted += scheduler.handle(back, now + 20) if told else []
        seq += 1
        posted += scheduler.handle(report("v1", seq, state=VehicleState.DENIED, slots=4), now + 30)
        for step in range(1, 1 + sch.MISSING_AFTER_MS // 3_000 + 6):
            seq += 1
            posted += scheduler.handle(report("v1", seq, state=VehicleState.DENIED, slots=4), now + 30 + step * 3_000)
        now += 120_000
        posted += scheduler.handle(ev.Ticked(cause_id="t"), now)
        seq += 1
        # Its own wait for a report after what it handed back is over; no longer one has grown.
        commands = scheduler.handle(report("v1", seq, slots=4), now)
        for transfer in [each for post in of(posted, ev.PostTransfers) for each in post.transfers]:
            assert not transfer.debit.startswith("owner:"), "an owner is never charged"
            earned += transfer.amount_micro * (transfer.credit == "owner:v1")
        assert not of(posted, ev.SaveFailures)
        vehicle = scheduler.vehicles["v1"]
        assert vehicle.failures == 0
        assert vehicle.blocked_until_ms <= now
        scheduler.validate()
        if 1 not in scheduler.jobs:
            break  # all of it was done
        assert not scheduler.jobs[1].strikes
    assert earned == paid
    assert PRICE.owner_share_bp == 7000


def test_invariant_17_a_wait_after_a_departure_does_not_grow() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(100), 0)
    commands = scheduler.handle(report("v1", 1), 0)
    for turn in range(1, 40):
        at = turn * BACKOFF_MS
        for lease in grants(commands):
            scheduler.handle(returned("v1", lease.lease_id, lease.lines), at)
        commands = scheduler.handle(report("v1", 1 + turn), at + BACKOFF_MS)
        assert grants(commands)
        assert scheduler.vehicles["v1"].blocked_until_ms == at + BACKOFF_MS


def test_invariant_17_results_that_get_lost_while_the_car_drives_off_are_no_failure() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(4), 0)
    lease = grants(scheduler.handle(report("v1", 1), 0))[0]
    scheduler.handle(report("v1", 2, held=[lease.lease_id]), 1_000)
    scheduler.handle(report("v1", 3, state=VehicleState.DENIED), 2_000)
    scheduler.handle(report("v1", 4), 3_000)
    commands = scheduler.handle(report("v1", 5), 3_000 + sch.MISSING_AFTER_MS)
    assert ev.DropLease(lease_id=lease.lease_id) in commands
    assert grants(commands), "at once"
    assert scheduler.vehicles["v1"].failures == 0


def test_a_lease_that_is_lost_by_a_vehicle_that_stays_is_a_failure() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(4), 0)
    lease = grants(scheduler.handle(report("v1", 1), 0))[0]
    scheduler.handle(report("v1", 2, held=[lease.lease_id]), 1_000)
    scheduler.handle(report("v1", 3), 2_000)
    scheduler.handle(report("v1", 4), 2_000 + sch.MISSING_AFTER_MS)
    assert scheduler.vehicles["v1"].failures == 1


# -- withdrawal --------------------------------------------------------------------------------------------------------


NOTHING: tuple[int, int, int, list[ReasonCode]] = (0, 0, 0, [])


def kept_of(scheduler: Scheduler) -> tuple[int, int, int, list[ReasonCode]]:
    """All that the columns could hold of a car: its permit, its stay, its risk, its reasons."""
    vehicle = scheduler.vehicles["v1"]
    row = scheduler.cell.t.vehicles[vehicle.row]
    return int(row["permit_w"]), int(row["stay_min"]), int(row["risk_pct"]), vehicle.reasons


def withdrawn(**changes: Any) -> tuple[Scheduler, ev.SendGrant, list[ev.Command]]:
    """A vehicle at work whose owner withdraws the consent."""
    scheduler = Scheduler()
    scheduler.handle(started(4), 0)
    known: dict[str, Any] = {"permit_w": 130, "stay_bound_ms": 3_600_000, "risk_15min": 0.2}
    lease = grants(scheduler.handle(report("v1", 1, **known, **changes), 0))[0]
    return scheduler, lease, scheduler.handle(spoke("v1", withdrawn=True), 100)


def test_a_withdrawal_ends_every_lease_and_the_story_and_is_told() -> None:
    scheduler, lease, commands = withdrawn()
    assert ev.SendRevoke(vehicle_id="v1", lease_id=lease.lease_id) in commands
    assert ev.DropStory(subject="v1") in commands
    assert ev.SendOwnerNews(vehicle_id="v1") in commands
    assert not scheduler.may_tell("v1")
    assert scheduler.may_tell("batch_1")
    assert kept_of(scheduler) == NOTHING
    scheduler.validate()


def test_after_a_withdrawal_nothing_is_dispatched_whatever_the_vehicle_says() -> None:
    scheduler, _, commands = withdrawn()
    for seq in range(2, 60):
        known: dict[str, Any] = {"permit_w": 120, "stay_bound_ms": 7_200_000, "risk_15min": 0.1}
        commands += scheduler.handle(report("v1", seq, **known), seq * 1_000)
        commands += scheduler.handle(ev.Ticked(cause_id="t"), seq * 1_000 + 1)
        assert scheduler.place_live("m", frozenset(), seq * 1_000) is None
        assert ev.SendOwnerNews(vehicle_id="v1") in commands, "until it knows"
    assert not grants(commands)
    assert not scheduler.serves("m")
    assert kept_of(scheduler) == NOTHING
    scheduler.validate()


def test_what_was_done_before_a_withdrawal_is_paid() -> None:
    scheduler, lease, _ = withdrawn()
    commands = scheduler.handle(results("v1", lease.lease_id, lease.lines), 5_000)
    (post,) = of(commands, ev.PostTransfers)
    assert sum(each.amount_micro for each in post.transfers if each.credit == "owner:v1") == 28


def test_a_vehicle_that_knew_of_the_withdrawal_and_is_permitted_again_has_a_new_consent() -> None:
    scheduler, _, _ = withdrawn()
    assert not grants(scheduler.handle(report("v1", 2), 1_000)), "it may not have heard of it"
    commands = scheduler.handle(report("v1", 3, state=VehicleState.DENIED, reasons=WITHDRAWN), 2_000)
    assert ev.SaveWithdrawal(vehicle_id="v1", seen=True) in commands
    other = [Reason(code=ReasonCode.DOOR_OPEN)]
    assert not of(scheduler.handle(report("v1", 4, state=VehicleState.DENIED, reasons=other), 3_000), ev.SaveWithdrawal)
    commands = scheduler.handle(report("v1", 5), 20_000)
    assert ev.SaveWithdrawal(vehicle_id="v1", seen=False) in commands
    assert grants(commands)
    assert scheduler.may_tell("v1")


def test_a_new_consent_by_the_cell_gives_work_at_once() -> None:
    scheduler, _, _ = withdrawn()
    scheduler.handle(report("v1", 2), 1_000)
    assert grants(scheduler.handle(spoke("v1"), 5_000))


@pytest.mark.parametrize("seen", [True, False])
def test_a_restart_forgets_no_withdrawal(seen: bool) -> None:
    scheduler = Scheduler(2)
    scheduler.restore_vehicle("v1", region="DE", withdrawn=True, withdrawal_seen=seen, paused_until_ms=0)
    assert ev.DropStory(subject="v1") in scheduler.resume(0, settled_ms=0)
    scheduler.handle(started(4), 0)
    assert bool(grants(scheduler.handle(report("v1", 1), 1_000))) is seen
    scheduler.validate()


# -- pauses ------------------------------------------------------------------------------------------------------------


def test_a_pause_sends_the_work_elsewhere_and_ends_by_itself() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(4), 0)
    lease = grants(scheduler.handle(report("v1", 1), 0))[0]
    scheduler.handle(report("v2", 1, state=VehicleState.DENIED), 0)
    commands = scheduler.handle(spoke("v1", paused_until_ms=60_000), 100)
    assert ev.SendRevoke(vehicle_id="v1", lease_id=lease.lease_id) in commands
    assert ev.Note(subject="v1", what="said") in commands
    assert not grants(scheduler.handle(report("v1", 2), 59_000))
    assert grants(scheduler.handle(report("v2", 2), 59_500))[0].vehicle_id == "v2"
    assert grants(scheduler.handle(report("v1", 3), 60_000))
    assert scheduler.vehicles["v1"].failures == 0


def test_the_end_of_a_pause_gives_work_at_once() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(4), 0)
    scheduler.handle(report("v1", 1), 0)
    scheduler.handle(spoke("v1", paused_until_ms=60_000), 100)
    assert grants(scheduler.handle(spoke("v1"), 200))


def test_a_lease_may_be_worked_on_offline_until_its_window_closes_and_no_longer_than_six_hours() -> None:
    for expires_ms, expected in ((10_000, 10_000), (48 * 3_600_000, 6 * 3_600_000)):
        scheduler = Scheduler()
        scheduler.handle(started(1, expires_ms=expires_ms), 0)
        assert grants(scheduler.handle(report("v1", 1), 0))[0].max_offline_ms == expected
