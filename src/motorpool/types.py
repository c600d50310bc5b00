"""The vocabulary that every room shares: plain frozen values, no behaviour beyond their own consistency.

Units are the last part of a name: ``_ms`` milliseconds, ``_mwh`` milliwatt-hours, ``_uwh`` micro-watt-hours, ``_micro``
millionths of the currency unit, ``_pct`` percent, ``_w`` watts.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

TokenCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]  # of one answer; sums of them fit the books' 64 bits
EnergyUwh = Annotated[int, msgspec.Meta(ge=0, le=10**10)]  # micro-watt-hours of one answer: 10 kWh at most


class Kind(StrEnum):
    """What a request asks for; the values are the last parts of OpenAI's paths."""

    CHAT = "chat/completions"
    COMPLETION = "completions"
    EMBEDDING = "embeddings"

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
    OFFLINE = "offline"  # the vehicle had no link for longer than the lease allows
    SHUTDOWN = "shutdown"  # the agent was asked to stop
    REFUSED = "refused"  # the vehicle cannot run them: model not loaded, no permit, queue full


class ModelTier(StrEnum):
    """How much the vehicle may run: the rungs of the thermal ladder above "off"."""

    FULL = "full"  # the vehicle's model at the permit's power
    REDUCED = "reduced"  # the same model at less power
    SMALL = "small"  # its small model alone, at less power still; nothing if it has none


class ReasonCode(StrEnum):
    """Why the guard gives no permit. Each one is shown to the owner and to the operator in words."""

    CONSENT_MISSING = "consent_missing"
    CONSENT_INVALID = "consent_invalid"
    CONSENT_EXPIRED = "consent_expired"
    CONSENT_WITHDRAWN = "consent_withdrawn"
    CONSENT_SUSPENDED = "consent_suspended"  # somebody else had the car; the owner has to confirm
    PAUSED = "paused"  # the owner said: not now
    QUIET_HOURS = "quiet_hours"
    SIGNAL_MISSING = "signal_missing"
    SIGNAL_STALE = "signal_stale"
    MOVING = "moving"
    NOT_IN_PARK = "not_in_park"
    IGNITION_ON = "ignition_on"
    DOOR_OPEN = "door_open"
    UNLOCKED = "unlocked"
    OCCUPIED = "occupied"
    PRECONDITIONING = "preconditioning"
    UPDATE_IN_PROGRESS = "update_in_progress"
    NOT_PLUGGED_IN = "not_plugged_in"
    CABLE_UNLOCKED = "cable_unlocked"
    NO_GRID_POWER = "no_grid_power"
    FEEDING_GRID = "feeding_grid"
    BELOW_FLOOR = "below_floor"
    READY_BY_AT_RISK = "ready_by_at_risk"
    CHARGING_FIRST = "charging_first"
    CIRCUIT_LIMIT = "circuit_limit"
    TOO_HOT = "too_hot"
    LOW_12V = "low_12v"
    FAULT = "fault"  # error codes of the car, and a time of cooling down after them
    POWER_SAVING = "power_saving"  # the car itself asks for it
    BUDGET_USED_UP = "budget_used_up"
    BUDGET_UNKNOWN = "budget_unknown"  # what was used before cannot be read
    METERED_NETWORK = "metered_network"
    NOT_WORTH_IT = "not_worth_it"  # electricity and wear would cost the owner more than the work earns
    DWELL = "dwell"  # everything is fine again, but not yet for long enough


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """One reason for a "no". ``detail`` is for people and holds no location, VIN, name or key."""

    code: ReasonCode
    detail: str = ""


class Permit(msgspec.Struct, frozen=True, kw_only=True):
    """The guard's "yes": how much power, which tier of model, and until when it holds without a new decision.

    ``battery_fed``: the owner has allowed computing from the battery, and this is that case.
    """

    watts_w: int
    until_ms: int
    tier: ModelTier = ModelTier.FULL
    battery_fed: bool = False


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one finished request, as the customer is billed.

    ``completion_tokens`` counts the whole answer; ``carried_tokens`` of them were generated on earlier vehicles.
    ``energy_uwh`` is what the last vehicle drew for it, measured or modelled.
    """

    prompt_tokens: TokenCount = 0
    completion_tokens: TokenCount = 0
    cached_tokens: TokenCount = 0
    carried_tokens: TokenCount = 0
    energy_uwh: EnergyUwh = 0
    energy_is_measured: bool = False


# Named bounds. A message or body beyond them is refused with an error that names the bound.
MAX_BODY_BYTES = 4 * 1024 * 1024  # one request body, live or a line of a batch
MAX_CHECKPOINT_BYTES = 3 * 1024 * 1024  # with the largest body it still fits one message; longer ones are not handed on
MAX_BATCH_BYTES = 200 * 1024 * 1024  # one batch input file
MAX_BATCH_LINES = 50_000
MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_MESSAGE_BYTES = 8 * 1024 * 1024  # one message on the vehicle link
MAX_ITEMS_PER_MESSAGE = 4096
MAX_CUSTOM_ID_CHARS = 512
MAX_EMBEDDING_INPUTS = 2048  # texts or lists of tokens of one request; OpenAI's bound
