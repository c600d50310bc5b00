"""Drives one engine in a test: submits, waits for events with a deadline, keeps everything that came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from motorpool.agent.runtime.engine import Cancelled, Died, Engine, EngineEvent, Finished, Progressed, Ready, Work
from motorpool.types import Kind
from motorpool.wire import Checkpoint, Delta, encode_checkpoint

E = TypeVar("E")
DEADLINE_S = 120.0  # far beyond what anything here takes, so that a busy machine fails no test


class Trial:
    """An engine with everything that it has said."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[EngineEvent] = []
        self.ended: dict[str, Finished | Cancelled] = {}
        self._changed = asyncio.Event()

    async def start(self) -> Ready:
        await self.engine.start(self._on_events)
        await self.until(lambda: self.of(Ready) or self.of(Died))
        died = self.of(Died)
        assert not died, died
        return self.of(Ready)[-1]

    def _on_events(self, events: list[EngineEvent]) -> None:
        self.events.extend(events)
        self.ended |= {event.key: event for event in events if isinstance(event, Finished | Cancelled)}
        self._changed.set()

    def of(self, kind: type[E], key: str | None = None) -> list[E]:
        return [e for e in self.events if isinstance(e, kind) and (key is None or getattr(e, "key", None) == key)]

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def run(self, *works: Work) -> list[Finished]:
        """Submit attempts and wait for the end of all of them."""
        self.engine.submit(list(works))
        await self.until(lambda: all(work.key in self.ended for work in works))
        done = [self.ended[work.key] for work in works]
        return [event for event in done if isinstance(event, Finished)]

    async def ask(self, body: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Run one body and return what the customer gets."""
        done = (await self.run(work(body, **options)))[0]
        answer: dict[str, Any] = json.loads(done.body)
        return answer

    def deltas(self, key: str) -> list[Delta]:
        return [delta for progressed in self.of(Progressed, key) for delta in progressed.deltas]

    def text(self, key: str, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas(key) if delta.index == index)

    def checkpoint(self, key: str, carried: Checkpoint | None = None) -> Checkpoint:
        """What an agent would hand on: the carried part and everything that has come since."""
        before = carried or Checkpoint(text="", tokens=0)
        entries = json.loads(before.logprobs or b"[]")
        ids = list(before.token_ids)
        for delta in self.deltas(key):
            ids += delta.token_ids
            entries += json.loads(delta.logprobs or b"[]")
        logprobs = json.dumps(entries).encode() if entries else b""
        return Checkpoint(text=before.text + self.text(key), tokens=len(ids), token_ids=ids, logprobs=logprobs)


def work(
    body: dict[str, Any],
    *,
    key: str = "a",
    kind: Kind = Kind.CHAT,
    stream: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Work:
    return Work(
        key=key,
        kind=kind,
        body=json.dumps(body).encode(),
        response_id=f"id-{key}",
        created_s=1_800_000_000,
        stream=stream,
        checkpoint=None if checkpoint is None else encode_checkpoint(checkpoint),
    )


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
