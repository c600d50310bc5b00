"""What a vehicle has to deliver: finished attempts that are gathered, and messages that are not durable yet.

Decides: how results and returned attempts are cut into messages, and which energy they carry. Must not: decide what is
finished or handed back; that is ``core.vehicle``, which alone calls this room.
"""

from __future__ import annotations

from typing import Final, TypeVar

from motorpool.core.vehicle_events import Command, PublishWork, VehicleConfig
from motorpool.core.vehicle_leases import Lease
from motorpool.types import ReturnReason
from motorpool.wire import ProgressItem, ResultItem, Results, Returned, ReturnItem

MAX_RETURN_ITEMS: Final = 1_024
MAX_ANSWER_UWH: Final = 10**10  # as much as one answer can carry; the next one carries the rest
_Part = TypeVar("_Part", ReturnItem, ProgressItem)


class Rate:
    """A moving average of things a second, over whole buckets of time."""

    __slots__ = ("_bucket_ms", "_count", "_since_ms", "_tau_ms", "value")

    def __init__(self, bucket_ms: int, tau_ms: int) -> None:
        self._bucket_ms = bucket_ms
        self._tau_ms = tau_ms
        self._since_ms: int | None = None
        self._count = 0
        self.value = 0.0

    def add(self, count: int, now_ms: int) -> float:
        """Count, close a bucket that is full, and return the average."""
        if self._since_ms is None:
            self._since_ms = now_ms
        self._count += count
        passed_ms = now_ms - self._since_ms
        if passed_ms >= self._bucket_ms:
            current = self._count * 1000 / passed_ms
            self.value += (current - self.value) * min(1.0, passed_ms / self._tau_ms)
            self._since_ms = now_ms
            self._count = 0
        return self.value


