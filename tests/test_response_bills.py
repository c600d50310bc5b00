"""Background responses are paid once, whatever breaks in their middle, vehicles or the cell: owners and customer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.cell_world import MODEL, HandPlayed, World, a_world, run
from tests.response_trial import CALL, TOOL
from tests.stream_world import pieces, until
from tests.test_stream_limits import SETTINGS, Endpoint, finish

from motorpool import wire
from motorpool.core import events as ev
from motorpool.core import streams
from motorpool.core.pricing import Price
from motorpool.core.streams import Tier
from motorpool.errors import StoreError
from motorpool.server.fallback import PaidEndpoint
from motorpool.server.openai.responses import runs
from motorpool.server.openai.responses.runs import Run
from motorpool.types import Kind, ReturnReason, Usage, VehicleState

TOKENS = 12
TOLD = 4


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for a moment waits for a shorter one."""
    monkeypatch.setattr(runs, "FLUSH_S", 0.001)
    monkeypatch.setattr(runs, "RETRY_S", 0.001)
    monkeypatch.setitem(streams.WAIT_MS, Tier.GOING_ON, 0)


async def ask(world: World, **fields: Any) -> str:
    body = {"model": MODEL, "input": "tell me", "background": True, "max_output_tokens": TOKENS} | fields
    made = await world.client.post("/v1/responses", json=body)
    assert made.status_code == 200, made.text
    response_id: str = made.json()["id"]
    return response_id


def running(world: World, response_id: str) -> Run:
    found = world.api.responses._registry.find("acme", response_id)
    assert found is not None
    return found


async def ended(world: World, response_id: str) -> dict[str, Any]:
    query = "SELECT ended_ms IS NOT NULL FROM response WHERE response_id = ?"
    await world.until(lambda: world.one(query, response_id))
    shown: dict[str, Any] = (await world.client.get(f"/v1/responses/{response_id}")).json()
    return shown


def say(hand: HandPlayed, opened: wire.Open, count: int, *, first: int = 0) -> None:
    """So many tokens of the answer, each in a message."""
    deltas, _ = pieces(opened.kind, opened.body, opened.checkpoint)
    for seq in range(first, first + count):
        hand.say(
            wire.Tokens(
                request_id=opened.request_id, attempt=opened.attempt, seq=seq, deltas=[deltas[seq]], engine="fp"
            )
        )


def kept_tokens(world: World, response_id: str) -> int:
    """How many tokens the books have of a response."""
    query = "SELECT pieces FROM response_piece JOIN response USING (response_no) WHERE response_id = ?"
    return sum(
        piece[4] for (data,) in world.all(query, response_id) for piece in json.loads(data) if piece[0] == "made"
    )


async def told_some(world: World, hand: HandPlayed, response_id: str, count: int = TOLD) -> wire.Open:
    """A vehicle says some tokens, and they are in the books."""
    opened: wire.Open = await hand.next(wire.Open)
    before = kept_tokens(world, response_id)
    say(hand, opened, count)
    await world.until(lambda: kept_tokens(world, response_id) == before + count)
    return opened


async def drop_dead(world: World) -> None:
    """The cell ends, and nothing is committed any more."""
    for task in world.cell._tasks:
        task.cancel()
    await asyncio.gather(*world.cell._tasks, return_exceptions=True)


async def anew(world: World) -> None:
    await world.kill_cell()
    await world.start_cell()


def moved(world: World) -> dict[str, int]:
    """What every account has got for live requests and responses so far."""
    rows = world.all("SELECT credit, amount_micro FROM transfer")
    assert len({credit for credit, _ in rows}) == len(rows), "one charge, and one payment to each"
    return {str(credit): int(amount) for credit, amount in rows}


def whole_text(body: bytes) -> tuple[str, int, int]:
    """What an unbroken run says; its tokens, read and written."""
    deltas, usage = pieces(Kind.CHAT, body, None)
    return "".join(delta.text for delta in deltas), usage.prompt_tokens, usage.completion_tokens


async def vehicle_gone(world: World, hand: HandPlayed, opened: wire.Open) -> None:
    hand.say(wire.Broken(request_id=opened.request_id, attempt=opened.attempt, reason=ReturnReason.GUARD))
    hand.report(state=VehicleState.DENIED)
    await world.until(lambda: not world.cell.scheduler.serving(MODEL))


async def cell_stopped(world: World, hand: HandPlayed, opened: wire.Open) -> None:
    await anew(world)


async def cell_killed(world: World, hand: HandPlayed, opened: wire.Open) -> None:
    say(hand, opened, 2, first=TOLD)  # it may hear these, but does not come to write them down
    await drop_dead(world)
    await anew(world)


