"""The grammar of an answer under ``response_format``, in llama.cpp's notation.

Decides: what text such an answer may be. Must not: generate it. Called by: ``llama_run``.

llama.cpp makes this grammar when it reads a chat request, and lets the JSON stand in a code fence, which its parser
strips again: tokens that nobody sees, but that use up the limit of the answer. So it is asked for the grammar once for
each format, with a chat of one letter, and answers are generated as text under that rule of it which is the JSON alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

import msgspec

from motorpool.errors import CallerError, EngineError

Handle = Callable[[bytes, Callable[[bytes], bool]], object]
MAX_KEPT: Final = 64
MAX_KEPT_CHARS: Final = 256 * 1024
_MAX_TEXT_CHARS: Final = 200
_ROOT: Final = "root ::= "
_RULE: Final = "response-format"


class Grammars:
    """The grammars of one loaded model, the latest ones kept."""

    def __init__(self) -> None:
        self._kept: dict[bytes, str] = {}

    def of(self, response_format: dict[str, Any], chat: Handle) -> str | None:
        """The grammar of a format; None if this build of llama.cpp words it in another way.

        ``chat`` runs a chat completion. Raises CallerError for a schema that llama.cpp cannot follow.
        """
        wanted = msgspec.json.encode(closed(response_format))
        key = hashlib.sha256(wanted).digest()
        known = self._kept.get(key)
        if known is not None:
            return known
        grammar = _alone(_ask(msgspec.Raw(wanted), chat))
        if grammar is not None and len(grammar) <= MAX_KEPT_CHARS:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = grammar
        return grammar


def _ask(response_format: msgspec.Raw, chat: Handle) -> str:
    """What llama.cpp reports as the grammar of a chat in this format."""
    question = {"role": "user", "content": "x"}
    request = {"messages": [question], "response_format": response_format, "max_tokens": 1, "verbose": True}
    said: list[bytes] = []

    def keep(data: bytes) -> bool:
        said.append(data)
        return False

    try:
        chat(msgspec.json.encode(request), keep)
    except (ValueError, RuntimeError) as error:  # what xllamacpp raises for a request that llama.cpp refuses
        raise _unusable(str(error)) from error
    try:
        answer = msgspec.json.decode(said[0], type=dict[str, Any])
    except (IndexError, msgspec.DecodeError) as error:
        raise EngineError("llama.cpp does not answer") from error
    problem = answer.get("error")
    if isinstance(problem, dict):
        if int(problem.get("code", 500)) >= 500:
            raise EngineError("llama.cpp failed")
        raise _unusable(str(problem.get("message", "")))
    settings = answer.get("__verbose", {}).get("generation_settings", {})
    return str(settings.get("grammar", ""))


def _alone(grammar: str) -> str | None:
    """The same grammar with the JSON alone as its root."""
    rules = grammar.splitlines()
    if not any(rule.startswith(f"{_RULE} ::= ") for rule in rules):
        return None
    return "\n".join([*(rule for rule in rules if not rule.startswith(_ROOT)), _ROOT + _RULE])


def _unusable(said: str) -> CallerError:
    """llama.cpp's complaint, without what comes before its reason."""
    reason = said.rsplit("failed:", 1)[-1].strip().split("\n", 1)[0][:_MAX_TEXT_CHARS]
    return CallerError(
        f"the model cannot follow this schema: {reason}", code="invalid_json_schema", param="response_format"
    )


def closed(response_format: dict[str, Any]) -> dict[str, Any]:
    """The same format with objects that have no further properties, unless the schema speaks of them.

    Every instance stays valid, and a small model does not go on inventing properties.
    """
    outer = response_format.get("json_schema")
    if not isinstance(outer, dict) or not isinstance(outer.get("schema"), dict):
        return response_format
    return response_format | {"json_schema": outer | {"schema": _close(outer["schema"])}}


def _close(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_close(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # Names of properties and values of enum and const are data, not schemas.
    out = {
        key: ({name: _close(part) for name, part in value.items()} if _names_schemas(key, value) else _close(value))
        if key not in {"enum", "const", "default", "examples", "required"}
        else value
        for key, value in schema.items()
    }
    if "properties" in out and "additionalProperties" not in out and not {"allOf", "anyOf", "oneOf"} & set(out):
        out["additionalProperties"] = False
    return out


def _names_schemas(key: str, value: Any) -> bool:
    return key in {"properties", "$defs", "definitions", "patternProperties"} and isinstance(value, dict)
