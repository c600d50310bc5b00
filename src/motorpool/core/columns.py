"""The state of a cell in columns: one row a vehicle, lease, job, tenant, model and site, in numpy arrays of records.

A row of a vehicle is 96 bytes, whatever the vehicle does: three parts of 32, of which a live request touches the first,
a pull the first two. Rows begin at a line of the processor's cache, so no part lies across two of them. Units stand in
the names; times are milliseconds or seconds since 1970; speeds are work tokens a second: a generated token counts 1, a
token of a prompt 1/8, for reading is so much cheaper than writing.

Called by: ``core.kernels`` and the tables around it. Must not: hold anything that a vehicle keeps to itself (place,
identity of the car, trips).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[Any]  # of one of the types below
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# States of a vehicle; the order is that of the wire's.
AWAY: Final = 0  # never heard of since the start
DENIED: Final = 1
STARTING: Final = 2
READY: Final = 3
WORKING: Final = 4
YIELDING: Final = 5

# Flags of a vehicle.
OFFLINE: Final = 1
WITHDRAWN: Final = 2  # the owner has taken the consent back
WITHDRAWAL_SEEN: Final = 4  # and the vehicle knows it
RESERVE: Final = 8  # paid for by the operator: it works only on what is behind
DRAWING: Final = 16  # counted in its site's power
STEP: Final = 32  # times 0 to 3: the risk of leaving at which it stands in its bucket

# Flags of a lease.
SEEN: Final = 1  # the vehicle has said that it holds it
EXCUSED: Final = 2  # that it went missing is no fault of the vehicle's: its owner took the car
SHADOW: Final = 4  # it runs lines a second time that another vehicle is late with
RECALLED: Final = 8  # what it has not begun was asked back

# Flags of a job.
CANCELLING: Final = 1
BEHIND: Final = 4  # at the cell's present speed it would miss its time
BEST_EFFORT: Final = 32  # nothing was promised: it gets what others leave
WHOLE: Final = 64  # a line is done in one go or not at all
IN_ORDER: Final = 16  # the last plan has it
RELAXED: Final = 8  # it has time enough to wait for cheaper hours and to let others go first

NONE: Final = -1
TIERS: Final = 4  # of trust
NEVER: Final = 1 << 60
ANY_REGION: Final = 0  # as a mask: every region will do
MAX_REGIONS: Final = 63
RISK_BUCKETS: Final = 4
MAX_SEQ: Final = 0xFFFFFFFF  # an honest vehicle counts its reports; at one a second this lasts for 136 years
MAX_UNTIL_S: Final = 0xFFFFFFFF  # the year 2106
MAX_MODELS: Final = 1 << 15  # what the column of models holds
MAX_AFTER_MS: Final = (1 << 31) - 1  # 24 days; no lease lives longer than an hour and its grace
NOT_MISSING: Final = -(1 << 31)
SLOW_GROWTH: Final = 65_536  # rows; larger tables grow by a sixteenth
CACHE_LINE: Final = 64  # bytes

VEHICLE: Final = np.dtype(
    [
        ("next", np.int32),  # of its bucket
        ("previous", np.int32),
        ("counted_place", np.int32),  # where in ``speeds`` it is counted, or NONE; with STEP it names the bucket
        ("blocked_until_s", np.uint32),  # rounded up, as the next one: see ``until_s``
        ("paused_until_s", np.uint32),
        ("slots", np.uint16),
        ("live", np.uint16),  # live requests placed here and not ended
        ("state", np.uint8),
        ("flags", np.uint8),
        ("region", np.uint8),
        ("risk_pct", np.uint8),  # of leaving within 15 minutes
        ("trust", np.uint8),
        ("memory_gb", np.uint8),
        ("failures", np.uint8),  # since its last result
        ("narrowed", np.uint8),  # how often it has refused a grant as too much: each time the next one is halved
        # -- 32
        ("speed", np.float32),  # measured, 0 while unknown
        ("finished", np.float32),  # work since ``result_ms``
        ("counted_mtok_s", np.int32),  # its part of the speed at ``counted_place``
        ("lease", np.int32),  # the first of its leases
        ("outstanding", np.int32),  # lines that it holds
        ("on_disk", np.uint32),  # models that it has, one bit a row; those beyond 32 are not switched to
        ("model", np.int16),
        ("site", np.uint16),
        ("permit_w", np.uint16),
        ("outage_s", np.uint16),  # nine tenths of its silences are shorter
        # -- 64
        ("seen_ms", np.int64),
        ("result_ms", np.int64),
        ("incarnation", np.uint64),  # of sixteen hexadecimal digits, or 0: it is another word, see ``core.fleet``
        ("seq", np.uint32),  # MAX_SEQ stands for all that is larger: a second report with such a number is none
        ("reasons", np.uint16),  # which of the cell's sets of reasons
        ("stay_min", np.uint16),
    ],
    align=True,
)
LEASE: Final = np.dtype(
    [
        ("number", np.int64),  # unique within an epoch; NONE: the row is free
        ("left", np.int32),
        ("job", np.int32),
        ("next", np.int32),  # of its vehicle, or of the free rows
        ("vehicle", np.int32),
        ("granted_ms", np.int64),
        # Since it was granted, MAX_AFTER_MS either way at most; before it only if the clock was set back in between.
        ("life_ms", np.int32),  # after which it runs out
        ("sent_after_ms", np.int32),
        ("missing_after_ms", np.int32),  # since when its vehicle does not hold it any more, or NOT_MISSING
        ("first", np.int32),  # the lowest of its lines
        ("span", np.int32),  # and how far they reach
        ("sends", np.uint8),
        ("flags", np.uint8),
    ],
    align=True,
)
JOB: Final = np.dtype(
    [
        ("job_no", np.int64),
        ("expires_ms", np.int64),
        ("slack_ms", np.int64),  # time to spare at the cell's speed, those that end sooner served first
        ("done_work", np.float64),
        ("work_per_line", np.float32),
        ("overhead_ms", np.int32),  # of a line that is done in one go: what getting and giving takes
        ("bid_micro_kwh", np.float32),  # what it would pay for energy now rather than later
        ("model", np.int32),
        ("tenant", np.int32),
        ("total", np.int32),
        ("done", np.int32),
        ("leased", np.int32),
        ("regions", np.uint64),  # a mask of where it may run
        ("min_trust", np.uint8),
        ("memory_gb", np.uint8),
        ("flags", np.uint8),
    ],
    align=True,
)
TENANT: Final = np.dtype([("used", np.float64), ("weight", np.float32), ("active", np.int32)], align=True)
MODEL: Final = np.dtype(
    [
        ("waiting_work", np.float64),  # of its jobs, at the last plan and less what was granted since
        ("load_ms", np.int32),  # how long a vehicle takes to put it in the place of another
        ("serving", np.int32),  # present vehicles that have it loaded
        ("measured", np.int32),  # of these, with a known speed
        ("first", np.int32),  # where its jobs begin in the order
        ("count", np.int32),
        ("jobs", np.int32),  # in progress
        ("usual_work", np.float32),  # of a line, as the last job has shown; 0 while unknown
        ("work_per_line", np.float32),  # of the lines that wait
    ],
    align=True,
)
SITE: Final = np.dtype(
    [("limit_w", np.int32), ("used_w", np.int32), ("limit_vehicles", np.int32), ("working", np.int32)], align=True
)


class Tables(NamedTuple):
    """All of it; kernels take this. ``order``: job rows, each model's together, the next to serve first."""

    vehicles: Records
    leases: Records
    jobs: Records
    tenants: Records
    models: Records
    sites: Records
    order: npt.NDArray[np.int32]
    buckets: npt.NDArray[np.int32]  # the first vehicle of each, by (model, region, risk)
    prices: npt.NDArray[np.int32]  # micro a kWh now, by region
    speeds: Ints  # of present vehicles by (model, region, trust), thousandths of a work token a second
    needs: Ints  # the same: the speed of so much trust or more that keeps all promises which ask for it
    tight: Ints  # the least time to spare of the jobs that wait, by (model, region), milliseconds
    free: Ints  # the first free lease row; how many leases were made, and regions named; where recall looks next


