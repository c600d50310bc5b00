"""What the cell's benchmark concludes from its runs, on worlds that are small enough to need no compiler.

One test compiles the kernels of the fleet gear, about two minutes where their sources are new.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bench import (
    cell_admission,
    cell_bench,
    cell_harvest,
    cell_oracle,
    cell_outlook,
    cell_same,
    cell_speed,
    cell_worlds,
    report,
)
from bench.cell_bench import Point, Raw
from bench.cell_child import digest
from bench.cell_worlds import Score

from motorpool.core.columns import NONE
from motorpool.sim.people import People
from motorpool.sim.world import World


@pytest.fixture(scope="module")
def made_up() -> People:
    return cell_worlds.living(few=True)


@pytest.fixture(scope="module")
def little(made_up: People) -> World:
    found = cell_worlds.load_scenario("s1", days=1)
    streams = tuple(
        msgspec.structs.replace(stream, jobs=12, deadlines_h=(1.0, 4.0), deadline_weights=(1.0, 1.0))
        for stream in found.streams
    )
    return cell_worlds.build(msgspec.structs.replace(found, streams=streams, load=0.5), made_up, 12, 5)


def score(system: str = report.OURS, seed: int = 1, **values: Any) -> Score:
    usual: dict[str, Any] = {
        "bound": 1000.0,
        "available": 2000.0,
        "useful": 990.0,
        "lost": 4.0,
        "doubled": 3.0,
        "late": 2.0,
        "rejected": 1.0,
        "whole": 0.0,
        "switching": 20.0,
        "jobs": 100,
        "missed": 0,
        "lines_missed_share": 0.0,
        "digest": "a",
    }
    return Score(system=system, seed=seed, **(usual | values))


# -- accounts ----------------------------------------------------------------------------------------------------------


def test_waste_is_of_what_was_computed_and_harvest_of_the_bound() -> None:
    one = score()
    assert one.harvest == pytest.approx(0.99)
    assert one.computed == 1000.0
    assert one.wasted_pct == pytest.approx(1.0)
    assert sum(one.waste_pct(kind) for kind in cell_worlds.WASTES) == pytest.approx(one.wasted_pct)
    assert one.switching_pct == pytest.approx(1.0)
    cut = score(whole=1000.0)
    assert sum(cut.waste_pct(kind) for kind in cell_worlds.WASTES) == pytest.approx(cut.wasted_pct)


def test_rounds_count_as_jobs_and_a_world_without_any_misses_none() -> None:
    assert score(missed=1, rounds=100, rounds_missed=3).missed_pct == pytest.approx(2.0)
    assert score(jobs=0).missed_pct == 0.0
    assert cell_harvest.pooled_missed_pct([score(missed=1), score(jobs=300)]) == pytest.approx(0.25)


def test_every_system_is_reckoned_on_the_same_world(little: World) -> None:
    bound = cell_worlds.bound_of(little)
    ours = cell_worlds.ours(little, bound, fast=False)
    assert 0.0 < ours.harvest <= 1.0
    assert ours.jobs == int((little.jobs.kind == 0).sum()) > 0
    for policy in ("edf", "boinc"):
        other = cell_worlds.baseline(little, policy, bound, fast=False)
        assert other.available == pytest.approx(ours.available)
        assert (other.bound, other.jobs) == (ours.bound, ours.jobs)
        assert 0.0 < other.harvest <= 1.0
        assert other.system == cell_worlds.NAMES[policy]


def test_people_are_made_again_when_a_file_of_sessions_changes(tmp_path: Path) -> None:
    file = tmp_path / "sessions.csv"
    file.write_text("one")
    before = cell_worlds._mark([file])
    assert before == cell_worlds._mark([tmp_path / "sessions.csv"])
    file.write_text("another")
    assert before != cell_worlds._mark([file])


def test_named_sessions_come_before_those_beside_the_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cell_worlds.VARIABLE, f"{tmp_path}:{tmp_path / 'a.csv'}")
    assert cell_worlds.recordings() == [tmp_path, tmp_path / "a.csv"]
    monkeypatch.delenv(cell_worlds.VARIABLE)
    monkeypatch.setattr(cell_worlds, "DATA", tmp_path / "none")
    assert cell_worlds.recordings() == []


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_one_bad_run_misses_the_aim_of_harvest_and_waste() -> None:
    good = [score(useful=999.0, lost=0.5, doubled=0.0, late=0.5, rejected=0.0, seed=seed) for seed in range(4)]
    others = [score(system="FIFO", seed=seed) for seed in range(4)]
    harvest, wasted, switching = cell_harvest.mixed_figures([*good, *others])
    assert (harvest.met, wasted.met, switching.met) == (True, True, None)
    assert harvest.peers == {"FIFO": 0.99}
    assert wasted.notes[report.OURS] == "lost 0.050, doubled 0.000, late 0.050, rejected 0.000"
    harvest, wasted, _ = cell_harvest.mixed_figures([*good, score(useful=970.0, lost=30.0)])
    assert (harvest.met, wasted.met) == (False, False)


def test_misses_are_judged_over_all_runs_and_against_every_baseline() -> None:
    ours = [score(missed=0), score(missed=1, jobs=9_900, seed=2)]
    behind = [score(system="FIFO", missed=5, useful=900.0)] * 2
    assert cell_harvest.missed_aim("s1", [*ours, *behind])[1]
    ahead = [score(system="random", missed=0, useful=900.0)] * 2
    assert not cell_harvest.missed_aim("s1", [*ours, *behind, *ahead])[1]
    richer = [score(system="random", missed=9, useful=995.0)] * 2
    assert not cell_harvest.missed_aim("s1", [*ours, *richer])[1]
    assert not cell_harvest.missed_aim("s1", [score(missed=1), *behind])[1]


def test_under_overload_the_admitted_jobs_count() -> None:
    ours = [score(missed=30)]
    fifo = [score(system="FIFO", missed=50, useful=900.0)]
    admitting = [score(system=cell_harvest.ADMITTING, missed=0, jobs=70, refused=30, refused_share=0.25)]
    figure = cell_harvest.missed_figure("s11", [*ours, *admitting, *fifo])
    assert figure.met is True
    assert "refused 30 of 100 jobs at hand-in, 25 % of the work" in figure.notes[cell_harvest.ADMITTING]
    late = [msgspec.structs.replace(admitting[0], missed=1)]
    assert cell_harvest.missed_figure("s11", [*ours, *late, *fifo]).met is False


def test_a_switch_that_changes_no_bit_is_found() -> None:
    same = [score(seed=1), score(seed=2, digest="b")]
    idle = [score("idle", 1), score("idle", 2, digest="b")]
    other = [score("other", 1), score("other", 2, digest="c")]
    assert cell_harvest.without_effect([*same, *idle, *other]) == ["idle"]


def test_a_differing_run_is_named_and_a_world_without_work_is_no_comparison() -> None:
    found = {name: {"digest": "a", "events": 5, "grants": 2} for name in ("compiled", "plain")}
    assert cell_same.same_figure(found).met is True
    found["plain"] = found["plain"] | {"digest": "b"}
    figure = cell_same.same_figure(found)
    assert (figure.met, figure.ours) == (False, 1.0)
    assert figure.notes[report.OURS] == "differ: plain"
    with pytest.raises(cell_bench.NotMeasuredError, match="no work"):
        cell_same.same_figure({"compiled": {"digest": "a", "events": 5, "grants": 0}})


def test_coverage_is_over_all_questions() -> None:
    kept = np.array([[1.0, 2.0, 0.0, 0.0]] * 9)
    broken = np.array([[3.0, 2.0, 0.0, 0.0]])
    figure = cell_outlook.stay_figure([kept, broken])
    assert (figure.ours, figure.met, figure.counts[report.OURS]) == (0.9, True, 10)
    assert cell_outlook.stay_figure([kept]).met is False


# -- admission ---------------------------------------------------------------------------------------------------------


def test_classes_say_who_may_run_what(little: World) -> None:
    classes = cell_admission.Classes.of(little)
    of_vehicle = classes.of_vehicles(little)
    for number in range(len(little.jobs)):
        may = classes.eligible[classes.kind[number]][of_vehicle]
        for v in range(len(little)):
            jobs = little.jobs
            fits = bool(int(jobs.region_mask[number]) >> int(little.region[v]) & 1)
            fits &= bool(int(little.on_disk[v]) >> int(jobs.model[number]) & 1)
            fits &= bool(little.trust[v] >= jobs.min_trust[number] and little.memory_gb[v] >= jobs.memory_gb[number])
            assert bool(may[v]) == fits


def test_capacity_by_class_is_that_of_the_fleet(little: World) -> None:
    classes = cell_admission.Classes.of(little)
    tokens_s, ready = cell_admission.hourly(little, classes)
    assert float(tokens_s.sum()) * 3600.0 == pytest.approx(cell_oracle.u0(little), rel=1e-5)
    hours = float((little.end_ms - little.start_ms).sum()) / 3.6e6
    assert float(ready.sum()) == pytest.approx(hours, rel=1e-5)


def test_a_fleet_that_is_foretold_nothing_refuses_everything(little: World) -> None:
    idle = msgspec.structs.replace(little, speed=np.full(len(little), 1e-6, np.float32))
    run = cell_admission.AdmittingRun(little, [idle] * 2, fast=False)
    run._hourly = cell_admission.hourly(idle, run._classes)  # and sees nothing better on the way
    run.run()
    assert len(run.refused) == int((little.jobs.kind == 0).sum())


# -- speed and memory --------------------------------------------------------------------------------------------------


def test_placing_and_pulling_leave_the_cell_as_it_was() -> None:
    cell = cell_speed.fleet_of(300, 20, fast=False)
    here = cell_speed.asking(cell)
    assert 0 < len(here) < 150
    loop, rows = cell_speed.loops(fast=False), cell_speed.rows_of(cell)
    assert len(rows) == 20
    loop.plan_many(cell.t, rows, 1)
    before = cell_speed.jobs_waiting(cell)[rows]
    assert loop.pull_many(cell.t, here, 60, cell.out) > 0
    assert (cell_speed.jobs_waiting(cell)[rows] == before).all()
    assert (cell.t.vehicles["lease"] == NONE).all()
    ring = np.full(10, NONE, np.int64)
    assert loop.place_many(cell.t, 3, 4, 100, ring, np.zeros(0, np.int64)) == 100
    assert int(cell.t.vehicles["live"].sum()) == 10
    assert set(ring) <= set(here)


def test_growth_measures_each_thing_once_a_round() -> None:
    found = cell_speed.grown_to(100, 10, 2, fast=False)
    assert set(found) == {"plan_ms", "pull_us", "nothing_us", "mb"}
    assert all(len(values) == 2 and min(values) >= 0.0 for values in found.values())


def test_memory_is_what_the_tables_hold() -> None:
    cell, parts = cell_speed.filled(200)
    assert len({cell_speed.id_of(number) for number in range(200)}) == 200
    assert sum(value for name, value in parts.items() if name != "empty rows") * 200 == pytest.approx(cell.nbytes)
    assert int((cell.t.leases["number"] != NONE).sum()) == 60
    assert 0.0 <= parts["empty rows"] < parts["vehicles"] + parts["leases"]


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_the_same_results_are_the_same_pictures() -> None:
    pytest.importorskip("matplotlib")
    from bench.cell_plot import CAPTIONS, pictures  # noqa: PLC0415

    runs = [score(), score(missed=2, seed=2), score(system="FIFO", missed=30, useful=900.0)]
    values = {"plan_ms": 0.1, "pull_us": 1.0, "nothing_us": 2.0, "mb": 3.0, "cpu_s": 1.0, "peak_mb": 200.0}
    points = [Point(axis=axis, at=at, values=values) for axis in ("vehicles", "jobs", "week") for at in (10, 100)]
    raw = Raw(scores={"s1": runs, "s2": runs, "ablations s1": runs}, points=points)
    drawn = pictures(raw)
    assert drawn == pictures(raw)
    assert set(drawn) == set(CAPTIONS)
    assert pictures(Raw()) == {}


# -- the same to the last bit ------------------------------------------------------------------------------------------


def test_a_run_is_the_same_again(made_up: People) -> None:
    first = digest(8, 6, made_up, fast=False)
    assert first["grants"] > 0
    assert first == digest(8, 6, made_up, fast=False)


def test_compiled_kernels_give_the_same_run_to_the_last_bit(made_up: People) -> None:
    pytest.importorskip("numba")
    assert digest(8, 6, made_up, fast=True) == digest(8, 6, made_up, fast=False)


def test_compiled_code_does_not_outlive_a_change_of_a_file_that_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import run_cell  # noqa: PLC0415

    assert "motorpool" in sys.modules
    before = run_cell.own_cache()
    assert before == run_cell.own_cache()
    monkeypatch.setattr(run_cell, "SOURCES", run_cell.SOURCES[:1])
    assert before != run_cell.own_cache()
