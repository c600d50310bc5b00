"""What the null engine says: a pure function of the kind and the body.

Decides: the tokens of every answer. Must not: keep time or state; ``null`` does. Called by: ``null``.

Token ``i`` of choice ``c`` is a word picked by a hash of the body, ``c`` and ``i``. The answer does not depend on when,
where or in how many parts it was made, so a continued answer is byte for byte the unbroken one.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Any, Final

import msgspec

from motorpool.agent.runtime import answer, embedding
from motorpool.agent.runtime.answer import Choice, Entry
from motorpool.agent.runtime.calls import Calls
from motorpool.agent.runtime.engine import Finished, Work
from motorpool.agent.runtime.flow import Flow, Piece
from motorpool.agent.runtime.instance import minimal_instance
from motorpool.agent.runtime.request import Body, ChatBody, parse, stops_of
from motorpool.agent.runtime.spec import EngineSpec
from motorpool.errors import CallerError
from motorpool.types import Kind, Usage
from motorpool.wire import Checkpoint, Delta

_ONSETS: Final = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st")
_RIMES: Final = ("a", "e", "i", "o", "u", "al", "en", "ir", "on", "um", "ak", "el", "is", "or", "un", "ai")
WORDS: Final = tuple(onset + rime for onset in _ONSETS for rime in _RIMES)
_BLOCK: Final = 64  # tokens from one hash
_JSON_PIECE_CHARS: Final = 4
DIMENSIONS: Final = 384  # numbers of a vector, as the catalogue says


class Plan(msgspec.Struct, kw_only=True):
    """The whole answer of one attempt, before any of it is given out.

    ``choices`` holds the pieces of each choice, and so many of each as ``given`` says were given out by earlier
    vehicles; ``ended`` are the choices whose end was told as well. ``echoes`` is what the text of each choice begins
    with. ``tool``: what every choice calls, if the request insists on it; the pieces are then those of its arguments,
    and ``calls`` knows what of them was told. ``holds``: nothing is given out, the attempt only keeps its slot.
    """

    work: Work
    choices: list[list[Piece]]
    echoes: list[str]
    reasons: list[str]
    prompt_tokens: int
    given: list[int]
    ended: list[bool]
    logprobs: bool
    tool: str = ""
    calls: list[Calls] = []
    holds: bool = False

    def delta_of(self, index: int, pieces: list[Piece], finish_reason: str | None) -> Delta:
        """The next pieces of one choice as they leave the engine."""
        text = "".join(piece.text for piece in pieces)
        fragment = b""
        if self.tool:
            name = "" if self.calls[index].named else self.tool
            part = {"index": 0, "function": {"name": name, "arguments": text}}
            fragment, text = self.calls[index].feed([part]), ""
        return Delta(
            index=index,
            text=text,
            token_ids=[number for piece in pieces for number in piece.ids],
            logprobs=answer.pack_entries([entry for piece in pieces for entry in piece.entries]),
            finish_reason=finish_reason,
            calls=fragment,
        )

    @property
    def total(self) -> int:
        """Tokens of the whole answer, over all choices."""
        return sum(len(pieces) for pieces in self.choices)

    @property
    def carried(self) -> int:
        """Those of them that earlier vehicles gave out."""
        return sum(self.given)


def name_of(spec: EngineSpec) -> str:
    """The fingerprint: equal for all null engines, whatever their rate, as their answers are equal."""
    return answer.fingerprint("null", 1, spec.model, spec.default_tokens)


def plan(spec: EngineSpec, work: Work) -> Plan:
    """Read the body and decide every token; raise CallerError if it cannot be run."""
    body = parse(work.kind, work.body)
    prompt_tokens = _count(body)
    if prompt_tokens > spec.context_tokens:
        raise answer.context_length_exceeded(work.kind, prompt_tokens, spec.context_tokens)
    choices, reasons = [], []
    echoes = _echoes(body)
    for index in range(len(echoes)):
        pieces, reason = _choice(spec, work, body, index)
        choices.append(pieces)
        reasons.append(reason)
    before = answer.carried_choices(work, len(choices))
    given = [0 if each is None else _carried(each, pieces) for each, pieces in zip(before, choices, strict=True)]
    tool = _tool(body)
    return Plan(
        work=work,
        choices=choices,
        echoes=echoes,
        reasons=reasons,
        prompt_tokens=prompt_tokens,
        given=given,
        ended=[reason is not None for reason in answer.carried_ends(work, len(choices))],
        logprobs=body.top is not None and tool is None,
        tool="" if tool is None else tool[0],
        calls=[] if tool is None else [_resumed(work, *each) for each in zip(before, choices, given, strict=True)],
        holds=answer.holds(work),
    )


def _resumed(work: Work, before: Checkpoint | None, pieces: list[Piece], given: int) -> Calls:
    """The call of one choice, up to where earlier vehicles gave it out."""
    calls = Calls(b"" if before is None else before.calls, work.response_id)
    if given:
        calls.feed([{"index": 0, "function": {"arguments": "".join(piece.text for piece in pieces[:given])}}])
    return calls


def finish(spec: EngineSpec, made: Plan) -> Finished:
    """The final event of a planned answer."""
    usage = Usage(prompt_tokens=made.prompt_tokens, completion_tokens=made.total, carried_tokens=made.carried)
    choices = [
        Choice(
            index=index,
            text="" if made.tool else "".join(piece.text for piece in pieces),
            tool_calls=_whole_call(made, pieces),
            finish_reason=reason,
            entries=[entry for piece in pieces for entry in piece.entries] if made.logprobs else None,
            echo=made.echoes[index],
        )
        for index, (pieces, reason) in enumerate(zip(made.choices, made.reasons, strict=True))
    ]
    return answer.finished(made.work, spec.model, name_of(spec), choices, usage)


def _whole_call(made: Plan, pieces: list[Piece]) -> list[dict[str, Any]] | None:
    if not made.tool:
        return None
    calls = Calls(seed=made.work.response_id)
    function = {"name": made.tool, "arguments": "".join(piece.text for piece in pieces)}
    calls.feed([{"index": 0, "function": function}])
    return calls.whole()


def embed(spec: EngineSpec, work: Work) -> Finished:
    """Vectors of length 1 that depend on the input alone; raise CallerError for a body that cannot be run."""
    body = embedding.parse(work.body)
    counts = [_words_in(part) if isinstance(part, str) else len(part) for part in body.inputs]
    for index, count in enumerate(counts):
        if count > spec.context_tokens:
            raise embedding.too_long(index, count, spec.context_tokens)
    usage = Usage(prompt_tokens=sum(counts))
    return embedding.finished(work, spec.model, body, [_vector(part) for part in body.inputs], usage)


def _vector(part: embedding.Input) -> bytes:
    """One vector: a hash of its input, as numbers from -1 to 1, brought to length 1."""
    data = part.encode() if isinstance(part, str) else msgspec.json.encode(part)
    numbers = struct.unpack(f"<{DIMENSIONS}h", hashlib.shake_128(data).digest(2 * DIMENSIONS))
    length = math.sqrt(sum(number * number for number in numbers)) or 1.0
    return struct.pack(f"<{DIMENSIONS}f", *(number / length for number in numbers))


class Quick:
    """The whole answer of a plain request at once, as bytes; None if the request needs a ``Plan``.

    Exists because benchmarks and large simulated fleets run hundreds of thousands of null requests.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        encode = msgspec.json.encode
        self._model = encode(spec.model)
        self._fingerprint = encode(name_of(spec))

    def finish(self, work: Work) -> Finished | None:
        """Answer now, or None; raise CallerError if the body cannot be run."""
        if work.kind is not Kind.CHAT or work.stream or work.checkpoint is not None:
            return None
        body = parse(work.kind, work.body)
        if type(body) is not ChatBody or body.stop or body.logprobs or body.response_format or (body.n or 1) > 1:
            return None
        if _tool(body) is not None:
            return None
        spec = self._spec
        prompt_tokens = _count(body)
        if prompt_tokens > spec.context_tokens:
            raise answer.context_length_exceeded(work.kind, prompt_tokens, spec.context_tokens)
        limit = body.limit_tokens
        room = spec.context_tokens - prompt_tokens
        count = min(spec.default_tokens if limit is None else limit, room)
        reason = b"stop" if limit is None and count < room else b"length"
        text = " ".join([WORDS[byte] for byte in _picks(work, 0, count)]).encode()
        data = (
            b'{"id":%b,"object":"chat.completion","created":%d,"model":%b,"choices":[{"index":0,"message":'
            b'{"role":"assistant","content":"%b","refusal":null},"logprobs":null,"finish_reason":"%b"}],"usage":'
            b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":0,'
            b'"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,'
            b'"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}},"system_fingerprint":%b}'
        ) % (
            msgspec.json.encode(work.response_id),
            work.created_s,
            self._model,
            text,
            reason,
            prompt_tokens,
            count,
            prompt_tokens + count,
            self._fingerprint,
        )
        usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=count)
        return Finished(key=work.key, status=200, body=data, usage=usage)


