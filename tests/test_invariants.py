"""The owner's invariants at the guard, one property each, and for each a test that its rule is what keeps it.

Numbers and wording follow the list in ``docs/owner-invariants.md``, which also names where the others are tested. Each
predicate looks at raw signals and at the verdict; it shares no code with the rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import find, given, settings
from tests.guard_trial import without
from tests.invariant_world import POLICY, Seen, Step, many, play, simple_traces, trace

from motorpool.core.guard_rules import RULES
from motorpool.core.signals import DriverMode, LowVoltage, NetworkClass, Occupancy, Reading
from motorpool.types import Permit

Predicate = Callable[[Seen], bool]


def value(reading: Reading[Any] | None) -> Any:
    assert reading is not None, "nothing is permitted while a needed signal is missing"
    return reading.value


# -- the predicates: what must be true whenever there is a permit ------------------------------------------------------


def i01_consent(seen: Seen) -> bool:
    consent = seen.consent
    return consent.refusal is None and consent.max_watts_w > 0 and seen.now_ms < consent.expires_ms


def i02_not_now(seen: Seen) -> bool:
    return seen.now_ms >= seen.consent.paused_until_ms and seen.consent.refusal is None


def i04_guest(seen: Seen) -> bool:
    guests = {DriverMode.GUEST, DriverMode.VALET, DriverMode.SERVICE}
    others = [
        look.now_ms for look in seen.past if look.signals.driver_mode and value(look.signals.driver_mode) in guests
    ]
    mine: bool = value(seen.signals.driver_mode) is DriverMode.OWNER
    return mine and all(seen.consent.granted_ms > at_ms for at_ms in others)


def i05_presence(seen: Seen) -> bool:
    s = seen.signals
    return bool(
        value(s.doors_open) is False
        and value(s.locked) is True
        and value(s.seat_occupied) is Occupancy.EMPTY
        and value(s.gear_is_park) is True
        and value(s.speed_kmh) == 0.0
        and value(s.ignition) in {LowVoltage.LOCK, LowVoltage.OFF, LowVoltage.ACC}
        and value(s.preconditioning) is False
        and value(s.update_in_progress) is False
        and (value(s.cable_locked) is True or value(s.cable_connected) is False)
    )


def i06_charge(seen: Seen) -> bool:
    """While it charges without the owner's leave to share, the charger gives more than battery and computer take."""
    s, verdict = seen.signals, seen.verdict
    assert isinstance(verdict, Permit)
    if value(s.battery_power_w) < 100 or seen.consent.share_while_charging:
        return True
    return bool(value(s.battery_power_w) + verdict.watts_w <= value(s.charger_power_w))


def i07_floor(seen: Seen) -> bool:
    return bool(value(seen.signals.soc_displayed_pct) >= max(POLICY.floor_pct, seen.consent.floor_pct))


def i09_unplugged(seen: Seen) -> bool:
    s, verdict = seen.signals, seen.verdict
    assert isinstance(verdict, Permit)
    if value(s.cable_connected) and value(s.grid_power_available):
        return True
    leave = seen.consent.battery_watts_w
    above = value(s.soc_displayed_pct) >= seen.consent.battery_floor_pct
    return leave > 0 and verdict.watts_w <= leave and above and verdict.battery_fed


def i10_battery_fed(seen: Seen) -> bool:
    """No permit when every look of the last grace and more saw the battery feed a plugged vehicle."""
    recent = [look for look in (*seen.past, seen) if seen.now_ms - look.now_ms >= 0]
    since_ms = seen.now_ms
    for look in reversed(recent):
        power = look.signals.battery_power_w
        if since_ms - look.now_ms > POLICY.blind_ms or power is None or not power.value < -POLICY.battery_drain_w:
            break
        since_ms = look.now_ms
    return seen.now_ms - since_ms < POLICY.battery_drain_grace_ms or seen.consent.battery_watts_w > 0


