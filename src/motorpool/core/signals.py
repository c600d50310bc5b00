"""What a vehicle says about itself: every signal with its unit, its greatest age and what it means when it is missing.

Decides: which readings count (young enough, possible in a vehicle) and which safe meaning stands in for the others.
Must not: judge whether work is allowed (``core.guard`` does), know where signals come from, or read a clock.
Called by: ``core.guard``, the sources of signals in ``agent.signals``, and the reference in the docs.

The names of COVESA's Vehicle Signal Specification that feed each signal stand in ``agent.signals.vss``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Generic, TypeVar

import msgspec

T = TypeVar("T")
FUTURE_TOLERANCE_MS: Final = 1000  # a reading may be this much ahead of the clock before it counts as stale
MAX_CHARGE_W: Final = 1_000_000.0  # no charger gives more


class LowVoltage(StrEnum):
    """State of the low-voltage system, as in COVESA VSS; ON means that the drive is released."""

    UNDEFINED = "UNDEFINED"
    LOCK = "LOCK"
    OFF = "OFF"
    ACC = "ACC"
    ON = "ON"
    START = "START"


class Occupancy(StrEnum):
    """Is somebody in the driver's seat. UNKNOWN counts as occupied."""

    UNKNOWN = "UNKNOWN"
    OCCUPIED = "OCCUPIED"
    EMPTY = "EMPTY"


class DriverMode(StrEnum):
    """Who has the car. Everything but OWNER suspends the consent until the owner confirms it again."""

    UNKNOWN = "UNKNOWN"
    OWNER = "OWNER"
    GUEST = "GUEST"
    VALET = "VALET"
    SERVICE = "SERVICE"


class NetworkClass(StrEnum):
    """What a byte costs on the network that the vehicle uses now. UNKNOWN counts as METERED."""

    UNKNOWN = "UNKNOWN"
    NONE = "NONE"
    UNMETERED = "UNMETERED"
    METERED = "METERED"
    ROAMING = "ROAMING"


class Reading(msgspec.Struct, Generic[T], frozen=True):
    """One value of one signal and when it was measured."""

    value: T
    at_ms: int


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """What the vehicle says about itself; None is a signal that was never received. ``TABLE`` explains each one."""

    # the owner, and who else has the car
    gear_is_park: Reading[bool] | None = None
    speed_kmh: Reading[float] | None = None
    ignition: Reading[LowVoltage] | None = None
    doors_open: Reading[bool] | None = None
    locked: Reading[bool] | None = None
    seat_occupied: Reading[Occupancy] | None = None
    preconditioning: Reading[bool] | None = None
    driver_mode: Reading[DriverMode] | None = None
    update_in_progress: Reading[bool] | None = None
    # the cable and the battery
    cable_connected: Reading[bool] | None = None
    cable_locked: Reading[bool] | None = None
    grid_power_available: Reading[bool] | None = None
    feeding_grid: Reading[bool] | None = None
    battery_power_w: Reading[float] | None = None
    soc_displayed_pct: Reading[float] | None = None
    charge_limit_pct: Reading[float] | None = None
    charger_power_w: Reading[float] | None = None
    capacity_wh: Reading[float] | None = None
    time_to_complete_s: Reading[float] | None = None
    # health
    pack_temp_c: Reading[float] | None = None
    computer_temp_c: Reading[float] | None = None
    dcdc_temp_c: Reading[float] | None = None
    low_voltage_v: Reading[float] | None = None
    fault_count: Reading[int] | None = None
    # hints: nothing is allowed because of them, and they may be missing
    ac_power_w: Reading[float] | None = None
    circuit_limit_w: Reading[float] | None = None
    power_optimize_level: Reading[int] | None = None
    computer_power_w: Reading[float] | None = None
    departure_ms: Reading[int] | None = None
    network: Reading[NetworkClass] | None = None
    region: Reading[str] | None = None


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """One signal: unit, greatest age, what it can be in a vehicle, and what a missing or stale one is taken for.

    Without a ``needed`` signal there is no permit. One that a model of car ``may_lack`` can be declared absent in the
    vehicle's profile (``Policy.lacks``), which the owner can read. Every other is a hint, whose ``missing`` says which
    cautious value the guard takes instead.
    """

    unit: str
    max_age_ms: int
    what: str
    missing: str
    needed: bool = True
    may_lack: bool = False
    low: float | None = None
    high: float | None = None


