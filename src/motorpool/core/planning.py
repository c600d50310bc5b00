"""In which order jobs are served, how much time each has to spare, and where models are wanted: once a second.

``plan`` orders the jobs of each model. Served earliest end first at the cell's present speed, does every job keep a
margin? Then the customers take turns: who has had least for its weight goes first. Jobs without a margin, and all that
end before them, go strictly by their end. Work without a promise goes after all other.

Called by: ``core.kernels``, which hands it on; see there for what a kernel is.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from motorpool.core.columns import ANY_REGION, BEHIND, BEST_EFFORT, IN_ORDER, NONE, RELAXED, TIERS, Floats, Ints, Tables
from motorpool.core.jit import kernel

MARGIN: Final = 1.3  # of the time that work is expected to take
MARGIN_MS: Final = 600_000
SWITCH_STAY: Final = 10


@kernel
def waiting(t: Tables, j: int) -> int:
    """Lines of a job that nobody holds."""
    return int(t.jobs["total"][j]) - int(t.jobs["done"][j]) - int(t.jobs["leased"][j])


@kernel
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


@kernel
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
    before = np.zeros(regions, np.float64)
    can = np.zeros(regions, np.float64)
    for region in range(regions):
        t.needs[model, region] = 0
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
                waits += before[region]
                need = MARGIN * before[region] * 1_000_000.0 / max(time_ms - MARGIN_MS // 10, 60_000)
                t.needs[model, region] = max(int(t.needs[model, region]), int(min(need, 1e15)))
        need_ms = int(min(MARGIN * waits * 1000.0 / tokens_s, 1e15)) if tokens_s > 0.0 else 0
        slack_ms = time_ms - need_ms
        jobs["slack_ms"][j] = slack_ms
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

    ``can`` is what each region gives to it; where nothing is present yet all regions count alike.
    """
    model, trust = int(t.jobs["model"][j]), int(t.jobs["min_trust"][j])
    mask = int(t.jobs["regions"][j])
    total, count = 0.0, 0
    for region in range(len(before)):
        can[region] = 0.0
        if mask == ANY_REGION or (mask >> region) & 1 != 0:
            count += 1
            for tier in range(min(trust, TIERS - 1), TIERS):
                can[region] += int(t.speeds[model, region, tier]) * scale / 1000.0
            total += can[region]
    for region in range(len(before)):
        if mask == ANY_REGION or (mask >> region) & 1 != 0:
            before[region] += work * can[region] / total if total > 0.0 else work / count
            if total == 0.0:
                can[region] = 1e-9
    return total


@kernel
def speed_at(t: Tables, model: int, region: int) -> int:
    """Speed of the present vehicles of a region that have a model, thousandths of a work token a second."""
    total = 0
    for tier in range(TIERS):
        total += int(t.speeds[model, region, tier])
    return total


@kernel
def switch_to(t: Tables, v: int) -> int:
    """The model that a vehicle should load in place of its own, or NONE.

    A vehicle leaves its model when it has nothing to do there, or when others keep the promises of its region without
    it, and goes where a promise is in danger, else (only if it is idle) where the most work waits for each unit of
    speed. Only models that it has on its disk, and only if it stays ten times as long as loading takes.
    """
    vehicles, models = t.vehicles, t.models
    own = int(vehicles["model"][v])
    if own == NONE or int(vehicles["outstanding"][v]) > 0:
        return NONE
    region = int(vehicles["region"][v])
    speed = int(vehicles["counted_mtok_s"][v])
    idle = int(models["count"][own]) == 0
    if not idle and speed_at(t, own, region) - speed < int(t.needs[own, region]):
        return NONE
    on_disk = int(vehicles["on_disk"][v])
    best, best_want = NONE, 0.0
    for m in range(min(len(models), 32)):
        if m == own or (on_disk >> m) & 1 == 0 or int(models["count"][m]) == 0:
            continue
        if int(vehicles["stay_min"][v]) * 60_000 < SWITCH_STAY * int(models["load_ms"][m]):
            continue
        there = speed_at(t, m, region)
        short = int(t.needs[m, region]) - there
        want = float(models["waiting_work"][m]) / (there + 1000)
        if short > 0:
            want = 1e12 + short
        elif not idle:
            continue
        if want > best_want:
            best, best_want = m, want
    return best


@kernel
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
