"""Part: vehicle updates a second into a cell, through a real message server, from the relay of a fleet.

Three processes on two cores: the cell alone on one; the message server and the relay on the other. The relay keeps a
few sheets on their way and counts what the cell's answers say was applied. Beside it the same reports as vehicles send
them, one message each, through the same server.

Called by: ``bench.run_cell``. Alone: ``python -m bench.cell_updates cell --vehicles 20000 --seconds 5``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import report
from bench.cell_bench import Bench, NotMeasuredError, Size
from bench.env import ROOT
from motorpool import wire
from motorpool.bus import CellLink, EmbeddedNats, open_client
from motorpool.catalogue import Catalogue, Model
from motorpool.core.fleet import NUMBER_OF_STATE
from motorpool.core.sheets import NO_MODEL, ROW, SheetTaken, SheetWriter, Tail, decode_answer, encode
from motorpool.server.feed import FedCell, RelayLink
from motorpool.store.blobs import BlobStore
from motorpool.store.database import Database
from motorpool.trust.credentials import CellIdentity, load_identity
from motorpool.trust.relays import (
    RelayPaper,
    enrol_relay,
    load_relay_credentials,
    save_paper,
    save_relay_credentials,
)
from motorpool.types import VehicleState

AIM: Final = 100_000
RELAY: Final = "telematics"
FEED: Final = 1
MODELS: Final = ("small", "middle")
REGIONS: Final = ("DE", "FR", "NO", "GB")
INCARNATION: Final = "00000000000000a1"
VEHICLES: Final = 100_000
SECONDS: Final = 10.0
SINGLES: Final = 20_000  # reports of one message each
ON_THE_WAY: Final = 6  # sheets that were sent and are not answered
SIZES: Final = (64, 256, wire.MAX_SHEET_ROWS)
WHOLE_ROWS: Final = 512  # reports in full in one sheet
PATIENCE_S: Final = 300.0
# Of a vehicle's reports, how many say something new of its power, of its stay, and of what it does.
OTHER_PERMIT: Final = 0.1
OTHER_RISK: Final = 0.05
OTHER_STATE: Final = 0.01


def update_steps(size: Size) -> int:
    """How many steps ``updates`` has."""
    del size
    return len(SIZES)


def updates(bench: Bench) -> list[report.Figure]:
    """Reports a second by the size of sheets, the processor time of each process, and single messages beside them."""
    if (os.cpu_count() or 1) < 2:
        raise NotMeasuredError("a cell and a relay want two cores")
    vehicles = min(bench.size.index // 10, VEHICLES)
    seconds = SECONDS if bench.size.rounds > 1 else 3.0
    best = report.Samples(f"Vehicle updates a second through NATS, sheets of {SIZES[-1]:,}", "updates/s")
    smaller = report.Samples("The same by the size of sheets", "updates/s")
    alone = report.Samples("The same, one message a report", "updates/s")
    for rows in SIZES:
        with bench.step(f"sheets of {rows:,}"):
            found = _measured(vehicles, seconds, rows)
        note = (
            f"{vehicles:,} vehicles; busy: the cell {found['cell_busy']:.0%}, the relay {found['relay_busy']:.0%}, "
            f"the server {found['server_busy']:.0%} of a core"
        )
        if rows == SIZES[-1]:
            best.add(report.OURS, found["updates_s"], count=found["taken"], note=note)
            note = f"{found['whole_s']:,.0f} a second, where a relay says all of them in full"
            alone.add(report.OURS, found["singles_s"], count=SINGLES, note=note)
        else:
            smaller.add(f"{rows:,}", found["updates_s"], note=note)
    met = (best.median(report.OURS) or 0) >= AIM
    return [best.figure(aim=f"{AIM:,} a second", met=met), *smaller.points(), alone.figure()]


def _measured(vehicles: int, seconds: float, rows: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.cell_updates", "cell", "--vehicles", str(vehicles)]
    command += ["--seconds", str(seconds), "--rows", str(rows)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise NotMeasuredError(f"sheets of {rows}: not done after {PATIENCE_S:.0f} s") from error
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        raise NotMeasuredError(f"sheets of {rows}: {said[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- the cell's process ------------------------------------------------------------------------------------------------


def name_of(number: int) -> str:
    """The id of a vehicle."""
    return f"vehicle-{number:07d}"


@asynccontextmanager
async def _cell(folder: Path, vehicles: int) -> AsyncIterator[tuple[FedCell, EmbeddedNats]]:
    """A cell as ``motorpool serve`` starts it, on this process's core; its message server is on the other one."""
    identity = load_identity(folder / "identity.json", 0)
    nats = EmbeddedNats(folder / "nats", identity)
    await nats.start()
    assert nats.process is not None
    os.sched_setaffinity(nats.process.pid, {1})
    database = Database(folder / "cell.db")
    rows = [(name_of(number), "car", 1) for number in range(vehicles)]
    with database.writer as db:
        db.executemany("INSERT INTO vehicle (vehicle_id, name, enrolled_ms) VALUES (?, ?, ?)", rows)
    cell = FedCell(
        relays=folder / "relays",
        database=database,
        blobs=BlobStore(folder / "files"),
        catalogue=Catalogue([Model(id=model) for model in MODELS]),
        clock=lambda: time.time_ns() // 1_000_000,
    )
    save_paper(folder / "relays", RelayPaper(relay_id=RELAY, every=True))
    save_relay_credentials(folder / "relay.json", enrol_relay(identity, RELAY, [nats.url], 0))
    await cell.start(await CellLink.connect([nats.url], identity, cell.on_link))
    await cell.listen_to_relays([nats.url], identity)
    try:
        yield cell, nats
    finally:
        await cell.stop()
        await nats.stop()


