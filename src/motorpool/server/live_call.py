"""One live request on its way: where it runs, what has come of it, who is to be paid.

Decides: what of a vehicle's words is new to the client, and from where another vehicle goes on. Must not: choose
vehicles, know time limits, or keep bodies after the call. Called by: ``server.live``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any, Final

import msgspec

from motorpool import wire
from motorpool.core import events as ev
from motorpool.core.accepted import MAX_TEMPLATE_TOKENS
from motorpool.core.pricing import Price, Shares, extend, trim
from motorpool.core.streams import Tier, Tries, tier_of
from motorpool.errors import CallerError
from motorpool.server.beginnings import beginnings_of
from motorpool.server.cell import Carried, LiveAnswer, LiveRequest, LiveTokens
from motorpool.types import MAX_CHECKPOINT_BYTES, Kind, Usage

log = logging.getLogger(__name__)

DEFAULT_LIMIT_TOKENS: Final = 1_024  # of an answer whose request names no limit, for how long it may take
_array = msgspec.json.Decoder(list[msgspec.Raw])


class _Asked(msgspec.Struct):
    """What matters here of a customer's body; everything else is skipped."""

    service_tier: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class _Function(msgspec.Struct):
    """The next part of what is called."""

    name: str = ""
    arguments: str = ""


class _Fragment(msgspec.Struct):
    """The next part of a tool call."""

    index: int
    id: str = ""
    function: _Function = msgspec.field(default_factory=_Function)


_asked = msgspec.json.Decoder(_Asked)
_fragments = msgspec.json.Decoder(list[_Fragment])


