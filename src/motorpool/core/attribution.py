"""Whose energy it was: what a vehicle drew for one message of results, divided over the requests in it.

Decides: how much of it each request carries, in whole micro-watt-hours and without a loss, and how many grams of CO2
that was. Must not: measure or model energy, which the vehicle does, or know customers.
Called by: ``core.accepted``, ``core.scheduler``, ``server.live``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

UWH_PER_MWH: Final = 1_000
UWH_PER_WH: Final = 1_000_000
UG_PER_G: Final = 1_000_000
# More than a vehicle's computer can draw within the longest lease: what lies above is a lie, and would spoil the sums.
MAX_MESSAGE_UWH: Final = 10_000_000_000
# A generated token needs a pass over the model's weights, and memory bandwidth bounds it; many tokens of a prompt share
# one pass, and arithmetic bounds that. A tenth is the order of magnitude; a token from the cache costs nothing.
GENERATED_WEIGHT: Final = 10
PROMPT_WEIGHT: Final = 1


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """What one request or job drew in its vehicles, and the CO2 of it. ``is_measured``: none of it is modelled."""

    energy_uwh: int = 0
    co2_ug: int = 0
    is_measured: bool = False

    @property
    def energy_wh(self) -> float:
        """Watt-hours, as they are shown."""
        return self.energy_uwh / UWH_PER_WH

    @property
    def co2_g(self) -> float:
        """Grams, as they are shown."""
        return self.co2_ug / UG_PER_G


def weight(prompt_tokens: int, cached_tokens: int, completion_tokens: int, carried_tokens: int) -> int:
    """How much of a vehicle's energy an answer stands for: the tokens that were computed for it here, at least one."""
    generated = max(1, completion_tokens - carried_tokens)
    read = max(0, prompt_tokens - cached_tokens)
    return GENERATED_WEIGHT * generated + PROMPT_WEIGHT * read


def split_uwh(total_uwh: int, weights: Sequence[int]) -> list[int]:
    """``total_uwh`` divided by ``weights``, all of them positive; the parts add up to it (largest remainders first)."""
    whole = sum(weights)
    parts = [total_uwh * each // whole for each in weights]
    rest = total_uwh - sum(parts)
    by_remainder = sorted(range(len(weights)), key=lambda place: (-(total_uwh * weights[place] % whole), place))
    for place in by_remainder[:rest]:
        parts[place] += 1
    return parts


def co2_ug(energy_uwh: int, intensity_g_kwh: int) -> int:
    """Micrograms of CO2 of this energy, rounded half up. One gram a kilowatt-hour is a microgram a milliwatt-hour."""
    return (energy_uwh * intensity_g_kwh + UWH_PER_MWH // 2) // UWH_PER_MWH
