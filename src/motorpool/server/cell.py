"""What the API needs from the cell: writing through its transactions, batches, live requests.

Called by: ``server.openai``. Implemented by: ``server.loop``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.catalogue import Catalogue
from motorpool.core.attribution import Footprint
from motorpool.store.blobs import BlobStore
from motorpool.types import Kind, Usage
from motorpool.wire import Delta, State

T = TypeVar("T")


class LiveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One live request, validated; ``body`` is the customer's JSON, ``response_id`` stands in every chunk."""

    request_id: str
    response_id: str
    account: str
    kind: Kind
    model: str
    stream: bool
    choices: int
    body: bytes
    created_s: int


class LiveTokens(msgspec.Struct, frozen=True, kw_only=True):
    """New text of a stream; ``usage`` and ``footprint`` are set on the last one and cover the whole answer."""

    deltas: list[Delta]
    usage: Usage | None
    engine: str
    footprint: Footprint | None = None


class LiveAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer of a plain request, or the error that ends a stream: a JSON body with its HTTP status."""

    status: int
    body: bytes
    footprint: Footprint | None = None


class ValidBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch whose input file passed every check.

    Line ``i`` is ``lengths[i]`` bytes from ``offsets[i]`` on; its answer has at most ``limits[i]`` tokens.
    """

    batch_no: int
    kind: Kind
    model: str
    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint32]
    limits: npt.NDArray[np.uint32]


class Cell(Protocol):
    """The control plane as the API sees it."""

    @property
    def catalogue(self) -> Catalogue:
        """The models that may be asked for."""

    @property
    def blobs(self) -> BlobStore:
        """Where the bytes of files are."""

    @property
    def reader(self) -> sqlite3.Connection:
        """Committed state, for reading only; rows are sqlite3.Row."""

    def now_ms(self) -> int:
        """Milliseconds since 1970 (UTC)."""

    async def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``change`` inside the next transaction; return its result when that is durable.

        An exception from ``change`` undoes its own changes and is raised here. ``change`` must be quick.
        """

    async def start_batch(self, batch: ValidBatch) -> None:
        """``validating`` to ``in_progress``; from here on the batch finishes by itself, through any crash."""

    async def cancel_batch(self, batch_no: int) -> None:
        """``in_progress`` to ``cancelling``; raises ConflictError if it has ended or is finalizing."""

    async def answer(self, request: LiveRequest) -> LiveAnswer:
        """Run a plain live request to its answer or error; cancelling it cancels it on the vehicle.

        Raises CapacityError when no vehicle can serve.
        """

    def serving(self, model: str) -> int:
        """How many vehicles could run a model now."""

    def live(self, request: LiveRequest) -> AsyncIterator[LiveTokens | LiveAnswer]:
        """Run a live request; closing the iterator early cancels it on the vehicle.

        Plain: exactly one LiveAnswer. Streamed: LiveTokens ending with one that has ``usage``, or LiveAnswer with an
        error. Raises CapacityError before the first item when no vehicle can serve.
        """

    def vehicle_state(self, vehicle_id: str) -> State | None:
        """The last report of a vehicle; None while it is silent."""

    async def owner_spoke(self, vehicle_id: str, what: str) -> None:
        """The owner's word is in the books: stop, or go on, and tell the vehicle. ``what`` is for its story."""
