"""How long work may be: the hazard is a rising line through what a vehicle said, and longer work is never allowed."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motorpool.core import horizon as h
from motorpool.core.jit import compiled

MINUTE, HOUR = 60_000, 3_600_000
bounds = st.integers(0, 24 * HOUR)
risks = st.floats(0.0, 1.0)
times = st.integers(0, 40 * HOUR)
overheads = st.integers(0, 2 * HOUR)


def test_the_line_goes_through_what_the_vehicle_said() -> None:
    bound, risk = 6 * HOUR, 0.002
    assert h.hazard(0, bound, risk) == 0.0
    assert h.survival(15 * MINUTE, bound, risk) == pytest.approx(1 - risk)
    assert h.survival(bound, bound, risk) == pytest.approx(0.9)
    slope = h.hazard(bound, bound, risk) - h.hazard(bound - MINUTE, bound, risk)
    assert h.hazard(bound + MINUTE, bound, risk) - h.hazard(bound, bound, risk) == pytest.approx(slope)


def test_of_two_statements_that_contradict_each_other_the_worse_counts() -> None:
    assert h.survival(15 * MINUTE, 6 * HOUR, 0.5) == pytest.approx(0.5)  # it stays six hours, and leaves at once
    assert h.survival(6 * HOUR, 6 * HOUR, 0.5) < 0.01
    assert h.survival(5 * MINUTE, 5 * MINUTE, 0.0) == pytest.approx(0.9)  # it leaves soon, and never
    assert h.survival(15 * MINUTE, 5 * MINUTE, 0.0) == pytest.approx(0.9**3)
    assert h.survival(MINUTE, 0, 0.0) == pytest.approx(0.9)
    assert h.survival(MINUTE, HOUR, math.nan) < 0.04  # what is no probability is no promise
    assert h.survival(10 * MINUTE, 10 * MINUTE, 1.0) == pytest.approx(0.9)
    assert h.survival(15 * MINUTE, 10 * MINUTE, 1.0) < 1e-20


def test_after_the_bound_nobody_stays_for_ever() -> None:
    assert h.hazard(40 * HOUR, 20 * HOUR, 0.0999) == pytest.approx(2 * h.BOUND_HAZARD, rel=0.01)


@given(bounds, risks, times, times)
def test_the_hazard_never_falls(bound: int, risk: float, one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert 0.0 <= h.hazard(low, bound, risk) <= h.hazard(high, bound, risk) + 1e-12


@given(bounds, risks, st.floats(0.0, 3.0))
def test_the_time_of_a_hazard_is_the_longest(bound: int, risk: float, most: float) -> None:
    w = h.time_at_ms(most, bound, risk)
    assert h.hazard(w, bound, risk) <= most or w == 0
    assert w == h.MAX_MS or h.hazard(w + 1, bound, risk) > most


@given(bounds, risks, overheads)
def test_worthwhile_work_is_the_largest_that_keeps_the_rule(bound: int, risk: float, overhead: int) -> None:
    w = h.worth_ms(overhead, bound, risk)
    assert w == 0 or w * h.hazard(w, bound, risk) <= 2 * overhead
    assert w == h.MAX_MS or (w + 1) * h.hazard(w + 1, bound, risk) > 2 * overhead


@given(bounds, risks, overheads, st.floats(0.0, 1.0))
def test_whole_work_ends_in_time_with_the_wanted_probability(
    bound: int, risk: float, overhead: int, target: float
) -> None:
    w = h.whole_ms(overhead, target, bound, risk)
    assert 0 <= w <= h.worth_ms(overhead, bound, risk)
    assert w == 0 or h.survival(w + overhead, bound, risk) >= target - 1e-12
    assert h.whole_ms(overhead, min(1.0, target + 0.1), bound, risk) <= w


@given(st.integers(h.RISK_MS, 24 * HOUR), risks, overheads)
def test_a_longer_stay_never_means_less_work(bound: int, risk: float, overhead: int) -> None:
    more = h.whole_ms(overhead, 0.9, bound + 10 * MINUTE, risk)
    assert more >= h.whole_ms(overhead, 0.9, bound, risk) - 1


def test_the_rule_is_close_to_the_best_for_a_constant_hazard() -> None:
    """For 0.08/h and 60 s of overhead, renewal theory says 2,284 s; the rule is within a few percent of that yield."""
    rate = 0.08 / HOUR
    overhead = MINUTE
    bound = round(h.BOUND_HAZARD / rate)
    w = h.worth_ms(overhead, bound, -math.expm1(-rate * 15 * MINUTE))

    def harvest(work: float) -> float:
        return rate * work / math.expm1(rate * (work + overhead))

    best = max(harvest(work * 1000.0) for work in range(60, 20_000))
    assert w == pytest.approx(2_284_000, rel=0.05)
    assert harvest(w) >= best - 0.001


def test_a_download_pays_only_in_a_long_stay_with_use_for_it() -> None:
    assert h.download_pays(20 * MINUTE, 2 * HOUR, 61 * MINUTE, 0.0)
    assert not h.download_pays(20 * MINUTE, 2 * HOUR, 60 * MINUTE, 0.0)
    assert not h.download_pays(20 * MINUTE, 20 * MINUTE, 8 * HOUR, 0.01)
    assert not h.download_pays(20 * MINUTE, 25 * MINUTE, 8 * HOUR, 0.3)
    assert h.download_pays(0, 0, 0, 1.0)


@settings(max_examples=300, deadline=None)  # the first call compiles
@given(bounds, risks, times, overheads)
def test_compiled_it_says_the_same_to_the_last_bit(bound: int, risk: float, w: int, overhead: int) -> None:
    fast = compiled(h)
    assert fast.hazard(w, bound, risk) == h.hazard(w, bound, risk)
    assert fast.survival(w, bound, risk) == h.survival(w, bound, risk)
    assert fast.whole_ms(overhead, 0.9, bound, risk) == h.whole_ms(overhead, 0.9, bound, risk)
    assert fast.worth_ms(overhead, bound, risk) == h.worth_ms(overhead, bound, risk)
    assert fast.download_pays(w, overhead, bound, risk) == h.download_pays(w, overhead, bound, risk)


def test_without_a_compiler_it_says_the_same() -> None:
    code = (
        "from motorpool.core import horizon as h; from motorpool.core.jit import compiled; f = compiled(h);"
        "print([f.whole_ms(c, .9, b, r / 100) for c in (1000, 60000) for b in (0, 600000, 9**8) for r in (0, 3, 100)])"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"NUMBA_DISABLE_JIT": disabled},
            capture_output=True,
            check=True,
        ).stdout
        for disabled in ("0", "1")
    ]
    assert told[0] == told[1]
    assert b"[" in told[0]
