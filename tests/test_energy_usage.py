"""Energy and CO2 of a request: nothing of what vehicles report is lost or counted twice, and customers see it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Batch, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tests.cell_world import HandPlayed, World, a_world, chat, run
from tests.test_scheduler import grants, of, report, results, started

from motorpool import wire
from motorpool.core import events as ev
from motorpool.core.attribution import MAX_MESSAGE_UWH, Footprint, co2_ug, split_uwh, weight
from motorpool.core.carbon import DEFAULT_G_KWH, grams_per_kwh
from motorpool.core.scheduler import Scheduler
from motorpool.server.openai.footprints import with_footprint
from motorpool.types import ReturnReason, Usage

USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
BODY: dict[str, Any] = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "null",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": 'a "usage":{} b'}}],
    "usage": USAGE,
}  # fmt: skip
ANSWER = json.dumps(BODY).encode()


# -- dividing ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, MAX_MESSAGE_UWH), st.lists(st.integers(1, 1 << 28), min_size=1, max_size=50))
def test_the_parts_add_up_and_none_is_off_by_a_whole_unit(total: int, weights: list[int]) -> None:
    parts = split_uwh(total, weights)
    assert sum(parts) == total
    whole = sum(weights)
    for part, each in zip(parts, weights, strict=True):
        assert abs(part * whole - total * each) < whole


def test_a_generated_token_weighs_ten_of_a_prompt_and_what_others_did_nothing() -> None:
    assert weight(100, 0, 50, 0) == 600
    assert weight(100, 100, 50, 40) == 100
    assert weight(0, 0, 0, 0) == weight(5, 9, 3, 7) == 10, "an answer without tokens was work too"


def test_grams_are_those_of_the_region() -> None:
    assert co2_ug(1_000_000, 381) == 381_000, "a watt-hour at 381 g/kWh"
    assert co2_ug(1, 499) == 0
    assert co2_ug(1, 500) == 1


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 1 << 40), st.booleans()), min_size=1, max_size=12),
    st.data(),
)
def test_lines_and_vehicles_and_jobs_carry_the_same_energy(
    messages: list[tuple[int, int, bool]], data: st.DataObject
) -> None:
    """What a message reports is in its lines to the last unit, and totals are the sums of the lines."""
    scheduler = Scheduler()
    scheduler.handle(started(200), 0)
    commands = scheduler.handle(report("v1", 1, slots=64, region="SE"), 0)
    waiting = [(grant.lease_id, line) for grant in grants(commands) for line in grant.lines]
    reported = 0
    for number, (count, energy_mwh, measured) in enumerate(messages):
        taken, waiting = waiting[:count], waiting[count:]
        columns: dict[str, Any] = {
            "completion_tokens": data.draw(st.lists(st.integers(0, 90), min_size=count, max_size=count))
        }
        message = results(
            "v1", taken[0][0], [line for _, line in taken], message_id=f"m{number}", energy_mwh=energy_mwh,
            energy_is_measured=measured, **columns,
        )  # fmt: skip
        commands = scheduler.handle(message, 1_000 * number)
        reported = min(energy_mwh * 1_000, MAX_MESSAGE_UWH)
        (saved,) = of(commands, ev.SaveResults)
        (job,) = of(commands, ev.SaveJobCounts)
        (vehicle,) = of(commands, ev.SaveVehicleCounts)
        assert sum(saved.energy_uwh) == reported == job.energy_uwh == vehicle.energy_uwh
        assert job.measured_uwh == (reported if measured else 0)
        assert saved.co2_ug == [co2_ug(part, grams_per_kwh("SE")) for part in saved.energy_uwh]
        assert sum(saved.co2_ug) == job.co2_ug == vehicle.co2_ug
        assert not of(scheduler.handle(message, 1_000 * number + 1), ev.SaveVehicleCounts), "once"
        waiting += [(grant.lease_id, line) for grant in grants(commands) for line in grant.lines]


def test_a_line_that_does_not_count_keeps_its_part() -> None:
    scheduler = Scheduler()
    scheduler.handle(started(2), 0)
    lease = grants(scheduler.handle(report("v1", 1, slots=2), 0))[0]
    scheduler.handle(results("v1", lease.lease_id, [0], energy_mwh=4), 10)
    commands = scheduler.handle(results("v1", lease.lease_id, [0, 1], energy_mwh=10), 20)
    assert of(commands, ev.SaveResults)[0].energy_uwh == [5_000], "half of the message was a repetition"


# -- in an answer ------------------------------------------------------------------------------------------------------


def test_only_usage_is_opened() -> None:
    shown = with_footprint(ANSWER, Footprint(energy_uwh=12_300, co2_ug=4_500, is_measured=True))
    expected = json.loads(ANSWER)
    expected["usage"]["motorpool"] = {"energy_wh": 0.0123, "co2_g": 0.0045, "measured": True}
    assert json.loads(shown) == expected
    forged = with_footprint(shown, Footprint(energy_uwh=1))
    assert json.loads(forged)["usage"]["motorpool"] == {"energy_wh": 0.000001, "co2_g": 0.0, "measured": False}


@pytest.mark.parametrize(
    "body", [b"[]", b'{"by":"hand"}', b'{"usage":null}', b'{"usage":[1]}', b"no JSON", b"\xff", b""]
)
def test_a_body_without_usage_stays_as_it_is(body: bytes) -> None:
    assert with_footprint(body, Footprint(energy_uwh=5)) == body
    assert with_footprint(ANSWER, None) == ANSWER


# -- through a whole cell ----------------------------------------------------------------------------------------------


def energy_of(world: World, batch_id: str) -> tuple[int, int, int]:
    """Energy, its measured part and CO2 of a batch, which must be the sums of its lines."""
    query = "SELECT batch_no, energy_uwh, measured_uwh, co2_ug FROM batch WHERE batch_id = ?"
    number, energy, measured, co2 = world.all(query, batch_id)[0]
    sums = world.all(
        "SELECT sum(energy_uwh), sum(energy_uwh * energy_is_measured), sum(co2_ug) FROM result"
        " WHERE line_key >= ? AND line_key < ?", number << 32, (number + 1) << 32,
    )[0]  # fmt: skip
    assert sums == (energy, measured, co2)
    return int(energy), int(measured), int(co2)


def test_customers_see_it_in_lines_and_batches_and_the_books_agree(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = {name: await world.hand_played(name, region=region) for name, region in (("v1", "DE"), ("v2", "?"))}
            batch_id = await world.batch([chat(f"line {number}", 5) for number in range(8)])
            reported = dict.fromkeys(hands, 0)
            done = 0
            while done < 8:
                for name, hand in hands.items():
                    for grant in [message for message in hand.heard() if isinstance(message, wire.Grant)]:
                        assert grant.customer_class == "batch documents"
                        assert (grant.pay_input_micro, grant.pay_output_micro) == (700_000, 1_400_000)
                        lines = [item.line for item in grant.items]
                        await hand.finish(
                            grant, lines, f"{name}-{done}", body=ANSWER, energy_mwh=7 + done, measured=name == "v1"
                        )
                        reported[name] += (7 + done) * 1_000
                        done += len(lines)
                await asyncio.wait_for(world.cell.changed.wait(), 20)
                world.cell.changed.clear()
            ended = await world.ended(batch_id)
            energy, measured, co2 = energy_of(world, batch_id)
            assert (energy, measured) == (sum(reported.values()), reported["v1"])
            assert dict(world.all("SELECT vehicle_id, energy_uwh FROM vehicle")) == reported
            assert dict(world.all("SELECT vehicle_id, sum(energy_uwh) FROM vehicle_day GROUP BY 1")) == reported
            shown = ended["usage"]["motorpool"]
            assert shown == {"energy_wh": energy / 1e6, "co2_g": co2 / 1e6, "measured": reported["v2"] == 0}
            usage = Batch.model_validate(ended).usage
            assert usage is not None
            assert usage.total_tokens == 64
            rows = await world.rows(ended["output_file_id"])
            found = [ChatCompletion.model_validate(row["response"]["body"]) for row in rows.values()]
            parts = [_extra(each.usage) for each in found]
            assert sum(round(part["energy_wh"] * 1e6) for part in parts) == energy
            for part in parts:
                grams = 381 if part["measured"] else DEFAULT_G_KWH
                assert round(part["co2_g"] * 1e6) == co2_ug(round(part["energy_wh"] * 1e6), grams)

    run(test())


def _extra(usage: CompletionUsage | None) -> dict[str, Any]:
    """What OpenAI's own client keeps of a field that it does not know."""
    assert usage is not None
    assert usage.total_tokens == 8
    assert usage.model_extra is not None
    extra: dict[str, Any] = usage.model_extra["motorpool"]
    return extra


