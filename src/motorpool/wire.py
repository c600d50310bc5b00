"""The messages between a vehicle and its cell: MessagePack, versioned, bounded, idempotent.

Every message names what it belongs to (vehicle, incarnation, lease, request), so that one which is lost, repeated or
reordered changes nothing that it should not. Bodies of requests and results are opaque bytes with a media type;
sealing them later changes no message. Unknown fields are ignored and new fields have defaults: a newer peer can talk to
an older one as long as ``VERSION`` is equal.

Subjects (``v1`` is the version; a vehicle's credentials open its own ones and no others)::

    mp.v1.down.<vehicle>             cell to vehicle: Grant, Revoke, Open, Close, Sync, Statement,
                                     OwnerDocument, OwnerAsked
    mp.v1.up.<vehicle>.state         vehicle to cell: State, Progress
    mp.v1.up.<vehicle>.work          durable stream: Results, Returned
    mp.v1.up.<vehicle>.live          vehicle to cell: Tokens, Answered, Broken (live requests)

A relay speaks for many vehicles, in sheets of columns (``core.sheets``); its credentials open these and no others::

    mp.v1.feed.<relay>.sheet         relay to cell: reports of its vehicles
    mp.v1.feed.<relay>.answer        cell to relay: what was taken, and what is wanted in full

Called by: agent, server. Must not: decide anything.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from motorpool.errors import CallerError, TooLargeError
from motorpool.types import (
    MAX_CHECKPOINT_BYTES,
    MAX_ITEMS_PER_MESSAGE,
    MAX_MESSAGE_BYTES,
    EnergyUwh,
    Kind,
    ModelTier,
    Reason,
    ReturnReason,
    TokenCount,
    Usage,
    VehicleState,
)

VERSION: Final = 1
STREAM_NAME: Final = "MOTORPOOL_WORK"
WORK_SUBJECTS: Final = f"mp.v{VERSION}.up.*.work"
MEDIA_JSON: Final = "application/json"
MAX_OFFLINE_MS: Final = 6 * 3_600_000  # how long a vehicle may go on with a lease while it has no link
MAX_DOCUMENT_BYTES: Final = 16 * 1024  # one document that an owner has signed
MAX_ON_DISK: Final = 32  # models that a vehicle names
MAX_SHEET_ROWS: Final = 1_024  # reports of a relay in one message: so long the cell's loop does nothing else
MAX_SHEET_VEHICLES: Final = 1 << 21  # of one relay

# What a peer may say: decoding refuses the rest, so that no message can hold what the books cannot, and none makes the
# other end say what no message can hold.
Name = Annotated[str, Meta(max_length=256)]
Packed = Annotated[bytes, Meta(max_length=MAX_CHECKPOINT_BYTES)]  # a checkpoint that may be handed on
Line = Annotated[int, Meta(ge=0, lt=1 << 31)]
Total = Annotated[int, Meta(ge=0, le=1 << 50)]
Status = Annotated[int, Meta(ge=100, le=599)]
Slots = Annotated[int, Meta(ge=0, le=1 << 12)]
Risk = Annotated[float, Meta(ge=0.0, le=1.0)]
Memory = Annotated[int, Meta(ge=0, le=255)]
Document = Annotated[bytes, Meta(max_length=MAX_DOCUMENT_BYTES)]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_id(value: str, what: str) -> str:
    """Return ``value`` if it can stand in a subject and in a path; raise CallerError otherwise."""
    if not _ID.fullmatch(value):
        raise CallerError(f"{what} must be 1 to 64 letters, digits, '-' or '_'", code="invalid_id", param=what)
    return value


def down_subject(vehicle_id: str) -> str:
    """Where the cell speaks to one vehicle."""
    return f"mp.v{VERSION}.down.{vehicle_id}"


def up_subject(vehicle_id: str, channel: str) -> str:
    """Where one vehicle speaks to the cell; ``channel`` is ``state``, ``work`` or ``live``."""
    return f"mp.v{VERSION}.up.{vehicle_id}.{channel}"


def feed_subject(relay_id: str, channel: str) -> str:
    """Where a relay speaks to the cell (``sheet``), or the cell answers it (``answer``)."""
    return f"mp.v{VERSION}.feed.{relay_id}.{channel}"


def vehicle_of(subject: str) -> str:
    """The vehicle or relay of a subject. The server enforces it, so this is who really sent a message."""
    return subject.split(".")[3]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="t"):
    """Common to all messages."""

    v: int = VERSION


# -- cell to vehicle ---------------------------------------------------------------------------------------------------


class Item(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One attempt in a lease: a line of the job, its body, and what earlier vehicles already generated."""

    line: Line
    body: bytes
    checkpoint: Packed | None = None


