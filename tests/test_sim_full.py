"""The parts of the full gear one by one: time and chance, network and stream, engine, and a fleet for some hours."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, Final

import msgspec
import pytest
from bench import cell_full
from click.testing import CliRunner

from motorpool.agent.runtime.engine import Died, EngineEvent, Finished, Progressed, Ready
from motorpool.bus import DUPLICATE_WINDOW_S, REDELIVER_AFTER_S
from motorpool.cli.sim_faults import run_command
from motorpool.core.scheduler import Scheduler
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import Attempt, Command, Event, PublishWork
from motorpool.sim import generator
from motorpool.sim.full import vehicle as parts
from motorpool.sim.full.checks import InvariantError
from motorpool.sim.full.clock import Clock, Draws, Trace
from motorpool.sim.full.engine import EngineSpec, SimEngine
from motorpool.sim.full.network import Network, StreamMessage, Weather
from motorpool.sim.full.week import Week, WeekSpec, WeekWorld
from motorpool.sim.full.work import Fate, Line, answer_body, answer_text
from motorpool.sim.people import People
from motorpool.types import Kind
from motorpool.wire import Checkpoint, encode_checkpoint

SMALL: Final = WeekSpec(vehicles=3, days=0.15, load=1.0, job_lines=100, tick_ms=15_000, check_every=50)


@pytest.fixture(scope="module")
def people() -> People:
    return generator.people(0, (8, 0, 0), 8)


# -- time and chance ---------------------------------------------------------------------------------------------------


def test_what_was_asked_for_first_comes_first_and_nothing_comes_before_its_time() -> None:
    clock, seen = Clock(1_000), []
    clock.at(5_000, lambda: seen.append(("b", clock.now_ms)))
    clock.at(2_000, lambda: seen.append(("a", clock.now_ms)))
    clock.at(5_000, lambda: seen.append(("c", clock.now_ms)))
    clock.at(500, lambda: seen.append(("late", clock.now_ms)))
    clock.run(4_999)
    assert seen == [("late", 1_000), ("a", 2_000)]
    assert clock.now_ms == 4_999
    clock.run(5_000)
    assert seen[2:] == [("b", 5_000), ("c", 5_000)]


def test_a_stream_of_draws_depends_on_its_names_alone() -> None:
    one, same, other = Draws(7, "x"), Draws(7, "x"), Draws(7, "y")
    drawn = [one.bits() for _ in range(100)]
    assert drawn == [same.bits() for _ in range(100)]
    assert drawn != [other.bits() for _ in range(100)]
    share = sum(Draws("share", number).chance(0.3) for number in range(4_000)) / 4_000
    assert 0.27 < share < 0.33
    assert {Draws("below", number).below(3) for number in range(50)} == {0, 1, 2}
    assert not any(one.chance(0.0) for _ in range(10))


def test_a_trace_tells_runs_apart() -> None:
    traces = [Trace(2) for _ in range(3)]
    for number, trace in enumerate(traces):
        trace.add(1, "a")
        trace.add(2, "b", b"x" if number < 2 else b"y")
    assert traces[0].digest() == traces[1].digest() != traces[2].digest()
    assert traces[0].tail == ["1 a", "2 b"]


# -- network -----------------------------------------------------------------------------------------------------------


class Wire:
    """A network between one vehicle and a cell that writes down what arrives."""

    def __init__(self, weather: Weather | None = None) -> None:
        self.clock = Clock(0)
        self.network = Network(self.clock, 1, weather or Weather())
        self.at_vehicle: list[bytes] = []
        self.at_cell: list[bytes] = []
        self.work: list[StreamMessage] = []
        self.confirmed: list[str] = []
        self.links: list[bool] = []
        ends = self.network.ends
        ends.to_vehicle = lambda _, data: self.at_vehicle.append(data)
        ends.to_cell = lambda _, data: self.at_cell.append(data)
        ends.work_to_cell = self.work.append
        ends.confirmed = lambda _, message_ids: self.confirmed.extend(message_ids)
        ends.link = lambda _, up: self.links.append(up)
        self.network.connect("v1")
        self.clock.run(1_000)


def test_in_fine_weather_everything_arrives_once_and_in_order() -> None:
    wire = Wire()
    sent = [b"%d" % number for number in range(200)]
    for data in sent:
        wire.network.down("v1", data)
        wire.network.up("v1", data)
    wire.clock.run(60_000)
    assert wire.at_vehicle == wire.at_cell == sent
    assert wire.links == [True]


@pytest.mark.parametrize(
    ("weather", "least", "most", "in_order"),
    [
        (Weather(drops=0.5), 60, 140, True),
        (Weather(doubles=0.5), 260, 340, False),
        (Weather(reorders=1.0, delays=0.5), 200, 200, False),
        (Weather(delays=0.5), 200, 200, True),
    ],
)
def test_bad_weather_does_what_it_says(weather: Weather, least: int, most: int, in_order: bool) -> None:
    wire = Wire(weather)
    for number in range(200):
        wire.network.up("v1", b"%03d" % number)
    wire.clock.run(60_000)
    assert least <= len(wire.at_cell) <= most
    assert (wire.at_cell == sorted(wire.at_cell)) == in_order


def test_a_cut_off_vehicle_hears_nothing_and_its_client_notices() -> None:
    wire = Wire()
    wire.network.down("v1", b"on its way")
    wire.network.cut("v1")
    wire.network.down("v1", b"lost")
    wire.clock.run(5_000)
    assert (wire.at_vehicle, wire.links) == ([], [True, False])
    wire.network.cut("v1")
    wire.network.mend("v1")
    wire.clock.run(6_000)
    assert not wire.network.connected("v1"), "one of two reasons is left"
    wire.network.mend("v1")
    wire.clock.run(7_000)
    assert wire.links == [True, False, True]


def test_the_stream_keeps_work_until_it_is_acknowledged() -> None:
    wire = Wire()
    wire.network.publish("v1", "a", b"1")
    wire.network.publish("v1", "a", b"1")
    wire.clock.run(2_000)
    assert wire.confirmed == ["a", "a"]
    assert wire.work == []
    wire.network.stream.read(reading=True)
    wire.clock.run(3_000)
    assert [message.data for message in wire.work] == [b"1"]
    wire.clock.run(3_000 + REDELIVER_AFTER_S * 1_000)
    assert len(wire.work) == 2
    wire.network.stream.read(reading=True)  # the cell has died and come back
    wire.clock.run(wire.clock.now_ms + 100)
    assert len(wire.work) == 3
    wire.network.stream.acknowledge(wire.work[-1])
    wire.clock.run(wire.clock.now_ms + 200_000)
    assert (len(wire.work), len(wire.network.stream)) == (3, 0)
    assert wire.clock.now_ms > DUPLICATE_WINDOW_S * 1_000
    wire.network.publish("v1", "a", b"1")  # so late that the stream has forgotten the id
    wire.clock.run(wire.clock.now_ms + 100)
    assert len(wire.work) == 4


# -- engine ------------------------------------------------------------------------------------------------------------


class Bench:
    """An engine alone."""

    def __init__(self, **spec: Any) -> None:
        self.clock = Clock(0)
        self.events: list[EngineEvent] = []
        self.stretches: list[tuple[int, int]] = []
        settings = {"slots": 2, "tokens_s": 10.0, "load_ms": 1_000, "report_ms": 100, **spec}
        self.engine = SimEngine(self.clock, EngineSpec(**settings), self, self.events.extend)
        self.engine.start("m")

    def computed(self, from_ms: int, to_ms: int) -> None:
        self.stretches.append((from_ms, to_ms))

    def submit(self, *lines: Line, checkpoint: bytes | None = None) -> None:
        self.engine.submit(
            [
                Attempt(
                    key=f"k{line.line}",
                    kind=Kind.CHAT,
                    body=msgspec.json.encode(line),
                    response_id="r",
                    checkpoint=checkpoint,
                )
                for line in lines
            ]
        )

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def test_an_engine_runs_as_many_attempts_as_it_has_slots() -> None:
    bench = Bench()
    bench.clock.run(1_000)
    assert len(bench.of(Ready)) == 1
    bench.submit(*(Line(1, number, 0, 10) for number in range(4)))
    bench.clock.run(1_950)
    assert bench.of(Finished) == []
    bench.clock.run(2_100)
    assert [event.key for event in bench.of(Finished)] == ["k0", "k1"]
    bench.clock.run(3_200)
    assert [event.key for event in bench.of(Finished)] == ["k0", "k1", "k2", "k3"]
    text = answer_text(1, 3, 10)
    assert bench.of(Finished)[3].body == answer_body(Line(1, 3, 0, 10), text)
    grown = "".join(delta.text for event in bench.of(Progressed) if event.key == "k3" for delta in event.deltas)
    assert text.startswith(grown)
    assert grown


def test_a_continued_answer_is_the_same_as_an_unbroken_one() -> None:
    bench = Bench()
    text = answer_text(1, 0, 30)
    bench.clock.run(1_000)
    checkpoint = Checkpoint(text=text[:12], tokens=12, token_ids=[ord(letter) for letter in text[:12]])
    bench.submit(Line(1, 0, 0, 30), checkpoint=encode_checkpoint(checkpoint))
    bench.clock.run(10_000)
    done = bench.of(Finished)[0]
    assert done.body == answer_body(Line(1, 0, 0, 30), text)
    assert (done.usage.completion_tokens, done.usage.carried_tokens) == (30, 12)


def test_a_frozen_engine_computes_nothing_and_goes_on_where_it_was() -> None:
    bench = Bench()
    bench.clock.run(1_000)
    bench.submit(Line(1, 0, 0, 20))
    bench.clock.run(1_500)
    bench.engine.freeze()
    bench.clock.run(9_000)
    assert max(to_ms for _, to_ms in bench.stretches) == 1_500
    bench.engine.thaw()
    bench.clock.run(10_400)
    assert bench.of(Finished) == []
    bench.clock.run(10_700)
    assert len(bench.of(Finished)) == 1
    assert bench.engine.worked_ms() == 1_000 + 2_000


def test_an_engine_that_is_killed_says_nothing_more_and_a_poisoned_one_dies() -> None:
    bench = Bench()
    bench.clock.run(1_000)
    bench.submit(Line(1, 0, 0, 20))
    bench.engine.kill()
    before = list(bench.events)
    bench.clock.run(20_000)
    assert bench.events == before
    bench.engine.start("m")
    bench.clock.run(22_000)
    bench.submit(Line(1, 1, 0, 20, Fate.POISON))
    bench.clock.run(23_000)
    assert [type(event) for event in bench.events[len(before) :]] == [Ready, Died]


# -- a fleet -----------------------------------------------------------------------------------------------------------


def plain(week: Week) -> dict[str, Any]:
    return dict(msgspec.to_builtins(msgspec.structs.replace(week, seconds=0.0)))


def test_a_fleet_works_for_half_a_day_and_everything_adds_up(people: People) -> None:
    world = WeekWorld(SMALL, people)
    shares: list[float] = []
    week = world.live(shares.append)
    assert shares[-1] == 1.0
    assert week.done > 50
    assert week.doubled == 0
    assert 0 < week.harvest <= 1.02
    assert 0 <= week.waste < 0.2
    assert week.useful_slot_h <= week.worked_slot_h <= week.permitted_slot_h * 1.001
    completed = sum(counts[1] + counts[2] for counts in world.books.lines.values())
    assert completed == week.done == sum(world.books.done_by.values())
    assert week.earned_micro == sum(world.books.earned_micro.values()) > 0
    assert world.books.paid_micro * 7 // 10 - week.earned_micro < week.done + 1


def test_a_fleet_is_the_same_again_under_any_hash_seed(people: People) -> None:
    spec = msgspec.structs.replace(SMALL, vehicles=2, days=0.1)
    week = plain(WeekWorld(spec, people).live())
    code = (
        "import sys, msgspec\n"
        "from motorpool.sim import generator\n"
        "from motorpool.sim.full.week import WeekSpec, WeekWorld\n"
        "spec = msgspec.json.decode(sys.argv[1], type=WeekSpec)\n"
        "print(WeekWorld(spec, generator.people(0, (8, 0, 0), 8)).live().trace)\n"
    )
    for hash_seed in ("1", "4242"):
        found = subprocess.run(
            [sys.executable, "-c", code, msgspec.json.encode(spec).decode()],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.split() == [week["trace"]]
    other = plain(WeekWorld(msgspec.structs.replace(spec, seed=1), people).live())
    assert other["trace"] != week["trace"]


def test_the_command_prints_a_table_and_json() -> None:
    options = ["--vehicles", "2", "--days", "0.1"]
    shown = CliRunner().invoke(run_command, options, standalone_mode=False)
    assert shown.return_value == 0, shown.output
    assert "lines done" in shown.stdout
    assert "harvest" in shown.stdout
    as_json = CliRunner().invoke(run_command, [*options, "--json"], standalone_mode=False)
    found = msgspec.json.decode(as_json.stdout)
    assert found["vehicles"] == 2
    assert found["trace"] in shown.stdout


# -- what makes a long world quick, and changes nothing in it ----------------------------------------------------------


def test_where_every_message_takes_the_same_time_confirmations_of_a_moment_arrive_together() -> None:
    wire = Wire(Weather(quick_ms=(5, 5)))
    heard: list[list[str]] = []
    wire.network.ends.confirmed = lambda _, message_ids: heard.append(message_ids)
    for name in ("a", "b"):
        wire.network.publish("v1", name, b"1")
    wire.clock.run(2_000)
    wire.network.publish("v1", "c", b"1")
    wire.clock.run(3_000)
    assert heard == [["a", "b"], ["c"]]
    wire.network.cut("v1")
    wire.network.publish("v1", "d", b"1")
    wire.network.down("v1", b"lost")
    wire.clock.run(9_000)
    assert len(heard) == 2
    assert wire.at_vehicle == []


def test_the_server_knows_who_has_a_link() -> None:
    wire = Wire()
    told: list[tuple[str, bool]] = []
    wire.network.ends.linked = lambda name, up: told.append((name, up))
    wire.network.leave("v1")
    wire.network.leave("v1")
    wire.network.connect("v1")
    wire.clock.run(3_000)
    wire.network.cut("v1")
    wire.clock.run(9_000)
    assert told == [("v1", False), ("v1", True), ("v1", False)]


def test_a_terse_engine_tells_when_a_slot_is_free_and_before_anything_stops_it() -> None:
    bench = Bench(terse=True, report_ms=60_000)
    bench.clock.run(1_000)
    bench.submit(*(Line(1, number, 0, 10) for number in range(4)))  # a second each, two at a time
    bench.clock.run(2_500)
    assert bench.of(Finished) == []
    bench.clock.run(3_000)
    assert [event.key for event in bench.of(Finished)] == ["k0", "k1", "k2", "k3"]
    bench.submit(Line(1, 4, 0, 100), Line(1, 5, 0, 5), Line(1, 6, 0, 100))
    bench.clock.run(3_400)
    bench.engine.tell()
    assert len(bench.of(Finished)) == 4, "nothing is new"
    bench.clock.run(3_600)
    bench.engine.tell()
    assert [event.key for event in bench.of(Finished)[4:]] == ["k5"]
    bench.engine.freeze()
    bench.clock.run(200_000)
    assert len(bench.of(Finished)) == 5


class WatchesTheHungry(Scheduler):
    """Whoever is left out when all are filled would have got nothing."""

    left_out = 0

    def _hungry(self, now_ms: int) -> list[int]:
        found = super()._hungry(now_ms)
        for v in set(self.cell.ids) - set(found):
            if self.cell.k.why_not(self.cell.t, v, now_ms) == 0:
                assert int(self.cell.k.pull(self.cell.t, v, now_ms, self.cell.out)) == -1
                type(self).left_out += 1
        return found


def test_nobody_is_left_out_who_would_get_lines(people: People) -> None:
    world = WeekWorld(SMALL, people, new_scheduler=WatchesTheHungry)
    week = world.live()
    assert week.done > 50
    assert WatchesTheHungry.left_out > 50


def test_a_vehicle_with_a_link_is_heard_without_a_word_and_one_that_sleeps_falls_silent(people: People) -> None:
    world = WeekWorld(SMALL, people)
    reports: list[int] = []
    hear = world.cell.on_state

    def heard(name: str, data: bytes) -> None:
        reports.append(world.clock.now_ms)
        hear(name, data)

    world.network.ends.to_cell = heard
    offline: list[bool] = []

    def look() -> None:
        for name, vehicle in world.vehicles.items():
            known = world.cell.scheduler.vehicles.get(name)
            if known is not None and known.state is not None:
                offline.append(known.offline)
                awake = vehicle.alive and world.network.connected(name)
                assert not (awake and known.offline), "it has a link"
        world.clock.after(60_000, look)

    world.clock.after(3_600_000, look)
    world.live()
    awake_min = offline.count(False)
    assert awake_min > 100
    assert len(reports) < awake_min, "less than one report a minute"
    world.vehicles["v000000"].wake_up()
    known = world.cell.scheduler.vehicles["v000000"]
    world.clock.run(world.clock.now_ms + 60_000)
    assert not known.offline
    world.vehicles["v000000"].sleep()
    world.clock.run(world.clock.now_ms + 60_000)
    assert known.offline


def test_jobs_that_have_ended_are_forgotten(people: People) -> None:
    world = WeekWorld(msgspec.structs.replace(SMALL, job_lines=20, load=0.5), people)
    week = world.live()
    ended = sum(count for status, count in week.jobs.items() if status == "completed")
    assert ended > 1
    assert len(world.cell.jobs) < len(world.books.lines) == len(world.tally.ended_jobs) + len(world.cell.jobs)
    assert len(world.tally._done) + ended * 20 <= week.done + 20
    assert all(len(held) <= 8 for held in world.tally._held.values())


def test_a_machine_that_says_things_twice_is_found_in_a_long_world(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Repeats(VehicleMachine):
        def handle(self, event: Event, now_ms: int) -> list[Command]:
            commands = super().handle(event, now_ms)
            return commands + [each for each in commands if isinstance(each, PublishWork)]

    monkeypatch.setattr(parts, "VehicleMachine", Repeats)
    with pytest.raises(InvariantError, match="lines that it does not hold"):
        WeekWorld(SMALL, people).live()


def test_the_benchmark_counts_the_time_of_a_fleet(people: People) -> None:
    found = cell_full.run(2, 0.1, people)
    assert found["cpu_s"] > 0
    assert found["lines"] > 0
    assert found["plugged_h"] > 1
    assert found["trace"] == cell_full.run(2, 0.1, people)["trace"]
