"""When work that has time may wait for a cheaper or cleaner hour.

Decides: the price of running in each class of vehicles and hour, what a job would pay at most, and from these whether
it runs now. Must not: hold state, or make a job late: when its time is getting short, price no longer counts.
Called by: the control plane (``prices`` once an hour, ``may_run`` in the kernels of the scheduler), ``sim.timing``.

Theory. Work of kinds (which classes may do it, by when) is shipped to cells (class, hour) with a capacity and a cost:
a transport problem, small because jobs of the same kind and hour are one. Its dual prices say all that is needed
afterwards: pi[class, hour] is the cost of energy there plus what it is worth that somebody else could have used that
cell; a kind's bid is the price of the dearest cell that it still has to use. A job runs now where bid >= pi. Jobs that
came after the prices were made bid the lowest price within their time.

Costs are whole millionths of the currency for a million tokens, so that both runs of a comparison agree.
"""

from __future__ import annotations

from math import floor
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.core.jit import kernel

MARGIN: Final = 1.3  # of the time that work is expected to take
MILLION: Final = 1_000_000
UNSERVED_MICRO: Final = 1_000_000_000_000  # for a million tokens that find no place: dearer than any hour
NO_PRICE: Final = 1 << 60  # of a cell that nobody can use

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


# -- the rule ----------------------------------------------------------------------------------------------------------


@kernel
def latest_start_ms(deadline_ms: int, due_tokens: int, tokens_s: float) -> int:
    """When a job has to be at work at the latest, whatever it costs.

    ``due_tokens``: what is left of it and of all that is due no later on the same vehicles. ``tokens_s``: the capacity
    that is foretold for them. Nothing is foretold: it has to start at once.
    """
    if tokens_s <= 0.0:
        return 0
    need = MARGIN * due_tokens * 1000.0 / tokens_s
    return deadline_ms - int(min(need, 1e15)) - 1


@kernel
def may_run(  # noqa: PLR0917  # kernels take no keywords
    now_ms: int, deadline_ms: int, due_tokens: int, tokens_s: float, bid: int, pi: int
) -> bool:
    """Whether a job runs now in a class whose price is ``pi``: it pays that much, or its time is getting short."""
    return bid >= pi or now_ms >= latest_start_ms(deadline_ms, due_tokens, tokens_s)


@kernel
def mark(  # noqa: PLR0917  # kernels take no keywords
    now_ms: int, deadline_ms: Ints, due_tokens: Ints, tokens_s: Floats, bid: Ints, pi: Ints, out: Bools
) -> None:
    """``may_run`` of many jobs: columns of equal length."""
    for j in range(len(out)):
        out[j] = may_run(now_ms, int(deadline_ms[j]), int(due_tokens[j]), float(tokens_s[j]), int(bid[j]), int(pi[j]))


# -- what it goes by ---------------------------------------------------------------------------------------------------


