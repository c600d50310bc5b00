"""Chat completions and completions over HTTP, with the official client and the null engine."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from tests.api_cell import MODEL, MODELS, Item, Running, serve, token, until

from motorpool.errors import VehicleError
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens
from motorpool.server.openai.settings import ApiSettings
from motorpool.types import Usage
from motorpool.wire import Delta

HELLO: list[Any] = [{"role": "user", "content": "Hello there, vehicle"}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    yield shared
    shared.cell.script = None
    shared.cell.capacity = True


@pytest.fixture(scope="module")
def official(shared: Running) -> Iterator[openai.OpenAI]:
    with shared.client() as made:
        yield made


@pytest.fixture
def client(server: Running, official: openai.OpenAI) -> openai.OpenAI:
    return official


def _post(server: Running, path: str, body: Any, **headers: str) -> httpx.Response:
    head = {"authorization": f"Bearer {server.key}", "content-type": "application/json"} | headers
    content = body if isinstance(body, bytes) else json.dumps(body)
    return server.http.post(path, content=content, headers=head)


def _events(response: httpx.Response) -> list[Any]:
    """The data of each event; comments are left out, [DONE] stays a string."""
    data = [part[6:] for part in response.text.split("\n\n") if part.startswith("data: ")]
    return [part if part == "[DONE]" else json.loads(part) for part in data]


def _stream(server: Running, path: str = "/v1/chat/completions", **fields: Any) -> list[Any]:
    body = {"model": MODEL, "messages": HELLO, "stream": True} | fields
    response = _post(server, path, body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return _events(response)


# -- plain


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=7)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.system_fingerprint
    assert answer._request_id is not None
    assert answer._request_id.startswith("req_")
    again = client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=7)
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert again.id != answer.id


def test_several_choices_stop_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, n=3, max_tokens=4, logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    text = answer.choices[0].message.content or ""
    stop = text.split()[2]
    stopped = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=50, stop=stop)
    assert stop not in (stopped.choices[0].message.content or "")


def test_a_json_schema_reaches_the_engine(client: openai.OpenAI) -> None:
    schema: dict[str, object] = {"type": "object", "properties": {"kind": {"enum": ["letter"]}}, "required": ["kind"]}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content or "") == {"kind": "letter"}


def test_a_completion_is_answered(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["one", "two"], max_tokens=3, logprobs=1)
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    assert len(answer.choices[0].logprobs.tokens) == 3


def test_the_body_reaches_the_cell_byte_for_byte(server: Running) -> None:
    body = b'{ "model":"null",\n "messages":[{"role":"user","content":"\\u00e9"}], "a_new_field": [1,  2] }'
    assert _post(server, "/v1/chat/completions", body).status_code == 200
    asked = server.cell.asked[-1]
    assert asked.body == body
    assert (asked.account, asked.choices, asked.stream) == ("acme", 1, False)


def test_an_error_of_the_engine_goes_to_the_customer_as_it_is(server: Running) -> None:
    body = b'{"error":{"message":"too long","type":"invalid_request_error","param":"messages",' + (
        b'"code":"context_length_exceeded"}}'
    )

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveAnswer(status=400, body=body)

    server.cell.script = script
    for stream in (False, True):
        response = _post(server, "/v1/chat/completions", {"model": MODEL, "messages": HELLO, "stream": stream})
        assert (response.status_code, response.content) == (400, body)
        assert response.headers["content-type"] == "application/json"


def test_a_prompt_longer_than_the_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 5000}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_no_vehicle_is_said_before_the_first_byte_with_a_time_to_wait(server: Running) -> None:
    server.cell.capacity = False
    for stream in (False, True):
        response = _post(server, "/v1/chat/completions", {"model": MODEL, "messages": HELLO, "stream": stream})
        assert response.status_code == 503
        assert response.headers["retry-after-ms"] == "1500"
        assert response.headers["retry-after"] == "2"
        assert response.json()["error"]["code"] == "no_vehicle_available"
        assert response.json()["error"]["type"] == "service_unavailable_error"


def test_a_503_from_the_cell_says_when_to_try_again(server: Running) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveAnswer(status=503, body=b'{"error":{"message":"m","type":"t","param":null,"code":"c"}}')

    server.cell.script = script
    response = _post(server, "/v1/chat/completions", {"model": MODEL, "messages": HELLO})
    assert response.status_code == 503
    assert int(response.headers["retry-after-ms"]) > 0


def test_an_answer_that_never_comes_is_an_error(server: Running) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        return
        yield

    server.cell.script = script
    response = _post(server, "/v1/chat/completions", {"model": MODEL, "messages": HELLO})
    assert (response.status_code, response.json()["error"]["code"]) == (502, "no_answer")


def test_the_cell_may_finish_its_books_after_the_answer(server: Running) -> None:
    finished: list[str] = []

    async def script(request: LiveRequest) -> AsyncIterator[Item]:
        if request.stream:
            yield LiveTokens(deltas=[token("a", finish_reason="stop")], usage=Usage(completion_tokens=1), engine="fp")
        else:
            yield LiveAnswer(status=200, body=b"{}")
        finished.append("paid")

    server.cell.script = script
    for stream in (False, True):
        _post(server, "/v1/chat/completions", {"model": MODEL, "messages": HELLO, "stream": stream})
    assert finished == ["paid", "paid"]


# -- streams


def test_a_stream_has_the_documented_shape(server: Running) -> None:
    events = _stream(server, max_tokens=5, stream_options={"include_usage": True})
    assert events.pop() == "[DONE]"
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    assert usage["usage"]["total_tokens"] == 5 + usage["usage"]["prompt_tokens"]
    assert all(event["usage"] is None for event in events)
    same = {(e["id"], e["created"], e["model"], e["object"], e["system_fingerprint"]) for e in [*events, usage]}
    assert same == {(usage["id"], usage["created"], MODEL, "chat.completion.chunk", "fp_null")}
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert choices[-1]["delta"] == {}
    assert all(set(choice) == {"index", "delta", "logprobs", "finish_reason"} for choice in choices)


def test_a_stream_says_what_the_plain_answer_says(server: Running, client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9, n=2)

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        for choice in plain.choices:
            for piece in (choice.message.content or "").split(" "):
                yield LiveTokens(deltas=[token(f"{piece} ", choice.index)], usage=None, engine="fp")
        yield LiveTokens(deltas=[token("", 0, "stop"), token("", 1, "stop")], usage=Usage(), engine="fp")

    server.cell.script = script
    texts = ["", ""]
    with client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9, n=2, stream=True) as stream:
        for chunk in stream:
            assert "usage" not in chunk.model_fields_set
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [text.strip() for text in texts] == [choice.message.content for choice in plain.choices]


def test_logprobs_come_with_their_tokens(server: Running) -> None:
    plain = _post(
        server, "/v1/chat/completions", {"model": MODEL, "messages": HELLO, "max_tokens": 3, "logprobs": True}
    )
    wanted = plain.json()["choices"][0]["logprobs"]["content"]
    # The null engine's answer depends on the whole body, so only the tokens' shape can be compared with the stream's.
    events = _stream(server, max_tokens=3, logprobs=True)
    found = [e["choices"][0]["logprobs"] for e in events if e != "[DONE]" and e["choices"][0]["logprobs"]]
    entries = [entry for logprobs in found for entry in logprobs["content"]]
    assert len(entries) == len(wanted) == 3
    assert set(entries[0]) == set(wanted[0])
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events if e != "[DONE]")
    assert "".join(entry["token"] for entry in entries) == text


def test_completion_streams_have_the_older_arrays(server: Running) -> None:
    events = _stream(server, "/v1/completions", prompt="one two", max_tokens=4, logprobs=2)
    assert events.pop() == "[DONE]"
    assert {event["object"] for event in events} == {"text_completion"}
    text = "".join(event["choices"][0]["text"] for event in events)
    arrays = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    tokens = [part for array in arrays for part in array["tokens"]]
    offsets = [part for array in arrays for part in array["text_offset"]]
    assert "".join(tokens) == text
    assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]
    assert len(arrays[0]["top_logprobs"][0]) == 2
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_echo_begins_each_choice_with_its_prompt(server: Running) -> None:
    events = _stream(server, "/v1/completions", prompt=["one", "two"], n=2, max_tokens=1, echo=True)
    texts = ["", "", "", ""]
    for event in events[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert [text[:3] for text in texts] == ["one", "one", "two", "two"]
    assert all(len(text) > 3 for text in texts)


def test_each_token_is_sent_at_once(server: Running) -> None:
    release = asyncio.Event()

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveTokens(deltas=[token("first")], usage=None, engine="fp")
        await release.wait()
        yield LiveTokens(deltas=[token("second", finish_reason="stop")], usage=Usage(), engine="fp")

    async def set_release() -> None:
        release.set()

    server.cell.script = script
    with server.client() as client, client.chat.completions.create(model=MODEL, messages=HELLO, stream=True) as stream:
        seen: list[str] = []
        for chunk in stream:
            seen.append(chunk.choices[0].delta.content or "")
            if seen[-1] == "first":  # it came although the second one cannot come yet
                server.call(set_release())
    assert "".join(seen) == "firstsecond"


def test_a_new_engine_in_mid_stream_changes_the_fingerprint_alone(server: Running) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveTokens(deltas=[token("a")], usage=None, engine="fp_one")
        yield LiveTokens(deltas=[token("b")], usage=None, engine="fp_two")
        yield LiveTokens(deltas=[token("", finish_reason="stop")], usage=Usage(), engine="fp_two")

    server.cell.script = script
    events = _stream(server)[:-1]
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert [event["system_fingerprint"] for event in events] == ["fp_one", "fp_one", "fp_two", "fp_two"]


@pytest.mark.parametrize("how", ["answer", "raise", "unexpected", "end", "nonsense"])
def test_an_error_after_the_first_token_is_an_event(server: Running, how: str) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveTokens(deltas=[token("a")], usage=None, engine="fp")
        if how == "answer":
            body = {"error": {"message": "gone", "type": "server_error", "param": None, "code": "vehicle_error"}}
            yield LiveAnswer(status=502, body=msgspec.json.format(msgspec.json.encode(body), indent=2))
        elif how == "nonsense":
            yield LiveAnswer(status=500, body=b"<html>\n\nno</html>")
        elif how == "raise":
            raise VehicleError("gone")
        elif how == "unexpected":
            raise RuntimeError("secret detail")

    server.cell.script = script
    events = _stream(server)
    assert "[DONE]" not in events
    assert set(events[-1]) == {"error"}
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
    codes = {"end": "stream_interrupted", "unexpected": "internal_error"}
    assert events[-1]["error"]["code"] == codes.get(how, "vehicle_error")
    assert "secret detail" not in str(events)
    with (
        server.client() as client,
        pytest.raises(openai.APIError),
        client.chat.completions.create(model=MODEL, messages=HELLO, stream=True) as stream,
    ):
        for _ in stream:
            pass


def test_an_unexpected_failure_before_the_first_token_is_a_500(server: Running) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        raise RuntimeError("secret detail")
        yield

    server.cell.script = script
    for stream in (False, True):
        response = _post(server, "/v1/chat/completions", {"model": MODEL, "messages": HELLO, "stream": stream})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (500, "internal_error", "server_error")
        assert response.headers["x-request-id"] in error["message"]
        assert "secret" not in response.text


def test_a_whole_answer_with_tool_calls_ends_a_stream_in_one_piece(server: Running, client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    body = {
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        "system_fingerprint": "fp",
    }

    async def script(request: LiveRequest) -> AsyncIterator[Item]:
        assert request.stream
        yield LiveAnswer(status=200, body=msgspec.json.encode(body))

    server.cell.script = script
    with client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        tools=[{"type": "function", "function": {"name": "f"}}],
    ) as stream:
        chunks = list(stream)
    calls = chunks[0].choices[0].delta.tool_calls
    assert calls is not None
    assert calls[0].function is not None
    assert (calls[0].index, calls[0].function.arguments) == (0, '{"a":1}')
    assert chunks[1].choices[0].finish_reason == "tool_calls"
    assert chunks[2].usage is not None
    assert chunks[2].usage.total_tokens == 3


# -- clients that leave, and silence


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_work(server: Running, stream: bool) -> None:
    begun: list[str] = []
    ended: list[str] = []

    async def script(request: LiveRequest) -> AsyncIterator[Item]:
        try:
            if stream:
                yield LiveTokens(deltas=[token("a")], usage=None, engine="fp")
            begun.append(request.request_id)
            await asyncio.Event().wait()
        finally:
            ended.append(request.request_id)

    server.cell.script = script
    body = json.dumps({"model": MODEL, "messages": HELLO, "stream": stream}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(server.listener.getsockname()) as connection:
        connection.sendall(head + body)
        until(lambda: begun, "the request")
        assert ended == []
    until(lambda: ended, "the end of the work")
    assert ended == begun


def test_silence_is_bridged_by_comments(tmp_path: Path) -> None:
    pinged = asyncio.Event()

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        await pinged.wait()
        yield LiveTokens(deltas=[token("a", finish_reason="stop")], usage=Usage(), engine="fp")

    async def set_pinged() -> None:
        pinged.set()

    with serve(tmp_path, settings=ApiSettings(keep_alive_ms=20)) as running:
        running.cell.script = script
        head = {"authorization": f"Bearer {running.key}", "content-type": "application/json"}
        body = json.dumps({"model": MODEL, "messages": HELLO, "stream": True})
        with running.http.stream("POST", "/v1/chat/completions", content=body, headers=head) as response:
            assert response.status_code == 200
            lines: list[str] = []
            for line in response.iter_lines():
                lines.append(line)
                if lines.count(": keep-alive") == 2:  # both came before the first token could
                    running.call(set_pinged())
    assert lines.index(": keep-alive") < next(n for n, line in enumerate(lines) if line.startswith("data: "))
    assert "data: [DONE]" in lines


# -- models


def test_models_are_listed_and_shown(client: openai.OpenAI, server: Running) -> None:
    listed = client.models.list()
    assert [model.id for model in listed.data] == sorted(MODELS)
    assert {model.object for model in listed.data} == {"model"}
    assert client.models.retrieve("acme/tiny-7").id == "acme/tiny-7"
    head = {"authorization": f"Bearer {server.key}"}
    assert server.http.get("/v1/models/acme%2Ftiny-7", headers=head).json()["id"] == "acme/tiny-7"
    assert server.http.get("/v1/models/acme/tiny-7", headers=head).json()["id"] == "acme/tiny-7"


def test_an_unknown_model_is_refused_everywhere(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nope", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.code == "model_not_found"


def test_deltas_without_news_send_nothing(server: Running) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveTokens(deltas=[], usage=None, engine="fp")
        yield LiveTokens(deltas=[Delta(index=0, text="a", finish_reason="stop")], usage=Usage(), engine="fp")

    server.cell.script = script
    assert [e["choices"][0]["delta"].get("content") for e in _stream(server)[:-1]] == ["", "a", None]
