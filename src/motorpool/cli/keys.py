"""``motorpool keys``: makes, lists and revokes the API keys of customers, in the books of a stopped or running cell.

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
    """Make an API key in the books of a data folder; it cannot be had again."""
    return _make(data, account, name)[0]


def _make(data: Path, account: str, name: str) -> tuple[str, KeyRow]:
    with books(data, create=True) as connection:
        return create_key(connection, account, name, _now_ms())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


data_option = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Data folder of the cell.",
    show_default="that of dev",
)


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys of customers.

    \b
    Examples:
      motorpool keys create --data /var/lib/motorpool --account acme
      motorpool keys revoke key_0123456789abcdef --data /var/lib/motorpool
    """


@keys.command("create")
@data_option
@click.option("--account", default=DEFAULT_ACCOUNT, show_default=True, help="Whose files, batches and bills it opens.")
@click.option("--name", default="", help="What the key is for, for people.")
@click.option("--json", "as_json", is_flag=True, help="Print the key as one line of JSON.")
def create_command(*, data: Path | None, account: str, name: str, as_json: bool) -> None:
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
    key, row = _make(folder, account, name)
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
    if as_json:
        print_json([_public(row) for row in rows])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("key", "account", "name", "ends in", "state"):
        table.add_column(title)
    for row in rows:
        state = "in use" if row.revoked_ms is None else "revoked"
        table.add_row(row.key_id, row.account, row.name, f"...{row.hint}", state)
    Console(highlight=False).print(table if rows else "there are no keys yet: make one with `motorpool keys create`")


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
