"""A limit, not a peer: a bare JetStream work queue on disk, from publish to the last acknowledgement.

One client publishes asynchronously with a window, two workers pull 100 at a time and acknowledge each message.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import nats
import uvloop
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import ConsumerConfig, RetentionPolicy, StorageType, StreamConfig

from bench.peers import measure

WORKERS = 2
FETCH = 100
WINDOW = 1_000  # publishes in flight
BODY = json.dumps({"custom_id": "line", "body": {"messages": [{"role": "user", "content": "x" * 200}]}}).encode()


async def publish(url: str, count: int) -> None:
    """Publish ``count`` messages; returns when the stream has stored all."""
    client = await nats.connect(url)
    stream = client.jetstream(publish_async_max_pending=WINDOW)
    for _ in range(count):
        await stream.publish_async("work.line", BODY, wait_stall=30)
    await stream.publish_async_completed()
    await client.close()


async def work(url: str, left: list[int]) -> int:
    """Pull and acknowledge until ``left[0]`` is used up; return how many messages this worker did."""
    client = await nats.connect(url)
    stream = client.jetstream()
    pull = await stream.pull_subscribe("work.line", durable="workers", stream="WORK")
    done = 0
    while left[0] > 0:
        wanted = min(FETCH, left[0])
        left[0] -= wanted  # taken before the pull, so that the workers never wait for more than there is
        messages = []
        with contextlib.suppress(NatsTimeoutError):
            messages = await pull.fetch(wanted, timeout=1)
        left[0] += wanted - len(messages)
        done += len(messages)
        for message in messages:
            await message.ack()
    await client.flush()
    await client.close()
    return done


async def main(options: argparse.Namespace) -> None:
    """Start a server with a stream on disk and time whole runs."""
    server = shutil.which("nats-server")
    if server is None:
        raise SystemExit("no nats-server in this environment")
    with tempfile.TemporaryDirectory(prefix="bench-js-") as name, contextlib.ExitStack() as stack:
        log = Path(name) / "nats.log"
        command = [server, "--addr", "127.0.0.1", "--port", "-1", "--jetstream", "--store_dir", name]
        stack.enter_context(measure.process(command, log=log))
        measure.until(lambda: "Server is ready" in log.read_text(), "NATS server")
        found = re.search(r"client connections on ([0-9.]+:\d+)", log.read_text())
        assert found is not None
        url = f"nats://{found.group(1)}"
        client = await nats.connect(url)
        stream = client.jetstream()
        await stream.add_stream(
            StreamConfig(
                name="WORK", subjects=["work.>"], retention=RetentionPolicy.WORK_QUEUE, storage=StorageType.FILE
            )
        )
        await stream.add_consumer("WORK", ConsumerConfig(durable_name="workers", max_ack_pending=10_000))

        async def run(count: int) -> int:
            left = [count]
            results = await asyncio.gather(publish(url, count), *(work(url, left) for _ in range(WORKERS)))
            return sum(result for result in results if result is not None)

        await measure.timed(options, run)
        await client.close()


if __name__ == "__main__":
    uvloop.run(main(measure.arguments()))
