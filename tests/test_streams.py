"""Deadlines, hedges, tries, alarms and the waiting room, tried on whatever Hypothesis thinks of."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.core import streams
from motorpool.core.streams import Alarms, HedgeBudget, Paces, Sketch, Suspects, Tier, Tries, WaitingRoom
from motorpool.types import VehicleState

durations = st.floats(min_value=0.2, max_value=500_000, allow_nan=False)
samples = st.lists(durations, min_size=1, max_size=300)
KEY = ("m", "class")


def paces(first: list[float] | None = None, gaps: list[float] | None = None) -> Paces:
    made = Paces()
    for value in first or []:
        made.first(*KEY, 100, 1, value)
    for value in gaps or []:
        made.gap(*KEY, value)
    return made


# -- the sketch


@given(samples, st.floats(min_value=0.01, max_value=1.0))
def test_a_quantile_is_never_too_small_and_at_most_a_bucket_too_large(values: list[float], share: float) -> None:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    true = sorted(values)[max(1, math.ceil(share * len(values) - 1e-9)) - 1]
    found = sketch.quantile_ms(share)
    assert true * (1 - 1e-6) <= found <= true * streams.SKETCH_GROWTH * (1 + 1e-6)


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_any_duration_finds_its_bucket(value: float) -> None:
    sketch = Sketch()
    sketch.add(value)
    assert 0 < sketch.quantile_ms(1.0) <= streams.CEILING_MS * 2


def test_old_samples_fade_and_the_place_is_bounded() -> None:
    sketch = Sketch()
    for _ in range(10_000):
        sketch.add(1000)
    for _ in range(3 * streams.SKETCH_MEMORY):
        sketch.add(10)
    assert len(sketch) < streams.SKETCH_MEMORY
    assert len(sketch._counts) == streams.SKETCH_BUCKETS
    assert sketch.quantile_ms(0.9) < 11
    assert Sketch().quantile_ms(0.5) == 0


# -- deadlines


@given(samples, st.integers(0, 1 << 20), st.integers(1, 50))
def test_deadlines_lie_between_their_floor_and_the_ceiling(values: list[float], size: int, waves: int) -> None:
    made = paces(values, values)
    assert streams.FLOOR_FIRST_MS <= made.first_deadline_ms(*KEY, size, waves) <= streams.CEILING_MS
    assert streams.FLOOR_HEDGE_MS <= made.hedge_after_ms(*KEY, size, waves) <= streams.CEILING_MS
    assert streams.FLOOR_GAP_MS <= made.gap_deadline_ms(*KEY) <= streams.CEILING_MS
    assert made.hedge_after_ms(*KEY, size, waves) <= made.first_deadline_ms(*KEY, size, waves)


@given(st.lists(durations, max_size=streams.KNOWN_AFTER - 1))
def test_while_little_is_known_the_prior_holds(values: list[float]) -> None:
    made = paces(values, values)
    assert made.first_deadline_ms(*KEY, 100, 1) == streams.PRIOR_FIRST_MS + 100 * streams.PRIOR_BYTE_MS
    assert made.gap_deadline_ms(*KEY) == streams.PRIOR_GAP_MS
    assert made.hedge_after_ms(*KEY, 100, 1) == streams.PRIOR_HEDGE_MS + 100 * streams.PRIOR_BYTE_MS
    assert made.gap_deadline_ms("m", "another class") == streams.PRIOR_GAP_MS


@given(st.lists(durations, min_size=streams.KNOWN_AFTER, max_size=100), st.floats(1.0, 20.0))
def test_what_is_slower_is_waited_for_no_less(values: list[float], times: float) -> None:
    fast, slow = paces(values, values), paces([v * times for v in values], [v * times for v in values])
    for deadline in (Paces.first_deadline_ms, Paces.hedge_after_ms):
        assert deadline(slow, *KEY, 100, 1) >= deadline(fast, *KEY, 100, 1)
        assert deadline(fast, *KEY, 100, 3) >= deadline(fast, *KEY, 100, 1)
    assert slow.gap_deadline_ms(*KEY) >= fast.gap_deadline_ms(*KEY)


@given(st.lists(durations, min_size=streams.KNOWN_AFTER, max_size=200))
def test_what_was_seen_before_is_no_stall(values: list[float]) -> None:
    made = paces(values, values)
    ordinary = sorted(values)[int(len(values) * 0.99) - 1]
    assert made.first_deadline_ms(*KEY, 100, 1) >= min(int(2 * ordinary), streams.CEILING_MS)
    assert made.gap_deadline_ms(*KEY) >= min(int(2 * ordinary), streams.CEILING_MS)


@given(samples, st.integers(1, 50))
def test_a_pause_is_doubted_before_its_deadline_and_not_before_it_is_longer_than_most(
    values: list[float], each: int
) -> None:
    made = paces(values[: max(1, len(values) // each)], values)
    doubted_ms, deadline_ms = made.doubt_after_ms(*KEY), made.gap_deadline_ms(*KEY)
    assert doubted_ms <= deadline_ms
    if len(values) >= streams.KNOWN_AFTER:
        assert doubted_ms >= min(streams.FLOOR_DOUBT_MS, deadline_ms)
        ordinary = sorted(values)[int(len(values) * 0.99) - 1]
        assert doubted_ms >= min(int(ordinary), deadline_ms)


@pytest.mark.parametrize("gaps", [5, 60, 500])
def test_few_streams_whose_vehicles_live_are_doubted_however_long_they_are(gaps: int) -> None:
    """Pauses of an even spread: of each stream, the longest one is what counts."""
    made = Paces()
    dice = random.Random(gaps)

    def stream() -> list[float]:
        return [10 + dice.expovariate(0.4) for _ in range(gaps)]

    for _ in range(4_000 // gaps):
        made.first(*KEY, 100, 1, 20)
        for gap_ms in stream():
            made.gap(*KEY, gap_ms)
    doubted_ms = made.doubt_after_ms(*KEY)
    doubted = sum(max(stream()) > doubted_ms for _ in range(400))
    assert doubted <= 400 * 0.12, "at most a few beyond the part that the budget pays for"
    assert doubted_ms <= made.gap_deadline_ms(*KEY)


def test_a_first_token_is_measured_by_the_length_of_its_prompt_and_by_those_before_it() -> None:
    made = Paces()
    for _ in range(streams.KNOWN_AFTER):
        made.first(*KEY, 100, 1, 200)
        made.first(*KEY, 8_000, 4, 40_000)
    assert made.hedge_after_ms(*KEY, 100, 1) < 250
    assert 10_000 <= made.hedge_after_ms(*KEY, 8_000, 1) < 11_000  # a quarter of what four waves took
    assert made.hedge_after_ms(*KEY, 1_000, 1) == made.hedge_after_ms(*KEY, 8_000, 1)  # unknown: as a longer one


def test_classes_are_bounded_and_the_oldest_is_forgotten() -> None:
    made = Paces()
    for number in range(streams.MAX_PACES + 10):
        made.gap("m", f"class {number}", 5)
    assert len(made) == streams.MAX_PACES


# -- hedges and tries


@given(st.lists(st.booleans(), max_size=2_000))
def test_hedges_are_never_more_than_their_part_of_the_requests(turns: list[bool]) -> None:
    budget, requests, hedges = HedgeBudget(), 0, 0
    for is_request in turns:
        if is_request:
            budget.earn()
            requests += 1
        elif budget.spend():
            hedges += 1
        assert hedges * 100 <= requests * streams.HEDGE_PERCENT


@given(st.lists(st.sampled_from(["request", "hedge", "gone"]), max_size=2_000))
def test_what_turns_out_to_be_no_hedge_is_given_back_and_the_others_keep_to_their_part(turns: list[str]) -> None:
    budget, requests, running, vain = HedgeBudget(), 0, 0, 0
    for turn in turns:
        if turn == "request":
            budget.earn()
            requests += 1
        elif turn == "hedge" and budget.spend():
            running, vain = running + 1, vain + 1
        elif turn == "gone" and running:
            budget.give_back()
            running, vain = running - 1, vain - 1
        assert vain * 100 <= requests * streams.HEDGE_PERCENT


def test_in_an_outage_hedging_stops_and_quiet_times_save_up_a_bounded_number() -> None:
    budget = HedgeBudget()
    for _ in range(100_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(1_000)) == streams.HEDGE_SAVED


@pytest.mark.parametrize(
    ("status", "own"), [(200, False), (400, True), (404, True), (413, True), (422, True), (429, False), (503, False)]
)
def test_only_what_the_request_itself_is_blamed_for_is_final(status: int, own: bool) -> None:
    assert streams.is_own_fault(status) is own


@given(st.lists(st.sampled_from(["departed", "stalled", "failed"]), min_size=20, max_size=20), st.integers(1, 10_000))
def test_tries_end_and_patience_never_shrinks(ends: list[str], deadline_ms: int) -> None:
    tries = Tries()
    last_ms = 0
    for end in ends:
        if tries.used_up:
            break
        setattr(tries, end, getattr(tries, end) + 1)
        assert deadline_ms <= tries.patience(deadline_ms) <= streams.CEILING_MS
        assert tries.patience(deadline_ms) >= last_ms
        last_ms = tries.patience(deadline_ms)
    assert tries.used_up
    assert tries.departed + tries.stalled + tries.failed <= (
        streams.MAX_DEPARTED + streams.MAX_STALLED + streams.MAX_FAILED - 2
    )


def test_a_silent_vehicle_is_avoided_for_longer_each_time_until_it_speaks() -> None:
    suspects, now_ms, lengths = Suspects(), 0, []
    for _ in range(8):
        suspects.stalled("v", now_ms)
        suspects.stalled("v", now_ms)  # two requests at once are one offence
        begun_ms = now_ms
        while "v" in suspects.avoided(now_ms):
            now_ms += 500
        lengths.append(now_ms - begun_ms)
    assert lengths[:3] == [2_000, 4_000, 8_000]
    assert lengths[-1] == lengths[-2] == streams.SUSPECT_MS << streams.MAX_SUSPECT_DOUBLINGS
    suspects.spoke("v")
    suspects.stalled("v", now_ms)
    assert suspects.avoided(now_ms + 1_999) == {"v"}
    assert suspects.avoided(now_ms + 2_000) == frozenset()
    for number in range(streams.MAX_SUSPECTS + 5):
        suspects.stalled(f"v{number}", now_ms)
    assert len(suspects) == streams.MAX_SUSPECTS


# -- departures


def test_a_departure_is_announced_by_risk_or_by_the_guard() -> None:
    assert not streams.is_leaving(VehicleState.WORKING, None)
    assert not streams.is_leaving(VehicleState.WORKING, 0.49)
    assert streams.is_leaving(VehicleState.WORKING, 0.5)
    assert streams.is_leaving(VehicleState.YIELDING, None)
    assert streams.is_safer(None, 0.6)
    assert streams.is_safer(0.4, 0.6)
    assert not streams.is_safer(0.5, 0.6)


@given(st.integers(0, 5_000), st.integers(0, 5_000), st.integers(1, 20))
def test_catching_up_ends(read: int, more: int, readings: int) -> None:
    done = streams.has_caught_up(read, read + more, readings)
    assert done == (more <= streams.MAX_BEHIND_TOKENS or readings >= streams.MAX_READINGS)


# -- alarms

moves = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 5), st.integers(0, 50)),
        st.tuples(st.just("drop"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("wait"), st.just(0), st.integers(0, 20)),
    ),
    max_size=200,
)


@given(moves)
def test_every_alarm_rings_once_and_on_time(turns: list[tuple[str, int, int]]) -> None:
    alarms, wanted, now_ms = Alarms(), {}, 0
    for what, key, span in turns:
        if what == "set":
            alarms.set(key, now_ms + span)
            wanted[key] = now_ms + span
        elif what == "drop":
            alarms.drop(key)
            wanted.pop(key, None)
        else:
            now_ms += span
            rung = alarms.due(now_ms)
            expected = {each for each, due_ms in wanted.items() if due_ms <= now_ms}
            assert set(rung) == expected
            assert len(rung) == len(expected)
            for each in rung:
                del wanted[each]
        assert len(alarms) == len(wanted)
        next_ms = alarms.next_ms()
        assert not wanted or (next_ms is not None and next_ms <= min(wanted.values()))
        assert len(alarms._heap) <= len(turns) + 6


def test_moving_an_alarm_later_leaves_the_heap_alone() -> None:
    alarms = Alarms()
    assert alarms.set(1, 10)
    for due_ms in range(11, 10_000):
        assert not alarms.set(1, due_ms)
    assert len(alarms._heap) == 1
    assert alarms.due(5_000) == []
    assert alarms.next_ms() == 9_999


# -- the waiting room

entries = st.lists(st.tuples(st.sampled_from(list(Tier)), st.integers(0, 5_000), st.booleans()), max_size=60)


@given(entries, st.integers(1, 8))
def test_the_room_keeps_its_bound_its_order_and_its_deadlines(turns: list[tuple[Tier, int, bool]], bound: int) -> None:
    room, now_ms = WaitingRoom(bound), 0
    inside: dict[str, tuple[Tier, int, int]] = {}
    for number, (tier, passed_ms, serve) in enumerate(turns):
        now_ms += passed_ms
        key = f"r{number}"
        out = room.enter(key, tier, now_ms)
        if out != key:
            inside[key] = (tier, number, now_ms + streams.WAIT_MS[tier])
        if out is not None and out != key:
            assert inside.pop(out)[0] > tier, "only who is less urgent makes room"
        if out == key:
            assert all(each[0] <= tier for each in inside.values())
        assert len(room) == len(inside) <= bound
        assert list(room) == sorted(inside, key=lambda each: inside[each][:2])
        overdue = room.overdue(now_ms)
        assert set(overdue) == {each for each, (_, _, until_ms) in inside.items() if until_ms <= now_ms}
        for each in overdue:
            room.leave(each)
            del inside[each]
        if serve and inside:
            first = next(iter(room))
            room.served(first, now_ms)
            del inside[first]
        assert streams.MIN_RETRY_MS <= room.retry_after_ms() <= streams.MAX_RETRY_MS


def test_who_is_turned_away_is_told_how_long_the_room_takes_to_empty() -> None:
    room = WaitingRoom()
    for number in range(200):
        room.enter(f"r{number}", Tier.DEFAULT, 0)
    for number in range(100):
        room.served(f"r{number}", number * 100)
    assert 9_000 <= room.retry_after_ms() <= 10_200


def test_service_tiers_have_their_class() -> None:
    wanted = {None: "default", "auto": "default", "default": "default", "flex": "flex", "priority": "priority"}
    assert {name: streams.name_of(streams.tier_of(name)) for name in wanted} == wanted
    assert streams.PER_SLOT[Tier.FLEX] < streams.PER_SLOT[Tier.DEFAULT] < streams.PER_SLOT[Tier.PRIORITY]
