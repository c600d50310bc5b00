"""The API's reference says what the code does: every route, field, limit and error code, and nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tests.api_cell import LocalCell

from motorpool import errors, types
from motorpool.agent.runtime import request as engine_request
from motorpool.server.openai import (
    app,
    batches,
    embeddings,
    exchange,
    files,
    heads,
    idempotency,
    requests,
    settings,
    uploads,
    validation,
    webhooks,
)
from motorpool.server.openai.decoding import CHOICES
from motorpool.server.openai.footprints import ShownFootprint
from motorpool.server.openai.lines import check_line
from motorpool.server.openai.settings import ApiSettings
from motorpool.server.owner import routes, sessions
from motorpool.server.webhooks import sender, targets, worker
from motorpool.store import idempotency as kept
from motorpool.store import webhooks as told
from motorpool.trust import consent, owneraccess

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/reference/api.md").read_text("utf-8")
API = sorted((ROOT / "src/motorpool/server/openai").glob("*.py"))
OWNER = sorted((ROOT / "src/motorpool/server/owner").glob("*.py"))
# Where an error that a customer sees may come from.
SOURCES = [
    *API,
    *OWNER,
    ROOT / "src/motorpool/store/customer.py",
    ROOT / "src/motorpool/store/blobs.py",
    ROOT / "src/motorpool/store/webhooks.py",
    ROOT / "src/motorpool/server/webhooks/targets.py",
    ROOT / "src/motorpool/server/live.py",
    ROOT / "src/motorpool/server/loop.py",
    ROOT / "src/motorpool/agent/runtime/answer.py",
    ROOT / "src/motorpool/agent/runtime/embedding.py",
    ROOT / "src/motorpool/agent/runtime/llama_embed.py",
    ROOT / "src/motorpool/agent/runtime/instance.py",
    ROOT / "src/motorpool/agent/runtime/llama_grammar.py",
    ROOT / "src/motorpool/agent/runtime/llama_run.py",
    ROOT / "src/motorpool/agent/runtime/request.py",
]
# Raised in these files, but never shown to a customer of the API.
NOT_SHOWN = {"key_not_found"}


def _section(title: str) -> str:
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def _codes_of(path: Path) -> set[str]:
    """The error codes that a source file names: ``code="..."``, and the first argument of ``_note``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                found.add(str(keyword.value.value))
        if (
            isinstance(node.func, ast.Attribute)
            and node.func.attr == "_note"
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value))
    return found


def _defaults_of(path: Path) -> set[str]:
    """The codes of errors that a source file raises without naming one."""
    kinds = {
        name: kind
        for module in (errors, exchange, heads)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, errors.MotorpoolError)
    }
    return {
        kinds[node.func.id].default_code
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds
        if not any(keyword.arg == "code" for keyword in node.keywords)
    }


def _raised() -> set[str]:
    """Every code that a customer may get."""
    return set().union(*(_codes_of(path) | _defaults_of(path) for path in SOURCES)) - NOT_SHOWN


def _documented() -> dict[str, int | None]:
    rows = re.findall(r"^\| `([a-z_]+)` \|(?: (\d{3}) \|)?", _section("Errors"), re.MULTILINE)
    return {code: int(status) if status else None for code, status in rows}


def test_every_route_is_documented_and_every_documented_route_exists(tmp_path: Path) -> None:
    cell = LocalCell(tmp_path)
    try:
        routes = {
            f"{route.method} {route.template.replace(':path', '')}" for route in app.Api(cell, ApiSettings()).routes
        }
    finally:
        cell.database.close()
    assert set(re.findall(r"^\| `([A-Z]+ /[^`]*)`", _section("Routes"), re.MULTILINE)) == routes


def test_every_error_code_is_documented_and_every_documented_code_exists() -> None:
    documented = set(_documented())
    raised = _raised()
    assert raised - documented == set()
    # Some come from a vehicle's engine, whose files are not all listed above.
    everything = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert [code for code in documented if f'"{code}"' not in everything] == []


def test_documented_statuses_are_the_raised_ones() -> None:
    documented = _documented()
    for module in (errors, exchange, heads):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, errors.MotorpoolError) and kind.default_code in documented:
                assert documented[kind.default_code] == kind.status, kind.default_code


def test_every_code_of_the_api_itself_is_provoked_by_a_test() -> None:
    tests = "".join(
        path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py") if path.name != Path(__file__).name
    )
    codes = set().union(*(_codes_of(path) for path in [*API, *OWNER]))
    assert [code for code in sorted(codes) if f'"{code}"' not in tests] == []


