"""One vehicle of the fault sweep: real processes for agent, engine, signals and messages, and a cell with real books.

A ``Lane`` is such a vehicle with everything around it. Its agent tells on its standard output where it is in a lease,
so that a fault can strike at a chosen step; a ``Sampler`` sees from outside, in /proc, what engine processes there are
and when they use processor time, and notes each stretch in which they did so although they must not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from tests.cell_world import World, a_world, chat

from motorpool.agent.enrolment import enrol_owner, give_consent
from motorpool.agent.runtime import cgroup
from motorpool.agent.runtime.limits import FOLDER_PREFIX
from motorpool.agent.signals.owner_port import play_owner
from motorpool.trust.consent import ConsentLimits

DEADLINE_S: Final = 40.0
LOOK_S: Final = 0.01
SAMPLE_S: Final = 0.02
LINES: Final = 4
TOKENS: Final = 40
VEHICLE: Final = "v1"
MONTH_MS: Final = 30 * 86_400_000
HOUR_MS = 3_600_000
HOST: Final = b"motorpool.agent.runtime.host"
AGENT: Final = """
import asyncio, logging, os, sys, threading, time
from pathlib import Path

folder, broker, model_path = Path(sys.argv[1]), sys.argv[2], sys.argv[4]
ahead_s = [float(sys.argv[3])]
real_ns = time.time_ns
# Not time.time: that would mislead gRPC, whose core has a clock of its own.
time.time_ns = lambda: real_ns() + int(ahead_s[0] * 1e9)

def set_the_clock():
    while word := os.read(0, 64):
        ahead_s[0] = float(word.split()[-1])

threading.Thread(target=set_the_clock, daemon=True).start()

from motorpool import wire
from motorpool.agent import delivery, loop, main
from motorpool.agent.accounts import AccountsConfig
from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME
from motorpool.agent.parts import PartsConfig
from motorpool.agent.runtime.engine import Progressed
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.signals.kuksa import KuksaConfig, KuksaSource
from motorpool.core.energy import EnergyModel
from motorpool.core.guard import Policy
from motorpool.core.signals import NetworkClass

def say(*words):
    print(*words, flush=True)

def after(name, tell):
    inner = getattr(loop.AgentLoop, name)
    def told(self, *args):
        inner(self, *args)
        tell(self, *args)
    setattr(loop.AgentLoop, name, told)

said = [""]

def state(self, *_):
    machine = self._machine
    word = machine.state.value + " " + ",".join(reason.code for reason in machine.reasons)
    if word != said[0]:
        said[0] = word
        say("state", word)

after("_tell_state", state)
after("_submit", lambda self, command: say("grant", len(command.attempts)))
after("_take_engine_events", lambda self, _, events, __: [say("token") for e in events if isinstance(e, Progressed)])
after("_publish_work", lambda self, command: say("gathered", type(command.message).__name__))
after("_on_published", lambda self, _: say("published"))
after("stop", lambda self: say("stopping"))
delivery.SPOOL_AFTER_S = 0.5
engine = dict(slots=2, log_path=str(folder / "engine.log"))
if model_path:
    spec = EngineSpec(backend=Backend.LLAMA, model="null", model_path=model_path, idle_priority=False, **engine)
else:
    spec = EngineSpec(backend=Backend.NULL, model="null", rate_tokens_per_s=50.0, **engine)
config = main.AgentConfig(
    agent_dir=folder,
    credentials_path=folder / "credentials.json",
    consent_path=folder / CONSENT_NAME,
    owner_public_key_path=folder / PUBLIC_NAME,
    engine=spec,
    policy=Policy(dwell_ms=500, flaps_free=10**6, network=NetworkClass.UNMETERED),
    parts=PartsConfig(
        accounts=AccountsConfig(energy=EnergyModel(awake_w=0.0, charger_on_w=0.0)), owner_desk=True, forecast=True,
        spool_bytes=10**7,
    ),
    car=None,
    source=lambda clock, _: KuksaSource(KuksaConfig(address=broker, poll_ms=400), clock),
    state_interval_ms=200,
)
logging.raiseExceptions = False  # on a full disk
logging.basicConfig(filename=folder / "agent.log", level=logging.INFO, format="%(asctime)s %(message)s")
asyncio.run(main.run_agent(config))
"""
BROKER: Final = """
import asyncio, sys
from pathlib import Path
from motorpool.agent.signals import broker

