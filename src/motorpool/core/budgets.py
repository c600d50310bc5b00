"""What computing may use up: hours of the computer, heat, charge cycles, flash memory and metered bytes.

Decides: how much of each was used in its rolling window. Must not: read a clock or a file, or judge (``core.guard``).
Called by: ``core.guard`` (the types), ``agent.budgets`` (which keeps a book on disk), the simulator.

Silicon and flash are what really wears in a car: automotive parts are qualified for 10 to 20 thousand hours, and
worn-out flash has already led to a recall. Windows move by whole buckets (an hour, or a day), so a book is small and
what it says is never less than what was used: the oldest bucket counts in full until it leaves the window.
"""

from __future__ import annotations

from typing import Final

import msgspec

from motorpool.errors import CallerError

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000
WEEK_BUCKETS: Final = 7 * 24
MONTH_BUCKETS: Final = 30
_HOURLY: Final = ("compute_ms", "weighted_ms", "battery_mwh")
_DAILY: Final = ("flash_bytes", "metered_bytes")


class Used(msgspec.Struct, frozen=True, kw_only=True):
    """What was used in the window that ends now: a week for the first three, 30 days for the bytes.

    ``weighted_ms`` counts computing time by the wear that its temperature means (85 Celsius counts once, see
    ``core.wear``). ``unknown``: the book could not be read, and nobody knows.
    """

    compute_ms: int = 0
    weighted_ms: int = 0
    battery_mwh: int = 0
    flash_bytes: int = 0
    metered_bytes: int = 0
    unknown: bool = False


class BudgetLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The most of each. ``metered_bytes_month`` is 0 unless the owner allows mobile data for jobs."""

    compute_h_week: float = 60.0
    weighted_h_week: float = 30.0
    battery_wh_week: float = 5_000.0
    flash_bytes_month: int = 20_000_000_000
    metered_bytes_month: int = 0

    def tightest(self, other: BudgetLimits) -> BudgetLimits:
        """The smaller of each."""
        return BudgetLimits(**{name: min(getattr(self, name), getattr(other, name)) for name in self.__struct_fields__})


class _Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A book as it is written down: for each counter the buckets that are not empty, by their number since 1970."""

    v: int = 1
    latest_ms: int = 0
    hourly: dict[str, dict[int, int]] = {}
    daily: dict[str, dict[int, int]] = {}


class BudgetBook:
    """Rolling counters. Time that goes back is taken for the latest time that was seen: no window moves back."""

    def __init__(self) -> None:
        self._latest_ms = 0
        self._buckets: dict[str, dict[int, int]] = {name: {} for name in (*_HOURLY, *_DAILY)}

    def add(
        self,
        now_ms: int,
        *,
        compute_ms: int = 0,
        weighted_ms: int = 0,
        battery_mwh: int = 0,
        flash_bytes: int = 0,
        metered_bytes: int = 0,
    ) -> None:
        """Count what was just used; negative amounts count as nothing."""
        self._latest_ms = max(self._latest_ms, now_ms)
        amounts = (compute_ms, weighted_ms, battery_mwh, flash_bytes, metered_bytes)
        for name, amount in zip((*_HOURLY, *_DAILY), amounts, strict=True):
            if amount > 0:
                bucket = self._latest_ms // _bucket_ms(name)
                book = self._buckets[name]
                book[bucket] = book.get(bucket, 0) + amount

    def used(self, now_ms: int) -> Used:
        """The sums of the windows that end now."""
        self._latest_ms = max(self._latest_ms, now_ms)
        return Used(
            compute_ms=self._sum("compute_ms"),
            weighted_ms=self._sum("weighted_ms"),
            battery_mwh=self._sum("battery_mwh"),
            flash_bytes=self._sum("flash_bytes"),
            metered_bytes=self._sum("metered_bytes"),
        )

    def _sum(self, name: str) -> int:
        book = self._buckets[name]
        oldest = self._latest_ms // _bucket_ms(name) - (WEEK_BUCKETS if name in _HOURLY else MONTH_BUCKETS)
        for bucket in [bucket for bucket in book if bucket < oldest]:
            del book[bucket]
        return sum(book.values())

    def dump(self) -> bytes:
        """The book as bytes, a few kilobytes at most."""
        self.used(self._latest_ms)
        kept = _Kept(
            latest_ms=self._latest_ms,
            hourly={name: self._buckets[name] for name in _HOURLY},
            daily={name: self._buckets[name] for name in _DAILY},
        )
        return msgspec.json.encode(kept)

    @classmethod
    def load(cls, data: bytes) -> BudgetBook:
        """A book from its bytes; raises CallerError for bytes that are none."""
        try:
            kept = msgspec.json.decode(data, type=_Kept)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CallerError("not a book of budgets", code="invalid_budget_book") from error
        book = cls()
        book._latest_ms = kept.latest_ms
        for name, buckets in (*kept.hourly.items(), *kept.daily.items()):
            if name not in book._buckets or any(amount < 0 for amount in buckets.values()):
                raise CallerError("not a book of budgets", code="invalid_budget_book", param=name)
            book._buckets[name] = dict(buckets)
        return book


def _bucket_ms(name: str) -> int:
    return HOUR_MS if name in _HOURLY else DAY_MS
