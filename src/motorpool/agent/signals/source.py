"""Where the guard's signals come from: one small interface.

Decides nothing. Must not: fill gaps; a signal that was not received stays None, and each reading keeps its own time.
Called by: ``agent.loop``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from motorpool.core.signals import DriverMode, LowVoltage, NetworkClass, Occupancy, Reading, Signals


class SignalSource(Protocol):
    """A vehicle's signals. ``read`` is cheap and never waits; ``on_change`` makes a change known at once."""

    def read(self, now_ms: int) -> Signals:
        """The latest readings, each with the time at which it was taken."""

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` in the event loop whenever a reading has changed."""


class AlwaysParked:
    """A vehicle that stands locked on a live cable with a full battery, for benchmarks of everything else."""

    def __init__(self, soc_pct: float = 80.0) -> None:
        self._soc_pct = soc_pct

    def read(self, now_ms: int) -> Signals:
        """All is well, measured now."""
        return Signals(
            gear_is_park=Reading(True, now_ms),
            speed_kmh=Reading(0.0, now_ms),
            ignition=Reading(LowVoltage.OFF, now_ms),
            doors_open=Reading(False, now_ms),
            locked=Reading(True, now_ms),
            seat_occupied=Reading(Occupancy.EMPTY, now_ms),
            preconditioning=Reading(False, now_ms),
            driver_mode=Reading(DriverMode.OWNER, now_ms),
            update_in_progress=Reading(False, now_ms),
            cable_connected=Reading(True, now_ms),
            cable_locked=Reading(True, now_ms),
            grid_power_available=Reading(True, now_ms),
            feeding_grid=Reading(False, now_ms),
            battery_power_w=Reading(0.0, now_ms),
            soc_displayed_pct=Reading(self._soc_pct, now_ms),
            charge_limit_pct=Reading(self._soc_pct, now_ms),
            charger_power_w=Reading(7_000.0, now_ms),
            capacity_wh=Reading(60_000.0, now_ms),
            time_to_complete_s=Reading(0.0, now_ms),
            pack_temp_c=Reading(20.0, now_ms),
            computer_temp_c=Reading(40.0, now_ms),
            dcdc_temp_c=Reading(35.0, now_ms),
            low_voltage_v=Reading(13.2, now_ms),
            fault_count=Reading(0, now_ms),
            ac_power_w=Reading(0.0, now_ms),
            circuit_limit_w=Reading(11_000.0, now_ms),
            network=Reading(NetworkClass.UNMETERED, now_ms),
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """Nothing ever changes."""


class NoSignals:
    """A vehicle without a signal source: nothing is ever received, so nothing is ever permitted."""

    def read(self, now_ms: int) -> Signals:  # noqa: ARG002  # the signature is the interface's
        """Every signal is missing."""
        return Signals()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Nothing ever changes."""
