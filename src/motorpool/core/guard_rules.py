"""The guard's rules, one function each: a look at the vehicle in, reasons against work out.

Decides: each rule adds the reasons that it sees to a list; ``power_w`` says how much power is left where none does.
Must not: remember anything (``core.guard`` does), or call one another.
Called by: ``core.guard``, in the order of ``RULES``. Tests take single rules out to show what each is good for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Final

import msgspec

from motorpool.core.budgets import HOUR_MS
from motorpool.core.policy import MINUTES_A_DAY, Budgets, ConsentView, Ladder, Policy, ReadyBy
from motorpool.core.signals import (
    MAX_CHARGE_W,
    MAY_LACK,
    NEEDED,
    DriverMode,
    LowVoltage,
    NetworkClass,
    Occupancy,
    Reading,
    Signals,
    is_young,
    value_of,
)
from motorpool.types import ModelTier, Reason, ReasonCode

MIN_CHARGE_W: Final = 100.0  # less than this into the battery is "does not charge"
_DAY_MS: Final = MINUTES_A_DAY * 60_000
_FIRST_WEEKDAY: Final = 3  # 1970-01-01 was a Thursday; Monday is 0
_PARKED: Final = frozenset({LowVoltage.LOCK, LowVoltage.OFF, LowVoltage.ACC})
# What only a person does: it says nothing about a flapping signal.
OWNER_CODES: Final = frozenset(
    {
        ReasonCode.CONSENT_MISSING,
        ReasonCode.CONSENT_INVALID,
        ReasonCode.CONSENT_EXPIRED,
        ReasonCode.CONSENT_WITHDRAWN,
        ReasonCode.CONSENT_SUSPENDED,
        ReasonCode.PAUSED,
        ReasonCode.QUIET_HOURS,
        ReasonCode.MOVING,
        ReasonCode.NOT_IN_PARK,
        ReasonCode.IGNITION_ON,
        ReasonCode.DOOR_OPEN,
        ReasonCode.UNLOCKED,
        ReasonCode.OCCUPIED,
        ReasonCode.NOT_PLUGGED_IN,
        ReasonCode.CABLE_UNLOCKED,
        ReasonCode.PRECONDITIONING,
    }
)


class Heat(IntEnum):
    """Rungs of the thermal ladder."""

    COOL = 0
    REDUCED = 1
    SMALL = 2
    OFF = 3


class Look(msgspec.Struct, kw_only=True):
    """All that the rules see; from ``against`` on, the guard's memory. ``last_w`` is the latest permit's power."""

    policy: Policy
    consent: ConsentView
    signals: Signals
    impossible: frozenset[str]
    budgets: Budgets
    now_ms: int
    against: frozenset[ReasonCode]
    heat: Heat
    last_w: int
    unfed: bool
    draining: bool
    suspended_ms: int | None
    fault_until_ms: int | None

    @property
    def watts_w(self) -> int:
        """The power that profile and consent allow, whatever the signals say."""
        return min(self.policy.watts_w, self.consent.max_watts_w)

    @property
    def away_from_grid(self) -> bool:
        """The cable is out, or carries nothing."""
        s = self.signals
        unplugged = s.cable_connected is not None and s.cable_connected.value is not True
        dead = s.grid_power_available is not None and s.grid_power_available.value is not True
        return unplugged or dead or self.unfed

    @property
    def from_battery(self) -> bool:
        """Whether work would run from the battery because the owner has allowed that separately."""
        return self.consent.battery_watts_w > 0 and self.away_from_grid

    @property
    def charging(self) -> bool:
        """Whether the battery is being charged."""
        power = self.signals.battery_power_w
        return power is not None and power.value >= MIN_CHARGE_W


Rule = Callable[[Look, list[Reason]], None]


# -- the owner's word --------------------------------------------------------------------------------------------------


def consent_holds(look: Look, reasons: list[Reason]) -> None:
    """There is a consent that allows some power and is not over."""
    consent = look.consent
    if consent.refusal is not None:
        reasons.append(Reason(code=consent.refusal))
    elif look.watts_w <= 0:
        reasons.append(Reason(code=ReasonCode.CONSENT_INVALID, detail="the consent allows no power"))
    elif consent.expires_ms <= look.now_ms:
        reasons.append(Reason(code=ReasonCode.CONSENT_EXPIRED))


def owner_has_the_car(look: Look, reasons: list[Reason]) -> None:
    """Nobody else has the car, nor had it since the owner has confirmed the consent."""
    mode = look.signals.driver_mode
    if mode is not None and mode.value is not DriverMode.OWNER:
        reasons.append(Reason(code=ReasonCode.CONSENT_SUSPENDED, detail=f"driver mode: {mode.value.lower()}"))
    elif look.suspended_ms is not None and look.consent.granted_ms <= look.suspended_ms:
        detail = "somebody else had the car; confirm your consent to go on"
        reasons.append(Reason(code=ReasonCode.CONSENT_SUSPENDED, detail=detail))


def not_paused(look: Look, reasons: list[Reason]) -> None:
    """The owner has not said "not now"."""
    if look.now_ms < look.consent.paused_until_ms:
        reasons.append(Reason(code=ReasonCode.PAUSED))


def outside_quiet_hours(look: Look, reasons: list[Reason]) -> None:
    """It is none of the owner's quiet hours."""
    day, minute = _local(look, look.policy.utc_offset_min)
    for quiet in look.consent.quiet:
        from_, to = quiet.from_minute, quiet.to_minute
        if from_ < to:
            inside = from_ <= minute < to and _is_on(quiet.weekdays, day)
        else:  # over midnight
            inside = (minute >= from_ and _is_on(quiet.weekdays, day)) or (
                minute < to and _is_on(quiet.weekdays, day - 1)
            )
        if inside:
            reasons.append(Reason(code=ReasonCode.QUIET_HOURS, detail=f"{_clock(from_)} to {_clock(to)}"))
            return


