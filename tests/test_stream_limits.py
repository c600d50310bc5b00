"""How often, for how long, for whom: errors, hedges, silence, those who wait, and the operator's paid endpoint."""

from __future__ import annotations

import asyncio
import json
import socket
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import uvloop
from tests.api_cell import make_server
from tests.cell_world import HandPlayed, World, a_world, run
from tests.stream_world import Told, live, official, pieces, told, until
from tests.vehicle_trial import CONFIG, permit

from motorpool import wire
from motorpool.agent.runtime.engine import Finished, Progressed
from motorpool.core import streams
from motorpool.core.streams import Tier
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import (
    Arrived,
    CancelAttempts,
    Command,
    EngineReady,
    EngineWorked,
    PublishLive,
    SubmitAttempts,
)
from motorpool.errors import CapacityError, SetupError
from motorpool.server import fallback
from motorpool.server.cell import LiveRequest
from motorpool.server.fallback import FallbackModel, FallbackSettings, PaidEndpoint
from motorpool.types import Kind, ReturnReason, Usage


def begin(world: World, request: LiveRequest) -> asyncio.Task[Told]:
    return asyncio.create_task(told(world, request))


async def opened_by(hands: list[HandPlayed]) -> tuple[HandPlayed, wire.Open]:
    """The vehicle that is asked next, and what it is asked."""
    tasks = {asyncio.create_task(hand.next(wire.Open)): hand for hand in hands}
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    (first,) = done
    return tasks[first], first.result()


def finish(hand: HandPlayed, opened: wire.Open) -> None:
    """Answer to the end, in two messages."""
    deltas, usage = pieces(opened.kind, opened.body, opened.checkpoint)
    for seq, (part, bill) in enumerate(((deltas, None), ([], usage))):
        hand.say(wire.Tokens(request_id=opened.request_id, attempt=opened.attempt, seq=seq, deltas=part, usage=bill))


def fail(hand: HandPlayed, opened: wire.Open, status: int) -> None:
    body = json.dumps({"error": {"message": f"{status}", "type": "t", "param": None, "code": "c"}}).encode()
    hand.say(wire.Answered(request_id=opened.request_id, attempt=opened.attempt, status=status, body=body))


def paid(world: World, request: LiveRequest) -> dict[str, int]:
    rows = world.all("SELECT credit, amount_micro FROM transfer WHERE reference = ?", request.request_id)
    return {str(credit): int(amount) for credit, amount in rows}


async def two(world: World, slots: int = 4) -> list[HandPlayed]:
    return [await world.hand_played(f"v{number}", slots=slots) for number in range(2)]


# -- errors


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_is_the_requests_own_fault_is_never_tried_elsewhere(tmp_path: Path, status: int) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            asked = begin(world, live(max_tokens=2))
            hand, opened = await opened_by(hands)
            fail(hand, opened, status)
            found = await asked
            assert found.answer is not None
            assert found.answer.status == status
            assert not any(isinstance(each, wire.Open) for hand in hands for each in hand.heard())
            assert world.cell.desk.counts.failed == 0

    run(test())


