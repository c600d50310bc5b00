"""Other ways to share work out, on the same worlds: written after what their documents say, not the real systems.

| name | what it does |
| --- | --- |
| random | any job, 15 minutes of work by the claimed speed, results when all of it is done |
| fifo | the job that came first, 300 requests at a time |
| fifo_streaming | the same, but each request counts when it is done |
| htcondor | a cycle a minute; the customer who has used least; half an hour of work; a lease of 40 minutes |
| boinc | four tasks of half an hour in the vehicle; goes on after a stay; given to another only when overdue |
| edf | the job that is due first, 15 minutes by the measured speed, results when all of it is done |

Jobs with a deadline come before those without for all of them, and all know which vehicle may run what. A vehicle works
alone between two contacts, so each lease is reckoned through at once: when it will be done, what cuts it short, when
the cell hears of it. Requests are a fluid. Who leaves without a word is missed when the lease runs out.

Physics are those of ``sim.world``, accounts those of the fleet gear: useful, lost, doubled, late and rejected work.
"""

from __future__ import annotations

import heapq
import sys
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from motorpool.core.jit import allocating_kernel, compiled, kernel
from motorpool.sim.world import (
    BROWNOUT,
    CHEATER,
    CONTROL,
    CRASH,
    OTHER,
    SLEEPER,
    World,
    chosen,
    drawn,
    engine_gap_ms,
    outage_gap_ms,
    outage_length_ms,
    tokens_by_slot,
)

RANDOM, FIFO, FIFO_STREAMING, HTCONDOR, BOINC, EDF = range(6)
POLICIES: Final = ("random", "fifo", "fifo_streaming", "htcondor", "boinc", "edf")
HOUR_MS: Final = 3_600_000
MINUTE_MS: Final = 60_000
RETRY_MS: Final = 30_000  # a vehicle that got nothing asks again
CYCLE_MS: Final = 60_000
CONDOR_LEASE_MS: Final = 40 * MINUTE_MS
BUFFER: Final = 4
FIFO_LINES: Final = 300
QUARTER_MS: Final = 15 * MINUTE_MS
HALF_MS: Final = 30 * MINUTE_MS
SLOTS: Final = 8  # requests that an engine has begun at once
LOAD_MS_PER_GB: Final = 1_000
SLEEPS_MS: Final = 24 * HOUR_MS  # a sleeper is honest for so long
USAGE_HALF_LIFE_MS: Final = 24 * HOUR_MS
NOBODY: Final = -1
# Kinds of events, in the order in which they happen at one moment.
RETURNED, DONE, FREE = 0, 1, 2

USEFUL, LOST, DOUBLED, LATE, SWITCHING, BAD, EVENTS, GRANTS, WATT_S, COST = range(10)
COUNTS: Final = 12

