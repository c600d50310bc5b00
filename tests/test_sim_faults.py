"""Seeded worlds in which everything fails that can; and bugs planted on purpose, each of which the checks must find."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from click.testing import CliRunner

from motorpool import wire
from motorpool.cli.sim_faults import faults_command
from motorpool.core import events as ev
from motorpool.core import guard_rules
from motorpool.core.scheduler import Scheduler
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import Command, Event, FreezeEngine, PublishWork
from motorpool.sim.full import run as full_run
from motorpool.sim.full import vehicle as parts
from motorpool.sim.full.engine import SimEngine
from motorpool.sim.full.faults import ALL, Kind, make_plan
from motorpool.sim.full.run import World, run_seed
from motorpool.store import books
from motorpool.types import VehicleState

SEEDS: Final = int(os.environ.get("MOTORPOOL_SEEDS", "200"))
CHUNK: Final = 20
FEW: Final = range(1, 21)  # seeds among which a planted bug shows


@pytest.mark.parametrize("first", range(1, SEEDS + 1, CHUNK))
def test_every_promise_holds_whatever_fails(first: int) -> None:
    for seed in range(first, min(first + CHUNK, SEEDS + 1)):
        outcome = run_seed(seed)
        assert not outcome.broken, f"{outcome.detail}\nreplay it: {outcome.command}"
        assert sum(outcome.jobs.values()) > 0


def test_the_seeds_strike_with_every_kind_and_jobs_end_in_every_way() -> None:
    kinds: set[Kind] = set()
    for seed in range(1, 200):
        plan = make_plan(seed, [f"v{number}" for number in range(1, 7)], frozenset(ALL))
        kinds |= {fault.kind for fault in plan.faults}
        weather = plan.weather
        kinds |= {kind for kind in (Kind.DROPS, Kind.DOUBLES, Kind.DELAYS, Kind.REORDERS) if getattr(weather, kind)}
        kinds |= {Kind.LIARS} if plan.liars else set()
        kinds |= {Kind.CHEATS} if plan.cheats else set()
        kinds |= {Kind.FULL_SPOOLS} if plan.spool_bytes < 1_000 else set()
    assert kinds == set(ALL) - {Kind.POISON}  # which is a kind of line
    ends: dict[str, int] = {}
    for seed in range(1, 25):
        for status, count in run_seed(seed).jobs.items():
            ends[status] = ends.get(status, 0) + count
    assert set(ends) == {"completed", "cancelled", "expired"}


def test_leaving_one_kind_out_changes_nothing_else() -> None:
    names = ["v1", "v2", "v3"]
    for seed in range(1, 30):
        whole = make_plan(seed, names, frozenset(ALL))
        less = make_plan(seed, names, frozenset(ALL) - {Kind.PARTITIONS, Kind.DROPS})
        assert less.faults == tuple(fault for fault in whole.faults if fault.kind is not Kind.PARTITIONS)
        assert less.weather == msgspec.structs.replace(whole.weather, drops=0.0)
        assert (less.heal_ms, less.liars, less.skews_ms) == (whole.heal_ms, whole.liars, whole.skews_ms)


# -- the same again ----------------------------------------------------------------------------------------------------


def test_a_world_is_the_same_again_and_under_any_hash_seed() -> None:
    seeds = [2, 11, 29]
    here = [run_seed(seed).trace for seed in seeds]
    assert here == [run_seed(seed).trace for seed in seeds]
    code = f"from motorpool.sim.full.run import run_seed\nfor seed in {seeds}: print(run_seed(seed).trace)"
    for hash_seed in ("1", "4242"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.split() == here
    assert len(set(here)) == len(here)


# -- bugs planted on purpose -------------------------------------------------------------------------------------------


def found_by(
    kind: str,
    plant: Callable[[World], None] = lambda _: None,
    core: type[Scheduler] = Scheduler,
    without: tuple[Kind, ...] = (Kind.LIARS, Kind.CHEATS),
) -> full_run.Outcome:
    """The first seed of a few whose world breaks this promise; no world may break another one before."""
    for seed in FEW:
        outcome = run_seed(seed, None, without, new_scheduler=core, plant=plant)
        if outcome.broken:
            assert outcome.broken == kind, outcome.detail
            return outcome
    pytest.fail(f"nothing was found that breaks: {kind}")


class AcceptsTwice(Scheduler):
    """Takes every accepted line once more."""

    def handle(self, event: ev.SchedulerEvent, now_ms: int) -> list[ev.Command]:
        commands = super().handle(event, now_ms)
        return commands + [command for command in commands if isinstance(command, ev.SaveResults)]


class LeasesTwice(Scheduler):
    """Leases every line once more, to the same vehicle."""

    def handle(self, event: ev.SchedulerEvent, now_ms: int) -> list[ev.Command]:
        commands = super().handle(event, now_ms)
        again = [
            msgspec.structs.replace(each, lease_id=each.lease_id + "b")
            for each in commands
            if isinstance(each, ev.SaveLease)
        ]
        return [*commands, *again]


class BelievesStrangers(Scheduler):
    """Takes a result of one vehicle for another's."""

    def handle(self, event: ev.SchedulerEvent, now_ms: int) -> list[ev.Command]:
        return [
            msgspec.structs.replace(each, vehicle_id="v9") if isinstance(each, ev.SaveResults) else each
            for each in super().handle(event, now_ms)
        ]


