"""The operator's handles on the scheduler: why a job or a vehicle stands still, and what is set for the fleet.

What is set goes into the books first and to the scheduler then, so that it acts at once and after a restart.
Called by: ``server.admin.app``. Must not: show what vehicles keep to themselves.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from motorpool import wire
from motorpool.core import events as ev
from motorpool.core import why
from motorpool.core.terms import MAX_TRUST, MAX_WATTS, MAX_WEIGHT, MIN_WEIGHT
from motorpool.core.why_words import MAX_JOBS, JobWhy
from motorpool.errors import CallerError, ConflictError, NotFoundError
from motorpool.server.admin.replies import body_of, json_response
from motorpool.server.admin.views import BatchWhy, VehicleReasons
from motorpool.server.loop import CellLoop
from motorpool.store import fleet_settings
from motorpool.store.fleet_settings import Customer, Site, VehicleSettings

MAX_SITE_VEHICLES: Final = 10_000_000
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_errors: Final = msgspec.json.Decoder(list[dict[str, object]])
_ENDED: Final = {
    "validating": "its file is being checked",
    "finalizing": "every line has ended; its files are being written",
    "completed": "it is completed",
    "expired": "its window closed before it was done; what was finished is kept",
    "cancelled": "its customer has cancelled it",
    "failed": "it was refused",
}


class VehicleChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be set for a vehicle; what is left out stays. ``site`` "": none."""

    site: str | None = None
    trust: Annotated[int, Meta(ge=0, le=MAX_TRUST)] | None = None
    reserve: bool | None = None


class SiteChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of a site; what is left out stays, 0: no limit."""

    limit_w: Annotated[int, Meta(ge=0, le=MAX_WATTS)] | None = None
    limit_vehicles: Annotated[int, Meta(ge=0, le=MAX_SITE_VEHICLES)] | None = None


class CustomerChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The share of a customer, relative to those of others."""

    weight: Annotated[float, Meta(ge=MIN_WEIGHT, le=MAX_WEIGHT)]


