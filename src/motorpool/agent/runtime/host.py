"""The engine's process: ``python -m motorpool.agent.runtime.host FD PARENT LIFELINE``.

Decides: nothing but when to end, which is at once when its parent is gone. Must not: outlive its parent, leave a core
dump, take the processor from anybody, open a port, write requests or answers anywhere but to its parent.
Called by: ``hosted``, with one end of a socket pair, the parent's process id and the descriptor of a lifeline.

Events leave in the turn of the loop in which they came up; what is in the socket survives a freeze and a kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Final, cast

import uvloop

from motorpool.agent.runtime import frames
from motorpool.agent.runtime.backend import BackendRunner, Emit
from motorpool.agent.runtime.engine import EXIT_SILENCE, Died, EngineEvent
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.errors import MotorpoolError, SetupError

MAX_FILE_BYTES: Final = 8 * 1024 * 1024  # of anything that this process writes: the log
EXIT_ORPHAN: Final = 3
EXIT_BROKEN: Final = 4
LOOKS_A_SILENCE: Final = 10
LOOKS_TO_BE_SURE: Final = 3
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end now if the parent has already changed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise SetupError(f"prctl failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        os._exit(EXIT_ORPHAN)


def leave_no_core_dump() -> None:
    """What is in the memory of this process, prompts and answers, never reaches a disk by a crash."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A core pattern with a pipe ignores the limit.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def step_back(*, idle_priority: bool) -> None:
    """Leave the processor to everybody else, and leave no core dump and no long log.

    The nice value and the idle class count among the processes of one session only where the kernel groups processes
    by session (autogroup, the default of desktop kernels). There the whole group, which is this process, steps back.
    """
    if idle_priority:
        os.nice(19)
        with contextlib.suppress(PermissionError):  # some containers forbid it; the nice value stands
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        if os.getsid(0) == os.getpid():  # the group is ours alone
            with contextlib.suppress(OSError):  # a kernel without autogroup
                Path("/proc/self/autogroup").write_bytes(b"19")
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    leave_no_core_dump()  # last: from then on much of /proc/self is closed to us


class Host(asyncio.Protocol):
    """The engine's end of the socket."""

    def __init__(self, lifeline: frames.Lifeline) -> None:
        self._lifeline = lifeline
        self._unpacker = frames.Unpacker()
        self._transport: asyncio.Transport | None = None
        self._backend: BackendRunner | None = None
        self._loading: asyncio.Task[None] | None = None
        self._out: list[frames.FromEngine] = []
        self.over = asyncio.Event()
        self.exit_code = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write to."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # whatever the cause, the parent is gone
        """The parent has closed its end."""
        self.over.set()

    def data_received(self, data: bytes) -> None:
        """Take the parent's messages."""
        for message in self._unpacker.feed(data):
            self._take(frames.TO_ENGINE.decode(message))

    def emit(self, events: list[EngineEvent]) -> None:
        """Send events in this turn of the loop, those of several calls together."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.extend(event for event in events if not isinstance(event, Died))

    def _take(self, message: frames.ToEngine) -> None:
        if isinstance(message, frames.Load):
            # The null engine computes next to nothing; what is measured through it is everything else.
            step_back(idle_priority=message.spec.idle_priority and message.spec.backend is not Backend.NULL)
            if message.spec.silence_s > 0:
                end_in_silence(self._lifeline, message.spec.silence_s)
            self._loading = asyncio.ensure_future(self._load(message.spec))
        elif self._backend is None:
            raise AssertionError("the agent's side sends Load first")
        elif isinstance(message, frames.Submit):
            self._backend.submit(message.work)
        else:
            self._backend.cancel(message.keys)

    async def _load(self, spec: EngineSpec) -> None:
        try:
            self._backend = make_backend(spec, self.emit)
            self.emit([await self._backend.load()])
        except MotorpoolError as error:
            self._break(error.message, error.code)
        except Exception as error:  # noqa: BLE001  # whatever a foreign library raises, the parent must hear of it
            self._break(f"the engine could not be loaded: {type(error).__name__}", "engine_error")

    def _break(self, message: str, code: str) -> None:
        self._out.append(frames.Broken(message=message, code=code))
        self._flush()
        self.exit_code = EXIT_BROKEN
        if self._transport is not None:
            self._transport.close()  # which writes what is left, and then ends the process

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is None:
            return
        for data in frames.pack_events(out):
            self._transport.write(data)


def end_in_silence(lifeline: frames.Lifeline, silence_s: float) -> None:
    """Watch in a thread that the agent still lets this process go on, and end it when it does not.

    One look is not enough: after a time in which the whole machine stood still the agent needs a moment to say so.
    While llama.cpp loads a model no thread of Python can look; that silence is noticed when it has loaded.
    """
    tick_s = silence_s / LOOKS_A_SILENCE

    def watch() -> None:
        over = 0
        while over < LOOKS_TO_BE_SURE:
            time.sleep(tick_s)
            over = over + 1 if lifeline.over else 0
        os._exit(EXIT_SILENCE)

    threading.Thread(target=watch, name="silence", daemon=True).start()


def make_backend(spec: EngineSpec, emit: Emit) -> BackendRunner:
    """The backend that the spec names. Imported late: each needs packages that the others do not."""
    if spec.backend is Backend.LLAMA:
        from motorpool.agent.runtime.llama import LlamaBackend  # noqa: PLC0415

        return LlamaBackend(spec, emit)
    if spec.backend is Backend.REMOTE:
        from motorpool.agent.runtime.remote import RemoteBackend  # noqa: PLC0415

        return RemoteBackend(spec, emit)
    from motorpool.agent.runtime.null import NullBackend  # noqa: PLC0415

    return NullBackend(spec, emit)


async def serve(fd: int, lifeline_fd: int) -> int:
    """Serve one parent until it is gone; return the exit code."""
    end = socket.socket(fileno=fd)
    end.setblocking(False)
    host = Host(frames.Lifeline(lifeline_fd))
    await asyncio.get_running_loop().create_unix_connection(lambda: host, sock=end)
    await host.over.wait()
    return host.exit_code


def main(arguments: list[str]) -> None:
    """Run until the parent is gone. Leaves without joining threads: they may be deep inside a model."""
    fd, parent, lifeline_fd = (int(argument) for argument in arguments)
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    code = uvloop.run(serve(fd, lifeline_fd))
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
