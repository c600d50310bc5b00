"""Writes docs/reference/signals.md: every signal of the guard and the VSS paths that feed it, from the tables.

Run it after changing a table: ``.venv/bin/python tools/signals_reference.py``. A test compares page and tables.
"""

from __future__ import annotations

from pathlib import Path

from motorpool.agent.signals import vss
from motorpool.agent.signals.car import ACTIONS
from motorpool.core.signals import TABLE, Spec

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "signals.md"
HEAD = """# Signals

What the guard knows of the car. This page is written by `tools/signals_reference.py` from the tables in
`core/signals.py`, `agent/signals/vss.py` and `agent/signals/car.py`, and compared with them by a test.

A reading that is older than its greatest age counts like one that never came. Without a signal that is *needed* there
is no permit; one that a model of car *may lack* can be declared absent in the vehicle's profile.

| signal | unit | greatest age | needed | what it says | missing or too old |
| --- | --- | ---: | --- | --- | --- |
"""
SOURCES = """
## Where signals come from

| source | what it is |
| --- | --- |
| `SimulatedCar` | a car with a physical model, for `motorpool dev` and tests; `motorpool car` plays its owner |
| `KuksaSource` | a KUKSA databroker, over gRPC `kuksa.val.v2`; needs `pip install motorpool[vss]` |
| `ReplaySource` | recorded charging sessions at a chosen speed |
| `AlwaysParked` | a car that stands on a live cable for ever, for benchmarks of everything else |

## How old is a value of a databroker?

A databroker sends changes only, and a parked car's door stays shut for days, so the stamp of a value is not its age.
The clock that made the stamp may be wrong, so no stamp is taken for a time. A value is young while two things hold:

1. The broker says that it still has this value. What tells of the owner is pushed; all is asked for again and again
   (every 800 ms what must be young, every 2.4 s the rest), and an answer counts from when it was asked for.
2. The provider behind the broker lives: the value itself was renewed, or a heartbeat was. By default that is
   `Vehicle.Compute.Heartbeat` or `Vehicle.LowVoltageBattery.CurrentVoltage`, whichever the car has: a path whose stamp
   or value goes on changing, at least once a second. A car whose doors, battery and drive have providers of their own
   must name a heartbeat for each (`heartbeats` in `KuksaConfig`, by prefix of the path): otherwise a provider of doors
   that hangs is not noticed while that of the battery lives. The first value after a start proves nothing.

So everything is stale at the latest 3 s after the broker or the provider has fallen silent, and work stops.

A door, a port or a control unit that has never had a value is not part of the car; at least one front door must be.
One that had a value and has none now makes its signal missing. What speaks against work counts as soon as one path
says so. The agent's token needs the scope *read* alone, and the agent has no call that writes.

A location is asked for only where regions are configured, and only the code of the region leaves the module that reads
it. A place near a border, or in two regions, is in none.

## VSS paths

Versions are those of COVESA's specification; *overlay* is our own branch `Vehicle.Compute`, for what it has no path
for. A `*` stands for any name.

| path | type | unit | VSS | feeds | |
| --- | --- | --- | --- | --- | --- |
"""
ACTS = """
## What can happen to a simulated car

| action | what it does |
| --- | --- |
"""


def _age(spec: Spec) -> str:
    return f"{spec.max_age_ms / 1000:g} s"


def _needed(spec: Spec) -> str:
    if not spec.needed:
        return "hint"
    return "yes, may lack" if spec.may_lack else "yes"


def render() -> str:
    """The whole page."""
    signals = "".join(
        f"| `{name}` | {spec.unit} | {_age(spec)} | {_needed(spec)} | {spec.what} | {spec.missing} |\n"
        for name, spec in TABLE.items()
    )
    paths = "".join(
        f"| `{entry.path}` | {entry.kind} | {entry.unit} | {entry.spelling} "
        f"| {', '.join(f'`{name}`' for name in entry.signals)} | {entry.note} |\n"
        for entry in vss.PATHS
    )
    acts = "".join(f"| `{action}` | {text} |\n" for action, text in ACTIONS.items())
    return HEAD + signals + SOURCES + paths + ACTS + acts


if __name__ == "__main__":
    PAGE.write_text(render(), "utf-8")
