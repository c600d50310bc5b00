"""The ground on which the scheduler stands: jobs and leases, how lines are granted and how they come back.

Called by: ``core.scheduler``, ``core.results``. Must not: know messages.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from motorpool.core import events as ev
from motorpool.core.cell import Cell
from motorpool.core.columns import EXCUSED, IN_ORDER, NONE, READY, SHADOW, WORKING, Floats, Ints, until_s
from motorpool.core.fleet import Leases, Vehicles, incarnation
from motorpool.core.jobs import DONE, LEASED, NOBODY, Job
from motorpool.core.kernels import (
    MANY,
    MAX_DEPTH_MS,
    MAX_LEASE_MS,
    MIN_LEASE_MS,
    NOTHING_WAITS,
    OK,
    QUEUE_FULL,
    USUAL_DEPTH_MS,
)
from motorpool.core.ledger import Rests
from motorpool.core.ledger import job as job_rest
from motorpool.core.pricing import owner_pay
from motorpool.wire import MAX_OFFLINE_MS

FILL_EVERY_MS: Final = 100  # handed back lines are granted to others at most this often; and with each tick
PLAN_EVERY_MS: Final = 1_000
MAX_FILLED: Final = 4_096  # vehicles that are looked at in one go; the others with the next tick
MAX_RECALLED: Final = 1_024  # leases, in one plan
MAX_GRANT_LINES: Final = 1_024
MAX_GRANT_BYTES: Final = 1_048_576
BACKOFF_MS: Final = 2_000  # no grants for so long to a vehicle that has just handed work back
MAX_DOUBLINGS: Final = 7  # of that, when it fails again and again: four minutes
MAX_FAILURES: Final = 200
LATE: Final = 2  # a lease that takes so many times as long as expected is run by another one too
MIN_LATE_MS: Final = 30_000
LAST_PART: Final = 100  # of a job: when no more than one line in so many is left

Commands = list[ev.Command]


class Granting:
    """Jobs, leases and the columns of a cell.

    ``epoch`` grows with every start from the books; it makes ids of leases unique for ever, whatever the clock does.
    ``fast``: compiled kernels, for a large fleet.
    """

    def __init__(self, epoch: int = 0, *, fast: bool = False) -> None:
        self.epoch = epoch
        self.cell = Cell(fast=fast)
        self.jobs: dict[int, Job] = {}
        self.job_numbers: dict[str, int] = {}
        self.rests = Rests()
        self.residency: dict[int, tuple[str, ...]] = {}  # regions that a job is bound to, by its number
        self.vehicles = Vehicles(self.cell)
        self.leases = Leases(self.cell, self.lease_row, self.lease_id, self.job_of)
        self._by_row: dict[int, Job] = {}
        self._old_ids: dict[str, int] = {}  # leases of earlier epochs, by their names
        self._old_names: dict[int, str] = {}
        self._base: dict[int, dict[int, int]] = {}  # tokens of the checkpoints that came with a lease
        self._empty_leases: list[str] = []  # from the books, of which every line has ended
        self._filled_ms = -FILL_EVERY_MS
        self.plan_every_ms = PLAN_EVERY_MS  # what vehicles get lines by is no older; a simulation of weeks takes longer
        self._planned_ms = -PLAN_EVERY_MS
        self._tails: list[Job] = []  # of which only the last lines run
        self._rows: Ints = np.zeros(MAX_RECALLED, np.int64)
        self._recalled: Commands = []  # by the last plan, and not sent yet
        self._unplanned = False  # a job has waiting lines that the plan does not know of

    # -- leases and their names ----------------------------------------------------------------------------------------

    def job_of(self, row: int) -> Job:
        """The job of a lease."""
        return self._by_row[int(self.cell.t.leases["job"][row])]

    def lease_id(self, row: int) -> str:
        """The name of a lease."""
        old = self._old_names.get(row)
        if old is not None:
            return old
        number = int(self.cell.t.leases["number"][row])
        return f"{self.job_of(row).job_id}-{self.epoch:x}-{(number >> 24) + 1:x}-{row:x}"

    def lease_row(self, lease_id: str) -> int:
        """The row of a lease that is not over, or NONE."""
        old = self._old_ids.get(lease_id)
        if old is not None:
            return old
        try:
            row = int(lease_id.rpartition("-")[2], 16)
        except ValueError:
            return NONE
        leases = self.cell.t.leases
        if not 0 <= row < len(leases) or leases["number"][row] == NONE or row in self._old_names:
            return NONE
        return row if self.lease_id(row) == lease_id else NONE

    def _new_lease(self, job: Job, v: int, lines: list[int], *, granted_ms: int, expires_ms: int) -> int:
        """A lease of lines that wait, with all that is counted."""
        work = len(lines) * float(self.cell.t.jobs["work_per_line"][job.row])
        row = self.cell.lease(v, job.row, len(lines), work, now_ms=granted_ms, expires_ms=expires_ms)
        job.lease(lines, row)
        return row

    def _saved(self, row: int) -> ev.SaveLease:
        leases = self.cell.t.leases
        v = int(leases["vehicle"][row])
        job = self.job_of(row)
        return ev.SaveLease(
            lease_id=self.lease_id(row),
            job_no=job.job_no,
            vehicle_id=self.cell.ids.name(v),
            incarnation=incarnation(self.cell, v),
            granted_ms=int(leases["granted_ms"][row]),
            expires_ms=self.cell.expires_ms(row),
            lines=job.lines_of(row),
            base=self._base.get(row, {}),
        )

    def _grant(self, row: int, now_ms: int) -> ev.SendGrant:
        leases = self.cell.t.leases
        v = int(leases["vehicle"][row])
        job = self.job_of(row)
        pay_input_micro, pay_output_micro = owner_pay(job.price)
        return ev.SendGrant(
            lease_id=self.lease_id(row),
            job_no=job.job_no,
            vehicle_id=self.cell.ids.name(v),
            incarnation=incarnation(self.cell, v),
            model=job.model,
            kind=job.kind,
            ttl_ms=max(1, self.cell.expires_ms(row) - now_ms),
            lines=job.lines_of(row),
            with_checkpoint=sorted(self._base.get(row, {})),
            # What comes after the window is worth nothing to anybody.
            max_offline_ms=min(MAX_OFFLINE_MS, max(0, job.expires_ms - now_ms)),
            pay_input_micro=pay_input_micro,
            pay_output_micro=pay_output_micro,
        )

    def _revoke(self, row: int, lines: list[int] | None = None, *, keep_running: bool = False) -> ev.SendRevoke:
        vehicle_id = self.cell.ids.name(int(self.cell.t.leases["vehicle"][row]))
        return ev.SendRevoke(vehicle_id=vehicle_id, lease_id=self.lease_id(row), lines=lines, keep_running=keep_running)

    # -- lines come back -----------------------------------------------------------------------------------------------

    def _take_back(self, row: int, why: str, *, failed_ms: int | None = None) -> Commands:
        """End a lease that was not handed back; its lines wait again. ``failed_ms``: now, if that is a failure."""
        job = self.job_of(row)
        v = int(self.cell.t.leases["vehicle"][row])
        vehicle_id = self.cell.ids.name(v)
        lines = job.lines_of(row)
        commands = self._put_back(job, row, lines)
        commands += self._forget(row)
        if failed_ms is not None:
            self._failed(v, failed_ms)
        if lines:
            commands.append(ev.Note(subject=vehicle_id, what=f"{len(lines)} lines taken back: {why}"))
        return commands + self._end_if_done(job) if job.job_no in self.jobs else commands

    def _put_back(self, job: Job, row: int, lines: list[int]) -> Commands:
        """These lines of a lease wait again. Its vehicle may have finished them all the same, so it is remembered."""
        if not lines:
            return []
        if self.cell.t.leases["flags"][row] & SHADOW:
            return []  # another one has them too
        vehicle_id = self.cell.ids.name(int(self.cell.t.leases["vehicle"][row]))
        job.put_back(lines)
        used, customer = self.cell.t.tenants["used"], int(self.cell.t.jobs["tenant"][job.row])
        work = len(lines) * float(self.cell.t.jobs["work_per_line"][job.row])
        used[customer] = max(float(used[customer]) - work, 0.0)  # it has not had them after all
        self._note_waiting(job)
        return self._remember(job, vehicle_id, lines)

    def _remember(self, job: Job, vehicle_id: str, lines: list[int]) -> Commands:
        new = [line for line in lines if vehicle_id not in job.held.get(line, ())]
        for line in new:
            job.held[line] = (*job.held.get(line, ()), vehicle_id)
        return [ev.SaveHeld(job_no=job.job_no, vehicle_id=vehicle_id, lines=new)] if new else []

    def _note_waiting(self, job: Job) -> None:
        if not self.cell.t.jobs["flags"][job.row] & IN_ORDER:
            self._unplanned = True

    def _may_speak_of(self, job: Job, line: int, vehicle_id: str) -> bool:
        """Whether this vehicle holds the line, or held it once."""
        if not 0 <= line < job.total or job.state[line] == DONE:
            return False
        holder = int(job.holder[line])
        if holder != NOBODY and self.cell.ids.name(int(self.cell.t.leases["vehicle"][holder])) == vehicle_id:
            return True
        return vehicle_id in job.held.get(line, ())

    def _forget(self, row: int) -> Commands:
        """A lease is over; what is left of its lines is out of the job's columns already."""
        lease_id = self.lease_id(row)
        leases = self.cell.t.leases
        if leases["flags"][row] & SHADOW:
            job = self.job_of(row)
            job.shadows = {line: shadow for line, shadow in job.shadows.items() if shadow != row}
        left = int(leases["left"][row])
        if left:
            self.cell.k.shrink_lease(self.cell.t, row, left)
        self.cell.k.close_lease(self.cell.t, row)
        self._base.pop(row, None)
        self._old_ids.pop(self._old_names.pop(row, ""), None)
        return [ev.DropLease(lease_id=lease_id)]

    def _remove_lines(self, row: int, count: int, *, waiting: bool) -> Commands:
        """Lines of a lease have ended, or (``waiting``) wait again, which the books must know."""
        if self.cell.k.shrink_lease(self.cell.t, row, count) == 0:
            return self._forget(row)
        return [self._saved(row)] if waiting and count else []

    def _end_if_done(self, job: Job) -> Commands:
        over = job.done == job.total or (job.cancelling_ms is not None and job.leased == 0)
        return self._end(job, "all lines have ended" if job.done == job.total else "cancelled") if over else []

    def _leases_of(self, job: Job) -> list[int]:
        numbers = self.cell.t.leases["number"]
        rows = np.flatnonzero((self.cell.t.leases["job"] == job.row) & (numbers != NONE))
        return [int(row) for row in rows[np.argsort(numbers[rows], kind="stable")]]

    def _end(self, job: Job, why: str) -> Commands:
        commands: Commands = []
        for row in self._leases_of(job):
            if self.cell.t.leases["left"][row]:
                commands.append(self._revoke(row))
            commands += self._forget(row)
        del self.jobs[job.job_no]
        del self.job_numbers[job.job_id]
        del self._by_row[job.row]
        self.residency.pop(job.job_no, None)
        self.rests.drop(job_rest(job.job_id))
        self._unplanned = True
        job.leave()
        if job.cancelling_ms is None:
            commands.append(ev.SaveJobStatus(job_no=job.job_no, status="finalizing"))
        return [*commands, ev.Note(subject=job.job_id, what=why), ev.AssembleFiles(job_no=job.job_no)]

    # -- failures ------------------------------------------------------------------------------------------------------

    def _wait(self, v: int, now_ms: int, times: int = 1) -> None:
        """Give a vehicle nothing for a while."""
        blocked = self.cell.t.vehicles["blocked_until_s"]
        blocked[v] = max(int(blocked[v]), until_s(now_ms + BACKOFF_MS * times))

    def _failed(self, v: int, now_ms: int) -> None:
        """It had work and nothing came of it: wait, twice as long each time."""
        failures = self.cell.t.vehicles["failures"]
        self._wait(v, now_ms, times=1 << min(int(failures[v]), MAX_DOUBLINGS))
        failures[v] = min(int(failures[v]) + 1, MAX_FAILURES)

    # -- granting ------------------------------------------------------------------------------------------------------

    def _plan(self, now_ms: int) -> None:
        """Order the jobs anew."""
        self._planned_ms, self._unplanned = now_ms, False
        rows: Ints = np.array([job.row for job in self.jobs.values() if job.cancelling_ms is None], np.int64)
        self.cell.k.plan(self.cell.t, rows, now_ms)
        self._recalled += self._recall(now_ms)
        self._tails = [job for job in self.jobs.values() if _is_tail(job)]

    def _recall(self, now_ms: int) -> Commands:
        """Ask back what is not begun of leases that would be late; others get it when it has come."""
        found = int(self.cell.k.recall(self.cell.t, now_ms, self._rows))
        return [self._revoke(int(row), keep_running=True) for row in self._rows[:found]]

    def _fill_all(self, now_ms: int, *, anew: bool = True) -> Commands:
        """Grant work to every vehicle whose queue is less than half full, in the order in which they first came.

        Not ``anew``: by the plan that there is, if it is young enough and has every job that waits.
        """
        commands: Commands = []
        self._filled_ms = now_ms
        if not self.jobs:
            return commands
        if anew or self._unplanned or now_ms - self._planned_ms >= self.plan_every_ms:
            self._plan(now_ms)
        t = self.cell.t
        if t.models["count"].any():
            for v in self._hungry(now_ms):
                commands += self._fill(v, now_ms)
        return commands + self._take_recalled()

    def _take_recalled(self) -> Commands:
        recalled, self._recalled = self._recalled, []
        return recalled

    def _hungry(self, now_ms: int) -> list[int]:
        """Those that ``kernels.share`` may give lines to: their queue is half empty, or they hold few lines."""
        vehicles = self.cell.t.vehicles[: self.cell.ids.rows]
        state = vehicles["state"]
        may = ((state == READY) | (state == WORKING)) & (vehicles["counted_place"] != NONE)
        now_s = now_ms // 1000
        may &= (vehicles["blocked_until_s"] <= now_s) & (vehicles["paused_until_s"] <= now_s)
        rows = np.flatnonzero(may)
        model, held = vehicles["model"][rows], vehicles["outstanding"][rows]
        many = self.cell.t.models["serving"][model] >= MANY
        spare_ms = np.where(many, self.cell.t.tight[model, vehicles["region"][rows]] // 4, 0)
        depth_ms = np.maximum(vehicles["outage_s"][rows].astype(np.float64) * 3000.0, spare_ms)
        depth_ms = np.clip(depth_ms, USUAL_DEPTH_MS, MAX_DEPTH_MS)  # as ``kernels.depth_ms`` has it, at most
        queued_ms = held * self._least_work()[model] * 999.0  # a little less than it is, for what rounding does
        hungry = (held <= vehicles["slots"][rows]) | (2.0 * queued_ms <= vehicles["speed"][rows] * depth_ms)
        rows = rows[(self.cell.t.models["count"][model] > 0) & hungry]
        return [int(row) for row in rows[:MAX_FILLED]]

    def _least_work(self) -> Floats:
        """The least that a line of any job takes, by model."""
        jobs = self.cell.t.jobs
        mine: Ints = np.array([job.row for job in self.jobs.values()], np.int64)
        least: Floats = np.full(len(self.cell.t.models), np.inf)
        np.minimum.at(least, jobs["model"][mine], jobs["work_per_line"][mine].astype(np.float64))
        return np.where(np.isinf(least), 0.0, least)

    def _fill_soon(self, now_ms: int) -> Commands:
        """Grant what has just come back, unless that was done a moment ago: the next tick does it then."""
        return self._fill_all(now_ms, anew=False) if now_ms - self._filled_ms >= FILL_EVERY_MS else []

    def _fill(self, v: int, now_ms: int) -> Commands:
        """Grant work when the vehicle's queue is less than half full."""
        cell = self.cell
        if not self.jobs or cell.k.why_not(cell.t, v, now_ms) != OK:
            return []
        if now_ms - self._planned_ms >= self.plan_every_ms:
            self._plan(now_ms)
        commands: Commands = []
        narrowed = int(cell.t.vehicles["narrowed"][v])
        if narrowed and cell.t.vehicles["outstanding"][v]:
            return commands  # it takes less than it should: one small grant after the other
        while (not narrowed or not commands) and (j := self._pull(v, now_ms)) != NONE:
            job = self._by_row[j]
            most = min(int(cell.out[0]), MAX_GRANT_LINES) >> narrowed
            lines = job.take(max(most, 1), MAX_GRANT_BYTES)
            if not lines:
                break
            commands += self._lease_out(job, v, lines, now_ms)
        if not commands and cell.t.vehicles["outstanding"][v] == 0:
            commands = self._run_twice(v, now_ms)
        return commands

    def _pull(self, v: int, now_ms: int) -> int:
        """The job that a vehicle gets lines of next, or NONE; the plan is made anew if it lacks one that waits."""
        cell = self.cell
        j = int(cell.k.pull(cell.t, v, now_ms, cell.out))
        if j == NONE and self._unplanned and int(cell.out[1]) != QUEUE_FULL:
            self._plan(now_ms)
            j = int(cell.k.pull(cell.t, v, now_ms, cell.out))
        return j

    def _expires_ms(self, job: Job, v: int, lines: list[int], now_ms: int) -> int:
        t = self.cell.t
        expected_ms = int(self.cell.k.lease_ms(t, v, len(lines) * float(t.jobs["work_per_line"][job.row])))
        overruns = max((job.overruns[line] for line in lines if line in job.overruns), default=0)
        return now_ms + min(max(MIN_LEASE_MS << overruns, expected_ms), MAX_LEASE_MS)

    def _lease_out(self, job: Job, v: int, lines: list[int], now_ms: int) -> Commands:
        expires_ms = self._expires_ms(job, v, lines, now_ms)
        row = self._new_lease(job, v, lines, granted_ms=now_ms, expires_ms=expires_ms)
        return self._granted(job, v, row, lines, now_ms)

    def _granted(self, job: Job, v: int, row: int, lines: list[int], now_ms: int) -> Commands:
        base = {line: sum(n for _, n in job.carried[line]) for line in lines if line in job.carried}
        if base:
            self._base[row] = base
        commands: Commands = [self._saved(row), self._grant(row, now_ms)]
        if base:
            what = f"took over {len(base)} lines with {sum(base.values())} tokens that others had generated"
            commands.append(ev.Note(subject=self.cell.ids.name(v), what=what))
        return commands

    def _run_twice(self, v: int, now_ms: int) -> Commands:
        """Let an idle vehicle run the last lines of a job a second time, when those who hold them are late.

        The first answer counts. So one slow or silent vehicle does not hold up a whole job.
        """
        t = self.cell.t
        model = int(t.vehicles["model"][v])
        for job in self._tails:
            over = job.job_no not in self.jobs or not _is_tail(job)
            if over or int(t.jobs["model"][job.row]) != model:
                continue
            if cell_refuses(self.cell, v, job):
                continue
            row = self._latest(job, v, now_ms)
            if row == NONE:
                continue
            lines = [line for line in job.lines_of(row) if line not in job.shadows]
            lines = lines[: max(1, int(t.vehicles["slots"][v]))]
            if lines:
                return self._shadow(job, v, lines, now_ms)
        return []

    def _latest(self, job: Job, v: int, now_ms: int) -> int:
        """The lease of this job by another vehicle that is later than expected, the oldest of them, or NONE."""
        leases = self.cell.t.leases
        for row in self._leases_of(job):
            holder = int(leases["vehicle"][row])
            if holder == v or leases["flags"][row] & (SHADOW | EXCUSED):
                continue
            speed = float(self.cell.t.vehicles["speed"][holder])
            work = int(leases["left"][row]) * float(self.cell.t.jobs["work_per_line"][job.row])
            expected_ms = work * 1000.0 / speed if speed > 0 else 0.0
            if now_ms - int(leases["granted_ms"][row]) > max(LATE * expected_ms, MIN_LATE_MS):
                if all(line in job.shadows for line in job.lines_of(row)):
                    continue
                return row
        return NONE

    def _shadow(self, job: Job, v: int, lines: list[int], now_ms: int) -> Commands:
        t = self.cell.t
        work = len(lines) * float(t.jobs["work_per_line"][job.row])
        expires_ms = self._expires_ms(job, v, lines, now_ms)
        row = self.cell.lease(v, job.row, len(lines), work, now_ms=now_ms, expires_ms=expires_ms)
        t = self.cell.t
        t.jobs["leased"][job.row] -= len(lines)  # they are counted already
        t.leases["flags"][row] |= SHADOW
        job.shadows.update(dict.fromkeys(lines, row))
        vehicle_id = self.cell.ids.name(v)
        note = ev.Note(subject=vehicle_id, what=f"{len(lines)} late lines of {job.job_id} run here too")
        commands = self._remember(job, vehicle_id, lines)
        return [*commands, *self._granted(job, v, row, lines, now_ms), note]

    def validate(self) -> None:
        """Every invariant of this state; for tests and simulation."""
        t = self.cell.t
        held = dict.fromkeys((job.row for job in self.jobs.values()), 0)
        outstanding = np.zeros(len(t.vehicles), np.int64)
        for row in map(int, self.cell.all_leases()):
            job = self.job_of(row)
            lines = job.lines_of(row)
            assert lines, "an empty lease is over"
            assert len(lines) == t.leases["left"][row], "the count of a lease is true"
            assert job.job_no in self.jobs
            assert self.lease_row(self.lease_id(row)) == row
            assert row in self.cell.leases_of(int(t.leases["vehicle"][row]))
            outstanding[int(t.leases["vehicle"][row])] += len(lines)
            if t.leases["flags"][row] & SHADOW:
                continue
            held[job.row] += len(lines)
            for line in lines:
                assert job.state[line] == LEASED, "a leased line is LEASED"
        assert (outstanding == t.vehicles["outstanding"]).all(), "what vehicles hold is counted"
        for job in self.jobs.values():
            job.validate()
            assert held[job.row] == job.leased, "every leased line has a lease"
            waits = job.pending > 0 and job.cancelling_ms is None
            known = t.jobs["flags"][job.row] & IN_ORDER
            assert not waits or known or self._unplanned, "a job with waiting lines would never be granted"
        self._validate_counts()

    def _validate_counts(self) -> None:
        t = self.cell.t
        serving = np.zeros(len(t.models), np.int64)
        for v in self.cell.ids:
            if self.cell.k.present(t, v):
                assert t.vehicles["state"][v] in {READY, WORKING}, "a denied vehicle gets nothing"
                if t.vehicles["model"][v] != NONE:
                    serving[int(t.vehicles["model"][v])] += 1
        assert (serving == t.models["serving"]).all(), "the counts of models are true"


def _is_tail(job: Job) -> bool:
    """Whether nothing of a job waits and no more than its last hundredth (or one line) runs."""
    few = 0 < job.leased * LAST_PART <= max(job.total, LAST_PART)
    return few and job.pending == 0 and job.cancelling_ms is None


def cell_refuses(cell: Cell, v: int, job: Job) -> bool:
    """Whether a vehicle may not run a job for a lasting reason: region, trust, memory."""
    return int(cell.k.refusal(cell.t, v, job.row)) not in {OK, NOTHING_WAITS}
