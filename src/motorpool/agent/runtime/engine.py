"""What every engine offers to the agent, and the events that it sends back.

An engine runs several attempts at once. Its methods return at once; what happens later arrives as a list of events in
the callback given to ``start``. ``freeze`` must leave no processor time to the engine within milliseconds, ``kill``
ends it for good; both work while the engine is busy. After ``kill`` or ``Died`` the same object can be started again.

Called by: ``agent.loop``. Must not: know of leases, vehicles or permits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

import msgspec

from motorpool.core.energy import Limits
from motorpool.types import Kind, Usage
from motorpool.wire import Delta

EXIT_SILENCE: Final = 5  # of an engine's process that was not told in time that it may go on


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt for the engine.

    ``key`` is unique among the attempts that run in one engine. ``stream`` asks for a Delta event for every token as
    soon as it is there; without it deltas may be gathered for up to 100 ms, and an engine that finishes at once need
    send none. ``checkpoint`` is an encoded ``wire.Checkpoint``: the answer continues after it, and the final body, its
    usage and its logprobs cover the whole answer. ``response_id`` stands as ``id`` in the final body.
    """

    key: str
    kind: Kind
    body: bytes
    response_id: str
    created_s: int
    stream: bool = False
    checkpoint: bytes | None = None


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded. ``fingerprint`` names engine, build and model hash; ``slots`` run at the same time."""

    model: str
    slots: int
    context_tokens: int
    fingerprint: str


class Progressed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """New tokens of one attempt; only those generated here, never the checkpoint again.

    The ``token_ids`` of all deltas together are as many as the tokens that are billed; an id that the engine does not
    know is -1.
    """

    key: str
    deltas: list[Delta]


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The end of one attempt: the status and body that the customer gets, errors of the request's own making included.

    ``usage.completion_tokens`` counts the whole answer, ``usage.carried_tokens`` the part from the checkpoint.
    """

    key: str
    status: int
    body: bytes
    usage: Usage


class Cancelled(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The attempt was cancelled and uses nothing any more."""

    key: str


class Died(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine ended (``exit_code``, negative for a signal) or could not start; every attempt in it is gone."""

    exit_code: int | None
    message: str = ""


EngineEvent = Ready | Progressed | Finished | Cancelled | Died
OnEvents = Callable[[list[EngineEvent]], None]


class Engine(Protocol):
    """One engine with at most one loaded model."""

    async def start(self, on_events: OnEvents) -> None:
        """Begin loading; Ready or Died follows. Starting a started engine is an error."""

    def submit(self, work: list[Work]) -> None:
        """Queue attempts; the engine runs ``slots`` of them at a time, in order."""

    def cancel(self, keys: list[str]) -> None:
        """Stop attempts; each unfinished one answers Cancelled. Unknown keys are ignored."""

    def freeze(self) -> None:
        """Stop all computing at once, keeping memory; doing it twice is doing it once."""

    def thaw(self) -> None:
        """Go on after ``freeze``."""

    def kill(self) -> None:
        """End the engine at once and give its memory back; works on a frozen one. No Died event follows."""

    def limit(self, limits: Limits) -> None:
        """Hold it to less, or let it have more again.

        Duty cycle and slots take effect at once, on a running engine as well; threads and memory when it loads.
        """

    def busy_ms(self) -> int:
        """Milliseconds of engine time spent on loading and on attempts since the start (slot-seconds by slots)."""

    def cpu_ms(self) -> int:
        """Processor time that its process has used since the start, by the kernel's count; after its end the last."""

    async def close(self) -> None:
        """Kill and release everything."""


@runtime_checkable
class Watched(Protocol):
    """An engine that goes on computing when the agent's event loop hangs, and so must hear that it may go on."""

    def beat(self) -> None:
        """The agent has looked, and the engine may go on for a while; without this it ends itself."""
