"""The vehicle link on a real NATS server: who may speak where, and what survives the server's death."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from tests.test_docs import ROOT

from motorpool import bus, wire
from motorpool.bus import BusError, CellLink, EmbeddedNats, VehicleLink, WorkMessage, open_client
from motorpool.errors import CallerError, SetupError, TooLargeError, TrustError
from motorpool.presence import Presence
from motorpool.trust.credentials import CellIdentity, VehicleCredentials, load_credentials, save_credentials
from motorpool.trust.nkeys import ACCOUNT, USER, KeyPair
from motorpool.types import MAX_CHECKPOINT_BYTES, MAX_MESSAGE_BYTES, ReturnReason

WAIT_S = 15


class Cell:
    """A server, the cell's end of the link, and everything that reached it."""

    def __init__(
        self, nats_server: EmbeddedNats, identity: CellIdentity, link: CellLink, links: asyncio.Queue[bool]
    ) -> None:
        self.nats = nats_server
        self.identity = identity
        self.link = link
        self.state: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.live: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.work: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.links = links

    def enrol(self, vehicle_id: str) -> VehicleCredentials:
        return self.identity.enrol(vehicle_id, [self.nats.url], 0)

    async def take(self, messages: list[WorkMessage]) -> None:
        for message in messages:
            self.work.put_nowait((message.vehicle_id, message.data))
            await message.acknowledge()


@asynccontextmanager
async def cell_in(folder: Path) -> AsyncIterator[Cell]:
    identity = CellIdentity.generate(0)
    server = EmbeddedNats(folder, identity)
    await server.start()
    links: asyncio.Queue[bool] = asyncio.Queue()
    link = await CellLink.connect([server.url], identity, links.put_nowait)
    cell = Cell(server, identity, link, links)
    await link.listen(lambda v, d: cell.state.put_nowait((v, d)), lambda v, d: cell.live.put_nowait((v, d)))
    link.pull_work(cell.take)
    try:
        yield cell
    finally:
        await link.close()
        await server.stop()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


async def vehicle(cell: Cell, vehicle_id: str, received: asyncio.Queue[bytes]) -> VehicleLink:
    return await VehicleLink.connect(cell.enrol(vehicle_id), received.put_nowait, lambda up: None)


async def raw_client(cell: Cell, vehicle_id: str, problems: asyncio.Queue[str]) -> Client:
    """The vehicle's credentials in the hands of somebody who does not keep to our code."""
    credentials = cell.enrol(vehicle_id)
    client = await open_client(
        credentials.urls, name="x", jwt=credentials.jwt, seed=credentials.seed, inbox=credentials.inbox,
        on_link=lambda up: None,
    )  # fmt: skip

    async def failed(error: Exception) -> None:
        problems.put_nowait(str(error))

    client._error_cb = failed
    return client


def test_messages_reach_the_cell_with_the_vehicle_that_the_server_vouches_for(tmp_path: Path) -> None:
    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            received: asyncio.Queue[bytes] = asyncio.Queue()
            link = await vehicle(cell, "v1", received)
            link.publish_state(b"state")
            link.publish_live(b"live")
            await link.publish_work(b"work", "m1")
            await link.publish_work(b"work", "m1")  # the stream knows the message id: not delivered again
            await link.publish_work(b"more", "m2")
            cell.link.send("v1", b"down")
            async with asyncio.timeout(WAIT_S):
                assert await cell.state.get() == ("v1", b"state")
                assert await cell.live.get() == ("v1", b"live")
                assert [await cell.work.get(), await cell.work.get()] == [("v1", b"work"), ("v1", b"more")]
                assert await received.get() == b"down"
            await link.close()

    run(test)


@pytest.mark.parametrize(
    "subject",
    [
        "mp.v1.up.v2.state",
        "mp.v1.up.v2.work",
        "mp.v1.down.v2",
        "mp.v1.down.v1",
        "mp.v1.up.v1.other",
        "$JS.API.STREAM.INFO.MOTORPOOL_WORK",
        "$JS.API.STREAM.DELETE.MOTORPOOL_WORK",
        "$SYS.REQ.SERVER.PING",
        "_INBOX.c.x",
        "_INBOX.v.v2.x",
    ],
)
def test_a_vehicle_cannot_publish_outside_its_own_subjects(tmp_path: Path, subject: str) -> None:
    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            problems: asyncio.Queue[str] = asyncio.Queue()
            client = await raw_client(cell, "v1", problems)
            await client.publish(subject, b"forged")
            async with asyncio.timeout(WAIT_S):
                assert "permissions violation" in (await problems.get()).lower()
            assert cell.state.empty()
            assert cell.work.empty()
            await client.close()

    run(test)


