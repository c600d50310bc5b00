"""The world of a simulated fleet: it is made of its people and its scenario, and is the same for the same seed."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motorpool.core.departures import DAY_MS, HOUR_MS, MINUTE_MS, Habits
from motorpool.core.departures_fleet import NORWAY_HOME
from motorpool.core.jit import compiled
from motorpool.errors import SetupError
from motorpool.sim import arrivals, generator, people, recordings, scenario, world
from motorpool.sim.people import HOME, SHARED, WEEK_MS, WORK, People, Stay

MONDAY_MS = 4 * DAY_MS  # 1970-01-05
EXACT = scenario.People(home=1.0, shared=0.0, work=0.0, jitter_min=0.0, settle_s=0.0, leave_s=0.0)


@pytest.fixture(scope="module")
def made_up() -> People:
    return generator.people(seed=3, users=(24, 8, 10), weeks=14)


def commuter(weeks: int, leaves_h: float = 7.5, comes_h: float = 17.0) -> list[Stay]:
    """Plugged in every evening, gone every morning."""
    return [
        Stay(
            MONDAY_MS + day * DAY_MS + int(comes_h * HOUR_MS), MONDAY_MS + (day + 1) * DAY_MS + int(leaves_h * HOUR_MS)
        )
        for day in range(7 * weeks)
    ]


def one_user(weeks: int = 12) -> People:
    return people.learn({"a": commuter(weeks)}, HOME, "a test")


def digest(found: world.World) -> str:
    total = hashlib.sha256()
    for part in (found, found.jobs):
        for name in part.__struct_fields__:
            column = getattr(part, name)
            if isinstance(column, np.ndarray):
                total.update(f"{name} {column.dtype} {column.shape}".encode() + column.tobytes())
    return total.hexdigest()


def plain(**changes: object) -> scenario.Scenario:
    return msgspec.structs.replace(scenario.load("s1"), **changes)


# -- people ------------------------------------------------------------------------------------------------------------


def test_a_user_is_split_by_time_and_lives_whole_weeks_from_a_monday_on() -> None:
    found = one_user(weeks=20)
    # 70 % of 20 weeks is the end of week 14: six are left, of which the last is not over.
    assert found.weeks.tolist() == [5]
    assert found.first.tolist() == [0, len(found.start_ms)]
    assert found.start_ms.min() == 0  # on Monday at 00:00 it is plugged in since Sunday
    assert found.end_ms.max() <= 5 * WEEK_MS
    assert set((found.end_ms % DAY_MS / HOUR_MS).tolist()) == {7.5, 0.0}  # 0: the end of what is lived again
    assert np.all(found.start_ms[1:] >= found.end_ms[:-1])


def test_what_a_vehicle_would_report_is_what_the_product_says_after_the_first_part() -> None:
    stays = commuter(20)
    cut_ms = stays[0].begin_ms + people.TRAIN_PART * (stays[-1].end_ms - stays[0].begin_ms)
    habits = Habits(NORWAY_HOME)
    for stay in stays:
        if stay.end_ms <= cut_ms:
            habits.advance(False, stay.begin_ms - 1, 0)
            for at_ms in [*range(stay.begin_ms, stay.end_ms, 30 * MINUTE_MS)]:
                habits.advance(True, at_ms, 0)
            habits.advance(False, stay.end_ms, 0)
    found = people.learn({"a": stays}, HOME, "a test")
    for hour in (0, 5, 22, 50, 167):
        bound_min = habits.bound_ms(MONDAY_MS + hour * HOUR_MS, 0) // MINUTE_MS
        assert found.stay_bound_min[0, hour] == bound_min - bound_min % 5
        assert found.risk_pct[0, hour] == round(100 * habits.risk(MONDAY_MS + hour * HOUR_MS, 0, 15 * MINUTE_MS))
    # In the evening it promises the night, and shortly before half past seven next to nothing.
    assert found.stay_bound_min[0, 20] > 8 * 60
    assert found.stay_bound_min[0, 24 + 7] < 60


def test_later_stays_teach_nothing() -> None:
    usual, changed = commuter(20), commuter(20)
    changed[-30:] = [Stay(stay.begin_ms, stay.begin_ms + 30 * MINUTE_MS) for stay in changed[-30:]]
    changed[-1] = usual[-1]  # so that both are split at the same moment
    a, b = (people.learn({"a": stays}, HOME, "a test") for stays in (usual, changed))
    assert np.array_equal(a.stay_bound_min, b.stay_bound_min)
    assert not np.array_equal(a.end_ms, b.end_ms)


def test_users_without_enough_time_are_left_out_and_nobody_is_an_error() -> None:
    short = people.learn({"a": commuter(3)}, HOME, "a test")
    assert len(short) == 0
    with pytest.raises(SetupError, match="stays to learn from"):
        people.join([short], "a test")
    both = people.join([one_user(), people.learn({"b": commuter(14), "c": commuter(12)}, SHARED, "t")], "both")
    assert both.kind.tolist() == [HOME, SHARED, SHARED]
    assert both.first[-1] == len(both.start_ms)
    assert both.of_kind(SHARED).tolist() == [1, 2]


def test_people_are_kept_in_a_file(tmp_path: Path, made_up: People) -> None:
    people.save(made_up, tmp_path / "people.npz")
    again = people.load(tmp_path / "people.npz")
    assert all(np.array_equal(getattr(again, name), getattr(made_up, name)) for name in people.COLUMNS)
    assert again.source == made_up.source
    (tmp_path / "bad.npz").write_bytes(b"no zip file")
    with pytest.raises(SetupError, match=r"bad\.npz"):
        people.load(tmp_path / "bad.npz")


def norway_file(folder: Path, weeks: int) -> Path:
    rows = ['"location";"user_id";"session_id";"plugin_time";"plugout_time";"connection_time";"energy_session"']
    for day in range(7 * weeks):
        begin = np.datetime64("2019-01-07T17:00:00") + np.timedelta64(day, "D")
        end = begin + np.timedelta64(14 * 60 + 30, "m")
        times = ";".join(str(at).replace("T", " ") for at in (begin, end))
        rows += [f'"A";"{user}";"{user}_{day}";{times};14,5;10,0' for user in ("A_1", "A_Share-2")]
    path = folder / "norway_Dataset1.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def boulder_file(folder: Path, weeks: int) -> Path:
    """Two cars at one station at the same time, from 9 to 17 h by the clock of Boulder."""
    rows = ["Station_Name,Start_Date___Time,Start_Time_Zone,End_Date___Time,End_Time_Zone,Energy__kWh_"]
    for day in range(7 * weeks):
        begin = np.datetime64("2018-11-05T16:00:00") + np.timedelta64(day, "D")  # the file's clock is UTC
        times = [str(at).replace("T", " ").replace("-", "/") for at in (begin, begin + np.timedelta64(8, "h"))]
        rows += [f"STATION 1,{times[0]}+00,MST,{times[1]}+00,MST,9.5"] * 2
    path = folder / "boulder.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_both_formats_of_files_become_people_of_their_kinds_in_local_time(tmp_path: Path) -> None:
    found = people.read([norway_file(tmp_path, 14), boulder_file(tmp_path, 14)])
    assert found.kind.tolist() == [HOME, SHARED, WORK, WORK]  # a station with two plugs is two
    for user in range(4):
        rows = slice(int(found.first[user]) + 1, int(found.first[user + 1]) - 1)
        begins = {*(found.start_ms[rows] % DAY_MS / HOUR_MS).tolist()}
        assert begins == ({17.0} if found.kind[user] != WORK else {9.0})


# -- the generator -----------------------------------------------------------------------------------------------------


def hours_of(stays: list[list[Stay]]) -> np.ndarray:
    return np.array([(stay.end_ms - stay.begin_ms) / HOUR_MS for user in stays for stay in user])


def test_made_up_home_users_have_the_published_figures() -> None:
    weeks, users = 20, 200
    stays = [generator.home(1, user, weeks) for user in range(users)]
    weekly = np.array([len(user) / weeks for user in stays])
    assert 3.8 < weekly.mean() < 4.7  # published: 4.1
    assert 1.2 < np.quantile(weekly, 0.1) < 1.9  # 1.5
    assert 7.0 < np.quantile(weekly, 0.9) < 9.5  # 8.6
    plugged = [sum(stay.end_ms - stay.begin_ms for stay in user) / (weeks * WEEK_MS) for user in stays]
    assert 0.30 < np.mean(plugged) < 0.40  # 0.35
    hours = hours_of(stays)
    assert 12.0 < hours.mean() < 14.0  # 12.8
    assert 10.5 < np.median(hours) < 13.0  # 11.3
    assert 0.4 < np.quantile(hours, 0.05) < 0.9  # 0.6
    assert 34.0 < np.quantile(hours, 0.95) < 41.0  # 37.7


def test_made_up_home_users_come_and_go_by_the_published_clock() -> None:
    rows = [stay for user in range(200) for stay in generator.home(1, user, 20)]
    begins = np.bincount([stay.begin_ms // HOUR_MS % 24 for stay in rows], minlength=24) / len(rows)
    assert begins.argmax() == 15 or begins.argmax() == 16
    assert begins[15] == pytest.approx(0.117, abs=0.015)
    assert begins[16] == pytest.approx(0.153, abs=0.015)
    assert np.all((begins[17:21] > 0.08) & (begins[17:21] < 0.105))  # .09 to .10
    plugged, left = np.zeros(24), np.zeros(24)
    for stay in rows:
        for hour in range(stay.begin_ms // HOUR_MS, -(-stay.end_ms // HOUR_MS)):
            inside = min(stay.end_ms, (hour + 1) * HOUR_MS) - max(stay.begin_ms, hour * HOUR_MS)
            plugged[hour % 24] += inside / HOUR_MS
        left[stay.end_ms // HOUR_MS % 24] += 1
    assert left / plugged == pytest.approx(np.array(generator.HOME_HAZARD), rel=0.2, abs=0.006)
    weekdays = [stay.end_ms for stay in rows if (stay.end_ms // DAY_MS + 3) % 7 < 5]
    quarters = np.bincount([at % DAY_MS // (15 * MINUTE_MS) for at in weekdays], minlength=96) / len(weekdays)
    assert quarters.argmax() == 29  # 07:15
    assert quarters[29] == pytest.approx(0.078, abs=0.015)


def test_made_up_home_users_are_regular() -> None:
    spreads = []
    for user in range(120):
        ends = [stay.end_ms for stay in generator.home(1, user, 20) if (stay.end_ms // DAY_MS + 3) % 7 < 5]
        mornings = [at % DAY_MS / HOUR_MS for at in ends if 4 * HOUR_MS < at % DAY_MS < 10 * HOUR_MS]
        if len(mornings) >= 8:
            spreads.append(np.subtract(*np.quantile(mornings, (0.75, 0.25))))
    low, middle, high = np.quantile(spreads, (0.25, 0.5, 0.75))
    assert 0.2 < low < 0.6  # published: 0.3
    assert 0.5 < middle < 1.1  # 0.9
    assert 0.8 < high < 1.8  # 1.5


def test_made_up_shared_chargers_and_work_places_have_the_published_figures() -> None:
    shared = hours_of([generator.shared(1, user, 20) for user in range(100)])
    assert 3.5 < np.median(shared) < 4.6  # 4.0
    assert 5.8 < shared.mean() < 7.2  # 6.6
    assert 14.0 < np.quantile(shared, 0.95) < 21.0  # 17.0
    at_work = [generator.work(1, user, 20) for user in range(100)]
    work = hours_of(at_work)
    assert 1.5 < np.median(work) < 2.1  # 1.8
    assert 2.6 < work.mean() < 3.6  # 3.2
    assert 7.5 < np.quantile(work, 0.95) < 10.0  # 9.1
    plugged = work.sum() * HOUR_MS / (100 * 20 * WEEK_MS)
    assert 0.03 < plugged < 0.05  # 0.04


def test_made_up_people_are_the_same_for_a_seed(made_up: People) -> None:
    again = generator.people(seed=3, users=(24, 8, 10), weeks=14)
    assert all(np.array_equal(getattr(again, name), getattr(made_up, name)) for name in people.COLUMNS)
    assert generator.home(4, 0, 5) != generator.home(3, 0, 5)


# -- windows -----------------------------------------------------------------------------------------------------------


def test_windows_are_the_users_stays_again() -> None:
    found = world.build(plain(people=EXACT, load=0.0, best_effort=0.0), one_user(), 10, seed=1)
    for vehicle in range(10):
        rows = slice(int(found.first[vehicle]), int(found.first[vehicle + 1]))
        hours = list(zip(found.start_ms[rows] / HOUR_MS, found.end_ms[rows] / HOUR_MS, strict=True))
        nights = [(24 * day + 17.0, 24 * day + 31.5) for day in range(6)]
        assert hours == [(0.0, 7.5), *nights, (6 * 24 + 17.0, 168.0)]


def test_the_guard_says_yes_after_the_doors_are_locked_and_until_the_first_touch() -> None:
    owners = msgspec.structs.replace(EXACT, settle_s=120.0, leave_s=20.0)
    found = world.build(plain(people=owners, load=0.0, best_effort=0.0), one_user(), 1, seed=1)
    assert found.start_ms[1] == 17 * HOUR_MS + 120_000
    assert found.end_ms[0] == 7.5 * HOUR_MS - 20_000
    # Who stands there when the world begins has been there for long, and who does at its end stays.
    assert found.start_ms[0] == 0
    assert found.end_ms[-1] == found.horizon_ms


def test_an_empty_battery_is_charged_first() -> None:
    stays = [stay._replace(wait_ms=HOUR_MS) for stay in commuter(12)]
    found = world.build(plain(people=EXACT, load=0.0), people.learn({"a": stays}, HOME, "t"), 1, seed=1)
    assert found.start_ms[1] == 18 * HOUR_MS


def test_a_vehicle_is_moved_as_a_whole_and_by_no_more_than_the_jitter() -> None:
    owners = msgspec.structs.replace(EXACT, jitter_min=10.0)
    found = world.build(plain(people=owners, load=0.0), one_user(), 400, seed=1)
    ends = [found.end_ms[int(found.first[v]) : int(found.first[v + 1]) - 1] for v in range(400)]
    moved = {tuple((each % DAY_MS - int(7.5 * HOUR_MS)).tolist()) for each in ends}
    assert all(len(set(row)) == 1 for row in moved)
    amounts = np.array([row[0] for row in moved])
    assert np.abs(amounts).max() <= 10 * MINUTE_MS
    assert amounts.min() < -8 * MINUTE_MS < 8 * MINUTE_MS < amounts.max()


def test_windows_are_in_order_and_apart_in_every_kind_of_world(made_up: People) -> None:
    for name in ("s1", "s10", "s14"):
        found = world.build(scenario.load(name), made_up, 300, seed=2)
        assert found.first[0] == 0
        assert found.first[-1] == len(found.start_ms) == len(found.end_ms) == len(found.silent)
        assert np.all(found.end_ms - found.start_ms >= world.MIN_WINDOW_MS)
        assert found.start_ms.min() >= 0
        assert found.end_ms.max() <= found.horizon_ms
        vehicle = np.repeat(np.arange(300), np.diff(found.first))
        same = vehicle[1:] == vehicle[:-1]
        assert np.all(found.start_ms[1:][same] >= found.end_ms[:-1][same])


def test_the_fleet_is_plugged_in_and_leaves_as_its_people_do(made_up: People) -> None:
    owners = msgspec.structs.replace(EXACT, jitter_min=10.0)
    found = world.build(plain(people=owners, load=0.0, best_effort=0.0), made_up, 20_000, seed=5)
    at_ms = np.arange(0, WEEK_MS, HOUR_MS) + HOUR_MS // 2
    in_world = np.searchsorted(np.sort(found.start_ms), at_ms) - np.searchsorted(np.sort(found.end_ms), at_ms)
    real, ends = np.zeros(168), np.zeros(168)
    for user in made_up.of_kind(HOME):
        rows = slice(int(made_up.first[user]), int(made_up.first[user + 1]))
        weight = 1.0 / made_up.weeks[user]  # each user is as likely as any other, whatever its number of weeks
        for begin, end in zip(made_up.start_ms[rows], made_up.end_ms[rows], strict=True):
            hours = np.arange((begin - HOUR_MS // 2) // HOUR_MS + 1, (end - HOUR_MS // 2) // HOUR_MS + 1)
            np.add.at(real, hours % 168, weight)
            if end % WEEK_MS:
                ends[end // HOUR_MS % 168] += weight
    users = len(made_up.of_kind(HOME))
    assert in_world / 20_000 == pytest.approx(real / users, abs=0.02)
    gone = np.bincount((found.end_ms[found.end_ms < found.horizon_ms] // HOUR_MS).astype(int), minlength=168)
    assert gone / 20_000 == pytest.approx(ends / users, abs=0.02)
    # The morning exodus: the hour in which most leave is on a weekday at seven or eight, in both.
    assert gone.argmax() % 24 in (6, 7, 8)


def test_kinds_come_as_their_weights_say_and_a_kind_that_nobody_has_is_left_out(made_up: People) -> None:
    found = world.build(plain(load=0.0), made_up, 20_000, seed=1)
    kinds = np.bincount(made_up.kind[found.user], minlength=3) / 20_000
    assert kinds == pytest.approx([0.7, 0.15, 0.15], abs=0.01)
    alone = world.build(plain(load=0.0), one_user(), 50, seed=1)
    assert set(alone.user.tolist()) == {0}
    with pytest.raises(SetupError, match="no user of a kind"):
        world.build(plain(people=scenario.People(home=0.0, shared=1.0, work=1.0)), one_user(), 50)


def test_a_holiday_is_lived_as_a_sunday() -> None:
    weekdays = [stay for stay in commuter(14) if (stay.end_ms // DAY_MS + 3) % 7 < 5]
    who = people.learn({"a": weekdays}, HOME, "a test")
    usual = world.build(plain(people=EXACT, load=0.0), who, 1, seed=1)
    holiday = plain(people=EXACT, load=0.0, calendar=scenario.Calendar(holidays=(2,)))
    found = world.build(holiday, who, 1, seed=1)
    wednesday_h = 2 * 24
    assert any(usual.end_ms == (wednesday_h + 7.5) * HOUR_MS)
    assert not any((found.end_ms > wednesday_h * HOUR_MS) & (found.end_ms < (wednesday_h + 17) * HOUR_MS))


def test_after_a_change_of_clocks_people_go_by_the_new_time() -> None:
    spring = scenario.Calendar(clock_change_day=3, clock_change_min=60, vehicles_know=True)
    found = world.build(plain(people=EXACT, load=0.0, calendar=spring), one_user(), 1, seed=1)
    leaves = (found.end_ms[:-1] / HOUR_MS).tolist()
    assert leaves[:3] == [7.5, 24 + 7.5, 48 + 7.5]
    assert leaves[3:6] == [72 + 6.5, 96 + 6.5, 120 + 6.5]
    assert found.table_hour[73] == 73
    assert found.table_hour[74] == 75
    unaware = msgspec.structs.replace(spring, vehicles_know=False)
    found = world.build(plain(people=EXACT, load=0.0, calendar=unaware), one_user(), 1, seed=1)
    assert found.table_hour.tolist() == [*range(168), 0]


def test_vehicles_that_feed_the_grid_may_not_compute_and_say_so(made_up: People) -> None:
    event = scenario.GridEvent(zone=0, from_h=18.0, hours=2.0, share=0.5)
    base = plain(load=0.0, best_effort=0.0)
    before = world.build(base, made_up, 4_000, seed=1)
    after = world.build(msgspec.structs.replace(base, grid_events=(event,)), made_up, 4_000, seed=1)

    def at_19h(found: world.World, zone: int) -> int:
        zones = np.repeat(found.zone, np.diff(found.first))
        return int(((found.start_ms <= 19 * HOUR_MS) & (found.end_ms > 19 * HOUR_MS) & (zones == zone)).sum())

    assert at_19h(after, 1) == at_19h(before, 1)
    assert at_19h(after, 0) == pytest.approx(at_19h(before, 0) / 2, rel=0.2)
    at_18h = after.end_ms == 18 * HOUR_MS
    assert at_18h.sum() > 20
    assert not after.silent[at_18h].any()
    assert (after.start_ms == 20 * HOUR_MS).sum() > 20
    kept = (after.end_ms - after.start_ms).sum()
    assert kept < (before.end_ms - before.start_ms).sum()


# -- vehicles ----------------------------------------------------------------------------------------------------------


def test_vehicles_are_as_the_scenario_says(made_up: People) -> None:
    found = world.build(scenario.load("s6"), made_up, 40_000, seed=9)
    share = np.bincount(found.region) / 40_000
    assert share == pytest.approx([0.35, 0.25, 0.2, 0.2], abs=0.01)
    assert set(zip(found.region.tolist(), found.zone.tolist(), strict=True)) == {
        (0, 0), (0, 1), (1, 2), (2, 3), (2, 4), (3, 5),
    }  # fmt: skip
    assert np.bincount(found.cheat) / 40_000 == pytest.approx([0.95, 0.03, 0.01, 0.01], abs=0.003)
    assert found.slow.mean() == pytest.approx(0.02, abs=0.003)
    honest = (found.cheat == world.HONEST) & (found.slow == 0)
    assert np.array_equal(found.speed[honest], found.declared[honest])
    slow = (found.cheat == world.HONEST) & (found.slow == 1)
    assert found.declared[slow] / found.speed[slow] == pytest.approx(5.0, rel=1e-5)
    liars = (found.cheat == world.LIAR) & (found.slow == 0)
    assert found.declared[liars] / found.speed[liars] == pytest.approx(3.0, rel=1e-5)
    logs = np.log(found.declared[honest] / np.array([110.0, 283.0, 420.0])[found.hw[honest]])
    assert logs.mean() == pytest.approx(0.0, abs=0.01)
    assert logs.std() == pytest.approx(0.5, abs=0.01)
    assert not np.any(found.trust[(found.cheat == world.CHEATER)] == world.ATTESTED)
    assert found.outage_per_h.mean() == pytest.approx(0.3, rel=0.05)


def test_models_lie_where_they_fit_and_one_of_them_is_in_memory(made_up: People) -> None:
    found = world.build(plain(load=0.0), made_up, 20_000, seed=9)
    large = found.on_disk >> 2 & 1 == 1
    assert not large[found.memory_gb < 28].any()
    assert large[found.memory_gb >= 28].mean() == pytest.approx(0.4, abs=0.02)
    loaded = found.resident != world.NO_MODEL
    assert np.all(found.on_disk[loaded] >> found.resident[loaded] & 1 == 1)
    assert not found.on_disk[~loaded].any()


def test_car_parks_hold_vehicles_of_one_zone_and_homes_stand_alone(made_up: People) -> None:
    found = world.build(plain(load=0.0), made_up, 5_000, seed=9)
    kind = made_up.kind[found.user]
    assert not found.site[kind == HOME].any()
    assert np.all(found.site[kind != HOME] > 0)
    numbers, sizes = np.unique(found.site[found.site > 0], return_counts=True)
    assert sizes.max() <= 40
    assert len(found.site_w) == numbers[-1] + 1
    assert all(len(set(found.zone[found.site == number].tolist())) == 1 for number in numbers)


def test_what_the_fleet_can_do_is_speed_times_time(made_up: People) -> None:
    hot = plain(load=0.0, heat=(scenario.Heat(factor=0.5, from_h=24, hours=24, clock_from_h=0, clock_to_h=24),))
    for setup, slot_ms in ((plain(load=0.0), HOUR_MS), (hot, HOUR_MS // 4)):
        found = world.build(setup, made_up, 200, seed=4)
        tokens = world.tokens_by_slot(found, found.region.astype(np.int64), 4, slot_ms)
        expected = np.zeros_like(tokens)
        for vehicle in range(200):
            for row in range(int(found.first[vehicle]), int(found.first[vehicle + 1])):
                begin, end = int(found.start_ms[row]), int(found.end_ms[row])
                for slot in range(begin // slot_ms, -(-end // slot_ms)):
                    inside = min(end, (slot + 1) * slot_ms) - max(begin, slot * slot_ms)
                    factor = found.heat[found.region[vehicle], slot * slot_ms // HOUR_MS]
                    expected[found.region[vehicle], slot] += inside / 1000 * float(found.speed[vehicle]) * factor
        assert tokens == pytest.approx(expected, rel=1e-5, abs=1.0)


# -- prices and jobs ---------------------------------------------------------------------------------------------------


def test_prices_have_their_mean_their_peaks_and_what_happens_to_them(made_up: People) -> None:
    found = world.build(plain(load=0.0), made_up, 50, seed=1)
    assert found.price_micro_kwh.mean(axis=1) == pytest.approx([220e3, 220e3, 180e3, 90e3, 90e3, 230e3], rel=1e-3)
    by_hour = found.price_micro_kwh.reshape(6, 7, 24).mean(axis=(0, 1))
    assert by_hour.argmax() in (17, 18, 19)
    assert by_hour[13] < by_hour[8]
    assert found.carbon_g_kwh[3].mean() < 40 < 300 < found.carbon_g_kwh[0].mean()  # Norway, Germany
    assert found.carbon_g_kwh.min() >= 0
    shocked = world.build(scenario.load("s9"), made_up, 50, seed=1)
    assert shocked.price_micro_kwh[2, 40:44] == pytest.approx(5 * found.price_micro_kwh[2, 40:44], rel=1e-3)
    assert (shocked.price_micro_kwh[:3, 155:160] < 0).all()
    assert (shocked.price_micro_kwh[5] == found.price_micro_kwh[5])[44:].all()


def test_jobs_are_the_load_and_lie_within_the_world(made_up: People) -> None:
    found = world.build(scenario.load("s1"), made_up, 1_000, seed=6)
    jobs = found.jobs
    total = world.tokens_by_slot(found, np.zeros(1_000, np.int64), 1).sum()
    deadline = jobs.kind == arrivals.BATCH
    assert jobs.tokens[deadline].sum() == pytest.approx(0.8 * total, rel=1e-3)
    assert jobs.tokens[jobs.kind == arrivals.BEST_EFFORT].sum() == pytest.approx(0.5 * total, rel=1e-3)
    assert np.all(np.diff(jobs.release_ms) >= 0)
    assert np.all(jobs.deadline_ms > jobs.release_ms)
    assert jobs.deadline_ms.max() <= found.horizon_ms
    assert jobs.lines.min() >= 1
    locked = np.isin(jobs.region_mask[deadline], [1, 2, 4, 8])
    assert locked.mean() == pytest.approx(0.5, abs=0.06)
    assert set(((jobs.deadline_ms - jobs.release_ms)[deadline] // HOUR_MS).tolist()) == {1, 4, 12, 24}
    assert jobs.memory_gb.tolist() == [[6, 12, 28][model] for model in jobs.model]


def test_no_job_is_more_than_its_part_of_what_can_be_done_until_its_deadline(made_up: People) -> None:
    found = world.build(scenario.load("s1"), made_up, 1_000, seed=6)
    jobs = found.jobs
    for row in np.flatnonzero(jobs.kind == arrivals.BATCH)[::20]:
        may = (jobs.region_mask[row] >> found.region & 1 == 1) & (found.memory_gb >= jobs.memory_gb[row])
        may &= found.trust >= jobs.min_trust[row]
        by_hour = world.tokens_by_slot(found, may.astype(np.int64), 2)[1]
        first, last = int(jobs.release_ms[row] // HOUR_MS), int(-(-jobs.deadline_ms[row] // HOUR_MS))
        assert jobs.tokens[row] <= 0.1 * by_hour[first:last].sum() * 1.01 + jobs.tokens_per_line[row]


def test_jobs_with_a_time_of_the_day_are_due_then_on_weekdays(made_up: People) -> None:
    jobs = world.build(scenario.load("s2"), made_up, 500, seed=6).jobs
    due = jobs.deadline_ms - jobs.release_ms < HOUR_MS
    assert due.sum() > 50
    assert set((jobs.deadline_ms[due] % DAY_MS / HOUR_MS).tolist()) == {7.5}
    assert (jobs.deadline_ms[due] // DAY_MS).max() <= 4


def test_a_crowd_comes_when_it_is_said_to(made_up: People) -> None:
    jobs = world.build(scenario.load("s7"), made_up, 500, seed=6).jobs
    short = jobs.deadline_ms - jobs.release_ms <= HOUR_MS // 2
    by_hour = np.bincount((jobs.release_ms[short] // HOUR_MS).astype(int), minlength=168)
    usual = np.delete(by_hour, [58, 59]).mean()
    assert by_hour[58:60].mean() > 8 * usual


def test_rounds_are_bound_to_one_region_and_come_in_their_night(made_up: People) -> None:
    jobs = world.build(scenario.load("s13"), made_up, 5_000, seed=6).jobs
    rounds = jobs.kind == arrivals.ROUND
    assert rounds.sum() == 40
    assert np.isin(jobs.region_mask[rounds], [1, 2, 4, 8]).all()
    assert (jobs.quorum_pct[rounds] == 90).all()
    assert jobs.release_ms[rounds].min() >= 45 * HOUR_MS
    assert jobs.release_ms[rounds].max() <= 54 * HOUR_MS
    assert jobs.lines[rounds].max() == round(5_000 * 0.02 * 0.35)


# -- the same world again ----------------------------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_sim_world import digest
from motorpool.sim import generator, scenario, world
people = generator.people(seed=3, users=(6, 3, 3), weeks=14)
print(digest(world.build(scenario.load("s14"), people, 500, seed=11)))
"""


