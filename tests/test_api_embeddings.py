"""/v1/embeddings through the official client, and the engines that make them."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import math
import os
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openai
import pytest
from tests.api_cell import Item, Running, serve
from tests.engine_trial import Trial, work

from motorpool.agent.runtime import Backend, EngineSpec, build_engine
from motorpool.agent.runtime.engine import Cancelled
from motorpool.agent.runtime.llama_embed import GROUP_BYTES, groups
from motorpool.catalogue import Catalogue, Model, models_dir, verify
from motorpool.core.attribution import Footprint
from motorpool.errors import CallerError, CapacityError
from motorpool.server.cell import LiveAnswer, LiveRequest
from motorpool.server.openai import embeddings
from motorpool.server.openai.embeddings import EmbeddingRequest, check_line_size, divide
from motorpool.types import Kind

VECTORS = Path(__file__).parent / "data/minilm_vectors.json"
MODELS = Catalogue(
    [
        Model("null", dimensions=384, min_dimensions=16),
        Model("fixed", dimensions=384),
        Model("talker"),
    ]
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with serve(tmp_path) as running:
        running.cell.catalogue = MODELS
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def post(server: Running, **body: Any) -> Any:
    head = {"authorization": f"Bearer {server.key}"}
    return server.http.post("/v1/embeddings", json={"model": "null", **body}, headers=head)


def refused(server: Running, **body: Any) -> tuple[int, str, str | None]:
    response = post(server, **body)
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


# -- the route ---------------------------------------------------------------------------------------------------------


def test_the_default_client_gets_vectors_of_length_one(client: openai.OpenAI, server: Running) -> None:
    found = client.embeddings.create(model="null", input="one two three")
    assert json.loads(server.cell.asked[-1].body)["encoding_format"] == "base64"  # what the client asks for by itself
    (only,) = found.data
    assert (found.object, only.object, only.index, found.model) == ("list", "embedding", 0, "null")
    assert len(only.embedding) == 384
    assert math.isclose(sum(x * x for x in only.embedding), 1, rel_tol=1e-5)
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (3, 3)


def test_both_formats_hold_the_same_numbers(server: Running) -> None:
    spelt = post(server, input="word").json()["data"][0]["embedding"]
    packed = base64.b64decode(post(server, input="word", encoding_format="base64").json()["data"][0]["embedding"])
    assert struct.pack("<384f", *spelt) == packed
    assert post(server, input="word", encoding_format="float").json()["data"][0]["embedding"] == spelt


@pytest.mark.parametrize(
    ("given", "count", "tokens"),
    [
        (["a b", "c"], 2, 3),
        ([5, 6, 7], 1, 3),
        ([[5, 6], [7], [8]], 3, 4),
    ],
)
def test_every_form_of_input(client: openai.OpenAI, given: Any, count: int, tokens: int) -> None:
    found = client.embeddings.create(model="null", input=given)
    assert [item.index for item in found.data] == list(range(count))
    assert found.usage.prompt_tokens == tokens


def test_an_input_has_one_vector_whatever_stands_beside_it(client: openai.OpenAI) -> None:
    alone = client.embeddings.create(model="null", input="b").data[0].embedding
    among = client.embeddings.create(model="null", input=["a", "b", "c"]).data[1].embedding
    assert alone == among


def test_shorter_vectors_where_the_model_has_them(client: openai.OpenAI, server: Running) -> None:
    whole = np.array(client.embeddings.create(model="null", input="x").data[0].embedding)
    short = np.array(client.embeddings.create(model="null", input="x", dimensions=32).data[0].embedding)
    assert np.allclose(short, whole[:32] / np.linalg.norm(whole[:32]), atol=1e-6)
    assert len(client.embeddings.create(model="fixed", input="x", dimensions=384).data[0].embedding) == 384
    assert refused(server, model="fixed", input="x", dimensions=32) == (400, "unsupported_parameter", "dimensions")
    assert refused(server, input="x", dimensions=8) == (400, "invalid_value", "dimensions")
    assert refused(server, input="x", dimensions=385) == (400, "invalid_value", "dimensions")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (400, "missing_required_parameter", "input")),
        ({"input": ""}, (400, "invalid_value", "input")),
        ({"input": []}, (400, "invalid_value", "input")),
        ({"input": ["a", ""]}, (400, "invalid_value", "input")),
        ({"input": [[]]}, (400, "invalid_value", "input")),
        ({"input": ["a", 5]}, (400, "invalid_type", "input")),
        ({"input": [-1]}, (400, "invalid_value", "input")),
        ({"input": 5}, (400, "invalid_type", "input")),
        ({"input": ["a"] * 2049}, (400, "invalid_value", "input")),
        ({"input": "a", "encoding_format": "hex"}, (400, "invalid_value", "encoding_format")),
        ({"input": "a", "dimensions": 0}, (400, "invalid_value", "dimensions")),
        ({"input": "a", "model": "talker"}, (400, "unsupported_model", "model")),
        ({"input": "a", "model": "nobody"}, (404, "model_not_found", "model")),
        ({"input": "word " * 3000}, (400, "context_length_exceeded", "input")),
    ],
)
def test_what_cannot_be_embedded_is_named(
    server: Running, body: dict[str, Any], expected: tuple[int, str, str | None]
) -> None:
    assert refused(server, **body) == expected


def test_many_inputs_go_out_in_parts_and_come_back_as_one(client: openai.OpenAI, server: Running) -> None:
    texts = [f"text {n}" for n in range(2048)]
    found = client.embeddings.create(model="null", input=texts)
    assert len(server.cell.asked) == 8
    assert all(len(request.body) < 100_000 for request in server.cell.asked)
    assert [item.index for item in found.data] == list(range(2048))
    assert found.usage.prompt_tokens == 2 * 2048
    for n in (0, 255, 256, 2047):
        assert found.data[n].embedding == client.embeddings.create(model="null", input=texts[n]).data[0].embedding


def test_the_place_of_a_bad_input_is_the_customers(server: Running) -> None:
    texts = ["short"] * 300 + ["word " * 3000]
    response = post(server, input=texts)
    assert response.status_code == 400
    assert "input[300]" in response.json()["error"]["message"]


def test_parts_wait_for_room(client: openai.OpenAI, server: Running) -> None:
    """A fleet with room for two at a time serves a request of eight parts all the same."""
    real = server.cell._live
    running, most = 0, 0

    async def script(request: LiveRequest) -> AsyncIterator[Item]:
        nonlocal running, most
        if running >= 2:
            raise CapacityError("every vehicle is busy", code="server_is_overloaded")
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(0)
            async for item in real(request):
                yield item
        finally:
            running -= 1

    server.cell.script = script
    found = client.embeddings.create(model="null", input=[f"t{n}" for n in range(2048)])
    assert [item.index for item in found.data] == list(range(2048))
    assert most == 2


def test_no_room_at_all_is_said(server: Running) -> None:
    server.cell.capacity = False
    for texts in (["a"], ["a"] * 1000):
        response = post(server, input=texts)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_vehicle_available")
        assert response.headers["retry-after-ms"] == "1500"


def test_the_energy_of_all_parts_is_added_up(server: Running) -> None:
    real = server.cell._live

    async def script(request: LiveRequest) -> AsyncIterator[Item]:
        async for item in real(request):
            assert isinstance(item, LiveAnswer)
            footprint = Footprint(energy_uwh=1_000_000, co2_ug=2_000_000, is_measured=True)
            yield LiveAnswer(status=item.status, body=item.body, footprint=footprint)

    server.cell.script = script
    usage = post(server, input=["a"] * 600).json()["usage"]
    assert usage["motorpool"] == {"energy_wh": 3.0, "co2_g": 6.0, "measured": True}


def test_a_part_that_makes_no_sense_is_an_error_of_ours(server: Running) -> None:
    async def script(request: LiveRequest) -> AsyncIterator[Item]:
        yield LiveAnswer(status=200, body=b'{"data":[],"usage":{"prompt_tokens":1}}')

    server.cell.script = script
    assert refused(server, input=["a"] * 600)[:2] == (502, "engine_error")


def test_parts_are_small_enough_to_ask_for_and_to_answer() -> None:
    texts: list[str | list[int]] = ["x" * 1000] * 500
    parts = divide(texts, 2112)
    assert [text for part in parts for text in part] == texts
    assert max(sum(map(len, part)) for part in parts) <= embeddings.PART_BYTES
    assert max(map(len, divide(["x"] * 2048, 65_000))) == embeddings.PART_ANSWER_BYTES // 65_000
    assert divide(["x" * 1_000_000], 2112) == [["x" * 1_000_000]]


def test_a_line_whose_answer_would_be_too_large_says_how_many_inputs_fit() -> None:
    model = MODELS.get("fixed")
    check_line_size(EmbeddingRequest(model="fixed", input=["a"] * 600), model)
    with pytest.raises(CallerError, match="at most 675 inputs a line") as caught:
        check_line_size(EmbeddingRequest(model="fixed", input=["a"] * 700), model)
    assert caught.value.param == "body.input"
    check_line_size(EmbeddingRequest(model="fixed", input=["a"] * 1900, encoding_format="base64"), model)


# -- the engines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The converted model; ``motorpool models pull all-minilm-l6-v2`` fetches it."""
    return verify(Catalogue.builtin().get("all-minilm-l6-v2"), models_dir(os.environ))


