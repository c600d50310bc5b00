"""The event streams of responses: their order, going on after any event, clients that leave, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from tests import cell_world
from tests.api_cell import MODEL, Item, LocalCell, Running, serve, token, until
from tests.response_trial import check, ended, parsed

from motorpool.errors import StorageFullError
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens
from motorpool.server.openai.responses import log as log_module
from motorpool.server.openai.responses import runs
from motorpool.server.openai.settings import ApiSettings
from motorpool.store import responses as store
from motorpool.types import Usage
from motorpool.wire import Delta

ASKED = "Hello there, vehicle"
TOOL: Any = {"type": "function", "name": "f", "parameters": {}, "strict": True}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
WORDS = ("one", " two", " thr", "ee 漢", " four", " five")
OPENING = ["created", "queued", "in_progress"]
TEXT_BEGINS = ["output_item.added", "content_part.added"]
TEXT_ENDS = ["output_text.done", "content_part.done", "output_item.done"]
CALLED = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]

Script = Callable[[LiveRequest], AsyncIterator[Item]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    yield shared
    shared.cell.script = None
    shared.cell.write_error = None
    shared.cell.ahead_ms = 0


@pytest.fixture(scope="module")
def official(shared: Running) -> Iterator[openai.OpenAI]:
    with shared.client() as made:
        yield made


@pytest.fixture
def client(server: Running, official: openai.OpenAI) -> openai.OpenAI:
    return official


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for a moment in the background waits for a shorter one."""
    monkeypatch.setattr(runs, "FLUSH_S", 0.001)
    monkeypatch.setattr(runs, "RETRY_S", 0.001)


def saying(*words: str, finish_reason: str = "stop", gate: Gate | None = None, after: int = 0) -> Script:
    """A script that streams words, one delta each; it waits at ``gate`` after so many of them."""

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        for place, word in enumerate(words):
            if gate is not None and place == after:
                await gate.wait()
            yield LiveTokens(deltas=[token(word)], usage=None, engine="fp")
        yield LiveTokens(deltas=[token("", finish_reason=finish_reason)], usage=None, engine="fp")
        yield LiveTokens(deltas=[], usage=Usage(prompt_tokens=3, completion_tokens=len(words)), engine="fp")

    return script


class Gate:
    """Something in the server's loop that a test opens from outside."""

    def __init__(self, server: Running) -> None:
        self._server = server
        self._open = asyncio.Event()
        self.waiting = threading.Event()

    async def wait(self) -> None:
        self.waiting.set()
        await self._open.wait()

    def open(self) -> None:
        async def now() -> None:
            self._open.set()

        self._server.call(now())


