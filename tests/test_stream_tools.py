"""Tool calls in fragments: each leaves once, in order, whoever makes it; the real engine goes on within a call."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.agent.runtime import llama
from motorpool.agent.runtime.calls import Calls
from motorpool.agent.runtime.engine import EngineEvent, Finished, Progressed, Work
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.errors import EngineError
from motorpool.server.live_call import Transcript
from motorpool.types import Kind
from motorpool.wire import Delta

# -- what of a call is new

calls = st.lists(st.tuples(st.sampled_from(["find", "park", "p"]), st.text(max_size=12)), min_size=1, max_size=3)


def parts_of(made: list[tuple[str, str]], cuts: list[int], ids: str) -> list[list[dict[str, Any]]]:
    """The parts in which an engine gives out these calls: the name, then the arguments, cut at these places."""
    out: list[list[dict[str, Any]]] = []
    for place, (name, arguments) in enumerate(made):
        head = {"index": place, "id": f"{ids}{place}", "type": "function", "function": {"name": name, "arguments": ""}}
        borders = [0, *sorted({min(cut, len(arguments)) for cut in cuts}), len(arguments)]
        out.append([head])
        out += [
            [{"index": place, "function": {"arguments": arguments[begin:end]}}]
            for begin, end in itertools.pairwise(borders)
        ]
    return out


def put_together(fragments: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """As a customer's client does it; a place, an id and a name come once, before the arguments."""
    out: list[list[str]] = []
    for each in fragments:
        if "id" in each:
            assert each["index"] == len(out)
            assert each["function"]["arguments"] == ""
            out.append([each["id"], each["function"]["name"], ""])
        else:
            assert each["function"].keys() == {"arguments"}
            assert each["function"]["arguments"]
            out[each["index"]][2] += each["function"]["arguments"]
    return [(one, two, three) for one, two, three in out]


@given(calls, st.lists(st.lists(st.integers(0, 12), max_size=5), min_size=1, max_size=4), st.data())
def test_each_fragment_leaves_once_however_often_the_vehicle_changes(
    made: list[tuple[str, str]], ways: list[list[int]], data: st.DataObject
) -> None:
    """Every vehicle begins the message anew, and cuts it into parts in its own way."""
    transcript = Transcript(1)
    fragments: list[dict[str, Any]] = []
    for number, cuts in enumerate(ways):
        parts = parts_of(made, cuts, f"of {number}, ")
        is_last = number == len(ways) - 1
        count = len(parts) if is_last else data.draw(st.integers(0, len(parts)))
        told = transcript._checkpoint(with_logprobs=True).calls
        engine = Calls(told)
        for part in parts[:count]:
            new = engine.feed(part)
            transcript.note([Delta(index=0, text="", calls=new)])
            fragments += json.loads(new or b"[]")
        assert not is_last or engine.caught_up
    found = put_together(fragments)
    assert [(name, arguments) for _, name, arguments in found] == made
    whole = json.loads(transcript._checkpoint(with_logprobs=True).calls)
    assert [each["id"] for each in whole] == [name for name, _, _ in found]


@pytest.mark.parametrize(
    "parts",
    [
        [{"index": 0, "function": {"name": "park", "arguments": ""}}],
        [{"index": 0, "function": {"name": "find", "arguments": '{"b"'}}],
        [{"index": 2, "function": {"name": "find", "arguments": ""}}],
    ],
)
def test_another_call_than_the_customer_has_is_an_error_and_no_mixture(parts: list[dict[str, Any]]) -> None:
    first = Calls()
    first.feed([{"index": 0, "id": "x", "function": {"name": "find", "arguments": '{"a": 1'}}])
    told = json.dumps(first.whole()).encode()
    with pytest.raises(EngineError):
        Calls(told).feed(parts)
    assert not Calls(told).caught_up


def test_a_call_without_an_id_has_the_same_one_on_every_vehicle() -> None:
    part = {"index": 0, "function": {"name": "find", "arguments": "{}"}}
    (one, *_), (two, *_) = (json.loads(Calls(seed="answer").feed([part])) for _ in range(2))
    assert one["id"] == two["id"]
    assert one["id"] != json.loads(Calls(seed="another").feed([part]))[0]["id"]


