"""The owner's log: what is told stands in it, what is altered shows, and it stays small and whole whatever happens."""

from __future__ import annotations

import datetime as dt
import os
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from motorpool.agent.owner import words
from motorpool.agent.owner.entries import HEAD_NAME, Entry, EntryKind, log_files, month_file
from motorpool.agent.owner.log import ALLOWED_SPAN_MS, DENIED_SPAN_MS, OwnerLog
from motorpool.agent.owner.reading import LogReader
from motorpool.errors import CallerError, SetupError
from motorpool.types import Permit, Reason, ReasonCode

NOW_MS = 1_790_000_000_000
MIN_MS = 60_000
HOUR_MS = 3_600_000
DAY_MS = 86_400_000
YES = Permit(watts_w=100, until_ms=NOW_MS)
DOOR = (Reason(code=ReasonCode.DOOR_OPEN),)
OUT = (Reason(code=ReasonCode.NOT_PLUGGED_IN, detail="secret place"), Reason(code=ReasonCode.MOVING))


def spans(log: OwnerLog) -> list[Entry]:
    return [entry for entry in log.entries(0, 10_000) if entry.kind is EntryKind.SPAN]


def look(log: OwnerLog, verdict: object, from_ms: int, to_ms: int, *, working: bool = False) -> None:
    """The guard says the same every second."""
    for now_ms in range(from_ms, to_ms, 1_000):
        log.verdict(verdict, now_ms, working=working)  # type: ignore[arg-type]


def test_equal_verdicts_are_one_entry_and_say_when_the_car_worked(tmp_path: Path) -> None:
    log = OwnerLog(tmp_path)
    look(log, DOOR, NOW_MS, NOW_MS + 5 * MIN_MS)
    look(log, YES, NOW_MS + 5 * MIN_MS, NOW_MS + 15 * MIN_MS, working=True)
    look(log, OUT, NOW_MS + 15 * MIN_MS, NOW_MS + 20 * MIN_MS)
    log.close(NOW_MS + 20 * MIN_MS)
    first, second, third = spans(log)
    assert (first.from_ms, first.at_ms, first.why_ms) == (NOW_MS, NOW_MS + 5 * MIN_MS, {"door_open": 5 * MIN_MS})
    assert (second.allowed_ms, second.working_ms, second.why_ms) == (10 * MIN_MS, 10 * MIN_MS, {})
    assert third.why_ms == {"not_plugged_in": 5 * MIN_MS, "moving": 5 * MIN_MS}
    assert log.verify().whole
    assert "secret place" not in b"".join(path.read_bytes() for path in log_files(tmp_path)).decode()


def test_what_goes_to_and_fro_within_a_minute_is_one_entry_with_the_time_of_each(tmp_path: Path) -> None:
    log = OwnerLog(tmp_path)
    for second in range(0, 60, 2):
        log.verdict(DOOR if second % 4 else YES, NOW_MS + second * 1_000)
    look(log, YES, NOW_MS + MIN_MS, NOW_MS + 10 * MIN_MS)
    log.close(NOW_MS + 10 * MIN_MS)
    first, second_entry = spans(log)
    assert first.allowed_ms + first.why_ms["door_open"] == 60_000
    assert second_entry.allowed_ms == 9 * MIN_MS


def test_a_long_time_is_written_now_and_then(tmp_path: Path) -> None:
    log = OwnerLog(tmp_path)
    look(log, OUT, NOW_MS, NOW_MS + 3 * DENIED_SPAN_MS)
    look(log, YES, NOW_MS + 3 * DENIED_SPAN_MS, NOW_MS + 3 * DENIED_SPAN_MS + 4 * ALLOWED_SPAN_MS)
    log.close(NOW_MS + 3 * DENIED_SPAN_MS + 4 * ALLOWED_SPAN_MS)
    assert [entry.at_ms - (entry.from_ms or 0) for entry in spans(log)] == [DENIED_SPAN_MS] * 3 + [ALLOWED_SPAN_MS] * 4


