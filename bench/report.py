"""Figures: how they are summed up, kept as JSON, and shown as tables in the terminal and in the docs.

Called by: the benchmarks, and ``python -m bench.report --markdown`` to put the tables of the results into
``docs/benchmarks.md``, so that what the docs say is what the JSON says.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench.env import BENCH, ROOT

RESULTS = BENCH / "results"
DOCS = ROOT / "docs" / "benchmarks.md"
OURS = "Motorpool"
QUIET_PCT = 10  # of the processors in use beforehand: above this, others compute as well
WATCH_S = 2.0


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was measured. Values are medians; ``spread`` holds the lowest and highest run of each system.

    ``aim`` says in words what was aimed at and ``met`` whether it was reached; None where there is no aim. ``counts``
    is the number of tasks, requests or pairs in a run, ``notes`` what a reader must know of a system's value. Figures
    of one name that differ in ``point`` show growth and stand in one table.
    """

    name: str
    unit: str
    ours: float | None
    peers: dict[str, float]
    aim: str = ""
    met: bool | None = None
    runs: int
    spread: dict[str, tuple[float, float]]
    commit: str
    counts: dict[str, int] = {}
    notes: dict[str, str] = {}
    less_is_better: bool = False
    point: str = ""


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark: ``results/NAME.json``."""

    name: str
    commit: str
    changed: bool
    date: str
    machine: str
    took_s: float
    figures: list[Figure]
    skipped: dict[str, str] = {}
    remarks: list[str] = []


class Samples:
    """Values of one figure as they come in, by system and run."""

    def __init__(self, name: str, unit: str, *, less_is_better: bool = False) -> None:
        self.name = name
        self.unit = unit
        self.less_is_better = less_is_better
        self.values: dict[str, list[float]] = {}
        self.counts: dict[str, int] = {}
        self.notes: dict[str, str] = {}

    def add(self, system: str, value: float, *, count: int | None = None, note: str | None = None) -> None:
        """One run of one system."""
        self.values.setdefault(system, []).append(value)
        if count is not None:
            self.counts[system] = count
        if note is not None:
            self.notes[system] = note

    def median(self, system: str) -> float | None:
        """The median of a system's runs, None if it has none."""
        values = self.values.get(system)
        return statistics.median(values) if values else None

    def best(self, systems: list[str]) -> float | None:
        """The best median among ``systems``, None if none of them ran."""
        found = [value for value in map(self.median, systems) if value is not None]
        return (min(found) if self.less_is_better else max(found)) if found else None

    def points(self) -> list[Figure]:
        """One figure for each system, which here is a point of growth."""
        return [
            Figure(
                name=self.name,
                unit=self.unit,
                ours=rounded(self.median(point)),
                peers={},
                runs=len(values),
                spread={OURS: (rounded(min(values)) or 0.0, rounded(max(values)) or 0.0)},
                commit=commit()[0],
                notes={OURS: self.notes[point]} if point in self.notes else {},
                less_is_better=self.less_is_better,
                point=point,
            )
            for point, values in self.values.items()
        ]

    def figure(self, *, aim: str = "", met: bool | None = None, ours: str = OURS) -> Figure:
        """The summary."""
        return Figure(
            name=self.name,
            unit=self.unit,
            ours=rounded(self.median(ours)),
            peers={name: rounded(self.median(name)) or 0.0 for name in self.values if name != ours},
            aim=aim,
            met=met if ours in self.values else None,
            runs=min((len(values) for values in self.values.values()), default=0),
            spread={name: (rounded(min(v)) or 0.0, rounded(max(v)) or 0.0) for name, v in self.values.items()},
            commit=commit()[0],
            counts=self.counts,
            notes=self.notes,
            less_is_better=self.less_is_better,
        )


def rounded(value: float | None) -> float | None:
    """Four digits are more than the spread allows."""
    return None if value is None else float(f"{value:.4g}")


def commit() -> tuple[str, bool]:
    """The short commit of the tree, and whether the product's source differs from it."""
    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return head, bool(git("status", "--porcelain", "--", "src", "bench/*.py", "bench/peers"))


