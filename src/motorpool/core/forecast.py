"""How much a fleet will be able to do in the coming hours, class by class, and how sure that is.

Decides: for each class (the vehicles that serve one model in one region) the capacity of each hour of the next days, as
10 %, 50 % and 90 % bands. Must not: know vehicles. It learns from hourly sums alone, and what it holds does not grow.
Called by: ``core.admission`` and ``core.energy_timing`` take its bands; the control plane tells it each hour.

Theory. Vehicles do not leave one by one: at seven in the morning a fleet empties. So nothing here multiplies
probabilities of independent vehicles. What is forecast is the sum, and how wrong the forecast may be is read off how
wrong it has been at the same distance.

- The profile: the mean of each hour of the week over past weeks, relative to the level of its week, newer weeks first
  (half-life four weeks), times the level of the last seven days.
- What is known now: how far the last hour was off its profile fades over the coming hours at a rate that is learnt; and
  the vehicles that are here, each with its bound and risk, give what will still be here (``staying_tokens_s``): by how
  much that is off what it usually is at this hour of the week, times a factor that is learnt for each hour of the day
  (a bound says when a car may leave, not that it will). The two count by how well they did, so the first hours are
  decided by what is here and later ones by the profile.
- The bands: errors divided by the spread of their hour of the week are scores; quantiles of the last scores, and of a
  few wide ones that stand for all fleets, times the spread make the band (split conformal, by distance). The quantiles
  that are asked for move with what came out (adaptive conformal inference: a miss widens, a hit narrows a little), so
  that over time a tenth of the hours is below the 10 % band and a tenth above the 90 % band, whatever the fleet does.

Not known: public holidays, which look like a broken profile until the level and the last hour tell.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.core.departures import EPOCH_WEEKDAY, HOUR_MS, WEEK_HOURS
from motorpool.core.horizon import BOUND_HAZARD, CERTAIN, MINUTE_MS, RISK_MS

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

WEEKS: Final = 12  # that are kept
HALF_LIFE_WEEKS: Final = 4.0
AHEAD_H: Final = (1, 2, 3, 6, 12, 24, 48, 96, 168)  # distances at which forecasts are judged
STAYING_H: Final = 12  # for so many hours the vehicles that are here say something
SCORES: Final = 256  # kept for each distance
MIN_LEVEL_H: Final = 24
RATE: Final = 0.01  # how fast the asked-for quantiles move, slower the longer it takes to see what came of them
MAX_FACTOR: Final = 10.0
MAX_SCORE: Final = 20.0
RATE_HALF_H: Final = 12.0
STRIDE_H: Final = (1, 1, 1, 5, 5, 5, 5, 5, 5)  # a score each so many hours: far ones are alike for a long time
FADE: Final = 0.995  # of what is learnt each hour: half of it after six days
DAY_FADE: Final = 0.9  # the same, of what is learnt for one hour of the day
OUTSIDE: Final = 0.1  # wanted on each side
FLOOR: Final = 0.01  # of the level: the smallest spread
PRIOR_WEEKS: Final = 2.0  # weight of the spread that is taken before it is known
# Scores of a fleet that is not known yet: quantiles of a normal distribution, half as wide again.
PRIOR_SCORES: Final = tuple(
    1.5 * z for z in (-1.83, -1.28, -0.97, -0.73, -0.52, -0.34, -0.17, 0.0, 0.17, 0.34, 0.52, 0.73, 0.97, 1.28, 1.83)
)
KEPT_VERSION: Final = 1
# Columns: what comes after the class, the type, and what stands there at first.
_COLUMNS: Final[dict[str, tuple[tuple[int, ...], Any, float]]] = {
    "offset_h": ((), np.int32, 0),  # of local time from UTC
    "week_no": ((WEEKS,), np.int32, -1),
    "week_level": ((WEEKS,), np.float32, np.nan),
    "week": ((WEEKS, WEEK_HOURS), np.float32, np.nan),
    "recent": ((WEEK_HOURS,), np.float32, np.nan),  # the last 168 hours, by hour modulo 168
    "per_vehicle": ((), np.float64, np.nan),
    "off": ((), np.float64, np.nan),  # how far the last hour was off its profile
    "staying": ((STAYING_H, STAYING_H), np.float32, np.nan),  # by hour of origin modulo 12, and distance
    "usual": ((WEEK_HOURS, STAYING_H), np.float32, np.nan),  # the same as a part of what is here, by hour of the week
    "sum_xy": ((len(AHEAD_H),), np.float64, 0),
    "sum_xx": ((len(AHEAD_H),), np.float64, 0),
    "stay_xy": ((24, len(AHEAD_H)), np.float32, 0),
    "stay_xx": ((24, len(AHEAD_H)), np.float32, 0),
    "error_profile": ((24, len(AHEAD_H)), np.float32, np.nan),  # squared, by hour of the day: at night cars know more
    "error_staying": ((24, len(AHEAD_H)), np.float32, np.nan),
    "low_level": ((len(AHEAD_H),), np.float64, OUTSIDE),
    "high_level": ((len(AHEAD_H),), np.float64, OUTSIDE),
    "scores": ((len(AHEAD_H), SCORES), np.float32, np.nan),
    "scored": ((len(AHEAD_H),), np.int64, 0),
    # Forecasts that wait for their hour, by distance and hour modulo 168: band, middle, spread, profile and the rest.
    "told": ((len(AHEAD_H), WEEK_HOURS, 9), np.float32, np.nan),
}
_LOW, _HIGH, _MIDDLE, _SPREAD, _PROFILE, _OFF, _BY_PROFILE, _BY_STAYING, _STAY_OFF = range(9)


class Bands(msgspec.Struct, frozen=True, kw_only=True):
    """Capacity by class and hour, in tokens a second; column 0 is the hour that begins at ``start_ms``.

    In nine of ten hours there is more than ``low`` [classes, hours], in half more than ``middle``, in one of ten more
    than ``high``. Where ``known`` is false there is no history, and the numbers are 0. ``per_vehicle`` [classes] is
    what a ready vehicle gave last, so capacity divided by it is how many will be ready.
    """

    start_ms: int
    low: Floats
    middle: Floats
    high: Floats
    known: Bools
    per_vehicle: Floats


class _Kept(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    version: int
    classes: int
    last_hour: int
    told_for: bytes
    columns: dict[str, bytes]


class Forecast:
    """The forecast of a cell's classes. Less than 100 kB a class."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._last_hour = -1
        self._week: tuple[Floats, Floats] | None = None  # mean and spread of each hour of the week, made when needed
        self._mean: Floats | None = None  # of the last seven days
        self._told_for = np.full((len(AHEAD_H), WEEK_HOURS), -1, dtype=np.int64)
        self._c: dict[str, npt.NDArray[Any]] = {
            name: np.full((classes, *shape), first, dtype=kind) for name, (shape, kind, first) in _COLUMNS.items()
        }

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return self._classes

    def grow(self, classes: int) -> None:
        """There are more classes now; the new ones have no history."""
        assert classes >= self._classes
        fresh = Forecast(classes - self._classes)
        self._c = {name: np.concatenate([column, fresh._c[name]]) for name, column in self._c.items()}
        self._classes = classes
        self._week = self._mean = None

    def set_offset(self, class_no: int, offset_min: int) -> None:
        """Local time of a class, whose week its owners live by: minutes ahead of UTC. Parts of an hour are left out."""
        self._c["offset_h"][class_no] = offset_min // 60

    # -- what is learnt ------------------------------------------------------------------------------------------------

    def observe(
        self, hour: int, ready: npt.ArrayLike, tokens_s: npt.ArrayLike, staying: npt.ArrayLike | None = None
    ) -> None:
        """An hour is over: ``hour`` since 1970 (UTC), later than the one before.

        ``ready`` [classes]: how many vehicles were ready on average, ``tokens_s`` [classes]: what they can do together
        by their measured speeds. ``staying`` [classes, STAYING_H]: of that, what is expected to be still here in each
        of the coming hours, from ``staying_tokens_s``.
        """
        assert hour > self._last_hour, "hours come in order"
        y = np.asarray(tokens_s, dtype=np.float64)
        vehicles = np.asarray(ready, dtype=np.float64)
        assert y.shape == vehicles.shape == (self._classes,)
        c = self._c
        profile = self._profile([hour])
        self._forget(hour)
        self._judge(hour, y)
        slot = self._slot(hour)
        rows = np.arange(self._classes)
        c["week"][rows, slot, self._hour_of_week(hour)] = y
        c["recent"][:, hour % WEEK_HOURS] = y
        self._mean = None
        c["week_level"][rows, slot] = self._level()
        speed = np.where(vehicles > 0, y / np.maximum(vehicles, 1e-9), np.nan)
        known = c["per_vehicle"]
        c["per_vehicle"] = np.where(np.isnan(speed), known, np.where(np.isnan(known), speed, 0.9 * known + 0.1 * speed))
        c["off"] = y - profile[0][:, 0]
        here = np.full((self._classes, STAYING_H), np.nan) if staying is None else np.asarray(staying, dtype=np.float64)
        assert here.shape == (self._classes, STAYING_H)
        c["staying"][:, hour % STAYING_H] = here
        self._last_hour = hour
        self._week = None
        self._tell()
        self._get_used(hour, here, y)

    def _forget(self, hour: int) -> None:
        """Hours that nobody saw, and weeks that are over, leave no old numbers behind."""
        c = self._c
        missed = range(max(self._last_hour + 1, hour - WEEK_HOURS + 1), hour) if self._last_hour >= 0 else range(0)
        for each in missed:
            c["recent"][:, each % WEEK_HOURS] = np.nan
            c["staying"][:, each % STAYING_H] = np.nan
        if missed:
            self._mean = None
        slot, number = self._slot(hour), self._week_number(hour)
        stale = np.flatnonzero(c["week_no"][np.arange(self._classes), slot] != number)
        c["week"][stale, slot[stale]] = np.nan
        c["week_level"][stale, slot[stale]] = np.nan
        c["week_no"][stale, slot[stale]] = number[stale]

    def _judge(self, hour: int, y: Floats) -> None:
        """Compare what was told of this hour, at each distance, with what it became."""
        c = self._c
        place = hour % WEEK_HOURS
        told = c["told"][:, :, place].astype(np.float64)
        seen = (self._told_for[:, place] == hour) & ~np.isnan(told[:, :, _MIDDLE])
        value, scale = y[:, None], np.maximum(self._level(), 1e-9)[:, None]
        rate = RATE / (1.0 + np.array(AHEAD_H) / RATE_HALF_H)
        for name, miss in (("low_level", value < told[:, :, _LOW]), ("high_level", value > told[:, :, _HIGH])):
            moved = np.minimum(np.maximum(c[name] + rate * (OUTSIDE - miss), 0.002), 0.45)
            c[name] = np.where(seen, moved, c[name])
        rows, judged = np.nonzero(seen & (hour % np.array(STRIDE_H) == 0))
        # Of the forecast as it stood before its own correction, so that corrections do not feed themselves.
        score = (value - told[:, :, _MIDDLE]) / told[:, :, _SPREAD]
        at = c["scored"][rows, judged] % SCORES
        c["scores"][rows, judged, at] = np.clip(score[rows, judged], -MAX_SCORE, MAX_SCORE)
        c["scored"][rows, judged] += 1
        off = np.nan_to_num(told[:, :, _OFF]) / scale  # not known at first: then it teaches nothing
        rest = (value - told[:, :, _PROFILE]) / scale
        c["sum_xy"] = np.where(seen, FADE * c["sum_xy"] + off * rest, c["sum_xy"])
        c["sum_xx"] = np.where(seen, FADE * c["sum_xx"] + off * off, c["sum_xx"])
        every, clock = np.arange(self._classes), self._hour_of_week(hour) % 24
        stays = told[:, :, _STAY_OFF] / scale
        for name, product in (("stay_xy", stays * rest), ("stay_xx", stays * stays)):
            known = c[name][every, clock]
            c[name][every, clock] = np.where(seen & ~np.isnan(product), DAY_FADE * known + product, known)
        for name, part in (("error_profile", _BY_PROFILE), ("error_staying", _BY_STAYING)):
            error = ((value - told[:, :, part]) / scale) ** 2
            known = c[name][every, clock]
            smooth = np.where(np.isnan(known), error, DAY_FADE * known + (1 - DAY_FADE) * error)
            c[name][every, clock] = np.where(seen & ~np.isnan(error), smooth, known)

    def _get_used(self, hour: int, here: Floats, y: Floats) -> None:
        """What part of what is here usually stays, after each hour of the week."""
        c = self._c
        rows, at = np.arange(self._classes), self._hour_of_week(hour)
        share = np.where(y > 0, 1.0, np.nan)[:, None] * here / np.maximum(y, 1e-9)[:, None]
        known = c["usual"][rows, at]
        smooth = np.where(np.isnan(known), share, 0.8 * known + 0.2 * share)
        c["usual"][rows, at] = np.where(np.isnan(share), known, smooth)

    def _tell(self) -> None:
        """Keep what is now foretold for the distances that will be judged."""
        c = self._c
        targets = [self._last_hour + ahead for ahead in AHEAD_H]
        middle, spread, parts = self._points(targets)
        low, _, high = self._around(np.array(AHEAD_H), middle, spread)
        for d, target in enumerate(targets):
            place = target % WEEK_HOURS
            row = (low, high, middle, spread, parts[0], np.broadcast_to(c["off"][:, None], low.shape), *parts[1:])
            for number, values in enumerate(row):
                c["told"][:, d, place, number] = values[:, d]
            self._told_for[d, place] = target

    # -- what is foretold ----------------------------------------------------------------------------------------------

    def bands(self, now_ms: int, hours: int) -> Bands:
        """The hour that runs at ``now_ms`` and those after it, ``hours`` in all."""
        first = max(now_ms // HOUR_MS, self._last_hour + 1)
        targets = list(range(first, first + hours))
        middle, spread, _ = self._points(targets)
        known = ~np.isnan(middle)
        ahead = np.array(targets) - (self._last_hour if self._last_hour >= 0 else first - 1)
        bands = [np.where(known, np.maximum(band, 0.0), 0.0) for band in self._around(ahead, middle, spread)]
        low, centre, high = np.sort(np.stack(bands), axis=0)
        speed = np.nan_to_num(self._c["per_vehicle"])
        return Bands(start_ms=first * HOUR_MS, low=low, middle=centre, high=high, known=known, per_vehicle=speed)

    def _points(self, targets: list[int]) -> tuple[Floats, Floats, list[Floats]]:
        """Forecast and spread [classes, targets], uncorrected; the parts are those of ``told`` from the profile on."""
        c = self._c
        profile, spread = self._profile(targets)
        ahead = np.array(targets) - self._last_hour
        weight = c["sum_xy"] / (c["sum_xx"] + 1e-4)
        fades = _between(ahead, np.clip(weight, 0.0, 1.0))
        fades[:, ahead > AHEAD_H[-1]] = 0.0
        off = np.nan_to_num(c["off"])[:, None]
        by_profile = np.maximum(profile + fades * off, 0.0)
        rows = np.arange(self._classes)[:, None]
        clock = (self._local(0)[:, None] + np.array(targets)) % 24
        stay_off = np.full_like(profile, np.nan)
        near = np.flatnonzero((ahead >= 1) & (ahead <= STAYING_H))
        at = ahead[near] - 1
        present = c["recent"][:, self._last_hour % WEEK_HOURS, None]
        usual = present * c["usual"][rows, self._hour_of_week(self._last_hour)[:, None], at]
        stay_off[:, near] = c["staying"][:, self._last_hour % STAYING_H][:, at] - usual
        factor = _between(ahead, (c["stay_xy"] / (c["stay_xx"] + 1e-4))[rows, clock])
        by_staying = np.maximum(profile + np.clip(factor, 0.0, MAX_FACTOR) * stay_off, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            trust = 1.0 / _between(ahead, c["error_profile"][rows, clock] + 1e-6)
            other = 1.0 / _between(ahead, c["error_staying"][rows, clock] + 1e-6)
        other = np.where(np.isnan(by_staying) | np.isnan(other), 0.0, other)
        trust = np.where(np.isnan(trust), 1.0, trust)
        middle = (trust * by_profile + other * np.nan_to_num(by_staying)) / (trust + other)
        return middle, spread, [profile, by_profile, by_staying, stay_off]

    def _around(self, ahead: npt.NDArray[Any], middle: Floats, spread: Floats) -> tuple[Floats, Floats, Floats]:
        """The bands around a forecast [classes, distances], by the scores of the judged distances on both sides."""
        c = self._c
        prior = np.broadcast_to(np.array(PRIOR_SCORES), (*c["scored"].shape, len(PRIOR_SCORES)))
        ordered = np.sort(np.concatenate([c["scores"], prior], axis=2), axis=2)  # what is not there sorts to the end
        count = len(PRIOR_SCORES) + np.minimum(c["scored"], SCORES)
        levels = (c["low_level"], np.full_like(c["low_level"], 0.5), 1.0 - c["high_level"])
        bands = [middle + spread * _between(ahead, _quantile(ordered, count, level)) for level in levels]
        return bands[0], bands[1], bands[2]

    def _profile(self, targets: list[int]) -> tuple[Floats, Floats]:
        """Mean and spread of the hours' places in the week, at today's level [classes, targets]; NaN if unknown."""
        if self._week is None:
            self._week = self._weekly()
        mean, spread = self._week
        level = self._level()[:, None]
        places = (self._local(0)[:, None] + np.array(targets)) % WEEK_HOURS
        rows = np.arange(self._classes)[:, None]
        least = np.maximum(np.nan_to_num(self._c["per_vehicle"]) / 2, 1e-9)[:, None]  # half a vehicle
        return level * mean[rows, places], np.maximum(level * spread[rows, places], least)

    def _weekly(self) -> tuple[Floats, Floats]:
        """Mean and spread of each hour of the week relative to the level of its week [classes, 168].

        An hour that was never seen is taken from the other days of its kind (weekday, weekend). The spread takes the
        neighbouring hours in, and a guess while there are few weeks.
        """
        c = self._c
        ages = np.max(c["week_no"], axis=1, keepdims=True) - c["week_no"]
        weight = 0.5 ** (ages / HALF_LIFE_WEEKS)[:, :, None]
        share = c["week"] / np.maximum(c["week_level"], 1e-9)[:, :, None]
        seen = ~np.isnan(share)
        total = np.sum(weight * seen, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.sum(np.where(seen, weight * share, 0.0), axis=1) / total
            square = np.sum(np.where(seen, weight * (share - mean[:, None]) ** 2, 0.0), axis=1)
        mean = _from_other_days(mean)
        around = sum(np.roll(square, shift, axis=1) for shift in (-1, 0, 1))
        weeks = sum(np.roll(total, shift, axis=1) for shift in (-1, 0, 1))
        guess = (0.25 * np.nan_to_num(mean) + 0.05) ** 2
        # A mean of few weeks lies close to each of them: one week less counts.
        variance = (around + PRIOR_WEEKS * guess) / (np.maximum(weeks - 1.0, 0.0) + PRIOR_WEEKS)
        return mean, np.maximum(np.sqrt(variance), FLOOR)

    def _level(self) -> Floats:
        """The mean of the last seven days [classes]; NaN before a day of it is known."""
        if self._mean is None:
            self._mean = self._recent_mean()
        return self._mean

    def _recent_mean(self) -> Floats:
        recent = self._c["recent"]
        count = np.sum(~np.isnan(recent), axis=1)
        total = np.nansum(recent.astype(np.float64), axis=1)
        return np.where(count >= MIN_LEVEL_H, total / np.maximum(count, 1), np.nan)

    def _local(self, hour: int) -> npt.NDArray[np.int64]:
        """Hours since a Monday, in the local time of each class."""
        return hour + EPOCH_WEEKDAY * 24 + self._c["offset_h"].astype(np.int64)

    def _hour_of_week(self, hour: int) -> npt.NDArray[np.int64]:
        return self._local(hour) % WEEK_HOURS

    def _week_number(self, hour: int) -> npt.NDArray[np.int64]:
        return self._local(hour) // WEEK_HOURS

    def _slot(self, hour: int) -> npt.NDArray[np.int64]:
        return self._week_number(hour) % WEEKS

    # -- what is kept --------------------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """Everything, for a snapshot."""
        return msgspec.msgpack.encode(
            _Kept(
                version=KEPT_VERSION,
                classes=self._classes,
                last_hour=self._last_hour,
                told_for=self._told_for.tobytes(),
                columns={name: column.tobytes() for name, column in self._c.items()},
            )
        )

    @classmethod
    def load(cls, data: bytes) -> Forecast | None:
        """What ``dump`` wrote; None for anything else, which is then nothing learnt."""
        try:
            kept = msgspec.msgpack.decode(data, type=_Kept)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        if kept.version != KEPT_VERSION or kept.classes < 0 or set(kept.columns) != set(_COLUMNS):
            return None
        found = cls(kept.classes)
        found._last_hour = kept.last_hour
        columns = {**found._c, "told_for": found._told_for}
        for name, raw in {**kept.columns, "told_for": kept.told_for}.items():
            if len(raw) != columns[name].nbytes:
                return None
            columns[name][...] = np.frombuffer(raw, dtype=columns[name].dtype).reshape(columns[name].shape)
        return found


def staying_tokens_s(
    class_no: npt.ArrayLike, tokens_s: npt.ArrayLike, bound_ms: npt.ArrayLike, risk: npt.ArrayLike, classes: int
) -> Floats:
    """What of the vehicles that are here will still be here in each of the coming hours [classes, STAYING_H].

    Columns of equal length, a row for each ready vehicle: its class, its speed, and what it says of its stay. An hour
    counts as its middle. The hazard is that of ``core.horizon``.
    """
    classes_of = np.asarray(class_no, dtype=np.int64)
    speed = np.asarray(tokens_s, dtype=np.float64)
    corners = _lines_of(np.asarray(bound_ms, dtype=np.float64), np.asarray(risk, dtype=np.float64))
    found = np.zeros((classes, STAYING_H))
    for ahead in range(STAYING_H):
        stays = np.exp(-_hazard_on(corners, ahead * HOUR_MS + HOUR_MS / 2))
        found[:, ahead] = np.bincount(classes_of, weights=speed * stays, minlength=classes)
    return found


def _lines_of(bound_ms: Floats, risk: Floats) -> tuple[Floats, ...]:
    """``horizon.line_of`` of many vehicles at once."""
    with np.errstate(divide="ignore", invalid="ignore"):
        certain = np.where(risk < 1.0, np.minimum(-np.log1p(-risk), CERTAIN), CERTAIN)
    soon = np.where(risk <= 0.0, 0.0, certain)
    bound = np.maximum(bound_ms, float(MINUTE_MS))
    mean = BOUND_HAZARD / bound
    at = np.full_like(bound, float(RISK_MS))
    later = (bound > at) & (soon < BOUND_HAZARD)
    sooner = (bound < at) & (soon > mean * at)
    one = np.maximum(soon / at, mean)
    gap = np.where(bound == at, 1.0, bound - at)
    first_ms = np.where(sooner, bound, at)
    first = np.where(later, soon, np.where(sooner, BOUND_HAZARD, one * at))
    second_ms = np.where(later, bound, at)
    second = np.where(later, BOUND_HAZARD, np.where(sooner, soon, one * at))
    after = np.maximum((BOUND_HAZARD - soon) / gap, mean)
    slope = np.where(later, after, np.where(sooner, (soon - BOUND_HAZARD) / -gap, one))
    return first_ms, first, second_ms, second, slope


def _hazard_on(corners: tuple[Floats, ...], w_ms: float) -> Floats:
    first_ms, first, second_ms, second, slope = corners
    width = np.where(second_ms > first_ms, second_ms - first_ms, 1.0)
    between = first + (second - first) * (w_ms - first_ms) / width
    after = second + slope * (w_ms - second_ms)
    return np.where(w_ms <= first_ms, first * w_ms / first_ms, np.where(w_ms <= second_ms, between, after))


def _between(ahead: npt.NDArray[Any], values: npt.NDArray[Any]) -> Floats:
    """Values at the judged distances as values at others [classes, distances], straight between.

    ``values`` are [classes, judged], or [classes, distances, judged] where each distance has its own.
    """
    if len(ahead) == len(AHEAD_H) and (ahead == AHEAD_H).all():
        return values.astype(np.float64) if values.ndim == 2 else np.einsum("cdd->cd", values).astype(np.float64)
    judged = np.array(AHEAD_H, dtype=np.float64)
    at = np.clip(ahead, judged[0], judged[-1])
    right = np.clip(np.searchsorted(judged, at), 1, len(judged) - 1)
    part = (at - judged[right - 1]) / (judged[right] - judged[right - 1])
    own = values if values.ndim == 3 else np.broadcast_to(values[:, None], (len(values), len(at), len(judged)))
    place = np.arange(len(at))
    left, other = own[:, place, right - 1], own[:, place, right]
    mixed = left * (1.0 - part) + other * part
    return np.where(part == 0.0, left, np.where(part == 1.0, other, mixed))


def _quantile(ordered: Floats, count: npt.NDArray[Any], level: Floats) -> Floats:
    """Quantiles of the first ``count`` of sorted scores [classes, judged, scores], straight between two of them."""
    at = np.clip(level * (count + 1) - 1.0, 0.0, count - 1.0)
    below = np.floor(at).astype(np.int64)
    above = np.minimum(below + 1, count - 1)
    low = np.take_along_axis(ordered, below[:, :, None], axis=2)[:, :, 0]
    high = np.take_along_axis(ordered, above[:, :, None], axis=2)[:, :, 0]
    found: Floats = low + (high - low) * (at - below)
    return found


def _from_other_days(mean: Floats) -> Floats:
    """Fill hours that were never seen with the mean of the same hour on the other days of the same kind."""
    found = mean.copy()
    by_day = found.reshape(-1, 7, 24)  # a view
    for days in (slice(0, 5), slice(5, 7)):
        part = by_day[:, days]
        seen = ~np.isnan(part)
        total = np.sum(np.where(seen, part, 0.0), axis=1) / np.where(seen.any(axis=1), seen.sum(axis=1), np.nan)
        part[...] = np.where(seen, part, total[:, None])
    return found
