"""What the guard is told before it looks at a signal: the vehicle's profile, the owner's consent, the budgets.

Decides: nothing. Units are the last part of a name; times of day are minutes of the local day, weekdays a mask with
Monday as 1 and Sunday as 64.
Called by: ``core.guard``, ``trust.consent`` (which judges the owner's papers), ``agent``, the simulator.
"""

from __future__ import annotations

from typing import Final

import msgspec

from motorpool.core.budgets import BudgetLimits, Used
from motorpool.core.signals import NetworkClass
from motorpool.types import ReasonCode

MINUTES_A_DAY: Final = 1440
EVERY_DAY: Final = 0b111_1111
MAX_WISHES: Final = 64  # ready-by times and quiet hours of one owner


class ReadyBy(msgspec.Struct, frozen=True, kw_only=True):
    """A time at which the owner needs the car on these weekdays, with at least ``target_pct``."""

    weekdays: int = EVERY_DAY
    minute: int
    target_pct: float = 80.0


class Quiet(msgspec.Struct, frozen=True, kw_only=True):
    """Hours without work, on the weekdays of their beginning. One that ends before it begins goes over midnight."""

    weekdays: int = EVERY_DAY
    from_minute: int
    to_minute: int


class Ladder(msgspec.Struct, frozen=True, kw_only=True):
    """Temperatures from which less, only the small model, or nothing runs. Celsius."""

    reduced_c: float
    small_c: float
    off_c: float


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """The vehicle's profile: what its maker and its operator set. The owner's consent can only narrow it.

    ``permit_ms`` is how long a permit holds without a new decision: the vehicle stops by itself when the guard does not
    come back in time. When it did not look for ``blind_ms`` (the computer slept, or the clock was set), what was fine
    before says nothing, and the dwell begins anew. ``dwell_ms`` is how long everything must be fine before work starts
    again; it doubles with every "no" beyond ``flaps_free`` within ``flap_window_ms`` that no owner caused.
    A battery that has fed the vehicle for ``battery_drain_grace_ms`` is left alone for ``battery_drain_wait_ms``, the
    next time for twice as long, and so on up to ``battery_drain_wait_max_ms``.

    ``lacks`` names signals that this model of car does not have (``core.signals.MAY_LACK`` alone are allowed).
    ``network`` is what the vehicle's network costs where no signal says so. ``utc_offset_next_min`` is the offset of
    local time a day from now: the night in which clocks change is planned with the less convenient of the two.
    """

    watts_w: int = 100
    min_watts_w: int = 10
    floor_pct: float = 30.0
    floor_hysteresis_pct: float = 1.0
    ready_by_minute: int | None = None
    target_pct: float = 80.0
    utc_offset_min: int = 0
    utc_offset_next_min: int | None = None
    ready_by_margin_ms: int = 15 * 60_000
    ready_by_margin_share: float = 0.1
    ready_by_hysteresis_ms: int = 5 * 60_000
    overdue_ms: int = 2 * 3600_000
    # time
    dwell_ms: int = 3_000
    dwell_max_ms: int = 300_000
    flap_window_ms: int = 600_000
    flaps_free: int = 3
    permit_ms: int = 2_000
    blind_ms: int = 10_000
    # power
    battery_drain_w: float = 50.0
    battery_drain_grace_ms: int = 10_000
    battery_drain_wait_ms: int = 600_000
    battery_drain_wait_max_ms: int = 4 * 3600_000
    charging_margin_w: float = 150.0
    ac_efficiency: float = 0.85
    circuit_limit_w: int | None = None
    # heat and health
    pack: Ladder = Ladder(reduced_c=38.0, small_c=42.0, off_c=45.0)
    computer: Ladder = Ladder(reduced_c=75.0, small_c=83.0, off_c=90.0)
    dcdc: Ladder = Ladder(reduced_c=75.0, small_c=82.0, off_c=90.0)
    heat_hysteresis_c: float = 3.0
    cooler_ms: int = 60_000
    reduced_share: float = 0.5
    small_share: float = 0.3
    has_small_model: bool = False
    low_voltage_off_v: float = 12.0
    low_voltage_on_v: float = 12.4
    fault_wait_ms: int = 600_000
    power_saving_level: int = 5
    budgets: BudgetLimits = BudgetLimits(metered_bytes_month=1 << 50)
    # what the car does not tell
    lacks: frozenset[str] = frozenset()
    network: NetworkClass = NetworkClass.UNKNOWN


class ConsentView(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on the owner's consent: valid, with the limits that the owner signed, or the reason why not.

    ``battery_watts_w`` above 0 is the owner's separate leave to compute from the battery, down to
    ``battery_floor_pct``. ``share_while_charging``: computing may take from the charging power where the battery will
    still be at the charge limit by the ready-by time. ``paused_until_ms`` is the owner's "not now".
    """

    refusal: ReasonCode | None = ReasonCode.CONSENT_MISSING
    granted_ms: int = 0
    expires_ms: int = 0
    max_watts_w: int = 0
    floor_pct: float = 100.0
    ready_by_minute: int | None = None
    target_pct: float = 100.0
    schedule: tuple[ReadyBy, ...] = ()
    quiet: tuple[Quiet, ...] = ()
    share_while_charging: bool = False
    battery_watts_w: int = 0
    battery_floor_pct: float = 50.0
    limits: BudgetLimits = BudgetLimits()
    paused_until_ms: int = 0


class Budgets(msgspec.Struct, frozen=True, kw_only=True):
    """What was used, and what an hour of work would bring the owner after electricity and wear.

    ``net_micro_h`` is in millionths of the currency for an hour; None while nothing is known of it.
    """

    used: Used = Used()
    net_micro_h: int | None = None
