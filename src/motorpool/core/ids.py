"""Names to row numbers and back, at 16 bytes a name beside the name itself: a dict takes ten times as much.

Names lie one after the other in one buffer; an open hash table of row numbers finds them. A row keeps its number for
ever; a name that was removed and comes again gets a new one. Which rows exist, and their order, depends on nothing but
the order of ``add``.

Called by: ``core.cell``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

_FREE: Final = -1
_REMOVED: Final = -2


class Ids:
    """The names of one kind of thing."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._starts = np.zeros(9, np.int64)  # of row r: where its name begins; of r + 1: where it ends
        self._slots: npt.NDArray[np.int32] = np.full(16, _FREE, np.int32)
        self._used = 0  # slots that are not free
        self._gone: set[int] = set()
        self.rows = 0  # handed out, the removed ones too

    def __len__(self) -> int:
        return self.rows - len(self._gone)

    def __iter__(self) -> Iterator[int]:
        """Rows in the order in which they were added."""
        return (row for row in range(self.rows) if row not in self._gone)

    @property
    def nbytes(self) -> int:
        """What it holds in memory, without the removed rows' set."""
        return len(self._names) + self._starts.nbytes + self._slots.nbytes

    def name(self, row: int) -> str:
        """The name of a row."""
        return self._raw(row).decode()

    def _raw(self, row: int) -> bytes:
        return bytes(self._names[int(self._starts[row]) : int(self._starts[row + 1])])

    def find(self, name: str) -> int:
        """The row of a name, or -1."""
        raw = name.encode()
        mask = len(self._slots) - 1
        slot = zlib.crc32(raw) & mask
        while (row := int(self._slots[slot])) != _FREE:
            if row != _REMOVED and self._raw(row) == raw:
                return row
            slot = (slot + 1) & mask
        return -1

    def add(self, name: str) -> int:
        """The row of a name, a new one if it has none yet."""
        row = self.find(name)
        if row >= 0:
            return row
        if 3 * (self._used + 1) > 2 * len(self._slots):
            self._rebuild()
        row = self.rows
        self.rows += 1
        if row + 2 > len(self._starts):
            self._starts = np.concatenate((self._starts, np.zeros(len(self._starts) // 2, np.int64)))
        self._names += name.encode()
        self._starts[row + 1] = len(self._names)
        self._enter(row)
        return row

    def remove(self, row: int) -> None:
        """Forget a name; its row is not used again."""
        raw = self._raw(row)
        mask = len(self._slots) - 1
        slot = zlib.crc32(raw) & mask
        while int(self._slots[slot]) != row:
            slot = (slot + 1) & mask
        self._slots[slot] = _REMOVED
        self._gone.add(row)

    def _enter(self, row: int) -> None:
        mask = len(self._slots) - 1
        slot = zlib.crc32(self._raw(row)) & mask
        while int(self._slots[slot]) != _FREE:
            slot = (slot + 1) & mask
        self._slots[slot] = row
        self._used += 1

    def _rebuild(self) -> None:
        """Twice the room, without the slots of removed names."""
        size = len(self._slots)
        while 3 * (len(self) + 1) > size:
            size *= 2
        self._slots = np.full(size, _FREE, np.int32)
        self._used = 0
        for row in self:
            self._enter(row)
