"""The operator's HTTP interface, on an address of its own, with a key of its own.

Shows counts, states and reasons; never prompts, results, places or keys of customers. Called by: ``server.main``.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlencode

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from motorpool import wire
from motorpool.core.attribution import UWH_PER_MWH
from motorpool.errors import AuthenticationError, CallerError, MotorpoolError, NotFoundError
from motorpool.server.admin.fleet import FleetAdmin
from motorpool.server.admin.replies import json_response
from motorpool.server.admin.views import BatchView, OwnerLink, StatusView, StoryEntry, VehicleView
from motorpool.server.loop import CellLoop
from motorpool.server.owner.sessions import CODE_MS, new_code
from motorpool.store import books, fleet_settings, owners
from motorpool.trust.credentials import CellIdentity

RECENT_BATCHES: Final = 20
MAX_STORY: Final = 500
_PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")
Handler = Callable[[Request], Awaitable[Response]]


class NewVehicle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of an enrolment."""

    vehicle_id: str
    name: str = ""
    owner_key: str = ""


class Admin:
    """The handlers; each needs the operator's key."""

    def __init__(
        self, cell: CellLoop, identity: CellIdentity, urls: list[str], key: str, currency: str, *, api_url: str = ""
    ) -> None:
        self._cell = cell
        self._api_url = api_url  # where owners reach the cell, as it stands in their links
        self._identity = identity
        self._urls = urls
        self._key = key.encode()
        self._currency = currency
        self._fleet = FleetAdmin(cell)

    def app(self) -> Starlette:
        """The ASGI application."""
        fleet = self._fleet
        routes = [
            ("/v1/status", self.status, "GET"),
            ("/v1/vehicles", self.vehicles, "GET"),
            ("/v1/vehicles", self.enrol, "POST"),
            ("/v1/vehicles/{vehicle_id}", self.vehicle, "GET"),
            ("/v1/vehicles/{vehicle_id}", self.revoke, "DELETE"),
            ("/v1/vehicles/{vehicle_id}/owner-link", self.owner_link, "POST"),
            ("/v1/vehicles/{vehicle_id}/story", self.story, "GET"),
            ("/v1/batches/{vehicle_id}/story", self.story, "GET"),
            ("/v1/vehicles/{vehicle_id}", fleet.set_vehicle, "PATCH"),
            ("/v1/vehicles/{vehicle_id}/why", fleet.vehicle_why, "GET"),
            ("/v1/batches/{batch_id}/why", fleet.batch_why, "GET"),
            ("/v1/sites", fleet.sites, "GET"),
            ("/v1/sites/{name}", fleet.set_site, "PUT"),
            ("/v1/sites/{name}", fleet.remove_site, "DELETE"),
            ("/v1/customers", fleet.customers, "GET"),
            ("/v1/customers/{account:path}", fleet.set_customer, "PUT"),
        ]
        return Starlette(routes=[Route(path, self._guarded(call), methods=[method]) for path, call, method in routes])

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
                if not hmac.compare_digest(given, self._key):
                    raise AuthenticationError("the operator's key is missing or wrong; it is in admin.key")
                return await handler(request)
            except MotorpoolError as error:
                return json_response(error.envelope(), error.status)

        return guarded

    # -- views ---------------------------------------------------------------------------------------------------------

    def _vehicle_views(self) -> list[VehicleView]:
        now = self._cell.now_ms()
        views = []
        for row in books.list_vehicles(self._cell.reader):
            known = self._cell.scheduler.vehicles.get(row["vehicle_id"])
            state = self._cell.vehicle_state(row["vehicle_id"])
            views.append(
                VehicleView(
                    vehicle_id=row["vehicle_id"],
                    name=row["name"],
                    state=state.state.value if state else "offline",
                    reasons=state.reasons if state else [],
                    permit_w=state.permit_w if state else 0,
                    model=state.model if state else None,
                    engine=state.engine if state else "",
                    slots=state.slots if state else 0,
                    running=state.running if state else 0,
                    queued=state.queued if state else 0,
                    tokens_per_s=state.tokens_per_s if state else 0.0,
                    tokens_generated=row["tokens_generated"],
                    lines_done=row["lines_done"],
                    tokens_handed_on=row["tokens_handed_on"],
                    tokens_taken_over=row["tokens_taken_over"],
                    energy_mwh=row["energy_uwh"] // UWH_PER_MWH,
                    energy_is_measured=state.energy_is_measured if state else False,
                    earned_micro=row["earned_micro"],
                    soc_pct=state.soc_pct if state else None,
                    plugged=state.plugged if state else None,
                    seen_ms_ago=now - known.seen_ms if known is not None and known.seen_ms else None,
                    leases=len(known.leases) if known is not None else 0,
                    tier=state.tier.value if state and state.permit_w else None,
                    battery_fed=state.battery_fed if state else False,
                    stay_bound_ms=state.stay_bound_ms if state else None,
                    risk_15min=state.risk_15min if state else None,
                    region=row["region"],
                    energy_uwh=row["energy_uwh"],
                    co2_ug=row["co2_ug"],
                    owner_known=bool(row["owner_key"]),
                    withdrawn=row["withdrawn_ms"] is not None,
                    paused_until_ms=row["paused_until_ms"] if row["paused_until_ms"] > now else None,
                    site=row["site"],
                    trust=row["trust"],
                    reserve=bool(row["reserve"]),
                )
            )
        return views

    def _batch_views(self) -> list[BatchView]:
        views = []
        for row in books.recent_batches(self._cell.reader, RECENT_BATCHES):
            job = self._cell.scheduler.jobs.get(row["batch_no"])
            views.append(
                BatchView(
                    batch_id=row["batch_id"],
                    status=row["status"],
                    model=row["model"],
                    total=row["total"],
                    completed=row["completed"],
                    failed=row["failed"],
                    leased=job.leased if job else 0,
                    tokens_generated=row["completion_tokens"],
                    tokens_carried=row["carried_tokens"],
                    cost_micro=row["cost_micro"],
                    created_ms=row["created_ms"],
                    expires_ms=row["expires_ms"],
                    left_ms=job.left_ms() if job else None,
                )
            )
        return views

    async def status(self, request: Request) -> Response:
        """GET /v1/status: everything that a live display needs."""
        del request
        vehicles = self._vehicle_views()
        return json_response(
            StatusView(
                now_ms=self._cell.now_ms(),
                currency=self._currency,
                tokens_per_s=sum(view.tokens_per_s for view in vehicles),
                vehicles=vehicles,
                batches=self._batch_views(),
            )
        )

    async def vehicles(self, request: Request) -> Response:
        """GET /v1/vehicles."""
        del request
        return json_response(self._vehicle_views())

    async def vehicle(self, request: Request) -> Response:
        """GET /v1/vehicles/ID."""
        wanted = request.path_params["vehicle_id"]
        for view in self._vehicle_views():
            if view.vehicle_id == wanted:
                return json_response(view)
        raise NotFoundError("there is no such vehicle", code="vehicle_not_found", param="vehicle_id")

    async def story(self, request: Request) -> Response:
        """GET /v1/vehicles/ID/story and /v1/batches/ID/story: what happened, oldest first."""
        rows = books.read_story(self._cell.reader, request.path_params["vehicle_id"], MAX_STORY)
        return json_response([StoryEntry(at_ms=row[0], cause_id=row[1], what=row[2]) for row in rows])

    # -- changes -------------------------------------------------------------------------------------------------------

    async def enrol(self, request: Request) -> Response:
        """POST /v1/vehicles: the credentials of a new vehicle; they are shown once and kept nowhere."""
        try:
            new = msgspec.json.decode(await request.body(), type=NewVehicle)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CallerError(f"the body is not an enrolment: {error}") from error
        if new.owner_key and not _PUBLIC_KEY.fullmatch(new.owner_key):
            raise CallerError(
                "owner_key is no public key: it is the content of owner.pub", code="invalid_value", param="owner_key"
            )
        credentials = self._identity.enrol(new.vehicle_id, self._urls, self._cell.now_ms() // 1000)
        now = self._cell.now_ms()
        await self._cell.write(
            lambda db: books.add_vehicle(db, new.vehicle_id, new.name or new.vehicle_id, new.owner_key, now)
        )
        self._cell.enrolled.add(new.vehicle_id)
        settings = fleet_settings.find_vehicle_settings(self._cell.reader, new.vehicle_id)
        if settings is not None and settings != fleet_settings.VehicleSettings(vehicle_id=new.vehicle_id):
            await self._fleet.configure(settings)  # it was struck off, and is as it was set before
        if new.vehicle_id in self._cell.scheduler.vehicles:  # with another owner, whose word counts from now on
            await self._cell.owner_spoke(new.vehicle_id, "enrolled again", cause="operator")
        return json_response(credentials, 201)

    async def owner_link(self, request: Request) -> Response:
        """POST /v1/vehicles/ID/owner-link: a link by which the owner's device registers its key; shown once."""
        vehicle_id = wire.check_id(request.path_params["vehicle_id"], "vehicle_id")
        code, digest = new_code()
        expires_ms = self._cell.now_ms() + CODE_MS
        await self._cell.write(lambda db: owners.add_code(db, digest, vehicle_id, expires_ms))
        link = "motorpool://enrol?" + urlencode({"api": self._api_url, "vehicle": vehicle_id, "code": code})
        return json_response(OwnerLink(link=link, code=code, expires_ms=expires_ms), 201)

    async def revoke(self, request: Request) -> Response:
        """DELETE /v1/vehicles/ID: the vehicle gets no more work and nothing that it sends is accepted."""
        vehicle_id = wire.check_id(request.path_params["vehicle_id"], "vehicle_id")
        now = self._cell.now_ms()
        if not await self._cell.write(lambda db: books.revoke_vehicle(db, vehicle_id, now)):
            raise NotFoundError("there is no such vehicle", code="vehicle_not_found", param="vehicle_id")
        self._cell.strike_off(vehicle_id)
        return Response(status_code=204)
