"""The simulated car, its owner's acts, and the port through which they are played."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import msgspec
import pytest

from motorpool.agent.signals.car import ACTIONS, Action, CarSpec, SimulatedCar
from motorpool.agent.signals.owner_port import ADDRESS_NAME, OWNER_ACTIONS, SOCKET_NAME, OwnerPort, play_owner
from motorpool.core.guard import ConsentView, History, Policy, decide
from motorpool.errors import ConflictError, SetupError
from motorpool.types import Permit, ReasonCode

T0_MS = 1_000_000
POLICY = Policy(dwell_ms=0)
CONSENT = ConsentView(refusal=None, max_watts_w=500, floor_pct=0.0, expires_ms=10**12)


def judged(car: SimulatedCar, at_ms: int) -> list[ReasonCode]:
    signals = car.read(at_ms)
    verdict, _ = decide(POLICY, CONSENT, signals, History(), at_ms)
    return [] if isinstance(verdict, Permit) else [reason.code for reason in verdict]


def test_the_battery_charges_up_to_its_limit_with_losses() -> None:
    car = SimulatedCar(CarSpec(soc_pct=70.0, charge_limit_pct=80.0, capacity_wh=60_000.0, charger_ac_w=10_000.0), T0_MS)
    car.advance(T0_MS + 30 * 60_000)
    assert car.soc_pct == pytest.approx(70 + 8_800 * 0.5 / 600, abs=0.01)
    assert car.battery_power_w == pytest.approx(8_800)
    car.advance(T0_MS + 4 * 3600_000)
    assert car.soc_pct == pytest.approx(80, abs=0.05)
    assert car.battery_power_w == 0
    assert judged(car, T0_MS + 4 * 3600_000) == []


def test_computing_takes_from_charging_and_without_the_grid_from_the_battery() -> None:
    car = SimulatedCar(CarSpec(soc_pct=50.0, charger_ac_w=10_000.0), T0_MS, drawn_w=lambda: 800.0)
    car.advance(T0_MS + 1_000)
    assert car.battery_power_w == pytest.approx(8_000)
    car.do(Action.POWER_CUT, T0_MS + 2_000)
    assert car.battery_power_w == -800
    assert judged(car, T0_MS + 2_000) == [ReasonCode.NO_GRID_POWER]
    car.do(Action.POWER_BACK, T0_MS + 3_000)
    assert judged(car, T0_MS + 3_000) == []


def test_a_drive_from_the_first_touch_to_the_return() -> None:
    car = SimulatedCar(CarSpec(soc_pct=86.0), T0_MS)
    changes: list[int] = []
    car.on_change(lambda: changes.append(1))
    assert judged(car, T0_MS) == []
    car.do(Action.DRIVE_OFF, T0_MS)
    assert judged(car, T0_MS) == [ReasonCode.DOOR_OPEN, ReasonCode.UNLOCKED]
    assert changes == [1]
    with pytest.raises(ConflictError):
        car.do(Action.LOCK, T0_MS + 500)
    assert ReasonCode.CABLE_UNLOCKED in judged(car, T0_MS + 1_100)
    assert ReasonCode.NOT_PLUGGED_IN in judged(car, T0_MS + 1_600)
    assert ReasonCode.OCCUPIED in judged(car, T0_MS + 2_600)
    assert {ReasonCode.MOVING, ReasonCode.NOT_IN_PARK, ReasonCode.IGNITION_ON} <= set(judged(car, T0_MS + 5_000))
    with pytest.raises(ConflictError):
        car.do(Action.PLUG_IN, T0_MS + 6_000)
    before = car.soc_pct
    car.advance(T0_MS + 35_000)
    assert car.soc_pct < before - 3
    car.do(Action.COME_BACK, T0_MS + 36_000)
    assert judged(car, T0_MS + 40_000) == [
        ReasonCode.NOT_PLUGGED_IN,
        ReasonCode.CABLE_UNLOCKED,
        ReasonCode.NO_GRID_POWER,
    ]
    car.do(Action.PLUG_IN, T0_MS + 41_000)
    assert judged(car, T0_MS + 41_000) == []
    with pytest.raises(ConflictError):
        car.do(Action.COME_BACK, T0_MS + 42_000)


@pytest.mark.parametrize(
    ("action", "reasons"),
    [
        (Action.UNLOCK, [ReasonCode.UNLOCKED]),
        (Action.OPEN_DOOR, [ReasonCode.DOOR_OPEN, ReasonCode.UNLOCKED]),
        (Action.UNPLUG, [ReasonCode.NOT_PLUGGED_IN, ReasonCode.CABLE_UNLOCKED, ReasonCode.NO_GRID_POWER]),
    ],
)
def test_each_act_is_seen_at_once_and_can_be_undone(action: Action, reasons: list[ReasonCode]) -> None:
    car = SimulatedCar(CarSpec(), T0_MS)
    car.do(action, T0_MS)
    assert judged(car, T0_MS) == reasons
    car.do(Action.CLOSE_DOOR, T0_MS)
    car.do(Action.LOCK, T0_MS)
    car.do(Action.PLUG_IN, T0_MS)
    assert judged(car, T0_MS) == []


def test_how_often_it_is_looked_at_changes_nothing() -> None:
    often, rarely = (SimulatedCar(CarSpec(), T0_MS) for _ in range(2))
    for car in (often, rarely):
        car.do(Action.DRIVE_OFF, T0_MS)
    for passed_ms in range(0, 20_001, 100):
        often.advance(T0_MS + passed_ms)
    rarely.advance(T0_MS + 20_000)
    assert often.soc_pct == pytest.approx(rarely.soc_pct, abs=1e-6)
    assert often.view(T0_MS + 20_000) == rarely.view(T0_MS + 20_000)


@pytest.mark.parametrize("deep", ["", "x" * 120])
def test_the_port_answers_on_this_machine_alone(tmp_path: Path, deep: str) -> None:
    folder = tmp_path / deep
    folder.mkdir(exist_ok=True)

    async def scenario() -> None:
        port = OwnerPort(folder, SimulatedCar(CarSpec(), T0_MS), lambda: T0_MS)
        await port.start()
        path = Path((folder / ADDRESS_NAME).read_text("utf-8")) if deep else folder / SOCKET_NAME
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert path.stat().st_mode & 0o077 == 0
        shown = await play_owner(folder, "show")
        assert shown["ok"]
        assert not shown["car"]["door_open"]
        assert (await play_owner(folder, "open-door"))["car"]["door_open"]
        refused = await play_owner(folder, "come-back")
        assert (refused["ok"], refused["code"]) == (False, "car_not_away")
        assert (await play_owner(folder, "fly"))["code"] == "unknown_action"
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"not json\n" + msgspec.json.encode({"do": "show"}) + b"\n")
        assert msgspec.json.decode(await reader.readline())["code"] == "bad_line"
        assert msgspec.json.decode(await reader.readline())["ok"]
        writer.write(b"x" * 10_000)
        assert await reader.read() == b""
        writer.close()
        await port.close()
        assert not path.exists()
        with pytest.raises(SetupError, match="is the vehicle running"):
            await play_owner(folder, "show")

    asyncio.run(scenario())


def test_every_action_has_words() -> None:
    assert set(ACTIONS) == set(Action)
    assert all(OWNER_ACTIONS.values())
