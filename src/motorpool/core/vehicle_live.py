"""The live requests of a vehicle: somebody waits for each of them, token by token or for the whole answer.

Decides: what is told to whoever waits, in messages of a bounded size, and when a request is broken off. Must not:
decide whether the vehicle may work; that is ``core.vehicle``, which alone calls this room and hands its commands on.

A request that cannot go on here ends in Broken, with what was generated, so that another vehicle goes on. While the
link is down tokens are lost, so that a stream is of no use: it is stopped, and told as broken afterwards. A request
that may soon come here is prepared: its attempt only reads the prompt and holds its place in the engine, until a later
attempt of the same request takes that place over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeVar

import msgspec

from motorpool.core.vehicle_events import (
    Attempt,
    CancelAttempts,
    Command,
    FinishedAttempt,
    PublishLive,
    SubmitAttempts,
    VehicleConfig,
)
from motorpool.core.vehicle_leases import LiveRun, join
from motorpool.core.vehicle_outbox import Meter
from motorpool.errors import CallerError, TooLargeError
from motorpool.types import MAX_BODY_BYTES, Kind, ReturnReason, Usage
from motorpool.wire import Answered, Broken, Checkpoint, Delta, Open, Tokens, decode_checkpoint, encode_checkpoint

TOO_LARGE: Final = msgspec.json.encode(TooLargeError(f"an answer is at most {MAX_BODY_BYTES} bytes").envelope())
_TOKEN_BYTES: Final = 9  # of one id in a message, at most
_DELTA_BYTES: Final = 64  # of everything else in a delta
_Value = TypeVar("_Value")


class LiveRequests:
    """Those that the engine runs now, by the key of their attempt. Appends its commands to ``out``."""

    def __init__(self, config: VehicleConfig, meter: Meter, out: list[Command]) -> None:
        self._config = config
        self._meter = meter
        self._out = out
        self._runs: dict[str, LiveRun] = {}
        self._keys: dict[str, str] = {}  # by request
        self._opened: dict[str, int] = {}  # the latest attempt of each request, so that a late one changes nothing
        self._holding: set[str] = set()  # keys of attempts that only hold a place
        self._count = 0
        self._link_up = True
        self._cut_off: list[Broken] = []  # ended while the link was down
        self.engine = ""  # the fingerprint of the engine that answers

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def get(self, key: str) -> LiveRun | None:
        """The request that an attempt is for."""
        return self._runs.get(key)

    def open(self, message: Open, *, accepted: bool, created_s: int) -> None:
        """Begin a request, or refuse it. An attempt that came before, or a later one, wins."""
        if self._opened.get(message.request_id, -1) >= message.attempt:
            return
        self._opened[message.request_id] = message.attempt
        forget_oldest(self._opened, self._config.max_closed)
        before = self._keys.get(message.request_id)
        held = before in self._holding
        if before is not None:
            self._forget(self._runs[before])
            if not held:
                self._out.append(CancelAttempts(keys=[before]))
        if accepted and len(self._runs) < self._config.max_live:
            self._begin(message, created_s)
        else:
            broken = Broken(
                request_id=message.request_id,
                attempt=message.attempt,
                reason=ReturnReason.REFUSED,
                checkpoint=message.checkpoint,
            )
            self._out.append(PublishLive(message=broken))
        if before is not None and held:  # after its successor, so that the engine gives that one the place
            self._out.append(CancelAttempts(keys=[before]))

    def _begin(self, message: Open, created_s: int) -> None:
        self._count += 1
        run = LiveRun(
            key=f"live-{self._count}",
            request_id=message.request_id,
            attempt=message.attempt,
            kind=message.kind,
            stream=message.stream,
            carried=message.checkpoint,
        )
        self._runs[run.key] = run
        self._keys[run.request_id] = run.key
        if message.prepare:
            self._holding.add(run.key)
        attempt = Attempt(
            key=run.key,
            kind=message.kind,
            body=message.body,
            response_id=response_id(message.kind, message.request_id),
            stream=message.stream,
            checkpoint=_to_hold(message.checkpoint) if message.prepare else message.checkpoint,
        )
        self._out.append(SubmitAttempts(attempts=[attempt], created_s=created_s))

    def close(self, request_id: str) -> None:
        """Nobody waits any more."""
        key = self._keys.get(request_id)
        if key is not None:
            self._forget(self._runs[key])
            self._out.append(CancelAttempts(keys=[key]))

    def progressed(self, run: LiveRun, deltas: list[Delta]) -> None:
        """Pass new tokens of a stream on, in as many messages as their size asks for."""
        if run.key in self._holding:
            self._read(run, goes_on=bool(deltas))
            return
        if not run.stream:
            return
        part: list[Delta] = []
        size = 0
        for delta in deltas:
            more = size_of(delta)
            if more > self._config.max_live_bytes:
                self._too_large(run)
                return
            if part and size + more > self._config.max_live_bytes:
                self._tell(run, part)
                part, size = [], 0
            part.append(delta)
            size += more
        if part:
            self._tell(run, part)

    def finished(self, done: FinishedAttempt) -> int:
        """Answer; the number of tokens that were not seen before."""
        run = self._runs.get(done.key)
        if run is None:
            return 0
        if run.key in self._holding:
            if done.status < 400:
                self._read(run, goes_on=False)
            self._forget(run)
            if done.status >= 400:
                self._refuse(run)
            return 0
        self._forget(run)
        energy_uwh, is_measured = self._meter.attribute_uwh()
        usage = msgspec.structs.replace(done.usage, energy_uwh=energy_uwh, energy_is_measured=is_measured)
        if run.stream and done.status < 400:
            self._tell(run, [], usage)
        elif len(done.body) > MAX_BODY_BYTES:
            self._answer(run, TooLargeError.status, TOO_LARGE, usage)
        else:
            self._answer(run, done.status, done.body, usage)
        return max(0, usage.completion_tokens - usage.carried_tokens - (run.growth.tokens if run.growth else 0))

    def _read(self, run: LiveRun, *, goes_on: bool) -> None:
        """What was to be read is read. An engine that ``goes_on`` cannot hold: what it has read is in its cache."""
        if run.seq == 0:
            self._tell(run, [])
        if goes_on:
            self._forget(run)
            self._out.append(CancelAttempts(keys=[run.key]))

    def _refuse(self, run: LiveRun) -> None:
        message = Broken(request_id=run.request_id, attempt=run.attempt, reason=ReturnReason.REFUSED)
        self._out.append(PublishLive(message=message))

    def break_off(self, key: str, reason: ReturnReason) -> None:
        """This request cannot go on here; an unknown one is ignored."""
        run = self._runs.get(key)
        if run is None:
            return
        self._forget(run)
        checkpoint, _ = join(run.carried, 0, run.growth)  # whoever gets it counts its tokens
        message = Broken(request_id=run.request_id, attempt=run.attempt, reason=reason, checkpoint=checkpoint)
        if self._link_up:
            self._out.append(PublishLive(message=message))
        else:
            self._cut_off.append(message)

    def break_all(self, reason: ReturnReason) -> None:
        """None can go on here."""
        for key in list(self._runs):
            self.break_off(key, reason)

    def link_changed(self, *, up: bool) -> None:
        """Stop streams whose tokens are lost; tell of them when the link is back."""
        self._link_up = up
        if up:
            self._out.extend(PublishLive(message=broken) for broken in self._cut_off)
            self._cut_off = []
        elif self._runs:
            self._out.append(CancelAttempts(keys=list(self._runs)))
            self.break_all(ReturnReason.EXPIRED)

    def validate(self) -> None:
        """Both tables say the same; AssertionError otherwise."""
        assert {run.request_id: key for key, run in self._runs.items()} == self._keys
        assert self._holding <= self._runs.keys()
        assert len(self._opened) <= self._config.max_closed

    def _tell(self, run: LiveRun, deltas: list[Delta], usage: Usage | None = None) -> None:
        message = Tokens(
            request_id=run.request_id,
            attempt=run.attempt,
            seq=run.seq,
            deltas=deltas,
            usage=usage,
            engine=self.engine,
        )
        run.seq += 1
        self._out.append(PublishLive(message=message))

    def _answer(self, run: LiveRun, status: int, body: bytes, usage: Usage) -> None:
        message = Answered(request_id=run.request_id, attempt=run.attempt, status=status, body=body, usage=usage)
        self._out.append(PublishLive(message=message))

    def _too_large(self, run: LiveRun) -> None:
        """No message can carry this; another vehicle would come to the same end."""
        self._forget(run)
        self._out.append(CancelAttempts(keys=[run.key]))
        self._answer(run, TooLargeError.status, TOO_LARGE, Usage())

    def _forget(self, run: LiveRun) -> None:
        del self._runs[run.key]
        self._keys.pop(run.request_id, None)
        self._holding.discard(run.key)


def _to_hold(checkpoint: bytes | None) -> bytes:
    """The same checkpoint for an engine that is only to read it."""
    found = Checkpoint(text="", tokens=0)
    if checkpoint is not None:
        try:
            found = decode_checkpoint(checkpoint)
        except CallerError:  # the engine could not make sense of it either, and would begin at the start
            found = Checkpoint(text="", tokens=0)
    return encode_checkpoint(msgspec.structs.replace(found, hold=True))


def size_of(delta: Delta) -> int:
    """Bytes of a delta in a message, at most."""
    packed = len(delta.logprobs) + len(delta.calls)
    return 4 * len(delta.text) + _TOKEN_BYTES * len(delta.token_ids) + packed + _DELTA_BYTES


def response_id(kind: Kind, name: str) -> str:
    """The ``id`` that stands in an answer."""
    return f"{'chatcmpl' if kind is Kind.CHAT else 'cmpl'}-{name}"


def forget_oldest(table: dict[str, _Value], size: int) -> None:
    """Forget the oldest entries beyond ``size``."""
    while len(table) > size:
        del table[next(iter(table))]