async def killed_before_the_end_is_kept(world: World, hand: HandPlayed, opened: wire.Open) -> None:
    (found,) = world.api.responses._registry._runs.values()
    await drop_dead(world)
    deltas, usage = pieces(opened.kind, opened.body, opened.checkpoint)
    hand.say(
        wire.Tokens(
            request_id=opened.request_id,
            attempt=opened.attempt,
            seq=TOLD,
            deltas=deltas[TOLD:],
            usage=usage,
            engine="fp",
        )
    )
    await until(lambda: found._ending is not None)
    assert found._bill is not None
    await anew(world)


@pytest.mark.parametrize(
    "breaks", [vehicle_gone, cell_stopped, cell_killed, killed_before_the_end_is_kept], ids=lambda each: each.__name__
)
def test_what_was_told_is_gone_on_with_and_paid_once(tmp_path: Path, breaks: Callable[..., Any]) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            first = await world.hand_played("v1")
            response_id = await ask(world)
            opened = await told_some(world, first, response_id)
            await breaks(world, first, opened)
            second = await world.hand_played("v2")
            again = await second.next(wire.Open)
            assert again.body == opened.body
            deltas, _ = pieces(opened.kind, opened.body, None)
            checkpoint = wire.decode_checkpoint(again.checkpoint)
            assert checkpoint.tokens == TOLD
            assert checkpoint.text == "".join(delta.text for delta in deltas[:TOLD])
            assert checkpoint.token_ids == [number for delta in deltas[:TOLD] for number in delta.token_ids]
            finish(second, again)
            shown = await ended(world, response_id)
            text, prompt, completion = whole_text(opened.body)
            assert completion == TOKENS
            assert len(shown["output"]) == 1
            assert shown["output"][0]["content"][0]["text"] == text
            assert (shown["usage"]["input_tokens"], shown["usage"]["output_tokens"]) == (prompt, TOKENS)
            assert moved(world) == {
                "platform": prompt + 2 * TOKENS,
                "owner:v1": 2 * TOLD * 7 // 10,
                "owner:v2": (prompt + 2 * (TOKENS - TOLD)) * 7 // 10,
            }
            assert world.all("SELECT request_id FROM paid_request") == [(response_id,)]
            generated = dict(world.all("SELECT vehicle_id, tokens_generated FROM vehicle"))
            assert generated == {"v1": TOLD, "v2": TOKENS - TOLD}
            world.check_ledger()
            # One that nothing breaks costs the same.
            unbroken = await ask(world)
            finish(second, await second.next(wire.Open))
            await ended(world, unbroken)
            query = "SELECT sum(amount_micro) FROM transfer WHERE kind = 'usage' AND reference = ?"
            assert world.one(query, unbroken) == world.one(query, response_id) == prompt + 2 * TOKENS
            await anew(world)
            assert world.api.responses._registry._runs == {}, "nothing is left to be done or paid again"
            world.check_ledger()

    run(test())


def test_one_that_is_broken_again_and_again_is_paid_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            response_id = await ask(world, top_logprobs=2, include=["message.output_text.logprobs"])
            for number in range(1, 6):
                hand = await world.hand_played(f"v{number}")
                opened = await told_some(world, hand, response_id, count=2)
                await drop_dead(world)
                await anew(world)
            last = await world.hand_played("v6")
            again = await last.next(wire.Open)
            assert wire.decode_checkpoint(again.checkpoint).tokens == 10
            finish(last, again)
            shown = await ended(world, response_id)
            text, prompt, _ = whole_text(opened.body)
            part = shown["output"][0]["content"][0]
            assert part["text"] == text
            assert len(part["logprobs"]) == TOKENS
            assert moved(world)["platform"] == prompt + 2 * TOKENS
            assert {f"owner:v{number}" for number in range(1, 7)} < set(moved(world))
            world.check_ledger()

    run(test())


def test_an_end_that_was_told_before_the_cell_died_is_not_passed(tmp_path: Path) -> None:
    """The last token and its reason are in the books, the bill is not: nobody writes on after a stop string."""

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            response_id = await ask(world)
            opened = await told_some(world, hand, response_id, count=TOKENS)
            say(hand, opened, 1, first=TOKENS)
            query = "SELECT count(*) FROM response_piece WHERE CAST(pieces AS TEXT) LIKE '%\"length\"%'"
            await world.until(lambda: world.one(query))
            await drop_dead(world)
            await anew(world)
            other = await world.hand_played("v2")
            again = await other.next(wire.Open)
            (choice,) = wire.decode_checkpoint(again.checkpoint).choices
            assert choice.finish_reason == "length"
            finish(other, again)
            shown = await ended(world, response_id)
            text, prompt, _ = whole_text(opened.body)
            assert (shown["status"], shown["output"][0]["content"][0]["text"]) == ("incomplete", text)
            assert moved(world) == {
                "platform": prompt + 2 * TOKENS, "owner:v1": 2 * TOKENS * 7 // 10, "owner:v2": prompt * 7 // 10,
            }  # fmt: skip

    run(test())


