"""Draws every trial of the yield benchmark on a logarithmic axis of time, beside what two peers document.

Must not: write a date or anything random into the file: the same trials are the same bytes. Called by:
``bench.run_yield``, and ``python -m bench.yield_plot FILE.svg`` (or ``.png``) to draw the latest trials again.
"""

from __future__ import annotations

import statistics
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bench import report
from bench.env import BENCH
from bench.yield_scenes import ALONE, FREED, MANY, SCENES, STALE, STANDS, Scene, percentile

# Okabe and Ito's colours, which people of every colour vision can tell apart; the rows are named as well.
COLOURS = {STANDS: "#0072B2", FREED: "#009E73", ALONE: "#D55E00", STALE: "#CC79A7"}
HEADINGS = {
    STANDS: "until the engine stands still",
    FREED: "until its memory is free",
    ALONE: "until it is gone, like its agent",
    STALE: "until it stands still, without signals",
}
# What each is given at most: waiting for the next look, then to leave, then to be killed. Not measured.
PEERS = (
    ("BOINC", "looks once a second", (1_000.0,)),
    ("HTCondor", "looks every 5 s, then 600 s to leave, then 30 s", (5_000.0, 605_000.0, 635_000.0)),
)
SHADES = ("#E4E7EB", "#C9CED3", "#9AA5B1")
INK, FAINT = "#1F2933", "#616E7C"
FROM_MS, TO_MS = 0.5, 1_000_000.0
TICKS = {1: "1 ms", 10: "10 ms", 100: "100 ms", 1_000: "1 s", 10_000: "10 s", 100_000: "100 s", 1_000_000: "1,000 s"}
SPREAD = 0.29  # of the dots of a row, up and down
GOLDEN = 0.6180339887  # steps by it fall evenly over a row, whatever their number, without chance
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "motorpool",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#9AA5B1",
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "xtick.labelsize": 8.5,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.7,
}


def draw(values: dict[str, list[float]], *, png: bool = False) -> bytes:
    """The picture as the bytes of an SVG or PNG file: one row for each scene that was measured, then the peers."""
    scenes = [scene for scene in SCENES if values.get(scene.key)]
    with mpl.rc_context(STYLE):
        height = 1.6 + 0.43 * (len(scenes) + len(PEERS) + 1)
        figure = Figure(figsize=(11.6, height), facecolor="white")
        axes = figure.add_axes((0.245, 0.35 / height, 0.6, (height - 1.39) / height))
        figure.text(0.015, 1 - 0.36 / height, "How long an owner waits for the engine", fontsize=15, weight="bold")
        said = "every dot is one trial; the thick tick is the median, the dotted line the aim"
        figure.text(0.015, 1 - 0.64 / height, said, fontsize=9, color=FAINT)
        _legend(figure, scenes, 1 - 0.93 / height)
        _axis(axes, len(scenes) + len(PEERS) + 1)
        for place, scene in enumerate(scenes):
            told = place > 0 and scenes[place - 1].aim_ms == scene.aim_ms
            _row(axes, place, scene, values[scene.key], aim="" if told else f"aim {_time(scene.aim_ms)}")
        for place, (name, words, bounds) in enumerate(PEERS, len(scenes) + 1):
            _peer(axes, place, name, words, bounds)
        axes.text(
            -0.012,
            len(scenes) + 0.12,
            "documented, not measured:",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            color=FAINT,
            fontsize=8.5,
            style="italic",
        )
        file = BytesIO()
        if png:
            figure.savefig(file, format="png", dpi=110)
        else:
            figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def _legend(figure: Figure, scenes: list[Scene], top: float) -> None:
    """What a colour means."""
    left = 0.0165
    for kind in dict.fromkeys(scene.kind for scene in scenes):
        figure.text(left, top, "●", color=COLOURS[kind], fontsize=10)
        figure.text(left + 0.0145, top, HEADINGS[kind], fontsize=9)
        left += 0.0265 + 0.0061 * len(HEADINGS[kind])


def _axis(axes: Axes, rows: int) -> None:
    axes.set_xscale("log")
    axes.set_xlim(FROM_MS, TO_MS)
    axes.set_ylim(rows - 0.5, -0.65)
    axes.set_xticks(list(TICKS), labels=list(TICKS.values()))
    axes.minorticks_off()
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.grid(visible=True, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _row(axes: Axes, place: int, scene: Scene, values: list[float], *, aim: str) -> None:
    """One scene: its dots, its median, its aim, and the numbers beside it."""
    colour = COLOURS[scene.kind]
    heights = [place + SPREAD * (2 * ((number * GOLDEN) % 1) - 1) for number in range(len(values))]
    axes.scatter(sorted(values), heights, s=11, color=colour, alpha=0.5, linewidths=0, zorder=3)
    median = statistics.median(values)
    axes.plot([median, median], [place - 0.36, place + 0.36], color=INK, linewidth=2.2, zorder=4)
    axes.plot([scene.aim_ms, scene.aim_ms], [place - 0.44, place + 0.44], color=INK, linewidth=1.3, linestyle=":")
    beside = axes.get_yaxis_transform()
    axes.text(-0.012, place, scene.label, transform=beside, ha="right", va="center")
    p99 = f"{'p99' if len(values) >= MANY else 'highest'} {_time(percentile(values, 0.99))}"
    axes.text(1.012, place - 0.19, p99, transform=beside, va="center", weight="bold", color=colour)
    axes.text(1.012, place + 0.21, f"{len(values)} trials", transform=beside, va="center", fontsize=8, color=FAINT)
    axes.text(scene.aim_ms * 1.09, place - 0.3, aim, va="center", fontsize=8.5)


def _peer(axes: Axes, place: int, name: str, words: str, bounds: tuple[float, ...]) -> None:
    """From now to what a peer documents: each stretch of waiting in a shade of its own."""
    left = FROM_MS
    for right, shade in zip(bounds, SHADES[: len(bounds)], strict=True):
        axes.add_patch(Rectangle((left, place - 0.24), right - left, 0.48, color=shade, linewidth=0, zorder=2))
        left = right
    beside = axes.get_yaxis_transform()
    axes.text(-0.012, place, name, transform=beside, ha="right", va="center")
    axes.text(0.012, place, words, transform=beside, va="center", fontsize=8.5, zorder=4)
    axes.text(1.012, place, f"up to {_time(bounds[-1])}", transform=beside, va="center", weight="bold", color=FAINT)


def _time(value_ms: float) -> str:
    """Three digits, in the unit that fits."""
    return f"{value_ms:.3g} ms" if value_ms < 1_000 else f"{report.number(value_ms / 1000)} s"


def main() -> None:
    """Draw the latest trials."""
    trials = BENCH / ".work" / "yield-trials.json"
    path = Path(sys.argv[1])
    values = msgspec.json.decode(trials.read_bytes(), type=dict[str, list[float]])
    path.write_bytes(draw(values, png=path.suffix == ".png"))


if __name__ == "__main__":
    main()
