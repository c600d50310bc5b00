"""The columns of a cell and the kernels over them: names, growth, order, depth, places, models, patience, recall."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motorpool.core import kernels as k
from motorpool.core.cell import Cell
from motorpool.core.columns import (
    BEHIND,
    BEST_EFFORT,
    LEASE,
    NEVER,
    NONE,
    OFFLINE,
    READY,
    RELAXED,
    VEHICLE,
    WHOLE,
)
from motorpool.core.ids import Ids
from motorpool.core.planning import MAX_PATIENCE_MS, PATIENCE_MS, SILENT_MS, cover

HOUR_MS = 3_600_000


def a_vehicle(cell: Cell, name: str, **changes: Any) -> int:
    v = cell.vehicle(name)
    fields: dict[str, Any] = {"speed": 100.0, "stay_min": 600, "trust": 1, "memory_gb": 16}
    model = cell.model(changes.pop("model", "m"))
    region = cell.region(changes.pop("region", "DE"))
    for column, value in (fields | changes).items():
        cell.t.vehicles[column][v] = value
    k.report(cell.t, v, READY, model, region, 2, 100, 1000)
    return v


def a_job(cell: Cell, number: int = 1, *, lines: int = 100, hours: float = 4, **changes: Any) -> int:
    fields: dict[str, Any] = {"model": "m", "tenant": "a", "most_work": 100.0}
    return cell.enter_job(job_no=number, expires_ms=round(hours * HOUR_MS), total=lines, **(fields | changes))


def plan(cell: Cell, *rows: int, now_ms: int = 1000) -> None:
    k.plan(cell.t, np.array(rows, np.int64), now_ms)


def order(cell: Cell, model: str = "m") -> list[int]:
    row = cell.t.models[cell.model(model)]
    return [int(j) for j in cell.t.order[row["first"] : row["first"] + row["count"]]]


def lease(cell: Cell, v: int, j: int, count: int, now_ms: int = 1000) -> int:
    return cell.lease(v, j, count, 0.0, now_ms=now_ms, expires_ms=now_ms + HOUR_MS)


def test_a_row_of_a_vehicle_is_as_long_as_the_docs_say() -> None:
    assert VEHICLE.itemsize == 96
    assert LEASE.itemsize == 56


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=9), st.booleans()), max_size=200))
def test_names_are_found_again_as_in_a_dict(steps: list[tuple[str, bool]]) -> None:
    ids = Ids()
    known: dict[str, int] = {}
    for name, removed in steps:
        if removed and name in known:
            ids.remove(known.pop(name))
        else:
            row = ids.add(name)
            assert row == known.setdefault(name, row)
    assert {name: ids.find(name) for name in known} == known
    assert [ids.name(row) for row in ids] == sorted(known, key=known.__getitem__)
    assert len(ids) == len(known)
    assert all(ids.find(name) == -1 for name, _ in steps if name not in known)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.lists(st.text(max_size=5), max_size=60), st.booleans()), max_size=6))
def test_many_names_at_once_are_as_one_after_the_other(steps: list[tuple[list[str], bool]]) -> None:
    ids, one_by_one = Ids(), Ids()
    for names, removed in steps:
        assert ids.add_all(names).tolist() == [one_by_one.add(name) for name in names]
        if removed and names:
            for each in (ids, one_by_one):
                each.remove(each.find(names[0]))
        assert ids.find_all([name.encode() for name in names]).tolist() == [one_by_one.find(name) for name in names]
    assert [ids.name(row) for row in ids] == [one_by_one.name(row) for row in one_by_one]


def test_many_names_stay_found_while_the_table_of_slots_fills() -> None:
    ids = Ids()
    names = [f"v{number}" for number in range(5_000)]
    for start in range(0, 5_000, 700):
        ids.add_all(names[start : start + 700])
    assert [ids.find(name) for name in names] == list(range(5_000))
    ids.settle()
    assert ids.add_all(["v7", "new", "v9", "new"]).tolist() == [7, 5_000, 9, 5_000], "few among many"
    assert ids.add_all(names[::-1]).tolist() == list(range(5_000))[::-1]
    ids.remove(7)
    assert ids.add_all([*names[:9], "newer"]).tolist() == [0, 1, 2, 3, 4, 5, 6, 5_001, 8, 5_002]
    assert ids.find_all([name.encode() for name in names]).tolist() == [ids.find(name) for name in names]


def test_tables_grow_and_keep_what_they_hold() -> None:
    cell = Cell()
    rows = [a_vehicle(cell, f"v{number}", model=f"m{number % 9}", region=f"R{number % 7}") for number in range(300)]
    jobs = [a_job(cell, number, model=f"m{number % 9}") for number in range(90)]
    leases = [lease(cell, v, jobs[v % 9], 1) for v in rows]
    assert len(set(leases)) == 300
    assert [cell.leases_of(v) for v in rows] == [[row] for row in leases]
    assert int(cell.t.models["serving"].sum()) == 300
    for row in leases:
        k.shrink_lease(cell.t, row, 1)
        k.close_lease(cell.t, row)
    assert not cell.t.vehicles["outstanding"].any()
    assert len(cell.all_leases()) == 0
    assert lease(cell, rows[0], jobs[0], 1) in leases, "rows are used again"


def test_customers_take_turns_while_there_is_time_and_ends_rule_when_there_is_none() -> None:
    cell = Cell()
    for number in range(4):
        a_vehicle(cell, f"v{number}")
    late = a_job(cell, 1, tenant="greedy", hours=5)
    soon = a_job(cell, 2, tenant="greedy", hours=4)
    other = a_job(cell, 3, tenant="modest", hours=20)
    cell.t.tenants["used"][cell.tenant("greedy")] = 1000.0
    plan(cell, late, soon, other)
    assert order(cell) == [other, soon, late], "who has had least goes first, and of one customer what ends first"
    assert all(cell.t.jobs["flags"][j] & RELAXED for j in (late, soon, other))
    cell.t.tenants["weight"][cell.tenant("greedy")] = 1e6
    cell.t.tenants["used"][cell.tenant("modest")] = 10.0
    plan(cell, late, soon, other)
    assert order(cell) == [soon, late, other], "a weight is a right to so much more"
    big = a_job(cell, 4, tenant="modest", lines=300_000, hours=21)
    plan(cell, late, soon, other, big)
    assert order(cell) == [soon, late, other, big], "it cannot all be done: strictly by their ends"
    assert cell.t.jobs["flags"][big] & BEHIND


def test_work_without_a_promise_goes_last_and_puts_nothing_in_danger() -> None:
    cell = Cell()
    a_vehicle(cell, "v")
    endless = a_job(cell, 1, lines=10_000_000, hours=1, flags=BEST_EFFORT)
    promised = a_job(cell, 2, hours=9)
    plan(cell, endless, promised)
    assert order(cell) == [promised, endless]
    assert cell.t.jobs["flags"][promised] & RELAXED
    assert not cell.t.jobs["flags"][endless] & BEHIND


def test_work_is_reckoned_where_it_may_run() -> None:
    cell = Cell()
    a_vehicle(cell, "here", region="DE", speed=10.0)
    a_vehicle(cell, "there", region="NO", speed=1000.0)
    locked = a_job(cell, 1, lines=2_000, regions=1 << cell.region("DE"))
    free = a_job(cell, 2, lines=2_000)
    plan(cell, locked)
    assert cell.t.jobs["flags"][locked] & BEHIND, "200,000 tokens at 10 a second are no four hours"
    plan(cell, free)
    assert cell.t.jobs["flags"][free] & RELAXED
    assert k.refusal(cell.t, cell.find("there"), locked) == k.OTHER_REGION
    assert k.refusal(cell.t, cell.find("here"), locked) == k.OK


@pytest.mark.parametrize(
    ("outage_s", "risk_pct", "slack_ms", "tight_ms", "expected_ms"),
    [
        (0, 0, NEVER, NEVER, 900_000),
        (0, 0, NEVER, 2_000_000, 500_000),
        (0, 0, NEVER, 0, 120_000),
        (0, 0, 2_000_000, NEVER, 500_000),
        (100, 0, NEVER, 0, 300_000),
        (3_000, 0, NEVER, 0, 900_000),
        (100, 0, 400_000, NEVER, 100_000),
        (100, 0, -5, -5, 20_000),
        (100, 50, NEVER, NEVER, 64_921),
        (100, 100, NEVER, NEVER, 20_000),
    ],
)
def test_a_queue_is_as_deep_as_silences_slack_and_risk_say(
    outage_s: int, risk_pct: int, slack_ms: int, tight_ms: int, expected_ms: int
) -> None:
    assert k.depth_ms(outage_s, risk_pct, slack_ms, tight_ms) == expected_ms


def test_a_vehicle_gets_two_lines_for_each_slot_and_when_it_is_known_as_much_as_its_queue_holds() -> None:
    cell = Cell()
    v = a_vehicle(cell, "v", speed=0.0)
    j = a_job(cell, lines=100_000, hours=1000)
    plan(cell, j)
    assert k.pull(cell.t, v, 1000, cell.out) == j
    assert int(cell.out[0]) == 4
    cell.t.vehicles["speed"][v] = 100.0
    k.recount(cell.t, v)
    plan(cell, j)
    assert k.pull(cell.t, v, 1000, cell.out) == j
    assert int(cell.out[0]) == 120, "two minutes of one line a second"
    lease(cell, v, j, 120)
    assert k.pull(cell.t, v, 1000, cell.out) == NONE
    assert int(cell.out[1]) == k.QUEUE_FULL


def test_a_site_gives_no_more_than_its_watts() -> None:
    cell = Cell()
    site = cell.site("car park")
    cell.t.sites["limit_w"][site] = 250
    rows = [a_vehicle(cell, f"v{number}", site=site) for number in range(4)]
    j = a_job(cell, lines=1000)
    plan(cell, j)
    working = []
    for v in rows:
        if k.pull(cell.t, v, 1000, cell.out) == NONE:
            assert int(cell.out[1]) == k.SITE_FULL
            continue
        working.append(lease(cell, v, j, 1))
    assert len(working) == 2
    assert int(cell.t.sites["used_w"][site]) == 200
    k.shrink_lease(cell.t, working[0], 1)
    assert int(cell.t.sites["used_w"][site]) == 100
    assert k.pull(cell.t, rows[3], 1000, cell.out) == j


def test_a_live_request_goes_where_the_car_stays_and_equals_take_turns() -> None:
    cell = Cell()
    model = cell.model("m")
    leaving = a_vehicle(cell, "leaving", risk_pct=30)
    staying = [a_vehicle(cell, f"v{number}") for number in range(3)]
    none = np.zeros(0, np.int64)
    placed = []
    for _ in range(9):
        v = int(k.place(cell.t, model, NONE, 1000, none))
        placed.append(v)
        cell.t.vehicles["live"][v] += 1
    assert leaving not in placed[:6], "while there is a free slot on one that stays"
    assert sorted(placed[:6]) == sorted(staying * 2)
    assert int(k.place(cell.t, model, NONE, 1000, np.array([*staying], np.int64))) == leaving
    assert int(k.place(cell.t, model, cell.region("NO"), 1000, none)) == NONE
    for v in [leaving, *staying]:
        cell.t.vehicles["flags"][v] |= OFFLINE
        k.recount(cell.t, v)
    assert int(k.place(cell.t, model, NONE, 1000, none)) == NONE
    assert not (cell.t.buckets != NONE).any()


def test_vehicles_go_to_a_model_whose_promises_are_in_danger_and_no_more_than_it_needs() -> None:
    cell = Cell()
    cell.model("m")
    rare = cell.model("rare")
    cell.t.models["load_ms"][rare] = 10_000
    rows = [a_vehicle(cell, f"v{number}", on_disk=0b11) for number in range(10)]
    common = a_job(cell, 1, lines=10_000_000, hours=100, flags=BEST_EFFORT)
    scarce = a_job(cell, 2, lines=5_000, hours=1, model="rare")
    plan(cell, common, scarce)
    moved = 0
    for v in rows:
        if int(k.switch_to(cell.t, v, False)) == rare:
            cell.t.vehicles["model"][v] = rare
            k.recount(cell.t, v)
            moved += 1
    assert 2 <= moved <= 4, "500,000 tokens in an hour are 139 a second, and a margin"
    region = cell.region("DE")
    assert cover(cell.t, rare, region, 1, 0) >= 1.0
    short = a_vehicle(cell, "leaves", on_disk=0b11, stay_min=1)
    assert int(k.switch_to(cell.t, short, True)) == NONE, "it would not stay for it"


def test_a_vehicle_leaves_a_model_that_is_short_for_one_that_is_shorter_and_stays_then() -> None:
    cell = Cell()
    cell.model("m")
    rare = cell.model("rare")
    rows = [a_vehicle(cell, f"v{number}", on_disk=0b11) for number in range(4)]
    much, little = a_job(cell, 1, lines=100_000, hours=4), a_job(cell, 2, lines=100_000, hours=4, model="rare")
    plan(cell, much, little)
    region = cell.region("DE")
    assert cover(cell.t, 0, region, 1, 0) < 1.0
    assert cover(cell.t, rare, region, 1, 0) == 0.0
    moved = []
    for v in rows * 2:
        model = int(k.switch_to(cell.t, v, False))
        if model != NONE:
            cell.t.vehicles["model"][v] = model
            k.recount(cell.t, v)
            moved.append((v, model))
    assert moved == [(rows[0], rare), (rows[1], rare)], "half of them each, and nobody goes back"


def test_work_that_is_done_in_one_go_waits_for_a_car_that_stays() -> None:
    cell = Cell()
    j = a_job(cell, 1, lines=5, flags=WHOLE)
    cell.t.jobs["work_per_line"][j] = 60_000.0  # ten minutes
    cell.t.jobs["overhead_ms"][j] = 60_000
    plan(cell, j)
    stays, leaves = a_vehicle(cell, "stays"), a_vehicle(cell, "leaves", stay_min=10, risk_pct=15)
    assert k.pull(cell.t, leaves, 1000, cell.out) == NONE
    assert int(cell.out[1]) == k.MAY_LEAVE_SOON
    assert k.pull(cell.t, stays, 1000, cell.out) == j
    assert int(cell.out[0]) == 1
    lease(cell, stays, j, 1)
    assert k.pull(cell.t, stays, 1000, cell.out) == NONE, "one at a time"


def test_the_cell_waits_for_a_silent_vehicle_as_long_as_its_work_can() -> None:
    cell = Cell()
    a_vehicle(cell, "v")
    slow, fast, endless = a_job(cell, 1, hours=2), a_job(cell, 2, lines=10_700, hours=4), a_job(cell, 3, hours=900)
    plan(cell, slow, fast, endless)
    assert k.patience_ms(cell.t, slow) == int(cell.t.jobs["slack_ms"][slow]) // 8
    assert PATIENCE_MS <= k.patience_ms(cell.t, slow) < MAX_PATIENCE_MS
    assert k.patience_ms(cell.t, fast) == SILENT_MS, "it has no time to cover"
    assert k.patience_ms(cell.t, endless) == MAX_PATIENCE_MS
    cell.t.jobs["leased"][endless] = 100
    assert k.patience_ms(cell.t, endless) == SILENT_MS, "nothing else of it waits"


def test_what_a_slow_vehicle_has_not_begun_is_recalled_once() -> None:
    cell = Cell()
    slow, quick = a_vehicle(cell, "slow", speed=1.0), a_vehicle(cell, "quick")
    j = a_job(cell, 1, lines=60, hours=0.5)
    held = lease(cell, slow, j, 30), lease(cell, quick, j, 30)
    plan(cell, j)
    out = np.zeros(8, np.int64)
    assert (k.recall(cell.t, 1000, out), int(out[0])) == (1, held[0]), "3,000 tokens at one a second are no half hour"
    assert k.recall(cell.t, 2000, out) == 0


def test_a_name_that_a_vehicle_makes_up_takes_no_row_for_ever() -> None:
    cell = Cell()
    a_job(cell, 1)
    for number in range(100):
        a_vehicle(cell, "v", model=f"made up {number}")
    assert len(cell.t.models) == 4
    assert cell.find_model("m") != NONE, "somebody asks for it"
