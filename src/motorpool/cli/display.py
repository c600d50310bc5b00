"""Draws what the operator's interface says, for people: pure functions from views to rich renderables.

Decides: words, colours and columns. Must not: read a clock, speak to a server, or print.
Called by: ``cli.demo``, ``cli.dev``, ``cli.operator``, ``cli.batch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from motorpool.server.admin.views import BatchView, StatusView, VehicleView
from motorpool.types import ModelTier, Reason, ReasonCode, VehicleState

OFFLINE: Final = "offline"

REASON_WORDS: Final[dict[ReasonCode, str]] = {
    ReasonCode.CONSENT_MISSING: "no consent",
    ReasonCode.CONSENT_INVALID: "consent not valid",
    ReasonCode.CONSENT_EXPIRED: "consent expired",
    ReasonCode.CONSENT_WITHDRAWN: "consent withdrawn",
    ReasonCode.CONSENT_SUSPENDED: "consent suspended",
    ReasonCode.PAUSED: "paused by the owner",
    ReasonCode.QUIET_HOURS: "quiet hours",
    ReasonCode.SIGNAL_MISSING: "signal missing",
    ReasonCode.SIGNAL_STALE: "signal stale",
    ReasonCode.MOVING: "driving",
    ReasonCode.NOT_IN_PARK: "not in park",
    ReasonCode.IGNITION_ON: "ignition on",
    ReasonCode.DOOR_OPEN: "door open",
    ReasonCode.UNLOCKED: "unlocked",
    ReasonCode.OCCUPIED: "somebody inside",
    ReasonCode.PRECONDITIONING: "preparing to drive",
    ReasonCode.UPDATE_IN_PROGRESS: "installing an update",
    ReasonCode.NOT_PLUGGED_IN: "not plugged in",
    ReasonCode.CABLE_UNLOCKED: "cable not locked",
    ReasonCode.NO_GRID_POWER: "no grid power",
    ReasonCode.FEEDING_GRID: "feeding the grid",
    ReasonCode.BELOW_FLOOR: "below the owner's floor",
    ReasonCode.READY_BY_AT_RISK: "ready-by time at risk",
    ReasonCode.CHARGING_FIRST: "charging first",
    ReasonCode.CIRCUIT_LIMIT: "circuit at its limit",
    ReasonCode.TOO_HOT: "too hot",
    ReasonCode.LOW_12V: "12 V battery low",
    ReasonCode.FAULT: "fault in the car",
    ReasonCode.POWER_SAVING: "saving power",
    ReasonCode.BUDGET_USED_UP: "budget used up",
    ReasonCode.BUDGET_UNKNOWN: "budget unknown",
    ReasonCode.METERED_NETWORK: "network costs",
    ReasonCode.NOT_WORTH_IT: "not worth it",
    ReasonCode.DWELL: "settling",
}

TIER_WORDS: Final[dict[str, str]] = {ModelTier.REDUCED.value: ", warm", ModelTier.SMALL.value: ", hot: small model"}
STATE_STYLES: Final[dict[str, str]] = {
    VehicleState.WORKING: "bold green",
    VehicleState.READY: "green",
    VehicleState.STARTING: "cyan",
    VehicleState.YIELDING: "bold yellow",
    VehicleState.DENIED: "yellow",
    OFFLINE: "red",
}

EVENTS_SHOWN: Final = 10
REASONS_SHOWN: Final = 3
OPEN_BATCHES_SHOWN: Final = 5
CLOSED: Final = ("completed", "failed", "expired", "cancelled")


class Happening(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the event log: seconds since the start, and what happened, in words."""

    at_s: float
    text: str
    style: str = ""


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one picture of a running batch shows. ``left_s`` is None while nothing can be said yet."""

    title: str
    elapsed_s: float
    status: StatusView | None
    batch_id: str | None
    total: int
    left_s: float | None
    happenings: Sequence[Happening] = ()


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a run, in numbers. ``lost`` lines are in no result, ``duplicated`` ones are in it twice."""

    handed_in: int
    completed: int
    failed: int
    lost: int
    duplicated: int
    tokens_generated: int
    tokens_carried: int
    energy_mwh: int
    energy_is_measured: bool
    cost_micro: int
    currency: str
    earnings_micro: dict[str, int]
    seconds: float
    output: str


def duration(seconds: float | None) -> str:
    """Minutes and seconds, ``?`` when unknown."""
    if seconds is None:
        return "?"
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"


def amount(micro: int) -> str:
    """An amount that may be a small fraction of a cent: always at least four decimals, up to six where needed."""
    text = f"{micro / 1_000_000:.6f}"
    while text.endswith("0") and len(text.split(".")[1]) > 4:
        text = text[:-1]
    return text


def money(micro: int, currency: str) -> str:
    """An amount with its currency."""
    return f"{amount(micro)} {currency}"


def energy(milliwatt_hours: int, *, measured: bool) -> str:
    """Energy in watt-hours, and whether a meter or a model says so."""
    return f"{milliwatt_hours / 1000:.2f} Wh ({'measured' if measured else 'modelled'})"


