"""Where a job may run: its lines are never with a vehicle that is elsewhere, nor taken from one, whatever happens."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.test_scheduler import grants, of, report, results, returned, started

from motorpool.core import events as ev
from motorpool.core.columns import MAX_REGIONS
from motorpool.core.scheduler import Scheduler
from motorpool.types import ReturnReason, VehicleState

REGIONS = ("DE", "FR", "NO", "")
VEHICLES = ("v1", "v2", "v3")


def bound(lines: int = 4, job_no: int = 1, **terms: Any) -> ev.JobStarted:
    return msgspec.structs.replace(started(lines, job_no), **terms)


def test_lines_go_only_to_vehicles_that_say_they_are_in_a_region_of_the_job() -> None:
    scheduler = Scheduler()
    scheduler.handle(bound(regions=("DE", "FR")), 0)
    assert not grants(scheduler.handle(report("v1", 1, region="NO"), 5))
    assert not grants(scheduler.handle(report("v2", 1, region=""), 5))
    assert grants(scheduler.handle(report("v3", 1, region="FR"), 5))


def test_a_vehicle_that_leaves_the_region_gives_its_lines_back_and_what_it_sends_later_is_not_taken() -> None:
    scheduler = Scheduler()
    scheduler.handle(bound(regions=("DE",)), 0)
    lease = grants(scheduler.handle(report("v1", 1, region="DE"), 5))[0]
    commands = scheduler.handle(report("v1", 2, [lease.lease_id], region="FR"), 1_000)
    assert ev.SendRevoke(vehicle_id="v1", lease_id=lease.lease_id) in commands
    assert ev.DropLease(lease_id=lease.lease_id) in commands
    assert [note.what for note in of(commands, ev.Note)] == ["2 lines taken back: it has left the regions of their job"]
    late = scheduler.handle(results("v1", lease.lease_id, lease.lines), 1_100)
    assert not of(late, ev.SaveResults)
    handed = returned("v1", lease.lease_id, lease.lines, tokens=[3] * len(lease.lines))
    assert not of(scheduler.handle(handed, 1_200), ev.SaveCheckpoints)
    again = grants(scheduler.handle(report("v2", 1, region="DE"), 1_300))[0]
    assert set(again.lines) == set(lease.lines)


def test_what_was_taken_from_it_before_does_not_count_either_once_it_is_abroad() -> None:
    scheduler = Scheduler()
    scheduler.handle(bound(regions=("DE",)), 0)
    lease = grants(scheduler.handle(report("v1", 1, region="DE"), 5))[0]
    scheduler.handle(report("v1", 1, incarnation="i2", state=VehicleState.DENIED, region="DE"), 10)
    scheduler.handle(report("v1", 2, incarnation="i2", state=VehicleState.DENIED, region="FR"), 20)
    assert not of(scheduler.handle(results("v1", lease.lease_id, lease.lines), 30), ev.SaveResults)


def test_after_a_restart_a_vehicle_abroad_may_not_finish_what_it_once_held() -> None:
    scheduler = Scheduler(1)
    for vehicle, region in (("v1", "FR"), ("v2", "DE")):
        scheduler.restore_vehicle(
            vehicle, region=region, withdrawn=False, withdrawal_seen=False, paused_until_ms=0, trust=1
        )
    scheduler.restore_job(
        bound(regions=("DE",), min_trust=1),
        done=np.array([0]),
        carried={},
        checkpoint_bytes={},
        held={1: ("v1", "v2"), 2: ("v1",)},
        cancelling_ms=None,
    )
    scheduler.resume(0, settled_ms=0)
    assert scheduler.jobs[1].held == {1: ("v2",)}
    assert not grants(scheduler.handle(report("v1", 1, region="FR"), 5))
    assert grants(scheduler.handle(report("v2", 1, region="DE"), 5))[0].lines == [1]


def test_a_region_that_no_vehicle_has_named_holds_a_job_back_until_one_comes() -> None:
    scheduler = Scheduler()
    scheduler.handle(report("v1", 1, region="FR"), 0)
    assert not grants(scheduler.handle(bound(regions=("DE",)), 5))
    assert grants(scheduler.handle(report("v2", 1, region="DE"), 10))


def test_customers_cannot_use_up_the_numbers_of_regions() -> None:
    scheduler = Scheduler()
    for number in range(3 * MAX_REGIONS):
        scheduler.handle(bound(job_no=number + 1, regions=(f"X{number}",)), 0)
    assert grants(scheduler.handle(report("v1", 1, region="X7"), 5))[0].job_no == 8


def test_regions_beyond_those_that_can_be_told_apart_get_nothing_that_is_bound() -> None:
    scheduler = Scheduler()
    for number in range(3 * MAX_REGIONS):
        scheduler.handle(report(f"v{number}", 1, region=f"X{number}", state=VehicleState.DENIED), 0)
    last = f"X{3 * MAX_REGIONS - 1}"
    scheduler.handle(bound(regions=(last,)), 5)
    assert not grants(scheduler.handle(report("w", 1, region=last), 10))
    assert not grants(scheduler.handle(report("x", 1, region="another"), 10))


def test_trust_that_is_taken_away_takes_the_lines_with_it() -> None:
    scheduler = Scheduler()
    scheduler.handle(bound(min_trust=2), 0)
    assert not grants(scheduler.handle(report("v1", 1), 0))
    trusted = ev.VehicleConfigured(cause_id="o", vehicle_id="v1", site="", trust=2, reserve=False)
    lease = grants(scheduler.handle(trusted, 5))[0]
    commands = scheduler.handle(msgspec.structs.replace(trusted, trust=1), 10)
    assert ev.SendRevoke(vehicle_id="v1", lease_id=lease.lease_id) in commands
    assert not of(scheduler.handle(results("v1", lease.lease_id, lease.lines), 20), ev.SaveResults)


@pytest.mark.parametrize("best_effort", [False, True])
def test_a_job_without_a_promise_gets_what_others_leave(best_effort: bool) -> None:
    scheduler = Scheduler()
    scheduler.handle(bound(job_no=1, best_effort=best_effort, expires_ms=1_800_000), 0)
    scheduler.handle(bound(job_no=2, expires_ms=3_600_000), 0)
    first = grants(scheduler.handle(report("v1", 1), 5))[0]
    assert first.job_no == (2 if best_effort else 1)


class Machine(RuleBasedStateMachine):
    """Vehicles that wander between regions, gain and lose trust, and send everything that they ever held."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.now_ms = 0
        self.seq = 0
        self.jobs = 0
        self.terms: dict[int, tuple[tuple[str, ...], int]] = {}
        self.region: dict[str, str] = {}
        self.trust = dict.fromkeys(VEHICLES, 0)
        self.granted: list[ev.SendGrant] = []

    def _handle(self, event: ev.SchedulerEvent, vehicle: str = "") -> None:
        """What goes to a vehicle, and what is taken from the one that speaks, keeps the job's terms."""
        self.now_ms += 500
        for command in self.scheduler.handle(event, self.now_ms):
            if isinstance(command, ev.SendGrant):
                self._check(command.job_no, command.vehicle_id)
                self.granted.append(command)
            elif isinstance(command, ev.SaveResults | ev.SaveCheckpoints):
                self._check(command.job_no, vehicle)

    def _check(self, job_no: int, vehicle: str) -> None:
        regions, trust = self.terms[job_no]
        assert not regions or self.region[vehicle] in regions
        assert self.trust[vehicle] >= trust

    @rule(
        lines=st.integers(1, 6),
        regions=st.lists(st.sampled_from(REGIONS[:3]), max_size=2),
        trust=st.integers(0, 2),
        best_effort=st.booleans(),
    )
    def hand_in(self, lines: int, regions: list[str], trust: int, best_effort: bool) -> None:
        self.jobs += 1
        self.terms[self.jobs] = (tuple(regions), trust)
        self._handle(
            bound(
                lines,
                self.jobs,
                regions=tuple(regions),
                min_trust=trust,
                best_effort=best_effort,
                expires_ms=self.now_ms + 600_000,
            )
        )

    @rule(
        vehicle=st.sampled_from(VEHICLES),
        region=st.sampled_from(REGIONS),
        state=st.sampled_from([VehicleState.READY, VehicleState.READY, VehicleState.DENIED]),
        incarnation=st.sampled_from(["i1", "i1", "i2"]),
    )
    def say(self, vehicle: str, region: str, state: VehicleState, incarnation: str) -> None:
        self.seq += 1
        self.region[vehicle] = region
        held = [lease.lease_id for lease in self.granted if lease.vehicle_id == vehicle][-2:]
        self._handle(report(vehicle, self.seq, held, region=region, state=state, incarnation=incarnation))

    @rule(vehicle=st.sampled_from(VEHICLES), trust=st.integers(0, 2))
    def configure(self, vehicle: str, trust: int) -> None:
        self.trust[vehicle] = trust
        self._handle(ev.VehicleConfigured(cause_id="o", vehicle_id=vehicle, site="", trust=trust, reserve=False))

    @rule(data=st.data(), status=st.sampled_from([200, 200, 200, 500]))
    def finish(self, data: st.DataObject, status: int) -> None:
        if self.granted:
            lease = data.draw(st.sampled_from(self.granted))
            job = f"batch_{lease.job_no}"
            lines = data.draw(st.lists(st.sampled_from(lease.lines), min_size=1, unique=True))
            event = results(lease.vehicle_id, lease.lease_id, lines, job=job, statuses=[status] * len(lines))
            self._handle(event, lease.vehicle_id)

    @rule(data=st.data(), reason=st.sampled_from(ReturnReason))
    def hand_back(self, data: st.DataObject, reason: ReturnReason) -> None:
        if self.granted:
            lease = data.draw(st.sampled_from(self.granted))
            event = returned(lease.vehicle_id, lease.lease_id, lease.lines, tokens=[2] * len(lease.lines))
            event = msgspec.structs.replace(event, reason=reason, job_id=f"batch_{lease.job_no}")
            self._handle(event, lease.vehicle_id)

    @rule(seconds=st.sampled_from([1, 10, 40, 400]))
    def wait(self, seconds: int) -> None:
        self.now_ms += 1000 * seconds
        self._handle(ev.Ticked(cause_id="t"))

    @invariant()
    def the_state_is_sound(self) -> None:
        self.scheduler.validate()


TestResidency = Machine.TestCase
TestResidency.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_was_made_abroad_is_not_taken_either_when_the_vehicle_is_back_and_has_the_lines_again() -> None:
    scheduler = Scheduler()
    scheduler.handle(bound(regions=("DE",)), 0)
    lease = grants(scheduler.handle(report("v1", 1, region="DE"), 5))[0]
    scheduler.handle(report("v1", 2, [lease.lease_id], region="FR"), 1_000)
    again = grants(scheduler.handle(report("v1", 3, region="DE"), 2_000))[0]
    assert set(again.lines) == set(lease.lines)
    assert scheduler.handle(results("v1", lease.lease_id, lease.lines), 2_100) == []
    assert of(scheduler.handle(results("v1", again.lease_id, again.lines), 2_200), ev.SaveResults)
