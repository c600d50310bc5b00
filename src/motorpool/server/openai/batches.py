"""Batches: created, listed, shown, cancelled. Running them is the cell's work, checking their files ``validation``'s.

Called by: ``app``. Must not: read input files, or change a batch that has left ``validating``.
"""

from __future__ import annotations

import re
import secrets
from sqlite3 import Connection
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Raw

from motorpool.core.attribution import Footprint
from motorpool.errors import CallerError, NotFoundError
from motorpool.server.cell import Cell
from motorpool.server.openai.decoding import decode
from motorpool.server.openai.exchange import Exchange
from motorpool.server.openai.files import page_limit
from motorpool.server.openai.footprints import ShownFootprint, shown
from motorpool.server.openai.requests import Metadata
from motorpool.server.openai.settings import (
    MAX_BATCHES_PAGE,
    MAX_EXPIRY_S,
    MAX_WINDOW_S,
    MIN_EXPIRY_S,
    MIN_WINDOW_S,
    ApiSettings,
)
from motorpool.server.openai.validation import LineError, Validation
from motorpool.store import books, customer
from motorpool.store.books import BatchTerms
from motorpool.store.customer import BatchRow, BatchStatus

DEFAULT_BATCHES_PAGE: Final = 20
_WINDOW = re.compile(r"([1-9][0-9]{0,4})([mhd])", re.ASCII)
_UNIT_S: Final = {"m": 60, "h": 3600, "d": 86400}
MAX_REGIONS: Final = 32
MAX_REGION_CHARS: Final = 32
MAX_TRUST: Final = 3
FLEX: Final = "flex"
_errors: Final = msgspec.json.Decoder(list[LineError])


class OutputExpiry(msgspec.Struct, frozen=True, kw_only=True):
    """How long output files are kept after they were made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)]


Region = Annotated[str, Meta(min_length=1, max_length=MAX_REGION_CHARS, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]


class BatchWishes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a batch may run, on vehicles of which tier of trust at least, and whether anything need be promised.

    No field that is not known is let through: a misspelt residency would be none.
    """

    regions: Annotated[list[Region], Meta(min_length=1, max_length=MAX_REGIONS)] | None = None
    min_trust: Annotated[int, Meta(ge=0, le=MAX_TRUST)] = 0
    priority: Literal["standard", "flex"] = "standard"


