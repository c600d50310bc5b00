"""The answers to "why does it not run?" as data, and what they mean in words.

Must not: find them; ``core.why`` does. Called by: ``core.why``, ``server.admin``, the command line, which reads them.
"""

from __future__ import annotations

from typing import Final

import msgspec

from motorpool.types import ReasonCode

GETS_LINES: Final = "gets_lines"
MAX_JOBS: Final = 50  # named for a vehicle

# Of vehicles, in the plural: what stands in the way of a job, and what would help.
HINTS: Final[dict[str, str]] = {
    "gets_lines": "can be given its lines now",
    "not_present": "are offline, or their owners have withdrawn the consent",
    "not_permitted": "are here, but their guards allow no work now; `motorpool vehicles why ID` says why",
    "paused": "are paused by their owners for a time",
    "blocked": "have just handed work back or failed, and wait a moment before they get more",
    "other_model": "have another model loaded",
    "other_region": "are outside the regions that the customer allows",
    "too_little_trust": "are in a lower tier of trust than the customer asks for; `motorpool vehicles set` changes it",
    "too_little_memory": "have less memory than the job needs",
    "nothing_waits": "could run it, but every line of it is done or with a vehicle already",
    "queue_full": "hold as much work as they should; they get more when half of it is done",
    "site_full": "stand where no more power or vehicles are allowed now; `motorpool sites list` shows the limits",
    "cheaper_later": "stand where energy will be cheaper later, and the job has time to wait",
    "may_leave_soon": "may leave before a line that has to be done in one go would be finished",
    "only_reserve": "are reserves, which work only on what would be late without them",
    "job_cancelled": "would run it, but it is being cancelled",
    "others_first": "work for jobs that are served before this one",
}
# The same of one vehicle.
WORDS: Final[dict[str, str]] = {
    "gets_lines": "it can be given lines now",
    "not_present": "it is offline, or its owner has withdrawn the consent",
    "not_permitted": "its guard allows no work now",
    "paused": "its owner has paused it",
    "blocked": "it has just handed work back or failed, and waits a moment before it gets more",
    "other_model": "it has another model loaded, or none",
    "other_region": "it is outside the regions that the customer allows",
    "too_little_trust": "it is in a lower tier of trust than the customer asks for",
    "too_little_memory": "it has less memory than the job needs",
    "nothing_waits": "every line is done or with a vehicle already",
    "queue_full": "it holds as much work as it should; it gets more when half of that is done",
    "site_full": "its site allows no more power or vehicles now",
    "cheaper_later": "energy will be cheaper here later, and the job has time to wait",
    "may_leave_soon": "it may leave before a line that has to be done in one go would be finished",
    "only_reserve": "it is a reserve, which works only on what would be late without it",
    "job_cancelled": "the job is being cancelled",
    "others_first": "it works for jobs that are served before this one",
    "no_jobs": "no job for its model has lines that wait",
}


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """How many vehicles there are for which this is the answer."""

    code: str
    vehicles: int
    hint: str


class JobWhy(msgspec.Struct, frozen=True, kw_only=True):
    """How a job stands. ``reasons``: all vehicles by what each is to this job, the largest group first.

    ``asked``: how many of the ``vehicles`` were looked at; where that is not all, the counts are scaled up.

    ``place``: in the order of the jobs of its model, from 1; None while nothing of it waits. ``slack_ms``: time to
    spare, None while that is not known. ``finish_ms``: the soonest end at the present speed, None at a standstill.
    """

    job_id: str
    model: str
    words: str
    total: int
    done: int
    held: int
    waiting: int
    expires_ms: int
    slack_ms: int | None
    behind: bool
    relaxed: bool
    best_effort: bool
    cancelling: bool
    place: int | None
    jobs_in_order: int
    lines_per_s: float
    finish_ms: int | None
    holders: int
    regions: list[str]
    min_trust: int
    vehicles: int
    asked: int
    reasons: list[Count]


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of one job that a vehicle holds."""

    job_id: str
    lines: int


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is to a vehicle."""

    job_id: str
    code: str
    words: str


class VehicleWhy(msgspec.Struct, frozen=True, kw_only=True):
    """How a vehicle stands. ``code``: why it gets nothing now, or ``gets_lines``.

    ``guard``: the reasons that it gave itself. ``speed``: measured, in work tokens a second, 0 while unknown;
    ``queue_ms``: how long what it holds will take. ``jobs``: those of its model in their order, MAX_JOBS at most;
    ``other_jobs``: how many there are besides.
    """

    vehicle_id: str
    state: str
    code: str
    words: str
    guard: list[ReasonCode]
    blocked_until_ms: int | None
    paused_until_ms: int | None
    model: str | None
    region: str
    site: str
    trust: int
    reserve: bool
    speed: float
    failures: int
    queue_ms: int
    holds: list[Held]
    jobs: list[Refused]
    other_jobs: int