def _local(look: Look, offset_min: int) -> tuple[int, int]:
    """The number of the local day since 1970, and the minute of it."""
    local_min = look.now_ms // 60_000 + offset_min
    return local_min // MINUTES_A_DAY, local_min % MINUTES_A_DAY


def _is_on(weekdays: int, day: int) -> bool:
    return bool(weekdays >> (day + _FIRST_WEEKDAY) % 7 & 1)


def _clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


# -- signals -----------------------------------------------------------------------------------------------------------


def signals_are_known(look: Look, reasons: list[Reason]) -> None:
    """Every needed signal is there, possible and young."""
    lacks = look.policy.lacks & MAY_LACK
    signals, now_ms = look.signals, look.now_ms
    for name in NEEDED:
        reading: Reading[object] | None = getattr(signals, name)
        if reading is None:
            if name in look.impossible:
                reasons.append(Reason(code=ReasonCode.SIGNAL_MISSING, detail=f"{name} says what cannot be"))
            elif name not in lacks:
                reasons.append(Reason(code=ReasonCode.SIGNAL_MISSING, detail=name))
        elif not is_young(name, reading, now_ms):
            reasons.append(Reason(code=ReasonCode.SIGNAL_STALE, detail=name))


# -- is the owner here, coming or driving. Even an old reading that says so counts -------------------------------------


def standing(look: Look, reasons: list[Reason]) -> None:
    """The car does not move."""
    speed = look.signals.speed_kmh
    if speed is not None and not abs(speed.value) < 0.5:  # written so that NaN counts as moving
        reasons.append(Reason(code=ReasonCode.MOVING))


def in_park(look: Look, reasons: list[Reason]) -> None:
    """The gear lever is in park."""
    gear = look.signals.gear_is_park
    if gear is not None and gear.value is not True:
        reasons.append(Reason(code=ReasonCode.NOT_IN_PARK))


def switched_off(look: Look, reasons: list[Reason]) -> None:
    """The drive is not released."""
    ignition = look.signals.ignition
    if ignition is not None and ignition.value not in _PARKED:
        reasons.append(Reason(code=ReasonCode.IGNITION_ON))


def doors_shut(look: Look, reasons: list[Reason]) -> None:
    """No door is open."""
    doors = look.signals.doors_open
    if doors is not None and doors.value is not False:
        reasons.append(Reason(code=ReasonCode.DOOR_OPEN))


def doors_locked(look: Look, reasons: list[Reason]) -> None:
    """Every door is locked."""
    locked = look.signals.locked
    if locked is not None and locked.value is not True:
        reasons.append(Reason(code=ReasonCode.UNLOCKED))


