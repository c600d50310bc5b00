"""In which order jobs are served, how much time each has to spare, and where models are wanted: once a second.

``plan`` orders the jobs of each model. Served earliest end first at the cell's present speed, does every job keep a
margin? Then the customers take turns: who has had least for its weight goes first. Jobs without a margin, and all that
end before them, go strictly by their end. Work without a promise goes after all other.

Called by: ``core.kernels``, which hands it on; see there for what a kernel is.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from motorpool.core.columns import (
    ANY_REGION,
    BEHIND,
    BEST_EFFORT,
    IN_ORDER,
    NEVER,
    RELAXED,
    TIERS,
    Floats,
    Ints,
    Tables,
)
from motorpool.core.jit import allocating_kernel, kernel

SILENT_MS: Final = 20_000  # no report for so long: a vehicle is taken for gone
PATIENCE_MS: Final = 180_000  # and so long what has time is left to it: most silences of a network are over by then
MAX_PATIENCE_MS: Final = 1_800_000
MARGIN: Final = 1.3  # of the time that work is expected to take
COVERED: Final = 1e6
ALLOW_MS: Final = 60_000  # before its end a job should be done
MARGIN_MS: Final = 1_800_000  # with less to spare jobs go strictly by their end


@kernel
def waiting(t: Tables, j: int) -> int:
    """Lines of a job that nobody holds."""
    return int(t.jobs["total"][j]) - int(t.jobs["done"][j]) - int(t.jobs["leased"][j])


@kernel
def patience_ms(t: Tables, j: int) -> int:
    """How long the cell waits for a silent vehicle before others get the lines of this job that it holds.

    It goes on working without a network, so who takes its lines back at once has most of them done twice. Where
    nothing else of the job waits, or its time is short, they go to others at once all the same; else an eighth of the
    job's slack, from three minutes to half an hour.
    """
    flags = int(t.jobs["flags"][j])
    if waiting(t, j) <= 0:
        return SILENT_MS
    if flags & BEST_EFFORT != 0:
        return MAX_PATIENCE_MS
    if flags & RELAXED == 0:
        return SILENT_MS
    return min(max(int(t.jobs["slack_ms"][j]) // 8, PATIENCE_MS), MAX_PATIENCE_MS)


@allocating_kernel
def plan(t: Tables, rows: Ints, now_ms: int) -> None:
    """Order the jobs of each model. ``rows``: those of all jobs that are not cancelled, the older first.

    Writes ``order`` with those that have waiting lines, each model's ``first`` and ``count``, and of each job the slack
    and its flags. Work without a promise goes after all other.
    """
    jobs, models = t.jobs, t.models
    for m in range(len(models)):
        models["first"][m] = 0
        models["count"][m] = 0
        models["waiting_work"][m] = 0.0
        for region in range(int(t.free[2])):
            t.tight[m, region] = NEVER
    keys = np.empty(len(rows), np.int64)
    for place_no in range(len(rows)):
        keys[place_no] = int(jobs["expires_ms"][rows[place_no]])
    by_end = rows[np.argsort(keys, kind="mergesort")]
    for place_no in range(len(rows)):
        j = by_end[place_no]
        keys[place_no] = int(jobs["model"][j]) * 2 + (1 if int(jobs["flags"][j]) & BEST_EFFORT != 0 else 0)
    by_end = by_end[np.argsort(keys, kind="mergesort")]
    start = 0
    filled = 0
    while start < len(by_end):
        model = int(jobs["model"][by_end[start]])
        stop = start
        while stop < len(by_end) and int(jobs["model"][by_end[stop]]) == model:
            stop += 1
        promised = start
        while promised < stop and int(jobs["flags"][by_end[promised]]) & BEST_EFFORT == 0:
            promised += 1
        strict = _slack(t, by_end, start, promised, now_ms)
        _take_turns(t, by_end, strict, promised)
        _take_turns(t, by_end, promised, stop)
        filled = _enter_order(t, by_end, start, stop, filled)
        start = stop


@kernel
def _enter_order(t: Tables, by_end: Ints, start: int, stop: int, filled: int) -> int:
    """Those of a model's jobs that have waiting lines, in their order; how many jobs the whole order has then."""
    jobs, models = t.jobs, t.models
    model = int(jobs["model"][by_end[start]])
    models["first"][model] = filled
    work, lines = 0.0, 0
    for place_no in range(start, stop):
        j = int(by_end[place_no])
        waits = waiting(t, j)
        flags = int(jobs["flags"][j]) & ~IN_ORDER
        jobs["flags"][j] = flags | IN_ORDER if waits > 0 else flags
        if waits > 0:
            work += waits * float(jobs["work_per_line"][j])
            lines += waits
            t.order[filled] = j
            filled += 1
    models["count"][model] = filled - int(models["first"][model])
    models["waiting_work"][model] = work
    if lines > 0 and work > 0.0:
        models["work_per_line"][model] = work / lines
    return filled


