"""The OpenAPI document of the served API, made of the very types that requests are decoded with.

Decides: how each route is described. A route that is not described here, or described and not served, fails the tests.
Called by: ``app``, which serves it at ``/openapi.json``.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any, Final

import msgspec

from motorpool.errors import ErrorEnvelope
from motorpool.server.openai import batches, embeddings, files, models, requests, webhooks
from motorpool.server.openai import openapi_answers as answers
from motorpool.server.openai.responses import objects as response_objects
from motorpool.server.openai.responses import request as response_request
from motorpool.server.openai.responses import routes as response_routes
from motorpool.server.openai.settings import MAX_BATCHES_PAGE, MAX_EXPIRY_S, MAX_FILES_PAGE, MIN_EXPIRY_S
from motorpool.server.owner import routes as owner

JSON: Final = "application/json"
_PLACE: Final = re.compile(r"\{([a-z_]+)(?::path)?\}")
_PREFIX: Final = "#/components/schemas/"

Schema = dict[str, Any]


def _limit(most: int, default: int) -> Schema:
    return {"type": "integer", "minimum": 1, "maximum": most, "default": default}


_TEXT: Final[Schema] = {"type": "string"}
_ORDER: Final[Schema] = {"type": "string", "enum": ["asc", "desc"], "default": "desc"}
_BYTES: Final[Schema] = {}  # of a file: any
_SIGNED: Final[Schema] = {"type": "object"}  # a document that the owner has signed
_UPLOAD: Final[Schema] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "purpose": {"type": "string", "enum": list(files.PURPOSES)},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_EXPIRY_S, "maximum": MAX_EXPIRY_S},
    },
}


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One route. ``body`` and ``answer`` are types, or schemas as they stand; ``stream``: it may answer in events."""

    does: str
    answer: Any
    body: Any = None
    body_is_needed: bool = True
    body_type: str = JSON
    answer_type: str = JSON
    stream: bool = False
    query: dict[str, Schema] = {}
    key: str | None = "api_key"
    metered: bool = False