class About(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is told of how an answer came about, inside ``usage.motorpool``, where it was not the ordinary way.

    ``continued``: how often another vehicle went on with it; ``hedged``: it was asked for twice; ``fallback``: no
    vehicle made it, but the operator's paid endpoint.
    """

    continued: int = 0
    hedged: bool = False
    fallback: bool = False


class LastTokens(LiveTokens, frozen=True, kw_only=True):
    """The end of a stream. ``bill``: what the caller has to pay in the books, if that is the caller's to do."""

    about: About = About()
    bill: ev.LiveEnded | None = None


class WholeAnswer(LiveAnswer, frozen=True, kw_only=True):
    """A whole answer, or an error. ``bill``: what the caller has to pay in the books, if that is the caller's to do."""

    about: About = About()
    bill: ev.LiveEnded | None = None


class Leg:
    """One attempt on one vehicle."""

    __slots__ = (
        "attempt",
        "base_tokens",
        "call",
        "due_ms",
        "excused",
        "heard_ms",
        "incarnation",
        "key",
        "measured",
        "next_seq",
        "pace",
        "prompt_bytes",
        "read_tokens",
        "readings",
        "sent_ms",
        "spoke",
        "vehicle_id",
        "waves",
    )

    def __init__(self, call: Call, vehicle_id: str, *, key: int, attempt: int, now_ms: float) -> None:
        self.call = call
        self.vehicle_id = vehicle_id
        self.key = key  # of its alarm
        self.attempt = attempt
        self.base_tokens = call.handed_back_tokens  # it was sent with these; the others that it hands back are its own
        self.incarnation = ""
        self.pace = ""  # the class of its vehicle
        self.prompt_bytes = 0
        self.measured = True  # its first token says something about others
        self.due_ms = 0  # when it is given up, if it does not speak before
        self.waves = 1
        self.sent_ms = now_ms
        self.heard_ms = now_ms
        self.next_seq = 0
        self.spoke = False  # it has given a content token
        self.excused = False  # its alarm rang late once, by our own fault
        self.read_tokens = 0  # of what was emitted, by an attempt that only reads
        self.readings = 0


class _Part:
    """One choice of an answer so far."""

    __slots__ = ("calls", "finish_reason", "ids_complete", "logprobs", "text", "token_ids", "tokens")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.tokens = 0
        self.token_ids: list[int] = []
        self.ids_complete = True  # some engines do not report them
        self.logprobs: list[bytes] = []
        self.calls: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def pack(self) -> wire.CheckpointChoice:
        return wire.CheckpointChoice(
            text="".join(self.text),
            tokens=self.tokens,
            token_ids=self.token_ids if self.ids_complete else [],
            logprobs=_joined(self.logprobs),
            finish_reason=self.finish_reason,
            calls=msgspec.json.encode(self.calls) if self.calls else b"",
        )

    def call(self, fragments: bytes) -> None:
        """Remember fragments of tool calls; those that cannot be read are passed over."""
        try:
            found = _fragments.decode(fragments)
        except (msgspec.DecodeError, UnicodeDecodeError):
            log.warning("the tool calls of a vehicle are unreadable")
            return
        for each in found:
            if each.index == len(self.calls):
                self.calls.append({"id": each.id, "type": "function", "function": {"name": "", "arguments": ""}})
            if each.index < len(self.calls):
                function = self.calls[each.index]["function"]
                function["name"] += each.function.name
                function["arguments"] += each.function.arguments


class Transcript:
    """All that vehicles have said of a stream, so that another one can go on after it."""

    def __init__(self, choices: int) -> None:
        self._choices = choices
        self._parts: dict[int, _Part] = {}
        self.tokens = 0

    @property
    def began(self) -> bool:
        """Whether the client has been given anything."""
        return bool(self._parts)

    @property
    def text_bytes(self) -> int:
        """How much there is to read besides the prompt, roughly."""
        return 4 * self.tokens

    def restore(self, carried: Carried) -> None:
        """What was said before this request, of its only choice."""
        part = self._parts[0] = _Part()
        part.text = [carried.text]
        part.tokens = self.tokens = carried.tokens
        part.token_ids = list(carried.token_ids)
        part.ids_complete = len(carried.token_ids) == carried.tokens
        part.logprobs = [carried.logprobs] if carried.logprobs else []
        part.finish_reason = carried.finish_reason

    def note(self, deltas: list[wire.Delta]) -> list[wire.Delta]:
        """Remember what is new; return what the client gets. Of a choice that has ended nothing is new."""
        fresh = [delta for delta in deltas if self._note(delta)]
        return deltas if len(fresh) == len(deltas) else fresh

    def _note(self, delta: wire.Delta) -> bool:
        if not 0 <= delta.index < self._choices:
            return False
        part = self._parts.get(delta.index)
        if part is None:
            if not (delta.text or delta.token_ids or delta.finish_reason or delta.calls):
                return True
            part = self._parts[delta.index] = _Part()
        elif part.finish_reason is not None:
            return False
        count = count_of(delta)
        self.tokens += count
        part.tokens += count
        part.ids_complete = part.ids_complete and bool(delta.token_ids or not delta.text)
        part.text.append(delta.text)
        part.token_ids.extend(delta.token_ids)
        if delta.logprobs:
            part.logprobs.append(delta.logprobs)
        if delta.calls:
            part.call(delta.calls)
        part.finish_reason = delta.finish_reason
        return True

    def checkpoint(self) -> bytes | None:
        """What the next vehicle needs; None if nothing has come yet."""
        if not self._parts:
            return None
        packed = wire.encode_checkpoint(self._checkpoint(with_logprobs=True))
        if len(packed) > MAX_CHECKPOINT_BYTES:  # the client has the logprobs already
            packed = wire.encode_checkpoint(self._checkpoint(with_logprobs=False))
        return packed

    def _checkpoint(self, *, with_logprobs: bool) -> wire.Checkpoint:
        choices = [self._parts.get(index, _EMPTY).pack() for index in range(self._choices)]
        if not with_logprobs:
            choices = [msgspec.structs.replace(choice, logprobs=b"") for choice in choices]
        if self._choices > 1:
            return wire.Checkpoint(text="", tokens=self.tokens, choices=choices)
        one = choices[0]
        return wire.Checkpoint(
            text=one.text,
            tokens=one.tokens,
            token_ids=one.token_ids,
            logprobs=one.logprobs,
            choices=choices if one.finish_reason is not None else [],
            calls=one.calls,
        )


_EMPTY: Final = _Part()


def count_of(delta: wire.Delta) -> int:
    """Tokens of a delta; one without token ids counts as one."""
    return len(delta.token_ids) or int(bool(delta.text))


def _joined(arrays: list[bytes]) -> bytes:
    """Several JSON arrays as one; empty if a vehicle's are unreadable, as the client has them already."""
    if not arrays:
        return b""
    try:
        entries = [entry for part in arrays for entry in _array.decode(part)]
    except (msgspec.DecodeError, UnicodeDecodeError):
        log.warning("the logprobs of a vehicle are unreadable")
        return b""
    return msgspec.json.encode(entries) if entries else b""


class Arrived(msgspec.Struct, frozen=True):
    """What the client gets next, and from which vehicle it is."""

    vehicle_id: str
    message: wire.Tokens | wire.Answered | LiveAnswer


class Mailbox:
    """What the client gets of one call, in order. An asyncio.Queue does the same for three times the price."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: deque[Arrived] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing now."""
        return not self._items

    def put(self, item: Arrived) -> None:
        """Add one and wake who waits."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Arrived:
        """The oldest, once there is one."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()


class Call:
    """One live request: its legs, what came of it, and what each vehicle did for it."""

    def __init__(self, request: LiveRequest) -> None:
        self.request = request
        self.tier, named_tokens = _read(request.body)
        self.beginnings = beginnings_of(request.model, request.body) if request.kind is Kind.CHAT else ()
        self.limit_tokens = named_tokens or DEFAULT_LIMIT_TOKENS
        self._most_tokens = named_tokens * request.choices  # of all its choices; 0 if no limit was named
        self.incoming = Mailbox()
        self.leg: Leg | None = None  # the one whose words count
        self.rival: Leg | None = None  # the same request on a second vehicle, until one of them speaks
        self.successor: Leg | None = None  # reads ahead, to take over
        self.switching = False  # it has read enough: hand over after the next token
        self.unprepared_until_ms = 0.0  # nobody safer was found
        self.attempts = 0
        self.tries = Tries()
        self.tried: set[str] = set()
        self.transcript = Transcript(request.choices)
        self.handed_back: bytes | None = None  # the longest checkpoint of a plain request
        self.placed: asyncio.Future[str] | None = None  # it waits for a vehicle
        self.continued = 0
        self.hedged = False
        self.ended = False  # its last word is in the mailbox
        self.delivered = 0  # tokens
        self.shares: Shares = []
        self.energy_uwh: dict[str, int] = {}  # what each vehicle drew for it
        self.is_measured = True
        self.paid = False
        if request.carried is not None:
            self._take_up(request.carried)

    def _take_up(self, carried: Carried) -> None:
        """It was broken off before, and its caller has kept what came of it."""
        self.energy_uwh = dict(carried.energy_uwh)
        self.is_measured = not carried.energy_uwh  # nobody knows any more
        if carried.tokens:
            self.transcript.restore(carried)
            self.delivered = carried.tokens
            self.shares = carried.shares

    @property
    def vehicle_id(self) -> str | None:
        """Where it runs; None while it waits."""
        return None if self.leg is None else self.leg.vehicle_id

    @property
    def prompt_bytes(self) -> int:
        """How much a vehicle has to read before it can say anything."""
        return len(self.request.body) + self.transcript.text_bytes

    @property
    def about(self) -> About:
        """How it came about."""
        return About(continued=self.continued, hedged=self.hedged)

    def legs(self) -> list[Leg]:
        """All that run now."""
        return [leg for leg in (self.leg, self.rival, self.successor) if leg is not None]

    def find(self, vehicle_id: str, attempt: int) -> Leg | None:
        """The leg that a message belongs to; None if it is over."""
        for leg in (self.leg, self.rival, self.successor):
            if leg is not None and leg.attempt == attempt and leg.vehicle_id == vehicle_id:
                return leg
        return None

    def give(self, vehicle_id: str, deltas: list[wire.Delta]) -> None:
        """The client takes new tokens of a vehicle now."""
        count = sum(count_of(delta) for delta in deltas)
        self.delivered += count
        self.shares = extend(self.shares, vehicle_id, count)

    def drew(self, vehicle_id: str, energy_uwh: int, *, is_measured: bool) -> None:
        """A vehicle tells what it drew for it."""
        if energy_uwh:
            self.energy_uwh[vehicle_id] = self.energy_uwh.get(vehicle_id, 0) + energy_uwh
            self.is_measured = self.is_measured and is_measured

    @property
    def handed_back_tokens(self) -> int:
        """How many tokens of a plain answer there are to go on with."""
        return 0 if self.handed_back is None else sum(count for _, count in self.shares)

    def take(self, leg: Leg, checkpoint: bytes | None) -> None:
        """A vehicle handed a plain request back with what it had generated; of a stream, what was emitted counts."""
        if checkpoint is None or self.request.stream:
            return
        try:
            tokens = wire.decode_checkpoint(checkpoint).tokens
        except CallerError:
            log.warning("%s: a checkpoint of %s is unreadable", self.request.request_id, leg.vehicle_id)
            return
        if tokens > self.handed_back_tokens:
            self.handed_back = checkpoint
            base = min(leg.base_tokens, tokens)
            self.shares = extend(trim(self.shares, base), leg.vehicle_id, tokens - base)

    def bill(self, usage: Usage, finisher: str, price: Price) -> ev.LiveEnded:
        """What is to be paid for it: no more tokens than its answer can have, to each vehicle those that were its own.

        Of a stream, what was delivered is known. Of a plain answer the last vehicle says how many tokens of those
        before it it has used: one that began anew, as it was asked beside them, has made all of it.
        """
        prompt = min(usage.prompt_tokens, len(self.request.body) + MAX_TEMPLATE_TOKENS)
        completion = usage.completion_tokens
        if self._most_tokens:
            completion = min(completion, self._most_tokens)
        used = completion if self.request.stream else min(usage.carried_tokens, completion)
        shares = trim(self.shares, used)
        known = sum(count for _, count in shares)
        return ev.LiveEnded(
            cause_id=self.request.request_id,
            request_id=self.request.request_id,
            account=self.request.account,
            price=price,
            prompt_tokens=prompt,
            completion_tokens=completion,
            finisher=finisher,
            shares=extend(shares, finisher, completion - known),
            energy_uwh=self.energy_uwh,
        )

    def checkpoint(self) -> bytes | None:
        """From where the next vehicle goes on; None to begin at the start."""
        return self.transcript.checkpoint() if self.request.stream else self.handed_back


def _read(body: bytes) -> tuple[Tier, int]:
    """How urgent a request is, and how long its answer may become, 0 if it does not say.

    What cannot be read is refused elsewhere.
    """
    try:
        asked = _asked.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Tier.DEFAULT, 0
    limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    return tier_of(asked.service_tier), limit or 0