READS = {"GetValue", "GetValues", "ListMetadata", "GetServerInfo", "Subscribe", "SubscribeById"}

class Counting(broker.StandIn):
    async def _allow(self, context, call, scope=broker.Scope.READ):
        if call not in READS:
            print("wrote", call, flush=True)
        await super()._allow(context, call, scope)

broker.StandIn = Counting
asyncio.run(broker.serve(Path(sys.argv[1]), int(sys.argv[2]), 6))
"""


async def until(condition: Callable[[], object], what: str = "it", within_s: float = DEADLINE_S) -> None:
    """Look again and again; an AssertionError that says what did not come."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} did not come within {within_s} s"
        await asyncio.sleep(LOOK_S)


class Program:
    """One Python process of a lane, with what it has said."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._reading: asyncio.Task[None] | None = None
        self.process: asyncio.subprocess.Process
        self.said: list[str] = []

    async def start(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.said = []
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", self._source, *arguments, stdin=pipe, stdout=pipe, env=os.environ | (env or {})
        )
        self._reading = asyncio.create_task(self._read(self.process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self.said.append(line.decode().strip())

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    def count(self, word: str, since: int = 0) -> int:
        """How often it has said something that begins so."""
        return sum(line.startswith(word) for line in self.said[since:])

    @property
    def state(self) -> str:
        """The latest state, with its reasons."""
        return next((line.removeprefix("state ") for line in reversed(self.said) if line.startswith("state ")), "")

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())

    def signal(self, number: signal.Signals) -> None:
        if self.alive:
            self.process.send_signal(number)

    async def end(self) -> None:
        """With SIGKILL, and read what it said before."""
        self.signal(signal.SIGKILL)
        await self.process.wait()
        if self._reading is not None:
            await self._reading


class Way:
    """The way from the vehicle to the message server: it can be cut, and what comes down it can be held up."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._free = asyncio.Event()
        self._free.set()
        self.port = 0

    async def open(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Break every connection; new ones are refused."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.let_go()

    def hold(self) -> None:
        """Nothing reaches the vehicle any more, not even that a message has arrived."""
        self._free.clear()

    def let_go(self) -> None:
        self._free.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:  # the server is gone
            writer.transport.abort()
            return
        self._writers |= {writer, there_writer}
        for one, other, down in ((reader, there_writer, False), (there_reader, writer, True)):
            task = asyncio.create_task(self._carry(one, other, down=down))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, down: bool) -> None:
        try:
            while data := await reader.read(65_536):
                if down:
                    await self._free.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # it was cut
        finally:
            self._writers.discard(writer)
            writer.transport.abort()


class Seen(msgspec.Struct):
    """One process of an engine, or its watcher."""

    pid: int
    is_engine: bool
    cpu_ns: int


