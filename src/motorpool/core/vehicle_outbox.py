"""What a vehicle has to deliver: finished attempts that are gathered, and messages that are not durable yet.

Decides: how results and returned attempts are cut into messages, and which energy they carry. Must not: decide what is
finished or handed back; that is ``core.vehicle``, which alone calls this room.
"""

from __future__ import annotations

from typing import TypeVar

from motorpool.core.vehicle_events import Command, PublishWork, VehicleConfig
from motorpool.core.vehicle_leases import Lease
from motorpool.types import ReturnReason
from motorpool.wire import ProgressItem, ResultItem, Results, Returned, ReturnItem

MAX_RETURN_ITEMS = 1_024
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
    """Energy by a model: the engine's working time at the permit's power. Whole milliwatt-hours; the rest is kept."""

    __slots__ = ("_attributed_mwh", "_busy_ms", "_mws")

    def __init__(self) -> None:
        self._busy_ms = 0
        self._mws = 0  # milliwatt-seconds: watts times milliseconds
        self._attributed_mwh = 0

    @property
    def total_mwh(self) -> int:
        """Since the incarnation began."""
        return self._mws // 3600

    def engine_started(self) -> None:
        """The engine's own count begins again."""
        self._busy_ms = 0

    def count(self, busy_ms: int, watts_w: int) -> None:
        """The engine has worked ``busy_ms`` since its start, the latest part of it at ``watts_w``."""
        if busy_ms > self._busy_ms:
            self._mws += (busy_ms - self._busy_ms) * watts_w
            self._busy_ms = busy_ms

    def attribute_mwh(self) -> int:
        """What was drawn since the last call: the share of the results that go out now."""
        delta_mwh = self.total_mwh - self._attributed_mwh
        self._attributed_mwh += delta_mwh
        return delta_mwh

    def validate(self) -> None:
        """No energy is attributed twice."""
        assert 0 <= self._attributed_mwh <= self.total_mwh


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
        self.gathering: dict[int, Lease] = {}

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def full(self) -> bool:
        """Is so much undelivered that nothing new should be computed."""
        return self._items >= self._config.max_outbox_items or self._bytes >= self._config.max_outbox_bytes

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
        message = Results(
            incarnation=self._incarnation,
            message_id=self._message_id(),
            lease_id=lease.lease_id,
            job_id=lease.job_id,
            items=lease.gathered,
            energy_mwh=self._meter.attribute_mwh(),
            energy_is_measured=False,
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
