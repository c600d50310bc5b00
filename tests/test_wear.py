"""Wear: cycles of the battery, hot hours, bytes written, and what they cost."""

from __future__ import annotations

import importlib.util
import itertools
from math import log
from pathlib import Path

import pytest
import rainflow  # type: ignore[import-untyped]
from hypothesis import example, given
from hypothesis import strategies as st

from motorpool.core import wear_table
from motorpool.core.wear import (
    BATTERY_BOUND_MICRO_KWH,
    DEPTH_BINS,
    RELATIVE_LIFE,
    BatteryWear,
    Cycles,
    Flash,
    JunctionHours,
    Rainflow,
    WearPrices,
    battery_price,
    chemistries,
    count_trace,
    pack_heat_price,
    relative_life,
    table_price,
    weight_ppm,
)
from motorpool.errors import CallerError

ROOT = Path(__file__).resolve().parent.parent
SOC = st.integers(0, 1000).map(lambda step: step / 10)
TRACES = st.lists(SOC, min_size=3, max_size=200)


# -- rainflow ----------------------------------------------------------------------------------------------------------


@given(TRACES)
@example([10.0, 10.0, 20.0])
@example([50.0, 50.0, 50.0])
@example([0.0, 100.0, 0.0, 100.0, 0.0])
def test_the_streaming_counter_says_what_the_package_rainflow_says(trace: list[float]) -> None:
    counter = Rainflow()
    for value in trace:
        counter.add(value)
    theirs = [
        (round(span), round(count * 2))
        for span, _, count, _, _ in rainflow.extract_cycles([round(value * 10) for value in trace])
        if span
    ]
    ours = counter.cycles()
    assert ours.halves == sum(halves for _, halves in theirs)
    assert ours.depth_sum == sum(span * halves for span, halves in theirs)
    by_depth = [0] * DEPTH_BINS
    for span, halves in theirs:
        by_depth[(span - 1) // 50] += halves
    assert ours.by_depth == tuple(by_depth)
    assert ours == count_trace(trace)


@given(TRACES, st.integers(0, 200))
def test_looking_at_the_count_does_not_change_it(trace: list[float], at: int) -> None:
    looked, left_alone = Rainflow(), Rainflow()
    for index, value in enumerate(trace):
        looked.add(value)
        left_alone.add(value)
        if index == at:
            looked.cycles()
    assert looked.cycles() == left_alone.cycles()


@given(TRACES)
def test_half_of_all_that_moved_is_counted(trace: list[float]) -> None:
    """Every change of charge is in exactly one cycle, so the depths add up to the way that the trace went."""
    way = sum(abs(round(b * 10) - round(a * 10)) for a, b in itertools.pairwise(trace))
    counter = Rainflow()
    for value in trace:
        counter.add(value)
    assert counter.cycles().depth_sum == way


def test_the_counter_keeps_a_bounded_number_of_points_in_the_worst_case() -> None:
    counter = Rainflow()
    # Swings that become smaller and smaller close no cycle: the longest residue there is.
    for step in range(1_000):
        counter.add((step // 2 if step % 2 == 0 else 1000 - step // 2) / 10)
    longest = len(counter)
    assert longest <= 1_002
    for step in range(20_000):
        counter.add((step * 7919 % 1001) / 10)
        assert len(counter) <= 1_002


def test_swings_of_the_same_size_are_closed_and_forgotten() -> None:
    counter = Rainflow()
    for value in (0.0, 100.0, *([40.0, 60.0] * 5_000)):
        counter.add(value)
        assert len(counter) <= 4
    assert counter.cycles().halves == 10_001


@given(st.lists(st.floats(), max_size=30))
def test_what_is_no_state_of_charge_is_ignored(values: list[float]) -> None:
    counter, clean = Rainflow(), Rainflow()
    for value in values:
        counter.add(value)
        if 0 <= value <= 100:
            clean.add(value)
    assert counter.cycles() == clean.cycles()


def test_a_full_cycle_is_one_equivalent_full_cycle() -> None:
    assert count_trace([100.0, 0.0, 100.0]).equivalent_full == 1.0
    assert Cycles().equivalent_full == 0.0


# -- with and without us -----------------------------------------------------------------------------------------------

CAPACITY_WH = 60_000


def night(wear: BatteryWear, soc_pct: float, hours: int, watts_w: float) -> float:
    """Compute from the battery, in steps of six minutes."""
    for _ in range(hours * 10):
        soc_pct -= watts_w / 10 / CAPACITY_WH * 100
        wear.advance(soc_pct, round(watts_w * 360_000), limit_pct=80.0)
    return soc_pct


def charge(wear: BatteryWear, soc_pct: float, top_pct: float = 80.0) -> float:
    while soc_pct < top_pct:
        soc_pct = min(top_pct, soc_pct + 1.0)
        wear.advance(soc_pct, 0, limit_pct=80.0)
    return soc_pct


def test_nights_of_computing_from_the_battery_are_our_cycles_and_nothing_else_is() -> None:
    wear, soc_pct = BatteryWear(CAPACITY_WH), 80.0
    wear.advance(soc_pct, 0, limit_pct=80.0)
    for _ in range(10):
        soc_pct = night(wear, soc_pct, 8, 750.0)  # 6 kWh: 10 %
        assert wear.without_us_pct == pytest.approx(80.0)
        soc_pct = charge(wear, soc_pct)
        for _ in range(20):  # the owner drives 12 kWh
            soc_pct -= 1.0
            wear.advance(soc_pct, 0, limit_pct=80.0)
        soc_pct = charge(wear, soc_pct)
    assert wear.with_us.cycles().equivalent_full == pytest.approx(10 * 0.3, abs=0.01)
    assert wear.without_us.cycles().equivalent_full == pytest.approx(10 * 0.2, abs=0.01)
    assert wear.extra_full_cycles() == pytest.approx(1.0, abs=0.01)
    assert wear.through_mws() == pytest.approx(60_000 * 3_600_000, rel=0.02)


def test_the_deficit_stays_while_the_owner_drives_and_ends_when_both_are_full() -> None:
    wear = BatteryWear(CAPACITY_WH)
    wear.advance(80.0, 0, limit_pct=80.0)
    soc_pct = night(wear, 80.0, 8, 750.0)
    wear.advance(soc_pct - 30.0, 0, limit_pct=80.0)
    assert wear.without_us_pct == pytest.approx(50.0)
    charge(wear, soc_pct - 30.0)
    assert wear.without_us_pct == pytest.approx(80.0)


@given(st.lists(st.tuples(SOC, st.integers(0, 10**9)), max_size=60), SOC)
def test_without_us_there_is_never_less_charge(steps: list[tuple[float, int]], limit_pct: float) -> None:
    wear = BatteryWear(CAPACITY_WH)
    for soc_pct, taken_mws in steps:
        wear.advance(soc_pct, taken_mws, limit_pct=limit_pct)
        assert soc_pct <= wear.without_us_pct <= 100.0
    taken = wear.ours_mws / 3_600_000 / CAPACITY_WH
    assert wear.extra_full_cycles() >= taken
    assert wear.through_mws() >= wear.ours_mws * (1 - 1e-9)


def test_a_vehicle_that_we_take_nothing_from_has_no_cycles_of_ours() -> None:
    wear = BatteryWear(CAPACITY_WH)
    for step in range(500):
        wear.advance(abs(100 - step * 13 % 201), 0)
    assert wear.with_us.cycles() == wear.without_us.cycles()
    assert wear.extra_full_cycles() == 0.0


def test_a_battery_without_capacity_is_refused() -> None:
    for capacity_wh in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(CallerError):
            BatteryWear(capacity_wh)


# -- hot hours ---------------------------------------------------------------------------------------------------------


def test_the_published_points_are_met() -> None:
    for temp_c, life in RELATIVE_LIFE:
        assert relative_life(temp_c) == pytest.approx(life)
    assert weight_ppm(85.0) == 1_000_000
    assert weight_ppm(125.0) == 9_800_000
    assert weight_ppm(70.0) == pytest.approx(1e6 * 9.8 / 26, abs=1)


def test_between_two_points_the_logarithm_is_in_the_middle() -> None:
    assert log(relative_life(77.5)) == pytest.approx((log(26.0) + log(9.8)) / 2)


@given(st.floats(-60, 200), st.floats(-60, 200))
def test_hotter_never_wears_less(one_c: float, other_c: float) -> None:
    assert weight_ppm(min(one_c, other_c)) <= weight_ppm(max(one_c, other_c))


@given(st.floats(max_value=70.0))
def test_cool_hours_are_not_said_to_wear_less_than_the_table_says(temp_c: float) -> None:
    assert weight_ppm(temp_c) >= weight_ppm(70.0)


def test_no_reading_counts_as_the_hottest_of_the_table() -> None:
    assert weight_ppm(None) == weight_ppm(float("nan")) == weight_ppm(125.0)
    assert weight_ppm(140.0) > weight_ppm(125.0)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.none() | st.floats(-40, 130)), max_size=50))
