"""How every peer's run is timed: warm up, find a count that lasts long enough, run it, print one line of JSON.

Called by: the modules of this package, inside the environments of the peers, so the standard library is all there is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

STEP = 500  # counts are rounded up to this, so that they read well in a table


def arguments() -> argparse.Namespace:
    """``--tasks N`` runs exactly N; 0 finds a count that takes about ``--seconds``, at most ``--most``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--most", type=int, default=50_000)
    parser.add_argument("--warm", type=int, default=300)
    parser.add_argument("--variant", default="")
    return parser.parse_args()


def choose(options: argparse.Namespace, warm: int, warm_s: float) -> int:
    """The number of tasks to time, from how long ``warm`` of them took."""
    if options.tasks:
        return int(options.tasks)
    wanted = int(warm / warm_s * float(options.seconds))
    return min(int(options.most), -(-wanted // STEP) * STEP)


async def timed(options: argparse.Namespace, run: Callable[[int], Awaitable[int]]) -> None:
    """Warm up twice (the first meets cold caches and starting workers), then time one run and print it.

    ``run(n)`` does n tasks and returns how many results came back; a run that loses one fails.
    """
    await checked(run, options.warm)
    begun = time.perf_counter()
    await checked(run, options.warm)
    tasks = choose(options, options.warm, time.perf_counter() - begun)
    begun = time.perf_counter()
    await checked(run, tasks)
    seconds = time.perf_counter() - begun
    emit(tasks=tasks, seconds=seconds, per_s=tasks / seconds)


async def checked(run: Callable[[int], Awaitable[int]], count: int) -> None:
    """Run and demand that every task came back."""
    done = await run(count)
    if done != count:
        raise SystemExit(f"{count} tasks went in and {done} came back")


def timed_plainly(options: argparse.Namespace, run: Callable[[int], int]) -> None:
    """The same for a peer whose client blocks."""

    async def call(count: int) -> int:
        return run(count)

    asyncio.run(timed(options, call))


def emit(**values: float | str | list[float]) -> None:
    """Print the one line that the harness reads."""
    print(json.dumps(values), flush=True)


@contextlib.contextmanager
def process(
    command: list[str], *, log: Path, cwd: Path | None = None, user_id: int | None = None, stop_s: float = 10.0
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server beside the measurement, in a process group of its own, and end that group whatever happens."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            start_new_session=True,
            user=user_id,
            group=user_id,
            extra_groups=[] if user_id is not None else None,
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(stop_s)
        except subprocess.TimeoutExpired:
            print(f"{command[0]} did not stop in {stop_s} s and was killed", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def until(ready: Callable[[], bool], what: str, *, deadline_s: float = 60.0, poll_s: float = 0.05) -> None:
    """Wait for a condition of another process; fail with ``what`` after the deadline."""
    end = time.monotonic() + deadline_s
    while not ready():
        if time.monotonic() > end:
            raise SystemExit(f"no {what} within {deadline_s:.0f} s")
        time.sleep(poll_s)
