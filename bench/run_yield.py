"""From the owner's hand to an engine that computes no more: the real agent, the real engine and model, under load.

One vehicle of ``motorpool dev`` works on a batch of long answers. The owner's acts go through the port of its simulated
car, and the kernel says what the engine does: the state of each of its threads, and the processor time that it used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec

from bench import product, report
from bench.env import BIN, ROOT
from bench.yield_plot import draw

MODEL = "smollm2-135m-instruct"
LINES = 400
ANSWER_TOKENS = 600
VEHICLE = "car-1"
BUSY_NS = 20_000_000  # of processor time, before the engine counts as under load
LOOK_S = 0.0002  # between two looks at the engine
AFTER_S = 0.3  # how long a stopped engine is watched
DEADLINE_S = 60.0
AIM_STOP_MS = 200
AIM_GONE_MS = 2_000
AIM_ALONE_MS = 1_000
FLOOD_BYTES = 3_000_000  # of one request that keeps the agent's loop busy
FLOODERS = 4
PICTURE = ROOT / "docs" / "images" / "yield.svg"
DOOR = "Door opened until every thread of the engine is stopped"
DOOR_BUSY = "The same, while other programs keep every core busy"
DOOR_CUT = "The same, with the message server stopped: no network"
DOOR_DEAD = "The same, with the control plane stopped"
DOOR_FLOOD = "The same, while requests of 3 MB keep the agent's own loop busy"
AFTER = f"Processor time of the engine in the {AFTER_S * 1000:.0f} ms after that"
GONE = "Cable pulled until the engine's process is gone, and its memory with it"
HANGS = "Agent stopped (it hangs) until the engine's process is gone"
KILLED = "Agent killed until the engine's process is gone"


class Engine:
    """The engine of the vehicle, as the kernel sees it."""

    def __init__(self, cell: product.Cell) -> None:
        self._cell = cell
        self._agent_pid = cell.pids[VEHICLE]

    def pid(self) -> int | None:
        """Its process, None while there is none. A watcher of a few megabytes stands beside it."""
        children = Path(f"/proc/{self._agent_pid}/task/{self._agent_pid}/children").read_text().split()
        sizes = {}
        for child in children:
            with contextlib.suppress(OSError, IndexError):
                sizes[int(child)] = int(Path(f"/proc/{child}/statm").read_text().split()[1])
        return max(sizes, key=lambda pid: sizes[pid]) if sizes else None

    def used_ns(self, pid: int) -> dict[str, int]:
        """Processor time of each thread that lives now."""
        used = {}
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                used[path.parent.name] = int(path.read_text().split()[0])
        return used

    def used_since_ns(self, pid: int, before: dict[str, int]) -> int:
        """Processor time since ``before``; a thread that ended in between takes its own with it."""
        return sum(now - before.get(thread, 0) for thread, now in self.used_ns(pid).items())

    def stopped(self, pid: int) -> bool:
        """Is every thread stopped by a signal, or gone."""
        for path in Path(f"/proc/{pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                if path.read_text().rpartition(") ")[2][0] not in "TtZX":
                    return False
        return True

    def computing(self) -> int:
        """Wait until it runs attempts and is under load; its process. One that loads its model computes as well."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            pid = self.pid()
            if pid is not None and self._cell.vehicle_states() == ["working"]:
                before = self.used_ns(pid)
                time.sleep(0.1)
                if self.used_since_ns(pid, before) > BUSY_NS and not self.stopped(pid):
                    return pid
            else:
                time.sleep(0.1)
        raise product.ProductError(f"the engine did not work again within {DEADLINE_S:.0f} s")


class Owner:
    """The owner of the vehicle, at the port of its car."""

    def __init__(self, folder: Path) -> None:
        address = folder / "car.addr"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(address.read_text() if address.exists() else str(folder / "car.sock"))
        self._answers = self._socket.makefile("rb")

    def does(self, act: str) -> float:
        """Begin an act; the moment before it, in seconds."""
        line = json.dumps({"do": act}).encode() + b"\n"
        begun_s = time.perf_counter()
        self._socket.sendall(line)
        return begun_s

    def done(self) -> None:
        """Wait for the answer of the car."""
        answer = json.loads(self._answers.readline())
        if not answer["ok"]:
            raise product.ProductError(f"the car said: {answer['error']}")


def until_ms(begun_s: float, condition: Callable[[], bool]) -> float:
    """Milliseconds from ``begun_s`` until ``condition`` holds."""
    while not condition():
        if time.perf_counter() - begun_s > DEADLINE_S:
            raise product.ProductError("the engine went on")
        time.sleep(LOOK_S)
    return (time.perf_counter() - begun_s) * 1000