# -- the real engine, with a template that knows tools

TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\nYou may call tools.\\n<tools>' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- '</tools>\\nFor each call answer with <tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}' }}
{{- '\\n</tool_call><|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}
{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
FIND = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "hours": {"type": "integer"}},
    "required": ["place", "hours"],
}


def asked_before(place: str, hours: int) -> list[dict[str, Any]]:
    """A small model calls a tool if it sees that this is how it goes."""
    call = {"name": "find", "arguments": json.dumps({"place": place, "hours": hours})}
    return [
        {"role": "user", "content": f"Find a place near the {place} for {hours} hours."},
        {"role": "assistant", "content": "", "tool_calls": [{"id": place, "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": place, "content": "found"},
    ]


BODY: dict[str, Any] = {
    "messages": [
        *asked_before("zoo", 3),
        *asked_before("big harbour", 2),
        *asked_before("old library", 5),
        {"role": "user", "content": "Find a place near the museum for six hours."},
    ],
    "tools": [{"type": "function", "function": {"name": "find", "parameters": FIND}}],
    "tool_choice": "required",
    "max_tokens": 80,
}


class Backends:
    """Runs attempts on llama.cpp in this process, one after the other."""

    def __init__(self, model_file: Path) -> None:
        self._events: list[EngineEvent] = []
        self._ended = asyncio.Event()
        spec = EngineSpec(
            backend=Backend.LLAMA, model="smollm2", model_path=str(model_file), slots=1, context_tokens=1024
        )
        self.backend = llama.LlamaBackend(spec, self._emit)

    def _emit(self, events: list[EngineEvent]) -> None:
        self._events += events
        if any(isinstance(event, Finished) for event in events):
            self._ended.set()

    async def ask(self, body: dict[str, Any], checkpoint: bytes | None = None) -> tuple[list[Delta], Finished]:
        self._events.clear()
        self._ended.clear()
        work = Work(
            key="k", kind=Kind.CHAT, body=json.dumps(body).encode(), response_id="id", created_s=0, stream=True,
            checkpoint=checkpoint,
        )  # fmt: skip
        self.backend.submit([work])
        async with asyncio.timeout(60):
            await self._ended.wait()
        (finished,) = [event for event in self._events if isinstance(event, Finished)]
        return [delta for event in self._events if isinstance(event, Progressed) for delta in event.deltas], finished


@pytest.mark.llama
@pytest.mark.parametrize("temperature", [0, 1.2])
def test_llama_goes_on_within_a_call_after_every_fragment(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    parameters: Callable[..., Any] = llama._parameters

    def with_template(*given: Any) -> Any:
        made = parameters(*given)
        made.chat_template = TEMPLATE
        return made

    monkeypatch.setattr(llama, "_parameters", with_template)
    body = BODY | {"temperature": temperature}

    async def test() -> None:
        backends = Backends(model_file)
        await backends.backend.load()
        deltas, whole = await backends.ask(body)
        assert whole.status == 200, whole.body
        choice = json.loads(whole.body)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        ((call_id, name, arguments),) = put_together(fragments_of(deltas))
        assert (name, set(json.loads(arguments))) == ("find", {"place", "hours"})
        assert len([delta for delta in deltas if delta.calls]) > 5, "in fragments, not in one piece"
        made = sum(len(delta.token_ids) for delta in deltas)
        assert made == whole.usage.completion_tokens
        for count in range(1, len(deltas), 2):
            transcript = Transcript(1)
            transcript.note(deltas[:count])
            rest, again = await backends.ask(body, transcript.checkpoint())
            assert again.status == 200, again.body
            assert put_together(fragments_of(deltas[:count] + rest)) == [(call_id, name, arguments)], f"after {count}"
            assert [delta.finish_reason for delta in rest if delta.finish_reason] == ["tool_calls"]
            assert again.usage.completion_tokens == made
            assert again.usage.prompt_tokens == whole.usage.prompt_tokens
            assert again.usage.carried_tokens == transcript.tokens
            assert transcript.tokens + sum(len(delta.token_ids) for delta in rest) == made

    asyncio.run(test())


def fragments_of(deltas: list[Delta]) -> list[dict[str, Any]]:
    return [each for delta in deltas for each in json.loads(delta.calls or b"[]")]
