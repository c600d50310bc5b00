"""Durable batch throughput: Motorpool, four frameworks and two bare loops, one after the other in each round.

A run of ours is 50,000 lines from the first byte of the upload to the batch whose output file is assembled. A run of a
peer is that many no-op tasks (fewer if they would take long) from the first submit to the last result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import msgspec

from bench import env, product, report

LINES = 50_000
MEMORY_AIM_MB = 300
SHORT_S = 5.0
CLAIMS = "PostgreSQL, bare claims"
WHOLE = "PostgreSQL, insert + claim + complete"
JETSTREAM = "JetStream, bare work queue"


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A peer's module, its environment, and how it is named in the table."""

    name: str
    module: str
    environment: str
    variant: str = ""
    note: str = ""
    is_limit: bool = False
    most: int = LINES
    seconds: float = 6.0
    warm: int = 600


PEERS = (
    Peer(
        name=CLAIMS,
        module="postgres_claims",
        environment="postgres",
        is_limit=True,
        most=400_000,
        note="no insert, no completion",
    ),
    Peer(name=WHOLE, module="postgres_claims", environment="postgres", variant="whole", is_limit=True, most=200_000),
    Peer(name=JETSTREAM, module="jetstream_queue", environment="jetstream", is_limit=True, warm=3_000),
    Peer(name="Ray", module="ray_tasks", environment="ray", note="nothing durable"),
    Peer(name="Dask distributed", module="dask_tasks", environment="dask", warm=1_000, note="nothing durable"),
    Peer(name="Celery + Redis", module="celery_tasks", environment="celery", note="synced each second"),
    Peer(
        name="procrastinate + PostgreSQL",
        module="procrastinate_tasks",
        environment="procrastinate",
        variant="4",
        note="no results kept",
    ),
)


def run_peer(peer: Peer, tasks: int, *, quick: bool) -> dict[str, float]:
    """One run in the peer's own environment; raise MissingEnvError with one line if it cannot be."""
    python = env.python_of(peer.environment)
    command = [str(python), "-P", "-W", "ignore", "-m", f"bench.peers.{peer.module}", "--tasks", str(tasks)]
    command += ["--variant", peer.variant, "--most", str(peer.most), "--warm", str(peer.warm)]
    command += ["--seconds", "1" if quick else str(peer.seconds)]
    variables = {
        **os.environ,
        "PYTHONPATH": str(env.ROOT),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, cwd=folder, env=variables, timeout=180
            )
        except subprocess.TimeoutExpired as error:
            raise env.MissingEnvError(f"{peer.name}: no result within {error.timeout:.0f} s") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or ["no output"]
        raise env.MissingEnvError(f"{peer.name}: {said[-1][:200]}")
    result: dict[str, float] = json.loads(lines[-1])
    return result


def run_ours(lines: int, vehicles: int, rates: report.Samples, memory: report.Samples) -> None:
    """One run of ours on a fresh control plane, after a small batch to warm it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, product.running(vehicles, Path(folder)) as cell:
        product.run_batch(cell, 500, Path(folder))
        done = product.run_batch(cell, lines, Path(folder))
        rates.add(report.OURS, lines / done.total_s, count=lines, note=done.describe())
        memory.add(report.OURS, cell.peak_mb(product.CONTROL))
        print(f"    Motorpool: {lines / done.total_s:,.0f} lines/s ({done.describe()})", flush=True)


def main() -> None:
    """Run the rounds and write ``results/batch.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: one round, few tasks, results not kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--vehicles", type=int, default=2)
    parser.add_argument("--only", action="append", default=[], help="'ours' or a part of a peer's name; repeatable")
    options = parser.parse_args()
    begun = report.begin()
    rounds = 1 if options.quick else options.rounds
    lines = min(options.lines, 2_000) if options.quick else options.lines
    keep = not (options.quick or options.only) and lines == LINES
    wanted = [word.lower() for word in options.only]
    peers = [peer for peer in PEERS if not wanted or any(word in peer.name.lower() for word in wanted)]
    rates = report.Samples("Durable batch throughput", "lines or tasks a second")
    memory = report.Samples("Peak memory of the control plane", "MB", less_is_better=True)
    skipped: dict[str, str] = {}
    tasks: dict[str, int] = {}
    for round_number in range(1, rounds + 1):
        print(f"==> Batch throughput, round {round_number} of {rounds}", flush=True)
        if not wanted or "ours" in wanted:
            try:
                run_ours(lines, options.vehicles, rates, memory)
            except product.ProductError as error:
                skipped[report.OURS] = str(error)
                print(f"    Motorpool failed: {error}", flush=True)
        for peer in peers:
            if peer.name in skipped:
                continue
            try:
                result = run_peer(peer, tasks.get(peer.name, 0), quick=options.quick)
            except env.MissingEnvError as error:
                skipped[peer.name] = str(error)
                print(f"    {error}", flush=True)
                continue
            tasks[peer.name] = next_count(peer, int(result["tasks"]), result["seconds"])
            rates.add(peer.name, result["per_s"], count=int(result["tasks"]), note=peer.note)
            print(f"    {peer.name}: {result['per_s']:,.0f} tasks/s", flush=True)
    report.finish("batch", figures(rates, memory), begun=begun, keep=keep, skipped=skipped, remarks=[])


def next_count(peer: Peer, tasks: int, seconds: float) -> int:
    """As many tasks as before; more if they took less than SHORT_S, since short runs say little."""
    if seconds >= SHORT_S:
        return tasks
    return min(peer.most, -(-int(tasks / seconds * peer.seconds) // 500) * 500)


def figures(rates: report.Samples, memory: report.Samples) -> list[report.Figure]:
    """The aims, checked against what was measured."""
    ours = rates.median(report.OURS)
    framework = rates.best([peer.name for peer in PEERS if not peer.is_limit])
    limit = rates.best([CLAIMS, JETSTREAM])
    met = None
    if ours is not None and framework is not None and limit is not None:
        met = ours >= 10 * framework and ours >= limit / 2
    peak = memory.median(report.OURS)
    made = [rates.figure(aim="10 times the best framework and at least half of the better bare loop", met=met)]
    if peak is not None:
        made.append(memory.figure(aim=f"under {MEMORY_AIM_MB} MB", met=peak < MEMORY_AIM_MB))
    return made


if __name__ == "__main__":
    main()
