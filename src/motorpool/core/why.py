"""Why a job does not run, and why a vehicle gets nothing: every "no" of the scheduler as data, with words for people.

Decides: nothing. It asks the kernels that grant work themselves (``why_not``, ``refusal``, ``share``), so that what is
said is what was decided. Of many vehicles it asks compiled ones, part by part, so that nobody waits for it.
Must not: change anything. Called by: ``server.admin``.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from motorpool.core.cell import Cell
from motorpool.core.columns import (
    ANY_REGION,
    BEHIND,
    BEST_EFFORT,
    CANCELLING,
    NEVER,
    NONE,
    RELAXED,
    RESERVE,
    SHADOW,
    TIERS,
    Ints,
    Tables,
)
from motorpool.core.fleet import Vehicle
from motorpool.core.jit import compiled, kernel
from motorpool.core.jobs import Job
from motorpool.core.kernels import (
    NOT_PRESENT,
    OK,
    OTHER_MODEL,
    QUEUE_FULL,
    REASONS,
    SITE_FULL,
    queue_ms,
    refusal,
    share,
    site_has_room,
    why_not,
)
from motorpool.core.planning import MARGIN
from motorpool.core.scheduler import Scheduler
from motorpool.core.why_words import GETS_LINES, HINTS, MAX_JOBS, WORDS, Count, Held, JobWhy, Refused, VehicleWhy

MAX_EARLIER: Final = 64  # jobs before this one that are looked at for each vehicle
MANY: Final = (
    4_096  # vehicles: of more, compiled kernels are asked, or where there are none, so many evenly chosen ones
)
OTHERS_FIRST: Final = 31  # the vehicle works for a job that is served before this one
PART: Final = 32_768
CODES: Final = 32
NAMES: Final[dict[int, str]] = {code: name for name, code in REASONS.items()} | {
    OK: GETS_LINES,
    OTHERS_FIRST: "others_first",
}


# -- a job -------------------------------------------------------------------------------------------------------------


def why_job(scheduler: Scheduler, job_no: int, now_ms: int, numbers: Ints | None = None) -> JobWhy:
    """How a job that is in progress stands; KeyError for another.

    ``numbers``: what ``ask`` has counted, for a caller who does that part by part; else it is done here.
    """
    job = scheduler.jobs[job_no]
    cell, t, j = scheduler.cell, scheduler.cell.t, job.row
    flags = int(t.jobs["flags"][j])
    slack = int(t.jobs["slack_ms"][j])
    place, count = _place(cell, j)
    if numbers is None:
        numbers = np.zeros(CODES, np.int64)
        for rows in parts(cell):
            ask(cell, rows, j, now_ms, numbers)
    counts = _counted(cell, numbers)
    leases = t.leases[t.leases["number"] != NONE]
    mine = leases[(leases["job"] == j) & (leases["flags"] & SHADOW == 0)]
    return JobWhy(
        job_id=job.job_id,
        model=job.model,
        words=_job_words(job, place, counts),
        total=job.total,
        done=job.done,
        held=job.leased,
        waiting=job.pending,
        expires_ms=job.expires_ms,
        slack_ms=None if slack == NEVER else slack,
        behind=bool(flags & BEHIND),
        relaxed=bool(flags & RELAXED),
        best_effort=bool(flags & BEST_EFFORT),
        cancelling=bool(flags & CANCELLING),
        place=place,
        jobs_in_order=count,
        lines_per_s=job.lines_per_s,
        finish_ms=_finish_ms(cell, job, now_ms),
        holders=len(np.unique(mine["vehicle"])),
        regions=sorted(scheduler.residency.get(job_no, ())),
        min_trust=int(t.jobs["min_trust"][j]),
        vehicles=len(cell.ids),
        asked=min(int(numbers.sum()), len(cell.ids)),
        reasons=counts,
    )


def _place(cell: Cell, j: int) -> tuple[int | None, int]:
    """Where a job stands in the order of its model, from 1, and how many jobs that order has."""
    order = _order(cell, int(cell.t.jobs["model"][j]))
    at = np.flatnonzero(order == j)
    return (int(at[0]) + 1 if len(at) else None), len(order)


def _order(cell: Cell, model: int) -> npt.NDArray[np.int32]:
    first, count = int(cell.t.models["first"][model]), int(cell.t.models["count"][model])
    return cell.t.order[first : first + count]


def parts(cell: Cell) -> list[Ints]:
    """The rows of all vehicles in parts, each asked in a few milliseconds; without a compiler a choice of them."""
    rows = np.arange(cell.ids.rows)
    if asker(len(rows)) is None:
        rows = rows[:: -(-len(rows) // MANY) or 1]
    return [rows[start : start + PART] for start in range(0, len(rows), PART)]


def ask(cell: Cell, rows: Ints, j: int, now_ms: int, numbers: Ints) -> None:
    """Add the verdicts of some vehicles on a job to ``numbers`` [CODES]."""
    (asker(cell.ids.rows) or tally)(cell.t, rows, j, now_ms, numbers)


def _counted(cell: Cell, numbers: Ints) -> list[Count]:
    """All vehicles by what they are to a job, the largest group first; counts of a choice are scaled up."""
    rows, chosen = cell.ids.rows, int(numbers.sum())
    scaled = numbers * rows // max(chosen, 1)
    scaled[NOT_PRESENT] = max(0, int(scaled[NOT_PRESENT]) - (rows - len(cell.ids)))  # rows of the struck off
    counts = [
        Count(code=name, vehicles=int(scaled[code]), hint=HINTS[name]) for code, name in NAMES.items() if scaled[code]
    ]
    return sorted(counts, key=lambda each: (-each.vehicles, each.code))


def _job_words(job: Job, place: int | None, counts: list[Count]) -> str:
    """The one sentence that says what matters most."""
    if job.cancelling_ms is not None:
        return "it is being cancelled; lines that run may finish"
    if place is None:
        return f"nothing of it waits: {job.leased} lines are with vehicles"
    ready = next((each.vehicles for each in counts if each.code == GETS_LINES), 0)
    if ready:
        return f"{ready} vehicles can be given its lines now"
    if job.leased:
        return f"it runs: {job.leased} lines are with vehicles, and those that could take more are busy"
    if not counts:
        return "no vehicle has ever been here"
    return f"no vehicle can take its lines: most of them ({counts[0].vehicles}) {counts[0].hint}"


def _finish_ms(cell: Cell, job: Job, now_ms: int) -> int | None:
    """The soonest end at the present speed: what was planned without its margin, or by the lines that have ended."""
    t, j = cell.t, job.row
    slack, mask = int(t.jobs["slack_ms"][j]), int(t.jobs["regions"][j])
    model, trust = int(t.jobs["model"][j]), min(int(t.jobs["min_trust"][j]), TIERS - 1)
    regions = [r for r in range(t.speeds.shape[1]) if mask == ANY_REGION or mask >> r & 1]
    if slack != NEVER and t.speeds[model, regions, trust:].sum() > 0:
        return now_ms + max(0, int((job.expires_ms - now_ms - slack) / MARGIN))
    left_ms = job.left_ms()
    return None if left_ms is None else now_ms + left_ms


# -- all vehicles at once ----------------------------------------------------------------------------------------------


def asker(vehicles: int) -> Any:
    """The compiled ``tally`` for so many vehicles; None if there are few, or nothing compiles."""
    if vehicles <= MANY:
        return None
    try:
        return compiled(sys.modules[__name__]).tally
    except ImportError:
        return None


def warm(vehicles: int) -> None:
    """Compile what will be asked: seconds at the first call of a process, for a thread of its own."""
    fast = asker(vehicles)
    if fast is not None:
        fast(Cell().t, np.arange(0), 0, 0, np.zeros(CODES, np.int64))


@kernel
def tally(t: Tables, rows: Ints, j: int, now_ms: int, numbers: Ints) -> None:
    """Count the vehicles of these rows by their verdict on a job."""
    for at in range(len(rows)):
        numbers[verdict(t, int(rows[at]), j, now_ms)] += 1


@kernel
def verdict(t: Tables, v: int, j: int, now_ms: int) -> int:
    """What a vehicle is to a job: OK if it would be given lines now, else why not, or OTHERS_FIRST.

    As ``kernels.pull`` goes, but for the stayers' turn at what is urgent, and at most MAX_EARLIER jobs deep.
    """
    code = why_not(t, v, now_ms)
    if code != OK:
        return code
    model = int(t.vehicles["model"][v])
    if model != int(t.jobs["model"][j]):
        return OTHER_MODEL
    if not site_has_room(t, v):
        return SITE_FULL
    code = refusal(t, v, j)
    if code != OK:
        return code
    first = int(t.models["first"][model])
    for place_no in range(first, first + min(int(t.models["count"][model]), MAX_EARLIER)):
        earlier = int(t.order[place_no])
        if earlier == j:
            break
        if refusal(t, v, earlier) == OK:
            return OTHERS_FIRST if share(t, v, earlier) > 0 else QUEUE_FULL
    return OK if share(t, v, j) > 0 else QUEUE_FULL


# -- a vehicle ---------------------------------------------------------------------------------------------------------


def why_vehicle(scheduler: Scheduler, vehicle_id: str, now_ms: int) -> VehicleWhy | None:
    """How a vehicle stands; None for one that the cell has never heard of."""
    cell, t = scheduler.cell, scheduler.cell.t
    v = cell.find(vehicle_id)
    if v == NONE:
        return None
    vehicle = scheduler.vehicles[vehicle_id]
    model = int(t.vehicles["model"][v])
    names = {job.row: job.job_id for job in scheduler.jobs.values()}
    order = [] if model == NONE else [int(j) for j in _order(cell, model) if int(j) in names]
    jobs = [_to(cell, v, j, names[j], now_ms) for j in order[:MAX_JOBS]]
    code = _code(cell, v, jobs, now_ms)
    return VehicleWhy(
        vehicle_id=vehicle_id,
        state=_state(vehicle),
        code=code,
        words=WORDS[code],
        guard=vehicle.reasons,
        blocked_until_ms=vehicle.blocked_until_ms if vehicle.blocked_until_ms > now_ms else None,
        paused_until_ms=vehicle.paused_until_ms if vehicle.paused_until_ms > now_ms else None,
        model=vehicle.model,
        region=vehicle.region,
        site=cell.site_names[int(t.vehicles["site"][v])],
        trust=int(t.vehicles["trust"][v]),
        reserve=bool(int(t.vehicles["flags"][v]) & RESERVE),
        speed=vehicle.speed,
        failures=vehicle.failures,
        queue_ms=int(queue_ms(t, v)),
        holds=[
            Held(job_id=scheduler.job_of(row).job_id, lines=int(t.leases["left"][row])) for row in cell.leases_of(v)
        ],
        jobs=jobs,
        other_jobs=len(scheduler.jobs) - len(jobs),
    )


def _state(vehicle: Vehicle) -> str:
    state = vehicle.state
    return "offline" if vehicle.offline or state is None else state.value


def _to(cell: Cell, v: int, j: int, job_id: str, now_ms: int) -> Refused:
    """What a job is to a vehicle."""
    code = NAMES[verdict(cell.t, v, j, now_ms)]
    return Refused(job_id=job_id, code=code, words=WORDS[code])


def _code(cell: Cell, v: int, jobs: list[Refused], now_ms: int) -> str:
    """The one answer: what holds for all jobs, else that of the job which comes nearest to giving it lines."""
    code = int(why_not(cell.t, v, now_ms))
    if code != OK:
        return NAMES[code]
    if int(cell.t.vehicles["model"][v]) == NONE:
        return NAMES[OTHER_MODEL]
    if not jobs:
        return "no_jobs"
    codes = [each.code for each in jobs]
    for best in (GETS_LINES, NAMES[QUEUE_FULL], NAMES[SITE_FULL]):
        if best in codes:
            return best
    return codes[0]
