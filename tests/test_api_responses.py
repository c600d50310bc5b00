"""Responses over HTTP with the official client and the null engine: requests, objects, tools, refusals."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tests.api_cell import MODEL, Item, Running, serve
from tests.response_trial import ASKED, CALL, TOOL, answering, asked, post, refusing

from motorpool.core.attribution import Footprint
from motorpool.server.cell import LiveAnswer, LiveRequest
from motorpool.server.live_call import About, WholeAnswer
from motorpool.server.openai.responses import request, runs
from motorpool.server.openai.responses.request import CreateRequest


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    yield shared
    shared.cell.script = None
    shared.cell.capacity = True
    shared.cell.write_error = None
    shared.cell.ahead_ms = 0


@pytest.fixture(scope="module")
def official(shared: Running) -> Iterator[openai.OpenAI]:
    with shared.client() as made:
        yield made


@pytest.fixture
def client(server: Running, official: openai.OpenAI) -> openai.OpenAI:
    return official


# -- create


def test_a_text_is_answered_as_the_chat_would_be(client: openai.OpenAI, server: Running) -> None:
    response = client.responses.create(model=MODEL, input=ASKED, instructions="Be short.", max_output_tokens=7)
    assert asked(server) == {
        "model": MODEL,
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": ASKED}],
        "stream": False,
        "max_completion_tokens": 7,
    }
    assert (response.object, response.model, response.instructions) == ("response", MODEL, "Be short.")
    assert (response.status, response.error) == ("incomplete", None)
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert len(response.output_text.split()) == 7
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (5, 7, 12)
    assert response._request_id == server.cell.asked[-1].request_id


def test_a_response_has_every_field_that_openai_requires(server: Running) -> None:
    response = post(server, {"model": MODEL, "input": ASKED}).json()
    required = "id object created_at error incomplete_details instructions model tools output parallel_tool_calls"
    assert set(f"{required} metadata tool_choice temperature top_p".split()) <= set(response)
    assert response["id"].startswith("resp_")
    assert response["status"] == "completed"
    assert response["completed_at"] >= response["created_at"]
    assert response["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    message = response["output"][0]
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert set(message["content"][0]) == {"type", "annotations", "logprobs", "text"}


def test_what_was_asked_is_shown_again(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input=ASKED, metadata={"a": "b"}, temperature=0.5, top_p=0.9, truncation="auto", user="u",
        safety_identifier="s", prompt_cache_key="k", max_tool_calls=3, parallel_tool_calls=False, tools=[TOOL],
        tool_choice="none", service_tier="flex", include=["reasoning.encrypted_content"],
        prompt_cache_retention="24h", reasoning={"effort": "none"}, extra_body={"prompt_cache_options": {"ttl": "30m"}},
    )  # fmt: skip
    shown = response.to_dict()
    assert {name: shown[name] for name in ("metadata", "temperature", "top_p", "truncation", "user")} == {
        "metadata": {"a": "b"}, "temperature": 0.5, "top_p": 0.9, "truncation": "auto", "user": "u",
    }  # fmt: skip
    assert (shown["safety_identifier"], shown["prompt_cache_key"], shown["max_tool_calls"]) == ("s", "k", 3)
    assert (shown["parallel_tool_calls"], shown["tool_choice"], shown["tools"]) == (False, "none", [TOOL])
    assert shown["service_tier"] == "flex"


def test_sampling_and_more_than_openai_takes_reaches_the_vehicle(client: openai.OpenAI, server: Running) -> None:
    client.responses.create(
        model=MODEL, input=ASKED, temperature=0.5, top_p=0.9, service_tier="flex",
        extra_body={"seed": 5, "stop": ["x"], "frequency_penalty": 1, "presence_penalty": -1},
    )  # fmt: skip
    body = asked(server)
    wanted = {"temperature": 0.5, "top_p": 0.9, "seed": 5, "stop": ["x"], "service_tier": "flex"}
    assert {name: body[name] for name in wanted} == wanted
    assert (body["frequency_penalty"], body["presence_penalty"]) == (1, -1)


def test_a_probe_without_input_is_answered(client: openai.OpenAI) -> None:
    nothing: list[Any] = ["", []]
    for empty in nothing:
        assert client.responses.create(model=MODEL, input=empty, max_output_tokens=1).status == "incomplete"
    assert client.responses.create(model=MODEL).status == "completed"


def test_messages_of_every_kind_are_read(client: openai.OpenAI, server: Running) -> None:
    given: Any = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
        {"type": "message", "role": "assistant", "id": "msg_x", "status": "completed", "phase": "final_answer",
         "content": [{"type": "output_text", "text": "three", "annotations": [], "logprobs": []}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "four"},
    ]  # fmt: skip
    response = client.responses.create(model=MODEL, input=given)
    assert asked(server)["messages"] == [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "four"},
    ]
    assert response.status == "completed"


def test_json_schema_and_json_object(client: openai.OpenAI, server: Running) -> None:
    schema: dict[str, object] = {"type": "object", "properties": {"kind": {"enum": ["letter"]}}, "required": ["kind"]}
    response = client.responses.create(
        model=MODEL,
        input=ASKED,
        text={"format": {"type": "json_schema", "name": "it", "schema": schema, "strict": True}},
    )
    assert json.loads(response.output_text) == {"kind": "letter"}
    assert asked(server)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "it", "schema": schema, "strict": True},
    }
    assert response.text is not None
    assert response.text.to_dict()["format"]["name"] == "it"  # type: ignore[index]
    response = client.responses.create(model=MODEL, input=ASKED, text={"format": {"type": "json_object"}})
    assert isinstance(json.loads(response.output_text), dict)


def test_the_clients_own_parsing_of_a_schema(client: openai.OpenAI) -> None:
    class Letter(BaseModel):
        kind: str
        pages: int

    parsed = client.responses.parse(model=MODEL, input=ASKED, text_format=Letter).output_parsed
    assert isinstance(parsed, Letter)


def test_logprobs_stand_in_the_text(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input=ASKED, max_output_tokens=3, top_logprobs=2, include=["message.output_text.logprobs"]
    )
    message: Any = response.output[0]
    part = message.content[0]
    assert "".join(entry.token for entry in part.logprobs) == response.output_text
    assert [len(entry.top_logprobs) for entry in part.logprobs] == [2, 2, 2]
    assert response.top_logprobs == 2


def test_energy_and_how_it_came_about_stand_beside_the_tokens(client: openai.OpenAI, server: Running) -> None:
    plain = answering("hi")

    async def script(live: LiveRequest) -> AsyncIterator[Item]:
        async for item in plain(live):
            assert isinstance(item, LiveAnswer)
            footprint = Footprint(energy_uwh=2_000_000, co2_ug=5_000_000, is_measured=True)
            about = About(continued=2)
            yield WholeAnswer(status=200, body=item.body, footprint=footprint, about=about)

    server.cell.script = script
    usage = client.responses.create(model=MODEL, input=ASKED).usage
    assert usage is not None
    assert usage.to_dict() == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 7,
        "motorpool": {"energy_wh": 2.0, "co2_g": 5.0, "measured": True, "continued": 2},
    }


# -- tools


def test_a_function_is_called_and_its_output_read(client: openai.OpenAI, server: Running) -> None:
    server.cell.script = answering("Let me see.", "tool_calls", tool_calls=[CALL, CALL | {"id": "call_2"}])
    response = client.responses.create(model=MODEL, input="Weather in Ulm?", tools=[TOOL])
    assert asked(server)["tools"] == [{"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}]
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
    call = response.output[1]
    assert call.type == "function_call"
    assert (call.call_id, call.name, call.arguments) == ("call_1", "get_weather", '{"place":"Ulm"}')
    server.cell.script = answering("Sunny.")
    outputs: Any = [
        {"type": "function_call_output", "call_id": "call_1", "output": "sun"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    follow = client.responses.create(model=MODEL, input=outputs, previous_response_id=response.id, tools=[TOOL])
    assert follow.output_text == "Sunny."
    by_id = asked(server)["messages"]
    assert by_id == [
        {"role": "user", "content": "Weather in Ulm?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL | {"id": "call_2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "rain"}]},
    ]
    # The same conversation by hand, as clients that keep it themselves send it.
    given: Any = ["x", *[item.to_dict() for item in response.output], *outputs]
    given[0] = {"role": "user", "content": "Weather in Ulm?"}
    client.responses.create(model=MODEL, input=given, tools=[TOOL], store=False)
    assert asked(server)["messages"] == by_id


def test_calls_without_an_id_get_one(client: openai.OpenAI, server: Running) -> None:
    server.cell.script = answering(None, "tool_calls", tool_calls=[CALL | {"id": ""}, CALL | {"id": ""}])
    output = client.responses.create(model=MODEL, input=ASKED, tools=[TOOL]).output
    ids = {item.call_id for item in output if item.type == "function_call"}
    assert len(ids) == len(output) == 2
    assert all(ids)


@pytest.mark.parametrize(
    ("choice", "names", "word"),
    [
        ("none", ["a", "b"], "none"),
        ("required", ["a", "b"], "required"),
        ({"type": "function", "name": "b"}, ["b"], "required"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "a"}]}, ["a"], "auto"),
    ],
)
def test_a_choice_of_tools_is_one_that_every_engine_can_follow(
    client: openai.OpenAI, server: Running, choice: Any, names: list[str], word: str
) -> None:
    server.cell.script = answering("x")
    tools: Any = [{"type": "function", "name": name, "parameters": {}, "strict": False} for name in ("a", "b")]
    response = client.responses.create(model=MODEL, input=ASKED, tools=tools, tool_choice=choice)
    body = asked(server)
    assert ([tool["function"]["name"] for tool in body["tools"]], body["tool_choice"]) == (names, word)
    shown = response.to_dict()
    assert shown["tool_choice"] == choice
    assert [tool["name"] for tool in shown["tools"]] == ["a", "b"]  # type: ignore[attr-defined]


def test_tools_that_openai_runs_are_left_out_and_named(client: openai.OpenAI, server: Running) -> None:
    tools: Any = [{"type": "web_search"}, TOOL, {"type": "custom", "name": "apply_patch"}, {"type": "namespace"}]
    server.cell.script = answering("x")
    response = client.responses.create(model=MODEL, input=ASKED, tools=tools)
    assert [tool.type for tool in response.tools] == ["function"]
    assert response.to_dict()["motorpool"] == {"skipped_tools": ["web_search", "custom", "namespace"]}
    plain = client.responses.create(model=MODEL, input=ASKED, tools=[{"type": "web_search_2025_08_26"}])
    assert "tools" not in asked(server)
    assert plain.tools == []


def test_a_refusal_is_a_part_of_its_own(client: openai.OpenAI, server: Running) -> None:
    server.cell.script = answering(None, refusal="I would rather not")
    response = client.responses.create(model=MODEL, input=ASKED)
    assert response.to_dict()["output"][0]["content"] == [  # type: ignore[index]
        {"type": "refusal", "refusal": "I would rather not"}
    ]


def test_filtered_content_is_incomplete(client: openai.OpenAI, server: Running) -> None:
    server.cell.script = answering("x", "content_filter")
    response = client.responses.create(model=MODEL, input=ASKED)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "content_filter"


# -- what is refused

USER = {"role": "user", "content": "x"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "x"}
INPUT_CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"frobnicate": 1}, "unknown_parameter", "frobnicate"),
    *(({name: {"x": 1}}, "unsupported_parameter", name) for name in request.REFUSED),
    ({"model": ""}, "invalid_value", "model"),
    ({"input": 5}, "invalid_type", "input"),
    ({"input": [5]}, "invalid_type", "input[0]"),
    ({"input": [{"content": "x"}]}, "missing_required_parameter", "input[0].role"),
    ({"input": [{"role": "user"}]}, "missing_required_parameter", "input[0].content"),
    ({"input": [{"role": "tool", "content": "x"}]}, "invalid_value", "input[0].role"),
    ({"input": [USER, {"role": "user", "content": 5}]}, "invalid_type", "input[1].content"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "unsupported_parameter",
        "input[0].content[0].type",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "missing_required_parameter",
        "input[0].content[0].text",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
        "unsupported_parameter",
        "input[0].content[0].type",
    ),
    ({"input": [{"type": "reasoning", "summary": []}]}, "unsupported_parameter", "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_parameter", "input[0].type"),
    ({"input": [OUTPUT]}, "invalid_value", "input"),
    ({"input": [INPUT_CALL]}, "invalid_value", "input"),
    ({"input": [{"type": "function_call", "call_id": "c"}]}, "missing_required_parameter", "input[0].name"),
    (
        {"input": [INPUT_CALL, {"type": "function_call_output", "call_id": "c"}]},
        "missing_required_parameter",
        "input[1].output",
    ),
    (
        {"input": [INPUT_CALL, OUTPUT | {"output": [{"type": "input_file"}]}]},
        "unsupported_parameter",
        "input[1].output[0].type",
    ),
    ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    ({"temperature": 3}, "invalid_value", "temperature"),
    ({"top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"truncation": "some"}, "invalid_value", "truncation"),
    ({"service_tier": "ultrafast"}, "invalid_value", "service_tier"),
    ({"include": ["everything"]}, "invalid_value", "include[0]"),
    ({"text": {"verbosity": "high"}}, "unsupported_parameter", "text.verbosity"),
    ({"text": {"verbosity": "loud"}}, "invalid_value", "text.verbosity"),
    ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "missing_required_parameter", "text.format.schema"),
    (
        {"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}},
        "invalid_value",
        "text.format.name",
    ),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": []}}},
        "invalid_type",
        "text.format.schema",
    ),
    ({"reasoning": {"effort": "high"}}, "unsupported_parameter", "reasoning.effort"),
    ({"reasoning": {"summary": "auto"}}, "unsupported_parameter", "reasoning.summary"),
    ({"background": True, "store": False}, "invalid_value", "background"),
    ({"stream_options": {"include_obfuscation": False}}, "invalid_value", "stream_options"),
    ({"tools": [{"name": "f"}]}, "missing_required_parameter", "tools[0].type"),
    ({"tools": [{"type": 5}]}, "invalid_type", "tools[0].type"),
    ({"tools": [{"type": "functoin"}]}, "invalid_value", "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "invalid_value", "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "strict": 1}]}, "invalid_type", "tools[0].strict"),
    ({"tools": [{"type": "function", "name": "f", "async": True}]}, "unknown_parameter", "tools[0].async"),
    ({"tools": [TOOL] * 129}, "invalid_value", "tools"),
    ({"tool_choice": "sometimes"}, "invalid_value", "tool_choice"),
    ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "web_search"}, "tools": [TOOL]}, "unsupported_parameter", "tool_choice.type"),
    ({"tool_choice": {"type": "function", "name": "x"}, "tools": [TOOL]}, "invalid_value", "tool_choice"),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}, "tools": [TOOL]},
        "invalid_value",
        "tool_choice.tools",
    ),
    ({"metadata": {"a": 1}}, "invalid_type", "metadata"),
    ({"previous_response_id": "resp_no"}, "previous_response_not_found", "previous_response_id"),
]


@pytest.mark.parametrize(("fields", "code", "param"), REFUSALS, ids=[f"{code}-{param}" for _, code, param in REFUSALS])
def test_what_cannot_be_served_is_refused_by_name(
    server: Running, fields: dict[str, Any], code: str, param: str
) -> None:
    before = len(server.cell.asked)
    response = post(server, {"model": MODEL, "input": "x"} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(server.cell.asked) == before


def test_null_is_the_same_as_leaving_a_field_out(server: Running) -> None:
    fields = dict.fromkeys([*CreateRequest.__struct_fields__, *request.REFUSED, "new_field"])
    assert post(server, fields | {"model": MODEL, "input": "x"}).status_code == 200


def test_bodies_that_are_no_request(server: Running) -> None:
    assert post(server, b"{").json()["error"]["code"] == "invalid_json"
    assert post(server, b"[]").json()["error"]["code"] == "invalid_type"
    assert post(server, {"input": "x"}).json()["error"]["param"] == "model"
    assert post(server, {"model": "nope", "input": "x"}).json()["error"]["code"] == "model_not_found"
    many = [USER] * 4001
    assert post(server, {"model": MODEL, "input": many}).json()["error"]["param"] == "input"
    long = post(server, {"model": MODEL, "input": "x" * (4 * 1024 * 1024 - 40)})
    assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_engine_names_the_field_that_was_sent(server: Running, stream: bool) -> None:
    for theirs, ours in (
        ("messages", "input"),
        ("messages[3].content", "input[3].content"),
        ("response_format", "text.format"),
        ("tools", "tools"),
        (None, None),
    ):
        server.cell.script = refusing(400, "unsupported_value", theirs)
        response = post(server, {"model": MODEL, "input": "x", "stream": stream})
        assert (response.status_code, response.json()["error"]["param"]) == (400, ours)


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_vehicle_the_client_is_told_when_to_come_back(server: Running, stream: bool) -> None:
    server.cell.capacity = False
    response = post(server, {"model": MODEL, "input": "x", "stream": stream})
    assert (response.status_code, response.headers["retry-after-ms"]) == (503, "1500")
    assert response.json()["error"]["code"] == "no_vehicle_available"


def test_an_unexpected_failure_says_nothing_of_what_was_asked(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        raise RuntimeError(hidden)
        yield

    hidden = "secret detail"
    server.cell.script = script
    response = post(server, {"model": MODEL, "input": "a private matter"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert hidden not in response.text + caplog.text
    assert "private" not in caplog.text


def test_an_answer_that_is_none_is_an_error(server: Running) -> None:
    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveAnswer(status=200, body=b'{"choices":[]}')

    server.cell.script = script
    response = post(server, {"model": MODEL, "input": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_error")


# -- a conversation that does not fit


def test_a_conversation_that_is_too_long_is_refused_or_shortened(client: openai.OpenAI, server: Running) -> None:
    given: Any = [{"role": "user", "content": f"word{n} " * 300} for n in range(30)]
    given.insert(0, {"role": "system", "content": "Stay."})
    given.append({"role": "user", "content": "last"})
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input=given)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    before = len(server.cell.asked)
    response = client.responses.create(model=MODEL, input=given, truncation="auto", instructions="Be short.")
    messages = asked(server)["messages"]
    assert [message["content"] for message in messages[:2]] == ["Be short.", "Stay."]
    assert messages[-1]["content"] == "last"
    assert 3 < len(messages) < len(given)
    assert messages[2:] == [{"role": "user", "content": item["content"]} for item in given[1 - len(messages) + 1 :]]
    requests = server.cell.asked[before:]
    assert len({live.request_id for live in requests}) == len(requests) > 1
    assert response.usage is not None
    assert response.usage.input_tokens < 4096
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=MODEL, input="word " * 5000, truncation="auto")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"null","tools":[{"type":"\xff"}]}',
        b'{"model":"null","input":[{"role":"user","content":"\xff"}]}',
        b'{"model":"null","tools":[{"type":"function","name":"f","parameters":{"a":"\\ud800"}}]}',
        b'{"model":"null","input":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_text_that_is_none_is_refused_wherever_it_stands(server: Running, body: bytes) -> None:
    response = post(server, body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_a_fault_of_ours_leaves_nobody_waiting(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(runs, "answered", broken)
    for stream in (False, True):
        response = post(server, {"model": MODEL, "input": "x", "stream": stream, "max_output_tokens": 1})
        assert "internal_error" in response.text
