"""Every "no" has its reason, and the reason is the one by which it was decided."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_scheduler import grants, report, results, returned, started

from motorpool.core import events as ev
from motorpool.core import kernels, why
from motorpool.core.columns import BEHIND, NONE
from motorpool.core.scheduler import Scheduler
from motorpool.core.why_words import HINTS, WORDS, Held
from motorpool.types import Reason, ReasonCode, ReturnReason, VehicleState

REGIONS = ("DE", "FR")
MODELS = ("m", "n")


def job(job_no: int, lines: int = 4, **terms: Any) -> ev.JobStarted:
    return msgspec.structs.replace(started(lines, job_no), **terms)


def configured(vehicle: str, *, site: str = "", trust: int = 0, reserve: bool = False) -> ev.VehicleConfigured:
    return ev.VehicleConfigured(cause_id="o", vehicle_id=vehicle, site=site, trust=trust, reserve=reserve)


def counts(scheduler: Scheduler, job_no: int, now_ms: int) -> dict[str, int]:
    return {each.code: each.vehicles for each in why.why_job(scheduler, job_no, now_ms).reasons}


def test_each_vehicle_is_counted_once_under_what_keeps_it_from_the_job() -> None:
    scheduler = Scheduler()
    scheduler.handle(ev.SiteConfigured(cause_id="o", site="north", limit_w=0, limit_vehicles=1), 0)
    scheduler.handle(configured("crowded", site="north", trust=2), 0)
    scheduler.handle(configured("first", site="north", trust=2), 0)
    scheduler.handle(configured("reserve", trust=2, reserve=True), 0)
    for vehicle in ("abroad", "denied", "paused", "failed", "other"):
        scheduler.handle(configured(vehicle, trust=2), 0)
    scheduler.handle(job(1, 100, regions=("DE",), min_trust=1), 0)
    lease = grants(scheduler.handle(report("first", 1, region="DE"), 1))[0]
    failed = grants(scheduler.handle(report("failed", 1, region="DE"), 1))[0]
    scheduler.handle(returned("failed", failed.lease_id, failed.lines, reason=ReturnReason.ENGINE_DIED), 2)
    scheduler.handle(report("crowded", 1, region="DE"), 2)
    scheduler.handle(report("reserve", 1, region="DE"), 2)
    scheduler.handle(report("unknown", 1, region="DE"), 2)
    scheduler.handle(report("abroad", 1, region="FR"), 2)
    scheduler.handle(report("other", 1, region="DE", model="n"), 2)
    scheduler.handle(report("denied", 1, region="DE", state=VehicleState.DENIED), 2)
    scheduler.handle(report("paused", 1, region="DE", state=VehicleState.DENIED), 2)
    spoke = ev.OwnerSpoke(cause_id="o", vehicle_id="paused", withdrawn=False, paused_until_ms=9_000, what="later")
    scheduler.handle(spoke, 2)
    scheduler.handle(report("paused", 2, region="DE"), 3)
    found = why.why_job(scheduler, 1, 10)
    assert {each.code: each.vehicles for each in found.reasons} == {
        "queue_full": 1,
        "site_full": 1,
        "only_reserve": 1,
        "too_little_trust": 1,
        "other_region": 1,
        "other_model": 1,
        "not_permitted": 1,
        "paused": 1,
        "blocked": 1,
    }
    assert (found.total, found.done, found.held, found.waiting) == (100, 0, len(lease.lines), 100 - len(lease.lines))
    assert (found.place, found.jobs_in_order, found.holders) == (1, 1, 1)
    assert found.regions == ["DE"]
    assert found.vehicles == found.asked == sum(each.vehicles for each in found.reasons)
    assert "those that could take more are busy" in found.words


def test_a_job_that_nobody_can_run_says_what_stands_in_the_way_most() -> None:
    scheduler = Scheduler()
    scheduler.handle(job(1), 0)
    assert why.why_job(scheduler, 1, 0).words == "no vehicle has ever been here"
    for number in range(3):
        scheduler.handle(report(f"v{number}", 1, model="n"), 1)
    assert why.why_job(scheduler, 1, 1).words == (
        "no vehicle can take its lines: most of them (3) have another model loaded"
    )
    assert why.why_job(scheduler, 1, 1).finish_ms is None


def test_a_job_says_its_slack_its_soonest_end_and_who_is_served_before_it() -> None:
    scheduler = Scheduler()
    scheduler.handle(job(1, 2_000, expires_ms=900_000), 0)
    lease = grants(scheduler.handle(report("v1", 1), 0))[0]
    scheduler.handle(results("v1", lease.lease_id, lease.lines), 1_000)
    scheduler.handle(job(2, 10, expires_ms=86_400_000), 1_500)
    scheduler.handle(ev.Ticked(cause_id="t"), 2_500)
    urgent, late = why.why_job(scheduler, 1, 2_500), why.why_job(scheduler, 2, 2_500)
    assert urgent.slack_ms is not None
    assert urgent.finish_ms is not None
    assert not urgent.relaxed
    assert late.relaxed
    assert not late.behind
    assert (urgent.place, late.place, late.jobs_in_order) == (1, 2, 2)
    assert late.finish_ms is not None
    assert late.finish_ms >= urgent.finish_ms
    speed = scheduler.vehicles["v1"].speed
    left = (2_000 - len(lease.lines)) * float(scheduler.cell.t.jobs["work_per_line"][scheduler.jobs[1].row])
    assert urgent.finish_ms - 2_500 == pytest.approx(left / speed * 1000, rel=0.01)


def test_a_vehicle_says_what_it_holds_and_why_it_gets_no_more() -> None:
    scheduler = Scheduler()
    scheduler.handle(job(1, 100), 0)
    scheduler.handle(job(2, 100, regions=("NO",)), 0)
    lease = grants(scheduler.handle(report("v1", 1, region="DE"), 1))[0]
    found = why.why_vehicle(scheduler, "v1", 2)
    assert found is not None
    assert found.code == "queue_full"
    assert found.holds == [Held(job_id="batch_1", lines=len(lease.lines))]
    assert {each.job_id: each.code for each in found.jobs} == {"batch_1": "queue_full", "batch_2": "other_region"}
    assert found.other_jobs == 0
    reasons = [Reason(code=ReasonCode.DOOR_OPEN), Reason(code=ReasonCode.TOO_HOT)]
    scheduler.handle(report("v1", 2, state=VehicleState.DENIED, reasons=reasons, region="DE"), 5)
    found = why.why_vehicle(scheduler, "v1", 6)
    assert found is not None
    assert (found.code, found.state, found.guard) == (
        "not_permitted",
        "denied",
        [ReasonCode.DOOR_OPEN, ReasonCode.TOO_HOT],
    )
    assert why.why_vehicle(scheduler, "v2", 6) is None


def test_a_vehicle_without_work_to_find_says_so() -> None:
    scheduler = Scheduler()
    scheduler.handle(report("v1", 1), 0)
    assert (why.why_vehicle(scheduler, "v1", 1) or pytest.fail("it is known")).code == "no_jobs"
    scheduler.handle(report("v2", 1, model=None), 0)
    assert (why.why_vehicle(scheduler, "v2", 1) or pytest.fail("it is known")).code == "other_model"


def test_every_reason_of_the_kernels_has_words() -> None:
    assert set(why.NAMES.values()) == set(HINTS) == set(WORDS) - {"no_jobs"}
    assert max(why.NAMES) < why.CODES
    assert set(kernels.REASONS) < set(HINTS)


@st.composite
def states(draw: st.DrawFn) -> tuple[Scheduler, int]:
    """A cell in the middle of its work."""
    scheduler = Scheduler()
    scheduler.handle(ev.SiteConfigured(cause_id="o", site="s", limit_w=200, limit_vehicles=draw(st.integers(0, 2))), 0)
    for number in range(draw(st.integers(1, 6))):
        scheduler.handle(
            job(
                number + 1,
                draw(st.integers(1, 40)),
                account=draw(st.sampled_from(["a", "b"])),
                model=draw(st.sampled_from(MODELS)),
                regions=tuple(draw(st.lists(st.sampled_from(REGIONS), max_size=1))),
                min_trust=draw(st.integers(0, 1)),
                best_effort=draw(st.booleans()),
                expires_ms=draw(st.sampled_from([600_000, 3_600_000, 80_000_000])),
            ),
            0,
        )
    now = 0
    for number in range(draw(st.integers(1, 12))):
        now += draw(st.integers(1, 900))
        vehicle = f"v{number}"
        site, trust = draw(st.sampled_from(["", "s"])), draw(st.integers(0, 1))
        scheduler.handle(configured(vehicle, site=site, trust=trust, reserve=draw(st.booleans())), now)
        commands = scheduler.handle(
            report(
                vehicle,
                1,
                region=draw(st.sampled_from(REGIONS)),
                model=draw(st.sampled_from([*MODELS, None])),
                slots=draw(st.integers(1, 4)),
                permit_w=100,
                state=draw(st.sampled_from([VehicleState.READY, VehicleState.READY, VehicleState.DENIED])),
            ),
            now,
        )
        for lease in grants(commands):
            if draw(st.booleans()):
                count = draw(st.integers(1, len(lease.lines)))
                now += draw(st.integers(100, 5_000))
                job_id = f"batch_{lease.job_no}"
                scheduler.handle(results(vehicle, lease.lease_id, lease.lines[:count], job=job_id), now)
    scheduler.handle(ev.Ticked(cause_id="t"), now + 1)
    return scheduler, now + 1


def expected(scheduler: Scheduler, v: int, j: int, now_ms: int) -> int:
    """The answer by what the kernel that grants would do."""
    t, out = scheduler.cell.t, np.zeros(2, np.int64)
    code = kernels.why_not(t, v, now_ms)
    if code != kernels.OK:
        return code
    if t.vehicles["model"][v] != t.jobs["model"][j]:
        return kernels.OTHER_MODEL
    chosen = kernels.pull(t, v, now_ms, out)
    if int(out[1]) == kernels.SITE_FULL:
        return kernels.SITE_FULL
    code = kernels.refusal(t, v, j)
    if code != kernels.OK:
        return code
    if chosen == NONE:
        return kernels.QUEUE_FULL
    return kernels.OK if chosen == j else why.OTHERS_FIRST


@settings(max_examples=150, deadline=None)
@given(states())
def test_the_reason_is_what_the_granting_kernel_would_do(state: tuple[Scheduler, int]) -> None:
    scheduler, now = state
    for running in scheduler.jobs.values():
        for v in scheduler.cell.ids:
            assert why.verdict(scheduler.cell.t, v, running.row, now) == expected(scheduler, v, running.row, now)


@settings(max_examples=10, deadline=None)
@given(states())
def test_asked_compiled_the_answers_are_the_same(state: tuple[Scheduler, int]) -> None:
    scheduler, now = state
    fast = why.asker(why.MANY + 1)
    rows = np.fromiter(scheduler.cell.ids, dtype=np.int64)
    for running in scheduler.jobs.values():
        plain, quick = np.zeros(why.CODES, np.int64), np.zeros(why.CODES, np.int64)
        why.tally(scheduler.cell.t, rows, running.row, now, plain)
        fast(scheduler.cell.t, rows, running.row, now, quick)
        assert plain.tolist() == quick.tolist()


def test_without_a_compiler_a_part_of_a_large_fleet_is_asked_and_the_counts_are_scaled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(why, "MANY", 8)
    monkeypatch.setattr(why, "asker", lambda vehicles: None)
    scheduler = Scheduler()
    scheduler.handle(job(1), 0)
    for number in range(40):
        scheduler.handle(report(f"v{number}", 1, model="n"), 1)
    found = why.why_job(scheduler, 1, 2)
    assert (found.vehicles, found.asked) == (40, 8)
    assert counts(scheduler, 1, 2) == {"other_model": 40}


def test_a_reserve_is_ready_for_what_is_behind() -> None:
    scheduler = Scheduler()
    scheduler.handle(configured("r", reserve=True), 0)
    scheduler.handle(job(1, 50), 0)
    assert not grants(scheduler.handle(report("r", 1), 1))
    assert counts(scheduler, 1, 1) == {"only_reserve": 1}
    scheduler.cell.t.jobs["flags"][scheduler.jobs[1].row] |= BEHIND
    assert counts(scheduler, 1, 1) == {"gets_lines": 1}
