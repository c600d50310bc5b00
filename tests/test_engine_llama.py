"""The real engine with the real model: answers, their shape, and that a continued answer is the unbroken one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from tests.engine_trial import Trial, chat, work

from motorpool.agent.runtime import Backend, EngineSpec, build_engine
from motorpool.agent.runtime.engine import Cancelled, Died, Finished, Progressed
from motorpool.agent.runtime.llama_chunks import CHUNK, Chunk, TokenCount
from motorpool.agent.runtime.llama_grammar import Grammars
from motorpool.types import Kind
from motorpool.wire import Checkpoint, CheckpointChoice

pytestmark = pytest.mark.llama
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "wheels": {"type": "integer"}},
    "required": ["colour", "wheels"],
}


def spec(model_file: Path, **fields: Any) -> EngineSpec:
    given: dict[str, Any] = {"model_sha256": SHA256, "slots": 2, "context_tokens": 512, "idle_priority": False} | fields
    return EngineSpec(backend=Backend.LLAMA, model="smollm2", model_path=str(model_file), **given)


def trial(model_file: Path, test: Callable[[Trial], Awaitable[None]], **fields: Any) -> None:
    async def run() -> None:
        t = Trial(build_engine(spec(model_file, **fields)))
        await t.start()
        try:
            await test(t)
        finally:
            await t.engine.close()

    asyncio.run(run())


def prefixes(t: Trial, key: str) -> list[Checkpoint]:
    """Every checkpoint that could have been made of an attempt, from nothing to everything but the last delta."""
    out = [Checkpoint(text="", tokens=0)]
    for delta in t.deltas(key):
        last = out[-1]
        entries = json.loads(last.logprobs or b"[]") + json.loads(delta.logprobs or b"[]")
        ids = last.token_ids + delta.token_ids
        logprobs = json.dumps(entries).encode() if entries else b""
        out.append(Checkpoint(text=last.text + delta.text, tokens=len(ids), token_ids=ids, logprobs=logprobs))
    return out[:-1]


def some(cuts: list[Checkpoint], count: int) -> list[Checkpoint]:
    return cuts[:: max(1, len(cuts) // count)] + cuts[-1:]


async def continued_everywhere(
    t: Trial, body: dict[str, Any], kind: Kind = Kind.CHAT, count: int = 6
) -> dict[str, Any]:
    """Run a body whole, then from several checkpoints, and demand the same answer and bill each time."""
    whole = await t.ask(body, key="whole", kind=kind, stream=True)
    assert "error" not in whole, whole
    assert sum(len(delta.token_ids) for delta in t.deltas("whole")) == whole["usage"]["completion_tokens"]
    for number, carried in enumerate(some(prefixes(t, "whole"), count)):
        key = f"from-{number}"
        (done,) = await t.run(work(body, key=key, kind=kind, stream=True, checkpoint=carried))
        answer = json.loads(done.body)
        where = f"after {carried.tokens} tokens"
        assert _without_logprobs(answer) == _without_logprobs(whole), where
        assert answer["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"], where
        assert answer["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"], where
        assert done.usage.carried_tokens == carried.tokens
        assert carried.text + t.text(key) == t.text("whole"), where
    return whole


def _without_logprobs(answer: dict[str, Any]) -> list[Any]:
    return [{name: value for name, value in choice.items() if name != "logprobs"} for choice in answer["choices"]]


def test_a_chat_answer_has_openais_shape(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        answer = await t.ask(chat("Name a colour.", max_tokens=8, temperature=0, logprobs=True, top_logprobs=2))
        parsed = ChatCompletion.model_validate(answer)
        assert set(answer) == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
        choice = answer["choices"][0]
        assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
        assert set(choice["message"]) == {"role", "content", "refusal"}
        entries = choice["logprobs"]["content"]
        assert all(set(entry) == {"token", "logprob", "bytes", "top_logprobs"} for entry in entries)
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
        assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
        assert (parsed.id, parsed.model) == ("id-a", "smollm2")
        plain = await t.ask(chat("Name a colour.", max_tokens=8, temperature=0), key="plain")
        assert plain["choices"][0]["logprobs"] is None
        assert plain["choices"][0]["message"] == choice["message"]
        assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

    trial(model_file, test)


def test_a_continued_answer_is_the_unbroken_one(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Why is the sky blue? Answer in two sentences.", max_tokens=40, temperature=0)
        whole = await continued_everywhere(t, body, count=8)
        assert whole["choices"][0]["finish_reason"] == "length"

    trial(model_file, test)


def test_a_continued_answer_ends_by_itself_where_the_unbroken_one_does(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Say only the word yes.", max_completion_tokens=100, temperature=0)
        whole = await continued_everywhere(t, body)
        assert whole["choices"][0]["finish_reason"] == "stop"

    trial(model_file, test)


def test_a_character_of_several_tokens_is_never_cut(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = {"prompt": "A row of cars: 🚗🚗🚗🚗🚗🚗🚗🚗🚗🚗🚗🚗", "max_tokens": 15, "temperature": 0}
        whole = await continued_everywhere(t, body, kind=Kind.COMPLETION, count=15)
        assert "🚗" in whole["choices"][0]["text"]
        assert all(number >= 0 for delta in t.deltas("whole") if delta.text for number in delta.token_ids)

    trial(model_file, test)


def test_stop_strings_are_found_across_the_cut(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Count from one to ten in digits, separated by commas.", max_tokens=40, temperature=0)
        free = await t.ask(body, key="free", stream=True)
        text = free["choices"][0]["message"]["content"]
        stop = text[12:17]
        stopped = await continued_everywhere(t, body | {"stop": stop})
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert stopped["choices"][0]["message"]["content"] == text[: text.index(stop)]
        # A checkpoint of another engine, which gave out the beginning of the stop string.
        inside = [cut for cut in prefixes(t, "free") if text.index(stop) < len(cut.text) < text.index(stop) + len(stop)]
        assert inside
        for number, carried in enumerate(inside):
            answer = await t.ask(body | {"stop": stop}, key=f"inside-{number}", checkpoint=carried)
            assert answer["choices"] == stopped["choices"]

    trial(model_file, test)


def test_logprobs_cover_the_whole_continued_answer(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Name two animals.", max_tokens=20, temperature=0, logprobs=True)
        whole = await continued_everywhere(t, body, count=3)
        answer = await t.ask(body, key="last", checkpoint=prefixes(t, "whole")[10])
        entries = answer["choices"][0]["logprobs"]["content"]
        tokens = [entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]]
        assert [entry["token"] for entry in entries] == tokens

    trial(model_file, test)


def test_completions_continue_too(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = {"prompt": "The wheels on the bus", "max_tokens": 24, "temperature": 0, "logprobs": 0}
        whole = await continued_everywhere(t, body, kind=Kind.COMPLETION, count=4)
        assert whole["object"] == "text_completion"
        parsed = Completion.model_validate(whole)
        assert parsed.choices[0].logprobs is not None
        del body["logprobs"]
        echo = await t.ask(body | {"echo": True}, key="echo", kind=Kind.COMPLETION)
        assert echo["choices"][0]["text"] == f"{body['prompt']}{whole['choices'][0]['text']}"
        refused = await t.ask(body | {"echo": True, "logprobs": 0}, key="refused", kind=Kind.COMPLETION)
        assert (refused["error"]["code"], refused["error"]["param"]) == ("unsupported_parameter", "logprobs")

    trial(model_file, test)


def test_a_completion_whose_length_is_not_said_has_16_tokens(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        whole = await continued_everywhere(t, {"prompt": "one, two, three, four,", "temperature": 0}, Kind.COMPLETION)
        assert whole["usage"]["completion_tokens"] == 16
        assert whole["choices"][0]["finish_reason"] == "length"

    trial(model_file, test)


def test_tokens_that_the_model_does_not_have_are_refused_by_name(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        for number, prompt in enumerate(([49152], [[1], [2**31 - 1]], [-1], [2**40])):
            (done,) = await t.run(work({"prompt": prompt, "max_tokens": 1}, key=f"k{number}", kind=Kind.COMPLETION))
            error = json.loads(done.body)["error"]
            assert (done.status, error["code"], error["param"]) == (400, "invalid_value", "prompt")
        answer = await t.ask({"prompt": [49151, 0], "max_tokens": 1}, key="good", kind=Kind.COMPLETION)
        assert answer["usage"]["prompt_tokens"] == 2

    trial(model_file, test)


def test_a_refusal_is_what_the_assistant_said(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        def body(part: dict[str, str]) -> dict[str, Any]:
            said = {"role": "assistant", "content": [part]}
            user = {"role": "user", "content": "Go on."}
            return {"messages": [user, said, user], "max_tokens": 4, "temperature": 0}

        refusal = await t.ask(body({"type": "refusal", "refusal": "I will not say that."}), key="refusal")
        text = await t.ask(body({"type": "text", "text": "I will not say that."}), key="text")
        assert refusal["choices"] == text["choices"]
        assert refusal["usage"]["prompt_tokens"] == text["usage"]["prompt_tokens"] > 20

    trial(model_file, test)


def test_resumed_json_is_valid_wherever_it_was_cut(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "car", "schema": SCHEMA, "strict": True}}
        body = chat("Describe a red car.", max_tokens=120, temperature=0, response_format=wanted)
        whole = await t.ask(body, key="whole", stream=True)
        text = whole["choices"][0]["message"]["content"]
        for cut in range(0, len(text), 3):
            carried = Checkpoint(text=text[:cut], tokens=cut)
            answer = await t.ask(body, key=f"cut-{cut}", checkpoint=carried)
            content = answer["choices"][0]["message"]["content"]
            assert content.startswith(text[:cut])
            assert answer["choices"][0]["finish_reason"] == "stop"
            value = json.loads(content)
            assert set(value) == {"colour", "wheels"}
            assert value["colour"] in {"red", "blue"}
            assert isinstance(value["wheels"], int)
            assert answer["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]

    trial(model_file, test)


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_every_token_of_json_is_seen_and_counted(model_file: Path, kind: str) -> None:
    schema = {"type": "object", "properties": {"word": {"type": "string", "maxLength": 9}}, "required": ["word"]}
    wanted = {"type": kind} | ({"json_schema": {"name": "x", "schema": schema}} if kind == "json_schema" else {})

    async def test(t: Trial) -> None:
        body = chat("Say hello in one word.", temperature=0, response_format=wanted, logprobs=True)
        # On llama.cpp's own chat route this model begins with a code fence, which nobody sees.
        for limit in (1, 2, 4, 5, 60):
            key = f"k{limit}"
            answer = await t.ask(body | {"max_tokens": limit}, key=key, stream=True)
            choice = answer["choices"][0]
            entries = choice["logprobs"]["content"]
            assert choice["message"]["content"].startswith("{")
            assert "".join(entry["token"] for entry in entries) == choice["message"]["content"] == t.text(key)
            ids = [number for delta in t.deltas(key) for number in delta.token_ids]
            assert min(ids) >= 0
            assert len(ids) == len(entries) == answer["usage"]["completion_tokens"] <= limit
            if choice["finish_reason"] == "length":
                assert len(ids) == limit
        if kind == "json_schema":
            assert choice["finish_reason"] == "stop"
            assert set(json.loads(choice["message"]["content"])) == {"word"}

    trial(model_file, test)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        {"enum": ["red", 5]},
        {"anyOf": [{"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}, {"type": "null"}]},
        {"$ref": "#/$defs/root", "$defs": {"root": {"type": "boolean"}}},
    ],
)
def test_json_that_is_no_object_goes_on_after_a_cut_too(model_file: Path, schema: dict[str, Any]) -> None:
    async def test(t: Trial) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = chat("Answer.", max_tokens=40, temperature=0, response_format=wanted)
        whole = await t.ask(body, key="whole", stream=True)
        assert whole["choices"][0]["finish_reason"] == "stop"
        json.loads(whole["choices"][0]["message"]["content"])
        for number, carried in enumerate(prefixes(t, "whole")):
            answer = await t.ask(body, key=f"from-{number}", stream=True, checkpoint=carried)
            assert answer["choices"][0]["finish_reason"] == "stop"
            content = answer["choices"][0]["message"]["content"]
            json.loads(content)
            assert content == carried.text + t.text(f"from-{number}")
            made = sum(len(delta.token_ids) for delta in t.deltas(f"from-{number}"))
            assert answer["usage"]["completion_tokens"] == carried.tokens + made
            assert answer["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]

    trial(model_file, test)


def test_tokens_without_text_are_counted_and_the_one_that_ends_an_answer_is_not() -> None:
    """What llama.cpp's chat route sends when JSON stands in a code fence, which it does not show."""

    def chunk(made: int, content: str | None, number: int) -> Chunk:
        entry = {"id": number, "token": "", "logprob": 0.0}
        choice = {"delta": {"content": content}, "logprobs": {"content": [entry]}}
        return CHUNK.decode(json.dumps({"choices": [choice], "timings": {"predicted_n": made}}))

    def begin() -> TokenCount:
        count = TokenCount(lambda _: [107], None)
        assert count.piece(chunk(1, None, 3725)) is None
        return count

    assert begin().rest(1, ended=False) == [3725]
    assert begin().rest(3, ended=False) == [3725, -1, -1]
    count = begin()
    piece = count.piece(chunk(4, "{", 107))
    assert piece is not None
    assert piece.ids == [3725, -1, -1, 107]
    assert count.rest(4, ended=False) == []
    assert count.rest(5, ended=True) == []
    assert count.rest(8, ended=True) == [-1, -1, -1]


