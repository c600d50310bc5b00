"""Between responses and chat completions, both ways, with generated conversations."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from tests.api_cell import MODEL
from tests.response_trial import TOOL

from motorpool.errors import CallerError
from motorpool.server.cell import LiveAnswer
from motorpool.server.openai.requests import read_chat
from motorpool.server.openai.responses import request
from motorpool.server.openai.responses.creation import make_plan
from motorpool.server.openai.responses.items import check_calls, read_input, to_messages
from motorpool.server.openai.responses.objects import Message, facts_json, items_json, response_object
from motorpool.server.openai.responses.request import CreateRequest, read_request, read_tools
from motorpool.server.openai.responses.translate import (
    chat_body,
    failed_answer,
    output_items,
    read_answer,
    shorten,
)

texts = st.text('aé漢𝄞 \n"\\{}', max_size=20)
ids = st.text("abc", min_size=1, max_size=3)
names = st.text("abcXYZ_-09", min_size=1, max_size=8)
chat_calls = st.builds(
    lambda its_id, name, arguments: {
        "id": its_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    ids,
    names,
    texts,
)


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A conversation as chat messages in which each call has its output."""
    messages: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 5))):
        messages.append({"role": draw(st.sampled_from(["user", "system", "developer"])), "content": draw(texts)})
        calls = draw(st.lists(chat_calls, max_size=3, unique_by=lambda call: call["id"]))
        content = draw(texts.filter(bool)) if not calls else draw(st.none() | texts.filter(bool))
        said: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            said["tool_calls"] = calls
        messages.append(said)
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": draw(texts)} for call in calls]
    return messages


