"""The people of a simulated fleet: when real users plugged in and out, and what their cars would have foretold.

Decides: which part of a user's time a vehicle has learnt from (the first 70 %) and which part is lived again in a
simulation (the rest), and what the vehicle would report of itself then: ``core.departures``, the code of the product,
lives through the first part. Must not: use anything of the second part for that, or draw anything.
Called by: ``sim.world``, ``sim.generator`` (which makes up sessions instead of reading them), the command line.

Times are local and counted in milliseconds. Tables by hour of the week begin on Monday at 00:00.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from motorpool.agent.signals.sessions import Session
from motorpool.core.departures import (
    DAY_MS,
    EPOCH_WEEKDAY,
    HOUR_MS,
    MAX_GAP_MS,
    MINUTE_MS,
    RISK_MS,
    ROUND_MS,
    WEEK_HOURS,
    Fleet,
    Habits,
)
from motorpool.core.departures_fleet import NORWAY_HOME
from motorpool.errors import SetupError
from motorpool.sim.recordings import BOULDER_SOURCE, Recording
from motorpool.sim.recordings import load as load_recording

WEEK_MS: Final = 7 * DAY_MS
TRAIN_PART: Final = 0.7
TRAIN_MS: Final = 40 * WEEK_MS  # of the first part, the newest: five half-lives of what a vehicle remembers
MIN_LEARNT: Final = 10  # stays; a user with fewer says little about a fleet whose cars know their week
MIN_WEEKS: Final = 2  # whole ones that are left to be lived again
FLOOR_PCT: Final = 35.0  # the owner's floor, and the margin above it from which the guard allows work
SHARED_MARK: Final = "Share"  # in the names of users of shared chargers in the Norwegian files
HOME, SHARED, WORK = 0, 1, 2
KINDS: Final = ("home", "shared", "work")

I64: TypeAlias = NDArray[np.int64]
I32: TypeAlias = NDArray[np.int32]
U16: TypeAlias = NDArray[np.uint16]
U8: TypeAlias = NDArray[np.uint8]


class Stay(NamedTuple):
    """One stay at a charger, local time; for ``wait_ms`` the battery is below its floor and only charges."""

    begin_ms: int
    end_ms: int
    wait_ms: int = 0


COLUMNS: Final = ("kind", "first", "start_ms", "end_ms", "wait_ms", "weeks", "stay_bound_min", "risk_pct")


class People(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Users in columns. The stays of user ``u`` are ``first[u]`` to ``first[u + 1]``, in order and apart.

    ``start_ms`` and ``end_ms`` are counted from the first Monday of the part that is lived again, of which ``weeks``
    whole ones are there. ``stay_bound_min[u, hour]`` and ``risk_pct[u, hour]`` are what the vehicle would report at the
    beginning of that hour of the week if it stood plugged in: with 90 % probability it stays so long, and the
    probability that it is gone within 15 minutes.
    """

    kind: U8
    first: I64
    start_ms: I64
    end_ms: I64
    wait_ms: I32
    weeks: I32
    stay_bound_min: U16
    risk_pct: U8
    source: str

    def __len__(self) -> int:
        return len(self.kind)

    def of_kind(self, kind: int) -> I64:
        """The users of a kind."""
        return np.flatnonzero(self.kind == kind).astype(np.int64)


def read(paths: Sequence[Path]) -> People:
    """The people of recordings: folders or files as ``sim.recordings`` takes them. Raises SetupError."""
    return of_recordings([load_recording(path) for path in paths])


