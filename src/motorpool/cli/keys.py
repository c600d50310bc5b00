"""``motorpool keys``: makes, lists, limits and revokes the API keys of customers, in the books of a cell.

The cell may be stopped or running.

Decides: nothing. Must not: show a key twice; the books hold only its hash.
Called by: ``cli.main``, ``cli.dev``.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from motorpool.cli.output import print_json, say
from motorpool.cli.running import default_data
from motorpool.errors import SetupError
from motorpool.server.main import database_path
from motorpool.server.openai.keys import create_key
from motorpool.store.customer import KeyRow, list_keys, revoke_key
from motorpool.store.database import Database, translate
from motorpool.store.keylimits import KeyLimit, limits, set_limit

DEFAULT_ACCOUNT = "default"


@contextlib.contextmanager
def books(data: Path, *, create: bool = False) -> Iterator[sqlite3.Connection]:
    """One transaction in the books of a data folder; raise SetupError if it has none."""
    path = database_path(data)
    if create:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
    elif not path.exists():
        raise SetupError(
            f"{data} holds no books of a cell: give the folder of `motorpool serve` or `motorpool dev` with --data",
            code="no_books",
        )
    database = Database(path)
    try:
        database.writer.execute("BEGIN IMMEDIATE")
        try:
            yield database.writer
        except BaseException:
            database.writer.execute("ROLLBACK")
            raise
        database.writer.execute("COMMIT")
    except sqlite3.Error as error:
        raise translate(error, path) from error
    finally:
        database.close()


def make_key(data: Path, account: str, name: str) -> str:
    """Make an API key without limits in the books of a data folder; it cannot be had again."""
    return _make(data, account, name, None, None)[0]


def _make(
    data: Path, account: str, name: str, requests_a_minute: int | None, tokens_a_minute: int | None
) -> tuple[str, KeyRow]:
    with books(data, create=True) as connection:
        key, row = create_key(connection, account, name, _now_ms())
        set_limit(connection, _limit(row.key_id, requests_a_minute, tokens_a_minute))
        return key, row


def _limit(key_id: str, requests_a_minute: int | None, tokens_a_minute: int | None) -> KeyLimit:
    return KeyLimit(key_id=key_id, requests_a_minute=requests_a_minute or None, tokens_a_minute=tokens_a_minute or None)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


data_option = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Data folder of the cell.",
    show_default="that of dev",
)

requests_option = click.option(
    "--requests-a-minute",
    type=click.IntRange(0, 10**9),
    help="Requests to models that it may make in a minute; 0: as many as it likes.",
)
tokens_option = click.option(
    "--tokens-a-minute",
    type=click.IntRange(0, 10**12),
    help="Tokens, read and written, that it may use in a minute; 0: as many as it likes.",
)


@click.group()
def keys() -> None:
    """Make, list, limit and revoke the API keys of customers.

    \b
    Examples:
      motorpool keys create --data /var/lib/motorpool --account acme
      motorpool keys limit key_0123456789abcdef --requests-a-minute 60 --tokens-a-minute 100000
      motorpool keys revoke key_0123456789abcdef --data /var/lib/motorpool
    """


@keys.command("create")
@data_option
@click.option("--account", default=DEFAULT_ACCOUNT, show_default=True, help="Whose files, batches and bills it opens.")
@click.option("--name", default="", help="What the key is for, for people.")
@requests_option
@tokens_option
@click.option("--json", "as_json", is_flag=True, help="Print the key as one line of JSON.")
def create_command(
    *,
    data: Path | None,
    account: str,
    name: str,
    requests_a_minute: int | None,
    tokens_a_minute: int | None,
    as_json: bool,
) -> None:
    """Make an API key and show it, this once.

    \b
    Example:
      motorpool keys create --data /var/lib/motorpool --account acme --name "nightly batches"
    """
    if not account.strip():
        raise click.BadParameter("name an account", param_hint="--account")
    folder = data or default_data()
    if not (folder.is_dir() if data is not None else database_path(folder).exists()):
        raise SetupError(
            f"{folder} holds no books of a cell: give the folder of `motorpool serve` or `motorpool dev` with --data",
            code="no_books",
        )
    key, row = _make(folder, account, name, requests_a_minute, tokens_a_minute)
    if as_json:
        print_json({"key": key, "key_id": row.key_id, "account": row.account, "name": row.name})
        return
    click.echo(key)
    say(f"This key ({row.key_id}) opens account {account} of the cell in {folder}. It is not shown again: keep it now.")


@keys.command("list")
@data_option
@click.option("--json", "as_json", is_flag=True, help="Print the keys as one line of JSON.")
def list_command(*, data: Path | None, as_json: bool) -> None:
    """List the keys: ids, accounts and their last four characters; never a key.

    \b
    Example:
      motorpool keys list --data /var/lib/motorpool
    """
    with books(data or default_data()) as connection:
        rows = list_keys(connection)
        limited = limits(connection)
    if as_json:
        print_json([_public(row) | _public_limit(limited.get(row.key_id)) for row in rows])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("key", "account", "name", "ends in", "a minute", "state"):
        table.add_column(title)
    for row in rows:
        state = "in use" if row.revoked_ms is None else "revoked"
        table.add_row(row.key_id, row.account, row.name, f"...{row.hint}", _in_words(limited.get(row.key_id)), state)
    Console(highlight=False).print(table if rows else "there are no keys yet: make one with `motorpool keys create`")


@keys.command("limit")
@click.argument("key_id")
@data_option
@requests_option
@tokens_option
def limit_command(
    *, key_id: str, data: Path | None, requests_a_minute: int | None, tokens_a_minute: int | None
) -> None:
    """Set what a key may ask of models in a minute; a limit that is left out stays. It counts within seconds.

    \b
    Examples:
      motorpool keys limit key_0123456789abcdef --requests-a-minute 60 --tokens-a-minute 100000
      motorpool keys limit key_0123456789abcdef --requests-a-minute 0 --tokens-a-minute 0
    """
    with books(data or default_data()) as connection:
        before = limits(connection).get(key_id) or KeyLimit(key_id=key_id)
        wanted = _limit(
            key_id,
            before.requests_a_minute if requests_a_minute is None else requests_a_minute,
            before.tokens_a_minute if tokens_a_minute is None else tokens_a_minute,
        )
        set_limit(connection, wanted)
    say(f"{key_id}, a minute: {_in_words(wanted)}")


@keys.command("revoke")
@click.argument("key_id")
@data_option
def revoke_command(*, key_id: str, data: Path | None) -> None:
    """Revoke a key; it stops within seconds, also in a running cell.

    \b
    Example:
      motorpool keys revoke key_0123456789abcdef
    """
    with books(data or default_data()) as connection:
        row = revoke_key(connection, key_id, _now_ms())
    say(f"{row.key_id} of account {row.account} is revoked")


def _public(row: KeyRow) -> dict[str, str | int | None]:
    return {
        "key_id": row.key_id,
        "account": row.account,
        "name": row.name,
        "hint": row.hint,
        "created_ms": row.created_ms,
        "revoked_ms": row.revoked_ms,
    }


def _public_limit(limit: KeyLimit | None) -> dict[str, str | int | None]:
    limit = limit or KeyLimit(key_id="")
    return {"requests_a_minute": limit.requests_a_minute, "tokens_a_minute": limit.tokens_a_minute}


def _in_words(limit: KeyLimit | None) -> str:
    if limit is None or limit.is_none:
        return "no limit"
    parts = ((limit.requests_a_minute, "requests"), (limit.tokens_a_minute, "tokens"))
    return ", ".join(f"{number} {what}" for number, what in parts if number is not None)
