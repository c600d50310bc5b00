"""Live requests: which vehicle answers, and on which one an answer goes on when its vehicle leaves.

A call is sent to one vehicle; tokens come back past the scheduler. When the vehicle breaks off, falls silent or loses
messages, the call goes to another one with all that was emitted so far, and the client notices nothing but a pause.
Decides only when to give up; placement is the scheduler's. Must not: log or keep bodies after the call.

Called by: ``server.loop``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, Protocol

import msgspec

from motorpool import wire
from motorpool.core import events as ev
from motorpool.core.attribution import Footprint
from motorpool.core.pricing import Price, Shares, extend, owner_pay, trim
from motorpool.core.scheduler import Scheduler
from motorpool.errors import CallerError, CapacityError, MotorpoolError, VehicleError
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens
from motorpool.types import MAX_CHECKPOINT_BYTES, ReturnReason, Usage

log = logging.getLogger(__name__)

FIRST_MESSAGE_TIMEOUT_S: Final = 120.0  # of a stream: it may wait for a slot
NEXT_MESSAGE_TIMEOUT_S: Final = 30.0
WHOLE_ANSWER_TIMEOUT_S: Final = 1800.0  # a plain request says nothing until its end; its vehicle's reports tell of it
PATIENCE_S: Final = 20.0  # how long a broken call waits for a vehicle to go on
RETRY_WAIT_S: Final = 0.25
MAX_ATTEMPTS: Final = 10
CUSTOMER_CLASS: Final = "live requests"  # what an owner is told of whom they are for
_array = msgspec.json.Decoder(list[msgspec.Raw])

Incoming = wire.Tokens | wire.Answered | wire.Broken


class Desk(Protocol):
    """What live requests need from the loop."""

    scheduler: Scheduler

    def now_ms(self) -> int:
        """Milliseconds since 1970 (UTC)."""

    def send(self, vehicle_id: str, data: bytes) -> None:
        """Send one message to a vehicle."""

    def post_soon(self, event: ev.SchedulerEvent) -> None:
        """Give the scheduler an event within a few milliseconds, together with others of its kind."""

    def price_of(self, model: str) -> Price:
        """What a model costs."""


class Call:
    """One live request on its way: where it runs now, and what has been emitted of it."""

    def __init__(self, request: LiveRequest) -> None:
        self.request = request
        self.incoming = Mailbox()
        self.patience_ends_s = 0.0
        self.vehicle_id: str | None = None
        self.incarnation = ""
        self.attempt = 0
        self.next_seq = 0
        self.tried: set[str] = set()
        self.text: list[str] = []
        self.tokens = 0
        self.token_ids: list[int] = []
        self.ids_complete = True  # some engines do not report them
        self.logprobs: list[bytes] = []
        self.checkpoint: bytes | None = None
        self.shares: Shares = []
        self.energy_uwh: dict[str, int] = {}  # what each vehicle drew for it
        self.is_measured = True
        self.paid = False

    @property
    def emitted(self) -> bool:
        """Whether the client has seen any text."""
        return bool(self.text)

    def note(self, tokens: wire.Tokens) -> None:
        """Remember what goes to the client, so that another vehicle can go on after it."""
        count = 0
        for delta in tokens.deltas:
            count += len(delta.token_ids) or bool(delta.text)
            if self.request.choices == 1:
                self.ids_complete = self.ids_complete and bool(delta.token_ids or not delta.text)
                self.text.append(delta.text)
                self.token_ids.extend(delta.token_ids)
                if delta.logprobs:
                    self.logprobs.append(delta.logprobs)
            elif delta.text:
                self.text.append("")
        self.tokens += count
        if self.vehicle_id is not None:
            self.shares = extend(self.shares, self.vehicle_id, count)

    def drew(self, energy_uwh: int, *, is_measured: bool) -> None:
        """The vehicle that has it now tells what it drew for it."""
        if energy_uwh and self.vehicle_id is not None:
            self.energy_uwh[self.vehicle_id] = self.energy_uwh.get(self.vehicle_id, 0) + energy_uwh
            self.is_measured = self.is_measured and is_measured

    def take(self, checkpoint: bytes | None) -> None:
        """A vehicle handed a plain request back with what it had generated; of a stream, what was emitted counts."""
        if checkpoint is None or self.vehicle_id is None or self.request.choices != 1 or self.emitted:
            return
        known = sum(count for _, count in self.shares)
        try:
            tokens = wire.decode_checkpoint(checkpoint).tokens
        except CallerError:
            log.warning("%s: a checkpoint of %s is unreadable", self.request.request_id, self.vehicle_id)
            return
        if tokens > known:
            self.checkpoint = checkpoint
            self.shares = extend(self.shares, self.vehicle_id, tokens - known)

    def resume_from(self) -> bytes | None:
        """The checkpoint for the next vehicle, or None to begin at the start."""
        if not self.request.stream or not self.emitted:
            return self.checkpoint
        checkpoint = wire.Checkpoint(
            text="".join(self.text),
            tokens=self.tokens,
            token_ids=self.token_ids if self.ids_complete else [],
            logprobs=self._logprobs(),
        )
        packed = wire.encode_checkpoint(checkpoint)
        if len(packed) > MAX_CHECKPOINT_BYTES:  # the client has the logprobs already
            packed = wire.encode_checkpoint(msgspec.structs.replace(checkpoint, logprobs=b""))
        return packed

    def _logprobs(self) -> bytes:
        try:
            entries = [entry for part in self.logprobs for entry in _array.decode(part)]
        except (msgspec.DecodeError, UnicodeDecodeError):
            log.warning("%s: the logprobs of a vehicle are unreadable", self.request.request_id)
            return b""
        return msgspec.json.encode(entries) if entries else b""


class Mailbox:
    """What vehicles said about one call, in order. An asyncio.Queue does the same for three times the price."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: deque[Incoming] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def waited_on(self) -> bool:
        """Whether somebody waits for the next message now."""
        return self._waiter is not None and not self._waiter.done()

    def put(self, message: Incoming) -> None:
        """Add one message and wake who waits."""
        self._items.append(message)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Incoming:
        """The oldest message, once there is one."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()

    def clear(self) -> None:
        """Forget what is there."""
        self._items.clear()


class LiveDesk:
    """All live requests of the cell."""

    def __init__(self, cell: Desk) -> None:
        self._cell = cell
        self._clock_s = asyncio.get_running_loop().time
        self._calls: dict[str, Call] = {}

    async def run(self, request: LiveRequest) -> AsyncIterator[LiveTokens | LiveAnswer]:
        """Run one request to its end; see ``Cell.live``."""
        call = self._begin(request)
        try:
            while True:
                message = await self._next(call)
                if isinstance(message, wire.Tokens):
                    call.note(message)
                    footprint = None
                    if message.usage is not None:  # paid first: the client may leave at the last word
                        footprint = self._footprint(call, message.usage)
                        self._pay(call, message.usage)
                        self._over(call)
                    yield LiveTokens(
                        deltas=message.deltas, usage=message.usage, engine=message.engine, footprint=footprint
                    )
                    if message.usage is not None:
                        return
                elif isinstance(message, wire.Answered):
                    yield self._answered(call, message)
                    return
                else:
                    failure = await self._go_on(call, message)
                    if failure is not None:
                        self._pay_for_what_was_delivered(call)
                        yield failure
                        return
        except (GeneratorExit, asyncio.CancelledError):
            self._pay_for_what_was_delivered(call)
            raise
        finally:
            self._end(call)

    async def answer(self, request: LiveRequest) -> LiveAnswer:
        """Run one plain request to its end; see ``Cell.answer``."""
        call = self._begin(request)
        try:
            while True:
                message = await self._next(call)
                if isinstance(message, wire.Answered):
                    return self._answered(call, message)
                if isinstance(message, wire.Broken):
                    failure = await self._go_on(call, message)
                    if failure is not None:
                        return failure
        finally:
            self._end(call)

    def _begin(self, request: LiveRequest) -> Call:
        call = Call(request)
        self._send(call, self._place(call))
        self._calls[request.request_id] = call
        return call

    def _answered(self, call: Call, message: wire.Answered) -> LiveAnswer:
        footprint = self._footprint(call, message.usage)
        if message.status < 400:
            self._pay(call, message.usage)
        else:
            self._pay_for_what_was_delivered(call)
        self._over(call)
        return LiveAnswer(
            status=message.status, body=message.body, footprint=footprint if message.status < 400 else None
        )

    def _footprint(self, call: Call, usage: Usage) -> Footprint:
        """What all vehicles drew for a call that ends now."""
        call.drew(usage.energy_uwh, is_measured=usage.energy_is_measured)
        drawn = call.energy_uwh
        return Footprint(
            energy_uwh=sum(drawn.values()),
            co2_ug=sum(self._cell.scheduler.co2_ug(vehicle_id, uwh) for vehicle_id, uwh in drawn.items()),
            is_measured=call.is_measured and bool(drawn),
        )

    def _end(self, call: Call) -> None:
        del self._calls[call.request.request_id]
        if call.vehicle_id is not None:
            self._cell.send(call.vehicle_id, wire.encode(wire.Close(request_id=call.request.request_id)))
            self._over(call)

    async def _next(self, call: Call) -> Incoming:
        """The next message of the current attempt; a stall or a gap counts as a break."""
        limit_s = NEXT_MESSAGE_TIMEOUT_S if call.next_seq else FIRST_MESSAGE_TIMEOUT_S
        if not call.request.stream:
            limit_s = WHOLE_ANSWER_TIMEOUT_S
        call.patience_ends_s = self._clock_s() + limit_s  # ``on_tick`` breaks it off then
        while True:
            message = await call.incoming.get()
            if isinstance(message, wire.Tokens):
                if message.seq < call.next_seq:
                    continue  # it came twice
                if message.seq > call.next_seq:
                    return self._broken(call)  # a message was lost with the link
                call.next_seq += 1
            return message

    def _broken(self, call: Call) -> wire.Broken:
        if call.vehicle_id is not None:
            self._cell.send(call.vehicle_id, wire.encode(wire.Close(request_id=call.request.request_id)))
        return wire.Broken(
            request_id=call.request.request_id, attempt=call.attempt, reason=ReturnReason.EXPIRED, checkpoint=None
        )

    async def _go_on(self, call: Call, broken: wire.Broken) -> LiveAnswer | None:
        """Find another vehicle for a broken call; the error for the client if there is none."""
        call.take(broken.checkpoint)
        call.drew(broken.energy_uwh, is_measured=broken.energy_is_measured)
        if call.vehicle_id is not None:
            call.tried.add(call.vehicle_id)
        self._over(call)
        if call.emitted and call.request.choices > 1:
            return _failure(VehicleError("the vehicle left, and an answer with several choices cannot be continued"))
        call.attempt += 1
        waited = 0.0
        while call.attempt < MAX_ATTEMPTS and waited <= PATIENCE_S:
            try:
                vehicle_id = self._place(call)
            except CapacityError:
                call.tried.clear()  # one that broke off may be back
                await asyncio.sleep(RETRY_WAIT_S)
                waited += RETRY_WAIT_S
                continue
            self._send(call, vehicle_id)
            return None
        return _failure(CapacityError("the vehicle left, and no other one could go on in time; try again"))

    def _place(self, call: Call) -> str:
        scheduler, now_ms = self._cell.scheduler, self._cell.now_ms()
        vehicle_id = scheduler.place_live(call.request.model, frozenset(call.tried), now_ms)
        if vehicle_id is not None:
            return vehicle_id
        if scheduler.serves(call.request.model):
            raise CapacityError("every vehicle that serves this model is busy", code="server_is_overloaded")
        raise CapacityError(
            f"no parked vehicle serves the model {call.request.model} at this moment; try again, or hand in a batch",
            retry_after_ms=5000,
        )

    def _send(self, call: Call, vehicle_id: str) -> None:
        request = call.request
        call.vehicle_id = vehicle_id
        call.incoming.clear()  # what earlier attempts still had to say is of no use
        call.incarnation = self._cell.scheduler.vehicles[vehicle_id].incarnation
        call.next_seq = 0
        self._cell.scheduler.live_began(vehicle_id)
        pay_input_micro, pay_output_micro = owner_pay(self._cell.price_of(request.model))
        opened = wire.Open(
            request_id=request.request_id,
            attempt=call.attempt,
            kind=request.kind,
            model=request.model,
            stream=request.stream,
            body=request.body,
            checkpoint=call.resume_from() if call.attempt else None,
            pay_input_micro=pay_input_micro,
            pay_output_micro=pay_output_micro,
            customer_class=CUSTOMER_CLASS,
        )
        self._cell.send(vehicle_id, wire.encode(opened))

    def _over(self, call: Call) -> None:
        if call.vehicle_id is not None:
            self._cell.scheduler.live_over(call.vehicle_id)
            call.vehicle_id = None

    def _pay_for_what_was_delivered(self, call: Call) -> None:
        """A stream ended in the middle, by the client or by an error: paid are the tokens that were delivered.

        How long its prompt was is not known before the end, so that is free.
        """
        if call.shares and not call.paid:
            self._pay(call, Usage(completion_tokens=call.tokens), finisher=call.shares[-1][0])

    def _pay(self, call: Call, usage: Usage, finisher: str | None = None) -> None:
        finisher = finisher or call.vehicle_id
        assert finisher is not None, "a call that is answered has a vehicle"
        call.paid = True
        carried = min(sum(count for _, count in call.shares), usage.completion_tokens)
        shares = extend(trim(call.shares, carried), finisher, usage.completion_tokens - carried)
        self._cell.post_soon(
            ev.LiveEnded(
                cause_id=call.request.request_id,
                request_id=call.request.request_id,
                account=call.request.account,
                price=self._cell.price_of(call.request.model),
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                finisher=finisher,
                shares=shares,
                energy_uwh=call.energy_uwh,
            )
        )

    # -- from the vehicle link -----------------------------------------------------------------------------------------

    def on_message(self, vehicle_id: str, data: bytes) -> None:
        """A message about a live request; those of vehicles and attempts that are over are ignored."""
        try:
            message = wire.decode(wire.UP_LIVE, data)
        except MotorpoolError as error:
            log.warning("%s sent a message that is refused: %s", vehicle_id, error.code)
            return
        call = self._calls.get(message.request_id)
        if call is not None and call.vehicle_id == vehicle_id and call.attempt == message.attempt:
            call.incoming.put(message)

    def on_tick(self) -> None:
        """Break off what runs on vehicles that are gone, and what has been silent for too long."""
        vehicles = self._cell.scheduler.vehicles
        now_s = self._clock_s()
        for call in self._calls.values():
            # A client that reads slowly is no reason: only who waits can have waited for too long.
            if call.vehicle_id is not None and call.incoming.waited_on and now_s > call.patience_ends_s:
                call.patience_ends_s = now_s + NEXT_MESSAGE_TIMEOUT_S
                call.incoming.put(self._broken(call))
                continue
            vehicle = vehicles.get(call.vehicle_id) if call.vehicle_id is not None else None
            if vehicle is None or vehicle.state is None:
                continue  # the state was rebuilt from the books, and its report is on its way
            if vehicle.offline or vehicle.incarnation != call.incarnation:
                call.incoming.put(self._broken(call))

    def on_struck_off(self, vehicle_id: str) -> None:
        """Break off what runs on a vehicle that was revoked."""
        for call in self._calls.values():
            if call.vehicle_id == vehicle_id:
                call.incoming.put(self._broken(call))

    def on_link_lost(self) -> None:
        """Messages may have been lost, the last ones too: everything goes on from what is here."""
        for call in self._calls.values():
            if call.vehicle_id is not None:
                call.incoming.put(self._broken(call))


def _failure(error: MotorpoolError) -> LiveAnswer:
    return LiveAnswer(status=error.status, body=msgspec.json.encode(error.envelope()))