def _choice(spec: EngineSpec, work: Work, body: Body, index: int) -> tuple[list[Piece], str]:
    """The pieces of one choice and why it ends."""
    limit = body.limit_tokens
    room = spec.context_tokens - _count(body)
    most = room if limit is None else min(limit, room)
    schema = _schema(body)
    tool = _tool(body)
    if tool is not None:
        pieces = _json(minimal_instance(tool[1]), None)
        return pieces[:most], "length" if len(pieces) > most else "tool_calls"
    if schema is None:
        count = min(spec.default_tokens, room) if limit is None else most
        pieces = _words(work, index, count, body.top)
        reason = "stop" if limit is None and count < room else "length"
    else:
        pieces = _json(schema, body.top)
        reason = "length" if len(pieces) > most else "stop"
        pieces = pieces[:most]
    stops = stops_of(body)
    if not stops:
        return pieces, reason
    flow = Flow(stops)
    out = [ready for piece in pieces for ready in flow.feed(piece)]
    return out + flow.end(), "stop" if flow.stopped else reason


def _echoes(body: Body) -> list[str]:
    """What each choice begins with: its prompt if the request wants it back, nothing otherwise."""
    count = body.n or 1
    if isinstance(body, ChatBody):
        return [""] * count
    return [_text(prompt) if body.echo else "" for prompt in body.prompts for _ in range(count)]


