"""The vehicles of the yield benchmark, what their owners do, and what stands in the way.

Each vehicle is the real agent as a process (``motorpool agent``) in a car that is simulated in the agent, or in a
stand-in for a databroker. What its engine does is seen by the kernel's account alone: the state of each thread, and the
processor time that each has used. Called by: ``bench.run_yield``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec

from bench import product
from bench.env import BIN, ROOT
from motorpool.agent.enrolment import enrol_owner, give_consent
from motorpool.trust.consent import ConsentLimits
from motorpool.trust.credentials import VehicleCredentials, save_credentials

MODEL = "smollm2-135m-instruct"
THREADS = max(1, os.cpu_count() or 1)
HOST = b"motorpool.agent.runtime.host"  # in the command line of an engine, and of the watcher beside it
CONSENT_MS = 24 * 3_600_000
WATTS_W = 400
BUSY_NS = 20_000_000  # of processor time in WATCH_S, before an engine counts as under load
WATCH_S = 0.1
LOOK_S = 0.0002  # between two looks at an engine
READY_S = 40.0
DEADLINE_S = 30.0
SETTLE_S = 0.2  # after something else was stopped or begun


class NotReadyError(product.ProductError):
    """A trial could not begin, or something else ended its engine: it says nothing, and is done again."""


# -- the engine, as the kernel sees it ---------------------------------------------------------------------------------


def used_ns(pid: int) -> dict[str, int]:
    """Processor time of each thread that lives now."""
    used = {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            used[path.parent.name] = int(path.read_text().split()[0])
    return used


def used_since_ns(pid: int, before: dict[str, int]) -> int:
    """Processor time since ``before``; a thread that ended in between takes its own with it."""
    return sum(now - before.get(thread, 0) for thread, now in used_ns(pid).items())


def busy_ns(pid: int) -> int:
    """For how long its main thread, that of its event loop, has had something to do: on a core or waiting for one."""
    on_core, waiting, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    return int(on_core) + int(waiting)


def stopped(pid: int) -> bool:
    """Is every thread stopped by a signal, or gone, or is its whole control group frozen.

    The kernel shows a thread that the freezer caught before the signal as a sleeping one.
    """
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            if path.read_text().rpartition(") ")[2][0] not in "TtZX":
                return frozen(pid)
    return True


@functools.cache
def group_tree() -> Path:
    """Where the control groups of version 2 are, also beside some of version 1."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    return Path("/sys/fs/cgroup")


