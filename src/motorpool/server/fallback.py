"""The operator's paid endpoint: any server with OpenAI's API, asked when no vehicle can serve.

Used only before the first byte of an answer: no foreign server continues what a vehicle began. What it answers is
billed at the price that the operator set for it, no owner is paid, and the customer sees in ``usage.motorpool`` that no
vehicle made it. Its own troubles reach the customer as "nothing can serve now", never as theirs.

Decides: nothing; ``server.live`` says when. Must not: log or keep bodies, or show the key to anybody else. Called by:
``server.live``; ``server.main`` makes it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import httpx
import msgspec
from msgspec import Raw

from motorpool.core import events as ev
from motorpool.core.pricing import Price
from motorpool.core.streams import is_own_fault
from motorpool.errors import CapacityError, SetupError
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens
from motorpool.server.live_call import About, LastTokens, WholeAnswer
from motorpool.types import Kind, Usage
from motorpool.wire import Delta

CONNECT_S: Final = 5.0
MAX_LINE_BYTES: Final = 4 * 1024 * 1024
MAX_BODY_BYTES: Final = 64 * 1024 * 1024
RETRY_MS: Final = 5_000
_OPERATORS: Final = frozenset({401, 402, 403, 404, 405})  # its key, its account or its address is wrong
_ABOUT: Final = About(fallback=True)
_DATA: Final = b"data:"
Post = Callable[[ev.SchedulerEvent], None]


class FallbackModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands in for one of our models there, and what a million tokens of it cost the customer."""

    name: str
    input_micro: int
    output_micro: int


class FallbackSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to ask. ``models`` are by our ids; others are never asked for. ``url`` ends in ``/v1`` as a rule."""

    url: str
    api_key: str
    models: dict[str, FallbackModel]
    silence_s: float = 60.0  # between two pieces of an answer


def read_settings(data: bytes) -> FallbackSettings:
    """The operator's settings from JSON; raise SetupError that names the place, and no value, if they are none."""
    try:
        found = msgspec.json.decode(data, type=FallbackSettings)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"the settings of the paid endpoint cannot be read: {error}", param="fallback") from error
    if not found.url.startswith(("https://", "http://")):
        raise SetupError("the paid endpoint's url must begin with https:// or http://", param="fallback")
    if any(model.input_micro < 0 or model.output_micro < 0 for model in found.models.values()):
        raise SetupError("a price of the paid endpoint is below zero", param="fallback")
    return found


