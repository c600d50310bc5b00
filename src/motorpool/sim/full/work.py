"""What simulated customers hand in, and the one right answer to each line.

Decides: how many tokens a line has, what they are, and which lines are bad. Must not: know who runs them.
Called by: ``sim.full.engine`` (which computes the answers), ``sim.full.cell`` (the input files), ``sim.full.checks``.

The answer to a line follows from its job and number alone, as with greedy sampling: whoever continues it from any
checkpoint comes to the same text.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import Final

import msgspec
import numpy as np

from motorpool.core import events as ev
from motorpool.core.pricing import Price
from motorpool.sim.full.clock import Draws
from motorpool.store import books
from motorpool.types import Kind

PRICE: Final = Price(input_micro=30_000_000, output_micro=60_000_000)  # so high that no token costs nothing
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz "


class Fate(IntEnum):
    """What becomes of a line in an engine."""

    FINE = 0
    POISON = 1  # the engine dies of it
    BAD = 2  # the customer's mistake: status 400


class Line(msgspec.Struct, frozen=True, array_like=True):
    """The body of one line: everything that the simulated engine has to know. ``job`` is the customer's number."""

    job: int
    line: int
    prompt: int
    tokens: int
    fate: int = 0


class Job(msgspec.Struct, kw_only=True):
    """One batch of a customer; ``cancel_ms`` is when the customer cancels it. ``job_no`` is the books' own number."""

    number: int
    model: str
    lines: list[Line]
    handed_ms: int
    window_ms: int
    cancel_ms: int | None = None
    account: str = "acme"
    job_no: int = 0
    bodies: list[bytes] = []
    limits: list[int] = []

    @property
    def job_id(self) -> str:
        """Its name in the API."""
        return f"batch_{self.number:04d}"

    @property
    def expires_ms(self) -> int:
        """When its window closes."""
        return self.handed_ms + self.window_ms

    def started(self) -> ev.JobStarted:
        """The event with which it begins."""
        return ev.JobStarted(
            cause_id=self.job_id,
            job_no=self.job_no,
            job_id=self.job_id,
            account=self.account,
            kind=Kind.CHAT,
            model=self.model,
            price=PRICE,
            expires_ms=self.expires_ms,
            lengths=np.array([len(body) for body in self.bodies], dtype=np.uint32),
            limits=np.array(self.limits, dtype=np.uint32),
        )

    def index(self) -> books.LineIndex:
        """The same as the books keep it."""
        lengths = np.array([len(body) for body in self.bodies], dtype=np.uint32)
        offsets = np.cumsum(lengths, dtype=np.uint64) - lengths
        return books.LineIndex(offsets=offsets, lengths=lengths, limits=np.array(self.limits, dtype=np.uint32))


_encode = msgspec.json.encode
_line = msgspec.json.Decoder(Line)


def with_bodies(job: Job) -> Job:
    """The job with its input file; an answer may be a little longer than it is."""
    job.bodies = [_encode(line) for line in job.lines]
    job.limits = [line.tokens + 8 for line in job.lines]
    return job


def read_line(body: bytes) -> Line:
    """The line that a body asks for."""
    return _line.decode(body)


@lru_cache(maxsize=4_096)
def answer_text(job: int, line: int, tokens: int) -> str:
    """The right answer: one letter a token."""
    draws = Draws("answer", job, line)
    return "".join(_LETTERS[draws.below(len(_LETTERS))] for _ in range(tokens))


def answer_body(line: Line, text: str) -> bytes:
    """The answer as the engine gives it."""
    return _encode({"line": line.line, "text": text})
