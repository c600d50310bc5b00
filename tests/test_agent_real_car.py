"""A real agent, a real databroker's protocol, a real message server: the car is read over gRPC, the owner is obeyed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.test_agent_process import DEADLINE_S, Watcher, ended, grant

from motorpool import wire
from motorpool.agent.enrolment import enrol_owner, give_consent
from motorpool.agent.signals import broker as broker_module
from motorpool.agent.signals.owner_port import play_owner
from motorpool.bus import CellLink, EmbeddedNats
from motorpool.trust.consent import ConsentLimits
from motorpool.trust.credentials import CellIdentity, save_credentials
from motorpool.types import ReasonCode, ReturnReason, VehicleState

MAIN = "motorpool.cli.main"
STOPS_S = 1.0  # from the end of the owner's command to the end of the engine
STOPPED = {VehicleState.YIELDING, VehicleState.DENIED}


class Program:
    """A program of ours in a process of its own, whose lines can be waited for."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, *arguments: str) -> Program:
        pipe, both = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        return cls(await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=pipe, stderr=both))

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode())
            self._changed.set()

    async def says(self, text: str, times: int = 1) -> str:
        """Wait until so many lines hold the text; the last of them."""
        async with asyncio.timeout(DEADLINE_S):
            while len(found := [line for line in self.lines if text in line]) < times:
                self._changed.clear()
                await self._changed.wait()
            return found[-1]

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal if it still runs, and wait for its end."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
        code = await asyncio.wait_for(self.process.wait(), DEADLINE_S)
        await self._reading
        return code

    @property
    def children(self) -> list[int]:
        """Processes of its own that run; one that has ended and was not asked for its exit code yet runs no more."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [pid for pid in map(int, path.read_text("utf-8").split()) if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text("utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


class Trial:
    """One car with its broker and its agent, and the cell's end of the link."""

    def __init__(self, folder: Path, nats: EmbeddedNats, link: CellLink, watcher: Watcher) -> None:
        self.folder = folder
        self.nats = nats
        self.link = link
        self.watcher = watcher
        self.broker: Program
        self.agent: Program
        self.owner_dir: Path

    async def begin(self, version: int) -> None:
        self.broker = await Program.start("-m", broker_module.__name__, "--port", "0", "--vss", str(version))
        said = json.loads(await self.broker.says("address"))
        self.owner_dir = Path(said["dir"])
        rate = ("--slots", "2", "--null-rate", "50", "--state-interval", "0.2", "--unmetered")
        arguments = ("agent", "--dir", str(self.folder), "--kuksa", said["address"], *rate)
        self.agent = await Program.start("-m", MAIN, *arguments)

    async def state(self, holds: Callable[[wire.State], bool]) -> wire.State:
        """The next state of which this holds."""
        async with asyncio.timeout(DEADLINE_S):
            while (state := self.watcher.state) is None or not holds(state):
                self.watcher.changed.clear()
                await self.watcher.changed.wait()
            return state

    async def ready(self) -> wire.State:
        return await self.state(lambda state: state.state is VehicleState.READY)

    async def at_work(self, lease: str) -> int:
        """Grant a lease and wait until there is some text; the process of the engine."""
        state = await self.ready()
        self.link.send("v1", grant(state.incarnation, lease))
        await self.state(lambda now: now.tokens_generated >= state.tokens_generated + 10)
        (engine,) = self.agent.children
        return engine

    async def stopped(self, *codes: ReasonCode) -> wire.State:
        """Until it has stopped for at least these reasons."""
        return await self.state(
            lambda state: state.state in STOPPED and set(codes) <= {reason.code for reason in state.reasons}
        )

    async def owner(self, *arguments: str) -> str:
        """A command of the owner's, as a process; what it prints."""
        program = await Program.start("-m", MAIN, "owner", *arguments, "--dir", str(self.folder))
        assert await asyncio.wait_for(program.process.wait(), DEADLINE_S) == 0, program.lines
        await program._reading
        return "".join(program.lines)

    async def owner_stops(self, *arguments: str) -> None:
        """A command of the owner's ends the engine that runs now."""
        (engine,) = self.agent.children
        end = asyncio.create_task(ended(engine))
        await asyncio.sleep(0)
        await self.owner(*arguments)
        await asyncio.wait_for(end, STOPS_S)
        assert self.agent.children == []

    async def close(self) -> None:
        for name in ("agent", "broker"):
            if hasattr(self, name):
                await getattr(self, name).end(signal.SIGKILL)


