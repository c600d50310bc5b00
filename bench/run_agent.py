"""What the agent itself takes of a vehicle's computer while the car may not work, and what one look of the guard costs.

The real agent, connected to a cell, in a simulated car whose owner has given no consent: it reads every signal and asks
its guard four times a second, and no engine was ever started. The kernel says what it holds and uses. The guard is
timed by itself, over a vehicle at which every signal is there.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from bench import product, report
from bench.env import BIN
from motorpool.agent.signals.source import AlwaysParked
from motorpool.core.guard import Budgets, ConsentView, History, Policy, decide
from motorpool.types import Permit

VEHICLE = "idle"
SETTLE_S = 5.0  # after the first report, so that what happens once at the start is over
DEADLINE_S = 30.0
NOW_MS = 1_790_000_000_000
DAY_MS = 86_400_000
EVALUATIONS = 20_000
AIM_MB = 60.0
AIM_PCT = 0.5
MEMORY = "Memory of the agent without an engine (its share of what it shares included)"
PEAK = "Highest resident memory of the same agent"
IDLE = "Processor time of the same agent, of one core"
LOOK = "One evaluation of the guard that ends in a permit"
REFUSED = "One evaluation of the guard that ends in reasons"


def pss_mb(pid: int) -> float:
    """Proportional set size: private memory, and of what is shared with other processes the share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise product.ProductError(f"process {pid} has no Pss")


def used_ns(pid: int) -> int:
    """Processor time of all threads that live now."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[0])
    return total


def children(pid: int) -> list[str]:
    """The processes that it started."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def enrol(cell: product.Cell, folder: Path, name: str) -> None:
    """A vehicle of the cell without consent."""
    folder.mkdir(parents=True)
    key = {"Authorization": f"Bearer {cell.admin_key}"}
    asked = {"vehicle_id": name, "name": name, "owner_key": "00" * 32}
    response = httpx.post(f"{cell.admin_url}/v1/vehicles", json=asked, headers=key, timeout=30, trust_env=False)
    response.raise_for_status()
    credentials = folder / "credentials.json"
    credentials.write_bytes(response.content)
    credentials.chmod(0o600)


def state(cell: product.Cell, name: str) -> str:
    """What the operator sees of one vehicle; empty before its first report."""
    key = {"Authorization": f"Bearer {cell.admin_key}"}
    response = httpx.get(f"{cell.admin_url}/v1/vehicles/{name}", headers=key, timeout=30, trust_env=False)
    return str(response.json().get("state") or "") if response.status_code == 200 else ""


@contextlib.contextmanager
def idle_agent(cell: product.Cell, folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """An agent that is connected, has no permit, and has settled."""
    enrol(cell, folder / name, name)
    command = [str(BIN / "motorpool"), "agent", "--dir", str(folder / name), "--simulated"]
    log = folder / f"{name}.log"
    with product.ended(command, log) as agent:
        end = time.monotonic() + DEADLINE_S
        while state(cell, name) != "denied":
            if agent.poll() is not None or time.monotonic() > end:
                raise product.ProductError(f"the agent did not report: {product.last_line(log)}")
            time.sleep(0.1)
        time.sleep(SETTLE_S)
        yield agent


def measure_agents(folder: Path, *, runs: int, watch_s: float) -> list[report.Figure]:
    """Memory and processor time, each run with an agent of its own."""
    memory = report.Samples(MEMORY, "MB", less_is_better=True)
    peak = report.Samples(PEAK, "MB", less_is_better=True)
    idle = report.Samples(IDLE, "%", less_is_better=True)
    with product.running(0, folder) as cell:
        for run in range(runs):
            with idle_agent(cell, folder, f"{VEHICLE}-{run}") as agent:
                before, begun_s = used_ns(agent.pid), time.monotonic()
                time.sleep(watch_s)
                share_pct = 100 * (used_ns(agent.pid) - before) / 1e9 / (time.monotonic() - begun_s)
                if children(agent.pid):
                    raise product.ProductError("the agent has started a process")
                idle.add(report.OURS, share_pct)
                memory.add(report.OURS, pss_mb(agent.pid))
                peak.add(report.OURS, product.peak_mb(agent.pid))
    worst_mb, worst_pct = max(memory.values[report.OURS]), max(idle.values[report.OURS])
    return [
        memory.figure(aim=f"under {AIM_MB:.0f} MB", met=worst_mb < AIM_MB),
        peak.figure(),
        idle.figure(aim=f"under {AIM_PCT} % of a core", met=worst_pct < AIM_PCT),
    ]


def guard_us(policy: Policy, consent: ConsentView, *, permitted: bool, count: int) -> float:
    """Microseconds of one evaluation, with time going on as it does in a vehicle."""
    signals = AlwaysParked()
    looks = [(now_ms, signals.read(now_ms)) for now_ms in range(NOW_MS, NOW_MS + 250 * count, 250)]
    budgets, history = Budgets(), History(fine_since_ms=NOW_MS - policy.dwell_ms)
    begun_s = time.perf_counter()
    for now_ms, read in looks:
        verdict, history = decide(policy, consent, read, budgets, history, now_ms)
    took_s = time.perf_counter() - begun_s
    if isinstance(verdict, Permit) is not permitted:
        raise product.ProductError("the guard decided otherwise than this benchmark is about")
    return took_s / count * 1e6


def measure_guard(*, runs: int, count: int) -> list[report.Figure]:
    """Both ways in which an evaluation ends."""
    policy = Policy()
    consent = ConsentView(refusal=None, max_watts_w=150, floor_pct=20.0, expires_ms=NOW_MS + DAY_MS)
    figures = []
    for name, paper, permitted in ((LOOK, consent, True), (REFUSED, ConsentView(), False)):
        samples = report.Samples(name, "microseconds", less_is_better=True)
        for _ in range(runs):
            samples.add(report.OURS, guard_us(policy, paper, permitted=permitted, count=count), count=count)
        figures.append(samples.figure())
    return figures


def main() -> None:
    """Measure and write ``results/agent.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: one short run, results not kept")
    parser.add_argument("--runs", type=int, default=5, help="agents, one after the other")
    parser.add_argument("--watch", type=float, default=20.0, help="seconds for which each is watched")
    options = parser.parse_args()
    begun = report.begin()
    runs, watch_s, count = (1, 2.0, 1_000) if options.quick else (options.runs, options.watch, EVALUATIONS)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        figures = measure_agents(Path(name), runs=runs, watch_s=watch_s)
    figures += measure_guard(runs=runs, count=count)
    remark = (
        f"A run is one agent, watched for {watch_s:.0f} s from {SETTLE_S:.0f} s after its first report. It is "
        "connected to a cell and looks at all signals of a simulated car four times a second, whose simulation it "
        "carries as well; without consent it never starts an engine. 1 MB is 1,000,000 bytes."
    )
    report.finish("agent", figures, begun=begun, keep=not options.quick, skipped={}, remarks=[remark])


if __name__ == "__main__":
    main()
