"""A limit, not a peer: HTTP in and NATS across, with the parts that Motorpool uses and nothing else.

One process takes requests with uvicorn and publishes their bodies to one of two vehicles in turn; each vehicle, a
process of its own, answers with the null engine inside it. No keys, no checks of a request, no permit, no placement, no
engine process, no books, no pay, and a vehicle that goes takes its requests with it. What a gateway in Python across a
message server could reach at most.

Called by: ``gateways.bare_link``, as a process of its own. Ends with SIGTERM, and its children with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import uvicorn
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg

from bench.gateways import free_port
from motorpool.agent.runtime.engine import Work
from motorpool.agent.runtime.null_answer import Quick
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.bus import die_with_parent, find_server
from motorpool.types import Kind

VEHICLES = 2
ID_BYTES = 8
JSON = (b"content-type", b"application/json")


async def vehicle(port: int, number: int) -> None:
    """Answer what comes, for ever."""
    quick = Quick(EngineSpec(backend=Backend.NULL, model="null", rate_tokens_per_s=0))
    client = await nats.connect(f"nats://127.0.0.1:{port}", max_reconnect_attempts=600, reconnect_time_wait=0.05)

    async def received(message: Msg) -> None:
        name = message.data[:ID_BYTES]
        work = Work(key="a", kind=Kind.CHAT, body=message.data[ID_BYTES:], response_id=name.hex(), created_s=1)
        done = quick.finish(work)
        assert done is not None
        await client.publish("up", name + done.body)

    await client.subscribe(f"down.{number}", cb=received)
    await client.flush()
    await client.publish("here", b"")
    await asyncio.Event().wait()


class App:
    """The gateway."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._numbers = itertools.count()
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}

    async def answered(self, message: Msg) -> None:
        """One answer of a vehicle."""
        self._waiting.pop(message.data[:ID_BYTES]).set_result(message.data[ID_BYTES:])

    async def __call__(self, _: dict[str, Any], receive: Any, send: Any) -> None:
        """One request."""
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        number = next(self._numbers)
        name = number.to_bytes(ID_BYTES, "big")
        answer = self._waiting[name] = asyncio.get_running_loop().create_future()
        await self._client.publish(f"down.{number % VEHICLES}", name + body)
        data = await answer
        headers = [JSON, (b"content-length", b"%d" % len(data))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})


async def gateway(port: int, nats_port: int) -> None:
    """Serve until told to stop."""
    client = await nats.connect(f"nats://127.0.0.1:{nats_port}", max_reconnect_attempts=600, reconnect_time_wait=0.05)
    here = asyncio.Semaphore(0)

    async def came(_: Msg) -> None:
        here.release()

    await client.subscribe("here", cb=came)
    app = App(client)
    await client.subscribe("up", cb=app.answered)
    await client.flush()
    command = [sys.executable, "-m", "bench.bare_link", "--port", "0", "--nats-port", str(nats_port), "--vehicle"]
    with children([[*command, str(number)] for number in range(VEHICLES)]):
        for _ in range(VEHICLES):
            await here.acquire()
        config = uvicorn.Config(
            app, port=port, log_level="warning", access_log=False, lifespan="off", http="httptools", loop="uvloop"
        )
        await uvicorn.Server(config).serve()
    await client.close()


@contextlib.contextmanager
def children(commands: list[list[str]]) -> Iterator[None]:
    """Run processes beside this one, and end them with it."""
    started = [
        subprocess.Popen(command, preexec_fn=die_with_parent)  # noqa: PLW1509  # there are no threads yet
        for command in commands
    ]
    try:
        yield
    finally:
        for child in started:
            child.terminate()
            child.wait()


def main() -> None:
    """One vehicle, or the gateway with all that it needs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--nats-port", type=int, default=0)
    parser.add_argument("--vehicle", type=int)
    options = parser.parse_args()
    if options.vehicle is not None:
        uvloop.run(vehicle(options.nats_port, options.vehicle))
        return
    nats_port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        config = Path(name) / "nats.conf"
        config.write_text(f"host: 127.0.0.1\nport: {nats_port}\n")
        with children([[find_server(), "-c", str(config)]]):
            uvloop.run(gateway(options.port, nats_port))


if __name__ == "__main__":
    main()
