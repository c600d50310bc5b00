"""Takes the connections of the owner's page: few at a time, few from one neighbour, each for a minute at most.

Decides: which connection is taken. Must not: read what comes over it.
Called by: ``agent.owner.page``.

Connections are counted from the moment in which they are accepted: one that never speaks, or never ends its handshake,
is bounded as well, so that no neighbour in the Wi-Fi uses up the files and the memory of the agent.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

MAX_CONNECTIONS: Final = 32
MAX_CONNECTIONS_A_HOST: Final = 8
CONNECTION_S: Final = 60.0
HANDSHAKE_S: Final = 5.0
BACKLOG: Final = 16


class _Watched(asyncio.Protocol):
    """Another protocol, and word of when its connection is over."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        closes: bool | None = self._inner.eof_received()
        return closes

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)
        if not self.over.done():
            self.over.set_result(None)


class Gate:
    """Listens at one address. ``start`` raises OSError if it is taken."""

    def __init__(self, protocol: Callable[[], Any], context: ssl.SSLContext | None) -> None:
        self._protocol = protocol
        self._context = context
        self._open: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket: socket.socket | None = None

    def start(self, host: str, port: int) -> int:
        """Listen; the port."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setblocking(False)
            listening.bind((host, port))
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
        self._keep(asyncio.get_running_loop().create_task(self._accept(listening)))
        bound: int = listening.getsockname()[1]
        return bound

    async def close(self) -> None:
        """Close the door and every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError:  # the other side has gone already, or there is no file left: later
                await asyncio.sleep(1.0)
                continue
            host = str(peer[0])
            if self._open.total() >= MAX_CONNECTIONS or self._open[host] >= MAX_CONNECTIONS_A_HOST:
                connection.close()
                continue
            self._open[host] += 1
            self._keep(loop.create_task(self._serve(connection, host)))

    async def _serve(self, connection: socket.socket, host: str) -> None:
        """One connection, until it is over or its time is."""
        handshake_s = None if self._context is None else HANDSHAKE_S
        try:
            transport, watched = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Watched(self._protocol()),
                connection,
                ssl=self._context,
                ssl_handshake_timeout=handshake_s,
                ssl_shutdown_timeout=handshake_s,
            )
            try:
                await asyncio.wait([watched.over], timeout=CONNECTION_S)
            finally:
                transport.abort()
        except OSError:
            connection.close()  # no handshake, or the other side has gone: nobody to tell
        finally:
            self._open[host] -= 1
            if self._open[host] <= 0:
                del self._open[host]
