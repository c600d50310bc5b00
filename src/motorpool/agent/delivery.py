"""Gets finished work into the durable stream, however long there is no link, and across the end of the process.

Decides: when a message is kept safe, and what is delivered first. Must not: look into a message, or know of leases.
Called by: ``agent.loop``.

With a link nothing touches the flash: the stream confirms a message within milliseconds, and only one that was not
confirmed for ``SPOOL_AFTER_S`` is put into the spool, which is longer than a reconnect takes and shorter than anything
that a car calls an outage. Once the link has been down for so long, every message is kept at once. What the next
process finds there it delivers before anything else, under the same ids: the stream drops a repetition while it
remembers the id, and the books count a line once whenever it comes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from motorpool.agent.spool import Spool
from motorpool.bus import BusError

log = logging.getLogger(__name__)

PUBLISHERS: Final = 8  # messages on their way to the durable stream at one time
RETRY_MIN_S: Final = 0.25
RETRY_MAX_S: Final = 2.0
SPOOL_AFTER_S: Final = 3.0
CATCH_UP_S: Final = 30.0  # so long at most what an earlier process left goes first; then both at once
SETTLE_S: Final = 0.5  # the cell reads stream and reports from two subjects: it gets time to read the stream first


class Waiting:
    """One message on its way. ``data`` is None while only the spool has it."""

    __slots__ = ("data", "delivered", "is_kept", "is_old", "message_id", "since_s")

    def __init__(self, message_id: str, data: bytes | None, since_s: float, *, is_old: bool) -> None:
        self.message_id = message_id
        self.data = data
        self.since_s = since_s
        self.is_old = is_old  # of an earlier process
        self.is_kept = is_old
        self.delivered = False


class Delivery:
    """All messages of one vehicle that the stream does not have yet.

    ``ready`` tells whether anything may be sent now, ``send`` sends and raises BusError when it must be tried again.
    ``on_published`` gets the id of each message of this process that is durable, ``on_full`` that nothing more can be
    kept safe (True) or that it can again. ``watch`` is added to every task, none of which fails by design.
    """

    def __init__(
        self,
        *,
        name: str,
        spool: Spool,
        ready: Callable[[], bool],
        send: Callable[[bytes, str], Awaitable[None]],
        on_published: Callable[[str], None],
        on_full: Callable[[bool], None],
        watch: Callable[[asyncio.Task[None]], None],
        spool_after_s: float | None = None,
    ) -> None:
        self._name = name
        self._spool = spool
        self._ready = ready
        self._send = send
        self._on_published = on_published
        self._on_full = on_full
        self._watch = watch
        self._after_s = SPOOL_AFTER_S if spool_after_s is None else spool_after_s
        self._queue: deque[Waiting] = deque()
        self._loose: dict[str, Waiting] = {}  # in memory alone
        self._old: set[str] = set()
        self._caught_up = asyncio.Event()
        self._caught_up.set()
        self._publishers: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._down_since_s: float | None = None
        self._full = False

    @property
    def is_behind(self) -> bool:
        """Whether there is something to deliver that an earlier process left."""
        return bool(self._old)

    def start(self) -> None:
        """Begin with what an earlier process left. Reads the names of the files alone."""
        self._down_since_s = now_s = asyncio.get_running_loop().time()
        left = self._spool.waiting()
        if left:
            log.info("%s: %d messages wait since the last time", self._name, len(left))
        self._old.update(left)
        self._queue.extend(Waiting(message_id, None, now_s, is_old=True) for message_id in left)
        if left:
            self._caught_up.clear()
        for _ in left[:PUBLISHERS]:
            self._publish()

    def add(self, message_id: str, data: bytes) -> None:
        """Deliver a message, as often as it takes."""
        waiting = Waiting(message_id, data, asyncio.get_running_loop().time(), is_old=False)
        self._loose[message_id] = waiting
        self._queue.append(waiting)
        self._publish()
        if self._keeper is None:
            self._keeper = asyncio.get_running_loop().create_task(self._keep_safe())
            self._keeper.add_done_callback(self._watch)

    def link_changed(self, *, up: bool) -> None:
        """The link went up or down."""
        if up:
            self._down_since_s = None
        elif self._down_since_s is None:
            self._down_since_s = asyncio.get_running_loop().time()

    async def catch_up(self) -> None:
        """Wait until what an earlier process left is delivered and the cell could read it, or for CATCH_UP_S."""
        try:
            async with asyncio.timeout(CATCH_UP_S):
                await self._caught_up.wait()
                await asyncio.sleep(SETTLE_S)
        except TimeoutError:
            log.info("%s: goes on beside %d messages of the last time", self._name, len(self._old))

    async def close(self) -> None:
        """Stop; what is not delivered is kept for the next process, as far as there is room."""
        tasks = [*self._publishers, *([self._keeper] if self._keeper is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for waiting in list(self._loose.values()):
            if waiting.data is not None:
                await asyncio.to_thread(self._spool.put, waiting.message_id, waiting.data)

    # -- to the stream -------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        if len(self._publishers) < PUBLISHERS:
            task = asyncio.get_running_loop().create_task(self._publish_waiting())
            self._publishers.add(task)
            task.add_done_callback(self._publishers.discard)
            task.add_done_callback(self._watch)

    async def _publish_waiting(self) -> None:
        """Deliver until nothing waits. A message is tried until the stream has it; its id makes repeats harmless."""
        while self._queue:
            waiting = self._queue.popleft()
            wait_s = RETRY_MIN_S
            while not await self._deliver(waiting):
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RETRY_MAX_S)
            waiting.delivered = True
            self._loose.pop(waiting.message_id, None)
            if not waiting.is_old:
                self._on_published(waiting.message_id)
            if waiting.is_kept:
                await asyncio.to_thread(self._spool.remove, waiting.message_id)
            self._old.discard(waiting.message_id)
            if not self._old:
                self._caught_up.set()

    async def _deliver(self, waiting: Waiting) -> bool:
        if not self._ready():
            return False
        data = waiting.data
        if data is None:
            data = await asyncio.to_thread(self._spool.read, waiting.message_id)
        if data is None:
            return True  # it was lost on the disk: the cell will miss the lease, and its lines are computed again
        try:
            await self._send(data, waiting.message_id)
        except BusError as error:
            log.info("%s: %s", self._name, error.message)
            return False
        return True

    # -- into the spool ------------------------------------------------------------------------------------------------

    async def _keep_safe(self) -> None:
        """Put what could not be delivered for a while into the spool, the oldest first."""
        loop = asyncio.get_running_loop()
        while self._loose:
            waiting = next(iter(self._loose.values()))
            since_s = waiting.since_s if self._down_since_s is None else min(waiting.since_s, self._down_since_s)
            wait_s = since_s + self._after_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            elif not await self._keep(waiting):
                self._tell_full(True)
                await asyncio.sleep(RETRY_MAX_S)
            else:
                self._tell_full(False)
        self._tell_full(False)
        self._keeper = None

    async def _keep(self, waiting: Waiting) -> bool:
        assert waiting.data is not None, "a loose message is in memory"
        kept = await asyncio.to_thread(self._spool.put, waiting.message_id, waiting.data)
        if kept and waiting.delivered:  # meanwhile
            await asyncio.to_thread(self._spool.remove, waiting.message_id)
        elif kept:
            waiting.is_kept, waiting.data = True, None
            del self._loose[waiting.message_id]
        return kept or waiting.delivered

    def _tell_full(self, full: bool) -> None:
        if full != self._full:
            self._full = full
            log.info("%s: %s", self._name, "nothing more can be kept safe" if full else "messages can be kept again")
            self._on_full(full)
