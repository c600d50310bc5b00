"""Work waits where that saves money, never beyond its time, and the prices are those of a true optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motorpool.core import energy_timing as e
from motorpool.core.energy_timing import Cells, Work
from motorpool.core.jit import compiled
from motorpool.sim import timing

HOUR_MS = 3_600_000
numbers = st.integers(-(10**12), 10**12)


def work_of(eligible: Any, rows: list[tuple[int, int, int, int]]) -> Work:
    """Rows of kind, tokens, release, deadline."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return Work(
        eligible=np.array(eligible),
        kind=columns[:, 0],
        tokens=columns[:, 1],
        release=columns[:, 2],
        deadline=columns[:, 3],
    )


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_a_job_runs_where_it_pays_or_when_its_time_is_short() -> None:
    tokens_s, left = 100.0, 360_000  # an hour of work, 1.3 with the margin
    deadline = 10 * HOUR_MS
    assert e.may_run(0, deadline, left, tokens_s, bid=50, pi=50)
    assert not e.may_run(0, deadline, left, tokens_s, bid=49, pi=50)
    latest = e.latest_start_ms(deadline, left, tokens_s)
    assert latest == pytest.approx(8.7 * HOUR_MS, abs=2)
    assert e.may_run(latest, deadline, left, tokens_s, bid=49, pi=50)
    assert not e.may_run(latest - 1, deadline, left, tokens_s, bid=49, pi=50)
    assert e.may_run(0, deadline, left, 0.0, bid=49, pi=50)  # nothing is foretold


@given(numbers, numbers, st.integers(0, 10**12), st.floats(0, 1e9), numbers, numbers, st.integers(0, 10**10))
def test_what_may_run_may_run_later_too(
    now: int, deadline: int, due: int, tokens_s: float, bid: int, pi: int, later: int
) -> None:
    if e.may_run(now, deadline, due, tokens_s, bid, pi):
        assert e.may_run(now + later, deadline, due, tokens_s, bid, pi)
        assert e.may_run(now, deadline - later, due, tokens_s, bid + later, pi)
        assert e.may_run(now, deadline, due + later, tokens_s, bid, pi - later)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(numbers, st.integers(0, 10**12), st.floats(0, 1e9), numbers, numbers), max_size=20), numbers)
def test_many_at_once_and_compiled_it_is_the_same(rows: list[tuple[int, int, float, int, int]], now: int) -> None:
    columns: list[Any] = [
        np.array([row[n] for row in rows], dtype=np.float64 if n == 2 else np.int64) for n in range(5)
    ]
    plain, fast = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    deadline, due, tokens_s, bid, pi = columns
    e.mark(now, deadline, due, tokens_s, bid, pi, plain)
    compiled(e).mark(now, deadline, due, tokens_s, bid, pi, fast)
    assert plain.tolist() == fast.tolist() == [e.may_run(now, *row) for row in rows]


# -- prices ------------------------------------------------------------------------------------------------------------


def test_work_goes_to_the_cheap_hour_until_that_is_full() -> None:
    cells = Cells(tokens=np.array([[100, 100, 100]]) * 10**6, cost=np.array([[300, 100, 200]]))
    roomy = e.prices(cells, work_of([[True]], [(0, 50 * 10**6, 0, 3)]))
    assert roomy.pi.tolist() == [[300, 100, 200]]
    assert roomy.bid.tolist() == [100]
    assert roomy.cost_micro == 50 * 100
    full = e.prices(cells, work_of([[True]], [(0, 150 * 10**6, 0, 3)]))
    assert full.pi.tolist() == [[300, 200, 200]]  # a place in the cheap hour is worth what the next one costs more
    assert full.bid.tolist() == [200]
    assert full.cost_micro == 100 * 100 + 50 * 200
    rushed = e.prices(cells, work_of([[True]], [(0, 50 * 10**6, 0, 1)]))
    assert rushed.bid.tolist() == [300]


def test_work_without_a_place_is_late_and_outbids_everybody() -> None:
    cells = Cells(tokens=np.array([[100, 0]]), cost=np.array([[5, 5]]))
    found = e.prices(cells, work_of([[True], [False]], [(0, 150, 0, 2), (1, 7, 0, 2)]))
    assert found.late.tolist() == [50, 7]
    assert found.bid[0] == e.UNSERVED_MICRO
    assert found.pi[0, 0] >= e.UNSERVED_MICRO - 1
    assert found.pi[0, 1] == e.NO_PRICE
    assert e.bid_of(found.pi, np.array([True]), 0, 0) == e.UNSERVED_MICRO
    nothing = e.prices(cells, work_of([[True]], []))
    assert nothing.cost_micro == 0
    assert nothing.pi[0, 0] == 5