def minilm_spec(path: Path, **fields: Any) -> EngineSpec:
    given: dict[str, Any] = {"slots": 2, "context_tokens": 512, "idle_priority": False} | fields
    return EngineSpec(backend=Backend.LLAMA, model="all-minilm-l6-v2", model_path=str(path), **given)


def run(spec: EngineSpec, test: Any) -> None:
    async def trial() -> None:
        t = Trial(build_engine(spec))
        await t.start()
        try:
            await test(t)
        finally:
            await t.engine.close()

    asyncio.run(trial())


def unpacked(item: dict[str, Any]) -> npt.NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(item["embedding"]), "<f4")


@pytest.mark.llama
def test_the_real_model_says_what_its_original_weights_say(minilm: Path) -> None:
    """tests/bert_reference.py made the vectors from the makers' files, in numpy."""
    expected = json.loads(VECTORS.read_text("utf-8"))

    async def test(t: Trial) -> None:
        for key, field in (("text", "text"), ("ids", "tokens")):
            body = {"model": "m", "input": [one[field] for one in expected], "encoding_format": "base64"}
            answer = await t.ask(body, key=key, kind=Kind.EMBEDDING)
            for one, item in zip(expected, answer["data"], strict=True):
                vector = unpacked(item)
                assert abs(float(vector @ vector) - 1) < 1e-5
                cosine = float(vector @ np.frombuffer(base64.b64decode(one["vector"]), "<f4"))
                assert cosine >= 0.9999, one["text"][:40]
            assert answer["usage"]["prompt_tokens"] == sum(len(one["tokens"]) for one in expected)
        bare = await t.ask(
            {"model": "m", "input": expected[0]["tokens"][1:-1], "encoding_format": "base64"},
            key="bare",
            kind=Kind.EMBEDDING,
        )
        assert float(unpacked(bare["data"][0]) @ np.frombuffer(base64.b64decode(expected[0]["vector"]), "<f4")) > 0.9999

    run(minilm_spec(minilm), test)


