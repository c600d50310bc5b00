"""The grammar of what is left of an answer, when its beginning was generated on another vehicle.

llama.cpp's grammars begin at their root with the first token that is generated; what stands in the prompt is not shown
to them. So the beginning is read here: by the same automaton that llama.cpp uses (stacks of what must still follow),
and the new root is whatever may follow after it. The rest of the answer is then held to exactly the rule that the
unbroken answer was held to, at the place where it was cut, be it in the middle of a string or of a number.

Decides: what may follow a given text under a grammar in llama.cpp's notation (GBNF). Must not: generate anything.
Called by: ``llama_run``.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

MAX_STACKS: Final = 512  # beyond, the grammar is too ambiguous to be followed here
MAX_NODES: Final = 200_000
_NAME: Final = re.compile(r"[A-Za-z0-9-]+")
_REPEAT: Final = re.compile(r"\{\s*(\d+)\s*(,?)\s*(\d*)\s*\}")
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t"}
_HEX: Final = {"x": 2, "u": 4, "U": 8}
_LAST: Final = 0x10FFFF

Stack = tuple[int, ...]  # numbers of nodes that must follow, the next one last


class _Chars(msgspec.Struct, frozen=True):
    """One character out of ranges, or none of them."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False

    def fits(self, code: int) -> bool:
        """Whether this character is one of them."""
        return any(low <= code <= high for low, high in self.ranges) != self.negated


class _Ref(msgspec.Struct, frozen=True):
    """Another rule."""

    name: str


class _Seq(msgspec.Struct, frozen=True):
    """One after the other."""

    parts: tuple[int, ...]


class _Alt(msgspec.Struct, frozen=True):
    """One of several."""

    parts: tuple[int, ...]


class _Repeat(msgspec.Struct, frozen=True):
    """The same several times; ``most`` None is without end."""

    part: int
    least: int
    most: int | None


_Node = _Chars | _Ref | _Seq | _Alt | _Repeat


class GrammarError(ValueError):
    """The notation is none that is known here."""


class Rest:
    """A grammar and a place in it. Raises GrammarError for a notation that is not known."""

    def __init__(self, grammar: str) -> None:
        self._nodes: list[_Node] = []
        self._numbers: dict[_Node, int] = {}
        self._rules: dict[str, int] = {}
        self._lines: list[str] = []
        for line in _joined(grammar):
            name, _, body = line.partition("::=")
            self._rules[name.strip()] = _Parser(self, body).rule()
            if name.strip() != "root":
                self._lines.append(line)
        if "root" not in self._rules:
            raise GrammarError("there is no root")
        self._stacks = self._expanded([(self._rules["root"],)])

    def advance(self, text: str) -> bool:
        """Go on by a text; False if no answer under this grammar goes on so, or it is too ambiguous to say."""
        for character in text:
            code = ord(character)
            after = [
                stack[:-1]
                for stack in self._stacks
                if stack and isinstance(node := self._nodes[stack[-1]], _Chars) and node.fits(code)
            ]
            self._stacks = self._expanded(after)
            if not self._stacks or len(self._stacks) > MAX_STACKS:
                self._stacks = []
                return False
        return True

    @property
    def is_over(self) -> bool:
        """Whether the text is whole and nothing may follow."""
        return self._stacks == [()]

    def grammar(self) -> str:
        """The grammar of what may follow from here."""
        ways = [" ".join(self._shown(number) for number in reversed(stack)) or '""' for stack in self._stacks]
        return "\n".join([*self._lines, "root ::= " + " | ".join(dict.fromkeys(ways))])

    def number(self, node: _Node) -> int:
        """The number of a node; equal ones have one."""
        found = self._numbers.get(node)
        if found is None:
            if len(self._nodes) >= MAX_NODES:
                raise GrammarError("the grammar is too large")
            found = self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
        return found

    def _expanded(self, stacks: list[Stack]) -> list[Stack]:
        """The same places, each with a character to come next or with nothing to come."""
        out: dict[Stack, None] = {}
        seen: set[Stack] = set(stacks)
        waiting = list(reversed(stacks))
        while waiting and len(out) <= MAX_STACKS:
            stack = waiting.pop()
            node = self._nodes[stack[-1]] if stack else None
            if node is None or isinstance(node, _Chars):
                out[stack] = None
                continue
            for following in reversed(self._following(node, stack[:-1])):
                if following not in seen:  # an empty part of an endless repetition leads back to itself
                    seen.add(following)
                    waiting.append(following)
        return list(out)

    def _following(self, node: _Node, below: Stack) -> list[Stack]:
        if isinstance(node, _Ref):
            if node.name not in self._rules:
                raise GrammarError("a rule is missing")
            return [(*below, self._rules[node.name])]
        if isinstance(node, _Seq):
            return [(*below, *reversed(node.parts))]
        if isinstance(node, _Alt):
            return [(*below, part) for part in node.parts]
        assert isinstance(node, _Repeat)
        if node.most == 0:
            return [below]
        most = None if node.most is None else node.most - 1
        again = self.number(_Repeat(node.part, max(0, node.least - 1), most))
        once = (*below, again, node.part)
        return [once] if node.least > 0 else [once, below]

    def _shown(self, number: int) -> str:
        node = self._nodes[number]
        if isinstance(node, _Chars):
            inside = "".join(
                f"\\U{low:08X}" if low == high else f"\\U{low:08X}-\\U{high:08X}" for low, high in node.ranges
            )
            return f"[{'^' if node.negated else ''}{inside}]"
        if isinstance(node, _Ref):
            return node.name
        if isinstance(node, _Seq):
            return "(" + (" ".join(self._shown(part) for part in node.parts) or '""') + ")"
        if isinstance(node, _Alt):
            return "(" + " | ".join(self._shown(part) for part in node.parts) + ")"
        return f"({self._shown(node.part)}){{{node.least},{'' if node.most is None else node.most}}}"


