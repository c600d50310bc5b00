"""Streams on machines that vanish: Motorpool beside vllm-router, sglang-router and LiteLLM's proxy, all in one run.

Every stream has one event in its middle: its machine is killed, frozen, cut off from the network or driven away. Then
the same with departures that announce themselves, one of two machines that is silent, and a crowd of streams at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import uvloop

from bench import env, load, product, report
from bench import streams_scenes as scenes
from bench.streams_client import Heard
from bench.streams_peers import PEERS
from bench.streams_scenes import Crowd, Theirs, Trial
from motorpool.catalogue import Catalogue, models_dir, verify

MACHINES: Final = 4
RATE: Final = 100.0
TOKENS: Final = 60
LLAMA: Final = "smollm2-135m-instruct"
WITH_MODEL: Final = "Motorpool, demo model"
DIRECT: Final = "engine directly"
NULL_GAP_MS: Final = (50.0, 150.0)
MODEL_GAP_MS: Final = (1_000.0, 2_500.0)


class Sizes:
    """How much of everything: a whole run, or a smoke test."""

    def __init__(self, *, quick: bool) -> None:
        self.streams = 12 if quick else 200
        self.peer_streams = 4 if quick else 8  # slow peers get fewer: each waits for its limit
        self.model_streams = 4 if quick else 24
        self.announced = 4 if quick else 24
        self.silent = 60 if quick else 400
        self.peer_silent = 30 if quick else 60
        self.crowd = 200 if quick else 1_000
        self.crowd_tokens = 40 if quick else 100


class Figures:
    """The samples of this benchmark."""

    def __init__(self) -> None:
        def less(name: str, unit: str) -> report.Samples:
            return report.Samples(name, unit, less_is_better=True)

        self.completed = report.Samples("Streams completed, one fault each", "%")
        self.same = report.Samples("Streams with the bytes of the unbroken run", "%")
        self.gap_median = less("Longest pause of a stream with a fault, median", "ms")
        self.gap_p99 = less("Longest pause of a stream with a fault, 99th percentile", "ms")
        self.again = less("Tokens read again by the next vehicle, for each one delivered", "tokens")
        self.told_gap = less("Longest pause of a stream whose vehicle announced its departure, median", "ms")
        self.told_p99 = less("Time between tokens of such streams, 99th percentile", "ms")
        self.told_same = report.Samples("Such streams with the bytes of the unbroken run", "%")
        self.answered = report.Samples("Answered while one of two machines is silent", "%")
        self.first_p99 = less("First token while one of two machines is silent, 99th percentile", "ms")
        self.hedged = less("Requests asked for twice meanwhile", "%")
        self.crowd_rate = report.Samples("Tokens a second, all streams at once", "tokens/s")
        self.crowd_late = less("Added delay of a token, 99th percentile", "ms")
        self.crowd_cpu = less("Processor time of the gateway for a token", "us")
        self.crowd_memory = less("Memory of the gateway for a stream", "kB")
        self.skipped: dict[str, str] = {}
        self.remarks: list[str] = []

    def faults(self, name: str, trials: list[Trial]) -> None:
        """Take in the streams of one system."""
        struck = [trial for trial in trials if trial.struck_at]
        whole = [trial for trial in struck if trial.heard.whole]
        by_fault = {fault: [t for t in struck if t.fault == fault] for fault in sorted({t.fault for t in struck})}
        note = ", ".join(
            f"{fault} {_percent(sum(t.same for t in each), len(each)):.0f} %" for fault, each in by_fault.items()
        )
        self.completed.add(name, _percent(len(whole), len(struck)), count=len(struck))
        self.same.add(name, _percent(sum(trial.same for trial in struck), len(struck)), note=note)
        gaps = [trial.largest_gap_ms for trial in whole if trial.same]
        if gaps:
            self.gap_median.add(name, statistics.median(gaps))
            medians = ", ".join(
                f"{fault} {statistics.median(t.largest_gap_ms for t in each if t.same):.0f} ms"
                for fault, each in by_fault.items()
                if any(t.same for t in each)
            )
            worst = max((t for t in whole if t.same), key=lambda trial: trial.largest_gap_ms)
            longest = f"longest {worst.largest_gap_ms:.0f} ms: {worst.fault}"
            self.gap_median.notes[name] = medians
            self.gap_p99.add(name, load.percentile(gaps, 99), note=longest)
            _say(name, "pause", f"{medians}; p99 {load.percentile(gaps, 99):.0f} ms, {longest}")
        continued = [trial for trial in whole if trial.heard.ours.get("continued")]
        if continued:
            delivered = sum(len(trial.heard.at_s) for trial in whole)
            self.again.add(name, sum(trial.struck_at for trial in continued) / max(1, delivered))
        _say(name, "faults", f"{len(whole)}/{len(struck)} whole, {sum(t.same for t in struck)} the same, {note}")
        if len(struck) < len(trials):
            left_out = len(trials) - len(struck)
            self.remarks.append(f"{name}: nothing was struck in {left_out} of {len(trials)} trials; not counted.")
        for trial in struck:
            if not trial.same and name.startswith(report.OURS):
                self.remarks.append(f"{name}, {trial.fault}: {trial.heard.error or 'another text'}")

    def announced(self, name: str, trials: list[Trial]) -> None:
        """The same for departures that announce themselves."""
        moved = [trial for trial in trials if trial.heard.ours.get("continued")]
        gaps = [trial.largest_gap_ms for trial in moved]
        if not gaps:
            self.remarks.append(f"{name}: no announced departure was handed over")
            return
        spacing = [gap_s * 1e3 for trial in moved for gap_s in trial.heard.gaps_s]
        self.told_gap.add(name, statistics.median(gaps), count=len(moved))
        self.told_p99.add(name, load.percentile(spacing, 99))
        self.told_same.add(name, _percent(sum(trial.same for trial in moved), len(moved)))
        _say(
            name, "announced", f"{len(moved)}/{len(trials)} handed over, longest pause {statistics.median(gaps):.0f} ms"
        )

    def silent(self, name: str, heard: list[Heard]) -> None:
        """One of two machines said nothing."""
        whole = [each for each in heard if each.whole]
        firsts = [each.first_s * 1e3 for each in whole if each.first_s is not None]
        self.answered.add(name, _percent(len(whole), len(heard)), count=len(heard))
        if firsts:
            self.first_p99.add(name, load.percentile(firsts, 99), note=f"median {statistics.median(firsts):.0f} ms")
        if name == report.OURS:
            self.hedged.add(name, _percent(sum(bool(each.ours.get("hedged")) for each in whole), len(heard)))
        _say(
            name,
            "silent",
            f"{len(whole)}/{len(heard)} answered, p99 {load.percentile(firsts, 99) if firsts else 0:.0f} ms",
        )

    def crowd(self, name: str, found: Crowd) -> None:
        """Many at once."""
        note = f"{found.whole} of {found.streams} whole; median delay {found.late_median_ms:.1f} ms"
        if found.errors:
            note += f"; {found.errors[0]}"
        self.crowd_rate.add(name, found.tokens_per_s, count=found.streams, note=note)
        self.crowd_late.add(name, found.late_p99_ms)
        if name != DIRECT:
            self.crowd_cpu.add(name, found.cpu_us_per_token)
            self.crowd_memory.add(name, found.memory_kb_per_stream)
        _say(name, "crowd", f"{found.tokens_per_s:,.0f} tokens/s, p99 +{found.late_p99_ms:.0f} ms, {note}")

    def summary(self) -> list[report.Figure]:
        """The figures with their aims."""

        def reached(samples: report.Samples, bound: float, *, name: str = report.OURS) -> bool:
            value = samples.median(name)
            return value is not None and (value <= bound if samples.less_is_better else value >= bound)

        told_ms = self.told_gap.median(report.OURS)
        unbroken_gap_ms = self.told_gap.median("unbroken")
        visible = None if told_ms is None or unbroken_gap_ms is None else told_ms <= unbroken_gap_ms
        both = all(reached(s, b) for s, b in zip((self.gap_median, self.gap_p99), NULL_GAP_MS, strict=True))
        with_model = WITH_MODEL in self.gap_median.values
        model = with_model and all(
            reached(s, b, name=WITH_MODEL) for s, b in zip((self.gap_median, self.gap_p99), MODEL_GAP_MS, strict=True)
        )
        gaps_met = both and (model or not with_model)
        found = [
            self.completed.figure(aim="100 %", met=reached(self.completed, 100)),
            self.same.figure(aim="100 %", met=reached(self.same, 100)),
            self.gap_median.figure(aim="under 50 ms with the null engine, 1 s with the demo model", met=gaps_met),
            self.gap_p99.figure(aim="under 150 ms with the null engine, 2.5 s with the demo model", met=gaps_met),
            self.again.figure(),
            self.told_gap.figure(aim="no more than that of unbroken streams", met=visible),
            self.told_p99.figure(),
            self.told_same.figure(aim="100 %", met=reached(self.told_same, 100)),
            self.answered.figure(aim="100 %", met=reached(self.answered, 100)),
            self.first_p99.figure(),
            self.hedged.figure(aim="at most 5 %", met=reached(self.hedged, 5)),
            self.crowd_rate.figure(),
            self.crowd_late.figure(),
            self.crowd_cpu.figure(),
            self.crowd_memory.figure(),
        ]
        return [figure for figure in found if figure.spread]


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def _say(name: str, scene: str, what: str) -> None:
    print(f"    {name}, {scene}: {what}", flush=True)


async def ours_null(folder: Path, figures: Figures, sizes: Sizes) -> None:
    """Our control plane with null engines: faults, then announced departures."""
    options = ["--slots", "8", "--rate", str(RATE)]
    async with scenes.ours(folder / "faults", MACHINES, options=options) as system:
        await scenes.faults(system, count=8, tokens=TOKENS, at_once=4, kinds=("nothing",))  # what is usual
        trials = await scenes.faults(system, count=sizes.streams, tokens=TOKENS, at_once=2)
        figures.faults(report.OURS, trials)
        quiet = await scenes.faults(system, count=sizes.announced, tokens=TOKENS, at_once=2, kinds=("nothing",))
        gaps = [trial.largest_gap_ms for trial in quiet]
        figures.told_gap.add("unbroken", statistics.median(gaps))
        figures.told_p99.add("unbroken", load.percentile([g * 1e3 for t in quiet for g in t.heard.gaps_s], 99))
        told = await scenes.faults(
            system, count=sizes.announced, tokens=5 * TOKENS, at_once=1, kinds=("announce",), latest=TOKENS
        )
        figures.announced(report.OURS, told)


async def ours_model(folder: Path, figures: Figures, sizes: Sizes) -> None:
    """The same with the demo model: three vehicles with one thread each."""
    path = verify(Catalogue.builtin().get(LLAMA), models_dir(os.environ))
    options = ["--slots", "2", "--model-path", str(path)]
    async with scenes.ours(folder / "model", 3, options=options, model=LLAMA) as system:
        await scenes.faults(system, count=4, tokens=TOKENS, at_once=1, kinds=("nothing",))
        trials = await scenes.faults(system, count=sizes.model_streams, tokens=TOKENS, at_once=1)
        figures.faults(WITH_MODEL, trials)


async def ours_silent(folder: Path, figures: Figures, sizes: Sizes) -> None:
    """Two vehicles, one of which falls silent."""
    async with scenes.ours(folder / "silent", 2, options=["--slots", "16", "--rate", "200"]) as system:
        heard = await scenes.silent(system, count=sizes.silent, tokens=8, at_once=4, limit_s=5)
        figures.silent(report.OURS, heard)


async def ours_crowd(folder: Path, figures: Figures, sizes: Sizes) -> None:
    """Four vehicles in a process, which take everything that comes."""
    rate = 10.0
    options = ["--slots", str(sizes.crowd), "--rate", str(rate)]
    async with scenes.ours(folder / "crowd", 4, options=options, together=4) as system:
        found = await scenes.crowd(
            system.target, [system.pid], streams=sizes.crowd, tokens=sizes.crowd_tokens, rate=rate
        )
        figures.crowd(report.OURS, found)


async def theirs(name: str, folder: Path, figures: Figures, sizes: Sizes) -> None:
    """One other gateway in all scenes that it can play in."""
    place = folder / name.replace(" ", "-")
    start = PEERS[name]
    for scene, count, rate in (("faults", MACHINES, RATE), ("silent", 2, 200.0), ("crowd", 4, 10.0)):
        async with scenes.servers(place / scene, count, rate=rate) as machines:
            urls = [f"http://127.0.0.1:{machine.proxy.port}" for machine in machines]
            context = start(place / scene, urls)
            gateway = await asyncio.to_thread(context.__enter__)
            try:
                pids = product.session(gateway.leader)
                system = Theirs(gateway.target, machines, pids[0])
                if scene == "faults":
                    trials = await scenes.faults(system, count=sizes.peer_streams, tokens=TOKENS, at_once=1)
                    figures.faults(name, trials)
                elif scene == "silent":
                    heard = await scenes.silent(system, count=sizes.peer_silent, tokens=8, at_once=4, limit_s=5)
                    figures.silent(name, heard)
                else:
                    found = await scenes.crowd(
                        gateway.target, pids, streams=sizes.crowd, tokens=sizes.crowd_tokens, rate=rate
                    )
                    figures.crowd(name, found)
            finally:
                await asyncio.to_thread(context.__exit__, None, None, None)


async def direct_crowd(folder: Path, figures: Figures, sizes: Sizes) -> None:
    """The crowd straight at one engine behind HTTP: what the load and the machine alone cost."""
    async with scenes.servers(folder / "direct", 1, rate=10.0) as machines:
        target = load.Target(name=DIRECT, base_url=f"http://127.0.0.1:{machines[0].proxy.port}/v1")
        await Theirs(target, machines, 0).ready()
        found = await scenes.crowd(target, [], streams=sizes.crowd, tokens=sizes.crowd_tokens, rate=10.0)
        figures.crowd(DIRECT, found)


Part = Callable[[Path, Figures, Sizes], Awaitable[None]]
OURS: Final[dict[str, Part]] = {
    report.OURS: ours_null,
    "Motorpool, one silent": ours_silent,
    "Motorpool, a crowd": ours_crowd,
    WITH_MODEL: ours_model,
    DIRECT: direct_crowd,
}


async def measure(folder: Path, figures: Figures, sizes: Sizes, wanted: list[str]) -> None:
    """Every part that is wanted, one after the other."""
    parts: dict[str, Part] = dict(OURS)
    for name in PEERS:
        parts[name] = _peer(name)
    for name, part in parts.items():
        if wanted and not any(word in name.lower() for word in wanted):
            continue
        print(f"==> {name}", flush=True)
        try:
            await part(folder, figures, sizes)
        except (product.ProductError, env.MissingEnvError, OSError, TimeoutError) as error:
            figures.skipped[name] = str(error) or type(error).__name__
            print(f"    {name} failed: {figures.skipped[name]}", flush=True)


def _peer(name: str) -> Part:
    async def part(folder: Path, figures: Figures, sizes: Sizes) -> None:
        await theirs(name, folder, figures, sizes)

    return part


def main() -> None:
    """Run all scenes and write ``results/streams.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few streams, results not kept")
    parser.add_argument("--only", action="append", default=[], help="a part of a system's name; repeatable")
    options = parser.parse_args()
    begun = report.begin()
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.suppress(KeyboardInterrupt):
        wanted = [word.lower() for word in options.only]
        uvloop.run(measure(Path(name), figures, Sizes(quick=options.quick), wanted))
    figures.remarks = figures.remarks[:10]
    report.finish(
        "streams",
        figures.summary(),
        begun=begun,
        keep=not (options.quick or options.only),
        skipped=figures.skipped,
        remarks=figures.remarks,
    )


if __name__ == "__main__":
    main()
