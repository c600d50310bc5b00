"""Part: a week of the full gear, with the production core, real vehicle machines and real guards, by size of the fleet.

Each run is a process of its own on one core. A car that is not plugged in costs next to nothing, so that the time is
also told for an hour at the cable. Called by: ``bench.run_cell``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any, Final

from bench import report
from bench.cell_bench import CHILD_S, ONE_CORE, Bench, NotMeasuredError, Point, Size, one
from bench.cell_worlds import living
from bench.env import ROOT
from motorpool.sim.full.week import HOUR_MS, WeekSpec, WeekWorld
from motorpool.sim.people import People

WEEK_DAYS: Final = 7.0
FLEETS: Final = (10, 100, 1_000)
QUICK_FLEETS: Final = (3, 10)
QUICK_DAYS: Final = 1.0
AIM_S: Final = 0.03  # a vehicle-week
SEED: Final = 1


def full_steps(size: Size) -> int:
    """Steps of the part."""
    return len(_fleets(size))


def full(bench: Bench) -> list[report.Figure]:
    """Processor time and memory of a vehicle's week, by size of the fleet."""
    days = QUICK_DAYS if bench.size.few else WEEK_DAYS
    time_ms = report.Samples("A vehicle's week in the full gear, processor time", "ms", less_is_better=True)
    memory = report.Samples("The same, peak memory of the process", "MB", less_is_better=True)
    assert len(bench.people) > 0  # made and kept before the child asks for them
    last: dict[str, Any] = {}
    for vehicles in _fleets(bench.size):
        with bench.step(f"{days:g} days of {vehicles:,} vehicles in the full gear"):
            last = _child(vehicles, days, few=bench.size.few)
        week_ms = last["cpu_s"] * 1000 / vehicles / days * 7
        word = f"{vehicles:,} vehicles"
        time_ms.add(word, week_ms, note=_note(last))
        memory.add(word, last["peak_mb"], note=f"{last['warm_mb']:,.0f} MB before the fleet was made")
        values = {"week_ms": week_ms} | {name: float(last[name]) for name in ("cpu_s", "peak_mb", "events", "lines")}
        bench.raw.points.append(Point(axis="full", at=vehicles, values=values))
    week_s = last["cpu_s"] / last["vehicles"] / days * 7
    figure = one(
        f"A vehicle's week among {last['vehicles']:,} in the full gear, one core",
        "s of processor time",
        week_s,
        less_is_better=True,
        aim=f"{AIM_S:g} s",
        met=week_s <= AIM_S,
        note=_note(last),
    )
    return [*time_ms.points(), *memory.points(), figure]


def _fleets(size: Size) -> tuple[int, ...]:
    return QUICK_FLEETS if size.few else FLEETS


def _note(found: dict[str, Any]) -> str:
    hour_ms = found["cpu_s"] * 1000 / max(found["plugged_h"], 1e-9)
    line_us = found["cpu_s"] * 1e6 / max(found["lines"], 1)
    note = f"{hour_ms:.1f} ms an hour at the cable, {line_us:,.0f} us a line; {found['events']:,} events"
    return f"{note}, {100 * found['waste']:.2f} % of the work without use"


def _child(vehicles: int, days: float, *, few: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.cell_full", "--vehicles", str(vehicles), "--days", str(days)]
    env = os.environ | dict.fromkeys(ONE_CORE, "1")
    try:
        done = subprocess.run(
            [*command, *(["--few"] if few else [])],
            check=False,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=env,
            timeout=CHILD_S,
        )
    except subprocess.TimeoutExpired as error:
        raise NotMeasuredError(f"{vehicles:,} vehicles in the full gear: not done after {CHILD_S:.0f} s") from error
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        raise NotMeasuredError(f"{vehicles:,} vehicles in the full gear: {said[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- in the child ------------------------------------------------------------------------------------------------------


def run(vehicles: int, days: float, people: People) -> dict[str, Any]:
    """One fleet: processor time (making it included), peak memory, and what was done."""
    warm_mb = peak_mb()
    begun_s = time.process_time()
    world = WeekWorld(WeekSpec(vehicles=vehicles, days=days, seed=SEED), people)
    week = world.live()
    return {
        "vehicles": vehicles,
        "cpu_s": time.process_time() - begun_s,
        "warm_mb": warm_mb,
        "peak_mb": peak_mb(),
        "plugged_h": world.plugged_ms / HOUR_MS,
        "lines": week.done,
        "events": week.events,
        "harvest": week.harvest,
        "waste": week.waste,
        "trace": week.trace,
    }


def peak_mb() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """One fleet; prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vehicles", type=int, required=True)
    parser.add_argument("--days", type=float, default=WEEK_DAYS)
    parser.add_argument("--few", action="store_true")
    options = parser.parse_args()
    print(json.dumps(run(options.vehicles, options.days, living(few=options.few))), flush=True)


if __name__ == "__main__":
    main()
