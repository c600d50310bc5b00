"""The agent end to end: a real NATS server, the null engine in the process, the guard, the machine, a simulated car."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from motorpool import wire
from motorpool.agent import delivery, judge, loop
from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME, enrol_owner, give_consent, take_consent_back
from motorpool.agent.judge import Judge
from motorpool.agent.loop import AgentLoop, Clock, Link
from motorpool.agent.main import AgentConfig, run_agent, run_many
from motorpool.agent.runtime.build import SwitchableEngine
from motorpool.agent.runtime.engine import Engine
from motorpool.agent.runtime.null import InlineNullEngine
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.signals.car import CarSpec
from motorpool.agent.signals.owner_port import play_owner
from motorpool.agent.signals.source import AlwaysParked
from motorpool.agent.spool import MemorySpool, Spool
from motorpool.bus import CellLink, EmbeddedNats, WorkMessage
from motorpool.core.guard import ConsentView, History, Policy, Reading, Signals
from motorpool.core.signals import NetworkClass
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import Command, Event, FreezeEngine, VehicleConfig
from motorpool.errors import SetupError
from motorpool.trust.consent import ConsentLimits
from motorpool.trust.credentials import CellIdentity, save_credentials
from motorpool.types import MAX_MESSAGE_BYTES, Kind, ModelTier, Permit, ReasonCode, ReturnReason, VehicleState

MODEL = "null"
PARKED = CarSpec()
DEADLINE_S = 20.0
DAY_MS = 86_400_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Cell:
    """The cell's end of the link: keeps what arrives, and waits for what is expected."""

    def __init__(self, link: CellLink, nats: EmbeddedNats, identity: CellIdentity, folder: Path) -> None:
        self.link = link
        self.nats = nats
        self.identity = identity
        self.folder = folder
        self.states: dict[str, wire.State] = {}
        self.progress: list[wire.Progress] = []
        self.live: list[wire.UpLive] = []
        self.work: list[wire.Results | wire.Returned] = []
        self._changed = asyncio.Event()

    def on_state(self, vehicle: str, data: bytes) -> None:
        message = wire.decode(wire.UP_STATE, data)
        if isinstance(message, wire.State):
            self.states[vehicle] = message
        else:
            self.progress.append(message)
        self._changed.set()

    def on_live(self, vehicle: str, data: bytes) -> None:
        self.live.append(wire.decode(wire.UP_LIVE, data))
        self._changed.set()

    async def on_work(self, messages: list[WorkMessage]) -> None:
        for message in messages:
            self.work.append(wire.decode(wire.UP_WORK, message.data))
            await message.acknowledge()
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def in_state(self, vehicle: str, *states: VehicleState) -> wire.State:
        await self.until(lambda: vehicle in self.states and self.states[vehicle].state in states)
        return self.states[vehicle]

    def send(self, vehicle: str, message: wire.Down) -> None:
        self.link.send(vehicle, wire.encode(message))

    def results(self) -> dict[int, wire.ResultItem]:
        return {item.line: item for m in self.work if isinstance(m, wire.Results) for item in m.items}

    def returned(self) -> dict[int, tuple[ReturnReason, wire.ReturnItem]]:
        return {item.line: (m.reason, item) for m in self.work if isinstance(m, wire.Returned) for item in m.items}

    def config(self, vehicle: str, *, rate: float = 0.0, car: CarSpec | None = PARKED) -> AgentConfig:
        folder = self.folder / vehicle
        folder.mkdir()
        save_credentials(folder / "credentials.json", self.identity.enrol(vehicle, [self.nats.url], 0))
        enrol_owner(folder)
        give_consent(folder, vehicle, ConsentLimits(max_watts_w=150), now_ms=now_ms(), expires_ms=now_ms() + DAY_MS)
        return AgentConfig(
            agent_dir=folder,
            credentials_path=folder / "credentials.json",
            consent_path=folder / CONSENT_NAME,
            owner_public_key_path=folder / PUBLIC_NAME,
            engine=EngineSpec(backend=Backend.NULL, model=MODEL, slots=4, rate_tokens_per_s=rate, hosted=False),
            policy=Policy(dwell_ms=50, watts_w=120, network=NetworkClass.UNMETERED),
            car=car,
            state_interval_ms=300,
            freeze_grace_ms=300,
        )


