"""How much a key may ask of models in a minute: requests and tokens, with the headers that OpenAI's clients read.

Each limit is a bucket that holds a minute's worth and fills steadily, so that nobody waits for the turn of a minute.
A request takes one from the first bucket; from the second it takes what it may cost at most, and gets back what it did
not use. What it uses beyond that is owed. The buckets are in memory: a restart fills them.

Called by: ``app``. Must not: know what is asked, or keep a key.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import msgspec

from motorpool.errors import RateLimitError
from motorpool.server.cell import Cell, LiveAnswer, LiveRequest, LiveTokens
from motorpool.store.keylimits import KeyLimit, limit_of_key
from motorpool.trust import apikeys

MINUTE_MS: Final = 60_000
MAX_METERS: Final = 10_000
CHARS_A_TOKEN: Final = 4  # a guess for what is not read yet; the bill corrects it
_UNLIMITED: Final = KeyLimit(key_id="")


class Bucket:
    """So much a minute. ``level`` may be below 0: then something is owed."""

    __slots__ = ("_at_ms", "level", "limit")

    def __init__(self, limit: int, now_ms: int) -> None:
        self.limit = limit
        self.level = float(limit)
        self._at_ms = now_ms

    def fill(self, now_ms: int) -> None:
        """Let time pass."""
        self.level = min(self.limit, self.level + max(0, now_ms - self._at_ms) * self.limit / MINUTE_MS)
        self._at_ms = now_ms

    def resize(self, limit: int) -> None:
        """Another limit; what was used stays used."""
        self.level = min(limit, self.level + limit - self.limit)
        self.limit = limit

    def wait_ms(self, amount: float) -> int:
        """How long until it holds so much; 0 if it does."""
        return max(0, math.ceil((amount - self.level) * MINUTE_MS / self.limit))

    @property
    def remaining(self) -> int:
        """What may be asked for now."""
        return max(0, math.floor(self.level))


class Meter:
    """The two buckets of one key."""

    def __init__(self, limit: KeyLimit, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self.take_limit(limit)

    def take_limit(self, limit: KeyLimit) -> None:
        """The operator has set these limits."""
        for name, most in (("requests", limit.requests_a_minute), ("tokens", limit.tokens_a_minute)):
            if most is None:
                self._buckets.pop(name, None)
            elif name in self._buckets:
                self._buckets[name].resize(most)
            else:
                self._buckets[name] = Bucket(most, self._clock())

    @property
    def is_idle(self) -> bool:
        """Whether forgetting it changes nothing."""
        self._fill()
        return all(bucket.level >= bucket.limit for bucket in self._buckets.values())

    def count_request(self) -> None:
        """One more request; raise RateLimitError that says when, if it is one too many. Then it does not count."""
        self._take("requests", 1)

    def reserve(self, tokens: int) -> int:
        """Set tokens aside; return how many. Raise RateLimitError if there are too few; the request does not count."""
        bucket = self._buckets.get("tokens")
        if bucket is None:
            return 0
        tokens = min(tokens, bucket.limit)  # one that needs more than a minute's worth runs when the bucket is full
        try:
            self._take("tokens", tokens)
        except RateLimitError:
            requests = self._buckets.get("requests")
            if requests is not None:
                requests.level = min(requests.limit, requests.level + 1)
            raise
        return tokens

    def settle(self, reserved: int, used: int) -> None:
        """A request has ended: it used so many tokens."""
        bucket = self._buckets.get("tokens")
        if bucket is not None:
            bucket.level = min(bucket.limit, bucket.level + reserved - used)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The state of both limits; resets are the times until the buckets are full."""
        self._fill()
        found: list[tuple[bytes, bytes]] = []
        for name, bucket in self._buckets.items():
            found += [
                (f"x-ratelimit-limit-{name}".encode(), b"%d" % bucket.limit),
                (f"x-ratelimit-remaining-{name}".encode(), b"%d" % bucket.remaining),
                (f"x-ratelimit-reset-{name}".encode(), duration(bucket.wait_ms(bucket.limit)).encode()),
            ]
        return found

    def _fill(self) -> None:
        now_ms = self._clock()
        for bucket in self._buckets.values():
            bucket.fill(now_ms)

    def _take(self, name: str, amount: int) -> None:
        self._fill()
        bucket = self._buckets.get(name)
        if bucket is None:
            return
        wait_ms = bucket.wait_ms(amount)
        if wait_ms:
            raise RateLimitError(
                f"this key may use {bucket.limit} {name} a minute: try again in {duration(wait_ms)}",
                code="rate_limit_exceeded",
                retry_after_ms=wait_ms,
            )
        bucket.level -= amount


