"""The routes under /v1/responses: create, retrieve, listen, cancel, delete, and the items of the input.

A response belongs to one account; to others it does not exist. A client that leaves a response in the foreground
cancels it; one in the background runs on. Must not: run responses (``runs`` does), or keep or log what was asked or
answered anywhere but in the store.

Called by: ``app``, which also calls ``resume`` at start and ``close`` at the end.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from motorpool.errors import CallerError, CapacityError, NotFoundError
from motorpool.server.cell import Cell
from motorpool.server.openai.decoding import whole_number
from motorpool.server.openai.exchange import Attendance, ClientGoneError, Exchange, retry_headers
from motorpool.server.openai.files import page_limit
from motorpool.server.openai.responses.creation import kept_history, make_plan, read_history, still_running
from motorpool.server.openai.responses.log import Log
from motorpool.server.openai.responses.objects import (
    Item,
    Message,
    ResponseObject,
    facts_json,
    items_json,
    response_json,
    response_object,
)
from motorpool.server.openai.responses.registry import Registry, read_pieces
from motorpool.server.openai.responses.request import read_request
from motorpool.server.openai.responses.runs import Plan, Run, row_of
from motorpool.server.openai.responses.telling import Listener
from motorpool.server.openai.responses.translate import Failure
from motorpool.server.openai.settings import ApiSettings
from motorpool.store import responses as store
from motorpool.store.responses import ResponseRow

MAX_ITEMS_PAGE: Final = 100
DEFAULT_ITEMS_PAGE: Final = 20
MAX_EVENT_NUMBER: Final = 2**53


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """A response that is gone."""

    id: str
    object: str = "response"
    deleted: bool = True


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of input items."""

    object: str = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ErrorBox(msgspec.Struct, frozen=True):
    """OpenAI's envelope around an error that has its four fields already."""

    error: object


class ResponseRoutes:
    """All routes of responses."""

    def __init__(self, cell: Cell, settings: ApiSettings) -> None:
        self._cell = cell
        self._settings = settings
        self._registry = Registry(cell)

    def resume(self) -> int:
        """Go on with background responses that a stop left unfinished; return how many."""
        return self._registry.resume()

    async def close(self) -> None:
        """Stop; background responses go on with the next start."""
        await self._registry.close()

    # -- create

    async def create(self, exchange: Exchange, _: str) -> None:
        """POST /v1/responses."""
        request = read_request(await exchange.json(self._settings.max_body_bytes))
        self._cell.catalogue.get(request.model)
        now_ms = self._cell.now_ms()
        previous = request.previous_response_id
        if previous is not None and self._registry.find(exchange.account, previous) is not None:
            raise still_running()
        history = read_history(self._cell.reader, exchange.account, previous, now_ms)
        plan = make_plan(request, history, exchange.account, now_ms, self._settings.max_body_bytes)
        plan = msgspec.structs.replace(plan, request_id=exchange.request_id)
        if plan.facts.background:
            await self._in_background(exchange, plan)
        else:
            await self._in_foreground(exchange, self._registry.start(plan))

    async def _in_background(self, exchange: Exchange, plan: Plan) -> None:
        self._registry.check_room(exchange.account)
        row = row_of(plan, "queued")
        number = await self._cell.write(lambda connection: store.insert_response(connection, row))
        # From here on it is accepted: it runs on, whether the client stays or not.
        run = self._registry.start(msgspec.structs.replace(plan, number=number))
        if plan.streamed:
            await Listener(exchange, run.log).run(self._quiet_s)
        else:
            await exchange.answer_object(response_object(plan.facts, "queued"))

    async def _in_foreground(self, exchange: Exchange, run: Run) -> None:
        try:
            if run.plan.streamed:
                listener = Listener(exchange, run.log, wait=True)
                if await listener.run(self._quiet_s):
                    return
            else:
                async with Attendance(exchange):
                    await run.log.ended()
        except (ClientGoneError, asyncio.CancelledError):
            run.stop()
            raise
        if run.log.failure is not None:
            await _refuse(exchange, run.log.failure)
        else:
            await exchange.answer_object(run.log.result)

    @property
    def _quiet_s(self) -> float:
        return self._settings.keep_alive_ms / 1000

    # -- retrieve

    async def show(self, exchange: Exchange, response_id: str) -> None:
        """GET /v1/responses/{response_id}; with ``stream=true`` its events, after number ``starting_after``."""
        query = exchange.query()
        stream = _flag(query, "stream")
        after = _number(query, "starting_after")
        if after is not None and not stream:
            raise CallerError("starting_after needs stream=true", code="invalid_value", param="starting_after")
        run = self._registry.find(exchange.account, response_id)
        if run is not None and not stream:
            await exchange.answer_object(_standing(run))
            return
        row = None if run is not None else self._row(exchange, response_id)
        if row is not None and not stream:
            await exchange.answer_object(_shown(row))
            return
        log = run.log if run is not None else _told(self._cell, row)
        if not log.facts.background:
            raise CallerError(
                "only a response that was created with background: true can be listened to again",
                code="not_in_background",
                param="stream",
            )
        await Listener(exchange, log, after=-1 if after is None else after).run(self._quiet_s)

    async def input_items(self, exchange: Exchange, response_id: str) -> None:
        """GET /v1/responses/{response_id}/input_items, the newest first unless ``order`` is ``asc``."""
        query = exchange.query()
        limit = page_limit(query, DEFAULT_ITEMS_PAGE, MAX_ITEMS_PAGE)
        order = query.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise CallerError("order must be asc or desc", code="invalid_value", param="order")
        if "before" in query:
            raise CallerError("before is not served: use after", code="unsupported_parameter", param="before")
        items = self._items(exchange, response_id)
        if order == "desc":
            items.reverse()
        after = query.get("after")
        begin = 0
        if after is not None:
            places = [place for place, item in enumerate(items) if item.id == after]
            if not places:
                raise CallerError("after must be the id of an item in this list", code="invalid_value", param="after")
            begin = places[0] + 1
        page = items[begin : begin + limit]
        await exchange.answer_object(
            ItemList(
                data=page,
                first_id=page[0].id if page else None,
                last_id=page[-1].id if page else None,
                has_more=begin + limit < len(items),
            )
        )

    def _items(self, exchange: Exchange, response_id: str) -> list[Item]:
        """All that a model read for a response, its instructions apart: the conversation before it, then its input."""
        run = self._registry.find(exchange.account, response_id)
        if run is not None and not run.plan.facts.background:
            previous, own = run.plan.facts.previous_response_id, list(run.plan.items)
        else:
            row = self._row(exchange, response_id)
            previous, own = row.previous_id, items_json.decode(row.items)
        return kept_history(self._cell.reader, exchange.account, previous) + own

    # -- cancel and delete

    async def cancel(self, exchange: Exchange, response_id: str) -> None:
        """POST /v1/responses/{response_id}/cancel; one that has ended stays as it is."""
        run = self._registry.find(exchange.account, response_id)
        if run is None:
            row = self._row(exchange, response_id)
            if not row.background:
                raise _not_cancellable()
            await exchange.answer_object(_shown(row))
            return
        if not run.plan.facts.background:
            raise _not_cancellable()
        run.stop()
        async with Attendance(exchange):
            result = await run.log.ended()
        await exchange.answer_object(result)

    async def delete(self, exchange: Exchange, response_id: str) -> None:
        """DELETE /v1/responses/{response_id}; one that still runs is cancelled."""
        run = self._registry.find(exchange.account, response_id)
        if run is not None:
            run.forgotten = True
            run.stop()
            async with Attendance(exchange):
                await run.log.ended()
        account = exchange.account
        was_there = await self._cell.write(lambda connection: store.delete_response(connection, account, response_id))
        if not was_there and run is None:
            raise _not_found()
        await exchange.answer_object(Deleted(id=response_id))

    def _row(self, exchange: Exchange, response_id: str) -> ResponseRow:
        row = store.find_response(self._cell.reader, exchange.account, response_id, self._cell.now_ms())
        if row is None:
            raise _not_found()
        return row


