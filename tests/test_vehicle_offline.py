"""The vehicle machine without a link: it works on, for as long as its leases allow, and keeps what it has finished."""

from __future__ import annotations

import msgspec
from tests.vehicle_trial import CONFIG, Driver, attempt, finished, grant, result, results, returned

from motorpool.core.vehicle_events import (
    CancelAttempts,
    EngineWorked,
    LinkChanged,
    SpoolFilled,
    SubmitAttempts,
    Ticked,
    WorkPublished,
)
from motorpool.types import ReturnReason
from motorpool.wire import ReturnItem

HOUR_MS = 3_600_000
PATIENT = msgspec.structs.replace(CONFIG, stall_ms=99 * HOUR_MS)  # these engines say nothing for hours


def test_without_a_link_the_work_goes_on_until_the_lease_says_stop_and_results_are_kept() -> None:
    driver = Driver(PATIENT).ready()
    driver.do(grant(1, 2, 3, ttl_ms=9 * HOUR_MS, max_offline_ms=2 * HOUR_MS))
    driver.do(LinkChanged(up=False))
    driver.do(LinkChanged(up=False), after_ms=HOUR_MS // 2)  # said again: the time runs since the first word
    assert driver.do(EngineWorked(finished=finished("1-1"))) == [
        SubmitAttempts(attempts=[attempt(3)], created_s=driver.now_ms // 1000)
    ]
    (kept,) = driver.do(Ticked(), after_ms=HOUR_MS)
    assert kept == results(1, result(1))
    assert driver.do(Ticked(), after_ms=HOUR_MS // 2 - 1) == []
    assert driver.machine._wake_at_ms is not None
    assert driver.machine._wake_at_ms <= driver.now_ms + 1
    assert driver.do(Ticked(), after_ms=1) == [
        CancelAttempts(keys=["1-2", "1-3"]),
        returned(2, ReturnReason.OFFLINE, ReturnItem(line=2, started=True), ReturnItem(line=3, started=True)),
    ]
    assert driver.machine.held == ["l1"]
    driver.do(LinkChanged(up=True), after_ms=HOUR_MS)
    driver.do(WorkPublished(message_ids=["inc-1", "inc-2"]))
    assert driver.machine.held == []


def test_a_link_that_comes_back_in_time_begins_the_wait_anew() -> None:
    driver = Driver(PATIENT).ready()
    driver.do(grant(1, ttl_ms=9 * HOUR_MS, max_offline_ms=HOUR_MS))
    for _ in range(4):
        driver.do(LinkChanged(up=False))
        assert driver.do(LinkChanged(up=True), after_ms=HOUR_MS - 1) == []
    assert driver.do(Ticked(), after_ms=2 * HOUR_MS) == []
    driver.do(LinkChanged(up=False))
    (_, back) = driver.do(Ticked(), after_ms=HOUR_MS)
    assert back == returned(1, ReturnReason.OFFLINE, ReturnItem(line=1, started=True))


def test_the_end_of_a_lease_comes_first_when_it_is_first() -> None:
    driver = Driver(PATIENT).ready()
    driver.do(grant(1, ttl_ms=HOUR_MS, max_offline_ms=2 * HOUR_MS))
    driver.do(grant(1, lease="l2", ttl_ms=9 * HOUR_MS, max_offline_ms=2 * HOUR_MS))
    driver.do(LinkChanged(up=False))
    (_, back) = driver.do(Ticked(), after_ms=HOUR_MS)
    assert back == returned(1, ReturnReason.EXPIRED, ReturnItem(line=1, started=True))
    (_, back) = driver.do(Ticked(), after_ms=HOUR_MS)
    assert back == returned(2, ReturnReason.OFFLINE, ReturnItem(line=1, started=True), lease="l2")


def test_a_lease_that_allows_no_time_without_a_link_goes_back_with_the_link() -> None:
    driver = Driver(PATIENT).ready()
    driver.do(grant(1, max_offline_ms=0))
    back = returned(1, ReturnReason.OFFLINE, ReturnItem(line=1, started=True))
    assert driver.do(LinkChanged(up=False)) == [CancelAttempts(keys=["1-1"]), back]


def test_nothing_new_is_computed_while_results_cannot_be_kept_safe() -> None:
    driver = Driver(PATIENT).ready()
    driver.do(grant(1, 2, 3, 4))
    driver.do(SpoolFilled(full=True))
    assert driver.do(EngineWorked(finished=finished("1-1", "1-2"))) == [results(1, result(1), result(2))]
    assert driver.do(Ticked(), after_ms=1_000) == []
    (submitted,) = driver.do(SpoolFilled(full=False))
    assert submitted == SubmitAttempts(attempts=[attempt(3), attempt(4)], created_s=driver.now_ms // 1000)
