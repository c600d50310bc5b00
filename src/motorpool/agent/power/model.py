"""How watts become threads and time, by a model that is calibrated once and stated.

Decides: the settings of the engine that draw no more than a permit's watts. Must not: touch the engine (``runtime``
does) or work while it is not permitted. Called by: the agent, at its start (``calibrate``) and with each permit
(``plan``).

The model is a straight line: so many watts for each core that works, above what the computer draws without us. ``plan``
and all modelled energy speak of this increment; what the computer draws anyway is the vehicle's, or part of its being
awake (``core.energy``). The first core that works costs more than the next ones, as it wakes what they share; taking
the dearest core that was measured for all of them keeps the line above the truth.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from math import floor, isfinite
from typing import Final, Protocol

import msgspec

from motorpool.core.energy import MAX_POWER_W, Limits
from motorpool.core.signals import Reading
from motorpool.errors import CallerError

MIN_DUTY: Final = 0.05
DUTY_STEPS: Final = 100
_CHUNK: Final = b"\0" * (256 * 1024)  # hashed in well under a millisecond, without Python's lock


class Source(StrEnum):
    """Where watts come from."""

    VEHICLE = "vehicle"  # the vehicle's own signal
    RAPL = "rapl"  # the processor's energy counters
    DECLARED = "declared"  # the configuration says so: a model


class PowerModel(msgspec.Struct, frozen=True, kw_only=True):
    """``idle_w`` without us, and ``per_core_w`` more for each core that works for us, of ``cores``."""

    idle_w: float
    per_core_w: float
    cores: int
    source: Source

    def draw_w(self, cpu_ms: int, wall_ms: int) -> float:
        """What the engine drew while it used ``cpu_ms`` of processor time in ``wall_ms``."""
        if wall_ms <= 0 or cpu_ms <= 0:
            return 0.0
        return self.per_core_w * min(cpu_ms / wall_ms, self.cores)

    def line(self) -> str:
        """The model in words, for logs and the owner."""
        how = "as configured" if self.source is Source.DECLARED else f"measured ({self.source})"
        return f"{self.idle_w:.1f} W idle, {self.per_core_w:.1f} W for each of {self.cores} cores, {how}"


def declared(*, node_idle_w: float, node_max_w: float, cores: int) -> PowerModel:
    """The model from the configuration: what the computer draws with nothing to do, and with all cores at work."""
    if not (isfinite(node_idle_w) and isfinite(node_max_w) and 0 <= node_idle_w < node_max_w):
        raise CallerError("node_max_w must be more than node_idle_w, which must not be below 0", param="node_max_w")
    if cores < 1:
        raise CallerError("cores must be at least 1", param="cores")
    per_core_w = (node_max_w - node_idle_w) / cores
    return PowerModel(idle_w=node_idle_w, per_core_w=per_core_w, cores=cores, source=Source.DECLARED)


def plan(
    model: PowerModel, watts_w: float, *, cores: int, slots: int, memory_bytes: int | None = None
) -> Limits | None:
    """The settings for a permit of ``watts_w``; None if even the smallest would draw more.

    Fewer threads first: they use what they draw best. Below one thread, part of the time, with fewer slots: so each
    answer does not take many times as long. Otherwise all slots stay, as tokens of full slots cost the least energy.
    """
    assert model.per_core_w > 0
    if not watts_w >= 1:  # written so that NaN is none
        return None
    watts_w = floor(min(watts_w, MAX_POWER_W))
    cores = max(1, min(cores, model.cores))
    slots = max(1, slots)
    threads = min(cores, floor(watts_w / model.per_core_w))
    while threads > 0 and threads * model.per_core_w > watts_w:  # where floating point rounded the division up
        threads -= 1
    duty = 1.0
    if threads == 0:
        threads = 1
        parts = floor(watts_w / model.per_core_w * DUTY_STEPS)
        while parts > 0 and parts / DUTY_STEPS * model.per_core_w > watts_w:
            parts -= 1
        duty = parts / DUTY_STEPS
        if duty < MIN_DUTY:
            return None
        slots = -(-slots * parts // DUTY_STEPS)
    return Limits(
        watts_w=watts_w,
        threads=threads,
        duty=duty,
        slots=slots,
        memory_bytes=memory_bytes,
        expected_w=threads * duty * model.per_core_w,
    )


# -- calibration -------------------------------------------------------------------------------------------------------


class Gauge(Protocol):
    """Something that measures the computer's power."""

    @property
    def source(self) -> Source:
        """Where its watts come from."""

    def available(self, now_ms: int) -> bool:
        """Whether it measures now."""

    def read(self, now_ms: int) -> float | None:
        """Watts since the last call, or a reading that is new since then; None if there is none."""


