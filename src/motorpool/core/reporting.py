"""Reports of many vehicles at once: the same as one after the other, at a fraction of the time.

Theory. A report is nearly always news of nothing but itself: a vehicle that is known says again, or a little otherwise,
how it is. ``report_many`` writes such rows of a sheet into the table, in their order, and stops at the first that needs
more: one whose words the scheduler has to weigh (a vehicle that was silent, that is in another region, at a site that
would be over its limit, whose leases are not as they should be), of which it has written nothing, or one that can be
given work, of which it has written all. Then the scheduler does for this one row what it does for a single report, and
the kernel goes on behind it. So a sheet and its reports one by one give the same tables and the same commands.

A row says what its vehicle holds as a count and the sum of its leases' marks. The kernel knows marks of leases that the
scheduler has looked at once; when the sum is not that of the cell's leases, the list that the vehicle sent last in full
is taken. A row of which the cell lacks something (the vehicle's number, its incarnation, such a list) is not applied:
its number is ``wanted``, as if the report had been lost on its way.

Called by: ``core.scheduler``. Must not: create vehicles but by a report in full, which was checked for who may send it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.core import events as ev
from motorpool.core import kernels
from motorpool.core.cell import MAX_REASON_SETS, Cell
from motorpool.core.columns import (
    AWAY,
    DRAWING,
    MAX_SEQ,
    NONE,
    NOT_MISSING,
    OFFLINE,
    SEEN,
    WITHDRAWN,
    Ints,
    Records,
    Tables,
)
from motorpool.core.fleet import STATES, incarnation, reasons_of
from motorpool.core.jit import compiled, kernel
from motorpool.core.kernels import OK, PAUSED, QUEUE_FULL, pull, report, why_not
from motorpool.core.sheets import NO_MODEL, NOT_KNOWN, ROW, Rows, Sheet, Whole, mark, mark_of
from motorpool.types import Reason
from motorpool.wire import State

Commands = list[ev.Command]

MAX_MINUTES: Final = 0xFFFE
MAX_WIDE: Final = 0xFFFF
NEW_NAME: Final = -2  # a model or region that the cell has no row for
# Why the kernel stops.
ALONE: Final = 1
HUNGRY: Final = 2
# What is to be said of a row, as bits beside its place.
NOTE: Final = 1
NEWS: Final = 2
SAID_BITS: Final = 2
MARK: Final = np.dtype([("number", np.int64), ("mark", np.int64)])  # of a lease's row: which lease, and its mark


@kernel
def report_many(  # noqa: PLR0917 - a kernel takes no keyword arguments
    t: Tables, rows: Rows, first: int, last: int, now_ms: int, mood: Ints, marks: Records, out: Ints, said: Ints
) -> int:
    """Apply rows from ``first`` on; the place of the one that needs more than this, or ``last``.

    ``mood``: whether there are jobs, whether the plan is old, whether it lacks a job, whether a job is at its tail.
    ``out[0]``: why it stopped, ``out[1]``: how many entries are in ``said``, ``out[2]``: how many rows were applied.
    """
    out[0] = OK
    out[1] = 0
    out[2] = 0
    for place in range(first, last):
        v = int(rows["row"][place])
        if v == NONE or _is_alone(t, v, rows, place, marks):
            out[0] = ALONE
            return place
        if min(int(rows["seq"][place]), MAX_SEQ) <= int(t.vehicles["seq"][v]):
            continue  # older, or repeated
        entry = _apply(t, v, rows, place, now_ms)
        if entry != 0:
            said[int(out[1])] = (place << SAID_BITS) + entry
            out[1] = int(out[1]) + 1
        taken = int(out[2]) + 1
        hungry = int(mood[0]) != 0 and _is_hungry(t, v, now_ms, mood, out)
        out[2] = taken
        if hungry:
            out[0] = HUNGRY
            return place
    out[0] = OK
    return last


@kernel
def _is_alone(t: Tables, v: int, rows: Rows, place: int, marks: Records) -> bool:
    """Whether the scheduler has to weigh this report itself; nothing of it is written then."""
    vehicles = t.vehicles
    if int(vehicles["flags"][v]) & (OFFLINE | WITHDRAWN) != 0 or int(vehicles["state"][v]) == AWAY:
        return True
    if vehicles["incarnation"][v] != rows["incarnation"][place]:
        return True
    if min(int(rows["seq"][place]), MAX_SEQ) <= int(vehicles["seq"][v]):
        return False
    if int(rows["its_region"][place]) != int(vehicles["region"][v]):
        return True
    if int(rows["its_model"][place]) == NEW_NAME or int(rows["its_reasons"][place]) == NEW_NAME:
        return True
    if _overloads(t, v, min(int(rows["permit_w"][place]), MAX_WIDE)):
        return True
    return not _agreed(t, v, rows, place, marks)


@kernel
def _overloads(t: Tables, v: int, permit_w: int) -> bool:
    """Whether the site of a vehicle is over its limit with such a permit."""
    vehicles, sites = t.vehicles, t.sites
    site = int(vehicles["site"][v])
    if site == 0:
        return False
    used_w, limit_w = int(sites["used_w"][site]), int(sites["limit_w"][site])
    if int(vehicles["flags"][v]) & DRAWING != 0:
        used_w += permit_w - int(vehicles["permit_w"][v])
    limit = int(sites["limit_vehicles"][site])
    return 0 < limit_w < used_w or 0 < limit < int(sites["working"][site])


@kernel
def _agreed(t: Tables, v: int, rows: Rows, place: int, marks: Records) -> bool:
    """Whether a vehicle holds just what it has by the cell's tables, and has said so before."""
    leases = t.leases
    row = int(t.vehicles["lease"][v])
    count, total = 0, 0
    while row != NONE:
        if int(leases["flags"][row]) & SEEN == 0 or int(leases["missing_after_ms"][row]) != NOT_MISSING:
            return False
        if int(marks["number"][row]) != int(leases["number"][row]):
            return False
        count += 1
        total += int(marks["mark"][row])
        row = int(leases["next"][row])
    return count == int(rows["held"][place]) and total == int(rows["held_mark"][place])


