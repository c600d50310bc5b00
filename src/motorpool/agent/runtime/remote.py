"""Any OpenAI-compatible server as an engine: what runs beside the agent, such as vLLM, Ollama or llama.cpp's server.

Decides: how an attempt becomes a request to that server and its answer ours. Must not: hold the key longer than needed
for the header, or pass on the server's own troubles as the customer's. Called by: ``host``.

Limits, as the server is not ours: it computes on while this process is frozen and stops only when the connection is
closed, so an agent kills this engine instead of freezing it. Token ids are not known (-1), and a chunk without logprobs
counts as one token until the server's usage arrives. A chat answer is continued from its text, as a last assistant
message with ``continue_final_message`` (vLLM, llama.cpp); a server that ignores this may begin a new sentence instead.
A text completion is continued by adding the text to the prompt. Prompts of token ids and requests for several choices
start again, and a tool call that has begun is left to other engines. Embeddings are asked for as plain numbers, which
every server knows. ``echo`` of a prompt that is text is done here, since the server would echo what was carried as
well. The prompt tokens of a continued answer are the reported ones less the carried ones.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import aiohttp
import msgspec

from motorpool.agent.runtime import answer, embedding
from motorpool.agent.runtime.answer import Choice, Entry
from motorpool.agent.runtime.backend import Emit
from motorpool.agent.runtime.calls import Calls
from motorpool.agent.runtime.engine import Cancelled, EngineEvent, Progressed, Ready, Work
from motorpool.agent.runtime.flow import Flow, Piece
from motorpool.agent.runtime.request import Body, ChatBody, CompletionBody, parse, stops_of
from motorpool.agent.runtime.spec import REMOTE_SILENCE_S, EngineSpec
from motorpool.errors import CallerError, CapacityError, EngineError, MotorpoolError, SetupError
from motorpool.types import Kind, Usage
from motorpool.wire import Checkpoint, Delta

CONNECT_S: Final = 10.0
DRAIN_S: Final = 0.1  # after the end of an answer
READ_BYTES: Final = 256 * 1024  # what is read ahead; then the server waits
MAX_LINE_BYTES: Final = 8 * 1024 * 1024  # of one event
MAX_ERROR_BYTES: Final = 64 * 1024
MAX_VECTORS_BYTES: Final = 64 * 1024 * 1024
MAX_TOKENS: Final = 1 << 24  # of one answer: more than any model makes
_OURS: Final = frozenset({401, 403, 404, 405})  # the operator's key or address is wrong, not the customer's request


class RemoteBackend:
    """Runs ``slots`` requests at a time on a server."""

    def __init__(self, spec: EngineSpec, emit: Emit) -> None:
        self._spec = spec
        self._emit = emit
        self._client = aiohttp.ClientSession(
            headers=_headers(spec),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=REMOTE_SILENCE_S),
            connector=aiohttp.TCPConnector(limit=spec.slots + 1),
            read_bufsize=READ_BYTES,
        )
        self._fingerprint = answer.fingerprint("remote", spec.url, spec.remote_model or spec.model)
        self._slots = spec.slots
        self._queue: deque[Work] = deque()
        self._running: dict[str, asyncio.Task[None]] = {}

    async def load(self) -> Ready:
        """Ask the server for its models: whoever answers, even with an error, is there."""
        try:
            async with self._client.get(_address(self._spec, "models"), allow_redirects=False) as response:
                status = response.status
        except aiohttp.ClientError as error:
            raise EngineError(f"no server answers at {self._spec.url} ({type(error).__name__}); start it") from error
        if status in {401, 403}:
            raise SetupError(f"the server at {self._spec.url} refuses the key in {self._spec.api_key_env or 'no'!r}")
        return Ready(
            model=self._spec.model,
            slots=self._spec.slots,
            context_tokens=self._spec.context_tokens,
            fingerprint=self._fingerprint,
        )

    def submit(self, work: list[Work]) -> None:
        """Queue attempts."""
        self._queue.extend(work)
        self._fill()

    def cancel(self, keys: list[str]) -> None:
        """Close the connections of attempts, drop queued ones."""
        wanted = set(keys)
        queued = [work.key for work in self._queue if work.key in wanted]
        if queued:
            self._queue = deque(work for work in self._queue if work.key not in wanted)
            self._emit([Cancelled(key=key) for key in queued])
        for key in wanted & self._running.keys():
            self._running[key].cancel()

    def limit(self, slots: int) -> None:
        """Have fewer requests at a time, or more again."""
        self._slots = max(1, min(slots, self._spec.slots))
        self._fill()

    def _fill(self) -> None:
        while self._queue and len(self._running) < self._slots:
            work = self._queue.popleft()
            task = asyncio.ensure_future(self._run(work))
            self._running[work.key] = task
            task.add_done_callback(lambda task, key=work.key: self._over(key, task))  # type: ignore[misc]  # binds the key

    def _over(self, key: str, task: asyncio.Task[None]) -> None:
        del self._running[key]
        if task.cancelled():  # before its first step, so that it could not say so by itself
            self._emit([Cancelled(key=key)])
        self._fill()

    async def _run(self, work: Work) -> None:
        event: EngineEvent
        try:
            if work.kind is Kind.EMBEDDING:
                event = await _embed(self._client, self._spec, work)
            else:
                event = await _Call(self._client, self._spec, work, self._fingerprint, self._emit).run()
        except asyncio.CancelledError:
            event = Cancelled(key=work.key)
        except (CallerError, CapacityError) as error:
            event = answer.failed(work.key, error)
        except MotorpoolError as error:
            event = answer.failed(work.key, MotorpoolError(error.message, code="engine_error"))
        except aiohttp.ClientError as error:
            trouble = f"the connection to the model server broke ({type(error).__name__})"
            event = answer.failed(work.key, MotorpoolError(trouble, code="engine_error"))
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
            trouble = "the model server sent what no OpenAI-compatible server sends"
            event = answer.failed(work.key, MotorpoolError(trouble, code="engine_error"))
        except Exception as error:  # noqa: BLE001  # a foreign library may raise anything; the attempt must end
            trouble = f"the request to the model server failed ({type(error).__name__})"
            event = answer.failed(work.key, MotorpoolError(trouble, code="engine_error"))
        self._emit([event])


class _Part:
    """One choice while it comes in."""

    def __init__(self, stops: tuple[str, ...], carried: Checkpoint | None, name: str) -> None:
        self.flow = Flow(stops, carried.text if carried else "")
        self.entries = answer.unpack_entries(carried.logprobs) if carried else []
        self.calls = Calls(carried.calls if carried else b"", name)
        self.tokens = 0
        self.reason: str | None = None


class _Call:
    """One attempt."""

    def __init__(
        self, client: aiohttp.ClientSession, spec: EngineSpec, work: Work, fingerprint: str, emit: Emit
    ) -> None:
        self._client = client
        self._spec = spec
        self._work = work
        self._fingerprint = fingerprint
        self._emit = emit
        self._body = parse(work.kind, work.body)
        self._carried = self._resumable(self._body)
        self._limit = self._body.limit_tokens
        self._parts: dict[int, _Part] = {}
        self._usage: dict[str, Any] = {}

    async def run(self) -> EngineEvent:
        carried = self._carried
        if carried is not None:
            first = self._part(0)
            if first.flow.stopped:
                first.reason = "stop"
            elif self._limit is not None and carried.tokens >= self._limit:
                first.reason = "length"
        if not any(part.reason for part in self._parts.values()):
            await self._stream(self._request())
        choices = [self._choice(index) for index in sorted(self._parts)]
        if not choices:
            raise EngineError("the model server ended an answer before it began")
        return answer.finished(self._work, self._spec.model, self._fingerprint, choices, self._billed())

    def _resumable(self, body: Body) -> Checkpoint | None:
        count = (body.n or 1) * (1 if isinstance(body, ChatBody) else len(body.prompts))
        if count > 1 and self._work.stream and any(answer.carried_choices(self._work, count)):
            raise CapacityError("this engine cannot continue several choices")
        if (body.n or 1) > 1:
            return None
        if isinstance(body, CompletionBody) and (len(body.prompts) > 1 or not isinstance(body.prompts[0], str)):
            return None
        found = answer.carried(self._work)
        if found is not None and found.calls:
            raise CapacityError("this engine cannot continue a tool call")
        return found

    def _request(self) -> dict[str, Any]:
        request: dict[str, Any] = msgspec.json.decode(self._work.body)
        request["model"] = self._spec.remote_model or self._spec.model
        request["stream"] = True
        request["stream_options"] = {"include_usage": True}
        carried, body = self._carried, self._body
        if self._limit is not None:
            fields = ["max_tokens", "max_completion_tokens"] if isinstance(body, ChatBody) else ["max_tokens"]
            left = self._limit - (carried.tokens if carried else 0)
            # Servers differ in which one counts, and in what they take for a completion without any.
            request |= {field: left for field in fields if request.get(field) is not None} or {fields[0]: left}
        if self._echoes:
            request["echo"] = False
        if isinstance(body, ChatBody):
            request["messages"] = body.messages
        if carried is None or not carried.text:
            return request
        if isinstance(body, ChatBody):
            request["messages"] = [*body.messages, {"role": "assistant", "content": carried.text}]
            request |= {"continue_final_message": True, "add_generation_prompt": False}
        else:
            request["prompt"] = f"{body.prompts[0]}{carried.text}"
        return request

    @property
    def _echoes(self) -> bool:
        """Whether the prompts shall stand in the answer and are texts, so that it is done here."""
        body = self._body
        return isinstance(body, CompletionBody) and bool(body.echo) and isinstance(body.prompts[0], str)

    def _echo(self, index: int) -> str:
        if not self._echoes:
            return ""
        assert isinstance(self._body, CompletionBody)
        return str(self._body.prompts[min(index // (self._body.n or 1), len(self._body.prompts) - 1)])

    async def _stream(self, request: dict[str, Any]) -> None:
        content = msgspec.json.encode(request)
        headers = {"Content-Type": "application/json"}
        url = _address(self._spec, self._work.kind.value)
        async with self._client.post(url, data=content, headers=headers, allow_redirects=False) as response:
            if response.status >= 400:
                raise _refused(response.status, await _beginning(response.content))
            async with aclosing(_lines(response.content)) as lines:
                async for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data.startswith(b"[DONE]"):
                        break
                    self._take(msgspec.json.decode(data))
                    if self._parts and all(part.flow.stopped for part in self._parts.values()) and self._single:
                        return
            await _drain(response.content)

    @property
    def _single(self) -> bool:
        return (self._body.n or 1) == 1 and (isinstance(self._body, ChatBody) or len(self._body.prompts) == 1)

    def _part(self, index: int) -> _Part:
        if index not in self._parts:
            self._parts[index] = _Part(stops_of(self._body), self._carried, f"{self._work.response_id}/{index}")
        return self._parts[index]

    def _take(self, chunk: dict[str, Any]) -> None:
        if chunk.get("error"):
            raise EngineError("the model server failed in the middle of an answer")
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or []:
            part = self._part(int(choice.get("index", 0)))
            delta = choice.get("delta") or {}
            entries = _entries(choice.get("logprobs")) if self._body.top is not None else []
            text = delta.get("content") or choice.get("text") or ""
            if text:
                ids = [-1] * max(1, len(entries))
                self._give_out(choice["index"], part.flow.feed(Piece(text=text, ids=ids, entries=entries)), None)
            if delta.get("tool_calls"):
                self._give_calls(choice["index"], part.calls.feed(delta["tool_calls"]))
            part.reason = choice.get("finish_reason") or part.reason

    def _give_out(self, index: int, pieces: list[Piece], finish_reason: str | None) -> None:
        if not pieces and finish_reason is None:
            return
        part = self._parts[index]
        entries: list[Entry] = [entry for piece in pieces for entry in piece.entries]
        ids = [number for piece in pieces for number in piece.ids]
        part.entries += entries
        part.tokens += len(ids)
        delta = Delta(
            index=index,
            text="".join(piece.text for piece in pieces),
            token_ids=ids,
            logprobs=answer.pack_entries(entries),
            finish_reason=finish_reason,
        )
        if self._work.stream or self._single:  # else it began anew, and what was carried is worth more than this
            self._emit([Progressed(key=self._work.key, deltas=[delta])])

    def _give_calls(self, index: int, calls: bytes) -> None:
        if calls:
            self._parts[index].tokens += 1
            delta = Delta(index=index, text="", token_ids=[-1], calls=calls)
            self._emit([Progressed(key=self._work.key, deltas=[delta])])

    def _choice(self, index: int) -> Choice:
        part = self._parts[index]
        if part.reason is None and not part.flow.stopped:
            raise EngineError("the model server ended an answer in the middle")
        reason = "stop" if part.flow.stopped else str(part.reason)
        self._give_out(index, part.flow.end(), reason)
        return Choice(
            index=index,
            text=part.flow.text,
            finish_reason=reason,
            entries=part.entries if self._body.top is not None else None,
            tool_calls=part.calls.whole(),
            echo=self._echo(index),
        )

    def _billed(self) -> Usage:
        carried = 0 if self._carried is None else self._carried.tokens
        made = sum(part.tokens for part in self._parts.values())
        prompt = int(self._usage.get("prompt_tokens", 0))
        details = self._usage.get("prompt_tokens_details") or {}
        prompt = within(prompt - carried, MAX_TOKENS)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=within(carried + int(self._usage.get("completion_tokens", made)), MAX_TOKENS),
            cached_tokens=within(int(details.get("cached_tokens") or 0), prompt),
            carried_tokens=carried,
        )


async def _embed(client: aiohttp.ClientSession, spec: EngineSpec, work: Work) -> EngineEvent:
    """Have the server make embeddings, whatever form it can give them in."""
    body = embedding.parse(work.body)
    content = msgspec.json.encode(
        {"model": spec.remote_model or spec.model, "input": body.inputs, "encoding_format": "float"}
    )
    headers = {"Content-Type": "application/json"}
    url = _address(spec, work.kind.value)
    async with client.post(url, data=content, headers=headers, allow_redirects=False) as response:
        if response.status >= 400:
            raise _refused(response.status, await _beginning(response.content))
        data = await _whole(response.content)
    found = _remote_embeddings.decode(data)
    items = sorted(found.data, key=lambda item: item.index)
    if [item.index for item in items] != list(range(len(body.inputs))):
        raise EngineError("the model server left out an embedding")
    vectors = [struct.pack(f"<{len(item.embedding)}f", *item.embedding) for item in items]
    usage = Usage(prompt_tokens=within(int(found.usage.get("prompt_tokens") or 0), MAX_TOKENS))
    return embedding.finished(work, spec.model, body, vectors, usage)


class _RemoteVector(msgspec.Struct, frozen=True):
    """One vector of a server's answer."""

    index: int
    embedding: list[float]


