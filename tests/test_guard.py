"""The guard: one table of single faults, and properties over random signals."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.guard_trial import (
    CONSENT,
    FINE,
    FREE,
    GOOD,
    MINUTE_NOW,
    NOW_MS,
    POLICY,
    Standing,
    charging,
    codes,
    ready_by,
    verdict,
    with_,
)

from motorpool.agent.signals.source import AlwaysParked
from motorpool.core.guard import (
    MAX_AGE_MS,
    POSSIBLE,
    ConsentView,
    History,
    LowVoltage,
    Occupancy,
    Policy,
    Reading,
    Signals,
    decide,
)
from motorpool.core.signals import NEEDED, DriverMode, NetworkClass
from motorpool.types import Permit, Reason, ReasonCode


def test_a_parked_plugged_and_permitted_vehicle_gets_the_smaller_of_both_powers() -> None:
    assert verdict(GOOD) == Permit(watts_w=100, until_ms=NOW_MS + 2_000)
    assert verdict(GOOD, policy=Policy(watts_w=400, dwell_ms=0)) == Permit(watts_w=150, until_ms=NOW_MS + 2_000)


def test_a_permit_never_outlives_the_consent() -> None:
    consent = msgspec.structs.replace(CONSENT, expires_ms=NOW_MS + 500)
    assert verdict(GOOD, consent=consent) == Permit(watts_w=100, until_ms=NOW_MS + 500)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("gear_is_park", False, ReasonCode.NOT_IN_PARK),
        ("speed_kmh", 3.0, ReasonCode.MOVING),
        ("speed_kmh", -3.0, ReasonCode.MOVING),
        ("speed_kmh", float("nan"), ReasonCode.MOVING),
        ("speed_kmh", float("inf"), ReasonCode.MOVING),
        ("ignition", LowVoltage.ON, ReasonCode.IGNITION_ON),
        ("ignition", LowVoltage.START, ReasonCode.IGNITION_ON),
        ("ignition", LowVoltage.UNDEFINED, ReasonCode.IGNITION_ON),
        ("doors_open", True, ReasonCode.DOOR_OPEN),
        ("locked", False, ReasonCode.UNLOCKED),
        ("seat_occupied", Occupancy.OCCUPIED, ReasonCode.OCCUPIED),
        ("seat_occupied", Occupancy.UNKNOWN, ReasonCode.OCCUPIED),
        ("cable_connected", False, ReasonCode.NOT_PLUGGED_IN),
        ("cable_locked", False, ReasonCode.CABLE_UNLOCKED),
        ("grid_power_available", False, ReasonCode.NO_GRID_POWER),
        ("soc_displayed_pct", 29.9, ReasonCode.BELOW_FLOOR),
        ("preconditioning", True, ReasonCode.PRECONDITIONING),
        ("driver_mode", DriverMode.GUEST, ReasonCode.CONSENT_SUSPENDED),
        ("driver_mode", DriverMode.VALET, ReasonCode.CONSENT_SUSPENDED),
        ("driver_mode", DriverMode.SERVICE, ReasonCode.CONSENT_SUSPENDED),
        ("driver_mode", DriverMode.UNKNOWN, ReasonCode.CONSENT_SUSPENDED),
        ("update_in_progress", True, ReasonCode.UPDATE_IN_PROGRESS),
        ("feeding_grid", True, ReasonCode.FEEDING_GRID),
        ("pack_temp_c", 45.0, ReasonCode.TOO_HOT),
        ("computer_temp_c", 90.0, ReasonCode.TOO_HOT),
        ("dcdc_temp_c", 90.0, ReasonCode.TOO_HOT),
        ("low_voltage_v", 11.9, ReasonCode.LOW_12V),
        ("fault_count", 1, ReasonCode.FAULT),
        ("power_optimize_level", 5, ReasonCode.POWER_SAVING),
        ("network", NetworkClass.METERED, ReasonCode.METERED_NETWORK),
        ("network", NetworkClass.ROAMING, ReasonCode.METERED_NETWORK),
        ("network", NetworkClass.UNKNOWN, ReasonCode.METERED_NETWORK),
    ],
)
def test_each_single_fault_is_a_reason_of_its_own(name: str, value: Any, code: ReasonCode) -> None:
    assert codes(verdict(with_(GOOD, **{name: value}))) == [code]


def test_charging_is_no_condition() -> None:
    full = with_(GOOD, soc_displayed_pct=100.0, charge_limit_pct=80.0, battery_power_w=0.0)
    assert isinstance(verdict(full), Permit)


@pytest.mark.parametrize("name", NEEDED)
def test_each_signal_that_is_missing_stale_or_from_the_future_is_named(name: str) -> None:
    missing = msgspec.structs.replace(GOOD, **{name: None})
    assert verdict(missing) == (Reason(code=ReasonCode.SIGNAL_MISSING, detail=name),)
    value = getattr(GOOD, name).value
    for at_ms in (NOW_MS - MAX_AGE_MS[name] - 1, NOW_MS + 1_001):
        stale = msgspec.structs.replace(GOOD, **{name: Reading(value, at_ms)})
        assert verdict(stale) == (Reason(code=ReasonCode.SIGNAL_STALE, detail=name),)
    still_good = msgspec.structs.replace(GOOD, **{name: Reading(value, NOW_MS - MAX_AGE_MS[name])})
    assert isinstance(verdict(still_good), Permit)


@pytest.mark.parametrize(
    "code",
    [
        ReasonCode.CONSENT_MISSING,
        ReasonCode.CONSENT_INVALID,
        ReasonCode.CONSENT_EXPIRED,
        ReasonCode.CONSENT_WITHDRAWN,
    ],
)
def test_without_consent_there_is_no_permit(code: ReasonCode) -> None:
    assert codes(verdict(GOOD, consent=ConsentView(refusal=code))) == [code]


def test_the_default_is_off() -> None:
    assert codes(verdict(GOOD, consent=ConsentView())) == [ReasonCode.CONSENT_MISSING]
    nothing = codes(verdict(Signals(), consent=ConsentView()))
    assert nothing == [ReasonCode.CONSENT_MISSING] + [ReasonCode.SIGNAL_MISSING] * len(NEEDED) + [
        ReasonCode.METERED_NETWORK
    ]


def test_a_consent_that_allows_no_power_or_is_over_is_none() -> None:
    powerless = msgspec.structs.replace(CONSENT, max_watts_w=0)
    assert codes(verdict(GOOD, consent=powerless)) == [ReasonCode.CONSENT_INVALID]
    over = msgspec.structs.replace(CONSENT, expires_ms=NOW_MS)
    assert codes(verdict(GOOD, consent=over)) == [ReasonCode.CONSENT_EXPIRED]


def test_all_reasons_are_told_not_only_the_first() -> None:
    leaving = with_(GOOD, doors_open=True, locked=False, cable_connected=False, seat_occupied=Occupancy.OCCUPIED)
    assert codes(verdict(leaving)) == [
        ReasonCode.DOOR_OPEN,
        ReasonCode.UNLOCKED,
        ReasonCode.OCCUPIED,
        ReasonCode.NOT_PLUGGED_IN,
    ]


def test_after_a_time_without_a_look_all_must_be_fine_for_a_while_again() -> None:
    history = History()
    for at_ms in (NOW_MS, NOW_MS + 500, NOW_MS + 1_000):
        result, history = decide(POLICY, CONSENT, AlwaysParked().read(at_ms), FREE, history, at_ms)
    assert isinstance(result, Permit)
    just_in_time_ms = NOW_MS + 1_000 + POLICY.blind_ms
    result, _ = decide(POLICY, CONSENT, AlwaysParked().read(just_in_time_ms), FREE, history, just_in_time_ms)
    assert isinstance(result, Permit)
    # the computer slept for an hour: who knows what happened to the vehicle meanwhile
    woken_ms = NOW_MS + 3_600_000
    result, history = decide(POLICY, CONSENT, AlwaysParked().read(woken_ms), FREE, history, woken_ms)
    assert codes(result) == [ReasonCode.DWELL]
    again_ms = woken_ms + POLICY.dwell_ms
    result, _ = decide(POLICY, CONSENT, AlwaysParked().read(again_ms), FREE, history, again_ms)
    assert isinstance(result, Permit)


_NUMBERS = [name for name in NEEDED if name in POSSIBLE]


@pytest.mark.parametrize("name", _NUMBERS)
def test_a_number_that_cannot_be_counts_as_missing(name: str) -> None:
    low, high = POSSIBLE[name]
    asks_for_all = ready_by(MINUTE_NOW + 10)
    for value in (float("nan"), float("inf"), float("-inf"), low - 0.1, high * 1.01):
        said = with_(GOOD, **{"soc_displayed_pct": 50.0, "charge_limit_pct": 80.0, name: value})
        missing = Reason(code=ReasonCode.SIGNAL_MISSING, detail=f"{name} says what cannot be")
        for policy in (POLICY, asks_for_all):
            result = verdict(said, policy=policy)
            assert not isinstance(result, Permit), value
            assert missing in result, value
            assert not any(reason.detail == name for reason in result), "it is told once"


def test_every_number_but_the_speed_has_bounds() -> None:
    numbers = {name for name in NEEDED if isinstance(getattr(GOOD, name).value, float)}
    assert numbers - set(POSSIBLE) == {"speed_kmh"}  # any speed but 0 is a "no", whatever it is
    for name, (low, high) in POSSIBLE.items():
        reading = getattr(GOOD, name)
        assert reading is None or low <= reading.value <= high, name


NOTHING_LEFT = [ReasonCode.READY_BY_AT_RISK, ReasonCode.CIRCUIT_LIMIT]


def test_a_charger_that_gives_nothing_does_not_promise_a_charge() -> None:
    short = with_(GOOD, soc_displayed_pct=50.0, charge_limit_pct=80.0, charger_power_w=0.0)
    assert codes(verdict(short, policy=ready_by(MINUTE_NOW - 240))) == NOTHING_LEFT


def test_the_higher_of_both_floors_counts() -> None:
    half = with_(GOOD, soc_displayed_pct=50.0)
    assert isinstance(verdict(half), Permit)
    assert codes(verdict(half, consent=msgspec.structs.replace(CONSENT, floor_pct=60.0))) == [ReasonCode.BELOW_FLOOR]
    assert codes(verdict(half, policy=Policy(floor_pct=60.0, dwell_ms=0))) == [ReasonCode.BELOW_FLOOR]


@pytest.mark.parametrize(
    ("soc_pct", "minutes_to_go", "at_risk"),
    [(70.0, 120, False), (70.0, 82, False), (70.0, 75, True), (79.9, 20, False), (79.9, 10, True), (80.0, 1, False)],
)
def test_computing_must_not_cost_the_owner_the_ready_by_target(
    soc_pct: float, minutes_to_go: int, at_risk: bool
) -> None:
    consent = msgspec.structs.replace(CONSENT, max_watts_w=1_000)
    result = verdict(charging(soc_pct), policy=ready_by(MINUTE_NOW + minutes_to_go), consent=consent)
    if at_risk:
        assert codes(result) == [ReasonCode.READY_BY_AT_RISK]
    else:
        assert isinstance(result, Permit)


def test_ready_by_is_local_time_and_the_signed_time_counts_too() -> None:
    soon = ready_by(MINUTE_NOW + 130, offset_min=120)
    assert codes(verdict(charging(70.0), policy=soon)) == [ReasonCode.READY_BY_AT_RISK]
    consent = msgspec.structs.replace(CONSENT, ready_by_minute=MINUTE_NOW + 10, target_pct=80.0)
    assert codes(verdict(charging(70.0), consent=consent)) == [ReasonCode.READY_BY_AT_RISK]


def test_a_missed_ready_by_time_still_gives_charging_the_first_place() -> None:
    assert codes(verdict(charging(70.0), policy=ready_by(MINUTE_NOW - 60))) == [ReasonCode.READY_BY_AT_RISK]
    assert isinstance(verdict(charging(70.0), policy=ready_by(MINUTE_NOW - 180)), Permit)


def test_the_charge_limit_bounds_the_target_and_a_weak_charger_leaves_nothing_to_us() -> None:
    limited = with_(charging(70.0), charge_limit_pct=70.0)
    assert isinstance(verdict(limited, policy=ready_by(MINUTE_NOW + 10)), Permit)
    weak = with_(charging(70.0), charger_power_w=150.0)
    policy = msgspec.structs.replace(ready_by(MINUTE_NOW + 1_000), watts_w=100)
    assert codes(verdict(weak, policy=policy)) == NOTHING_LEFT


def test_the_vehicles_own_estimate_counts_when_it_is_the_longer() -> None:
    slow = with_(charging(70.0), time_to_complete_s=36_000.0)
    assert isinstance(verdict(charging(70.0), policy=ready_by(MINUTE_NOW + 180)), Permit)
    assert codes(verdict(slow, policy=ready_by(MINUTE_NOW + 180))) == [ReasonCode.READY_BY_AT_RISK]


def test_a_cable_without_power_shows_in_the_sign_of_the_battery() -> None:
    draining = with_(GOOD, battery_power_w=-300.0)
    result, first = decide(POLICY, CONSENT, draining, FREE, FINE, NOW_MS)
    assert first.draining_since_ms == NOW_MS
    assert isinstance(result, Permit)
    later_ms = NOW_MS + POLICY.battery_drain_grace_ms
    later = AlwaysParked().read(later_ms)
    later = msgspec.structs.replace(later, battery_power_w=Reading(-300.0, later_ms))
    result, _ = decide(POLICY, CONSENT, later, FREE, first, later_ms)
    assert codes(result) == [ReasonCode.NO_GRID_POWER]


def test_a_dead_cable_is_tried_ever_more_seldom() -> None:
    assert Standing(given_w=7_000.0).stand(3_600_000) > 3_590_000
    dead = Standing(given_w=0.0)
    hours_ms = [dead.stand(3_600_000) for _ in range(24)]
    assert hours_ms[0] <= 3 * (POLICY.battery_drain_grace_ms + 250)  # at 0, 10 and 30 minutes
    assert sum(hours_ms) <= 10 * (POLICY.battery_drain_grace_ms + 250)
    assert sum(hours_ms[-8:]) >= POLICY.battery_drain_grace_ms  # four hours are the longest wait


@pytest.mark.parametrize(
    ("change", "speaks_for_the_cable"),
    [
        ({"cable_connected": False}, True),
        ({"grid_power_available": False}, True),
        ({"battery_power_w": 2_000.0}, True),
        ({"battery_power_w": 20.0}, False),  # a sensor's noise
        ({"doors_open": True}, False),
    ],
)
def test_what_ends_the_wait_for_a_dead_cable(change: dict[str, Any], speaks_for_the_cable: bool) -> None:
    vehicle = Standing(given_w=0.0)
    vehicle.stand(20_000)
    assert codes(vehicle.result) == [ReasonCode.NO_GRID_POWER]
    vehicle.changes = change
    vehicle.stand(1_000)
    vehicle.changes = {}
    vehicle.given_w = 7_000.0
    permitted_ms = vehicle.stand(60_000)
    assert (permitted_ms > 50_000) == speaks_for_the_cable
    assert vehicle.history.unfed_times == (0 if speaks_for_the_cable else 1)


def test_neither_an_old_reading_nor_a_missing_one_ends_the_wait_for_a_dead_cable() -> None:
    vehicle = Standing(given_w=0.0)
    vehicle.stand(20_000)
    waiting = vehicle.history
    assert waiting.unfed_until_ms is not None
    signals = AlwaysParked().read(vehicle.now_ms)
    charging_long_ago = Reading(2_000.0, vehicle.now_ms - MAX_AGE_MS["battery_power_w"] - 1)
    for readings in ({"battery_power_w": charging_long_ago}, {"cable_connected": None, "grid_power_available": None}):
        changed = msgspec.structs.replace(signals, **readings)
        _, history = decide(POLICY, CONSENT, changed, FREE, waiting, vehicle.now_ms)
        assert history.unfed_until_ms == waiting.unfed_until_ms


def test_a_battery_that_fed_the_drive_home_says_nothing_of_the_cable() -> None:
    vehicle = Standing(given_w=7_000.0)
    vehicle.changes = {"cable_connected": False, "speed_kmh": 50.0, "battery_power_w": -9_000.0}
    vehicle.stand(600_000)
    vehicle.changes = {"battery_power_w": -300.0}  # for a moment after it was plugged in
    vehicle.stand(2_000)
    vehicle.changes = {}
    assert vehicle.stand(60_000) > 50_000


def test_a_drain_before_a_sleep_is_no_drain_through_it() -> None:
    draining = with_(GOOD, battery_power_w=-300.0)
    _, history = decide(POLICY, CONSENT, draining, FREE, FINE, NOW_MS)
    woken_ms = NOW_MS + 3_600_000
    signals = msgspec.structs.replace(AlwaysParked().read(woken_ms), battery_power_w=Reading(-300.0, woken_ms))
    result, history = decide(POLICY, CONSENT, signals, FREE, history, woken_ms)
    assert codes(result) == [ReasonCode.DWELL]
    assert history.unfed_until_ms is None


def test_after_a_fault_everything_must_be_fine_for_the_dwell() -> None:
    _, history = decide(POLICY, CONSENT, with_(GOOD, doors_open=True), FREE, FINE, NOW_MS)
    assert history.fine_since_ms is None
    for passed_ms, permitted in ((0, False), (500, False), (999, False), (1_000, True), (5_000, True)):
        at_ms = NOW_MS + passed_ms
        signals = AlwaysParked().read(at_ms)
        result, history = decide(POLICY, CONSENT, signals, FREE, history, at_ms)
        assert isinstance(result, Permit) == permitted
        if not permitted:
            assert codes(result) == [ReasonCode.DWELL]


_BAD: dict[str, st.SearchStrategy[Any]] = {
    "gear_is_park": st.just(False),
    "speed_kmh": st.floats(0.5, 300) | st.floats(-50, -0.5) | st.just(float("nan")),
    "ignition": st.sampled_from([LowVoltage.ON, LowVoltage.START, LowVoltage.UNDEFINED]),
    "doors_open": st.just(True),
    "locked": st.just(False),
    "seat_occupied": st.sampled_from([Occupancy.OCCUPIED, Occupancy.UNKNOWN]),
    "cable_connected": st.just(False),
    "cable_locked": st.just(False),
    "grid_power_available": st.just(False),
    "soc_displayed_pct": st.floats(0, 29.9),
}
_signals = st.fixed_dictionaries(
    {},
    optional={name: st.tuples(bad, st.integers(-10_000, 700_000)) | st.none() for name, bad in _BAD.items()},
)


@given(changes=_signals, fine_for_ms=st.integers(0, 10_000_000))
def test_any_bad_missing_or_stale_signal_means_no(changes: dict[str, Any], fine_for_ms: int) -> None:
    readings = {
        name: None if change is None else Reading(change[0], NOW_MS - change[1]) for name, change in changes.items()
    }
    signals = msgspec.structs.replace(GOOD, **readings)
    result = verdict(signals, history=History(fine_since_ms=NOW_MS - fine_for_ms))
    if changes:
        assert not isinstance(result, Permit)
        assert result
    else:
        assert isinstance(result, Permit) == (fine_for_ms >= POLICY.dwell_ms)


@given(name=st.sampled_from(NEEDED), age_ms=st.integers(-1_000, 2_000_000))
def test_a_signal_counts_until_its_greatest_age_and_not_longer(name: str, age_ms: int) -> None:
    signals = msgspec.structs.replace(GOOD, **{name: Reading(getattr(GOOD, name).value, NOW_MS - age_ms)})
    assert isinstance(verdict(signals), Permit) == (age_ms <= MAX_AGE_MS[name])


@given(
    soc=st.floats(30, 90),
    target=st.floats(30, 100),
    minutes=st.integers(0, 1439),
    watts=st.integers(1, 3_000),
    charger=st.floats(0, 22_000),
)
def test_a_permit_is_only_given_when_the_target_is_reached_with_us(
    soc: float, target: float, minutes: int, watts: int, charger: float
) -> None:
    """The physics beside the rule: charging at what we leave over, from now to the ready-by time."""
    policy = Policy(watts_w=watts, dwell_ms=0, ready_by_minute=(MINUTE_NOW + minutes) % 1440, target_pct=target)
    consent = msgspec.structs.replace(CONSENT, max_watts_w=watts)
    signals = with_(GOOD, soc_displayed_pct=soc, charge_limit_pct=90.0, charger_power_w=charger)
    if isinstance(verdict(signals, policy=policy, consent=consent), Permit):
        hours = (minutes * 60 - 20) / 3600
        reached = soc + max(0.0, (charger - watts) * hours / 60_000 * 100)
        assert min(90.0, reached) >= min(target, 90.0) - 1e-6 or soc >= min(target, 90.0)
