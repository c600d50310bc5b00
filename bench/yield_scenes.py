"""What the yield benchmark measures: its scenes, their aims, and how trials become figures.

Called by: ``bench.run_yield`` and ``bench.yield_plot``. Must not: start anything.
"""

from __future__ import annotations

import math

import msgspec

from bench import report

AFTER_S = 0.3  # for which a stopped engine is watched
MAX_AGE_MS = 2_000  # of a signal that shows the owner
MANY = 100  # trials: of fewer, p99 would be the highest
LOOK_MS = 250  # from one look of the guard to the next


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """One way to make the engine stop. ``key`` names it in the raw trials, ``label`` in the picture."""

    key: str
    name: str
    label: str
    aim_ms: int
    kind: str  # what ends the time, which the picture groups by


STANDS, FREED, ALONE, STALE = "stands", "freed", "alone", "stale"
DOOR, BUSY, CUT, DEAD, FLOOD, PUSHED = "door", "busy", "cut", "dead", "flood", "pushed"
SILENT, GONE, KILLED, HANGS, AFTER = "silent", "gone", "killed", "hangs", "after"
AIM_STOP_MS, AIM_GONE_MS, AIM_ALONE_MS = 200, 2_000, 1_000
SCENES = (
    Scene(
        key=DOOR,
        name="Door opened until every thread of the engine is stopped",
        label="door opened",
        aim_ms=AIM_STOP_MS,
        kind=STANDS,
    ),
    Scene(
        key=BUSY,
        name="The same, while other programs keep every core busy",
        label="other programs on every core",
        aim_ms=AIM_STOP_MS,
        kind=STANDS,
    ),
    Scene(
        key=CUT,
        name="The same, with the message server stopped: no network",
        label="network cut",
        aim_ms=AIM_STOP_MS,
        kind=STANDS,
    ),
    Scene(
        key=DEAD,
        name="The same, with the control plane stopped",
        label="control plane dead",
        aim_ms=AIM_STOP_MS,
        kind=STANDS,
    ),
    Scene(
        key=FLOOD,
        name="The same, while a flood of messages keeps the agent's own loop busy",
        label="agent's own loop flooded",
        aim_ms=AIM_STOP_MS,
        kind=STANDS,
    ),
    Scene(
        key=PUSHED,
        name="The same in a car that is heard through a databroker (gRPC), its engine at idle priority",
        label="heard through a databroker",
        aim_ms=AIM_STOP_MS,
        kind=STANDS,
    ),
    Scene(
        key=GONE,
        name="Cable pulled until the engine's process is gone, and its memory with it",
        label="cable pulled: memory is free",
        aim_ms=AIM_GONE_MS,
        kind=FREED,
    ),
    Scene(
        key=KILLED,
        name="Agent killed until the engine's process is gone",
        label="agent killed: engine is gone",
        aim_ms=AIM_ALONE_MS,
        kind=ALONE,
    ),
    Scene(
        key=HANGS,
        name="Agent stopped (it hangs) until the engine's process is gone",
        label="agent hangs: engine is gone",
        aim_ms=AIM_ALONE_MS,
        kind=ALONE,
    ),
    Scene(
        key=SILENT,
        name="Databroker stopped until every thread of the engine is stopped, its signals having grown too old",
        label="databroker dead: signals grow stale",
        aim_ms=MAX_AGE_MS + LOOK_MS,
        kind=STALE,
    ),
)
AFTER_NAME = f"Processor time of the engine in the {AFTER_S * 1000:.0f} ms after it was stopped"
NOT_MEASURED = {
    "BOINC, as its source documents": (
        "the client looks once a second whether its user is there (POLL_INTERVAL in client/client_state.h)"
    ),
    "HTCondor, as its manual documents": (
        "the start daemon looks every 5 s (POLLING_INTERVAL); a job that has to leave gets 600 s "
        "(MachineMaxVacateTime) and then 30 s (KILLING_TIMEOUT) before it is killed"
    ),
}


class Trials:
    """Milliseconds of every trial, by the key of its scene, and what a reader should know of a scene."""

    def __init__(self, values: dict[str, list[float]] | None = None) -> None:
        self.values = values or {}
        self.notes: dict[str, str] = {}

    def add(self, key: str, value: float) -> None:
        """One trial."""
        self.values.setdefault(key, []).append(value)

    def figures(self) -> list[report.Figure]:
        """One for each scene: the median, with p99 in the notes, which is what the aim speaks of."""
        made = []
        for scene in SCENES:
            if values := self.values.get(scene.key):
                reached = percentile(values, 0.99) < scene.aim_ms
                what = "p99" if len(values) >= MANY else "every time"
                samples = self._samples(scene.key, scene.name)
                made.append(samples.figure(aim=f"{what} under {scene.aim_ms:,} ms", met=reached))
        if after := self.values.get(AFTER):
            made.append(self._samples(AFTER, AFTER_NAME).figure(aim="none", met=max(after) == 0))
        return made

    def _samples(self, key: str, name: str) -> report.Samples:
        samples = report.Samples(name, "ms", less_is_better=True)
        samples.values[report.OURS] = values = self.values[key]
        notes = [f"p99 {report.number(percentile(values, 0.99))}"] if len(values) >= MANY and key != AFTER else []
        notes += [self.notes[key]] if key in self.notes else []
        if notes:
            samples.notes[report.OURS] = "; ".join(notes)
        return samples


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
