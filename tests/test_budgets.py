"""Rolling budgets: nothing is forgotten inside its window, and everything outside of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.core.budgets import DAY_MS, HOUR_MS, BudgetBook, BudgetLimits, Used
from motorpool.errors import CallerError

START_MS = 1_790_000_000_000
_amounts = st.fixed_dictionaries(
    {},
    optional={
        name: st.integers(0, 10**9)
        for name in ("compute_ms", "weighted_ms", "battery_mwh", "flash_bytes", "metered_bytes")
    },
)
_steps = st.lists(st.tuples(st.integers(-DAY_MS, 10 * DAY_MS), _amounts), max_size=20)


@given(_steps)
def test_the_sum_is_never_less_than_what_the_window_holds_and_at_most_a_bucket_more(
    steps: list[tuple[int, dict[str, int]]],
) -> None:
    book = BudgetBook()
    now_ms = latest_ms = START_MS
    entries: list[tuple[int, dict[str, int]]] = []
    for dt_ms, amounts in steps:
        now_ms += dt_ms
        latest_ms = max(latest_ms, now_ms)
        book.add(now_ms, **amounts)
        entries.append((latest_ms, amounts))
    used = book.used(latest_ms)
    for name in ("compute_ms", "weighted_ms", "battery_mwh", "flash_bytes", "metered_bytes"):
        hourly = name in {"compute_ms", "weighted_ms", "battery_mwh"}
        window_ms, bucket_ms = (7 * DAY_MS, HOUR_MS) if hourly else (30 * DAY_MS, DAY_MS)
        inside = sum(amounts.get(name, 0) for at_ms, amounts in entries if latest_ms - at_ms <= window_ms)
        about = sum(amounts.get(name, 0) for at_ms, amounts in entries if latest_ms - at_ms <= window_ms + bucket_ms)
        assert inside <= getattr(used, name) <= about


@given(_steps)
def test_a_book_survives_its_bytes(steps: list[tuple[int, dict[str, int]]]) -> None:
    book = BudgetBook()
    now_ms = START_MS
    for dt_ms, amounts in steps:
        now_ms += dt_ms
        book.add(now_ms, **amounts)
    again = BudgetBook.load(book.dump())
    assert again.used(now_ms) == book.used(now_ms)
    assert again.dump() == book.dump()


def test_a_clock_that_goes_back_frees_nothing() -> None:
    book = BudgetBook()
    book.add(START_MS, compute_ms=HOUR_MS)
    assert book.used(START_MS - 30 * DAY_MS).compute_ms == HOUR_MS
    book.add(START_MS - 30 * DAY_MS, compute_ms=HOUR_MS)
    assert book.used(START_MS).compute_ms == 2 * HOUR_MS


def test_a_year_of_use_stays_small() -> None:
    book = BudgetBook()
    for hour in range(365 * 24):
        book.add(START_MS + hour * HOUR_MS, compute_ms=1, weighted_ms=1, battery_mwh=1, flash_bytes=1, metered_bytes=1)
    assert len(book.dump()) < 10_000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"hourly":{"\xff":{}}}',
        b'{"hourly":{"no_such":{"1":2}}}',
        b'{"hourly":{"compute_ms":{"1":-2}}}',
        b'{"x":1}',
        b"\xff",
    ],
)
def test_bytes_that_are_no_book_are_refused(data: bytes) -> None:
    if data == b"{}":
        assert BudgetBook.load(data).used(0) == Used(), "a book in which nothing stands yet"
        return
    with pytest.raises(CallerError):
        BudgetBook.load(data)


def test_the_tightest_of_two_limits_counts_for_each() -> None:
    mine = BudgetLimits(compute_h_week=10, metered_bytes_month=5)
    other = BudgetLimits(compute_h_week=20, metered_bytes_month=0)
    assert mine.tightest(other) == other.tightest(mine) == BudgetLimits(compute_h_week=10, metered_bytes_month=0)
