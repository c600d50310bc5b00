"""The fleet gear: a million vehicles for a week, on the kernels that serve production.

Decides: nothing about work. It moves time on, lets vehicles come, work, lose their network, crash and leave as the
world says, and hands each of these to the kernels of ``core.kernels`` just as the scheduler does. Requests are a fluid:
a vehicle works through its leases, oldest first, at its true speed, and each line counts when it is finished.

Events of vehicles stand in a wheel of one slot a second; of each vehicle the next one only. All is integers and floats
in arrays: a run is the same to the last bit for a seed, compiled or not.

Called by: ``sim.fleet_run``. Must not: hold a policy.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from motorpool.core.columns import (
    ANY_REGION,
    BEST_EFFORT,
    NEVER,
    NONE,
    OFFLINE,
    RELAXED,
    RISK_BUCKETS,
    WHOLE,
    WORKING,
    Ints,
    Records,
    Tables,
)
from motorpool.core.jit import allocating_kernel, kernel
from motorpool.core.kernels import (
    OK,
    close_lease,
    finished,
    learn_speed,
    lease_ms,
    oldest_grant_ms,
    open_lease,
    patience_ms,
    plan,
    pull,
    recall,
    recount,
    refusal,
    report,
    share,
    shrink_lease,
    switch_to,
    waiting,
    why_not,
)
from motorpool.core.planning import SILENT_MS
from motorpool.sim.world import engine_gap_ms, outage_gap_ms, outage_length_ms, stay_bound_ms

HOUR_MS: Final = 3_600_000
SLOT_MS: Final = 1_000
PLAN_MS: Final = 10_000
SLOTS: Final = 8  # requests that an engine runs at once
IDLE_MS: Final = 300_000
REFILL: Final = 0.45  # of its queue: when a vehicle has worked off so much, it comes for more
MIN_STEP_MS: Final = 1_000
WAKE: Final = 16  # vehicles of a kind that are asked at once whether they have room for urgent lines

AWAY: Final = 0
HERE: Final = 1

# What a run counts, in tokens unless said otherwise.
USEFUL: Final = 0
LOST: Final = 1  # begun on a vehicle that went without a word
DOUBLED: Final = 2  # done while another did it too
LATE: Final = 3  # done after the job had ended
SWITCHING: Final = 4  # that could have been made while models were loaded
EVENTS: Final = 5  # (events)
GRANTS: Final = 6  # (leases)
SWITCHES: Final = 7  # (models loaded)
TAKEN_BACK: Final = 8  # (lines)
ENERGY: Final = 9  # watt-seconds at work
COST: Final = 10  # of that energy, at the price of its hour, in millionths
RECALLED: Final = 12  # (lines that were given back before they were begun)
FAILED_WHOLE: Final = 11  # of work that is done in one go: lost
IDLE: Final = 16  # that could have been made while a vehicle had nothing, by the reason that it was given
COUNTS: Final = 48

OF_WORLD: Final = ("speed", "outage_per_h", "user", "permit_w", "region", "zone")
CAR: Final = np.dtype(
    [
        ("due_ms", np.int64),
        ("end_ms", np.int64),  # of its window
        ("outage_ms", np.int64),  # when the next one begins, or the present one ends
        ("crash_ms", np.int64),
        ("pull_ms", np.int64),  # when it comes for more
        ("last_ms", np.int64),  # what it has done is reckoned with until then
        ("ready_ms", np.int64),  # its engine has loaded its model
        ("check_ms", np.int64),  # when the cell looks after it
        ("next", np.int32),
        ("previous", np.int32),
        ("window", np.int32),
        ("outages", np.int16),
        ("crashes", np.int16),
        ("progress", np.float32),  # tokens of the line that it is at
        ("ghost", np.float32),  # work that it has and the cell has given to others meanwhile
        ("speed", np.float32),  # what the world says of it: here, because all of a car lies together in memory
        ("outage_per_h", np.float32),
        ("user", np.int32),
        ("permit_w", np.uint16),
        ("region", np.uint8),
        ("zone", np.uint8),
        ("phase", np.uint8),
        ("silent", np.uint8),  # without network
    ],
    align=True,
)


class Arena(NamedTuple):
    """The world, as kernels see it; see ``sim.world.World`` for the columns."""

    cars: Records
    slots: npt.NDArray[np.int32]
    first: Ints
    start_ms: Ints
    end_ms: Ints
    leaves_silently: npt.NDArray[np.uint8]
    stay_bound_min: npt.NDArray[np.uint16]
    risk_pct: npt.NDArray[np.uint8]
    table_hour: npt.NDArray[np.uint8]
    heat: npt.NDArray[np.float32]
    price: npt.NDArray[np.int32]
    release_ms: Ints
    deadline_ms: Ints
    job_on_time: npt.NDArray[np.float64]  # lines of each job that were finished before its end
    counts: npt.NDArray[np.float64]
    hours: npt.NDArray[np.float64]  # useful tokens and vehicle-seconds at work, by hour
    recalled: Ints
    settings: Ints  # seed, horizon, crash mean, restart, outage mean, and flags of what is left out


class Switches(NamedTuple):
    """Parts that a run can do without, to see what each is worth; all on in production."""

    streaming: bool = True
    forecast: bool = True
    revoke: bool = True
    measured: bool = True


SEED: Final = 0
HORIZON: Final = 1
CRASH_MEAN: Final = 2
RESTART: Final = 3
OUTAGE_MEAN: Final = 4
NO_STREAMING: Final = 5
NO_FORECAST: Final = 6
NO_REVOKE: Final = 7
NO_LEARNING: Final = 8
SETTINGS: Final = 16


# -- the wheel ---------------------------------------------------------------------------------------------------------


@kernel
def _schedule(a: Arena, v: int) -> None:
    """Put a vehicle where its next event is."""
    cars = a.cars
    due = _next_ms(a, v)
    cars["due_ms"][v] = due
    slot = due // SLOT_MS
    if slot >= len(a.slots):
        cars["next"][v] = NONE
        cars["previous"][v] = NONE - 1
        return
    head = int(a.slots[slot])
    cars["next"][v] = head
    cars["previous"][v] = NONE
    if head != NONE:
        cars["previous"][head] = v
    a.slots[slot] = v


@kernel
def schedule_all(a: Arena) -> None:
    """Put every vehicle into the wheel, the last one first."""
    for v in range(len(a.cars)):
        _schedule(a, v)


@kernel
def _unschedule(a: Arena, v: int) -> None:
    cars = a.cars
    before, after = int(cars["previous"][v]), int(cars["next"][v])
    if before == NONE - 1:
        return
    if before == NONE:
        slot = int(cars["due_ms"][v]) // SLOT_MS
        if int(a.slots[slot]) == v:
            a.slots[slot] = after
    else:
        cars["next"][before] = after
    if after != NONE:
        cars["previous"][after] = before
    cars["previous"][v] = NONE - 1


# -- work --------------------------------------------------------------------------------------------------------------


@kernel
def _speed(a: Arena, v: int, now_ms: int) -> float:
    """True speed now, tokens a second."""
    hour = min(now_ms // HOUR_MS, a.heat.shape[1] - 1)
    return float(a.cars["speed"][v]) * float(a.heat[int(a.cars["region"][v]), hour])


@kernel
def _oldest(t: Tables, v: int) -> int:
    """The oldest of a vehicle's leases, or NONE."""
    row = int(t.vehicles["lease"][v])
    while row != NONE and int(t.leases["next"][row]) != NONE:
        row = int(t.leases["next"][row])
    return row