@pytest.mark.parametrize(
    "subject",
    [
        *(">", "mp.>", "mp.v1.down.>", "mp.v1.down.v2", "mp.v1.up.v1.state", "$SYS.>"),
        *("_INBOX.>", "_INBOX.c.>", "_INBOX.v.>", "_INBOX.v.v2.>", "_INBOX.v1.>"),
    ],
)
def test_a_vehicle_cannot_listen_to_anything_but_its_own_subject_and_inbox(tmp_path: Path, subject: str) -> None:
    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            problems: asyncio.Queue[str] = asyncio.Queue()
            client = await raw_client(cell, "v1", problems)
            await client.subscribe(subject)
            await client.flush()
            async with asyncio.timeout(WAIT_S):
                assert "permissions violation" in (await problems.get()).lower()
            await client.close()

    run(test)


@pytest.mark.parametrize("name", ["cell", "c", "v"])
def test_a_vehicle_by_whatever_name_hears_nothing_that_is_for_the_cell(tmp_path: Path, name: str) -> None:
    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            problems: asyncio.Queue[str] = asyncio.Queue()
            overheard: list[bytes] = []

            async def overhear(message: Msg) -> None:
                overheard.append(message.data)

            client = await raw_client(cell, name, problems)
            for prefix in (f"_INBOX.{name}", "_INBOX.c", f"_INBOX.v.{name}"):
                await client.subscribe(f"{prefix}.>", cb=overhear)
            await client.flush()
            honest = await vehicle(cell, "v1", asyncio.Queue())
            for number in range(3):
                await honest.publish_work(b"a result", f"m{number}")
            async with asyncio.timeout(WAIT_S):
                for _ in range(3):
                    assert await cell.work.get() == ("v1", b"a result")
            await client.flush()
            assert overheard == []
            assert problems.qsize() == 2  # for the first two; the third is its own
            await honest.close()
            await client.close()

    run(test)


def test_credentials_of_another_cell_are_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            forged = CellIdentity.generate(0).enrol("v1", [cell.nats.url], 0)
            with pytest.raises(BusError):
                await VehicleLink.connect(forged, lambda data: None, lambda up: None)

    run(test)


def test_a_killed_server_comes_back_on_its_port_with_the_work_that_it_had_confirmed(tmp_path: Path) -> None:
    async def test() -> None:
        identity = CellIdentity.generate(0)
        server = EmbeddedNats(tmp_path, identity)
        await server.start()
        cell_link = await CellLink.connect([server.url], identity, lambda up: None)
        links: asyncio.Queue[bool] = asyncio.Queue()
        link = await VehicleLink.connect(identity.enrol("v1", [server.url], 0), lambda data: None, links.put_nowait)
        await link.publish_work(b"before", "m1")  # the cell does not read yet
        assert server.process is not None
        server.process.send_signal(signal.SIGKILL)
        await server.process.wait()
        async with asyncio.timeout(WAIT_S):
            assert await links.get() is False
        again = EmbeddedNats(tmp_path, identity)
        assert again.port == server.port
        await again.start()
        async with asyncio.timeout(WAIT_S):
            assert await links.get() is True
        while True:
            try:
                await link.publish_work(b"after", "m2")
                break
            except BusError:
                continue
        cell = Cell(again, identity, cell_link, asyncio.Queue())
        cell_link.pull_work(cell.take)
        async with asyncio.timeout(WAIT_S):
            assert [await cell.work.get(), await cell.work.get()] == [("v1", b"before"), ("v1", b"after")]
        await link.close()
        await cell_link.close()
        await again.stop()

    run(test)


def offend(client: Client) -> None:
    """Say what the server answers with an error and an end of the connection, upon which nats-py closes for ever."""
    assert client._transport is not None
    client._transport.write(b"NONSENSE\r\n")


