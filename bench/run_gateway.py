"""What a gateway adds to a live request: Motorpool beside LiteLLM's proxy and vllm-router, on one null engine.

Added milliseconds are paired: a direct request to the engine behind HTTP and one through the gateway alternate on open
connections. Requests a second come from a closed loop over 16 connections.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import uvloop

from bench import env, gateways, load, product, report

CONNECTIONS = 16
PAIRS = 2_000
TOKENS = 8
CONTENT = "The left rear brake hose may have been routed too close to the wheel. What should the owner do next?"
DIRECT = "engine directly"
BY_URL = "Motorpool, engine by URL"
NO_PEERS = (report.OURS, BY_URL, DIRECT, gateways.BARE_LINK)
VEHICLES = 2
AIM_MS = 1.0


class Figures:
    """The samples of one run of this benchmark."""

    def __init__(self) -> None:
        self.median = report.Samples("Added to a request, median", "ms", less_is_better=True)
        self.p99 = report.Samples("Added to a request, 99th percentile", "ms", less_is_better=True)
        self.rate = report.Samples(f"Requests a second, {CONNECTIONS} connections", "requests/s")
        self.memory = report.Samples("Peak memory of the gateway", "MB", less_is_better=True)
        self.generator_us: list[float] = []
        self.skipped: dict[str, str] = {}
        self.remarks: list[str] = []

    def summary(self) -> list[report.Figure]:
        """The figures with their aims."""
        ours_ms = self.median.median(report.OURS)
        ours_rate = self.rate.median(report.OURS)
        rival = self.rate.best([name for name in self.rate.values if name not in NO_PEERS])
        faster = None if ours_rate is None or rival is None else ours_rate > rival
        return [
            self.median.figure(aim=f"under {AIM_MS:g} ms", met=ours_ms is not None and ours_ms < AIM_MS),
            self.p99.figure(),
            self.rate.figure(aim="more than LiteLLM's proxy and vllm-router", met=faster),
            self.memory.figure(),
        ]


def measure(
    figures: Figures, direct: load.Target, gateway: gateways.Gateway, *, seconds: float, most: int = PAIRS
) -> None:
    """One round of one system: pairs, then the closed loop."""
    target = gateway.target
    requests = (direct.request(CONTENT, max_tokens=TOKENS), target.request(CONTENT, max_tokens=TOKENS))

    async def both() -> tuple[list[tuple[float, float]], load.Flood]:
        await load.pairs(direct, target, requests, seconds=seconds / 4, most=most // 10)  # warm
        found = await load.pairs(direct, target, requests, seconds=seconds, most=most)
        await load.flood(target, requests[1], connections=CONNECTIONS, seconds=max(1.5, seconds / 4))  # warm
        return found, await load.flood(target, requests[1], connections=CONNECTIONS, seconds=seconds)

    found, flood = uvloop.run(both())
    added_ms = [(through_s - direct_s) * 1e3 for direct_s, through_s in found]
    median_ms, p99_ms = load.percentile(added_ms, 50), load.percentile(added_ms, 99)
    figures.median.add(target.name, median_ms, count=len(found))
    figures.p99.add(target.name, p99_ms)
    figures.rate.add(target.name, flood.per_s, note=f"median {flood.median_ms:.1f} ms, p99 {flood.p99_ms:.1f} ms")
    figures.generator_us.append(flood.generator_us)
    print(
        f"    {target.name}: +{median_ms:.2f} ms median, +{p99_ms:.2f} ms p99, {flood.per_s:,.0f} requests/s",
        flush=True,
    )


def measure_direct(figures: Figures, direct: load.Target, *, seconds: float) -> None:
    """The closed loop straight at the engine: the most that any gateway in front of it could pass on."""
    request = direct.request(CONTENT, max_tokens=TOKENS)
    flood = uvloop.run(load.flood(direct, request, connections=CONNECTIONS, seconds=seconds))
    figures.rate.add(DIRECT, flood.per_s, note=f"median {flood.median_ms:.1f} ms, p99 {flood.p99_ms:.1f} ms")
    print(f"    {DIRECT}: {flood.per_s:,.0f} requests/s", flush=True)


def generator_cost(folder: Path, *, seconds: float) -> str:
    """What the load generator does at most, against a server that does next to nothing."""
    with gateways.echo(folder) as target:
        request = target.request(CONTENT, max_tokens=TOKENS)
        flood = uvloop.run(load.flood(target, request, connections=CONNECTIONS, seconds=seconds))
    return (
        f"The load generator itself reaches {flood.per_s:,.0f} requests/s against a server with a fixed answer and "
        f"spends {flood.generator_us:.0f} microseconds of processor time on a request."
    )


def start_all(
    stack: contextlib.ExitStack, folder: Path, direct: load.Target, figures: Figures, wanted: list[str]
) -> list[gateways.Gateway]:
    """Start every system that can be started; the others are named with the reason."""
    found: list[gateways.Gateway] = []

    def include(name: str) -> bool:
        return not wanted or any(word in name.lower() for word in wanted)

    for name, engine_url in ((report.OURS, ""), (BY_URL, direct.base_url)):
        if not include(name):
            continue
        try:
            place = folder / name.replace(" ", "-")
            place.mkdir()
            cell = stack.enter_context(
                product.running(VEHICLES, place, in_one=bool(engine_url), slots=16, engine_url=engine_url)
            )
        except product.ProductError as error:
            figures.skipped[name] = str(error)
            print(f"    {name} failed: {error}", flush=True)
            continue
        target = load.Target(name=name, base_url=cell.base_url, api_key=cell.api_key)
        found.append(Ours(target, cell))
    others: list[tuple[str, Callable[[], contextlib.AbstractContextManager[gateways.Gateway]]]] = [
        (gateways.BARE_LINK, lambda: gateways.bare_link(folder)),
        ("vllm-router", lambda: gateways.vllm_router(folder, direct)),
        ("LiteLLM proxy", lambda: gateways.litellm(folder, direct)),
    ]
    for name, start in others:
        if not include(name):
            continue
        print(f"    starting {name}", flush=True)
        try:
            found.append(stack.enter_context(start()))
        except env.MissingEnvError as error:
            figures.skipped[name] = str(error)
            print(f"    {error}", flush=True)
    return found


class Ours(gateways.Gateway):
    """Our control plane; its memory is that of the process that serves the API."""

    def __init__(self, target: load.Target, cell: product.Cell) -> None:
        super().__init__(target, None)
        self._cell = cell

    def last_words(self) -> str:
        """The end of the control plane's log."""
        return f" (its log: {self._cell.last_words()})"

    def peak_mb(self) -> float:
        """Of the control plane process."""
        return self._cell.peak_mb(product.CONTROL)


