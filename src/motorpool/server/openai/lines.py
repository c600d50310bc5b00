"""One line of a batch file: taking it apart, and checking it as the live endpoint would.

Pure: bytes in, values or an error out. Must not: read files, or know how many lines there are.

Called by: ``validation`` for every line once, and ``server.loop`` when a line is handed to a vehicle.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

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
from motorpool.types import MAX_BODY_BYTES, MAX_CUSTOM_ID_CHARS, Kind

# A line is its body and a little around it: the custom_id may be escaped, six bytes a character.
LINE_OVERHEAD_BYTES: Final = 6 * MAX_CUSTOM_ID_CHARS + 1024

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


Asked = Request | EmbeddingRequest

_ID: Final = msgspec.json.Decoder(NamedLine)
_RAW: Final = msgspec.json.Decoder(RawLine)
_CHAT: Final = msgspec.json.Decoder(ChatLine)
_COMPLETION: Final = msgspec.json.Decoder(CompletionLine)
_EMBEDDING: Final = msgspec.json.Decoder(EmbeddingLine)


def parse_line(data: bytes | memoryview) -> tuple[str, bytes]:
    """The custom_id of a line and its body, byte for byte as the customer wrote it. For lines that were checked."""
    line = _RAW.decode(data)
    return line.custom_id, bytes(line.body)


def custom_id_of(data: bytes | memoryview) -> str:
    """The custom_id of a line that was checked."""
    return _ID.decode(data).custom_id


def check_line(kind: Kind, data: bytes, max_body_bytes: int = MAX_BODY_BYTES) -> tuple[str, Asked]:
    """Check one line as the live endpoint would check its body; return its custom_id and what it asks for.

    Raises CallerError; ``param`` names the field, ``body.temperature`` for instance.
    """
    line: ChatLine | CompletionLine | EmbeddingLine
    if kind is Kind.CHAT:
        line = decode(_CHAT, data)
    elif kind is Kind.COMPLETION:
        line = decode(_COMPLETION, data)
    else:
        line = decode(_EMBEDDING, data)
    if line.url != kind.url:
        raise _wrong_url(kind)
    try:
        if isinstance(line, ChatLine):
            check_chat(line.body)
        elif isinstance(line, CompletionLine):
            check_completion(line.body)
        else:
            check_embedding(line.body)
    except CallerError as error:
        raise inside(error) from None
    if line.body.stream:
        raise CallerError(
            "body.stream must not be true: a batch has no stream", code="invalid_value", param="body.stream"
        )
    if len(data) > max_body_bytes and len(parse_line(data)[1]) > max_body_bytes:
        raise too_large(max_body_bytes)
    return line.custom_id, line.body


def too_large(max_body_bytes: int) -> TooLargeError:
    """The error of a line whose body is over the bound."""
    return TooLargeError(f"body is over the limit of {max_body_bytes} bytes", code="body_too_large", param="body")


def inside(error: CallerError) -> CallerError:
    """An error of a body as one of its line."""
    return CallerError(f"body: {error.message}", code=error.code, param=f"body.{error.param}")


def _wrong_url(kind: Kind) -> CallerError:
    return CallerError(f"url must be the endpoint of the batch, {kind.url}", code="mismatched_url", param="url")