def seat_empty(look: Look, reasons: list[Reason]) -> None:
    """Nobody is in the driver's seat."""
    seat = look.signals.seat_occupied
    if seat is not None and seat.value is not Occupancy.EMPTY:
        reasons.append(Reason(code=ReasonCode.OCCUPIED))


def not_preconditioning(look: Look, reasons: list[Reason]) -> None:
    """The car is not being made ready for a drive."""
    preparing = look.signals.preconditioning
    if preparing is not None and preparing.value is not False:
        reasons.append(Reason(code=ReasonCode.PRECONDITIONING))


def not_updating(look: Look, reasons: list[Reason]) -> None:
    """The car does not install software."""
    updating = look.signals.update_in_progress
    if updating is not None and updating.value is not False:
        reasons.append(Reason(code=ReasonCode.UPDATE_IN_PROGRESS))


# -- the cable, the battery, the circuit -------------------------------------------------------------------------------


def plugged_and_fed(look: Look, reasons: list[Reason]) -> None:
    """The cable is in and locked, and the grid really feeds the vehicle, unless the owner allows the battery."""
    s = look.signals
    unplugged = s.cable_connected is not None and s.cable_connected.value is not True
    if s.cable_locked is not None and s.cable_locked.value is not True and not (unplugged and look.from_battery):
        reasons.append(Reason(code=ReasonCode.CABLE_UNLOCKED))
    if look.from_battery:
        return
    if unplugged:
        reasons.append(Reason(code=ReasonCode.NOT_PLUGGED_IN))
    if s.grid_power_available is not None and s.grid_power_available.value is not True:
        reasons.append(Reason(code=ReasonCode.NO_GRID_POWER, detail="the cable carries no power"))
    elif look.unfed:
        fed = "feeds" if look.draining else "fed"
        reasons.append(Reason(code=ReasonCode.NO_GRID_POWER, detail=f"the battery {fed} the vehicle, not the cable"))


def not_feeding_grid(look: Look, reasons: list[Reason]) -> None:
    """The battery is not being sold to the house or the grid."""
    feeding = look.signals.feeding_grid
    if feeding is not None and feeding.value is not False:
        reasons.append(Reason(code=ReasonCode.FEEDING_GRID))


def above_floor(look: Look, reasons: list[Reason]) -> None:
    """The battery is above every floor, and by a margin once it was below."""
    soc = look.signals.soc_displayed_pct
    floor_pct = _floor_pct(look)
    margin_pct = look.policy.floor_hysteresis_pct if ReasonCode.BELOW_FLOOR in look.against else 0.0
    if soc is not None and not soc.value >= min(floor_pct + margin_pct, 100.0):
        reasons.append(Reason(code=ReasonCode.BELOW_FLOOR, detail=f"the floor is {floor_pct:g} %"))


def _floor_pct(look: Look) -> float:
    if look.consent.refusal is not None:
        return look.policy.floor_pct
    floor_pct = max(look.policy.floor_pct, look.consent.floor_pct)
    if look.from_battery:  # nothing that the owner wants to find is taken
        targets = [wish.target_pct for wish in _wishes(look)]
        floor_pct = max([floor_pct, look.consent.battery_floor_pct, *targets])
    return floor_pct


def _wishes(look: Look) -> Iterator[ReadyBy]:
    policy, consent = look.policy, look.consent
    if policy.ready_by_minute is not None:
        yield ReadyBy(minute=policy.ready_by_minute, target_pct=policy.target_pct)
    if consent.refusal is None:
        if consent.ready_by_minute is not None:
            yield ReadyBy(minute=consent.ready_by_minute, target_pct=consent.target_pct)
        yield from consent.schedule


def ready_in_time(look: Look, reasons: list[Reason]) -> None:
    """With the computer at work from now on, the battery is still where the owner wants it at each ready-by time.

    Where computing may take from the charging power, that is the charge limit itself: what the battery would have
    without us.
    """
    policy = look.policy
    margin_ms = policy.ready_by_margin_ms
    if ReasonCode.READY_BY_AT_RISK in look.against:
        margin_ms += policy.ready_by_hysteresis_ms
    for wish in _wishes(look):
        target_pct = 100.0 if look.consent.share_while_charging else wish.target_pct
        if _short_of_charge(look, target_pct, _to_go_ms(look, wish), margin_ms):
            detail = f"{wish.target_pct:g} % by {_clock(wish.minute)}"
            reasons.append(Reason(code=ReasonCode.READY_BY_AT_RISK, detail=detail))
            return
    departure_ms = value_of("departure_ms", look.signals.departure_ms, look.now_ms)
    if departure_ms is not None and departure_ms > look.now_ms - policy.overdue_ms:
        to_go_ms = max(0, departure_ms - look.now_ms)
        if _short_of_charge(look, 100.0, to_go_ms, margin_ms):
            detail = "the charge limit by the departure that the car was told"
            reasons.append(Reason(code=ReasonCode.READY_BY_AT_RISK, detail=detail))