OPERATIONS: Final[dict[tuple[str, str], Operation]] = {
    ("POST", "/v1/chat/completions"): Operation(
        does="answers a conversation",
        body=requests.ChatRequest,
        answer=answers.ChatCompletion,
        stream=True,
        metered=True,
    ),
    ("POST", "/v1/completions"): Operation(
        does="continues a prompt", body=requests.CompletionRequest, answer=answers.Completion, stream=True, metered=True
    ),
    ("POST", "/v1/embeddings"): Operation(
        does="turns texts into vectors", body=embeddings.EmbeddingRequest, answer=answers.EmbeddingList, metered=True
    ),
    ("POST", "/v1/responses"): Operation(
        does="makes a response",
        body=response_request.CreateRequest,
        answer=response_objects.ResponseObject,
        stream=True,
        metered=True,
    ),
    ("GET", "/v1/responses/{response_id}"): Operation(
        does="shows a response, or tells its events on from a place",
        answer=response_objects.ResponseObject,
        stream=True,
        query={
            "stream": {"type": "string", "enum": ["true", "false"]},
            "starting_after": {"type": "integer", "minimum": 0},
        },
    ),
    ("DELETE", "/v1/responses/{response_id}"): Operation(does="deletes a response", answer=response_routes.Deleted),
    ("POST", "/v1/responses/{response_id}/cancel"): Operation(
        does="cancels a response in the background", answer=response_objects.ResponseObject
    ),
    ("GET", "/v1/responses/{response_id}/input_items"): Operation(
        does="lists what a response was asked",
        answer=response_routes.ItemList,
        query={
            "limit": _limit(response_routes.MAX_ITEMS_PAGE, response_routes.DEFAULT_ITEMS_PAGE),
            "order": _ORDER,
            "after": _TEXT,
        },
    ),
    ("GET", "/v1/models"): Operation(does="lists the models that may be asked for", answer=models.ModelList),
    ("GET", "/v1/models/{model}"): Operation(does="shows a model", answer=models.ModelObject),
    ("POST", "/v1/files"): Operation(
        does="uploads a file", body=_UPLOAD, body_type="multipart/form-data", answer=files.FileObject
    ),
    ("GET", "/v1/files"): Operation(
        does="lists files",
        answer=files.FileList,
        query={"after": _TEXT, "limit": _limit(MAX_FILES_PAGE, MAX_FILES_PAGE), "order": _ORDER, "purpose": _TEXT},
    ),
    ("GET", "/v1/files/{file_id}"): Operation(does="shows a file", answer=files.FileObject),
    ("DELETE", "/v1/files/{file_id}"): Operation(does="deletes a file", answer=files.Deleted),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        does="downloads a file", answer=_BYTES, answer_type="application/octet-stream"
    ),
    ("POST", "/v1/batches"): Operation(does="hands in a batch", body=batches.NewBatch, answer=batches.BatchObject),
    ("GET", "/v1/batches"): Operation(
        does="lists batches, newest first",
        answer=batches.BatchList,
        query={"after": _TEXT, "limit": _limit(MAX_BATCHES_PAGE, batches.DEFAULT_BATCHES_PAGE)},
    ),
    ("GET", "/v1/batches/{batch_id}"): Operation(does="shows a batch", answer=batches.BatchObject),
    ("POST", "/v1/batches/{batch_id}/cancel"): Operation(does="cancels a batch", answer=batches.BatchObject),
    ("POST", "/v1/webhook_endpoints"): Operation(
        does="makes a webhook", body=webhooks.NewWebhook, answer=webhooks.WebhookWithSecret
    ),
    ("GET", "/v1/webhook_endpoints"): Operation(
        does="lists webhooks, newest first",
        answer=webhooks.WebhookList,
        query={"after": _TEXT, "limit": _limit(webhooks.MAX_PAGE, webhooks.DEFAULT_PAGE)},
    ),
    ("GET", "/v1/webhook_endpoints/{webhook_endpoint_id}"): Operation(
        does="shows a webhook", answer=webhooks.WebhookObject
    ),
    ("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}"): Operation(
        does="changes a webhook", body=webhooks.WebhookChange, answer=webhooks.WebhookObject
    ),
    ("DELETE", "/v1/webhook_endpoints/{webhook_endpoint_id}"): Operation(
        does="deletes a webhook", answer=webhooks.WebhookDeleted
    ),
    ("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret"): Operation(
        does="gives a webhook a new secret",
        body=webhooks.SecretRotation,
        body_is_needed=False,
        answer=webhooks.WebhookWithSecret,
    ),
    ("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}/test"): Operation(
        does="sends a sample event now", body=webhooks.WebhookTrial, answer=webhooks.WebhookTestResult
    ),
    ("GET", "/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries"): Operation(
        does="shows what a webhook was told",
        answer=webhooks.DeliveryList,
        query={"limit": _limit(webhooks.MAX_LOG, webhooks.DEFAULT_PAGE)},
    ),
    ("GET", "/v1/webhook_event_types"): Operation(
        does="lists the events that webhooks may hear of", answer=webhooks.EventTypeList
    ),
    ("POST", "/v1/owner/enrol"): Operation(
        does="registers an owner's key", body=owner.NewOwner, answer=answers.OwnerEnrolled, key=None
    ),
    ("POST", "/v1/owner/challenge"): Operation(
        does="gives a nonce for the owner's key to sign", body=owner.Asked, answer=answers.OwnerChallenge, key=None
    ),
    ("POST", "/v1/owner/token"): Operation(
        does="gives a token for a signed nonce", body=owner.Answer, answer=answers.OwnerToken, key=None
    ),
    ("GET", "/v1/owner/vehicles/{vehicle_id}"): Operation(
        does="shows the owner's vehicle",
        answer=owner.OwnerView,
        key="owner_token",
        query={"days": {"type": "integer", "minimum": 1, "maximum": 366, "default": 31}},
    ),
    ("POST", "/v1/owner/vehicles/{vehicle_id}/consent"): Operation(
        does="takes a signed consent or withdrawal", body=_SIGNED, answer=owner.OwnerView, key="owner_token"
    ),
    ("POST", "/v1/owner/vehicles/{vehicle_id}/pause"): Operation(
        does="no work for some minutes",
        body=owner.Pause,
        body_is_needed=False,
        answer=owner.OwnerView,
        key="owner_token",
    ),
    ("POST", "/v1/owner/vehicles/{vehicle_id}/need-car"): Operation(
        does="the owner needs the car now",
        body=owner.Pause,
        body_is_needed=False,
        answer=owner.OwnerView,
        key="owner_token",
    ),
    ("POST", "/v1/owner/vehicles/{vehicle_id}/resume"): Operation(
        does="takes a signed end of all pauses", body=_SIGNED, answer=owner.OwnerView, key="owner_token"
    ),
    ("GET", "/healthz"): Operation(does="tells that the process serves", answer=answers.Health, key=None),
    ("GET", "/openapi.json"): Operation(does="gives this document", answer={"type": "object"}, key=None),
}