def test_a_grammar_that_llama_cpp_words_otherwise_is_left_to_it() -> None:
    asked: list[bytes] = []

    def chat_route(request: bytes, on_answer: Callable[[bytes], bool]) -> None:
        asked.append(request)
        settings = {"grammar": 'root ::= "{" "}"' if len(asked) == 1 else 'response-format ::= "{}"\nroot ::= x'}
        on_answer(json.dumps({"__verbose": {"generation_settings": settings}}).encode())

    grammars = Grammars()
    assert grammars.of({"type": "json_object"}, chat_route) is None
    assert grammars.of({"type": "json_object"}, chat_route) == 'response-format ::= "{}"\nroot ::= response-format'
    assert grammars.of({"type": "json_object"}, chat_route) == 'response-format ::= "{}"\nroot ::= response-format'
    assert len(asked) == 2


def test_tools_are_not_silently_dropped(model_file: Path) -> None:
    """The template of this model has no place for tools."""
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}

    async def test(t: Trial) -> None:
        body = chat(
            "The weather in Paris?", max_tokens=6, temperature=0, tools=[{"type": "function", "function": function}]
        )
        error = (await t.ask(body))["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", "tools")
        answer = await t.ask(body | {"tool_choice": "none"}, key="none", stream=True)
        ChatCompletion.model_validate(answer)
        assert answer["usage"]["completion_tokens"] == 6 == sum(len(delta.token_ids) for delta in t.deltas("none"))
        both = body | {"tool_choice": "none", "response_format": {"type": "json_object"}, "logprobs": True}
        text = (await t.ask(both, key="both"))["choices"][0]["message"]["content"]
        assert text.startswith("{")
        malformed = await t.ask(body | {"tools": [{"type": "function"}]}, key="malformed")
        assert (malformed["error"]["code"], malformed["error"]["param"]) == ("invalid_value", "tools")

    trial(model_file, test)


