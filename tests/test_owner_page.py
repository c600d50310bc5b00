"""The owner's page over HTTP: who is let in, what each act does, and that strangers see nothing and break nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from tests.owner_world import NOW_MS, OwnersCar, Phone, served, with_page

from motorpool.agent.enrolment import PRIVATE_NAME, give_consent
from motorpool.agent.owner import page as page_module
from motorpool.agent.owner import pairing
from motorpool.agent.owner.gate import MAX_CONNECTIONS_A_HOST
from motorpool.agent.owner.page import COOKIE, FILES, PUBLIC, SAFE_HEADERS, PageSpec
from motorpool.errors import SetupError
from motorpool.trust.consent import (
    ConsentGrant,
    ConsentLimits,
    ConsentWithdrawal,
    create_owner_key,
    grant_consent,
    withdraw_consent,
)

HOUR_MS = 3_600_000
LIMITS = ConsentLimits(max_watts_w=80)
PRIVATE_PATHS = ["/app.js", "/key.js", "/form.js", "/sw.js", "/api/state", "/api/papers", "/api/log", "/api/statement"]


def consented(folder: Path) -> OwnersCar:
    give_consent(folder, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 1_000 * HOUR_MS)
    return OwnersCar(folder)


def test_whoever_is_not_paired_sees_nothing(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, phone: Phone) -> None:
        status, body = await phone.get("/")
        assert status == 403
        assert b"for the owner" in body
        assert b"v1" not in body
        for path in PRIVATE_PATHS:
            status, told = await phone.get(path, cookies={COOKIE: "x" * 32})
            assert (status, told["error"]["code"]) == (401, "not_paired"), path
        for path, asked in (("/api/act", {"act": "pause"}), ("/api/enrol", {"public": ""}), ("/api/consent", b"{}")):
            assert (await phone.post(path, asked))[0] == 401
        assert (await phone.get("/../owner.key"))[0] == 401
        assert car.works

    with_page(tmp_path, trial, car=consented(tmp_path))


def test_a_link_pairs_one_phone_once_and_for_ten_minutes(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, phone: Phone) -> None:
        secret = pairing.offer_pairing(tmp_path, NOW_MS)
        assert secret not in (tmp_path / pairing.PAIRING_NAME).read_text()
        assert (await phone.post("/api/pair", {"secret": "wrong"}))[0] == 401
        assert (await phone.post("/api/pair", {"secret": secret}))[0] == 200
        assert (await phone.get("/api/state"))[0] == 200
        cookie = next(iter(phone.session.cookie_jar))
        assert cookie["httponly"]
        assert cookie["samesite"] == "Strict"
        assert cookie.value not in (tmp_path / pairing.PHONES_NAME).read_text()
        assert (await phone.post("/api/pair", {"secret": secret}))[0] == 401  # it was good once
        late = pairing.offer_pairing(tmp_path, NOW_MS)
        car.now_ms = NOW_MS + pairing.PAIRING_MS
        assert (await phone.post("/api/pair", {"secret": late}))[0] == 401
        assert "a phone was paired" in [entry.what for entry in car.log.entries()]

    with_page(tmp_path, trial)


def test_a_phone_can_be_forgotten_from_the_page_and_from_the_command_line(tmp_path: Path) -> None:
    async def trial(_: OwnersCar, phone: Phone) -> None:
        await phone.pair(tmp_path)
        kept = next(iter(phone.session.cookie_jar)).value
        assert (await phone.post("/api/unpair", {}))[0] == 200
        assert (await phone.get("/api/state", cookies={COOKIE: kept}))[0] == 401
        await phone.pair(tmp_path)
        assert (await phone.get("/api/state"))[0] == 200
        pairing.forget(tmp_path, None)
        assert (await phone.get("/api/state"))[0] == 401

    with_page(tmp_path, trial)


def test_the_oldest_of_many_phones_gives_way(tmp_path: Path) -> None:
    tokens = [pairing.redeem(tmp_path, pairing.offer_pairing(tmp_path, NOW_MS), NOW_MS) for _ in range(10)]
    phones = pairing.load_phones(tmp_path)
    assert [pairing.is_paired(phones, str(token)) for token in tokens] == [False] * 2 + [True] * 8


def test_each_act_takes_effect_before_the_answer(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, phone: Phone) -> None:
        await phone.pair(tmp_path)
        for body, code in (
            ({"act": "pause", "minutes": 60}, "paused"),
            ({"act": "need_car"}, "paused"),
            ({"act": "withdraw"}, "consent_withdrawn"),
        ):
            status, state = await phone.post("/api/act", body)
            assert (status, state["allowed"], state["why"][0]["code"]) == (200, False, code)
            assert not car.works
            status, state = await phone.post("/api/act", {"act": "resume"})
            assert (status, state["allowed"]) == (200, code == "paused")
        wrongs: list[Any] = [
            {"act": "start"},
            {"act": "pause", "minutes": 0},
            {"act": "pause", "minutes": 10**9},
            {},
            [],
        ]
        for wrong in wrongs:
            assert (await phone.post("/api/act", wrong))[0] == 400

    with_page(tmp_path, trial, car=consented(tmp_path))


def test_nothing_that_the_page_can_say_without_a_signature_lets_the_car_work(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, phone: Phone) -> None:
        await phone.pair(tmp_path)
        for act in ("resume", "pause", "need_car", "withdraw", "resume"):
            await phone.post("/api/act", {"act": act})
            assert not car.works

    with_page(tmp_path, trial)


def test_other_sites_can_change_nothing_and_ask_nothing(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, phone: Phone) -> None:
        await phone.pair(tmp_path)
        body = {"act": "pause"}
        assert (await phone.post("/api/act", body, X_Motorpool_Owner="0"))[0] == 403
        assert (await phone.post("/api/act", body, Origin="http://evil.example"))[0] == 403
        assert (await phone.get("/api/state", headers={"Host": "evil.example"}))[
            0
        ] == 421  # a name bound to our address
        assert car.works
        assert (await phone.post("/api/act", body, Origin=phone.url))[0] == 200

    with_page(tmp_path, trial, car=consented(tmp_path))


def test_a_phone_with_its_own_key_becomes_the_owners_and_signs(tmp_path: Path) -> None:
    key = create_owner_key()

    async def trial(car: OwnersCar, phone: Phone) -> None:
        await phone.pair(tmp_path)
        public = base64.b64encode(key.public).decode()
        assert (await phone.post("/api/enrol", {"public": "***"}))[0] == 400
        assert (await phone.post("/api/enrol", {"public": "YQ=="}))[0] == 403
        assert (await phone.post("/api/enrol", {"public": public}))[0] == 200
        other = base64.b64encode(create_owner_key().public).decode()
        assert (await phone.post("/api/enrol", {"public": other}))[0] == 409
        assert not (tmp_path / PRIVATE_NAME).exists()
        papers = (await phone.get("/api/papers"))[1]
        assert (papers["public"], papers["key_in_car"], papers["grant"]) == (public, False, None)
        grant = ConsentGrant(
            vehicle_id=papers["vehicle_id"],
            purposes=("compute",),
            limits=LIMITS,
            granted_ms=papers["next_grant_ms"],
            expires_ms=NOW_MS + HOUR_MS,
        )
        status, state = await phone.post("/api/consent", grant_consent(key, grant))
        assert (status, state["allowed"], state["consent"]["max_watts_w"]) == (200, True, 80)
        assert (await phone.post("/api/consent", grant_consent(create_owner_key(), grant)))[0] == 403
        assert car.works
        withdrawal = ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=NOW_MS)
        status, state = await phone.post("/api/consent", withdraw_consent(key, withdrawal))
        assert (status, state["why"][0]["code"]) == (200, "consent_withdrawn")

    with_page(tmp_path, trial)


def test_taking_back_takes_no_more_steps_than_giving(tmp_path: Path) -> None:
    """On the page: one tap, as the script's only request; and the word needs neither form nor key nor network."""
    script = (page_module.STATIC / "app.js").read_text()
    assert re.search(r'\$\("withdraw"\)\.addEventListener\("click", \(\) => act\(\{ act: "withdraw" \}', script)
    assert "confirm(" not in script.replace('$("confirm")', "")

    async def trial(car: OwnersCar, phone: Phone) -> None:
        await phone.pair(tmp_path)
        (tmp_path / PRIVATE_NAME).unlink()
        assert (await phone.post("/api/act", {"act": "withdraw"}))[1]["why"][0]["code"] == "consent_withdrawn"
        assert not car.works

    with_page(tmp_path, trial, car=consented(tmp_path))


