"""A year of every owner in a recording: one row each, and what is usual among them.

Decides: nothing; each year is ``sim.year``'s. Must not: depend on which process is done first: rows are in the order of
names.
Called by: ``cli.sim``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Final
from zoneinfo import ZoneInfo

import msgspec

from motorpool.agent.signals.sessions import Session
from motorpool.core.policy import ReadyBy
from motorpool.errors import SetupError
from motorpool.sim.year import MIN_SESSIONS, Node, full_years, simulate

MAX_PROCESSES: Final = 2


class OwnerYear(msgspec.Struct, frozen=True, kw_only=True):
    """One owner's year in a row."""

    user: str
    departures: int
    before_full: int
    plugged_h: float
    worked_h: float
    net_micro: int
    grid_kwh: float
    our_cycles: float
    least_pct: float
    violations: int
    looks: int


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A tenth of the owners has less than ``p10``, half ``median``, nine tenths ``p90``."""

    p10: float
    median: float
    p90: float


class _Task(msgspec.Struct, frozen=True, kw_only=True):
    user: str
    sessions: list[Session]
    node: Node
    zone: str
    ready_by: ReadyBy | None


def every_owner(
    sessions: Iterable[Session],
    node: Node,
    *,
    zone: ZoneInfo,
    ready_by: ReadyBy | None,
    tell: Callable[[float], None] | None = None,
    processes: int = MAX_PROCESSES,
) -> list[OwnerYear]:
    """The years of all owners with enough sessions; ``tell`` hears how much is over, from 0 to 1."""
    by_user: dict[str, list[Session]] = {}
    for session in sessions:
        by_user.setdefault(session.user, []).append(session)
    years = full_years(by_user)
    if not years:
        raise SetupError(f"no owner in these files has {MIN_SESSIONS} sessions in a year", code="no_sessions")
    tasks = [
        _Task(user=user, sessions=found, node=node, zone=zone.key, ready_by=ready_by) for user, found in years.items()
    ]
    whole_ms = sum(map(_plugged_ms, tasks))
    over_ms = 0
    rows = []
    with _mapped(tasks, min(processes, MAX_PROCESSES, len(tasks))) as results:
        for task, row in zip(tasks, results, strict=True):
            rows.append(row)
            over_ms += _plugged_ms(task)
            if tell is not None:
                tell(over_ms / whole_ms)
    return rows


@contextmanager
def _mapped(tasks: Sequence[_Task], processes: int) -> Iterator[Iterator[OwnerYear]]:
    """The rows in the order of the tasks; whoever stops half-way does not wait for the rest."""
    if processes <= 1:
        yield map(_live, tasks)
        return
    pool = ProcessPoolExecutor(max_workers=processes)
    try:
        yield pool.map(_live, tasks)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _plugged_ms(task: _Task) -> int:
    return sum(session.plug_out_ms - session.plug_in_ms for session in task.sessions)


def _live(task: _Task) -> OwnerYear:
    year = simulate(task.user, task.sessions, task.node, zone=ZoneInfo(task.zone), ready_by=task.ready_by)
    return OwnerYear(
        user=task.user,
        departures=len(year.departures),
        before_full=year.before_full,
        plugged_h=year.plugged_ms / 3_600_000,
        worked_h=year.worked_ms / 3_600_000,
        net_micro=year.statement.net_micro,
        grid_kwh=year.books_wh / 1000,
        our_cycles=year.our_cycles,
        least_pct=year.least_pct,
        violations=sum(year.violations.values()),
        looks=year.looks,
    )


def spread(values: Sequence[float]) -> Spread:
    """Percentiles, straight between the values."""
    ordered = sorted(values)
    return Spread(p10=_at(ordered, 0.1), median=_at(ordered, 0.5), p90=_at(ordered, 0.9))


def _at(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