def of_recordings(recordings: Iterable[Recording]) -> People:
    """The people of recordings that were read already. Raises SetupError if nobody's time is long enough."""
    parts = []
    sources = []
    for recording in recordings:
        at_work = recording.source == BOULDER_SOURCE
        stays = _local_stays(recording)
        by_kind: dict[int, dict[str, list[Stay]]] = {}
        for user, rows in stays.items():
            kind = WORK if at_work else SHARED if SHARED_MARK in user else HOME
            lanes = _lanes(rows) if at_work else [_apart(rows)]
            for lane, apart in enumerate(lanes):
                by_kind.setdefault(kind, {})[f"{user}#{lane}"] = apart
        parts += [learn(found, kind, recording.source) for kind, found in sorted(by_kind.items())]
        sources.append(recording.source)
    return join(parts, "; ".join(sources))


def learn(stays: Mapping[str, Sequence[Stay]], kind: int, source: str, fleet: Fleet = NORWAY_HOME) -> People:
    """People of one kind: each user's vehicle lives through the first part of its stays, the rest is kept.

    ``stays`` are in order and apart. Users with too little of either part are left out.
    """
    first, weeks, bounds, risks = [0], [], [], []
    kept: list[Stay] = []
    for _, rows in sorted(stays.items()):
        cut_ms = rows[0].begin_ms + TRAIN_PART * (rows[-1].end_ms - rows[0].begin_ms) if rows else 0
        learnt = [row for row in rows if cut_ms - TRAIN_MS <= row.begin_ms and row.end_ms <= cut_ms]
        monday_ms = _monday_after(int(cut_ms))
        whole = (rows[-1].end_ms - monday_ms) // WEEK_MS if rows else 0
        if len(learnt) < MIN_LEARNT or whole < MIN_WEEKS:
            continue
        bound, risk = outlook(live_through(learnt, fleet))
        bounds.append(bound)
        risks.append(risk)
        weeks.append(whole)
        kept += [
            Stay(max(0, row.begin_ms - monday_ms), min(row.end_ms - monday_ms, whole * WEEK_MS), row.wait_ms)
            for row in rows
            if row.end_ms > monday_ms and row.begin_ms < monday_ms + whole * WEEK_MS
        ]
        first.append(len(kept))
    users = len(weeks)
    return People(
        kind=np.full(users, kind, np.uint8),
        first=np.array(first, np.int64),
        start_ms=np.array([row.begin_ms for row in kept], np.int64),
        end_ms=np.array([row.end_ms for row in kept], np.int64),
        wait_ms=np.array([row.wait_ms for row in kept], np.int32),
        weeks=np.array(weeks, np.int32),
        stay_bound_min=np.array(bounds, np.uint16).reshape(users, WEEK_HOURS),
        risk_pct=np.array(risks, np.uint8).reshape(users, WEEK_HOURS),
        source=source,
    )


def join(parts: Sequence[People], source: str) -> People:
    """All of them together. Raises SetupError if that is nobody."""
    if not any(len(part) for part in parts):
        text = f"no user has {MIN_LEARNT} stays to learn from and {MIN_WEEKS} weeks after them: name more sessions"
        raise SetupError(text, code="no_sessions")
    ends = np.concatenate([[0], np.cumsum([part.first[-1] for part in parts])])
    return People(
        kind=np.concatenate([part.kind for part in parts]),
        first=np.concatenate([[0], *(part.first[1:] + end for part, end in zip(parts, ends, strict=False))]),
        start_ms=np.concatenate([part.start_ms for part in parts]),
        end_ms=np.concatenate([part.end_ms for part in parts]),
        wait_ms=np.concatenate([part.wait_ms for part in parts]),
        weeks=np.concatenate([part.weeks for part in parts]),
        stay_bound_min=np.concatenate([part.stay_bound_min for part in parts]),
        risk_pct=np.concatenate([part.risk_pct for part in parts]),
        source=source,
    )


def save(people: People, path: Path) -> None:
    """Keep people in a file (numpy's npz), because making their vehicles learn takes a while."""
    columns = {name: getattr(people, name) for name in COLUMNS}
    with path.open("wb") as file:
        np.savez_compressed(file, source=np.array(people.source), **columns)


