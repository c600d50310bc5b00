"""What a request may be: every rule of the documented tables, and errors that name the field but never its value."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from motorpool.errors import CallerError
from motorpool.server.openai.requests import CompletionRequest, read_chat, read_completion

SECRET = "zebra-4711"  # stands for whatever a customer may have written
USER = {"role": "user", "content": "hello"}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}
TOOL = {"type": "function", "function": {"name": "f"}}


def _schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, **fields}}


GOOD_CHAT: list[dict[str, Any]] = [
    {},
    {"temperature": 0, "top_p": 1, "n": 128, "seed": -5, "max_tokens": 1, "presence_penalty": -2},
    {"max_tokens": 5, "max_completion_tokens": 5},
    {"stop": "a"},
    {"stop": ["a", "b", "c", "d"]},
    {"stop": None, "n": None, "temperature": None, "stream": None, "tools": None, "response_format": None},
    {"logprobs": True, "top_logprobs": 20},
    {"logit_bias": {"50256": -100, "7": 100.0}},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": _schema(strict=True, description="d")},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"tool_choice": "none", "functions": None, "function_call": None},
    {"user": "u", "store": True, "service_tier": "flex"},
    {"metadata": {"k" * 64: "v" * 512}},
    {"modalities": ["text"], "prediction": {"type": "content"}, "something_new": [1, {"a": None}]},
    {"prompt_cache_key": "k", "prompt_cache_options": {}, "prompt_cache_retention": "24h", "safety_identifier": "s"},
    {"web_search_options": {}, "moderation": {}, "tools": [TOOL], "parallel_tool_calls": False},
    {"reasoning_effort": "xhigh", "verbosity": "low"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    {
        "messages": [
            {"role": "system", "content": ""},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ]
    },
]

BAD_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"model": 7}, "invalid_type", "model"),
    ({"model": ""}, "invalid_value", "model"),
    ({"model": "m" * 257}, "invalid_value", "model"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": SECRET}, "invalid_type", "messages"),
    ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages[0].role"),
    ({"messages": [USER, {"role": SECRET, "content": "x"}]}, "invalid_value", "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    ({"messages": [{"role": "assistant"}]}, "missing_required_parameter", "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "missing_required_parameter", "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}]},
        "unsupported_parameter",
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "missing_required_parameter",
        "messages[0].content[0].text",
    ),
    ({"temperature": 2.1}, "invalid_value", "temperature"),
    ({"temperature": -0.1}, "invalid_value", "temperature"),
    ({"temperature": SECRET}, "invalid_type", "temperature"),
    ({"top_p": 1.5}, "invalid_value", "top_p"),
    ({"frequency_penalty": 2.5}, "invalid_value", "frequency_penalty"),
    ({"presence_penalty": -2.5}, "invalid_value", "presence_penalty"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 129}, "invalid_value", "n"),
    ({"n": 1.5}, "invalid_type", "n"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "max_tokens"),
    ({"seed": 2**63}, "invalid_value", "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop"),
    ({"stop": ["a", ""]}, "invalid_value", "stop[1]"),
    ({"stop": 5}, "invalid_type", "stop"),
    ({"logprobs": 3}, "invalid_type", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"logit_bias": {SECRET: 1}}, "invalid_type", "logit_bias"),
    ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"5": SECRET}}, "invalid_type", "logit_bias"),
    ({"stream": "yes"}, "invalid_type", "stream"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
    ({"response_format": {"type": SECRET}}, "invalid_value", "response_format.type"),
    ({"response_format": {}}, "missing_required_parameter", "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format.json_schema"),
    ({"response_format": _schema(name=f"{SECRET} !")}, "invalid_value", "response_format.json_schema.name"),
    ({"response_format": _schema(name="n" * 65)}, "invalid_value", "response_format.json_schema.name"),
    ({"response_format": _schema(name="ok\n")}, "invalid_value", "response_format.json_schema.name"),
    ({"response_format": _schema(schema="x")}, "invalid_type", "response_format.json_schema.schema"),
    ({"tools": [{}]}, "missing_required_parameter", "tools[0].type"),
    ({"tools": [TOOL] * 129}, "invalid_value", "tools"),
    ({"tool_choice": SECRET}, "invalid_value", "tool_choice"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "invalid_value", "tool_choice"),
    ({"tools": [], "tool_choice": {"type": "function"}}, "invalid_value", "tool_choice"),
    ({"functions": [{"name": SECRET}]}, "unsupported_parameter", "functions"),
    ({"tools": [TOOL], "function_call": {"name": SECRET}}, "unsupported_parameter", "function_call"),
    (
        {"messages": [{"role": "assistant", "content": None, "function_call": {"name": SECRET}}]},
        "unsupported_parameter",
        "messages[0].function_call",
    ),
    ({"metadata": {str(n): "" for n in range(17)}}, "invalid_value", "metadata"),
    ({"metadata": {"k" * 65: ""}}, "invalid_value", "metadata"),
    ({"metadata": {"k": "v" * 513}}, "invalid_value", "metadata"),
    ({"metadata": {"k": 5}}, "invalid_type", "metadata"),
    ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
    ({"reasoning_effort": SECRET}, "invalid_value", "reasoning_effort"),
    ({"verbosity": SECRET}, "invalid_value", "verbosity"),
    ({"service_tier": SECRET}, "invalid_value", "service_tier"),
]


@pytest.mark.parametrize("fields", GOOD_CHAT)
def test_good_chats_pass(fields: dict[str, Any]) -> None:
    assert read_chat(json.dumps(CHAT | fields).encode()).model == "m"


@pytest.mark.parametrize(
    ("fields", "code", "param"), BAD_CHAT, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_chats_are_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(CallerError) as caught:
        read_chat(json.dumps(CHAT | fields).encode())
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
    assert SECRET not in caught.value.message
    assert re.split(r"[.\[]", param)[0] in caught.value.message


@pytest.mark.parametrize("field", ["model", "messages"])
def test_missing_fields_are_named(field: str) -> None:
    body = {name: value for name, value in CHAT.items() if name != field}
    with pytest.raises(CallerError) as caught:
        read_chat(json.dumps(body).encode())
    assert (caught.value.code, caught.value.param) == ("missing_required_parameter", field)


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"", "byte 0"),
        (b'{"model": "m", "messages": [', "byte 28"),
        (b'{"model": "m",}', "byte 14"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}]} y', "byte 64"),
        (b"{'model': 1}", "byte 1"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b'{"model": "\\ud800 and so on"}', "byte 17"),
    ],
)
def test_bad_json_is_told_with_its_place(body: bytes, where: str) -> None:
    with pytest.raises(CallerError) as caught:
        read_chat(body)
    assert caught.value.code == "invalid_json"
    assert where in caught.value.message


def test_a_body_that_is_no_object_is_refused() -> None:
    with pytest.raises(CallerError) as caught:
        read_chat(b"[1, 2]")
    assert (caught.value.code, caught.value.param) == ("invalid_type", None)


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"new":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    with pytest.raises(CallerError, match="deeply"):
        read_chat(body)


# -- completions


@pytest.mark.parametrize(
    ("fields", "prompts", "choices"),
    [
        ({}, [""], 1),
        ({"prompt": "a"}, ["a"], 1),
        ({"prompt": ["a", "b"], "n": 2}, ["a", "b"], 4),
        ({"prompt": [1, 2, 3]}, [[1, 2, 3]], 1),
        ({"prompt": [[1], [2, 3]]}, [[1], [2, 3]], 2),
        ({"prompt": [[0], [2**31 - 1]]}, [[0], [2**31 - 1]], 2),
        ({"prompt": "a", "best_of": 2, "n": 2, "echo": True, "suffix": ""}, ["a"], 2),
        ({"prompt": "a", "echo": False, "logprobs": 5}, ["a"], 1),
    ],
)
def test_prompts_come_in_every_shape(fields: dict[str, Any], prompts: list[Any], choices: int) -> None:
    request = read_completion(json.dumps({"model": "m", **fields}).encode())
    assert isinstance(request, CompletionRequest)
    assert request.prompts == prompts
    assert request.choices == choices


def test_a_completion_has_a_length_also_if_it_names_none() -> None:
    assert read_completion(b'{"model":"m"}').limit_tokens == 16
    assert read_completion(b'{"model":"m","max_tokens":900}').limit_tokens == 900
    assert read_chat(json.dumps(CHAT).encode()).limit_tokens is None


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": ["a", 1]}, "invalid_type", "prompt"),
        ({"prompt": {"a": 1}}, "invalid_type", "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "invalid_value", "prompt"),
        ({"suffix": SECRET}, "unsupported_parameter", "suffix"),
        ({"best_of": 3}, "unsupported_parameter", "best_of"),
        ({"logprobs": 21}, "invalid_value", "logprobs"),
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({"prompt": [2**31]}, "invalid_value", "prompt"),
        ({"prompt": [2**40]}, "invalid_value", "prompt"),
        ({"prompt": [2**70]}, "invalid_value", "prompt"),
        ({"prompt": [[1], [2, -1]]}, "invalid_value", "prompt"),
        ({"prompt": [1, 2], "echo": True, "stream": True}, "unsupported_parameter", "echo"),
        ({"prompt": "a", "echo": True, "logprobs": 0}, "unsupported_parameter", "logprobs"),
        ({"stream_options": {}}, "invalid_value", "stream_options"),
    ],
)
def test_bad_completions_are_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(CallerError) as caught:
        read_completion(json.dumps({"model": "m", **fields}).encode())
    assert (caught.value.code, caught.value.param) == (code, param)
    assert SECRET not in caught.value.message
