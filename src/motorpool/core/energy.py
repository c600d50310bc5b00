"""What computing takes from the vehicle and from the grid: watts of the computer in, energy at the socket out.

Decides: how losses and the overhead of a vehicle that is awake only for us are counted, and whether energy was measured
or modelled. Must not: read meters or a clock, or know prices (``core.economics`` does).
Called by: ``core.vehicle`` and the agent (one ``EnergyMeter`` each), ``core.economics``, the simulator.

A chain of stated losses, all of it straight lines: the computer's watts go through the DC/DC converter; a vehicle that
would sleep without us adds ``awake_w``; the charger adds what it needs to be on, and a share of what passes through.
So the losses of a charger weigh more the less passes through it, as measured ones do. From the battery, the same watts
come out of the battery and are put back by a charger later, at ``recharge_w``.

Power is rounded up to whole milliwatts once; energy is milliwatts times milliseconds, in whole numbers, so that nothing
is lost however often it is added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isfinite
from typing import Final

import msgspec

from motorpool.errors import CallerError

WHOLE_BP: Final = 10_000  # basis points: hundredths of a percent
MWS_PER_MWH: Final = 3_600
MWS_PER_KWH: Final = 3_600_000_000
MAX_POWER_W: Final = 1_000_000.0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is held to, so that it draws no more than the permit's watts.

    ``duty`` is the part of the time in which the engine may run (1.0: always); ``memory_bytes`` None: no limit of ours.
    ``expected_w`` is the draw that the power model states for these settings; it never exceeds ``watts_w``.
    """

    watts_w: int
    threads: int
    duty: float = 1.0
    slots: int = 1
    memory_bytes: int | None = None
    expected_w: float = 0.0


class Power(msgspec.Struct, frozen=True, kw_only=True):
    """Power of one moment in whole milliwatts.

    ``computer_mw`` at the computer; ``overhead_mw`` of a vehicle that is awake for us; ``battery_mw`` out of the
    battery's terminals (0 when the grid feeds); ``grid_mw`` at the socket, now or when the battery is charged again.
    """

    computer_mw: int = 0
    overhead_mw: int = 0
    battery_mw: int = 0
    grid_mw: int = 0


