"""Responses that are kept: conversations, the background, restarts, and the bounds of all of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.api_cell import MODEL, Item, LocalCell, Running, serve, until
from tests.response_trial import ASKED, TOOL, answering, asked, ended, get, post, refusing

from motorpool.errors import CapacityError, StorageFullError
from motorpool.server.cell import LiveRequest
from motorpool.server.openai.responses import log as log_module
from motorpool.server.openai.responses import registry, request, routes, runs
from motorpool.server.openai.responses.request import CreateRequest
from motorpool.store import responses as store


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    yield shared
    shared.cell.script = None
    shared.cell.capacity = True
    shared.cell.write_error = None
    shared.cell.ahead_ms = 0


@pytest.fixture(scope="module")
def official(shared: Running) -> Iterator[openai.OpenAI]:
    with shared.client() as made:
        yield made


@pytest.fixture
def client(server: Running, official: openai.OpenAI) -> openai.OpenAI:
    return official


# -- kept responses


def test_a_response_is_kept_unless_the_customer_says_no(client: openai.OpenAI, server: Running) -> None:
    kept = client.responses.create(model=MODEL, input=ASKED)
    assert client.responses.retrieve(kept.id).to_dict() == kept.to_dict()
    before = server.cell.reader.execute("SELECT count(*) FROM response").fetchone()[0]
    not_kept = client.responses.create(model=MODEL, input=ASKED, store=False)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve(not_kept.id)
    assert caught.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=MODEL, input="more", previous_response_id=not_kept.id)
    assert server.cell.reader.execute("SELECT count(*) FROM response").fetchone()[0] == before


def test_a_response_belongs_to_one_account(client: openai.OpenAI, server: Running) -> None:
    kept = client.responses.create(model=MODEL, input=ASKED)
    queued = client.responses.create(model=MODEL, input=ASKED, background=True)
    with server.client(api_key=server.new_key("other")) as other:
        for response_id in (kept.id, queued.id):
            for use in (other.responses.retrieve, other.responses.delete, other.responses.cancel):
                with pytest.raises(openai.NotFoundError):
                    use(response_id)
            with pytest.raises(openai.NotFoundError):
                other.responses.input_items.list(response_id)
            with pytest.raises(openai.BadRequestError):
                other.responses.create(model=MODEL, input="x", previous_response_id=response_id)
    ended(client, queued.id)


def test_a_deleted_response_is_gone(client: openai.OpenAI, server: Running) -> None:
    kept = client.responses.create(model=MODEL, input=ASKED)
    head = {"authorization": f"Bearer {server.key}"}
    gone = server.http.delete(f"/v1/responses/{kept.id}", headers=head)
    assert gone.json() == {"id": kept.id, "object": "response", "deleted": True}
    for _ in range(2):
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(kept.id)
    told = client.responses.create(model=MODEL, input=ASKED, background=True)
    ended(client, told.id)
    client.responses.delete(told.id)
    left = "SELECT count(*) FROM response_piece WHERE response_no NOT IN (SELECT response_no FROM response)"
    assert server.cell.reader.execute(left).fetchone()[0] == 0
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(kept.id)


def test_an_answer_that_cannot_be_kept_is_given_and_says_so(client: openai.OpenAI, server: Running) -> None:
    server.cell.write_error = StorageFullError("the disk is full")
    response = client.responses.create(model=MODEL, input=ASKED)
    assert response.output_text
    assert response.to_dict()["store"] is False


def test_a_background_response_that_cannot_be_kept_is_refused(server: Running) -> None:
    server.cell.write_error = StorageFullError("the disk is full")
    response = post(server, {"model": MODEL, "input": "x", "background": True})
    assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_full")


# -- conversations


def test_a_conversation_is_rebuilt_from_what_is_kept(client: openai.OpenAI, server: Running) -> None:
    first = client.responses.create(model=MODEL, input="one", instructions="Only now.")
    second = client.responses.create(model=MODEL, input="two", previous_response_id=first.id)
    third = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": "three"}], previous_response_id=second.id, store=False
    )
    assert third.previous_response_id == second.id
    assert asked(server)["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "three"},
    ]


def test_a_conversation_with_a_gap_is_refused(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="one")
    second = client.responses.create(model=MODEL, input="two", previous_response_id=first.id)
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="three", previous_response_id=second.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
    assert len(client.responses.input_items.list(second.id).data) == 1  # what is left


def test_only_an_answer_can_be_gone_on_with(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cell.capacity = False
    waiting = client.responses.create(model=MODEL, input="one", background=True)
    with pytest.raises(openai.ConflictError) as conflict:
        client.responses.create(model=MODEL, input="two", previous_response_id=waiting.id)
    assert conflict.value.code == "previous_response_in_progress"
    client.responses.cancel(waiting.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="two", previous_response_id=waiting.id)
    assert caught.value.code == "previous_response_not_answered"


def test_a_conversation_has_a_longest_length(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("motorpool.server.openai.responses.creation", "motorpool.store.responses"):
        monkeypatch.setattr(f"{module}.MAX_CHAIN", 3)
    last = None
    for text in ("one", "two", "three", "four"):
        with contextlib.nullcontext() if text != "four" else pytest.raises(openai.BadRequestError) as caught:
            last = client.responses.create(model=MODEL, input=text, previous_response_id=last).id
    assert caught is not None
    assert caught.value.code == "conversation_too_long"
    monkeypatch.setattr("motorpool.server.openai.responses.creation.MAX_CHAIN", 9)
    monkeypatch.setattr("motorpool.server.openai.responses.creation.MAX_CHAIN_BYTES", 1000)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="five", previous_response_id=last)
    assert caught.value.code == "conversation_too_long"


def test_input_items_in_pages(client: openai.OpenAI) -> None:
    given: Any = [{"role": "user", "content": f"a{n}"} for n in range(3)]
    first = client.responses.create(model=MODEL, input=given)
    second = client.responses.create(model=MODEL, input="last", previous_response_id=first.id)
    wanted = ["a0", "a1", "a2", first.output_text, "last"]

    def texts(**query: Any) -> list[str]:
        items: Any = client.responses.input_items.list(second.id, **query)
        return [item.content[0].text for item in items]

    assert texts(order="asc") == wanted
    assert texts() == texts(order="desc") == wanted[::-1]
    for limit in range(1, 6):
        assert texts(order="asc", limit=limit) == wanted  # the client fetches page after page
    page = client.responses.input_items.list(second.id, order="asc", limit=2)
    assert page.has_more
    ids = [item.id for item in client.responses.input_items.list(second.id)]
    assert len(set(ids)) == len(ids)
    assert {item.type for item in page.data} == {"message"}


def test_queries_that_are_wrong(client: openai.OpenAI, server: Running) -> None:
    kept = client.responses.create(model=MODEL, input=ASKED)
    path = f"/v1/responses/{kept.id}"
    for query, param in (
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg_x", "after"),
        ("/input_items?before=msg_x", "before"),
        ("?stream=yes", "stream"),
        ("?starting_after=1", "starting_after"),
        ("?stream=true&starting_after=-1", "starting_after"),
        ("?stream=true", "stream"),
    ):
        response = get(server, path + query)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), query
    assert get(server, path + "?stream=true").json()["error"]["code"] == "not_in_background"
    assert get(server, path + "?stream=false").status_code == 200


# -- in the background


def test_a_background_response_runs_by_itself(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=ASKED, background=True, max_output_tokens=6)
    assert (response.status, response.background, response.output) == ("queued", True, [])
    found = ended(client, response.id)
    assert found.status == "incomplete"
    assert len(found.output_text.split()) == 6
    assert found.usage.output_tokens == 6


def test_a_background_response_waits_for_a_vehicle(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RETRY_S", 0.01)
    monkeypatch.setattr(registry, "SERVING_TTL_S", 0.0)
    server.cell.capacity = False
    response = client.responses.create(model=MODEL, input=ASKED, background=True)
    assert client.responses.retrieve(response.id).status == "queued"
    server.cell.capacity = True
    assert ended(client, response.id).status == "completed"


def test_what_passes_is_tried_again_and_what_does_not_is_not(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RETRY_S", 0.001)
    monkeypatch.setattr(runs, "MAX_RETRY_S", 0.001)
    tries: list[int] = []

    def failing(count: int, status: int, code: str) -> Callable[[LiveRequest], AsyncIterator[Item]]:
        tries.clear()

        async def script(live: LiveRequest) -> AsyncIterator[Item]:
            tries.append(1)
            if status == 0 and len(tries) <= count:
                raise CapacityError("busy")
            inner = refusing(status, code) if len(tries) <= count else answering("at last")
            async for item in inner(live):
                yield item

        return script

    for count, status, code, outcome, runs_wanted in (
        (20, 503, "server_is_overloaded", "completed", 21),  # nothing is wrong, there is only nobody free
        (20, 0, "", "completed", 21),
        (4, 502, "engine_error", "completed", 5),
        (99, 502, "engine_error", "failed", 5),
        (99, 400, "invalid_value", "failed", 1),
    ):
        server.cell.script = failing(count, status, code)
        response = client.responses.create(model=MODEL, input=ASKED, background=True)
        found = ended(client, response.id)
        assert (found.status, len(tries)) == (outcome, runs_wanted), code
        if outcome == "failed":
            assert found.error.code == code
            assert found.usage is None


def test_a_background_response_does_not_wait_for_ever(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RETRY_S", 0.01)
    server.cell.capacity = False
    response = client.responses.create(model=MODEL, input=ASKED, background=True)
    server.cell.ahead_ms = runs.BACKGROUND_WINDOW_MS
    found = ended(client, response.id)
    assert (found.status, found.error.code) == ("failed", "background_expired")


def test_cancelling(client: openai.OpenAI, server: Running) -> None:
    server.cell.capacity = False
    response = client.responses.create(model=MODEL, input=ASKED, background=True)
    assert client.responses.cancel(response.id).status == "cancelled"
    assert client.responses.cancel(response.id).status == "cancelled"
    assert client.responses.retrieve(response.id).status == "cancelled"
    server.cell.capacity = True
    done = client.responses.create(model=MODEL, input=ASKED, background=True)
    ended(client, done.id)
    assert client.responses.cancel(done.id).status == "completed"
    plain = client.responses.create(model=MODEL, input=ASKED)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.cancel(plain.id)
    assert caught.value.code == "response_not_cancellable"
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_none")


def test_deleting_what_still_waits(client: openai.OpenAI, server: Running) -> None:
    server.cell.capacity = False
    response = client.responses.create(model=MODEL, input=ASKED, background=True)
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    assert store.open_count(server.cell.reader) == 0


def test_there_is_a_bound_on_what_waits(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MAX_OPEN_OF_ACCOUNT", 2)
    server.cell.capacity = False
    waiting = [client.responses.create(model=MODEL, input=ASKED, background=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as caught:
        client.responses.create(model=MODEL, input=ASKED, background=True)
    assert caught.value.code == "too_many_background_responses"
    assert caught.value.response.headers["retry-after-ms"] == str(registry.RETRY_AFTER_MS)
    client.responses.cancel(waiting[0].id)
    client.responses.cancel(client.responses.create(model=MODEL, input=ASKED, background=True).id)
    client.responses.cancel(waiting[1].id)


@pytest.mark.parametrize("tools", [False, True])
def test_a_restart_loses_nothing_that_was_accepted(tmp_path: Path, tools: bool) -> None:
    with serve(tmp_path) as running, running.client() as client:
        running.cell.capacity = False
        waiting = [
            client.responses.create(model=MODEL, input=f"{n}", background=True, tools=[TOOL] if tools else [])
            for n in range(3)
        ]
    with serve(tmp_path) as running:
        key = running.key
        with running.client(api_key=key) as client:
            for response in waiting:
                assert ended(client, response.id).status == "completed"
            assert {live.stream for live in running.cell.asked} == {not tools}
            assert len(running.cell.asked) == 3


# -- how long, how much


def _kept(cell: LocalCell) -> set[str]:
    return {row[0] for row in cell.reader.execute("SELECT response_id FROM response")}


def test_responses_are_kept_for_thirty_days_and_conversations_as_long_as_their_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path) as running, running.client() as client:
        cell = running.cell
        first = client.responses.create(model=MODEL, input="one").id
        alone = client.responses.create(model=MODEL, input="alone").id
        cell.ahead_ms = 20 * store.DAY_MS
        second = client.responses.create(model=MODEL, input="two", previous_response_id=first).id
        cell.ahead_ms = 31 * store.DAY_MS
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(alone)
        assert client.responses.retrieve(first).status == "completed"
        assert store.is_time_over(cell.reader, cell.now_ms())
        running.call(cell.write(lambda db: store.drop_expired(db, cell.now_ms())))
        assert _kept(cell) == {first, second}
        cell.ahead_ms = 51 * store.DAY_MS
        running.call(cell.write(lambda db: store.drop_expired(db, cell.now_ms())))
        assert _kept(cell) == set()
        assert store.space(cell.reader, "acme") == (0, 0)


def test_what_is_over_is_removed_at_the_next_start(tmp_path: Path) -> None:
    with serve(tmp_path) as running, running.client() as client:
        client.responses.create(model=MODEL, input="one")
        row = "UPDATE response SET expires_ms = 1"
        running.call(running.cell.write(lambda db: db.execute(row)))
    with serve(tmp_path) as running:
        until(lambda: not _kept(running.cell), "the removal")


def test_an_account_keeps_so_many_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path) as running, running.client() as client:
        monkeypatch.setattr(store, "MAX_KEPT", 3)
        made = [client.responses.create(model=MODEL, input=f"{n}").id for n in range(5)]
        assert _kept(running.cell) == set(made[2:])
        with running.client(api_key=running.new_key("other")) as other:
            theirs = other.responses.create(model=MODEL, input="x").id
        assert _kept(running.cell) == {*made[2:], theirs}
        monkeypatch.setattr(store, "MAX_KEPT_BYTES", 20_000)
        big = client.responses.create(model=MODEL, input="y" * 18_000).id
        assert _kept(running.cell) == {big, theirs}
        kept, size = store.space(running.cell.reader, "acme")
        assert kept == 1
        assert 18_000 < size < 20_000


def test_the_space_of_an_account_is_what_its_rows_hold(tmp_path: Path) -> None:
    with serve(tmp_path) as running, running.client() as client:
        for n in range(4):
            response = client.responses.create(model=MODEL, input="x" * n, background=n % 2 == 1)
            ended(client, response.id)
        held = running.cell.reader.execute(
            "SELECT count(*), sum(length(facts) + length(items) + length(result) + coalesce(length(body), 0)"
            " + coalesce((SELECT sum(length(pieces)) FROM response_piece AS p WHERE p.response_no = r.response_no), 0))"
            " FROM response AS r"
        ).fetchone()
        assert store.space(running.cell.reader, "acme") == tuple(held)
        running.cell.ahead_ms = store.PIECES_KEPT_MS + 1000
        running.call(running.cell.write(lambda db: store.drop_expired(db, running.cell.now_ms())))
        assert running.cell.reader.execute("SELECT count(*) FROM response_piece").fetchone()[0] == 0
        assert store.space(running.cell.reader, "acme")[1] < held[1]


def test_nothing_that_was_asked_or_answered_is_logged(
    client: openai.OpenAI, server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    server.cell.script = answering("a private answer")
    with caplog.at_level("DEBUG"):
        client.responses.create(model=MODEL, input="a private question", instructions="a private order")
        response = client.responses.create(model=MODEL, input="a private question", background=True)
        ended(client, response.id)
        server.cell.script = refusing(400, "invalid_value")
        failed = client.responses.create(model=MODEL, input="a private question", background=True)
        assert ended(client, failed.id).error.code == "invalid_value"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("motorpool")]
    assert any("invalid_value" in line for line in ours)
    assert not any("private" in line for line in ours)


def test_limits_are_in_the_docs() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs/responses.md").read_text("utf-8")
    for number in (
        registry.MAX_OPEN,
        registry.MAX_OPEN_OF_ACCOUNT,
        registry.MAX_OPEN_BYTES,
        registry.MAX_RUNNING,
        log_module.MAX_READERS,
        log_module.MAX_TOLD_BYTES,
        store.MAX_KEPT,
        store.MAX_KEPT_BYTES,
        store.MAX_CHAIN,
        store.MAX_CHAIN_BYTES,
        request.MAX_IDENTIFIER_CHARS,
        routes.MAX_ITEMS_PAGE,
        runs.MAX_FAILED_RUNS,
    ):
        assert f" {number} " in page.replace("|", " | "), number
    assert f"kept for {store.KEPT_MS // store.DAY_MS} days" in page
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in row.replace("`", " ").replace(",", " ").split()}
    assert set(CreateRequest.__struct_fields__) | set(request.REFUSED) <= named
    assert {kind for kind in request.SKIPPED if f"`{kind}`" not in page} == set()
