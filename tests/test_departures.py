"""The car's own week: what it learns, what it forgets, and that it never says more or longer than it may."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.core import departures as d
from motorpool.core.departures import (
    AWAY,
    DAY_MS,
    HOUR_MS,
    MINUTE_MS,
    Fleet,
    Habits,
    hour_of_week,
    latest_stay_ms,
    next_weekly_ms,
    stands_plugged,
)
from motorpool.core.departures_fleet import NORWAY_HOME
from motorpool.core.policy import ReadyBy
from motorpool.core.signals import Reading, Signals

MONDAY_MS = 1_768_176_000_000  # 2026-01-12T00:00:00Z
FLAT = Fleet(hazard_per_h=(0.1,) * 168, scores=tuple(-math.log(1 - (n + 0.5) / 49) for n in range(49)))
STEP_MS = 15 * MINUTE_MS


def stay(habits: Habits, begin_ms: int, end_ms: int, offset_min: int = 0) -> None:
    """Away, plugged in from ``begin_ms``, watched every quarter of an hour, gone at ``end_ms``."""
    habits.advance(False, begin_ms - 1, offset_min)
    habits.advance(True, begin_ms, offset_min)
    for at_ms in range(begin_ms + STEP_MS, end_ms, STEP_MS):
        habits.advance(True, at_ms, offset_min)
    habits.advance(False, end_ms, offset_min)


def nights(habits: Habits, first: int, count: int, leaves_h: float, from_h: float = 18.0) -> None:
    for day in range(first, first + count):
        stay(
            habits,
            MONDAY_MS + day * DAY_MS + int(from_h * HOUR_MS),
            MONDAY_MS + (day + 1) * DAY_MS + int(leaves_h * HOUR_MS),
        )


def plugged_at(habits: Habits, now_ms: int) -> Habits:
    habits.advance(False, now_ms - 1, 0)
    habits.advance(True, now_ms, 0)
    return habits


# -- hours and times ---------------------------------------------------------------------------------------------------


def test_the_week_begins_on_monday_in_local_time() -> None:
    assert hour_of_week(MONDAY_MS, 0) == 0
    assert hour_of_week(MONDAY_MS - 1, 0) == 167
    assert hour_of_week(MONDAY_MS, 60) == 1
    assert hour_of_week(MONDAY_MS, -60) == 167
    assert hour_of_week(MONDAY_MS + 7 * DAY_MS + 5 * HOUR_MS, 0) == 5


def test_weekdays_and_weekends_have_bins_of_their_own() -> None:
    assert [d.bin_of(hour) for hour in (0, 7, 24 + 7, 4 * 24 + 23, 5 * 24, 6 * 24 + 7)] == [0, 7, 7, 23, 24, 31]


def test_the_next_of_the_owners_times_is_found_in_local_time() -> None:
    weekdays = ReadyBy(weekdays=0b0011111, minute=7 * 60 + 30)
    sunday = ReadyBy(weekdays=0b1000000, minute=10 * 60)
    half_past_seven = MONDAY_MS + 7 * HOUR_MS + 30 * MINUTE_MS
    assert next_weekly_ms([weekdays, sunday], MONDAY_MS, 0) == half_past_seven
    assert next_weekly_ms([weekdays, sunday], half_past_seven, 0) == half_past_seven + DAY_MS
    assert next_weekly_ms([weekdays, sunday], MONDAY_MS + 5 * DAY_MS, 0) == MONDAY_MS + 6 * DAY_MS + 10 * HOUR_MS
    assert next_weekly_ms([weekdays], MONDAY_MS, 120) == half_past_seven - 2 * HOUR_MS  # summer time: two hours ahead
    assert next_weekly_ms([ReadyBy(weekdays=1, minute=0)], MONDAY_MS, 0) == MONDAY_MS + 7 * DAY_MS
    assert next_weekly_ms([ReadyBy(weekdays=0, minute=0)], MONDAY_MS, 0) is None
    assert next_weekly_ms([], MONDAY_MS, 0) is None


def test_of_the_stated_times_the_earliest_counts_and_one_that_was_not_kept_does_not() -> None:
    assert latest_stay_ms([], MONDAY_MS) is None
    assert latest_stay_ms([MONDAY_MS + 5, MONDAY_MS + 3], MONDAY_MS) == 3
    assert latest_stay_ms([MONDAY_MS - 5, MONDAY_MS + 3], MONDAY_MS) == 0  # any moment now
    assert latest_stay_ms([MONDAY_MS - d.GRACE_MS, MONDAY_MS + 3], MONDAY_MS) == 3


# -- what counts as standing plugged in --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        ({"cable_connected": True, "gear_is_park": True, "speed_kmh": 0.0}, True),
        ({"cable_connected": True, "gear_is_park": True}, True),
        ({"cable_connected": True, "speed_kmh": 0.0}, True),
        ({"cable_connected": True}, None),
        ({"gear_is_park": True, "speed_kmh": 0.0}, None),
        ({"cable_connected": False}, False),
        ({"cable_connected": True, "gear_is_park": False}, False),
        ({"cable_connected": True, "speed_kmh": 3.0}, False),
        ({"speed_kmh": 30.0}, False),
        ({"cable_connected": True, "speed_kmh": math.nan}, None),
        ({}, None),
    ],
)
def test_only_standing_with_the_cable_in_counts(signals: dict[str, object], expected: bool | None) -> None:
    readings = Signals(**{name: Reading(value, MONDAY_MS) for name, value in signals.items()})  # type: ignore[arg-type]
    assert stands_plugged(readings, MONDAY_MS) is expected
    assert stands_plugged(readings, MONDAY_MS + 60_000) is None  # too old to say anything


# -- the formulas ------------------------------------------------------------------------------------------------------


def test_a_new_vehicle_goes_by_the_fleet() -> None:
    habits = plugged_at(Habits(FLAT), MONDAY_MS)
    assert habits.theta() == FLAT.scores[4]  # floor(0.1 * 50) = the fifth smallest of 49
    assert habits.bound_ms(MONDAY_MS, 0) == pytest.approx(FLAT.scores[4] / 0.1 * HOUR_MS, abs=1)
    assert habits.risk(MONDAY_MS, 0, HOUR_MS) == pytest.approx(1 - math.exp(-0.1))


def test_the_factor_of_an_hour_is_the_gamma_poisson_mean_of_it_and_its_neighbours() -> None:
    habits = Habits(FLAT)
    for day in range(3):  # Monday to Wednesday, from six to half past seven
        stay(habits, MONDAY_MS + day * DAY_MS + 6 * HOUR_MS, MONDAY_MS + day * DAY_MS + 7 * HOUR_MS + 30 * MINUTE_MS)
    now_ms = MONDAY_MS + 2 * DAY_MS + 8 * HOUR_MS
    fade = [0.5 ** ((2 - day) * DAY_MS / d.HALF_LIFE_MS) for day in range(3)]
    k7, e6, e7 = sum(fade), 0.1 * sum(fade), 0.05 * sum(fade)
    mu = (k7 + 3) / (e6 + e7 + 3)
    expected = 0.1 * (k7 + mu) / (e7 + 0.5 * e6 + 1)
    told = -math.log(1 - habits.risk(now_ms + 23 * HOUR_MS, 0, HOUR_MS))  # Thursday, seven to eight
    assert told == pytest.approx(expected, rel=2e-3)
    untouched = -math.log(1 - habits.risk(now_ms + HOUR_MS * 4, 0, HOUR_MS))
    assert untouched == pytest.approx(0.1 * mu, rel=2e-3)


def test_a_habit_is_learnt() -> None:
    early, late = Habits(NORWAY_HOME), Habits(NORWAY_HOME)
    nights(early, 0, 28, leaves_h=7.2)
    nights(late, 0, 28, leaves_h=10.2)
    at_ms = MONDAY_MS + 28 * DAY_MS + 22 * HOUR_MS
    bounds_h = [plugged_at(habits, at_ms).bound_ms(at_ms, 0) / HOUR_MS for habits in (early, Habits(NORWAY_HOME), late)]
    assert 7.5 < bounds_h[0] < 9.2  # not beyond twelve minutes past seven
    assert bounds_h[0] == pytest.approx(bounds_h[1], abs=0.5)  # as most of the fleet
    assert bounds_h[2] > bounds_h[1] + 1.0


def test_an_old_habit_is_forgotten() -> None:
    habits = Habits(NORWAY_HOME)
    nights(habits, 0, 60, leaves_h=7.2)
    nights(habits, 60, 60, leaves_h=10.2)
    at_ms = MONDAY_MS + 182 * DAY_MS + 6 * HOUR_MS
    plugged_at(habits, at_ms)
    fresh = Habits(NORWAY_HOME)
    nights(fresh, 0, 60, leaves_h=7.2)
    fresh_risk = fresh.risk(at_ms, 0, 2 * HOUR_MS)
    assert habits.risk(at_ms, 0, 2 * HOUR_MS) < fresh_risk / 2


def test_a_longer_stay_is_foretold_with_less_probability() -> None:
    habits = Habits(NORWAY_HOME)
    nights(habits, 0, 14, leaves_h=8.0)
    at_ms = MONDAY_MS + 14 * DAY_MS + 20 * HOUR_MS
    bounds = [habits.bound_ms(at_ms, 0, q) for q in (0.99, 0.95, 0.9, 0.5)]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[-1]


def test_the_bound_is_kept_nine_times_of_ten_by_a_vehicle_unlike_the_fleet() -> None:
    """Departures are drawn from a week that differs from the fleet's by the hour; the seed is fixed."""
    draw = random.Random(7)
    own = [rate * (0.25 if hour % 24 < 9 else 3.0) for hour, rate in enumerate(NORWAY_HOME.hazard_per_h)]
    habits, at_ms, kept, asked = Habits(NORWAY_HOME), MONDAY_MS, 0, 0
    while at_ms < MONDAY_MS + 300 * DAY_MS:
        at_ms += int(draw.uniform(4, 14) * HOUR_MS) // STEP_MS * STEP_MS
        begin_ms, left, questions = at_ms, draw.expovariate(1.0), list[tuple[int, int]]()
        habits.advance(False, begin_ms - 1, 0)
        habits.advance(True, begin_ms, 0)
        while (left := left - own[hour_of_week(at_ms, 0)] / 4) > 0:
            at_ms += STEP_MS
            habits.advance(True, at_ms, 0)
            questions.append((at_ms, habits.bound_ms(at_ms, 0)))
        at_ms += STEP_MS
        habits.advance(False, at_ms, 0)
        if begin_ms > MONDAY_MS + 100 * DAY_MS:
            asked += len(questions)
            kept += sum(asked_ms + bound_ms <= at_ms for asked_ms, bound_ms in questions)
    assert asked > 3000
    assert 0.87 < kept / asked < 0.94


