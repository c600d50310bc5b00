"""Motorpool as its users meet it: the command line starts it, everything else goes over the official API.

Vehicles are either the processes that ``motorpool dev`` starts, or many in one process (``bench.fleet``) that connect
to it like any other vehicle. Called by: the benchmarks. Must not: import the product or look into its files; memory is
read from ``/proc``.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from bench.env import BIN, ROOT

MODEL = "null"
CONTROL = "control plane"
MESSAGES = "message server"
FLEET = "vehicles"
WORKING = ("ready", "working")
POLL_S = 0.05
POLL_SOON_S = 0.01  # in the first half second, where 50 ms would be a tenth of what is measured
READY_S = 120.0
STOP_S = 20.0
BATCH_S = 600.0
# About 250 characters: a short document, so that lines are as long as lines of a real small batch.
TEXT = (
    "The left rear brake hose may have been routed too close to the wheel, so that it can wear through on rough roads. "
    "Owners should look for fluid below the car and have the hose replaced, free of charge, before the next long trip. "
    "Document"
)
ANSWER_TOKENS = 8


class ProductError(Exception):
    """Motorpool did not do what was asked; the text says what."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A running ``motorpool dev``."""

    base_url: str
    api_key: str
    admin_url: str
    admin_key: str
    data: str
    pids: dict[str, int]

    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.api_key}"}

    def peak_mb(self, part: str) -> float:
        """Highest resident memory so far of one part (``CONTROL``, ``MESSAGES``, a vehicle), in MB (10^6 bytes)."""
        return peak_mb(self.pids[part])

    def last_words(self) -> str:
        """The end of the control plane's log, to say with a failure."""
        log = Path(self.data) / "logs" / "control-plane.log"
        return last_line(log) if log.is_file() else "it has no log"

    def vehicle_states(self) -> list[str]:
        """The state of every vehicle, as the operator sees it."""
        key = {"Authorization": f"Bearer {self.admin_key}"}
        response = httpx.get(f"{self.admin_url}/v1/vehicles", headers=key, timeout=30, trust_env=False)
        if response.status_code != 200:
            raise ProductError(f"the admin address answered {response.status_code}: {response.text[:200]}")
        return [vehicle["state"] for vehicle in response.json()]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """How long the parts of one batch took, in seconds from the first byte of the upload."""

    uploaded_s: float
    total_s: float
    lines: int

    def describe(self) -> str:
        """The parts, for a note."""
        return f"upload {self.uploaded_s:.1f} s, run and assemble {self.total_s - self.uploaded_s:.1f} s"


def peak_mb(pid: int) -> float:
    """VmHWM of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ProductError(f"process {pid} has no VmHWM")


def session(leader: int) -> list[int]:
    """The processes of a session, by the id of the process that began it; those without memory (zombies) left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session_id, *_ = path.read_text().rpartition(") ")[2].split()
            if int(session_id) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def running(
    vehicles: int, folder: Path, *, in_one: bool = False, slots: int = 256, engine_url: str = ""
) -> Iterator[Cell]:
    """Start ``motorpool dev`` with null engines on a fresh data folder; stop it in the end.

    A vehicle takes 256 requests at once, since the null engine does nothing with them. ``in_one`` puts all vehicles
    into one process; ``engine_url`` gives them a server as their engine and needs it.
    """
    command = [str(BIN / "motorpool"), "dev", "--vehicles", "0" if in_one else str(vehicles), "--model", MODEL]
    command += ["--null-rate", "0", "--slots", str(slots), "--json", "--port", "0", "--data", str(folder / "data")]
    with ended(command, folder / "dev.log") as child:
        cell = msgspec.json.decode(first_line(child, folder / "dev.log"), type=Cell)
        cell = msgspec.structs.replace(cell, base_url=cell.base_url.rstrip("/"), admin_url=cell.admin_url.rstrip("/"))
        if not in_one:
            wait_for_vehicles(cell, vehicles)
            yield cell
            return
        command = [sys.executable, "-m", "bench.fleet", "--vehicles", str(vehicles), "--slots", str(slots)]
        command += ["--admin-url", cell.admin_url, "--dir", str(folder / "fleet"), "--engine-url", engine_url]
        with ended(command, folder / "fleet.log", {"MOTORPOOL_BENCH_ADMIN_KEY": cell.admin_key}) as fleet:
            wait_for_vehicles(cell, vehicles, fleet, folder / "fleet.log")
            yield msgspec.structs.replace(cell, pids={**cell.pids, FLEET: fleet.pid})


