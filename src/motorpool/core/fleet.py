"""One vehicle or lease of the columns at a time, with names: for tests, pages and whoever asks about a single one.

Called by: ``core.scheduler``, ``server``. Must not: be on a hot path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from motorpool.core.cell import Cell
from motorpool.core.columns import NONE, OFFLINE, SEEN, WITHDRAWAL_SEEN, WITHDRAWN
from motorpool.core.jobs import Job
from motorpool.types import ReasonCode, VehicleState

STATES: Final = (
    None,
    VehicleState.DENIED,
    VehicleState.STARTING,
    VehicleState.READY,
    VehicleState.WORKING,
    VehicleState.YIELDING,
)
NUMBER_OF_STATE: Final = {state: number for number, state in enumerate(STATES) if state is not None}
REASONS: Final = tuple(ReasonCode)
BIT_OF_REASON: Final = {code: 1 << bit for bit, code in enumerate(REASONS)}
UNKNOWN_BOUND: Final = 0xFFFF  # of the stay, in minutes
INCARNATION_DIGITS: Final = 16


def reasons_of(bits: int) -> list[ReasonCode]:
    """The codes of a set of bits."""
    return [code for bit, code in enumerate(REASONS) if bits >> bit & 1]


class Vehicle:
    """What the cell knows of one vehicle."""

    __slots__ = ("_cell", "row")

    def __init__(self, cell: Cell, row: int) -> None:
        self._cell = cell
        self.row = row

    def _number(self, column: str) -> int:
        return int(self._cell.t.vehicles[column][self.row])

    @property
    def vehicle_id(self) -> str:
        """Its name."""
        return self._cell.ids.name(self.row)

    @property
    def incarnation(self) -> str:
        """Of its agent, as it last said."""
        return incarnation(self._cell, self.row)

    @property
    def state(self) -> VehicleState | None:
        """What it last said that it does, None if it has never said anything since the start."""
        return STATES[self._number("state")]

    @property
    def reasons(self) -> list[ReasonCode]:
        """Why it may not work."""
        return reasons_of(self._cell.reason_sets[self._number("reasons")])

    @property
    def model(self) -> str | None:
        """What it has loaded."""
        row = self._number("model")
        return None if row == NONE else self._cell.model_names[row]

    @property
    def region(self) -> str:
        """Where its energy comes from."""
        return self._cell.region_name(self._number("region"))

    @property
    def offline(self) -> bool:
        """Whether it is taken for gone."""
        return bool(self._number("flags") & OFFLINE)

    @property
    def withdrawn(self) -> bool:
        """Whether its owner has taken the consent back."""
        return bool(self._number("flags") & WITHDRAWN)

    @property
    def withdrawal_seen(self) -> bool:
        """Whether the vehicle knows it."""
        return bool(self._number("flags") & WITHDRAWAL_SEEN)

    @property
    def present(self) -> bool:
        """Whether it is here and permitted."""
        return bool(self._cell.k.present(self._cell.t, self.row))

    def usable(self, now_ms: int) -> bool:
        """Whether it can be given work: present, not paused by its owner, and it has not just handed some back."""
        return not self._cell.k.why_not(self._cell.t, self.row, now_ms)

    @property
    def seq(self) -> int:
        """Of its last report, within its incarnation."""
        return self._number("seq")

    @property
    def seen_ms(self) -> int:
        """When it last reported."""
        return self._number("seen_ms")

    @property
    def blocked_until_ms(self) -> int:
        """No work before: it has just handed some back."""
        return self._number("blocked_until_s") * 1000

    @property
    def paused_until_ms(self) -> int:
        """No work before, by its owner's word to the cell."""
        return self._number("paused_until_s") * 1000

    @property
    def failures(self) -> int:
        """Since its last result."""
        return self._number("failures")

    @property
    def live(self) -> int:
        """Live requests placed here and not ended."""
        return self._number("live")

    @property
    def outstanding(self) -> int:
        """Lines that it holds."""
        return self._number("outstanding")

    @property
    def speed(self) -> float:
        """Measured, in work tokens a second; 0 while unknown."""
        return float(self._cell.t.vehicles["speed"][self.row])

    @property
    def leases(self) -> list[int]:
        """The rows of its leases."""
        return self._cell.leases_of(self.row)


class Lease:
    """The right of one vehicle to run some lines of one job."""

    __slots__ = ("_cell", "job", "lease_id", "row")

    def __init__(self, cell: Cell, row: int, lease_id: str, job: Job) -> None:
        self._cell = cell
        self.row = row
        self.lease_id = lease_id
        self.job = job

    @property
    def vehicle_id(self) -> str:
        """Who holds it."""
        return self._cell.ids.name(int(self._cell.t.leases["vehicle"][self.row]))

    @property
    def lines(self) -> list[int]:
        """Those that have not ended."""
        return self.job.lines_of(self.row)

    @property
    def seen(self) -> bool:
        """Whether the vehicle has said that it holds it."""
        return bool(self._cell.t.leases["flags"][self.row] & SEEN)


class Vehicles(Mapping[str, Vehicle]):
    """All vehicles by their names."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    def __getitem__(self, vehicle_id: str) -> Vehicle:
        row = self._cell.find(vehicle_id)
        if row < 0:
            raise KeyError(vehicle_id)
        return Vehicle(self._cell, row)

    def __iter__(self) -> Iterator[str]:
        return (self._cell.ids.name(row) for row in self._cell.ids)

    def __len__(self) -> int:
        return len(self._cell.ids)


class Leases(Mapping[str, Lease]):
    """All leases by their names. ``find`` gives the row of one or NONE, ``name`` the name of a row."""

    def __init__(
        self, cell: Cell, find: Callable[[str], int], name: Callable[[int], str], job: Callable[[int], Job]
    ) -> None:
        self._cell = cell
        self._find = find
        self._name = name
        self._job = job

    def __getitem__(self, lease_id: str) -> Lease:
        row = self._find(lease_id)
        if row < 0:
            raise KeyError(lease_id)
        return Lease(self._cell, row, lease_id, self._job(row))

    def __iter__(self) -> Iterator[str]:
        return (self._name(int(row)) for row in self._cell.all_leases())

    def __len__(self) -> int:
        return int((self._cell.t.leases["number"] != NONE).sum())


def incarnation(cell: Cell, row: int) -> str:
    """Of a vehicle's agent: sixteen hexadecimal digits, as agents draw, stand in the table, other words beside it."""
    number = int(cell.t.vehicles["incarnation"][row])
    return f"{number:016x}" if number else cell.other_incarnations.get(row, "")


def incarnation_number(value: str) -> int:
    """Of a word that agents draw, which the table can hold; 0 of any other word."""
    drawn = len(value) == INCARNATION_DIGITS and not value.strip("0123456789abcdef")
    return int(value, 16) if drawn else 0


def set_incarnation(cell: Cell, row: int, value: str) -> None:
    """Remember it."""
    number = incarnation_number(value)
    cell.t.vehicles["incarnation"][row] = number
    if number or not value:
        cell.other_incarnations.pop(row, None)
    else:  # sixteen zeros are such a word too
        cell.other_incarnations[row] = value
