"""Lets the tokens of one answer out as soon as no stop string can begin in them.

Decides: where an answer ends at a stop string, and which tokens may leave before that is known. Tokens leave whole, so
that the text of a checkpoint and its token ids always say the same. Must not: do I/O. Called by: the backends.

Stop strings are looked for here and not in llama.cpp or a remote server, because a continued answer must also find one
that began before the cut.
"""

from __future__ import annotations

from collections import deque

import msgspec

from motorpool.agent.runtime.answer import Entry


class Piece(msgspec.Struct, kw_only=True):
    """Some text with the ids of its tokens (-1 where an id is not known) and their logprob entries."""

    text: str
    ids: list[int]
    entries: list[Entry]


class Flow:
    """The text of one choice while it grows. ``carried`` is what earlier vehicles already gave out."""

    def __init__(self, stops: tuple[str, ...], carried: str = "") -> None:
        self.text = carried
        self.stopped = False
        self._stops = stops
        self._reach = max((len(stop) for stop in stops), default=0)
        self._held: deque[tuple[int, Piece]] = deque()  # where each one starts in the text
        self._look_back()

    def feed(self, piece: Piece) -> list[Piece]:
        """Add a piece; return those that may leave now. After a stop string ``stopped`` is true."""
        if self.stopped:
            return []
        start = len(self.text)
        self.text += piece.text
        self._held.append((start, piece))
        if not self._stops:
            return self._release(len(self.text))
        self._cut(max(0, start - self._reach + 1))
        if self.stopped:
            return self._release_until_stop()
        return self._release(len(self.text) - self._undecided())

    def end(self) -> list[Piece]:
        """The answer ends here: what was held back leaves too."""
        return self._release(len(self.text))

    def _look_back(self) -> None:
        """A text that was already given out may hold a stop string if another engine gave it out."""
        if self._stops and self.text:
            self._cut(0)

    def _cut(self, begin: int) -> None:
        found = [at for at in (self.text.find(stop, begin) for stop in self._stops) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _undecided(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        for size in range(min(self._reach - 1, len(self.text)), 0, -1):
            tail = self.text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0

    def _release(self, until: int) -> list[Piece]:
        out = []
        while self._held and self._held[0][0] + len(self._held[0][1].text) <= until:
            out.append(self._held.popleft()[1])
        return out

    def _release_until_stop(self) -> list[Piece]:
        """Pieces before the stop string; the last one may be cut short."""
        out = []
        for start, piece in self._held:
            if start >= len(self.text):
                break
            out.append(Piece(text=self.text[start : start + len(piece.text)], ids=piece.ids, entries=piece.entries))
        self._held.clear()
        return out
