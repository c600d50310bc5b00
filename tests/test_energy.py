"""The energy of the whole vehicle: losses, overhead, and sums that lose nothing."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.core.energy import EnergyMeter, EnergyModel, Increment, Limits, divide
from motorpool.errors import CallerError

MODELS = st.builds(
    EnergyModel,
    dcdc_bp=st.integers(5_000, 10_000),
    awake_w=st.floats(0, 500),
    charger_on_w=st.floats(0, 300),
    charger_bp=st.integers(8_000, 10_000),
    battery_out_bp=st.integers(8_000, 10_000),
    battery_in_bp=st.integers(8_000, 10_000),
)
WATTS = st.floats(0, 5_000)


class Stretch:
    """One call of ``advance``."""

    def __init__(self, passed_ms: int, watts_w: float, awake: bool, grid: bool, measured: bool) -> None:
        self.passed_ms = passed_ms
        self.watts_w = watts_w
        self.awake = awake
        self.grid = grid
        self.measured = measured


STRETCHES = st.lists(
    st.builds(Stretch, st.integers(0, 60_000), WATTS, st.booleans(), st.booleans(), st.booleans()), max_size=30
)


def advance(meter: EnergyMeter, now_ms: int, stretch: Stretch) -> Increment:
    return meter.advance(
        now_ms, stretch.watts_w, awake_for_us=stretch.awake, grid_fed=stretch.grid, measured=stretch.measured
    )


def started(model: EnergyModel, now_ms: int = 0) -> EnergyMeter:
    meter = EnergyMeter(model)
    meter.advance(now_ms, 0.0, awake_for_us=False, grid_fed=True, measured=True)
    return meter


@given(MODELS, WATTS, st.booleans(), st.booleans())
def test_the_grid_gives_at_least_what_the_computer_takes(
    model: EnergyModel, watts_w: float, awake: bool, grid: bool
) -> None:
    power = model.check().power(watts_w, awake_for_us=awake, grid_fed=grid)
    assert power.computer_mw >= watts_w * 1000
    assert power.grid_mw >= power.computer_mw + power.overhead_mw
    assert power.battery_mw == 0 if grid else power.battery_mw >= power.computer_mw
    if not grid:
        assert power.grid_mw >= power.battery_mw


@given(MODELS, WATTS, st.booleans())
def test_rounding_never_makes_it_less(model: EnergyModel, watts_w: float, grid: bool) -> None:
    power = model.power(watts_w, awake_for_us=True, grid_fed=grid)
    direct = Fraction(power.computer_mw * 10_000, model.dcdc_bp) + Fraction(model.awake_w) * 1000
    if grid:
        assert power.grid_mw * model.charger_bp >= (direct + Fraction(model.charger_on_w) * 1000) * 10_000
        return
    assert power.battery_mw * model.battery_out_bp >= direct * 10_000
    lost = Fraction(model.charger_on_w) + Fraction(model.awake_w)
    charge = Fraction(model.recharge_w) * model.charger_bp / 10_000 - lost
    put_in = Fraction(power.battery_mw * 10_000, model.battery_in_bp)
    assert power.grid_mw >= put_in * Fraction(model.recharge_w) / charge


@given(MODELS, WATTS, WATTS, st.booleans())
def test_more_watts_never_cost_less(model: EnergyModel, one_w: float, other_w: float, grid: bool) -> None:
    low = model.power(min(one_w, other_w), awake_for_us=True, grid_fed=grid)
    high = model.power(max(one_w, other_w), awake_for_us=True, grid_fed=grid)
    assert low.grid_mw <= high.grid_mw
    assert low.battery_mw <= high.battery_mw


@given(MODELS, WATTS, st.booleans())
def test_a_vehicle_that_is_awake_anyway_costs_less(model: EnergyModel, watts_w: float, grid: bool) -> None:
    ours = model.power(watts_w, awake_for_us=True, grid_fed=grid)
    anyway = model.power(watts_w, awake_for_us=False, grid_fed=grid)
    assert anyway.overhead_mw == 0
    assert anyway.grid_mw <= ours.grid_mw


@given(MODELS, STRETCHES)
def test_the_parts_add_up_to_the_whole(model: EnergyModel, stretches: list[Stretch]) -> None:
    meter = started(model)
    now_ms, begin, before = 0, meter.mark(), meter.mark()
    parts, mwh = [], 0
    for stretch in stretches:
        now_ms += stretch.passed_ms
        part = advance(meter, now_ms, stretch)
        assert part == meter.since(before)
        mwh += meter.grid_mwh_since(before)
        before = meter.mark()
        parts.append(part)
    whole = meter.since(begin)
    for name in ("grid_mws", "battery_mws", "computer_mws", "overhead_mws"):
        assert all(getattr(part, name) >= 0 for part in parts)
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name) == getattr(meter.total, name)
    assert whole.grid_mws >= whole.computer_mws
    assert mwh == meter.total.grid_mwh


@given(MODELS, WATTS, st.lists(st.integers(0, 2_000), min_size=1, max_size=200), st.booleans())
def test_many_short_stretches_are_one_long_one(model: EnergyModel, watts_w: float, cuts: list[int], grid: bool) -> None:
    fine, coarse = EnergyMeter(model, max_gap_ms=1 << 40), EnergyMeter(model, max_gap_ms=1 << 40)
    for meter in (fine, coarse):
        meter.advance(0, watts_w, awake_for_us=True, grid_fed=grid, measured=True)
    now_ms = 0
    for cut in cuts:
        now_ms += cut
        fine.advance(now_ms, watts_w, awake_for_us=True, grid_fed=grid, measured=True)
    coarse.advance(now_ms, watts_w, awake_for_us=True, grid_fed=grid, measured=True)
    assert fine.total == coarse.total


@given(STRETCHES)
def test_energy_counts_as_measured_only_if_all_of_it_was(stretches: list[Stretch]) -> None:
    meter = started(EnergyModel())
    mark, now_ms = meter.mark(), 0
    for stretch in stretches:
        now_ms += stretch.passed_ms
        advance(meter, now_ms, stretch)
    counted = [stretch.measured for stretch in stretches if stretch.passed_ms]
    assert meter.since(mark).measured == (bool(counted) and all(counted))


def test_one_modelled_lease_does_not_make_the_next_one_modelled() -> None:
    meter = started(EnergyModel())
    meter.advance(1_000, 50.0, awake_for_us=False, grid_fed=True, measured=False)
    mark = meter.mark()
    meter.advance(2_000, 50.0, awake_for_us=False, grid_fed=True, measured=True)
    assert meter.since(mark).measured
    assert not meter.total.measured


def test_after_a_clock_that_was_set_back_time_counts_on() -> None:
    meter = started(EnergyModel(), 10_000)
    for now_ms in (11_000, 5_000, 6_000):
        meter.advance(now_ms, 10.0, awake_for_us=False, grid_fed=True, measured=True)
    assert meter.total.computer_mws == 2_000 * 10


def test_a_computer_that_slept_drew_nothing_meanwhile() -> None:
    meter = started(EnergyModel())
    part = meter.advance(8 * 3_600_000, 10.0, awake_for_us=False, grid_fed=True, measured=True)
    assert part.computer_mws == 60_000 * 10


def test_the_default_losses_are_those_that_were_measured_at_worst() -> None:
    """ADAC: at a socket of 2.3 kW up to 24.2 % are lost, at 11 kW up to 9.7 %."""
    model = EnergyModel(dcdc_bp=10_000)
    for drawn_w, lost in ((2_300, 0.242), (11_000, 0.097)):
        out_w = drawn_w * model.charger_bp / 10_000 - model.awake_w - model.charger_on_w
        power = model.power(out_w, awake_for_us=True, grid_fed=True)
        assert power.grid_mw == pytest.approx(drawn_w * 1000, rel=1e-6)
        assert 1 - out_w / drawn_w == pytest.approx(lost, abs=0.001)


def test_a_small_load_loses_a_greater_part_than_a_large_one() -> None:
    model = EnergyModel()
    small, large = (model.power(watts_w, awake_for_us=True, grid_fed=True) for watts_w in (100.0, 1_000.0))
    assert small.grid_mw / small.computer_mw > 3 * large.grid_mw / large.computer_mw / 2


def test_the_battery_costs_more_at_the_socket_than_the_grid() -> None:
    model = EnergyModel()
    grid, battery = (model.power(250.0, awake_for_us=False, grid_fed=fed) for fed in (True, False))
    assert battery.grid_mw > grid.grid_mw
    assert battery.battery_mw < battery.grid_mw


@pytest.mark.parametrize(
    ("model", "param"),
    [
        (EnergyModel(dcdc_bp=10_001), "dcdc_bp"),
        (EnergyModel(charger_bp=0), "charger_bp"),
        (EnergyModel(awake_w=-1.0), "awake_w"),
        (EnergyModel(awake_w=float("nan")), "awake_w"),
        (EnergyModel(recharge_w=400.0), "recharge_w"),
    ],
)
def test_losses_that_cannot_be_are_refused(model: EnergyModel, param: str) -> None:
    with pytest.raises(CallerError) as caught:
        EnergyMeter(model)
    assert caught.value.param == param


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**6), max_size=40))
def test_energy_is_divided_over_requests_without_a_rest(amount: int, weights: list[int]) -> None:
    parts = divide(amount, weights)
    assert len(parts) == len(weights)
    assert sum(parts) == (amount if weights else 0)
    total = sum(weights)
    for part, weight in zip(parts, weights, strict=True):
        exact = amount * weight / total if total else amount / len(weights)
        assert abs(part - exact) <= 1 + exact * 1e-9


def test_limits_say_no_memory_limit_unless_there_is_one() -> None:
    assert Limits(watts_w=50, threads=2) == Limits(
        watts_w=50, threads=2, duty=1.0, slots=1, memory_bytes=None, expected_w=0.0
    )
