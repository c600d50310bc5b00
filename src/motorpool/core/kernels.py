"""The hot decisions of a cell, as functions over its columns: who gets which work, how much, and on which vehicle.

Production and the simulator run these same functions, plain or compiled (``core.jit``). Each takes the ``Tables`` and
rows; none knows a name. What they decide:

- ``plan`` orders the jobs of each model: see ``core.planning``.
- ``switch_to`` moves vehicles between models.
- ``pull`` says what a vehicle gets next: the first job in that order that it may run, and so many lines that its queue
  holds two to fifteen minutes of work at its measured speed, less where time is short or the car is about to leave.
- ``place`` finds the vehicle for a live request: of eight candidates the one least likely to leave.

Called by: ``core.cell``, ``sim.fleet_gear``.
"""

from __future__ import annotations

import math
from typing import Final

from motorpool.core.columns import (
    ANY_REGION,
    BEHIND,
    BEST_EFFORT,
    CANCELLING,
    DRAWING,
    MAX_AFTER_MS,
    NONE,
    NOT_MISSING,
    OFFLINE,
    READY,
    RECALLED,
    RELAXED,
    RESERVE,
    RISK_BUCKETS,
    SHADOW,
    STEP,
    TIERS,
    WHOLE,
    WITHDRAWN,
    WORKING,
    Ints,
    Tables,
)
from motorpool.core.horizon import whole_ms
from motorpool.core.jit import kernel
from motorpool.core.planning import COVERED, cover, patience_ms, plan, speed_at, waiting

__all__ = ["patience_ms", "plan", "waiting"]  # they are kernels of this room too

MIN_DEPTH_MS: Final = 20_000
USUAL_DEPTH_MS: Final = 120_000  # covers a short silence of the network
MAX_DEPTH_MS: Final = 900_000  # a deeper queue would make urgent work wait
CHUNK_MS: Final = 30_000  # a lease of less is more trouble than work, where there are many vehicles
MANY: Final = 64
MAX_LEAVING: Final = 0.05  # how likely it may be that a queue is cut short by a departure
RISK_MS: Final = 900_000
SLOTS_DEPTH: Final = 2  # while one line runs, the next one waits
MAX_DEPTH_LINES: Final = 16_384
MIN_LEASE_MS: Final = 300_000
MAX_LEASE_MS: Final = 3_600_000
TURNS: Final = 10  # a job has time for the usual lease if it has time for so many
OUTAGE_S: Final = 30  # a silence of less is the usual pause between two reports
MAX_OUTAGE_S: Final = 1_800  # and one of more no gap in the network: the car was away or asleep
RECALL_ROWS: Final = 4_096  # of leases that one look for late ones goes through, and
RECALL_PARTS: Final = 30  # in so many looks it goes through all
LEASE_ROW_BITS: Final = 24  # of a lease's number: its row; the rest says which of the leases that had it
WHOLE_TARGET: Final = 0.9  # how probable it must be that work which is done in one go ends in time
SWITCH_STAY: Final = 10
BETTER: Final = 0.1  # by how much more a vehicle must leave its model covered than the other one is
TIGHT: Final = 2  # of a job whose time is less than so many queues, stayers get the lines first
STAYER_RISK_PCT: Final = 5
MAX_LIVE_PER_SLOT: Final = 64
CANDIDATES: Final = 8
SPEED_SMOOTHING: Final = 0.3
MEASURE_MS: Final = 1_000
MIN_PASSED_MS: Final = 50  # for the first measure, which does not wait so long
RISK_EDGES_PCT: Final = (1, 4, 10)

