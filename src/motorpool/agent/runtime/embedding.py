"""Embeddings: the body of a request, and the answer in OpenAI's shape.

Decides: whether a body can be run, and the bytes that the customer gets from vectors. Must not: know how they were
made. Called by: every backend, for the kind ``embeddings``.

A vector is the bytes of its little-endian 32-bit floats from the engine to the answer, which holds them as base64 or
spelt out. The work of an embedding is its prompt: ``completion_tokens`` is 0, and nothing can be carried on.
"""

from __future__ import annotations

import base64
import math
import struct
from typing import Any, Final

import msgspec

from motorpool.agent.runtime.engine import Finished, Work
from motorpool.agent.runtime.request import MAX_TOKEN_ID, misfit
from motorpool.errors import CallerError
from motorpool.types import MAX_EMBEDDING_INPUTS, Usage

MAX_DIMENSIONS: Final = 65_536
_DIGITS: Final = ".9g"  # as many as a 32-bit float needs
_encoder: Final = msgspec.json.Encoder()

Input = str | list[int]


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that are understood."""

    input: str | list[str | int | list[int]]
    encoding_format: str | None = None
    dimensions: int | None = None


class EmbeddingBody(msgspec.Struct, frozen=True, kw_only=True):
    """One request, checked: what to embed, in order, and how the vectors are to be."""

    inputs: list[Input]
    as_base64: bool
    dimensions: int | None


_decoder: Final = msgspec.json.Decoder(_Body)


def parse(data: bytes) -> EmbeddingBody:
    """Decode and check a body; raise CallerError with the name of the field at fault."""
    try:
        body = _decoder.decode(data)
    except msgspec.ValidationError as error:
        raise misfit(str(error)) from error
    except msgspec.DecodeError as error:
        raise CallerError("the body is not JSON", code="invalid_json") from error
    except UnicodeDecodeError as error:
        raise CallerError("the body is not UTF-8", code="invalid_json") from error
    except RecursionError as error:
        raise CallerError("the body is nested too deeply", code="invalid_json") from error
    if body.encoding_format not in {None, "float", "base64"}:
        raise CallerError("encoding_format must be one of float, base64", code="invalid_value", param="encoding_format")
    if body.dimensions is not None and not 1 <= body.dimensions <= MAX_DIMENSIONS:
        raise CallerError(
            f"dimensions must be between 1 and {MAX_DIMENSIONS}", code="invalid_value", param="dimensions"
        )
    return EmbeddingBody(
        inputs=_inputs(body.input), as_base64=body.encoding_format == "base64", dimensions=body.dimensions
    )


def _inputs(given: str | list[str | int | list[int]]) -> list[Input]:
    if isinstance(given, str):
        inputs: list[Input] = [given]
    elif len({type(part) for part in given}) > 1:
        raise CallerError("input must not mix texts and tokens", code="invalid_type", param="input")
    elif given and isinstance(given[0], int):
        inputs = [[part for part in given if isinstance(part, int)]]
    else:
        inputs = [part for part in given if not isinstance(part, int)]
    if not inputs or not all(inputs):
        raise CallerError("input holds nothing, or something empty", code="invalid_value", param="input")
    if len(inputs) > MAX_EMBEDDING_INPUTS:
        raise CallerError(f"input holds at most {MAX_EMBEDDING_INPUTS} parts", code="invalid_value", param="input")
    if any(not 0 <= token <= MAX_TOKEN_ID for part in inputs if isinstance(part, list) for token in part):
        raise CallerError(f"input: a token is a number from 0 to {MAX_TOKEN_ID}", code="invalid_value", param="input")
    return inputs


def finished(work: Work, model: str, body: EmbeddingBody, vectors: list[bytes], usage: Usage) -> Finished:
    """The end of one attempt that went well."""
    data = [
        {"object": "embedding", "index": index, "embedding": _shown(vector, body)}
        for index, vector in enumerate(vectors)
    ]
    counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
    answer = {"object": "list", "data": data, "model": model, "usage": counts}
    return Finished(key=work.key, status=200, body=_encoder.encode(answer), usage=usage)


def _shown(vector: bytes, body: EmbeddingBody) -> Any:
    if body.dimensions is not None:
        vector = shortened(vector, body.dimensions)
    if body.as_base64:
        return base64.b64encode(vector).decode("ascii")
    return [float(format(number, _DIGITS)) for number in struct.unpack(f"<{len(vector) // 4}f", vector)]


def shortened(vector: bytes, dimensions: int) -> bytes:
    """The first numbers of a vector, at length 1 again; raise CallerError if it has fewer."""
    count = len(vector) // 4
    if dimensions == count:
        return vector
    if dimensions > count:
        raise CallerError(
            f"dimensions: the vectors of this model have {count} numbers", code="invalid_value", param="dimensions"
        )
    numbers = struct.unpack(f"<{dimensions}f", vector[: 4 * dimensions])
    length = math.sqrt(sum(number * number for number in numbers)) or 1.0
    return struct.pack(f"<{dimensions}f", *(number / length for number in numbers))


def too_long(index: int, tokens: int, most: int) -> CallerError:
    """One part of the input does not fit; names it and both numbers."""
    return CallerError(
        f"This model reads at most {most} tokens of one input, but input[{index}] came to {tokens} tokens. Shorten it.",
        code="context_length_exceeded",
        param="input",
    )


def wrong_model(model: str, *, embeds: bool) -> CallerError:
    """A request for text at a model that makes embeddings (``embeds``), or the other way round."""
    does, use = ("makes embeddings", "embeddings") if embeds else ("generates text", "chat/completions")
    return CallerError(f"the model {model} {does}: use it with /v1/{use}", code="unsupported_model", param="model")
