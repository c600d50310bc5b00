"""`motorpool batch` against a small server that speaks the batch API."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from motorpool.cli import batch as command
from motorpool.cli import batchrun, documents, main
from motorpool.errors import CallerError, SetupError
from motorpool.server.openai import batches


class BatchServer:
    """Answers every line at once; `spoil` may change the output lines, `polls` is how often a batch is in progress."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.polls = 1
        self.final = "completed"
        self.spoil: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda lines: lines
        self.on_poll: Callable[[], None] = lambda: None
        self.create_fails = False
        self.knows_terms = True
        self.url = ""
        self.app = Starlette(
            routes=[
                Route("/v1/files", self.upload, methods=["POST"]),
                Route("/v1/files/{file_id}/content", self.content),
                Route("/v1/batches", self.create, methods=["POST"]),
                Route("/v1/batches", self.list),
                Route("/v1/batches/{batch_id}", self.retrieve),
                Route("/v1/batches/{batch_id}/cancel", self.cancel, methods=["POST"]),
            ]
        )

    async def upload(self, request: Request) -> Response:
        if request.headers["authorization"] != "Bearer sk-test":
            return failure(401, "wrong key")
        async with request.form() as form:
            upload = form["file"]
            assert not isinstance(upload, str)
            data = await upload.read()
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = data
        shape = {"id": file_id, "object": "file", "bytes": len(data), "created_at": 1, "filename": "x.jsonl"}
        return JSONResponse(shape | {"purpose": "batch", "status": "processed"})

    async def content(self, request: Request) -> Response:
        return Response(self.files[request.path_params["file_id"]])

    async def create(self, request: Request) -> Response:
        body = await request.json()
        batch_id = f"batch_{len(self.batches)}"
        total = len(self.files[body["input_file_id"]].splitlines())
        self.batches[batch_id] = {
            "id": batch_id,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"],
            "status": "in_progress",
            "created_at": 1,
            "metadata": body.get("metadata"),
            "request_counts": {"total": total, "completed": 0, "failed": 0},
            "left": self.polls,
        }
        if self.knows_terms:
            nothing = {"regions": None, "min_trust": 0, "priority": "standard", "quote": None, "vehicles": 1}
            self.batches[batch_id]["motorpool"] = nothing | body.get("motorpool", {})
        self.asked = body
        if self.create_fails:
            return failure(400, "the answer is lost")
        return JSONResponse(self.batches[batch_id])

    async def list(self, request: Request) -> Response:
        found = list(reversed(self.batches.values()))
        return JSONResponse({"object": "list", "data": found, "has_more": False, "first_id": None, "last_id": None})

    async def retrieve(self, request: Request) -> Response:
        batch = self.batches.get(request.path_params["batch_id"])
        if batch is None:
            return failure(404, "no such batch")
        self.on_poll()
        batch["left"] -= 1
        if batch["left"] < 0 and batch["status"] == "in_progress":
            self.finish(batch)
        return JSONResponse(batch)

    async def cancel(self, request: Request) -> Response:
        batch = self.batches[request.path_params["batch_id"]]
        batch["status"] = "cancelling"
        return JSONResponse(batch)

    def finish(self, batch: dict[str, Any]) -> None:
        requests = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        answers = self.spoil([answer(request) for request in requests])
        good = [line for line in answers if line["response"] and line["response"]["status_code"] == 200]
        bad = [line for line in answers if line not in good]
        for name, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                batch[name] = f"file-{name}-{batch['id']}"
                self.files[batch[name]] = "".join(json.dumps(line) + "\n" for line in lines).encode()
        batch["status"] = self.final
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}


