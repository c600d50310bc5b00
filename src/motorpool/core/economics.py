"""Whether work is worth it to the owner, and what it brought: pay less electricity less wear.

Decides: the projected net of an hour, the statement of a session, and when to look again after "not worth it". Must
not: read a clock or a meter, or give permits (``core.guard`` does, from the net that stands here).
Called by: the agent, the simulator, the owner's statement.

Money is whole millionths of the currency. What is earned is rounded down and what is spent is rounded up, so that a
projection never promises more than comes; a statement adds up exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, isfinite
from typing import Final

import msgspec

from motorpool.core.energy import MWS_PER_KWH, Increment, Power
from motorpool.core.wear import WearPrices
from motorpool.errors import CallerError

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000
TOKENS_PER_PRICE: Final = 1_000_000
MAX_MICRO_KWH: Final = 100_000_000  # 100 of the currency: beyond it a tariff is a mistake
UNKNOWN_TARIFF_MICRO_KWH: Final = 300_000  # dear rather than cheap, while the owner has told no price
MAX_STRETCHES: Final = 64  # of probing, in a day


class PayRates(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner is paid for a million tokens, in millionths of the currency."""

    input_micro: int
    output_micro: int


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens a second that were measured while the vehicle worked."""

    input_tokens_s: float
    output_tokens_s: float


class Tariff(msgspec.Struct, frozen=True, kw_only=True):
    """The owner's price of electricity: one, or one for each hour of the local day, per kilowatt-hour in millionths.

    Prices by the hour can be below zero, as on some markets.
    """

    micro_kwh: tuple[int, ...]

    @classmethod
    def flat(cls, micro_kwh: int) -> Tariff:
        """The same price all day."""
        return cls(micro_kwh=(micro_kwh,)).check()

    @classmethod
    def hourly(cls, micro_kwh: tuple[int, ...]) -> Tariff:
        """24 prices, the first one from midnight."""
        if len(micro_kwh) != 24:
            raise CallerError(f"an hourly tariff has 24 prices, not {len(micro_kwh)}", param="tariff")
        return cls(micro_kwh=micro_kwh).check()

    def check(self) -> Tariff:
        """The tariff itself; raises CallerError if it is none."""
        if len(self.micro_kwh) not in (1, 24):
            raise CallerError(f"a tariff has 1 price or 24, not {len(self.micro_kwh)}", param="tariff")
        for price in self.micro_kwh:
            if abs(price) > MAX_MICRO_KWH or (price < 0 and len(self.micro_kwh) == 1):
                raise CallerError(
                    f"{price} cannot be the price of a kilowatt-hour: give it in millionths of the currency",
                    param="tariff",
                )
        return self

    def at(self, now_ms: int, utc_offset_min: int = 0) -> int:
        """The price of the local hour."""
        hour = (now_ms + utc_offset_min * 60_000) % DAY_MS // HOUR_MS
        return self.micro_kwh[hour % len(self.micro_kwh)]


class Wear(msgspec.Struct, frozen=True, kw_only=True):
    """What an hour of this work wears: ``junction_ppm`` is the weight of its temperature (``core.wear.weight_ppm``)."""

    prices: WearPrices = WearPrices()
    junction_ppm: int = 1_000_000
    flash_bytes_h: int = 0

    def hour_micro(self, battery_mw: int) -> int:
        """What an hour costs that takes ``battery_mw`` out of the battery."""
        return self.prices.cost_micro(
            battery_mws=battery_mw * 3_600,
            compute_ms=HOUR_MS,
            weighted_ms=self.junction_ppm * HOUR_MS // 1_000_000,
            flash_bytes=self.flash_bytes_h,
        )


class Hour(msgspec.Struct, frozen=True, kw_only=True):
    """An hour of work: what it earns and costs the owner, in millionths. The net is exactly the difference."""

    pay_micro: int
    electricity_micro: int
    wear_micro: int

    @property
    def net_micro(self) -> int:
        """What is left for the owner; it can be less than nothing."""
        return self.pay_micro - self.electricity_micro - self.wear_micro


def project(
    rates: PayRates | None, speed: Speed | None, power: Power | None, tariff_micro_kwh: int | None, wear: Wear | None
) -> Hour | None:
    """What an hour of work would bring the owner; None while one of these is not known.

    ``power`` is what the work draws of the whole vehicle, by ``EnergyModel.power``.
    """
    if rates is None or speed is None or power is None or tariff_micro_kwh is None or wear is None:
        return None
    tokens_s = (speed.input_tokens_s, speed.output_tokens_s)
    if not all(isfinite(value) and value >= 0 for value in tokens_s):
        return None
    earned = tokens_s[0] * rates.input_micro + tokens_s[1] * rates.output_micro
    return Hour(
        pay_micro=floor(earned * 3600 / TOKENS_PER_PRICE),
        electricity_micro=_up(power.grid_mw * 3_600 * tariff_micro_kwh, MWS_PER_KWH),
        wear_micro=wear.hour_micro(power.battery_mw),
    )


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """What a session brought the owner. ``measured``: of the energy, see ``core.energy.Increment``.

    ``tariff_known`` False: the owner told no price of electricity, and ``UNKNOWN_TARIFF_MICRO_KWH`` was taken.
    """

    pay_micro: int = 0
    electricity_micro: int = 0
    wear_micro: int = 0
    grid_mws: int = 0
    battery_mws: int = 0
    compute_ms: int = 0
    weighted_ms: int = 0
    flash_bytes: int = 0
    measured: bool = False
    tariff_known: bool = True

    @property
    def net_micro(self) -> int:
        """Pay less electricity less wear, exactly."""
        return self.pay_micro - self.electricity_micro - self.wear_micro

    def plus(self, other: Statement) -> Statement:
        """Both together: every number is the sum; one without energy does not change what was measured."""
        drew = [each for each in (self, other) if each.grid_mws or each.battery_mws]
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in self.__struct_fields__
            if name not in ("measured", "tariff_known")
        }
        return Statement(
            **sums,
            measured=bool(drew) and all(each.measured for each in drew),
            tariff_known=self.tariff_known and other.tariff_known,
        )


class SessionBook:
    """Keeps one session: energy at the price of its hour, wear, and pay as it comes in; rounds only in the end."""

    __slots__ = (
        "_battery_mws",
        "_compute_ms",
        "_flash_bytes",
        "_grid_mws",
        "_measured",
        "_pay_micro",
        "_price_mws",
        "_prices",
        "_tariff_known",
        "_weighted_ms",
    )

    def __init__(self, prices: WearPrices) -> None:
        self._prices = prices
        self._pay_micro = 0
        self._price_mws = 0  # millionths for a kilowatt-hour, times milliwatt-seconds
        self._grid_mws = self._battery_mws = 0
        self._compute_ms = self._weighted_ms = self._flash_bytes = 0
        self._measured: bool | None = None
        self._tariff_known = True

    def drew(self, energy: Increment, tariff_micro_kwh: int | None) -> None:
        """The vehicle drew ``energy`` at this price; None if the owner has told no price."""
        if energy.grid_mws == 0 and energy.battery_mws == 0:
            return
        self._grid_mws += energy.grid_mws
        self._battery_mws += energy.battery_mws
        price = UNKNOWN_TARIFF_MICRO_KWH if tariff_micro_kwh is None else tariff_micro_kwh
        self._price_mws += energy.grid_mws * price
        self._tariff_known = self._tariff_known and tariff_micro_kwh is not None
        self._measured = energy.measured and self._measured is not False

    def wore(self, *, compute_ms: int = 0, weighted_ms: int = 0, flash_bytes: int = 0) -> None:
        """The computer worked and wrote."""
        self._compute_ms += compute_ms
        self._weighted_ms += weighted_ms
        self._flash_bytes += flash_bytes

    def earned(self, pay_micro: int) -> None:
        """The owner was paid."""
        self._pay_micro += pay_micro

    def statement(self) -> Statement:
        """The session so far."""
        return Statement(
            pay_micro=self._pay_micro,
            electricity_micro=_up(self._price_mws, MWS_PER_KWH),
            wear_micro=self._prices.cost_micro(
                battery_mws=self._battery_mws,
                compute_ms=self._compute_ms,
                weighted_ms=self._weighted_ms,
                flash_bytes=self._flash_bytes,
            ),
            grid_mws=self._grid_mws,
            battery_mws=self._battery_mws,
            compute_ms=self._compute_ms,
            weighted_ms=self._weighted_ms,
            flash_bytes=self._flash_bytes,
            measured=self._measured is True,
            tariff_known=self._tariff_known,
        )


class SecondLook:
    """When to try again after "not worth it".

    A changed tariff, pay or speed changes the projection, and with it the verdict, at once. But a vehicle that does not
    work measures no speed, and one bad measurement would keep it idle for ever. So for at most ``probe_ms`` of work in
    any 24 hours the net counts as unknown, which the guard allows, unless the net would be below zero even at
    ``hope`` times the speed: then it is certain, and nothing is tried. ``stretches`` are those of an earlier object, so
    that a new start of the agent brings no new probe; with them, ``now_ms`` is the time since 1970.
    """

    def __init__(
        self, *, probe_ms: int = 300_000, hope: float = 2.0, stretches: Iterable[tuple[int, int]] = ()
    ) -> None:
        if not 0 <= probe_ms <= DAY_MS:
            raise CallerError("probe_ms must lie between 0 and a day", param="probe_ms")
        if not (isfinite(hope) and hope >= 1):
            raise CallerError("hope must be 1 or more", param="hope")
        self._probe_ms = probe_ms
        self._hope = hope
        self._stretches = [(begin, end) for begin, end in stretches if begin <= end][-MAX_STRETCHES:]
        self._seen_ms: int | None = None
        self._probing = False

    def net_for_guard(
        self,
        now_ms: int,
        *,
        rates: PayRates | None,
        speed: Speed | None,
        power: Power | None,
        tariff_micro_kwh: int | None,
        wear: Wear | None,
        working: bool,
    ) -> int | None:
        """The projected net of an hour for the guard; None while it is not known, or while a probe may run.

        ``working``: the vehicle has worked since the last call, which is what uses the probe up. A clock that is set
        back makes work count from there on; what was tried before counts until a day after it by the new time.
        """
        if self._probing and working and self._seen_ms is not None and now_ms > self._seen_ms:
            self._count(self._seen_ms, now_ms)
        self._seen_ms = now_ms
        hour = project(rates, speed, power, tariff_micro_kwh, wear)
        self._probing = False
        if hour is None or hour.net_micro >= 0:
            return hour.net_micro if hour else None
        assert speed is not None
        hoped = Speed(
            input_tokens_s=speed.input_tokens_s * self._hope, output_tokens_s=speed.output_tokens_s * self._hope
        )
        best = project(rates, hoped, power, tariff_micro_kwh, wear)
        certain = best is not None and best.net_micro < 0
        self._probing = not certain and self.probe_left_ms(now_ms) > 0
        return None if self._probing else hour.net_micro

    @property
    def stretches(self) -> tuple[tuple[int, int], ...]:
        """Begin and end of the probing work that still counts, to be kept over a restart; ``MAX_STRETCHES`` at most."""
        return tuple(self._stretches)

    def probe_left_ms(self, now_ms: int) -> int:
        """How much work may still be tried in the 24 hours that end now."""
        since_ms = now_ms - DAY_MS
        self._stretches = [stretch for stretch in self._stretches if stretch[1] > since_ms]
        if len(self._stretches) >= MAX_STRETCHES:
            return 0
        return max(0, self._probe_ms - sum(end - max(begin, since_ms) for begin, end in self._stretches))

    def _count(self, begin_ms: int, end_ms: int) -> None:
        if self._stretches and self._stretches[-1][1] == begin_ms:
            begin_ms = self._stretches.pop()[0]
        self._stretches.append((begin_ms, end_ms))


def _up(amount: int, unit: int) -> int:
    """Whole units, rounded up."""
    return -(-amount // unit)
