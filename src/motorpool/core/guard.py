"""The last word in the vehicle: may the computer work now, or which reasons stand against it.

Decides: permit or reasons, from the owner's policy, the verdict on the owner's consent, the vehicle's signals and a
short memory of what came before. A signal that is missing or too old, or says what cannot be, is a reason against,
never a reason for.
Must not: verify signatures, read a clock, talk to a network, or know of jobs, leases or customers.
Called by: ``agent.loop``, on every change of a signal and several times a second.

``IsCharging`` is not asked: a full battery on a live cable is the best time to compute, and "plugged" is not "fed": a
vehicle on a dead cable would compute from its battery, which the sign of the battery's power shows. It shows only while
the computer draws power, so such a "no" stays until something else speaks for the cable.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Generic, TypeVar

import msgspec

from motorpool.types import Permit, Reason, ReasonCode

T = TypeVar("T")
MINUTES_A_DAY: Final = 1440
FUTURE_TOLERANCE_MS: Final = 1000  # a reading may be this much ahead of the clock before it counts as stale
MIN_CHARGE_W: Final = 100.0  # less than this into the battery is "does not charge"
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


class Reading(msgspec.Struct, Generic[T], frozen=True):
    """One value of one signal and when it was measured."""

    value: T
    at_ms: int


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """What the vehicle says about itself; None is a signal that was never received.

    ``battery_power_w`` is positive into the battery. ``charger_power_w`` is what the charger can put into the battery
    when nothing else draws. ``time_to_complete_s`` is the vehicle's own estimate until ``charge_limit_pct``.
    ``soc_displayed_pct`` is what the owner sees: promises to the owner are made on it.
    """

    gear_is_park: Reading[bool] | None = None
    speed_kmh: Reading[float] | None = None
    ignition: Reading[LowVoltage] | None = None
    doors_open: Reading[bool] | None = None
    locked: Reading[bool] | None = None
    seat_occupied: Reading[Occupancy] | None = None
    cable_connected: Reading[bool] | None = None
    cable_locked: Reading[bool] | None = None
    grid_power_available: Reading[bool] | None = None
    battery_power_w: Reading[float] | None = None
    soc_displayed_pct: Reading[float] | None = None
    charge_limit_pct: Reading[float] | None = None
    charger_power_w: Reading[float] | None = None
    capacity_wh: Reading[float] | None = None
    time_to_complete_s: Reading[float] | None = None


# The greatest age of each signal. What tells of the owner is young; what changes over hours may be older.
MAX_AGE_MS: Final[dict[str, int]] = {
    "gear_is_park": 2_000,
    "speed_kmh": 2_000,
    "ignition": 2_000,
    "doors_open": 2_000,
    "locked": 2_000,
    "seat_occupied": 2_000,
    "cable_connected": 2_000,
    "cable_locked": 2_000,
    "grid_power_available": 5_000,
    "battery_power_w": 5_000,
    "soc_displayed_pct": 30_000,
    "charge_limit_pct": 60_000,
    "charger_power_w": 60_000,
    "capacity_wh": 600_000,
    "time_to_complete_s": 60_000,
}
assert set(MAX_AGE_MS) == set(Signals.__struct_fields__)

# What each number can be in a vehicle; anything else says nothing. (Any speed that is not 0 is a "no" by itself.)
POSSIBLE: Final[dict[str, tuple[float, float]]] = {
    "battery_power_w": (-1_000_000.0, 1_000_000.0),
    "soc_displayed_pct": (0.0, 100.0),
    "charge_limit_pct": (1.0, 100.0),
    "charger_power_w": (0.0, MAX_CHARGE_W),
    "capacity_wh": (1_000.0, 2_000_000.0),
    "time_to_complete_s": (0.0, 31 * 86_400.0),
}


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner set. ``ready_by_minute`` is a minute of the local day (None: no ready-by time).

    ``dwell_ms`` is how long everything must be fine before work starts again. ``permit_ms`` is how long a permit holds
    without a new decision: the vehicle stops by itself when the guard does not come back in time. When it did not look
    for ``blind_ms`` (the computer slept, or the clock was set), what was fine before says nothing, and the dwell begins
    anew. A battery that has fed the vehicle for ``battery_drain_grace_ms`` is left alone for ``battery_drain_wait_ms``,
    the next time for twice as long, and so on up to ``battery_drain_wait_max_ms``.
    """

    watts_w: int = 100
    floor_pct: float = 30.0
    ready_by_minute: int | None = None
    target_pct: float = 80.0
    utc_offset_min: int = 0
    ready_by_margin_ms: int = 15 * 60_000
    ready_by_margin_share: float = 0.1
    overdue_ms: int = 2 * 3600_000
    dwell_ms: int = 3_000
    battery_drain_w: float = 50.0
    battery_drain_grace_ms: int = 10_000
    battery_drain_wait_ms: int = 600_000
    battery_drain_wait_max_ms: int = 4 * 3600_000
    permit_ms: int = 2_000
    blind_ms: int = 10_000