def test_what_is_the_vehicles_fault_is_tried_elsewhere_a_few_times(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            asked = begin(world, live(max_tokens=2))
            hand, opened = await opened_by(hands)
            fail(hand, opened, 500)
            other, again = await opened_by(hands)
            assert other is not hand
            finish(other, again)
            assert (await asked).answer is None
            third = await world.hand_played("v3")
            fourth = await world.hand_played("v4")
            asked = begin(world, live(max_tokens=2))
            seen = []
            for _ in range(streams.MAX_FAILED):
                hand, opened = await opened_by([*hands, third, fourth])
                seen.append(hand.vehicle_id)
                fail(hand, opened, 500)
            found = await asked
            assert found.answer is not None
            assert found.answer.status == 500
            assert len(set(seen)) == len(seen) == streams.MAX_FAILED

    run(test())


# -- hedges and silence


def test_a_late_first_token_is_asked_for_twice_and_the_first_to_speak_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PRIOR_HEDGE_MS", 5)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            desk = world.cell.desk
            for _ in range(100 // streams.HEDGE_PERCENT):
                desk._budget.earn()
            for winner in ("second", "first"):
                request = live(max_tokens=3)
                asked = begin(world, request)
                slow, opened = await opened_by(hands)
                fast, again = await opened_by(hands)
                assert again.attempt == opened.attempt + 1
                assert again.checkpoint is None
                hand, kept = (fast, again) if winner == "second" else (slow, opened)
                loser = slow if winner == "second" else fast
                finish(hand, kept)
                assert (await loser.next(wire.Close)).request_id == request.request_id
                found = await asked
                assert found.usage is not None
                await world.until(partial(paid, world, request))
                assert set(paid(world, request)) == {"platform", f"owner:{hand.vehicle_id}"}, "the loser costs nobody"
                assert paid(world, request)["platform"] == found.bill[0] + 2 * 3
                assert all(world.cell.scheduler.vehicles[each.vehicle_id].live == 0 for each in hands)
                desk.places.suspects.spoke(loser.vehicle_id)
                for _ in range(100 // streams.HEDGE_PERCENT):
                    desk._budget.earn()
            assert desk.counts.hedged == 2

    run(test())


def test_without_a_budget_nothing_is_hedged_and_a_silent_vehicle_loses_its_request_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PRIOR_HEDGE_MS", 1)
    monkeypatch.setattr(streams, "PRIOR_BYTE_MS", 0)
    monkeypatch.setattr(streams, "FLOOR_HEDGE_MS", 1)
    monkeypatch.setattr(streams, "FLOOR_FIRST_MS", 1)
    monkeypatch.setattr(streams, "PRIOR_FIRST_MS", 60)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            asked = begin(world, live(max_tokens=3))
            silent, _ = await opened_by(hands)
            other, again = await opened_by(hands)
            assert other is not silent
            finish(other, again)
            await asked
            assert (world.cell.desk.counts.hedged, world.cell.desk.counts.stalled) == (0, 1)
            monkeypatch.setattr(streams, "PRIOR_FIRST_MS", 60_000)
            for _ in range(6):  # it is avoided from now on
                asked = begin(world, live(max_tokens=3))
                hand, opened = await opened_by(hands)
                assert hand is other
                finish(hand, opened)
                await asked

    run(test())


def test_a_vehicle_that_reports_after_it_was_given_up_was_slow_and_that_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PRIOR_GAP_MS", 20)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            asked = begin(world, live(max_tokens=3))
            slow, opened = await opened_by(hands)
            deltas, _ = pieces(opened.kind, opened.body, None)
            slow.say(wire.Tokens(request_id=opened.request_id, attempt=0, seq=0, deltas=deltas[:1]))
            other, again = await opened_by(hands)
            finish(other, again)
            await asked
            desk = world.cell.desk
            assert len(desk._doubts) == 1
            since_ms = desk._doubts[0].since_ms
            world.ahead_ms += 10
            slow.report()
            await world.until(lambda: world.cell.scheduler.vehicles[slow.vehicle_id].seen_ms > since_ms)
            before = sum(len(pace.gap) for pace in desk.paces._paces.values())
            desk.on_tick()
            assert (len(desk._doubts), desk.counts.slow) == (0, 1)
            assert sum(len(pace.gap) for pace in desk.paces._paces.values()) == before + 1

    run(test())


def test_silence_that_is_our_own_delay_is_excused_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            asked = begin(world, live(max_tokens=3))
            hand, _ = await opened_by(hands)
            desk = world.cell.desk
            (leg,) = desk._legs.values()
            late_ms = desk._clock_ms() + 1_000_000
            monkeypatch.setattr(desk, "_clock_ms", lambda: late_ms)
            leg.due_ms = 0
            desk._alarms.set(leg.key, late_ms - 1_000)
            desk._ring(late_ms - 1_000)
            assert leg.excused
            assert desk.counts.stalled == 0
            late_ms += 500
            desk._ring(late_ms - 100)
            assert desk.counts.stalled == 1
            monkeypatch.undo()
            other, again = await opened_by(hands)
            assert other is not hand
            finish(other, again)
            await asked

    run(test())


def test_an_alarm_that_is_due_already_rings_in_the_products_own_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PRIOR_HEDGE_MS", 0)
    monkeypatch.setattr(streams, "FLOOR_HEDGE_MS", 0)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            for _ in range(8):
                asked = begin(world, live(max_tokens=2))
                hand, opened = await opened_by(hands)
                world.cell.desk._ring(0)
                finish(hand, opened)
                assert (await asked).answer is None

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    uvloop.run(bounded())


# -- those who wait


def test_who_finds_no_free_slot_waits_and_the_more_urgent_goes_first(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1", slots=1)
            running = [begin(world, live(max_tokens=2)) for _ in range(streams.PER_SLOT[Tier.DEFAULT])]
            open_now = [await hand.next(wire.Open) for _ in running]
            waiting: list[asyncio.Task[Told]] = []
            for tier in ("flex", "default", "auto"):
                waiting.append(begin(world, live(max_tokens=2, service_tier=tier)))
                await until(lambda: len(world.cell.desk.waiting) == len(waiting))
            waiting.append(begin(world, live(max_tokens=2, service_tier="priority")))
            open_now.append(await hand.next(wire.Open))  # at once: it may use more places on a slot
            order = []
            while open_now:
                opened = open_now.pop(0)
                order.append(json.loads(opened.body).get("service_tier"))
                finish(hand, opened)
                if len(order) in {2, 3, 5}:  # a place is free for the next one; the cheap one waits for a free slot
                    open_now.append(await hand.next(wire.Open))
            await asyncio.gather(*running, *waiting)
            assert order == [None, None, "priority", "default", "auto", "flex"]

    run(test())


@pytest.mark.parametrize("room", ["full", "slow"])
def test_who_cannot_be_served_in_time_is_told_so_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    monkeypatch.setattr(streams.WaitingRoom.__init__, "__defaults__", (0 if room == "full" else 8,))
    monkeypatch.setitem(streams.WAIT_MS, Tier.DEFAULT, 0)

    async def test() -> None:
        async with a_world(tmp_path) as world, official(world) as client:
            hand = await world.hand_played("v1", slots=1)
            running = [begin(world, live(max_tokens=2)) for _ in range(streams.PER_SLOT[Tier.DEFAULT])]
            open_now = [await hand.next(wire.Open) for _ in running]
            asked: Any = {"model": "null", "messages": [{"role": "user", "content": "x"}], "stream": True}
            wanted = openai.RateLimitError if room == "full" else openai.InternalServerError
            with pytest.raises(wanted) as caught:
                await client.chat.completions.create(**asked)
            assert caught.value.code == ("slow_down" if room == "full" else "server_is_overloaded")
            assert caught.value.status_code == (429 if room == "full" else 503)
            assert streams.MIN_RETRY_MS <= int(caught.value.response.headers["retry-after-ms"]) <= streams.MAX_RETRY_MS
            for opened in open_now:
                finish(hand, opened)
            await asyncio.gather(*running)
            assert not world.cell.desk._calls
            assert len(world.cell.desk.waiting) == 0

    run(test())


def test_an_answer_states_the_tier_that_was_given(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world, official(world) as client:
            await world.agent("v1")
            for asked, given in (("auto", "default"), ("flex", "flex"), ("priority", "priority")):
                tier: Any = asked
                answer = await client.chat.completions.create(
                    model="null", messages=[{"role": "user", "content": "x"}], service_tier=tier
                )
                assert answer.service_tier == given

    run(test())


def test_a_client_that_waits_and_leaves_leaves_nothing_behind(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1", slots=1)
            running = [begin(world, live(max_tokens=2)) for _ in range(streams.PER_SLOT[Tier.DEFAULT])]
            open_now = [await hand.next(wire.Open) for _ in running]
            waiting = begin(world, live(max_tokens=2))
            await until(lambda: len(world.cell.desk.waiting) == 1)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert len(world.cell.desk.waiting) == 0
            for opened in open_now:
                finish(hand, opened)
            await asyncio.gather(*running)
            assert not world.cell.desk._calls

    run(test())


def test_a_client_that_closes_its_connection_ends_the_work_on_the_vehicle(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            listener = socket.create_server(("127.0.0.1", 0))
            server = make_server(world.api)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            for stream in (True, False):
                body = json.dumps(
                    {"model": "null", "messages": [{"role": "user", "content": "x"}], "stream": stream}
                ).encode()
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                writer.write(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
                    + world.key.encode()
                    + b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
                )
                opened = await hand.next(wire.Open)
                if stream:
                    deltas, _ = pieces(Kind.CHAT, body, None)
                    hand.say(wire.Tokens(request_id=opened.request_id, attempt=0, seq=0, deltas=deltas[:1]))
                    assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
                writer.close()
                assert (await hand.next(wire.Close)).request_id == opened.request_id
            server.should_exit = True
            await serving
            listener.close()

    run(test())


# -- the paid endpoint

SETTINGS = FallbackSettings(
    url="http://paid/v1",
    api_key="secret",
    models={"null": FallbackModel(name="theirs", input_micro=10_000_000, output_micro=30_000_000)},
)


class Endpoint:
    """The operator's endpoint: says five words. ``status`` other than 200 is what it answers instead."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.status = 200
        self.cut = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.asked.append(body)
        assert request.headers["authorization"] == "Bearer secret"
        assert str(request.url) == "http://paid/v1/chat/completions"
        if self.status != 200:
            return httpx.Response(
                self.status, json={"error": {"message": "m", "type": "t", "param": None, "code": "c"}}
            )
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        head = {"id": "theirs-1", "created": 1, "model": "theirs"}
        if not body["stream"]:
            message = {"role": "assistant", "content": "one two three four five", "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
            return httpx.Response(200, json=head | {"object": "chat.completion", "choices": [choice], "usage": usage})
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": f"{word} "} for word in ("one", "two", "three", "four", "five")]
        chunks = [head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunks.append(head | {"choices": [], "usage": usage})
        data = b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks)
        return httpx.Response(200, content=data if self.cut else data + b"data: [DONE]\n\n")


def with_endpoint(world: World) -> Endpoint:
    endpoint = Endpoint()
    world.cell.desk.fallback = PaidEndpoint(SETTINGS, httpx.MockTransport(endpoint))
    return endpoint


def test_when_no_vehicle_can_serve_the_paid_endpoint_does_and_it_shows(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world, official(world) as client:
            endpoint = with_endpoint(world)
            messages: Any = [{"role": "user", "content": "x"}]
            answer = await client.chat.completions.create(model="null", messages=messages)
            assert answer.choices[0].message.content == "one two three four five"
            assert (answer.model, answer.id[:9]) == ("null", "chatcmpl-")
            assert answer.usage is not None
            assert (answer.usage.model_extra or {})["motorpool"] == {"fallback": True}
            stream = await client.chat.completions.create(
                model="null", messages=messages, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).split() == [
                "one", "two", "three", "four", "five",
            ]  # fmt: skip
            assert len({chunk.id for chunk in chunks}) == 1
            assert chunks[-1].usage is not None
            assert (chunks[-1].usage.model_extra or {})["motorpool"] == {"fallback": True}
            assert [each["model"] for each in endpoint.asked] == ["theirs", "theirs"]
            cost = "SELECT coalesce(sum(amount_micro), 0) FROM transfer WHERE kind = ?"
            await world.until(lambda: world.one(cost, "usage") == 2 * (7 * 10 + 5 * 30))
            assert world.one(cost, "earning") == 0, "no owner is paid for what no vehicle did"
            assert world.cell.desk.counts.paid_for == 2

    run(test())


def test_what_is_cheap_and_what_has_no_stand_in_is_not_bought(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            endpoint = with_endpoint(world)
            with pytest.raises(CapacityError):
                await told(world, live(max_tokens=2, service_tier="flex"))
            other = msgspec.structs.replace(live(max_tokens=2), model="another")
            with pytest.raises(CapacityError):
                await told(world, other)
            assert endpoint.asked == []
            await world.agent("v1")
            assert (await told(world, live(max_tokens=2))).text
            assert endpoint.asked == [], "vehicles come first"

    run(test())


@pytest.mark.parametrize("status", [401, 429, 500])
def test_the_endpoints_troubles_are_not_the_customers(tmp_path: Path, status: int) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world, official(world) as client:
            endpoint = with_endpoint(world)
            endpoint.status = status
            messages: Any = [{"role": "user", "content": "x"}]
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError) as caught:
                    await client.chat.completions.create(model="null", messages=messages, stream=stream)
                assert caught.value.status_code == 503
                assert int(caught.value.response.headers["retry-after-ms"]) > 0
            endpoint.status = 400
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(model="null", messages=messages)

    run(test())


def test_a_vehicle_that_leaves_before_its_first_word_is_replaced_by_the_endpoint_but_not_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(streams.WAIT_MS, Tier.GOING_ON, 0)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            endpoint = with_endpoint(world)
            hand = await world.hand_played("v1")
            for spoke in (False, True):
                asked = begin(world, live(max_tokens=5))
                opened = await hand.next(wire.Open)
                if spoke:
                    deltas, _ = pieces(Kind.CHAT, opened.body, None)
                    hand.say(wire.Tokens(request_id=opened.request_id, attempt=0, seq=0, deltas=deltas[:1]))
                hand.say(wire.Broken(request_id=opened.request_id, attempt=0, reason=ReturnReason.GUARD))
                found = await asked
                assert (found.answer is not None) == spoke
                assert len(endpoint.asked) == 1

    run(test())


def test_a_client_that_leaves_in_the_middle_pays_the_endpoint_for_what_it_got(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            with_endpoint(world)
            request = live(max_tokens=5)
            items = world.cell.live(request)
            for _ in range(3):
                await anext(items)
            await items.aclose()  # type: ignore[attr-defined]
            await world.until(lambda: paid(world, request))
            assert paid(world, request) == {"platform": 2 * 30}

    run(test())


def test_settings_of_the_endpoint_are_read_strictly() -> None:
    good = {"url": "https://x/v1", "api_key": "k", "models": {"a": {"name": "b", "input_micro": 1, "output_micro": 2}}}
    assert fallback.read_settings(json.dumps(good).encode()).models["a"].name == "b"
    for bad in (b"", b"{}", json.dumps(good | {"url": "x"}).encode(), json.dumps(good | {"more": 1}).encode()):
        with pytest.raises(SetupError) as caught:
            fallback.read_settings(bad)
        assert '"k"' not in caught.value.message
    good["models"] = {"a": {"name": "b", "input_micro": -1, "output_micro": 2}}
    with pytest.raises(SetupError):
        fallback.read_settings(json.dumps(good).encode())


# -- the vehicle's side of reading ahead


class Machine:
    """A vehicle machine that is ready for work."""

    def __init__(self) -> None:
        self.machine = VehicleMachine(CONFIG, "i1")
        self.machine.handle(permit(), 0)
        self.machine.handle(EngineReady(model="m", slots=2, fingerprint="fp"), 1)
        self.now_ms = 1

    def __call__(self, event: Any) -> list[Command]:
        self.now_ms += 1
        commands = self.machine.handle(event, self.now_ms)
        self.machine.validate()
        return [c for c in commands if isinstance(c, SubmitAttempts | CancelAttempts | PublishLive)]

    def open(self, attempt: int, *, prepare: bool, tokens: int = 0) -> list[Command]:
        checkpoint = wire.encode_checkpoint(wire.Checkpoint(text="x" * tokens, tokens=tokens)) if tokens else None
        message = wire.Open(
            request_id="r", attempt=attempt, kind=Kind.CHAT, model="m", stream=True, body=b"{}", checkpoint=checkpoint,
            prepare=prepare,
        )  # fmt: skip
        return self(Arrived(message=message))


def test_a_vehicle_reads_ahead_holds_its_place_and_gives_it_to_the_attempt_that_goes_on() -> None:
    machine = Machine()
    (submitted,) = machine.open(1, prepare=True, tokens=3)
    assert isinstance(submitted, SubmitAttempts)
    held = submitted.attempts[0]
    assert held.checkpoint is not None
    assert wire.decode_checkpoint(held.checkpoint) == wire.Checkpoint(text="xxx", tokens=3, hold=True)
    (said,) = machine(EngineWorked(progressed=[Progressed(key=held.key, deltas=[])]))
    assert isinstance(said, PublishLive)
    assert isinstance(said.message, wire.Tokens)
    assert (said.message.attempt, said.message.deltas, said.message.usage) == (1, [], None)
    assert machine(EngineWorked(progressed=[Progressed(key=held.key, deltas=[])])) == [], "once is enough"
    submitted, cancelled = machine.open(2, prepare=False, tokens=5)
    assert isinstance(submitted, SubmitAttempts)
    assert cancelled == CancelAttempts(keys=[held.key]), "only after its successor, which gets the place"
    going = submitted.attempts[0]
    assert going.response_id == held.response_id
    assert going.checkpoint is not None
    assert not wire.decode_checkpoint(going.checkpoint).hold
    assert machine(EngineWorked(cancelled=[held.key])) == [], "nobody is told of a place that was taken over"
    (said,) = machine(EngineWorked(progressed=[Progressed(key=going.key, deltas=[wire.Delta(index=0, text="y")])]))
    assert isinstance(said, PublishLive)
    assert isinstance(said.message, wire.Tokens)
    assert (said.message.attempt, said.message.seq, len(said.message.deltas)) == (2, 0, 1)


@pytest.mark.parametrize("how", ["goes on", "finishes", "fails", "gives up", "is closed", "denied"])
def test_an_engine_that_cannot_hold_is_told_so_or_not_needed(how: str) -> None:
    machine = Machine()
    (submitted,) = machine.open(1, prepare=True)
    assert isinstance(submitted, SubmitAttempts)
    key = submitted.attempts[0].key
    if how == "goes on":
        delta = wire.Delta(index=0, text="y", token_ids=[1])
        said, cancelled = machine(EngineWorked(progressed=[Progressed(key=key, deltas=[delta])]))
        assert isinstance(said, PublishLive)
        assert isinstance(said.message, wire.Tokens)
        assert (said.message.deltas, said.message.usage) == ([], None)
        assert cancelled == CancelAttempts(keys=[key])
    elif how in {"finishes", "fails"}:
        status = 200 if how == "finishes" else 500
        (said,) = machine(EngineWorked(finished=[Finished(key=key, status=status, body=b"{}", usage=Usage())]))
        assert isinstance(said, PublishLive)
        assert isinstance(said.message, wire.Tokens if how == "finishes" else wire.Broken)
    elif how == "gives up":
        (said,) = machine(EngineWorked(cancelled=[key]))
        assert isinstance(said, PublishLive)
        assert isinstance(said.message, wire.Broken)
    elif how == "is closed":
        assert machine(Arrived(message=wire.Close(request_id="r"))) == [CancelAttempts(keys=[key])]
    else:
        from tests.vehicle_trial import denial  # noqa: PLC0415

        said = machine(denial())[-1]
        assert isinstance(said, PublishLive)
        assert isinstance(said.message, wire.Broken)
    (after,) = [c for c in machine.open(2, prepare=False) if isinstance(c, SubmitAttempts | PublishLive)]
    assert isinstance(after, PublishLive if how == "denied" else SubmitAttempts)
