"""What a customer may ask of ``POST /v1/responses``, field by field.

Every field is either served, or accepted because it cannot change an answer, or refused with an error that names it;
an unknown field is refused too. Tools that OpenAI runs itself are left out, which the response says, unless the request
insists on one. Must not: repeat a value that the customer sent, or run anything.

Called by: ``creation``.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw

from motorpool.errors import CallerError
from motorpool.server.openai.decoding import decode
from motorpool.server.openai.requests import (
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    JsonSchema,
    Metadata,
    Model,
    Penalty,
    Seed,
    Stop,
    Tokens,
)

MAX_IDENTIFIER_CHARS: Final = 512  # of user, safety_identifier and prompt_cache_key
LOGPROBS: Final = "message.output_text.logprobs"
# What a response may include; only the logprobs exist here, so the others have nothing to be included.
INCLUDABLE: Final = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
TIERS: Final = ("auto", "default", "flex", "scale", "priority", "fast")
# Fields of OpenAI's that would change the answer and are not served.
REFUSED: Final = (
    "access_programs",
    "background_options",
    "context_management",
    "conversation",
    "image",
    "moderation",
    "prompt",
)
# Tools that OpenAI runs, or that need more than a function call: the model is not told of them. The response says so.
SKIPPED: Final = frozenset(
    {
        "apply_patch",
        "code_interpreter",
        "computer",
        "computer_use_preview",
        "custom",
        "file_search",
        "image_generation",
        "local_shell",
        "mcp",
        "namespace",
        "programmatic_tool_calling",
        "shell",
        "tool_search",
        "web_search",
        "web_search_preview",
    }
)
Identifier = Annotated[str, Meta(max_length=MAX_IDENTIFIER_CHARS)]


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may want called. Only its own fields are known; others are refused by name."""

    type: str
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
    description: str | None = None
    parameters: dict[str, Raw] | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How the text shall look: ``text``, ``json_object``, or ``json_schema`` with the other fields."""

    type: str
    name: str | None = None
    schema: dict[str, Raw] | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What kind of text is wanted."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    """Models here do not reason in hiding."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream should look."""

    include_obfuscation: bool | None = None


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/responses. ``seed``, ``stop`` and the penalties are more than OpenAI takes here."""

    model: Model
    input: str | list[Raw] | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Meta(max_length=MAX_IDENTIFIER_CHARS)] | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[str] | None = None
    max_output_tokens: Tokens | None = None
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None
    metadata: Metadata | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: Identifier | None = None
    prompt_cache_options: object = None
    prompt_cache_retention: object = None
    reasoning: Reasoning | None = None
    safety_identifier: Identifier | None = None
    service_tier: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    text: TextConfig | None = None
    tool_choice: str | dict[str, Raw] | None = None
    tools: list[dict[str, Raw]] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    truncation: str | None = None
    user: Identifier | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None

    @property
    def with_logprobs(self) -> bool:
        """Whether the answer shall tell the logprobs of its tokens."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def is_stored(self) -> bool:
        """Whether the response is kept after its end."""
        return self.store is not False


class Tools(msgspec.Struct, frozen=True, kw_only=True):
    """The tools of a request: ``offered`` are those that the model is told of, ``choice`` is a word for engines."""

    functions: list[FunctionTool]
    offered: list[FunctionTool]
    choice: str
    skipped: list[str]


_request: Final = msgspec.json.Decoder(CreateRequest)
_everything: Final = msgspec.json.Decoder(dict[str, Any])
_known: Final = frozenset(CreateRequest.__struct_fields__)
_name: Final = msgspec.json.Decoder(str)
_choices: Final = msgspec.json.Decoder(list[dict[str, Any]])


def read_request(body: bytes) -> CreateRequest:
    """Decode and check a body; raise CallerError that names the field at fault."""
    # All of it is decoded once, so that nothing which is kept or passed on as it came can be malformed.
    for name, value in decode(_everything, body).items():
        if name not in _known and value is not None:
            if name in REFUSED:
                raise _unserved(name)
            raise unknown(name)
    request = decode(_request, body)
    _check_words(request)
    _check_format(request)
    if request.background and not request.is_stored:
        raise CallerError("background needs store: true, to be found again", code="invalid_value", param="background")
    if request.stream_options is not None and not request.stream:
        raise CallerError("stream_options needs stream: true", code="invalid_value", param="stream_options")
    reasoning = request.reasoning
    if reasoning is not None:
        if reasoning.effort not in {None, "none"}:
            raise _unserved("reasoning.effort")
        for name in ("summary", "generate_summary"):
            if getattr(reasoning, name) is not None:
                raise _unserved(f"reasoning.{name}")
    return request


def _check_words(request: CreateRequest) -> None:
    """The fields that take a few words."""
    one_of("truncation", request.truncation, ("auto", "disabled"))
    one_of("service_tier", request.service_tier, TIERS)
    for index, name in enumerate(request.include or ()):
        one_of(f"include[{index}]", name, INCLUDABLE)
    verbosity = request.text.verbosity if request.text is not None else None
    one_of("text.verbosity", verbosity, ("low", "medium", "high"))
    if verbosity in {"low", "high"}:
        raise _unserved("text.verbosity")


