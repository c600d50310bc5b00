"""What a cell's loop takes from its inbox, and how messages of vehicles become it.

Bodies stay beside the events that refer to them. Must not: decide anything; the scheduler does.
Called by: ``server.loop``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO, Final

import msgspec

from motorpool import wire
from motorpool.bus import WorkMessage
from motorpool.core import events as ev
from motorpool.errors import MotorpoolError, VehicleError
from motorpool.store import books
from motorpool.types import MAX_CHECKPOINT_BYTES

log = logging.getLogger(__name__)
_raw: Final = msgspec.json.Decoder(msgspec.Raw)
_NOT_JSON: Final = VehicleError("the vehicle's answer was not JSON")
_NOT_JSON_BODY: Final = msgspec.json.encode(_NOT_JSON.envelope())


class Entry:
    """One thing for the loop to do: an event with the bodies that it refers to, or a change that the API wants."""

    __slots__ = ("bodies", "change", "done", "event", "message")

    def __init__(
        self,
        *,
        event: ev.SchedulerEvent | None = None,
        bodies: list[bytes] | None = None,
        change: Callable[[sqlite3.Connection], Any] | None = None,
        message: WorkMessage | None = None,
        done: asyncio.Future[Any] | None = None,
    ) -> None:
        self.event = event
        self.bodies = bodies or []
        self.change = change
        self.message = message
        self.done = done

    @property
    def comes_once(self) -> bool:
        """Whether nobody could ask for it again: finished work, and live requests that nobody waits to have paid."""
        return self.message is not None or (isinstance(self.event, ev.LiveEnded) and self.done is None)


class InputFile:
    """The input file of a job in progress, and where its lines are."""

    def __init__(self, stream: BinaryIO, batch_id: str, endpoint: str, index: books.LineIndex) -> None:
        self.stream = stream
        self.batch_id = batch_id
        self.endpoint = endpoint
        self.offsets = index.offsets
        self.lengths = index.lengths

    def lines(self, numbers: list[int]) -> list[bytes]:
        """The bytes of these lines, in order; runs of neighbours are read at once."""
        found: list[bytes] = []
        start = 0
        while start < len(numbers):
            stop = start + 1
            while stop < len(numbers) and numbers[stop] == numbers[stop - 1] + 1:
                stop += 1
            first, last = numbers[start], numbers[stop - 1]
            low = int(self.offsets[first])
            high = int(self.offsets[last]) + int(self.lengths[last])
            data = os.pread(self.stream.fileno(), high - low, low)
            for number in numbers[start:stop]:
                at = int(self.offsets[number]) - low
                found.append(data[at : at + int(self.lengths[number])])
            start = stop
        return found


def progress_entry(vehicle_id: str, message: wire.Progress) -> Entry:
    """Checkpoints of a vehicle's running attempts; those that are too long to be handed on are left out."""
    items = [item for item in message.items if len(item.checkpoint) <= MAX_CHECKPOINT_BYTES]
    progress = ev.ProgressMade(
        cause_id=f"{vehicle_id}/{message.lease_id}",
        vehicle_id=vehicle_id,
        lease_id=message.lease_id,
        job_id=message.job_id,
        lines=[item.line for item in items],
        tokens=[item.tokens for item in items],
        sizes=[len(item.checkpoint) for item in items],
    )
    return Entry(event=progress, bodies=[item.checkpoint for item in items])


def work_entry(message: WorkMessage) -> Entry | None:
    """Finished or returned attempts; None if it is no message."""
    try:
        work = wire.decode(wire.UP_WORK, message.data)
    except MotorpoolError as error:
        log.warning("%s sent work that is refused: %s", message.vehicle_id, error.code)
        return None
    return _results(message, work) if isinstance(work, wire.Results) else _returned(message, work)


def _results(message: WorkMessage, work: wire.Results) -> Entry:
    good = [_is_one_line_of_json(item.body) for item in work.items]
    event = ev.ResultsArrived(
        cause_id=f"{message.vehicle_id}/{work.message_id}",
        vehicle_id=message.vehicle_id,
        lease_id=work.lease_id,
        job_id=work.job_id,
        message_id=work.message_id,
        lines=[item.line for item in work.items],
        statuses=[item.status if fits else _NOT_JSON.status for item, fits in zip(work.items, good, strict=True)],
        prompt_tokens=[item.prompt_tokens for item in work.items],
        completion_tokens=[item.completion_tokens for item in work.items],
        cached_tokens=[item.cached_tokens for item in work.items],
        carried_tokens=[item.carried_tokens for item in work.items],
        energy_mwh=work.energy_mwh,
        energy_is_measured=work.energy_is_measured,
    )
    bodies = [item.body if fits else _NOT_JSON_BODY for item, fits in zip(work.items, good, strict=True)]
    return Entry(event=event, bodies=bodies, message=message)


def _returned(message: WorkMessage, work: wire.Returned) -> Entry:
    checkpoints = [
        b"" if item.checkpoint is None or len(item.checkpoint) > MAX_CHECKPOINT_BYTES else item.checkpoint
        for item in work.items
    ]
    event = ev.WorkReturned(
        cause_id=f"{message.vehicle_id}/{work.message_id}",
        vehicle_id=message.vehicle_id,
        lease_id=work.lease_id,
        job_id=work.job_id,
        reason=work.reason,
        lines=[item.line for item in work.items],
        tokens=[item.tokens if data else 0 for item, data in zip(work.items, checkpoints, strict=True)],
        sizes=[len(data) for data in checkpoints],
        started=[item.started for item in work.items],
    )
    return Entry(event=event, bodies=checkpoints, message=message)


def _is_one_line_of_json(body: bytes) -> bool:
    """Whether an answer can stand in an output file, where every line is one JSON object in UTF-8."""
    try:
        _raw.decode(body)  # which does not look into strings
        body.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return b"\n" not in body


def log_foreign(what: str, error: Exception) -> None:
    """Log an error that is not ours."""
    # The text of a foreign error may hold a customer's data; its type and place do not.
    log.error("%s: %s\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