def test_a_checkpoint_of_more_choices_than_were_asked_for_is_of_no_use_and_all_are_there(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Tell me a joke.", max_tokens=6, n=3, seed=7, temperature=1)
        wrong = Checkpoint(text="", tokens=12, choices=[CheckpointChoice(text="nonsense", tokens=3)] * 4)
        answer = await t.ask(body, checkpoint=wrong)
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert not any(text.startswith("nonsense") for text in texts)
        assert answer["usage"]["completion_tokens"] == sum(len(d.token_ids) for d in t.deltas("a"))
        again = await t.ask(body, key="again")
        assert [choice["message"]["content"] for choice in again["choices"]] == texts  # the seed holds

    trial(model_file, test, slots=1)


def test_ids_of_another_model_are_not_trusted(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Name a colour.", max_tokens=8, temperature=0)
        for ids in ([1, 2, 3], [99_999_999, 5, 6]):
            carried = Checkpoint(text="The colour is", tokens=3, token_ids=ids)
            answer = await t.ask(body, key=f"ids-{ids[0]}", checkpoint=carried)
            assert answer["choices"][0]["message"]["content"].startswith("The colour is")

    trial(model_file, test)


def test_what_the_model_cannot_run_is_the_customers_error(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        bad_schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frob"}}}
        for number, (body, code, param) in enumerate(
            [
                (chat("word " * 600), "context_length_exceeded", "messages"),
                (chat("x", response_format=bad_schema), "invalid_json_schema", "response_format"),
                (chat("x", functions=[{"name": "f"}]), "unsupported_parameter", "functions"),
                (chat("x", tool_choice={"type": "function"}), "invalid_value", "tool_choice"),
                ({"messages": [{"role": "user"}]}, "invalid_request", "messages"),
            ]
        ):
            (done,) = await t.run(work(body, key=f"k{number}"))
            error = json.loads(done.body)["error"]
            assert done.status == 400
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["code"], error["param"]) == (code, param)
        (done,) = await t.run(work({"prompt": "word " * 600}, key="c", kind=Kind.COMPLETION))
        error = json.loads(done.body)["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert "512" in error["message"]

    trial(model_file, test)


def test_an_answer_that_fills_the_context_ends_there_also_when_continued(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        bias = {"0": -100, "2": -100}
        body = {"prompt": "one two three " * 60, "max_tokens": 1000, "temperature": 0, "logit_bias": bias}
        whole = await t.ask(body, key="whole", kind=Kind.COMPLETION, stream=True)
        assert whole["choices"][0]["finish_reason"] == "length"
        assert whole["usage"]["total_tokens"] == 256
        last = t.checkpoint("whole")
        answer = await t.ask(body, key="full", kind=Kind.COMPLETION, checkpoint=last)
        assert answer["choices"] == whole["choices"]

    trial(model_file, test, context_tokens=256)


def test_requests_run_at_the_same_time(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        keys = [f"k{i}" for i in range(6)]
        body = chat("Count to a hundred.", max_tokens=12, temperature=0)
        await t.run(*[work(body, key=key, stream=True) for key in keys])
        first = {
            key: next(i for i, e in enumerate(t.events) if isinstance(e, Progressed) and e.key == key) for key in keys
        }
        last = {
            key: next(i for i, e in enumerate(t.events) if isinstance(e, Finished) and e.key == key) for key in keys
        }
        together = [sum(first[k] < at < last[k] for k in keys) for at in range(len(t.events))]
        assert max(together) == 3  # as many as there are slots, and never more
        assert max(first[key] for key in keys[:3]) < min(last.values())

    trial(model_file, test, slots=3)


def test_cancelled_attempts_give_their_slot_back(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Count to a thousand.", max_tokens=400, temperature=0)
        t.engine.submit([work(body, key=key, stream=True) for key in ("run", "wait")])
        await t.until(lambda: t.of(Progressed, "run"))
        t.engine.cancel(["run", "wait"])
        await t.until(lambda: len(t.of(Cancelled)) == 2)
        answer = await t.ask(chat("Hello", max_tokens=2), key="next")
        assert answer["usage"]["completion_tokens"] >= 1

    trial(model_file, test, slots=1)


def test_a_wrong_file_is_never_loaded(model_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    data = bytearray(model_file.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)

    async def refused(path: Path, says: str) -> None:
        t = Trial(build_engine(spec(path)))
        await t.engine.start(t._on_events)
        await t.until(lambda: t.of(Died))
        message = t.of(Died)[0].message
        assert str(path) in message
        assert says in message
        assert "motorpool models pull smollm2 --force" in message

    asyncio.run(refused(copy, "is not the one"))
    asyncio.run(refused(tmp_path / "none.gguf", "cannot be read"))


def test_the_log_holds_no_prompt(model_file: Path, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"

    async def test(t: Trial) -> None:
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frob"}}}
        await t.ask(chat("XYZZY", max_tokens=4))
        await t.ask(chat("XYZZY", response_format=bad), key="bad")

    trial(model_file, test, log_path=str(log))
    assert "XYZZY" not in log.read_text()
    assert log.stat().st_size < 4096
