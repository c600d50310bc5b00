"""openai-python's own way of using each endpoint, and a page that claims no more than the tests show."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import BatchCreateParams, BatchListParams, EmbeddingCreateParams, FileCreateParams, FileListParams
from openai.types import completion_create_params as legacy
from openai.types.chat import completion_create_params
from openai.types.responses import InputItemListParams, response_create_params, response_retrieve_params
from tests.api_cell import MODEL, Running, serve
from tools import conformance
from tools.conformance_rows import SECTIONS, page

from motorpool.catalogue import Catalogue, Model
from motorpool.store import webhooks as store
from motorpool.store.webhooks import Policy

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("cell")) as running:
        running.cell.catalogue = Catalogue([Model(MODEL, dimensions=384)])
        store.set_policy(running.cell.database.writer, Policy(private=True, http=True))
        yield running


@pytest.mark.parametrize(("name", "act"), [(name, act) for name, _, act in conformance.PROGRAMS])
def test_the_programs_pass(server: Running, name: str, act: conformance.Program) -> None:
    with server.client() as client:
        act(conformance.Setting(client, MODEL, MODEL))


def test_a_program_that_fails_is_reported() -> None:
    with serve_nothing() as setting:
        found = conformance.run(setting)
    assert len(found) == len(conformance.PROGRAMS)
    assert all(wrong for _, _, wrong in found)


def serve_nothing() -> Nothing:
    return Nothing()


class Nothing:
    """A client of a service that is not there."""

    def __enter__(self) -> conformance.Setting:
        self._client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0, timeout=2)
        return conformance.Setting(self._client, "m", "m")

    def __exit__(self, *_: object) -> None:
        self._client.close()


def test_the_page_is_what_the_tool_writes() -> None:
    written = page([(name, calls, act.__doc__ or "") for name, calls, act in conformance.PROGRAMS])
    assert conformance.PAGE.read_text("utf-8") == written


FIELDS: dict[str, list[Any]] = {
    "`/v1/chat/completions`": [completion_create_params.CompletionCreateParamsBase],
    "`/v1/completions`": [legacy.CompletionCreateParamsBase],
    "`/v1/embeddings`": [EmbeddingCreateParams],
    "`/v1/responses`": [
        response_create_params.ResponseCreateParamsBase,
        response_retrieve_params.ResponseRetrieveParamsBase,
        InputItemListParams,
    ],
    "`/v1/files`": [FileCreateParams, FileListParams],
    "`/v1/batches`": [BatchCreateParams, BatchListParams],
    "`/v1/models`": [],
}


@pytest.mark.parametrize("section", FIELDS)
def test_every_field_that_the_client_can_send_has_a_row(section: str) -> None:
    said = " ".join(row.what for row in SECTIONS[section])
    named = set(re.findall(r"`([a-z_.]+)`", said))
    for params in FIELDS[section]:
        fields = set(params.__annotations__)
        assert {name for name in fields if name not in {one.split(".")[0] for one in named}} == set()


def test_everything_that_the_client_has_is_served_or_has_a_row() -> None:
    own = {name for name, value in vars(openai.OpenAI).items() if isinstance(value, functools.cached_property)}
    served = {"chat", "completions", "embeddings", "responses", "models", "files", "batches", "webhooks"}
    rest = " ".join(row.what for row in SECTIONS["The rest of OpenAI's API"])
    assert served < own
    views = {"with_raw_response", "with_streaming_response"}
    assert own - served - views - set(re.findall(r"`([a-z_]+)`", rest)) == set()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/chat/completions/chatcmpl-1", 404),
        ("DELETE", "/v1/chat/completions/chatcmpl-1", 404),
        ("DELETE", "/v1/models/null", 405),
        ("POST", "/v1/responses/input_tokens", 405),
        ("POST", "/v1/responses/compact", 405),
        *(
            ("POST", f"/v1/{name}", 404)
            for name in ("moderations", "images/generations", "audio/speech", "videos", "realtime/sessions", "evals",
                         "fine_tuning/jobs", "vector_stores", "containers", "assistants", "conversations", "uploads",
                         "skills", "threads")
        ),
    ],
)  # fmt: skip
def test_what_is_not_served_is_said_so(server: Running, method: str, path: str, status: int) -> None:
    head = {"authorization": f"Bearer {server.key}"}
    answer = server.http.request(method, path, headers=head, json=None if method == "GET" else {"model": MODEL})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == {404: "unknown_route", 405: "method_not_allowed"}[status]


def test_every_named_test_exists_and_nothing_is_without_a_test_or_a_reason() -> None:
    known: dict[str, set[str]] = {}
    for section, rows in SECTIONS.items():
        assert rows, section
        for row in rows:
            assert row.tests or row.why, row.what
            for file, test in row.tests:
                if file not in known:
                    tree = ast.parse((TESTS / f"{file}.py").read_text("utf-8"))
                    known[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
                assert test in known[file], f"{row.what}: {file}.py has no {test}"
