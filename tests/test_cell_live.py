"""Live requests through a whole cell: one answer, whatever happens to the vehicles that make it; paid once, to each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.cell_world import Agent, World, a_world, answer, run

from motorpool import wire
from motorpool.agent.signals.car import CarSpec
from motorpool.agent.signals.owner_port import play_owner
from motorpool.core import streams
from motorpool.errors import CapacityError
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens
from motorpool.types import ReturnReason, Usage, VehicleState

TOKENS = 60


def serving(world: World) -> str:
    """The vehicle of the only live request."""
    (call,) = world.cell.desk._calls.values()
    assert call.vehicle_id is not None
    return call.vehicle_id


def paid(world: World, request: LiveRequest) -> dict[str, int]:
    """Who got how much for a live request; None of it twice."""
    rows = world.all("SELECT credit, amount_micro FROM transfer WHERE reference = ?", request.request_id)
    assert len({credit for credit, _ in rows}) == len(rows)
    return {str(credit): int(amount) for credit, amount in rows}


async def unbroken(world: World, stream: bool) -> str:
    """What the answer is when nothing breaks."""
    text, end = await answer(world.cell, world.request("a long one", TOKENS, stream=stream))
    return end.body.decode() if isinstance(end, LiveAnswer) else text


async def two_vehicles(world: World, *, car: CarSpec | None = None) -> dict[str, Agent]:
    return {name: await world.agent(name, rate=120, car=car) for name in ("v1", "v2")}


@pytest.mark.parametrize("how", ["stops", "drives off"])
def test_a_stream_goes_on_where_its_vehicle_left_it(tmp_path: Path, how: str) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            agents = await two_vehicles(world, car=CarSpec() if how == "drives off" else None)
            expected = await unbroken(world, stream=True)
            request = world.request("a long one", TOKENS, stream=True)
            leaving: list[asyncio.Task[object]] = []

            def seen(text: str) -> None:
                if len(text.split()) >= 10 and not leaving:
                    agent = agents[serving(world)]
                    left = agent.stop() if how == "stops" else play_owner(agent.config.agent_dir, "drive-off")
                    leaving.append(asyncio.create_task(left))

            text, usage = await answer(world.cell, request, seen)
            assert text == expected
            assert isinstance(usage, Usage)
            assert usage.completion_tokens == TOKENS
            assert 10 <= usage.carried_tokens < TOKENS
            await leaving[0]
            await world.until(lambda: paid(world, request))
            money = paid(world, request)
            cost = usage.prompt_tokens + 2 * TOKENS
            assert money.pop("platform") == cost
            assert set(money) == {"owner:v1", "owner:v2"}
            assert abs(sum(money.values()) - cost * 7 / 10) < len(money), "less than a millionth each"
            world.check_ledger()
            assert not world.cell.desk._calls

    run(test())


def test_a_plain_answer_goes_on_too(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            agents = await two_vehicles(world)
            expected = await unbroken(world, stream=False)
            before = {name: _generated(world, name) for name in agents}
            request = world.request("a long one", TOKENS, stream=False)
            asked = asyncio.create_task(answer(world.cell, request))
            await world.until(lambda: any(_generated(world, name) > before[name] + 5 for name in agents))
            await agents[serving(world)].stop()
            _, found = await asked
            assert isinstance(found, LiveAnswer)
            assert found.status == 200
            assert _content(found.body) == _content(expected.encode())
            await world.until(lambda: paid(world, request))
            assert {name for name in paid(world, request) if name.startswith("owner")} == {"owner:v1", "owner:v2"}

    run(test())


def _generated(world: World, vehicle_id: str) -> int:
    state = world.cell.vehicle_state(vehicle_id)
    assert state is not None
    return state.tokens_generated


def _content(body: bytes) -> bytes:
    return body.partition(b'"content":')[2]


# -- with vehicles that the test plays ---------------------------------------------------------------------------------


async def next_item(items: AsyncIterator[LiveTokens | LiveAnswer]) -> LiveTokens | LiveAnswer:
    async with asyncio.timeout(20):
        return await anext(items)


def tokens(opened: wire.Open, seq: int, text: str = "", usage: Usage | None = None) -> wire.Tokens:
    deltas = [wire.Delta(index=0, text=text, token_ids=[seq])] if text else []
    return wire.Tokens(request_id=opened.request_id, attempt=opened.attempt, seq=seq, deltas=deltas, usage=usage)


def text_of(item: LiveTokens | LiveAnswer) -> str:
    assert isinstance(item, LiveTokens)
    return "".join(delta.text for delta in item.deltas)


def test_messages_that_come_twice_are_told_once_and_a_gap_is_a_break(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            items = world.cell.live(world.request("x", 9, stream=True))
            first = asyncio.create_task(next_item(items))
            opened = await hand.next(wire.Open)
            for seq in (0, 0, 1, 1, 0):
                hand.say(tokens(opened, seq, f"t{seq} "))
            assert text_of(await first) == "t0 "
            assert text_of(await next_item(items)) == "t1 "
            second = asyncio.create_task(next_item(items))
            for seq in (3, 4, 5):  # 2 was lost; what follows belongs to an attempt that is over
                hand.say(tokens(opened, seq, f"t{seq} "))
            again = await hand.next(wire.Open)
            assert again.attempt == opened.attempt + 1, "not broken once more by what was left of the first"
            assert wire.decode_checkpoint(again.checkpoint).text == "t0 t1 "
            hand.say(tokens(opened, 6, "old "))
            hand.say(tokens(again, 0, "new "))
            assert text_of(await second) == "new "
            last = asyncio.create_task(next_item(items))
            hand.say(tokens(again, 1, usage=Usage(prompt_tokens=3, completion_tokens=3)))
            found = await last
            assert isinstance(found, LiveTokens)
            assert found.usage is not None
            with pytest.raises(StopAsyncIteration):
                await next_item(items)
            assert world.cell.scheduler.vehicles["v1"].live == 0

    run(test())


def test_a_client_that_leaves_in_the_middle_pays_for_what_it_got_and_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            request = world.request("x", 9, stream=True)
            items = world.cell.live(request)
            first = asyncio.create_task(next_item(items))
            opened = await hand.next(wire.Open)
            for seq in range(4):
                hand.say(tokens(opened, seq, f"t{seq} "))
            await first
            await next_item(items)
            await items.aclose()  # type: ignore[attr-defined]
            assert (await hand.next(wire.Close)).request_id == opened.request_id
            await world.until(lambda: paid(world, request))
            assert paid(world, request) == {"platform": 4, "owner:v1": 2}
            # One that got nothing, and one that leaves at its last word, which is paid already.
            nothing = world.request("y", 9, stream=True)
            items = world.cell.live(nothing)
            waiting = asyncio.create_task(next_item(items))
            await hand.next(wire.Open)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            whole = world.request("z", 9, stream=True)
            items = world.cell.live(whole)
            waiting = asyncio.create_task(next_item(items))
            opened = await hand.next(wire.Open)
            hand.say(tokens(opened, 0, "all", usage=Usage(prompt_tokens=3, completion_tokens=1)))
            await waiting
            await items.aclose()  # type: ignore[attr-defined]
            await world.until(lambda: paid(world, whole))
            assert paid(world, whole) == {"platform": 5, "owner:v1": 4}, "2.8 and 3.5 are 6 and a rest"
            assert paid(world, nothing) == {}
            world.check_ledger()

    run(test())


def test_a_vehicle_that_is_struck_off_loses_its_live_requests_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            request = world.request("a long one", 12, stream=True)
            items = world.cell.live(request)
            first = asyncio.create_task(next_item(items))
            opened = await hand.next(wire.Open)
            hand.say(tokens(opened, 0, "bra"))
            assert text_of(await first) == "bra"
            await world.agent("v2")
            following = asyncio.create_task(next_item(items))
            assert (await world.operator.delete("/v1/vehicles/v1")).status_code == 204
            hand.say(tokens(opened, 1, "forged"))
            assert "forged" not in text_of(await following)
            await hand.next(wire.Close)
            await items.aclose()  # type: ignore[attr-defined]

    run(test())


def test_a_plain_answer_may_take_longer_than_a_stream_may_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PRIOR_FIRST_MS", 10)
    monkeypatch.setattr(streams, "PRIOR_BYTE_MS", 0)
    monkeypatch.setattr(streams, "PRIOR_GAP_MS", 10)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1", rate=100)
            request = world.request("slow", 40, stream=False)
            _, found = await answer(world.cell, request)
            assert isinstance(found, LiveAnswer)
            assert found.status == 200

    run(test())


def test_a_client_that_reads_slowly_does_not_cost_its_vehicle_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            items = world.cell.live(world.request("x", 9, stream=True))
            first = asyncio.create_task(next_item(items))
            opened = await hand.next(wire.Open)
            hand.say(tokens(opened, 0, "one"))
            hand.say(tokens(opened, 1, "two", usage=Usage(prompt_tokens=3, completion_tokens=2)))
            assert text_of(await first) == "one"
            await world.until(lambda: not world.cell.desk._by_vehicle)  # its slot is free before all is read
            assert text_of(await next_item(items)) == "two"
            monkeypatch.setattr(streams, "PRIOR_GAP_MS", 5)
            items = world.cell.live(world.request("y", 9, stream=True))
            first = asyncio.create_task(next_item(items))
            opened = await hand.next(wire.Open)
            hand.say(tokens(opened, 0, "one"))
            again = await hand.next(wire.Open)  # whoever reads or not
            assert again.attempt == opened.attempt + 1, "a vehicle that is silent loses it"
            assert wire.decode_checkpoint(again.checkpoint).text == "one"
            assert text_of(await first) == "one"
            await items.aclose()  # type: ignore[attr-defined]

    run(test())


def test_a_rebuilt_state_breaks_no_live_request(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            items = world.cell.live(world.request("x", 9, stream=True))
            first = asyncio.create_task(next_item(items))
            opened = await hand.next(wire.Open)
            world.cell._restore()
            world.cell.desk.on_tick()
            hand.say(tokens(opened, 0, "on"))
            assert text_of(await first) == "on"
            await items.aclose()  # type: ignore[attr-defined]

    run(test())


def test_a_link_that_was_lost_may_have_lost_the_last_word(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            asked = asyncio.create_task(answer(world.cell, world.request("x", 9, stream=False)))
            opened = await hand.next(wire.Open)
            world.cell.on_link(up=True)
            again = await hand.next(wire.Open)
            assert again.attempt == opened.attempt + 1
            hand.say(wire.Answered(request_id=again.request_id, attempt=again.attempt, status=200, body=b"{}"))
            _, found = await asked
            assert isinstance(found, LiveAnswer)
            assert found.status == 200

    run(test())


def test_an_unreadable_checkpoint_means_beginning_anew_and_not_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            asked = asyncio.create_task(answer(world.cell, world.request("x", 9, stream=False)))
            opened = await hand.next(wire.Open)
            hand.say(
                wire.Broken(
                    request_id=opened.request_id,
                    attempt=opened.attempt,
                    reason=ReturnReason.GUARD,
                    checkpoint=b"\xff nonsense",
                )
            )
            again = await hand.next(wire.Open)
            assert again.checkpoint is None
            hand.say(wire.Answered(request_id=again.request_id, attempt=again.attempt, status=200, body=b"{}"))
            _, found = await asked
            assert isinstance(found, LiveAnswer)
            assert found.status == 200

    run(test())


def test_without_vehicles_the_error_comes_before_the_first_item(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            with pytest.raises(CapacityError) as caught:
                await answer(world.cell, world.request("x", 9, stream=True))
            assert caught.value.code == "no_vehicle_available"
            assert not world.cell.desk._calls

    run(test())


def test_a_stream_that_breaks_for_good_is_paid_as_far_as_it_was_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(streams.WAIT_MS, streams.Tier.GOING_ON, 0)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            request = world.request("x", 9, stream=True)
            items = world.cell.live(request)
            first = asyncio.create_task(next_item(items))
            opened = await hand.next(wire.Open)
            hand.say(tokens(opened, 0, "one"))
            await first
            hand.report(state=VehicleState.DENIED)
            await world.until(lambda: not world.cell.scheduler.vehicles["v1"].present)
            hand.say(wire.Broken(request_id=opened.request_id, attempt=opened.attempt, reason=ReturnReason.GUARD))
            end = await next_item(items)
            assert isinstance(end, LiveAnswer)
            assert end.status == 503
            await world.until(lambda: paid(world, request))
            assert set(paid(world, request)) == {"platform", "owner:v1"}

    run(test())