class Sampler(threading.Thread):
    """Looks at the engine processes of one agent some fifty times a second.

    ``forbid`` says from when on none of them may use processor time, ``allow`` that they may again.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._seen: dict[int, Seen] = {}
        self._before_s = time.monotonic()
        self._forbidden_s: float | None = None
        self.agent_pid = 0
        self.active_s = 0.0  # the end of the latest stretch in which an engine used processor time
        self.used_ns = 0
        self.violations: list[str] = []
        self.label = ""

    def run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.look()

    def close(self) -> None:
        self._over.set()
        self.join()

    def forbid(self, from_s: float) -> None:
        """From then on, or from an earlier time that was said before."""
        with self._lock:
            self._forbidden_s = from_s if self._forbidden_s is None else min(self._forbidden_s, from_s)

    def allow(self) -> None:
        with self._lock:
            self._forbidden_s = None

    def follow(self, agent_pid: int) -> None:
        with self._lock:
            self.agent_pid = agent_pid

    def engines(self) -> list[int]:
        """Engine processes that live, as they are now."""
        self.look()
        with self._lock:
            return [seen.pid for seen in self._seen.values() if seen.is_engine]

    def watched(self) -> list[int]:
        """Engines that have got their watcher: they are about to load, or have loaded."""
        return [pid for pid in self.engines() if children_of(pid)]

    def alive(self) -> list[int]:
        """Engines and watchers that live."""
        self.look()
        with self._lock:
            return list(self._seen)

    def look(self) -> None:
        with self._lock:
            now_s = time.monotonic()
            engines = set(children_of(self.agent_pid)) | {pid for pid, seen in self._seen.items() if seen.is_engine}
            engines = {pid for pid in engines if pid in self._seen or HOST in command_of(pid)}
            watchers = {child for pid in engines for child in children_of(pid)} - engines
            for pid in {*engines, *watchers, *self._seen}:
                self._look_at(pid, is_engine=pid in engines, now_s=now_s)
            self._before_s = now_s

    def _look_at(self, pid: int, *, is_engine: bool, now_s: float) -> None:
        used_ns = cpu_ns_of(pid)
        if used_ns is None:  # it has ended
            self._seen.pop(pid, None)
            return
        seen = self._seen.get(pid)
        if seen is None:
            self._seen[pid] = Seen(pid, is_engine, 0)
            seen = self._seen[pid]
        more_ns, seen.cpu_ns = used_ns - seen.cpu_ns, used_ns
        if more_ns <= 0 or not seen.is_engine:
            return
        self.active_s = now_s
        self.used_ns += more_ns
        forbidden_s = self._forbidden_s
        if forbidden_s is not None and self._before_s >= forbidden_s:
            late_ms = round((now_s - forbidden_s) * 1000)
            self.violations.append(
                f"{self.label}: an engine used {more_ns / 1e6:.2f} ms, {late_ms} ms after it had to stop"
            )


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    except (OSError, ValueError):
        return []


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def cpu_ns_of(pid: int) -> int | None:
    """Processor time of the threads of a process that live; None for one that has ended or is about to."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rsplit(")", 1)[1].split()[0]
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except (OSError, IndexError):
        return None
    if state in "ZX":
        return None
    used_ns = 0
    for task in tasks:
        with contextlib.suppress(OSError):
            used_ns += int((task / "schedstat").read_text("ascii").split()[0])
    try:
        exiting = int(Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rsplit(")", 1)[1].split()[6]) & 0x4
    except (OSError, IndexError):
        return None
    return None if exiting else used_ns


