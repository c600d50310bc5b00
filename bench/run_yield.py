"""From the owner's hand to an engine that computes no more: the real agent, the real engine and model, under load.

One vehicle of ``motorpool dev`` works on a batch of long answers. The owner's acts go through the port of its simulated
car, and the kernel says what the engine does: the state of each of its threads, and the processor time that it used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec

from bench import product, report
from bench.env import BIN, ROOT

MODEL = "smollm2-135m-instruct"
LINES = 400
ANSWER_TOKENS = 600
VEHICLE = "car-1"
BUSY_NS = 20_000_000  # of processor time, before the engine counts as under load
LOOK_S = 0.0002  # between two looks at the engine
AFTER_S = 0.3  # how long a stopped engine is watched
DEADLINE_S = 60.0
AIM_STOP_MS = 1_000
AIM_GONE_MS = 5_000
DOOR = "Door opened until every thread of the engine is stopped"
DOOR_BUSY = "The same, while other programs keep every core busy"
AFTER = f"Processor time of the engine in the {AFTER_S * 1000:.0f} ms after that"
GONE = "Cable pulled until the engine's process is gone"


class Engine:
    """The engine of the vehicle, as the kernel sees it."""

    def __init__(self, cell: product.Cell) -> None:
        self._cell = cell
        self._agent_pid = cell.pids[VEHICLE]

    def pid(self) -> int | None:
        """Its process, None while there is none."""
        children = Path(f"/proc/{self._agent_pid}/task/{self._agent_pid}/children").read_text().split()
        return int(children[0]) if children else None

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


def open_the_door(engine: Engine, owner: Owner) -> tuple[float, float]:
    """One trial: milliseconds until the engine is stopped, and milliseconds that it computed after that."""
    pid = engine.computing()
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
    gone_ms = until_ms(owner.does("unplug"), lambda: not Path(f"/proc/{pid}").exists())
    owner.done()
    owner.does("plug-in")
    owner.done()
    return gone_ms


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


def measure(folder: Path, *, doors: int, cables: int) -> list[report.Figure]:
    """All trials on one vehicle."""
    quiet = report.Samples(DOOR, "ms", less_is_better=True)
    loaded = report.Samples(DOOR_BUSY, "ms", less_is_better=True)
    after = report.Samples(AFTER, "ms", less_is_better=True)
    gone = report.Samples(GONE, "ms", less_is_better=True)
    command = [str(BIN / "motorpool"), "dev", "--vehicles", "1", "--model", MODEL, "--json", "--port", "0"]
    command += ["--threads", str(max(1, (os.cpu_count() or 2) - 1)), "--data", str(folder / "data")]
    models = {"MOTORPOOL_MODELS": os.environ.get("MOTORPOOL_MODELS", str(ROOT / ".cache" / "models"))}
    with product.ended(command, folder / "dev.log", models) as child:
        cell = msgspec.json.decode(product.first_line(child, folder / "dev.log"), type=product.Cell)
        engine = Engine(cell)
        owner = Owner(folder / "data" / "vehicles" / VEHICLE)
        hand_in(cell, folder)
        for samples, count, others in ((quiet, doors, contextlib.nullcontext()), (loaded, doors, busy_cores())):
            print(f"==> {samples.name}: {count} trials", flush=True)
            with others:
                for _ in range(count):
                    stopped_ms, after_ms = open_the_door(engine, owner)
                    samples.add(report.OURS, stopped_ms)
                    after.add(report.OURS, after_ms)
        print(f"==> {gone.name}: {cables} trials", flush=True)
        for _ in range(cables):
            gone.add(report.OURS, pull_the_cable(engine, owner))
    return [
        quiet.figure(aim=f"every time within {AIM_STOP_MS:,} ms", met=highest(quiet) <= AIM_STOP_MS),
        loaded.figure(aim=f"every time within {AIM_STOP_MS:,} ms", met=highest(loaded) <= AIM_STOP_MS),
        after.figure(aim="none", met=highest(after) == 0),
        gone.figure(aim=f"every time within {AIM_GONE_MS:,} ms", met=highest(gone) <= AIM_GONE_MS),
    ]


def highest(samples: report.Samples) -> float:
    """The worst trial."""
    return max(samples.values[report.OURS])


def main() -> None:
    """Run the trials and write ``results/yield.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few trials, results not kept")
    parser.add_argument("--trials", type=int, default=25, help="of each way to open the door")
    options = parser.parse_args()
    begun = report.begin()
    doors, cables = (2, 1) if options.quick else (options.trials, max(1, options.trials // 2))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        figures = measure(Path(name), doors=doors, cables=cables)
    remark = (
        f"One vehicle with {MODEL} and a batch of {LINES} long answers. Times begin before the act is sent to the port "
        f"of the car and end at the first look that sees it, {LOOK_S * 1000:.1f} ms apart. A run is one act of the "
        "owner. A thread counts as stopped when it has taken the signal, for which it needs a core once more: where "
        "others keep every core busy it waits for that without computing."
    )
    report.finish("yield", figures, begun=begun, keep=not options.quick, skipped={}, remarks=[remark])


if __name__ == "__main__":
    main()
