"""The feed of a relay through a real message server: who may speak for whom, what is refused, what is applied."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from click import UsageError
from click.testing import CliRunner
from nats.aio.msg import Msg
from tests.cell_world import DEADLINE_S, MODEL, run
from tests.test_reporting import DRAWN, state

from motorpool import wire
from motorpool.bus import CellLink, EmbeddedNats, VehicleLink
from motorpool.catalogue import Catalogue, Model
from motorpool.cli.relays import relays
from motorpool.core.sheets import SheetTaken, SheetWriter, decode_answer
from motorpool.errors import CallerError, NotFoundError, SetupError, TrustError
from motorpool.server import feed
from motorpool.server.entries import Entry
from motorpool.server.feed import FedCell, RelayLink
from motorpool.store.blobs import BlobStore
from motorpool.store.database import Database
from motorpool.trust.credentials import CellIdentity, load_identity
from motorpool.trust.relays import (
    RelayPaper,
    enrol_relay,
    load_paper,
    load_relay_credentials,
    save_paper,
    save_relay_credentials,
)
from motorpool.types import VehicleState

CATALOGUE = Catalogue([Model(id=MODEL)])


class Watched(FedCell):
    """A cell that says when a transaction is over."""

    changed: asyncio.Event

    async def _transact(self, entries: list[Entry]) -> None:
        try:
            await super()._transact(entries)
        finally:
            self.changed.set()


class Fed:
    """A cell with its message server, and a relay of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = CellIdentity.generate(0)
        self.nats = EmbeddedNats(folder / "nats", self.identity)
        self.ahead_ms = 0
        self.cell: Watched
        self.relay: RelayLink
        self.writer = SheetWriter(11)
        self.answers: asyncio.Queue[SheetTaken] = asyncio.Queue()

    def now_ms(self) -> int:
        return 1_700_000_000_000 + self.ahead_ms

    async def start(self, *vehicles: str) -> None:
        await self.nats.start()
        self.cell = Watched(
            relays=self.folder / "relays",
            database=Database(self.folder / "cell.db"),
            blobs=BlobStore(self.folder / "files"),
            catalogue=CATALOGUE,
            clock=self.now_ms,
        )
        self.cell.changed = asyncio.Event()
        await self.cell.start(await CellLink.connect([self.nats.url], self.identity, self.cell.on_link))
        await self.cell.listen_to_relays([self.nats.url], self.identity)
        self.cell.enrolled.update(vehicles)
        self.may(*vehicles)
        self.relay = await self.connect("telematics")

    def may(self, *vehicles: str) -> None:
        save_paper(self.folder / "relays", RelayPaper(relay_id="telematics", vehicles=frozenset(vehicles)))

    async def connect(self, relay_id: str) -> RelayLink:
        credentials = enrol_relay(self.identity, relay_id, [self.nats.url], 0)
        return await RelayLink.connect(credentials, lambda data: self.answers.put_nowait(decode_answer(data)))

    async def send(self, data: bytes) -> SheetTaken:
        await self.relay.send(data)
        async with asyncio.timeout(DEADLINE_S):
            return await self.answers.get()

    async def say(self, *states: tuple[str, wire.State]) -> SheetTaken:
        for vehicle, each in states:
            self.writer.add(vehicle, each)
        return await self.send(self.writer.take())

    async def stop(self) -> None:
        await self.relay.close()
        await self.cell.stop()
        await self.nats.stop()


@asynccontextmanager
async def fed(folder: Path, *vehicles: str) -> AsyncIterator[Fed]:
    made = Fed(folder)
    await made.start(*vehicles)
    try:
        yield made
    finally:
        await made.stop()


def test_reports_of_a_relay_are_in_the_tables_and_are_shown(tmp_path: Path) -> None:
    async def test() -> None:
        async with fed(tmp_path, "v1", "v2") as world:
            answer = await world.say(("v1", state(1, soc_pct=55.0, engine="e")), ("v2", state(1)))
            assert (answer.taken, answer.wanted, answer.refused, answer.error) == (2, [], [], "")
            now = state(2, state=VehicleState.WORKING, permit_w=80, risk_15min=0.25, stay_bound_ms=600_000)
            answer = await world.say(("v1", now), ("v2", state(1)))
            assert (answer.feed, answer.number, answer.taken) == (11, 2, 1), "a repeated one is none"
            shown = world.cell.vehicle_state("v1")
            assert shown is not None
            assert msgspec.structs.replace(shown, soc_pct=None, engine="") == now
            assert (shown.soc_pct, shown.engine) == (55.0, "e"), "what columns do not say stays as it was"
            assert world.cell.scheduler.vehicles["v1"].state is VehicleState.WORKING
            stories = world.cell.reader.execute("SELECT what FROM story WHERE subject = 'v1'").fetchall()
            assert [row[0] for row in stories] == ["ready", "working"]

    run(test())