def git(*arguments: str) -> str:
    """What git says, empty if there is none."""
    done = subprocess.run(["git", *arguments], check=False, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> str:
    """Cores, memory, processor and Python, in one line; no host name."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{os.cpu_count()} cores ({model}), {memory_gib:.0f} GiB, Python {platform.python_version()}"


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """When a benchmark began, and how busy the machine was with other things just then."""

    at_s: float
    busy_pct: float


def begin() -> Begun:
    """Take the time, and watch for a moment what else uses the processors."""
    at_s = time.monotonic()
    idle, total = processor_time()
    time.sleep(WATCH_S)
    idle_then, total_then = processor_time()
    return Begun(at_s=at_s, busy_pct=100 - 100 * (idle_then - idle) / max(1, total_then - total))


def processor_time() -> tuple[int, int]:
    """Idle (waiting for disks included) and all processor time since the machine started, in ticks."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def finish(
    name: str,
    figures: list[Figure],
    *,
    begun: Begun,
    keep: bool,
    skipped: dict[str, str],
    remarks: list[str],
    part: bool = False,
) -> Results:
    """Print the tables and write ``results/NAME.json``; a run that is not to be kept writes into ``.work`` instead.

    A run in which a part of our own failed ends the process with an error, and is kept only if every figure has a value
    of ours. Of a run that was a ``part`` only, the figures take the place of those with the same names in what is kept,
    and the others stay; each figure says of which commit it is.
    """
    failed = {name: reason for name, reason in skipped.items() if name.startswith(OURS)}
    whole = OURS not in skipped and not any(name.startswith(f"{OURS}, round") for name in skipped)
    head, changed = commit()
    busy = []
    if begun.busy_pct > QUIET_PCT:
        busy = [f"The machine was not quiet: {begun.busy_pct:.0f} % of its processors were in use before the start."]
    results = Results(
        name=name,
        commit=head,
        changed=changed,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        machine=machine(),
        took_s=round(time.monotonic() - begun.at_s, 1),
        figures=figures,
        skipped=skipped,
        remarks=remarks + busy,
    )
    folder = RESULTS if keep and whole else BENCH / ".work"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    written = joined(path, results) if part else results
    path.write_bytes(msgspec.json.format(msgspec.json.encode(written), indent=2) + b"\n")
    show(results, Console())
    print(f"==> {path.relative_to(ROOT)} ({results.took_s:.0f} s)", flush=True)
    if failed:
        raise SystemExit("a part of our own failed: " + "; ".join(failed))
    return results


def joined(path: Path, new: Results) -> Results:
    """What was kept before, with the figures of a run that was a part only in the place of those that they renew."""
    if not path.exists():
        return new
    old = msgspec.json.decode(path.read_bytes(), type=Results)
    renewed = {(figure.name, figure.point): figure for figure in new.figures}
    figures = [renewed.pop((figure.name, figure.point), figure) for figure in old.figures]
    return msgspec.structs.replace(
        new,
        changed=old.changed or new.changed,
        took_s=round(old.took_s + new.took_s, 1),
        figures=[*figures, *renewed.values()],
        skipped=old.skipped | new.skipped,
        remarks=list(dict.fromkeys([*old.remarks, *new.remarks])),
    )


