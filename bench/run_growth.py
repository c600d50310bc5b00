"""How batch throughput and gateway overhead grow: from 1,000 to 50,000 lines, from 1 to 1,000 connected vehicles.

Vehicles are many to a process, each with its own connection and null engine. With lines: the same cell takes batches of
growing size, and the gateway is measured after each, so the books hold ever more. With vehicles: a fresh cell for each
number of them, a batch of one size, and the gateway.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

import msgspec
import uvloop

from bench import env, gateways, load, product, report
from bench.run_gateway import CONNECTIONS, CONTENT, PAIRS, TOKENS

LINES = (1_000, 5_000, 20_000, 50_000)
VEHICLES = (1, 10, 100, 1_000)
LINES_WITH_VEHICLES = 20_000
VEHICLES_WITH_LINES = 8


class Axis:
    """The samples along one way of growing; ``word`` is what grows."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.rate = report.Samples(f"Batch throughput as {word} grow", "lines/s")
        self.memory = report.Samples(f"Peak memory of the control plane as {word} grow", "MB", less_is_better=True)
        self.added = report.Samples(f"Added to a request as {word} grow, median", "ms", less_is_better=True)
        self.added_p99 = report.Samples(f"Added to a request as {word} grow, p99", "ms", less_is_better=True)
        self.requests = report.Samples(f"Requests a second as {word} grow, {CONNECTIONS} connections", "requests/s")

    def samples(self) -> list[report.Samples]:
        """All of them."""
        return [self.rate, self.memory, self.added, self.added_p99, self.requests]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how far a run goes."""

    rounds: int
    seconds: float
    lines: tuple[int, ...]
    vehicles: tuple[int, ...]
    batch: int


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Where on an axis, and the size of the batch there."""

    name: str
    lines: int


def measure(axis: Axis, point: Point, cell: product.Cell, direct: load.Target, folder: Path, seconds: float) -> None:
    """One point: a batch, then the gateway, then the memory."""
    count, name = point.lines, point.name
    batch = product.run_batch(cell, count, folder)
    axis.rate.add(name, count / batch.total_s, note=batch.describe())
    target = load.Target(name=name, base_url=cell.base_url, api_key=cell.api_key)
    requests = (direct.request(CONTENT, max_tokens=TOKENS), target.request(CONTENT, max_tokens=TOKENS))

    async def both() -> tuple[list[tuple[float, float]], load.Flood]:
        await load.pairs(direct, target, requests, seconds=seconds / 4, most=PAIRS // 10)  # warm
        found = await load.pairs(direct, target, requests, seconds=seconds, most=PAIRS)
        return found, await load.flood(target, requests[1], connections=CONNECTIONS, seconds=seconds)

    found, flood = uvloop.run(both())
    added_ms = [(through_s - direct_s) * 1e3 for direct_s, through_s in found]
    axis.added.add(name, load.percentile(added_ms, 50))
    axis.added_p99.add(name, load.percentile(added_ms, 99))
    axis.requests.add(name, flood.per_s)
    axis.memory.add(name, cell.peak_mb(product.CONTROL))
    print(
        f"    {name}: {count / batch.total_s:,.0f} lines/s, +{load.percentile(added_ms, 50):.2f} ms, "
        f"{flood.per_s:,.0f} requests/s, {cell.peak_mb(product.CONTROL):.0f} MB",
        flush=True,
    )


def grow_lines(axis: Axis, direct: load.Target, limits: Limits) -> None:
    """One round: a fresh cell takes batches of growing size."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        with product.running(VEHICLES_WITH_LINES, folder, in_one=True) as cell:
            product.run_batch(cell, 500, folder)
            for count in limits.lines:
                point = Point(name=f"{count:,} lines", lines=count)
                measure(axis, point, cell, direct, folder, limits.seconds)


def grow_vehicles(axis: Axis, direct: load.Target, limits: Limits) -> None:
    """One round: fresh cells with growing fleets."""
    for count in limits.vehicles:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder = Path(name)
            with product.running(count, folder, in_one=True) as cell:
                product.run_batch(cell, 500, folder)
                word = f"{count:,} vehicle" + ("s" if count > 1 else "")
                point = Point(name=word, lines=limits.batch)
                measure(axis, point, cell, direct, folder, limits.seconds)


def main() -> None:
    """Run the rounds and write ``results/growth.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: one small round, results not kept")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    begun = report.begin()
    limits = Limits(rounds=options.rounds, seconds=1.2, lines=LINES, vehicles=VEHICLES, batch=LINES_WITH_VEHICLES)
    if options.quick:
        limits = Limits(rounds=1, seconds=0.5, lines=(500, 2_000), vehicles=(1, 20), batch=1_000)
    by_lines, by_vehicles = Axis("lines"), Axis("vehicles")
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        direct = stack.enter_context(gateways.engine(Path(name), stand_in=False))
        for round_number in range(1, limits.rounds + 1):
            print(f"==> Growth, round {round_number} of {limits.rounds}", flush=True)
            for axis, grow in ((by_lines, grow_lines), (by_vehicles, grow_vehicles)):
                try:
                    grow(axis, direct, limits)
                except (product.ProductError, load.LoadError, env.MissingEnvError, OSError) as error:
                    skipped[f"{report.OURS}, round {round_number}, {axis.word}"] = str(error)
                    print(f"    failed: {error}", flush=True)
    figures = [figure for axis in (by_lines, by_vehicles) for samples in axis.samples() for figure in samples.points()]
    remarks = [
        f"With lines: {VEHICLES_WITH_LINES} vehicles. With vehicles: batches of {limits.batch:,} lines. "
        "Vehicles are many to a process, each with its own connection and null engine."
    ]
    report.finish("growth", figures, begun=begun, keep=not options.quick, skipped=skipped, remarks=remarks)


if __name__ == "__main__":
    main()
