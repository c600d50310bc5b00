"""Vehicles that pause, and vehicles whose connection has ended: streams go on elsewhere before any deadline."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

from tests.cell_world import HandPlayed, World, a_world, run
from tests.stream_world import Told, live, pieces, until
from tests.test_stream_limits import begin, finish, opened_by, two

from motorpool import wire
from motorpool.core import streams
from motorpool.types import ReturnReason, Usage


class Paused(NamedTuple):
    """The stream, and the vehicle that pauses with what it has still to say."""

    asked: asyncio.Task[Told]
    hand: HandPlayed
    opened: wire.Open
    deltas: list[wire.Delta]
    usage: Usage

    def goes_on(self) -> None:
        for seq, (part, bill) in enumerate(((self.deltas[2:], None), ([], self.usage)), start=1):
            message = wire.Tokens(request_id=self.opened.request_id, attempt=0, seq=seq, deltas=part, usage=bill)
            self.hand.say(message)


async def paused(world: World, hands: list[HandPlayed], *, hedges: int = 1) -> Paused:
    """A stream that pauses after two tokens, before its deadline, with so many hedges saved up."""
    request = live(max_tokens=5)
    asked = begin(world, request)
    hand, opened = await opened_by(hands)
    deltas, usage = pieces(opened.kind, opened.body, None)
    hand.say(wire.Tokens(request_id=opened.request_id, attempt=0, seq=0, deltas=deltas[:2]))
    desk = world.cell.desk
    (call,) = desk._calls.values()
    await until(lambda: call.transcript.tokens == 2)
    desk._budget._hundredths = 100 * hedges
    leg = call.leg
    assert leg is not None
    assert desk._clock_ms() < leg.due_ms
    desk._overdue(leg, desk._clock_ms())
    return Paused(asked, hand, opened, deltas, usage)


def test_a_stream_that_pauses_goes_on_elsewhere_before_its_deadline(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            desk = world.cell.desk
            stream = await paused(world, hands)
            other, again = await opened_by(hands)
            assert other is not stream.hand
            assert wire.decode_checkpoint(again.checkpoint or b"").tokens == 2
            finish(other, again)
            assert (await stream.hand.next(wire.Close)).request_id == stream.opened.request_id
            found = await stream.asked
            assert found.text[0] == "".join(delta.text for delta in stream.deltas)
            assert (desk.counts.continued, desk.counts.hedged, desk.counts.stalled) == (1, 0, 1)
            assert desk._budget._hundredths == 0, "whether it was gone is not known yet"
            world.ahead_ms += streams.DOUBT_MS + 1
            desk.on_tick()
            assert desk._budget._hundredths == 100, "it says nothing, so nothing was asked for twice"
            assert all(world.cell.scheduler.vehicles[hand.vehicle_id].live == 0 for hand in hands)

    run(test())


def test_a_vehicle_that_was_only_slow_costs_a_hedge(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            desk = world.cell.desk
            stream = await paused(world, hands)
            other, again = await opened_by(hands)
            finish(other, again)
            await stream.asked
            since_ms = desk._doubts[0].since_ms
            world.ahead_ms += 10
            stream.hand.report()
            await world.until(lambda: world.cell.scheduler.vehicles[stream.hand.vehicle_id].seen_ms > since_ms)
            world.ahead_ms += streams.DOUBT_MS + 1
            desk.on_tick()
            assert (desk._budget._hundredths, desk.counts.slow) == (0, 1)

    run(test())


def test_a_vehicle_that_speaks_before_the_other_one_keeps_its_stream(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            desk = world.cell.desk
            stream = await paused(world, hands)
            other, again = await opened_by(hands)
            stream.goes_on()
            assert (await other.next(wire.Close)).request_id == again.request_id
            finish(other, again)  # too late
            found = await stream.asked
            assert found.text[0] == "".join(delta.text for delta in stream.deltas)
            assert found.usage is not None
            assert (found.usage.completion_tokens, found.usage.carried_tokens) == (5, 0)
            assert (desk.counts.continued, desk.counts.hedged, desk.counts.stalled) == (0, 1, 0)
            assert desk._budget._hundredths == 0
            assert all(world.cell.scheduler.vehicles[hand.vehicle_id].live == 0 for hand in hands)

    run(test())


def test_without_a_budget_a_pause_is_waited_for_until_its_deadline(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            stream = await paused(world, hands, hedges=0)
            (call,) = world.cell.desk._calls.values()
            assert call.rival is None
            stream.goes_on()
            await stream.asked

    run(test())


def test_a_vehicle_that_leaves_while_it_is_doubted_was_doubted_rightly(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            desk = world.cell.desk
            stream = await paused(world, hands)
            other, again = await opened_by(hands)
            stream.hand.say(wire.Broken(request_id=stream.opened.request_id, attempt=0, reason=ReturnReason.GUARD))
            await until(lambda: desk.counts.departed == 1)
            assert desk._budget._hundredths == 100
            finish(other, again)
            found = await stream.asked
            assert found.text[0] == "".join(delta.text for delta in stream.deltas)
            assert (desk.counts.continued, desk.counts.hedged) == (1, 0)

    run(test())


def test_the_streams_of_a_vehicle_whose_connection_ended_go_on_at_once_and_it_gets_nothing_more(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            desk = world.cell.desk
            requests = [live(max_tokens=3, user=str(number)) for number in range(2)]
            asked, opened = [], []
            for request in requests:
                asked.append(begin(world, request))
                opened.append(await opened_by(hands))
            gone = opened[0][0]
            staying = next(hand for hand in hands if hand is not gone)
            desk.on_gone(gone.vehicle_id)
            for hand, each in opened:
                if hand is staying:
                    finish(hand, each)
            for _ in range(sum(hand is gone for hand, _ in opened)):
                again = await staying.next(wire.Open)
                assert again.attempt == 1
                finish(staying, again)
            for task in asked:
                assert (await task).answer is None
            assert desk.counts.gone == 1
            for _ in range(3):
                asked_now = begin(world, live(max_tokens=2))
                finish(staying, await staying.next(wire.Open))
                await asked_now
            world.ahead_ms += streams.DOUBT_MS + 10  # it is back, and says so
            gone.report()
            seen = world.cell.scheduler.vehicles[gone.vehicle_id]
            await world.until(lambda: seen.seen_ms > desk._gone[gone.vehicle_id] + streams.DOUBT_MS)
            desk.on_tick()
            assert (len(desk._gone), desk.places.suspects.avoided(desk._clock_ms())) == (0, frozenset())

    run(test())


def test_a_vehicle_whose_process_dies_loses_its_stream_to_another_one_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = await two(world)
            link = world.cell._link
            assert link is not None
            await until(lambda: link.watching)
            request = live(max_tokens=4)
            asked = begin(world, request)
            hand, opened = await opened_by(hands)
            deltas, _ = pieces(opened.kind, opened.body, None)
            hand.say(wire.Tokens(request_id=opened.request_id, attempt=0, seq=0, deltas=deltas[:2]))
            (call,) = world.cell.desk._calls.values()
            await until(lambda: call.transcript.tokens == 2)
            transport = hand.link._connection.client._transport
            assert transport is not None
            transport._io_writer.transport.abort()  # type: ignore[attr-defined]  # as the kernel does when a process dies
            other, again = await opened_by(hands)
            assert other is not hand
            finish(other, again)
            found = await asked
            assert found.text[0] == "".join(delta.text for delta in deltas)
            counts = world.cell.desk.counts
            assert (counts.gone, counts.departed, counts.stalled) == (1, 1, 0)

    run(test())
