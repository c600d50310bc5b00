"""Between responses and chat completions, both ways: the request of a vehicle, its answer, its errors.

Pure. A conversation that is too long is shortened here, from its beginning, when the customer allows it. Must not:
decide what is served (``request`` does) or read a clock.

Called by: ``creation``, ``runs``.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw

from motorpool.errors import EngineError, ErrorBody, ErrorEnvelope, MotorpoolError
from motorpool.server.cell import LiveAnswer, LiveTokens
from motorpool.server.live_call import LastTokens, WholeAnswer
from motorpool.server.openai.chunks import usage_object
from motorpool.server.openai.footprints import shown
from motorpool.server.openai.responses.items import ChatMessage, to_messages
from motorpool.server.openai.responses.objects import (
    Call,
    Facts,
    IncompleteDetails,
    InputDetails,
    Item,
    Message,
    OutputDetails,
    OutputItem,
    OutputText,
    Part,
    Refusal,
    ResponseObject,
    ResponseUsage,
    item_id,
    response_object,
)
from motorpool.server.openai.responses.request import CreateRequest, FunctionTool, Tools
from motorpool.types import Usage

SHORTEN_BY: Final = 4  # a conversation that is too long loses a fourth of its text at a time
SEED_BITS: Final = 2**31 - 1
_json: Final = msgspec.json.Encoder().encode
_body: Final = msgspec.json.Decoder(dict[str, Raw])
_messages: Final = msgspec.json.Decoder(list[ChatMessage])
_envelope: Final = msgspec.json.Decoder(ErrorEnvelope)
# What a field of a chat completion is called in a response's request.
_NAMES: Final = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
}
# Why a choice ended, as a reason why a response is incomplete.
_INCOMPLETE: Final[dict[str, Any]] = {"length": "max_output_tokens", "content_filter": "content_filter"}


# -- the request -------------------------------------------------------------------------------------------------------


def chat_body(request: CreateRequest, tools: Tools, items: list[Item], *, stream: bool, seed: int | None) -> bytes:
    """The chat completion that answers a response; equal arguments give equal bytes."""
    messages = to_messages(items)
    if request.instructions is not None:
        messages.insert(0, {"role": "system", "content": request.instructions})
    if not messages:
        messages.append({"role": "user", "content": ""})
    fields: dict[str, Any] = {"model": request.model, "messages": messages, "stream": stream}
    optional: dict[str, Any] = {
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "seed": request.seed if request.seed is not None else seed,
        "stop": request.stop,
        "service_tier": request.service_tier,
        "response_format": _format(request),
    }
    if request.with_logprobs:
        optional |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if tools.offered:
        optional |= {
            "tools": [_function(function) for function in tools.offered],
            "tool_choice": tools.choice,
            "parallel_tool_calls": request.parallel_tool_calls,
        }
    fields |= {name: value for name, value in optional.items() if value is not None}
    return _json(fields)


def may_call(tools: Tools) -> bool:
    """Whether the answer may hold function calls, which cannot be told from text before the end."""
    return bool(tools.offered) and tools.choice != "none"


def _function(function: FunctionTool) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(function, name) for name in ("name", "description", "parameters", "strict")}
    return {"type": "function", "function": {name: value for name, value in fields.items() if value is not None}}


def _format(request: CreateRequest) -> dict[str, Any] | None:
    wanted = request.text.format if request.text is not None else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "json_object"}
    fields = {name: getattr(wanted, name) for name in ("name", "description", "schema", "strict")}
    return {"type": "json_schema", "json_schema": {name: value for name, value in fields.items() if value is not None}}


def shorten(body: bytes) -> bytes | None:
    """The same request without the oldest part of its conversation; None if only its last message is left.

    Instructions stay, the outputs of functions go with their calls.
    """
    fields: dict[str, Any] = dict(_body.decode(body))
    messages = _messages.decode(fields["messages"])
    fixed = {"system", "developer"}
    free = [index for index, message in enumerate(messages) if message["role"] not in fixed][:-1]
    if not free:
        return None
    wanted = max(1, sum(len(_json(messages[index])) for index in free) // SHORTEN_BY)
    gone: set[int] = set()
    for index in free:
        if wanted <= 0:
            break
        gone.add(index)
        wanted -= len(_json(messages[index]))
    kept = [message for index, message in enumerate(messages) if index not in gone]
    fields["messages"] = _paired(kept)
    if len(fields["messages"]) == sum(message["role"] in fixed for message in kept):
        return None
    return _json(fields)


def _paired(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Without outputs of functions whose calls are gone."""
    called: set[str] = set()
    kept: list[ChatMessage] = []
    for message in messages:
        called.update(call["id"] for call in message.get("tool_calls") or ())
        if message["role"] != "tool" or message["tool_call_id"] in called:
            kept.append(message)
    return kept


# -- the answer --------------------------------------------------------------------------------------------------------


class ChatCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call of a chat completion."""

    function: ChatFunction
    id: str = ""


class ChatFunction(msgspec.Struct, frozen=True, kw_only=True):
    """What it calls."""

    name: str
    arguments: str = ""


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """The message of a chat completion."""

    content: str | None = None
    refusal: str | None = None
    tool_calls: list[ChatCall] | None = None


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Its logprobs."""

    content: list[Raw] | None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Its only choice."""

    message: Said
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class ChatDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Parts of its tokens."""

    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class ChatUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Its tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: ChatDetails | None = None
    completion_tokens_details: ChatDetails | None = None
    motorpool: Raw | msgspec.UnsetType = msgspec.UNSET


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole chat completion, as far as a response needs it."""

    choices: list[ChatChoice]
    usage: ChatUsage = ChatUsage()


_answer: Final = msgspec.json.Decoder(ChatAnswer)
_usage: Final = msgspec.json.Decoder(ChatUsage)


class Answer(NamedTuple):
    """What a vehicle answered, as a response tells it. The text of a stream was told before and is not in it."""

    text: str
    logprobs: list[Raw]
    refusal: str | None
    calls: list[ChatCall]
    finish_reason: str
    usage: ResponseUsage


def read_answer(whole: LiveAnswer) -> Answer:
    """A whole chat completion; raises EngineError if it is none."""
    try:
        answer = _answer.decode(whole.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EngineError("the engine's answer cannot be read") from None
    if not answer.choices:
        raise EngineError("the engine's answer is empty")
    choice = answer.choices[0]
    logprobs = choice.logprobs.content if choice.logprobs is not None else None
    return Answer(
        text=choice.message.content or "",
        logprobs=logprobs or [],
        refusal=choice.message.refusal,
        calls=choice.message.tool_calls or [],
        finish_reason=choice.finish_reason,
        usage=_response_usage(answer.usage, whole),
    )


def streamed(finish_reason: str, usage: Usage, last: LiveTokens) -> Answer:
    """The end of a streamed answer."""
    counted = _response_usage(_usage.decode(_json(usage_object(usage))), last)
    return Answer("", [], None, [], finish_reason, counted)


def _response_usage(usage: ChatUsage, told: LiveAnswer | LiveTokens) -> ResponseUsage:
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details is not None else 0
    details = usage.completion_tokens_details
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=cached or 0),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=(details.reasoning_tokens if details else 0) or 0),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        motorpool=_beside(told),
    )


def _beside(told: LiveAnswer | LiveTokens) -> Raw | msgspec.UnsetType:
    """What stands beside the tokens: the energy, and how the answer came about if that was not the ordinary way."""
    fields = {} if told.footprint is None else msgspec.to_builtins(shown(told.footprint))
    if isinstance(told, (WholeAnswer, LastTokens)):
        fields |= msgspec.to_builtins(told.about)
    return Raw(_json(fields)) if fields else msgspec.UNSET


def output_items(
    response_id: str, answer: Answer, text: str, logprobs: list[Raw], *, first: int, status: Any
) -> list[OutputItem]:
    """The output of a response. ``text`` is all that was told; ``first`` is the number of its first item."""
    items: list[OutputItem] = []
    parts: list[Part] = []
    if text or not (answer.calls or answer.refusal):
        parts.append(OutputText(text=text, logprobs=logprobs))
    if answer.refusal:
        parts.append(Refusal(refusal=answer.refusal))
    if parts:
        its_id = item_id("msg", response_id, first)
        items.append(Message(id=its_id, status=status, role="assistant", content=parts))
    for place, call in enumerate(answer.calls, first + len(items)):
        items.append(
            Call(
                id=item_id("fc", response_id, place),
                status=status,
                call_id=call.id or item_id("call", response_id, place),
                name=call.function.name,
                arguments=call.function.arguments,
            )
        )
    return items


def answered(
    facts: Facts,
    found: Answer,
    text: str,
    logprobs: list[Raw],
    *,
    first: int = 0,
    completed_s: int | None = None,
) -> ResponseObject:
    """The response at its end. ``text`` is all that was told, ``first`` the number of its first item.

    ``completed_s`` is when it came to its end, in seconds since 1970 (UTC); None where nobody knows.
    """
    reason = _INCOMPLETE.get(found.finish_reason)
    status: Any = "completed" if reason is None else "incomplete"
    return response_object(
        facts,
        status,
        output=output_items(facts.response_id, found, text, logprobs, first=first, status=status),
        usage=found.usage,
        incomplete=None if reason is None else IncompleteDetails(reason=reason),
        completed_s=completed_s if reason is None else None,
    )


# -- errors ------------------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """Why a response could not be answered: an error in OpenAI's envelope, and its HTTP status."""

    status: int
    error: ErrorBody
    retry_after_ms: int | None = None

    @property
    def may_pass(self) -> bool:
        """Whether the same request may be answered later."""
        return self.status == 429 or self.status >= 500

    @property
    def is_busy(self) -> bool:
        """Whether nothing was wrong but that no vehicle was free."""
        return self.status in {429, 503}

    @property
    def is_too_long(self) -> bool:
        """Whether the conversation does not fit the model."""
        return self.error.code == "context_length_exceeded"


def failed_answer(status: int, body: bytes) -> Failure:
    """The failure that a vehicle told, with the names of its fields as the customer sent them."""
    try:
        error = _envelope.decode(body).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return failure(EngineError("the engine failed without saying why"))
    if error.param is None:
        return Failure(status, error)
    head, rest = _split(error.param)
    named = msgspec.structs.replace(error, param=_NAMES.get(head, head) + rest)
    return Failure(status, named)


def error_body(failed: Failure) -> bytes:
    """A failure in OpenAI's envelope."""
    return _json(ErrorEnvelope(error=failed.error))


def failure(error: MotorpoolError) -> Failure:
    """One of our own errors as a failure."""
    body = ErrorBody(**error.envelope()["error"])
    return Failure(error.status, body, getattr(error, "retry_after_ms", None))


def _split(param: str) -> tuple[str, str]:
    """The first name of a place, and what follows it."""
    for index, character in enumerate(param):
        if character in ".[":
            return param[:index], param[index:]
    return param, ""
