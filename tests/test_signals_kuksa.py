"""Signals from a databroker: pushes, ages, lost and lying brokers, and that the agent only ever reads."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from motorpool.agent.signals import broker as broker_module
from motorpool.agent.signals import kuksa, vss
from motorpool.agent.signals.broker import Scope, StandIn, point
from motorpool.agent.signals.car import Action, CarSpec, SimulatedCar
from motorpool.agent.signals.kuksa import KuksaConfig, KuksaSource
from motorpool.agent.signals.kuksa_proto import types_pb2, val_pb2
from motorpool.agent.signals.owner_port import play_owner
from motorpool.agent.signals.regions import box
from motorpool.core.guard import Budgets, ConsentView, History, Policy, decide
from motorpool.core.signals import NEEDED, TABLE, Reading, Signals, is_young
from motorpool.errors import SetupError
from motorpool.types import Permit

DEADLINE_S = 20
POLL_MS = 10
READS = {"ListMetadata", "GetValue", "GetValues", "Subscribe"}
DOOR = "Vehicle.Cabin.Door.Row1.DriverSide.IsOpen"
CONSENT = ConsentView(refusal=None, max_watts_w=500, floor_pct=0.0, expires_ms=10**15)


class Broker(StandIn):
    """A stand-in that tells of each call, and can leave calls out of its service."""

    heard: Callable[[], None] = staticmethod(lambda: None)
    missing: frozenset[str] = frozenset()
    hangs: bool = False

    async def _allow(self, context: Any, call: str, scope: Scope = Scope.READ) -> None:
        try:
            await super()._allow(context, call, scope)
        finally:
            self.heard()
        if self.hangs:
            await asyncio.Event().wait()
        if call in self.missing:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")


class World:
    """A car, its broker and the source, on one clock that the test moves."""

    def __init__(self, *, spec: CarSpec | None = None, **options: Any) -> None:
        self.now_ms = 1_000_000_000
        self.car = SimulatedCar(spec or CarSpec(), self.now_ms)
        self.options = options
        self.broker = self.new_broker()
        self.source = KuksaSource(KuksaConfig(), self.clock)
        self._changed = asyncio.Event()

    def clock(self) -> int:
        return self.now_ms

    def new_broker(self) -> Broker:
        broker = Broker(self.car, self.clock, **self.options)
        broker.heard = self._changed_now
        return broker

    def _changed_now(self) -> None:
        self._changed.set()

    @asynccontextmanager
    async def running(self, **config: Any) -> AsyncIterator[None]:
        await self.broker.start()
        settings = KuksaConfig(address=self.broker.address, poll_ms=POLL_MS, **config)
        self.source = KuksaSource(settings, self.clock)
        self.source.on_change(self._changed.set)
        try:
            async with self.source:
                yield
        finally:
            await self.broker.stop()

    async def until(self, condition: Callable[[], object]) -> None:
        """Look whenever the broker is called or a signal changes; every poll is a call."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def advance(self, by_ms: int) -> None:
        self.now_ms += by_ms
        self.broker.tick()

    def read(self) -> Signals:
        return self.source.read(self.now_ms)

    def is_young(self, name: str) -> bool:
        reading = getattr(self.read(), name)
        return reading is not None and is_young(name, reading, self.now_ms)

    async def settle(self) -> None:
        """Until the source has the values, and two heartbeats have shown that they are not old."""
        await self.until(lambda: self.read().doors_open is not None)
        self.advance(1_000)
        await self.until(lambda: all(self.is_young(name) for name in ("doors_open", "speed_kmh", "pack_temp_c")))

    async def polls(self, count: int) -> None:
        """That many more polls begin, so that all before the last were taken."""
        enough = len(self.broker.calls) + count
        await self.until(lambda: len(self.broker.calls) >= enough)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once the source has said that something is wrong with its broker."""
    said, tell = asyncio.Event(), KuksaSource._tell

    def told(source: KuksaSource, trouble: str) -> None:
        tell(source, trouble)
        said.set()

    monkeypatch.setattr(KuksaSource, "_tell", told)
    return said


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


@pytest.mark.parametrize("version", [5, 6])
def test_the_guard_permits_work_by_what_a_broker_says_in_either_spelling(version: int) -> None:
    async def scenario() -> None:
        world = World(version=version)
        async with world.running():
            await world.settle()
            await world.until(lambda: all(world.is_young(name) for name in NEEDED))
            verdict, _ = decide(Policy(dwell_ms=0), CONSENT, world.read(), Budgets(), History(), world.now_ms)
            assert isinstance(verdict, Permit), verdict
            charge = world.read().soc_displayed_pct
            assert charge is not None
            assert charge.value == pytest.approx(86.0)

    play(scenario)


def test_what_the_owner_does_is_pushed() -> None:
    async def scenario() -> None:
        world = World()
        async with world.running():
            await world.settle()
            told: list[int] = []
            world.source.on_change(lambda: told.append(world.now_ms))
            world.car.do(Action.OPEN_DOOR, world.now_ms)
            await world.until(lambda: told)
            assert world.read().doors_open == Reading(True, world.now_ms)
            assert world.read().locked == Reading(False, world.now_ms)

    play(scenario)


def test_a_door_that_was_shut_for_hours_is_known_to_be_shut() -> None:
    async def scenario() -> None:
        world = World()
        async with world.running():
            await world.settle()
            for _ in range(20):
                world.advance(1_000)
                await world.polls(4)
            world.now_ms += 4 * 3_600_000  # the clock jumps: for a moment nobody knows
            assert not world.is_young("doors_open")
            world.advance(1_000)
            await world.until(lambda: world.is_young("doors_open"))

    play(scenario)


def test_a_silent_provider_makes_everything_stale_though_the_broker_answers() -> None:
    async def scenario() -> None:
        world = World()
        async with world.running():
            await world.settle()
            world.broker.provides = False
            last_ms = world.now_ms
            while world.now_ms < last_ms + 3_000:
                world.advance(500)
                await world.polls(4)
            world.advance(100)
            await world.polls(4)
            owner = [name for name, spec in TABLE.items() if spec.needed and spec.max_age_ms <= 2_000]
            assert not [name for name in owner if world.is_young(name)]
            world.broker.provides = True
            world.advance(1_000)
            await world.until(lambda: all(world.is_young(name) for name in owner))

    play(scenario)


def test_one_and_the_same_stamp_for_ever_proves_nothing() -> None:
    async def scenario() -> None:
        world = World()
        world.broker.tick()
        world.broker.provides = False  # all values as old as the broker
        async with world.running():
            for _ in range(5):
                await world.polls(4)
                world.advance(1_000)
            assert world.read().doors_open is not None
            assert not [name for name in NEEDED if world.is_young(name)]

    play(scenario)


@pytest.mark.parametrize("stamp_ms", [0, 1, 4_000_000_000_000, 253_402_300_799_000])
def test_no_stamp_is_taken_for_a_time(stamp_ms: int) -> None:
    async def scenario() -> None:
        world = World()
        async with world.running():
            await world.settle()
            world.broker.publish(DOOR, True, stamp_ms)
            await world.until(lambda: world.read().doors_open == Reading(True, world.now_ms))
            readings = [getattr(world.read(), name) for name in TABLE]
            assert all(reading.at_ms <= world.now_ms for reading in readings if reading is not None)

    play(scenario)


def test_each_provider_has_a_heartbeat_of_its_own_where_the_configuration_names_one() -> None:
    async def scenario() -> None:
        world = World()
        beat = "Vehicle.Cabin.Beat"
        world.broker.publish(beat, 1.0)
        heartbeats = {**kuksa.HEARTBEATS, "Vehicle.Cabin": (beat,)}
        async with world.running(heartbeats=heartbeats):
            await world.until(lambda: world.read().doors_open is not None)
            for number in range(3):
                world.broker.publish(beat, float(number))
                world.advance(1_000)
                await world.polls(4)
            await world.until(lambda: world.is_young("doors_open") and world.is_young("speed_kmh"))
            for _ in range(8):  # the provider of the cabin is gone, the others go on
                world.advance(500)
                await world.polls(4)
            assert not world.is_young("doors_open")
            await world.until(lambda: world.is_young("speed_kmh"))

    play(scenario)


def test_without_the_broker_signals_age_and_with_it_they_come_back() -> None:
    async def scenario() -> None:
        world = World()
        async with world.running():
            await world.settle()
            port = int(world.broker.address.rpartition(":")[2])
            await world.broker.stop()
            world.now_ms += 2_001
            assert not world.is_young("doors_open")
            assert not world.is_young("speed_kmh")
            world.broker = world.new_broker()
            await world.broker.start(port)
            await world.until(lambda: world.broker.calls)
            for _ in range(3):
                world.advance(1_000)
                await world.polls(4)
            await world.until(lambda: all(world.is_young(name) for name in NEEDED))

    play(scenario)


def test_a_broker_that_hangs_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kuksa, "CALL_S", 0.1)
    monkeypatch.setattr(kuksa, "LIST_S", 0.1)

    async def scenario() -> None:
        world = World()
        async with world.running():
            await world.settle()
            world.broker.hangs = True
            await world.until(lambda: world.broker.calls[-1] == "ListMetadata")  # given up, and tried anew
            world.now_ms += 2_001
            assert not [name for name in ("doors_open", "speed_kmh", "cable_connected") if world.is_young(name)]
            world.broker.hangs = False
            calls = len(world.broker.calls)
            await world.until(lambda: "Subscribe" in world.broker.calls[calls:])
            for _ in range(2):
                world.advance(1_000)
                await world.polls(4)
            await world.until(lambda: world.is_young("doors_open"))

    play(scenario)


def test_paths_that_a_car_does_not_have_leave_their_signal_missing_and_the_rest_alone() -> None:
    async def scenario() -> None:
        world = World(without=frozenset({f"{vss.COMPUTE}.DriverMode", f"{vss.T}.DCDC.Temperature"}))
        async with world.running():
            await world.settle()
            assert world.read().driver_mode is None
            assert world.read().dcdc_temp_c is None
            await world.until(
                lambda: all(world.is_young(name) for name in NEEDED if name not in {"driver_mode", "dcdc_temp_c"})
            )
            assert "GetValue" not in world.broker.calls  # the list was enough

    play(scenario)


def test_a_broker_that_tells_no_list_is_asked_path_by_path() -> None:
    async def scenario() -> None:
        world = World()
        world.broker.missing = frozenset({"ListMetadata"})
        async with world.running():
            await world.settle()
            assert world.broker.calls.count("GetValue") >= len(vss.candidates(place=False))

    play(scenario)


def test_a_location_is_asked_for_only_where_regions_are_configured() -> None:
    async def scenario(*, configured: bool) -> None:
        world = World(without=frozenset({f"{vss.COMPUTE}.Region"}))
        world.broker.publish(vss.LATITUDE, 59.9)
        world.broker.publish(vss.LONGITUDE, 10.7)
        asked: set[str] = set()
        get_values = world.broker._get_values

        async def spy(request: Any, context: Any) -> Any:
            asked.update(signal_id.path for signal_id in request.signal_ids)
            return await get_values(request, context)

        world.broker._get_values = spy  # type: ignore[method-assign]
        async with world.running(regions=(box("NO", 59.0, 9.0, 61.0, 12.0),) if configured else ()):
            await world.settle()
            assert ({vss.LATITUDE, vss.LONGITUDE} <= asked) is configured
            region = world.read().region
            assert (region is not None and region.value == "NO") is configured

    play(lambda: scenario(configured=False))
    play(lambda: scenario(configured=True))


def test_the_agent_only_reads_and_its_token_allows_no_more(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("reader\n")

    async def scenario() -> None:
        world = World(tokens={"reader": Scope.READ, "provider": Scope.PROVIDE})
        async with world.running(token_path=token):
            await world.settle()
            world.car.do(Action.DRIVE_OFF, world.now_ms)
            await world.until(lambda: world.read().doors_open == Reading(True, world.now_ms))
            assert set(world.broker.calls) <= READS
            write = types_pb2.SignalID(path=DOOR)
            async with grpc.aio.insecure_channel(world.broker.address) as channel:
                requests: dict[str, Any] = {
                    "PublishValue": val_pb2.PublishValueRequest(signal_id=write, data_point=point(False, 1)),
                    "Actuate": val_pb2.ActuateRequest(signal_id=write),
                }
                for name, request in requests.items():
                    call = channel.unary_unary(
                        f"{kuksa.SERVICE}{name}", request_serializer=type(request).SerializeToString
                    )
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await call(request, metadata=(("authorization", "Bearer reader"),))
                    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await call(request)
                    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
                publish = channel.unary_unary(
                    f"{kuksa.SERVICE}PublishValue", request_serializer=val_pb2.PublishValueRequest.SerializeToString
                )
                wrong = val_pb2.PublishValueRequest(signal_id=write, data_point=point("shut", 1))
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await publish(wrong, metadata=(("authorization", "Bearer provider"),))
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                await publish(requests["PublishValue"], metadata=(("authorization", "Bearer provider"),))
            await world.until(lambda: world.read().doors_open == Reading(False, world.now_ms))

    play(scenario)
    text = inspect.getsource(kuksa)
    assert not [name for name in ("PublishValue", "Actuate", "ProviderStream") if name in text]


def test_a_refused_token_gives_no_signals_and_is_read_anew_when_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = tmp_path / "token"
    token.write_text("old-and-secret")

    async def scenario() -> None:
        world = World(tokens={"new": Scope.READ})
        async with world.running(token_path=token):
            await world.until(lambda: world.broker.calls)
            assert world.read() == Signals()
            token.write_text("new")
            await world.settle()

    with caplog.at_level(logging.INFO):
        play(scenario)
    assert "UNAUTHENTICATED" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("content", ["", "two tokens\nof them", "\x00", None])
def test_a_token_file_that_holds_no_token_says_so(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SetupError, match="token"):
        kuksa._credentials(path)


def test_a_missing_certificate_says_so(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="CA certificate"):
        kuksa._channel(KuksaConfig(ca_path=tmp_path / "ca.pem"))


def certificate() -> tuple[bytes, bytes]:
    """A key and a certificate that signs itself, for a broker on this machine."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    begin = datetime(2020, 1, 1, tzinfo=UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=36_500))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("broker")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, signed.public_bytes(Encoding.PEM)


