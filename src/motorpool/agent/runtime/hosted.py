"""An engine in a child process, behind the protocol of every engine.

Decides: how the process is started, held to its limits, stopped in its tracks and ended. Must not: run a model in the
agent's process. Called by: ``build_engine``.

The child leads a process group of its own, which is what ``freeze`` stops and ``kill`` ends; both are done by the
kernel and need nothing from the child. Where there are control groups it has one of its own as well, through which the
kernel reaches what has left the process group. If this process dies, the kernel ends the child (``host`` asks for it).
The kernel does so when the *thread* that started the child ends, so ``start`` must be called in the main thread or in
one that lives as long as the engine. If this process hangs, nobody calls ``beat`` any more and the child is ended by
the watcher beside it; a frozen one, which uses no processor time, after FROZEN_S.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, cast

import msgspec

from motorpool.agent.runtime import cgroup, frames
from motorpool.agent.runtime.engine import (
    EXIT_SILENCE,
    Cancelled,
    Died,
    EngineEvent,
    Finished,
    OnEvents,
    Ready,
    Work,
)
from motorpool.agent.runtime.limits import (
    MIN_DUTY,
    By,
    Confine,
    Gate,
    Isolation,
    MemoryFolder,
    cpu_ms_of,
    has_swap,
    memory_folders,
)
from motorpool.agent.runtime.meter import BusyMeter
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.core.energy import Limits
from motorpool.errors import CapacityError, EngineError

log = logging.getLogger(__name__)

MAX_HELD: Final = 65_536  # attempts in one engine, running and queued
MAX_LOG_BYTES: Final = 1024 * 1024  # a longer log is started anew
CLOSED_GRACE_S: Final = 2.0  # from the end of the connection to the end of the process
FROZEN_S: Final = 60.0  # that a frozen engine outlives its agent's last word; far more than any grace before a kill
REMOVE_AGAIN_S: Final = 0.1  # a control group that something still leaves
REMOVE_TIMES: Final = 50
_SOCKET_BYTES: Final = 4 * 1024 * 1024
_TASKS: Final = 256  # of an engine beside what its slots and threads need: a bound, not a measure
_TASKS_EACH: Final = 4
_OUT_OF_MEMORY: Final = frozenset({-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV})  # by the kernel, or by itself


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine has for an engine: a place for its control group, and folders in memory."""

    groups: cgroup.Place | None
    memory: tuple[Path, ...]

    @classmethod
    def found(cls) -> Places:
        """As they are now."""
        return cls(groups=cgroup.find_place(), memory=memory_folders(os.environ))


