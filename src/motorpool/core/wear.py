"""What computing wears: charge cycles of the battery, hot hours of the computer, writes to flash memory.

Decides: how wear is counted and what it costs the owner. Must not: read a clock or a file, or judge whether work pays
(``core.economics`` does). Called by: the agent, ``core.economics``, the simulator.

Battery. ``Rainflow`` counts charge cycles as they happen (ASTM E1049-85, section 5.4.4). It keeps only turning points
whose ranges become smaller and smaller; in steps of 0.1 % there are at most about a thousand of them, whatever happens.
``BatteryWear`` counts the trace of the state of charge twice, with what we took and without; the difference is ours.
``battery_price`` takes the larger of BLAST-Lite's table (``core.wear_table``) and a cautious bound.

Silicon. Automotive parts are qualified for 10 to 20 thousand hours at stated temperatures. ``weight_ppm`` says how many
hours at 85 Celsius an hour at some temperature is worth, from a published derating table.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, exp, isfinite, log
from typing import Final

import msgspec
import rainflow  # type: ignore[import-untyped]

from motorpool.core.energy import MWS_PER_KWH
from motorpool.core.wear_table import CAPACITY_WH, NIGHT_HOURS, ROWS, YEARS, WearRow
from motorpool.errors import CallerError

MICRO: Final = 1_000_000
BATTERY_BOUND_MICRO_KWH: Final = 87_000
"""A pack of $7,800 that lasts 1,500 full cycles of 60 kWh: $0.087 a kilowatt-hour. Promises to owners use it."""
PACK_MICRO_KWH: Final = 130 * MICRO  # price of a battery pack, a kilowatt-hour of capacity
USEFUL_LIFE_PP: Final = 30.0  # percentage points that a battery may lose before it counts as worn out
RELATIVE_LIFE: Final[tuple[tuple[float, float], ...]] = ((70.0, 26.0), (85.0, 9.8), (100.0, 3.9), (125.0, 1.0))
"""Junction temperature in Celsius and life relative to 125 Celsius (Microchip's example of a mission profile)."""
REFERENCE_C: Final = 85.0
STEPS_PER_PCT: Final = 10  # resolution of the rainflow counter: 0.1 %
DEPTH_BINS: Final = 20  # of 5 % each
NIGHTS_A_YEAR: Final = 365.0


class Cycles(msgspec.Struct, frozen=True, kw_only=True):
    """Charge cycles that were counted. ``by_depth[i]`` are those of a depth over 5 i % and up to 5 (i + 1) %.

    A cycle counts twice what a half cycle does, so all numbers are halves, and whole. ``depth_sum`` adds up the depth
    of every half cycle in tenths of a percent: 2,000 of them are one equivalent full cycle.
    """

    halves: int = 0
    depth_sum: int = 0
    by_depth: tuple[int, ...] = (0,) * DEPTH_BINS

    @property
    def equivalent_full(self) -> float:
        """Equivalent full cycles: the charge that went out and in again, in times of the capacity."""
        return self.depth_sum / (2 * 100 * STEPS_PER_PCT)


class Rainflow:
    """Counts the cycles of a trace as it comes, in bounded memory."""

    __slots__ = ("_by_depth", "_depth_sum", "_halves", "_last", "_points", "_rising")

    def __init__(self) -> None:
        self._points: list[int] = []  # turning points that are not in a closed cycle; the last value is not one yet
        self._last: int | None = None
        self._rising: bool | None = None
        self._halves = 0
        self._depth_sum = 0
        self._by_depth = [0] * DEPTH_BINS

    def __len__(self) -> int:
        return len(self._points)

    def add(self, soc_pct: float) -> None:
        """The state of charge is ``soc_pct`` now; what is no state of charge is ignored."""
        if not 0.0 <= soc_pct <= 100.0:  # written so that NaN is ignored
            return
        value = steps(soc_pct)
        last = self._last
        if last is None:
            self._points.append(value)
        elif value == last:
            return
        else:
            rising = value > last
            if self._rising is not None and rising != self._rising:
                self._turn(last)
            self._rising = rising
        self._last = value

    def cycles(self) -> Cycles:
        """What was counted, with what is open as half cycles; counting can go on afterwards."""
        counter = self._copy()
        if self._last is not None and self._rising is not None:
            counter._turn(self._last)  # noqa: SLF001  # of its own class
        for one, other in zip(counter._points, counter._points[1:], strict=False):  # noqa: SLF001
            counter._count(one, other, 1)  # noqa: SLF001
        return Cycles(halves=counter._halves, depth_sum=counter._depth_sum, by_depth=tuple(counter._by_depth))  # noqa: SLF001

    def _turn(self, value: int) -> None:
        points = self._points
        points.append(value)
        while len(points) >= 3:
            newest, before = abs(points[-1] - points[-2]), abs(points[-2] - points[-3])
            if newest < before:
                break
            if len(points) == 3:
                self._count(points[0], points[1], 1)  # it holds the beginning: half a cycle
                del points[0]
            else:
                self._count(points[-3], points[-2], 2)
                del points[-3:-1]

    def _count(self, one: int, other: int, halves: int) -> None:
        depth = abs(one - other)
        self._halves += halves
        self._depth_sum += depth * halves
        self._by_depth[min(DEPTH_BINS - 1, (depth - 1) // (100 * STEPS_PER_PCT // DEPTH_BINS))] += halves

    def _copy(self) -> Rainflow:
        other = Rainflow()
        other._points, other._last, other._rising = list(self._points), self._last, self._rising
        other._halves, other._depth_sum, other._by_depth = self._halves, self._depth_sum, list(self._by_depth)
        return other


def steps(soc_pct: float) -> int:
    """The state of charge in whole tenths of a percent."""
    return round(soc_pct * STEPS_PER_PCT)


def count_trace(trace: Iterable[float]) -> Cycles:
    """The cycles of a whole trace, by the package ``rainflow``: for traces that are at hand, as in the simulator."""
    counts = rainflow.count_cycles([steps(value) for value in trace if 0.0 <= value <= 100.0])
    halves, depth_sum, by_depth = 0, 0, [0] * DEPTH_BINS
    for depth, count in counts:
        if depth > 0:
            twice = round(count * 2)
            halves += twice
            depth_sum += depth * twice
            by_depth[min(DEPTH_BINS - 1, (depth - 1) // (100 * STEPS_PER_PCT // DEPTH_BINS))] += twice
    return Cycles(halves=halves, depth_sum=depth_sum, by_depth=tuple(by_depth))


class BatteryWear:
    """The battery's cycles with us and without us, from what the vehicle says and what we took from the battery.

    Without us the charge would be higher by what we took, until charging brings it back: at the charge limit both meet.
    """

    __slots__ = ("_capacity_wh", "_last_pct", "_without_pct", "ours_mws", "with_us", "without_us")

    def __init__(self, capacity_wh: float) -> None:
        if not (isfinite(capacity_wh) and capacity_wh > 0):
            raise CallerError("capacity_wh must be more than 0", param="capacity_wh")
        self._capacity_wh = capacity_wh
        self._last_pct: float | None = None
        self._without_pct = 0.0
        self.with_us = Rainflow()
        self.without_us = Rainflow()
        self.ours_mws = 0

    def advance(self, soc_pct: float, battery_mws: int, *, limit_pct: float = 100.0) -> None:
        """The charge is ``soc_pct`` now; since the last call we took ``battery_mws`` out of the battery."""
        if not 0.0 <= soc_pct <= 100.0:
            return
        self.ours_mws += battery_mws
        if self._last_pct is None:
            self._without_pct = soc_pct
        else:
            taken_pct = battery_mws / 3_600_000 / self._capacity_wh * 100
            without_pct = self._without_pct + soc_pct - self._last_pct + taken_pct
            top_pct = max(soc_pct, min(100.0, max(limit_pct, 0.0)))
            self._without_pct = min(max(without_pct, soc_pct), top_pct)
        self._last_pct = soc_pct
        self.with_us.add(soc_pct)
        self.without_us.add(self._without_pct)

    @property
    def without_us_pct(self) -> float:
        """The charge as it would be without us."""
        return self._without_pct

    def extra_full_cycles(self) -> float:
        """Equivalent full cycles that are ours; no less than what we took, however coarse the vehicle's own numbers."""
        counted = self.with_us.cycles().equivalent_full - self.without_us.cycles().equivalent_full
        return max(counted, self.ours_mws / 3_600_000 / self._capacity_wh)

    def through_mws(self) -> int:
        """Energy through the battery that is ours, in milliwatt-seconds, rounded up: what ``WearPrices`` prices."""
        return ceil(self.extra_full_cycles() * self._capacity_wh * 3_600_000)


def relative_life(temp_c: float | None) -> float:
    """Life at this junction temperature, relative to 125 Celsius; log-linear between the table's points.

    Below the table's coolest point life counts as there (nothing says that it is longer); above its hottest the line
    goes on. No reading counts as 125 Celsius.
    """
    if temp_c is None or not isfinite(temp_c):
        return RELATIVE_LIFE[-1][1]
    if temp_c <= RELATIVE_LIFE[0][0]:
        return RELATIVE_LIFE[0][1]
    at = next((index for index, (hot_c, _) in enumerate(RELATIVE_LIFE) if temp_c <= hot_c), len(RELATIVE_LIFE) - 1)
    (low_c, low), (high_c, high) = RELATIVE_LIFE[at - 1], RELATIVE_LIFE[at]
    return exp(log(low) + (log(high) - log(low)) * (min(temp_c, 300.0) - low_c) / (high_c - low_c))


def weight_ppm(temp_c: float | None) -> int:
    """How much an hour at this temperature wears, in millionths of an hour at 85 Celsius, rounded up."""
    return ceil(relative_life(REFERENCE_C) / relative_life(temp_c) * MICRO - 1e-6)


class JunctionHours:
    """Adds up computing time weighted by temperature, without loss: 85 Celsius counts once."""

    __slots__ = ("_weighted",)

    def __init__(self) -> None:
        self._weighted = 0  # millionths of milliseconds

    def add(self, duration_ms: int, temp_c: float | None) -> int:
        """Count a stretch; returns the whole weighted milliseconds that it completed."""
        before = self.weighted_ms
        self._weighted += max(0, duration_ms) * weight_ppm(temp_c)
        return self.weighted_ms - before

    @property
    def weighted_ms(self) -> int:
        """Everything so far."""
        return self._weighted // MICRO


class Flash(msgspec.Struct, frozen=True, kw_only=True):
    """The computer's flash memory. ``amplification``: bytes that the chip writes for one byte of ours, an assumption.

    ``replacement_micro`` has no default: what a repair costs is for the operator to say.
    """

    capacity_bytes: int
    replacement_micro: int
    erase_cycles: int = 3_000
    amplification: float = 4.0

    def worn_ppb(self, written_bytes: int) -> int:
        """Part of the flash memory's life that these bytes use up, in billionths, rounded up."""
        written = ceil(max(0, written_bytes) * self.amplification)
        return -(-written * 1_000_000_000 // (self.capacity_bytes * self.erase_cycles))

    def cost_micro_gb(self) -> int:
        """What writing a gigabyte costs, rounded up."""
        return -(-self.worn_ppb(1_000_000_000) * self.replacement_micro // 1_000_000_000)


class WearPrices(msgspec.Struct, frozen=True, kw_only=True):
    """What wear costs the owner, in millionths of the currency.

    ``battery_micro_kwh`` for a kilowatt-hour that we take through the battery; ``pack_heat_micro_h`` for an hour in
    which the battery is warmer because of us; ``silicon_micro_h`` for an hour of computing at 85 Celsius; and
    ``flash_micro_gb`` for a gigabyte written. The last two are 0 unless the operator names a price: budgets bound them.
    """

    battery_micro_kwh: int = BATTERY_BOUND_MICRO_KWH
    pack_heat_micro_h: int = 0
    silicon_micro_h: int = 0
    flash_micro_gb: int = 0

    def cost_micro(self, *, battery_mws: int, compute_ms: int, weighted_ms: int, flash_bytes: int) -> int:
        """What this wear costs together, rounded up."""
        parts = (
            (battery_mws * self.battery_micro_kwh, MWS_PER_KWH),
            (compute_ms * self.pack_heat_micro_h, 3_600_000),
            (weighted_ms * self.silicon_micro_h, 3_600_000),
            (flash_bytes * self.flash_micro_gb, 1_000_000_000),
        )
        return sum(-(-amount // unit) for amount, unit in parts)


def battery_price(
    chemistry: str,
    limit_pct: float,
    *,
    pack_micro_kwh: int = PACK_MICRO_KWH,
    bound_micro_kwh: int = BATTERY_BOUND_MICRO_KWH,
) -> int:
    """Cost of a kilowatt-hour through the battery for promises to owners: the larger of the table and the bound."""
    return max(bound_micro_kwh, table_price(chemistry, limit_pct, pack_micro_kwh=pack_micro_kwh))


def table_price(chemistry: str, limit_pct: float, *, pack_micro_kwh: int = PACK_MICRO_KWH) -> int:
    """What the table says that a kilowatt-hour through the battery costs: the dearest of its cases, never below 0."""
    rows = _rows(chemistry, limit_pct)
    base = rows["none"]
    kwh = [row.battery_w / 1000 * NIGHT_HOURS * NIGHTS_A_YEAR * YEARS for row in rows.values()]
    costs = [
        _cost_micro(row.years_8_pp - base.years_8_pp, pack_micro_kwh) / through
        for row, through in zip(rows.values(), kwh, strict=True)
        if through > 0 and row.pack_delta_c == 0
    ]
    return ceil(max(0.0, *costs))


def pack_heat_price(chemistry: str, limit_pct: float, delta_c: float, *, pack_micro_kwh: int = PACK_MICRO_KWH) -> int:
    """Cost of an hour in which the battery is ``delta_c`` warmer because of us, by the table, in proportion."""
    if delta_c <= 0:
        return 0
    rows = _rows(chemistry, limit_pct)
    base = rows["none"].years_8_pp
    warm = [
        (row.pack_delta_c, row.years_8_pp - base) for row in rows.values() if row.pack_delta_c and not row.battery_w
    ]
    per_degree = max(0.0, *(loss / degrees for degrees, loss in warm))
    return ceil(_cost_micro(per_degree * delta_c, pack_micro_kwh) / (NIGHT_HOURS * NIGHTS_A_YEAR * YEARS))


def chemistries() -> tuple[str, ...]:
    """The chemistries of the table."""
    return tuple(dict.fromkeys(row.chemistry for row in ROWS))


def _rows(chemistry: str, limit_pct: float) -> dict[str, WearRow]:
    """The rows of a chemistry at the charge limit of the table that is nearest, the higher one of two."""
    mine = [row for row in ROWS if row.chemistry == chemistry]
    if not mine:
        raise CallerError(
            f"no battery chemistry {chemistry!r}: take one of {', '.join(chemistries())}", param="chemistry"
        )
    nearest = min({row.limit_pct for row in mine}, key=lambda limit: (abs(limit - limit_pct), -limit))
    return {row.case: row for row in mine if row.limit_pct == nearest}


def _cost_micro(loss_pp: float, pack_micro_kwh: int) -> float:
    """What losing so many percentage points of a battery costs, as its part of the useful life."""
    return loss_pp / USEFUL_LIFE_PP * pack_micro_kwh * CAPACITY_WH / 1000