class NewBatch(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: str
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None
    motorpool: BatchWishes | None = None


_new_batch: Final = msgspec.json.Decoder(NewBatch)


class BatchErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Why the file of a batch is invalid."""

    object: Literal["list"] = "list"
    data: list[LineError]


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class InputDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the input tokens, those that the engine need not read again."""

    cached_tokens: int


class OutputDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the output tokens, those of hidden reasoning; always 0 here."""

    reasoning_tokens: int = 0


class BatchUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the finished lines, and what vehicles drew for them."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int
    motorpool: ShownFootprint


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """By when a batch will be done, in seconds since 1970 (UTC); not ``known``: the cell has no history to go by."""

    finish_at: int
    known: bool


class BatchExtra(msgspec.Struct, frozen=True, kw_only=True):
    """What OpenAI has no field for: tokens that a vehicle took over from another, the cost so far, who could run it.

    Then what was asked for, and what was promised: None before the file is checked, and for priority ``flex``.
    """

    carried_tokens: int
    cost_micro: int
    vehicles: int
    regions: tuple[str, ...] | None = None
    min_trust: int = 0
    priority: str = "standard"
    quote: Quote | None = None


class BatchObject(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as a customer sees it; times in seconds since 1970 (UTC)."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: Raw | None
    motorpool: BatchExtra


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of batches."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_object(row: BatchRow, vehicles: int, terms: BatchTerms = books.NO_TERMS) -> BatchObject:
    """The customer's view of a row; ``vehicles`` could run it now, where and how it asks for."""
    known = terms.quote_known
    return BatchObject(
        id=row.batch_id,
        endpoint=row.endpoint,
        model=row.model,
        errors=None if row.errors is None else BatchErrors(data=_errors.decode(row.errors)),
        input_file_id=row.input_file_id,
        completion_window=row.completion_window,
        status=row.status,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        created_at=row.created_ms // 1000,
        in_progress_at=_seconds(row.in_progress_ms),
        expires_at=row.expires_ms // 1000,
        finalizing_at=_seconds(row.finalizing_ms),
        completed_at=_seconds(row.completed_ms),
        failed_at=_seconds(row.failed_ms),
        expired_at=_seconds(row.expired_ms),
        cancelling_at=_seconds(row.cancelling_ms),
        cancelled_at=_seconds(row.cancelled_ms),
        request_counts=RequestCounts(total=row.total, completed=row.completed, failed=row.failed),
        usage=BatchUsage(
            input_tokens=row.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=row.cached_tokens),
            output_tokens=row.completion_tokens,
            total_tokens=row.prompt_tokens + row.completion_tokens,
            motorpool=shown(
                Footprint(
                    energy_uwh=row.energy_uwh,
                    co2_ug=row.co2_ug,
                    is_measured=row.measured_uwh == row.energy_uwh > 0,
                )
            ),
        ),
        metadata=None if row.metadata is None else Raw(row.metadata.encode()),
        motorpool=BatchExtra(
            carried_tokens=row.carried_tokens,
            cost_micro=row.cost_micro,
            vehicles=vehicles,
            regions=terms.regions or None,
            min_trust=terms.min_trust,
            priority=FLEX if terms.best_effort else "standard",
            quote=None
            if terms.promised_ms is None or known is None
            else Quote(finish_at=terms.promised_ms // 1000, known=known),
        ),
    )


def _terms(wishes: BatchWishes | None) -> BatchTerms:
    """What is asked for, as the books keep it."""
    if wishes is None:
        return books.NO_TERMS
    regions = tuple(dict.fromkeys(wishes.regions or ()))
    return BatchTerms(regions=regions, min_trust=wishes.min_trust, best_effort=wishes.priority == FLEX)


def _seconds(at_ms: int | None) -> int | None:
    return None if at_ms is None else at_ms // 1000


def window_s(text: str) -> int:
    """Seconds of a completion window: a whole number and m, h or d, from 15m to 7d. Raises CallerError otherwise."""
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not MIN_WINDOW_S <= seconds <= MAX_WINDOW_S:
        raise CallerError(
            "completion_window must be 24h or another whole number of m, h or d from 15m to 7d",
            code="invalid_value",
            param="completion_window",
        )
    return seconds


class BatchRoutes:
    """The routes under /v1/batches."""

    def __init__(self, cell: Cell, settings: ApiSettings, validation: Validation) -> None:
        self._cell = cell
        self._settings = settings
        self._validation = validation

    async def create(self, exchange: Exchange, _: str) -> None:
        """POST /v1/batches."""
        new = decode(_new_batch, await exchange.json(self._settings.max_body_bytes))
        now_ms = self._cell.now_ms()
        draft = BatchRow(
            batch_no=0,
            batch_id="batch_" + secrets.token_hex(12),
            account=exchange.account,
            endpoint=new.endpoint,
            input_file_id=new.input_file_id,
            completion_window=new.completion_window,
            status=BatchStatus.VALIDATING,
            metadata=None if new.metadata is None else msgspec.json.encode(new.metadata).decode(),
            output_expires_s=None if new.output_expires_after is None else new.output_expires_after.seconds,
            created_ms=now_ms,
            expires_ms=now_ms + window_s(new.completion_window) * 1000,
        )

        def change(connection: Connection) -> BatchRow:
            try:
                file = customer.customers_file(connection, exchange.account, new.input_file_id, now_ms)
            except NotFoundError as error:
                raise NotFoundError(error.message, code=error.code, param="input_file_id") from None
            if file.purpose != "batch":
                raise CallerError(
                    "the input file must have been uploaded with purpose batch",
                    code="invalid_purpose",
                    param="input_file_id",
                )
            inserted = customer.insert_batch(connection, draft)
            books.save_terms(connection, inserted.batch_no, _terms(new.motorpool))
            return inserted

        row = await self._cell.write(change)
        self._validation.begin(row)
        await exchange.answer_object(self._object(row))

    async def page(self, exchange: Exchange, _: str) -> None:
        """GET /v1/batches."""
        query = exchange.query()
        limit = page_limit(query, DEFAULT_BATCHES_PAGE, MAX_BATCHES_PAGE)
        rows, more = customer.list_batches(self._cell.reader, exchange.account, limit=limit, after=query.get("after"))
        data = [self._object(row) for row in rows]
        await exchange.answer_object(
            BatchList(
                data=data,
                first_id=data[0].id if data else None,
                last_id=data[-1].id if data else None,
                has_more=more,
            )
        )

    async def show(self, exchange: Exchange, batch_id: str) -> None:
        """GET /v1/batches/{batch_id}."""
        await exchange.answer_object(self._object(self._row(exchange, batch_id)))

    async def cancel(self, exchange: Exchange, batch_id: str) -> None:
        """POST /v1/batches/{batch_id}/cancel; repeating it on a batch that is cancelling or cancelled is fine."""
        row = self._row(exchange, batch_id)
        if row.status == BatchStatus.VALIDATING:
            await self._validation.cancel(row.batch_no)
            row = self._row(exchange, batch_id)
        if row.status not in {BatchStatus.CANCELLING, BatchStatus.CANCELLED}:
            await self._cell.cancel_batch(row.batch_no)
        await exchange.answer_object(self._object(self._row(exchange, batch_id)))

    def _object(self, row: BatchRow) -> BatchObject:
        terms = books.terms_of(self._cell.reader, row.batch_no)
        vehicles = 0 if row.model is None else self._cell.serving(row.model, terms.regions, terms.min_trust)
        return batch_object(row, vehicles, terms)

    def _row(self, exchange: Exchange, batch_id: str) -> BatchRow:
        return customer.customers_batch(self._cell.reader, exchange.account, batch_id)
