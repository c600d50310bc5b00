"""What the tests of responses share: asking over HTTP, and scripts that play the vehicles."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgspec
import openai
from tests.api_cell import Item, Running, until

from motorpool.server.cell import LiveAnswer, LiveRequest

ASKED = "Hello there, vehicle"
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    "strict": True,
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"place":"Ulm"}'}}


def post(server: Running, body: Any, path: str = "/v1/responses") -> httpx.Response:
    head = {"authorization": f"Bearer {server.key}", "content-type": "application/json"}
    return server.http.post(path, content=body if isinstance(body, bytes) else json.dumps(body), headers=head)


def get(server: Running, path: str) -> httpx.Response:
    return server.http.get(path, headers={"authorization": f"Bearer {server.key}"})


def asked(server: Running) -> dict[str, Any]:
    """The last chat completion that a vehicle was asked for."""
    body: dict[str, Any] = json.loads(server.cell.asked[-1].body)
    return body


def answering(
    content: str | None = None, finish_reason: str = "stop", **message: Any
) -> Callable[[LiveRequest], AsyncIterator[Item]]:
    """A script that answers every request with one message."""
    body = {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": None} | message,
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 1}},
    }

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveAnswer(status=200, body=msgspec.json.encode(body))

    return script


def refusing(status: int, code: str, param: str | None = None) -> Callable[[LiveRequest], AsyncIterator[Item]]:
    body = {"error": {"message": "no", "type": "invalid_request_error", "param": param, "code": code}}

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveAnswer(status=status, body=msgspec.json.encode(body))

    return script


def ended(client: openai.OpenAI, response_id: str) -> Any:
    """The response at its end."""

    def look() -> Any:
        found = client.responses.retrieve(response_id)
        return None if found.status in {"queued", "in_progress"} else found

    return until(look, "the end of the response")


def parsed(text: str) -> list[dict[str, Any]]:
    """Events from their bytes; each says its type twice."""
    found = []
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            found.append(event)
    return found


def check(events: list[dict[str, Any]], first: int = 0) -> dict[str, Any]:
    """What holds for every stream from its beginning; returns its last response object."""
    assert [event["sequence_number"] for event in events] == list(range(first, first + len(events)))
    items: dict[int, dict[str, Any]] = {}
    texts: dict[tuple[int, int], str] = {}
    for event in events:
        kind, at = event["type"].removeprefix("response."), event.get("output_index", -1)
        place = at, event.get("content_index", 0)
        if "item_id" in event:
            assert event["item_id"] == items[at]["id"]
        if kind == "output_item.added":
            assert at == len(items)
            assert event["item"]["status"] == "in_progress"
            items[at] = event["item"]
        elif kind.endswith(".delta"):
            texts[place] = texts.get(place, "") + event["delta"]
        elif kind.endswith(".done") and kind.split(".")[0] in {"output_text", "function_call_arguments", "refusal"}:
            whole = event.get("text", event.get("arguments", event.get("refusal")))
            assert whole == texts.get(place, "")
        elif kind == "output_item.done":
            assert event["item"]["id"] == items[at]["id"]
            items[at] = event["item"]
    last: dict[str, Any] = events[-1]["response"]
    finished = [item for item in items.values() if item["status"] != "in_progress"]
    if last["status"] in {"completed", "incomplete"}:
        assert [item for item in last["output"] if item not in finished] == []
    return last