class _RemoteEmbeddings(msgspec.Struct, frozen=True):
    """What is read of a server's answer."""

    data: list[_RemoteVector]
    usage: dict[str, Any] = {}


_remote_embeddings: Final = msgspec.json.Decoder(_RemoteEmbeddings)


async def _whole(content: aiohttp.StreamReader) -> bytes:
    """All of a response. Raises EngineError over MAX_VECTORS_BYTES."""
    data = bytearray()
    async for piece in content.iter_any():
        data += piece
        if len(data) > MAX_VECTORS_BYTES:
            raise EngineError("the model server sent more embeddings than were asked for")
    return bytes(data)


def _address(spec: EngineSpec, route: str) -> str:
    return f"{spec.url.rstrip('/')}/{route}"


async def _lines(content: aiohttp.StreamReader) -> AsyncGenerator[bytes]:
    """Lines with their ends, which may be LF, CR or both, as events allow. Raises EngineError over MAX_LINE_BYTES."""
    rest = b""
    async for data in content.iter_any():
        lines = (rest + data).splitlines(keepends=True)
        rest = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        for line in lines:
            yield line
        if len(rest) > MAX_LINE_BYTES:
            raise EngineError("the model server sent a line that is too long")
    yield rest


async def _beginning(content: aiohttp.StreamReader) -> bytes:
    """The first MAX_ERROR_BYTES of a response, as far as it goes."""
    data = b""
    async for piece in content.iter_any():
        data += piece
        if len(data) >= MAX_ERROR_BYTES:
            break
    return data[:MAX_ERROR_BYTES]


