"""Kills every kind of process at random moments of a batch and counts what was lost, doubled or paid twice.

One cluster runs all seeds, so that later batches meet what earlier crashes left behind. The answers are compared with
those of the first, unbroken batch: an answer continued after a crash must be the same to the last byte.
``MOTORPOOL_CRASH_RUNS=200 make crash`` runs more seeds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import msgspec
import psutil
import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from motorpool.cli import supervise
from motorpool.cli.dev import CONTROL, MESSAGES, DevCluster, DevConfig

RUNS = int(os.environ.get("MOTORPOOL_CRASH_RUNS", "32"))
LINES = 160
TOKENS = 24
VEHICLES = 3
RATE = 200.0  # tokens a second of a slot: a batch takes about two seconds unbroken
RUN_LIMIT_S = 120
VICTIMS = ("control plane", "agent", "engine", "message server")


class Outcome(msgspec.Struct, kw_only=True):
    """What one run came to."""

    seed: int
    victims: list[str]
    lost: int
    doubled: int
    changed: int
    paid_twice_micro: int
    took_s: float


def input_file(seed: int) -> bytes:
    lines = []
    for number in range(LINES):
        body = {
            "model": "null",
            "max_completion_tokens": TOKENS,
            "messages": [{"role": "user", "content": f"n {number}"}],
        }
        line = {"custom_id": f"{seed}-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line).encode() + b"\n")
    return b"".join(lines)


def victim(cluster: DevCluster, kind: str, chance: random.Random) -> int | None:
    """The process to kill, None if it is dead already."""
    pids = cluster.pids()
    if kind == "control plane":
        return pids.get(CONTROL)
    if kind == "message server":
        return pids.get(MESSAGES)
    agent = pids.get(DevCluster.vehicle_id(chance.randint(1, VEHICLES)))
    if agent is None or kind == "agent":
        return agent
    try:
        children = psutil.Process(agent).children()
    except psutil.NoSuchProcess:
        return None
    return children[0].pid if children else None


async def finished(client: AsyncOpenAI, batch_id: str) -> Batch:
    """The batch at its end; the control plane may be away for a while."""
    while True:
        batch = await client.batches.retrieve(batch_id)
        if batch.status in {"completed", "failed", "expired", "cancelled"}:
            return batch
        await asyncio.sleep(0.1)  # there is nothing to wait on: this is the API's own way to follow a batch


async def kill_some(cluster: DevCluster, kinds: list[str], chance: random.Random) -> None:
    for kind in kinds:
        await asyncio.sleep(chance.uniform(0, 1.2))  # the random moment
        pid = victim(cluster, kind, chance)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


async def one_run(cluster: DevCluster, client: AsyncOpenAI, seed: int, expected: dict[int, str]) -> Outcome:
    chance = random.Random(seed)
    kinds = [] if seed == 0 else [VICTIMS[seed % len(VICTIMS)], *chance.sample(VICTIMS, chance.randint(0, 2))]
    began = asyncio.get_running_loop().time()
    file = await client.files.create(file=("in.jsonl", input_file(seed)), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    killing = asyncio.create_task(kill_some(cluster, kinds, chance))
    async with asyncio.timeout(RUN_LIMIT_S):
        batch = await finished(client, batch.id)
        await killing
    assert batch.status == "completed"
    assert batch.output_file_id is not None
    content = (await client.files.content(batch.output_file_id)).content
    rows = [json.loads(line) for line in content.splitlines()]
    counted = Counter(int(row["custom_id"].split("-")[1]) for row in rows)
    answers = {
        int(row["custom_id"].split("-")[1]): row["response"]["body"]["choices"][0]["message"]["content"] for row in rows
    }
    if seed == 0:
        expected.update(answers)
    return Outcome(
        seed=seed,
        victims=kinds,
        lost=LINES - len(counted),
        doubled=sum(counted.values()) - len(counted),
        changed=sum(answers[number] != expected[number] for number in answers),
        paid_twice_micro=overpaid_micro(Path(cluster.running.data) / "motorpool.db", batch.id),
        took_s=round(asyncio.get_running_loop().time() - began, 1),
    )


def overpaid_micro(database: Path, batch_id: str) -> int:
    """How far the transfers of a batch are from what its lines cost and earn."""
    db = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    row = db.execute("SELECT batch_no, cost_micro FROM batch WHERE batch_id = ?", (batch_id,)).fetchone()
    number, cost = int(row[0]), int(row[1])
    low, high = number << 32, (number + 1) << 32
    costs = [
        int(each[0])
        for each in db.execute("SELECT cost_micro FROM result WHERE line_key >= ? AND line_key < ?", (low, high))
    ]
    moved = dict(
        db.execute("SELECT kind, sum(amount_micro) FROM transfer WHERE reference = ? GROUP BY kind", (batch_id,))
    )
    db.close()
    assert len(costs) == LINES
    assert cost == sum(costs)
    return abs(int(moved["usage"]) - cost) + abs(int(moved["earning"]) - sum(each * 7000 // 10_000 for each in costs))


@pytest.mark.crash
def test_no_line_is_lost_doubled_or_paid_twice_whatever_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervise, "RESTART_MAX_S", 0.5)  # killing is our doing: no need to wait longer each time

    async def test() -> list[Outcome]:
        config = DevConfig(data=tmp_path, vehicles=VEHICLES, model="null", null_rate=RATE)
        cluster = DevCluster(config, lambda text: None)
        try:
            running = await cluster.start()
            expected: dict[int, str] = {}
            async with AsyncOpenAI(base_url=running.base_url, api_key=running.api_key, max_retries=12) as client:
                return [await one_run(cluster, client, seed, expected) for seed in range(RUNS + 1)]
        finally:
            await cluster.stop()

    outcomes = asyncio.run(test())
    with capsys.disabled():
        killed = Counter(kind for outcome in outcomes for kind in outcome.victims)
        sys.stdout.write(
            f"\n{len(outcomes) - 1} seeded runs of {LINES} lines; killed: "
            + ", ".join(f"{kind} {count}" for kind, count in sorted(killed.items()))
            + f"; lost {sum(o.lost for o in outcomes)}, doubled {sum(o.doubled for o in outcomes)}, "
            f"changed {sum(o.changed for o in outcomes)}, paid twice {sum(o.paid_twice_micro for o in outcomes)}; "
            f"slowest {max(o.took_s for o in outcomes)} s\n"
        )
    bad = [
        outcome
        for outcome in outcomes
        if outcome.lost or outcome.doubled or outcome.changed or outcome.paid_twice_micro
    ]
    assert not bad
