"""Webhooks and what is to be told to them: the rows, and every SQL statement that reads or changes them.

Deliveries are made by triggers (``schema_4.sql``), in the transaction in which a batch or response ends. Each function
takes a connection and is quick; those that write run inside a transaction that the caller opened. Times are
milliseconds since 1970 (UTC).

Called by: ``server.webhooks``, ``server.openai.webhooks``, the ``motorpool webhooks`` command.
"""

from __future__ import annotations

from enum import StrEnum
from sqlite3 import Connection, Row
from typing import Final

import msgspec

from motorpool.errors import CallerError, ConflictError, NotFoundError

EVENT_TYPES: Final = (
    "batch.cancelled",
    "batch.completed",
    "batch.expired",
    "batch.failed",
    "response.cancelled",
    "response.completed",
    "response.failed",
    "response.incomplete",
)
MAX_WEBHOOKS: Final = 20  # of one account
MAX_ENDED: Final = 1_000  # deliveries that are kept of one webhook for its log
KEPT_MS: Final = 30 * 24 * 3600 * 1000
AT_ONCE: Final = 4  # deliveries to one webhook
_PRIVATE: Final = "webhooks_may_reach_private_addresses"
_PLAIN: Final = "webhooks_may_use_http"
_names: Final = msgspec.json.Decoder(list[str])


class DeliveryState(StrEnum):
    """Where a delivery stands."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """One webhook. ``old_secret`` signs beside ``secret`` until ``old_until_ms``."""

    webhook_id: str
    account: str
    name: str
    url: str
    event_types: list[str]
    secret: bytes
    created_ms: int
    updated_ms: int
    old_secret: bytes | None = None
    old_until_ms: int = 0
    disabled_ms: int | None = None
    deleted_ms: int | None = None


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One event for one webhook. ``outcome`` is of the last attempt: a status, or what went wrong."""

    delivery_no: int
    webhook_id: str
    event_id: str
    type: str
    subject: str
    happened_ms: int
    state: str
    attempts: int
    next_ms: int
    ended_ms: int | None
    outcome: str


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator allows webhooks to reach."""

    private: bool = False  # addresses of the operator's own networks
    http: bool = False  # without TLS


def policy(connection: Connection) -> Policy:
    """What the operator has set."""
    rows = connection.execute("SELECT name, value FROM meta WHERE name IN (?, ?)", (_PRIVATE, _PLAIN))
    found = {str(name): bool(value) for name, value in rows}
    return Policy(private=found.get(_PRIVATE, False), http=found.get(_PLAIN, False))


def set_policy(connection: Connection, wanted: Policy) -> None:
    """The operator sets it."""
    for name, value in ((_PRIVATE, wanted.private), (_PLAIN, wanted.http)):
        connection.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", (name, int(value)))


# -- webhooks ----------------------------------------------------------------------------------------------------------


def insert(connection: Connection, webhook: Webhook) -> None:
    """Add a webhook. Raises ConflictError ``too_many_webhooks``."""
    (count,) = connection.execute(
        "SELECT count(*) FROM webhook WHERE account = ? AND deleted_ms IS NULL", (webhook.account,)
    ).fetchone()
    if count >= MAX_WEBHOOKS:
        raise ConflictError(
            f"an account has at most {MAX_WEBHOOKS} webhooks: delete one that is not needed", code="too_many_webhooks"
        )
    connection.execute(
        "INSERT INTO webhook (webhook_id, account, name, url, event_types, secret, created_ms, updated_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            webhook.webhook_id,
            webhook.account,
            webhook.name,
            webhook.url,
            msgspec.json.encode(webhook.event_types).decode(),
            webhook.secret,
            webhook.created_ms,
            webhook.updated_ms,
        ),
    )


def get(connection: Connection, webhook_id: str, account: str | None = None) -> Webhook:
    """One webhook, of this account if one is named. Raises NotFoundError ``webhook_not_found``."""
    row = connection.execute(
        "SELECT * FROM webhook WHERE webhook_id = ? AND deleted_ms IS NULL", (webhook_id,)
    ).fetchone()
    if row is None or account not in {None, row["account"]}:
        raise NotFoundError("there is no webhook endpoint with this id", code="webhook_not_found")
    return _webhook(row)


def page(connection: Connection, account: str, *, limit: int, after: str | None) -> tuple[list[Webhook], bool]:
    """One page of an account's webhooks, newest first, and whether more follow. Raises CallerError for ``after``."""
    rows = connection.execute(
        "SELECT * FROM webhook WHERE account = ? AND deleted_ms IS NULL ORDER BY created_ms DESC, webhook_id DESC",
        (account,),
    ).fetchall()
    found = [_webhook(row) for row in rows]
    if after is not None:
        ids = [webhook.webhook_id for webhook in found]
        if after not in ids:
            raise CallerError("after must be the id of an object in this list", code="invalid_value", param="after")
        found = found[ids.index(after) + 1 :]
    return found[:limit], len(found) > limit


