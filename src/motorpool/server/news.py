"""What a cell tells vehicles about their owners: what they have earned, and what they have said by the cell.

Everything is read from the books when it is sent, and can be sent again: totals with a date, and words with one.
Decides: when. Must not: read documents, which are the vehicle's to check. Called by: ``server.loop``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Final, Protocol

from motorpool import wire
from motorpool.store import owners

STATEMENT_EVERY_MS: Final = 5_000  # at most, while a vehicle earns


class Teller(Protocol):
    """What this room needs from the loop."""

    @property
    def reader(self) -> sqlite3.Connection:
        """Committed state."""

    def now_ms(self) -> int:
        """Milliseconds since 1970 (UTC)."""

    def send(self, vehicle_id: str, data: bytes) -> None:
        """Send one message to a vehicle."""


class OwnerNews:
    """Statements that are due, and the words that vehicles may have missed."""

    def __init__(self, cell: Teller, currency: str) -> None:
        self._cell = cell
        self._currency = currency
        self._due: set[str] = set()  # vehicles that were paid since their last statement
        self._told_ms: dict[str, int] = {}

    def paid(self, vehicle_ids: Iterable[str]) -> None:
        """The owners of these vehicles were paid, or will have been when this transaction is committed."""
        self._due.update(vehicle_ids)

    def on_tick(self) -> None:
        """Send the statements that are due."""
        now_ms = self._cell.now_ms()
        for vehicle_id in sorted(self._due):
            if now_ms - self._told_ms.get(vehicle_id, -STATEMENT_EVERY_MS) >= STATEMENT_EVERY_MS:
                self._state(vehicle_id, now_ms)

    def tell(self, vehicle_id: str) -> None:
        """A vehicle is here (again), or its owner has just said something: tell it all that holds now."""
        now_ms = self._cell.now_ms()
        for word in owners.words(self._cell.reader, vehicle_id, now_ms):
            if word.document is not None:
                self._cell.send(vehicle_id, wire.encode(wire.OwnerDocument(document=word.document)))
            elif word.until_ms is not None:
                act = wire.OwnerAct(word.kind)
                asked = wire.OwnerAsked(act=act, asked_ms=word.dated_ms, until_ms=word.until_ms)
                self._cell.send(vehicle_id, wire.encode(asked))
        self._state(vehicle_id, now_ms)

    def _state(self, vehicle_id: str, now_ms: int) -> None:
        self._due.discard(vehicle_id)
        row = owners.find_vehicle(self._cell.reader, vehicle_id)
        if row is None:
            self._told_ms.pop(vehicle_id, None)
            return
        self._told_ms[vehicle_id] = now_ms
        statement = wire.Statement(
            as_of_ms=now_ms,
            earned_micro=row["earned_micro"],
            lines_done=row["lines_done"],
            tokens_generated=row["tokens_generated"],
            energy_uwh=row["energy_uwh"],
            currency=self._currency,
        )
        self._cell.send(vehicle_id, wire.encode(statement))
