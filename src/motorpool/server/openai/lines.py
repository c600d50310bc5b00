"""One line of a batch file: taking it apart, and checking it as the live endpoint would.

Pure: bytes in, values or an error out. Must not: read files, or know how many lines there are.

Called by: ``validation`` for every line once, and ``server.loop`` when a line is handed to a vehicle.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Raw

from motorpool.errors import CallerError, TooLargeError
from motorpool.server.openai.decoding import decode
from motorpool.server.openai.embeddings import EmbeddingRequest, check_embedding
from motorpool.server.openai.requests import (
    ChatRequest,
    CompletionRequest,
    Request,
    check_chat,
    check_completion,
)
from motorpool.server.openai.responses.lines import asked_of_vehicle
from motorpool.server.openai.responses.request import CreateRequest
from motorpool.server.openai.responses.request import read_request as read_response_request
from motorpool.types import MAX_BODY_BYTES, MAX_CUSTOM_ID_CHARS, Kind

# A line is its body and a little around it: the custom_id may be escaped, six bytes a character.
LINE_OVERHEAD_BYTES: Final = 6 * MAX_CUSTOM_ID_CHARS + 1024

RESPONSES: Final = "responses"
Endpoint: TypeAlias = Kind | Literal["responses"]  # the last part of its path; vehicles know nothing of responses

CustomId = Annotated[str, Meta(min_length=1, max_length=MAX_CUSTOM_ID_CHARS)]


class NamedLine(msgspec.Struct, frozen=True, kw_only=True):
    """What names a line; the rest is skipped."""

    custom_id: str


class RawLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line with its body as it came."""

    custom_id: str
    body: Raw


class ChatLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of /v1/chat/completions."""

    custom_id: CustomId
    method: Literal["POST"]
    url: str
    body: ChatRequest


class CompletionLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of /v1/completions."""

    custom_id: CustomId
    method: Literal["POST"]
    url: str
    body: CompletionRequest


class EmbeddingLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of /v1/embeddings."""

    custom_id: CustomId
    method: Literal["POST"]
    url: str
    body: EmbeddingRequest


class ResponseLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of /v1/responses; its body has rules of its own."""

    custom_id: CustomId
    method: Literal["POST"]
    url: str
    body: Raw


Asked = Request | EmbeddingRequest | CreateRequest

_ID: Final = msgspec.json.Decoder(NamedLine)
_RAW: Final = msgspec.json.Decoder(RawLine)
_CHAT: Final = msgspec.json.Decoder(ChatLine)
_COMPLETION: Final = msgspec.json.Decoder(CompletionLine)
_EMBEDDING: Final = msgspec.json.Decoder(EmbeddingLine)
_RESPONSE: Final = msgspec.json.Decoder(ResponseLine)


def parse_line(data: bytes | memoryview) -> tuple[str, bytes]:
    """The custom_id of a line and its body, byte for byte as the customer wrote it. For lines that were checked."""
    line = _RAW.decode(data)
    return line.custom_id, bytes(line.body)


def endpoint_of(path: str) -> Endpoint:
    """The endpoint of a batch that was created, by its path."""
    return RESPONSES if path == f"/v1/{RESPONSES}" else Kind(path.removeprefix("/v1/"))


def kind_of(path: str) -> Kind:
    """What vehicles run for the lines of an endpoint, by its path."""
    endpoint = endpoint_of(path)
    return endpoint if isinstance(endpoint, Kind) else Kind.CHAT


def body_for(path: str, data: bytes | memoryview) -> bytes:
    """What a vehicle is asked for by a line of this endpoint that was checked."""
    body = parse_line(data)[1]
    return asked_of_vehicle(read_response_request(body)) if endpoint_of(path) == RESPONSES else body


def custom_id_of(data: bytes | memoryview) -> str:
    """The custom_id of a line that was checked."""
    return _ID.decode(data).custom_id


def check_line(endpoint: Endpoint, data: bytes, max_body_bytes: int = MAX_BODY_BYTES) -> tuple[str, Asked]:
    """Check one line as the live endpoint would check its body; return its custom_id and what it asks for.

    Raises CallerError; ``param`` names the field, ``body.temperature`` for instance.
    """
    line: ChatLine | CompletionLine | EmbeddingLine | ResponseLine
    if endpoint is Kind.CHAT:
        line = decode(_CHAT, data)
    elif endpoint is Kind.COMPLETION:
        line = decode(_COMPLETION, data)
    elif endpoint is Kind.EMBEDDING:
        line = decode(_EMBEDDING, data)
    else:
        line = decode(_RESPONSE, data)
    if line.url != f"/v1/{endpoint}":
        raise CallerError(f"url must be the endpoint of the batch, /v1/{endpoint}", code="mismatched_url", param="url")
    asked = _check_body(line, max_body_bytes)
    if asked.stream:
        raise CallerError(
            "body.stream must not be true: a batch has no stream", code="invalid_value", param="body.stream"
        )
    if len(data) > max_body_bytes and len(parse_line(data)[1]) > max_body_bytes:
        raise too_large(max_body_bytes)
    return line.custom_id, asked


def _check_body(line: ChatLine | CompletionLine | EmbeddingLine | ResponseLine, max_body_bytes: int) -> Asked:
    """What the body of a line asks for; raises CallerError that names the field."""
    try:
        if isinstance(line, ResponseLine):
            request = read_response_request(bytes(line.body))
            if len(asked_of_vehicle(request)) > max_body_bytes:
                raise too_large(max_body_bytes)
            return request
        if isinstance(line, ChatLine):
            check_chat(line.body)
        elif isinstance(line, CompletionLine):
            check_completion(line.body)
        else:
            check_embedding(line.body)
    except TooLargeError:
        raise
    except CallerError as error:
        raise inside(error) from None
    return line.body


def too_large(max_body_bytes: int) -> TooLargeError:
    """The error of a line whose body is over the bound."""
    return TooLargeError(f"body is over the limit of {max_body_bytes} bytes", code="body_too_large", param="body")


def inside(error: CallerError) -> CallerError:
    """An error of a body as one of its line."""
    param = "body" if error.param is None else f"body.{error.param}"
    return CallerError(f"body: {error.message}", code=error.code, param=param)