def test_what_the_cell_does_not_know_is_wanted_in_full(tmp_path: Path) -> None:
    async def test() -> None:
        async with fed(tmp_path, "v1", "v2") as world:
            await world.say(("v1", state(1)), ("v2", state(1)))
            direct = state(5, incarnation=DRAWN[1])
            world.cell._on_state("v1", wire.encode(direct))  # it has started anew, and said so by its own link
            answer = await world.say(("v1", state(6)), ("v2", state(2)))
            assert (answer.taken, answer.wanted) == (1, [0])
            assert world.cell.scheduler.vehicles["v1"].incarnation == DRAWN[1]
            world.writer.forget(answer.wanted)
            assert (await world.say(("v1", state(6, incarnation=DRAWN[1])))).taken == 1
            world.cell.strike_off("v2")
            answer = await world.say(("v2", state(3)))
            assert (answer.taken, answer.wanted) == (0, [1])
            world.writer.forget(answer.wanted)
            answer = await world.say(("v2", state(4)))
            assert (answer.taken, answer.refused) == (0, [1])
            assert "v2" not in world.cell.scheduler.vehicles

    run(test())


def test_a_relay_speaks_for_its_own_vehicles_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with fed(tmp_path, "v1", "v2") as world:
            world.cell.enrolled.add("foreign")
            answer = await world.say(("v1", state(1)), ("foreign", state(1)), ("v2", state(1)))
            assert (answer.taken, answer.refused) == (2, [1])
            assert set(world.cell.scheduler.vehicles) == {"v1", "v2"}
            answer = await world.say(("foreign", state(2)), ("v1", state(2)))
            assert (answer.taken, answer.wanted) == (1, [1]), "a number of nobody is nobody"
            world.may("v2")
            world.ahead_ms += feed.LOOK_AGAIN_MS
            answer = await world.say(("v1", state(3)), ("v2", state(3)))
            assert (answer.taken, answer.wanted) == (0, [0, 2])
            world.writer.forget(answer.wanted)
            answer = await world.say(("v1", state(4)), ("v2", state(4)))
            assert (answer.taken, answer.refused) == (1, [0])
            (tmp_path / "relays" / "telematics.json").unlink()
            world.ahead_ms += feed.LOOK_AGAIN_MS
            assert (await world.say(("v2", state(5)))).error == "unknown_relay"
            assert world.cell.scheduler.vehicles["v2"].seq == 4

    run(test())


def test_the_server_lets_a_relay_on_its_own_subjects_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with fed(tmp_path, "v1") as world:
            client = world.relay._connection.client
            other = await world.connect("other")
            await other.send(b"MPVS")
            async with asyncio.timeout(DEADLINE_S):
                assert (await world.answers.get()).error == "unknown_relay"
            heard: list[bytes] = []

            async def hear(message: Msg) -> None:
                heard.append(message.data)

            for subject in (
                wire.down_subject("v1"),
                wire.up_subject("v1", "state"),
                wire.feed_subject("other", "answer"),
            ):
                await client.subscribe(subject, cb=hear)
            world.cell.send("v1", wire.encode(wire.Sync()))
            for subject in (
                wire.up_subject("v1", "state"),
                wire.down_subject("v1"),
                wire.feed_subject("other", "sheet"),
                wire.feed_subject("other", "answer"),
            ):
                await client.publish(subject, wire.encode(state(1)))
            await client.flush()
            car = await VehicleLink.connect(
                world.identity.enrol("v2", [world.nats.url], 0), heard.append, lambda _: None
            )
            await car._connection.client.publish(wire.feed_subject("telematics", "sheet"), b"no sheet")
            await car._connection.client.flush()
            assert (await world.say(("v1", state(7)))).taken == 1
            assert world.answers.empty()
            assert not heard
            assert world.cell.scheduler.vehicles["v1"].seq == 7
            await other.close()
            await car.close()

    run(test())


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_sheet"),
        (b"MPVS" + bytes(40), "unsupported_version"),
        (b"no sheet at all, and long enough to have a head", "invalid_sheet"),
    ],
)
def test_bytes_that_are_no_sheet_are_answered_and_change_nothing(tmp_path: Path, data: bytes, code: str) -> None:
    async def test() -> None:
        async with fed(tmp_path, "v1") as world:
            answer = await world.send(data)
            assert answer.error == code
            assert answer.message
            assert (await world.say(("v1", state(1)))).taken == 1

    run(test())