async def _opened(hand: HandPlayed, world: World, **body: Any) -> tuple[wire.Open, asyncio.Task[httpx.Response]]:
    asked = asyncio.create_task(world.client.post("/v1/chat/completions", json=chat("hello", 5) | body))
    return await hand.next(wire.Open), asked


def test_live_answers_carry_what_all_vehicles_drew(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hands = {"v1": await world.hand_played("v1", region="DE"), "v2": await world.hand_played("v2", region="FR")}
            asked = asyncio.create_task(world.client.post("/v1/chat/completions", json=chat("hello", 5)))
            await world.until(lambda: world.cell.desk._calls)
            (call,) = world.cell.desk._calls.values()
            assert call.vehicle_id is not None
            first = hands.pop(call.vehicle_id)
            ((_, second),) = hands.items()
            opened = await first.next(wire.Open)
            assert (opened.customer_class, opened.pay_output_micro) == ("live requests", 1_400_000)
            first.say(
                wire.Broken(
                    request_id=opened.request_id,
                    attempt=0,
                    reason=ReturnReason.GUARD,
                    energy_uwh=2_000,
                    energy_is_measured=True,
                )
            )
            opened = await second.next(wire.Open)
            usage = Usage(prompt_tokens=3, completion_tokens=5, energy_uwh=1_000, energy_is_measured=True)
            second.say(wire.Answered(request_id=opened.request_id, attempt=1, status=200, body=ANSWER, usage=usage))
            response = await asked
            grams = {"v1": 381, "v2": 56}
            expected = co2_ug(2_000, grams[first.vehicle_id]) + co2_ug(1_000, grams[second.vehicle_id])
            extra = _extra(ChatCompletion.model_validate(response.json()).usage)
            assert extra == {"energy_wh": 0.003, "co2_g": expected / 1e6, "measured": True}
            booked = {first.vehicle_id: 2_000, second.vehicle_id: 1_000}
            await world.until(lambda: dict(world.all("SELECT vehicle_id, energy_uwh FROM vehicle")) == booked)

    run(test())


@pytest.mark.parametrize("include", [True, False])
def test_the_usage_chunk_of_a_stream_has_it_where_it_was_asked_for(tmp_path: Path, include: bool) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1", region="DE")
            options = {"stream": True} | ({"stream_options": {"include_usage": True}} if include else {})
            opened, asked = await _opened(hand, world, **options)
            delta = wire.Delta(index=0, text="a", token_ids=[1])
            usage = Usage(prompt_tokens=3, completion_tokens=5, energy_uwh=4_000)
            for seq, (deltas, end) in enumerate((([delta], None), ([], usage))):
                hand.say(wire.Tokens(request_id=opened.request_id, attempt=0, seq=seq, deltas=deltas, usage=end))
            text = (await asked).text
            events = [json.loads(each[6:]) for each in text.splitlines() if each.startswith("data: {")]
            chunks = [ChatCompletionChunk.model_validate(each) for each in events]
            usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
            if include:
                assert _extra(usages[0]) == {"energy_wh": 0.004, "co2_g": 4 * 381 / 1e6, "measured": False}
            assert len(usages) == include

    run(test())


def test_an_error_has_no_footprint(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            opened, asked = await _opened(hand, world)
            body = b'{"error":{"message":"no","type":"invalid_request_error","param":null,"code":"x"},"usage":{}}'
            hand.say(wire.Answered(request_id=opened.request_id, attempt=0, status=400, body=body))
            assert (await asked).content == body

    run(test())


# -- hours without a network -------------------------------------------------------------------------------------------

HOUR_MS = 3_600_000


def test_after_hours_offline_every_answer_is_in_the_books_once(tmp_path: Path) -> None:
    """Lines of a silent vehicle run elsewhere; what it delivers late counts where nobody was faster, and pays once."""

    async def test() -> None:
        async with a_world(tmp_path) as world:
            away = await world.hand_played("v1", slots=3)
            batch_id = await world.batch([chat(f"line {number}", 5) for number in range(6)])
            grant = await away.next(wire.Grant)
            lines = [item.line for item in grant.items]
            assert len(lines) == 6
            assert grant.max_offline_ms == wire.MAX_OFFLINE_MS
            world.ahead_ms = 3 * HOUR_MS  # and not a word from it
            await world.until(lambda: not world.cell.scheduler.vehicles["v1"].leases)
            other = await world.hand_played("v2", slots=3)
            again = await other.next(wire.Grant)
            await other.finish(again, lines[:2], "early", energy_mwh=20)
            await world.until(lambda: world.completed(batch_id) == 2)
            await away.finish(grant, lines[:4], "late", energy_mwh=40)
            await away.finish(grant, lines[:4], "late again", energy_mwh=40)
            await world.until(lambda: world.completed(batch_id) == 4)
            revoke = await other.next(wire.Revoke)
            assert revoke.lines == lines[2:4], "it need not run them any more"
            await other.finish(again, lines[2:], "rest", energy_mwh=20)
            assert (await world.ended(batch_id))["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
            world.check_money(batch_id)
            assert world.all("SELECT vehicle_id, lines_done, energy_uwh FROM vehicle ORDER BY 1") == [
                ("v1", 2, 20_000), ("v2", 4, 30_000),
            ]  # fmt: skip
            assert world.one("SELECT count(*) FROM result") == 6
            assert world.cell.scheduler.vehicles["v1"].failures == 0, "to be without a network is no fault"

    run(test())


# -- statements --------------------------------------------------------------------------------------------------------


def test_the_car_hears_what_it_has_earned_in_all(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            hand = await world.hand_played("v1")
            greeting = await hand.next(wire.Statement)
            assert (greeting.earned_micro, greeting.currency) == (0, "EUR")
            batch_id = await world.batch([chat("a line", 5)])
            grant = await hand.next(wire.Grant)
            await hand.finish(grant, [0], "m1", energy_mwh=3)
            await world.ended(batch_id)
            world.ahead_ms = 10_000  # statements are not sent at every answer
            statement = await hand.next(wire.Statement)
            earned = world.one("SELECT earned_micro FROM vehicle")
            assert statement.earned_micro == earned > 0
            assert (statement.lines_done, statement.energy_uwh) == (1, 3_000)
            assert statement.as_of_ms > greeting.as_of_ms
            hand.incarnation = "anew"
            hand.report()
            assert (await hand.next(wire.Statement)).earned_micro == earned

    run(test())
