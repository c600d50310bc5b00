"""Calls every endpoint the way openai-python's own README and examples do, and prints what passed.

Usage: python tools/conformance.py [--base-url URL --api-key KEY] [--model null] [--fuzz N] [--json FILE]
       python tools/conformance.py --write        writes docs/reference/api-conformance.md

Without ``--base-url`` it starts ``motorpool dev`` with null engines for the time of the run. ``--fuzz N`` also has
schemathesis make N requests of each kind to each route of the served OpenAPI document. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
from openai import AsyncOpenAI, OpenAI
from openai.types import Batch
from openai.types.responses import Response
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs/reference/api-conformance.md"
START_S = 90
BATCH_S = 60
HELLO: Any = [{"role": "user", "content": "Say this is a test"}]


class Setting(NamedTuple):
    """Where the programs run: a client, and the model of text and the one of vectors."""

    client: OpenAI
    model: str
    embedding_model: str

    def asynchronous(self) -> AsyncOpenAI:
        """An asynchronous client of the same service."""
        return AsyncOpenAI(base_url=self.client.base_url, api_key=self.client.api_key, max_retries=0)


Program = Callable[[Setting], None]
PROGRAMS: list[tuple[str, str, Program]] = []


def program(calls: str) -> Callable[[Program], Program]:
    """Add a program; ``calls`` are the methods of the client that it shows."""

    def add(run: Program) -> Program:
        PROGRAMS.append((run.__name__, calls, run))
        return run

    return add


# -- chat completions --------------------------------------------------------------------------------------------------


@program("chat.completions.create")
def chat_completion(at: Setting) -> None:
    """A system and a user message, and the text of the first choice."""
    done = at.client.chat.completions.create(
        model=at.model,
        max_tokens=24,
        messages=[
            {"role": "developer", "content": "Talk like a pirate."},
            {"role": "user", "content": "How do I check if a Python object is an instance of a class?"},
        ],
    )
    assert done.choices[0].message.content
    assert done.usage is not None
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done._request_id is not None  # noqa: SLF001 - the README names it


@program("chat.completions.create(stream=True)")
def chat_stream(at: Setting) -> None:
    """Chunks as they come, and the usage at the end."""
    stream = at.client.chat.completions.create(
        model=at.model, messages=HELLO, max_tokens=16, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
    assert text
    assert usage is not None


@program("chat.completions.stream")
def chat_stream_helper(at: Setting) -> None:
    """The helper that tells events and gathers the whole."""
    with at.client.chat.completions.stream(model=at.model, messages=HELLO) as stream:
        kinds = {event.type for event in stream}
        assert "content.delta" in kinds
        assert stream.get_final_completion().choices[0].message.content


@program("AsyncOpenAI: chat.completions.create")
def asynchronous_client(at: Setting) -> None:
    """Several requests at once, one of them as a stream."""

    async def run() -> None:
        async with at.asynchronous() as client:

            async def streamed() -> str:
                text = ""
                stream = await client.chat.completions.create(model=at.model, messages=HELLO, max_tokens=8, stream=True)
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            whole = [client.chat.completions.create(model=at.model, messages=HELLO, max_tokens=8) for _ in range(3)]
            answers, text = await asyncio.gather(asyncio.gather(*whole), streamed())
            assert all(answer.choices[0].message.content for answer in answers)
            assert text

    asyncio.run(run())


class Step(BaseModel):
    """One step of a solution."""

    explanation: str
    output: str


class Solution(BaseModel):
    """What the model is to fill in."""

    steps: list[Step]
    final_answer: str


@program("chat.completions.parse")
def structured_output(at: Setting) -> None:
    """An answer that is an instance of a model."""
    done = at.client.chat.completions.parse(
        model=at.model,
        max_tokens=200,
        messages=[{"role": "user", "content": "solve 8x + 31 = 2"}],
        response_format=Solution,
    )
    assert isinstance(done.choices[0].message.parsed, Solution)


@program("chat.completions.create(tools=...)")
def function_calling(at: Setting) -> None:
    """A function that the model may call; whether it does is the model's affair."""
    tool: Any = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        },
    }
    try:
        done = at.client.chat.completions.create(model=at.model, messages=HELLO, tools=[tool], max_tokens=32)
    except openai.BadRequestError as error:  # a model without a template for tools says so by name
        if error.param != "tools":
            raise
        return
    assert done.choices[0].finish_reason in {"stop", "length", "tool_calls"}


