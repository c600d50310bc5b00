"""The HTTP connection: uvicorn's own, with a bound on the head of a request and errors in OpenAI's envelope.

uvicorn gathers a request line and headers of any size before anybody is asked for a key. Here a head is refused with
431 once it is over its bound, and so are the trailers after a body. What is no HTTP gets a 400 that OpenAI's clients
can read, and a client that sends on after its answer is listened to for a while only. Must not: know routes or keys,
or keep a body.

Called by: ``server.main``, which gives the class to uvicorn.
"""

from __future__ import annotations

from typing import Any, Final

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from motorpool.errors import CallerError
from motorpool.server.openai.exchange import encode_error, new_request_id
from motorpool.server.openai.settings import API_VERSION

MAX_HEAD_BYTES: Final = 65536  # request line and headers
MAX_HEADERS: Final = 100
MAX_UNREAD_BYTES: Final = 16 * 1024 * 1024  # of a body whose request is answered already
LINGER_S: Final = 2.0


class HeadTooLargeError(CallerError):
    """The request line and the headers are over their bound."""

    status = 431
    default_code = "head_too_large"


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    ``_head_bytes`` counts what has come since the last piece of a body or the end of a request: a head, or trailers.
    A head that shares a piece from the socket with what went before it is counted from the next piece on, so that at
    most one piece (256 KiB) more than the bound is ever held.
    """

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._in_head = True
        self._head_bytes = 0
        self._unread_bytes = 0
        self._problem: CallerError | None = None
        self._refused = False

    def data_received(self, data: bytes) -> None:
        """What the socket has, cut where the bound of a head ends."""
        while data and not self._refused and not self.transport.is_closing():
            room = MAX_HEAD_BYTES - self._head_bytes
            if room <= 0:
                self._refuse(_too_large())
                return
            piece, data = (data[:room], data[room:]) if self._in_head else (data, b"")
            self._head_bytes += len(piece)
            super().data_received(piece)
        self._drop(len(data))

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text for its plain answer
        """What uvicorn calls when the parser has given up."""
        self._refuse(self._problem or CallerError("what was sent is not valid HTTP"))

    # -- what the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header, or a trailer."""
        if len(self.headers) >= MAX_HEADERS:
            self._problem = _too_large()
            raise httptools.HttpParserError  # the parser stops, and ``send_400_response`` is called
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The end of a head: the request starts."""
        self._in_head = False
        self._head_bytes = 0
        self._unread_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._head_bytes = 0
        if self.cycle.response_complete:
            self._drop(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request: what follows is the head of another one."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_complete()

    # -- refusals

    def _refuse(self, error: CallerError) -> None:
        """Answer and stop reading; without an answer if it could be taken for a part of another one."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            later = bool(self.pipeline) or not cycle.more_body  # the fault is in a request behind this one
            if later or cycle.response_started:
                self.transport.close()
                return
            # The request whose body is broken is running: it is told that nobody waits for it.
            cycle.disconnected = True
            cycle.message_event.set()
        self._refused = True
        body = encode_error(error)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", new_request_id().encode()),
            (b"openai-processing-ms", b"0"),
            (b"openai-version", API_VERSION.encode()),
            (b"connection", b"close"),
        ]
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        self._linger()

    def _linger(self) -> None:
        """Close in a moment: closing while the client still sends could cost it the answer."""
        self.transport.write_eof()
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(LINGER_S, self.timeout_keep_alive_handler)

    def _drop(self, size: int) -> None:
        """Bytes came that nobody will read; a client that cannot stop sending is cut off."""
        self._unread_bytes += size
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self.transport.close()


def _too_large() -> HeadTooLargeError:
    return HeadTooLargeError(
        f"the request line and the headers are over the limit of {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers"
    )
