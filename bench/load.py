"""A load generator that costs little: requests are bytes made once, connections stay open, one callback a response.

Decides: nothing about what is fair; ``run_gateway`` does. Called by: the benchmarks. Every response must be a 200.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

TIMEOUT_S = 30.0


class LoadError(Exception):
    """A server answered with something other than 200, or not at all."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where to send a chat completion. ``base_url`` ends in ``/v1``."""

    name: str
    base_url: str
    api_key: str = "none"
    model: str = "null"

    def request(self, content: str, *, max_tokens: int, stream: bool = False) -> bytes:
        """One request, ready to be written."""
        parts = urlsplit(self.base_url)
        asked: dict[str, object] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
        }
        if stream:
            asked["stream"] = True
        body = json.dumps(asked).encode()
        head = (
            f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Authorization: Bearer {self.api_key}\r\nContent-Type: application/json\r\n"
            f"Accept: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def connect(self) -> Connection:
        """A new connection."""
        parts = urlsplit(self.base_url)
        assert parts.hostname is not None
        assert parts.port is not None
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, parts.hostname, parts.port)
        return connection


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time; ``on_done`` is called with each response's latency."""

    def __init__(self) -> None:
        self.body = bytearray()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._on_done: Callable[[float], None] | None = None
        self._on_lost: Callable[[Exception], None] | None = None
        self._sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request that waits."""
        if self._on_lost is not None:
            self._on_lost(LoadError(f"the server closed the connection: {exc or 'end of stream'}"))

    def on_body(self, body: bytes) -> None:
        """Part of a response."""
        self.body += body

    def on_message_complete(self) -> None:
        """A response is complete."""
        elapsed_s = time.perf_counter() - self._sent_s
        status = self._parser.get_status_code()
        done, lost = self._on_done, self._on_lost
        if done is None or lost is None:
            return
        if status != 200:
            lost(LoadError(f"status {status}: {bytes(self.body[:300]).decode(errors='replace')}"))
            return
        done(elapsed_s)

    def send(self, request: bytes, on_done: Callable[[float], None], on_lost: Callable[[Exception], None]) -> None:
        """Send one request."""
        assert self._transport is not None
        self.body.clear()
        self._on_done, self._on_lost = on_done, on_lost
        self._sent_s = time.perf_counter()
        self._transport.write(request)

    async def ask(self, request: bytes) -> float:
        """Send one request and wait; seconds until the whole response was there."""
        waiting: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.send(request, waiting.set_result, waiting.set_exception)
        return await asyncio.wait_for(waiting, TIMEOUT_S)

    def close(self) -> None:
        """Close without complaint."""
        self._on_done = self._on_lost = None
        if self._transport is not None:
            self._transport.close()


class Flood(msgspec.Struct, frozen=True, kw_only=True):
    """What a closed loop over several connections gave. ``generator_us`` is this process' own CPU time a request."""

    per_s: float
    requests: int
    median_ms: float
    p99_ms: float
    generator_us: float


async def flood(target: Target, request: bytes, *, connections: int, seconds: float) -> Flood:
    """Keep one request in flight on each of ``connections`` for ``seconds``; only responses within them count.

    A server that gives none within them is waited for until its first, so that a stall lowers the rate and is not lost.
    """
    opened = [await target.connect() for _ in range(connections)]
    latencies: list[float] = []
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    begun_s = time.perf_counter()
    end_s = begun_s + seconds

    def fail(error: Exception) -> None:
        if not ended.done():
            ended.set_exception(error)

    def go_on(connection: Connection) -> Callable[[float], None]:
        def done(elapsed_s: float) -> None:
            in_time = time.perf_counter() < end_s
            if in_time or not latencies:
                latencies.append(elapsed_s)
            if in_time:
                connection.send(request, done, fail)
            elif not ended.done():
                ended.set_result(None)

        return done

    cpu_s = time.process_time()
    try:
        for connection in opened:
            connection.send(request, go_on(connection), fail)
        await asyncio.wait_for(ended, seconds + TIMEOUT_S)
    finally:
        for connection in opened:
            connection.close()
    cpu_s = time.process_time() - cpu_s
    taken_s = time.perf_counter() - begun_s if len(latencies) == 1 else seconds
    return Flood(
        per_s=len(latencies) / taken_s,
        requests=len(latencies),
        median_ms=percentile(latencies, 50) * 1e3,
        p99_ms=percentile(latencies, 99) * 1e3,
        generator_us=cpu_s / len(latencies) * 1e6,
    )


async def pairs(
    direct: Target, through: Target, requests: tuple[bytes, bytes], *, seconds: float, most: int
) -> list[tuple[float, float]]:
    """Alternate a direct request and one through ``through``; (direct, through) seconds of each pair.

    Which of the two goes first changes from pair to pair, so that neither always meets the caches of the other.
    """
    first, second = await direct.connect(), await through.connect()
    found: list[tuple[float, float]] = []
    end_s = time.perf_counter() + seconds
    try:
        while len(found) < most and time.perf_counter() < end_s:
            if len(found) % 2:
                through_s = await second.ask(requests[1])
                direct_s = await first.ask(requests[0])
            else:
                direct_s = await first.ask(requests[0])
                through_s = await second.ask(requests[1])
            found.append((direct_s, through_s))
    finally:
        first.close()
        second.close()
    return found


def percentile(values: list[float], percent: float) -> float:
    """The value that ``percent`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
