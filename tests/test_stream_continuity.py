"""Streams that are cut wherever they can be cut, through a whole cell: the client is told exactly what it would have
been told without the cut.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.cell_world import World, a_world, run
from tests.stream_world import (
    CALLED,
    MULTI_BYTE,
    PLACE,
    TOOL,
    Puppet,
    Told,
    live,
    official,
    pieces,
    puppets,
    told,
    until,
)

from motorpool import wire
from motorpool.core import streams
from motorpool.server.cell import LiveRequest
from motorpool.types import Kind, ReturnReason, Usage

SHAPES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "words": (Kind.CHAT, {"max_tokens": 9}),
    "multi-byte text": (
        Kind.CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": MULTI_BYTE}}},
    ),
    "logprobs": (Kind.CHAT, {"max_tokens": 7, "logprobs": True, "top_logprobs": 2}),
    "a tool call": (Kind.CHAT, CALLED),
    "two choices with tool calls": (Kind.CHAT, CALLED | {"n": 2}),
    "a tool call that is too long": (Kind.CHAT, CALLED | {"max_tokens": 4}),
    "two choices": (Kind.CHAT, {"max_tokens": 5, "n": 2}),
    "two choices with logprobs": (Kind.CHAT, {"max_tokens": 4, "n": 2, "logprobs": True}),
    "a completion of two prompts, twice each": (
        Kind.COMPLETION,
        {"prompt": ["one", "two"], "n": 2, "max_tokens": 3, "logprobs": 1},
    ),
}
FAULTS = ("breaks", "loses", "falls silent")


async def cut_everywhere(world: World, cars: list[Puppet], make: Any, how: str) -> None:
    """Ask, cut after every delta, and compare with the answer that nothing cut."""
    for car in cars:
        car.cut, car.how = None, how
    whole = await told(world, make())
    request = make()
    count = len(pieces(request.kind, request.body, None)[0])
    for cut in range(count + 1):
        for car in cars:
            car.cut = cut
        request = make()
        found = await told(world, request)
        assert found.same_as(whole), f"after {cut} of {count}: {found.text} {found.ends} {found.bill}"
        assert found.answer is None
        opened = [each for car in cars for each in car.opened if each.request_id == request.request_id]
        assert sorted(each.attempt for each in opened) == [0, 1]
    assert not world.cell.desk._calls
    assert not world.cell.desk._by_vehicle


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_stream_cut_after_any_token_is_the_unbroken_one(tmp_path: Path, shape: str) -> None:
    kind, fields = SHAPES[shape]

    async def test() -> None:
        async with a_world(tmp_path) as world, puppets(world) as cars:
            await cut_everywhere(world, cars, lambda: live(kind, **fields), "breaks")

    run(test())


@pytest.mark.parametrize("how", FAULTS)
def test_how_it_was_cut_makes_no_difference(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PRIOR_FIRST_MS", "PRIOR_GAP_MS"):
        monkeypatch.setattr(streams, name, 100)
    monkeypatch.setattr(streams, "PRIOR_BYTE_MS", 0)
    monkeypatch.setattr(streams, "SUSPECT_MS", 0)

    async def test() -> None:
        async with a_world(tmp_path) as world, puppets(world) as cars:
            await cut_everywhere(world, cars, lambda: live(max_tokens=5, n=2), how)

    run(test())


def test_a_stop_string_across_the_cut_is_never_shown(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world, puppets(world) as cars:
            text = (await told(world, live(max_tokens=20))).text[0]
            words = text.split(" ")
            for stop in (f"{words[5]} {words[6]}", f"{words[3][-1]} {words[4][:2]}", text[7:12]):
                await cut_everywhere(world, cars, lambda stop=stop: live(max_tokens=20, stop=[stop, "never"]), "breaks")

    run(test())


def test_a_stream_that_is_cut_again_and_again_still_comes_to_its_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world, puppets(world, 3) as cars:
            whole = await told(world, live(max_tokens=30))
            request = live(max_tokens=30)
            for car in cars:
                car._answer = partial(_few, car)  # type: ignore[method-assign]
            found = await told(world, request)
            assert found.same_as(whole)
            assert found.usage is not None
            assert found.usage.carried_tokens == 28
            await world.until(
                lambda: world.one("SELECT count(*) FROM transfer WHERE reference = ?", request.request_id)
            )
            rows = dict(world.all("SELECT credit, amount_micro FROM transfer WHERE reference = ?", request.request_id))
            assert rows.pop("platform") == found.bill[0] + 2 * 30, "the prompt is billed once, each token once"
            assert set(rows) <= {"owner:v0", "owner:v1", "owner:v2"}

    run(test())


def _few(car: Puppet, opened: wire.Open) -> None:
    """Four tokens, then it leaves; the eighth attempt ends."""
    deltas, usage = pieces(opened.kind, opened.body, opened.checkpoint)
    for seq, delta in enumerate(deltas[:4]):
        car._say(opened, seq, [delta])
    if len(deltas) <= 4:
        car._say(opened, len(deltas), [], usage)
    else:
        reason = ReturnReason.GUARD
        car.hand.say(wire.Broken(request_id=opened.request_id, attempt=opened.attempt, reason=reason))


@pytest.mark.parametrize("choices", [1, 2])
def test_an_end_that_was_told_is_not_told_twice(tmp_path: Path, choices: int) -> None:
    """Everything came but the last message, with the bill."""

    async def test() -> None:
        async with a_world(tmp_path) as world, puppets(world) as cars:

            def make() -> LiveRequest:
                return live(max_tokens=4, n=choices)

            whole = await told(world, make())
            for car in cars:
                car.cut = len(pieces(Kind.CHAT, make().body, None)[0])
            found = await told(world, make())
            assert found.same_as(whole)
            assert found.ends == {index: ["length"] for index in range(choices)}

    run(test())


def test_a_vehicle_that_goes_on_after_the_end_is_not_heard(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            asked = asyncio.create_task(told(world, live(max_tokens=4)))
            opened = await hand.next(wire.Open)

            def say(seq: int, *deltas: wire.Delta, usage: Usage | None = None) -> None:
                hand.say(
                    wire.Tokens(
                        request_id=opened.request_id, attempt=0, seq=seq, deltas=list(deltas), usage=usage, engine="x"
                    )
                )

            say(0, wire.Delta(index=0, text="a", token_ids=[1], finish_reason="stop"))
            say(1, wire.Delta(index=0, text="b", token_ids=[2]), wire.Delta(index=7, text="c", token_ids=[3]))
            say(2, usage=Usage(prompt_tokens=1, completion_tokens=1))
            found = await asked
            assert (found.text, found.ends) == ({0: "a"}, {0: ["stop"]})

    run(test())


# -- through the API, with the official client -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["words", "multi-byte text", "logprobs", "two choices"])
def test_the_official_client_sees_one_answer_wherever_it_was_cut(tmp_path: Path, shape: str) -> None:
    fields = {"messages": [{"role": "user", "content": "go on"}]} | SHAPES[shape][1]

    async def test() -> None:
        async with a_world(tmp_path) as world, puppets(world) as cars, official(world) as client:

            async def ask() -> list[Any]:
                stream = await client.chat.completions.create(
                    model="null", stream=True, stream_options={"include_usage": True}, **fields
                )
                return [chunk async for chunk in stream]

            whole = await ask()
            count = len(
                pieces(Kind.CHAT, cars[0].opened[-1].body if cars[0].opened else cars[1].opened[-1].body, None)[0]
            )
            for cut in range(count + 1):
                for car in cars:
                    car.cut = cut
                chunks = await ask()
                assert len({chunk.id for chunk in chunks}) == 1
                assert _shown(chunks) == _shown(whole), f"after {cut}"
                assert chunks[-1].usage is not None
                assert (chunks[-1].usage.model_extra or {})["motorpool"].get("continued", 0) == int(cut > 0)

    run(test())


def _shown(chunks: list[Any]) -> Any:
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = choices.setdefault(choice.index, {"roles": 0, "text": "", "entries": [], "ends": []})
            one["roles"] += choice.delta.role is not None
            one["text"] += choice.delta.content or ""
            one["entries"] += [
                each.model_dump() for each in (choice.logprobs.content if choice.logprobs else None) or []
            ]
            one["ends"] += [choice.finish_reason] if choice.finish_reason else []
    usage = chunks[-1].usage
    return choices, (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)


def test_the_official_client_is_given_the_fragments_of_a_call_as_they_come(tmp_path: Path) -> None:
    """Place, id and name, then the text of the arguments: each part once, wherever the vehicle changes."""

    async def test() -> None:
        async with a_world(tmp_path) as world, puppets(world) as cars, official(world) as client:

            async def ask() -> list[Any]:
                asked: Any = {"messages": [{"role": "user", "content": "go on"}]} | CALLED
                stream: Any = await client.chat.completions.create(
                    model="null", stream=True, stream_options={"include_usage": True}, **asked
                )
                return [chunk async for chunk in stream]

            whole = await ask()
            head, *rest = _fragments(whole)
            assert (head.index, head.type, head.function.name, head.function.arguments) == (0, "function", "find", "")
            assert head.id.startswith("call_")
            assert len(rest) > 5
            assert all((each.index, each.id, each.function.name) == (0, None, None) for each in rest)
            text = "".join(each.function.arguments for each in rest)
            assert json.loads(text) == PLACE["enum"][0]
            assert [c.finish_reason for chunk in whole for c in chunk.choices if c.finish_reason] == ["tool_calls"]
            for cut in range(len(rest) + 1):
                for car in cars:
                    car.cut = cut
                chunks = await ask()
                first, *others = _fragments(chunks)
                assert (first.id, first.function.name) == (head.id, "find")
                assert "".join(each.function.arguments for each in others) == text, f"after {cut}"
                assert all((each.id, each.function.name) == (None, None) for each in others)
                assert chunks[-1].usage.completion_tokens == whole[-1].usage.completion_tokens == len(rest)

    run(test())


def _fragments(chunks: list[Any]) -> list[Any]:
    return [each for chunk in chunks for choice in chunk.choices for each in choice.delta.tool_calls or []]


def test_the_streaming_helper_of_the_official_client_puts_a_call_together_over_a_cut(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world, puppets(world) as cars, official(world) as client:
            for car in cars:
                car.cut = 3
            asked: Any = {"messages": [{"role": "user", "content": "go on"}]} | CALLED
            async with client.chat.completions.stream(model="null", **asked) as stream:
                kinds = [event.type async for event in stream]
                message = (await stream.get_final_completion()).choices[0].message
            assert kinds.count("tool_calls.function.arguments.done") == 1
            assert kinds.count("tool_calls.function.arguments.delta") > 5
            assert message.content is None
            assert message.tool_calls is not None
            assert json.loads(message.tool_calls[0].function.arguments) == PLACE["enum"][0]

    run(test())


def test_a_whole_answer_with_tools_ends_a_stream_too(tmp_path: Path) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "park", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    body = {
        "id": "chatcmpl-x",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }

    async def test() -> None:
        async with a_world(tmp_path) as world, official(world) as client:
            hands = [await world.hand_played(f"v{number}") for number in range(2)]

            async def ask() -> list[Any]:
                asked: Any = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "stream": True}
                stream: Any = await client.chat.completions.create(model="null", **asked)
                return [chunk async for chunk in stream]

            asked = asyncio.create_task(ask())
            first = asyncio.create_task(hands[0].next(wire.Open))
            second = asyncio.create_task(hands[1].next(wire.Open))
            done, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
            opened = done.pop().result()
            leaving, staying, waiting = (hands[0], hands[1], second) if first.done() else (hands[1], hands[0], first)
            leaving.say(wire.Broken(request_id=opened.request_id, attempt=0, reason=ReturnReason.GUARD))
            again = await waiting
            usage = Usage(prompt_tokens=1, completion_tokens=2, carried_tokens=2)
            staying.say(
                wire.Answered(
                    request_id=again.request_id, attempt=1, status=200, body=json.dumps(body).encode(), usage=usage
                )
            )
            chunks = await asked
            calls = [each for chunk in chunks for choice in chunk.choices for each in choice.delta.tool_calls or []]
            assert [each.function.arguments for each in calls] == ["{}"]
            assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["tool_calls"]

    run(test())


# -- announced departures ----------------------------------------------------------------------------------------------


def test_a_departure_that_announces_itself_is_handed_over_before_the_break(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A real agent reads ahead, holds its place, and takes over right after a token of the one that will leave."""

    async def test() -> None:
        async with a_world(tmp_path) as world:
            whole = await _by_hand_alone(tmp_path_factory.mktemp("alone"))
            hand = await world.hand_played("v1")
            request = live(max_tokens=40)
            asked = asyncio.create_task(told(world, request))
            opened = await hand.next(wire.Open)
            deltas, _ = pieces(Kind.CHAT, opened.body, None)
            say = _Sayer(hand, opened, deltas)
            say(10)
            await world.agent("v2", rate=2000)
            hand.report(risk_15min=0.9)
            desk = world.cell.desk
            (call,) = desk._calls.values()
            await world.until(lambda: desk.places.risk("v1") == 0.9)
            desk.on_report("v1")
            assert call.successor is not None
            say(1)
            await until(lambda: call.switching)  # it reads what came meanwhile, and says so
            assert call.vehicle_id == "v1", "it goes on here until the other one is ready"
            say(1)
            await hand.next(wire.Close)
            say(3)  # too late: nobody listens any more
            found = await asked
            assert found.same_as(whole)
            assert found.usage is not None
            assert found.usage.carried_tokens == 12
            assert (desk.counts.handed_over, desk.counts.departed, desk.counts.stalled) == (1, 0, 0)
            assert world.cell.scheduler.vehicles["v1"].live == world.cell.scheduler.vehicles["v2"].live == 0

    run(test())