def test_prices_below_zero_draw_work() -> None:
    cells = Cells(tokens=np.array([[10**6, 10**6]]), cost=np.array([[-50, 20]]))
    found = e.prices(cells, work_of([[True]], [(0, 10**6, 0, 2)]))
    assert found.cost_micro == -50
    assert found.pi[0, 0] <= found.bid[0]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Cells, Work]:
    classes, hours = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    table = st.lists(st.lists(st.integers(0, 5), min_size=hours, max_size=hours), min_size=classes, max_size=classes)
    tokens, cost = np.array(draw(table)) * 10**6, np.array(draw(table)) * 100 - 100
    eligible = draw(st.lists(st.lists(st.booleans(), min_size=classes, max_size=classes), min_size=2, max_size=2))
    row = st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, hours), st.integers(0, hours))
    rows = [(kind, tokens * 10**6, min(a, b), max(a, b)) for kind, tokens, a, b in draw(st.lists(row, max_size=6))]
    return Cells(tokens=tokens.astype(np.int64), cost=cost.astype(np.int64)), work_of(eligible, rows)


@settings(deadline=None, max_examples=100)
@given(problems())
def test_the_prices_prove_that_no_schedule_is_cheaper(problem: tuple[Cells, Work]) -> None:
    """Duality: bids never exceed a price that the work could have, and what is paid is what the prices say."""
    cells, work = problem
    found = e.prices(cells, work)
    assert (found.pi >= np.where(cells.tokens > 0, cells.cost, 0)).all()
    for j in range(len(work.tokens)):
        lowest = e.bid_of(found.pi, work.eligible[work.kind[j]], int(work.release[j]), int(work.deadline[j]))
        assert found.bid[j] <= min(lowest, e.UNSERVED_MICRO) + 1
    used = cells.tokens > 0
    rent = float((found.pi - cells.cost)[used].astype(object) @ cells.tokens[used].astype(object)) / e.MILLION
    paid = sum(int(bid) * int(tokens) for bid, tokens in zip(found.bid, work.tokens, strict=True)) / e.MILLION
    whole = found.cost_micro + int(found.late.sum()) * e.UNSERVED_MICRO / e.MILLION
    assert paid - rent == pytest.approx(whole, rel=1e-9, abs=200)


@settings(deadline=None, max_examples=50)
@given(problems())
def test_gathered_work_is_the_same_work(problem: tuple[Cells, Work]) -> None:
    cells, work = problem
    together = e.gathered(work)
    assert together.tokens.sum() == work.tokens.sum()
    assert len(together.tokens) <= len(work.tokens)
    one, other = e.prices(cells, work), e.prices(cells, together)
    assert one.cost_micro == other.cost_micro
    assert one.late.sum() == other.late.sum()


def test_as_soon_as_possible_is_never_cheaper_than_the_optimum() -> None:
    cells, work = timing.world(0.5, 3, regions=3, hours=24, jobs=30)
    asap, late = e.asap_cost(cells, work)
    best = e.prices(cells, e.gathered(work))
    assert late == 0
    assert best.late.sum() == 0
    assert best.cost_micro < asap


def test_carbon_counts_as_much_as_it_is_said_to() -> None:
    price, grams = np.array([[200_000, 300_000]]), np.array([[800, 100]])
    assert e.cost_of(price, grams, 250.0).tolist() == [[50_000, 75_000]]
    weighted = e.cost_of(price, grams, 250.0, carbon_micro_kg=200_000)
    assert weighted.tolist() == [[90_000, 80_000]]  # now the clean hour is the cheap one


def test_room_is_kept_for_work_that_will_come() -> None:
    cells = Cells(tokens=np.full((1, 5), 1_000), cost=np.zeros((1, 5), dtype=np.int64))
    assert e.kept_free(cells, 0.5, 4.0).tokens.tolist() == [[1_000, 875, 750, 625, 500]]


# -- what it saves -----------------------------------------------------------------------------------------------------


def test_the_rule_saves_most_of_what_can_be_saved_and_is_hardly_late() -> None:
    quiet = timing.measure(0.4, 1, regions=4, hours=36, jobs=80)
    busy = timing.measure(0.7, 1, regions=4, hours=36, jobs=80)
    assert 0.15 < quiet.rule_saving <= quiet.lp_saving + 0.005
    assert quiet.rule_late <= 0.002 * quiet.tokens
    assert 0.0 < busy.rule_saving < quiet.rule_saving
    assert busy.rule_late <= 0.02 * busy.tokens
    assert timing.measure(0.4, 1, regions=4, hours=36, jobs=80) == quiet