def open_the_door(engine: Engine, owner: Owner, stopped: tuple[int, ...] = ()) -> tuple[float, float]:
    """One trial: milliseconds until the engine is stopped, and milliseconds that it computed after that.

    ``stopped`` are processes that stand still meanwhile.
    """
    pid = engine.computing()
    with standing_still(stopped):
        stopped_ms = until_ms(owner.does("open-door"), lambda: engine.stopped(pid))
        used = engine.used_ns(pid)
        owner.done()
        time.sleep(AFTER_S)
        after_ms = engine.used_since_ns(pid, used) / 1e6
    owner.does("lock")
    owner.done()
    return stopped_ms, after_ms


def pull_the_cable(engine: Engine, owner: Owner) -> float:
    """One trial: milliseconds until the engine's process, and with it its memory, is gone."""
    pid = engine.computing()
    gone_ms = until_ms(owner.does("unplug"), lambda: not alive(pid))
    owner.done()
    owner.does("plug-in")
    owner.done()
    return gone_ms


def stop_the_agent(engine: Engine, agent_pid: int, number: signal.Signals) -> float:
    """One trial: milliseconds from a signal to the agent until its engine's process is gone."""
    pid = engine.computing()
    begun_s = time.perf_counter()
    os.kill(agent_pid, number)
    try:
        return until_ms(begun_s, lambda: not alive(pid))
    finally:
        if number is signal.SIGSTOP:
            os.kill(agent_pid, signal.SIGCONT)


