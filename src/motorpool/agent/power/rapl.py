"""Energy counters of the processor, as Linux shows them under /sys/class/powercap (RAPL; Intel and AMD).

Decides: which counters make up the computer's power, and which readings cannot be. Must not: know what the power is
for. Called by: ``power.meter`` and ``power.model``.

A counter starts again at 0 after ``max_energy_range_uj``. Since 2020 Linux lets only root read it: a counter that
cannot be read makes the whole unknown, as a part of the power would pass for all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

POWERCAP: Final = Path("/sys/class/powercap")
MAX_ZONE_W: Final = 1_000.0  # no processor draws more: what says so is a counter that was set back


class Zone(msgspec.Struct, frozen=True, kw_only=True):
    """One counter: its file, and the value after which it starts again."""

    path: Path
    range_uj: int


class Rapl:
    """The power of all processors and their memory, between one look and the next."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = _zones(root)
        self._last: list[int] | None = None
        self._last_ms = 0

    @property
    def available(self) -> bool:
        """Whether there are counters, and all of them can be read."""
        return bool(self._zones) and self._read() is not None

    def read(self, now_ms: int) -> float | None:
        """Mean watts since the last call; None at the first one, and when it cannot be known."""
        last, last_ms = self._last, self._last_ms
        passed_ms = now_ms - last_ms
        if last is not None and passed_ms == 0:
            return None  # no time has passed: the last look stays the one to compare with
        self._last, self._last_ms = self._read(), now_ms
        if last is None or self._last is None or passed_ms < 0:
            return None
        most_uj = MAX_ZONE_W * passed_ms * 1000
        total_uj = 0
        for zone, before, now in zip(self._zones, last, self._last, strict=True):
            used_uj = now - before if now >= before else now - before + zone.range_uj
            # In so much time the counter could have gone round more than once, or it was set back.
            if most_uj >= zone.range_uj or not 0 <= used_uj <= most_uj:
                return None
            total_uj += used_uj
        return total_uj / passed_ms / 1000

    def _read(self) -> list[int] | None:
        values = [_number(zone.path) for zone in self._zones]
        known = [value for value in values if value is not None]
        return known if known and len(known) == len(values) else None


def _zones(root: Path) -> tuple[Zone, ...]:
    """The packages and their memory. "core" and "uncore" are parts of a package, "psys" contains all of them."""
    zones = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue  # a zone without a name is none that we could count
        range_uj = _number(folder / "max_energy_range_uj")
        if (name.startswith("package") or name == "dram") and range_uj:
            zones.append(Zone(path=folder / "energy_uj", range_uj=range_uj))
    return tuple(zones)


def _number(path: Path) -> int | None:
    try:
        value = int(path.read_text(encoding="ascii", errors="replace"))
    except (OSError, ValueError):
        return None
    return value if value >= 0 else None