Ints = NDArray[Any]
Records = NDArray[Any]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run, in tokens; ``bad`` is the part of the useful work that cheats made up and nobody noticed."""

    policy: str
    vehicles: int
    available: float
    useful: float
    lost: float
    doubled: float
    late: float
    rejected: float
    switching: float
    bad: float
    jobs: int
    jobs_missed: int
    lines_missed_share: float
    rounds: int
    rounds_missed: int
    grants: int
    events: int
    energy_kwh: float
    cost_micro: float

    @property
    def harvest(self) -> float:
        """Useful work as a part of all that the fleet could do."""
        return self.useful / self.available if self.available > 0 else 0.0

    @property
    def wasted_share(self) -> float:
        """What of all that was computed was for nothing."""
        computed = self.useful + self.lost + self.doubled + self.late + self.rejected
        return 1.0 - self.useful / computed if computed > 0 else 0.0

    @property
    def missed_share(self) -> float:
        """Jobs that were not whole at their deadline."""
        return self.jobs_missed / self.jobs if self.jobs else 0.0


class Ground(NamedTuple):
    """The world as the kernels read it: records of the columns of ``sim.world.World`` and ``sim.arrivals.Jobs``."""

    cars: Records  # region, zone, site, memory_gb, on_disk, speed, ..., first and after_last window
    start_ms: Ints
    end_ms: Ints
    silent: Ints
    jobs: Records
    heat: Ints
    price_micro_kwh: Ints
    site_w: Ints
    brownouts: Records
    controls: Records
    weight: Ints  # of each customer
    load_ms: Ints  # of each model, from disk into memory


class Settings(NamedTuple):
    """Numbers of a run."""

    policy: int
    seed: int
    horizon_ms: int
    outage_mean_ms: int
    engine_mean_ms: int
    restart_ms: int


class State(NamedTuple):
    """What changes.

    ``jobs``: lines that nobody holds (``waiting``) and that were accepted in time. ``tenants``: tokens that each has
    had, fading. ``tasks[v, place]``: the buffers of vehicles: job, lines, tokens still to do, when the cell gives
    the lines to somebody else, and whether it has.
    """

    active: Ints  # jobs that are open, in order of release
    jobs: Records
    tenants: Records
    cars: Records
    tasks: Records
    at_site_w: Ints
    counts: Ints


CAR: Final = np.dtype(
    [
        ("window", np.int64),
        ("outage_ms", np.int64),  # begin of the next outage of the network, or of the present one
        ("outage_end_ms", np.int64),
        ("outages", np.int64),
        ("crash_ms", np.int64),
        ("crashes", np.int64),
        ("resident", np.int64),
        ("draws", np.int64),
        ("learnt", np.float64),  # speed from results, tokens a second; 0: none yet
    ]
)
TASK: Final = np.dtype(
    [("job", np.int64), ("lines", np.int64), ("due_ms", np.int64), ("given", np.int64), ("left", np.float64)]
)

# -- physics -----------------------------------------------------------------------------------------------------------


@kernel
def open_window(g: Ground, s: Settings, x: State, v: int) -> None:
    """Troubles of a new window are drawn."""
    w = int(x.cars["window"][v])
    x.cars["outages"][v] = 0
    x.cars["crashes"][v] = 0
    begin = int(g.start_ms[w]) + outage_gap_ms(s.seed, v, w, 0, outage_mean(g, v))
    x.cars["outage_ms"][v] = begin
    x.cars["outage_end_ms"][v] = begin + outage_length_ms(s.seed, v, w, 0, s.outage_mean_ms)
    x.cars["crash_ms"][v] = int(g.start_ms[w]) + engine_gap_ms(s.seed, v, w, 0, s.engine_mean_ms)


@kernel
def outage_mean(g: Ground, v: int) -> int:
    """Mean time between outages of a vehicle's network; 0: it has none."""
    rate = float(g.cars["outage_per_h"][v])
    return int(HOUR_MS / rate) if rate > 0.0 else 0


@kernel
def connected_ms(g: Ground, s: Settings, x: State, v: int, at_ms: int) -> int:
    """The first moment from ``at_ms`` on at which the cell and the vehicle can hear each other."""
    moved = True
    while moved:
        moved = False
        w = int(x.cars["window"][v])
        while int(x.cars["outage_end_ms"][v]) <= at_ms:
            k = int(x.cars["outages"][v]) + 1
            x.cars["outages"][v] = k
            begin = int(x.cars["outage_end_ms"][v]) + outage_gap_ms(s.seed, v, w, k, outage_mean(g, v))
            x.cars["outage_ms"][v] = begin
            x.cars["outage_end_ms"][v] = begin + outage_length_ms(s.seed, v, w, k, s.outage_mean_ms)
        if int(x.cars["outage_ms"][v]) <= at_ms:
            at_ms = int(x.cars["outage_end_ms"][v])
            moved = True
        for e in range(len(g.brownouts)):
            if int(g.brownouts["from_ms"][e]) <= at_ms < int(g.brownouts["to_ms"][e]):
                here = (int(g.brownouts["regions"][e]) >> int(g.cars["region"][v])) & 1 == 1
                if here and chosen(s.seed, BROWNOUT, v, e, int(g.brownouts["share"][e])):
                    at_ms = int(g.brownouts["to_ms"][e])
                    moved = True
        for e in range(len(g.controls)):
            if int(g.controls["from_ms"][e]) <= at_ms < int(g.controls["to_ms"][e]):
                everyone = int(g.controls["kind"][e]) == CRASH
                if everyone or chosen(s.seed, CONTROL, v, e, int(g.controls["share"][e])):
                    at_ms = int(g.controls["to_ms"][e])
                    moved = True
    return at_ms


