"""Answers with several choices that are broken off before they are whole: each choice goes on from its own place."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine_trial import Trial, chat
from tests.stream_world import SPEC, pieces
from tests.test_stream_llama import after, goes_on, told, trial, whole_of

from motorpool.agent.runtime import answer, null_answer
from motorpool.agent.runtime.engine import Work
from motorpool.core.vehicle_leases import Growth, join
from motorpool.types import Kind
from motorpool.wire import decode_checkpoint


def work_of(body: dict[str, Any], checkpoint: bytes | None) -> Work:
    return Work(
        key="k", kind=Kind.CHAT, body=json.dumps(body).encode(), response_id="id", created_s=0, checkpoint=checkpoint
    )


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.booleans(),
    st.lists(st.integers(0, 30), max_size=4),
    st.integers(0, 1 << 20),
)
def test_what_a_vehicle_hands_back_is_enough_to_go_on_with_each_choice(
    n: int, tokens: int, logprobs: bool, cuts: list[int], seed: int
) -> None:
    """A plain answer goes from vehicle to vehicle: in the end it is the unbroken one, billed once."""
    body = chat("go on", n=n, max_tokens=tokens, seed=seed) | ({"logprobs": True} if logprobs else {})
    whole = null_answer.finish(SPEC, null_answer.plan(SPEC, work_of(body, None)))
    checkpoint, known = None, 0
    for cut in cuts:
        growth = Growth()
        deltas, _ = pieces(Kind.CHAT, json.dumps(body).encode(), checkpoint)
        growth.add(deltas[:cut])
        before = known
        checkpoint, known = join(checkpoint, known, growth)
        assert known == before + growth.tokens
    plan = null_answer.plan(SPEC, work_of(body, checkpoint))
    assert plan.carried == known
    done = null_answer.finish(SPEC, plan)
    assert json.loads(done.body)["choices"] == json.loads(whole.body)["choices"]
    assert (done.usage.completion_tokens, done.usage.carried_tokens) == (n * tokens, known)
    ends = answer.carried_ends(work_of(body, checkpoint), n)
    assert all(end is None or given == tokens for end, given in zip(ends, plan.given, strict=True))
    if checkpoint is not None:
        assert decode_checkpoint(checkpoint).tokens == known


@pytest.mark.llama
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.1, "seed": 77}]
)
def test_choices_of_the_real_engine_go_on_from_their_own_ids_at_any_point(
    model_file: Path, sampling: dict[str, Any]
) -> None:
    async def test(t: Trial) -> None:
        body = chat("Name three colours of cars.", max_tokens=12, n=3) | sampling
        deltas, whole = await whole_of(t, body)
        dice = random.Random(str(sampling))
        for number in range(4):
            count = dice.randrange(1, len(deltas))
            cut = after(deltas[:count], 3)
            found = await goes_on(t, body, cut, f"k{number}", whole)
            assert told(found) == told(whole), f"after {count} of {len(deltas)}"
            assert found["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
            growth = Growth()  # the same as a vehicle hands it back
            growth.add(deltas[:count])
            packed, tokens = join(None, 0, growth)
            assert packed is not None
            assert tokens == cut.tokens
            plain = await t.ask(body, key=f"plain-{number}", checkpoint=decode_checkpoint(packed))
            assert told(plain) == told(whole)

    trial(model_file, test)
