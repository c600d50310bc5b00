"""What the vehicle machine is told and what it asks for: events in the past tense, commands in the imperative.

Decides nothing. Bodies and checkpoints are opaque bytes that the machine only passes on. Work that moves in thousands a
second comes and goes in lists, so that one event or command stands for many attempts.
Called by: ``core.vehicle``, ``agent.loop``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from motorpool.types import MAX_BODY_BYTES, Kind, Permit, Reason, Usage
from motorpool.wire import Answered, Broken, Delta, Down, Progress, Results, Returned, State, Tokens


class VehicleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The named bounds and times of one vehicle.

    ``freeze_grace_ms`` is how long a frozen engine waits for the owner to go away again before it is killed; with 0 it
    is killed in the step that freezes it, once its work has gone back. ``window_ms`` is how much work, at the recent
    rate, lies in the engine ahead of time, at most ``max_window`` attempts. ``max_queued_bytes`` counts the bodies and
    the checkpoints that wait. An engine that holds attempts and gives no sign of life for ``stall_ms`` is killed and
    counts as died. ``small_model`` is what runs on the lowest rung of the thermal ladder; without one nothing does.
    When the full model is allowed again, an idle engine changes back at once, one that has work after
    ``switch_back_ms``. A new bound of how long the car stays is no reason for a State before ``stay_interval_ms``.
    ``memory_gb`` and ``models_on_disk`` are said in every State; None says nothing of them.
    """

    model: str
    small_model: str | None = None
    region: str = "local"
    freeze_grace_ms: int = 5_000
    state_interval_ms: int = 5_000
    state_min_ms: int = 100
    progress_interval_ms: int = 2_000
    flush_items: int = 256
    flush_bytes: int = 512 * 1024
    flush_ms: int = 50
    window_ms: int = 50
    max_window: int = 4_096
    max_queued: int = 50_000
    max_queued_bytes: int = 256 * 1024 * 1024
    max_leases: int = 1_024
    max_live: int = 256
    max_live_bytes: int = MAX_BODY_BYTES
    max_outbox_items: int = 50_000
    max_outbox_bytes: int = 256 * 1024 * 1024
    max_closed: int = 10_000
    stall_ms: int = 300_000
    restart_min_ms: int = 1_000
    restart_max_ms: int = 60_000
    switch_back_ms: int = 600_000
    stay_interval_ms: int = 60_000
    memory_gb: int | None = None
    models_on_disk: tuple[str, ...] | None = None


# -- events ------------------------------------------------------------------------------------------------------------


class ProgressedAttempt(Protocol):
    """New tokens of one attempt, as the engine reports them."""

    @property
    def key(self) -> str:
        """The attempt."""

    @property
    def deltas(self) -> list[Delta]:
        """What is new since the last report."""


class FinishedAttempt(Protocol):
    """The end of one attempt, as the engine reports it."""

    @property
    def key(self) -> str:
        """The attempt."""

    @property
    def status(self) -> int:
        """The HTTP status for the customer."""

    @property
    def body(self) -> bytes:
        """The body for the customer."""

    @property
    def usage(self) -> Usage:
        """Tokens of the whole answer."""


class VerdictGiven(msgspec.Struct, frozen=True, kw_only=True):
    """The guard has judged: a permit, or None with the reasons; with what the operator may see of battery and stay.

    ``region`` is the code of the region that the car itself has found, None where the configuration says it.
    ``drawn_mws``: what the whole vehicle has drawn for us since the incarnation began, in milliwatt-seconds, measured
    or modelled by the shell; None if it does not say. ``is_measured`` speaks of what is new in it.
    """

    permit: Permit | None
    reasons: tuple[Reason, ...] = ()
    soc_pct: float | None = None
    plugged: bool | None = None
    stay_bound_ms: int | None = None
    risk_15min: float | None = None
    region: str | None = None
    drawn_mws: int | None = None
    is_measured: bool = False


