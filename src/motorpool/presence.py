"""Which vehicles have a connection to the message server, and how far away they are, as the server itself tells.

A vehicle that dies is known by this as soon as its kernel has closed its socket; one that freezes or loses its network
keeps its connection and is known by its silence alone. One that has connected anew is still there when the server
notices that its old connection is dead.

The server measures the round trip of each connection as it begins, again two seconds later, and then seldom while the
connection is in use: a vehicle is measured anew when it connects anew.

Decides: whose last connection has ended, and what a vehicle's round trip is. Must not: connect to anything, or act.
Called by: ``bus``.
"""

from __future__ import annotations

import logging
import re
from typing import Final

import msgspec

from motorpool.trust.credentials import vehicle_in

log = logging.getLogger(__name__)

_UNITS_MS: Final = {"h": 3_600_000.0, "m": 60_000.0, "s": 1_000.0, "ms": 1.0, "µs": 1e-3, "us": 1e-3, "ns": 1e-6}
_PART: Final = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(h|ms|m|s|µs|us|ns)"
_part: Final = re.compile(_PART)
_duration: Final = re.compile(f"(?:{_PART})+")


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


class _Open(msgspec.Struct):
    """One open connection: its number, the JWT by which the server let it in, and what it measured ("1.2ms")."""

    cid: int
    jwt: str = ""
    rtt: str = ""


class _Opens(msgspec.Struct):
    """Some of the open connections."""

    connections: list[_Open]


class _Answer(msgspec.Struct):
    """What the server answers to who asks for connections, as far as it matters here."""

    data: _Opens


_notice = msgspec.json.Decoder(_Notice)
_answer = msgspec.json.Decoder(_Answer)


class Page(msgspec.Struct, frozen=True):
    """One answer about connections: how many it tells of, and the round trip of each vehicle among them."""

    connections: int
    round_trips_ms: dict[str, float]


def page_of(data: bytes) -> Page | None:
    """Read an answer of the server about connections; None for what is no such answer. Never raises.

    The vehicle is the one for which the server let a connection in, whatever it calls itself. If a vehicle has several
    connections, the newest counts. What is not measured yet is left out.
    """
    try:
        opens = _answer.decode(data).data.connections
    except (msgspec.DecodeError, ValueError, RecursionError):
        log.debug("an answer of the message server is not understood")
        return None
    found: dict[str, float] = {}
    for each in sorted(opens, key=lambda each: each.cid):
        vehicle_id, round_trip_ms = vehicle_in(each.jwt), duration_ms(each.rtt)
        if vehicle_id is not None and round_trip_ms > 0:
            found[vehicle_id] = round_trip_ms
    return Page(len(opens), found)


def round_trips(data: bytes) -> dict[str, float]:
    """Milliseconds to each vehicle in one answer of the server about connections; see ``page_of``. Never raises."""
    page = page_of(data)
    return {} if page is None else page.round_trips_ms


def duration_ms(text: str) -> float:
    """A duration as the server writes it ("850µs", "1.2ms", "1m2.01s") in milliseconds; 0 for what is none."""
    if _duration.fullmatch(text) is None:
        return 0.0
    return sum(float(number) * _UNITS_MS[unit] for number, unit in _part.findall(text))


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
        except (msgspec.DecodeError, ValueError, RecursionError):
            log.debug("a notice of the message server is not understood")
            return None
        vehicle_id = vehicle_in(notice.client.jwt)
        return None if vehicle_id is None else (vehicle_id, (notice.server.id, notice.client.id))
