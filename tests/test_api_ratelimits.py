"""Limits of a key: buckets that fill, headers that OpenAI's clients read, and bills that correct the guess."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tests.api_cell import MODEL, Item, LocalCell, Running, serve, until

from motorpool.catalogue import Catalogue, Model
from motorpool.cli.keys import keys
from motorpool.errors import NotFoundError, RateLimitError
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens
from motorpool.server.openai.ratelimits import MINUTE_MS, Bucket, Meter, RateLimits, duration, most_tokens
from motorpool.server.openai.settings import ApiSettings
from motorpool.store.database import Database
from motorpool.store.keylimits import KeyLimit, set_limit
from motorpool.types import Kind, Usage
from motorpool.wire import Delta

HELLO: Any = [{"role": "user", "content": "hello there"}]
CHAT = {"model": MODEL, "messages": HELLO, "max_tokens": 8}


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


def meter(clock: Clock, requests: int | None = None, tokens: int | None = None) -> Meter:
    return Meter(KeyLimit(key_id="k", requests_a_minute=requests, tokens_a_minute=tokens), clock)


def shown(found: Meter) -> dict[str, str]:
    return {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in found.headers()}


# -- buckets -----------------------------------------------------------------------------------------------------------


def test_a_minutes_worth_at_once_and_then_as_they_fill() -> None:
    clock = Clock()
    three = meter(clock, requests=3)
    for _ in range(3):
        three.count_request()
    with pytest.raises(RateLimitError) as caught:
        three.count_request()
    assert (caught.value.code, caught.value.retry_after_ms) == ("rate_limit_exceeded", 20_000)
    clock.now_ms += 19_999
    with pytest.raises(RateLimitError):
        three.count_request()
    clock.now_ms += 1
    three.count_request()
    assert shown(three) == {"limit-requests": "3", "remaining-requests": "0", "reset-requests": "1m0s"}


def test_tokens_are_set_aside_and_settled() -> None:
    clock = Clock()
    found = meter(clock, requests=10, tokens=1000)
    found.count_request()
    reserved = found.reserve(600)
    assert shown(found)["remaining-tokens"] == "400"
    found.count_request()
    with pytest.raises(RateLimitError) as caught:
        found.reserve(500)
    assert caught.value.retry_after_ms == 6000
    assert shown(found)["remaining-requests"] == "9"  # the one that was refused does not count
    found.settle(reserved, 100)
    assert shown(found)["remaining-tokens"] == "900"


def test_what_was_used_beyond_the_guess_is_owed() -> None:
    clock = Clock()
    found = meter(clock, tokens=100)
    found.settle(found.reserve(10), 150)
    assert shown(found) == {"limit-tokens": "100", "remaining-tokens": "0", "reset-tokens": "1m30s"}
    clock.now_ms += 30_000
    with pytest.raises(RateLimitError):
        found.reserve(1)


def test_a_request_larger_than_a_minutes_worth_runs_when_nothing_else_did() -> None:
    clock = Clock()
    found = meter(clock, tokens=100)
    assert found.reserve(5000) == 100
    with pytest.raises(RateLimitError):
        found.reserve(5000)
    clock.now_ms += MINUTE_MS
    assert found.reserve(5000) == 100


def test_a_new_limit_keeps_what_was_used() -> None:
    clock = Clock()
    found = meter(clock, requests=10)
    for _ in range(4):
        found.count_request()
    found.take_limit(KeyLimit(key_id="k", requests_a_minute=5, tokens_a_minute=7))
    assert shown(found)["remaining-requests"] == "1"
    assert shown(found)["remaining-tokens"] == "7"
    found.take_limit(KeyLimit(key_id="k"))
    assert found.headers() == []


@given(
    limit=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.integers(0, 90_000), st.integers(1, 5000)), max_size=60),
)
def test_never_more_than_two_minutes_worth_in_any_minute(limit: int, steps: list[tuple[int, int]]) -> None:
    """A full bucket and what flows in meanwhile: that bounds every window of a minute."""
    bucket = Bucket(limit, 0)
    now_ms = 0
    taken: list[tuple[int, int]] = []
    for wait_ms, amount in steps:
        now_ms += wait_ms
        bucket.fill(now_ms)
        if bucket.wait_ms(amount) == 0:
            bucket.level -= amount
            taken.append((now_ms, amount))
    for start, _ in taken:
        assert sum(amount for at, amount in taken if start <= at < start + MINUTE_MS) <= 2 * limit + 1e-6


@given(limit=st.integers(1, 10**6), amount=st.integers(1, 10**6), spent=st.integers(0, 10**6))
def test_waiting_as_long_as_said_is_enough(limit: int, amount: int, spent: int) -> None:
    bucket = Bucket(limit, 0)
    amount = min(amount, limit)
    bucket.level -= min(spent, limit)
    wait_ms = bucket.wait_ms(amount)
    bucket.fill(wait_ms)
    assert bucket.level >= amount - 1e-6


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0ms"),
        (120, "120ms"),
        (1000, "1s"),
        (7660, "7.66s"),
        (59_999, "59.999s"),
        (360_000, "6m0s"),
        (61_500, "1m1.5s"),
    ],
)
def test_durations_are_written_as_openai_does(ms: int, text: str) -> None:
    assert duration(ms) == text


def test_the_guess_counts_prompt_and_limit() -> None:
    def guess(body: bytes, choices: int = 1) -> int:
        return most_tokens(
            LiveRequest(
                request_id="r", response_id="r", account="a", kind=Kind.CHAT, model="m", stream=False, choices=choices,
                body=body, created_s=0,
            )
        )  # fmt: skip

    assert guess(b'{"max_tokens":50}   ', 2) == 6 + 100
    assert guess(b'{"max_completion_tokens":7,"max_tokens":50}') == 11 + 7
    assert guess(b"{}") == 1
    assert guess(b"[broken") == 2


def test_meters_that_are_full_again_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motorpool.server.openai.ratelimits.MAX_METERS", 3)
    with serve(tmp_path) as running:
        writer, clock = running.cell.database.writer, Clock()
        limits = RateLimits(lambda: writer, clock, 5000)
        heads = [f"Bearer {running.new_key('a')}".encode() for _ in range(4)]
        for (key_id,) in writer.execute("SELECT key_id FROM api_key").fetchall():
            set_limit(writer, KeyLimit(key_id=key_id, requests_a_minute=2))
        first = limits.meter(heads[0])
        assert first is not None
        first.count_request()
        for head in heads[1:]:
            assert limits.meter(head) is not None
        assert limits.meter(heads[0]) is first  # it had something to remember


# -- the API -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """The API at a time that passes only when a test says so: buckets do not fill by themselves."""
    monkeypatch.setattr(LocalCell, "now_ms", lambda cell: 1_800_000_000_000 + cell.ahead_ms)
    with serve(tmp_path, settings=ApiSettings(key_ttl_ms=0)) as running:
        running.cell.catalogue = Catalogue([Model(MODEL, dimensions=384)])
        yield running


def limit(server: Running, requests: int | None = None, tokens: int | None = None) -> None:
    writer = server.cell.database.writer
    (key_id,) = writer.execute("SELECT key_id FROM api_key").fetchone()
    set_limit(writer, KeyLimit(key_id=key_id, requests_a_minute=requests, tokens_a_minute=tokens))


def post(server: Running, path: str = "/v1/chat/completions", **body: Any) -> Any:
    head = {"authorization": f"Bearer {server.key}"}
    return server.http.post(path, json=CHAT | body if "chat" in path else body, headers=head)


def test_without_a_limit_nothing_is_said(server: Running) -> None:
    assert [name for name in post(server).headers if name.startswith("x-ratelimit")] == []


def test_every_answer_of_a_model_says_how_much_is_left(server: Running) -> None:
    limit(server, requests=60, tokens=10_000)
    first = post(server)
    assert first.headers["x-ratelimit-limit-requests"] == "60"
    assert first.headers["x-ratelimit-remaining-requests"] == "59"
    assert first.headers["x-ratelimit-reset-requests"] == "1s"
    assert first.headers["x-ratelimit-limit-tokens"] == "10000"
    used = 10_000 - int(first.headers["x-ratelimit-remaining-tokens"])
    assert used == first.json()["usage"]["total_tokens"]  # the guess was larger, and is settled
    assert first.headers["openai-processing-ms"].isdigit()
    assert first.headers["x-request-id"].startswith("req_")
    models = server.http.get("/v1/models", headers={"authorization": f"Bearer {server.key}"})
    assert "x-ratelimit-limit-requests" not in models.headers
    wrong = post(server, temperature=9)
    assert (wrong.status_code, wrong.headers["x-ratelimit-remaining-requests"]) == (400, "58")


def test_too_many_requests_get_a_429_that_the_client_understands(server: Running) -> None:
    limit(server, requests=1)
    with server.client() as client:
        client.chat.completions.create(model=MODEL, messages=HELLO)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.code == "rate_limit_exceeded"
    headers = caught.value.response.headers
    assert 0 < int(headers["retry-after-ms"]) <= 60_000
    assert 0 < int(headers["retry-after"]) <= 60
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert len(server.cell.asked) == 1
    server.cell.ahead_ms += int(headers["retry-after-ms"])
    assert post(server).status_code == 200


def test_too_many_tokens_get_one_as_well_also_for_streams(server: Running) -> None:
    limit(server, tokens=40)
    assert post(server).status_code == 200
    assert post(server, max_tokens=100).status_code == 429
    streamed = post(server, max_tokens=100, stream=True)
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_a_stream_is_billed_when_it_ends(server: Running) -> None:
    limit(server, tokens=1000)
    streamed = post(server, stream=True, stream_options={"include_usage": True})
    usage = json.loads(streamed.text.strip().split("\n\n")[-2].removeprefix("data: "))["usage"]
    left = int(post(server).headers["x-ratelimit-remaining-tokens"])
    assert 1000 - left <= usage["total_tokens"] + 12 + 1


def test_an_answer_that_fails_costs_no_tokens(server: Running) -> None:
    limit(server, tokens=1000)

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveAnswer(status=502, body=b'{"error":{"message":"m","type":"t","param":null,"code":"c"}}')

    server.cell.script = script
    assert post(server).headers["x-ratelimit-remaining-tokens"] == "1000"


def test_a_stream_that_is_left_costs_what_was_delivered(server: Running) -> None:
    limit(server, tokens=1000)
    gone = asyncio.Event()

    async def script(_: LiveRequest) -> AsyncIterator[Item]:
        yield LiveTokens(deltas=[Delta(index=0, text="a", token_ids=[1, 2, 3])], usage=None, engine="fp")
        await gone.wait()
        yield LiveTokens(deltas=[], usage=Usage(), engine="fp")

    server.cell.script = script
    with server.client() as client:
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, max_tokens=850)
        next(iter(stream))
        stream.close()
    server.cell.script = None
    until(lambda: int(post(server, max_tokens=1).headers["x-ratelimit-remaining-tokens"]) > 850, "the settling")


def test_parts_of_one_request_share_its_limits(server: Running) -> None:
    limit(server, requests=5, tokens=100_000)
    answer = post(server, "/v1/embeddings", model=MODEL, input=["a b"] * 600)
    assert answer.headers["x-ratelimit-remaining-requests"] == "4"
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(100_000 - 1200)


def test_two_keys_of_one_account_have_limits_of_their_own(server: Running) -> None:
    limit(server, requests=1)
    other = server.new_key("acme")
    assert post(server).status_code == 200
    assert post(server).status_code == 429
    head = {"authorization": f"Bearer {other}"}
    assert server.http.post("/v1/chat/completions", json=CHAT, headers=head).status_code == 200


# -- the operator's command --------------------------------------------------------------------------------------------


def test_the_operator_sets_and_sees_limits(tmp_path: Path) -> None:
    Database(tmp_path / "motorpool.db").close()
    at = ["--data", str(tmp_path)]

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(keys, [*arguments, *at], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    made = json.loads(run("create", "--requests-a-minute", "60", "--json"))
    assert made["key"].startswith("mp-")
    assert "60 requests" in run("list")
    run("limit", made["key_id"], "--tokens-a-minute", "5000")
    (row,) = json.loads(run("list", "--json"))
    assert (row["requests_a_minute"], row["tokens_a_minute"]) == (60, 5000)
    run("limit", made["key_id"], "--tokens-a-minute", "0", "--requests-a-minute", "0")
    assert "no limit" in run("list")
    with pytest.raises(NotFoundError) as caught:
        run("limit", "key_none", "--tokens-a-minute", "5")
    assert caught.value.code == "key_not_found"
