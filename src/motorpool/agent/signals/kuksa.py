"""A vehicle's signals from a KUKSA databroker, over gRPC ``kuksa.val.v2``.

Decides: which paths to ask for, and how old a value is. Must not: write anything to the broker; this module holds the
names of four methods that read, and of none that publishes or actuates. It raises nothing for what a broker says.
Called by: ``agent.main``, where the configuration names a broker; nothing else imports grpc.

How old is a value? A databroker sends changes only, and a parked car's door may stay shut for days, so the time stamp
of a value is not its age; and the clock of the part of the car that made the stamp may be wrong, so no stamp is ever
taken for a time: it only counts whether it differs from the one before. Two things must hold for a value to be young:

1. The broker lives and still has this value: it said so in an answer to ``GetValues`` (asked every ``poll_ms``), or it
   has just pushed it. An answer counts from when it was asked for.
2. The provider behind the broker lives: the value itself was renewed, or its provider's heartbeat was: a path such as
   the voltage of the 12 V battery or ``Vehicle.Compute.Heartbeat``, whose stamp or value goes on changing. A value is
   never younger than the latest heartbeat plus ``heartbeat_grace_ms``. A car whose doors and battery have providers of
   their own names a heartbeat for each (``heartbeats``, by prefix of the path; the longest prefix counts).

The first value of a heartbeat proves nothing, since it may be as old as the broker: it is the second that counts. While
the broker is gone nothing is confirmed, so every signal turns stale by itself and work stops.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self

import grpc
import grpc.aio
import msgspec
from google.protobuf.message import DecodeError

from motorpool.agent.signals import vss
from motorpool.agent.signals.assemble import Assembler
from motorpool.agent.signals.kuksa_proto import types_pb2, val_pb2
from motorpool.agent.signals.regions import Region
from motorpool.core.signals import TABLE, Signals
from motorpool.errors import SetupError

log = logging.getLogger(__name__)

SERVICE: Final = "/kuksa.val.v2.VAL/"
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024  # the list of all paths of a large car is about a tenth of it
CALL_S: Final = 2.0
LIST_S: Final = 10.0
FIRST_WAIT_S: Final = 0.25
LONGEST_WAIT_S: Final = 5.0
BUFFERED: Final = 256  # with less, a slow reader could lose an open door behind a change of speed
SLOW_EVERY: Final = 3  # polls; what may be older than the owner's signals is asked for less often
LOOK_AGAIN_MS: Final = 300_000  # for paths that the broker did not know before
MAX_TOKEN_BYTES: Final = 16_384
NEVER_MS: Final = 0
NOT_THERE: Final = frozenset(
    {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT}
)
NO_LIST: Final = NOT_THERE | {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED}  # or one too long
HEARTBEATS: Final[Mapping[str, tuple[str, ...]]] = {"Vehicle": (vss.HEARTBEAT, vss.LOW_VOLTAGE)}


class KuksaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where the broker is and how it is read. ``ca_path`` turns TLS on; the token's file holds a token of scope read.

    ``zone`` is the car's time zone, for times that it tells without one.
    """

    address: str = "127.0.0.1:55555"
    token_path: Path | None = None
    ca_path: Path | None = None
    server_name: str | None = None
    regions: tuple[Region, ...] = ()
    zone: str = "UTC"
    heartbeats: dict[str, tuple[str, ...]] = msgspec.field(default_factory=lambda: dict(HEARTBEATS))
    heartbeat_grace_ms: int = 1_000
    poll_ms: int = 800


class _Reader:
    """The four methods of the service VAL that the agent calls. There is no other call in this module."""

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata
        self._requests: dict[tuple[str, ...], Any] = {}  # the same few again and again

    async def paths(self) -> set[str]:
        """Every path that the broker tells of."""
        request = val_pb2.ListMetadataRequest(root="Vehicle")
        answer = await self._ask("ListMetadata", request, val_pb2.ListMetadataResponse, LIST_S)
        return {entry.path for entry in answer.metadata}

    async def value(self, path: str) -> None:
        """Ask for one path, to see whether it can be read."""
        request = val_pb2.GetValueRequest(signal_id=types_pb2.SignalID(path=path))
        await self._ask("GetValue", request, val_pb2.GetValueResponse, CALL_S)

    async def values(self, paths: tuple[str, ...]) -> list[Any]:
        """The latest value of each path, in the same order."""
        request = self._requests.get(paths)
        if request is None:
            ids = [types_pb2.SignalID(path=path) for path in paths]
            request = self._requests[paths] = val_pb2.GetValuesRequest(signal_ids=ids)
        answer = await self._ask("GetValues", request, val_pb2.GetValuesResponse, CALL_S)
        return list(answer.data_points)

    async def changes(self, paths: tuple[str, ...]) -> AsyncIterator[Any]:
        """The values of these paths now, and then every change."""
        request = val_pb2.SubscribeRequest(signal_paths=paths, buffer_size=BUFFERED)
        call = self._channel.unary_stream(f"{SERVICE}Subscribe", request_serializer=_encoded)
        async for data in call(request, metadata=self._metadata):
            yield _decoded(val_pb2.SubscribeResponse, data)

    async def _ask(self, name: str, request: Any, kind: Any, limit_s: float) -> Any:
        call = self._channel.unary_unary(f"{SERVICE}{name}", request_serializer=_encoded)
        return _decoded(kind, await call(request, metadata=self._metadata, timeout=limit_s))