def _standing(run: Run) -> ResponseObject:
    """A response that has not ended, with what is known of its output."""
    if run.log.result is not None:
        return run.log.result
    return response_object(run.plan.facts, "in_progress" if run.log.published else "queued")


def _shown(row: ResponseRow) -> ResponseObject:
    """A response from the books."""
    if row.result is not None:
        return response_json.decode(row.result)
    return response_object(facts_json.decode(row.facts), "in_progress" if row.status == "in_progress" else "queued")


def _told(cell: Cell, row: ResponseRow | None) -> Log:
    """The events of a response that has ended; raises CallerError when they are not kept any more."""
    assert row is not None, "it is running or in the books"
    result = _shown(row)
    pieces = read_pieces(cell.reader, row.response_no)
    if row.background and not pieces and any(isinstance(item, Message) for item in result.output):
        raise CallerError(
            "the events of this response are not kept any more: retrieve it without stream",
            code="events_expired",
            param="stream",
        )
    log = Log(facts_json.decode(row.facts), pieces)
    log.close(result)
    return log


async def _refuse(exchange: Exchange, failed: Failure) -> None:
    """Tell a failure before the first byte, with its own status."""
    extra: list[tuple[bytes, bytes]] = []
    if failed.is_busy:
        wait = CapacityError("", retry_after_ms=failed.retry_after_ms or CapacityError("").retry_after_ms)
        extra = retry_headers(wait)
    await exchange.answer(failed.status, msgspec.json.encode(ErrorBox(failed.error)), extra)


def _flag(query: dict[str, str], name: str) -> bool:
    value = query.get(name, "false")
    if value not in {"true", "false"}:
        raise CallerError(f"{name} must be true or false", code="invalid_type", param=name)
    return value == "true"


def _number(query: dict[str, str], name: str) -> int | None:
    value = query.get(name)
    if value is None:
        return None
    number = whole_number(value, 0, MAX_EVENT_NUMBER)
    if number is None:
        raise CallerError(f"{name} must be the number of an event", code="invalid_value", param=name)
    return number


def _not_found() -> NotFoundError:
    return NotFoundError("there is no response with this id", code="response_not_found", param="response_id")


def _not_cancellable() -> CallerError:
    return CallerError(
        "only a response that was created with background: true can be cancelled: close the connection instead",
        code="response_not_cancellable",
        param="response_id",
    )
