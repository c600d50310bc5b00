"""A vehicle at which nothing is wrong, and the guard's verdict on what a test changes about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from motorpool.agent.signals.source import AlwaysParked
from motorpool.core.guard import Budgets, ConsentView, History, Policy, Reading, Signals, Verdict, decide
from motorpool.core.guard_rules import RULES
from motorpool.types import Permit, ReasonCode

NOW_MS = 1_790_000_000_000  # a Monday, 14:13:20 UTC
MINUTE_NOW = 14 * 60 + 13
POLICY = Policy(watts_w=100, dwell_ms=1_000)
CONSENT = ConsentView(refusal=None, max_watts_w=150, floor_pct=20.0, expires_ms=NOW_MS + 86_400_000)
GOOD = AlwaysParked().read(NOW_MS)
FREE = Budgets()
FINE = History(fine_since_ms=NOW_MS - 1_000)


def with_(signals: Signals, **values: Any) -> Signals:
    return msgspec.structs.replace(signals, **{name: Reading(value, NOW_MS) for name, value in values.items()})


def verdict(
    signals: Signals,
    *,
    policy: Policy = POLICY,
    consent: ConsentView = CONSENT,
    history: History = FINE,
    budgets: Budgets = FREE,
) -> Verdict:
    return decide(policy, consent, signals, budgets, history, NOW_MS)[0]


def codes(result: Verdict) -> list[ReasonCode]:
    assert not isinstance(result, Permit)
    return [reason.code for reason in result]


def watts(result: Verdict) -> int:
    assert isinstance(result, Permit), result
    return result.watts_w


def ready_by(minute: int, target_pct: float = 80.0, offset_min: int = 0) -> Policy:
    return Policy(
        watts_w=1_000, dwell_ms=0, ready_by_minute=minute % 1440, target_pct=target_pct, utc_offset_min=offset_min
    )


def charging(soc_pct: float) -> Signals:
    # 60 kWh, 7.15 kW less 1 kW for computing: a percent takes 5.9 minutes, 6.4 with the margin, and 15 minutes on top
    return with_(GOOD, soc_displayed_pct=soc_pct, charge_limit_pct=90.0, charger_power_w=7_150.0)


class Standing:
    """A vehicle on a cable, looked at four times a second. ``given_w`` is what the cable really gives."""

    def __init__(self, given_w: float = 0.0) -> None:
        self.given_w = given_w
        self.now_ms = NOW_MS
        self.history = History()
        self.permitted = 0
        self.changes: dict[str, Any] = {}
        self.result: Verdict = ()

    def stand(self, for_ms: int) -> int:
        """How long of that time work was permitted."""
        before = self.permitted
        for _ in range(for_ms // 250):
            working = isinstance(self.result, Permit)
            power_w = min(0.0, self.given_w - 100.0) if working else 0.0  # the battery is full
            signals = AlwaysParked().read(self.now_ms)
            changes = {"battery_power_w": power_w} | self.changes
            readings = {name: Reading(value, self.now_ms) for name, value in changes.items()}
            signals = msgspec.structs.replace(signals, **readings)
            consent = msgspec.structs.replace(CONSENT, expires_ms=NOW_MS + 10 * 86_400_000)
            self.result, self.history = decide(POLICY, consent, signals, FREE, self.history, self.now_ms)
            self.permitted += 250 * isinstance(self.result, Permit)
            self.now_ms += 250
        return self.permitted - before


@contextmanager
def without(*rules: str) -> Iterator[None]:
    """The guard without some of its rules; afterwards all are back, in their order."""
    kept = dict(RULES)
    for rule in rules:
        del RULES[rule]
    try:
        yield
    finally:
        RULES.clear()
        RULES.update(kept)
