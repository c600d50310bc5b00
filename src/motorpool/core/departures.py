"""When the car will probably leave: what it has learnt of its own week, and the little of it that leaves the car.

Decides: the hazard of being unplugged in each hour of the week, how long the car stays with 90 % probability, and the
risk of the next 15 minutes. Must not: read a clock, keep or say where the car is, or what it did between two stays.
Called by: ``agent.forecast``; ``tools/departures_check.py`` replays real sessions through it.

Theory. Being unplugged is a Poisson process whose rate follows the clock far more than the time since plugging in. The
fleet's rate for the 168 hours of a week is a table; each vehicle multiplies it by its own factor for 48 bins (weekday
or weekend, hour of the day). With k departures seen in a bin, and E that the fleet's rate leads one to expect in the
hours that were watched, the factor is (k + kappa mu) / (E + kappa), a Gamma-Poisson mean, where mu = (K + 3) / (E_total
+ 3) is the vehicle's mean factor. k and E are first mixed with their neighbours of one hour, and both fade with a half-
life, so that a new habit replaces an old one. The probability of staying for w is S(w) = exp(-H(w)), where H is the
rate cumulated over [now, now + w].

The bound is the longest w with H(w) <= theta. If the rates were exact, theta would be -ln 0.9; they are not, so theta
is calibrated (split conformal): every hour while plugged sets a mark, and when the car leaves, H from each mark to the
departure is a score. theta is the 10 % quantile of the newest scores of this vehicle together with a fixed number that
stand for the fleet, so that a new vehicle uses the fleet's.

A silence of the signals ends what was open without a departure: the time that was watched counts, the rest does not. If
the car was plugged before a silence of some hours and is not after it, the departure is shared among these hours.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Iterable
from typing import Final, Protocol

import msgspec

from motorpool.core.signals import Signals, value_of

MINUTE_MS: Final = 60_000
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
WEEK_HOURS: Final = 168
BINS: Final = 48
HORIZON_MS: Final = DAY_MS  # nothing is said about times beyond
RISK_MS: Final = 15 * MINUTE_MS
ROUND_MS: Final = 5 * MINUTE_MS
STEP_MS: Final = MINUTE_MS  # the shortest time that is worth adding up
MAX_GAP_MS: Final = 30 * MINUTE_MS  # a longer silence is not watching
MAX_SPREAD_MS: Final = 12 * HOUR_MS  # a departure in a longer silence teaches nothing
MIN_SESSION_MS: Final = 5 * MINUTE_MS  # a shorter one is a plug that is being put right, not a stay
GRACE_MS: Final = 30 * MINUTE_MS  # so long after a stated departure the car is still taken to be about to leave
HALF_LIFE_MS: Final = 8 * 7 * DAY_MS
KAPPA: Final = 1.0
PRIOR: Final = 3.0
SIDE: Final = 0.5  # weight of the neighbouring hours
WINDOW: Final = 256  # scores that a vehicle keeps
MARKS: Final = 48  # open marks of one stay, the newest
MAX_SILENCE_MS: Final = 3 * MINUTE_MS  # after it nothing is foretold
MAX_FADE_MS: Final = 4 * 7 * DAY_MS  # at once: a clock that jumps ahead does not wipe out what was learnt
MAX_UTC_OFFSET_MIN: Final = 14 * 60
EPOCH_WEEKDAY: Final = 3  # 1970-01-01 was a Thursday
KEPT_VERSION: Final = 1
MAX_KEPT_BYTES: Final = 4096  # far more than what ``dump`` makes
# Numbers are kept as 16 bits on a logarithmic scale: steps of 0.035 %, so that writing and reading often loses nothing.
SCALE_LOW: Final = 1e-6
SCALE_HIGH: Final = 1e4
SCALE_STEP: Final = math.log(SCALE_HIGH / SCALE_LOW) / 65_534


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """What a vehicle that knows nothing of itself goes by: rates by hour of the week (Monday 0 h first) and more.

    ``age_factor`` multiplies the rate by the time since plugging in, ``age_from_h`` is where each of them begins.
    ``scores`` are evenly spaced quantiles of the fleet's scores: they stand in for a vehicle's own.
    """

    hazard_per_h: tuple[float, ...]
    age_from_h: tuple[float, ...] = (0.0,)
    age_factor: tuple[float, ...] = (1.0,)
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.hazard_per_h) == WEEK_HOURS
        assert len(self.age_factor) == len(self.age_from_h) >= 1
        assert self.age_from_h[0] == 0.0
        assert list(self.scores) == sorted(self.scores)
        assert all(rate > 0 for rate in (*self.hazard_per_h, *self.age_factor, *self.scores))


class Outlook(msgspec.Struct, frozen=True, kw_only=True):
    """All that leaves the car of what it knows about its owner's habits, and coarse on purpose.

    ``stay_bound_ms``: with 90 % probability it stays plugged at least so long, rounded down to 5 minutes and at most
    24 hours; None when it is not plugged. ``risk_15min``: probability that it is gone within 15 minutes, to 0.01; 1
    when it is not plugged.
    """

    stay_bound_ms: int | None
    risk_15min: float


AWAY: Final = Outlook(stay_bound_ms=None, risk_15min=1.0)


class Kept(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """What is kept of a vehicle's habits in the car, and nowhere else: about a kilobyte."""

    version: int
    at_ms: int | None
    faded_ms: int | None
    plugged_ms: int | None
    departures: bytes
    expected: bytes
    scores: bytes
    cumulated: bytes
    marks: bytes
    next_mark_ms: int


