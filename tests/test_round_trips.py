"""How far away vehicles are, as the message server measures it: read from its answers, and asked of a real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cell_world import CATALOGUE
from tests.test_bus import WAIT_S, Cell, cell_in, run, vehicle, watching

from motorpool import bus
from motorpool.bus import CellLink, EmbeddedNats, open_client
from motorpool.presence import duration_ms, page_of, round_trips
from motorpool.server import loop
from motorpool.server.loop import CellLoop
from motorpool.store.blobs import BlobStore
from motorpool.store.database import Database
from motorpool.trust.credentials import CellIdentity, vehicle_in
from motorpool.trust.nkeys import KeyPair, issue, user_claims

IDENTITY = CellIdentity.generate(0)
JWTS = {name: IDENTITY.enrol(name, [], 0).jwt for name in ("v1", "v2", "v3")}


def answer(*connections: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"server": {"id": "s"}, "data": {"connections": connections, **more}}).encode()


# -- what the server writes


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("850µs", 0.85), ("7us", 0.007), ("1.2ms", 1.2), ("3.482957ms", 3.482957),
        ("2.01s", 2010.0), ("1m2.5s", 62_500.0), ("1h0m1s", 3_601_000.0), ("100ns", 0.0001), ("0s", 0.0),
    ],
)  # fmt: skip
def test_durations_are_read_as_the_server_writes_them(text: str, milliseconds: float) -> None:
    assert duration_ms(text) == pytest.approx(milliseconds)


@pytest.mark.parametrize(
    "text", ["", "ms", "1.2", "-1ms", "1.2 ms", "1.ms", "nan", "infs", "1e9s", "٣ms", "9" * 400 + "s"]
)
def test_what_is_no_duration_counts_as_not_measured(text: str) -> None:
    assert duration_ms(text) == 0


def test_the_vehicle_is_the_one_that_the_server_let_in_and_its_newest_connection_counts() -> None:
    data = answer(
        {"cid": 9, "jwt": JWTS["v1"], "rtt": "1.2ms", "name": "v2"},
        {"cid": 7, "jwt": JWTS["v1"], "rtt": "80ms", "name": "v1"},
        {"cid": 8, "jwt": JWTS["v2"], "rtt": "850µs", "name": "watch"},
        {"cid": 10, "jwt": JWTS["v3"], "rtt": "0s"},  # not measured yet
        {"cid": 11, "jwt": IDENTITY.cell_jwt(), "rtt": "1ms", "name": "v3"},
        {"cid": 12, "jwt": "", "rtt": "1ms", "name": "v3"},
        {"cid": 13},
        num_connections=7,
        total=7,
    )
    assert round_trips(data) == pytest.approx({"v1": 1.2, "v2": 0.85})
    page = page_of(data)
    assert page is not None
    assert page.connections == 7


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"\xff", b'{"data":{}}', b'{"data":{"connections":null}}', b'{"error":{"code":400}}',
        b'{"data":{"connections":[{"cid":"1","rtt":"1ms"}]}}', b'{"data":{"connections":' + b"[" * 200_000,
        b'{"x":' + b"[" * 200_000, answer({"cid": 1, "jwt": JWTS["v1"], "rtt": "1ms"})[:-1],
    ],
)  # fmt: skip
def test_a_damaged_answer_gives_nothing(data: bytes) -> None:
    assert round_trips(data) == {}
    assert page_of(data) is None


@pytest.mark.parametrize(
    "jwt", ["ü.ü.ü", "a.é.c", "..", "a.b.c", "a.W1tb.c", "a.eyJuYW1lIjoxfQ.c", "\ud800.\ud800.\ud800"]
)
def test_a_jwt_that_cannot_be_read_is_of_no_vehicle(jwt: str) -> None:
    assert vehicle_in(jwt) is None


@given(st.binary(max_size=400))
def test_no_bytes_raise(data: bytes) -> None:
    assert round_trips(data) == {}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(list(JWTS.values())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["cid", "jwt", "rtt"]), inner),
    max_leaves=12,
)


@given(st.lists(st.fixed_dictionaries({"cid": JSON, "jwt": JSON, "rtt": JSON}) | JSON, max_size=4), JSON)
def test_no_answer_of_another_shape_raises(connections: list[Any], other: Any) -> None:
    for value in (connections, other):
        for whole in (value, {"data": value}, {"data": {"connections": value}}):
            found = round_trips(json.dumps(whole).encode())
            assert all(name in JWTS and each > 0 for name, each in found.items())


@given(
    st.lists(
        st.fixed_dictionaries(
            {"cid": st.integers(), "jwt": st.sampled_from([*JWTS.values(), "a.b.c"]), "name": st.text(max_size=8),
             "rtt": st.integers(0, 10**6).map("{}µs".format)}
        ),
        max_size=8,
    )
)  # fmt: skip
def test_every_answer_of_the_right_shape_is_read(connections: list[dict[str, Any]]) -> None:
    expected = {}
    for each in sorted(connections, key=lambda each: each["cid"]):
        for name, jwt in JWTS.items():
            if each["jwt"] == jwt and each["rtt"] != "0µs":
                expected[name] = int(each["rtt"][:-2]) / 1000
    assert round_trips(answer(*connections)) == pytest.approx(expected)


# -- what a real server answers


async def known(link: CellLink, vehicles: set[str]) -> dict[str, float]:
    """Ask until the server has measured these vehicles: it does so a moment after they have come."""
    async with asyncio.timeout(WAIT_S):
        while True:
            found = await link.round_trips()
            if set(found) == vehicles:
                return found


@contextlib.asynccontextmanager
async def listening(folder: Path) -> Any:
    async with cell_in(folder) as cell:
        await cell.link.listen(lambda v, d: None, lambda v, d: None, lambda v: None)
        yield cell


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "how far away" in each.getMessage()]


def test_the_round_trips_of_connected_vehicles_are_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with listening(tmp_path) as cell:
            assert await cell.link.round_trips() == {}, "the cell's own connections are no vehicles"
            links = [await vehicle(cell, name, asyncio.Queue()) for name in ("v1", "v2")]
            found = await known(cell.link, {"v1", "v2"})
            assert all(each > 0 for each in found.values())
            await links[0].close()
            assert set(await known(cell.link, {"v2"})) == {"v2"}
            await links[1].close()

    run(test)
    assert warnings_of(caplog) == []


def test_all_pages_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "PAGE_CONNECTIONS", 2)

    async def test() -> None:
        async with listening(tmp_path) as cell:
            names = {f"v{number}" for number in range(5)}
            links = [await vehicle(cell, name, asyncio.Queue()) for name in sorted(names)]
            await known(cell.link, names)
            monkeypatch.setattr(bus, "MAX_PAGES", 1)
            assert len(await cell.link.round_trips()) <= 2, "what is asked for has a bound"
            for link in links:
                await link.close()

    run(test)


def old_watch_jwt(identity: CellIdentity) -> str:
    """The user as it was before it was allowed to ask."""
    claims = user_claims(publish=["_INBOX.w"], subscribe=identity.watched)
    user = KeyPair.from_seed(identity.user_seed)
    return issue(KeyPair.from_seed(identity.system_seed), user.public, "watch", claims, 0)


def test_without_the_permission_nothing_is_known_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bus, "ASK_TIMEOUT_S", 0.5)
    monkeypatch.setattr(CellIdentity, "watch_jwt", old_watch_jwt)

    async def test() -> None:
        async with listening(tmp_path) as cell:
            await watching(cell.link)
            link = await vehicle(cell, "v1", asyncio.Queue())
            for _ in range(3):
                assert await cell.link.round_trips() == {}
            assert cell.link.watching, "it hears of connections as before"
            await link.close()

    run(test)
    assert len(warnings_of(caplog)) == 1


def test_where_the_server_does_not_know_the_user_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bus, "CONNECT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(bus, "ASK_TIMEOUT_S", 0.5)

    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            assert await cell.link.round_trips() == {}, "nobody listens"
            monkeypatch.setattr(CellIdentity, "watch_jwt", CellIdentity.generate(0).watch_jwt)
            await cell.link.listen(lambda v, d: None, lambda v, d: None, lambda v: None)
            for _ in range(2):
                assert await cell.link.round_trips() == {}

    run(test)
    assert len(warnings_of(caplog)) == 1


def test_a_user_that_may_ask_is_told_of_its_own_account_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            client = await asker(cell)
            system = KeyPair.from_seed(cell.identity.system_seed).public
            body = json.dumps({"auth": True, "acc": system, "subscriptions": True}).encode()
            told = json.loads((await client.request(cell.identity.connections, body, timeout=WAIT_S)).data)
            account = KeyPair.from_seed(cell.identity.account_seed).public
            assert {each["account"] for each in told["data"]["connections"]} == {account}
            await client.close()

    run(test)


async def asker(cell: Cell) -> Any:
    return await open_client(
        [cell.nats.url], name="x", jwt=cell.identity.watch_jwt(), seed=cell.identity.user_seed, inbox="_INBOX.w",
        on_link=lambda up: None,
    )  # fmt: skip


def test_the_cell_gives_what_it_is_told_to_the_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "ROUND_TRIPS_EVERY_S", 0.0)

    async def test() -> None:
        nats = EmbeddedNats(tmp_path / "nats", IDENTITY)
        await nats.start()
        blobs = BlobStore(tmp_path / "files")
        database = Database(tmp_path / "cell.db")
        cell = CellLoop(database=database, blobs=blobs, catalogue=CATALOGUE, clock=lambda: 1_800_000_000_000)
        told: asyncio.Queue[dict[str, float]] = asyncio.Queue()
        take = cell._on_round_trips

        def taken(found_ms: dict[str, float]) -> None:
            take(found_ms)
            told.put_nowait(dict(cell.desk.places.round_trips_ms))

        monkeypatch.setattr(cell, "_on_round_trips", taken)
        await cell.start(await CellLink.connect([nats.url], IDENTITY, cell.on_link))
        link = await bus.VehicleLink.connect(IDENTITY.enrol("v1", [nats.url], 0), lambda d: None, lambda up: None)
        async with asyncio.timeout(WAIT_S):
            while not (found := await told.get()):
                cell.check()
        assert found.keys() == {"v1"}
        assert found["v1"] > 0
        await link.close()
        await cell.stop()
        assert cell._measuring is not None
        assert cell._measuring.done()
        await nats.stop()

    with caplog.at_level(logging.WARNING):
        run(test)
    assert warnings_of(caplog) == []
