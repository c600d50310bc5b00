"""Live requests: which vehicle answers, and on which one an answer goes on when its vehicle leaves.

A call is sent to one vehicle; tokens come back past the scheduler. When the vehicle breaks off, falls silent or loses
messages, the call goes to another one with all that was emitted so far, and the client notices nothing but a pause; of
a departure that announces itself it does not notice even that, as the next vehicle has read everything before. A first
token that is late is asked for on a second vehicle as well; a stream that pauses goes on there as well, and of the two
the first to speak is kept. All this happens when messages arrive and alarms ring, so that a client that reads slowly
costs no vehicle anything. Decides nothing of its own: time limits, hedges and the order of those who wait are
``core.streams``', placement is the scheduler's. Must not: keep bodies after the call. Called by: ``server.loop``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Final, Protocol, TypeVar

import msgspec

from motorpool import wire
from motorpool.core import events as ev
from motorpool.core.attribution import Footprint
from motorpool.core.pricing import Price, owner_pay
from motorpool.core.scheduler import Scheduler
from motorpool.core.streams import (
    DOUBT_MS,
    Alarms,
    HedgeBudget,
    Paces,
    Tier,
    has_caught_up,
    is_leaving,
    is_own_fault,
    is_safer,
)
from motorpool.errors import CapacityError, MotorpoolError
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens
from motorpool.server.fallback import PaidEndpoint
from motorpool.server.live_call import Arrived, Call, LastTokens, Leg, WholeAnswer
from motorpool.server.live_places import Places
from motorpool.server.live_waiting import Waiting
from motorpool.types import Usage, VehicleState

log = logging.getLogger(__name__)

CUSTOMER_CLASS: Final = "live requests"  # what an owner is told of whom they are for
PLAIN_TOKEN_MS: Final = 500  # a plain answer says nothing until its end: what each token may take while unmeasured
READ_TIMES: Final = 2  # of the deadline between tokens: what one that has read ahead may take for its first one
LATE_MS: Final = 15  # an alarm that rings so late says that we were busy, not that a vehicle is silent
EXCUSE_MS: Final = 30
UNPREPARED_MS: Final = 5_000  # after nobody safer was found, the next look
WATCHED_MS: Final = 1_000  # a vehicle that may not work has so long to say what became of a request
_WORKS: Final = frozenset({VehicleState.READY, VehicleState.WORKING})
_Item = TypeVar("_Item", LiveAnswer, LiveTokens | LiveAnswer)


class Desk(Protocol):
    """What live requests need from the loop."""

    scheduler: Scheduler

    def now_ms(self) -> int:
        """Milliseconds since 1970 (UTC)."""

    def vehicle_state(self, vehicle_id: str) -> wire.State | None:
        """The last report of a vehicle; None while it is silent."""

    def send(self, vehicle_id: str, data: bytes) -> None:
        """Send one message to a vehicle."""

    def post_soon(self, event: ev.SchedulerEvent) -> None:
        """Give the scheduler an event within a few milliseconds, together with others of its kind."""

    def price_of(self, model: str) -> Price:
        """What a model costs."""


class Counts(msgspec.Struct, kw_only=True):
    """What has happened since the start; holds nothing private."""

    requests: int = 0
    hedged: int = 0
    stalled: int = 0  # vehicles that fell silent
    slow: int = 0  # those of them that reported later, and so were only slow
    gone: int = 0  # vehicles whose connection ended
    departed: int = 0
    failed: int = 0  # engines
    continued: int = 0  # on another vehicle
    handed_over: int = 0  # of these, before the break
    read_again_tokens: int = 0  # of answers, by the vehicles that went on with them
    turned_away: int = 0
    paid_for: int = 0  # went to the fallback


class _Doubt(msgspec.Struct):
    """A vehicle that fell silent: if it reports after all, it was slow, and that is measured."""

    vehicle_id: str
    since_ms: int
    pace: str
    model: str
    first: tuple[int, int] | None  # bytes of the prompt and waves, if it was a first token that did not come
    took_ms: float
    hedged: bool  # another one went on before its deadline


class LiveDesk:
    """All live requests of the cell."""

    def __init__(self, cell: Desk) -> None:
        self._cell = cell
        self._clock_s = asyncio.get_running_loop().time
        self._calls: dict[str, Call] = {}
        self._legs: dict[int, Leg] = {}  # by their alarms
        self._by_vehicle: dict[str, dict[int, Leg]] = {}
        self._last_key = 0
        self._alarms = Alarms()
        self._timer: asyncio.Handle | None = None
        self._timer_ms = 0  # when it rings: a handle for a time that has passed does not say
        self._budget = HedgeBudget()
        self._doubts: list[_Doubt] = []
        self._gone: dict[str, int] = {}  # vehicles without a connection, and since when
        self.paces = Paces()
        self.places = Places(cell, self._clock_ms)
        self.waiting = Waiting(self.places, self._clock_ms)
        self.fallback: PaidEndpoint | None = None
        self.counts = Counts()

    def _clock_ms(self) -> int:
        return int(self._clock_s() * 1000)

    # -- for the API ---------------------------------------------------------------------------------------------------

    async def run(self, request: LiveRequest) -> AsyncIterator[LiveTokens | LiveAnswer]:
        """Run one request to its end; see ``Cell.live``."""
        call = Call(request)
        try:
            try:
                await self._begin(call)
            except CapacityError:
                if not self._may_pay(call):
                    raise
                call.ended = True
            while not (call.ended and call.incoming.empty):
                arrived = await call.incoming.get()
                message = arrived.message
                if isinstance(message, wire.Tokens):
                    call.give(arrived.vehicle_id, message.deltas)
                    if message.usage is None:
                        yield LiveTokens(
                            deltas=message.deltas, usage=None, engine=message.engine, vehicle_id=arrived.vehicle_id
                        )
                        continue
                    # Paid first: the client may leave at the last word.
                    yield self._last(call, arrived.vehicle_id, message, message.usage)
                    return
                if isinstance(message, wire.Answered):
                    yield self._answered(call, arrived.vehicle_id, message)
                    return
                if call.delivered or not self._may_pay(call):
                    yield _billed(message, self._pay_for_what_was_delivered(call))
                    return
            assert self.fallback is not None
            self.counts.paid_for += 1
            bills: list[ev.SchedulerEvent] = []
            async with aclosing(self.fallback.stream(request, self._payer(request, bills))) as paid:
                async for item in paid:
                    yield _billed(item, *bills)
        except (GeneratorExit, asyncio.CancelledError):
            self._pay_for_what_was_delivered(call)
            raise
        finally:
            self._end(call)

    async def answer(self, request: LiveRequest) -> LiveAnswer:
        """Run one plain request to its end; see ``Cell.answer``."""
        call = Call(request)
        try:
            try:
                await self._begin(call)
            except CapacityError:
                if not self._may_pay(call):
                    raise
            else:
                arrived = await call.incoming.get()
                assert not isinstance(arrived.message, wire.Tokens)
                if isinstance(arrived.message, wire.Answered):
                    return self._answered(call, arrived.vehicle_id, arrived.message)
                if not self._may_pay(call):
                    return arrived.message
            assert self.fallback is not None
            self.counts.paid_for += 1
            bills: list[ev.SchedulerEvent] = []
            return _billed(await self.fallback.answer(request, self._payer(request, bills)), *bills)
        finally:
            self._end(call)

    def _may_pay(self, call: Call) -> bool:
        """Whether the operator's paid endpoint may answer; what is cheap and may wait is not worth its price."""
        if self.fallback is None or call.tier is Tier.FLEX or call.transcript.began:
            return False
        return self.fallback.serves(call.request.model)

    def _payer(self, request: LiveRequest, bills: list[ev.SchedulerEvent]) -> Callable[[ev.SchedulerEvent], None]:
        """Who takes a bill: the books, or the caller, if that one keeps the answer there."""
        return self._cell.post_soon if request.carried is None else bills.append

    async def _begin(self, call: Call) -> None:
        """Send it to a vehicle, when there is one; raise CapacityError if there is none in time."""
        self.counts.requests += 1
        self._budget.earn()
        model = call.request.model
        self._calls[call.request.request_id] = call
        if not self.waiting.anybody_for(model):
            vehicle_id = self.places.choose(model, call.tier, call.tried, call.beginnings)
            if vehicle_id is not None:
                self._open(call, vehicle_id)
                return
        if not self._cell.scheduler.serves(model):
            self.counts.turned_away += 1
            raise CapacityError(
                f"no parked vehicle serves the model {model} at this moment; try again, or hand in a batch",
                retry_after_ms=5000,
            )
        placed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def found(vehicle_id: str) -> None:
            if not placed.done():
                self._open(call, vehicle_id)
                placed.set_result(None)

        def failed(error: CapacityError) -> None:
            self.counts.turned_away += 1
            if not placed.done():
                placed.set_exception(error)

        self.waiting.enter(call, call.tier, found, failed)
        self.waiting.look(model)
        await placed

    def _end(self, call: Call) -> None:
        self._calls.pop(call.request.request_id, None)
        self.waiting.leave(call)
        call.ended = True
        for leg in call.legs():
            self._release(leg, close=True)
        call.leg = call.rival = call.successor = None

    # -- money ---------------------------------------------------------------------------------------------------------

    def _last(self, call: Call, vehicle_id: str, message: wire.Tokens, usage: Usage) -> LastTokens:
        footprint = self._footprint(call, vehicle_id, usage)
        return LastTokens(
            deltas=message.deltas,
            usage=usage,
            engine=message.engine,
            footprint=footprint,
            vehicle_id=vehicle_id,
            about=call.about,
            bill=self._pay(call, usage, vehicle_id),
        )

    def _answered(self, call: Call, vehicle_id: str, message: wire.Answered) -> LiveAnswer:
        footprint = self._footprint(call, vehicle_id, message.usage)
        if message.status >= 400:
            told = LiveAnswer(status=message.status, body=message.body)
            return _billed(told, self._pay_for_what_was_delivered(call))
        bill = self._pay(call, message.usage, vehicle_id)
        return WholeAnswer(status=message.status, body=message.body, footprint=footprint, about=call.about, bill=bill)

    def _footprint(self, call: Call, vehicle_id: str, usage: Usage) -> Footprint:
        """What all vehicles drew for a call that ends now."""
        call.drew(vehicle_id, usage.energy_uwh, is_measured=usage.energy_is_measured)
        drawn = call.energy_uwh
        return Footprint(
            energy_uwh=sum(drawn.values()),
            co2_ug=sum(self._cell.scheduler.co2_ug(each, uwh) for each, uwh in drawn.items()),
            is_measured=call.is_measured and bool(drawn),
        )

    def _pay_for_what_was_delivered(self, call: Call) -> ev.LiveEnded | None:
        """A stream ended in the middle, by the client or by an error: paid are the tokens that were delivered.

        How long its prompt was is not known before the end, so that is free.
        """
        if call.delivered and call.shares and not call.paid:
            return self._pay(call, Usage(completion_tokens=call.delivered), call.shares[-1][0])
        return None

    def _pay(self, call: Call, usage: Usage, finisher: str) -> ev.LiveEnded | None:
        """Give the books the bill; the bill, if it is the caller's to pay."""
        call.paid = True
        bill = call.bill(usage, finisher, self._cell.price_of(call.request.model))
        if call.request.carried is not None:
            return bill
        self._cell.post_soon(bill)
        return None

    # -- legs ----------------------------------------------------------------------------------------------------------

    def _open(self, call: Call, vehicle_id: str) -> None:
        """Send a call to a vehicle, to begin or to go on there."""
        if call.attempts or call.transcript.began:
            self._goes_on(call)
        call.leg = self._send(call, vehicle_id)

    def _goes_on(self, call: Call) -> None:
        if call.transcript.began or call.handed_back is not None:
            call.continued += 1
            self.counts.continued += 1
            self.counts.read_again_tokens += call.transcript.tokens

    def _send(self, call: Call, vehicle_id: str, *, prepare: bool = False, in_place_of: Leg | None = None) -> Leg:
        """Open the next attempt; one that follows another on the same vehicle takes its place."""
        request = call.request
        self._last_key += 1
        leg = Leg(call, vehicle_id, key=self._last_key, attempt=call.attempts, now_ms=self._clock_s() * 1000)
        call.attempts += 1
        if in_place_of is not None:
            self._forget(in_place_of)
        else:
            self.places.took(vehicle_id, call.beginnings)
        state = self._cell.vehicle_state(vehicle_id)
        self._legs[leg.key] = leg
        self._by_vehicle.setdefault(vehicle_id, {})[leg.key] = leg
        vehicle = self._cell.scheduler.vehicles.get(vehicle_id)
        leg.incarnation = "" if vehicle is None else vehicle.incarnation
        leg.pace = "" if state is None else f"{state.engine}/{state.tier}"
        leg.waves = self.places.waves(vehicle_id)
        leg.prompt_bytes = call.prompt_bytes
        leg.measured = not prepare and in_place_of is None
        leg.read_tokens = call.transcript.tokens
        leg.readings = 1 if in_place_of is None else in_place_of.readings + 1
        pay_input_micro, pay_output_micro = owner_pay(self._cell.price_of(request.model))
        opened = wire.Open(
            request_id=request.request_id,
            attempt=leg.attempt,
            kind=request.kind,
            model=request.model,
            stream=request.stream,
            body=request.body,
            checkpoint=call.checkpoint(),
            pay_input_micro=pay_input_micro,
            pay_output_micro=pay_output_micro,
            customer_class=CUSTOMER_CLASS,
            prepare=prepare,
        )
        self._cell.send(vehicle_id, wire.encode(opened))
        self._await_first(leg, hedges=not prepare)
        return leg

    def _await_first(self, leg: Leg, *, hedges: bool) -> None:
        """Set the alarm for the first token: when to ask a second vehicle, if that may be, and when to give up."""
        pace, more_ms = self._first_pace(leg)
        model = leg.call.request.model
        about = (model, pace, leg.prompt_bytes, leg.waves, more_ms)
        now_ms = self._clock_ms()
        wait_ms = self.paces.first_deadline_ms(*about)
        if leg.readings > 1:  # it has read nearly all of it before, so this is but one more gap
            wait_ms = min(wait_ms, READ_TIMES * self.paces.gap_deadline_ms(model, leg.pace))
        wait_ms = leg.call.tries.patience(wait_ms)
        leg.due_ms = now_ms + wait_ms
        hedge_ms = self.paces.hedge_after_ms(*about)
        self._alarm(leg, now_ms + hedge_ms if hedges and hedge_ms < wait_ms else leg.due_ms)

    def _first_pace(self, leg: Leg) -> tuple[str, int]:
        """Under which name a first token is measured, and how much longer than one a plain answer may take."""
        request, limit = leg.call.request, leg.call.limit_tokens
        if request.stream:
            return leg.pace, 0
        return f"{leg.pace}/plain/{request.kind.value}/{limit.bit_length()}", limit * PLAIN_TOKEN_MS

    def _forget(self, leg: Leg) -> None:
        self._legs.pop(leg.key, None)
        self._alarms.drop(leg.key)
        legs = self._by_vehicle.get(leg.vehicle_id)
        if legs is not None:
            legs.pop(leg.key, None)
            if not legs:
                del self._by_vehicle[leg.vehicle_id]

    def _release(self, leg: Leg, *, close: bool) -> None:
        """It ended, there or for us; ``close`` tells the vehicle that nobody waits any more."""
        self._forget(leg)
        if close:
            self._cell.send(leg.vehicle_id, wire.encode(wire.Close(request_id=leg.call.request.request_id)))
        self.places.left(leg.vehicle_id)
        self.waiting.look(leg.call.request.model)

    # -- when one breaks off -------------------------------------------------------------------------------------------

    def _broke(self, leg: Leg, *, close: bool, checkpoint: bytes | None = None, blamed: bool = True) -> None:
        """A leg is over before its end: its rival or its successor goes on, or else another vehicle."""
        call = leg.call
        if blamed:
            call.tried.add(leg.vehicle_id)
        self._release(leg, close=close)
        if leg is call.rival:
            call.rival = None
            return
        if leg is call.successor:
            call.successor, call.switching = None, False
            call.unprepared_until_ms = self._clock_ms() + UNPREPARED_MS
            return
        if leg is not call.leg:
            return
        call.leg = None
        call.take(leg, checkpoint)
        if call.rival is not None:
            call.leg, call.rival = call.rival, None
            if leg.spoke:
                self._goes_on(call)
        elif call.successor is not None:
            self._take_over(call, call.successor)
        elif call.tries.used_up:
            self._give_up(call)
        else:
            vehicle_id = self.places.choose(call.request.model, Tier.GOING_ON, call.tried, call.beginnings)
            if vehicle_id is not None:
                self._open(call, vehicle_id)
                return
            call.tried.clear()  # one that broke off may be back
            self.waiting.enter(
                call, Tier.GOING_ON, lambda found: self._open(call, found), lambda _: self._give_up(call)
            )

    def _give_up(self, call: Call) -> None:
        error = CapacityError("the vehicle left, and no other one could go on in time; try again")
        self._deliver(call, "", LiveAnswer(status=error.status, body=msgspec.json.encode(error.envelope())))

    def _deliver(self, call: Call, vehicle_id: str, message: wire.Answered | LiveAnswer) -> None:
        """The last word of a call."""
        if not call.ended:
            call.ended = True
            call.incoming.put(Arrived(vehicle_id, message))

    def _departed(self, leg: Leg, *, close: bool = True, blamed: bool = True) -> None:
        self._left_in_a_race(leg)
        if leg is leg.call.leg:
            self.counts.departed += 1
            leg.call.tries.departed += 1
        self._broke(leg, close=close, blamed=blamed)

    def _left_in_a_race(self, leg: Leg) -> None:
        """A vehicle leaves that was doubted: rightly so, and the other one is no hedge."""
        if leg is leg.call.leg and leg.spoke and leg.call.rival is not None:
            self._budget.give_back()

    # -- from the vehicle link -----------------------------------------------------------------------------------------

    def on_message(self, vehicle_id: str, data: bytes) -> None:
        """A message about a live request; those of vehicles and attempts that are over are ignored."""
        try:
            message = wire.decode(wire.UP_LIVE, data)
        except MotorpoolError as error:
            log.warning("%s sent a message that is refused: %s", vehicle_id, error.code)
            return
        call = self._calls.get(message.request_id)
        leg = None if call is None else call.find(vehicle_id, message.attempt)
        if leg is None:
            return
        if isinstance(message, wire.Tokens):
            self._on_tokens(leg, message)
        elif isinstance(message, wire.Answered):
            self._on_answered(leg, message)
        else:
            leg.call.drew(vehicle_id, message.energy_uwh, is_measured=message.energy_is_measured)
            self._left_in_a_race(leg)
            if leg is leg.call.leg:
                self.counts.departed += 1
                leg.call.tries.departed += 1
            self._broke(leg, close=False, checkpoint=message.checkpoint)

    def _on_tokens(self, leg: Leg, message: wire.Tokens) -> None:
        call = leg.call
        if message.seq < leg.next_seq:
            return  # it came twice
        if message.seq > leg.next_seq:
            self._departed(leg)  # a message was lost with the link
            return
        leg.next_seq += 1
        if leg is call.successor:
            if not message.deltas and message.usage is None:
                self._has_read(call, leg)
            return
        now_ms = self._clock_s() * 1000
        is_last = message.usage is not None
        if leg.spoke:
            self.paces.gap(call.request.model, leg.pace, now_ms - leg.heard_ms)
        elif is_last or any(_speaks(delta) for delta in message.deltas):
            self._spoke(leg, now_ms)
        else:
            return
        leg.heard_ms, leg.excused = now_ms, False
        if call.rival is not None:
            self._drop_rival(call)
        deltas = call.transcript.note(message.deltas)
        if deltas is not message.deltas:
            message = msgspec.structs.replace(message, deltas=deltas)
        if is_last:
            call.ended, call.leg = True, None
            self._release(leg, close=False)
        call.incoming.put(Arrived(leg.vehicle_id, message))
        if is_last:
            self._drop_successor(call)
            return
        self._await_next(leg, int(now_ms))
        if call.switching and call.successor is not None:
            self._hand_over(call, leg, call.successor)

    def _await_next(self, leg: Leg, now_ms: int) -> None:
        """Set the alarm for the next token: when to doubt that it comes, and when to give up."""
        about = (leg.call.request.model, leg.pace)
        patience = leg.call.tries.patience
        leg.due_ms = now_ms + patience(self.paces.gap_deadline_ms(*about))
        self._alarm(leg, now_ms + patience(self.paces.doubt_after_ms(*about)))

    def _spoke(self, leg: Leg, now_ms: float) -> None:
        """A leg gives its first content token: the first to do so is kept."""
        call = leg.call
        model = call.request.model
        if leg.measured:
            pace, _ = self._first_pace(leg)
            self.paces.first(model, pace, leg.prompt_bytes, leg.waves, now_ms - leg.sent_ms)
        leg.spoke = True
        self.places.suspects.spoke(leg.vehicle_id)
        loser = call.leg if leg is call.rival else call.rival
        call.leg, call.rival = leg, None
        if loser is None or loser is leg:
            return
        if loser.spoke:  # it fell silent in the middle
            self._fell_silent(loser, int(now_ms), hedged=True)
            self._goes_on(call)
        elif loser.sent_ms < leg.sent_ms:  # it was late, and how late it would have been is not known
            pace, _ = self._first_pace(loser)
            self.paces.first(model, pace, loser.prompt_bytes, loser.waves, now_ms - loser.sent_ms)
            self.places.suspects.stalled(loser.vehicle_id, int(now_ms))
        self._release(loser, close=True)

    def _on_answered(self, leg: Leg, message: wire.Answered) -> None:
        call = leg.call
        if leg is call.successor:
            self._broke(leg, close=False)
            return
        if message.status >= 400 and not is_own_fault(message.status) and self._elsewhere(leg, message):
            return
        if message.status < 400 and not leg.spoke:
            self._spoke(leg, self._clock_s() * 1000)
        for each in call.legs():
            self._release(each, close=each is not leg)
        call.leg = call.rival = call.successor = None
        self._deliver(call, leg.vehicle_id, message)

    def _elsewhere(self, leg: Leg, message: wire.Answered) -> bool:
        """The vehicle failed, not the request: try others, a few; False if this is what the client has to be told."""
        call = leg.call
        self.counts.failed += 1
        call.tries.failed += 1
        call.drew(leg.vehicle_id, message.usage.energy_uwh, is_measured=message.usage.energy_is_measured)
        if call.rival is None and call.successor is None:
            others = call.tried | {leg.vehicle_id}
            if call.tries.used_up or self.places.choose(call.request.model, Tier.GOING_ON, others) is None:
                return False
        self._broke(leg, close=False)
        return True

    # -- alarms --------------------------------------------------------------------------------------------------------

    def _alarm(self, leg: Leg, due_ms: int) -> None:
        if self._alarms.set(leg.key, due_ms):
            self._arm()

    def _arm(self) -> None:
        next_ms = self._alarms.next_ms()
        if next_ms is None:
            return
        if self._timer is not None:
            if self._timer_ms <= next_ms:
                return
            self._timer.cancel()
        self._timer_ms = next_ms
        self._timer = asyncio.get_running_loop().call_at(next_ms / 1000, self._ring, next_ms)

    def _ring(self, due_ms: int) -> None:
        self._timer = None
        now_ms = self._clock_ms()
        late = now_ms - due_ms > LATE_MS
        for key in self._alarms.due(now_ms):
            leg = self._legs.get(key)
            if leg is None:
                continue
            if late and not leg.excused:
                # What vehicles said meanwhile may still be on its way to us: they get a little more time, once.
                leg.excused = True
                self._alarms.set(key, now_ms + EXCUSE_MS)
            else:
                self._overdue(leg, now_ms)
        self._arm()

    def _overdue(self, leg: Leg, now_ms: int) -> None:
        """Nothing was heard of a leg in time."""
        call = leg.call
        if now_ms < leg.due_ms:
            self._alarm(leg, leg.due_ms)
            if leg is not call.leg or call.rival is not None:
                return
            if leg.spoke and call.switching and call.successor is not None:
                self._hand_over(call, leg, call.successor)  # which is ready: there is nothing to wait for
            elif call.successor is None:
                self._hedge(call, leg)
            return
        if leg is call.leg:
            call.tries.stalled += 1
        self._fell_silent(leg, now_ms, hedged=leg is call.leg and leg.spoke and call.rival is not None)
        self._broke(leg, close=True)

    def _hedge(self, call: Call, leg: Leg) -> None:
        """Ask a second vehicle as well, if there is one and the budget allows it."""
        others = call.tried | {leg.vehicle_id}
        tier = Tier.GOING_ON if leg.spoke else call.tier
        vehicle_id = self.places.choose(call.request.model, tier, others, call.beginnings)
        if vehicle_id is None or not self._budget.spend():
            return
        if not leg.spoke:  # whether a stream that goes on was asked for twice will be known when one of the two speaks
            self._was_hedged(call)
        call.rival = self._send(call, vehicle_id)

    def _was_hedged(self, call: Call) -> None:
        self.counts.hedged += 1
        call.hedged = True

    def _drop_rival(self, call: Call) -> None:
        """The vehicle of a stream has spoken before the one that was to go on with it."""
        assert call.rival is not None
        self._was_hedged(call)
        rival, call.rival = call.rival, None
        self._release(rival, close=True)

    def _fell_silent(self, leg: Leg, now_ms: int, *, hedged: bool) -> None:
        """A leg is given up without a word; ``hedged``: another one goes on since before its deadline."""
        call = leg.call
        if leg is call.leg or hedged:
            self.counts.stalled += 1
        self.places.suspects.stalled(leg.vehicle_id, now_ms)
        if leg is call.successor:
            return
        pace = leg.pace if leg.spoke else self._first_pace(leg)[0]
        self._doubts.append(
            _Doubt(
                vehicle_id=leg.vehicle_id,
                since_ms=self._cell.now_ms(),
                pace=pace,
                model=leg.call.request.model,
                first=None if leg.spoke else (leg.prompt_bytes, leg.waves),
                took_ms=now_ms - (leg.heard_ms if leg.spoke else leg.sent_ms),
                hedged=hedged,
            )
        )

    def _settle_doubts(self) -> None:
        """Who was given up as silent and reports soon after was slow: so deadlines follow a fleet under load.

        A vehicle that lives hears that nobody waits any more, and reports that it is free.
        """
        kept: list[_Doubt] = []
        now_ms = self._cell.now_ms()
        for doubt in self._doubts:
            vehicle = self._cell.scheduler.vehicles.get(doubt.vehicle_id)
            seen_ms = 0 if vehicle is None else vehicle.seen_ms
            if doubt.since_ms < seen_ms <= doubt.since_ms + DOUBT_MS:
                self.counts.slow += 1
                if doubt.first is None:
                    self.paces.gap(doubt.model, doubt.pace, doubt.took_ms)
                else:
                    self.paces.first(doubt.model, doubt.pace, *doubt.first, doubt.took_ms)
            elif now_ms <= doubt.since_ms + DOUBT_MS:
                kept.append(doubt)
            elif doubt.hedged:
                self._budget.give_back()  # it was gone
        self._doubts = kept

    # -- handing over --------------------------------------------------------------------------------------------------

    def _prepare(self, call: Call, leg: Leg, now_ms: int) -> None:
        """The vehicle of a stream will leave: have a safer one read all that there is."""
        if call.successor is not None or call.rival is not None or not leg.spoke or not call.request.stream:
            return
        if now_ms < call.unprepared_until_ms:
            return
        vehicle_id = self.places.choose(call.request.model, Tier.GOING_ON, call.tried | {leg.vehicle_id})
        risks = (None, None) if vehicle_id is None else (self.places.risk(vehicle_id), self.places.risk(leg.vehicle_id))
        if vehicle_id is None or not is_safer(*risks):
            call.unprepared_until_ms = now_ms + UNPREPARED_MS
            return
        call.successor = self._send(call, vehicle_id, prepare=True)
        self.counts.read_again_tokens += call.transcript.tokens

    def _has_read(self, call: Call, successor: Leg) -> None:
        if has_caught_up(successor.read_tokens, call.transcript.tokens, successor.readings):
            call.switching = True
            self._alarm(successor, self._clock_ms() + UNPREPARED_MS)
        else:
            call.successor = self._send(call, successor.vehicle_id, prepare=True, in_place_of=successor)

    def _hand_over(self, call: Call, leg: Leg, successor: Leg) -> None:
        """The present vehicle has just given a token: the next one comes from its successor."""
        call.tried.add(leg.vehicle_id)
        call.leg = None
        self._take_over(call, successor)
        self.counts.handed_over += 1
        self._release(leg, close=True)

    def _take_over(self, call: Call, successor: Leg) -> None:
        call.continued += 1
        self.counts.continued += 1
        self.counts.read_again_tokens += call.transcript.tokens - successor.read_tokens
        call.successor, call.switching = None, False
        call.leg = self._send(call, successor.vehicle_id, in_place_of=successor)

    def _drop_successor(self, call: Call) -> None:
        if call.successor is not None:
            self._release(call.successor, close=True)
            call.successor, call.switching = None, False

    # -- what vehicles report ------------------------------------------------------------------------------------------

    def on_tick(self) -> None:
        """Break off what runs on vehicles that are gone; have others ready for those that will go."""
        self._settle_doubts()
        self._avoid_the_gone()
        for vehicle_id in list(self._by_vehicle):
            self.on_report(vehicle_id)
        self.waiting.look()

    def on_report(self, vehicle_id: str) -> None:
        """A vehicle has reported, or has not for too long."""
        legs = self._by_vehicle.get(vehicle_id)
        vehicle = self._cell.scheduler.vehicles.get(vehicle_id)
        if not legs or vehicle is None or vehicle.state is None:
            return  # nothing runs there, or the state was rebuilt from the books, and its report is on its way
        now_ms = self._clock_ms()
        offline, incarnation, state = vehicle.offline, vehicle.incarnation, vehicle.state
        for leg in list(legs.values()):
            # The word that it broke off goes before the report that says why, unless it was lost.
            silent = state not in _WORKS and now_ms - leg.sent_ms > WATCHED_MS and now_ms - leg.heard_ms > WATCHED_MS
            if offline or incarnation != leg.incarnation or silent:
                self._departed(leg)
        if is_leaving(state, self.places.risk(vehicle_id)):
            for leg in list(self._by_vehicle.get(vehicle_id, {}).values()):
                if leg is leg.call.leg:
                    self._prepare(leg.call, leg, now_ms)

    def on_gone(self, vehicle_id: str) -> None:
        """The connection of a vehicle has ended: nothing more will come of it, whatever it was doing."""
        self.counts.gone += 1
        self._gone[vehicle_id] = self._cell.now_ms()
        self.places.suspects.stalled(vehicle_id, self._clock_ms())
        for leg in list(self._by_vehicle.get(vehicle_id, {}).values()):
            self._departed(leg)

    def _avoid_the_gone(self) -> None:
        """Who has no connection gets nothing until it reports again; one that is offline gets nothing anyway."""
        for vehicle_id, since_ms in list(self._gone.items()):
            vehicle = self._cell.scheduler.vehicles.get(vehicle_id)
            if vehicle is None or vehicle.offline:
                del self._gone[vehicle_id]
            elif vehicle.seen_ms > since_ms + DOUBT_MS:  # what came before may have been on its way
                del self._gone[vehicle_id]
                self.places.suspects.spoke(vehicle_id)
            else:
                self.places.suspects.stalled(vehicle_id, self._clock_ms())

    def on_struck_off(self, vehicle_id: str) -> None:
        """Break off what runs on a vehicle that was revoked."""
        for leg in list(self._by_vehicle.get(vehicle_id, {}).values()):
            self._departed(leg)

    def on_link_lost(self) -> None:
        """Messages may have been lost, the last ones too: everything goes on from what is here."""
        for leg in list(self._legs.values()):
            self._departed(leg, blamed=False)


def _speaks(delta: wire.Delta) -> bool:
    return bool(delta.text or delta.token_ids or delta.finish_reason or delta.calls)


def _billed(item: _Item, bill: ev.SchedulerEvent | None = None) -> _Item | WholeAnswer:
    """The same with its bill, if its caller is to pay it."""
    if not isinstance(bill, ev.LiveEnded):
        return item
    if isinstance(item, (LastTokens, WholeAnswer)):
        return msgspec.structs.replace(item, bill=bill)
    if isinstance(item, LiveAnswer):
        return WholeAnswer(status=item.status, body=item.body, footprint=item.footprint, bill=bill)
    return item
