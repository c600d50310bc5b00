"""The owner's API of a whole cell: keys, statements, and words that neither the operator nor a stranger can forge."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

import httpx
import msgspec
import pytest
from tests.cell_world import ADMIN_KEY, HandPlayed, World, a_world, chat, run

from motorpool import wire
from motorpool.errors import AuthenticationError, RateLimitError
from motorpool.server.owner.routes import date_of
from motorpool.server.owner.sessions import BURST, CHALLENGE_MS, CODE_MS, REFILL_MS, TOKEN_MS, Sessions, Throttle
from motorpool.store import owners
from motorpool.store.database import SCHEMA_VERSION, Database, statements
from motorpool.trust.consent import (
    ConsentGrant,
    ConsentLimits,
    ConsentWithdrawal,
    OwnerKey,
    create_owner_key,
    grant_consent,
    withdraw_consent,
)
from motorpool.trust.owneraccess import Resume, answers_challenge, open_resume, sign_challenge, sign_resume
from motorpool.types import ModelTier, Reason, ReasonCode, Usage, VehicleState

DAY_MS = 86_400_000
V1 = "/v1/owner/vehicles/v1"


class Device:
    """An owner's telephone: a key, and what it says to the cell."""

    def __init__(self, world: World, vehicle_id: str = "v1") -> None:
        self.world = world
        self.vehicle_id = vehicle_id
        self.key: OwnerKey = create_owner_key()
        self.headers: dict[str, str] = {}

    async def call(self, method: str, path: str, body: object = None) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.world.api)
        content = body if isinstance(body, bytes) else None if body is None else msgspec.json.encode(body)
        async with httpx.AsyncClient(transport=transport, base_url="http://cell", timeout=20) as client:
            head = {"content-type": "application/json"} | self.headers
            return await client.request(method, path, content=content, headers=head)

    async def sign_in(self, key: OwnerKey | None = None) -> httpx.Response:
        nonce = (await self.call("POST", "/v1/owner/challenge", {"vehicle_id": self.vehicle_id})).json()["nonce"]
        answer = {
            "vehicle_id": self.vehicle_id,
            "nonce": nonce,
            "signature": sign_challenge(key or self.key, self.vehicle_id, nonce),
        }
        response = await self.call("POST", "/v1/owner/token", answer)
        if response.status_code == 200:
            self.headers = {"authorization": f"Bearer {response.json()['token']}"}
        return response

    def grant(self, granted_ms: int, key: OwnerKey | None = None, vehicle_id: str = "v1") -> bytes:
        limits = ConsentLimits(max_watts_w=150)
        return grant_consent(
            key or self.key,
            ConsentGrant(
                vehicle_id=vehicle_id,
                purposes=("compute",),
                limits=limits,
                granted_ms=granted_ms,
                expires_ms=granted_ms + DAY_MS,
            ),
        )

    def withdrawal(self, withdrawn_ms: int, key: OwnerKey | None = None) -> bytes:
        return withdraw_consent(key or self.key, ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=withdrawn_ms))

    def resume(self, resumed_ms: int, key: OwnerKey | None = None, vehicle_id: str = "v1") -> bytes:
        return sign_resume(key or self.key, Resume(vehicle_id=vehicle_id, resumed_ms=resumed_ms))


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@asynccontextmanager
async def owned(folder: Path) -> AsyncIterator[tuple[World, HandPlayed, Device]]:
    """A cell, a vehicle that the test plays, and its owner, signed in."""
    async with a_world(folder) as world:
        device = Device(world)
        hand = await world.hand_played("v1", owner_key=device.key.public.hex())
        assert (await device.sign_in()).status_code == 200
        yield world, hand, device


# -- who is asking -----------------------------------------------------------------------------------------------------


