# mypy: disable-error-code="import-not-found"
# The peer is installed in an environment of its own, so the types are not at hand here.
"""A limit, not a peer: bare claims of 50 jobs at a time with SKIP LOCKED in PostgreSQL, through asyncpg.

Timed: two connections that claim until nothing is left, each claim its own durable transaction. Filling the table is
not timed. With ``--variant whole`` all of a job's life is timed: copied in, claimed, marked as done.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

import asyncpg
import uvloop

from bench.peers import measure, postgres_server

CLAIM = """
UPDATE job SET state = 1 WHERE id IN
  (SELECT id FROM job WHERE state = 0 ORDER BY id LIMIT 50 FOR UPDATE SKIP LOCKED)
RETURNING id, body
"""
DONE = "UPDATE job SET state = 2, result = $2 WHERE id = ANY($1::int[])"
CONNECTIONS = 2
BODY = json.dumps({"custom_id": "line", "body": {"messages": [{"role": "user", "content": "x" * 200}]}})


async def fill(connection: asyncpg.Connection, count: int) -> None:
    """Copy ``count`` jobs in, one transaction."""
    await connection.copy_records_to_table(
        "job", records=[(number, 0, BODY) for number in range(count)], columns=["id", "state", "body"]
    )


async def claim(connection: asyncpg.Connection, *, finish: bool) -> int:
    """Claim until nothing is left; return the number of jobs."""
    statement = await connection.prepare(CLAIM)
    done = await connection.prepare(DONE)
    total = 0
    while rows := await statement.fetch():
        total += len(rows)
        if finish:
            await done.fetch([row["id"] for row in rows], BODY)
    return total


async def main(options: argparse.Namespace) -> None:
    """Start a server, run once small and once in full."""
    whole = options.variant == "whole"
    with postgres_server.running() as folder:
        connections = [
            await asyncpg.connect(host=folder, user="postgres", database="postgres") for _ in range(CONNECTIONS)
        ]
        await connections[0].execute(
            "CREATE TABLE job (id int PRIMARY KEY, state smallint NOT NULL, body text NOT NULL, result text);"
            "CREATE INDEX job_open ON job (id) WHERE state = 0"
        )

        async def run(count: int) -> float:
            await connections[0].execute("TRUNCATE job")
            begun = time.perf_counter()
            await fill(connections[0], count)
            if not whole:
                await connections[0].execute("ANALYZE job")
                begun = time.perf_counter()
            claimed = sum(await asyncio.gather(*(claim(each, finish=whole) for each in connections)))
            if claimed != count:
                raise SystemExit(f"{count} jobs went in and {claimed} were claimed")
            return time.perf_counter() - begun

        await run(2_000)
        tasks = measure.choose(options, 5_000, await run(5_000))
        seconds = await run(tasks)
        measure.emit(tasks=tasks, seconds=seconds, per_s=tasks / seconds)
        for each in connections:
            await each.close()


if __name__ == "__main__":
    uvloop.run(main(measure.arguments()))