def main() -> None:
    """Run the rounds and write ``results/gateway.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: one short round, results not kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each part of a round")
    parser.add_argument("--only", action="append", default=[], help="a part of a system's name; repeatable")
    parser.add_argument("--stand-in", action="store_true", help="a fixed answer instead of the null engine")
    options = parser.parse_args()
    begun = report.begin()
    seconds = 1.0 if options.quick else options.seconds
    rounds = 1 if options.quick else options.rounds
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        figures.remarks.append(generator_cost(folder, seconds=seconds))
        direct = stack.enter_context(gateways.engine(folder, stand_in=options.stand_in))
        print("==> Starting the gateways", flush=True)
        systems = start_all(stack, folder, direct, figures, [word.lower() for word in options.only])
        for round_number in range(1, rounds + 1):
            print(f"==> Gateway overhead, round {round_number} of {rounds}", flush=True)
            measure_direct(figures, direct, seconds=seconds)
            for system in list(systems):
                try:
                    measure(figures, direct, system, seconds=seconds)
                except (load.LoadError, TimeoutError, OSError) as error:
                    reason = f"{error or type(error).__name__}{system.last_words()}"
                    figures.skipped[system.target.name] = reason
                    systems.remove(system)
                    print(f"    {system.target.name} failed: {reason}", flush=True)
        for system in systems:
            figures.memory.add(system.target.name, system.peak_mb())
    report.finish(
        "gateway",
        figures.summary(),
        begun=begun,
        keep=not (options.quick or options.only or options.stand_in),
        skipped=figures.skipped,
        remarks=figures.remarks,
    )


if __name__ == "__main__":
    main()