@pytest.mark.parametrize("how", ["cancelled", "deleted", "refused"])
@pytest.mark.parametrize("restart", [False, True])
def test_one_that_ends_in_its_middle_is_paid_as_far_as_it_was_told(tmp_path: Path, how: str, restart: bool) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            response_id = await ask(world)
            opened = await told_some(world, hand, response_id)
            if restart:
                await drop_dead(world)
                await anew(world)
                hand = await world.hand_played("v2")
                opened = await hand.next(wire.Open)
            if how == "cancelled":
                shown = (await world.client.post(f"/v1/responses/{response_id}/cancel")).json()
                assert shown["status"] == "cancelled"
            elif how == "deleted":
                assert (await world.client.delete(f"/v1/responses/{response_id}")).status_code == 200
            else:
                body = json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": "c"}}).encode()
                hand.say(wire.Answered(request_id=opened.request_id, attempt=opened.attempt, status=400, body=body))
                assert (await ended(world, response_id))["status"] == "failed"
            assert moved(world) == {"platform": 2 * TOLD, "owner:v1": 2 * TOLD * 7 // 10}, "its prompt is free"
            await anew(world)
            assert world.api.responses._registry._runs == {}
            assert moved(world) == {"platform": 2 * TOLD, "owner:v1": 2 * TOLD * 7 // 10}
            world.check_ledger()

    run(test())


def test_one_of_which_nothing_was_told_costs_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            response_id = await ask(world)
            await hand.next(wire.Open)
            await anew(world)
            assert (await world.client.post(f"/v1/responses/{response_id}/cancel")).status_code == 200
            assert moved(world) == {}

    run(test())


def test_an_answer_in_one_piece_is_paid_with_its_end(tmp_path: Path) -> None:
    """One that may call tools: its answer was there, and its end was not in the books yet."""

    async def test() -> None:
        async with a_world(tmp_path) as world:
            first = await world.hand_played("v1")
            response_id = await ask(world, tools=[TOOL])
            opened = await first.next(wire.Open)
            (found,) = world.api.responses._registry._runs.values()
            await drop_dead(world)
            answer(first, opened)
            await until(lambda: found._ending is not None)
            await anew(world)
            second = await world.hand_played("v2")
            again = await second.next(wire.Open)
            assert (again.stream, again.checkpoint) == (False, None)
            answer(second, again)
            assert (await ended(world, response_id))["usage"]["output_tokens"] == 4
            assert moved(world) == {"platform": 3 + 2 * 4, "owner:v2": (3 + 2 * 4) * 7 // 10}
            assert world.all("SELECT request_id FROM paid_request") == [(response_id,)]
            world.check_ledger()

    run(test())


def answer(hand: HandPlayed, opened: wire.Open) -> None:
    """A whole answer that calls a tool."""
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    usage = Usage(prompt_tokens=3, completion_tokens=4)
    body = {
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
    }
    hand.say(
        wire.Answered(
            request_id=opened.request_id,
            attempt=opened.attempt,
            status=200,
            body=json.dumps(body).encode(),
            usage=usage,
        )
    )


def test_what_the_paid_endpoint_says_in_the_background_is_paid_with_the_end_at_its_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(streams.WAIT_MS, Tier.DEFAULT, 0)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            world.cell.desk.fallback = PaidEndpoint(SETTINGS, httpx.MockTransport(Endpoint()))
            hand = await world.hand_played("v1", slots=1)
            busy = [await ask(world) for _ in range(2)]
            opened = [await hand.next(wire.Open) for _ in busy]
            response_id = await ask(world)
            shown = await ended(world, response_id)
            assert shown["output"][0]["content"][0]["text"].split() == ["one", "two", "three", "four", "five"]
            assert shown["usage"]["motorpool"]["fallback"] is True
            assert moved(world) == {"platform": 7 * 10 + 5 * 30}
            assert world.all("SELECT request_id FROM paid_request") == [(response_id,)]
            for each in opened:
                finish(hand, each)
            for each_id in busy:
                await ended(world, each_id)

    run(test())


def test_a_bill_that_was_paid_is_refused_whatever_it_came_to(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            bill = ev.LiveEnded(
                cause_id="r", request_id="r", account="acme", price=Price(input_micro=1, output_micro=0),
                prompt_tokens=3, completion_tokens=0, finisher="v1", shares=[],
            )  # fmt: skip
            await world.cell.write(lambda db: None, bill=bill)
            before = world.all("SELECT * FROM rest ORDER BY name")
            assert dict(before) == {"customer:acme": 3_000_000, "owner:v1": 2_100_000}
            with pytest.raises(StoreError):
                await world.cell.write(lambda db: db.execute("DELETE FROM rest"), bill=bill)
            await world.until(lambda: world.cell._singly == 0)
            assert world.all("SELECT * FROM rest ORDER BY name") == before
            assert world.cell.scheduler.rests.of("owner:v1") == 2_100_000

    run(test())
