"""A cell end to end: batches that complete, expire, are cancelled, and go on after the control plane was killed."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import msgspec
import pytest
from tests import cell_world
from tests.cell_world import ENDED, MODEL, World, a_world, chat, run

from motorpool import wire
from motorpool.bus import open_client
from motorpool.catalogue import Catalogue, Model
from motorpool.server import assembly
from motorpool.store import books


async def lines_in_stream(world: World) -> tuple[asyncio.Event, set[int]]:
    """The lines whose results reach the durable stream from now on, and an event for each message."""
    seen: set[int] = set()
    changed = asyncio.Event()

    async def look(message: object) -> None:
        work = wire.decode(wire.UP_WORK, message.data)  # type: ignore[attr-defined]
        if isinstance(work, wire.Results):
            seen.update(item.line for item in work.items)
        changed.set()

    client = await open_client(
        [world.nats.url], name="look", jwt=world.identity.cell_jwt(), seed=world.identity.user_seed,
        inbox="_INBOX.look", on_link=lambda up: None,
    )  # fmt: skip
    await client.subscribe(wire.WORK_SUBJECTS, cb=look)
    await client.flush()
    await client.flush()
    return changed, seen


def test_lines_that_a_model_refuses_stand_in_the_error_file(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1")
            bodies = [chat(f"line {number}", 5) for number in range(30)]
            bodies[7] = chat("word " * 3000, 5)
            batch_id = await world.batch(bodies)
            batch = await world.ended(batch_id)
            assert batch["status"] == "completed"
            assert batch["request_counts"] == {"total": 30, "completed": 29, "failed": 1}
            output, errors = await world.rows(batch["output_file_id"]), await world.rows(batch["error_file_id"])
            assert set(output) == {f"n{number}" for number in range(30)} - {"n7"}
            assert set(errors) == {"n7"}
            assert errors["n7"]["response"]["status_code"] == 400
            assert errors["n7"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
            assert output["n0"]["response"]["body"]["usage"]["completion_tokens"] == 5
            world.check_money(batch_id)
            await world.until(lambda: world.one("SELECT count(*) FROM result WHERE body <> x''") == 0)

    run(test())


def test_when_the_window_closes_finished_lines_are_kept_and_the_others_named(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1", rate=200, slots=4)
            batch_id = await world.batch([chat(f"line {n}", 4 if n < 2 else 2000) for n in range(12)], window="15m")
            await world.until(lambda: world.completed(batch_id) == 2)
            world.ahead_ms = 15 * 60_000
            batch = await world.ended(batch_id)
            assert batch["status"] == "expired"
            assert batch["expired_at"] is not None
            output, errors = await world.rows(batch["output_file_id"]), await world.rows(batch["error_file_id"])
            assert set(output) == {"n0", "n1"}
            assert set(errors) == {f"n{number}" for number in range(2, 12)}
            assert {row["error"]["code"] for row in errors.values()} == {"batch_expired"}
            assert {row["response"] for row in errors.values()} == {None}
            world.check_money(batch_id)
            assert world.one("SELECT count(*) FROM lease") == 0

    run(test())


def test_a_cancelled_batch_keeps_what_runs_and_names_the_rest(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1", rate=100, slots=2)
            batch_id = await world.batch([chat(f"line {number}", 30) for number in range(20)])
            await world.until(lambda: world.completed(batch_id) >= 1)
            response = await world.client.post(f"/v1/batches/{batch_id}/cancel")
            assert response.json()["status"] in {"cancelling", "cancelled"}
            batch = await world.ended(batch_id)
            assert batch["status"] == "cancelled"
            output, errors = await world.rows(batch["output_file_id"]), await world.rows(batch["error_file_id"])
            assert len(output) == batch["request_counts"]["completed"] >= 1
            assert set(output) | set(errors) == {f"n{number}" for number in range(20)}
            assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
            world.check_money(batch_id)

    run(test())


def test_a_cancellation_survives_the_control_plane(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1", slots=2)
            batch_id = await world.batch([chat(f"line {number}", 5) for number in range(10)])
            grant = await hand.next(wire.Grant)
            assert (await world.client.post(f"/v1/batches/{batch_id}/cancel")).json()["status"] == "cancelling"
            await hand.next(wire.Revoke)
            await world.kill_cell()
            await world.start_cell()
            assert (await hand.next(wire.Revoke)).keep_running, "the revocation may have been lost: it is told again"
            hand.report([grant.lease_id])
            await hand.finish(grant, [item.line for item in grant.items], "m1")
            batch = await world.ended(batch_id)
            assert batch["status"] == "cancelled"
            assert len(await world.rows(batch["output_file_id"])) == len(grant.items)
            assert len(await world.rows(batch["error_file_id"])) == 10 - len(grant.items)

    run(test())


def test_a_batch_goes_on_after_the_control_plane_was_killed_in_its_middle(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1", rate=400, slots=4)
            await world.agent("v2", rate=400, slots=4)
            batch_id = await world.batch([chat(f"line {number}", 20) for number in range(80)])
            for least in (5, 30):
                await world.until(lambda least=least: world.completed(batch_id) >= least)  # type: ignore[misc]
                await world.kill_cell()
                await world.start_cell()
            batch = await world.ended(batch_id)
            assert batch["status"] == "completed"
            output = await world.rows(batch["output_file_id"])
            assert set(output) == {f"n{number}" for number in range(80)}
            assert batch["error_file_id"] is None
            world.check_money(batch_id)

    run(test())


def test_a_batch_that_was_validating_or_finalizing_is_finished_after_a_kill(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            batch_id = await world.batch([chat(f"line {number}", 2) for number in range(3000)])
            assert world.status(batch_id) == "validating"
            await world.kill_cell()
            await world.start_cell()
            await world.agent("v1", slots=64)
            await world.until(lambda: world.status(batch_id) in {"finalizing", *ENDED})
            await world.kill_cell()
            await world.start_cell()
            batch = await world.ended(batch_id)
            assert batch["status"] == "completed"
            assert len(await world.rows(batch["output_file_id"])) == 3000
            world.check_money(batch_id)

    run(test())


def test_what_vehicles_finish_while_the_control_plane_is_down_is_taken_from_the_stream(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            agent = await world.agent("v1", rate=50, slots=16)
            changed, seen = await lines_in_stream(world)
            batch_id = await world.batch([chat(f"line {number}", 40) for number in range(16)])
            await world.until(lambda: any(lease.seen for lease in world.cell.scheduler.leases.values()))
            await world.kill_cell()
            async with asyncio.timeout(20):
                while len(seen) < 16:
                    changed.clear()
                    await changed.wait()
            await agent.stop()
            await world.start_cell()  # there is no vehicle now: nothing can be computed again
            batch = await world.ended(batch_id)
            assert batch["status"] == "completed"
            assert len(await world.rows(batch["output_file_id"])) == 16
            assert batch["usage"]["output_tokens"] == 16 * 40
            assert world.one("SELECT tokens_generated FROM vehicle") == 16 * 40
            world.check_money(batch_id)

    run(test())


def test_a_batch_says_how_many_vehicles_could_run_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            batch_id = await world.batch([chat("a", 3)])
            await world.until(lambda: world.status(batch_id) == "in_progress")
            shown = (await world.client.get(f"/v1/batches/{batch_id}")).json()
            assert shown["motorpool"]["vehicles"] == 0
            await world.agent("v1")
            assert (await world.ended(batch_id))["motorpool"]["vehicles"] == 1

    run(test())


def test_files_are_written_a_few_lines_at_a_time_and_hold_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "CHUNK_BYTES", 2_000)
    read: list[int] = []
    real = books.results_between

    def results_between(
        db: sqlite3.Connection, batch_no: int, first: int, last: int, max_bytes: int
    ) -> tuple[list[books.DoneLine], int]:
        found = real(db, batch_no, first, last, max_bytes)
        read.append(sum(len(row.body) for row in found[0]))
        return found

    monkeypatch.setattr(books, "results_between", results_between)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1", slots=8)
            bodies = [chat(f"line {number} " + "w " * (number % 7 * 100), 1 + number % 9 * 40) for number in range(60)]
            bodies[11] = chat("word " * 3000, 5)
            batch = await world.ended(await world.batch(bodies))
            output, errors = await world.rows(batch["output_file_id"]), await world.rows(batch["error_file_id"])
            assert set(output) | set(errors) == {f"n{number}" for number in range(60)}
            assert set(errors) == {"n11"}
            for number in range(60):
                if number != 11:
                    usage = output[f"n{number}"]["response"]["body"]["usage"]
                    assert usage["completion_tokens"] == 1 + number % 9 * 40, "each answer stands at its own line"
            await world.until(lambda: world.one("SELECT count(*) FROM result WHERE body <> x''") == 0)
            assert world.one("SELECT count(*) FROM result") == 60, "the rows stay as proof of what was paid"

    run(test())
    longest = max(read)
    assert len(read) > 10
    assert longest < 2_000 + 4_000, "no more than the bound and one answer"


def test_a_batch_keeps_its_price_and_runs_on_when_the_catalogue_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1", slots=1)
            batch_id = await world.batch([chat("same", 5), chat("same", 5)])
            grant = await hand.next(wire.Grant)
            await hand.finish(grant, [0], "m0")
            await world.until(lambda: world.completed(batch_id) == 1)
            await world.kill_cell()
            for models in ([dearer(world.cell.catalogue.get(MODEL))], []):
                monkeypatch.setattr(cell_world, "CATALOGUE", Catalogue(models))
                await world.start_cell()
                if models:
                    await world.kill_cell()
            await hand.finish(grant, [1], "m1")
            batch = await world.ended(batch_id)
            assert batch["request_counts"]["completed"] == 2
            costs = {row[0] for row in world.all("SELECT cost_micro FROM result")}
            assert len(costs) == 1, "two equal lines of one batch cost the same"
            world.check_money(batch_id)

    run(test())


def dearer(model: Model) -> Model:
    return msgspec.structs.replace(model, input_micro=100 * model.input_micro, output_micro=100 * model.output_micro)
