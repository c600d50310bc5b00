"""What a backend offers to the process that hosts it. Smaller than ``Engine``: stopping is done to the whole process.

Decides nothing. Called by: ``host``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from motorpool.agent.runtime.engine import EngineEvent, Ready, Work

Emit = Callable[[list[EngineEvent]], None]


class BackendRunner(Protocol):
    """Runs attempts and hands their events to the ``emit`` that it was made with, in the event loop's thread."""

    async def load(self) -> Ready:
        """Get ready; raise MotorpoolError if that fails."""

    def submit(self, work: list[Work]) -> None:
        """Queue attempts."""

    def cancel(self, keys: list[str]) -> None:
        """Stop attempts; each unfinished one answers Cancelled."""

    def limit(self, slots: int) -> None:
        """Run at most so many attempts at a time from now on; those that run beyond it come to their end."""