@kernel
def _apply(t: Tables, v: int, rows: Rows, place: int, now_ms: int) -> int:
    """Write one report; what is to be said of it."""
    vehicles = t.vehicles
    state, reasons = int(rows["state"][place]), int(rows["its_reasons"][place])
    risk = int(rows["risk_pct"][place])
    other = int(vehicles["state"][v]) != state or int(vehicles["reasons"][v]) != reasons
    vehicles["seq"][v] = min(int(rows["seq"][place]), MAX_SEQ)
    vehicles["reasons"][v] = reasons
    vehicles["stay_min"][v] = min(int(rows["stay_min"][place]), MAX_MINUTES)
    vehicles["risk_pct"][v] = 0 if risk == NOT_KNOWN else risk
    region, slots = int(rows["its_region"][place]), max(1, int(rows["slots"][place]))
    permit_w = min(int(rows["permit_w"][place]), MAX_WIDE)
    report(t, v, state, int(rows["its_model"][place]), region, slots, permit_w, now_ms)
    entry = NOTE if other else 0
    return entry + NEWS if why_not(t, v, now_ms) == PAUSED else entry


@kernel
def _is_hungry(t: Tables, v: int, now_ms: int, mood: Ints, out: Ints) -> bool:
    """Whether the scheduler would do something for a vehicle that has just reported. Changes ``out[0]`` alone."""
    if why_not(t, v, now_ms) != OK:
        return False
    if int(mood[1]) != 0:
        return True
    outstanding = int(t.vehicles["outstanding"][v])
    if int(t.vehicles["narrowed"][v]) != 0 and outstanding > 0:
        return False
    said = int(out[1])
    j = pull(t, v, now_ms, out)
    why = int(out[1])
    out[1] = said
    if j != NONE or (int(mood[2]) != 0 and why != QUEUE_FULL):
        return True
    return int(mood[3]) != 0 and outstanding == 0


