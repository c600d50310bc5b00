"""Webhook endpoints as OpenAI's clients manage them: made, listed, changed, tried, deleted; and their delivery logs.

Called by: ``app``. Must not: show a secret but once, when it is made.
"""

from __future__ import annotations

import asyncio
import secrets
from sqlite3 import Connection
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from motorpool.errors import CallerError
from motorpool.server.cell import Cell
from motorpool.server.openai.decoding import decode
from motorpool.server.openai.exchange import Exchange
from motorpool.server.openai.files import page_limit
from motorpool.server.openai.settings import ApiSettings
from motorpool.server.webhooks import signing
from motorpool.server.webhooks.sender import Sender
from motorpool.server.webhooks.targets import check_url
from motorpool.store import webhooks as store
from motorpool.store.webhooks import EVENT_TYPES, Delivery, Webhook

DEFAULT_PAGE: Final = 20
MAX_PAGE: Final = 100
MAX_NAME_CHARS: Final = 200
MAX_LOG: Final = 100
OLD_SECRET_MS: Final = 24 * 3600 * 1000
TESTS_AT_ONCE: Final = 4

EventType = Literal[
    "batch.cancelled",
    "batch.completed",
    "batch.expired",
    "batch.failed",
    "response.cancelled",
    "response.completed",
    "response.failed",
    "response.incomplete",
]
EventTypes = Annotated[list[EventType], Meta(min_length=1, max_length=64)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]


class NewWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/webhook_endpoints."""

    event_types: EventTypes
    name: Name
    url: str


class WebhookChange(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/webhook_endpoints/{id}; what is left out stays."""

    event_types: EventTypes | None = None
    name: Name | None = None
    url: str | None = None