class _UsageSeen(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class _ChatDelta(msgspec.Struct):
    content: str | None = None
    tool_calls: list[Raw] | None = None


class _Logprobs(msgspec.Struct):
    content: Raw = Raw(b"null")
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _ChatDelta | None = None
    text: str | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _UsageSeen | None = None
    system_fingerprint: str | None = None
    error: Raw | None = None


_chunk = msgspec.json.Decoder(_Chunk)
_fields = msgspec.json.Decoder(dict[str, Raw])
_seen = msgspec.json.Decoder(_UsageSeen)
_encode = msgspec.json.Encoder().encode


class PaidEndpoint:
    """One endpoint. ``transport`` is for tests."""

    def __init__(self, settings: FallbackSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._settings = settings
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {settings.api_key}"},
            timeout=httpx.Timeout(settings.silence_s, connect=CONNECT_S),
            transport=transport,
            trust_env=False,
        )

    def serves(self, model: str) -> bool:
        """Whether it has a model that stands in for this one."""
        return model in self._settings.models

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    async def answer(self, request: LiveRequest, post: Post) -> LiveAnswer:
        """Have it answer a plain request; raise CapacityError if it cannot now."""
        try:
            async with self._post(request, stream=False) as response:
                body = await _whole(response)
                self._judge(response.status_code)
        except httpx.HTTPError as error:
            raise _trouble() from error
        if response.status_code >= 400:
            return LiveAnswer(status=response.status_code, body=body)
        try:
            fields = _fields.decode(body)
            usage = _seen.decode(fields.get("usage", Raw(b"{}")))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _trouble() from error
        self._bill(request, post, usage.prompt_tokens, usage.completion_tokens)
        fields |= {"model": Raw(_encode(request.model))}
        if "id" in fields:
            fields["id"] = Raw(_encode(request.response_id))
        return WholeAnswer(status=200, body=_encode(fields), about=_ABOUT)

    async def stream(self, request: LiveRequest, post: Post) -> AsyncGenerator[LiveTokens | LiveAnswer, None]:
        """Have it answer; raise CapacityError before the first item if it cannot now. A plain request as ``answer``."""
        if not request.stream:
            yield await self.answer(request, post)
            return
        given, billed = 0, False
        engine = ""
        usage: _UsageSeen | None = None
        try:
            async with self._post(request, stream=True) as response:
                self._judge(response.status_code)
                if response.status_code >= 400:
                    yield LiveAnswer(status=response.status_code, body=await _whole(response))
                    return
                async for data in _events(response):
                    chunk = _chunk.decode(data)
                    if chunk.error is not None:
                        raise _trouble()
                    usage = chunk.usage or usage
                    engine = chunk.system_fingerprint or engine
                    deltas = [_delta(choice) for choice in chunk.choices]
                    given += sum(bool(delta.text or delta.calls) for delta in deltas)
                    if deltas:
                        yield LiveTokens(deltas=deltas, usage=None, engine=engine)
            counted = usage or _UsageSeen(completion_tokens=given)
            self._bill(request, post, counted.prompt_tokens, counted.completion_tokens)
            billed = True
            end = Usage(prompt_tokens=counted.prompt_tokens, completion_tokens=counted.completion_tokens)
            yield LastTokens(deltas=[], usage=end, engine=engine, about=_ABOUT)
        except (httpx.HTTPError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _trouble() from error
        finally:
            if given and not billed:  # somebody left in the middle: paid is what was delivered, the prompt is free
                self._bill(request, post, 0, given)

    def _post(self, request: LiveRequest, *, stream: bool) -> AbstractAsyncContextManager[httpx.Response]:
        """Ask there for what the customer asked for here."""
        model = self._settings.models[request.model]
        fields = _fields.decode(request.body)
        fields |= {"model": Raw(_encode(model.name)), "stream": Raw(b"true" if stream else b"false")}
        for name in ("service_tier", "stream_options"):
            fields.pop(name, None)
        if stream:
            fields["stream_options"] = Raw(b'{"include_usage":true}')
        elif request.kind is Kind.EMBEDDING:
            del fields["stream"]
        url = f"{self._settings.url.rstrip('/')}/{request.kind.value}"
        return self._client.stream("POST", url, content=_encode(fields), headers={"Content-Type": "application/json"})

    def _judge(self, status: int) -> None:
        if status >= 400 and (status in _OPERATORS or not is_own_fault(status)):
            raise _trouble()

    def _bill(self, request: LiveRequest, post: Post, prompt_tokens: int, completion_tokens: int) -> None:
        model = self._settings.models[request.model]
        price = Price(input_micro=model.input_micro, output_micro=model.output_micro, owner_share_bp=0)
        post(
            ev.LiveEnded(
                cause_id=request.request_id,
                request_id=request.request_id,
                account=request.account,
                price=price,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                finisher="",
                shares=[],
            )
        )


def _delta(choice: _Choice) -> Delta:
    text = choice.text if choice.delta is None else choice.delta.content
    calls = None if choice.delta is None else choice.delta.tool_calls
    return Delta(
        index=choice.index,
        text=text or "",
        logprobs=_entries(choice.logprobs),
        finish_reason=choice.finish_reason,
        calls=_encode(calls) if calls else b"",
    )


def _entries(logprobs: _Logprobs | None) -> bytes:
    """The chat API's entries, also of a completion's parallel arrays."""
    if logprobs is None:
        return b""
    if logprobs.tokens:
        tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
        return _encode(
            [
                {
                    "token": token,
                    "logprob": value or 0.0,
                    "bytes": list(token.encode()),
                    "top_logprobs": [{"token": name, "logprob": each} for name, each in (top or {}).items()],
                }
                for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=False)
            ]
        )
    content = bytes(logprobs.content)
    return b"" if content in (b"null", b"[]") else content


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each event until ``[DONE]``."""
    buffer = b""
    async for piece in response.aiter_bytes():
        *lines, buffer = (buffer + piece).split(b"\n")
        if len(buffer) > MAX_LINE_BYTES:
            raise _trouble()
        for line in lines:
            if line.startswith(_DATA):
                data = line[len(_DATA) :].strip()
                if data.startswith(b"[DONE]"):
                    return
                yield data


async def _whole(response: httpx.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise _trouble()
    return bytes(body)


def _trouble() -> CapacityError:
    return CapacityError("no vehicle can serve now, and the fallback cannot either; try again", retry_after_ms=RETRY_MS)
