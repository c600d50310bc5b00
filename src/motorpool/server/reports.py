"""The last report of each vehicle, for those who want to look at it; the scheduler keeps only what it reckons with.

Kept packed: a fleet of a hundred thousand is looked at one at a time. Of a car whose owner has withdrawn the consent
only what it needs for its work to end.

Called by: ``server.loop``, ``server.admin``. Must not: decide.
"""

from __future__ import annotations

import msgspec

from motorpool import wire
from motorpool.types import ReasonCode


class Reports:
    """The last word of every vehicle since the start."""

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}

    def take(self, vehicle_id: str, state: wire.State, *, withdrawn: bool) -> None:
        """A vehicle has reported."""
        self._packed[vehicle_id] = wire.encode(bare(state) if withdrawn else state)

    def get(self, vehicle_id: str) -> wire.State | None:
        """What it last said."""
        packed = self._packed.get(vehicle_id)
        state = None if packed is None else wire.decode(wire.UP_STATE, packed)
        return state if isinstance(state, wire.State) else None

    def withdraw(self, vehicle_id: str) -> None:
        """Its owner has taken the consent back: nothing of the car stays."""
        state = self.get(vehicle_id)
        if state is not None:
            self._packed[vehicle_id] = wire.encode(bare(state))

    def forget(self, vehicle_id: str) -> None:
        """It was struck off."""
        self._packed.pop(vehicle_id, None)


def bare(state: wire.State) -> wire.State:
    """What is needed of a report to end the work of a vehicle whose consent is withdrawn, and nothing about its car."""
    return wire.State(
        incarnation=state.incarnation,
        seq=state.seq,
        state=state.state,
        region=state.region,
        model=state.model,
        slots=state.slots,
        held=state.held,
        reasons=[
            msgspec.structs.replace(reason, detail="")
            for reason in state.reasons
            if reason.code is ReasonCode.CONSENT_WITHDRAWN
        ],
    )
