"""Which paths of COVESA's Vehicle Signal Specification feed which signal, in the spellings of VSS 4, 5 and 6.

Decides: for each path its type, its unit and the signals that it is a part of; which values are of that type at all.
Must not: talk to a broker, combine several paths into a signal (``assemble`` does), or fail on any value of a broker.
Called by: ``agent.signals.assemble``, ``agent.signals.kuksa``, the stand-in broker, and the reference in the docs.

Units are those of the specification. Traps that the table takes care of: ``CurrentPower`` is watts while ``MaxPower``
is kilowatts; ``NetCapacity`` is whole kilowatt-hours; gear 126 is park; ``IsOccupied`` of VSS 5 became
``OccupancyStatus``; ``IsCharging`` is false when the car is plugged in and full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import msgspec

MAX_TEXT: Final = 256  # a longer text says nothing
MAX_TEXTS: Final = 4096  # error codes in one list


class Kind(StrEnum):
    """The type that a path has in the specification, as far as it matters here."""

    BOOL = "boolean"
    NUMBER = "number"
    TEXT = "string"
    TEXTS = "string[]"


class VssPath(msgspec.Struct, frozen=True, kw_only=True):
    """One path. ``spelling`` names the versions that know it; "overlay" is our own branch, ``Vehicle.Compute``.

    A ``*`` stands for any one name (the control units of a car are named by its maker). ``place`` marks a location.
    """

    path: str
    kind: Kind
    unit: str
    signals: tuple[str, ...]
    note: str
    spelling: str = "4, 5, 6"
    place: bool = False


Value = bool | float | int | str | tuple[str, ...]

T: Final = "Vehicle.Powertrain.TractionBattery"
CHARGING: Final = f"{T}.Charging"
DOOR: Final = "Vehicle.Cabin.Door"
SEAT: Final = "Vehicle.Cabin.Seat.Row1.DriverSide"
GEARBOX: Final = "Vehicle.Powertrain.Transmission"
COMPUTE: Final = "Vehicle.Compute"
UNITS: Final = "Vehicle.ControlUnit.*.Health.Resources"
PORT_NAMES: Final = ("AnyPosition", "FrontLeft", "FrontMiddle", "FrontRight", "RearLeft", "RearMiddle", "RearRight")
# The branch of each charging port; VSS before 4 had one port without a name.
PORTS: Final = (*(f"{CHARGING}.ChargingPort.{name}" for name in PORT_NAMES), CHARGING)
ROWS: Final = ("Row1", "Row2")
SIDES: Final = ("DriverSide", "PassengerSide", "Left", "Right")
DOORS: Final = tuple(f"{DOOR}.{row}.{side}" for row in ROWS for side in SIDES)
FRONT_DOORS: Final = DOORS[: len(SIDES)]
LIDS: Final = ("Vehicle.Body.Trunk.Front", "Vehicle.Body.Trunk.Rear")
PHASES: Final = ("Phase1", "Phase2", "Phase3")
LINES: Final = (*PHASES, "DC")
LATITUDE: Final = "Vehicle.CurrentLocation.Latitude"
LONGITUDE: Final = "Vehicle.CurrentLocation.Longitude"
ACCURACY: Final = "Vehicle.CurrentLocation.HorizontalAccuracy"
HEARTBEAT: Final = f"{COMPUTE}.Heartbeat"
LOW_VOLTAGE: Final = "Vehicle.LowVoltageBattery.CurrentVoltage"
PARK: Final = 126  # of SelectedGear


def _yes(path: str, signal: str, note: str, spelling: str = "4, 5, 6") -> VssPath:
    return VssPath(path=path, kind=Kind.BOOL, unit="", signals=(signal,), note=note, spelling=spelling)


def _number(path: str, unit: str, signals: str, note: str, spelling: str = "4, 5, 6") -> VssPath:
    names = tuple(signals.split())
    return VssPath(path=path, kind=Kind.NUMBER, unit=unit, signals=names, note=note, spelling=spelling)


def _text(path: str, signal: str, note: str, spelling: str = "4, 5, 6") -> VssPath:
    return VssPath(path=path, kind=Kind.TEXT, unit="", signals=(signal,), note=note, spelling=spelling)


def _owner() -> list[VssPath]:
    paths = [
        _number(f"{GEARBOX}.SelectedGear", "", "gear_is_park", "126 is park"),
        _number(f"{GEARBOX}.CurrentGear", "", "gear_is_park", "126 is park; asked where SelectedGear is absent"),
        _yes(f"{GEARBOX}.IsParkLockEngaged", "gear_is_park", "false means not in park, whatever the lever says"),
        _number("Vehicle.Speed", "km/h", "speed_kmh", "any number but 0 is driving"),
        _yes("Vehicle.IsMoving", "speed_kmh", "true counts as 1 km/h at least"),
        _text("Vehicle.LowVoltageSystemState", "ignition", "UNDEFINED, LOCK, OFF, ACC, ON or START"),
    ]
    for door in DOORS:
        spelling = "older" if door.endswith(("Left", "Right")) else "4, 5, 6"
        paths += [
            _yes(f"{door}.IsOpen", "doors_open", "any open door", spelling),
            _yes(f"{door}.IsLocked", "locked", "all doors", spelling),
        ]
    paths += [_yes(f"{lid}.IsOpen", "doors_open", "a lid counts as a door") for lid in LIDS]
    paths += [
        _text(f"{SEAT}.OccupancyStatus", "seat_occupied", "UNKNOWN counts as occupied", "6"),
        _yes(f"{SEAT}.IsOccupied", "seat_occupied", "true is occupied, false is empty", "4, 5"),
        _yes(f"{SEAT}.IsBelted", "seat_occupied", "a closed belt counts as occupied"),
        _yes(f"{T}.BatteryConditioning.IsActive", "preconditioning", "any of these", "5, 6"),
        _yes(f"{T}.BatteryConditioning.IsOngoing", "preconditioning", "any of these", "5, 6"),
        _yes("Vehicle.Cabin.HVAC.IsAirConditioningActive", "preconditioning", "any of these"),
        _yes("Vehicle.Cabin.HVAC.IsFrontDefrosterActive", "preconditioning", "any of these"),
        _yes(f"{COMPUTE}.IsPreconditioning", "preconditioning", "any of these", "overlay"),
        _text(f"{COMPUTE}.DriverMode", "driver_mode", "OWNER, GUEST, VALET or SERVICE", "overlay"),
        _yes(f"{COMPUTE}.UpdateInProgress", "update_in_progress", "the car installs software", "overlay"),
    ]
    return paths


def _charging() -> list[VssPath]:
    paths = []
    for port in PORTS:
        spelling = "older" if port == CHARGING else "4, 5, 6"
        paths += [
            _yes(f"{port}.IsChargingCableConnected", "cable_connected", "any port", spelling),
            _yes(f"{port}.IsChargingCableLocked", "cable_locked", "every port with a cable", spelling),
        ]
    for line in LINES:
        ac = "" if line == "DC" else " ac_power_w"
        paths += [
            _number(
                f"{CHARGING}.ChargeVoltage.{line}",
                "V",
                f"grid_power_available charger_power_w{ac}",
                "50 V or more on any line is power on the cable",
            ),
            _number(
                f"{CHARGING}.MaximumChargingCurrent.{line}", "A", "charger_power_w", "times the voltage; AC x 0.88"
            ),
        ]
        if ac:
            paths.append(_number(f"{CHARGING}.ChargeCurrent.{line}", "A", "ac_power_w", "times the voltage"))
    return [
        *paths,
        _yes(f"{CHARGING}.IsCharging", "grid_power_available", "true proves power; false says nothing (full)"),
        _yes(f"{COMPUTE}.GridPowerAvailable", "grid_power_available", "the maker's own word, comes first", "overlay"),
        _yes(f"{CHARGING}.IsDischarging", "feeding_grid", "the battery feeds the house or the grid"),
        _number(f"{T}.CurrentPower", "W", "battery_power_w", "positive into the battery"),
        _number(f"{T}.CurrentVoltage", "V", "battery_power_w", "with CurrentCurrent, where CurrentPower is absent"),
        _number(f"{T}.CurrentCurrent", "A", "battery_power_w", "positive into the battery"),
        _number(f"{T}.StateOfCharge.Displayed", "%", "soc_displayed_pct", "Current is never taken for Displayed"),
        _number(f"{T}.StateOfCharge.Current", "%", "capacity_wh", "with CurrentEnergy, from 20 % on"),
        _number(f"{T}.StateOfCharge.CurrentEnergy", "kWh", "capacity_wh", "energy by charge is the capacity"),
        _number(f"{T}.NetCapacity", "kWh", "capacity_wh", "whole kWh: second choice"),
        _number(f"{CHARGING}.ChargeLimit", "%", "charge_limit_pct", ""),
        _number(f"{COMPUTE}.ChargerPower", "W", "charger_power_w", "into the battery; comes first", "overlay"),
        _number(f"{CHARGING}.MaxPower", "kW", "charger_power_w", "last choice: greatest of this charge"),
        _number(f"{CHARGING}.TimeToComplete", "s", "time_to_complete_s", ""),
    ]


def _health() -> list[VssPath]:
    return [
        _number(f"{T}.Temperature.Max", "Celsius", "pack_temp_c", "Average is never taken for Max"),
        _number(f"{UNITS}.Temperature", "Celsius", "computer_temp_c", "hottest control unit", "6"),
        _number(f"{COMPUTE}.Temperature", "Celsius", "computer_temp_c", "for cars before VSS 6", "overlay"),
        _number(f"{T}.DCDC.Temperature", "Celsius", "dcdc_temp_c", ""),
        _number(LOW_VOLTAGE, "V", "low_voltage_v", "also the default sign of life of the car's feeder"),
        VssPath(
            path=f"{T}.ErrorCodes", kind=Kind.TEXTS, unit="", signals=("fault_count",), note="how many", spelling="5, 6"
        ),
    ]


def _hints() -> list[VssPath]:
    place = {"kind": Kind.NUMBER, "signals": ("region",), "place": True}
    inside = "only where regions are configured; stays in the agent"
    return [
        _number(f"{COMPUTE}.CircuitLimit", "W", "circuit_limit_w", "what the charging point allows", "overlay"),
        _number("Vehicle.PowerOptimizeLevel", "", "power_optimize_level", "0 to 10"),
        _number(f"{UNITS}.Power", "W", "computer_power_w", "sum of the control units", "6"),
        _text(f"{T}.BatteryConditioning.TargetTime", "departure_ms", "when RequestedMode says so", "5, 6"),
        _text(f"{T}.BatteryConditioning.RequestedMode", "departure_ms", "DRIVING_PREPARATION", "5, 6"),
        _text(f"{CHARGING}.Timer.Time", "departure_ms", "when Mode is END_TIME"),
        _text(f"{CHARGING}.Timer.Mode", "departure_ms", "INACTIVE, START_TIME or END_TIME"),
        _text(f"{COMPUTE}.ReadyBy", "departure_ms", "ISO 8601, with its zone", "overlay"),
        _text(f"{COMPUTE}.NetworkClass", "network", "NONE, UNMETERED, METERED or ROAMING", "overlay"),
        _yes("Vehicle.Connectivity.IsConnectivityAvailable", "network", "false is NONE"),
        _text(f"{COMPUTE}.Region", "region", "the car's own word; comes before the location", "overlay"),
        VssPath(path=LATITUDE, unit="degrees", note=inside, **place),  # type: ignore[arg-type]
        VssPath(path=LONGITUDE, unit="degrees", note=inside, **place),  # type: ignore[arg-type]
        VssPath(path=ACCURACY, unit="m", note=inside, **place),  # type: ignore[arg-type]
    ]


PATHS: Final[tuple[VssPath, ...]] = (*_owner(), *_charging(), *_health(), *_hints())
BY_PATH: Final[dict[str, VssPath]] = {entry.path: entry for entry in PATHS}
assert len(BY_PATH) == len(PATHS)
PATTERNS: Final = tuple(entry for entry in PATHS if "*" in entry.path)
# Signals whose change wakes the guard at once; the rest is looked at when it comes by.
URGENT: Final = frozenset(
    {
        "gear_is_park",
        "speed_kmh",
        "ignition",
        "doors_open",
        "locked",
        "seat_occupied",
        "preconditioning",
        "driver_mode",
        "update_in_progress",
        "cable_connected",
        "cable_locked",
        "grid_power_available",
        "feeding_grid",
        "fault_count",
    }
)


def entry_of(path: str) -> VssPath | None:
    """What is known of a path, whatever name a control unit has; None for a path that feeds nothing."""
    entry = BY_PATH.get(path)
    if entry is not None:
        return entry if "*" not in path else None
    for pattern in PATTERNS:
        before, after = pattern.path.split("*")
        middle = path[len(before) : len(path) - len(after)]
        if path.startswith(before) and path.endswith(after) and middle and "." not in middle:
            return pattern
    return None


def wanted(known: Iterable[str], *, place: bool) -> tuple[str, ...]:
    """The paths to subscribe to among those that a broker knows; a location only where it is asked for."""
    found = set()
    for path in known:
        entry = entry_of(path)
        if entry is not None and (place or not entry.place):
            found.add(path)
    return tuple(sorted(found))


def candidates(*, place: bool) -> tuple[str, ...]:
    """Paths to try one by one with a broker that tells no list; the computer is taken to be the unit "Central"."""
    return tuple(entry.path.replace("*", "Central") for entry in PATHS if place or not entry.place)


def checked(kind: Kind, value: object) -> Value | None:
    """``value`` if it is of its kind and finite; None otherwise. Never raises."""
    if kind is Kind.BOOL:
        return value if isinstance(value, bool) else None
    if kind is Kind.TEXT:
        return value if isinstance(value, str) and len(value) <= MAX_TEXT else None
    if kind is Kind.TEXTS:
        if not isinstance(value, list | tuple) or len(value) > MAX_TEXTS:
            return None
        return tuple(value) if all(isinstance(item, str) for item in value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
