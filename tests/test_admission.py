"""A promise is kept by a real schedule, and asking for less never gets a worse answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from motorpool.core import admission
from motorpool.core.admission import HOUR_MS, Admitted, Book, Capacity, Load, Refused, Why
from motorpool.core.forecast import Bands
from motorpool.core.jit import compiled

START = 1_800_000 * 1_000_000 // HOUR_MS * HOUR_MS
Job = tuple[int, int, int]  # kind, tokens, deadline


def capacity(tokens: Any, known: Any = None) -> Capacity:
    table = np.array(tokens, dtype=np.int64)
    return Capacity(
        start_ms=START, tokens=table, known=np.ones(table.shape, bool) if known is None else np.array(known)
    )


def load_of(jobs: list[Job]) -> Load:
    columns = np.array(jobs, dtype=np.int64).reshape(-1, 3)
    return Load(kind=columns[:, 0].copy(), tokens=columns[:, 1].copy(), deadline_ms=columns[:, 2].copy())


def fits(can: Capacity, eligible: Any, jobs: list[Job], now_ms: int) -> bool:
    """Whether any schedule at all does these jobs in time: a flow from jobs to classes and stretches of time."""
    edges = {now_ms, START + can.tokens.shape[1] * HOUR_MS}
    edges |= {START + n * HOUR_MS for n in range(can.tokens.shape[1]) if START + n * HOUR_MS > now_ms}
    edges |= {end for _, _, end in jobs if now_ms < end < max(edges)}
    at = sorted(edges)

    def up_to(k: int, moment: int) -> int:
        hour, part = divmod(moment - START, HOUR_MS)
        hour, part = (hour - 1, HOUR_MS) if hour == can.tokens.shape[1] else (hour, part)
        return int(can.tokens[k, :hour].sum()) + int(can.tokens[k, hour]) * part // HOUR_MS

    cells = [(k, n) for k in range(can.tokens.shape[0]) for n in range(len(at) - 1)]
    size = 2 + len(jobs) + len(cells)
    graph = np.zeros((size, size), dtype=np.int32)
    for j, (kind, tokens, end) in enumerate(jobs):
        graph[0, 1 + j] = tokens
        for c, (k, n) in enumerate(cells):
            if eligible[kind][k] and at[n + 1] <= end:
                graph[1 + j, 1 + len(jobs) + c] = tokens
    for c, (k, n) in enumerate(cells):
        graph[1 + len(jobs) + c, size - 1] = up_to(k, at[n + 1]) - up_to(k, at[n])
    return int(maximum_flow(csr_array(graph), 0, size - 1).flow_value) == sum(tokens for _, tokens, _ in jobs)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Capacity, Any, list[Job], int]:
    classes, hours, kinds = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    table = draw(
        st.lists(st.lists(st.integers(0, 40), min_size=hours, max_size=hours), min_size=classes, max_size=classes)
    )
    masks = draw(st.lists(st.lists(st.booleans(), min_size=classes, max_size=classes), min_size=kinds, max_size=kinds))
    now_ms = START + draw(st.integers(0, HOUR_MS - 1))
    job = st.tuples(st.integers(0, kinds - 1), st.integers(0, 60), st.integers(-HOUR_MS, hours * HOUR_MS))
    jobs = [(kind, tokens, now_ms + after) for kind, tokens, after in draw(st.lists(job, max_size=8))]
    return capacity(table), np.array(masks), jobs, now_ms


def admitted_of(world: tuple[Capacity, Any, list[Job], int]) -> tuple[Book, list[Job]]:
    """A book that was offered the jobs one after the other."""
    can, eligible, jobs, now_ms = world
    book = Book(can, eligible, Load.none(), now_ms)
    taken = []
    for kind, tokens, deadline in jobs:
        if isinstance(book.quote(kind, tokens, deadline), Admitted):
            book.take(kind, tokens, deadline)
            taken.append((kind, tokens, deadline))
    return book, taken


@settings(deadline=None, max_examples=150)
@given(worlds())
def test_everything_that_is_promised_has_a_schedule(world: tuple[Capacity, Any, list[Job], int]) -> None:
    can, eligible, _, now_ms = world
    book, taken = admitted_of(world)
    assert book.late_tokens == 0
    assert fits(can, eligible, taken, now_ms)


@settings(deadline=None, max_examples=150)
@given(worlds(), st.integers(0, 60), st.integers(0, 60), st.integers(0, 6 * HOUR_MS), st.integers(0, 6 * HOUR_MS))
def test_less_work_or_a_later_deadline_never_turns_a_yes_into_a_no(
    world: tuple[Capacity, Any, list[Job], int], tokens: int, less: int, after_ms: int, later_ms: int
) -> None:
    can, eligible, jobs, now_ms = world
    book = Book(can, eligible, load_of(jobs), now_ms)
    for kind in range(len(eligible)):
        verdict = book.quote(kind, tokens, now_ms + after_ms)
        easier = book.quote(kind, max(0, tokens - less), now_ms + after_ms + later_ms)
        if isinstance(verdict, Admitted):
            assert isinstance(easier, Admitted)
            assert easier.finish_ms <= verdict.finish_ms <= now_ms + after_ms
            assert 10_000 <= verdict.price_bp <= 20_000
            same_time = book.quote(kind, max(0, tokens - less), now_ms + after_ms)
            assert isinstance(same_time, Admitted)
            assert same_time.price_bp <= verdict.price_bp
        elif verdict.soonest_ms is not None:
            assert isinstance(book.quote(kind, tokens, max(verdict.soonest_ms, now_ms + 1)), Admitted)
            assert verdict.soonest_ms == now_ms or isinstance(book.quote(kind, tokens, verdict.soonest_ms - 1), Refused)


@settings(deadline=None, max_examples=100)
@given(worlds())
def test_in_a_single_class_nothing_that_fits_is_refused(world: tuple[Capacity, Any, list[Job], int]) -> None:
    can, _, jobs, now_ms = world
    one = Capacity(start_ms=can.start_ms, tokens=can.tokens[:1], known=can.known[:1])
    eligible = np.array([[True]])
    jobs = [(0, tokens, end) for _, tokens, end in jobs if tokens > 0]
    book, taken = admitted_of((one, eligible, jobs, now_ms))
    for kind, tokens, end in jobs:
        fit = end > now_ms and fits(one, eligible, [*taken, (kind, tokens, end)], now_ms)
        assert isinstance(book.quote(kind, tokens, end), Admitted) == fit


@settings(deadline=None, max_examples=100)
@given(worlds())
def test_compiled_the_layout_is_the_same(world: tuple[Capacity, Any, list[Job], int]) -> None:
    can, eligible, jobs, now_ms = world
    books = [
        Book(can, eligible, load_of(jobs), now_ms, allocate=allocate)
        for allocate in (admission.lay_out, compiled(admission).lay_out)
    ]
    assert books[0].late_tokens == books[1].late_tokens
    for kind in range(len(eligible)):
        for tokens in (1, 17, 60):
            assert books[0].quote(kind, tokens, START + 9 * HOUR_MS) == books[1].quote(
                kind, tokens, START + 9 * HOUR_MS
            )


def test_a_quote_says_when_it_is_done_and_what_it_costs() -> None:
    book = Book(capacity([[3_600] * 10]), np.array([[True]]), Load.none(), START)
    quiet = book.quote(0, 1_800, START + 2 * HOUR_MS)
    assert quiet == Admitted(finish_ms=START + HOUR_MS // 2, price_bp=10_000, known=True)
    book.take(0, 3_000, START + 4 * HOUR_MS)
    book.take(0, 6_000, START + 4 * HOUR_MS)
    rushed = book.quote(0, 4_000, START + 4 * HOUR_MS)
    assert isinstance(rushed, Admitted)
    assert rushed.price_bp > 16_000
    patient = book.quote(0, 4_000, START + 10 * HOUR_MS)
    assert isinstance(patient, Admitted)
    assert patient.price_bp < rushed.price_bp


def test_a_no_has_a_reason_and_the_soonest_time() -> None:
    eligible = np.array([[True, False], [False, False]])
    book = Book(capacity([[100] * 4, [1_000] * 4]), eligible, load_of([(0, 150, START + 2 * HOUR_MS)]), START)
    assert book.quote(1, 1, START + HOUR_MS) == Refused(why=Why.NO_CLASS)
    assert book.quote(0, 10, START) == Refused(why=Why.PAST_DEADLINE, soonest_ms=START + HOUR_MS // 10)
    late = book.quote(0, 100, START + HOUR_MS)
    assert late == Refused(why=Why.NOT_ENOUGH, soonest_ms=START + 2 * HOUR_MS + HOUR_MS // 2)
    assert book.quote(0, 251, START + 400 * HOUR_MS) == Refused(why=Why.NOT_ENOUGH)  # nothing is promised beyond


def test_flexible_work_leaves_the_scarce_class_to_those_that_need_it() -> None:
    eligible = np.array([[True, True], [True, False]])  # class 0 alone serves the second kind
    book = Book(capacity([[100], [100]]), eligible, load_of([(0, 100, START + HOUR_MS)]), START)
    assert isinstance(book.quote(1, 100, START + HOUR_MS), Admitted)


def test_what_is_not_known_is_admitted_and_said() -> None:
    known = [[True, False]]
    book = Book(capacity([[10, 0]], known), np.array([[True]]), Load.none(), START)
    told = book.quote(0, 1_000, START + 2 * HOUR_MS)
    assert told == Admitted(finish_ms=START + 2 * HOUR_MS, price_bp=10_000, known=False)
    assert isinstance(book.quote(0, 1_000, START + HOUR_MS), Refused)
    assert book.quote(0, 5, START + HOUR_MS) == Admitted(finish_ms=START + HOUR_MS // 2, price_bp=10_000, known=True)


def test_when_the_forecast_falls_promises_stay_and_no_new_one_is_made_before_them() -> None:
    jobs = [(0, 300, START + 2 * HOUR_MS)]
    book = Book(capacity([[100] * 6]), np.array([[True]]), load_of(jobs), START)
    assert book.late_tokens == 100
    assert book.quote(0, 50, START + 3 * HOUR_MS) == Refused(
        why=Why.NOT_ENOUGH, soonest_ms=START + 3 * HOUR_MS + HOUR_MS // 2
    )


def test_capacity_is_taken_from_the_ten_percent_band() -> None:
    low = np.array([[1.5, 2e12]])
    bands = Bands(
        start_ms=START,
        low=low,
        middle=low * 2,
        high=low * 3,
        known=np.array([[True, True]]),
        per_vehicle=np.array([1.0]),
    )
    can = Capacity.of(bands, harvest=0.5)
    assert can.tokens.tolist() == [[2_700, admission.MAX_TOKENS_H]]
    book = Book(can, np.array([[True]]), Load.none(), START + 1)
    assert isinstance(book.quote(0, 1_999_999_000_000, START + 2 * HOUR_MS), Admitted)  # no overflow


@pytest.mark.parametrize("count", [0, 2_000])
def test_a_full_book_is_laid_out_as_a_whole(count: int) -> None:
    jobs = [(n % 3, 50, START + (n % 40) * HOUR_MS // 2 + 1) for n in range(count)]
    eligible = np.array([[True, True, False], [False, True, True], [True, True, True]])
    can = capacity([[10_000] * 24] * 3)
    book = Book(can, eligible, load_of(jobs), START)
    total = sum(tokens for _, tokens, _ in jobs)
    left = 3 * 10_000 * 24 - total
    assert isinstance(book.quote(2, left, START + 24 * HOUR_MS), Admitted)
    assert isinstance(book.quote(2, left + 1, START + 24 * HOUR_MS), Refused)