def test_the_factor_by_age_counts_when_it_is_asked_for() -> None:
    fleet = msgspec.structs.replace(FLAT, age_from_h=(0.0, 2.0), age_factor=(1.0, 3.0))
    plain, aged = (plugged_at(Habits(fleet, use_age=use), MONDAY_MS) for use in (False, True))
    assert plain.risk(MONDAY_MS, 0, HOUR_MS) == aged.risk(MONDAY_MS, 0, HOUR_MS)
    for habits in (plain, aged):
        for step in range(1, 13):
            habits.advance(True, MONDAY_MS + step * STEP_MS, 0)
    late_ms = MONDAY_MS + 3 * HOUR_MS
    assert aged.risk(late_ms, 0, MINUTE_MS) > 2.5 * plain.risk(late_ms, 0, MINUTE_MS)


def test_the_fleets_table_is_that_of_homes() -> None:
    rates = NORWAY_HOME.hazard_per_h
    assert all(rates[day * 24 + 7] > 50 * rates[day * 24 + 2] for day in range(5))  # the morning
    assert max(rates[5 * 24 :]) < max(rates[: 5 * 24])
    assert 0.07 < NORWAY_HOME.scores[4] < 0.16  # exact rates would give -ln 0.9 = 0.105


# -- silence, flaps and jumps ------------------------------------------------------------------------------------------


