"""The engine's process: ``python -m motorpool.agent.runtime.host FD PARENT LIFELINE [SILENCE_S [HOME GROUP]]``.

Decides: nothing but when to end, which is at once when its parent is gone. Must not: outlive its parent, leave a core
dump, take the processor from anybody, open a port, write requests or answers anywhere but to its parent.
Called by: ``hosted``, with one end of a socket pair, the parent's process id, the descriptor of a lifeline, the silence
that ends it, and the control groups of the agent and of this engine where it has one.

Events leave in the turn of the loop in which they came up; what is in the socket survives a freeze and a kill.

An agent that hangs can stop nobody, so somebody else must look. Within the engine nobody always can: while llama.cpp
loads a model no thread of Python runs, an engine of idle priority gets no time on a busy machine, and one that rests in
its duty cycle or is frozen is stopped with all its threads. A timer of the kernel that kills unless it is put off would
have to be put off by just such a thread. So the process forks once, before it loads anything: the watcher shares the
lifeline, and a few megabytes of pages that both have written to are its own; it looks some twenty times a second, at
normal priority, in its own session and in the agent's control group, so that nothing which stops the engine stops it.
The kernel tells it of the engine's end, which is its own. If the agent is gone or hangs just then, nobody else removes
what the engine had of the machine, its folder in memory and its control group: the watcher does so before it ends.
Should it be gone alone, a thread of the engine still looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import uvloop

from motorpool.agent.runtime import frames
from motorpool.agent.runtime.backend import BackendRunner, Emit
from motorpool.agent.runtime.engine import EXIT_SILENCE, Died, EngineEvent
from motorpool.agent.runtime.limits import FOLDER_PREFIX, confine, idle_disk
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.errors import MotorpoolError, SetupError

MAX_FILE_BYTES: Final = 8 * 1024 * 1024  # of anything that this process writes: the log
EXIT_ORPHAN: Final = 3
EXIT_BROKEN: Final = 4
LOOKS_A_SILENCE: Final = 12
LOOKS_TO_BE_SURE: Final = 3
REMOVE_AGAIN_S: Final = 0.01  # a control group that something still leaves
REMOVE_TIMES: Final = 100
_FIRST_FREE_FD: Final = 3
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15


def _leave() -> None:
    os._exit(EXIT_ORPHAN)


def die_with(parent: int, number: signal.Signals = signal.SIGKILL, orphaned: Callable[[], None] = _leave) -> None:
    """Have the kernel end this process when its parent ends; ``orphaned`` at once if the parent has already changed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise SetupError(f"prctl failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        orphaned()


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
        idle_disk()
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
        self._slots = 1
        self.over = asyncio.Event()
        self.exit_code = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write to, and say that this process can be left alone."""
        self._transport = cast("asyncio.Transport", transport)
        self._out.append(frames.Begun())
        self._flush()

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
            confine(message.confine)
            step_back(idle_priority=message.spec.idle_priority and message.spec.backend is not Backend.NULL)
            if message.spec.silence_s > 0:
                end_in_silence(self._lifeline, message.spec.silence_s)
            self._slots = message.slots
            self._loading = asyncio.ensure_future(self._load(message.spec))
        elif isinstance(message, frames.Limit):
            self._slots = message.slots
            if self._backend is not None:
                self._backend.limit(message.slots)
        elif self._backend is None:
            raise AssertionError("the agent's side sends Load first")
        elif isinstance(message, frames.Submit):
            self._backend.submit(message.work)
        else:
            self._backend.cancel(message.keys)

    async def _load(self, spec: EngineSpec) -> None:
        try:
            self._backend = make_backend(spec, self.emit)
            self._backend.limit(self._slots)
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


def wait_for_silence(lifeline: frames.Lifeline, silence_s: float) -> None:
    """Return when the agent has not let the engine go on in time, and have the lifeline say so.

    One look is not enough: after a time in which the whole machine stood still the agent needs a moment to say so.
    """
    over = 0
    while over < LOOKS_TO_BE_SURE:
        time.sleep(silence_s / LOOKS_A_SILENCE)
        over = over + 1 if lifeline.over else 0
    lifeline.cut()


def end_in_silence(lifeline: frames.Lifeline, silence_s: float) -> None:
    """Watch in a thread that the agent still lets this process go on, and end it when it does not."""

    def watch() -> None:
        wait_for_silence(lifeline, silence_s)
        os._exit(EXIT_SILENCE)

    threading.Thread(target=watch, name="silence", daemon=True).start()


class _Told(BaseException):
    """SIGTERM has come: the engine has ended, or this process is to end."""


def _tell(*_: object) -> None:
    raise _Told


def _began(pid: int) -> str:
    """When a process began, which with its number names it for ever; empty for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _is_gone(engine: int) -> bool:
    """Whether the parent has ended. The kernel tells of the end of its first thread; the others take a moment more."""
    for _ in range(REMOVE_TIMES):
        if os.getppid() != engine:
            return True
        time.sleep(REMOVE_AGAIN_S)
    return False


def _step_out(groups: list[Path]) -> bool:
    """Move this process out of the engine's control group into the agent's, if there are any."""
    try:
        for home in groups[:1]:
            (home / "cgroup.procs").write_bytes(b"0")
    except OSError:
        return False
    return True


def _is_nobodys(lifeline: frames.Lifeline, agent: int, began: str) -> bool:
    """Whether the agent does not clear up after its engine: it has ended too, perhaps a moment later, or hangs."""
    folder = Path(os.environ.get("TMPDIR", ""))
    for _ in range(REMOVE_TIMES):
        if lifeline.over or lifeline.was_cut or _began(agent) != began:
            return True
        if folder.name.startswith(FOLDER_PREFIX) and not folder.exists():
            return False
        time.sleep(REMOVE_AGAIN_S)
    return False


def _clear_up(groups: list[Path]) -> None:
    """Remove what an engine that has ended had of the machine. What is still in use is left for the next agent."""
    folder = Path(os.environ.get("TMPDIR", ""))
    if folder.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
    for group in groups[1:]:
        for _ in range(REMOVE_TIMES):
            with contextlib.suppress(OSError):
                group.rmdir()
            if not group.exists():
                break
            time.sleep(REMOVE_AGAIN_S)


def fork_watcher(lifeline: frames.Lifeline, silence_s: float, agent: int, groups: list[Path]) -> None:
    """Have a process beside this one that ends it in silence. To be called before there are threads.

    ``groups`` are the control groups of the agent and of this engine, if there are any. Returns when nothing that stops
    the engine stops the watcher any more; raises SetupError if there will be none.
    """
    engine, began = os.getpid(), _began(agent)
    ours, theirs = os.pipe()
    gc.freeze()  # so that the collector of neither writes to pages that both share
    if os.fork() > 0:
        os.close(theirs)
        watched = os.read(ours, 1)
        os.close(ours)
        if not watched:
            raise SetupError("the engine has nobody who watches over it")
        return
    hangs = False
    try:
        signal.signal(signal.SIGTERM, _tell)
        die_with(engine, signal.SIGTERM, _tell)
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"motorpool-watch", 0, 0, 0)
        leave_no_core_dump()
        if not _step_out(
            groups
        ):  # it is frozen with the engine, looks when that goes on, and could hear nothing before
            die_with(engine)
        os.write(theirs, b"!")
        os.closerange(_FIRST_FREE_FD, os.sysconf("SC_OPEN_MAX"))  # the agent waits for the end of the engine's socket
        wait_for_silence(lifeline, silence_s)
        hangs = True
        os.killpg(engine, signal.SIGKILL)
        for group in groups[1:]:
            with contextlib.suppress(OSError):  # an older kernel; the process group is all there is
                (group / "cgroup.kill").write_bytes(b"1")
        while True:  # until the kernel tells of its end
            time.sleep(REMOVE_AGAIN_S)
    except _Told:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _step_out(groups)  # it may have been told before it had come so far
        if _is_gone(engine) and (hangs or _is_nobodys(lifeline, agent, began)):
            _clear_up(groups)
    finally:
        os._exit(0)


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


async def serve(fd: int, lifeline: frames.Lifeline) -> int:
    """Serve one parent until it is gone; return the exit code."""
    end = socket.socket(fileno=fd)
    end.setblocking(False)
    host = Host(lifeline)
    await asyncio.get_running_loop().create_unix_connection(lambda: host, sock=end)
    await host.over.wait()
    return host.exit_code


def main(arguments: list[str]) -> None:
    """Run until the parent is gone. Leaves without joining threads: they may be deep inside a model."""
    fd, parent, lifeline_fd = (int(argument) for argument in arguments[:3])
    silence_s = float(arguments[3]) if len(arguments) > 3 else 0.0
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    lifeline = frames.Lifeline(lifeline_fd)
    if silence_s > 0:
        fork_watcher(lifeline, silence_s, parent, [Path(argument) for argument in arguments[4:]])
    code = uvloop.run(serve(fd, lifeline))
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
