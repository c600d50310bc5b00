"""Made-up people, for those who have no recordings: stays at chargers that agree with published figures.

Decides: when made-up users plug in and out. Must not: read files, or know of work.
Called by: ``sim.world`` by way of the command line, when no sessions are named.

The figures are those of the stays of 97 users of garages in Norway (Sørensen et al. 2021) and of a work place (ACN):
the rate of being unplugged by hour of the day, the share of plug-ins by hour, stays a week, their length, and how
regular a user's mornings are. Home: a user may plug in some times a day, drawn by hour; where the car is plugged in
already, nothing happens. It leaves by the rate of the hour. From 04:00 on the draw is mixed with the user's own place
in the distribution of that morning, which makes users regular without changing when all of them together leave.
Shared chargers and work places have log-normal lengths; at work most are gone by the evening.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final

import numpy as np

from motorpool.core.departures import DAY_MS, EPOCH_WEEKDAY, HOUR_MS
from motorpool.core.departures_fleet import NORWAY_HOME
from motorpool.sim.people import HOME, SHARED, WORK, People, Stay, join, learn

SOURCE: Final = "built-in generator, fitted to figures of Sørensen et al. 2021 and ACN"
USERS: Final = (60, 24, 40)  # home, shared, work
WEEKS: Final = 20
# Published: departures an hour while plugged in, by hour of the day, at private chargers.
HOME_HAZARD: Final = (
    0.006, 0.004, 0.001, 0.001, 0.003, 0.002, 0.095, 0.363, 0.164, 0.129, 0.150, 0.185,
    0.158, 0.141, 0.144, 0.128, 0.127, 0.164, 0.122, 0.078, 0.055, 0.047, 0.023, 0.013,
)  # fmt: skip
# How often people try to plug in by hour. Fitted so that the plug-ins that come of it have the published shares.
HOME_TRIES: Final = (
    0.015, 0.008, 0.005, 0.002, 0.001, 0.003, 0.006, 0.009, 0.010, 0.010, 0.014, 0.018,
    0.021, 0.028, 0.046, 0.093, 0.148, 0.102, 0.100, 0.106, 0.108, 0.072, 0.049, 0.025,
)  # fmt: skip
WORK_TRIES: Final = (
    0, 0, 0, 0, 0, 0.01, 0.04, 0.14, 0.18, 0.12, 0.09, 0.08,
    0.08, 0.08, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01, 0, 0, 0, 0,
)  # fmt: skip
# Departures an hour from a work place in the evening, beside the end of what was meant to be.
WORK_EVENING: Final = {17: 0.73, 18: 0.5, 19: 0.4, 20: 0.5, 21: 0.86, 22: 0.86, 23: 0.86}
MORNING_H: Final = 4
HOME_WEEKLY: Final = (3.75, 0.68)  # median and sigma of the stays a week: a tenth below 1.5, a tenth above 8.6
SHARED_WEEKLY: Final = (1.5, 0.6)
WORK_WEEKLY: Final = (1.9, 0.6)
ROUTINE: Final = 0.75  # mornings that follow the user's own time
SPREAD: Final = (0.02, 0.18)  # how far from it, as a part of all departures of a morning, least and most over users
EVEN: Final = (0.7548776662466927, 0.5698402909980532)  # steps of the R2 sequence
# The busiest quarter of an hour begins at 07:15: parts of that hour's departures by quarter.
BUSY_H: Final = 7
BUSY_QUARTERS: Final = (0.22, 0.31, 0.26, 0.21)
MIN_STAY_MS: Final = 10 * 60_000


def people(seed: int = 0, users: tuple[int, int, int] = USERS, weeks: int = WEEKS) -> People:
    """Made-up people of all kinds (home, shared, work), whose vehicles have learnt their weeks.

    The same seed gives the same people.
    """
    makers = (home, shared, work)
    parts = [
        learn({f"{kind}-{user:04}": makers[kind](seed, user, weeks) for user in range(users[kind])}, kind, SOURCE)
        for kind in (HOME, SHARED, WORK)
        if users[kind]
    ]
    return join(parts, SOURCE)


def home(seed: int, user: int, weeks: int) -> list[Stay]:
    """One user of a private charger, from a Monday on."""
    draw = _generator(seed, HOME, user)
    often, place = _even(seed, HOME, user)
    weekly = HOME_WEEKLY[0] * math.exp(HOME_WEEKLY[1] * often)
    spread = SPREAD[0] + (SPREAD[1] - SPREAD[0]) * draw.random()
    stays: list[Stay] = []
    for begin_ms in _tries(draw, _tries_a_day(weekly), HOME_TRIES, weeks, weekend=1.0):
        if not stays or begin_ms > stays[-1].end_ms + MIN_STAY_MS:
            end_ms = _home_end(draw, begin_ms, place, spread)
            if end_ms - begin_ms >= MIN_STAY_MS:
                stays.append(Stay(begin_ms, end_ms))
    return stays


def shared(seed: int, user: int, weeks: int) -> list[Stay]:
    """One user of a shared charger: 4 h at the median, 0.9 to 17 h for nine of ten."""
    draw = _generator(seed, SHARED, user)
    weekly = SHARED_WEEKLY[0] * math.exp(SHARED_WEEKLY[1] * _even(seed, SHARED, user)[0])
    stays: list[Stay] = []
    for begin_ms in _tries(draw, weekly / 7, HOME_TRIES, weeks, weekend=1.0):
        hours = min(4.2 * math.exp(0.92 * draw.standard_normal()), 72.0)
        _add(stays, begin_ms, begin_ms + int(hours * HOUR_MS))
    return stays


def work(seed: int, user: int, weeks: int) -> list[Stay]:
    """One user of a work place: mostly 1 to 2 h, sometimes the whole day."""
    draw = _generator(seed, WORK, user)
    weekly = WORK_WEEKLY[0] * math.exp(WORK_WEEKLY[1] * _even(seed, WORK, user)[0])
    stays: list[Stay] = []
    for begin_ms in _tries(draw, weekly / 5, WORK_TRIES, weeks, weekend=0.1):
        long = draw.random() < 0.24
        median_h, sigma = (8.5, 0.3) if long else (1.35, 0.85)
        hours = median_h * math.exp(sigma * draw.standard_normal())
        _add(stays, begin_ms, _before_evening(draw, begin_ms, begin_ms + int(hours * HOUR_MS)))
    return stays


def _generator(seed: int, kind: int, user: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, kind << 32 | user]))


def _even(seed: int, kind: int, user: int) -> tuple[float, float]:
    """A normal and a uniform number for each user, spread evenly over users, so that a few of them stand for all."""
    first, second = _generator(seed, kind, (1 << 32) - 1).random(2)
    often = (first + user * EVEN[0]) % 1.0
    return NormalDist().inv_cdf(min(max(often, 0.001), 0.999)), (second + user * EVEN[1]) % 1.0


def _add(stays: list[Stay], begin_ms: int, end_ms: int) -> None:
    if end_ms - begin_ms >= MIN_STAY_MS and (not stays or begin_ms > stays[-1].end_ms + MIN_STAY_MS):
        stays.append(Stay(begin_ms, end_ms))


def _tries_a_day(weekly: float) -> float:
    """How often a day a user must try to plug in, to come to so many stays a week: many find the plug in already."""
    return weekly / 7 * (1.0 + 0.06 * weekly + 0.012 * weekly * weekly)


def _tries(
    draw: np.random.Generator, a_day: float, by_hour: tuple[float, ...], weeks: int, *, weekend: float
) -> list[int]:
    """Times of tries, in order. Day 0 is a Monday of local time (as the days since 1970 go)."""
    weights = np.array(by_hour) / sum(by_hour)
    monday_ms = (7 - EPOCH_WEEKDAY) * DAY_MS
    found: list[int] = []
    for day in range(7 * weeks):
        count = int(draw.poisson(a_day * (weekend if day % 7 >= 5 else 1.0)))
        hours = draw.choice(24, size=count, p=weights) + draw.random(count)
        found += sorted(monday_ms + day * DAY_MS + int(hour * HOUR_MS) for hour in hours)
    return found


def _weekday(at_ms: int) -> int:
    return (at_ms // DAY_MS + EPOCH_WEEKDAY) % 7


def _kind_of_day() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The published rates for weekdays and weekends: split as those of the fleet that the product ships."""
    rates = np.array(NORWAY_HOME.hazard_per_h).reshape(7, 24)
    both = rates.mean(axis=0)
    halves = (rates[:5].mean(axis=0) / both, rates[5:].mean(axis=0) / both)
    found = [tuple(float(value) for value in np.array(HOME_HAZARD) * half) for half in halves]
    return found[0], found[1]


