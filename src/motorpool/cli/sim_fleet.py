"""``motorpool sim fleet``: a scenario on a fleet of any size, with the scheduler's own kernels.

Decides: what is shown of a run. Must not: simulate (``sim.fleet_run`` does).
Called by: ``cli.main``, which puts the commands under ``motorpool sim``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from motorpool.cli import output

MILLION: Final = 1e6


@click.command("scenarios")
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
def scenarios(as_json: bool) -> None:
    """List the scenarios that come with Motorpool.

    \b
    Example:
      motorpool sim scenarios
    """
    from motorpool.sim import scenario  # noqa: PLC0415 - numpy is not there in a vehicle

    found = {name: scenario.load(name) for name in scenario.names()}
    if as_json:
        output.print_json([{"name": name, "title": one.title, "why": one.why} for name, one in found.items()])
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("what happens")
    for name, one in found.items():
        table.add_row(name, one.why)
    Console().print(table)


@click.command("fleet")
@click.argument("scenario_name", metavar="SCENARIO", default="s1_mixed_week")
@click.option("--vehicles", type=click.IntRange(1, 2_000_000), help="How many; else as many as the scenario says.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="The same seed gives the same run.")
@click.option(
    "--sessions",
    "paths",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="Recorded charging sessions; without them people are drawn from published figures.",
)
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(["streaming", "forecast", "revoke", "measured"]),
    help="Leave a part of the scheduler out, to see what it is worth.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
def fleet(
    *,
    scenario_name: str,
    vehicles: int | None,
    seed: int,
    paths: tuple[Path, ...],
    without: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run SCENARIO (a name from `motorpool sim scenarios`, or a TOML file) on a simulated fleet.

    The decisions are the scheduler's own, compiled at the first run, which takes a minute or two more.

    \b
    Examples:
      motorpool sim fleet s1_mixed_week --vehicles 10000
      motorpool sim fleet s2_morning_exodus --sessions DATA --seed 7
      motorpool sim fleet my_week.toml --without forecast --json
    """
    import numba  # noqa: F401, PLC0415 - an extra: what is missing is said before anything is simulated

    from motorpool.sim import generator, people, scenario, world  # noqa: PLC0415
    from motorpool.sim.fleet_gear import Switches  # noqa: PLC0415
    from motorpool.sim.fleet_run import FleetRun  # noqa: PLC0415

    chosen = scenario.load(scenario_name)
    owners = people.read(list(paths)) if paths else generator.people()
    place = world.build(chosen, owners, vehicles, seed)
    began_s = time.process_time()
    with _progress(f"{len(place):,} vehicles", as_json) as tell:
        run = FleetRun(place, switches=Switches(**dict.fromkeys(without, False)))
        outcome = run.run(tell)
    took_s = time.process_time() - began_s
    if as_json:
        output.print_json(msgspec.to_builtins(outcome) | {"scenario": scenario_name, "seed": seed, "took_s": took_s})
        return
    _show(chosen.title, outcome, took_s)


@contextmanager
def _progress(what: str, as_json: bool) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share: progress.update(task, completed=share)


def _show(title: str, outcome: Any, took_s: float) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(justify="left", style="dim")
    computed = max(outcome.computed, 1.0)
    rows = [
        ("vehicles", f"{outcome.vehicles:,}", ""),
        ("could be made", f"{outcome.available / MILLION:,.0f}", "million tokens, at all permitted times"),
        ("made, and counted", f"{outcome.useful / MILLION:,.0f}", f"{outcome.useful / outcome.available:.2%}"),
        ("lost", f"{outcome.lost / computed:.3%}", "begun on vehicles that left without a word"),
        ("done twice", f"{outcome.doubled / computed:.3%}", ""),
        ("late", f"{outcome.late / computed:.3%}", "done after the job had ended"),
        ("jobs past their deadline", f"{outcome.jobs_missed:,} of {outcome.jobs:,}", f"{outcome.missed_share:.2%}"),
        ("energy", f"{outcome.energy_kwh:,.0f}", "kWh at work"),
        ("leases", f"{outcome.grants:,}", ""),
        ("models loaded", f"{outcome.switches:,}", ""),
        ("processor time", f"{took_s:,.1f}", f"s, {outcome.events:,} events"),
    ]
    if outcome.whole_units:
        whole = f"{outcome.whole_done:,} of {outcome.whole_units:,}"
        rows.insert(7, ("units done in one go", whole, f"{outcome.whole_done / outcome.whole_units:.1%}"))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
