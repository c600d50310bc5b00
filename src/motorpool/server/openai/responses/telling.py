"""Sends the events of a response to one client, from any sequence number on, until its end.

Must not: run a response, or keep one alive. Called by: ``routes``.
"""

from __future__ import annotations

import asyncio
from typing import Final

from motorpool.server.openai.chunks import PING
from motorpool.server.openai.exchange import Attendance, Exchange
from motorpool.server.openai.responses.log import Log
from motorpool.server.openai.responses.narration import Event, Narration

_EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"
_HEADERS: Final = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


class Listener:
    """One client of one response.

    ``after`` is the number of the last event that it has, -1 for none. With ``wait`` nothing is sent before there is
    text or an end, so that a failure before it can have a status of its own.
    """

    def __init__(self, exchange: Exchange, log: Log, *, after: int = -1, wait: bool = False) -> None:
        self._exchange = exchange
        self._log = log
        self._after = after
        self._wait = wait
        self._narration = Narration(log.facts)
        self._place = 0
        self._opening: asyncio.Task[None] | None = None

    @property
    def opened(self) -> bool:
        """Whether the client has its status."""
        return self._opening is not None

    async def run(self, quiet_s: float) -> bool:
        """Tell everything; False if nothing was sent because the response failed before its first text.

        Raises ClientGoneError when the client leaves, RateLimitError when too many listen already.
        """
        self._log.join()
        try:
            async with Attendance(self._exchange, quiet_s=quiet_s, ping=self._ping) as attendance:
                return await self._tell(attendance)
        finally:
            self._log.leave()

    async def _tell(self, attendance: Attendance) -> bool:
        log = self._log
        events = self._narration.opening()
        while True:
            while self._place < log.published:
                events += self._narration.tell(log.pieces[self._place])
                self._place += 1
            ended = log.result is not None
            if log.result is not None:
                if log.failure is not None and self._wait and not self.opened and not log.has_text:
                    return False
                events += self._narration.end(log.result)
            if ended or self.opened or not self._wait or log.has_text:
                await self._send(events, more=not ended)
                attendance.touch()
                events = []
            if ended:
                return True
            if self._place == log.published and log.result is None:  # sending took its time: there may be more
                await log.changed()

    async def _send(self, events: list[Event], *, more: bool) -> None:
        data = b"".join(event.data for event in events if event.number > self._after)
        if data or not more:
            await self._open()
            await self._exchange.send(data, more=more)

    async def _open(self) -> None:
        """Send the headers, once: the first event and a keep-alive may want to at the same time."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._exchange.start(200, _EVENT_STREAM, _HEADERS))
        # Shielded: when the keep-alive is cancelled in the middle, the headers go out all the same.
        await asyncio.shield(self._opening)

    async def _ping(self) -> None:
        await self._open()
        await self._exchange.send(PING, more=True)
