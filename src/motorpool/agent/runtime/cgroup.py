"""The engine's own control group (cgroup v2): the kernel's limits, and a stop and an end that reach every descendant.

Decides: whether there is a place in the tree of control groups that is ours to divide, and what the kernel accepts
there. Must not: touch a group that belongs to somebody else, hold a limit in a group that the agent itself is in, fail
where there are no control groups. Called by: ``hosted``.

A place is ours if systemd says so (``Delegate=yes`` marks the service's group), if it was given to the user that the
agent runs as, or if it is the root that we see, as in a container or on a machine without systemd. Limits can only be
set below a group that holds no process, so the agent moves itself into a leaf beside the engine's where it has to.

A group of its own gives way to its siblings alone. Against other services counts what the service's group weighs, which
is for the unit file to say.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Final

import msgspec

LEAF: Final = "agent"  # where the agent itself goes
PREFIX: Final = "motorpool-engine-"
CONTROLLERS: Final[tuple[str, ...]] = ("memory", "cpu", "pids")
PERIOD_US: Final = 100_000  # the kernel's own default for cpu.max
MIN_QUOTA_US: Final = 1_000  # the kernel takes no less
_UNIFIED: Final = "0::"
_USERS: Final = "/user.slice/"  # here every group belongs to its user, whether it was delegated or not
_numbers = itertools.count()


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where groups can be made: below ``parent``; the agent itself is in ``home``."""

    parent: Path
    home: Path

    def home_now(self) -> Path:
        """Where the agent is after the first group was made: it may have stepped aside for it."""
        leaf = self.parent / LEAF
        return leaf if self.home == self.parent and str(os.getpid()) in _lines(leaf / "cgroup.procs") else self.home


def find_place(proc: Path = Path("/proc"), given: Path | None = None) -> Place | None:
    """The place that is ours to divide, or None. ``given`` is one that somebody has prepared for us."""
    mount = _mount(proc)
    relative = _own(proc)
    if mount is None or relative is None:
        return None
    home = mount / relative.lstrip("/")
    parent = given if given is not None else home.parent if home.name == LEAF else home
    if given is None and not _is_ours(parent, relative):
        return None
    if not os.access(parent, os.W_OK) or not (parent / "cgroup.procs").exists():
        return None
    return Place(parent=parent, home=home)


def _mount(proc: Path) -> Path | None:
    """Where the tree of cgroup v2 is mounted, also beside one of v1."""
    for line in _lines(proc / "self" / "mountinfo"):
        fields, _, kind = line.partition(" - ")
        parts = fields.split()
        if kind.startswith("cgroup2 ") and len(parts) > 4 and parts[3] == "/":
            return Path(parts[4])
    return None


def _own(proc: Path) -> str | None:
    """The path of our own group."""
    found = (line.removeprefix(_UNIFIED) for line in _lines(proc / "self" / "cgroup") if line.startswith(_UNIFIED))
    return next((path for path in found if "/.." not in path and not path.endswith(" (deleted)")), None)


def _is_ours(parent: Path, relative: str) -> bool:
    if relative in {"/", f"/{LEAF}"}:
        return True
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):  # no such mark, or not for us to read
            if os.getxattr(parent, name) == b"1":
                return True
    try:
        owner = parent.stat().st_uid
    except OSError:
        return False
    return owner == os.geteuid() != 0 and not relative.startswith(_USERS)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


