"""The last word in the vehicle: may the computer work now, with how much power, or which reasons stand against it.

Decides: a permit or every reason against one, from the vehicle's profile, the verdict on the owner's consent, the
vehicle's signals, the budgets and a short memory of what came before. A signal that is missing or too old, or says what
cannot be, is a reason against, never a reason for.
Must not: verify signatures, read a clock, talk to a network, or know of jobs, leases or customers.
Called by: ``agent.loop``, on every change of a signal and several times a second; the simulator.

``IsCharging`` is not asked: a full battery on a live cable is the best time to compute, and "plugged" is not "fed": a
vehicle on a dead cable would compute from its battery, which the sign of the battery's power shows. It shows only while
the computer draws power, so such a "no" stays until something else speaks for the cable. The rules themselves are in
``core.guard_rules``, each a function of its own; what the guard remembers and how is here.
"""

from __future__ import annotations

from typing import Final

import msgspec

from motorpool.core.guard_rules import (
    MIN_CHARGE_W,
    OWNER_CODES,
    RULES,
    Heat,
    Look,
    hottest,
    less_than_least,
    power_w,
)
from motorpool.core.policy import MINUTES_A_DAY, Budgets, ConsentView, Policy
from motorpool.core.signals import (
    FUTURE_TOLERANCE_MS,
    MAX_AGE_MS,
    MAX_CHARGE_W,
    POSSIBLE,
    DriverMode,
    LowVoltage,
    Occupancy,
    Reading,
    Signals,
    is_young,
    possible,
)
from motorpool.types import Permit, Reason, ReasonCode

