"""What waiting for cheaper hours saves: a made-up world of regions, prices and jobs, and the rule at work in it.

Decides: the world, from a seed, and what happens in it hour by hour. Must not: decide when a job runs
(``core.energy_timing`` does). Called by: ``bench``, ``tests``.

The world: regions with a fleet that is half as large again at night as by day, a day's prices with two peaks and a dip
where there is sun, and jobs with 2 to 24 hours to spare, half of them bound to one region.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from motorpool.core.energy_timing import (
    MILLION,
    NO_PRICE,
    Cells,
    Work,
    asap_cost,
    bid_of,
    gathered,
    kept_free,
    may_run,
    prices,
)
from motorpool.sim.prices import DAY_SHAPE, SUN_DEPTH, SUN_FROM_H, SUN_TO_H

HOUR_MS: Final = 3_600_000
WH_PER_MILLION: Final = 250.0
FILLS_H: Final = 12.0
MEAN_MICRO_KWH: Final = 200_000


class Saving(msgspec.Struct, frozen=True, kw_only=True):
    """Energy cost of the same jobs in three ways, in millionths, and tokens that came late.

    ``lp_micro``: everything known beforehand, the least that is possible. ``rule_micro``: prices made anew each hour
    from the jobs that have come, and the rule.
    """

    load: float
    asap_micro: int
    lp_micro: int
    rule_micro: int
    tokens: int
    asap_late: int
    lp_late: int
    rule_late: int

    @property
    def lp_saving(self) -> float:
        """Part of the cost of a token that perfect knowledge would save."""
        return self._saving(self.lp_micro, self.lp_late)

    @property
    def rule_saving(self) -> float:
        """Part of the cost of a token that the rule saves."""
        return self._saving(self.rule_micro, self.rule_late)

    def _saving(self, micro: int, late: int) -> float:
        return 1.0 - micro / (self.tokens - late) / (self.asap_micro / (self.tokens - self.asap_late))


def measure(
    load: float, seed: int, *, regions: int = 8, hours: int = 48, jobs: int = 200, slack: float = 1.0
) -> Saving:
    """The saving at a load (work as a part of capacity); ``slack`` times the time that jobs have to spare."""
    cells, asked = world(load, seed, regions=regions, hours=hours, jobs=jobs, slack=slack)
    work = _possible(cells, asked)
    asap, asap_late = asap_cost(cells, work)
    best = prices(cells, gathered(work))
    rule, rule_late = by_rule(cells, work, load)
    return Saving(
        load=load,
        asap_micro=asap,
        lp_micro=best.cost_micro,
        rule_micro=rule,
        tokens=int(work.tokens.sum()),
        asap_late=asap_late,
        lp_late=int(best.late.sum()),
        rule_late=rule_late,
    )


def _possible(cells: Cells, work: Work) -> Work:
    """The part of the work that admission would let in: what nobody could do in time is left out."""
    tokens = work.tokens - prices(cells, work).late
    return msgspec.structs.replace(work, tokens=np.maximum(tokens, 0))


def world(
    load: float, seed: int, *, regions: int = 8, hours: int = 48, jobs: int = 200, slack: float = 1.0
) -> tuple[Cells, Work]:
    """Cells and work; the same for the same numbers."""
    draw = np.random.Generator(np.random.Philox(key=[seed, 7]))
    hour = np.arange(hours) % 24
    night = 1.0 + 0.2 * np.cos((hour - 2) * 2 * np.pi / 24)  # 1.2 at night, 0.8 in the afternoon
    size = draw.uniform(0.5, 1.5, regions)
    tokens = np.rint(size[:, None] * night * 1e9).astype(np.int64)
    sun = np.clip(np.sin(np.pi * (hour + 0.5 - SUN_FROM_H) / (SUN_TO_H - SUN_FROM_H)), 0.0, None)
    sun[(hour < SUN_FROM_H) | (hour >= SUN_TO_H)] = 0.0
    shape = np.array(DAY_SHAPE)[hour] - SUN_DEPTH * draw.uniform(0.2, 0.8, regions)[:, None] * sun
    shape += 1.0 - shape.mean(axis=1, keepdims=True)
    micro_kwh = MEAN_MICRO_KWH * draw.uniform(0.8, 1.2, regions)[:, None] * shape
    cells = Cells(tokens=tokens, cost=np.rint(micro_kwh * WH_PER_MILLION / 1000).astype(np.int64))
    eligible = np.vstack([np.eye(regions, dtype=bool), np.ones((1, regions), dtype=bool)])
    kind = np.where(draw.random(jobs) < 0.5, draw.choice(regions, jobs, p=size / size.sum()), regions)
    spare = np.clip(np.rint(draw.uniform(2, 24, jobs) * slack), 1, hours - 1).astype(np.int64)
    release = (draw.random(jobs) * (hours - spare)).astype(np.int64)
    wished = draw.exponential(1.0, jobs) * spare
    work = Work(
        eligible=eligible,
        kind=kind.astype(np.int64),
        tokens=np.rint(wished / wished.sum() * load * tokens.sum()).astype(np.int64),
        release=release,
        deadline=release + spare,
    )
    return cells, work


def by_rule(cells: Cells, work: Work, busy: float) -> tuple[int, int]:
    """Live through the hours: cost in millionths, and tokens that came late. Jobs are known once they have come.

    ``busy``: the usual load, which leaves room for jobs that will come.
    """
    left = work.tokens.astype(np.float64)
    order = np.lexsort((np.arange(len(left)), work.deadline))
    cost = 0.0
    for hour in range(cells.tokens.shape[1]):
        rows = order[(left[order] > 0.5) & (work.release[order] <= hour) & (hour < work.deadline[order])]
        if not len(rows):
            continue
        ahead = Cells(tokens=cells.tokens[:, hour:], cost=cells.cost[:, hour:])
        pi = prices(kept_free(ahead, busy, FILLS_H), gathered(_rest(work, left, rows, hour))).pi
        free = cells.tokens[:, hour].astype(np.float64)
        due, tokens_s = _due(ahead, work, left, rows, hour)
        for rush in (True, False):  # those whose time is short come first, then those that pay
            for n, j in enumerate(rows):
                eligible = work.eligible[work.kind[j]]
                bid = -NO_PRICE if rush else bid_of(pi, eligible, 0, int(work.deadline[j]) - hour)
                end_ms = int(work.deadline[j] - hour) * HOUR_MS
                for k in sorted(np.flatnonzero(eligible), key=lambda place: (pi[place, 0], place)):
                    # The next look is at the end of this hour: whoever would be too late then has to start now.
                    rate = float(tokens_s[n]) if rush else 1e15
                    take = min(left[j], free[k])
                    if take > 0 and may_run(HOUR_MS, end_ms, int(due[n]), rate, bid, int(pi[k, 0])):
                        left[j] -= take
                        free[k] -= take
                        cost += float(take) * int(cells.cost[k, hour]) / MILLION
    return round(cost), int(left.sum())


def _due(ahead: Cells, work: Work, left: Any, rows: Any, hour: int) -> tuple[Any, Any]:
    """For each job: what is due no later on its classes (others count by the part of theirs that is shared), and the
    capacity of its classes up to its deadline in tokens a second.
    """
    size = ahead.tokens.sum(axis=1)
    of_kind = work.eligible.astype(np.float64)
    whole = np.maximum(of_kind @ size, 1.0)
    shared = (of_kind * size) @ of_kind.T / whole  # [mine, theirs]: part of their capacity that is also mine
    no_later = work.deadline[rows][None, :] <= work.deadline[rows][:, None]
    due = (no_later * shared[work.kind[rows]][:, work.kind[rows]]) @ left[rows]
    span = work.deadline[rows] - hour
    up_to = np.concatenate([np.zeros((len(size), 1)), np.cumsum(ahead.tokens, axis=1)], axis=1)
    reach = np.einsum("jk,kj->j", of_kind[work.kind[rows]], up_to[:, np.minimum(span, ahead.tokens.shape[1])])
    return due, reach / (span * 3600.0)


def _rest(work: Work, left: Any, rows: Any, hour: int) -> Work:
    """What has come and is not done, in hours from now."""
    return Work(
        eligible=work.eligible,
        kind=work.kind[rows],
        tokens=np.rint(left[rows]).astype(np.int64),
        release=np.zeros(len(rows), dtype=np.int64),
        deadline=work.deadline[rows] - hour,
    )