def test_a_world_is_the_same_for_its_seed_whatever_python_hashes_by() -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2024")
    }
    who = generator.people(seed=3, users=(6, 3, 3), weeks=14)
    here = digest(world.build(scenario.load("s14"), who, 500, seed=11))
    assert found == {here + "\n"}
    assert digest(world.build(scenario.load("s14"), who, 500, seed=12)) != here


def test_more_vehicles_do_not_change_the_first_ones_kind_of_trouble(made_up: People) -> None:
    """Each purpose has its own stream: cheats in a scenario do not change who lives where."""
    honest = world.build(scenario.load("s1"), made_up, 500, seed=1)
    cheats = world.build(scenario.load("s6"), made_up, 500, seed=1)
    for name in ("user", "region", "speed", "on_disk", "start_ms", "end_ms"):
        assert np.array_equal(getattr(honest, name), getattr(cheats, name))


def test_a_fleet_has_a_bounded_size(made_up: People) -> None:
    for count in (0, 2_000_001):
        with pytest.raises(SetupError, match="2,000,000"):
            world.build(scenario.load("s1"), made_up, count)


# -- what is drawn as time goes on -------------------------------------------------------------------------------------


def test_drawn_numbers_are_even_and_differ_in_every_place() -> None:
    words = np.array([world.drawn(7, 1, vehicle, 0, 0) for vehicle in range(20_000)], np.float64) / 2**32
    assert words.mean() == pytest.approx(0.5, abs=0.01)
    assert np.histogram(words, 16, (0, 1))[0] == pytest.approx(20_000 / 16, rel=0.15)
    base = (7, 1, 2, 3, 4)
    others = {world.drawn(*(value + (at == place) for at, value in enumerate(base))) for place in range(5)}
    assert len(others | {world.drawn(*base)}) == 6
    assert world.drawn(7 + (1 << 40), 1, 2, 3, 4) != world.drawn(*base)
    together = np.corrcoef(words[1:], words[:-1])[0, 1]
    assert abs(together) < 0.03


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(1, 10**10))
def test_an_exponential_time_is_minus_the_logarithm(word: int, mean_ms: int) -> None:
    exact = -math.log(max(1, word) / 2**32) * mean_ms
    assert world.exponential(word, mean_ms) == pytest.approx(exact, rel=1e-3, abs=1 + mean_ms * 4e-6)


