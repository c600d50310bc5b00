"""``motorpool sim``: a year of an owner, from recorded charging sessions, with Motorpool and without it.

Decides: what is shown of it, and that a broken promise is exit code 1. Must not: simulate (``sim.year`` does).
Called by: ``cli.main``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import click
import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from motorpool.cli import output
from motorpool.cli.lazy import LazyGroup
from motorpool.core.economics import PayRates, Tariff
from motorpool.core.policy import ReadyBy
from motorpool.core.wear import WearPrices
from motorpool.sim import words
from motorpool.sim.owners import OwnerYear, Spread, every_owner, spread
from motorpool.sim.recordings import Recording, load
from motorpool.sim.year import Node, Year, choose, local_time, simulate

MICRO: Final = 1_000_000
PICTURE: Final = Path("owner-year.svg")
ENDINGS: Final = (".svg", ".png")


class TimeOfDay(click.ParamType[int]):
    """A time of day, or "none"; a number of minutes, or -1."""

    name = "HH:MM"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The minute of the day."""
        if isinstance(value, int):
            return value
        if value == "none":
            return -1
        found = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", str(value))
        if found is None:
            self.fail(f"{value} is no time of day like 07:00, and not none", param, ctx)
        return int(found[1]) * 60 + int(found[2])


class Simulations(LazyGroup):
    """What can be simulated."""

    places: ClassVar[dict[str, str]] = {
        "year": "sim:year_command",
        "scenarios": "sim_fleet:scenarios",
        "fleet": "sim_fleet:fleet",
        "run": "sim_faults:run_command",
        "faults": "sim_faults:faults_command",
    }


@click.group(cls=Simulations)
def sim() -> None:
    """Simulate owners, their cars and whole fleets, with the real guard and the real scheduler.

    \b
    Examples:
      motorpool sim year --sessions DATA          a year of one owner
      motorpool sim fleet s1_mixed_week           a week of a fleet
      motorpool sim faults                        everything fails, in many small worlds
    """


@click.command("year")
@click.option(
    "--sessions",
    "path",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="Recorded charging sessions: the folder of the Norwegian files, one CSV file of theirs, or Boulder's.",
)
@click.option("--user", help="The owner (in Boulder: the station); without it a usual one is taken.")
@click.option("--all", "everybody", is_flag=True, help="Every owner with 50 sessions a year or more; no picture.")
@click.option("--watts", type=click.IntRange(10, 5_000), default=130, show_default=True, help="Power of the computer.")
@click.option(
    "--tokens-per-s",
    type=output.Number(0, 1e6),
    default=283.0,
    show_default=True,
    help="What it generates at that power; three times as many are read.",
)
@click.option(
    "--pay-input",
    type=output.Number(0, 1e4),
    default=0.021,
    show_default=True,
    help="What the owner is paid for a million tokens read.",
)
@click.option(
    "--pay-output",
    type=output.Number(0, 1e4),
    default=0.042,
    show_default=True,
    help="The same for a million tokens generated.",
)
@click.option("--tariff", type=output.Number(0, 100), default=0.12, show_default=True, help="Price of a kilowatt-hour.")
@click.option(
    "--awake-watts",
    type=output.Number(0, 2_000),
    default=40.0,
    show_default=True,
    help="What the rest of the car draws while it is awake for us.",
)
@click.option(
    "--silicon",
    type=output.Number(0, 100),
    default=0.0,
    show_default=True,
    help="What an hour at 85 Celsius wears of the computer, in money.",
)
@click.option(
    "--charger-watts",
    type=click.IntRange(800, 22_000),
    help="Another charger than the recorded one, such as a slow one: 1400.",
)
@click.option(
    "--ready-by",
    "ready_minute",
    type=TimeOfDay(),
    default="07:00",
    show_default=True,
    help="When the owner wants the car each day, in local time; none: no such time.",
)
@click.option(
    "--target", type=output.Number(0, 100), default=80.0, show_default=True, help="Charge in percent wanted by then."
)
@click.option("--currency", default="USD", show_default=True, help="What amounts are called.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=PICTURE,
    show_default=True,
    help="The picture: .svg or .png.",
)
@click.option("--no-picture", is_flag=True, help="Draw none.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def year_command(
    *,
    path: Path,
    user: str | None,
    everybody: bool,
    charger_watts: int | None,
    ready_minute: int,
    target: float,
    currency: str,
    out: Path,
    no_picture: bool,
    as_json: bool,
    **node: float,
) -> int:
    """Live through a year of an owner: the same car with Motorpool and without.

    Plug-ins, drives and departures are those of a recording, and the guard is the real one. At every look and departure
    an account that shares nothing with the guard checks what the owner was promised. Exit code 1: a promise was broken.
    A year takes about 15 seconds and writes owner-year.svg here; --all takes minutes.

    \b
    Examples (DATA is a folder with the files of Zenodo 10.5281/zenodo.13896176):
      motorpool sim year --sessions DATA
      motorpool sim year --sessions DATA --user OSL_T_71 --tariff 0.30 --awake-watts 300 --out year.png
      motorpool sim year --sessions DATA --charger-watts 1400 --no-picture --json
      motorpool sim year --sessions DATA --all
    """
    if everybody and user is not None:
        raise click.UsageError("--all and --user do not go together")
    wants_picture = not (no_picture or everybody)
    if wants_picture and out.suffix.lower() not in ENDINGS:
        raise click.BadParameter(f"{out.name} has to end in .svg or .png", param_hint="--out")
    if wants_picture:
        import motorpool.sim.picture  # noqa: F401, PLC0415  # a missing extra is told before the work, not after it
    ready_by = None if ready_minute < 0 else ReadyBy(minute=ready_minute, target_pct=target)
    recording = _load(path, charger_watts)
    if everybody:
        return _everybody(recording, _node(node), ready_by, currency, as_json=as_json)
    name, found = choose(recording.sessions, user)
    with _bar(f"a year of {name}") as tell:
        year = simulate(name, found, _node(node), zone=recording.zone, ready_by=ready_by, tell=tell)
    if wants_picture:
        _draw(year, recording.source, currency, out)
    if as_json:
        output.print_json(as_plain(year))
    else:
        _print_year(year, recording.source, currency, out if wants_picture else None)
    return output.EXIT_ERROR if year.violations else 0