def counts(habits: Habits) -> tuple[float, float]:
    """Departures and expected departures that were learnt."""
    return sum(habits._k), sum(habits._e)


def test_a_stay_whose_end_nobody_saw_is_time_without_a_departure() -> None:
    habits = plugged_at(Habits(FLAT), MONDAY_MS)
    for step in range(1, 9):
        habits.advance(True, MONDAY_MS + step * STEP_MS, 0)
    assert counts(habits) == pytest.approx((0.0, 0.2), rel=1e-3)
    habits.advance(True, MONDAY_MS + 10 * HOUR_MS, 0)  # the agent was stopped meanwhile
    assert counts(habits) == pytest.approx((0.0, 0.2), rel=1e-2)
    assert habits.scores == ()


def test_a_departure_within_a_silence_is_shared_among_its_hours() -> None:
    habits = plugged_at(Habits(NORWAY_HOME), MONDAY_MS + 4 * HOUR_MS)
    assert habits.advance(False, MONDAY_MS + 9 * HOUR_MS, 0)
    assert sum(habits._k) == pytest.approx(1.0)
    assert max(range(48), key=lambda index: habits._k[index]) == 7
    assert habits._k[4] < 0.05
    assert all(habits._k[index] == 0 for index in range(9, 48))
    assert 0 < habits._e[8] < NORWAY_HOME.hazard_per_h[8] * 0.5  # most likely it was gone by then