def in_words(state: int, reasons: int) -> str:
    """What a vehicle does and, when it may not work, why: from the numbers of its row."""
    known = STATES[state]
    why = ", ".join(code.value for code in reasons_of(reasons))
    return ("offline" if known is None else known.value) + (f": {why}" if why else "")


def as_reported(cell: Cell, vehicle_id: str, state: State) -> State:
    """The last State that came in full, with what the vehicle has said in columns since."""
    v = cell.find(vehicle_id)
    if v == NONE or state.incarnation != incarnation(cell, v):
        return state
    row = cell.t.vehicles[v]
    if int(row["seq"]) <= state.seq:
        return state
    now, model = STATES[int(row["state"])], int(row["model"])
    details = {reason.code: reason for reason in state.reasons}
    stay_min, risk_pct = int(row["stay_min"]), int(row["risk_pct"])
    return msgspec.structs.replace(
        state,
        seq=int(row["seq"]),
        state=state.state if now is None else now,
        region=cell.region_name(int(row["region"])),
        permit_w=int(row["permit_w"]),
        reasons=[details.get(code, Reason(code=code)) for code in reasons_of(cell.reason_sets[int(row["reasons"])])],
        model=None if model == NONE else cell.model_names[model],
        slots=int(row["slots"]),
        stay_bound_ms=stay_min * 60_000 if stay_min else None,
        risk_15min=None if state.risk_15min is None and not risk_pct else risk_pct / 100,
    )


class Ground(NamedTuple):
    """What the scheduler does for one vehicle."""

    single: Callable[[ev.VehicleReported, int], Commands]
    fill: Callable[[int, int], Commands]
    lease_id: Callable[[int], str]
    mood: Callable[[int], Ints]