@pytest.mark.llama
def test_the_real_model_names_what_it_cannot_do(minilm: Path) -> None:
    async def test(t: Trial) -> None:
        async def error(key: str, body: dict[str, Any], kind: Kind = Kind.EMBEDDING) -> tuple[str, str]:
            found = (await t.ask({"model": "m", **body}, key=key, kind=kind))["error"]
            return found["code"], found["message"]

        code, message = await error("long", {"input": ["short", "word " * 600]})
        assert (code, "input[1]" in message, "602" in message) == ("context_length_exceeded", True, True)
        assert (await error("ids", {"input": [999_999]}))[0] == "invalid_value"
        assert (await error("chat", {"messages": [{"role": "user", "content": "x"}]}, Kind.CHAT))[
            0
        ] == "unsupported_model"
        assert (await t.ask({"model": "m", "input": "still here"}, key="after", kind=Kind.EMBEDDING))[
            "object"
        ] == "list"

    run(minilm_spec(minilm), test)


@pytest.mark.llama
def test_the_real_model_can_be_stopped(minilm: Path) -> None:
    async def test(t: Trial) -> None:
        t.engine.submit([work({"model": "m", "input": ["word " * 400] * 200}, key="long", kind=Kind.EMBEDDING)])
        t.engine.cancel(["long"])
        await t.until(lambda: "long" in t.ended)
        assert isinstance(t.ended["long"], Cancelled)
        assert (await t.ask({"model": "m", "input": "next"}, key="next", kind=Kind.EMBEDDING))["object"] == "list"

    run(minilm_spec(minilm), test)