def test_the_worst_day_is_bounded(tmp_path: Path) -> None:
    log = OwnerLog(tmp_path)
    for step in range(DAY_MS // 250 // 24):  # an hour of a verdict that changes with every look
        log.verdict(DOOR if step % 2 else YES, NOW_MS + step * 250)
    log.close(NOW_MS + HOUR_MS)
    written = sum(path.stat().st_size for path in log_files(tmp_path))
    assert len(spans(log)) <= 60
    assert written * 24 < 500_000


def test_a_time_that_nobody_looked_is_no_part_of_the_log(tmp_path: Path) -> None:
    log = OwnerLog(tmp_path)
    look(log, YES, NOW_MS, NOW_MS + 2 * MIN_MS)
    look(log, YES, NOW_MS + 600 * MIN_MS, NOW_MS + 602 * MIN_MS)  # the computer slept
    log.verdict(YES, NOW_MS + 10)  # the clock was set back
    log.verdict(YES, NOW_MS + 5_010)
    log.close(NOW_MS + 5_010)
    assert [entry.allowed_ms for entry in spans(log)] == [2 * MIN_MS - 1_000, 2 * MIN_MS - 1_000, 5_000]


def test_work_is_told_by_class_and_adds_up(tmp_path: Path) -> None:
    log = OwnerLog(tmp_path)
    look(log, YES, NOW_MS, NOW_MS + MIN_MS, working=True)
    costs = {"electricity_micro": 30, "wear_micro": 5}
    log.worked("batch", NOW_MS + MIN_MS, lines=2, tokens=50, energy_mwh=900, measured=True, earned_micro=100, **costs)
    log.worked("batch", NOW_MS + MIN_MS, lines=1, tokens=10, energy_mwh=100, measured=False, earned_micro=20, **costs)
    log.worked("live chat", NOW_MS + MIN_MS, lines=1, tokens=7, energy_mwh=10, measured=True, earned_micro=1, **costs)
    log.close(NOW_MS + MIN_MS)
    summary = log.summary(NOW_MS, NOW_MS + DAY_MS)
    assert {kind: work.lines for kind, work in summary.jobs.items()} == {"batch": 3, "live chat": 1}
    assert (summary.total.tokens, summary.total.energy_mwh, summary.total.measured_mwh) == (67, 1_010, 910)
    assert (summary.working_ms, summary.net_micro) == (MIN_MS, 121 - 105)
    assert log.summary(NOW_MS + DAY_MS, NOW_MS + 2 * DAY_MS).total.lines == 0
    log.worked("batch", NOW_MS + 2 * MIN_MS, lines=1, energy_mwh=5, earned_micro=4)
    log.close(NOW_MS + 2 * MIN_MS)
    assert log.summary(NOW_MS, NOW_MS + DAY_MS).net_micro is None  # what that took is not known


def test_no_customer_and_no_content_can_be_a_class_of_job(tmp_path: Path) -> None:
    log = OwnerLog(tmp_path)
    for kind in ("", "Who is Ada Lovelace?", "x" * 41, "a\nb"):
        with pytest.raises(CallerError):
            log.worked(kind, NOW_MS, lines=1)
    for number in range(100):
        log.worked(f"kind {number}", NOW_MS, lines=1)
    log.close(NOW_MS)
    (entry,) = spans(log)
    assert len(entry.jobs) == 17
    assert entry.jobs["other"].lines == 84


def filled(folder: Path, entries: int = 30) -> None:
    log = OwnerLog(folder)
    for number in range(entries):
        log.policy(f"watts_w: {number} became {number + 1}", NOW_MS + number * DAY_MS)
    log.close(NOW_MS + entries * DAY_MS)


def test_every_altered_byte_shows(tmp_path: Path) -> None:
    filled(tmp_path, 6)
    (path,) = log_files(tmp_path)
    data = path.read_bytes()
    assert LogReader(tmp_path).verify().whole
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert not LogReader(tmp_path).verify().whole, f"byte {at}"


def test_every_entry_that_is_taken_out_or_moved_shows(tmp_path: Path) -> None:
    filled(tmp_path)
    files = log_files(tmp_path)
    assert len(files) == 2
    for path in files:
        lines = path.read_bytes().splitlines(keepends=True)
        for at in range(len(lines)):
            path.write_bytes(b"".join(lines[:at] + lines[at + 1 :]))
            assert not LogReader(tmp_path).verify().whole, f"{path.name}, line {at}"
        path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
        assert not LogReader(tmp_path).verify().whole
        path.write_bytes(b"".join(lines))
    assert LogReader(tmp_path).verify().whole
    oldest = files[0].read_bytes()
    files[0].unlink()
    assert not LogReader(tmp_path).verify().whole
    files[0].write_bytes(oldest)
    (tmp_path / HEAD_NAME).unlink()
    assert not LogReader(tmp_path).verify().whole


def test_a_shortened_log_still_says_so_after_the_agent_has_gone_on(tmp_path: Path) -> None:
    filled(tmp_path)
    path = log_files(tmp_path)[-1]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))
    log = OwnerLog(tmp_path)
    log.policy("something", NOW_MS + 40 * DAY_MS)
    log.close(NOW_MS + 40 * DAY_MS)
    assert any("are missing" in entry.what for entry in log.entries(0, 5))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(cut=st.integers(1, 400), rubbish=st.binary(max_size=30))
def test_a_log_whose_end_was_cut_off_goes_on(tmp_path: Path, cut: int, rubbish: bytes) -> None:
    folder = tmp_path / os.urandom(8).hex()
    filled(folder, 4)
    (path,) = log_files(folder)
    data = path.read_bytes()
    cut = min(cut, len(data) - 1)
    path.write_bytes(data[:-cut] + rubbish.replace(b"\n", b""))
    (folder / HEAD_NAME).unlink()  # the power went before it was written
    log = OwnerLog(folder)
    log.policy("after the power cut", NOW_MS + 10 * DAY_MS)
    log.close(NOW_MS + 10 * DAY_MS)
    assert log.verify().whole
    assert log.entries(0, 1)[-1].what == "after the power cut"


