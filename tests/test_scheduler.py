"""The scheduler: events in, the whole list of commands out; and properties under any order of events."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from motorpool.core import events as ev
from motorpool.core import scheduler as sch
from motorpool.core.carbon import DEFAULT_G_KWH
from motorpool.core.granting import BACKOFF_MS
from motorpool.core.jobs import DONE
from motorpool.core.ledger import Transfer
from motorpool.core.pricing import ATTO_PER_MICRO, Price, cost_atto, extend, split_atto, trim
from motorpool.core.scheduler import Scheduler
from motorpool.types import Kind, Reason, ReasonCode, ReturnReason, VehicleState
from motorpool.wire import State

PRICE = Price(input_micro=1_000_000, output_micro=2_000_000)
HOUR_MS = 3_600_000
LIMIT_TOKENS = 100


def started(lines: int = 4, job_no: int = 1, expires_ms: int = HOUR_MS) -> ev.JobStarted:
    return ev.JobStarted(
        cause_id="c",
        job_no=job_no,
        job_id=f"batch_{job_no}",
        account="acme",
        kind=Kind.CHAT,
        model="m",
        price=PRICE,
        expires_ms=expires_ms,
        lengths=np.full(lines, 100, dtype=np.uint32),
        limits=np.full(lines, LIMIT_TOKENS, dtype=np.uint32),
    )


def report(vehicle: str, seq: int, held: list[str] | None = None, **changes: Any) -> ev.VehicleReported:
    fields: dict[str, Any] = {"incarnation": "i1", "state": VehicleState.READY, "model": "m", "slots": 1}
    state = State(seq=seq, held=held or [], **(fields | changes))
    return ev.VehicleReported(cause_id="c", vehicle_id=vehicle, state=state)


def results(vehicle: str, lease: str, lines: list[int], *, job: str = "batch_1", **columns: Any) -> ev.ResultsArrived:
    n = len(lines)
    fields: dict[str, Any] = {
        "statuses": [200] * n,
        "prompt_tokens": [10] * n,
        "completion_tokens": [5] * n,
        "cached_tokens": [0] * n,
        "carried_tokens": [0] * n,
        "energy_mwh": 7,
        "message_id": "m1",
    }
    return ev.ResultsArrived(
        cause_id="c", vehicle_id=vehicle, lease_id=lease, job_id=job, lines=lines, **(fields | columns)
    )


def returned(vehicle: str, lease: str, lines: list[int], **changes: Any) -> ev.WorkReturned:
    fields: dict[str, Any] = {
        "reason": ReturnReason.GUARD,
        "tokens": [0] * len(lines),
        "sizes": [50] * len(lines),
        "started": [True] * len(lines),
    }
    return ev.WorkReturned(
        cause_id="c", vehicle_id=vehicle, lease_id=lease, job_id="batch_1", lines=lines, **(fields | changes)
    )


def grants(commands: list[ev.Command]) -> list[ev.SendGrant]:
    return [command for command in commands if isinstance(command, ev.SendGrant)]


def of(commands: list[ev.Command], kind: type[ev.Command]) -> list[Any]:
    return [command for command in commands if isinstance(command, kind)]


def test_a_batch_on_one_vehicle_from_start_to_files() -> None:
    scheduler = Scheduler()
    assert scheduler.handle(started(4), 0) == [
        ev.SaveJobStatus(job_no=1, status="in_progress"),
        ev.Note(subject="batch_1", what="started: 4 lines for m"),
    ]
    commands = scheduler.handle(report("v1", 1), 5)
    lease = "batch_1-0-1-0"
    assert commands == [
        ev.SaveRegion(vehicle_id="v1", region="local"),
        ev.Note(subject="v1", what="ready"),
        ev.SendOwnerNews(vehicle_id="v1"),
        ev.SaveLease(
            lease_id=lease, job_no=1, vehicle_id="v1", incarnation="i1", granted_ms=5, expires_ms=300_005,
            lines=[0, 1], base={},
        ),
        ev.SendGrant(
            lease_id=lease, job_no=1, vehicle_id="v1", incarnation="i1", model="m", kind=Kind.CHAT, ttl_ms=300_000,
            lines=[0, 1], with_checkpoint=[], max_offline_ms=HOUR_MS - 5, pay_input_micro=700_000,
            pay_output_micro=1_400_000,
        ),
    ]  # fmt: skip
    commands = scheduler.handle(results("v1", lease, [0]), 1005)
    assert commands[:4] == [
        ev.SaveResults(
            job_no=1, vehicle_id="v1", picks=[0], costs_micro=[20], carried_tokens=[0], energy_uwh=[7_000],
            co2_ug=[7 * DEFAULT_G_KWH],
        ),
        ev.SaveJobCounts(
            job_no=1, completed=1, prompt_tokens=10, completion_tokens=5, cost_micro=20, energy_uwh=7_000,
            co2_ug=7 * DEFAULT_G_KWH,
        ),
        ev.SaveVehicleCounts(
            vehicle_id="v1", lines_done=1, tokens_generated=5, energy_uwh=7_000, co2_ug=7 * DEFAULT_G_KWH
        ),
        ev.PostTransfers(
            transfers=[
                Transfer(
                    transfer_id="batch_1/0/charge", kind="usage", debit="customer:acme", credit="platform",
                    amount_micro=20, reference="batch_1",
                ),
                Transfer(
                    transfer_id="batch_1/0/pay/v1", kind="earning", debit="platform", credit="owner:v1",
                    amount_micro=14, reference="batch_1",
                ),
            ]
        ),
    ]  # fmt: skip
    assert [grant.lines for grant in grants(commands)] == [[2]], "half empty: the next line comes"
    second = grants(commands)[0].lease_id
    commands = scheduler.handle(results("v1", lease, [1], message_id="m2"), 1505)
    assert commands[4:] == [ev.DropLease(lease_id=lease)]
    commands = scheduler.handle(results("v1", second, [2], message_id="m3"), 2005)
    last = grants(commands)[0].lease_id
    commands = scheduler.handle(results("v1", last, [3], message_id="m4"), 2505)
    assert commands[4:] == [
        ev.DropLease(lease_id=last),
        ev.SaveJobStatus(job_no=1, status="finalizing"),
        ev.Note(subject="batch_1", what="all lines have ended"),
        ev.AssembleFiles(job_no=1),
    ]
    assert not scheduler.jobs
    assert not scheduler.leases


def test_a_repeated_result_changes_nothing() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(8), 0)
    lease = grants(scheduler.handle(report("v1", 1), 0))[0]
    first = results("v1", lease.lease_id, lease.lines)
    scheduler.handle(first, 10)
    again = scheduler.handle(first, 20)
    assert not of(again, ev.SaveResults)
    assert not of(again, ev.PostTransfers)
    assert not of(again, ev.SaveVehicleCounts)


def test_a_departure_moves_the_lines_with_their_tokens_and_pays_both_owners() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(1), 0)
    lease = grants(scheduler.handle(report("v1", 1), 0))[0]
    commands = scheduler.handle(returned("v1", lease.lease_id, [0], tokens=[3]), 100)
    assert of(commands, ev.SaveCheckpoints) == [
        ev.SaveCheckpoints(job_no=1, picks=[0], lines=[0], tokens=[3], shares=[[("v1", 3)]])
    ]
    assert of(commands, ev.DropLease)
    scheduler.handle(report("v1", 2, state=VehicleState.DENIED), 150)
    commands = scheduler.handle(report("v2", 1), 200)
    taken = grants(commands)[0]
    assert taken.lines == [0]
    assert taken.with_checkpoint == [0]
    commands = scheduler.handle(results("v2", taken.lease_id, [0], completion_tokens=[5], carried_tokens=[3]), 300)
    counts = {command.vehicle_id: command for command in of(commands, ev.SaveVehicleCounts)}
    assert counts["v2"].tokens_generated == 2
    assert counts["v2"].tokens_taken_over == 3
    assert counts["v1"].tokens_handed_on == 3
    (post,) = of(commands, ev.PostTransfers)
    # Cost 10 + 10 = 20, owners get 14: v1 did 3 of 5 output tokens (6 of 20 in value: 4.2), v2 the rest (9.8).
    assert {t.credit: t.amount_micro for t in post.transfers} == {"platform": 20, "owner:v1": 4, "owner:v2": 9}
    assert post.rests == {"owner:v1": 2 * ATTO_PER_MICRO // 10, "owner:v2": 8 * ATTO_PER_MICRO // 10}
    assert of(commands, ev.SaveJobCounts)[0].carried_tokens == 3


def test_a_new_incarnation_loses_the_leases_of_the_old_one_but_not_its_late_results() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(3), 0)
    lease = grants(scheduler.handle(report("v1", 1), 0))[0]
    commands = scheduler.handle(report("v1", 1, incarnation="i2"), 100)
    assert ev.DropLease(lease_id=lease.lease_id) in commands
    again = grants(commands)[0]
    assert set(lease.lines) <= set(again.lines)
    late = scheduler.handle(results("v1", lease.lease_id, lease.lines), 200)
    assert of(late, ev.SaveResults)
    revokes = of(late, ev.SendRevoke)
    assert [(revoke.lease_id, revoke.lines) for revoke in revokes] == [(again.lease_id, lease.lines)]


def test_a_silent_vehicle_loses_its_lines_and_they_go_elsewhere() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(1), 0)
    scheduler.handle(report("v1", 1), 0)
    scheduler.handle(report("v2", 1), sch.SILENT_AFTER_MS - 1)
    commands = scheduler.handle(ev.Ticked(cause_id="t"), sch.SILENT_AFTER_MS)
    assert ev.Note(subject="v1", what="offline: no report") in commands
    assert [grant.vehicle_id for grant in grants(commands)] == ["v2"]


def test_a_grant_that_got_lost_is_sent_again_and_in_the_end_given_to_another() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(1), 0)
    first = grants(scheduler.handle(report("v1", 1), 0))[0]
    now = 0
    for seq in range(2, 1 + sch.MAX_SENDS):
        now += sch.RESEND_AFTER_MS
        assert [grant.lease_id for grant in grants(scheduler.handle(report("v1", seq), now))] == [first.lease_id]
    scheduler.handle(report("v2", 1, state=VehicleState.DENIED), now)
    commands = scheduler.handle(report("v1", 99), now + sch.RESEND_AFTER_MS)
    assert ev.DropLease(lease_id=first.lease_id) in commands


def test_a_lease_that_we_do_not_know_is_asked_back() -> None:
    scheduler = Scheduler()
    assert ev.SendRevoke(vehicle_id="v1", lease_id="old") in scheduler.handle(report("v1", 1, held=["old"]), 0)


def test_reports_that_arrive_out_of_order_are_ignored() -> None:
    scheduler = Scheduler()
    scheduler.handle(report("v1", 5, state=VehicleState.DENIED), 0)
    assert scheduler.handle(report("v1", 4), 1) == []
    assert not scheduler.vehicles["v1"].usable(2)


def test_a_denied_vehicle_gets_no_work_and_its_reasons_are_told() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(1), 0)
    reasons = [Reason(code=ReasonCode.DOOR_OPEN), Reason(code=ReasonCode.UNLOCKED)]
    commands = scheduler.handle(report("v1", 1, state=VehicleState.DENIED, reasons=reasons), 0)
    assert of(commands, ev.Note) == [ev.Note(subject="v1", what="denied: door_open, unlocked")]
    assert not grants(commands)


def test_cancelling_lets_running_lines_finish_and_writes_the_files_then() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(10), 0)
    lease = grants(scheduler.handle(report("v1", 1, slots=2), 0))[0]
    commands = scheduler.handle(ev.CancelAsked(cause_id="c", job_no=1), 10)
    assert ev.SaveJobStatus(job_no=1, status="cancelling") in commands
    assert of(commands, ev.SendRevoke) == [ev.SendRevoke(vehicle_id="v1", lease_id=lease.lease_id, keep_running=True)]
    waiting = lease.lines[1:]
    commands = scheduler.handle(
        returned("v1", lease.lease_id, waiting, reason=ReturnReason.REVOKED, started=[False] * len(waiting)), 20
    )
    assert not grants(commands)
    commands = scheduler.handle(results("v1", lease.lease_id, lease.lines[:1]), 30)
    assert commands[-1] == ev.AssembleFiles(job_no=1)
    assert not of(commands, ev.SaveJobStatus), "cancelled is written with the files"


def test_the_window_closes_on_time() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(10, expires_ms=50_000), 0)
    lease = grants(scheduler.handle(report("v1", 1), 49_000))[0]
    commands = scheduler.handle(ev.Ticked(cause_id="t"), 50_000)
    assert ev.SendRevoke(vehicle_id="v1", lease_id=lease.lease_id) in commands
    assert commands[-1] == ev.AssembleFiles(job_no=1)
    assert scheduler.handle(results("v1", lease.lease_id, lease.lines), 50_001) == []


def test_a_line_that_kills_engines_ends_in_a_named_error() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(1), 0)
    commands = scheduler.handle(report("v1", 1), 0)
    now = 1_000  # waits end at whole seconds
    for turn in range(1, sch.MAX_STRIKES + 1):
        lease = grants(commands)[0]
        commands = scheduler.handle(returned("v1", lease.lease_id, [0], reason=ReturnReason.ENGINE_DIED), now)
        wait_ms = BACKOFF_MS << (turn - 1)
        commands += scheduler.handle(report("v1", 2 * turn), now + wait_ms - 1)
        assert not grants(commands), "not to the one that has just handed it back"
        now += wait_ms
        commands += scheduler.handle(report("v1", 2 * turn + 1), now)
    failures = of(commands, ev.SaveFailures)
    assert [failure.code for failure in failures] == ["engine_failed"]
    assert ev.AssembleFiles(job_no=1) in commands


def test_departures_are_never_held_against_a_line() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(1), 0)
    commands = scheduler.handle(report("v1", 1), 0)
    for turn in range(1, 50):
        lease = grants(commands)[0]
        commands = scheduler.handle(returned("v1", lease.lease_id, [0]), turn * BACKOFF_MS)
        commands += scheduler.handle(report("v1", 1 + turn), (turn + 1) * BACKOFF_MS)
        assert not of(commands, ev.SaveFailures)


def test_the_most_urgent_job_goes_first() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(5, job_no=1, expires_ms=2 * HOUR_MS), 0)
    scheduler.handle(started(5, job_no=2, expires_ms=HOUR_MS), 0)
    assert grants(scheduler.handle(report("v1", 1), 0))[0].job_no == 2


def test_a_live_request_goes_to_the_least_loaded_vehicle_that_was_not_tried() -> None:
    scheduler = Scheduler()
    for vehicle in ("v1", "v2", "v3"):
        scheduler.handle(report(vehicle, 1, model="other" if vehicle == "v3" else "m"), 0)
    scheduler.live_began("v1")
    assert scheduler.place_live("m", frozenset(), 1) == "v2"
    assert scheduler.place_live("m", frozenset({"v2"}), 1) == "v1"
    assert scheduler.place_live("m", frozenset({"v1", "v2"}), 1) is None
    assert scheduler.serves("m")
    assert not scheduler.serves("nobody's")


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"), [(0, 0, 0), (1, 0, 1), (10, 5, 20), (1_000_000, 0, 10**6)]
)
def test_cost(prompt: int, completion: int, expected: int) -> None:
    assert cost_atto(PRICE, prompt, completion) == expected * ATTO_PER_MICRO


def test_shares_are_trimmed_and_extended_in_order() -> None:
    assert trim([("a", 3), ("b", 4)], 5) == [("a", 3), ("b", 2)]
    assert extend([("a", 3)], "a", 2) == [("a", 5)]
    assert extend([("a", 3)], "b", 2) == [("a", 3), ("b", 2)]
    owed = split_atto(PRICE, 7, "b", [("a", 3), ("b", 4)])
    assert owed == {"a": 6 * ATTO_PER_MICRO * 7 // 10, "b": 15 * ATTO_PER_MICRO * 7 // 10}


class World(RuleBasedStateMachine):
    """Any order of reports, results, returns, repetitions, silence and restarts: the books stay true."""

    LINES = 12

    @initialize()
    def begin(self) -> None:
        self.scheduler = Scheduler()
        self.now = 0
        self.seq = 0
        self.accepted: dict[int, int] = {}
        self.paid = 0
        self.charged = 0
        self.rests: dict[str, int] = {}
        self.leases: dict[str, ev.SaveLease] = {}
        self.old: list[ev.SaveLease] = []
        self.granted: dict[int, set[str]] = {}
        self.held: dict[int, tuple[str, ...]] = {}
        self.ended = False
        self.message = 0
        self.take(self.scheduler.handle(started(self.LINES, expires_ms=10**12), 0), None)

    def take(self, commands: list[ev.Command], event: ev.ResultsArrived | None) -> None:
        for command in commands:
            if isinstance(command, ev.SaveLease):
                self.leases[command.lease_id] = command
                for line in command.lines:
                    self.granted.setdefault(line, set()).add(command.vehicle_id)
            elif isinstance(command, ev.DropLease):
                self.old.append(self.leases.pop(command.lease_id))
            elif isinstance(command, ev.SaveHeld):
                for line in command.lines:
                    self.held[line] = (*self.held.get(line, ()), command.vehicle_id)
            elif isinstance(command, ev.SaveResults):
                assert event is not None
                for place in command.picks:
                    line = event.lines[place]
                    assert command.vehicle_id in self.granted[line], "only who was given a line can finish it"
                    self.accepted[line] = self.accepted.get(line, 0) + 1
            elif isinstance(command, ev.SaveFailures):
                for line in command.lines:
                    self.accepted[line] = self.accepted.get(line, 0) + 1
            elif isinstance(command, ev.PostTransfers):
                self.charged += sum(t.amount_micro for t in command.transfers if t.kind == "usage")
                self.paid += sum(t.amount_micro for t in command.transfers if t.kind != "usage")
                self.rests |= command.rests
            elif isinstance(command, ev.AssembleFiles):
                assert not self.ended
                self.ended = True

    def pick(self, number: int, *, old: bool) -> ev.SaveLease | None:
        known = sorted(self.leases.values(), key=lambda lease: lease.lease_id)
        known += self.old if old else []
        return known[number % len(known)] if known else None

    @rule(vehicle=st.sampled_from("abc"), incarnation=st.sampled_from("xy"), ready=st.booleans(), hold=st.booleans())
    def report(self, vehicle: str, incarnation: str, ready: bool, hold: bool) -> None:
        self.seq += 1
        held = [lease.lease_id for lease in self.leases.values() if lease.vehicle_id == vehicle] if hold else []
        state = VehicleState.READY if ready else VehicleState.DENIED
        event = report(vehicle, self.seq, held, incarnation=incarnation, state=state, slots=2)
        self.take(self.scheduler.handle(event, self.now), None)

    @rule(number=st.integers(0, 99), part=st.integers(1, 9), status=st.sampled_from([200, 200, 200, 400, 500]),
          carried=st.integers(0, 5))  # fmt: skip
    def finish(self, number: int, part: int, status: int, carried: int) -> None:
        lease = self.pick(number, old=True)
        if lease is None:
            return
        lines = lease.lines[:part] * 2  # every line twice
        self.message += 1
        event = results(
            lease.vehicle_id, lease.lease_id, lines, statuses=[status] * len(lines),
            carried_tokens=[carried] * len(lines), message_id=str(self.message),
        )  # fmt: skip
        for _ in range(2):  # every message twice
            self.take(self.scheduler.handle(event, self.now), event)

    @rule(number=st.integers(0, 99), part=st.integers(1, 9), tokens=st.integers(0, 9),
          reason=st.sampled_from(list(ReturnReason)))  # fmt: skip
    def hand_back(self, number: int, part: int, tokens: int, reason: ReturnReason) -> None:
        lease = self.pick(number, old=True)
        if lease is not None:
            lines = lease.lines[-part:] * 2
            event = returned(lease.vehicle_id, lease.lease_id, lines, tokens=[tokens] * len(lines), reason=reason)
            self.take(self.scheduler.handle(event, self.now), None)

    @rule(number=st.integers(0, 99), tokens=st.integers(1, 9))
    def progress(self, number: int, tokens: int) -> None:
        lease = self.pick(number, old=True)
        if lease is not None:
            event = ev.ProgressMade(
                cause_id="p", vehicle_id=lease.vehicle_id, lease_id=lease.lease_id, job_id="batch_1",
                lines=lease.lines, tokens=[tokens] * len(lease.lines), sizes=[50] * len(lease.lines),
            )  # fmt: skip
            self.take(self.scheduler.handle(event, self.now), None)

    @rule(number=st.integers(0, 99), liar=st.sampled_from("abcz"), kind=st.sampled_from(["finish", "back", "grow"]),
          job=st.sampled_from(["batch_1", "none"]), lines=st.lists(st.integers(0, 13), max_size=4))  # fmt: skip
    def lie(self, number: int, liar: str, kind: str, job: str, lines: list[int]) -> None:
        """Any vehicle says anything of any line, under any lease."""
        lease = self.pick(number, old=True)
        if lease is None:
            return
        self.message += 1
        n = len(lines)
        event: ev.ResultsArrived | ev.WorkReturned | ev.ProgressMade
        if kind == "finish":
            event = results(liar, lease.lease_id, lines, job=job, message_id=f"lie{self.message}")
        elif kind == "back":
            event = msgspec.structs.replace(returned(liar, lease.lease_id, lines, tokens=[7] * n), job_id=job)
        else:
            event = ev.ProgressMade(
                cause_id="c", vehicle_id=liar, lease_id=lease.lease_id, job_id=job,
                lines=lines, tokens=[8] * n, sizes=[9] * n,
            )  # fmt: skip
        self.take(self.scheduler.handle(event, self.now), event if isinstance(event, ev.ResultsArrived) else None)

    @rule(ms=st.sampled_from([1, 1000, 5000, 30_000, 400_000]))
    def time_passes(self, ms: int) -> None:
        self.now += ms
        self.take(self.scheduler.handle(ev.Ticked(cause_id="t"), self.now), None)

    @rule()
    def restart(self) -> None:
        """The process is killed: the state comes back from what was saved."""
        if self.ended:
            return
        before = self.scheduler
        self.scheduler = Scheduler(before.epoch + 1)
        done = np.array(sorted(self.accepted), dtype=np.int64)
        job = before.jobs[1]
        self.scheduler.restore_job(
            started(self.LINES, expires_ms=10**12), done=done, carried=job.carried,
            checkpoint_bytes=job.checkpoint_bytes, held=dict(self.held), cancelling_ms=None,
        )  # fmt: skip
        self.scheduler.rests.restore(self.rests.items())
        for lease in self.leases.values():
            self.scheduler.restore_lease(lease)
        self.take(self.scheduler.resume(self.now, settled_ms=0), None)

    @invariant()
    def the_books_are_true(self) -> None:
        self.scheduler.validate()
        assert all(count == 1 for count in self.accepted.values()), "a line counts once"
        owed = sum(atto for name, atto in self.rests.items() if name.startswith("owner:"))
        cost = self.charged * ATTO_PER_MICRO + self.rests.get("job:batch_1", 0)
        assert (self.paid * ATTO_PER_MICRO + owed) * 10 == cost * 7, "owners get their part, to the last bit"
        assert self.ended == (len(self.accepted) == self.LINES), "a job ends when its last line has"
        if not self.ended:
            job = self.scheduler.jobs[1]
            assert {int(line) for line in np.flatnonzero(job.state == DONE)} == set(self.accepted)
            known = {lease_id: set(lease.lines) for lease_id, lease in self.scheduler.leases.items()}
            assert set(known) == set(self.leases), "the books know every lease"

    def teardown(self) -> None:
        """The world heals: everything finishes."""
        for turn in range(4 * self.LINES):
            if self.ended:
                break
            self.now += sch.SILENT_AFTER_MS + BACKOFF_MS
            self.take(self.scheduler.handle(ev.Ticked(cause_id="t"), self.now), None)
            self.seq += 1
            self.take(self.scheduler.handle(report("z", self.seq, incarnation="new"), self.now), None)
            for lease in list(self.scheduler.leases.values()):
                event = results("z", lease.lease_id, sorted(lease.lines), message_id=f"heal{turn}-{lease.lease_id}")
                self.take(self.scheduler.handle(event, self.now), event)
        assert self.ended, "when the world heals, every job ends"
        assert len(self.accepted) == self.LINES


World.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWorld = World.TestCase