@kernel
def done_ms(g: Ground, v: int, from_ms: int, tokens: float) -> int:
    """When a vehicle that begins now has made so many tokens."""
    at_ms, last = from_ms, g.heat.shape[1] - 1
    while True:
        hour = min(at_ms // HOUR_MS, last)
        rate = float(g.cars["speed"][v]) * float(g.heat[int(g.cars["region"][v]), hour]) / 1000.0
        rest_ms = (hour + 1) * HOUR_MS - at_ms
        if hour == last or tokens <= rate * rest_ms:
            return at_ms + int(tokens / rate) + 1
        tokens -= rate * rest_ms
        at_ms += rest_ms


@kernel
def tokens_until(g: Ground, v: int, from_ms: int, to_ms: int) -> float:
    """What a vehicle makes between two moments."""
    at_ms, last, tokens = from_ms, g.heat.shape[1] - 1, 0.0
    while at_ms < to_ms:
        hour = min(at_ms // HOUR_MS, last)
        end_ms = to_ms if hour == last else min(to_ms, (hour + 1) * HOUR_MS)
        tokens += float(g.cars["speed"][v]) * float(g.heat[int(g.cars["region"][v]), hour]) / 1000.0 * (end_ms - at_ms)
        at_ms = end_ms
    return tokens


# -- which job, and how much of it -------------------------------------------------------------------------------------


@kernel
def faded(x: State, tenant: int, now_ms: int) -> float:
    """What a customer has had, half of it forgotten after a day."""
    had: float = float(x.tenants["used"][tenant]) * 0.5 ** (
        (now_ms - int(x.tenants["used_ms"][tenant])) / USAGE_HALF_LIFE_MS
    )
    return had


@kernel
def choose(g: Ground, s: Settings, x: State, v: int, now_ms: int, active: int) -> int:
    """The job of which a vehicle gets work, or NOBODY: region, trust, memory and the model on its disk must be right.

    Without a deadline only if there is nothing else. It calls nothing for each job: a call would cost more than all of
    its work, because compiled functions count references to each array that they are given.
    """
    region, trust, memory_gb = int(g.cars["region"][v]), int(g.cars["trust"][v]), int(g.cars["memory_gb"][v])
    on_disk, resident, lot = int(g.cars["on_disk"][v]), int(x.cars["resident"][v]), int(x.cars["draws"][v])
    waiting, kind, region_mask = x.jobs["waiting"], g.jobs["kind"], g.jobs["region_mask"]
    model, tenant = g.jobs["model"], g.jobs["tenant"]
    best, best_score, best_relaxed = NOBODY, 0.0, True
    for place in range(active):
        j = int(x.active[place])
        relaxed = int(kind[j]) == 2
        if (
            int(waiting[j]) <= 0
            or (relaxed and not best_relaxed)
            or (int(region_mask[j]) >> region) & 1 == 0
            or (on_disk >> int(model[j])) & 1 == 0
            or trust < int(g.jobs["min_trust"][j])
            or memory_gb < int(g.jobs["need_gb"][j])
        ):
            continue
        if s.policy == EDF:
            score = -float(g.jobs["deadline_ms"][j])
        elif s.policy == HTCONDOR:
            had = int(tenant[j])
            score = -float(x.tenants["used"][had]) * 0.5 ** (
                (now_ms - int(x.tenants["used_ms"][had])) / USAGE_HALF_LIFE_MS
            )
            score /= float(g.weight[had])
        elif s.policy == RANDOM or s.policy == BOINC:
            score = drawn(s.seed, OTHER, v, lot, j) / 4294967296.0
            if s.policy == BOINC and int(model[j]) == resident:
                score += 1.0
        else:
            score = -float(place)
        if best == NOBODY or (best_relaxed and not relaxed) or score > best_score:
            best, best_score, best_relaxed = j, score, relaxed
    x.cars["draws"][v] += 1
    return best


@kernel
def lines_for(g: Ground, s: Settings, x: State, v: int, j: int) -> int:
    """How many lines go into one lease."""
    if int(g.jobs["kind"][j]) == 1:
        return 1
    speed = float(g.cars["declared"][v])
    if s.policy == FIFO or s.policy == FIFO_STREAMING:
        wanted = FIFO_LINES
    else:
        if s.policy == EDF and float(x.cars["learnt"][v]) > 0.0:
            speed = float(x.cars["learnt"][v])
        depth_ms = HALF_MS if s.policy == HTCONDOR or s.policy == BOINC else QUARTER_MS
        wanted = int(speed * depth_ms / 1000.0 / float(g.jobs["tokens_per_line"][j]))
    return min(max(wanted, 1), int(x.jobs["waiting"][j]))


@kernel
def lease_ms(g: Ground, s: Settings, v: int, j: int, lines: int, now_ms: int) -> int:
    """When the cell takes work back from a vehicle that it has not heard of."""
    if s.policy == HTCONDOR:
        return now_ms + CONDOR_LEASE_MS
    if s.policy == BOINC:
        return now_ms + max((int(g.jobs["deadline_ms"][j]) - now_ms) // 2, HALF_MS)
    # Twice as long as it should take by the claimed speed, and time to load the model.
    usual_ms = int(lines * float(g.jobs["tokens_per_line"][j]) / float(g.cars["declared"][v]) * 1000.0)
    return now_ms + 2 * max(usual_ms, 5 * MINUTE_MS)


# -- accounts ----------------------------------------------------------------------------------------------------------


@kernel
def accept(g: Ground, x: State, v: int, j: int, lines: int, given: bool, now_ms: int) -> None:
    """Results come in: the first time in time they are useful."""
    tokens = lines * float(g.jobs["tokens_per_line"][j])
    if now_ms > int(g.jobs["deadline_ms"][j]):
        x.counts[LATE] += tokens
        return
    if given:
        # Lines that were taken back and nobody has begun anew are good; the rest is done twice.
        fresh = min(lines, int(x.jobs["waiting"][j]))
        x.jobs["waiting"][j] -= fresh
        x.counts[DOUBLED] += (lines - fresh) * float(g.jobs["tokens_per_line"][j])
        lines = fresh
        tokens = lines * float(g.jobs["tokens_per_line"][j])
    x.jobs["on_time"][j] += lines
    x.counts[USEFUL] += tokens
    if int(g.cars["cheat"][v]) == CHEATER or (int(g.cars["cheat"][v]) == SLEEPER and now_ms > SLEEPS_MS):
        x.counts[BAD] += tokens
    tenant = int(g.jobs["tenant"][j])
    x.tenants["used"][tenant] = faded(x, tenant, now_ms) + tokens
    x.tenants["used_ms"][tenant] = now_ms


@kernel
def pay_power(g: Ground, x: State, v: int, from_ms: int, to_ms: int) -> None:
    """Watt-seconds at work, at the price of the hour in which it began."""
    if to_ms <= from_ms:
        return
    hour = min(from_ms // HOUR_MS, g.price_micro_kwh.shape[1] - 1)
    watt_s = int(g.cars["permit_w"][v]) * (to_ms - from_ms) / 1000.0
    x.counts[WATT_S] += watt_s
    x.counts[COST] += watt_s / 3.6e6 * float(g.price_micro_kwh[int(g.cars["zone"][v]), hour])


@kernel
def learn(x: State, v: int, tokens: float, took_ms: int) -> None:
    """Speed from what was delivered."""
    rate = tokens * 1000.0 / max(took_ms, 1)
    known = float(x.cars["learnt"][v])
    x.cars["learnt"][v] = rate if known == 0.0 else 0.7 * known + 0.3 * rate


# -- one lease after another -------------------------------------------------------------------------------------------


@kernel
def load_model(g: Ground, x: State, v: int, j: int) -> int:
    """How long a vehicle needs before it begins with a job's lines."""
    wait_ms = int(float(g.jobs["download_s"][j]) * 1000) if int(g.jobs["kind"][j]) == 1 else 0
    model = int(g.jobs["model"][j])
    if int(x.cars["resident"][v]) != model:
        x.cars["resident"][v] = model
        wait_ms += int(g.load_ms[model])
        x.counts[SWITCHING] += int(g.load_ms[model]) / 1000.0 * float(g.cars["speed"][v])
    return wait_ms


@kernel
def cut_ms(g: Ground, x: State, v: int) -> int:
    """What ends the present work if nothing else does: the owner, or the death of the engine."""
    return min(int(g.end_ms[int(x.cars["window"][v])]), int(x.cars["crash_ms"][v]))


@kernel
def crashed(s: Settings, x: State, v: int) -> int:
    """The engine starts again; when it is ready."""
    ready_ms = int(x.cars["crash_ms"][v]) + s.restart_ms
    k = int(x.cars["crashes"][v]) + 1
    x.cars["crashes"][v] = k
    x.cars["crash_ms"][v] = ready_ms + engine_gap_ms(s.seed, v, int(x.cars["window"][v]), k, s.engine_mean_ms)
    return ready_ms


@allocating_kernel
def work_through(g: Ground, s: Settings, x: State, events: Any, v: int, j: int, now_ms: int) -> None:
    """A vehicle takes lines of a job: what comes of it, and when, becomes events."""
    lines = lines_for(g, s, x, v, j)
    x.jobs["waiting"][j] -= lines
    x.counts[GRANTS] += 1
    per_line = float(g.jobs["tokens_per_line"][j])
    expires_ms = lease_ms(g, s, v, j, lines, now_ms)
    begin_ms = now_ms + load_model(g, x, v, j)
    ready_ms, stop_ms = done_ms(g, v, begin_ms, lines * per_line), cut_ms(g, x, v)
    streaming = s.policy == FIFO_STREAMING and int(g.jobs["kind"][j]) != 1
    if ready_ms <= stop_ms:
        heard_ms = connected_ms(g, s, x, v, ready_ms)
        if heard_ms <= stop_ms or heard_ms <= int(g.end_ms[int(x.cars["window"][v])]):
            pay_power(g, x, v, begin_ms, ready_ms)
            given = heard_ms > expires_ms
            if given:
                heapq.heappush(events, (expires_ms, RETURNED, v, j, lines, 0))
            heapq.heappush(events, (heard_ms, DONE, v, j, lines, 1 if given else 0))
            learn(x, v, lines * per_line, ready_ms - begin_ms)
            return
    # The owner comes, or the engine dies, before the cell has heard of the results.
    stop_ms = min(stop_ms, int(g.end_ms[int(x.cars["window"][v])]))
    made = min(tokens_until(g, v, begin_ms, stop_ms), lines * per_line)
    pay_power(g, x, v, begin_ms, min(stop_ms, ready_ms))
    died = stop_ms == int(x.cars["crash_ms"][v]) and stop_ms < int(g.end_ms[int(x.cars["window"][v])])
    delivered = 0
    if streaming and connected_ms(g, s, x, v, stop_ms) == stop_ms:
        delivered = min(int(made / per_line), lines)
        heapq.heappush(events, (stop_ms, DONE, v, j, delivered, 2))
        if stop_ms < s.horizon_ms:
            x.counts[LOST] += min(SLOTS, lines - delivered) * per_line * 0.5
    elif stop_ms < s.horizon_ms:  # what runs when the world ends is no loss
        x.counts[LOST] += made
    back_ms = expires_ms
    if died:
        free_ms = crashed(s, x, v)
        back_ms = free_ms
        heapq.heappush(events, (free_ms, FREE, v, 0, 0, 1))
    else:
        if int(g.silent[int(x.cars["window"][v])]) == 0:
            back_ms = stop_ms
        heapq.heappush(events, (stop_ms, FREE, v, 0, 0, 1))
    if lines > delivered:
        heapq.heappush(events, (max(back_ms, stop_ms), RETURNED, v, j, lines - delivered, 0))


@kernel
def room_at_site(g: Ground, x: State, v: int) -> bool:
    """Whether the car park's transformer carries one more."""
    site = int(g.cars["site"][v])
    return site == 0 or int(x.at_site_w[site]) + int(g.cars["permit_w"][v]) <= int(g.site_w[site])


@kernel
def hold_site(g: Ground, x: State, v: int, sign: int) -> None:
    """A vehicle at a car park begins or ends to draw power."""
    x.at_site_w[int(g.cars["site"][v])] += sign * int(g.cars["permit_w"][v])


@allocating_kernel
def buffered(g: Ground, s: Settings, x: State, events: Any, v: int, now_ms: int, active: int) -> int:
    """BOINC: fill the vehicle's buffer, work on the first task until it is done or something stops it.

    Returns when the vehicle is free again, or 0 if there is nothing to do. Tasks stay in the vehicle over its absences.
    """
    for place in range(BUFFER):
        if int(x.tasks["lines"][v, place]) == 0:
            j = choose(g, s, x, v, now_ms, active)
            if j != NOBODY:
                lines = lines_for(g, s, x, v, j)
                x.jobs["waiting"][j] -= lines
                x.counts[GRANTS] += 1
                due = lease_ms(g, s, v, j, lines, now_ms)
                x.tasks["job"][v, place], x.tasks["lines"][v, place] = j, lines
                x.tasks["left"][v, place] = lines * float(g.jobs["tokens_per_line"][j])
                x.tasks["due_ms"][v, place], x.tasks["given"][v, place] = due, 0
                heapq.heappush(events, (due, RETURNED, v, j, place, 1))
    best = NOBODY
    for place in range(BUFFER):
        if int(x.tasks["lines"][v, place]) > 0 and (
            best == NOBODY or int(x.tasks["due_ms"][v, place]) < int(x.tasks["due_ms"][v, best])
        ):
            best = place
    if best == NOBODY:
        return 0
    j = int(x.tasks["job"][v, best])
    begin_ms = now_ms + load_model(g, x, v, j)
    ready_ms, stop_ms = done_ms(g, v, begin_ms, float(x.tasks["left"][v, best])), cut_ms(g, x, v)
    if ready_ms <= stop_ms:
        pay_power(g, x, v, begin_ms, ready_ms)
        x.tasks["left"][v, best] = 0.0
        return min(connected_ms(g, s, x, v, ready_ms), int(g.end_ms[int(x.cars["window"][v])]))
    # It goes on later from its last checkpoint, a minute ago at most.
    made = tokens_until(g, v, begin_ms, stop_ms)
    again = min(made, tokens_until(g, v, max(begin_ms, stop_ms - MINUTE_MS), stop_ms) * 0.5)
    x.counts[LOST] += again
    x.tasks["left"][v, best] = max(1.0, float(x.tasks["left"][v, best]) - made + again)
    pay_power(g, x, v, begin_ms, stop_ms)
    if stop_ms == int(x.cars["crash_ms"][v]) and stop_ms < int(g.end_ms[int(x.cars["window"][v])]):
        return min(crashed(s, x, v), int(g.end_ms[int(x.cars["window"][v])]))
    return stop_ms


@kernel
def hand_in(g: Ground, x: State, v: int, now_ms: int) -> None:
    """BOINC: a vehicle with a network hands in the tasks that it has done."""
    for place in range(BUFFER):
        lines = int(x.tasks["lines"][v, place])
        if lines > 0 and float(x.tasks["left"][v, place]) <= 0.0:
            accept(g, x, v, int(x.tasks["job"][v, place]), lines, int(x.tasks["given"][v, place]) == 1, now_ms)
            x.tasks["lines"][v, place] = 0


@kernel
def drop_closed(g: Ground, x: State, v: int, now_ms: int) -> None:
    """BOINC: tasks of jobs that are over are given up; what was done of them is late."""
    for place in range(BUFFER):
        if int(x.tasks["lines"][v, place]) > 0:
            j = int(x.tasks["job"][v, place])
            if int(g.jobs["deadline_ms"][j]) < now_ms:
                made = int(x.tasks["lines"][v, place]) * float(g.jobs["tokens_per_line"][j]) - float(
                    x.tasks["left"][v, place]
                )
                x.counts[LATE] += max(made, 0.0)
                x.tasks["lines"][v, place] = 0


@allocating_kernel
def free(g: Ground, s: Settings, x: State, events: Any, v: int, now_ms: int, active: int) -> None:
    """A vehicle has nothing in hand: the next window, or more work."""
    w = int(x.cars["window"][v])
    if now_ms >= int(g.end_ms[w]):
        x.cars["window"][v] = w + 1
        if w + 1 < int(g.cars["after_last"][v]):
            open_window(g, s, x, v)
            heapq.heappush(events, (int(g.start_ms[w + 1]), FREE, v, 0, 0, 0))
        return
    at_ms = connected_ms(g, s, x, v, now_ms)
    if s.policy == HTCONDOR:
        at_ms = -(-at_ms // CYCLE_MS) * CYCLE_MS
    if at_ms > now_ms:
        heapq.heappush(events, (min(at_ms, int(g.end_ms[w])), FREE, v, 0, 0, 0))
        return
    while int(x.cars["crash_ms"][v]) <= now_ms:
        crashed(s, x, v)
    if s.policy == BOINC:
        hand_in(g, x, v, now_ms)
        drop_closed(g, x, v, now_ms)
    if room_at_site(g, x, v):
        if s.policy == BOINC:
            until_ms = buffered(g, s, x, events, v, now_ms, active)
            if until_ms > 0:
                hold_site(g, x, v, 1)
                heapq.heappush(events, (max(until_ms, now_ms + 1), FREE, v, 0, 0, 1))
                return
        else:
            j = choose(g, s, x, v, now_ms, active)
            if j != NOBODY:
                hold_site(g, x, v, 1)
                work_through(g, s, x, events, v, j, now_ms)
                return
    heapq.heappush(events, (min(now_ms + RETRY_MS, int(g.end_ms[w])), FREE, v, 0, 0, 0))


@allocating_kernel
def happens(g: Ground, s: Settings, x: State, events: Any, event: Any, active: int) -> None:
    """One event."""
    now_ms, what, v, j, lines, mark = event
    if what == RETURNED:
        if mark == 1:  # a task in a vehicle's buffer, by its place
            place = lines
            same = int(x.tasks["job"][v, place]) == j and int(x.tasks["due_ms"][v, place]) == now_ms
            if same and int(x.tasks["lines"][v, place]) > 0 and int(x.tasks["given"][v, place]) == 0:
                x.tasks["given"][v, place] = 1
                if now_ms < int(g.jobs["deadline_ms"][j]):
                    x.jobs["waiting"][j] += int(x.tasks["lines"][v, place])
        elif now_ms < int(g.jobs["deadline_ms"][j]):
            x.jobs["waiting"][j] += lines
    elif what == DONE:
        accept_or_stream(g, s, x, v, j, lines, mark, now_ms)
        if mark != 2:
            hold_site(g, x, v, -1)
            free(g, s, x, events, v, now_ms, active)
    else:
        if mark == 1:  # it was at work until now
            hold_site(g, x, v, -1)
        free(g, s, x, events, v, now_ms, active)


@kernel
def accept_or_stream(g: Ground, s: Settings, x: State, v: int, j: int, lines: int, mark: int, now_ms: int) -> None:
    """Results of a lease; with streaming, lines that were done before the job's end count though the last was not."""
    end_ms = int(g.jobs["deadline_ms"][j])
    if s.policy == FIFO_STREAMING and int(g.jobs["kind"][j]) != 1 and now_ms > end_ms and lines > 0:
        step_ms = float(g.jobs["tokens_per_line"][j]) / float(g.cars["speed"][v]) * 1000.0
        late = min(lines, int((now_ms - end_ms) / step_ms) + 1)
        accept(g, x, v, j, lines - late, mark == 1, end_ms)
        x.counts[LATE] += late * float(g.jobs["tokens_per_line"][j])
    else:
        accept(g, x, v, j, lines, mark == 1, now_ms)


@allocating_kernel
def simulate(g: Ground, s: Settings, x: State) -> None:
    """From the first Monday to the end of the world."""
    events = [(0, FREE, 0, 0, 0, 0)]
    events.pop()
    for v in range(len(g.cars)):
        if int(g.cars["first"][v]) < int(g.cars["after_last"][v]):
            open_window(g, s, x, v)
            heapq.heappush(events, (int(g.start_ms[int(g.cars["first"][v])]), FREE, v, 0, 0, 0))
    active, released = 0, 0
    next_end = s.horizon_ms
    while len(events) > 0:
        event = heapq.heappop(events)
        now_ms = event[0]
        # What is delivered exactly at the end still counts.
        if now_ms > s.horizon_ms or (now_ms == s.horizon_ms and event[1] == FREE):
            continue
        while released < len(g.jobs) and int(g.jobs["release_ms"][released]) <= now_ms:
            x.active[active] = released
            next_end = min(next_end, int(g.jobs["deadline_ms"][released]))
            active += 1
            released += 1
        if now_ms >= next_end:
            kept = 0
            next_end = s.horizon_ms
            for place in range(active):
                j = int(x.active[place])
                if int(g.jobs["deadline_ms"][j]) > now_ms:
                    x.active[kept] = j
                    kept += 1
                    next_end = min(next_end, int(g.jobs["deadline_ms"][j]))
            active = kept
        x.counts[EVENTS] += 1
        happens(g, s, x, events, event, active)


def run(world: World, policy: str, *, fast: bool = True) -> Outcome:
    """What a policy makes of a world. ``fast``: compiled (numba)."""
    ground, settings, state = _ground(world), _settings(world, policy), _state(world)
    kernels: Any = compiled(sys.modules[__name__]) if fast else sys.modules[__name__]
    kernels.simulate(ground, settings, state)
    jobs, counts = world.jobs, state.counts
    promised, rounds = jobs.kind == 0, jobs.kind == 1
    lines = float(jobs.lines[promised].sum())
    needed = np.ceil(jobs.lines * (jobs.quorum_pct / 100.0))
    return Outcome(
        policy=policy,
        vehicles=len(world),
        available=float(tokens_by_slot(world, np.zeros(len(world), np.int64), 1).sum()),
        useful=float(counts[USEFUL]),
        lost=float(counts[LOST]),
        doubled=float(counts[DOUBLED]),
        late=float(counts[LATE]),
        rejected=0.0,
        switching=float(counts[SWITCHING]),
        bad=float(counts[BAD]),
        jobs=int(promised.sum()),
        jobs_missed=int((state.jobs["on_time"] < jobs.lines)[promised].sum()),
        lines_missed_share=1.0 - float(state.jobs["on_time"][promised].sum()) / lines if lines else 0.0,
        rounds=int(rounds.sum()),
        rounds_missed=int((state.jobs["on_time"] < needed)[rounds].sum()),
        grants=int(counts[GRANTS]),
        events=int(counts[EVENTS]),
        energy_kwh=float(counts[WATT_S]) / 3.6e6,
        cost_micro=float(counts[COST]),
    )


def _records(**columns: NDArray[Any]) -> Records:
    """Columns of one length as records: compiled functions hand over few arrays more cheaply than many."""
    length = len(next(iter(columns.values())))
    found = np.zeros(length, [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        found[name] = column
    return found


def _ground(world: World) -> Ground:
    jobs, scenario = world.jobs, world.scenario
    names = ("region", "zone", "site", "memory_gb", "on_disk", "speed", "declared", "cheat", "trust", "permit_w")
    cars = {name: getattr(world, name) for name in (*names, "outage_per_h")}
    of_jobs = {name: getattr(jobs, name) for name in jobs.__struct_fields__ if name != "memory_gb"}
    of_brownouts = {name: getattr(world, f"brownout_{name}") for name in ("from_ms", "to_ms", "share", "regions")}
    of_controls = {name: getattr(world, f"control_{name}") for name in ("kind", "from_ms", "to_ms", "share")}
    return Ground(
        cars=_records(**cars, first=world.first[:-1], after_last=world.first[1:]),
        start_ms=world.start_ms,
        end_ms=world.end_ms,
        silent=world.silent,
        jobs=_records(**of_jobs, need_gb=jobs.memory_gb),
        heat=world.heat,
        price_micro_kwh=world.price_micro_kwh,
        site_w=world.site_w,
        brownouts=_records(**of_brownouts),
        controls=_records(**of_controls),
        weight=np.array([tenant.weight for tenant in scenario.tenants]),
        load_ms=np.array([model.memory_gb * LOAD_MS_PER_GB for model in scenario.models], np.int64),
    )


def _settings(world: World, policy: str) -> Settings:
    faults = world.scenario.faults
    return Settings(
        policy=POLICIES.index(policy),
        seed=world.seed,
        horizon_ms=world.horizon_ms,
        outage_mean_ms=round(faults.outage_mean_min * MINUTE_MS),
        engine_mean_ms=round(HOUR_MS / faults.crash_per_h) if faults.crash_per_h > 0 else 0,
        restart_ms=round(faults.restart_s * 1000),
    )


def _state(world: World) -> State:
    cars = np.zeros(len(world), CAR)
    cars["window"] = world.first[:-1]
    cars["resident"] = world.resident
    tenants = len(world.scenario.tenants)
    waiting = world.jobs.lines.astype(np.int64)
    return State(
        active=np.zeros(len(world.jobs) + 1, np.int64),
        jobs=_records(waiting=waiting, on_time=np.zeros_like(waiting)),
        tenants=_records(used=np.zeros(tenants), used_ms=np.zeros(tenants, np.int64)),
        cars=cars,
        tasks=np.zeros((len(world), BUFFER), TASK),
        at_site_w=np.zeros(len(world.site_w), np.int64),
        counts=np.zeros(COUNTS),
    )