def test_a_log_of_nothing_but_rubbish_begins_anew_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "2026-09.00.jsonl").write_bytes(b"\0" * 4096)
    log = OwnerLog(tmp_path)
    log.policy("after", NOW_MS)
    log.close(NOW_MS)
    assert [entry.what for entry in log.entries()] == [
        "the log begins",
        "4096 bytes at the end of 2026-09.00.jsonl were not whole and were cut off",
        "after",
    ]
    assert log.verify().whole


def test_months_and_the_cap_in_all(tmp_path: Path) -> None:
    log = OwnerLog(tmp_path, max_bytes=20_000)
    for number in range(400):
        log.policy("x" * 150, NOW_MS + number * DAY_MS)
        if number % 10 == 0:
            log.flush()
            assert sum(path.stat().st_size for path in log_files(tmp_path)) < 20_000 + 5_000
    log.close(NOW_MS + 400 * DAY_MS)
    found = log.verify()
    assert found.whole, found.problems
    assert any(entry.file is not None for entry in log.entries(0, 1_000))
    oldest = log_files(tmp_path)[0]
    oldest.unlink()  # this one the log does not name
    assert not log.verify().whole


@pytest.mark.parametrize("days", [0, 1, 58, 59, 60, 364, 365, 10_957, 11_016, 20_000, 20_544, 47_540])
def test_the_name_of_a_month(days: int) -> None:
    at = dt.datetime.fromtimestamp(days * 86_400, dt.UTC)
    assert month_file(days * DAY_MS, 3) == f"{at:%Y-%m}.03.jsonl"


def test_a_disk_that_is_full_loses_nothing_that_can_wait_and_tells_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = OwnerLog(tmp_path)
    log.policy("before", NOW_MS)
    log.flush()
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", full)
    for number in range(1_005):
        log.policy(f"meanwhile {number}", NOW_MS + number)
    log.flush()
    monkeypatch.undo()
    assert [entry.what for entry in LogReader(tmp_path).entries()] == ["the log begins", "before"]
    log.flush()
    told = [entry.what for entry in log.entries(0, 2_000)]
    assert told[-1] == "5 entries could not be written and are lost"
    assert told[2:-1] == [f"meanwhile {number}" for number in range(1_000)]
    assert log.verify().whole


def test_two_agents_cannot_write_one_log(tmp_path: Path) -> None:
    first, second = OwnerLog(tmp_path), OwnerLog(tmp_path)
    first.open()
    with pytest.raises(SetupError, match="another agent"):
        second.open()
    first.close(NOW_MS)
    second.open()
    second.close(NOW_MS)


def test_it_is_read_while_it_is_written(tmp_path: Path) -> None:
    log = OwnerLog(tmp_path, max_bytes=60_000)
    done = threading.Event()
    counts: list[int] = []

    def read() -> None:
        reader = LogReader(tmp_path)
        while not done.is_set():
            entries = reader.entries(0, 50)
            assert [entry.n for entry in entries] == sorted(entry.n for entry in entries)
            counts.append(len(entries))

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(600):
        log.policy("y" * 120, NOW_MS + number * HOUR_MS)
        log.flush()
    done.set()
    thread.join()
    assert max(counts) == 50


def test_the_latest_entries_and_those_since(tmp_path: Path) -> None:
    filled(tmp_path)
    reader = LogReader(tmp_path)
    assert [entry.what for entry in reader.entries(0, 2)] == ["watts_w: 28 became 29", "watts_w: 29 became 30"]
    assert len(reader.entries(NOW_MS + 20 * DAY_MS, 1_000)) == 10
    assert reader.entries(NOW_MS + 100 * DAY_MS, 10) == []
    assert LogReader(tmp_path / "none").entries() == []


def test_every_reason_has_words_and_every_entry_is_said_in_them(tmp_path: Path) -> None:
    assert list(words.WHY) == list(ReasonCode)
    log = OwnerLog(tmp_path)
    look(log, OUT, NOW_MS, NOW_MS + 2 * MIN_MS)
    log.worked("batch", NOW_MS + 2 * MIN_MS, lines=3, tokens=9, energy_mwh=1_500, measured=True, earned_micro=1_500_000)
    log.policy("watts_w: 100 became 150", NOW_MS + 2 * MIN_MS, by="operator")
    log.close(NOW_MS + 2 * MIN_MS)
    told = "\n".join(words.entry(entry) for entry in log.entries())
    assert "did not for 2 min: the car moves" in told
    assert "for batch: 3 requests, 9 tokens, 1.5 Wh (measured), earned 1.50" in told
    assert "watts_w: 100 became 150 (operator)" in told


def test_an_entry_of_a_later_version_is_still_an_entry(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    entry = LogReader(tmp_path).entries()[-1]
    later = msgspec.to_builtins(entry) | {"co2_g": 4}
    assert msgspec.convert(later, Entry) == entry
