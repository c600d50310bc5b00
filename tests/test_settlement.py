"""Fractions of a millionth: jobs cost their price and owners get their part of it, in any order, through any crash."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import cell_world
from tests.cell_world import MODEL, a_world, chat, run
from tests.test_scheduler import LIMIT_TOKENS, results, started

from motorpool import wire
from motorpool.catalogue import Catalogue, Model
from motorpool.core import events as ev
from motorpool.core.ledger import Rests, customer, job, owner
from motorpool.core.pricing import ATTO_PER_MICRO, Price, Shares, cost_atto, split_atto
from motorpool.core.scheduler import Scheduler
from motorpool.store import books
from motorpool.store.database import Database
from motorpool.types import Usage

CHEAP = Price(input_micro=5_000, output_micro=7, owner_share_bp=6_999)  # 200 tokens of a prompt are a millionth
VEHICLES = ("v1", "v2", "v3")
GONE = "v4"  # it generated the first tokens of some lines
LINES = 12


class Line(msgspec.Struct, frozen=True):
    """What a line of the job turns out to be."""

    prompt: int
    completion: int
    carried: int


lines = st.builds(
    lambda prompt, completion, carried: Line(prompt, completion, min(carried, completion)),
    st.integers(0, 400), st.integers(0, LIMIT_TOKENS), st.integers(0, LIMIT_TOKENS),
)  # fmt: skip
messages = st.lists(
    st.tuples(st.sampled_from(VEHICLES), st.sets(st.integers(0, LINES - 1), min_size=1), st.booleans()), max_size=20
)


class Cell:
    """A scheduler and what it has committed; a crash loses the rest of it."""

    def __init__(self, job_lines: list[Line]) -> None:
        self.lines = job_lines
        self.costs: dict[int, int] = {}
        self.made_by: dict[int, str] = {}
        self.rests: dict[str, int] = {}
        self.balance: Counter[str] = Counter()
        self.transfers: set[str] = set()
        self.ended = False
        self.start()

    def start(self) -> None:
        self.scheduler = Scheduler()
        self.scheduler.rests.restore(self.rests.items())
        if self.ended:
            return
        shares: dict[int, Shares] = {n: [(GONE, line.carried)] for n, line in enumerate(self.lines) if line.carried}
        self.scheduler.restore_job(
            msgspec.structs.replace(started(LINES, expires_ms=10**12), price=CHEAP),
            done=np.array(sorted(self.costs), dtype=np.int64), carried=shares,
            checkpoint_bytes=dict.fromkeys(shares, 1), held=dict.fromkeys(range(LINES), VEHICLES), cancelling_ms=None,
        )  # fmt: skip
        self.scheduler.resume(0, settled_ms=0)

    def hear(self, vehicle: str, numbers: list[int], *, crash: bool) -> None:
        """Results arrive; in a crash nothing that came of them is kept."""
        picked = [self.lines[number] for number in numbers]
        event = results(
            vehicle, "l", numbers,
            prompt_tokens=[line.prompt for line in picked], completion_tokens=[line.completion for line in picked],
            carried_tokens=[line.carried for line in picked],
        )  # fmt: skip
        commands = self.scheduler.handle(event, 1)
        if crash:
            self.start()
            return
        for command in commands:
            if isinstance(command, ev.SaveResults):
                for place, cost in zip(command.picks, command.costs_micro, strict=True):
                    assert event.lines[place] not in self.costs
                    self.costs[event.lines[place]] = cost
                    self.made_by[event.lines[place]] = vehicle
            elif isinstance(command, ev.PostTransfers):
                self.rests |= command.rests
                for transfer in command.transfers:
                    assert transfer.amount_micro > 0
                    assert transfer.transfer_id not in self.transfers
                    self.transfers.add(transfer.transfer_id)
                    self.balance[transfer.debit] -= transfer.amount_micro
                    self.balance[transfer.credit] += transfer.amount_micro
            elif isinstance(command, ev.AssembleFiles):
                self.ended = True
                assert self.scheduler.rests.of(job("batch_1")) == 0, "what is left of it is not charged"

    def check(self) -> None:
        """The books say what the lines are worth."""
        assert sum(self.balance.values()) == 0
        worth = Counter({owner(name): 0 for name in (*VEHICLES, GONE)})
        cost = 0
        for number, vehicle in self.made_by.items():
            line = self.lines[number]
            cost += line.prompt * CHEAP.input_micro + line.completion * CHEAP.output_micro
            worth[owner(vehicle)] += line.prompt * 5_000 + (line.completion - line.carried) * 7
            worth[owner(GONE)] += line.carried * 7
        assert sum(self.costs.values()) == -self.balance[customer("acme")] == cost // 1_000_000
        assert self.rests.get(job("batch_1"), 0) == cost % 1_000_000 * 1_000_000
        for name, exact in worth.items():
            paid, rest = divmod(exact * CHEAP.owner_share_bp, 10**10)
            assert (self.balance[name], self.rests.get(name, 0)) == (paid, rest * 100)


@settings(deadline=None)
@given(st.lists(lines, min_size=LINES, max_size=LINES), messages)
def test_lines_come_to_the_price_of_their_job_in_any_order_and_through_any_crash(
    job_lines: list[Line], said: list[tuple[str, set[int], bool]]
) -> None:
    cell = Cell(job_lines)
    for vehicle, numbers, crash in said:
        cell.hear(vehicle, sorted(numbers, reverse=vehicle == "v2"), crash=crash)
        cell.check()
    cell.start()
    for number in reversed(range(LINES)):
        cell.hear("v1", [number, number], crash=False)
        cell.hear("v2", [number], crash=False)
    assert cell.ended
    cell.check()


@given(
    st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10_000), st.integers(0, 10**6),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10**6)), max_size=6),
)  # fmt: skip
def test_owners_parts_are_the_owners_part_whatever_the_price(
    read: int, written: int, share: int, prompt: int, shares: Shares
) -> None:
    price = Price(input_micro=read, output_micro=written, owner_share_bp=share)
    cost = cost_atto(price, prompt, sum(count for _, count in shares))
    assert sum(split_atto(price, prompt, "a", shares).values()) * 10_000 == cost * share


@given(st.permutations([(prompt, vehicle) for prompt in (1, 99, 101, 250) for vehicle in VEHICLES] * 3))
def test_live_requests_come_to_the_same_in_any_order(ended: list[tuple[int, str]]) -> None:
    scheduler = Scheduler()
    balance: Counter[str] = Counter()
    for number, (prompt, vehicle) in enumerate(ended):
        event = ev.LiveEnded(
            cause_id=f"r{number}", request_id=f"r{number}", account="acme", price=CHEAP, prompt_tokens=prompt,
            completion_tokens=0, finisher=vehicle, shares=[],
        )  # fmt: skip
        (post,) = [each for each in scheduler.handle(event, 0) if isinstance(each, ev.PostTransfers)]
        for transfer in post.transfers:
            balance[transfer.debit] -= transfer.amount_micro
            balance[transfer.credit] += transfer.amount_micro
    exact = 9 * (1 + 99 + 101 + 250) * 5_000
    assert -balance["customer:acme"] * ATTO_PER_MICRO + scheduler.rests.of("customer:acme") == exact * 1_000_000
    for vehicle in VEHICLES:
        name = owner(vehicle)
        assert balance[name] == exact // 3 * CHEAP.owner_share_bp // 10**10
        assert balance[name] * ATTO_PER_MICRO + scheduler.rests.of(name) == exact // 3 * CHEAP.owner_share_bp * 100


def test_rests_are_told_when_they_change_and_kept_below_a_millionth() -> None:
    rests = Rests()
    assert rests.add("owner:v1", 3 * ATTO_PER_MICRO) == 3
    assert rests.changed() == {}
    assert rests.add("owner:v1", ATTO_PER_MICRO - 1) == 0
    assert rests.add("owner:v1", 2) == 1
    assert (rests.changed(), rests.changed()) == ({"owner:v1": 1}, {})
    assert rests.add("owner:v1", ATTO_PER_MICRO - 1) == 1
    assert (rests.changed(), rests.of("owner:v1")) == ({"owner:v1": 0}, 0)


def test_the_books_keep_rests_and_take_a_request_once(tmp_path: Path) -> None:
    database = Database(tmp_path / "cell.db")
    books.save_rests(database.writer, {"owner:v1": 5, "job:b": 7, "customer:c": ATTO_PER_MICRO - 1})
    books.save_rests(database.writer, {"owner:v1": 0, "job:b": 8})
    assert dict(books.rests(database.reader)) == {"job:b": 8, "customer:c": ATTO_PER_MICRO - 1}
    for wrong in (-1, ATTO_PER_MICRO):
        with pytest.raises(sqlite3.IntegrityError):
            books.save_rests(database.writer, {"owner:v1": wrong})
    books.note_paid(database.writer, "r")
    with pytest.raises(sqlite3.IntegrityError):
        books.note_paid(database.writer, "r")
    database.close()


# -- in a whole cell ---------------------------------------------------------------------------------------------------


def test_a_batch_of_cheap_lines_is_charged_and_paid_through_kills_of_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of embeddings: no line comes to a millionth, all of them come to a few."""
    monkeypatch.setattr(cell_world, "CATALOGUE", Catalogue([Model(id=MODEL, input_micro=5_000, output_micro=0)]))

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1", slots=8)
            batch_id = await world.batch([chat("same", 5)] * 30)
            done = 0
            while done < 30:
                grant = await hand.next(wire.Grant)
                numbers = [item.line for item in grant.items]
                for part in (numbers[::2], numbers[1::2]):
                    for _ in range(2):  # each comes twice
                        await hand.finish(grant, part, f"m{done}", prompt_tokens=33, completion_tokens=0)
                    done += len(part)
                    await world.until(partial(so_many, world, "SELECT sum(completed) FROM batch", done))
                    if world.status(batch_id) == "in_progress":
                        world.check_money(batch_id)
                if done < 30:
                    await world.kill_cell()
                    await world.start_cell()
                    hand.report(held=[])
            batch = await world.ended(batch_id)
            assert batch["motorpool"]["cost_micro"] == 30 * 33 * 5_000 // 1_000_000 == 4
            assert dict(world.all("SELECT cost_micro, count(*) FROM result GROUP BY 1")) == {0: 26, 1: 4}
            assert world.one("SELECT earned_micro FROM vehicle") == 3
            assert world.one("SELECT atto FROM rest WHERE name = 'owner:v1'") == 465 * 10**9, "3.465 in all"
            query = "SELECT count(*) FROM rest WHERE name LIKE 'job:%'"
            await world.until(lambda: world.one(query) == 0)
            world.check_money(batch_id)

    run(test())


