"""What the parts of the cell's benchmark have in common: how large a run is, its progress, and what it has found.

Called by: ``bench.run_cell`` and the parts. Must not: measure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final

import msgspec
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import report
from bench.cell_worlds import WORK, Score, living
from bench.env import ROOT
from motorpool.sim.people import People

RAW: Final = WORK / "cell-raw.json"
CHILD_S: Final = 3_600.0
ONE_CORE: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """How large a run is. ``few``: made-up people, a few; ``fast``: compiled kernels."""

    vehicles: int = 5_000
    seeds: int = 5
    days: int | None = None
    few: bool = False
    fast: bool = True
    scenarios: tuple[str, ...] = ("s2", "s11", "s3", "s7", "s8", "s10", "s13", "s14")
    placements: int = 5_000_000
    single: int = 400_000
    index: int = 1_000_000
    by_vehicles: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    by_jobs: tuple[int, ...] = (10, 100, 1_000, 10_000)
    weeks: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    same_vehicles: int = 40
    every_user: int = 1
    rounds: int = 3


QUICK: Final = Size(
    vehicles=2_000,
    seeds=2,
    scenarios=("s2", "s11"),
    placements=500_000,
    single=50_000,
    index=100_000,
    by_vehicles=(1_000, 10_000),
    by_jobs=(10, 100, 1_000),
    weeks=(500, 2_000),
    same_vehicles=16,
    every_user=12,
    rounds=1,
)


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One place on a curve of growth: what grows and how far, and the values there."""

    axis: str
    at: int
    values: dict[str, float]


class Raw(msgspec.Struct, kw_only=True):
    """Everything that the pictures are drawn of."""

    scores: dict[str, list[Score]] = {}
    points: list[Point] = []


class NotMeasuredError(Exception):
    """A part could not be measured; the text says why, in one line."""


class Bench:
    """One run: what parts use and what they leave behind."""

    def __init__(self, size: Size, progress: Progress, steps: int) -> None:
        self.size = size
        self.raw = Raw()
        self.remarks: list[str] = []
        self.skipped: dict[str, str] = {}
        self._progress = progress
        self._task = progress.add_task("", total=float(max(steps, 1)))

    @cached_property
    def people(self) -> People:
        """Who lives in the worlds."""
        return living(few=self.size.few)

    @contextmanager
    def step(self, what: str) -> Iterator[Callable[[float], None]]:
        """One step of the work; what comes out hears how much of it is done, from 0 to 1."""
        self._progress.update(self._task, description=what)
        told = 0.0

        def tell(part: float) -> None:
            nonlocal told
            self._progress.advance(self._task, max(0.0, part - told))
            told = max(told, part)

        yield tell
        tell(1.0)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._progress.console.print(line, highlight=False)

    def keep(self, part: str, score: Score) -> Score:
        """Remember a run for the pictures."""
        self.raw.scores.setdefault(part, []).append(score)
        return score


def progress() -> Progress:
    """The bar, with the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )


def child(arguments: list[str], *, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What ``bench.cell_child`` answers, in a process of its own on one core. Raises NotMeasuredError."""
    env = os.environ | dict.fromkeys(ONE_CORE, "1") | (environment or {})
    command = [sys.executable, "-m", "bench.cell_child", *arguments]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=env, timeout=CHILD_S)
    except subprocess.TimeoutExpired as error:
        raise NotMeasuredError(f"{' '.join(arguments[:3])}: not done after {CHILD_S:.0f} s") from error
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        raise NotMeasuredError(f"{' '.join(arguments[:3])}: {said[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(name: str, unit: str, value: float, **more: Any) -> report.Figure:
    """A figure of one run."""
    samples = report.Samples(name, unit, less_is_better=bool(more.pop("less_is_better", False)))
    samples.add(report.OURS, value, note=more.pop("note", None))
    return samples.figure(**more)
