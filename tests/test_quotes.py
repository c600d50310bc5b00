"""What a cell learns of its fleet, and what it promises by it: nothing that it cannot keep, nothing without history."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec
import numpy as np
import openai
import pytest
from tests.cell_world import MODEL, World, a_world, chat, line, run
from tests.test_scheduler import report, started

from motorpool.core import events as ev
from motorpool.core.columns import NONE
from motorpool.core.scheduler import Scheduler
from motorpool.errors import CallerError
from motorpool.server import quotes
from motorpool.server.cell import ValidBatch
from motorpool.server.quotes import Fleet, Learner, Quotes, names_of
from motorpool.store.books import NO_TERMS, BatchTerms
from motorpool.store.database import Database
from motorpool.store.fleet_settings import read_learnt
from motorpool.types import Kind, VehicleState

T = TypeVar("T")
HOUR_MS = 3_600_000
START_MS = 1_767_571_200_000  # a Monday, 00:00 UTC
NIGHT = (*range(6), *range(20, 24))
SPEED = 50.0
VEHICLES = 10


class Cell:
    """A scheduler, books and a clock; what ``Quotes`` needs of the loop."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder / "cell.db")
        self.scheduler = Scheduler()
        self.now = START_MS

    @property
    def reader(self) -> sqlite3.Connection:
        return self.database.reader

    def now_ms(self) -> int:
        return self.now

    async def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        self.database.writer.execute("BEGIN IMMEDIATE")
        result = change(self.database.writer)
        self.database.writer.execute("COMMIT")
        return result


def fleet_at(scheduler: Scheduler, hour: int, seq: int, model: str = "m") -> None:
    """Ten cars that are ready at night and not by day; half of them have a measured speed."""
    state = VehicleState.READY if hour % 24 in NIGHT else VehicleState.DENIED
    for number in range(VEHICLES):
        scheduler.handle(report(f"v{number}", seq, state=state, region="DE", model=model), 0)
        v = scheduler.cell.find(f"v{number}")
        scheduler.cell.t.vehicles["speed"][v] = SPEED if number % 2 else 0.0
        scheduler.cell.k.recount(scheduler.cell.t, v)


def learnt(scheduler: Scheduler, days: int, model: str = "m", start_ms: int = START_MS) -> Learner:
    """After so many days of them, sampled every two minutes."""
    learner = Learner()
    for hour in range(24 * days + 1):
        fleet_at(scheduler, hour, hour + 1, model)
        for minute in range(0, 60, 2):
            now = start_ms + hour * HOUR_MS + minute * 60_000
            over = learner.sample(scheduler.cell, now)
            if over is not None and minute == 0:
                learner.learn(over, Fleet.of(scheduler.cell), names_of(scheduler.cell))
    return learner


@functools.cache
def two_weeks() -> bytes:
    """What is known after fifteen days."""
    return learnt(Scheduler(), 15).dump()


def valid(lines: int, tokens: int = 100, batch_no: int = 1, model: str = "m") -> ValidBatch:
    return ValidBatch(
        batch_no=batch_no,
        kind=Kind.CHAT,
        model=model,
        offsets=np.arange(lines, dtype=np.uint64) * 100,
        lengths=np.full(lines, 100, np.uint32),
        limits=np.full(lines, tokens, np.uint32),
    )


def test_the_hours_of_a_week_are_learnt_with_the_speed_of_those_that_are_not_measured() -> None:
    learner = Learner.load(two_weeks())
    assert learner.classes == [("m", "DE", 0)]
    bands = learner.forecast.bands(START_MS + 15 * 24 * HOUR_MS + HOUR_MS, 24)
    for column in range(24):
        hour = (1 + column) % 24
        assert bands.middle[0, column] == pytest.approx(VEHICLES * SPEED if hour in NIGHT else 0.0, rel=0.1, abs=20.0)
    assert bands.known.all()


def test_what_was_learnt_is_kept_and_anything_else_is_nothing() -> None:
    learner = learnt(Scheduler(), 3)
    learner.usual["m"] = 77.0
    again = Learner.load(learner.dump())
    now = START_MS + 80 * HOUR_MS
    assert again.classes == learner.classes
    assert again.usual == {"m": 77.0}
    assert again.last_hour == learner.last_hour
    assert again.dump() == learner.dump()
    assert np.array_equal(again.forecast.bands(now, 10).low, learner.forecast.bands(now, 10).low)
    for broken in (b"", b"nonsense", learner.dump()[:-9]):
        assert Learner.load(broken).classes == []


