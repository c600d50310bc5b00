"""Part: how long a cell takes from the start of its process until it decides again, with the books of a large fleet.

The books are the product's, in a file of SQLite, with vehicles, leases, jobs in progress and lines that have ended;
what the cell had learnt lies beside them. A new process on one core starts the product's loop on them, with a link that
goes nowhere, and a vehicle reports that it is ready: the time ends when the lines that it gets are written down and
sent.

Called by: ``bench.run_cell``, and by itself in the process that is measured.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import report
from bench.cell_bench import ONE_CORE, Bench, NotMeasuredError, Size, one
from bench.cell_speed import REGIONS, id_of
from bench.cell_worlds import WORK
from bench.env import ROOT
from motorpool import wire
from motorpool.bus import CellLink
from motorpool.catalogue import Catalogue, Model
from motorpool.core import events as ev
from motorpool.core import snapshot
from motorpool.core.scheduler import Scheduler
from motorpool.server.loop import CellLoop
from motorpool.server.main import clock_ms, database_path
from motorpool.store import books, recovery
from motorpool.store.blobs import BlobStore
from motorpool.store.database import Database
from motorpool.types import VehicleState

AIM_S: Final = 5.0
LEASED: Final = 0.3  # of the vehicles
HELD: Final = 8  # lines of a lease
LINES: Final = 5_000  # of a job
DONE: Final = 1_000  # of these
JOBS: Final = 1_000
HOUR_MS: Final = 3_600_000
MODEL: Final = "small"
BODY: Final = b'{"choices":[{"message":{"content":"' + b"x" * 200 + b'"}}]}'
CHILD_S: Final = 240.0


# -- the books ---------------------------------------------------------------------------------------------------------


def write_books(folder: Path, vehicles: int) -> None:
    """The books of a cell with so many vehicles, LEASED of which hold lines, and what it had learnt beside them."""
    database = Database(database_path(folder))
    db, now_ms = database.writer, clock_ms()
    jobs = max(1, round(vehicles * LEASED) * HELD // (LINES - DONE) + 1, JOBS if vehicles >= JOBS * JOBS else 10)
    db.execute("BEGIN IMMEDIATE")
    db.executemany(
        "INSERT INTO vehicle (vehicle_id, name, enrolled_ms, region) VALUES (?, ?, ?, ?)",
        ((id_of(n), f"car {n}", now_ms, REGIONS[n % len(REGIONS)]) for n in range(vehicles)),
    )
    _write_jobs(db, BlobStore(folder / "files"), jobs, now_ms)
    db.executemany("INSERT INTO lease VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _leases(vehicles, jobs, now_ms))
    db.execute("COMMIT")
    scheduler = Scheduler()
    scheduler.restore_vehicles(recovery.vehicles(db)[1])
    draw = np.random.Generator(np.random.Philox(key=[1, 1]))
    table = scheduler.cell.t.vehicles
    table["speed"] = 200.0 * np.exp(0.5 * draw.standard_normal(len(table)))
    table["outage_s"] = 40
    taken = snapshot.take(scheduler, now_ms)
    path = database_path(folder)
    path.with_name(path.name + ".learnt").write_bytes(snapshot.to_bytes(taken.learnt()))
    database.close()


def _write_jobs(db: Any, blobs: BlobStore, jobs: int, now_ms: int) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 100}
    lines = [
        json.dumps({"custom_id": f"n{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()
        + b"\n"
        for n in range(LINES)
    ]
    blob = "file-1"
    with blobs.writer() as writer:
        writer.write(b"".join(lines))
        writer.commit(blob)
    lengths = np.array([len(line) for line in lines], np.uint32)
    offsets = (np.cumsum(lengths.astype(np.uint64)) - lengths).astype(np.uint64)
    index = books.LineIndex(offsets=offsets, lengths=lengths, limits=np.full(LINES, 100, np.uint32))
    db.execute(
        "INSERT INTO file (file_id, account, filename, purpose, bytes, created_ms, blob) VALUES (?, ?, ?, ?, ?, ?, ?)",
        ("file-1", "a", "in.jsonl", "batch", int(lengths.sum()), now_ms, blob),
    )
    for number in range(1, jobs + 1):
        db.execute(
            "INSERT INTO batch (batch_no, batch_id, account, endpoint, input_file_id, completion_window, status, model,"
            " created_ms, expires_ms, input_micro, output_micro, owner_share_bp, total)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                number, f"batch_{number}", f"customer-{number % 50}", "/v1/chat/completions", "file-1", "24h",
                "in_progress", MODEL, now_ms, now_ms + (1 + number % 24) * HOUR_MS, 1_000_000, 2_000_000, 7_000, LINES,
            ),
        )  # fmt: skip
        books.write_index(db, number, index)
        keys = ((books.line_key(number, line), 200, BODY, id_of(0), 10, 50, 0, 100, 10, 0, 1) for line in range(DONE))
        db.executemany("INSERT INTO result VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", keys)


def _leases(vehicles: int, jobs: int, now_ms: int) -> Iterator[tuple[Any, ...]]:
    for n in range(round(vehicles * LEASED)):
        number, place = 1 + n % jobs, n // jobs
        lines = np.arange(DONE + place * HELD, DONE + (place + 1) * HELD, dtype="<u4")
        vehicle = id_of(n * vehicles // max(1, round(vehicles * LEASED)))
        name = f"batch_{number}-1-{n + 1:x}-{n:x}"
        yield name, number, vehicle, f"{n + 1:016x}", now_ms - n % 60_000, now_ms + HOUR_MS, lines.tobytes(), "{}"


# -- what is measured --------------------------------------------------------------------------------------------------


class Nowhere(CellLink):
    """A link to no vehicle, which tells when the first lines are sent."""

    def __init__(self) -> None:
        self.granted = asyncio.Event()
        self.sent = 0

    async def listen(self, *listeners: Any) -> None:
        """Nobody says anything."""

    def pull_work(self, take: Any) -> None:
        """Nobody has done anything."""

    async def round_trips(self) -> dict[str, float]:
        """Nobody is any distance away."""
        return {}

    def send(self, vehicle_id: str, data: bytes) -> None:
        """A message to a vehicle."""
        del vehicle_id
        self.sent += 1
        if b'"grant"' in data[:64] or isinstance(wire.decode(wire.DOWN, data), wire.Grant):
            self.granted.set()

    def check(self) -> None:
        """It never breaks."""

    async def close(self) -> None:
        """Nothing is open."""


async def recover(folder: Path, turn: int) -> None:
    """Start a cell on these books and say how long it took; in each turn another vehicle, which holds nothing, asks."""
    begun = time.perf_counter()
    cell = CellLoop(
        database=Database(database_path(folder)),
        blobs=BlobStore(folder / "files"),
        catalogue=Catalogue([Model(id=MODEL, input_micro=1_000_000, output_micro=2_000_000)]),
        clock=clock_ms,
    )
    link = Nowhere()
    cell.ask_all = lambda: None  # type: ignore[method-assign]  # what it costs is measured by itself
    await cell.start(link)
    whole_s = time.perf_counter() - begun
    state = wire.State(incarnation="f" * 16, seq=1, state=VehicleState.READY, region="DE", model=MODEL, slots=8)
    vehicle_id = id_of(10 * turn + 1)
    cell.post(ev.VehicleReported(cause_id="bench", vehicle_id=vehicle_id, state=state))
    await link.granted.wait()
    decided_s, cpu_s = time.perf_counter() - begun, time.process_time()
    del cell.ask_all
    sent = link.sent
    begun = time.perf_counter()
    cell.ask_all()
    asked_s = time.perf_counter() - begun
    found = {
        "whole_s": whole_s,
        "decided_s": decided_s,
        "cpu_s": cpu_s,  # since the process began
        "asked_s": asked_s,
        "asked": float(link.sent - sent),
        "vehicles": float(len(cell.scheduler.vehicles)),
        "leases": float(len(cell.scheduler.leases)),
        "jobs": float(len(cell.scheduler.jobs)),
        "known": float((cell.scheduler.cell.t.vehicles["speed"] > 0).sum()),
        "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000.0,
    }
    os.write(1, json.dumps(found).encode() + b"\n")
    os._exit(0)  # the state is not written again


def recovery_steps(size: Size) -> int:
    """Steps of the part."""
    return 2 + size.rounds


def recovered(bench: Bench) -> list[report.Figure]:
    """Seconds until a cell decides again."""
    size = bench.size
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        folder = Path(name)
        with bench.step(f"books of {size.index:,} vehicles"):
            write_books(folder, size.index)
        with bench.step("the first start compiles"):
            child(folder, 0)
        runs = []
        for turn in range(size.rounds):
            with bench.step("a start"):
                runs.append(child(folder, turn + 1))
    last = runs[-1]
    took = report.Samples(f"Start of a cell until it decides, {size.index:,} vehicles", "s", less_is_better=True)
    for run in runs:
        took.add(report.OURS, run["process_s"])
    note = (
        f"{last['leases']:,.0f} leases, {last['jobs']:,.0f} jobs, speeds of {last['known']:,.0f} known; "
        f"the state is whole after {statistics.median(run['whole_s'] for run in runs):.1f} s of it; "
        f"of the processor {statistics.median(run['cpu_s'] for run in runs):.1f} s; "
        f"{last['mb']:,.0f} MB at most"
    )
    median = took.median(report.OURS) or 0.0
    figure = took.figure(aim=f"{AIM_S:g} s", met=median <= AIM_S)
    bench.remarks.append(f"Start of a cell: {note}. Asking all vehicles to report comes after it.")
    asked = statistics.median(run["asked_s"] for run in runs)
    return [figure, one("Asking all vehicles to report", "s", asked, less_is_better=True)]


def child(folder: Path, turn: int) -> dict[str, float]:
    """One start in a process of its own, on one core. Raises NotMeasuredError."""
    env = os.environ | dict.fromkeys(ONE_CORE, "1") | {"PYTHONPYCACHEPREFIX": str(WORK / "pycache")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # a product that is installed has its bytecode
    command = [sys.executable, "-m", "bench.cell_recovery", str(folder), str(turn)]
    if hasattr(os, "sched_setaffinity"):
        command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command]
    begun = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=env, timeout=CHILD_S)
    took_s = time.perf_counter() - begun
    if done.returncode:
        raise NotMeasuredError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"process_s": took_s - found["asked_s"]}


def main() -> None:
    """One start, in the process that is measured."""
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(recover(Path(sys.argv[1]), int(sys.argv[2])))


if __name__ == "__main__":
    main()
