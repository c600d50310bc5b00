"""``motorpool owner``: everything that an owner can say to the own car, and read from it, on its command line.

Decides: nothing; acts and papers are judged in the vehicle. Must not: go over the network.
Called by: ``cli.main``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from motorpool.agent import enrolment
from motorpool.agent.owner import acts, pairing, words
from motorpool.agent.owner.desk import WEEK_MS, as_consent, local_monday_ms
from motorpool.agent.owner.entries import LOG_DIR
from motorpool.agent.owner.reading import LogReader
from motorpool.cli.consent import DAY_MS, clock_ms, minute_of_day, place
from motorpool.cli.output import EXIT_ERROR, Number, print_error, print_json
from motorpool.core.budgets import BudgetLimits
from motorpool.core.policy import EVERY_DAY, Quiet, ReadyBy
from motorpool.errors import ConflictError
from motorpool.trust.consent import ConsentLimits

DEFAULT_WATTS_W: Final = 150
DEFAULT_DAYS: Final = 365
NONE: Final = "none"
MINUTE_MS: Final = 60_000
SEEN: Final = "the car sees it within a quarter of a second, with or without a network"


# -- what is typed -----------------------------------------------------------------------------------------------------


def days_mask(text: str) -> int:
    """``Mon-Fri``, ``Sat,Sun`` or ``daily`` as a mask of weekdays; a usage error for anything else."""
    if text.lower() == "daily":
        return EVERY_DAY
    names = [day.lower() for day in words.DAYS]
    mask = 0
    for part in text.lower().split(","):
        first, _, last = part.partition("-")
        if first not in names or (last or first) not in names:
            raise click.BadParameter("weekdays look like Mon-Fri, Sat,Sun or daily")
        start, length = names.index(first), (names.index(last or first) - names.index(first)) % 7
        for step in range(length + 1):
            mask |= 1 << (start + step) % 7
    return mask


def _minute(ctx: click.Context, option: click.Parameter, text: str) -> int:
    minute = minute_of_day(ctx, option, text)
    assert minute is not None
    return minute


def _wishes(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[ReadyBy, ...] | None:
    """``"Mon-Fri 07:30 80"`` as times of a schedule; None if none was given, empty for ``none``."""
    if not values:
        return None
    if values == (NONE,):
        return ()
    found = []
    for value in values:
        parts = value.split()
        if len(parts) != 3:
            raise click.BadParameter('a time of the schedule looks like "Mon-Fri 07:30 80": weekdays, time, percent')
        target_pct = Number(0, 100).convert(parts[2], option, ctx)
        found.append(
            ReadyBy(weekdays=days_mask(parts[0]), minute=_minute(ctx, option, parts[1]), target_pct=target_pct)
        )
    return tuple(found)


def _quiet(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[Quiet, ...] | None:
    """``"daily 22:00-06:00"`` as quiet hours; None if none were given, empty for ``none``."""
    if not values:
        return None
    if values == (NONE,):
        return ()
    found = []
    for value in values:
        parts = value.split()
        from_, dash, to = parts[-1].partition("-") if parts else ("", "", "")
        if len(parts) != 2 or not dash:
            raise click.BadParameter('quiet hours look like "daily 22:00-06:00": weekdays, from, to')
        found.append(
            Quiet(
                weekdays=days_mask(parts[0]),
                from_minute=_minute(ctx, option, from_),
                to_minute=_minute(ctx, option, to),
            )
        )
    return tuple(found)


def _ready_by(ctx: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """``07:30`` as a minute of the day, -1 for ``none``, None if not given."""
    return -1 if value == NONE else minute_of_day(ctx, option, value)


_LIMITS: Final[tuple[Callable[[Any], Any], ...]] = (
    click.option("--watts", type=click.IntRange(1, 100_000), help="Power that may be drawn."),
    click.option("--floor", type=Number(0, 100), help="No work below this charge, in percent."),
    click.option("--ready-by", callback=_ready_by, help="When the car is needed every day (as 07:30, or none)."),
    click.option("--target", type=Number(0, 100), help="Charge by then, in percent."),
    click.option(
        "--schedule",
        multiple=True,
        callback=_wishes,
        help='Needed by weekday: "Mon-Fri 07:30 80"; or none. Repeatable.',
    ),
    click.option(
        "--quiet", multiple=True, callback=_quiet, help='No work then: "daily 22:00-06:00"; or none. Repeatable.'
    ),
    click.option(
        "--share-while-charging/--charge-first",
        default=None,
        help="May work take from the charging power where the battery is full in time all the same.",
    ),
    click.option(
        "--battery-watts", type=click.IntRange(0, 100_000), help="Power from the battery; 0: never unplugged."
    ),
    click.option("--battery-floor", type=Number(0, 100), help="From the battery not below this charge, in percent."),
    click.option("--hours-week", type=Number(0, 168), help="Hours of work a week."),
    click.option("--hot-hours-week", type=Number(0, 10_000), help="The same, weighted by how hot the computer is."),
    click.option("--battery-wh-week", type=Number(0, 10_000_000), help="Watt-hours through the battery a week."),
    click.option("--written-mb-month", type=click.IntRange(0, 1_000_000), help="Megabytes written to flash a month."),
    click.option("--mobile-mb-month", type=click.IntRange(0, 1_000_000), help="Megabytes of mobile data a month."),
)


def limit_options(command: Any) -> Any:
    """The options of ``grant`` and ``change``; what is not given is kept."""
    for option in reversed(_LIMITS):
        command = option(command)
    return command


def limits_from(base: ConsentLimits, asked: dict[str, Any]) -> ConsentLimits:
    """The limits of ``base`` with everything that was asked for in their place."""
    given = {name: value for name, value in asked.items() if value is not None}

    def renamed(names: dict[str, str]) -> dict[str, Any]:
        return {field: given[option] for option, field in names.items() if option in given}

    budgets = renamed(
        {
            "hours_week": "compute_h_week",
            "hot_hours_week": "weighted_h_week",
            "battery_wh_week": "battery_wh_week",
        }
    )
    for option, field in (("written_mb_month", "flash_bytes_month"), ("mobile_mb_month", "metered_bytes_month")):
        if option in given:
            budgets[field] = given[option] * 1_000_000
    changes = renamed(
        {
            "watts": "max_watts_w",
            "floor": "floor_pct",
            "target": "target_pct",
            "schedule": "schedule",
            "quiet": "quiet",
            "share_while_charging": "share_while_charging",
            "battery_watts": "battery_watts_w",
            "battery_floor": "battery_floor_pct",
        }
    )
    if "ready_by" in given:
        changes["ready_by_minute"] = None if given["ready_by"] < 0 else given["ready_by"]
    return msgspec.structs.replace(base, budgets=msgspec.structs.replace(base.budgets, **budgets), **changes)


def of_a_car(command: Any) -> Any:
    """The vehicle, or its agent's folder."""
    folder = click.Path(path_type=Path, file_okay=False)
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one line of JSON."),
        click.option("--data", type=folder, help="Data folder of the `motorpool dev`."),
        click.option("--dir", "folder", type=folder, help="The agent's folder, where no `motorpool dev` runs."),
        click.argument("vehicle", required=False),
    ):
        command = option(command)
    return command