def empty(dtype: np.dtype[Any], rows: int) -> Records:
    """Rows that mean nothing yet."""
    size = rows * dtype.itemsize
    room = np.zeros(size + CACHE_LINE, np.uint8)
    start = -int(room.ctypes.data) % CACHE_LINE
    table: Records = room[start : start + size].view(dtype)
    for name in ("lease", "next", "previous", "counted_place", "model", "number"):
        if dtype.names is not None and name in dtype.names:
            table[name] = NONE
    if dtype == VEHICLE:
        table["flags"] = OFFLINE
    elif dtype == LEASE:
        table["missing_after_ms"] = NOT_MISSING
    return table


def grown(table: Records, rows: int) -> Records:
    """The same rows with room for more."""
    bigger = empty(table.dtype, rows)
    bigger[: len(table)] = table
    return bigger


def more(rows: int, least: int) -> int:
    """How many rows a full table gets: half as many again; a large one a sixteenth more, for empty rows cost too."""
    return rows + max(least, rows // 2 if rows <= SLOW_GROWTH else rows // 16)


def until_s(until_ms: int) -> int:
    """A time from which on something is allowed, in whole seconds: never sooner than asked for."""
    return min(max(-(-until_ms // 1000), 0), MAX_UNTIL_S)


def after_ms(at_ms: int, granted_ms: int) -> int:
    """A time as a lease holds it."""
    return min(max(at_ms - granted_ms, -MAX_AFTER_MS), MAX_AFTER_MS)
