"""The owner's log: everything that the guard decided, appended and chained, bounded on flash.

Decides: what is one entry, when it is written, and which file is removed when there are too many bytes.
Must not: hold content, a place, a name of a customer or a key; write in the caller's thread but in ``flush``; or stop
the vehicle: a log that cannot be written is told in the agent's own log, and in this one as soon as it can.
Called by: ``agent.owner.desk``.

Verdicts come several times a second. Equal ones are one entry, which is written when it ends and at the latest every
15 minutes while work is allowed, every hour while not; changes within a minute are one entry with the time of each. So
a day has at most 1,440 entries of the guard, and one with four comings and goings about 40: 10 kB.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import threading
from collections import deque
from pathlib import Path
from typing import Final

import msgspec

from motorpool.agent.owner.entries import (
    HEAD_NAME,
    NO_HASH,
    Entry,
    EntryKind,
    Head,
    Work,
    chain,
    entry_decoder,
    line_decoder,
    log_files,
    month_file,
)
from motorpool.agent.owner.reading import LogReader, Summary, Verified
from motorpool.core.guard import Verdict
from motorpool.errors import CallerError, SetupError
from motorpool.trust.credentials import write_secret
from motorpool.types import Permit

log = logging.getLogger(__name__)

LOCK_NAME: Final = "lock"
MAX_LOG_BYTES: Final = 20_000_000
PARTS: Final = 4  # a file is closed at this part of the cap, so that removing the oldest leaves most of the log
MIN_SPAN_MS: Final = 60_000
ALLOWED_SPAN_MS: Final = 15 * 60_000
DENIED_SPAN_MS: Final = 3_600_000
GAP_MS: Final = 60_000  # without a verdict for longer, nobody knows what was: the program did not run, or the car slept
MAX_PENDING: Final = 1_000
MAX_KINDS: Final = 16
MAX_WORDS: Final = 500
OTHER_KIND: Final = "other"
_KIND: Final = re.compile(r"[a-z0-9][a-z0-9 _./-]{0,39}")


class _Span:
    """A stretch of time that is not written yet."""

    def __init__(self, now_ms: int) -> None:
        self.from_ms = self.to_ms = now_ms
        self.now: tuple[bool, bool, frozenset[str]] | None = None  # allowed, from the battery, reasons
        self.working = False
        self.mixed = False
        self.allowed_ms = self.working_ms = self.battery_ms = 0
        self.why_ms: dict[str, int] = {}
        self.jobs: dict[str, Work] = {}

    def run(self, now_ms: int) -> None:
        """Count the time since the last look, as it was found then."""
        passed_ms, self.to_ms = now_ms - self.to_ms, now_ms
        if self.now is None:
            return
        allowed, battery, reasons = self.now
        if allowed:
            self.allowed_ms += passed_ms
            self.battery_ms += passed_ms if battery else 0
            self.working_ms += passed_ms if self.working else 0
        for code in reasons:
            self.why_ms[code] = self.why_ms.get(code, 0) + passed_ms

    def entry(self) -> Entry:
        """As it stands in the log, without its number."""
        return Entry(
            n=0,
            at_ms=self.to_ms,
            kind=EntryKind.SPAN,
            from_ms=self.from_ms,
            allowed_ms=self.allowed_ms,
            working_ms=self.working_ms,
            battery_ms=self.battery_ms,
            why_ms={code: ms for code, ms in sorted(self.why_ms.items()) if ms > 0},
            jobs=self.jobs,
        )


class OwnerLog:
    """The log in ``folder``. What is told is kept in memory until ``flush``, which may run in another thread."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_LOG_BYTES) -> None:
        self.reader = LogReader(folder)
        self._folder = folder
        self._max_bytes = max_bytes
        self._span: _Span | None = None
        self._pending: deque[Entry] = deque()
        self._lost = 0
        self._lock = threading.Lock()
        self._locked: int | None = None
        self._path: Path | None = None
        self._file: int | None = None
        self._size = 0
        self._n, self._hash = 0, NO_HASH
        self._failed = False

    # -- what is told --------------------------------------------------------------------------------------------------

    def verdict(self, verdict: Verdict, now_ms: int, *, working: bool = False) -> None:
        """What the guard decided just now; ``working``: the engine computes."""
        if isinstance(verdict, Permit):
            now = (True, verdict.battery_fed, frozenset[str]())
        else:
            now = (False, False, frozenset(reason.code.value for reason in verdict))
        span = self._ongoing(now_ms)
        age_ms = now_ms - span.from_ms
        most_ms = ALLOWED_SPAN_MS if now[0] else DENIED_SPAN_MS
        changed = span.now is not None and now != span.now
        if age_ms >= most_ms or (age_ms >= MIN_SPAN_MS and (changed or span.mixed)):
            span = self._close_span(now_ms)
        elif changed:
            span.mixed = True
        span.now, span.working = now, working

    def worked(
        self,
        kind: str,
        now_ms: int,
        *,
        lines: int = 0,
        tokens: int = 0,
        energy_mwh: int = 0,
        measured: bool = False,
        earned_micro: int = 0,
        electricity_micro: int | None = None,
        wear_micro: int | None = None,
    ) -> None:
        """What the car has just done for a class of customer (``kind``: a short plain name, never a customer's)."""
        if not _KIND.fullmatch(kind):
            raise CallerError("a class of job is a short name in small letters", code="invalid_job_class")
        jobs = self._ongoing(now_ms).jobs
        work = Work(
            lines=lines,
            tokens=tokens,
            energy_mwh=energy_mwh,
            measured_mwh=energy_mwh if measured else 0,
            earned_micro=earned_micro,
            electricity_micro=electricity_micro or 0,
            wear_micro=wear_micro or 0,
            uncosted=energy_mwh > 0 and (electricity_micro is None or wear_micro is None),
        )
        jobs.setdefault(kind if kind in jobs or len(jobs) < MAX_KINDS else OTHER_KIND, Work()).add(work)

    def policy(self, what: str, now_ms: int, *, by: str = "operator") -> None:
        """Somebody changed the configuration: in words, and who."""
        self.tell(EntryKind.POLICY, what, now_ms, by=by)

    def tell(self, kind: EntryKind, what: str, now_ms: int, *, by: str = "") -> None:
        """An event, in words."""
        self._put(Entry(n=0, at_ms=now_ms, kind=kind, what=what[:MAX_WORDS], by=by[:MAX_WORDS]))

    def _ongoing(self, now_ms: int) -> _Span:
        span = self._span
        if span is not None and 0 <= now_ms - span.to_ms <= GAP_MS:
            span.run(now_ms)
            return span
        if span is not None:
            self._put_span(span)  # what was in between is not known, and nothing is told of it
        self._span = span = _Span(now_ms)
        return span

    def _close_span(self, now_ms: int) -> _Span:
        if self._span is not None:
            self._put_span(self._span)
        self._span = span = _Span(now_ms)
        return span

    def _put_span(self, span: _Span) -> None:
        if span.to_ms > span.from_ms or span.jobs:
            self._put(span.entry())

    def _put(self, entry: Entry) -> None:
        if len(self._pending) >= MAX_PENDING:
            self._lost += 1
            return
        self._pending.append(entry)

    # -- what is read --------------------------------------------------------------------------------------------------

    def entries(self, since_ms: int = 0, limit: int = 100) -> list[Entry]:
        """The latest entries since then, the oldest of them first; what is still open is not among them."""
        self.flush()
        return self.reader.entries(since_ms, limit)

    def summary(self, from_ms: int, to_ms: int) -> Summary:
        """All that ended within this time, added up."""
        self.flush()
        return self.reader.summary(from_ms, to_ms)

    def verify(self) -> Verified:
        """Whether every line is as it was written, and none is missing."""
        self.flush()
        return self.reader.verify()

    # -- what is written -----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Is there anything to write."""
        return bool(self._pending)

    def open(self) -> None:
        """Take the log, and mend its end if the last line was cut off. Raises SetupError if another program has it."""
        with self._lock:
            self._take()

    def flush(self) -> None:
        """Write what waits. A disk that refuses keeps it waiting; nothing is raised."""
        with self._lock:
            if not self._pending:
                return
            try:
                self._take()
                self._write_pending()
            except (OSError, SetupError) as error:
                if not self._failed:
                    log.warning("the owner's log cannot be written: %s", error)
                self._failed = True
            else:
                self._failed = False

    def close(self, now_ms: int) -> None:
        """Write all, the stretch that is still open included, and let go of the log."""
        if self._span is not None:
            self._ongoing(now_ms)
            self._put_span(self._span)
            self._span = None
        self.flush()
        with self._lock:
            for descriptor in (self._file, self._locked):
                if descriptor is not None:
                    os.close(descriptor)
            self._file = self._locked = self._path = None

    def _take(self) -> None:
        if self._locked is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise SetupError("another agent has this folder: stop it first", code="owner_log_taken") from error
        self._locked = descriptor
        self._recover()

    def _recover(self) -> None:
        """Find the end of the log; cut off what was being written when the power went, and say so."""
        for path in reversed(log_files(self._folder)):
            data = path.read_bytes()
            end, line = _last_good(data)
            if end < len(data):
                os.truncate(path, end)
                self._note(f"{len(data) - end} bytes at the end of {path.name} were not whole and were cut off")
            if line is not None:
                self._n, self._hash = line
                self._path = path
                break
            path.unlink()
        head = self.reader.head()
        if head is not None and head.n > self._n:
            self._note(f"the entries {self._n + 1} to {head.n} are missing: somebody removed them, or the disk failed")

    def _note(self, what: str) -> None:
        """About the log itself; it gets the time of what is written next."""
        self._pending.appendleft(Entry(n=0, at_ms=0, kind=EntryKind.LOG, what=what))

    def _write_pending(self) -> None:
        if self._lost:
            what = f"{self._lost} entries could not be written and are lost"
            self._pending.append(Entry(n=0, at_ms=0, kind=EntryKind.LOG, what=what))
            self._lost = 0
        while self._pending:
            entry = self._pending[0]
            at_ms = entry.at_ms or max((waiting.at_ms for waiting in self._pending), default=0)
            self._file_for(at_ms)
            self._append(msgspec.structs.replace(entry, at_ms=at_ms))
            self._pending.popleft()
        assert self._file is not None
        os.fsync(self._file)
        write_secret(self._folder / HEAD_NAME, msgspec.json.encode(Head(n=self._n, h=self._hash)))
        self._trim()

    def _file_for(self, now_ms: int) -> None:
        """Have the right file open: a new one each month, or when one is large. Time that goes back opens none."""
        part_bytes = self._max_bytes // PARTS
        name = month_file(now_ms, 0)
        if self._path is not None:
            own = self._path.name
            if name[:7] <= own[:7]:
                part = int(own[8:10])
                if self._file is None:
                    self._open_file(self._path)
                full = self._size >= part_bytes and part < 99
                name = f"{own[:8]}{part + 1:02d}.jsonl" if full else own
            if name == own:
                return
        path = self._folder / name
        self._open_file(path)
        self._path = path
        what = "the log goes on in a new file" if self._n else "the log begins"
        self._append(Entry(n=0, at_ms=now_ms, kind=EntryKind.LOG, what=what, prev=self._hash))

    def _open_file(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._file is not None:
            os.close(self._file)
        self._file, self._size = descriptor, os.fstat(descriptor).st_size

    def _append(self, entry: Entry) -> None:
        """Write one line whole; what a full disk took half of is taken back."""
        assert self._file is not None
        body = msgspec.json.encode(msgspec.structs.replace(entry, n=self._n + 1))
        digest = chain(self._hash, body)
        line = b'{"h":"' + digest.encode() + b'","e":' + body + b"}\n"
        written = 0
        try:
            written = os.write(self._file, line)
        finally:
            if written < len(line):
                os.ftruncate(self._file, self._size)
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(line)
        self._n, self._hash = self._n + 1, digest

    def _trim(self) -> None:
        """Remove the oldest files beyond the cap, after an entry that says so."""
        files = log_files(self._folder)
        total = sum(path.stat().st_size for path in files)
        for path in files[:-1]:
            if total <= self._max_bytes:
                return
            _, line = _last_good(path.read_bytes())
            total -= path.stat().st_size
            what = f"{path.name} was removed: the log may take {self._max_bytes // 1000} kB"
            last = NO_HASH if line is None else line[1]
            self._append(Entry(n=0, at_ms=self._latest_ms(), kind=EntryKind.LOG, what=what, file=path.name, last=last))
            assert self._file is not None
            os.fsync(self._file)
            write_secret(self._folder / HEAD_NAME, msgspec.json.encode(Head(n=self._n, h=self._hash)))
            path.unlink()

    def _latest_ms(self) -> int:
        latest = self.reader.entries(0, 1)
        return latest[-1].at_ms if latest else 0


def _last_good(data: bytes) -> tuple[int, tuple[int, str] | None]:
    """Where the last whole line ends, and its number and hash; 0 and None if there is no such line."""
    end = data.rfind(b"\n") + 1
    while end > 0:
        start = data.rfind(b"\n", 0, end - 1) + 1
        try:
            line = line_decoder.decode(data[start : end - 1])
            return end, (entry_decoder.decode(line.e).n, line.h)
        except (msgspec.DecodeError, UnicodeDecodeError):
            end = start
    return 0, None