_HEADERS: Final[Schema] = {
    "x-request-id": {"description": "names the request", "schema": _TEXT},
    "openai-processing-ms": {"description": "milliseconds until the answer began", "schema": _TEXT},
    "openai-version": {"schema": _TEXT},
}
_LIMITS: Final[Schema] = {
    f"x-ratelimit-{what}-{name}": {"description": "if the key has such a limit", "schema": _TEXT}
    for name in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
}


def document() -> Schema:
    """The whole document, OpenAPI 3.1."""
    types = [kind for operation in OPERATIONS.values() for kind in (operation.body, operation.answer)]
    structs = list(dict.fromkeys(kind for kind in types if isinstance(kind, type)))
    found, components = msgspec.json.schema_components(
        [*structs, ErrorEnvelope], schema_hook=_any, ref_template=_PREFIX + "{name}"
    )
    schemas: dict[Any, Schema] = dict(zip([*structs, ErrorEnvelope], found, strict=True))
    paths: Schema = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, operation, schemas)
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": "Motorpool",
            "version": metadata.version("motorpool"),
            "description": "A compute cloud of parked electric vehicles, behind an OpenAI-compatible API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "api_key": {"type": "http", "scheme": "bearer"},
                "owner_token": {"type": "http", "scheme": "bearer"},
            },
        },
    }
    tidied: Schema = _tidied(whole, {name: _short(name) for name in components})
    return tidied


def encoded() -> bytes:
    """The document as it is served."""
    return msgspec.json.encode(document())


def _operation(method: str, path: str, operation: Operation, schemas: dict[Any, Schema]) -> Schema:
    content: Schema = {operation.answer_type: {"schema": _schema(operation.answer, schemas)}}
    if operation.stream:
        content["text/event-stream"] = {"schema": {"description": "server-sent events, each one a JSON object"}}
    headers = _HEADERS | (_LIMITS if operation.metered else {})
    refused = {"description": "an error", "content": {JSON: {"schema": schemas[ErrorEnvelope]}}, "headers": headers}
    made: Schema = {
        "operationId": f"{method.lower()}_{re.sub(r'[^a-z]+', '_', path.lower()).strip('_')}",
        "summary": operation.does,
        "tags": [(path.removeprefix("/v1") or path).strip("/").split("/")[0].replace(".json", "")],
        "security": [{operation.key: []}] if operation.key else [],
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": _TEXT} for name in _PLACE.findall(path)),
            *({"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()),
        ],
        "responses": {
            "200": {"description": operation.does, "content": content, "headers": headers},
            "default": refused,
        },
    }
    if operation.body is not None:
        body = {operation.body_type: {"schema": _schema(operation.body, schemas)}}
        made["requestBody"] = {"required": operation.body_is_needed, "content": body}
    return made


def _schema(kind: Any, schemas: dict[Any, Schema]) -> Schema:
    return schemas[kind] if isinstance(kind, type) else kind


def _any(kind: type) -> Schema:
    """A field that is not read, so that it may hold anything."""
    if kind is object:
        return {"description": "anything"}
    raise NotImplementedError


def _short(name: str) -> str:
    """Types of the same name, which come with their modules, are told apart by the last part of these."""
    parts = name.split(".")
    return f"{parts[-2].capitalize()}{parts[-1]}" if len(parts) > 1 else name


def _tidied(value: Any, names: dict[str, str]) -> Any:
    """With the names of types short, and patterns as ECMAScript has them."""
    if isinstance(value, list):
        return [_tidied(one, names) for one in value]
    if isinstance(value, str) and value.startswith(_PREFIX):
        return _PREFIX + names[value.removeprefix(_PREFIX)]
    if not isinstance(value, dict):
        return value
    made: Schema = {}
    for key, inner in value.items():
        if key == "pattern" and isinstance(inner, str):
            made[key] = inner.replace(r"\Z", "$")
        else:
            made[names.get(str(key), str(key))] = _tidied(inner, names)
    return made
