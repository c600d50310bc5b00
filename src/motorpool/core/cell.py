"""The columns of one cell and the names of their rows: what the scheduler and the simulator hold in common.

Called by: ``core.scheduler``, ``sim``. Must not: decide; ``core.kernels`` does, which ``k`` names, plain or compiled.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from motorpool.core import kernels
from motorpool.core.columns import (
    ANY_REGION,
    JOB,
    LEASE,
    MAX_MODELS,
    MAX_REGIONS,
    MODEL,
    NEVER,
    NONE,
    RISK_BUCKETS,
    SITE,
    TENANT,
    TIERS,
    VEHICLE,
    Ints,
    Tables,
    empty,
    grown,
    more,
)
from motorpool.core.ids import Ids
from motorpool.core.jit import compiled
from motorpool.errors import CapacityError

FIRST_ROWS: Final = 64
USUAL_WORK: Final = 256.0  # of a line of which nothing is known yet, work tokens
LEASE_ROWS: Final = (1 << kernels.LEASE_ROW_BITS) - 1
CLAIMED_MODELS: Final = 4_096  # vehicles may claim any name: names beyond so many are no model to the cell
MAX_REASON_SETS: Final = 0xFFFF
_REGIONS: Final = MAX_REGIONS + 1


class Cell:
    """Tables that grow, and the names of vehicles, models, regions, customers and sites.

    ``fast``: compiled kernels, which pay from some thousand vehicles on; the results are the same.
    """

    def __init__(self, *, fast: bool = False) -> None:
        self.k: Any = compiled(kernels) if fast else kernels
        self.ids = Ids()
        self.model_names: list[str] = []
        self.region_names: list[str] = [""]  # where a vehicle is that has not said it
        self.tenant_names: list[str] = []
        self.site_names: list[str] = [""]
        self._models: dict[str, int] = {}
        self._regions: dict[str, int] = {"": 0}
        self._tenants: dict[str, int] = {}
        self._sites: dict[str, int] = {"": 0}
        self.out: Ints = np.zeros(2, np.int64)
        self.t = Tables(
            vehicles=empty(VEHICLE, FIRST_ROWS),
            leases=_leases(FIRST_ROWS),
            jobs=empty(JOB, FIRST_ROWS),
            tenants=empty(TENANT, 8),
            models=empty(MODEL, 4),
            sites=empty(SITE, 8),
            order=np.zeros(FIRST_ROWS, np.int32),
            buckets=np.full(4 * _REGIONS * RISK_BUCKETS, NONE, np.int32),
            prices=np.full(_REGIONS, NONE, np.int32),
            speeds=np.zeros((4, _REGIONS, TIERS), np.int64),
            needs=np.zeros((4, _REGIONS, TIERS), np.int64),
            tight=np.zeros((4, _REGIONS), np.int64),
            free=np.array([0, 0, 1, 0], np.int64),
        )
        self.other_incarnations: dict[int, str] = {}  # those that do not fit the table
        self.reason_sets: list[int] = [0]  # sets of reasons, one bit a code, that vehicles have named
        self._reason_sets: dict[int, int] = {0: 0}
        self.free_jobs: list[int] = list(range(FIRST_ROWS - 1, -1, -1))

    # -- rows ----------------------------------------------------------------------------------------------------------

    def vehicle(self, vehicle_id: str) -> int:
        """The row of a vehicle, a new one if it is not known."""
        row = self.ids.add(vehicle_id)
        if row >= len(self.t.vehicles):
            self.t = self.t._replace(vehicles=grown(self.t.vehicles, more(len(self.t.vehicles), FIRST_ROWS)))
        return row

    def vehicles(self, vehicle_ids: list[str]) -> Ints:
        """The rows of many vehicles, new ones for those that are not known."""
        rows = self.ids.add_all(vehicle_ids)
        if self.ids.rows > len(self.t.vehicles):
            room = max(more(len(self.t.vehicles), FIRST_ROWS), self.ids.rows)
            self.t = self.t._replace(vehicles=grown(self.t.vehicles, room))
        return rows

    def find(self, vehicle_id: str) -> int:
        """The row of a vehicle, or NONE."""
        return self.ids.find(vehicle_id)

    def model(self, name: str) -> int:
        """The row of a model."""
        known = self._models.get(name)
        if known is not None:
            return known
        if len(self.model_names) == len(self.t.models):
            unused = np.flatnonzero((self.t.models["serving"] == 0) & (self.t.models["jobs"] == 0))
            if len(unused):  # vehicles may claim any name: what nobody serves or asks for gives its row away
                row = int(unused[0])
                del self._models[self.model_names[row]]
                self.model_names[row] = name
                self._models[name] = row
                return row
        if len(self.model_names) == MAX_MODELS:
            raise CapacityError(f"a cell has room for {MAX_MODELS:,} models", code="too_many_models")
        row = _numbered(name, self._models, self.model_names)
        if row >= len(self.t.models):
            models = 2 * len(self.t.models)
            buckets = np.full(models * _REGIONS * RISK_BUCKETS, NONE, np.int32)
            buckets[: len(self.t.buckets)] = self.t.buckets
            more = models - len(self.t.models)
            self.t = self.t._replace(
                models=grown(self.t.models, models),
                buckets=buckets,
                speeds=np.concatenate((self.t.speeds, np.zeros((more, _REGIONS, TIERS), np.int64))),
                needs=np.concatenate((self.t.needs, np.zeros((more, _REGIONS, TIERS), np.int64))),
                tight=np.concatenate((self.t.tight, np.zeros((more, _REGIONS), np.int64))),
            )
        return row

    def claimed_model(self, name: str) -> int:
        """The row of a model that a vehicle says it has, or NONE: such names leave room for those of jobs."""
        known = self._models.get(name)
        if known is not None:
            return known
        if len(self.model_names) < CLAIMED_MODELS or self._unused_models():
            return self.model(name)
        return NONE

    def _unused_models(self) -> bool:
        """Whether every row has a name, and one of them nobody serves or asks for."""
        models = self.t.models
        full = len(self.model_names) == len(models)
        return full and bool(((models["serving"] == 0) & (models["jobs"] == 0)).any())

    def find_model(self, name: str) -> int:
        """The row of a model, or NONE."""
        return self._models.get(name, NONE)

    def region(self, name: str) -> int:
        """The number of a region; those beyond MAX_REGIONS share the last one, which no residency names."""
        if name not in self._regions and len(self.region_names) >= MAX_REGIONS:
            return MAX_REGIONS
        row = _numbered(name, self._regions, self.region_names)
        self.t.free[2] = len(self.region_names)
        return row

    def region_name(self, row: int) -> str:
        """What a region is called."""
        return self.region_names[row] if row < len(self.region_names) else ""

    def tenant(self, name: str) -> int:
        """The row of a customer."""
        row = _numbered(name, self._tenants, self.tenant_names)
        if row >= len(self.t.tenants):
            self.t = self.t._replace(tenants=grown(self.t.tenants, 2 * len(self.t.tenants)))
        if self.t.tenants["weight"][row] == 0:
            self.t.tenants["weight"][row] = 1.0
        return row

    def site(self, name: str) -> int:
        """The row of a site; 0 stands for none."""
        row = _numbered(name, self._sites, self.site_names)
        if row >= len(self.t.sites):
            self.t = self.t._replace(sites=grown(self.t.sites, 2 * len(self.t.sites)))
        return row

    def job(self) -> int:
        """A free row for a job."""
        if not self.free_jobs:
            rows = len(self.t.jobs)
            self.t = self.t._replace(
                jobs=grown(self.t.jobs, 2 * rows), order=np.concatenate((self.t.order, np.zeros(rows, np.int32)))
            )
            self.free_jobs = list(range(2 * rows - 1, rows - 1, -1))
        return self.free_jobs.pop()

    def enter_job(
        self,
        *,
        job_no: int,
        expires_ms: int,
        model: str,
        tenant: str,
        total: int,
        most_work: float,
        regions: int = ANY_REGION,
        min_trust: int = 0,
        memory_gb: int = 0,
        flags: int = 0,
    ) -> int:
        """A job comes into the table; its row. ``regions`` is a mask, ``most_work`` what a line can be at most."""
        row = self.job()
        m, customer = self.model(model), self.tenant(tenant)
        t = self.t
        usual = float(t.models["usual_work"][m]) or USUAL_WORK
        t.jobs[row : row + 1] = np.zeros(1, JOB)
        for column, value in (
            ("job_no", job_no),
            ("expires_ms", expires_ms),
            ("model", m),
            ("tenant", customer),
            ("total", total),
            ("slack_ms", NEVER),
            ("bid_micro_kwh", np.inf),  # whatever energy costs, unless it may wait for cheaper hours
            ("work_per_line", min(usual, most_work)),
            ("regions", regions),
            ("min_trust", min_trust),
            ("memory_gb", memory_gb),
            ("flags", flags),
        ):
            t.jobs[column][row] = value
        t.models["jobs"][m] += 1
        busy = t.tenants["active"] > 0
        if t.tenants["active"][customer] == 0 and busy.any():  # who comes back has saved up nothing
            had = float(t.tenants["used"][busy].min())
            t.tenants["used"][customer] = max(float(t.tenants["used"][customer]), had)
        t.tenants["active"][customer] += 1
        return row

    def leave_job(self, row: int) -> None:
        """A job is over: its row can have another."""
        t = self.t
        model = int(t.jobs["model"][row])
        t.models["jobs"][model] -= 1
        if t.jobs["done_work"][row] > 0:
            t.models["usual_work"][model] = t.jobs["work_per_line"][row]
        t.tenants["active"][int(t.jobs["tenant"][row])] -= 1
        self.free_jobs.append(row)

    def lease(self, v: int, j: int, count: int, work: float, *, now_ms: int, expires_ms: int) -> int:
        """A new lease; its row."""
        row = int(self.k.open_lease(self.t, v, j, count, work, now_ms, expires_ms))
        if row != NONE:
            return row
        self.more_leases()
        return int(self.k.open_lease(self.t, v, j, count, work, now_ms, expires_ms))

    def serves(self, v: int, model: int) -> bool:
        """Whether a vehicle is present and has a model loaded."""
        place = int(self.t.vehicles["counted_place"][v])
        return place != NONE and place // (_REGIONS * TIERS) == model

    def more_leases(self) -> None:
        """The table of leases is full: it grows."""
        rows = len(self.t.leases)
        leases = grown(self.t.leases, min(more(rows, FIRST_ROWS), LEASE_ROWS))
        leases["next"][rows:-1] = np.arange(rows + 1, len(leases))
        self.t.free[0] = rows
        self.t = self.t._replace(leases=leases)

    def expires_ms(self, row: int) -> int:
        """When a lease runs out."""
        return int(self.t.leases["granted_ms"][row]) + int(self.t.leases["life_ms"][row])

    def reason_set(self, bits: int) -> int:
        """The number of a set of reasons: there are few, and a vehicle has room for a number.

        When MAX_REASON_SETS are in use at one time, further ones count as none: they are only shown.
        """
        number = self._reason_sets.get(bits)
        if number is None:
            number = len(self.reason_sets)
            if number == MAX_REASON_SETS:
                used = np.zeros(MAX_REASON_SETS, np.bool_)
                used[self.t.vehicles["reasons"]] = True
                used[0] = True
                if used.all():
                    return 0
                number = int(np.argmin(used))
                del self._reason_sets[self.reason_sets[number]]
                self.reason_sets[number] = bits
            else:
                self.reason_sets.append(bits)
            self._reason_sets[bits] = number
        return number

    def leases_of(self, v: int) -> list[int]:
        """The rows of a vehicle's leases, oldest first."""
        rows = []
        row = int(self.t.vehicles["lease"][v])
        while row != NONE:
            rows.append(row)
            row = int(self.t.leases["next"][row])
        return rows[::-1]

    def all_leases(self) -> npt.NDArray[np.int64]:
        """The rows of all leases, in the order of their making."""
        rows = np.flatnonzero(self.t.leases["number"] != NONE)
        return rows[np.argsort(self.t.leases["number"][rows], kind="stable")]

    def forget_vehicle(self, v: int) -> None:
        """A vehicle that has no lease any more leaves the tables."""
        self.ids.remove(v)
        self.other_incarnations.pop(v, None)
        self.t.vehicles[v : v + 1] = empty(VEHICLE, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns and the names of vehicles."""
        return sum(table.nbytes for table in self.t) + self.ids.nbytes


def _leases(rows: int) -> npt.NDArray[Any]:
    table = empty(LEASE, rows)
    table["next"][:-1] = np.arange(1, rows)
    return table


def _numbered(name: str, numbers: dict[str, int], names: list[str]) -> int:
    number = numbers.get(name)
    if number is None:
        number = numbers[name] = len(names)
        names.append(name)
    return number
