"""A cell when its disk is full, its files vanish, its message server dies, or a vehicle says what it must not."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.cell_world import MODEL, World, a_world, chat, run

from motorpool import bus, wire
from motorpool.errors import StorageFullError
from motorpool.server import loop as cell_loop
from motorpool.server.main import MonotonicClock, connect_patiently, watch
from motorpool.server.openai import validation
from motorpool.store import books, customer
from motorpool.types import MAX_CHECKPOINT_BYTES, ReturnReason

SECRET = "the-secret-of-a-customer"


@pytest.fixture(autouse=True)
def quick_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_loop, "REBUILD_WAIT_S", 0.05)


def limit_pages(world: World, more: int) -> None:
    """A real SQLITE_FULL when the database grows by more than so many pages."""
    writer = world.cell._database.writer
    pages = writer.execute("PRAGMA page_count").fetchone()[0]
    writer.execute(f"PRAGMA max_page_count = {pages + more}")


def test_on_a_full_disk_callers_are_told_and_nothing_is_left_of_their_uploads(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            limit_pages(world, 0)
            kept = 0
            while (response := await world.upload(b"x" * 1000)).status_code == 200:
                kept += 1
                assert kept < 200, "the disk never gets full"
            assert response.status_code == 507
            assert response.json()["error"]["code"] == "storage_full"
            # While the state cannot be rebuilt nobody is left waiting either.
            again = await asyncio.gather(*(world.upload(b"y" * 1000) for _ in range(5)))
            assert {each.status_code for each in again} == {507}
            limit_pages(world, 1000)
            async with asyncio.timeout(20):
                while (response := await world.upload(b"z" * 1000)).status_code != 200:
                    assert response.status_code == 507
            blobs = [path for path in (tmp_path / "files").iterdir() if path.is_file()]
            assert len(blobs) == world.one("SELECT count(*) FROM file") == kept + 1

    run(test())


def test_a_disk_that_fills_up_in_the_middle_of_a_batch_loses_no_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1", rate=300, slots=8)
            batch_id = await world.batch([chat(f"{SECRET} {number} " + "w " * 300, 20) for number in range(120)])
            await world.until(lambda: world.completed(batch_id) >= 8)
            limit_pages(world, 1)
            await world.until(lambda: "the disk of cell.db is full" in caplog.text)
            before = world.completed(batch_id)
            assert before < 120
            limit_pages(world, 10_000)
            batch = await world.ended(batch_id)
            assert batch["status"] == "completed"
            assert len(await world.rows(batch["output_file_id"])) == 120
            world.check_money(batch_id)
            assert SECRET not in caplog.text

    run(test())


def test_a_batch_that_meets_a_full_disk_while_it_starts_waits_and_then_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1")
            real, full = books.write_index, [True, True]

            def write_index(*given: object) -> None:
                if full:
                    full.pop()
                    error = sqlite3.OperationalError("database or disk is full")
                    error.sqlite_errorname = "SQLITE_FULL"
                    raise error
                real(*given)  # type: ignore[arg-type]

            monkeypatch.setattr(books, "write_index", write_index)
            batch = await world.ended(await world.batch([chat("a", 3)]))
            assert batch["status"] == "completed"
            assert not full

    run(test())


def test_files_are_named_once_whatever_fails_after_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1")
            real, failures = books.drop_line_data, [StorageFullError("full"), sqlite3.OperationalError("I/O error")]

            def drop_line_data(db: sqlite3.Connection, **given: int) -> int | None:
                if failures:
                    raise failures.pop()
                return real(db, **given)

            monkeypatch.setattr(books, "drop_line_data", drop_line_data)
            batch_id = await world.batch([chat(f"line {number}", 3) for number in range(5)])
            batch = await world.ended(batch_id)
            await world.until(lambda: not failures and world.one("SELECT count(*) FROM line_index") == 0)
            shown = (await world.client.get(f"/v1/batches/{batch_id}")).json()
            assert shown["output_file_id"] == batch["output_file_id"] is not None
            assert len(await world.rows(shown["output_file_id"])) == 5
            assert world.one("SELECT count(*) FROM file WHERE purpose = 'batch_output'") == 1

    run(test())


def test_answers_are_forgotten_even_if_the_cell_dies_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.agent("v1")
            with monkeypatch.context() as patch:
                patch.setattr(books, "drop_line_data", _never)
                batch_id = await world.batch([chat(f"line {number}", 3) for number in range(5)])
                batch = await world.ended(batch_id)
                assert world.one("SELECT count(*) FROM result WHERE body <> x''") == 5
                await world.kill_cell()
            await world.start_cell()
            await world.until(lambda: world.one("SELECT count(*) FROM result WHERE body <> x''") == 0)
            await world.until(lambda: world.one("SELECT count(*) FROM line_index") == 0)
            assert len(await world.rows(batch["output_file_id"])) == 5

    run(test())


def _never(*given: object) -> bool:
    raise StorageFullError("full")


def test_a_lost_input_file_ends_its_batch_with_a_reason_and_stops_nothing_else(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            lost = await world.batch([chat(f"line {number}", 3) for number in range(5)])
            await world.until(lambda: world.status(lost) == "in_progress")
            kept = await world.batch([chat("other", 3)])
            await world.until(lambda: world.status(kept) == "in_progress")
            blob = world.one("SELECT blob FROM file JOIN batch ON input_file_id = file_id WHERE batch_id = ?", lost)
            await world.kill_cell()
            (tmp_path / "files" / blob).unlink()
            await world.start_cell()
            await world.agent("v1")
            batch = await world.ended(lost)
            assert batch["status"] == "failed"
            assert [error["code"] for error in batch["errors"]["data"]] == ["input_file_lost"]
            assert (await world.ended(kept))["status"] == "completed"

    run(test())


def test_an_input_file_cannot_be_deleted_while_its_batch_runs(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            batch_id = await world.batch([chat("a", 3)])
            file_id = world.one("SELECT input_file_id FROM batch")
            assert (await world.client.delete(f"/v1/files/{file_id}")).status_code == 409
            await world.agent("v1")
            await world.ended(batch_id)
            assert (await world.client.delete(f"/v1/files/{file_id}")).status_code == 200

    run(test())


def test_one_message_that_cannot_be_committed_is_dropped_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = books.insert_results

    def insert_results(db: sqlite3.Connection, rows: list[books.ResultRow]) -> None:
        if any(SECRET.encode() in row[2] for row in rows):
            raise sqlite3.IntegrityError(SECRET)
        real(db, rows)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            monkeypatch.setattr(books, "insert_results", insert_results)
            hand = await world.hand_played("v1")
            batch_id = await world.batch([chat(f"line {number}", 5) for number in range(4)])
            grant = await hand.next(wire.Grant)
            lines = [item.line for item in grant.items]
            await hand.finish(grant, lines[:1], "m1")
            await hand.finish(grant, lines[1:2], "bad", body=f'{{"text":"{SECRET}"}}'.encode())
            await hand.finish(grant, lines[1:], "m2")
            await world.until(lambda: "is dropped" in caplog.text)
            batch = await world.ended(batch_id)
            assert batch["request_counts"]["completed"] == 4
            world.check_money(batch_id)
            assert SECRET not in caplog.text

    run(test())


def test_what_a_vehicle_calls_its_messages_moves_no_money_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            batch_id = await world.batch([chat(f"line {number}", 5) for number in range(4)])
            done = 0
            while done < 4:
                grant = await hand.next(wire.Grant)
                for item in grant.items:
                    await hand.finish(grant, [item.line], "always the same")
                    done += 1
            batch = await world.ended(batch_id)
            assert batch["request_counts"]["completed"] == 4
            world.check_money(batch_id)
            assert "failed" not in caplog.text

    run(test())


def test_a_change_that_fails_in_its_own_way_undoes_only_itself(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:

            def wrong(db: sqlite3.Connection) -> None:
                db.execute("INSERT INTO meta VALUES ('left', 1)")
                raise KeyError("own fault")

            def doubled(db: sqlite3.Connection) -> None:
                db.execute("INSERT INTO meta VALUES ('epoch', 1)")

            def good(db: sqlite3.Connection) -> int:
                return db.execute("INSERT INTO meta VALUES ('good', 1)").rowcount

            found = await asyncio.gather(
                world.cell.write(wrong), world.cell.write(doubled), world.cell.write(good), return_exceptions=True
            )
            assert isinstance(found[0], KeyError)
            assert isinstance(found[1], sqlite3.IntegrityError)
            assert found[2] == 1
            assert world.one("SELECT count(*) FROM meta WHERE name = 'left'") == 0
            world.cell.check()

    run(test())


def test_the_largest_line_with_the_largest_checkpoint_still_reaches_a_vehicle(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            batch_id = await world.batch([chat("x" * (4 * 1024 * 1024 - 200), 5)])
            grant = await hand.next(wire.Grant)
            assert len(grant.items[0].body) > 4_000_000
            for tokens, size in ((3, MAX_CHECKPOINT_BYTES + 1), (4, MAX_CHECKPOINT_BYTES)):
                item = wire.ReturnItem(line=0, tokens=tokens, checkpoint=b"c" * size, started=True)
                back = wire.Returned(
                    incarnation="hand", message_id=f"r{size}", lease_id=grant.lease_id, job_id=grant.job_id,
                    reason=ReturnReason.REVOKED, items=[item],
                )  # fmt: skip
                await hand.link.publish_work(wire.encode(back), back.message_id)
                grant = await hand.next(wire.Grant)
                assert len(grant.items[0].checkpoint or b"") == (size if size == MAX_CHECKPOINT_BYTES else 0)
            await hand.finish(grant, [0], "m1")
            assert (await world.ended(batch_id))["status"] == "completed"

    run(test())


def test_an_answer_that_is_no_line_of_json_never_reaches_a_file(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            batch_id = await world.batch([chat("a", 5)])
            for number, body in enumerate([b"no json", b'{"a":\n1}', b""]):
                grant = await hand.next(wire.Grant)
                await hand.finish(grant, [0], f"m{number}", body=body)
            batch = await world.ended(batch_id)
            errors = await world.rows(batch["error_file_id"])
            assert errors["n0"]["response"]["status_code"] == 502
            assert errors["n0"]["response"]["body"]["error"]["code"] == "vehicle_error"

    run(test())


def test_a_vehicle_that_is_struck_off_gets_nothing_more_and_is_not_heard(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            batch_id = await world.batch([chat(f"line {number}", 5) for number in range(6)])
            grant = await hand.next(wire.Grant)
            assert (await world.operator.delete("/v1/vehicles/v1")).status_code == 204
            revoke = await hand.next(wire.Revoke)
            assert (revoke.lease_id, revoke.lines) == (grant.lease_id, None)
            await hand.finish(grant, [item.line for item in grant.items], "m1", body=b'{"by":"struck off"}')
            hand.report([])
            await world.agent("v2")
            batch = await world.ended(batch_id)
            output = await world.rows(batch["output_file_id"])
            assert len(output) == 6
            assert "by" not in msgspec.json.encode(output).decode()
            assert "v1" not in world.cell.scheduler.vehicles
            assert world.all("SELECT DISTINCT vehicle_id FROM result") == [("v2",)]
            assert world.all("SELECT DISTINCT credit FROM transfer WHERE kind = 'earning'") == [("owner:v2",)]
            assert (await world.operator.delete("/v1/vehicles/v1")).status_code == 404
            assert (await world.operator.get("/v1/vehicles/v1")).status_code == 404

    run(test())


def test_an_embedded_message_server_that_dies_is_started_again_and_the_batch_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            stop = asyncio.Event()
            watching = asyncio.create_task(watch(world.cell, world.nats, stop))
            await world.agent("v1", rate=200)
            batch_id = await world.batch([chat(f"line {number}", 20) for number in range(60)])
            await world.until(lambda: world.completed(batch_id) >= 5)
            assert world.nats.process is not None
            world.nats.process.kill()
            batch = await world.ended(batch_id)
            assert len(await world.rows(batch["output_file_id"])) == 60
            assert "the message server has ended" in caplog.text
            stop.set()
            await watching

    run(test())


def test_a_clock_that_is_set_back_neither_goes_back_nor_stands_still() -> None:
    wall, running = [1_000_000], [500]
    clock = MonotonicClock(lambda: wall[0], lambda: running[0])
    assert clock() == 1_000_000
    wall[0], running[0] = 1_060_000, 600  # set forward: followed
    assert clock() == 1_060_000
    wall[0], running[0] = 10, 700  # set back: time goes on
    assert clock() == 1_060_100
    running[0] = 5_700
    assert clock() == 1_065_100


def test_a_batch_is_as_private_in_stories_and_logs_as_it_should_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            agent = await world.agent("v1", rate=100)
            batch_id = await world.batch([chat(f"{SECRET} {number}", 10) for number in range(6)])
            await world.until(lambda: world.completed(batch_id) >= 1)
            await agent.stop()
            agent.again_in(world)
            batch = await world.ended(batch_id)
            output = await world.rows(batch["output_file_id"])
            answers = [row["response"]["body"]["choices"][0]["message"]["content"] for row in output.values()]
            told = caplog.text + repr(world.all("SELECT * FROM story")) + repr(world.all("SELECT * FROM transfer"))
            assert SECRET not in told
            assert not any(text in told for text in answers)
            assert MODEL in told

    run(test())


@pytest.mark.parametrize("poison", [b"\xff", b"deep"])
def test_bytes_that_are_no_message_are_dropped_and_stop_nothing(tmp_path: Path, poison: bytes) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            good = wire.encode(
                wire.Results(incarnation="hand", message_id="bad", lease_id="none", job_id="none", items=[])
            )
            bad = good.replace(b"none", b"no\xff\xff")
            if poison == b"deep":
                bad = good[:1].replace(b"\x88", b"\x89").replace(good[:1], bytes([good[0] + 1])) + good[1:]
                bad += b"\xa4deep" + b"\x91" * 200_000 + b"\xc0"
            await hand.link.publish_work(bad, "poison")
            hand.link.publish_state(bad)
            hand.link.publish_live(bad)
            batch_id = await world.batch([chat("a", 5)])
            grant = await hand.next(wire.Grant)
            await hand.finish(grant, [0], "m1")
            assert (await world.ended(batch_id))["status"] == "completed"
            world.cell.check()

    run(test())


def test_an_answer_that_is_not_utf8_never_reaches_a_file(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            batch_id = await world.batch([chat("a", 5)])
            grant = await hand.next(wire.Grant)
            await hand.finish(grant, [0], "m1", body=b'{"text":"caf\xe9"}')
            await world.until(lambda: world.cell.scheduler.jobs[1].strikes == {0: ["v1"]})
            await hand.finish(grant, [0], "m2")
            batch = await world.ended(batch_id)
            assert (await world.rows(batch["output_file_id"]))["n0"]["response"]["body"] == {"by": "hand"}

    run(test())


def test_work_that_is_delivered_again_while_it_waits_does_not_wait_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "REDELIVER_AFTER_S", 0.2)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            batch_id = await world.batch([chat(f"line {number}", 5) for number in range(4)])
            grant = await hand.next(wire.Grant)
            again = 0
            real = bus.WorkMessage.again

            def count(message: bus.WorkMessage, delivery: Any) -> None:
                nonlocal again
                again += 1
                real(message, delivery)

            monkeypatch.setattr(bus.WorkMessage, "again", count)
            limit_pages(world, 0)
            body = b'{"text":"%b"}' % (b"x" * 20_000)
            for item in grant.items:
                await hand.finish(grant, [item.line], f"m{item.line}", body=body)
            await world.until(lambda: again >= 12)
            link = world.cell._link
            assert link is not None
            waiting = sum(1 for entry in world.cell._inbox if entry.message is not None) + len(link._arrived)
            assert waiting <= len(grant.items)
            limit_pages(world, 10_000)
            done = len(grant.items)
            while done < 4:
                grant = await hand.next(wire.Grant)
                for item in grant.items:
                    await hand.finish(grant, [item.line], f"n{item.line}", body=body)
                    done += 1
            assert (await world.ended(batch_id))["status"] == "completed"
            assert not link._held

    run(test())


def test_a_check_that_ends_while_nothing_can_be_written_still_ends_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "FAIL_WAIT_S", 0.05)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            real, broken = customer.fail_validation, [True, True]

            def fail_validation(*given: Any) -> Any:
                if broken:
                    broken.pop()
                    raise StorageFullError("full")
                return real(*given)

            monkeypatch.setattr(customer, "fail_validation", fail_validation)
            file = (await world.upload(b"no json\n")).json()
            asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            batch = (await world.client.post("/v1/batches", json=asked)).json()
            ended = await world.ended(batch["id"])
            assert ended["status"] == "failed"
            assert ended["errors"]["data"][0]["code"] == "invalid_json"
            assert not broken

    run(test())


def test_a_cell_that_waits_for_its_message_server_can_be_stopped_at_once() -> None:
    async def test() -> None:
        stop, tried = asyncio.Event(), asyncio.Event()

        async def connect() -> bus.CellLink:
            tried.set()
            await asyncio.Event().wait()
            raise AssertionError("never")

        waiting = asyncio.create_task(connect_patiently(connect, stop))
        await tried.wait()
        stop.set()
        assert await waiting is None

    run(test())
