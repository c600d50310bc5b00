"""Reads streamed chat completions and notes when each piece of text came; costs little, so that a thousand fit.

Decides: what counts as a whole stream. Must not: try again; a client that does would hide what is measured.
Called by: ``run_streams``.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from bench.load import Target

_DATA = b"data: "


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


class Heard(msgspec.Struct, kw_only=True):
    """One stream: its text, when each piece of it came in seconds, how it ended and what it cost."""

    status: int = 0
    text: str = ""
    sent_s: float = 0.0
    at_s: list[float] = []
    finish_reason: str | None = None
    done: bool = False
    error: str = ""
    usage: dict[str, Any] = {}

    @property
    def whole(self) -> bool:
        """Whether it came to an end that says so."""
        return self.status == 200 and self.done and self.finish_reason is not None and not self.error

    @property
    def first_s(self) -> float | None:
        """Until its first text."""
        return self.at_s[0] - self.sent_s if self.at_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Between pieces of text."""
        return [after - before for before, after in zip(self.at_s, self.at_s[1:], strict=False)]

    @property
    def ours(self) -> dict[str, Any]:
        """What stands in ``usage.motorpool``."""
        found: dict[str, Any] = self.usage.get("motorpool") or {}
        return found


class Listener(asyncio.Protocol):
    """One connection with one stream. ``on_piece`` is called after each piece of text with their number."""

    def __init__(self, on_piece: Any = None) -> None:
        self.heard = Heard()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_piece = on_piece
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = b""
        self._texts: list[str] = []
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """The stream is cut, unless it had ended."""
        self._end("" if self.heard.done else f"cut: {exc or 'end of connection'}")

    def on_body(self, body: bytes) -> None:
        """Part of a response."""
        now_s = time.perf_counter()
        *lines, self._buffer = (self._buffer + body).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                self._event(line[len(_DATA) :], now_s)

    def on_message_complete(self) -> None:
        """The response has ended."""
        self.heard.status = self._parser.get_status_code()
        self._end("" if self.heard.done else self.heard.error or f"status {self.heard.status}")

    def start(self, request: bytes) -> None:
        """Send the request."""
        assert self._transport is not None
        self.heard.sent_s = time.perf_counter()
        self._transport.write(request)

    def close(self) -> None:
        """Leave."""
        if self._transport is not None:
            self._transport.abort()

    def _event(self, data: bytes, now_s: float) -> None:
        heard = self.heard
        if data.startswith(b"[DONE]"):
            heard.status, heard.done = self._parser.get_status_code(), True
            self._end("")
            return
        chunk = _chunk.decode(data)
        if chunk.error is not None:
            heard.error = json.dumps(chunk.error)[:200]
        if chunk.usage:
            heard.usage = chunk.usage
        for choice in chunk.choices:
            if choice.delta.content:
                self._texts.append(choice.delta.content)
                heard.at_s.append(now_s)
                if self._on_piece is not None:
                    self._on_piece(len(heard.at_s))
            heard.finish_reason = choice.finish_reason or heard.finish_reason

    def _end(self, error: str) -> None:
        self.heard.error = self.heard.error or error
        self.heard.text = "".join(self._texts)
        if not self.ended.done():
            self.ended.set_result(None)


def request(target: Target, content: str, *, max_tokens: int) -> bytes:
    """A streamed chat completion with usage, ready to be written."""
    parts = urlsplit(target.base_url)
    body = json.dumps(
        {
            "model": target.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Authorization: Bearer {target.api_key}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def listen(target: Target, asked: bytes, *, limit_s: float, on_piece: Any = None) -> Heard:
    """One stream to its end, or until ``limit_s`` have passed."""
    parts = urlsplit(target.base_url)
    assert parts.hostname is not None
    assert parts.port is not None
    loop = asyncio.get_running_loop()
    _, listener = await loop.create_connection(lambda: Listener(on_piece), parts.hostname, parts.port)
    listener.start(asked)
    try:
        async with asyncio.timeout(limit_s):
            await listener.ended
    except TimeoutError:
        listener.connection_lost(TimeoutError(f"nothing for it within {limit_s:g} s"))
    finally:
        listener.close()
    return listener.heard