def _load(path: Path, charger_watts: int | None) -> Recording:
    recording = load(path)
    if charger_watts is None:
        return recording
    slow = [msgspec.structs.replace(each, charger_w=float(charger_watts)) for each in recording.sessions]
    return msgspec.structs.replace(recording, sessions=slow)


def _node(options: dict[str, float]) -> Node:
    return Node(
        watts_w=int(options["watts"]),
        tokens_s=options["tokens_per_s"],
        rates=PayRates(
            input_micro=round(options["pay_input"] * MICRO), output_micro=round(options["pay_output"] * MICRO)
        ),
        awake_w=options["awake_watts"],
        prices=WearPrices(silicon_micro_h=round(options["silicon"] * MICRO)),
        tariff=Tariff.flat(round(options["tariff"] * MICRO)),
    )


@contextmanager
def _bar(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar with the time left, where a person is watching."""
    console = output.stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _draw(year: Year, source: str, currency: str, out: Path) -> None:
    from motorpool.sim.picture import draw  # noqa: PLC0415  # matplotlib is an extra

    output.write_whole(out, draw(year, source, currency, png=out.suffix.lower() == ".png"))


def as_plain(year: Year) -> dict[str, Any]:
    """The year with what follows from it, for programs."""
    found: dict[str, Any] = msgspec.to_builtins(year)
    found |= {
        "net_micro": year.statement.net_micro,
        "books_wh": year.books_wh,
        "our_cycles": year.our_cycles,
        "least_pct": year.least_pct,
        "before_full": year.before_full,
    }
    return found


def _print_year(year: Year, source: str, currency: str, picture: Path | None) -> None:
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title=f"{year.user}, {words.months(year)}", title_justify="left")
    table.add_column("")
    table.add_column("with Motorpool", justify="right")
    table.add_column("without", justify="right")
    table.add_column("difference", justify="right")
    for row in _rows(year, currency):
        table.add_row(*row)
    console.print(table)
    why = ", ".join(f"{words.why(code)} {words.hours(for_ms):,.0f} h" for code, for_ms in year.why_ms.items())
    console.print(f"Not at work while plugged in: {why or 'never'}.")
    console.print(f"Sessions: {source}. Battery and charger are modelled; car and work are simulated.", style="dim")
    if picture is not None:
        console.print(f"Picture: {picture}")
    count = sum(year.violations.values())
    checked = (
        f"{year.permits_checked:,} permits, {len(year.departures)} departures, {len(year.ready_by)} ready-by times"
    )
    console.print(f"{words.violations(count)} in {checked}", style="bold red" if count else "bold green")
    for kind, times in year.violations.items():
        console.print(f"  {kind}: {times:,}")
    for example in year.examples[:5]:
        console.print(f"  {local_time(year.zone, example.at_ms)} {example.kind} {example.detail}".rstrip())


def _rows(year: Year, currency: str) -> list[tuple[str, str, str, str]]:
    statement = year.statement
    departures = year.departures
    with_us = sum(each.with_pct for each in departures) / len(departures)
    without = sum(each.without_pct for each in departures) / len(departures)
    return [
        ("mean charge at departure, %", f"{with_us:.2f}", f"{without:.2f}", f"{with_us - without:+.3f}"),
        (f"worst of {len(departures)} departures, points", "", "", f"-{words.loss(year.least_pct)}"),
        ("worst at any minute, points", "", "", f"-{words.loss(year.least_any_pct)}"),
        ("departures before the battery was full", "", str(year.before_full), ""),
        (
            "energy at the socket, by the cars' meters, kWh",
            f"{year.with_us_wh / 1000:,.1f}",
            f"{year.without_us_wh / 1000:,.1f}",
            f"{year.cars_wh / 1000:,.1f}",
        ),
        ("the same by the books, kWh", "", "", f"{year.books_wh / 1000:,.1f}"),
        ("of that, in the computer, kWh", "", "", f"{year.computer_wh / 1000:,.1f}"),
        (
            "battery, equivalent full cycles",
            f"{year.with_us_cycles:.2f}",
            f"{year.without_us_cycles:.2f}",
            f"{year.our_cycles:+.2f}",
        ),
        ("hours plugged in", f"{words.hours(year.plugged_ms):,.0f}", f"{words.hours(year.plugged_ms):,.0f}", ""),
        ("hours worked", f"{words.hours(year.worked_ms):,.0f}", "", ""),
        ("the same weighted by temperature", f"{words.hours(statement.weighted_ms):,.0f}", "", ""),
        ("tokens generated, millions", f"{year.tokens / 1e6:,.0f}", "", ""),
        (f"pay, {currency}", words.money(statement.pay_micro), "", ""),
        (f"electricity, {currency}", words.money(statement.electricity_micro), "", ""),
        (f"wear, {currency}", words.money(statement.wear_micro), "", ""),
        (f"net, {currency}", words.money(statement.net_micro), "", ""),
    ]


# -- every owner -------------------------------------------------------------------------------------------------------


def _everybody(recording: Recording, node: Node, ready_by: ReadyBy | None, currency: str, *, as_json: bool) -> int:
    with _bar("a year of every owner") as tell:
        rows = every_owner(recording.sessions, node, zone=recording.zone, ready_by=ready_by, tell=tell)
    spreads = {
        "departures": spread([row.departures for row in rows]),
        "hours plugged in": spread([row.plugged_h for row in rows]),
        "hours worked": spread([row.worked_h for row in rows]),
        "energy at the socket, kWh": spread([row.grid_kwh for row in rows]),
        f"net, {currency}": spread([row.net_micro / MICRO for row in rows]),
    }
    if as_json:
        output.print_json({"owners": rows, "spread": spreads})
    else:
        _print_everybody(rows, spreads, recording.source)
    return output.EXIT_ERROR if any(row.violations for row in rows) else 0


def _print_everybody(rows: list[OwnerYear], spreads: dict[str, Spread], source: str) -> None:
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title=f"A year of {len(rows)} owners", title_justify="left")
    for title in ("", "a tenth has less", "half has less", "nine tenths have less"):
        table.add_column(title, justify="right" if title else "left")
    for name, each in spreads.items():
        table.add_row(name, *(f"{value:,.1f}" for value in (each.p10, each.median, each.p90)))
    console.print(table)
    worst = min(rows, key=lambda row: (row.least_pct, row.user))
    count = sum(row.violations for row in rows)
    departures, before_full = sum(row.departures for row in rows), sum(row.before_full for row in rows)
    console.print(f"{departures:,} departures, {before_full:,} of them before the battery was full.")
    console.print(f"Largest loss of charge at one of them: {words.loss(worst.least_pct)} points ({worst.user}).")
    console.print(f"Largest change of battery cycles: {max(row.our_cycles for row in rows):+.3f}.")
    console.print(f"Sessions: {source}.", style="dim")
    looks = sum(row.looks for row in rows)
    console.print(f"{words.violations(count)} in {looks:,} looks", style="bold red" if count else "bold green")
    for row in rows:
        if row.violations:
            console.print(f"  {row.user}: {row.violations:,}")
