"""``motorpool owner``: every act, paper and reading of the owner on the command line, as the car then sees it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import click
import pytest

from motorpool.agent.enrolment import CONSENT_NAME, PRIVATE_NAME, PUBLIC_NAME, ConsentFile
from motorpool.agent.owner import acts, pairing
from motorpool.agent.owner.entries import LOG_DIR, log_files
from motorpool.agent.owner.log import OwnerLog
from motorpool.cli import main
from motorpool.cli.owner_cmd import days_mask
from motorpool.cli.running import CREDENTIALS_NAME
from motorpool.core.policy import ConsentView, Quiet, ReadyBy
from motorpool.trust.credentials import VehicleCredentials, save_credentials


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_credentials(
        tmp_path / CREDENTIALS_NAME, VehicleCredentials(vehicle_id="car-7", urls=[], jwt="secret", seed="secret")
    )
    return tmp_path


def view(folder: Path) -> ConsentView:
    papers = ConsentFile(folder / CONSENT_NAME, folder / PUBLIC_NAME, "car-7")
    return papers.view(time.time_ns() // 1_000_000 + 1)


def owner(folder: Path, *arguments: str, code: int = 0) -> None:
    assert main.run(["owner", arguments[0], "--dir", str(folder), *arguments[1:]]) == code


def test_a_consent_from_beginning_to_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner(folder, "status")
    assert "no consent (consent_missing)" in capsys.readouterr().out
    owner(folder, "grant", "--watts", "120", "--floor", "40", "--schedule", "Mon-Fri 07:30 80",
          "--schedule", "Sat,Sun 10:00 60", "--quiet", "daily 22:00-06:00", "--hours-week", "20",
          "--mobile-mb-month", "50", "--days", "30")  # fmt: skip
    given = view(folder)
    assert (given.refusal, given.max_watts_w, given.floor_pct, given.battery_watts_w) == (None, 120, 40.0, 0)
    assert given.schedule == (
        ReadyBy(weekdays=31, minute=450, target_pct=80.0),
        ReadyBy(weekdays=96, minute=600, target_pct=60.0),
    )
    assert given.quiet == (Quiet(weekdays=127, from_minute=1320, to_minute=360),)
    assert (given.limits.compute_h_week, given.limits.metered_bytes_month) == (20.0, 50_000_000)
    said = capsys.readouterr().out
    assert "80 % by 07:30 Mon,Tue,Wed,Thu,Fri" in said
    assert "quiet 22:00 to 06:00 every day" in said
    owner(folder, "change", "--floor", "60", "--ready-by", "06:45", "--target", "90", "--quiet", "none")
    changed = view(folder)
    assert (changed.floor_pct, changed.ready_by_minute, changed.target_pct, changed.quiet) == (60.0, 405, 90.0, ())
    assert (changed.schedule, changed.limits, changed.expires_ms) == (given.schedule, given.limits, given.expires_ms)
    owner(folder, "change", "--ready-by", "none", "--schedule", "none", "--share-while-charging")
    assert (view(folder).ready_by_minute, view(folder).schedule, view(folder).share_while_charging) == (None, (), True)
    before = view(folder)
    owner(folder, "confirm")
    assert view(folder).granted_ms > before.granted_ms
    assert view(folder).floor_pct == 60.0
    owner(folder, "withdraw")
    assert view(folder).refusal == "consent_withdrawn"
    owner(folder, "change", "--floor", "10", code=1)
    assert "motorpool owner grant" in capsys.readouterr().err


def test_acts_need_no_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner(folder, "grant")
    (folder / PRIVATE_NAME).unlink()
    owner(folder, "pause", "--minutes", "90")
    until_ms = view(folder).paused_until_ms
    assert 89 * 60_000 < until_ms - time.time_ns() // 1_000_000 <= 90 * 60_000
    owner(folder, "need-car")
    assert view(folder).paused_until_ms == acts.FOREVER_MS
    owner(folder, "resume")
    assert view(folder).paused_until_ms == 0
    assert view(folder).refusal is None
    owner(folder, "withdraw")
    assert view(folder).refusal == "consent_withdrawn"
    capsys.readouterr()
    owner(folder, "grant", code=1)
    assert "owner's device" in capsys.readouterr().err


def test_taking_back_takes_one_command_without_an_option(folder: Path) -> None:
    owner(folder, "grant")
    owner(folder, "withdraw")
    assert view(folder).refusal == "consent_withdrawn"


def test_status_for_a_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner(folder, "grant", "--json")
    owner(folder, "pause", "--json")
    _, told = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert told["vehicle_id"] == "car-7"
    assert told["consent"]["max_watts_w"] == 150
    assert told["acts"]["words"].startswith("paused until")


def test_the_log_and_the_statement(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now_ms = time.time_ns() // 1_000_000
    log = OwnerLog(folder / LOG_DIR)
    log.policy("watts_w: 100 became 150", now_ms - 2 * 3_600_000)
    log.worked("batch", now_ms, lines=3, energy_mwh=10, earned_micro=2_500_000, electricity_micro=500_000, wear_micro=1)
    log.close(now_ms)
    owner(folder, "log")
    assert "watts_w: 100 became 150 (operator)" in capsys.readouterr().out
    owner(folder, "log", "--hours", "1", "--json")
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["jobs"]["batch"]["lines"] == 3
    owner(folder, "statement", "--weeks", "1")
    assert "pay 2.50, electricity 0.5000, wear 0.0000, left 2.00" in capsys.readouterr().out
    owner(folder, "statement", "--weeks", "2", "--json")
    assert len(capsys.readouterr().out.splitlines()) == 2
    owner(folder, "log", "--verify")
    assert "all as written" in capsys.readouterr().out
    (path,) = log_files(folder / LOG_DIR)
    path.write_bytes(path.read_bytes().replace(b"became 150", b"became 151"))
    owner(folder, "log", "--verify", code=1)
    assert "was altered" in capsys.readouterr().err


def test_a_code_and_a_link_to_pair(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner(folder, "pair", code=1)
    assert "no page for the owner" in capsys.readouterr().err
    (folder / pairing.PAGE_NAME).write_text('{"url":"https://car.local:8710","ca_sha256":"ab12"}')
    owner(folder, "pair")
    said = capsys.readouterr().out
    link = re.search(r"https://car\.local:8710/pair#(\S+)", said)
    assert link is not None
    assert "█" in said or "▄" in said
    assert "ab12" in said
    assert pairing.redeem(folder, link[1], time.time_ns() // 1_000_000) is not None
    owner(folder, "pair", "--forget")
    assert pairing.load_phones(folder) == ()


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("Mon", 1),
        ("Mon-Fri", 31),
        ("sat,sun", 96),
        ("Sat-Mon", 97),
        ("daily", 127),
        ("Sun-Sat", 127),
        ("Mon,Wed-Thu", 13),
    ],
)
def test_weekdays(text: str, mask: int) -> None:
    assert days_mask(text) == mask


@pytest.mark.parametrize("text", ["", "Monday", "Mon-", "1-5", "Mon-Fri-Sun", "Mon,,Tue"])
def test_what_is_no_weekday(text: str) -> None:
    if text == "Mon-":
        assert days_mask(text) == 1
        return
    with pytest.raises(click.BadParameter):
        days_mask(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["owner", "status"], "name a vehicle"),
        (["owner", "pause", "2", "--minutes", "0"], "not in the range"),
        (["owner", "grant", "2", "--floor", "nan"], "this is no number"),
        (["owner", "grant", "2", "--schedule", "07:30"], "a time of the schedule looks like"),
        (["owner", "grant", "2", "--schedule", "Mon 25:00 80"], "a time looks like 07:30"),
        (["owner", "grant", "2", "--schedule", "Mon 07:30 101"], "not in the range"),
        (["owner", "grant", "2", "--quiet", "daily 22:00"], "quiet hours look like"),
        (["owner", "grant", "2", "--ready-by", "noon"], "a time looks like 07:30"),
    ],
)
def test_a_slip_of_the_keyboard_is_told_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1


def test_another_cars_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["owner", "need-car", "car-8", "--dir", str(folder)]) == 1
    assert "belongs to the vehicle car-7" in capsys.readouterr().err
    assert not (folder / acts.ACTS_NAME).exists()
