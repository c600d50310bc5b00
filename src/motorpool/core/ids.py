"""Names to row numbers and back, at 10 to 16 bytes a name beside the name itself: a dict takes ten times as much.

Names lie one after the other in one buffer; an open hash table of row numbers finds them. A row keeps its number for
ever; a name that was removed and comes again gets a new one. Which rows exist, and their order, depends on nothing but
the order of ``add``.

Called by: ``core.cell``.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from motorpool.core.columns import more
from motorpool.errors import CapacityError

MAX_BYTES: Final = 0xFFFFFFFF  # of all names together: where one begins is a number of 32 bits
FEW: Final = 1_000  # names, for which a copy of all of them does not pay
FEW_PART: Final = 16  # of all names: to look up fewer one by one is faster
_FREE: Final = -1
_REMOVED: Final = -2


class Ids:
    """The names of one kind of thing."""

    def __init__(self) -> None:
        self._names = bytearray()
        # Of row r: where its name begins; of r + 1: where it ends.
        self._starts: npt.NDArray[np.uint32] = np.zeros(9, np.uint32)
        self._slots: npt.NDArray[np.int32] = np.full(16, _FREE, np.int32)
        self._used = 0  # slots that are not free
        self._gone: set[int] = set()
        self.rows = 0  # handed out, the removed ones too
        self._known: dict[bytes, int] | None = None  # all names, while they come in great numbers

    def __len__(self) -> int:
        return self.rows - len(self._gone)

    def __iter__(self) -> Iterator[int]:
        """Rows in the order in which they were added."""
        return (row for row in range(self.rows) if row not in self._gone)

    @property
    def nbytes(self) -> int:
        """What it holds in memory, without the removed rows' set."""
        return self._names.__alloc__() + self._starts.nbytes + self._slots.nbytes

    def name(self, row: int) -> str:
        """The name of a row."""
        return self._raw(row).decode()

    def _raw(self, row: int) -> bytes:
        return bytes(self._names[int(self._starts[row]) : int(self._starts[row + 1])])

    def find(self, name: str) -> int:
        """The row of a name, or -1."""
        return self._find(name.encode())

    def _find(self, raw: bytes) -> int:
        mask = len(self._slots) - 1
        slot = zlib.crc32(raw) & mask
        while (row := int(self._slots[slot])) != _FREE:
            if row != _REMOVED and self._raw(row) == raw:
                return row
            slot = (slot + 1) & mask
        return -1

    def add(self, name: str) -> int:
        """The row of a name, a new one if it has none yet. CapacityError: all names are longer than MAX_BYTES."""
        row = self.find(name)
        if row >= 0:
            return row
        if 3 * (self._used + 1) > 2 * len(self._slots):
            self._rebuild()
        raw = name.encode()
        if len(self._names) + len(raw) > MAX_BYTES:
            raise CapacityError("a cell has no room for the name of one more vehicle", code="too_many_vehicles")
        self._known = None
        row = self.rows
        self.rows += 1
        if row + 2 > len(self._starts):
            longer = np.zeros(more(len(self._starts), 8), np.uint32)
            longer[: len(self._starts)] = self._starts
            self._starts = longer
        self._names += raw
        self._starts[row + 1] = len(self._names)
        self._enter(row)
        return row

    def raws(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        """The names of rows, as they lie in memory."""
        if len(rows) < FEW:
            return [self._raw(row) for row in rows.tolist()]
        names = bytes(self._names)
        begins, ends = self._starts[rows].tolist(), self._starts[rows + 1].tolist()
        return [names[begin:end] for begin, end in zip(begins, ends, strict=True)]

    def joined(self) -> tuple[bytes, npt.NDArray[np.uint32]]:
        """The names of all rows, the removed ones too, one after the other, and where each ends: copies."""
        return bytes(self._names), self._starts[1 : self.rows + 1].copy()

    def find_all(self, raws: list[bytes]) -> npt.NDArray[np.int64]:
        """The rows of many names, -1 where there is none; of most of them at once a tenth of what ``find`` takes."""
        if self._known is None:
            if len(raws) * FEW_PART < self.rows:
                return np.fromiter(map(self._find, raws), np.int64, len(raws))
            rows = np.fromiter(self, np.int64, len(self)) if self._gone else np.arange(self.rows)
            self._known = dict(zip(self.raws(rows), rows.tolist(), strict=True))
        return np.fromiter(map(self._known.get, raws, itertools.repeat(-1)), np.int64, len(raws))

    def settle(self) -> None:
        """No more names come in great numbers: give back the memory that looking for many of them took."""
        self._known = None

    def add_all(self, names: list[str]) -> npt.NDArray[np.int64]:
        """The rows of many names, in their order, with new ones for those that have none yet; see ``add``.

        ``settle`` should follow.
        """
        raws = [name.encode() for name in names]
        rows = self.find_all(raws)
        unknown = np.flatnonzero(rows < 0)
        wanted = raws if len(unknown) == len(raws) else [raws[place] for place in unknown.tolist()]
        if not wanted:
            return rows
        fresh = dict(zip(wanted, itertools.count(self.rows), strict=False))
        if len(fresh) < len(wanted):  # some stand there twice
            fresh = {raw: self.rows + number for number, raw in enumerate(fresh)}
        lengths = np.fromiter(map(len, fresh), np.int64, len(fresh))
        ends = len(self._names) + np.cumsum(lengths)
        if int(ends[-1]) > MAX_BYTES:
            raise CapacityError("a cell has no room for the names of so many vehicles", code="too_many_vehicles")
        first, self.rows = self.rows, self.rows + len(fresh)
        starts = np.zeros(max(more(len(self._starts), 8), self.rows + 1), np.uint32)
        starts[: first + 1] = self._starts[: first + 1]
        starts[first + 1 : self.rows + 1] = ends
        self._starts = starts
        self._names += b"".join(fresh)
        if self._known is not None:
            self._known = self._known | fresh if self._known else fresh
        if len(fresh) == len(wanted):
            rows[unknown] = np.arange(first, self.rows)
        else:
            rows[unknown] = [fresh[raw] for raw in wanted]
        if 3 * (self._used + len(fresh)) > 2 * len(self._slots):
            self._rebuild()
        else:
            for row in range(first, self.rows):
                self._enter(row)
        return rows

    def remove(self, row: int) -> None:
        """Forget a name; its row is not used again."""
        raw = self._raw(row)
        mask = len(self._slots) - 1
        slot = zlib.crc32(raw) & mask
        while int(self._slots[slot]) != row:
            slot = (slot + 1) & mask
        self._slots[slot] = _REMOVED
        self._gone.add(row)
        self._known = None

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
        while 2 * (len(self) + 1) > size:
            size *= 2
        self._slots = np.full(size, _FREE, np.int32)
        self._used = 0
        if self._known is not None:
            rows = np.fromiter(self._known.values(), np.int64, len(self._known))
            raws = list(self._known)
        else:
            rows = np.fromiter(self, np.int64, len(self)) if self._gone else np.arange(self.rows)
            raws = self.raws(rows)
        homes = np.fromiter(map(zlib.crc32, raws), np.int64, len(rows)) & (size - 1)
        order = np.argsort(homes)
        steps = np.arange(len(rows))
        # Each goes to its home or, if that is taken, to the next slot after the one before it.
        slots = np.maximum.accumulate(homes[order] - steps) + steps
        fits = slots < size
        self._slots[slots[fits]] = rows[order[fits]]
        self._used = int(fits.sum())
        for row in rows[order[~fits]]:  # beyond the last slot they go on at the first one
            self._enter(int(row))


def raws_of(names: bytes, ends: npt.NDArray[np.uint32]) -> list[bytes]:
    """Names that lie one after the other, apart again."""
    marks = [0, *ends.tolist()]
    return [names[begin:end] for begin, end in itertools.pairwise(marks)]
