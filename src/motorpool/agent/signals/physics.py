"""The physics of a simulated car: charger and its losses, battery, heat, and the 12 V battery.

Decides: what each part does for a stretch of time with constant inputs. Every step is exact for such inputs, so a step
may be as long as nothing changes. Must not: hold state, read a clock, or know of owners and doors.
Called by: ``agent.signals.car``.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

MS_A_DAY: Final = 86_400_000
MS_A_YEAR: Final = 365.25 * MS_A_DAY
HOTTEST_DAY: Final = 201.0  # of the year: 20 July
HOTTEST_HOUR: Final = 15.0

# Losses of charging: a part that runs whatever is charged, and a share of the power. 14.7 % at 2.3 kW and 7.8 % at
# 11 kW, where ADAC measured 12.7 to 24.2 % and 6.3 to 9.7 %.
CHARGER_FIXED_W: Final = 200.0
CHARGER_SHARE: Final = 0.06
DCDC_SHARE: Final = 0.92  # of the high-voltage power that reaches the 12 V side
PACK_LOSS_SHARE: Final = 0.02  # of the power through the battery becomes heat in it

TAPER_PCT: Final = 95.0  # from here on the battery takes less and less
TAPER_LEFT: Final = 0.1  # share that it takes at 100 %
COLD_C: Final = 5.0  # below, less
FROST_C: Final = -15.0
FROST_LEFT: Final = 0.2
HOT_C: Final = 45.0
HOT_LEFT: Final = 0.5

LOW_VOLTAGE_FULL_WH: Final = 600.0
LOW_VOLTAGE_EMPTY_V: Final = 11.6
LOW_VOLTAGE_FULL_V: Final = 12.9
DCDC_V: Final = 13.8  # while the DC/DC converter runs
LOW_VOLTAGE_CHARGE_W: Final = 150.0
STANDBY_W: Final = 2.0  # what a sleeping car takes from the 12 V battery


class Thermal(msgspec.Struct, frozen=True):
    """A body with a heat capacity and one way to its surroundings."""

    heat_j_per_k: float
    resistance_k_per_w: float

    def after(self, temp_c: float, around_c: float, heat_w: float, dt_s: float) -> float:
        """Temperature after ``dt_s`` with constant heat and surroundings: exact, so stable for any step."""
        end_c = around_c + heat_w * self.resistance_k_per_w
        return end_c + (temp_c - end_c) * math.exp(-dt_s / (self.heat_j_per_k * self.resistance_k_per_w))


PACK: Final = Thermal(360_000.0, 0.1)  # 400 kg; ten hours
COMPUTER: Final = Thermal(2_000.0, 0.12)  # four minutes; 300 W are 36 K
DCDC: Final = Thermal(1_500.0, 0.5)  # twelve minutes
COMPUTER_IDLE_C: Final = 8.0  # above its surroundings when it does nothing


class Climate(msgspec.Struct, frozen=True, kw_only=True):
    """Temperature around the car by season and hour (UTC)."""

    mean_c: float = 10.0
    season_c: float = 9.0
    day_c: float = 4.0

    def at(self, now_ms: int) -> float:
        """The temperature at a time."""
        day = now_ms / MS_A_DAY
        season = math.cos(2 * math.pi * (now_ms % MS_A_YEAR / MS_A_DAY - HOTTEST_DAY) / 365.25)
        hour = math.cos(2 * math.pi * (day % 1.0 - HOTTEST_HOUR / 24.0))
        return self.mean_c + self.season_c * season + self.day_c * hour


def dc_of(ac_w: float) -> float:
    """What a charger gives at most when it draws ``ac_w``."""
    return max(0.0, ac_w * (1 - CHARGER_SHARE) - CHARGER_FIXED_W)


def ac_of(dc_w: float) -> float:
    """What a charger draws to give ``dc_w``; one that gives nothing sleeps."""
    return (dc_w + CHARGER_FIXED_W) / (1 - CHARGER_SHARE) if dc_w > 0 else 0.0


def loss_share(ac_w: float) -> float:
    """The share of ``ac_w`` that is lost in the charger."""
    return 1 - dc_of(ac_w) / ac_w


def accepted_w(rated_w: float, soc_pct: float, pack_c: float) -> float:
    """What the battery's management lets in: less near full, in the cold and in the heat."""
    full = 1.0 if soc_pct <= TAPER_PCT else 1.0 - (1 - TAPER_LEFT) * (soc_pct - TAPER_PCT) / (100.0 - TAPER_PCT)
    cold = min(1.0, max(FROST_LEFT, FROST_LEFT + (1 - FROST_LEFT) * (pack_c - FROST_C) / (COLD_C - FROST_C)))
    hot = HOT_LEFT if pack_c > HOT_C else 1.0
    return rated_w * max(TAPER_LEFT, full) * min(cold, hot)


def low_voltage_v(share: float, *, dcdc_on: bool) -> float:
    """Voltage of a 12 V battery that is full to ``share``."""
    if dcdc_on:
        return DCDC_V
    return LOW_VOLTAGE_EMPTY_V + (LOW_VOLTAGE_FULL_V - LOW_VOLTAGE_EMPTY_V) * share


def low_voltage_charge_w(share: float, dt_s: float) -> float:
    """What the 12 V battery takes on average in ``dt_s`` while the DC/DC converter runs: no more than it lacks."""
    if dt_s <= 0:
        return 0.0
    return min(LOW_VOLTAGE_CHARGE_W, (1.0 - share) * LOW_VOLTAGE_FULL_WH * 3600 / dt_s)


def low_voltage_after(share: float, dt_s: float, *, dcdc_on: bool) -> float:
    """How full the 12 V battery is after ``dt_s``: charged through the DC/DC converter, or slowly emptied."""
    power_w = LOW_VOLTAGE_CHARGE_W if dcdc_on else -STANDBY_W
    return min(1.0, max(0.0, share + power_w * dt_s / 3600 / LOW_VOLTAGE_FULL_WH))
