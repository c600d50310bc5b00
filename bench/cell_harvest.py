"""Parts: harvest, waste and missed deadlines beside oracle and baselines; what each part of the policy is worth.

Called by: ``bench.run_cell``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Final

from bench import report
from bench.cell_admission import HISTORY, AdmittingRun
from bench.cell_bench import Bench, Size
from bench.cell_worlds import NAMES, WASTES, Score, account, baseline, bound_of, build, load_scenario, ours
from bench.report import OURS
from motorpool.sim.fleet_gear import Switches
from motorpool.sim.world import World

MIXED: Final = "s1"
OVERLOAD: Final = "s11"
ADMITTING: Final = "Motorpool, admitting"
FIRST_HISTORY: Final = 1_000  # seeds of the weeks before; far from those of the worlds that are judged
TITLES: Final = {
    "s1": "mixed week, load 0.8 (S1)",
    "s2": "morning exodus (S2)",
    "s3": "locked and scarce (S3)",
    "s7": "flash crowd (S7)",
    "s8": "heat wave (S8)",
    "s9": "price shock (S9)",
    "s10": "holidays and a change of clocks (S10)",
    "s11": "overload 1.3 (S11)",
    "s13": "storm of training rounds (S13)",
    "s14": "vehicles feed the grid (S14)",
}
# The fleet gear has no such faults; the full gear has them, where results are checked and messages get lost.
NOT_HERE: Final = {
    "S4 brown-out": "the fleet gear draws outages of each vehicle, and none that hit many at once",
    "S5 control faults": "the fleet gear's cell never fails; `motorpool sim --faults` kills it",
    "S6 cheats": "the fleet gear has no results that could be checked",
}
MISSED_AIM_PCT: Final = {"s1": 0.05, "s2": 1.0}
ADMITTED_AIM_PCT: Final = 0.5
HARVEST_AIM: Final = 0.98
WASTED_AIM_PCT: Final = 0.3
ABLATIONS: Final = {
    "without streaming": Switches(streaming=False),
    "without forecast": Switches(forecast=False),
    "without measured speed": Switches(measured=False),
    "without revocation": Switches(revoke=False),
}


def harvest_steps(size: Size) -> int:
    """How many runs the part has."""
    systems = 2 + len(NAMES)  # the bound is one of them
    return size.seeds * (systems * (1 + len(size.scenarios)) + (OVERLOAD in size.scenarios))


def harvest(bench: Bench) -> list[report.Figure]:
    """All scenarios, all systems."""
    figures: list[report.Figure] = []
    for name in (MIXED, *bench.size.scenarios):
        scores = scenario_scores(bench, name)
        figures += mixed_figures(scores) if name == MIXED else []
        figures.append(missed_figure(name, scores))
    bench.skipped |= NOT_HERE
    bench.remarks.append(
        f"Worlds of {bench.size.vehicles:,} vehicles, {bench.size.seeds} seeds. Harvest is useful work as a part of "
        "min(U0, U2): what the fleet could do, and the most that a scheduler which knows the future could do of this "
        "work. Waste is a part of all that was computed; loading models computes nothing and stands apart."
    )
    return figures


def scenario_scores(bench: Bench, name: str) -> list[Score]:
    """All systems on the worlds of one scenario."""
    size = bench.size
    found = load_scenario(name, days=size.days if name != "s10" else None)
    title = TITLES.get(name, name)
    scores = []
    for seed in range(1, size.seeds + 1):
        with bench.step(f"{title}, seed {seed}: bound"):
            made = build(found, bench.people, size.vehicles, seed)
            bound = bound_of(made)
        with bench.step(f"{title}, seed {seed}: Motorpool") as tell:
            scores.append(bench.keep(name, ours(made, bound, fast=size.fast, tell=tell)))
        if name == OVERLOAD:
            with bench.step(f"{title}, seed {seed}: with admission") as tell:
                history = [
                    build(found, bench.people, size.vehicles, FIRST_HISTORY * seed + week) for week in range(HISTORY)
                ]
                scores.append(bench.keep(name, admitting(made, history, bound, fast=size.fast)))
                del history
        for policy in NAMES:
            with bench.step(f"{title}, seed {seed}: {NAMES[policy]}"):
                scores.append(bench.keep(name, baseline(made, policy, bound, fast=size.fast)))
        mine = scores[-len(NAMES) - 1 - (name == OVERLOAD)]
        bench.say(
            f"    {title}, seed {seed}: harvest {mine.harvest:.4f}, wasted {mine.wasted_pct:.3f} %, "
            f"missed {mine.missed} of {mine.jobs}"
        )
    return scores


def admitting(made: World, history: list[World], bound: float, *, fast: bool) -> Score:
    """Ours with admission: jobs that were refused are not missed, and stand apart."""
    run = AdmittingRun(made, history, fast=fast)
    found = account(made, run, run.run(), bound, system=ADMITTING)
    refused = run.refused
    tokens = made.jobs.tokens
    late = sum(1 for number in refused if run.arena.job_on_time[number] < made.jobs.lines[number])
    promised = made.jobs.kind == 0
    wanted = float(tokens[promised].sum())
    kept = promised.copy()
    kept[refused] = False
    lines = float(made.jobs.lines[kept].sum())
    return Score(
        **{
            name: getattr(found, name)
            for name in Score.__struct_fields__
            if name not in {"jobs", "missed", "refused", "refused_share", "lines_missed_share"}
        },
        jobs=found.jobs - len(refused),
        missed=found.missed - late,
        lines_missed_share=1.0 - float(run.arena.job_on_time[kept].sum()) / lines if lines > 0 else 0.0,
        refused=len(refused),
        refused_share=float(tokens[refused].sum()) / wanted if wanted > 0 else 0.0,
    )


# -- figures -----------------------------------------------------------------------------------------------------------


def by_system(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """The runs of each system, ours first."""
    found: dict[str, list[Score]] = {}
    for score in scores:
        found.setdefault(score.system, []).append(score)
    return found


def samples_of(scores: list[Score], name: str, unit: str, value: str, *, less: bool) -> report.Samples:
    """One value of all runs; ``value`` names an attribute of a score."""
    samples = report.Samples(name, unit, less_is_better=less)
    for score in scores:
        number = score.waste_pct(value) if value in WASTES else float(getattr(score, value))
        samples.add(score.system, number)
    if value == "harvest":  # systems differ in the fourth digit
        samples.notes |= {name: f"{statistics.median(found):.4f}" for name, found in samples.values.items()}
    return samples


def mixed_figures(scores: list[Score]) -> list[report.Figure]:
    """Harvest, waste by kind, and what loading models cost, of the mixed week."""
    title = TITLES[MIXED]
    samples = samples_of(scores, f"Harvest against min(U0, U2), {title}", "of the bound", "harvest", less=False)
    worst = min(score.harvest for score in scores if score.system == OURS)
    figures = [samples.figure(aim=f"{HARVEST_AIM:g} or more in each run", met=worst >= HARVEST_AIM)]
    samples = samples_of(scores, f"Compute wasted, {title}", "% of what was computed", "wasted_pct", less=True)
    worst = max(score.wasted_pct for score in scores if score.system == OURS)
    for system, rows in by_system(scores).items():
        parts = [f"{kind} {statistics.median(row.waste_pct(kind) for row in rows):.3f}" for kind in WASTES]
        samples.notes[system] = ", ".join(parts)
    figures.append(samples.figure(aim=f"under {WASTED_AIM_PCT:g} % in each run", met=worst < WASTED_AIM_PCT))
    samples = samples_of(scores, f"Not made while models were loaded, {title}", "% of U0", "switching_pct", less=True)
    figures.append(samples.figure())
    return figures


def missed_figure(name: str, scores: list[Score]) -> report.Figure:
    """Jobs past their deadline in one scenario, with harvest and waste beside them."""
    title = TITLES.get(name, name)
    samples = samples_of(scores, f"Jobs past their deadline, {title}", "%", "missed_pct", less=True)
    for system, rows in by_system(scores).items():
        note = f"harvest {statistics.median(row.harvest for row in rows):.4f}"
        note += f", wasted {statistics.median(row.wasted_pct for row in rows):.2f} %"
        note += f", lines {100 * statistics.median(row.lines_missed_share for row in rows):.2f} %"
        refused = sum(row.refused for row in rows)
        if refused:
            count = sum(row.refused + row.jobs for row in rows)
            share = statistics.median(row.refused_share for row in rows)
            note += f", refused {refused} of {count} jobs at hand-in, {100 * share:.0f} % of the work"
        samples.notes[system] = note
    aim, met = missed_aim(name, scores)
    return samples.figure(aim=aim, met=met)


def missed_aim(name: str, scores: list[Score]) -> tuple[str, bool]:
    """What was aimed at in a scenario, and whether it was reached."""
    rows = by_system(scores)
    mine = rows[ADMITTING] if name == OVERLOAD and ADMITTING in rows else rows[OURS]
    others = [system for system in rows if system not in {OURS, ADMITTING}]
    ahead = all(
        pooled_missed_pct(mine) <= pooled_missed_pct(rows[system])
        and statistics.median(row.harvest for row in rows[OURS])
        >= statistics.median(row.harvest for row in rows[system])
        for system in others
    )
    aim = "fewer than each baseline, and more harvest"
    if name == OVERLOAD:
        limit = ADMITTED_AIM_PCT
        aim = f"{limit:g} % of the admitted ones; {aim}"
        return aim, ahead and pooled_missed_pct(mine) <= limit
    if name in MISSED_AIM_PCT:
        limit = MISSED_AIM_PCT[name]
        return f"{limit:g} %; {aim}", ahead and pooled_missed_pct(mine) <= limit
    return aim, ahead


def pooled_missed_pct(rows: list[Score]) -> float:
    """Of all jobs of all runs: one job of one run is a smaller part of them than any aim."""
    jobs = sum(row.jobs + row.rounds for row in rows)
    return 100.0 * sum(row.missed + row.rounds_missed for row in rows) / jobs if jobs else 0.0


# -- ablations ---------------------------------------------------------------------------------------------------------


def ablation_steps(size: Size) -> int:
    """How many runs the part has."""
    return size.seeds * (2 + len(ABLATIONS)) * 2


def ablations(bench: Bench) -> list[report.Figure]:
    """The mixed week and the exodus without one thing each."""
    figures = []
    size = bench.size
    for name in (MIXED, "s2"):
        title = TITLES[name]
        found = load_scenario(name, days=size.days)
        scores: list[Score] = []
        for seed in range(1, size.seeds + 1):
            with bench.step(f"{title}, seed {seed}: bound"):
                made = build(found, bench.people, size.vehicles, seed)
                bound = bound_of(made)
            for system, switches in {OURS: Switches(), **ABLATIONS}.items():
                with bench.step(f"{title}, seed {seed}: {system}") as tell:
                    score = ours(made, bound, switches=switches, fast=size.fast, system=system, tell=tell)
                scores.append(bench.keep(f"ablations {name}", score))
        idle = without_effect(scores)
        for system in idle:
            bench.skipped[f"{title}: {system}"] = "every run is the same to the last bit with it and without it"
        scores = [score for score in scores if score.system not in idle]
        for label, unit, value, less in (
            ("Harvest", "of the bound", "harvest", False),
            ("Compute wasted", "% of what was computed", "wasted_pct", True),
            ("Jobs past their deadline", "%", "missed_pct", True),
        ):
            figures.append(samples_of(scores, f"{label} without one thing, {title}", unit, value, less=less).figure())
    return figures


def without_effect(scores: list[Score]) -> list[str]:
    """Systems of which every run is that of ours: what they leave out is not there."""
    rows = by_system(scores)
    mine = [score.digest for score in rows[OURS]]
    return [system for system, found in rows.items() if system != OURS and [score.digest for score in found] == mine]