def i11_health(seen: Seen) -> bool:
    s = seen.signals
    return bool(
        value(s.pack_temp_c) < POLICY.pack.off_c
        and value(s.computer_temp_c) < POLICY.computer.off_c
        and value(s.dcdc_temp_c) < POLICY.dcdc.off_c
        and value(s.low_voltage_v) >= POLICY.low_voltage_off_v
        and seen.now_ms - s.pack_temp_c.at_ms <= 20_000  # type: ignore[union-attr]  # ``value`` has looked
        and seen.now_ms - s.computer_temp_c.at_ms <= 5_000  # type: ignore[union-attr]
        and seen.now_ms - s.dcdc_temp_c.at_ms <= 20_000  # type: ignore[union-attr]
        and seen.now_ms - s.low_voltage_v.at_ms <= 20_000  # type: ignore[union-attr]
    )


def i12_budgets(seen: Seen) -> bool:
    used, limits = seen.budgets.used, seen.consent.limits
    return (
        not used.unknown
        and used.compute_ms < limits.compute_h_week * 3_600_000
        and used.weighted_ms < limits.weighted_h_week * 3_600_000
        and used.battery_mwh < limits.battery_wh_week * 1_000
        and used.flash_bytes < limits.flash_bytes_month
    )


def i13_circuit(seen: Seen) -> bool:
    s, verdict = seen.signals, seen.verdict
    assert isinstance(verdict, Permit)
    if verdict.battery_fed or s.circuit_limit_w is None or s.ac_power_w is None:
        return True
    if seen.now_ms - s.ac_power_w.at_ms > 10_000 or seen.now_ms - s.circuit_limit_w.at_ms > 60_000:
        return True  # too old to say anything
    return bool(s.ac_power_w.value + verdict.watts_w / POLICY.ac_efficiency <= s.circuit_limit_w.value)


def i14_faults(seen: Seen) -> bool:
    latest_ms = seen.now_ms  # of the looks since a fault: the clock may have been set back once the wait was over
    for look in reversed((*seen.past, seen)):
        latest_ms = max(latest_ms, look.now_ms)
        faults = look.signals.fault_count
        if faults is not None and faults.value > 0 and latest_ms - look.now_ms < POLICY.fault_wait_ms:
            return False
    return True


def i15_net(seen: Seen) -> bool:
    return seen.budgets.net_micro_h is None or seen.budgets.net_micro_h >= 0


def i18_mobile_data(seen: Seen) -> bool:
    network = seen.signals.network
    if network is None or seen.now_ms - network.at_ms > 30_000:
        return False  # nothing says that bytes are free
    return network.value in {NetworkClass.UNMETERED, NetworkClass.NONE}


def i23_unknown_is_no(seen: Seen) -> bool:
    s = seen.signals
    ages_ms = [
        seen.now_ms - reading.at_ms
        for reading in (s.gear_is_park, s.speed_kmh, s.ignition, s.doors_open, s.locked, s.seat_occupied)
        if reading is not None
    ]
    return len(ages_ms) == 6 and all(-1_000 <= age_ms <= 2_000 for age_ms in ages_ms)


INVARIANTS: dict[str, tuple[Predicate, tuple[str, ...]]] = {
    "01_consent": (i01_consent, ("consent_holds",)),
    "02_withdrawal_and_pause": (i02_not_now, ("consent_holds", "not_paused")),
    "04_guest": (i04_guest, ("owner_has_the_car",)),
    "05_presence": (
        i05_presence,
        (
            "standing",
            "in_park",
            "switched_off",
            "doors_shut",
            "doors_locked",
            "seat_empty",
            "not_preconditioning",
            "not_updating",
            "plugged_and_fed",
        ),
    ),
    "06_charging": (i06_charge, ("charging_first",)),
    "07_floor": (i07_floor, ("above_floor",)),
    "09_unplugged": (i09_unplugged, ("plugged_and_fed",)),
    "10_battery_fed": (i10_battery_fed, ("plugged_and_fed",)),
    "11_health": (i11_health, ("cool_enough", "low_voltage_fine", "signals_are_known")),
    "12_budgets": (i12_budgets, ("within_budgets",)),
    "13_circuit": (i13_circuit, ("within_circuit",)),
    "14_faults": (i14_faults, ("without_faults",)),
    "15_net": (i15_net, ("worth_it",)),
    "18_mobile_data": (i18_mobile_data, ("network_is_free",)),
    "23_unknown_is_no": (i23_unknown_is_no, ("signals_are_known",)),
}


