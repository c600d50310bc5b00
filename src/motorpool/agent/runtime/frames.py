"""Between an engine's process and the agent: length-prefixed MessagePack over a socket pair, and a lifeline.

Decides nothing. Must not: leave the machine; this is no part of the vehicle link and may change at any time.
Called by: ``hosted`` (the agent's side) and ``host`` (the engine's side).
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from typing import Final

import msgspec

from motorpool.agent.runtime.engine import Cancelled, Finished, Progressed, Ready, Work
from motorpool.agent.runtime.limits import Confine
from motorpool.agent.runtime.spec import EngineSpec
from motorpool.errors import EngineError

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
MAX_WORK_PER_FRAME: Final = 256
MAX_WORK_BYTES: Final = 64 * 1024 * 1024  # of bodies and checkpoints in a frame, unless one alone is larger
MAX_EVENTS_PER_FRAME: Final = 512
_HEADER_BYTES: Final = 4
_UNTIL_S: Final = struct.Struct("d")
_CUT: Final = struct.Struct("?")  # behind it
_LIFELINE_BYTES: Final = _UNTIL_S.size + _CUT.size


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the engine: what to be, and what to hold itself to. The first message."""

    spec: EngineSpec
    slots: int
    confine: Confine = Confine()


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the engine: attempts to run."""

    work: list[Work]


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the engine: attempts to drop."""

    keys: list[str]


class Limit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the engine: how many attempts it may run at a time from now on."""

    slots: int


class Begun(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the engine: it will end with its agent, also when it is stopped. Its first message."""


class Broken(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the engine: why it cannot go on. Its process ends after this."""

    message: str
    code: str


ToEngine = Load | Submit | Cancel | Limit
FromEngine = Begun | Ready | Progressed | Finished | Cancelled | Broken
TO_ENGINE: Final = msgspec.msgpack.Decoder(ToEngine)
FROM_ENGINE: Final = msgspec.msgpack.Decoder(list[FromEngine])
_encoder = msgspec.msgpack.Encoder()


def pack(message: ToEngine) -> bytes:
    """One message to the engine as it stands on the socket."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise EngineError(f"a message to the engine is at most {MAX_FRAME_BYTES} bytes, not {len(body)}")
    return len(body).to_bytes(_HEADER_BYTES, "big") + body


def pack_work(work: list[Work]) -> list[bytes]:
    """Attempts in as many messages as their number and size ask for."""
    out: list[bytes] = []
    part: list[Work] = []
    size = 0
    for one in work:
        more = len(one.body) + len(one.checkpoint or b"")
        if part and (len(part) >= MAX_WORK_PER_FRAME or size + more > MAX_WORK_BYTES):
            out.append(pack(Submit(work=part)))
            part, size = [], 0
        part.append(one)
        size += more
    if part:
        out.append(pack(Submit(work=part)))
    return out


def pack_events(events: list[FromEngine], max_bytes: int = MAX_FRAME_BYTES) -> list[bytes]:
    """Events in as many messages as their number and size ask for.

    An attempt with an event that fits into none is given up: Cancelled takes its place.
    """
    if len(events) > MAX_EVENTS_PER_FRAME:
        cuts = range(0, len(events), MAX_EVENTS_PER_FRAME)
        return [data for at in cuts for data in pack_events(events[at : at + MAX_EVENTS_PER_FRAME], max_bytes)]
    body = _encoder.encode(events)
    if len(body) <= max_bytes:
        return [len(body).to_bytes(_HEADER_BYTES, "big") + body]
    if len(events) > 1:
        half = len(events) // 2
        return pack_events(events[:half], max_bytes) + pack_events(events[half:], max_bytes)
    event = events[0]
    if not isinstance(event, Progressed | Finished):
        raise EngineError("the engine has too much to say about itself")
    return pack_events([Cancelled(key=event.key)], max_bytes)


class Unpacker:
    """Cuts a stream of bytes into messages, whatever the pieces that it arrives in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes; return the messages that are complete now."""
        buffer = self._buffer
        buffer += data
        out = []
        at = 0
        while len(buffer) - at >= _HEADER_BYTES:
            size = int.from_bytes(buffer[at : at + _HEADER_BYTES], "big")
            if size > MAX_FRAME_BYTES:
                raise EngineError("the engine's process sent something that is no message")
            end = at + _HEADER_BYTES + size
            if len(buffer) < end:
                break
            out.append(bytes(buffer[at + _HEADER_BYTES : end]))
            at = end
        del buffer[:at]
        return out


class Lifeline:
    """One number that all sides see: until when the engine may go on without a word from its agent.

    It lies in shared memory and is no message, because an engine that is frozen or gets no processor time reads none,
    and must not take that for silence. Its clock is the same in all processes, and stands still while the machine
    sleeps. Beside it stands whether the engine was ended for silence: who is killed cannot say so.
    """

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, _LIFELINE_BYTES)

    @staticmethod
    def make() -> int:
        """A descriptor of a new one, for both ends; the caller closes it when both have it."""
        descriptor = os.memfd_create("motorpool-lifeline")
        os.ftruncate(descriptor, _LIFELINE_BYTES)
        return descriptor

    def extend(self, seconds: float) -> None:
        """The engine may go on for so long from now."""
        _UNTIL_S.pack_into(self._page, 0, time.monotonic() + seconds)

    @property
    def over(self) -> bool:
        """Has the time run out."""
        until_s: float = _UNTIL_S.unpack_from(self._page)[0]
        return time.monotonic() > until_s

    def cut(self) -> None:
        """Whoever is about to end the engine for silence says so here first."""
        _CUT.pack_into(self._page, _UNTIL_S.size, True)

    @property
    def was_cut(self) -> bool:
        """Was the engine ended for silence."""
        return bool(_CUT.unpack_from(self._page, _UNTIL_S.size)[0])

    def close(self) -> None:
        """Let go of this end."""
        self._page.close()
