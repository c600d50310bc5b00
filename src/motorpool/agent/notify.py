"""Tells systemd how the agent is: ready, alive, stopping (the protocol of sd_notify over a Unix socket).

Decides: when "alive" is due, which is well within the time after which systemd takes the agent for hung and ends it.
Must not: block, raise, or matter to anything else: without systemd every call does nothing.
Called by: ``agent.main`` (ready, stopping) and the guard's look (alive), so that an agent whose loop hangs is noticed.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import MutableMapping
from typing import Final, Self

SOCKET: Final = "NOTIFY_SOCKET"
WATCHDOG: Final = "WATCHDOG_USEC"
WATCHDOG_PID: Final = "WATCHDOG_PID"
TIMES_WITHIN: Final = 4  # "alive" comes this many times within the time that systemd allows
log = logging.getLogger(__name__)


class Notifier:
    """The way to systemd, if there is one. ``watchdog_ms`` is the longest silence that it accepts; 0: any."""

    def __init__(self, address: str = "", watchdog_ms: int = 0) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._every_ms = watchdog_ms // TIMES_WITHIN
        self._watched = watchdog_ms > 0
        self._alive_ms: int | None = None

    @classmethod
    def of(cls, environment: MutableMapping[str, str], pid: int) -> Self:
        """What systemd told this process; it is taken out, so that no child speaks in the agent's name."""
        address = environment.pop(SOCKET, "")
        text, meant = environment.pop(WATCHDOG, ""), environment.pop(WATCHDOG_PID, "")
        mine = text.isdecimal() and meant in {"", str(pid)}
        return cls(address if address.startswith(("/", "@")) else "", int(text) // 1000 if mine else 0)

    def ready(self) -> None:
        """The agent has started."""
        self._send(b"READY=1")

    def stopping(self) -> None:
        """The agent ends because it was asked to."""
        self._send(b"STOPPING=1")

    def alive(self, now_ms: int) -> None:
        """The guard has looked: passed on now and then only. A clock that was set back delays none."""
        if not self._watched:
            return
        last_ms = self._alive_ms
        if last_ms is None or not 0 <= now_ms - last_ms < self._every_ms:
            self._alive_ms = now_ms
            self._send(b"WATCHDOG=1")

    def _send(self, message: bytes) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as way:
                way.sendto(message, self._address)
        except OSError as error:  # a full queue or a systemd that restarts: the next word comes soon
            log.debug("systemd did not hear %s: %s", message.decode(), error.strerror)
