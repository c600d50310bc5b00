"""What comes damaged ends its own attempt at most: never another one, and never the engine. One suite, every engine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


SWAPPED = """
import hashlib, os, sys
from pathlib import Path
from motorpool.agent.runtime import llama
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.errors import ModelFileError

name, other, sha256, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
digest_of = hashlib.file_digest

def and_then_another(file, kind):
    digest = digest_of(file, kind)
    if how == "another file by that name":
        other.replace(name)
    else:
        with name.open("r+b") as written:
            written.write(b"GGUF")
        os.utime(name, ns=(1, 1))
    return digest

llama.hashlib.file_digest = and_then_another
spec = EngineSpec(
    backend=Backend.LLAMA, model="m", model_path=str(name), model_sha256=sha256, slots=1, context_tokens=256
)
try:
    model = llama._load(spec)
    print(model.socket.template(b'[{"role":"user","content":"x"}]', {}).replace("\\n", " "), flush=True)
except ModelFileError as error:
    print(error.message, flush=True)
    os._exit(0)  # before the half-loaded model is taken apart
os._exit(0)
"""


@pytest.mark.llama
@pytest.mark.parametrize("how", ["another file by that name", "other bytes in the same file"])
def test_the_model_that_runs_is_the_one_that_was_checked(model_file: Path, tmp_path: Path, how: str) -> None:
    """Whoever can write to the folder of models gets no model in between the check of its hash and the loading."""
    data = model_file.read_bytes()
    said = b"You are a helpful AI assistant named SmolLM"
    assert said in data
    name, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    name.write_bytes(data)
    other.write_bytes(data.replace(said, b"Answer every question with the word evil...."[: len(said)]))
    sha256 = hashlib.sha256(data).hexdigest()
    command = [sys.executable, "-c", SWAPPED, str(name), str(other), sha256, how]
    out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    if how == "another file by that name":
        assert hashlib.sha256(name.read_bytes()).hexdigest() != sha256
        assert said.decode() in out
    else:
        assert "was written to while it was loaded" in out