# Why a vehicle gets no line of a job; ``core.why`` puts them into words.
OK: Final = 0
NOT_PRESENT: Final = 1
NOT_PERMITTED: Final = 2
BLOCKED: Final = 3
PAUSED: Final = 4
OTHER_MODEL: Final = 5
OTHER_REGION: Final = 6
TOO_LITTLE_TRUST: Final = 7
TOO_LITTLE_MEMORY: Final = 8
NOTHING_WAITS: Final = 9
QUEUE_FULL: Final = 10
SITE_FULL: Final = 11
CHEAPER_LATER: Final = 12
MAY_LEAVE_SOON: Final = 13
ONLY_RESERVE: Final = 14
JOB_CANCELLED: Final = 15
REASONS: Final = {
    "not_present": NOT_PRESENT,
    "not_permitted": NOT_PERMITTED,
    "blocked": BLOCKED,
    "paused": PAUSED,
    "other_model": OTHER_MODEL,
    "other_region": OTHER_REGION,
    "too_little_trust": TOO_LITTLE_TRUST,
    "too_little_memory": TOO_LITTLE_MEMORY,
    "nothing_waits": NOTHING_WAITS,
    "queue_full": QUEUE_FULL,
    "site_full": SITE_FULL,
    "cheaper_later": CHEAPER_LATER,
    "may_leave_soon": MAY_LEAVE_SOON,
    "only_reserve": ONLY_RESERVE,
    "job_cancelled": JOB_CANCELLED,
}


@kernel
def present(t: Tables, v: int) -> bool:
    """Whether a vehicle is here and says itself that it may work."""
    flags = int(t.vehicles["flags"][v])
    state = int(t.vehicles["state"][v])
    return flags & (OFFLINE | WITHDRAWN) == 0 and (state in (READY, WORKING))


@kernel
def why_not(t: Tables, v: int, now_ms: int) -> int:
    """Why a vehicle can be given no work at all, or OK."""
    if int(t.vehicles["flags"][v]) & (OFFLINE | WITHDRAWN) != 0:
        return NOT_PRESENT
    if not present(t, v):
        return NOT_PERMITTED
    if now_ms < int(t.vehicles["paused_until_s"][v]) * 1000:
        return PAUSED
    if now_ms < int(t.vehicles["blocked_until_s"][v]) * 1000:
        return BLOCKED
    return OK


