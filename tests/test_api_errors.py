"""Every way in which a call can fail before it reaches a model, a file or a batch; and every response's headers."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.api_cell import MODEL, Running, serve

from motorpool.errors import StorageFullError
from motorpool.server.openai.settings import ApiSettings
from motorpool.store import customer

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
SMALL = ApiSettings(max_body_bytes=1000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("api"), settings=SMALL) as running:
        yield running


def _call(
    server: Running, method: str, path: str, *, key: str | None = None, content: Any = None, **headers: str
) -> httpx.Response:
    head = {"authorization": f"Bearer {key or server.key}"}
    if content is not None:
        head["content-type"] = "application/json"
    return server.http.request(method, path, content=content, headers=head | headers)


def _error(response: httpx.Response) -> tuple[int, str]:
    """Status and code, after a look at what every error must have."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    assert int(response.headers["openai-processing-ms"]) >= 0
    assert response.headers["openai-version"]
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["type"] in {"invalid_request_error", "server_error", "service_unavailable_error"}
    return response.status_code, body["error"]["code"]


# -- routes


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/moderations", "/v1/files/a/b", "/v1/batches/x/y", "/v1/models/"])
def test_unknown_routes_are_said_so_in_the_envelope(server: Running, path: str) -> None:
    assert _error(_call(server, "GET", path)) == (404, "unknown_route")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/files", "GET, POST"),
        ("POST", "/v1/files/file-x", "DELETE, GET"),
        ("DELETE", "/v1/batches", "GET, POST"),
        ("GET", "/v1/batches/batch_x/cancel", "POST"),
        ("POST", "/healthz", "GET"),
    ],
)
def test_a_wrong_method_names_the_right_ones(server: Running, method: str, path: str, allow: str) -> None:
    response = _call(server, method, path)
    assert _error(response) == (405, "method_not_allowed")
    assert response.headers["allow"] == allow


def test_health_needs_no_key(server: Running) -> None:
    response = server.http.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert response.headers["x-request-id"].startswith("req_")


def test_request_ids_differ(server: Running) -> None:
    ids = {_call(server, "GET", "/v1/models").headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


# -- keys


@pytest.mark.parametrize("path", ["/v1/models", "/v1/files", "/v1/batches", "/v1/files/x/content"])
def test_every_route_needs_a_key(server: Running, path: str) -> None:
    assert _error(server.http.get(path)) == (401, "missing_api_key")
    assert _error(_call(server, "GET", path, key="mp-wrong")) == (401, "invalid_api_key")


def test_the_official_client_raises_its_own_error(server: Running) -> None:
    with server.client(api_key="mp-wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id is not None
    assert "mp-wrong" not in str(caught.value)


def test_a_revoked_key_stops_within_its_time(server: Running) -> None:
    key = server.new_key("short")
    assert _call(server, "GET", "/v1/models", key=key).status_code == 200
    row = next(row for row in customer.list_keys(server.cell.reader) if row.account == "short")
    customer.revoke_key(server.cell.database.writer, row.key_id, server.cell.now_ms())
    server.cell.ahead_ms += 6_000
    assert _error(_call(server, "GET", "/v1/models", key=key)) == (401, "invalid_api_key")


# -- bodies


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/batches"])
def test_a_body_that_is_not_json_is_told_where(server: Running, path: str) -> None:
    response = _call(server, "POST", path, content='{"model": "m",, }')
    assert _error(response) == (400, "invalid_json")
    assert "byte 14" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/batches"])
def test_a_wrong_content_type_is_refused(server: Running, path: str) -> None:
    response = _call(server, "POST", path, content="a=b", **{"content-type": "application/x-www-form-urlencoded"})
    assert _error(response) == (415, "unsupported_media_type")


def test_json_with_a_charset_is_accepted(server: Running) -> None:
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert _call(server, "POST", "/v1/chat/completions", content=json.dumps(BODY), **kind).status_code == 200


def test_a_body_over_the_limit_is_refused_however_it_is_sent(server: Running) -> None:
    big = json.dumps(BODY | {"user": "x" * 1000}).encode()
    assert _error(_call(server, "POST", "/v1/chat/completions", content=big)) == (413, "body_too_large")

    def pieces() -> Iterator[bytes]:
        yield big[:500]
        yield big[500:]

    # In pieces there is no content-length that could give it away.
    response = _call(server, "POST", "/v1/chat/completions", content=pieces())
    assert _error(response) == (413, "body_too_large")
    assert "1000 bytes" in response.json()["error"]["message"]


def test_a_body_at_the_limit_is_accepted_in_pieces(server: Running) -> None:
    body = json.dumps(BODY).encode()
    body += b" " * (SMALL.max_body_bytes - len(body))

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    assert _call(server, "POST", "/v1/chat/completions", content=pieces()).status_code == 200


def test_a_query_with_too_many_fields_is_refused(server: Running) -> None:
    query = "&".join(f"a{n}=1" for n in range(21))
    assert _error(_call(server, "GET", f"/v1/files?{query}")) == (400, "invalid_value")


# -- the world failing


def test_an_unexpected_failure_is_logged_by_type_and_place_alone(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    server.cell.write_error = ValueError("a customer's words")
    try:
        with caplog.at_level(logging.ERROR):
            response = _call(server, "POST", "/v1/batches", content=json.dumps(_batch()))
    finally:
        server.cell.write_error = None
    assert _error(response) == (500, "internal_error")
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    assert "ValueError" in caplog.text
    assert response.headers["x-request-id"] in caplog.text
    assert "a customer's words" not in caplog.text + response.text


def test_a_failing_database_is_said_so(server: Running) -> None:
    server.cell.write_error = sqlite3.OperationalError("disk I/O error")
    try:
        response = _call(server, "POST", "/v1/batches", content=json.dumps(_batch()))
    finally:
        server.cell.write_error = None
    assert _error(response) == (500, "store_error")


def test_full_books_are_said_so_and_not_tried_again(server: Running) -> None:
    server.cell.write_error = StorageFullError("the disk is full: free some space")
    try:
        response = _call(server, "POST", "/v1/batches", content=json.dumps(_batch()))
    finally:
        server.cell.write_error = None
    assert _error(response) == (507, "storage_full")
    assert response.headers["x-should-retry"] == "false"


def _batch() -> dict[str, str]:
    return {"input_file_id": "file-x", "endpoint": "/v1/chat/completions", "completion_window": "24h"}


def test_a_websocket_is_turned_away(tmp_path: Path, server: Running) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    server.call(_serve(server, {"type": "websocket", "path": "/v1/responses"}, receive, send))
    assert sent[0]["type"] == "websocket.close"


async def _serve(server: Running, scope: Any, receive: Any, send: Any) -> None:
    await server.api(scope, receive, send)
