"""What a scheduler takes from the books in bulk when it starts: a million vehicles and their leases in seconds.

The books are the truth; what is here is the same as ``Scheduler.restore_vehicle`` and ``restore_lease`` for each row,
in columns. Nothing is decided here.

Called by: ``core.scheduler``, ``server.snapshots``. Must not: take anything from where it could contradict the books.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.core.columns import MAX_UNTIL_S, NONE, RESERVE, WITHDRAWAL_SEEN, WITHDRAWN, Ints
from motorpool.core.fleet import incarnation_number, set_incarnation
from motorpool.core.jobs import LEASED, NOBODY, PENDING, Job
from motorpool.core.terms import MAX_TRUST, Terms

Bools = npt.NDArray[np.bool_]


class VehicleRows(msgspec.Struct, frozen=True, kw_only=True):
    """What the books know of vehicles, in columns of equal length: see ``Scheduler.restore_vehicle``."""

    names: list[str]
    regions: list[str]
    sites: list[str]
    withdrawn: Bools
    withdrawal_seen: Bools
    paused_until_ms: Ints
    trust: Ints
    reserve: Bools


class LeaseRows(msgspec.Struct, frozen=True, kw_only=True):
    """Leases of the books in columns, oldest first.

    ``lines``: those of all leases, one after the other, ``counts`` of each. ``bases``: tokens of the checkpoints that
    came with a lease, by its place, where there are any.
    """

    lease_ids: list[str]
    vehicle_ids: list[str]
    incarnations: list[str]
    job_nos: Ints
    granted_ms: Ints
    expires_ms: Ints
    lines: Ints
    counts: Ints
    bases: dict[int, dict[int, int]]


class Recovery(Terms):
    """The part of the scheduler that is filled from the books in bulk."""

    def restore_vehicles(self, rows: VehicleRows) -> None:
        """Put vehicles back of which this scheduler knows nothing yet."""
        cell = self.cell
        v = cell.vehicles(rows.names)
        numbers = {name: cell.region(name) for name in dict.fromkeys(rows.regions)}
        places = {name: cell.site(name) for name in dict.fromkeys(rows.sites)}
        vehicles = cell.t.vehicles
        vehicles["region"][v] = [numbers[name] for name in rows.regions]
        vehicles["site"][v] = [places[name] for name in rows.sites]
        vehicles["paused_until_s"][v] = np.clip(-(-rows.paused_until_ms // 1000), 0, MAX_UNTIL_S)
        vehicles["trust"][v] = np.clip(rows.trust, 0, MAX_TRUST)
        flags = vehicles["flags"][v] & ~np.uint8(WITHDRAWN | WITHDRAWAL_SEEN | RESERVE)
        flags |= np.where(rows.withdrawn, np.uint8(WITHDRAWN), np.uint8(0))
        flags |= np.where(rows.withdrawal_seen, np.uint8(WITHDRAWAL_SEEN), np.uint8(0))
        vehicles["flags"][v] = flags | np.where(rows.reserve, np.uint8(RESERVE), np.uint8(0))

    def restore_leases(self, leases: LeaseRows) -> None:
        """Put leases of jobs in progress back: each holds those of its lines that have not ended.

        Of two that name the same line the older one has it.
        """
        v = self.cell.vehicles(leases.vehicle_ids)
        self._restore_incarnations(v, leases.incarnations)
        held = np.zeros((3, len(v)), np.int64)  # how many lines, the lowest, how far they reach
        won: dict[int, Ints] = {}
        for number, places, lines in _by_job(leases):
            job = self.jobs[number]
            won[number] = _share_out(job, places, lines)
            _measure(job, won[number], held)
        full = np.flatnonzero(held[0])
        self._empty_leases += [leases.lease_ids[place] for place in np.flatnonzero(held[0] == 0).tolist()]
        rows = self._open_all(leases, v, full, held)
        for number, lines in won.items():
            job = self.jobs[number]
            job.holder[lines] = rows[job.holder[lines]]
        names, opened = [leases.lease_ids[place] for place in full.tolist()], rows[full].tolist()
        self._old_ids.update(zip(names, opened, strict=True))
        self._old_names.update(zip(opened, names, strict=True))
        for place, base in leases.bases.items():
            if rows[place] != NONE:
                self._base[int(rows[place])] = dict(base)

    def _restore_incarnations(self, v: Ints, names: list[str]) -> None:
        """Of vehicles whose incarnation is not known: that of their oldest lease."""
        said = np.array([bool(name) for name in names], np.bool_)
        who, first = np.unique(v[said], return_index=True)
        first = np.flatnonzero(said)[first]
        unknown = (self.cell.t.vehicles["incarnation"][who] == 0) & ~np.isin(who, list(self.cell.other_incarnations))
        who, first = who[unknown], first[unknown]
        numbers = np.array([incarnation_number(names[place]) for place in first.tolist()], np.uint64)
        self.cell.t.vehicles["incarnation"][who] = numbers
        for place in np.flatnonzero(numbers == 0).tolist():
            set_incarnation(self.cell, int(who[place]), names[int(first[place])])

    def _open_all(self, leases: LeaseRows, v: Ints, full: Ints, held: Ints) -> Ints:
        """Rows for the leases that still have lines, in their order; the others get NONE."""
        cell = self.cell
        rows = np.full(len(v), NONE, np.int64)
        table = {number: job.row for number, job in self.jobs.items()}
        j = np.array([table[number] for number in leases.job_nos[full].tolist()], np.int64)
        who, granted_ms, expires_ms = v[full], leases.granted_ms[full], leases.expires_ms[full]
        spans = held[:, full]
        begun = 0
        while True:
            opened = np.full(len(full), NONE, np.int64)
            begun = int(cell.k.open_leases(cell.t, begun, who, j, spans, granted_ms, expires_ms, opened))
            done = opened != NONE
            rows[full[done]] = opened[done]
            if begun == len(full):
                return rows
            cell.more_leases()


def _by_job(leases: LeaseRows) -> list[tuple[int, Ints, Ints]]:
    """Of each job: the places of the leases that its lines are in, and the lines, the older lease first."""
    starts = np.cumsum(leases.counts) - leases.counts
    order = np.argsort(leases.job_nos, kind="stable")
    counts = leases.counts[order]
    ends = np.cumsum(counts)
    places = np.repeat(order, counts)
    at = np.repeat(starts[order] - (ends - counts), counts) + np.arange(len(places))
    lines = leases.lines[at]
    numbers, begins = np.unique(leases.job_nos[order], return_index=True)
    edges = [0, *ends[begins[1:] - 1].tolist(), len(lines)] if len(numbers) else [0]
    return [
        (int(number), places[edges[n] : edges[n + 1]], lines[edges[n] : edges[n + 1]])
        for n, number in enumerate(numbers.tolist())
    ]


def _share_out(job: Job, places: Ints, lines: Ints) -> Ints:
    """Give each line that waits to the first lease that names it; the lines that have one, by place in ``holder``."""
    known = (lines >= 0) & (lines < job.total)
    places, lines = places[known], lines[known]
    waits = job.state[lines] == PENDING
    places, lines = places[waits], lines[waits]
    job.holder[lines[::-1]] = places[::-1]  # of several the last one that is written stays
    won: Ints = np.flatnonzero(job.holder != NOBODY)
    job.state[won] = LEASED
    return won


def _measure(job: Job, won: Ints, held: Ints) -> None:
    """How many lines each lease of a job has, and from where to where."""
    if not len(won):
        return
    places = job.holder[won]
    order = np.argsort(places, kind="stable")
    places, lines = places[order], won[order]
    begins = np.flatnonzero(np.diff(places, prepend=-1))
    ends = np.append(begins[1:], len(places))
    at = places[begins]
    held[0, at] = ends - begins
    held[1, at] = lines[begins]
    held[2, at] = lines[ends - 1] + 1 - lines[begins]