class EnergyModel(msgspec.Struct, frozen=True, kw_only=True):
    """The stated losses of a vehicle. Efficiencies in basis points (hundredths of a percent).

    The defaults are cautious: the charger's line goes through the greater losses that ADAC measured (24.2 % at 2.3 kW,
    9.7 % at 11 kW), which are 422 W and 5.9 % of what is drawn; 300 W of the 422 are the vehicle that is awake.
    ``recharge_w`` is the power at the socket with which the battery is thought to be charged again.
    """

    dcdc_bp: int = 9_200
    awake_w: float = 300.0
    charger_on_w: float = 122.0
    charger_bp: int = 9_410
    battery_out_bp: int = 9_700
    battery_in_bp: int = 9_700
    recharge_w: float = 2_300.0

    def power(self, computer_w: float, *, awake_for_us: bool, grid_fed: bool) -> Power:
        """What ``computer_w`` means for the whole vehicle. ``awake_for_us``: without us it would sleep."""
        computer_mw = _milliwatts(computer_w)
        overhead_mw = _milliwatts(self.awake_w) if awake_for_us else 0
        dc_mw = _divide_up(computer_mw, self.dcdc_bp) + overhead_mw
        if grid_fed:
            on_mw = _milliwatts(self.charger_on_w) if awake_for_us else 0
            grid_mw = _divide_up(dc_mw + on_mw, self.charger_bp)
            return Power(computer_mw=computer_mw, overhead_mw=overhead_mw, grid_mw=grid_mw)
        battery_mw = _divide_up(dc_mw, self.battery_out_bp)
        into_mw = _divide_up(battery_mw, self.battery_in_bp)
        grid_mw = -(-into_mw * _milliwatts(self.recharge_w) // self._recharge_dc_mw())
        return Power(computer_mw=computer_mw, overhead_mw=overhead_mw, battery_mw=battery_mw, grid_mw=grid_mw)

    def _recharge_dc_mw(self) -> int:
        """What a charge at ``recharge_w`` puts out; the vehicle is awake for that charge too."""
        drawn_mw = _milliwatts(self.recharge_w)
        return drawn_mw * self.charger_bp // WHOLE_BP - _milliwatts(self.charger_on_w) - _milliwatts(self.awake_w)

    def check(self) -> EnergyModel:
        """The model itself; raises CallerError if a number in it cannot be."""
        for name in ("dcdc_bp", "charger_bp", "battery_out_bp", "battery_in_bp"):
            if not 1_000 <= getattr(self, name) <= WHOLE_BP:
                raise CallerError(f"{name} must lie between 1000 and {WHOLE_BP} (10 % and 100 %)", param=name)
        for name in ("awake_w", "charger_on_w", "recharge_w"):
            if not 0 <= getattr(self, name) <= MAX_POWER_W:
                raise CallerError(f"{name} must lie between 0 and {MAX_POWER_W:g} W", param=name)
        if self._recharge_dc_mw() <= 0:
            raise CallerError(
                "recharge_w is less than what the charger and the vehicle need to be on", param="recharge_w"
            )
        return self


class Increment(msgspec.Struct, frozen=True, kw_only=True):
    """Energy of a stretch of time in milliwatt-seconds, as ``Power`` names them.

    ``measured``: a meter read the computer's power all the time. Losses and overhead always follow the stated model.
    """

    grid_mws: int = 0
    battery_mws: int = 0
    computer_mws: int = 0
    overhead_mws: int = 0
    measured: bool = False

    @property
    def grid_mwh(self) -> int:
        """Whole milliwatt-hours at the socket. Take ``EnergyMeter.grid_mwh_since`` for parts that add up."""
        return self.grid_mws // MWS_PER_MWH


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of a meter, to which ``EnergyMeter.since`` compares."""

    total: Increment = Increment()
    measured_ms: int = 0
    modelled_ms: int = 0


class EnergyMeter:
    """Adds up what a vehicle draws because of us.

    A stretch longer than ``max_gap_ms`` counts for that long only: a computer that slept drew nothing for us, and an
    engine whose agent does not come back ends itself long before.
    """

    __slots__ = (
        "_battery",
        "_computer",
        "_grid",
        "_last_ms",
        "_max_gap_ms",
        "_measured_ms",
        "_modelled_ms",
        "_overhead",
        "model",
    )

    def __init__(self, model: EnergyModel, *, max_gap_ms: int = 60_000) -> None:
        self.model = model.check()
        self._max_gap_ms = max_gap_ms
        self._last_ms: int | None = None
        # In microwatt-seconds: milliwatts times milliseconds.
        self._grid = self._battery = self._computer = self._overhead = 0
        self._measured_ms = self._modelled_ms = 0

    def advance(
        self, now_ms: int, computer_w: float, *, awake_for_us: bool, grid_fed: bool, measured: bool
    ) -> Increment:
        """Count the stretch that ends now, in which the computer drew ``computer_w`` for us; returns what it was.

        The first call only starts the clock. After a clock that was set back, time counts from there on.
        """
        before = self.mark()
        passed_ms = 0 if self._last_ms is None else min(max(0, now_ms - self._last_ms), self._max_gap_ms)
        self._last_ms = now_ms
        if passed_ms:
            power = self.model.power(computer_w, awake_for_us=awake_for_us, grid_fed=grid_fed)
            self._grid += power.grid_mw * passed_ms
            self._battery += power.battery_mw * passed_ms
            self._computer += power.computer_mw * passed_ms
            self._overhead += power.overhead_mw * passed_ms
            if measured:
                self._measured_ms += passed_ms
            else:
                self._modelled_ms += passed_ms
        return self.since(before)

    @property
    def total(self) -> Increment:
        """Everything since the meter was made."""
        return Increment(
            grid_mws=self._grid // 1000,
            battery_mws=self._battery // 1000,
            computer_mws=self._computer // 1000,
            overhead_mws=self._overhead // 1000,
            measured=self._measured_ms > 0 and self._modelled_ms == 0,
        )

    def mark(self) -> Mark:
        """Remember this moment: the beginning of a lease or of a session."""
        return Mark(total=self.total, measured_ms=self._measured_ms, modelled_ms=self._modelled_ms)

    def since(self, mark: Mark) -> Increment:
        """What was drawn since ``mark``. Parts between consecutive marks add up to the whole exactly."""
        total, was = self.total, mark.total
        return Increment(
            grid_mws=total.grid_mws - was.grid_mws,
            battery_mws=total.battery_mws - was.battery_mws,
            computer_mws=total.computer_mws - was.computer_mws,
            overhead_mws=total.overhead_mws - was.overhead_mws,
            measured=self._measured_ms > mark.measured_ms and self._modelled_ms == mark.modelled_ms,
        )

    def grid_mwh_since(self, mark: Mark) -> int:
        """Whole milliwatt-hours at the socket since ``mark``; between consecutive marks they add up exactly."""
        return self.total.grid_mwh - mark.total.grid_mwh


def divide(amount: int, weights: Sequence[int]) -> list[int]:
    """``amount`` in parts by weight, whole numbers that add up to it: the energy of a stretch over its requests.

    What rounding leaves goes to the greatest remainders, the first among equals. Without any weight the parts are even.
    """
    assert amount >= 0
    assert all(weight >= 0 for weight in weights)
    if not weights:
        return []
    total = sum(weights)
    shares = list(weights) if total else [1] * len(weights)
    total = total or len(weights)
    parts = [amount * share // total for share in shares]
    order = sorted(range(len(shares)), key=lambda index: (-(amount * shares[index] % total), index))
    for index in order[: amount - sum(parts)]:
        parts[index] += 1
    return parts


def _milliwatts(watts_w: float) -> int:
    """Rounded up, and no less than nothing."""
    assert isfinite(watts_w), "a meter hands over numbers only"
    return ceil(min(max(watts_w, 0.0), MAX_POWER_W) * 1000)


def _divide_up(milliwatts: int, efficiency_bp: int) -> int:
    """What goes in so that ``milliwatts`` come out, rounded up."""
    return -(-milliwatts * WHOLE_BP // efficiency_bp)
