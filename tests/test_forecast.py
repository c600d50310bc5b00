"""The forecast of a fleet: its bands hold on weeks it has not seen, and it sees the morning coming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.core import horizon
from motorpool.core.departures import EPOCH_WEEKDAY, HOUR_MS
from motorpool.core.forecast import AHEAD_H, STAYING_H, Forecast, staying_tokens_s
from motorpool.sim import generator
from motorpool.sim.recordings import load

DATA = Path(__file__).parents[2] / "shared" / "data" / "norway_35k_Dataset1_charging_reports.csv"
MONDAY = (7 - EPOCH_WEEKDAY) * 24 + 2_900 * 168  # an hour since 1970 at which a week begins
WEEK = 168


def plugged(stays: Any, first: int, hours: int) -> Any:
    """How many stand plugged in, hour by hour on average, from stays (begin, end) in milliseconds."""
    times = np.clip(np.array(stays, dtype=np.float64).reshape(-1, 2) / HOUR_MS - first, 0, hours)

    def so_far(moments: Any) -> Any:
        ordered = np.sort(moments)
        grid = np.arange(hours + 1)
        count = np.searchsorted(ordered, grid)
        return grid * count - np.concatenate([[0.0], np.cumsum(ordered)])[count]

    return np.diff(so_far(times[:, 0]) - so_far(times[:, 1]))


def coverage(fleets: Any, first: int, warm_h: int) -> tuple[Any, Any, Any]:
    """Of each fleet, after ``warm_h``: shares of hours within the band, below it and above it."""
    forecast = Forecast(len(fleets))
    inside, below, above = [], [], []
    hours = fleets.shape[1]
    for n in range(hours):
        forecast.observe(first + n, fleets[:, n], fleets[:, n])
        if n >= warm_h and n % 29 == 0 and n + WEEK < hours:
            bands = forecast.bands((first + n + 1) * HOUR_MS, WEEK)
            assert bands.start_ms == (first + n + 1) * HOUR_MS
            assert (bands.low <= bands.middle).all()
            assert (bands.middle <= bands.high).all()
            true = fleets[:, n + 1 : n + 1 + WEEK]
            below.append(true < bands.low - 1e-6)
            above.append(true > bands.high + 1e-6)
            inside.append(~below[-1] & ~above[-1])
    return np.mean(inside, axis=(0, 2)), np.mean(below, axis=(0, 2)), np.mean(above, axis=(0, 2))


@pytest.mark.skipif(not DATA.exists(), reason="the recorded sessions are not here")
def test_on_real_sessions_the_bands_hold_in_weeks_that_were_not_seen() -> None:
    sessions = load(DATA).sessions
    names = sorted({session.user for session in sessions})
    first = min(session.plug_in_ms for session in sessions) // HOUR_MS + 70 * WEEK
    fleets = [
        plugged([(s.plug_in_ms, s.plug_out_ms) for s in sessions if s.user in half], first, 22 * WEEK)
        for half in (set(names), set(names[::2]), set(names[1::2]))
    ]
    inside, below, above = coverage(np.array(fleets), first, 8 * WEEK)
    assert ((inside > 0.75) & (inside < 0.87)).all(), inside
    assert (below < 0.15).all()
    assert (above < 0.15).all()


def test_on_made_up_people_the_bands_hold_and_the_exodus_is_seen() -> None:
    stays = [generator.home(3, user, 17) for user in range(80)]
    whole = [(stay.begin_ms, stay.end_ms) for rows in stays for stay in rows]
    first = whole[0][0] // HOUR_MS // WEEK * WEEK + (7 - EPOCH_WEEKDAY) * 24 % WEEK
    fleet = plugged(whole, first, 16 * WEEK)[None, :]
    inside, _, _ = coverage(fleet, first, 8 * WEEK)
    assert ((inside > 0.75) & (inside < 0.87)).all(), inside
    forecast = Forecast(1)
    tuesday_four = 12 * WEEK + 24 + 4
    for n in range(tuesday_four):
        forecast.observe(first + n, fleet[:, n], fleet[:, n])
    bands = forecast.bands((first + tuesday_four) * HOUR_MS, 6)
    assert bands.middle[0, 5] < 0.8 * bands.middle[0, 1]  # from five to nine in the morning
    assert bands.high[0, 5] < bands.low[0, 1] + bands.middle[0, 1] * 0.2


def profile(hour: int) -> float:
    """A fleet that is there at night, half of it by day, on weekends a little more."""
    night = 1.0 if hour % 24 < 7 or hour % 24 >= 18 else 0.5
    return night * (1.1 if hour % WEEK >= 120 else 1.0)


def test_a_fleet_that_moves_as_one_has_wide_bands() -> None:
    draw = np.random.default_rng(1)
    forecast = Forecast(2)
    weeks = 16
    common = np.exp(0.2 * draw.standard_normal(weeks * 7 + 7))
    hits, widths = [], []
    for n in range(weeks * WEEK):
        if n > 8 * WEEK and n % 31 == 0:
            bands = forecast.bands((MONDAY + n + 30) * HOUR_MS, 1)  # a day and more ahead
            widths.append((bands.high - bands.low)[:, 0] / bands.middle[:, 0])
            true = 10_000 * profile(n + 30) * common[(n + 30) // 24]
            hits.append(bands.low[1, 0] <= true <= bands.high[1, 0])
        alone = draw.binomial(10_000, profile(n) / 1.2)
        forecast.observe(MONDAY + n, [alone, 10_000], [float(alone), 10_000 * profile(n) * common[n // 24]])
    alone_wide, common_wide = np.mean(widths, axis=0)
    assert alone_wide < 0.1
    assert common_wide > 0.4  # 10 % to 90 % of such a distribution
    assert 0.65 < np.mean(hits) < 0.95


def test_what_the_vehicles_say_decides_the_first_hours() -> None:
    """How many leave at seven differs from day to day, and the cars know at night: the profile alone cannot."""
    draw = np.random.default_rng(2)
    last = 8 * WEEK + 24 + 4  # a Tuesday, just before four
    leaving = draw.integers(20, 80, size=9 * 7)
    leaving[last // 24] = 2  # a holiday
    told: dict[bool, float] = {}
    for with_stays in (False, True):
        forecast = Forecast(1)
        for n in range(last):
            leave = int(leaving[n // 24])
            by_day = 7 <= n % 24 < 18
            day = 100.0 - leave if by_day else 100.0
            bounds = [20 * HOUR_MS] * 100
            if n % 24 < 7:
                bounds[:leave] = [max(6 - n % 24, 0) * HOUR_MS] * leave  # when hour n is over
            risks = [0.6 if n % 24 == 6 and bound == 0 else 0.0 for bound in bounds]
            share = day / 100.0
            here = staying_tokens_s([0] * 100, [share] * 100, bounds, risks, 1)
            forecast.observe(MONDAY + n, [day], [day], here if with_stays else None)
        bands = forecast.bands((MONDAY + last) * HOUR_MS, 48)
        told[with_stays] = float(bands.middle[0, 5])  # at nine
        assert 35.0 < bands.middle[0, 33] < 65.0  # the day after it is as always
    assert told[False] < 65.0
    assert told[True] > told[False] + 15.0


@given(st.integers(0, 24 * HOUR_MS), st.floats(0.0, 1.0))
def test_the_hazard_of_many_is_that_of_one(bound: int, risk: float) -> None:
    many = staying_tokens_s([1, 1], [2.0, 2.0], [bound, bound], [risk, risk], 2)
    assert many.shape == (2, STAYING_H)
    assert not many[0].any()
    for ahead in range(STAYING_H):
        one = horizon.survival(ahead * HOUR_MS + HOUR_MS // 2, bound, risk)
        assert many[1, ahead] == pytest.approx(4.0 * one, rel=1e-9, abs=1e-12)


def test_without_history_nothing_is_known_and_soon_something_is() -> None:
    forecast = Forecast(1)
    assert not forecast.bands(MONDAY * HOUR_MS, 24).known.any()
    for n in range(30):
        forecast.observe(MONDAY + n, [10], [100.0])
    bands = forecast.bands((MONDAY + 30) * HOUR_MS, WEEK)
    assert bands.known[0, :24].all()  # from the other weekdays
    weekend = slice(120 - 30, 168 - 30)
    assert not bands.known[0, weekend].any()
    assert not bands.high[0, weekend].any()
    assert bands.per_vehicle[0] == pytest.approx(10.0)
    assert 0.0 < bands.low[0, 0] < 100.0 < bands.high[0, 0]


def grown(hours: int, *, gap: range = range(0)) -> Forecast:
    forecast = Forecast(1)
    for n in range(hours):
        if n not in gap:
            forecast.observe(MONDAY + n, [profile(n) * 50], [profile(n) * 500.0])
    return forecast


def same(one: Forecast, other: Forecast, now: int) -> bool:
    first, second = one.bands(now * HOUR_MS, WEEK), other.bands(now * HOUR_MS, WEEK)
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("low", "middle", "high"))


def test_a_snapshot_goes_on_as_if_nothing_had_been() -> None:
    forecast = grown(4 * WEEK)
    again = Forecast.load(forecast.dump())
    assert again is not None
    for n in range(4 * WEEK, 5 * WEEK):
        for each in (forecast, again):
            each.observe(MONDAY + n, [profile(n) * 40], [profile(n) * 400.0])
    assert same(forecast, again, MONDAY + 5 * WEEK)
    assert forecast.dump() == again.dump()
    assert len(forecast.dump()) == len(grown(1).dump())  # it does not grow
    assert len(forecast.dump()) < 120_000


@pytest.mark.parametrize("data", [b"", b"\xc1", b"nonsense", grown(3).dump()[:-5], b"\x95" + grown(3).dump()[1:20]])
def test_a_damaged_snapshot_is_nothing_learnt(data: bytes) -> None:
    assert Forecast.load(data) is None


def test_a_silence_leaves_no_old_numbers_behind() -> None:
    gap = range(3 * WEEK + 10, 3 * WEEK + 90)
    forecast = grown(5 * WEEK, gap=gap)
    bands = forecast.bands((MONDAY + 5 * WEEK + 10) * HOUR_MS, WEEK)
    true = np.array([profile(n) * 500 for n in range(10, 10 + WEEK)])
    assert bands.middle[0] == pytest.approx(true, rel=0.1)
    late = forecast.bands((MONDAY + 9 * WEEK) * HOUR_MS, 24)  # nobody has told anything for four weeks
    assert late.known.all()
    assert late.middle[0] == pytest.approx(np.array([profile(n) * 500 for n in range(24)]), rel=0.1)


def test_new_classes_begin_without_history_and_leave_the_others_alone() -> None:
    forecast, alone = grown(3 * WEEK), grown(3 * WEEK)
    forecast.grow(3)
    assert forecast.classes == 3
    bands = forecast.bands((MONDAY + 3 * WEEK) * HOUR_MS, WEEK)
    assert not bands.known[1:].any()
    assert np.array_equal(bands.middle[:1], alone.bands((MONDAY + 3 * WEEK) * HOUR_MS, WEEK).middle)


def test_an_empty_fleet_and_a_sudden_one_are_no_error() -> None:
    forecast = Forecast(1)
    for n in range(3 * WEEK):
        count = 0 if n < 2 * WEEK else 1_000
        forecast.observe(MONDAY + n, [count], [count * 30.0])
    bands = forecast.bands((MONDAY + 3 * WEEK) * HOUR_MS, WEEK)
    assert np.isfinite(bands.high).all()
    assert (bands.high >= bands.middle).all()
    assert (bands.low >= 0).all()
    assert bands.high.max() < 100 * 30_000


def test_the_week_is_that_of_local_time() -> None:
    east = Forecast(1)
    east.set_offset(0, 9 * 60)
    for n in range(4 * WEEK):
        east.observe(MONDAY + n, [10.0], [100.0 * profile(n + 9)])
    bands = east.bands((MONDAY + 4 * WEEK) * HOUR_MS, WEEK)
    assert bands.middle[0] == pytest.approx(np.array([100.0 * profile(n + 9) for n in range(WEEK)]), rel=0.05)
    assert AHEAD_H[-1] == WEEK