def answering(**message: Any) -> Script:
    """A script that gives a whole answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": None, "refusal": None} | message}
    body = {"choices": [choice | {"logprobs": None, "finish_reason": "tool_calls"}], "usage": {"completion_tokens": 4}}

    async def script(request: LiveRequest) -> AsyncIterator[Item]:
        yield LiveAnswer(status=200, body=msgspec.json.encode(body))

    return script


def read(server: Running, response_id: str, after: int | None = None) -> str:
    """The rest of a stream, byte for byte."""
    query: dict[str, Any] = {"stream": "true"} | ({} if after is None else {"starting_after": after})
    head = {"authorization": f"Bearer {server.key}"}
    response = server.http.get(f"/v1/responses/{response_id}", params=query, headers=head)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return response.text


def post(server: Running, **fields: Any) -> httpx.Response:
    head = {"authorization": f"Bearer {server.key}", "content-type": "application/json"}
    body = {"model": MODEL, "input": ASKED, "stream": True} | fields
    return server.http.post("/v1/responses", content=json.dumps(body), headers=head)


def stream(server: Running, **fields: Any) -> list[dict[str, Any]]:
    response = post(server, **fields)
    assert response.status_code == 200, response.text
    return parsed(response.text)


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


# -- the order of events


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_text(server: Running, background: bool, reason: str) -> None:
    server.cell.script = saying(*WORDS, finish_reason=reason)
    events = stream(server, background=background)
    status = "completed" if reason == "stop" else "incomplete"
    opening = OPENING if background else ["created", "in_progress"]
    assert names(events) == [*opening, *TEXT_BEGINS, *["output_text.delta"] * 6, *TEXT_ENDS, status]
    last = check(events)
    assert last["status"] == last["output"][0]["status"] == status
    assert last["output"][0]["content"][0]["text"] == "".join(WORDS)
    assert last["usage"]["output_tokens"] == 6
    assert [event["response"]["status"] for event in events if "response" in event][:-1] == (
        ["queued", "queued", "in_progress"] if background else ["in_progress"] * 2
    )
    assert all(event["response"]["usage"] is None for event in events[:2])


def test_an_empty_text(server: Running) -> None:
    server.cell.script = saying()
    events = stream(server)
    assert names(events) == ["created", "in_progress", *TEXT_BEGINS, *TEXT_ENDS, "completed"]
    assert check(events)["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize("background", [False, True])
def test_function_calls(server: Running, background: bool) -> None:
    calls = [CALL, CALL | {"id": "call_2"}]
    for content in (None, "Let me see."):
        server.cell.script = answering(content=content, tool_calls=calls)
        events = stream(server, tools=[TOOL], background=background)
        opening = OPENING if background else ["created", "in_progress"]
        text = [*TEXT_BEGINS, "output_text.delta", *TEXT_ENDS] if content else []
        assert names(events) == [*opening, *text, *CALLED, *CALLED, "completed"]
        last = check(events)
        assert [item["type"] for item in last["output"]] == ["message"] * bool(content) + ["function_call"] * 2
        assert [item["call_id"] for item in last["output"][-2:]] == ["call_1", "call_2"]


def test_a_refusal(server: Running) -> None:
    refusal = ["content_part.added", "refusal.delta", "refusal.done", "content_part.done"]
    for content, text in ((None, []), ("Well,", ["content_part.added", "output_text.delta"])):
        server.cell.script = answering(content=content, refusal="no")
        events = stream(server)
        ends = ["output_text.done", "content_part.done"] if content else []
        assert names(events)[2:] == ["output_item.added", *text, *ends, *refusal, "output_item.done", "completed"]
        check(events)


def test_logprobs_come_with_their_text(server: Running) -> None:
    events = stream(server, top_logprobs=2, max_output_tokens=4)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    entries = [entry for event in deltas for entry in event["logprobs"]]
    assert "".join(entry["token"] for entry in entries) == "".join(event["delta"] for event in deltas)
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert done["logprobs"] == entries == check(events)["output"][0]["content"][0]["logprobs"]
    assert len(entries) == 4
    assert set(entries[0]) == {"token", "logprob", "bytes", "top_logprobs"}


def test_logprobs_that_cannot_be_read_are_left_out(server: Running) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveTokens(deltas=[Delta(index=0, text="a", logprobs=b"[{")], usage=None, engine="fp")
        yield LiveTokens(deltas=[], usage=Usage(), engine="fp")

    server.cell.script = script
    assert check(stream(server))["output"][0]["content"][0] == {
        "type": "output_text", "annotations": [], "logprobs": [], "text": "a",
    }  # fmt: skip


def test_the_clients_own_stream_helper(client: openai.OpenAI, server: Running) -> None:
    server.cell.script = saying(*WORDS)
    with client.responses.stream(model=MODEL, input=ASKED) as events:
        seen = [event.snapshot for event in events if event.type == "response.output_text.delta"]
        assert events.get_final_response().output_text == "".join(WORDS) == seen[-1]
    server.cell.script = answering(content="x", tool_calls=[CALL])
    with client.responses.stream(model=MODEL, input=ASKED, tools=[TOOL]) as events:
        final = events.get_final_response()
    call = final.output[1]
    assert call.type == "function_call"
    assert call.parsed_arguments == {"a": 1}


def test_a_stream_and_the_object_that_is_kept_say_the_same(client: openai.OpenAI, server: Running) -> None:
    server.cell.script = saying(*WORDS)
    for background in (False, True):
        last = check(stream(server, background=background))
        head = {"authorization": f"Bearer {server.key}"}
        assert server.http.get(f"/v1/responses/{last['id']}", headers=head).json() == last


def test_each_text_is_told_at_once(server: Running, client: openai.OpenAI) -> None:
    for background in (False, True):
        gate = Gate(server)
        server.cell.script = saying("first", " second", gate=gate, after=1)
        text = ""
        with client.responses.create(model=MODEL, input=ASKED, stream=True, background=background) as events:
            for event in events:
                if event.type == "response.output_text.delta":
                    if not text:
                        gate.open()  # the first one came although the second one could not come yet
                    text += event.delta
        assert text == "first second"


def test_a_running_response_can_be_looked_at(server: Running, client: openai.OpenAI) -> None:
    for background in (False, True):
        gate = Gate(server)
        server.cell.script = saying("first", " second", gate=gate, after=1)
        with client.responses.create(model=MODEL, input=ASKED, stream=True, background=background) as events:
            found = ""
            for event in events:
                if event.type == "response.output_text.delta" and not found:
                    found = event.item_id.replace("msg_", "resp_")[:-4]
                    assert client.responses.retrieve(found).status == "in_progress"
                    assert len(client.responses.input_items.list(found).data) == 1
                    gate.open()


# -- going on after any event


def test_the_rest_of_a_stream_after_every_event_of_it(server: Running) -> None:
    for script, fields in (
        (saying(*WORDS), {}),
        (answering(content="x", tool_calls=[CALL]), {"tools": [TOOL]}),
        (answering(refusal="no"), {}),
    ):
        server.cell.script = script
        whole = post(server, background=True, **fields).text
        blocks = [block + "\n\n" for block in whole.split("\n\n")[:-1]]
        response_id = parsed(whole)[0]["response"]["id"]
        assert read(server, response_id) == whole
        for after in range(len(blocks) + 3):
            assert read(server, response_id, after) == "".join(blocks[after + 1 :]), after


def test_the_rest_of_a_stream_after_every_event_while_it_runs(server: Running, client: openai.OpenAI) -> None:
    gate = Gate(server)
    server.cell.script = saying(*WORDS, gate=gate, after=3)
    response = client.responses.create(model=MODEL, input=ASKED, background=True)
    assert gate.waiting.wait(10)
    rests: dict[int, str] = {}

    def listen(after: int) -> None:
        rests[after] = read(server, response.id, after)

    # Events 0 to 7 can be told by now, the others cannot: some clients wait for what comes next, some for later ones.
    threads = [threading.Thread(target=listen, args=(after,)) for after in range(16)]
    for thread in threads:
        thread.start()
    run = server.api.responses._registry.find("acme", response.id)
    assert run is not None
    until(lambda: run.log.readers == len(threads), "the clients")
    gate.open()
    for thread in threads:
        thread.join(20)
    whole = read(server, response.id)
    blocks = [block + "\n\n" for block in whole.split("\n\n")[:-1]]
    assert len(blocks) == 15
    for after in range(16):
        assert rests[after] == "".join(blocks[after + 1 :]), after


def test_a_client_that_loses_its_network_again_and_again_sees_each_event_once(
    server: Running, client: openai.OpenAI
) -> None:
    words = [f"w{n} " for n in range(40)]
    dice = random.Random(7)
    for _ in range(5):
        server.cell.script = saying(*words)
        seen: list[Any] = []
        events = client.responses.create(model=MODEL, input=ASKED, background=True, stream=True)
        response_id = ""
        while not seen or seen[-1].type != "response.completed":
            stay = dice.randrange(1, 9)
            for event in events:
                seen.append(event)
                stay -= 1
                if not stay:
                    break
            events.close()
            response_id = response_id or seen[0].response.id
            if seen[-1].type != "response.completed":
                events = client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number)
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
        assert text == "".join(words)


def test_the_clients_own_helper_goes_on_after_an_event(server: Running, client: openai.OpenAI) -> None:
    server.cell.script = saying(*WORDS)
    response = client.responses.create(model=MODEL, input=ASKED, background=True)
    with client.responses.stream(response_id=response.id, starting_after=6) as events:
        numbers = [event.sequence_number for event in events]
        assert numbers == list(range(7, 15))
        assert events.get_final_response().output_text == "".join(WORDS)


# -- clients that leave


def test_a_response_in_the_background_runs_on_when_its_client_leaves(server: Running, client: openai.OpenAI) -> None:
    gate = Gate(server)
    server.cell.script = saying(*WORDS, gate=gate, after=2)
    events = client.responses.create(model=MODEL, input=ASKED, background=True, stream=True)
    first = next(iter(events))
    assert first.type == "response.created"
    assert gate.waiting.wait(10)
    events.close()
    run = server.api.responses._registry.find("acme", first.response.id)
    assert run is not None
    until(lambda: run.log.readers == 0, "the server's notice of it")
    gate.open()
    assert ended(client, first.response.id).output_text == "".join(WORDS)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_response_in_the_foreground_ends_when_its_client_leaves(
    server: Running, client: openai.OpenAI, streamed: bool
) -> None:
    over: list[str] = []
    gate = Gate(server)

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        try:
            if streamed:
                yield LiveTokens(deltas=[token("half a ")], usage=None, engine="fp")
            await gate.wait()
        finally:
            over.append("over")

    server.cell.script = script
    if not streamed:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).responses.create(model=MODEL, input=ASKED)
        until(lambda: over, "the end of the work")
        return
    events = client.responses.create(model=MODEL, input=ASKED, stream=True)
    seen = iter(events)
    first: Any = next(seen)
    while next(seen).type != "response.output_text.delta":
        pass
    events.close()
    until(lambda: over, "the end of the work")
    found = ended(client, first.response.id)
    assert (found.status, found.output_text) == ("cancelled", "half a ")
    assert found.output[0].status == "incomplete"


def test_cancelling_stops_the_vehicle_and_ends_the_stream(server: Running, client: openai.OpenAI) -> None:
    over: list[str] = []
    gate = Gate(server)

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        try:
            yield LiveTokens(deltas=[token("half a ")], usage=None, engine="fp")
            await gate.wait()
        finally:
            over.append("over")

    server.cell.script = script
    seen: list[Any] = []
    with client.responses.create(model=MODEL, input=ASKED, background=True, stream=True) as events:
        for event in events:
            seen.append(event)
            if event.type == "response.output_text.delta":
                cancelled = client.responses.cancel(seen[0].response.id)
                assert (cancelled.status, cancelled.output_text) == ("cancelled", "half a ")
                assert over
    assert [event.type for event in seen[-2:]] == ["response.output_text.delta", "response.incomplete"]
    assert seen[-1].response.status == "cancelled"
    assert client.responses.retrieve(cancelled.id).to_dict() == cancelled.to_dict()
    assert [event["type"] for event in parsed(read(server, cancelled.id))] == [event.type for event in seen]


def test_deleting_a_running_response_stops_it(server: Running, client: openai.OpenAI) -> None:
    for background in (False, True):
        gate = Gate(server)
        server.cell.script = saying("a", "b", gate=gate, after=1)
        seen: list[Any] = []
        with client.responses.create(model=MODEL, input=ASKED, background=background, stream=True) as events:
            for event in events:
                seen.append(event)
                if event.type == "response.output_text.delta":
                    client.responses.delete(seen[0].response.id)
        assert seen[-1].response.status == "cancelled"
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(seen[0].response.id)
    assert store.open_count(server.cell.reader) == 0


# -- what goes wrong


def breaking(words: tuple[str, ...], status: int = 502, times: int = 99) -> Script:
    """A script that breaks off after some words, so many times; then it says all."""
    tries: list[int] = []

    async def script(request: LiveRequest) -> AsyncIterator[Item]:
        tries.append(1)
        if len(tries) > times:
            async for item in saying(*WORDS)(request):
                yield item
            return
        for word in words:
            yield LiveTokens(deltas=[token(word)], usage=None, engine="fp")
        body = {"error": {"message": "gone", "type": "server_error", "param": None, "code": "vehicle_error"}}
        yield LiveAnswer(status=status, body=msgspec.json.encode(body))

    return script


def test_a_failure_after_the_first_text_is_an_event(server: Running, client: openai.OpenAI) -> None:
    server.cell.script = breaking(("half ",))
    events = stream(server)
    assert names(events)[-2:] == ["output_text.delta", "failed"]
    last = check(events)
    assert (last["status"], last["error"]["code"]) == ("failed", "vehicle_error")
    assert (last["output"][0]["status"], last["output"][0]["content"][0]["text"]) == ("incomplete", "half ")
    assert client.responses.retrieve(last["id"]).status == "failed"


def test_a_stream_that_just_stops_is_a_failure(server: Running) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveTokens(deltas=[token("half ")], usage=None, engine="fp")

    server.cell.script = script
    assert check(stream(server))["error"]["code"] == "stream_interrupted"


def test_an_answer_over_the_bound_is_a_failure(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MAX_TOLD_BYTES", 12)
    server.cell.script = saying(*WORDS)
    last = check(stream(server))
    assert (last["status"], last["error"]["code"]) == ("failed", "answer_too_large")


def test_a_run_that_breaks_off_in_the_background_is_done_again_and_told_once(server: Running) -> None:
    for times in (1, 3):
        server.cell.script = breaking(("on", "e tw"), times=times)
        events = stream(server, background=True)
        last = check(events)
        assert last["output"][0]["content"][0]["text"] == "".join(WORDS)
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        assert deltas == ["on", "e tw", "o", " thr", "ee 漢", " four", " five"]
        assert names(events).count("output_item.added") == 1


def test_an_answer_that_comes_out_differently_is_told_as_another_item(server: Running, client: openai.OpenAI) -> None:
    for words in (("one", " TWO"), ("one", " two", " thr", "ee 漢", " four", " five", " six")):
        server.cell.script = breaking(words, times=1)
        events = stream(server, background=True)
        last = check(events)
        items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert [item["status"] for item in items] == ["incomplete", "completed"]
        assert items[0]["content"][0]["text"] == "".join(words)
        assert last["output"] == items[1:]
        assert last["output"][0]["content"][0]["text"] == "".join(WORDS)
        with client.responses.stream(response_id=last["id"]) as again:
            assert again.get_final_response().output_text == "".join(WORDS)


def test_silence_is_bridged_by_comments(tmp_path: Path) -> None:
    with serve(tmp_path, settings=ApiSettings(keep_alive_ms=20)) as running:
        gate = Gate(running)
        running.cell.script = saying("a", gate=gate)
        head = {"authorization": f"Bearer {running.key}", "content-type": "application/json"}
        body = json.dumps({"model": MODEL, "input": ASKED, "stream": True})
        with running.http.stream("POST", "/v1/responses", content=body, headers=head) as response:
            text = ""
            for part in response.iter_text():
                text += part
                if text.count(": keep-alive") == 2:
                    gate.open()
        assert text.index(": keep-alive") < text.index("event: response.created")
        assert check(parsed(text))["status"] == "completed"


def test_a_failure_after_a_comment_is_an_event(tmp_path: Path) -> None:
    with serve(tmp_path, settings=ApiSettings(keep_alive_ms=20)) as running:
        gate = Gate(running)

        async def script(request: LiveRequest) -> AsyncIterator[Item]:
            await gate.wait()
            async for item in breaking(())(request):
                yield item

        running.cell.script = script
        head = {"authorization": f"Bearer {running.key}", "content-type": "application/json"}
        body = json.dumps({"model": MODEL, "input": ASKED, "stream": True})
        with running.http.stream("POST", "/v1/responses", content=body, headers=head) as response:
            text = ""
            for part in response.iter_text():
                text += part
                if ": keep-alive" in text:
                    gate.open()
        events = parsed(text)
        assert names(events) == ["created", "in_progress", "failed"]


def test_events_are_told_when_they_are_in_the_books_and_not_before(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "REWRITE_S", 0.01)
    gate = Gate(server)
    server.cell.script = saying(*WORDS, gate=gate, after=0)
    response = client.responses.create(model=MODEL, input=ASKED, background=True)
    assert gate.waiting.wait(10)
    run = server.api.responses._registry.find("acme", response.id)
    assert run is not None
    until(lambda: run.log.published == 1, "the beginning")
    server.cell.write_error = StorageFullError("the disk is full")
    gate.open()
    assert run._work is not None
    until(run._work.done, "the end of the answer")
    assert client.responses.retrieve(response.id).status == "in_progress"
    assert run.log.published == 1
    server.cell.write_error = None
    assert ended(client, response.id).output_text == "".join(WORDS)
    check(parsed(read(server, response.id)))


def test_events_are_kept_for_a_day(server: Running, client: openai.OpenAI) -> None:
    server.cell.script = saying(*WORDS)
    response = client.responses.create(model=MODEL, input=ASKED, background=True)
    ended(client, response.id)
    server.cell.ahead_ms = store.PIECES_KEPT_MS + 1000
    server.call(server.cell.write(lambda db: store.drop_expired(db, server.cell.now_ms())))
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.retrieve(response.id, stream=True)
    assert caught.value.code == "events_expired"
    assert client.responses.retrieve(response.id).output_text == "".join(WORDS)


def test_there_is_a_bound_on_who_listens(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "MAX_READERS", 1)
    gate = Gate(server)
    server.cell.script = saying("a", gate=gate)
    with client.responses.create(model=MODEL, input=ASKED, background=True, stream=True) as events:
        first: Any = next(iter(events))
        with pytest.raises(openai.RateLimitError) as caught:
            client.responses.retrieve(first.response.id, stream=True)
        assert caught.value.code == "too_many_listeners"
        gate.open()
        assert [event.type for event in events][-1] == "response.completed"


# -- restarts


def interrupted(folder: Path) -> list[Any]:
    """A background response of which three words were told when the process ended; returns what a client saw."""
    with serve(folder) as running, running.client() as client:
        running.cell.script = saying(*WORDS, gate=Gate(running), after=3)
        seen: list[Any] = []
        with client.responses.create(model=MODEL, input=ASKED, background=True, stream=True) as events:
            for event in events:
                seen.append(event)
                if event.type == "response.output_text.delta" and event.delta == WORDS[2]:
                    break
        seen.append(running.cell.asked[-1])
    return seen


@contextlib.contextmanager
def started_again(folder: Path, script: Script) -> Iterator[Running]:
    cell = LocalCell(folder)
    cell.script = script  # before it goes on with what was left
    with Running(cell, ApiSettings()) as running:
        yield running


@pytest.mark.parametrize("again", [WORDS, ("o", "ne two th", "ree 漢 fo", "ur five"), ("".join(WORDS),)])
def test_a_restart_in_the_middle_is_not_seen_by_who_listens_again(tmp_path: Path, again: tuple[str, ...]) -> None:
    *seen, before = interrupted(tmp_path)
    response_id = seen[0].response.id
    with started_again(tmp_path, saying(*again)) as running, running.client() as client:
        rest = list(client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number))
        assert [event.sequence_number for event in [*seen, *rest]] == list(range(len(seen) + len(rest)))
        text = "".join(event.delta for event in [*seen, *rest] if event.type == "response.output_text.delta")
        final: Any = rest[-1]
        assert final.type == "response.completed"
        assert final.response.output_text == text == "".join(WORDS)
        assert client.responses.retrieve(response_id).to_dict() == final.response.to_dict()
        check(parsed(read(running, response_id)))
        assert len(running.cell.asked) == 1
        now = running.cell.asked[0]
        assert (now.body, now.response_id, now.account) == (before.body, before.response_id, before.account)
        assert now.request_id != before.request_id
        assert json.loads(now.body)["seed"] >= 0  # so that the engine says the same again


def test_after_a_restart_another_answer_is_another_item(tmp_path: Path) -> None:
    *seen, _ = interrupted(tmp_path)
    response_id = seen[0].response.id
    with started_again(tmp_path, saying("one", " or", " two")) as running, running.client() as client:
        rest = list(client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number))
        assert [event.sequence_number for event in [*seen, *rest]] == list(range(len(seen) + len(rest)))
        whole = parsed(read(running, response_id))
        last = check(whole)
        items = [event["item"] for event in whole if event["type"] == "response.output_item.done"]
        assert [(item["status"], item["content"][0]["text"]) for item in items] == [
            ("incomplete", "one two thr"),
            ("completed", "one or two"),
        ]
        assert last["output"] == items[1:]
        assert client.responses.retrieve(response_id).output_text == "one or two"


def test_a_second_restart_is_no_different(tmp_path: Path) -> None:
    *seen, _ = interrupted(tmp_path)
    response_id = seen[0].response.id
    cell = LocalCell(tmp_path)
    with Running(cell, ApiSettings()) as running, running.client() as client:
        # The real null engine says something else; then the process ends once more.
        ended(client, response_id)
        whole = read(running, response_id)
    with serve(tmp_path) as running:
        assert read(running, response_id) == whole
        assert running.cell.asked == []


# -- on real vehicles


def test_a_vehicle_that_leaves_is_not_noticed_and_the_usage_counts_once(tmp_path: Path) -> None:
    """Two agents with null engines, the cell and NATS: one agent stops in the middle of a background response."""

    async def work() -> None:
        async with cell_world.a_world(tmp_path) as world:
            first = await world.agent("car-1", rate=60.0)
            asked = {"model": MODEL, "input": "tell me", "background": True, "max_output_tokens": 60}
            created = (await world.client.post("/v1/responses", json=asked)).json()
            run = world.api.responses._registry.find("acme", created["id"])
            assert run is not None
            while not run.log.text:
                await run.log.changed()
            await world.agent("car-2", rate=600.0)
            await first.stop()
            result = await run.log.ended()
            assert result.status == "incomplete"
            response = await world.client.get(f"/v1/responses/{created['id']}", params={"stream": "true"})
            events = parsed(response.text)
            last = check(events)
            text = last["output"][0]["content"][0]["text"]
            assert names(events).count("output_item.added") == 1
            assert (len(text.split()), last["usage"]["output_tokens"]) == (60, 60)
            # What an unbroken run of the same request says.
            body = run.plan.body
            unbroken = world.request("x", 1, stream=True)
            unbroken = msgspec.structs.replace(unbroken, body=body)
            assert (await cell_world.answer(world.cell, unbroken))[0] == text
            query = "SELECT count(*) FROM transfer WHERE kind = 'usage'"
            await world.until(lambda: world.one(query) == 2)  # this response, and the unbroken run

    cell_world.run(work())
