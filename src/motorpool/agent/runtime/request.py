"""Reads the body of a request: which fields an engine understands, and what is wrong with the others.

Decides: whether a body can be run. Must not: run it, or repeat any part of it in an error text.
Called by: every backend, once for each attempt.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from motorpool.errors import CallerError
from motorpool.types import Kind

MAX_STOPS: Final = 4  # OpenAI's bound
MAX_CHOICES: Final = 128  # OpenAI's bound
MAX_TOP_LOGPROBS: Final = 20  # OpenAI's bound
MAX_TOKEN_ID: Final = 2**31 - 1  # what engines count in
COMPLETION_TOKENS: Final = 16  # how long a completion becomes when its request names no length; OpenAI's default
_FIELD = re.compile(r"at `\$\.?([A-Za-z_]*)")


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that chat completions and completions share."""

    model: str = ""
    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


class ChatBody(Sampling, frozen=True, kw_only=True):
    """The body of a chat completion.

    ``messages`` stay as they came, as the chat template judges them; only refusals among their parts are text here.
    """

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def limit_tokens(self) -> int | None:
        """The longest answer that the customer wants, None if not said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def may_call_tools(self) -> bool:
        """Whether the answer may hold tool calls."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def wants_json(self) -> bool:
        """Whether the answer must be JSON."""
        return self.response_format is not None and self.response_format.get("type", "text") != "text"

    @property
    def top(self) -> int | None:
        """How many alternatives to report for each token; None if no logprobs are wanted at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Sampling, frozen=True, kw_only=True):
    """The body of a completion."""

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def limit_tokens(self) -> int:
        """The longest answer that the customer wants."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        """How many alternatives to report for each token; None if no logprobs are wanted at all."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself: text, or token ids."""
        prompt = self.prompt
        if prompt is None:
            return [""]
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]  # a list that starts with an int holds ints alone
        return list(prompt)  # type: ignore[arg-type]  # this one is a list of strings or of lists


class _RawCompletion(Sampling, frozen=True, kw_only=True):
    """A completion as msgspec can decode it: unions of lists are not told apart by type."""

    prompt: str | list[str | int | list[int]] | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


Body = ChatBody | CompletionBody
_chat = msgspec.json.Decoder(ChatBody)
_completion = msgspec.json.Decoder(_RawCompletion)


def parse(kind: Kind, data: bytes) -> Body:
    """Decode and check a body; raise CallerError with the name of the field at fault."""
    try:
        body = _spoken(_chat.decode(data)) if kind is Kind.CHAT else _prompted(_completion.decode(data))
    except msgspec.ValidationError as error:
        raise misfit(str(error)) from error
    except msgspec.DecodeError as error:
        raise CallerError("the body is not JSON", code="invalid_json") from error
    except UnicodeDecodeError as error:
        raise CallerError("the body is not UTF-8", code="invalid_json") from error
    except RecursionError as error:
        raise CallerError("the body is nested too deeply", code="invalid_json") from error
    _check(body)
    return body


def stops_of(body: Body) -> tuple[str, ...]:
    """The stop strings of a body, without empty ones."""
    stop = body.stop
    if stop is None:
        return ()
    return tuple(word for word in ([stop] if isinstance(stop, str) else stop) if word)


def _spoken(body: ChatBody) -> ChatBody:
    """The body with refusals as text: they are what the assistant said, and chat templates know text alone."""
    for message in body.messages:
        content = message.get("content")
        if isinstance(content, list):
            message["content"] = [_as_text(part) for part in content]
    return body


def _as_text(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _prompted(raw: _RawCompletion) -> CompletionBody:
    prompt = raw.prompt
    if isinstance(prompt, list):
        if not prompt:
            raise CallerError("prompt is an empty list", code="invalid_value", param="prompt")
        if len({type(part) for part in prompt}) > 1:
            raise CallerError(
                "prompt must be a string, a list of strings, a list of tokens or a list of lists of tokens",
                code="invalid_type",
                param="prompt",
            )
    fields = {name: getattr(raw, name) for name in raw.__struct_fields__}
    body = CompletionBody(**fields)
    tokens = [prompt for prompt in body.prompts if isinstance(prompt, list)]
    if any(not 0 <= token <= MAX_TOKEN_ID for prompt in tokens for token in prompt):
        raise CallerError(f"prompt: a token is a number from 0 to {MAX_TOKEN_ID}", code="invalid_value", param="prompt")
    return body


def misfit(message: str) -> CallerError:
    """The error that says which field has the wrong type. msgspec's texts name types and paths, never values."""
    found = _FIELD.search(message)
    field = found.group(1) if found and found.group(1) else None
    if field is None:
        missing = re.search(r"missing required field `([a-z_]+)`", message)
        if missing:
            return CallerError(f"{missing[1]} is missing", code="missing_required_parameter", param=missing[1])
        return CallerError("the body must be a JSON object", code="invalid_type")
    expected = message.split(" - ", 1)[0].split(",", 1)[0].replace("`", "").lower()
    return CallerError(f"{field}: {expected}", code="invalid_type", param=field)


def _check(body: Body) -> None:
    """Check the ranges that OpenAI documents."""
    if isinstance(body, ChatBody):
        if not body.messages:
            raise CallerError("messages is empty", code="invalid_value", param="messages")
        _between("max_completion_tokens", body.max_completion_tokens, 1, None)
        _between("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
        for field, instead in (("functions", "tools"), ("function_call", "tool_choice")):
            if getattr(body, field) is not None:
                raise CallerError(f"{field} is not served: send {instead}", code="unsupported_parameter", param=field)
        if body.tool_choice not in (None, "none", "auto") and not body.tools:
            raise CallerError("tool_choice needs tools", code="invalid_value", param="tool_choice")
    else:
        _between("logprobs", body.logprobs, 0, MAX_TOP_LOGPROBS)
        if body.suffix:
            raise CallerError("suffix is not supported by this model", code="unsupported_parameter", param="suffix")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise CallerError("best_of must equal n", code="unsupported_value", param="best_of")
        if body.echo and body.logprobs is not None:
            raise CallerError(
                "logprobs of an echoed prompt are not served", code="unsupported_parameter", param="logprobs"
            )
    _between("max_tokens", body.max_tokens, 1, None)
    _between("n", body.n, 1, MAX_CHOICES)
    _between("temperature", body.temperature, 0, 2)
    _between("top_p", body.top_p, 0, 1)
    if isinstance(body.stop, list) and len(body.stop) > MAX_STOPS:
        raise CallerError(f"stop holds at most {MAX_STOPS} strings", code="invalid_value", param="stop")


def _between(field: str, value: float | None, low: float, high: float | None) -> None:
    if value is not None and (value < low or (high is not None and value > high)):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise CallerError(f"{field} must be {bound}", code="invalid_value", param=field)
