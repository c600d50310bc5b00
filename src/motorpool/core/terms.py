"""The terms on which work runs: what customers ask of a job, and what operators set for vehicles, sites and customers.

Decides: nothing new; it writes the terms into the columns that the kernels look at, and takes lines back from a vehicle
that does not meet them any more. A line of a job that is bound to regions is never with a vehicle that says it is
elsewhere, and what such a vehicle still sends of it is not accepted: nobody knows where it was made.

Called by: ``core.scheduler``. Must not: grant; ``core.granting`` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from motorpool.core import events as ev
from motorpool.core.columns import BEST_EFFORT, DENIED, DRAWING, NONE, RELAXED, RESERVE, SHADOW, TIERS
from motorpool.core.granting import Commands
from motorpool.core.jobs import Job
from motorpool.core.results import Results

MAX_TRUST: Final = TIERS - 1
MAX_WATTS: Final = 2_000_000_000
MIN_WEIGHT: Final = 0.001
MAX_WEIGHT: Final = 1_000.0
NOWHERE: Final = "-" * 257  # a region in which no vehicle can be: no name on the wire is so long


class Terms(Results):
    """The part of the scheduler that knows what was asked for and what was set."""

    def __init__(self, epoch: int = 0, *, fast: bool = False) -> None:
        super().__init__(epoch, fast=fast)
        self._nowhere = 1 << self.cell.region(NOWHERE)
        self._regions_masked = len(self.cell.region_names)

    # -- what a customer asks of a job ---------------------------------------------------------------------------------

    def _take_terms(self, job: Job, event: ev.JobStarted) -> None:
        """Write the terms of a new job into its row."""
        jobs = self.cell.t.jobs
        jobs["min_trust"][job.row] = min(max(event.min_trust, 0), MAX_TRUST)
        if event.best_effort:
            jobs["flags"][job.row] |= BEST_EFFORT | RELAXED
        if event.regions:
            self.residency[job.job_no] = event.regions
            jobs["regions"][job.row] = self._mask(event.regions)

    def _mask(self, names: Iterable[str]) -> int:
        """Regions as bits. Of names that no vehicle has said yet there is none: they would use the numbers up."""
        known = self.cell.region_names
        return sum(1 << known.index(name) for name in set(names) if name in known) or self._nowhere

    def _mask_again(self) -> None:
        """A vehicle may have said the name of a region that jobs are bound to for the first time."""
        if len(self.cell.region_names) != self._regions_masked:
            self._regions_masked = len(self.cell.region_names)
            for job_no, names in self.residency.items():
                self.cell.t.jobs["regions"][self.jobs[job_no].row] = self._mask(names)

    def _may_hold(self, v: int, j: int) -> bool:
        """Whether a vehicle meets what its customer asks of a job: region and trust."""
        mask = int(self.cell.t.jobs["regions"][j])
        inside = mask == 0 or bool(mask >> int(self.cell.t.vehicles["region"][v]) & 1)
        return inside and int(self.cell.t.vehicles["trust"][v]) >= int(self.cell.t.jobs["min_trust"][j])

    def able(self, model: str, regions: Iterable[str], min_trust: int) -> int:
        """How many vehicles could run this model now: in one of these regions, if any are named, and trusted."""
        row = self.cell.find_model(model)
        if row == NONE:
            return 0
        vehicles = self.cell.t.vehicles[: self.cell.ids.rows]
        may = (vehicles["counted_place"] != NONE) & (vehicles["model"] == row) & (vehicles["trust"] >= min_trust)
        names = set(regions)
        if names:
            known = [place for place, name in enumerate(self.cell.region_names) if name in names]
            may &= np.isin(vehicles["region"], known)
        return int(np.count_nonzero(may))

    def _still_held(self, job: Job, held: dict[int, tuple[str, ...]]) -> dict[int, tuple[str, ...]]:
        """Of the vehicles that lines were taken from, those that may still finish them."""
        if not self.residency.get(job.job_no) and not self.cell.t.jobs["min_trust"][job.row]:
            return held
        named = {name for names in held.values() for name in names}
        rows = {name: self.cell.find(name) for name in named}
        may = {name for name, v in rows.items() if v != NONE and self._may_hold(v, job.row)}
        kept = {line: tuple(name for name in names if name in may) for line, names in held.items()}
        return {line: names for line, names in kept.items() if names}

    def _expel(self, v: int, why: str) -> Commands:
        """Take back what a vehicle holds of jobs whose terms it does not meet any more, and take nothing from it."""
        commands: Commands = []
        for row in self.cell.leases_of(v):
            job = self.job_of(row)
            if self._may_hold(v, job.row):
                continue
            lines = job.lines_of(row)
            job.expelled.add(self.lease_id(row))
            commands.append(self._revoke(row))
            if not int(self.cell.t.leases["flags"][row]) & SHADOW:
                job.put_back(lines)
                self._note_waiting(job)
            commands += self._forget(row)
            commands.append(ev.Note(subject=self.cell.ids.name(v), what=f"{len(lines)} lines taken back: {why}"))
            if job.job_no in self.jobs:
                commands += self._end_if_done(job)
        for job in self.jobs.values():
            if job.held and not self._may_hold(v, job.row):
                job.held = self._still_held(job, job.held)
        return commands

    # -- what an operator sets -----------------------------------------------------------------------------------------

    def _vehicle_configured(self, event: ev.VehicleConfigured, now_ms: int) -> Commands:
        v = self.cell.vehicle(event.vehicle_id)
        self._configure(v, site=event.site, trust=event.trust, reserve=event.reserve)
        commands = self._expel(v, "it is not trusted enough any more")
        commands += self._relieve(int(self.cell.t.vehicles["site"][v]), first=v)
        return commands + self._fill_all(now_ms)

    def _configure(self, v: int, *, site: str, trust: int, reserve: bool) -> None:
        row = self.cell.site(site)
        t = self.cell.t
        if row != int(t.vehicles["site"][v]):
            self._stop_drawing(v)
            t.vehicles["site"][v] = row
            self.cell.k.draw(t, v)
        t.vehicles["trust"][v] = min(max(trust, 0), MAX_TRUST)
        flags = int(t.vehicles["flags"][v]) & ~RESERVE
        t.vehicles["flags"][v] = flags | (RESERVE if reserve else 0)
        self.cell.k.recount(t, v)

    def _stop_drawing(self, v: int) -> None:
        """Count a vehicle no more in the power of its site."""
        vehicles, sites = self.cell.t.vehicles, self.cell.t.sites
        if int(vehicles["flags"][v]) & DRAWING:
            site = int(vehicles["site"][v])
            sites["used_w"][site] -= int(vehicles["permit_w"][v])
            sites["working"][site] -= 1
            vehicles["flags"][v] &= ~np.uint8(DRAWING)

    def _permit_gone(self, v: int) -> None:
        """A vehicle has no permit any more, whatever it still holds."""
        vehicles = self.cell.t.vehicles
        if int(vehicles["flags"][v]) & DRAWING:
            self.cell.t.sites["used_w"][int(vehicles["site"][v])] -= int(vehicles["permit_w"][v])
        vehicles["permit_w"][v] = 0

    def _await_permit(self, v: int) -> None:
        """Of a car without consent no permit is known: at a site it gets nothing before it has told a new one."""
        vehicles = self.cell.t.vehicles
        if int(vehicles["site"][v]) and int(vehicles["state"][v]):
            vehicles["state"][v] = DENIED

    def _site_configured(self, event: ev.SiteConfigured, now_ms: int) -> Commands:
        site = self.set_site(event.site, event.limit_w, event.limit_vehicles)
        return self._relieve(site) + self._fill_all(now_ms)

    def set_site(self, name: str, limit_w: int, limit_vehicles: int) -> int:
        """What a site bears; 0: no limit. Its row."""
        site = self.cell.site(name)
        self.cell.t.sites["limit_w"][site] = min(limit_w, MAX_WATTS)
        self.cell.t.sites["limit_vehicles"][site] = min(limit_vehicles, MAX_WATTS)
        return site

    def _over(self, site: int) -> bool:
        """Whether more is drawn or at work at a site than it bears."""
        limit_w, used_w, limit, working = (int(number) for number in self.cell.t.sites[site].item())
        return site != 0 and (0 < limit_w < used_w or 0 < limit < working)

    def _relieve(self, site: int, *, first: int = NONE) -> Commands:
        """Take lines back at a site over its limit: from ``first``, then from those that hold the fewest lines."""
        if not self._over(site):
            return []
        vehicles = self.cell.t.vehicles[: self.cell.ids.rows]
        rows = np.flatnonzero((vehicles["site"] == site) & (vehicles["flags"] & DRAWING != 0))
        rows = rows[np.argsort(vehicles["outstanding"][rows], kind="stable")]
        commands: Commands = []
        for v in sorted(map(int, rows), key=lambda row: row != first):
            if not self._over(site):
                break
            for row in self.cell.leases_of(v):
                commands.append(self._revoke(row))
                commands += self._take_back(row, "its site is at its limit")
        return commands

    def _customer_configured(self, event: ev.CustomerConfigured, now_ms: int) -> Commands:
        self.set_weight(event.account, event.weight)
        return self._fill_all(now_ms)

    def set_weight(self, account: str, weight: float) -> None:
        """The share of a customer."""
        self.cell.t.tenants["weight"][self.cell.tenant(account)] = min(max(weight, MIN_WEIGHT), MAX_WEIGHT)

    # -- what must hold ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Every invariant of this state; for tests and simulation."""
        super().validate()
        t = self.cell.t
        for row in map(int, self.cell.all_leases()):
            assert self._may_hold(int(t.leases["vehicle"][row]), int(t.leases["job"][row])), "terms are kept"
        vehicles = t.vehicles[: self.cell.ids.rows]
        draws = (vehicles["site"] != 0) & ((vehicles["outstanding"] > 0) | (vehicles["live"] > 0))
        assert (draws == (vehicles["flags"] & DRAWING != 0)).all(), "who works at a site is counted there"
        for site in range(1, len(self.cell.site_names)):
            here = draws & (vehicles["site"] == site)
            assert int(t.sites["working"][site]) == int(here.sum())
            assert int(t.sites["used_w"][site]) == int(vehicles["permit_w"][here].sum())
            live = bool((here & (vehicles["live"] > 0)).any())  # a limit that is lowered does not end live requests
            assert live or not self._over(site), "a site is never over its limit"
        assert set(self.residency) <= set(self.jobs)
