"""Invariant 6 in motion: battery, charger and timer beside the guard, with and without us, to the ready-by time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.guard_trial import without
from tests.invariant_world import many

from motorpool.agent.signals.source import AlwaysParked
from motorpool.core.guard import Budgets, ConsentView, History, Policy, Reading, decide
from motorpool.core.policy import ReadyBy
from motorpool.types import Permit

START_MS = 1_790_000_000_000
START_MINUTE = START_MS // 60_000 % 1440
STEP_S = 120
STEP_PCT = STEP_S / 3600 / 60_000.0 * 100  # what a watt takes in a step
CAPACITY_WH = 60_000.0
POLICY = Policy(watts_w=2_000, dwell_ms=0, blind_ms=10**9, ready_by_hysteresis_ms=0, floor_pct=5.0)


class Night(msgspec.Struct, frozen=True):
    """From plug-in to departure. The battery wants ``wants_w`` after a timer, of the charger's ``charger_w``."""

    soc_pct: float
    limit_pct: float
    target_pct: float
    charger_w: float
    wants_w: float
    timer_steps: int
    ready_steps: int
    watts_w: int
    share: bool


_night = st.builds(
    Night,
    soc_pct=st.floats(6, 99),
    limit_pct=st.sampled_from([50.0, 80.0, 90.0, 100.0]),
    target_pct=st.sampled_from([40.0, 60.0, 80.0, 100.0]),
    charger_w=st.sampled_from([1_800.0, 3_200.0, 6_500.0, 9_900.0]),
    wants_w=st.sampled_from([1_000.0, 3_000.0, 6_500.0, 50_000.0]),
    timer_steps=st.integers(0, 200),
    ready_steps=st.integers(1, 500),
    watts_w=st.sampled_from([10, 100, 300, 1_000, 2_000]),
    share=st.booleans(),
)


class Car:
    """The physics: the computer takes first what the charger gives, the battery what is left of what it wants."""

    def __init__(self, night: Night) -> None:
        self._night = night
        self.soc_pct = night.soc_pct
        self.battery_w = 0.0

    def step(self, number: int, drawn_w: float) -> None:
        night = self._night
        wanted_w = night.wants_w if number >= night.timer_steps and self.soc_pct < night.limit_pct else 0.0
        self.battery_w = min(wanted_w, night.charger_w - drawn_w)
        more_pct = self.battery_w * STEP_S / 3600 / CAPACITY_WH * 100
        self.soc_pct = min(self.soc_pct + more_pct, max(night.limit_pct, self.soc_pct))

    def time_to_complete_s(self) -> float:
        night = self._night
        power_w = min(night.charger_w, night.wants_w)
        missing_wh = max(0.0, night.limit_pct - self.soc_pct) / 100 * CAPACITY_WH
        return missing_wh / power_w * 3600 if power_w else 0.0


def lost_pct(night: Night) -> tuple[float, int]:
    """How much less charge there is at the ready-by time because of us, and how many steps were worked."""
    wish = ReadyBy(minute=(START_MINUTE + night.ready_steps * STEP_S // 60) % 1440, target_pct=night.target_pct)
    consent = ConsentView(
        refusal=None,
        max_watts_w=night.watts_w,
        floor_pct=5.0,
        expires_ms=START_MS + 10**12,
        schedule=(wish,),
        share_while_charging=night.share,
    )
    ours, without = Car(night), Car(night)
    history, drawn_w, worked = History(), 0.0, 0
    for number in range(night.ready_steps):
        now_ms = START_MS + number * STEP_S * 1000
        values: dict[str, Any] = {
            "soc_displayed_pct": ours.soc_pct,
            "charge_limit_pct": night.limit_pct,
            "charger_power_w": night.charger_w,
            "capacity_wh": CAPACITY_WH,
            "battery_power_w": ours.battery_w,
            "time_to_complete_s": ours.time_to_complete_s(),
            "circuit_limit_w": 100_000.0,
        }
        readings = {name: Reading(value, now_ms) for name, value in values.items()}
        signals = msgspec.structs.replace(AlwaysParked().read(now_ms), **readings)
        verdict, history = decide(POLICY, consent, signals, Budgets(), history, now_ms)
        drawn_w = float(verdict.watts_w) if isinstance(verdict, Permit) else 0.0
        worked += drawn_w > 0
        ours.step(number, drawn_w)
        without.step(number, 0.0)
    return without.soc_pct - ours.soc_pct, worked


@many
@given(_night)
def test_invariant_06_at_the_ready_by_time_the_charge_is_what_it_would_be_without_us(night: Night) -> None:
    lost, _ = lost_pct(night)
    assert lost <= night.watts_w * STEP_PCT + 1e-6, "at most one step, until the guard sees that charging has begun"


# Nights that show what each rule is good for: they lose charge once it is taken out.
TIGHT = Night(40.0, 80.0, 80.0, 6_500.0, 50_000.0, 0, 120, 2_000, True)  # sharing, in a night that is too short
GREEDY = Night(40.0, 80.0, 40.0, 6_500.0, 6_500.0, 0, 100, 1_000, False)  # the charger at its limit, no wish in danger


@pytest.mark.parametrize(("rule", "night"), [("ready_in_time", TIGHT), ("charging_first", GREEDY)])
def test_without_its_rule_charge_is_lost(rule: str, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost_pct(night)[0] <= night.watts_w * STEP_PCT + 1e-6
    if rule == "charging_first":  # ``power_w`` caps the power as well: a permit of one watt takes nothing
        monkeypatch.setattr("motorpool.core.guard_rules.beside_charging_w", lambda look: None)
    with without(rule):
        assert lost_pct(night)[0] > 1.0


def test_most_nights_leave_time_to_work() -> None:
    idle_after_charging = Night(70.0, 80.0, 80.0, 6_500.0, 50_000.0, 0, 300, 1_000, False)
    lost, worked = lost_pct(idle_after_charging)
    assert lost <= idle_after_charging.watts_w * STEP_PCT
    assert worked > 200