def busy_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(vehicles: int, seconds: float, rows: int) -> dict[str, Any]:
    """Run the cell, have a relay feed it, and say what came of it."""
    os.sched_setaffinity(0, {0})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        async with _cell(Path(name), vehicles) as (cell, nats):
            assert nats.process is not None
            command = [sys.executable, "-m", "bench.cell_updates", "relay", "--folder", name]
            command += ["--vehicles", str(vehicles), "--seconds", str(seconds), "--rows", str(rows)]
            relay = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
            assert relay.stdout is not None
            os.sched_setaffinity(relay.pid, {1})
            before: dict[str, float] = {}
            pids = {"cell": os.getpid(), "relay": relay.pid, "server": nats.process.pid}
            async for line in relay.stdout:
                said = json.loads(line)
                if said["what"] == "begun":
                    before = {who: busy_s(pid) for who, pid in pids.items()}
                elif said["what"] == "ended":
                    for who, pid in pids.items():
                        found[f"{who}_busy"] = (busy_s(pid) - before[who]) / said["took_s"]
                    found |= {"updates_s": said["taken"] / said["took_s"], "taken": said["taken"]}
                    found["whole_s"] = said["whole_s"]
                elif said["what"] == "singles":
                    found["singles_s"] = await _singles(cell, said["seq"])
            if await relay.wait():
                raise NotMeasuredError("the relay has failed")
    return found


async def _singles(cell: FedCell, seq: int) -> float:
    """How many reports a second are applied that come as messages of their own."""
    begun_s, first = 0.0, 0
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        await asyncio.sleep(0.01)
        there = int((cell.scheduler.cell.t.vehicles["seq"][: cell.scheduler.cell.ids.rows] == seq).sum())
        if there and not begun_s:
            begun_s, first = time.perf_counter(), there
        if there == min(SINGLES, cell.scheduler.cell.ids.rows):
            return (there - first) / max(time.perf_counter() - begun_s, 0.01)
    raise NotMeasuredError("single messages were lost")


# -- the relay's process -----------------------------------------------------------------------------------------------


class Fleet:
    """What the vehicles say, as columns; each turn some of them say something else."""

    def __init__(self, vehicles: int) -> None:
        self._draw = np.random.Generator(np.random.Philox(key=[1, 1]))
        self.rows = np.zeros(vehicles, ROW)
        self.rows["vehicle"] = np.arange(vehicles)
        self.rows["incarnation"] = int(INCARNATION, 16)
        self.rows["model"] = self._draw.integers(len(MODELS), size=vehicles)
        self.rows["region"] = self._draw.integers(len(REGIONS), size=vehicles)
        self.rows["state"] = NUMBER_OF_STATE[VehicleState.READY]
        self.rows["slots"] = 8
        self.rows["permit_w"] = 120
        self.rows["stay_min"] = 240
        self.rows["seq"] = 1

    def states(self) -> list[wire.State]:
        """The same as the messages of vehicles."""
        return [
            wire.State(
                incarnation=INCARNATION,
                seq=int(row["seq"]),
                state=VehicleState.READY,
                region=REGIONS[int(row["region"])],
                model=None if row["model"] == NO_MODEL else MODELS[int(row["model"])],
                slots=8,
                permit_w=120,
                stay_bound_ms=240 * 60_000,
                engine="llama.cpp b5000 0123456789abcdef",
            )
            for row in self.rows
        ]

    def next(self, first: int, count: int) -> Any:
        """The next report of ``count`` vehicles."""
        part = self.rows[first : first + count]
        part["seq"] += 1
        chance = self._draw.random(len(part), dtype=np.float32)
        part["permit_w"] = np.where(chance < OTHER_PERMIT, 60 + part["permit_w"] % 117, part["permit_w"])
        part["risk_pct"] = np.where(chance > 1 - OTHER_RISK, (part["risk_pct"] + 3) % 40, part["risk_pct"])
        working, ready = NUMBER_OF_STATE[VehicleState.WORKING], NUMBER_OF_STATE[VehicleState.READY]
        other = (chance > OTHER_PERMIT) & (chance < OTHER_PERMIT + OTHER_STATE)
        part["state"] = np.where(other, working + ready - part["state"], part["state"])
        return part