def test_an_hour_of_which_too_little_was_seen_teaches_nothing() -> None:
    scheduler, learner = Scheduler(), Learner()
    fleet_at(scheduler, 0, 1)
    for minute in range(quotes.MIN_SAMPLES - 1):
        assert learner.sample(scheduler.cell, START_MS + minute * 60_000) is None
    over = learner.sample(scheduler.cell, START_MS + HOUR_MS)
    assert over is not None
    assert not learner.learn(over, Fleet.of(scheduler.cell), names_of(scheduler.cell))


def test_vehicles_that_never_did_anything_are_not_taken_for_vehicles_that_can_do_nothing() -> None:
    scheduler, learner = Scheduler(), Learner()
    scheduler.handle(report("v1", 1, region="DE"), 0)
    for minute in range(60):
        learner.sample(scheduler.cell, START_MS + minute * 60_000)
    over = learner.sample(scheduler.cell, START_MS + HOUR_MS)
    assert over is not None
    assert not learner.learn(over, Fleet.of(scheduler.cell), names_of(scheduler.cell))
    assert learner.classes == []


def test_classes_are_bounded_and_those_left_out_are_promised_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotes, "MAX_CLASSES", 1)
    scheduler = Scheduler()
    for number, model in enumerate(("m", "n")):
        scheduler.handle(report(f"v{number}", 1, model=model), 0)
        v = scheduler.cell.find(f"v{number}")
        scheduler.cell.t.vehicles["speed"][v] = SPEED
    learner = Learner()
    for minute in range(61):
        over = learner.sample(scheduler.cell, START_MS + minute * 60_000)
    assert over is not None
    learner.learn(over, Fleet.of(scheduler.cell), names_of(scheduler.cell))
    assert learner.classes == [("m", "local", 0)]
    assert learner.overflowed == {"n"}


@pytest.fixture
def quoting(tmp_path: Path) -> tuple[Cell, Quotes]:
    cell = Cell(tmp_path)
    cell.now = START_MS + 15 * 24 * HOUR_MS + 8 * HOUR_MS  # in the morning: the cars are away
    asked = Quotes(cell)
    asked._learner = Learner.load(two_weeks())
    return cell, asked


def ask(
    cell: Cell, asked: Quotes, lines: int, hours: int, terms: BatchTerms = NO_TERMS, *, batch_no: int = 1
) -> BatchTerms:
    return asyncio.run(asked.admit(valid(lines, batch_no=batch_no), terms, cell.now + hours * HOUR_MS))


def test_what_the_night_can_do_is_promised_for_the_night(quoting: tuple[Cell, Quotes]) -> None:
    cell, asked = quoting
    terms = ask(cell, asked, 10_000, 24)  # a million tokens; the fleet does 1.8 million an hour
    assert terms.quote_known is True
    assert terms.promised_ms is not None
    assert cell.now + 12 * HOUR_MS < terms.promised_ms <= cell.now + 14 * HOUR_MS


def test_a_window_that_cannot_be_met_is_refused_with_the_soonest_that_can(quoting: tuple[Cell, Quotes]) -> None:
    cell, asked = quoting
    with pytest.raises(CallerError) as refused:
        ask(cell, asked, 10_000, 6)
    assert refused.value.code == quotes.REFUSED == "deadline_not_feasible"
    assert refused.value.param == "completion_window"
    assert "2026-01-20 2" in refused.value.message
    hours = int(refused.value.message.partition("completion_window of ")[2].partition("h")[0])
    assert 12 < hours <= 14
    assert ask(cell, asked, 10_000, hours).quote_known is True
    with pytest.raises(CallerError, match="nor within seven days"):
        ask(cell, asked, 50_000_000, 24, batch_no=2)


def test_what_was_promised_to_others_is_not_promised_again(quoting: tuple[Cell, Quotes]) -> None:
    cell, asked = quoting
    promised = 0
    for number in range(1, 60):
        try:
            ask(cell, asked, 10_000, 24, batch_no=number)
        except CallerError:
            break
        promised += 1
        asked.begun(number)
        cell.scheduler.handle(
            msgspec.structs.replace(
                started(10_000, number),
                expires_ms=cell.now + 24 * HOUR_MS,
                regions=(),
            ),
            0,
        )
    # Ten hours of the night at 1.8 million tokens, of which a tenth is kept back.
    assert 10 <= promised <= 17
    asked._book = None  # made anew from the scheduler, it says the same
    with pytest.raises(CallerError):
        ask(cell, asked, 10_000, 24, batch_no=99)


