"""From the body of ``POST /v1/responses`` to a plan that can be run: checked, joined to its conversation, translated.

Must not: run the plan, or write to the books. Called by: ``routes``.
"""

from __future__ import annotations

import secrets
import zlib
from sqlite3 import Connection
from typing import Final

import msgspec
from msgspec import Raw

from motorpool.core.streams import name_of, tier_of
from motorpool.errors import CallerError, ConflictError, TooLargeError
from motorpool.server.openai.responses.items import check_calls, read_input
from motorpool.server.openai.responses.objects import PREFIX, Facts, Item, Message, items_json, response_json
from motorpool.server.openai.responses.request import CreateRequest, FunctionTool, Tools, read_tools
from motorpool.server.openai.responses.runs import Plan
from motorpool.server.openai.responses.translate import SEED_BITS, chat_body, may_call, shorten
from motorpool.store import responses as store
from motorpool.store.responses import MAX_CHAIN, MAX_CHAIN_BYTES, ResponseRow

GOES_ON: Final = ("completed", "incomplete")  # how a response must have ended for another one to go on with it
_json: Final = msgspec.json.Encoder().encode


def new_response_id() -> str:
    """A new id; nobody can guess one."""
    return PREFIX + secrets.token_hex(16)


def make_plan(request: CreateRequest, history: list[Item], account: str, now_ms: int, max_body_bytes: int) -> Plan:
    """What is to be run for a request after ``history``; raises CallerError or TooLargeError."""
    tools = read_tools(request)
    response_id = new_response_id()
    items = read_input(request.input, response_id)
    conversation = history + items
    check_calls(conversation)
    background = bool(request.background)
    whole = may_call(tools) or not (background or request.stream)
    # A run that has to begin anew shall say the same again, whatever the temperature is.
    seed = zlib.crc32(response_id.encode()) & SEED_BITS if background else None
    body: bytes | None = chat_body(request, tools, conversation, stream=not whole, seed=seed)
    while body is not None and len(body) > max_body_bytes and request.truncation == "auto":
        body = shorten(body)
    if body is None or len(body) > max_body_bytes:
        raise TooLargeError(
            f"the conversation is over the limit of {max_body_bytes} bytes", code="body_too_large", param="input"
        )
    return Plan(
        account=account,
        facts=facts_of(request, tools, response_id, now_ms // 1000),
        items=items,
        body=body,
        whole=whole,
        streamed=bool(request.stream),
        created_ms=now_ms,
    )


def facts_of(request: CreateRequest, tools: Tools, response_id: str, created_s: int) -> Facts:
    """What a response to this request says from its beginning on."""
    return Facts(
        response_id=response_id,
        created_s=created_s,
        model=request.model,
        background=bool(request.background),
        store=request.is_stored,
        previous_response_id=request.previous_response_id,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        prompt_cache_key=request.prompt_cache_key,
        safety_identifier=request.safety_identifier,
        temperature=request.temperature,
        text=_text(request),
        tool_choice=Raw(_json("auto" if request.tool_choice is None else request.tool_choice)),
        tools=Raw(_json([_tool(function) for function in tools.functions])),
        top_logprobs=request.top_logprobs or 0,
        top_p=request.top_p,
        truncation=request.truncation or "disabled",
        user=request.user,
        service_tier=name_of(tier_of(request.service_tier)),
        skipped_tools=tools.skipped,
    )


def _text(request: CreateRequest) -> Raw:
    wanted = request.text.format if request.text is not None else None
    if wanted is None or wanted.type != "json_schema":
        shown: dict[str, object] = {"type": "text" if wanted is None else wanted.type}
    else:
        shown = {name: getattr(wanted, name) for name in ("type", "name", "description", "schema", "strict")}
    return Raw(_json({"format": shown, "verbosity": "medium"}))


def _tool(function: FunctionTool) -> dict[str, object]:
    return {name: getattr(function, name) for name in ("type", "name", "description", "parameters", "strict")}


def read_history(connection: Connection, account: str, response_id: str | None, now_ms: int) -> list[Item]:
    """All items of the conversation that a response goes on with; raises CallerError that says why it cannot."""
    if response_id is None:
        return []
    last = store.find_response(connection, account, response_id, now_ms)
    if last is None:
        raise _lost("there is no response with this id: it was deleted, has expired, or was not stored")
    if last.ended_ms is None:
        raise still_running()
    if last.status not in GOES_ON:
        raise CallerError(
            f"the previous response is {last.status}: go on with one that has an answer",
            code="previous_response_not_answered",
            param="previous_response_id",
        )
    count, size = store.conversation_size(connection, account, response_id)
    if count >= MAX_CHAIN or size > MAX_CHAIN_BYTES:
        raise CallerError(
            f"a conversation may have {MAX_CHAIN} responses of {MAX_CHAIN_BYTES} bytes together: begin a new one",
            code="conversation_too_long",
            param="previous_response_id",
        )
    rows = store.conversation(connection, account, response_id)
    if rows[0].previous_id is not None:
        raise _lost("an earlier response of this conversation was deleted: send the conversation as input")
    return _items_of(rows)


def kept_history(connection: Connection, account: str, response_id: str | None) -> list[Item]:
    """The items of the same conversation, as far as they are still kept."""
    return [] if response_id is None else _items_of(store.conversation(connection, account, response_id))


def _items_of(rows: list[ResponseRow]) -> list[Item]:
    history: list[Item] = []
    for row in rows:
        history += items_json.decode(row.items)
        if row.result is not None:
            history += [item for item in response_json.decode(row.result).output if _is_worth_telling(item)]
    return history


def _is_worth_telling(item: Item) -> bool:
    """A message in which nothing was said is no part of a conversation."""
    return not isinstance(item, Message) or any(getattr(part, "text", "refusal") for part in item.content)


def still_running() -> ConflictError:
    """The error for a conversation whose last response has not ended."""
    return ConflictError(
        "the previous response has not ended: wait for it",
        code="previous_response_in_progress",
        param="previous_response_id",
    )


def _lost(message: str) -> CallerError:
    return CallerError(message, code="previous_response_not_found", param="previous_response_id")
