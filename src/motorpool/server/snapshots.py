"""Keeps what the cell has learnt in a file beside its books, now and then and at the end, and reads it at the start.

The file is a help, never a source: a cell without it, or with one that is old, damaged or of another version, starts as
well and learns again. It is written whole and put in the place of the last one, by a thread of its own.

Called by: ``server.loop``. Must not: hold up the loop for longer than it takes to copy some columns, or fail it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from motorpool.core import snapshot
from motorpool.core.scheduler import Scheduler

log = logging.getLogger(__name__)

EVERY_MS: Final = 300_000
MAX_BYTES: Final = 1 << 30
SUFFIX: Final = ".learnt"


class Snapshots:
    """The snapshots of one cell; ``books`` is the file of its database."""

    def __init__(self, books: Path) -> None:
        self.path = books.with_name(books.name + SUFFIX)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")
        self._writing: Future[None] | None = None
        self._due_ms: int | None = None

    def restore(self, scheduler: Scheduler, now_ms: int) -> None:
        """Give a scheduler that was filled from the books what was learnt before, as far as it can be read."""
        self._due_ms = now_ms + EVERY_MS
        try:
            learnt = snapshot.from_bytes(_read(self.path))
        except FileNotFoundError:
            return
        except (OSError, snapshot.SnapshotError) as error:
            why = error.message if isinstance(error, snapshot.SnapshotError) else error.strerror
            log.warning("%s is not used (%s): speeds are learnt anew", self.path.name, why)
            return
        snapshot.apply(scheduler, learnt, now_ms)

    def on_tick(self, scheduler: Scheduler, now_ms: int) -> None:
        """Take one if it is time, and have it written."""
        busy = self._writing is not None and not self._writing.done()
        if self._due_ms is None or now_ms < self._due_ms or busy:
            return
        self._due_ms = now_ms + EVERY_MS
        self._writing = self._thread.submit(self._write, snapshot.take(scheduler, now_ms))

    def close(self, scheduler: Scheduler, now_ms: int) -> None:
        """Write a last one, unless no state was ever whole; blocks for as long as that takes."""
        if self._due_ms is not None:
            self._thread.submit(self._write, snapshot.take(scheduler, now_ms))
        self.suspend()
        self._thread.shutdown(wait=True)

    def suspend(self) -> None:
        """The state in memory is not whole: none is taken before the next ``restore``."""
        self._due_ms = None

    def _write(self, taken: snapshot.Taken) -> None:
        try:
            write_whole(self.path, snapshot.to_bytes(taken.learnt()))
        except OSError as error:
            log.warning("%s could not be written: %s", self.path.name, error.strerror)


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise snapshot.SnapshotError("it is too large")
    return path.read_bytes()


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in the place of another one: after a crash there is the old or the new one, never a part."""
    beside = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    file = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