def _check_format(request: CreateRequest) -> None:
    wanted = request.text.format if request.text is not None else None
    if wanted is None:
        return
    one_of("text.format.type", wanted.type, ("text", "json_object", "json_schema"))
    if wanted.type != "json_schema":
        return
    for name in ("name", "schema"):
        if getattr(wanted, name) is None:
            param = f"text.format.{name}"
            raise CallerError(f"{param} is missing", code="missing_required_parameter", param=param)
    try:
        msgspec.convert({"name": wanted.name}, JsonSchema)
    except msgspec.ValidationError:
        raise CallerError(
            "text.format.name must be 1 to 64 letters, digits, _ or -", code="invalid_value", param="text.format.name"
        ) from None


# -- tools -------------------------------------------------------------------------------------------------------------


def read_tools(request: CreateRequest) -> Tools:
    """Which functions the model is told of; raise CallerError if the request insists on what is not served."""
    functions: list[FunctionTool] = []
    skipped: list[str] = []
    if len(request.tools or ()) > MAX_TOOLS:
        raise CallerError(f"tools: at most {MAX_TOOLS}", code="invalid_value", param="tools")
    for index, tool in enumerate(request.tools or ()):
        place = f"tools[{index}]"
        kind = _type_of(tool, place)
        if kind == "function":
            functions.append(_function(tool, place))
        elif kind in SKIPPED or kind.startswith("web_search_"):
            skipped.append(kind)
        else:
            raise CallerError(f"{place}.type is unknown", code="invalid_value", param=f"{place}.type")
    choice = request.tool_choice
    if choice is None:
        choice = "auto"
    if isinstance(choice, str):
        one_of("tool_choice", choice, ("none", "auto", "required"))
        if choice == "required" and not functions:
            raise CallerError("tool_choice needs a function among tools", code="invalid_value", param="tool_choice")
        return Tools(functions=functions, offered=functions, choice=choice, skipped=skipped)
    return _chosen(choice, functions, skipped)


def _chosen(choice: dict[str, Raw], functions: list[FunctionTool], skipped: list[str]) -> Tools:
    """A choice that names tools: the model is told of these alone, which every engine can do."""
    kind = _type_of(choice, "tool_choice")
    if kind == "function":
        named, word = [_text(choice, "name", "tool_choice")], "required"
    elif kind == "allowed_tools":
        word = _text(choice, "mode", "tool_choice")
        one_of("tool_choice.mode", word, ("auto", "required"))
        named = _allowed(choice.get("tools"))
    else:
        raise _unserved("tool_choice.type")
    known = {function.name: function for function in functions}
    for name in named:
        if name not in known:
            raise CallerError(
                "tool_choice names a function that is not among tools", code="invalid_value", param="tool_choice"
            )
    return Tools(functions=functions, offered=[known[name] for name in named], choice=word, skipped=skipped)


def _allowed(tools: Raw | None) -> list[str]:
    """The functions that ``allowed_tools`` names."""
    try:
        named = _choices.decode(tools or b"null")
    except msgspec.DecodeError:
        named = []
    names = list(dict.fromkeys(str(tool.get("name")) for tool in named if tool.get("type") == "function"))
    if not names or len(names) < len(named):
        raise CallerError(
            "tool_choice.tools must name functions, at least one and each once",
            code="invalid_value",
            param="tool_choice.tools",
        )
    return names


def _function(tool: dict[str, Raw], place: str) -> FunctionTool:
    for name, value in tool.items():
        if name not in FunctionTool.__struct_fields__ and bytes(value) not in {b"null", b"false"}:
            raise unknown(f"{place}.{name}")
    data = msgspec.json.encode(tool)
    try:
        return msgspec.json.decode(data, type=FunctionTool)
    except msgspec.ValidationError:
        for name in ("name", "description", "parameters", "strict"):
            _judge(tool, name, place)
        raise AssertionError("one of them is at fault") from None


def _judge(tool: dict[str, Raw], name: str, place: str) -> None:
    """Raise CallerError if this field of a function is at fault."""
    param = f"{place}.{name}"
    if name not in tool:
        if name == "name":
            raise CallerError(f"{param} is missing", code="missing_required_parameter", param=param)
        return
    fields: dict[str, Any] = {"type": "function", "name": "f"} | {name: msgspec.json.decode(tool[name])}
    try:
        msgspec.json.decode(msgspec.json.encode(fields), type=FunctionTool)
    except msgspec.ValidationError as error:
        code = "invalid_type" if ", got " in str(error) else "invalid_value"
        raise CallerError(f"{param} is not what a function takes", code=code, param=param) from None


# -- words for what is wrong -------------------------------------------------------------------------------------------


def one_of(param: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Raise CallerError unless a value is one of a few words, or was not sent."""
    if value is not None and value not in allowed:
        raise CallerError(f"{param} must be one of {', '.join(allowed)}", code="invalid_value", param=param)


def unknown(param: str) -> CallerError:
    """The error for a field that nobody knows."""
    return CallerError(f"{param} is not a field of this request", code="unknown_parameter", param=param)


def _unserved(param: str) -> CallerError:
    return CallerError(f"{param} is not served", code="unsupported_parameter", param=param)


def _type_of(value: dict[str, Raw], place: str) -> str:
    return _text(value, "type", place)


def _text(value: dict[str, Raw], name: str, place: str) -> str:
    param = f"{place}.{name}"
    if name not in value:
        raise CallerError(f"{param} is missing", code="missing_required_parameter", param=param)
    try:
        return _name.decode(value[name])
    except msgspec.DecodeError:
        raise CallerError(f"{param} must be text", code="invalid_type", param=param) from None