class Cells(msgspec.Struct, frozen=True, kw_only=True):
    """Where and when work can be done [classes, hours]: tokens, and their cost in millionths a million tokens."""

    tokens: Ints
    cost: Ints


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Work in columns of equal length: kind (row of ``eligible`` [kinds, classes]), tokens, and its hours.

    It may be done in the hours ``release`` to ``deadline`` - 1 of the cells.
    """

    eligible: Bools
    kind: Ints
    tokens: Ints
    release: Ints
    deadline: Ints


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """What came out. ``pi`` [classes, hours]; ``bid`` and ``late`` (tokens without a place) by row of the work.

    ``cost_micro`` is the energy of everything that has a place.
    """

    pi: Ints
    bid: Ints
    late: Ints
    cost_micro: int


def cost_of(
    price_micro_kwh: npt.ArrayLike, grams_kwh: npt.ArrayLike, wh_per_million: npt.ArrayLike, carbon_micro_kg: int = 0
) -> Ints:
    """Cost of a million tokens in millionths: energy at the socket, and its CO2 at ``carbon_micro_kg`` a kilogram.

    The three arrays are broadcast to [classes, hours]. A carbon weight of 0 goes by money alone.
    """
    per_kwh = np.asarray(price_micro_kwh, dtype=np.float64)
    per_kwh = per_kwh + np.asarray(grams_kwh, dtype=np.float64) / 1000.0 * carbon_micro_kg
    return np.rint(per_kwh * np.asarray(wh_per_million, dtype=np.float64) / 1000.0).astype(np.int64)


def gathered(work: Work) -> Work:
    """The same work with rows of the same kind and hours put together, in a fixed order."""
    key = np.stack([work.kind, work.release, work.deadline], axis=1)
    rows, index = np.unique(key, axis=0, return_inverse=True)
    tokens = np.zeros(len(rows), dtype=np.int64)
    np.add.at(tokens, index.reshape(-1), work.tokens)
    columns = rows.T.copy()
    return Work(eligible=work.eligible, kind=columns[0], tokens=tokens, release=columns[1], deadline=columns[2])


def prices(cells: Cells, work: Work) -> Prices:
    """Solve the transport problem. Takes arrays and gives arrays; needs scipy (its HiGHS is deterministic).

    Work that finds no place at all is late, and bids more than any price.
    """
    row, cell = _arcs(cells, work)
    rows = len(work.tokens)
    if rows == 0:
        return Prices(pi=_priced(cells, np.zeros(cells.cost.size)), bid=work.kind, late=work.kind, cost_micro=0)
    from scipy.optimize import linprog  # noqa: PLC0415  # heavy, once an hour
    from scipy.sparse import csr_array  # noqa: PLC0415

    arcs = len(row)
    flat_cost = cells.cost.reshape(-1)
    objective = np.concatenate([flat_cost[cell], np.full(rows, UNSERVED_MICRO)]).astype(np.float64)
    served = csr_array(
        (np.ones(arcs + rows), (np.concatenate([row, np.arange(rows)]), np.arange(arcs + rows))),
        shape=(rows, arcs + rows),
    )
    used = csr_array((np.ones(arcs), (cell, np.arange(arcs))), shape=(cells.tokens.size, arcs + rows))
    scale = float(MILLION)
    # Prices in currency and tokens in millions keep the numbers near one, where the solver's tolerances are made for.
    found = linprog(
        objective / scale,
        A_ub=used,
        b_ub=cells.tokens.reshape(-1) / scale,
        A_eq=served,
        b_eq=work.tokens / scale,
        method="highs",
    )
    assert found.status == 0, "it always has a solution: work without a place is late"
    moved = found.x[:arcs]
    pi = _priced(cells, -found.ineqlin.marginals * scale)
    bid = np.minimum(np.rint(found.eqlin.marginals * scale), UNSERVED_MICRO).astype(np.int64)
    late = np.rint(found.x[arcs:] * scale).astype(np.int64)
    return Prices(pi=pi, bid=bid, late=late, cost_micro=round(float(moved @ flat_cost[cell])))


def bid_of(pi: Ints, eligible: Bools, release: int, deadline: int) -> int:
    """What work bids that was not there when the prices were made: the lowest price of its classes within its time."""
    window = pi[eligible, max(release, 0) : max(deadline, 0)]
    return int(window.min()) if window.size else UNSERVED_MICRO


def asap_cost(cells: Cells, work: Work) -> tuple[int, int]:
    """As soon as possible, for comparison: cost in millionths, and tokens that are late.

    Each hour takes what has come, earliest deadline first, spread over its classes by what they have left.
    """
    hours = cells.tokens.shape[1]
    left = work.tokens.astype(np.float64)
    cost = 0.0
    order = np.lexsort((np.arange(len(left)), work.deadline))
    for hour in range(hours):
        free = cells.tokens[:, hour].astype(np.float64)
        for j in order:
            if left[j] <= 0 or not work.release[j] <= hour < work.deadline[j]:
                continue
            mine = np.where(work.eligible[work.kind[j]], free, 0.0)
            take = min(float(left[j]), float(mine.sum()))
            if take <= 0:
                continue
            spread = mine * (take / mine.sum())
            free -= spread
            left[j] -= take
            cost += float(spread @ cells.cost[:, hour]) / MILLION
    return round(cost), floor(left.sum())


def kept_free(cells: Cells, busy: float, fills_h: float) -> Cells:
    """The cells less what work that has not come yet will want.

    ``busy``: usual part of the capacity that is used; ``fills_h``: after so many hours most of it is work that came
    meanwhile. Without it, all jobs of now would wait for the same cheap hours, and those to come would find them full.
    """
    ahead = np.minimum(np.arange(cells.tokens.shape[1]) / fills_h, 1.0)
    return Cells(tokens=np.rint(cells.tokens * (1.0 - busy * ahead)).astype(np.int64), cost=cells.cost)


def _arcs(cells: Cells, work: Work) -> tuple[Ints, Ints]:
    """Which row of the work may use which cell: two columns."""
    hours = cells.tokens.shape[1]
    rows: list[Any] = []
    places: list[Any] = []
    for j in range(len(work.tokens)):
        span = np.arange(max(int(work.release[j]), 0), min(int(work.deadline[j]), hours))
        classes = np.flatnonzero(work.eligible[work.kind[j]])
        place = (classes[:, None] * hours + span).reshape(-1)
        place = place[cells.tokens.reshape(-1)[place] > 0]
        places.append(place)
        rows.append(np.full(len(place), j))
    if not rows:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.concatenate(rows).astype(np.int64), np.concatenate(places).astype(np.int64)


def _priced(cells: Cells, scarcity: Floats) -> Ints:
    pi = cells.cost + np.rint(scarcity.reshape(cells.cost.shape)).astype(np.int64)
    found: Ints = np.where(cells.tokens > 0, pi, NO_PRICE)
    return found
