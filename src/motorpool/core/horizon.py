"""How long work may be, given when its car will probably leave: for work that counts as a whole or not at all.

Decides: the forward hazard that follows from a vehicle's report, how much all-or-nothing work it may be given, and
whether fetching a model is worth its stay. Must not: know vehicles or jobs. All of it is plain arithmetic on integers
and floats, so it runs as it stands and compiled (``core.jit``) with the same results.
Called by: ``core.kernels``, ``core.forecast``, the simulator.

Theory. A vehicle says two things of its stay (``core.departures.Outlook``): it remains for ``bound_ms`` with 90 %, and
leaves within 15 minutes with probability ``risk``. The cumulated hazard H is a broken line through (0, 0),
(15 min, -ln(1 - risk)) and (bound, -ln 0.9), which goes on with its last slope, or with the mean slope up to the bound
if that is steeper; the car is still there after w with S(w) = exp(-H(w)). Where the two statements contradict each
other, one straight line through the worse of both counts.

All-or-nothing work of w, with an overhead of c, loses about w H(w) / 2 to departures and c to the overhead. What is
lost of an hour is least near the largest w with w H(w) <= 2 c. The hazard of this minute alone would be the wrong
guide: it is small at night, and the morning comes all the same.
"""

from __future__ import annotations

import math
from typing import Final

from motorpool.core.jit import kernel

RISK_MS: Final = 900_000
MINUTE_MS: Final = 60_000
BOUND_HAZARD: Final = -math.log(0.9)
CERTAIN: Final = 50.0  # a hazard that nothing survives, and far from what a float cannot hold
MAX_MS: Final = 30 * 86_400_000  # no longer work is ever asked for
DOWNLOADS_IN_STAY: Final = 3  # a model pays if the car stays for so many times as long as it takes to fetch it
Line = tuple[float, float, float, float, float]  # two corners (time, hazard), and the slope after the second


@kernel
def risk_hazard(risk: float) -> float:
    """The hazard cumulated over 15 minutes; what is no probability below 1 counts as a certain departure."""
    if risk <= 0.0:
        return 0.0
    if risk < 1.0:
        return min(-math.log1p(-risk), CERTAIN)
    return CERTAIN


@kernel
def line_of(bound_ms: int, risk: float) -> Line:
    """The broken line H of a vehicle's report: corners in milliseconds, the last slope a millisecond.

    A bound of less than a minute counts as a minute: bounds are reported in steps of five.
    """
    soon = risk_hazard(risk)
    at = float(RISK_MS)
    bound = float(max(bound_ms, MINUTE_MS))
    mean = BOUND_HAZARD / bound
    if bound > at and soon < BOUND_HAZARD:
        return at, soon, bound, BOUND_HAZARD, max((BOUND_HAZARD - soon) / (bound - at), mean)
    if bound < at and soon > mean * at:
        return bound, BOUND_HAZARD, at, soon, (soon - BOUND_HAZARD) / (at - bound)
    slope = max(soon / at, mean)
    return at, slope * at, at, slope * at, slope


@kernel
def hazard_on(line: Line, w_ms: int) -> float:
    """H(w) on a line that ``line_of`` gave."""
    first_ms, first, second_ms, second, slope = line
    w = float(w_ms)
    if w <= 0.0:
        return 0.0
    if w <= first_ms:
        return first * w / first_ms
    if w <= second_ms:
        return first + (second - first) * (w - first_ms) / (second_ms - first_ms)
    return second + slope * (w - second_ms)


@kernel
def hazard(w_ms: int, bound_ms: int, risk: float) -> float:
    """H(w): the hazard cumulated over the next ``w_ms`` milliseconds; it never falls with ``w_ms``."""
    return hazard_on(line_of(bound_ms, risk), w_ms)


@kernel
def survival(w_ms: int, bound_ms: int, risk: float) -> float:
    """S(w): probability that the car is still there after ``w_ms``."""
    return math.exp(-hazard(w_ms, bound_ms, risk))


@kernel
def time_at_ms(most: float, bound_ms: int, risk: float) -> int:
    """The longest time over which no more hazard than ``most`` cumulates; at most MAX_MS."""
    if most < 0.0:
        return 0
    line = line_of(bound_ms, risk)
    first_ms, first, second_ms, second, slope = line
    if first > most:
        found = first_ms * most / first
    elif second > most:
        found = first_ms + (second_ms - first_ms) * (most - first) / (second - first)
    else:
        found = second_ms + (most - second) / slope
    w = int(min(max(found, 0.0), float(MAX_MS)))
    while w > 0 and hazard_on(line, w) > most:  # what rounding made too long
        w -= 1
    while w < MAX_MS and hazard_on(line, w + 1) <= most:
        w += 1
    return w


@kernel
def worth_ms(overhead_ms: int, bound_ms: int, risk: float) -> int:
    """The largest w with w H(w) <= 2 c, where c is ``overhead_ms``; at most MAX_MS."""
    most = 2.0 * max(overhead_ms, 0)
    line = line_of(bound_ms, risk)
    first_ms, first, second_ms, second, slope = line
    if first_ms * first > most:
        found = _root(0.0, 0.0, first / first_ms, most)
    elif second_ms * second > most:
        found = _root(first_ms, first, (second - first) / (second_ms - first_ms), most)
    else:
        found = _root(second_ms, second, slope, most)
    w = int(min(max(found, 0.0), float(MAX_MS)))
    while w > 0 and w * hazard_on(line, w) > most:
        w -= 1
    while w < MAX_MS and (w + 1) * hazard_on(line, w + 1) <= most:
        w += 1
    return w


@kernel
def _root(from_ms: float, from_hazard: float, slope: float, most: float) -> float:
    """Where w (from_hazard + slope (w - from_ms)) = most."""
    b = from_hazard - slope * from_ms
    if slope * most <= 1e-9 * b * b and b > 0.0:
        return most / b
    return (math.sqrt(b * b + 4.0 * slope * most) - b) / (2.0 * slope)


@kernel
def whole_ms(overhead_ms: int, target: float, bound_ms: int, risk: float) -> int:
    """The most all-or-nothing work that a vehicle may be given, in milliseconds of its time; 0 for none.

    Work of w is worth its risk if w H(w) <= 2 c, and it has to end in time with the probability ``target``:
    S(w + c) >= target, where c is ``overhead_ms`` (start, transfers, the model).
    """
    if target >= 1.0:
        return 0
    latest_ms = MAX_MS if target <= 0.0 else time_at_ms(-math.log(target), bound_ms, risk)
    return max(0, min(worth_ms(overhead_ms, bound_ms, risk), latest_ms - max(overhead_ms, 0)))


@kernel
def download_pays(download_ms: int, use_ms: int, bound_ms: int, risk: float) -> bool:
    """Whether a vehicle should fetch a model that takes ``download_ms`` to come.

    The car must stay for more than three times as long with 90 %; and ``use_ms``, the work that waits for the model and
    would come to this vehicle in this stay, has to outweigh the download even if the car may leave before it is over.
    """
    if download_ms <= 0:
        return True
    if bound_ms <= DOWNLOADS_IN_STAY * download_ms:
        return False
    return use_ms * survival(download_ms, bound_ms, risk) > download_ms
