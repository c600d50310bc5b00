"""The one loop of a cell: events in, one transaction, then the acts.

A batch of messages and requests is taken from the inbox, each goes through the scheduler, everything that changes the
books is written in one transaction, and only after the commit are grants sent, callers answered and messages of the
durable stream acknowledged. If a transaction fails, the state in memory is thrown away and rebuilt from the books. When
the disk or the database is at fault, callers are told so and finished work waits until it can be committed; when one
entry is at fault, it is found by trying each alone, and dropped: no message can stop the cell.

Called by: ``server.main``; the API speaks to it through ``server.cell.Cell``. Must not: decide who runs what.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec

from motorpool import wire
from motorpool.bus import CellLink, WorkMessage, ended
from motorpool.catalogue import Catalogue
from motorpool.core import events as ev
from motorpool.core.ledger import vehicle_of
from motorpool.core.pricing import Price
from motorpool.core.scheduler import SETTLE_MS, TICK_MS, Scheduler
from motorpool.errors import ConflictError, MotorpoolError, StorageFullError, StoreError, TooLargeError
from motorpool.server.assembly import assemble
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens, ValidBatch
from motorpool.server.entries import Entry, InputFile, log_foreign, progress_entry, work_entry
from motorpool.server.live import LiveDesk
from motorpool.server.news import OwnerNews
from motorpool.server.openai.lines import body_for, kind_of
from motorpool.server.quotes import Quotes
from motorpool.server.reports import Reports
from motorpool.server.snapshots import Snapshots
from motorpool.server.writing import write
from motorpool.store import books, fleet_settings, owners, recovery
from motorpool.store.blobs import BlobStore
from motorpool.store.database import Database, translate

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_TAKEN: Final = 256  # entries of the inbox in one transaction
MAX_WAITING: Final = 2_048  # above it the durable stream is not read further
ROUND_TRIPS_EVERY_S: Final = 30.0  # the message server is asked how far away vehicles are
GATHER_S: Final = 0.02  # pay for live requests is committed together this often
STOP_GRACE_S: Final = 3.0
REBUILD_WAIT_S: Final = 1.0
MAX_REWRITE_WAIT_S: Final = 60.0
LARGE_FLEET: Final = 2_000  # vehicles
CUSTOMER_CLASS: Final = "batch documents"  # what an owner is told of whom leases are for
UNWRITABLE: Final = "internal_error"  # the code of an error that no repetition mends
# Errors of SQLite that lie in what was to be written, not in the disk or the database.
_OF_THE_ENTRY: Final = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError, sqlite3.InterfaceError)


class StartedError(ConflictError):
    """The batch was handed over before."""


class CellLoop:
    """The control plane of one cell; implements ``server.cell.Cell``."""

    def __init__(
        self,
        *,
        database: Database,
        blobs: BlobStore,
        catalogue: Catalogue,
        clock: Callable[[], int],
        currency: str = "EUR",
    ) -> None:
        self._database = database
        self.blobs = blobs
        self.catalogue = catalogue
        self.now_ms = clock
        self.scheduler = Scheduler()
        self.desk = LiveDesk(self)
        self.news = OwnerNews(self, currency)
        self.reports = Reports()
        self.quotes = Quotes(self)
        self.snapshots = Snapshots(database.path)
        self.enrolled: set[str] = set()
        self._link: CellLink | None = None
        self._inbox: deque[Entry] = deque()
        self._gathered: list[Entry] = []
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._committer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._files: dict[int, InputFile] = {}
        self._assembling: dict[int, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._measuring: asyncio.Task[None] | None = None
        self._changes = 0
        self._settled_ms = 0  # set once, by the first state from the books
        self._singly = 0  # so many entries are tried one by one: one of them cannot be committed

    # -- what the API uses ---------------------------------------------------------------------------------------------

    @property
    def reader(self) -> sqlite3.Connection:
        """Committed state, for reading only."""
        return self._database.reader

    async def write(self, change: Callable[[sqlite3.Connection], T], *, bill: ev.LiveEnded | None = None) -> T:
        """Run ``change`` in the next transaction; see ``Cell.write``."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._post(Entry(change=change, event=bill, done=done))
        return await done

    async def start_batch(self, batch: ValidBatch) -> None:
        """``validating`` to ``in_progress``; see ``Cell.start_batch``. Raises CallerError if there is no time."""
        row = self.reader.execute("SELECT * FROM batch WHERE batch_no = ?", (batch.batch_no,)).fetchone()
        self.blobs.open(self._input_blob(row)).close()  # fails now rather than later

        index = books.LineIndex(offsets=batch.offsets, lengths=batch.lengths, limits=batch.limits)
        price = self.price_of(batch.model)
        asked = books.terms_of(self.reader, batch.batch_no)
        terms = await self.quotes.admit(batch, asked, row["expires_ms"])

        def keep_index(db: sqlite3.Connection) -> None:
            status = db.execute("SELECT status FROM batch WHERE batch_no = ?", (batch.batch_no,)).fetchone()[0]
            if status != "validating":
                raise StartedError("the batch has left validating already")
            books.write_index(db, batch.batch_no, index)
            books.write_model(db, batch.batch_no, batch.model, price)
            books.save_terms(db, batch.batch_no, terms)

        started = _started(row, batch.model, price, index, terms)
        try:
            await self._hand_over(row["batch_id"], started, keep_index)
        finally:
            self.quotes.begun(batch.batch_no)

    async def _hand_over(
        self, batch_id: str, started: ev.JobStarted, keep_index: Callable[[sqlite3.Connection], None]
    ) -> None:
        """Commit the start of a batch, for as long as it takes."""
        while True:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._post(Entry(change=keep_index, event=started, done=done))
            try:
                return await done
            except StartedError:
                return None  # a try before this one was committed after all
            except (StorageFullError, StoreError) as error:
                if error.code == UNWRITABLE:
                    raise
                log.warning("%s waits in validating: %s", batch_id, error.message)
                await asyncio.sleep(REBUILD_WAIT_S)

    async def cancel_batch(self, batch_no: int) -> None:
        """``in_progress`` to ``cancelling``; see ``Cell.cancel_batch``."""
        if batch_no not in self.scheduler.jobs:
            raise ConflictError("only a batch that is in progress can be cancelled", code="batch_not_cancellable")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._post(Entry(event=ev.CancelAsked(cause_id="customer", job_no=batch_no), done=done))
        await done

    async def answer(self, request: LiveRequest) -> LiveAnswer:
        """Run a plain live request; see ``Cell.answer``."""
        return await self.desk.answer(request)

    def serving(self, model: str, regions: tuple[str, ...] = (), min_trust: int = 0) -> int:
        """How many vehicles could run a model now; see ``Cell.serving``."""
        return self.scheduler.able(model, regions, min_trust) if regions or min_trust else self.scheduler.serving(model)

    def live(self, request: LiveRequest) -> AsyncIterator[LiveTokens | LiveAnswer]:
        """Run a live request; see ``Cell.live``."""
        return self.desk.run(request)

    def vehicle_state(self, vehicle_id: str) -> wire.State | None:
        """The last report of a vehicle; see ``Cell.vehicle_state``."""
        vehicle = self.scheduler.vehicles.get(vehicle_id)
        return None if vehicle is None or vehicle.offline else self.reports.get(vehicle_id)

    async def owner_spoke(self, vehicle_id: str, what: str, *, cause: str = "owner") -> None:
        """Do as the owner's word in the books says; see ``Cell.owner_spoke``."""
        row = owners.find_vehicle(self.reader, vehicle_id)
        if row is None:
            return
        withdrawn, paused_until_ms = row["withdrawn_ms"] is not None, row["paused_until_ms"]
        if withdrawn:
            self.reports.withdraw(vehicle_id)
        if withdrawn or paused_until_ms > self.now_ms():
            self.desk.on_struck_off(vehicle_id)  # live requests go on elsewhere
        spoke = ev.OwnerSpoke(
            cause_id=cause, vehicle_id=vehicle_id, withdrawn=withdrawn, paused_until_ms=paused_until_ms, what=what
        )
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._post(Entry(event=spoke, done=done))
        await done

    async def configure(self, event: ev.VehicleConfigured | ev.SiteConfigured | ev.CustomerConfigured) -> None:
        """Do as the operator has set it; it stands in the books already."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._post(Entry(event=event, done=done))
        await done

    # -- start and stop ------------------------------------------------------------------------------------------------

    async def start(self, link: CellLink) -> None:
        """Rebuild the state from the books and begin to work with the vehicles of ``link``."""
        self._link = link
        self._restore()
        self.quotes.restore()
        await link.listen(self._on_state, self._on_live, self._on_gone)
        link.pull_work(self._on_work)
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._tick())]
        self._measuring = asyncio.create_task(ask_round_trips(link, self._on_round_trips))
        self.ask_all()

    def on_link(self, up: bool) -> None:
        """The link to the message server broke or is back: what was on its way to us is lost."""
        if up:
            self.desk.on_link_lost()
            self.ask_all()

    def strike_off(self, vehicle_id: str) -> None:
        """A vehicle was revoked in the books: it gets nothing more, and nothing that it sends is accepted."""
        self.enrolled.discard(vehicle_id)
        self.reports.forget(vehicle_id)
        self.desk.on_struck_off(vehicle_id)
        self.post(ev.VehicleRevoked(cause_id="operator", vehicle_id=vehicle_id))

    def ask_all(self) -> None:
        """Ask every vehicle to report now."""
        data = wire.encode(wire.Sync())
        for vehicle_id in sorted(self.enrolled):
            self.send(vehicle_id, data)

    def send(self, vehicle_id: str, data: bytes) -> None:
        """Send one message to a vehicle."""
        if self._link is not None:
            self._link.send(vehicle_id, data)

    async def stop(self) -> None:
        """Stop in good order; everything accepted is in the books."""
        if self._tasks and not self._tasks[0].done():
            self._flush_gathered()
            try:
                async with asyncio.timeout(STOP_GRACE_S):
                    await self.write(lambda _: None)  # everything before it is committed when this is
            except (TimeoutError, MotorpoolError) as error:
                log.warning("stopping with work undone: %s", type(error).__name__)
        await self.quotes.close()
        await ended(self._measuring)
        for task in [*self._tasks, *self._assembling.values()]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._assembling.values(), return_exceptions=True)
        if self._link is not None:
            await self._link.close()
        for file in self._files.values():
            file.stream.close()
        self._committer.shutdown()
        await asyncio.to_thread(self.snapshots.close, self.scheduler, self.now_ms())
        self._database.close()

    def check(self) -> None:
        """Raise what ended the loop, if it has ended."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise StoreError("the cell's loop has stopped") from task.exception()
        if self._link is not None:
            self._link.check()

    def post(self, event: ev.SchedulerEvent) -> None:
        """Give the scheduler an event that nobody waits for."""
        self._post(Entry(event=event))

    def post_soon(self, event: ev.SchedulerEvent) -> None:
        """Give the scheduler an event within GATHER_S, together with others: one commit for all of them."""
        if not self._gathered:
            asyncio.get_running_loop().call_later(GATHER_S, self._flush_gathered)
        self._gathered.append(Entry(event=event))

    def _flush_gathered(self) -> None:
        self._inbox.extend(self._gathered)
        self._gathered.clear()
        self._wake.set()

    def _post(self, entry: Entry) -> None:
        self._inbox.append(entry)
        self._wake.set()

    # -- from the books ------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        with _no_collecting():
            self._restore_all()

    def _restore_all(self) -> None:
        db = self._database.writer
        self.snapshots.suspend()
        self.scheduler = Scheduler(books.next_epoch(db), fast=_is_large(db))
        self.scheduler.rests.restore(books.rests(db))
        for site in fleet_settings.list_sites(db):
            self.scheduler.set_site(site.name, site.limit_w, site.limit_vehicles)
        for customer in fleet_settings.shares(db):
            self.scheduler.set_weight(customer.account, customer.weight)
        names, rows = recovery.vehicles(db)
        self.enrolled = set(names)
        self.scheduler.restore_vehicles(rows)
        for file in self._files.values():
            file.stream.close()
        self._files.clear()
        finished = books.leftover_batches(db)
        for row in books.open_batches(db):
            number = row["batch_no"]
            if row["status"] == "finalizing" or (row["status"] != "validating" and not self._has_input(row)):
                finished.append(number)
            elif row["status"] != "validating":
                self._restore_job(db, row)
        leases, dropped = recovery.leases(db, self.scheduler.jobs, self.enrolled)
        self.scheduler.restore_leases(leases)
        commands: list[ev.Command] = [ev.DropLease(lease_id=lease_id) for lease_id in dropped]
        now = self.now_ms()
        self.snapshots.restore(self.scheduler, now)
        db.execute("BEGIN IMMEDIATE")
        self._settled_ms = self._settled_ms or now + SETTLE_MS
        resumed = self.scheduler.resume(now, settled_ms=self._settled_ms)
        acts = self._apply([*commands, *resumed], Entry(), db, now)
        db.execute("COMMIT")
        for number in finished:
            self._assemble(number)
        self._perform(acts)

    def _restore_job(self, db: sqlite3.Connection, row: sqlite3.Row) -> None:
        number = row["batch_no"]
        carried, checkpoint_bytes = books.carried(db, number)
        terms = books.terms_of(db, number)
        self.scheduler.restore_job(
            _started(row, row["model"], books.price_of(row), books.read_index(db, number), terms),
            done=recovery.done_lines(db, number),
            carried=carried,
            checkpoint_bytes=checkpoint_bytes,
            held=books.held(db, number),
            cancelling_ms=row["cancelling_ms"],
        )

    def _input_blob(self, row: sqlite3.Row) -> str:
        found = self.reader.execute("SELECT blob FROM file WHERE file_id = ?", (row["input_file_id"],)).fetchone()
        if found is None:
            raise StoreError(f"the input file of {row['batch_id']} is not in the books")
        return str(found["blob"])

    def _has_input(self, row: sqlite3.Row) -> bool:
        try:
            return self.blobs.exists(self._input_blob(row))
        except StoreError:
            return False

    def _input(self, batch_no: int) -> InputFile:
        """The input file of a job in progress, opened when it is first needed."""
        file = self._files.get(batch_no)
        if file is None:
            row = self.reader.execute("SELECT * FROM batch WHERE batch_no = ?", (batch_no,)).fetchone()
            index = books.read_index(self.reader, batch_no)
            stream = self.blobs.open(self._input_blob(row))
            file = self._files[batch_no] = InputFile(stream, row["batch_id"], row["endpoint"], index)
        return file

    def price_of(self, model: str) -> Price:
        """What the catalogue says that a model costs."""
        known = self.catalogue.get(model)
        return Price(input_micro=known.input_micro, output_micro=known.output_micro)

    # -- from vehicles -------------------------------------------------------------------------------------------------

    def _on_state(self, vehicle_id: str, data: bytes) -> None:
        if vehicle_id not in self.enrolled:
            return
        try:
            message = wire.decode(wire.UP_STATE, data)
        except MotorpoolError as error:
            log.warning("%s sent a message that is refused: %s", vehicle_id, error.code)
            return
        if isinstance(message, wire.State):
            cause = f"{vehicle_id}/{message.incarnation}/{message.seq}"
            self.post(ev.VehicleReported(cause_id=cause, vehicle_id=vehicle_id, state=message))
            return
        self._post(progress_entry(vehicle_id, message))

    def _on_live(self, vehicle_id: str, data: bytes) -> None:
        if vehicle_id in self.enrolled:
            self.desk.on_message(vehicle_id, data)

    def _on_gone(self, vehicle_id: str) -> None:
        if vehicle_id in self.enrolled:
            self.desk.on_gone(vehicle_id)

    def _on_round_trips(self, found_ms: dict[str, float]) -> None:
        self.desk.places.round_trips_ms = found_ms

    async def _on_work(self, messages: list[WorkMessage]) -> None:
        for message in messages:
            try:
                entry = work_entry(message) if message.vehicle_id in self.enrolled else None
            except Exception as error:  # noqa: BLE001 - no message can stop the cell
                log_foreign(f"work of {message.vehicle_id} cannot be understood and is dropped", error)
                entry = None
            if entry is None:
                await message.acknowledge()  # nobody could ever use it
            else:
                self._post(entry)
        while len(self._inbox) > MAX_WAITING:
            self._room.clear()
            await self._room.wait()

    # -- the loop ------------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_MS / 1000)
            self.post(ev.Ticked(cause_id="tick"))
            self.desk.on_tick()
            self.news.on_tick()
            self.quotes.on_tick()
            self.snapshots.on_tick(self.scheduler, self.now_ms())

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            most = 1 if self._singly else MAX_TAKEN
            entries = [self._inbox.popleft() for _ in range(min(len(self._inbox), most))]
            if not self._inbox:
                self._wake.clear()
            if len(self._inbox) <= MAX_WAITING:
                self._room.set()
            try:
                await self._transact(entries)
            except Exception as error:  # noqa: BLE001 - whatever it was, the state in memory is no longer the books'
                await self._recover(entries, error)
            else:
                self._singly = max(0, self._singly - len(entries))

    async def _transact(self, entries: list[Entry]) -> None:
        db = self._database.writer
        now = self.now_ms()
        acts: list[ev.Command] = []
        answers: list[tuple[asyncio.Future[Any], Any, Exception | None]] = []
        db.execute("BEGIN IMMEDIATE")
        for entry in entries:
            result, error = None, None
            if entry.change is not None:
                result, error = self._change(db, entry.change)
            if entry.event is not None and error is None:
                acts += self._apply(self.scheduler.handle(entry.event, now), entry, db, now)
                if isinstance(entry.event, ev.VehicleReported):
                    self._keep_report(entry.event)
            if entry.done is not None:
                answers.append((entry.done, result, error))
        if db.total_changes != self._changes:
            await asyncio.get_running_loop().run_in_executor(self._committer, db.execute, "COMMIT")
            self._changes = db.total_changes
        else:
            db.execute("COMMIT")
        for done, result, error in answers:
            if done.done():
                continue
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)
        self._perform(acts)
        for entry in entries:
            if entry.message is not None:
                await entry.message.acknowledge()

    def _keep_report(self, event: ev.VehicleReported) -> None:
        vehicle = self.scheduler.vehicles.get(event.vehicle_id)
        if vehicle is not None and (vehicle.incarnation, vehicle.seq) == (event.state.incarnation, event.state.seq):
            self.reports.take(event.vehicle_id, event.state, withdrawn=vehicle.withdrawn)
            self.desk.on_report(event.vehicle_id)  # it may say that it leaves soon

    def _change(
        self, db: sqlite3.Connection, change: Callable[[sqlite3.Connection], Any]
    ) -> tuple[Any, Exception | None]:
        """Run one change so that its failure undoes only itself."""
        db.execute("SAVEPOINT change")
        try:
            result = change(db)
        except Exception as error:
            if _is_outage(error):
                raise
            db.execute("ROLLBACK TO change")
            db.execute("RELEASE change")
            return None, error
        db.execute("RELEASE change")
        return result, None

    # -- when a transaction fails --------------------------------------------------------------------------------------

    async def _recover(self, entries: list[Entry], error: Exception) -> None:
        """A transaction failed and is undone; nothing of it was acknowledged, answered or performed."""
        self._roll_back()
        if _is_outage(error):
            problem = self._problem(error)
            log.error("a transaction failed, the state is rebuilt from the books: %s", problem.message)
            self._inbox.extendleft(reversed(entries))
            await self._rebuild(problem)
        elif len(entries) > 1:
            log.error("a transaction failed (%s): its %d entries are tried alone", type(error).__name__, len(entries))
            self._inbox.extendleft(reversed(entries))
            self._singly = len(entries)
            await self._rebuild(None)
        else:
            await self._drop(entries[0], error)
            self._singly = max(0, self._singly - 1)
            await self._rebuild(None)
        self._wake.set()

    async def _drop(self, entry: Entry, error: Exception) -> None:
        """Give up an entry that cannot be committed; a lease that it was about ends by itself."""
        what = type(entry.event).__name__ if entry.event is not None else "a change"
        cause = entry.event.cause_id if entry.event is not None else "the API"
        log_foreign(f"{what} by {cause} cannot be committed and is dropped", error)
        if entry.done is not None and not entry.done.done():
            entry.done.set_exception(StoreError("this could not be written down", code=UNWRITABLE))
        if entry.message is not None:
            await entry.message.acknowledge()

    async def _rebuild(self, problem: MotorpoolError | None) -> None:
        """Build the state again from the books; while that fails, nobody is left waiting."""
        while True:
            if problem is not None:
                self._refuse_waiting(problem)
                await asyncio.sleep(REBUILD_WAIT_S)
                self._refuse_waiting(problem)
            try:
                self._restore()
            except (sqlite3.Error, OSError, MotorpoolError) as error:
                self._roll_back()
                problem = self._problem(error)
                log.error("the state could not be rebuilt yet: %s", problem.message)  # noqa: TRY400 - it says enough
                continue
            self.ask_all()
            return

    def _refuse_waiting(self, problem: MotorpoolError) -> None:
        """Tell whoever waits; keep what comes only once, drop reports, which come again."""
        kept = [entry for entry in self._inbox if entry.comes_once]
        for entry in self._inbox:
            if entry.done is not None and not entry.done.done():
                entry.done.set_exception(problem)
        self._inbox.clear()
        self._inbox.extend(kept)

    def _roll_back(self) -> None:
        if self._database.writer.in_transaction:
            self._database.writer.execute("ROLLBACK")

    def _problem(self, error: Exception) -> MotorpoolError:
        if isinstance(error, MotorpoolError):
            return error
        if isinstance(error, sqlite3.Error):
            return translate(error, self._database.path)
        return StoreError(f"the store failed: {type(error).__name__}")

    # -- commands ------------------------------------------------------------------------------------------------------

    def _apply(self, commands: list[ev.Command], entry: Entry, db: sqlite3.Connection, now_ms: int) -> list[ev.Command]:
        """Write what changes the books; return the acts for after the commit."""
        acts: list[ev.Command] = []
        for command in commands:
            if isinstance(command, ev.Note):
                if self.scheduler.may_tell(command.subject):
                    cause = entry.event.cause_id if entry.event is not None else "restart"
                    books.add_story(db, command.subject, now_ms, cause, command.what)
            elif not write(db, command, entry, now_ms):
                acts.append(command)
            elif isinstance(command, ev.PostTransfers):
                self.news.paid(vehicle_of(each.credit) for each in command.transfers if each.kind == "earning")
        return acts

    def _perform(self, acts: list[ev.Command]) -> None:
        for act in acts:
            try:
                self._perform_one(act)
            except Exception as error:  # noqa: BLE001 - it is in the books: a grant is sent again, a batch assembled
                log_foreign(f"{type(act).__name__} failed", error)

    def _perform_one(self, act: ev.Command) -> None:
        match act:
            case ev.SendGrant():
                self._send_grant(act)
            case ev.SendRevoke():
                revoke = wire.Revoke(lease_id=act.lease_id, lines=act.lines, keep_running=act.keep_running)
                self.send(act.vehicle_id, wire.encode(revoke))
            case ev.SendOwnerNews():
                self.news.tell(act.vehicle_id)
            case ev.AssembleFiles():
                self._assemble(act.job_no)
            case _:
                raise AssertionError(f"nobody performs {type(act).__name__}")

    def _send_grant(self, act: ev.SendGrant) -> None:
        if act.lease_id not in self.scheduler.leases:
            return  # it ended within the same transaction
        file = self._input(act.job_no)
        checkpoints = books.read_checkpoints(self._database.writer, act.job_no, act.with_checkpoint)
        items = [
            wire.Item(line=number, body=body_for(file.endpoint, line), checkpoint=checkpoints.get(number))
            for number, line in zip(act.lines, file.lines(act.lines), strict=True)
        ]
        grant = wire.Grant(
            lease_id=act.lease_id,
            incarnation=act.incarnation,
            job_id=file.batch_id,
            kind=act.kind,
            model=act.model,
            ttl_ms=act.ttl_ms,
            items=items,
            max_offline_ms=act.max_offline_ms,
            pay_input_micro=act.pay_input_micro,
            pay_output_micro=act.pay_output_micro,
            customer_class=CUSTOMER_CLASS,
        )
        try:
            data = wire.encode(grant)
        except TooLargeError:
            # Its checkpoints have grown since the lease was made: without them it fits, as it was made to.
            bare = [msgspec.structs.replace(item, checkpoint=None) for item in items]
            data = wire.encode(msgspec.structs.replace(grant, items=bare))
        self.send(act.vehicle_id, data)

    # -- the end of a batch --------------------------------------------------------------------------------------------

    def _assemble(self, batch_no: int) -> None:
        if batch_no not in self._assembling:
            task = asyncio.create_task(self._assemble_files(batch_no))
            self._assembling[batch_no] = task
            task.add_done_callback(lambda _: self._assembling.pop(batch_no, None))

    async def _assemble_files(self, batch_no: int) -> None:
        """Write the files of a batch that has ended; on a full disk or a failing store, try until it works."""
        wait_s = REBUILD_WAIT_S
        while True:
            try:
                await assemble(self, batch_no)
            except Exception as error:  # noqa: BLE001 - a batch is never left without its end
                log_foreign(f"the files of batch {batch_no} could not be written yet", error)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, MAX_REWRITE_WAIT_S)
                continue
            break
        file = self._files.pop(batch_no, None)
        if file is not None:
            file.stream.close()