def duration(ms: int) -> str:
    """Milliseconds as OpenAI writes them: ``120ms``, ``7.66s``, ``6m0s``."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, MINUTE_MS)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


class RateLimits:
    """The meters of all keys that have limits. What the operator sets counts within ``ttl_ms``."""

    def __init__(self, reader: Callable[[], sqlite3.Connection], clock: Callable[[], int], ttl_ms: int) -> None:
        self._reader = reader
        self._clock = clock
        self._ttl_ms = ttl_ms
        self._known: dict[bytes, tuple[KeyLimit, int]] = {}
        self._meters: dict[str, Meter] = {}

    def meter(self, authorization: bytes) -> Meter | None:
        """The meter of a key that was found good; None if it has no limits."""
        digest = apikeys.digest(authorization[7:].strip())
        now_ms = self._clock()
        known = self._known.get(digest)
        if known is None or now_ms - known[1] >= self._ttl_ms:
            limit = limit_of_key(self._reader(), digest) or _UNLIMITED
            if len(self._known) >= MAX_METERS:
                self._known.clear()
            self._known[digest] = (limit, now_ms)
            self._apply(limit)
        else:
            limit = known[0]
        return None if limit.is_none else self._meters.get(limit.key_id)

    def _apply(self, limit: KeyLimit) -> None:
        if limit.is_none:
            return
        meter = self._meters.get(limit.key_id)
        if meter is not None:
            meter.take_limit(limit)
            return
        if len(self._meters) >= MAX_METERS:
            self._meters = {key_id: meter for key_id, meter in self._meters.items() if not meter.is_idle}
        self._meters[limit.key_id] = Meter(limit, self._clock)


# The meter of the request that the current task, or one that it began, works for.
_current: ContextVar[Meter | None] = ContextVar("meter", default=None)


def work_for(meter: Meter | None) -> None:
    """What this task asks of models from now on counts for this meter."""
    _current.set(meter)


class _Ask(msgspec.Struct, frozen=True):
    """What bounds an answer."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None


class _Used(msgspec.Struct, frozen=True):
    """The bill of an answer."""

    total_tokens: int = 0


class _Billed(msgspec.Struct, frozen=True):
    """What is read of an answer."""

    usage: _Used | None = None


_ask: Final = msgspec.json.Decoder(_Ask)
_billed: Final = msgspec.json.Decoder(_Billed)


def most_tokens(request: LiveRequest) -> int:
    """What a request may cost at most, as far as it says so: its prompt is guessed from its length."""
    prompt = len(request.body) // CHARS_A_TOKEN + 1
    try:
        ask = _ask.decode(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return prompt
    limit = ask.max_completion_tokens or ask.max_tokens or ask.max_output_tokens or 0
    return prompt + limit * request.choices


def _bill(answer: LiveAnswer) -> int:
    if answer.status >= 400:
        return 0
    try:
        usage = _billed.decode(answer.body).usage
    except (msgspec.DecodeError, UnicodeDecodeError):
        return 0
    return 0 if usage is None else usage.total_tokens


class MeteredCell:
    """The cell, with every live request counted for whoever asks. Everything else is the cell's own."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    if not TYPE_CHECKING:  # so that type checkers still find what is misspelt

        def __getattr__(self, name: str) -> Any:
            return getattr(self._cell, name)

    async def answer(self, request: LiveRequest) -> LiveAnswer:
        """See ``Cell.answer``; raises RateLimitError as well."""
        meter = _current.get()
        if meter is None:
            return await self._cell.answer(request)
        reserved = meter.reserve(most_tokens(request))
        used = 0
        try:
            answer = await self._cell.answer(request)
            used = _bill(answer)
        finally:
            meter.settle(reserved, used)
        return answer

    def live(self, request: LiveRequest) -> AsyncIterator[LiveTokens | LiveAnswer]:
        """See ``Cell.live``; the iterator raises RateLimitError as well."""
        meter = _current.get()
        return self._cell.live(request) if meter is None else self._counted(request, meter)

    async def _counted(self, request: LiveRequest, meter: Meter) -> AsyncIterator[LiveTokens | LiveAnswer]:
        reserved = meter.reserve(most_tokens(request))
        used = 0
        items = self._cell.live(request)
        try:
            async with contextlib.AsyncExitStack() as stack:
                if hasattr(items, "aclose"):
                    stack.push_async_callback(items.aclose)
                async for item in items:
                    if isinstance(item, LiveAnswer):
                        used = max(used, _bill(item))
                    elif item.usage is not None:
                        used = item.usage.prompt_tokens + item.usage.completion_tokens
                    else:
                        used += sum(len(delta.token_ids) or bool(delta.text) for delta in item.deltas)
                    yield item
        finally:
            meter.settle(reserved, used)