def test_the_log_and_the_statement(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, phone: Phone) -> None:
        await phone.pair(tmp_path)
        car.run(120_000)
        car.log.worked("batch", car.now_ms, lines=2, energy_mwh=10, earned_micro=7, electricity_micro=1, wear_micro=1)
        await phone.post("/api/act", {"act": "pause"})
        car.run(2_000)
        status, told = await phone.get("/api/log?limit=3")
        assert status == 200
        assert len(told["entries"]) == 3
        assert any("earned 0.0000" in entry["words"] for entry in told["entries"])
        assert (await phone.get("/api/log?limit=many"))[0] == 400
        assert len((await phone.get("/api/log?limit=-5"))[1]["entries"]) == 1
        status, told = await phone.get("/api/statement")
        assert (status, told["weeks"][0]["net_micro"]) == (200, 5)

    with_page(tmp_path, trial, car=consented(tmp_path))


def test_every_answer_forbids_what_the_page_does_not_need(tmp_path: Path) -> None:
    async def trial(_: OwnersCar, phone: Phone) -> None:
        for paired in (False, True):
            if paired:
                await phone.pair(tmp_path)
            for path in [*FILES, *PUBLIC, *PRIVATE_PATHS, "/none"]:
                async with phone.session.get(phone.url + path) as answer:
                    for name, value in SAFE_HEADERS.items():
                        assert answer.headers[name] == value, path
                    if paired and path in FILES:
                        assert answer.status == 200
                        assert answer.content_type == FILES[path][1]

    with_page(tmp_path, trial)


