"""What operators set acts at once and after a restart: shares of customers, limits of sites, trust, reserves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.cell_world import World, a_world, chat
from tests.cell_world import run as run_world
from tests.test_scheduler import grants, of, report, results, returned, started

from motorpool import wire
from motorpool.cli import jobs as jobs_cli
from motorpool.cli import operator as operator_cli
from motorpool.cli import sites as sites_cli
from motorpool.core import events as ev
from motorpool.core.columns import BEHIND
from motorpool.core.scheduler import Scheduler
from motorpool.server.admin.views import BatchWhy, VehicleReasons
from motorpool.types import Reason, VehicleState

RATE = 20  # lines a second of each vehicle
VEHICLES = ("v1", "v2", "v3", "v4")
WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0}


def job(job_no: int, lines: int, **terms: Any) -> ev.JobStarted:
    return msgspec.structs.replace(started(lines, job_no), **terms)


def configured(vehicle: str, *, site: str = "", trust: int = 0, reserve: bool = False) -> ev.VehicleConfigured:
    return ev.VehicleConfigured(cause_id="o", vehicle_id=vehicle, site=site, trust=trust, reserve=reserve)


def site(name: str, limit_w: int = 0, limit_vehicles: int = 0) -> ev.SiteConfigured:
    return ev.SiteConfigured(cause_id="o", site=name, limit_w=limit_w, limit_vehicles=limit_vehicles)


class Running:
    """Vehicles that finish up to RATE lines in each second; ``done`` counts them by account."""

    def __init__(self, scheduler: Scheduler, vehicles: list[str]) -> None:
        self.scheduler = scheduler
        self.held: dict[str, list[ev.SendGrant]] = {vehicle: [] for vehicle in vehicles}
        self.second = 0

    def _take(self, commands: list[ev.Command]) -> None:
        for grant in grants(commands):
            self.held[grant.vehicle_id].append(grant)

    def run(self, seconds: int) -> Counter[str]:
        done: Counter[str] = Counter()
        account = {running.job_id: running.account for running in self.scheduler.jobs.values()}
        for _ in range(seconds):
            self.second += 1
            now_ms = self.second * 1000
            for vehicle, held in self.held.items():
                left = RATE
                while left and held:
                    grant = held.pop(0)
                    lines, rest = grant.lines[:left], grant.lines[left:]
                    left -= len(lines)
                    if rest:
                        held.insert(0, msgspec.structs.replace(grant, lines=rest))
                    job_id = f"batch_{grant.job_no}"
                    done[account[job_id]] += len(lines)
                    self._take(self.scheduler.handle(results(vehicle, grant.lease_id, lines, job=job_id), now_ms))
                holds = [grant.lease_id for grant in held]
                self._take(self.scheduler.handle(report(vehicle, self.second, holds), now_ms))
            self._take(self.scheduler.handle(ev.Ticked(cause_id="t"), now_ms))
        self.scheduler.validate()
        return done


def test_customers_get_their_shares_while_work_of_all_waits() -> None:
    scheduler = Scheduler()
    for number, (account, weight) in enumerate(WEIGHTS.items(), start=1):
        scheduler.handle(ev.CustomerConfigured(cause_id="o", account=account, weight=weight), 0)
        scheduler.handle(job(number, 200_000, account=account, expires_ms=500_000_000), 0)
    running = Running(scheduler, ["v1", "v2", "v3"])
    running.run(300)  # queues are filled while speeds are not known
    done = running.run(1_500)
    total = sum(done.values())
    for account, weight in WEIGHTS.items():
        assert done[account] / total == pytest.approx(weight / sum(WEIGHTS.values()), abs=0.04), done


def test_a_share_that_is_changed_counts_from_then_on() -> None:
    scheduler = Scheduler()
    for number, account in enumerate(("a", "b"), start=1):
        scheduler.handle(job(number, 200_000, account=account, expires_ms=500_000_000), 0)
    running = Running(scheduler, ["v1", "v2"])
    running.run(200)
    equal = running.run(1_000)
    assert equal["b"] / sum(equal.values()) == pytest.approx(0.5, abs=0.06)
    scheduler.handle(ev.CustomerConfigured(cause_id="o", account="b", weight=3.0), 1_200_500)
    running.run(1_000)  # what it had counts a third now, so it catches up first
    after = running.run(1_000)
    assert after["b"] / sum(after.values()) > 0.7


def test_a_reserve_works_only_on_what_is_behind() -> None:
    scheduler = Scheduler()
    scheduler.handle(configured("reserve", reserve=True), 0)
    scheduler.handle(job(1, 40_000, expires_ms=700_000), 0)
    lease = grants(scheduler.handle(report("v1", 1), 0))[0]
    assert not grants(scheduler.handle(report("reserve", 1), 0))
    scheduler.handle(results("v1", lease.lease_id, lease.lines), 2_000)
    commands = scheduler.handle(ev.Ticked(cause_id="t"), 3_000)
    assert scheduler.cell.t.jobs["flags"][scheduler.jobs[1].row] & BEHIND
    assert "reserve" in {grant.vehicle_id for grant in grants(commands)}
    assert not grants(scheduler.handle(job(2, 10, account="b", expires_ms=80_000_000, model="n"), 3_100))
    assert not grants(scheduler.handle(report("reserve", 2, model="n"), 3_200))


def test_a_limit_that_is_lowered_takes_lines_back_at_once() -> None:
    scheduler = Scheduler()
    scheduler.handle(site("north", 300), 0)
    scheduler.handle(job(1, 1_000), 0)
    for vehicle in ("v1", "v2", "v3"):
        scheduler.handle(configured(vehicle, site="north"), 0)
        assert grants(scheduler.handle(report(vehicle, 1, permit_w=100), 0))
    scheduler.handle(configured("v4", site="north"), 0)
    assert not grants(scheduler.handle(report("v4", 1, permit_w=100), 0))
    commands = scheduler.handle(site("north", 150), 10)
    assert len({revoke.vehicle_id for revoke in of(commands, ev.SendRevoke)}) == 2
    assert "2 lines taken back: its site is at its limit" in [note.what for note in of(commands, ev.Note)]
    scheduler.validate()
    assert grants(scheduler.handle(configured("v4"), 20)), "elsewhere it may work"


def test_a_permit_that_rises_over_what_the_site_bears_gives_the_lines_to_others() -> None:
    scheduler = Scheduler()
    scheduler.handle(site("north", 200), 0)
    scheduler.handle(job(1, 1_000), 0)
    for vehicle in ("v1", "v2"):
        scheduler.handle(configured(vehicle, site="north"), 0)
        scheduler.handle(report(vehicle, 1, permit_w=100), 0)
    commands = scheduler.handle(report("v2", 2, permit_w=150), 10)
    assert {revoke.vehicle_id for revoke in of(commands, ev.SendRevoke)} == {"v2"}
    scheduler.validate()


class Machine(RuleBasedStateMachine):
    """Vehicles come to sites and leave them, with permits that rise and fall, while limits change."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.now_ms = 0
        self.seq = 0
        self.jobs = 0
        self.granted: list[ev.SendGrant] = []
        self.limits: dict[str, tuple[int, int]] = {}
        self.at: dict[str, str] = {}
        self.permit: dict[str, int] = {}

    def _handle(self, event: ev.SchedulerEvent) -> None:
        self.now_ms += 400
        self.granted += grants(self.scheduler.handle(event, self.now_ms))

    @initialize()
    def begin(self) -> None:
        """Everybody is at work, within what both sites bear."""
        self.hand_in(500)
        for where in ("north", "south"):
            self.limit(where, 200, 2)
        for number, vehicle in enumerate(VEHICLES):
            self.move(vehicle, "north" if number % 2 else "south")
            self.say(vehicle, 90, VehicleState.READY, "i1")
        assert len(self.granted) == len(VEHICLES)

    @rule(lines=st.integers(1, 30))
    def hand_in(self, lines: int) -> None:
        self.jobs += 1
        self._handle(job(self.jobs, lines, expires_ms=self.now_ms + 9_000_000))

    @rule(
        vehicle=st.sampled_from(VEHICLES),
        permit_w=st.sampled_from([40, 90, 150]),
        state=st.sampled_from([VehicleState.READY, VehicleState.READY, VehicleState.YIELDING]),
        incarnation=st.sampled_from(["i1", "i1", "i1", "i2"]),
    )
    def say(self, vehicle: str, permit_w: int, state: VehicleState, incarnation: str) -> None:
        self.seq += 1
        self.permit[vehicle] = permit_w
        held = [grant.lease_id for grant in self.granted if grant.vehicle_id == vehicle][-2:]
        self._handle(report(vehicle, self.seq, held, permit_w=permit_w, state=state, incarnation=incarnation))

    @rule()
    def all_say(self) -> None:
        for vehicle in VEHICLES:
            self.say(vehicle, self.permit[vehicle], VehicleState.WORKING, "i1")

    @rule(vehicle=st.sampled_from(VEHICLES), where=st.sampled_from(["", "north", "south"]))
    def move(self, vehicle: str, where: str) -> None:
        self.at[vehicle] = where
        self._handle(configured(vehicle, site=where))

    @rule(
        where=st.sampled_from(["north", "south"]),
        limit_w=st.sampled_from([0, 100, 200, 300]),
        limit_vehicles=st.integers(0, 3),
    )
    def limit(self, where: str, limit_w: int, limit_vehicles: int) -> None:
        self.limits[where] = (limit_w, limit_vehicles)
        self._handle(site(where, limit_w, limit_vehicles))

    @rule(vehicle=st.sampled_from(VEHICLES), withdrawn=st.booleans(), paused=st.booleans())
    def owner(self, vehicle: str, withdrawn: bool, paused: bool) -> None:
        if withdrawn:
            self.permit[vehicle] = 0
        until_ms = self.now_ms + 5_000 if paused else 0
        self._handle(
            ev.OwnerSpoke(
                cause_id="o", vehicle_id=vehicle, withdrawn=withdrawn, paused_until_ms=until_ms, what="said so"
            )
        )

    @rule(vehicle=st.sampled_from(VEHICLES[:2]))
    def strike_off(self, vehicle: str) -> None:
        self.at.pop(vehicle, None)
        self._handle(ev.VehicleRevoked(cause_id="o", vehicle_id=vehicle))

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.granted:
            grant = data.draw(st.sampled_from(self.granted))
            self._handle(results(grant.vehicle_id, grant.lease_id, grant.lines, job=f"batch_{grant.job_no}"))

    @rule(data=st.data())
    def hand_back(self, data: st.DataObject) -> None:
        if self.granted:
            grant = data.draw(st.sampled_from(self.granted))
            event = returned(grant.vehicle_id, grant.lease_id, grant.lines)
            self._handle(msgspec.structs.replace(event, job_id=f"batch_{grant.job_no}"))

    @rule(seconds=st.sampled_from([1, 1, 400]))
    def wait(self, seconds: int) -> None:
        self.now_ms += 1000 * seconds
        self._handle(ev.Ticked(cause_id="t"))

    @invariant()
    def no_site_gives_more_than_it_bears(self) -> None:
        self.scheduler.validate()
        for where, (limit_w, limit_vehicles) in self.limits.items():
            busy = [
                vehicle
                for vehicle, there in self.at.items()
                if there == where and vehicle in self.scheduler.vehicles
                if self.scheduler.vehicles[vehicle].outstanding
            ]
            assert not limit_vehicles or len(busy) <= limit_vehicles
            assert not limit_w or sum(self.permit.get(vehicle, 0) for vehicle in busy) <= limit_w