def test_outages_are_as_often_and_as_long_as_they_should() -> None:
    gaps = [world.outage_gap_ms(1, vehicle, 0, 0, 3_600_000) for vehicle in range(20_000)]
    assert np.mean(gaps) == pytest.approx(3_600_000, rel=0.03)
    assert np.mean(np.array(gaps) > 7_200_000) == pytest.approx(math.exp(-2), abs=0.01)
    lengths = [world.outage_length_ms(1, vehicle, 0, 0, 180_000) for vehicle in range(20_000)]
    assert np.mean(lengths) == pytest.approx(180_000, rel=0.03)
    assert min(lengths) >= 1000
    assert world.outage_gap_ms(1, 0, 0, 0, 0) == world.engine_gap_ms(1, 0, 0, 0, 0) == world.NEVER_MS
    hit = np.mean([world.chosen(1, world.BROWNOUT, vehicle, 0, 200_000) for vehicle in range(20_000)])
    assert hit == pytest.approx(0.2, abs=0.01)
    assert not any(world.chosen(1, world.BROWNOUT, vehicle, 0, 0) for vehicle in range(100))
    assert all(world.chosen(1, world.BROWNOUT, vehicle, 0, 1_000_000) for vehicle in range(100))


def test_compiled_kernels_give_the_same_numbers() -> None:
    fast = compiled(world)
    for vehicle in range(0, 3_000_000, 7_919):
        for seed in (0, 3, 2**40 + 5):
            assert fast.drawn(seed, 2, vehicle, vehicle % 11, 3) == world.drawn(seed, 2, vehicle, vehicle % 11, 3)
        args = (9, vehicle, 1, 2, 5_000_000)
        assert fast.outage_gap_ms(*args) == world.outage_gap_ms(*args)
        assert fast.engine_gap_ms(*args) == world.engine_gap_ms(*args)


def test_what_a_vehicle_reports_between_two_hours_lies_between_theirs(made_up: People) -> None:
    found = world.build(plain(load=0.0), made_up, 10, seed=1)
    for user in range(len(made_up)):
        for hour in (3, 6, 7, 20, 167):
            here, ahead = (int(made_up.stay_bound_min[user, (hour + more) % 168]) * MINUTE_MS for more in (0, 1))
            half = world.stay_bound_ms(found.stay_bound_min, found.table_hour, user, hour * HOUR_MS + HOUR_MS // 2)
            assert world.stay_bound_ms(found.stay_bound_min, found.table_hour, user, hour * HOUR_MS) == here
            assert max(0, here - HOUR_MS) <= half <= max(here, ahead)


def test_real_files_make_the_kinds_that_the_simulator_expects(tmp_path: Path) -> None:
    recording = recordings.load(norway_file(tmp_path, 14))
    found = people.of_recordings([recording])
    assert found.source == recording.source
    built = world.build(plain(load=0.5), found, 100, seed=1)
    assert set(found.kind[built.user].tolist()) == {HOME, SHARED}