def number(value: float) -> str:
    """A value for people."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def tables(figures: list[Figure]) -> list[list[Figure]]:
    """Figures that stand in one table: those of one name with points, and each other one by itself."""
    grouped: list[list[Figure]] = []
    for figure in figures:
        if figure.point and grouped and grouped[-1][0].name == figure.name:
            grouped[-1].append(figure)
        else:
            grouped.append([figure])
    return grouped


def growth_rows(points: list[Figure]) -> list[tuple[str, str, str, str, str]]:
    """Point, median, spread, compared with the first point, notes."""
    first = points[0].ours or 0.0
    made = []
    for figure in points:
        value = figure.ours or 0.0
        low, high = figure.spread[OURS]
        times = f"{value / first:.2f}x" if first else ""
        made.append((figure.point, number(value), f"{number(low)} - {number(high)}", times, figure.notes.get(OURS, "")))
    return made


def rows(figure: Figure) -> list[tuple[str, str, str, str, str]]:
    """System, median, spread, ours compared with it, notes: ours first, then the peers from best to worst."""
    ordered = sorted(figure.peers.items(), key=lambda item: item[1], reverse=not figure.less_is_better)
    values = ([(OURS, figure.ours)] if figure.ours is not None else []) + ordered
    made = []
    for system, value in values:
        low, high = figure.spread[system]
        ratio = ""
        if system != OURS and figure.ours is not None and min(value, figure.ours) > 0:
            times = value / figure.ours if figure.less_is_better else figure.ours / value
            ratio = f"{times:.1f}x" if times < 100 else f"{times:,.0f}x"
        note = figure.notes.get(system, "")
        if system in figure.counts:
            note = f"{figure.counts[system]:,} a run" + (f"; {note}" if note else "")
        made.append((system, number(value), f"{number(low)} - {number(high)}", ratio, note))
    return made


def verdict(figure: Figure) -> str:
    """The aim and whether it was reached."""
    if not figure.aim:
        return ""
    return f"Aim: {figure.aim}." + ("" if figure.met is None else " Reached." if figure.met else " Not reached.")


def headings(figure: Figure) -> tuple[str, str, str, str, str]:
    """The columns of a table."""
    if figure.point:
        return ("with", "median", "lowest - highest", "of the first", "")
    return ("system", "median", "lowest - highest", "ours is better by", "")


def show(results: Results, console: Console) -> None:
    """Print one table a figure."""
    for group in tables(results.figures):
        figure = group[0]
        table = Table(title=f"{figure.name} ({figure.unit}), {figure.runs} runs", caption=verdict(figure) or None)
        for column in headings(figure):
            table.add_column(column, justify="left" if column in ("system", "with", "") else "right")
        for row in growth_rows(group) if figure.point else rows(figure):
            table.add_row(*row, style="bold" if row[0] == OURS else None)
        console.print(table)
    for peer, reason in results.skipped.items():
        console.print(f"[yellow]Not measured: {peer}: {reason}")
    for remark in results.remarks:
        console.print(remark)


def markdown(results: Results) -> str:
    """The same tables for the docs."""
    state = "" if not results.changed else ", with changes that were not committed"
    lines = [f"Measured {results.date} at commit `{results.commit}`{state} on {results.machine}.", ""]
    for group in tables(results.figures):
        figure = group[0]
        lines += [f"**{figure.name}** ({figure.unit}, median of {figure.runs} runs)", ""]
        lines += ["| " + " | ".join(headings(figure)) + " |", "| --- | ---: | ---: | ---: | --- |"]
        found = growth_rows(group) if figure.point else rows(figure)
        lines += ["| " + " | ".join(row) + " |" for row in found]
        lines += ["", verdict(figure), ""] if figure.aim else [""]
    lines += [f"Not measured: {peer}: {reason}\n" for peer, reason in results.skipped.items()]
    lines += [f"{remark}\n" for remark in results.remarks]
    return "\n".join(lines).strip()


def fill(text: str, name: str, table: str) -> str:
    """Put a table between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``."""
    begin, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{DOCS.name} has no place for the results of {name}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    """Show the kept results; with ``--markdown`` write them into the docs, with ``--check`` fail if the docs differ."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = DOCS.read_text()
    for path in sorted(RESULTS.glob("*.json")):
        results = msgspec.json.decode(path.read_bytes(), type=Results)
        text = fill(text, results.name, markdown(results))
        if not options.markdown and not options.check:
            show(results, Console())
    if options.check and text != DOCS.read_text():
        raise SystemExit("docs/benchmarks.md differs from bench/results: run `python -m bench.report --markdown`")
    if options.markdown:
        DOCS.write_text(text)


if __name__ == "__main__":
    main()