@program("chat.completions.create(n, logprobs, stop, seed)")
def sampling_options(at: Setting) -> None:
    """Several choices with logprobs."""
    done = at.client.chat.completions.create(
        model=at.model, messages=HELLO, n=2, logprobs=True, top_logprobs=2, seed=7, stop=["\n\n"], max_tokens=6,
        temperature=0.5,
    )  # fmt: skip
    assert [choice.index for choice in done.choices] == [0, 1]
    assert done.choices[0].logprobs is not None
    assert done.choices[0].logprobs.content


# -- other endpoints that run models -----------------------------------------------------------------------------------


@program("completions.create")
def completion(at: Setting) -> None:
    """The older endpoint, whole and as a stream."""
    done = at.client.completions.create(model=at.model, prompt="Once upon a time", max_tokens=8)
    assert done.choices[0].text
    pieces = [
        chunk.choices[0].text
        for chunk in at.client.completions.create(model=at.model, prompt="Once", max_tokens=8, stream=True)
    ]
    assert "".join(pieces)


@program("embeddings.create")
def embeddings(at: Setting) -> None:
    """One text and several; the client asks for base64 and gives floats."""
    one = at.client.embeddings.create(model=at.embedding_model, input="Your text string goes here", user="user-1")
    many = at.client.embeddings.create(model=at.embedding_model, input=["a", "b"], encoding_format="float")
    assert all(isinstance(number, float) for number in one.data[0].embedding)
    assert len(many.data) == 2
    assert len(many.data[0].embedding) == len(one.data[0].embedding)


@program("responses.create, retrieve, input_items.list, delete")
def responses(at: Setting) -> None:
    """A response, one that goes on with it, and its end."""
    first = at.client.responses.create(
        model=at.model, instructions="You are a coding assistant.", input="How do I sort a list?", max_output_tokens=32
    )
    assert first.output_text
    second = at.client.responses.create(
        model=at.model, previous_response_id=first.id, input="And backwards?", max_output_tokens=32
    )
    assert at.client.responses.retrieve(second.id).previous_response_id == first.id
    said = [item for item in at.client.responses.input_items.list(second.id, order="asc") if item.type == "message"]
    assert [item.role for item in said] == ["user", "assistant", "user"]
    at.client.responses.delete(second.id)
    with _raises(openai.NotFoundError):
        at.client.responses.retrieve(second.id)


@program("responses.parse")
def responses_structured(at: Setting) -> None:
    """A response that is an instance of a model."""
    done = at.client.responses.parse(
        model=at.model, input="solve 8x + 31 = 2", text_format=Solution, max_output_tokens=200
    )
    assert isinstance(done.output_parsed, Solution)


@program("responses.create(tools=...)")
def responses_functions(at: Setting) -> None:
    """A function that the model may call, a tool that OpenAI runs beside it, and the output of a call."""
    tool: Any = {
        "type": "function",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        "strict": True,
    }
    turns: Any = [
        {"role": "user", "content": "Is it raining in Ulm?"},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"town":"Ulm"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    try:
        done = at.client.responses.create(
            model=at.model, input=turns, tools=[tool, {"type": "web_search"}], max_output_tokens=32
        )
    except openai.BadRequestError as error:  # a model without a template for tools says so by name
        if error.param != "tools":
            raise
        return
    assert [offered.type for offered in done.tools] == ["function"]
    assert {item.type for item in done.output} <= {"message", "function_call"}


@program("responses.create(stream=True), responses.stream")
def responses_stream(at: Setting) -> None:
    """Events as they come, and the helper."""
    events = at.client.responses.create(model=at.model, input="Say this is a test", stream=True, max_output_tokens=16)
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] in {"response.completed", "response.incomplete"}
    with at.client.responses.stream(model=at.model, input="Say it again") as stream:
        assert "response.output_text.delta" in {event.type for event in stream}
        assert stream.get_final_response().output_text


