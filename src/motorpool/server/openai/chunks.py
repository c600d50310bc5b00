"""The events of a stream: what each one looks like, byte for byte.

The parts of a chunk that never change within a stream are encoded once; a token costs one short string to encode.
Must not: send anything, or decide when a stream ends.

Called by: ``live``.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from motorpool.core.attribution import Footprint
from motorpool.server.openai.footprints import NAME, shown
from motorpool.types import Kind, Usage
from motorpool.wire import Delta

DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": keep-alive\n\n"
_json: Final = msgspec.json.Encoder().encode


class Entry(msgspec.Struct, frozen=True):
    """One token in the chat API's logprobs."""

    token: str
    logprob: float
    top_logprobs: list[TopEntry] = []


class TopEntry(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float


_entries: Final = msgspec.json.Decoder(list[Entry])
_fragments: Final = msgspec.json.Decoder(list[msgspec.Raw])


class PlainAnswer(msgspec.Struct, frozen=True):
    """What is needed of a whole answer to send it as a stream."""

    choices: list[dict[str, Any]]
    usage: msgspec.Raw = msgspec.Raw(b"null")
    system_fingerprint: str | None = None


_plain: Final = msgspec.json.Decoder(PlainAnswer)


class Chunks:
    """Encodes the events of one stream. ``echo`` is what each choice begins with (completions with ``echo``)."""

    def __init__(
        self,
        kind: Kind,
        *,
        response_id: str,
        created_s: int,
        model: str,
        with_usage: bool,
        echo: list[str] | None = None,
    ) -> None:
        self._chat = kind is Kind.CHAT
        name = "chat.completion.chunk" if self._chat else "text_completion"
        self._start = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"system_fingerprint":' % (
            _json(response_id),
            name.encode(),
            created_s,
            _json(model),
        )
        self._end = b'}],"usage":null}\n\n' if with_usage else b"}]}\n\n"
        self._echo = echo
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}
        self._engine: str | None = None
        self._head = b""

    def tokens(self, deltas: list[Delta], engine: str) -> bytes:
        """The events of new tokens, as one piece to send; empty if there is nothing to tell yet."""
        self._fingerprint(engine)
        events: list[bytes] = []
        for delta in deltas:
            if delta.index not in self._begun:
                self._begun.add(delta.index)
                self._begin(events, delta.index, calls=bool(delta.calls) and not delta.text)
            if delta.text or delta.logprobs:
                self._text(events, delta)
            if delta.calls:
                for fragment in _fragments.decode(delta.calls):
                    self._event(events, delta.index, b'"delta":{"tool_calls":[%b]}' % bytes(fragment), b"null")
            if delta.finish_reason is not None:
                self._finish(events, delta.index, delta.finish_reason)
        return b"".join(events)

    def usage(self, usage: Usage, footprint: Footprint | None = None) -> bytes:
        """The last chunk of a stream with ``include_usage``: no choices, the tokens of the whole answer."""
        fields = usage_object(usage)
        if footprint is not None:
            fields[NAME] = shown(footprint)
        return b'%b[],"usage":%b}\n\n' % (self._head, _json(fields))

    def whole(self, body: bytes) -> bytes:
        """A whole plain answer as the events of a stream, its usage chunk not included."""
        answer = _plain.decode(body)
        self._fingerprint(answer.system_fingerprint or "")
        events: list[bytes] = []
        for choice in answer.choices:
            index = int(choice["index"])
            message = choice["message"]
            delta = {key: message[key] for key in ("content", "refusal") if message.get(key) is not None}
            delta["role"] = "assistant"
            calls = message.get("tool_calls")
            if calls:
                delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
            if message.get("function_call"):
                delta["function_call"] = message["function_call"]
            self._event(events, index, b'"delta":' + _json(delta), _json(choice.get("logprobs")))
            self._finish(events, index, choice["finish_reason"])
        return b"".join(events)

    def whole_usage(self, body: bytes) -> bytes:
        """The usage chunk of a whole plain answer."""
        return b'%b[],"usage":%b}\n\n' % (self._head, bytes(_plain.decode(body).usage))

    def _fingerprint(self, engine: str) -> None:
        if engine != self._engine:
            # Another vehicle may go on with a stream; the chunks from then on name its engine.
            self._engine = engine
            self._head = b'%b%b,"choices":' % (self._start, _json(engine or None))

    def _event(self, events: list[bytes], index: int, content: bytes, logprobs: bytes, finish: bytes = b"null") -> None:
        events.append(
            b'%b[{"index":%d,%b,"logprobs":%b,"finish_reason":%b%b'
            % (self._head, index, content, logprobs, finish, self._end)
        )

    def _begin(self, events: list[bytes], index: int, *, calls: bool = False) -> None:
        if self._chat:
            content = b"null" if calls else b'""'
            self._event(events, index, b'"delta":{"role":"assistant","content":%b,"refusal":null}' % content, b"null")
        elif self._echo is not None and self._echo[index]:
            self._offsets[index] = len(self._echo[index])
            self._event(events, index, b'"text":' + _json(self._echo[index]), b"null")

    def _text(self, events: list[bytes], delta: Delta) -> None:
        if self._chat:
            logprobs = b'{"content":%b,"refusal":null}' % delta.logprobs if delta.logprobs else b"null"
            self._event(events, delta.index, b'"delta":{"content":%b}' % _json(delta.text), logprobs)
        else:
            logprobs = self._parallel(delta) if delta.logprobs else b"null"
            self._event(events, delta.index, b'"text":' + _json(delta.text), logprobs)

    def _finish(self, events: list[bytes], index: int, reason: str) -> None:
        self._event(events, index, b'"delta":{}' if self._chat else b'"text":""', b"null", _json(reason))

    def _parallel(self, delta: Delta) -> bytes:
        """The older API's parallel arrays; ``text_offset`` counts characters from the start of the answer."""
        entries = _entries.decode(delta.logprobs)
        offset = self._offsets.get(delta.index, 0)
        offsets: list[int] = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry.token)
        self._offsets[delta.index] = offset
        tops = [{top.token: top.logprob for top in entry.top_logprobs} for entry in entries]
        return _json(
            {
                "tokens": [entry.token for entry in entries],
                "token_logprobs": [entry.logprob for entry in entries],
                "top_logprobs": tops if any(tops) else None,
                "text_offset": offsets,
            }
        )


def usage_object(usage: Usage) -> dict[str, object]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def error_event(body: bytes) -> bytes:
    """An error in a stream that has begun; ``body`` is an envelope on one line."""
    return b"data: %b\n\n" % body
