"""Watches a simulated year as the owner would: from the cars themselves, and with none of the guard's code.

Decides: what counts as a broken promise. It looks at what the cars are and draw, not at signals, and has limits,
budgets and prices of its own. Must not: import the guard, its rules or its budgets, or steer anything.
Called by: ``sim.year``, at each look and after each stretch of time.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from math import exp, log
from typing import Final

import msgspec

from motorpool.agent.signals import physics
from motorpool.agent.signals.car import SimulatedCar
from motorpool.core.signals import DriverMode, LowVoltage, Occupancy

WEEK_MS: Final = 7 * 86_400_000
DAY_MS: Final = 86_400_000
HOUR_MS: Final = 3_600_000
LOOK_SLACK_MS: Final = 60_000  # what happens within a minute is seen at its end
TRIAL_MS: Final = 6 * 60_000  # five minutes a day to measure speed, and one look
EPSILON_PCT: Final = 0.05  # points of charge: 30 Wh of a battery of 60 kWh
EXAMPLES: Final = 20
# Junction temperature in Celsius and the wear of an hour there, in hours at 85 Celsius.
_WEAR_POINTS: Final = ((70.0, 9.8 / 26), (85.0, 1.0), (100.0, 9.8 / 3.9), (125.0, 9.8))


class Promises(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner was promised, in plain numbers, and what the work is paid, in the currency."""

    watts_w: float
    floor_pct: float = 30.0
    pack_c: float = 45.0
    computer_c: float = 90.0
    dcdc_c: float = 90.0
    low_voltage_v: float = 12.0
    compute_h_week: float = 60.0
    weighted_h_week: float = 30.0
    circuit_w: float = 11_000.0
    pay_per_watt_h: float = 0.0
    awake_w: float = 0.0
    wear_per_h: float = 0.0  # at 85 Celsius


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """One broken promise."""

    kind: str
    at_ms: int
    detail: str = ""


