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
from openai.types.responses import Response

from motorpool.cli import supervise
from motorpool.cli.dev import CONTROL, MESSAGES, DevCluster, DevConfig
from motorpool.core.pricing import ATTO_PER_MICRO

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
    """How far the transfers of a batch are from what its lines cost, and those of all owners from what they earned."""
    db = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    db.execute("BEGIN")  # one moment for all that follows
    row = db.execute(
        "SELECT batch_no, cost_micro, input_micro, output_micro FROM batch WHERE batch_id = ?", (batch_id,)
    ).fetchone()
    number, cost, price, output = (int(each) for each in row)
    key = "line_key >= ? AND line_key < ?"
    lines, costs, prompt, completion = db.execute(
        f"SELECT count(*), sum(cost_micro), sum(prompt_tokens), sum(completion_tokens) FROM result WHERE {key}",
        (number << 32, (number + 1) << 32),
    ).fetchone()
    charged = db.execute(
        "SELECT sum(amount_micro) FROM transfer WHERE reference = ? AND kind = 'usage'", (batch_id,)
    ).fetchone()[0]
    # All batches so far have this price, and each has ended: owners have their part of them, or are owed a rest of it.
    worked = db.execute("SELECT sum(prompt_tokens) * ? + sum(completion_tokens) * ? FROM result", (price, output))
    owed = int(worked.fetchone()[0]) * ATTO_PER_MICRO // 1_000_000 * 7 // 10
    earned = db.execute("SELECT sum(amount_micro) FROM transfer WHERE kind = 'earning'").fetchone()[0]
    rests = db.execute("SELECT coalesce(sum(atto), 0) FROM rest WHERE name LIKE 'owner:%'").fetchone()[0]
    db.close()
    assert lines == LINES
    assert cost == costs == (prompt * price + completion * output) // 1_000_000
    wrong = abs(int(earned) * ATTO_PER_MICRO + int(rests) - owed)
    return abs(int(charged) - cost) + -(-wrong // ATTO_PER_MICRO)


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


def bill_of(database: Path, response_id: str) -> dict[str, int]:
    """What was charged and earned for one response."""
    db = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    rows = db.execute("SELECT credit, amount_micro FROM transfer WHERE reference = ?", (response_id,)).fetchall()
    db.close()
    assert len({credit for credit, _ in rows}) == len(rows), "one charge, and one payment to each"
    return dict(rows)


async def answered(client: AsyncOpenAI, response_id: str) -> Response:
    """The response at its end, as ``finished``."""
    while True:
        found = await client.responses.retrieve(response_id)
        if found.status not in {"queued", "in_progress"}:
            return found
        await asyncio.sleep(0.1)


async def has_told(client: AsyncOpenAI, response_id: str, words: int) -> None:
    """So many words of a response are in the books; the control plane may be away for a while."""
    seen = 0
    async for event in await client.responses.retrieve(response_id, stream=True):
        seen += event.type == "response.output_text.delta"
        if seen >= words:
            return


@pytest.mark.crash
def test_a_background_response_is_paid_once_whatever_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RESTART_MAX_S", 0.5)

    async def test() -> None:
        config = DevConfig(data=tmp_path, vehicles=2, model="null", null_rate=20.0)
        cluster = DevCluster(config, lambda text: None)
        try:
            running = await cluster.start()
            database = Path(running.data) / "motorpool.db"
            async with AsyncOpenAI(base_url=running.base_url, api_key=running.api_key, max_retries=12) as client:
                bills = []
                for kills in ((), (CONTROL,), (CONTROL, CONTROL, DevCluster.vehicle_id(1))):
                    made = await client.responses.create(
                        model="null", input="tell me", background=True, max_output_tokens=60
                    )
                    for number, name in enumerate(kills, start=1):
                        await has_told(client, made.id, 12 * number)
                        os.kill(cluster.pids()[name], signal.SIGKILL)
                    async with asyncio.timeout(RUN_LIMIT_S):
                        found = await answered(client, made.id)
                    assert found.usage is not None
                    assert (len(found.output), len(found.output_text.split())) == (1, 60)
                    bills.append((found.usage.input_tokens, found.usage.output_tokens, bill_of(database, made.id)))
            for read, written, bill in bills:
                assert (read, written) == bills[0][:2]
                # A customer's rest is carried from one to the next: a millionth is all that they may differ by.
                exact = (read * 30_000 + written * 60_000) / 1e6
                assert abs(bill["platform"] - exact) < 1
                owners = [amount for name, amount in bill.items() if name.startswith("owner:")]
                assert abs(sum(owners) - 0.7 * exact) < len(owners) + 1
        finally:
            await cluster.stop()

    asyncio.run(test())
