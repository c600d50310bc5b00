"""The shapes of answers that engines write and the API passes on unread: for the OpenAPI document alone.

The other answers have types of their own beside their routes. Must not: be used to make or read an answer.

Called by: ``openapi``; the tests hold real answers against it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from motorpool.server.openai.footprints import ShownFootprint


class PromptDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the prompt's tokens."""

    cached_tokens: int
    audio_tokens: int


class CompletionDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the answer's tokens."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class CompletionUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a request, and what it drew in its vehicles."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    motorpool: ShownFootprint | msgspec.UnsetType = msgspec.UNSET


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One alternative for a token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    """One token and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The logprobs of a message."""

    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model wants called."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionChoice]
    usage: CompletionUsage
    system_fingerprint: str


class TextLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The older API's parallel arrays."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One continuation of a prompt."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage
    system_fingerprint: str


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One vector: its numbers, or base64 of their little-endian 32-bit floats."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that were read, and what that drew."""

    prompt_tokens: int
    total_tokens: int
    motorpool: ShownFootprint | msgspec.UnsetType = msgspec.UNSET


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The process serves requests."""

    status: Literal["ok"]


class OwnerEnrolled(msgspec.Struct, frozen=True, kw_only=True):
    """The vehicle whose owner's key is known now."""

    vehicle_id: str


class OwnerChallenge(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner's key is to sign."""

    nonce: str
    expires_at: int


class OwnerToken(msgspec.Struct, frozen=True, kw_only=True):
    """What opens the owner's routes for a while."""

    token: str
    expires_at: int
