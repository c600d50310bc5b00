"""Live requests that wait for a vehicle: in one room for each model, each until its deadline.

A request that finds no free vehicle waits here, within a bound, instead of in a vehicle. The more urgent go first, and
those that run already and have lost their vehicle before all others. Who finds no place in the room, or waits for too
long, is told so before the first byte, with the time after which it is worth trying again. Must not: send anything.

Called by: ``server.live``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from motorpool.core.streams import Tier, WaitingRoom
from motorpool.errors import CapacityError, RateLimitError
from motorpool.server.live_call import Call
from motorpool.server.live_places import Places

LOOK_S: Final = 0.05  # vehicles that come by themselves are noticed so often while somebody waits
BACK_MS: Final = 250  # a request whose vehicle broke off is not given back to it before


class _Waiter(msgspec.Struct):
    """Somebody in a room: what to do when there is a vehicle, and when there is none in time."""

    call: Call
    tier: Tier
    placed: Callable[[str], None]
    failed: Callable[[CapacityError], None]
    not_before_ms: int = 0


class Waiting:
    """All rooms."""

    def __init__(self, places: Places, clock_ms: Callable[[], int]) -> None:
        self._places = places
        self._clock_ms = clock_ms
        self._rooms: dict[str, WaitingRoom] = {}
        self._waiters: dict[str, _Waiter] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._looking = False

    def __len__(self) -> int:
        return len(self._waiters)

    def anybody_for(self, model: str) -> bool:
        """Whether somebody waits for this model, so that others have to wait after them."""
        room = self._rooms.get(model)
        return room is not None and len(room) > 0

    def enter(
        self, call: Call, tier: Tier, placed: Callable[[str], None], failed: Callable[[CapacityError], None]
    ) -> None:
        """Wait; one of the two is called, ``failed`` maybe at once."""
        now_ms = self._clock_ms()
        model, key = call.request.model, call.request.request_id
        room = self._rooms.setdefault(model, WaitingRoom())
        not_before_ms = now_ms + BACK_MS if tier is Tier.GOING_ON else 0
        self._waiters[key] = _Waiter(call, tier, placed, failed, not_before_ms)
        out = room.enter(key, tier, now_ms)
        if out is not None:
            waiter = self._waiters.pop(out)
            waiter.failed(
                RateLimitError(
                    "too many requests wait for this model already; try again later",
                    code="slow_down",
                    retry_after_ms=room.retry_after_ms(),
                )
            )
        self._arm()

    def leave(self, call: Call) -> None:
        """It waits no more: nobody wants it."""
        key = call.request.request_id
        if self._waiters.pop(key, None) is not None:
            self._rooms[call.request.model].leave(key)

    def look(self, model: str | None = None) -> None:
        """Give vehicles that have room to those that wait; of one model, or of all."""
        if self._looking or not self._waiters:
            return
        self._looking = True
        try:
            for name in [model] if model is not None else list(self._rooms):
                room = self._rooms.get(name)
                if room is not None:
                    self._serve(name, room)
        finally:
            self._looking = False

    def _serve(self, model: str, room: WaitingRoom) -> None:
        now_ms = self._clock_ms()
        refused: Tier | None = None
        for key in room:
            waiter = self._waiters[key]
            if refused is not None and waiter.tier >= refused:
                break  # whoever is less urgent may use no vehicle that this one may not
            if waiter.not_before_ms > now_ms:
                continue
            vehicle_id = self._places.choose(model, waiter.tier, waiter.call.tried, waiter.call.beginnings)
            if vehicle_id is not None:
                room.served(key, now_ms)
                del self._waiters[key]
                waiter.placed(vehicle_id)
            elif waiter.tier is not Tier.GOING_ON:
                refused = waiter.tier
        for key in room.overdue(now_ms):
            waiter = self._waiters.pop(key)
            room.leave(key)
            waiter.failed(
                CapacityError(
                    "every vehicle that serves this model is busy; try again later",
                    code="server_is_overloaded",
                    retry_after_ms=room.retry_after_ms(),
                )
            )

    def _arm(self) -> None:
        if self._timer is None and self._waiters:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.look()
        self._arm()
