"""The words of a simulated year, for its table and its picture.

Decides: how a reason, an amount or a month is written. Called by: ``cli.sim``, ``sim.picture``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final
from zoneinfo import ZoneInfo

from motorpool.sim.year import Year

WHY: Final[dict[str, str]] = {
    "budget_used_up": "week's budget used up",
    "charging_first": "charging comes first",
    "below_floor": "battery below the floor",
    "ready_by_at_risk": "ready-by time at risk",
    "not_worth_it": "would not pay",
    "dwell": "settling",
    "too_hot": "too hot",
    "circuit_limit": "circuit at its limit",
    "no_grid_power": "no power on the cable",
    "low_12v": "12 V battery low",
}


def why(code: str) -> str:
    """A reason against work."""
    return WHY.get(code, code.replace("_", " "))


def hours(duration_ms: int) -> float:
    """Milliseconds as hours."""
    return duration_ms / 3_600_000


def money(micro: int) -> str:
    """An amount to the hundredth."""
    return f"{micro / 1_000_000:,.2f}"


def loss(difference_pct: float) -> str:
    """How much charge was lost at worst, from the least difference between with and without us."""
    return f"{max(0.0, -difference_pct):.3f}"


def months(year: Year) -> str:
    """From which month to which."""
    zone = ZoneInfo(year.zone)
    begin, end = (datetime.fromtimestamp(at_ms / 1000, tz=zone) for at_ms in (year.from_ms, year.to_ms))
    return f"{begin:%B %Y} to {end:%B %Y}"


def violations(count: int) -> str:
    """How many promises were broken."""
    return f"{count:,} violation{'' if count == 1 else 's'}"
