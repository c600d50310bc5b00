"""Batches over HTTP: creation, every state, every refusal of a line, crash and restart while validating."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch
from tests.api_cell import MODEL, LocalCell, Running, catalogue, serve, until

from motorpool.errors import CallerError, StorageFullError
from motorpool.server.openai.batches import window_s
from motorpool.server.openai.lines import check_line, parse_line
from motorpool.server.openai.settings import ApiSettings
from motorpool.server.openai.validation import Inspection, Validation, inspect
from motorpool.store import customer
from motorpool.store.blobs import BlobStore
from motorpool.types import Kind

SMALL = ApiSettings(max_body_bytes=2_000, max_batch_lines=20, max_batch_errors=5)
CHAT: Any = "/v1/chat/completions"


def line(custom_id: str = "a", **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | fields


def with_body(custom_id: str = "a", **fields: Any) -> dict[str, Any]:
    made = line(custom_id)
    return made | {"body": made["body"] | fields}


def lines(*made: dict[str, Any] | str) -> bytes:
    return "".join((part if isinstance(part, str) else json.dumps(part)) + "\n" for part in made).encode()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, openai.OpenAI]]:
    with serve(tmp_path_factory.mktemp("api"), settings=SMALL) as running, running.client() as client:
        yield running, client


@pytest.fixture
def server(shared: tuple[Running, openai.OpenAI]) -> Iterator[Running]:
    yield shared[0]
    shared[0].cell.hold = None
    shared[0].cell.ahead_ms = 0


@pytest.fixture
def client(server: Running, shared: tuple[Running, openai.OpenAI]) -> openai.OpenAI:
    return shared[1]


def create(client: openai.OpenAI, data: bytes, **fields: Any) -> Batch:
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    fields.setdefault("completion_window", "24h")
    fields.setdefault("endpoint", CHAT)
    return client.batches.create(input_file_id=file.id, **fields)


def settled(client: openai.OpenAI, batch: Batch, *states: str) -> Batch:
    wanted = states or ("completed", "failed", "cancelled", "expired")

    def look() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in wanted else None

    return until(look, f"batch {wanted}")


def errors_of(client: openai.OpenAI, data: bytes, **fields: Any) -> list[tuple[str | None, str | None, int | None]]:
    failed = settled(client, create(client, data, **fields))
    assert failed.status == "failed"
    assert failed.failed_at is not None
    assert failed.output_file_id is None
    assert failed.errors is not None
    assert failed.errors.object == "list"
    assert failed.errors.data is not None
    assert all(error.message for error in failed.errors.data)
    return [(error.code, error.param, error.line) for error in failed.errors.data]


# -- the way through


def test_a_batch_runs_to_its_end(client: openai.OpenAI) -> None:
    data = lines(
        *[line(f"r{n}") for n in range(5)], with_body("long", messages=[{"role": "user", "content": "w " * 900}])
    )
    made = create(
        client, data, metadata={"name": "test"}, output_expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (made.object, made.status, made.endpoint) == ("batch", "validating", CHAT)
    assert made.metadata == {"name": "test"}
    assert made.expires_at == made.created_at + 24 * 3600
    done = settled(client, made)
    assert done.status == "completed"
    assert done.model == MODEL
    assert done.errors is None
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (6, 6, 0)
    assert None not in (done.in_progress_at, done.finalizing_at, done.completed_at)
    assert done.usage is not None
    assert done.usage.output_tokens == 18
    assert done.usage.total_tokens == 18 + done.usage.input_tokens
    assert done.output_file_id is not None
    output = [json.loads(row) for row in client.files.content(done.output_file_id).text.splitlines()]
    assert sorted(row["custom_id"] for row in output) == ["long", "r0", "r1", "r2", "r3", "r4"]
    assert {row["response"]["status_code"] for row in output} == {200}
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"


def test_every_key_of_a_batch_is_there_from_the_start(server: Running, client: openai.OpenAI) -> None:
    made = create(client, lines(line()))
    head = {"authorization": f"Bearer {server.key}"}
    shown = server.http.get(f"/v1/batches/{made.id}", headers=head).json()
    known = set(Batch.model_fields)
    assert set(shown) == known | {"motorpool"}
    assert set(shown["usage"]) == {
        "input_tokens",
        "input_tokens_details",
        "output_tokens",
        "output_tokens_details",
        "total_tokens",
        "motorpool",
    }


def test_completions_are_served_in_batches(client: openai.OpenAI) -> None:
    data = lines(line(url="/v1/completions", body={"model": MODEL, "prompt": "one", "max_tokens": 2}))
    assert settled(client, create(client, data, endpoint="/v1/completions")).status == "completed"


def test_line_ends_byte_order_mark_and_blank_end_are_fine(client: openai.OpenAI) -> None:
    data = b"\xef\xbb\xbf" + lines(line("a"), line("b")).replace(b"\n", b"\r\n") + b"\r\n \n\n"
    done = settled(client, create(client, data))
    assert done.request_counts is not None
    assert (done.status, done.request_counts.total) == ("completed", 2)


def test_the_last_line_needs_no_line_feed(client: openai.OpenAI) -> None:
    assert settled(client, create(client, lines(line("a"), line("b"))[:-1])).status == "completed"


def test_a_file_with_the_most_lines_is_taken(client: openai.OpenAI) -> None:
    done = settled(client, create(client, lines(*[line(f"r{n}") for n in range(20)])))
    assert done.status == "completed"


# -- what is wrong with a line


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        ("{not json", "invalid_json", None),
        ("[1]", "invalid_type", None),
        ({"custom_id": "x", "method": "POST", "url": CHAT}, "missing_required_parameter", "body"),
        ({**line(), "custom_id": None}, "invalid_type", "custom_id"),
        (line(""), "invalid_value", "custom_id"),
        (line("x" * 513), "invalid_value", "custom_id"),
        (line("dup"), "duplicate_custom_id", "custom_id"),
        (line("x", method="GET"), "invalid_value", "method"),
        (line("x", url="/v1/completions"), "mismatched_url", "url"),
        (line("x", body=[]), "invalid_type", "body"),
        (with_body("x", messages=[]), "invalid_value", "body.messages"),
        (with_body("x", temperature=9), "invalid_value", "body.temperature"),
        (with_body("x", top_logprobs=2), "invalid_value", "body.top_logprobs"),
        (with_body("x", logit_bias={"1": "zebra"}), "invalid_type", "body.logit_bias"),
        (with_body("x", functions=[{"name": "f"}]), "unsupported_parameter", "body.functions"),
        (with_body("x", stream=True), "invalid_value", "body.stream"),
        (with_body("x", model="acme/tiny-7"), "mismatched_model", "body.model"),
        (with_body("x", user="u" * 2_000), "body_too_large", "body"),
        (with_body("x", user="u" * 20_000), "body_too_large", "body"),
        ("", "blank_line", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_line_fails_the_batch_with_its_place(
    client: openai.OpenAI, bad: Any, code: str, param: str | None
) -> None:
    assert errors_of(client, lines(line("dup"), bad, line("c"))) == [(code, param, 2)]


def test_the_earlier_line_of_a_doubled_id_is_named(client: openai.OpenAI) -> None:
    failed = settled(client, create(client, lines(line("a"), line("b"), line("c"), line("b"))))
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert "line 2" in (failed.errors.data[0].message or "")
    assert failed.errors.data[0].line == 4


def test_an_unknown_model_is_told_once(client: openai.OpenAI) -> None:
    data = lines(with_body("a", model="nope"), with_body("b", model="nope"))
    assert errors_of(client, data) == [("model_not_found", "body.model", 1)]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"suffix": "x"}, "unsupported_parameter", "body.suffix"),
        ({"echo": True, "logprobs": 2}, "unsupported_parameter", "body.logprobs"),
        ({"prompt": [2**40]}, "invalid_value", "body.prompt"),
    ],
)
def test_a_completion_is_checked_like_a_live_one(
    client: openai.OpenAI, fields: dict[str, Any], code: str, param: str
) -> None:
    data = lines(line(url="/v1/completions", body={"model": MODEL, "prompt": "x"} | fields))
    assert errors_of(client, data, endpoint="/v1/completions") == [(code, param, 1)]


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\r\n  \n"])
def test_a_file_without_lines_is_refused(client: openai.OpenAI, data: bytes) -> None:
    assert errors_of(client, data) == [("empty_file", None, None)]


def test_too_many_lines_are_refused(client: openai.OpenAI) -> None:
    data = lines(*[line(f"r{n}") for n in range(21)])
    assert errors_of(client, data) == [("too_many_lines", None, 21)]


def test_the_errors_shown_are_limited(client: openai.OpenAI) -> None:
    found = errors_of(client, lines(*["{" for _ in range(10)]))
    assert found == [("invalid_json", None, n) for n in range(1, 6)]


def test_endless_blank_lines_are_refused(client: openai.OpenAI) -> None:
    assert errors_of(client, lines(line("a")) + b"\n" * 5_000) == [("blank_line", None, 2)]


def test_a_value_of_a_line_is_not_repeated_in_its_error(client: openai.OpenAI) -> None:
    bad = with_body("x", messages=[{"role": "zebra-4711", "content": "zebra-4711"}])
    failed = settled(client, create(client, lines(bad)))
    assert failed.errors is not None
    assert "zebra-4711" not in failed.errors.to_json()


# -- what is wrong with a batch


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "invalid_value", "endpoint"),
        ({"completion_window": "24 h"}, "invalid_value", "completion_window"),
        ({"completion_window": "14m"}, "invalid_value", "completion_window"),
        ({"completion_window": "8d"}, "invalid_value", "completion_window"),
        ({"metadata": {str(n): "" for n in range(17)}}, "invalid_value", "metadata"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 5}},
            "invalid_value",
            "output_expires_after.seconds",
        ),
        (
            {"output_expires_after": {"anchor": "now", "seconds": 3600}},
            "invalid_value",
            "output_expires_after.anchor",
        ),
    ],
)
def test_a_bad_batch_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, lines(line()), **fields)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_missing_or_wrong_input_file_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    assert (missing.value.code, missing.value.param) == ("file_not_found", "input_file_id")
    file = client.files.create(file=("x", b"{}"), purpose="evals")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    assert (wrong.value.code, wrong.value.param) == ("invalid_purpose", "input_file_id")


@pytest.mark.parametrize(
    ("text", "seconds"), [("24h", 86400), ("15m", 900), ("90m", 5400), ("6h", 21600), ("7d", 604800), ("168h", 604800)]
)
def test_windows_are_numbers_and_units(text: str, seconds: int) -> None:
    assert window_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "h", "0h", "024h", "1.5h", "24H", "900s", "10081m", "-1h", "1h30m", "٢h", "15m\n"]
)
def test_other_windows_are_refused(text: str) -> None:
    with pytest.raises(CallerError, match="15m to 7d"):
        window_s(text)


# -- lists


def test_batches_are_listed_in_pages_and_by_account(server: Running) -> None:
    with server.client(api_key=server.new_key("paging")) as client:
        made = [create(client, lines(line())).id for _ in range(3)]
        first = client.batches.list(limit=2)
        assert (len(first.data), first.has_more) == (2, True)
        assert sorted(batch.id for batch in client.batches.list(limit=1)) == sorted(made)
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.list(limit=101)
        assert caught.value.param == "limit"
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.list(after="batch_none")
        assert caught.value.param == "after"
    with server.client() as other:
        for call in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError) as hidden:
                call(made[0])
            assert hidden.value.code == "batch_not_found"


# -- cancel, expiry


async def _hold(cell: LocalCell, *, on: bool) -> None:
    if on:
        cell.hold = asyncio.Event()
    elif cell.hold is not None:
        cell.hold.set()


def test_a_running_batch_is_cancelled(server: Running, client: openai.OpenAI) -> None:
    server.call(_hold(server.cell, on=True))
    made = settled(client, create(client, lines(line("a"), line("b"))), "in_progress")
    with pytest.raises(openai.ConflictError) as caught:
        client.files.delete(made.input_file_id)
    assert caught.value.code == "file_in_use"
    assert client.batches.cancel(made.id).status == "cancelling"
    assert client.batches.cancel(made.id).status == "cancelling"
    server.call(_hold(server.cell, on=False))
    done = settled(client, made)
    assert done.status == "cancelled"
    assert done.cancelling_at is not None
    assert done.cancelled_at is not None
    assert client.batches.cancel(made.id).status == "cancelled"
    client.files.delete(made.input_file_id)


def test_an_ended_batch_cannot_be_cancelled(client: openai.OpenAI) -> None:
    done = settled(client, create(client, lines(line())))
    with pytest.raises(openai.ConflictError) as caught:
        client.batches.cancel(done.id)
    assert caught.value.code == "batch_not_cancellable"


def test_a_batch_expires_and_says_so_line_by_line(server: Running, client: openai.OpenAI) -> None:
    server.call(_hold(server.cell, on=True))
    made = settled(client, create(client, lines(line("a"), line("b")), completion_window="15m"), "in_progress")
    server.cell.ahead_ms = 16 * 60_000
    server.call(_hold(server.cell, on=False))
    done = settled(client, made)
    assert done.status == "expired"
    assert done.expired_at is not None
    assert done.output_file_id is None
    assert done.error_file_id is not None
    rows = [json.loads(row) for row in client.files.content(done.error_file_id).text.splitlines()]
    assert {row["error"]["code"] for row in rows} == {"batch_expired"}


def test_a_batch_is_cancelled_while_it_is_validated(tmp_path: Path) -> None:
    with serve(tmp_path) as server, server.client() as client:
        server.call(_take_turn(server))  # the one turn of validation is taken, so that the batch waits
        made = create(client, lines(line()))
        assert client.batches.retrieve(made.id).status == "validating"
        cancelled = client.batches.cancel(made.id)
        assert cancelled.status == "cancelled"
        assert cancelled.cancelled_at is not None
        server.call(_give_turn(server))
        # Another batch comes through afterwards, and the cancelled one stays so.
        assert settled(client, create(client, lines(line()))).status == "completed"
        assert client.batches.retrieve(made.id).status == "cancelled"


async def _take_turn(server: Running) -> None:
    await server.api.validation.turn.acquire()


async def _give_turn(server: Running) -> None:
    server.api.validation.turn.release()


def test_a_batch_is_cancelled_before_its_check_has_begun(tmp_path: Path) -> None:
    async def cancel_at_once(server: Running, batch_id: str) -> tuple[bool, int]:
        row = customer.customers_batch(server.cell.reader, "acme", batch_id)
        validation = Validation(server.cell, SMALL)
        validation.begin(row)
        cancelled = await validation.cancel(row.batch_no)  # the check had no turn of the loop yet
        return cancelled, validation.under_way

    with serve(tmp_path) as server, server.client() as client:
        server.call(_take_turn(server))
        made = create(client, lines(line()))
        assert server.call(cancel_at_once(server, made.id)) == (True, 0)
        assert client.batches.retrieve(made.id).status == "cancelled"


def test_a_batch_is_cancelled_while_the_cell_waits_for_room_to_start_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.Event()

    async def start_batch(cell: LocalCell, _: Any) -> None:
        waiting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(LocalCell, "start_batch", start_batch)
    with serve(tmp_path) as server, server.client() as client:
        made = create(client, lines(line()))
        server.call(waiting.wait())
        server.cell.write_error = StorageFullError("the disk is full")
        with pytest.raises(openai.InternalServerError) as full:
            client.batches.cancel(made.id)
        assert full.value.code == "storage_full"
        server.cell.write_error = None
        assert client.batches.cancel(made.id).status == "cancelled"


def test_a_batch_that_could_not_be_cancelled_goes_on(tmp_path: Path) -> None:
    with serve(tmp_path) as server, server.client() as client:
        server.call(_take_turn(server))
        made = create(client, lines(line()))
        server.cell.write_error = StorageFullError("the disk is full")
        with pytest.raises(openai.InternalServerError) as full:
            client.batches.cancel(made.id)
        assert full.value.code == "storage_full"
        server.cell.write_error = None
        server.call(_give_turn(server))
        assert settled(client, made).status == "completed"


def test_a_restart_goes_on_with_what_was_validating(tmp_path: Path) -> None:
    with serve(tmp_path) as server, server.client() as client:
        server.call(_take_turn(server))
        made = create(client, lines(line()))
        bad = create(client, lines("{"))
        key = server.key
    with serve(tmp_path) as server, server.client(api_key=key) as client:
        assert settled(client, made).status == "completed"
        assert settled(client, bad).status == "failed"


def test_bytes_that_cannot_be_read_fail_the_batch(tmp_path: Path) -> None:
    with serve(tmp_path) as server, server.client() as client:
        server.call(_take_turn(server))
        made = create(client, lines(line()))
        server.cell.blobs.delete(made.input_file_id)
        server.call(_give_turn(server))
        failed = settled(client, made)
    assert failed.status == "failed"
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert failed.errors.data[0].code == "store_error"


def test_an_input_file_deleted_in_the_books_fails_the_batch(tmp_path: Path) -> None:
    with serve(tmp_path) as server, server.client() as client:
        server.call(_take_turn(server))
        made = create(client, lines(line()))
        customer.delete_file(server.cell.database.writer, made.input_file_id, 1)
        server.call(_give_turn(server))
        failed = settled(client, made)
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert failed.errors.data[0].code == "file_not_found"


def test_an_unexpected_failure_fails_the_batch_and_is_logged_without_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = "a customer's words"

    async def start_batch(*_: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(LocalCell, "start_batch", start_batch)
    with serve(tmp_path) as server, server.client() as client:
        failed = settled(client, create(client, lines(line())))
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert failed.errors.data[0].code == "internal_error"
    assert "RuntimeError" in caplog.text
    assert words not in caplog.text


def test_books_that_cannot_be_written_leave_the_batch_for_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(tmp_path) as server, server.client() as client:
        server.call(_take_turn(server))
        made = create(client, lines("{"))
        server.cell.write_error = StorageFullError("the disk is full")
        server.call(_give_turn(server))
        until(lambda: "StorageFullError" in caplog.text, "the log entry")
        assert client.batches.retrieve(made.id).status == "validating"
        key = server.key
    with serve(tmp_path) as server, server.client(api_key=key) as client:
        assert settled(client, made).status == "failed"


# -- the parts, without a server


def test_a_line_is_taken_apart_byte_for_byte() -> None:
    body = b'{"model":"null", "messages":[{"role":"user","content":"\\u00e9 }"}],"x":[1 , 2]}'
    data = b'{"custom_id": "a\\"b", "method":"POST","url":"/v1/chat/completions", "body": ' + body + b' , "more": 1}\r'
    assert parse_line(data) == ('a"b', body)
    custom_id, request = check_line(Kind.CHAT, data)
    assert (custom_id, request.model) == ('a"b', "null")


@pytest.mark.parametrize("size", [7, 64, 1_000_000])
def test_the_index_is_right_however_the_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("motorpool.server.openai.validation.READ_BYTES", size)
    made = [json.dumps(line(f"é{n}" * (n + 1))).encode() for n in range(5)]
    store = BlobStore(tmp_path)
    with store.writer() as writer:
        writer.write(b"\xef\xbb\xbf" + b"\r\n".join(made) + b"\n\n")
        writer.commit("in")
    inspection = Inspection(Kind.CHAT, catalogue(), ApiSettings())
    asyncio.run(inspect(store, "in", inspection))
    assert inspection.errors == []
    with store.map("in") as data:
        found = [data[at : at + n] for at, n in zip(inspection.offsets, inspection.lengths, strict=True)]
    assert [row.rstrip(b"\r") for row in found] == made


@pytest.mark.parametrize("size", [100, 4_000, 1_000_000])
def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("motorpool.server.openai.validation.READ_BYTES", size)
    store = BlobStore(tmp_path)
    with store.writer() as writer:
        writer.write(lines(line("a"), "x" * 9_000, line("b"), "y" * 9_000))
        writer.commit("in")
    inspection = Inspection(Kind.CHAT, catalogue(), ApiSettings(max_body_bytes=1_000))
    asyncio.run(inspect(store, "in", inspection))
    assert [(error.code, error.line) for error in inspection.errors] == [("body_too_large", 2), ("body_too_large", 4)]


def test_validation_gives_way_to_others(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.writer() as writer:
        for n in range(5_000):
            writer.write(lines(line(f"r{n}")))
        writer.commit("in")
    turns = 0

    async def run() -> None:
        nonlocal turns
        inspection = Inspection(Kind.CHAT, catalogue(), ApiSettings())
        check = asyncio.create_task(inspect(store, "in", inspection))
        while not check.done():
            turns += 1
            await asyncio.sleep(0)
        await check
        assert len(inspection.offsets) == 5_000

    asyncio.run(run())
    assert turns > 5_000 // 500  # another task had a turn at least after every 500 lines