@asynccontextmanager
async def a_cell(folder: Path) -> AsyncIterator[Cell]:
    identity = CellIdentity.generate(0)
    nats = EmbeddedNats(folder / "nats", identity)
    await nats.start()
    link = await CellLink.connect([nats.url], identity, lambda _: None)
    cell = Cell(link, nats, identity, folder)
    await link.listen(cell.on_state, cell.on_live)
    link.pull_work(cell.on_work)
    try:
        yield cell
    finally:
        await link.close()
        await nats.stop()


@asynccontextmanager
async def an_agent(config: AgentConfig) -> AsyncIterator[asyncio.Event]:
    stop = asyncio.Event()
    task = asyncio.create_task(run_agent(config, stop))
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(task, DEADLINE_S)


def body(text: str, max_tokens: int = 16) -> bytes:
    return msgspec.json.encode(
        {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}
    )


def grant(incarnation: str, lines: range, *, lease: str = "lease-1", max_tokens: int = 16) -> wire.Grant:
    items = [wire.Item(line=line, body=body(f"line {line}", max_tokens)) for line in lines]
    return wire.Grant(
        lease_id=lease, incarnation=incarnation, job_id="job", kind=Kind.CHAT, model=MODEL, ttl_ms=60_000, items=items
    )


def test_a_lease_becomes_results_in_the_durable_stream(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_cell(tmp_path) as cell, an_agent(cell.config("v1")):
            state = await cell.in_state("v1", VehicleState.READY)
            assert (state.model, state.slots, state.permit_w, state.held) == (MODEL, 4, 120, [])
            cell.send("v1", grant(state.incarnation, range(1000)))
            cell.send("v1", grant(state.incarnation, range(1000)))  # a repeated grant changes nothing
            await cell.until(lambda: len(cell.results()) == 1000)
            await cell.until(lambda: cell.states["v1"].held == [] and cell.states["v1"].tokens_generated > 0)
            items = [item.line for m in cell.work for item in m.items]
            assert sorted(items) == list(range(1000))
            assert all(item.status == 200 for item in cell.results().values())
            first = msgspec.json.decode(cell.results()[0].body)
            assert first["id"] == "chatcmpl-lease-1-0"
            assert first["usage"]["completion_tokens"] == cell.results()[0].completion_tokens > 0

    asyncio.run(scenario())


def test_an_open_door_hands_everything_back_with_its_text(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_cell(tmp_path) as cell:
            config = cell.config("v1", rate=50)
            async with an_agent(config):
                state = await cell.in_state("v1", VehicleState.READY)
                cell.send("v1", grant(state.incarnation, range(8), max_tokens=2_000))
                await cell.until(lambda: cell.states["v1"].tokens_generated >= 20)
                answer = await play_owner(config.agent_dir, "open-door")
                assert answer["ok"]
                assert answer["car"]["door_open"]
                await cell.until(lambda: len(cell.returned()) == 8)
                assert {reason for reason, _ in cell.returned().values()} == {ReturnReason.GUARD}
                items = [item for _, item in cell.returned().values()]
                assert sorted(item.started for item in items) == [False] * 4 + [True] * 4
                for item in items:
                    assert item.started == (item.checkpoint is not None)
                    if item.checkpoint is not None:
                        checkpoint = wire.decode_checkpoint(item.checkpoint)
                        assert checkpoint.tokens == item.tokens == len(checkpoint.token_ids) > 0
                denied = await cell.in_state("v1", VehicleState.YIELDING, VehicleState.DENIED)
                assert {reason.code for reason in denied.reasons} == {ReasonCode.DOOR_OPEN, ReasonCode.UNLOCKED}
                await cell.in_state("v1", VehicleState.DENIED)
                assert (await play_owner(config.agent_dir, "lock"))["ok"]
                state = await cell.in_state("v1", VehicleState.READY)
                # another vehicle's work is continued here from its checkpoint, and counted as carried
                line, (_, item) = next((k, v) for k, v in cell.returned().items() if v[1].started)
                again = wire.Item(line=line, body=body(f"line {line}", item.tokens + 5), checkpoint=item.checkpoint)
                cell.send(
                    "v1", msgspec.structs.replace(grant(state.incarnation, range(0)), lease_id="again", items=[again])
                )
                await cell.until(lambda: line in cell.results())
                result = cell.results()[line]
                assert result.completion_tokens == item.tokens + 5
                # another limit makes other words of the null engine: as long a text may be fewer of them
                assert 0 < result.carried_tokens <= item.tokens

    asyncio.run(scenario())


def test_an_owner_who_comes_amid_thousands_of_results_loses_and_doubles_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_cell(tmp_path) as cell:
            config = cell.config("v1")
            async with an_agent(config):
                state = await cell.in_state("v1", VehicleState.READY)
                for lease in range(5):
                    lines = range(lease * 4_000, lease * 4_000 + 4_000)
                    cell.send("v1", grant(state.incarnation, lines, lease=f"lease-{lease}"))
                await cell.until(lambda: len(cell.results()) >= 1_000)
                await play_owner(config.agent_dir, "drive-off")
                await cell.in_state("v1", VehicleState.DENIED)
                await cell.until(lambda: sum(len(message.items) for message in cell.work) >= 20_000)
                ended = [item.line for message in cell.work for item in message.items]
                assert sorted(ended) == list(range(20_000))
                assert len(cell.returned()) > 0
                await cell.until(lambda: cell.states["v1"].held == [])

    asyncio.run(scenario())


def test_a_withdrawn_consent_stops_the_work_and_a_new_one_allows_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_cell(tmp_path) as cell:
            config = cell.config("v1", rate=50)
            async with an_agent(config):
                state = await cell.in_state("v1", VehicleState.READY)
                cell.send("v1", grant(state.incarnation, range(2), max_tokens=2_000))
                await cell.in_state("v1", VehicleState.READY, VehicleState.WORKING)
                take_consent_back(config.agent_dir, "v1", now_ms=now_ms())
                await cell.until(lambda: len(cell.returned()) == 2)
                denied = await cell.in_state("v1", VehicleState.DENIED)
                assert [reason.code for reason in denied.reasons] == [ReasonCode.CONSENT_WITHDRAWN]
                give_consent(
                    config.agent_dir,
                    "v1",
                    ConsentLimits(max_watts_w=80),
                    now_ms=now_ms() + 1,
                    expires_ms=now_ms() + DAY_MS,
                )
                state = await cell.in_state("v1", VehicleState.READY)
                assert state.permit_w == 80

    asyncio.run(scenario())


def test_a_live_stream_is_relayed_and_a_stop_breaks_it_with_its_text(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_cell(tmp_path) as cell, an_agent(cell.config("v1", rate=100)) as stop:
            await cell.in_state("v1", VehicleState.READY)
            short = wire.Open(
                request_id="a", attempt=0, kind=Kind.CHAT, model=MODEL, stream=True, body=body("short", 5)
            )
            cell.send("v1", short)
            await cell.until(lambda: any(isinstance(m, wire.Tokens) and m.usage for m in cell.live))
            tokens = [m for m in cell.live if isinstance(m, wire.Tokens)]
            assert [m.seq for m in tokens] == list(range(len(tokens)))
            assert tokens[-1].usage is not None
            assert tokens[-1].usage.completion_tokens == 5
            plain = wire.Open(
                request_id="b", attempt=0, kind=Kind.CHAT, model=MODEL, stream=False, body=body("plain", 3)
            )
            cell.send("v1", plain)
            await cell.until(lambda: any(isinstance(m, wire.Answered) for m in cell.live))
            unknown = msgspec.structs.replace(plain, request_id="c", model="other")
            cell.send("v1", unknown)
            await cell.until(lambda: any(isinstance(m, wire.Broken) for m in cell.live))
            assert cell.live[-1] == wire.Broken(request_id="c", attempt=0, reason=ReturnReason.REFUSED)
            cell.live.clear()
            cell.send("v1", msgspec.structs.replace(short, request_id="d", body=body("long", 5_000)))
            await cell.until(lambda: len(cell.live) >= 3)
            stop.set()
            await cell.until(lambda: isinstance(cell.live[-1], wire.Broken))
            broken = cell.live[-1]
            assert isinstance(broken, wire.Broken)
            assert (broken.request_id, broken.reason) == ("d", ReturnReason.SHUTDOWN)
            assert broken.checkpoint is not None
            sent = "".join(d.text for m in cell.live if isinstance(m, wire.Tokens) for d in m.deltas)
            assert wire.decode_checkpoint(broken.checkpoint).text == sent
            await cell.in_state("v1", VehicleState.DENIED)

    asyncio.run(scenario())


def test_an_answer_that_is_too_long_for_a_message_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    def endless(max_tokens: int) -> bytes:
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": max_tokens}
        return msgspec.json.encode(asked | {"logprobs": True, "top_logprobs": 20})

    async def scenario() -> None:
        async with a_cell(tmp_path) as cell:
            config = cell.config("v1")
            engine = msgspec.structs.replace(config.engine, context_tokens=10_000)
            async with an_agent(msgspec.structs.replace(config, engine=engine)):
                state = await cell.in_state("v1", VehicleState.READY)
                item = wire.Item(line=0, body=endless(5_000))
                cell.send("v1", msgspec.structs.replace(grant(state.incarnation, range(0)), items=[item]))
                for stream in (False, True):
                    asked = wire.Open(
                        request_id=f"r{stream}",
                        attempt=0,
                        kind=Kind.CHAT,
                        model=MODEL,
                        stream=stream,
                        body=endless(5_000),
                    )
                    cell.send("v1", asked)
                await cell.until(lambda: 0 in cell.results() and len(cell.live) == 2)
                assert cell.results()[0].status == 413
                assert [m.status for m in cell.live if isinstance(m, wire.Answered)] == [413, 413]
                cell.send("v1", grant(state.incarnation, range(1, 4), lease="after"))
                await cell.until(lambda: len(cell.results()) == 4)

    asyncio.run(scenario())


SOUND = wire.encode_checkpoint(wire.Checkpoint(text="abcd", tokens=3))
DAMAGED = SOUND.replace(b"abcd", b"\xff\xfe\xfd\xfc")


def test_bytes_that_are_no_message_do_not_end_the_agent(tmp_path: Path) -> None:
    sound = wire.encode(wire.Close(request_id="abcd"))
    unknown = msgspec.msgpack.encode({"t": "close", "v": 1, "request_id": "x", "later": 0})

    async def scenario() -> None:
        async with a_cell(tmp_path) as cell, an_agent(cell.config("v1")):
            state = await cell.in_state("v1", VehicleState.READY)
            long_name = msgspec.structs.replace(grant(state.incarnation, range(1)), lease_id="L" * 5_000_000)
            for data in (
                sound.replace(b"abcd", b"\xff\xfe\xfd\xfc"),
                unknown[:-1] + b"\x91" * 200_000 + b"\xc0",
                sound[:-1],
                b"",
                wire.encode(long_name),
                wire.encode(msgspec.structs.replace(long_name, lease_id=long_name.lease_id + "2")),
            ):
                cell.link.send("v1", data)
            cell.send("v1", grant(state.incarnation, range(3)))
            await cell.until(lambda: len(cell.results()) == 3)
            await cell.until(lambda: cell.states["v1"].held == [])

    asyncio.run(scenario())


def test_a_damaged_checkpoint_of_another_vehicle_ends_neither_the_agent_nor_its_line(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_cell(tmp_path) as cell:
            config = cell.config("v1", rate=100)
            async with an_agent(config):
                state = await cell.in_state("v1", VehicleState.READY)
                items = [wire.Item(line=line, body=body("x", 300), checkpoint=DAMAGED) for line in range(6)]
                cell.send("v1", msgspec.structs.replace(grant(state.incarnation, range(0)), items=items))
                asked = wire.Open(
                    request_id="live", attempt=1, kind=Kind.CHAT, model=MODEL, stream=True, body=body("x", 300),
                    checkpoint=DAMAGED,
                )  # fmt: skip
                cell.send("v1", asked)
                await cell.until(lambda: cell.states["v1"].tokens_generated >= 20)
                await play_owner(config.agent_dir, "open-door")
                await cell.until(lambda: len(cell.returned()) == 6)
                for _, item in cell.returned().values():
                    assert item.checkpoint is not None
                    if item.started:  # begun anew, as the engine did
                        assert wire.decode_checkpoint(item.checkpoint).tokens == item.tokens > 0
                    else:
                        assert (item.checkpoint, item.tokens) == (DAMAGED, 0)
                await cell.until(lambda: any(isinstance(m, wire.Broken) for m in cell.live))
                await play_owner(config.agent_dir, "lock")
                state = await cell.in_state("v1", VehicleState.READY)
                again = msgspec.structs.replace(grant(state.incarnation, range(0)), lease_id="again", items=items[:1])
                cell.send("v1", again)
                await cell.until(lambda: 0 in cell.results())
                assert (cell.results()[0].completion_tokens, cell.results()[0].carried_tokens) == (300, 0)

    asyncio.run(scenario())


class Diary:
    """What happened, in its order; whoever waits for something is woken by each entry."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self._changed = asyncio.Event()

    def write(self, *entries: str) -> None:
        self.entries += entries
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


class Telling(VehicleMachine):
    """A machine that keeps a diary."""

    def __init__(self, config: VehicleConfig, diary: Diary) -> None:
        super().__init__(config, "inc")
        self._diary = diary

    def handle(self, event: Event, now_ms: int) -> list[Command]:
        commands = super().handle(event, now_ms)
        self._diary.write(*(["put together what goes back"] if FreezeEngine() in commands else []))
        return commands


class Frozen(InlineNullEngine):
    """An engine that keeps the same diary."""

    def __init__(self, spec: EngineSpec, diary: Diary) -> None:
        super().__init__(spec)
        self._diary = diary

    def freeze(self) -> None:
        self._diary.write("freeze")
        super().freeze()


class Opened(AlwaysParked):
    """A vehicle whose door stands open from some moment on."""

    def __init__(self) -> None:
        super().__init__()
        self.door_open = False

    def read(self, now_ms: int) -> Signals:
        return msgspec.structs.replace(super().read(now_ms), doors_open=Reading(self.door_open, now_ms))


class Sent:
    """A link that takes everything and keeps what it can."""

    def __init__(self) -> None:
        self.connected = True
        self.state: list[bytes] = []
        self.live: list[bytes] = []
        self.work: dict[str, bytes] = {}

    def publish_state(self, data: bytes) -> None:
        self.state.append(data)

    def publish_live(self, data: bytes) -> None:
        self.live.append(data)

    async def publish_work(self, data: bytes, message_id: str) -> None:
        self.work[message_id] = data

    async def close(self) -> None: ...


class Lenient(Judge):
    """A guard that goes on permitting work while nothing may be sent, as long as a test says so."""

    sending = True

    @property
    def may_send(self) -> bool:
        return self.sending

    @may_send.setter
    def may_send(self, value: bool) -> None:
        assert value, "the network of these tests costs nothing"


class Alone:
    """One agent loop without a message server. ``hand`` gives it a message of the cell."""

    def __init__(self, *, region: str = "local", until_ms: int = 10**15, spool: Spool | None = None) -> None:
        self.diary = Diary()
        self.source = Opened()
        self.link = Sent()
        self.hand: Callable[[bytes], None]
        self.watts: list[int] = []
        config = VehicleConfig(model=MODEL, small_model="small", region=region, state_interval_ms=100)
        self.machine = Telling(config, self.diary)
        spec = EngineSpec(backend=Backend.NULL, model=MODEL, rate_tokens_per_s=50.0, hosted=False)
        small = msgspec.structs.replace(spec, model="small")
        engines: dict[str, Engine] = {MODEL: Frozen(spec, self.diary), "small": Frozen(small, self.diary)}
        consent = ConsentView(refusal=None, max_watts_w=100, floor_pct=10, expires_ms=until_ms)
        self.judge = Lenient(self.source, lambda _: consent, Policy(dwell_ms=0))
        self.loop = AgentLoop(
            name="v1",
            machine=self.machine,
            engine=SwitchableEngine(engines, MODEL),
            source=self.source,
            judge=self.judge,
            clock=Clock(),
            spool=spool,
            limit=self.watts.append,
        )

    async def _connect(self, on_down: Callable[[bytes], None], _on_link: Callable[[bool], None]) -> Link:
        self.hand = on_down
        return self.link

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.loop.run(self._connect))
        try:
            await self.diary.until(lambda: self.machine.state is VehicleState.READY)
            yield
        finally:
            self.loop.stop()
            await asyncio.wait_for(task, DEADLINE_S)


@pytest.mark.parametrize("why", ["the door", "the end of the consent", "a stop"])
def test_the_engine_stops_before_what_goes_back_is_put_together(why: str) -> None:
    async def scenario() -> None:
        until_ms = now_ms() + 1_000 if why == "the end of the consent" else 10**15
        alone = Alone(until_ms=until_ms)
        async with alone.running():
            alone.hand(wire.encode(grant("inc", range(8), max_tokens=1_000)))
            await alone.diary.until(lambda: alone.machine.state is VehicleState.WORKING)
            if why == "the door":
                alone.source.door_open = True
                alone.loop.look_now()
            elif why == "a stop":
                alone.loop.stop()
            await alone.diary.until(lambda: len(alone.diary.entries) > 1)
            assert alone.diary.entries[:2] == ["freeze", "put together what goes back"]

    asyncio.run(scenario())


def test_a_report_that_no_message_can_hold_is_left_out_and_the_agent_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        alone = Alone(region="x" * MAX_MESSAGE_BYTES)
        async with alone.running():
            asked = wire.Open(request_id="r", attempt=0, kind=Kind.CHAT, model=MODEL, stream=False, body=body("x", 2))
            alone.hand(wire.encode(asked))
            await alone.diary.until(lambda: len(alone.link.live) > 0)
            assert isinstance(wire.decode(wire.UP_LIVE, alone.link.live[0]), wire.Answered)
            assert alone.link.state == []

    asyncio.run(scenario())
    assert "a State was dropped: a message is at most" in caplog.text


def test_messages_that_wait_are_bounded_in_bytes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "MAX_WAITING_BYTES", 1_000)

    async def scenario() -> None:
        alone = Alone()
        async with alone.running():
            for _ in range(3):  # before the loop can look at any of them
                alone.hand(b"x" * 400)
            assert "one was dropped" in caplog.text
            caplog.clear()
            await alone.diary.until(lambda: caplog.text.count("was not understood") == 2)
            alone.hand(b"x" * 900)
            assert "one was dropped" not in caplog.text

    asyncio.run(scenario())


def test_nothing_of_a_job_is_sent_or_taken_while_it_may_not_be() -> None:
    async def scenario() -> None:
        alone = Alone()
        async with alone.running():
            alone.hand(wire.encode(grant("inc", range(6), max_tokens=4)))
            for number in range(2):
                asked = wire.Open(
                    request_id=f"r{number}", attempt=0, kind=Kind.CHAT, model=MODEL, stream=True, body=body("x", 50)
                )
                alone.hand(wire.encode(asked))
                await alone.diary.until(lambda: len(alone.link.live) > 0)
                alone.judge.sending = False
            told = len(alone.link.state)
            alone.hand(wire.encode(grant("inc", range(6), lease="lease-2")))
            await alone.diary.until(lambda: alone.machine.undelivered > 0)
            await alone.diary.until(lambda: alone.machine.state is VehicleState.READY)
            await alone.diary.until(lambda: len(alone.link.state) > told)  # that is no job's
            assert alone.link.work == {}
            assert alone.machine.held == ["lease-1"]
            live = [wire.decode(wire.UP_LIVE, data) for data in alone.link.live]
            broken = [message for message in live if isinstance(message, wire.Broken)]
            assert live[-len(broken) :] == broken
            assert {(message.request_id, message.reason, message.checkpoint) for message in broken} == {
                ("r0", ReturnReason.OFFLINE, None),
                ("r1", ReturnReason.OFFLINE, None),
            }
            alone.judge.sending = True
            await alone.diary.until(lambda: alone.machine.held == [])
            work = [wire.decode(wire.UP_WORK, data) for data in alone.link.work.values()]
            assert sorted(item.line for message in work for item in message.items) == list(range(6))

    asyncio.run(scenario())


def test_the_cell_hears_of_a_new_incarnation_only_after_what_the_last_one_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "RETRY_MIN_S", 0.01)
    monkeypatch.setattr(delivery, "SETTLE_S", 0.01)

    async def scenario() -> None:
        spool = MemorySpool(1_000)
        spool.put("old-1", b"what was finished before")
        alone = Alone(spool=spool)
        alone.judge.sending = False
        async with alone.running():
            assert alone.link.state == []
            alone.judge.sending = True
            await alone.diary.until(lambda: len(alone.link.state) > 0)
            assert alone.link.work == {"old-1": b"what was finished before"}
            assert spool.waiting() == []

    asyncio.run(scenario())


def test_the_engine_is_held_to_the_permits_watts_as_soon_as_it_starts() -> None:
    async def scenario() -> None:
        alone = Alone()
        async with alone.running():
            assert alone.watts == [100]

    asyncio.run(scenario())


def test_a_hot_vehicle_loads_its_small_model_and_a_cool_one_the_full_one_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    permits = {ModelTier.FULL: 100, ModelTier.SMALL: 40}
    tier = ModelTier.FULL

    def judged(*_: object) -> tuple[Permit, History]:
        return Permit(watts_w=permits[tier], until_ms=now_ms() + 10_000, tier=tier), History()

    monkeypatch.setattr(judge, "decide", judged)

    async def scenario() -> None:
        nonlocal tier
        alone = Alone()

        def told() -> tuple[str | None, ModelTier]:
            state = wire.decode(wire.UP_STATE, alone.link.state[-1])
            assert isinstance(state, wire.State)
            return state.model, state.tier

        async with alone.running():
            await alone.diary.until(lambda: len(alone.link.state) > 0 and told() == (MODEL, ModelTier.FULL))
            tier = ModelTier.SMALL
            alone.loop.look_now()
            await alone.diary.until(lambda: told() == ("small", ModelTier.SMALL))
            tier = ModelTier.FULL
            alone.loop.look_now()
            await alone.diary.until(lambda: told() == (MODEL, ModelTier.FULL))
            assert alone.watts == [100, 40, 100]

    asyncio.run(scenario())


def test_an_agent_that_can_keep_nothing_more_computes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "SPOOL_AFTER_S", 0.0)
    monkeypatch.setattr(delivery, "RETRY_MIN_S", 0.01)
    monkeypatch.setattr(delivery, "RETRY_MAX_S", 0.02)

    async def scenario() -> None:
        alone = Alone(spool=MemorySpool(0))
        async with alone.running():
            alone.hand(wire.encode(grant("inc", range(1), lease="first", max_tokens=1)))
            await alone.diary.until(lambda: alone.machine.state is VehicleState.WORKING)
            alone.judge.sending = False
            await alone.diary.until(lambda: alone.machine._outbox.full)
            assert alone.machine.held == ["first"]
            alone.judge.sending = True
            await alone.diary.until(lambda: not alone.machine._outbox.full and alone.machine.held == [])

    asyncio.run(scenario())


class Endless:
    """A model server that never ends an answer, and knows how many it is giving."""

    def __init__(self) -> None:
        self.answering = 0
        self.diary = Diary()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = b'data: {"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        self.answering += 1
        try:
            while True:
                writer.write(b"%x\r\n%b\r\n" % (len(said), said))
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            self.answering -= 1
            self.diary.write("closed")
        finally:
            writer.close()


def test_a_server_beside_the_agent_stops_as_well_when_the_owner_comes(tmp_path: Path) -> None:
    async def scenario() -> None:
        endless = Endless()
        server = await asyncio.start_server(endless.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with a_cell(tmp_path) as cell:
            engine = EngineSpec(backend=Backend.REMOTE, model=MODEL, url=url, slots=2)
            config = msgspec.structs.replace(cell.config("v1"), engine=engine, freeze_grace_ms=60_000)
            async with an_agent(config):
                state = await cell.in_state("v1", VehicleState.READY)
                cell.send("v1", grant(state.incarnation, range(3), max_tokens=10_000))
                await cell.until(lambda: cell.states["v1"].tokens_generated >= 20)
                assert endless.answering == 2
                await play_owner(config.agent_dir, "open-door")
                await cell.until(lambda: len(cell.returned()) == 3)
                assert sum(item.tokens > 0 for _, item in cell.returned().values()) == 2
                await cell.in_state("v1", VehicleState.DENIED)
                await endless.diary.until(lambda: endless.answering == 0)
        server.close()

    asyncio.run(scenario())


def test_results_wait_for_the_message_server_to_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_cell(tmp_path) as cell, an_agent(cell.config("v1", rate=40)):
            state = await cell.in_state("v1", VehicleState.READY)
            cell.send("v1", grant(state.incarnation, range(12), max_tokens=10))
            await cell.until(lambda: cell.states["v1"].running > 0)
            assert cell.nats.process is not None
            cell.nats.process.kill()
            await cell.nats.process.wait()
            await cell.nats.start()
            await cell.until(lambda: len(cell.results()) == 12)
            await cell.until(lambda: cell.states["v1"].held == [])

    asyncio.run(scenario())


def test_many_vehicles_in_one_process_each_with_its_own_credentials(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_cell(tmp_path) as cell:
            names = [f"v{number}" for number in range(20)]
            configs = [cell.config(name, car=None) for name in names]
            stop = asyncio.Event()
            task = asyncio.create_task(run_many(configs, stop))
            for index, name in enumerate(names):
                state = await cell.in_state(name, VehicleState.READY)
                lines = range(index * 10, index * 10 + 10)
                cell.send(name, grant(state.incarnation, lines, lease=f"lease-{index}"))
            await cell.until(lambda: len(cell.results()) == 200)
            stop.set()
            await asyncio.wait_for(task, DEADLINE_S)

    asyncio.run(scenario())


def test_a_vehicle_without_signals_never_works(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_cell(tmp_path) as cell, an_agent(cell.config("v1", car=None)):
            state = await cell.in_state("v1", VehicleState.DENIED)
            await cell.until(lambda: len(cell.states["v1"].reasons) > 1)
            state = cell.states["v1"]
            assert ReasonCode.SIGNAL_MISSING in {reason.code for reason in state.reasons}
            cell.send("v1", grant(state.incarnation, range(3)))
            await cell.until(lambda: len(cell.returned()) == 3)
            assert {reason for reason, _ in cell.returned().values()} == {ReturnReason.REFUSED}

    asyncio.run(scenario())


def test_without_credentials_the_agent_says_what_to_do(tmp_path: Path) -> None:
    config = AgentConfig(
        agent_dir=tmp_path,
        credentials_path=tmp_path / "credentials.json",
        consent_path=tmp_path / "consent.json",
        owner_public_key_path=tmp_path / "owner.pub",
        engine=EngineSpec(backend=Backend.NULL, model=MODEL, hosted=False),
    )
    with pytest.raises(SetupError, match="enrol"):
        asyncio.run(run_agent(config, asyncio.Event()))
