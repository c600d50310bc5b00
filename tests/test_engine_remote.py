"""A server behind OpenAI's HTTP interface as an engine, against a real server over a real connection."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.engine_trial import Trial, chat, work

from motorpool.agent.runtime import Backend, EngineSpec, build_engine
from motorpool.agent.runtime.engine import Cancelled, Died, Finished, Progressed
from motorpool.types import Kind
from motorpool.wire import Checkpoint


def _serve(*options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "motorpool.agent.runtime.null_server", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        yield json.loads(server.stdout.readline())["base_url"]
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.fixture(scope="module")
def fast() -> Iterator[str]:
    yield from _serve("--context", "100")


@pytest.fixture(scope="module")
def slow() -> Iterator[str]:
    yield from _serve("--rate", "50")


def trial(url: str, test: Callable[[Trial], Awaitable[None]], **fields: Any) -> None:
    async def run() -> None:
        t = Trial(
            build_engine(EngineSpec(backend=Backend.REMOTE, model="ours", remote_model="null", url=url, **fields))
        )
        await t.start()
        try:
            await test(t)
        finally:
            await t.engine.close()

    asyncio.run(run())


def test_answers_come_through_in_our_shape(fast: str) -> None:
    async def test(t: Trial) -> None:
        body = chat("one two", max_tokens=5, logprobs=True, top_logprobs=2)
        answer = await t.ask(body, stream=True)
        assert (answer["id"], answer["model"]) == ("id-a", "ours")
        choice = answer["choices"][0]
        assert choice["message"]["content"] == t.text("a")
        assert len(choice["logprobs"]["content"]) == 5
        assert choice["finish_reason"] == "length"
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (2, 5)
        old = await t.ask({"prompt": "a b c", "max_tokens": 4, "logprobs": 1}, key="c", kind=Kind.COMPLETION)
        assert old["object"] == "text_completion"
        assert "".join(old["choices"][0]["logprobs"]["tokens"]) == old["choices"][0]["text"]

    trial(fast, test)


def test_several_choices_come_through(fast: str) -> None:
    async def test(t: Trial) -> None:
        answer = await t.ask(chat("x", n=2, max_tokens=3))
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert answer["usage"]["completion_tokens"] == 6

    trial(fast, test)


def test_a_continued_answer_starts_with_what_was_carried(fast: str) -> None:
    async def test(t: Trial) -> None:
        carried = Checkpoint(text="so far", tokens=2)
        for kind, body in ((Kind.CHAT, chat("x", max_tokens=6)), (Kind.COMPLETION, {"prompt": "x", "max_tokens": 6})):
            (done,) = await t.run(work(body, key=kind, kind=kind, checkpoint=carried))
            answer = json.loads(done.body)
            choice = answer["choices"][0]
            content = choice["message"]["content"] if kind is Kind.CHAT else choice["text"]
            assert content == "so far" + t.text(kind)
            assert (done.usage.completion_tokens, done.usage.carried_tokens) == (6, 2)
        (done,) = await t.run(work(chat("x", max_tokens=2), key="full", checkpoint=carried))
        assert json.loads(done.body)["choices"][0]["message"]["content"] == "so far"

    trial(fast, test)


def test_the_customers_errors_are_the_customers(fast: str) -> None:
    async def test(t: Trial) -> None:
        (done,) = await t.run(work(chat("word " * 200)))
        error = json.loads(done.body)["error"]
        assert done.status == 400
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")

    trial(fast, test)


def test_the_operators_errors_are_not_the_customers(fast: str) -> None:
    async def test(t: Trial) -> None:
        (done,) = await t.run(work(chat("x")))
        assert done.status == 500
        assert json.loads(done.body)["error"]["code"] == "engine_error"

    trial(fast.removesuffix("/v1") + "/nowhere", test)


def test_cancelled_attempts_close_their_connections(slow: str) -> None:
    async def test(t: Trial) -> None:
        t.engine.submit([work(chat("x", max_tokens=5000), key=key, stream=True) for key in ("run", "wait")])
        await t.until(lambda: t.of(Progressed, "run"))
        t.engine.cancel(["run", "wait"])
        await t.until(lambda: len(t.of(Cancelled)) == 2)
        assert not t.of(Finished)
        assert (await t.ask(chat("x", max_tokens=1), key="next"))["usage"]["completion_tokens"] == 1

    trial(slow, test, slots=1)


def test_an_attempt_that_is_cancelled_before_it_has_begun_ends_too(slow: str) -> None:
    async def test(t: Trial) -> None:
        loading_ms = t.engine.busy_ms()
        for key in ("a", "b", "c"):  # in one go, as when a client opens and leaves at once
            t.engine.submit([work(chat("x", max_tokens=5000), key=key, stream=True)])
            t.engine.cancel([key])
        await t.until(lambda: len(t.of(Cancelled)) == 3)
        assert not t.of(Finished)
        before_ms = t.engine.busy_ms()
        assert (await t.ask(chat("x", max_tokens=10), key="next"))["usage"]["completion_tokens"] == 10
        after_ms = t.engine.busy_ms()
        assert t.engine.busy_ms() == after_ms > before_ms >= loading_ms  # nothing is held, so nothing is counted

    trial(slow, test, slots=4)


class Scripted:
    """A server whose answers are bytes of the test's choice, and which keeps requests and counts connections."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.connections = 0
        self.requests: list[dict[str, Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                    continue
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                self.requests.append(json.loads(await reader.readexactly(int(length.split(b":")[1]))))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + self.answer)
        except (asyncio.IncompleteReadError, ConnectionResetError):
            writer.close()

    def ask(self, test: Callable[[Trial], Awaitable[None]]) -> None:
        async def run() -> None:
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            t = Trial(build_engine(EngineSpec(backend=Backend.REMOTE, model="m", url=url)))
            await t.start()
            try:
                await test(t)
            finally:
                await t.engine.close()
                server.close()

        asyncio.run(run())


def chunked(*parts: bytes, ended: bool = True) -> bytes:
    pieces = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
    return b"transfer-encoding: chunked\r\n\r\n" + b"".join(pieces) + (b"0\r\n\r\n" if ended else b"")


SAID = b'{"choices":[{"index":0,"delta":{"content":"yes"},"finish_reason":"stop"}]}'


def asked_for(body: dict[str, Any], *, kind: Kind = Kind.CHAT, carried: Checkpoint | None = None) -> dict[str, Any]:
    """What a server is asked for an attempt."""
    server = Scripted(chunked(b"data: " + SAID + b"\n\n", b"data: [DONE]\n\n"))

    async def test(t: Trial) -> None:
        await t.run(work(body, kind=kind, checkpoint=carried))

    server.ask(test)
    (request,) = server.requests
    return request


def limits(request: dict[str, Any]) -> dict[str, Any]:
    return {name: request[name] for name in ("max_tokens", "max_completion_tokens") if name in request}


CARRIED = Checkpoint(text="so far", tokens=6)


@pytest.mark.parametrize(
    ("given", "whole", "rest"),
    [
        ({}, {}, {}),
        ({"max_tokens": 9}, {"max_tokens": 9}, {"max_tokens": 3}),
        ({"max_completion_tokens": 9}, {"max_completion_tokens": 9}, {"max_completion_tokens": 3}),
        (
            {"max_tokens": 4, "max_completion_tokens": 12},  # the newer field counts, whichever the server knows
            {"max_tokens": 12, "max_completion_tokens": 12},
            {"max_tokens": 6, "max_completion_tokens": 6},
        ),
    ],
)
def test_what_is_carried_counts_in_every_limit_of_a_chat(
    given: dict[str, Any], whole: dict[str, Any], rest: dict[str, Any]
) -> None:
    assert limits(asked_for(chat("x", **given))) == whole
    continued = asked_for(chat("x", **given), carried=CARRIED)
    assert limits(continued) == rest
    assert continued["messages"][-1] == {"role": "assistant", "content": "so far"}


@pytest.mark.parametrize(("given", "whole", "rest"), [({}, 16, 10), ({"max_tokens": 9}, 9, 3)])
def test_a_completion_without_a_limit_is_as_long_as_openais(given: dict[str, Any], whole: int, rest: int) -> None:
    body = {"prompt": "x"} | given
    assert limits(asked_for(body, kind=Kind.COMPLETION)) == {"max_tokens": whole}
    assert limits(asked_for(body, kind=Kind.COMPLETION, carried=CARRIED)) == {"max_tokens": rest}


def test_a_prompt_is_echoed_once_also_by_an_answer_that_is_continued(fast: str) -> None:
    async def test(t: Trial) -> None:
        for prompts in ("one two", ["one two", "three"]):
            body = {"prompt": prompts, "max_tokens": 4, "echo": True}
            plain = await t.ask(body | {"echo": False}, key=f"{prompts}", kind=Kind.COMPLETION)
            echoed = await t.ask(body, key=f"{prompts} echo", kind=Kind.COMPLETION)
            texts = [prompts] if isinstance(prompts, str) else prompts
            expected = [text + choice["text"] for text, choice in zip(texts, plain["choices"], strict=True)]
            assert [choice["text"] for choice in echoed["choices"]] == expected
        body = {"prompt": "one two", "max_tokens": 6, "echo": True}
        carried = Checkpoint(text=" so far", tokens=2)
        (done,) = await t.run(work(body, key="rest", kind=Kind.COMPLETION, checkpoint=carried))
        assert json.loads(done.body)["choices"][0]["text"] == "one two so far" + t.text("rest")

    trial(fast, test)


def test_one_connection_serves_one_answer_after_the_other() -> None:
    server = Scripted(chunked(b"data: " + SAID + b"\n\n", b"data: [DONE]\n\n"))

    async def test(t: Trial) -> None:
        for number in range(5):
            assert (await t.ask(chat("x"), key=f"a{number}"))["choices"][0]["message"]["content"] == "yes"

    server.ask(test)
    assert server.connections == 1


def test_a_server_that_keeps_an_answered_request_open_is_not_waited_for() -> None:
    server = Scripted(chunked(b"data: " + SAID + b"\n\ndata: [DONE]\n\n", ended=False))

    async def test(t: Trial) -> None:
        for number in range(2):
            assert (await t.ask(chat("x"), key=f"a{number}"))["choices"][0]["message"]["content"] == "yes"

    server.ask(test)
    assert server.connections > 1


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_may_end_in_any_way_and_be_cut_anywhere(end: bytes) -> None:
    whole = b": a comment" + end + end + b"data:" + SAID + end + end + b"data: [DONE]" + end + end
    server = Scripted(chunked(*(whole[at : at + 1] for at in range(len(whole)))))

    async def test(t: Trial) -> None:
        assert (await t.ask(chat("x")))["choices"][0]["message"]["content"] == "yes"

    server.ask(test)


@pytest.mark.parametrize("said", [b"data: " + b"x" * (9 << 20), b"data: {\xff}\n\n", b"data: 7\n\n", b""])
def test_what_no_such_server_sends_ends_the_attempt_alone(said: bytes) -> None:
    server = Scripted(chunked(said) if said else chunked())

    async def test(t: Trial) -> None:
        for key in ("a", "b"):
            (done,) = await t.run(work(chat("x"), key=key))
            assert done.status == 500
            assert json.loads(done.body)["error"]["code"] == "engine_error"

    server.ask(test)


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    async def run() -> None:
        t = Trial(build_engine(EngineSpec(backend=Backend.REMOTE, model="m", url=url)))
        await t.engine.start(t._on_events)
        await t.until(lambda: t.of(Died))
        assert url in t.of(Died)[0].message
        await t.engine.close()

    asyncio.run(run())


def test_a_key_that_is_not_set_is_named(fast: str) -> None:
    async def run() -> None:
        spec = EngineSpec(backend=Backend.REMOTE, model="m", url=fast, api_key_env="NO_SUCH_KEY_IS_SET")
        t = Trial(build_engine(spec))
        await t.engine.start(t._on_events)
        await t.until(lambda: t.of(Died))
        assert "NO_SUCH_KEY_IS_SET" in t.of(Died)[0].message
        await t.engine.close()

    asyncio.run(run())


def test_the_null_server_speaks_to_the_official_client(fast: str) -> None:
    with openai.OpenAI(base_url=fast, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["null"]
        messages: Any = [{"role": "user", "content": "hello"}]
        plain = client.chat.completions.create(model="null", messages=messages, max_tokens=4)
        with client.chat.completions.create(
            model="null", messages=messages, max_tokens=4, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 4
        assert chunks[-2].choices[0].finish_reason == "length"
        assert plain.usage == chunks[-1].usage
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="null", messages=[])
    assert httpx.get(f"{fast}/nothing", trust_env=False).status_code == 404


@pytest.mark.llama
def test_a_real_server_continues_from_a_checkpoint(model_file: Path, tmp_path: Path) -> None:
    """llama.cpp's own HTTP server, so that the fields that continue a message meet one that knows them."""
    script = (
        "import sys, xllamacpp as x\n"
        "p = x.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 512; p.n_parallel = 1; p.verbosity = 0\n"
        "p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1; p.warmup = False\n"
        "s = x.Server(p); print(s.listening_address, flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(model_file)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdin is not None
    try:
        url = server.stdout.readline().decode().strip() + "/v1"

        async def test(t: Trial) -> None:
            body = chat("Why is the sky blue?", max_tokens=20, temperature=0)
            whole = await t.ask(body, key="whole", stream=True)
            text = whole["choices"][0]["message"]["content"]
            cut = text.index(" ", 30)
            carried = Checkpoint(text=text[:cut], tokens=len(t.deltas("whole")) - 5)
            rest = await t.ask(body, key="rest", checkpoint=carried)
            assert rest["choices"][0]["message"]["content"].startswith(text[:cut])
            assert rest["choices"][0]["finish_reason"] == "length"
            assert rest["usage"]["completion_tokens"] == 20
            error = (await t.ask(chat("word " * 700), key="long"))["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")

        trial(url, test)
    finally:
        server.kill()
        server.wait()
        server.stdin.close()
        server.stdout.close()
