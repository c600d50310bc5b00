"""What the cell makes of a fleet: harvest, waste, missed deadlines, speed, memory, and that it is the same every time.

Worlds are seeded and built on real sessions: those that MOTORPOOL_SESSIONS names (folders or files, separated as in
PATH), else those of ``../shared/data``, else made-up ones. Each part says its aim and whether it was reached.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable
from typing import Final, NamedTuple

from bench.env import BENCH, ROOT

SOURCES: Final = (ROOT / "src" / "motorpool" / "core", ROOT / "src" / "motorpool" / "sim", BENCH)


def own_cache() -> str:
    """A place for compiled kernels that is new whenever a source of them is.

    Numba looks at the file of a function only, not at the files of those that it calls: a change in one file would go
    unnoticed in the compiled code of another.
    """
    mark = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted(folder.glob("*.py")):
            text = path.read_bytes()
            if b"@kernel" in text:
                mark.update(path.name.encode() + text)
    return str(BENCH / ".work" / f"numba-{mark.hexdigest()[:16]}")


os.environ.setdefault("NUMBA_CACHE_DIR", own_cache())  # before anything imports numba; children inherit it

import msgspec  # noqa: E402

from bench import (  # noqa: E402
    cell_full,
    cell_harvest,
    cell_outlook,
    cell_recovery,
    cell_same,
    cell_speed,
    cell_updates,
    report,
)
from bench.cell_bench import QUICK, RAW, Bench, NotMeasuredError, Size, progress  # noqa: E402
from bench.cell_worlds import VARIABLE, recordings  # noqa: E402

PICTURES: Final = ROOT / "docs" / "images"


class Part(NamedTuple):
    """One part of the benchmark."""

    key: str
    title: str
    steps: Callable[[Size], int]
    measure: Callable[[Bench], list[report.Figure]]


PARTS: Final = (
    Part("same", "The same to the last bit", cell_same.same_steps, cell_same.same),
    Part("harvest", "Harvest, waste, missed deadlines", cell_harvest.harvest_steps, cell_harvest.harvest),
    Part("ablations", "What each part is worth", cell_harvest.ablation_steps, cell_harvest.ablations),
    Part("placements", "Placements", cell_speed.placement_steps, cell_speed.placements),
    Part("memory", "Memory a vehicle", cell_speed.memory_steps, cell_speed.memory),
    Part("recovery", "Start from the books", cell_recovery.recovery_steps, cell_recovery.recovered),
    Part("updates", "Vehicle updates", cell_updates.update_steps, cell_updates.updates),
    Part("growth", "Growth", cell_speed.growth_steps, cell_speed.growth),
    Part("week", "A week of a million vehicles", cell_same.week_steps, cell_same.week),
    Part("full", "The full gear", cell_full.full_steps, cell_full.full),
    Part("stays", "How long cars stay", cell_outlook.stay_steps, cell_outlook.stays),
    Part("energy", "Cheaper hours", cell_outlook.energy_steps, cell_outlook.energy),
)


def measure(bench: Bench, parts: list[Part]) -> list[report.Figure]:
    """All figures. A part that fails is skipped by name, and the run is then not kept."""
    figures: list[report.Figure] = []
    for part in parts:
        bench.say(f"==> {part.title}")
        try:
            found = part.measure(bench)
        except NotMeasuredError as error:
            bench.skipped[f"{report.OURS}, {part.key}"] = str(error)
            continue
        figures += found
        for figure in found:
            if figure.aim:
                value = "-" if figure.ours is None else report.number(figure.ours)
                bench.say(f"    {figure.name}: {value} {figure.unit}. {report.verdict(figure)}")
    return figures


def draw(bench: Bench, *, keep: bool) -> None:
    """Keep what was found, and draw it."""
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_bytes(msgspec.json.encode(bench.raw))
    try:
        from bench import cell_plot  # noqa: PLC0415  # matplotlib is an extra
    except ImportError:
        print("==> No pictures: matplotlib is not installed (the extra `plots`)", flush=True)
        return
    folder = PICTURES if keep else RAW.parent
    for name, picture in cell_plot.pictures(bench.raw).items():
        path = folder / f"cell_{name}.svg"
        path.write_bytes(picture)
        print(f"==> {path.relative_to(ROOT)}", flush=True)
        if keep:
            bench.remarks.append(f"![{cell_plot.CAPTIONS[name]}](images/{path.name})")


def main() -> None:
    """Run the parts, draw them, and write ``results/cell.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: small worlds, results not kept")
    parser.add_argument(
        "--only",
        action="append",
        choices=[part.key for part in PARTS],
        help="a part; its figures take the place of the old ones",
    )
    parser.add_argument("--vehicles", type=int, help="in the worlds of harvest and ablations")
    parser.add_argument("--seeds", type=int, help="how many worlds of each scenario")
    options = parser.parse_args()
    size = QUICK if options.quick else Size()
    changed = {name: value for name in ("vehicles", "seeds") if (value := getattr(options, name)) is not None}
    size = msgspec.structs.replace(size, **changed)
    parts = [part for part in PARTS if not options.only or part.key in options.only]
    keep = not options.quick and not changed
    begun = report.begin()
    with progress() as bar:
        bench = Bench(size, bar, sum(part.steps(size) for part in parts))
        if not recordings():
            bench.remarks.append(f"Made-up sessions: there are no recorded ones here, and {VARIABLE} names none.")
        figures = measure(bench, parts)
    draw(bench, keep=keep)
    if recordings():
        bench.remarks.append(f"Sessions: {bench.people.source}; {len(bench.people)} users or plugs.")
    report.finish(
        "cell", figures, begun=begun, keep=keep, skipped=bench.skipped, remarks=bench.remarks, part=bool(options.only)
    )


if __name__ == "__main__":
    main()