def as_input(messages: list[dict[str, Any]]) -> list[Raw]:
    """Chat messages as the input of a response: the way back, written anew."""
    given: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            given.append(
                {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
            )
            continue
        if message["content"] is not None:
            given.append({"role": message["role"], "content": message["content"]})
        given += [
            {"type": "function_call", "call_id": call["id"], **call["function"]}
            for call in message.get("tool_calls", ())
        ]
    return [Raw(msgspec.json.encode(item)) for item in given]


@given(turns())
def test_a_conversation_translated_there_and_back_is_the_same(messages: list[dict[str, Any]]) -> None:
    items = read_input(as_input(messages), "resp_x")
    check_calls(items)
    assert to_messages(items) == messages
    assert items_json.decode(msgspec.json.encode(items)) == items  # and through the store
    assert len({item.id for item in items}) == len(items)


@given(
    turns(),
    st.builds(
        lambda **fields: {name: value for name, value in fields.items() if value is not None},
        instructions=st.none() | texts,
        max_output_tokens=st.none() | st.integers(1, 99),
        temperature=st.none() | st.floats(0, 2),
        top_p=st.none() | st.floats(0, 1),
        top_logprobs=st.none() | st.integers(0, 20),
        tools=st.none() | st.just([TOOL]),
        parallel_tool_calls=st.none() | st.booleans(),
        service_tier=st.none() | st.sampled_from(request.TIERS),
        text=st.none()
        | st.sampled_from(
            [{"format": {"type": kind, "name": "n", "schema": {}}} for kind in ("text", "json_object", "json_schema")]
        ),
    ),
    st.booleans(),
)
def test_every_request_becomes_a_chat_completion_that_is_taken(
    messages: list[dict[str, Any]], fields: dict[str, Any], stream: bool
) -> None:
    asked_for = read_request(json.dumps({"model": MODEL, "input": "x"} | fields).encode())
    tools = read_tools(asked_for)
    body = chat_body(asked_for, tools, read_input(as_input(messages), "resp_x"), stream=stream, seed=7)
    chat = read_chat(body)
    assert (chat.stream, chat.seed, chat.limit_tokens) == (stream, 7, fields.get("max_output_tokens"))
    assert (chat.temperature, chat.top_p) == (fields.get("temperature"), fields.get("top_p"))
    assert bool(chat.tools) == ("tools" in fields)
    sent = json.loads(body)["messages"]
    if "instructions" in fields:
        assert sent.pop(0) == {"role": "system", "content": fields["instructions"]}
    assert sent == messages or not messages


@given(st.none() | texts, st.lists(chat_calls, max_size=3), st.integers(0, 9), st.sampled_from(["stop", "length"]))
def test_an_answer_becomes_items_that_say_the_same_when_they_are_sent_back(
    content: str | None, calls: list[dict[str, Any]], first: int, reason: str
) -> None:
    message = {"role": "assistant", "content": content, "tool_calls": calls or None}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": {"completion_tokens": 3}}
    answer = read_answer(LiveAnswer(status=200, body=msgspec.json.encode(body)))
    status = "completed" if reason == "stop" else "incomplete"
    output = output_items("resp_x", answer, answer.text, [], first=first, status=status)
    assert [int(item.id[-4:], 16) for item in output] == list(range(first, first + len(output)))
    assert {item.status for item in output} == {status}
    back = read_input([Raw(msgspec.json.encode(item)) for item in output], "resp_y")
    wanted: dict[str, Any] = {"role": "assistant", "content": (content or None) if calls else content or ""}
    if calls:
        wanted["tool_calls"] = calls
    assert to_messages(back) == [wanted]
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (3, 3)


@given(turns(), texts)
def test_a_shortened_conversation_keeps_its_end_and_its_order(messages: list[dict[str, Any]], last: str) -> None:
    whole = [*messages, {"role": "user", "content": last}]
    body: bytes | None = msgspec.json.encode({"model": MODEL, "messages": whole})
    before = whole
    for _ in range(60):
        assert body is not None
        body = shorten(body)
        if body is None:
            break
        kept = json.loads(body)["messages"]
        assert len(kept) < len(before)
        assert kept[-1] == whole[-1]
        rest = iter(before)
        assert all(message in rest for message in kept)  # the same messages in the same order
        fixed = [message for message in whole if message["role"] in {"system", "developer"}]
        assert [message for message in kept if message["role"] in {"system", "developer"}] == fixed
        called = {call["id"] for message in kept for call in message.get("tool_calls", ())}
        assert all(message["tool_call_id"] in called for message in kept if message["role"] == "tool")
        before = kept
    assert body is None, "it ends"


@given(st.binary(max_size=80))
def test_an_error_of_an_engine_is_an_error_whatever_it_is(data: bytes) -> None:
    failed = failed_answer(500, data)
    assert failed.error.code
    assert isinstance(failed.error.message, str)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.sampled_from(
        ["", "x", "auto", "function", "message", "user", "function_call", "json_schema", "allowed_tools"]
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["type", "role", "content", "text", "name", "call_id", "arguments", "output", "format", "schema", "mode",
             "tools", "parameters", "strict", "effort"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(CreateRequest.__struct_fields__), values, max_size=6))
def test_whatever_is_sent_is_planned_or_refused(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": MODEL} | fields).encode()
    try:
        plan = make_plan(read_request(body), [], "acme", 1_000_000, 10_000)
    except CallerError as refused:
        said = refused.message
    else:
        said = ""
    assert "x" not in said.split(), "an error repeats what was sent"
    if said:
        return
    chat = read_chat(plan.body)
    assert chat.model == plan.facts.model
    again = facts_json.decode(msgspec.json.encode(plan.facts))
    assert msgspec.json.encode(response_object(again, "queued")) == msgspec.json.encode(
        response_object(plan.facts, "queued")
    )


def test_items_of_one_response_have_their_own_ids() -> None:
    given = [Raw(b'{"role":"user","content":"a"}')] * 3
    items = read_input(given, "resp_ab")
    assert [item.id for item in items] == ["msg_abf000", "msg_abf001", "msg_abf002"]
    assert all(isinstance(item, Message) for item in items)