def test_without_history_or_without_a_promise_everything_is_admitted(quoting: tuple[Cell, Quotes]) -> None:
    cell, asked = quoting
    flex = BatchTerms(best_effort=True)
    assert ask(cell, asked, 50_000_000, 1, flex) == flex
    elsewhere = ask(cell, asked, 50_000_000, 1, BatchTerms(regions=("FR",)))
    assert elsewhere.quote_known is False
    assert elsewhere.promised_ms == cell.now + HOUR_MS
    assert ask(cell, asked, 50_000_000, 1, BatchTerms(min_trust=2)).quote_known is False
    fresh = Quotes(cell)
    assert ask(cell, fresh, 50_000_000, 1).quote_known is False


def test_an_hour_goes_into_the_books_and_comes_back_at_the_next_start(tmp_path: Path) -> None:
    cell = Cell(tmp_path)

    async def hours(count: int, asked: Quotes) -> None:
        for hour in range(count):
            fleet_at(cell.scheduler, hour, hour + 1)
            for _ in range(60):
                asked.on_tick()
                assert asked._task is not None
                await asked._task
                cell.now += 60_000

    first = Quotes(cell)
    first.restore()
    asyncio.run(hours(3, first))
    assert read_learnt(cell.reader, quotes.NAME) is not None
    second = Quotes(cell)
    second.restore()
    assert second._learner.last_hour == START_MS // HOUR_MS + 1
    assert second._learner.classes == [("m", "DE", 0)]


def client_of(world: World) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=world.api))
    return openai.AsyncOpenAI(base_url="http://cell/v1", api_key=world.key, http_client=http, max_retries=0)  # type: ignore[arg-type]


def test_openais_client_asks_reads_the_quote_and_the_refusal(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            now = world.now_ms()
            scheduler = Scheduler()
            start_ms = now // HOUR_MS * HOUR_MS - 15 * 24 * HOUR_MS
            world.cell.quotes._learner = learnt(scheduler, 15, MODEL, start_ms)
            client = client_of(world)
            data = b"".join(line(number, chat("hello", 50)) for number in range(3))
            file = await client.files.create(file=("in.jsonl", data), purpose="batch")
            ask = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            wishes = {"regions": ["DE"], "min_trust": 0, "priority": "standard"}
            made = await client.batches.create(**ask, extra_body={"motorpool": wishes})  # type: ignore[arg-type]
            await world.until(lambda: world.status(made.id) == "in_progress")
            extra = (await client.batches.retrieve(made.id)).motorpool  # type: ignore[attr-defined]
            assert (extra["regions"], extra["min_trust"], extra["priority"]) == (["DE"], 0, "standard")
            assert extra["quote"]["known"] is True
            assert now // 1000 <= extra["quote"]["finish_at"] <= now // 1000 + 86_400
            assert (await client.batches.list()).data[0].id == made.id

            world.cell.quotes._tokens = lambda batch: 10**9  # type: ignore[method-assign]
            refused = await client.batches.create(**ask)  # type: ignore[arg-type]
            await world.until(lambda: world.status(refused.id) == "failed")
            refused = await client.batches.retrieve(refused.id)
            assert refused.errors is not None
            assert refused.errors.data is not None
            (error,) = refused.errors.data
            assert (error.code, error.param, error.line) == ("deadline_not_feasible", "completion_window", None)
            why = (await world.operator.get(f"/v1/batches/{refused.id}/why")).json()
            assert why["words"] == "it was refused"
            assert why["errors"] == [error.message]

            flex = await client.batches.create(**ask, extra_body={"motorpool": {"priority": "flex"}})  # type: ignore[arg-type]
            await world.until(lambda: world.status(flex.id) == "in_progress")
            shown = (await client.batches.retrieve(flex.id)).motorpool  # type: ignore[attr-defined]
            assert (shown["priority"], shown["quote"]) == ("flex", None)
            wrongs: list[dict[str, object]] = [
                {"region": ["DE"]},
                {"regions": []},
                {"regions": ["D E"]},
                {"min_trust": 4},
                {"priority": "x"},
            ]
            for wrong in wrongs:
                with pytest.raises(openai.BadRequestError) as said:
                    await client.batches.create(**ask, extra_body={"motorpool": wrong})  # type: ignore[arg-type]
                assert str(said.value.param).startswith("motorpool")
            await client.close()

    run(test())


def test_a_vehicle_that_stands_by_is_in_a_class_and_one_that_is_gone_in_none() -> None:
    scheduler = Scheduler()
    scheduler.handle(report("v1", 1, region="DE"), 0)
    scheduler.handle(ev.VehicleConfigured(cause_id="o", vehicle_id="v1", site="", trust=2, reserve=False), 0)
    assert quotes.present(scheduler.cell) == {("m", "DE", 2): (1.0, 0.0, 0.0)}
    scheduler.handle(ev.VehicleRevoked(cause_id="o", vehicle_id="v1"), 1)
    assert quotes.present(scheduler.cell) == {}
    assert scheduler.cell.find("v1") == NONE