def load(path: Path) -> People:
    """People that ``save`` wrote. Raises SetupError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return People(**{name: kept[name] for name in COLUMNS}, source=str(kept["source"]))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        text = f"cannot read {path.name}: {type(error).__name__}; make it again from the sessions"
        raise SetupError(text, code="bad_people_file") from error


def live_through(stays: Iterable[Stay], fleet: Fleet) -> Habits:
    """The habits of a vehicle that has lived through these stays, told every half hour that it is plugged in."""
    habits = Habits(fleet)
    for begin_ms, end_ms, _ in stays:
        habits.advance(False, begin_ms - 1, 0)
        habits.advance(True, begin_ms, 0)
        for at_ms in range(begin_ms + MAX_GAP_MS, end_ms, MAX_GAP_MS):
            habits.advance(True, at_ms, 0)
        habits.advance(False, end_ms, 0)
    return habits


def outlook(habits: Habits) -> tuple[list[int], list[int]]:
    """What it would report at the beginning of each hour of the week: minutes and per cent, as coarse as it would."""
    monday_ms = (7 - EPOCH_WEEKDAY) * DAY_MS
    hours = range(monday_ms, monday_ms + WEEK_MS, HOUR_MS)
    bounds = [habits.bound_ms(at_ms, 0) // ROUND_MS * (ROUND_MS // MINUTE_MS) for at_ms in hours]
    return bounds, [round(100 * habits.risk(at_ms, 0, RISK_MS)) for at_ms in hours]


def _monday_after(local_ms: int) -> int:
    """The first Monday 00:00 that is not before."""
    shift_ms = EPOCH_WEEKDAY * DAY_MS
    return -(-(local_ms + shift_ms) // WEEK_MS) * WEEK_MS - shift_ms


def _local_stays(recording: Recording) -> dict[str, list[Stay]]:
    """Each user's stays in local time. A stay over a change of clocks is an hour shorter or longer than it was."""
    zone = recording.zone
    offsets: dict[int, int] = {}  # of each hour: both zones change their clocks at full hours

    def local(at_ms: int) -> int:
        hour = at_ms // HOUR_MS
        if hour not in offsets:
            moment = datetime.fromtimestamp(hour * 3600, zone)
            offset = moment.utcoffset()
            assert offset is not None
            offsets[hour] = int(offset.total_seconds()) * 1000
        return at_ms + offsets[hour]

    stays: dict[str, list[Stay]] = {}
    for session in recording.sessions:
        begin_ms, end_ms = local(session.plug_in_ms), local(session.plug_out_ms)
        if end_ms > begin_ms:
            stays.setdefault(session.user, []).append(Stay(begin_ms, end_ms, _wait_ms(session)))
    return stays


def _wait_ms(session: Session) -> int:
    """How long it charges up to the floor, where the recording knows charge, charger and battery."""
    soc_pct, charger_w, capacity_wh = session.soc_start_pct, session.charger_w, session.capacity_wh
    if soc_pct is None or not charger_w or not capacity_wh or soc_pct >= FLOOR_PCT:
        return 0
    return min(int((FLOOR_PCT - soc_pct) / 100.0 * capacity_wh / charger_w * HOUR_MS), DAY_MS)


def _apart(rows: Iterable[Stay]) -> list[Stay]:
    """Without overlaps: a stay begins when the one before it has ended."""
    apart: list[Stay] = []
    for row in sorted(rows):
        begin_ms = max(row.begin_ms, apart[-1].end_ms) if apart else row.begin_ms
        if row.end_ms > begin_ms:
            apart.append(row._replace(begin_ms=begin_ms))
    return apart


def _lanes(rows: Iterable[Stay]) -> list[list[Stay]]:
    """The stays at a station with several plugs, one list a plug: each stay takes the first plug that is free."""
    lanes: list[list[Stay]] = []
    for row in sorted(rows):
        lane = next((lane for lane in lanes if lane[-1].end_ms <= row.begin_ms), None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(row)
    return lanes
