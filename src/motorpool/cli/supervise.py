"""Keeps child processes alive: starts them, notices when one dies, says so, and starts it again after a while.

Decides: when to start a dead child again. Must not: know what the children do.
Called by: ``cli.dev``.

Children are in sessions of their own, so that Ctrl-C reaches this process alone, which then ends them in order. If this
process dies in any way, the kernel kills them: no child outlives the command that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from motorpool.bus import die_with_parent
from motorpool.errors import SetupError

RESTART_MIN_S: Final = 0.5
RESTART_MAX_S: Final = 10.0
HEALTHY_S: Final = 30.0  # a child that lived this long starts the waiting times over
END_GRACE_S: Final = 5.0
LOG_TAIL_BYTES: Final = 4096

Say = Callable[[str], None]


class Child:
    """One process, started again whenever it dies. ``name`` is what people read."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, say: Say, environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self.starts = 0
        self._command = list(command)
        self._say = say
        self._environment = environment or {}
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._ending = False

    @property
    def pid(self) -> int | None:
        """The process that runs now, None while it is being started again."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start it and keep it running until ``stop``."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        await self._spawn()
        self._task = asyncio.create_task(self._keep())

    async def _spawn(self) -> None:
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | self._environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.starts += 1

    async def _keep(self) -> None:
        wait_s = RESTART_MIN_S
        while True:
            assert self._process is not None
            started_s = time.monotonic()
            code = await self._process.wait()
            if self._ending:
                return
            if time.monotonic() - started_s > HEALTHY_S:
                wait_s = RESTART_MIN_S
            self._say(f"{self.name} ended ({how(code)}); starting it again in {wait_s:g} s")
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RESTART_MAX_S)
            await self._spawn()
            self._say(f"{self.name} is back (process {self.pid})")

    def last_words(self) -> str:
        """The last line that the child wrote, for an error message."""
        try:
            tail = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        lines = [line.strip() for line in tail.splitlines() if line.strip()]
        return lines[-1].removeprefix("motorpool: error: ") if lines else ""

    async def stop(self) -> None:
        """End it: first politely, then not."""
        self._ending = True
        if self._task is not None:
            if self.pid is None:
                self._task.cancel()
            else:
                await self._end()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _end(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), END_GRACE_S)
        except TimeoutError:
            self._say(f"{self.name} does not end by itself; killing it")
            self._process.kill()


def how(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


async def until(
    condition: Callable[[], Awaitable[bool]], *, timeout_s: float, what: str, child: Child | None = None
) -> None:
    """Wait until ``condition`` holds. Raises SetupError that says what was waited for, with the child's last words.

    A child that died more than twice meanwhile will not get better by waiting.
    """
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        failing = child is not None and child.starts > 2
        if failing or time.monotonic() > deadline_s:
            words = child.last_words() if child is not None else ""
            where = f" (see {child.log})" if child is not None else ""
            raise SetupError(f"{what} did not come up{': ' + words if words else ''}{where}", code="start_failed")
        await asyncio.sleep(0.1)
