"""The car's state, its reasons and the owner's log in plain words, and what a phone or a program is told of them.

Decides: how it is said. Must not: decide what is so.
Called by: ``agent.owner.desk``, the command line.
"""

from __future__ import annotations

import time
from typing import Any, Final

from motorpool.agent.owner.acts import Acts
from motorpool.agent.owner.entries import Entry, EntryKind, Work
from motorpool.agent.owner.reading import Summary
from motorpool.core.policy import EVERY_DAY, ConsentView
from motorpool.types import ReasonCode

DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")

# Why the car does not work, as the end of "It does not work: ...".
WHY: Final[dict[ReasonCode, str]] = {
    ReasonCode.CONSENT_MISSING: "you have not allowed it",
    ReasonCode.CONSENT_INVALID: "there is a consent, but not one that holds for this car",
    ReasonCode.CONSENT_EXPIRED: "your consent has run out",
    ReasonCode.CONSENT_WITHDRAWN: "you have taken your consent back",
    ReasonCode.CONSENT_SUSPENDED: "somebody else has or had the car; confirm your consent to go on",
    ReasonCode.PAUSED: "you said: not now",
    ReasonCode.QUIET_HOURS: "these are your quiet hours",
    ReasonCode.SIGNAL_MISSING: "the car has not told something that has to be known",
    ReasonCode.SIGNAL_STALE: "what the car told is too old to count on",
    ReasonCode.MOVING: "the car moves",
    ReasonCode.NOT_IN_PARK: "the car is not in park",
    ReasonCode.IGNITION_ON: "the car is switched on",
    ReasonCode.DOOR_OPEN: "a door is open",
    ReasonCode.UNLOCKED: "the car is not locked",
    ReasonCode.OCCUPIED: "somebody sits in the car, or it cannot tell",
    ReasonCode.PRECONDITIONING: "the car is being warmed or cooled for a drive",
    ReasonCode.UPDATE_IN_PROGRESS: "the car updates its own software",
    ReasonCode.NOT_PLUGGED_IN: "the charging cable is not in",
    ReasonCode.CABLE_UNLOCKED: "the charging cable is unlocked",
    ReasonCode.NO_GRID_POWER: "the cable brings no power",
    ReasonCode.FEEDING_GRID: "the car feeds power into the house or the grid",
    ReasonCode.BELOW_FLOOR: "the battery is below your floor",
    ReasonCode.READY_BY_AT_RISK: "the battery might not be full enough at your time",
    ReasonCode.CHARGING_FIRST: "the battery needs all of the charging power",
    ReasonCode.CIRCUIT_LIMIT: "the charging point has no power to spare",
    ReasonCode.TOO_HOT: "the battery or the computer is too hot",
    ReasonCode.LOW_12V: "the 12 V battery is low",
    ReasonCode.FAULT: "the car reports a fault, or did so a moment ago",
    ReasonCode.POWER_SAVING: "the car saves power",
    ReasonCode.BUDGET_USED_UP: "what you allow for a week or a month is used up",
    ReasonCode.BUDGET_UNKNOWN: "it is not known how much of your limits is used",
    ReasonCode.METERED_NETWORK: "the network costs by the byte",
    ReasonCode.NOT_WORTH_IT: "electricity and wear would cost you more than the work earns",
    ReasonCode.DWELL: "all is fine again; it waits a moment before it goes on",
}


def clock(minute: int) -> str:
    """A minute of the day as 07:30."""
    return f"{minute // 60:02d}:{minute % 60:02d}"


def weekdays(mask: int) -> str:
    """A mask of weekdays as Mon,Tue; every day as a word."""
    if mask == EVERY_DAY:
        return "every day"
    return ",".join(name for day, name in enumerate(DAYS) if mask >> day & 1)


def day(at_ms: int) -> str:
    """A date by the clock of this computer."""
    return time.strftime("%Y-%m-%d", time.localtime(at_ms / 1000))