def _to_go_ms(look: Look, wish: ReadyBy) -> int:
    """Until the next ready-by time; 0 for a while after one. The less convenient of two offsets of local time."""
    policy = look.policy
    offsets = {policy.utc_offset_min}
    if policy.utc_offset_next_min is not None:
        offsets.add(policy.utc_offset_next_min)
    return min(_until_ms(look, wish, offset_min) for offset_min in offsets)


def _until_ms(look: Look, wish: ReadyBy, offset_min: int) -> int:
    local_ms = look.now_ms + offset_min * 60_000
    today = local_ms // _DAY_MS
    at_ms = wish.minute * 60_000
    for day in (today - 1, today):
        late_ms = local_ms - day * _DAY_MS - at_ms
        if _is_on(wish.weekdays, day) and 0 <= late_ms < look.policy.overdue_ms:
            return 0  # missed perhaps: charging still comes first
    for day in range(today, today + 9):
        to_go_ms = day * _DAY_MS + at_ms - local_ms
        if to_go_ms > 0 and _is_on(wish.weekdays, day):
            return to_go_ms
    return 9 * _DAY_MS  # no weekday at all


def _short_of_charge(look: Look, target_pct: float, to_go_ms: int, margin_ms: int) -> bool:
    """Would computing from now on leave the owner below the target in ``to_go_ms``.

    All the power that computing draws is taken to be missing in the battery. The target is never above the charge
    limit, because charging stops there without us too. Shortly after a ready-by time that was missed, nothing is left
    to go, and charging still comes first.
    """
    s = look.signals
    if s.soc_displayed_pct is None or s.charge_limit_pct is None or s.capacity_wh is None or s.charger_power_w is None:
        return False  # the missing signal is a reason of its own
    short_pct = min(target_pct, s.charge_limit_pct.value) - s.soc_displayed_pct.value
    if short_pct <= 0:
        return False
    watts_w = look.watts_w if look.consent.refusal is None else look.policy.watts_w
    left_w = s.charger_power_w.value - watts_w
    if not MIN_CHARGE_W <= left_w < MAX_CHARGE_W or not s.capacity_wh.value > 0:
        return True  # it would not charge, or these are no readings of a charger and a battery
    needed_s = short_pct / 100 * s.capacity_wh.value / left_w * 3600
    above_pct = s.charge_limit_pct.value - s.soc_displayed_pct.value
    if s.time_to_complete_s is not None and above_pct > 0:
        own_s = s.time_to_complete_s.value * short_pct / above_pct * s.charger_power_w.value / left_w
        needed_s = max(needed_s, own_s)
    needed_ms = needed_s * 1000 * (1 + look.policy.ready_by_margin_share) + margin_ms
    return not needed_ms <= to_go_ms


def charging_first(look: Look, reasons: list[Reason]) -> None:
    """While the battery charges, computing takes only what the charger can give beside that."""
    if look.consent.share_while_charging and any(True for _ in _wishes(look)):
        return  # the owner has allowed it, and ready_in_time sees to the battery
    room_w = beside_charging_w(look)
    if room_w is not None and room_w < max(look.policy.min_watts_w, look.last_w):
        detail = "the charger has nothing left beside charging the battery"
        reasons.append(Reason(code=ReasonCode.CHARGING_FIRST, detail=detail))


def beside_charging_w(look: Look) -> float | None:
    """What the charger can give beside what the battery takes; None where the battery does not charge.

    A charger at its limit looks alike whether the battery takes all of it or the computer a part. So there has to be a
    margin left, beside all that the latest permit allowed; where there is not, work stops, and the battery shows what
    it takes.
    """
    power, most = look.signals.battery_power_w, look.signals.charger_power_w
    if power is None or most is None or not look.charging:
        return None
    return most.value - power.value - look.policy.charging_margin_w


