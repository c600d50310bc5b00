"""``motorpool webhooks``: the operator's view of customers' webhooks, in the books of a stopped or running cell.

Decides: nothing. Must not: show a secret twice. Called by: ``cli.main``.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from motorpool.cli.keys import DEFAULT_ACCOUNT, books, data_option
from motorpool.cli.output import print_json, say
from motorpool.cli.running import default_data
from motorpool.server.openai.webhooks import MAX_LOG, delivery_object, draft, webhook_object
from motorpool.server.webhooks import signing
from motorpool.server.webhooks.targets import check_url
from motorpool.store import webhooks as store
from motorpool.store.webhooks import EVENT_TYPES, Policy


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@click.group()
def webhooks() -> None:
    """See and make webhooks, and what they were told. Customers do the same through the API.

    \b
    Examples:
      motorpool webhooks add https://example.org/hook --account acme
      motorpool webhooks deliveries we_0123456789abcdef01234567
    """


@webhooks.command("add")
@click.argument("url")
@data_option
@click.option("--account", default=DEFAULT_ACCOUNT, show_default=True, help="Whose batches and responses it hears of.")
@click.option("--name", default="webhook", show_default=True, help="What it is for, for people.")
@click.option(
    "--event", "events", multiple=True, type=click.Choice(EVENT_TYPES), help="What it hears of; all if not given."
)
@click.option("--json", "as_json", is_flag=True, help="Print the webhook and its secret as one line of JSON.")
def add_command(
    *, url: str, data: Path | None, account: str, name: str, events: tuple[str, ...], as_json: bool
) -> None:
    """Make a webhook and show its signing secret, this once.

    \b
    Example:
      motorpool webhooks add https://example.org/hook --account acme --event batch.completed
    """
    with books(data or default_data()) as connection:
        check_url(url, store.policy(connection))
        made = draft(account=account, name=name, url=url, event_types=list(events or EVENT_TYPES), now_ms=_now_ms())
        store.insert(connection, made)
    secret = signing.shown(made.secret)
    if as_json:
        print_json(
            {"id": made.webhook_id, "account": account, "event_types": made.event_types, "signing_secret": secret}
        )
        return
    click.echo(secret)
    say(f"{made.webhook_id} of account {account} signs with this secret. It is not shown again: keep it now.")


@webhooks.command("list")
@data_option
@click.option("--json", "as_json", is_flag=True, help="Print the webhooks as one line of JSON.")
def list_command(*, data: Path | None, as_json: bool) -> None:
    """List the webhooks of all accounts.

    \b
    Example:
      motorpool webhooks list --data /var/lib/motorpool
    """
    with books(data or default_data()) as connection:
        rows = store.every(connection)
    if as_json:
        print_json([{"account": row.account, "webhook": webhook_object(row)} for row in rows])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("webhook", "account", "name", "address", "hears of", "state"):
        table.add_column(title)
    for row in rows:
        state = "in use" if row.disabled_ms is None else "its server is gone"
        events = "everything" if len(row.event_types) == len(EVENT_TYPES) else ", ".join(row.event_types)
        table.add_row(row.webhook_id, row.account, row.name, row.url, events, state)
    Console(highlight=False).print(table if rows else "there are no webhooks: make one with `motorpool webhooks add`")


@webhooks.command("remove")
@click.argument("webhook_id")
@data_option
def remove_command(*, webhook_id: str, data: Path | None) -> None:
    """Delete a webhook; what it was still to be told is dropped.

    \b
    Example:
      motorpool webhooks remove we_0123456789abcdef01234567
    """
    with books(data or default_data()) as connection:
        account = store.get(connection, webhook_id).account
        store.remove(connection, webhook_id, _now_ms())
    say(f"{webhook_id} of account {account} is deleted")


@webhooks.command("deliveries")
@click.argument("webhook_id")
@data_option
@click.option("--json", "as_json", is_flag=True, help="Print the deliveries as one line of JSON.")
def deliveries_command(*, webhook_id: str, data: Path | None, as_json: bool) -> None:
    """Show what a webhook was told, newest first, and how it answered.

    \b
    Example:
      motorpool webhooks deliveries we_0123456789abcdef01234567
    """
    with books(data or default_data()) as connection:
        store.get(connection, webhook_id)
        rows = [delivery_object(row) for row in store.log_of(connection, webhook_id, MAX_LOG)]
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    for title in ("event", "of", "at (UTC)", "attempts", "last answer", "state"):
        table.add_column(title)
    for row in rows:
        at = datetime.fromtimestamp(row.created_at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(row.event_type, row.subject_id, at, str(row.attempts), row.outcome or "-", row.status)
    Console(highlight=False).print(table if rows else "nothing has been told to this webhook yet")


@webhooks.command("policy")
@data_option
@click.option(
    "--private/--no-private",
    default=None,
    help="Whether webhooks may reach addresses of this machine and its own networks.",
)
@click.option("--http/--no-http", default=None, help="Whether webhooks may do without TLS.")
def policy_command(*, data: Path | None, private: bool | None, http: bool | None) -> None:
    """Show or set which addresses webhooks may have; by default https:// and the internet alone.

    \b
    Example:
      motorpool webhooks policy --private --http
    """
    with books(data or default_data()) as connection:
        before = store.policy(connection)
        wanted = Policy(
            private=before.private if private is None else private, http=before.http if http is None else http
        )
        if wanted != before:
            store.set_policy(connection, wanted)
    say(
        f"Webhooks may {'' if wanted.private else 'not '}reach addresses that are not of the internet, "
        f"and may {'' if wanted.http else 'not '}use http://"
    )