def test_after_an_error_that_the_server_told_the_vehicle_connects_anew(tmp_path: Path) -> None:
    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            links: asyncio.Queue[bool] = asyncio.Queue()
            received: asyncio.Queue[bytes] = asyncio.Queue()
            link = await VehicleLink.connect(cell.enrol("v1"), received.put_nowait, links.put_nowait)
            for round_ in range(3):
                old = link._connection.client
                offend(old)
                async with asyncio.timeout(WAIT_S):
                    assert [await links.get(), await links.get()] == [False, True]
                    assert old.is_closed
                    assert link.connected
                    await link.publish_work(b"work", f"m{round_}")
                    assert await cell.work.get() == ("v1", b"work")
                    cell.link.send("v1", b"down")
                    assert await received.get() == b"down"
            assert received.empty()
            await link.close()

    run(test)


def test_a_client_that_closed_without_a_word_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "CHECK_CLIENT_S", 0.05)

    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            links: asyncio.Queue[bool] = asyncio.Queue()
            link = await VehicleLink.connect(cell.enrol("v1"), lambda data: None, links.put_nowait)
            await link._connection.client._close(Client.CLOSED, do_cbs=False)
            async with asyncio.timeout(WAIT_S):
                assert [await links.get(), await links.get()] == [False, True]
            await link.publish_work(b"work", "m1")
            await link.close()

    run(test)


def test_after_an_error_that_the_server_told_the_cell_connects_anew_and_takes_work_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            link = await vehicle(cell, "v1", asyncio.Queue())
            old = cell.link._connection.client
            async with asyncio.timeout(WAIT_S):
                await link.publish_work(b"before", "m0")
                assert await cell.work.get() == ("v1", b"before")
                offend(old)
                await link.publish_work(b"meanwhile", "m1")
                assert [await cell.links.get(), await cell.links.get()] == [False, True]
                assert old.is_closed
                assert cell.link.connected
                await link.publish_work(b"after", "m2")
                came: set[bytes] = set()
                while not came >= {b"meanwhile", b"after"}:  # what was not acknowledged in time comes again
                    came.add((await cell.work.get())[1])
                link.publish_state(b"state")
                assert await cell.state.get() == ("v1", b"state")
            cell.link.check()
            assert cell.state.empty()
            await link.close()

    run(test)


def test_a_server_that_goes_away_before_the_subscription_stands_is_one_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "CONNECT_TIMEOUT_S", 1)
    monkeypatch.setattr(bus, "ACK_TIMEOUT_S", 1)
    info = {"server_id": "x", "version": "2.10.0", "proto": 1, "headers": True, "max_payload": bus.MAX_PAYLOAD_BYTES}

    async def go_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO " + msgspec.json.encode(info) + b"\r\n")
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
            if line.startswith(b"SUB"):
                break
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(go_away, "127.0.0.1", 0)
        url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        identity = CellIdentity.generate(0)
        with pytest.raises(BusError, match="does not answer any more"):
            await VehicleLink.connect(identity.enrol("v1", [url], 0), lambda data: None, lambda up: None)
        with pytest.raises(BusError):
            await CellLink.connect([url], identity, lambda up: None)
        server.close()

    run(test)


class SmallNats(EmbeddedNats):
    """A server of somebody who did not know what it is for."""

    def _write_config(self) -> Path:
        path = super()._write_config()
        path.write_text(re.sub(r"max_payload: \d+\n", "", path.read_text("utf-8")), "utf-8")
        return path


def test_a_server_for_small_messages_is_refused_at_both_ends(tmp_path: Path) -> None:
    async def test() -> None:
        identity = CellIdentity.generate(0)
        server = SmallNats(tmp_path, identity)
        await server.start()
        with pytest.raises(SetupError, match=f"set max_payload: {bus.MAX_PAYLOAD_BYTES}"):
            await CellLink.connect([server.url], identity, lambda up: None)
        with pytest.raises(SetupError, match=f"set max_payload: {bus.MAX_PAYLOAD_BYTES}"):
            await VehicleLink.connect(identity.enrol("v1", [server.url], 0), lambda data: None, lambda up: None)
        await server.stop()

    run(test)


def test_the_operators_guide_says_which_messages_the_server_must_take() -> None:
    assert f"`max_payload: {bus.MAX_PAYLOAD_BYTES}`" in (ROOT / "docs" / "operator.md").read_text("utf-8")