def within_circuit(look: Look, reasons: list[Reason]) -> None:
    """Charging and computing stay within what the circuit carries, and computing within what the charger gives."""
    room_w = circuit_room_w(look)
    if room_w is not None and room_w < look.policy.min_watts_w:
        reasons.append(Reason(code=ReasonCode.CIRCUIT_LIMIT, detail="charging needs all that the circuit carries"))


def circuit_room_w(look: Look) -> float | None:
    """What circuit and charger carry beside what is drawn already; None where work would run from the battery.

    More than the charger gives would come out of the battery, cable or not.
    """
    s, policy = look.signals, look.policy
    if look.away_from_grid or s.charger_power_w is None:
        return None
    charger_ac_w = s.charger_power_w.value / policy.ac_efficiency
    limits = [value_of("circuit_limit_w", s.circuit_limit_w, look.now_ms), policy.circuit_limit_w]
    limit_w = min((limit for limit in limits if limit is not None), default=charger_ac_w)
    drawn_w = value_of("ac_power_w", s.ac_power_w, look.now_ms)
    if drawn_w is None:
        drawn_w = charger_ac_w if look.charging else 0.0
    room_w = (limit_w - max(drawn_w, 0.0)) * policy.ac_efficiency
    return min(room_w, s.charger_power_w.value - policy.charging_margin_w)


# -- heat and health ---------------------------------------------------------------------------------------------------


def hottest(policy: Policy, signals: Signals, margin_c: float) -> Heat:
    """The highest rung that any temperature asks for, were all of them ``margin_c`` higher."""
    readings: tuple[tuple[Ladder, Reading[float] | None], ...] = (
        (policy.pack, signals.pack_temp_c),
        (policy.computer, signals.computer_temp_c),
        (policy.dcdc, signals.dcdc_temp_c),
    )
    heat = Heat.COOL
    for ladder, reading in readings:
        if reading is None:
            continue  # a missing one is a reason of its own
        temp_c = reading.value + margin_c
        if temp_c < ladder.reduced_c:
            continue
        rung = Heat.REDUCED if temp_c < ladder.small_c else Heat.SMALL if temp_c < ladder.off_c else Heat.OFF
        heat = max(heat, rung)
    return heat


def cool_enough(look: Look, reasons: list[Reason]) -> None:
    """The thermal ladder has a rung left."""
    if look.heat is Heat.OFF:
        reasons.append(Reason(code=ReasonCode.TOO_HOT))
    elif look.heat is Heat.SMALL and not look.policy.has_small_model:
        reasons.append(Reason(code=ReasonCode.TOO_HOT, detail="and there is no smaller model"))


def low_voltage_fine(look: Look, reasons: list[Reason]) -> None:
    """The 12 V battery is not being emptied."""
    volts = look.signals.low_voltage_v
    policy = look.policy
    least_v = policy.low_voltage_on_v if ReasonCode.LOW_12V in look.against else policy.low_voltage_off_v
    if volts is not None and not volts.value >= least_v:
        reasons.append(Reason(code=ReasonCode.LOW_12V))


def without_faults(look: Look, reasons: list[Reason]) -> None:
    """The car has no error codes, and has had none for a while."""
    faults = look.signals.fault_count
    if faults is not None and faults.value != 0:
        reasons.append(Reason(code=ReasonCode.FAULT))
    elif look.fault_until_ms is not None and look.now_ms < look.fault_until_ms:
        reasons.append(Reason(code=ReasonCode.FAULT, detail="cleared; waiting a while"))


def not_saving_power(look: Look, reasons: list[Reason]) -> None:
    """The car itself does not ask for less."""
    level = value_of("power_optimize_level", look.signals.power_optimize_level, look.now_ms)
    if level is not None and level >= look.policy.power_saving_level:
        reasons.append(Reason(code=ReasonCode.POWER_SAVING))


# -- budgets and money -------------------------------------------------------------------------------------------------


