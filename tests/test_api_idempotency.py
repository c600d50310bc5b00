"""``Idempotency-Key``: what is sent again is answered as before, through restarts, and never done twice."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.api_cell import MODEL, Item, Running, serve, token, until

from motorpool.errors import StoreError
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens
from motorpool.store import idempotency as store
from motorpool.store.database import Database
from motorpool.store.idempotency import KeptAnswer
from motorpool.types import Usage

HELLO: Any = [{"role": "user", "content": "hello there"}]
CHAT = {"model": MODEL, "messages": HELLO, "max_tokens": 4}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with serve(tmp_path) as running:
        yield running


def post(server: Running, key: str | None = "k-1", path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    head = {"authorization": f"Bearer {server.key}"} | ({} if key is None else {"idempotency-key": key})
    return server.http.post(path, json=(CHAT if "chat" in path else {}) | body, headers=head)


def replayed(response: httpx.Response) -> bool:
    return bool(response.headers.get("idempotent-replayed") == "true")


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# -- the same again ----------------------------------------------------------------------------------------------------


def test_the_same_request_is_done_once_and_answered_alike(server: Running) -> None:
    first, second = post(server), post(server)
    assert (first.status_code, replayed(first), replayed(second)) == (200, False, True)
    assert second.content == first.content
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(server.cell.asked) == 1


def test_without_a_key_everything_is_done(server: Running) -> None:
    post(server, None)
    post(server, None)
    assert len(server.cell.asked) == 2


def test_a_batch_that_is_handed_in_again_is_the_same_batch(server: Running) -> None:
    with server.client() as client:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
        file = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        made = [
            client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                extra_headers={"Idempotency-Key": "nightly"},
            ).id
            for _ in range(3)
        ]
        assert len(set(made)) == 1
        assert len(client.batches.list().data) == 1


def test_an_upload_that_is_sent_again_is_the_same_file(server: Running) -> None:
    head = {"authorization": f"Bearer {server.key}", "idempotency-key": "up"}
    ids = {
        server.http.post(
            "/v1/files", files={"file": ("a.txt", b"words")}, data={"purpose": "user_data"}, headers=head
        ).json()["id"]
        for _ in range(2)
    }
    assert len(ids) == 1
    longer = server.http.post(
        "/v1/files", files={"file": ("a.txt", b"more words")}, data={"purpose": "user_data"}, headers=head
    )
    assert code(longer) == (422, "idempotency_key_reused")


def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    with serve(tmp_path) as running:
        first = post(running)
        key = running.key
    with serve(tmp_path) as running:
        running.key = key
        second = post(running)
        assert replayed(second)
        assert second.content == first.content
        assert running.cell.asked == []


def test_a_stream_comes_again_event_by_event(server: Running) -> None:
    first, second = post(server, stream=True), post(server, stream=True)
    assert second.content == first.content
    assert first.content.endswith(b"data: [DONE]\n\n")
    assert second.headers["content-type"].startswith("text/event-stream")
    assert replayed(second)
    assert len(server.cell.asked) == 1


def test_a_key_belongs_to_its_account(server: Running) -> None:
    post(server)
    server.key = server.new_key("others")
    assert not replayed(post(server))


def test_an_answer_is_kept_for_a_day(server: Running) -> None:
    post(server)
    server.cell.ahead_ms += store.LIFE_MS - 60_000
    assert replayed(post(server))
    server.cell.ahead_ms += 60_001
    assert not replayed(post(server))


def test_a_refusal_of_the_request_itself_is_kept(server: Running) -> None:
    first, second = post(server, temperature=9), post(server, temperature=9)
    assert code(first) == code(second) == (400, "invalid_value")
    assert replayed(second)


# -- not the same ------------------------------------------------------------------------------------------------------


def test_another_request_under_the_same_key_is_refused(server: Running) -> None:
    post(server)
    with server.client() as client, pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=5, extra_headers={"Idempotency-Key": "k-1"}
        )
    assert caught.value.code == "idempotency_key_reused"
    assert code(post(server, path="/v1/completions", **CHAT)) == (422, "idempotency_key_reused")
    assert replayed(post(server))


@pytest.mark.parametrize("key", ["x" * 256, "with space", "t\tab", "\u00e9"])
def test_a_key_that_is_none_is_refused(server: Running, key: str) -> None:
    head = {b"authorization": f"Bearer {server.key}".encode(), b"idempotency-key": key.encode("utf-8")}
    response = server.http.post("/v1/chat/completions", json=CHAT, headers=head)
    assert code(response) == (400, "invalid_idempotency_key")


def test_while_the_first_one_runs_the_second_is_told_so(server: Running) -> None:
    release = asyncio.Event()

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        await release.wait()
        yield LiveAnswer(status=200, body=b'{"done":1}')

    async def set_release() -> None:
        release.set()

    server.cell.script = script
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(server)))
    thread.start()
    until(lambda: server.cell.asked, "the first request")
    with httpx.Client(base_url=server.url, verify=False, trust_env=False) as other:
        head = {"authorization": f"Bearer {server.key}", "idempotency-key": "k-1"}
        assert code(other.post("/v1/chat/completions", json=CHAT, headers=head)) == (409, "idempotency_in_progress")
        server.call(set_release())
        thread.join(10)
        assert other.post("/v1/chat/completions", json=CHAT, headers=head).json() == {"done": 1}
    assert answers[0].json() == {"done": 1}
    assert len(server.cell.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 409])
def test_what_may_go_better_next_time_is_not_kept(server: Running, status: int) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveAnswer(status=status, body=b'{"error":{"message":"m","type":"t","param":null,"code":"c"}}')

    server.cell.script = script
    assert post(server).status_code == status
    server.cell.script = None
    second = post(server)
    assert (second.status_code, replayed(second)) == (200, False)


def test_a_stream_that_broke_off_is_not_kept(server: Running) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveTokens(deltas=[token("a")], usage=None, engine="fp")
        raise RuntimeError

    server.cell.script = script
    assert b'"error"' in post(server, stream=True).content
    server.cell.script = None
    assert post(server, stream=True).content.endswith(b"[DONE]\n\n")


def test_a_stream_that_was_left_is_not_kept_and_its_key_is_free(server: Running) -> None:
    ended: list[str] = []

    async def script(request: LiveRequest) -> AsyncIterator[Item]:
        try:
            yield LiveTokens(deltas=[token("a")], usage=None, engine="fp")
            await asyncio.Event().wait()
            yield LiveTokens(deltas=[], usage=Usage(), engine="fp")
        finally:
            ended.append(request.request_id)

    server.cell.script = script
    head = {"authorization": f"Bearer {server.key}", "idempotency-key": "k-1"}
    with server.http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}, headers=head) as response:
        next(response.iter_raw())
    until(lambda: ended, "the end of the work")
    server.cell.script = None
    until(lambda: post(server, stream=True).status_code == 200, "the key to be free")


def test_an_answer_that_cannot_be_kept_is_still_an_answer(server: Running) -> None:
    server.cell.write_error = StoreError("the disk is gone")
    assert post(server).status_code == 200
    server.cell.write_error = None
    assert not replayed(post(server))


def test_a_body_over_the_bound_is_refused_with_a_key_too(server: Running) -> None:
    assert code(post(server, user="x" * 5_000_000)) == (413, "body_too_large")
    assert code(post(server, user="x" * 5_000_000)) == (413, "body_too_large")


def test_nothing_that_was_asked_or_the_key_itself_is_in_the_log(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server.cell.write_error = StoreError("the disk is gone")
    post(server, "very-secret-key", user="very-secret-user")
    assert "could not be kept" in caplog.text
    assert "very-secret" not in caplog.text


# -- the store ---------------------------------------------------------------------------------------------------------


def kept(name: int, account: str = "a", size: int = 10, expires_ms: int = 100) -> KeptAnswer:
    return KeptAnswer(
        account=account,
        name=name.to_bytes(32, "big"),
        request=bytes(32),
        status=200,
        headers=[("content-type", "application/json")],
        body=bytes(size),
        expires_ms=expires_ms,
    )


@pytest.fixture
def books(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    database = Database(tmp_path / "x.db")
    yield database.writer
    database.close()


def test_each_account_has_a_bound_and_the_oldest_go_first(
    books: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_ANSWERS", 3)
    store.keep(books, kept(99, "other"), 0)
    for name in range(5):
        store.keep(books, kept(name), 0)
    found = [name for name in range(5) if store.find(books, "a", name.to_bytes(32, "big"), 0)]
    assert found == [2, 3, 4]
    assert store.find(books, "other", (99).to_bytes(32, "big"), 0) == kept(99, "other")
    monkeypatch.setattr(store, "MAX_ACCOUNT_BYTES", 9_700)
    store.keep(books, kept(5, size=9_000), 0)
    assert [name for name in range(6) if store.find(books, "a", name.to_bytes(32, "big"), 0)] == [4, 5]


def test_what_has_expired_is_removed_when_something_is_kept(books: sqlite3.Connection) -> None:
    store.keep(books, kept(1, expires_ms=100), 0)
    store.keep(books, kept(2, expires_ms=300), 200)
    assert books.execute("SELECT count(*) FROM kept_answer").fetchone()[0] == 1


def test_a_name_holds_its_newest_answer(books: sqlite3.Connection) -> None:
    store.keep(books, kept(1, size=1), 0)
    store.keep(books, kept(1, size=2), 0)
    found = store.find(books, "a", (1).to_bytes(32, "big"), 0)
    assert found is not None
    assert len(found.body) == 2
