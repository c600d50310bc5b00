"""Keeps what the car has learnt of its own week in the agent's folder, and gives the loop what may leave the car.

Decides: when the learnt state is written. Must not: send it, log it, wait for the disk in the event loop, or judge
(``core.departures`` does). Called by: ``agent.loop``, which feeds the signals and asks; ``agent.main`` makes it.

``habits.bin`` holds about a kilobyte, in one piece, readable by the agent's user alone. It is written once an hour at
most. A file that cannot be read is put aside, and the vehicle starts again from the fleet's table.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from motorpool.core.departures import (
    AWAY,
    HOUR_MS,
    MAX_KEPT_BYTES,
    Fleet,
    Habits,
    Outlook,
    WeeklyTime,
    latest_stay_ms,
    next_weekly_ms,
    stands_plugged,
)
from motorpool.core.departures_fleet import NORWAY_HOME
from motorpool.core.signals import Signals, value_of
from motorpool.trust.credentials import write_secret

HABITS_NAME: Final = "habits.bin"
BAD_SUFFIX: Final = ".bad"
SAVE_MS: Final = HOUR_MS  # a year of hourly writes is 10 MB of flash
log = logging.getLogger(__name__)


def local_offset_min(now_ms: int) -> int:
    """How far this machine's local time is ahead of UTC then, summer time included."""
    return time.localtime(now_ms / 1000).tm_gmtoff // 60


class Departures:
    """The forecast of one vehicle. It reads no clock: each call says what time it is."""

    def __init__(self, path: Path, fleet: Fleet = NORWAY_HOME) -> None:
        self._path = path
        self._habits = _read(path, fleet) or Habits(fleet)
        self._offset_min = 0
        self._stated_ms: int | None = None
        self._known = False
        self._changed = False
        self._saved_ms: int | None = None
        self._writing = False

    def observe(self, signals: Signals, now_ms: int, utc_offset_min: int) -> None:
        """Learn from the signals of now. A signal that is missing or old teaches nothing."""
        self._offset_min = utc_offset_min
        plugged = stands_plugged(signals, now_ms)
        self._known = plugged is not None
        self._stated_ms = value_of("departure_ms", signals.departure_ms, now_ms)
        self._habits.advance(plugged, now_ms, utc_offset_min)
        self._changed = self._changed or plugged is not None

    def outlook(self, now_ms: int, schedule: Iterable[WeeklyTime] = (), hints: Iterable[int] = ()) -> Outlook:
        """What may leave the car. The stay is bounded by the owner's weekly times, the ``departure_ms`` signal that
        ``observe`` saw, and ``hints``: other times, in Unix milliseconds, at which the car was told that it leaves.
        """
        if not self._known:
            return AWAY
        stated = [*hints]
        if self._stated_ms is not None:
            stated.append(self._stated_ms)
        weekly_ms = next_weekly_ms(schedule, now_ms, self._offset_min)
        if weekly_ms is not None:
            stated.append(weekly_ms)
        return self._habits.outlook(now_ms, self._offset_min, latest_stay_ms(stated, now_ms))

    async def keep(self, now_ms: int) -> None:
        """Write what was learnt if the last time is an hour ago. The disk is waited for beside the event loop."""
        due = self._saved_ms is None or not 0 <= now_ms - self._saved_ms < SAVE_MS
        if not due or not self._changed or self._writing:
            return
        data = self._habits.dump()
        self._saved_ms, self._changed, self._writing = now_ms, False, True
        try:
            await asyncio.to_thread(self._write, data)
        finally:
            self._writing = False

    def close(self) -> None:
        """Write what was learnt, for the next start. A write that is under way is as good."""
        if self._changed and not self._writing:
            self._write(self._habits.dump())
            self._changed = False

    def _write(self, data: bytes) -> None:
        try:
            write_secret(self._path, data)
        except OSError as error:
            log.warning("what the car has learnt of its week could not be kept: %s", error.strerror)


def _read(path: Path, fleet: Fleet) -> Habits | None:
    """What an earlier run kept; None at the first start, and when the file is not to be used."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEPT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s): the forecast starts from the fleet's table", path.name, error.strerror)
        return None
    habits = Habits.load(fleet, data)
    if habits is None:
        log.warning("%s is damaged: the forecast starts from the fleet's table", path.name)
        try:
            path.replace(path.with_name(path.name + BAD_SUFFIX))
        except OSError as error:
            log.warning("%s could not be put aside: %s", path.name, error.strerror)
    return habits
