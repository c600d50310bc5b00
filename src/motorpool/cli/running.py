"""Finds the cell that a command should speak to: options first, then the environment, then a running ``motorpool dev``.

Decides: which address and key a command uses. Must not: print a key.
Called by: every command that speaks to a running cell.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from motorpool.errors import SetupError

DEV_FILE: Final = "dev.json"
CELL_FILE: Final = "cell.json"  # of a running ``motorpool serve``, in its data folder
SERVE_LOCK: Final = "serve.lock"
CREDENTIALS_NAME: Final = "credentials.json"  # of a vehicle, in its agent's folder
ENV_BASE_URL: Final = "OPENAI_BASE_URL"
ENV_API_KEY: Final = "OPENAI_API_KEY"
ENV_ADMIN_URL: Final = "MOTORPOOL_ADMIN_URL"
ENV_ADMIN_KEY: Final = "MOTORPOOL_ADMIN_KEY"


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What a running ``motorpool dev`` says about itself, in its data folder (mode 0600) and on its ``--json`` line."""

    base_url: str
    api_key: str
    admin_url: str
    admin_key: str
    data: str
    pids: dict[str, int]
    vehicles: dict[str, str]  # vehicle id to the folder of its agent

    def __repr__(self) -> str:
        return f"Running(base_url={self.base_url!r}, data={self.data!r})"


class RunningCell(msgspec.Struct, frozen=True, kw_only=True):
    """What a running ``motorpool serve`` says about itself, in its data folder (mode 0600)."""

    base_url: str
    admin_url: str
    admin_key: str

    def __repr__(self) -> str:
        return f"RunningCell(base_url={self.base_url!r})"


def data_flag(data: Path | None) -> str:
    """What a hint must add to a command so that it finds this folder: nothing for the default one."""
    return "" if data is None or data == default_data() else f" --data {shlex.quote(str(data))}"


def load_cell(data: Path | None) -> RunningCell | None:
    """The running control plane of a data folder, started by ``motorpool serve`` or ``motorpool dev``."""
    try:
        return msgspec.json.decode(((data or default_data()) / CELL_FILE).read_bytes(), type=RunningCell)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def clean_key(key: str) -> str:
    """A key without what copying adds around it; raise SetupError if it cannot be one."""
    stripped = key.strip()
    if not stripped.isascii() or not stripped.isprintable() or " " in stripped:
        raise SetupError("this key holds characters that no key has: copy it again", code="key_unreadable")
    return stripped


def default_data() -> Path:
    """Where ``motorpool dev`` keeps everything unless told otherwise: the XDG data folder."""
    root = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(root) / "motorpool" / "dev"


def load_running(data: Path | None) -> Running | None:
    """The running ``motorpool dev`` of a data folder (the default one if None), None if there is none."""
    try:
        return msgspec.json.decode(((data or default_data()) / DEV_FILE).read_bytes(), type=Running)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError:
        return None  # written by another version: as good as not running


def resolve_api(base_url: str | None, api_key: str | None, data: Path | None = None) -> tuple[str, str]:
    """Base URL and key of the API; raise SetupError that says how to give what is missing."""
    running, cell = load_running(data), load_cell(data)
    url = base_url or os.environ.get(ENV_BASE_URL)
    own = url is None or (running is not None and url == running.base_url)
    # A cell that was found by itself gets its own key: one in the environment may be meant for somebody else.
    key = api_key or (running.api_key if running is not None and own else None) or os.environ.get(ENV_API_KEY)
    url = url or (running.base_url if running else None) or (cell.base_url if cell else None)
    if url is None:
        raise SetupError(
            f"no server is known: start `motorpool dev`, or give --base-url (or {ENV_BASE_URL})", code="server_unknown"
        )
    if not key:
        raise SetupError(f"no API key is known: give --api-key (or {ENV_API_KEY})", code="key_unknown")
    return url, clean_key(key)


def resolve_admin(admin_url: str | None, admin_key: str | None, data: Path | None = None) -> tuple[str, str]:
    """Address and key of the operator's interface; raise SetupError that says how to give what is missing."""
    cell = load_running(data) or load_cell(data)
    url = admin_url or os.environ.get(ENV_ADMIN_URL) or (cell.admin_url if cell else None)
    key = admin_key or os.environ.get(ENV_ADMIN_KEY)
    if not key and cell is not None and url == cell.admin_url:
        key = cell.admin_key
    if url is None:
        raise SetupError(
            "no admin address is known: start `motorpool dev`, name the data folder of a running cell with --data, "
            f"or give --admin-url (or {ENV_ADMIN_URL})",
            code="server_unknown",
        )
    if not key:
        raise SetupError(
            f"no admin key is known: give --admin-key (or {ENV_ADMIN_KEY}); it is in admin.key in the cell's folder",
            code="key_unknown",
        )
    return url, clean_key(key)


def api_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a command that speaks to the API."""
    command = click.option(
        "--data", type=click.Path(path_type=Path, file_okay=False), help="Data folder of the cell to use."
    )(command)
    command = click.option("--api-key", help=f"API key; else {ENV_API_KEY}, else that of a running `motorpool dev`.")(
        command
    )
    return click.option("--base-url", help=f"Address of the API; else {ENV_BASE_URL}, else a running `motorpool dev`.")(
        command
    )


def admin_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a command that speaks to the operator's interface."""
    command = click.option(
        "--data", type=click.Path(path_type=Path, file_okay=False), help="Data folder of the cell to use."
    )(command)
    command = click.option(
        "--admin-key", help=f"Admin key; else {ENV_ADMIN_KEY}, else that of a running `motorpool dev`."
    )(command)
    return click.option("--admin-url", help=f"Admin address; else {ENV_ADMIN_URL}, else a running `motorpool dev`.")(
        command
    )
