"""What stands in the owner's log, and how a line of it is chained to the one before.

Decides: the form of an entry and of the files. Must not: write.
Called by: ``agent.owner.log`` (which writes), ``agent.owner.reading`` (which reads, adds up and verifies).

A line is ``{"h": HASH, "e": ENTRY}``. The hash covers the hash of the line before and the bytes of the entry, so that
an entry which is taken out or altered shows in every line after it. Files are by month; each begins with an entry that
names the hash before it, so that a file can be checked after older ones were removed.
"""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

LOG_DIR: Final = "owner-log"  # in the agent's folder
HEAD_NAME: Final = "head.json"
NO_HASH: Final = "0" * 64
MAX_LINE_BYTES: Final = 16 * 1024
_FILE: Final = re.compile(r"\d{4}-\d{2}\.\d{2}\.jsonl")


class EntryKind(StrEnum):
    """What an entry tells."""

    SPAN = "span"  # a stretch of time: worked, allowed, why not, and what came of it
    CONSENT = "consent"  # given, changed, withdrawn, confirmed, run out
    ACT = "act"  # paused, "I need the car", "go on"
    POLICY = "policy"  # somebody changed the configuration, with their name
    PAGE = "page"  # a phone was paired or a key enrolled
    LOG = "log"  # about the log itself: begun, removed files, repairs, what could not be written


class Work(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the car did for one class of customer: never for which one, and never what.

    ``measured_mwh`` is the part of ``energy_mwh`` that was measured and not modelled. ``uncosted``: what the energy and
    the wear cost is not known for a part of it.
    """

    lines: int = 0
    tokens: int = 0
    energy_mwh: int = 0
    measured_mwh: int = 0
    earned_micro: int = 0
    electricity_micro: int = 0
    wear_micro: int = 0
    uncosted: bool = False

    def add(self, other: Work) -> None:
        """Count the other in."""
        for name in self.__struct_fields__:
            if name != "uncosted":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.uncosted = self.uncosted or other.uncosted


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One entry. ``at_ms`` is when it ended; ``what`` is in words.

    A span has ``from_ms``, how long work was allowed and done, for how long each reason stood against it (several may
    at one time), and what was done by class of job. ``prev``, ``file`` and ``last`` are for the log itself.
    """

    n: int
    at_ms: int
    kind: EntryKind
    what: str = ""
    by: str = ""
    from_ms: int | None = None
    allowed_ms: int = 0
    working_ms: int = 0
    battery_ms: int = 0
    why_ms: dict[str, int] = {}
    jobs: dict[str, Work] = {}
    prev: str | None = None
    file: str | None = None
    last: str | None = None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line as it stands in a file."""

    h: str
    e: msgspec.Raw


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The last entry that was written, kept beside the files: without it nobody would miss a last line."""

    n: int
    h: str


line_decoder = msgspec.json.Decoder(Line)
entry_decoder = msgspec.json.Decoder(Entry)
head_decoder = msgspec.json.Decoder(Head)


def chain(before: str, body: bytes) -> str:
    """The hash of an entry after the line with the hash ``before``."""
    return hashlib.sha256(before.encode() + body).hexdigest()


def log_files(folder: Path) -> list[Path]:
    """The files of a log, the oldest first."""
    try:
        names = [path for path in folder.iterdir() if _FILE.fullmatch(path.name)]
    except OSError:
        return []
    return sorted(names, key=lambda path: path.name)


def month_file(now_ms: int, part: int) -> str:
    """The name of the file for a moment (UTC): ``2026-11.00.jsonl``."""
    days = now_ms // 86_400_000 + 719_468  # days since 0000-03-01, after Howard Hinnant's "days_from_civil"
    era, day = divmod(days, 146_097)
    year = (day - day // 1_460 + day // 36_524 - day // 146_096) // 365
    month_index = (5 * (day - (365 * year + year // 4 - year // 100)) + 2) // 153
    month = month_index + 3 if month_index < 10 else month_index - 9
    return f"{era * 400 + year + (month <= 2):04d}-{month:02d}.{part:02d}.jsonl"
