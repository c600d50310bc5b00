"""What a customer may ask of a model: the bodies of chat completions and completions, live or as a line of a batch.

Decides whether a body is well formed and within OpenAI's ranges; the engine still judges what only the model knows,
such as the length of the prompt. Unknown fields are passed on unread. Must not: change the body, or run anything.

Called by: ``live`` and ``lines``.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Raw

from motorpool.errors import CallerError
from motorpool.server.openai.decoding import decode
from motorpool.types import Kind

MAX_CHOICES: Final = 128
MAX_STOPS: Final = 4
MAX_TOP_LOGPROBS: Final = 20
MAX_PROMPTS: Final = 128
MAX_METADATA_PAIRS: Final = 16
MAX_METADATA_KEY_CHARS: Final = 64
MAX_METADATA_VALUE_CHARS: Final = 512
MAX_MODEL_CHARS: Final = 256
MAX_TOOLS: Final = 128
MAX_TOKEN_ID: Final = 2**31 - 1
COMPLETION_TOKENS: Final = 16  # how long a completion becomes when its request names no length; the engines' default

Model = Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_CHARS)]
Metadata = Annotated[
    dict[
        Annotated[str, Meta(min_length=1, max_length=MAX_METADATA_KEY_CHARS)],
        Annotated[str, Meta(max_length=MAX_METADATA_VALUE_CHARS)],
    ],
    Meta(max_length=MAX_METADATA_PAIRS),
]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Bias = dict[Annotated[int, Meta(ge=0)], Annotated[float, Meta(ge=-100, le=100)]]
Stop = str | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=MAX_STOPS)]


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the conversation."""

    role: Literal["user", "system", "assistant", "developer", "tool", "function"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[Raw] | None = None
    function_call: object = None
    tool_call_id: str | None = None
    name: str | None = None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream should look."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Plain text, the default."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """The schema that the answer must follow."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
    description: str | None = None
    schema: dict[str, Raw] | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON that follows a schema."""

    json_schema: JsonSchema


class ToolKind(msgspec.Struct, frozen=True):
    """The one field that every tool has; the rest is the engine's to judge."""

    type: str


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both kinds of request have."""

    model: Model
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    max_tokens: Tokens | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logit_bias: Bias | None = None
    user: str | None = None

    @property
    def with_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Shared, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    tools: Annotated[list[ToolKind], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Raw] | None = None
    parallel_tool_calls: bool | None = None
    functions: object = None
    function_call: object = None
    metadata: Metadata | None = None
    modalities: list[str] | None = None
    audio: Raw | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    store: bool | None = None

    @property
    def choices(self) -> int:
        """How many choices the answer has."""
        return self.n or 1

    @property
    def limit_tokens(self) -> int | None:
        """How long each choice may become, None if not said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Shared, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]] | None = None
    best_of: Choices | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: str | None = None

    @property
    def limit_tokens(self) -> int:
        """How long each choice may become."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself: its text, or its token ids."""
        if not isinstance(self.prompt, list):
            return [self.prompt or ""]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]

    @property
    def choices(self) -> int:
        """How many choices the answer has over all prompts."""
        return (self.n or 1) * len(self.prompts)


Request = ChatRequest | CompletionRequest


def check_chat(request: ChatRequest) -> None:
    """What the types cannot say; raise CallerError that names the field."""
    for index, message in enumerate(request.messages):
        _check_message(index, message)
    if request.top_logprobs is not None and not request.logprobs:
        raise CallerError("top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs")
    if (
        request.max_tokens is not None
        and request.max_completion_tokens is not None
        and request.max_tokens != request.max_completion_tokens
    ):
        raise CallerError(
            "max_tokens and max_completion_tokens differ: send max_completion_tokens alone",
            code="invalid_value",
            param="max_tokens",
        )
    if request.modalities is not None and request.modalities != ["text"]:
        raise CallerError("modalities: only text is served", code="unsupported_parameter", param="modalities")
    _check_tools(request)
    _check_stream(request)