def test_strangers_are_slowed_down_and_the_owner_is_not(tmp_path: Path) -> None:
    async def trial(_: OwnersCar, phone: Phone) -> None:
        await phone.pair(tmp_path)
        async with aiohttp.ClientSession() as stranger:
            statuses = []
            for _attempt in range(60):
                async with stranger.get(f"{phone.url}/api/state") as answer:
                    statuses.append(answer.status)
        assert set(statuses) == {401, 429}
        assert (await phone.get("/api/state"))[0] == 200

    with_page(tmp_path, trial)


def test_one_neighbour_cannot_take_all_connections(tmp_path: Path) -> None:
    async def trial(_: OwnersCar, phone: Phone) -> None:
        port = int(phone.url.rsplit(":", 1)[1])
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(MAX_CONNECTIONS_A_HOST + 3)]
        waiting = {asyncio.create_task(reader.read(1)) for reader, _writer in held}
        closed: set[asyncio.Task[bytes]] = set()
        while len(closed) < 3:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            closed |= done
        assert len(waiting) == MAX_CONNECTIONS_A_HOST
        for _reader, writer in held:
            writer.close()
        await asyncio.gather(*closed, *waiting, return_exceptions=True)
        await asyncio.gather(*(writer.wait_closed() for _reader, writer in held), return_exceptions=True)
        assert (await phone.get("/pair"))[0] == 200  # there is room again

    with_page(tmp_path, trial)


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\0" * 100,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5_000,
        b"POST /api/act HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n",
    ],
    ids=["no http", "many headers", "a large body"],
)
def test_rubbish_does_no_harm(tmp_path: Path, rubbish: bytes) -> None:
    async def trial(car: OwnersCar, phone: Phone) -> None:
        await phone.pair(tmp_path)
        _reader, writer = await asyncio.open_connection("127.0.0.1", int(phone.url.rsplit(":", 1)[1]))
        writer.write(rubbish)
        await writer.drain()
        assert (await phone.get("/api/state"))[0] == 200
        assert (await phone.post("/api/consent", b"x" * 100_000))[0] == 413
        assert (await phone.post("/api/act", b"\xff\xfe"))[0] == 400
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        assert car.works

    with_page(tmp_path, trial, car=consented(tmp_path))


