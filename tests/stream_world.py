"""Vehicles for the tests of streams: they answer as the null engine does, token by token, and break when told to."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
from tests.cell_world import DEADLINE_S, MODEL, HandPlayed, World

from motorpool import wire
from motorpool.agent.runtime import null_answer
from motorpool.agent.runtime.engine import Work
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens
from motorpool.types import Kind, ReturnReason, Usage
from motorpool.wire import Delta

SPEC = EngineSpec(backend=Backend.NULL, model=MODEL)
MULTI_BYTE = {"enum": ["née 🚗🚙 d'été — 東京"]}
TOOL = {"type": "function", "function": {"name": "park", "parameters": {"type": "object", "properties": {}}}}
PLACE: dict[str, Any] = {"enum": [{"lot": "née 🚗 d'été", "level": -2, "until": "18:30"}]}
CALLED: dict[str, Any] = {
    "tools": [TOOL, {"type": "function", "function": {"name": "find", "parameters": PLACE}}],
    "tool_choice": {"type": "function", "function": {"name": "find"}},
}
_numbers = itertools.count()


def live(kind: Kind = Kind.CHAT, **fields: Any) -> LiveRequest:
    """A streamed request; its answer does not depend on how often it was asked."""
    name = f"req_{next(_numbers)}"
    asked = {"messages": [{"role": "user", "content": "go on"}]} if kind is Kind.CHAT else {"prompt": "go on"}
    body = {"model": MODEL} | asked | fields
    choices = (body.get("n") or 1) * (len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1)
    return LiveRequest(
        request_id=name, response_id=f"id-{name}", account="acme", kind=kind, model=MODEL, stream=True,
        choices=choices, body=json.dumps(body).encode(), created_s=0,
    )  # fmt: skip


def pieces(kind: Kind, body: bytes, checkpoint: bytes | None) -> tuple[list[Delta], Usage]:
    """Every token that an engine still has to give, each in a delta of its own, choices taking turns; and its bill."""
    work = Work(key="k", kind=kind, body=body, response_id="id", created_s=0, stream=True, checkpoint=checkpoint)
    plan = null_answer.plan(SPEC, work)
    queues: list[list[Delta]] = []
    for index, found in enumerate(plan.choices):
        rest = found[plan.given[index] :]
        deltas = [plan.delta_of(index, [piece], None) for piece in rest]
        if not plan.ended[index]:
            deltas.append(Delta(index=index, text="", finish_reason=plan.reasons[index]))
        queues.append(deltas)
    mixed = [delta for turn in itertools.zip_longest(*queues) for delta in turn if delta is not None]
    return mixed, null_answer.finish(SPEC, plan).usage


class Puppet:
    """A vehicle. ``cuts`` says after how many deltas each request that begins on it ends, and ``how``.

    ``how``: ``breaks`` says so, ``falls silent`` says nothing more, ``loses`` leaves a message out, ``forgets the end``
    tells everything but the last word. An attempt that goes on here runs to its end.
    """

    def __init__(self, hand: HandPlayed) -> None:
        self.hand = hand
        self.cut: int | None = None
        self.how = "breaks"
        self.opened: list[wire.Open] = []
        self.closed: list[str] = []
        self._task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _serve(self) -> None:
        while True:
            message = await self.hand._received.get()
            if isinstance(message, wire.Close):
                self.closed.append(message.request_id)
            elif isinstance(message, wire.Open):
                self.opened.append(message)
                self._answer(message)

    def _answer(self, opened: wire.Open) -> None:
        deltas, usage = pieces(opened.kind, opened.body, opened.checkpoint)
        cut = self.cut if opened.attempt == 0 else None
        seq = itertools.count()
        for delta in deltas[:cut]:
            self._say(opened, next(seq), [delta])
        if cut is None:
            self._say(opened, next(seq), [], usage)
        elif self.how == "breaks":
            self.hand.say(wire.Broken(request_id=opened.request_id, attempt=opened.attempt, reason=ReturnReason.GUARD))
        elif self.how == "loses":
            next(seq)
            self._say(opened, next(seq), deltas[cut:])

    def _say(self, opened: wire.Open, seq: int, deltas: list[Delta], usage: Usage | None = None) -> None:
        self.hand.say(
            wire.Tokens(
                request_id=opened.request_id, attempt=opened.attempt, seq=seq, deltas=deltas, usage=usage, engine="fp"
            )
        )


@asynccontextmanager
async def puppets(world: World, count: int = 2, *, slots: int = 8) -> AsyncIterator[list[Puppet]]:
    made = [Puppet(await world.hand_played(f"v{number}", slots=slots)) for number in range(count)]
    try:
        yield made
    finally:
        for puppet in made:
            await puppet.stop()


class Told:
    """All that the client of a stream was told."""

    def __init__(self) -> None:
        self.text: dict[int, str] = {}
        self.entries: dict[int, list[Any]] = {}
        self.ends: dict[int, list[str]] = {}
        self.calls: dict[int, list[dict[str, Any]]] = {}
        self.usage: Usage | None = None
        self.answer: LiveAnswer | None = None

    def take(self, item: LiveTokens | LiveAnswer) -> None:
        if isinstance(item, LiveAnswer):
            self.answer = item
            return
        for delta in item.deltas:
            self.text[delta.index] = self.text.get(delta.index, "") + delta.text
            self.entries.setdefault(delta.index, []).extend(json.loads(delta.logprobs or b"[]"))
            fragments = json.loads(delta.calls or b"[]")
            self.calls.setdefault(delta.index, []).extend(fragments)
            if delta.finish_reason is not None:
                self.ends.setdefault(delta.index, []).append(delta.finish_reason)
        self.usage = item.usage or self.usage

    @property
    def bill(self) -> tuple[int, int]:
        assert self.usage is not None
        return self.usage.prompt_tokens, self.usage.completion_tokens

    def same_as(self, other: Told) -> bool:
        mine = (self.text, self.entries, self.called, self.ends, self.bill)
        return mine == (other.text, other.entries, other.called, other.ends, other.bill)

    @property
    def called(self) -> dict[int, list[Any]]:
        """The fragments of calls without their ids, which are made anew for each answer."""
        return {index: [each | {"id": None} for each in found] for index, found in self.calls.items()}


async def told(world: World, request: LiveRequest, seen: Callable[[Told], None] = lambda told: None) -> Told:
    out = Told()
    async with asyncio.timeout(DEADLINE_S):
        async for item in world.cell.live(request):
            out.take(item)
            seen(out)
    return out


def official(world: World, **options: Any) -> openai.AsyncOpenAI:
    """The official client, in this process."""
    transport = httpx.ASGITransport(app=world.api)
    # The client asks for its own fork of httpx, which takes the original's clients as they are.
    client = httpx.AsyncClient(transport=transport, timeout=DEADLINE_S)
    options.setdefault("max_retries", 0)
    return openai.AsyncOpenAI(base_url="http://cell/v1", api_key=world.key, http_client=client, **options)  # type: ignore[arg-type]


async def until(condition: Callable[[], object]) -> None:
    """Let everything else run until something that no transaction brings about has happened."""
    turn = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            passed = turn.create_future()
            turn.call_soon(passed.set_result, None)
            await passed
