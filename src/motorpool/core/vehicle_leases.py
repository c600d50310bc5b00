"""What a vehicle holds: leases, running attempts, and the text that grows in them.

Decides: how the pieces of one answer are put together into a checkpoint. Must not: decide what runs or goes back; that
is ``core.vehicle``, which alone calls this room.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from motorpool.errors import CallerError
from motorpool.types import MAX_CHECKPOINT_BYTES, Kind
from motorpool.wire import (
    Checkpoint,
    CheckpointChoice,
    Delta,
    Grant,
    Item,
    ResultItem,
    ReturnItem,
    checkpoint_tokens,
    decode_checkpoint,
    encode_checkpoint,
)


class _Part:
    """What has grown of one choice."""

    __slots__ = ("calls", "finish_reason", "ids_complete", "logprobs", "texts", "token_ids", "tokens")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens = 0
        self.token_ids: list[int] = []
        self.ids_complete = True
        self.logprobs: list[bytes] = []
        self.finish_reason: str | None = None
        self.calls = False  # a tool call has begun, whose text is not in ``texts``

    def after(self, base: CheckpointChoice) -> CheckpointChoice:
        """What was carried and what has grown, together."""
        whole_ids = self.ids_complete and len(base.token_ids) == base.tokens
        return CheckpointChoice(
            text=base.text + "".join(self.texts),
            tokens=base.tokens + self.tokens,
            token_ids=base.token_ids + self.token_ids if whole_ids else [],
            logprobs=_join_arrays([base.logprobs, *self.logprobs]),
            finish_reason=self.finish_reason or base.finish_reason,
        )


class Growth:
    """What one attempt has generated here, on top of the checkpoint that it came with."""

    __slots__ = ("parts", "tokens")

    def __init__(self) -> None:
        self.parts: dict[int, _Part] = {}  # by choice
        self.tokens = 0

    @property
    def calls(self) -> bool:
        """Whether a tool call has begun: such an answer begins anew, as nobody has seen any of it."""
        return any(part.calls for part in self.parts.values())

    def add(self, deltas: list[Delta]) -> int:
        """Take new deltas; the number of their tokens. A delta without token ids counts as one token."""
        before = self.tokens
        for delta in deltas:
            part = self.parts.get(delta.index)
            if part is None:
                part = self.parts[delta.index] = _Part()
            count = len(delta.token_ids) or int(bool(delta.text))
            if delta.text:
                part.texts.append(delta.text)
                part.ids_complete = part.ids_complete and bool(delta.token_ids)
            part.token_ids.extend(delta.token_ids)
            part.tokens += count
            self.tokens += count
            if delta.logprobs:
                part.logprobs.append(delta.logprobs)
            part.finish_reason = delta.finish_reason or part.finish_reason
            part.calls = part.calls or bool(delta.calls)
        return self.tokens - before


def tokens_of(checkpoint: bytes | None) -> int:
    """How many tokens a checkpoint holds; 0 for none and for one that cannot be read."""
    if checkpoint is None:
        return 0
    try:
        return checkpoint_tokens(checkpoint)
    except CallerError:
        return 0


def bytes_of(item: Item) -> int:
    """Bytes that an attempt holds while it waits."""
    return len(item.body) + len(item.checkpoint or b"")


def join(carried: bytes | None, carried_tokens: int, growth: Growth | None) -> tuple[bytes | None, int]:
    """The checkpoint of carried and grown together, and how many tokens it holds in all.

    A carried one that cannot be read was of no use to the engine either, which began anew. One over
    MAX_CHECKPOINT_BYTES (long answers with many logprobs) fits no message: what was carried stays.
    """
    if growth is None or growth.tokens == 0 or growth.calls:
        return carried, carried_tokens
    base = Checkpoint(text="", tokens=0)
    if carried is not None:
        with suppress(CallerError):
            base = decode_checkpoint(carried)
    joined = _joined(base, growth)
    packed = encode_checkpoint(joined)
    return (packed, joined.tokens) if len(packed) <= MAX_CHECKPOINT_BYTES else (carried, base.tokens)


def _joined(base: Checkpoint, growth: Growth) -> Checkpoint:
    """One choice that has not ended stands in the checkpoint itself; several, or one that has, by their index."""
    one = CheckpointChoice(text=base.text, tokens=base.tokens, token_ids=base.token_ids, logprobs=base.logprobs)
    before = base.choices or [one]
    count = max(len(before), *(index + 1 for index in growth.parts))
    bases = [*before, *[CheckpointChoice()] * (count - len(before))]
    choices = [growth.parts[at].after(each) if at in growth.parts else each for at, each in enumerate(bases)]
    first = choices[0]
    tokens = sum(each.tokens for each in choices)
    if count > 1:
        return Checkpoint(text="", tokens=tokens, prompt_tokens=base.prompt_tokens, choices=choices)
    return Checkpoint(
        text=first.text,
        tokens=tokens,
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        prompt_tokens=base.prompt_tokens,
        choices=choices if first.finish_reason is not None else [],
    )


def _join_arrays(arrays: list[bytes]) -> bytes:
    inner = [array.strip()[1:-1].strip() for array in arrays if array]
    inner = [part for part in inner if part]
    return b"[" + b",".join(inner) + b"]" if inner else b""


class Lease:
    """One lease from its arrival until its last message is durable.

    ``carried_tokens`` is what the checkpoints hold that its lines came with. They are read once, when they arrive: on
    the way back, when the owner is here, there is no time for it.
    """

    __slots__ = (
        "carried_tokens",
        "expires_ms",
        "gathered",
        "gathered_bytes",
        "gathered_since_ms",
        "job_id",
        "kind",
        "lease_id",
        "max_offline_ms",
        "media_type",
        "number",
        "queue",
        "running",
        "undelivered",
    )

    def __init__(self, grant: Grant, number: int, now_ms: int) -> None:
        self.number = number
        self.lease_id = grant.lease_id
        self.job_id = grant.job_id
        self.kind = grant.kind
        self.media_type = grant.media_type
        self.expires_ms = now_ms + grant.ttl_ms
        self.max_offline_ms = grant.max_offline_ms
        self.carried_tokens = {item.line: tokens_of(item.checkpoint) for item in grant.items if item.checkpoint}
        self.queue: deque[Item] = deque()
        self.running = 0
        self.gathered: list[ResultItem] = []
        self.gathered_bytes = 0
        self.gathered_since_ms = 0
        self.undelivered = 0  # messages that the durable stream does not have yet

    def ends_ms(self, down_since_ms: int | None) -> int:
        """When what is unfinished is given up: at the lease's end, or when the link has been down for too long."""
        return self.expires_ms if down_since_ms is None else min(self.expires_ms, down_since_ms + self.max_offline_ms)

    @property
    def unfinished(self) -> bool:
        """Are there attempts that still have to run."""
        return self.running > 0 or len(self.queue) > 0

    @property
    def over(self) -> bool:
        """Is nothing left to do or to deliver."""
        return not (self.unfinished or self.gathered or self.undelivered)