def hosts_of(agent_pid: int) -> list[int]:
    """Engines and watchers of an agent that live, found by their command line among all processes."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            parts = command_of(int(entry.name)).split(b"\0")
            if HOST in parts and parts[parts.index(HOST) + 2] == str(agent_pid).encode():
                found.append(int(entry.name))
    return [pid for pid in found if cpu_ns_of(pid) is not None]


class Lane:
    """One vehicle, its car, and its cell."""

    def __init__(self, world: World, folder: Path, memory: Path, model: str) -> None:
        self.world = world
        self.folder = folder
        self.memory = memory
        self.model = model
        self.way = Way(world.nats.port)
        self.agent = Program(AGENT)
        self.broker = Program(BROKER)
        self.sampler = Sampler()
        self.ahead_s = 0.0
        self.most_ahead_s = 0.0
        self.writes = 0
        self.first: dict[str, str] | None = None  # the answers of an unbroken batch
        self._broker_port = 0
        self._car = folder / "car"
        self._place = cgroup.find_place()

    async def start(self) -> None:
        await self.way.open()
        credentials = await self.world.enrol(VEHICLE)
        through = credentials.replace(f":{self.world.nats.port}".encode(), f":{self.way.port}".encode())
        assert through != credentials
        agent = self.folder / "agent"
        for folder in (agent, self._car):
            folder.mkdir()
        (agent / "credentials.json").write_bytes(through)
        enrol_owner(agent)
        given_ms = time.time_ns() // 1_000_000 - 2 * HOUR_MS  # an agent may start while its clock is an hour behind
        give_consent(agent, VEHICLE, ConsentLimits(max_watts_w=100), now_ms=given_ms, expires_ms=given_ms + MONTH_MS)
        await self.start_broker()
        await self.start_agent()
        self.sampler.start()

    async def start_broker(self) -> None:
        self.writes += self.broker.count("wrote")
        await self.broker.start(str(self._car), str(self._broker_port))
        await until(lambda: self.broker.said, "the broker's address")
        self._broker_port = int(json.loads(self.broker.said[0])["address"].rpartition(":")[2])

    async def start_agent(self) -> None:
        env = {"XDG_RUNTIME_DIR": str(self.memory), "RUNTIME_DIRECTORY": ""}
        arguments = (str(self.folder / "agent"), f"127.0.0.1:{self._broker_port}", str(self.ahead_s), self.model)
        await self.agent.start(*arguments, env=env)
        self.sampler.follow(self.agent.process.pid)

    async def owner(self, action: str) -> None:
        """The owner does something with the car."""
        answer = await play_owner(self._car, action)
        assert answer["ok"], answer

    async def batch(self) -> str:
        return await self.world.batch([chat(f"n {number}", TOKENS) for number in range(LINES)])

    async def finished(self, batch: str) -> None:
        """Every line is in the books once, paid once, and says what it says in an unbroken batch."""
        end_s = time.monotonic() + 2 * DEADLINE_S
        step_s = time.monotonic() + 6.0
        while self.world.status(batch) not in {"completed", "failed", "expired", "cancelled"}:
            now_s = time.monotonic()
            assert now_s < end_s, f"the batch came to no end: {self.agent.state}"
            if now_s > step_s:  # a cell that waits for somebody who is gone waits less long here
                self.world.ahead_ms += 20_000
                step_s = now_s + 6.0
            await asyncio.sleep(LOOK_S)
        shown = await self.world.ended(batch)
        assert shown["status"] == "completed", shown
        rows = await self.world.rows(shown["output_file_id"])
        assert len(rows) == LINES, "a line is missing"
        assert self.world.completed(batch) == LINES
        self.world.check_money(batch)
        answers = {name: _text_of(row) for name, row in rows.items()}
        if self.first is None:
            self.first = answers
        assert self.model or answers == self.first, "an answer is another one than without the fault"

    def left(self, agent_pid: int) -> list[str]:
        """Groups and folders of the engines of an agent that is gone."""
        groups = [] if self._place is None else self._place.parent.glob(f"{cgroup.PREFIX}{agent_pid}-*")
        return [path.name for path in (*groups, *self.memory.glob(f"{FOLDER_PREFIX}*"))]

    async def close(self) -> None:
        self.writes += self.broker.count("wrote")
        for program in (self.agent, self.broker):
            program.signal(signal.SIGCONT)
            await program.end()
        await until(lambda: not self.sampler.alive(), "the end of the last engine")
        self.sampler.close()
        if self.world.nats.process is not None and self.world.nats.process.returncode is None:
            self.world.nats.process.send_signal(signal.SIGCONT)
        await self.way.cut()
        if self._place is not None:
            for path in self._place.parent.glob(f"{cgroup.PREFIX}{self.agent.process.pid}-*"):
                with contextlib.suppress(OSError):
                    path.rmdir()


def _text_of(row: dict[str, Any]) -> str:
    return str(row["response"]["body"]["choices"][0]["message"]["content"])


@asynccontextmanager
async def a_lane(folder: Path, model: str = "") -> AsyncIterator[Lane]:
    """A vehicle whose car is parked, plugged in and left alone; its agent has just been started."""
    folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  # a test's own folders, where nothing else waits
    memory = Path(tempfile.mkdtemp(prefix="motorpool-sweep-", dir="/dev/shm"))
    try:
        async with a_world(folder) as world:
            lane = Lane(world, folder, memory, model)
            try:
                await lane.start()
                yield lane
            finally:
                await lane.close()
    finally:
        for path in memory.iterdir():  # noqa: ASYNC240
            path.rmdir()
        memory.rmdir()  # noqa: ASYNC240