@pytest.mark.parametrize(
    ("title", "struct"),
    [
        ("Chat completions", requests.ChatRequest),
        ("Completions", requests.CompletionRequest),
        ("Embeddings", embeddings.EmbeddingRequest),
        ("Batches", batches.NewBatch),
        ("Webhooks", webhooks.NewWebhook),
    ],
)
def test_every_field_is_documented(title: str, struct: type) -> None:
    rows = re.findall(r"^\| (`.*?) \|", _section(title), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    not_read = {"audio"}  # the modality says it all
    assert set(struct.__struct_fields__) - not_read - named == set()  # type: ignore[attr-defined]


def test_every_limit_is_documented() -> None:
    limits = _section("Limits")
    for number in (
        types.MAX_BODY_BYTES,
        types.MAX_BATCH_BYTES,
        types.MAX_FILE_BYTES,
        types.MAX_BATCH_LINES,
        validation.MAX_BLANK_LINES,
        ApiSettings().max_batch_errors,
        uploads.MAX_FIELDS,
        uploads.MAX_FIELD_BYTES,
        uploads.MAX_FORM_OVERHEAD_BYTES,
        exchange.MAX_QUERY_FIELDS,
        heads.MAX_HEAD_BYTES,
        heads.MAX_HEADERS,
    ):
        assert re.search(rf"\| {number}( bytes)? \|", limits), number
    assert f"{types.MAX_CUSTOM_ID_CHARS} characters, unique" in PAGE
    assert f"{settings.MIN_EXPIRY_S} to {settings.MAX_EXPIRY_S}" in PAGE
    assert f"1 to {settings.MAX_FILES_PAGE}, default" in PAGE
    assert f"1 to {settings.MAX_BATCHES_PAGE}, default {batches.DEFAULT_BATCHES_PAGE}" in PAGE
    assert f"kept for {ApiSettings().batch_file_days} days" in PAGE
    assert f"After {ApiSettings().keep_alive_ms // 1000} seconds of silence" in PAGE
    assert f"within\n{ApiSettings().key_ttl_ms // 1000} seconds" in PAGE
    assert f"1 to {requests.MAX_CHOICES} |" in PAGE
    assert f"up to {requests.MAX_STOPS} strings" in PAGE
    assert f"`top_logprobs` 0 to {requests.MAX_TOP_LOGPROBS}" in PAGE
    assert f"at most {requests.MAX_TOOLS} tools" in PAGE
    assert f"at most {requests.MAX_METADATA_PAIRS} pairs" in PAGE
    assert f"from 0 to {requests.MAX_TOKEN_ID}" in PAGE
    assert requests.MAX_TOKEN_ID == engine_request.MAX_TOKEN_ID
    assert requests.COMPLETION_TOKENS == engine_request.COMPLETION_TOKENS
    assert f"{requests.COMPLETION_TOKENS} if it is left out" in PAGE
    assert f"after another {heads.MAX_UNREAD_BYTES} bytes" in PAGE
    assert f"`days` (1 to {routes.MAX_STATEMENT_DAYS}, default {routes.STATEMENT_DAYS})" in PAGE
    minutes = f"{routes.DEFAULT_PAUSE_MINUTES} and {routes.DEFAULT_NEED_CAR_MINUTES}"
    assert f"(1 to {routes.MAX_MINUTES}, default {minutes})" in PAGE
    assert f"at most {consent.MAX_DOCUMENT_BYTES} bytes" in PAGE
    assert f"{sessions.BURST} at once, and one more every {sessions.REFILL_MS // 1000} seconds" in PAGE
    assert f"for {sessions.TOKEN_MS // 60_000} minutes" in PAGE
    assert f"for {sessions.CODE_MS // 3_600_000} hours" in PAGE
    assert owneraccess.CHALLENGE_DOMAIN.decode().strip() in PAGE
    assert owneraccess.RESUME_DOMAIN.decode().strip() in PAGE
    assert all(f"`{name}`" in PAGE for name in routes.OwnerView.__struct_fields__)
    assert all(f"| `{name}` |" in PAGE for name in ShownFootprint.__struct_fields__)
    assert all(f"`{purpose}`" in PAGE for purpose in files.PURPOSES)


def test_limits_of_embeddings_idempotency_and_webhooks_are_documented() -> None:
    assert f"at most {types.MAX_EMBEDDING_INPUTS}, none empty" in PAGE
    assert f"1 to {idempotency.MAX_NAME_BYTES} visible ASCII" in PAGE
    assert f"up to {idempotency.MAX_KEPT_BYTES} bytes are kept, {kept.MAX_ANSWERS} of an account" in PAGE
    assert f"and {kept.MAX_ACCOUNT_BYTES} bytes at most" in PAGE
    assert f"For {kept.LIFE_MS // 3_600_000} hours" in PAGE
    assert f"1 to {webhooks.MAX_NAME_CHARS} characters" in PAGE
    assert f"at most {targets.MAX_URL_CHARS} characters" in PAGE
    assert f"within {sender.TOTAL_S:.0f} seconds" in PAGE
    assert f"{worker.MAX_ATTEMPTS} times in all" in PAGE
    assert f"kept for {told.KEPT_MS // 86_400_000} days, {told.MAX_ENDED} of a webhook" in PAGE
    assert f"at most {told.MAX_WEBHOOKS} webhooks" in PAGE
    assert all(f"`{kind}`" in PAGE for kind in told.EVENT_TYPES)


def test_the_values_that_an_error_offers_are_those_that_are_taken() -> None:
    hints = requests.ChatRequest.__annotations__
    for field in ("reasoning_effort", "verbosity", "service_tier"):
        assert set(CHOICES[field]) == set(re.findall(r"'([a-z]+)'", hints[field]))
    assert set(CHOICES["role"]) == set(re.findall(r"'([a-z]+)'", requests.ChatMessage.__annotations__["role"]))
    assert set(CHOICES["endpoint"]) == set(re.findall(r"'([a-z/0-9]+)'", batches.NewBatch.__annotations__["endpoint"]))
    formats = (requests.TextFormat, requests.JsonObjectFormat, requests.JsonSchemaFormat)
    assert {kind.__struct_config__.tag for kind in formats} == set(CHOICES["response_format.type"])


def test_the_example_line_is_valid() -> None:
    example = re.search(r"```json\n(\{.*?\})\n```", PAGE)
    assert example is not None
    assert check_line(types.Kind.CHAT, example[1].encode())[0] == "a-1"