class _Feed:
    """One run of a relay: the rows behind its numbers."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows: npt.NDArray[np.int32] = np.full(1, NONE, np.int32)

    def room_for(self, most: int) -> None:
        """Numbers up to ``most`` have a place."""
        if most >= len(self.rows):
            more = np.full(max(most + 1, len(self.rows) * 3 // 2) - len(self.rows), NONE, np.int32)
            self.rows = np.concatenate((self.rows, more))


class _Turn:
    """One sheet on its way into the tables."""

    def __init__(self, feed: _Feed, relay: str, sheet: Sheet, now_ms: int) -> None:
        self.feed = feed
        self.relay = relay
        self.sheet = sheet
        self.now_ms = now_ms
        self.rows: Rows = sheet.rows.copy()
        self.said: Ints = np.zeros(len(self.rows), np.int64)
        self.taken = 0
        self.wanted: list[int] = []


class Feeds:
    """What relays have said, and how their sheets become reports."""

    def __init__(self, cell: Cell, ground: Ground) -> None:
        self._cell = cell
        self._ground = ground
        self._k: Any = compiled(sys.modules[__name__]) if cell.k is not kernels else sys.modules[__name__]
        self._feeds: dict[str, _Feed] = {}
        self._held: dict[int, tuple[int, tuple[str, ...]]] = {}  # what a vehicle said in full that it holds; its mark
        self._marks: Records = np.full(1, NONE, MARK)
        self._out: Ints = np.zeros(3, np.int64)

    def warm(self) -> None:
        """Compile what a sheet needs, if it is compiled at all: the first one would wait for it half a minute."""
        nothing = np.zeros(0, np.int64)
        self._k.report_many(
            self._cell.t, np.zeros(0, ROW), 0, 0, 0, np.zeros(4, np.int64), self._marks, self._out, nothing
        )

    def end(self, event: ev.FeedEnded, now_ms: int) -> Commands:
        """A relay's numbers mean nothing any more."""
        del now_ms
        self._feeds.pop(event.relay, None)
        return []

    def take(self, event: ev.SheetArrived, now_ms: int) -> Commands:
        """Apply a sheet as its reports one by one."""
        sheet = event.sheet
        feed = self._feeds.get(event.relay)
        if feed is None or feed.number != sheet.feed:
            feed = self._feeds[event.relay] = _Feed(sheet.feed)
        numbers = sheet.rows["vehicle"]
        most = max((whole.number for whole in sheet.tail.whole), default=0)
        feed.room_for(max(most, int(numbers.max()) if len(numbers) else 0))
        turn = _Turn(feed, event.relay, sheet, now_ms)
        commands: Commands = []
        first = 0
        for whole in sheet.tail.whole:
            commands += self._take_rows(turn, first, whole.at)
            commands += self._take_whole(turn, whole)
            first = whole.at
        commands += self._take_rows(turn, first, len(turn.rows))
        commands.append(self._answer(turn, event.refused))
        return commands

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _take_rows(self, turn: _Turn, first: int, last: int) -> Commands:
        commands: Commands = []
        if first == last:
            return commands
        names = self._find_names(turn, first, last)
        while first < last:
            self._room_for_marks()
            mood, out = self._ground.mood(turn.now_ms), self._out
            at = int(
                self._k.report_many(
                    self._cell.t, turn.rows, first, last, turn.now_ms, mood, self._marks, out, turn.said
                )
            )
            why, said = int(out[0]), int(out[1])
            turn.taken += int(out[2])
            commands += self._say(turn, said)
            if at == last:
                break
            first = at + 1
            if why == HUNGRY:
                commands += self._ground.fill(int(turn.rows["row"][at]), turn.now_ms)
                continue
            commands += self._take_alone(turn, at)
            if names[2] == NONE or names != self._names(turn):  # a name has got a number, or lost it to another
                names = self._find_names(turn, first, last)
        return commands

    def _names(self, turn: _Turn) -> tuple[list[int], list[int], int]:
        """The cell's rows of the models and regions that a sheet names."""
        cell = self._cell
        known = {name: row for row, name in enumerate(cell.region_names)} if turn.sheet.tail.regions else {}
        models = [cell.find_model(name) for name in turn.sheet.tail.models]
        regions = [known.get(name, NEW_NAME) for name in turn.sheet.tail.regions]
        full = len(cell.reason_sets) == MAX_REASON_SETS  # their numbers change hands
        return [NEW_NAME if row == NONE else row for row in models], regions, NONE if full else len(cell.reason_sets)

    def _find_names(self, turn: _Turn, first: int, last: int) -> tuple[list[int], list[int], int]:
        """Write the cell's own numbers beside what the relay has said."""
        part = turn.rows[first:last]
        found = models, regions, _ = self._names(turn)
        row = turn.feed.rows[part["vehicle"]]
        part["row"] = row
        part["its_region"] = np.array(regions, np.int32)[part["region"]]
        model = part["model"].astype(np.int64)
        part["its_model"] = np.array([*models, NONE], np.int32)[np.where(model == NO_MODEL, len(models), model)]
        bits, place = np.unique(part["reasons"], return_inverse=True)
        sets = self._cell._reason_sets  # noqa: SLF001 - to look without making one
        part["its_reasons"] = np.array([sets.get(each, NEW_NAME) for each in bits.tolist()], np.int32)[place]
        return found

    def _say(self, turn: _Turn, count: int) -> Commands:
        """The notes and news of rows that the kernel has applied."""
        commands: Commands = []
        rows = turn.rows
        for entry in turn.said[:count].tolist():
            place = entry >> SAID_BITS
            vehicle_id = self._cell.ids.name(int(rows["row"][place]))
            if entry & NOTE:
                what = in_words(int(rows["state"][place]), int(rows["reasons"][place]))
                commands.append(ev.Note(subject=vehicle_id, what=what))
            if entry & NEWS:
                commands.append(ev.SendOwnerNews(vehicle_id=vehicle_id))
        return commands

    def _take_alone(self, turn: _Turn, at: int) -> Commands:
        """One row as the report that it stands for."""
        row = turn.rows[at]
        v, number = int(row["row"]), int(row["vehicle"])
        vehicle_id = "" if v == NONE else self._cell.ids.name(v)
        if v == NONE or self._cell.find(vehicle_id) != v:
            turn.feed.rows[number] = NONE
            turn.wanted.append(number)
            return []
        vehicles = self._cell.t.vehicles
        here = int(vehicles["state"][v]) != AWAY and not int(vehicles["flags"][v]) & OFFLINE
        if int(vehicles["incarnation"][v]) != int(row["incarnation"]):
            turn.wanted.append(number)
            return []
        if here and min(int(row["seq"]), MAX_SEQ) <= int(vehicles["seq"][v]):
            return []
        held = self._held_by(v, int(row["held"]), int(row["held_mark"]))
        if held is None:
            turn.wanted.append(number)
            return []
        return self._single(turn, vehicle_id, self._state(turn.sheet, row, incarnation(self._cell, v), held))

    def _held_by(self, v: int, count: int, total: int) -> tuple[str, ...] | None:
        """What a vehicle holds, from the sum of its marks; None if that cannot be known."""
        if not count:
            return ()
        before = self._held.get(v)
        if before is not None and before[0] == total and len(before[1]) == count:
            return before[1]
        ours = tuple(self._ground.lease_id(row) for row in self._cell.leases_of(v))
        return ours if len(ours) == count and mark_of(ours) == total else None

    @staticmethod
    def _state(sheet: Sheet, row: Any, name: str, held: tuple[str, ...]) -> State:
        model, risk, stay_min = int(row["model"]), int(row["risk_pct"]), int(row["stay_min"])
        state = STATES[int(row["state"])]
        assert state is not None, "a sheet is checked before it comes here"
        return State(
            incarnation=name,
            seq=int(row["seq"]),
            state=state,
            region=sheet.tail.regions[int(row["region"])],
            permit_w=int(row["permit_w"]),
            reasons=[Reason(code=code) for code in reasons_of(int(row["reasons"]))],
            model=None if model == NO_MODEL else sheet.tail.models[model],
            slots=int(row["slots"]),
            held=list(held),
            stay_bound_ms=stay_min * 60_000 if stay_min else None,
            risk_15min=None if risk == NOT_KNOWN else risk / 100,
        )

    # -- reports in full -----------------------------------------------------------------------------------------------

    def _take_whole(self, turn: _Turn, whole: Whole) -> Commands:
        commands = self._single(turn, whole.vehicle_id, whole.state)
        v = self._cell.find(whole.vehicle_id)
        turn.feed.rows[whole.number] = v
        if whole.state.held:
            self._held[v] = mark_of(whole.state.held), tuple(whole.state.held)
        else:
            self._held.pop(v, None)
        return commands

    def _single(self, turn: _Turn, vehicle_id: str, state: State) -> Commands:
        cause = f"{turn.relay}/{turn.sheet.number}"
        report = ev.VehicleReported(cause_id=cause, vehicle_id=vehicle_id, state=state)
        commands = self._ground.single(report, turn.now_ms)
        v = self._cell.find(vehicle_id)
        turn.taken += int(self._cell.t.vehicles["seq"][v]) == min(state.seq, MAX_SEQ)
        self._room_for_marks()
        numbers = self._cell.t.leases["number"]
        for row in self._cell.leases_of(v):
            if self._marks["number"][row] != numbers[row]:
                self._marks[row] = int(numbers[row]), mark(self._ground.lease_id(row))
        return commands

    def _room_for_marks(self) -> None:
        rows = len(self._cell.t.leases)
        if len(self._marks) < rows:
            more = np.full(rows - len(self._marks), NONE, MARK)
            self._marks = np.concatenate((self._marks, more))

    def _answer(self, turn: _Turn, refused: list[int]) -> ev.SheetTaken:
        rows = turn.rows["row"]
        rows = np.unique(rows[rows != NONE])
        live = rows[self._cell.t.vehicles["live"][rows] > 0]
        whole = turn.sheet.tail.whole
        return ev.SheetTaken(
            relay=turn.relay,
            feed=turn.sheet.feed,
            number=turn.sheet.number,
            taken=turn.taken,
            wanted=sorted(set(turn.wanted)),
            live=[self._cell.ids.name(int(v)) for v in live],
            whole=[(each.vehicle_id, each.state) for each in whole],
            refused=refused,
        )