class ConsentView(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on the owner's consent: valid, with the limits that the owner signed, or the reason why not."""

    refusal: ReasonCode | None = ReasonCode.CONSENT_MISSING
    max_watts_w: int = 0
    floor_pct: float = 100.0
    ready_by_minute: int | None = None
    target_pct: float = 100.0
    expires_ms: int = 0


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What the guard remembers: since when all is fine, since when the battery feeds the vehicle, its latest look.

    ``unfed_until_ms`` is how long a cable that left the battery to feed the vehicle counts as dead, and ``unfed_times``
    how often it did so.
    """

    fine_since_ms: int | None = None
    draining_since_ms: int | None = None
    unfed_until_ms: int | None = None
    unfed_times: int = 0
    looked_ms: int | None = None


Verdict = Permit | tuple[Reason, ...]


def decide(
    policy: Policy, consent: ConsentView, signals: Signals, history: History, now_ms: int
) -> tuple[Verdict, History]:
    """A permit, or every reason against one; and the memory to hand in the next time."""
    signals, impossible = _possible(signals)
    blind = history.looked_ms is not None and now_ms - history.looked_ms > policy.blind_ms
    if blind:  # nobody knows what was in between
        history = msgspec.structs.replace(history, fine_since_ms=None, draining_since_ms=None)
    seen = msgspec.structs.replace(_fed(policy, signals, history, now_ms), looked_ms=now_ms)
    faults = _faults(policy, consent, signals, seen, impossible=impossible, now_ms=now_ms)
    if faults:
        return tuple(faults), msgspec.structs.replace(seen, fine_since_ms=None)
    if seen.fine_since_ms is None:
        seen = msgspec.structs.replace(seen, fine_since_ms=now_ms)
    return _after_dwell(policy, consent, seen, now_ms), seen


def _possible(signals: Signals) -> tuple[Signals, frozenset[str]]:
    """The signals without those that say what cannot be, which count as missing, and the names of these."""
    wrong = set()
    for name, (low, high) in POSSIBLE.items():
        reading: Reading[float] | None = getattr(signals, name)
        if reading is not None and not low <= reading.value <= high:  # written so that NaN is wrong
            wrong.add(name)
    return msgspec.structs.replace(signals, **dict.fromkeys(wrong)), frozenset(wrong)


def _fed(policy: Policy, signals: Signals, history: History, now_ms: int) -> History:
    """Remember whether the cable feeds the vehicle.

    What speaks for a cable that once did not: it was out or without power in between, or it charges the battery, or a
    long time has passed.
    """
    power = signals.battery_power_w
    charging = power is not None and power.value >= MIN_CHARGE_W and _is_young("battery_power_w", power, now_ms)
    claims = [reading for reading in (signals.cable_connected, signals.grid_power_available) if reading is not None]
    if charging or any(claim.value is not True for claim in claims):
        return msgspec.structs.replace(history, draining_since_ms=None, unfed_until_ms=None, unfed_times=0)
    draining = power is not None and power.value < -policy.battery_drain_w
    since_ms = (now_ms if history.draining_since_ms is None else history.draining_since_ms) if draining else None
    until_ms, times = history.unfed_until_ms, history.unfed_times
    if until_ms is not None and now_ms >= until_ms:
        until_ms = None
    if until_ms is None and since_ms is not None and now_ms - since_ms >= policy.battery_drain_grace_ms:
        wait_ms = min(policy.battery_drain_wait_ms << min(times, 32), policy.battery_drain_wait_max_ms)
        until_ms, times = now_ms + wait_ms, times + 1
    return msgspec.structs.replace(history, draining_since_ms=since_ms, unfed_until_ms=until_ms, unfed_times=times)


def _after_dwell(policy: Policy, consent: ConsentView, history: History, now_ms: int) -> Verdict:
    if history.fine_since_ms is None or now_ms - history.fine_since_ms < policy.dwell_ms:
        return (Reason(code=ReasonCode.DWELL, detail="all is fine again; waiting a moment before work goes on"),)
    until_ms = min(now_ms + policy.permit_ms, consent.expires_ms)
    return Permit(watts_w=_watts_w(policy, consent), until_ms=until_ms)


def _watts_w(policy: Policy, consent: ConsentView) -> int:
    return min(policy.watts_w, consent.max_watts_w)


def _faults(
    policy: Policy, consent: ConsentView, signals: Signals, history: History, *, impossible: frozenset[str], now_ms: int
) -> list[Reason]:
    """Every reason but the dwell, in a fixed order."""
    reasons: list[Reason] = []
    if consent.refusal is not None:
        reasons.append(Reason(code=consent.refusal))
    elif _watts_w(policy, consent) <= 0:
        reasons.append(Reason(code=ReasonCode.CONSENT_INVALID, detail="the consent allows no power"))
    elif consent.expires_ms <= now_ms:
        reasons.append(Reason(code=ReasonCode.CONSENT_EXPIRED))
    _add_unreadable(signals, impossible, now_ms, reasons)
    _add_owner(signals, reasons)
    _add_power(signals, history, reasons)
    _add_charge(policy, consent, signals, now_ms, reasons)
    return reasons


def _is_young(name: str, reading: Reading[T], now_ms: int) -> bool:
    return -FUTURE_TOLERANCE_MS <= now_ms - reading.at_ms <= MAX_AGE_MS[name]


def _add_unreadable(signals: Signals, impossible: frozenset[str], now_ms: int, reasons: list[Reason]) -> None:
    for name in MAX_AGE_MS:
        reading: Reading[object] | None = getattr(signals, name)
        if reading is None:
            detail = f"{name} says what cannot be" if name in impossible else name
            reasons.append(Reason(code=ReasonCode.SIGNAL_MISSING, detail=detail))
        elif not _is_young(name, reading, now_ms):
            reasons.append(Reason(code=ReasonCode.SIGNAL_STALE, detail=name))


def _add_owner(signals: Signals, reasons: list[Reason]) -> None:
    """Is the owner here, coming or driving. Even an old reading that says so counts."""
    s = signals
    if s.speed_kmh is not None and not abs(s.speed_kmh.value) < 0.5:  # written so that NaN counts as moving
        reasons.append(Reason(code=ReasonCode.MOVING))
    if s.gear_is_park is not None and s.gear_is_park.value is not True:
        reasons.append(Reason(code=ReasonCode.NOT_IN_PARK))
    if s.ignition is not None and s.ignition.value not in {LowVoltage.LOCK, LowVoltage.OFF, LowVoltage.ACC}:
        reasons.append(Reason(code=ReasonCode.IGNITION_ON))
    if s.doors_open is not None and s.doors_open.value is not False:
        reasons.append(Reason(code=ReasonCode.DOOR_OPEN))
    if s.locked is not None and s.locked.value is not True:
        reasons.append(Reason(code=ReasonCode.UNLOCKED))
    if s.seat_occupied is not None and s.seat_occupied.value != Occupancy.EMPTY:
        reasons.append(Reason(code=ReasonCode.OCCUPIED))


def _add_power(signals: Signals, history: History, reasons: list[Reason]) -> None:
    """Is the vehicle plugged in, and does the grid really feed it."""
    s = signals
    if s.cable_connected is not None and s.cable_connected.value is not True:
        reasons.append(Reason(code=ReasonCode.NOT_PLUGGED_IN))
    if s.cable_locked is not None and s.cable_locked.value is not True:
        reasons.append(Reason(code=ReasonCode.CABLE_UNLOCKED))
    if s.grid_power_available is not None and s.grid_power_available.value is not True:
        reasons.append(Reason(code=ReasonCode.NO_GRID_POWER, detail="the cable carries no power"))
    elif history.unfed_until_ms is not None:
        fed = "feeds" if history.draining_since_ms is not None else "fed"
        reasons.append(Reason(code=ReasonCode.NO_GRID_POWER, detail=f"the battery {fed} the vehicle, not the cable"))


def _add_charge(policy: Policy, consent: ConsentView, signals: Signals, now_ms: int, reasons: list[Reason]) -> None:
    soc = signals.soc_displayed_pct
    floor_pct = max(policy.floor_pct, 0.0 if consent.refusal is not None else consent.floor_pct)
    if soc is not None and not soc.value >= floor_pct:
        reasons.append(Reason(code=ReasonCode.BELOW_FLOOR, detail=f"the floor is {floor_pct:g} %"))
    wishes = [(policy.ready_by_minute, policy.target_pct)]
    if consent.refusal is None:
        wishes.append((consent.ready_by_minute, consent.target_pct))
    for minute, target_pct in wishes:
        if minute is None:
            continue
        day_ms = MINUTES_A_DAY * 60_000
        to_go_ms = (minute * 60_000 - now_ms - policy.utc_offset_min * 60_000) % day_ms
        overdue = day_ms - to_go_ms < policy.overdue_ms
        watts_w = _watts_w(policy, consent) if consent.refusal is None else policy.watts_w
        if _short_of_charge(policy, signals, watts_w, target_pct, 0 if overdue else to_go_ms):
            detail = f"{target_pct:g} % by {minute // 60:02d}:{minute % 60:02d}"
            reasons.append(Reason(code=ReasonCode.READY_BY_AT_RISK, detail=detail))
            return


def _short_of_charge(policy: Policy, signals: Signals, watts_w: int, target_pct: float, to_go_ms: int) -> bool:
    """Would computing at ``watts_w`` from now on leave the owner below the target in ``to_go_ms``.

    The counterfactual in its first form: all the power that computing draws is missing in the battery. The target is
    never above the charge limit, because charging stops there without us too. Shortly after a ready-by time that was
    missed, nothing is left to go, and charging still comes first.
    """
    s = signals
    if s.soc_displayed_pct is None or s.charge_limit_pct is None or s.capacity_wh is None or s.charger_power_w is None:
        return False  # the missing signal is a reason of its own
    short_pct = min(target_pct, s.charge_limit_pct.value) - s.soc_displayed_pct.value
    if short_pct <= 0:
        return False
    left_w = s.charger_power_w.value - watts_w
    if not MIN_CHARGE_W <= left_w < MAX_CHARGE_W or not s.capacity_wh.value > 0:
        return True  # it would not charge, or these are no readings of a charger and a battery
    needed_s = short_pct / 100 * s.capacity_wh.value / left_w * 3600
    above_pct = s.charge_limit_pct.value - s.soc_displayed_pct.value
    if s.time_to_complete_s is not None and above_pct > 0:
        own_s = s.time_to_complete_s.value * short_pct / above_pct * s.charger_power_w.value / left_w
        needed_s = max(needed_s, own_s)
    needed_ms = needed_s * 1000 * (1 + policy.ready_by_margin_share) + policy.ready_by_margin_ms
    return not needed_ms <= to_go_ms
