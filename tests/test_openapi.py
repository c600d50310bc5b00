"""The OpenAPI document: complete, valid, and true of what the API really answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
from tests.api_cell import MODEL, Item, LocalCell, Running, serve, until

from motorpool.catalogue import Catalogue, Model
from motorpool.server.cell import LiveAnswer, LiveRequest
from motorpool.server.openai import openapi
from motorpool.server.openai.app import Api
from motorpool.server.openai.settings import ApiSettings

DOCUMENT = openapi.document()
MESSAGES: Any = [{"role": "user", "content": "hello there"}]
EXAMPLES = 2  # of each route


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with serve(tmp_path) as running:
        running.cell.catalogue = Catalogue([Model(MODEL, dimensions=384, min_dimensions=1)])
        yield running


def schema_of(method: str, path: str, status: str) -> Any:
    (content,) = [
        kind
        for name, kind in DOCUMENT["paths"][path][method]["responses"][status]["content"].items()
        if name == "application/json"
    ]
    return content["schema"] | {"components": DOCUMENT["components"]}


class Caller:
    """Calls routes, and holds every answer against the document."""

    def __init__(self, server: Running) -> None:
        self._server = server
        self.called: set[tuple[str, str]] = set()

    def __call__(self, method: str, path: str, *, expect: int = 200, **options: Any) -> Any:
        names = options.pop("names", {})
        head = {"authorization": f"Bearer {self._server.key}"} | options.pop("headers", {})
        url = path
        for name, value in names.items():
            url = url.replace(f"{{{name}}}", value)
        response: httpx.Response = self._server.http.request(method, url, headers=head, **options)
        assert response.status_code == expect, response.text
        described = DOCUMENT["paths"][path][method.lower()]["responses"]["200" if expect == 200 else "default"]
        for name in described["headers"]:
            assert name in response.headers or name.startswith("x-ratelimit"), name
        media_type = response.headers["content-type"].split(";")[0]
        assert media_type in described["content"]
        if media_type == "application/json":
            schema = schema_of(method.lower(), path, "200" if expect == 200 else "default")
            jsonschema.validate(response.json(), schema, jsonschema.Draft202012Validator)
            self.called.add((method, path))
            return response.json()
        self.called.add((method, path))
        return response.content


def test_every_route_is_described_and_nothing_else(tmp_path: Path) -> None:
    cell = LocalCell(tmp_path)
    try:
        routes = Api(cell, ApiSettings()).routes
    finally:
        cell.database.close()
    served = {(route.method, route.template.replace(":path", "")) for route in routes}
    assert set(openapi.OPERATIONS) == served
    for route in routes:
        described = openapi.OPERATIONS[route.method, route.template.replace(":path", "")]
        assert described.metered == route.metered, route.template
        assert (described.key == "api_key") == route.needs_key, route.template


def test_the_document_is_served_without_a_key(server: Running) -> None:
    response = server.http.get("/openapi.json")
    assert (response.status_code, response.json()) == (200, json.loads(openapi.encoded()))
    assert response.headers["content-type"] == "application/json"


def test_the_document_holds_together() -> None:
    text = json.dumps(DOCUMENT)
    names = DOCUMENT["components"]["schemas"]
    for ref in set(text.split('"#/components/schemas/')[1:]):
        assert ref.split('"')[0] in names
    for name, schema in names.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert name.isalnum(), name
    ids = [one["operationId"] for path in DOCUMENT["paths"].values() for one in path.values()]
    assert len(ids) == len(set(ids))
    assert "\\Z" not in text


@pytest.mark.parametrize(
    "operation", [key for key, one in openapi.OPERATIONS.items() if isinstance(one.body, type)], ids=" ".join
)
def test_bodies_are_described_by_the_types_that_read_them(operation: tuple[str, str]) -> None:
    method, path = operation
    body = DOCUMENT["paths"][path][method.lower()]["requestBody"]["content"]["application/json"]["schema"]
    described = DOCUMENT["components"]["schemas"][body["$ref"].rsplit("/", 1)[-1]]
    fields = msgspec.structs.fields(openapi.OPERATIONS[operation].body)
    assert set(described["properties"]) == {field.encode_name for field in fields}
    assert set(described["required"]) == {field.encode_name for field in fields if field.required}


def test_real_answers_are_as_described(server: Running) -> None:
    """Every route that a customer has, as it is answered when all is well."""
    call = Caller(server)
    call("GET", "/healthz")
    call("GET", "/openapi.json")
    call("GET", "/v1/models")
    call("GET", "/v1/models/{model}", names={"model": MODEL})
    chat = {"model": MODEL, "messages": MESSAGES}
    call("POST", "/v1/chat/completions", json=chat | {"logprobs": True, "top_logprobs": 2, "n": 2})
    call("POST", "/v1/chat/completions", json=chat | {"stream": True})
    call("POST", "/v1/completions", json={"model": MODEL, "prompt": "a", "logprobs": 2})
    for form in ("float", "base64"):
        call("POST", "/v1/embeddings", json={"model": MODEL, "input": ["a", "b"], "encoding_format": form})
    _call_files_and_batches(call)
    _call_webhooks(call)
    _call_responses(call)
    owners = {operation for operation in openapi.OPERATIONS if "/owner/" in operation[1]}
    assert set(openapi.OPERATIONS) - call.called == owners  # tests/test_owner_api.py shows these


def _call_files_and_batches(call: Caller) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": MODEL, "prompt": "a"}}
    upload = {"file": ("in.jsonl", json.dumps(line).encode())}
    file = call("POST", "/v1/files", files=upload, data={"purpose": "batch"})
    names = {"file_id": file["id"]}
    call("GET", "/v1/files")
    call("GET", "/v1/files/{file_id}", names=names)
    call("GET", "/v1/files/{file_id}/content", names=names)
    new = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = {"batch_id": call("POST", "/v1/batches", json=new | {"metadata": {"a": "b"}})["id"]}
    until(lambda: call("GET", "/v1/batches/{batch_id}", names=batch)["status"] == "completed", "the batch")
    call("POST", "/v1/batches/{batch_id}/cancel", names=batch, expect=409)
    spoilt = call("POST", "/v1/batches", json=new | {"endpoint": "/v1/chat/completions"})
    names_spoilt = {"batch_id": spoilt["id"]}
    until(lambda: call("GET", "/v1/batches/{batch_id}", names=names_spoilt)["status"] == "failed", "the other batch")
    call("GET", "/v1/batches")
    call("DELETE", "/v1/files/{file_id}", names=names)


def _call_webhooks(call: Caller) -> None:
    new = {"name": "n", "url": "https://example.org/", "event_types": ["batch.failed"]}
    names = {"webhook_endpoint_id": call("POST", "/v1/webhook_endpoints", json=new)["id"]}
    one = "/v1/webhook_endpoints/{webhook_endpoint_id}"
    call("GET", "/v1/webhook_endpoints")
    call("GET", one, names=names)
    call("POST", one, names=names, json={"name": "m"})
    call("POST", one + "/rotate_secret", names=names)
    call("GET", one + "/deliveries", names=names)
    call("POST", one + "/test", names=names, json={"event_type": "video.failed"}, expect=400)
    call("DELETE", one, names=names)
    call("GET", "/v1/webhook_event_types")


def _call_responses(call: Caller) -> None:
    made = call("POST", "/v1/responses", json={"model": MODEL, "input": "hello"})
    names = {"response_id": made["id"]}
    call("GET", "/v1/responses/{response_id}", names=names)
    call("GET", "/v1/responses/{response_id}/input_items", names=names)
    call("POST", "/v1/responses", json={"model": MODEL, "input": "hello", "stream": True})
    background = call("POST", "/v1/responses", json={"model": MODEL, "input": "hello", "background": True})
    call("POST", "/v1/responses/{response_id}/cancel", names={"response_id": background["id"]})
    call("DELETE", "/v1/responses/{response_id}", names=names)


@pytest.mark.parametrize("operation", list(openapi.OPERATIONS), ids=" ".join)
def test_errors_are_as_described(server: Running, operation: tuple[str, str]) -> None:
    """Every route with a key that is none and a place that is none."""
    method, path = operation
    if path in {"/healthz", "/openapi.json"}:
        pytest.skip("it has no errors")
    places = ("model", "file_id", "batch_id", "vehicle_id", "response_id", "webhook_endpoint_id")
    names = dict.fromkeys(places, "nothing")
    needs_key = openapi.OPERATIONS[operation].key is not None
    call = Caller(server)
    status = 401 if needs_key else 400
    call(method, path, names=names, expect=status, headers={"authorization": "Bearer nobody"}, json={})
    assert operation in call.called


def test_nothing_that_the_document_allows_breaks_the_server(server: Running) -> None:
    """schemathesis, with a few examples; ``tools/conformance.py --fuzz 50`` runs it with many."""
    pytest.importorskip("schemathesis")
    from tests.fuzzing import fuzz  # noqa: PLC0415 - it needs schemathesis

    found = fuzz(server.url, server.key, MODEL, examples=EXAMPLES)
    assert found.operations == len(openapi.OPERATIONS) - 1  # all but that of the document itself
    assert found.cases >= found.operations
    assert found.failures == []
    assert server.cell.asked != []  # some came as far as an engine


@pytest.mark.parametrize(
    ("script", "names"), [(None, "500"), (LiveAnswer(status=200, body=b'{"object":"odd"}'), "JsonSchemaError")]
)
def test_a_fault_would_be_found(server: Running, script: LiveAnswer | None, names: str) -> None:
    pytest.importorskip("schemathesis")
    from tests.fuzzing import fuzz  # noqa: PLC0415 - it needs schemathesis

    async def answer(_: LiveRequest) -> AsyncIterator[Item]:
        if script is None:
            raise RuntimeError
        yield script

    server.cell.script = answer
    found = fuzz(server.url, server.key, MODEL, examples=10, only="/v1/completions")
    assert any(names in failure for failure in found.failures), found