class WeeklyTime(Protocol):
    """A time of day on some days of the week at which the owner wants the car."""

    @property
    def weekdays(self) -> int:
        """Bits: Monday 1, Tuesday 2, and so on to Sunday 64."""

    @property
    def minute(self) -> int:
        """Minutes since midnight, local time."""


def hour_of_week(now_ms: int, utc_offset_min: int) -> int:
    """0 to 167 in local time; 0 is Monday from midnight to one."""
    hours = (now_ms + utc_offset_min * MINUTE_MS) // HOUR_MS
    return (hours + EPOCH_WEEKDAY * 24) % WEEK_HOURS


def bin_of(hour: int) -> int:
    """The bin of an hour of the week: 0 to 23 on weekdays, 24 to 47 on weekends."""
    return hour % 24 + (24 if hour >= 5 * 24 else 0)


def next_weekly_ms(times: Iterable[WeeklyTime], now_ms: int, utc_offset_min: int) -> int | None:
    """The next of the owner's weekly times, or None without any. One that has just passed is next week's."""
    local_ms = now_ms + utc_offset_min * MINUTE_MS
    midnight_ms = local_ms - local_ms % DAY_MS
    today = (local_ms // DAY_MS + EPOCH_WEEKDAY) % 7
    best: int | None = None
    for time in times:
        for ahead in range(8):
            if not time.weekdays >> (today + ahead) % 7 & 1:
                continue
            at_ms = midnight_ms + ahead * DAY_MS + time.minute * MINUTE_MS
            if at_ms > local_ms:
                best = at_ms if best is None else min(best, at_ms)
                break
    return None if best is None else best - utc_offset_min * MINUTE_MS


def latest_stay_ms(stated_ms: Iterable[int], now_ms: int) -> int | None:
    """How long the car stays at most by what it was told; None if nothing that still counts was said.

    A stated time that has just passed counts as "any moment"; one that passed long ago was not kept and says nothing.
    """
    left = [at_ms - now_ms for at_ms in stated_ms if at_ms > now_ms - GRACE_MS]
    return max(0, min(left)) if left else None


def stands_plugged(signals: Signals, now_ms: int) -> bool | None:
    """Whether the car stands with its cable in, by readings that are young; None when they do not say."""
    cable = value_of("cable_connected", signals.cable_connected, now_ms)
    park = value_of("gear_is_park", signals.gear_is_park, now_ms)
    speed_kmh = value_of("speed_kmh", signals.speed_kmh, now_ms)
    moves = park is False or (speed_kmh is not None and abs(speed_kmh) > 0.0)
    if cable is False or moves:
        return False
    stands = park is True or speed_kmh == 0.0
    return True if cable is True and stands else None


class Habits:
    """The vehicle's own week. ``advance`` tells it what is so now, in order of time; ``outlook`` asks.

    Not thread-safe; bounded in size whatever happens.
    """

    def __init__(self, fleet: Fleet, *, use_age: bool = False, window: int = WINDOW) -> None:
        self._fleet = fleet
        self._use_age = use_age
        self._k = [0.0] * BINS
        self._e = [0.0] * BINS
        self._scores: deque[float] = deque(maxlen=window)
        self._at_ms: int | None = None  # up to when everything is counted
        self._faded_ms: int | None = None
        self._plugged_ms: int | None = None  # since when, None: it was not plugged at ``_at_ms``
        self._cumulated = 0.0  # H since it was plugged in, under the rates of the time
        self._marks: deque[float] = deque(maxlen=MARKS)
        self._next_mark_ms = 0
        self._rates: list[float] | None = None  # of 168 hours, made anew when the counts have changed
        self._theta: float | None = None

    @property
    def scores(self) -> tuple[float, ...]:
        """The newest scores of this vehicle, oldest first."""
        return tuple(self._scores)

    # -- what is learnt ------------------------------------------------------------------------------------------------

    def advance(self, plugged: bool | None, now_ms: int, utc_offset_min: int) -> bool:
        """Note whether the car stands plugged in (None: not known). Returns whether something worth keeping changed.

        Cheap to call often: less than a minute without a change is left for later. Time that goes back starts anew.
        """
        if plugged is None:
            return False
        offset_min = max(-MAX_UTC_OFFSET_MIN, min(MAX_UTC_OFFSET_MIN, utc_offset_min))
        if self._at_ms is None or now_ms < self._at_ms:
            self._begin(plugged, now_ms)
            return False
        was_plugged = self._plugged_ms is not None
        gap_ms = now_ms - self._at_ms
        if plugged == was_plugged and gap_ms < STEP_MS:
            return False
        self._fade(now_ms)
        if gap_ms > MAX_GAP_MS:
            left_meanwhile = was_plugged and not plugged and gap_ms <= MAX_SPREAD_MS
            if left_meanwhile:
                self._spread(self._at_ms, now_ms, offset_min)
            self._begin(plugged, now_ms)
            return left_meanwhile
        left = False
        if was_plugged:
            self._watch(self._at_ms, now_ms, offset_min)
            if not plugged:
                left = self._depart(now_ms, offset_min)
        self._at_ms = now_ms
        if plugged != was_plugged:
            self._begin(plugged, now_ms)
        return left

    def _begin(self, plugged: bool, now_ms: int) -> None:
        """A stay, an absence, or watching again after a silence. What was open and did not end is left out."""
        self._at_ms = now_ms
        if self._faded_ms is None or now_ms < self._faded_ms:
            self._faded_ms = now_ms
        self._plugged_ms = now_ms if plugged else None
        self._cumulated = 0.0
        self._marks.clear()
        self._next_mark_ms = now_ms

    def _fade(self, now_ms: int) -> None:
        assert self._faded_ms is not None
        passed_ms = now_ms - self._faded_ms
        if passed_ms < HOUR_MS:
            return
        factor = 0.5 ** (min(passed_ms, MAX_FADE_MS) / HALF_LIFE_MS)
        self._k = [value * factor for value in self._k]
        self._e = [value * factor for value in self._e]
        self._faded_ms = now_ms
        self._rates = None

    def _watch(self, from_ms: int, to_ms: int, offset_min: int) -> None:
        """Count time that the car stood plugged, hour by hour, and set a mark in each."""
        assert self._plugged_ms is not None
        rates = self._hourly_rates()
        at_ms = from_ms
        while at_ms < to_ms:
            if at_ms >= self._next_mark_ms:
                self._marks.append(self._cumulated)
                self._next_mark_ms = at_ms + HOUR_MS
            end_ms = min(to_ms, _hour_end(at_ms, offset_min), self._next_mark_ms)
            hours = (end_ms - at_ms) / HOUR_MS
            hour = hour_of_week(at_ms, offset_min)
            factor = self._age_factor(at_ms - self._plugged_ms)
            self._e[bin_of(hour)] += self._fleet.hazard_per_h[hour] * factor * hours
            self._cumulated += rates[hour] * factor * hours
            at_ms = end_ms

    def _depart(self, now_ms: int, offset_min: int) -> bool:
        assert self._plugged_ms is not None
        if now_ms - self._plugged_ms < MIN_SESSION_MS:
            return False
        self._k[bin_of(hour_of_week(now_ms - 1, offset_min))] += 1.0
        self._scores.extend(self._cumulated - mark for mark in self._marks)
        self._rates = self._theta = None
        return True

    def _spread(self, from_ms: int, to_ms: int, offset_min: int) -> None:
        """The car left while nobody watched: share the departure, and the time before it, by the rates."""
        assert self._plugged_ms is not None
        rates = self._hourly_rates()
        pieces: list[tuple[int, float, float]] = []  # bin, probability that it left then, expectation of the fleet
        at_ms, survival = from_ms, 1.0
        while at_ms < to_ms:
            end_ms = min(to_ms, _hour_end(at_ms, offset_min))
            hours = (end_ms - at_ms) / HOUR_MS
            hour = hour_of_week(at_ms, offset_min)
            factor = self._age_factor(at_ms - self._plugged_ms)
            leaves = -math.expm1(-rates[hour] * factor * hours)
            pieces.append((bin_of(hour), survival * leaves, self._fleet.hazard_per_h[hour] * factor * hours))
            survival *= 1.0 - leaves
            at_ms = end_ms
        total = sum(left for _, left, _ in pieces)
        gone = 0.0
        for index, left, expected in pieces:
            share = left / total
            self._k[index] += share
            self._e[index] += expected * (1.0 - gone - share / 2)
            gone += share
        self._rates = None

    # -- what is kept --------------------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """All that was learnt, for the car's own disk."""
        return msgspec.msgpack.encode(
            Kept(
                version=KEPT_VERSION,
                at_ms=self._at_ms,
                faded_ms=self._faded_ms,
                plugged_ms=self._plugged_ms,
                departures=_packed(self._k),
                expected=_packed(self._e),
                scores=_packed(self._scores),
                cumulated=_packed([self._cumulated]),
                marks=_packed(self._marks),
                next_mark_ms=self._next_mark_ms,
            )
        )

    @classmethod
    def load(cls, fleet: Fleet, data: bytes, *, use_age: bool = False) -> Habits | None:
        """What ``dump`` wrote; None for anything else, which is then nothing learnt."""
        if len(data) > MAX_KEPT_BYTES:
            return None
        try:
            kept = msgspec.msgpack.decode(data, type=Kept)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        habits = cls(fleet, use_age=use_age)
        k, e, scores = _unpacked(kept.departures), _unpacked(kept.expected), _unpacked(kept.scores)
        cumulated, marks = _unpacked(kept.cumulated), _unpacked(kept.marks)
        times = (kept.at_ms, kept.faded_ms)
        if (
            kept.version != KEPT_VERSION
            or not len(k) == len(e) == BINS
            or len(scores) > WINDOW
            or len(cumulated) != 1
            or len(marks) > MARKS
            or (None in times and (times != (None, None) or kept.plugged_ms is not None))
        ):
            return None
        habits._k, habits._e, habits._cumulated = k, e, cumulated[0]
        habits._scores.extend(scores)
        habits._marks.extend(min(mark, cumulated[0]) for mark in marks)
        habits._at_ms, habits._faded_ms, habits._plugged_ms = kept.at_ms, kept.faded_ms, kept.plugged_ms
        habits._next_mark_ms = kept.next_mark_ms
        if kept.plugged_ms is not None and kept.at_ms is not None and kept.plugged_ms > kept.at_ms:
            return None
        return habits

    # -- what is foretold ----------------------------------------------------------------------------------------------

    def outlook(self, now_ms: int, utc_offset_min: int, latest_ms: int | None = None) -> Outlook:
        """What may be told to the outside now. ``latest_ms``: how long it stays at most by what the car was told."""
        if self._plugged_ms is None or self._at_ms is None or now_ms - self._at_ms > MAX_SILENCE_MS:
            return AWAY
        bound_ms = self.bound_ms(now_ms, utc_offset_min)
        risk = self.risk(now_ms, utc_offset_min, RISK_MS)
        if latest_ms is not None:
            bound_ms = max(0, min(bound_ms, latest_ms))
            if latest_ms <= RISK_MS:
                risk = 1.0
        return Outlook(stay_bound_ms=bound_ms - bound_ms % ROUND_MS, risk_15min=round(risk, 2))

    def bound_ms(self, now_ms: int, utc_offset_min: int, q: float = 0.9) -> int:
        """The car stays plugged at least so long with probability ``q``, if it is plugged now; at most a day."""
        left = self.theta() if q == 0.9 else self._quantile(1.0 - q)
        rates = self._hourly_rates()
        at_ms, end_of_all_ms = now_ms, now_ms + HORIZON_MS
        age_ms = now_ms - (now_ms if self._plugged_ms is None else self._plugged_ms)
        while at_ms < end_of_all_ms:
            end_ms = min(end_of_all_ms, _hour_end(at_ms, utc_offset_min))
            rate = rates[hour_of_week(at_ms, utc_offset_min)] * self._age_factor(age_ms + at_ms - now_ms)
            hazard = rate * (end_ms - at_ms) / HOUR_MS
            if hazard >= left:
                return at_ms - now_ms + int(left / rate * HOUR_MS)
            left -= hazard
            at_ms = end_ms
        return HORIZON_MS

    def risk(self, now_ms: int, utc_offset_min: int, within_ms: int) -> float:
        """Probability that the car is unplugged within ``within_ms``, if it is plugged now."""
        rates = self._hourly_rates()
        at_ms, to_ms, hazard = now_ms, now_ms + within_ms, 0.0
        age_ms = now_ms - (now_ms if self._plugged_ms is None else self._plugged_ms)
        while at_ms < to_ms:
            end_ms = min(to_ms, _hour_end(at_ms, utc_offset_min))
            factor = self._age_factor(age_ms + at_ms - now_ms)
            hazard += rates[hour_of_week(at_ms, utc_offset_min)] * factor * (end_ms - at_ms) / HOUR_MS
            at_ms = end_ms
        return -math.expm1(-hazard)

    def theta(self) -> float:
        """The calibrated threshold on H for 90 %."""
        if self._theta is None:
            self._theta = self._quantile(0.1)
        return self._theta

    def _quantile(self, alpha: float) -> float:
        """The conformal lower quantile of the fleet's and the vehicle's scores: too few scores give the lowest."""
        scores = sorted((*self._fleet.scores, *self._scores))
        return scores[max(0, math.floor(alpha * (len(scores) + 1)) - 1)]

    def _age_factor(self, age_ms: int) -> float:
        if not self._use_age:
            return 1.0
        fleet, chosen = self._fleet, 1.0
        for begin_h, factor in zip(fleet.age_from_h, fleet.age_factor, strict=True):
            if age_ms < begin_h * HOUR_MS:
                break
            chosen = factor
        return chosen

    def _hourly_rates(self) -> list[float]:
        if self._rates is None:
            mu = (sum(self._k) + PRIOR) / (sum(self._e) + PRIOR)
            own = [(_mixed(self._k, index) + KAPPA * mu) / (_mixed(self._e, index) + KAPPA) for index in range(BINS)]
            self._rates = [rate * own[bin_of(hour)] for hour, rate in enumerate(self._fleet.hazard_per_h)]
        return self._rates


def _mixed(values: list[float], index: int) -> float:
    """A bin with its neighbours of the same kind of day."""
    base = index - index % 24
    before, after = base + (index - 1) % 24, base + (index + 1) % 24
    return values[index] + SIDE * (values[before] + values[after])


def _hour_end(at_ms: int, offset_min: int) -> int:
    """When the local clock hour of ``at_ms`` ends."""
    local_ms = at_ms + offset_min * MINUTE_MS
    return at_ms + HOUR_MS - local_ms % HOUR_MS


def _packed(values: Iterable[float]) -> bytes:
    codes = [
        0 if value < SCALE_LOW else 1 + min(65_534, round(math.log(value / SCALE_LOW) / SCALE_STEP)) for value in values
    ]
    return struct.pack(f"<{len(codes)}H", *codes)


def _unpacked(data: bytes) -> list[float]:
    """The numbers; an odd byte at the end makes no number."""
    codes = struct.unpack(f"<{len(data) // 2}H", data[: len(data) // 2 * 2])
    return [0.0 if code == 0 else SCALE_LOW * math.exp((code - 1) * SCALE_STEP) for code in codes]
