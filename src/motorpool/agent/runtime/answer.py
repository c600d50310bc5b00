"""Writes answers in OpenAI's shapes.

Decides: the bytes that a customer gets, from text, tokens and logprobs. Must not: know how they were made.
Called by: every backend.

Logprobs travel as the chat API's entries (``token``, ``logprob``, ``bytes``, ``top_logprobs``) and are turned into the
older parallel arrays only when the body of a completion is written.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec

from motorpool.agent.runtime.calls import Calls
from motorpool.agent.runtime.engine import Finished, Work
from motorpool.errors import CallerError, MotorpoolError
from motorpool.types import Kind, Usage
from motorpool.wire import Checkpoint, CheckpointChoice, decode_checkpoint

_encoder = msgspec.json.Encoder()
Entry = dict[str, Any]
HOLD_S: Final = 60.0  # how long an attempt that was only read keeps its slot


class Choice(msgspec.Struct, kw_only=True):
    """One choice of an answer. ``entries`` is None if no logprobs were asked for."""

    index: int
    text: str
    finish_reason: str
    entries: list[Entry] | None = None
    tool_calls: list[Any] | None = None
    echo: str = ""


def fingerprint(*parts: object) -> str:
    """A short name for everything that decides the bytes of a greedy answer: engine, build, model hash, flags."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()
    return f"fp_{digest[:12]}"


def carried(work: Work) -> Checkpoint | None:
    """What earlier vehicles generated of an answer with one choice; None if nothing, or if it cannot be made sense of.

    A damaged checkpoint is no fault of the request, so the answer then begins anew instead of failing.
    """
    return carried_choices(work, 1)[0]


def carried_choices(work: Work, count: int) -> list[Checkpoint | None]:
    """The same for each of ``count`` choices: what was given out of any of them is never given out again."""
    return [
        Checkpoint(
            text=each.text, tokens=each.tokens, token_ids=each.token_ids, logprobs=each.logprobs, calls=each.calls
        )
        if each.tokens > 0
        else None
        for each in _choices(work, count)
    ]


def carried_ends(work: Work, count: int) -> list[str | None]:
    """Why each choice has ended on an earlier vehicle; None for those that have not."""
    return [each.finish_reason for each in _choices(work, count)]


def _choices(work: Work, count: int) -> list[CheckpointChoice]:
    """What each choice has so far; those that no vehicle had come to yet need not stand in the checkpoint."""
    found = _checkpoint(work)
    if found is None:
        return [CheckpointChoice()] * count
    one = CheckpointChoice(
        text=found.text, tokens=found.tokens, token_ids=found.token_ids, logprobs=found.logprobs, calls=found.calls
    )
    choices = found.choices or [one]
    if len(choices) > count:
        return [CheckpointChoice()] * count
    return [*choices, *[CheckpointChoice()] * (count - len(choices))]


def holds(work: Work) -> bool:
    """Whether the engine shall only read the prompt and what is carried, and wait."""
    found = _checkpoint(work)
    return found is not None and found.hold


def _checkpoint(work: Work) -> Checkpoint | None:
    if work.checkpoint is None:
        return None
    try:
        found = decode_checkpoint(work.checkpoint)
        parts = [(each.logprobs, each.calls) for each in found.choices]
        for logprobs, calls in [(found.logprobs, found.calls), *parts]:
            unpack_entries(logprobs)
            Calls(calls)
    except (CallerError, msgspec.DecodeError, RecursionError):
        return None
    return found


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def finished(work: Work, model: str, system_fingerprint: str, choices: list[Choice], usage: Usage) -> Finished:
    """The end of one attempt that went well."""
    chat = work.kind is Kind.CHAT
    body = {
        "id": work.response_id,
        "object": "chat.completion" if chat else "text_completion",
        "created": work.created_s,
        "model": model,
        "choices": [_chat_choice(choice) if chat else _text_choice(choice) for choice in choices],
        "usage": usage_object(usage),
        "system_fingerprint": system_fingerprint,
    }
    return Finished(key=work.key, status=200, body=_encoder.encode(body), usage=usage)


def failed(key: str, error: MotorpoolError, usage: Usage | None = None) -> Finished:
    """The end of one attempt that went wrong, in OpenAI's envelope."""
    return Finished(key=key, status=error.status, body=_encoder.encode(error.envelope()), usage=usage or Usage())


def context_length_exceeded(kind: Kind, prompt_tokens: int, context_tokens: int) -> CallerError:
    """The prompt does not fit; names the field and both numbers."""
    field = "messages" if kind is Kind.CHAT else "prompt"
    return CallerError(
        f"This model's maximum context length is {context_tokens} tokens, but {field} came to {prompt_tokens} tokens. "
        f"Shorten {field}.",
        code="context_length_exceeded",
        param=field,
    )


def pack_entries(entries: list[Entry] | None) -> bytes:
    """Entries as they stand in a Delta or a Checkpoint."""
    return _encoder.encode(entries) if entries else b""


def unpack_entries(data: bytes) -> list[Entry]:
    """The reverse of ``pack_entries``."""
    if not data:
        return []
    entries: list[Entry] = msgspec.json.decode(data, type=list[dict[str, Any]])
    return entries


def _chat_choice(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        message["content"] = choice.text or None
        message["tool_calls"] = choice.tool_calls
    logprobs = None if choice.entries is None else {"content": choice.entries, "refusal": None}
    return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _text_choice(choice: Choice) -> dict[str, Any]:
    logprobs = None if choice.entries is None else parallel(choice.entries, len(choice.echo))
    return {
        "index": choice.index,
        "text": choice.echo + choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
    }


def parallel(entries: list[Entry], offset: int) -> dict[str, Any]:
    """The older API's parallel arrays. ``text_offset`` counts characters from the start of ``text``."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    tops = [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries]
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": offsets,
    }