# -- what is said ------------------------------------------------------------------------------------------------------


def _told(agent_dir: Path, vehicle_id: str, now_ms: int) -> dict[str, Any]:
    said = acts.load_acts(agent_dir)
    view = enrolment.ConsentFile(
        agent_dir / enrolment.CONSENT_NAME, agent_dir / enrolment.PUBLIC_NAME, vehicle_id
    ).view(now_ms)
    latest = LogReader(agent_dir / LOG_DIR).entries(0, 1)
    return {
        "vehicle_id": vehicle_id,
        "consent": as_consent(view),
        "acts": {**msgspec.to_builtins(said), "words": words.acts(said, now_ms)},
        "latest": words.entry(latest[-1]) if latest else None,
    }


def _tell(agent_dir: Path, vehicle_id: str, *, as_json: bool, done: str | None = None) -> None:
    told = _told(agent_dir, vehicle_id, clock_ms())
    if as_json:
        print_json(told)
        return
    if done is not None:
        click.echo(f"{vehicle_id}: {done}")
    click.echo(f"{vehicle_id}: {told['consent']['words']}")
    if told["acts"]["words"]:
        click.echo(f"{vehicle_id}: {told['acts']['words']}")
    if done is None and told["latest"]:
        click.echo(f"{vehicle_id}: in the log last: {told['latest']}")


@click.group()
def owner() -> None:
    """What you say to your own car, and what it tells you: stop it, allow it, read its log. No network is needed.

    \b
    Examples:
      motorpool owner need-car 2
      motorpool owner pause 2 --minutes 90
      motorpool owner grant 2 --watts 150 --floor 40 --schedule "Mon-Fri 07:30 80"
      motorpool owner log --dir /var/lib/motorpool-agent
    """


@owner.command()
@of_a_car
def status(*, vehicle: str | None, data: Path | None, folder: Path | None, as_json: bool) -> None:
    """Say what you allow, what you said last, and the last entry of the log.

    \b
    Example:
      motorpool owner status 2
    """
    _tell(*place(vehicle, data, folder), as_json=as_json)


