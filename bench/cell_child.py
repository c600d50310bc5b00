"""One run of the fleet gear in a process of its own, so that its time, memory and hash seed are its own.

Called by: the parts of ``bench.run_cell``. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import msgspec

from bench.cell_worlds import build, living, load_scenario
from motorpool.sim.fleet_run import FleetRun
from motorpool.sim.people import People

WARM_VEHICLES = 20
SEED = 1


def week(vehicles: int, living_people: People) -> dict[str, Any]:
    """A week of a fleet: processor time of the run (compiling and building the world apart), peak memory."""
    found = load_scenario("s12")
    FleetRun(build(msgspec.structs.replace(found, days=1, load=0.5), living_people, WARM_VEHICLES, SEED)).run()
    warm_mb = peak_mb()
    begun_s = time.process_time()
    made = build(found, living_people, vehicles, SEED)
    built_s = time.process_time()
    run = FleetRun(made)
    outcome = run.run()
    return {
        "cpu_s": time.process_time() - built_s,
        "world_s": built_s - begun_s,
        "peak_mb": peak_mb(),
        "warm_mb": warm_mb,
        "world_mb": made.nbytes / 1e6,
        "cell_mb": run.cell.nbytes / 1e6,
        "events": outcome.events,
        "useful_share": outcome.useful / outcome.available if outcome.available else 0.0,
        "missed_share": outcome.missed_share,
    }


def peak_mb() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def digest(vehicles: int, hours: int, living_people: People, *, fast: bool) -> dict[str, Any]:
    """All that a run has counted, as one number; and what the world was made of."""
    found = load_scenario("s1", days=1)
    streams = tuple(
        msgspec.structs.replace(
            stream, jobs=40, deadlines_h=(1.0, 4.0), deadline_weights=(1.0, 1.0), hours=float(hours)
        )
        for stream in found.streams
    )
    found = msgspec.structs.replace(found, streams=streams, load=0.6)
    made = build(found, living_people, vehicles, SEED)
    outcome = FleetRun(made, fast=fast).run()
    return {"digest": outcome.digest, "events": outcome.events, "grants": outcome.grants}


def main() -> None:
    """Do one of both and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("week", "digest"))
    parser.add_argument("--vehicles", type=int, required=True)
    parser.add_argument("--hours", type=int, default=12)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    if options.what == "week":
        found = week(options.vehicles, living(few=options.few))
    else:
        found = digest(options.vehicles, options.hours, living(few=options.few), fast=not options.plain)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