_OWNER_MS: Final = 2_000
_NO: Final = "no work"
TABLE: Final[dict[str, Spec]] = {
    "gear_is_park": Spec(unit="", max_age_ms=_OWNER_MS, what="the gear lever is in park", missing=_NO),
    "speed_kmh": Spec(unit="km/h", max_age_ms=_OWNER_MS, what="speed; anything but 0 is driving", missing=_NO),
    "ignition": Spec(unit="", max_age_ms=_OWNER_MS, what="state of the low-voltage system", missing=_NO),
    "doors_open": Spec(unit="", max_age_ms=_OWNER_MS, what="any door is open", missing=_NO),
    "locked": Spec(unit="", max_age_ms=_OWNER_MS, what="every door is locked", missing=_NO),
    "seat_occupied": Spec(unit="", max_age_ms=_OWNER_MS, what="somebody is in the driver's seat", missing=_NO),
    "preconditioning": Spec(
        unit="",
        max_age_ms=5_000,
        what="cabin or battery are being made ready for a drive",
        missing=_NO,
        may_lack=True,
    ),
    "driver_mode": Spec(
        unit="",
        max_age_ms=10_000,
        what="the owner has the car, not a guest, a valet or a workshop",
        missing=_NO,
        may_lack=True,
    ),
    "update_in_progress": Spec(
        unit="", max_age_ms=10_000, what="the car installs software", missing=_NO, may_lack=True
    ),
    "cable_connected": Spec(unit="", max_age_ms=_OWNER_MS, what="the charging cable is in", missing=_NO),
    "cable_locked": Spec(unit="", max_age_ms=_OWNER_MS, what="the cable is locked", missing=_NO),
    "grid_power_available": Spec(unit="", max_age_ms=5_000, what="the cable carries power", missing=_NO),
    "feeding_grid": Spec(
        unit="", max_age_ms=5_000, what="the battery feeds the house or the grid", missing=_NO, may_lack=True
    ),
    "battery_power_w": Spec(
        unit="W",
        max_age_ms=5_000,
        what="power into the battery; negative out of it",
        missing=_NO,
        low=-1_000_000.0,
        high=1_000_000.0,
    ),
    "soc_displayed_pct": Spec(
        unit="%", max_age_ms=30_000, what="charge as the owner sees it", missing=_NO, low=0.0, high=100.0
    ),
    "charge_limit_pct": Spec(
        unit="%", max_age_ms=60_000, what="where charging stops", missing=_NO, low=1.0, high=100.0
    ),
    "charger_power_w": Spec(
        unit="W",
        max_age_ms=60_000,
        what="what the charger can put into the battery when nothing else draws",
        missing=_NO,
        low=0.0,
        high=MAX_CHARGE_W,
    ),
    "capacity_wh": Spec(
        unit="Wh",
        max_age_ms=600_000,
        what="energy of a full battery",
        missing=_NO,
        low=1_000.0,
        high=2_000_000.0,
    ),
    "time_to_complete_s": Spec(
        unit="s",
        max_age_ms=60_000,
        what="the car's own estimate until the charge limit",
        missing=_NO,
        low=0.0,
        high=31 * 86_400.0,
    ),
    "pack_temp_c": Spec(
        unit="Celsius", max_age_ms=20_000, what="hottest cell of the battery", missing=_NO, low=-60.0, high=150.0
    ),
    "computer_temp_c": Spec(
        unit="Celsius", max_age_ms=5_000, what="hottest part of the computer", missing=_NO, low=-60.0, high=200.0
    ),
    "dcdc_temp_c": Spec(
        unit="Celsius",
        max_age_ms=20_000,
        what="DC/DC converter",
        missing=_NO,
        may_lack=True,
        low=-60.0,
        high=200.0,
    ),
    "low_voltage_v": Spec(unit="V", max_age_ms=20_000, what="12 V battery", missing=_NO, low=0.0, high=60.0),
    "fault_count": Spec(
        unit="", max_age_ms=20_000, what="error codes of battery and drive", missing=_NO, low=0, high=1e6
    ),
    "ac_power_w": Spec(
        unit="W",
        max_age_ms=10_000,
        what="power drawn at the inlet",
        missing="the charger draws all it can",
        needed=False,
        low=-1_000_000.0,
        high=1_000_000.0,
    ),
    "circuit_limit_w": Spec(
        unit="W",
        max_age_ms=60_000,
        what="what the charging point allows",
        missing="no more than the charger alone draws",
        needed=False,
        low=0.0,
        high=MAX_CHARGE_W,
    ),
    "power_optimize_level": Spec(
        unit="",
        max_age_ms=60_000,
        what="the car's own wish to save power, 0 to 10",
        missing="no wish",
        needed=False,
        low=0,
        high=10,
    ),
    "computer_power_w": Spec(
        unit="W",
        max_age_ms=5_000,
        what="power of the computer as the car measures it",
        missing="power is modelled, and marked as such",
        needed=False,
        low=0.0,
        high=100_000.0,
    ),
    "departure_ms": Spec(
        unit="ms",
        max_age_ms=600_000,
        what="when the car or the charging point was told that it leaves",
        missing="only the owner's own times and the forecast count",
        needed=False,
    ),
    "network": Spec(unit="", max_age_ms=30_000, what="what a byte costs now", missing="metered", needed=False),
    "region": Spec(
        unit="",
        max_age_ms=120_000,
        what="code of the region, found in the car",
        missing="in no region: no work that is bound to one",
        needed=False,
    ),
}
assert tuple(TABLE) == Signals.__struct_fields__
MAX_AGE_MS: Final[dict[str, int]] = {name: spec.max_age_ms for name, spec in TABLE.items()}
NEEDED: Final = tuple(name for name, spec in TABLE.items() if spec.needed)
MAY_LACK: Final = frozenset(name for name, spec in TABLE.items() if spec.may_lack)
# What each number can be in a vehicle; anything else says nothing. (Any speed that is not 0 is a "no" by itself.)
POSSIBLE: Final[dict[str, tuple[float, float]]] = {
    name: (spec.low, spec.high) for name, spec in TABLE.items() if spec.low is not None and spec.high is not None
}


def is_young(name: str, reading: Reading[T], now_ms: int) -> bool:
    """Whether a reading of the signal ``name`` is not older than its greatest age, and not from the future."""
    return -FUTURE_TOLERANCE_MS <= now_ms - reading.at_ms <= MAX_AGE_MS[name]


def possible(signals: Signals) -> tuple[Signals, frozenset[str]]:
    """The signals without those that say what cannot be, which count as missing, and the names of these."""
    wrong = set()
    for name, (low, high) in POSSIBLE.items():
        reading: Reading[float] | None = getattr(signals, name)
        if reading is not None and not low <= reading.value <= high:  # written so that NaN is wrong
            wrong.add(name)
    if not wrong:
        return signals, frozenset()
    return msgspec.structs.replace(signals, **dict.fromkeys(wrong)), frozenset(wrong)


def value_of(name: str, reading: Reading[T] | None, now_ms: int) -> T | None:
    """The value of a hint if it is there and young; None stands for the cautious meaning in ``TABLE``."""
    return reading.value if reading is not None and is_young(name, reading, now_ms) else None