def reasons(found: Sequence[Reason]) -> str:
    """Why there is no permit, in a few words: the most telling reasons, and how many more there are.

    A car on the road has every reason at once; that it is driving says it all.
    """
    ordered = sorted(found, key=lambda reason: reason.code is not ReasonCode.MOVING)
    words = [REASON_WORDS.get(reason.code, reason.code.value) for reason in ordered]
    more = len(words) - REASONS_SHOWN
    return ", ".join(words[:REASONS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def permit(vehicle: VehicleView) -> Text:
    """Whether the vehicle may work and why not."""
    if vehicle.state == OFFLINE:
        return Text("not heard from", style="red")
    if vehicle.reasons:
        return Text(f"no: {reasons(vehicle.reasons)}", style="yellow")
    if vehicle.permit_w > 0:
        how = TIER_WORDS.get(vehicle.tier or "", "")
        return Text(f"yes, {vehicle.permit_w} W{how}", style="green")
    return Text("no", style="yellow")


def vehicle_table(status: StatusView, *, ids: bool = False) -> Table:
    """The fleet, a row for each vehicle; with ``ids``, also what programs call them."""
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, padding=(0, 1, 0, 0))
    if ids:
        table.add_column("id", no_wrap=True)
    table.add_column("vehicle", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("may it work", ratio=1, min_width=18)
    for title in ("tok/s", "lines", "handed\non", "taken\nover", f"earned\n{status.currency}"):
        table.add_column(title, justify="right")
    for vehicle in status.vehicles:
        style = STATE_STYLES.get(vehicle.state, "")
        table.add_row(
            *([vehicle.vehicle_id] if ids else []),
            Text(vehicle.name or vehicle.vehicle_id, style="bold"),
            Text(f"{vehicle.state} {vehicle.running}" if vehicle.running else vehicle.state, style=style),
            permit(vehicle),
            f"{speed_of(vehicle):.0f}" if speed_of(vehicle) >= 0.5 else "-",
            str(vehicle.lines_done),
            str(vehicle.tokens_handed_on or "-"),
            str(vehicle.tokens_taken_over or "-"),
            amount(vehicle.earned_micro),
        )
    return table


def serves(vehicle: VehicleView, model: str | None) -> bool:
    """Whether a vehicle could run a model now."""
    return vehicle.model == model and vehicle.state in {VehicleState.READY, VehicleState.WORKING}


def speed_of(vehicle: VehicleView) -> float:
    """Tokens per second now: what a vehicle last reported is history once it does not work any more."""
    return vehicle.tokens_per_s if vehicle.state == VehicleState.WORKING else 0.0


def speed(status: StatusView) -> float:
    """Tokens per second of the whole fleet."""
    return sum(speed_of(vehicle) for vehicle in status.vehicles)


def batch_of(status: StatusView | None, batch_id: str | None) -> BatchView | None:
    """The batch that is watched, if the operator's view has it."""
    if status is None or batch_id is None:
        return None
    return next((batch for batch in status.batches if batch.batch_id == batch_id), None)


def progress_line(frame: Frame) -> RenderableType:
    """The bar of the batch with counts and the time left."""
    batch = batch_of(frame.status, frame.batch_id)
    done = batch.completed + batch.failed if batch else 0
    total = max(batch.total if batch and batch.total else frame.total, 1)
    counts = Text(f"{done}/{total} lines")
    if batch and batch.failed:
        counts.append(f", {batch.failed} failed", style="red")
    counts.append(f" · {batch.status if batch else 'preparing'}")
    if done < total:
        counts.append(f" · {duration(frame.left_s)} left", style="bold")
    if batch and batch.tokens_carried:
        counts.append(f" · {batch.tokens_carried} tokens carried over", style="magenta")
    bar = ProgressBar(total=total, completed=done, complete_style="green", finished_style="bold green")
    grid = Table.grid(expand=True)
    grid.add_column()
    grid.add_row(bar)
    grid.add_row(counts)
    return grid


def happenings(found: Sequence[Happening]) -> RenderableType:
    """The last lines of the event log."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for number, item in enumerate(found[-EVENTS_SHOWN:]):
        if number:
            text.append("\n")
        text.append(f"{duration(item.at_s):>5}  ", style="dim")
        text.append(item.text, style=item.style)
    return text


def picture(frame: Frame) -> RenderableType:
    """One picture of a running batch: vehicles, progress, events."""
    parts: list[RenderableType] = []
    if frame.status is not None and frame.status.vehicles:
        parts.append(vehicle_table(frame.status))
    parts.append(progress_line(frame))
    if frame.happenings:
        parts.extend([Text(""), happenings(frame.happenings)])
    pace = f" · {speed(frame.status):.0f} tokens/s" if frame.status is not None else ""
    return Panel(
        Group(*parts),
        title=Text(frame.title, style="bold"),
        subtitle=Text(f"{duration(frame.elapsed_s)}{pace}"),
        border_style="blue",
        padding=(0, 1),
    )


def fleet(
    status: StatusView, base_url: str, api_key: str, elapsed_s: float, found: Sequence[Happening]
) -> RenderableType:
    """The picture of a running development cell: how to reach it, its vehicles, its open batches, what happened."""
    parts: list[RenderableType] = [
        Text(f"export OPENAI_BASE_URL={base_url}", style="cyan", overflow="fold"),
        Text(f"export OPENAI_API_KEY={api_key}", style="cyan", overflow="fold"),
    ]
    parts.append(vehicle_table(status) if status.vehicles else Text("no vehicles"))
    for batch in [item for item in status.batches if item.status not in CLOSED][:OPEN_BATCHES_SHOWN]:
        left = duration(batch.left_ms / 1000) if batch.left_ms is not None else "?"
        done = batch.completed + batch.failed
        waits = ""
        if batch.status == "in_progress" and not any(serves(vehicle, batch.model) for vehicle in status.vehicles):
            waits = f" · waits: no vehicle may run {batch.model} now"
        parts.append(Text(f"{batch.batch_id}  {batch.status}  {done}/{batch.total} lines, {left} left{waits}"))
    if found:
        parts.append(happenings(found))
    subtitle = Text(f"{duration(elapsed_s)} · {speed(status):.0f} tokens/s")
    return Panel(Group(*parts), title=Text("motorpool dev", style="bold"), subtitle=subtitle, border_style="blue")


def plain_line(frame: Frame) -> str:
    """The same in one line of plain text, for logs and pipes."""
    batch = batch_of(frame.status, frame.batch_id)
    done = batch.completed + batch.failed if batch else 0
    vehicles = frame.status.vehicles if frame.status else []
    fleet = "; ".join(f"{v.name or v.vehicle_id} {v.state} {v.lines_done} lines" for v in vehicles)
    pace = f"{speed(frame.status):.0f}" if frame.status else "0"
    left = duration(frame.left_s)
    return f"{duration(frame.elapsed_s)} {done}/{frame.total} lines, {pace} tokens/s, {left} left | {fleet}"


def summary_table(summary: Summary) -> Table:
    """The table at the end of a run."""
    table = Table(box=box.ROUNDED, title="What came of it", title_style="bold", show_header=False, min_width=58)
    table.add_column()
    table.add_column(justify="right")
    for label, count, bad in (
        ("lines handed in", summary.handed_in, False),
        ("lines completed", summary.completed, summary.completed < summary.handed_in),
        ("lines failed", summary.failed, summary.failed > 0),
        ("lines lost", summary.lost, summary.lost > 0),
        ("lines duplicated", summary.duplicated, summary.duplicated > 0),
    ):
        table.add_row(label, Text(str(count), style="bold red" if bad else "bold green"))
    table.add_section()
    table.add_row("tokens generated", str(summary.tokens_generated))
    table.add_row("tokens carried over, not generated again", str(summary.tokens_carried))
    table.add_row("energy", energy(summary.energy_mwh, measured=summary.energy_is_measured))
    table.add_section()
    table.add_row("the customer pays", money(summary.cost_micro, summary.currency))
    for name, micro in summary.earnings_micro.items():
        table.add_row(f"the owner of {name} earned", money(micro, summary.currency))
    table.add_section()
    table.add_row("time", duration(summary.seconds))
    table.add_row("results", summary.output)
    return table


def vehicle_details(vehicle: VehicleView, currency: str) -> Table:
    """Everything about one vehicle."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    seen = "never" if vehicle.seen_ms_ago is None else f"{vehicle.seen_ms_ago / 1000:.1f} s ago"
    battery = "unknown" if vehicle.soc_pct is None else f"{vehicle.soc_pct:.0f} %"
    plugged = {True: "plugged in", False: "not plugged in", None: "plug unknown"}[vehicle.plugged]
    rows: list[tuple[str, RenderableType]] = [
        ("vehicle", f"{vehicle.vehicle_id} ({vehicle.name})"),
        ("state", Text(vehicle.state, style=STATE_STYLES.get(vehicle.state, ""))),
        ("may it work", permit(vehicle)),
        ("heard from", seen),
        ("battery", f"{battery}, {plugged}"),
        ("model", vehicle.model or "none loaded"),
        ("engine", vehicle.engine or "not running"),
        (
            "requests",
            f"{vehicle.running} of {vehicle.slots} slots running, {vehicle.queued} queued, {vehicle.leases} leases",
        ),
        ("speed", f"{vehicle.tokens_per_s:.1f} tokens/s"),
        ("lines done", str(vehicle.lines_done)),
        (
            "tokens",
            f"{vehicle.tokens_generated} generated, {vehicle.tokens_handed_on} handed on, "
            f"{vehicle.tokens_taken_over} taken over",
        ),
        ("energy", energy(vehicle.energy_mwh, measured=vehicle.energy_is_measured)),
        ("earned", money(vehicle.earned_micro, currency)),
    ]
    rows.extend(
        (
            "reason",
            f"{REASON_WORDS.get(reason.code, reason.code.value)} ({reason.code.value})"
            + (f": {reason.detail}" if reason.detail else ""),
        )
        for reason in vehicle.reasons
    )
    for label, value in rows:
        table.add_row(label, value)
    return table
