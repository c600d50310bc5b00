"""Where a conversation goes on: on the vehicle that has read it, else on a near one."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st
from tests.test_scheduler import report

from motorpool.core.scheduler import Scheduler
from motorpool.core.streams import Tier
from motorpool.server.beginnings import MAX_BEGINNINGS, MAX_READERS, Readers, beginnings_of
from motorpool.server.live_places import NEAR_MS, Fleet, Places

MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=8)}), max_size=24)


def body(messages: list[Any], **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": messages, **more}).encode()


def a_fleet(*vehicles: str, **facts: Any) -> tuple[Scheduler, Places]:
    scheduler = Scheduler()
    for vehicle in vehicles:
        scheduler.handle(report(vehicle, 1, slots=2, **facts), 1_000)
    states = {vehicle: SimpleNamespace(slots=2, risk_15min=None) for vehicle in vehicles}
    fleet = SimpleNamespace(scheduler=scheduler, now_ms=lambda: 1_000, vehicle_state=states.get)
    return scheduler, Places(cast("Fleet", fleet), lambda: 1_000)


def asked(places: Places, messages: list[Any], tried: set[str] | None = None) -> str | None:
    """Place a request and leave it there."""
    known = beginnings_of("m", body(messages))
    vehicle = places.choose("m", Tier.DEFAULT, tried or set(), known)
    if vehicle is not None:
        places.took(vehicle, known)
    return vehicle


@given(MESSAGES, MESSAGES)
def test_what_begins_alike_has_the_same_beginnings(first: list[Any], more: list[Any]) -> None:
    short, long = beginnings_of("m", body(first)), beginnings_of("m", body(first + more))
    assert len(short) == min(len(first), MAX_BEGINNINGS)
    if len(first + more) <= MAX_BEGINNINGS:
        assert long[len(more) :] == short
    assert not set(short) & set(beginnings_of("another", body(first)))
    assert not set(short) & set(beginnings_of("m", body(first, tools=[{"type": "function"}])))


@given(st.binary(max_size=64))
def test_what_is_no_conversation_has_no_beginnings(data: bytes) -> None:
    beginnings_of("m", data)
    assert beginnings_of("m", b'{"messages": 3}') == beginnings_of("m", b"\xff") == beginnings_of("m", b"{}") == ()


def test_a_conversation_goes_on_where_it_was_read_while_there_is_a_free_slot() -> None:
    scheduler, places = a_fleet("v1", "v2", "v3", "v4")
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    reader = asked(places, talk)
    assert reader is not None
    places.left(reader)
    for _ in range(8):  # others take turns
        places.choose("m", Tier.DEFAULT, set())
    longer = [*talk, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "More"}]
    assert [asked(places, longer), asked(places, longer)] == [reader, reader]
    assert asked(places, longer) not in {reader, None}, "both of its slots are taken"
    assert asked(places, longer, tried={reader}) != reader
    assert scheduler.is_free("v9", "m", 1_000) is False
    assert scheduler.is_free(reader, "another", 1_000) is False


def test_a_reader_that_may_leave_soon_is_not_preferred() -> None:
    scheduler, places = a_fleet("v1", "v2")
    talk = [{"role": "user", "content": "Hello"}]
    reader = asked(places, talk)
    assert reader is not None
    places.left(reader)
    assert scheduler.is_free(reader, "m", 1_000)
    scheduler.handle(report(reader, 2, slots=2, risk_15min=0.3), 1_000)
    assert not scheduler.is_free(reader, "m", 1_000)
    assert asked(places, talk) != reader


def test_of_good_vehicles_the_nearer_one_is_taken_and_one_without_a_measure_is_not_avoided() -> None:
    _, places = a_fleet("v1", "v2", "v3")
    places.round_trips_ms = {"v1": 180.0, "v2": 25.0, "v3": 220.0}
    assert {places.choose("m", Tier.DEFAULT, set()) for _ in range(6)} == {"v2"}
    places.round_trips_ms = {"v1": 180.0, "v3": 220.0}
    assert {places.choose("m", Tier.DEFAULT, set()) for _ in range(6)} == {"v2"}
    places.round_trips_ms = {"v1": 180.0, "v2": 90.0, "v3": 220.0}
    assert {places.choose("m", Tier.DEFAULT, set()) for _ in range(6)} == {"v2"}
    places.round_trips_ms = dict.fromkeys(("v1", "v2", "v3"), NEAR_MS - 1)
    taken = [asked(places, []) for _ in range(3)]
    assert set(taken) == {"v1", "v2", "v3"}, "all are near enough"
    for vehicle in taken:
        places.left(str(vehicle))
    places.round_trips_ms = {"v2": 10.0, "v1": 200.0, "v3": 200.0}
    for _ in range(2):
        places.took("v2")
    assert places.choose("m", Tier.DEFAULT, set()) != "v2", "a free slot is worth more than a short way"


def test_old_beginnings_are_forgotten_and_readers_are_few() -> None:
    readers = Readers(most=3)
    readers.read((2, 1), "v1")
    readers.read((4, 3), "v2")
    assert len(readers) == 3
    assert readers.of((2, 1)) == ["v1"]
    assert readers.of((1,)) == []
    many = Readers()
    for number in range(10):
        many.read((number,), f"v{number}")
    assert many.of(tuple(range(10))) == [f"v{number}" for number in range(MAX_READERS)]