@pytest.mark.llama
def test_a_model_of_text_makes_no_embeddings(model_file: Path) -> None:
    async def test(t: Trial) -> None:
        found = await t.ask({"model": "m", "input": "x"}, kind=Kind.EMBEDDING)
        assert found["error"]["code"] == "unsupported_model"

    run(EngineSpec(backend=Backend.LLAMA, model="smol", model_path=str(model_file), idle_priority=False), test)


def test_the_null_engine_at_a_rate_embeds_at_once() -> None:
    async def test(t: Trial) -> None:
        first = await t.ask({"model": "m", "input": ["a", "b c"]}, key="a", kind=Kind.EMBEDDING)
        again = await t.ask({"model": "m", "input": ["a", "b c"]}, key="b", kind=Kind.EMBEDDING)
        assert first == again
        assert first["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        assert first["data"][0]["embedding"] != first["data"][1]["embedding"]

    run(EngineSpec(backend=Backend.NULL, model="null", rate_tokens_per_s=5.0, hosted=False), test)


def test_groups_keep_order_and_bounds() -> None:
    inputs: list[str | list[int]] = ["x" * 1000, "y" * 1500, "z" * 9000, [1] * 100, "w"]
    found = groups(inputs, 4)
    assert [one for group in found for one in group] == inputs
    assert [len(group) for group in found] == [1, 1, 1, 2]
    assert [len(group) for group in groups(["a"] * 9, 4)] == [4, 4, 1]
    assert GROUP_BYTES >= 1000


# -- any other server as the engine ------------------------------------------------------------------------------------


@pytest.fixture
def null_server() -> Iterator[str]:
    command = [sys.executable, "-m", "motorpool.agent.runtime.null_server", "--context", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["base_url"]
        finally:
            process.kill()


def remote_spec(url: str) -> EngineSpec:
    return EngineSpec(backend=Backend.REMOTE, model="ours", remote_model="null", url=url, idle_priority=False)


def test_embeddings_of_a_remote_server_come_through_in_both_formats(null_server: str) -> None:
    async def test(t: Trial) -> None:
        spelt = await t.ask({"model": "m", "input": ["a b", "c"]}, key="f", kind=Kind.EMBEDDING)
        packed = await t.ask(
            {"model": "m", "input": ["a b", "c"], "encoding_format": "base64", "dimensions": 8},
            key="b",
            kind=Kind.EMBEDDING,
        )
        assert (spelt["model"], spelt["usage"]) == ("ours", {"prompt_tokens": 3, "total_tokens": 3})
        whole = np.array(spelt["data"][0]["embedding"][:8], dtype="<f4")
        assert np.allclose(unpacked(packed["data"][0]), whole / np.linalg.norm(whole), atol=1e-6)
        long = await t.ask({"model": "m", "input": "word " * 200}, key="l", kind=Kind.EMBEDDING)
        assert long["error"]["code"] == "context_length_exceeded"

    run(remote_spec(null_server), test)


@pytest.mark.parametrize(
    "answer",
    [
        b'{"data":[]}',
        b'{"data":[{"index":0,"embedding":"AAAA"}]}',
        b'{"data":[{"index":5,"embedding":[0.5]}]}',
        b'{"data":[{"index":0,"embedding":[1e999]}]}',
        b"<html>",
        b"",
    ],
)
def test_what_a_remote_server_gets_wrong_is_our_error(answer: bytes) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the library's name
            self._say(b"{}")

        def do_POST(self) -> None:  # the library's name
            self.rfile.read(int(self.headers["content-length"]))
            self._say(answer)

        def _say(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the library's name
            """Say nothing."""

    async def test(t: Trial) -> None:
        found = await t.ask({"model": "m", "input": "a"}, kind=Kind.EMBEDDING)
        assert found["error"]["code"] == "engine_error"

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            run(remote_spec(f"http://127.0.0.1:{server.server_address[1]}/v1"), test)
        finally:
            server.shutdown()
            thread.join()
