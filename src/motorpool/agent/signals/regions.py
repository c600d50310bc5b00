"""A region code from a location, inside the vehicle: the location itself goes no further than this module's caller.

Decides: in which region of a small table a place surely lies. Must not: store, log or print a place.
Called by: ``agent.signals.assemble``.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

METRES_A_DEGREE: Final = 111_320.0
DEFAULT_ACCURACY_M: Final = 100.0  # where the car does not say how good its place is
MAX_ACCURACY_M: Final = 20_000.0  # a place that is worse than this says nothing


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """A code, such as a country's, and the outline of its area as (latitude, longitude) corners, in order.

    A simple outline that stays inside the true border is the safe one: outside every outline means "no region".
    """

    code: str
    outline: tuple[tuple[float, float], ...]


def box(code: str, south: float, west: float, north: float, east: float) -> Region:
    """A region between two latitudes and two longitudes."""
    return Region(code=code, outline=((south, west), (south, east), (north, east), (north, west)))


def region_of(
    latitude: float, longitude: float, regions: tuple[Region, ...], accuracy_m: float = DEFAULT_ACCURACY_M
) -> str | None:
    """The code of the region that holds the place and everything within its accuracy; None when that is not sure."""
    if not (-90.0 <= latitude <= 90.0 and -180.0 <= longitude <= 180.0 and 0.0 <= accuracy_m <= MAX_ACCURACY_M):
        return None
    north = accuracy_m / METRES_A_DEGREE
    east = north / max(0.01, math.cos(math.radians(latitude)))
    around = [(latitude + a * north, longitude + b * east) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    codes = {_code(place, regions) for place in around}
    return codes.pop() if len(codes) == 1 else None


def _code(place: tuple[float, float], regions: tuple[Region, ...]) -> str | None:
    codes = {region.code for region in regions if _inside(place, region.outline)}
    return codes.pop() if len(codes) == 1 else None  # where two outlines overlap nobody knows


def _inside(place: tuple[float, float], outline: tuple[tuple[float, float], ...]) -> bool:
    """Even-odd rule: a ray from the place crosses the outline an odd number of times."""
    latitude, longitude = place
    inside = False
    for (lat_a, lon_a), (lat_b, lon_b) in zip(outline, (*outline[1:], outline[0]), strict=True):
        crosses = (lat_a > latitude) != (lat_b > latitude)
        if crosses and longitude < (lon_b - lon_a) * (latitude - lat_a) / (lat_b - lat_a) + lon_a:
            inside = not inside
    return inside
