"""The tool calls of one choice while they are generated: what of them the customer does not have yet.

A call leaves a vehicle in fragments: first its place, id and name, then the text of its arguments. Another vehicle that
goes on generates the whole message once more, which nobody sees up to the place where the customer's ends; the ids are
those that the customer has. A call that comes out otherwise cannot be gone on with, and that is said as an error.

Decides: which fragments are new. Must not: read the text of a model; engines do. Called by: every backend.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec

from motorpool.errors import EngineError

_ID_CHARS: Final = 24
_encode: Final = msgspec.json.Encoder().encode


class Function(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is called, or the next part of it."""

    name: str = ""
    arguments: str = ""


class ToolCall(msgspec.Struct, kw_only=True):
    """A whole call, as far as it goes."""

    id: str = ""
    type: str = "function"
    function: Function = msgspec.field(default_factory=Function)


_whole: Final = msgspec.json.Decoder(list[ToolCall])


class Calls:
    """The calls of one choice of an answer. ``told``: what earlier vehicles gave out, as it stands in a checkpoint.

    ``seed`` is of the answer: calls without an id get one that is the same on every vehicle.
    """

    def __init__(self, told: bytes = b"", seed: str = "") -> None:
        self._told: list[ToolCall] = _whole.decode(told) if told else []
        self._made: dict[int, ToolCall] = {}
        self._seed = seed

    @property
    def begun(self) -> bool:
        """Whether the customer has a part of a call."""
        return bool(self._told)

    @property
    def named(self) -> bool:
        """Whether the first call has its name, from here or from before."""
        return any(call.function.name for call in (*self._told, *self._made.values()))

    @property
    def arguments(self) -> str:
        """The arguments of the first call, as far as they were told."""
        return self._told[0].function.arguments if self._told else ""

    @property
    def caught_up(self) -> bool:
        """Whether all that the customer has was generated here too."""
        return all(
            at in self._made and len(self._made[at].function.arguments) >= len(call.function.arguments)
            for at, call in enumerate(self._told)
        )

    def feed(self, parts: list[dict[str, Any]]) -> bytes:
        """Take parts of calls in OpenAI's form; what of them is new, in the same form. Empty if nothing is.

        Raises EngineError if they are not what the customer has been told.
        """
        new: list[dict[str, Any]] = []
        for part in parts:
            place = int(part.get("index", 0))
            made = self._made.setdefault(place, ToolCall())
            function = part.get("function") or {}
            made.id = made.id or str(part.get("id") or "")
            made.function.name += function.get("name") or ""
            made.function.arguments += function.get("arguments") or ""
            new += self._news(place, made)
        return _encode(new) if new else b""

    def whole(self) -> list[dict[str, Any]] | None:
        """The calls as they stand in a whole answer; None if there are none."""
        calls = [
            {
                "id": self._id(place, made),
                "type": "function",
                "function": {"name": made.function.name, "arguments": made.function.arguments},
            }
            for place, made in sorted(self._made.items())
        ]
        return calls or None

    def _news(self, place: int, made: ToolCall) -> list[dict[str, Any]]:
        if place > len(self._told):
            raise EngineError("a call has no place among the others")
        if place == len(self._told):
            if not made.function.name:
                return []  # its name is still to come
            self._told.append(ToolCall(id=self._id(place, made), function=Function(name=made.function.name)))
            head = {"name": made.function.name, "arguments": ""}
            first = [{"index": place, "id": self._told[place].id, "type": "function", "function": head}]
            return first + self._fragment(place, made)
        told = self._told[place].function
        if told.name != made.function.name and not told.name.startswith(made.function.name):
            raise EngineError("another tool was called than before")
        return self._fragment(place, made)

    def _fragment(self, place: int, made: ToolCall) -> list[dict[str, Any]]:
        told, arguments = self._told[place].function, made.function.arguments
        if told.arguments.startswith(arguments):
            return []
        if not arguments.startswith(told.arguments):
            raise EngineError("a tool was called otherwise than before")
        fragment = arguments[len(told.arguments) :]
        told.arguments = arguments
        return [{"index": place, "function": {"arguments": fragment}}]

    def _id(self, place: int, made: ToolCall) -> str:
        if place < len(self._told):
            return self._told[place].id
        digest = hashlib.sha256(f"{self._seed}\x1f{place}".encode()).hexdigest()
        return made.id or f"call_{digest[:_ID_CHARS]}"