def test_a_relay_that_is_too_fast_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with fed(tmp_path, "v1") as world:
            monkeypatch.setattr(feed, "MAX_WAITING", 0)
            answer = await world.say(("v1", state(1)))
            assert (answer.error, answer.number) == ("feed_busy", 1)
            monkeypatch.undo()
            assert (await world.say(("v1", state(1)))).wanted == [0]

    run(test())


def test_sheets_wait_for_their_turn_and_each_is_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with fed(tmp_path, "v1") as world:
            for seq in range(1, 11):
                world.writer.add("v1", state(seq))
                await world.relay.send(world.writer.take())
            async with asyncio.timeout(DEADLINE_S):
                answers = [await world.answers.get() for _ in range(10)]
            assert [(answer.number, answer.taken) for answer in answers] == [(number, 1) for number in range(1, 11)]

    run(test())


def test_a_sheet_that_was_lost_in_a_rebuild_holds_up_no_other(tmp_path: Path) -> None:
    async def test() -> None:
        async with fed(tmp_path, "v1") as world:
            world.cell._in_loop = world.cell.scheduler  # it was given a sheet, and then the transaction failed
            world.writer.add("v1", state(1))
            world.cell.on_sheet("telematics", world.writer.take())
            assert len(world.cell._sheets) == 1
            world.cell._restore()
            world.cell.enrolled.add("v1")
            world.cell.ask_all()
            async with asyncio.timeout(DEADLINE_S):
                assert (await world.answers.get()).taken == 1

    run(test())


def test_a_cell_that_rebuilds_its_state_wants_everything_in_full(tmp_path: Path) -> None:
    async def test() -> None:
        async with fed(tmp_path, "v1") as world:
            await world.say(("v1", state(1)))
            world.cell._restore()
            world.cell.enrolled.add("v1")
            answer = await world.say(("v1", state(2)))
            assert (answer.taken, answer.wanted) == (0, [0])
            world.writer.forget([0])
            assert (await world.say(("v1", state(3)))).taken == 1

    run(test())


def test_papers_and_credentials_are_checked(tmp_path: Path) -> None:
    identity = CellIdentity.generate(0)
    with pytest.raises(CallerError):
        enrol_relay(identity, "a.b", [], 0)
    credentials = enrol_relay(identity, "r", ["nats://x"], 0)
    assert credentials.seed not in repr(credentials)
    path = tmp_path / "credentials.json"
    save_relay_credentials(path, credentials)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_relay_credentials(path) == credentials
    with pytest.raises(SetupError):
        load_relay_credentials(tmp_path / "none.json")
    path.write_bytes(b"{")
    with pytest.raises(TrustError):
        load_relay_credentials(path)
    papers = tmp_path / "relays"
    save_paper(papers, RelayPaper(relay_id="r", every=True))
    assert load_paper(papers / "r.json").every
    (papers / "s.json").write_bytes((papers / "r.json").read_bytes())
    (papers / "t.json").write_bytes(b'{"relay_id": "t", "vehicles": ["a b"]}')
    for name, code in (("s", "relay_paper_invalid"), ("t", "relay_paper_invalid"), ("u", "unknown_relay")):
        with pytest.raises(TrustError) as refused:
            load_paper(papers / f"{name}.json")
        assert refused.value.code == code


def test_the_operator_makes_changes_and_takes_away_a_relay(tmp_path: Path) -> None:
    data, credentials = tmp_path / "data", tmp_path / "relay.json"
    fleet = tmp_path / "fleet.txt"
    fleet.write_text("v1\nv2\n")

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(relays, list(arguments), standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result.output

    here = ("--data", str(data))
    with pytest.raises(SetupError):
        call("enrol", "telematics", *here, "--every", "-o", str(credentials))
    load_identity(data / "identity.json", 0)
    with pytest.raises(SetupError):
        call("enrol", "telematics", *here, "--every", "-o", str(credentials))
    server = ("--nats-url", "nats://127.0.0.1:4222")
    with pytest.raises(UsageError):
        call("enrol", "telematics", *here, *server, "-o", str(credentials))
    call("enrol", "telematics", *here, *server, "--vehicles", str(fleet), "-o", str(credentials))
    made = load_relay_credentials(credentials)
    assert (made.relay_id, made.urls) == ("telematics", ["nats://127.0.0.1:4222"])
    path = data / "relays" / "telematics.json"
    assert load_paper(path).vehicles == {"v1", "v2"}
    call("set", "telematics", *here, "--every")
    assert load_paper(path) == RelayPaper(relay_id="telematics", every=True)
    fleet.write_text("v1 a.b")
    with pytest.raises(CallerError):
        call("set", "telematics", *here, "--vehicles", str(fleet))
    call("revoke", "telematics", *here)
    assert not path.exists()
    for arguments in (("revoke", "telematics"), ("set", "telematics", "--every")):
        with pytest.raises(NotFoundError):
            call(*arguments, *here)
