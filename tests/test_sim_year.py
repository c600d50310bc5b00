"""A year of an owner in small: hand-made sessions, the real guard, and an account that shares nothing with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest
from click.testing import CliRunner
from tests.guard_trial import without

from motorpool.cli.main import cli
from motorpool.errors import SetupError
from motorpool.sim.recordings import load
from motorpool.sim.year import Node, choose, simulate

HEAD = '"location";"user_id";"session_id";"plugin_time";"plugout_time";"connection_time";"energy_session"\n'
OSLO = ZoneInfo("Europe/Oslo")


def reports(folder: Path, days: int = 60, user: str = "ASK_1") -> Path:
    """An owner who comes home at five and leaves at half past seven, on Saturdays at noon."""
    rows = []
    for day in range(days):
        home = datetime(2020, 3, 2, 17, tzinfo=OSLO) + timedelta(days=day)
        hours = 19.0 if home.weekday() == 4 else 14.5
        away = home + timedelta(hours=hours)
        rows.append(f'"ASK";"{user}";"{user}_{day}";{home:%Y-%m-%d %H:%M:%S};{away:%Y-%m-%d %H:%M:%S};{hours};12,5')
    path = folder / "tiny_Dataset1.csv"
    path.write_text(HEAD + "\n".join(rows) + "\n")
    return path


def test_the_charge_is_the_same_at_every_departure_and_work_was_done(tmp_path: Path) -> None:
    recording = load(reports(tmp_path))
    user, sessions = choose(recording.sessions)
    year = simulate(user, sessions, Node(), zone=recording.zone)
    assert year.violations == {}
    assert len(year.departures) == 60
    assert year.least_pct >= -0.01
    assert 200 < year.worked_ms / 3_600_000 < 60 * 9
    assert year.statement.net_micro == (
        year.statement.pay_micro - year.statement.electricity_micro - year.statement.wear_micro
    )
    assert sum(week.worked_ms for week in year.weeks) == year.worked_ms


def test_without_the_rule_that_charging_comes_first_the_promise_is_seen_to_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = load(reports(tmp_path))
    user, sessions = choose(recording.sessions)
    slow = [msgspec.structs.replace(session, charger_w=900.0) for session in sessions]  # not full by the morning
    assert simulate(user, slow, Node(), zone=recording.zone).violations == {}
    monkeypatch.setattr("motorpool.core.guard_rules.beside_charging_w", lambda look: None)
    with without("charging_first", "ready_in_time"):
        assert simulate(user, slow, Node(), zone=recording.zone).violations


def test_it_is_the_same_to_the_last_bit_whatever_the_hash_seed(tmp_path: Path) -> None:
    path = reports(tmp_path)
    command = [sys.executable, "-m", "motorpool.cli.main", "sim", "year", "--sessions", str(path)]
    outputs = {
        subprocess.run(
            [*command, "--no-picture", "--json"],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_the_command_draws_a_picture_and_tells_its_result(tmp_path: Path) -> None:
    out = tmp_path / "year.svg"
    asked = ["year", "--sessions", str(reports(tmp_path)), "--out", str(out), "--json"]
    done = CliRunner().invoke(cli, ["sim", *asked])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["violations"] == {}
    first = out.read_bytes()
    assert b"<svg" in first
    assert CliRunner().invoke(cli, ["sim", *asked]).exit_code == 0
    assert out.read_bytes() == first


def test_bad_recordings_are_told_with_file_and_line(tmp_path: Path) -> None:
    path = reports(tmp_path)
    path.write_text(path.read_text().replace("2020-03-04 17", "2020-03-94 17"))
    with pytest.raises(SetupError, match=r"tiny_Dataset1.csv, line 4, column plugin_time"):
        load(path)
    with pytest.raises(SetupError, match="no owner"):
        choose(load(reports(tmp_path, days=3)).sessions)
    with pytest.raises(SetupError, match="nobody"):
        choose(load(reports(tmp_path)).sessions, "nobody")