class Overcharges(Scheduler):
    """Charges a millionth more than the lines cost."""

    def handle(self, event: ev.SchedulerEvent, now_ms: int) -> list[ev.Command]:
        return [self._dearer(each) for each in super().handle(event, now_ms)]

    def _dearer(self, command: ev.Command) -> ev.Command:
        if not isinstance(command, ev.PostTransfers):
            return command
        first, *rest = command.transfers
        return ev.PostTransfers(transfers=[msgspec.structs.replace(first, amount_micro=first.amount_micro + 1), *rest])


class PaysTwice(Scheduler):
    """Posts transfers under names that they had before."""

    def handle(self, event: ev.SchedulerEvent, now_ms: int) -> list[ev.Command]:
        commands = super().handle(event, now_ms)
        return commands + [each for each in commands if isinstance(each, ev.PostTransfers)]


class HearsPermits(Scheduler):
    """Takes every vehicle for permitted."""

    def handle(self, event: ev.SchedulerEvent, now_ms: int) -> list[ev.Command]:
        if isinstance(event, ev.VehicleReported):
            state = msgspec.structs.replace(event.state, state=VehicleState.READY, model="m", slots=2)
            event = msgspec.structs.replace(event, state=state)
        return super().handle(event, now_ms)


class ForgetsALine(Scheduler):
    """Never hears a result or a return of the first line of a job."""

    def handle(self, event: ev.SchedulerEvent, now_ms: int) -> list[ev.Command]:
        if isinstance(event, ev.ResultsArrived | ev.WorkReturned) and 0 in event.lines:
            return []
        return super().handle(event, now_ms)


class EndsEarly(Scheduler):
    """Has a job's files written when its first result comes."""

    def handle(self, event: ev.SchedulerEvent, now_ms: int) -> list[ev.Command]:
        commands = super().handle(event, now_ms)
        early = [ev.AssembleFiles(job_no=each.job_no) for each in commands if isinstance(each, ev.SaveResults)]
        return [*commands, *early[:1]]


class GivesUpSilently(Scheduler):
    """Ends a line without a reason."""

    def handle(self, event: ev.SchedulerEvent, now_ms: int) -> list[ev.Command]:
        commands = super().handle(event, now_ms)
        return [
            ev.SaveFailures(job_no=each.job_no, lines=each.lines[:1], code="", message="")
            if isinstance(each, ev.SaveHeld)
            else each
            for each in commands
        ]


class IsInconsistent(Scheduler):
    """Breaks its own invariants after a while."""

    calls = 0

    def validate(self) -> None:
        super().validate()
        self.calls += 1
        assert self.calls < 5, "planted"


@pytest.mark.parametrize(
    ("core", "kind"),
    [
        (AcceptsTwice, "a line counts twice"),
        (LeasesTwice, "a line has too many holders"),
        (BelievesStrangers, "a result of a vehicle that never held the line"),
        (Overcharges, "a customer was charged something else"),
        (PaysTwice, "a transfer is posted twice"),
        (HearsPermits, "work for a vehicle without a permit"),
        (EndsEarly, "a job ends before its lines"),
        (GivesUpSilently, "a line was given up without a reason"),
        (IsInconsistent, "AssertionError in test_sim_faults.validate"),
    ],
)
def test_a_bug_in_the_core_is_found(core: type[Scheduler], kind: str) -> None:
    outcome = found_by(kind, core=core)
    assert outcome.at_ms > 0
    assert outcome.command.startswith(f"motorpool sim faults --seed {outcome.seed} --vehicles {outcome.vehicles}")
    assert outcome.story


