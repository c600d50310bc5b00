"""The forecast in the agent: it learns from signals, survives restarts and damage, and never waits for the disk."""

from __future__ import annotations

import asyncio
import logging
import stat
from pathlib import Path

import pytest

from motorpool.agent.forecast import HABITS_NAME, Departures, local_offset_min
from motorpool.core.departures import AWAY, DAY_MS, HOUR_MS, MINUTE_MS
from motorpool.core.policy import ReadyBy
from motorpool.core.signals import Reading, Signals

MONDAY_MS = 1_768_176_000_000  # 2026-01-12T00:00:00Z


def parked(now_ms: int, *, plugged: bool = True, departure_ms: int | None = None) -> Signals:
    return Signals(
        cable_connected=Reading(plugged, now_ms),
        gear_is_park=Reading(True, now_ms),
        speed_kmh=Reading(0.0, now_ms),
        departure_ms=None if departure_ms is None else Reading(departure_ms, now_ms),
    )


def live(forecast: Departures, from_ms: int, to_ms: int) -> None:
    """A night on the cable, watched every ten minutes, and off."""
    for now_ms in range(from_ms, to_ms, 10 * MINUTE_MS):
        forecast.observe(parked(now_ms), now_ms, 0)
    forecast.observe(parked(to_ms, plugged=False), to_ms, 0)


def test_before_the_first_signals_nothing_is_foretold(tmp_path: Path) -> None:
    forecast = Departures(tmp_path / HABITS_NAME)
    assert forecast.outlook(MONDAY_MS) == AWAY
    forecast.observe(Signals(), MONDAY_MS, 0)
    assert forecast.outlook(MONDAY_MS) == AWAY


def test_signals_that_stop_end_the_forecast_at_once(tmp_path: Path) -> None:
    forecast = Departures(tmp_path / HABITS_NAME)
    forecast.observe(parked(MONDAY_MS), MONDAY_MS, 0)
    assert forecast.outlook(MONDAY_MS) != AWAY
    forecast.observe(parked(MONDAY_MS), MONDAY_MS + 10_000, 0)  # readings of ten seconds ago
    assert forecast.outlook(MONDAY_MS + 10_000) == AWAY


def test_the_stay_is_bounded_by_the_schedule_by_the_signal_and_by_hints(tmp_path: Path) -> None:
    forecast = Departures(tmp_path / HABITS_NAME)
    forecast.observe(parked(MONDAY_MS), MONDAY_MS, 0)
    free = forecast.outlook(MONDAY_MS).stay_bound_ms
    assert free is not None
    assert free > 3 * HOUR_MS
    ready_by = ReadyBy(minute=3 * 60)
    assert forecast.outlook(MONDAY_MS, [ready_by]).stay_bound_ms == 3 * HOUR_MS
    assert forecast.outlook(MONDAY_MS, [ready_by], [MONDAY_MS + HOUR_MS]).stay_bound_ms == HOUR_MS
    forecast.observe(parked(MONDAY_MS, departure_ms=MONDAY_MS + 2 * HOUR_MS), MONDAY_MS, 0)
    assert forecast.outlook(MONDAY_MS, [ready_by]).stay_bound_ms == 2 * HOUR_MS
    forecast.observe(parked(MONDAY_MS), MONDAY_MS, 60)  # three o'clock is an hour nearer
    assert forecast.outlook(MONDAY_MS, [ready_by]).stay_bound_ms == 2 * HOUR_MS


def test_what_was_learnt_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / HABITS_NAME
    forecast = Departures(path)
    for day in range(28):
        live(
            forecast, MONDAY_MS + day * DAY_MS + 18 * HOUR_MS, MONDAY_MS + day * DAY_MS + 34 * HOUR_MS + 10 * MINUTE_MS
        )
    forecast.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    now_ms = MONDAY_MS + 28 * DAY_MS + 22 * HOUR_MS
    told = []
    for vehicle in (forecast, Departures(path), Departures(tmp_path / "new")):
        vehicle.observe(parked(now_ms), now_ms, 0)
        told.append(vehicle.outlook(now_ms))
    assert told[0] == told[1]
    assert told[2].stay_bound_ms is not None
    assert told[0].stay_bound_ms is not None
    assert told[0].stay_bound_ms > told[2].stay_bound_ms + HOUR_MS


@pytest.mark.parametrize("data", [b"", b"not this", b"\x00" * 10_000])
def test_a_damaged_file_is_put_aside_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    path = tmp_path / HABITS_NAME
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        forecast = Departures(path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{HABITS_NAME} is damaged: the forecast starts from the fleet's table"
    ]
    assert path.with_name(HABITS_NAME + ".bad").read_bytes() == data
    forecast.observe(parked(MONDAY_MS), MONDAY_MS, 0)
    new = Departures(tmp_path / "new")
    new.observe(parked(MONDAY_MS), MONDAY_MS, 0)
    assert forecast.outlook(MONDAY_MS) == new.outlook(MONDAY_MS)
    forecast.close()
    assert path.exists()


def test_it_is_written_once_an_hour_and_is_about_a_kilobyte(tmp_path: Path) -> None:
    path = tmp_path / HABITS_NAME
    forecast = Departures(path)
    written = []
    with asyncio.Runner() as runner:
        for now_ms in range(MONDAY_MS, MONDAY_MS + 6 * HOUR_MS, MINUTE_MS):
            forecast.observe(parked(now_ms), now_ms, 0)
            runner.run(forecast.keep(now_ms))
            if path.exists():
                assert 0 < path.stat().st_size < 2048
                path.unlink()
                written.append((now_ms - MONDAY_MS) // MINUTE_MS)
    assert written == [0, 60, 120, 180, 240, 300]


def test_learning_and_asking_touch_no_disk(tmp_path: Path) -> None:
    forecast = Departures(tmp_path / "no" / HABITS_NAME)
    live(forecast, MONDAY_MS, MONDAY_MS + 8 * HOUR_MS)
    forecast.outlook(MONDAY_MS + 8 * HOUR_MS)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_told_and_nothing_else_happens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("here is no folder")
    with caplog.at_level(logging.WARNING):
        forecast = Departures(tmp_path / "file" / HABITS_NAME)
        forecast.observe(parked(MONDAY_MS), MONDAY_MS, 0)
        asyncio.run(forecast.keep(MONDAY_MS))
    assert "could not be kept" in caplog.text
    assert forecast.outlook(MONDAY_MS) != AWAY


def test_the_offset_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import time  # noqa: PLC0415  # only this test moves the machine

    monkeypatch.setenv("TZ", "Europe/Oslo")
    time.tzset()
    try:
        assert local_offset_min(MONDAY_MS) == 60
        assert local_offset_min(MONDAY_MS + 180 * DAY_MS) == 120  # in July
    finally:
        monkeypatch.undo()
        time.tzset()
