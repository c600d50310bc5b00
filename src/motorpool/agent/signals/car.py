"""A simulated car: a battery, a charger with losses, a plug, doors, a gear lever, and an owner who comes and goes.

Decides: what happens to the car in a stretch of time, and which of the owner's acts are possible now. Must not: read a
clock (time is handed in), know of jobs or permits, or act on its own: only the owner moves the car.
Called by: ``agent.signals.owner_port`` and ``agent.main``; it is a SignalSource for ``agent.loop``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final

import msgspec

from motorpool.core.guard import LowVoltage, Occupancy, Reading, Signals
from motorpool.errors import ConflictError


class Action(StrEnum):
    """What the owner can do."""

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
}
LOSS_OF_CHARGING_SHARE: Final = 0.12  # between the socket and the battery
DRIVE_W: Final = 9_000.0  # at DRIVE_KMH
DRIVE_KMH: Final = 50.0
MAX_STEP_S: Final = 5.0

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
    """A car as it stands at the start. ``driving_speedup`` lets the battery of a driving car fall visibly."""

    soc_pct: float = 86.0
    charge_limit_pct: float = 80.0
    capacity_wh: float = 60_000.0
    charger_ac_w: float = 7_400.0
    driving_speedup: float = 40.0
    plugged: bool = True


class CarView(msgspec.Struct, frozen=True, kw_only=True):
    """The car as its owner sees it, for the command line."""

    soc_pct: float
    plugged: bool
    charging_w: int
    locked: bool
    door_open: bool
    away: bool
    busy: bool  # in the middle of driving off or coming back


class SimulatedCar:
    """One car. ``advance`` moves it through time; ``drawn_w`` tells what the computer in it draws."""

    def __init__(self, spec: CarSpec, now_ms: int, drawn_w: Callable[[], float] = lambda: 0.0) -> None:
        self._spec = spec
        self._now_ms = now_ms
        self._drawn_w = drawn_w
        self._callbacks: list[Callable[[], None]] = []
        self._script: list[tuple[float, str]] = []  # what the owner still does, in seconds from now
        self.energy_wh = spec.capacity_wh * spec.soc_pct / 100
        self.battery_power_w = 0.0
        self.plugged = spec.plugged
        self.cable_locked = spec.plugged
        self.grid = True
        self.door_open = False
        self.locked = True
        self.seat = Occupancy.EMPTY
        self.ignition = LowVoltage.OFF
        self.gear_is_park = True
        self.speed_kmh = 0.0

    @property
    def soc_pct(self) -> float:
        """Charge in percent, as displayed."""
        return self.energy_wh / self._spec.capacity_wh * 100

    @property
    def away(self) -> bool:
        """Is the car on the road."""
        return not self.gear_is_park

    # -- time ----------------------------------------------------------------------------------------------------------

    def advance(self, now_ms: int) -> None:
        """Let time pass up to ``now_ms``; the owner's further acts happen at their times."""
        left_s = max(0.0, (now_ms - self._now_ms) / 1000)
        self._now_ms = max(self._now_ms, now_ms)
        while left_s > 0 or (self._script and self._script[0][0] <= 0):
            dt_s = min(left_s, MAX_STEP_S, self._script[0][0] if self._script else MAX_STEP_S)
            self._step(dt_s)
            left_s -= dt_s
            self._script = [(at_s - dt_s, act) for at_s, act in self._script]
            while self._script and self._script[0][0] <= 1e-9:
                getattr(self, f"_{self._script.pop(0)[1]}")()

    def _step(self, dt_s: float) -> None:
        """The physics of ``dt_s`` seconds: battery power is what the charger gives less what is drawn."""
        spec = self._spec
        drawn_w = self._drawn_w()
        speedup = 1.0
        if self.speed_kmh > 0:
            self.battery_power_w = -DRIVE_W * self.speed_kmh / DRIVE_KMH - drawn_w
            speedup = spec.driving_speedup
        elif self.plugged and self.grid:
            given_w = spec.charger_ac_w * (1 - LOSS_OF_CHARGING_SHARE)
            self.battery_power_w = (
                given_w - drawn_w if self.soc_pct < spec.charge_limit_pct else min(0.0, given_w - drawn_w)
            )
        else:
            self.battery_power_w = -drawn_w
        energy_wh = self.energy_wh + self.battery_power_w * dt_s / 3600 * speedup
        self.energy_wh = min(max(energy_wh, 0.05 * spec.capacity_wh), spec.capacity_wh)

    # -- the owner -----------------------------------------------------------------------------------------------------

    def do(self, action: Action, now_ms: int) -> None:
        """The owner does something; raises ConflictError where it is not possible now."""
        self.advance(now_ms)
        if self._script:
            raise ConflictError("the owner is busy driving off or coming back: wait a few seconds", code="owner_busy")
        if self.away and action not in {Action.COME_BACK, Action.POWER_CUT, Action.POWER_BACK}:
            raise ConflictError("the car is away: come-back first", code="car_away")
        if action is Action.DRIVE_OFF:
            self._script = list(_DRIVE_OFF)
        elif action is Action.COME_BACK:
            if not self.away:
                raise ConflictError("the car is not away", code="car_not_away")
            self._script = list(_COME_BACK)
        elif action is Action.UNPLUG:
            self._unlock_cable()
            self._pull_cable()
        elif action is Action.PLUG_IN:
            self.plugged = self.cable_locked = True
        elif action is Action.LOCK:
            self._shut_door()
            self._lock()
        elif action is Action.UNLOCK:
            self.locked = False
        elif action is Action.OPEN_DOOR:
            self._open_door()
        elif action is Action.CLOSE_DOOR:
            self._shut_door()
        else:
            self.grid = action is Action.POWER_BACK
        self.advance(now_ms)
        self._step(0.0)
        for callback in self._callbacks:
            callback()

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
        self.plugged = False

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
        charger_w = spec.charger_ac_w * (1 - LOSS_OF_CHARGING_SHARE)
        missing_wh = max(0.0, (spec.charge_limit_pct - self.soc_pct) / 100 * spec.capacity_wh)
        return Signals(
            gear_is_park=Reading(self.gear_is_park, now_ms),
            speed_kmh=Reading(self.speed_kmh, now_ms),
            ignition=Reading(self.ignition, now_ms),
            doors_open=Reading(self.door_open, now_ms),
            locked=Reading(self.locked, now_ms),
            seat_occupied=Reading(self.seat, now_ms),
            cable_connected=Reading(self.plugged, now_ms),
            cable_locked=Reading(self.cable_locked, now_ms),
            grid_power_available=Reading(self.grid and self.plugged, now_ms),
            battery_power_w=Reading(self.battery_power_w, now_ms),
            soc_displayed_pct=Reading(self.soc_pct, now_ms),
            charge_limit_pct=Reading(spec.charge_limit_pct, now_ms),
            charger_power_w=Reading(charger_w, now_ms),
            capacity_wh=Reading(spec.capacity_wh, now_ms),
            time_to_complete_s=Reading(missing_wh / charger_w * 3600, now_ms),
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
        )
