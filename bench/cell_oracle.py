"""What the best possible scheduler could do with a world, if it knew the future: bounds for every real one.

- ``u0``: all that the fleet can do, whether or not there is work for it.
- ``u2``: the most work that can be done in time, if each class of vehicles is one big computer and work flows like
  water: a maximum flow from jobs through slots of time to classes. No scheduler can do more.
- ``edf``: the same for one class, exactly, by serving the earliest deadline first.
- ``energy``: the least that electricity can cost for the same work in time, and what it costs as soon as possible.

Waiting for models, outages, deaths of engines and rounds that must be done in one go are left out, and a job counts as
released for the whole slot in which it is: all of that makes the bounds higher (and the cost lower), never wrong.
"""

from __future__ import annotations

import heapq
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import maximum_flow

from motorpool.sim.arrivals import BEST_EFFORT
from motorpool.sim.world import World, tokens_by_slot

HOUR_MS: Final = 3_600_000
SLOT_MS: Final = HOUR_MS // 4
UNITS: Final = 1_000_000_000  # the flow is counted in so many parts of all that the fleet can do

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Problem(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Who may do what and when. ``capacity[class, slot]`` in tokens; ``may[sort, class]``: it may run there.

    Jobs with the same sort and the same slots are one demand: ``sort``, first and last slot (inclusive), tokens.
    """

    slot_ms: int
    capacity: F64
    may: NDArray[np.bool_]
    micro_per_token: F64
    sort: I64
    begin: I64
    last: I64
    tokens: F64


def u0(world: World) -> float:
    """Tokens that the fleet could make in all its windows."""
    return float(tokens_by_slot(world, np.zeros(len(world), np.int64), 1).sum())


def problem(world: World, *, slot_ms: int = SLOT_MS, best_effort: bool = True, by_price: bool = False) -> Problem:
    """The problem of a world. ``by_price``: classes are also told apart by price zone."""
    jobs = world.jobs
    wanted = np.flatnonzero((jobs.kind != BEST_EFFORT) | best_effort)
    kinds = np.stack([jobs.region_mask[wanted], jobs.memory_gb[wanted], jobs.min_trust[wanted]], axis=1).astype(
        np.int64
    )
    sorts, sort = np.unique(kinds, axis=0, return_inverse=True)
    traits = [world.region, world.memory_gb, world.trust]
    if by_price:
        traits.append(world.zone)
    vehicles, key = np.unique(np.stack(traits, axis=1).astype(np.int64), axis=0, return_inverse=True)
    may = (sorts[:, None, 0] >> vehicles[None, :, 0]) & 1 == 1
    may &= (vehicles[None, :, 1] >= sorts[:, None, 1]) & (vehicles[None, :, 2] >= sorts[:, None, 2])
    # Classes that may do the same are one class, unless their prices differ.
    alike = np.concatenate([may.T.astype(np.int64), vehicles[:, 3:]], axis=1)
    merged, where = np.unique(alike, axis=0, return_inverse=True)
    key = where.reshape(-1)[key.reshape(-1)]
    capacity = tokens_by_slot(world, key, len(merged), slot_ms)
    slots = capacity.shape[1]
    rows = np.stack(
        [
            sort.reshape(-1),
            np.minimum(jobs.release_ms[wanted] // slot_ms, slots - 1),
            np.minimum((jobs.deadline_ms[wanted] - 1) // slot_ms, slots - 1),
        ],
        axis=1,
    ).astype(np.int64)
    demands, which = np.unique(rows, axis=0, return_inverse=True)
    return Problem(
        slot_ms=slot_ms,
        capacity=capacity,
        may=merged[:, : len(sorts)].T.astype(bool),
        micro_per_token=_cost(world, key, merged[:, len(sorts) :], capacity.shape),
        sort=demands[:, 0],
        begin=demands[:, 1],
        last=demands[:, 2],
        tokens=np.bincount(which.reshape(-1), jobs.tokens[wanted], len(demands)).astype(np.float64),
    )


def _cost(world: World, key: I64, zone: I64, shape: tuple[int, ...]) -> F64:
    """Millionths of the currency for a token: the watts and the speed of the class together, and its zone's price."""
    if not zone.shape[1]:
        return np.zeros(shape)
    watts, speed = (np.bincount(key, column, len(zone)) for column in (world.permit_w, world.speed))
    price = np.repeat(world.price_micro_kwh, shape[1] // world.price_micro_kwh.shape[1], axis=1)[zone[:, 0]]
    return np.asarray(price * (watts / speed / 3.6e6)[:, None], np.float64)


class _Network(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Edges demand -> (sort, slot) -> (class, slot); nodes are numbered within their own layer."""

    demand: I64
    demand_to: I64
    middle: I64
    cell: I64
    middles: int


def _network(given: Problem) -> _Network:
    slots = given.capacity.shape[1]
    length = given.last - given.begin + 1
    demand = np.repeat(np.arange(len(length)), length)
    slot = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length) + np.repeat(given.begin, length)
    sort, group = np.nonzero(given.may)
    every = np.arange(slots)
    used = given.capacity[group] > 0
    return _Network(
        demand=demand,
        demand_to=given.sort[demand] * slots + slot,
        middle=(sort[:, None] * slots + every)[used],
        cell=(group[:, None] * slots + every)[used],
        middles=len(given.may) * slots,
    )


def u2(given: Problem) -> float:
    """The most tokens that can be done in time."""
    if not len(given.tokens) or given.capacity.sum() <= 0:
        return 0.0
    net = _network(given)
    scale = UNITS / max(float(given.capacity.sum()), float(np.minimum(given.tokens, given.capacity.sum()).sum()))
    demands, cells = len(given.tokens), given.capacity.size
    source, sink = 0, 1 + demands + net.middles + cells
    first_middle, first_cell = 1 + demands, 1 + demands + net.middles
    # Rounded up: the bound may be a little too high, never too low.
    wanted = np.ceil(np.minimum(given.tokens, given.capacity.sum()) * scale).astype(np.int32)
    room = np.ceil(given.capacity.reshape(-1) * scale).astype(np.int32)
    tails = [np.full(demands, source), 1 + net.demand, first_middle + net.middle, first_cell + np.arange(cells)]
    heads = [1 + np.arange(demands), first_middle + net.demand_to, first_cell + net.cell, np.full(cells, sink)]
    limits = [wanted, wanted[net.demand], room[net.cell], room]
    graph = csr_matrix(
        (np.concatenate(limits), (np.concatenate(tails), np.concatenate(heads))),
        shape=(sink + 1, sink + 1),
        dtype=np.int32,
    )
    flow = int(maximum_flow(graph, source, sink, method="dinic").flow_value)
    return min(flow / scale, float(given.tokens.sum()), float(given.capacity.sum()))


def edf(release: I64, deadline: I64, tokens: F64, capacity: F64) -> F64:
    """Tokens of each job that one computer does in time, serving the earliest deadline first.

    ``capacity`` by slot; a job may run from slot ``release`` to before slot ``deadline``.
    """
    left = tokens.astype(np.float64).copy()
    order = np.argsort(release, kind="stable")
    waiting: list[tuple[int, int]] = []
    at = 0
    for slot, there in enumerate(capacity.tolist()):
        room = there
        while at < len(order) and release[order[at]] <= slot:
            job = int(order[at])
            heapq.heappush(waiting, (int(deadline[job]), job))
            at += 1
        while waiting and room > 0:
            until, job = waiting[0]
            if until <= slot or left[job] <= 0:
                heapq.heappop(waiting)
                continue
            done = min(room, left[job])
            left[job] -= done
            room -= done
    return tokens - left


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """What electricity costs for the same work: as soon as possible, and at the least. In millionths."""

    asap_micro: float
    least_micro: float
    tokens: float

    @property
    def saving(self) -> float:
        """The part that can be saved."""
        return 1.0 - self.least_micro / self.asap_micro if self.asap_micro > 0 else 0.0


def energy(given: Problem) -> Energy:
    """Both costs. Work that as-soon-as-possible does not finish in time is left out of both.

    As soon as possible: in each slot all work that is there runs, the earliest deadline first, spread over all vehicles
    that may do it in proportion to what they have left. The least: a linear programme (HiGHS).
    """
    done, asap_micro = _asap(given)
    net = _network(given)
    used = given.capacity.size
    edges_in, edges_out = len(net.demand), len(net.middle)
    columns = edges_in + edges_out
    cost = np.concatenate([np.zeros(edges_in), given.micro_per_token.reshape(-1)[net.cell]])
    into, out_of = np.arange(edges_in), edges_in + np.arange(edges_out)
    rows = np.concatenate([net.demand, len(done) + net.demand_to, len(done) + net.middle])
    ones = np.concatenate([np.ones(2 * edges_in), -np.ones(edges_out)])
    equal = coo_matrix((ones, (rows, np.concatenate([into, into, out_of]))), shape=(len(done) + net.middles, columns))
    limits = coo_matrix((np.ones(edges_out), (net.cell, out_of)), shape=(used, columns))
    scale = max(float(done.max(initial=0.0)), 1e-9)
    # A little more room than there is: what is full to the last token must not fail by a rounding.
    room = given.capacity.reshape(-1) * (1 + 1e-9) / scale + 1e-9
    right = np.concatenate([done / scale, np.zeros(net.middles)])
    found = linprog(cost, A_ub=limits.tocsr(), b_ub=room, A_eq=equal.tocsr(), b_eq=right, method="highs")
    if not found.success:
        raise RuntimeError(f"the linear programme has no answer: {found.message}")
    return Energy(asap_micro=asap_micro, least_micro=float(found.fun) * scale, tokens=float(done.sum()))


def _asap(given: Problem) -> tuple[F64, float]:
    """What each demand gets, and the cost, if all runs as soon as it can."""
    left = given.tokens.copy()
    room = given.capacity.copy()
    order = np.lexsort((np.arange(len(left)), given.last))
    total_micro = 0.0
    for slot in range(room.shape[1]):
        now = order[(given.begin[order] <= slot) & (given.last[order] >= slot) & (left[order] > 0)]
        for demand in now.tolist():
            there = room[:, slot] * given.may[given.sort[demand]]
            free = float(there.sum())
            if free <= 0:
                continue
            part = there * (min(left[demand], free) / free)
            room[:, slot] = np.maximum(room[:, slot] - part, 0.0)
            left[demand] = max(0.0, left[demand] - float(part.sum()))
            total_micro += float((part * given.micro_per_token[:, slot]).sum())
    return given.tokens - left, total_micro