@pytest.mark.parametrize("trusted", [True, False])
def test_over_tls_only_the_broker_that_the_certificate_names(
    tmp_path: Path, refused: asyncio.Event, *, trusted: bool
) -> None:
    key, cert = certificate()
    ca_path = tmp_path / "ca.pem"
    ca_path.write_bytes(cert if trusted else certificate()[1])

    async def scenario() -> None:
        world = World(credentials=grpc.ssl_server_credentials([(key, cert)]))
        async with world.running(ca_path=ca_path, server_name="broker"):
            if trusted:
                await world.settle()
                return
            await asyncio.wait_for(refused.wait(), DEADLINE_S)
            assert world.broker.calls == []
            assert world.read() == Signals()

    play(scenario)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"\xff" * 64, id="garbage"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x0a\xff\xff\xff\xff\x7f", id="cut off"),
        pytest.param(b"\x00" * (8 * 1024 * 1024), id="huge"),
    ],
)
def test_garbage_and_huge_answers_give_no_signals_and_do_no_harm(
    answer: bytes, refused: asyncio.Event, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        world = World()

        async def lie(_request: bytes, _context: Any) -> bytes:
            return answer

        async def stream(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
            yield answer

        methods = {name: grpc.unary_unary_rpc_method_handler(lie) for name in READS - {"Subscribe"}}
        methods["Subscribe"] = grpc.unary_stream_rpc_method_handler(stream)
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kuksa.val.v2.VAL", methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        config = KuksaConfig(address=f"127.0.0.1:{port}", poll_ms=POLL_MS)
        world.source = KuksaSource(config, world.clock)
        async with world.source:
            await asyncio.wait_for(refused.wait(), DEADLINE_S)
            assert not [name for name in NEEDED if world.is_young(name)]
            await server.stop(None)
            del server  # grpc ends it once more when it is collected, which needs the loop
            await world.broker.start(port)
            await world.until(lambda: world.broker.calls)
            await world.settle()
        await world.broker.stop()

    with caplog.at_level(logging.WARNING):
        play(scenario)
    assert "no signals from the databroker" in caplog.text


def test_an_answer_does_not_undo_what_was_pushed_after_it_was_asked_for() -> None:
    now_ms = 5_000
    source = KuksaSource(KuksaConfig(), lambda: now_ms)
    source._pushes = 1
    source._take({DOOR: point(True, 2)}, now_ms)
    source._take({DOOR: point(False, 1)}, now_ms - 10, 0)  # asked for before the door was opened
    opened = source.read(now_ms).doors_open
    assert opened is not None
    assert opened.value is True
    source._take({DOOR: point(False, 3)}, now_ms, 1)
    shut = source.read(now_ms).doors_open
    assert shut is not None
    assert shut.value is False


def test_values_of_every_type_of_the_service_are_understood() -> None:
    data = types_pb2.Datapoint()
    assert kuksa._plain(data) is None
    for kind, number in (("int32", -3), ("int64", -3), ("uint32", 3), ("uint64", 3), ("float", 1.5), ("double", 1.5)):
        setattr(data.value, kind, number)
        assert kuksa._plain(data) == number
    data.value.double = float("nan")
    assert kuksa._plain(data) is None
    data.value.string_array.values.extend(["a", "b"])
    assert kuksa._plain(data) == ("a", "b")


def test_nothing_loads_grpc_but_the_source_that_needs_it() -> None:
    code = (
        "import sys, motorpool.agent.signals.source, motorpool.agent.signals.car, motorpool.agent.signals.vss;"
        "print(sorted(name for name in ('grpc', 'google.protobuf') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_stand_in_runs_as_a_program_whose_owner_can_be_played() -> None:
    async def scenario() -> None:
        command = (sys.executable, "-m", broker_module.__name__, "--port", "0", "--vss", "5")
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        line = json.loads(await asyncio.wait_for(process.stdout.readline(), DEADLINE_S))
        changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        source = KuksaSource(KuksaConfig(address=line["address"]), lambda: int(loop.time() * 1000))
        source.on_change(changed.set)
        try:
            async with source, asyncio.timeout(DEADLINE_S):
                while source.read(0).doors_open is None:
                    changed.clear()
                    await changed.wait()
                answer = await play_owner(Path(line["dir"]), "open-door")
                assert answer["ok"]
                while not _open(source):
                    changed.clear()
                    await changed.wait()
        finally:
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 0
        folders.append(Path(line["dir"]))

    folders: list[Path] = []
    asyncio.run(scenario())
    assert not folders[0].exists()


def _open(source: KuksaSource) -> bool:
    doors = source.read(0).doors_open
    return doors is not None and bool(doors.value)


def test_by_id_as_by_path() -> None:
    async def scenario() -> None:
        world = World()
        await world.broker.start()
        async with grpc.aio.insecure_channel(world.broker.address) as channel:

            async def call(name: str, request: Any, response: Any) -> Any:
                method = channel.unary_unary(
                    f"{kuksa.SERVICE}{name}",
                    request_serializer=type(request).SerializeToString,
                    response_deserializer=response.FromString,
                )
                return await method(request)

            request = val_pb2.ListMetadataRequest(root="Vehicle.Cabin")
            listed = await call("ListMetadata", request, val_pb2.ListMetadataResponse)
            number = next(entry.id for entry in listed.metadata if entry.path == DOOR)
            one = val_pb2.GetValueRequest(signal_id=types_pb2.SignalID(id=number))
            assert not (await call("GetValue", one, val_pb2.GetValueResponse)).data_point.value.bool
            info = await call("GetServerInfo", val_pb2.GetServerInfoRequest(), val_pb2.GetServerInfoResponse)
            assert info.name == broker_module.NAME
            stream = channel.unary_stream(
                f"{kuksa.SERVICE}SubscribeById",
                request_serializer=val_pb2.SubscribeByIdRequest.SerializeToString,
                response_deserializer=val_pb2.SubscribeByIdResponse.FromString,
            )(val_pb2.SubscribeByIdRequest(signal_ids=[number]))
            seen = []
            async with asyncio.timeout(DEADLINE_S):
                async for message in stream:
                    seen.append(message.entries[number].value.bool)
                    if len(seen) == 2:
                        break
                    world.car.do(Action.OPEN_DOOR, world.now_ms)
            assert seen == [False, True]
            for bad in (types_pb2.SignalID(id=9_999), types_pb2.SignalID(path="Vehicle.Nothing")):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call("GetValue", val_pb2.GetValueRequest(signal_id=bad), val_pb2.GetValueResponse)
                assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        await world.broker.stop()

    play(scenario)


def test_the_configuration_survives_being_written_down() -> None:
    config = KuksaConfig(address="broker:1", regions=(box("NO", 59.0, 9.0, 61.0, 12.0),))
    assert msgspec.convert(msgspec.to_builtins(config), KuksaConfig) == config