@program("responses.create(background=True, stream=True), retrieve(stream=True, starting_after)")
def responses_that_go_on(at: Setting) -> None:
    """A stream that is left in its middle, and heard on from there."""
    stream = at.client.responses.create(
        model=at.model, input="A long story", background=True, stream=True, max_output_tokens=40
    )
    response_id, numbers = "", []
    for event in stream:
        if event.type == "response.created":
            response_id = event.response.id
        numbers.append(event.sequence_number)
        if len(numbers) == 5:
            break
    stream.close()
    for event in at.client.responses.retrieve(response_id, stream=True, starting_after=numbers[-1]):
        numbers.append(event.sequence_number)
        last = event.type
    assert numbers == list(range(len(numbers)))
    assert last in {"response.completed", "response.incomplete"}


@program("responses.create(background=True), cancel")
def responses_in_the_background(at: Setting) -> None:
    """A response that is asked for now and fetched later, and one that is cancelled."""
    made = at.client.responses.create(model=at.model, input="Say this is a test", background=True, max_output_tokens=16)
    _wait(lambda: at.client.responses.retrieve(made.id).status in {"completed", "incomplete"})
    other = at.client.responses.create(model=at.model, input="Count to ten", background=True, max_output_tokens=64)
    with contextlib.suppress(openai.BadRequestError, openai.ConflictError):  # it may be through by then
        assert at.client.responses.cancel(other.id).status in {"cancelled", "completed", "incomplete"}


# -- objects -----------------------------------------------------------------------------------------------------------


@program("models.list, models.retrieve")
def models(at: Setting) -> None:
    """All models, and one."""
    assert at.model in {model.id for model in at.client.models.list()}
    assert at.client.models.retrieve(at.model).id == at.model


@program("files.create, retrieve, list, content, delete")
def files(at: Setting) -> None:
    """A file from a path, as the README uploads one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.jsonl"
        path.write_bytes(b'{"a": 1}\n')
        file = at.client.files.create(file=path, purpose="user_data")
    assert at.client.files.retrieve(file.id).filename == "input.jsonl"
    assert file.id in {one.id for one in at.client.files.list(limit=5)}
    assert at.client.files.content(file.id).read() == b'{"a": 1}\n'
    assert at.client.files.delete(file.id).deleted


@program("batches.create, retrieve, list, cancel")
def batches(at: Setting) -> None:
    """Two lines, their results, and the list page by page."""
    lines = [
        {
            "custom_id": f"request-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": at.model, "messages": HELLO, "max_tokens": 8},
        }
        for number in range(2)
    ]
    made, results = _run_batch(at, "/v1/chat/completions", lines)
    assert {result["custom_id"] for result in results} == {"request-0", "request-1"}
    assert all(result["response"]["body"]["object"] == "chat.completion" for result in results)
    assert made.id in {batch.id for batch in at.client.batches.list(limit=1)}
    with contextlib.suppress(openai.ConflictError):  # it has ended
        at.client.batches.cancel(made.id)


@program("batches.create(endpoint=...): responses, embeddings, completions")
def batches_of_each_endpoint(at: Setting) -> None:
    """Two lines for each of the other endpoints that a batch may have."""
    bodies: dict[Any, dict[str, Any]] = {
        "/v1/responses": {"model": at.model, "input": "Say this is a test", "max_output_tokens": 8},
        "/v1/embeddings": {"model": at.embedding_model, "input": "Your text string goes here"},
        "/v1/completions": {"model": at.model, "prompt": "Once upon a time", "max_tokens": 8},
    }
    objects = {"/v1/responses": "response", "/v1/embeddings": "list", "/v1/completions": "text_completion"}
    for endpoint, body in bodies.items():
        lines = [{"custom_id": str(n), "method": "POST", "url": endpoint, "body": body} for n in range(2)]
        _, results = _run_batch(at, endpoint, lines)
        found = [result["response"]["body"] for result in results]
        assert [one["object"] for one in found] == [objects[endpoint]] * 2
        if endpoint == "/v1/responses":
            assert all(Response.model_validate(one).output_text for one in found)


def _run_batch(at: Setting, endpoint: Any, lines: list[dict[str, Any]]) -> tuple[Batch, list[dict[str, Any]]]:
    """Hand in lines and wait for their results, all of which must have come."""
    data = "\n".join(json.dumps(line) for line in lines).encode()
    file = at.client.files.create(file=("batch.jsonl", data), purpose="batch")
    made = at.client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"for": "conformance"}
    )
    _wait(lambda: at.client.batches.retrieve(made.id).status in {"completed", "failed"})
    done = at.client.batches.retrieve(made.id)
    assert done.status == "completed", done.errors
    assert done.request_counts is not None
    assert done.request_counts.completed == len(lines)
    assert done.output_file_id is not None
    return done, [json.loads(line) for line in at.client.files.content(done.output_file_id).text.splitlines()]


@program("webhooks.create, event_types, list, retrieve, update, rotate_secret, delete")
def webhooks(at: Setting) -> None:
    """A webhook from its making to its end."""
    hook = at.client.webhooks.create(name="mine", url="https://example.org/hook", event_types=["batch.completed"])
    assert hook.signing_secret.startswith("whsec_")
    assert hook.id in {one.id for one in at.client.webhooks.list()}
    assert at.client.webhooks.retrieve(hook.id).event_types == ["batch.completed"]
    assert at.client.webhooks.update(hook.id, name="renamed").name == "renamed"
    assert at.client.webhooks.rotate_secret(hook.id).signing_secret != hook.signing_secret
    assert at.client.webhooks.delete(hook.id).deleted


@program("webhooks.unwrap")
def webhook_deliveries(at: Setting) -> None:
    """The end of a background response, told and verified; or the refusal of an address that no webhook may have."""
    heard: list[tuple[dict[str, str], bytes]] = []
    with _receiver(heard) as url:
        try:
            hook = at.client.webhooks.create(name="here", url=url, event_types=["response.completed"])
        except openai.BadRequestError as error:
            if error.code != "invalid_webhook_url":
                raise
            return
        try:
            made = at.client.responses.create(model=at.model, input="Say this is a test", background=True)
            _wait(lambda: bool(heard))
        finally:
            at.client.webhooks.delete(hook.id)
    headers, body = heard[0]
    event = at.client.webhooks.unwrap(body, headers, secret=hook.signing_secret)
    assert event.type == "response.completed"
    assert event.data.id == made.id
    try:
        at.client.webhooks.unwrap(body + b" ", headers, secret=hook.signing_secret)
    except openai.InvalidWebhookSignatureError:
        return
    raise AssertionError("a wrong signature was taken")


@contextlib.contextmanager
def _receiver(heard: list[tuple[dict[str, str], bytes]]) -> Iterator[str]:
    """A customer's server on this machine that says yes to every event; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            heard.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/hook"
        finally:
            server.shutdown()
            thread.join()