class Run:
    """One attempt of a lease in the engine."""

    __slots__ = ("carried", "carried_tokens", "growth", "lease", "line", "told_tokens")

    def __init__(self, lease: Lease, item: Item) -> None:
        self.lease = lease
        self.line = item.line
        self.carried = item.checkpoint
        self.carried_tokens = lease.carried_tokens.get(item.line, 0)
        self.growth: Growth | None = None
        self.told_tokens = 0  # of growth, in the last Progress message


class LiveRun:
    """One live request in the engine."""

    __slots__ = ("attempt", "carried", "growth", "key", "kind", "request_id", "seq", "stream")

    def __init__(self, *, key: str, request_id: str, attempt: int, kind: Kind, stream: bool, carried: bytes | None):
        self.key = key
        self.request_id = request_id
        self.attempt = attempt
        self.kind = kind
        self.stream = stream
        self.carried = carried
        self.growth: Growth | None = None
        self.seq = 0


def unstarted(lease: Lease, item: Item) -> ReturnItem:
    """What goes back of an attempt that waited."""
    tokens = lease.carried_tokens.get(item.line, 0)
    return ReturnItem(line=item.line, tokens=tokens, checkpoint=item.checkpoint)


def interrupted(run: Run, *, started: bool) -> ReturnItem:
    """What goes back of an attempt in the engine; ``started`` if it had a slot."""
    checkpoint, tokens = join(run.carried, run.carried_tokens, run.growth)
    return ReturnItem(line=run.line, tokens=tokens, checkpoint=checkpoint, started=started or run.growth is not None)