class Grant(Message, frozen=True, kw_only=True, tag="grant"):
    """The right to run ``items`` for ``ttl_ms`` from arrival. Repeating it with one ``lease_id`` changes nothing.

    Without a link the vehicle goes on for ``max_offline_ms`` since it lost it, and then gives up what is unfinished;
    what it has finished it keeps and delivers. ``pay_*`` is what the owner gets for a million tokens: the price times
    the owners' part. ``customer_class`` is what the owner is told of whom the work is for, never its content.
    """

    lease_id: Name
    incarnation: Name
    job_id: Name
    kind: Kind
    model: Name
    ttl_ms: Total
    items: Annotated[list[Item], Meta(max_length=MAX_ITEMS_PER_MESSAGE)]
    media_type: Name = MEDIA_JSON
    max_offline_ms: Total = MAX_OFFLINE_MS
    pay_input_micro: Total = 0
    pay_output_micro: Total = 0
    customer_class: Name = ""


class Revoke(Message, frozen=True, kw_only=True, tag="revoke"):
    """Give back ``lines`` of a lease (all if None). Attempts that run already go on if ``keep_running``."""

    lease_id: Name
    lines: Annotated[list[Line], Meta(max_length=MAX_ITEMS_PER_MESSAGE)] | None = None
    keep_running: bool = False


class Open(Message, frozen=True, kw_only=True, tag="open"):
    """Run one live request now. ``attempt`` counts the vehicles that tried; later ones get a checkpoint.

    ``prepare``: only read the prompt and the checkpoint, say so in a Tokens message without deltas, and hold the place
    until a later attempt of the same request goes on from there, or a Close. ``pay_*`` and ``customer_class`` as in a
    Grant.
    """

    request_id: Name
    attempt: Total
    kind: Kind
    model: Name
    stream: bool
    body: bytes
    checkpoint: Packed | None = None
    media_type: Name = MEDIA_JSON
    pay_input_micro: Total = 0
    pay_output_micro: Total = 0
    customer_class: Name = ""
    prepare: bool = False


class Close(Message, frozen=True, kw_only=True, tag="close"):
    """Nobody waits for this live request any more."""

    request_id: Name


class Sync(Message, frozen=True, kw_only=True, tag="sync"):
    """The cell has (re)started: report state now."""


class Statement(Message, frozen=True, kw_only=True, tag="statement"):
    """What the owner of this vehicle has earned in all, by the cell's books at ``as_of_ms`` of the cell's clock.

    Totals, so that a lost or repeated one changes nothing; of two the one with the later ``as_of_ms`` holds.
    ``lines_done`` are answers that counted, ``energy_uwh`` is the energy that was booked for them.
    """

    as_of_ms: Total
    earned_micro: Total
    lines_done: Total = 0
    tokens_generated: Total = 0
    energy_uwh: Total = 0
    currency: Name = ""


class OwnerDocument(Message, frozen=True, kw_only=True, tag="owner_document"):
    """A document that the owner has signed and that came by the cell: bytes that the vehicle checks by itself.

    The cell cannot make one. Repeating it changes nothing: every document carries its own date.
    """

    document: Document


class OwnerAct(StrEnum):
    """What a vehicle does at the cell's word that its owner asked for it: only less than without it."""

    PAUSE = "pause"
    NEED_CAR = "need_car"


class OwnerAsked(Message, frozen=True, kw_only=True, tag="owner_asked"):
    """The owner, known to the cell by its key, asks for no work until ``until_ms``. It never allows anything.

    Resuming needs a document that the owner has signed. A message whose ``until_ms`` has passed changes nothing, nor
    does a repeated one; of two pauses the longer holds. ``asked_ms``: when the owner asked, to be set against a later
    document.
    """

    act: OwnerAct
    asked_ms: Total
    until_ms: Total


# -- vehicle to cell ---------------------------------------------------------------------------------------------------


