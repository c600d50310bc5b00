"""From the owner's hand to an engine that computes no more: the real agent, the real engine and model, under full load.

Vehicles of one cell work on a batch of long answers and are tried in turns, since each rests for a few seconds after a
trial. The owner's acts go through the port of the car, and the kernel says what the engine does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec

from bench import product, report
from bench.env import BENCH, ROOT
from bench.yield_car import (
    LOOK_S,
    MODEL,
    SETTLE_S,
    THREADS,
    Flood,
    NotReadyError,
    Vehicle,
    alive,
    busy_cores,
    children,
    flood,
    resident_mb,
    standing_still,
    stopped,
    until_ms,
    used_ns,
    used_since_ns,
    vehicles,
)
from bench.yield_scenes import (
    AFTER,
    AFTER_S,
    BUSY,
    CUT,
    DEAD,
    DOOR,
    FLOOD,
    GONE,
    HANGS,
    KILLED,
    NOT_MEASURED,
    PUSHED,
    SCENES,
    SILENT,
    Trials,
)

VEHICLES = 6  # one rests, starts or loads while another is tried
TURN_S = 0.5  # about what a trial takes
LINES = 2_000
ANSWER_TOKENS = 600
TRIES = 4  # to begin a trial
SHOWN_EVERY = 10
INTERRUPTED = 130  # the exit status of a shell's commands
PICTURE = ROOT / "docs" / "images" / "yield.svg"
RAW = BENCH / ".work" / "yield-trials.json"

Trial = Callable[[Vehicle, int], float]


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How many trials of each kind: the door with nothing in the way, with something, what takes longer, vehicles."""

    doors: int
    others: int
    slow: int
    vehicles: int


class Session:
    """Does trials and keeps what they gave."""

    def __init__(self) -> None:
        self.trials = Trials()
        self.begun_again = 0
        self.given_back_mb: list[float] = []

    def series(self, key: str, fleet: list[Vehicle], count: int, trial: Trial) -> None:
        """So many trials of one scene, one vehicle after the other."""
        name = next(scene.name for scene in SCENES if scene.key == key)
        print(f"==> {name}: {count} trials", flush=True)
        begun_s = time.monotonic()
        stagger(fleet)
        for number in range(count):
            self.trials.add(key, self._one(fleet[number % len(fleet)], trial))
            if (number + 1) % SHOWN_EVERY == 0 or number + 1 == count:
                values = self.trials.values[key]
                took_s = time.monotonic() - begun_s
                print(
                    f"    {number + 1} of {count}, {took_s:.0f} s: median {statistics.median(values):.1f} ms, "
                    f"highest {max(values):.1f} ms",
                    flush=True,
                )

    def _one(self, vehicle: Vehicle, trial: Trial) -> float:
        """One trial. One that could not begin is begun again, at last with the agent started anew."""
        for left in reversed(range(TRIES)):
            try:
                return trial(vehicle, vehicle.computing())
            except NotReadyError as error:
                self.begun_again += 1
                print(f"    again: {error}", flush=True)
                if left == 0:
                    raise
                vehicle.make_fine()
                if left <= TRIES // 2:
                    vehicle.again()
        raise AssertionError("unreachable")

    # -- the trials ----------------------------------------------------------------------------------------------------

    def open_door(self, vehicle: Vehicle, pid: int) -> float:
        """Milliseconds until the engine is stopped; what it computes after that is noted as well."""
        owner = vehicle.owner
        if not alive(pid) or stopped(pid):
            raise NotReadyError(f"the engine of {vehicle.name} stopped before its owner came")
        try:
            stopped_ms = until_ms(owner.begins("open-door"), lambda: stopped(pid), "the engine went on")
            used = used_ns(pid)
            owner.ends()
            time.sleep(AFTER_S)
            after_ns = used_since_ns(pid, used)
            if not alive(pid):
                raise NotReadyError(f"the engine of {vehicle.name} ended meanwhile: {vehicle.said()}")
        finally:
            owner.does("lock")
        self.trials.add(AFTER, after_ns / 1e6)
        return stopped_ms

    def open_door_without(self, other_pid: int) -> Trial:
        """The door, while some other process stands still."""

        def trial(vehicle: Vehicle, pid: int) -> float:
            with standing_still(other_pid):
                time.sleep(SETTLE_S)
                return self.open_door(vehicle, pid)

        return trial

    def open_door_in(self, water: Flood) -> Trial:
        """The door, while the agent has more to read than it can."""

        def trial(vehicle: Vehicle, pid: int) -> float:
            with water.over(vehicle):
                return self.open_door(vehicle, pid)

        return trial

    def silence_broker(self, vehicle: Vehicle, pid: int) -> float:
        """Milliseconds from the last moment of the databroker until the engine is stopped."""
        with standing_still(vehicle.broker_pid) as begun_s:
            stopped_ms = until_ms(begun_s, lambda: stopped(pid), "the engine went on without signals")
            if not alive(pid):
                raise NotReadyError(f"the engine of {vehicle.name} ended meanwhile: {vehicle.said()}")
        return stopped_ms

    def pull_cable(self, vehicle: Vehicle, pid: int) -> float:
        """Milliseconds until the processes of the engine, and with them their memory, are gone."""
        owner, processes = vehicle.owner, [pid, *children(pid)]
        held_mb = resident_mb(pid)
        try:
            begun_s = owner.begins("unplug")
            gone_ms = until_ms(begun_s, lambda: not any(map(alive, processes)), "the engine's process was still there")
            owner.ends()
        finally:
            owner.does("plug-in")
        self.given_back_mb.append(held_mb)
        return gone_ms

    def kill_agent(self, vehicle: Vehicle, pid: int) -> float:
        """Milliseconds from the end of the agent to that of its engine."""
        begun_s = time.perf_counter()
        os.kill(vehicle.pid, signal.SIGKILL)
        gone_ms = until_ms(begun_s, lambda: not alive(pid), "the engine outlived its agent")
        vehicle.again()
        return gone_ms

    def hang_agent(self, vehicle: Vehicle, pid: int) -> float:
        """Milliseconds from the last moment of an agent that hangs to the end of its engine."""
        with standing_still(vehicle.pid) as begun_s:
            return until_ms(begun_s, lambda: not alive(pid), "the engine went on beside an agent that hangs")