class SecretRotation(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/webhook_endpoints/{id}/rotate_secret."""

    keep_old_secret_active_for_24_hours: bool = False


class WebhookTrial(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/webhook_endpoints/{id}/test."""

    event_type: EventType


class WebhookObject(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """A webhook as a customer sees it; times in seconds since 1970 (UTC).

    ``disabled_at``: its server said that it is gone; an update makes it heard again.
    """

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    event_types: list[str]
    name: str
    url: str
    signing_secret_hint: str
    disabled_at: int | None


class WebhookWithSecret(WebhookObject, frozen=True, kw_only=True):
    """The same with its secret, when that is new."""

    signing_secret: str


class WebhookList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of webhooks."""

    object: Literal["list"] = "list"
    data: list[WebhookObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class WebhookDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook is gone."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class WebhookTestResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a webhook said to a sample event."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class EventTypeList(msgspec.Struct, frozen=True, kw_only=True):
    """What can be heard of."""

    object: Literal["list"] = "list"
    data: list[str]


class DeliveryObject(msgspec.Struct, frozen=True, kw_only=True):
    """One event for one webhook; ``outcome`` is of the last attempt, ``next_attempt_at`` null once it has ended."""

    object: Literal["webhook_endpoint.delivery"] = "webhook_endpoint.delivery"
    event_id: str
    event_type: str
    subject_id: str
    created_at: int
    status: str
    attempts: int
    outcome: str
    next_attempt_at: int | None
    ended_at: int | None


class DeliveryList(msgspec.Struct, frozen=True, kw_only=True):
    """The newest deliveries of a webhook."""

    object: Literal["list"] = "list"
    data: list[DeliveryObject]


_new: Final = msgspec.json.Decoder(NewWebhook)
_change: Final = msgspec.json.Decoder(WebhookChange)
_rotation: Final = msgspec.json.Decoder(SecretRotation)
_trial: Final = msgspec.json.Decoder(WebhookTrial)


def draft(*, account: str, name: str, url: str, event_types: list[str], now_ms: int) -> Webhook:
    """A webhook with a new id and secret, not yet written anywhere."""
    return Webhook(
        webhook_id="we_" + secrets.token_hex(12),
        account=account,
        name=name,
        url=url,
        event_types=sorted(set(event_types)),
        secret=secrets.token_bytes(signing.SECRET_BYTES),
        created_ms=now_ms,
        updated_ms=now_ms,
    )


class WebhookRoutes:
    """The routes under /v1/webhook_endpoints."""

    def __init__(self, cell: Cell, settings: ApiSettings, sender: Sender) -> None:
        self._cell = cell
        self._settings = settings
        self._sender = sender
        self._testing = asyncio.Semaphore(TESTS_AT_ONCE)

    async def create(self, exchange: Exchange, _: str) -> None:
        """POST /v1/webhook_endpoints."""
        new = decode(_new, await exchange.json(self._settings.max_body_bytes))
        self._check(new.url)
        made = draft(
            account=exchange.account,
            name=new.name,
            url=new.url,
            event_types=list(new.event_types),
            now_ms=self._cell.now_ms(),
        )
        await self._cell.write(lambda db: store.insert(db, made))
        await exchange.answer_object(_with_secret(made))

    async def page(self, exchange: Exchange, _: str) -> None:
        """GET /v1/webhook_endpoints."""
        query = exchange.query()
        limit = page_limit(query, DEFAULT_PAGE, MAX_PAGE)
        rows, more = store.page(self._cell.reader, exchange.account, limit=limit, after=query.get("after"))
        data = [webhook_object(row) for row in rows]
        await exchange.answer_object(
            WebhookList(
                data=data,
                first_id=data[0].id if data else None,
                last_id=data[-1].id if data else None,
                has_more=more,
            )
        )

    async def show(self, exchange: Exchange, webhook_id: str) -> None:
        """GET /v1/webhook_endpoints/{webhook_endpoint_id}."""
        await exchange.answer_object(webhook_object(self._row(exchange, webhook_id)))

    async def update(self, exchange: Exchange, webhook_id: str) -> None:
        """POST /v1/webhook_endpoints/{webhook_endpoint_id}."""
        change = decode(_change, await exchange.json(self._settings.max_body_bytes))
        if change.url is not None:
            self._check(change.url)

        def write(db: Connection) -> Webhook:
            row = store.get(db, webhook_id, exchange.account)
            changed = msgspec.structs.replace(
                row,
                name=change.name or row.name,
                url=change.url or row.url,
                event_types=sorted(set(change.event_types)) if change.event_types else row.event_types,
            )
            if changed != row or row.disabled_ms is not None:
                changed = msgspec.structs.replace(changed, updated_ms=self._cell.now_ms(), disabled_ms=None)
                store.update(db, changed)
            return changed

        await exchange.answer_object(webhook_object(await self._cell.write(write)))

    async def delete(self, exchange: Exchange, webhook_id: str) -> None:
        """DELETE /v1/webhook_endpoints/{webhook_endpoint_id}."""

        def write(db: Connection) -> None:
            store.get(db, webhook_id, exchange.account)
            store.remove(db, webhook_id, self._cell.now_ms())

        await self._cell.write(write)
        await exchange.answer_object(WebhookDeleted(id=webhook_id))

    async def rotate(self, exchange: Exchange, webhook_id: str) -> None:
        """POST /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret."""
        body = await exchange.json(self._settings.max_body_bytes)
        keep = bool(body) and decode(_rotation, body).keep_old_secret_active_for_24_hours
        secret = secrets.token_bytes(signing.SECRET_BYTES)

        def write(db: Connection) -> Webhook:
            row = store.get(db, webhook_id, exchange.account)
            now_ms = self._cell.now_ms()
            changed = msgspec.structs.replace(
                row,
                secret=secret,
                old_secret=row.secret if keep else None,
                old_until_ms=now_ms + OLD_SECRET_MS if keep else 0,
                updated_ms=now_ms,
                disabled_ms=None,
            )
            store.update(db, changed)
            return changed

        await exchange.answer_object(_with_secret(await self._cell.write(write)))

    async def test(self, exchange: Exchange, webhook_id: str) -> None:
        """POST /v1/webhook_endpoints/{webhook_endpoint_id}/test: send a sample event now, once."""
        trial = decode(_trial, await exchange.json(self._settings.max_body_bytes))
        row = self._row(exchange, webhook_id)
        event_id = f"evt_{secrets.token_hex(12)}"
        now_ms = self._cell.now_ms()
        subject = ("batch_" if trial.event_type.startswith("batch.") else "resp_") + "test"
        body = signing.payload(event_id=event_id, kind=trial.event_type, subject=subject, happened_ms=now_ms)
        policy = store.policy(self._cell.reader)
        async with self._testing:
            outcome = await self._sender.send(row, policy, body, message_id=event_id, now_ms=now_ms)
        if not outcome.status:
            raise CallerError(
                f"the webhook could not be reached: {outcome.what}", code="webhook_unreachable", param="url"
            )
        await exchange.answer_object(
            WebhookTestResult(webhook_endpoint_id=webhook_id, event_type=trial.event_type, status_code=outcome.status)
        )

    async def deliveries(self, exchange: Exchange, webhook_id: str) -> None:
        """GET /v1/webhook_endpoints/{webhook_endpoint_id}/deliveries: what it was told, newest first."""
        limit = page_limit(exchange.query(), DEFAULT_PAGE, MAX_LOG)
        self._row(exchange, webhook_id)
        rows = store.log_of(self._cell.reader, webhook_id, limit)
        await exchange.answer_object(DeliveryList(data=[delivery_object(row) for row in rows]))

    async def event_types(self, exchange: Exchange, _: str) -> None:
        """GET /v1/webhook_event_types."""
        await exchange.answer_object(EventTypeList(data=list(EVENT_TYPES)))

    def _row(self, exchange: Exchange, webhook_id: str) -> Webhook:
        return store.get(self._cell.reader, webhook_id, exchange.account)

    def _check(self, url: str) -> None:
        check_url(url, store.policy(self._cell.reader))


def webhook_object(row: Webhook) -> WebhookObject:
    """The customer's view of a webhook."""
    return WebhookObject(
        id=row.webhook_id,
        created_at=row.created_ms // 1000,
        updated_at=row.updated_ms // 1000,
        event_types=row.event_types,
        name=row.name,
        url=row.url,
        signing_secret_hint=signing.hint(row.secret),
        disabled_at=None if row.disabled_ms is None else row.disabled_ms // 1000,
    )


def _with_secret(row: Webhook) -> WebhookWithSecret:
    return WebhookWithSecret(**msgspec.structs.asdict(webhook_object(row)), signing_secret=signing.shown(row.secret))


def delivery_object(row: Delivery) -> DeliveryObject:
    """The customer's view of a delivery."""
    return DeliveryObject(
        event_id=row.event_id,
        event_type=row.type,
        subject_id=row.subject,
        created_at=row.happened_ms // 1000,
        status=row.state,
        attempts=row.attempts,
        outcome=row.outcome,
        next_attempt_at=row.next_ms // 1000 if row.ended_ms is None else None,
        ended_at=None if row.ended_ms is None else row.ended_ms // 1000,
    )