class State(Message, frozen=True, kw_only=True, tag="state"):
    """What a vehicle is doing. Sent on change and at least every few seconds; ``seq`` grows within an incarnation.

    ``held`` lists the leases that the vehicle still holds. Counters are totals since the incarnation began.
    ``stay_bound_ms`` is a lower bound (90 %) of how much longer the car stays, ``risk_15min`` the chance that it leaves
    within 15 minutes; both None while nothing is known. When and where it usually leaves stays in the car.
    ``memory_gb`` (10^9 bytes) is what an engine may have at most, ``models_on_disk`` are the models of the catalogue
    that lie here; of both None says nothing new.
    """

    incarnation: Name
    seq: Total
    state: VehicleState
    region: Name = "local"
    permit_w: Total = 0
    reasons: Annotated[list[Reason], Meta(max_length=64)] = []
    model: Name | None = None
    slots: Slots = 0
    running: Total = 0
    queued: Total = 0
    held: Annotated[list[Name], Meta(max_length=MAX_ITEMS_PER_MESSAGE)] = []
    tokens_generated: Total = 0
    tokens_per_s: float = 0.0
    energy_mwh: Total = 0
    energy_is_measured: bool = False
    engine: Name = ""  # name, build and model hash in one short string: equal strings give equal greedy output
    soc_pct: float | None = None
    plugged: bool | None = None
    tier: ModelTier = ModelTier.FULL
    battery_fed: bool = False
    stay_bound_ms: Total | None = None
    risk_15min: Risk | None = None
    memory_gb: Memory | None = None
    models_on_disk: Annotated[list[Name], Meta(max_length=MAX_ON_DISK)] | None = None


