"""Which vehicle gets a live request: the scheduler's choice among those that are neither full nor under suspicion.

Counts what runs where, so that what waits does so in the cell and not in a vehicle that may leave. Must not: send
anything. Called by: ``server.live``, ``server.live_waiting``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from motorpool import wire
from motorpool.core.scheduler import Scheduler
from motorpool.core.streams import PER_SLOT, Suspects, Tier
from motorpool.server.beginnings import Readers

NEAR_MS: Final = 30.0  # a round trip of less is not worth a search
MAX_NEARER: Final = 2  # other vehicles that are looked at


class Fleet(Protocol):
    """What is needed of the cell's loop to know vehicles."""

    scheduler: Scheduler

    def now_ms(self) -> int:
        """Milliseconds since 1970 (UTC)."""

    def vehicle_state(self, vehicle_id: str) -> wire.State | None:
        """The last report of a vehicle; None while it is silent."""


class Places:
    """The places of all vehicles for live requests. ``clock_ms`` never goes back."""

    def __init__(self, fleet: Fleet, clock_ms: Callable[[], int]) -> None:
        self._fleet = fleet
        self._clock_ms = clock_ms
        self._taken: dict[str, int] = {}
        self._slots: dict[str, int] = {}
        self._full: dict[Tier, set[str]] = {tier: set() for tier in Tier}
        self.suspects = Suspects()
        self.readers = Readers()
        self.round_trips_ms: dict[str, float] = {}  # as the message server measures them

    def choose(self, model: str, tier: Tier, tried: set[str], beginnings: Sequence[int] = ()) -> str | None:
        """A vehicle that can take one more request of this tier now; None if there is none.

        One that has read the beginning of the conversation, if it has a free slot and stays; else the scheduler's
        choice, or a nearer one that is as good.
        """
        scheduler, now_ms = self._fleet.scheduler, self._fleet.now_ms()
        avoided = self.suspects.avoided(self._clock_ms())
        not_these = frozenset().union(tried, self._full[tier], avoided)
        for reader in self.readers.of(beginnings):
            if reader not in not_these and scheduler.is_free(reader, model, now_ms):
                return reader
        found = scheduler.place_live(model, not_these, now_ms)
        if found is None and avoided - tried - self._full[tier]:
            return scheduler.place_live(model, frozenset().union(tried, self._full[tier]), now_ms)
        return found if found is None else self._nearest(found, model, not_these, now_ms)

    def _nearest(self, found: str, model: str, not_these: frozenset[str], now_ms: int) -> str:
        """The nearest of a few good ones: a long way costs every token as much as a wait."""
        best, looked = found, {found}
        scheduler = self._fleet.scheduler
        while self._round_trip_ms(best) > NEAR_MS and len(looked) <= MAX_NEARER:
            other = scheduler.place_live(model, not_these | looked, now_ms)
            if other is None or not scheduler.is_free(other, model, now_ms):
                break
            looked.add(other)
            best = min(best, other, key=self._round_trip_ms)
        return best

    def _round_trip_ms(self, vehicle_id: str) -> float:
        return self.round_trips_ms.get(vehicle_id, 0.0)  # of whom nothing is known nothing bad is known

    def took(self, vehicle_id: str, beginnings: Sequence[int] = ()) -> wire.State | None:
        """One more request is there; what its vehicle last reported."""
        self.readers.read(beginnings, vehicle_id)
        state = self._fleet.vehicle_state(vehicle_id)
        self._slots[vehicle_id] = 1 if state is None else max(1, state.slots)
        self._fleet.scheduler.live_began(vehicle_id)
        self._count(vehicle_id, 1)
        return state

    def left(self, vehicle_id: str) -> None:
        """One ended there, or moved on."""
        self._fleet.scheduler.live_over(vehicle_id)
        self._count(vehicle_id, -1)

    def waves(self, vehicle_id: str) -> int:
        """How many requests deep it is, counted in its slots."""
        return -(-self._taken.get(vehicle_id, 0) // self._slots.get(vehicle_id, 1))

    def risk(self, vehicle_id: str) -> float | None:
        """The chance that it leaves within 15 minutes, as it last reported; None if it does not say."""
        state = self._fleet.vehicle_state(vehicle_id)
        return None if state is None else state.risk_15min

    def _count(self, vehicle_id: str, change: int) -> None:
        taken = self._taken.get(vehicle_id, 0) + change
        if taken <= 0:
            self._taken.pop(vehicle_id, None)
            slots = self._slots.pop(vehicle_id, 1)
        else:
            self._taken[vehicle_id] = taken
            slots = self._slots[vehicle_id]
        for tier, full in self._full.items():
            if taken >= PER_SLOT[tier] * slots:
                full.add(vehicle_id)
            else:
                full.discard(vehicle_id)
