"""Who pays what, and to whom, for a live request: errors, hedges, streams that end early, the paid endpoint, claims."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import msgspec
import pytest
from tests.cell_world import HandPlayed, World, a_world, run
from tests.stream_world import live, pieces, told, until
from tests.test_stream_limits import SETTINGS, begin, fail, opened_by, paid, two

from motorpool import wire
from motorpool.core import streams
from motorpool.core.accepted import MAX_TEMPLATE_TOKENS
from motorpool.core.streams import Tier
from motorpool.errors import CapacityError
from motorpool.server.cell import LiveAnswer, LiveRequest
from motorpool.server.fallback import PaidEndpoint
from motorpool.types import ReturnReason, Usage, VehicleState


def say(hand: HandPlayed, opened: wire.Open, count: int) -> None:
    """So many tokens, each in a message."""
    deltas, _ = pieces(opened.kind, opened.body, opened.checkpoint)
    for seq, delta in enumerate(deltas[:count]):
        hand.say(wire.Tokens(request_id=opened.request_id, attempt=opened.attempt, seq=seq, deltas=[delta]))


def leave(hand: HandPlayed, opened: wire.Open, tokens: int = 0) -> None:
    """It goes, with so many tokens of a plain answer."""
    checkpoint = wire.encode_checkpoint(wire.Checkpoint(text="x" * tokens, tokens=tokens)) if tokens else None
    hand.say(
        wire.Broken(
            request_id=opened.request_id, attempt=opened.attempt, reason=ReturnReason.GUARD, checkpoint=checkpoint
        )
    )


def answer(hand: HandPlayed, opened: wire.Open, usage: Usage) -> None:
    hand.say(wire.Answered(request_id=opened.request_id, attempt=opened.attempt, status=200, body=b"{}", usage=usage))


def plain(max_tokens: int) -> LiveRequest:
    return msgspec.structs.replace(live(max_tokens=max_tokens), stream=False)


async def committed(world: World) -> None:
    """Everything that is to be paid so far is in the books."""
    world.cell._flush_gathered()
    await world.cell.write(lambda _: None)


@pytest.mark.parametrize("status", [400, 404, 422, 500])
@pytest.mark.parametrize("stream", [True, False])
def test_an_error_costs_nothing_and_pays_nobody(tmp_path: Path, status: int, stream: bool) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            request = msgspec.structs.replace(live(max_tokens=2), stream=stream)
            asked = asyncio.create_task(told(world, request) if stream else world.cell.answer(request))
            opened = await hand.next(wire.Open)
            fail(hand, opened, status)
            await asked
            await committed(world)
            assert world.one("SELECT count(*) FROM transfer") == world.one("SELECT count(*) FROM paid_request") == 0
            assert world.one("SELECT sum(tokens_generated) FROM vehicle") == 0

    run(test())


@pytest.mark.parametrize("how", ["error", "given up"])
def test_a_stream_that_ends_in_an_error_costs_what_was_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setitem(streams.WAIT_MS, Tier.GOING_ON, 0)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            request = live(max_tokens=9)
            asked = begin(world, request)
            opened = await hand.next(wire.Open)
            say(hand, opened, 3)
            if how == "error":
                fail(hand, opened, 400)
            else:
                leave(hand, opened)
            found = await asked
            assert found.answer is not None
            assert found.answer.status == (400 if how == "error" else 503)
            await committed(world)
            assert paid(world, request) == {"platform": 2 * 3, "owner:v1": 2 * 3 * 7 // 10}, "the prompt is free"
            world.check_ledger()

    run(test())


def test_a_client_that_leaves_after_a_hand_over_pays_both_vehicles_for_what_it_got(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            request = live(max_tokens=9)
            items = world.cell.live(request)
            first = asyncio.ensure_future(anext(items))
            hand, opened = await opened_by(hands)
            say(hand, opened, 2)
            await first
            leave(hand, opened)
            other, again = await opened_by([each for each in hands if each is not hand])
            say(other, again, 4)
            for _ in range(3):
                await anext(items)
            await items.aclose()  # type: ignore[attr-defined]
            await committed(world)
            assert paid(world, request) == {
                "platform": 2 * 4, f"owner:{hand.vehicle_id}": 2, f"owner:{other.vehicle_id}": 2,
            }, "two tokens each: 2.8; what was on its way is not billed"  # fmt: skip
            world.check_ledger()

    run(test())


def test_the_loser_of_a_hedge_is_paid_nothing_also_if_it_hands_back_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second vehicle was asked beside the first one, so it made all of the answer itself."""
    monkeypatch.setattr(streams, "PRIOR_HEDGE_MS", 5)
    monkeypatch.setattr(streams, "PRIOR_BYTE_MS", 0)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            for _ in range(100 // streams.HEDGE_PERCENT):
                world.cell.desk._budget.earn()
            request = plain(max_tokens=9)
            asked = asyncio.create_task(world.cell.answer(request))
            slow, opened = await opened_by(hands)
            fast, again = await opened_by(hands)
            assert again.checkpoint is None
            leave(slow, opened, tokens=5)
            await until(lambda: slow.vehicle_id not in world.cell.desk._by_vehicle)
            answer(fast, again, Usage(prompt_tokens=3, completion_tokens=9))
            assert (await asked).status == 200
            await committed(world)
            assert paid(world, request) == {"platform": 3 + 2 * 9, f"owner:{fast.vehicle_id}": (3 + 2 * 9) * 7 // 10}
            generated = dict(world.all("SELECT vehicle_id, tokens_generated FROM vehicle"))
            assert generated == {fast.vehicle_id: 9, slow.vehicle_id: 0}
            world.check_ledger()

    run(test())


def test_of_two_that_hand_back_what_each_made_alone_the_longer_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PRIOR_HEDGE_MS", 5)
    monkeypatch.setattr(streams, "PRIOR_BYTE_MS", 0)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            for _ in range(100 // streams.HEDGE_PERCENT):
                world.cell.desk._budget.earn()
            request = plain(max_tokens=9)
            asked = asyncio.create_task(world.cell.answer(request))
            slow, opened = await opened_by(hands)
            fast, again = await opened_by(hands)
            leave(slow, opened, tokens=5)
            await until(lambda: slow.vehicle_id not in world.cell.desk._by_vehicle)
            for hand in hands:
                hand.report(state=VehicleState.DENIED)
            leave(fast, again, tokens=8)
            third = await world.hand_played("v3")
            last = await third.next(wire.Open)
            assert wire.decode_checkpoint(last.checkpoint).tokens == 8
            answer(third, last, Usage(prompt_tokens=3, completion_tokens=9, carried_tokens=8))
            await asked
            await committed(world)
            assert paid(world, request) == {
                "platform": 3 + 2 * 9,
                f"owner:{fast.vehicle_id}": 2 * 8 * 7 // 10,
                "owner:v3": (3 + 2 * 1) * 7 // 10,
            }
            world.check_ledger()

    run(test())


def test_what_was_handed_back_and_used_is_paid_to_who_made_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            request = plain(max_tokens=9)
            asked = asyncio.create_task(world.cell.answer(request))
            first, opened = await opened_by(hands)
            leave(first, opened, tokens=5)
            first.report(state=VehicleState.DENIED)
            (other,) = [each for each in hands if each is not first]
            again = await other.next(wire.Open)
            assert wire.decode_checkpoint(again.checkpoint).tokens == 5
            answer(other, again, Usage(prompt_tokens=3, completion_tokens=9, carried_tokens=5))
            await asked
            await committed(world)
            assert paid(world, request) == {
                "platform": 3 + 2 * 9, f"owner:{first.vehicle_id}": 7, f"owner:{other.vehicle_id}": 7,
            }, "10 and 11 millionths, of which owners have 7 and 7.7"  # fmt: skip
            world.check_ledger()

    run(test())


@pytest.mark.parametrize("stream", [True, False])
def test_no_claim_of_a_vehicle_costs_more_than_the_answer_can_have(tmp_path: Path, stream: bool) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            request = msgspec.structs.replace(live(max_tokens=3, n=2), stream=stream)
            asked = asyncio.create_task(told(world, request) if stream else world.cell.answer(request))
            opened = await hand.next(wire.Open)
            claimed = Usage(prompt_tokens=1 << 24, completion_tokens=1 << 24, carried_tokens=1 << 24)
            if stream:
                say(hand, opened, 6)
                hand.say(wire.Tokens(request_id=opened.request_id, attempt=0, seq=6, deltas=[], usage=claimed))
            else:
                answer(hand, opened, claimed)
            await asked
            await committed(world)
            most = len(request.body) + MAX_TEMPLATE_TOKENS + 2 * 6
            assert paid(world, request) == {"platform": most, "owner:v1": most * 7 // 10}
            world.check_ledger()

    run(test())


# -- the paid endpoint


class Cut(httpx.AsyncByteStream):
    """A stream of three words that breaks off; ``whole``: it ends properly, without a word on its tokens."""

    def __init__(self, *, whole: bool) -> None:
        self._whole = whole

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for word in ("one ", "two ", "three "):
            chunk = {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
            yield b"data: %b\n\n" % json.dumps(chunk).encode()
        if not self._whole:
            raise httpx.ReadError("gone")
        yield b"data: [DONE]\n\n"


@pytest.mark.parametrize("whole", [True, False])
def test_the_paid_endpoint_is_paid_for_what_it_said(tmp_path: Path, whole: bool) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Cut(whole=whole))

    async def test() -> None:
        async with a_world(tmp_path) as world:
            world.cell.desk.fallback = PaidEndpoint(SETTINGS, httpx.MockTransport(respond))
            request = live(max_tokens=5)
            if whole:
                assert (await told(world, request)).bill == (0, 3)
            else:
                with pytest.raises(CapacityError):
                    await told(world, request)
            await committed(world)
            assert paid(world, request) == {"platform": 3 * 30}, "at its price; no owner is paid"
            assert world.one("SELECT count(*) FROM rest WHERE name LIKE 'owner:%'") == 0

    run(test())


@pytest.mark.parametrize("status", [400, 401, 500])
def test_an_error_of_the_paid_endpoint_costs_nothing(tmp_path: Path, status: int) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, json={"error": {"message": "m", "type": "t", "param": None, "code": "c"}})

    async def test() -> None:
        async with a_world(tmp_path) as world:
            world.cell.desk.fallback = PaidEndpoint(SETTINGS, httpx.MockTransport(respond))
            for asked in (partial(told, world, live(max_tokens=2)), partial(world.cell.answer, plain(max_tokens=2))):
                try:
                    found = await asked()
                except CapacityError:
                    assert status != 400
                else:
                    refused = found if isinstance(found, LiveAnswer) else found.answer
                    assert refused is not None
                    assert refused.status == status == 400
            await committed(world)
            assert world.one("SELECT count(*) FROM paid_request") == 0

    run(test())