def failure(status: int, message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "x"}
    return JSONResponse({"error": error}, status)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    text = request["body"]["messages"][1]["content"]
    choice = {"index": 0, "message": {"role": "assistant", "content": text.upper()}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
    response = {"status_code": 200, "request_id": "r", "body": body}
    return {"id": "batch_req_1", "custom_id": request["custom_id"], "response": response, "error": None}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    batch_server = BatchServer()
    config = uvicorn.Config(batch_server.app, port=0, log_level="error", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    ready = threading.Event()
    startup = running.startup

    async def say_ready(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        ready.set()

    monkeypatch.setattr(running, "startup", say_ready)
    monkeypatch.setattr(running, "capture_signals", contextlib.nullcontext)
    monkeypatch.setattr("motorpool.cli.batchrun.time.sleep", lambda _seconds: None)
    thread.start()
    assert ready.wait(10)
    batch_server.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/v1"
    yield batch_server
    running.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "docs"
    (place / "deep").mkdir(parents=True)
    (place / "a.txt").write_text("first")
    (place / "deep" / "b.md").write_text("second")
    (place / "ignored.bin").write_bytes(b"\xff")
    return place


def run_batch(server: BatchServer, folder: Path, out: Path, *extra: str, key: str = "sk-test") -> int:
    options = ["--model", "m", "--prompt", "p", "-o", str(out), "--base-url", server.url, "--api-key", key, *extra]
    return main.run(["batch", "run", str(folder), *options])


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_document_comes_back_with_its_name(server: BatchServer, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run_batch(server, folder, out) == 0
    assert [(row["document"], row["answer"]) for row in rows(out)] == [("a.txt", "FIRST"), ("deep/b.md", "SECOND")]
    request = json.loads(server.files["file-0"].splitlines()[0])
    assert request["body"]["messages"][0] == {"role": "system", "content": "p"}


def test_the_same_command_again_hands_nothing_in_twice(server: BatchServer, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run_batch(server, folder, out) == 0
    out.unlink()
    assert run_batch(server, folder, out) == 0
    assert len(server.batches) == 1
    assert len(rows(out)) == 2


def test_ctrl_c_leaves_the_batch_running_and_says_how_to_come_back(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    server.polls = 3
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    server.on_poll = lambda: signal.pthread_kill(main_thread, signal.SIGINT)
    assert run_batch(server, folder, out) == 130
    said = capsys.readouterr().err
    assert "Run the same command again" in said
    assert "motorpool batch cancel batch_0" in said
    server.on_poll = lambda: None
    assert run_batch(server, folder, out) == 0
    assert len(server.batches) == 1


def test_a_crash_between_creating_and_noting_the_batch_costs_nothing(
    server: BatchServer, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    server.create_fails = True
    assert run_batch(server, folder, out) == 1
    assert json.loads(batchrun.state_path(out).read_bytes())["batch_id"] is None
    server.create_fails = False
    assert run_batch(server, folder, out) == 0
    assert len(server.batches) == 1


def test_other_documents_are_not_mixed_with_an_earlier_run(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run_batch(server, folder, out) == 0
    (folder / "c.txt").write_text("third")
    assert run_batch(server, folder, out) == 1
    assert "belongs to a run with other documents" in capsys.readouterr().err
    assert len(server.batches) == 1


def test_a_batch_that_the_server_forgot_is_said(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run_batch(server, folder, out) == 0
    server.batches.clear()
    assert run_batch(server, folder, out) == 1
    assert "does not know batch batch_0" in capsys.readouterr().err


def spoiled_error(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    body = {"error": {"message": "too long", "code": "context_length_exceeded"}}
    return [lines[0], lines[1] | {"response": {"status_code": 400, "body": body}}]


@pytest.mark.parametrize(
    ("spoil", "final", "code"),
    [
        (spoiled_error, "completed", 3),
        (lambda lines: lines[:1], "completed", 4),
        (lambda lines: [*lines, lines[0]], "completed", 5),
        (lambda lines: [*lines, lines[0] | {"custom_id": "nobody's"}], "completed", 5),
        (lambda lines: lines[:1], "expired", 6),
    ],
    ids=["failed", "missing", "doubled", "unknown", "expired"],
)
def test_exit_codes_tell_what_is_wrong(
    server: BatchServer, folder: Path, tmp_path: Path, spoil: Any, final: str, code: int
) -> None:
    server.spoil, server.final = spoil, final
    assert run_batch(server, folder, tmp_path / "out.jsonl") == code


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_only_a_line_feed_ends_a_line_in_documents_and_in_results(
    server: BatchServer, tmp_path: Path, separator: str
) -> None:
    text = f"one{separator}two"
    table = tmp_path / f"a{separator}b.jsonl"
    rows_in = [{"id": "x", "text": text}, {"id": f"y{separator}z", "text": "second"}]
    escape = separator < " "  # which JSON does not allow as they are
    table.write_text("\n".join(json.dumps(row, ensure_ascii=escape) for row in rows_in) + "\r\n")
    out = tmp_path / "out.jsonl"
    raw = server.finish

    def finish(batch: dict[str, Any]) -> None:
        raw(batch)
        name = batch["output_file_id"]
        lines = [json.loads(line) for line in server.files[name].split(b"\n") if line]
        server.files[name] = "".join(json.dumps(line, ensure_ascii=escape) + "\n" for line in lines).encode()

    server.finish = finish  # type: ignore[method-assign]
    assert run_batch(server, table, out) == 0
    answers = [json.loads(line)["answer"] for line in out.read_bytes().split(b"\n") if line]
    assert answers == [text.upper(), "SECOND"]


def test_tables_as_spreadsheets_write_them(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes('\ufeffid,text\r\n7,"one\r\ntwo"\r\n'.encode() + b"8," + b"x" * 200_000 + b"\r\n")
    found = documents.read_documents([table])
    assert [(document.name, document.text[:8]) for document in found] == [
        ("t.csv:7", "one\ntwo"),
        ("t.csv:8", "xxxxxxxx"),
    ]
    table.write_text("text\n" + "x" * 5_000_000)
    with pytest.raises(SetupError, match="is not CSV that can be read"):
        documents.read_documents([table])


def test_a_document_that_is_too_large_is_named() -> None:
    huge = documents.Document(name="huge.txt", text="x" * 5_000_000)
    task = documents.Task(model="m", prompt="p", max_tokens=5)
    with pytest.raises(CallerError, match=r"the document huge\.txt makes a request of"):
        documents.batch_lines([huge], task)


def test_a_run_that_was_refused_does_not_stand_in_the_way_of_the_right_one(
    server: BatchServer, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert run_batch(server, folder, out, key="sk-wrong") == 1
    (folder / "c.txt").write_text("third")
    server.final = "failed"
    server.spoil = lambda _lines: []
    assert run_batch(server, folder, out) == 6
    (folder / "c.txt").write_text("other")
    server.final, server.spoil = "completed", lambda lines: lines
    assert run_batch(server, folder, out) == 0
    assert len(server.batches) == 2
    assert [row["answer"] for row in rows(out)][-2:] == ["OTHER", "SECOND"]


def test_a_server_that_does_not_answer_is_said_and_waited_for_only_so_long(
    server: BatchServer, folder: Path, tmp_path: Path
) -> None:
    server.polls = 10**9
    assert folder.is_dir()
    with openai.OpenAI(base_url=server.url, api_key="sk-test", max_retries=0) as client:
        batch, _ = batchrun.hand_in(client, b'{"custom_id":"a"}\n', tmp_path / "o", window="24h", documents=1)
    heard: list[str] = []
    now_s = iter(range(0, 10_000, 7))
    with (
        openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="k", max_retries=0) as nobody,
        pytest.raises(openai.APIConnectionError),
    ):
        batchrun.follow(
            nobody, batch, lambda _: None, on_outage=lambda: heard.append("out"), clock_s=lambda: float(next(now_s))
        )
    assert heard == ["out"]
    assert next(now_s) < batchrun.OUTAGE_S + 20


def test_a_batch_that_no_vehicle_may_run_says_so(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody() -> None:
        server.batches["batch_0"]["motorpool"]["vehicles"] = 0
        server.batches["batch_0"]["model"] = "m"

    server.polls, server.on_poll = 2, nobody
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("motorpool.cli.batch.PLAIN_EVERY_S", 0.0)
        assert run_batch(server, folder, tmp_path / "out.jsonl", "--region", "DE") == 0
    assert "waiting: no vehicle may run m now (only in DE)" in capsys.readouterr().err


def test_counts_for_programs(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_batch(server, folder, tmp_path / "out.jsonl", "--json") == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts["handed_in"] == counts["completed"] == 2
    assert counts["completion_tokens"] == 4


TERMS = ("--region", "DE", "--region", "FR", "--region", "DE", "--min-trust", "2", "--flex")


def test_where_and_how_it_may_run_goes_with_the_batch_and_is_told(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_batch(server, folder, tmp_path / "out.jsonl", *TERMS, "--json") == 0
    assert server.asked["motorpool"] == {"regions": ["DE", "FR"], "min_trust": 2, "priority": "flex"}
    told = capsys.readouterr()
    assert "only in DE, FR, on vehicles of trust 2 or more, when there is room (flex)" in told.err
    terms = json.loads(told.out)["terms"]
    assert terms == {"regions": ["DE", "FR"], "min_trust": 2, "priority": "flex", "quote": None}


def test_without_terms_nothing_is_sent_that_openai_does_not_know(
    server: BatchServer, folder: Path, tmp_path: Path
) -> None:
    server.knows_terms = False
    assert run_batch(server, folder, tmp_path / "out.jsonl") == 0
    assert "motorpool" not in server.asked


@pytest.mark.parametrize("polls", [1, 10**9])
def test_a_server_that_does_not_take_the_terms_gets_no_document_to_run(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], polls: int
) -> None:
    server.knows_terms, server.polls = False, polls
    out = tmp_path / "out.jsonl"
    assert run_batch(server, folder, out, "--region", "DE") == 1
    assert "does not know --region, --min-trust and --flex: batch batch_0 was cancelled" in capsys.readouterr().err
    assert server.batches["batch_0"]["status"] == "cancelling"
    assert not batchrun.state_path(out).exists()


def test_terms_that_only_half_of_were_taken_are_not_taken(server: BatchServer, folder: Path, tmp_path: Path) -> None:
    (folder / "a.txt").write_text("x")
    raw = server.create

    async def create(request: Request) -> Response:
        answered = await raw(request)
        server.batches["batch_0"]["motorpool"]["regions"] = ["DE"]
        return JSONResponse(server.batches["batch_0"]) if answered.status_code == 200 else answered

    server.app.router.routes[2] = Route("/v1/batches", create, methods=["POST"])
    assert run_batch(server, folder, tmp_path / "out.jsonl", "--region", "FR") == 1
    assert server.batches["batch_0"]["status"] == "cancelling"


@pytest.mark.parametrize("other", [(), ("--region", "FR"), ("--region", "DE", "--flex"), ("--min-trust", "1")])
def test_another_residency_is_no_way_back_to_a_batch(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: tuple[str, ...]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run_batch(server, folder, out, "--region", "DE") == 0
    assert run_batch(server, folder, out, *other) == 1
    assert "belongs to a run with another --region, --min-trust or --flex" in capsys.readouterr().err
    assert run_batch(server, folder, out, "--region", "DE") == 0
    assert len(server.batches) == 1


def test_a_state_that_an_earlier_version_wrote_asks_for_nothing(
    server: BatchServer, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert run_batch(server, folder, out) == 0
    path = batchrun.state_path(out)
    fields = json.loads(path.read_bytes())
    del fields["terms"]
    path.write_text(json.dumps(fields))
    assert run_batch(server, folder, out) == 0
    assert run_batch(server, folder, out, "--region", "DE") == 1
    assert len(server.batches) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--region", "DE,FR"), "'DE,FR' is no region"),
        (("--region", ""), "'' is no region"),
        (("--region", "x" * 33), "is no region: 1 to 32"),
        (("--region", "Zürich"), "is no region"),
        (tuple(part for number in range(33) for part in ("--region", f"R{number}")), "at most 32 regions"),
        (("--min-trust", "4"), "4 is not in the range 0<=x<=3"),
    ],
)
def test_terms_that_cannot_be_are_usage_errors(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    assert run_batch(server, folder, tmp_path / "out.jsonl", *options) == 2
    assert message in capsys.readouterr().err
    assert not server.batches


def test_the_command_and_the_api_take_the_same_terms() -> None:
    assert (command.MAX_REGIONS, command.MAX_REGION_CHARS, command.MAX_TRUST) == (
        batches.MAX_REGIONS,
        batches.MAX_REGION_CHARS,
        batches.MAX_TRUST,
    )
    for region in ("DE", "de-by", "x" * 32, "x" * 33, "", "-", "a b", "a,b", "ü", "a\n", "0.1_2"):
        asked = msgspec.json.encode({"regions": [region]})
        try:
            msgspec.json.decode(asked, type=batches.BatchWishes)
        except msgspec.ValidationError:
            taken = False
        else:
            taken = True
        assert taken == (bool(command._REGION.fullmatch(region)) and len(region) <= command.MAX_REGION_CHARS), region
    wishes = batches.BatchWishes.__struct_fields__
    assert batchrun.Terms.__struct_fields__ == wishes


def test_answers_with_a_schema_are_parsed(server: BatchServer, folder: Path, tmp_path: Path) -> None:
    (folder / "a.txt").write_text('{"a": 1}')
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    out = tmp_path / "out.jsonl"
    assert run_batch(server, folder, out, "--schema", str(schema)) == 0
    assert [row["parsed"] for row in rows(out)] == [{"A": 1}, None]
    sent = json.loads(server.files["file-0"].splitlines()[0])["body"]["response_format"]
    assert sent["json_schema"]["schema"] == {"type": "object"}


def test_a_wrong_key_is_one_readable_line(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_batch(server, folder, tmp_path / "out.jsonl", key="sk-wrong") == 1
    assert capsys.readouterr().err.strip() == (
        "motorpool: error: the API does not accept this key (from --api-key, else OPENAI_API_KEY): make one with "
        "`motorpool keys create --data FOLDER`, FOLDER being that of this cell"
    )


def test_list_show_and_cancel(
    server: BatchServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_batch(server, folder, tmp_path / "out.jsonl") == 0
    capsys.readouterr()
    where = ["--base-url", server.url, "--api-key", "sk-test"]
    assert main.run(["batch", "list", "--json", *where]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == ["batch_0"]
    assert main.run(["batch", "show", "batch_0", *where]) == 0
    assert "completed" in capsys.readouterr().out
    assert main.run(["batch", "cancel", "batch_0", *where]) == 0
    assert "cancelling" in capsys.readouterr().err


def test_tables_give_a_document_a_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,text\n7,seven\n8,eight\n")
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n\n{"id": "x", "text": "two"}\n')
    found = documents.read_documents([tmp_path / "t.csv", tmp_path / "t.jsonl"])
    assert [(item.name, item.text) for item in found] == [
        ("t.csv:7", "seven"),
        ("t.csv:8", "eight"),
        ("t.jsonl:1", "one"),
        ("t.jsonl:x", "two"),
    ]


def test_equal_names_stay_apart(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    found = documents.read_documents([tmp_path / "x", tmp_path / "y"])
    assert [item.name for item in found] == ["a.txt", "a.txt#2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"txt": "x"}', "has no text"),
        ("a.csv", b"id,body\n1,x\n", "has no text"),
    ],
)
def test_documents_that_cannot_be_used_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SetupError, match=message) as caught:
        documents.read_documents([tmp_path / name])
    assert name in caught.value.message


def test_the_estimate_follows_what_finished_lately() -> None:
    estimate = batchrun.Estimate()
    assert estimate.left_s(0.0, 0, 100) is None
    assert estimate.left_s(10.0, 10, 100) is None
    assert estimate.left_s(20.0, 20, 100) == 80.0
    assert estimate.left_s(30.0, 100, 100) == 0.0
