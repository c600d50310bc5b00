"""Time and chance of a simulated world: one integer clock, one queue of events, and draws that anyone can repeat.

Decides: which event comes next, by its time and then by when it was asked for. Must not: know what an event does, or
read the machine's clock or its randomness.
Called by: every part in ``sim.full``.

A draw depends on the world's seed, the name of its stream and how many were drawn from it before, on nothing else:
leaving one kind of fault out changes no draw of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from heapq import heappop, heappush
from typing import Any, Final, TypeVar

T = TypeVar("T")
_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15


class Draws:
    """A stream of draws, named by the seed and any words. The generator is splitmix64 over a counter."""

    __slots__ = ("_count", "_key")

    def __init__(self, *names: object) -> None:
        text = "\x1f".join(str(name) for name in names)
        self._key = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
        self._count = 0

    def bits(self) -> int:
        """The next 64 bits."""
        self._count += 1
        z = (self._key + self._count * _GOLDEN) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def below(self, count: int) -> int:
        """A whole number from 0 to ``count - 1``."""
        return self.bits() * count >> 64

    def between(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + self.below(high - low + 1)

    def chance(self, share: float) -> bool:
        """True for this share of the draws. Draws nothing where the answer is certain."""
        return share > 0 and self.bits() < share * (1 << 64)

    def unit(self) -> float:
        """A number from 0 up to 1."""
        return (self.bits() >> 11) / (1 << 53)

    def pick(self, among: Sequence[T]) -> T:
        """One of these."""
        return among[self.below(len(among))]


class Clock:
    """The time of a world in milliseconds since 1970, and what is still to happen in it."""

    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms
        self.events = 0
        self._number = 0
        self._queue: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, at_ms: int, act: Callable[..., None], *args: Any) -> None:
        """Do this at a time; a time that has passed is now. What was asked for first comes first."""
        self._number += 1
        heappush(self._queue, (max(at_ms, self.now_ms), self._number, act, args))

    def after(self, for_ms: int, act: Callable[..., None], *args: Any) -> None:
        """Do this ``for_ms`` from now."""
        self._number += 1
        heappush(self._queue, (self.now_ms + for_ms, self._number, act, args))

    def run(self, until_ms: int, done: Callable[[], bool] | None = None) -> bool:
        """Let events happen up to and at ``until_ms``, or until ``done``, which is asked after each; whether it was."""
        queue = self._queue
        while queue and queue[0][0] <= until_ms:
            self.now_ms, _, act, args = heappop(queue)
            self.events += 1
            act(*args)
            if done is not None and done():
                return True
        self.now_ms = max(self.now_ms, until_ms)
        return False


class Trace:
    """What happened, as one hash: two runs are the same when theirs are. ``tail`` keeps the latest entries in words."""

    def __init__(self, keep: int = 0) -> None:
        self._hash = blake2b(digest_size=16)
        self._keep = keep
        self.tail: list[str] = []

    def add(self, now_ms: int, what: str, data: bytes = b"") -> None:
        """One more entry."""
        head = f"{now_ms} {what}"
        self._hash.update(head.encode())
        self._hash.update(data)
        if self._keep:
            self.tail.append(head)
            if len(self.tail) > 2 * self._keep:
                del self.tail[: -self._keep]

    def digest(self) -> str:
        """The hash so far, in hexadecimal."""
        return self._hash.hexdigest()