@kernel
def _advance(t: Tables, a: Arena, v: int, now_ms: int) -> None:
    """A vehicle works from when it was last looked at until now, and what it finishes counts."""
    cars = a.cars
    since = max(int(cars["last_ms"][v]), int(cars["ready_ms"][v]))
    cars["last_ms"][v] = max(now_ms, int(cars["last_ms"][v]))
    if now_ms <= since or int(t.vehicles["lease"][v]) == NONE:
        return
    speed = _speed(a, v, since)
    budget = speed * (now_ms - since) / 1000.0
    at_ms = float(since)
    worked = 0.0
    oldest_ms = oldest_grant_ms(t, v, now_ms)
    row = _oldest(t, v)
    while row != NONE and budget > 0.0:
        j = int(t.leases["job"][row])
        per_line = float(a.counts[COUNTS + j])
        left = int(t.leases["left"][row])
        progress = float(cars["progress"][v])
        lines = min(int((budget + progress) / per_line), left)
        used = lines * per_line - progress
        if lines < left and int(t.jobs["flags"][j]) & WHOLE == 0 and int(a.settings[NO_STREAMING]) != 0:
            # Nothing counts before the whole lease is done.
            cars["progress"][v] = progress + budget
            worked += budget
            budget = 0.0
            break
        if lines == 0:
            cars["progress"][v] = progress + budget
            worked += budget
            budget = 0.0
            break
        end_ms = int(t.jobs["expires_ms"][j])
        _count(t, a, j, lines, per_line, at_ms + used / speed * 1000.0, per_line / speed * 1000.0, end_ms)
        at_ms += used / speed * 1000.0
        budget -= used
        worked += used
        cars["progress"][v] = 0.0
        t.jobs["leased"][j] -= lines
        finished(t, j, lines, lines * per_line)
        if shrink_lease(t, row, lines) == 0:
            close_lease(t, row)
            row = _oldest(t, v)
        else:
            cars["progress"][v] = budget
            worked += budget
            budget = 0.0
    if worked > 0.0:
        seconds = worked / speed
        hour = min(since // HOUR_MS, a.price.shape[1] - 1)
        a.counts[ENERGY] += int(a.cars["permit_w"][v]) * seconds
        a.counts[COST] += int(a.cars["permit_w"][v]) * seconds / 3.6e6 * int(a.price[int(a.cars["zone"][v]), hour])
        a.hours[1, hour] += seconds
        if int(a.settings[NO_LEARNING]) == 0:
            learn_speed(t, v, worked, oldest_ms, now_ms)


@kernel
def _count(
    t: Tables, a: Arena, j: int, lines: int, per_line: float, last_ms: float, step_ms: float, end_ms: int
) -> None:
    """Lines of which the last was finished at ``last_ms``, one each ``step_ms``: those before the end are useful."""
    late = 0
    if last_ms > end_ms:
        late = min(lines, int((last_ms - end_ms) / step_ms) + 1)
    on_time = lines - late
    a.job_on_time[int(t.jobs["job_no"][j])] += on_time
    a.counts[USEFUL] += on_time * per_line
    a.counts[LATE] += late * per_line
    hour = min(int(last_ms) // HOUR_MS, a.hours.shape[1] - 1)
    a.hours[0, hour] += on_time * per_line


@kernel
def _drop(t: Tables, a: Arena, v: int) -> None:
    """The line that a vehicle was at is lost with what was done of it; lines beside it in the engine as well."""
    row = _oldest(t, v)
    if row == NONE:
        return
    j = int(t.leases["job"][row])
    per_line = float(a.counts[COUNTS + j])
    # An engine runs several lines at once, each half done on average.
    begun = min(SLOTS, int(t.leases["left"][row]))
    if int(t.jobs["flags"][j]) & WHOLE != 0:
        a.counts[FAILED_WHOLE] += float(a.cars["progress"][v])
    elif int(a.settings[NO_STREAMING]) != 0:
        a.counts[LOST] += float(a.cars["progress"][v])
    else:
        a.counts[LOST] += begun * per_line * 0.5
    a.cars["progress"][v] = 0.0


@kernel
def _give_back(t: Tables, a: Arena, v: int, silent_ms: int) -> int:
    """Leases of a vehicle end and their lines wait again: those that are missed after such a silence.

    The shortest patience of those that are left, or NEVER.
    """
    row = int(t.vehicles["lease"][v])
    shortest = NEVER
    while row != NONE:
        after = int(t.leases["next"][row])
        j = int(t.leases["job"][row])
        patience = patience_ms(t, j)
        if patience > silent_ms:
            shortest = min(shortest, patience)
        else:
            left = int(t.leases["left"][row])
            a.counts[TAKEN_BACK] += left
            a.cars["ghost"][v] = float(a.cars["ghost"][v]) + left * float(a.counts[COUNTS + j])
            t.jobs["leased"][j] -= left
            shrink_lease(t, row, left)
            close_lease(t, row)
        row = after
    return shortest


# -- what happens to a vehicle -----------------------------------------------------------------------------------------


@kernel
def _tell(t: Tables, a: Arena, v: int, now_ms: int) -> None:
    """A vehicle reports: how long it will stay, as it has learnt; and how it is."""
    vehicles = t.vehicles
    user = int(a.cars["user"][v])
    hour = int(a.table_hour[min(now_ms // HOUR_MS, len(a.table_hour) - 1)])
    stay_min, risk = stay_bound_ms(a.stay_bound_min, a.table_hour, user, now_ms) // 60_000, int(a.risk_pct[user, hour])
    if int(a.settings[NO_FORECAST]) != 0:
        stay_min, risk = 24 * 60, 0
    vehicles["stay_min"][v] = min(stay_min, 65_534)
    vehicles["risk_pct"][v] = risk
    model = int(vehicles["model"][v])
    report(t, v, WORKING, model, int(a.cars["region"][v]) + 1, SLOTS, int(a.cars["permit_w"][v]), now_ms)


@kernel
def _arrive(t: Tables, a: Arena, v: int, now_ms: int) -> None:
    """Its window begins: parked, fed, permitted, online."""
    cars = a.cars
    window = int(cars["window"][v])
    seed = int(a.settings[SEED])
    cars["phase"][v] = HERE
    cars["silent"][v] = 0
    cars["ghost"][v] = 0.0
    cars["progress"][v] = 0.0
    cars["end_ms"][v] = int(a.end_ms[window])
    cars["last_ms"][v] = now_ms
    cars["ready_ms"][v] = now_ms + int(t.models["load_ms"][int(t.vehicles["model"][v])])
    cars["outages"][v] = 0
    cars["crashes"][v] = 0
    cars["check_ms"][v] = NEVER
    cars["outage_ms"][v] = min(now_ms + outage_gap_ms(seed, v, window, 0, _outage_mean_ms(a, v)), NEVER)
    cars["crash_ms"][v] = min(now_ms + engine_gap_ms(seed, v, window, 0, int(a.settings[CRASH_MEAN])), NEVER)
    cars["pull_ms"][v] = now_ms
    _give_back(t, a, v, NEVER)  # what it held when it left was not kept
    cars["ghost"][v] = 0.0
    _tell(t, a, v, now_ms)


@kernel
def _outage_mean_ms(a: Arena, v: int) -> int:
    rate = float(a.cars["outage_per_h"][v])
    return int(HOUR_MS / rate) if rate > 0.0 else 0


@kernel
def _leave(t: Tables, a: Arena, v: int, now_ms: int) -> None:
    """Its owner takes it. Whoever says so hands back what is begun; the others are missed after a while."""
    cars = a.cars
    window = int(cars["window"][v])
    announced = int(a.leaves_silently[window]) == 0 and int(cars["silent"][v]) == 0
    if int(cars["silent"][v]) == 0:
        _advance(t, a, v, now_ms)
    else:
        _lose_undelivered(t, a, v, now_ms)
    cars["phase"][v] = AWAY
    if announced:
        _give_back(t, a, v, NEVER)
        _gone(t, v)
        cars["check_ms"][v] = NEVER
    else:
        if int(cars["silent"][v]) == 0:
            t.vehicles["seen_ms"][v] = now_ms
        _drop(t, a, v)
        cars["check_ms"][v] = min(int(cars["check_ms"][v]), now_ms + SILENT_MS)
    cars["progress"][v] = 0.0
    window += 1
    cars["window"][v] = window
    cars["end_ms"][v] = int(a.start_ms[window]) if window < int(a.first[v + 1]) else NEVER


@kernel
def _lose_undelivered(t: Tables, a: Arena, v: int, now_ms: int) -> None:
    """It leaves while it has no network: what it has done since is not delivered before somebody else has done it."""
    cars = a.cars
    since = max(int(cars["last_ms"][v]), int(cars["ready_ms"][v]))
    if now_ms <= since:
        return
    done = _speed(a, v, since) * (now_ms - since) / 1000.0
    held = 0.0
    row = int(t.vehicles["lease"][v])
    while row != NONE:
        held += int(t.leases["left"][row]) * float(a.counts[COUNTS + int(t.leases["job"][row])])
        row = int(t.leases["next"][row])
    a.counts[LOST] += min(done, held)
    cars["last_ms"][v] = now_ms


@kernel
def _gone(t: Tables, v: int) -> None:
    t.vehicles["flags"][v] = int(t.vehicles["flags"][v]) | OFFLINE
    recount(t, v)


@kernel
def _missed(t: Tables, a: Arena, v: int, now_ms: int) -> None:
    """The cell has not heard of a vehicle: first it takes back what is urgent, later everything."""
    if int(t.vehicles["flags"][v]) & OFFLINE == 0:
        _gone(t, v)
    silent_ms = now_ms - int(t.vehicles["seen_ms"][v])
    patience = _give_back(t, a, v, silent_ms)
    again_ms = min(int(t.vehicles["seen_ms"][v]) + patience, NEVER)
    a.cars["check_ms"][v] = NEVER if patience == NEVER else max(again_ms, now_ms + SLOT_MS)


@kernel
def _outage(t: Tables, a: Arena, v: int, now_ms: int) -> None:
    """Its network goes, or comes back: then it delivers what it has done meanwhile."""
    cars = a.cars
    seed, window, k = int(a.settings[SEED]), int(cars["window"][v]), int(cars["outages"][v])
    if int(cars["silent"][v]) == 0:
        _advance(t, a, v, now_ms)
        cars["silent"][v] = 1
        cars["ghost"][v] = 0.0
        cars["outage_ms"][v] = now_ms + outage_length_ms(seed, v, window, k, int(a.settings[OUTAGE_MEAN]))
        cars["check_ms"][v] = now_ms + SILENT_MS
        t.vehicles["seen_ms"][v] = now_ms
        return
    cars["silent"][v] = 0
    cars["outages"][v] = k + 1
    cars["check_ms"][v] = NEVER
    cars["outage_ms"][v] = min(now_ms + outage_gap_ms(seed, v, window, k + 1, _outage_mean_ms(a, v)), NEVER)
    ghost = float(cars["ghost"][v])
    if ghost > 0.0:
        # It has worked on lines that others have now; the oldest first, so those that it still holds come after.
        since = max(int(cars["last_ms"][v]), int(cars["ready_ms"][v]))
        done = min(_speed(a, v, since) * max(now_ms - since, 0) / 1000.0, ghost)
        a.counts[DOUBLED] += done
        cars["last_ms"][v] = since + int(done * 1000.0 / _speed(a, v, since))
        cars["ghost"][v] = 0.0
        cars["progress"][v] = 0.0
    _advance(t, a, v, now_ms)
    _tell(t, a, v, now_ms)
    cars["pull_ms"][v] = now_ms


@kernel
def _crash(t: Tables, a: Arena, v: int, now_ms: int) -> None:
    """Its engine dies and comes back: what it was at is lost, what it holds goes on."""
    cars = a.cars
    if int(cars["silent"][v]) == 0:
        _advance(t, a, v, now_ms)
    _drop(t, a, v)
    k = int(cars["crashes"][v]) + 1
    cars["crashes"][v] = k
    cars["ready_ms"][v] = now_ms + int(a.settings[RESTART])
    gap = engine_gap_ms(int(a.settings[SEED]), v, int(cars["window"][v]), k, int(a.settings[CRASH_MEAN]))
    cars["crash_ms"][v] = min(now_ms + int(a.settings[RESTART]) + gap, NEVER)


@kernel
def _load(t: Tables, a: Arena, v: int, model: int, now_ms: int) -> None:
    """Put another model in the place of the one that is loaded."""
    if model == NONE:
        return
    begun_ms = 0
    row = _oldest(t, v)
    if row != NONE:  # what is begun is finished first, half of its lines on average; the others go back
        per_line = float(a.counts[COUNTS + int(t.leases["job"][row])])
        begun = min(SLOTS, int(t.leases["left"][row]))
        begun_ms = int(begun * per_line * 500.0 / _speed(a, v, now_ms))
        a.counts[RECALLED] += int(t.vehicles["outstanding"][v])
        _give_back(t, a, v, NEVER)
        a.cars["progress"][v] = 0.0
        a.cars["ghost"][v] = 0.0
    takes_ms = begun_ms + int(t.models["load_ms"][model])
    a.cars["ready_ms"][v] = now_ms + takes_ms
    a.cars["last_ms"][v] = int(a.cars["ready_ms"][v])
    a.counts[SWITCHES] += 1
    a.counts[SWITCHING] += takes_ms / 1000.0 * float(a.cars["speed"][v])
    t.vehicles["model"][v] = model
    recount(t, v)


@kernel
def _fill(t: Tables, a: Arena, v: int, now_ms: int, out: Ints) -> bool:
    """Leases until the kernels say that it is enough. False: the lease table is full."""
    while True:
        j = pull(t, v, now_ms, out)
        if j == NONE:
            return True
        per_line = float(t.jobs["work_per_line"][j])
        work = int(out[0]) * per_line
        if open_lease(t, v, j, int(out[0]), work, now_ms, now_ms + lease_ms(t, v, work)) == NONE:
            return False
        a.counts[GRANTS] += 1


@kernel
def _pull(t: Tables, a: Arena, v: int, now_ms: int, out: Ints) -> bool:
    """A vehicle comes for more: it tells how it is, and gets what the kernels say. False: the lease table is full."""
    cars = a.cars
    _advance(t, a, v, now_ms)
    _tell(t, a, v, now_ms)
    if why_not(t, v, now_ms) != OK:
        cars["pull_ms"][v] = now_ms + IDLE_MS
        a.counts[IDLE] += float(a.cars["speed"][v]) * IDLE_MS / 1000.0
        return True
    if now_ms >= int(cars["ready_ms"][v]):
        _load(t, a, v, switch_to(t, v, False), now_ms)
    if not _fill(t, a, v, now_ms, out):
        return False
    if int(t.vehicles["outstanding"][v]) == 0:
        model = switch_to(t, v, True)
        _load(t, a, v, model, now_ms)
        if model != NONE and not _fill(t, a, v, now_ms, out):
            return False
    queue = 0.0
    row = int(t.vehicles["lease"][v])
    while row != NONE:
        queue += int(t.leases["left"][row]) * float(a.counts[COUNTS + int(t.leases["job"][row])])
        row = int(t.leases["next"][row])
    if queue <= 0.0:
        wait_ms = 20_000 + (v % 17) * 1_000
        a.counts[IDLE + int(out[1])] += float(a.cars["speed"][v]) * wait_ms / 1000.0
        cars["pull_ms"][v] = now_ms + wait_ms
        return True
    busy_ms = int((queue - float(cars["progress"][v])) * 1000.0 / _speed(a, v, now_ms))
    begins_ms = max(now_ms, int(cars["ready_ms"][v]))
    cars["pull_ms"][v] = begins_ms + max(int(busy_ms * (1.0 - REFILL)), MIN_STEP_MS)
    return True


@kernel
def _event(t: Tables, a: Arena, v: int, out: Ints) -> bool:
    """The next thing that happens to a vehicle."""
    cars = a.cars
    now_ms = int(cars["due_ms"][v])
    a.counts[EVENTS] += 1
    here = int(cars["phase"][v]) == HERE
    if int(cars["end_ms"][v]) <= now_ms:
        if here:
            _leave(t, a, v, now_ms)
        else:
            _arrive(t, a, v, now_ms)
        return True
    if int(cars["check_ms"][v]) <= now_ms:
        _missed(t, a, v, now_ms)
        return True
    if here and int(cars["outage_ms"][v]) <= now_ms:
        _outage(t, a, v, now_ms)
        return True
    if here and int(cars["crash_ms"][v]) <= now_ms:
        _crash(t, a, v, now_ms)
        return True
    return _pull(t, a, v, now_ms, out)


# -- time --------------------------------------------------------------------------------------------------------------


@kernel
def close_job(t: Tables, a: Arena, j: int, now_ms: int) -> None:
    """A job has ended: what runs of it is stopped, and what was done until now counts."""
    for row in range(len(t.leases)):
        if int(t.leases["number"][row]) != NONE and int(t.leases["job"][row]) == j:
            v = int(t.leases["vehicle"][row])
            if int(a.cars["phase"][v]) == HERE and int(a.cars["silent"][v]) == 0:
                _advance(t, a, v, now_ms)
    for row in range(len(t.leases)):
        if int(t.leases["number"][row]) != NONE and int(t.leases["job"][row]) == j:
            v = int(t.leases["vehicle"][row])
            left = int(t.leases["left"][row])
            if _oldest(t, v) == row:
                a.counts[LATE] += float(a.cars["progress"][v])
                a.cars["progress"][v] = 0.0
            t.jobs["leased"][j] -= left
            shrink_lease(t, row, left)
            close_lease(t, row)
            if int(a.cars["phase"][v]) == HERE and int(a.cars["silent"][v]) == 0:
                _unschedule(a, v)
                a.cars["pull_ms"][v] = now_ms
                _schedule(a, v)


@kernel
def _recall(t: Tables, a: Arena, now_ms: int) -> None:
    """Vehicles give back what they have not begun and others can do sooner."""
    for at in range(recall(t, now_ms, a.recalled)):
        row = int(a.recalled[at])
        if int(t.leases["number"][row]) == NONE:
            continue
        v, j = int(t.leases["vehicle"][row]), int(t.leases["job"][row])
        if int(a.cars["silent"][v]) != 0 or int(a.cars["phase"][v]) != HERE:
            continue
        _advance(t, a, v, now_ms)
        if int(t.leases["number"][row]) == NONE or int(t.leases["vehicle"][row]) != v:
            continue
        back = int(t.leases["left"][row]) - (SLOTS if _oldest(t, v) == row else 0)
        if back > 0:
            a.counts[RECALLED] += back
            t.jobs["leased"][j] -= back
            if shrink_lease(t, row, back) == 0:
                close_lease(t, row)


@kernel
def _wake(t: Tables, a: Arena, now_ms: int) -> None:
    """Vehicles that have room for lines which are urgent come for them now, as their next report would have them do.

    A report is a small message every few seconds; here a vehicle comes when it has worked off most of its queue.
    """
    regions = len(t.buckets) // (len(t.models) * RISK_BUCKETS)
    for m in range(len(t.models)):
        first = int(t.models["first"][m])
        for place_no in range(first, first + int(t.models["count"][m])):
            j = int(t.order[place_no])
            if int(t.jobs["flags"][j]) & (RELAXED | BEST_EFFORT | WHOLE) != 0:
                continue
            wanted = waiting(t, j)
            mask = int(t.jobs["regions"][j])
            for where in range(int(t.free[2])):
                if mask != ANY_REGION and (mask >> where) & 1 == 0:
                    continue
                for step in range(RISK_BUCKETS):
                    if wanted > 0:
                        wanted -= _wake_some(t, a, (m * regions + where) * RISK_BUCKETS + step, j, now_ms)


@kernel
def _wake_some(t: Tables, a: Arena, bucket: int, j: int, now_ms: int) -> int:
    """Wake a few vehicles of a bucket; how many lines of the job they will take."""
    v = int(t.buckets[bucket])
    taken = 0
    for _ in range(WAKE):
        if v == NONE:
            break
        if int(a.cars["silent"][v]) == 0 and int(a.cars["phase"][v]) == HERE and refusal(t, v, j) == OK:
            lines = share(t, v, j)
            if lines > 0:
                taken += lines
                _unschedule(a, v)
                a.cars["pull_ms"][v] = now_ms
                _schedule(a, v)
        v = int(t.vehicles["next"][v])
        t.buckets[bucket] = v
    return taken


@allocating_kernel
def run_until(t: Tables, a: Arena, rows: Ints, from_slot: int, until_ms: int, out: Ints) -> int:
    """Let time pass to ``until_ms``; the slot that is next, or -1 - slot if the lease table has to grow first.

    ``rows``: the jobs in progress. The plan is made anew every PLAN_MS.
    """
    slot = from_slot
    while slot * SLOT_MS < until_ms:
        if slot * SLOT_MS % PLAN_MS == 0:
            plan(t, rows, slot * SLOT_MS)
            if int(a.settings[NO_REVOKE]) == 0:
                _recall(t, a, slot * SLOT_MS)
            _wake(t, a, slot * SLOT_MS)
        v = int(a.slots[slot])
        while v != NONE:
            _unschedule(a, v)
            enough = _event(t, a, v, out)
            if not enough:
                a.cars["pull_ms"][v] = int(a.cars["due_ms"][v])
                _schedule(a, v)
                return -1 - slot
            if _next_ms(a, v) < int(a.cars["due_ms"][v]):
                _postpone(a, v)
            _schedule(a, v)
            v = int(a.slots[slot])
        slot += 1
    return slot


@kernel
def _next_ms(a: Arena, v: int) -> int:
    cars = a.cars
    due = min(int(cars["end_ms"][v]), int(cars["check_ms"][v]))
    if int(cars["phase"][v]) == HERE:
        due = min(due, int(cars["outage_ms"][v]), int(cars["crash_ms"][v]))
        if int(cars["silent"][v]) == 0:
            due = min(due, int(cars["pull_ms"][v]))
    return due


@kernel
def _postpone(a: Arena, v: int) -> None:
    """Nothing is due in the past: what was, is due now."""
    now_ms = int(a.cars["due_ms"][v])
    cars = a.cars
    cars["end_ms"][v] = max(now_ms, int(cars["end_ms"][v]))
    cars["check_ms"][v] = max(now_ms, int(cars["check_ms"][v]))
    cars["outage_ms"][v] = max(now_ms, int(cars["outage_ms"][v]))
    cars["crash_ms"][v] = max(now_ms, int(cars["crash_ms"][v]))
    cars["pull_ms"][v] = max(now_ms, int(cars["pull_ms"][v]))


def columns_of(world: Any) -> dict[str, Any]:
    """The columns of a world that kernels read, by the names of ``Arena``."""
    return {
        "first": world.first,
        "start_ms": world.start_ms,
        "end_ms": world.end_ms,
        "leaves_silently": world.silent,
        "stay_bound_min": world.stay_bound_min,
        "risk_pct": world.risk_pct,
        "table_hour": world.table_hour,
        "heat": world.heat,
        "price": world.price_micro_kwh,
        "release_ms": world.jobs.release_ms,
        "deadline_ms": world.jobs.deadline_ms,
    }
