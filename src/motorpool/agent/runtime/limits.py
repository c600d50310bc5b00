"""What holds an engine back: when it may run at all, and what its process gives up.

Decides: the one order in which an engine is stopped and continued (``Gate``), and what stands in for a control group.
Must not: continue an engine that is frozen or ended, whatever its duty cycle asks for. Called by: ``hosted`` (the
agent's side: ``Gate``, ``Isolation``, ``MemoryFolder``) and ``host`` (the engine's side: ``confine``, ``idle_disk``).

Three things keep an engine from running: it is frozen (the owner), it rests (its duty cycle), it has ended. It runs
only when none of them holds. Continuing happens in one place, ``Gate._settle``, which asks all three; stopping is done
at once and as often as it is asked for. A timer that comes too late therefore finds the gate shut.

The duty cycle stops and continues the process in periods of 100 ms. That is the kernel's own period for cpu.max. It is
short beside anything that warms up or that a person notices, and beside the half second in which a power meter looks,
while 20 signals a second cost the agent nothing. A period of a tenth would cost ten times the wake-ups; one of ten
times would make whole answers stand still for a second. An engine that ran longer than its part, because the agent was
late to stop it, rests longer for it; one that rested too long gets nothing back: what is held is an upper bound.

An agent that dies in the phase in which the engine rests takes it along: the kernel's SIGKILL also ends a stopped
process. An agent that hangs in it leaves an engine that uses no processor time, and whose own threads cannot look
any more; the watcher beside it (``host``) is not stopped with it, and ends it as it does a running one.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

import msgspec

DUTY_PERIOD_S: Final = 0.1
MIN_DUTY: Final = 0.02  # below it one phase would be shorter than what a timer can tell; it then always rests
MAX_REST_S: Final = 10.0  # however late the agent was
STALE_S: Final = 2.0  # a folder that is younger may not be locked yet
FOLDER_PREFIX: Final = "motorpool-engine-"
_MEMORY_FILE_SYSTEMS: Final = frozenset({0x01021994, 0x858458F6})  # tmpfs, ramfs
_STATFS_BYTES: Final = 512  # more than the kernel writes
_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
_IOPRIO_WHO_PROCESS: Final = 1
_IOPRIO_IDLE: Final = 3 << 13
_TASK_SLACK: Final = 256  # what others of the same user may start while the engine runs


class By(StrEnum):
    """What enforces a limit."""

    CGROUP = "control group"
    RLIMIT = "process limit"
    SCHEDULER = "idle priority"
    DUTY_CYCLE = "stopping in turns"
    AFFINITY = "fixed cores"
    SIGNALS = "signals"
    MEMORY_FOLDER = "folder in memory"
    NO_SWAP = "no swap on this machine"
    NOT_ASKED = "not asked for"
    NOTHING = "nothing"


class Isolation(msgspec.Struct, frozen=True, kw_only=True):
    """Which limits of an engine's process are enforced by what, for its owner to see."""

    priority: By
    memory: By
    swap: By
    processor: By
    threads: By
    tasks: By
    core_dumps: By
    temporary_files: By
    stopping: By

    def line(self) -> str:
        """All of it in one line."""
        return ", ".join(f"{name.replace('_', ' ')}: {getattr(self, name)}" for name in self.__struct_fields__)


# -- when it may run ---------------------------------------------------------------------------------------------------


class Held(Protocol):
    """The processes that a gate stops and continues. Each is immediate and may be repeated."""

    def halt(self) -> None:
        """Stop all of them."""

    def go_on(self) -> None:
        """Continue all of them."""

    def lock(self) -> None:
        """Hold them by a second means, if there is one."""

    def unlock(self) -> None:
        """Let go of the second means; what ``halt`` did stands."""

    def end(self) -> None:
        """End all of them."""


class Gate:
    """Whether an engine may run now. Pure: time comes in as ``now_s``, which never goes back.

    ``wait_s`` is how long until ``tick`` is wanted, None for never. An early, late, repeated or forgotten tick does no
    harm but to the accuracy of the duty cycle.
    """

    def __init__(self, held: Held, now_s: float) -> None:
        self._held = held
        self._duty = 1.0
        self._since_s = now_s  # of the phase
        self._rest_s = 0.0
        self.frozen = False
        self.resting = False
        self.ended = False

    @property
    def running(self) -> bool:
        """Nothing keeps the engine from running."""
        return not (self.frozen or self.resting or self.ended)

    def freeze(self) -> None:
        """Stop it until ``thaw``, whatever else happens."""
        self.frozen = True
        if not self.ended:
            self._held.halt()
            self._held.lock()

    def thaw(self, now_s: float) -> None:
        """Let it go on as far as its duty cycle has it."""
        if not self.frozen or self.ended:
            return
        self.frozen = False
        self._held.unlock()
        self._phase(now_s, resting=self._duty <= 0)
        self._settle()

    def end(self) -> None:
        """End it; nothing after this does anything."""
        if not self.ended:
            self.ended = True
            self._held.end()

    def hold_to(self, duty: float, now_s: float) -> None:
        """Let it run for this part of the time from now on: 1 always, 0 (and anything that is no number) never."""
        duty = min(1.0, duty) if math.isfinite(duty) and duty >= MIN_DUTY else 0.0
        if duty == self._duty or self.ended:
            return
        before, self._duty = self._duty, duty
        if duty <= 0:
            self._phase(now_s, resting=True)
        elif duty >= 1 or before >= 1 or before <= 0:
            self._phase(now_s, resting=False)
        elif self.resting:
            self._rest_s = min(self._rest_s, DUTY_PERIOD_S * (1 - duty))
        self._settle()

    def tick(self, now_s: float) -> None:
        """Change the phase if it is time."""
        wait_s = self.wait_s(now_s)
        if wait_s is None or wait_s > 0:
            return
        if self.resting:
            self._phase(now_s, resting=False)
        else:
            ran_s = now_s - self._since_s
            self._phase(now_s, resting=True)
            self._rest_s = min(MAX_REST_S, ran_s * (1 - self._duty) / self._duty)
        self._settle()

    def wait_s(self, now_s: float) -> float | None:
        """How long the phase lasts yet; None if no tick is wanted."""
        if self.frozen or self.ended or self._duty >= 1 or self._duty <= 0:
            return None
        length_s = self._rest_s if self.resting else DUTY_PERIOD_S * self._duty
        return max(0.0, self._since_s + length_s - now_s)

    def _phase(self, now_s: float, *, resting: bool) -> None:
        self.resting = resting
        self._since_s = now_s
        self._rest_s = math.inf if resting else 0.0

    def _settle(self) -> None:
        """Stop or continue. The only place from which an engine is continued."""
        if self.running:
            self._held.go_on()
        elif not self.ended:
            self._held.halt()


