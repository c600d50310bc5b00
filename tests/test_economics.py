"""The owner's net: projection, statement, and the second look after "not worth it"."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.core.economics import (
    DAY_MS,
    HOUR_MS,
    UNKNOWN_TARIFF_MICRO_KWH,
    PayRates,
    SecondLook,
    SessionBook,
    Speed,
    Statement,
    Tariff,
    Wear,
    project,
)
from motorpool.core.energy import EnergyModel, Increment, Power
from motorpool.core.wear import WearPrices
from motorpool.errors import CallerError

RATES = PayRates(input_micro=30_000, output_micro=60_000)  # $0.03 and $0.06 for a million tokens
SPEED = Speed(input_tokens_s=450.0, output_tokens_s=150.0)
POWER = Power(computer_mw=100_000, grid_mw=113_637)
FREE = Wear(prices=WearPrices(battery_micro_kwh=0))


# -- tariffs -----------------------------------------------------------------------------------------------------------


def test_a_flat_tariff_is_the_same_all_day() -> None:
    tariff = Tariff.flat(300_000)
    assert {tariff.at(hour * HOUR_MS, 60) for hour in range(48)} == {300_000}


@given(st.lists(st.integers(-1_000_000, 1_000_000), min_size=24, max_size=24), st.integers(0, 10**13))
def test_an_hourly_tariff_goes_by_the_local_hour(prices: list[int], now_ms: int) -> None:
    tariff = Tariff.hourly(tuple(prices))
    for offset_min in (-720, -90, 0, 60, 345, 840):
        hour = (now_ms // 60_000 + offset_min) // 60 % 24
        assert tariff.at(now_ms, offset_min) == prices[hour]


@pytest.mark.parametrize("prices", [(), (1,) * 23, (1,) * 25, (1,)])
def test_an_hourly_tariff_has_24_prices(prices: tuple[int, ...]) -> None:
    with pytest.raises(CallerError, match="24 prices"):
        Tariff.hourly(prices)


@pytest.mark.parametrize("price", [-1, 100_000_001])
def test_a_price_that_cannot_be_is_refused(price: int) -> None:
    with pytest.raises(CallerError, match="price of a kilowatt-hour"):
        Tariff.flat(price)
    with pytest.raises(CallerError, match="1 price or 24"):
        Tariff(micro_kwh=(1, 2)).check()


# -- projection --------------------------------------------------------------------------------------------------------


def test_the_worksheets_row_of_an_orin_comes_out() -> None:
    """100 W, 8B model, batch of 8, 151.5 tokens a second when nothing but answers counts: $0.051 an hour at 3 to 1."""
    seconds_for_four = 3 / 737 + 1 / 151.5  # the time for three tokens in and one out
    rate = 1 / seconds_for_four
    hour = project(RATES, Speed(input_tokens_s=3 * rate, output_tokens_s=rate), POWER, 120_000, FREE)
    assert hour is not None
    assert hour.pay_micro == pytest.approx(51_000, abs=500)
    assert hour.electricity_micro == pytest.approx(14_000, abs=500)
    assert hour.net_micro == pytest.approx(37_000, abs=700)
    awake = EnergyModel(dcdc_bp=10_000, awake_w=250, charger_on_w=0, charger_bp=8_800)
    power = awake.power(100, awake_for_us=True, grid_fed=True)
    dear = project(RATES, Speed(input_tokens_s=3 * rate, output_tokens_s=rate), power, 300_000, FREE)
    assert dear is not None
    assert dear.net_micro == pytest.approx(-69_000, abs=1_000)


@pytest.mark.parametrize("missing", range(5))
def test_what_is_not_known_makes_the_net_unknown(missing: int) -> None:
    known: tuple[PayRates, Speed, Power, int, Wear] = (RATES, SPEED, POWER, 100_000, FREE)
    assert project(*known) is not None
    rates, speed, power, tariff, wear = (None if index == missing else value for index, value in enumerate(known))
    assert project(rates, speed, power, tariff, wear) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("speed", [float("nan"), float("inf"), -1.0])
def test_a_speed_that_cannot_be_is_not_known(speed: float) -> None:
    assert project(RATES, Speed(input_tokens_s=0.0, output_tokens_s=speed), POWER, 1, FREE) is None


POWERS = st.builds(Power, grid_mw=st.integers(0, 10**7), battery_mw=st.integers(0, 10**7))
SPEEDS = st.builds(Speed, input_tokens_s=st.floats(0, 1e5), output_tokens_s=st.floats(0, 1e5))
WEARS = st.builds(
    Wear,
    prices=st.builds(
        WearPrices,
        battery_micro_kwh=st.integers(0, 10**6),
        pack_heat_micro_h=st.integers(0, 10**6),
        silicon_micro_h=st.integers(0, 10**6),
        flash_micro_gb=st.integers(0, 10**6),
    ),
    junction_ppm=st.integers(0, 10**7),
    flash_bytes_h=st.integers(0, 10**10),
)


@given(SPEEDS, POWERS, st.integers(0, 10**6), WEARS)
def test_the_projection_never_promises_more_than_comes(speed: Speed, power: Power, tariff: int, wear: Wear) -> None:
    hour = project(RATES, speed, power, tariff, wear)
    assert hour is not None
    assert hour.net_micro == hour.pay_micro - hour.electricity_micro - hour.wear_micro
    earned = (speed.input_tokens_s * RATES.input_micro + speed.output_tokens_s * RATES.output_micro) * 3600 / 1e6
    assert hour.pay_micro <= earned * (1 + 1e-12)
    assert hour.electricity_micro >= power.grid_mw / 1e6 * tariff * (1 - 1e-12)
    assert hour.wear_micro >= power.battery_mw / 1e6 * wear.prices.battery_micro_kwh * (1 - 1e-12)


@given(SPEEDS, POWERS, st.integers(0, 10**6), st.integers(0, 10**6), WEARS)
def test_dearer_electricity_never_raises_the_net(speed: Speed, power: Power, one: int, other: int, wear: Wear) -> None:
    cheap = project(RATES, speed, power, min(one, other), wear)
    dear = project(RATES, speed, power, max(one, other), wear)
    assert cheap is not None
    assert dear is not None
    assert dear.net_micro <= cheap.net_micro


# -- statements --------------------------------------------------------------------------------------------------------

INCREMENTS = st.builds(
    Increment,
    grid_mws=st.integers(0, 10**12),
    battery_mws=st.integers(0, 10**12),
    measured=st.booleans(),
)
ENTRIES = st.lists(
    st.tuples(INCREMENTS, st.none() | st.integers(-(10**6), 10**6), st.integers(0, 10**6), st.integers(0, 10**7)),
    max_size=30,
)


def book(entries: list[tuple[Increment, int | None, int, int]]) -> Statement:
    session = SessionBook(WearPrices(silicon_micro_h=100))
    for energy, price, pay_micro, compute_ms in entries:
        session.drew(energy, price)
        session.earned(pay_micro)
        session.wore(compute_ms=compute_ms, weighted_ms=compute_ms // 2, flash_bytes=10)
    return session.statement()


@given(ENTRIES)
def test_pay_less_electricity_less_wear_is_the_net_exactly(
    entries: list[tuple[Increment, int | None, int, int]],
) -> None:
    told = book(entries)
    assert told.pay_micro - told.electricity_micro - told.wear_micro == told.net_micro
    assert told.pay_micro == sum(pay for _, _, pay, _ in entries)
    assert told.grid_mws == sum(energy.grid_mws for energy, _, _, _ in entries)
    exact = sum(
        energy.grid_mws * (UNKNOWN_TARIFF_MICRO_KWH if price is None else price) for energy, price, _, _ in entries
    )
    assert exact <= told.electricity_micro * 3_600_000_000 < exact + 3_600_000_000


@given(ENTRIES, ENTRIES)
def test_two_sessions_add_up(
    one: list[tuple[Increment, int | None, int, int]], other: list[tuple[Increment, int | None, int, int]]
) -> None:
    first, second = book(one), book(other)
    both = first.plus(second)
    assert both.net_micro == first.net_micro + second.net_micro
    assert both == second.plus(first)
    # Rounding once instead of twice can only be cheaper, by less than a millionth for each of the parts.
    whole = book([*one, *other])
    assert 0 <= both.electricity_micro - whole.electricity_micro <= 1
    assert 0 <= both.wear_micro - whole.wear_micro <= 4


def test_a_session_is_measured_only_if_all_its_energy_was() -> None:
    session = SessionBook(WearPrices())
    assert not session.statement().measured
    session.drew(Increment(grid_mws=5, measured=True), 1)
    session.drew(Increment(), 1)  # nothing was drawn: says nothing
    assert session.statement().measured
    session.drew(Increment(grid_mws=5, measured=False), 1)
    session.drew(Increment(grid_mws=5, measured=True), 1)
    assert not session.statement().measured


def test_a_session_without_energy_leaves_a_sum_measured() -> None:
    session = SessionBook(WearPrices())
    session.drew(Increment(grid_mws=5, measured=True), 1)
    assert Statement().plus(session.statement()).measured
    assert not Statement().plus(Statement()).measured
    assert not session.statement().plus(Statement(grid_mws=1)).measured


def test_a_tariff_that_nobody_told_is_marked_and_dear() -> None:
    session = SessionBook(WearPrices())
    session.drew(Increment(grid_mws=3_600_000_000), None)
    assert session.statement().electricity_micro == UNKNOWN_TARIFF_MICRO_KWH
    assert not session.statement().tariff_known


# -- the second look ---------------------------------------------------------------------------------------------------


class World:
    """A vehicle that works whenever the guard would let it."""

    def __init__(self, look: SecondLook, *, step_ms: int = 1_000) -> None:
        self.look = look
        self.now_ms = 1_000_000
        self.step_ms = step_ms
        self.worked: list[tuple[int, int]] = []
        self.works = False
        self.tariff = 300_000
        self.rates = RATES
        self.speed: Speed | None = SPEED

    def step(self, *, able: bool = True) -> int | None:
        begin_ms = self.now_ms
        self.now_ms += self.step_ms
        if self.works:
            self.worked.append((begin_ms, self.now_ms))
        net = self.look.net_for_guard(
            self.now_ms,
            rates=self.rates,
            speed=self.speed,
            power=POWER,
            tariff_micro_kwh=self.tariff,
            wear=FREE,
            working=self.works,
        )
        self.works = able and (net is None or net >= 0)
        return net

    def worked_ms(self, since_ms: int = 0) -> int:
        return sum(end - max(begin, since_ms) for begin, end in self.worked if end > since_ms)


# At these, an hour brings 5,184 for 5,114 of electricity at 45,000 a kilowatt-hour, and less than that above.
SLOW = Speed(input_tokens_s=24.0, output_tokens_s=12.0)


def test_work_that_pays_goes_on_and_one_that_does_not_ends_after_the_probe() -> None:
    world = World(SecondLook(probe_ms=300_000))
    world.tariff = 45_000
    world.speed = SLOW
    assert [world.step() is not None for _ in range(10)] == [True] * 10
    assert world.works
    world.tariff = 60_000  # not worth it at this speed, but it would be at twice
    assert world.step() is None  # from here on it is a probe
    begin_ms = world.now_ms
    for _ in range(1_000):
        world.step()
    assert not world.works
    assert world.worked_ms(since_ms=begin_ms) == 300_000


def test_a_changed_tariff_a_changed_pay_and_a_changed_speed_bring_work_back_at_once() -> None:
    def tired() -> World:
        world = World(SecondLook(probe_ms=0))
        world.speed, world.tariff = SLOW, 60_000
        assert (world.step() or 0) < 0
        assert not world.works
        return world

    world = tired()
    world.tariff = 30_000
    assert (world.step() or 0) > 0
    world = tired()
    world.rates = PayRates(input_micro=60_000, output_micro=120_000)
    assert (world.step() or 0) > 0
    world = tired()
    world.speed = SPEED
    assert (world.step() or 0) > 0


def test_a_probe_that_finds_a_better_speed_lets_work_go_on() -> None:
    world = World(SecondLook())
    world.speed, world.tariff = SLOW, 60_000
    assert world.step() is None
    world.speed = Speed(input_tokens_s=48.0, output_tokens_s=24.0)
    for _ in range(1_000):
        assert (world.step() or 0) > 0
    assert world.look.probe_left_ms(world.now_ms) >= 298_000


def test_nothing_is_tried_when_the_net_is_certainly_below_zero() -> None:
    world = World(SecondLook())
    world.speed, world.tariff = SLOW, 100_000  # even twice the speed would not pay
    for _ in range(100):
        net = world.step()
        assert net is not None
        assert net < 0
    assert world.worked_ms() == 0


def test_a_vehicle_that_was_never_measured_may_work() -> None:
    world = World(SecondLook())
    world.speed = None
    assert world.step() is None


def test_a_probe_that_the_vehicle_could_not_use_is_not_used_up() -> None:
    world = World(SecondLook())
    world.speed, world.tariff = SLOW, 60_000
    for _ in range(1_000):
        assert world.step(able=False) is None
    assert world.look.probe_left_ms(world.now_ms) == 300_000


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 3 * HOUR_MS)), min_size=1, max_size=120),
    st.integers(0, 600_000),
)
def test_no_day_has_more_probing_than_was_allowed(steps: list[tuple[bool, int]], probe_ms: int) -> None:
    world = World(SecondLook(probe_ms=probe_ms))
    world.speed, world.tariff = SLOW, 60_000
    longest_ms = 0
    for able, step_ms in steps:
        # A vehicle that works asks again within seconds; only one that does not may stay away for hours.
        world.step_ms = min(step_ms, 5_000) if world.works else step_ms
        longest_ms = max(longest_ms, min(step_ms, 5_000))
        world.step(able=able)
        assert world.worked_ms(since_ms=world.now_ms - DAY_MS) <= probe_ms + longest_ms


@pytest.mark.parametrize("back_ms", [10_000, HOUR_MS, 3 * DAY_MS])
def test_a_clock_that_is_set_back_brings_no_second_probe(back_ms: int) -> None:
    world = World(SecondLook(probe_ms=60_000))
    world.now_ms = 10 * DAY_MS
    world.speed, world.tariff = SLOW, 60_000
    for _ in range(30):
        world.step()
    world.now_ms -= back_ms
    steps = 0
    for _ in range(200):
        world.step()
        steps += world.works
    assert steps <= 31


def test_a_new_start_brings_no_new_probe() -> None:
    world = World(SecondLook(probe_ms=60_000))
    world.speed, world.tariff = SLOW, 60_000
    for _ in range(200):
        world.step()
    world.look = SecondLook(probe_ms=60_000, stretches=world.look.stretches)
    for _ in range(200):
        world.step()
    assert world.worked_ms() == 60_000


def test_work_that_starts_and_stops_all_the_time_keeps_a_bounded_memory() -> None:
    world = World(SecondLook(probe_ms=DAY_MS))
    world.speed, world.tariff = SLOW, 60_000
    for step in range(2_000):
        world.step(able=step % 2 == 0)
    assert len(world.look.stretches) <= 64


def test_the_probe_comes_back_after_a_day() -> None:
    world = World(SecondLook(probe_ms=60_000))
    world.speed, world.tariff = SLOW, 60_000
    for _ in range(200):
        world.step()
    assert not world.works
    world.step_ms = DAY_MS
    assert world.step() is None
    assert world.works


def test_a_second_look_that_cannot_be_is_refused() -> None:
    for probe_ms in (-1, DAY_MS + 1):
        with pytest.raises(CallerError):
            SecondLook(probe_ms=probe_ms)
    for hope in (0.5, float("nan"), float("inf")):
        with pytest.raises(CallerError):
            SecondLook(hope=hope)


def test_the_page_shows_what_the_functions_say() -> None:
    page = (Path(__file__).parent.parent / "docs" / "energy-and-wear.md").read_text("utf-8")
    model = EnergyModel()
    cases = [(False, True), (True, True), (False, False), (True, False)]
    for watts_w in (100, 250, 1_000):
        grid_w = [model.power(watts_w, awake_for_us=awake, grid_fed=fed).grid_mw / 1000 for awake, fed in cases]
        assert f"| {watts_w:,} W | {' | '.join(f'{watts:,.0f}' for watts in grid_w)} |" in page
    pay = PayRates(input_micro=21_000, output_micro=42_000)
    for watts_w, prompt_s, answer_s in ((100, 737.0, 151.5), (250, 5_902.0, 283.1)):
        rate = 1 / (3 / prompt_s + 1 / answer_s)
        cells: list[str] = []
        for awake in (False, True):
            power = model.power(watts_w, awake_for_us=awake, grid_fed=True)
            hour = project(pay, Speed(input_tokens_s=3 * rate, output_tokens_s=rate), power, 300_000, Wear())
            assert hour is not None
            assert hour.wear_micro == 0
            cells = cells or [f"{hour.pay_micro / 1e6:.4f}"]
            cells += [f"{hour.electricity_micro / 1e6:.4f}", f"{hour.net_micro / 1e6:+.4f}"]
        assert f"| {watts_w} W, {answer_s} tokens/s | {' | '.join(cells)} |" in page
