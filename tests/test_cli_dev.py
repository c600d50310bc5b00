"""`motorpool dev` and `motorpool demo` as processes, with null engines: everything real but the model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME, ConsentFile, take_consent_back
from motorpool.cli import main
from motorpool.cli.dev import DevCluster, DevConfig
from motorpool.cli.operator import AdminClient
from motorpool.cli.running import CREDENTIALS_NAME

DEADLINE_S = 60.0
MOTORPOOL = [sys.executable, "-m", "motorpool.cli.main"]


class Ran(NamedTuple):
    """A command that has run."""

    returncode: int
    stdout: str
    stderr: str


class Dev:
    """A running `motorpool dev`."""

    def __init__(self, data: Path) -> None:
        self.data = data
        options = [
            "--model",
            "null",
            "--vehicles",
            "1",
            "--port",
            "0",
            "--null-rate",
            "0",
            "--data",
            str(data),
            "--json",
        ]
        self.process = subprocess.Popen(
            [*MOTORPOOL, "dev", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.ready = json.loads(self.line(self.process.stdout))

    def line(self, stream: Any) -> str:
        found, _, _ = select.select([stream], [], [], DEADLINE_S)
        line = stream.readline() if found else ""
        assert line, f"motorpool dev said nothing in time: {self.process.poll()}"
        return str(line)

    def until_said(self, words: str) -> str:
        while words not in (line := self.line(self.process.stderr)):
            pass
        return line

    def run(self, *arguments: str) -> Ran:
        """A command of a customer, owner or operator, in this process: it finds the running cell by its data folder."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.run([*arguments, "--data", str(self.data)])
        return Ran(code, out.getvalue(), err.getvalue())

    def children(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    running = Dev(tmp_path_factory.mktemp("dev"))
    yield running
    running.close()


def wait_for(condition: Callable[[], bool]) -> None:
    """Ask again and again until it holds."""
    deadline_s = time.monotonic() + DEADLINE_S
    asked = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s
        asked.wait(0.05)


def test_the_line_of_json_says_how_to_reach_everything(dev: Dev) -> None:
    assert dev.ready["base_url"].startswith("http://127.0.0.1:")
    assert dev.ready["api_key"].startswith("mp-")
    assert set(dev.ready["pids"]) == {"message server", "control plane", "car-1"}
    assert (dev.data / "dev.json").stat().st_mode & 0o077 == 0


def test_documents_go_through_a_running_dev(dev: Dev, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    out = tmp_path / "out" / "results.jsonl"
    options = ["--model", "null", "--prompt", "p", "-o", str(out), "--max-tokens", "5", "--json"]
    done = dev.run("batch", "run", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["completed"] == 2
    assert [json.loads(line)["document"] for line in out.read_text().splitlines()] == ["a.txt", "b.txt"]


def test_an_unknown_model_is_said_in_words(dev: Dev, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    options = ["--model", "no-such-model", "--prompt", "p", "-o", str(tmp_path / "out.jsonl")]
    done = dev.run("batch", "run", str(tmp_path / "a.txt"), *options)
    assert done.returncode != 0
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_owner_stops_the_vehicle_and_gives_it_back(dev: Dev) -> None:
    assert "door open" in dev.run("car", "1", "open-door").stdout
    wait_for(lambda: state(dev)["permit_w"] == 0)
    assert "door_open" in {reason["code"] for reason in state(dev)["reasons"]}
    assert "locked" in dev.run("car", "car-1", "lock").stdout
    wait_for(lambda: state(dev)["permit_w"] > 0)
    told = dev.run("vehicles", "story", "car-1").stdout
    assert "door_open" in told


def test_the_owner_takes_consent_back_and_gives_it_again(dev: Dev) -> None:
    assert "consent_withdrawn" in dev.run("consent", "withdraw", "1").stdout
    wait_for(lambda: state(dev)["permit_w"] == 0)
    assert [reason["code"] for reason in state(dev)["reasons"]] == ["consent_withdrawn"]
    given = dev.run("consent", "give", "1", "--watts", "70", "--floor", "35", "--ready-by", "07:30", "--target", "60")
    assert "up to 70 W, not below 35 % charge, 60 % by 07:30" in given.stdout
    wait_for(lambda: state(dev)["permit_w"] == 70)
    assert dev.run("consent", "show", "car-1").stdout == given.stdout


def test_a_consent_that_was_taken_back_is_not_given_again_by_the_next_start(tmp_path: Path) -> None:
    cluster = DevCluster(DevConfig(data=tmp_path, model="null"), lambda _line: None)
    folder = cluster.vehicle_dir("car-1")
    folder.mkdir(parents=True)
    (folder / CREDENTIALS_NAME).write_bytes(b"of an earlier start")
    papers = ConsentFile(folder / CONSENT_NAME, folder / PUBLIC_NAME, "car-1")
    with AdminClient("http://127.0.0.1:9", "never asked") as admin:
        cluster._enrol(admin, "car-1", 1, folder)
        now_ms = time.time_ns() // 1_000_000
        assert papers.view(now_ms).refusal is None
        take_consent_back(folder, "car-1", now_ms=now_ms)
        cluster._enrol(admin, "car-1", 1, folder)
    assert papers.view(now_ms).refusal == "consent_withdrawn"


def state(dev: Dev) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dev.run("vehicles", "show", "car-1", "--json").stdout)
    return found


def test_an_act_that_is_not_possible_is_one_readable_line(dev: Dev) -> None:
    done = dev.run("car", "1", "come-back")
    assert done.returncode == 1
    assert done.stderr == "motorpool: error: the car is not away\n"
    assert "there is no vehicle 9" in dev.run("car", "9", "show").stderr


def test_a_second_dev_in_the_same_folder_is_refused(dev: Dev) -> None:
    done = dev.run("dev", "--model", "null", "--port", "0")
    assert done.returncode == 1
    assert f"(process {dev.process.pid})" in done.stderr


def test_a_port_in_use_is_said_before_anything_starts(dev: Dev, tmp_path: Path) -> None:
    port = dev.ready["base_url"].split(":")[2].split("/")[0]
    command = [*MOTORPOOL, "dev", "--model", "null", "--port", port, "--data", str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 1
    assert f"port {port} is in use: choose another one with --port" in done.stderr


@pytest.mark.parametrize("name", ["control plane", "message server", "car-1"])
def test_a_process_that_is_killed_comes_back(dev: Dev, name: str) -> None:
    pid = json.loads((dev.data / "dev.json").read_text())["pids"][name]
    os.kill(pid, signal.SIGKILL)
    assert "SIGKILL" in dev.until_said(f"{name} ended")
    dev.until_said(f"{name} is back")
    wait_for(lambda: dev.run("vehicles", "show", "car-1").returncode == 0 and state(dev)["permit_w"] > 0)


def test_no_child_outlives_a_killed_dev(dev: Dev) -> None:
    children = dev.children()
    assert len(children) >= 3
    dev.process.kill()
    gone, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert not alive
    assert len(gone) == len(children)


def test_sigterm_ends_everything_in_order(tmp_path: Path) -> None:
    running = Dev(tmp_path)
    try:
        children = running.children()
        running.process.terminate()
        assert running.process.wait(DEADLINE_S) == 0
        _, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
        assert not alive
        assert not (tmp_path / "dev.json").exists()
    finally:
        running.close()


def test_the_demo_loses_nothing_when_a_vehicle_drives_off(tmp_path: Path) -> None:
    out, svg = tmp_path / "results.jsonl", tmp_path / "demo.svg"
    options = ["--null", "--null-rate", "12", "-o", str(out), "--svg", str(svg)]
    done = subprocess.run([*MOTORPOOL, "demo", *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the owner of vehicle 2 opens the door" in done.stdout
    assert "What came of it" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["document"] for row in rows}) == len(rows) == 64
    drawn = svg.read_text()
    assert "vehicle&#160;2" in drawn
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")


def test_a_machine_that_is_too_slow_is_told_what_is_left(tmp_path: Path) -> None:
    options = ["--null", "--null-rate", "1", "--limit", "3", "-o", str(tmp_path / "results.jsonl")]
    done = subprocess.run([*MOTORPOOL, "demo", *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 7
    assert "of 64 lines are done" in done.stderr