class _Sayer:
    """Says the next tokens of an answer."""

    def __init__(self, hand: Any, opened: wire.Open, deltas: list[wire.Delta]) -> None:
        self._hand, self._opened, self._deltas, self._at = hand, opened, deltas, 0

    def __call__(self, count: int) -> None:
        for _ in range(count):
            self._hand.say(
                wire.Tokens(
                    request_id=self._opened.request_id, attempt=self._opened.attempt, seq=self._at,
                    deltas=[self._deltas[self._at]], engine="fp",
                )
            )  # fmt: skip
            self._at += 1


async def _by_hand_alone(folder: Path) -> Told:
    async with a_world(folder) as world, puppets(world, 1):
        return await told(world, live(max_tokens=40))


def test_nobody_is_handed_to_a_vehicle_that_is_no_safer(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = [await world.hand_played(f"v{number}") for number in range(2)]
            for hand in hands:
                hand.report(risk_15min=0.8)
            await world.until(lambda: all(world.cell.desk.places.risk(hand.vehicle_id) == 0.8 for hand in hands))
            asked = asyncio.create_task(told(world, live(max_tokens=2)))
            tasks = [asyncio.create_task(hand.next(wire.Open)) for hand in hands]
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            opened = done.pop().result()
            hand = hands[tasks.index(next(task for task in tasks if task not in waiting))]
            deltas, usage = pieces(Kind.CHAT, opened.body, None)
            say = _Sayer(hand, opened, deltas)
            say(1)
            (call,) = world.cell.desk._calls.values()
            await until(lambda: call.transcript.began)
            world.cell.desk.on_report(hand.vehicle_id)
            assert call.successor is None
            assert call.unprepared_until_ms > 0
            say(len(deltas) - 1)
            hand.say(wire.Tokens(request_id=opened.request_id, attempt=0, seq=len(deltas), deltas=[], usage=usage))
            await asked
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    run(test())


def test_a_vehicle_that_leaves_before_it_is_relieved_is_followed_by_the_one_that_reads(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            first = await world.hand_played("v1")
            request = live(max_tokens=12)
            asked = asyncio.create_task(told(world, request))
            opened = await first.next(wire.Open)
            deltas, _ = pieces(Kind.CHAT, opened.body, None)
            say = _Sayer(first, opened, deltas)
            say(3)
            second = await world.hand_played("v2")
            first.report(risk_15min=0.9)
            await world.until(lambda: world.cell.desk.places.risk("v1") == 0.9)
            world.cell.desk.on_report("v1")
            reading = await second.next(wire.Open)
            assert (reading.prepare, reading.attempt) == (True, 1)
            assert wire.decode_checkpoint(reading.checkpoint).tokens == 3
            say(2)
            first.say(wire.Broken(request_id=opened.request_id, attempt=0, reason=ReturnReason.GUARD))
            going = await second.next(wire.Open)
            assert (going.prepare, going.attempt) == (False, 2)
            assert wire.decode_checkpoint(going.checkpoint).tokens == 5
            rest, usage = pieces(Kind.CHAT, going.body, going.checkpoint)
            _Sayer(second, going, rest)(len(rest))
            second.say(wire.Tokens(request_id=going.request_id, attempt=2, seq=len(rest), deltas=[], usage=usage))
            found = await asked
            assert found.text[0] == "".join(delta.text for delta in deltas)
            assert world.cell.scheduler.vehicles["v2"].live == 0

    run(test())


def test_a_hand_over_takes_no_longer_than_the_message_that_brings_it_about(tmp_path: Path) -> None:
    """Events in, commands out: the next vehicle is told in the very turn in which the old one has given a token.

    So the pause is one token's time and the way to the vehicle and back: it has read everything, and no clock is asked.
    """

    async def test() -> None:
        async with a_world(tmp_path) as world:
            first = await world.hand_played("v1")
            request = live(max_tokens=6)
            asked = asyncio.create_task(told(world, request))
            opened = await first.next(wire.Open)
            deltas, usage = pieces(Kind.CHAT, opened.body, None)
            desk = world.cell.desk
            sent: list[tuple[str, wire.Down]] = []
            name = request.request_id

            def says(vehicle_id: str, attempt: int, seq: int, *said: wire.Delta, bill: Usage | None = None) -> None:
                message = wire.Tokens(
                    request_id=name, attempt=attempt, seq=seq, deltas=list(said), usage=bill, engine="fp"
                )
                desk.on_message(vehicle_id, wire.encode(message))

            for seq in range(3):
                says("v1", 0, seq, deltas[seq])
            await world.hand_played("v2")
            first.report(risk_15min=0.9)
            await world.until(lambda: desk.places.risk("v1") == 0.9)
            world.cell.send = lambda vehicle_id, data: sent.append((vehicle_id, wire.decode(wire.DOWN, data)))  # type: ignore[method-assign]
            desk.on_report("v1")
            (call,) = desk._calls.values()
            assert call.successor is not None
            assert call.successor.vehicle_id == "v2"
            sent.clear()
            says("v1", 0, 3, deltas[3])
            says("v2", 1, 0)
            assert sent == [], "it has read all but one token, which is near enough"
            says("v1", 0, 4, deltas[4])
            (vehicle_id, going), (left, close) = sent
            assert (vehicle_id, left) == ("v2", "v1")
            assert isinstance(going, wire.Open)
            assert isinstance(close, wire.Close)
            assert (going.attempt, going.prepare, close.request_id) == (2, False, name)
            assert going.checkpoint is not None
            assert wire.decode_checkpoint(going.checkpoint).tokens == 5
            says("v1", 0, 5, deltas[5])  # too late: nobody listens any more
            rest, bill = pieces(Kind.CHAT, going.body, going.checkpoint)
            says("v2", 2, 0, *rest)
            says("v2", 2, 1, bill=bill)
            found = await asked
            assert found.text[0] == "".join(delta.text for delta in deltas)
            assert bill.completion_tokens == usage.completion_tokens == 6
            assert (desk.counts.handed_over, desk.counts.stalled, desk.counts.departed) == (1, 0, 0)

    run(test())
