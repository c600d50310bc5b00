"""An engine in a child process, behind the protocol of every engine.

Decides: how the process is started, stopped in its tracks and ended. Must not: run a model in the agent's process.
Called by: ``build_engine``.

The child leads a process group of its own, which is what ``freeze`` stops and ``kill`` ends; both are done by the
kernel and need nothing from the child. If this process dies, the kernel ends the child (``host`` asks for that).
The kernel does so when the *thread* that started the child ends, so ``start`` must be called in the main thread or in
one that lives as long as the engine. If this process hangs, nobody calls ``beat`` any more and the child ends itself.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, cast

from motorpool.agent.runtime import frames
from motorpool.agent.runtime.engine import Cancelled, Died, EngineEvent, Finished, OnEvents, Ready, Work
from motorpool.agent.runtime.meter import BusyMeter
from motorpool.agent.runtime.spec import EngineSpec
from motorpool.errors import CapacityError, EngineError

MAX_HELD: Final = 65_536  # attempts in one engine, running and queued
MAX_LOG_BYTES: Final = 1024 * 1024  # a longer log is started anew
CLOSED_GRACE_S: Final = 2.0  # from the end of the connection to the end of the process
_SOCKET_BYTES: Final = 4 * 1024 * 1024


class HostedEngine:
    """The agent's side of one engine process."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._child: _Child | None = None
        self._leaving: set[_Child] = set()
        self._meter = BusyMeter(spec.slots)

    @property
    def pid(self) -> int | None:
        """The process, for those who measure it; None if there is none."""
        return None if self._child is None else self._child.pid

    async def start(self, on_events: OnEvents) -> None:
        """Start the process and begin loading."""
        if self._child is not None:
            raise EngineError("the engine is already started")
        self._meter = BusyMeter(self._spec.slots)
        self._meter.load()
        child = _Child(self._spec, self._meter, on_events, self._gone)
        self._child = child
        try:
            await child.start()
        except OSError as error:
            self._child = None
            child.clear_up()
            on_events([Died(exit_code=None, message=f"the engine process could not be started: {error.strerror}")])

    def submit(self, work: list[Work]) -> None:
        """Queue attempts; raise CapacityError beyond MAX_HELD."""
        child = self._started()
        if child.held + len(work) > MAX_HELD:
            raise CapacityError(f"an engine holds at most {MAX_HELD} attempts", code="engine_queue_full")
        child.submit(work)

    def cancel(self, keys: list[str]) -> None:
        """Stop attempts."""
        if self._child is not None and keys:
            self._child.send(frames.Cancel(keys=keys))

    def freeze(self) -> None:
        """Stop the whole process group at once."""
        if self._child is not None:
            self._child.signal(signal.SIGSTOP)
            self._meter.stop()

    def thaw(self) -> None:
        """Let it go on."""
        if self._child is not None:
            self._child.signal(signal.SIGCONT)
            if self._child.ready:
                self._meter.run()

    def kill(self) -> None:
        """End the process group at once, frozen or not."""
        child, self._child = self._child, None
        if child is not None:
            if child.pid is not None:
                self._leaving.add(child)
            child.kill()
            self._meter.clear()

    def beat(self) -> None:
        """It may go on for the spec's ``silence_s`` from now."""
        if self._child is not None:
            self._child.beat()

    def busy_ms(self) -> int:
        """The time of loading, and slot-seconds spent on attempts, divided by the slots; not the time it was frozen."""
        return self._meter.busy_ms()

    async def close(self) -> None:
        """Kill, and wait until this process and every one that was killed before are gone."""
        self.kill()
        for child in list(self._leaving):
            await child.gone.wait()

    def _started(self) -> _Child:
        if self._child is None:
            raise EngineError("the engine is not started")
        return self._child

    def _gone(self, child: _Child) -> None:
        self._leaving.discard(child)
        if self._child is child:
            self._child = None
            self._meter.clear()


_OnGone = Callable[["_Child"], None]