def test_small_live_requests_are_charged_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_world, "CATALOGUE", Catalogue([Model(id=MODEL, input_micro=5_000, output_micro=0)]))

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            for number in range(6):
                asked = world.client.post("/v1/chat/completions", json=chat(f"n {number}", 1))
                status, opened = await answered(asked, hand, Usage(prompt_tokens=90, completion_tokens=1))
                assert status == 200
                assert opened.checkpoint is None
                await world.until(partial(so_many, world, "SELECT count(*) FROM paid_request", number + 1))
                if number == 2:
                    await world.kill_cell()
                    await world.start_cell()
                    hand.report()
                    await world.ready("v1")
            assert world.one("SELECT sum(amount_micro) FROM transfer WHERE kind = 'usage'") == 2, "of 2.7"
            assert world.one("SELECT earned_micro FROM vehicle") == 1, "of 1.89"
            world.check_ledger()

    run(test())


def so_many(world: cell_world.World, query: str, count: int) -> bool:
    return bool(world.one(query) == count)


async def answered(
    asked: Coroutine[Any, Any, httpx.Response], hand: cell_world.HandPlayed, usage: Usage
) -> tuple[int, wire.Open]:
    task = asyncio.create_task(asked)
    opened = await hand.next(wire.Open)
    hand.say(wire.Answered(request_id=opened.request_id, attempt=opened.attempt, status=200, body=b"{}", usage=usage))
    return (await task).status_code, opened
