"""Who runs what: the one place where lines are granted, taken back, accepted and paid.

Theory. A line is PENDING, LEASED or DONE. ``handle`` is the only way in; it mutates the state and returns commands. The
shell commits the commands that change the books in one transaction and performs the others after it, so whatever a
vehicle sees is already in the books. A result counts when its line is not DONE yet, whichever lease it came under; the
books' primary key says the same a second time. A lease ends when its last line ends, when the vehicle hands it back,
when it runs out, or when its vehicle is another incarnation, silent for too long or struck off; its lines then wait
again, each with the longest checkpoint that is known. Departures are never held against a line; engine crashes and
server errors are, and a line that has caused MAX_STRIKES of them ends in a named error.

Must not: read clocks, mint random ids, see bodies. Called by: ``server.loop`` and the simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from motorpool.core import events as ev
from motorpool.core.accepted import Accepted
from motorpool.core.attribution import co2_ug
from motorpool.core.carbon import grams_per_kwh
from motorpool.core.fleet import Vehicle
from motorpool.core.jobs import DONE, LEASED, NOBODY, Job, Lease, Waiting
from motorpool.core.ledger import settle
from motorpool.core.pricing import Shares, cost_micro, extend, owner_pay, split, trim
from motorpool.types import ReasonCode, ReturnReason, VehicleState
from motorpool.wire import MAX_OFFLINE_MS, State

TICK_MS: Final = 1_000
SILENT_AFTER_MS: Final = 20_000  # no report for so long: the vehicle is taken for gone
RESEND_AFTER_MS: Final = 3_000  # a grant that no report mentions is sent again
MAX_SENDS: Final = 5
MISSING_AFTER_MS: Final = 15_000  # a lease that the vehicle has ended while its results did not come
MIN_LEASE_MS: Final = 300_000
MAX_LEASE_MS: Final = 3_600_000
EXPIRY_GRACE_MS: Final = 15_000  # the vehicle's clock may have started later
CANCEL_GRACE_MS: Final = 600_000  # lines that run when a job is cancelled may finish for so long
FILL_EVERY_MS: Final = 100  # handed back lines are granted to others at most this often; and with each tick
SETTLE_MS: Final = 15_000  # after a start no window closes for so long: what was finished in time may still arrive
MAX_STRIKES: Final = 3
MAX_STRIKES_IN_ALL: Final = 9
MAX_GRANT_LINES: Final = 1_024
MAX_GRANT_BYTES: Final = 1_048_576
LIVE_CANDIDATES: Final = 8
MAX_LIVE_PER_SLOT: Final = 64

Commands = list[ev.Command]


class Scheduler:
    """The state of one cell's scheduling.

    ``epoch`` grows with every start from the books; it makes ids of leases unique for ever, whatever the clock does.
    """

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self.jobs: dict[int, Job] = {}
        self.job_numbers: dict[str, int] = {}
        self.vehicles: dict[str, Vehicle] = {}
        self.leases: dict[str, Lease] = {}
        self.by_number: dict[int, Lease] = {}
        self._lease_count = 0
        self._serving: dict[str, int] = {}  # how many present vehicles have each model
        self._live_turn = 0
        self._settled_ms = 0
        self._filled_ms = -FILL_EVERY_MS
        self._waiting = Waiting()
        self._handlers: dict[type, Callable[[Any, int], Commands]] = {
            ev.JobStarted: self._job_started,
            ev.CancelAsked: self._cancel_asked,
            ev.VehicleReported: self._vehicle_reported,
            ev.VehicleRevoked: self._vehicle_revoked,
            ev.OwnerSpoke: self._owner_spoke,
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
        self._waiting.add(job)
        self.jobs[job.job_no] = job
        self.job_numbers[job.job_id] = job.job_no
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
        job.held = {line: vehicles for line, vehicles in held.items() if job.state[line] != DONE}
        job.cancelling_ms = cancelling_ms

    def restore_lease(self, saved: ev.SaveLease) -> None:
        """Put a lease from the books back into the state."""
        job = self.jobs[saved.job_no]
        vehicle = self._vehicle(saved.vehicle_id)
        vehicle.incarnation = vehicle.incarnation or saved.incarnation
        job.restore_lease(self._new_lease(job, vehicle, saved))

    def restore_vehicle(
        self, vehicle_id: str, *, region: str, withdrawn: bool, withdrawal_seen: bool, paused_until_ms: int
    ) -> None:
        """Put back what the books know of a vehicle: where it is, and what its owner has said."""
        vehicle = self._vehicle(vehicle_id)
        vehicle.region = region
        vehicle.withdrawn, vehicle.withdrawal_seen = withdrawn, withdrawal_seen
        vehicle.paused_until_ms = paused_until_ms

    def _new_lease(self, job: Job, vehicle: Vehicle, saved: ev.SaveLease) -> Lease:
        self._lease_count += 1
        lease = Lease(
            number=self._lease_count,
            lease_id=saved.lease_id,
            job=job,
            vehicle_id=vehicle.vehicle_id,
            incarnation=saved.incarnation,
            lines=set(saved.lines),
            base=dict(saved.base),
            granted_ms=saved.granted_ms,
            expires_ms=saved.expires_ms,
        )
        self.leases[lease.lease_id] = lease
        self.by_number[lease.number] = lease
        vehicle.leases[lease.lease_id] = lease
        return lease

    def resume(self, now_ms: int, *, settled_ms: int) -> Commands:
        """After everything was put back from the books: end what has nothing left, and give vehicles time to report.

        No window closes before ``settled_ms``.
        """
        commands: Commands = [
            ev.DropStory(subject=vehicle.vehicle_id) for vehicle in self.vehicles.values() if vehicle.withdrawn
        ]
        self._settled_ms = settled_ms
        for lease in self.leases.values():
            self.vehicles[lease.vehicle_id].seen_ms = now_ms
            lease.sent_ms = now_ms  # the crash may have come before the grant was sent: it is sent again if need be
        for lease in [lease for lease in self.leases.values() if not lease.lines]:
            commands += self._forget(lease)
        for job in list(self.jobs.values()):
            job.requeue()
            self._waiting.add(job)
            if job.cancelling_ms is not None:
                commands += self._stop_waiting_lines(job)  # the crash may have come before they were asked back
            commands += self._end_if_done(job)
        return commands

    def _cancel_asked(self, event: ev.CancelAsked, now_ms: int) -> Commands:
        job = self.jobs.get(event.job_no)
        if job is None or job.cancelling_ms is not None:
            return []
        job.cancelling_ms = now_ms
        commands: Commands = [
            ev.SaveJobStatus(job_no=job.job_no, status="cancelling"),
            ev.Note(subject=job.job_id, what="cancelled by the customer; lines that run may finish"),
        ]
        return commands + self._stop_waiting_lines(job) + self._end_if_done(job)

    def _stop_waiting_lines(self, job: Job) -> Commands:
        return [
            ev.SendRevoke(vehicle_id=lease.vehicle_id, lease_id=lease.lease_id, keep_running=True)
            for lease in self._leases_of(job)
        ]

    def _leases_of(self, job: Job) -> list[Lease]:
        return [lease for lease in self.leases.values() if lease.job is job]

    def _end_if_done(self, job: Job) -> Commands:
        over = job.done == job.total or (job.cancelling_ms is not None and job.leased == 0)
        return self._end(job, "all lines have ended" if job.done == job.total else "cancelled") if over else []

    def _end(self, job: Job, why: str) -> Commands:
        commands: Commands = []
        for lease in self._leases_of(job):
            if lease.lines:
                commands.append(ev.SendRevoke(vehicle_id=lease.vehicle_id, lease_id=lease.lease_id))
            commands += self._forget(lease)
        del self.jobs[job.job_no]
        del self.job_numbers[job.job_id]
        self._waiting.drop(job)
        if job.cancelling_ms is None:
            commands.append(ev.SaveJobStatus(job_no=job.job_no, status="finalizing"))
        return [*commands, ev.Note(subject=job.job_id, what=why), ev.AssembleFiles(job_no=job.job_no)]

    # -- vehicles ------------------------------------------------------------------------------------------------------

    def _vehicle(self, vehicle_id: str) -> Vehicle:
        vehicle = self.vehicles.get(vehicle_id)
        if vehicle is None:
            vehicle = self.vehicles[vehicle_id] = Vehicle(vehicle_id)
        return vehicle

    def _vehicle_reported(self, event: ev.VehicleReported, now_ms: int) -> Commands:
        vehicle = self._vehicle(event.vehicle_id)
        state = event.state
        commands: Commands = []
        news = vehicle.offline or state.incarnation != vehicle.incarnation  # it may have missed what was sent
        if state.incarnation != vehicle.incarnation:
            for lease in list(vehicle.leases.values()):
                if lease.incarnation != state.incarnation:
                    commands += self._take_back(lease, "the vehicle's agent started anew")
            vehicle.incarnation = state.incarnation
        elif vehicle.state is not None and state.seq <= vehicle.state.seq and not vehicle.offline:
            return []
        before = _in_words(None if vehicle.offline else vehicle.state)
        commands += self._hear_of_withdrawal(vehicle, state)
        if vehicle.withdrawn:
            state = _bare(state)
        vehicle.state, vehicle.seen_ms, vehicle.offline = state, now_ms, False
        self._recount(vehicle)
        if not vehicle.withdrawn:
            if state.region != vehicle.region:
                vehicle.region = state.region
                commands.append(ev.SaveRegion(vehicle_id=vehicle.vehicle_id, region=state.region))
            if before != _in_words(state):
                commands.append(ev.Note(subject=vehicle.vehicle_id, what=_in_words(state)))
        if news or (vehicle.permitted and not vehicle.usable(max(now_ms, vehicle.blocked_until_ms))):
            commands.append(ev.SendOwnerNews(vehicle_id=vehicle.vehicle_id))  # or it does not know its owner's word yet
        commands += self._reconcile(vehicle, now_ms)
        return commands + self._fill(vehicle, now_ms)

    def _hear_of_withdrawal(self, vehicle: Vehicle, state: State) -> Commands:
        """A vehicle that has said that its consent is withdrawn, and is permitted later, has a new one by then.

        It checks the owner's signature itself; the owner may have given the new one in the car.
        """
        if not vehicle.withdrawn:
            return []
        if any(reason.code is ReasonCode.CONSENT_WITHDRAWN for reason in state.reasons):
            if vehicle.withdrawal_seen:
                return []
            vehicle.withdrawal_seen = True
        elif vehicle.withdrawal_seen and state.state in {VehicleState.READY, VehicleState.WORKING}:
            vehicle.withdrawn = vehicle.withdrawal_seen = False
        else:
            return []
        return [ev.SaveWithdrawal(vehicle_id=vehicle.vehicle_id, seen=vehicle.withdrawal_seen)]

    def _owner_spoke(self, event: ev.OwnerSpoke, now_ms: int) -> Commands:
        """The owner takes the car, or gives it back: what was done is paid, what runs goes to others."""
        vehicle = self._vehicle(event.vehicle_id)
        vehicle.paused_until_ms = event.paused_until_ms
        if event.withdrawn != vehicle.withdrawn:
            vehicle.withdrawn, vehicle.withdrawal_seen = event.withdrawn, False
        commands: Commands = []
        if vehicle.withdrawn:
            vehicle.state = None if vehicle.state is None else _bare(vehicle.state)
            commands.append(ev.DropStory(subject=vehicle.vehicle_id))
        else:
            commands.append(ev.Note(subject=vehicle.vehicle_id, what=event.what))
        self._recount(vehicle)
        commands.append(ev.SendOwnerNews(vehicle_id=vehicle.vehicle_id))
        if not vehicle.withdrawn and now_ms >= vehicle.paused_until_ms:
            return commands + self._fill(vehicle, now_ms)
        for lease in list(vehicle.leases.values()):
            commands.append(ev.SendRevoke(vehicle_id=vehicle.vehicle_id, lease_id=lease.lease_id))
            commands += self._take_back(lease, "the owner asked for it")
        return commands + self._fill_all(now_ms)

    def _reconcile(self, vehicle: Vehicle, now_ms: int) -> Commands:
        """Compare the leases that the vehicle says it holds with ours."""
        assert vehicle.state is not None
        held = set(vehicle.state.held)
        commands: Commands = []
        for lease in list(vehicle.leases.values()):
            if lease.lease_id in held:
                lease.seen, lease.missing_ms = True, None
            elif lease.seen:
                # It has ended there; its last results may still be on their way through the stream.
                # When the owner has taken the car meanwhile, that they come late is nobody's fault.
                lease.missing_ms = lease.missing_ms or now_ms
                lease.excused = lease.excused or not vehicle.permitted
                if now_ms - lease.missing_ms >= MISSING_AFTER_MS:
                    failed_ms = None if lease.excused else now_ms
                    commands += self._take_back(lease, "results did not arrive", failed_ms=failed_ms)
            elif lease.job.cancelling_ms is not None:
                commands += self._take_back(lease, "its job was cancelled")
            elif now_ms - lease.sent_ms >= RESEND_AFTER_MS:
                commands += self._send_again(lease, now_ms)
        commands += [
            ev.SendRevoke(vehicle_id=vehicle.vehicle_id, lease_id=lease_id)
            for lease_id in vehicle.state.held
            if lease_id not in vehicle.leases
        ]
        return commands

    def _send_again(self, lease: Lease, now_ms: int) -> Commands:
        lease.excused = lease.excused or not self.vehicles[lease.vehicle_id].permitted
        if lease.sent_times >= MAX_SENDS:
            failed_ms = None if lease.excused else now_ms
            return self._take_back(lease, "the vehicle did not take it", failed_ms=failed_ms)
        lease.sent_ms = now_ms
        lease.sent_times += 1
        return [self._grant(lease, now_ms)]

    def _grant(self, lease: Lease, now_ms: int) -> ev.SendGrant:
        pay_input_micro, pay_output_micro = owner_pay(lease.job.price)
        return ev.SendGrant(
            lease_id=lease.lease_id,
            job_no=lease.job.job_no,
            vehicle_id=lease.vehicle_id,
            incarnation=lease.incarnation,
            model=lease.job.model,
            kind=lease.job.kind,
            ttl_ms=max(1, lease.expires_ms - now_ms),
            lines=sorted(lease.lines),
            with_checkpoint=sorted(lease.base),
            # What comes after the window is worth nothing to anybody.
            max_offline_ms=min(MAX_OFFLINE_MS, max(0, lease.job.expires_ms - now_ms)),
            pay_input_micro=pay_input_micro,
            pay_output_micro=pay_output_micro,
        )

    def _vehicle_revoked(self, event: ev.VehicleRevoked, now_ms: int) -> Commands:
        vehicle = self.vehicles.pop(event.vehicle_id, None)
        if vehicle is None:
            return []
        vehicle.offline = True
        self._recount(vehicle)
        commands: Commands = []
        for lease in list(vehicle.leases.values()):
            commands.append(ev.SendRevoke(vehicle_id=vehicle.vehicle_id, lease_id=lease.lease_id))
            commands += self._take_back(lease, "the vehicle was struck off")
        return commands + self._fill_all(now_ms)

    # -- leases --------------------------------------------------------------------------------------------------------

    def _take_back(self, lease: Lease, why: str, *, failed_ms: int | None = None) -> Commands:
        """End a lease that was not handed back; its lines wait again. ``failed_ms``: now, if that is a failure."""
        lines = sorted(lease.lines)
        commands = self._put_back(lease.job, lease.vehicle_id, lines)
        lease.lines.clear()
        commands += self._forget(lease)
        vehicle = self.vehicles.get(lease.vehicle_id)
        if vehicle is not None and failed_ms is not None:
            vehicle.failed(failed_ms)
        if lines:
            commands.append(ev.Note(subject=lease.vehicle_id, what=f"{len(lines)} lines taken back: {why}"))
        return commands + self._end_if_done(lease.job) if lease.job.job_no in self.jobs else commands

    def _put_back(self, job: Job, vehicle_id: str, lines: list[int]) -> Commands:
        """These lines of a vehicle wait again. It may have finished them all the same, so it is remembered."""
        if not lines:
            return []
        job.put_back(lines)
        self._waiting.add(job)
        new = [line for line in lines if vehicle_id not in job.held.get(line, ())]
        for line in new:
            job.held[line] = (*job.held.get(line, ()), vehicle_id)
        return [ev.SaveHeld(job_no=job.job_no, vehicle_id=vehicle_id, lines=new)] if new else []

    def _may_speak_of(self, job: Job, line: int, vehicle_id: str) -> bool:
        """Whether this vehicle holds the line, or held it once."""
        if not 0 <= line < job.total or job.state[line] == DONE:
            return False
        holder = int(job.holder[line])
        if holder != NOBODY and self.by_number[holder].vehicle_id == vehicle_id:
            return True
        return vehicle_id in job.held.get(line, ())

    def _forget(self, lease: Lease) -> Commands:
        if self.leases.pop(lease.lease_id, None) is None:
            return []
        del self.by_number[lease.number]
        vehicle = self.vehicles.get(lease.vehicle_id)
        if vehicle is not None:
            vehicle.leases.pop(lease.lease_id, None)
        return [ev.DropLease(lease_id=lease.lease_id)]

    def _remove_lines(self, lease: Lease, lines: list[int], *, waiting: bool) -> Commands:
        """Take lines out of a lease: they have ended, or (``waiting``) wait again, which the books must know."""
        lease.lines.difference_update(lines)
        if not lease.lines:
            return self._forget(lease)
        return [self._saved(lease)] if waiting and lines else []

    def _saved(self, lease: Lease) -> ev.SaveLease:
        return ev.SaveLease(
            lease_id=lease.lease_id,
            job_no=lease.job.job_no,
            vehicle_id=lease.vehicle_id,
            incarnation=lease.incarnation,
            granted_ms=lease.granted_ms,
            expires_ms=lease.expires_ms,
            lines=sorted(lease.lines),
            base=lease.base,
        )

    def _fill_all(self, now_ms: int) -> Commands:
        commands: Commands = []
        self._filled_ms = now_ms
        for vehicle_id in sorted(self.vehicles):
            if not self._waiting:
                break
            commands += self._fill(self.vehicles[vehicle_id], now_ms)
        return commands

    def _fill_soon(self, now_ms: int) -> Commands:
        """Grant what has just come back, unless that was done a moment ago: the next tick does it then."""
        return self._fill_all(now_ms) if now_ms - self._filled_ms >= FILL_EVERY_MS else []

    def _fill(self, vehicle: Vehicle, now_ms: int) -> Commands:
        """Grant work when the vehicle's queue is less than half full."""
        commands: Commands = []
        if not self._waiting or not vehicle.usable(now_ms):
            return commands
        assert vehicle.state is not None
        outstanding = vehicle.outstanding()
        while (job := self._waiting.first(vehicle.state.model)) is not None:
            depth = vehicle.depth(job, self._serving.get(job.model, 0))
            if outstanding > depth // 2:
                break
            lines = job.take(min(depth - outstanding, MAX_GRANT_LINES), MAX_GRANT_BYTES)
            if not lines:
                break
            outstanding += len(lines)
            commands += self._lease_out(job, vehicle, lines, now_ms)
        return commands

    def _recount(self, vehicle: Vehicle) -> None:
        """Keep the counts of vehicles by model true after this one has changed."""
        model = vehicle.state.model if vehicle.state is not None and vehicle.present else None
        if model == vehicle.counted_as:
            return
        if vehicle.counted_as is not None:
            self._serving[vehicle.counted_as] -= 1
            if not self._serving[vehicle.counted_as]:
                del self._serving[vehicle.counted_as]
        if model is not None:
            self._serving[model] = self._serving.get(model, 0) + 1
        vehicle.counted_as = model

    def _lease_out(self, job: Job, vehicle: Vehicle, lines: list[int], now_ms: int) -> Commands:
        job.grants += 1
        expected = len(lines) * 4000 / vehicle.lines_per_s if vehicle.lines_per_s else 0
        overruns = max((job.overruns[line] for line in lines if line in job.overruns), default=0)
        ttl_ms = int(min(max(MIN_LEASE_MS << overruns, expected), MAX_LEASE_MS))
        base = {line: sum(n for _, n in job.carried[line]) for line in lines if line in job.carried}
        saved = ev.SaveLease(
            lease_id=f"{job.job_id}-{self.epoch:x}-{job.grants}",
            job_no=job.job_no,
            vehicle_id=vehicle.vehicle_id,
            incarnation=vehicle.incarnation,
            granted_ms=now_ms,
            expires_ms=now_ms + ttl_ms,
            lines=lines,
            base=base,
        )
        lease = self._new_lease(job, vehicle, saved)
        job.holder[lines] = lease.number
        commands: Commands = [saved, self._grant(lease, now_ms)]
        if base:
            what = f"took over {len(base)} lines with {sum(base.values())} tokens that others had generated"
            commands.append(ev.Note(subject=vehicle.vehicle_id, what=what))
        return commands

    # -- what comes back -----------------------------------------------------------------------------------------------

    def _results_arrived(self, event: ev.ResultsArrived, now_ms: int) -> Commands:
        number = self.job_numbers.get(event.job_id)
        if number is None:
            return []
        job = self.jobs[number]
        vehicle = self._vehicle(event.vehicle_id)
        accepted = Accepted(vehicle_id=vehicle.vehicle_id, intensity_g_kwh=grams_per_kwh(vehicle.region))
        ended: dict[int, list[int]] = {}  # lines to remove, by the number of the lease that holds them
        again: list[int] = []
        seen: set[int] = set()
        for place, line in enumerate(event.lines):
            if line in seen or not self._may_speak_of(job, line, vehicle.vehicle_id):
                continue
            seen.add(line)
            holder = int(job.holder[line])
            if event.statuses[place] >= 500:
                if holder == NOBODY or self.by_number[holder].lease_id != event.lease_id:
                    continue  # late or repeated: the line waits or runs elsewhere already
                # Too much to do is no fault of the line's.
                if event.statuses[place] == 503 or self._strike(job, line, vehicle.vehicle_id):
                    again.append(line)
                    ended.setdefault(holder, []).append(line)
                    continue
            if holder != NOBODY:
                ended.setdefault(holder, []).append(line)
            accepted.add(job, event, place)
            job.finish(line)
        if accepted.answered:
            vehicle.succeeded(accepted.answered, now_ms)
        elif again:
            vehicle.failed(now_ms)
        commands = accepted.commands(job, event) + self._put_back(job, vehicle.vehicle_id, again)
        for lease_number, lines in sorted(ended.items()):
            lease = self.by_number[lease_number]
            if lease.lease_id != event.lease_id:
                commands.append(ev.SendRevoke(vehicle_id=lease.vehicle_id, lease_id=lease.lease_id, lines=lines))
            commands += self._remove_lines(lease, lines, waiting=bool(again))
        commands += self._end_if_done(job)
        return commands + self._fill(vehicle, now_ms)

    def _strike(self, job: Job, line: int, vehicle_id: str) -> bool:
        """Count a failure that may be the line's own fault; whether it gets another try."""
        strikes = job.strikes.setdefault(line, [])
        strikes.append(vehicle_id)
        tried = {name: self.vehicles.get(name) for name in strikes}
        here = sum(1 for vehicle in tried.values() if vehicle is not None and vehicle.counted_as == job.model)
        enough = len(tried) >= MAX_STRIKES or here == self._serving.get(job.model, 0)  # or nobody else could try
        return len(strikes) < MAX_STRIKES or (len(strikes) < MAX_STRIKES_IN_ALL and not enough)

    def _work_returned(self, event: ev.WorkReturned, now_ms: int) -> Commands:
        number = self.job_numbers.get(event.job_id)
        vehicle = self._vehicle(event.vehicle_id)
        if event.reason is ReturnReason.ENGINE_DIED:
            vehicle.failed(now_ms)
        elif event.reason not in {ReturnReason.REVOKED, ReturnReason.EXPIRED}:
            vehicle.wait(now_ms)  # its next report may be on its way still
        if number is None:
            return []
        job = self.jobs[number]
        lease = self._lease_of(job, event)
        commands = self._keep_checkpoints(job, lease, event)
        if lease is None:
            return commands
        back = [line for line in dict.fromkeys(event.lines) if line in lease.lines]
        commands += self._put_back(job, event.vehicle_id, back)
        blamed = self._blamed(lease, event)
        commands += self._give_up(job, [line for line in blamed if not self._strike(job, line, event.vehicle_id)])
        if back:
            carried = sum(event.tokens)
            what = f"{len(back)} lines handed back ({event.reason.value}) with {carried} tokens"
            commands.append(ev.Note(subject=event.vehicle_id, what=what))
        commands += self._remove_lines(lease, back, waiting=True)
        commands += self._end_if_done(job)
        return commands + self._fill_soon(now_ms)

    def _lease_of(self, job: Job, event: ev.WorkReturned | ev.ProgressMade) -> Lease | None:
        """The lease that an event names, if it is of this job and this vehicle's."""
        lease = self.leases.get(event.lease_id)
        return lease if lease is not None and lease.job is job and lease.vehicle_id == event.vehicle_id else None

    @staticmethod
    def _blamed(lease: Lease, event: ev.WorkReturned) -> list[int]:
        """Lines that may be at fault: the engine died over them, or the longest lease ran out without a new token."""
        columns = zip(event.lines, event.tokens, event.started, strict=True)
        started = {line: tokens for line, tokens, ran in columns if ran and line in lease.lines}
        if event.reason is ReturnReason.ENGINE_DIED:
            return list(started)
        if event.reason is not ReturnReason.EXPIRED:
            return []
        stuck = [line for line, tokens in started.items() if tokens <= lease.base.get(line, 0)]
        for line in stuck:  # some answers show nothing before their end: they get more time, and blame only then
            lease.job.overruns[line] = lease.job.overruns.get(line, 0) + 1
        return stuck if lease.expires_ms - lease.granted_ms >= MAX_LEASE_MS else []

    def _give_up(self, job: Job, lines: list[int]) -> Commands:
        if not lines:
            return []
        for line in lines:
            job.finish(line)
        message = "engines failed again and again while they ran this line"
        return [
            ev.SaveFailures(job_no=job.job_no, lines=lines, code="engine_failed", message=message),
            ev.SaveJobCounts(job_no=job.job_no, failed=len(lines)),
        ]

    def _progress_made(self, event: ev.ProgressMade, now_ms: int) -> Commands:
        del now_ms
        number = self.job_numbers.get(event.job_id)
        if number is None:
            return []
        job = self.jobs[number]
        return self._keep_checkpoints(job, self._lease_of(job, event), event)

    def _keep_checkpoints(self, job: Job, lease: Lease | None, event: ev.WorkReturned | ev.ProgressMade) -> Commands:
        """Keep the checkpoints that are longer than those known, and who generated what of them."""
        picks: list[int] = []
        shares_of: list[Shares] = []
        for place, (line, tokens) in enumerate(zip(event.lines, event.tokens, strict=True)):
            if tokens <= 0 or not self._may_speak_of(job, line, event.vehicle_id) or tokens > job.limits[line]:
                continue
            known = job.carried.get(line, [])
            known_tokens = sum(count for _, count in known)
            if tokens <= known_tokens:
                continue
            base = lease.base.get(line, 0) if lease is not None else known_tokens
            shares = extend(trim(known, base), event.vehicle_id, tokens - min(base, tokens))
            job.carried[line] = shares
            job.checkpoint_bytes[line] = event.sizes[place]
            picks.append(place)
            shares_of.append(shares)
        if not picks:
            return []
        return [
            ev.SaveCheckpoints(
                job_no=job.job_no,
                picks=picks,
                lines=[event.lines[place] for place in picks],
                tokens=[event.tokens[place] for place in picks],
                shares=shares_of,
            )
        ]

    # -- live requests -------------------------------------------------------------------------------------------------

    def place_live(self, model: str, tried: frozenset[str], now_ms: int) -> str | None:
        """The vehicle for a live request: the least loaded of a few candidates; None when there is none.

        The caller counts it with ``live_began`` and ``live_over``. ``tried`` are vehicles that broke or refused it.
        """
        ids = list(self.vehicles)
        best: tuple[float, str] | None = None
        looked = 0
        self._live_turn += 1
        for step in range(len(ids)):
            vehicle = self.vehicles[ids[(self._live_turn + step) % len(ids)]]
            if vehicle.vehicle_id in tried or not vehicle.usable(now_ms):
                continue
            if vehicle.state is None or vehicle.state.model != model:
                continue
            if vehicle.live >= MAX_LIVE_PER_SLOT * vehicle.slots:
                continue
            load = vehicle.live / vehicle.slots
            if best is None or (load, vehicle.vehicle_id) < best:
                best = (load, vehicle.vehicle_id)
            looked += 1
            if looked >= LIVE_CANDIDATES:
                break
        return best[1] if best else None

    def serving(self, model: str) -> int:
        """How many vehicles could run this model now."""
        return self._serving.get(model, 0)

    def serves(self, model: str) -> bool:
        """Whether any could."""
        return self.serving(model) > 0

    def live_began(self, vehicle_id: str) -> None:
        """A live request was sent to this vehicle."""
        self._vehicle(vehicle_id).live += 1

    def live_over(self, vehicle_id: str) -> None:
        """It ended or moved on."""
        vehicle = self.vehicles.get(vehicle_id)
        if vehicle is not None:
            vehicle.live = max(0, vehicle.live - 1)

    def _live_ended(self, event: ev.LiveEnded, now_ms: int) -> Commands:
        del now_ms
        cost = cost_micro(event.price, event.prompt_tokens, event.completion_tokens)
        parts = split(event.price, cost, event.prompt_tokens, event.finisher, event.shares)
        commands: Commands = [
            ev.PostTransfers(transfers=settle(event.request_id, event.account, cost, parts, event.request_id))
        ]
        commands += [
            ev.SaveVehicleCounts(vehicle_id=vehicle_id, tokens_generated=tokens) for vehicle_id, tokens in event.shares
        ]
        commands += [
            ev.SaveVehicleCounts(vehicle_id=vehicle_id, energy_uwh=uwh, co2_ug=self.co2_ug(vehicle_id, uwh))
            for vehicle_id, uwh in sorted(event.energy_uwh.items())
        ]
        return commands

    def may_tell(self, subject: str) -> bool:
        """Whether a story may be kept of this vehicle or job: of no car whose owner has withdrawn the consent."""
        vehicle = self.vehicles.get(subject)
        return vehicle is None or not vehicle.withdrawn

    def co2_ug(self, vehicle_id: str, energy_uwh: int) -> int:
        """Micrograms of CO2 of energy that this vehicle drew."""
        vehicle = self.vehicles.get(vehicle_id)
        return co2_ug(energy_uwh, grams_per_kwh("" if vehicle is None else vehicle.region))

    # -- time ----------------------------------------------------------------------------------------------------------

    def _ticked(self, event: ev.Ticked, now_ms: int) -> Commands:
        del event
        commands: Commands = []
        for vehicle in list(self.vehicles.values()):
            if not vehicle.offline and now_ms - vehicle.seen_ms >= SILENT_AFTER_MS:
                vehicle.offline = True
                self._recount(vehicle)
                commands.append(ev.Note(subject=vehicle.vehicle_id, what="offline: no report"))
            if now_ms - vehicle.seen_ms >= SILENT_AFTER_MS:
                for lease in list(vehicle.leases.values()):
                    commands += self._take_back(lease, "the vehicle is silent")
        for lease in list(self.leases.values()):
            if now_ms >= lease.expires_ms + EXPIRY_GRACE_MS:
                commands.append(ev.SendRevoke(vehicle_id=lease.vehicle_id, lease_id=lease.lease_id))
                failed_ms = now_ms if self.vehicles[lease.vehicle_id].permitted else None
                commands += self._take_back(lease, "the lease ran out", failed_ms=failed_ms)
        for job in list(self.jobs.values()):
            job.measure(now_ms)
            if now_ms >= max(job.expires_ms, self._settled_ms):
                commands += self._end(job, "the completion window closed")
            elif job.cancelling_ms is not None and now_ms - job.cancelling_ms >= CANCEL_GRACE_MS:
                commands += self._end(job, "cancelled; lines that still ran were stopped")
        return commands + self._fill_all(now_ms)

    def validate(self) -> None:
        """Every invariant of this state; for tests and simulation."""
        for job in self.jobs.values():
            job.validate()
            waits = job.pending > 0 and job.cancelling_ms is None
            assert not waits or job in self._waiting, "a job with waiting lines would never be granted"
        for lease in self.leases.values():
            assert lease.lines, "an empty lease is over"
            assert lease.job.job_no in self.jobs
            assert self.by_number[lease.number] is lease
            assert self.vehicles[lease.vehicle_id].leases[lease.lease_id] is lease
            for line in lease.lines:
                assert lease.job.state[line] == LEASED, "a leased line is LEASED"
                assert lease.job.holder[line] == lease.number, "a line has one holder"
        held = sum(len(lease.lines) for lease in self.leases.values())
        assert held == sum(job.leased for job in self.jobs.values()), "every leased line has a lease"
        present: dict[str, int] = {}
        for vehicle in self.vehicles.values():
            if vehicle.state is not None and vehicle.present and vehicle.state.model is not None:
                present[vehicle.state.model] = present.get(vehicle.state.model, 0) + 1
            denied = vehicle.state is not None and vehicle.state.state is VehicleState.DENIED
            assert not (denied and vehicle.usable(1 << 60)), "a denied vehicle gets nothing"
        assert present == {model: count for model, count in self._serving.items() if count}


def _in_words(state: State | None) -> str:
    """What a vehicle does and, when it may not work, why."""
    if state is None:
        return "offline"
    why = ", ".join(reason.code.value for reason in state.reasons)
    return state.state.value + (f": {why}" if why else "")


def _bare(state: State) -> State:
    """What is needed of a report to end the work of a vehicle whose consent is withdrawn, and nothing about its car."""
    return State(
        incarnation=state.incarnation,
        seq=state.seq,
        state=state.state,
        region=state.region,
        model=state.model,
        slots=state.slots,
        held=state.held,
        reasons=[reason for reason in state.reasons if reason.code is ReasonCode.CONSENT_WITHDRAWN],
    )
