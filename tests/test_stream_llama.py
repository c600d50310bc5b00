"""The real engine goes on with what another one began: the same bytes, the same grammar, the same draws."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine_trial import Trial, chat, work

from motorpool.agent.runtime import Backend, EngineSpec, build_engine
from motorpool.agent.runtime.engine import Cancelled, Progressed, Work
from motorpool.agent.runtime.llama_rest import GrammarError, Rest
from motorpool.agent.runtime.llama_run import SEGMENT
from motorpool.types import Kind
from motorpool.wire import Checkpoint, CheckpointChoice, Delta, encode_checkpoint

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "wheels": {"type": "integer"},
        "note": {"type": "string", "maxLength": 24},
    },
    "required": ["colour", "wheels", "note"],
}
WANTED = {"type": "json_schema", "json_schema": {"name": "car", "schema": SCHEMA, "strict": True}}


def trial(model_file: Path, test: Callable[[Trial], Awaitable[None]], **fields: Any) -> None:
    given: dict[str, Any] = {"slots": 2, "context_tokens": 512, "idle_priority": False} | fields
    spec = EngineSpec(backend=Backend.LLAMA, model="smollm2", model_path=str(model_file), **given)

    async def run() -> None:
        t = Trial(build_engine(spec))
        await t.start()
        try:
            await test(t)
        finally:
            await t.engine.close()

    asyncio.run(run())


def after(deltas: list[Delta], choices: int = 1) -> Checkpoint:
    """What the cell would hand on after these deltas."""
    parts = [CheckpointChoice() for _ in range(choices)]
    for delta in deltas:
        part = parts[delta.index]
        entries = json.loads(part.logprobs or b"[]") + json.loads(delta.logprobs or b"[]")
        parts[delta.index] = CheckpointChoice(
            text=part.text + delta.text,
            tokens=part.tokens + len(delta.token_ids),
            token_ids=part.token_ids + delta.token_ids,
            logprobs=json.dumps(entries).encode() if entries else b"",
            finish_reason=delta.finish_reason or part.finish_reason,
        )
    one = parts[0]
    if choices == 1:
        return Checkpoint(text=one.text, tokens=one.tokens, token_ids=one.token_ids, logprobs=one.logprobs)
    return Checkpoint(text="", tokens=sum(part.tokens for part in parts), choices=parts)


async def whole_of(t: Trial, body: dict[str, Any], key: str = "whole") -> tuple[list[Delta], dict[str, Any]]:
    answer = await t.ask(body, key=key, stream=True)
    assert "error" not in answer, answer
    return t.deltas(key), answer


def told(answer: dict[str, Any]) -> list[Any]:
    return [{name: value for name, value in choice.items() if name != "logprobs"} for choice in answer["choices"]]


async def goes_on(t: Trial, body: dict[str, Any], cut: Checkpoint, key: str, whole: dict[str, Any]) -> dict[str, Any]:
    (done,) = await t.run(work(body, key=key, stream=True, checkpoint=cut))
    answer: dict[str, Any] = json.loads(done.body)
    assert answer["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"], "the replayed part is not billed"
    assert done.usage.carried_tokens == cut.tokens
    return answer


@pytest.mark.llama
def test_json_goes_on_byte_for_byte_after_every_token(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Describe a blue car.", max_tokens=80, temperature=0, response_format=WANTED, logprobs=True)
        deltas, whole = await whole_of(t, body)
        assert whole["choices"][0]["finish_reason"] == "stop"
        text = whole["choices"][0]["message"]["content"]
        for count in range(1, len(deltas)):
            cut = after(deltas[:count])
            answer = await goes_on(t, body, cut, f"k{count}", whole)
            assert told(answer) == told(whole), f"after {cut.text!r}"
            assert cut.text + t.text(f"k{count}") == text
            assert answer["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
            entries = answer["choices"][0]["logprobs"]["content"]
            assert [each["token"] for each in entries] == [
                each["token"] for each in whole["choices"][0]["logprobs"]["content"]
            ]

    trial(model_file, test)


@pytest.mark.llama
def test_resumed_json_is_valid_also_without_ids_and_with_heat(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Describe a car.", max_tokens=90, temperature=1.5, response_format=WANTED, seed=5)
        deltas, _ = await whole_of(t, body)
        for count in range(0, len(deltas), 3):
            cut = after(deltas[:count])
            for ids in (cut.token_ids, []):
                key = f"k{count}-{len(ids)}"
                carried = Checkpoint(text=cut.text, tokens=cut.tokens, token_ids=ids)
                answer = await t.ask(body, key=key, stream=True, checkpoint=carried)
                content = answer["choices"][0]["message"]["content"]
                assert content == cut.text + t.text(key)
                assert answer["choices"][0]["finish_reason"] == "stop"
                value = json.loads(content)
                assert set(value) == {"colour", "wheels", "note"}
                assert value["colour"] in {"red", "blue"}

    trial(model_file, test)


@pytest.mark.llama
def test_draws_with_a_seed_go_on_as_if_unbroken(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        limit = 2 * SEGMENT + 8
        body = chat("Tell me about a trip by car.", max_tokens=limit, temperature=0.9, seed=11)
        deltas, whole = await whole_of(t, body)
        again, other = await whole_of(t, body, "again"), await whole_of(t, body | {"seed": 12}, "other")
        assert told(again[1]) == told(whole) != told(other[1])
        same = 0
        counts = [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT - 3, 2 * SEGMENT + 3]
        for count in counts:
            cut = after(deltas[:count])
            answer = await goes_on(t, body, cut, f"k{count}", whole)
            assert answer["choices"][0]["message"]["content"].startswith(cut.text)
            assert cut.text + t.text(f"k{count}") == answer["choices"][0]["message"]["content"]
            same += told(answer) == told(whole)
        assert same == len(counts)

    trial(model_file, test)


@pytest.mark.llama
def test_each_of_several_choices_goes_on_from_its_own_place(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Name a colour.", max_tokens=10, temperature=0.8, seed=3, n=2)
        deltas, whole = await whole_of(t, body)
        for count in range(1, len(deltas), 4):
            cut = after(deltas[:count], 2)
            answer = await goes_on(t, body, cut, f"k{count}", whole)
            assert told(answer) == told(whole), f"after {count} of {len(deltas)}"
            for index in range(2):
                text = cut.choices[index].text + t.text(f"k{count}", index)
                assert text == whole["choices"][index]["message"]["content"]
            ends = [d for d in [*deltas[:count], *t.deltas(f"k{count}")] if d.finish_reason]
            assert sorted(d.index for d in ends) == [0, 1], "each end is told once"

    trial(model_file, test)


@pytest.mark.llama
def test_a_cut_within_characters_of_several_tokens_and_stop_strings(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body: dict[str, Any] = {"prompt": "A row of cars: 🚗🚗🚗🚗🚗🚗🚗🚗🚗🚗🚗🚗", "max_tokens": 14, "temperature": 0}
        (done,) = await t.run(work(body, key="whole", kind=Kind.COMPLETION, stream=True))
        whole = json.loads(done.body)
        deltas = t.deltas("whole")
        assert "🚗" in whole["choices"][0]["text"]
        for number, count in enumerate(range(1, len(deltas))):
            cut = after(deltas[:count])
            (done,) = await t.run(work(body, key=f"k{number}", kind=Kind.COMPLETION, stream=True, checkpoint=cut))
            assert json.loads(done.body)["choices"] == whole["choices"]
            assert cut.text + t.text(f"k{number}") == whole["choices"][0]["text"]

    trial(model_file, test)


@pytest.mark.llama
def test_what_was_read_ahead_is_not_read_again(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        body = chat("Why is the sky blue? " * 12, max_tokens=20, temperature=0)
        deltas, whole = await whole_of(t, body, "elsewhere")
        other = chat("Something else entirely, to take the place. " * 8, max_tokens=2, temperature=0)
        await t.run(work(other, key="wash-1"), work(other, key="wash-2"))
        cut = after(deltas[:8])
        held = Work(
            key="held",
            kind=Kind.CHAT,
            body=json.dumps(body).encode(),
            response_id="id-same",
            created_s=0,
            stream=True,
            checkpoint=encode_checkpoint(Checkpoint(text=cut.text, tokens=8, token_ids=cut.token_ids, hold=True)),
        )
        t.engine.submit([held])
        await t.until(lambda: t.of(Progressed, "held"))
        assert t.deltas("held") == [], "it only reads"
        assert "held" not in t.ended, "and keeps its place"
        await t.run(work(other, key="beside"))
        t.engine.cancel(["held"])
        answer = await goes_on(t, body, after(deltas[:10]), "on", whole)
        assert isinstance(t.ended["held"], Cancelled)
        assert told(answer) == told(whole)
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == whole["usage"]["prompt_tokens"], "all of the prompt was there"

    trial(model_file, test)


@pytest.mark.llama
def test_an_answer_depends_neither_on_what_was_read_before_nor_on_its_company(model_file: Path) -> None:
    bodies = [chat("filler " * (20 * k) + f"Trip {k}: where to?", max_tokens=12, temperature=0) for k in range(4)]
    alone: list[str] = []

    async def first(t: Trial) -> None:
        for k, body in enumerate(bodies):
            alone.append((await t.ask(body, key=f"k{k}"))["choices"][0]["message"]["content"])

    async def second(t: Trial) -> None:
        await t.ask(chat("something long " * 60, max_tokens=1), key="before")
        done = await t.run(*[work(body, key=f"k{k}", stream=True) for k, body in enumerate(bodies)])
        assert [json.loads(each.body)["choices"][0]["message"]["content"] for each in done] == alone

    trial(model_file, first)
    trial(model_file, second, slots=4)


# -- the grammar of the rest, without a model


GRAMMAR = r"""
root ::= object
object ::= "{" space "\"a\":" space (number | text) space "}"
number ::= "-"? [0-9]{1,3} ("." [0-9]+)?
text ::= "\"" ([^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})){0,5} "\""
space ::= | " " | "\n"{1,2} [ \t]{0,4}
"""


def test_a_grammar_takes_its_own_texts_in_any_number_of_parts() -> None:
    for text in ('{"a":12}', '{ "a": -1.25 }', '{"a":"é\\u00e9🚗"}', '{\n\n  "a":""}'):
        for cut in range(len(text) + 1):
            first = Rest(GRAMMAR)
            assert first.advance(text[:cut])
            second = Rest(first.grammar())
            assert second.advance(text[cut:]), (text, cut)
            assert second.is_over
            assert not second.advance("x")


def test_a_grammar_refuses_what_is_not_its_own_at_the_same_place_in_any_part() -> None:
    for text in ('{"a":1234}', '{"a":-}', '{"b"', '{"a":"123456"}', '{"a":"\n"', "[", '{"a":1}}'):
        for cut in range(len(text)):
            first = Rest(GRAMMAR)
            if first.advance(text[:cut]):
                assert not Rest(first.grammar()).advance(text[cut:]), (text, cut)
    assert not Rest(GRAMMAR).is_over


@pytest.mark.parametrize("bad", ["", "a ::= b", 'root ::= "x', "root ::= (a", "root ::= [a", "root ::= a )", "x"])
def test_a_notation_that_is_not_known_is_an_error_and_no_guess(bad: str) -> None:
    with pytest.raises(GrammarError):
        Rest(bad)


def test_an_endless_empty_repetition_comes_to_an_end() -> None:
    rest = Rest('root ::= ("a"? "b"*)* "c"')
    assert rest.advance("abba")
    assert rest.advance("c")
    assert rest.is_over
