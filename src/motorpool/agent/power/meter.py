"""What the engine draws at this moment, and whether that was measured.

Decides: which source counts. Must not: add energy up (``core.energy`` does). Called by: the agent's loop, about every
second.

In this order: the vehicle's own signal while it is young, the processor's counters, the model. The first two see the
whole computer; what it draws without us is taken off where it was measured by the same source. What other programs draw
in that time counts as ours: more than the truth, never less. An engine that used no processor time drew nothing.
"""

from __future__ import annotations

from math import isfinite
from typing import Protocol

import msgspec

from motorpool.agent.power.model import Gauge, PowerModel, Source
from motorpool.agent.power.rapl import Rapl
from motorpool.core.signals import Reading, is_young


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """Mean watts of a stretch. ``measured``: by a meter, not by the model. ``source`` names it."""

    watts_w: float
    measured: bool
    source: Source


class Counters(Protocol):
    """What ``Rapl`` is to a meter."""

    def read(self, now_ms: int) -> float | None:
        """Mean watts since the last call, or None."""


class RaplGauge:
    """The processor's counters, for calibration."""

    source = Source.RAPL

    def __init__(self, rapl: Rapl) -> None:
        self._rapl = rapl

    def available(self, now_ms: int) -> bool:  # noqa: ARG002  # a signal may be old, a counter is not
        """Whether the counters can be read."""
        return self._rapl.available

    def read(self, now_ms: int) -> float | None:
        """Mean watts since the last call."""
        return self._rapl.read(now_ms)


class PowerMeter:
    """Watts between one reading and the next."""

    def __init__(self, model: PowerModel, counters: Counters | None = None) -> None:
        self.model = model
        self._counters = counters
        self._last_ms: int | None = None
        self._cpu_ms = 0
        self._busy_since_ms: int | None = None

    def read(self, now_ms: int, *, cpu_ms: int, computer_power: Reading[float] | None = None) -> Draw:
        """What the engine drew since the last call.

        ``cpu_ms``: processor time of the engine so far, by the kernel's count; less than last time is a new engine.
        ``computer_power``: the vehicle's signal ``computer_power_w``.
        """
        last_ms = now_ms if self._last_ms is None else self._last_ms
        wall_ms = max(0, now_ms - last_ms)
        used_ms = cpu_ms - self._cpu_ms if cpu_ms >= self._cpu_ms else cpu_ms
        self._last_ms, self._cpu_ms = now_ms, cpu_ms
        counted_w = self._counters.read(now_ms) if self._counters else None
        if used_ms <= 0 or wall_ms == 0:
            self._busy_since_ms = None
            return Draw(
                watts_w=0.0, measured=self._measures(now_ms, counted_w, computer_power), source=self.model.source
            )
        if self._busy_since_ms is None:
            self._busy_since_ms = last_ms
        # A reading from before the engine began to work says nothing of its work.
        signal_w = _usable(now_ms, computer_power)
        if signal_w is not None and computer_power is not None and computer_power.at_ms >= self._busy_since_ms:
            return self._above_idle(signal_w, Source.VEHICLE)
        if counted_w is not None:
            return self._above_idle(counted_w, Source.RAPL)
        return Draw(watts_w=self.model.draw_w(used_ms, wall_ms), measured=False, source=self.model.source)

    def _measures(self, now_ms: int, counted_w: float | None, computer_power: Reading[float] | None) -> bool:
        return counted_w is not None or _usable(now_ms, computer_power) is not None

    def _above_idle(self, watts_w: float, source: Source) -> Draw:
        idle_w = self.model.idle_w if self.model.source is source else 0.0
        return Draw(watts_w=max(0.0, watts_w - idle_w), measured=True, source=source)


def _usable(now_ms: int, reading: Reading[float] | None) -> float | None:
    if reading is None or not is_young("computer_power_w", reading, now_ms):
        return None
    return reading.value if isfinite(reading.value) and reading.value >= 0 else None


__all__ = ["Draw", "Gauge", "PowerMeter", "RaplGauge"]