def stagger(fleet: list[Vehicle]) -> None:
    """Have each vehicle rest a little later than the one before: a car has one engine, not one beside five others."""
    for vehicle in fleet:
        with contextlib.suppress(NotReadyError):  # the trial will tell
            vehicle.computing()
    for vehicle in fleet:
        with contextlib.suppress(NotReadyError):
            vehicle.owner.does("open-door")
            vehicle.owner.does("lock")
        time.sleep(TURN_S)


def hand_in(cell: product.Cell, folder: Path) -> None:
    """A batch that keeps the vehicles at work for longer than all trials take."""
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


def measure(folder: Path, counts: Counts) -> Session:
    """All trials, in one cell."""
    session = Session()
    with product.running(0, folder) as cell:
        hand_in(cell, folder)
        with vehicles(cell, folder, counts.vehicles) as fleet:
            session.series(DOOR, fleet, counts.doors, session.open_door)
            with busy_cores():
                session.series(BUSY, fleet, counts.others, session.open_door)
            for key, part in ((CUT, product.MESSAGES), (DEAD, product.CONTROL)):
                session.series(key, fleet, counts.others, session.open_door_without(cell.pids[part]))
            with flood(cell, fleet[0]) as water:
                session.series(FLOOD, fleet, counts.others, session.open_door_in(water))
            session.trials.notes[FLOOD] = (
                f"its loop was busy for {statistics.median(water.shares_pct):.0f} % of the time"
            )
            session.series(GONE, fleet, counts.others, session.pull_cable)
            session.trials.notes[GONE] = f"{statistics.median(session.given_back_mb):.0f} MB each time"
            session.series(HANGS, fleet, counts.slow, session.hang_agent)
            session.series(KILLED, fleet, counts.slow, session.kill_agent)
        with vehicles(cell, folder, counts.vehicles, behind_a_broker=True) as fleet:
            session.series(PUSHED, fleet, counts.others, session.open_door)
            session.series(SILENT, fleet, counts.slow, session.silence_broker)
    return session


def remarks(session: Session, counts: Counts) -> list[str]:
    """What a reader must know of all figures."""
    made = [
        f"A run is one act on a vehicle with {MODEL} ({THREADS} threads, a batch of {LINES:,} long answers); "
        f"{counts.vehicles} vehicles are tried in turns, so that one works while others rest. Times begin before the "
        "act is sent to the port of the car (or before the signal to a process) and end at the first look that sees "
        f"it, {LOOK_S * 1000:.1f} ms apart. A thread counts as stopped when it has taken the signal, or when the "
        "kernel says that its control group is frozen; for either it needs a core once more: where others keep every "
        "core busy it waits for that without computing."
    ]
    if session.begun_again:
        made.append(f"{session.begun_again} trials were begun again because the vehicle was not at work.")
    return made


def interrupt(*_: object) -> None:
    """End as with Ctrl-C, so that nothing is left running."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Run the trials, draw them, and write ``results/yield.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few trials, results not kept")
    parser.add_argument("--trials", type=int, default=200, help="of the door, with nothing in the way")
    parser.add_argument("--others", type=int, default=50, help="of each other way")
    parser.add_argument("--slow", type=int, default=20, help="of agents and databrokers that are killed or hang")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    counts = Counts(doors=options.trials, others=options.others, slow=options.slow, vehicles=VEHICLES)
    if options.quick:
        counts = Counts(doors=4, others=2, slow=2, vehicles=2)
    begun = report.begin()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        try:
            session = measure(Path(name), counts)
        except product.ProductError as error:
            raise SystemExit(f"bench-yield: {error}") from error
        except (httpx.HTTPError, OSError) as error:
            raise SystemExit(f"bench-yield: {type(error).__name__}: {error}") from error
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_bytes(msgspec.json.encode(session.trials.values))
    notes = remarks(session, counts)
    picture = RAW.with_suffix(".svg") if options.quick else PICTURE
    try:
        from bench.yield_plot import draw  # noqa: PLC0415  # matplotlib is an extra
    except ImportError:
        print("==> No picture: matplotlib is not installed (the extra `plots`)", flush=True)
    else:
        picture.write_bytes(draw(session.trials.values))
        print(f"==> {picture.relative_to(ROOT)}", flush=True)
    if not options.quick and picture.exists():
        notes.append("![Every trial of every scene, on a logarithmic axis of time](images/yield.svg)")
    figures = session.trials.figures()
    report.finish("yield", figures, begun=begun, keep=not options.quick, skipped=NOT_MEASURED, remarks=notes)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
