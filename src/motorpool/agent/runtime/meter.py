"""How long an engine was busy, from how many attempts it holds.

Decides: nothing. Must not: ask the engine, which may be stopped. Called by: the engines.
"""

from __future__ import annotations

import time

from motorpool.agent.runtime.engine import Cancelled, EngineEvent, Finished


class BusyMeter:
    """Adds up the parts of its slots that an engine has in use. What it holds says how busy it is.

    An engine that loads its model works as hard as one with all slots taken; so does one that is held to fewer slots
    and has all of these taken. While it is paused nothing counts, and of the time in which the kernel holds it to a
    share of the processor only that share.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._held = 0
        self._busy_s = 0.0
        self._since_s = time.monotonic()
        self._running = False
        self._loading = False
        self._paused = False
        self._share = 1.0

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

    def pause(self, *, paused: bool) -> None:
        """The engine is stopped where it is, or goes on with what it did."""
        if paused != self._paused:
            self._settle()
            self._paused = paused

    def hold_to(self, *, slots: int, share: float) -> None:
        """The engine has so many slots from now on, and this share of the time."""
        self._settle()
        self._slots = max(1, slots)
        self._share = share

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
        return int(self._busy_s * 1000)

    def _settle(self) -> None:
        now_s = time.monotonic()
        if not self._paused:
            busy = 1.0 if self._loading else min(self._held / self._slots, 1.0) if self._running else 0.0
            self._busy_s += (now_s - self._since_s) * busy * self._share
        self._since_s = now_s
