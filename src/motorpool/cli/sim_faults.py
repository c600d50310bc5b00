"""``motorpool sim faults`` and ``motorpool sim run``: the full gear of the simulator, with faults and without.

Decides: what is shown, and that a broken promise is exit code 1. Must not: simulate (``sim.full`` does).
Called by: ``cli.sim``, which has the group.
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from motorpool.cli import output
from motorpool.sim.full.faults import Kind

MICRO: Final = 1_000_000
MAX_SHOWN: Final = 5  # worlds with a broken promise, of many


@click.command("faults")
@click.option("--seeds", type=click.IntRange(1), default=200, show_default=True, help="How many worlds.")
@click.option("--first", type=click.IntRange(0), default=1, show_default=True, help="The seed of the first one.")
@click.option("--seed", type=click.IntRange(0), help="This one world alone; its last events are shown.")
@click.option("--vehicles", type=click.IntRange(1, 200), help="Vehicles of each world; without it 3 to 8 by the seed.")
@click.option(
    "--without",
    multiple=True,
    type=click.Choice([str(kind) for kind in Kind]),
    help="Leave a kind of fault out; may be given several times. All else stays the same.",
)
@click.option("--no-shrink", is_flag=True, help="Do not look for a smaller world that breaks the same promise.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def faults_command(
    *,
    seeds: int,
    first: int,
    seed: int | None,
    vehicles: int | None,
    without: tuple[str, ...],
    no_shrink: bool,
    as_json: bool,
) -> int:
    """Let everything fail that can, in many small worlds, and check every promise after every event.

    The real scheduler, books, vehicle machine and guard run on a simulated clock and network. Messages are dropped,
    doubled, delayed and reordered; vehicles are cut off, crash, hang, lie and have wrong clocks; the cell crashes and
    its disk fills up; owners come and go. Then the world heals, and every job must end, in results or in a named
    reason. A world follows from its seed alone. Exit code 1: a promise was broken; the command that replays it is
    printed.

    \b
    Examples:
      motorpool sim faults
      motorpool sim faults --seeds 20000 --first 1000
      motorpool sim faults --seed 17 --vehicles 4 --without liars
    """
    from motorpool.sim.full.run import run_seed, shrink  # noqa: PLC0415  # the whole product is loaded with it

    kinds = [Kind(each) for each in without]
    chosen = [seed] if seed is not None else list(range(first, first + seeds))
    begun_s = time.perf_counter()
    outcomes = []
    with _bar("worlds", len(chosen)) as tell:
        for each in chosen:
            outcomes.append(run_seed(each, vehicles, kinds))
            tell(1)
    seconds = time.perf_counter() - begun_s
    broken = [each for each in outcomes if each.broken]
    if broken and not no_shrink:
        output.say("looking for a smaller world that breaks the same promise")
        broken[0] = shrink(broken[0])
    if as_json:
        output.print_json(
            {
                "worlds": len(outcomes),
                "broken": broken,
                "commands": [each.command for each in broken],
                "lines": sum(each.lines for each in outcomes),
                "events": sum(each.events for each in outcomes),
                "simulated_ms": sum(each.simulated_ms for each in outcomes),
                "seconds": round(seconds, 3),
                "traces": {str(each.seed): each.trace for each in outcomes},
            }
        )
    else:
        _print_outcomes(outcomes, broken, seconds)
    return output.EXIT_ERROR if broken else 0


@contextmanager
def _bar(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """A progress bar with the time left, where a person is watching; it hears how much more is done."""
    console = output.stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda more: bar.advance(task, more)


def _print_outcomes(outcomes: list[Any], broken: list[Any], seconds: float) -> None:
    console = Console(highlight=False, soft_wrap=True)
    events, lines = sum(each.events for each in outcomes), sum(each.lines for each in outcomes)
    hours = sum(each.simulated_ms for each in outcomes) / 3_600_000
    ends: dict[str, int] = {}
    for each in outcomes:
        for status, count in each.jobs.items():
            ends[status] = ends.get(status, 0) + count
    said = ", ".join(f"{count:,} {status}" for status, count in sorted(ends.items()))
    console.print(f"{len(outcomes):,} worlds, {hours:,.1f} simulated hours, {lines:,} lines; jobs: {said or 'none'}.")
    console.print(f"{events:,} events in {seconds:,.1f} s.", style="dim")
    for each in broken[:MAX_SHOWN]:
        console.print(f"seed {each.seed}, after {each.at_ms / 1000:.3f} s: {each.detail}", style="bold red")
        if len(outcomes) == 1:
            for entry in each.story:
                console.print(f"  {entry}", style="dim", markup=False)
        console.print(f"  {each.command}", markup=False)
    if len(broken) > MAX_SHOWN:
        console.print(f"and {len(broken) - MAX_SHOWN:,} more worlds with a broken promise", style="bold red")
    if not broken:
        console.print("No promise was broken.", style="bold green")


@click.command("run")
@click.option("--vehicles", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Vehicles.")
@click.option("--days", type=output.Number(0.05, 28), default=1.0, show_default=True, help="Simulated days.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed, the same run.")
@click.option("--gear", type=click.Choice(["full"]), default="full", show_default=True, help="Which simulator.")
@click.option(
    "--load", type=output.Number(0.01, 10), default=0.8, show_default=True, help="Work over what is possible."
)
@click.option(
    "--sessions",
    "path",
    type=click.Path(path_type=Path, exists=True),
    help="Recorded charging sessions; without them people are made up after published figures.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def run_command(
    *, vehicles: int, days: float, seed: int, gear: str, load: float, path: Path | None, as_json: bool
) -> int:
    """Run a fleet for days with the production core, real vehicle machines and real messages between them.

    \b
    Examples:
      motorpool sim run --vehicles 100 --days 1
      motorpool sim run --vehicles 1000 --days 7 --seed 3 --sessions DATA
    """
    from motorpool.sim import generator, people  # noqa: PLC0415  # the whole product is loaded with it
    from motorpool.sim.full.week import WeekSpec, WeekWorld  # noqa: PLC0415

    del gear
    crowd = generator.people(seed) if path is None else people.read([path])
    world = WeekWorld(WeekSpec(vehicles=vehicles, days=days, seed=seed, load=load), crowd)
    console = output.stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{days:g} days of {vehicles:,} vehicles", total=1.0)
        week = world.live(lambda share: bar.update(task, completed=share))
    if as_json:
        output.print_json(msgspec.to_builtins(week) | {"events_s": week.events_s, "people": crowd.source})
        return 0
    table = Table(box=box.SIMPLE_HEAD, title=f"{vehicles:,} vehicles, {days:g} days, seed {seed}", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in _rows(week):
        table.add_row(name, value)
    shown = Console(highlight=False)
    shown.print(table)
    shown.print(f"People: {crowd.source}.", style="dim")
    return 0


def _rows(week: Any) -> list[tuple[str, str]]:
    jobs = ", ".join(f"{count:,} {status}" for status, count in week.jobs.items())
    return [
        ("lines handed in", f"{week.lines:,}"),
        ("lines done", f"{week.done:,}"),
        ("lines lost: begun and not finished there", f"{week.lost:,}"),
        ("lines doubled: results that did not count", f"{week.doubled:,}"),
        ("slot-hours with a permit", f"{week.permitted_slot_h:,.0f}"),
        ("the same while there was work", f"{week.possible_slot_h:,.0f}"),
        ("slot-hours at work", f"{week.worked_slot_h:,.0f}"),
        ("harvest: useful work over what was possible", f"{week.harvest:.4f}"),
        ("waste: work of no use over all work", f"{week.waste:.4%}"),
        ("jobs", jobs or "none"),
        ("owners earned", f"{week.earned_micro / MICRO:,.2f}"),
        ("events a second", f"{week.events_s:,.0f}"),
        ("took, s", f"{week.seconds:,.1f}"),
        ("trace", week.trace),
    ]
