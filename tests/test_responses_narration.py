"""The events of a response as a function of what was said, with generated runs that break off and begin again."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from tests.api_cell import MODEL
from tests.response_trial import check, parsed

from motorpool.server.cell import LiveTokens
from motorpool.server.openai.responses.creation import make_plan
from motorpool.server.openai.responses.log import Log, Take
from motorpool.server.openai.responses.narration import Narration, Piece, Text, pieces_json
from motorpool.server.openai.responses.objects import Facts, response_json, response_object
from motorpool.server.openai.responses.request import read_request
from motorpool.server.openai.responses.translate import output_items, streamed
from motorpool.types import Usage

pieces = st.lists(st.tuples(st.text("ab漢", max_size=3), st.integers(0, 2)), max_size=8)


def facts(*, background: bool = True) -> Facts:
    request = read_request(json.dumps({"model": MODEL, "input": "x", "background": background}).encode())
    return make_plan(request, [], "acme", 1_000_000, 10_000).facts


FACTS = facts()


def entries(count: int) -> list[Raw]:
    return [Raw(b'{"token":"x"}')] * count


def told(log: Log) -> tuple[str, list[dict[str, Any]], str]:
    """The events of a log whose answer is complete; and its text by the deltas of its last item."""
    answer = streamed("stop", Usage(completion_tokens=1), LiveTokens(deltas=[], usage=None, engine="fp"))
    output = output_items(log.facts.response_id, answer, log.text, log.logprobs, first=log.restarts, status="completed")
    result = response_object(log.facts, "completed", output=output, usage=answer.usage)
    narration = Narration(log.facts)
    events = narration.opening()
    for piece in log.pieces:
        events += narration.tell(piece)
    events += narration.end(response_json.decode(msgspec.json.encode(result)))
    text = b"".join(event.data for event in events).decode()
    assert [event.number for event in events] == list(range(len(events)))
    found = parsed(text)
    last = max((event["output_index"] for event in found if "output_index" in event), default=0)
    return text, found, "".join(e["delta"] for e in found if "delta" in e and e["output_index"] == last)


@given(st.lists(st.tuples(pieces, st.booleans()), min_size=1, max_size=4))
def test_whatever_runs_say_the_last_one_is_told_whole_and_once(
    all_runs: list[tuple[list[tuple[str, int]], bool]],
) -> None:
    log = Log(FACTS)
    for said, _ in all_runs[:-1]:  # these broke off
        take = Take(log)
        for text, count in said:
            take.feed(text, entries(count))
        before = list(log.pieces)
        log = Log(FACTS, pieces_json.decode(msgspec.json.encode(log.pieces)))  # a restart
        assert log.pieces == before
    take = Take(log)
    whole = ""
    for text, count in all_runs[-1][0]:
        take.feed(text, entries(count))
        whole += text
    take.finish()
    _, events, text = told(log)
    assert text == whole == log.text
    last = check(events)
    assert [item["status"] for item in last["output"]] == ["completed"]
    statuses = [event["item"]["status"] for event in events if event["type"] == "response.output_item.done"]
    assert statuses == ["incomplete"] * log.restarts + ["completed"]


@given(pieces, st.lists(st.integers(0, 30), max_size=6))
def test_the_same_text_in_other_pieces_is_never_told_twice(said: list[tuple[str, int]], cuts: list[int]) -> None:
    whole = "".join(text for text, _ in said)
    log = Log(FACTS)
    take = Take(log)
    for text, _ in said:
        take.feed(text, [])
    before = list(log.pieces)
    places = sorted({min(cut, len(whole)) for cut in cuts} | {0, len(whole)})
    take = Take(log)
    for begin, end in zip(places, [*places[1:], len(whole)], strict=True):
        take.feed(whole[begin:end], [])
    take.feed(" more", [])
    take.finish()
    assert log.restarts == 0
    assert log.pieces[: len(before)] == before
    assert log.text == whole + " more"


@given(st.lists(st.text("ab漢", min_size=1, max_size=3), max_size=8))
def test_a_log_that_is_read_again_is_told_byte_for_byte(words: list[str]) -> None:
    made: list[Piece] = [Text(word, entries(1)) for word in words]
    log = Log(FACTS, made)
    again = Log(FACTS, pieces_json.decode(msgspec.json.encode(made)))
    assert told(log)[0] == told(again)[0]