class CheckpointChoice(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The same of one choice among several; ``finish_reason`` is set if it has ended."""

    text: str = ""
    tokens: TokenCount = 0
    token_ids: list[int] = []
    logprobs: bytes = b""
    finish_reason: str | None = None
    calls: bytes = b""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What has been generated of one answer: enough for another vehicle to continue it. Opaque to the core.

    ``text`` is what was emitted, ``token_ids`` the ids of the same tokens where the engine reports them, ``logprobs``
    the JSON array of OpenAI's logprob entries so far if the request asked for them, ``prompt_tokens`` 0 if not known.
    ``calls`` is the JSON array of OpenAI's tool calls so far, whose last one may be cut anywhere.
    An answer with several choices has them in ``choices``, by their index, and here only the sum of their tokens.
    ``hold``: the engine only reads this and the prompt, and waits then.
    """

    text: str
    tokens: TokenCount
    token_ids: list[int] = []
    logprobs: bytes = b""
    prompt_tokens: TokenCount = 0
    choices: Annotated[list[CheckpointChoice], Meta(max_length=MAX_ITEMS_PER_MESSAGE)] = []
    hold: bool = False
    calls: bytes = b""


class CheckpointHead(msgspec.Struct, frozen=True, kw_only=True):
    """The same bytes without the ids of the tokens: how long an answer is costs a tenth to know."""

    text: str
    tokens: TokenCount
    logprobs: bytes = b""
    prompt_tokens: TokenCount = 0


class ProgressItem(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Tokens so far of one running attempt; ``tokens`` is what the checkpoint holds in all."""

    line: Line
    tokens: TokenCount
    checkpoint: bytes


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """Checkpoints of long answers, so that even a vehicle that vanishes loses little."""

    incarnation: Name
    lease_id: Name
    job_id: Name
    items: list[ProgressItem]


class ResultItem(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One finished attempt: the HTTP status and body that the customer gets, and the tokens.

    ``carried_tokens`` repeats how many tokens came with the checkpoint of the attempt.
    """

    line: Line
    status: Status
    body: bytes
    prompt_tokens: TokenCount = 0
    completion_tokens: TokenCount = 0
    cached_tokens: TokenCount = 0
    carried_tokens: TokenCount = 0


class Results(Message, frozen=True, kw_only=True, tag="results"):
    """Finished attempts of one lease. ``energy_mwh`` is what the vehicle drew for them, measured or modelled."""

    incarnation: Name
    message_id: Name
    lease_id: Name
    job_id: Name
    items: list[ResultItem]
    energy_mwh: Total = 0
    energy_is_measured: bool = False
    media_type: Name = MEDIA_JSON


class ReturnItem(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One attempt that was not finished, with what was generated of it."""

    line: Line
    tokens: TokenCount = 0
    checkpoint: bytes | None = None
    started: bool = False


class Returned(Message, frozen=True, kw_only=True, tag="returned"):
    """Attempts that the vehicle does not hold any more."""

    incarnation: Name
    message_id: Name
    lease_id: Name
    job_id: Name
    reason: ReturnReason
    items: list[ReturnItem]


class Delta(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """New text of one choice of a live request.

    ``logprobs`` is a JSON array of OpenAI's entries for the tokens of ``text``, empty if the request did not ask.
    ``finish_reason`` is set on the last delta of a choice. ``calls`` is a JSON array of new fragments of tool calls in
    OpenAI's form, empty for most.
    """

    index: int
    text: str
    token_ids: list[int] = []
    logprobs: bytes = b""
    finish_reason: str | None = None
    calls: bytes = b""


class Tokens(Message, frozen=True, kw_only=True, tag="tokens"):
    """New tokens of a live streamed request. ``seq`` starts at 0 for each attempt; the last one has ``usage``.

    One without deltas for an Open that asked to ``prepare`` says that everything has been read.
    """

    request_id: Name
    attempt: Total
    seq: Total
    deltas: list[Delta]
    usage: Usage | None = None
    engine: Name = ""


class Answered(Message, frozen=True, kw_only=True, tag="answered"):
    """The whole answer of a live request: the result of a plain one, or the error of any (status 400 and above)."""

    request_id: Name
    attempt: Total
    status: Status
    body: bytes
    usage: Usage = Usage()
    media_type: Name = MEDIA_JSON


class Broken(Message, frozen=True, kw_only=True, tag="broken"):
    """This vehicle cannot go on with a live request; another one should, from what was already emitted.

    ``energy_uwh`` is what it drew for the request all the same.
    """

    request_id: Name
    attempt: Total
    reason: ReturnReason
    checkpoint: Packed | None = None
    energy_uwh: EnergyUwh = 0
    energy_is_measured: bool = False


Down = Grant | Revoke | Open | Close | Sync | Statement | OwnerDocument | OwnerAsked
UpState = State | Progress
UpWork = Results | Returned
UpLive = Tokens | Answered | Broken

_encoder = msgspec.msgpack.Encoder()
_BAD: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what bytes that are no message raise
_T = TypeVar("_T")
DOWN: Final = msgspec.msgpack.Decoder(Down)
UP_STATE: Final = msgspec.msgpack.Decoder(UpState)
UP_WORK: Final = msgspec.msgpack.Decoder(UpWork)
UP_LIVE: Final = msgspec.msgpack.Decoder(UpLive)
_CHECKPOINT: Final = msgspec.msgpack.Decoder(Checkpoint)
_CHECKPOINT_HEAD: Final = msgspec.msgpack.Decoder(CheckpointHead)


def encode(message: Down | UpState | UpWork | UpLive) -> bytes:
    """Encode one message; raise TooLargeError over MAX_MESSAGE_BYTES or MAX_ITEMS_PER_MESSAGE."""
    items = getattr(message, "items", None)
    if items is not None and len(items) > MAX_ITEMS_PER_MESSAGE:
        raise TooLargeError(f"a message holds at most {MAX_ITEMS_PER_MESSAGE} items, not {len(items)}")
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise TooLargeError(f"a message is at most {MAX_MESSAGE_BYTES} bytes, not {len(data)}")
    return data


def decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes) -> _T:
    """Decode one message; raise CallerError if it is no message of this version."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise TooLargeError(f"a message is at most {MAX_MESSAGE_BYTES} bytes, not {len(data)}")
    try:
        message = decoder.decode(data)
    except _BAD as error:
        raise CallerError("not a message of this link", code="invalid_message") from error
    if len(getattr(message, "items", ())) > MAX_ITEMS_PER_MESSAGE:
        raise TooLargeError(f"a message holds at most {MAX_ITEMS_PER_MESSAGE} items")
    if getattr(message, "v", VERSION) != VERSION:
        raise CallerError(f"message version {getattr(message, 'v', None)} is not {VERSION}", code="unsupported_version")
    return message


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Pack a checkpoint; opaque from here on."""
    return _encoder.encode(checkpoint)


def decode_checkpoint(data: bytes) -> Checkpoint:
    """Unpack a checkpoint; raise CallerError if it is none."""
    try:
        return _CHECKPOINT.decode(data)
    except _BAD as error:
        raise CallerError("not a checkpoint", code="invalid_message") from error


def checkpoint_tokens(data: bytes) -> int:
    """How many tokens a checkpoint holds; raise CallerError if it is none. Its ids are not looked at."""
    try:
        return _CHECKPOINT_HEAD.decode(data).tokens
    except _BAD as error:
        raise CallerError("not a checkpoint", code="invalid_message") from error
