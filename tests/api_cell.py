"""A cell for the API's tests: real books, a real file store and the null engine, in one process, without vehicles.

``serve`` runs the API on a free port in a thread with its own event loop, so that the official client can call it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import openai
import uvicorn
import uvloop

from motorpool.agent.runtime.engine import Cancelled, EngineEvent, Finished, Progressed, Work
from motorpool.agent.runtime.null import InlineNullEngine
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.catalogue import Catalogue, Model
from motorpool.core import events as ev
from motorpool.core.pricing import Price
from motorpool.errors import CapacityError, ConflictError, VehicleError
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens, ValidBatch
from motorpool.server.openai.app import Api, build_app
from motorpool.server.openai.heads import BoundedProtocol
from motorpool.server.openai.keys import create_key
from motorpool.server.openai.lines import RESPONSES, body_for, custom_id_of, endpoint_of, parse_line
from motorpool.server.openai.responses.lines import response_id_of, told_as_response
from motorpool.server.openai.settings import ApiSettings
from motorpool.store import books, customer
from motorpool.store.blobs import BlobStore, Opener, open_private
from motorpool.store.customer import BatchRow, FileRow
from motorpool.store.database import Database
from motorpool.wire import Delta, State

T = TypeVar("T")
Item = LiveTokens | LiveAnswer
MODELS = ("null", "acme/tiny-7")
MODEL = MODELS[0]


def catalogue() -> Catalogue:
    """Two models, one with a slash in its id."""
    return Catalogue([Model(id=name) for name in MODELS])


class LocalCell:
    """The Cell protocol over one null engine. ``hold`` keeps batches in progress; ``script`` replaces the engine."""

    def __init__(self, root: Path, *, rate_tokens_per_s: float = 0.0, opener: Opener = open_private) -> None:
        self.database = Database(root / "cell.db")
        self.blobs = BlobStore(root / "files", opener)
        self.catalogue: Catalogue = catalogue()
        self.engine = InlineNullEngine(
            EngineSpec(backend=Backend.NULL, model=MODEL, slots=64, rate_tokens_per_s=rate_tokens_per_s)
        )
        self.ahead_ms = 0
        self.capacity = True
        self.script: Callable[[LiveRequest], AsyncIterator[Item]] | None = None
        self.hold: asyncio.Event | None = None
        self.closed: list[str] = []
        self.asked: list[LiveRequest] = []
        self.write_error: Exception | None = None
        self.states: dict[str, State] = {}
        self.spoken: list[tuple[str, str]] = []
        self._queues: dict[str, asyncio.Queue[EngineEvent]] = {}
        self._runs: dict[int, asyncio.Task[None]] = {}

    @property
    def reader(self) -> sqlite3.Connection:
        return self.database.reader

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms

    async def start(self) -> None:
        await self.engine.start(self._on_events)

    async def close(self) -> None:
        for task in self._runs.values():
            task.cancel()
        await asyncio.gather(*self._runs.values(), return_exceptions=True)
        await self.engine.close()
        self.database.close()

    async def write(self, change: Callable[[sqlite3.Connection], T], *, bill: ev.LiveEnded | None = None) -> T:
        assert bill is None, "nobody is paid where there are no vehicles"
        if self.write_error is not None:
            raise self.write_error
        writer = self.database.writer
        writer.execute("BEGIN IMMEDIATE")
        try:
            result = change(writer)
        except BaseException:
            writer.execute("ROLLBACK")
            raise
        writer.execute("COMMIT")
        return result

    # -- live requests

    def _on_events(self, events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, (Progressed, Finished, Cancelled)):
                queue = self._queues.get(event.key)
                if queue is not None:
                    queue.put_nowait(event)

    async def answer(self, request: LiveRequest) -> LiveAnswer:
        items = self.live(request)
        answer: LiveAnswer | None = None
        try:
            async for item in items:
                answer = item if isinstance(item, LiveAnswer) else answer
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()
        if answer is not None:
            return answer
        raise VehicleError("the answer was lost on its way: try again", code="no_answer")

    def live(self, request: LiveRequest) -> AsyncIterator[Item]:
        self.asked.append(request)
        return self._live(request) if self.script is None else self.script(request)

    async def _live(self, request: LiveRequest) -> AsyncIterator[Item]:
        if not self.capacity:
            raise CapacityError("no parked vehicle can serve this model now", retry_after_ms=1500)
        queue: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._queues[request.request_id] = queue
        self.engine.submit(
            [
                Work(
                    key=request.request_id,
                    kind=request.kind,
                    body=request.body,
                    response_id=request.response_id,
                    created_s=request.created_s,
                    stream=request.stream,
                )
            ]
        )
        finished = False
        try:
            while True:
                event = await queue.get()
                if isinstance(event, Progressed) and request.stream:
                    yield LiveTokens(deltas=event.deltas, usage=None, engine="fp_null")
                elif isinstance(event, Finished):
                    finished = True
                    if request.stream and event.status == 200:
                        yield LiveTokens(deltas=[], usage=event.usage, engine="fp_null")
                    else:
                        yield LiveAnswer(status=event.status, body=event.body)
                    return
        finally:
            del self._queues[request.request_id]
            if not finished:
                self.engine.cancel([request.request_id])
                self.closed.append(request.request_id)

    # -- owners

    def vehicle_state(self, vehicle_id: str) -> State | None:
        return self.states.get(vehicle_id)

    async def owner_spoke(self, vehicle_id: str, what: str) -> None:
        self.spoken.append((vehicle_id, what))

    # -- batches

    async def start_batch(self, batch: ValidBatch) -> None:
        def change(connection: sqlite3.Connection) -> None:
            index = books.LineIndex(offsets=batch.offsets, lengths=batch.lengths, limits=batch.limits)
            books.write_index(connection, batch.batch_no, index)
            books.write_model(connection, batch.batch_no, batch.model, Price(input_micro=1, output_micro=1))
            books.set_status(connection, batch.batch_no, "in_progress", self.now_ms())

        await self.write(change)
        self._runs[batch.batch_no] = asyncio.create_task(self._run(batch))

    def serving(self, model: str, regions: tuple[str, ...] = (), min_trust: int = 0) -> int:
        del regions, min_trust
        return int(self.capacity and model == MODEL)

    async def cancel_batch(self, batch_no: int) -> None:
        def change(connection: sqlite3.Connection) -> None:
            row = customer.find_batch(connection, batch_no)
            if row is None or row.status != "in_progress":
                raise ConflictError("only a batch that is in progress can be cancelled", code="batch_not_cancellable")
            books.set_status(connection, batch_no, "cancelling", self.now_ms())

        await self.write(change)

    async def _run(self, batch: ValidBatch) -> None:
        row = self._row(batch.batch_no)
        file = customer.find_file(self.reader, row.input_file_id)
        assert file is not None
        done: dict[str, list[bytes]] = {"output": [], "error": []}
        counts = [0, 0, 0, 0]
        with self.blobs.map(file.blob) as data:
            for number, (offset, length) in enumerate(zip(batch.offsets.tolist(), batch.lengths.tolist(), strict=True)):
                if self.hold is not None:
                    await self.hold.wait()
                ended = self._row(batch.batch_no).status == "cancelling" or self.now_ms() >= row.expires_ms
                await self._line(batch, row, number, bytes(data[offset : offset + length]), done, counts, ended)
        await self.write(lambda connection: books.set_status(connection, batch.batch_no, "finalizing", self.now_ms()))
        if self._row(batch.batch_no).cancelling_ms is not None:
            status = "cancelled"
        else:
            status = "expired" if self.now_ms() >= row.expires_ms else "completed"
        await self.write(lambda connection: self._finish(connection, row, done, counts, status))

    async def _line(
        self,
        batch: ValidBatch,
        row: BatchRow,
        number: int,
        source: bytes,
        done: dict[str, list[bytes]],
        counts: list[int],
        ended: bool,
    ) -> None:
        custom_id = custom_id_of(source)
        if ended:
            error = {"code": "batch_expired", "message": "This request could not be executed in time."}
            done["error"].append(msgspec.json.encode({"custom_id": custom_id, "response": None, "error": error}))
            return
        request = LiveRequest(
            request_id=f"{batch.batch_no}-{custom_id}",
            response_id="chatcmpl-batch",
            account="",
            kind=batch.kind,
            model=batch.model,
            stream=False,
            choices=1,
            body=body_for(row.endpoint, source),
            created_s=self.now_ms() // 1000,
        )
        answer = await anext(self._live(request))
        assert isinstance(answer, LiveAnswer)
        counts[0 if answer.status == 200 else 1] += 1
        usage = msgspec.json.decode(answer.body).get("usage", {})
        counts[2] += usage.get("prompt_tokens", 0)
        counts[3] += usage.get("completion_tokens", 0)
        body = answer.body
        if endpoint_of(row.endpoint) == RESPONSES:
            body = told_as_response(parse_line(source)[1], answer, response_id_of(row.batch_id, number), "default")
        response = {"status_code": answer.status, "request_id": "req_b", "body": msgspec.Raw(body)}
        line = {"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": None}
        done["output" if answer.status == 200 else "error"].append(msgspec.json.encode(line))

    def _finish(
        self,
        connection: sqlite3.Connection,
        row: BatchRow,
        done: dict[str, list[bytes]],
        counts: list[int],
        status: str,
    ) -> None:
        for kind, lines in done.items():
            if not lines:
                continue
            file_id = f"file-{kind}-{row.batch_id}"
            with self.blobs.writer() as writer:
                for line in lines:
                    writer.write(line + b"\n")
                size = writer.commit(file_id)
            file = FileRow(
                file_id=file_id,
                account=row.account,
                purpose="batch_output",
                filename=f"{row.batch_id}_{kind}.jsonl",
                bytes=size,
                blob=file_id,
                created_ms=self.now_ms(),
            )
            customer.insert_file(connection, file)
            connection.execute(
                f"UPDATE batch SET {kind}_file_id = ? WHERE batch_no = ?",
                (file_id, row.batch_no),
            )
        connection.execute(
            "UPDATE batch SET completed = ?, failed = ?, prompt_tokens = ?, completion_tokens = ? WHERE batch_no = ?",
            (*counts, row.batch_no),
        )
        books.set_status(connection, row.batch_no, status, self.now_ms())

    def _row(self, batch_no: int) -> BatchRow:
        row = customer.find_batch(self.reader, batch_no)
        assert row is not None
        return row


class Running:
    """The API on a port. ``cell`` and ``api`` belong to the server's loop: reach them through ``call``."""

    def __init__(self, cell: LocalCell, settings: ApiSettings) -> None:
        self.cell = cell
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.key = self.new_key("acme")
        # No certificates are needed on one machine, and reading them takes longer than most tests.
        self.http = httpx.Client(base_url=self.url, verify=False, trust_env=False, timeout=20)
        self.api: Api
        self._settings = settings
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._server: uvicorn.Server
        self._thread = threading.Thread(target=self._run, name="api")

    def new_key(self, account: str) -> str:
        return create_key(self.cell.database.writer, account, "test", self.cell.now_ms())[0]

    def client(self, **options: Any) -> openai.OpenAI:
        options.setdefault("api_key", self.key)
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"max_retries": 0, "timeout": 20.0, **options})

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.listener.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.cell.start()
        self.api = build_app(self.cell, self._settings)
        self.api.resume()
        self._server = make_server(self.api)
        serving = asyncio.create_task(self._server.serve(sockets=[self.listener]))
        self._ready.set()
        await serving
        await self.api.close()
        await self.cell.close()


def make_server(app: Api) -> uvicorn.Server:
    """The server as the product configures it."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
    )


@contextlib.contextmanager
def serve(root: Path, *, settings: ApiSettings | None = None, **options: Any) -> Iterator[Running]:
    """The API over a LocalCell in ``root``; ``options`` go to the cell."""
    with Running(LocalCell(root, **options), settings or ApiSettings()) as running:
        yield running


def until(condition: Callable[[], T | None], what: str, limit_s: float = 15.0) -> T:
    """Wait for another process or thread until ``condition`` gives a value; fail after ``limit_s``."""
    pause = threading.Event()
    end_s = time.monotonic() + limit_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end_s, f"{what} did not happen within {limit_s} s"
        pause.wait(0.005)


def token(text: str, index: int = 0, finish_reason: str | None = None) -> Delta:
    """One delta of a script."""
    return Delta(index=index, text=text, finish_reason=finish_reason)