# -- how the client is used --------------------------------------------------------------------------------------------


@program("APIStatusError and its kinds")
def errors(at: Setting) -> None:
    """Each refusal is the exception that the README's table names."""
    with _raises(openai.NotFoundError) as caught:
        at.client.chat.completions.create(model="no-such-model", messages=HELLO)
    assert caught[0].code == "model_not_found"
    assert caught[0].request_id is not None
    with _raises(openai.BadRequestError):
        at.client.chat.completions.create(model=at.model, messages=[])
    with _raises(openai.AuthenticationError):
        at.client.with_options(api_key="wrong").models.list()


@program("with_raw_response, with_streaming_response")
def raw_responses(at: Setting) -> None:
    """Headers beside the parsed object."""
    raw = at.client.chat.completions.with_raw_response.create(model=at.model, messages=HELLO, max_tokens=8)
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.headers["openai-processing-ms"].isdigit()
    assert raw.parse().choices[0].message.content
    with at.client.chat.completions.with_streaming_response.create(
        model=at.model, messages=HELLO, max_tokens=8
    ) as response:
        assert b"".join(response.iter_bytes())


@program("with_options(timeout, max_retries, organization, project)")
def retries_and_timeouts(at: Setting) -> None:
    """The client's own settings, on one call."""
    client = at.client.with_options(timeout=30.0, max_retries=5, organization="org-1", project="proj_1")
    assert client.chat.completions.create(model=at.model, messages=HELLO, max_tokens=4).choices


@program("automatic pagination")
def pagination(at: Setting) -> None:
    """A list that the client fetches page by page."""
    made = {at.client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(3)}
    seen = []
    for file in at.client.files.list(limit=2, purpose="user_data"):
        seen.append(file.id)
        if made <= set(seen):
            break
    assert made <= set(seen)
    assert len(seen) == len(set(seen))
    for file_id in made:
        at.client.files.delete(file_id)


