# mypy: disable-error-code="import-not-found,untyped-decorator"
# The peer is installed in an environment of its own, so the types are not at hand here.
"""Dask distributed: one ``client.map`` over all, then one ``gather``.

Settings: two worker processes with one thread each, ``pure=False`` (no hashing of arguments), tasks pushed to the
workers without limit (``worker-saturation: inf``, three times the rate of the default), no dashboard, no work stealing
between equal workers, no event logs. Nothing is durable.
"""

from __future__ import annotations

import logging

import dask
from distributed import Client, LocalCluster

from bench.peers import measure

SETTINGS = {
    "distributed.admin.low-level-log-length": 0,
    "distributed.admin.log-length": 0,
    "distributed.diagnostics.nvml": False,
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.worker-saturation": float("inf"),
    "distributed.worker.memory.terminate": False,
}


def nothing(number: int) -> int:
    """Return the argument."""
    return number


def main() -> None:
    """Start a scheduler with two workers and time it."""
    options = measure.arguments()
    with (
        dask.config.set(SETTINGS),
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster) as client,
    ):

        def run(count: int) -> int:
            futures = client.map(nothing, range(count), pure=False)
            results: list[int] = client.gather(futures)
            return len(set(results))

        measure.timed_plainly(options, run)


if __name__ == "__main__":
    main()