def frozen(pid: int) -> bool:
    """Does the kernel say that all of its control group is frozen; False where it has none of its own."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                return "frozen 1" in (group_tree() / line[4:] / "cgroup.events").read_text()
    return False


def alive(pid: int) -> bool:
    """Has it not ended; one that only waits for its parent has given everything back."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def resident_mb(pid: int) -> float:
    """Memory that a process has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def children(pid: int) -> list[int]:
    """The processes that the main thread of a process has started, and that have not ended."""
    try:
        found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [child for child in found if alive(child)]


def until_ms(begun_s: float, condition: Callable[[], bool], what: str) -> float:
    """Milliseconds from ``begun_s`` until ``condition`` holds."""
    while not condition():
        if time.perf_counter() - begun_s > DEADLINE_S:
            raise product.ProductError(f"{what} after {DEADLINE_S:.0f} s")
        time.sleep(LOOK_S)
    return (time.perf_counter() - begun_s) * 1000


# -- the owner ---------------------------------------------------------------------------------------------------------


class Owner:
    """The owner of a vehicle, at the port of its car."""

    def __init__(self, folder: Path) -> None:
        address = folder / "car.addr"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(DEADLINE_S)
        self._socket.connect(address.read_text() if address.exists() else str(folder / "car.sock"))
        self._answers = self._socket.makefile("rb")

    def begins(self, act: str) -> float:
        """Send an act; the moment before that, in seconds."""
        line = json.dumps({"do": act}).encode() + b"\n"
        begun_s = time.perf_counter()
        self._socket.sendall(line)
        return begun_s

    def ends(self) -> None:
        """Wait for the answer of the car."""
        try:
            line = self._answers.readline()
        except TimeoutError as error:
            raise product.ProductError(f"the car did not answer its owner within {DEADLINE_S:.0f} s") from error
        answer = json.loads(line or b'{"ok": false, "error": "its port was closed"}')
        if not answer["ok"]:
            raise product.ProductError(f"the car said: {answer['error']}")

    def does(self, act: str) -> None:
        """An act from its beginning to its end."""
        self.begins(act)
        self.ends()

    def close(self) -> None:
        """Leave the port."""
        self._answers.close()
        self._socket.close()


# -- the vehicle -------------------------------------------------------------------------------------------------------


class Vehicle:
    """One agent, which can be started again. ``broker_folder`` is where the owner of a car behind a databroker is."""

    def __init__(self, admin: httpx.Client, folder: Path, name: str, source: list[str], *, broker_pid: int = 0) -> None:
        self.name = name
        self.broker_pid = broker_pid
        self._admin = admin
        self._folder = folder / name
        self._owner_folder = folder / f"{name}-car" if broker_pid else self._folder
        self._log = folder / f"{name}.log"
        self._command = [str(BIN / "motorpool"), "agent", "--dir", str(self._folder), "--model", MODEL]
        self._command += ["--threads", str(THREADS), "--tariff", "0", "--awake-watts", "0", *source]
        self._process: subprocess.Popen[bytes] | None = None
        self._running = contextlib.ExitStack()
        self._owner: Owner | None = None
        self._enrol()

    def _enrol(self) -> None:
        self._folder.mkdir(parents=True)
        key = enrol_owner(self._folder)
        now_ms = time.time_ns() // 1_000_000
        limits = ConsentLimits(max_watts_w=WATTS_W)
        give_consent(self._folder, self.name, limits, now_ms=now_ms, expires_ms=now_ms + CONSENT_MS)
        asked = {"vehicle_id": self.name, "name": self.name, "owner_key": key.public.hex()}
        response = self._admin.post("/v1/vehicles", json=asked)
        if response.status_code >= 300:
            raise product.ProductError(f"{self.name} was not enrolled: {response.status_code} {response.text[:200]}")
        save_credentials(self.credentials, msgspec.json.decode(response.content, type=VehicleCredentials))

    @property
    def credentials(self) -> Path:
        """The file with what it connects with."""
        return self._folder / "credentials.json"

    @property
    def pid(self) -> int:
        """The agent's process."""
        assert self._process is not None, "start first"
        return self._process.pid

    @property
    def owner(self) -> Owner:
        """Its owner, connected to the port of the car."""
        if self._owner is None:
            try:
                self._owner = Owner(self._owner_folder)
            except OSError as error:
                raise NotReadyError(f"{self.name} has no port for its owner: {self.said()}") from error
        return self._owner

    def start(self) -> None:
        """Start the agent."""
        models = {"MOTORPOOL_MODELS": os.environ["MOTORPOOL_MODELS"]} if "MOTORPOOL_MODELS" in os.environ else {}
        self._process = self._running.enter_context(product.ended(self._command, self._log, models))

    def stop(self) -> None:
        """End the agent, whatever state it is in."""
        if self._owner is not None:
            self._owner.close()
            self._owner = None
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
        self._running.close()
        self._process = None

    def again(self) -> None:
        """End the agent and start it anew."""
        self.stop()
        self.start()

    def make_fine(self) -> None:
        """Whatever the owner was about to do, the car stands locked and plugged in."""
        with contextlib.suppress(product.ProductError, OSError):
            for act in ("lock", "plug-in"):
                self.owner.does(act)

    def said(self) -> str:
        """The end of its log, for an error."""
        return product.last_line(self._log) if self._log.exists() else "nothing"

    def engine(self) -> int | None:
        """The process of its engine: the leader of a group of its own that the agent has started."""
        found = []
        for pid in children(self.pid):
            with contextlib.suppress(OSError):
                if HOST in Path(f"/proc/{pid}/cmdline").read_bytes() and os.getpgid(pid) == pid:
                    found.append(pid)
        return found[-1] if found else None

    def state(self) -> str:
        """What the operator sees; empty while the control plane does not answer."""
        with contextlib.suppress(httpx.HTTPError):
            response = self._admin.get(f"/v1/vehicles/{self.name}")
            if response.status_code == 200:
                return str(response.json().get("state") or "")
        return ""

    def computing(self) -> int:
        """Wait until its engine works on lines and is under load; the engine's process."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            if self._process is None or self._process.poll() is not None:
                raise NotReadyError(f"the agent of {self.name} ended: {self.said()}")
            pid = self.engine()
            if pid is not None and self.state() == "working":  # one that loads its model computes as well
                before = used_ns(pid)
                time.sleep(WATCH_S)
                if used_since_ns(pid, before) > BUSY_NS and alive(pid) and not stopped(pid):
                    return pid
            else:
                time.sleep(WATCH_S / 2)
        raise NotReadyError(f"{self.name} did not work within {READY_S:.0f} s (it is {self.state() or 'unknown'})")


@contextlib.contextmanager
def vehicles(cell: product.Cell, folder: Path, count: int, *, behind_a_broker: bool = False) -> Iterator[list[Vehicle]]:
    """So many vehicles, started; ended in the end, and their cars with them."""
    key = {"Authorization": f"Bearer {cell.admin_key}"}
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(httpx.Client(base_url=cell.admin_url, headers=key, timeout=10, trust_env=False))
        made = []
        for number in range(1, count + 1):
            name = f"{'broker' if behind_a_broker else 'car'}-{number}"
            if behind_a_broker:
                pid, address = stack.enter_context(databroker(folder, name))
                vehicle = Vehicle(admin, folder, name, ["--unmetered", "--kuksa", address], broker_pid=pid)
            else:
                vehicle = Vehicle(admin, folder, name, ["--simulated"])
            stack.callback(vehicle.stop)
            vehicle.start()
            made.append(vehicle)
        yield made


@contextlib.contextmanager
def databroker(folder: Path, name: str) -> Iterator[tuple[int, str]]:
    """The stand-in for a databroker with a car of its own: its process and address."""
    home = folder / f"{name}-car"
    home.mkdir(parents=True)
    log = folder / f"{name}-car.log"
    command = [sys.executable, "-m", "motorpool.agent.signals.broker", "--port", "0", "--dir", str(home)]
    with product.ended(command, log) as child:
        line = json.loads(product.first_line(child, log))
        try:
            yield child.pid, line["address"]
        finally:
            child.send_signal(signal.SIGCONT)


# -- what stands in the way --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[float]:
    """A process that gets no processor time, and so answers nobody; the moment before that, in seconds."""
    begun_s = time.perf_counter()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield begun_s
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Other programs that want every core for themselves."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(THREADS)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


class Flood:
    """Somebody who sends a vehicle more messages than it can read. See ``bench.yield_flood``."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.shares_pct: list[float] = []

    @contextlib.contextmanager
    def over(self, vehicle: Vehicle) -> Iterator[None]:
        """Flood it meanwhile, and note for which part of the time its agent was busy before anything else came."""
        self._tell(vehicle.name)
        try:
            time.sleep(SETTLE_S)
            before, begun_s = busy_ns(vehicle.pid), time.perf_counter()
            time.sleep(SETTLE_S)
            busy_s = (busy_ns(vehicle.pid) - before) / 1e9
            self.shares_pct.append(100 * busy_s / (time.perf_counter() - begun_s))
            yield
        finally:
            self._tell("")

    def _tell(self, target: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(target.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise product.ProductError("what floods the vehicles has ended") from error


@contextlib.contextmanager
def flood(cell: product.Cell, vehicle: Vehicle) -> Iterator[Flood]:
    """The process that floods, connected and at rest."""
    command = [sys.executable, "-m", "bench.yield_flood", f"{cell.data}/identity.json", str(vehicle.credentials)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        if not (select.select([process.stdout], [], [], DEADLINE_S)[0] and process.stdout.readline()):
            raise product.ProductError("what floods the vehicles did not connect")
        yield Flood(process)
    finally:
        process.kill()
        process.wait()
