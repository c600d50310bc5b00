"""What the accepted part of one message of results changes: the books of the job, its vehicles and the money.

Decides: how many tokens of a claim are paid, and to whom. Must not: decide what is accepted; ``core.scheduler`` does,
which alone calls this room.
"""

from __future__ import annotations

from typing import Final

from motorpool.core import events as ev
from motorpool.core.attribution import MAX_MESSAGE_UWH, UWH_PER_MWH, co2_ug, split_uwh, weight
from motorpool.core.jobs import Job
from motorpool.core.kernels import work_of
from motorpool.core.ledger import Rests, settle
from motorpool.core.ledger import job as job_rest
from motorpool.core.pricing import cost_atto, extend, split_atto, trim

MAX_TEMPLATE_TOKENS: Final = 1_024  # what a chat template may add to a prompt; a token of the rest is a byte at least


class Accepted:
    """Gathers what the accepted part of one message of results changes.

    ``intensity_g_kwh``: where the vehicle is; ``rests``: what is below a millionth, of all jobs and owners. A line
    costs what the cost of its job rises by when it counts, so that the lines of a job come to its price in whatever
    order they arrive.
    """

    def __init__(self, vehicle_id: str, intensity_g_kwh: int, rests: Rests) -> None:
        self.vehicle_id = vehicle_id
        self.intensity_g_kwh = intensity_g_kwh
        self.rests = rests
        self.picks: list[int] = []
        self.costs_atto: list[int] = []
        self.carried: list[int] = []
        self.with_checkpoint: list[int] = []
        self.completed = self.failed = self.prompt = self.cached = self.completion = 0
        self.answered = 0  # also in the negative, as long as it is the customer's fault
        self.overclaimed = 0
        self.own_work = 0.0  # what this vehicle itself did of the answers
        self.others: dict[str, int] = {}  # tokens that other vehicles had generated

    def _within(self, job: Job, event: ev.ResultsArrived, place: int) -> tuple[int, int]:
        """Prompt and completion tokens as claimed, but no more than the line can have had: nobody pays for more."""
        line = event.lines[place]
        claimed = event.prompt_tokens[place], event.completion_tokens[place]
        prompt = min(claimed[0], int(job.lengths[line]) + MAX_TEMPLATE_TOKENS)
        completion = min(claimed[1], int(job.limits[line]))
        self.overclaimed += (prompt, completion) != claimed
        return prompt, completion

    def add(self, job: Job, event: ev.ResultsArrived, place: int) -> float:
        """This line of the message counts; the work tokens of its answer."""
        line = event.lines[place]
        self.picks.append(place)
        if line in job.carried:
            self.with_checkpoint.append(line)
        self.answered += event.statuses[place] < 500
        if event.statuses[place] >= 400:
            self.failed += 1
            self.costs_atto.append(0)
            self.carried.append(0)
            return 0.0
        prompt, completion = self._within(job, event, place)
        self.completed += 1
        self.costs_atto.append(cost_atto(job.price, prompt, completion))
        self.prompt += prompt
        self.cached += min(event.cached_tokens[place], prompt)
        self.completion += completion
        carried = min(event.carried_tokens[place], completion)
        shares = trim(job.carried.get(line, []), carried) if carried else []
        carried = sum(count for _, count in shares)  # only what somebody is known to have generated
        self.carried.append(carried)
        self.own_work += work_of(prompt, completion - carried)
        for vehicle_id, tokens in shares:
            if vehicle_id != self.vehicle_id:
                self.others[vehicle_id] = self.others.get(vehicle_id, 0) + tokens
        return work_of(prompt, completion)

    def _energy_uwh(self, event: ev.ResultsArrived) -> list[int]:
        """The part of each accepted line in what the vehicle drew for the whole message.

        Lines that do not count keep theirs, so that none carries the energy of another's repetition.
        """
        columns = (event.prompt_tokens, event.cached_tokens, event.completion_tokens, event.carried_tokens)
        weights = [weight(*tokens) for tokens in zip(*columns, strict=True)]
        parts = split_uwh(min(event.energy_mwh * UWH_PER_MWH, MAX_MESSAGE_UWH), weights)
        return [parts[place] for place in self.picks]

    def commands(self, job: Job, event: ev.ResultsArrived) -> list[ev.Command]:
        """What all that counts changes in the books."""
        if not self.picks:
            return []
        costs_micro = self.rests.add_each(job_rest(job.job_id), self.costs_atto)
        cost, carried, others = sum(costs_micro), sum(self.carried), sum(self.others.values())
        energy_uwh = self._energy_uwh(event)
        co2 = [co2_ug(part, self.intensity_g_kwh) for part in energy_uwh]
        energy = sum(energy_uwh)
        # Named after what can be accepted only once, never after what a vehicle calls its message.
        cause = f"{job.job_id}/{event.lines[self.picks[0]]}"
        commands: list[ev.Command] = [
            ev.SaveResults(
                job_no=job.job_no,
                vehicle_id=self.vehicle_id,
                picks=self.picks,
                costs_micro=costs_micro,
                carried_tokens=self.carried,
                energy_uwh=energy_uwh,
                co2_ug=co2,
                energy_is_measured=event.energy_is_measured,
                with_checkpoint=self.with_checkpoint,
            ),
            ev.SaveJobCounts(
                job_no=job.job_no,
                completed=self.completed,
                failed=self.failed,
                prompt_tokens=self.prompt,
                cached_tokens=self.cached,
                completion_tokens=self.completion,
                carried_tokens=carried,
                cost_micro=cost,
                energy_uwh=energy,
                measured_uwh=energy if event.energy_is_measured else 0,
                co2_ug=sum(co2),
            ),
            ev.SaveVehicleCounts(
                vehicle_id=self.vehicle_id,
                lines_done=len(self.picks),
                tokens_generated=self.completion - others,
                tokens_taken_over=others,
                energy_uwh=energy,
                co2_ug=sum(co2),
            ),
        ]
        commands += [
            ev.SaveVehicleCounts(vehicle_id=other, tokens_generated=tokens, tokens_handed_on=tokens)
            for other, tokens in sorted(self.others.items())
        ]
        if self.overclaimed:
            what = f"claimed more tokens than {self.overclaimed} lines can have had: only those were paid"
            commands.append(ev.Note(subject=self.vehicle_id, what=what))
        # Owners' parts are exact, so those of the message are the sum of those of its lines.
        shares = extend(list(self.others.items()), self.vehicle_id, self.completion - others)
        transfers = settle(
            self.rests,
            cause_id=cause,
            account=job.account,
            cost_micro=cost,
            owners_atto=split_atto(job.price, self.prompt, self.vehicle_id, shares),
            reference=job.job_id,
        )
        rests = self.rests.changed()
        if transfers or rests:
            commands.append(ev.PostTransfers(transfers=transfers, rests=rests))
        return commands