class SignalGauge:
    """The vehicle's own signal, each reading once. ``read_signal`` returns the young reading, or None."""

    source = Source.VEHICLE

    def __init__(self, read_signal: Callable[[int], Reading[float] | None]) -> None:
        self._read_signal = read_signal
        self._last_ms: int | None = None

    def available(self, now_ms: int) -> bool:
        """Whether there is a young reading."""
        return self._read_signal(now_ms) is not None

    def read(self, now_ms: int) -> float | None:
        """The reading, if it is another one than last time."""
        reading = self._read_signal(now_ms)
        if reading is None or reading.at_ms == self._last_ms:
            return None
        self._last_ms = reading.at_ms
        return reading.value


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long calibration looks. It asks for leave every ``step_ms``, and reads every ``read_ms``.

    A stretch goes on for ``longest_ms`` if there was no reading yet: the vehicle's signal may come every few seconds.
    """

    settle_ms: int = 200
    stretch_ms: int = 600
    longest_ms: int = 12_000
    step_ms: int = 20
    read_ms: int = 100


class Burner:
    """Works on all of its threads until it is stopped, which takes less than a millisecond or two."""

    def __init__(self, threads: int) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._burn, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop, and wait until all threads have ended."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _burn(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread alone, on Linux
        while not self._stop.is_set():
            hashlib.blake2b(_CHUNK)


class Burst(Protocol):
    """Work that can be stopped."""

    def stop(self) -> None:
        """Stop it now."""


class _NotPermittedError(Exception):
    """Calibration has to end at once."""


class _Look:
    """Time, leave and gauge of one calibration."""

    def __init__(
        self,
        gauge: Gauge,
        permitted: Callable[[], bool],
        timing: Timing,
        clock_ms: Callable[[], int],
        sleep_s: Callable[[float], None],
    ) -> None:
        self._gauge = gauge
        self._permitted = permitted
        self._timing = timing
        self._clock_ms = clock_ms
        self._sleep_s = sleep_s

    def ask(self) -> None:
        """Go on only with leave."""
        if not self._permitted():
            raise _NotPermittedError

    def readings(self) -> list[float]:
        """What the gauge says over a stretch, after it has settled."""
        timing = self._timing
        self._wait(timing.settle_ms)
        self._gauge.read(self._clock_ms())  # what was before is not part of it
        begin_ms, found = self._clock_ms(), list[float]()
        while True:
            self._wait(timing.read_ms)
            now_ms = self._clock_ms()
            watts_w = self._gauge.read(now_ms)
            if watts_w is not None and isfinite(watts_w) and watts_w >= 0:
                found.append(watts_w)
            if now_ms - begin_ms >= (timing.stretch_ms if found else timing.longest_ms):
                return found

    def _wait(self, for_ms: int) -> None:
        end_ms = self._clock_ms() + for_ms
        self.ask()
        while (left_ms := end_ms - self._clock_ms()) > 0:
            self._sleep_s(min(left_ms, self._timing.step_ms) / 1000)
            self.ask()


def calibrate(
    gauges: Sequence[Gauge],
    fallback: PowerModel,
    *,
    permitted: Callable[[], bool],
    burst: Callable[[int], Burst] = Burner,
    timing: Timing | None = None,
    margin: float = 1.25,
    clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    sleep_s: Callable[[float], None] = time.sleep,
) -> PowerModel | None:
    """Measure the computer idle, with one core and with all cores at work; blocks, so give it a thread.

    The first gauge that measures is taken; without one, or if it shows no difference, ``fallback`` is the model. None
    means that ``permitted`` said no: nothing runs any more then, and calibration is to be tried another time.
    ``permitted`` is asked from the same thread, and has to compare the permit's end with a clock by itself: it must say
    no in time even if the agent hangs.
    ``margin``: engines draw more for a core than the burst does, which has no wide arithmetic.
    """
    gauge = next((each for each in gauges if each.available(clock_ms())), None)
    if gauge is None:
        return fallback
    look = _Look(gauge, permitted, timing or Timing(), clock_ms, sleep_s)
    try:
        idle = look.readings()
        if not idle:
            return fallback
        per_core_w = 0.0
        for threads in sorted({1, fallback.cores}):
            look.ask()
            work = burst(threads)
            try:
                busy = look.readings()
            finally:
                work.stop()
            if not busy:
                return fallback
            per_core_w = max(per_core_w, (max(busy) - min(idle)) / threads)
    except _NotPermittedError:
        return None
    if per_core_w < 0.05:  # other work was going on all the time, or the gauge does not see the processor
        return fallback
    return PowerModel(idle_w=min(idle), per_core_w=per_core_w * margin, cores=fallback.cores, source=gauge.source)
