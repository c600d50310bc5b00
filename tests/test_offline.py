"""A vehicle that loses its network, works on, dies, and comes back: the real agent, message server, cell and books."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.cell_world import DEADLINE_S, a_world, chat, run

LINES = 32
PROGRAM = """
import asyncio, functools, sys
from pathlib import Path
from motorpool import wire
from motorpool.agent import delivery, main
from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME
from motorpool.agent.parts import PartsConfig
from motorpool.agent.runtime.null import InlineNullEngine
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.spool import DiskSpool
from motorpool.core.guard import Policy

folder = Path(sys.argv[1])
submit, put, waiting = InlineNullEngine.submit, DiskSpool.put, DiskSpool.waiting

def say(word, lines):
    for line in lines:
        print(word, line, flush=True)

def told_submit(self, work):
    say("ran", [one.response_id.rsplit("-", 1)[1] for one in work])
    submit(self, work)

def told_put(self, message_id, data):
    kept = put(self, message_id, data)
    if kept:
        say("kept", [item.line for item in wire.decode(wire.UP_WORK, data).items])
    return kept

def told_waiting(self):
    say("found", [len(found := waiting(self))])
    return found

InlineNullEngine.submit, DiskSpool.put, DiskSpool.waiting = told_submit, told_put, told_waiting
delivery.SPOOL_AFTER_S = 0.2
asyncio.run(main.run_agent(main.AgentConfig(
    agent_dir=folder,
    credentials_path=folder / "credentials.json",
    consent_path=folder / CONSENT_NAME,
    owner_public_key_path=folder / PUBLIC_NAME,
    engine=EngineSpec(backend=Backend.NULL, model="null", slots=16, rate_tokens_per_s=50.0, hosted=False),
    policy=Policy(dwell_ms=0),
    parts=PartsConfig(spool_bytes=10**7),
    state_interval_ms=200,
)))
"""


class Network:
    """The way from the vehicle to the message server, which can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Break every connection; new ones are refused."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers |= {writer, there_writer}
        for one, other in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(self._carry(one, other))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # it was cut
        finally:
            self._writers.discard(writer)
            writer.transport.abort()


class Process:
    """The agent as a process that tells which lines it gives to its engine and which it keeps safe on disk."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.said: list[tuple[str, int]] = []

    @classmethod
    async def start(cls, folder: Path) -> Process:
        command = (sys.executable, "-c", PROGRAM, str(folder))
        return cls(await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE))

    def lines(self, word: str) -> list[int]:
        return [line for said, line in self.said if said == word]

    async def until(self, word: str, count: int) -> None:
        """Read on until it has said this word so often."""
        assert self._process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            while len(self.lines(word)) < count:
                said, line = (await self._process.stdout.readline()).split()
                self.said.append((said.decode(), int(line)))

    async def kill(self) -> None:
        """With SIGKILL: it can save nothing."""
        if self._process.returncode is None:
            self._process.kill()
        await self._end()

    async def stop(self) -> None:
        self._process.terminate()
        assert await self._end() == 0

    async def _end(self) -> int:
        assert self._process.stdout is not None
        rest = await asyncio.wait_for(self._process.stdout.read(), DEADLINE_S)
        words = (line.split() for line in rest.splitlines())
        self.said += [(said.decode(), int(line)) for said, line in words]
        return await self._process.wait()


@asynccontextmanager
async def an_agent(folder: Path) -> AsyncIterator[Process]:
    process = await Process.start(folder)
    try:
        yield process
    finally:
        await process.kill()


@pytest.mark.parametrize("finished", [LINES, LINES // 2])
def test_what_was_finished_without_a_network_by_an_agent_that_died_counts_once_and_is_not_computed_again(
    tmp_path: Path, finished: int
) -> None:
    async def scenario() -> None:
        async with a_world(tmp_path) as world:
            network = Network(world.nats.port)
            await network.open()
            credentials = await world.enrol("v1")
            through = credentials.replace(f":{world.nats.port}".encode(), f":{network.port}".encode())
            assert through != credentials
            folder = world._config("v1", through, 50.0, 16, None).agent_dir
            async with an_agent(folder) as first:
                await world.ready("v1")
                batch = await world.batch([chat(f"n {number}", 20) for number in range(LINES)])
                await first.until("ran", 1)
                await network.cut()
                await first.until("kept", finished)  # hours of driving through nowhere, in short
                await first.kill()
            assert world.completed(batch) == 0
            vehicle = world.cell.scheduler.vehicles["v1"]
            world.ahead_ms += 200_000
            await world.until(lambda: vehicle.offline)
            async with an_agent(folder) as second:
                await second.until("found", 1)
                await network.open()
                shown = await world.ended(batch)
                await world.ready("v1")
                await second.stop()
            assert shown["status"] == "completed"
            assert len(await world.rows(shown["output_file_id"])) == LINES
            kept, again = Counter(first.lines("kept")), Counter(second.lines("ran"))
            assert max(kept.values()) == 1
            assert not kept & again
            assert max((kept | again).values()) == 1  # what the agent took with it was computed again, once
            assert finished < LINES or (not again and kept == Counter(first.lines("ran")) == Counter(range(LINES)))
            assert second.lines("found")[0] > 0
            world.check_money(batch)
            await network.cut()
        assert not any((folder / "spool").iterdir())

    run(scenario())