def _text(prompt: str | list[int]) -> str:
    """A prompt as text; a token of the null engine is the number of a word."""
    return prompt if isinstance(prompt, str) else " ".join(WORDS[token % len(WORDS)] for token in prompt)


def _picks(work: Work, choice: int, count: int) -> bytes:
    """One byte for each token."""
    seed = hashlib.blake2b(work.body, digest_size=_BLOCK, salt=choice.to_bytes(16, "big"), person=_PERSON[work.kind])
    first = seed.digest()
    if count <= _BLOCK:
        return first[:count]
    numbers = (block.to_bytes(8, "big") for block in range(1, -(-count // _BLOCK)))
    return b"".join([first, *(hashlib.blake2b(first + number, digest_size=_BLOCK).digest() for number in numbers)])[
        :count
    ]


_PERSON: Final = {Kind.CHAT: b"chat", Kind.COMPLETION: b"completion"}


def _words(work: Work, choice: int, count: int, top: int | None) -> list[Piece]:
    pieces = []
    for i, byte in enumerate(_picks(work, choice, count)):
        text = WORDS[byte] if i == 0 else " " + WORDS[byte]
        entries = [] if top is None else [_entry(text, byte, top)]
        pieces.append(Piece(text=text, ids=[byte], entries=entries))
    return pieces


def _json(value: Any, top: int | None) -> list[Piece]:
    """A JSON value in pieces, as a model gives it out token by token. Pieces end between characters."""
    text = msgspec.json.encode(value).decode()
    pieces = []
    for at in range(0, len(text), _JSON_PIECE_CHARS):
        part = text[at : at + _JSON_PIECE_CHARS]
        entries = [] if top is None else [_entry(part, at % 256, top)]
        pieces.append(Piece(text=part, ids=[256 + at], entries=entries))
    return pieces


def _entry(text: str, pick: int, top: int) -> Entry:
    """A made-up logprob, well-formed and always the same: the more unlikely, the larger the pick."""
    own = {"token": text, "logprob": -(pick + 1) / 128, "bytes": list(text.encode())}
    others = []
    for k in range(1, top):
        word = " " + WORDS[(pick + k) % 256]
        others.append({"token": word, "logprob": -(pick + 1) / 128 - k, "bytes": list(word.encode())})
    return own | {"top_logprobs": [own, *others] if top else []}


def _schema(body: Body) -> Any:
    """The value to answer with if the request wants JSON, None if it wants words."""
    wanted = body.response_format if isinstance(body, ChatBody) else None
    if not wanted or wanted.get("type", "text") == "text":
        return None
    if wanted["type"] == "json_object":
        return {"answer": "null"}
    outer = wanted.get("json_schema")
    schema = outer.get("schema") if isinstance(outer, dict) else None
    return minimal_instance(schema if isinstance(schema, dict) else {"type": "object"})


def _tool(body: Body) -> tuple[str, dict[str, Any]] | None:
    """The tool that is called, and the schema of its arguments: the first one, or that which the request names.

    None unless the request insists on a call: the null engine has nothing to decide by.
    """
    if not isinstance(body, ChatBody) or not body.may_call_tools or body.tool_choice in (None, "auto"):
        return None
    functions = [each["function"] for each in body.tools or [] if isinstance(each.get("function"), dict)]
    if isinstance(body.tool_choice, dict):
        wanted = (body.tool_choice.get("function") or {}).get("name")
        functions = [each for each in functions if each.get("name") == wanted]
    if not functions:
        raise CallerError("there is no such tool", code="invalid_value", param="tool_choice")
    schema = functions[0].get("parameters")
    return str(functions[0].get("name")), schema if isinstance(schema, dict) else {"type": "object"}


def _carried(checkpoint: Checkpoint, pieces: list[Piece]) -> int:
    """How many tokens of the answer the checkpoint holds, by its text, as that is what the customer has seen."""
    length, count = 0, 0
    told = checkpoint.text or Calls(checkpoint.calls).arguments
    for piece in pieces:
        if length + len(piece.text) > len(told):
            break
        length += len(piece.text)
        count += 1
    return count


def _count(body: Body) -> int:
    """Words of the prompt: the null engine's prompt tokens."""
    if isinstance(body, ChatBody):
        return sum(_words_in(message.get("content")) for message in body.messages)
    return sum(_words_in(prompt) if isinstance(prompt, str) else len(prompt) for prompt in body.prompts)


def _words_in(content: Any) -> int:
    if isinstance(content, str):
        return len(content.split())
    if isinstance(content, list):
        return sum(_words_in(part.get("text")) for part in content if isinstance(part, dict))
    return 0
