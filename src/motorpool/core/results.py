"""What vehicles send back: results, work that they do not hold any more, checkpoints; and what live requests cost.

Called by: ``core.scheduler``. Must not: grant; ``core.granting`` does.
"""

from __future__ import annotations

from typing import Final

from motorpool.core import events as ev
from motorpool.core.accepted import Accepted
from motorpool.core.attribution import co2_ug
from motorpool.core.carbon import grams_per_kwh
from motorpool.core.columns import NONE
from motorpool.core.granting import Commands, Granting
from motorpool.core.jobs import DONE, NOBODY, Job
from motorpool.core.kernels import MAX_LEASE_MS
from motorpool.core.ledger import customer, settle
from motorpool.core.pricing import Shares, cost_atto, extend, split_atto, trim
from motorpool.types import ReturnReason

MAX_STRIKES: Final = 3
MAX_STRIKES_IN_ALL: Final = 9
TOO_MUCH_TO_DO: Final = 503
MAX_NARROWED: Final = 10
_NO_BACKOFF: Final = frozenset((ReturnReason.REVOKED, ReturnReason.EXPIRED))


class Results(Granting):
    """The part of the scheduler that takes in work."""

    def _results_arrived(self, event: ev.ResultsArrived, now_ms: int) -> Commands:
        number = self.job_numbers.get(event.job_id)
        if number is None:
            return []
        job = self.jobs[number]
        if event.lease_id in job.expelled:
            return []
        v = self.cell.vehicle(event.vehicle_id)
        accepted = Accepted(event.vehicle_id, self._grams_per_kwh(v), self.rests)
        lease = self.lease_row(event.lease_id)
        ended: dict[int, list[int]] = {}  # lines to remove, by the lease that holds them
        again: list[int] = []
        done: list[int] = []
        work = 0.0
        vehicle_of = self.cell.t.leases["vehicle"]
        seen: set[int] = set()
        for place, line in enumerate(event.lines):
            if line in seen or not 0 <= line < job.total or job.state[line] == DONE:
                continue
            holder = int(job.holder[line])
            if (holder == NOBODY or vehicle_of[holder] != v) and event.vehicle_id not in job.held.get(line, ()):
                continue  # it never held this line
            seen.add(line)
            if event.statuses[place] >= 500:
                if lease != NONE and job.shadows.get(line) == lease:
                    del job.shadows[line]  # the one that has it first may still answer
                    ended.setdefault(lease, []).append(line)
                    continue
                if lease == NONE or holder != lease:
                    continue  # late or repeated: the line waits or runs elsewhere already
                # Too much to do is no fault of the line's.
                if event.statuses[place] == TOO_MUCH_TO_DO or self._strike(job, line, event.vehicle_id):
                    again.append(line)
                    continue
            for row in (holder, job.shadows.pop(line, NOBODY) if job.shadows else NOBODY):
                if row != NOBODY:
                    ended.setdefault(row, []).append(line)
            work += accepted.add(job, event, place)
            done.append(line)
        job.finish(done, work)
        self._judge(v, accepted, again, now_ms)
        commands = accepted.commands(job, event) + self._settle(job, lease, again, ended)
        return commands + self._fill(v, now_ms)

    def _judge(self, v: int, accepted: Accepted, again: list[int], now_ms: int) -> None:
        """Learn the speed of a vehicle that has answered; let one at which everything fails wait."""
        if accepted.answered:
            oldest_ms = int(self.cell.k.oldest_grant_ms(self.cell.t, v, now_ms))
            self.cell.k.learn_speed(self.cell.t, v, max(accepted.own_work, 1.0), oldest_ms, now_ms)
        elif again:
            self._failed(v, now_ms)

    def _settle(self, job: Job, lease: int, again: list[int], ended: dict[int, list[int]]) -> Commands:
        """What results change in the leases that held their lines, and the end of the job."""
        commands: Commands = []
        if again:
            commands += self._put_back(job, lease, again)
            ended.setdefault(lease, []).extend(again)
        numbers = self.cell.t.leases["number"]
        for row, lines in sorted(ended.items(), key=lambda pair: int(numbers[pair[0]])):
            if row != lease:
                commands.append(self._revoke(row, lines))
            commands += self._remove_lines(row, len(lines), waiting=bool(again) and row == lease)
        return commands + self._end_if_done(job)

    def _strike(self, job: Job, line: int, vehicle_id: str) -> bool:
        """Count a failure that may be the line's own fault; whether it gets another try."""
        strikes = job.strikes.setdefault(line, [])
        strikes.append(vehicle_id)
        tried = set(strikes)
        model = self.cell.find_model(job.model)
        rows = [self.cell.find(name) for name in tried]
        here = sum(1 for row in rows if row != NONE and self.cell.serves(row, model))
        enough = len(tried) >= MAX_STRIKES or here == self.serving(job.model)  # or nobody else could try
        return len(strikes) < MAX_STRIKES or (len(strikes) < MAX_STRIKES_IN_ALL and not enough)

    def _work_returned(self, event: ev.WorkReturned, now_ms: int) -> Commands:
        number = self.job_numbers.get(event.job_id)
        v = self.cell.vehicle(event.vehicle_id)
        if event.reason is ReturnReason.ENGINE_DIED:
            self._failed(v, now_ms)
        elif event.reason not in _NO_BACKOFF:
            self._wait(v, now_ms)  # its next report may be on its way still
        if event.reason is ReturnReason.REFUSED and not any(event.started):
            narrowed = self.cell.t.vehicles["narrowed"]
            narrowed[v] = min(int(narrowed[v]) + 1, MAX_NARROWED)
        if number is None:
            return []
        job = self.jobs[number]
        row = self._lease_of(job, event)
        commands = self._keep_checkpoints(job, row, event)
        if row == NONE:
            return commands
        held = set(job.lines_of(row))
        back = [line for line in dict.fromkeys(event.lines) if line in held]
        commands += self._put_back(job, row, back)
        for line in back:
            if job.shadows.get(line) == row:
                del job.shadows[line]
        blamed = self._blamed(job, row, held, event)
        commands += self._give_up(job, [line for line in blamed if not self._strike(job, line, event.vehicle_id)])
        if back:
            carried = sum(event.tokens)
            what = f"{len(back)} lines handed back ({event.reason.value}) with {carried} tokens"
            commands.append(ev.Note(subject=event.vehicle_id, what=what))
        commands += self._remove_lines(row, len(back), waiting=True)
        commands += self._end_if_done(job)
        return commands + self._fill_soon(now_ms)

    def _lease_of(self, job: Job, event: ev.WorkReturned | ev.ProgressMade) -> int:
        """The row of the lease that an event names, if it is of this job and this vehicle's; or NONE."""
        row = self.lease_row(event.lease_id)
        if row == NONE or self.job_of(row) is not job:
            return NONE
        return row if self.cell.ids.name(int(self.cell.t.leases["vehicle"][row])) == event.vehicle_id else NONE

    def _blamed(self, job: Job, row: int, held: set[int], event: ev.WorkReturned) -> list[int]:
        """Lines that may be at fault: the engine died over them, or the longest lease ran out without a new token."""
        columns = zip(event.lines, event.tokens, event.started, strict=True)
        started = {line: tokens for line, tokens, ran in columns if ran and line in held}
        if event.reason is ReturnReason.ENGINE_DIED:
            return list(started)
        if event.reason is not ReturnReason.EXPIRED:
            return []
        base = self._base.get(row, {})
        stuck = [line for line, tokens in started.items() if tokens <= base.get(line, 0)]
        for line in stuck:  # some answers show nothing before their end: they get more time, and blame only then
            job.overruns[line] = job.overruns.get(line, 0) + 1
        leases = self.cell.t.leases
        longest = int(leases["life_ms"][row]) >= MAX_LEASE_MS
        return stuck if longest else []

    def _give_up(self, job: Job, lines: list[int]) -> Commands:
        commands: Commands = []
        for line in lines:
            for row in (int(job.holder[line]), job.shadows.pop(line, NOBODY)):
                if row != NOBODY:
                    commands += [self._revoke(row, [line]), *self._remove_lines(row, 1, waiting=False)]
        job.finish(lines)
        if not lines:
            return []
        message = "engines failed again and again while they ran this line"
        return [
            ev.SaveFailures(job_no=job.job_no, lines=lines, code="engine_failed", message=message),
            ev.SaveJobCounts(job_no=job.job_no, failed=len(lines)),
            *commands,
        ]

    def _progress_made(self, event: ev.ProgressMade, now_ms: int) -> Commands:
        del now_ms
        number = self.job_numbers.get(event.job_id)
        if number is None:
            return []
        job = self.jobs[number]
        return self._keep_checkpoints(job, self._lease_of(job, event), event)

    def _keep_checkpoints(self, job: Job, row: int, event: ev.WorkReturned | ev.ProgressMade) -> Commands:
        """Keep the checkpoints that are longer than those known, and who generated what of them."""
        if event.lease_id in job.expelled:
            return []
        picks: list[int] = []
        shares_of: list[Shares] = []
        for place, (line, tokens) in enumerate(zip(event.lines, event.tokens, strict=True)):
            if tokens <= 0 or not self._may_speak_of(job, line, event.vehicle_id) or tokens > job.limits[line]:
                continue
            known = job.carried.get(line, [])
            known_tokens = sum(count for _, count in known)
            if tokens <= known_tokens:
                continue
            base = self._base.get(row, {}).get(line, 0) if row != NONE else known_tokens
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

    def serving(self, model: str) -> int:
        """How many vehicles could run this model now."""
        row = self.cell.find_model(model)
        return 0 if row == NONE else int(self.cell.t.models["serving"][row])

    def _live_ended(self, event: ev.LiveEnded, now_ms: int) -> Commands:
        del now_ms
        cost = cost_atto(event.price, event.prompt_tokens, event.completion_tokens)
        transfers = settle(
            self.rests,
            cause_id=event.request_id,
            account=event.account,
            cost_micro=self.rests.add(customer(event.account), cost),
            owners_atto=split_atto(event.price, event.prompt_tokens, event.finisher, event.shares),
            reference=event.request_id,
        )
        commands: Commands = [
            ev.PostTransfers(transfers=transfers, rests=self.rests.changed(), request_id=event.request_id)
        ]
        commands += [
            ev.SaveVehicleCounts(vehicle_id=vehicle_id, tokens_generated=tokens) for vehicle_id, tokens in event.shares
        ]
        commands += [
            ev.SaveVehicleCounts(vehicle_id=vehicle_id, energy_uwh=uwh, co2_ug=self.co2_ug(vehicle_id, uwh))
            for vehicle_id, uwh in sorted(event.energy_uwh.items())
        ]
        return commands

    def co2_ug(self, vehicle_id: str, energy_uwh: int) -> int:
        """Micrograms of CO2 of energy that this vehicle drew."""
        v = self.cell.find(vehicle_id)
        return co2_ug(energy_uwh, grams_per_kwh("") if v == NONE else self._grams_per_kwh(v))

    def _grams_per_kwh(self, v: int) -> int:
        return grams_per_kwh(self.cell.region_name(int(self.cell.t.vehicles["region"][v])))