def test_a_departure_within_a_long_silence_teaches_nothing() -> None:
    habits = plugged_at(Habits(FLAT), MONDAY_MS)
    assert not habits.advance(False, MONDAY_MS + 13 * HOUR_MS, 0)
    assert counts(habits) == (0.0, 0.0)


def test_a_plug_that_is_put_right_is_no_departure() -> None:
    habits = plugged_at(Habits(FLAT), MONDAY_MS)
    for second in range(1, 60):
        assert not habits.advance(second % 2 == 0, MONDAY_MS + second * 1000, 0)
    assert counts(habits)[0] == 0.0


def test_time_away_teaches_nothing() -> None:
    habits = Habits(FLAT)
    for step in range(100):
        habits.advance(False, MONDAY_MS + step * STEP_MS, 0)
    assert counts(habits) == (0.0, 0.0)


def test_a_clock_that_jumps_ahead_does_not_wipe_out_what_was_learnt() -> None:
    habits = Habits(FLAT)
    nights(habits, 0, 20, leaves_h=7.2)
    before = counts(habits)[0]
    habits.advance(False, MONDAY_MS + 10 * 365 * DAY_MS, 0)
    assert counts(habits)[0] > 0.7 * before
    habits.advance(True, MONDAY_MS + 21 * DAY_MS, 0)  # and back
    assert counts(habits)[0] > 0.7 * before
    assert habits.outlook(MONDAY_MS + 21 * DAY_MS, 0).stay_bound_ms is not None


def test_summer_time_moves_the_hour_and_not_the_habit() -> None:
    winter, summer = Habits(NORWAY_HOME), Habits(NORWAY_HOME)
    for day in range(10):
        begin_ms = MONDAY_MS + day * DAY_MS + 18 * HOUR_MS
        stay(winter, begin_ms - HOUR_MS, begin_ms + 12 * HOUR_MS, offset_min=60)
        stay(summer, begin_ms - 2 * HOUR_MS, begin_ms + 11 * HOUR_MS, offset_min=120)
    at_ms = MONDAY_MS + 14 * DAY_MS
    assert winter._k == pytest.approx(summer._k, rel=1e-3)
    assert winter.risk(at_ms, 60, 8 * HOUR_MS) == pytest.approx(
        summer.risk(at_ms - HOUR_MS, 120, 8 * HOUR_MS), rel=1e-3
    )


# -- what leaves the car -----------------------------------------------------------------------------------------------


def test_a_vehicle_that_is_not_plugged_or_not_heard_of_says_so_and_no_more() -> None:
    habits = Habits(NORWAY_HOME)
    assert habits.outlook(MONDAY_MS, 0) == AWAY
    plugged_at(habits, MONDAY_MS)
    assert habits.outlook(MONDAY_MS + d.MAX_SILENCE_MS, 0) != AWAY
    assert habits.outlook(MONDAY_MS + d.MAX_SILENCE_MS + 1, 0) == AWAY
    habits.advance(False, MONDAY_MS + HOUR_MS, 0)
    assert habits.outlook(MONDAY_MS + HOUR_MS, 0) == AWAY


def test_a_stated_departure_is_the_longest_stay() -> None:
    at_ms = MONDAY_MS + 22 * HOUR_MS
    habits = plugged_at(Habits(NORWAY_HOME), at_ms)
    free = habits.outlook(at_ms, 0)
    assert free.stay_bound_ms is not None
    assert free.stay_bound_ms > 2 * HOUR_MS
    assert habits.outlook(at_ms, 0, latest_ms=HOUR_MS + 1).stay_bound_ms == HOUR_MS
    assert habits.outlook(at_ms, 0, latest_ms=30 * HOUR_MS) == free
    soon = habits.outlook(at_ms, 0, latest_ms=14 * MINUTE_MS)
    assert (soon.stay_bound_ms, soon.risk_15min) == (10 * MINUTE_MS, 1.0)


moves = st.lists(
    st.tuples(
        st.sampled_from([True, True, False, None]),
        st.one_of(
            st.integers(0, 40 * MINUTE_MS),
            st.integers(-3 * HOUR_MS, 40 * HOUR_MS),
            st.integers(-400 * DAY_MS, 400 * DAY_MS),
        ),
        st.sampled_from([0, 60, 120, -300, 10**6]),
    ),
    max_size=60,
)


