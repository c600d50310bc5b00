"""Who runs what: the one place where lines are granted, taken back, accepted and paid.

Theory. A line is PENDING, LEASED or DONE. ``handle`` is the only way in; it mutates the state and returns commands. The
shell commits the commands that change the books in one transaction and performs the others after it, so whatever a
vehicle sees is already in the books. A result counts when its line is not DONE yet, whichever lease it came under; the
books' primary key says the same a second time. A lease ends when its last line ends, when the vehicle hands it back,
when it runs out, or when its vehicle is another incarnation, silent for too long or struck off; its lines then wait
again, each with the longest checkpoint that is known. Departures are never held against a line; engine crashes and
server errors are, and a line that has caused MAX_STRIKES of them ends in a named error.

The state is columns (``core.columns``), the hot decisions are kernels (``core.kernels``); ``core.granting`` and
``core.results`` are other parts of the one class, as is ``core.terms``: what customers ask for and operators set.

Must not: read clocks, mint random ids, see bodies. Called by: ``server.loop`` and the simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from motorpool.core import events as ev
from motorpool.core.columns import (
    CANCELLING,
    EXCUSED,
    MAX_AFTER_MS,
    MAX_SEQ,
    NONE,
    NOT_MISSING,
    OFFLINE,
    SEEN,
    WITHDRAWAL_SEEN,
    WITHDRAWN,
    Ints,
    after_ms,
    until_s,
)
from motorpool.core.fleet import BIT_OF_REASON, NUMBER_OF_STATE, incarnation, set_incarnation
from motorpool.core.granting import BACKOFF_MS, Commands
from motorpool.core.jobs import DONE, PENDING, Job
from motorpool.core.kernels import MAX_LEASE_MS, MIN_LEASE_MS
from motorpool.core.planning import SILENT_MS
from motorpool.core.pricing import Shares
from motorpool.core.recovery import Recovery
from motorpool.core.reporting import Feeds, Ground, in_words
from motorpool.core.results import MAX_STRIKES, MAX_STRIKES_IN_ALL
from motorpool.types import ReasonCode, VehicleState
from motorpool.wire import State

__all__ = ["BACKOFF_MS", "MAX_LEASE_MS", "MAX_STRIKES", "MAX_STRIKES_IN_ALL", "MIN_LEASE_MS", "Scheduler"]

TICK_MS: Final = 1_000
SILENT_AFTER_MS: Final = SILENT_MS  # no report for so long: the vehicle is taken for gone
RESEND_AFTER_MS: Final = 3_000  # a grant that no report mentions is sent again
MAX_SENDS: Final = 5
MISSING_AFTER_MS: Final = 15_000  # a lease that the vehicle has ended while its results did not come
EXPIRY_GRACE_MS: Final = 15_000  # the vehicle's clock may have started later
CANCEL_GRACE_MS: Final = 600_000  # lines that run when a job is cancelled may finish for so long
SETTLE_MS: Final = 15_000  # after a start no window closes for so long: what was finished in time may still arrive
MAX_MINUTES: Final = 0xFFFE
MAX_SLOTS: Final = 0xFFFF
ON_DISK_ROWS: Final = 32  # models that a vehicle's row has a bit for


class Scheduler(Recovery):
    """The state of one cell's scheduling."""

    def __init__(self, epoch: int = 0, *, fast: bool = False) -> None:
        super().__init__(epoch, fast=fast)
        self._settled_ms = 0
        self.feeds = Feeds(self.cell, Ground(self._vehicle_reported, self._fill, self.lease_id, self._mood))
        self._handlers: dict[type, Callable[[Any, int], Commands]] = {
            ev.JobStarted: self._job_started,
            ev.CancelAsked: self._cancel_asked,
            ev.VehicleReported: self._vehicle_reported,
            ev.SheetArrived: self.feeds.take,
            ev.FeedEnded: self.feeds.end,
            ev.VehicleRevoked: self._vehicle_revoked,
            ev.OwnerSpoke: self._owner_spoke,
            ev.VehicleConfigured: self._vehicle_configured,
            ev.SiteConfigured: self._site_configured,
            ev.CustomerConfigured: self._customer_configured,
            ev.ResultsArrived: self._results_arrived,
            ev.WorkReturned: self._work_returned,
            ev.ProgressMade: self._progress_made,
            ev.LiveEnded: self._live_ended,
            ev.Ticked: self._ticked,
        }

    def handle(self, event: ev.SchedulerEvent, now_ms: int) -> Commands:
        """Apply one event; the commands that follow, in order."""
        return self._handlers[type(event)](event, now_ms)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _job_started(self, event: ev.JobStarted, now_ms: int) -> Commands:
        if event.job_no in self.jobs:
            return []
        job = self.add_job(event)
        commands: Commands = [
            ev.SaveJobStatus(job_no=job.job_no, status="in_progress"),
            ev.Note(subject=job.job_id, what=f"started: {job.total} lines for {job.model}"),
        ]
        return commands + self._fill_all(now_ms)

    def add_job(self, event: ev.JobStarted) -> Job:
        """Put a new job into the state."""
        job = Job(
            self.cell,
            job_no=event.job_no,
            job_id=event.job_id,
            account=event.account,
            kind=event.kind,
            model=event.model,
            price=event.price,
            expires_ms=event.expires_ms,
            lengths=event.lengths,
            limits=event.limits,
        )
        self._take_terms(job, event)
        self.cell.t.jobs["memory_gb"][job.row] = min(max(event.memory_gb, 0), 255)
        self.jobs[job.job_no] = job
        self.job_numbers[job.job_id] = job.job_no
        self._by_row[job.row] = job
        self._unplanned = True
        return job

    def restore_job(
        self,
        event: ev.JobStarted,
        *,
        done: npt.NDArray[np.int64],
        carried: dict[int, Shares],
        checkpoint_bytes: dict[int, int],
        held: dict[int, tuple[str, ...]],
        cancelling_ms: int | None,
    ) -> None:
        """Put a job from the books back into the state, with the lines that have ended."""
        job = self.add_job(event)
        job.restore(done)
        job.carried = {line: shares for line, shares in carried.items() if job.state[line] != DONE}
        job.checkpoint_bytes = {line: size for line, size in checkpoint_bytes.items() if line in job.carried}
        held = self._still_held(job, held)
        job.held = {line: vehicles for line, vehicles in held.items() if job.state[line] != DONE}
        job.cancelling_ms = cancelling_ms
        if cancelling_ms is not None:
            self.cell.t.jobs["flags"][job.row] |= CANCELLING

    def restore_lease(self, saved: ev.SaveLease) -> None:
        """Put a lease from the books back into the state: it holds those of its lines that have not ended."""
        job = self.jobs[saved.job_no]
        v = self.cell.vehicle(saved.vehicle_id)
        if not incarnation(self.cell, v):
            set_incarnation(self.cell, v, saved.incarnation)
        lines = sorted(line for line in set(saved.lines) if job.state[line] == PENDING)
        if not lines:
            self._empty_leases.append(saved.lease_id)
            return
        row = self._new_lease(job, v, lines, granted_ms=saved.granted_ms, expires_ms=saved.expires_ms)
        if saved.base:
            self._base[row] = dict(saved.base)
        self._old_ids[saved.lease_id] = row
        self._old_names[row] = saved.lease_id

    def restore_vehicle(
        self,
        vehicle_id: str,
        *,
        region: str,
        withdrawn: bool,
        withdrawal_seen: bool,
        paused_until_ms: int,
        site: str = "",
        trust: int = 0,
        reserve: bool = False,
    ) -> None:
        """Put back what the books know of a vehicle: where it is, what its owner has said and its operator has set."""
        v = self.cell.vehicle(vehicle_id)
        vehicles = self.cell.t.vehicles
        vehicles["region"][v] = self.cell.region(region)
        vehicles["paused_until_s"][v] = until_s(paused_until_ms)
        self._set_withdrawn(v, withdrawn=withdrawn, seen=withdrawal_seen)
        self._configure(v, site=site, trust=trust, reserve=reserve)

    def resume(self, now_ms: int, *, settled_ms: int) -> Commands:
        """After everything was put back from the books: end what has nothing left, and give vehicles time to report.

        No window closes before ``settled_ms``.
        """
        t = self.cell.t
        self.cell.ids.settle()
        flags = t.vehicles["flags"][: self.cell.ids.rows]
        withdrawn = np.flatnonzero(flags & WITHDRAWN)
        commands: Commands = [ev.DropStory(subject=self.cell.ids.name(int(v))) for v in withdrawn]
        self._settled_ms = settled_ms
        rows = self.cell.all_leases()
        t.vehicles["seen_ms"][t.leases["vehicle"][rows]] = now_ms
        # The crash may have come before the grant was sent: sent again if need be.
        since_ms = np.clip(now_ms - t.leases["granted_ms"][rows], -MAX_AFTER_MS, MAX_AFTER_MS)
        t.leases["sent_after_ms"][rows] = since_ms
        commands += [ev.DropLease(lease_id=lease_id) for lease_id in self._empty_leases]
        self._empty_leases.clear()
        for job in list(self.jobs.values()):
            job.requeue()
            if job.cancelling_ms is not None:
                commands += self._stop_waiting_lines(job)  # the crash may have come before they were asked back
            commands += self._end_if_done(job)
        self._unplanned = True
        return commands

    def _cancel_asked(self, event: ev.CancelAsked, now_ms: int) -> Commands:
        job = self.jobs.get(event.job_no)
        if job is None or job.cancelling_ms is not None:
            return []
        job.cancelling_ms = now_ms
        self.cell.t.jobs["flags"][job.row] |= CANCELLING
        commands: Commands = [
            ev.SaveJobStatus(job_no=job.job_no, status="cancelling"),
            ev.Note(subject=job.job_id, what="cancelled by the customer; lines that run may finish"),
        ]
        return commands + self._stop_waiting_lines(job) + self._end_if_done(job)

    def _stop_waiting_lines(self, job: Job) -> Commands:
        return [self._revoke(row, keep_running=True) for row in self._leases_of(job)]

    # -- vehicles ------------------------------------------------------------------------------------------------------

    def _vehicle_reported(self, event: ev.VehicleReported, now_ms: int) -> Commands:
        v = self.cell.vehicle(event.vehicle_id)
        vehicles = self.cell.t.vehicles
        state = event.state
        commands: Commands = []
        known = incarnation(self.cell, v)
        was_offline = bool(vehicles["flags"][v] & OFFLINE)
        heard_of = int(vehicles["state"][v]) != 0
        news = was_offline or state.incarnation != known  # it may have missed what was sent
        if state.incarnation != known:
            for row in self.cell.leases_of(v):
                commands += self._take_back(row, "the vehicle's agent started anew")
            set_incarnation(self.cell, v, state.incarnation)
            for column in ("narrowed", "memory_gb", "on_disk"):
                vehicles[column][v] = 0
        elif heard_of and min(state.seq, MAX_SEQ) <= int(vehicles["seq"][v]) and not was_offline:
            return []
        before = "offline" if was_offline or not heard_of else self._in_words(v)
        commands += self._hear_of_withdrawal(v, event.vehicle_id, state)
        commands += self._take_report(v, event.vehicle_id, state, before, now_ms)
        paused = now_ms < int(vehicles["paused_until_s"][v]) * 1000
        permitted = state.state in {VehicleState.READY, VehicleState.WORKING}
        withdrawn = bool(vehicles["flags"][v] & WITHDRAWN)
        if news or (permitted and (withdrawn or paused)):
            commands.append(ev.SendOwnerNews(vehicle_id=event.vehicle_id))  # or it does not know its owner's word yet
        commands += self._reconcile(v, event.vehicle_id, state, now_ms)
        return commands + self._fill(v, now_ms)

    def _take_report(self, v: int, vehicle_id: str, state: State, before: str, now_ms: int) -> Commands:
        """Write what a vehicle says of itself into its row; of a car without consent nothing but its state."""
        vehicles = self.cell.t.vehicles
        withdrawn = bool(vehicles["flags"][v] & WITHDRAWN)
        reasons = {reason.code for reason in state.reasons}
        if withdrawn:
            reasons &= {ReasonCode.CONSENT_WITHDRAWN}
        bound_min = 0 if state.stay_bound_ms is None or withdrawn else min(state.stay_bound_ms // 60_000, MAX_MINUTES)
        risk = 0.0 if state.risk_15min is None or withdrawn else state.risk_15min
        vehicles["seq"][v] = min(state.seq, MAX_SEQ)
        vehicles["reasons"][v] = self.cell.reason_set(sum(BIT_OF_REASON[code] for code in reasons))
        vehicles["stay_min"][v] = bound_min
        vehicles["risk_pct"][v] = round(risk * 100)
        region = self.cell.region(state.region)
        moved = region != int(vehicles["region"][v])
        self.cell.k.report(
            self.cell.t,
            v,
            NUMBER_OF_STATE[state.state],
            NONE if state.model is None else self.cell.claimed_model(state.model),
            int(vehicles["region"][v]) if withdrawn else region,
            min(max(1, state.slots), MAX_SLOTS),
            0 if withdrawn else min(state.permit_w, MAX_SLOTS),
            now_ms,
        )
        if state.memory_gb is not None or withdrawn:
            vehicles["memory_gb"][v] = 0 if withdrawn else state.memory_gb
        if state.models_on_disk is not None or withdrawn:
            vehicles["on_disk"][v] = 0 if withdrawn else self._on_disk(state.models_on_disk or [])
        if withdrawn:
            return []
        commands: Commands = []
        if moved:
            self._mask_again()
            commands.append(ev.SaveRegion(vehicle_id=vehicle_id, region=state.region))
            commands += self._expel(v, "it has left the regions of their job")
        commands += self._relieve(int(vehicles["site"][v]), first=v)
        after = self._in_words(v)
        if before != after:
            commands.append(ev.Note(subject=vehicle_id, what=after))
        return commands

    def _in_words(self, v: int) -> str:
        """What a vehicle does and, when it may not work, why."""
        vehicles = self.cell.t.vehicles
        return in_words(int(vehicles["state"][v]), self.cell.reason_sets[int(vehicles["reasons"][v])])

    def _mood(self, now_ms: int) -> Ints:
        """What ``reporting.report_many`` has to know of the plan."""
        old = now_ms - self._planned_ms >= self.plan_every_ms
        return np.array([bool(self.jobs), old, self._unplanned, bool(self._tails)], np.int64)

    def _on_disk(self, names: list[str]) -> int:
        """Models as bits: those that vehicles serve or jobs ask for already, as any other would use the rows up."""
        rows = {row for name in names if 0 <= (row := self.cell.find_model(name)) < ON_DISK_ROWS}
        return sum(1 << row for row in rows)

    def _set_withdrawn(self, v: int, *, withdrawn: bool, seen: bool) -> None:
        flags = int(self.cell.t.vehicles["flags"][v]) & ~(WITHDRAWN | WITHDRAWAL_SEEN)
        flags |= (WITHDRAWN if withdrawn else 0) | (WITHDRAWAL_SEEN if seen else 0)
        self.cell.t.vehicles["flags"][v] = flags

    def _hear_of_withdrawal(self, v: int, vehicle_id: str, state: State) -> Commands:
        """A vehicle that has said that its consent is withdrawn, and is permitted later, has a new one by then.

        It checks the owner's signature itself; the owner may have given the new one in the car.
        """
        flags = int(self.cell.t.vehicles["flags"][v])
        if not flags & WITHDRAWN:
            return []
        seen = bool(flags & WITHDRAWAL_SEEN)
        if any(reason.code is ReasonCode.CONSENT_WITHDRAWN for reason in state.reasons):
            if seen:
                return []
            self._set_withdrawn(v, withdrawn=True, seen=True)
        elif seen and state.state in {VehicleState.READY, VehicleState.WORKING}:
            self._set_withdrawn(v, withdrawn=False, seen=False)
        else:
            return []
        return [ev.SaveWithdrawal(vehicle_id=vehicle_id, seen=not seen)]

    def _owner_spoke(self, event: ev.OwnerSpoke, now_ms: int) -> Commands:
        """The owner takes the car, or gives it back: what was done is paid, what runs goes to others."""
        v = self.cell.vehicle(event.vehicle_id)
        vehicles = self.cell.t.vehicles
        vehicles["paused_until_s"][v] = until_s(event.paused_until_ms)
        if event.withdrawn != bool(vehicles["flags"][v] & WITHDRAWN):
            self._set_withdrawn(v, withdrawn=event.withdrawn, seen=False)
            self._await_permit(v)
        commands: Commands = []
        if event.withdrawn:
            told = self.cell.reason_sets[int(vehicles["reasons"][v])]
            vehicles["reasons"][v] = self.cell.reason_set(told & BIT_OF_REASON[ReasonCode.CONSENT_WITHDRAWN])
            self._permit_gone(v)
            for column in ("stay_min", "risk_pct"):
                vehicles[column][v] = 0
            commands.append(ev.DropStory(subject=event.vehicle_id))
        else:
            commands.append(ev.Note(subject=event.vehicle_id, what=event.what))
        self.cell.k.recount(self.cell.t, v)
        commands.append(ev.SendOwnerNews(vehicle_id=event.vehicle_id))
        if not event.withdrawn and now_ms >= event.paused_until_ms:
            return commands + self._fill(v, now_ms)
        for row in self.cell.leases_of(v):
            commands.append(self._revoke(row))
            commands += self._take_back(row, "the owner asked for it")
        return commands + self._fill_all(now_ms)

    def _reconcile(self, v: int, vehicle_id: str, state: State, now_ms: int) -> Commands:
        """Compare the leases that the vehicle says it holds with ours."""
        held = set(state.held)
        commands: Commands = []
        ours: set[str] = set()
        for row in self.cell.leases_of(v):
            lease_id = self.lease_id(row)
            ours.add(lease_id)
            commands += self._compare(row, held=lease_id in held, now_ms=now_ms)
        if not held <= ours:
            commands += [
                ev.SendRevoke(vehicle_id=vehicle_id, lease_id=lease_id)
                for lease_id in state.held
                if lease_id not in ours
            ]
        return commands

    def _compare(self, row: int, *, held: bool, now_ms: int) -> Commands:
        leases = self.cell.t.leases
        flags = int(leases["flags"][row])
        granted_ms = int(leases["granted_ms"][row])
        if held:
            leases["flags"][row] = flags | SEEN
            leases["missing_after_ms"][row] = NOT_MISSING
            return []
        permitted = self.cell.k.present(self.cell.t, int(leases["vehicle"][row]))
        if flags & SEEN:
            # It has ended there; its last results may still be on their way through the stream.
            # When the owner has taken the car meanwhile, that they come late is nobody's fault.
            if leases["missing_after_ms"][row] == NOT_MISSING:
                leases["missing_after_ms"][row] = after_ms(now_ms, granted_ms)
            flags |= 0 if permitted else EXCUSED
            leases["flags"][row] = flags
            if now_ms - granted_ms - int(leases["missing_after_ms"][row]) < MISSING_AFTER_MS:
                return []
            failed_ms = None if flags & EXCUSED else now_ms
            return self._take_back(row, "results did not arrive", failed_ms=failed_ms)
        if self.job_of(row).cancelling_ms is not None:
            return self._take_back(row, "its job was cancelled")
        if now_ms - granted_ms - int(leases["sent_after_ms"][row]) < RESEND_AFTER_MS:
            return []
        flags |= 0 if permitted else EXCUSED
        leases["flags"][row] = flags
        if leases["sends"][row] >= MAX_SENDS:
            return self._take_back(row, "the vehicle did not take it", failed_ms=None if flags & EXCUSED else now_ms)
        leases["sent_after_ms"][row] = after_ms(now_ms, granted_ms)
        leases["sends"][row] += 1
        return [self._grant(row, now_ms)]

    def _vehicle_revoked(self, event: ev.VehicleRevoked, now_ms: int) -> Commands:
        v = self.cell.find(event.vehicle_id)
        if v == NONE:
            return []
        self.cell.t.vehicles["flags"][v] |= OFFLINE
        self.cell.k.recount(self.cell.t, v)
        commands: Commands = []
        for row in self.cell.leases_of(v):
            commands.append(self._revoke(row))
            commands += self._take_back(row, "the vehicle was struck off")
        self._stop_drawing(v)  # live requests of it that have not been told yet end without it
        self.cell.forget_vehicle(v)
        return commands + self._fill_all(now_ms)

    # -- live requests -------------------------------------------------------------------------------------------------

    def place_live(self, model: str, tried: frozenset[str], now_ms: int, *, region: str | None = None) -> str | None:
        """The vehicle for a live request: least likely to leave among a few free ones; None when there is none.

        The caller counts it with ``live_began`` and ``live_over``. ``tried`` are vehicles that broke or refused it.
        """
        row = self.cell.find_model(model)
        if row == NONE:
            return None
        rows = np.array([v for v in map(self.cell.find, sorted(tried)) if v != NONE], np.int64)
        where = NONE if region is None else self.cell.region(region)
        v = int(self.cell.k.place(self.cell.t, row, where, now_ms, rows))
        return None if v == NONE else self.cell.ids.name(v)

    def is_free(self, vehicle_id: str, model: str, now_ms: int) -> bool:
        """Whether a vehicle has this model, a free slot, and is not about to leave: no other one is much better."""
        v, row = self.cell.find(vehicle_id), self.cell.find_model(model)
        if NONE in {v, row}:
            return False
        return bool(self.cell.k.is_free(self.cell.t, v, row, now_ms, np.zeros(0, np.int64)))

    def serves(self, model: str) -> bool:
        """Whether any vehicle could run this model now."""
        return self.serving(model) > 0

    def live_began(self, vehicle_id: str) -> None:
        """A live request was sent to this vehicle."""
        v = self.cell.vehicle(vehicle_id)
        live = self.cell.t.vehicles["live"]
        live[v] = min(int(live[v]) + 1, MAX_SLOTS)
        self.cell.k.draw(self.cell.t, v)

    def live_over(self, vehicle_id: str) -> None:
        """It ended or moved on."""
        v = self.cell.find(vehicle_id)
        if v != NONE:
            live = self.cell.t.vehicles["live"]
            live[v] = max(0, int(live[v]) - 1)
            self.cell.k.draw(self.cell.t, v)

    def may_tell(self, subject: str) -> bool:
        """Whether a story may be kept of this vehicle or job: of no car whose owner has withdrawn the consent."""
        v = self.cell.find(subject)
        return v == NONE or not self.cell.t.vehicles["flags"][v] & WITHDRAWN

    # -- time ----------------------------------------------------------------------------------------------------------

    def _ticked(self, event: ev.Ticked, now_ms: int) -> Commands:
        del event
        commands: Commands = []
        vehicles = self.cell.t.vehicles[: self.cell.ids.rows]
        silent = (vehicles["seen_ms"] <= now_ms - SILENT_AFTER_MS) & ((vehicles["flags"] & OFFLINE) == 0)
        for v in map(int, np.flatnonzero(silent)):
            self.cell.t.vehicles["flags"][v] |= OFFLINE
            self.cell.k.recount(self.cell.t, v)
            commands.append(ev.Note(subject=self.cell.ids.name(v), what="offline: no report"))
        commands += self._miss(now_ms)
        leases = self.cell.t.leases
        ends_ms = leases["granted_ms"] + leases["life_ms"]
        over = np.flatnonzero((leases["number"] != NONE) & (ends_ms <= now_ms - EXPIRY_GRACE_MS))
        for row in map(int, over):
            if leases["number"][row] == NONE:
                continue  # its job has just ended
            v = int(leases["vehicle"][row])
            commands.append(self._revoke(row))
            permitted = int(self.cell.t.vehicles["state"][v]) in _PERMITTED
            commands += self._take_back(row, "the lease ran out", failed_ms=now_ms if permitted else None)
        for job in list(self.jobs.values()):
            job.measure(now_ms)
            if now_ms >= max(job.expires_ms, self._settled_ms):
                commands += self._end(job, "the completion window closed")
            elif job.cancelling_ms is not None and now_ms - job.cancelling_ms >= CANCEL_GRACE_MS:
                commands += self._end(job, "cancelled; lines that still ran were stopped")
        return commands + self._fill_all(now_ms, anew=False)

    def _miss(self, now_ms: int) -> Commands:
        """Give to others what silent vehicles hold, each lease when its job can wait no longer."""
        leases, seen_ms = self.cell.t.leases, self.cell.t.vehicles["seen_ms"]
        rows = np.flatnonzero(leases["number"] != NONE)
        rows = rows[seen_ms[leases["vehicle"][rows]] <= now_ms - SILENT_AFTER_MS]
        commands: Commands = []
        for row in map(int, rows[np.argsort(leases["number"][rows], kind="stable")]):
            if leases["number"][row] == NONE:
                continue  # its job has just ended
            silent_ms = now_ms - int(seen_ms[leases["vehicle"][row]])
            if silent_ms >= self.cell.k.patience_ms(self.cell.t, int(leases["job"][row])):
                commands += self._take_back(row, "the vehicle is silent")
        return commands


_PERMITTED: Final = frozenset((NUMBER_OF_STATE[VehicleState.READY], NUMBER_OF_STATE[VehicleState.WORKING]))