def test_a_link_registers_a_key_once_and_the_key_opens_its_own_vehicle_only(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.enrol("v1")
            await world.enrol("v2", owner_key=create_owner_key().public.hex())
            made = await world.operator.post("/v1/vehicles/v1/owner-link")
            assert made.status_code == 201
            assert code_of(await world.operator.post("/v1/vehicles/v2/owner-link")) == (409, "owner_known")
            assert code_of(await world.operator.post("/v1/vehicles/v9/owner-link")) == (404, "vehicle_not_found")
            link = urlsplit(made.json()["link"])
            query = {name: values[0] for name, values in parse_qs(link.query).items()}
            assert (link.scheme, link.netloc, query["vehicle"]) == ("motorpool", "enrol", "v1")
            device = Device(world)
            assert code_of(await device.sign_in()) == (401, "invalid_signature")
            new = {"code": query["code"], "owner_key": device.key.public.hex()}
            wrong = await device.call("POST", "/v1/owner/enrol", new | {"owner_key": "ff"})
            assert code_of(wrong) == (400, "invalid_value")
            wrong = await device.call("POST", "/v1/owner/enrol", new | {"code": "x" * 32})
            assert code_of(wrong) == (401, "invalid_enrolment_code")
            assert (await device.call("POST", "/v1/owner/enrol", new)).json() == {"vehicle_id": "v1"}
            again = await device.call("POST", "/v1/owner/enrol", new)
            assert code_of(again) == (401, "invalid_enrolment_code")
            assert (await device.sign_in()).status_code == 200
            assert (await device.call("GET", V1)).json()["vehicle_id"] == "v1"
            assert code_of(await device.call("GET", "/v1/owner/vehicles/v2")) == (404, "vehicle_not_found")
            # What opens this opens nothing else, and nothing else opens it.
            assert (await device.call("GET", "/v1/batches")).status_code == 401
            for key in (world.key, ADMIN_KEY, ""):
                device.headers = {"authorization": f"Bearer {key}"}
                assert code_of(await device.call("GET", V1)) == (401, "invalid_owner_token")

    run(test())


def test_a_link_is_good_for_a_day(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.enrol("v1")
            code = (await world.operator.post("/v1/vehicles/v1/owner-link")).json()["code"]
            world.ahead_ms = CODE_MS + 1_000
            device = Device(world)
            new = {"code": code, "owner_key": device.key.public.hex()}
            assert code_of(await device.call("POST", "/v1/owner/enrol", new)) == (401, "invalid_enrolment_code")

    run(test())


def test_a_challenge_is_answered_by_its_owner_once_and_in_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with owned(tmp_path) as (world, _, device):
            assert code_of(await device.sign_in(create_owner_key())) == (401, "invalid_signature")
            asked = {"vehicle_id": "v1"}
            nonce = (await device.call("POST", "/v1/owner/challenge", asked)).json()["nonce"]
            answer = {"vehicle_id": "v1", "nonce": nonce, "signature": sign_challenge(device.key, "v1", nonce)}
            assert (await device.call("POST", "/v1/owner/token", answer)).status_code == 200
            assert code_of(await device.call("POST", "/v1/owner/token", answer)) == (401, "invalid_signature")
            nonce = (await device.call("POST", "/v1/owner/challenge", asked)).json()["nonce"]
            world.ahead_ms = CHALLENGE_MS
            answer = {"vehicle_id": "v1", "nonce": nonce, "signature": sign_challenge(device.key, "v1", nonce)}
            assert code_of(await device.call("POST", "/v1/owner/token", answer)) == (401, "invalid_signature")
            assert (await device.call("GET", V1)).status_code == 200
            world.ahead_ms = TOKEN_MS
            assert code_of(await device.call("GET", V1)) == (401, "invalid_owner_token")
            # Nobody learns whether a vehicle exists.
            unknown = await device.call("POST", "/v1/owner/challenge", {"vehicle_id": "v77"})
            assert unknown.status_code == 200

    run(test())


def test_a_vehicle_that_changes_hands_ends_the_tokens_of_the_owner_before(tmp_path: Path) -> None:
    async def test() -> None:
        async with owned(tmp_path) as (world, _, device):
            await world.enrol("v1")  # again, with nothing said about the owner
            assert (await device.call("GET", V1)).status_code == 200
            await world.enrol("v1", owner_key=create_owner_key().public.hex())
            assert code_of(await device.call("GET", V1)) == (401, "invalid_owner_token")

    run(test())


def test_tokens_cannot_be_made_up() -> None:
    now = [0]
    sessions, others = Sessions(lambda: now[0]), Sessions(lambda: now[0])
    nonce, _ = sessions.challenge("v1")
    token, _ = sessions.token("v1", "ab", nonce)
    assert sessions.owner_of(f"Bearer {token}".encode()) == ("v1", "ab")
    bad = [
        "",
        "Bearer",
        f"Basic {token}",
        f"Bearer {nonce}",
        f"Bearer mpo-{nonce}",
        f"Bearer {token[:-4]}",
        f"Bearer {token[:20]}{'A' if token[20] != 'A' else 'B'}{token[21:]}",
        "Bearer mpo-\xff",
        f"Bearer {others.token('v1', 'ab', nonce)[0]}",
    ]
    for text in bad:
        with pytest.raises(AuthenticationError):
            sessions.owner_of(text.encode("latin-1"))
    assert not sessions.is_open("v1", token.removeprefix("mpo-")), "a token is no challenge"
    assert not sessions.is_open("v2", sessions.challenge("v1")[0])
    assert not others.is_open("v1", sessions.challenge("v1")[0])
    now[0] = TOKEN_MS
    with pytest.raises(AuthenticationError):
        sessions.owner_of(f"Bearer {token}".encode())


def test_an_address_that_asks_too_often_has_to_wait_and_others_do_not(tmp_path: Path) -> None:
    now = [1_000_000]
    throttle = Throttle(lambda: now[0])
    for _ in range(BURST):
        throttle.take("a")
    with pytest.raises(RateLimitError) as caught:
        throttle.take("a")
    assert 0 < caught.value.retry_after_ms <= REFILL_MS
    throttle.take("b")
    now[0] += REFILL_MS
    throttle.take("a")
    with pytest.raises(RateLimitError):
        throttle.take("a")

    async def test() -> None:
        async with a_world(tmp_path) as world:
            device = Device(world)
            answers = [await device.call("POST", "/v1/owner/challenge", {"vehicle_id": "v1"}) for _ in range(BURST + 1)]
            assert [answer.status_code for answer in answers[:-1]] == [200] * BURST
            assert code_of(answers[-1]) == (429, "rate_limit_exceeded")
            assert int(answers[-1].headers["retry-after-ms"]) > 0

    run(test())


# -- the statement -----------------------------------------------------------------------------------------------------


def test_the_owner_sees_what_the_car_does_and_has_earned(tmp_path: Path) -> None:
    async def test() -> None:
        async with owned(tmp_path) as (world, hand, device):
            hand.report(permit_w=90, tier=ModelTier.REDUCED, stay_bound_ms=7_200_000, risk_15min=0.1)
            batch_id = await world.batch([chat("a line", 5)])
            grant = await hand.next(wire.Grant)
            await hand.finish(grant, [0], "m1", energy_mwh=4)
            await world.ended(batch_id)
            shown = (await device.call("GET", V1)).json()
            earned = world.one("SELECT sum(amount_micro) FROM transfer WHERE credit = 'owner:v1'")
            expected = {"earned_micro": earned, "lines_done": 1, "tokens_generated": 5, "energy_wh": 0.004}
            assert {name: shown[name] for name in expected} == expected
            assert (shown["tier"], shown["permit_w"], shown["currency"]) == ("reduced", 90, "EUR")
            (day,) = shown["statement"]
            assert {name: day[name] for name in expected} == expected
            assert day["date"] == date_of(world.now_ms() // DAY_MS)
            assert code_of(await device.call("GET", V1 + "?days=0")) == (400, "invalid_value")
            assert code_of(await device.call("GET", V1 + "?days=367")) == (400, "invalid_value")
            assert len((await device.call("GET", V1 + "?days=1")).json()["statement"]) == 1
            operators = (await world.operator.get("/v1/vehicles/v1")).json()
            assert (operators["tier"], operators["stay_bound_ms"], operators["risk_15min"]) == (
                "reduced",
                7_200_000,
                0.1,
            )
            assert (operators["energy_mwh"], operators["energy_uwh"]) == (4, 4_000)
            hand.report(state=VehicleState.DENIED, reasons=[Reason(code=ReasonCode.DOOR_OPEN)])
            vehicle = world.cell.scheduler.vehicles["v1"]
            await world.until(lambda: not vehicle.present)
            shown = (await device.call("GET", V1)).json()
            assert (shown["state"], shown["reasons"][0]["code"], shown["tier"]) == ("denied", "door_open", None)

    run(test())


def test_days_are_counted_in_utc() -> None:
    assert date_of(0) == "1970-01-01"
    assert date_of(20_454) == "2026-01-01"


# -- the owner's word --------------------------------------------------------------------------------------------------


def test_invariant_2_after_a_withdrawal_the_cell_dispatches_nothing_forgets_the_car_and_pays(tmp_path: Path) -> None:
    async def test() -> None:
        async with owned(tmp_path) as (world, hand, device):
            batch_id = await world.batch([chat(f"line {number}", 5) for number in range(9)])
            grant = await hand.next(wire.Grant)
            hand.report(held=[grant.lease_id], soc_pct=61.0, plugged=True)
            await world.until(lambda: world.one("SELECT count(*) FROM story WHERE subject = 'v1'"))
            document = device.withdrawal(world.now_ms())
            hand.heard()
            response = await device.call("POST", f"{V1}/consent", document)
            assert response.status_code == 200
            assert response.json()["consent_withdrawn_at"] is not None
            assert (await hand.next(wire.OwnerDocument)).document == document, "byte for byte: the car checks it itself"
            assert (await hand.next(wire.Revoke)).lease_id == grant.lease_id
            assert not world.cell.scheduler.leases
            # What was done is delivered and paid; nothing new comes, whatever the car says of itself.
            lines = [item.line for item in grant.items]
            await hand.finish(grant, lines, "done before")
            await world.until(lambda: world.completed(batch_id) == len(lines))
            hand.heard()
            for _ in range(3):
                hand.report(soc_pct=62.0, plugged=True)
                assert isinstance(await hand.next(wire.OwnerDocument), wire.OwnerDocument)
            assert not [each for each in hand.heard() if isinstance(each, wire.Grant | wire.Open)]
            asked = await world.client.post("/v1/chat/completions", json=chat("hello", 5))
            assert code_of(asked) == (503, "no_vehicle_available")
            assert world.one("SELECT earned_micro FROM vehicle") > 0
            assert world.one("SELECT count(*) FROM story WHERE subject = 'v1'") == 0
            shown = (await world.operator.get("/v1/vehicles/v1")).json()
            assert (shown["soc_pct"], shown["plugged"], shown["withdrawn"]) == (None, None, True)
            # A restart of the cell, or the operator enrolling it again, changes nothing.
            await world.kill_cell()
            await world.start_cell()
            await world.enrol("v1", owner_key=device.key.public.hex())
            await world.enrol("v1")
            hand.report()
            assert (await hand.next(wire.OwnerDocument)).document == document
            hand.report()
            await hand.next(wire.OwnerDocument)
            assert not world.cell.scheduler.leases
            # A new consent, later than the withdrawal, and nothing else.
            assert (await device.sign_in()).status_code == 200
            old = await device.call("POST", f"{V1}/consent", device.grant(world.now_ms() - DAY_MS // 2))
            assert code_of(old) == (403, "invalid_consent")
            world.ahead_ms += 5_000
            new = device.grant(world.now_ms())
            assert (await device.call("POST", f"{V1}/consent", new)).json()["consent_withdrawn_at"] is None
            hand.report()
            again = await hand.next(wire.Grant)
            await hand.finish(again, [item.line for item in again.items], "after")
            await world.until(lambda: world.completed(batch_id) > len(lines))
            late = await device.call("POST", f"{V1}/consent", document)
            assert code_of(late) == (409, "owner_word_too_old"), "the withdrawal, again, after the new consent"

    run(test())


def test_nobody_else_can_consent_withdraw_or_resume(tmp_path: Path) -> None:
    async def test() -> None:
        async with owned(tmp_path) as (world, hand, device):
            now, stranger = world.now_ms(), create_owner_key()
            hand.heard()
            for document in (
                b"{}",
                b"no JSON",
                device.grant(now, stranger),
                device.grant(now, vehicle_id="v2"),
                device.withdrawal(now, stranger),
                device.withdrawal(now + DAY_MS),
                device.resume(now),
                device.grant(now + DAY_MS),
            ):
                refused = await device.call("POST", f"{V1}/consent", document)
                assert code_of(refused) == (403, "invalid_consent")
            for document in (
                b"{}",
                b"no JSON",
                device.resume(now, stranger),
                device.resume(now, vehicle_id="v2"),
                device.resume(now + DAY_MS),
                device.grant(now),
                device.withdrawal(now),
            ):
                refused = await device.call("POST", f"{V1}/resume", document)
                assert code_of(refused) == (403, "invalid_resume")
            device.headers = {}
            for path in ("consent", "pause", "need-car", "resume"):
                refused = await device.call("POST", f"{V1}/{path}", device.grant(now))
                assert code_of(refused) == (401, "invalid_owner_token")
            assert not world.all("SELECT * FROM owner_word")
            assert not [each for each in hand.heard() if isinstance(each, wire.OwnerDocument | wire.OwnerAsked)]

    run(test())


@pytest.mark.parametrize(("path", "act"), [("pause", wire.OwnerAct.PAUSE), ("need-car", wire.OwnerAct.NEED_CAR)])
def test_a_pause_needs_a_token_and_its_early_end_a_signature(tmp_path: Path, path: str, act: wire.OwnerAct) -> None:
    async def test() -> None:
        async with owned(tmp_path) as (world, hand, device):
            await world.batch([chat(f"line {number}", 5) for number in range(3)])
            grant = await hand.next(wire.Grant)
            assert code_of(await device.call("POST", f"{V1}/{path}", {"minutes": 0})) == (400, "invalid_value")
            before = world.now_ms()
            shown = await device.call("POST", f"{V1}/{path}", {"minutes": 30})
            assert shown.json()["paused_until"] >= (before + 30 * 60_000) // 1000
            asked = await hand.next(wire.OwnerAsked)
            assert (asked.act, asked.until_ms - asked.asked_ms) == (act, 30 * 60_000)
            assert (await hand.next(wire.Revoke)).lease_id == grant.lease_id
            # A shorter one does not make it shorter.
            await device.call("POST", f"{V1}/{path}", {"minutes": 1})
            assert (await hand.next(wire.OwnerAsked)).until_ms == asked.until_ms
            # The car is told again as long as it does not know, and gets nothing.
            hand.heard()
            hand.report()
            assert (await hand.next(wire.OwnerAsked)).until_ms == asked.until_ms
            early = await device.call("POST", f"{V1}/resume", device.resume(before - 1))
            assert code_of(early) == (409, "owner_word_too_old")
            assert not world.cell.scheduler.leases
            resume = device.resume(world.now_ms() + 1_000)
            assert (await device.call("POST", f"{V1}/resume", resume)).json()["paused_until"] is None
            assert (await hand.next(wire.OwnerDocument)).document == resume
            hand.report()
            assert (await hand.next(wire.Grant)).items

    run(test())


def test_a_car_without_a_network_hears_its_owner_when_it_is_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with owned(tmp_path) as (world, hand, device):
            world.ahead_ms = 60_000
            await world.until(lambda: world.cell.scheduler.vehicles["v1"].offline)
            shown = await device.call("POST", f"{V1}/pause")
            assert shown.json()["state"] == "offline"
            await device.call("POST", f"{V1}/consent", device.grant(world.now_ms()))
            hand.heard()  # as if it had not come
            hand.report()
            assert isinstance(await hand.next(wire.OwnerAsked), wire.OwnerAsked)
            assert isinstance(await hand.next(wire.OwnerDocument), wire.OwnerDocument)
            world.ahead_ms += 61 * 60_000
            await world.until(lambda: world.cell.scheduler.vehicles["v1"].offline)
            hand.heard()
            hand.report()
            await hand.next(wire.Statement)
            assert not [each for each in hand.heard() if isinstance(each, wire.OwnerAsked)], "the pause is over"
            assert world.cell.scheduler.vehicles["v1"].usable(world.now_ms())

    run(test())


def test_a_live_request_leaves_a_car_that_its_owner_needs(tmp_path: Path) -> None:
    async def test() -> None:
        async with owned(tmp_path) as (world, hand, device):
            asked = asyncio.create_task(world.client.post("/v1/chat/completions", json=chat("hello", 5)))
            opened = await hand.next(wire.Open)
            other = await world.hand_played("v2")
            await device.call("POST", f"{V1}/need-car")
            assert (await hand.next(wire.Close)).request_id == opened.request_id
            taken = await other.next(wire.Open)
            assert (taken.request_id, taken.attempt) == (opened.request_id, 1)
            other.say(wire.Answered(request_id=taken.request_id, attempt=1, status=200, body=b"{}"))
            assert (await asked).status_code == 200

    run(test())


def test_no_key_code_token_or_document_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.enrol("v1")
            code = (await world.operator.post("/v1/vehicles/v1/owner-link")).json()["code"]
            device = Device(world)
            await device.call("POST", "/v1/owner/enrol", {"code": code, "owner_key": device.key.public.hex()})
            token = (await device.sign_in()).json()["token"]
            document = device.withdrawal(world.now_ms())
            await device.call("POST", f"{V1}/consent", document)
            await device.call("POST", f"{V1}/consent", b"secret words")
            kept = world.all("SELECT hash FROM owner_code")
            assert not kept
            signature = msgspec.json.decode(document)["signature"]
            for secret in (code, token, device.key.public.hex(), signature, "secret words"):
                assert secret not in caplog.text

    run(test())


# -- in the books ------------------------------------------------------------------------------------------------------


def test_signatures_are_for_one_purpose_and_one_vehicle() -> None:
    key = create_owner_key()
    signature = sign_challenge(key, "v1", "n")
    assert answers_challenge(key.public, "v1", "n", signature)
    for vehicle_id, nonce, given in (("v2", "n", signature), ("v1", "m", signature), ("v1", "n", "no base64")):
        assert not answers_challenge(key.public, vehicle_id, nonce, given)
    resume = sign_resume(key, Resume(vehicle_id="v1", resumed_ms=5))
    assert open_resume(resume, key.public, "v1") == Resume(vehicle_id="v1", resumed_ms=5)
    assert open_resume(resume, key.public, "v2") is None
    assert open_resume(resume, create_owner_key().public, "v1") is None
    assert open_resume(resume + b" " * 20_000, key.public, "v1") is None
    withdrawal = withdraw_consent(key, ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=5))
    assert open_resume(withdrawal, key.public, "v1") is None


def test_books_of_the_first_version_are_carried_over(tmp_path: Path) -> None:
    first = Database(tmp_path / "new.db")
    columns = {name: _columns(first, name) for name in ("vehicle", "batch", "result")}
    first.close()
    old = Database(tmp_path / "old.db")
    for (name,) in old.writer.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        old.writer.execute(f"DROP TABLE {name}")
    schema = Path(owners.__file__).with_name("schema.sql").read_text("utf-8")
    for statement in statements(schema):
        old.writer.execute(statement)
    old.writer.execute("INSERT INTO vehicle (vehicle_id, name, enrolled_ms, energy_mwh) VALUES ('v1', 'car', 1, 12)")
    old.writer.execute("PRAGMA user_version = 1")
    old.close()
    carried = Database(tmp_path / "old.db")
    assert carried.reader.execute("SELECT energy_uwh FROM vehicle").fetchone()[0] == 12_000
    assert {name: _columns(carried, name) for name in columns} == columns
    assert carried.reader.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
    carried.close()


def _columns(database: Database, table: str) -> list[Any]:
    return [tuple(row)[1:] for row in database.reader.execute(f"PRAGMA table_info({table})")]


def test_the_books_have_no_field_for_a_place(tmp_path: Path) -> None:
    database = Database(tmp_path / "cell.db")
    tables = [row[0] for row in database.reader.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    names = {str(column[0]) for table in tables for column in _columns(database, table)}
    database.close()
    assert not names & {"lat", "lon", "latitude", "longitude", "location", "position", "vin", "trip", "odometer"}


def test_invariant_19_no_message_of_a_vehicle_has_a_field_for_a_place_or_a_trip() -> None:
    """Every name that can leave the car, and every text: a field that is added has to be thought about here."""
    kinds: tuple[type[msgspec.Struct], ...] = (
        wire.State, wire.Progress, wire.ProgressItem, wire.Results, wire.ResultItem, wire.Returned, wire.ReturnItem,
        wire.Tokens, wire.Delta, wire.Answered, wire.Broken, wire.Checkpoint, wire.CheckpointChoice, Usage, Reason,
    )  # fmt: skip
    assert {kind.__struct_config__.tag for kind in kinds if issubclass(kind, wire.Message)} == {
        kind.__struct_config__.tag for union in (wire.UpState, wire.UpWork, wire.UpLive) for kind in get_args(union)
    }
    named = {field.name for kind in kinds for field in msgspec.structs.fields(kind)}
    of_the_car = {"soc_pct", "plugged", "region", "reasons", "permit_w", "tier", "battery_fed", "stay_bound_ms",
                  "risk_15min", "state", "energy_mwh", "energy_uwh", "energy_is_measured"}  # fmt: skip
    of_the_work = {
        "v", "incarnation", "seq", "model", "slots", "running", "queued", "held", "tokens_generated", "tokens_per_s",
        "engine", "lease_id", "job_id", "items", "line", "tokens", "checkpoint", "message_id", "media_type", "status",
        "body", "prompt_tokens", "completion_tokens", "cached_tokens", "carried_tokens", "reason", "started",
        "request_id", "attempt", "deltas", "usage", "index", "text", "token_ids", "logprobs", "finish_reason", "code",
        "detail", "choices", "hold", "memory_gb", "models_on_disk", "calls",
    }  # fmt: skip
    assert named == of_the_car | of_the_work