@contextlib.contextmanager
def ended(command: list[str], log: Path, more: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a session of its own; interrupt it in the end, and kill what is left."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=output,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, **(more or {})},
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def wait_for_vehicles(
    cell: Cell, count: int, process: subprocess.Popen[bytes] | None = None, log: Path | None = None
) -> None:
    """Until every vehicle may work; raise ProductError with what holds them up."""
    end = time.monotonic() + READY_S
    while True:
        states = cell.vehicle_states()
        if sum(state in WORKING for state in states) >= count:
            return
        if process is not None and process.poll() is not None:
            assert log is not None
            raise ProductError(f"the vehicles ended: {last_line(log)}")
        if time.monotonic() > end:
            counted = {state: states.count(state) for state in sorted(set(states))}
            raise ProductError(f"not all of {count} vehicles are ready after {READY_S:.0f} s: {counted}")
        time.sleep(0.1)


def first_line(child: subprocess.Popen[bytes], log: Path) -> bytes:
    """The line of JSON that says it is ready; raise ProductError with the end of the log if it does not come."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        if selector.select(READY_S) and (line := child.stdout.readline()):
            return line
    raise ProductError(f"motorpool dev was not ready; it said: {last_line(log)}")


def last_line(log: Path) -> str:
    """The end of a log, for an error."""
    said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
    return said[-1][:200]


def write_lines(path: Path, count: int) -> None:
    """A batch file of ``count`` chat completions."""
    with path.open("w") as out:
        for number in range(count):
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"{TEXT} {number}."}],
                "max_tokens": ANSWER_TOKENS,
            }
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            out.write(json.dumps(line) + "\n")


def run_batch(cell: Cell, count: int, folder: Path) -> Batch:
    """Upload, run and check one batch. The clock stops when the batch says that its output file is there."""
    try:
        return timed_batch(cell, count, folder)
    except httpx.HTTPError as error:
        raise ProductError(f"a batch of {count} lines met {type(error).__name__}: {cell.last_words()}") from error


def timed_batch(cell: Cell, count: int, folder: Path) -> Batch:
    """The work of ``run_batch``."""
    source = folder / f"lines-{count}.jsonl"
    write_lines(source, count)
    with httpx.Client(base_url=cell.base_url, headers=cell.headers(), timeout=120) as client:
        begun = time.perf_counter()
        with source.open("rb") as stream:
            file = answer(client.post("/files", data={"purpose": "batch"}, files={"file": (source.name, stream)}))
        uploaded_s = time.perf_counter() - begun
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = answer(client.post("/batches", json=asked))
        while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
            if time.perf_counter() - begun > BATCH_S:
                raise ProductError(f"a batch of {count} lines is still {batch['status']} after {BATCH_S:.0f} s")
            time.sleep(POLL_S if time.perf_counter() - begun > 0.5 else POLL_SOON_S)
            batch = answer(client.get(f"/batches/{batch['id']}"))
        total_s = time.perf_counter() - begun
        check(client, batch, count)
    return Batch(uploaded_s=uploaded_s, total_s=total_s, lines=count)


def answer(response: httpx.Response) -> dict[str, Any]:
    """The body of a good response; raise ProductError for another."""
    if response.status_code != 200:
        raise ProductError(f"{response.request.url.path} answered {response.status_code}: {response.text[:200]}")
    body: dict[str, Any] = response.json()
    return body


def check(client: httpx.Client, batch: dict[str, Any], count: int) -> None:
    """Every line is in the output once, with a result."""
    if batch["status"] != "completed" or not batch.get("output_file_id"):
        raise ProductError(f"the batch ended as {batch['status']}: {json.dumps(batch.get('errors'))[:200]}")
    seen = set()
    with client.stream("GET", f"/files/{batch['output_file_id']}/content") as response:
        for line in response.iter_lines():
            row = json.loads(line)
            if row["response"]["status_code"] != 200 or row["custom_id"] in seen:
                raise ProductError(f"line {row['custom_id']} has status {row['response']['status_code']} or is doubled")
            seen.add(row["custom_id"])
    if len(seen) != count:
        raise ProductError(f"{count} lines went in and {len(seen)} came out")
