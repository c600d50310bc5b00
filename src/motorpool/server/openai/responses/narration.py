"""The events of a response's stream, as a pure function of its facts, of the pieces of its text, and of its end.

Whoever tells the same response again, to a second client or after a restart, tells the same events with the same
numbers, byte for byte; so a client that lost its network goes on after any of them. Must not: send, wait or read a
clock.

The order is OpenAI's: ``created``, ``queued`` (in the background only), ``in_progress``; for a text
``output_item.added``, ``content_part.added``, ``output_text.delta`` for each piece, ``output_text.done``,
``content_part.done``, ``output_item.done``; for each function call ``output_item.added``,
``function_call_arguments.delta`` and ``.done``, ``output_item.done``; last ``completed``, ``incomplete`` or ``failed``.

Called by: ``log``, for each client that reads a stream.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw

from motorpool.server.openai.responses.objects import (
    Call,
    Facts,
    Message,
    OutputText,
    Refusal,
    ResponseObject,
    Status,
    item_id,
    response_object,
)

_json: Final = msgspec.json.Encoder().encode


class Began(msgspec.Struct, frozen=True, array_like=True, tag="began"):
    """A vehicle works on it."""


class Text(msgspec.Struct, frozen=True, array_like=True, tag="text"):
    """New text, with the logprobs of its tokens if the customer asked for them."""

    text: str
    logprobs: list[Raw] = []


class Restarted(msgspec.Struct, frozen=True, array_like=True, tag="restarted"):
    """The answer was made anew and came out differently: the item so far is incomplete, and another one begins."""


class Made(msgspec.Struct, frozen=True, array_like=True, tag="made"):
    """What a vehicle did for the texts since the piece of this kind before; listeners are told nothing of it.

    ``run`` is the run that it belongs to, ``chars`` the length of its text. ``token_ids`` are as many as ``tokens``, or
    the engine does not report them. ``finish_reason`` is set if this was the end.
    """

    run: int
    vehicle_id: str
    chars: int
    tokens: int
    token_ids: list[int] = []
    finish_reason: str | None = None


Piece = Began | Text | Restarted | Made
pieces_json: Final = msgspec.json.Decoder(list[Piece])


class Event(NamedTuple):
    """One event: its sequence number, and its bytes as they are sent."""

    number: int
    data: bytes


_LAST: Final = {"completed": "completed", "incomplete": "incomplete", "failed": "failed", "cancelled": "incomplete"}


class Narration:
    """Tells one response once, from its beginning."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._number = 0
        self._index = 0  # in the output, of the open item or of the next one
        self._open = False
        self._text: list[str] = []
        self._logprobs: list[Raw] = []

    def opening(self) -> list[Event]:
        """How every stream begins."""
        if not self._facts.background:
            return [self._state("created", "in_progress")]
        return [self._state("created", "queued"), self._state("queued", "queued")]

    def tell(self, piece: Piece) -> list[Event]:
        """The events of the next piece."""
        if isinstance(piece, Began):
            return [self._state("in_progress", "in_progress")]
        if isinstance(piece, Restarted):
            events = self._close_text("incomplete") if self._open else []
            self._text, self._logprobs = [], []
            return events
        if isinstance(piece, Made):
            return []
        return [*self._open_message(), self._delta(piece)]

    def end(self, result: ResponseObject) -> list[Event]:
        """The last events."""
        events: list[Event] = []
        if result.status in {"completed", "incomplete"}:
            for item in result.output:
                events += self._call(item) if isinstance(item, Call) else self._message(item)
        events.append(self._event(_LAST[result.status], response=result))
        return events

    # -- messages

    def _open_message(self) -> list[Event]:
        if self._open:
            return []
        self._open = True
        return [*self._added(Message(id=self._id("msg"), status="in_progress", role="assistant", content=[])),
                self._part("added", 0, OutputText(text=""))]  # fmt: skip

    def _message(self, item: Message) -> list[Event]:
        """The end of a message, which has begun unless nothing was said."""
        if not any(isinstance(part, Refusal) for part in item.content):
            return [*self._open_message(), *self._close_text(item.status)]
        events: list[Event] = []
        if not self._open:
            events += self._added(Message(id=self._id("msg"), status="in_progress", role="assistant", content=[]))
        for place, part in enumerate(item.content):
            if isinstance(part, Refusal):
                events += self._refusal(place, part)
            elif self._open:
                events += self._text_done()
        self._open = False
        return [*events, self._done(item)]

    def _delta(self, piece: Text) -> Event:
        self._text.append(piece.text)
        self._logprobs += piece.logprobs
        return self._event("output_text.delta", delta=piece.text, logprobs=piece.logprobs, **self._place(0))

    def _text_done(self) -> list[Event]:
        part = OutputText(text="".join(self._text), logprobs=self._logprobs)
        done = self._event("output_text.done", text=part.text, logprobs=part.logprobs, **self._place(0))
        return [done, self._part("done", 0, part)]

    def _close_text(self, status: Any) -> list[Event]:
        part = OutputText(text="".join(self._text), logprobs=self._logprobs)
        message = Message(id=self._id("msg"), status=status, role="assistant", content=[part])
        self._open = False
        return [*self._text_done(), self._done(message)]

    def _refusal(self, place: int, part: Refusal) -> list[Event]:
        return [
            self._part("added", place, Refusal(refusal="")),
            self._event("refusal.delta", delta=part.refusal, **self._place(place)),
            self._event("refusal.done", refusal=part.refusal, **self._place(place)),
            self._part("done", place, part),
        ]

    # -- function calls

    def _call(self, item: Call) -> list[Event]:
        begun = Call(id=self._id("fc"), status="in_progress", call_id=item.call_id, name=item.name, arguments="")
        place = {"item_id": begun.id, "output_index": self._index}
        return [
            *self._added(begun),
            self._event("function_call_arguments.delta", delta=item.arguments, **place),
            self._event("function_call_arguments.done", name=item.name, arguments=item.arguments, **place),
            self._done(item),
        ]

    # -- single events

    def _id(self, kind: str) -> str:
        return item_id(kind, self._facts.response_id, self._index)

    def _place(self, content_index: int) -> dict[str, Any]:
        return {"item_id": self._id("msg"), "output_index": self._index, "content_index": content_index}

    def _added(self, item: Message | Call) -> list[Event]:
        return [self._event("output_item.added", output_index=self._index, item=item)]

    def _done(self, item: Message | Call) -> Event:
        event = self._event("output_item.done", output_index=self._index, item=item)
        self._index += 1
        return event

    def _part(self, what: str, content_index: int, part: OutputText | Refusal) -> Event:
        return self._event(f"content_part.{what}", part=part, **self._place(content_index))

    def _state(self, name: str, status: Status) -> Event:
        return self._event(name, response=response_object(self._facts, status))

    def _event(self, event: str, **fields: Any) -> Event:
        kind = f"response.{event}"
        data = _json({"type": kind, "sequence_number": self._number, **fields})
        made = Event(self._number, b"event: %b\ndata: %b\n\n" % (kind.encode(), data))
        self._number += 1
        return made