def every(connection: Connection) -> list[Webhook]:
    """All webhooks of all accounts, oldest first."""
    rows = connection.execute("SELECT * FROM webhook WHERE deleted_ms IS NULL ORDER BY created_ms, webhook_id")
    return [_webhook(row) for row in rows]


def update(connection: Connection, webhook: Webhook) -> None:
    """Write what can be changed of a webhook; one that was disabled is tried again."""
    connection.execute(
        "UPDATE webhook SET name = ?, url = ?, event_types = ?, secret = ?, old_secret = ?, old_until_ms = ?,"
        " updated_ms = ?, disabled_ms = NULL WHERE webhook_id = ?",
        (
            webhook.name,
            webhook.url,
            msgspec.json.encode(webhook.event_types).decode(),
            webhook.secret,
            webhook.old_secret,
            webhook.old_until_ms,
            webhook.updated_ms,
            webhook.webhook_id,
        ),
    )


def remove(connection: Connection, webhook_id: str, now_ms: int) -> None:
    """Forget a webhook and its secret; what it was still to be told is over."""
    connection.execute(
        "UPDATE webhook SET deleted_ms = ?, secret = x'', old_secret = NULL WHERE webhook_id = ?", (now_ms, webhook_id)
    )
    _give_up(connection, webhook_id, "the webhook was deleted", now_ms)


def disable(connection: Connection, webhook_id: str, now_ms: int) -> None:
    """Tell a webhook nothing more until it is updated."""
    connection.execute("UPDATE webhook SET disabled_ms = ? WHERE webhook_id = ?", (now_ms, webhook_id))
    _give_up(connection, webhook_id, "the webhook's server said that it is gone", now_ms)


def _give_up(connection: Connection, webhook_id: str, why: str, now_ms: int) -> None:
    connection.execute(
        "UPDATE delivery SET state = 'failed', outcome = ?, ended_ms = ? WHERE webhook_id = ? AND state = 'pending'",
        (why, now_ms, webhook_id),
    )


def _webhook(row: Row) -> Webhook:
    return Webhook(**(dict(row) | {"event_types": _names.decode(row["event_types"])}))


# -- deliveries --------------------------------------------------------------------------------------------------------


def due(connection: Connection, now_ms: int, limit: int) -> list[Delivery]:
    """What is to be told now, oldest first, and no more than a few for each webhook."""
    rows = connection.execute(
        "SELECT delivery_no, webhook_id, event_id, type, subject, happened_ms, state, attempts, next_ms, ended_ms,"
        " outcome FROM (SELECT *, row_number() OVER (PARTITION BY webhook_id ORDER BY next_ms, delivery_no) AS place"
        " FROM delivery WHERE state = 'pending' AND next_ms <= ?)"
        " WHERE place <= ? ORDER BY next_ms, delivery_no LIMIT ?",
        (now_ms, AT_ONCE, limit),
    )
    return [Delivery(**dict(row)) for row in rows]


def record(
    connection: Connection, delivery_no: int, *, state: DeliveryState, outcome: str, next_ms: int, now_ms: int
) -> None:
    """An attempt has ended. ``next_ms`` counts while it is pending."""
    connection.execute(
        "UPDATE delivery SET state = ?, outcome = ?, attempts = attempts + 1, next_ms = ?, ended_ms = ?"
        " WHERE delivery_no = ? AND state = 'pending'",
        (state, outcome, next_ms, None if state is DeliveryState.PENDING else now_ms, delivery_no),
    )


def log_of(connection: Connection, webhook_id: str, limit: int) -> list[Delivery]:
    """The newest deliveries of a webhook, newest first."""
    rows = connection.execute(
        "SELECT * FROM delivery WHERE webhook_id = ? ORDER BY delivery_no DESC LIMIT ?", (webhook_id, limit)
    )
    return [Delivery(**dict(row)) for row in rows]


def prune(connection: Connection, now_ms: int) -> int:
    """Drop what has ended long ago, or is over the bound of its webhook; return how many."""
    old = connection.execute(
        "DELETE FROM delivery WHERE state <> 'pending' AND ended_ms <= ?", (now_ms - KEPT_MS,)
    ).rowcount
    many = connection.execute(
        "DELETE FROM delivery WHERE delivery_no IN (SELECT delivery_no FROM (SELECT delivery_no, row_number() OVER"
        " (PARTITION BY webhook_id ORDER BY delivery_no DESC) AS place FROM delivery WHERE state <> 'pending')"
        " WHERE place > ?)",
        (MAX_ENDED,),
    ).rowcount
    return old + many
