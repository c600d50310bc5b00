"""Turns a customer's JSON into typed values, and what does not fit into an error that names the field.

Must not: repeat a value that the customer sent. Error texts name places, types and bounds only.

Called by: every route with a JSON body, and the validation of batch files.
"""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec

from motorpool.errors import CallerError

T = TypeVar("T")

_PLACE = re.compile(r" - at (?P<key>`key` in )?`\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `([^`]+)`")

# Fields whose values come from a fixed list, so that the error can say what is allowed.
CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "role": ("developer", "system", "user", "assistant", "tool", "function"),
    "response_format.type": ("text", "json_object", "json_schema"),
    "reasoning_effort": ("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "service_tier": ("auto", "default", "flex", "scale", "priority", "fast"),
    "verbosity": ("low", "medium", "high"),
    "method": ("POST",),
    "anchor": ("created_at",),
    "endpoint": ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"),
    "encoding_format": ("float", "base64"),
    "priority": ("standard", "flex"),
}


def decode(decoder: msgspec.json.Decoder[T], data: bytes | memoryview) -> T:
    """Decode ``data``; raise CallerError ``invalid_json``, ``missing_required_parameter``, ``invalid_type`` or
    ``invalid_value`` that says where.
    """
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None
    except msgspec.DecodeError as error:
        raise CallerError(f"the JSON cannot be read: {_where(str(error), len(data))}", code="invalid_json") from None
    except UnicodeDecodeError:
        raise CallerError("the JSON cannot be read: a string is not valid UTF-8", code="invalid_json") from None
    except RecursionError:
        raise CallerError("the JSON cannot be read: it is nested too deeply", code="invalid_json") from None


def whole_number(text: str, low: int, high: int) -> int | None:
    """The number that a query or a form has as text; None if it is no whole number from ``low`` to ``high``."""
    # The length comes first: a long number takes long to read, and Python refuses the longest ones.
    if len(text) > len(str(high)) or not (text.isascii() and text.isdecimal()):
        return None
    number = int(text)
    return number if low <= number <= high else None


def _where(message: str, length: int) -> str:
    if message.startswith("Input data was truncated"):
        return f"it ends too early (byte {length})"
    return message.removeprefix("JSON is malformed: ")


def _misfit(message: str) -> CallerError:
    found = _PLACE.search(message)
    # msgspec names the key of a map by ``[...]``: the customer's field is the map.
    path, inside, _ = (found["path"] if found else "").partition("[...]")
    text = message[: found.start()] if found else message
    missing = _MISSING.match(text)
    if missing:
        param = f"{path}.{missing[1]}" if path else missing[1]
        return CallerError(f"{param} is missing", code="missing_required_parameter", param=param)
    part = "a key of " if found and found["key"] else "a value of " if inside else ""
    what = f"{part}{path}" if path else "the body"
    if text.startswith("Invalid "):
        return CallerError(f"{what} {_allowed(path)}", code="invalid_value", param=path or None)
    code = "invalid_type" if ", got " in text else "invalid_value"
    return CallerError(f"{what}: {text[0].lower()}{text[1:].replace('`', '')}", code=code, param=path or None)


def _allowed(path: str) -> str:
    for name, values in CHOICES.items():
        if path == name or path.endswith("." + name):
            return "must be " + ("one of " if len(values) > 1 else "") + ", ".join(values)
    return "has a value that is not allowed here"
