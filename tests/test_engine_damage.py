"""What comes damaged ends its own attempt at most: never another one, and never the engine. One suite, every engine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
from tests.engine_trial import Trial, chat, work

from motorpool.agent.runtime import Backend, EngineSpec, build_engine
from motorpool.agent.runtime.engine import Finished, Work
from motorpool.wire import Checkpoint, encode_checkpoint

DEPTH = 100_000
DEEP = b'{"messages":[{"role":"user","content":"x"}],"response_format":' + b'{"a":' * DEPTH + b"1" + b"}" * DEPTH + b"}"
USELESS_BODIES = {
    "empty": b"",
    "not JSON": b"{nope",
    "not UTF-8": b'{"messages":[{"role":"user","content":"\xff\xfe"}]}',
    "no object": b"[]",
    "messages that are none": b'{"messages":[1]}',
    "nested without end": DEEP,
}
USELESS_CHECKPOINTS = {
    "no checkpoint at all": b"garbage",
    "empty": b"",
    "logprobs that are no JSON": encode_checkpoint(Checkpoint(text="abc", tokens=2, token_ids=[1, 2], logprobs=b"[{")),
    "fewer tokens than none": encode_checkpoint(Checkpoint(text="abc", tokens=-2)),
    "no tokens": encode_checkpoint(Checkpoint(text="", tokens=0)),
}
FOREIGN_CHECKPOINTS = {
    "ids beyond the vocabulary": Checkpoint(text="abc", tokens=2, token_ids=[49_152, 10**9]),
    "ids beyond 64 bits of another engine": Checkpoint(text="abc", tokens=2, token_ids=[2**62, 5]),
    "ids of other text": Checkpoint(text="abc", tokens=2, token_ids=[5, 6]),
    "fewer ids than tokens": Checkpoint(text="abc", tokens=3, token_ids=[5]),
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-m", "motorpool.agent.runtime.null_server"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["base_url"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(params=["null", "null at a rate", "remote", pytest.param("llama", marks=pytest.mark.llama)])
def spec(request: pytest.FixtureRequest) -> EngineSpec:
    if request.param == "llama":
        path = str(request.getfixturevalue("model_file"))
        return EngineSpec(
            backend=Backend.LLAMA, model="m", model_path=path, slots=2, context_tokens=512, idle_priority=False
        )
    if request.param == "remote":
        url = request.getfixturevalue("server")
        return EngineSpec(backend=Backend.REMOTE, model="m", remote_model="null", url=url, slots=2)
    rate = 0.0 if request.param == "null" else 500.0
    return EngineSpec(backend=Backend.NULL, model="m", slots=2, rate_tokens_per_s=rate, hosted=False)


def carried(name: str, checkpoint: bytes) -> Work:
    return msgspec.structs.replace(work(chat("hi", max_tokens=4, temperature=0), key=name), checkpoint=checkpoint)


def test_damage_stays_where_it_is(spec: EngineSpec) -> None:
    async def run() -> None:
        t = Trial(build_engine(spec))
        await t.start()
        bodies = [
            msgspec.structs.replace(work(chat("x"), key=name), body=body) for name, body in USELESS_BODIES.items()
        ]
        for done in await t.run(*bodies):
            assert done.status == 400, (done.key, done.body[:200])
            assert set(json.loads(done.body)["error"]) == {"message", "type", "param", "code"}
        whole = await t.ask(chat("hi", max_tokens=4, temperature=0), key="whole")
        damaged = [carried(name, data) for name, data in USELESS_CHECKPOINTS.items()]
        for done in await t.run(*damaged):  # the answer begins anew, and is the whole one
            assert done.status == 200, (done.key, done.body[:200])
            answer = json.loads(done.body)
            assert done.usage.carried_tokens == 0, done.key
            assert answer["choices"] == whole["choices"], done.key
        foreign = [carried(name, encode_checkpoint(one)) for name, one in FOREIGN_CHECKPOINTS.items()]
        for done in await t.run(*foreign):
            assert done.status == 200, (done.key, done.body[:200])
        again = await t.ask(chat("hi", max_tokens=4, temperature=0), key="again")
        assert again["choices"] == whole["choices"]
        await t.engine.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "part",
    [
        {"type": "string", "minLength": 10**12},
        {"type": "string", "minLength": "many"},
        {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
        {"type": "integer", "minimum": "low"},
    ],
)
@pytest.mark.parametrize("rate", [0.0, 500.0])
def test_a_schema_that_no_memory_holds_ends_its_own_request_alone(part: dict[str, object], rate: float) -> None:
    async def run() -> None:
        spec = EngineSpec(backend=Backend.NULL, model="m", rate_tokens_per_s=rate, hosted=False)
        t = Trial(build_engine(spec))
        await t.start()
        shaped = chat("x", response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": part}})
        done = await t.run(work(shaped, key="bad"), work(chat("x", max_tokens=2), key="good"))
        assert [(one.key, one.status >= 400) for one in done] == [("bad", True), ("good", False)]
        assert all(isinstance(one, Finished) for one in done)
        await t.engine.close()

    asyncio.run(run())
