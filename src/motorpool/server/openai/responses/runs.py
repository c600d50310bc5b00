"""Runs responses to their ends: one task each, in the foreground for a client that waits, or in the background.

A background response waits for a vehicle for as long as it may take, is run again when a run breaks off, and goes on
after a restart: its request and all that was told of it are in the books before anybody hears of it. What is told once
stays told: the next run goes on after it, or, where a vehicle could not, one that says the same does. It is paid once,
in the transaction that keeps its end. Must not: choose vehicles, talk to clients, or log a body.

Called by: ``routes``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import traceback
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Raw

from motorpool.core import events as ev
from motorpool.core.pricing import Price
from motorpool.errors import CapacityError, ConflictError, MotorpoolError, VehicleError
from motorpool.server.cell import Carried, Cell, LiveAnswer, LiveRequest, LiveTokens
from motorpool.server.live_call import LastTokens, WholeAnswer
from motorpool.server.openai.exchange import new_request_id
from motorpool.server.openai.responses.bills import Maker
from motorpool.server.openai.responses.log import Log, Take
from motorpool.server.openai.responses.narration import Began
from motorpool.server.openai.responses.objects import (
    Facts,
    Item,
    Message,
    OutputItem,
    OutputText,
    ResponseObject,
    item_id,
    response_object,
)
from motorpool.server.openai.responses.translate import (
    Answer,
    Failure,
    answered,
    failed_answer,
    failure,
    read_answer,
    shorten,
    streamed,
)
from motorpool.store import responses as store
from motorpool.store.responses import KEPT_MS, ResponseRow
from motorpool.types import Kind

BACKGROUND_WINDOW_MS: Final = store.DAY_MS  # how long a background response waits for vehicles
RETRY_S: Final = 1.0  # before a background response is tried again, and twice as long each time
MAX_RETRY_S: Final = 30.0
MAX_FAILED_RUNS: Final = 5  # of a background response that ended in an error of a vehicle or an engine
MAX_SHORTENED: Final = 24  # times that a conversation is shortened: after them a thousandth of its text is left
FLUSH_S: Final = 0.1  # what background responses say is committed, and told, this often
REWRITE_S: Final = 1.0  # before a write that failed is tried again, and twice as long each time
MAX_REWRITE_S: Final = 60.0
_json: Final = msgspec.json.Encoder().encode
_entries: Final = msgspec.json.Decoder(list[Raw])
_log: Final = logging.getLogger(__name__)


class EndedError(ConflictError):
    """The end was kept, and paid, by a try before this one."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One response to be run. ``body`` is the chat completion; ``whole``: its answer comes in one piece.

    ``items`` are its own input, ``previous_id`` is what it goes on with.
    """

    account: str
    facts: Facts
    items: list[Item]
    body: bytes
    whole: bool
    streamed: bool
    created_ms: int
    number: int = 0  # of the row, in the background
    request_id: str = ""  # of the exchange that it came in; its first run has the same

    @property
    def size_bytes(self) -> int:
        """What it takes in memory while it runs, about."""
        return 2 * len(self.body)


def row_of(plan: Plan, status: str, *, result: bytes | None = None, ended_ms: int | None = None) -> ResponseRow:
    """The row of a response that is kept."""
    return ResponseRow(
        response_id=plan.facts.response_id,
        account=plan.account,
        previous_id=plan.facts.previous_response_id,
        status=status,
        background=plan.facts.background,
        created_ms=plan.created_ms,
        ended_ms=ended_ms,
        expires_ms=plan.created_ms + KEPT_MS,
        facts=_json(plan.facts),
        items=_json(plan.items),
        body=plan.body if result is None else None,
        result=result,
    )


class Run:
    """One response on its way."""

    def __init__(
        self, cell: Cell, plan: Plan, log: Log, slots: asyncio.Semaphore, serving: Callable[[str], bool]
    ) -> None:
        self.plan = plan
        self.log = log
        self.forgotten = False  # it was deleted: nothing is kept
        self._cell = cell
        self._slots = slots
        self._serving = serving
        self._stopping = False
        self._work: asyncio.Task[Answer | Failure] | None = None
        self._dirty = asyncio.Event()
        self._tries = 0
        self._maker = Maker(0)
        self._bill: ev.LiveEnded | None = None  # in the background
        self._ending: tuple[ResponseObject, Failure | None] | None = None

    def stop(self) -> None:
        """Cancel it: the vehicle stops, and the response ends as cancelled."""
        self._stopping = True
        if self._work is not None:
            self._work.cancel()

    def give_up(self) -> None:
        """It cannot even be ended: tell whoever listens."""
        failed = failure(MotorpoolError(f"internal error: quote {self.plan.facts.response_id}"))
        self.log.close(self._result(failed), failed)

    async def drive(self) -> None:
        """Run it until its end is told, and kept if it is to be kept."""
        self._work = asyncio.create_task(self._answer())
        keeping = asyncio.create_task(self._keep()) if self.plan.facts.background else None
        if self._stopping:
            self._work.cancel()
        try:
            await asyncio.wait({self._work})
            await self._settle(self._outcome(self._work))
            if keeping is not None:
                await keeping
        finally:
            tasks = [task for task in (self._work, keeping) if task is not None and not task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- the work

    async def _answer(self) -> Answer | Failure:
        if self.plan.facts.background:
            return await self._answer_some_day()
        self._say_began()
        return await self._answer_now()

    async def _answer_some_day(self) -> Answer | Failure:
        """Try until there is an answer, an error that no repetition mends, or the window is over."""
        broken, wait_s = 0, RETRY_S
        while True:
            if self._cell.now_ms() >= self.plan.created_ms + BACKGROUND_WINDOW_MS:
                return failure(
                    CapacityError("no vehicle could answer within the time for background responses",
                                  code="background_expired")
                )  # fmt: skip
            if self._serving(self.plan.facts.model):
                async with self._slots:
                    self._say_began()
                    found = await self._answer_now()
                if isinstance(found, Answer) or not found.may_pass:
                    return found
                if not found.is_busy:
                    broken += 1
                    if broken >= MAX_FAILED_RUNS:
                        return found
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, MAX_RETRY_S)
            else:
                await asyncio.sleep(RETRY_S)

    def _say_began(self) -> None:
        if not self.log.began:
            self.log.append(Began())
            self._tell()

    async def _answer_now(self) -> Answer | Failure:
        """One run; the conversation is shortened as often as it does not fit, if the customer allows that."""
        body: bytes | None = self.plan.body
        found: Answer | Failure | None = None
        for _ in range(MAX_SHORTENED):
            if body is None:
                break
            found = await self._run_once(body)
            if self.plan.facts.truncation != "auto" or isinstance(found, Answer) or not found.is_too_long:
                break
            body = shorten(body)
        assert found is not None, "the first body is there"
        return found

    async def _run_once(self, body: bytes) -> Answer | Failure:
        plan = self.plan
        carried = self._carried() if plan.facts.background else None
        goes_on = carried is not None and carried.tokens > 0
        take = Take(self.log, goes_on=goes_on)
        self._maker = Maker(self.log.tab.run + (not goes_on))
        live = LiveRequest(
            request_id=self._next_id(),
            response_id=plan.facts.response_id,
            account=plan.account,
            kind=Kind.CHAT,
            model=plan.facts.model,
            stream=not plan.whole,
            choices=1,
            body=body,
            created_s=plan.facts.created_s,
            carried=carried,
        )
        try:
            if plan.whole:
                found = self._take_whole(await self._cell.answer(live), take)
            else:
                found = await self._take_stream(live, take)
            if isinstance(found, Answer):
                take.finish()
        except MotorpoolError as error:
            return failure(error)
        self._tell()
        return found

    def _carried(self) -> Carried:
        """From where the next run goes on."""
        self._note()
        return self.log.tab.carried(self.log.text, _json(self.log.logprobs) if self.log.logprobs else b"")

    def _note(self) -> None:
        """Write down who made what was told last."""
        for made in self._maker.parts():
            self.log.append(made)

    def _next_id(self) -> str:
        """The first run is the request that the customer knows; others are requests of their own."""
        self._tries += 1
        return self.plan.request_id if self._tries == 1 and self.plan.request_id else new_request_id()

    async def _take_stream(self, live: LiveRequest, take: Take) -> Answer | Failure:
        found: Answer | Failure = failure(
            VehicleError("the stream broke off before its end", code="stream_interrupted")
        )
        reason = "stop" if live.carried is None else live.carried.finish_reason or "stop"
        items = self._cell.live(live)
        try:
            # To the very end, not just to the last token: what follows it is the cell's book-keeping.
            async for item in items:
                if isinstance(item, LiveAnswer):
                    found = self._take_whole(item, take)
                    continue
                reason = self._take_tokens(item, take) or reason
                self._tell()
                if item.usage is not None:
                    self._bill = item.bill if isinstance(item, LastTokens) else None
                    found = streamed(reason, item.usage, item)
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()  # this is what tells the vehicle to stop
        return found

    def _take_tokens(self, item: LiveTokens, take: Take) -> str | None:
        reason: str | None = None
        for delta in item.deltas:
            reason = delta.finish_reason or reason
            take.feed(delta.text, self._read_entries(delta.logprobs))
            if self.plan.facts.background:
                self._maker.add(item.vehicle_id, delta)
        return reason

    def _read_entries(self, data: bytes) -> list[Raw]:
        if not data:
            return []
        try:
            return _entries.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            _log.warning("%s: the logprobs of a vehicle are unreadable", self.plan.facts.response_id)
            return []

    def _take_whole(self, answer: LiveAnswer, take: Take) -> Answer | Failure:
        bill = answer.bill if isinstance(answer, WholeAnswer) else None
        if answer.status >= 400:
            if bill is not None:
                self.log.tab.energy_uwh = bill.energy_uwh
            return failed_answer(answer.status, answer.body)
        self._bill = bill
        found = read_answer(answer)
        take.feed(found.text, found.logprobs)
        return found

    def _tell(self) -> None:
        """What was appended may be told: at once, or in the background as soon as it is in the books."""
        if self.plan.facts.background:
            self._dirty.set()
        else:
            self.log.publish()

    # -- the end

    def _outcome(self, work: asyncio.Task[Answer | Failure]) -> Answer | Failure | None:
        """What came of it; None if it was cancelled."""
        if work.cancelled():
            return None
        error = work.exception()
        if error is None:
            return work.result()
        if isinstance(error, MotorpoolError):
            return failure(error)
        # The text of a foreign error may hold a customer's data; its type and place do not.
        frames = "".join(traceback.format_tb(error.__traceback__))
        _log.error("%s: unexpected %s\n%s", self.plan.facts.response_id, type(error).__name__, frames)
        return failure(MotorpoolError(f"internal error: quote {self.plan.facts.response_id}"))

    async def _settle(self, found: Answer | Failure | None) -> None:
        result = self._result(found)
        failed = found if isinstance(found, Failure) else None
        if failed is not None:
            _log.warning("%s: failed with %s", result.id, failed.error.code)
        if self.plan.facts.background:
            self._bill = self._due(found)
            self._ending = (result, failed)
            self._dirty.set()
            return
        shown = isinstance(found, Answer) or (self.plan.streamed and self.log.has_text)
        if shown and self.plan.facts.store and not self.forgotten:
            result = await self._insert(result)
        self.log.close(result, failed)

    def _due(self, found: Answer | Failure | None) -> ev.LiveEnded | None:
        """The bill of a background response: for its answer, or for as much of it as was told."""
        response_id = self.plan.facts.response_id
        if isinstance(found, Answer):
            if self._bill is None:
                return None
            # Each run has a name of its own; the response is paid once under its own.
            return msgspec.structs.replace(self._bill, cause_id=response_id, request_id=response_id)
        self._note()
        try:
            model = self._cell.catalogue.get(self.plan.facts.model)
        except MotorpoolError:  # it is not offered any more: nobody knows its price
            return None
        price = Price(input_micro=model.input_micro, output_micro=model.output_micro)
        return self.log.tab.bill(response_id, self.plan.account, price)

    def _result(self, found: Answer | Failure | None) -> ResponseObject:
        facts, log = self.plan.facts, self.log
        if not isinstance(found, Answer):
            partial: list[OutputItem] = []
            if log.text:
                part = OutputText(text=log.text, logprobs=log.logprobs)
                its_id = item_id("msg", facts.response_id, log.restarts)
                partial = [Message(id=its_id, status="incomplete", role="assistant", content=[part])]
            status = "cancelled" if found is None else "failed"
            return response_object(facts, status, output=partial, error=None if found is None else found.error)  # type: ignore[arg-type]
        now_s = self._cell.now_ms() // 1000
        return answered(facts, found, log.text, log.logprobs, first=log.restarts, completed_s=now_s)

    async def _insert(self, result: ResponseObject) -> ResponseObject:
        """Keep a foreground response; a client whose answer cannot be kept gets it all the same, and is told so."""
        row = row_of(self.plan, result.status, result=_json(result), ended_ms=self._cell.now_ms())
        try:
            await self._cell.write(lambda connection: store.insert_response(connection, row))
        except (MotorpoolError, sqlite3.Error) as error:
            _log.warning("%s could not be kept: %s", result.id, type(error).__name__)
            return msgspec.structs.replace(result, store=False)
        return result

    async def _keep(self) -> None:
        """Commit what a background response says, and its end; whatever fails is tried until it works."""
        wait_s = REWRITE_S
        while True:
            await self._dirty.wait()
            if self._ending is None:
                await asyncio.sleep(FLUSH_S)
            self._dirty.clear()
            try:
                ended = await self._commit()
            except (MotorpoolError, sqlite3.Error) as error:
                _log.warning("%s could not be written yet: %s", self.plan.facts.response_id, type(error).__name__)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, MAX_REWRITE_S)
                self._dirty.set()
                continue
            wait_s = REWRITE_S
            if ended:
                return

    async def _commit(self) -> bool:
        """Write what is new, then let it be told; whether that was the end, which is paid with it."""
        self._note()
        log, number, ending = self.log, self.plan.number, self._ending
        first, count = log.published, len(log.pieces)
        pieces = _json(log.pieces[first:count]) if count > first else None
        result = None if ending is None else _json(ending[0])
        now_ms = self._cell.now_ms()

        def change(connection: sqlite3.Connection) -> None:
            if pieces is not None:
                store.append_pieces(connection, number, first, pieces)
            if ending is None or result is None:
                return
            ended = store.finish_response(connection, number, ending[0].status, result, now_ms)
            if not ended and store.is_there(connection, number):
                raise EndedError("a try before this one was committed after all")

        if pieces is not None or ending is not None:
            with contextlib.suppress(EndedError):
                await self._cell.write(change, bill=None if ending is None else self._bill)
        if ending is None:
            log.publish(count)
        else:
            log.close(*ending)
        return ending is not None
