# mypy: disable-error-code="import-not-found,untyped-decorator"
# The peer is installed in an environment of its own, so the types are not at hand here.
"""procrastinate on PostgreSQL: deferred in batches, two worker processes, done when no job is open any more.

Settings: ``concurrency`` from the variant, jobs deferred 1,000 at a time, finished jobs kept (as its default is),
PostgreSQL durable. procrastinate keeps no results.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
from pathlib import Path

import procrastinate

from bench.peers import measure, postgres_server

PROCESSES = 2
DEFER = 1_000
app = procrastinate.App(connector=procrastinate.PsycopgConnector())


@app.task(queue="bench")
async def nothing(number: int) -> int:
    """Return the argument."""
    return number


def connector(folder: str) -> procrastinate.PsycopgConnector:
    """A connector to the server whose socket is in ``folder``."""
    return procrastinate.PsycopgConnector(
        kwargs={"host": folder, "user": "postgres", "dbname": "postgres"}, min_size=2, max_size=12
    )


async def worker(folder: str, concurrency: int) -> None:
    """One worker process: runs until it is told to end."""
    with app.replace_connector(connector(folder)) as replaced:
        async with replaced.open_async():
            await replaced.run_worker_async(queues=["bench"], concurrency=concurrency, fetch_job_polling_interval=0.2)


async def main(options: argparse.Namespace) -> None:
    """Server, schema, workers, then whole runs."""
    concurrency = int(options.variant or 10)
    with postgres_server.running() as folder, app.replace_connector(connector(folder)) as replaced:
        async with replaced.open_async():
            await replaced.schema_manager.apply_schema_async()
            with tempfile.TemporaryDirectory(prefix="bench-procrastinate-") as name:
                command = [
                    sys.executable,
                    "-m",
                    "bench.peers.procrastinate_tasks",
                    "--variant",
                    f"{folder},{concurrency}",
                ]
                logs = [Path(name) / f"worker{number}.log" for number in range(PROCESSES)]
                with measure.process(command, log=logs[0]), measure.process(command, log=logs[1]):
                    await measure.timed(options, lambda count: run(replaced, count))


async def run(bench: procrastinate.App, count: int) -> int:
    """Defer all in batches and wait until none is open."""
    before = await finished(bench)
    for start in range(0, count, DEFER):
        batch = [{"number": number} for number in range(start, min(count, start + DEFER))]
        await nothing.batch_defer_async(*batch)
    while (done := await finished(bench) - before) < count:  # noqa: ASYNC110 - the workers are other processes
        await asyncio.sleep(0.05)
    return done


async def finished(bench: procrastinate.App) -> int:
    """How many jobs have succeeded."""
    row = await bench.connector.execute_query_one_async(
        "SELECT count(*) AS n FROM procrastinate_jobs WHERE status = 'succeeded'"
    )
    return int(row["n"])


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    given = measure.arguments()
    if "," in given.variant:
        where, _, limit = given.variant.rpartition(",")
        asyncio.run(worker(where, int(limit)))
    else:
        asyncio.run(main(given))