def say(what: str, **more: Any) -> None:
    """Tell the cell's process."""
    print(json.dumps({"what": what} | more), flush=True)


async def feed(folder: Path, vehicles: int, seconds: float, rows: int) -> None:
    """Register a fleet, then send sheets for so long."""
    fleet = Fleet(vehicles)
    answers: asyncio.Queue[SheetTaken] = asyncio.Queue()
    link = await RelayLink.connect(
        load_relay_credentials(folder / "relay.json"), lambda data: answers.put_nowait(decode_answer(data))
    )
    whole_s = await _register(link, fleet, answers)
    tail = Tail(models=list(MODELS), regions=list(REGIONS))
    await link.send(encode(FEED, 1, fleet.next(0, rows), tail))
    _good(await answers.get())  # what is compiled is compiled now
    sent, taken, first, on_the_way = 1, 0, 0, 0
    say("begun")
    begun_s = time.perf_counter()
    while time.perf_counter() - begun_s < seconds or on_the_way:
        while on_the_way < ON_THE_WAY and time.perf_counter() - begun_s < seconds:
            sent += 1
            await link.send(encode(FEED, sent, fleet.next(first, rows), tail))
            first = 0 if first + rows >= vehicles else first + rows
            on_the_way += 1
        answer = _good(await answers.get())
        taken += answer.taken
        on_the_way -= 1
    say("ended", taken=taken, took_s=time.perf_counter() - begun_s, whole_s=whole_s)
    await link.close()
    await _send_singles(folder, fleet)


def _good(answer: SheetTaken) -> SheetTaken:
    if answer.error or answer.wanted or answer.refused:
        raise SystemExit(f"the cell did not take a sheet: {answer.error or 'vehicles are wanted or refused'}")
    return answer


async def _register(link: RelayLink, fleet: Fleet, answers: asyncio.Queue[SheetTaken]) -> float:
    """Say everything in full once; how many a second that is."""
    writer = SheetWriter(FEED)
    begun_s = time.perf_counter()
    states = fleet.states()
    for number, state in enumerate(states):
        writer.add(name_of(number), state)
        if len(writer) == WHOLE_ROWS or number == len(states) - 1:
            await link.send(writer.take())
            _good(await answers.get())
    return len(states) / (time.perf_counter() - begun_s)


async def _send_singles(folder: Path, fleet: Fleet) -> None:
    """The next report of each vehicle as a message of its own; the cell's identity may send for all of them."""
    identity: CellIdentity = load_identity(folder / "identity.json", 0)
    url = load_relay_credentials(folder / "relay.json").urls
    client = await open_client(
        url, name="all", jwt=identity.cell_jwt(), seed=identity.user_seed, inbox="_INBOX.b", on_link=lambda _up: None
    )
    fleet.rows["seq"] = seq = int(fleet.rows["seq"].max()) + 1
    messages = [wire.encode(state) for state in fleet.states()[:SINGLES]]
    say("singles", seq=seq)
    for number, data in enumerate(messages):
        await client.publish(wire.up_subject(name_of(number), "state"), data)
    await client.flush(60)
    await client.close()


def main() -> None:
    """One of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("cell", "relay"))
    parser.add_argument("--vehicles", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rows", type=int, default=wire.MAX_SHEET_ROWS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.what == "cell":
        print(json.dumps(asyncio.run(measure(options.vehicles, options.seconds, options.rows))), flush=True)
    else:
        asyncio.run(feed(options.folder, options.vehicles, options.seconds, options.rows))


if __name__ == "__main__":
    main()
