"""Which vehicles have a connection to the message server, as the server itself tells.

A vehicle that dies is known by this as soon as its kernel has closed its socket; one that freezes or loses its network
keeps its connection and is known by its silence alone. One that has connected anew is still there when the server
notices that its old connection is dead.

Decides: whose last connection has ended. Must not: connect to anything, or act. Called by: ``bus``.
"""

from __future__ import annotations

import logging

import msgspec

from motorpool.trust.credentials import vehicle_in

log = logging.getLogger(__name__)


class _Server(msgspec.Struct):
    """What tells one server of a cluster from another."""

    id: str = ""


class _Peer(msgspec.Struct):
    """The number of a connection, and the JWT by which the server let it in."""

    id: int
    jwt: str = ""


class _Notice(msgspec.Struct):
    """What the server publishes when a connection has begun or ended, as far as it matters here."""

    client: _Peer
    server: _Server


_notice = msgspec.json.Decoder(_Notice)


class Presence:
    """The connections of vehicles that were told of; the server bounds how many there are."""

    def __init__(self) -> None:
        self._connections: dict[str, set[tuple[str, int]]] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def forget(self) -> None:
        """Notices may have been missed: of whom nothing is known, any end of a connection is the last one."""
        self._connections.clear()

    def came(self, data: bytes) -> None:
        """A connection has begun."""
        found = self._read(data)
        if found is not None:
            self._connections.setdefault(found[0], set()).add(found[1])

    def went(self, data: bytes) -> str | None:
        """A connection has ended; the vehicle that has none any more by this, None if it has another one."""
        found = self._read(data)
        if found is None:
            return None
        vehicle_id, connection = found
        left = self._connections.get(vehicle_id, set()) - {connection}
        if left:
            self._connections[vehicle_id] = left
            return None
        self._connections.pop(vehicle_id, None)
        return vehicle_id

    def _read(self, data: bytes) -> tuple[str, tuple[str, int]] | None:
        try:
            notice = _notice.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            log.debug("a notice of the message server is not understood")
            return None
        vehicle_id = vehicle_in(notice.client.jwt)
        return None if vehicle_id is None else (vehicle_id, (notice.server.id, notice.client.id))
