"""The worlds of the cell's benchmark, and one account of what every system makes of them.

Decides: which people live in them, and how a run of ours and one of a baseline become the same numbers. Must not: hold
a policy. Called by: ``bench.run_cell`` and the parts of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from bench import cell_baselines as baselines
from bench import cell_oracle as oracle
from bench.env import BENCH, ROOT
from bench.report import OURS
from motorpool.sim import generator, people, scenario, world
from motorpool.sim.arrivals import BATCH, ROUND
from motorpool.sim.fleet_gear import Switches
from motorpool.sim.fleet_run import FleetRun, Outcome
from motorpool.sim.people import People
from motorpool.sim.scenario import Scenario
from motorpool.sim.world import World

WORK: Final = BENCH / ".work"
DATA: Final = ROOT.parent / "shared" / "data"
VARIABLE: Final = "MOTORPOOL_SESSIONS"
BOULDER: Final = "boulder_public*.csv"
# What makes people of sessions: a change of it makes them anew.
MAKERS: Final = ("sim/people.py", "sim/recordings.py", "agent/signals/sessions.py", "core/departures.py")
FEW_USERS: Final = (18, 8, 8)
FEW_WEEKS: Final = 14
WASTES: Final = ("lost", "doubled", "late", "rejected")
Tell = Callable[[float], None]


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """What one system made of one world. Work in tokens.

    ``bound``: the least of U0 and U2. ``rejected``: finished and refused by a check of results. ``whole``: work that
    counts as a whole or not at all, and was cut off. ``switching``: what could have been made while models were loaded;
    nothing was computed then, so it is no waste of energy. ``jobs`` have a deadline, ``missed`` were not whole at it;
    a job that was refused at hand-in is neither. ``rounds`` want a quorum of units.
    """

    system: str
    seed: int
    bound: float
    available: float
    useful: float
    lost: float
    doubled: float
    late: float
    rejected: float
    whole: float
    switching: float
    jobs: int
    missed: int
    lines_missed_share: float
    refused: int = 0
    refused_share: float = 0.0
    rounds: int = 0
    rounds_missed: int = 0
    cost_micro: float = 0.0
    digest: str = ""

    @property
    def harvest(self) -> float:
        """Useful work as a part of what the best scheduler could do, which knows the future."""
        return self.useful / self.bound if self.bound > 0 else 0.0

    @property
    def computed(self) -> float:
        """All that vehicles did."""
        return self.useful + self.lost + self.doubled + self.late + self.rejected + self.whole

    @property
    def wasted_pct(self) -> float:
        """What of it was for nothing."""
        return 100.0 * (1.0 - self.useful / self.computed) if self.computed > 0 else 0.0

    @property
    def missed_pct(self) -> float:
        """Jobs and rounds that were not done at their deadline."""
        count = self.jobs + self.rounds
        return 100.0 * (self.missed + self.rounds_missed) / count if count else 0.0

    @property
    def switching_pct(self) -> float:
        """Of all that the fleet could do."""
        return 100.0 * self.switching / self.available if self.available > 0 else 0.0

    def waste_pct(self, name: str) -> float:
        """One kind of waste, as a part of all that was computed."""
        value = float(getattr(self, name)) + (self.whole if name == "lost" else 0.0)
        return 100.0 * value / self.computed if self.computed > 0 else 0.0


# -- people ------------------------------------------------------------------------------------------------------------


def recordings() -> list[Path]:
    """Recorded sessions: what the variable names, else the files beside the project, else none."""
    named = os.environ.get(VARIABLE, "")
    if named:
        return [Path(name) for name in named.split(os.pathsep) if name]
    if not DATA.is_dir():
        return []
    return [DATA, *sorted(DATA.glob(BOULDER))]


def living(*, few: bool = False) -> People:
    """The people, kept on disk between runs because their vehicles take a while to learn. ``few``: made-up ones."""
    if few:
        return generator.people(seed=3, users=FEW_USERS, weeks=FEW_WEEKS)
    found = recordings()
    if not found:
        return generator.people(seed=1)
    kept = WORK / f"people-{_mark(found)}.npz"
    if not kept.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        # Only one process makes them at a time, and a half-written file has another name.
        made = kept.with_suffix(".new")
        people.save(people.read(found), made)
        made.replace(kept)
    return people.load(kept)


def _mark(paths: list[Path]) -> str:
    """Of the files and of the code that reads them."""
    mark = hashlib.sha256()
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            mark.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    for name in MAKERS:
        mark.update((ROOT / "src" / "motorpool" / name).read_bytes())
    return mark.hexdigest()[:16]


# -- worlds ------------------------------------------------------------------------------------------------------------


def load_scenario(name: str, *, load: float | None = None, days: int | None = None) -> Scenario:
    """A scenario of the package, with another load or length."""
    found = scenario.load(name)
    if load is not None:
        found = msgspec.structs.replace(found, load=load)
    if days is not None:
        found = msgspec.structs.replace(found, days=days)
    return found


def build(found: Scenario, living_people: People, vehicles: int, seed: int) -> World:
    """A world."""
    return world.build(found, living_people, vehicles, seed)


def bound_of(made: World) -> float:
    """min(U0, U2), tokens."""
    return min(oracle.u0(made), oracle.u2(oracle.problem(made)))


# -- accounts ----------------------------------------------------------------------------------------------------------


def ours(
    made: World,
    bound: float,
    *,
    switches: Switches | None = None,
    fast: bool = True,
    system: str = OURS,
    tell: Tell | None = None,
) -> Score:
    """A run of the fleet gear, which is the production kernels."""
    run = FleetRun(made, switches=switches, fast=fast)
    outcome = run.run(tell)
    return account(made, run, outcome, bound, system=system)


def account(made: World, run: FleetRun, outcome: Outcome, bound: float, *, system: str = OURS) -> Score:
    """The numbers of a run."""
    jobs, done = made.jobs, run.arena.job_on_time
    rounds = jobs.kind == ROUND
    enough = np.ceil(jobs.lines * (jobs.quorum_pct / 100.0))
    promised = jobs.kind == BATCH
    return Score(
        system=system,
        seed=made.seed,
        bound=bound,
        available=outcome.available,
        useful=outcome.useful,
        lost=outcome.lost,
        doubled=outcome.doubled,
        late=outcome.late,
        rejected=0.0,
        whole=outcome.failed_whole,
        switching=outcome.switching,
        jobs=int(promised.sum()),
        missed=int((promised & (done < jobs.lines)).sum()),
        lines_missed_share=outcome.lines_missed_share,
        rounds=int(rounds.sum()),
        rounds_missed=int((rounds & (done < enough)).sum()),
        cost_micro=outcome.cost_micro,
        digest=outcome.digest,
    )


def baseline(made: World, policy: str, bound: float, *, fast: bool = True) -> Score:
    """A run of another policy on the same world."""
    found = baselines.run(made, policy, fast=fast)
    return Score(
        system=NAMES[policy],
        seed=made.seed,
        bound=bound,
        available=found.available,
        useful=found.useful,
        lost=found.lost,
        doubled=found.doubled,
        late=found.late,
        rejected=found.rejected,
        whole=0.0,
        switching=found.switching,
        jobs=found.jobs,
        missed=found.jobs_missed,
        lines_missed_share=found.lines_missed_share,
        rounds=found.rounds,
        rounds_missed=found.rounds_missed,
        cost_micro=found.cost_micro,
    )


NAMES: Final = {
    "random": "random",
    "fifo": "FIFO",
    "fifo_streaming": "FIFO, streaming",
    "htcondor": "HTCondor-like",
    "boinc": "BOINC-like",
    "edf": "earliest deadline first",
}
assert set(NAMES) == set(baselines.POLICIES), "every baseline has a name"