def _check_message(index: int, message: ChatMessage) -> None:
    content = message.content
    place = f"messages[{index}]"
    if message.function_call is not None:
        raise CallerError(
            f"{place}.function_call is not served: send tool_calls",
            code="unsupported_parameter",
            param=f"{place}.function_call",
        )
    if content is None:
        if message.role != "assistant" or message.tool_calls is None:
            raise CallerError(
                f"{place}.content is missing", code="missing_required_parameter", param=f"{place}.content"
            )
    elif type(content) is list:
        for part_index, part in enumerate(content):
            _check_part(f"{place}.content[{part_index}]", part)
    if message.role == "tool" and message.tool_call_id is None:
        param = f"{place}.tool_call_id"
        raise CallerError(f"{param} is missing", code="missing_required_parameter", param=param)


def _check_part(place: str, part: ContentPart) -> None:
    if part.type not in {"text", "refusal"}:
        raise CallerError(
            f"{place}.type: only text parts are served", code="unsupported_parameter", param=f"{place}.type"
        )
    if (part.text if part.type == "text" else part.refusal) is None:
        param = f"{place}.{part.type}"
        raise CallerError(f"{param} is missing", code="missing_required_parameter", param=param)


def _check_tools(request: ChatRequest) -> None:
    # The fields that tools took the place of: no engine knows them, and dropping them would change the answer.
    for field, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if getattr(request, field) is not None:
            raise CallerError(f"{field} is not served: send {instead}", code="unsupported_parameter", param=field)
    choice = request.tool_choice
    if isinstance(choice, str) and choice not in {"none", "auto", "required"}:
        raise CallerError(
            "tool_choice must be none, auto, required or name a tool", code="invalid_value", param="tool_choice"
        )
    if choice not in (None, "none", "auto") and not request.tools:
        raise CallerError("tool_choice needs tools", code="invalid_value", param="tool_choice")


def _check_stream(request: Shared) -> None:
    if request.stream_options is not None and not request.stream:
        raise CallerError("stream_options needs stream: true", code="invalid_value", param="stream_options")


def check_completion(request: CompletionRequest) -> None:
    """What the types cannot say; raise CallerError that names the field."""
    if isinstance(request.prompt, list):
        if not request.prompt:
            raise CallerError("prompt is an empty list", code="invalid_value", param="prompt")
        if len({type(part) for part in request.prompt}) > 1:
            raise CallerError(
                "prompt must be a string, a list of strings, a list of tokens or a list of lists of tokens",
                code="invalid_type",
                param="prompt",
            )
        tokens = [prompt for prompt in request.prompts if isinstance(prompt, list)]
        if any(not 0 <= token <= MAX_TOKEN_ID for prompt in tokens for token in prompt):
            raise CallerError(
                f"prompt: a token is a number from 0 to {MAX_TOKEN_ID}", code="invalid_value", param="prompt"
            )
        if len(request.prompts) > MAX_PROMPTS or request.choices > MAX_CHOICES:
            raise CallerError(
                f"at most {MAX_CHOICES} choices over all prompts: send fewer prompts or a smaller n",
                code="invalid_value",
                param="prompt",
            )
    if request.suffix:
        raise CallerError("suffix is not served", code="unsupported_parameter", param="suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise CallerError("best_of is served only equal to n", code="unsupported_parameter", param="best_of")
    if request.echo and request.logprobs is not None:
        raise CallerError(
            "logprobs of an echoed prompt are not served: leave out echo or logprobs",
            code="unsupported_parameter",
            param="logprobs",
        )
    if request.echo and request.stream and not all(isinstance(prompt, str) for prompt in request.prompts):
        raise CallerError("echo of tokens is not served in a stream", code="unsupported_parameter", param="echo")
    _check_stream(request)


_CHAT: Final = msgspec.json.Decoder(ChatRequest)
_COMPLETION: Final = msgspec.json.Decoder(CompletionRequest)


def read_chat(body: bytes) -> ChatRequest:
    """Decode and check the body of a chat completion; raise CallerError that names the field."""
    request = decode(_CHAT, body)
    check_chat(request)
    return request


def read_completion(body: bytes) -> CompletionRequest:
    """Decode and check the body of a completion; raise CallerError that names the field."""
    request = decode(_COMPLETION, body)
    check_completion(request)
    return request


def read_request(kind: Kind, body: bytes) -> Request:
    """Decode and check a body of either kind; raise CallerError that names the field."""
    return read_chat(body) if kind is Kind.CHAT else read_completion(body)