def test_an_unreachable_server_is_told_in_one_line(tmp_path: Path) -> None:
    async def test() -> None:
        nobody = EmbeddedNats(tmp_path, CellIdentity.generate(0))
        credentials = CellIdentity.generate(0).enrol("v1", [nobody.url], 0)
        with pytest.raises(BusError, match=r"cannot reach the message server at nats://127.0.0.1"):
            await VehicleLink.connect(credentials, lambda data: None, lambda up: None)

    run(test)


def test_a_port_in_use_is_told_with_what_to_do(tmp_path: Path) -> None:
    async def test() -> None:
        async with cell_in(tmp_path / "a") as cell:
            other = EmbeddedNats(tmp_path / "b", CellIdentity.generate(0), port=cell.nats.port)
            with pytest.raises(SetupError, match="in use"):
                await other.start()

    run(test)


def test_credentials_are_kept_private_and_never_shown(tmp_path: Path) -> None:
    credentials = CellIdentity.generate(0).enrol("v1", ["nats://127.0.0.1:1"], 0)
    path = tmp_path / "v1.creds"
    save_credentials(path, credentials)
    assert path.stat().st_mode & 0o077 == 0
    assert load_credentials(path) == credentials
    assert credentials.seed not in repr(credentials)
    assert credentials.jwt not in repr(credentials)
    path.write_bytes(b"{}")
    with pytest.raises(TrustError, match="enrol the vehicle again"):
        load_credentials(path)
    with pytest.raises(SetupError, match="enrol"):
        load_credentials(tmp_path / "missing")


def test_nkeys_come_back_from_their_seeds_and_wrong_ones_are_refused() -> None:
    for role, letter in ((USER, "U"), (ACCOUNT, "A")):
        key = KeyPair.generate(role)
        assert key.public[0] == letter
        assert key.seed[:2] == "S" + letter
        assert KeyPair.from_seed(key.seed).public == key.public
    seed = KeyPair.generate(USER).seed
    changed = seed[:20] + ("A" if seed[20] != "A" else "B") + seed[21:]
    for wrong in (changed, "nonsense!", seed[:20], KeyPair.generate(USER).public):
        with pytest.raises(TrustError):
            KeyPair.from_seed(wrong)


@pytest.mark.parametrize("vehicle_id", ["", "a.b", "a b", "*", ">", "x" * 65, "a/b", "ä"])
def test_an_id_that_could_leave_its_subject_is_refused(vehicle_id: str) -> None:
    with pytest.raises(CallerError) as caught:
        CellIdentity.generate(0).enrol(vehicle_id, [], 0)
    assert caught.value.param == "vehicle_id"


def test_messages_are_versioned_and_bounded() -> None:
    sync = wire.encode(wire.Sync())
    assert wire.decode(wire.DOWN, sync) == wire.Sync()
    newer = msgspec.msgpack.encode({"t": "sync", "v": 2})
    with pytest.raises(CallerError, match="version 2"):
        wire.decode(wire.DOWN, newer)
    extended = msgspec.msgpack.encode({"t": "sync", "v": 1, "added_later": True})
    assert wire.decode(wire.DOWN, extended) == wire.Sync()
    with pytest.raises(CallerError):
        wire.decode(wire.DOWN, b"\xff")
    big = wire.Returned(
        incarnation="i", message_id="m", lease_id="l", job_id="j", reason=ReturnReason.GUARD,
        items=[wire.ReturnItem(line=0, checkpoint=b"x" * MAX_MESSAGE_BYTES)],
    )  # fmt: skip
    with pytest.raises(TooLargeError):
        wire.encode(big)