@asynccontextmanager
async def a_trial(tmp_path: Path, version: int = 6) -> AsyncIterator[Trial]:
    identity = CellIdentity.generate(0)
    nats = EmbeddedNats(tmp_path / "nats", identity)
    await nats.start()
    link = await CellLink.connect([nats.url], identity, lambda _: None)
    watcher = Watcher()
    await link.listen(watcher.on_state, lambda _vehicle, _data: None)
    link.pull_work(watcher.on_work)
    folder = tmp_path / "v1"
    folder.mkdir()
    save_credentials(folder / "credentials.json", identity.enrol("v1", [nats.url], 0))
    enrol_owner(folder)
    now_ms = time.time_ns() // 1_000_000
    give_consent(folder, "v1", ConsentLimits(max_watts_w=100), now_ms=now_ms, expires_ms=now_ms + 10**7)
    trial = Trial(folder, nats, link, watcher)
    try:
        await trial.begin(version)
        yield trial
    finally:
        await trial.close()
        await link.close()
        await nats.stop()


async def lines_back(trial: Trial, count: int) -> list[wire.ReturnItem]:
    return await trial.watcher.back(ReturnReason.GUARD, count)


@pytest.mark.parametrize("version", [5, 6])
def test_a_car_that_is_read_over_grpc_works_and_yields_to_its_owner(tmp_path: Path, version: int) -> None:
    async def scenario() -> None:
        async with a_trial(tmp_path, version) as trial:
            await trial.at_work("one")
            answer = await play_owner(trial.owner_dir, "open-door")
            assert answer["ok"]
            await trial.stopped(ReasonCode.DOOR_OPEN, ReasonCode.UNLOCKED)
            items = await lines_back(trial, 3)
            assert sum(item.tokens > 0 for item in items) == 2, "what was generated is not lost"
            assert (await play_owner(trial.owner_dir, "lock"))["ok"]
            await trial.at_work("two")
            if version == 5:
                await play_owner(trial.owner_dir, "drive-off")
                await trial.stopped(ReasonCode.MOVING, ReasonCode.NOT_PLUGGED_IN)
            else:  # nobody tells anything any more
                assert await trial.broker.end(signal.SIGKILL) == -signal.SIGKILL
                await trial.stopped(ReasonCode.SIGNAL_STALE)
            await lines_back(trial, 6)
            await trial.agent.says("denied")
            assert await trial.agent.end() == 0

    asyncio.run(scenario())


def test_the_owners_words_stop_the_car_without_any_network(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_trial(tmp_path) as trial:
            await trial.at_work("one")
            assert trial.nats.process is not None
            trial.nats.process.send_signal(signal.SIGSTOP)
            try:
                await trial.owner_stops("pause", "--minutes", "5")
                await trial.owner("resume")
                await trial.agent.says("engine ready", 2)
                await trial.owner_stops("need-car")
                await trial.owner("resume")
                await trial.agent.says("engine ready", 3)
                await trial.owner_stops("withdraw")
                status = json.loads(await trial.owner("status", "--json"))
            finally:
                trial.nats.process.send_signal(signal.SIGCONT)
            assert status["consent"]["refusal"] == ReasonCode.CONSENT_WITHDRAWN
            assert await trial.agent.end() == 0
            await check_log(trial)

    asyncio.run(scenario())


async def check_log(trial: Trial) -> None:
    log = await trial.owner("log")
    said = [
        "power up to 100 W",
        "consent until",
        "paused until",
        "you said: go on (owner)",
        "you need the car: it rests",
        "the consent was taken back (owner)",
    ]
    at = [log.find(text) for text in said]
    assert -1 not in at, log
    assert at == sorted(at), "in the order in which it happened"
    assert "you said: not now" in log
    assert "all as written" in await trial.owner("log", "--verify")
    spans: list[dict[str, Any]] = [json.loads(line) for line in (await trial.owner("log", "--json")).splitlines()]
    assert sum(span.get("working_ms", 0) for span in spans) > 0