class Meter:
    """Energy in milliwatt-seconds (watts times milliseconds), as the shell tells it, measured or modelled.

    Where the shell does not, it is the engine's working time at the permit's power. Such a guess holds until the shell
    tells again; what was counted once is never taken back, and no joule is attributed twice.
    """

    __slots__ = (
        "_any_measured",
        "_any_modelled",
        "_attributed",
        "_busy_ms",
        "_drawn",
        "_guess",
        "_known",
        "_open",
        "_total",
    )

    def __init__(self) -> None:
        self._busy_ms = 0
        self._known = 0
        self._guess = 0  # since the shell told last
        self._drawn = 0  # what it told last
        self._total = 0
        self._attributed = 0
        self._open = False  # is there something modelled that is not attributed yet
        self._any_modelled = False
        self._any_measured = False

    @property
    def total_mwh(self) -> int:
        """Since the incarnation began."""
        return self._total // 3600

    @property
    def is_measured(self) -> bool:
        """Whether all of it was measured."""
        return self._any_measured and not self._any_modelled

    def engine_started(self) -> None:
        """The engine's own count begins again."""
        self._busy_ms = 0

    def count(self, busy_ms: int, watts_w: int) -> None:
        """The engine has worked ``busy_ms`` since its start, the latest part of it at ``watts_w``."""
        if busy_ms > self._busy_ms:
            self._guess += (busy_ms - self._busy_ms) * watts_w
            self._busy_ms = busy_ms
            self._modelled()
            self._total = max(self._total, self._known + self._guess)

    def draw(self, drawn_mws: int, *, is_measured: bool, busy_ms: int = 0) -> None:
        """The shell has told what was drawn in all; ``busy_ms`` of working time are in it."""
        more = max(0, drawn_mws - self._drawn)
        self._drawn += more
        self._known += more
        self._guess = 0
        self._busy_ms = max(self._busy_ms, busy_ms)
        self._total = max(self._total, self._known)
        if more and is_measured:
            self._any_measured = True
        elif more:
            self._modelled()

    def _modelled(self) -> None:
        self._open = self._any_modelled = True

    def attribute_mwh(self) -> tuple[int, bool]:
        """What was drawn since the last call, and whether all of it was measured: the share of what goes out now."""
        share = (self._total - self._attributed) // 3600
        return share, self._attribute(share * 3600)

    def attribute_uwh(self) -> tuple[int, bool]:
        """The same in micro-watt-hours, for an answer that goes out alone."""
        share = min((self._total - self._attributed) * 10 // 36, MAX_ANSWER_UWH)
        return share, self._attribute(-(-share * 36 // 10))

    def _attribute(self, mws: int) -> bool:
        is_measured = self._any_measured and not self._open
        self._attributed += mws
        if mws:
            self._open = False
        return is_measured

    def validate(self) -> None:
        """No energy is attributed twice."""
        assert 0 <= self._attributed <= self._total


class Outbox:
    """Gathers results by lease and remembers every message until it is durable. Appends its commands to ``out``."""

    def __init__(self, config: VehicleConfig, incarnation: str, meter: Meter, out: list[Command]) -> None:
        self._config = config
        self._incarnation = incarnation
        self._meter = meter
        self._out = out
        self._messages: dict[str, tuple[Lease, int, int]] = {}
        self._items = 0
        self._bytes = 0
        self._count = 0
        self.spool_full = False
        self.gathering: dict[int, Lease] = {}

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def full(self) -> bool:
        """Is so much undelivered that nothing new should be computed."""
        config = self._config
        return self.spool_full or self._items >= config.max_outbox_items or self._bytes >= config.max_outbox_bytes

    def gather(self, lease: Lease, item: ResultItem, now_ms: int) -> None:
        """Take one finished attempt; a full message goes out at once."""
        if not lease.gathered:
            self.gathering[lease.number] = lease
            lease.gathered_since_ms = now_ms
        lease.gathered.append(item)
        lease.gathered_bytes += len(item.body)
        config = self._config
        if len(lease.gathered) >= config.flush_items or lease.gathered_bytes >= config.flush_bytes:
            self.flush(lease)

    def flush(self, lease: Lease) -> None:
        """Send what a lease has gathered."""
        if not lease.gathered:
            return
        energy_mwh, is_measured = self._meter.attribute_mwh()
        message = Results(
            incarnation=self._incarnation,
            message_id=self._message_id(),
            lease_id=lease.lease_id,
            job_id=lease.job_id,
            items=lease.gathered,
            energy_mwh=energy_mwh,
            energy_is_measured=is_measured,
            media_type=lease.media_type,
        )
        size = lease.gathered_bytes
        lease.gathered = []
        lease.gathered_bytes = 0
        del self.gathering[lease.number]
        self._keep(lease, message, size)

    def flush_gathered(self, until_ms: int) -> None:
        """Send what was gathered first at ``until_ms`` or before."""
        for lease in [lease for lease in self.gathering.values() if lease.gathered_since_ms <= until_ms]:
            self.flush(lease)

    def give_back(self, lease: Lease, items: list[ReturnItem], reason: ReturnReason) -> None:
        """Send unfinished attempts back."""
        for part, size in chunks(items, self._config.flush_bytes):
            message = Returned(
                incarnation=self._incarnation,
                message_id=self._message_id(),
                lease_id=lease.lease_id,
                job_id=lease.job_id,
                reason=reason,
                items=part,
            )
            self._keep(lease, message, size)

    def published(self, message_id: str) -> Lease | None:
        """A message is durable; the lease that it belongs to, None for a message that is not known (any more)."""
        entry = self._messages.pop(message_id, None)
        if entry is None:
            return None
        lease, count, size = entry
        self._items -= count
        self._bytes -= size
        lease.undelivered -= 1
        return lease

    def due_ms(self) -> int | None:
        """When gathered results have waited long enough."""
        since_ms = min((lease.gathered_since_ms for lease in self.gathering.values()), default=None)
        return None if since_ms is None else since_ms + self._config.flush_ms

    def _message_id(self) -> str:
        self._count += 1
        return f"{self._incarnation}-{self._count}"

    def _keep(self, lease: Lease, message: Results | Returned, size: int) -> None:
        self._messages[message.message_id] = (lease, len(message.items), size)
        self._items += len(message.items)
        self._bytes += size
        lease.undelivered += 1
        self._out.append(PublishWork(message=message))

    def validate(self, leases: dict[str, Lease]) -> None:
        """Every message belongs to a held lease, and the counts are right; AssertionError otherwise."""
        undelivered: dict[int, int] = {}
        for lease, _, _ in self._messages.values():
            undelivered[lease.number] = undelivered.get(lease.number, 0) + 1
            assert leases.get(lease.lease_id) is lease, "a lease is held until its messages are durable"
        for lease in leases.values():
            assert lease.undelivered == undelivered.get(lease.number, 0)
            assert bool(lease.gathered) == (lease.number in self.gathering), "what is gathered is flushed"
            assert lease.gathered_bytes == sum(len(item.body) for item in lease.gathered)
        assert self._items == sum(count for _, count, _ in self._messages.values())
        assert self._bytes == sum(size for _, _, size in self._messages.values())


def chunks(items: list[_Part], max_bytes: int) -> list[tuple[list[_Part], int]]:
    """Cut items into messages of at most MAX_RETURN_ITEMS and ``max_bytes`` (or one item); each with its bytes."""
    parts: list[tuple[list[_Part], int]] = []
    part: list[_Part] = []
    size = 0
    for item in items:
        more = len(item.checkpoint or b"")
        if part and (len(part) >= MAX_RETURN_ITEMS or size + more > max_bytes):
            parts.append((part, size))
            part, size = [], 0
        part.append(item)
        size += more
    if part:
        parts.append((part, size))
    return parts
