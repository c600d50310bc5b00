"""From single values of VSS paths to ``Signals``: units, several doors in one signal, ages.

Decides: what a set of paths says together, and how old that is. What speaks against work (an open door) counts as soon
as one path says so; what speaks for it is as old as the oldest path that it needs, and is missing while one of them is.
Must not: read a clock, raise on any value or time, or let a location out: only the code of a region leaves this module.
Called by: ``agent.signals.kuksa``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

from motorpool.agent.signals import vss
from motorpool.agent.signals.regions import DEFAULT_ACCURACY_M, Region, region_of
from motorpool.agent.signals.vss import CHARGING, COMPUTE, GEARBOX, SEAT, T, Value
from motorpool.core.signals import TABLE, DriverMode, LowVoltage, NetworkClass, Occupancy, Reading, Signals

AC_SHARE: Final = 0.88  # of the power at the inlet that reaches the battery, when the car does not say
LIVE_V: Final = 50.0  # a line with this much carries power
MIN_SOC_PCT: Final = 20.0  # below, energy by charge is too coarse to be a capacity
PREPARING: Final = tuple(entry.path for entry in vss.PATHS if "preconditioning" in entry.signals)
IS_OPEN: Final = (*(f"{door}.IsOpen" for door in vss.DOORS), *(f"{lid}.IsOpen" for lid in vss.LIDS))
IS_LOCKED: Final = tuple(f"{door}.IsLocked" for door in vss.DOORS)
FRONT: Final = {what: tuple(f"{door}.{what}" for door in vss.FRONT_DOORS) for what in ("IsOpen", "IsLocked")}
CABLES: Final = {f"{port}.IsChargingCableConnected": f"{port}.IsChargingCableLocked" for port in vss.PORTS}
VOLTS: Final = {line: f"{CHARGING}.ChargeVoltage.{line}" for line in vss.LINES}
MOST: Final = {line: f"{CHARGING}.MaximumChargingCurrent.{line}" for line in vss.LINES}
AMPS: Final = {phase: f"{CHARGING}.ChargeCurrent.{phase}" for phase in vss.PHASES}
Found = tuple[Any, int]  # a value, and when it was true


class _Part:
    """The latest of one path: a valid value or None, and when it was confirmed."""

    __slots__ = ("at_ms", "value")

    def __init__(self, value: Value | None, at_ms: int) -> None:
        self.value = value
        self.at_ms = at_ms


class Assembler:
    """Holds the latest value of each path. ``zone`` is for times without a zone; without ``regions``, no location."""

    def __init__(self, regions: tuple[Region, ...] = (), zone: str = "UTC") -> None:
        self._regions = regions
        self._zone = ZoneInfo(zone)
        self._parts: dict[str, _Part] = {}
        self._units: list[str] = []  # paths of control units that were seen
        self._makers: dict[str, Callable[[], Found | None]] = {
            name: getattr(self, f"_{name}") for name in TABLE if name != "departure_ms"
        }

    def feed(self, path: str, value: object, at_ms: int) -> frozenset[str]:
        """Take a value of a path that was true at ``at_ms``; the names of the signals whose value this changed.

        ``value`` None, or of the wrong type, means that the path has no value now.
        """
        entry = vss.entry_of(path)
        if entry is None or (entry.place and not self._regions):
            return frozenset()
        good = vss.checked(entry.kind, value)
        part = self._parts.get(path)
        if part is None and value is None:
            return frozenset()  # a path that was never filled is not a part of this car
        if part is not None and part.value == good and type(part.value) is type(good):
            part.at_ms = max(part.at_ms, at_ms)
            return frozenset()
        before = {name: self._value(name) for name in entry.signals}
        if part is None:
            part = self._parts[path] = _Part(good, at_ms)
            if "*" in entry.path:
                self._units.append(path)
        else:
            part.value, part.at_ms = good, at_ms
        return frozenset(name for name, old in before.items() if self._value(name) != old)

    def confirm(self, paths: Iterable[str], at_ms: int) -> None:
        """The values of these paths were still true at ``at_ms``."""
        for path in paths:
            part = self._parts.get(path)
            if part is not None:
                part.at_ms = max(part.at_ms, at_ms)

    def forget(self) -> None:
        """Every path is unknown again, as at the start."""
        self._parts.clear()
        self._units.clear()

    def signals(self, now_ms: int) -> Signals:
        """What all paths say together; each reading is as old as its oldest needed part."""
        readings: dict[str, Any] = {}
        for name, make in self._makers.items():
            found = make()
            if found is not None:
                readings[name] = Reading(*found)
        departure = self._departure_ms(now_ms)
        if departure is not None:
            readings["departure_ms"] = Reading(*departure)
        return Signals(**readings)

    def _value(self, name: str) -> object:
        found = self._departure_ms(0) if name == "departure_ms" else self._makers[name]()
        return None if found is None else found[0]

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _get(self, path: str) -> Found | None:
        part = self._parts.get(path)
        return None if part is None or part.value is None else (part.value, part.at_ms)

    def _known(self, paths: Iterable[str]) -> list[_Part]:
        """The paths that ever came, with or without a value now."""
        return [self._parts[path] for path in paths if path in self._parts]

    def _any(self, paths: Iterable[str]) -> Found | None:
        """True as soon as one says so; False only when every known path says so."""
        known = self._known(paths)
        yes = [part.at_ms for part in known if part.value is True]
        if yes:
            return True, max(yes)
        if not known or any(part.value is None for part in known):
            return None
        return False, min(part.at_ms for part in known)

    def _all(self, paths: Iterable[str]) -> Found | None:
        """False as soon as one says so; True only when every known path says so."""
        known = self._known(paths)
        no = [part.at_ms for part in known if part.value is False]
        if no:
            return False, max(no)
        if not known or any(part.value is None for part in known):
            return None
        return True, min(part.at_ms for part in known)

    def _scaled(self, path: str, factor: float = 1.0) -> Found | None:
        found = self._get(path)
        return None if found is None else (found[0] * factor, found[1])

    def _power(self, volts: str, amps: str) -> Found | None:
        volt, amp = self._get(volts), self._get(amps)
        return None if volt is None or amp is None else (volt[0] * amp[0], min(volt[1], amp[1]))

    # -- the owner -----------------------------------------------------------------------------------------------------

    def _gear_is_park(self) -> Found | None:
        lever = f"{GEARBOX}.SelectedGear"
        gear = self._get(lever if lever in self._parts else f"{GEARBOX}.CurrentGear")
        lock = self._get(f"{GEARBOX}.IsParkLockEngaged")
        if lock is not None and lock[0] is False:
            return lock
        if gear is None:
            return None
        if gear[0] != vss.PARK:
            return False, gear[1]
        return True, gear[1] if lock is None else min(gear[1], lock[1])

    def _speed_kmh(self) -> Found | None:
        speed, moving = self._get("Vehicle.Speed"), self._get("Vehicle.IsMoving")
        if moving is not None and moving[0]:
            return (max(1.0, abs(speed[0])) if speed is not None else 1.0), moving[1]
        return speed

    def _ignition(self) -> Found | None:
        return self._enum("Vehicle.LowVoltageSystemState", LowVoltage)

    def _enum(self, path: str, kind: type[LowVoltage | DriverMode | NetworkClass | Occupancy]) -> Found | None:
        found = self._get(path)
        if found is None:
            return None
        text = str(found[0]).upper()
        return (kind(text), found[1]) if text in kind.__members__ else None

    def _doors_open(self) -> Found | None:
        found = self._any(IS_OPEN)
        return found if found is None or found[0] or self._front("IsOpen") else None

    def _locked(self) -> Found | None:
        found = self._all(IS_LOCKED)
        return found if found is None or not found[0] or self._front("IsLocked") else None

    def _front(self, what: str) -> bool:
        """A lid alone does not say that the doors are shut: at least one front door must be among what is known."""
        return any(self._get(path) is not None for path in FRONT[what])

    def _seat_occupied(self) -> Found | None:
        belt = self._get(f"{SEAT}.IsBelted")
        if belt is not None and belt[0]:
            return Occupancy.OCCUPIED, belt[1]
        six = self._enum(f"{SEAT}.OccupancyStatus", Occupancy)
        five = self._get(f"{SEAT}.IsOccupied")
        if five is not None:
            five = (Occupancy.OCCUPIED if five[0] else Occupancy.EMPTY), five[1]
        said = [found for found in (six, five) if found is not None]
        for found in said:
            if found[0] is Occupancy.OCCUPIED:
                return found
        if not said:
            return None
        unsure = f"{SEAT}.OccupancyStatus" in self._parts and six is None
        if unsure or any(found[0] is Occupancy.UNKNOWN for found in said):
            return Occupancy.UNKNOWN, min(found[1] for found in said)
        return Occupancy.EMPTY, min(found[1] for found in said)

    def _preconditioning(self) -> Found | None:
        return self._any(PREPARING)

    def _driver_mode(self) -> Found | None:
        return self._enum(f"{COMPUTE}.DriverMode", DriverMode)

    def _update_in_progress(self) -> Found | None:
        return self._get(f"{COMPUTE}.UpdateInProgress")

    # -- the cable and the battery -------------------------------------------------------------------------------------

    def _cable_connected(self) -> Found | None:
        """Here "yes" is what allows work, but a cable in any port is enough for it."""
        return self._any(CABLES)

    def _cable_locked(self) -> Found | None:
        """Every port with a cable in it holds it; with no cable in, what the locks say without one."""
        used = [lock for cable, lock in CABLES.items() if (self._get(cable) or (False, 0))[0]]
        return self._all(used or CABLES.values())

    def _grid_power_available(self) -> Found | None:
        word = f"{COMPUTE}.GridPowerAvailable"
        if word in self._parts:
            return self._get(word)
        lines = self._known(VOLTS.values())
        live = [part.at_ms for part in lines if isinstance(part.value, float) and abs(part.value) >= LIVE_V]
        charging = self._get(f"{CHARGING}.IsCharging")
        if live:
            return True, max(live)
        if lines and not any(part.value is None for part in lines):
            return False, min(part.at_ms for part in lines)
        if not lines and charging is not None and charging[0]:
            return charging
        return None

    def _feeding_grid(self) -> Found | None:
        return self._get(f"{CHARGING}.IsDischarging")

    def _battery_power_w(self) -> Found | None:
        path = f"{T}.CurrentPower"
        return self._get(path) if path in self._parts else self._power(f"{T}.CurrentVoltage", f"{T}.CurrentCurrent")

    def _soc_displayed_pct(self) -> Found | None:
        return self._get(f"{T}.StateOfCharge.Displayed")

    def _charge_limit_pct(self) -> Found | None:
        return self._get(f"{CHARGING}.ChargeLimit")

    def _charger_power_w(self) -> Found | None:
        word = f"{COMPUTE}.ChargerPower"
        if word in self._parts:
            return self._get(word)
        found = [
            (power[0] * (1.0 if line == "DC" else AC_SHARE), power[1])
            for line in vss.LINES
            if (power := self._power(VOLTS[line], MOST[line]))
        ]
        if found:
            return sum(power for power, _ in found), min(at_ms for _, at_ms in found)
        return self._scaled(f"{CHARGING}.MaxPower", 1000.0)

    def _capacity_wh(self) -> Found | None:
        soc, energy = self._get(f"{T}.StateOfCharge.Current"), self._get(f"{T}.StateOfCharge.CurrentEnergy")
        if soc is not None and energy is not None and soc[0] >= MIN_SOC_PCT:
            return energy[0] * 1000.0 / (soc[0] / 100.0), min(soc[1], energy[1])
        return self._scaled(f"{T}.NetCapacity", 1000.0)

    def _time_to_complete_s(self) -> Found | None:
        return self._get(f"{CHARGING}.TimeToComplete")

    # -- health --------------------------------------------------------------------------------------------------------

    def _pack_temp_c(self) -> Found | None:
        return self._get(f"{T}.Temperature.Max")

    def _computer_temp_c(self) -> Found | None:
        paths = [path for path in self._units if path.endswith(".Temperature")]
        known = self._known([*paths, f"{COMPUTE}.Temperature"])
        values = [part.value for part in known if isinstance(part.value, float)]
        if not known or len(values) < len(known):
            return None  # a unit without a value may be the hottest
        return max(values), min(part.at_ms for part in known)

    def _dcdc_temp_c(self) -> Found | None:
        return self._get(f"{T}.DCDC.Temperature")

    def _low_voltage_v(self) -> Found | None:
        return self._get(vss.LOW_VOLTAGE)

    def _fault_count(self) -> Found | None:
        codes = self._get(f"{T}.ErrorCodes")
        return None if codes is None else (len(codes[0]), codes[1])

    # -- hints ---------------------------------------------------------------------------------------------------------

    def _ac_power_w(self) -> Found | None:
        found = [power for phase in vss.PHASES if (power := self._power(VOLTS[phase], AMPS[phase]))]
        return (sum(power for power, _ in found), min(at_ms for _, at_ms in found)) if found else None

    def _circuit_limit_w(self) -> Found | None:
        return self._get(f"{COMPUTE}.CircuitLimit")

    def _power_optimize_level(self) -> Found | None:
        found = self._get("Vehicle.PowerOptimizeLevel")
        return None if found is None else (math.ceil(found[0]), found[1])

    def _computer_power_w(self) -> Found | None:
        paths = [path for path in self._units if path.endswith(".Power")]
        found = [power for path in paths if (power := self._get(path))]
        if not found or len(found) < len(paths):
            return None
        return sum(power for power, _ in found), min(at_ms for _, at_ms in found)

    def _departure_ms(self, now_ms: int) -> Found | None:
        """The earliest time ahead that the car was told of: an upper bound. A timer of yesterday says nothing."""
        mode = self._get(f"{T}.BatteryConditioning.RequestedMode")
        timer = self._get(f"{CHARGING}.Timer.Mode")
        times = [self._get(f"{COMPUTE}.ReadyBy")]
        if mode is not None and str(mode[0]).upper() == "DRIVING_PREPARATION":
            times.append(self._get(f"{T}.BatteryConditioning.TargetTime"))
        if timer is not None and str(timer[0]).upper() == "END_TIME":
            times.append(self._get(f"{CHARGING}.Timer.Time"))
        ahead = [
            (at_ms, found[1])
            for found in times
            if found is not None and (at_ms := self._time_ms(found[0])) is not None and at_ms >= now_ms
        ]
        return min(ahead) if ahead else None

    def _time_ms(self, text: str) -> int | None:
        try:
            moment = datetime.fromisoformat(text)
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=self._zone)
            return int(moment.timestamp() * 1000)
        except (ValueError, OverflowError):  # "0000-01-01T00:00Z" is how VSS says "not set"
            return None

    def _network(self) -> Found | None:
        online = self._get("Vehicle.Connectivity.IsConnectivityAvailable")
        if online is not None and not online[0]:
            return NetworkClass.NONE, online[1]
        return self._enum(f"{COMPUTE}.NetworkClass", NetworkClass)

    def _region(self) -> Found | None:
        word = f"{COMPUTE}.Region"
        if word in self._parts:
            return self._get(word)
        latitude, longitude = self._get(vss.LATITUDE), self._get(vss.LONGITUDE)
        if latitude is None or longitude is None:
            return None
        accuracy = self._get(vss.ACCURACY)
        metres = DEFAULT_ACCURACY_M if accuracy is None else accuracy[0]
        code = region_of(latitude[0], longitude[0], self._regions, metres)
        return None if code is None else (code, min(latitude[1], longitude[1]))
