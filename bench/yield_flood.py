"""Floods one vehicle at a time with messages of its cell: grants that are not for it, revocations, and garbage.

A process of its own, so that it does not disturb who measures. A line on standard input names the vehicle; an empty one
rests. It connects as the cell, since nobody else may send to a vehicle. Called by: ``bench.yield_car``.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path

from motorpool import wire
from motorpool.bus import open_client
from motorpool.trust.credentials import load_credentials, load_identity
from motorpool.types import Kind

SEED = 20_260
LINES_A_GRANT = 200
LEASES = 8  # which come again and again: a grant that is known by then is read and dropped
GARBAGE_BYTES = (1, 10, 100, 1_000) * 6  # small ones cost their reader most
BURST = 256  # messages until the server is asked whether it has them


def messages() -> list[bytes]:
    """What is sent in turns."""
    draw = random.Random(SEED)
    body = json.dumps({"messages": [{"role": "user", "content": "word " * 50}]}).encode()
    items = [wire.Item(line=number, body=body) for number in range(LINES_A_GRANT)]
    made = []
    for number in range(LEASES):
        grant = wire.Grant(
            lease_id=f"flood-{number}",
            incarnation="of-somebody-else",
            job_id="flood",
            kind=Kind.CHAT,
            model="flood",
            ttl_ms=60_000,
            items=items,
        )
        made += [wire.encode(grant), draw.randbytes(60_000)]
        made += [wire.encode(wire.Revoke(lease_id=f"none-{number}")), wire.encode(wire.Sync())]
        made += [draw.randbytes(size) for size in GARBAGE_BYTES]
    return made


async def main(identity_path: Path, credentials_path: Path) -> None:
    """Send until the input ends."""
    cell = load_identity(identity_path, time.time_ns() // 1_000_000_000)
    urls = load_credentials(credentials_path).urls
    client = await open_client(
        urls, name="flood", jwt=cell.cell_jwt(), seed=cell.user_seed, inbox=cell.inbox, on_link=lambda _: None
    )
    target = ""
    changed = asyncio.Event()

    def told() -> None:
        nonlocal target
        line = sys.stdin.readline()
        target = line.strip() if line else "."
        changed.set()

    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), told)
    print("ready", flush=True)
    sent = messages()
    while target != ".":
        if not target:
            changed.clear()
            await changed.wait()
            continue
        subject = wire.down_subject(target)
        for number in range(BURST):
            await client.publish(subject, sent[number % len(sent)])
        await client.flush(10)
        await asyncio.sleep(0)
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
