"""Fits what a vehicle goes by before it knows its own week: ``src/motorpool/core/departures_fleet.py``.

Usage: ``python tools/fleet_prior.py --sessions FILE`` writes the table; with ``--check`` it exits with 1 if the table
is not what the sessions give. FILE is ``Dataset1_charging_reports.csv`` of Sørensen et al. (2024), whose clock times
are local. Private chargers only: places that several users share (``Share`` in the name) are left out.
"""

from __future__ import annotations

import argparse
import calendar
import csv
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from motorpool.core.departures import HOUR_MS, WEEK_HOURS, Fleet, Habits, bin_of, hour_of_week

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "motorpool" / "core" / "departures_fleet.py"
AGE_FROM_H: Final = (0.0, 1.0, 2.0, 4.0, 8.0, 12.0, 18.0, 24.0, 36.0, 60.0)
STEP_MS: Final = 15 * 60_000
SHRINK: Final = 5.0  # departures that the mean of weekdays or of weekends counts for in one hour of the week
SCORES: Final = 49
ROUNDS: Final = 4

Stay = tuple[int, int]  # plugged in, plugged out; local time in milliseconds
Stays = dict[str, list[Stay]]

HEAD = '''\
"""The fleet's rates of being unplugged, which a vehicle starts from. Written by ``tools/fleet_prior.py``: do not edit.

Fitted to {stays:,} stays of {users} users at private home chargers in Norway, 2018 to 2021. Source: Å. L. Sørensen et
al., Data in Brief 57 (2024) 110883, Zenodo 10.5281/zenodo.13896176, licence CC BY 4.0. The sessions were changed into
the averages below; none of them is in here.
"""

from __future__ import annotations

from typing import Final

from motorpool.core.departures import Fleet

# fmt: off
'''


def load_stays(path: Path, *, shared: bool = False) -> Stays:
    """The stays of each user in order of time, those of private chargers or those of shared ones."""
    stays: Stays = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter=";"):
            begin, end = row["plugin_time"], row["plugout_time"]
            if "NA" in {begin, end} or ("_Share" in row["user_id"]) != shared:
                continue
            stays.setdefault(row["user_id"], []).append((_local_ms(begin), _local_ms(end)))
    return {user: _apart(rows) for user, rows in sorted(stays.items())}


def _local_ms(text: str) -> int:
    return calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M:%S")) * 1000


def _apart(rows: list[Stay]) -> list[Stay]:
    """Without overlaps: a stay begins when the one before it has ended."""
    apart: list[Stay] = []
    for begin_ms, end_ms in sorted(rows):
        from_ms = max(begin_ms, apart[-1][1]) if apart else begin_ms
        if end_ms > from_ms:
            apart.append((from_ms, end_ms))
    return apart


