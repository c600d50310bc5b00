"""Lines of a batch for ``/v1/responses``: what a vehicle is asked for, and what the customer gets of its answer.

A vehicle runs a chat completion, as it does for a live response, and the books keep what it answered; it is told as a
response when the files of the batch are written. The same line and answer give the same bytes, so that the files can be
written again. Must not: keep a response, read a clock, or repeat a value that the customer sent.

Called by: ``server.openai.lines`` when a line is checked or handed to a vehicle, ``server.assembly``.
"""

from __future__ import annotations

from typing import Final

import msgspec

from motorpool.errors import CallerError, EngineError
from motorpool.server.cell import LiveAnswer
from motorpool.server.openai.responses.creation import facts_of
from motorpool.server.openai.responses.items import check_calls, read_input
from motorpool.server.openai.responses.objects import PREFIX, response_object
from motorpool.server.openai.responses.request import CreateRequest, read_request, read_tools
from motorpool.server.openai.responses.translate import (
    answered,
    chat_body,
    error_body,
    failed_answer,
    failure,
    read_answer,
)

STEM_CHARS: Final = 24  # of a batch's id
_json: Final = msgspec.json.Encoder().encode


class _Made(msgspec.Struct):
    """When the engine began."""

    created: int = 0


_made: Final = msgspec.json.Decoder(_Made)


def asked_of_vehicle(request: CreateRequest) -> bytes:
    """The chat completion that answers a line; raises CallerError that names what a batch does not serve."""
    _check_batch(request)
    tools = read_tools(request)
    items = read_input(request.input, PREFIX)
    check_calls(items)
    return chat_body(request, tools, items, stream=False, seed=None)


def _check_batch(request: CreateRequest) -> None:
    """What a live response has and a line cannot have."""
    if request.background:
        raise _unserved("background", "a batch runs in the background by itself: leave it out")
    if request.previous_response_id is not None:
        raise _unserved("previous_response_id", "a line may run a day later: send the conversation as input")
    if request.store:
        raise _unserved("store", "what a batch answers stands in its output file alone: leave it out, or send false")
    if request.truncation == "auto":
        raise _unserved("truncation", "auto is not served in a batch: leave it out, or send disabled")


def _unserved(param: str, why: str) -> CallerError:
    return CallerError(f"{param}: {why}", code="unsupported_parameter", param=param)


def response_id_of(batch_id: str, number: int) -> str:
    """The id of the response of a line, from 0 on: as long as that of a live one, and the same whenever it is told."""
    return f"{PREFIX}{batch_id.removeprefix('batch_')}{number:08x}"


def told_as_response(asked: bytes, answer: LiveAnswer, response_id: str, tier: str) -> bytes:
    """The body of an output line: the response of a whole chat completion, or its error as the customer asked.

    ``asked`` is the body of the line, ``tier`` is the ``service_tier`` that it had.
    """
    if answer.status >= 400:
        return error_body(failed_answer(answer.status, answer.body))
    request = read_request(asked)
    facts = facts_of(request, read_tools(request), response_id, _created_s(answer.body))
    facts = msgspec.structs.replace(facts, store=False, service_tier=tier)
    try:
        found = read_answer(answer)
    except EngineError as error:
        return _json(response_object(facts, "failed", error=failure(error).error))
    return _json(answered(facts, found, found.text, found.logprobs))


def _created_s(body: bytes) -> int:
    try:
        return _made.decode(body).created
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0  # read_answer tells what is wrong with it
