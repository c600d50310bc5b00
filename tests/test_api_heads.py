"""Connections byte by byte: heads of any size, what is no HTTP, and clients that never stop sending."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from tests.api_cell import MODEL, Running
from tests.api_cell import serve as serve_api

from motorpool.server.main import listen, serve
from motorpool.server.openai import heads
from motorpool.server.openai.heads import MAX_HEAD_BYTES, MAX_HEADERS

PIECE = b"x" * 65536
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve_api(tmp_path_factory.mktemp("api")) as running:
        yield running


class Client:
    """A connection of bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.file = connection.makefile("rb")

    def send(self, *pieces: bytes) -> bool:
        """Send what the server takes; return whether it took everything."""
        try:
            for piece in pieces:
                self.connection.sendall(piece)
        except ConnectionError:
            return False
        return True

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """One response."""
        status = int(self.file.readline().split()[1])
        headers: dict[str, str] = {}
        while line := self.file.readline().decode().strip():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        return status, headers, self.file.read(int(headers["content-length"]))

    def refusal(self) -> tuple[int, str]:
        """Status and code of an error, after a look at what every error must have; the connection ends with it."""
        status, headers, body = self.answer()
        assert headers["content-type"] == "application/json"
        assert headers["x-request-id"].startswith("req_")
        assert int(headers["openai-processing-ms"]) >= 0
        assert headers["openai-version"]
        assert headers["connection"] == "close"
        error = json.loads(body)["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["type"] == "invalid_request_error"
        assert self.ended()
        return status, error["code"]

    def ended(self) -> bool:
        """Whether the server closes without another word."""
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with socket.create_connection(server.listener.getsockname(), timeout=20) as connection:
        made = Client(connection)
        with made.file:
            yield made


def _head(size: int) -> bytes:
    """A head of exactly ``size`` bytes."""
    start, end = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Filler: ", b"\r\n\r\n"
    return start + b"f" * (size - len(start) - len(end)) + end


@pytest.mark.parametrize("step", [MAX_HEAD_BYTES, 1000])
def test_a_head_at_its_bound_is_taken_and_one_over_it_refused(client: Client, step: int) -> None:
    for _ in range(2):  # the connection is kept, and the bound holds for each request anew
        head = _head(MAX_HEAD_BYTES)
        for start in range(0, len(head), step):
            client.send(head[start : start + step])
        assert client.answer()[0] == 200
    client.send(_head(MAX_HEAD_BYTES + 1))
    assert client.refusal() == (431, "head_too_large")


@pytest.mark.parametrize(
    "start",
    [b"GET /", b"GET /healthz?", b"GET /healthz HTTP/1.1\r\n", b"GET /healthz HTTP/1.1\r\nX-Long: ", b"\r\n\r\n"],
    ids=["path", "query", "name", "value", "before it"],
)
def test_an_endless_head_is_refused_and_not_kept(client: Client, start: bytes) -> None:
    filler = b"\r\n" * 32768 if start.isspace() else PIECE
    client.send(start + filler)
    client.send(filler)
    assert client.refusal() == (431, "head_too_large")


def test_too_many_headers_are_refused(client: Client) -> None:
    def head(count: int) -> bytes:
        return b"GET /healthz HTTP/1.1\r\n" + b"".join(b"H%d: x\r\n" % n for n in range(count)) + b"\r\n"

    client.send(head(MAX_HEADERS))
    assert client.answer()[0] == 200
    client.send(head(MAX_HEADERS + 1))
    assert client.refusal() == (431, "head_too_large")


def test_a_large_body_is_no_head(server: Running, client: Client) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x" * 3 * MAX_HEAD_BYTES}]}).encode()
    start = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n".encode()
    client.send(start + b"Content-Length: %d\r\n\r\n" % len(body) + body + HEALTH)
    assert client.answer()[0] == 200
    assert client.answer()[2] == b'{"status":"ok"}'
    pieces = [body[at : at + 50_000] for at in range(0, len(body), 50_000)]
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    client.send(start + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\nTrailer: x\r\n\r\n" + HEALTH)
    assert client.answer()[0] == 200
    assert client.answer()[2] == b'{"status":"ok"}'


def test_endless_trailers_end_the_connection(client: Client) -> None:
    client.send(b"POST /v1/files HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nTrailer: ")
    assert client.answer()[0] == 401
    assert not client.send(*[PIECE] * 1000)


@pytest.mark.parametrize(
    "data",
    [b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET http://[ HTTP/1.1\r\n\r\n"],
    ids=["words", "tls", "address"],
)
def test_what_is_no_http_is_said_so_in_the_envelope(client: Client, data: bytes) -> None:
    client.send(data)
    assert client.refusal() == (400, "invalid_request")


def test_a_broken_body_is_refused_and_its_request_ends(server: Running, client: Client) -> None:
    client.send(
        f"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer {server.key}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".encode()
    )
    client.send(b"no size\r\n")
    assert client.refusal() == (400, "invalid_request")


def test_nonsense_behind_a_request_is_no_part_of_its_answer(server: Running, client: Client) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}).encode()
    start = f"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer {server.key}\r\n".encode()
    client.send(start + b"Content-Length: %d\r\n\r\n" % len(body) + body + b"nonsense\r\n\r\n")
    assert client.ended()


def test_a_client_that_never_stops_sending_is_cut_off(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "MAX_UNREAD_BYTES", 1_000_000)
    client.send(b"POST /v1/files HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n")
    assert client.answer()[0] == 401
    assert not client.send(*[PIECE] * 1000)


def test_the_product_listens_with_these_bounds() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("no request is complete")

    async def run() -> bytes:
        with listen("127.0.0.1", 0, "the test") as listener:
            server, task = serve(app, listener)
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"GET /" + 2 * PIECE)
            async with asyncio.timeout(20):
                answer = await reader.read()
            writer.close()
            server.should_exit = True
            await task
        return answer

    assert asyncio.run(run()).startswith(b"HTTP/1.1 431 ")