def test_weighted_time_is_added_up_without_loss(stretches: list[tuple[int, float | None]]) -> None:
    hours = JunctionHours()
    returned = sum(hours.add(duration_ms, temp_c) for duration_ms, temp_c in stretches)
    exact = sum(duration_ms * weight_ppm(temp_c) for duration_ms, temp_c in stretches)
    assert returned == hours.weighted_ms == exact // 1_000_000


# -- flash and money ---------------------------------------------------------------------------------------------------


def test_the_flash_is_worn_out_when_every_cell_was_erased_as_often_as_it_can_be() -> None:
    flash = Flash(capacity_bytes=64_000_000_000, replacement_micro=300_000_000, amplification=1.0)
    assert flash.worn_ppb(64_000_000_000 * 3_000) == 1_000_000_000
    assert flash.cost_micro_gb() * 64 * 3_000 == pytest.approx(300_000_000, rel=0.01)
    assert Flash(capacity_bytes=64_000_000_000, replacement_micro=1, amplification=4.0).worn_ppb(10**9) >= 4 * 5_208


def test_promises_take_the_larger_of_table_and_bound() -> None:
    for chemistry in chemistries():
        for limit_pct in (60, 80, 95):
            told = table_price(chemistry, limit_pct)
            assert battery_price(chemistry, limit_pct) == max(told, BATTERY_BOUND_MICRO_KWH)
            assert battery_price(chemistry, limit_pct, bound_micro_kwh=0) == told
            assert (
                battery_price(chemistry, limit_pct, pack_micro_kwh=10_000_000_000) > BATTERY_BOUND_MICRO_KWH
                or told == 0
            )


