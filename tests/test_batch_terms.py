"""How many vehicles could run a batch, by where and how it asks to be run: a customer sees at once why it waits."""

from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tests.cell_world import MODEL, World, a_world, chat, line, run
from tests.test_scheduler import report

from motorpool.core import events as ev
from motorpool.core.scheduler import Scheduler
from motorpool.types import VehicleState

REGIONS = ("DE", "FR", "")
STATES = (VehicleState.READY, VehicleState.WORKING, VehicleState.DENIED)
vehicles = st.tuples(st.sampled_from(REGIONS), st.integers(0, 3), st.sampled_from(STATES))


@given(st.lists(vehicles, max_size=6))
def test_those_that_could_run_it_are_counted(fleet: list[tuple[str, int, VehicleState]]) -> None:
    scheduler = Scheduler()
    for number, (region, trust, state) in enumerate(fleet):
        name = f"v{number}"
        scheduler.handle(ev.VehicleConfigured(cause_id="o", vehicle_id=name, site="", trust=trust, reserve=False), 0)
        scheduler.handle(report(name, 1, state=state, region=region), 0)
    model = report("x", 1).state.model
    assert model is not None
    assert scheduler.able(model, (), 0) == scheduler.serving(model)
    for asked in itertools.chain.from_iterable(itertools.combinations(("DE", "FR", "NO"), n) for n in range(4)):
        for least in range(4):
            expected = sum(
                state is not VehicleState.DENIED and trust >= least and (not asked or region in asked)
                for region, trust, state in fleet
            )
            assert scheduler.able(model, asked, least) == expected
    assert scheduler.able("unknown", (), 0) == 0


def test_a_batch_that_nobody_may_run_says_so_until_somebody_may(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1", region="FR")
            file = (await world.upload(line(0, chat("a", 3)))).json()
            asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            made = await world.client.post("/v1/batches", json=asked | {"motorpool": {"regions": ["DE"]}})
            batch_id = made.json()["id"]
            await world.until(lambda: world.status(batch_id) == "in_progress")
            assert await could_run(world, batch_id) == 0
            assert world.cell.serving(MODEL) == 1
            hand.region = "DE"
            hand.report()
            await world.until(lambda: world.cell.serving(MODEL, ("DE",)))
            assert await could_run(world, batch_id) == 1

    run(test())


async def could_run(world: World, batch_id: str) -> int:
    shown = (await world.client.get(f"/v1/batches/{batch_id}")).json()
    return int(shown["motorpool"]["vehicles"])
