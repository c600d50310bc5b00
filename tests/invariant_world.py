"""Random days of a vehicle: signals with gaps, stale and impossible values, clocks that jump, and what the guard says.

``trace`` is a Hypothesis strategy; ``play`` runs the guard over one and yields what was seen at each look, so that an
invariant can be checked by a predicate of its own which knows nothing of the guard's rules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from motorpool.agent.signals.source import AlwaysParked
from motorpool.core.budgets import Used
from motorpool.core.guard import Budgets, ConsentView, History, Policy, Reading, Signals, Verdict, decide
from motorpool.core.policy import ReadyBy
from motorpool.core.signals import TABLE, DriverMode, LowVoltage, NetworkClass, Occupancy
from motorpool.types import ReasonCode

EXAMPLES: Final = int(os.environ.get("MOTORPOOL_EXAMPLES", "100"))  # `make check-deep` asks for 10,000
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
START_MS: Final = 1_790_000_000_000
POLICY: Final = Policy(watts_w=100, dwell_ms=1_000)
CONSENT: Final = ConsentView(
    refusal=None, max_watts_w=150, floor_pct=20.0, granted_ms=START_MS - 1, expires_ms=START_MS + 10**12
)
MISSING: Final = "missing"
FROZEN: Final = "frozen"  # the reading stays, and grows old

_HEAT = ("pack_temp_c", "computer_temp_c", "dcdc_temp_c")
CHANGES: Final[tuple[tuple[str, Any], ...]] = (
    ("gear_is_park", False),
    *(("speed_kmh", value) for value in (3.0, -1.0, float("nan"))),
    *(("ignition", value) for value in (LowVoltage.ON, LowVoltage.START, LowVoltage.UNDEFINED, LowVoltage.ACC)),
    ("doors_open", True),
    ("locked", False),
    *(("seat_occupied", value) for value in (Occupancy.OCCUPIED, Occupancy.UNKNOWN)),
    ("preconditioning", True),
    *(("driver_mode", value) for value in DriverMode),
    ("update_in_progress", True),
    ("cable_connected", False),
    ("cable_locked", False),
    ("grid_power_available", False),
    ("feeding_grid", True),
    *(("battery_power_w", value) for value in (-300.0, -60.0, 2_000.0, 6_900.0, 90_000.0, float("inf"))),
    *(("soc_displayed_pct", value) for value in (19.0, 25.0, 30.5, 50.0, 80.0, -1.0)),
    *(("charge_limit_pct", value) for value in (30.0, 60.0, 100.0)),
    *(("charger_power_w", value) for value in (0.0, 1_000.0, 7_000.0)),
    *(("ac_power_w", value) for value in (0.0, 3_650.0, 11_000.0)),
    *(("circuit_limit_w", value) for value in (0.0, 3_700.0)),
    *((name, value) for name in _HEAT for value in (20.0, 41.0, 46.0, 76.0, 84.0, 95.0)),
    *(("low_voltage_v", value) for value in (11.0, 12.2, 12.5, 14.0)),
    *(("fault_count", value) for value in (0, 1)),
    *(("power_optimize_level", value) for value in (0, 3, 9)),
    *(("network", value) for value in NetworkClass),
    *((name, kind) for name in TABLE for kind in (MISSING, FROZEN)),
)
CONSENTS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"refusal": ReasonCode.CONSENT_MISSING},
    {"refusal": ReasonCode.CONSENT_WITHDRAWN},
    {"max_watts_w": 0},
    {"max_watts_w": 60},
    {"expires_ms": START_MS},
    {"floor_pct": 55.0},
    {"paused_until_ms": START_MS + 10**12},
    {"battery_watts_w": 50, "battery_floor_pct": 40.0},
    {"share_while_charging": True, "schedule": (ReadyBy(minute=900),)},
)
BUDGETS: Final[tuple[Budgets, ...]] = (
    Budgets(),
    Budgets(used=Used(compute_ms=60 * 3_600_000)),
    Budgets(used=Used(weighted_ms=30 * 3_600_000)),
    Budgets(used=Used(battery_mwh=5_000_000)),
    Budgets(used=Used(flash_bytes=20_000_000_000)),
    Budgets(used=Used(metered_bytes=1)),
    Budgets(used=Used(unknown=True)),
    Budgets(net_micro_h=-1),
    Budgets(net_micro_h=1),
)
_DT_MS = (0, 250, 250, 1_000, 1_000, 3_000, 9_000, 60_000, 700_000, 3_600_000, -1, -60_000, -(10**9))


class Step(msgspec.Struct, frozen=True):
    """Time passes (or jumps back), then things change, or all is well again."""

    dt_ms: int
    well: bool
    changes: tuple[tuple[str, Any], ...]
    consent: int
    budgets: int


_step = st.builds(
    Step,
    st.sampled_from(_DT_MS),
    st.booleans(),
    st.lists(st.sampled_from(CHANGES), max_size=3).map(tuple),
    st.sampled_from((0, 0, 0, 0, 0, *range(len(CONSENTS)))),
    st.sampled_from((0, 0, 0, 0, 0, *range(len(BUDGETS)))),
)
trace = st.lists(_step, min_size=1, max_size=10)


def simple_traces() -> Iterator[list[Step]]:
    """Every single change, consent and state of the budgets: it comes, lasts for half a minute, all is well again."""
    cases: list[tuple[tuple[tuple[str, Any], ...], int, int]] = [((change,), 0, 0) for change in CHANGES]
    cases += [((), consent, 0) for consent in range(len(CONSENTS))]
    cases += [((), 0, budgets) for budgets in range(len(BUDGETS))]
    for changes, consent, budgets in cases:
        lasting = [Step(9_000, False, (), consent, budgets)] * 3
        yield [
            Step(0, True, (), 0, 0),
            Step(1_000, False, changes, consent, budgets),
            *lasting,
            Step(0, True, (), 0, 0),
        ]


class Seen(msgspec.Struct, frozen=True):
    """One look of the guard, and all that went into it."""

    now_ms: int
    signals: Signals
    consent: ConsentView
    budgets: Budgets
    verdict: Verdict
    past: tuple[Seen, ...]


def play(steps: list[Step], policy: Policy = POLICY) -> Iterator[Seen]:
    """The guard over a trace. After each step there are three quiet looks, so that a dwell can end."""
    now_ms, history = START_MS, History()
    changes: dict[str, Any] = {}
    since_ms: dict[str, int] = {}
    past: list[Seen] = []
    for step in steps:
        now_ms += step.dt_ms
        if step.well:
            changes, since_ms = {}, {}
        for name, value in step.changes:
            changes[name] = value
            since_ms[name] = now_ms
        consent = msgspec.structs.replace(CONSENT, **CONSENTS[step.consent])
        for look_ms in (0, 600, 600):
            now_ms += look_ms
            signals = _read(now_ms, changes, since_ms)
            verdict, history = decide(policy, consent, signals, BUDGETS[step.budgets], history, now_ms)
            seen = Seen(now_ms, signals, consent, BUDGETS[step.budgets], verdict, tuple(past))
            yield seen
            past.append(msgspec.structs.replace(seen, past=()))


def _read(now_ms: int, changes: dict[str, Any], since_ms: dict[str, int]) -> Signals:
    readings: dict[str, Reading[Any] | None] = {}
    signals = AlwaysParked().read(now_ms)
    for name, value in changes.items():
        if value == MISSING:
            readings[name] = None
        elif value == FROZEN:
            now: Reading[Any] | None = getattr(signals, name)
            readings[name] = None if now is None else Reading(now.value, since_ms[name])
        else:
            readings[name] = Reading(value, now_ms)
    return msgspec.structs.replace(signals, **readings)