# -- what the engine's process gives up --------------------------------------------------------------------------------


class Confine(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine's process is to hold itself to, where no control group does; 0: nothing."""

    memory_bytes: int = 0
    cores: int = 0
    tasks: int = 0


def confine(wanted: Confine) -> None:
    """Hold this process, and all that it starts, to limits that it cannot lift again.

    Of memory, what counts is what cannot be taken from a process without ending it: the kernel takes back the pages of
    the model's file by itself. The address space would be no measure, as allocators reserve far more than they use.
    """
    if wanted.memory_bytes > 0:
        _lower(resource.RLIMIT_DATA, wanted.memory_bytes)
    if wanted.tasks > 0 and os.getuid() != 0:  # the kernel does not hold root to it
        _lower(resource.RLIMIT_NPROC, threads_of_user(os.getuid()) + wanted.tasks + _TASK_SLACK)
    if wanted.cores > 0:
        allowed = sorted(os.sched_getaffinity(0))
        if wanted.cores < len(allowed):
            # The last ones: the first is where interrupts and most services are.
            os.sched_setaffinity(0, allowed[-wanted.cores :])


def _lower(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def threads_of_user(uid: int) -> int:
    """How many threads the kernel counts for a user now."""
    return sum(_threads(path, uid) for path in Path("/proc").glob("[0-9]*/status"))


def _threads(status: Path, uid: int) -> int:
    try:
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0  # it has just ended
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return int(fields["Threads"][0]) if fields["Uid"][0] == str(uid) else 0


def idle_disk() -> bool:
    """Let every other process go first at the disk as well; false where the kernel cannot be asked."""
    number = _IOPRIO_SET.get(platform.machine())
    if number is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)) == 0


# -- what the agent's side needs to know -------------------------------------------------------------------------------


def cpu_ms_of(pid: int) -> int:
    """Processor time of all threads of a process so far, also just after its end; 0 when it is collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0
    return (int(fields[11]) + int(fields[12])) * 1000 // os.sysconf("SC_CLK_TCK")


def has_swap(swaps: Path = Path("/proc/swaps")) -> bool:
    """Whether the machine could write memory to a disk at all."""
    try:
        return len(swaps.read_text(encoding="utf-8", errors="replace").splitlines()) > 1
    except OSError:
        return True


def in_memory(path: Path) -> bool:
    """Whether the files of a folder lie in memory, by what the kernel says of its file system."""
    libc = ctypes.CDLL(None, use_errno=True)
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if libc.statfs(os.fsencode(path), answer) != 0:
        return False
    return int(ctypes.c_long.from_buffer(answer).value) in _MEMORY_FILE_SYSTEMS


def memory_folders(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where files can lie in memory on this machine, the best first."""
    service = environment.get("RUNTIME_DIRECTORY", "").split(":")  # a service's own, from systemd
    named = [*service, environment.get("XDG_RUNTIME_DIR", ""), "/dev/shm"]  # noqa: S108  # what we make there is private
    return tuple(Path(name) for name in named if name.startswith("/"))


class MemoryFolder:
    """A private folder for the temporary files of one engine. It is ours as long as this process holds its lock.

    ``in_memory`` is false if no place for it in memory was found. What agents that were killed left is removed when the
    next one is made.
    """

    def __init__(self, places: tuple[Path, ...]) -> None:
        good = [place for place in places if in_memory(place) and os.access(place, os.W_OK | os.X_OK)]
        self.in_memory = bool(good)
        place = good[0] if good else Path(tempfile.gettempdir())
        _sweep(place)
        self.path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=place))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _sweep(place: Path) -> None:
    for folder in place.glob(f"{FOLDER_PREFIX}*"):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # somebody else's, or gone
        try:
            status = os.fstat(handle)
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > STALE_S:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # it is in use
        finally:
            os.close(handle)