class Group:
    """One engine's group. Its methods say whether the kernel took what they asked for, and never raise."""

    def __init__(self, path: Path, controllers: frozenset[str]) -> None:
        self.path = path
        self.controllers = controllers
        self._cpu_us = 0

    @classmethod
    def make(cls, place: Place) -> Group | None:
        """A new, empty group; None if the kernel refuses it. What dead agents left behind is removed."""
        _sweep(place.parent)
        controllers = _enable(place)
        path = place.parent / f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        try:
            path.mkdir()
        except OSError:
            return None
        return cls(path, controllers)

    def confine(self, *, memory_bytes: int, tasks: int, idle: bool) -> frozenset[str]:
        """Set what does not change while an engine runs (0: no limit); return the names of the files that hold."""
        wanted: list[tuple[str, str, str]] = []
        if memory_bytes > 0:
            wanted.append(("memory", "memory.max", str(memory_bytes)))
        wanted += [("memory", "memory.swap.max", "0"), ("memory", "memory.oom.group", "1")]
        if tasks > 0:
            wanted.append(("pids", "pids.max", str(tasks)))
        if idle:  # in this order: an idle group takes no weight any more
            wanted += [("cpu", "cpu.weight", "1"), ("cpu", "cpu.idle", "1")]
        return frozenset(
            name for controller, name, value in wanted if controller in self.controllers and self._write(name, value)
        )

    def limit_processor(self, cores: float | None) -> bool:
        """Let it use so many cores on average over PERIOD_US; None: as many as there are."""
        if "cpu" not in self.controllers:
            return False
        quota = "max" if cores is None else str(max(MIN_QUOTA_US, round(cores * PERIOD_US)))
        return self._write("cpu.max", f"{quota} {PERIOD_US}")

    def add(self, pid: int) -> bool:
        """Move a process in, with all its threads."""
        return self._write("cgroup.procs", str(pid))

    def freeze(self, frozen: bool) -> bool:
        """Stop all that is in it, or let it go on. The kernel needs a moment for this: a signal is faster."""
        return self._write("cgroup.freeze", "1" if frozen else "0")

    def kill(self) -> bool:
        """End all that is in it, descendants that have left the process group included."""
        return self._write("cgroup.kill", "1")

    def cpu_ms(self) -> int:
        """Processor time that was used in it, by the kernel's count; the last that was seen once it is removed."""
        for line in _lines(self.path / "cpu.stat"):
            name, _, value = line.partition(" ")
            if name == "usage_usec":
                self._cpu_us = max(self._cpu_us, int(value))
        return self._cpu_us // 1000

    def remove(self) -> bool:
        """Remove it; false while something in it has not ended yet."""
        self.cpu_ms()
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _write(self, name: str, value: str) -> bool:
        return _write(self.path / name, value)


def _enable(place: Place) -> frozenset[str]:
    """Have the kernel offer its limits to groups below the parent; return those that it offers."""
    there = set(" ".join(_lines(place.parent / "cgroup.controllers")).split())
    wanted = [name for name in CONTROLLERS if name in there]
    if not wanted:
        return frozenset()
    switch = place.parent / "cgroup.subtree_control"
    if not _offered(switch).issuperset(wanted) and not _switch_on(switch, wanted) and place.home == place.parent:
        leaf = place.parent / LEAF  # a group with processes in it cannot share out: the agent steps aside
        with contextlib.suppress(OSError):
            leaf.mkdir(exist_ok=True)
        if _write(leaf / "cgroup.procs", str(os.getpid())):
            _switch_on(switch, wanted)
    return frozenset(_offered(switch).intersection(wanted))


def _switch_on(switch: Path, wanted: list[str]) -> bool:
    """All at once, or as many as the kernel takes."""
    if _write(switch, " ".join(f"+{name}" for name in wanted)):
        return True
    taken = [name for name in wanted if _write(switch, f"+{name}")]
    return taken == wanted


def _offered(switch: Path) -> set[str]:
    return {name.lstrip("+") for name in " ".join(_lines(switch)).split()}


def _write(path: Path, value: str) -> bool:
    try:
        path.write_text(value, encoding="ascii")
    except OSError:
        return False
    return True


def _sweep(parent: Path) -> None:
    """Remove the empty groups of agents that are gone. One that still holds a process cannot be removed."""
    for path in parent.glob(f"{PREFIX}*-*"):
        owner = path.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                path.rmdir()