def _joined(grammar: str) -> list[str]:
    """One line for each rule; a rule may go on over several."""
    out: list[str] = []
    for line in grammar.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if "::=" in line and _NAME.match(line):
            out.append(line)
        elif out:
            out[-1] += " " + line.strip()
        else:
            raise GrammarError("it does not begin with a rule")
    return out


class _Parser:
    """Reads what stands after ``::=``."""

    def __init__(self, rest: Rest, text: str) -> None:
        self._rest = rest
        self._text = text
        self._at = 0

    def rule(self) -> int:
        """The whole body."""
        found = self._alternatives()
        if self._at < len(self._text):
            raise GrammarError(f"unexpected at {self._at}")
        return found

    def _alternatives(self) -> int:
        ways = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            ways.append(self._sequence())
        return ways[0] if len(ways) == 1 else self._rest.number(_Alt(tuple(ways)))

    def _sequence(self) -> int:
        parts: list[int] = []
        while (found := self._item()) is not None:
            parts.append(self._repeated(found))
        return parts[0] if len(parts) == 1 else self._rest.number(_Seq(tuple(parts)))

    def _peek(self) -> str:
        while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
            self._at += 1
        return self._text[self._at] if self._at < len(self._text) else ""

    def _item(self) -> int | None:
        first = self._peek()
        if first == '"':
            return self._literal()
        if first == "[":
            return self._class()
        if first == ".":
            self._at += 1
            return self._rest.number(_Chars(((0, _LAST),)))
        if first == "(":
            self._at += 1
            found = self._alternatives()
            if self._peek() != ")":
                raise GrammarError("a group has no end")
            self._at += 1
            return found
        name = _NAME.match(self._text, self._at)
        if name is None:
            return None
        self._at = name.end()
        return self._rest.number(_Ref(name[0]))

    def _repeated(self, part: int) -> int:
        bounds: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        mark = self._peek()
        if mark in bounds and mark:
            self._at += 1
            return self._rest.number(_Repeat(part, *bounds[mark]))
        found = _REPEAT.match(self._text, self._at)
        if found is None:
            return part
        self._at = found.end()
        least = int(found[1])
        most = int(found[3]) if found[3] else (None if found[2] else least)
        return self._rest.number(_Repeat(part, least, most))

    def _literal(self) -> int:
        self._at += 1
        parts: list[int] = []
        while self._text[self._at : self._at + 1] != '"':
            code = self._character()
            parts.append(self._rest.number(_Chars(((code, code),))))
        self._at += 1
        return parts[0] if len(parts) == 1 else self._rest.number(_Seq(tuple(parts)))

    def _class(self) -> int:
        self._at += 1
        negated = self._text[self._at : self._at + 1] == "^"
        self._at += negated
        ranges: list[tuple[int, int]] = []
        while self._text[self._at : self._at + 1] != "]":
            low = high = self._character()
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                high = self._character()
            ranges.append((low, high))
        self._at += 1
        return self._rest.number(_Chars(tuple(ranges), negated))

    def _character(self) -> int:
        if self._at >= len(self._text):
            raise GrammarError("a text has no end")
        found = self._text[self._at]
        self._at += 1
        if found != "\\":
            return ord(found)
        mark = self._text[self._at : self._at + 1]
        self._at += 1
        if mark in _HEX:
            digits = self._text[self._at : self._at + _HEX[mark]]
            self._at += _HEX[mark]
            try:
                return int(digits, 16)
            except ValueError:
                raise GrammarError("an escape is no number") from None
        if not mark:
            raise GrammarError("an escape has no end")
        return ord(_ESCAPES.get(mark, mark))
