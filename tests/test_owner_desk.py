"""The owner's desk: what is said reaches the guard at its next look, and everything that happens stands in the log."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import msgspec
import pytest
from tests.owner_world import NOW_MS, OwnersCar

from motorpool.agent.enrolment import confirm_consent, give_consent, take_consent_back
from motorpool.agent.owner import acts
from motorpool.agent.owner import desk as desk_module
from motorpool.agent.owner.desk import local_monday_ms
from motorpool.agent.owner.entries import EntryKind
from motorpool.core.guard import Policy
from motorpool.core.signals import DriverMode
from motorpool.trust.consent import ConsentLimits
from motorpool.types import ReasonCode, VehicleState

HOUR_MS = 3_600_000
LIMITS = ConsentLimits(max_watts_w=80)


@pytest.fixture
def car(tmp_path: Path) -> OwnersCar:
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 1_000 * HOUR_MS)
    made = OwnersCar(tmp_path)
    made.look()
    return made


def told(car: OwnersCar, kind: EntryKind) -> list[str]:
    return [entry.what for entry in car.log.entries(0, 1_000) if entry.kind is kind]


def why(car: OwnersCar) -> list[str]:
    return [reason["code"] for reason in car.desk.state(car.now_ms)["why"]]


def test_every_word_of_the_owner_counts_at_the_next_look(car: OwnersCar) -> None:
    assert car.works
    for stop, code in (
        (lambda: acts.pause(car.folder, car.now_ms), ReasonCode.PAUSED),
        (lambda: acts.need_car(car.folder, car.now_ms), ReasonCode.PAUSED),
        (lambda: take_consent_back(car.folder, "v1", now_ms=car.now_ms), ReasonCode.CONSENT_WITHDRAWN),
    ):
        stop()
        car.now_ms += 1
        car.look()
        assert not car.works
        assert why(car) == [code]
        acts.resume(car.folder, car.now_ms)
        give_consent(car.folder, "v1", LIMITS, now_ms=car.now_ms, expires_ms=car.now_ms + HOUR_MS)
        car.now_ms += 1
        car.look()
        assert car.works


def test_consents_and_acts_stand_in_the_log_in_words(car: OwnersCar) -> None:
    acts.pause(car.folder, car.now_ms)
    car.run(5_000)
    acts.resume(car.folder, car.now_ms)
    car.run(5_000)
    narrow = msgspec.structs.replace(LIMITS, floor_pct=60.0)
    give_consent(car.folder, "v1", narrow, now_ms=car.now_ms, expires_ms=NOW_MS + 1_000 * HOUR_MS)
    car.run(5_000)
    confirm_consent(car.folder, "v1", now_ms=car.now_ms)
    car.run(5_000)
    take_consent_back(car.folder, "v1", now_ms=car.now_ms)
    car.run(5_000)
    consents = told(car, EntryKind.CONSENT)
    assert "up to 80 W, not below 30 % charge" in consents[0]
    assert "not below 60 % charge" in consents[1]
    assert consents[2:] == ["the consent was confirmed", "the consent was taken back"]
    said = told(car, EntryKind.ACT)
    assert said[0].startswith("paused until ")
    assert said[1:] == ["you said: go on"]


def test_after_somebody_else_had_the_car_the_owner_confirms(car: OwnersCar) -> None:
    car.mode = DriverMode.VALET
    car.run(2_000)
    assert why(car) == [ReasonCode.CONSENT_SUSPENDED]
    car.mode = DriverMode.OWNER
    car.run(2_000)
    assert why(car) == [ReasonCode.CONSENT_SUSPENDED]  # the owner has not said that it was all right
    car.now_ms += 1
    confirm_consent(car.folder, "v1", now_ms=car.now_ms)
    car.look()
    assert car.works


def test_i_need_the_car_ends_with_the_drive(car: OwnersCar) -> None:
    acts.need_car(car.folder, car.now_ms)
    car.run(60_000)
    assert why(car) == [ReasonCode.PAUSED]
    car.speed_kmh = 1.0  # a nudge, as by a sensor's error, is no drive
    car.run(2_000)
    car.desk.keep()
    car.speed_kmh = 0.0
    car.run(2_000)
    assert why(car) == [ReasonCode.PAUSED]
    car.speed_kmh = 30.0
    car.run(5_000)
    car.desk.keep()
    car.speed_kmh = 0.0
    car.run(60_000)
    assert car.works
    assert told(car, EntryKind.ACT)[-1] == "the car was driven: it may work again when it is parked"


def test_a_drive_before_the_word_does_not_end_it(car: OwnersCar) -> None:
    car.speed_kmh = 30.0
    stale = car.signals()
    car.speed_kmh = 0.0
    car.run(5_000)
    acts.need_car(car.folder, car.now_ms)
    car.look()
    car.desk.judged((), stale, VehicleState.DENIED, car.now_ms)
    car.desk.keep()
    assert acts.load_acts(car.folder).need_car_ms


def test_every_change_of_the_configuration_is_noted_and_none_twice(car: OwnersCar) -> None:
    first = Policy()
    car.desk.configured(first, car.now_ms)
    car.desk.configured(first, car.now_ms + 1)
    changed = msgspec.structs.replace(first, watts_w=150, floor_pct=20.0)
    car.desk.configured(changed, car.now_ms + 2)
    car.desk.configured(changed, car.now_ms + 3)
    car.log.flush()
    assert told(car, EntryKind.POLICY) == [
        "power up to 100 W, floor 30 %",
        "floor_pct: 30.0 became 20.0",
        "watts_w: 100 became 150",
    ]
    assert all(entry.by == "operator" for entry in car.log.entries() if entry.kind is EntryKind.POLICY)


def test_the_weeks_of_the_statement(car: OwnersCar) -> None:
    car.run(120_000)
    car.log.worked("batch", car.now_ms, lines=4, tokens=100, energy_mwh=2_000_000, earned_micro=50_000,
                   electricity_micro=20_000, wear_micro=1_000)  # fmt: skip
    car.log.close(car.now_ms)
    week, before = car.desk.statement(car.now_ms, weeks=2)
    assert (week["pay_micro"], week["electricity_micro"], week["wear_micro"], week["net_micro"]) == (
        50_000, 20_000, 1_000, 29_000,
    )  # fmt: skip
    assert week["working_ms"] == 120_000
    assert week["from_ms"] == local_monday_ms(car.now_ms) <= car.now_ms
    assert (before["pay_micro"], before["to_ms"]) == (0, week["from_ms"])


def test_the_log_is_written_beside_the_loop_and_not_in_it(car: OwnersCar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "FLUSH_S", 0.0)
    threads: list[int] = []
    real = car.log.flush

    async def trial() -> None:
        loop, written = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            threads.append(threading.get_ident())
            real()
            loop.call_soon_threadsafe(written.set)

        monkeypatch.setattr(car.log, "flush", flush)
        running = asyncio.create_task(car.desk.run())
        await written.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(trial())
    assert threads
    assert threading.get_ident() not in threads
    monkeypatch.undo()
    assert told(car, EntryKind.CONSENT)


def test_nothing_of_a_look_touches_the_disk(car: OwnersCar, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object) -> int:
        raise AssertionError("the guard's turn waited for the disk")

    for name in ("write", "fsync", "open"):
        monkeypatch.setattr(os, name, no)
    car.run(7_200_000 // 4)
    car.speed_kmh = 50.0
    car.run(5_000)
    monkeypatch.undo()
    assert told(car, EntryKind.CONSENT)


def test_what_the_owner_is_told_names_no_place_and_no_trip(car: OwnersCar) -> None:
    state = car.desk.state(car.now_ms)
    assert set(state) == {
        "now_ms", "judged_ms", "vehicle_id", "working", "allowed", "watts_w", "battery_fed", "sentence", "why",
        "soc_pct", "plugged", "acts", "consent",
    }  # fmt: skip
    assert state["sentence"] == "Your car works for others."
    assert OwnersCar(car.folder).desk.state(0)["sentence"] == "The car has just started and has not looked yet."
