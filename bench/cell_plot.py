"""Draws the cell's benchmark: systems by scenario, what each part is worth, and growth.

Must not: write a date or anything random into a file: the same results are the same bytes. Called by:
``bench.run_cell``, and ``python -m bench.cell_plot FOLDER`` to draw the latest results again.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.cell_bench import RAW, Point, Raw
from bench.cell_harvest import ADMITTING, TITLES, by_system, pooled_missed_pct
from bench.cell_worlds import WASTES, Score
from bench.report import OURS
from bench.yield_plot import FAINT, INK, STYLE

# Okabe and Ito's colours; systems are told apart by their marks as well.
LOOKS: Final = {
    OURS: ("#0072B2", "o"),
    ADMITTING: ("#56B4E9", "o"),
    "random": ("#999999", "x"),
    "FIFO": ("#E69F00", "s"),
    "FIFO, streaming": ("#E69F00", "D"),
    "HTCondor-like": ("#D55E00", "^"),
    "BOINC-like": ("#CC79A7", "v"),
    "earliest deadline first": ("#009E73", "P"),
}
WASTE_COLOURS: Final = dict(zip(WASTES, ("#D55E00", "#E69F00", "#CC79A7", "#999999"), strict=True))
CAPTIONS: Final = {
    "policies": "Missed deadlines and harvest of every system in each scenario",
    "ablations": "Waste, harvest and missed deadlines without one part of the policy each",
    "growth": "How time and memory grow with vehicles and jobs",
}
LEAST_PCT: Final = 0.01  # what is less is drawn here: the axis is logarithmic
GOLDEN: Final = 0.6180339887


def pictures(raw: Raw) -> dict[str, bytes]:
    """The pictures of what there is."""
    found: dict[str, bytes] = {}
    scenarios = [name for name in TITLES if raw.scores.get(name)]
    if scenarios:
        found["policies"] = _drawn(lambda: _policies(raw, scenarios))
    if any(name.startswith("ablations") for name in raw.scores):
        found["ablations"] = _drawn(lambda: _ablations(raw))
    if raw.points:
        found["growth"] = _drawn(lambda: _growth(raw.points))
    return found


def _drawn(make: Callable[[], Figure]) -> bytes:
    with mpl.rc_context(STYLE):
        file = BytesIO()
        make().savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)


# -- systems by scenario -----------------------------------------------------------------------------------------------


def _policies(raw: Raw, scenarios: list[str]) -> Figure:
    """A row a scenario: missed jobs on the left, harvest on the right; a mark a system, every seed faintly."""
    height = 1.9 + 0.5 * len(scenarios)
    figure = Figure(figsize=(11.6, height), facecolor="white")
    figure.text(0.015, 1 - 0.36 / height, "Every system on the same worlds", fontsize=15, weight="bold")
    said = "faint marks are single runs, strong ones all runs together; left is better on the left, right on the right"
    figure.text(0.015, 1 - 0.64 / height, said, fontsize=9, color=FAINT)
    bottom, top = 0.55 / height, (height - 1.45) / height
    left = figure.add_axes((0.25, bottom, 0.39, top - bottom + 0.1 / height))
    right = figure.add_axes((0.68, bottom, 0.3, top - bottom + 0.1 / height))
    for axes in (left, right):
        axes.set_ylim(len(scenarios) - 0.5, -0.5)
        axes.set_yticks([])
        axes.grid(visible=True, axis="x")
        _plain(axes)
    left.set_xscale("log")
    left.set_xlim(LEAST_PCT * 0.8, 110)
    left.set_xticks([0.01, 0.1, 1, 10, 100], labels=["0.01 % or none", "0.1 %", "1 %", "10 %", "100 %"])
    left.minorticks_off()
    left.set_title("jobs past their deadline", fontsize=9.5, loc="left")
    right.set_title("harvest, of the oracle's bound", fontsize=9.5, loc="left")
    seen: dict[str, tuple[str, str]] = {}
    for place, name in enumerate(scenarios):
        left.text(-0.012, place, TITLES[name], transform=left.get_yaxis_transform(), ha="right", va="center")
        for number, (system, rows) in enumerate(by_system(raw.scores[name]).items()):
            seen[system] = LOOKS.get(system, (INK, "."))
            at = place + 0.34 * (2 * ((number * GOLDEN) % 1) - 1)
            _marks(left, at, [max(row.missed_pct, LEAST_PCT) for row in rows], pooled_missed_pct(rows), seen[system])
            middle = statistics.median(row.harvest for row in rows)
            _marks(right, at, [row.harvest for row in rows], middle, seen[system])
    _legend(figure, seen, 1 - 0.93 / height)
    return figure


def _marks(axes: Axes, at: float, values: list[float], middle: float, look: tuple[str, str]) -> None:
    colour, mark = look
    axes.scatter(values, [at] * len(values), s=14, color=colour, marker=mark, alpha=0.3, linewidths=0.8, zorder=3)
    shown = max(middle, LEAST_PCT)
    axes.scatter([shown], [at], s=34, color=colour, marker=mark, linewidths=1.2, zorder=4)


def _legend(figure: Figure, seen: dict[str, tuple[str, str]], top: float) -> None:
    """What a mark means: one after the other in a line."""
    axes = figure.add_axes((0.0, top - 0.012, 1.0, 0.03))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(-1, 1)
    left = 0.02
    for system, (colour, mark) in seen.items():
        axes.scatter([left], [0], s=34, color=colour, marker=mark)
        axes.text(left + 0.009, 0, system, fontsize=8.5, va="center")
        left += 0.03 + 0.0058 * len(system)


# -- what each part is worth -------------------------------------------------------------------------------------------


def _ablations(raw: Raw) -> Figure:
    """A row a part that is left out: waste by kind as a bar, harvest and missed jobs as numbers."""
    parts = {name.split()[1]: scores for name, scores in raw.scores.items() if name.startswith("ablations")}
    rows: list[tuple[str, str, list[Score]]] = [
        (name, system, found) for name, scores in parts.items() for system, found in by_system(scores).items()
    ]
    height = 1.7 + 0.36 * len(rows) + 0.3 * len(parts)
    figure = Figure(figsize=(11.6, height), facecolor="white")
    figure.text(0.015, 1 - 0.36 / height, "What each part of the policy is worth", fontsize=15, weight="bold")
    said = "bars: compute wasted, % of what was computed, median over runs"
    figure.text(0.015, 1 - 0.64 / height, said, fontsize=9, color=FAINT)
    axes = figure.add_axes((0.25, 0.4 / height, 0.45, (height - 1.5) / height))
    beside = axes.get_yaxis_transform()
    place, last, widest = 0.0, "", 1e-6
    for name, system, found in rows:
        if name != last:
            axes.text(
                -0.012, place, TITLES[name], transform=beside, ha="right", va="center", style="italic", color=FAINT
            )
            place, last = place + 0.8, name
        begin = 0.0
        for kind in WASTES:
            value = statistics.median(score.waste_pct(kind) for score in found)
            axes.barh(place, value, left=begin, height=0.6, color=WASTE_COLOURS[kind], label=kind)
            begin += value
        widest = max(widest, begin)
        axes.text(-0.012, place, system, transform=beside, ha="right", va="center")
        harvest = statistics.median(score.harvest for score in found)
        words = f"harvest {harvest:.4f}   missed {pooled_missed_pct(found):.2f} %"
        axes.text(1.02, place, words, transform=beside, va="center", fontsize=9)
        place += 1.0
    axes.set_ylim(place - 0.4, -0.6)
    axes.set_xlim(0.0, 1.04 * widest)
    axes.set_yticks([])
    axes.grid(visible=True, axis="x")
    _plain(axes)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    spot: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (0.0, 1.0),
        "borderaxespad": 0.2,
        "ncols": len(WASTES),
    }
    axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=8.5, **spot)
    return figure


# -- growth ------------------------------------------------------------------------------------------------------------

PULLED: Final = (
    ("plan_ms", "a plan, ms"),
    ("pull_us", "a pull, us"),
    ("nothing_us", "a pull in vain, us"),
    ("mb", "columns, MB"),
)
CURVES: Final = (
    ("vehicles", "vehicles", PULLED),
    ("jobs", "jobs in progress", PULLED),
    ("week", "vehicles for a week", (("cpu_s", "processor time, s"), ("peak_mb", "peak memory, MB"))),
)
COLOURS: Final = ("#0072B2", "#D55E00", "#CC79A7", "#009E73")


def _growth(points: list[Point]) -> Figure:
    """A panel for each thing that grows, both axes logarithmic."""
    figure = Figure(figsize=(11.6, 4.4), facecolor="white")
    figure.text(0.015, 0.93, "How time and memory grow", fontsize=15, weight="bold")
    for number, (axis, title, curves) in enumerate(CURVES):
        rows = sorted((point for point in points if point.axis == axis), key=lambda point: point.at)
        axes = figure.add_axes((0.06 + 0.325 * number, 0.14, 0.26, 0.65))
        axes.set_title(f"with {title}", fontsize=10, loc="left")
        axes.grid(visible=True)
        axes.spines[["top", "right"]].set_visible(False)
        if not rows:
            axes.set_axis_off()
            continue
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([row.at for row in rows], labels=[f"{row.at:,}" for row in rows])
        axes.minorticks_off()
        for colour, (name, label) in zip(COLOURS, curves, strict=False):
            values = [max(row.values[name], 1e-6) for row in rows]
            axes.plot([row.at for row in rows], values, color=colour, marker="o", markersize=4, label=label)
        axes.legend(frameon=False, fontsize=8.5)
    return figure


def main() -> None:
    """Draw the latest results."""
    folder = Path(sys.argv[1])
    for name, picture in pictures(msgspec.json.decode(RAW.read_bytes(), type=Raw)).items():
        (folder / f"cell_{name}.svg").write_bytes(picture)


if __name__ == "__main__":
    main()
