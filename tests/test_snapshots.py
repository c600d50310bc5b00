"""What a cell has learnt, in a file beside its books: kept, read again, and never more than a help."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest
from tests.cell_world import World, a_world, chat, run

from motorpool import wire
from motorpool.core import snapshot
from motorpool.core.scheduler import Scheduler
from motorpool.server.snapshots import EVERY_MS, Snapshots
from motorpool.types import VehicleState


def a_scheduler(speed: float) -> Scheduler:
    scheduler = Scheduler()
    scheduler.cell.t.vehicles["speed"][scheduler.cell.vehicle("v1")] = speed
    return scheduler


def speed_in(path: Path) -> float:
    scheduler = a_scheduler(0.0)
    snapshots = Snapshots(path)
    snapshots.restore(scheduler, 0)
    snapshots.suspend()
    snapshots.close(scheduler, 0)
    return scheduler.vehicles["v1"].speed


def test_it_is_written_now_and_then_and_at_the_end_whole_and_for_nobody_else(tmp_path: Path) -> None:
    books = tmp_path / "books.db"
    snapshots = Snapshots(books)
    snapshots.on_tick(a_scheduler(5.0), 10**12)
    assert not snapshots.path.exists(), "before a state was whole there is nothing to keep"
    snapshots.restore(a_scheduler(0.0), 1_000)
    snapshots.on_tick(a_scheduler(5.0), 1_000 + EVERY_MS - 1)
    assert not snapshots.path.exists()
    snapshots.on_tick(a_scheduler(7.0), 1_000 + EVERY_MS)
    snapshots.suspend()
    snapshots.close(a_scheduler(9.0), 2_000 + EVERY_MS)
    assert speed_in(books) == 7.0, "a state that is not whole is not kept"
    assert stat.S_IMODE(snapshots.path.stat().st_mode) == 0o600
    again = Snapshots(books)
    again.restore(a_scheduler(0.0), 3_000)
    again.close(a_scheduler(9.0), 4_000)
    assert speed_in(books) == 9.0
    assert [path.name for path in tmp_path.iterdir()] == ["books.db.learnt"]


def test_what_cannot_be_read_or_written_costs_nothing_but_what_was_learnt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    books = tmp_path / "books.db"
    kept = snapshot.to_bytes(snapshot.take(a_scheduler(5.0), 1).learnt())
    path = Snapshots(books).path
    for wrong in (b"", kept[:-1], kept.replace(b"learnt 1", b"learnt 0"), kept[:80] + b"\xff" + kept[81:]):
        path.write_bytes(wrong)
        caplog.clear()
        assert speed_in(books) == 0.0
        assert "learnt anew" in caplog.text
    path.unlink()
    path.mkdir()
    assert speed_in(books) == 0.0
    snapshots = Snapshots(books)
    snapshots.restore(a_scheduler(0.0), 1)
    with caplog.at_level(logging.WARNING):
        snapshots.close(a_scheduler(5.0), 2)
    assert "could not be written" in caplog.text


async def finished(world: World, batch: str, lines: int) -> None:
    await world.until(lambda: world.completed(batch) >= lines)


@pytest.mark.parametrize("kind", ["old", "damaged", "missing"])
def test_after_a_crash_the_books_win_whatever_the_snapshot_says(tmp_path: Path, kind: str) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("car-1", slots=4)
            batch = await world.batch([chat(f"line {n}", 5) for n in range(12)])
            grant = await hand.next(wire.Grant)
            lines = [item.line for item in grant.items]
            await hand.finish(grant, lines[:1], "m1")
            await finished(world, batch, 1)
            path = world.cell.snapshots.path
            old = snapshot.to_bytes(snapshot.take(world.cell.scheduler, world.now_ms()).learnt())
            speed = world.cell.scheduler.vehicles["car-1"].speed
            assert speed > 0
            await hand.finish(grant, lines[1:3], "m2")
            await finished(world, batch, 3)
            held = {name: lease.lines for name, lease in world.cell.scheduler.leases.items()}
            await world.kill_cell()
            assert path.exists(), "the last one is written at the end"
            path.unlink()
            if kind != "missing":
                path.write_bytes(old if kind == "old" else old[:-5])
            await world.start_cell()
            assert {name: lease.lines for name, lease in world.cell.scheduler.leases.items()} == held
            assert world.completed(batch) == 3
            known = world.cell.scheduler.vehicles["car-1"].speed
            assert known == (speed if kind == "old" else 0.0)
            await hand.finish(grant, lines, "m3")  # all of it, what is paid already too
            await finished(world, batch, len(lines))
            hand.report(held=[], state=VehicleState.READY)
            done = set(lines)
            while len(done) < 12:
                grant = await hand.next(wire.Grant)
                lines = [item.line for item in grant.items]
                await hand.finish(grant, lines, f"m-{grant.lease_id}")
                done |= set(lines)
            assert (await world.ended(batch))["request_counts"]["completed"] == 12
            world.check_money(batch)

    run(test())