def test_beyond_this_computer_it_is_https_with_the_cars_own_certificate(tmp_path: Path) -> None:
    async def trial() -> None:
        car = OwnersCar(tmp_path)
        async with served(car, host="0.0.0.0", names=("127.0.0.1",)) as (page, phone):
            assert page.url.startswith("https://127.0.0.1:")
            address = pairing.load_address(tmp_path)
            assert len(str(address.ca_sha256)) == 64
            trusting = ssl.create_default_context(cadata=(tmp_path / "owner-ca.pem").read_text())
            async with phone.session.get(page.url + "/car-ca.crt", ssl=trusting) as answer:
                assert answer.status == 200
                assert b"PRIVATE" not in await answer.read()
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await phone.session.get(page.url)
            body = msgspec.json.encode({"secret": pairing.offer_pairing(tmp_path, NOW_MS)})
            headers = {page_module.HEADER: "1"}
            async with phone.session.post(page.url + "/api/pair", data=body, headers=headers, ssl=trusting) as answer:
                assert answer.status == 200
                assert "Secure" in answer.headers["Set-Cookie"]
        before = (tmp_path / "owner-ca.pem").read_bytes()
        async with served(OwnersCar(tmp_path), host="0.0.0.0", names=("127.0.0.1",)):
            assert (tmp_path / "owner-ca.pem").read_bytes() == before  # the phone need not trust it again
        async with served(OwnersCar(tmp_path), host="0.0.0.0", names=("car.local",)):
            assert (tmp_path / "owner-ca.pem").read_bytes() != before

    asyncio.run(trial())


def test_an_address_that_cannot_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    async def trial() -> None:
        car = OwnersCar(tmp_path)
        async with served(car) as (page, _):
            port = int(page.url.rsplit(":", 1)[1])
            with pytest.raises(SetupError, match="cannot be served"):
                async with served(car, port=port):
                    pass
        assert not (tmp_path / pairing.PAGE_NAME).exists()
        with pytest.raises(SetupError, match="no page for the owner"):
            pairing.load_address(tmp_path)
        with pytest.raises(SetupError, match="is an address"):
            async with served(car, host="my-car"):
                pass

    asyncio.run(trial())


def test_the_page_asks_nothing_of_the_rest_of_the_world() -> None:
    for path, (name, _) in FILES.items():
        if name.endswith(".png"):
            continue
        text = (page_module.STATIC / name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://", text), path
        assert not re.search(r"\son\w+=|<script>|<style|style=", text), path  # the content policy forbids them
    manifest = json.loads((page_module.STATIC / "manifest.json").read_text())
    assert {icon["src"] for icon in manifest["icons"]} <= set(PUBLIC)
    assert (manifest["display"], manifest["start_url"]) == ("standalone", "/")
    shell = re.search(r"SHELL = (\[[^\]]*\])", (page_module.STATIC / "sw.js").read_text())
    assert shell is not None
    assert set(json.loads(shell[1])) <= set(FILES)


def test_whoever_needs_no_page_does_not_load_it() -> None:
    code = "import sys, motorpool.agent.main, motorpool.agent.owner.desk; print('aiohttp.web' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_default_is_this_computer_alone() -> None:
    assert PageSpec().is_local
    assert PageSpec().name == "localhost"
    spec: dict[str, Any] = {"host": "192.168.4.1", "names": ("car.local",)}
    assert not PageSpec(**spec).is_local
    assert PageSpec(**spec).name == "car.local"