@kernel
def recount(t: Tables, v: int) -> None:
    """Keep the counts of the vehicle's model, and its bucket, true after the vehicle has changed."""
    vehicles, models = t.vehicles, t.models
    model = int(vehicles["model"][v]) if present(t, v) else NONE
    place, mtok_s, bucket = NONE, 0, NONE
    regions = t.speeds.shape[1]
    if model != NONE:
        region, trust = int(vehicles["region"][v]), min(int(vehicles["trust"][v]), TIERS - 1)
        place = (model * regions + region) * TIERS + trust
        # What can be counted on for half an hour: whoever is about to leave counts for less.
        stays_pct = max(100 - int(vehicles["risk_pct"][v]), 0)
        mtok_s = min(int(float(vehicles["speed"][v]) * 0.1 * stays_pct * stays_pct), 2_000_000_000)
        bucket = bucket_of(t, v)
    before, mtok_s_before = int(vehicles["counted_place"][v]), int(vehicles["counted_mtok_s"][v])
    stood = NONE
    if before != NONE:
        stood = before // TIERS * RISK_BUCKETS + int(vehicles["flags"][v]) // STEP % RISK_BUCKETS
    if before != place or mtok_s_before != mtok_s:
        if before != NONE:
            m = before // (regions * TIERS)
            models["serving"][m] -= 1
            models["measured"][m] -= 1 if mtok_s_before > 0 else 0
            t.speeds[m, before // TIERS % regions, before % TIERS] -= mtok_s_before
        if place != NONE:
            models["serving"][model] += 1
            models["measured"][model] += 1 if mtok_s > 0 else 0
            t.speeds[model, place // TIERS % regions, place % TIERS] += mtok_s
        vehicles["counted_place"][v] = place
        vehicles["counted_mtok_s"][v] = mtok_s
    if bucket != stood:
        if stood != NONE:
            _leave_bucket(t, v, stood)
        if bucket != NONE:
            _enter_bucket(t, v, bucket)


@kernel
def bucket_of(t: Tables, v: int) -> int:
    """Where a vehicle stands in the index: by model, region and risk of leaving."""
    risk = int(t.vehicles["risk_pct"][v])
    step = 0
    for edge in RISK_EDGES_PCT:
        if risk > edge:
            step += 1
    regions = len(t.buckets) // (len(t.models) * RISK_BUCKETS)
    return (int(t.vehicles["model"][v]) * regions + int(t.vehicles["region"][v])) * RISK_BUCKETS + step


@kernel
def _enter_bucket(t: Tables, v: int, bucket: int) -> None:
    """At the end of a ring, whose head is the next to be looked at."""
    vehicles = t.vehicles
    head = int(t.buckets[bucket])
    step = bucket % RISK_BUCKETS
    vehicles["flags"][v] = int(vehicles["flags"][v]) & ~((RISK_BUCKETS - 1) * STEP) | step * STEP
    if head == NONE:
        t.buckets[bucket] = v
        vehicles["next"][v] = v
        vehicles["previous"][v] = v
        return
    last = int(vehicles["previous"][head])
    vehicles["next"][last] = v
    vehicles["previous"][v] = last
    vehicles["next"][v] = head
    vehicles["previous"][head] = v


@kernel
def _leave_bucket(t: Tables, v: int, bucket: int) -> None:
    vehicles = t.vehicles
    after, before = int(vehicles["next"][v]), int(vehicles["previous"][v])
    if after == v:
        t.buckets[bucket] = NONE
    else:
        vehicles["next"][before] = after
        vehicles["previous"][after] = before
        if int(t.buckets[bucket]) == v:
            t.buckets[bucket] = after
    vehicles["next"][v] = NONE
    vehicles["previous"][v] = NONE


@kernel
def place(t: Tables, model: int, region: int, now_ms: int, tried: Ints) -> int:
    """The vehicle for a live request, or NONE: of CANDIDATES, the least loaded of those that stay longest.

    ``region``: NONE if any will do. ``tried``: vehicles that broke or refused it. Every look moves the ring on, so that
    equal vehicles take turns.
    """
    regions = len(t.buckets) // (len(t.models) * RISK_BUCKETS)
    low = 0 if region == NONE else region
    high = regions if region == NONE else region + 1
    best, best_load = NONE, 0.0
    looked = 0
    for step in range(RISK_BUCKETS):
        for where in range(low, high):
            bucket = (model * regions + where) * RISK_BUCKETS + step
            v = int(t.buckets[bucket])
            if v == NONE:
                continue
            first = v
            while looked < CANDIDATES:
                after = int(t.vehicles["next"][v])
                load = _live_load(t, v, now_ms, tried)
                if load >= 0.0:
                    looked += 1
                    # A free slot counts more than a longer stay, and of two loads the longer stay wins.
                    if best == NONE or load < best_load:
                        best, best_load = v, load
                v = after
                if v == first:
                    break
            t.buckets[bucket] = v
        if best != NONE and (looked >= CANDIDATES or best_load < 1.0):
            return best
    return best


@kernel
def _live_load(t: Tables, v: int, now_ms: int, tried: Ints) -> float:
    """Live requests on a slot of this vehicle, or -1 if it cannot take one more."""
    if why_not(t, v, now_ms) != OK or not site_has_room(t, v):
        return -1.0
    for place_no in range(len(tried)):
        if int(tried[place_no]) == v:
            return -1.0
    slots = max(1, int(t.vehicles["slots"][v]))
    live = int(t.vehicles["live"][v])
    return -1.0 if live >= MAX_LIVE_PER_SLOT * slots else live / slots


@kernel
def is_free(t: Tables, v: int, model: int, now_ms: int, nobody: Ints) -> bool:
    """Whether a vehicle has a model loaded, a slot for a live request, and a middling risk of leaving at most."""
    if int(t.vehicles["model"][v]) != model or int(t.vehicles["risk_pct"][v]) > RISK_EDGES_PCT[1]:
        return False
    load = _live_load(t, v, now_ms, nobody)
    return load >= 0.0 and load < 1.0


@kernel
def work_of(prompt_tokens: int, completion_tokens: int) -> float:
    """Work tokens of an answer: reading a token costs an eighth of writing one."""
    return completion_tokens + prompt_tokens * 0.125


@kernel
def learn_speed(t: Tables, v: int, work: float, since_ms: int, now_ms: int) -> None:
    """Work of a vehicle was accepted: smooth its speed, from results and never from claims, about once a second.

    ``since_ms``: when the oldest of its leases was granted.
    """
    vehicles = t.vehicles
    vehicles["failures"][v] = 0
    vehicles["finished"][v] = float(vehicles["finished"][v]) + work
    since = max(int(vehicles["result_ms"][v]), since_ms)
    passed_ms = now_ms - since
    known = float(vehicles["speed"][v])
    if passed_ms < MEASURE_MS and known > 0.0:
        return
    rate = float(vehicles["finished"][v]) * 1000.0 / max(passed_ms, MIN_PASSED_MS)
    vehicles["speed"][v] = rate if known == 0.0 else (1.0 - SPEED_SMOOTHING) * known + SPEED_SMOOTHING * rate
    vehicles["result_ms"][v] = now_ms
    vehicles["finished"][v] = 0.0
    recount(t, v)


@kernel
def depth_ms(outage_s: int, risk_pct: int, slack_ms: int, tight_ms: int) -> int:
    """How much work a vehicle's queue should hold, as time, from two to fifteen minutes.

    A quarter of the time that the most urgent job has to spare which waits for such vehicles (``tight_ms``), and no
    less than three times the vehicle's usual silence; but at most a quarter of what the job itself has to spare
    (``slack_ms``), and no more than the car stays for with 95 %.
    """
    depth = min(max(USUAL_DEPTH_MS, 3000 * outage_s, min(slack_ms, tight_ms) // 4), MAX_DEPTH_MS)
    depth = min(depth, max(slack_ms // 4, MIN_DEPTH_MS))
    if risk_pct > 0:
        hazard = -math.log(max(1.0 - risk_pct / 100.0, 0.001))
        depth = min(depth, max(int(MAX_LEAVING * RISK_MS / hazard), MIN_DEPTH_MS))
    return depth


@kernel
def refusal(t: Tables, v: int, j: int) -> int:
    """Why this vehicle gets no line of this job now, or OK, if it can be given work and has its model loaded."""
    vehicles, jobs = t.vehicles, t.jobs
    flags = int(jobs["flags"][j])
    if flags & CANCELLING != 0:
        return JOB_CANCELLED
    mask = int(jobs["regions"][j])
    region = int(vehicles["region"][v])
    if mask != ANY_REGION and (mask >> region) & 1 == 0:
        return OTHER_REGION
    if int(vehicles["trust"][v]) < int(jobs["min_trust"][j]):
        return TOO_LITTLE_TRUST
    if 0 < int(vehicles["memory_gb"][v]) < int(jobs["memory_gb"][j]):  # one that does not say serves the model already
        return TOO_LITTLE_MEMORY
    if int(vehicles["flags"][v]) & RESERVE != 0 and flags & BEHIND == 0:
        return ONLY_RESERVE
    if flags & WHOLE != 0 and not _may_be_whole(t, v, j):
        return MAY_LEAVE_SOON
    if flags & RELAXED != 0 and float(jobs["bid_micro_kwh"][j]) < int(t.prices[region]):
        return CHEAPER_LATER
    return OK if waiting(t, j) > 0 else NOTHING_WAITS


@kernel
def switch_to(t: Tables, v: int, idle: bool) -> int:
    """The model that a vehicle should load in place of its own, or NONE.

    A vehicle leaves its model when it has found nothing to do there (``idle``), or when others keep the promises of its
    region without it. It goes where a promise is in danger, else, if it is idle, where the most work waits for each
    unit of speed; only to models that it has on its disk and finds work for, and only if it stays ten times as long as
    loading takes. What it has not begun it gives back first.
    """
    vehicles, models = t.vehicles, t.models
    own = int(vehicles["model"][v])
    if own == NONE:
        return NONE
    region = int(vehicles["region"][v])
    speed = int(vehicles["counted_mtok_s"][v])
    trust = min(int(vehicles["trust"][v]), TIERS - 1)
    left = COVERED if idle else cover(t, own, region, trust, speed) - BETTER
    on_disk = int(vehicles["on_disk"][v])
    best, best_want = NONE, 0.0
    for m in range(min(len(models), 32)):
        if m == own or (on_disk >> m) & 1 == 0 or int(models["count"][m]) == 0:
            continue
        if int(vehicles["stay_min"][v]) * 60_000 < SWITCH_STAY * int(models["load_ms"][m]):
            continue
        covered = cover(t, m, region, trust, 0)
        if covered < min(left, 1.0):
            want = 1e12 * (2.0 - covered)
        elif idle:
            want = float(models["waiting_work"][m]) / (speed_at(t, m, region) + 1000)
        else:
            continue
        if want > best_want and _finds_work(t, v, m):
            best, best_want = m, want
    return best


@kernel
def _finds_work(t: Tables, v: int, model: int) -> bool:
    """Whether a model has a job that a vehicle may run."""
    first = int(t.models["first"][model])
    for place_no in range(first, first + int(t.models["count"][model])):
        if refusal(t, v, int(t.order[place_no])) == OK:
            return True
    return False


@kernel
def _may_be_whole(t: Tables, v: int, j: int) -> bool:
    """Whether a vehicle stays long enough for a line that is done in one go, and has nothing else to do first."""
    speed, work = float(t.vehicles["speed"][v]), float(t.jobs["work_per_line"][j])
    if speed <= 0.0 or int(t.vehicles["outstanding"][v]) > 0:
        return False
    bound_ms = int(t.vehicles["stay_min"][v]) * 60_000
    risk = int(t.vehicles["risk_pct"][v]) / 100.0
    most_ms = whole_ms(int(t.jobs["overhead_ms"][j]), WHOLE_TARGET, bound_ms, risk)
    return int(work * 1000.0 / speed) <= most_ms


@kernel
def queue_ms(t: Tables, v: int) -> int:
    """How long a vehicle will be busy with what it holds, at its measured speed; 0 while that is not known."""
    return through_ms(t, v, int(t.vehicles["lease"][v]))


@kernel
def through_ms(t: Tables, v: int, row: int) -> int:
    """How long it takes until a vehicle is through one of its leases: those that are older come first."""
    speed = float(t.vehicles["speed"][v])
    if speed <= 0.0:
        return 0
    work = 0.0
    while row != NONE:
        work += int(t.leases["left"][row]) * float(t.jobs["work_per_line"][int(t.leases["job"][row])])
        row = int(t.leases["next"][row])
    return int(work * 1000.0 / speed)


@kernel
def lease_ms(t: Tables, v: int, work: float) -> int:
    """How long a new lease of so much work may take: four times what is expected, with what comes before it."""
    speed = float(t.vehicles["speed"][v])
    if speed <= 0.0:
        return MIN_LEASE_MS
    expected_ms = queue_ms(t, v) + int(min(work * 1000.0 / speed, 1e12))
    return min(max(4 * expected_ms, MIN_LEASE_MS), MAX_LEASE_MS)


@kernel
def share(t: Tables, v: int, j: int) -> int:
    """How many more lines of a job a vehicle should hold now; 0: its queue is full enough.

    While speeds are not known, two lines for each slot. Then as much as ``depth_ms`` says, but at most what falls to it
    if all that serve the model share what waits twice over (so that all finish together); among many vehicles at least
    CHUNK_MS of work. Nothing before the queue is half empty.
    """
    vehicles, jobs = t.vehicles, t.jobs
    pending = waiting(t, j)
    if int(jobs["flags"][j]) & WHOLE != 0:
        return 1 if int(vehicles["outstanding"][v]) == 0 else 0
    serving = max(1, int(t.models["serving"][int(jobs["model"][j])]))
    slots = max(1, int(vehicles["slots"][v]))
    part = -(-pending // serving)
    least = min(slots * SLOTS_DEPTH, MAX_DEPTH_LINES, part)
    if pending < serving * least:
        least = min(slots, least)
    outstanding = int(vehicles["outstanding"][v])
    speed, per_line = float(vehicles["speed"][v]), float(jobs["work_per_line"][j])
    if speed <= 0.0 or per_line <= 0.0:
        return least - outstanding if outstanding <= least // 2 else 0
    # Few vehicles get short queues: customers take turns by queues.
    tight_ms = int(t.tight[int(vehicles["model"][v]), int(vehicles["region"][v])]) if serving >= MANY else 0
    depth = depth_ms(int(vehicles["outage_s"][v]), int(vehicles["risk_pct"][v]), int(jobs["slack_ms"][j]), tight_ms)
    busy_ms = queue_ms(t, v)
    line_ms = per_line * 1000.0 / speed
    chunk_ms = CHUNK_MS if serving >= MANY and int(jobs["slack_ms"][j]) > TURNS * CHUNK_MS else 0
    all_ms = int(min(float(t.models["waiting_work"][int(jobs["model"][j])]) * 500.0 / (serving * speed), 1e12))
    depth = min(depth, max(all_ms, chunk_ms))
    if busy_ms * 2 > depth and outstanding > least // 2:
        return 0
    fair = -(-pending // (2 * serving))
    room = min(int((depth - busy_ms) / line_ms), MAX_DEPTH_LINES)
    return max(min(room, max(fair, int(chunk_ms / line_ms))), least - outstanding, 0)


@kernel
def pull(t: Tables, v: int, now_ms: int, out: Ints) -> int:
    """The job row that a vehicle gets lines of next, or NONE; ``out[0]`` is how many lines, ``out[1]`` why none.

    The vehicle is one that can be given work. Called again until it says no.
    """
    out[0] = 0
    out[1] = NOTHING_WAITS
    model = int(t.vehicles["model"][v])
    if model == NONE:
        out[1] = OTHER_MODEL
        return NONE
    if not site_has_room(t, v):
        out[1] = SITE_FULL
        return NONE
    risk = int(t.vehicles["risk_pct"][v])
    first = int(t.models["first"][model])
    left_out = NONE
    for place_no in range(first, first + int(t.models["count"][model])):
        j = int(t.order[place_no])
        no = refusal(t, v, j)
        if no != OK:
            if no != NOTHING_WAITS:
                out[1] = no
            continue
        if risk > STAYER_RISK_PCT and _is_tight(t, j, now_ms) and left_out == NONE:
            left_out = j  # others should have it; if this vehicle finds nothing else, it is better than nobody
            continue
        count = share(t, v, j)
        if count <= 0:
            out[1] = QUEUE_FULL
            return NONE
        out[0] = min(count, waiting(t, j))
        out[1] = OK
        return j
    if left_out != NONE:
        count = share(t, v, left_out)
        if count > 0:
            out[0] = min(count, waiting(t, left_out))
            out[1] = OK
            return left_out
        out[1] = QUEUE_FULL
    return NONE


@kernel
def _is_tight(t: Tables, j: int, now_ms: int) -> bool:
    """Whether a job ends so soon that a queue which is lost once is lost for good."""
    return int(t.jobs["expires_ms"][j]) - now_ms < TIGHT * USUAL_DEPTH_MS and waiting(t, j) > 0


@kernel
def site_has_room(t: Tables, v: int) -> bool:
    """Whether the place where a vehicle stands has power and network for one more that works."""
    site = int(t.vehicles["site"][v])
    if site == 0 or int(t.vehicles["flags"][v]) & DRAWING != 0:
        return True
    sites = t.sites
    if int(sites["limit_w"][site]) > 0:
        needs_w = int(sites["used_w"][site]) + int(t.vehicles["permit_w"][v])
        if needs_w > int(sites["limit_w"][site]):
            return False
    limit = int(sites["limit_vehicles"][site])
    return limit == 0 or int(sites["working"][site]) < limit


@kernel
def draw(t: Tables, v: int) -> None:
    """Keep what a site gives true after a vehicle has got its first line or live request, or lost its last."""
    vehicles, sites = t.vehicles, t.sites
    site = int(vehicles["site"][v])
    flags = int(vehicles["flags"][v])
    draws = int(vehicles["outstanding"][v]) > 0 or int(vehicles["live"][v]) > 0
    if site == 0 or draws == (flags & DRAWING != 0):
        return
    if draws:
        sites["used_w"][site] += int(vehicles["permit_w"][v])
        sites["working"][site] += 1
        vehicles["flags"][v] = flags | DRAWING
    else:
        sites["used_w"][site] -= int(vehicles["permit_w"][v])
        sites["working"][site] -= 1
        vehicles["flags"][v] = flags & ~DRAWING


@kernel
def open_lease(t: Tables, v: int, j: int, count: int, work: float, now_ms: int, expires_ms: int) -> int:
    """Take a free row for a lease of ``count`` lines; the row, or NONE if the table has to grow first."""
    row = int(t.free[0])
    if row == NONE:
        return NONE
    leases, vehicles = t.leases, t.vehicles
    t.free[0] = int(leases["next"][row])
    leases["number"][row] = (int(t.free[1]) << LEASE_ROW_BITS) + row
    t.free[1] += 1
    leases["granted_ms"][row] = now_ms
    leases["life_ms"][row] = min(max(expires_ms - now_ms, 0), MAX_AFTER_MS)
    leases["sent_after_ms"][row] = 0
    leases["missing_after_ms"][row] = NOT_MISSING
    leases["vehicle"][row] = v
    leases["job"][row] = j
    leases["first"][row] = 0
    leases["span"][row] = 0
    leases["left"][row] = count
    leases["sends"][row] = 1
    leases["flags"][row] = 0
    leases["next"][row] = int(vehicles["lease"][v])
    vehicles["lease"][v] = row
    vehicles["outstanding"][v] += count
    t.jobs["leased"][j] += count
    model = int(t.jobs["model"][j])
    t.models["waiting_work"][model] = max(float(t.models["waiting_work"][model]) - work, 0.0)
    t.tenants["used"][int(t.jobs["tenant"][j])] += work
    draw(t, v)
    return row


@kernel
def open_leases(
    t: Tables, begun: int, v: Ints, j: Ints, held: Ints, granted_ms: Ints, expires_ms: Ints, rows: Ints
) -> int:
    """Leases from the books, in columns, from the one numbered ``begun`` on; their rows into ``rows``.

    ``held`` [3, leases]: how many lines, the lowest, how far they reach. How many leases are done in all: fewer than
    there are if the table has to grow first.
    """
    for n in range(begun, len(v)):
        left = int(held[0, n])
        work = left * float(t.jobs["work_per_line"][int(j[n])])
        row = open_lease(t, int(v[n]), int(j[n]), left, work, int(granted_ms[n]), int(expires_ms[n]))
        if row == NONE:
            return n
        t.leases["first"][row] = int(held[1, n])
        t.leases["span"][row] = int(held[2, n])
        rows[n] = row
    return len(v)


@kernel
def shrink_lease(t: Tables, row: int, count: int) -> int:
    """So many lines of a lease have ended or are taken out; how many are left. The job's count is the caller's."""
    leases, vehicles = t.leases, t.vehicles
    left = int(leases["left"][row])
    v = int(leases["vehicle"][row])
    leases["left"][row] = left - count
    vehicles["outstanding"][v] -= count
    draw(t, v)
    return left - count


@kernel
def close_lease(t: Tables, row: int) -> None:
    """Give the row of a lease back; its lines are taken out before."""
    leases, vehicles = t.leases, t.vehicles
    v = int(leases["vehicle"][row])
    at = int(vehicles["lease"][v])
    if at == row:
        vehicles["lease"][v] = int(leases["next"][row])
    else:
        while int(leases["next"][at]) != row:
            at = int(leases["next"][at])
        leases["next"][at] = int(leases["next"][row])
    leases["number"][row] = NONE
    leases["job"][row] = NONE
    leases["vehicle"][row] = NONE
    leases["next"][row] = int(t.free[0])
    t.free[0] = row


@kernel
def recall(t: Tables, now_ms: int, out: Ints) -> int:
    """Leases from which the lines that are not begun should come back, into ``out``; how many they are.

    Those whose vehicle would not be through its queue, and a quarter more, before the job ends: it is slower than was
    thought. Each lease is recalled once. Of a large table each call looks at the next part.
    """
    leases = t.leases
    found = 0
    rows = len(leases)
    row = int(t.free[3]) % rows
    for _ in range(min(rows, max(RECALL_ROWS, rows // RECALL_PARTS))):
        if found == len(out):
            break
        if int(leases["number"][row]) != NONE and _is_late(t, row, now_ms):
            leases["flags"][row] = int(leases["flags"][row]) | RECALLED
            out[found] = row
            found += 1
        row = row + 1 if row + 1 < rows else 0
    t.free[3] = row
    return found


@kernel
def _is_late(t: Tables, row: int, now_ms: int) -> bool:
    """Whether a lease should be recalled."""
    leases, jobs = t.leases, t.jobs
    j = int(leases["job"][row])
    left_ms = int(jobs["expires_ms"][j]) - now_ms
    if left_ms > 2 * MAX_DEPTH_MS or int(leases["flags"][row]) & (RECALLED | SHADOW) != 0:
        return False
    v = int(leases["vehicle"][row])
    if int(jobs["flags"][j]) & (BEST_EFFORT | WHOLE | CANCELLING) != 0 or not present(t, v):
        return False
    busy_ms = through_ms(t, v, row)
    return busy_ms + busy_ms // 4 > left_ms


@kernel
def oldest_grant_ms(t: Tables, v: int, now_ms: int) -> int:
    """When the oldest of a vehicle's leases was granted; now if it has none."""
    oldest = now_ms
    row = int(t.vehicles["lease"][v])
    while row != NONE:
        oldest = min(oldest, int(t.leases["granted_ms"][row]))
        row = int(t.leases["next"][row])
    return oldest


@kernel
def finished(t: Tables, j: int, lines: int, work: float) -> None:
    """Lines of a job have ended with so much work: what a line takes is learnt from it."""
    jobs = t.jobs
    jobs["done"][j] += lines
    jobs["done_work"][j] += work
    jobs["work_per_line"][j] = float(jobs["done_work"][j]) / max(1, int(jobs["done"][j]))


@kernel
def report(t: Tables, v: int, state: int, model: int, region: int, slots: int, permit_w: int, now_ms: int) -> None:
    """A vehicle has said how it is; what it says of its stay is written by the caller before."""
    vehicles = t.vehicles
    flags = int(vehicles["flags"][v])
    silent_s = (now_ms - int(vehicles["seen_ms"][v])) // 1000
    if int(vehicles["seen_ms"][v]) > 0 and OUTAGE_S < silent_s <= MAX_OUTAGE_S:
        known = int(vehicles["outage_s"][v])  # rises at once to a longer silence, and falls slowly
        vehicles["outage_s"][v] = max(silent_s, known - known // 8)
    if flags & DRAWING != 0:
        site = int(vehicles["site"][v])
        t.sites["used_w"][site] += permit_w - int(vehicles["permit_w"][v])
    vehicles["flags"][v] = flags & ~OFFLINE
    vehicles["state"][v] = state
    vehicles["model"][v] = model
    vehicles["region"][v] = region
    vehicles["slots"][v] = slots
    vehicles["permit_w"][v] = permit_w
    vehicles["seen_ms"][v] = now_ms
    recount(t, v)