class FleetAdmin:
    """The handlers."""

    def __init__(self, cell: CellLoop) -> None:
        self._cell = cell

    # -- why -----------------------------------------------------------------------------------------------------------

    async def batch_why(self, request: Request) -> Response:
        """GET /v1/batches/ID/why: how a batch stands, and what every vehicle is to it."""
        batch_id = request.path_params["batch_id"]
        row = self._cell.reader.execute("SELECT * FROM batch WHERE batch_id = ?", (batch_id,)).fetchone()
        if row is None:
            raise NotFoundError("there is no such batch", code="batch_not_found", param="batch_id")
        found = await self._look(row["batch_no"])
        if found is not None:
            return json_response(BatchWhy(batch_id=batch_id, status=row["status"], words=found.words, why=found))
        words = _ENDED.get(row["status"], row["status"])
        errors = [str(each["message"]) for each in _errors.decode(row["errors"] or "[]")[:MAX_JOBS]]
        return json_response(BatchWhy(batch_id=batch_id, status=row["status"], words=words, errors=errors))

    async def _look(self, job_no: int) -> JobWhy | None:
        """Ask all vehicles, and let others have their turn in between; None if the job is not in progress."""
        scheduler = self._cell.scheduler
        await asyncio.to_thread(why.warm, len(scheduler.vehicles))
        numbers = np.zeros(why.CODES, np.int64)
        now = self._cell.now_ms()
        for rows in why.parts(scheduler.cell):
            job = scheduler.jobs.get(job_no)
            if job is None:
                return None
            why.ask(scheduler.cell, rows, job.row, now, numbers)
            await asyncio.sleep(0)
        return why.why_job(scheduler, job_no, now, numbers) if job_no in scheduler.jobs else None

    async def vehicle_why(self, request: Request) -> Response:
        """GET /v1/vehicles/ID/why: why a vehicle gets nothing now, and what it holds."""
        vehicle_id = request.path_params["vehicle_id"]
        if fleet_settings.find_vehicle_settings(self._cell.reader, vehicle_id) is None:
            raise _no_vehicle()
        found = why.why_vehicle(self._cell.scheduler, vehicle_id, self._cell.now_ms())
        state = self._cell.vehicle_state(vehicle_id)
        return json_response(
            VehicleReasons(
                vehicle_id=vehicle_id,
                words="the cell has not heard of it since it was started" if found is None else found.words,
                reasons=state.reasons if state else [],
                why=found,
            )
        )

    # -- what is set ---------------------------------------------------------------------------------------------------

    async def set_vehicle(self, request: Request) -> Response:
        """PATCH /v1/vehicles/ID: its site, its tier of trust, reserve or not."""
        vehicle_id = wire.check_id(request.path_params["vehicle_id"], "vehicle_id")
        change = await body_of(request, VehicleChange)

        def save(db: sqlite3.Connection) -> VehicleSettings:
            before = fleet_settings.find_vehicle_settings(db, vehicle_id)
            if before is None:
                raise _no_vehicle()
            given = {name: value for name, value in msgspec.structs.asdict(change).items() if value is not None}
            after = msgspec.structs.replace(before, **given)
            if after.site and fleet_settings.find_site(db, after.site) is None:
                raise _no_site()
            fleet_settings.save_vehicle_settings(db, after)
            return after

        settings = await self._cell.write(save)
        await self.configure(settings)
        return json_response(settings)

    async def configure(self, settings: VehicleSettings) -> None:
        """Let the scheduler do as it is set for a vehicle."""
        await self._cell.configure(
            ev.VehicleConfigured(
                cause_id="operator",
                vehicle_id=settings.vehicle_id,
                site=settings.site,
                trust=settings.trust,
                reserve=settings.reserve,
            )
        )

    async def sites(self, request: Request) -> Response:
        """GET /v1/sites: all sites with their limits and how many vehicles stand there."""
        del request
        return json_response(fleet_settings.list_sites(self._cell.reader))

    async def set_site(self, request: Request) -> Response:
        """PUT /v1/sites/NAME: a new site, or other limits."""
        name = request.path_params["name"]
        if not _SITE.fullmatch(name):
            raise CallerError(
                "a site's name has 1 to 64 of letters, digits, dot, dash and underscore, and begins with one of the "
                "first two",
                code="invalid_value",
                param="name",
            )
        change = await body_of(request, SiteChange)

        def save(db: sqlite3.Connection) -> Site:
            before = fleet_settings.find_site(db, name)
            if before is None and fleet_settings.count_sites(db) >= fleet_settings.MAX_SITES:
                raise ConflictError(f"there are {fleet_settings.MAX_SITES} sites already", code="too_many_sites")
            given = {key: value for key, value in msgspec.structs.asdict(change).items() if value is not None}
            after = msgspec.structs.replace(before or Site(name=name), **given)
            fleet_settings.save_site(db, after)
            return after

        site = await self._cell.write(save)
        await self._configure_site(site)
        return json_response(site)

    async def remove_site(self, request: Request) -> Response:
        """DELETE /v1/sites/NAME: a site where no vehicle stands."""
        name = request.path_params["name"]

        def remove(db: sqlite3.Connection) -> None:
            if fleet_settings.find_site(db, name) is None:
                raise _no_site()
            if not fleet_settings.remove_site(db, name):
                raise ConflictError("vehicles stand there: set another site for them first", code="site_in_use")

        await self._cell.write(remove)
        await self._configure_site(Site(name=name))
        return Response(status_code=204)

    async def _configure_site(self, site: Site) -> None:
        await self._cell.configure(
            ev.SiteConfigured(
                cause_id="operator", site=site.name, limit_w=site.limit_w, limit_vehicles=site.limit_vehicles
            )
        )

    async def customers(self, request: Request) -> Response:
        """GET /v1/customers: the accounts and their shares."""
        del request
        return json_response(fleet_settings.list_customers(self._cell.reader))

    async def set_customer(self, request: Request) -> Response:
        """PUT /v1/customers/ACCOUNT: the share of a customer."""
        change = await body_of(request, CustomerChange)
        customer = Customer(account=request.path_params["account"], weight=change.weight)

        def save(db: sqlite3.Connection) -> None:
            if customer.account not in {each.account for each in fleet_settings.list_customers(db)}:
                raise NotFoundError("no key opens such an account", code="customer_not_found", param="account")
            fleet_settings.save_customer(db, customer)

        await self._cell.write(save)
        event = ev.CustomerConfigured(cause_id="operator", account=customer.account, weight=customer.weight)
        await self._cell.configure(event)
        return json_response(customer)


def _no_vehicle() -> NotFoundError:
    return NotFoundError("there is no such vehicle", code="vehicle_not_found", param="vehicle_id")


def _no_site() -> NotFoundError:
    return NotFoundError(
        "there is no such site: make it first with `motorpool sites set`", code="site_not_found", param="site"
    )
