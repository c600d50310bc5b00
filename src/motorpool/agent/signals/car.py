"""A simulated car: battery, charger and its losses, heat, 12 V battery, plug, doors, gear, and an owner with habits.

Decides: what happens to the car in a stretch of time, and which of the owner's acts are possible now. Must not: read a
clock (time is handed in), know of jobs or permits, or act on its own: only the owner moves the car. Where it is stays
inside: it tells the code of a region.
Called by: ``agent.signals.owner_port``, ``agent.signals.broker``, ``agent.signals.replay`` and ``agent.main``; it is a
SignalSource for ``agent.loop``. What each part does is in ``agent.signals.physics``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final

import msgspec

from motorpool.agent.signals import physics
from motorpool.agent.signals.regions import Region, box, region_of
from motorpool.core.signals import DriverMode, LowVoltage, NetworkClass, Occupancy, Reading, Signals
from motorpool.errors import ConflictError


class Action(StrEnum):
    """What the owner can do, and what can happen to the car."""

    UNLOCK = "unlock"
    LOCK = "lock"
    OPEN_DOOR = "open-door"
    CLOSE_DOOR = "close-door"
    PLUG_IN = "plug-in"
    UNPLUG = "unplug"
    DRIVE_OFF = "drive-off"
    COME_BACK = "come-back"
    POWER_CUT = "power-cut"
    POWER_BACK = "power-back"
    PRECONDITION = "precondition"
    PRECONDITION_OFF = "precondition-off"
    OWNER_MODE = "owner-mode"
    GUEST_MODE = "guest-mode"
    VALET_MODE = "valet-mode"
    SERVICE_MODE = "service-mode"
    FAULT = "fault"
    FAULT_CLEARED = "fault-cleared"
    START_UPDATE = "start-update"
    END_UPDATE = "end-update"
    FEED_HOUSE = "feed-house"
    FEED_STOP = "feed-stop"
    NETWORK_FREE = "network-free"
    NETWORK_METERED = "network-metered"
    NETWORK_GONE = "network-gone"
    HEAT_WAVE = "heat-wave"
    COOL_DOWN = "cool-down"
    LOW_VOLTAGE = "low-voltage"
    VOLTAGE_BACK = "voltage-back"
    LEAVE_REGION = "leave-region"
    HOME_REGION = "home-region"


ACTIONS: Final[dict[Action, str]] = {
    Action.UNLOCK: "unlock the car",
    Action.LOCK: "close the doors and lock the car",
    Action.OPEN_DOOR: "open the driver's door (unlocks the car)",
    Action.CLOSE_DOOR: "close the driver's door",
    Action.PLUG_IN: "plug the charging cable in",
    Action.UNPLUG: "unlock the cable and pull it out",
    Action.DRIVE_OFF: "open the door, unplug, get in and drive away: a few seconds in all",
    Action.COME_BACK: "park, get out and lock; the cable stays out until plug-in",
    Action.POWER_CUT: "the charging point loses its power",
    Action.POWER_BACK: "the charging point has power again",
    Action.PRECONDITION: "warm or cool the cabin for a drive, for 20 minutes",
    Action.PRECONDITION_OFF: "stop preparing the cabin",
    Action.OWNER_MODE: "the owner has the car",
    Action.GUEST_MODE: "a guest has the car",
    Action.VALET_MODE: "a valet has the car",
    Action.SERVICE_MODE: "a workshop has the car",
    Action.FAULT: "the battery reports a fault",
    Action.FAULT_CLEARED: "all faults are cleared",
    Action.START_UPDATE: "the car starts to install its own software",
    Action.END_UPDATE: "the car has installed its software",
    Action.FEED_HOUSE: "the battery feeds the house",
    Action.FEED_STOP: "the battery no longer feeds the house",
    Action.NETWORK_FREE: "the car is on a network that costs nothing",
    Action.NETWORK_METERED: "the car is on a network that costs by the byte",
    Action.NETWORK_GONE: "the car says that it has no network",
    Action.HEAT_WAVE: "the air that cools the computer gets hot",
    Action.COOL_DOWN: "the air that cools the computer is fresh again",
    Action.LOW_VOLTAGE: "the 12 V battery is nearly empty and its converter fails",
    Action.VOLTAGE_BACK: "the 12 V battery is full and its converter works",
    Action.LEAVE_REGION: "the car is in another region",
    Action.HOME_REGION: "the car is in its own region again",
}
# What may happen while the car is on the road, too.
_ANYWHERE: Final = frozenset(Action) - {
    Action.UNLOCK,
    Action.LOCK,
    Action.OPEN_DOOR,
    Action.CLOSE_DOOR,
    Action.PLUG_IN,
    Action.UNPLUG,
    Action.DRIVE_OFF,
    Action.PRECONDITION,
    Action.FEED_HOUSE,
    Action.START_UPDATE,
}
# Acts that only set one attribute of the car.
_SETS: Final[dict[Action, tuple[str, object]]] = {
    Action.UNLOCK: ("locked", False),
    Action.POWER_CUT: ("grid", False),
    Action.POWER_BACK: ("grid", True),
    Action.OWNER_MODE: ("driver_mode", DriverMode.OWNER),
    Action.GUEST_MODE: ("driver_mode", DriverMode.GUEST),
    Action.VALET_MODE: ("driver_mode", DriverMode.VALET),
    Action.SERVICE_MODE: ("driver_mode", DriverMode.SERVICE),
    Action.FAULT_CLEARED: ("faults", 0),
    Action.START_UPDATE: ("updating", True),
    Action.END_UPDATE: ("updating", False),
    Action.FEED_HOUSE: ("feeding", True),
    Action.FEED_STOP: ("feeding", False),
    Action.NETWORK_FREE: ("network", NetworkClass.UNMETERED),
    Action.NETWORK_METERED: ("network", NetworkClass.METERED),
    Action.NETWORK_GONE: ("network", NetworkClass.NONE),
    Action.HEAT_WAVE: ("hot_air", True),
    Action.COOL_DOWN: ("hot_air", False),
    Action.PRECONDITION_OFF: ("precondition_until_ms", 0),
}
DRIVE_W: Final = 9_000.0  # at DRIVE_KMH
DRIVE_KMH: Final = 50.0
MAX_STEP_S: Final = 5.0
COARSE_STEP_S: Final = 60.0  # for long stretches in which nobody looks
PRECONDITION_MS: Final = 20 * 60_000
PRECONDITION_W: Final = 3_000.0
FEED_W: Final = 3_000.0
HOT_AIR_C: Final = 66.0
EMPTY_SHARE: Final = 0.05  # of the battery's energy; the simulated owner never gets stranded
TOP_UP_PCT: Final = 2.0  # a charger that sleeps when the battery is full wakes at this much below the limit
MINUTE_MS: Final = 60_000
DAY_MIN: Final = 1_440

# What an owner who drives off does, and when (seconds after the first act). The guard sees the first.
_DRIVE_OFF: Final[tuple[tuple[float, str], ...]] = (
    (0.0, "open_door"),
    (1.0, "unlock_cable"),
    (1.5, "pull_cable"),
    (2.5, "sit_down"),
    (3.0, "shut_door"),
    (3.5, "ignition_on"),
    (4.0, "gear_drive"),
    (4.5, "move"),
)
_COME_BACK: Final[tuple[tuple[float, str], ...]] = (
    (0.0, "halt"),
    (0.5, "gear_park"),
    (0.8, "ignition_off"),
    (1.0, "open_door"),
    (1.5, "get_out"),
    (2.0, "shut_door"),
    (2.3, "lock"),
)


class CarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A car as it stands at the start. ``driving_speedup`` lets the battery of a driving car fall visibly.

    The charger and the circuit give ``charger_ac_w`` and ``circuit_w`` at most, and the battery takes
    ``battery_accepts_w`` of that, so that there is power beside charging. ``capacity_wh`` lies between 0 and 100 % as
    displayed; the battery holds a little more, out of the owner's reach. With ``charge_from_minute`` (of the day, UTC)
    charging waits for that minute and ends ``charge_for_min`` later. A charger that ``sleeps_when_full`` leaves the
    car to its battery until that is ``TOP_UP_PCT`` below the limit, as some cars do. While the computer works the rest
    of the car is awake, too, which takes ``awake_w``. ``meters_computer``: the car measures the computer's power.
    """

    soc_pct: float = 86.0
    charge_limit_pct: float = 80.0
    capacity_wh: float = 60_000.0
    charger_ac_w: float = 11_000.0
    circuit_w: float = 11_000.0
    battery_accepts_w: float = 6_512.0
    driving_speedup: float = 40.0
    plugged: bool = True
    charge_from_minute: int | None = None
    charge_for_min: int = 480
    sleeps_when_full: bool = False
    awake_w: float = 40.0
    meters_computer: bool = False
    pack_c: float = 20.0
    climate: physics.Climate = physics.Climate()
    home: tuple[float, float] = (59.913, 10.739)
    abroad: tuple[float, float] = (55.676, 12.568)
    regions: tuple[Region, ...] = (box("NO", 59.5, 9.5, 60.5, 11.5),)