def test_a_line_that_is_forgotten_is_found_when_the_world_has_healed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_run, "MAX_AFTER_MS", 240_000)
    found_by("a job does not end", core=ForgetsALine)


def test_an_engine_that_is_not_frozen_is_found() -> None:
    def deaf(world: World) -> None:
        for vehicle in world.vehicles.values():
            vehicle._perform[FreezeEngine] = lambda _: None
            vehicle.engine.freeze = lambda: None  # type: ignore[method-assign]

    found_by("computing without a permit", deaf)


def test_a_guard_that_does_not_see_doors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("doors_shut", "doors_locked"):
        monkeypatch.setitem(guard_rules.RULES, name, lambda _look, _reasons: None)
    outcome = next(each for each in map(run_seed, FEW) if each.broken)
    assert outcome.broken in {"the owner: a door is open", "the owner: unlocked"}


def test_a_machine_that_says_things_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Repeats(VehicleMachine):
        def handle(self, event: Event, now_ms: int) -> list[Command]:
            commands = super().handle(event, now_ms)
            return commands + [each for each in commands if isinstance(each, PublishWork)]

    monkeypatch.setattr(parts, "VehicleMachine", Repeats)
    found_by("a line of a lease ends twice")


def test_an_engine_that_outlives_its_hung_agent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimEngine, "go_unheard", lambda _: None)
    found_by("computing without a permit")


def test_tokens_that_are_billed_and_not_delivered_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = SimEngine._finished

    def overstated(self: SimEngine, run: Any) -> Any:
        done = finish(self, run)
        usage = msgspec.structs.replace(done.usage, completion_tokens=done.usage.completion_tokens + 1)
        return msgspec.structs.replace(done, usage=usage)

    monkeypatch.setattr(SimEngine, "_finished", overstated)
    found_by("tokens billed are not tokens delivered")


def test_an_answer_that_goes_on_at_the_wrong_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = wire.decode_checkpoint
    engine = sys.modules["motorpool.sim.full.engine"]

    def loses_a_letter(data: bytes) -> wire.Checkpoint:
        found = decode(data)
        return msgspec.structs.replace(found, text=found.text[1:])

    monkeypatch.setattr(engine, "decode_checkpoint", loses_a_letter)
    found_by("an answer is not the right one")


@pytest.mark.parametrize(
    ("module", "name", "kind"),
    [
        (books, "insert_results", "the books lost or made a line"),
        (books, "post_transfers", "the books lost or made a transfer"),
        (books, "drop_lease", "a lease outlives its job"),
    ],
)
def test_books_that_lose_something_are_found(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, kind: str
) -> None:
    monkeypatch.setattr(module, name, lambda *_: None)
    crashes = (Kind.LIARS, Kind.CHEATS, Kind.CELL_CRASHES, Kind.FULL_DISKS)
    found_by(kind, without=crashes)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_how_many_worlds_and_what_they_came_to() -> None:
    result = CliRunner().invoke(faults_command, ["--seeds", "3"], standalone_mode=False)
    assert result.return_value == 0, result.output
    assert "3 worlds" in result.stdout
    assert "No promise was broken." in result.stdout
    as_json = CliRunner().invoke(faults_command, ["--seed", "2", "--json"], standalone_mode=False)
    found = msgspec.json.decode(as_json.stdout)
    assert (found["worlds"], found["broken"]) == (1, [])
    assert found["traces"] == {"2": run_seed(2).trace}


def test_the_command_shrinks_a_failure_and_prints_what_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VehicleMachine, "will_freeze", lambda *_: False)
    monkeypatch.setattr(SimEngine, "freeze", lambda _: None)
    result = CliRunner().invoke(faults_command, ["--seeds", "12"], standalone_mode=False)
    assert result.return_value == 1, result.output
    assert "computing without a permit" in result.stdout
    command = next(line.split() for line in result.stdout.splitlines() if "motorpool sim faults --seed" in line)
    again = CliRunner().invoke(faults_command, [*command[3:], "--no-shrink"], standalone_mode=False)
    assert again.return_value == 1
    assert "computing without a permit" in again.stdout
    assert "--without" in command


def test_no_file_of_a_world_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_seed(3)
    assert list(tmp_path.iterdir()) == []
