"""What a vehicle says of its computer, what the cell makes of it, and that live requests count at a site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.test_cell_scheduler import grants, report, returned, started

from motorpool import wire
from motorpool.agent.main import AgentConfig, memory_gb, on_disk
from motorpool.agent.parts import PartsConfig
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.catalogue import Catalogue, FileSource, Model
from motorpool.core import events as ev
from motorpool.core.kernels import OK, TOO_LITTLE_MEMORY
from motorpool.core.scheduler import Scheduler
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import LinkChanged, PublishState, VehicleConfig
from motorpool.errors import CallerError
from motorpool.types import ReturnReason, VehicleState

GB = 10**9


def row(scheduler: Scheduler, vehicle: str) -> Any:
    return scheduler.cell.t.vehicles[scheduler.cell.find(vehicle)]


# -- the vehicle -------------------------------------------------------------------------------------------------------


def said(config: VehicleConfig) -> wire.State:
    machine = VehicleMachine(config, incarnation="i")
    commands = machine.handle(LinkChanged(up=True), 1_000)
    (message,) = [command.message for command in commands if isinstance(command, PublishState)]
    assert isinstance(message, wire.State)
    return message


def config(folder: Path, engine: EngineSpec, **changes: Any) -> AgentConfig:
    files: dict[str, Any] = {
        name: folder / name for name in ("credentials_path", "consent_path", "owner_public_key_path")
    }
    return AgentConfig(agent_dir=folder, engine=engine, **files, **changes)


def test_a_vehicle_says_what_its_computer_has(tmp_path: Path) -> None:
    engine = EngineSpec(backend=Backend.NULL, model="a")
    made = config(
        tmp_path,
        engine,
        small=EngineSpec(backend=Backend.NULL, model="s"),
        parts=PartsConfig(memory_bytes=GB + 1),
        models_on_disk=("b", "a", *(f"m{number}" for number in range(40))),
    )
    state = said(made.machine_config())
    assert state.memory_gb == 1
    assert state.models_on_disk is not None
    assert state.models_on_disk[:4] == ["a", "s", "b", "m0"]
    assert len(state.models_on_disk) == wire.MAX_ON_DISK
    assert wire.decode(wire.UP_STATE, wire.encode(state)) == state


def test_what_is_on_another_computer_is_not_this_ones(tmp_path: Path) -> None:
    remote = EngineSpec(backend=Backend.REMOTE, model="a", url="http://127.0.0.1:1/v1")
    state = said(config(tmp_path, remote, models_on_disk=("b",)).machine_config())
    assert (state.memory_gb, state.models_on_disk) == (None, ["a"])


def test_memory_is_the_limit_or_the_whole_computer() -> None:
    assert memory_gb(0) == 0
    assert memory_gb(3 * GB) == min(3, memory_gb(None))
    assert memory_gb(1 << 60) == memory_gb(None) > 0


def test_models_on_disk_are_those_whose_files_are_whole(tmp_path: Path) -> None:
    def model(name: str, size: int) -> Model:
        source = FileSource(path=str(tmp_path / name))
        return Model(id=name, source=source, sha256="0" * 64, size_bytes=size, licence="MIT")

    (tmp_path / "whole").write_bytes(b"1234")
    (tmp_path / "half").write_bytes(b"12")
    catalogue = Catalogue([model("whole", 4), model("half", 4), model("none", 4), Model(id="null")])
    assert on_disk(catalogue, tmp_path) == ("whole",)


def test_a_vehicle_of_before_says_neither() -> None:
    old = {
        name: value
        for name, value in msgspec.to_builtins(wire.State(incarnation="i", seq=1, state=VehicleState.READY)).items()
        if name not in {"memory_gb", "models_on_disk"}
    }
    state = wire.decode(wire.UP_STATE, msgspec.msgpack.encode(old))
    assert isinstance(state, wire.State)
    assert (state.memory_gb, state.models_on_disk) == (None, None)
    for wrong in ({"memory_gb": 256}, {"models_on_disk": ["m"] * (wire.MAX_ON_DISK + 1)}):
        with pytest.raises(CallerError):
            wire.decode(wire.UP_STATE, msgspec.msgpack.encode(old | wrong))


# -- the cell ----------------------------------------------------------------------------------------------------------


def test_the_cell_keeps_what_a_vehicle_says_until_it_says_otherwise() -> None:
    scheduler = Scheduler()
    scheduler.handle(report("other", 1, model="n"), 0)
    scheduler.handle(report("v1", 1, memory_gb=16, models_on_disk=["n", "unheard of", "m"]), 0)
    models = scheduler.cell.model_names
    assert models == ["n", "m"], "no name of a file takes a row of the table"
    assert int(row(scheduler, "v1")["memory_gb"]) == 16
    assert int(row(scheduler, "v1")["on_disk"]) == 0b11
    scheduler.handle(report("v1", 2, models_on_disk=["m"]), 1)
    assert int(row(scheduler, "v1")["on_disk"]) == 1 << models.index("m")
    assert int(row(scheduler, "v1")["memory_gb"]) == 16
    scheduler.handle(report("v1", 1, incarnation="i2"), 2)
    assert (int(row(scheduler, "v1")["memory_gb"]), int(row(scheduler, "v1")["on_disk"])) == (0, 0)


def test_of_a_car_without_consent_nothing_of_it_is_kept() -> None:
    scheduler = Scheduler()
    scheduler.handle(report("v1", 1, memory_gb=16, models_on_disk=["m"]), 0)
    gone = ev.OwnerSpoke(cause_id="o", vehicle_id="v1", withdrawn=True, paused_until_ms=0, what="w")
    scheduler.handle(gone, 1)
    scheduler.handle(report("v1", 2, memory_gb=16, models_on_disk=["m"]), 2)
    assert (int(row(scheduler, "v1")["memory_gb"]), int(row(scheduler, "v1")["on_disk"])) == (0, 0)


def test_a_job_that_needs_memory_goes_to_vehicles_that_have_it_or_do_not_say() -> None:
    scheduler = Scheduler()
    scheduler.handle(msgspec.structs.replace(started(100), memory_gb=12), 0)
    assert not grants(scheduler.handle(report("little", 1, memory_gb=8), 0))
    job = scheduler.jobs[1].row
    assert int(scheduler.cell.k.refusal(scheduler.cell.t, scheduler.cell.find("little"), job)) == TOO_LITTLE_MEMORY
    for vehicle, fields in (("enough", {"memory_gb": 12}), ("old", {})):
        scheduler.handle(report(vehicle, 1, **fields), 0)
        assert int(scheduler.cell.k.refusal(scheduler.cell.t, scheduler.cell.find(vehicle), job)) == OK


# -- live requests at a site -------------------------------------------------------------------------------------------


def at_a_site(*, limit_w: int = 0, limit_vehicles: int = 0, vehicles: int = 3) -> Scheduler:
    scheduler = Scheduler()
    north = ev.SiteConfigured(cause_id="o", site="north", limit_w=limit_w, limit_vehicles=limit_vehicles)
    scheduler.handle(north, 0)
    for number in range(vehicles):
        there = ev.VehicleConfigured(cause_id="o", vehicle_id=f"v{number}", site="north", trust=0, reserve=False)
        scheduler.handle(there, 0)
        scheduler.handle(report(f"v{number}", 1, permit_w=100, slots=4), 0)
    return scheduler


def drawn(scheduler: Scheduler) -> tuple[int, int]:
    site = scheduler.cell.t.sites[scheduler.cell.site("north")]
    return int(site["used_w"]), int(site["working"])


@pytest.mark.parametrize("limits", [{"limit_w": 250}, {"limit_vehicles": 2}])
def test_a_live_request_finds_no_idle_vehicle_at_a_full_site(limits: dict[str, int]) -> None:
    scheduler = at_a_site(**limits)
    chosen = []
    for _ in range(20):
        vehicle = scheduler.place_live("m", frozenset(), 10)
        assert vehicle is not None
        scheduler.live_began(vehicle)
        chosen.append(vehicle)
    assert len(set(chosen)) == 2, "those that draw already take more, and the third stays idle"
    assert drawn(scheduler) == (200, 2)
    assert scheduler.place_live("m", frozenset(chosen), 10) is None
    for vehicle in chosen:
        scheduler.live_over(vehicle)
    assert drawn(scheduler) == (0, 0)
    assert scheduler.place_live("m", frozenset(chosen), 10) is not None


def test_live_requests_and_lines_of_a_vehicle_draw_once() -> None:
    scheduler = at_a_site(limit_w=100, vehicles=2)
    scheduler.live_began("v0")
    lease = grants(scheduler.handle(started(100), 20))[0]
    assert lease.vehicle_id == "v0", "a batch is not given to the other one either"
    assert drawn(scheduler) == (100, 1)
    scheduler.handle(ev.CancelAsked(cause_id="c", job_no=1), 30)
    scheduler.handle(returned(lease, lease.lines, ReturnReason.REVOKED), 40)
    assert int(row(scheduler, "v0")["outstanding"]) == 0
    assert drawn(scheduler) == (100, 1), "the live request runs on"
    scheduler.live_over("v0")
    assert drawn(scheduler) == (0, 0)


def test_a_permit_that_changes_under_a_live_request_is_counted() -> None:
    scheduler = at_a_site(limit_w=500)
    scheduler.live_began("v1")
    scheduler.handle(report("v1", 2, permit_w=160, slots=4), 10)
    assert drawn(scheduler) == (160, 1)
    scheduler.handle(ev.VehicleConfigured(cause_id="o", vehicle_id="v1", site="", trust=0, reserve=False), 20)
    assert drawn(scheduler) == (0, 0)
    scheduler.live_over("v1")
    assert drawn(scheduler) == (0, 0)


def test_a_vehicle_that_is_struck_off_in_a_live_request_draws_no_more() -> None:
    scheduler = at_a_site(limit_w=500)
    scheduler.live_began("v1")
    scheduler.handle(ev.VehicleRevoked(cause_id="o", vehicle_id="v1"), 10)
    assert drawn(scheduler) == (0, 0)
    scheduler.live_over("v1")
    assert drawn(scheduler) == (0, 0)
    assert not np.any(scheduler.cell.t.sites["used_w"])
