"""The agent as a process with a real engine process: what is left when either of them is ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from motorpool import wire
from motorpool.agent.enrolment import enrol_owner, give_consent
from motorpool.bus import CellLink, EmbeddedNats, WorkMessage
from motorpool.trust.consent import ConsentLimits
from motorpool.trust.credentials import CellIdentity, save_credentials
from motorpool.types import Kind, ReturnReason, VehicleState

DEADLINE_S = 20.0
PROGRAM = """
import asyncio, sys
from pathlib import Path
from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME
from motorpool.agent.main import AgentConfig, run_agent
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.core.guard import Policy

folder = Path(sys.argv[1])
asyncio.run(run_agent(AgentConfig(
    agent_dir=folder,
    credentials_path=folder / "credentials.json",
    consent_path=folder / CONSENT_NAME,
    owner_public_key_path=folder / PUBLIC_NAME,
    engine=EngineSpec(backend=Backend.NULL, model="null", slots=2, rate_tokens_per_s=50.0),
    policy=Policy(dwell_ms=0),
    state_interval_ms=200,
)))
"""


class Watcher:
    """The cell's end: the latest state and all work of one vehicle."""

    def __init__(self) -> None:
        self.state: wire.State | None = None
        self.work: list[wire.Results | wire.Returned] = []
        self.changed = asyncio.Event()

    def on_state(self, vehicle: str, data: bytes) -> None:
        message = wire.decode(wire.UP_STATE, data)
        if isinstance(message, wire.State):
            self.state = message
            self.changed.set()

    async def on_work(self, messages: list[WorkMessage]) -> None:
        for message in messages:
            self.work.append(wire.decode(wire.UP_WORK, message.data))
            await message.acknowledge()
        self.changed.set()

    async def next_state(self, incarnation: str = "", *, generated: int = 0) -> wire.State:
        """The next state that works or is ready, of another incarnation, with so many tokens."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                state = self.state
                up = state is not None and state.state in {VehicleState.READY, VehicleState.WORKING}
                if state and up and state.incarnation != incarnation and state.tokens_generated >= generated:
                    return state
                self.changed.clear()
                await self.changed.wait()

    async def back(self, reason: ReturnReason, lines: int) -> list[wire.ReturnItem]:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                items = [
                    item
                    for message in self.work
                    if isinstance(message, wire.Returned) and message.reason == reason
                    for item in message.items
                ]
                if len(items) == lines:
                    return items
                self.changed.clear()
                await self.changed.wait()


def start_agent(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)])


def engines_of(agent: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text("utf-8")
    return [int(pid) for pid in children.split()]


async def ended(pid: int) -> None:
    """Wait for the end of a process that is not our child."""
    descriptor = os.pidfd_open(pid)
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, over.set)
    try:
        await asyncio.wait_for(over.wait(), DEADLINE_S)
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)


def grant(incarnation: str, lease: str) -> bytes:
    body = msgspec.json.encode(
        {"model": "null", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2_000}
    )
    items = [wire.Item(line=line, body=body) for line in range(3)]
    return wire.encode(
        wire.Grant(
            lease_id=lease,
            incarnation=incarnation,
            job_id="job",
            kind=Kind.CHAT,
            model="null",
            ttl_ms=60_000,
            items=items,
        )
    )


class Trial:
    """One agent as a process, with the cell's end of its link."""

    def __init__(self, link: CellLink, watcher: Watcher, folder: Path) -> None:
        self.link = link
        self.watcher = watcher
        self._folder = folder
        self.agent = start_agent(folder)

    def again(self) -> None:
        """Start the agent anew."""
        self.agent = start_agent(self._folder)

    async def ready(self, *, without: int | None = None) -> wire.State:
        """Wait until the agent is ready and has an engine, another one than ``without``."""
        state = await self.watcher.next_state()
        while state.state is not VehicleState.READY or without in engines_of(self.agent) or not engines_of(self.agent):
            self.watcher.changed.clear()
            await asyncio.wait_for(self.watcher.changed.wait(), DEADLINE_S)
            state = await self.watcher.next_state()
        return state

    async def at_work(self, state: wire.State, lease: str) -> int:
        """Grant a lease and wait until there is some text; the process of the engine."""
        self.link.send("v1", grant(state.incarnation, lease))
        await self.watcher.next_state(generated=state.tokens_generated + 10)
        (engine,) = engines_of(self.agent)
        return engine

    async def stop(self, engine: int) -> None:
        """Ask the agent to stop; returns when it and its engine have ended in good order."""
        end = asyncio.create_task(ended(engine))
        await asyncio.sleep(0)
        self.agent.terminate()
        await self.watcher.back(ReturnReason.SHUTDOWN, 3)
        assert await asyncio.to_thread(self.agent.wait, DEADLINE_S) == 0
        await end


@asynccontextmanager
async def a_trial(tmp_path: Path) -> AsyncIterator[Trial]:
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
    trial = Trial(link, watcher, folder)
    try:
        yield trial
    finally:
        trial.agent.kill()
        trial.agent.wait(DEADLINE_S)
        await link.close()
        await nats.stop()


def test_no_engine_outlives_its_agent_and_no_agent_falls_with_its_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_trial(tmp_path) as trial:
            watcher = trial.watcher
            # the engine is killed: its work comes back with its text, and a new engine takes its place
            first = await trial.at_work(await watcher.next_state(), "one")
            os.kill(first, signal.SIGKILL)
            items = await watcher.back(ReturnReason.ENGINE_DIED, 3)
            assert [item.started for item in items] == [True, True, False]
            assert all(item.tokens > 0 for item in items[:2])
            # the agent is killed: the kernel ends its engine
            state = await trial.ready()
            second = await trial.at_work(state, "two")
            assert second != first
            end = asyncio.create_task(ended(second))
            await asyncio.sleep(0)
            trial.agent.kill()
            trial.agent.wait(DEADLINE_S)
            await end
            # the next agent starts at once beside what the killed one left, and stops in good order when asked
            trial.again()
            await trial.stop(await trial.at_work(await watcher.next_state(state.incarnation), "three"))

    asyncio.run(scenario())


def test_an_engine_whose_agent_hangs_ends_and_the_agent_goes_on_with_another_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_trial(tmp_path) as trial:
            state = await trial.ready()
            assert state.energy_mwh > 0  # to load a model is work as well
            engine = await trial.at_work(state, "one")
            trial.agent.send_signal(signal.SIGSTOP)
            await ended(engine)
            trial.agent.send_signal(signal.SIGCONT)
            items = await trial.watcher.back(ReturnReason.GUARD, 3)  # nothing is held against the lines
            assert all(item.tokens > 0 for item in items[:2])
            await trial.stop(await trial.at_work(await trial.ready(without=engine), "two"))

    asyncio.run(scenario())
