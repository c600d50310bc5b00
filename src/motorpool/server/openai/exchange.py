"""One HTTP request and its response over ASGI: reading the body within a bound, answering, noticing who has gone.

Every response carries ``x-request-id``, ``openai-processing-ms`` and ``openai-version``. Must not: know routes or
accounts' data, or log a body.

Called by: every route.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from types import TracebackType
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from motorpool.errors import CallerError, CapacityError, MotorpoolError, StorageFullError, TooLargeError
from motorpool.server.openai.settings import API_VERSION, MAX_RETRY_AFTER_MS

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

JSON: Final = b"application/json"
MAX_QUERY_FIELDS: Final = 20
WATCH_AFTER_S: Final = 0.2
_VERSION: Final = (b"openai-version", API_VERSION.encode())
_encoder: Final = msgspec.json.Encoder()


class MethodNotAllowedError(CallerError):
    """The route exists, but not for this method; ``allow`` lists those it has."""

    status = 405
    default_code = "method_not_allowed"

    def __init__(self, allow: str) -> None:
        super().__init__(f"this route takes {allow} only")
        self.allow = allow


class MediaTypeError(CallerError):
    """The body is not of the media type that the route reads."""

    status = 415
    default_code = "unsupported_media_type"


class ClientGoneError(Exception):
    """The client closed the connection before it had its answer; nobody is left to be told."""


# Ids of requests: random for each run of the process, then counted. They name, they do not protect.
_RUN: Final = secrets.token_hex(8)
_numbers = itertools.count(1)


def new_request_id() -> str:
    """The next id of a request."""
    return f"req_{_RUN}{next(_numbers):016x}"


class Exchange:
    """One request and its response. ``account`` is set once the key was found good."""

    __slots__ = (
        "_clock",
        "_headers",
        "_receive",
        "_send",
        "_started_ms",
        "account",
        "body_was_read",
        "request_id",
        "responding",
        "scope",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, clock: Callable[[], int]) -> None:
        self.scope = scope
        self.request_id = new_request_id()
        self.account = ""
        self.responding = False
        self.body_was_read = False
        self._receive = receive
        self._send = send
        self._clock = clock
        self._started_ms = clock()
        self._headers: dict[bytes, bytes] = dict(scope["headers"])

    # -- the request

    @property
    def address(self) -> str:
        """Where the request came from; empty if that is not known."""
        client = self.scope.get("client")
        return str(client[0]) if client else ""

    def header(self, name: bytes) -> bytes:
        """The value of a header by its lower-case name, empty if it was not sent."""
        return self._headers.get(name, b"")

    def query(self) -> dict[str, str]:
        """The query parameters; raises CallerError when there are unreasonably many."""
        raw: bytes = self.scope["query_string"]
        try:
            return dict(
                parse_qsl(raw.decode("ascii", "replace"), keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS)
            )
        except ValueError:
            raise CallerError("the query has too many fields", code="invalid_value") from None

    async def chunk(self) -> bytes | None:
        """The next piece of the body, None at its end. Raises ClientGoneError."""
        if self.body_was_read:
            return None
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        self.body_was_read = not message.get("more_body", False)
        body: bytes = message.get("body", b"")
        return body

    async def json(self, max_bytes: int) -> bytes:
        """The whole body, which must be declared as JSON. Raises TooLargeError over ``max_bytes``, MediaTypeError."""
        media_type = self.header(b"content-type")
        if media_type and media_type[:16].lower() != JSON:
            raise MediaTypeError("send the body as JSON, with content-type: application/json")
        self.refuse_length_over(max_bytes, "the body", "body_too_large")
        body = await self.chunk() or b""
        if not self.body_was_read:
            pieces = [body]
            size = len(body)
            while (piece := await self.chunk()) is not None:
                pieces.append(piece)
                size += len(piece)
                if size > max_bytes:
                    raise TooLargeError(f"the body is over the limit of {max_bytes} bytes", code="body_too_large")
            body = b"".join(pieces)
        if len(body) > max_bytes:
            raise TooLargeError(f"the body is over the limit of {max_bytes} bytes", code="body_too_large")
        return body

    def refuse_length_over(
        self, max_bytes: int, what: str, code: str, *, param: str | None = None, overhead_bytes: int = 0
    ) -> None:
        """Refuse a body that announces itself as too long before any of it is read. Raises TooLargeError.

        ``overhead_bytes`` is what a body may be longer than what it carries.
        """
        length = self.header(b"content-length").lstrip(b"0")
        most = max_bytes + overhead_bytes
        if length.isdigit() and (len(length) > len(str(most)) or int(length) > most):
            raise TooLargeError(f"{what} is over the limit of {max_bytes} bytes", code=code, param=param)

    async def gone(self) -> None:
        """Wait until the client closes the connection. Only after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # -- the response

    async def start(self, status: int, content_type: bytes, extra: Headers = ()) -> None:
        """Send status and headers; ``send`` must follow."""
        self.responding = True
        headers = [
            (b"content-type", content_type),
            (b"x-request-id", self.request_id.encode()),
            (b"openai-processing-ms", b"%d" % max(0, self._clock() - self._started_ms)),
            _VERSION,
            *extra,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send(self, data: bytes, *, more: bool) -> None:
        """Send a piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def answer(self, status: int, body: bytes, extra: Headers = ()) -> None:
        """Send a whole JSON response."""
        await self.start(status, JSON, ((b"content-length", b"%d" % len(body)), *extra))
        await self.send(body, more=False)

    async def answer_object(self, value: object) -> None:
        """Send a value as a JSON response with status 200."""
        await self.answer(200, _encoder.encode(value))

    async def answer_error(self, error: MotorpoolError) -> None:
        """Send an error in OpenAI's envelope, with the headers that tell a client whether to try again."""
        extra: list[tuple[bytes, bytes]] = []
        if isinstance(error, CapacityError):
            extra = retry_headers(error)
        elif isinstance(error, StorageFullError):
            # A full disk does not empty itself within a client's retries.
            extra = [(b"x-should-retry", b"false")]
        elif isinstance(error, MethodNotAllowedError):
            extra = [(b"allow", error.allow.encode())]
        await self.answer(error.status, encode_error(error), extra)


def encode_error(error: MotorpoolError) -> bytes:
    """OpenAI's envelope as JSON."""
    return _encoder.encode(error.envelope())


def retry_headers(error: CapacityError) -> list[tuple[bytes, bytes]]:
    """When to try again, in both forms that clients read."""
    wait_ms = min(max(error.retry_after_ms, 1), MAX_RETRY_AFTER_MS)
    return [(b"retry-after-ms", b"%d" % wait_ms), (b"retry-after", b"%d" % math.ceil(wait_ms / 1000))]


class Attendance:
    """While its block runs, a client that closes the connection ends the block with ClientGoneError.

    What the block was waiting for is cancelled, so that an answer nobody will read stops at its source. With
    ``quiet_s`` and ``ping``, ``ping`` is awaited whenever ``touch`` was not called for that long.
    """

    def __init__(
        self, exchange: Exchange, *, quiet_s: float | None = None, ping: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._exchange = exchange
        self._quiet_s = quiet_s
        self._ping = ping
        self._loop = asyncio.get_running_loop()
        self._touched_s = self._loop.time()
        self._gone = False
        self._over = False
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def touch(self) -> None:
        """Something was just sent."""
        self._touched_s = self._loop.time()

    async def __aenter__(self) -> Attendance:
        self._task = asyncio.current_task()
        # Most answers are there before a client could lose patience: only longer ones are worth a task that watches.
        self._timer = self._loop.call_later(WATCH_AFTER_S, self._begin)
        return self

    def _begin(self) -> None:
        self._watcher = self._loop.create_task(self._watch())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        assert self._task is not None
        assert self._timer is not None
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._gone and isinstance(error, asyncio.CancelledError) and self._task.uncancel() == 0:
            raise ClientGoneError from None

    async def _watch(self) -> None:
        if self._quiet_s is None or self._ping is None:
            await self._exchange.gone()
        else:
            await self._watch_and_ping(self._quiet_s, self._ping)
        self._gone = True
        # Nothing can come between this test and the cancellation: the block ends only in its own turn of the loop.
        if not self._over and self._task is not None:
            self._task.cancel()

    async def _watch_and_ping(self, quiet_s: float, ping: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                async with asyncio.timeout_at(self._touched_s + quiet_s):
                    await self._exchange.gone()
                    return
            except TimeoutError:
                if self._loop.time() >= self._touched_s + quiet_s:
                    self.touch()
                    await ping()
