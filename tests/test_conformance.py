"""openai-python's own way of using each endpoint, and a page that claims no more than the tests show."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.api_cell import MODEL, Running, serve
from tools import conformance
from tools.conformance_rows import SECTIONS, page

from motorpool.catalogue import Catalogue, Model

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("cell")) as running:
        running.cell.catalogue = Catalogue([Model(MODEL, dimensions=384)])
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