class CarView(msgspec.Struct, frozen=True, kw_only=True):
    """The car as its owner sees it, for the command line."""

    soc_pct: float
    plugged: bool
    charging_w: int
    locked: bool
    door_open: bool
    away: bool
    busy: bool  # in the middle of driving off or coming back
    computer_c: int
    pack_c: int
    driver_mode: str


class SimulatedCar:
    """One car. ``advance`` moves it through time; ``drawn_w`` tells what the computer in it draws."""

    def __init__(self, spec: CarSpec, now_ms: int, drawn_w: Callable[[], float] = lambda: 0.0) -> None:
        self._spec = spec
        self._now_ms = now_ms
        self._drawn_w = drawn_w
        self._callbacks: list[Callable[[], None]] = []
        self._script: list[tuple[float, str]] = []  # what the owner still does, in seconds from now
        self._place = spec.home
        self.energy_wh = spec.capacity_wh * spec.soc_pct / 100
        self.battery_power_w = 0.0
        self.ac_power_w = 0.0
        self.grid_wh = 0.0  # drawn at the inlet since the start
        self.plugged = spec.plugged
        self.cable_locked = spec.plugged
        self.grid = True
        self.feeding = False
        self.door_open = False
        self.locked = True
        self.seat = Occupancy.EMPTY
        self.ignition = LowVoltage.OFF
        self.gear_is_park = True
        self.speed_kmh = 0.0
        self.driver_mode = DriverMode.OWNER
        self.updating = False
        self.faults = 0
        self.network = NetworkClass.UNMETERED
        self.precondition_until_ms = 0
        self.departure_ms: int | None = None
        self.hot_air = False
        self.dcdc_works = True
        self.low_voltage_share = 1.0
        self.pack_c = spec.pack_c
        self.computer_c = self._air_c(now_ms) + physics.COMPUTER_IDLE_C
        self.dcdc_c = self._air_c(now_ms)
        self._charger_sleeps = False

    @property
    def soc_pct(self) -> float:
        """Charge in percent, as displayed."""
        return self.energy_wh / self._spec.capacity_wh * 100

    @property
    def soc_internal_pct(self) -> float:
        """Charge in percent of all that the cells hold: the display keeps 4 % below and 3 % above for itself."""
        return 4.0 + 0.93 * self.soc_pct

    @property
    def away(self) -> bool:
        """Is the car on the road."""
        return not self.gear_is_park

    @property
    def preconditioning(self) -> bool:
        """Is the cabin being prepared for a drive."""
        return self._now_ms < self.precondition_until_ms

    @property
    def low_voltage_v(self) -> float:
        """Voltage of the 12 V battery."""
        return physics.low_voltage_v(self.low_voltage_share, dcdc_on=self._dcdc_on())

    def _air_c(self, now_ms: int) -> float:
        """Temperature of the air that cools the computer."""
        return HOT_AIR_C if self.hot_air else self._spec.climate.at(now_ms)

    def _dcdc_on(self) -> bool:
        awake = self._drawn_w() > 0 or self.ignition in {LowVoltage.ON, LowVoltage.START} or self.ac_power_w > 0
        return self.dcdc_works and (awake or self.preconditioning)

    # -- time ----------------------------------------------------------------------------------------------------------

    def advance(self, now_ms: int, step_s: float = MAX_STEP_S) -> None:
        """Let time pass up to ``now_ms``; the owner's further acts happen at their times.

        ``step_s`` is the longest step. Each is exact while nothing changes, so that a year of a car that mostly stands
        can be told in steps of ``COARSE_STEP_S`` or more.
        """
        left_s = max(0.0, (now_ms - self._now_ms) / 1000)
        end_ms = max(self._now_ms, now_ms)
        while left_s > 0 or (self._script and self._script[0][0] <= 0):
            dt_s = min(left_s, step_s, self._script[0][0] if self._script else step_s)
            self._now_ms = end_ms - round(left_s * 1000)
            self._step(dt_s)
            left_s -= dt_s
            self._script = [(at_s - dt_s, act) for at_s, act in self._script]
            while self._script and self._script[0][0] <= 1e-9:
                getattr(self, f"_{self._script.pop(0)[1]}")()
        self._now_ms = end_ms

    def _step(self, dt_s: float) -> None:
        """``dt_s`` seconds with constant inputs: who draws, who gives, and what gets warm."""
        spec = self._spec
        drawn_w = self._drawn_w()
        if self.departure_ms is not None and 0 <= self.departure_ms - self._now_ms <= PRECONDITION_MS:
            self.precondition_until_ms = self.departure_ms
        dcdc_on = self._dcdc_on()
        low_w = drawn_w + (spec.awake_w if drawn_w > 0 else 0.0)
        if dcdc_on:
            low_w += physics.low_voltage_charge_w(self.low_voltage_share, dt_s)
        dc_w = low_w / physics.DCDC_SHARE + (PRECONDITION_W if self.preconditioning else 0.0)
        speedup = 1.0
        if self.speed_kmh > 0:
            self.battery_power_w, self.ac_power_w = -DRIVE_W * self.speed_kmh / DRIVE_KMH - dc_w, 0.0
            speedup = spec.driving_speedup
        elif self.feeding and self.plugged:
            self.battery_power_w, self.ac_power_w = -FEED_W - dc_w, -FEED_W * (1 - physics.CHARGER_SHARE)
        elif self.plugged and self.grid and not self._asleep():
            self._charge(dc_w, dt_s)
        else:
            self.battery_power_w, self.ac_power_w = -dc_w, 0.0
        energy_wh = self.energy_wh + self.battery_power_w * dt_s / 3600 * speedup
        self.energy_wh = min(max(energy_wh, EMPTY_SHARE * spec.capacity_wh), spec.capacity_wh)
        self.grid_wh += self.ac_power_w * dt_s / 3600
        self._warm(drawn_w, low_w, dt_s)
        self.low_voltage_share = physics.low_voltage_after(self.low_voltage_share, dt_s, dcdc_on=dcdc_on)

    def _charge(self, dc_w: float, dt_s: float) -> None:
        """On a live cable the charger carries what the car draws and then, within its limits, charges."""
        spec = self._spec
        most_w = physics.dc_of(min(spec.charger_ac_w, spec.circuit_w))
        wanted_w = 0.0
        short_wh = spec.charge_limit_pct / 100 * spec.capacity_wh - self.energy_wh
        if short_wh > 0 and self._timer_allows():
            wanted_w = physics.accepted_w(spec.battery_accepts_w, self.soc_pct, self.pack_c)
            if dt_s > 0:
                wanted_w = min(wanted_w, short_wh * 3600 / dt_s)
        self.battery_power_w = min(
            wanted_w, most_w - dc_w
        )  # below zero where the car draws more than the charger gives
        self.ac_power_w = physics.ac_of(dc_w + self.battery_power_w)

    def _asleep(self) -> bool:
        """Whether the charger rests although there is power on the cable."""
        if not self._spec.sleeps_when_full:
            return False
        limit_pct = self._spec.charge_limit_pct
        if self._charger_sleeps:
            self._charger_sleeps = self.soc_pct > limit_pct - TOP_UP_PCT
        else:
            self._charger_sleeps = self.soc_pct >= limit_pct - 1e-6
        return self._charger_sleeps

    def _timer_allows(self) -> bool:
        start = self._spec.charge_from_minute
        return start is None or (self._now_ms // MINUTE_MS - start) % DAY_MIN < self._spec.charge_for_min

    def _warm(self, drawn_w: float, low_w: float, dt_s: float) -> None:
        air_c = self._air_c(self._now_ms)
        heat_w = abs(self.battery_power_w) * physics.PACK_LOSS_SHARE
        self.pack_c = physics.PACK.after(self.pack_c, self._spec.climate.at(self._now_ms), heat_w, dt_s)
        idle_w = physics.COMPUTER_IDLE_C / physics.COMPUTER.resistance_k_per_w
        self.computer_c = physics.COMPUTER.after(self.computer_c, air_c, idle_w + drawn_w, dt_s)
        lost_w = low_w * (1 / physics.DCDC_SHARE - 1)
        self.dcdc_c = physics.DCDC.after(self.dcdc_c, air_c, lost_w, dt_s)

    # -- the owner -----------------------------------------------------------------------------------------------------

    def do(self, action: Action, now_ms: int) -> None:
        """The owner does something; raises ConflictError where it is not possible now."""
        self.advance(now_ms)
        if self._script:
            raise ConflictError("the owner is busy driving off or coming back: wait a few seconds", code="owner_busy")
        if self.away and action not in _ANYWHERE:
            raise ConflictError("the car is away: come-back first", code="car_away")
        if action is Action.COME_BACK and not self.away:
            raise ConflictError("the car is not away", code="car_not_away")
        if action in _SETS:
            name, value = _SETS[action]
            setattr(self, name, value)
        else:
            self._act(action)
        self.advance(now_ms)
        self._step(0.0)
        for callback in self._callbacks:
            callback()

    def _act(self, action: Action) -> None:
        if action is Action.DRIVE_OFF:
            self._script = list(_DRIVE_OFF)
        elif action is Action.COME_BACK:
            self._script = list(_COME_BACK)
        elif action is Action.UNPLUG:
            self._unlock_cable()
            self._pull_cable()
        elif action is Action.PLUG_IN:
            self.plugged = self.cable_locked = True
        elif action is Action.LOCK:
            self._shut_door()
            self._lock()
        elif action is Action.OPEN_DOOR:
            self._open_door()
        elif action is Action.CLOSE_DOOR:
            self._shut_door()
        elif action is Action.PRECONDITION:
            self.precondition_until_ms = self._now_ms + PRECONDITION_MS
        elif action is Action.FAULT:
            self.faults += 1
        elif action in {Action.LOW_VOLTAGE, Action.VOLTAGE_BACK}:
            self.dcdc_works = action is Action.VOLTAGE_BACK
            self.low_voltage_share = 1.0 if self.dcdc_works else 0.1
        else:
            self._place = self._spec.abroad if action is Action.LEAVE_REGION else self._spec.home

    def plan_departure(self, at_ms: int | None) -> None:
        """Tell the car when it leaves (None: no plan): it prepares the cabin in the last 20 minutes."""
        self.departure_ms = at_ms

    def _open_door(self) -> None:
        self.locked = False
        self.door_open = True

    def _shut_door(self) -> None:
        self.door_open = False

    def _lock(self) -> None:
        self.locked = True

    def _unlock_cable(self) -> None:
        self.cable_locked = False

    def _pull_cable(self) -> None:
        self.plugged = self.feeding = False
        self._charger_sleeps = False

    def _sit_down(self) -> None:
        self.seat = Occupancy.OCCUPIED

    def _get_out(self) -> None:
        self.seat = Occupancy.EMPTY

    def _ignition_on(self) -> None:
        self.ignition = LowVoltage.ON

    def _ignition_off(self) -> None:
        self.ignition = LowVoltage.OFF

    def _gear_drive(self) -> None:
        self.gear_is_park = False
        self.precondition_until_ms = 0
        self.departure_ms = None

    def _gear_park(self) -> None:
        self.gear_is_park = True

    def _move(self) -> None:
        self.speed_kmh = DRIVE_KMH

    def _halt(self) -> None:
        self.speed_kmh = 0.0

    # -- what can be seen ----------------------------------------------------------------------------------------------

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` after each act of the owner."""
        self._callbacks.append(callback)

    def read(self, now_ms: int) -> Signals:
        """All signals, measured now."""
        self.advance(now_ms)
        spec = self._spec
        charger_w = physics.dc_of(min(spec.charger_ac_w, spec.circuit_w))
        accepted_w = min(charger_w, physics.accepted_w(spec.battery_accepts_w, self.soc_pct, self.pack_c))
        missing_wh = max(0.0, (spec.charge_limit_pct - self.soc_pct) / 100 * spec.capacity_wh)
        region = region_of(*self._place, spec.regions)
        return Signals(
            gear_is_park=Reading(self.gear_is_park, now_ms),
            speed_kmh=Reading(self.speed_kmh, now_ms),
            ignition=Reading(self.ignition, now_ms),
            doors_open=Reading(self.door_open, now_ms),
            locked=Reading(self.locked, now_ms),
            seat_occupied=Reading(self.seat, now_ms),
            preconditioning=Reading(self.preconditioning, now_ms),
            driver_mode=Reading(self.driver_mode, now_ms),
            update_in_progress=Reading(self.updating, now_ms),
            cable_connected=Reading(self.plugged, now_ms),
            cable_locked=Reading(self.cable_locked, now_ms),
            grid_power_available=Reading(self.grid and self.plugged, now_ms),
            feeding_grid=Reading(self.feeding, now_ms),
            battery_power_w=Reading(self.battery_power_w, now_ms),
            soc_displayed_pct=Reading(self.soc_pct, now_ms),
            charge_limit_pct=Reading(spec.charge_limit_pct, now_ms),
            charger_power_w=Reading(charger_w, now_ms),
            capacity_wh=Reading(spec.capacity_wh, now_ms),
            time_to_complete_s=Reading(missing_wh / max(1.0, accepted_w) * 3600, now_ms),
            pack_temp_c=Reading(self.pack_c, now_ms),
            computer_temp_c=Reading(self.computer_c, now_ms),
            dcdc_temp_c=Reading(self.dcdc_c, now_ms),
            low_voltage_v=Reading(self.low_voltage_v, now_ms),
            fault_count=Reading(self.faults, now_ms),
            ac_power_w=Reading(self.ac_power_w, now_ms),
            circuit_limit_w=Reading(spec.circuit_w, now_ms),
            power_optimize_level=Reading(0, now_ms),
            computer_power_w=Reading(self._drawn_w(), now_ms) if spec.meters_computer else None,
            departure_ms=None if self.departure_ms is None else Reading(self.departure_ms, now_ms),
            network=Reading(self.network, now_ms),
            region=None if region is None else Reading(region, now_ms),
        )

    def view(self, now_ms: int) -> CarView:
        """What the owner sees."""
        self.advance(now_ms)
        return CarView(
            soc_pct=round(self.soc_pct, 2),
            plugged=self.plugged,
            charging_w=max(0, round(self.battery_power_w)),
            locked=self.locked,
            door_open=self.door_open,
            away=self.away,
            busy=bool(self._script),
            computer_c=round(self.computer_c),
            pack_c=round(self.pack_c),
            driver_mode=self.driver_mode.value,
        )