def _encoded(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _decoded(kind: Any, data: bytes) -> Any:
    """The message in ``data``; grpc itself would give None for one that cannot be read."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ValueError("the databroker answered with something that is no message of kuksa.val.v2") from error


class KuksaSource:
    """A SignalSource that follows a databroker while it is entered: ``async with KuksaSource(...) as source``."""

    def __init__(self, config: KuksaConfig, clock: Callable[[], int]) -> None:
        self._config = config
        self._clock = clock
        self._assembler = Assembler(config.regions, config.zone)
        self._callbacks: list[Callable[[], None]] = []
        self._stamps: dict[str, tuple[object, ...]] = {}  # what was last seen of each path
        self._renewed_ms: dict[str, int] = {}  # when that last changed
        self._pushes = 0
        self._pushed: dict[str, int] = {}  # the number of the latest push of each path
        self._heartbeats_of: dict[str, tuple[str, ...]] = {}
        self._task: asyncio.Task[None] | None = None
        self._trouble = ""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def read(self, now_ms: int) -> Signals:
        """The latest readings; those that nobody confirmed lately are old."""
        return self._assembler.signals(now_ms)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` in the event loop when a signal that matters at once has changed."""
        self._callbacks.append(callback)

    # -- the connection ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Follow the broker for ever, through its restarts."""
        wait_s = FIRST_WAIT_S
        while True:
            began_ms = self._clock()
            try:
                await self._follow()
                trouble = "the broker ended the subscription"
            except* (grpc.RpcError, grpc.aio.BaseError, SetupError, OSError, ValueError) as group:
                trouble = _in_words(group)
            self._tell(trouble)
            lasted = self._clock() - began_ms > LONGEST_WAIT_S * 1000
            wait_s = FIRST_WAIT_S if lasted else min(wait_s * 2, LONGEST_WAIT_S)
            await asyncio.sleep(wait_s)

    def _tell(self, trouble: str) -> None:
        """Say what is wrong once, not at each try."""
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("no signals from the databroker: %s; work stops until it is back", trouble)

    async def _follow(self) -> None:
        async with _channel(self._config) as channel:
            reader = _Reader(channel, _credentials(self._config.token_path))
            paths = await self._discover(reader)
            if not paths:
                raise SetupError("the databroker knows none of the paths that feed the guard", code="no_vss_paths")
            self._heartbeats_of = {path: self._heartbeats(path, paths) for path in paths}
            async with asyncio.TaskGroup() as group:
                polls = group.create_task(self._poll(reader, paths))
                listens = group.create_task(self._listen(reader, paths))
                await asyncio.wait((polls, listens), return_when=asyncio.FIRST_COMPLETED)
                polls.cancel()
                listens.cancel()

    async def _discover(self, reader: _Reader) -> tuple[str, ...]:
        """The paths that can be read: those of the broker's list, or what is left of all after trying each."""
        place = bool(self._config.regions)
        extra = {path for paths in self._config.heartbeats.values() for path in paths}
        try:
            known = await reader.paths()
        except grpc.aio.AioRpcError as error:
            if error.code() not in NO_LIST:
                raise
            known = set()
        found = tuple(sorted({*vss.wanted(known, place=place), *(extra & known)}))
        tries = found or tuple(sorted({*vss.candidates(place=place), *extra}))
        try:
            await reader.values(tries)
        except grpc.aio.AioRpcError as error:
            if error.code() not in NOT_THERE:
                raise
        else:
            return tries
        return tuple([path for path in tries if await self._readable(reader, path)])

    @staticmethod
    async def _readable(reader: _Reader, path: str) -> bool:
        try:
            await reader.value(path)
        except grpc.aio.AioRpcError as error:
            if error.code() in NOT_THERE:
                return False
            raise
        return True

    def _heartbeats(self, path: str, known: Iterable[str]) -> tuple[str, ...]:
        prefixes = [prefix for prefix in self._config.heartbeats if f"{path}.".startswith(f"{prefix}.")]
        if not prefixes:
            return ()
        named = self._config.heartbeats[max(prefixes, key=len)]
        return tuple(name for name in named if name in known)

    async def _listen(self, reader: _Reader, paths: tuple[str, ...]) -> None:
        """Take what the broker pushes: this is how an open door arrives.

        Numbers that go up and down all day, such as voltages, are only asked for: they would keep the agent awake.
        """
        asked = {path for path in paths if self._is_pushed(path)}
        async for message in reader.changes(tuple(sorted(asked)) or paths):
            now_ms = self._clock()
            self._pushes += 1
            self._take({path: point for path, point in message.entries.items() if path in asked}, now_ms)

    @staticmethod
    def _is_pushed(path: str) -> bool:
        entry = vss.entry_of(path)
        if entry is None:
            return False
        return _is_fast(path) or (entry.kind is not vss.Kind.NUMBER and not vss.URGENT.isdisjoint(entry.signals))

    async def _poll(self, reader: _Reader, paths: tuple[str, ...]) -> None:
        """Ask again and again, which shows that the broker lives and that what it has is what we have."""
        beats = {beat for beats in self._heartbeats_of.values() for beat in beats}
        fast = tuple(path for path in paths if path in beats or _is_fast(path))
        look_again_ms = self._clock() + LOOK_AGAIN_MS
        turn = 0
        while True:
            asked = paths if turn % SLOW_EVERY == 0 else fast
            turn += 1
            if asked:
                asked_ms, pushes = self._clock(), self._pushes
                points = await reader.values(asked)
                if len(points) != len(asked):
                    raise ValueError("the databroker answered with another number of values than it was asked for")
                self._take(dict(zip(asked, points, strict=True)), asked_ms, pushes)
            if self._trouble:
                self._trouble = ""
                log.info("signals from the databroker: %d paths", len(paths))
            if self._clock() >= look_again_ms:
                look_again_ms = self._clock() + LOOK_AGAIN_MS
                if await self._discover(reader) != paths:
                    return  # begin anew with the paths that there are now
            await asyncio.sleep(self._config.poll_ms / 1000)

    # -- the values ----------------------------------------------------------------------------------------------------

    def _take(self, points: Mapping[str, Any], at_ms: int, asked_after: int | None = None) -> None:
        """Values that the broker had at ``at_ms``: pushed, or an answer to what was asked after that many pushes.

        An answer never replaces what was pushed after it was asked for.
        """
        values = {}
        for path, point in points.items():
            if asked_after is None:
                self._pushed[path] = self._pushes
            elif self._pushed.get(path, 0) > asked_after:
                continue
            values[path] = value = _plain(point)
            entry = vss.entry_of(path)
            stamp: tuple[object, ...] = (point.timestamp.seconds, point.timestamp.nanos)
            if entry is None or not entry.place:  # a place is not kept a second time
                stamp = (*stamp, value)
            before = self._stamps.get(path)
            self._stamps[path] = stamp
            if before is not None and before != stamp and value is not None:
                self._renewed_ms[path] = max(self._renewed_ms.get(path, NEVER_MS), at_ms)
        changed: set[str] = set()
        for path, value in values.items():
            changed |= self._assembler.feed(path, value, self._age(path, at_ms))
        if not vss.URGENT.isdisjoint(changed):
            for callback in self._callbacks:
                callback()

    def _age(self, path: str, confirmed_ms: int) -> int:
        """When the value of ``path`` counts as measured: see the module's text."""
        beats = [self._renewed_ms.get(beat, NEVER_MS) for beat in self._heartbeats_of.get(path, ())]
        alive_ms = max(beats, default=NEVER_MS)
        shown_ms = min(confirmed_ms, alive_ms + self._config.heartbeat_grace_ms) if alive_ms else NEVER_MS
        return max(shown_ms, self._renewed_ms.get(path, NEVER_MS))


def _is_fast(path: str) -> bool:
    """Whether a path feeds a signal that may not be older than a few seconds."""
    entry = vss.entry_of(path)
    return entry is not None and any(TABLE[name].max_age_ms <= 2_000 for name in entry.signals)


def _plain(point: Any) -> object:
    """The Python value of a Datapoint; None for none, for NaN, and for what this version of the service has not."""
    kind = point.value.WhichOneof("typed_value")
    if kind is None:
        return None
    value = getattr(point.value, kind)
    if kind.endswith("_array"):
        return tuple(value.values)
    return None if isinstance(value, float) and math.isnan(value) else value


def _in_words(group: BaseExceptionGroup[BaseException]) -> str:
    """The first cause, without what the broker wrote: its text is not ours to trust or to keep."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, grpc.aio.AioRpcError):
        return f"gRPC {cause.code().name}"
    return str(cause) if isinstance(cause, SetupError | ValueError) else type(cause).__name__


def _channel(config: KuksaConfig) -> Any:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),
    ]
    if config.server_name is not None:
        options.append(("grpc.ssl_target_name_override", config.server_name))
    if config.ca_path is None:
        return grpc.aio.insecure_channel(config.address, options=options)
    try:
        trusted = config.ca_path.read_bytes()
    except OSError as error:
        text = f"cannot read the databroker's CA certificate {config.ca_path.name}: name a readable PEM file"
        raise SetupError(text, code="broker_ca") from error
    return grpc.aio.secure_channel(config.address, grpc.ssl_channel_credentials(trusted), options=options)


def _credentials(token_path: Path | None) -> tuple[tuple[str, str], ...]:
    """The header that shows the token. It is read anew at each connection, so that it can be replaced."""
    if token_path is None:
        return ()
    try:
        token = token_path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        text = f"cannot read the databroker's token {token_path.name}: name a readable file with one token in it"
        raise SetupError(text, code="broker_token") from error
    if not token.isprintable() or not token or len(token) > MAX_TOKEN_BYTES:
        raise SetupError(f"{token_path.name} does not hold one token: put the token alone in it", code="broker_token")
    return (("authorization", f"Bearer {token}"),)