@given(trace=moves, latest_ms=st.none() | st.integers(-DAY_MS, 3 * DAY_MS), use_age=st.booleans())
def test_whatever_happens_what_leaves_the_car_is_coarse_and_within_its_bounds(
    trace: list[tuple[bool | None, int, int]], latest_ms: int | None, use_age: bool
) -> None:
    habits, now_ms = Habits(NORWAY_HOME, use_age=use_age), MONDAY_MS
    for plugged, step_ms, offset_min in trace:
        now_ms = max(0, now_ms + step_ms)
        habits.advance(plugged, now_ms, offset_min)
        outlook = habits.outlook(now_ms, offset_min, latest_ms)
        assert 0.0 <= outlook.risk_15min <= 1.0
        assert round(outlook.risk_15min, 2) == outlook.risk_15min
        bound_ms = outlook.stay_bound_ms
        if bound_ms is not None:
            assert 0 <= bound_ms <= DAY_MS
            assert bound_ms % d.ROUND_MS == 0
            assert latest_ms is None or bound_ms <= max(0, latest_ms)
    assert len(habits.dump()) < d.MAX_KEPT_BYTES
    assert len(habits.scores) <= d.WINDOW
    again = Habits.load(NORWAY_HOME, habits.dump(), use_age=use_age)
    assert again is not None
    assert again.dump() == habits.dump()


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_writing_and_reading_every_day_loses_nothing_that_matters() -> None:
    steady, restarted = Habits(NORWAY_HOME), Habits(NORWAY_HOME)
    for day in range(90):
        nights(steady, day, 1, leaves_h=7.5)
        nights(restarted, day, 1, leaves_h=7.5)
        loaded = Habits.load(NORWAY_HOME, restarted.dump())
        assert loaded is not None
        restarted = loaded
    at_ms = MONDAY_MS + 91 * DAY_MS
    assert counts(restarted) == pytest.approx(counts(steady), rel=0.01)
    assert restarted.bound_ms(at_ms, 0) == pytest.approx(steady.bound_ms(at_ms, 0), rel=0.02)


def test_a_stay_goes_on_over_a_restart() -> None:
    habits = plugged_at(Habits(NORWAY_HOME), MONDAY_MS)
    for step in range(1, 9):
        habits.advance(True, MONDAY_MS + step * STEP_MS, 0)
    again = Habits.load(NORWAY_HOME, habits.dump())
    assert again is not None
    assert again.advance(False, MONDAY_MS + 9 * STEP_MS, 0)
    assert len(again.scores) == 3


def changed(change: Callable[[list[object]], None]) -> bytes:
    habits = Habits(NORWAY_HOME)
    nights(habits, 0, 2, leaves_h=7.5)
    fields: list[object] = msgspec.msgpack.decode(habits.dump())
    change(fields)
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"x" * (d.MAX_KEPT_BYTES + 1),
        changed(lambda fields: fields.__setitem__(0, 99)),
        changed(lambda fields: fields.__setitem__(1, None)),
        changed(lambda fields: fields.__setitem__(3, 1 << 62)),
        changed(lambda fields: fields.__setitem__(4, b"\x00" * 95)),
        changed(lambda fields: fields.__setitem__(5, b"")),
        changed(lambda fields: fields.__setitem__(6, b"\x00" * 514)),
        changed(lambda fields: fields.__setitem__(7, b"")),
        changed(lambda fields: fields.__setitem__(8, b"\x00" * 98)),
        changed(lambda fields: fields.append(0)),
    ],
)
def test_what_is_not_whole_is_not_read(data: bytes) -> None:
    assert Habits.load(NORWAY_HOME, data) is None


@given(data=st.binary(max_size=300), at=st.integers(0, 400), plugged=st.booleans(), step_ms=st.integers(0, 20 * DAY_MS))
def test_damage_is_refused_or_harmless(data: bytes, at: int, plugged: bool, step_ms: int) -> None:
    whole = changed(lambda _: None)
    for kept in (data, whole[:at] + data + whole[at + len(data) :]):
        habits = Habits.load(NORWAY_HOME, kept)
        if habits is None:
            continue
        habits.advance(plugged, MONDAY_MS + step_ms, 0)
        outlook = habits.outlook(MONDAY_MS + step_ms, 0)
        assert 0.0 <= outlook.risk_15min <= 1.0
