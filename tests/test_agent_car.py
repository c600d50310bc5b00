"""The simulated car, its owner's acts, and the port through which they are played."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import msgspec
import pytest

from motorpool.agent.signals import physics
from motorpool.agent.signals.car import ACTIONS, COARSE_STEP_S, Action, CarSpec, SimulatedCar
from motorpool.agent.signals.owner_port import ADDRESS_NAME, OWNER_ACTIONS, SOCKET_NAME, OwnerPort, play_owner
from motorpool.core.guard import Budgets, ConsentView, History, Policy, decide
from motorpool.core.signals import NetworkClass, Reading
from motorpool.errors import ConflictError, SetupError
from motorpool.types import Permit, ReasonCode

T0_MS = 1_000_000
POLICY = Policy(dwell_ms=0)
CONSENT = ConsentView(refusal=None, max_watts_w=500, floor_pct=0.0, expires_ms=10**12)


def judged(car: SimulatedCar, at_ms: int) -> list[ReasonCode]:
    signals = car.read(at_ms)
    verdict, _ = decide(POLICY, CONSENT, signals, Budgets(), History(), at_ms)
    return [] if isinstance(verdict, Permit) else [reason.code for reason in verdict]


def test_the_battery_charges_up_to_its_limit_and_leaves_room_for_the_computer() -> None:
    car = SimulatedCar(CarSpec(soc_pct=70.0, charge_limit_pct=80.0), T0_MS)
    car.advance(T0_MS + 30 * 60_000)
    assert car.soc_pct == pytest.approx(70 + 6_512 * 0.5 / 600, abs=0.01)
    assert car.battery_power_w == pytest.approx(6_512)
    signals = car.read(T0_MS + 30 * 60_000)
    assert signals.charger_power_w is not None
    assert signals.charger_power_w.value == pytest.approx(11_000 * 0.94 - 200)
    assert judged(car, T0_MS + 30 * 60_000) == []
    car.advance(T0_MS + 4 * 3600_000)
    assert car.soc_pct == pytest.approx(80, abs=1e-6)
    assert car.battery_power_w == pytest.approx(0, abs=1e-6)
    assert car.ac_power_w == 0
    assert car.grid_wh > 6_000 * 1.06
    assert judged(car, T0_MS + 4 * 3600_000) == []


def test_computing_comes_from_the_charger_and_without_the_grid_from_the_battery() -> None:
    car = SimulatedCar(CarSpec(soc_pct=50.0, awake_w=40.0), T0_MS, drawn_w=lambda: 300.0)
    car.advance(T0_MS + 1_000)
    assert car.battery_power_w == pytest.approx(6_512)  # charging comes first, and there is room beside it
    assert car.ac_power_w == pytest.approx((6_512 + 340 / 0.92 + 200) / 0.94)
    car.do(Action.POWER_CUT, T0_MS + 2_000)
    assert car.battery_power_w == pytest.approx(-340 / 0.92)  # with what the awake car takes
    assert judged(car, T0_MS + 2_000) == [ReasonCode.NO_GRID_POWER]
    car.do(Action.POWER_BACK, T0_MS + 3_000)
    assert judged(car, T0_MS + 3_000) == []


def test_a_weak_socket_charges_less_while_the_computer_works() -> None:
    spec = CarSpec(soc_pct=50.0, circuit_w=2_300.0)
    alone, working = SimulatedCar(spec, T0_MS), SimulatedCar(spec, T0_MS, drawn_w=lambda: 300.0)
    for car in (alone, working):
        car.advance(T0_MS + 3600_000)
        assert car.ac_power_w == pytest.approx(2_300)
    assert alone.energy_wh - working.energy_wh == pytest.approx(340 / 0.92, rel=0.01)


@pytest.mark.parametrize(("ac_w", "least", "most"), [(2_300.0, 0.127, 0.242), (11_000.0, 0.063, 0.097)])
def test_losses_of_charging_are_within_what_was_measured(ac_w: float, least: float, most: float) -> None:
    assert least <= physics.loss_share(ac_w) <= most
    assert physics.ac_of(physics.dc_of(ac_w)) == pytest.approx(ac_w)


def test_a_battery_takes_less_when_full_cold_or_hot() -> None:
    assert physics.accepted_w(6_000, 50, 20) == 6_000
    assert physics.accepted_w(6_000, 100, 20) == pytest.approx(600)
    assert physics.accepted_w(6_000, 50, -15) == pytest.approx(1_200)
    assert physics.accepted_w(6_000, 50, -40) == pytest.approx(1_200)
    assert physics.accepted_w(6_000, 50, 50) == pytest.approx(3_000)


def test_heat_comes_and_goes_and_a_long_step_is_as_good_as_many_short_ones() -> None:
    body = physics.COMPUTER
    once = body.after(20.0, 20.0, 300.0, 3_600.0)
    often = 20.0
    for _ in range(3_600):
        often = body.after(often, 20.0, 300.0, 1.0)
    assert once == pytest.approx(often, abs=1e-6)
    assert once == pytest.approx(56.0, abs=0.01)
    assert body.after(once, 20.0, 0.0, 1e9) == pytest.approx(20.0)


def test_the_computer_warms_the_car_up_to_the_guards_limit_in_a_heat_wave() -> None:
    car = SimulatedCar(CarSpec(), T0_MS, drawn_w=lambda: 300.0)
    car.advance(T0_MS + 3600_000)
    assert judged(car, T0_MS + 3600_000) == []
    cool = car.computer_c
    car.do(Action.HEAT_WAVE, T0_MS + 3600_000)
    car.advance(T0_MS + 2 * 3600_000)
    assert car.computer_c > cool + 30
    assert ReasonCode.TOO_HOT in judged(car, T0_MS + 2 * 3600_000)
    car.do(Action.COOL_DOWN, T0_MS + 2 * 3600_000)
    car.advance(T0_MS + 3 * 3600_000)
    assert car.computer_c == pytest.approx(cool, abs=5)


def test_the_season_and_the_hour_set_the_temperature() -> None:
    climate = physics.Climate()
    july, january = 200 * physics.MS_A_DAY, 17 * physics.MS_A_DAY
    assert climate.at(july + 15 * 3600_000) == pytest.approx(23, abs=0.1)
    assert climate.at(january + 3 * 3600_000) == pytest.approx(-3, abs=0.2)


def test_a_year_in_coarse_steps_is_near_one_in_fine_steps() -> None:
    fine, coarse = (SimulatedCar(CarSpec(soc_pct=40.0), T0_MS, drawn_w=lambda: 100.0) for _ in range(2))
    day_ms = physics.MS_A_DAY
    fine.advance(T0_MS + day_ms)
    coarse.advance(T0_MS + day_ms, COARSE_STEP_S)
    assert fine.soc_pct == pytest.approx(coarse.soc_pct, abs=1e-6)
    assert fine.grid_wh == pytest.approx(coarse.grid_wh, rel=1e-4)
    assert fine.computer_c == pytest.approx(coarse.computer_c, abs=0.05)
    assert fine.pack_c == pytest.approx(coarse.pack_c, abs=0.05)


def test_a_charge_timer_waits_for_its_hour() -> None:
    car = SimulatedCar(CarSpec(soc_pct=50.0, charge_from_minute=120, charge_for_min=60), 0)
    car.advance(119 * 60_000)
    assert car.soc_pct == 50
    car.advance(180 * 60_000 - 5_000)
    assert car.soc_pct == pytest.approx(50 + 6_512 / 600, abs=0.1)
    after = car.soc_pct
    car.advance(240 * 60_000)
    assert car.soc_pct == pytest.approx(after, abs=0.1)


def test_a_charger_that_sleeps_leaves_the_computer_to_the_battery_and_tops_it_up() -> None:
    car = SimulatedCar(CarSpec(soc_pct=80.0, sleeps_when_full=True), T0_MS, drawn_w=lambda: 300.0)
    car.advance(T0_MS + 60_000)
    assert car.battery_power_w < -300
    signals = car.read(T0_MS + 60_000)
    assert signals.grid_power_available is not None
    assert signals.grid_power_available.value  # plugged in is not fed
    car.advance(T0_MS + 3_300_000 * 4)
    lowest = min(_soc_after(car, T0_MS + 3_300_000 * 4 + step * 60_000) for step in range(120))
    assert 77.5 < lowest < 79.5


def _soc_after(car: SimulatedCar, at_ms: int) -> float:
    car.advance(at_ms)
    return car.soc_pct


def test_the_low_voltage_battery_is_held_by_its_converter_and_falls_without_it() -> None:
    car = SimulatedCar(CarSpec(), T0_MS)
    assert car.low_voltage_v == pytest.approx(physics.LOW_VOLTAGE_FULL_V)
    car.advance(T0_MS + 3 * physics.MS_A_DAY, COARSE_STEP_S)
    assert 12.4 < car.low_voltage_v < 12.8
    car.do(Action.PRECONDITION, T0_MS + 3 * physics.MS_A_DAY)
    assert car.low_voltage_v == physics.DCDC_V
    car.do(Action.LOW_VOLTAGE, T0_MS + 3 * physics.MS_A_DAY)
    assert car.low_voltage_v < 12.0
    assert ReasonCode.LOW_12V in judged(car, T0_MS + 3 * physics.MS_A_DAY)
    car.do(Action.VOLTAGE_BACK, T0_MS + 3 * physics.MS_A_DAY)
    assert car.low_voltage_v > 12.8


def test_a_planned_departure_prepares_the_cabin_in_its_last_minutes() -> None:
    car = SimulatedCar(CarSpec(), T0_MS)
    leaves_ms = T0_MS + 3600_000
    car.plan_departure(leaves_ms)
    told = car.read(T0_MS + 1_000)
    assert told.departure_ms is not None
    assert told.departure_ms.value == leaves_ms
    assert not car.preconditioning
    assert judged(car, leaves_ms - 10 * 60_000) == [ReasonCode.PRECONDITIONING]


@pytest.mark.parametrize(
    ("action", "undo", "code"),
    [
        (Action.PRECONDITION, Action.PRECONDITION_OFF, ReasonCode.PRECONDITIONING),
        (Action.GUEST_MODE, Action.OWNER_MODE, ReasonCode.CONSENT_SUSPENDED),
        (Action.VALET_MODE, Action.OWNER_MODE, ReasonCode.CONSENT_SUSPENDED),
        (Action.SERVICE_MODE, Action.OWNER_MODE, ReasonCode.CONSENT_SUSPENDED),
        (Action.FAULT, Action.FAULT_CLEARED, ReasonCode.FAULT),
        (Action.START_UPDATE, Action.END_UPDATE, ReasonCode.UPDATE_IN_PROGRESS),
        (Action.FEED_HOUSE, Action.FEED_STOP, ReasonCode.FEEDING_GRID),
        (Action.LOW_VOLTAGE, Action.VOLTAGE_BACK, ReasonCode.LOW_12V),
    ],
)
def test_what_can_happen_to_a_parked_car_stops_work_and_can_be_undone(
    action: Action, undo: Action, code: ReasonCode
) -> None:
    car = SimulatedCar(CarSpec(), T0_MS)
    car.do(action, T0_MS)
    assert code in judged(car, T0_MS)
    car.do(undo, T0_MS)
    assert judged(car, T0_MS) == []


def test_a_place_shows_as_a_region_only() -> None:
    car = SimulatedCar(CarSpec(), T0_MS)
    assert car.read(T0_MS).region == Reading("NO", T0_MS)
    car.do(Action.NETWORK_METERED, T0_MS)
    assert car.read(T0_MS).network == Reading(NetworkClass.METERED, T0_MS)
    car.do(Action.LEAVE_REGION, T0_MS)
    assert car.read(T0_MS).region is None
    shown = f"{car!r} {car.read(T0_MS)!r} {car.view(T0_MS)!r}"
    assert "59.9" not in shown
    assert "55.6" not in shown


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
    unplugged = {ReasonCode.NOT_PLUGGED_IN, ReasonCode.CABLE_UNLOCKED, ReasonCode.NO_GRID_POWER}
    assert set(judged(car, T0_MS + 40_000)) == unplugged
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
    assert sorted(judged(car, T0_MS)) == sorted(reasons)
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