LONG = "x" * 257
CHECKPOINT = wire.encode_checkpoint(wire.Checkpoint(text="abcd", tokens=3, token_ids=[7, 8, 9]))
GRANT = {
    "t": "grant", "v": 1, "lease_id": "l", "incarnation": "i", "job_id": "j", "kind": "completions", "model": "m",
    "ttl_ms": 1, "items": [[0, b"body", CHECKPOINT]],
}  # fmt: skip
OPEN = {
    "t": "open", "v": 1, "request_id": "r", "attempt": 0, "kind": "completions", "model": "m", "stream": True,
    "body": b"body", "checkpoint": CHECKPOINT,
}  # fmt: skip
REVOKE = {"t": "revoke", "v": 1, "lease_id": "l", "lines": [1]}
CLOSE = {"t": "close", "v": 1, "request_id": "r"}


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (GRANT, [{name: LONG} for name in ("lease_id", "incarnation", "job_id", "model", "media_type")]),
        (GRANT, [{"ttl_ms": -1}, {"ttl_ms": 1 << 51}, {"items": [[0, b"", b"x" * (MAX_CHECKPOINT_BYTES + 1)]]}]),
        (GRANT, [{"items": [[-1, b""]]}, {"items": [[1 << 31, b""]]}, {"items": [[0, b""]] * 4_097}]),
        (OPEN, [{name: LONG} for name in ("request_id", "model", "media_type")]),
        (OPEN, [{"attempt": -1}, {"attempt": 1 << 51}, {"checkpoint": b"x" * (MAX_CHECKPOINT_BYTES + 1)}]),
        (REVOKE, [{"lease_id": LONG}, {"lines": [-1]}, {"lines": [1] * 4_097}]),
        (CLOSE, [{"request_id": LONG}]),
    ],
)
def test_what_the_cell_says_is_bounded(message: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    wire.decode(wire.DOWN, msgspec.msgpack.encode(message))
    for change in changes:
        with pytest.raises(CallerError):
            wire.decode(wire.DOWN, msgspec.msgpack.encode(message | change))


def test_bytes_that_are_no_message_are_refused_whatever_they_are() -> None:
    sound = msgspec.msgpack.encode(CLOSE)
    for data in (
        msgspec.msgpack.encode(CLOSE | {"request_id": "abcd"}).replace(b"abcd", b"\xff\xfe\xfd\xfc"),
        msgspec.msgpack.encode(CLOSE | {"later": 0})[:-1] + b"\x91" * 200_000 + b"\xc0",
        sound[:-1],
        b"",
        b"\x91" * 200_000,
    ):
        with pytest.raises(CallerError):
            wire.decode(wire.DOWN, data)


def test_how_long_a_checkpoint_is_can_be_known_without_reading_all_of_it() -> None:
    assert wire.checkpoint_tokens(CHECKPOINT) == 3
    for damaged in (CHECKPOINT.replace(b"abcd", b"\xff\xfe\xfd\xfc"), CHECKPOINT[:-1], b"", b"\x91" * 200_000):
        with pytest.raises(CallerError):
            wire.checkpoint_tokens(damaged)


def test_the_link_can_be_lost_and_the_error_is_one_to_try_again(tmp_path: Path) -> None:
    async def test() -> None:
        identity = CellIdentity.generate(0)
        server = EmbeddedNats(tmp_path, identity)
        await server.start()
        link = await VehicleLink.connect(identity.enrol("v1", [server.url], 0), lambda data: None, lambda up: None)
        with pytest.raises(BusError, match="did not confirm"):
            await link.publish_work(b"x", "m1")  # nobody has made the stream yet
        await link.close()
        await server.stop()

    run(test)


def test_a_client_without_credentials_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            reader, writer = await asyncio.open_connection("127.0.0.1", cell.nats.port)
            writer.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
            async with asyncio.timeout(WAIT_S):
                assert (await reader.readline()).startswith(b"INFO ")
                assert b"Authorization Violation" in await reader.read()
            writer.close()

    run(test)


# -- who leaves


async def watched(folder: Path, test: Callable[[Cell, asyncio.Queue[str]], Awaitable[None]]) -> None:
    """Run a test with a cell that is told whose connection ends."""
    async with cell_in(folder) as cell:
        gone: asyncio.Queue[str] = asyncio.Queue()
        await cell.link.listen(lambda v, d: None, lambda v, d: None, gone.put_nowait)
        await watching(cell.link)
        await test(cell, gone)


async def watching(link: CellLink, up: bool = True) -> None:
    async with asyncio.timeout(WAIT_S):
        while link.watching is not up:
            passed = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(passed.set_result, None)
            await passed


def break_off(client: Client) -> None:
    """End the connection as the kernel does when the process dies."""
    assert client._transport is not None
    client._transport._io_writer.transport.abort()  # type: ignore[attr-defined]


def test_the_end_of_a_vehicles_connection_is_told_at_once(tmp_path: Path) -> None:
    async def test(cell: Cell, gone: asyncio.Queue[str]) -> None:
        for name in ("v1", "cell", "watch"):
            link = await vehicle(cell, name, asyncio.Queue())
            break_off(link._connection.client)
            async with asyncio.timeout(WAIT_S):
                assert await gone.get() == name
            await link.close()
        assert cell.link.connected

    run(lambda: watched(tmp_path, test))


def test_a_vehicle_that_has_connected_anew_is_not_gone_when_its_old_connection_ends(tmp_path: Path) -> None:
    async def test(cell: Cell, gone: asyncio.Queue[str]) -> None:
        credentials = cell.enrol("v1")
        old = await VehicleLink.connect(credentials, lambda data: None, lambda up: None)
        new = await VehicleLink.connect(credentials, lambda data: None, lambda up: None)
        await old.close()
        other = await vehicle(cell, "v2", asyncio.Queue())
        await other.close()
        async with asyncio.timeout(WAIT_S):
            assert await gone.get() == "v2", "the end of the old connection came before, and said nothing"
        await new.close()
        async with asyncio.timeout(WAIT_S):
            assert await gone.get() == "v1"

    run(lambda: watched(tmp_path, test))


def test_after_the_server_was_away_whoever_leaves_is_told_again(tmp_path: Path) -> None:
    async def test(cell: Cell, gone: asyncio.Queue[str]) -> None:
        assert cell.link._watch is not None
        link = await vehicle(cell, "v1", asyncio.Queue())
        presence = cell.link._watch._presence
        while "v1" not in presence._connections:
            await cell.link._watch._connection.client.flush()
        offend(cell.link._watch._connection.client)  # it hears nothing for a while
        await watching(cell.link, up=False)
        await watching(cell.link)
        assert len(presence) == 0, "what is not known any more is no reason to take a vehicle for present"
        await link.close()
        async with asyncio.timeout(WAIT_S):
            assert await gone.get() == "v1"

    run(lambda: watched(tmp_path, test))


def test_the_user_that_hears_who_leaves_may_do_nothing_else(tmp_path: Path) -> None:
    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            problems: asyncio.Queue[str] = asyncio.Queue()
            client = await open_client(
                [cell.nats.url], name="x", jwt=cell.identity.watch_jwt(), seed=cell.identity.user_seed,
                inbox="_INBOX.w", on_link=lambda up: None,
            )  # fmt: skip

            async def failed(error: Exception) -> None:
                problems.put_nowait(str(error))

            client._error_cb = failed
            account, other = KeyPair.from_seed(cell.identity.account_seed).public, KeyPair.generate(ACCOUNT).public
            for subject in (
                "$SYS.REQ.SERVER.PING",
                "$SYS.REQ.SERVER.PING.CONNZ",
                "$SYS.REQ.CLAIMS.UPDATE",
                f"$SYS.REQ.ACCOUNT.{account}.INFO",
                f"$SYS.REQ.ACCOUNT.{other}.CONNZ",
                "_INBOX.w.x",
                "mp.v1.down.v1",
            ):
                await client.publish(subject, b"")
                async with asyncio.timeout(WAIT_S):
                    assert "permissions violation" in (await problems.get()).lower()
            for subject in ("$SYS.>", "$SYS.ACCOUNT.*.DISCONNECT", "_INBOX.>", "_INBOX.c.>", "mp.>"):
                await client.subscribe(subject)
                async with asyncio.timeout(WAIT_S):
                    assert "permissions violation" in (await problems.get()).lower()
            await client.close()

    run(test)


def test_a_server_without_that_user_serves_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "CONNECT_TIMEOUT_S", 0.2)

    async def test() -> None:
        async with cell_in(tmp_path) as cell:
            monkeypatch.setattr(CellIdentity, "watch_jwt", CellIdentity.generate(0).watch_jwt)
            await cell.link.listen(lambda v, d: cell.state.put_nowait((v, d)), lambda v, d: None, lambda v: None)
            watch = cell.link._watch
            assert watch is not None
            assert watch._starting is not None
            link = await vehicle(cell, "v1", asyncio.Queue())
            link.publish_state(b"state")
            async with asyncio.timeout(WAIT_S):
                assert await cell.state.get() == ("v1", b"state")
            assert not cell.link.watching
            await link.close()

    run(test)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"client":{"id":1,"jwt":"a.b.c"},"server":{"id":"s"}}'])
def test_a_notice_that_is_none_changes_nothing(data: bytes) -> None:
    presence = Presence()
    presence.came(data)
    assert presence.went(data) is None
    assert len(presence) == 0
