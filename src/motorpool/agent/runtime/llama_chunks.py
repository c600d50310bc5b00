"""What xllamacpp hands to the callback of a streamed generation, decoded.

Decides: how many tokens a piece of text stands for, and their ids. Must not: know requests. Called by: ``llama_run``.

llama.cpp gives out text in whole characters. Of a character that takes several tokens it reports the last token alone;
the others are found by asking the tokenizer for the same text, and are -1 where its answer does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from motorpool.agent.runtime.answer import Entry
from motorpool.agent.runtime.flow import Piece


class _Top(msgspec.Struct):
    token: str = ""
    logprob: float = 0.0
    bytes: list[int] = []


class _Entry(msgspec.Struct):
    id: int
    token: str
    logprob: float
    bytes: list[int] = []
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct):
    content: list[_Entry] | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta = msgspec.field(default_factory=_Delta)
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Timings(msgspec.Struct):
    cache_n: int = 0
    prompt_n: int = 0
    predicted_n: int = 0


class Chunk(msgspec.Struct):
    """One call of the callback: an error, or some text, or the end."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: dict[str, Any] | None = None


CHUNK = msgspec.json.Decoder(Chunk)
TokensOf = Callable[[str], list[int]]


class TokenCount:
    """Turns the chunks of one generation into pieces, and counts their tokens."""

    def __init__(self, tokens_of: TokensOf, top: int | None) -> None:
        self._tokens_of = tokens_of
        self._top = top
        self._seen = 0  # tokens that llama.cpp has made, as far as reported
        self._silent: list[int] = []  # ids of tokens without text, such as the one that ends an answer

    def piece(self, chunk: Chunk) -> Piece | None:
        """The text of a chunk with its tokens; None if it has none."""
        choice = chunk.choices[0]
        text = choice.delta.content if choice.text is None else choice.text
        reported = (choice.logprobs.content if choice.logprobs else None) or []
        ids = [entry.id for entry in reported]
        made = len(ids)
        if chunk.timings is not None and choice.finish_reason is None:
            made, self._seen = chunk.timings.predicted_n - self._seen, chunk.timings.predicted_n
        if not text:
            self._silent += ids if made == len(ids) else [-1] * made
            return None
        ids = [*self._silent, *self._whole(text, ids, made)]
        self._silent = []
        entries = [] if self._top is None else [_openai_entry(entry, self._top) for entry in reported]
        return Piece(text=text, ids=ids, entries=entries)

    def silent(self) -> list[int]:
        """The tokens without text so far, as those of a tool call; they are told by this."""
        found, self._silent = self._silent, []
        return found

    def rest(self, made: int, *, ended: bool) -> list[int]:
        """Tokens that count as part of the answer and have left no text: half a character at the limit, a tool call.

        ``made`` are all that llama.cpp made. If the model ``ended`` the answer, the last one is how it said so, which
        is no part of the answer.
        """
        ids = [*self._silent, *[-1] * max(0, made - self._seen)]
        return ids[:-1] if ended else ids

    def _whole(self, text: str, ids: list[int], made: int) -> list[int]:
        if made <= len(ids):
            return ids
        found = self._tokens_of(text)
        if len(found) == made and found[len(found) - len(ids) :] == ids:
            return found
        return [-1] * (made - len(ids)) + ids


def _openai_entry(entry: _Entry, top: int) -> Entry:
    """OpenAI's entry: without llama.cpp's ids."""
    tops = [{"token": t.token, "logprob": t.logprob, "bytes": t.bytes} for t in entry.top_logprobs[:top]]
    return {"token": entry.token, "logprob": entry.logprob, "bytes": entry.bytes, "top_logprobs": tops}
