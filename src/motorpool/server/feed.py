"""The feed: sheets of reports from relays, which speak for many vehicles each.

A sheet is checked when it arrives, and then is one event of the cell's loop, applied in one go between others. One is
in the loop at a time, so that everything else has its turn after each: a fleet that was cut off comes back with sheets
that take a hundred times as long as usual. The feed has a connection of its own to the message server: what waits there
holds up no vehicle. Every sheet is answered on a subject that is derived from the relay's name, never on one that the
relay gives: the cell may publish everywhere, a relay may not. A relay that sends faster than the loop takes is told so,
and its sheet is dropped: reports come again.

Called by: ``server.main``. Must not: decide what a report means; ``core.reporting`` does.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from motorpool import wire
from motorpool.bus import Connection, Sender, open_client, settled
from motorpool.core import events as ev
from motorpool.core.reporting import as_reported
from motorpool.core.scheduler import Scheduler
from motorpool.core.sheets import Sheet, SheetTaken, decode, encode_answer
from motorpool.errors import CapacityError, MotorpoolError
from motorpool.server.loop import CellLoop
from motorpool.trust.credentials import CellIdentity
from motorpool.trust.relays import RelayCredentials, RelayPaper, load_paper
from motorpool.types import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

LOOK_AGAIN_MS: Final = 5_000  # between two looks at a relay's paper
MAX_WAITING: Final = 16  # sheets of one relay that the loop has not taken
MAX_RELAYS: Final = 4_096
MAX_PENDING: Final = 1_024  # sheets of all relays that have come and were not looked at


class FeedLink:
    """The cell's end of the feed. Made with ``connect``."""

    def __init__(self, urls: list[str], identity: CellIdentity, on_sheet: Callable[[str, bytes], None]) -> None:
        self._urls = urls
        self._identity = identity
        self._on_sheet = on_sheet
        self._connection = Connection(self._open, self._prepare, lambda _up: None)
        self._sender = Sender(self._connection)

    @classmethod
    async def connect(cls, urls: list[str], identity: CellIdentity, on_sheet: Callable[[str, bytes], None]) -> Self:
        """Connect as the cell; ``on_sheet`` gets each sheet and the relay that the server says it is from.

        Raises BusError when the server is out of reach: then try again.
        """
        link = cls(urls, identity, on_sheet)
        await link._connection.open()
        return link

    async def _open(self, on_link: Callable[[bool], None], on_closed: Callable[[], None]) -> Client:
        return await open_client(
            self._urls,
            name="feed",
            jwt=self._identity.cell_jwt(),
            seed=self._identity.user_seed,
            inbox=self._identity.inbox,
            on_link=on_link,
            on_closed=on_closed,
        )

    async def _prepare(self, client: Client) -> None:
        async def received(message: Msg) -> None:
            self._on_sheet(wire.vehicle_of(message.subject), message.data)

        await client.subscribe(
            wire.feed_subject("*", "sheet"),
            cb=received,
            pending_msgs_limit=MAX_PENDING,
            pending_bytes_limit=16 * MAX_MESSAGE_BYTES,
        )
        await settled(client)

    def answer(self, relay_id: str, data: bytes) -> None:
        """Answer one relay; lost when either end is down."""
        self._sender.send(wire.feed_subject(relay_id, "answer"), data)

    async def close(self) -> None:
        """Leave in good order."""
        await self._sender.close()
        await self._connection.close()


class RelayLink:
    """A relay's end, for those who write one in Python. Made with ``connect``."""

    def __init__(self, credentials: RelayCredentials, on_answer: Callable[[bytes], None]) -> None:
        self._credentials = credentials
        self._on_answer = on_answer
        self._connection = Connection(self._open, self._prepare, lambda _up: None)

    @classmethod
    async def connect(cls, credentials: RelayCredentials, on_answer: Callable[[bytes], None]) -> Self:
        """Connect and subscribe; raises BusError when the server is out of reach."""
        link = cls(credentials, on_answer)
        await link._connection.open()
        return link

    async def _open(self, on_link: Callable[[bool], None], on_closed: Callable[[], None]) -> Client:
        credentials = self._credentials
        return await open_client(
            credentials.urls,
            name=credentials.relay_id,
            jwt=credentials.jwt,
            seed=credentials.seed,
            inbox=credentials.inbox,
            on_link=on_link,
            on_closed=on_closed,
        )

    async def _prepare(self, client: Client) -> None:
        async def received(message: Msg) -> None:
            self._on_answer(message.data)

        await client.subscribe(wire.feed_subject(self._credentials.relay_id, "answer"), cb=received)
        await settled(client)

    async def send(self, sheet: bytes) -> None:
        """Send one sheet; its answer comes by itself."""
        await self._connection.client.publish(wire.feed_subject(self._credentials.relay_id, "sheet"), sheet)

    async def close(self) -> None:
        """Leave in good order."""
        await self._connection.close()


class Relays:
    """The papers of relays in a folder, looked at again every LOOK_AGAIN_MS."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[int, tuple[int, int, int], RelayPaper]] = {}

    def look(self, relay_id: str, now_ms: int) -> tuple[RelayPaper, bool]:
        """A relay's paper, and whether it is another one than before.

        Raises TrustError without one; what was known of the relay is forgotten then.
        """
        path = self._folder / f"{relay_id}.json"
        known = self._known.get(relay_id)
        if known is not None and 0 <= now_ms - known[0] < LOOK_AGAIN_MS:
            return known[2], False
        mark = _mark(path)
        if known is not None and mark == known[1]:
            self._known[relay_id] = (now_ms, mark, known[2])
            return known[2], False
        self._known.pop(relay_id, None)
        paper = load_paper(path)
        if len(self._known) >= MAX_RELAYS:
            raise CapacityError(f"a cell hears at most {MAX_RELAYS} relays", code="too_many_relays")
        self._known[relay_id] = (now_ms, mark, paper)
        return paper, True


def _mark(path: Path) -> tuple[int, int, int]:
    """What differs when a file was written anew."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0, 0
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