class Witness:
    """Counts broken promises, by kind, and keeps the first ``EXAMPLES`` of them."""

    def __init__(self, promises: Promises, ours: SimulatedCar, other: SimulatedCar) -> None:
        self._promises = promises
        self._ours = ours
        self._other = other
        self._worked: deque[tuple[int, int, float]] = deque()
        self._compute_ms = 0
        self._weighted_ms = 0.0
        self._losing: deque[tuple[int, int]] = deque()
        self._losing_ms = 0
        self.counts: dict[str, int] = {}
        self.examples: list[Violation] = []
        self.checks = 0
        self.least_pct = 0.0

    def broken(self, kind: str, at_ms: int, detail: str = "") -> None:
        """A promise was broken."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(Violation(kind=kind, at_ms=at_ms, detail=detail))

    # -- while there is a permit ---------------------------------------------------------------------------------------

    def permitted(self, now_ms: int, watts_w: int, price_kwh: float) -> None:
        """There is a permit at this moment: is the car one that may work."""
        promises, car = self._promises, self._ours
        self.checks += 1
        self._nobody_is_here(now_ms)
        if not car.plugged or not car.cable_locked:
            self.broken("the cable is out", now_ms)
        if not car.grid:
            self.broken("no power on the cable", now_ms)
        if car.feeding:
            self.broken("the battery feeds the house", now_ms)
        if car.soc_pct < promises.floor_pct:
            self.broken("below the floor", now_ms, f"{car.soc_pct:.2f} %")
        hot = car.pack_c, car.computer_c, car.dcdc_c
        if any(
            is_c >= most_c
            for is_c, most_c in zip(hot, (promises.pack_c, promises.computer_c, promises.dcdc_c), strict=True)
        ):
            self.broken("too hot", now_ms, ", ".join(f"{temp_c:.0f} C" for temp_c in hot))
        if car.low_voltage_v < promises.low_voltage_v:
            self.broken("12 V battery low", now_ms)
        if car.faults or car.updating:
            self.broken("the car has a fault or installs software", now_ms)
        if watts_w > promises.watts_w:
            self.broken("more power than allowed", now_ms, f"{watts_w} W")
        self._within_budgets(now_ms)
        self._pays(now_ms, watts_w, price_kwh)

    def _nobody_is_here(self, now_ms: int) -> None:
        car = self._ours
        if car.door_open:
            self.broken("a door is open", now_ms)
        if not car.locked:
            self.broken("unlocked", now_ms)
        if car.speed_kmh != 0 or not car.gear_is_park:
            self.broken("moving", now_ms)
        if car.seat is not Occupancy.EMPTY or car.ignition in {LowVoltage.ON, LowVoltage.START}:
            self.broken("somebody sits in the car", now_ms)
        if car.preconditioning:
            self.broken("being made ready for a drive", now_ms)
        if car.driver_mode is not DriverMode.OWNER:
            self.broken("somebody else has the car", now_ms)

    def _within_budgets(self, now_ms: int) -> None:
        worked = self._worked
        while worked and worked[0][0] <= now_ms - WEEK_MS:
            _, compute_ms, weighted_ms = worked.popleft()
            self._compute_ms -= compute_ms
            self._weighted_ms -= weighted_ms
        if self._compute_ms > self._promises.compute_h_week * HOUR_MS + LOOK_SLACK_MS:
            self.broken("over the week's hours", now_ms, f"{self._compute_ms / HOUR_MS:.2f} h")
        if self._weighted_ms > self._promises.weighted_h_week * HOUR_MS + LOOK_SLACK_MS:
            self.broken("over the week's hours by temperature", now_ms, f"{self._weighted_ms / HOUR_MS:.2f} h")

    def _pays(self, now_ms: int, watts_w: int, price_kwh: float) -> None:
        """Does an hour like this bring the owner more than it costs, by the car's own physics."""
        promises, other = self._promises, self._other
        direct_w = (watts_w + promises.awake_w) / physics.DCDC_SHARE
        with_us_w = physics.ac_of(max(0.0, other.battery_power_w) + direct_w)
        cost = (with_us_w - other.ac_power_w) / 1000 * price_kwh
        cost += promises.wear_per_h * wear_weight(self._ours.computer_c)
        losing = self._losing
        while losing and losing[0][0] <= now_ms - DAY_MS:
            self._losing_ms -= losing.popleft()[1]
        if promises.pay_per_watt_h * watts_w < cost - 1e-6:
            if self._losing_ms >= TRIAL_MS:
                detail = f"{promises.pay_per_watt_h * watts_w - cost:.4f} an hour"
                self.broken("costs more than it brings", now_ms, detail)
            losing.append((now_ms, LOOK_SLACK_MS))
            self._losing_ms += LOOK_SLACK_MS

    # -- after a stretch of time ---------------------------------------------------------------------------------------

    def passed(self, now_ms: int, for_ms: int, *, working: bool) -> None:
        """``for_ms`` of being plugged in have passed, at work or not."""
        ours, other = self._ours, self._other
        ahead_pct = ours.soc_pct - other.soc_pct
        self.least_pct = min(self.least_pct, ahead_pct)
        if not working:
            return
        weighted_ms = for_ms * wear_weight(ours.computer_c)
        self._worked.append((now_ms, for_ms, weighted_ms))
        self._compute_ms += for_ms
        self._weighted_ms += weighted_ms
        if ours.battery_power_w < min(other.battery_power_w, 0.0) - 1.0:
            self.broken("the battery fed the computer", now_ms, f"{-ours.battery_power_w:.0f} W")
        if ours.ac_power_w > self._promises.circuit_w + 1.0:
            self.broken("more than the circuit carries", now_ms, f"{ours.ac_power_w:.0f} W")

    def charge(self, now_ms: int, kind: str) -> tuple[float, float]:
        """A moment at which the charge counts: with us it is not less than without. Returns both, in percent."""
        with_pct, without_pct = self._ours.soc_pct, self._other.soc_pct
        if with_pct < without_pct - EPSILON_PCT:
            self.broken(f"less charge at {kind}", now_ms, f"{without_pct - with_pct:.3f} points")
        return with_pct, without_pct

    def energy(self, now_ms: int, books_wh: float, cars_wh: float, standby_wh: float = 0.0) -> None:
        """At the end: what the books say that we drew is no less than what the two cars' meters differ by.

        ``standby_wh`` is what the cars' own standby took in that time, which may fall to either meter.
        """
        if books_wh < cars_wh * 0.99 - 10 - standby_wh:
            self.broken("the books show too little energy", now_ms, f"{books_wh:.0f} of {cars_wh:.0f} Wh")


def wear_weight(temp_c: float) -> float:
    """Hours at 85 Celsius that an hour at this temperature is worth: straight between the points, by the logarithm."""
    if temp_c <= _WEAR_POINTS[0][0]:
        return _WEAR_POINTS[0][1]
    for (low_c, low), (high_c, high) in pairwise(_WEAR_POINTS):
        if temp_c <= high_c:
            return exp(log(low) + (log(high) - log(low)) * (temp_c - low_c) / (high_c - low_c))
    return _WEAR_POINTS[-1][1]
