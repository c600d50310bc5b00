"""Puts the headline figures of ``bench/results`` into the README, so that they are the measured ones.

Called by: ``make bench...`` after the tables of the docs are renewed, and, to compare, by the tests.
"""

from __future__ import annotations

import msgspec

from bench.env import ROOT
from bench.report import OURS, RESULTS, Figure, Results, number

README = ROOT / "README.md"
# Of the many figures of these benchmarks some stand in the README; the others are in the docs.
SHOWN = {
    "yield": (
        "Door opened until every thread",
        "The same, while other programs",
        "The same, with the message server",
        "Processor time of the engine",
        "Cable pulled",
        "Agent killed",
        "Agent stopped",
    ),
    "streams": (
        "Streams completed",
        "Streams with the bytes",
        "Longest pause of a stream with a fault",
        "Answered while one",
        "Requests asked for twice",
    ),
    "cell": (
        "Harvest against",
        "Compute wasted, mixed",
        "Jobs past their deadline, mixed",
        "Jobs past their deadline, morning",
        "Jobs past their deadline, overload",
        "Placements a second on",
        "Memory a vehicle",
    ),
}
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def line(figure: Figure, command: str) -> str:
    """One row of the table: ours, the best of the others, the aim."""
    ordered = sorted(figure.peers.items(), key=lambda peer: peer[1] or 0, reverse=not figure.less_is_better)
    others = ", ".join(f"{name} {number(value)}" for name, value in ordered if value is not None)
    reached = {True: "reached", False: "not reached", None: ""}[figure.met]
    ours = number(figure.ours) if figure.ours is not None else "-"
    note = figure.notes.get(OURS, "").partition(";")[0]
    ours += f" ({note})" if note.startswith("p99 ") else ""
    aim = f"{figure.aim}: {reached}" if figure.aim else ""
    return f"| {figure.name}, {figure.unit} | {ours} | {others} | {aim} | `{command}` |"


def table() -> str:
    """The whole block of the README."""
    rows = ["| figure | Motorpool | others, same run | aim | command |", "| --- | ---: | --- | --- | --- |"]
    dates = set()
    for name in ("batch", "gateway", "yield", "streams", "cell"):
        if not (RESULTS / f"{name}.json").exists():
            continue
        results = msgspec.json.decode((RESULTS / f"{name}.json").read_bytes(), type=Results)
        dates.add(f"{results.date} on {results.machine}")
        shown = [figure for figure in results.figures if figure.aim and figure.name.startswith(SHOWN.get(name, ""))]
        rows += [line(figure, f"make bench-{name}") for figure in shown]
    measured = f"Medians, measured {' and '.join(sorted(dates))}; [the whole tables](docs/benchmarks.md)."
    return "\n".join([*rows, "", measured])


def fill(text: str) -> str:
    """The README with the block renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def write() -> None:
    """Renew the README."""
    README.write_text(fill(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    write()
