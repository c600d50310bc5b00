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
    SWITCH = "switch"  # another model is allowed, or is possible again: the thermal ladder was climbed up or down


# A vehicle has an engine process in every state but DENIED (in STARTING it may still wait for its next try after a
# crash), and attempts in the engine in WORKING alone. Only a permit leads out of DENIED and YIELDING. A "no" while the
# engine holds a model freezes it first: an owner who only fetches a bag costs no reload. While it still loads there is
# nothing to keep, so it is killed. LEAVING skips the grace: the memory is the owner's within the second. SWITCH ends
# one engine and starts the next one, with the other model, in one step.
# What is not in the table cannot happen; meeting it is a bug of ours and fails an assertion.
TRANSITIONS: Final[dict[tuple[VehicleState, Trigger], VehicleState]] = {
    (VehicleState.DENIED, Trigger.PERMITTED): VehicleState.STARTING,
    (VehicleState.STARTING, Trigger.LOADED): VehicleState.READY,
    (VehicleState.STARTING, Trigger.DIED): VehicleState.STARTING,
    (VehicleState.STARTING, Trigger.SWITCH): VehicleState.STARTING,
    (VehicleState.STARTING, Trigger.DENIED): VehicleState.DENIED,
    (VehicleState.STARTING, Trigger.LEAVING): VehicleState.DENIED,
    (VehicleState.READY, Trigger.BUSY): VehicleState.WORKING,
    (VehicleState.READY, Trigger.DIED): VehicleState.STARTING,
    (VehicleState.READY, Trigger.SWITCH): VehicleState.STARTING,
    (VehicleState.READY, Trigger.DENIED): VehicleState.YIELDING,
    (VehicleState.READY, Trigger.LEAVING): VehicleState.DENIED,
    (VehicleState.WORKING, Trigger.IDLE): VehicleState.READY,
    (VehicleState.WORKING, Trigger.DIED): VehicleState.STARTING,
    (VehicleState.WORKING, Trigger.SWITCH): VehicleState.STARTING,
    (VehicleState.WORKING, Trigger.DENIED): VehicleState.YIELDING,
    (VehicleState.WORKING, Trigger.LEAVING): VehicleState.DENIED,
    (VehicleState.YIELDING, Trigger.PERMITTED): VehicleState.READY,
    (VehicleState.YIELDING, Trigger.SWITCH): VehicleState.STARTING,
    (VehicleState.YIELDING, Trigger.GRACE_OVER): VehicleState.DENIED,
    (VehicleState.YIELDING, Trigger.LEAVING): VehicleState.DENIED,
    (VehicleState.YIELDING, Trigger.DIED): VehicleState.DENIED,
}
# What each "no" means for a loaded engine. Every code is in exactly one of the two sets; a test says so.
# LEAVING: the car is about to be used, the owner takes the leave back, or the car needs its computer. Nothing is
# kept for later: the memory goes back at once.
LEAVING: Final = frozenset(
    {
        ReasonCode.CONSENT_MISSING,
        ReasonCode.CONSENT_INVALID,
        ReasonCode.CONSENT_EXPIRED,
        ReasonCode.CONSENT_WITHDRAWN,
        ReasonCode.CONSENT_SUSPENDED,  # somebody else drives: nothing of ours stays
        ReasonCode.PAUSED,  # the owner said so, for longer than any grace
        ReasonCode.MOVING,
        ReasonCode.NOT_IN_PARK,
        ReasonCode.IGNITION_ON,
        ReasonCode.PRECONDITIONING,  # the car is made ready for somebody who will leave
        ReasonCode.UPDATE_IN_PROGRESS,  # the car's own software needs memory and disk
        ReasonCode.NOT_PLUGGED_IN,
        ReasonCode.CABLE_UNLOCKED,  # nobody unlocks a cable but to pull it
        ReasonCode.FAULT,  # the car is not well: leave it alone
    }
)
# PASSING: it may be over in seconds (a bag is fetched, a signal is late), or it asks for no memory (heat, charge,
# money). The engine is frozen, and ends after the grace if the "no" stays.
PASSING: Final = frozenset(
    {
        ReasonCode.SIGNAL_MISSING,
        ReasonCode.SIGNAL_STALE,
        ReasonCode.DOOR_OPEN,
        ReasonCode.UNLOCKED,
        ReasonCode.OCCUPIED,  # who sits in the car may look for something; the ignition tells who drives
        ReasonCode.QUIET_HOURS,
        ReasonCode.NO_GRID_POWER,
        ReasonCode.FEEDING_GRID,
        ReasonCode.BELOW_FLOOR,
        ReasonCode.READY_BY_AT_RISK,
        ReasonCode.CHARGING_FIRST,
        ReasonCode.CIRCUIT_LIMIT,
        ReasonCode.TOO_HOT,
        ReasonCode.LOW_12V,
        ReasonCode.POWER_SAVING,
        ReasonCode.BUDGET_USED_UP,
        ReasonCode.BUDGET_UNKNOWN,
        ReasonCode.METERED_NETWORK,
        ReasonCode.NOT_WORTH_IT,
        ReasonCode.DWELL,
    }
)
