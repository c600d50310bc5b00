"""The message server between vehicles and cell: what it loses, repeats, delays and reorders, and the durable stream.

Decides: what becomes of each message, by the weather. Must not: look into a message.
Called by: ``sim.full.vehicle`` and ``sim.full.cell``.

Reports and grants come at most once where the weather is fine. Finished work goes through a stream that keeps it until
the cell has acknowledged it, delivers it again after a while, and drops a repeated id only as long as it remembers it:
the same promises as those of JetStream, whose times these are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from motorpool.bus import DUPLICATE_WINDOW_S, MAX_UNACKNOWLEDGED, REDELIVER_AFTER_S, WorkMessage
from motorpool.sim.full.clock import Clock, Draws

CLIENT_NOTICES_MS: Final = 2_000  # until the client of a cut off vehicle says so
LINK_BACK_MS: Final = 300


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of messages, and how late a late one is at most. All of them are 0 in a world without faults."""

    drops: float = 0.0
    doubles: float = 0.0
    delays: float = 0.0
    late_ms: int = 2_000
    reorders: float = 0.0
    quick_ms: tuple[int, int] = (2, 30)

    @property
    def is_even(self) -> bool:
        """Whether every message takes the same time: then nothing has to be drawn."""
        return not (self.drops or self.doubles or self.delays or self.reorders) and len(set(self.quick_ms)) == 1


class StreamMessage(WorkMessage):
    """A message of finished work as the cell gets it."""

    __slots__ = ("number",)

    def __init__(self, number: int, vehicle_id: str, data: bytes) -> None:  # no message server stands behind it
        self.number = number
        self.vehicle_id = vehicle_id
        self.data = data


class Ends:
    """Who hears what arrives; set by the world. ``link`` is the vehicle's client, ``linked`` what the server knows."""

    def __init__(self) -> None:
        self.to_vehicle: Callable[[str, bytes], None] = lambda _vehicle, _data: None
        self.to_cell: Callable[[str, bytes], None] = lambda _vehicle, _data: None
        self.work_to_cell: Callable[[StreamMessage], None] = lambda _message: None
        self.confirmed: Callable[[str, list[str]], None] = lambda _vehicle, _messages: None
        self.link: Callable[[str, bool], None] = lambda _vehicle, _up: None
        self.linked: Callable[[str, bool], None] = lambda _vehicle, _up: None


class Network:
    """All links of one world. ``weather`` can change at any time.

    ``reliable``: in this world nothing gets lost and no cell dies, so that the stream needs to repeat nothing.
    """

    def __init__(self, clock: Clock, seed: int, weather: Weather, *, reliable: bool = False) -> None:
        self._clock = clock
        self.weather = weather
        self.ends = Ends()
        self.stream = Stream(clock, self, reliable=reliable)
        self._told: dict[str, list[str]] = {}  # confirmations that arrive together, by vehicle
        self._cut: dict[str, int] = {}  # vehicles that are cut off, by how many faults at once
        self._links: dict[str, bool] = {}
        self._draws = {name: Draws(seed, "network", name) for name in ("delay", "drops", "doubles", "delays", "order")}
        self._last_ms: dict[tuple[str, str], int] = {}

    @property
    def weather(self) -> Weather:
        """What becomes of messages now."""
        return self._weather

    @weather.setter
    def weather(self, weather: Weather) -> None:
        self._weather = weather
        self._is_even = weather.is_even

    # -- links ---------------------------------------------------------------------------------------------------------

    def connected(self, vehicle_id: str) -> bool:
        """Whether the vehicle's client takes its link for up."""
        return self._links.get(vehicle_id, False)

    def connect(self, vehicle_id: str) -> None:
        """A client has started."""
        if vehicle_id not in self._cut and not self.connected(vehicle_id):
            self._clock.after(LINK_BACK_MS, self._back, vehicle_id)

    def leave(self, vehicle_id: str) -> None:
        """A client is gone, without a word."""
        if self._links.pop(vehicle_id, False):
            self.ends.linked(vehicle_id, False)

    def cut(self, vehicle_id: str) -> None:
        """Nothing gets through any more; the client notices after a while."""
        self._cut[vehicle_id] = self._cut.get(vehicle_id, 0) + 1
        self._clock.after(CLIENT_NOTICES_MS, self._notice, vehicle_id)

    def mend(self, vehicle_id: str) -> None:
        """One reason less why nothing gets through."""
        left = self._cut.pop(vehicle_id, 0) - 1
        if left > 0:
            self._cut[vehicle_id] = left
        else:
            self._clock.after(LINK_BACK_MS, self._back, vehicle_id)

    def _notice(self, vehicle_id: str) -> None:
        if vehicle_id in self._cut and self._links.pop(vehicle_id, False):
            self.ends.linked(vehicle_id, False)
            self.ends.link(vehicle_id, False)

    def _back(self, vehicle_id: str) -> None:
        if vehicle_id not in self._cut and not self._links.get(vehicle_id, False):
            self._links[vehicle_id] = True
            self.ends.linked(vehicle_id, True)
            self.ends.link(vehicle_id, True)

    # -- messages that may get lost ------------------------------------------------------------------------------------

    def down(self, vehicle_id: str, data: bytes) -> None:
        """From the cell to a vehicle."""
        for after_ms in self._fates(vehicle_id, "down"):
            self._clock.after(after_ms, self._arrive_down, vehicle_id, data)

    def up(self, vehicle_id: str, data: bytes) -> None:
        """From a vehicle to the cell."""
        for after_ms in self._fates(vehicle_id, "up"):
            self._clock.after(after_ms, self.ends.to_cell, vehicle_id, data)

    def _arrive_down(self, vehicle_id: str, data: bytes) -> None:
        if vehicle_id not in self._cut:
            self.ends.to_vehicle(vehicle_id, data)

    def _fates(self, vehicle_id: str, way: str) -> list[int]:
        """After how many milliseconds a message arrives, as often as it does. Messages keep their order unless..."""
        weather, draws = self._weather, self._draws
        if self._is_even:
            return [] if vehicle_id in self._cut else [weather.quick_ms[0]]
        if vehicle_id in self._cut or draws["drops"].chance(weather.drops):
            return []
        low, high = weather.quick_ms
        after_ms = low if low == high else draws["delay"].between(low, high)
        if draws["delays"].chance(weather.delays):
            after_ms += draws["delays"].below(weather.late_ms + 1)
        now_ms = self._clock.now_ms
        if not draws["order"].chance(weather.reorders):
            key = (vehicle_id, way)
            after_ms = max(after_ms, self._last_ms.get(key, 0) - now_ms)
            self._last_ms[key] = now_ms + after_ms
        fates = [after_ms]
        if draws["doubles"].chance(weather.doubles):
            fates.append(after_ms + draws["doubles"].below(weather.late_ms + 1))
        return fates

    # -- finished work -------------------------------------------------------------------------------------------------

    def publish(self, vehicle_id: str, message_id: str, data: bytes) -> None:
        """Towards the stream. What gets lost, or whose confirmation does, the vehicle sends again."""
        for after_ms in self._fates(vehicle_id, "work"):
            self._clock.after(after_ms, self.stream.store, vehicle_id, message_id, data)

    def confirm(self, vehicle_id: str, message_id: str) -> None:
        """The stream has it. Where every message takes the same time, those of one moment arrive together."""
        if self._is_even and vehicle_id in self._told:
            self._told[vehicle_id].append(message_id)
            return
        for after_ms in self._fates(vehicle_id, "confirm"):
            message_ids = [message_id]
            if self._is_even:
                self._told[vehicle_id] = message_ids
            self._clock.after(after_ms, self._confirmed, vehicle_id, message_ids)

    def _confirmed(self, vehicle_id: str, message_ids: list[str]) -> None:
        if self._told.get(vehicle_id) is message_ids:
            del self._told[vehicle_id]
        if vehicle_id not in self._cut:
            self.ends.confirmed(vehicle_id, message_ids)

    def loses_an_acknowledgement(self) -> bool:
        """Whether the cell's acknowledgement gets lost."""
        return self._draws["drops"].chance(self.weather.drops)


