"""What a charging point was told: the departure and the limit come out, and an error names the field at fault."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.agent import ocpp
from motorpool.agent.ocpp import NEEDS_NAME, ChargingNeedsFile, circuit_limit_w, departure_ms, merged, read_hints
from motorpool.core.signals import Reading, Signals
from motorpool.errors import CallerError

NOON_MS = 1_769_860_800_000  # 2026-01-31T12:00:00Z
HOUR_MS = 3_600_000


@pytest.fixture(params=["with the schemas", "without the schemas"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without the schemas":
        monkeypatch.setitem(sys.modules, "ocpp.messages", None)  # as if the extra were not installed
        assert ocpp._validators() is None
    else:
        assert ocpp._validators() is not None
    assert isinstance(request.param, str)
    return request.param


def needs(departure: object = "2026-01-31T13:30:00+01:00") -> dict[str, Any]:
    return {
        "evseId": 1,
        "chargingNeeds": {
            "requestedEnergyTransfer": "AC_three_phase",
            "departureTime": departure,
            "acChargingParameters": {"energyAmount": 20000, "evMinCurrent": 6, "evMaxCurrent": 16, "evMaxVoltage": 400},
        },
    }


def profile(periods: list[dict[str, Any]], unit: str = "W", **more: Any) -> dict[str, Any]:
    schedule = {"id": 1, "chargingRateUnit": unit, "chargingSchedulePeriod": periods}
    if "startSchedule" in more:
        schedule["startSchedule"] = more.pop("startSchedule")
    if "duration" in more:
        schedule["duration"] = more.pop("duration")
    return {
        "evseId": 1,
        "chargingProfile": {
            "id": 1,
            "stackLevel": 0,
            "chargingProfilePurpose": "ChargingStationExternalConstraints",
            "chargingProfileKind": "Absolute",
            "chargingSchedule": [schedule],
            **more,
        },
    }


def file_of(*messages: object, version: str = "2.1") -> bytes:
    return json.dumps({"ocpp": version, "messages": list(messages)}).encode()


@pytest.mark.parametrize("version", ["2.0.1", "2.1"])
def test_the_departure_is_read(either: str, version: str) -> None:
    assert departure_ms(needs(), version) == NOON_MS + HOUR_MS // 2
    assert departure_ms(needs("2026-01-31T12:30:00.250Z"), version) == NOON_MS + HOUR_MS // 2 + 250
    without = needs()
    del without["chargingNeeds"]["departureTime"]
    assert departure_ms(without, version) is None


@pytest.mark.parametrize(
    "wrong",
    [
        "2026-01-31",
        "2026-01-31T12:00:00",  # of which zone?
        "2026-02-31T12:00:00Z",
        "2026-01-31T25:00:00Z",
        "tomorrow at eight",
        "20260131T120000Z",
        "",
        1_769_860_800,
        True,
        ["2026-01-31T12:00:00Z"],
    ],
)
def test_a_departure_that_is_no_time_is_refused_by_the_name_of_its_field(either: str, wrong: object) -> None:
    with pytest.raises(CallerError) as caught:
        departure_ms(needs(wrong))
    assert caught.value.param == "NotifyEVChargingNeeds.chargingNeeds.departureTime"
    assert caught.value.code == "invalid_ocpp"
    if isinstance(wrong, str) and wrong:
        assert wrong not in str(caught.value)  # when somebody leaves is theirs


@pytest.mark.parametrize(
    ("path", "field"),
    [
        (("evseId",), "NotifyEVChargingNeeds.evseId"),
        (("chargingNeeds",), "NotifyEVChargingNeeds.chargingNeeds"),
        (("chargingNeeds", "requestedEnergyTransfer"), "NotifyEVChargingNeeds.chargingNeeds.requestedEnergyTransfer"),
    ],
)
def test_a_missing_field_is_named(either: str, path: tuple[str, ...], field: str) -> None:
    message = needs()
    inner = message
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    with pytest.raises(CallerError) as caught:
        departure_ms(message)
    assert caught.value.param == field


def test_the_schema_refuses_what_the_short_checks_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    message = needs()
    message["chargingNeeds"]["requestedEnergyTransfer"] = "by hand"
    with pytest.raises(CallerError, match=r"requestedEnergyTransfer breaks the rule 'enum' of the schema of OCPP 2\.1"):
        departure_ms(message)
    monkeypatch.setitem(sys.modules, "ocpp.messages", None)
    assert departure_ms(message) == NOON_MS + HOUR_MS // 2


def test_what_is_not_an_object_is_refused(either: str) -> None:
    payloads: list[object] = [None, [], "x", 3]
    for payload in payloads:
        with pytest.raises(CallerError) as caught:
            departure_ms(payload)
        assert caught.value.param == "NotifyEVChargingNeeds"


def test_the_period_of_now_gives_the_limit(either: str) -> None:
    periods = [{"startPeriod": 0, "limit": 11000.0}, {"startPeriod": 3600, "limit": 4000.0}]
    plan = profile(periods, startSchedule="2026-01-31T12:00:00Z", duration=7200)
    assert circuit_limit_w(plan, NOON_MS - 1) is None
    assert circuit_limit_w(plan, NOON_MS) == 11000.0
    assert circuit_limit_w(plan, NOON_MS + HOUR_MS) == 4000.0
    assert circuit_limit_w(plan, NOON_MS + 2 * HOUR_MS) is None


def test_a_plan_without_a_place_in_time_counts_with_its_lowest_period(either: str) -> None:
    periods = [{"startPeriod": 0, "limit": 11000.0}, {"startPeriod": 3600, "limit": 4000.0}]
    assert circuit_limit_w(profile(periods, chargingProfileKind="Relative"), NOON_MS) == 4000.0
    recurring = profile(periods, chargingProfileKind="Recurring", recurrencyKind="Daily")
    assert circuit_limit_w(recurring, NOON_MS) == 4000.0


def test_amperes_count_for_the_phases_that_are_stated_and_else_for_one(either: str) -> None:
    assert circuit_limit_w(profile([{"startPeriod": 0, "limit": 16.0, "numberPhases": 3}], "A"), NOON_MS) == 11040.0
    assert circuit_limit_w(profile([{"startPeriod": 0, "limit": 16.0}], "A"), NOON_MS) == 3680.0


def test_a_station_that_sleeps_allows_nothing(either: str) -> None:
    assert circuit_limit_w(profile([{"startPeriod": 0, "limit": 9000.0, "evseSleep": True}]), NOON_MS) == 0.0


def test_a_plan_of_another_purpose_or_time_puts_no_limit(either: str) -> None:
    periods = [{"startPeriod": 0, "limit": 4000.0}]
    assert circuit_limit_w(profile(periods, chargingProfilePurpose="TxProfile"), NOON_MS) is None
    assert circuit_limit_w(profile(periods, validFrom="2026-01-31T12:00:01Z"), NOON_MS) is None
    assert circuit_limit_w(profile(periods, validTo="2026-01-31T12:00:00Z"), NOON_MS) is None
    assert circuit_limit_w(profile(periods, validTo="2026-01-31T12:00:01Z"), NOON_MS) == 4000.0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"chargingSchedule": []}, "SetChargingProfile.chargingProfile.chargingSchedule"),
        ({"validFrom": "soon"}, "SetChargingProfile.chargingProfile.validFrom"),
    ],
)
def test_a_wrong_plan_is_refused_by_the_name_of_its_field(either: str, change: dict[str, Any], field: str) -> None:
    with pytest.raises(CallerError) as caught:
        circuit_limit_w(profile([{"startPeriod": 0, "limit": 1.0}], **change), NOON_MS)
    assert caught.value.param == field


def test_a_limit_below_nothing_is_refused(either: str) -> None:
    with pytest.raises(CallerError) as caught:
        circuit_limit_w(profile([{"startPeriod": 0, "limit": -1.0}]), NOON_MS)
    assert (
        caught.value.param == "SetChargingProfile.chargingProfile.chargingSchedule[0].chargingSchedulePeriod[0].limit"
    )


def test_of_several_messages_the_earliest_departure_and_the_lowest_limit_count(either: str) -> None:
    hints = read_hints(
        file_of(
            [2, "1", "NotifyEVChargingNeeds", needs("2026-01-31T15:00:00Z")],
            [2, "2", "NotifyEVChargingNeeds", needs("2026-01-31T14:00:00Z")],
            [2, "3", "SetChargingProfile", profile([{"startPeriod": 0, "limit": 9000.0}])],
            [2, "4", "SetChargingProfile", profile([{"startPeriod": 0, "limit": 5000.0}])],
            [2, "5", "Heartbeat", {}],
        ),
        NOON_MS,
    )
    assert hints == ocpp.Hints(departure_ms=NOON_MS + 2 * HOUR_MS, circuit_limit_w=5000.0)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", NEEDS_NAME),
        (b"\xff\xfe", NEEDS_NAME),
        (b"[" * 5000, NEEDS_NAME),
        (b'{"ocpp": "2.1", "messages": [], "more": 1}', NEEDS_NAME),
        (b'{"messages": []}' + b" " * ocpp.MAX_FILE_BYTES, NEEDS_NAME),
        (b'{"ocpp": "1.6", "messages": []}', "ocpp"),
        (b'{"messages": [' + b",".join([b"0"] * 65) + b"]}", "messages"),
        (b'{"messages": [[3, "1", {}]]}', "messages[0]"),
    ],
)
def test_a_file_that_is_none_is_refused(data: bytes, field: str) -> None:
    with pytest.raises(CallerError) as caught:
        read_hints(data, NOON_MS)
    assert caught.value.param == field


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(value=json_values, place=st.integers(0, 40), schema=st.booleans())
def test_whatever_stands_in_a_message_is_read_or_refused(value: object, place: int, schema: bool) -> None:
    whole = [needs(), profile([{"startPeriod": 0, "limit": 9000.0, "numberPhases": 3}], "A", duration=60)]
    message = copy.deepcopy(whole[place % 2])
    spots: list[tuple[Any, Any]] = []
    stack: list[Any] = [message]
    while stack:
        inner = stack.pop()
        for key, child in inner.items() if isinstance(inner, dict) else enumerate(inner):
            spots.append((inner, key))
            if isinstance(child, dict | list):
                stack.append(child)
    container, key = spots[place // 2 % len(spots)]
    container[key] = value
    with pytest.MonkeyPatch.context() as patch:
        if not schema:
            patch.setitem(sys.modules, "ocpp.messages", None)
        limit_w = limit_of(file_of([2, "1", (ocpp.NEEDS, ocpp.PROFILE)[place % 2], message]))
    assert limit_w is None or 0 <= limit_w <= 1e6


def limit_of(data: bytes) -> float | None:
    try:
        return read_hints(data, NOON_MS).circuit_limit_w
    except CallerError:
        return None


# -- the file ----------------------------------------------------------------------------------------------------------


def put(agent_dir: Path, data: bytes, at_ms: int) -> None:
    path = agent_dir / NEEDS_NAME
    path.write_bytes(data)
    os.utime(path, ns=(at_ms * 1_000_000, at_ms * 1_000_000))


def test_the_file_of_an_adapter_becomes_signals(tmp_path: Path) -> None:
    source = ChargingNeedsFile(tmp_path)
    assert source.read(NOON_MS) == Signals()
    plan = profile([{"startPeriod": 0, "limit": 9000.0}])
    put(tmp_path, file_of([2, "1", ocpp.NEEDS, needs()], [2, "2", ocpp.PROFILE, plan]), NOON_MS)
    later_ms = NOON_MS + 100_000
    signals = source.read(later_ms)
    assert signals.departure_ms is not None
    assert (signals.departure_ms.value, signals.departure_ms.at_ms) == (NOON_MS + HOUR_MS // 2, later_ms)
    assert signals.circuit_limit_w is not None
    assert (signals.circuit_limit_w.value, signals.circuit_limit_w.at_ms) == (
        9000.0,
        NOON_MS,
    )  # only its writer vouches
    (tmp_path / NEEDS_NAME).unlink()
    assert source.read(later_ms) == Signals()


def test_an_old_file_says_nothing(tmp_path: Path) -> None:
    source = ChargingNeedsFile(tmp_path)
    put(tmp_path, file_of([2, "1", ocpp.NEEDS, needs()]), NOON_MS)
    assert source.read(NOON_MS + ocpp.MAX_AGE_MS).departure_ms is not None
    assert source.read(NOON_MS + ocpp.MAX_AGE_MS + 1) == Signals()


def test_a_plan_moves_on_without_a_change_of_the_file(tmp_path: Path) -> None:
    source = ChargingNeedsFile(tmp_path)
    periods = [{"startPeriod": 0, "limit": 9000.0}, {"startPeriod": 60, "limit": 2000.0}]
    put(tmp_path, file_of([2, "1", ocpp.PROFILE, profile(periods, startSchedule="2026-01-31T12:00:00Z")]), NOON_MS)
    first, second = source.read(NOON_MS).circuit_limit_w, source.read(NOON_MS + 60_000).circuit_limit_w
    assert first is not None
    assert second is not None
    assert (first.value, second.value) == (9000.0, 2000.0)


def test_a_wrong_file_is_told_once_without_what_it_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ChargingNeedsFile(tmp_path)
    put(tmp_path, file_of([2, "1", ocpp.NEEDS, needs("2026-01-31 at noon")]), NOON_MS)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            assert source.read(NOON_MS + step * 30_000) == Signals()
    assert len(caplog.records) == 1
    assert "chargingNeeds.departureTime" in caplog.text
    assert "noon" not in caplog.text


def test_the_example_of_the_docs_is_a_file_that_is_read(either: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "departures.md").read_text("utf-8")
    example = page.split("```json")[1].split("```")[0].encode()
    assert read_hints(example, NOON_MS) == ocpp.Hints(
        departure_ms=NOON_MS - 5 * HOUR_MS - HOUR_MS // 2, circuit_limit_w=11040.0
    )


def test_of_the_car_and_the_charging_point_the_cautious_one_counts() -> None:
    def both(departure: int, limit_w: float, age_ms: int = 0) -> Signals:
        return Signals(
            departure_ms=Reading(departure, NOON_MS - age_ms), circuit_limit_w=Reading(limit_w, NOON_MS - age_ms)
        )

    early, late = both(NOON_MS + 1, 9000.0), both(NOON_MS + 2, 5000.0)
    expected = Signals(departure_ms=early.departure_ms, circuit_limit_w=late.circuit_limit_w)
    assert merged(early, late, NOON_MS) == merged(late, early, NOON_MS) == expected
    old = both(NOON_MS, 1.0, age_ms=700_000)
    assert merged(early, old, NOON_MS) == merged(old, early, NOON_MS) == early
    assert merged(early, Signals(), NOON_MS) == merged(Signals(), early, NOON_MS) == early
    rest = Signals(gear_is_park=Reading(True, NOON_MS))
    assert merged(rest, early, NOON_MS).gear_is_park == rest.gear_is_park