async def ask_round_trips(link: CellLink, on_round_trips: Callable[[dict[str, float]], None]) -> None:
    """Tell again and again how far away the vehicles are, in milliseconds; nothing where that is not known."""
    while True:
        on_round_trips(await link.round_trips())
        await asyncio.sleep(ROUND_TRIPS_EVERY_S)


def _started(
    row: sqlite3.Row, model: str, price: Price, index: books.LineIndex, terms: books.BatchTerms
) -> ev.JobStarted:
    return ev.JobStarted(
        cause_id=row["batch_id"],
        job_no=row["batch_no"],
        job_id=row["batch_id"],
        account=row["account"],
        kind=kind_of(row["endpoint"]),
        model=model,
        price=price,
        expires_ms=row["expires_ms"],
        lengths=index.lengths,
        limits=index.limits,
        regions=terms.regions,
        min_trust=terms.min_trust,
        best_effort=terms.best_effort,
    )


@contextmanager
def _no_collecting() -> Iterator[None]:
    """While millions of objects are made, none of them garbage, looking for garbage takes as long as making them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _is_large(db: sqlite3.Connection) -> bool:
    """Whether the fleet is so large that compiled kernels pay, and they can be had."""
    if db.execute("SELECT count(*) FROM vehicle").fetchone()[0] < LARGE_FLEET:
        return False
    if importlib.util.find_spec("numba") is None:
        log.warning("a fleet of this size is scheduled faster with: pip install 'motorpool[fleet]'")
        return False
    return True


def _is_outage(error: Exception) -> bool:
    """Whether the disk or the database is at fault, so that the same may work later."""
    return isinstance(error, OSError) or (isinstance(error, sqlite3.Error) and not isinstance(error, _OF_THE_ENTRY))