@owner.command()
@of_a_car
@click.option("--minutes", default=60, show_default=True, type=click.IntRange(1, 7 * 1440), help="For how long.")
def pause(*, vehicle: str | None, data: Path | None, folder: Path | None, as_json: bool, minutes: int) -> None:
    """Stop the car's computer for a while. Needs no key.

    \b
    Example:
      motorpool owner pause 2 --minutes 90
    """
    agent_dir, vehicle_id = place(vehicle, data, folder)
    acts.pause(agent_dir, clock_ms(), minutes * MINUTE_MS)
    _tell(agent_dir, vehicle_id, as_json=as_json, done=f"it rests; {SEEN}")


@owner.command(name="need-car")
@of_a_car
def need_car(*, vehicle: str | None, data: Path | None, folder: Path | None, as_json: bool) -> None:
    """Stop at once, until the car has been driven or you say `resume`. Needs no key.

    \b
    Example:
      motorpool owner need-car 2
    """
    agent_dir, vehicle_id = place(vehicle, data, folder)
    acts.need_car(agent_dir, clock_ms())
    _tell(agent_dir, vehicle_id, as_json=as_json, done=f"it stops; {SEEN}")


@owner.command()
@of_a_car
def resume(*, vehicle: str | None, data: Path | None, folder: Path | None, as_json: bool) -> None:
    """Lift your own pause and `need-car`. Whether the car then works is decided by your consent and by the car.

    \b
    Example:
      motorpool owner resume 2
    """
    agent_dir, vehicle_id = place(vehicle, data, folder)
    acts.resume(agent_dir, clock_ms())
    _tell(agent_dir, vehicle_id, as_json=as_json, done="your pause is over")


@owner.command()
@of_a_car
@limit_options
@click.option("--days", default=DEFAULT_DAYS, show_default=True, type=click.IntRange(1, 3660), help="For how long.")
def grant(
    *, vehicle: str | None, data: Path | None, folder: Path | None, as_json: bool, days: int, **asked: Any
) -> None:
    """Sign a consent with your key; it replaces an earlier one, and what is not given has its default.

    \b
    Examples:
      motorpool owner grant 2 --watts 150 --floor 40 --ready-by 07:30 --target 80
      motorpool owner grant 2 --schedule "Mon-Fri 07:30 80" --schedule "Sat,Sun 10:00 60" --quiet "daily 22:00-06:00"
    """
    agent_dir, vehicle_id = place(vehicle, data, folder)
    base = ConsentLimits(max_watts_w=DEFAULT_WATTS_W, budgets=BudgetLimits())
    now_ms = clock_ms()
    limits = limits_from(base, asked)
    enrolment.give_consent(agent_dir, vehicle_id, limits, now_ms=now_ms, expires_ms=now_ms + days * DAY_MS)
    _tell(agent_dir, vehicle_id, as_json=as_json)


@owner.command()
@of_a_car
@limit_options
@click.option("--days", type=click.IntRange(1, 3660), help="For how long from now; else the end stays.")
def change(
    *, vehicle: str | None, data: Path | None, folder: Path | None, as_json: bool, days: int | None, **asked: Any
) -> None:
    """Sign your present consent anew with some of its limits changed; all others stay.

    \b
    Examples:
      motorpool owner change 2 --floor 60
      motorpool owner change 2 --ready-by none --schedule "Mon-Fri 06:45 90"
    """
    agent_dir, vehicle_id = place(vehicle, data, folder)
    now_ms = clock_ms()
    present = enrolment.judge(agent_dir, vehicle_id, enrolment.read_consent(agent_dir), now_ms).grant
    if present is None:
        raise ConflictError("no consent holds that could be changed: give one with `motorpool owner grant`")
    expires_ms = present.expires_ms if days is None else now_ms + days * DAY_MS
    limits = limits_from(present.limits, asked)
    enrolment.give_consent(agent_dir, vehicle_id, limits, now_ms=now_ms, expires_ms=expires_ms)
    _tell(agent_dir, vehicle_id, as_json=as_json)


@owner.command()
@of_a_car
def withdraw(*, vehicle: str | None, data: Path | None, folder: Path | None, as_json: bool) -> None:
    """Take every consent given so far back, for good. Needs no key where the key is elsewhere.

    \b
    Example:
      motorpool owner withdraw 2
    """
    agent_dir, vehicle_id = place(vehicle, data, folder)
    enrolment.take_consent_back(agent_dir, vehicle_id, now_ms=clock_ms())
    _tell(agent_dir, vehicle_id, as_json=as_json, done=f"taken back; {SEEN}")


