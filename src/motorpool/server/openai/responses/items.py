"""The input of a response: what a customer sends, as the items that are kept, and the messages that a model reads.

Decides whether a conversation is well formed: text alone, and each output of a function belongs to a call. Must not:
repeat what was sent in an error, or know how a request is run.

Called by: ``creation``, ``translate``.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from msgspec import Raw

from motorpool.errors import CallerError
from motorpool.server.openai.decoding import decode
from motorpool.server.openai.responses.objects import (
    INPUT_OFFSET,
    MAX_INPUT_ITEMS,
    Call,
    CallOutput,
    InputText,
    Item,
    Message,
    OutputText,
    Part,
    Refusal,
    item_id,
)

ROLES: Final = ("user", "assistant", "system", "developer")
Role = Literal["user", "assistant", "system", "developer"]
ChatMessage = dict[str, Any]


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class _Item(msgspec.Struct, frozen=True, kw_only=True):
    """An item as it is sent. Fields that the API itself adds to items, such as their ids, are not read."""

    type: str = "message"
    role: str | None = None
    content: str | list[_Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[_Part] | None = None


_item: Final = msgspec.json.Decoder(_Item)


def read_input(given: str | list[Raw] | None, response_id: str) -> list[Item]:
    """The items of a request's input; raise CallerError that names the one at fault."""
    if given is None:
        return []
    if isinstance(given, str):
        return [Message(id=item_id("msg", response_id, INPUT_OFFSET), role="user", content=[InputText(text=given)])]
    if len(given) > MAX_INPUT_ITEMS:
        raise CallerError(f"input: at most {MAX_INPUT_ITEMS} items", code="invalid_value", param="input")
    return [_read(raw, f"input[{index}]", response_id, INPUT_OFFSET + index) for index, raw in enumerate(given)]


def _read(raw: Raw, place: str, response_id: str, number: int) -> Item:
    try:
        item = decode(_item, bytes(raw))
    except CallerError as error:
        param = place if error.param is None else f"{place}.{error.param}"
        message = error.message if error.param is None else f"{place}.{error.message}"
        raise CallerError(message, code=error.code, param=param) from None
    if item.type == "message":
        return _message(item, place, item_id("msg", response_id, number))
    if item.type == "function_call":
        return Call(
            id=item_id("fc", response_id, number),
            call_id=_needed(item.call_id, f"{place}.call_id"),
            name=_needed(item.name, f"{place}.name"),
            arguments=_needed(item.arguments, f"{place}.arguments"),
        )
    if item.type == "function_call_output":
        output = _needed(item.output, f"{place}.output")
        return CallOutput(
            id=item_id("fco", response_id, number),
            call_id=_needed(item.call_id, f"{place}.call_id"),
            output=output if isinstance(output, str) else _outputs(output, f"{place}.output"),
        )
    raise CallerError(
        f"{place}.type: only message, function_call and function_call_output are served",
        code="unsupported_parameter",
        param=f"{place}.type",
    )


def _needed(value: Any, param: str) -> Any:
    if value is None:
        raise CallerError(f"{param} is missing", code="missing_required_parameter", param=param)
    return value


def _message(item: _Item, place: str, its_id: str) -> Message:
    role = _needed(item.role, f"{place}.role")
    if role not in ROLES:
        raise CallerError(
            f"{place}.role must be one of {', '.join(ROLES)}", code="invalid_value", param=f"{place}.role"
        )
    content = _needed(item.content, f"{place}.content")
    by_model = role == "assistant"
    if isinstance(content, str):
        parts: list[Part] = [OutputText(text=content) if by_model else InputText(text=content)]
    else:
        parts = [_part(part, f"{place}.content[{index}]", by_model=by_model) for index, part in enumerate(content)]
    return Message(id=its_id, role=role, content=parts)


def _part(part: _Part, place: str, *, by_model: bool) -> Part:
    if part.type in {"input_text", "output_text", "text"}:
        text = _needed(part.text, f"{place}.text")
        return OutputText(text=text) if by_model else InputText(text=text)
    if part.type == "refusal" and by_model:
        return Refusal(refusal=_needed(part.refusal, f"{place}.refusal"))
    raise CallerError(f"{place}.type: only text is served", code="unsupported_parameter", param=f"{place}.type")


def _outputs(parts: list[_Part], place: str) -> list[InputText]:
    found: list[InputText] = []
    for index, part in enumerate(parts):
        read = _part(part, f"{place}[{index}]", by_model=False)
        assert isinstance(read, InputText)
        found.append(read)
    return found


def check_calls(items: list[Item], param: str = "input") -> None:
    """Every output of a function belongs to a call before it, and every call has its output; raise CallerError."""
    waiting: dict[str, None] = {}
    seen: set[str] = set()
    for item in items:
        if isinstance(item, Call):
            waiting[item.call_id] = None
            seen.add(item.call_id)
        elif isinstance(item, CallOutput):
            if item.call_id not in seen:
                raise CallerError(
                    "a function_call_output has a call_id that no function_call before it has",
                    code="invalid_value",
                    param=param,
                )
            waiting.pop(item.call_id, None)
    if waiting:
        raise CallerError(
            "a function_call has no function_call_output: add what the function gave back",
            code="invalid_value",
            param=param,
        )


# -- as messages of a chat ---------------------------------------------------------------------------------------------


def to_messages(items: list[Item]) -> list[ChatMessage]:
    """The conversation as chat messages. What the model said and called in one turn becomes one message again."""
    messages: list[ChatMessage] = []
    for item in items:
        if isinstance(item, Call):
            call = {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": item.arguments},
            }
            last = messages[-1] if messages else None
            if last is None or last["role"] != "assistant":
                last = {"role": "assistant", "content": None, "tool_calls": []}
                messages.append(last)
            last.setdefault("tool_calls", []).append(call)
        elif isinstance(item, CallOutput):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _output(item.output)})
        else:
            messages.append({"role": item.role, "content": _content(item.content)})
    return messages


def _content(parts: list[Part]) -> str | list[dict[str, str]]:
    if len(parts) == 1 and not isinstance(parts[0], Refusal):
        return parts[0].text
    return [
        {"type": "refusal", "refusal": part.refusal}
        if isinstance(part, Refusal)
        else {"type": "text", "text": part.text}
        for part in parts
    ]


def _output(output: str | list[InputText]) -> str | list[dict[str, str]]:
    if isinstance(output, str):
        return output
    return [{"type": "text", "text": part.text} for part in output]