async def _drain(content: aiohttp.StreamReader) -> None:
    """Read on to the end of a response whose answer is complete: only then can its connection serve the next one."""
    try:
        async with asyncio.timeout(DRAIN_S):
            async for _ in content.iter_any():
                pass
    except TimeoutError:
        return  # this server keeps it open; leaving the response closes the connection


def within(count: int, most: int) -> int:
    """A count that a foreign server gave, in the bounds of what can be."""
    return max(0, min(count, most))


def _headers(spec: EngineSpec) -> dict[str, str]:
    if not spec.api_key_env:
        return {}
    key = os.environ.get(spec.api_key_env)
    if not key:
        raise SetupError(f"the environment variable {spec.api_key_env}, which should hold the server's key, is empty")
    return {"Authorization": f"Bearer {key}"}


def _entries(logprobs: Any) -> list[Entry]:
    """Logprob entries of a chunk, from either of OpenAI's two shapes, without what servers add."""
    if not isinstance(logprobs, dict):
        return []
    if "content" in logprobs:
        return [
            _entry(e) | {"top_logprobs": [_entry(t) for t in e.get("top_logprobs") or []]}
            for e in logprobs["content"] or []
        ]
    tokens = logprobs.get("tokens") or []
    values = logprobs.get("token_logprobs") or [0.0] * len(tokens)
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    return [
        _entry({"token": token, "logprob": value})
        | {"top_logprobs": [_entry({"token": t, "logprob": v}) for t, v in (top or {}).items()]}
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]


def _entry(raw: dict[str, Any]) -> Entry:
    token = str(raw["token"])
    given = raw.get("bytes")
    return {"token": token, "logprob": raw["logprob"], "bytes": list(token.encode()) if given is None else given}


def _refused(status: int, data: bytes) -> MotorpoolError:
    """Whose fault a refusal is: the customer's, the operator's, or nobody's."""
    if status in {408, 429} or status == 503:
        return CapacityError("the model server has too much to do", code="engine_overloaded")
    if status in _OURS or status >= 500:
        return EngineError(f"the model server answered {status}")
    try:
        said = msgspec.json.decode(data)["error"]
        message, code, param = str(said["message"])[:1000], said.get("code"), said.get("param")
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return CallerError(f"the model server refused this request ({status})")
    full = said.get("type") == "exceed_context_size_error" or code == "context_length_exceeded"
    if full:
        return CallerError(message, code="context_length_exceeded", param=param or "messages")
    return CallerError(message, code=code if isinstance(code, str) else None, param=param)