@owner.command()
@of_a_car
def confirm(*, vehicle: str | None, data: Path | None, folder: Path | None, as_json: bool) -> None:
    """Sign your consent once more with the same limits, after somebody else had the car.

    \b
    Example:
      motorpool owner confirm 2
    """
    agent_dir, vehicle_id = place(vehicle, data, folder)
    enrolment.confirm_consent(agent_dir, vehicle_id, now_ms=clock_ms())
    _tell(agent_dir, vehicle_id, as_json=as_json, done="confirmed")


@owner.command()
@of_a_car
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000), help="So many entries.")
@click.option("--hours", type=Number(0, 1_000_000), help="Of the last so many hours alone.")
@click.option("--verify", is_flag=True, help="Check that no entry was altered or removed.")
def log(
    *,
    vehicle: str | None,
    data: Path | None,
    folder: Path | None,
    as_json: bool,
    limit: int,
    hours: float | None,
    verify: bool,
) -> int:
    """Print your log: when the car worked, for what class of customer, and why it did not.

    With --verify the exit code is 1 if anything was altered or removed.

    \b
    Examples:
      motorpool owner log 2 --hours 24
      motorpool owner log 2 --verify
    """
    agent_dir, _ = place(vehicle, data, folder)
    reader = LogReader(agent_dir / LOG_DIR)
    if verify:
        found = reader.verify()
        if as_json:
            print_json({"entries": found.entries, "whole": found.whole, "problems": found.problems, "head": found.head})
        else:
            for problem in found.problems:
                print_error(problem)
            click.echo(f"{found.entries} entries, {'all as written' if found.whole else 'not all as written'}")
        return 0 if found.whole else EXIT_ERROR
    since_ms = 0 if hours is None else clock_ms() - round(hours * 3_600_000)
    for entry in reader.entries(since_ms, limit):
        if as_json:
            print_json(entry)
        else:
            click.echo(words.entry(entry))
    return 0


@owner.command()
@of_a_car
@click.option("--weeks", default=8, show_default=True, type=click.IntRange(1, 520), help="So many, this one included.")
def statement(*, vehicle: str | None, data: Path | None, folder: Path | None, as_json: bool, weeks: int) -> None:
    """Print what you earned, week by week: pay, electricity, wear, and what is left.

    \b
    Example:
      motorpool owner statement 2 --weeks 4
    """
    agent_dir, _ = place(vehicle, data, folder)
    monday_ms = local_monday_ms(clock_ms())
    times = [(monday_ms - week * WEEK_MS, monday_ms - (week - 1) * WEEK_MS) for week in range(weeks)]
    for summary in LogReader(agent_dir / LOG_DIR).summaries(times):
        told = words.as_statement(summary)
        if as_json:
            print_json(told)
            continue
        amounts = [
            f"{name} {'not known' if told[field] is None else words.money(told[field])}"
            for name, field in (
                ("pay", "pay_micro"),
                ("electricity", "electricity_micro"),
                ("wear", "wear_micro"),
                ("left", "net_micro"),
            )
        ]
        worked = f"{words.duration(told['working_ms'])} of work, {told['requests']} requests"
        click.echo(f"{words.day(summary.from_ms)}  {', '.join(amounts)}; {worked}")


@owner.command()
@of_a_car
@click.option("--forget", is_flag=True, help="Unpair every phone instead.")
def pair(*, vehicle: str | None, data: Path | None, folder: Path | None, as_json: bool, forget: bool) -> None:
    """Show a code to scan and a link, good once and for ten minutes, that pair a phone with the car's page.

    \b
    Example:
      motorpool owner pair --dir /var/lib/motorpool-agent
    """
    agent_dir, vehicle_id = place(vehicle, data, folder)
    if forget:
        pairing.forget(agent_dir, None)
        click.echo(f"{vehicle_id}: no phone is paired any more")
        return
    address = pairing.load_address(agent_dir)
    link = f"{address.url}/pair#{pairing.offer_pairing(agent_dir, clock_ms())}"
    if as_json:
        print_json({"link": link, "ca_sha256": address.ca_sha256})
        return
    import segno  # noqa: PLC0415  # for this one command

    segno.make(link, error="m").terminal(out=sys.stdout, compact=True)
    click.echo(f"Scan the code with your phone, or open {link}\nIt is good once, for ten minutes.")
    if address.ca_sha256 is not None:
        click.echo(f"Fingerprint of the car's own certificate (SHA-256): {address.ca_sha256}")