__all__ = [
    "FUTURE_TOLERANCE_MS",
    "MAX_AGE_MS",
    "MAX_CHARGE_W",
    "MINUTES_A_DAY",
    "MIN_CHARGE_W",
    "POSSIBLE",
    "Budgets",
    "ConsentView",
    "History",
    "LowVoltage",
    "Occupancy",
    "Policy",
    "Reading",
    "Signals",
    "Verdict",
    "decide",
]
MAX_FLAPS: Final = 32
Verdict = Permit | tuple[Reason, ...]


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What the guard remembers from one look to the next.

    ``fine_since_ms`` since when nothing stands against work; ``draining_since_ms`` since when the battery feeds the
    vehicle; ``unfed_until_ms`` how long a cable that let it do so counts as dead, and ``unfed_times`` how often that
    happened. ``watts_w`` is the latest permit's power, 0 without one. ``against`` are the reasons of the latest look,
    which have to be gone by a margin. ``heat`` is the rung of the thermal ladder, ``cooler_since_ms`` since when a
    lower one would do. ``suspended_ms`` is when somebody else had the car for the last time, ``fault_until_ms`` the end
    of the time after an error code. ``flaps`` are the times at which work was stopped by no act of the owner.
    """

    fine_since_ms: int | None = None
    draining_since_ms: int | None = None
    unfed_until_ms: int | None = None
    unfed_times: int = 0
    looked_ms: int | None = None
    watts_w: int = 0
    against: frozenset[ReasonCode] = frozenset()
    heat: Heat = Heat.COOL
    cooler_since_ms: int | None = None
    suspended_ms: int | None = None
    fault_until_ms: int | None = None
    flaps: tuple[int, ...] = ()


def decide(  # noqa: PLR0917  # all that a verdict depends on, in a fixed order
    policy: Policy, consent: ConsentView, signals: Signals, budgets: Budgets, history: History, now_ms: int
) -> tuple[Verdict, History]:
    """A permit, or every reason against one; and the memory to hand in the next time."""
    signals, impossible = possible(signals)
    seen = _remember(policy, signals, history, now_ms)
    look = Look(
        policy=policy,
        consent=consent,
        signals=signals,
        impossible=impossible,
        budgets=budgets,
        now_ms=now_ms,
        against=seen.against,
        heat=seen.heat,
        last_w=seen.watts_w,
        unfed=seen.unfed_until_ms is not None,
        draining=seen.draining_since_ms is not None,
        suspended_ms=seen.suspended_ms,
        fault_until_ms=seen.fault_until_ms,
    )
    reasons: list[Reason] = []
    for rule in RULES.values():
        rule(look, reasons)
    verdict: Verdict = tuple(reasons)
    if not reasons:
        if seen.fine_since_ms is None:
            seen = msgspec.structs.replace(seen, fine_since_ms=now_ms)
        verdict = _after_dwell(look, seen)
    return verdict, _keep(verdict, reasons, seen, now_ms)


def _after_dwell(look: Look, seen: History) -> Verdict:
    policy, now_ms = look.policy, look.now_ms
    doublings = max(0, len(seen.flaps) - policy.flaps_free)
    dwell_ms = policy.dwell_ms
    if doublings:
        dwell_ms = min(policy.dwell_ms << min(doublings, 32), max(policy.dwell_max_ms, policy.dwell_ms))
    if seen.fine_since_ms is None or now_ms - seen.fine_since_ms < dwell_ms:
        return (Reason(code=ReasonCode.DWELL, detail="all is fine again; waiting a moment before work goes on"),)
    too_little = less_than_least(look)
    if too_little is not None:
        return (too_little,)
    watts_w, tier = power_w(look)
    until_ms = min(now_ms + policy.permit_ms, look.consent.expires_ms)
    return Permit(watts_w=watts_w, until_ms=until_ms, tier=tier, battery_fed=look.from_battery)


def _remember(policy: Policy, signals: Signals, history: History, now_ms: int) -> History:
    """What is known now: after a blind time nothing of what was fine before counts."""
    looked_ms = history.looked_ms
    if looked_ms is not None and not 0 <= now_ms - looked_ms <= policy.blind_ms:
        history = msgspec.structs.replace(history, fine_since_ms=None, draining_since_ms=None, cooler_since_ms=None)
    draining_since_ms, unfed_until_ms, unfed_times = _fed(policy, signals, history, now_ms)
    heat, cooler_since_ms = _heat(policy, signals, history, now_ms)
    mode, faults = signals.driver_mode, signals.fault_count
    suspended_ms, fault_until_ms = history.suspended_ms, history.fault_until_ms
    if mode is not None and mode.value in {DriverMode.GUEST, DriverMode.VALET, DriverMode.SERVICE}:
        suspended_ms = max(now_ms, suspended_ms or now_ms)
    if faults is not None and faults.value > 0:
        fault_until_ms = max(now_ms + policy.fault_wait_ms, fault_until_ms or 0)
    elif fault_until_ms is not None and now_ms >= fault_until_ms:
        fault_until_ms = None
    flaps = history.flaps
    if flaps and now_ms - flaps[0] > policy.flap_window_ms:
        flaps = tuple(at_ms for at_ms in flaps if now_ms - at_ms <= policy.flap_window_ms)
    return History(
        fine_since_ms=history.fine_since_ms,
        draining_since_ms=draining_since_ms,
        unfed_until_ms=unfed_until_ms,
        unfed_times=unfed_times,
        looked_ms=now_ms,
        watts_w=history.watts_w,
        against=history.against,
        heat=heat,
        cooler_since_ms=cooler_since_ms,
        suspended_ms=suspended_ms,
        fault_until_ms=fault_until_ms,
        flaps=flaps,
    )


def _keep(verdict: Verdict, reasons: list[Reason], seen: History, now_ms: int) -> History:
    """The memory of this look: what stands against work, and whether it was stopped by no act of the owner."""
    watts_w = verdict.watts_w if isinstance(verdict, Permit) else 0
    if not reasons:
        if watts_w == seen.watts_w and not seen.against:
            return seen
        return msgspec.structs.replace(seen, watts_w=watts_w, against=frozenset())
    against = frozenset(reason.code for reason in reasons)
    flaps = seen.flaps
    if seen.watts_w and not against & OWNER_CODES:
        flaps = (*flaps, now_ms)[-MAX_FLAPS:]
    return msgspec.structs.replace(seen, fine_since_ms=None, watts_w=0, against=against, flaps=flaps)


def _fed(policy: Policy, signals: Signals, history: History, now_ms: int) -> tuple[int | None, int | None, int]:
    """Remember whether the cable feeds the vehicle: since when not, until when it counts as dead, how often so far.

    What speaks for a cable that once did not: it was out or without power in between, or it charges the battery, or a
    long time has passed.
    """
    power = signals.battery_power_w
    charging = power is not None and power.value >= MIN_CHARGE_W and is_young("battery_power_w", power, now_ms)
    claims = [reading for reading in (signals.cable_connected, signals.grid_power_available) if reading is not None]
    if charging or any(claim.value is not True for claim in claims):
        return None, None, 0
    draining = power is not None and power.value < -policy.battery_drain_w
    since_ms = (now_ms if history.draining_since_ms is None else history.draining_since_ms) if draining else None
    until_ms, times = history.unfed_until_ms, history.unfed_times
    if until_ms is not None and now_ms >= until_ms:
        until_ms = None
    if until_ms is None and since_ms is not None and now_ms - since_ms >= policy.battery_drain_grace_ms:
        wait_ms = min(policy.battery_drain_wait_ms << min(times, 32), policy.battery_drain_wait_max_ms)
        until_ms, times = now_ms + wait_ms, times + 1
    return since_ms, until_ms, times


def _heat(policy: Policy, signals: Signals, history: History, now_ms: int) -> tuple[Heat, int | None]:
    """The rung of the thermal ladder: up at once, down when it has been cooler by a margin for a while."""
    now = hottest(policy, signals, 0.0)
    if now >= history.heat:
        return now, None
    lower = hottest(policy, signals, policy.heat_hysteresis_c)
    if lower >= history.heat:
        return history.heat, None
    since_ms = now_ms if history.cooler_since_ms is None else history.cooler_since_ms
    if now_ms - since_ms < policy.cooler_ms:
        return history.heat, since_ms
    return lower, None
