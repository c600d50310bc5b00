"""Tells webhooks what they are to hear, again and again until they have heard it or the last attempt has failed.

What is to be told stands in the books, put there in the transaction in which it happened; an attempt is written down
after it was made. So a crash loses nothing, and may repeat a delivery: the id of the event tells the receiver.

Called by: ``server.openai.app``. Must not: send what a webhook did not ask for, or log an address.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from functools import partial
from typing import Final

from motorpool.errors import MotorpoolError, NotFoundError
from motorpool.server.cell import Cell
from motorpool.server.webhooks import signing
from motorpool.server.webhooks.sender import GONE, Outcome, Sender
from motorpool.store import webhooks as store
from motorpool.store.webhooks import Delivery, DeliveryState

LOOK_S: Final = 1.0
AT_ONCE: Final = 16
PRUNE_MS: Final = 3_600_000
# The waits after each attempt that failed; three days and a little in all, as OpenAI's.
WAITS_S: Final = (5, 30, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
MAX_ATTEMPTS: Final = len(WAITS_S) + 1
_SPREAD: Final = 0.2  # so that what failed together does not come back together
_log = logging.getLogger(__name__)


class WebhookWorker:
    """The deliveries of a cell."""

    def __init__(self, cell: Cell, sender: Sender | None = None) -> None:
        self._cell = cell
        self.sender = sender or Sender()
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._pruned_ms = 0

    def start(self) -> None:
        """Begin; starting twice is starting once."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop. What was under way is told again by the next process."""
        tasks = [*self._under_way.values(), *([] if self._task is None else [self._task])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.sender.close()

    async def settle(self) -> None:
        """Begin what is due, and wait until all that is under way has been tried."""
        self._begin()
        while self._under_way:
            await asyncio.wait(list(self._under_way.values()))
            self._begin()

    async def _run(self) -> None:
        while True:
            try:
                self._begin()
                await self._prune()
            except (MotorpoolError, sqlite3.Error) as error:
                _log.warning("webhooks wait: %s", type(error).__name__)
            await asyncio.sleep(LOOK_S)

    def _begin(self) -> None:
        room = AT_ONCE - len(self._under_way)
        if room <= 0:
            return
        for delivery in store.due(self._cell.reader, self._cell.now_ms(), AT_ONCE + len(self._under_way)):
            if room <= 0:
                return
            if delivery.delivery_no not in self._under_way:
                room -= 1
                task = asyncio.create_task(self._deliver(delivery))
                self._under_way[delivery.delivery_no] = task
                task.add_done_callback(lambda _, number=delivery.delivery_no: self._under_way.pop(number, None))  # type: ignore[misc]  # binds the number

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            webhook = store.get(self._cell.reader, delivery.webhook_id)
        except NotFoundError:
            return  # deleted a moment ago, and its deliveries with it
        body = signing.payload(
            event_id=delivery.event_id,
            kind=delivery.type,
            subject=delivery.subject,
            happened_ms=delivery.happened_ms,
        )
        policy = store.policy(self._cell.reader)
        outcome = await self.sender.send(
            webhook, policy, body, message_id=delivery.event_id, now_ms=self._cell.now_ms()
        )
        try:
            await self._cell.write(partial(self._record, delivery=delivery, outcome=outcome))
        except (MotorpoolError, sqlite3.Error) as error:
            _log.warning("a delivery could not be written down, and comes again: %s", type(error).__name__)

    def _record(self, db: sqlite3.Connection, *, delivery: Delivery, outcome: Outcome) -> None:
        now_ms = self._cell.now_ms()
        made = delivery.attempts + 1
        if outcome.is_yes:
            state = DeliveryState.DELIVERED
        else:
            state = DeliveryState.FAILED if made >= MAX_ATTEMPTS else DeliveryState.PENDING
        next_ms = now_ms + (wait_ms(made, delivery.delivery_no) if state is DeliveryState.PENDING else 0)
        store.record(db, delivery.delivery_no, state=state, outcome=outcome.what, next_ms=next_ms, now_ms=now_ms)
        if outcome.status == GONE:
            store.disable(db, delivery.webhook_id, now_ms)

    async def _prune(self) -> None:
        now_ms = self._cell.now_ms()
        if now_ms - self._pruned_ms >= PRUNE_MS:
            self._pruned_ms = now_ms
            await self._cell.write(lambda db: store.prune(db, now_ms))


def wait_ms(made: int, delivery_no: int) -> int:
    """How long to wait after so many attempts, spread by the number of the delivery."""
    spread = 1 + _SPREAD * (delivery_no * 2_654_435_761 % 1024 / 1024 - 0.5)
    return round(WAITS_S[made - 1] * 1000 * spread)
