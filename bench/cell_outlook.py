"""Parts: how often cars stay as long as they said they would, and what waiting for cheaper hours saves.

Called by: ``bench.run_cell``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from bench import report
from bench.cell_bench import Bench, Size
from bench.cell_worlds import recordings
from bench.env import ROOT
from bench.report import OURS
from motorpool.sim import timing

TOOLS: Final = ROOT / "tools"
COVERED: Final = (0.89, 0.91)
LOADS: Final = {0.4: 25.0, 0.7: 5.0}  # load, and the saving that is aimed at, in %
SAVING_SEEDS: Final = 5
REPORTS: Final = "dataset1"


# -- stays -------------------------------------------------------------------------------------------------------------


def stay_steps(size: Size) -> int:
    """Steps of the part."""
    del size
    return 2


def tool() -> ModuleType:
    """``tools/departures_check.py``, which is a program and no package."""
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    return importlib.import_module("departures_check")


def reports() -> Path | None:
    """The file of sessions at private chargers, if there is one."""
    for path in recordings():
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            if REPORTS in file.name.lower():
                return file
    return None


def stays(bench: Bench) -> list[report.Figure]:
    """The fleet's table is fitted to one half of the users and tested on the other half, both ways round."""
    path = reports()
    if path is None:
        bench.skipped["stays"] = "no recorded sessions: name the Norwegian reports"
        return []
    check = tool()
    stays_of = check.load_stays(path)
    names = list(stays_of)[:: bench.size.every_user]
    halves = [{name: stays_of[name] for name in names[part::2]} for part in (0, 1)]
    answers: list[Any] = []
    for part in (0, 1):
        with bench.step(f"stays: half {part + 1} of 2"):
            fleet = check.fit_fleet(check.train_part(halves[part]))
            answers += check.ask(halves[1 - part], fleet)
    return [stay_figure(answers)]


def stay_figure(answers: list[Any]) -> report.Figure:
    """Coverage over all questions; the spread is over users with many of them."""
    bound, rest = np.concatenate(answers)[:, :2].T
    coverage = float((rest >= bound).mean())
    own = [float((user[:, 1] >= user[:, 0]).mean()) for user in answers if len(user) >= 200] or [coverage]
    low, high = np.quantile(own, (0.1, 0.9))
    samples = report.Samples("Cars that stay as long as they said with 90 %, users not fitted to", "of the questions")
    samples.add(
        OURS,
        coverage,
        count=len(bound),
        note=f"bound {bound.mean():.2f} h on average; the middle 80 % of users {low:.2f} to {high:.2f}",
    )
    least, most = COVERED
    return samples.figure(aim=f"{least:g} to {most:g}", met=least <= coverage <= most)


# -- energy ------------------------------------------------------------------------------------------------------------


def energy_steps(size: Size) -> int:
    """Steps of the part."""
    return len(LOADS) * min(size.seeds, SAVING_SEEDS)


def energy(bench: Bench) -> list[report.Figure]:
    """Cost of the same jobs by the rule, and by a solver that knows the future, against as soon as possible."""
    figures = []
    for load, aim_pct in LOADS.items():
        samples = report.Samples(f"Energy cost against as soon as possible, load {load:g}", "%", less_is_better=True)
        late = 0.0
        for seed in range(1, min(bench.size.seeds, SAVING_SEEDS) + 1):
            with bench.step(f"energy: load {load:g}, seed {seed}"):
                found = timing.measure(load, seed)
            samples.add(OURS, -100.0 * found.rule_saving)
            samples.add("everything known beforehand", -100.0 * found.lp_saving, note="a bound, no policy")
            late = max(late, 100.0 * found.rule_late / found.tokens)
        samples.notes[OURS] = f"late {late:.3f} % of the work at most"
        median = samples.median(OURS) or 0.0
        figures.append(samples.figure(aim=f"-{aim_pct:g} %", met=median <= -aim_pct))
    bench.remarks.append(
        "Energy: made-up prices of eight regions and 200 jobs with 2 to 24 hours to spare (`sim/timing.py`), with the "
        "product's rule; not yet the fleet gear."
    )
    return figures
