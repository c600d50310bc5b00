"""Reads the owner's log: the latest entries, sums over a time, and whether anything was taken out or altered.

Decides: what counts as tampering. Must not: write, or need the agent; the command line reads beside a running one.
Called by: ``agent.owner.log``, ``agent.owner.desk``, the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from motorpool.agent.owner.entries import (
    HEAD_NAME,
    MAX_LINE_BYTES,
    NO_HASH,
    Entry,
    EntryKind,
    Head,
    Line,
    Work,
    chain,
    entry_decoder,
    head_decoder,
    line_decoder,
    log_files,
)

BLOCK_BYTES: Final = 64 * 1024
MAX_PROBLEMS: Final = 20


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a time brought: how long the car worked, why it did not, what for, and the money."""

    from_ms: int
    to_ms: int
    allowed_ms: int = 0
    working_ms: int = 0
    battery_ms: int = 0
    why_ms: dict[str, int] = {}
    jobs: dict[str, Work] = {}

    @property
    def total(self) -> Work:
        """All classes of job together."""
        total = Work()
        for work in self.jobs.values():
            total.add(work)
        return total

    @property
    def net_micro(self) -> int | None:
        """What is left to the owner after electricity and wear; None while these are not known."""
        total = self.total
        if total.uncosted:
            return None
        return total.earned_micro - total.electricity_micro - total.wear_micro


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What a check of the whole log found; ``head`` is the hash of its last entry."""

    entries: int
    problems: tuple[str, ...]
    head: str = NO_HASH

    @property
    def whole(self) -> bool:
        """Is every entry there, as it was written."""
        return not self.problems


class LogReader:
    """The log in ``folder``, which may be written at the same time: a last line that is not whole is left out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def entries(self, since_ms: int = 0, limit: int = 100) -> list[Entry]:
        """The latest entries since then, the oldest of them first."""
        found: list[Entry] = []
        for path in reversed(log_files(self._folder)):
            for raw in _lines_backward(path):
                entry = _entry(raw)
                if entry is None:
                    continue
                if entry.at_ms < since_ms or len(found) >= limit:
                    return found[::-1]
                found.append(entry)
        return found[::-1]

    def summary(self, from_ms: int, to_ms: int) -> Summary:
        """All that ended from ``from_ms`` to before ``to_ms``, added up."""
        return self.summaries([(from_ms, to_ms)])[0]

    def summaries(self, times: list[tuple[int, int]]) -> list[Summary]:
        """Several times added up in one reading."""
        sums = [_Sum(from_ms, to_ms) for from_ms, to_ms in times]
        earliest_ms = min(from_ms for from_ms, _ in times)
        for path in reversed(log_files(self._folder)):
            latest_ms = 0
            for raw in _lines(path):
                entry = _entry(raw)
                if entry is None:
                    continue
                latest_ms = max(latest_ms, entry.at_ms)
                if entry.kind is EntryKind.SPAN:
                    for one in sums:
                        one.add(entry)
            if latest_ms < earliest_ms:
                break
        return [one.summary() for one in sums]

    def head(self) -> Head | None:
        """The last entry that is known to have been written; None if that is not known."""
        try:
            return head_decoder.decode((self._folder / HEAD_NAME).read_bytes())
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def verify(self) -> Verified:
        """Whether every line is as it was written, and none is missing."""
        return _Check(self._folder).run(self.head())


class _Sum:
    def __init__(self, from_ms: int, to_ms: int) -> None:
        self._from_ms, self._to_ms = from_ms, to_ms
        self._allowed_ms = self._working_ms = self._battery_ms = 0
        self._why_ms: dict[str, int] = {}
        self._jobs: dict[str, Work] = {}

    def add(self, entry: Entry) -> None:
        if not self._from_ms <= entry.at_ms < self._to_ms:
            return
        self._allowed_ms += entry.allowed_ms
        self._working_ms += entry.working_ms
        self._battery_ms += entry.battery_ms
        for code, ms in entry.why_ms.items():
            self._why_ms[code] = self._why_ms.get(code, 0) + ms
        for kind, work in entry.jobs.items():
            self._jobs.setdefault(kind, Work()).add(work)

    def summary(self) -> Summary:
        return Summary(
            from_ms=self._from_ms,
            to_ms=self._to_ms,
            allowed_ms=self._allowed_ms,
            working_ms=self._working_ms,
            battery_ms=self._battery_ms,
            why_ms=self._why_ms,
            jobs=self._jobs,
        )


class _Check:
    """One pass over all lines, from the oldest to the newest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._problems: list[str] = []
        self._before: str | None = None
        self._n: int | None = None
        self._begins_after = NO_HASH
        self._removed: set[str] = set()
        self._hash_at: dict[int, str] = {}
        self._entries = 0

    def run(self, head: Head | None) -> Verified:
        for path in log_files(self._folder):
            for number, raw in enumerate(_lines(path), 1):
                self._line(f"{path.name}, line {number}", raw, head)
        if self._begins_after != NO_HASH and self._begins_after not in self._removed:
            self._found("the beginning of the log is missing, and no entry says that it was removed")
        if head is not None and self._hash_at.get(head.n) != head.h:
            self._found("the end of the log is missing or was altered")
        elif head is None and self._entries:
            self._found(f"{HEAD_NAME} is missing: nobody would see that the last entries are gone")
        return Verified(entries=self._entries, problems=tuple(self._problems), head=self._before or NO_HASH)

    def _line(self, where: str, raw: bytes, head: Head | None) -> None:
        line = _line_of(raw)
        if line is None:
            self._found(f"{where} is no entry")
            return
        try:
            entry = entry_decoder.decode(line.e)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._found(f"{where} is no entry")
            return
        if self._before is None:
            self._before = self._begins_after = entry.prev or NO_HASH
        if chain(self._before, bytes(line.e)) != line.h:
            self._found(f"{where} was altered, or one before it is missing")
        if self._n is not None and entry.n != self._n + 1:
            self._found(f"{where} is entry {entry.n}, after {self._n}")
        if entry.kind is EntryKind.LOG and entry.last is not None:
            self._removed.add(entry.last)
        if head is not None and entry.n == head.n:
            self._hash_at[entry.n] = line.h
        self._before, self._n = line.h, entry.n
        self._entries += 1

    def _found(self, problem: str) -> None:
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(problem)


def _line_of(raw: bytes) -> Line | None:
    try:
        return line_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _entry(raw: bytes) -> Entry | None:
    line = _line_of(raw)
    try:
        return None if line is None else entry_decoder.decode(line.e)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file; one that is longer than any entry is cut, and so is none."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                if line.endswith(b"\n"):
                    yield line[:-1]
                elif len(line) == MAX_LINE_BYTES:
                    yield b""
    except FileNotFoundError:
        return  # the writer has just removed it


def _lines_backward(path: Path) -> Iterator[bytes]:
    """The whole lines of a file, the last first, read block by block."""
    try:
        with path.open("rb") as file:
            at = file.seek(0, 2)
            rest, first = b"", True
            while at > 0:
                size = min(BLOCK_BYTES, at)
                at -= size
                file.seek(at)
                rest, *lines = (file.read(size) + rest).split(b"\n")
                if first and lines:
                    lines.pop()  # after the last line break: nothing, or a line that is not whole
                    first = False
                yield from reversed(lines)
            if not first and rest:
                yield rest
    except FileNotFoundError:
        return