def alive(pid: int) -> bool:
    """Has it not ended; one that only waits for its parent has given everything back."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@contextlib.contextmanager
def standing_still(pids: tuple[int, ...]) -> Iterator[None]:
    """Processes that get no processor time, and so answer nobody."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        if pids:
            time.sleep(0.2)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def flooded(cell: product.Cell) -> Iterator[None]:
    """Customers who send requests of megabytes, each of which passes through the agent's loop."""
    over = threading.Event()
    message = {"role": "user", "content": "word " * (FLOOD_BYTES // 5)}
    body = json.dumps({"model": MODEL, "messages": [message], "max_tokens": 1}).encode()
    headers = {**cell.headers(), "Content-Type": "application/json"}

    def send() -> None:
        with httpx.Client(base_url=cell.base_url, headers=headers, timeout=60, trust_env=False) as client:
            while not over.is_set():
                with contextlib.suppress(httpx.HTTPError):  # the vehicle is frozen now and then: it is asked again
                    client.post("/chat/completions", content=body)

    senders = [threading.Thread(target=send, daemon=True) for _ in range(FLOODERS)]
    for sender in senders:
        sender.start()
    try:
        yield
    finally:
        over.set()
        for sender in senders:
            sender.join(60)


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Other programs that want every core for themselves."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def hand_in(cell: product.Cell, folder: Path) -> None:
    """A batch that keeps the vehicle at work for longer than all trials take."""
    source = folder / "lines.jsonl"
    with source.open("w") as out:
        for number in range(LINES):
            message = {"role": "user", "content": f"Tell a long story about journey number {number}."}
            body = {"model": MODEL, "messages": [message], "max_tokens": ANSWER_TOKENS, "seed": number}
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            out.write(json.dumps(line) + "\n")
    with httpx.Client(base_url=cell.base_url, headers=cell.headers(), timeout=60) as client, source.open("rb") as data:
        file = product.answer(client.post("/files", data={"purpose": "batch"}, files={"file": (source.name, data)}))
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        product.answer(client.post("/batches", json=asked))


@contextlib.contextmanager
def a_vehicle(folder: Path) -> Iterator[tuple[product.Cell, Engine, Owner]]:
    """One vehicle of ``motorpool dev`` under full load."""
    command = [str(BIN / "motorpool"), "dev", "--vehicles", "1", "--model", MODEL, "--json", "--port", "0"]
    command += ["--threads", str(max(1, (os.cpu_count() or 2) - 1)), "--data", str(folder / "data")]
    models = {"MOTORPOOL_MODELS": os.environ["MOTORPOOL_MODELS"]} if "MOTORPOOL_MODELS" in os.environ else {}
    folder.mkdir(parents=True, exist_ok=True)
    with product.ended(command, folder / "dev.log", models) as child:
        cell = msgspec.json.decode(product.first_line(child, folder / "dev.log"), type=product.Cell)
        cell = msgspec.structs.replace(cell, base_url=cell.base_url.rstrip("/"), admin_url=cell.admin_url.rstrip("/"))
        owner = Owner(folder / "data" / "vehicles" / VEHICLE)
        hand_in(cell, folder)
        yield cell, Engine(cell), owner


class Trials:
    """What was measured, by figure."""

    def __init__(self) -> None:
        self.samples = {
            name: report.Samples(name, "ms", less_is_better=True)
            for name in (DOOR, DOOR_BUSY, DOOR_CUT, DOOR_DEAD, DOOR_FLOOD, AFTER, GONE, HANGS, KILLED)
        }

    def add(self, name: str, value: float) -> None:
        """One trial."""
        self.samples[name].add(report.OURS, value)

    def figures(self) -> list[report.Figure]:
        """Median, and in words the 99th percentile, which is what the aim speaks of."""
        found = []
        for name, samples in self.samples.items():
            values = sorted(samples.values.get(report.OURS, []))
            if not values:
                continue
            p99 = values[min(len(values) - 1, -(-len(values) * 99 // 100) - 1)]
            samples.notes[report.OURS] = f"p99 {report.rounded(p99)}, highest {report.rounded(values[-1])}"
            if name == AFTER:
                found.append(samples.figure(aim="none", met=values[-1] == 0))
                continue
            aim_ms = {GONE: AIM_GONE_MS, HANGS: AIM_ALONE_MS, KILLED: AIM_ALONE_MS}.get(name, AIM_STOP_MS)
            found.append(samples.figure(aim=f"p99 under {aim_ms:,} ms", met=p99 < aim_ms))
        return found

    def times(self) -> dict[str, list[float]]:
        """For the picture."""
        names = {
            DOOR: "door opened",
            DOOR_BUSY: "other programs keep every core busy",
            DOOR_CUT: "without a network",
            DOOR_DEAD: "control plane dead",
            DOOR_FLOOD: "agent's own loop busy",
            HANGS: "agent hangs",
            KILLED: "agent killed",
        }
        return {short: self.samples[name].values.get(report.OURS, []) for name, short in names.items()}


def measure(folder: Path, *, doors: int, others: int, kills: int) -> Trials:
    """All trials; a vehicle whose agent was killed is replaced by another one."""
    trials = Trials()
    with a_vehicle(folder / "one") as (cell, engine, owner):
        nats, control = cell.pids[product.MESSAGES], cell.pids[product.CONTROL]
        ways: list[tuple[str, int, contextlib.AbstractContextManager[None], tuple[int, ...]]] = [
            (DOOR, doors, contextlib.nullcontext(), ()),
            (DOOR_BUSY, others, busy_cores(), ()),
            (DOOR_CUT, others, contextlib.nullcontext(), (nats,)),
            (DOOR_DEAD, others, contextlib.nullcontext(), (control,)),
            (DOOR_FLOOD, others, flooded(cell), ()),
        ]
        for name, count, around, stopped in ways:
            print(f"==> {name}: {count} trials", flush=True)
            with around:
                for _ in range(count):
                    stopped_ms, after_ms = open_the_door(engine, owner, stopped)
                    trials.add(name, stopped_ms)
                    trials.add(AFTER, after_ms)
        print(f"==> {GONE}: {others} trials", flush=True)
        for _ in range(others):
            trials.add(GONE, pull_the_cable(engine, owner))
        print(f"==> {HANGS}: {kills} trials", flush=True)
        for _ in range(kills):
            trials.add(HANGS, stop_the_agent(engine, cell.pids[VEHICLE], signal.SIGSTOP))
    print(f"==> {KILLED}: {kills} trials", flush=True)
    for number in range(kills):
        with a_vehicle(folder / f"killed-{number}") as (cell, engine, _):
            trials.add(KILLED, stop_the_agent(engine, cell.pids[VEHICLE], signal.SIGKILL))
    return trials


def main() -> None:
    """Run the trials and write ``results/yield.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few trials, results not kept")
    parser.add_argument("--trials", type=int, default=200, help="of the door, with nothing in the way")
    parser.add_argument("--others", type=int, default=25, help="of each other way")
    parser.add_argument("--kills", type=int, default=10, help="of agents that hang, and of agents that are killed")
    options = parser.parse_args()
    begun = report.begin()
    doors, others, kills = (2, 1, 1) if options.quick else (options.trials, options.others, options.kills)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        trials = measure(Path(name), doors=doors, others=others, kills=kills)
    if not options.quick:
        draw(trials.times(), PICTURE)
    remark = (
        f"One vehicle with {MODEL} and a batch of {LINES} long answers. Times begin before the act is sent to the port "
        f"of the car and end at the first look that sees it, {LOOK_S * 1000:.1f} ms apart. A run is one act of the "
        "owner. A thread counts as stopped when it has taken the signal, for which it needs a core once more: where "
        "others keep every core busy it waits for that without computing."
    )
    report.finish("yield", trials.figures(), begun=begun, keep=not options.quick, skipped={}, remarks=[remark])


if __name__ == "__main__":
    main()