@program("extra_headers: Idempotency-Key")
def idempotency(at: Setting) -> None:
    """The same request twice under one key is done once."""
    key = f"conformance-{time.time_ns()}"
    answers = [
        at.client.chat.completions.create(
            model=at.model, messages=HELLO, max_tokens=8, extra_headers={"Idempotency-Key": key}
        )
        for _ in range(2)
    ]
    assert answers[0].id == answers[1].id


@program("client.get for an endpoint that the client does not know")
def undocumented_endpoints(at: Setting) -> None:
    """The served OpenAPI document, through the client's own transport."""
    root = str(at.client.base_url).removesuffix("/v1/")
    document = at.client.get(f"{root}/openapi.json", cast_to=object)
    assert isinstance(document, dict)
    assert document["openapi"] == "3.1.0"


def _wait(done: Callable[[], bool]) -> None:
    end_s = time.monotonic() + BATCH_S
    while not done():
        assert time.monotonic() < end_s, f"it took more than {BATCH_S} s"
        time.sleep(0.05)


@contextlib.contextmanager
def _raises(kind: type[openai.APIStatusError]) -> Iterator[list[openai.APIStatusError]]:
    caught: list[openai.APIStatusError] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    assert caught, f"no {kind.__name__} was raised"


# -- the run -----------------------------------------------------------------------------------------------------------


def run(at: Setting) -> list[tuple[str, str, str]]:
    """Run every program; name, calls and what went wrong (empty if nothing did)."""
    found = []
    for name, calls, act in PROGRAMS:
        try:
            act(at)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other programs run
            found.append((name, calls, f"{type(error).__name__}: {error}"[:200]))
        else:
            found.append((name, calls, ""))
    return found


@contextlib.contextmanager
def own_service() -> Iterator[tuple[str, str]]:
    """``motorpool dev`` with two null vehicles; its address and key."""
    with tempfile.TemporaryDirectory(prefix="motorpool-conformance-") as folder:
        command = [sys.executable, "-m", "motorpool.cli.main", "dev", "--model", "null", "--vehicles", "2"]
        command += ["--null-rate", "0", "--port", "0", "--data", folder, "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                ready = json.loads(process.stdout.readline())
                policy = [
                    "webhooks",
                    "policy",
                    "--private",
                    "--http",
                    "--data",
                    folder,
                ]  # deliveries come to this machine
                subprocess.run([*command[:3], *policy], check=True, stderr=subprocess.DEVNULL)
                yield ready["base_url"], ready["api_key"]
            finally:
                process.terminate()
                process.wait(START_S)


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url")
    parser.add_argument("--api-key")
    parser.add_argument("--model", default="null")
    parser.add_argument("--embedding-model")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write:
        from tools.conformance_rows import page  # noqa: PLC0415 - only here

        PAGE.write_text(page([(name, calls, act.__doc__ or "") for name, calls, act in PROGRAMS]), "utf-8")
        return 0
    own = own_service() if options.base_url is None else contextlib.nullcontext((options.base_url, options.api_key))
    with own as (base_url, api_key):
        client = OpenAI(base_url=base_url, api_key=api_key, max_retries=2, timeout=60)
        found = run(Setting(client, options.model, options.embedding_model or options.model))
        for name, calls, wrong in found:
            print(f"{'FAIL' if wrong else 'pass'}  {name:30} {calls}{'  ' + wrong if wrong else ''}")
        failures = [wrong for _, _, wrong in found if wrong]
        cases = 0
        if options.fuzz:
            from tests.fuzzing import fuzz  # noqa: PLC0415 - it needs schemathesis

            fuzzed = fuzz(base_url.removesuffix("/v1"), api_key, options.model, examples=options.fuzz)
            cases = fuzzed.cases
            print(f"schemathesis: {fuzzed.operations} routes, {cases} requests, {len(fuzzed.failures)} failures")
            for failure in fuzzed.failures:
                print(f"FAIL  {failure}")
            failures += fuzzed.failures
    if options.json is not None:
        programs = [{"program": name, "passed": not wrong} for name, _, wrong in found]
        result = {"openai": openai.__version__, "programs": programs, "fuzz_requests": cases, "failures": failures}
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"{sum(not wrong for _, _, wrong in found)} of {len(found)} programs passed with openai {openai.__version__}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
