"""What the yield benchmark concludes from its trials, and how it sees that a process stands still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from bench import report
from bench.yield_car import alive, stopped, until_ms, used_ns, used_since_ns
from bench.yield_scenes import AFTER, DOOR, GONE, SCENES, Trials, percentile

PROGRAM = """
import threading
threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
print(flush=True)
while True: pass
"""


@pytest.fixture
def program() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_process_with_threads_is_seen_to_run_to_stand_still_and_to_end(program: subprocess.Popen[bytes]) -> None:
    pid = program.pid
    assert not stopped(pid)
    before = used_ns(pid)
    assert len(before) == 2
    assert until_ms(time.perf_counter(), lambda: used_since_ns(pid, before) > 1_000_000, "it did not compute") > 0
    os.kill(pid, signal.SIGSTOP)
    until_ms(time.perf_counter(), lambda: stopped(pid), "it went on")
    assert alive(pid)
    before = used_ns(pid)
    assert used_since_ns(pid, before) == 0
    program.kill()
    until_ms(time.perf_counter(), lambda: not alive(pid), "it did not end")  # not collected yet, and yet gone
    program.wait()
    assert not alive(pid)


def test_the_percentile_is_a_value_that_so_many_do_not_exceed() -> None:
    values = [float(value) for value in range(200, 0, -1)]
    assert percentile(values, 0.99) == 198
    assert percentile(values[:50], 0.99) == 200
    assert percentile([7.0], 0.99) == 7
    assert percentile(values, 0.5) == 100


def test_one_slow_trial_in_fifty_misses_the_aim_and_one_in_two_hundred_does_not() -> None:
    trials = Trials({DOOR: [*[2.0] * 199, 900.0], GONE: [*[30.0] * 49, 2_500.0], AFTER: [0.0, 0.0, 0.5]})
    door, gone, after = trials.figures()
    assert door.met is True
    assert door.aim == "p99 under 200 ms"
    assert door.notes[report.OURS] == "p99 2"
    assert door.spread[report.OURS] == (2.0, 900.0)
    assert gone.met is False
    assert gone.aim == "every time under 2,000 ms"
    assert after.met is False


def test_the_same_trials_are_the_same_picture() -> None:
    pytest.importorskip("matplotlib")
    from bench.yield_plot import draw  # noqa: PLC0415

    values = {scene.key: [2.0, 3.0, scene.aim_ms * 1.5] for scene in SCENES}
    picture = draw(values)
    assert picture == draw(values)
    assert picture != draw(values | {DOOR: [1.0]})
