"""Vehicles are killed, frozen, cut off and driven away in the middle of streams: nobody notices but the clock.

Each vehicle is a process behind a proxy that can cut and delay its network. The faults, and where they strike, come
from a seed. ``MOTORPOOL_CHAOS=200`` tries so many streams, ``MOTORPOOL_CHAOS_SEED`` another order.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest
from bench.streams_fleet import FAULTS, Car, enrol_car
from tests.cell_world import DEADLINE_S, World, a_world
from tests.stream_world import Told, live, pieces, until

from motorpool.server.cell import LiveRequest
from motorpool.types import Kind

STREAMS = int(os.environ.get("MOTORPOOL_CHAOS", "8"))
SEED = int(os.environ.get("MOTORPOOL_CHAOS_SEED", "1"))
CARS = 4
TOKENS = 60
RATE = 150  # tokens a second of each stream
OPTIONS = ["--model", "null", "--slots", "4", "--rate", str(RATE)]
DELAYS_S = (0.0, 0.002, 0.01)


def expected(request: LiveRequest) -> dict[int, str]:
    """What the null engine says when nothing happens."""
    text: dict[int, str] = {}
    for delta in pieces(Kind.CHAT, request.body, None)[0]:
        text[delta.index] = text.get(delta.index, "") + delta.text
    return text


class Trouble:
    """One stream, and what happens to the vehicle that has it after so many tokens."""

    def __init__(self, world: World, cars: dict[str, Car], number: int, dice: random.Random) -> None:
        self._world = world
        self._cars = cars
        self.fault = FAULTS[number % len(FAULTS)]
        self.at = dice.randrange(1, TOKENS - 5)
        self.delay_s = dice.choice(DELAYS_S)
        self.request = live(
            messages=[{"role": "user", "content": f"trip {number}"}],
            max_tokens=TOKENS // (1 + number % 2),
            n=1 + number % 2,
        )
        self.struck: Car | None = None
        self._striking: asyncio.Task[None] | None = None

    async def run(self) -> Told:
        told = Told()
        async with asyncio.timeout(DEADLINE_S * 2):
            async for item in self._world.cell.live(self.request):
                told.take(item)
                if self._striking is None and sum(len(t.split()) for t in told.text.values()) >= self.at:
                    self._striking = asyncio.create_task(self._strike())
        if self._striking is not None:
            await self._striking
        if self.struck is not None:
            await self.struck.heal()
        return told

    async def _strike(self) -> None:
        call = self._world.cell.desk._calls.get(self.request.request_id)
        if call is None or call.vehicle_id is None:
            return
        car = self._cars[call.vehicle_id]
        car.proxy.delay_s = self.delay_s
        self.struck = car
        await car.strike(self.fault)


@pytest.mark.crash
def test_streams_come_to_the_same_end_whatever_happens_to_their_vehicles(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            cars: dict[str, Car] = {}
            now_ms = time.time_ns() // 1_000_000
            for number in range(CARS):
                name = f"car-{number}"
                car = await enrol_car(name, tmp_path / name, world.nats.port, world.enrol, OPTIONS, now_ms)
                cars[name] = car
                await car.start()
            try:
                for name in cars:
                    await world.ready(name)
                await _trouble(world, cars)
            finally:
                for car in cars.values():
                    await car.kill()
                    await car.proxy.close()

    async def bounded() -> None:
        async with asyncio.timeout(60 + 20 * STREAMS):
            await test()

    asyncio.run(bounded())


async def _trouble(world: World, cars: dict[str, Car]) -> None:
    dice = random.Random(SEED)
    struck = 0
    requests: list[tuple[LiveRequest, Told]] = []
    for number in range(STREAMS):
        trouble = Trouble(world, cars, number, dice)
        where = f"seed {SEED}, stream {number}: {trouble.fault} after {trouble.at} tokens"
        told = await trouble.run()
        assert told.answer is None, f"{where}: {told.answer}"
        assert told.text == expected(trouble.request), where
        assert all(len(ends) == 1 for ends in told.ends.values()), where
        assert told.usage is not None, where
        assert told.usage.completion_tokens == TOKENS, where
        struck += trouble.struck is not None
        requests.append((trouble.request, told))
        if trouble.struck is not None:
            await world.ready(trouble.struck.name)
    assert struck >= STREAMS * 3 // 4, "most of them really lost their vehicle"
    await until(lambda: not world.cell.desk._by_vehicle)
    for request, told in requests:
        assert told.usage is not None
        cost = told.usage.prompt_tokens + 2 * told.usage.completion_tokens
        await world.until(partial(_billed, world, request))
        assert _billed(world, request) == cost, "billed once, and nothing twice"


def _billed(world: World, request: LiveRequest) -> int:
    query = "SELECT coalesce(sum(amount_micro), 0) FROM transfer WHERE reference = ? AND kind = 'usage'"
    return int(world.one(query, request.request_id))