def moment(at_ms: int) -> str:
    """A date and time by the clock of this computer."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_ms / 1000))


def duration(ms: int) -> str:
    """A time in words: 2 h 5 min, 40 s."""
    minutes = ms // 60_000
    if minutes == 0:
        return f"{ms // 1000} s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def money(micro: int) -> str:
    """An amount in units of the currency that the operator pays in."""
    digits = 2 if abs(micro) >= 1_000_000 or micro == 0 else 4
    return f"{micro / 1_000_000:.{digits}f}"


def consent(view: ConsentView) -> str:
    """What the consent says now, in one line."""
    if view.refusal is not None:
        return f"no consent ({view.refusal.value}): this vehicle does not work"
    words = [f"up to {view.max_watts_w} W", f"not below {view.floor_pct:g} % charge"]
    if view.ready_by_minute is not None:
        words.append(f"{view.target_pct:g} % by {clock(view.ready_by_minute)}")
    words += [f"{wish.target_pct:g} % by {clock(wish.minute)} {weekdays(wish.weekdays)}" for wish in view.schedule]
    words += [
        f"quiet {clock(quiet.from_minute)} to {clock(quiet.to_minute)} {weekdays(quiet.weekdays)}"
        for quiet in view.quiet
    ]
    if view.share_while_charging:
        words.append("shares the charging power")
    if view.battery_watts_w:
        words.append(f"from the battery up to {view.battery_watts_w} W and not below {view.battery_floor_pct:g} %")
    return f"consent until {time.strftime('%Y-%m-%d', time.gmtime(view.expires_ms / 1000))}: {', '.join(words)}"


def acts(said: Acts, now_ms: int) -> str | None:
    """What the owner said that stands; None if nothing does."""
    if said.unreadable:
        return "what you said last cannot be read, so the car rests: go on, then confirm your consent"
    if said.need_car_ms:
        return "you need the car: it rests until it was driven, or until you say go on"
    if said.paused_until_ms > now_ms:
        return f"paused until {moment(said.paused_until_ms)}"
    return None


def entry(one: Entry) -> str:
    """An entry of the log as one line."""
    if one.kind is not EntryKind.SPAN:
        who = f" ({one.by})" if one.by else ""
        return f"{moment(one.at_ms)}  {one.what}{who}"
    begun_ms = one.at_ms if one.from_ms is None else one.from_ms
    told = f"{moment(begun_ms)} to {moment(one.at_ms)[-5:]}"
    parts = []
    if one.allowed_ms:
        parts.append(f"might work for {duration(one.allowed_ms)}, did for {duration(one.working_ms)}")
    parts += [f"for {kind}: {work_done(work)}" for kind, work in one.jobs.items()]
    for code, ms in sorted(one.why_ms.items(), key=lambda item: -item[1]):
        parts.append(f"did not for {duration(ms)}: {reason(code)}")
    return f"{told}  {'; '.join(parts)}"


def work_done(work: Work) -> str:
    """What was done for a class of customers."""
    how = "measured" if work.measured_mwh >= work.energy_mwh else "partly measured" if work.measured_mwh else "modelled"
    energy = f"{work.energy_mwh / 1000:.1f} Wh ({how})"
    return f"{work.lines} requests, {work.tokens} tokens, {energy}, earned {money(work.earned_micro)}"


def reason(code: str) -> str:
    """A reason in words; one of a later version by its code."""
    try:
        return WHY[ReasonCode(code)]
    except ValueError:
        return code


def as_statement(summary: Summary) -> dict[str, Any]:
    """A time's statement of earnings for a program; costs are None where they are not known."""
    total = summary.total
    known = not total.uncosted
    return {
        "from_ms": summary.from_ms,
        "to_ms": summary.to_ms,
        "working_ms": summary.working_ms,
        "allowed_ms": summary.allowed_ms,
        "requests": total.lines,
        "tokens": total.tokens,
        "energy_mwh": total.energy_mwh,
        "measured_mwh": total.measured_mwh,
        "pay_micro": total.earned_micro,
        "electricity_micro": total.electricity_micro if known else None,
        "wear_micro": total.wear_micro if known else None,
        "net_micro": summary.net_micro,
        "why_ms": dict(sorted(summary.why_ms.items(), key=lambda item: -item[1])),
        "jobs": {kind: work.lines for kind, work in summary.jobs.items()},
    }
