"""Responses as the endpoint of a batch: checked, run as chat completions, told as responses, kept nowhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response
from tests.api_cell import MODEL, Running, serve, until
from tests.cell_world import World, a_world, run
from tests.response_trial import TOOL

from motorpool import wire
from motorpool.core.attribution import Footprint
from motorpool.errors import CallerError
from motorpool.server import assembly
from motorpool.server.cell import LiveAnswer
from motorpool.server.openai.lines import RESPONSES, body_for, check_line, kind_of
from motorpool.server.openai.responses.lines import response_id_of, told_as_response
from motorpool.server.openai.responses.request import CreateRequest
from motorpool.store.books import DoneLine
from motorpool.types import Kind

URL: Any = "/v1/responses"
SECRET = "zebra-4711"


def line(number: int = 0, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": f"n{number}",
        "method": "POST",
        "url": URL,
        "body": {"model": MODEL, "input": f"line {number}", "max_output_tokens": 5} | body,
    }


def data(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


# -- what is checked when it is handed in ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        ({"stream": True}, "invalid_value", "body.stream"),
        ({"background": True}, "unsupported_parameter", "body.background"),
        ({"previous_response_id": f"resp_{SECRET}"}, "unsupported_parameter", "body.previous_response_id"),
        ({"store": True}, "unsupported_parameter", "body.store"),
        ({"truncation": "auto"}, "unsupported_parameter", "body.truncation"),
        ({"conversation": SECRET}, "unsupported_parameter", "body.conversation"),
        ({SECRET[:5]: 1}, "unknown_parameter", f"body.{SECRET[:5]}"),
        ({"max_output_tokens": 0}, "invalid_value", "body.max_output_tokens"),
        ({"input": [{"role": SECRET, "content": "x"}]}, "invalid_value", "body.input[0].role"),
        ({"input": [{"type": "input_image"}]}, "unsupported_parameter", "body.input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "invalid_value", "body.input"),
        ({"text": {"format": {"type": "json_schema"}}}, "missing_required_parameter", "body.text.format.name"),
        ({"tools": [TOOL], "tool_choice": SECRET}, "invalid_value", "body.tool_choice"),
        ({"messages": []}, "unknown_parameter", "body.messages"),
        ({"model": SECRET}, "model_not_found", "body.model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_line_fails_the_batch_with_its_line_and_field(
    server: Running, bad: dict[str, Any], code: str, param: str
) -> None:
    with server.client() as client:
        file = client.files.create(file=("in.jsonl", data(line(0), line(1, **bad))), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        batch: Any = until(lambda: (b := client.batches.retrieve(made.id)).status == "failed" and b, "the end")
        (error,) = batch.errors.data
        place = ("mismatched_model", "body.model") if code == "model_not_found" else (code, param)
        assert (error.code, error.param, error.line) == (*place, 2)
        assert SECRET not in error.message


@pytest.mark.parametrize("body", [b"[1]", b'"text"', b"3"])
def test_a_body_that_is_no_object_is_named(body: bytes) -> None:
    whole = b'{"custom_id":"a","method":"POST","url":"/v1/responses","body":%b}' % body
    with pytest.raises(CallerError) as caught:
        check_line(RESPONSES, whole)
    assert (caught.value.code, caught.value.param) == ("invalid_type", "body")


def test_lines_of_another_endpoint_are_refused() -> None:
    chat = line() | {"url": "/v1/chat/completions"}
    with pytest.raises(CallerError, match="url must be the endpoint of the batch, /v1/responses") as caught:
        check_line(RESPONSES, json.dumps(chat).encode())
    assert caught.value.code == "mismatched_url"


def test_a_line_becomes_the_chat_completion_of_a_live_response() -> None:
    asked = json.dumps(line(3, instructions="Be brief.", temperature=0.5, tools=[TOOL], max_output_tokens=9)).encode()
    custom_id, request = check_line(RESPONSES, asked)
    assert isinstance(request, CreateRequest)
    assert (custom_id, request.max_output_tokens, kind_of(URL)) == ("n3", 9, Kind.CHAT)
    body = json.loads(body_for(URL, asked))
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "line 3"},
    ]
    assert (body["max_completion_tokens"], body["temperature"], body["stream"]) == (9, 0.5, False)
    assert body["tools"][0]["function"]["name"] == TOOL["name"]
    chat = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model" : "x"}}'
    assert body_for("/v1/chat/completions", chat) == b'{"model" : "x"}', "others go as they came"


# -- what is told of an answer -----------------------------------------------------------------------------------------

ASKED = json.dumps(line(0)["body"]).encode()


@given(status=st.sampled_from([200, 400, 404, 429, 500]), body=st.binary() | st.from_regex(rb"\{.*\}"))
def test_whatever_a_vehicle_answers_is_told_as_a_response_or_an_error(status: int, body: bytes) -> None:
    told = [told_as_response(ASKED, LiveAnswer(status=status, body=body), "resp_1", "default") for _ in range(2)]
    assert told[0] == told[1]
    found = json.loads(told[0])
    if status >= 400:
        assert set(found["error"]) == {"message", "type", "param", "code"}
    else:
        assert (found["status"], found["error"]["code"]) == ("failed", "engine_error")


def test_an_answer_to_what_an_earlier_version_took_is_told_as_it_came() -> None:
    found = DoneLine(0, 200, b'{"choices":[]}', Footprint(energy_uwh=1, co2_ug=1, is_measured=False))
    source = json.dumps(line(0, a_field_that_was_served_once=1)).encode()
    assert assembly._as_response("batch_a", source, found, "default") == found
    assert assembly._as_response("batch_a", json.dumps(line(0)).encode(), found, "default").footprint is None


def test_every_line_has_an_id_of_its_own() -> None:
    batches = ("batch_" + "a" * 24, "batch_" + "b" * 24)
    ids = {response_id_of(batch, number) for batch in batches for number in (0, 1, 49_999)}
    assert len(ids) == 6
    assert {len(one) for one in ids} == {len("resp_") + 32}


# -- through a cell ----------------------------------------------------------------------------------------------------


async def hand_in(world: World, *lines: dict[str, Any], **wishes: Any) -> str:
    file = (await world.upload(data(*lines))).json()
    asked = {"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"} | wishes
    response = await world.client.post("/v1/batches", json=asked)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def test_responses_run_in_a_batch(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1")
            schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
            form = {"type": "json_schema", "name": "a", "schema": schema}
            turns = [
                {"role": "user", "content": "weather?"},
                {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "rain"},
            ]
            batch_id = await hand_in(
                world,
                line(0),
                line(1, store=False, metadata={"k": "v"}, instructions="Be brief."),
                line(2, input="word " * 3000),
                line(3, text={"format": form}, max_output_tokens=100),
                line(4, input=turns, tools=[TOOL, {"type": "web_search"}]),
                line(5, include=["message.output_text.logprobs"]),
            )
            batch = await world.ended(batch_id)
            assert (batch["status"], batch["endpoint"], batch["model"]) == ("completed", URL, MODEL)
            assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
            rows = await world.rows(batch["output_file_id"])
            assert set(rows) == {"n0", "n1", "n3", "n4", "n5"}
            told = {name: row["response"]["body"] for name, row in rows.items()}
            for body in told.values():
                found = Response.model_validate(body)
                assert found.usage is not None
                assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
                assert body["usage"]["motorpool"].keys() == {"energy_wh", "co2_g", "measured"}
                assert (body["store"], body["background"], body["service_tier"]) == (False, False, "default")
                assert body["created_at"] >= batch["created_at"]
                assert (await world.client.get(f"/v1/responses/{body['id']}")).status_code == 404, "it is not kept"
            assert (told["n0"]["status"], told["n0"]["incomplete_details"]) == (
                "incomplete",
                {"reason": "max_output_tokens"},
            )
            assert Response.model_validate(told["n0"]).output_text
            assert (told["n1"]["metadata"], told["n1"]["instructions"]) == ({"k": "v"}, "Be brief.")
            assert json.loads(Response.model_validate(told["n3"]).output_text).keys() == {"a"}
            assert told["n3"]["status"] == "completed"
            assert told["n4"]["motorpool"] == {"skipped_tools": ["web_search"]}
            assert told["n5"]["output"][0]["content"][0]["logprobs"]
            spent = sum(body["usage"]["total_tokens"] for body in told.values())
            assert batch["usage"]["total_tokens"] == spent > 0
            errors = await world.rows(batch["error_file_id"])
            error = errors["n2"]["response"]["body"]["error"]
            assert (errors["n2"]["response"]["status_code"], error["code"]) == (400, "context_length_exceeded")
            assert error["param"] == "input", "as the customer calls it"
            assert world.one("SELECT count(*) FROM response") == 0
            world.check_money(batch_id)

    run(test())


def test_each_line_is_answered_once_though_the_control_plane_is_killed(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1", rate=400, slots=4)
            await world.agent("v2", rate=400, slots=4)
            batch_id = await hand_in(world, *[line(number, max_output_tokens=20) for number in range(60)])
            for least in (5, 25):
                await world.until(lambda least=least: world.completed(batch_id) >= least)  # type: ignore[misc]
                await world.kill_cell()
                await world.start_cell()
            batch = await world.ended(batch_id)
            assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 60)
            rows = await world.rows(batch["output_file_id"])
            assert set(rows) == {f"n{number}" for number in range(60)}
            ids = {row["response"]["body"]["id"] for row in rows.values()}
            assert ids == {response_id_of(batch_id, number) for number in range(60)}
            world.check_money(batch_id)

    run(test())


def test_a_vehicle_is_asked_for_a_chat_and_one_that_answers_nonsense_is_told_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            batch_id = await hand_in(world, line(0), motorpool={"priority": "flex"})
            grant = await hand.next(wire.Grant)
            assert grant.kind is Kind.CHAT
            assert json.loads(grant.items[0].body)["messages"] == [{"role": "user", "content": "line 0"}]
            await hand.finish(grant, [0], "m1")
            batch = await world.ended(batch_id)
            (row,) = (await world.rows(batch["output_file_id"])).values()
            body = row["response"]["body"]
            assert (body["status"], body["error"]["code"], body["service_tier"]) == ("failed", "engine_error", "flex")

    run(test())


def test_lines_that_did_not_run_are_named_as_those_of_other_endpoints(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            batch_id = await hand_in(world, line(0), line(1))
            await world.until(lambda: world.status(batch_id) == "in_progress")
            await asyncio.gather(world.client.post(f"/v1/batches/{batch_id}/cancel"))
            batch = await world.ended(batch_id)
            errors = await world.rows(batch["error_file_id"])
            assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}

    run(test())
