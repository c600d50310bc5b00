"""``Idempotency-Key``: a POST that is sent again is answered as it was before, and not done twice.

A key is good for one account and one day. The same key with the same request gets the answer that was kept, marked by
the header ``idempotent-replayed: true``; while the first one is still running, a conflict; with another request, a
refusal. Answers are kept that another try would not change: successes, and refusals of the request itself. A stream is
kept once it has come to its end, and then sent again at once, event by event as it was.

An answer is durable before its last byte is sent. If the process stops before that, the request is done again.

Called by: ``app``. Must not: keep a key itself (its hash is enough), or log what was asked or answered.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sqlite3
from collections import deque
from collections.abc import Awaitable, MutableMapping
from typing import Any, Final

from motorpool.errors import CallerError, ConflictError, MotorpoolError, TooLargeError
from motorpool.server.cell import Cell
from motorpool.server.openai.exchange import Exchange, Receive, Send
from motorpool.store import idempotency as store
from motorpool.store.idempotency import KeptAnswer
from motorpool.types import MAX_MESSAGE_BYTES

NAME: Final = b"idempotency-key"
REPLAYED: Final = (b"idempotent-replayed", b"true")
MAX_NAME_BYTES: Final = 255
MAX_KEPT_BYTES: Final = MAX_MESSAGE_BYTES  # of one answer; a longer one is not kept
MAX_RUNNING: Final = 10_000
# Refusals that another try may not meet again; so may every failure of ours.
_PASSING: Final = frozenset({401, 403, 408, 409, 425, 429})
_KEPT_HEADERS: Final = frozenset({"content-type", "cache-control", "x-accel-buffering"})
_ALLOWED: Final = re.compile(rb"[!-~]{1,%d}" % MAX_NAME_BYTES)

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]


class KeyReusedError(CallerError):
    """The key has been used for another request."""

    status = 422
    default_code = "idempotency_key_reused"


class Incoming:
    """What the client sends. What was read ahead comes first."""

    __slots__ = ("_ahead", "_receive")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ahead: deque[Message] = deque()

    async def __call__(self) -> Message:
        """The next message."""
        return self._ahead.popleft() if self._ahead else await self._receive()

    async def read_ahead(self, max_bytes: int) -> bytes:
        """The whole body, which is there again for whoever reads next. Raises TooLargeError over ``max_bytes``."""
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            self._ahead.append(message)
            if message["type"] == "http.disconnect":
                return b""  # whoever reads next hears of it
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > max_bytes:
                raise TooLargeError(f"the body is over the limit of {max_bytes} bytes", code="body_too_large")
            if not message.get("more_body", False):
                return b"".join(pieces)


class Outgoing:
    """What goes to the client: with more headers if ``extra`` gives any, and taken down if there is a ``recorder``."""

    __slots__ = ("_send", "extra", "recorder")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.extra: Any = None  # gives the headers when the response starts
        self.recorder: Recorder | None = None

    def __call__(self, message: Message) -> Awaitable[None]:
        """Send one message."""
        if self.extra is not None and message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *self.extra()]
        return self._send(message) if self.recorder is None else self._recorded(self.recorder, message)

    async def _recorded(self, recorder: Recorder, message: Message) -> None:
        await recorder.take(message)
        await self._send(message)


class Recorder:
    """Takes an answer down and keeps it when it is complete."""

    def __init__(self, cell: Cell, account: str, name: bytes, request: bytes) -> None:
        self._cell = cell
        self._account = account
        self._name = name
        self._request = request
        self._status = 0
        self._headers: list[tuple[str, str]] = []
        self._pieces: list[bytes] = []
        self._size = 0

    async def take(self, message: Message) -> None:
        """One more message; the last one returns when all is durable."""
        if message["type"] == "http.response.start":
            self._status = int(message["status"])
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
            self._headers = [(name, value) for name, value in headers if name in _KEPT_HEADERS]
            return
        body: bytes = message.get("body", b"")
        self._size += len(body)
        if self._size <= MAX_KEPT_BYTES:
            self._pieces.append(body)
        else:
            self._pieces.clear()
        if not message.get("more_body", False) and self._is_final and self._size <= MAX_KEPT_BYTES:
            await self._keep()

    @property
    def _is_final(self) -> bool:
        if self._status >= 500 or self._status in _PASSING:
            return False
        # A stream that ended in an error has no end of its own.
        is_stream = any(
            value.startswith("text/event-stream") for name, value in self._headers if name == "content-type"
        )
        return not is_stream or not self._ended_in_error

    @property
    def _ended_in_error(self) -> bool:
        last = b"".join(self._pieces[-2:]).rstrip().rsplit(b"\n\n", 1)[-1]
        return last.startswith((b'data: {"error"', b"event: error"))

    async def _keep(self) -> None:
        now_ms = self._cell.now_ms()
        answer = KeptAnswer(
            account=self._account,
            name=self._name,
            request=self._request,
            status=self._status,
            headers=self._headers,
            body=b"".join(self._pieces),
            expires_ms=now_ms + store.LIFE_MS,
        )
        try:
            await self._cell.write(lambda db: store.keep(db, answer, now_ms))
        except (MotorpoolError, sqlite3.Error) as error:  # an answer that cannot be kept is still an answer
            _log.warning("an answer could not be kept for its Idempotency-Key: %s", type(error).__name__)


class Idempotency:
    """The keys of all accounts."""

    def __init__(self, cell: Cell, max_body_bytes: int) -> None:
        self._cell = cell
        self._max_body_bytes = max_body_bytes
        self._running: dict[tuple[str, bytes], bytes] = {}

    async def begin(self, exchange: Exchange, incoming: Incoming, outgoing: Outgoing) -> Turn:
        """Whether the request of this exchange, whose key was found good, is to be done, and how it ends.

        Raises CallerError for a key that is none, KeyReusedError, and ConflictError while the same one is running.
        """
        key = exchange.header(NAME)
        if not _ALLOWED.fullmatch(key):
            raise CallerError(
                f"Idempotency-Key must be 1 to {MAX_NAME_BYTES} visible ASCII characters",
                code="invalid_idempotency_key",
                param="Idempotency-Key",
            )
        name = hashlib.sha256(key).digest()
        place = (exchange.account, name)
        # Taken before the body is read: of two that come together only one may pass.
        if place in self._running or len(self._running) >= MAX_RUNNING:
            raise InProgressError("the request with this Idempotency-Key is still running: ask again in a moment")
        self._running[place] = b""
        try:
            request = await self._fingerprint(exchange, incoming)
            kept = store.find(self._cell.reader, exchange.account, name, self._cell.now_ms())
        except BaseException:
            del self._running[place]
            raise
        if kept is not None and kept.request != request:
            del self._running[place]
            raise KeyReusedError("this Idempotency-Key was used for another request: send each one with its own")
        if kept is None:
            outgoing.recorder = Recorder(self._cell, exchange.account, name, request)
        return Turn(kept, lambda: self._running.pop(place, None))

    async def _fingerprint(self, exchange: Exchange, incoming: Incoming) -> bytes:
        """A hash of what is asked. Of an upload, whose form differs each time, its place and length."""
        digest = hashlib.sha256(exchange.scope["path"].encode() + b"\0")
        if exchange.header(b"content-type").startswith(b"multipart/"):
            digest.update(exchange.header(b"content-length"))
        else:
            exchange.refuse_length_over(self._max_body_bytes, "the body", "body_too_large")
            digest.update(await incoming.read_ahead(self._max_body_bytes))
        return digest.digest()


class Turn:
    """One request with a key. ``kept`` is its answer if it has been done before."""

    __slots__ = ("_over", "kept")

    def __init__(self, kept: KeptAnswer | None, over: Any) -> None:
        self.kept = kept
        self._over = over

    async def replay(self, exchange: Exchange) -> None:
        """Send the answer that was kept."""
        assert self.kept is not None
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.kept.headers]
        content_type = next((value for name, value in headers if name == b"content-type"), b"application/json")
        others = [(name, value) for name, value in headers if name != b"content-type"]
        length = (b"content-length", b"%d" % len(self.kept.body))
        await exchange.start(self.kept.status, content_type, [*others, length, REPLAYED])
        await exchange.send(self.kept.body, more=False)

    def over(self) -> None:
        """The exchange has ended, one way or the other."""
        self._over()


class InProgressError(ConflictError):
    """The first request with this key has not ended. OpenAI's clients ask again by themselves."""

    default_code = "idempotency_in_progress"
