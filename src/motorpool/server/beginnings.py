"""Which vehicle has read the beginning of a conversation: its engine holds it, and need not read it again.

A conversation is known by its beginnings: all messages up to each one, as keyed hashes whose key never leaves this
process. Of two conversations with one system prompt the first beginning is the same.

Must not: keep a text, or choose. Called by: ``server.live_places``.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Raw

MAX_KNOWN: Final = 32_768  # beginnings, the latest ones
MAX_BEGINNINGS: Final = 16  # of one conversation, the longest ones
MAX_READERS: Final = 4
_BYTES: Final = 8
_KEY: Final = secrets.token_bytes(32)


class _Conversation(msgspec.Struct):
    messages: list[Raw] = []
    tools: Raw = Raw(b"")  # they stand before the messages in what a model reads


_conversation: Final = msgspec.json.Decoder(_Conversation)


def beginnings_of(model: str, body: bytes) -> tuple[int, ...]:
    """The beginnings of a chat request's conversation, the longest first; none of what is no conversation."""
    try:
        found = _conversation.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ()
    so_far = hashlib.blake2b(model.encode(), key=_KEY, digest_size=_BYTES)
    so_far.update(bytes(found.tools))
    known = []
    for message in found.messages:
        so_far.update(b"\0")
        so_far.update(bytes(message))
        known.append(int.from_bytes(so_far.copy().digest(), "little"))
    return tuple(known[: -MAX_BEGINNINGS - 1 : -1])


class Readers:
    """Who has read which beginning last."""

    def __init__(self, most: int = MAX_KNOWN) -> None:
        self._most = most
        self._who: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._who)

    def read(self, beginnings: Sequence[int], vehicle_id: str) -> None:
        """A vehicle is about to read this conversation."""
        for beginning in reversed(beginnings):  # so that the longest is forgotten last
            self._who[beginning] = vehicle_id
            self._who.move_to_end(beginning)
        while len(self._who) > self._most:
            self._who.popitem(last=False)

    def of(self, beginnings: Sequence[int]) -> list[str]:
        """Vehicles that have read of this conversation, the one with the longest beginning first."""
        found = dict.fromkeys(self._who[beginning] for beginning in beginnings if beginning in self._who)
        return list(found)[:MAX_READERS]