class HostedEngine:
    """The agent's side of one engine process. ``places`` None: those that are found when it starts."""

    def __init__(self, spec: EngineSpec, places: Places | None = None) -> None:
        self._spec = spec
        self._places = places
        self._limits: Limits | None = None
        self._child: _Child | None = None
        self._latest: _Child | None = None
        self._leaving: set[_Child] = set()
        self._meter = BusyMeter(spec.slots)
        self._told: Isolation | None = None

    @property
    def pid(self) -> int | None:
        """The process, for those who measure it; None if there is none."""
        return None if self._child is None else self._child.pid

    @property
    def isolation(self) -> Isolation | None:
        """What holds the latest process to its limits; None before the first start."""
        return None if self._latest is None else self._latest.isolation

    async def start(self, on_events: OnEvents) -> None:
        """Start the process and begin loading."""
        if self._child is not None:
            raise EngineError("the engine is already started")
        self._meter = BusyMeter(self._spec.slots)
        self._meter.load()
        child = _Child(self._spec, self._limits, self._meter, on_events, self._gone)
        self._child = self._latest = child
        try:
            await child.start(self._places or Places.found(), self._tell)
        except OSError as error:
            self._child = None
            child.kill()
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
            self._child.freeze()

    def thaw(self) -> None:
        """Let it go on, as far as its limits have it."""
        if self._child is not None:
            self._child.thaw()

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

    def limit(self, limits: Limits) -> None:
        """Hold it to these limits: duty cycle and slots from now on, threads and memory when it loads."""
        self._limits = limits
        if self._child is not None:
            self._child.hold_to(limits)

    def cpu_ms(self) -> int:
        """Processor time of the latest process so far, by the kernel's count; after its end all of it."""
        if self._spec.backend is Backend.REMOTE:  # it computes elsewhere: as if with one core while it has work
            return self._meter.busy_ms()
        return 0 if self._latest is None else self._latest.cpu_ms()

    def busy_ms(self) -> int:
        """The time of loading, and slot-seconds spent on attempts, divided by the slots; not what it was stopped."""
        return self._meter.busy_ms()

    async def close(self) -> None:
        """Kill, and wait until this process and every one that was killed before are gone."""
        self.kill()
        for child in list(self._leaving):
            await child.gone.wait()

    def _tell(self, isolation: Isolation) -> None:
        """Once for everything that is new about it: engines are started often."""
        if isolation != self._told:
            self._told = isolation
            log.info("what holds the engine to its limits: %s", isolation.line())

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
    """One process, from its start to its end. Its gate alone stops and continues it."""

    def __init__(
        self, spec: EngineSpec, limits: Limits | None, meter: BusyMeter, on_events: OnEvents, on_gone: _OnGone
    ) -> None:
        self._spec = _bounded(spec, limits)
        self._limits = limits
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
        self._folder: MemoryFolder | None = None
        self._group: cgroup.Group | None = None
        self._gate = Gate(self, time.monotonic())
        self._timer: asyncio.TimerHandle | None = None
        self._slots = spec.slots
        self._cpu_ms = 0
        self.isolation: Isolation | None = None
        self.gone = asyncio.Event()
        self.begun = False
        self.ready = False
        self.held = 0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self, places: Places, tell: Callable[[Isolation], None]) -> None:
        """Start the process. Until there is one nothing waits, so that no freeze or kill comes in between."""
        loop = asyncio.get_running_loop()
        self._folder = MemoryFolder(places.memory)
        self._group = None if places.groups is None else cgroup.Group.make(places.groups)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            with _log(self._spec.log_path) as log_file:
                self._process = self._spawn(theirs.fileno(), log_file, places)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._watch(loop, self._process)
        confine = self._confine(self._process.pid)
        assert self.isolation is not None
        tell(self.isolation)
        await loop.create_unix_connection(lambda: self, sock=ours)
        if self._limits is not None:
            self._slots = _slots(self._spec, self._limits)
        self.send(frames.Load(spec=self._spec, slots=self._slots, confine=confine))

    def beat(self) -> None:
        if self._lifeline is not None:
            self._lifeline.extend(FROZEN_S if self._gate.frozen else self._spec.silence_s)

    def clear_up(self) -> None:
        """Remove what the process may have left of its own: it could be killed at any moment."""
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
        self._remove_group(REMOVE_TIMES)

    def _remove_group(self, times: int) -> None:
        """The kernel may still be busy with what was in it. A group that stays is removed at the next start."""
        if self._group is not None and not self._group.remove() and times > 0:
            asyncio.get_running_loop().call_later(REMOVE_AGAIN_S, self._remove_group, times - 1)

    def _spawn(self, fd: int, log_file: IO[bytes], places: Places) -> subprocess.Popen[bytes]:
        assert self._folder is not None
        lifeline_fd = frames.Lifeline.make()
        try:
            self._lifeline = frames.Lifeline(lifeline_fd)
            self.beat()
            module = "motorpool.agent.runtime.host"
            arguments = [str(fd), str(os.getpid()), str(lifeline_fd), str(self._spec.silence_s)]
            if self._group is not None and places.groups is not None:
                arguments += [str(places.groups.home_now()), str(self._group.path)]
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                pass_fds=(fd, lifeline_fd),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                env=os.environ | {"TMPDIR": str(self._folder.path)},
            )
        finally:
            os.close(lifeline_fd)

    # -- what holds it -------------------------------------------------------------------------------------------------

    def _confine(self, pid: int) -> Confine:
        """Set the limits that do not change while it runs; return those that the process has to set itself."""
        spec, group = self._spec, self._group
        if group is not None and not group.add(pid):
            group.remove()
            group = self._group = None
        tasks = _TASKS + _TASKS_EACH * (spec.threads + spec.slots)
        idle = spec.idle_priority and spec.backend is not Backend.NULL
        holds: frozenset[str] = frozenset()
        if group is not None:
            holds = group.confine(memory_bytes=spec.memory_bytes, tasks=tasks, idle=idle)
        quota = group is not None and group.limit_processor(None)
        own = Confine(
            memory_bytes=0 if "memory.max" in holds else spec.memory_bytes,
            tasks=0 if "pids.max" in holds else tasks,
            cores=spec.threads if idle and not quota else 0,
        )
        memory = By.NOT_ASKED if spec.memory_bytes <= 0 else By.RLIMIT if own.memory_bytes else By.CGROUP
        swap = By.CGROUP if "memory.swap.max" in holds else By.NOTHING if has_swap() else By.NO_SWAP
        self.isolation = Isolation(
            priority=By.NOT_ASKED if not idle else By.CGROUP if "cpu.idle" in holds else By.SCHEDULER,
            memory=memory,
            swap=swap,
            processor=By.CGROUP if quota else By.DUTY_CYCLE,
            threads=By.CGROUP if quota else By.AFFINITY if own.cores else By.NOTHING,
            tasks=By.CGROUP if not own.tasks else By.RLIMIT if os.getuid() != 0 else By.NOTHING,
            core_dumps=By.RLIMIT,
            temporary_files=By.MEMORY_FOLDER if self._folder is not None and self._folder.in_memory else By.NOTHING,
            stopping=By.SIGNALS if group is None else By.CGROUP,
        )
        return own

    def hold_to(self, limits: Limits) -> None:
        """Have its slots and its part of the processor's time from now on, or from when it has begun."""
        self._limits = limits
        if not self.begun:
            return
        slots = _slots(self._spec, limits)
        if slots != self._slots:
            self._slots = slots
            self.send(frames.Limit(slots=slots))
        duty = limits.duty
        cores = max(1, min(limits.threads, self._spec.threads)) * duty
        by_kernel = duty >= MIN_DUTY and self._group is not None and self._group.limit_processor(cores)
        self._gate.hold_to(1.0 if by_kernel else duty, time.monotonic())
        self._meter.hold_to(slots=slots, share=min(duty, 1.0) if by_kernel else 1.0)
        self._follow_gate()

    def freeze(self) -> None:
        """Stop it. One that has not begun is ended instead: it has done nothing yet, and were its agent to die now, it
        would stay as it is for ever, for it has not asked the kernel yet to end it then."""
        self._gate.freeze()
        if not self.begun:
            self.end()
        self.beat()
        self._follow_gate()

    def thaw(self) -> None:
        if self._lifeline is not None and self._gate.frozen:
            self._lifeline.extend(self._spec.silence_s)  # before anything that looks at it can run
        self._gate.thaw(time.monotonic())
        self._follow_gate()

    def _tick(self) -> None:
        self._gate.tick(time.monotonic())
        self._follow_gate()

    def _follow_gate(self) -> None:
        """What is stopped is not busy; and come back when the gate wants to."""
        self._meter.pause(paused=not self._gate.running)
        if self._timer is not None:
            self._timer.cancel()
        wait_s = self._gate.wait_s(time.monotonic())
        self._timer = None if wait_s is None else asyncio.get_running_loop().call_later(wait_s, self._tick)

    def cpu_ms(self) -> int:
        if self._process is not None and self._process.returncode is None:
            self._cpu_ms = max(self._cpu_ms, cpu_ms_of(self._process.pid))
        if self._group is not None:
            self._cpu_ms = max(self._cpu_ms, self._group.cpu_ms())
        return self._cpu_ms

    # -- limits.Held: what the gate does -------------------------------------------------------------------------------

    def halt(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def lock(self) -> None:
        if self._group is not None:
            self._group.freeze(True)

    def unlock(self) -> None:
        if self._group is not None:
            self._group.freeze(False)

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        if self._group is not None:
            self._group.kill()

    def _signal(self, number: signal.Signals) -> None:
        """Send to the whole group. The process is not reaped yet, so its number is still its own."""
        process = self._process
        if process is not None and process.returncode is None:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return  # it is just ending; ``_ended`` tells

    def kill(self) -> None:
        self._on_events = None
        self._gate.end()
        self._follow_gate()
        if self._transport is not None:
            self._transport.abort()

    # -- its life ------------------------------------------------------------------------------------------------------

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

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for message in self._unpacker.feed(data):
            self._take(frames.FROM_ENGINE.decode(message))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # how the process ended says more
        self._transport = None
        if self._exit_code is None:  # it closed its end: it is ending, or it hears nothing any more
            asyncio.get_running_loop().call_later(CLOSED_GRACE_S, self._gate.end)
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
            if isinstance(event, frames.Begun):
                self.begun = True
                if self._limits is not None:
                    self.hold_to(self._limits)
                continue
            if isinstance(event, Ready):
                self.ready = True
                self._meter.run()
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
        self.cpu_ms()  # while the kernel still has it
        self._gate.end()  # what it may have started goes with it; its number is its own until it is collected
        code = self._process.wait()
        silent = self._lifeline is not None and self._lifeline.was_cut
        self._exit_code = EXIT_SILENCE if silent else code
        self._follow_gate()
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
            on_events([Died(exit_code=self._exit_code, message=self._why())])

    def _why(self) -> str:
        if self._broken is not None:
            return self._broken.message
        if not self.begun and self._gate.frozen:
            return "the engine process had not begun when it was to be frozen, and was ended"
        if self.ready or self._spec.memory_bytes <= 0 or self._exit_code not in _OUT_OF_MEMORY:
            return "the engine process ended"
        return (
            f"the engine process ended while it loaded {self._spec.model}, perhaps for want of memory: it may take "
            f"{self._spec.memory_bytes} bytes; allow more, or take a smaller model"
        )


def _bounded(spec: EngineSpec, limits: Limits | None) -> EngineSpec:
    """What to load under these limits."""
    if limits is None:
        return spec
    bounds = [bound for bound in (spec.memory_bytes, limits.memory_bytes or 0) if bound > 0]
    return msgspec.structs.replace(
        spec, threads=max(1, min(spec.threads, limits.threads)), memory_bytes=min(bounds, default=0)
    )


def _slots(spec: EngineSpec, limits: Limits) -> int:
    """How many attempts it may run at a time."""
    return max(1, min(limits.slots, spec.slots))


def _log(path: str | None) -> IO[bytes]:
    """Where the process's own words go: never requests or answers."""
    if path is None:
        return Path(os.devnull).open("wb")
    log = Path(path)
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.unlink()
    return log.open("ab")