class EngineReady(msgspec.Struct, frozen=True, kw_only=True):
    """The engine has loaded ``model`` and runs ``slots`` attempts at a time."""

    model: str
    slots: int
    fingerprint: str


class EngineDied(msgspec.Struct, frozen=True, kw_only=True):
    """The engine ended without being asked, or could not start.

    ``unheard``: by its own choice, because the agent had not told it in time that it may go on.
    """

    exit_code: int | None = None
    unheard: bool = False


class EngineWorked(msgspec.Struct, frozen=True, kw_only=True):
    """Attempts moved on. ``busy_ms`` is the engine's working time since its start.

    ``drawn_mws`` and ``is_measured`` as in VerdictGiven; without them energy is working time at the permit's power.
    """

    progressed: Sequence[ProgressedAttempt] = ()
    finished: Sequence[FinishedAttempt] = ()
    cancelled: Sequence[str] = ()
    busy_ms: int = 0
    drawn_mws: int | None = None
    is_measured: bool = False


class Arrived(msgspec.Struct, frozen=True, kw_only=True):
    """A message from the cell."""

    message: Down


class LinkChanged(msgspec.Struct, frozen=True, kw_only=True):
    """The link to the cell went up or down."""

    up: bool


class WorkPublished(msgspec.Struct, frozen=True, kw_only=True):
    """The durable stream has these messages."""

    message_ids: list[str]


class SpoolFilled(msgspec.Struct, frozen=True, kw_only=True):
    """What keeps undelivered messages safe takes no more (``full``), or takes some again."""

    full: bool


class Ticked(msgspec.Struct, frozen=True, kw_only=True):
    """Time has passed."""


class StopAsked(msgspec.Struct, frozen=True, kw_only=True):
    """The agent is to end: give everything back."""


Event = (
    VerdictGiven
    | EngineReady
    | EngineDied
    | EngineWorked
    | Arrived
    | LinkChanged
    | WorkPublished
    | SpoolFilled
    | Ticked
    | StopAsked
)


# -- commands ----------------------------------------------------------------------------------------------------------


class StartEngine(msgspec.Struct, frozen=True, kw_only=True):
    """Start the engine and load ``model``; a LimitEngine follows at once."""

    model: str


class LimitEngine(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the engine to so many watts, from now on and while it loads."""

    watts_w: int


class FreezeEngine(msgspec.Struct, frozen=True, kw_only=True):
    """Take all processor time from the engine, now."""


class ThawEngine(msgspec.Struct, frozen=True, kw_only=True):
    """Let a frozen engine go on."""


class KillEngine(msgspec.Struct, frozen=True, kw_only=True):
    """End the engine and give its memory back."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One attempt for the engine; ``key`` is never used twice in an incarnation."""

    key: str
    kind: Kind
    body: bytes
    response_id: str
    stream: bool = False
    checkpoint: bytes | None = None


class SubmitAttempts(msgspec.Struct, frozen=True, kw_only=True):
    """Give attempts to the engine; ``created_s`` is the Unix time that their answers carry."""

    attempts: list[Attempt]
    created_s: int


class CancelAttempts(msgspec.Struct, frozen=True, kw_only=True):
    """Stop attempts that were handed back or that nobody waits for."""

    keys: list[str]


class PublishWork(msgspec.Struct, frozen=True, kw_only=True):
    """Put a message into the durable stream, as often as it takes; WorkPublished answers."""

    message: Results | Returned


class PublishState(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the cell, if the link is up."""

    message: State | Progress


class PublishLive(msgspec.Struct, frozen=True, kw_only=True):
    """Tell whoever waits for a live request, if the link is up."""

    message: Tokens | Answered | Broken


class WakeAt(msgspec.Struct, frozen=True, kw_only=True):
    """Send Ticked at ``at_ms`` at the latest; an earlier wish is replaced."""

    at_ms: int


Command = (
    StartEngine
    | LimitEngine
    | FreezeEngine
    | ThawEngine
    | KillEngine
    | SubmitAttempts
    | CancelAttempts
    | PublishWork
    | PublishState
    | PublishLive
    | WakeAt
)
