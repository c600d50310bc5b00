"""What has been told of one response while it runs, for any number of clients that listen, each from where it likes.

One task writes, clients read. A piece can be read once it is published; of a background response that is when it is in
the books, so that no restart can take back an event that somebody has seen. Must not: run or keep a response.

Called by: ``runs`` writes, ``telling`` reads.
"""

from __future__ import annotations

import asyncio
from typing import Final

from msgspec import Raw

from motorpool.errors import RateLimitError, TooLargeError
from motorpool.server.openai.responses.bills import Tab
from motorpool.server.openai.responses.narration import Began, Made, Piece, Restarted, Text
from motorpool.server.openai.responses.objects import Facts, ResponseObject
from motorpool.server.openai.responses.translate import Failure

MAX_READERS: Final = 32  # clients that listen to one response at a time
MAX_TOLD_BYTES: Final = 16 * 1024 * 1024  # text and logprobs of one response


class Log:
    """The pieces of one response and its end. ``published`` pieces may be told; ``result`` is set at the end.

    ``failure`` is set beside ``result`` when the response failed.
    """

    def __init__(self, facts: Facts, pieces: list[Piece] | None = None) -> None:
        self.facts = facts
        self.pieces: list[Piece] = []
        self.published = 0
        self.result: ResponseObject | None = None
        self.failure: Failure | None = None
        self.readers = 0
        self.began = False
        self.restarts = 0
        self.tab = Tab()
        self._text: list[str] = []
        self._logprobs: list[Raw] = []
        self._bytes = 0
        self._waiters: list[asyncio.Future[None]] = []
        for piece in pieces or ():
            self.append(piece)
        self.published = len(self.pieces)

    @property
    def text(self) -> str:
        """What has been told of the item that is open."""
        return "".join(self._text)

    @property
    def logprobs(self) -> list[Raw]:
        """The logprobs of ``text``."""
        return self._logprobs

    @property
    def has_text(self) -> bool:
        """Whether a client may have seen any of the answer."""
        return bool(self._text) or self.restarts > 0

    def append(self, piece: Piece) -> None:
        """Add a piece, to be published later; raises TooLargeError when the answer is over its bound."""
        if isinstance(piece, Began):
            self.began = True
        elif isinstance(piece, Restarted):
            self.restarts += 1
            self._text, self._logprobs = [], []
        elif isinstance(piece, Made):
            self.tab.take(piece)
        else:
            self._bytes += len(piece.text) + sum(len(entry) for entry in piece.logprobs)
            if self._bytes > MAX_TOLD_BYTES:
                raise TooLargeError(f"the answer is over the limit of {MAX_TOLD_BYTES} bytes", code="answer_too_large")
            self._text.append(piece.text)
            self._logprobs += piece.logprobs
        self.pieces.append(piece)

    def publish(self, count: int | None = None) -> None:
        """So many pieces may be told; all of them if nothing is said."""
        self.published = len(self.pieces) if count is None else count
        self._wake()

    def close(self, result: ResponseObject, failure: Failure | None = None) -> None:
        """The response has ended."""
        self.result, self.failure = result, failure
        self.publish()

    def join(self) -> None:
        """One more client listens; raises RateLimitError when there are too many."""
        if self.readers >= MAX_READERS:
            raise RateLimitError(f"at most {MAX_READERS} clients may listen to one response", code="too_many_listeners")
        self.readers += 1
        self._wake()

    def leave(self) -> None:
        """A client listens no more."""
        self.readers -= 1

    async def changed(self) -> None:
        """Wait until something is published, the response ends, or somebody joins."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    async def ended(self) -> ResponseObject:
        """Wait for the end."""
        while self.result is None:
            await self.changed()
        return self.result

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Take:
    """One run of an answer, written into a log in which an earlier run may have written before.

    What the log has already is not told twice: as long as the new run says the same, nothing is added. When it says
    something else, the item is given up and told anew. A run that ``goes_on`` says only what follows.
    """

    def __init__(self, log: Log, *, goes_on: bool = False) -> None:
        self._log = log
        self._told = log.text
        self._told_entries = len(log.logprobs)
        self._place = 0
        self._entries: list[Raw] = []
        self._level = goes_on or not self._told

    def feed(self, text: str, entries: list[Raw]) -> None:
        """More of the answer."""
        if self._level:
            if text or entries:
                self._log.append(Text(text, entries))
            return
        self._entries += entries
        rest = self._told[self._place :]
        if rest.startswith(text):
            self._place += len(text)
            self._level = self._place == len(self._told)
        elif text.startswith(rest):
            self._level = True
            self._log.append(Text(text[len(rest) :], self._entries[self._told_entries :]))
        else:
            self._give_up(text)

    def finish(self) -> None:
        """The answer is complete; it may have come out shorter than what was told."""
        if not self._level:
            self._give_up("")

    def _give_up(self, text: str) -> None:
        self._level = True
        self._log.append(Restarted())
        anew = self._told[: self._place] + text
        if anew or self._entries:
            self._log.append(Text(anew, self._entries))