def violated(steps: list[Step], holds: Predicate) -> bool:
    for seen in play(steps):
        if isinstance(seen.verdict, Permit):
            try:
                if not holds(seen):
                    return True
            except AssertionError:
                return True
    return False


def permits(steps: list[Step]) -> int:
    return sum(isinstance(seen.verdict, Permit) for seen in play(steps))


def _check(name: str, steps: list[Step]) -> None:
    assert not violated(steps, INVARIANTS[name][0])


@many
@given(trace)
def test_invariant_01_no_work_without_a_living_consent(steps: list[Step]) -> None:
    _check("01_consent", steps)


@many
@given(trace)
def test_invariant_02_a_withdrawal_or_a_pause_stops_everything(steps: list[Step]) -> None:
    _check("02_withdrawal_and_pause", steps)


@many
@given(trace)
def test_invariant_04_somebody_elses_hands_suspend_the_consent(steps: list[Step]) -> None:
    _check("04_guest", steps)


@many
@given(trace)
def test_invariant_05_any_sign_of_the_owner_means_no(steps: list[Step]) -> None:
    _check("05_presence", steps)


@many
@given(trace)
def test_invariant_06_computing_takes_nothing_from_charging(steps: list[Step]) -> None:
    _check("06_charging", steps)


@many
@given(trace)
def test_invariant_07_never_below_a_floor(steps: list[Step]) -> None:
    _check("07_floor", steps)


@many
@given(trace)
def test_invariant_09_unplugged_only_with_separate_leave(steps: list[Step]) -> None:
    _check("09_unplugged", steps)


@many
@given(trace)
def test_invariant_10_plugged_but_fed_by_the_battery_is_unplugged(steps: list[Step]) -> None:
    _check("10_battery_fed", steps)


@many
@given(trace)
def test_invariant_11_heat_and_a_weak_12v_battery_mean_no(steps: list[Step]) -> None:
    _check("11_health", steps)


@many
@given(trace)
def test_invariant_12_a_budget_that_is_used_up_means_no(steps: list[Step]) -> None:
    _check("12_budgets", steps)


@many
@given(trace)
def test_invariant_13_the_circuit_is_never_exceeded(steps: list[Step]) -> None:
    _check("13_circuit", steps)


@many
@given(trace)
def test_invariant_14_an_error_code_means_no_for_a_while(steps: list[Step]) -> None:
    _check("14_faults", steps)


@many
@given(trace)
def test_invariant_15_work_that_costs_the_owner_is_refused(steps: list[Step]) -> None:
    _check("15_net", steps)


@many
@given(trace)
def test_invariant_18_no_mobile_data_without_leave(steps: list[Step]) -> None:
    _check("18_mobile_data", steps)


@many
@given(trace)
def test_invariant_23_what_is_not_known_means_no(steps: list[Step]) -> None:
    _check("23_unknown_is_no", steps)


_MUTANTS = [(name, rule) for name, (_, rules) in INVARIANTS.items() for rule in rules]


@pytest.mark.parametrize(("name", "rule"), _MUTANTS, ids=[f"{name}-{rule}" for name, rule in _MUTANTS])
def test_without_its_rule_the_invariant_breaks(name: str, rule: str) -> None:
    holds = INVARIANTS[name][0]
    with without(rule):
        assert any(violated(steps, holds) for steps in simple_traces()), f"no trace shows what {rule} is good for"


def test_every_rule_is_what_keeps_some_invariant() -> None:
    kept = {rule for _, rules in INVARIANTS.values() for rule in rules}
    elsewhere = {
        "ready_in_time": "test_invariant_06_ in test_invariant_charge.py",
        "outside_quiet_hours": "the owner's own hours; test_guard_rules.py",
        "not_feeding_grid": "the battery is sold already; test_guard.py",
        "not_saving_power": "the car's own wish; test_guard.py",
    }
    assert kept | set(elsewhere) == set(RULES)


def test_random_traces_do_get_permits() -> None:
    """Otherwise the properties above would hold of nothing."""
    found = find(trace, lambda steps: permits(steps) >= 4, settings=settings(max_examples=5_000, database=None))
    assert permits(found) >= 4


def test_each_of_the_24_invariants_has_a_named_test() -> None:
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = {int(number) for number in re.findall(r"def test_invariant_(\d\d)_", sources)}
    assert named == set(range(1, 25))