TestSites = Machine.TestCase
TestSites.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- through the operator's address ------------------------------------------------------------------------------------


async def batch(world: World, wishes: dict[str, Any] | None = None, lines: int = 4) -> str:
    """Hand in a batch that asks for something; its id, once it is in progress."""
    body = b"".join(
        json.dumps(
            {"custom_id": f"n{n}", "method": "POST", "url": "/v1/chat/completions", "body": chat("hi", 5)}
        ).encode()
        + b"\n"
        for n in range(lines)
    )
    file = (await world.upload(body)).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    made = await world.client.post("/v1/batches", json=asked | ({"motorpool": wishes} if wishes else {}))
    assert made.status_code == 200, made.text
    batch_id = str(made.json()["id"])
    await world.until(lambda: world.status(batch_id) == "in_progress")
    return batch_id


def test_what_is_set_and_asked_for_holds_at_once_and_after_a_crash(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            car = await world.hand_played("v1", region="DE")
            put = world.operator.put
            assert (await put("/v1/sites/north", json={"limit_w": 500, "limit_vehicles": 3})).status_code == 200
            assert (await put("/v1/customers/acme", json={"weight": 2.5})).json() == {"account": "acme", "weight": 2.5}
            batch_id = await batch(world, {"regions": ["DE", "FR"], "min_trust": 2})
            job = world.cell.scheduler.jobs[1]
            assert job.leased == 0
            change = {"site": "north", "trust": 2}
            made = await world.operator.patch("/v1/vehicles/v1", json=change)
            assert made.json() == {"vehicle_id": "v1", "site": "north", "trust": 2, "reserve": False}
            grant = await car.next(wire.Grant)
            why = msgspec.json.decode((await world.operator.get(f"/v1/batches/{batch_id}/why")).content, type=BatchWhy)
            assert why.why is not None
            assert (why.why.held, why.why.regions, why.why.min_trust) == (4, ["DE", "FR"], 2)
            assert (await world.operator.patch("/v1/vehicles/v1", json={"reserve": True})).json()["trust"] == 2

            await world.kill_cell()
            await world.start_cell()
            scheduler = world.cell.scheduler
            t = scheduler.cell.t
            v = scheduler.cell.find("v1")
            assert scheduler.cell.site_names[int(t.vehicles["site"][v])] == "north"
            assert (int(t.sites["limit_w"][1]), int(t.sites["limit_vehicles"][1])) == (500, 3)
            assert t.tenants["weight"][scheduler.cell.tenant("acme")] == 2.5
            assert scheduler.residency == {1: ("DE", "FR")}
            scheduler.validate()
            view = (await world.operator.get("/v1/vehicles/v1")).json()
            assert (view["site"], view["trust"], view["reserve"]) == ("north", 2, True)

            car.region = "NO"  # it has crossed the border
            car.report([grant.lease_id])
            assert (await car.next(wire.Revoke)).lease_id == grant.lease_id
            await world.until(lambda: world.cell.scheduler.jobs[1].leased == 0)
            await car.finish(grant, [0], "m1")
            car.region = "DE"
            assert (await world.operator.patch("/v1/vehicles/v1", json={"reserve": False})).status_code == 200
            car.report([])
            assert sorted(item.line for item in (await car.next(wire.Grant)).items) == [0, 1, 2, 3]
            assert world.completed(batch_id) == 0, "what was made abroad is not taken"

    run_world(test())


def test_a_vehicle_that_is_struck_off_and_comes_back_is_as_it_was_set(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.enrol("v1")
            assert (await world.operator.patch("/v1/vehicles/v1", json={"trust": 3})).status_code == 200
            assert (await world.operator.delete("/v1/vehicles/v1")).status_code == 204
            assert (await world.operator.patch("/v1/vehicles/v1", json={"trust": 1})).status_code == 404
            await world.enrol("v1")
            v = world.cell.scheduler.cell.find("v1")
            assert world.cell.scheduler.cell.t.vehicles["trust"][v] == 3

    run_world(test())


def test_the_operator_hears_what_is_wrong(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            await world.enrol("v1")
            ask = world.operator.request
            for method, path, body, status, code in (
                ("PATCH", "/v1/vehicles/v1", {"site": "nowhere"}, 404, "site_not_found"),
                ("PATCH", "/v1/vehicles/v1", {"trust": 4}, 400, "invalid_request"),
                ("PATCH", "/v1/vehicles/v1", {"thrust": 1}, 400, "invalid_request"),
                ("PATCH", "/v1/vehicles/v9", {"trust": 1}, 404, "vehicle_not_found"),
                ("PUT", "/v1/sites/a%20b", {}, 400, "invalid_value"),
                ("PUT", "/v1/sites/north", {"limit_w": -1}, 400, "invalid_request"),
                ("DELETE", "/v1/sites/north", None, 404, "site_not_found"),
                ("PUT", "/v1/customers/nobody", {"weight": 1}, 404, "customer_not_found"),
                ("PUT", "/v1/customers/acme", {"weight": 0}, 400, "invalid_request"),
                ("GET", "/v1/batches/batch_9/why", None, 404, "batch_not_found"),
                ("GET", "/v1/vehicles/v9/why", None, 404, "vehicle_not_found"),
            ):
                answer = await ask(method, path, json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), (method, path)
            await ask("PUT", "/v1/sites/north", json={})
            await ask("PATCH", "/v1/vehicles/v1", json={"site": "north"})
            assert (await ask("GET", "/v1/sites")).json() == [
                {"name": "north", "limit_w": 0, "limit_vehicles": 0, "vehicles": 1}
            ]
            assert (await ask("DELETE", "/v1/sites/north")).json()["error"]["code"] == "site_in_use"
            await ask("PATCH", "/v1/vehicles/v1", json={"site": ""})
            assert (await ask("DELETE", "/v1/sites/north")).status_code == 204
            assert (await ask("GET", "/v1/customers")).json() == [{"account": "acme", "weight": 1.0}]

    run_world(test())


def test_the_reasons_are_told_in_words(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_world(tmp_path) as world:
            reason = [{"code": "door_open", "detail": "left front"}]
            car = await world.hand_played("v1", region="FR")
            batch_id = await batch(world, {"regions": ["DE"]})
            get = world.operator.get
            job = msgspec.json.decode((await get(f"/v1/batches/{batch_id}/why")).content, type=BatchWhy)
            said = "\n".join(jobs_cli.in_words(job, world.now_ms()))
            assert f"{batch_id} (in_progress): no vehicle can take its lines: most of them (1) are outside" in said
            assert "lines: 0 of 4 done, 0 with 0 vehicles, 4 wait" in said
            assert "asked for: regions DE, trust 0 or more" in said
            assert "are outside the regions that the customer allows (other_region)" in said
            found = msgspec.json.decode((await get("/v1/vehicles/v1/why")).content, type=VehicleReasons)
            told = "\n".join(operator_cli.in_words(found, world.now_ms()))
            assert told.startswith("v1: it is outside the regions that the customer allows")
            assert f"{batch_id}: it is outside the regions" in told
            assert "it holds: nothing" in told
            reasons = msgspec.convert(reason, list[Reason])
            car.report(state=VehicleState.DENIED, reasons=reasons)
            await world.until(lambda: not world.cell.scheduler.vehicles["v1"].present)
            found = msgspec.json.decode((await get("/v1/vehicles/v1/why")).content, type=VehicleReasons)
            told = "\n".join(operator_cli.in_words(found, world.now_ms()))
            assert "its guard allows no work now" in told
            assert "its guard: door open (left front)" in told
            await world.client.post(f"/v1/batches/{batch_id}/cancel")
            await world.ended(batch_id)
            job = msgspec.json.decode((await get(f"/v1/batches/{batch_id}/why")).content, type=BatchWhy)
            assert jobs_cli.in_words(job, world.now_ms()) == [f"{batch_id} (cancelled): its customer has cancelled it"]

    run_world(test())


@pytest.mark.parametrize(
    ("group", "arguments", "answer", "sent", "said"),
    [
        (
            operator_cli.vehicles,
            ["set", "v1", "--site", "north", "--trust", "2", "--reserve"],
            {"vehicle_id": "v1", "site": "north", "trust": 2, "reserve": True},
            ("PATCH", "/v1/vehicles/v1", {"site": "north", "trust": 2, "reserve": True}),
            "v1 is at site north, trust 2, a reserve",
        ),
        (
            sites_cli.sites,
            ["set", "north", "--limit-w", "2000"],
            {"name": "north", "limit_w": 2000},
            ("PUT", "/v1/sites/north", {"limit_w": 2000}),
            "Site north: watts 2000, vehicles at work no limit",
        ),
        (sites_cli.sites, ["remove", "north"], None, ("DELETE", "/v1/sites/north", None), "Site north is forgotten"),
        (
            sites_cli.sites,
            ["list"],
            [{"name": "north", "limit_w": 7, "vehicles": 3}],
            ("GET", "/v1/sites", None),
            "north  7      no limit  3",
        ),
        (
            sites_cli.customers,
            ["set", "a/b", "--weight", "2.5"],
            {"account": "a/b", "weight": 2.5},
            ("PUT", "/v1/customers/a%2Fb", {"weight": 2.5}),
            "a/b has the share 2.5",
        ),
        (
            sites_cli.customers,
            ["list", "--json"],
            [{"account": "a", "weight": 1}],
            ("GET", "/v1/customers", None),
            '[{"account":"a","weight":1.0}]',
        ),
    ],
)
def test_the_commands_send_what_was_said_and_say_what_came_of_it(
    group: click.Group,
    arguments: list[str],
    answer: Any,
    sent: tuple[str, str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[tuple[str, str, Any]] = []

    def serve(_: httpx.Client, method: str, path: str, *, json: Any, timeout: Any) -> httpx.Response:
        del timeout
        seen.append((method, path, json))
        if path == "/v1/vehicles":
            return httpx.Response(200, json=[])
        return httpx.Response(204) if answer is None else httpx.Response(200, json=answer)

    monkeypatch.setattr(httpx.Client, "request", serve)
    monkeypatch.setattr(operator_cli.AdminClient, "id_of", lambda _, word: word)
    group.main([*arguments, "--admin-url", "http://127.0.0.1:9", "--admin-key", "k"], standalone_mode=False)
    assert seen == [sent]
    out = capsys.readouterr()
    assert said in out.out + out.err
