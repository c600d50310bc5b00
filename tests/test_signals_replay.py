"""Recorded charging sessions: the two formats, their local times, errors that name the place, and the replayed car."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from motorpool.agent.signals.car import CarSpec
from motorpool.agent.signals.replay import ARRIVES_MS, DONE_MS, ReplaySource, of_user, spec_of
from motorpool.agent.signals.sessions import Session, boulder, load, norway
from motorpool.core.guard import Budgets, ConsentView, History, Policy, decide
from motorpool.core.signals import TABLE, Occupancy, Reading, Signals
from motorpool.errors import SetupError
from motorpool.types import Permit, ReasonCode

REPORTS = """"location";"user_id";"session_id";"plugin_time";"plugout_time";"connection_time";"energy_session"
"ASK";"ASK_1";"S_2";2019-07-02 21:28:00;2019-07-03 05:58:00;8,5;31,81
"ASK";"ASK_1";"S_1";2019-01-01 16:40:00;2019-01-01 18:10:00;1,5;15,92
"ASK";"ASK_2";"S_3";2019-01-01 16:40:00;NA;NA;27,67
"ASK";"ASK_2";"S_4";2019-01-01 16:40:00;2019-01-01 16:40:00;0;1
"ASK";"ASK_2";"S_5";2019-01-01 16:40:00;2019-01-01 17:40:00;1;NA
"BAR";"BAR_3";"S_6";2020-10-24 22:00:00;2020-10-25 07:00:00;10;4
"""
USERS = '"user_id";"charging_power";"battery_capacity"\n"ASK_1";10,93846;81,752\n"BAR_3";NA;NA\n'
PREDICTIONS = (
    '"user_id";"session_id";"charging_time";"SoC_diff";"SoC_start";"idle_time";"idle_session";"non_flex_session"\n'
    '"ASK_1";"S_1";1,5;35,4;59,55;5,8;63,8;NA\n"ASK_1";"S_2";1,5;35,4;NA;5,8;63,8;NA\n"BAR_3";"S_6";1;1;103,2;1;1;1\n'
)
STATIONS = (
    "\ufeffStation_Name,City,Start_Date___Time,Start_Time_Zone,End_Date___Time,End_Time_Zone,Energy__kWh_\n"
    '"BOULDER / BASELINE, ST1",Boulder,2018/07/12 15:54:00+00,MDT,2018/07/12 17:22:00+00,MDT,6.706\n'
    "BOULDER / JUNCTION ST1,Boulder,2018/01/12 16:24:00+00,MST,2018/01/12 20:24:00+00,MST,19.095\n"
    "BOULDER / JUNCTION ST1,Boulder,2018/01/13 16:24:00+00,,2018/01/13 16:24:00+00,,0\n"
)
STAY = Session(
    user="u",
    plug_in_ms=1_600_000_000_000,
    plug_out_ms=1_600_000_000_000 + 8 * 3_600_000,
    energy_kwh=10.0,
    soc_start_pct=60.0,
    charger_w=7_400.0,
    capacity_wh=60_000.0,
)
START_MS = 5_000_000_000_000


def utc_ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def test_norwegian_sessions_with_what_the_other_files_say(tmp_path: Path) -> None:
    reports = written(tmp_path, "reports.csv", REPORTS)
    users, predictions = written(tmp_path, "users.csv", USERS), written(tmp_path, "predictions.csv", PREDICTIONS)
    assert norway(reports, users, predictions) == [
        Session(
            user="ASK_1",
            plug_in_ms=utc_ms("2019-01-01 15:40"),  # winter: an hour ahead of UTC
            plug_out_ms=utc_ms("2019-01-01 17:10"),
            energy_kwh=15.92,
            soc_start_pct=59.55,
            charger_w=10_938.46,
            capacity_wh=81_752.0,
        ),
        Session(
            user="ASK_1",
            plug_in_ms=utc_ms("2019-07-02 19:28"),  # summer: two
            plug_out_ms=utc_ms("2019-07-03 03:58"),
            energy_kwh=31.81,
            charger_w=10_938.46,
            capacity_wh=81_752.0,
        ),
        Session(  # over the night in which clocks go back; a charge of 103 % says nothing
            user="BAR_3",
            plug_in_ms=utc_ms("2020-10-24 20:00"),
            plug_out_ms=utc_ms("2020-10-25 06:00"),
            energy_kwh=4.0,
        ),
    ]
    alone = norway(reports)
    assert len(alone) == 3
    assert all(session.charger_w is None and session.soc_start_pct is None for session in alone)


def test_boulder_writes_times_in_utc_and_names_the_zone_of_the_place(tmp_path: Path) -> None:
    assert boulder(written(tmp_path, "boulder.csv", STATIONS)) == [
        Session(
            user="BOULDER / JUNCTION ST1",
            plug_in_ms=utc_ms("2018-01-12 16:24"),
            plug_out_ms=utc_ms("2018-01-12 20:24"),
            energy_kwh=19.095,
        ),
        Session(
            user="BOULDER / BASELINE, ST1",
            plug_in_ms=utc_ms("2018-07-12 15:54"),
            plug_out_ms=utc_ms("2018-07-12 17:22"),
            energy_kwh=6.706,
        ),
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("15,92", "much", "reports.csv, line 3, column energy_session: is not a number"),
        ("15,92", "inf", "reports.csv, line 3, column energy_session: is not a number"),
        ("2019-01-01 18:10:00", "today", "reports.csv, line 3, column plugout_time: is not a time"),
        ('"ASK_1";"S_1"', 'NA;"S_1"', "reports.csv, line 3, column user_id: is empty"),
        ("1,5;15,92", "1,5", "reports.csv, line 3: has 6 columns, the header 7"),
        ('"energy_session"', '"energy"', "reports.csv, line 1: column energy_session is missing"),
        ('"ASK_1";"S_2"', '"ASK_1"";"S_2"', "cannot read reports.csv"),
    ],
)
def test_what_is_wrong_with_a_file_names_its_place(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in REPORTS
    with pytest.raises(SetupError) as failed:
        norway(written(tmp_path, "reports.csv", REPORTS.replace(old, new)))
    assert words in failed.value.message
    assert str(tmp_path) not in failed.value.message


def test_an_unknown_zone_a_wrong_encoding_and_no_file_say_so(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="line 3, column Start_Time_Zone: is neither MST nor MDT"):
        boulder(written(tmp_path, "b.csv", STATIONS.replace("MST", "PST", 1)))
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "c.csv", tmp_path / "none.csv"):
        with pytest.raises(SetupError, match="name a CSV file"):
            norway(path)


def value(signals: Signals, name: str) -> object:
    reading = getattr(signals, name)
    return None if reading is None else reading.value


def charge(source: ReplaySource, now_ms: int) -> float:
    reading = source.read(now_ms).soc_displayed_pct
    assert reading is not None
    assert reading.at_ms == now_ms
    return reading.value


def test_a_session_is_lived_through_from_arrival_to_departure() -> None:
    source = ReplaySource([STAY], START_MS)
    told: list[int] = []
    source.on_change(lambda: told.append(1))
    early = source.read(START_MS - 1_000)  # on the road
    assert (value(early, "gear_is_park"), value(early, "speed_kmh")) == (False, 50.0)
    assert value(early, "seat_occupied") is Occupancy.OCCUPIED
    source.tick(START_MS)
    parked = source.read(START_MS)
    assert (value(parked, "gear_is_park"), value(parked, "cable_connected")) == (True, False)
    assert source.next_event_ms() == START_MS + ARRIVES_MS
    plugged_ms = START_MS + ARRIVES_MS
    source.tick(plugged_ms)
    assert value(source.read(plugged_ms), "cable_connected") is True
    assert charge(source, plugged_ms) == pytest.approx(60.0)
    assert charge(source, plugged_ms + 3_600_000) == pytest.approx(60 + 7.4 * 0.88 / 60 * 100, abs=0.1)
    assert charge(source, plugged_ms + 6 * 3_600_000) == pytest.approx(60 + 10 * 0.88 / 60 * 100, abs=0.1)
    standing = source.read(plugged_ms + 6 * 3_600_000)
    assert value(standing, "battery_power_w") == pytest.approx(0.0, abs=1e-6)
    out_ms = plugged_ms + 8 * 3_600_000
    source.tick(out_ms - 1_000)
    assert value(source.read(out_ms - 1_000), "doors_open") is True
    assert value(source.read(out_ms - 1_000), "cable_connected") is True
    assert value(source.read(out_ms), "cable_connected") is False
    assert value(source.read(out_ms + 5_000), "speed_kmh") == 50.0
    assert len(told) == 3
    assert source.next_event_ms() == DONE_MS
    shown = source.read(out_ms + 86_400_000)
    assert all(
        reading.at_ms == out_ms + 86_400_000 for name in TABLE if isinstance(reading := getattr(shown, name), Reading)
    )


def test_the_guard_works_through_a_replayed_night() -> None:
    source = ReplaySource([STAY], START_MS, drawn_w=lambda: 100.0)
    consent = ConsentView(refusal=None, max_watts_w=300, floor_pct=0.0, expires_ms=START_MS * 2)

    def codes(at_ms: int) -> set[ReasonCode]:
        verdict, _ = decide(Policy(dwell_ms=0), consent, source.read(at_ms), Budgets(), History(), at_ms)
        return set() if isinstance(verdict, Permit) else {reason.code for reason in verdict}

    assert {ReasonCode.MOVING, ReasonCode.OCCUPIED} <= codes(START_MS - 1)
    assert ReasonCode.NOT_PLUGGED_IN in codes(START_MS + 10_000)
    assert codes(START_MS + ARRIVES_MS + 60_000) == set()
    assert codes(START_MS + ARRIVES_MS + 7 * 3_600_000) == set()
    assert {ReasonCode.DOOR_OPEN, ReasonCode.UNLOCKED} <= codes(START_MS + ARRIVES_MS + 8 * 3_600_000 - 1_000)


def test_time_runs_as_fast_as_it_is_told_and_gaps_are_cut() -> None:
    after_ms = STAY.plug_out_ms + 16 * 3_600_000
    again = Session(user="u", plug_in_ms=after_ms, plug_out_ms=after_ms + 3_600_000, energy_kwh=0.5)
    fast = ReplaySource([STAY, again], START_MS, speed=60.0, longest_gap_ms=3_600_000)
    assert fast.recorded_ms(START_MS + 60_000) == STAY.plug_in_ms - ARRIVES_MS + 3_600_000
    assert fast.next_event_ms() == START_MS
    night_ms = START_MS + 8 * 60_000
    assert value(fast.read(night_ms), "cable_connected") is True
    assert value(fast.read(night_ms + 30_000), "cable_connected") is False
    assert value(fast.read(START_MS + 9 * 60_000 + 1_000), "cable_connected") is True
    assert fast.next_event_ms() == pytest.approx(START_MS + 10 * 60_000, abs=1_000)


def test_the_replay_tells_of_each_act_at_its_time() -> None:
    now = [START_MS]
    source = ReplaySource([STAY], START_MS, speed=1e9)
    told: list[int] = []
    source.on_change(lambda: told.append(now[0]))

    def clock() -> int:
        now[0] += 1_000
        return now[0]

    asyncio.run(source.run(clock))
    assert told
    assert source.next_event_ms() == DONE_MS


def test_sessions_of_one_user_without_what_cannot_be() -> None:
    def stay(start: int, end: int, user: str = "u") -> Session:
        return Session(user=user, plug_in_ms=start * 60_000, plug_out_ms=end * 60_000, energy_kwh=1.0)

    mine = [stay(0, 100), stay(200, 300)]
    assert of_user([mine[1], stay(50, 120), stay(150, 150), stay(0, 9, "other"), mine[0]], "u") == mine
    with pytest.raises(SetupError, match="choose another"):
        of_user(mine, "nobody")
    for wrong in ([], [mine[0], stay(50, 120)], [stay(0, 0)]):
        with pytest.raises(SetupError, match=r"replay|replayed"):
            ReplaySource(wrong, START_MS)
    with pytest.raises(SetupError, match="speed"):
        ReplaySource(mine, START_MS, speed=0.0)


def test_what_a_session_does_not_say_is_taken_from_the_car() -> None:
    base = CarSpec()
    unknown = Session(user="u", plug_in_ms=0, plug_out_ms=3_600_000, energy_kwh=6.0)
    spec = spec_of(unknown, base)
    assert spec.capacity_wh == base.capacity_wh
    assert spec.charge_limit_pct == pytest.approx(95.0)
    assert spec.soc_pct == pytest.approx(95.0 - 6.0 * 0.88 / 60 * 100)
    strong = spec_of(Session(user="u", plug_in_ms=0, plug_out_ms=1, energy_kwh=6.0, charger_w=22_000.0), base)
    assert (strong.charger_ac_w, strong.circuit_w) == (22_000.0, 22_000.0)
    empty = spec_of(Session(user="u", plug_in_ms=0, plug_out_ms=1, energy_kwh=600.0), base)
    assert (empty.soc_pct, empty.charge_limit_pct) == (5.0, 100.0)


def test_the_data_set_is_known_by_its_files_and_headers(tmp_path: Path) -> None:
    folder = tmp_path / "norway"
    folder.mkdir()
    with pytest.raises(SetupError, match="holds no file like"):
        load(folder)
    written(folder, "a_Dataset1_b.csv", REPORTS)
    written(folder, "a_Dataset2_b.csv", USERS)
    assert load(folder) == norway(folder / "a_Dataset1_b.csv", folder / "a_Dataset2_b.csv")
    assert load(folder / "a_Dataset1_b.csv") == norway(folder / "a_Dataset1_b.csv")
    stations = written(tmp_path, "stations.csv", STATIONS)
    assert load(stations) == boulder(stations)
    with pytest.raises(SetupError, match="neither"):
        load(written(tmp_path, "other.csv", "a,b\n1,2\n"))
    with pytest.raises(SetupError, match="cannot read"):
        load(tmp_path / "none.csv")
    written(folder, "c_Dataset1_d.csv", REPORTS)
    with pytest.raises(SetupError, match="2 files"):
        load(folder)
