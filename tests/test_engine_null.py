"""The null engine, in this process and in a child: one suite for both, as both stand behind one protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from tests.engine_trial import Trial, chat, work

from motorpool.agent.runtime import Backend, EngineSpec, build_engine
from motorpool.agent.runtime.calls import Calls
from motorpool.agent.runtime.engine import Cancelled, Finished, Progressed, Work
from motorpool.types import Kind
from motorpool.wire import Checkpoint


def trial(test: Callable[[Trial], Awaitable[None]], **fields: Any) -> None:
    """Run a test with an engine that is closed whatever happens."""

    async def run() -> None:
        spec = EngineSpec(backend=Backend.NULL, model="null", **fields)
        with_engine = Trial(build_engine(spec))
        await with_engine.start()
        try:
            await test(with_engine)
        finally:
            await with_engine.engine.close()

    asyncio.run(run())


@pytest.fixture(params=[False, True], ids=["inline", "hosted"])
def hosted(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_says_what_it_is(hosted: bool) -> None:
    async def run() -> None:
        engine = build_engine(EngineSpec(backend=Backend.NULL, model="null", hosted=hosted, slots=3))
        ready = await Trial(engine).start()
        await engine.close()
        assert (ready.model, ready.slots, ready.context_tokens) == ("null", 3, 2048)
        assert ready.fingerprint.startswith("fp_")

    asyncio.run(run())


def test_a_chat_answer_has_openais_shape(hosted: bool) -> None:
    async def test(t: Trial) -> None:
        answer = await t.ask(chat("one two three"))
        parsed = ChatCompletion.model_validate(answer)
        assert set(answer) == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
        assert set(answer["choices"][0]) == {"index", "message", "logprobs", "finish_reason"}
        assert answer["choices"][0]["message"]["refusal"] is None
        assert parsed.id == "id-a"
        assert parsed.usage is not None
        assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (3, 16)

    trial(test, hosted=hosted)


def test_the_quick_answer_equals_the_planned_one() -> None:
    async def test(t: Trial) -> None:
        body = chat("the same", max_tokens=150)
        plain = await t.ask(body, key="plain")
        streamed = await t.ask(body, key="streamed", stream=True)
        streamed["id"] = plain["id"]
        assert plain == streamed
        assert t.text("streamed") == plain["choices"][0]["message"]["content"]
        assert t.deltas("streamed")[-1].finish_reason == "length"

    trial(test, hosted=False)


@pytest.mark.parametrize("cut", [0, 1, 5, 29, 30])
@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["zzz"]}])
def test_a_continued_answer_is_the_unbroken_one(hosted: bool, cut: int, extra: dict[str, Any]) -> None:
    async def test(t: Trial) -> None:
        body = chat("tell me more", max_completion_tokens=30, **extra)
        whole = await t.ask(body, key="whole", stream=True)
        choice = whole["choices"][0]
        words = choice["message"]["content"].split(" ")
        head = " ".join(words[:cut])
        entries = json.dumps(choice["logprobs"]["content"][:cut]).encode() if "logprobs" in extra else b""
        carried = Checkpoint(text=head, tokens=cut, logprobs=entries)
        (done,) = await t.run(work(body, key="rest", stream=True, checkpoint=carried))
        rest = json.loads(done.body)
        assert rest["choices"] == whole["choices"]
        assert rest["usage"] == whole["usage"]
        assert done.usage.carried_tokens == cut
        assert head + t.text("rest") == choice["message"]["content"]
        assert t.deltas("rest")[-1].finish_reason == choice["finish_reason"]

    trial(test, hosted=hosted)


def test_stop_strings_end_the_answer_before_them(hosted: bool) -> None:
    async def test(t: Trial) -> None:
        body = chat("stop here")
        text = (await t.ask(body, key="whole"))["choices"][0]["message"]["content"]
        word = text.split(" ")[4]
        body["stop"] = [word]
        # The body decides the words, so the text with a stop string is another one: look for its own stop.
        answer = (await t.ask(body, key="stopped", stream=True))["choices"][0]
        assert word not in answer["message"]["content"]
        assert t.text("stopped") == answer["message"]["content"]

    trial(test, hosted=hosted)


def test_choices_differ_and_are_counted_together(hosted: bool) -> None:
    async def test(t: Trial) -> None:
        answer = await t.ask(chat("several", n=3, max_tokens=5), stream=True)
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert len(set(texts)) == 3
        assert answer["usage"]["completion_tokens"] == 15
        assert [t.text("a", index) for index in range(3)] == texts

    trial(test, hosted=hosted)


def test_json_schema_is_honoured(hosted: bool) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["car", "van"]},
            "seats": {"type": "integer", "minimum": 2},
            "price": {"type": "number"},
            "sold": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        },
        "required": ["name", "kind", "seats", "price", "sold", "tags"],
    }

    async def test(t: Trial) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        content = (await t.ask(chat("json", response_format=wanted)))["choices"][0]["message"]["content"]
        value = json.loads(content)
        assert value["kind"] == "car"
        assert value["seats"] >= 2
        assert len(value["tags"]) == 2
        assert set(value) == set(schema["required"])

    trial(test, hosted=hosted)


def test_completions_have_the_older_shape(hosted: bool) -> None:
    async def test(t: Trial) -> None:
        body = {"model": "null", "prompt": ["a b", "c"], "max_tokens": 3, "logprobs": 2}
        answer = await t.ask(body, kind=Kind.COMPLETION)
        parsed = Completion.model_validate(answer)
        assert answer["object"] == "text_completion"
        assert len(parsed.choices) == 2
        logprobs = parsed.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert "".join(logprobs.tokens) == parsed.choices[0].text
        assert logprobs.text_offset == [0, len(logprobs.tokens[0]), len(logprobs.tokens[0] + logprobs.tokens[1])]

    trial(test, hosted=hosted)


def test_echo_begins_each_text_with_its_prompt(hosted: bool) -> None:
    async def test(t: Trial) -> None:
        body = {"model": "null", "prompt": ["a b", "c"], "n": 2, "max_tokens": 1, "echo": True}
        texts = [choice["text"] for choice in (await t.ask(body, kind=Kind.COMPLETION))["choices"]]
        assert [text[: len(prompt)] for text, prompt in zip(texts, ("a b", "a b", "c", "c"), strict=True)] == [
            *("a b", "a b", "c", "c")
        ]
        answer = await t.ask({"prompt": [0, 256], "max_tokens": 1, "echo": True}, key="ids", kind=Kind.COMPLETION)
        assert answer["choices"][0]["text"].startswith("ba ba")
        plain = await t.ask({"prompt": "a b", "max_tokens": 1}, key="plain", kind=Kind.COMPLETION)
        assert not plain["choices"][0]["text"].startswith("a b")

    trial(test, hosted=hosted)


def test_a_completion_whose_length_is_not_said_has_16_tokens() -> None:
    async def test(t: Trial) -> None:
        answer = await t.ask({"prompt": "a"}, kind=Kind.COMPLETION)
        assert answer["usage"]["completion_tokens"] == 16
        assert answer["choices"][0]["finish_reason"] == "length"
        assert (await t.ask(chat("a"), key="chat"))["usage"]["completion_tokens"] == 40

    trial(test, hosted=False, default_tokens=40)


def test_a_refusal_counts_as_what_was_said() -> None:
    async def test(t: Trial) -> None:
        body = chat("one")
        body["messages"].append({"role": "assistant", "content": [{"type": "refusal", "refusal": "two three"}]})
        assert (await t.ask(body))["usage"]["prompt_tokens"] == 3

    trial(test, hosted=False)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": "x"},
        {"type": "integer", "maximum": []},
        {"type": "integer", "exclusiveMinimum": True},
        {"type": "number", "minimum": 1e300},
        {"type": "number", "maximum": -1e16},
        {"type": "string", "minLength": "x"},
        {"type": "string", "maxLength": None},
        {"type": "array", "minItems": 1.5},
        {"type": "array", "minItems": 900, "items": {"type": "array", "minItems": 900}},
        {"type": {}},
        {"type": [["null"]]},
        {"enum": "red"},
        {"enum": {"a": 1}},
        {"anyOf": {"type": "null"}},
        {"allOf": 5},
        {"type": "object", "properties": []},
        {"type": "object", "properties": ["x"]},
        {"type": "object", "properties": {"x": 5}},
        {"type": "object", "required": "x"},
        {"type": "object", "required": [{}]},
        {"$ref": []},
        {"$ref": "#/$defs/a", "$defs": ["a"]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    ],
    ids=str,
)
def test_a_schema_that_is_none_is_the_customers_error(schema: dict[str, Any]) -> None:
    async def test(t: Trial) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        (done,) = await t.run(work(chat("x", response_format=wanted)))
        error = json.loads(done.body)["error"]
        assert (done.status, error["code"], error["param"]) == (400, "invalid_json_schema", "response_format")

    trial(test, hosted=False)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (chat("word " * 3000), "context_length_exceeded", "messages"),
        ({"model": "null"}, "missing_required_parameter", "messages"),
        ({"model": "null", "messages": []}, "invalid_value", "messages"),
        (chat("x", max_tokens="many"), "invalid_type", "max_tokens"),
        (chat("x", max_tokens=0), "invalid_value", "max_tokens"),
        (chat("x", temperature=3), "invalid_value", "temperature"),
        (chat("x", functions=[{"name": "f"}]), "unsupported_parameter", "functions"),
        (chat("x", function_call="auto"), "unsupported_parameter", "function_call"),
        (chat("x", tool_choice={"type": "function", "function": {"name": "f"}}), "invalid_value", "tool_choice"),
        (chat("x", stop=["a", "b", "c", "d", "e"]), "invalid_value", "stop"),
        (
            chat("x", response_format={"type": "json_schema", "json_schema": {"schema": {"type": "frob"}}}),
            "invalid_json_schema",
            "response_format",
        ),
    ],
)
def test_a_bad_body_is_the_customers_error(body: dict[str, Any], code: str, param: str) -> None:
    async def test(t: Trial) -> None:
        (done,) = await t.run(work(body))
        error = json.loads(done.body)["error"]
        assert done.status == 400
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["param"]) == (code, param)
        assert done.usage.completion_tokens == 0

    trial(test, hosted=False)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({"prompt": [[1], [2**31]]}, "invalid_value", "prompt"),
        ({"prompt": [2**40]}, "invalid_value", "prompt"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "unsupported_parameter", "logprobs"),
    ],
)
def test_a_bad_completion_is_the_customers_error(fields: dict[str, Any], code: str, param: str) -> None:
    async def test(t: Trial) -> None:
        (done,) = await t.run(work(fields, kind=Kind.COMPLETION))
        error = json.loads(done.body)["error"]
        assert (done.status, error["code"], error["param"]) == (400, code, param)

    trial(test, hosted=False)


def test_not_json_is_the_customers_error() -> None:
    async def test(t: Trial) -> None:
        not_json = Work(key="a", kind=Kind.CHAT, body=b"{nope", response_id="r", created_s=1)
        (done,) = await t.run(not_json)
        assert (done.status, json.loads(done.body)["error"]["code"]) == (400, "invalid_json")

    trial(test, hosted=False)


def test_cancel_ends_running_and_queued_attempts(hosted: bool) -> None:
    async def test(t: Trial) -> None:
        keys = [f"k{i}" for i in range(4)]
        t.engine.submit([work(chat("long", max_tokens=2000), key=key, stream=True) for key in keys])
        await t.until(lambda: t.of(Progressed, "k0"))
        t.engine.cancel([*keys, "unknown"])
        await t.until(lambda: len(t.of(Cancelled)) == 4)
        assert sorted(event.key for event in t.of(Cancelled)) == keys
        assert not t.of(Finished)
        answer = await t.ask(chat("short", max_tokens=1), key="after")
        assert answer["usage"]["completion_tokens"] == 1

    trial(test, hosted=hosted, rate_tokens_per_s=50.0, slots=2)


def test_frozen_engine_says_nothing_and_goes_on_after(hosted: bool) -> None:
    async def test(t: Trial) -> None:
        t.engine.submit([work(chat("slow", max_tokens=60), stream=True)])
        await t.until(lambda: t.of(Progressed))
        t.engine.freeze()
        other = Trial(
            build_engine(EngineSpec(backend=Backend.NULL, model="null", rate_tokens_per_s=100.0, hosted=False))
        )
        await other.start()
        await other.ask(chat("what was sent before the freeze arrives meanwhile", max_tokens=5))
        before, busy_ms = len(t.events), t.engine.busy_ms()
        await other.ask(chat("an engine that is not frozen says this much meanwhile", max_tokens=30), key="b")
        await other.engine.close()
        assert (len(t.events), t.engine.busy_ms()) == (before, busy_ms)
        t.engine.thaw()
        await t.until(lambda: t.of(Finished))
        assert len(t.of(Finished)[0].body) > 0
        assert len(t.text("a").split()) == 60

    trial(test, hosted=hosted, rate_tokens_per_s=100.0)


def test_a_killed_engine_is_silent_and_can_be_started_again(hosted: bool) -> None:
    async def test(t: Trial) -> None:
        t.engine.submit([work(chat("slow", max_tokens=2000), stream=True)])
        await t.until(lambda: t.of(Progressed))
        t.engine.freeze()
        t.engine.kill()
        t.events.clear()
        await t.start()
        answer = await t.ask(chat("again", max_tokens=2))
        assert answer["usage"]["completion_tokens"] == 2
        assert [type(event).__name__ for event in t.events if not isinstance(event, Progressed)] == [
            "Ready",
            "Finished",
        ]

    trial(test, hosted=hosted, rate_tokens_per_s=100.0)


def test_many_small_requests_all_come_back(hosted: bool) -> None:
    async def test(t: Trial) -> None:
        works = [work(chat(f"number {i}"), key=f"k{i}") for i in range(5000)]
        done = await t.run(*works)
        assert len({event.key for event in done}) == 5000
        assert all(event.status == 200 for event in done)

    trial(test, hosted=hosted)


def test_streamed_tool_calls_are_put_together() -> None:
    calls = Calls()
    for part in (
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"city":'}},
        {"index": 1, "id": "call_2", "function": {"name": "time", "arguments": "{}"}},
        {"index": 0, "function": {"arguments": ' "Oslo"}'}},
    ):
        calls.feed([part])
    first = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    second = {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    assert calls.whole() == [first, second]


def test_a_tool_is_called_when_the_request_insists_on_it() -> None:
    async def test(t: Trial) -> None:
        schema = {"type": "object", "properties": {"city": {"const": "Oslo"}}, "required": ["city"]}
        tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("time", "weather")]
        named = {"type": "function", "function": {"name": "weather"}}
        for choice, name in (("required", "time"), (named, "weather")):
            body = chat("go", tools=tools, tool_choice=choice)
            (found,) = (await t.ask(body, key=name))["choices"]
            (call,) = found["message"]["tool_calls"]
            assert found["finish_reason"] == "tool_calls"
            assert (found["message"]["content"], call["function"]["name"]) == (None, name)
            assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
        words = await t.ask(chat("go", tools=tools, tool_choice="auto", max_tokens=3), key="auto")
        assert "tool_calls" not in words["choices"][0]["message"]
        wrong = await t.ask(chat("go", tools=tools, tool_choice={"function": {"name": "x"}}), key="wrong")
        assert wrong["error"]["param"] == "tool_choice"

    trial(test)