@allocating_kernel
def _slack(t: Tables, by_end: Ints, start: int, stop: int, now_ms: int) -> int:
    """The time to spare of each job if those that end sooner go first; the end of those that must go by their end.

    The work of a job is spread over the regions in which it may run, in proportion to what it finds there. What a job
    has to wait for is the work that lies in its regions before it.
    """
    jobs = t.jobs
    if start == stop:
        return stop
    model = int(jobs["model"][by_end[start]])
    regions = int(t.free[2])
    measured = int(t.models["measured"][model])
    # Those that are not measured yet are taken for as fast as the others.
    scale = int(t.models["serving"][model]) / measured if measured > 0 else 1.0
    before = np.zeros((regions, TIERS), np.float64)
    can = np.zeros(regions, np.float64)
    for region in range(regions):
        for tier in range(TIERS):
            t.needs[model, region, tier] = 0
    strict = start
    for place_no in range(start, stop):
        j = by_end[place_no]
        left = int(jobs["total"][j]) - int(jobs["done"][j])
        work = left * float(jobs["work_per_line"][j])
        time_ms = int(jobs["expires_ms"][j]) - now_ms
        tokens_s = _spread(t, j, work, scale, before, can)
        waits = 0.0
        for region in range(regions):
            if can[region] > 0.0:
                waits += before[region, 0]
                for tier in range(min(int(jobs["min_trust"][j]), TIERS - 1) + 1):
                    need = MARGIN * before[region, tier] * 1_000_000.0 / max(time_ms - ALLOW_MS, 60_000)
                    t.needs[model, region, tier] = max(int(t.needs[model, region, tier]), int(min(need, 1e15)))
        need_ms = int(min(MARGIN * waits * 1000.0 / tokens_s, 1e15)) if tokens_s > 0.0 else 0
        slack_ms = time_ms - need_ms
        jobs["slack_ms"][j] = slack_ms
        if waiting(t, j) > 0:
            for region in range(regions):
                if can[region] > 0.0:
                    t.tight[model, region] = min(int(t.tight[model, region]), slack_ms)
        flags = int(jobs["flags"][j]) & ~(BEHIND | RELAXED)
        if slack_ms < 0:
            flags |= BEHIND
        elif slack_ms > MARGIN_MS:
            flags |= RELAXED
        if not flags & RELAXED:
            strict = place_no + 1
        jobs["flags"][j] = flags
    return strict


@kernel
def _spread(t: Tables, j: int, work: float, scale: float, before: Floats, can: Floats) -> float:
    """Spread the work of a job over its regions; the speed that it finds there, work tokens a second.

    ``before[region, tier]`` is the work that asks for this trust or more, ``can`` what each region gives to the job;
    where nothing is present yet all regions count alike.
    """
    model, trust = int(t.jobs["model"][j]), int(t.jobs["min_trust"][j])
    mask = int(t.jobs["regions"][j])
    total, count = 0.0, 0
    unnamed = 1 if len(before) > 1 else 0  # the first region stands for vehicles that have not said where they are
    for region in range(len(before)):
        can[region] = 0.0
        if mask == ANY_REGION or (mask >> region) & 1 != 0:
            count += 1 if region >= unnamed else 0
            for tier in range(min(trust, TIERS - 1), TIERS):
                can[region] += int(t.speeds[model, region, tier]) * scale / 1000.0
            total += can[region]
    for region in range(len(before)):
        if mask == ANY_REGION or (mask >> region) & 1 != 0:
            part = work * can[region] / total if total > 0.0 else work / max(count, 1)
            if total == 0.0 and region < unnamed:
                part = 0.0
            for tier in range(min(trust, TIERS - 1) + 1):
                before[region, tier] += part
            if total == 0.0:
                can[region] = 1e-9
    return total


@kernel
def cover(t: Tables, model: int, region: int, trust: int, less: int) -> float:
    """How much of the speed that the promises of a region need its vehicles with a model have, ``less`` taken away.

    The least over all tiers that a vehicle of this trust counts for; below 1 promises are in danger; COVERED where none
    needs anything. ``less``: thousandths of a work token a second.
    """
    have, least = 0, COVERED
    for tier in range(TIERS - 1, -1, -1):
        have += int(t.speeds[model, region, tier])
        need = int(t.needs[model, region, tier])
        if tier <= trust and need > 0:
            least = min(least, max(have - less, 0) / need)
    return least


@kernel
def speed_at(t: Tables, model: int, region: int) -> int:
    """Speed of the present vehicles of a region that have a model, thousandths of a work token a second."""
    total = 0
    for tier in range(TIERS):
        total += int(t.speeds[model, region, tier])
    return total


@allocating_kernel
def _take_turns(t: Tables, by_end: Ints, strict: int, stop: int) -> None:
    """Order a part of the jobs by what their customers have had, and those of one customer by their end."""
    if stop - strict < 2:
        return
    had = np.empty(len(t.tenants), np.int64)
    for tenant in range(len(had)):
        weight = max(float(t.tenants["weight"][tenant]), 0.001)
        had[tenant] = int(min(float(t.tenants["used"][tenant]) / weight, 1e15))
    rank = np.empty(len(had), np.int64)
    rank[np.argsort(had, kind="mergesort")] = np.arange(len(had))
    keys = np.empty(stop - strict, np.int64)
    for place_no in range(strict, stop):
        keys[place_no - strict] = rank[int(t.jobs["tenant"][by_end[place_no]])]
    by_end[strict:stop] = by_end[strict:stop][np.argsort(keys, kind="mergesort")]
