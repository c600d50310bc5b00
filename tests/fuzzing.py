"""Requests that schemathesis makes of the served OpenAPI document, and what is wrong with the answers.

Each answer must be no server error of ours, have a status that the document knows, and be as it says. 503 is no
failure: that nothing can serve is an answer.
"""

from __future__ import annotations

from typing import Any, Final

import hypothesis
import msgspec
import schemathesis
from schemathesis.checks import CHECKS
from schemathesis.core.failures import FailureGroup

CAPACITY: Final = frozenset({502, 503})
_CHECKS: Final = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")


class Found(msgspec.Struct, kw_only=True):
    """What a run has done and found."""

    operations: int = 0
    cases: int = 0
    failures: list[str] = []


def fuzz(url: str, key: str, model: str, *, examples: int, only: str = "", seed: int = 1) -> Found:
    """Call every described route with ``examples`` requests that fit the document and as many that do not.

    Requests that fit name ``model``, so that they reach an engine. ``only``: a path, for that one alone.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found = Found()
    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # raises what is wrong with the document
        if only not in {"", operation.path}:
            continue
        found.operations += 1
        for mode in schemathesis.GenerationMode:
            named = model if mode is schemathesis.GenerationMode.POSITIVE else None
            _operation(operation, mode, named, key=key, examples=examples, seed=seed, found=found)
    return found


def _operation(
    operation: Any, mode: Any, model: str | None, *, key: str, examples: int, seed: int, found: Found
) -> None:
    strategy = operation.as_strategy(generation_mode=mode)
    checks = CHECKS.get_by_names(list(_CHECKS))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=strategy)
    def run(case: Any) -> None:
        if model is not None and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = model
        response = case.call(headers={"authorization": f"Bearer {key}"}, timeout=20)
        found.cases += 1
        where = f"{operation.method.upper()} {operation.path}"
        if response.status_code >= 500 and response.status_code not in CAPACITY:
            found.failures.append(f"{where}: {response.status_code}: {response.text[:300]}")
            return
        try:
            case.validate_response(response, checks=checks)
        except FailureGroup as group:
            found.failures += [f"{where}: {type(one).__name__}: {one}"[:600] for one in group.exceptions]

    try:
        run()
    except hypothesis.errors.Unsatisfiable:
        return  # there is nothing about this route that could be wrong
