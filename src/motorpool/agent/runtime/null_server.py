"""The null engine behind OpenAI's HTTP interface: ``python -m motorpool.agent.runtime.null_server --port P --rate R``.

Decides nothing. Must not: be used to serve customers; it has no keys and no limits. It is what gateways are measured
against, and what the remote engine is tested with, so it does as little as possible for each request.
Called by: benchmarks and tests. Prints one line of JSON, ``{"base_url": ...}``, when it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import msgspec
import uvicorn

from motorpool.agent.runtime import answer, null_answer
from motorpool.agent.runtime.answer import usage_object
from motorpool.agent.runtime.engine import Work
from motorpool.agent.runtime.flow import Piece
from motorpool.agent.runtime.null_answer import Plan, Quick
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.errors import MotorpoolError, NotFoundError
from motorpool.types import Kind, Usage

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_KINDS: Final = {f"/v1/{kind.value}": kind for kind in Kind}
_JSON: Final = (b"content-type", b"application/json")
_SSE: Final = (b"content-type", b"text/event-stream; charset=utf-8")
CREATED_S: Final = 1_735_689_600  # the same in every answer, so that answers can be compared
_encode = msgspec.json.Encoder().encode


class _Options(msgspec.Struct):
    """The two fields of a body that decide how it is answered."""

    stream: bool | None = None
    stream_options: dict[str, Any] | None = None


_options = msgspec.json.Decoder(_Options)


class NullServer:
    """An ASGI application."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._quick = Quick(spec)
        self._numbers = itertools.count()
        model = {"id": spec.model, "object": "model", "created": CREATED_S, "owned_by": "motorpool"}
        self._models = _encode({"object": "list", "data": [model]})
        self._fingerprint = null_answer.name_of(spec)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served here")  # uvicorn takes it as "no lifespan"
        path = scope["path"]
        kind = _KINDS.get(path)
        try:
            if kind is not None and scope["method"] == "POST":
                await self._answer(kind, await _body(receive), send)
            elif path == "/v1/models":
                await _whole(send, 200, self._models)
            elif path == "/health":
                await _whole(send, 200, b'{"status":"ok"}')
            else:
                raise NotFoundError("there is no such route")
        except MotorpoolError as error:
            await _whole(send, error.status, _encode(error.envelope()))

    async def _answer(self, kind: Kind, body: bytes, send: Send) -> None:
        number = f"chatcmpl-{next(self._numbers)}"
        work = Work(key=number, kind=kind, body=body, response_id=number, created_s=CREATED_S)
        if kind is Kind.EMBEDDING:
            embedded = null_answer.embed(self._spec, work)
            await _whole(send, embedded.status, embedded.body)
            return
        rate = self._spec.rate_tokens_per_s
        try:
            options = _options.decode(body)
        except msgspec.DecodeError:
            options = _Options()  # ``plan`` says what is wrong
        if not options.stream:
            done = self._quick.finish(work) or null_answer.finish(self._spec, null_answer.plan(self._spec, work))
            if rate > 0:
                await asyncio.sleep(done.usage.completion_tokens / rate)
            await _whole(send, done.status, done.body)
            return
        plan = null_answer.plan(self._spec, work)
        with_usage = bool((options.stream_options or {}).get("include_usage"))
        await send({"type": "http.response.start", "status": 200, "headers": [_SSE]})
        await self._stream(plan, with_usage=with_usage, send=send)

    async def _stream(self, plan: Plan, *, with_usage: bool, send: Send) -> None:
        chat = plan.work.kind is Kind.CHAT
        rate = self._spec.rate_tokens_per_s
        if chat:
            role = {"role": "assistant", "content": "", "refusal": None}
            for index in range(len(plan.choices)):
                await self._event(plan, [_chunk(index, {"delta": role})], send, with_usage=with_usage)
        for index, pieces in enumerate(plan.choices):
            if plan.echoes[index]:
                await self._event(plan, [_chunk(index, {"text": plan.echoes[index]})], send, with_usage=with_usage)
            for piece in pieces:
                if rate > 0:
                    await asyncio.sleep(1 / rate)
                await self._event(plan, [_said(piece, index, chat=chat)], send, with_usage=with_usage)
            last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
            await self._event(plan, [_chunk(index, last, plan.reasons[index])], send, with_usage=with_usage)
        if with_usage:
            usage = usage_object(Usage(prompt_tokens=plan.prompt_tokens, completion_tokens=plan.total))
            await self._event(plan, [], send, with_usage=True, usage=usage)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _event(
        self, plan: Plan, choices: list[Any], send: Send, *, with_usage: bool, usage: dict[str, Any] | None = None
    ) -> None:
        chunk: dict[str, Any] = {
            "id": plan.work.response_id,
            "object": "chat.completion.chunk" if plan.work.kind is Kind.CHAT else "text_completion",
            "created": CREATED_S,
            "model": self._spec.model,
            "choices": choices,
            "system_fingerprint": self._fingerprint,
        }
        if with_usage:
            chunk["usage"] = usage
        await send({"type": "http.response.body", "body": b"data: %b\n\n" % _encode(chunk), "more_body": True})


def _said(piece: Piece, index: int, *, chat: bool) -> dict[str, Any]:
    logprobs: Any = None
    if piece.entries and chat:
        logprobs = {"content": piece.entries, "refusal": None}
    elif piece.entries:
        logprobs = answer.parallel(piece.entries, 0)
    return _chunk(index, {"delta": {"content": piece.text}} if chat else {"text": piece.text}, logprobs=logprobs)


def _chunk(index: int, said: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}


async def _body(receive: Receive) -> bytes:
    message = await receive()
    body: bytes = message.get("body", b"")
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    return body


async def _whole(send: Send, status: int, body: bytes) -> None:
    headers = [_JSON, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main(arguments: list[str]) -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description="The null engine behind OpenAI's HTTP interface, for benchmarks.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one")
    parser.add_argument("--rate", type=float, default=0.0, help="tokens per second of each request; 0: at once")
    parser.add_argument("--model", default="null", help="the model's id")
    parser.add_argument("--tokens", type=int, default=16, help="length of an answer whose request names none")
    parser.add_argument("--context", type=int, default=8192, help="words that prompt and answer may have together")
    options = parser.parse_args(arguments)
    spec = EngineSpec(
        backend=Backend.NULL,
        model=options.model,
        rate_tokens_per_s=options.rate,
        default_tokens=options.tokens,
        context_tokens=options.context,
    )
    listener = socket.create_server((options.host, options.port), backlog=2048)
    base_url = f"http://{options.host}:{listener.getsockname()[1]}/v1"
    sys.stdout.write(_encode({"base_url": base_url}).decode() + "\n")
    sys.stdout.flush()
    config = uvicorn.Config(
        NullServer(spec), log_level="warning", access_log=False, lifespan="off", loop="uvloop", http="httptools"
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1:])
