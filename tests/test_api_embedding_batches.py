"""Embeddings as the endpoint of a batch: checked line by line as live ones are, run, and billed for what was read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.api_cell import Running, serve, until

from motorpool.catalogue import Catalogue, Model


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with serve(tmp_path) as running:
        running.cell.catalogue = Catalogue([Model("null", dimensions=384), Model("talker")])
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def line(number: int, url: str = "/v1/embeddings", **body: Any) -> dict[str, Any]:
    return {"custom_id": f"l{number}", "method": "POST", "url": url, "body": {"model": "null", "input": "a b"} | body}


def run(client: openai.OpenAI, *lines: dict[str, Any]) -> Any:
    data = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    return until(lambda: (b := client.batches.retrieve(made.id)).status in {"completed", "failed"} and b, "the end")


def test_embeddings_run_in_a_batch(client: openai.OpenAI) -> None:
    batch = run(client, line(1), line(2, input=["c", "d e f"], encoding_format="base64"), line(3, input=[1, 2, 3]))
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 3, 0)
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (9, 0)
    results = [json.loads(one) for one in client.files.content(batch.output_file_id).text.splitlines()]
    bodies = {one["custom_id"]: one["response"]["body"] for one in results}
    assert [len(bodies[name]["data"]) for name in ("l1", "l2", "l3")] == [1, 2, 1]
    live = client.embeddings.create(model="null", input="a b", encoding_format="float").data[0].embedding
    assert bodies["l1"]["data"][0]["embedding"] == live
    assert isinstance(bodies["l2"]["data"][0]["embedding"], str)


def test_an_answer_that_fails_is_in_the_error_file(client: openai.OpenAI) -> None:
    batch = run(client, line(1), line(2, input="word " * 3000))
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
    (error,) = [json.loads(one) for one in client.files.content(batch.error_file_id).text.splitlines()]
    assert error["response"]["body"]["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (line(1, input=[]), "invalid_value", "body.input"),
        (line(1, input=["a"] * 800), "invalid_value", "body.input"),
        (line(1, dimensions=16), "unsupported_parameter", "body.dimensions"),
        (line(1, encoding_format="hex"), "invalid_value", "body.encoding_format"),
        (line(1, url="/v1/completions"), "mismatched_url", "url"),
        (line(1, model="talker"), "unsupported_model", "body.model"),
        (line(1, model="nobody"), "model_not_found", "body.model"),
    ],
)
def test_a_bad_line_fails_the_batch_with_its_place(
    client: openai.OpenAI, bad: dict[str, Any], code: str, param: str
) -> None:
    batch = run(client, bad)
    assert batch.status == "failed"
    (error,) = batch.errors.data
    assert (error.code, error.param, error.line) == (code, param, 1)
