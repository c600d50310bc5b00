"""What can happen to a machine in the middle of a stream, done to real processes: killed, frozen, cut off, driven away.

Each process stands behind a proxy of its own, which cuts and delays what passes, and reads from it which streams the
process has: their prompts hold a mark. The same proxies stand before our vehicles and before the servers that other
gateways are given. Called by: ``run_streams``, ``tests/test_stream_chaos.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import psutil

from bench.env import ROOT
from bench.streams_car import READY_NAME
from motorpool.agent.enrolment import enrol_owner, give_consent
from motorpool.agent.signals.owner_port import play_owner
from motorpool.trust.consent import ConsentLimits
from motorpool.trust.credentials import VehicleCredentials, save_credentials

HOUR_MS: Final = 3_600_000
READ_BYTES: Final = 1 << 16
FAULTS: Final = ("kill", "freeze", "partition", "drive off")
_MARK: Final = re.compile(rb"stream-(\d{6})")
_MARK_BYTES: Final = 13


def mark(number: int) -> str:
    """What a prompt holds so that the proxies know its stream."""
    return f"stream-{number:06d}"


class Proxy:
    """Passes TCP connections on to ``port``, unless it is cut; ``delay_s`` is added to everything."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.delay_s = 0.0
        self.seen: dict[int, float] = {}  # marks, and when each passed last, by the clock of the event loop
        self.port = 0

    async def start(self) -> None:
        """Listen on a free port of this machine."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop, and end what passes."""
        if self._server is not None:
            self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._open.clear()

    def mend(self) -> None:
        """What was held passes again, and what comes."""
        self._open.set()

    def reset(self) -> None:
        """Every connection ends, as when a machine says that it goes."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._open.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            writer.transport.abort()
            self._tasks.discard(task)
            return
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, far_writer):
                self._writers.discard(each)
                each.transport.abort()
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tail = b""
        while data := await reader.read(READ_BYTES):
            now_s = asyncio.get_running_loop().time()
            self.seen |= {int(found): now_s for found in _MARK.findall(tail + data)}
            tail = data[-_MARK_BYTES + 1 :]
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # one side has ended: so does the other


class Machine:
    """A process that can be struck."""

    def __init__(self, name: str, command: list[str], proxy: Proxy, log: Path) -> None:
        self.name = name
        self.proxy = proxy
        self._command = command
        self._log = log
        self._child: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it (again)."""
        with self._log.open("ab") as output:
            self._child = await asyncio.create_subprocess_exec(
                *self._command, cwd=ROOT, stdout=output, stderr=output, stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, "PYTHONWARNINGS": "ignore"},
            )  # fmt: skip

    def signal(self, number: int) -> None:
        """Send a signal to the process and those that it has started."""
        assert self._child is not None
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            parent = psutil.Process(self._child.pid)
            for each in (*parent.children(recursive=True), parent):
                each.send_signal(number)

    def tell(self, number: int) -> None:
        """Send a signal to the process alone."""
        assert self._child is not None
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(number)

    async def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        if self._child is not None:
            await self._child.wait()

    async def strike(self, fault: str) -> None:
        """Let it happen."""
        raise NotImplementedError

    async def heal(self) -> None:
        """Have it back."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._child is not None
        return self._child.pid


class Car(Machine):
    """One of our vehicles."""

    def __init__(self, name: str, folder: Path, proxy: Proxy, options: list[str]) -> None:
        command = [sys.executable, "-m", "bench.streams_car", str(folder), *options]
        super().__init__(name, command, proxy, folder / "car.log")
        self.folder = folder
        self._struck = ""

    @classmethod
    def of_many(cls, name: str, first: Car, command: list[str]) -> Car:
        """One process for several vehicles; ``first`` lends its folder and proxy."""
        car = cls(name, first.folder, first.proxy, [])
        car._command = command
        return car

    async def start(self) -> None:
        """Start it (again)."""
        (self.folder / READY_NAME).unlink(missing_ok=True)
        await super().start()

    @property
    def is_ready(self) -> bool:
        """Whether it has reported itself ready since its start."""
        return (self.folder / READY_NAME).is_file()

    async def strike(self, fault: str) -> None:
        """Let it happen."""
        self._struck = fault
        if fault == "kill":
            await self.kill()
        elif fault == "freeze":
            self.signal(signal.SIGSTOP)
        elif fault == "partition":
            self.proxy.cut()
        elif fault == "announce":
            self.tell(signal.SIGUSR1)
        elif fault == "drive off":
            await play_owner(self.folder, "drive-off")

    async def heal(self) -> None:
        """Have it back, ready for work soon."""
        if self._struck == "kill":
            await self.start()
        elif self._struck == "freeze":
            self.signal(signal.SIGCONT)
        elif self._struck == "partition":
            self.proxy.mend()
        elif self._struck == "announce":
            self.tell(signal.SIGUSR2)
        elif self._struck == "drive off":
            await self.kill()  # a new simulated car stands parked and plugged in: nobody waits for the way home
            await self.start()
        self._struck = ""


class Server(Machine):
    """A server behind HTTP that another gateway forwards to."""

    def __init__(self, name: str, command: list[str], proxy: Proxy, log: Path) -> None:
        super().__init__(name, command, proxy, log)
        self._struck = ""

    async def strike(self, fault: str) -> None:
        """Let the same happen; a machine that drives off ends its connections."""
        self._struck = fault
        if fault == "kill":
            await self.kill()
        elif fault == "freeze":
            self.signal(signal.SIGSTOP)
        elif fault == "partition":
            self.proxy.cut()
        elif fault == "drive off":
            self.proxy.reset()

    async def heal(self) -> None:
        """Have it back."""
        if self._struck == "kill":
            await self.start()
        elif self._struck == "freeze":
            self.signal(signal.SIGCONT)
        elif self._struck == "partition":
            self.proxy.mend()
        self._struck = ""


Enrol = Callable[[str, str], Awaitable[bytes]]  # the operator's: id of the vehicle and public key, to its credentials


async def enrol_car(name: str, folder: Path, nats_port: int, enrol: Enrol, options: list[str], now_ms: int) -> Car:
    """A vehicle behind a proxy, with its owner's consent; not started."""
    await asyncio.to_thread(folder.mkdir, parents=True)
    proxy = Proxy(nats_port)
    await proxy.start()
    key = enrol_owner(folder)
    give_consent(folder, name, ConsentLimits(max_watts_w=400), now_ms=now_ms, expires_ms=now_ms + 12 * HOUR_MS)
    credentials = msgspec.json.decode(await enrol(name, key.public.hex()), type=VehicleCredentials)
    there = msgspec.structs.replace(credentials, urls=[f"nats://127.0.0.1:{proxy.port}"])
    save_credentials(folder / "credentials.json", there)
    return Car(name, folder, proxy, options)


def serving(machines: Sequence[Machine], number: int) -> Machine | None:
    """Which machine was given a stream last."""
    found = [machine for machine in machines if number in machine.proxy.seen]
    return max(found, key=lambda machine: machine.proxy.seen[number], default=None)
