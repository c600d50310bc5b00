"""Embeddings: one request, checked, run on one vehicle or divided among several, and answered whole.

A request with many inputs goes out in parts: their vectors would not fit one message, and vehicles work on them side by
side. Decides how it is divided. Must not: choose vehicles, keep or log what was asked or answered.

Called by: ``app``, and ``lines`` for the lines of a batch.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Raw

from motorpool.catalogue import Model
from motorpool.core.attribution import Footprint
from motorpool.errors import CallerError, CapacityError, VehicleError
from motorpool.server.cell import Cell, LiveAnswer, LiveRequest
from motorpool.server.openai.decoding import decode
from motorpool.server.openai.exchange import Attendance, Exchange
from motorpool.server.openai.live import answer_with
from motorpool.server.openai.requests import MAX_TOKEN_ID
from motorpool.server.openai.requests import Model as ModelName
from motorpool.server.openai.settings import ApiSettings
from motorpool.types import MAX_BODY_BYTES, MAX_EMBEDDING_INPUTS, Kind

PART_INPUTS: Final = 256
PART_BYTES: Final = 64 * 1024  # of input; a single one may be longer
PART_ANSWER_BYTES: Final = 2 * 1024 * 1024
PARTS_AT_ONCE: Final = 8
_FRAME_BYTES: Final = 64  # of an answer, around each vector
_PLACE: Final = re.compile(rb"input\[(\d+)\]")
_json: Final = msgspec.json.Encoder().encode


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/embeddings."""

    model: ModelName
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: str | None = None

    # What a line of a batch is asked for, whatever its kind.
    @property
    def stream(self) -> bool:
        """There are no streams of vectors."""
        return False

    @property
    def choices(self) -> int:
        """There is one answer."""
        return 1

    @property
    def limit_tokens(self) -> int:
        """No token is generated."""
        return 0

    @property
    def inputs(self) -> list[str | list[int]]:
        """Each input by itself: its text, or its token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [[token for token in self.input if isinstance(token, int)]]
        return [part for part in self.input if not isinstance(part, int)]


_decoder: Final = msgspec.json.Decoder(EmbeddingRequest)


def check_embedding(request: EmbeddingRequest) -> None:
    """What the types cannot say; raise CallerError that names the field."""
    if isinstance(request.input, list) and len({type(part) for part in request.input}) > 1:
        raise CallerError(
            "input must be a string, a list of strings, a list of tokens or a list of lists of tokens",
            code="invalid_type",
            param="input",
        )
    inputs = request.inputs
    if not inputs or not all(inputs):
        raise CallerError("input must not be empty, nor hold anything empty", code="invalid_value", param="input")
    if len(inputs) > MAX_EMBEDDING_INPUTS:
        raise CallerError(
            f"input holds at most {MAX_EMBEDDING_INPUTS} texts or lists of tokens: send several requests",
            code="invalid_value",
            param="input",
        )
    if any(not 0 <= token <= MAX_TOKEN_ID for part in inputs if isinstance(part, list) for token in part):
        raise CallerError(f"input: a token is a number from 0 to {MAX_TOKEN_ID}", code="invalid_value", param="input")


def check_model(request: EmbeddingRequest, model: Model) -> None:
    """Whether the model makes such embeddings; raise CallerError that names the field."""
    if not model.dimensions:
        raise CallerError(f"the model {model.id} makes no embeddings", code="unsupported_model", param="model")
    wanted = request.dimensions
    if wanted is None or wanted == model.dimensions:
        return
    if not model.min_dimensions:
        raise CallerError(
            f"dimensions: the vectors of {model.id} have {model.dimensions} numbers and cannot be shortened",
            code="unsupported_parameter",
            param="dimensions",
        )
    if not model.min_dimensions <= wanted <= model.dimensions:
        raise CallerError(
            f"dimensions must be from {model.min_dimensions} to {model.dimensions}",
            code="invalid_value",
            param="dimensions",
        )


def vector_bytes(request: EmbeddingRequest, model: Model) -> int:
    """How much of an answer one vector takes, at most."""
    numbers = request.dimensions or model.dimensions
    return (
        _FRAME_BYTES + (numbers * 4 + 2) // 3 * 4
        if request.encoding_format == "base64"
        else (_FRAME_BYTES + numbers * 16)
    )


def check_line_size(request: EmbeddingRequest, model: Model) -> None:
    """Whether the answer to one line of a batch fits its bound; raise CallerError that says how many inputs do."""
    most = (MAX_BODY_BYTES - 1024) // vector_bytes(request, model)
    if len(request.inputs) > most:
        raise CallerError(
            f"body.input: {len(request.inputs)} vectors are too large for one answer: at most {most} inputs a line, or "
            "more with encoding_format base64",
            code="invalid_value",
            param="body.input",
        )


class _Vector(msgspec.Struct, frozen=True):
    """One vector of a part, unread."""

    embedding: Raw


class _Count(msgspec.Struct, frozen=True):
    """The usage of a part."""

    prompt_tokens: int


class _Part(msgspec.Struct, frozen=True):
    """The answer of a part."""

    data: list[_Vector]
    usage: _Count


_part: Final = msgspec.json.Decoder(_Part)


class EmbeddingRoutes:
    """The route that makes embeddings now."""

    def __init__(self, cell: Cell, settings: ApiSettings) -> None:
        self._cell = cell
        self._settings = settings

    async def create(self, exchange: Exchange, _: str) -> None:
        """POST /v1/embeddings."""
        body = await exchange.json(self._settings.max_body_bytes)
        request = decode(_decoder, body)
        check_embedding(request)
        model = self._cell.catalogue.get(request.model)
        check_model(request, model)
        parts = divide(request.inputs, vector_bytes(request, model))
        async with Attendance(exchange):
            if len(parts) == 1:
                answer = await self._cell.answer(_live(self._cell, exchange, request.model, body, None))
            else:
                answer = await _Division(self._cell, exchange, request, parts).run()
        await answer_with(exchange, answer)


def divide(inputs: list[str | list[int]], answer_bytes: int) -> list[list[str | list[int]]]:
    """The inputs in order, in parts that are small enough to ask for and to answer."""
    most = max(1, min(PART_INPUTS, PART_ANSWER_BYTES // answer_bytes))
    parts: list[list[str | list[int]]] = []
    size = 0
    for one in inputs:
        length = len(one) if isinstance(one, str) else 4 * len(one)
        if not parts or len(parts[-1]) >= most or size + length > PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(one)
        size += length
    return parts


class _Division:
    """One request in parts."""

    def __init__(
        self, cell: Cell, exchange: Exchange, request: EmbeddingRequest, parts: list[list[str | list[int]]]
    ) -> None:
        self._cell = cell
        self._exchange = exchange
        self._request = request
        self._parts = parts
        self._answers: dict[int, LiveAnswer] = {}
        self._firsts = [sum(map(len, parts[:number])) for number in range(len(parts))]

    async def run(self) -> LiveAnswer:
        """The whole answer, or the error of one part. Raises CapacityError if no vehicle can serve any of it."""
        waiting = deque(range(len(self._parts)))
        running: dict[asyncio.Task[LiveAnswer], int] = {}
        at_once = PARTS_AT_ONCE
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    number = waiting.popleft()
                    running[asyncio.ensure_future(self._cell.answer(self._live(number)))] = number
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                # A part that finds no room while others are at work, or just after them, waits its turn.
                may_wait = len(running) > len(done) or any(task.exception() is None for task in done)
                for task in done:
                    number = running.pop(task)
                    error = task.exception()
                    if isinstance(error, CapacityError) and may_wait:
                        at_once = max(1, len(running))
                        waiting.appendleft(number)
                    elif error is not None:
                        raise error
                    elif task.result().status >= 400:
                        return self._failed(number, task.result())
                    else:
                        self._answers[number] = task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return self._joined()

    def _live(self, number: int) -> LiveRequest:
        request = self._request
        fields: dict[str, object] = {"model": request.model, "input": self._parts[number]}
        for name in ("encoding_format", "dimensions", "user"):
            if getattr(request, name) is not None:
                fields[name] = getattr(request, name)
        return _live(self._cell, self._exchange, request.model, _json(fields), number)

    def _failed(self, number: int, answer: LiveAnswer) -> LiveAnswer:
        """An error with the place of an input as the customer counts."""
        first = self._firsts[number]
        body = _PLACE.sub(lambda found: b"input[%d]" % (int(found[1]) + first), answer.body)
        return LiveAnswer(status=answer.status, body=body)

    def _joined(self) -> LiveAnswer:
        data: list[dict[str, object]] = []
        tokens = 0
        try:
            for number in range(len(self._parts)):
                part = _part.decode(self._answers[number].body)
                if len(part.data) != len(self._parts[number]):
                    raise VehicleError("a vehicle left out an embedding", code="engine_error")
                tokens += part.usage.prompt_tokens
                for vector in part.data:
                    data.append({"object": "embedding", "index": len(data), "embedding": vector.embedding})
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise VehicleError("the engine's answer cannot be read", code="engine_error") from error
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        body = _json({"object": "list", "data": data, "model": self._request.model, "usage": usage})
        return LiveAnswer(status=200, body=body, footprint=self._footprint())

    def _footprint(self) -> Footprint | None:
        found = [answer.footprint for answer in self._answers.values() if answer.footprint is not None]
        if not found:
            return None
        return Footprint(
            energy_uwh=sum(one.energy_uwh for one in found),
            co2_ug=sum(one.co2_ug for one in found),
            is_measured=all(one.is_measured for one in found),
        )


def _live(cell: Cell, exchange: Exchange, model: str, body: bytes, number: int | None) -> LiveRequest:
    name = exchange.request_id if number is None else f"{exchange.request_id}-{number}"
    return LiveRequest(
        request_id=name,
        response_id=f"embd-{name.removeprefix('req_')}",
        account=exchange.account,
        kind=Kind.EMBEDDING,
        model=model,
        stream=False,
        choices=1,
        body=body,
        created_s=cell.now_ms() // 1000,
    )
