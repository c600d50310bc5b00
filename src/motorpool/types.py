"""The vocabulary that every room shares: plain frozen values, no behaviour beyond their own consistency.

Units are the last part of a name: ``_ms`` milliseconds, ``_mwh`` milliwatt-hours, ``_micro`` millionths of the currency
unit, ``_pct`` percent, ``_w`` watts.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

TokenCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]  # of one answer; sums of them fit the books' 64 bits


class Kind(StrEnum):
    """What a request asks for; the values are the last parts of OpenAI's paths."""

    CHAT = "chat/completions"
    COMPLETION = "completions"

    @property
    def url(self) -> str:
        """The path as it stands in a batch line."""
        return f"/v1/{self.value}"


class VehicleState(StrEnum):
    """What a vehicle tells the cell about itself."""

    DENIED = "denied"  # the guard says no; the reasons say why
    STARTING = "starting"  # permitted, the engine is loading its model
    READY = "ready"  # permitted, the engine is idle
    WORKING = "working"  # permitted, the engine runs attempts
    YIELDING = "yielding"  # the guard has just said no; the engine is frozen and the work goes back


class ReturnReason(StrEnum):
    """Why attempts came back unfinished."""

    GUARD = "guard"  # the owner needs the car, or a limit of the owner's was reached
    ENGINE_DIED = "engine_died"  # the engine process ended while it held these attempts
    REVOKED = "revoked"  # the cell asked for them back
    EXPIRED = "expired"  # the lease ran out before they were finished
    SHUTDOWN = "shutdown"  # the agent was asked to stop
    REFUSED = "refused"  # the vehicle cannot run them: model not loaded, no permit, queue full


class ReasonCode(StrEnum):
    """Why the guard gives no permit. Each one is shown to the owner and to the operator in words."""

    CONSENT_MISSING = "consent_missing"
    CONSENT_INVALID = "consent_invalid"
    CONSENT_EXPIRED = "consent_expired"
    CONSENT_WITHDRAWN = "consent_withdrawn"
    SIGNAL_MISSING = "signal_missing"
    SIGNAL_STALE = "signal_stale"
    MOVING = "moving"
    NOT_IN_PARK = "not_in_park"
    IGNITION_ON = "ignition_on"
    DOOR_OPEN = "door_open"
    UNLOCKED = "unlocked"
    OCCUPIED = "occupied"
    NOT_PLUGGED_IN = "not_plugged_in"
    CABLE_UNLOCKED = "cable_unlocked"
    NO_GRID_POWER = "no_grid_power"
    BELOW_FLOOR = "below_floor"
    READY_BY_AT_RISK = "ready_by_at_risk"
    DWELL = "dwell"  # everything is fine again, but not yet for long enough


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """One reason for a "no". ``detail`` is for people and holds no location, VIN, name or key."""

    code: ReasonCode
    detail: str = ""


class Permit(msgspec.Struct, frozen=True, kw_only=True):
    """The guard's "yes": how much power the engine may draw and until when it holds without a new decision."""

    watts_w: int
    until_ms: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one finished request, as the customer is billed.

    ``completion_tokens`` counts the whole answer; ``carried_tokens`` of them were generated on earlier vehicles.
    """

    prompt_tokens: TokenCount = 0
    completion_tokens: TokenCount = 0
    cached_tokens: TokenCount = 0
    carried_tokens: TokenCount = 0


# Named bounds. A message or body beyond them is refused with an error that names the bound.
MAX_BODY_BYTES = 4 * 1024 * 1024  # one request body, live or a line of a batch
MAX_CHECKPOINT_BYTES = 3 * 1024 * 1024  # with the largest body it still fits one message; longer ones are not handed on
MAX_BATCH_BYTES = 200 * 1024 * 1024  # one batch input file
MAX_BATCH_LINES = 50_000
MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_MESSAGE_BYTES = 8 * 1024 * 1024  # one message on the vehicle link
MAX_ITEMS_PER_MESSAGE = 4096
MAX_CUSTOM_ID_CHARS = 512