class _Child(asyncio.Protocol):
    """One process, from its start to its end."""

    def __init__(self, spec: EngineSpec, meter: BusyMeter, on_events: OnEvents, on_gone: _OnGone) -> None:
        self._spec = spec
        self._meter = meter
        self._on_events: OnEvents | None = on_events
        self._on_gone = on_gone
        self._unpacker = frames.Unpacker()
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._broken: frames.Broken | None = None
        self._pidfd = -1
        self._exit_code: int | None = None
        self._lifeline: frames.Lifeline | None = None
        self._folder: Path | None = None
        self.gone = asyncio.Event()
        self.ready = False
        self.held = 0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="motorpool-engine-"))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            with _log(self._spec.log_path) as log:
                self._process = self._spawn(theirs.fileno(), log, self._folder)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._watch(asyncio.get_running_loop(), self._process)
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
        self.send(frames.Load(spec=self._spec))

    def beat(self) -> None:
        if self._lifeline is not None:
            self._lifeline.extend(self._spec.silence_s)

    def clear_up(self) -> None:
        """Remove what the process may have left of its loading: it could be killed at any moment."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _spawn(self, fd: int, log: IO[bytes], folder: Path) -> subprocess.Popen[bytes]:
        lifeline_fd = frames.Lifeline.make()
        try:
            self._lifeline = frames.Lifeline(lifeline_fd)
            self.beat()
            module = "motorpool.agent.runtime.host"
            return subprocess.Popen(
                [sys.executable, "-m", module, str(fd), str(os.getpid()), str(lifeline_fd)],
                pass_fds=(fd, lifeline_fd),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"TMPDIR": str(folder)},
            )
        finally:
            os.close(lifeline_fd)

    def _watch(self, loop: asyncio.AbstractEventLoop, process: subprocess.Popen[bytes]) -> None:
        """Learn of the end of the process."""
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except OSError:  # an old kernel, or one that does not have it: a thread waits instead
            threading.Thread(target=lambda: self._wait_in_thread(loop, process), daemon=True).start()
        else:
            loop.add_reader(self._pidfd, self._ended)

    def _wait_in_thread(self, loop: asyncio.AbstractEventLoop, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._ended)

    def submit(self, work: list[Work]) -> None:
        self.held += len(work)
        self._meter.add(len(work))
        if self._transport is not None:
            for data in frames.pack_work(work):
                self._transport.write(data)

    def send(self, message: frames.ToEngine) -> None:
        if self._transport is not None:
            self._transport.write(frames.pack(message))

    def signal(self, number: signal.Signals) -> None:
        """Send to the whole group. The process is not reaped yet, so its number is still its own."""
        process = self._process
        if process is not None and process.returncode is None:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return  # it is just ending; ``_ended`` tells

    def kill(self) -> None:
        self._on_events = None
        self.signal(signal.SIGKILL)
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for message in self._unpacker.feed(data):
            self._take(frames.FROM_ENGINE.decode(message))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # how the process ended says more
        self._transport = None
        if self._exit_code is None:  # it closed its end: it is ending, or it hears nothing any more
            asyncio.get_running_loop().call_later(CLOSED_GRACE_S, self.signal, signal.SIGKILL)
        self._finish()

    def _take(self, events: list[frames.FromEngine]) -> None:
        if self._on_events is None:
            return
        out: list[EngineEvent] = []
        ended = 0
        for event in events:
            if isinstance(event, frames.Broken):
                self._broken = event
                continue
            if isinstance(event, Ready):
                self.ready = True
                self._meter.run()
                self.clear_up()
            elif isinstance(event, Finished | Cancelled):
                ended += 1
            out.append(event)
        self.held -= ended
        self._meter.add(-ended)
        if out:
            self._on_events(out)

    def _ended(self) -> None:
        """The process is over. What it sent before may still have to be read."""
        assert self._process is not None
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._exit_code = self._process.wait()
        self._finish()

    def _finish(self) -> None:
        if self._exit_code is None or self._transport is not None or self.gone.is_set():
            return
        self.gone.set()
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None
        self.clear_up()
        self._on_gone(self)
        on_events, self._on_events = self._on_events, None
        if on_events is not None:
            message = "the engine process ended" if self._broken is None else self._broken.message
            on_events([Died(exit_code=self._exit_code, message=message)])


def _log(path: str | None) -> IO[bytes]:
    """Where the process's own words go: never requests or answers."""
    if path is None:
        return Path(os.devnull).open("wb")
    log = Path(path)
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.unlink()
    return log.open("ab")
