"""A scheduler that starts from the books: in bulk as one by one, and with what it had learnt before."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motorpool.core import events as ev
from motorpool.core import snapshot
from motorpool.core.columns import NONE, READY
from motorpool.core.jobs import DONE
from motorpool.core.pricing import Price
from motorpool.core.recovery import LeaseRows, VehicleRows
from motorpool.core.scheduler import Scheduler
from motorpool.types import Kind, VehicleState
from motorpool.wire import State

HOUR_MS = 3_600_000
NAMES = [f"v{number}" for number in range(8)]
LINES = 12


def started(job_no: int, lines: int = LINES, **changes: Any) -> ev.JobStarted:
    fields: dict[str, Any] = {"account": f"customer-{job_no % 2}", "model": "m", "expires_ms": 10 * HOUR_MS}
    return ev.JobStarted(
        cause_id="c",
        job_no=job_no,
        job_id=f"batch_{job_no}",
        kind=Kind.CHAT,
        price=Price(input_micro=1_000_000, output_micro=2_000_000),
        lengths=np.full(lines, 100, dtype=np.uint32),
        limits=np.full(lines, 100, dtype=np.uint32),
        **(fields | changes),
    )


def vehicle_rows(rows: list[dict[str, Any]]) -> VehicleRows:
    return VehicleRows(
        names=[row["vehicle_id"] for row in rows],
        regions=[row["region"] for row in rows],
        sites=[row["site"] for row in rows],
        withdrawn=np.array([row["withdrawn"] for row in rows], np.bool_),
        withdrawal_seen=np.array([row["withdrawal_seen"] for row in rows], np.bool_),
        paused_until_ms=np.array([row["paused_until_ms"] for row in rows], np.int64),
        trust=np.array([row["trust"] for row in rows], np.int64),
        reserve=np.array([row["reserve"] for row in rows], np.bool_),
    )


def lease_rows(leases: list[ev.SaveLease]) -> LeaseRows:
    lines = [line for lease in leases for line in lease.lines]
    return LeaseRows(
        lease_ids=[lease.lease_id for lease in leases],
        vehicle_ids=[lease.vehicle_id for lease in leases],
        incarnations=[lease.incarnation for lease in leases],
        job_nos=np.array([lease.job_no for lease in leases], np.int64),
        granted_ms=np.array([lease.granted_ms for lease in leases], np.int64),
        expires_ms=np.array([lease.expires_ms for lease in leases], np.int64),
        lines=np.array(lines, np.int64),
        counts=np.array([len(lease.lines) for lease in leases], np.int64),
        bases={place: lease.base for place, lease in enumerate(leases) if lease.base},
    )


def same_tables(one: Scheduler, two: Scheduler) -> None:
    """Every column of every table, the names, the lines of jobs, and what leases are called."""
    left: Any
    right: Any
    for name, left, right in zip(one.cell.t._fields, list[Any](one.cell.t), list[Any](two.cell.t), strict=True):
        if name == "vehicles":
            left, right = left[: one.cell.ids.rows], right[: two.cell.ids.rows]  # noqa: PLW2901 - the rest is empty
        if name == "leases":
            left, right = left[left["number"] != NONE], right[right["number"] != NONE]  # noqa: PLW2901
        assert np.array_equal(left, right), name
    assert list(one.vehicles) == list(two.vehicles)
    assert list(one.leases) == list(two.leases)
    assert [one.leases[name].lines for name in one.leases] == [two.leases[name].lines for name in two.leases]
    for job_no in one.jobs:
        assert np.array_equal(one.jobs[job_no].state, two.jobs[job_no].state)
        assert np.array_equal(one.jobs[job_no].holder, two.jobs[job_no].holder)
    assert one._base == two._base
    assert one.cell.other_incarnations == two.cell.other_incarnations


vehicles = st.fixed_dictionaries(
    {
        "region": st.sampled_from(["", "DE", "FR"]),
        "site": st.sampled_from(["", "north"]),
        "withdrawn": st.booleans(),
        "withdrawal_seen": st.booleans(),
        "paused_until_ms": st.sampled_from([0, 1, 999, 1000, 1001, 1 << 50]),
        "trust": st.integers(-1, 5),
        "reserve": st.booleans(),
    }
)
leases = st.builds(
    lambda job, vehicle, incarnation, granted, lines, base: ev.SaveLease(
        lease_id="", job_no=job, vehicle_id=vehicle, incarnation=incarnation, granted_ms=granted,
        expires_ms=granted + HOUR_MS, lines=lines, base=dict.fromkeys(lines, 3) if base else {},
    ),
    st.integers(1, 3), st.sampled_from(NAMES), st.sampled_from(["", "i1", "0123456789abcdef", "0" * 16, "A" * 16]),
    st.integers(0, 5), st.lists(st.integers(0, LINES - 1), max_size=4), st.booleans(),
)  # fmt: skip


def a_start(
    jobs: list[list[int]], rows: list[dict[str, Any]], saved: list[ev.SaveLease], *, bulk: bool, fast: bool = False
) -> tuple[Scheduler, list[ev.Command]]:
    """A scheduler from such books; and what it says when it goes on."""
    scheduler = Scheduler(7, fast=fast)
    if bulk:
        scheduler.restore_vehicles(vehicle_rows(rows))
    else:
        for row in rows:
            scheduler.restore_vehicle(**row)
    for job_no, done in enumerate(jobs, 1):
        scheduler.restore_job(
            started(job_no),
            done=np.array(done, np.int64),
            carried={1: [("v1", 5)], 7: [("v2", 9)]},
            checkpoint_bytes={1: 10, 7: 20},
            held={2: ("v1",)},
            cancelling_ms=None,
        )
    if bulk:
        scheduler.restore_leases(lease_rows(saved))
    else:
        for lease in saved:
            scheduler.restore_lease(lease)
    return scheduler, scheduler.resume(10, settled_ms=20)


@pytest.mark.parametrize("fast", [False, True])
def test_the_books_come_back_in_bulk_as_they_do_one_by_one(fast: bool) -> None:
    if fast:
        pytest.importorskip("numba")

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.lists(st.integers(0, LINES - 1), max_size=6, unique=True), min_size=3, max_size=3),
        st.lists(vehicles, max_size=len(NAMES)),
        st.lists(leases, max_size=90),
    )
    def both(jobs: list[list[int]], rows: list[dict[str, Any]], saved: list[ev.SaveLease]) -> None:
        named = [{"vehicle_id": name} | row for name, row in zip(NAMES, rows, strict=False)]
        saved = [
            ev.SaveLease(**({f: getattr(x, f) for f in x.__struct_fields__} | {"lease_id": f"old-{n}"}))
            for n, x in enumerate(saved)
        ]
        one, said = a_start(jobs, named, saved, bulk=False)
        two, also_said = a_start(jobs, named, saved, bulk=True, fast=fast)
        same_tables(one, two)
        assert said == also_said
        two.validate()

    both()


# -- what was learnt ---------------------------------------------------------------------------------------------------


def report(vehicle: str, seq: int, **changes: Any) -> ev.VehicleReported:
    fields: dict[str, Any] = {"incarnation": "i1", "state": VehicleState.READY, "model": "m", "slots": 2}
    return ev.VehicleReported(cause_id="c", vehicle_id=vehicle, state=State(seq=seq, **(fields | changes)))


def answered(lease: ev.SendGrant, lines: list[int], message: str) -> ev.ResultsArrived:
    n = len(lines)
    return ev.ResultsArrived(
        cause_id="c", vehicle_id=lease.vehicle_id, lease_id=lease.lease_id, job_id=f"batch_{lease.job_no}",
        message_id=message, lines=lines, statuses=[200] * n, prompt_tokens=[10] * n, completion_tokens=[50] * n,
        cached_tokens=[0] * n, carried_tokens=[0] * n, energy_mwh=1,
    )  # fmt: skip


def grants(commands: list[ev.Command]) -> list[ev.SendGrant]:
    return [command for command in commands if isinstance(command, ev.SendGrant)]


def enrolled() -> VehicleRows:
    row = {"region": "DE", "site": "", "withdrawn": False, "withdrawal_seen": False, "paused_until_ms": 0, "trust": 0}
    return vehicle_rows([{"vehicle_id": name, "reserve": False} | row for name in NAMES])


class Books:
    """What a scheduler has committed, as the shell keeps it."""

    def __init__(self, jobs: list[ev.JobStarted]) -> None:
        self.jobs = jobs
        self.leases: dict[str, ev.SaveLease] = {}
        self.done: dict[int, list[int]] = {job.job_no: [] for job in jobs}
        self.paid: list[str] = []

    def commit(self, commands: list[ev.Command], event: ev.Event | None) -> None:
        for command in commands:
            if isinstance(command, ev.SaveLease):
                self.leases[command.lease_id] = command
            elif isinstance(command, ev.DropLease):
                self.leases.pop(command.lease_id, None)
            elif isinstance(command, ev.SaveResults):
                assert isinstance(event, ev.ResultsArrived)
                self.done[command.job_no] += [event.lines[pick] for pick in command.picks]
            elif isinstance(command, ev.PostTransfers):
                self.paid += [transfer.transfer_id for transfer in command.transfers]

    def started(self, kept: bytes | None, now_ms: int, *, fast: bool = False) -> Scheduler:
        """A scheduler from these books, with what was learnt."""
        scheduler = Scheduler(2, fast=fast)
        scheduler.restore_vehicles(enrolled())
        for job in self.jobs:
            scheduler.restore_job(
                job, done=np.array(self.done[job.job_no], np.int64), carried={}, checkpoint_bytes={}, held={},
                cancelling_ms=None,
            )  # fmt: skip
        saved = sorted(self.leases.values(), key=lambda lease: (lease.granted_ms, lease.lease_id))
        scheduler.restore_leases(lease_rows(saved))
        if kept is not None:
            snapshot.apply(scheduler, snapshot.from_bytes(kept), now_ms)
        self.commit(scheduler.resume(now_ms, settled_ms=now_ms), None)
        return scheduler


class Day:
    """Vehicles of different speed that work for a while."""

    def __init__(self, seed: int, *, fast: bool) -> None:
        self.draw = np.random.Generator(np.random.Philox(key=[seed, 5]))
        self.books = Books([started(1, 40_000), started(2, 40_000)])
        self.scheduler = Scheduler(1, fast=fast)
        self.names = NAMES
        self.scheduler.restore_vehicles(enrolled())
        self.open: list[tuple[ev.SendGrant, list[int]]] = []
        self.now_ms, self.seq = 1_000_000, 0
        for job in self.books.jobs:
            self.take(job)

    def take(self, event: Any) -> None:
        commands = self.scheduler.handle(event, self.now_ms)
        self.books.commit(commands, event)
        self.open += [(grant, list(grant.lines)) for grant in grants(commands)]

    def work(self, steps: int) -> None:
        for _ in range(steps):
            self.now_ms += int(self.draw.integers(200, 4_000))
            self.seq += 1
            if self.open and self.draw.random() < 0.7:
                grant, lines = self.open.pop(int(self.draw.integers(len(self.open))))
                part = 1 + int(self.draw.integers(len(lines)))
                self.take(answered(grant, lines[:part], f"m{self.seq}"))
                if lines[part:]:
                    self.open.append((grant, lines[part:]))
            else:
                name = self.names[int(self.draw.integers(len(self.names)))]
                held = [lease.lease_id for lease in self.books.leases.values() if lease.vehicle_id == name]
                risk = float(self.draw.random()) / 10
                self.take(report(name, self.seq, held=held, risk_15min=risk, stay_bound_ms=HOUR_MS))


def next_ones(scheduler: Scheduler, names: list[str], now_ms: int) -> list[tuple[str, int, list[int]]]:
    """Who gets which lines next, when all vehicles are here and have said the same."""
    cell = scheduler.cell
    for name in names:
        v = cell.find(name)
        for column, value in (("seen_ms", now_ms - 1), ("stay_min", 60), ("risk_pct", 2)):
            cell.t.vehicles[column][v] = value
        cell.k.report(cell.t, v, READY, cell.model("m"), cell.region("DE"), 2, 100, now_ms)
    return [(grant.vehicle_id, grant.job_no, grant.lines) for grant in grants(scheduler._fill_all(now_ms))]


def learnt_of(scheduler: Scheduler) -> dict[str, list[Any]]:
    """All columns of a snapshot, by vehicle."""
    names = snapshot.LEARNT.names or ()
    columns = scheduler.cell.t.vehicles
    return {
        name: [columns[column][vehicle.row].item() for column in names] for name, vehicle in scheduler.vehicles.items()
    }


@pytest.mark.parametrize("fast", [False, True])
def test_a_cell_that_starts_again_knows_what_it_had_learnt_and_decides_the_same(fast: bool) -> None:
    if fast:
        pytest.importorskip("numba")

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 1 << 32), st.integers(0, 150))
    def both(seed: int, steps: int) -> None:
        day = Day(seed, fast=fast)
        day.work(steps)
        kept = snapshot.to_bytes(snapshot.take(day.scheduler, day.now_ms).learnt())
        again = day.books.started(kept, day.now_ms, fast=fast)
        again.validate()
        before, after = learnt_of(day.scheduler), learnt_of(again)
        for name, row in after.items():
            assert row == before[name]
        for job_no, job in again.jobs.items():
            was = day.scheduler.jobs[job_no]
            row, old = again.cell.t.jobs[job.row], day.scheduler.cell.t.jobs[was.row]
            assert (job.done, job.leased) == (was.done, was.leased)
            assert row["work_per_line"] == pytest.approx(old["work_per_line"])
        assert again.cell.t.tenants["used"].tolist() == day.scheduler.cell.t.tenants["used"].tolist()
        later_ms = day.now_ms + 10_000
        decided = next_ones(again, NAMES, later_ms)
        assert decided == next_ones(day.scheduler, NAMES, later_ms)
        again.validate()
        counts.append(len(decided))

    counts: list[int] = []
    both()
    assert sum(counts) > len(counts), "there was something to decide"


def test_what_was_committed_after_the_snapshot_is_neither_lost_nor_paid_twice() -> None:
    for seed in range(6):
        day = Day(seed, fast=False)
        day.work(60)
        kept = snapshot.to_bytes(snapshot.take(day.scheduler, day.now_ms).learnt())
        day.work(60)
        done = {number: sorted(lines) for number, lines in day.books.done.items()}
        held = {lease.lease_id: sorted(lease.lines) for lease in day.books.leases.values()}
        open_ones = {
            lease: [line for line in lines if line not in done[day.books.leases[lease].job_no]]
            for lease, lines in held.items()
        }
        again = day.scheduler = day.books.started(kept, day.now_ms)
        again.validate()
        assert {name: again.leases[name].lines for name in again.leases} == {
            name: lines for name, lines in open_ones.items() if lines
        }
        paid = list(day.books.paid)
        for number, lines in done.items():
            assert np.flatnonzero(again.jobs[number].state == DONE).tolist() == lines
        for lease in list(held):  # everything comes a second time
            saved = day.books.leases.get(lease)
            if saved is None:
                continue
            grant = next(grant for grant, _ in day.open if grant.lease_id == lease)
            day.take(answered(grant, grant.lines, f"again-{lease}"))
        new = day.books.paid[len(paid) :]
        assert len(set(new)) == len(new)
        assert not set(new) & set(paid)
        for number, lines in day.books.done.items():
            assert len(set(lines)) == len(lines), "a line ended twice"
            assert set(done[number]) <= set(lines)
        day.work(30)
        again.validate()


def a_snapshot() -> bytes:
    day = Day(3, fast=False)
    day.work(20)
    return snapshot.to_bytes(snapshot.take(day.scheduler, day.now_ms).learnt())


def test_damage_is_noticed_wherever_it_is() -> None:
    kept = a_snapshot()
    assert snapshot.from_bytes(kept).rows()["speed"].any()
    for place in range(len(kept)):
        with pytest.raises(snapshot.SnapshotError):
            snapshot.from_bytes(kept[:place])
        for bit in (1, 128):
            damaged = bytearray(kept)
            damaged[place] ^= bit
            with pytest.raises(snapshot.SnapshotError):
                snapshot.from_bytes(bytes(damaged))
    with pytest.raises(snapshot.SnapshotError):
        snapshot.from_bytes(kept + b"x")


@pytest.mark.parametrize(
    "change",
    [{"ends": b""}, {"names": b"v"}, {"vehicles": b"x"}, {"vehicles": b""}, {"ends": b"\xff\0\0\0\0\0\0\0\0\0\0\0"}],
)
def test_a_snapshot_whose_columns_do_not_fit_is_refused(change: dict[str, bytes]) -> None:
    learnt = snapshot.from_bytes(a_snapshot())
    with pytest.raises(snapshot.SnapshotError):
        snapshot.from_bytes(snapshot.to_bytes(msgspec.structs.replace(learnt, **change)))


def test_a_snapshot_says_nothing_about_a_car_and_leaves_out_who_has_withdrawn() -> None:
    day = Day(3, fast=False)
    day.work(80)
    gone = ev.OwnerSpoke(cause_id="o", vehicle_id="v1", withdrawn=True, paused_until_ms=0, what="")
    day.scheduler.handle(gone, day.now_ms)
    learnt = snapshot.take(day.scheduler, day.now_ms).learnt()
    assert b"v1" not in learnt.names
    assert b"v2" in learnt.names
    kept_of_cars = {"result_ms", "speed", "finished", "blocked_until_s", "outage_s", "failures", "narrowed"}
    assert set(snapshot.LEARNT.names or ()) == kept_of_cars, "whoever adds a column says here that it tells nothing"


def test_nothing_comes_into_being_from_a_snapshot() -> None:
    day = Day(3, fast=False)
    day.work(80)
    learnt = snapshot.take(day.scheduler, day.now_ms).learnt()
    empty = Scheduler(9)
    assert snapshot.apply(empty, learnt, day.now_ms) == 0
    assert (len(empty.vehicles), len(empty.jobs), empty.cell.model_names, empty.cell.tenant_names) == (0, 0, [], [])


def test_after_the_clock_was_set_back_nobody_waits_for_good() -> None:
    day = Day(3, fast=False)
    day.work(80)
    day.scheduler.cell.t.vehicles["blocked_until_s"] = 2_000
    learnt = snapshot.take(day.scheduler, day.now_ms).learnt()
    again = day.books.started(None, 5_000)
    snapshot.apply(again, learnt, 5_000)
    for vehicle in again.vehicles.values():
        assert vehicle.blocked_until_ms == 0
    assert int(again.cell.t.vehicles["result_ms"].max()) <= 5_000


def test_a_line_that_came_in_late_after_a_start_is_not_granted_again() -> None:
    scheduler = Scheduler(3)
    scheduler.restore_job(
        started(1), done=np.array([0]), carried={}, checkpoint_bytes={}, held={9: ("v1",)}, cancelling_ms=None
    )
    scheduler.resume(0, settled_ms=0)
    late = answered(msgspec.structs.replace(A_GRANT, lease_id="old"), [9], "m1")
    assert next(type(command) for command in scheduler.handle(late, 5)) is ev.SaveResults
    seen: list[int] = []
    for seq in range(1, 30):
        for grant in grants(scheduler.handle(report("v2", seq), 1_000 * seq)):
            seen += grant.lines
            scheduler.handle(answered(grant, grant.lines, f"m{seq}-{grant.lease_id}"), 1_000 * seq)
        scheduler.validate()
    assert sorted(seen) == [*range(1, 9), 10, 11]
    assert not scheduler.jobs, "all of it has ended"


A_GRANT = ev.SendGrant(
    lease_id="", job_no=1, vehicle_id="v1", incarnation="i1", model="m", kind=Kind.CHAT, ttl_ms=1, lines=[],
    with_checkpoint=[], max_offline_ms=1, pay_input_micro=1, pay_output_micro=1,
)  # fmt: skip
