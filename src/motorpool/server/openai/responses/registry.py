"""All responses that run now, and what is done about them when the process starts, ends, and now and then.

Must not: run one itself (``runs`` does), or talk to clients. Called by: ``routes``.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from typing import Final

import msgspec

from motorpool.errors import MotorpoolError, RateLimitError
from motorpool.server.cell import Cell
from motorpool.server.openai.responses.log import Log
from motorpool.server.openai.responses.narration import Piece, pieces_json
from motorpool.server.openai.responses.objects import facts_json
from motorpool.server.openai.responses.runs import Plan, Run
from motorpool.store import responses as store
from motorpool.store.responses import ResponseRow

MAX_RUNNING: Final = 256  # background responses that vehicles work on at a time
MAX_OPEN: Final = 10_000  # background responses that have not ended
MAX_OPEN_OF_ACCOUNT: Final = 1_000
MAX_OPEN_BYTES: Final = 512 * 1024 * 1024  # that they take in memory
RETRY_AFTER_MS: Final = 10_000
SERVING_TTL_S: Final = 0.2
SWEEP_S: Final = 600.0
_log: Final = logging.getLogger(__name__)


class _Asked(msgspec.Struct, frozen=True):
    stream: bool


_asked: Final = msgspec.json.Decoder(_Asked)


class Registry:
    """The responses that have not ended."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._slots = asyncio.Semaphore(MAX_RUNNING)
        self._runs: dict[str, Run] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._open: dict[str, int] = {}  # background responses by account
        self._open_bytes = 0
        self._served: dict[str, tuple[float, bool]] = {}
        self._sweeping: asyncio.Task[None] | None = None

    def find(self, account: str, response_id: str) -> Run | None:
        """A response of this account that has not ended."""
        run = self._runs.get(response_id)
        return run if run is not None and run.plan.account == account and run.log.result is None else None

    def check_room(self, account: str) -> None:
        """Raise RateLimitError when no further background response can be taken."""
        mine = self._open.get(account, 0)
        if mine >= MAX_OPEN_OF_ACCOUNT or sum(self._open.values()) >= MAX_OPEN or self._open_bytes >= MAX_OPEN_BYTES:
            raise RateLimitError(
                "too many background responses wait or run: wait for some of them to end",
                code="too_many_background_responses",
                retry_after_ms=RETRY_AFTER_MS,
            )

    def start(self, plan: Plan, pieces: list[Piece] | None = None) -> Run:
        """Run a response; one in the background is in the books already."""
        run = Run(self._cell, plan, Log(plan.facts, pieces), self._slots, self._serving)
        response_id = plan.facts.response_id
        if plan.facts.background:
            self._open[plan.account] = self._open.get(plan.account, 0) + 1
            self._open_bytes += plan.size_bytes
        self._runs[response_id] = run
        task = asyncio.create_task(run.drive())
        self._tasks[response_id] = task
        task.add_done_callback(lambda task: self._over(run, task))
        return run

    def _serving(self, model: str) -> bool:
        """Whether a vehicle could run a model; asked by every response that waits, so looked up for all of them."""
        now_s = asyncio.get_running_loop().time()
        known = self._served.get(model)
        if known is None or now_s - known[0] > SERVING_TTL_S:
            known = now_s, bool(self._cell.serving(model))
            self._served[model] = known
        return known[1]

    def _over(self, run: Run, task: asyncio.Task[None]) -> None:
        plan = run.plan
        if not task.cancelled() and task.exception() is not None:
            _log.error("%s: unexpected %s", plan.facts.response_id, type(task.exception()).__name__)
            run.give_up()  # nobody is left waiting; one in the background goes on with the next start
        del self._runs[plan.facts.response_id]
        del self._tasks[plan.facts.response_id]
        if plan.facts.background:
            self._open[plan.account] -= 1
            self._open_bytes -= plan.size_bytes
            if not self._open[plan.account]:
                del self._open[plan.account]

    # -- start and end of the process

    def resume(self) -> int:
        """Go on with the background responses that the end of a process left behind; returns how many."""
        connection = self._cell.reader
        waiting = store.unfinished_responses(connection)
        for account, response_id in waiting:
            row = store.find_response(connection, account, response_id, self._cell.now_ms())
            assert row is not None, "what has not ended does not expire"
            self.start(plan_of(row), read_pieces(connection, row.response_no))
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep())
        return len(waiting)

    async def close(self) -> None:
        """Stop; background responses go on with the next start."""
        tasks = [*self._tasks.values(), *([self._sweeping] if self._sweeping is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sweep(self) -> None:
        """Remove what has been kept for long enough, now and then."""
        while True:
            try:
                if store.is_time_over(self._cell.reader, self._cell.now_ms()):
                    await self._cell.write(lambda connection: store.drop_expired(connection, self._cell.now_ms()))
                    continue  # there may be more than one transaction removes
            except (MotorpoolError, sqlite3.Error) as error:
                _log.warning("responses that have expired could not be removed yet: %s", type(error).__name__)
            await asyncio.sleep(SWEEP_S)


def plan_of(row: ResponseRow) -> Plan:
    """The plan of a background response that has not ended."""
    assert row.body is not None, "it has not ended"
    facts = facts_json.decode(row.facts)
    return Plan(
        account=row.account,
        facts=facts,
        items=[],  # they are in the books already
        body=row.body,
        whole=not _asked.decode(row.body).stream,
        streamed=True,
        created_ms=row.created_ms,
        number=row.response_no,
    )


def read_pieces(connection: sqlite3.Connection, number: int) -> list[Piece]:
    """What was told of a background response."""
    return [piece for data in store.read_pieces(connection, number) for piece in pieces_json.decode(data)]
