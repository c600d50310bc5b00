"""What the cell knows of each vehicle between two of its reports, and how much work to put before it.

Decides: whether a vehicle can be given work, and how deep its queue should be. Called by: ``core.scheduler``.
"""

from __future__ import annotations

from typing import Final

from motorpool.core.jobs import Job, Lease
from motorpool.types import VehicleState
from motorpool.wire import State

DEPTH_MS: Final = 120_000  # a queue holds at most this much work at the measured speed: long enough for a short outage
MIN_DEPTH_PER_SLOT: Final = 2  # while one line runs, the next one waits
MAX_DEPTH_LINES: Final = 16_384
SPEED_SMOOTHING: Final = 0.3
_USABLE: Final = frozenset((VehicleState.READY, VehicleState.WORKING))


class Vehicle:
    """One vehicle as the scheduler sees it."""

    __slots__ = (
        "blocked_until_ms",
        "counted_as",
        "incarnation",
        "leases",
        "lines_per_s",
        "live",
        "offline",
        "result_ms",
        "seen_ms",
        "state",
        "vehicle_id",
    )

    def __init__(self, vehicle_id: str) -> None:
        self.vehicle_id = vehicle_id
        self.state: State | None = None
        self.incarnation = ""
        self.seen_ms = 0
        self.offline = True
        self.leases: dict[str, Lease] = {}
        self.lines_per_s = 0.0
        self.result_ms = 0
        self.blocked_until_ms = 0
        self.counted_as: str | None = None
        self.live = 0  # live requests placed here and not ended

    @property
    def slots(self) -> int:
        """How many attempts its engine runs at once."""
        return max(1, self.state.slots) if self.state else 1

    @property
    def present(self) -> bool:
        """Whether it is here and permitted."""
        return not self.offline and self.state is not None and self.state.state in _USABLE

    def usable(self, now_ms: int) -> bool:
        """Whether it can be given work: present, and it has not just handed some back."""
        return self.present and now_ms >= self.blocked_until_ms

    def outstanding(self) -> int:
        """Lines that it holds."""
        return sum(len(lease.lines) for lease in self.leases.values())

    def learn_speed(self, finished: int, now_ms: int) -> None:
        """Smooth lines per second from results, not from claims."""
        since = max(self.result_ms, min((lease.granted_ms for lease in self.leases.values()), default=now_ms))
        rate = finished * 1000 / max(1, now_ms - since)
        known = self.lines_per_s
        self.lines_per_s = rate if known == 0 else (1 - SPEED_SMOOTHING) * known + SPEED_SMOOTHING * rate
        self.result_ms = now_ms

    def depth(self, job: Job, vehicles: int) -> int:
        """How many lines of ``job`` it should hold when ``vehicles`` share the job.

        Two for each slot at first; then two minutes of work at its measured speed; near the end of a job no more than
        half of its fair part of what is left, so that all finish together (guided self-scheduling).
        """
        by_speed = int(self.lines_per_s * DEPTH_MS / 1000)
        fair = -(-job.pending // (2 * max(1, vehicles)))
        least = min(self.slots * MIN_DEPTH_PER_SLOT, MAX_DEPTH_LINES)
        if job.pending < vehicles * least:
            least = min(self.slots, MAX_DEPTH_LINES)
        return max(min(by_speed, fair, MAX_DEPTH_LINES), least)
