"""What customers see of responses: the response object, its items, and the ids of all of them.

A response object is made of facts, which are known when it is created, and of how it stands. Must not: know how it is
run or kept.

Called by: everything in this package.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import Raw

from motorpool.errors import ErrorBody

PREFIX: Final = "resp_"
INPUT_OFFSET: Final = 0xF000  # items of the input are numbered from here on, those of the output from 0 on
MAX_INPUT_ITEMS: Final = 4_000  # of one request; all numbers of items have four digits
ENDED: Final = ("completed", "failed", "cancelled", "incomplete")
Status = Literal["queued", "in_progress", "completed", "failed", "cancelled", "incomplete"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


def item_id(kind: str, response_id: str, number: int) -> str:
    """The id of an item: the same whenever it is told."""
    return f"{kind}_{response_id.removeprefix(PREFIX)}{number:04x}"


# -- items -------------------------------------------------------------------------------------------------------------


class InputText(msgspec.Struct, frozen=True, kw_only=True, tag="input_text"):
    """Text that was put in."""

    text: str


class OutputText(msgspec.Struct, frozen=True, kw_only=True, tag="output_text"):
    """Text that a model has said; ``logprobs`` are OpenAI's entries, empty if nobody asked for them."""

    annotations: list[Raw] = []
    logprobs: list[Raw] = []
    text: str


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refusal"):
    """What a model said instead of an answer."""

    refusal: str


Part = InputText | OutputText | Refusal


class Message(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    """A message, of the input or of the output."""

    id: str
    status: ItemStatus = "completed"
    role: Literal["user", "system", "developer", "assistant"]
    content: list[Part]


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="function_call"):
    """A function that the model wants called."""

    id: str
    status: ItemStatus = "completed"
    call_id: str
    name: str
    arguments: str


class CallOutput(msgspec.Struct, frozen=True, kw_only=True, tag="function_call_output"):
    """What a function gave back."""

    id: str
    status: ItemStatus = "completed"
    call_id: str
    output: str | list[InputText]


Item = Message | Call | CallOutput
OutputItem = Message | Call
items_json: Final = msgspec.json.Decoder(list[Item])


# -- the response ------------------------------------------------------------------------------------------------------


class InputDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the input tokens, those that the engine need not read again."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the output tokens, those of hidden reasoning."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the whole response, counted once, and what vehicles drew for it."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    motorpool: Raw | msgspec.UnsetType = msgspec.UNSET


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens", "content_filter"]


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    """There is none."""

    effort: None = None
    summary: None = None


class Extra(msgspec.Struct, frozen=True, kw_only=True):
    """What OpenAI has no field for: the types of tools that were asked for and that the model was not told of."""

    skipped_tools: list[str]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a response says from its beginning on; times in seconds since 1970 (UTC)."""

    response_id: str
    created_s: int
    model: str
    background: bool
    store: bool
    previous_response_id: str | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    prompt_cache_key: str | None
    safety_identifier: str | None
    temperature: float | None
    text: Raw
    tool_choice: Raw
    tools: Raw
    top_logprobs: int
    top_p: float | None
    truncation: str
    user: str | None
    service_tier: str
    skipped_tools: list[str]


class ResponseObject(msgspec.Struct, kw_only=True, frozen=True):
    """A response as a customer sees it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: bool
    completed_at: int | None
    error: ErrorBody | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Reasoning = Reasoning()
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float | None
    text: Raw
    tool_choice: Raw
    tools: Raw
    top_logprobs: int
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]
    motorpool: Extra | msgspec.UnsetType = msgspec.UNSET


facts_json: Final = msgspec.json.Decoder(Facts)
response_json: Final = msgspec.json.Decoder(ResponseObject)


def response_object(
    facts: Facts,
    status: Status,
    *,
    output: list[OutputItem] | None = None,
    usage: ResponseUsage | None = None,
    error: ErrorBody | None = None,
    incomplete: IncompleteDetails | None = None,
    completed_s: int | None = None,
) -> ResponseObject:
    """The response as it stands."""
    return ResponseObject(
        id=facts.response_id,
        created_at=facts.created_s,
        status=status,
        background=facts.background,
        completed_at=completed_s,
        error=error,
        incomplete_details=incomplete,
        instructions=facts.instructions,
        max_output_tokens=facts.max_output_tokens,
        max_tool_calls=facts.max_tool_calls,
        model=facts.model,
        output=output or [],
        parallel_tool_calls=facts.parallel_tool_calls,
        previous_response_id=facts.previous_response_id,
        prompt_cache_key=facts.prompt_cache_key,
        safety_identifier=facts.safety_identifier,
        service_tier=facts.service_tier,
        store=facts.store,
        temperature=facts.temperature,
        text=facts.text,
        tool_choice=facts.tool_choice,
        tools=facts.tools,
        top_logprobs=facts.top_logprobs,
        top_p=facts.top_p,
        truncation=facts.truncation,
        usage=usage,
        user=facts.user,
        metadata=facts.metadata,
        motorpool=Extra(skipped_tools=facts.skipped_tools) if facts.skipped_tools else msgspec.UNSET,
    )
