"""The transition table of the vehicle machine, and which reasons mean that the owner is really leaving.

Decides: which state follows which. Must not: hold state; ``core.vehicle`` does.
Called by: ``core.vehicle``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from motorpool.types import ReasonCode, VehicleState


class Trigger(StrEnum):
    """What moves the vehicle from one state to the next."""

    PERMITTED = "permitted"  # the guard says yes
    DENIED = "denied"  # the guard says no, perhaps for a moment
    LEAVING = "leaving"  # the guard says no, and the owner goes away or takes the consent back
    LOADED = "loaded"  # the engine has loaded its model
    DIED = "died"  # the engine ended by itself
    GRACE_OVER = "grace_over"  # a frozen engine has waited long enough
    BUSY = "busy"  # the engine has attempts
    IDLE = "idle"  # the engine has none


# A vehicle has an engine process in every state but DENIED (in STARTING it may still wait for its next try after a
# crash), and attempts in the engine in WORKING alone. Only a permit leads out of DENIED and YIELDING. A "no" while the
# engine holds a model freezes it first: an owner who only fetches a bag costs no reload. While it still loads there is
# nothing to keep, so it is killed. LEAVING skips the grace: the memory is the owner's within the second.
# What is not in the table cannot happen; meeting it is a bug of ours and fails an assertion.
TRANSITIONS: Final[dict[tuple[VehicleState, Trigger], VehicleState]] = {
    (VehicleState.DENIED, Trigger.PERMITTED): VehicleState.STARTING,
    (VehicleState.STARTING, Trigger.LOADED): VehicleState.READY,
    (VehicleState.STARTING, Trigger.DIED): VehicleState.STARTING,
    (VehicleState.STARTING, Trigger.DENIED): VehicleState.DENIED,
    (VehicleState.STARTING, Trigger.LEAVING): VehicleState.DENIED,
    (VehicleState.READY, Trigger.BUSY): VehicleState.WORKING,
    (VehicleState.READY, Trigger.DIED): VehicleState.STARTING,
    (VehicleState.READY, Trigger.DENIED): VehicleState.YIELDING,
    (VehicleState.READY, Trigger.LEAVING): VehicleState.DENIED,
    (VehicleState.WORKING, Trigger.IDLE): VehicleState.READY,
    (VehicleState.WORKING, Trigger.DIED): VehicleState.STARTING,
    (VehicleState.WORKING, Trigger.DENIED): VehicleState.YIELDING,
    (VehicleState.WORKING, Trigger.LEAVING): VehicleState.DENIED,
    (VehicleState.YIELDING, Trigger.PERMITTED): VehicleState.READY,
    (VehicleState.YIELDING, Trigger.GRACE_OVER): VehicleState.DENIED,
    (VehicleState.YIELDING, Trigger.LEAVING): VehicleState.DENIED,
    (VehicleState.YIELDING, Trigger.DIED): VehicleState.DENIED,
}
LEAVING: Final = frozenset(
    {
        ReasonCode.MOVING,
        ReasonCode.NOT_IN_PARK,
        ReasonCode.IGNITION_ON,
        ReasonCode.NOT_PLUGGED_IN,
        ReasonCode.CONSENT_MISSING,
        ReasonCode.CONSENT_INVALID,
        ReasonCode.CONSENT_EXPIRED,
        ReasonCode.CONSENT_WITHDRAWN,
    }
)