class FedCell(CellLoop):
    """A cell's loop that takes sheets of relays as well. ``relays``: the folder of their papers."""

    def __init__(self, *, relays: Path, **parts: Any) -> None:
        super().__init__(**parts)
        self._relays = Relays(relays)
        self._feed: FeedLink | None = None
        self._sheets: deque[tuple[str, Sheet]] = deque()  # that wait for the one in the loop
        self._waiting: Counter[str] = Counter()  # the same by relay
        self._in_loop: Scheduler | None = None  # the state to which a sheet was given that it has not answered

    async def listen_to_relays(self, urls: list[str], identity: CellIdentity) -> None:
        """Take sheets from now on; raises BusError when the message server is out of reach."""
        await asyncio.to_thread(self.scheduler.feeds.warm)
        self._feed = await FeedLink.connect(urls, identity, self.on_sheet)

    async def stop(self) -> None:
        """Stop in good order; see ``CellLoop.stop``."""
        if self._feed is not None:
            await self._feed.close()
        await super().stop()

    def ask_all(self) -> None:
        """Ask every vehicle to report; see ``CellLoop.ask_all``. After a rebuild no sheet is in the loop any more."""
        super().ask_all()
        self._post_next()

    def on_sheet(self, relay_id: str, data: bytes) -> None:
        """A sheet has come: it waits for its turn, or its relay hears why not."""
        try:
            self._look(wire.check_id(relay_id, "relay_id"))
            sheet = decode(data)
        except MotorpoolError as error:
            self._refuse(relay_id, error)
            return
        if self._waiting[relay_id] >= MAX_WAITING:
            busy = CapacityError(f"{MAX_WAITING} sheets wait already: keep fewer on their way", code="feed_busy")
            self._refuse(relay_id, busy, sheet)
            return
        self._waiting[relay_id] += 1
        self._sheets.append((relay_id, sheet))
        self._post_next()

    def _look(self, relay_id: str) -> RelayPaper:
        """The paper of a relay. With a new one, or without one, its numbers of vehicles mean nothing any more."""
        try:
            paper, changed = self._relays.look(relay_id, self.now_ms())
        except MotorpoolError:
            self.post(ev.FeedEnded(cause_id="operator", relay=relay_id))
            raise
        if changed:
            self.post(ev.FeedEnded(cause_id="operator", relay=relay_id))
        return paper

    def _post_next(self) -> None:
        """Give the next sheet to the loop, unless it has one: checked now for who may speak for whom."""
        while self._sheets and self._in_loop is not self.scheduler:
            relay_id, sheet = self._sheets.popleft()
            self._waiting[relay_id] -= 1
            try:
                paper = self._look(relay_id)
            except MotorpoolError as error:
                self._refuse(relay_id, error, sheet)
                continue
            whole = sheet.tail.whole
            may = [each for each in whole if each.vehicle_id in self.enrolled and paper.allows(each.vehicle_id)]
            refused = sorted({each.number for each in whole} - {each.number for each in may})
            if len(may) < len(whole):
                sheet = msgspec.structs.replace(sheet, tail=msgspec.structs.replace(sheet.tail, whole=may))
            self._in_loop = self.scheduler
            cause = f"{relay_id}/{sheet.number}"
            self.post(ev.SheetArrived(cause_id=cause, relay=relay_id, sheet=sheet, refused=refused))

    def _refuse(self, relay_id: str, error: MotorpoolError, sheet: Sheet | None = None) -> None:
        log.warning("a sheet of %s is refused: %s", relay_id, error.code)
        feed, number = (0, 0) if sheet is None else (sheet.feed, sheet.number)
        self._answer(relay_id, SheetTaken(feed=feed, number=number, error=error.code, message=error.message))

    def _answer(self, relay_id: str, answer: SheetTaken) -> None:
        if self._feed is not None:
            self._feed.answer(relay_id, encode_answer(answer))

    def _perform_one(self, act: ev.Command) -> None:
        if isinstance(act, ev.SheetTaken):
            self._taken(act)
        else:
            super()._perform_one(act)

    def _taken(self, act: ev.SheetTaken) -> None:
        """A sheet is in the tables, and the books have what follows from it."""
        self._in_loop = None
        for vehicle_id, state in act.whole:
            self._keep_report(ev.VehicleReported(cause_id=act.relay, vehicle_id=vehicle_id, state=state))
        for vehicle_id in act.live:
            self.desk.on_report(vehicle_id)  # it may say that it leaves soon
        self._answer(
            act.relay,
            SheetTaken(feed=act.feed, number=act.number, taken=act.taken, wanted=act.wanted, refused=act.refused),
        )
        self._post_next()

    def vehicle_state(self, vehicle_id: str) -> wire.State | None:
        """The last report of a vehicle, with what a relay has said of it since; see ``Cell.vehicle_state``."""
        state = super().vehicle_state(vehicle_id)
        return None if state is None else as_reported(self.scheduler.cell, vehicle_id, state)