def within_budgets(look: Look, reasons: list[Reason]) -> None:
    """No rolling budget is used up."""
    used = look.budgets.used
    if used.unknown:
        detail = "the record of what was used cannot be read"
        reasons.append(Reason(code=ReasonCode.BUDGET_UNKNOWN, detail=detail))
        return
    limits = look.policy.budgets.tightest(look.consent.limits)
    over = [
        name
        for name, amount, most in (
            ("hours of computing", used.compute_ms, limits.compute_h_week * HOUR_MS),
            ("hours weighted by temperature", used.weighted_ms, limits.weighted_h_week * HOUR_MS),
            ("energy through the battery", used.battery_mwh, limits.battery_wh_week * 1000),
            ("bytes written", used.flash_bytes, limits.flash_bytes_month),
        )
        if not amount < most
    ]
    if over:
        reasons.append(Reason(code=ReasonCode.BUDGET_USED_UP, detail=", ".join(over)))


def network_is_free(look: Look, reasons: list[Reason]) -> None:
    """The network costs nothing, or the owner allows mobile data and has some left. No network at all is fine."""
    network = value_of("network", look.signals.network, look.now_ms) or look.policy.network
    if network in {NetworkClass.UNMETERED, NetworkClass.NONE}:
        return
    limits = look.policy.budgets.tightest(look.consent.limits)
    if network is NetworkClass.ROAMING or look.budgets.used.metered_bytes >= limits.metered_bytes_month:
        reasons.append(Reason(code=ReasonCode.METERED_NETWORK, detail=network.value.lower()))


def worth_it(look: Look, reasons: list[Reason]) -> None:
    """Work does not cost the owner more than it brings."""
    net = look.budgets.net_micro_h
    if net is not None and net < 0:
        reasons.append(Reason(code=ReasonCode.NOT_WORTH_IT))


# -- how much ----------------------------------------------------------------------------------------------------------


def power_w(look: Look) -> tuple[int, ModelTier]:
    """The power of a permit where no rule objects, and the tier of model."""
    watts_w, tier = _wanted_w(look)
    least_w = look.policy.min_watts_w
    if not (look.consent.share_while_charging and any(True for _ in _wishes(look))):
        watts_w = _capped_w(watts_w, beside_charging_w(look), least_w)
    return max(1, int(_capped_w(watts_w, circuit_room_w(look), least_w))), tier


def _wanted_w(look: Look) -> tuple[float, ModelTier]:
    """What profile, owner and heat leave, whatever else draws power."""
    policy, consent = look.policy, look.consent
    level = value_of("power_optimize_level", look.signals.power_optimize_level, look.now_ms)
    heat = max(look.heat, Heat.REDUCED) if level else look.heat
    watts_w = float(look.watts_w)
    if look.from_battery:
        watts_w = min(watts_w, consent.battery_watts_w)
    if heat is Heat.REDUCED:
        return watts_w * policy.reduced_share, ModelTier.REDUCED
    if heat is Heat.SMALL:
        return watts_w * policy.small_share, ModelTier.SMALL
    return watts_w, ModelTier.FULL


def _capped_w(watts_w: float, room_w: float | None, least_w: int) -> float:
    """The smaller of both; a cap in steps of 10 W, so that a number which trembles does not change the permit."""
    return watts_w if room_w is None or room_w >= watts_w else max(least_w, room_w // 10 * 10)


def less_than_least(look: Look) -> Reason | None:
    """The reason where the owner's limits or the heat leave less power than the computer can be held to."""
    least_w = look.policy.min_watts_w
    if int(_wanted_w(look)[0]) >= least_w:
        return None
    if look.watts_w < least_w:
        code = ReasonCode.CONSENT_INVALID
    elif look.from_battery and look.consent.battery_watts_w < least_w:
        code = ReasonCode.NOT_PLUGGED_IN
    else:
        code = ReasonCode.POWER_SAVING if look.heat is Heat.COOL else ReasonCode.TOO_HOT
    return Reason(code=code, detail=f"less than {least_w} W are left, and the computer cannot be held to less")


RULES: Final[dict[str, Rule]] = {
    rule.__name__: rule
    for rule in (
        consent_holds,
        owner_has_the_car,
        not_paused,
        outside_quiet_hours,
        signals_are_known,
        standing,
        in_park,
        switched_off,
        doors_shut,
        doors_locked,
        seat_empty,
        not_preconditioning,
        not_updating,
        plugged_and_fed,
        not_feeding_grid,
        above_floor,
        ready_in_time,
        charging_first,
        within_circuit,
        cool_enough,
        low_voltage_fine,
        without_faults,
        not_saving_power,
        within_budgets,
        network_is_free,
        worth_it,
    )
}
