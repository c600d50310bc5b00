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
from motorpool.core import events as ev
from motorpool.core.attribution import Footprint
from motorpool.core.pricing import Shares
from motorpool.store.blobs import BlobStore
from motorpool.types import Kind, Usage
from motorpool.wire import Delta, State

T = TypeVar("T")


class Carried(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller that keeps an answer in the books has of it already; empty if it is to begin.

    A vehicle goes on after it. Nothing is paid by the cell: the end comes with the bill for all of it, which the caller
    pays in the transaction in which it keeps that end. Only for requests with one choice.
    """

    text: str = ""
    tokens: int = 0
    token_ids: list[int] = []
    logprobs: bytes = b""
    finish_reason: str | None = None
    shares: Shares = []
    energy_uwh: dict[str, int] = {}


class LiveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One live request, validated; ``body`` is the customer's JSON, ``response_id`` stands in every chunk.

    ``carried`` is None unless the caller keeps the answer in the books and pays for it there.
    """

    request_id: str
    response_id: str
    account: str
    kind: Kind
    model: str
    stream: bool
    choices: int
    body: bytes
    created_s: int
    carried: Carried | None = None


class LiveTokens(msgspec.Struct, frozen=True, kw_only=True):
    """New text of a stream; ``usage`` and ``footprint`` are set on the last one and cover the whole answer.

    ``vehicle_id``: who said it, which no customer is told; empty if no vehicle did.
    """

    deltas: list[Delta]
    usage: Usage | None
    engine: str
    footprint: Footprint | None = None
    vehicle_id: str = ""


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

    async def write(self, change: Callable[[sqlite3.Connection], T], *, bill: ev.LiveEnded | None = None) -> T:
        """Run ``change`` inside the next transaction, and pay ``bill`` in it; return its result when that is durable.

        An exception from ``change`` undoes its own changes, pays nothing and is raised here. ``change`` must be quick.
        """

    async def start_batch(self, batch: ValidBatch) -> None:
        """``validating`` to ``in_progress``; from here on the batch finishes by itself, through any crash."""

    async def cancel_batch(self, batch_no: int) -> None:
        """``in_progress`` to ``cancelling``; raises ConflictError if it has ended or is finalizing."""

    async def answer(self, request: LiveRequest) -> LiveAnswer:
        """Run a plain live request to its answer or error; cancelling it cancels it on the vehicle.

        Raises CapacityError when no vehicle can serve.
        """

    def serving(self, model: str, regions: tuple[str, ...] = (), min_trust: int = 0) -> int:
        """How many vehicles could run a model now: of these regions, if any are named, and of this trust at least."""

    def live(self, request: LiveRequest) -> AsyncIterator[LiveTokens | LiveAnswer]:
        """Run a live request; closing the iterator early cancels it on the vehicle.

        Plain: exactly one LiveAnswer. Streamed: LiveTokens ending with one that has ``usage``, or LiveAnswer with an
        error. Raises CapacityError before the first item when no vehicle can serve.
        """

    def vehicle_state(self, vehicle_id: str) -> State | None:
        """The last report of a vehicle; None while it is silent."""

    async def owner_spoke(self, vehicle_id: str, what: str) -> None:
        """The owner's word is in the books: stop, or go on, and tell the vehicle. ``what`` is for its story."""