def _counts(stays: Mapping[str, list[Stay]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hours plugged and departures by hour of the week and time since plugging in."""
    hours, left = np.zeros((WEEK_HOURS, len(AGE_FROM_H))), np.zeros((WEEK_HOURS, len(AGE_FROM_H)))
    edges_ms = [int(age_h * HOUR_MS) for age_h in AGE_FROM_H]
    for rows in stays.values():
        for begin_ms, end_ms in rows:
            cuts = {begin_ms + edge for edge in edges_ms} | set(
                range(begin_ms - begin_ms % HOUR_MS + HOUR_MS, end_ms, HOUR_MS)
            )
            at_ms = begin_ms
            for cut in sorted({cut for cut in cuts if begin_ms < cut < end_ms} | {end_ms}):
                age = int(np.searchsorted(edges_ms, at_ms - begin_ms, side="right")) - 1
                hours[hour_of_week(at_ms, 0), age] += (cut - at_ms) / HOUR_MS
                at_ms = cut
            age = int(np.searchsorted(edges_ms, end_ms - begin_ms, side="right")) - 1
            left[hour_of_week(end_ms - 1, 0), age] += 1
    return hours, left


def fit_rates(
    stays: Mapping[str, list[Stay]], *, use_age: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rates an hour for the hours of the week, and the factors by age that go with them (1 without ``use_age``)."""
    hours, left = _counts(stays)
    bins = np.array([bin_of(hour) for hour in range(WEEK_HOURS)])
    by_hour, factors = left.sum(axis=1), np.ones(len(AGE_FROM_H))
    rates = np.zeros(WEEK_HOURS)
    for _ in range(ROUNDS if use_age else 1):
        weighed = hours @ factors
        mean = by_hour.sum() / weighed.sum()
        of_bin = (np.bincount(bins, by_hour, 48) + 0.5) / (np.bincount(bins, weighed, 48) + 0.5 / mean)
        rates = (by_hour + SHRINK) / (weighed + SHRINK / of_bin[bins])
        if use_age:
            factors = (left.sum(axis=0) + SHRINK) / ((hours * rates[:, None]).sum(axis=0) + SHRINK)
    return rates, factors


def live_through(habits: Habits, begin_ms: int, end_ms: int) -> Iterator[int]:
    """Lets a vehicle live through one stay; gives each time at which it has been told that it still is plugged in."""
    habits.advance(False, begin_ms - 1, 0)
    habits.advance(True, begin_ms, 0)
    for at_ms in range(begin_ms + STEP_MS, end_ms, STEP_MS):
        habits.advance(True, at_ms, 0)
        yield at_ms
    habits.advance(False, end_ms, 0)


def fit_fleet(stays: Mapping[str, list[Stay]], *, use_age: bool = False, learn: bool = True) -> Fleet:
    """The table for a vehicle outside ``stays``: rates, and the scores of these vehicles as each learnt its week."""
    rates, factors = fit_rates(stays, use_age=use_age)
    draft = make_fleet(rates, factors, (0.1,))
    scores: list[float] = []
    for rows in stays.values():
        habits = Habits(draft, use_age=use_age, window=1 << 20)
        for begin_ms, end_ms in rows:
            if not learn:
                scores.extend(habits.scores)
                habits = Habits(draft, use_age=use_age)
            deque(live_through(habits, begin_ms, end_ms), maxlen=0)
        scores.extend(habits.scores)
    quantiles = np.quantile(scores, (np.arange(SCORES) + 0.5) / SCORES)
    return make_fleet(rates, factors, tuple(max(float(value), 1e-5) for value in quantiles))


def make_fleet(rates: NDArray[np.float64], factors: NDArray[np.float64], scores: tuple[float, ...]) -> Fleet:
    """A fleet of these numbers, as precise as the table in the tree."""
    return Fleet(
        hazard_per_h=tuple(float(f"{rate:.3g}") for rate in rates),
        age_from_h=AGE_FROM_H,
        age_factor=tuple(round(float(factor), 3) for factor in factors),
        scores=tuple(float(f"{score:.3g}") for score in scores),
    )


def _lines(values: tuple[float, ...]) -> str:
    rows = [values[start : start + 12] for start in range(0, len(values), 12)]
    return "".join("        " + ", ".join(f"{value:g}" for value in row) + ",\n" for row in rows)


def render(stays: Mapping[str, list[Stay]]) -> str:
    """The text of the module."""
    fleet = fit_fleet(stays)
    _, factors = fit_rates(stays, use_age=True)
    text = HEAD.format(stays=sum(map(len, stays.values())), users=len(stays))
    text += "NORWAY_HOME: Final = Fleet(\n    hazard_per_h=(\n" + _lines(fleet.hazard_per_h) + "    ),\n"
    text += "    age_from_h=(\n" + _lines(AGE_FROM_H) + "    ),\n"
    text += "    age_factor=(\n" + _lines(tuple(round(float(factor), 3) for factor in factors)) + "    ),\n"
    text += "    scores=(\n" + _lines(fleet.scores) + "    ),\n)\n# fmt: on\n"
    return text


def main() -> int:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = render(load_stays(arguments.sessions))
    if arguments.check:
        return 0 if TARGET.exists() and TARGET.read_text("utf-8") == text else 1
    TARGET.write_text(text, "utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
