"""A way to play the owner of a simulated car on this machine: a Unix socket in the agent's folder.

Decides: which lines are acts of an owner. Must not: be reachable from the network or from the cell; only who may enter
the agent's folder can play its owner.
Called by: ``agent.main`` (the port), the command line (``play_owner``).

One JSON line in, ``{"do": "open-door"}``, one out: ``{"ok": true, "car": {...}}`` or
``{"ok": false, "error": "...", "code": "..."}``. ``{"do": "show"}`` only looks.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from motorpool.agent.signals.car import ACTIONS, Action, SimulatedCar
from motorpool.errors import ConflictError, SetupError

log = logging.getLogger(__name__)

SOCKET_NAME: Final = "car.sock"
ADDRESS_NAME: Final = "car.addr"
SHOW: Final = "show"
MAX_PATH_BYTES: Final = 107  # of a Unix socket's address
MAX_LINE_BYTES: Final = 4096
ANSWER_S: Final = 5.0
OWNER_ACTIONS: Final[dict[str, str]] = {
    SHOW: "show the car as it stands",
    **{action.value: text for action, text in ACTIONS.items()},
}


class _Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    do: str


class OwnerPort:
    """Listens for acts of the owner. ``clock`` gives now in milliseconds."""

    def __init__(self, agent_dir: Path, car: SimulatedCar, clock: Callable[[], int]) -> None:
        self._agent_dir = agent_dir
        self._car = car
        self._clock = clock
        self._server: asyncio.AbstractServer | None = None
        self._private_dir: Path | None = None
        self._path: Path | None = None

    async def start(self) -> None:
        """Listen; a socket that an earlier agent left behind is replaced."""
        path = self._agent_dir / SOCKET_NAME
        address = self._agent_dir / ADDRESS_NAME
        address.unlink(missing_ok=True)
        if len(str(path.absolute()).encode()) > MAX_PATH_BYTES:
            self._private_dir = Path(tempfile.mkdtemp(prefix="motorpool-car-"))  # mode 0700
            path = self._private_dir / SOCKET_NAME
            address.write_text(str(path), "utf-8")
        path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, path=str(path), limit=MAX_LINE_BYTES)
        path.chmod(0o600)
        self._path = path

    async def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        if self._private_dir is not None:
            shutil.rmtree(self._private_dir, ignore_errors=True)
            (self._agent_dir / ADDRESS_NAME).unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(msgspec.json.encode(self._answer(line)) + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError) as error:  # ValueError: a line beyond the limit
            log.info("the owner's port dropped a connection: %s", type(error).__name__)
        finally:
            writer.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            what = msgspec.json.decode(line, type=_Ask).do
        except (msgspec.DecodeError, UnicodeDecodeError):
            return {"ok": False, "code": "bad_line", "error": 'a line is {"do": "ACTION"}'}
        if what not in OWNER_ACTIONS:
            text = f"unknown action: choose one of {', '.join(OWNER_ACTIONS)}"
            return {"ok": False, "code": "unknown_action", "error": text}
        now_ms = self._clock()
        if what != SHOW:
            try:
                self._car.do(Action(what), now_ms)
            except ConflictError as error:
                return {"ok": False, "code": error.code, "error": error.message}
        return {"ok": True, "car": msgspec.to_builtins(self._car.view(now_ms))}


async def play_owner(agent_dir: Path, action: str) -> dict[str, Any]:
    """Do ``action`` (a key of OWNER_ACTIONS) as the owner of the agent in ``agent_dir``; the port's answer.

    Raises SetupError when no agent with a simulated car runs there.
    """
    address = agent_dir / ADDRESS_NAME
    path = Path(address.read_text("utf-8")) if address.exists() else agent_dir / SOCKET_NAME
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                writer.write(msgspec.json.encode({"do": action}) + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
        answer: dict[str, Any] = msgspec.json.decode(line)
    except (OSError, TimeoutError, msgspec.DecodeError) as error:
        raise SetupError(
            f"no agent with a simulated car answers in {agent_dir.name}: is the vehicle running?", code="no_car"
        ) from error
    return answer
