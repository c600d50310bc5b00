"""The table of VSS paths and what a set of them says together: traps of the specification, ages, and no surprises."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.test_docs import ROOT, tool

from motorpool.agent.signals import speak, vss
from motorpool.agent.signals.assemble import Assembler
from motorpool.agent.signals.car import Action, CarSpec, SimulatedCar
from motorpool.agent.signals.kuksa import HEARTBEATS, SLOW_EVERY, KuksaConfig
from motorpool.agent.signals.regions import Region, box, region_of
from motorpool.agent.signals.source import AlwaysParked
from motorpool.agent.signals.vss import CHARGING, COMPUTE, GEARBOX, SEAT, T
from motorpool.core.signals import (
    NEEDED,
    TABLE,
    DriverMode,
    LowVoltage,
    NetworkClass,
    Occupancy,
    Reading,
    Signals,
    possible,
)

NOW_MS = 10_000
FRONT = "Vehicle.Cabin.Door.Row1.DriverSide"
OTHER = "Vehicle.Cabin.Door.Row1.PassengerSide"
REAR = "Vehicle.Cabin.Door.Row2.DriverSide"
PORT = f"{CHARGING}.ChargingPort"
OSLO = (box("NO", 59.0, 9.0, 61.0, 12.0),)


def said(*facts: tuple[str, object] | tuple[str, object, int], regions: tuple[Region, ...] = ()) -> Signals:
    assembler = Assembler(regions)
    for path, value, *at_ms in facts:
        assembler.feed(path, value, at_ms[0] if at_ms else NOW_MS)
    return assembler.signals(NOW_MS)


def value(signals: Signals, name: str) -> Any:
    reading = getattr(signals, name)
    return None if reading is None else reading.value


def test_every_signal_is_fed_by_some_path_and_every_path_feeds_a_signal() -> None:
    fed = {name for entry in vss.PATHS for name in entry.signals}
    assert fed == set(TABLE)
    assert set(TABLE) >= vss.URGENT


def test_the_page_of_signals_is_the_tables() -> None:
    page = (ROOT / "docs" / "reference" / "signals.md").read_text("utf-8")
    assert page == tool("signals_reference").render(), "run tools/signals_reference.py"
    said_ms = (KuksaConfig().poll_ms, KuksaConfig().poll_ms * SLOW_EVERY, KuksaConfig().heartbeat_grace_ms)
    assert said_ms == (800, 2_400, 1_000)
    assert HEARTBEATS == {"Vehicle": (vss.HEARTBEAT, vss.LOW_VOLTAGE)}


def test_the_cars_of_tests_and_benchmarks_tell_all_that_the_guard_needs() -> None:
    for source in (AlwaysParked(), SimulatedCar(CarSpec(), NOW_MS)):
        signals = source.read(NOW_MS)
        assert not [name for name in NEEDED if getattr(signals, name) is None]
        assert possible(signals) == (signals, frozenset())


@pytest.mark.parametrize("version", [5, 6])
def test_what_a_car_says_in_vss_is_understood_again(version: int) -> None:
    car = SimulatedCar(CarSpec(soc_pct=60.0), NOW_MS, drawn_w=lambda: 120.0)
    car.advance(NOW_MS + 60_000)
    car.plan_departure(NOW_MS + 7_200_000)
    for action in (None, Action.GUEST_MODE, Action.FAULT, Action.NETWORK_METERED, Action.OPEN_DOOR, Action.UNPLUG):
        if action is not None:
            car.do(action, NOW_MS + 60_000)
        meant = car.read(NOW_MS + 60_000)
        assembler = Assembler()
        for path, told in speak.values(meant, version).items():
            assembler.feed(path, told, NOW_MS)
        heard = assembler.signals(NOW_MS)
        for name in TABLE:
            expected = value(meant, name)
            if name == "computer_power_w" and version == 5:
                expected = None  # VSS 5 has no path for it
            if name == "charger_power_w" and not meant.grid_power_available.value:  # type: ignore[union-attr]
                expected = 0.0  # nothing comes through a dead cable
            if isinstance(expected, float):
                assert value(heard, name) == pytest.approx(expected), name
            else:
                assert value(heard, name) == expected, name


def test_gear_126_alone_is_park_and_an_open_park_lock_is_not() -> None:
    lever = f"{GEARBOX}.SelectedGear"
    assert value(said((lever, 126)), "gear_is_park") is True
    for gear in (0, 127, 1, -1, 125):
        assert value(said((lever, gear)), "gear_is_park") is False
    assert value(said((lever, 126), (f"{GEARBOX}.IsParkLockEngaged", False)), "gear_is_park") is False
    assert value(said((f"{GEARBOX}.CurrentGear", 126)), "gear_is_park") is True
    assert value(said((lever, "P"), (f"{GEARBOX}.CurrentGear", 126)), "gear_is_park") is None


def test_a_moving_car_is_moving_whatever_its_speedometer_says() -> None:
    assert value(said(("Vehicle.Speed", 0.0)), "speed_kmh") == 0
    assert value(said(("Vehicle.Speed", 0.0), ("Vehicle.IsMoving", True)), "speed_kmh") == 1
    assert value(said(("Vehicle.IsMoving", False)), "speed_kmh") is None


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ([(f"{SEAT}.OccupancyStatus", "EMPTY")], Occupancy.EMPTY),
        ([(f"{SEAT}.OccupancyStatus", "OCCUPIED")], Occupancy.OCCUPIED),
        ([(f"{SEAT}.OccupancyStatus", "UNKNOWN")], Occupancy.UNKNOWN),
        ([(f"{SEAT}.OccupancyStatus", "SOMETHING")], None),
        ([(f"{SEAT}.IsOccupied", False)], Occupancy.EMPTY),
        ([(f"{SEAT}.IsOccupied", True)], Occupancy.OCCUPIED),
        ([(f"{SEAT}.OccupancyStatus", "UNKNOWN"), (f"{SEAT}.IsOccupied", False)], Occupancy.UNKNOWN),
        ([(f"{SEAT}.OccupancyStatus", "nonsense"), (f"{SEAT}.IsOccupied", False)], Occupancy.UNKNOWN),
        ([(f"{SEAT}.OccupancyStatus", "EMPTY"), (f"{SEAT}.IsBelted", True)], Occupancy.OCCUPIED),
    ],
)
def test_both_spellings_of_a_seat(facts: list[tuple[str, object]], expected: Occupancy | None) -> None:
    assert value(said(*facts), "seat_occupied") == expected


def test_one_open_door_is_enough_and_one_silent_door_is_no_shut_door() -> None:
    shut = [(f"{door}.IsOpen", False) for door in (FRONT, OTHER, REAR)]
    assert value(said(*shut), "doors_open") is False
    assert value(said(*shut, (f"{REAR}.IsOpen", True)), "doors_open") is True
    assert value(said(*shut, (f"{REAR}.IsOpen", None)), "doors_open") is None
    assert value(said(*shut, (f"{REAR}.IsOpen", None), (f"{FRONT}.IsOpen", True)), "doors_open") is True
    assert value(said((f"{FRONT}.IsOpen", False), (f"{REAR}.IsOpen", None)), "doors_open") is False  # never fitted
    assert value(said((f"{REAR}.IsOpen", False)), "doors_open") is None  # where is the driver's door?
    assert value(said(*shut, ("Vehicle.Body.Trunk.Rear.IsOpen", True)), "doors_open") is True
    locked = [(f"{door}.IsLocked", True) for door in (FRONT, OTHER, REAR)]
    assert value(said(*locked), "locked") is True
    assert value(said(*locked, (f"{OTHER}.IsLocked", False)), "locked") is False


def test_a_reading_is_as_old_as_its_oldest_needed_part_and_an_alarm_as_young_as_its_youngest() -> None:
    parts = [(f"{FRONT}.IsOpen", False, 9_000), (f"{REAR}.IsOpen", False, 3_000)]
    assert said(*parts).doors_open == Reading(False, 3_000)
    assert said(*parts, (f"{FRONT}.IsOpen", True, 9_500)).doors_open == Reading(True, 9_500)
    power = [(f"{T}.CurrentVoltage", 400.0, 5_000), (f"{T}.CurrentCurrent", -2.0, 7_000)]
    assert said(*power).battery_power_w == Reading(-800.0, 5_000)
    assembler = Assembler()
    assembler.feed(f"{FRONT}.IsOpen", False, 1_000)
    assembler.confirm([f"{FRONT}.IsOpen", "Vehicle.Unheard"], 4_000)
    assembler.confirm([f"{FRONT}.IsOpen"], 2_000)
    assert assembler.signals(NOW_MS).doors_open == Reading(False, 4_000)
    assembler.forget()
    assert assembler.signals(NOW_MS) == Signals()


@pytest.mark.parametrize("port", ["AnyPosition", "FrontLeft", "RearRight", "FrontMiddle"])
def test_the_cable_may_be_in_any_port_and_the_lock_of_that_port_counts(port: str) -> None:
    cable, lock = f"{PORT}.{port}.IsChargingCableConnected", f"{PORT}.{port}.IsChargingCableLocked"
    other = f"{PORT}.RearLeft"
    none = [(f"{other}.IsChargingCableConnected", False), (f"{other}.IsChargingCableLocked", False)]
    signals = said(*none, (cable, True), (lock, True))
    assert (value(signals, "cable_connected"), value(signals, "cable_locked")) == (True, True)
    signals = said(*none, (cable, True), (lock, False))
    assert (value(signals, "cable_connected"), value(signals, "cable_locked")) == (True, False)
    signals = said(*none, (cable, True))
    assert value(signals, "cable_locked") is None
    assert value(said(*none, (cable, False)), "cable_connected") is False


def test_a_full_battery_on_a_live_cable_has_power_though_it_does_not_charge() -> None:
    full = (f"{CHARGING}.IsCharging", False)
    assert value(said(full), "grid_power_available") is None
    assert value(said((f"{CHARGING}.IsCharging", True)), "grid_power_available") is True
    assert value(said(full, (f"{CHARGING}.ChargeVoltage.Phase1", 231.0)), "grid_power_available") is True
    dead = [(f"{CHARGING}.ChargeVoltage.{line}", 2.0) for line in vss.LINES]
    assert value(said(full, *dead), "grid_power_available") is False
    assert value(said((f"{CHARGING}.IsCharging", True), *dead), "grid_power_available") is False
    word = (f"{COMPUTE}.GridPowerAvailable", False)
    assert value(said((f"{CHARGING}.ChargeVoltage.Phase1", 231.0), word), "grid_power_available") is False


def test_units() -> None:
    energy = [(f"{T}.StateOfCharge.CurrentEnergy", 31.25), (f"{T}.StateOfCharge.Current", 50.0)]
    assert value(said(*energy, (f"{T}.NetCapacity", 62)), "capacity_wh") == 62_500
    assert value(said(energy[0], (f"{T}.StateOfCharge.Current", 5.0), (f"{T}.NetCapacity", 62)), "capacity_wh") == 62e3
    assert value(said((f"{T}.CurrentPower", -350.5)), "battery_power_w") == -350.5
    assert value(said((f"{CHARGING}.MaxPower", 7.4)), "charger_power_w") == 7_400
    volt, amp = f"{CHARGING}.ChargeVoltage.Phase1", f"{CHARGING}.MaximumChargingCurrent.Phase1"
    assert value(said((volt, 230.0), (amp, 16), (f"{CHARGING}.MaxPower", 7.4)), "charger_power_w") == 230 * 16 * 0.88
    direct = [(f"{CHARGING}.ChargeVoltage.DC", 400.0), (f"{CHARGING}.MaximumChargingCurrent.DC", 100.0)]
    assert value(said(*direct), "charger_power_w") == 40_000
    assert value(said(*direct, (f"{COMPUTE}.ChargerPower", 5e3)), "charger_power_w") == 5_000
    assert value(said((volt, 230.0), (f"{CHARGING}.ChargeCurrent.Phase1", 10)), "ac_power_w") == 2_300
    assert value(said((f"{CHARGING}.TimeToComplete", 3600)), "time_to_complete_s") == 3600
    assert value(said((f"{T}.StateOfCharge.Current", 50.0)), "soc_displayed_pct") is None  # not what the owner sees


def test_the_hottest_control_unit_of_vss_6_counts_whatever_its_name() -> None:
    one, two = (f"Vehicle.ControlUnit.{name}.Health.Resources" for name in ("Central", "ZonalLeft"))
    assert value(said((f"{one}.Temperature", 40.0), (f"{two}.Temperature", 61.0)), "computer_temp_c") == 61
    assert value(said((f"{one}.Temperature", 40.0), (f"{two}.Temperature", "hot")), "computer_temp_c") is None
    assert value(said((f"{one}.Power", 40.0), (f"{two}.Power", 15.0)), "computer_power_w") == 55
    assert value(said((f"{COMPUTE}.Temperature", 50.0)), "computer_temp_c") == 50
    assert vss.entry_of("Vehicle.ControlUnit.A.B.Health.Resources.Power") is None
    assert vss.entry_of("Vehicle.ControlUnit.*.Health.Resources.Power") is None


def test_faults_are_counted_and_a_list_that_cannot_be_read_is_not_an_empty_one() -> None:
    path = f"{T}.ErrorCodes"
    assert value(said((path, ())), "fault_count") == 0
    assert value(said((path, ["P0A7F", "U0100"])), "fault_count") == 2
    assert value(said((path, [1])), "fault_count") is None
    assert value(said((path, "P0A7F")), "fault_count") is None


def test_enums_and_the_overlay() -> None:
    assert value(said(("Vehicle.LowVoltageSystemState", "LOCK")), "ignition") is LowVoltage.LOCK
    assert value(said(("Vehicle.LowVoltageSystemState", "start")), "ignition") is LowVoltage.START
    assert value(said(("Vehicle.LowVoltageSystemState", "PARKED")), "ignition") is None
    assert value(said((f"{COMPUTE}.DriverMode", "VALET")), "driver_mode") is DriverMode.VALET
    assert value(said((f"{COMPUTE}.UpdateInProgress", True)), "update_in_progress") is True
    network = f"{COMPUTE}.NetworkClass"
    assert value(said((network, "ROAMING")), "network") is NetworkClass.ROAMING
    offline = ("Vehicle.Connectivity.IsConnectivityAvailable", False)
    assert value(said((network, "UNMETERED"), offline), "network") is NetworkClass.NONE
    active, ongoing = (f"{T}.BatteryConditioning.{name}" for name in ("IsActive", "IsOngoing"))
    assert value(said((active, False), (ongoing, True)), "preconditioning") is True
    assert value(said((active, False), ("Vehicle.Cabin.HVAC.IsAirConditioningActive", True)), "preconditioning") is True
    assert value(said((active, False)), "preconditioning") is False


def test_a_departure_is_the_earliest_time_ahead_that_somebody_really_set() -> None:
    timer = [(f"{CHARGING}.Timer.Time", "1970-01-01T02:00:00Z"), (f"{CHARGING}.Timer.Mode", "END_TIME")]
    target = (f"{T}.BatteryConditioning.TargetTime", "1970-01-01T01:00:00Z")
    mode = f"{T}.BatteryConditioning.RequestedMode"
    assert value(said(*timer), "departure_ms") == 7_200_000
    assert value(said(timer[0], (f"{CHARGING}.Timer.Mode", "START_TIME")), "departure_ms") is None
    assert value(said(*timer, target, (mode, "DRIVING_PREPARATION")), "departure_ms") == 3_600_000
    assert value(said(*timer, target, (mode, "INACTIVE")), "departure_ms") == 7_200_000
    for nothing in ("0000-01-01T00:00Z", "tomorrow", "", "1970-01-01T00:00:01Z", "9" * 300):
        assert value(said((f"{COMPUTE}.ReadyBy", nothing)), "departure_ms") is None
    at_home = Assembler(zone="Europe/Oslo")
    at_home.feed(f"{COMPUTE}.ReadyBy", "1970-01-01T03:00:00", NOW_MS)
    assert value(at_home.signals(NOW_MS), "departure_ms") == 2 * 3_600_000


def test_a_place_becomes_a_region_where_that_is_sure_and_is_seen_nowhere() -> None:
    place = [(vss.LATITUDE, 59.9139), (vss.LONGITUDE, 10.7522)]
    assert value(said(*place, regions=OSLO), "region") == "NO"
    assert value(said(*place), "region") is None
    assert value(said((vss.LATITUDE, 55.0), place[1], regions=OSLO), "region") is None
    assert value(said(*place, (vss.ACCURACY, 19_000.0), regions=OSLO), "region") == "NO"
    assert value(said(*place, (vss.ACCURACY, 90_000.0), regions=OSLO), "region") is None
    assert value(said((vss.LATITUDE, 60.9999), place[1], regions=OSLO), "region") is None  # too near the border
    assert value(said(*place, (f"{COMPUTE}.Region", "EU"), regions=OSLO), "region") == "EU"
    assembler = Assembler(OSLO)
    for path, number in place:
        assembler.feed(path, number, NOW_MS)
    shown = f"{assembler!r} {assembler.signals(NOW_MS)!r}"
    assert "59.9" not in shown
    assert "10.7" not in shown


def test_regions_that_overlap_or_have_a_notch_say_nothing_doubtful() -> None:
    notch = Region(code="L", outline=((0.0, 0.0), (0.0, 4.0), (2.0, 4.0), (2.0, 2.0), (4.0, 2.0), (4.0, 0.0)))
    assert region_of(1.0, 3.0, (notch,)) == "L"
    assert region_of(3.0, 1.0, (notch,)) == "L"
    assert region_of(3.0, 3.0, (notch,)) is None
    assert region_of(1.0, 1.0, (notch, box("B", 0.5, 0.5, 3.0, 3.0))) is None
    assert region_of(math.nan, 1.0, (notch,)) is None
    assert region_of(91.0, 1.0, (notch,)) is None


def test_a_location_is_not_even_asked_for_without_regions() -> None:
    known = [entry.path.replace("*", "Central") for entry in vss.PATHS] + ["Vehicle.VehicleIdentification.VIN"]
    places = {vss.LATITUDE, vss.LONGITUDE, vss.ACCURACY}
    assert places.isdisjoint(vss.wanted(known, place=False))
    assert places.isdisjoint(vss.candidates(place=False))
    assert places <= set(vss.wanted(known, place=True))
    assert "Vehicle.VehicleIdentification.VIN" not in vss.wanted(known, place=True)


def test_feed_tells_which_signals_have_changed() -> None:
    assembler = Assembler()
    assert assembler.feed(f"{FRONT}.IsOpen", False, 1) == {"doors_open"}
    assert not assembler.feed(f"{FRONT}.IsOpen", False, 2)
    assert not assembler.feed(f"{REAR}.IsOpen", False, 2)
    assert assembler.feed(f"{REAR}.IsOpen", True, 3) == {"doors_open"}
    assert not assembler.feed("Vehicle.Unknown", True, 3)
    volts = f"{CHARGING}.ChargeVoltage.Phase1"
    assert assembler.feed(volts, 230.0, 4) == {"grid_power_available"}
    assert not assembler.feed(volts, 231.0, 5)  # another number, the same meaning


PATH = st.sampled_from([entry.path.replace("*", "Central") for entry in vss.PATHS])
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=300),
    st.lists(st.text(max_size=5), max_size=3),
    st.binary(max_size=4),
    st.sampled_from([126, 1e308, -1e308, 1 << 2_000, "OWNER", "EMPTY", "END_TIME", "9999-12-31T23:59:59-23:59"]),
)


@given(st.lists(st.tuples(PATH, ANYTHING, st.integers(-(1 << 62), 1 << 62)), max_size=60))
def test_nothing_that_a_broker_says_raises_or_becomes_a_wrong_type(
    facts: list[tuple[str, object, int]],
) -> None:
    types = {name: type(value(AlwaysParked().read(0), name)) for name in TABLE}
    assembler = Assembler(OSLO)
    for path, what, at_ms in facts:
        assembler.feed(path, what, at_ms)
        signals = assembler.signals(NOW_MS)
    for name in TABLE:
        got = value(signals, name) if facts else None
        if got is not None and types[name] is not type(None):
            assert isinstance(got, types[name]), name
            assert not (isinstance(got, float) and math.isnan(got)), name


@given(st.lists(st.tuples(PATH, ANYTHING, st.integers(0, 1_000)), min_size=1, max_size=40))
def test_no_reading_is_younger_than_anything_that_was_fed(facts: list[tuple[str, object, int]]) -> None:
    assembler = Assembler(OSLO)
    for path, what, at_ms in facts:
        assembler.feed(path, what, at_ms)
    signals = assembler.signals(NOW_MS)
    times = {at_ms for _, _, at_ms in facts}
    assert all(reading.at_ms in times for name in TABLE if (reading := getattr(signals, name)) is not None)
