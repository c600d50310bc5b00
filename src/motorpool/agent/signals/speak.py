"""What a car with given ``Signals`` would say in VSS: the way back, for the stand-in broker.

Decides: path, spelling and unit of what each signal is told with. Must not: be used on the agent's own path of trust.
Called by: ``agent.signals.broker``.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from motorpool.agent.signals import vss
from motorpool.agent.signals.assemble import AC_SHARE
from motorpool.agent.signals.vss import CHARGING, COMPUTE, GEARBOX, SEAT, T, Value
from motorpool.core.signals import Occupancy, Reading, Signals

NEUTRAL: Final = 0
DRIVE: Final = 127
LINE_V: Final = 230.0
CABLE_PORT: Final = "FrontLeft"
FITTED_DOORS: Final = tuple(f"{vss.DOOR}.{row}.{side}" for row in vss.ROWS for side in vss.SIDES[:2])
UNIT: Final = vss.UNITS.replace("*", "Central")
UNSET: Final = "0000-01-01T00:00Z"  # how VSS says that a time is not set


def values(signals: Signals, version: int) -> dict[str, Value | None]:
    """The value of each path of a car of VSS ``version`` (5 or 6). None: the car has the path and no value for it."""
    said: dict[str, Value | None] = {}
    said.update(_owner(signals, version))
    said.update(_charging(signals))
    said.update(_health(signals, version))
    return said


def _get(reading: Reading[Any] | None) -> Any:
    return None if reading is None else reading.value


def _owner(signals: Signals, version: int) -> dict[str, Value | None]:
    parked = _get(signals.gear_is_park)
    said: dict[str, Value | None] = {
        f"{GEARBOX}.SelectedGear": None if parked is None else (vss.PARK if parked else DRIVE),
        "Vehicle.Speed": _get(signals.speed_kmh),
        "Vehicle.LowVoltageSystemState": None if signals.ignition is None else signals.ignition.value.value,
        f"{T}.BatteryConditioning.IsActive": _get(signals.preconditioning),
        f"{COMPUTE}.DriverMode": None if signals.driver_mode is None else signals.driver_mode.value.value,
        f"{COMPUTE}.UpdateInProgress": _get(signals.update_in_progress),
    }
    open_, locked = _get(signals.doors_open), _get(signals.locked)
    for door in FITTED_DOORS:
        first = door == FITTED_DOORS[0]
        said[f"{door}.IsOpen"] = open_ if first or open_ is None else False
        said[f"{door}.IsLocked"] = locked
    seat = signals.seat_occupied
    if version >= 6:
        said[f"{SEAT}.OccupancyStatus"] = None if seat is None else seat.value.value
    else:
        said[f"{SEAT}.IsOccupied"] = None if seat is None else seat.value is not Occupancy.EMPTY
    return said


def _charging(signals: Signals) -> dict[str, Value | None]:
    port = f"{CHARGING}.ChargingPort.{CABLE_PORT}"
    live, charger, ac = _get(signals.grid_power_available), signals.charger_power_w, signals.ac_power_w
    volts = None if live is None else (LINE_V if live else 0.0)
    amps = None if charger is None else charger.value / AC_SHARE / len(vss.PHASES) / LINE_V
    drawn = None if ac is None else ac.value / len(vss.PHASES) / LINE_V
    said: dict[str, Value | None] = {
        f"{port}.IsChargingCableConnected": _get(signals.cable_connected),
        f"{port}.IsChargingCableLocked": _get(signals.cable_locked),
        f"{CHARGING}.IsDischarging": _get(signals.feeding_grid),
        f"{T}.CurrentPower": _get(signals.battery_power_w),
        f"{T}.StateOfCharge.Displayed": _get(signals.soc_displayed_pct),
        f"{CHARGING}.ChargeLimit": _get(signals.charge_limit_pct),
        f"{CHARGING}.TimeToComplete": _get(signals.time_to_complete_s),
        f"{COMPUTE}.CircuitLimit": _get(signals.circuit_limit_w),
    }
    for phase in vss.PHASES:
        said[f"{CHARGING}.ChargeVoltage.{phase}"] = volts
        said[f"{CHARGING}.MaximumChargingCurrent.{phase}"] = amps
        said[f"{CHARGING}.ChargeCurrent.{phase}"] = drawn
    capacity, soc = signals.capacity_wh, signals.soc_displayed_pct
    if capacity is not None:
        said[f"{T}.NetCapacity"] = float(round(capacity.value / 1000.0))
        if soc is not None:
            said[f"{T}.StateOfCharge.Current"] = soc.value
            said[f"{T}.StateOfCharge.CurrentEnergy"] = capacity.value / 1000.0 * soc.value / 100.0
    return said


def _health(signals: Signals, version: int) -> dict[str, Value | None]:
    faults = _get(signals.fault_count)
    departure = signals.departure_ms
    when = UNSET if departure is None else datetime.fromtimestamp(departure.value / 1000, UTC).isoformat()
    said: dict[str, Value | None] = {
        f"{T}.Temperature.Max": _get(signals.pack_temp_c),
        f"{T}.DCDC.Temperature": _get(signals.dcdc_temp_c),
        vss.LOW_VOLTAGE: _get(signals.low_voltage_v),
        f"{T}.ErrorCodes": None if faults is None else tuple(f"P{number:04d}" for number in range(int(faults))),
        f"{COMPUTE}.ReadyBy": when,
        f"{COMPUTE}.NetworkClass": None if signals.network is None else signals.network.value.value,
        f"{COMPUTE}.Region": _get(signals.region),
        "Vehicle.PowerOptimizeLevel": _get(signals.power_optimize_level),
    }
    if version >= 6:
        said[f"{UNIT}.Temperature"] = _get(signals.computer_temp_c)
        said[f"{UNIT}.Power"] = _get(signals.computer_power_w)
    else:
        said[f"{COMPUTE}.Temperature"] = _get(signals.computer_temp_c)
    return said
