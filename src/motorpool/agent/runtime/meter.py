"""How long an engine was busy, from how many attempts it holds.

Decides: nothing. Must not: ask the engine, which may be stopped. Called by: the engines.
"""

from __future__ import annotations

import time

from motorpool.agent.runtime.engine import Cancelled, EngineEvent, Finished


class BusyMeter:
    """Adds up slot-seconds. An engine runs as many attempts as it has slots, so what it holds says how busy it is.

    An engine that loads its model works as hard as one with all slots taken.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._held = 0
        self._slot_s = 0.0
        self._since_s = time.monotonic()
        self._running = False
        self._loading = False

    def load(self) -> None:
        """The engine loads from now on, until it runs or stops."""
        self._settle()
        self._loading = True

    def run(self) -> None:
        """The engine computes from now on."""
        self._settle()
        self._running, self._loading = True, False

    def stop(self) -> None:
        """The engine computes no more: frozen, dead or not ready."""
        self._settle()
        self._running = self._loading = False

    def add(self, attempts: int) -> None:
        """The engine holds more attempts, or fewer if negative."""
        self._settle()
        self._held = max(0, self._held + attempts)

    def count(self, events: list[EngineEvent]) -> None:
        """Attempts that these events end are held no more."""
        ended = sum(1 for event in events if isinstance(event, Finished | Cancelled))
        if ended:
            self.add(-ended)

    def clear(self) -> None:
        """The engine holds nothing and computes nothing."""
        self.stop()
        self._held = 0

    def busy_ms(self) -> int:
        """Slot-seconds divided by the slots, in milliseconds, since the start."""
        self._settle()
        return int(self._slot_s / self._slots * 1000)

    def _settle(self) -> None:
        now_s = time.monotonic()
        busy = self._slots if self._loading else min(self._held, self._slots) if self._running else 0
        self._slot_s += (now_s - self._since_s) * busy
        self._since_s = now_s
