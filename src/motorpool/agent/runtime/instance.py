"""The smallest JSON value that fits a simple schema: what the null engine answers when a schema is asked for.

Decides: one value for each schema, always the same. Must not: claim to know all of JSON Schema; a schema that it cannot
satisfy is refused. Called by: ``null``.
"""

from __future__ import annotations

from typing import Any, Final

from motorpool.errors import CallerError

MAX_DEPTH: Final = 32
MAX_SIZE: Final = 10_000  # characters of a string, items of an array
MAX_VALUES: Final = 100_000
MAX_NUMBER: Final = 1e15  # beyond it a float no longer counts by ones


def minimal_instance(schema: dict[str, Any]) -> Any:
    """A value that is valid for ``schema``; raise CallerError for what is not understood."""
    return _Maker(schema).make(schema, 0)


class _Maker:
    """Makes one value and counts its parts."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._made = 0
        self._refs: dict[str, Any] = {}
        for place in ("$defs", "definitions"):
            for name, definition in _mapping(schema, place).items():
                self._refs[f"#/{place}/{name}"] = definition

    def make(self, schema: Any, depth: int) -> Any:
        """A value for one part of the schema."""
        self._made += 1
        if self._made > MAX_VALUES:
            raise _unusable(f"needs more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise _unusable(f"is nested deeper than {MAX_DEPTH}")
        if schema is True or schema == {}:
            return None
        if not isinstance(schema, dict):
            raise _unusable("holds a part that is not an object")
        if "$ref" in schema:
            return self.make(self._definition(schema["$ref"]), depth + 1)
        if "const" in schema:
            return schema["const"]
        if _list(schema, "enum"):
            return schema["enum"][0]
        for choice in ("anyOf", "oneOf", "allOf"):
            if _list(schema, choice):
                return self.make(schema[choice][0], depth + 1)
        return self._typed(schema, depth)

    def _definition(self, name: Any) -> Any:
        if not isinstance(name, str) or name not in self._refs:
            raise _unusable("refers to a definition that is not there")
        return self._refs[name]

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type", "object" if "properties" in schema else "null")
        if isinstance(kind, list):
            kind = kind[0] if kind else "null"
        if kind == "object":
            properties = _mapping(schema, "properties")
            names = _list(schema, "required") if "required" in schema else list(properties)
            if not all(isinstance(name, str) for name in names):
                raise _unusable("requires a property whose name is no string")
            return {name: self.make(properties.get(name, True), depth + 1) for name in names}
        if kind == "array":
            items = schema.get("items", True)
            return [self.make(items, depth + 1) for _ in range(_size(schema, "minItems", 0))]
        return _scalar(kind, schema)


def _scalar(kind: Any, schema: dict[str, Any]) -> Any:
    if kind == "string":
        return "x" * max(_size(schema, "minLength", 0), min(4, _size(schema, "maxLength", 4, most=None)))
    if kind in ("integer", "number"):
        low = _number(schema, "minimum", _number(schema, "exclusiveMinimum", -1) + 1)
        high = _number(schema, "maximum", low)
        return int(max(low, min(0, high)) if low <= 0 else -(-low // 1))
    if kind == "boolean":
        return False
    if kind == "null":
        return None
    raise _unusable("names an unknown type")


def _mapping(schema: dict[str, Any], name: str) -> dict[str, Any]:
    value = schema.get(name)
    if value is not None and not isinstance(value, dict):
        raise _unusable(f"has {name} that are no object")
    return value or {}


def _list(schema: dict[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    if value is not None and not isinstance(value, list):
        raise _unusable(f"has {name} that is no array")
    return value or []


def _number(schema: dict[str, Any], name: str, default: float) -> float:
    value = schema.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > MAX_NUMBER:
        raise _unusable(f"has a {name} that is no number up to {MAX_NUMBER:.0e}")
    return value


def _size(schema: dict[str, Any], name: str, default: int, most: int | None = MAX_SIZE) -> int:
    size = schema.get(name, default)
    if isinstance(size, bool) or not isinstance(size, int) or size < 0 or (most is not None and size > most):
        raise _unusable(f"has a {name} that is no whole number{'' if most is None else f' up to {most}'}")
    return size


def _unusable(why: str) -> CallerError:
    return CallerError(f"the JSON schema {why}", code="invalid_json_schema", param="response_format")
