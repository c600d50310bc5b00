"""The live picture of ``motorpool dev`` with a line to type at, so that one can play the owners.

Decides: what a typed line means. Must not: act by itself.
Called by: ``cli.dev``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from motorpool.agent.signals.owner_port import OWNER_ACTIONS

REFRESH_S: Final = 0.5
HELP: Final = "type a vehicle and an action, as in `2 drive-off`; `help` lists the actions, `quit` ends everything"
BACKSPACE: Final = ("\x7f", "\b")
INTERRUPT: Final = ("\x03", "\x04")

Play = Callable[[str, str], Awaitable[str]]


def understand(line: str) -> tuple[str, str] | str:
    """A typed line: the vehicle's number and an action, or what to answer. ``quit`` is answered with ``quit``."""
    words = line.strip().lower().split(maxsplit=1)
    if not words:
        return HELP
    if words[0] in ("quit", "exit", "q"):
        return "quit"
    if words[0] == "help":
        return "actions: " + ", ".join(OWNER_ACTIONS)
    action = words[1].strip().replace(" ", "-") if len(words) == 2 else ""
    if not words[0].removeprefix("car-").isdigit() or action not in OWNER_ACTIONS:
        return f"not understood: {line.strip()}. {HELP}"
    return words[0].removeprefix("car-"), action


class Prompt:
    """The line that is being typed, and the last answer."""

    def __init__(self, play: Play, stop: asyncio.Event) -> None:
        self.typed = ""
        self.answer = HELP
        self._play = play
        self._stop = stop
        self._tasks: set[asyncio.Task[None]] = set()

    def feed(self, text: str) -> None:
        """Characters from the keyboard."""
        for character in text:
            if character in INTERRUPT:
                self._stop.set()
            elif character in BACKSPACE:
                self.typed = self.typed[:-1]
            elif character in "\r\n":
                line, self.typed = self.typed, ""
                self.enter(line)
            elif character.isprintable():
                self.typed += character

    def enter(self, line: str) -> None:
        """A whole line."""
        meaning = understand(line)
        if meaning == "quit":
            self._stop.set()
        elif isinstance(meaning, str):
            self.answer = meaning
        else:
            task = asyncio.create_task(self._do(*meaning))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _do(self, number: str, action: str) -> None:
        self.answer = await self._play(number, action)

    def picture(self, above: RenderableType) -> RenderableType:
        """The picture with the prompt below it."""
        line = Text.assemble(("> ", "bold"), self.typed, ("▌", "dim"))
        return Group(above, Text(self.answer, style="dim"), line)


@contextlib.contextmanager
def keyboard(feed: Callable[[str], None]) -> Iterator[None]:
    """Give every key to ``feed`` while the event loop runs; the terminal is as before afterwards."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()
    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, lambda: feed(os.read(descriptor, 1024).decode("utf-8", "replace")))
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


async def watch(
    console: Console, picture: Callable[[], Awaitable[RenderableType]], play: Play, stop: asyncio.Event
) -> None:
    """Show ``picture`` again and again until ``stop``; typed lines go to ``play``."""
    prompt = Prompt(play, stop)
    with keyboard(prompt.feed), Live(console=console, auto_refresh=False, screen=False) as live:
        while not stop.is_set():
            live.update(prompt.picture(await picture()), refresh=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), REFRESH_S)
