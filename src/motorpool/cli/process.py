"""Runs one part (control plane or agent) as this process: an event loop, and its log on stderr.

Decides: nothing. Must not: restart anything; a supervisor does.
Called by: ``cli.serve``, ``cli.agent``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import uvloop


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a part in an event loop of its own, with its log on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)
