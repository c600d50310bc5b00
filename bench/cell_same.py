"""Parts: a week of a million vehicles on one core; and that a run is the same to the last bit, whoever runs it.

Called by: ``bench.run_cell``.
"""

from __future__ import annotations

from typing import Any, Final

from bench import report
from bench.cell_bench import Bench, NotMeasuredError, Point, Size, child, one
from bench.report import OURS

WEEK_AIM_S: Final = 180.0
MILLION: Final = 1_000_000
HOURS: Final = 12
# Name, arguments and environment of each run that has to give the same digest.
RUNS: Final[tuple[tuple[str, tuple[str, ...], dict[str, str]], ...]] = (
    ("compiled", (), {"PYTHONHASHSEED": "0"}),
    ("compiled, again", (), {"PYTHONHASHSEED": "0"}),
    ("compiled, another hash seed", (), {"PYTHONHASHSEED": "4242"}),
    ("plain", ("--plain",), {"PYTHONHASHSEED": "1"}),
    ("NUMBA_DISABLE_JIT=1", (), {"PYTHONHASHSEED": "2", "NUMBA_DISABLE_JIT": "1"}),
)


def week_steps(size: Size) -> int:
    """Steps of the part."""
    return len(size.weeks)


def week(bench: Bench) -> list[report.Figure]:
    """Processor time and peak memory of a week, by size of the fleet."""
    size = bench.size
    time_s = report.Samples("A week of the fleet gear on one core, processor time", "s", less_is_better=True)
    memory = report.Samples("The same, peak memory of the process", "MB", less_is_better=True)
    few = ["--few"] if size.few else []
    assert len(bench.people) > 0  # made and kept before the child asks for them
    last: dict[str, Any] = {}
    for vehicles in size.weeks:
        with bench.step(f"a week of {vehicles:,} vehicles"):
            last = child(["week", "--vehicles", str(vehicles), *few])
        word = f"{vehicles:,} vehicles"
        events = float(last["events"])
        note = f"{events / 1e6:,.1f} million events, {last['cpu_s'] / max(events, 1) * 1e9:,.0f} ns each"
        time_s.add(word, last["cpu_s"], note=f"{note}; the world {last['world_s']:.1f} s more")
        memory.add(word, last["peak_mb"], note=f"world {last['world_mb']:,.0f} MB, cell {last['cell_mb']:,.0f} MB")
        values = {name: float(last[name]) for name in ("cpu_s", "peak_mb", "events", "world_s")}
        bench.raw.points.append(Point(axis="week", at=vehicles, values=values))
    figures = [*time_s.points(), *memory.points()]
    reached = size.weeks[-1] >= MILLION
    figures.append(
        one(
            f"{size.weeks[-1]:,} vehicles for a week, one core",
            "s of processor time",
            float(last["cpu_s"]),
            less_is_better=True,
            aim=f"{WEEK_AIM_S:.0f} s for {MILLION:,} vehicles",
            met=float(last["cpu_s"]) <= WEEK_AIM_S if reached else None,
            note=f"useful {last['useful_share']:.3f} of U0, missed {100 * last['missed_share']:.2f} % of jobs",
        )
    )
    return figures


def same_steps(size: Size) -> int:
    """Steps of the part."""
    del size
    return len(RUNS)


def same(bench: Bench) -> list[report.Figure]:
    """Digests of one small world, run in different ways."""
    few = ["--few"] if bench.size.few else []
    assert len(bench.people) > 0
    found: dict[str, dict[str, Any]] = {}
    for name, arguments, environment in RUNS:
        with bench.step(f"the same run: {name}"):
            common = ["digest", "--vehicles", str(bench.size.same_vehicles), "--hours", str(HOURS), *few]
            found[name] = child([*common, *arguments], environment=environment)
    return [same_figure(found)]


def same_figure(found: dict[str, dict[str, Any]]) -> report.Figure:
    """How many runs differ from the first. Raises NotMeasuredError for a world in which nothing happened."""
    first = next(iter(found.values()))
    if not first["grants"]:
        raise NotMeasuredError("the world of the comparison has no work in it")
    other = [name for name, run in found.items() if run["digest"] != first["digest"]]
    note = f"{first['events']:,} events; {', '.join(found)}: {first['digest'][:16]}"
    if other:
        note = f"differ: {', '.join(other)}"
    samples = report.Samples("Runs that differ in any bit", "runs", less_is_better=True)
    samples.add(OURS, float(len(other)), count=len(found), note=note)
    return samples.figure(aim="none", met=not other)
