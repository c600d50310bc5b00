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
MEASURE_MS: Final = 1_000
MIN_PASSED_MS: Final = 50  # for the first measure, which does not wait so long
BACKOFF_MS: Final = 2_000  # no grants for so long to a vehicle that has just handed work back
MAX_DOUBLINGS: Final = 7  # of that, when it fails again and again: four minutes
_USABLE: Final = frozenset((VehicleState.READY, VehicleState.WORKING))


class Vehicle:
    """One vehicle as the scheduler sees it."""

    __slots__ = (
        "blocked_until_ms",
        "counted_as",
        "failures",
        "finished",
        "incarnation",
        "leases",
        "lines_per_s",
        "live",
        "offline",
        "paused_until_ms",
        "region",
        "result_ms",
        "seen_ms",
        "state",
        "vehicle_id",
        "withdrawal_seen",
        "withdrawn",
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
        self.finished = 0  # lines since ``result_ms``
        self.failures = 0  # since its last result
        self.blocked_until_ms = 0
        self.counted_as: str | None = None
        self.live = 0  # live requests placed here and not ended
        self.region = ""
        self.paused_until_ms = 0  # by the owner's word to the cell
        self.withdrawn = False  # the owner has taken the consent back
        self.withdrawal_seen = False  # and the vehicle knows it

    @property
    def slots(self) -> int:
        """How many attempts its engine runs at once."""
        return max(1, self.state.slots) if self.state else 1

    @property
    def present(self) -> bool:
        """Whether it is here and permitted."""
        return not self.offline and not self.withdrawn and self.permitted

    @property
    def permitted(self) -> bool:
        """Whether it says itself that it may work."""
        return self.state is not None and self.state.state in _USABLE

    def usable(self, now_ms: int) -> bool:
        """Whether it can be given work: present, not paused by its owner, and it has not just handed some back."""
        return self.present and now_ms >= max(self.blocked_until_ms, self.paused_until_ms)

    def outstanding(self) -> int:
        """Lines that it holds."""
        return sum(len(lease.lines) for lease in self.leases.values())

    def wait(self, now_ms: int, times: int = 1) -> None:
        """Give it nothing for a while."""
        self.blocked_until_ms = max(self.blocked_until_ms, now_ms + BACKOFF_MS * times)

    def failed(self, now_ms: int) -> None:
        """It had work and nothing came of it: wait, twice as long each time."""
        self.wait(now_ms, times=1 << min(self.failures, MAX_DOUBLINGS))
        self.failures += 1

    def succeeded(self, lines: int, now_ms: int) -> None:
        """Lines of it were accepted: smooth lines per second from them, not from claims, about once a second."""
        self.failures = 0
        self.finished += lines
        since = max(self.result_ms, min((lease.granted_ms for lease in self.leases.values()), default=now_ms))
        passed_ms = now_ms - since
        if passed_ms < MEASURE_MS and self.lines_per_s > 0:
            return
        rate = self.finished * 1000 / max(passed_ms, MIN_PASSED_MS)
        known = self.lines_per_s
        self.lines_per_s = rate if known == 0 else (1 - SPEED_SMOOTHING) * known + SPEED_SMOOTHING * rate
        self.result_ms, self.finished = now_ms, 0

    def depth(self, job: Job, vehicles: int) -> int:
        """How many lines of ``job`` it should hold when ``vehicles`` share the job.

        Two for each slot at first; then two minutes of work at its measured speed; near the end of a job no more than
        half of its fair part of what is left, so that all finish together (guided self-scheduling).
        """
        by_speed = int(self.lines_per_s * DEPTH_MS / 1000)
        fair = -(-job.pending // (2 * max(1, vehicles)))
        # However many slots it claims to have: no more than its part of the whole.
        least = min(self.slots * MIN_DEPTH_PER_SLOT, MAX_DEPTH_LINES, -(-job.pending // max(1, vehicles)))
        if job.pending < vehicles * least:
            least = min(self.slots, least)
        return max(min(by_speed, fair, MAX_DEPTH_LINES), least)