WEEKDAY_HAZARD, WEEKEND_HAZARD = _kind_of_day()


def _rate(at_ms: int) -> float:
    hour = at_ms % DAY_MS // HOUR_MS
    return WEEKEND_HAZARD[hour] if _weekday(at_ms) >= 5 else WEEKDAY_HAZARD[hour]


def _home_end(draw: np.random.Generator, begin_ms: int, place: float, spread: float) -> int:
    """When it is unplugged: by the rates of the hours, from each 04:00 on by the user's place among all departures."""
    left = draw.exponential()
    at_ms = begin_ms
    while True:
        hour = at_ms % DAY_MS // HOUR_MS
        if hour == MORNING_H and at_ms % HOUR_MS == 0:
            stays_on = math.exp(-sum(WEEKEND_HAZARD if _weekday(at_ms) >= 5 else WEEKDAY_HAZARD))
            chosen = draw.random()
            if draw.random() >= stays_on:
                if draw.random() < ROUTINE:
                    chosen = (place + spread * draw.standard_normal()) % 1.0
                left = -math.log1p(-chosen * (1.0 - stays_on))
            else:
                left = math.inf
        end_ms = at_ms - at_ms % HOUR_MS + HOUR_MS
        hazard = _rate(at_ms) * (end_ms - at_ms) / HOUR_MS
        if left < hazard:
            return at_ms + int(_within(hour, left / hazard) * (end_ms - at_ms))
        left -= hazard
        at_ms = end_ms


def _within(hour: int, part: float) -> float:
    """Where in an hour a departure is that has ``part`` of the hour's departures before it."""
    if hour != BUSY_H:
        return part
    before = 0.0
    for quarter, share in enumerate(BUSY_QUARTERS):
        if part < before + share:
            return (quarter + (part - before) / share) / len(BUSY_QUARTERS)
        before += share
    return 1.0


def _before_evening(draw: np.random.Generator, begin_ms: int, end_ms: int) -> int:
    """The meant end, or an earlier one: at work places most are gone by the evening."""
    at_ms = begin_ms
    left = draw.exponential()
    while at_ms < end_ms:
        next_ms = min(end_ms, at_ms - at_ms % HOUR_MS + HOUR_MS)
        hazard = WORK_EVENING.get(at_ms % DAY_MS // HOUR_MS, 0.0) * (next_ms - at_ms) / HOUR_MS
        if left < hazard:
            return at_ms + int(left / hazard * (next_ms - at_ms))
        left -= hazard
        at_ms = next_ms
    return end_ms