def test_the_price_of_the_table_is_that_of_its_dearest_case() -> None:
    """NMC622 at 80 %: the dearest is 1 kW; 1 pp of 30 of a pack of $7,800 is $260."""
    rows = {row.case: row for row in wear_table.ROWS if row.chemistry == "nmc622" and row.limit_pct == 80}
    costs = [
        (rows[case].years_8_pp - rows["none"].years_8_pp) * 260_000_000 / (kw * 8 * 365 * 8)
        for case, kw in (("battery-250w", 0.25), ("battery-500w", 0.5), ("battery-1000w", 1.0))
    ]
    assert table_price("nmc622", 80) == pytest.approx(max(costs), abs=1)
    assert 7_000 < table_price("nmc622", 80) < 20_000


def test_a_warmer_battery_costs_in_proportion_and_a_cool_one_nothing() -> None:
    assert pack_heat_price("lfp", 80, 0.0) == 0
    assert pack_heat_price("lfp", 80, -3.0) == 0
    assert 0 < pack_heat_price("lfp", 80, 2.0) < pack_heat_price("lfp", 80, 5.0)
    assert pack_heat_price("lfp", 80, 10.0) == pytest.approx(2 * pack_heat_price("lfp", 80, 5.0), abs=2)


def test_a_limit_between_two_of_the_table_has_the_nearer_one_and_the_higher_of_two_equal_ones() -> None:
    assert table_price("lfp", 83) == table_price("lfp", 80)
    assert table_price("lfp", 70) == table_price("lfp", 80)
    assert table_price("lfp", 100) == table_price("lfp", 95)