class Stream:
    """Finished work until it is acknowledged; ``reading`` while a cell takes it."""

    def __init__(self, clock: Clock, network: Network, *, reliable: bool) -> None:
        self._clock = clock
        self._network = network
        self._reliable = reliable
        self._number = 0
        self._kept: dict[int, StreamMessage] = {}
        self._waiting: deque[int] = deque()
        self._sent: dict[int, int] = {}  # how often each of those that are with the cell was delivered
        self._ids: dict[str, int] = {}
        self._reader = 0
        self.reading = False

    def __len__(self) -> int:
        return len(self._kept)

    def store(self, vehicle_id: str, message_id: str, data: bytes) -> None:
        """A message has come; one whose id is remembered is there already."""
        now_ms = self._clock.now_ms
        known_ms = self._ids.get(message_id)
        if known_ms is None or now_ms - known_ms >= DUPLICATE_WINDOW_S * 1000:
            self._ids[message_id] = now_ms
            while len(self._ids) > 1_000 and now_ms - next(iter(self._ids.values())) >= DUPLICATE_WINDOW_S * 1000:
                del self._ids[next(iter(self._ids))]
            self._number += 1
            self._kept[self._number] = StreamMessage(self._number, vehicle_id, data)
            self._waiting.append(self._number)
            self._deliver()
        self._network.confirm(vehicle_id, message_id)

    def read(self, reading: bool) -> None:
        """A cell has come or gone: what was with it is delivered again, from the oldest on."""
        self.reading = reading
        self._reader += 1
        self._sent.clear()
        self._waiting = deque(sorted(self._kept))
        self._deliver()

    def acknowledge(self, message: StreamMessage) -> None:
        """It is in the books. A lost acknowledgement means that it comes again."""
        if not self._network.loses_an_acknowledgement():
            self._kept.pop(message.number, None)
            self._sent.pop(message.number, None)
            self._deliver()

    def _deliver(self) -> None:
        while self.reading and self._waiting and len(self._sent) < MAX_UNACKNOWLEDGED:
            number = self._waiting.popleft()
            if number in self._kept:
                self._send(number)

    def _send(self, number: int) -> None:
        times = self._sent[number] = self._sent.get(number, 0) + 1
        if self._reliable:
            self._arrive(number, self._reader)
            return
        self._clock.after(1, self._arrive, number, self._reader)
        self._clock.after(REDELIVER_AFTER_S * 1000, self._again, number, self._reader, times)

    def _arrive(self, number: int, reader: int) -> None:
        message = self._kept.get(number)
        if message is not None and reader == self._reader and self.reading:
            self._network.ends.work_to_cell(message)

    def _again(self, number: int, reader: int, times: int) -> None:
        if reader == self._reader and number in self._kept and self._sent.get(number) == times:
            self._send(number)
