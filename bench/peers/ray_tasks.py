# mypy: disable-error-code="import-not-found,untyped-decorator"
# The peer is installed in an environment of its own, so the types are not at hand here.
"""Ray: stateless tasks, all submitted, then one ``ray.get`` over all.

Settings: as many CPUs as the machine has, ``num_cpus`` a task from the variant (1 is its default), no dashboard, no
usage statistics, no log forwarding. Nothing is durable.
"""

from __future__ import annotations

import os

import ray

from bench.peers import measure


@ray.remote
def nothing(number: int) -> int:
    """Return the argument."""
    return number


def run(count: int) -> int:
    """Submit all, then wait for all."""
    return len(set(ray.get([nothing.remote(number) for number in range(count)])))


def main() -> None:
    """Start a local node and time it."""
    ray.init(
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=200 * 1024 * 1024,
    )
    measure.timed_plainly(measure.arguments(), run)
    ray.shutdown()


if __name__ == "__main__":
    main()
