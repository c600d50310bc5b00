"""The smallest JSON value that fits a simple schema: what the null engine answers when a schema is asked for.

Decides: one value for each schema, always the same. Must not: claim to know all of JSON Schema; a schema that it cannot
satisfy is refused. Called by: ``null``.
"""

from __future__ import annotations

from typing import Any, Final

from motorpool.errors import CallerError

MAX_DEPTH: Final = 32
MAX_SIZE: Final = 10_000  # characters of a string, items of an array
_Refs = dict[str, Any]


def minimal_instance(schema: dict[str, Any]) -> Any:
    """A value that is valid for ``schema``; raise CallerError for what is not understood."""
    refs: _Refs = {}
    for place in ("$defs", "definitions"):
        for name, definition in (schema.get(place) or {}).items():
            refs[f"#/{place}/{name}"] = definition
    return _instance(schema, refs, 0)


def _instance(schema: Any, refs: _Refs, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise _unusable(f"is nested deeper than {MAX_DEPTH}")
    if schema is True or schema == {}:
        return None
    if not isinstance(schema, dict):
        raise _unusable("holds a part that is not an object")
    if "$ref" in schema:
        if schema["$ref"] not in refs:
            raise _unusable("refers to a definition that is not there")
        return _instance(refs[schema["$ref"]], refs, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for choice in ("anyOf", "oneOf", "allOf"):
        if schema.get(choice):
            return _instance(schema[choice][0], refs, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "null")
    if isinstance(kind, list):
        kind = kind[0] if kind else "null"
    if kind == "object":
        properties = schema.get("properties") or {}
        names = schema.get("required", list(properties))
        return {name: _instance(properties.get(name, True), refs, depth + 1) for name in names}
    if kind == "array":
        items = schema.get("items", True)
        return [_instance(items, refs, depth + 1) for _ in range(_size(schema, "minItems", 0))]
    return _scalar(kind, schema)


def _scalar(kind: Any, schema: dict[str, Any]) -> Any:
    if kind == "string":
        return "x" * max(_size(schema, "minLength", 0), min(4, _size(schema, "maxLength", 4, most=None)))
    if kind in {"integer", "number"}:
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        high = schema.get("maximum", low)
        return int(max(low, min(0, high)) if low <= 0 else -(-low // 1))
    if kind == "boolean":
        return False
    if kind == "null":
        return None
    raise _unusable("names an unknown type")


def _size(schema: dict[str, Any], name: str, default: int, most: int | None = MAX_SIZE) -> int:
    size = schema.get(name, default)
    if not isinstance(size, int) or size < 0 or (most is not None and size > most):
        raise _unusable(f"has a {name} that is no whole number{'' if most is None else f' up to {most}'}")
    return size


def _unusable(why: str) -> CallerError:
    return CallerError(f"the JSON schema {why}", code="invalid_json_schema", param="response_format")