def test_an_unknown_chemistry_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CallerError, match="nca, nmc622, lfp"):
        battery_price("lead", 80)


def test_wear_costs_what_the_prices_say() -> None:
    prices = WearPrices(battery_micro_kwh=87_000, pack_heat_micro_h=3_000, silicon_micro_h=1_000, flash_micro_gb=500)
    cost = prices.cost_micro(
        battery_mws=3_600_000_000, compute_ms=3_600_000, weighted_ms=1_800_000, flash_bytes=2_000_000_000
    )
    assert cost == 87_000 + 3_000 + 500 + 1_000
    assert prices.cost_micro(battery_mws=1, compute_ms=0, weighted_ms=0, flash_bytes=0) == 1


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_is_complete_and_small() -> None:
    cases = {row.case for row in wear_table.ROWS}
    keys = {(row.chemistry, row.limit_pct, row.case) for row in wear_table.ROWS}
    assert len(keys) == len(wear_table.ROWS) == len(cases) * 3 * 3
    assert Path(wear_table.__file__).stat().st_size < 30_000
    for row in wear_table.ROWS:
        assert 0 < row.year_pp < row.years_8_pp < 30
        assert row.cycles_year == pytest.approx(48.7 + row.battery_w * 8 * 365 / 60_000, abs=0.2)


def test_the_table_says_where_it_comes_from() -> None:
    head = wear_table.__doc__ or ""
    for words in ("make wear-table", "blast-lite 1.1.1", "treat all models as qualitative", "Written by a program"):
        assert words in head


def test_the_table_has_the_form_that_its_program_writes() -> None:
    spec = importlib.util.spec_from_file_location("wear_table_tool", ROOT / "tools" / "wear_table.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    rows = [[getattr(row, name) for name in row.__struct_fields__] for row in wear_table.ROWS]
    for row in rows:
        assert tuple(row[3:5]) == tool.CASES[row[2]]
    written = Path(wear_table.__file__).read_text()
    versions = (wear_table.__doc__ or "").split("with\n", 1)[1].split(".\nSource", 1)[0]
    assert tool.render({"versions": versions.split(", "), "rows": rows}) == written


def test_the_page_shows_the_tables_numbers() -> None:
    page = (ROOT / "docs" / "energy-and-wear.md").read_text("utf-8")
    words = {
        "none": "no computing, or from the grid without warming the pack",
        "grid+2c": "from the grid, pack 2 degrees warmer",
        "grid+5c": "from the grid, pack 5 degrees warmer",
        "battery-250w": "250 W from the battery",
        "battery-500w": "500 W from the battery",
        "battery-1000w": "1 kW from the battery",
        "battery-1000w+5c": "1 kW from the battery, pack 5 degrees warmer",
    }
    rows = {(row.chemistry, row.case): row for row in wear_table.ROWS if row.limit_pct == 80}
    for case, said in words.items():
        numbers = [f"{rows[chemistry, case].years_8_pp:.2f}" for chemistry in ("nca", "nmc622", "lfp")]
        assert f"| {said} | {' | '.join(numbers)} | {rows['lfp', case].cycles_year} |" in page
    dearest = max(table_price(chemistry, limit) for chemistry in chemistries() for limit in (60, 80, 95))
    assert f"(at most ${dearest / 1e6:.3f})" in page
    heat = [pack_heat_price(chemistry, limit, 2.0) for chemistry in chemistries() for limit in (60, 80, 95)]
    assert f"${min(heat) / 1e6:.4f} to ${max(heat) / 1e6:.4f} an hour" in page.replace("\n", " ")
