"""Chat completions and completions: one request, answered plainly or as a stream of server-sent events.

Checks the request, hands it to the cell, and relays what comes. An error before the first byte has its own HTTP status;
later ones are an event in the stream. A client that goes away ends the work on the vehicle.

Called by: ``app``. Must not: choose vehicles, keep or log what was asked or answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import msgspec

from motorpool.core.streams import name_of, tier_of
from motorpool.errors import CapacityError, ErrorEnvelope, MotorpoolError, VehicleError
from motorpool.server.cell import Cell, LiveAnswer, LiveRequest, LiveTokens
from motorpool.server.live_call import About, LastTokens, WholeAnswer
from motorpool.server.openai import chunks
from motorpool.server.openai.chunks import Chunks
from motorpool.server.openai.exchange import Attendance, ClientGoneError, Exchange, encode_error, retry_headers
from motorpool.server.openai.footprints import NAME, with_footprint
from motorpool.server.openai.requests import ChatRequest, CompletionRequest, Request, read_request
from motorpool.server.openai.settings import ApiSettings
from motorpool.types import Kind, Usage

_log = logging.getLogger(__name__)
_EVENT_STREAM = b"text/event-stream; charset=utf-8"
_STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
_RETRY = tuple(retry_headers(CapacityError("try again")))
_DATA = b"data: "
_ORDINARY = About()
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_envelope = msgspec.json.Decoder(ErrorEnvelope)


class LiveRoutes:
    """The two routes that run a model now."""

    def __init__(self, cell: Cell, settings: ApiSettings) -> None:
        self._cell = cell
        self._settings = settings

    async def chat(self, exchange: Exchange, _: str) -> None:
        """POST /v1/chat/completions."""
        await self._serve(exchange, Kind.CHAT)

    async def completion(self, exchange: Exchange, _: str) -> None:
        """POST /v1/completions."""
        await self._serve(exchange, Kind.COMPLETION)

    async def _serve(self, exchange: Exchange, kind: Kind) -> None:
        body = await exchange.json(self._settings.max_body_bytes)
        request = read_request(kind, body)
        self._cell.catalogue.get(request.model)
        live = LiveRequest(
            request_id=exchange.request_id,
            response_id=("chatcmpl-" if kind is Kind.CHAT else "cmpl-") + exchange.request_id.removeprefix("req_"),
            account=exchange.account,
            kind=kind,
            model=request.model,
            stream=bool(request.stream),
            choices=request.choices,
            body=body,
            created_s=self._cell.now_ms() // 1000,
        )
        if request.stream:
            await _Stream(self._cell, exchange, live, request).run(self._settings.keep_alive_ms / 1000)
        else:
            await self._plain(exchange, live, request.service_tier if isinstance(request, ChatRequest) else None)

    async def _plain(self, exchange: Exchange, live: LiveRequest, tier: str | None) -> None:
        async with Attendance(exchange):
            answer = await self._cell.answer(live)
        await answer_with(exchange, answer, tier)


async def answer_with(exchange: Exchange, answer: LiveAnswer, tier: str | None = None) -> None:
    """Send a whole answer with its footprint; if it says that nothing can serve, with the time to try again.

    ``tier``: the ``service_tier`` that was asked for, so that the answer states the one that was given.
    """
    body = told(with_footprint(answer.body, answer.footprint), answer)
    if tier is not None and answer.status < 400:
        body = with_field(body, b"service_tier", msgspec.json.encode(name_of(tier_of(tier))))
    await exchange.answer(answer.status, body, _RETRY if answer.status in {429, 503} else ())


def told(body: bytes, answer: LiveAnswer | LiveTokens) -> bytes:
    """A body or a chunk whose ``usage.motorpool`` also says how it came about, if that was not the ordinary way."""
    about = answer.about if isinstance(answer, (WholeAnswer, LastTokens)) else _ORDINARY
    if about == _ORDINARY:
        return body
    try:
        fields = _raw_fields.decode(body)
        usage = _raw_fields.decode(fields["usage"])
        shown = _raw_fields.decode(usage.get(NAME, b"{}")) | _raw_fields.decode(msgspec.json.encode(about))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError):
        return body
    usage[NAME] = msgspec.Raw(msgspec.json.encode(shown))
    return msgspec.json.encode(fields | {"usage": msgspec.Raw(msgspec.json.encode(usage))})


def with_field(body: bytes, name: bytes, value: bytes) -> bytes:
    """A JSON object with one more field; anything else as it is."""
    end = body.rstrip()
    if not end.endswith(b"}") or end == b"{}":
        return body
    return b'%b,"%b":%b}' % (end[:-1], name, value)


async def _close(items: AsyncIterator[LiveTokens | LiveAnswer]) -> None:
    # Closing the iterator is what tells the vehicle to stop.
    close = getattr(items, "aclose", None)
    if close is not None:
        await close()


class _Stream:
    """One streamed answer."""

    def __init__(self, cell: Cell, exchange: Exchange, live: LiveRequest, request: Request) -> None:
        self._cell = cell
        self._exchange = exchange
        self._live = live
        self._with_usage = request.with_usage
        self._chunks = Chunks(
            live.kind,
            response_id=live.response_id,
            created_s=live.created_s,
            model=live.model,
            with_usage=self._with_usage,
            echo=_echo(request),
        )
        self._opening: asyncio.Task[None] | None = None

    async def run(self, quiet_s: float) -> None:
        """Relay the answer; errors before the first byte are raised, later ones are told in the stream."""
        try:
            async with Attendance(self._exchange, quiet_s=quiet_s, ping=self._ping) as attendance:
                last = await self._relay(attendance)
        except (ClientGoneError, asyncio.CancelledError):
            raise
        except MotorpoolError as error:
            if self._opening is None:
                raise
            last = chunks.error_event(encode_error(error))
        except Exception as error:
            if self._opening is None:
                raise
            # The status is sent already, so the app's own handler could not tell the client any more.
            _log.error("%s: stream failed: %s", self._exchange.request_id, type(error).__name__)
            last = chunks.error_event(encode_error(MotorpoolError("internal error: quote the request id")))
        if last is not None:
            await self._open()
            await self._exchange.send(last, more=False)

    async def _relay(self, attendance: Attendance) -> bytes | None:
        """Send what comes; return the last piece, None if the exchange was answered otherwise."""
        items = self._cell.live(self._live)
        answer: LiveAnswer | None = None
        last: bytes | None = None
        try:
            # To the very end, not just to the last token: what follows it is the cell's book-keeping.
            async for item in items:
                if isinstance(item, LiveAnswer):
                    answer = item
                    continue
                data = self._chunks.tokens(item.deltas, item.engine)
                if item.usage is not None:
                    usage = self._usage(item, item.usage) if self._with_usage else b""
                    last = data + usage + chunks.DONE
                elif data:
                    if self._opening is None or not self._opening.done():
                        await self._open()
                    await self._exchange.send(data, more=True)
                    attendance.touch()
        finally:
            await _close(items)
        if answer is not None:
            return await self._end_with(answer)
        if last is None:
            raise VehicleError("the stream broke off before its end", code="stream_interrupted")
        return last

    def _usage(self, item: LiveTokens, usage: Usage) -> bytes:
        """The usage chunk, with how the answer came about."""
        chunk = self._chunks.usage(usage, item.footprint)
        data = chunk.removeprefix(_DATA).rstrip()
        return b"%b%b\n\n" % (_DATA, told(data, item))

    async def _end_with(self, answer: LiveAnswer) -> bytes | None:
        """A whole answer: the end of a stream that is sent in one piece, or an error."""
        if answer.status < 400:
            body = told(with_footprint(answer.body, answer.footprint), answer)
            data = self._chunks.whole(body)
            return data + (self._chunks.whole_usage(body) if self._with_usage else b"") + chunks.DONE
        if self._opening is None:
            await answer_with(self._exchange, answer)
            return None
        return chunks.error_event(_one_line(answer.body))

    async def _open(self) -> None:
        """Send the headers, once: the first token and a keep-alive may want to at the same time."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._exchange.start(200, _EVENT_STREAM, _STREAM_HEADERS))
        # Shielded: when the keep-alive is cancelled in the middle, the headers go out all the same.
        await asyncio.shield(self._opening)

    async def _ping(self) -> None:
        if self._opening is None and self._exchange.responding:
            return  # an error with its own status is on its way
        await self._open()
        await self._exchange.send(chunks.PING, more=True)


def _echo(request: Request) -> list[str] | None:
    """What each choice begins with, if the customer asked for the prompt back."""
    if not isinstance(request, CompletionRequest) or not request.echo:
        return None
    # Tokens in a prompt were refused together with echo, so each prompt is a text.
    return [prompt for prompt in request.prompts if isinstance(prompt, str) for _ in range(request.n or 1)]


def _one_line(body: bytes) -> bytes:
    """An error body as one line with OpenAI's four keys, whatever an engine wrote."""
    try:
        return msgspec.json.encode(_envelope.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return encode_error(VehicleError("the engine failed without saying why"))
