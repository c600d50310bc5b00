"""What the operator's interface says about vehicles and jobs: the JSON bodies of the admin address.

Called by: ``server.admin``, and by the command line, which decodes the same types.
"""

from __future__ import annotations

import msgspec

from motorpool.core.why_words import JobWhy, VehicleWhy
from motorpool.types import Reason


class VehicleView(msgspec.Struct, frozen=True, kw_only=True):
    """One vehicle as the cell knows it. ``state`` is a VehicleState, or ``offline`` when it is silent for too long."""

    vehicle_id: str
    name: str
    state: str
    reasons: list[Reason]
    permit_w: int
    model: str | None
    engine: str
    slots: int
    running: int
    queued: int
    tokens_per_s: float
    tokens_generated: int
    lines_done: int
    tokens_handed_on: int  # generated here, finished by another vehicle
    tokens_taken_over: int  # generated elsewhere, finished here
    energy_mwh: int
    energy_is_measured: bool
    earned_micro: int
    soc_pct: float | None
    plugged: bool | None
    seen_ms_ago: int | None
    leases: int
    tier: str | None = None  # of its permit
    battery_fed: bool = False
    stay_bound_ms: int | None = None  # it stays for so long at least, with nine chances of ten
    risk_15min: float | None = None
    region: str = ""
    energy_uwh: int = 0
    co2_ug: int = 0
    owner_known: bool = False  # an owner's key is registered
    withdrawn: bool = False  # the owner has withdrawn the consent: it gets no work
    paused_until_ms: int | None = None
    site: str = ""  # where it stands, as the operator has set it
    trust: int = 0  # tier, 0 to 3
    reserve: bool = False  # it works only on what would be late without it


class OwnerLink(msgspec.Struct, frozen=True, kw_only=True):
    """What an owner's device needs to register its key, once: as a link or a QR code. Secret until it is used."""

    link: str
    code: str
    expires_ms: int


class BatchView(msgspec.Struct, frozen=True, kw_only=True):
    """One batch as the operator sees it: counts, never contents. ``left_ms`` is the estimate of the time left."""

    batch_id: str
    status: str
    model: str | None
    total: int
    completed: int
    failed: int
    leased: int
    tokens_generated: int
    tokens_carried: int
    cost_micro: int
    created_ms: int
    expires_ms: int
    left_ms: int | None


class StatusView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a live display needs in one body; batches are the open ones and the latest closed ones."""

    now_ms: int
    currency: str
    tokens_per_s: float
    vehicles: list[VehicleView]
    batches: list[BatchView]


class BatchWhy(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch stands where it stands. ``why`` is None unless it is in progress; ``errors``: why it was refused."""

    batch_id: str
    status: str
    words: str
    errors: list[str] = []
    why: JobWhy | None = None


class VehicleReasons(msgspec.Struct, frozen=True, kw_only=True):
    """Why a vehicle gets nothing now. ``reasons``: its guard's, with details; ``why`` is None if it never reported."""

    vehicle_id: str
    words: str
    reasons: list[Reason] = []
    why: VehicleWhy | None = None


class StoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to a vehicle or job, in words without private content."""

    at_ms: int
    what: str
    cause_id: str
