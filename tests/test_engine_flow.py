"""Stop strings: the same end wherever the text is cut, and never a character too many."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from motorpool.agent.runtime.flow import Flow, Piece

texts = st.text(alphabet="abc", max_size=40)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3).map(tuple)


def until_stop(text: str, words: tuple[str, ...]) -> str:
    """The first stop string to be complete ends the text; where several are at once, the one that began first."""
    for end in range(1, len(text) + 1):
        starts = [text.index(word) for word in words if word in text[:end]]
        if starts:
            return text[: min(starts)]
    return text


def cut(text: str, places: list[int]) -> list[Piece]:
    bounds = sorted({0, len(text), *(place for place in places if place < len(text))})
    parts = [text[a:b] for a, b in itertools.pairwise(bounds)]
    return [Piece(text=part, ids=[number], entries=[]) for number, part in enumerate(parts)]


@given(text=texts, words=stops)
def test_the_answer_ends_before_the_first_stop_string(text: str, words: tuple[str, ...]) -> None:
    flow = Flow(words)
    out = [piece for one in cut(text, list(range(40))) for piece in flow.feed(one)] + flow.end()
    assert "".join(piece.text for piece in out) == flow.text == until_stop(text, words)
    assert flow.stopped == (flow.text != text)


@given(text=texts, words=stops, places=st.lists(st.integers(1, 39)))
def test_tokens_leave_whole_and_in_order(text: str, words: tuple[str, ...], places: list[int]) -> None:
    pieces = cut(text, places)
    flow = Flow(words)
    out = [piece for one in pieces for piece in flow.feed(one)] + flow.end()
    assert [piece.ids for piece in out] == [piece.ids for piece in pieces[: len(out)]]
    whole = out[:-1]  # the last one may be cut short by a stop string
    assert [piece.text for piece in whole] == [piece.text for piece in pieces[: len(whole)]]
    assert not any(word in flow.text for word in words)


@given(text=texts, words=stops, at=st.integers(0, 40))
def test_a_continued_text_ends_where_the_unbroken_one_does(text: str, words: tuple[str, ...], at: int) -> None:
    whole = Flow(words)
    for one in cut(text, list(range(40))):
        whole.feed(one)
    flow = Flow(words, carried=text[:at])
    for one in cut(text[at:], list(range(40))):
        flow.feed(one)
    assert not any(word in flow.text for word in words)
    if len(until_stop(text, words)) >= at:  # nothing was given out beyond the end
        assert flow.text == whole.text
