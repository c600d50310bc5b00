"""The simulated cell: the production scheduler between an inbox, the books and the message server.

Decides: nothing that a cell decides; ``core.scheduler`` does. It is to it what ``server.loop`` is in a real cell: a
batch of entries, one transaction, then the acts; what cannot be committed is undone and the state built anew.
Called by: ``sim.full.run``, ``sim.full.faults`` (what befalls it), ``sim.full.network`` (what arrives).
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec
import numpy as np

from motorpool import wire
from motorpool.core import events as ev
from motorpool.core.granting import PLAN_EVERY_MS
from motorpool.core.pricing import owner_pay
from motorpool.core.scheduler import SETTLE_MS, TICK_MS, Scheduler
from motorpool.errors import MotorpoolError, StoreError, TooLargeError
from motorpool.server.entries import Entry, progress_entry, work_entry
from motorpool.server.loop import CUSTOMER_CLASS, MAX_TAKEN, REBUILD_WAIT_S
from motorpool.server.news import OwnerNews
from motorpool.sim.full.books import LightBooks, SqlBooks, restore
from motorpool.sim.full.clock import Clock, Trace
from motorpool.sim.full.network import Network, StreamMessage
from motorpool.sim.full.work import PRICE, Job
from motorpool.store import owners

RETRY_MS: Final = 1_000  # of a customer, and of the loop that writes the files of a batch
# Errors that lie in what was to be written, as ``server.loop`` has them.
OF_THE_ENTRY: Final = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError, sqlite3.InterfaceError)
NewScheduler = Callable[[int], Scheduler]


class Watcher(Protocol):
    """Who checks what must always hold; ``sim.full.checks``."""

    def begun(self) -> None:
        """A transaction has begun."""

    def decided(self, entry: Entry, commands: Sequence[ev.Command], now_ms: int) -> None:
        """The scheduler has handled an event; nothing is committed yet."""

    def committed(self) -> None:
        """Everything since ``begun`` is in the books."""

    def undone(self) -> None:
        """Nothing of it is."""

    def restored(self) -> None:
        """A new scheduler was built from the books."""

    def ended(self, job: Job, status: str) -> None:
        """A job has its last status."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How often the cell looks at its inbox and at the time, and how old its plan may be.

    ``hears_links``: at each tick whoever has a link counts as heard. So vehicles need not say every few seconds that
    nothing has changed, and those that are gone fall silent all the same.
    """

    turn_ms: int = 5
    tick_ms: int = TICK_MS
    plan_ms: int = PLAN_EVERY_MS
    hears_links: bool = False


class Cell:
    """One control plane. ``tick``s, takes what arrives, and dies and comes back as it is told."""

    def __init__(
        self,
        *,
        clock: Clock,
        network: Network,
        trace: Trace,
        watcher: Watcher,
        books: SqlBooks | LightBooks,
        pace: Pace | None = None,
        new_scheduler: NewScheduler = Scheduler,
    ) -> None:
        self._clock = clock
        self._network = network
        self._trace = trace
        self._watcher = watcher
        self._books = books
        self._pace = pace or Pace()
        self._new_scheduler = new_scheduler
        self._inbox: deque[Entry] = deque()
        self._life = 0
        self._turning = False
        self._singly = 0
        self._settled_ms = 0
        self._finishing: set[int] = set()
        self.jobs: dict[str, Job] = {}  # all that were handed in, by their ids: the input files
        self._by_no: dict[int, Job] = {}
        self.up = False
        self.skew_ms = 0
        self._last_ms = 0
        self.dies_after_commit = False  # the next commit is the last thing that this process does
        self.enrolled: set[str] = set()
        self.scheduler = new_scheduler(0)
        self.news: OwnerNews | None = None
        self._linked = np.zeros(0, np.bool_)  # by the rows of the vehicles

    def now_ms(self) -> int:
        """The cell's clock, which never goes back while it runs."""
        self._last_ms = max(self._last_ms, self._clock.now_ms + self.skew_ms)
        return self._last_ms

    @property
    def reader(self) -> sqlite3.Connection:
        """Committed state."""
        assert isinstance(self._books, SqlBooks)
        return self._books.database.reader

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A process starts: it builds its state from the books and begins to work."""
        self._life += 1
        self.up, self._turning, self._singly, self._last_ms, self._settled_ms = True, False, 0, 0, 0
        self._inbox.clear()
        self._finishing.clear()
        self.news = OwnerNews(self, "EUR") if isinstance(self._books, SqlBooks) else None
        self._rebuild(self._life)
        self._clock.after(self._pace.tick_ms, self._tick, self._life)

    def crash(self) -> None:
        """The process dies: what was not committed is gone, and so is what was not acknowledged or sent."""
        self.up = False
        self._life += 1
        self._network.stream.read(reading=False)
        self._inbox.clear()
        assert isinstance(self._books, SqlBooks)
        self._watcher.undone()
        self._books.reopen()

    def _rebuild(self, life: int) -> None:
        """Build the state from the books; while that fails, try again."""
        if life != self._life:
            return
        try:
            self._restore()
        except (sqlite3.Error, OSError, MotorpoolError):
            self._books.roll_back()
            self._watcher.undone()
            self._refuse_waiting()
            self._clock.after(int(REBUILD_WAIT_S * 1000), self._rebuild, life)
            return
        self._network.stream.read(reading=True)
        self.ask_all()
        self._schedule()

    def _restore(self) -> None:
        books, now_ms = self._books, self.now_ms()
        self._watcher.begun()
        if isinstance(books, LightBooks):
            self.scheduler = self._new_scheduler(1)
            self.scheduler.plan_every_ms = self._pace.plan_ms
            return
        from motorpool.store.books import leftover_batches, next_epoch, open_batches  # noqa: PLC0415

        self.scheduler = self._new_scheduler(next_epoch(books.db))
        self.enrolled = set()
        commands = restore(books.db, self.scheduler, self.enrolled, self.jobs)
        finished = [row["batch_no"] for row in open_batches(books.db) if row["status"] == "finalizing"]
        finished += leftover_batches(books.db)
        books.begin()
        self._settled_ms = self._settled_ms or now_ms + SETTLE_MS
        resumed = [*commands, *self.scheduler.resume(now_ms, settled_ms=self._settled_ms)]
        entry = Entry()
        self._watcher.decided(entry, resumed, now_ms)
        acts = self._apply(resumed, entry, now_ms)
        books.commit()
        self._watcher.committed()
        self._watcher.restored()
        self._trace.add(now_ms, f"cell restored, {len(self.scheduler.jobs)} jobs")
        for number in sorted(set(finished)):
            self._finish(number)
        self._perform(acts)

    def ask_all(self) -> None:
        """Ask every vehicle to report now."""
        data = wire.encode(wire.Sync())
        for vehicle_id in sorted(self.enrolled):
            self.send(vehicle_id, data)

    def send(self, vehicle_id: str, data: bytes) -> None:
        """Send one message to a vehicle."""
        self._network.down(vehicle_id, data)

    def _tick(self, life: int) -> None:
        if life == self._life:
            if self._pace.hears_links:
                rows = np.flatnonzero(self._linked)
                self.scheduler.cell.t.vehicles["seen_ms"][rows] = self.now_ms()
            self.post(ev.Ticked(cause_id="tick"))
            if self.news is not None:
                self.news.on_tick()
            self._clock.after(self._pace.tick_ms, self._tick, life)

    # -- what the customer, the operator and the owner's phone ask for -------------------------------------------------

    def hand_in(self, job: Job) -> None:
        """A customer hands a job in, and again until it is accepted."""
        self.jobs[job.job_id] = job
        if self.up:
            self._post(Entry(change=lambda _: self._keep(job)))
        self._clock.after(RETRY_MS, self._hand_in_again, job)

    def _hand_in_again(self, job: Job) -> None:
        if not self.is_kept(job):
            self.hand_in(job)

    def is_kept(self, job: Job) -> bool:
        """Whether a job is in the books, committed."""
        if isinstance(self._books, LightBooks):
            return job.job_no != 0
        query = "SELECT 1 FROM batch WHERE batch_id = ?"
        return self.up and self.reader.execute(query, (job.job_id,)).fetchone() is not None

    def _keep(self, job: Job) -> ev.JobStarted | None:
        return job.started() if self._books.hand_in(job) else None

    def cancel(self, job: Job) -> None:
        """A customer cancels a job, and again until that is accepted or too late."""
        if self.up and job.job_no in self.scheduler.jobs:
            self._post(Entry(event=ev.CancelAsked(cause_id="customer", job_no=job.job_no)))
            return
        if not self.up or not self.is_kept(job):
            self._clock.after(RETRY_MS, self.cancel, job)

    def owner_says(self, vehicle_id: str, what: str, until_ms: int = 0) -> None:
        """The owner's word by phone, as ``server.owner`` takes it; without an answer the owner tries again."""
        if not self.up:
            self._clock.after(RETRY_MS, self.owner_says, vehicle_id, what, until_ms)
            return
        now_ms = self.now_ms()
        document = f"{what} {now_ms}".encode()

        def change(db: sqlite3.Connection) -> ev.OwnerSpoke:
            if what == "pause":
                owners.save_word(db, vehicle_id, owners.Word(kind=what, dated_ms=now_ms, until_ms=until_ms))
                owners.pause(db, vehicle_id, owners.latest_pause_ms(db, vehicle_id, now_ms)[1])
            elif what == "withdraw":
                owners.save_word(db, vehicle_id, owners.Word(kind=owners.CONSENT, dated_ms=now_ms, document=document))
                owners.withdraw(db, vehicle_id, now_ms)
            else:
                owners.drop_pauses(db, vehicle_id, now_ms)
                owners.pause(db, vehicle_id, 0)
                owners.save_word(db, vehicle_id, owners.Word(kind=owners.CONSENT, dated_ms=now_ms, document=document))
                owners.restore_consent(db, vehicle_id)
            row = owners.find_vehicle(db, vehicle_id)
            assert row is not None
            withdrawn = row["withdrawn_ms"] is not None
            return ev.OwnerSpoke(
                cause_id="owner",
                vehicle_id=vehicle_id,
                withdrawn=withdrawn,
                paused_until_ms=row["paused_until_ms"],
                what=what,
            )

        self._post(Entry(change=change))
        self._clock.after(RETRY_MS, self._owner_says_again, vehicle_id, what, until_ms, now_ms)

    def _owner_says_again(self, vehicle_id: str, what: str, until_ms: int, since_ms: int) -> None:
        query = "SELECT 1 FROM owner_word WHERE vehicle_id = ? AND dated_ms >= ?"
        if not self.up or self.reader.execute(query, (vehicle_id, since_ms)).fetchone() is None:
            self.owner_says(vehicle_id, what, until_ms)

    # -- what vehicles say ---------------------------------------------------------------------------------------------

    def on_linked(self, vehicle_id: str, up: bool) -> None:
        """A vehicle has a link from now on, or none any more."""
        row = self.scheduler.cell.vehicle(vehicle_id)
        if row >= len(self._linked):
            self._linked = np.append(self._linked, np.zeros(row + 1, np.bool_))
        self._linked[row] = up

    def on_state(self, vehicle_id: str, data: bytes) -> None:
        """A report, or checkpoints."""
        if not self.up or vehicle_id not in self.enrolled:
            return
        try:
            message = wire.decode(wire.UP_STATE, data)
        except MotorpoolError:
            return
        if isinstance(message, wire.State):
            self.post(ev.VehicleReported(cause_id=vehicle_id, vehicle_id=vehicle_id, state=message))
        else:
            self._post(progress_entry(vehicle_id, message))

    def on_work(self, message: StreamMessage) -> None:
        """Finished or returned attempts, from the stream."""
        if not self.up:
            return
        entry = work_entry(message) if message.vehicle_id in self.enrolled else None
        if entry is None:
            self._network.stream.acknowledge(message)
        else:
            self._post(entry)

    def post(self, event: ev.SchedulerEvent) -> None:
        """Give the scheduler an event."""
        self._post(Entry(event=event))

    def _post(self, entry: Entry) -> None:
        self._inbox.append(entry)
        self._schedule()

    def _schedule(self) -> None:
        if self._inbox and not self._turning and self.up:
            self._turning = True
            self._clock.after(self._pace.turn_ms, self._turn, self._life)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _turn(self, life: int) -> None:
        if life != self._life:
            return
        self._turning = False
        most = 1 if self._singly else MAX_TAKEN
        entries = [self._inbox.popleft() for _ in range(min(len(self._inbox), most))]
        try:
            self._transact(entries)
        except (sqlite3.Error, OSError, MotorpoolError) as error:
            self._recover(entries, error)
        else:
            self._singly = max(0, self._singly - len(entries))
        self._schedule()

    def _transact(self, entries: list[Entry]) -> None:
        now_ms, acts = self.now_ms(), []
        self._watcher.begun()
        self._books.begin()
        for entry in entries:
            event = entry.event
            if entry.change is not None:
                event = entry.event = entry.change(self._books.db)
                if isinstance(event, ev.JobStarted):
                    self._by_no[event.job_no] = self.jobs[event.job_id]
            if event is None:
                continue
            commands = self.scheduler.handle(event, now_ms)
            self._watcher.decided(entry, commands, now_ms)
            acts += self._apply(commands, entry, now_ms)
        self._books.commit()
        self._watcher.committed()
        if self.dies_after_commit:
            self.dies_after_commit = False
            self.crash()
            return
        self._perform(acts)
        for entry in entries:
            if isinstance(entry.message, StreamMessage):
                self._network.stream.acknowledge(entry.message)

    def _apply(self, commands: Sequence[ev.Command], entry: Entry, now_ms: int) -> list[ev.Command]:
        acts: list[ev.Command] = []
        books = self._books
        for command in commands:
            if isinstance(command, ev.Note):
                if self.scheduler.may_tell(command.subject):
                    cause = "restart" if entry.event is None else entry.event.cause_id
                    books.note(command.subject, now_ms, cause, command.what)
            elif not books.write(command, entry, now_ms):
                acts.append(command)
        return acts

    def _recover(self, entries: list[Entry], error: Exception) -> None:
        """A transaction failed and is undone; nothing of it was acknowledged or performed."""
        self._books.roll_back()
        self._watcher.undone()
        self._trace.add(self._clock.now_ms, f"cell could not commit: {type(error).__name__}")
        for entry in entries:
            if entry.change is not None:
                entry.event = None
        if isinstance(error, OF_THE_ENTRY) or not isinstance(error, sqlite3.Error | OSError):
            if len(entries) > 1:
                self._inbox.extendleft(reversed(entries))
                self._singly = len(entries)
            elif isinstance(entries[0].message, StreamMessage):
                self._network.stream.acknowledge(entries[0].message)
            self._rebuild(self._life)
            return
        self._inbox.extendleft(reversed(entries))
        self._refuse_waiting()
        self._turning = True  # until it is built again
        self._clock.after(int(REBUILD_WAIT_S * 1000), self._rebuild_and_go_on, self._life)

    def _rebuild_and_go_on(self, life: int) -> None:
        if life == self._life:
            self._turning = False
            self._rebuild(life)

    def _refuse_waiting(self) -> None:
        """Keep what comes only once; reports come again, and so does whoever waits."""
        kept = [entry for entry in self._inbox if entry.comes_once]
        self._inbox.clear()
        self._inbox.extend(kept)

    # -- acts ----------------------------------------------------------------------------------------------------------

    def _perform(self, acts: Sequence[ev.Command]) -> None:
        for act in acts:
            match act:
                case ev.SendGrant():
                    self._send_grant(act)
                case ev.SendRevoke():
                    revoke = wire.Revoke(lease_id=act.lease_id, lines=act.lines, keep_running=act.keep_running)
                    self.send(act.vehicle_id, wire.encode(revoke))
                case ev.SendOwnerNews():
                    if self.news is not None:
                        self.news.tell(act.vehicle_id)
                case ev.AssembleFiles():
                    self._finish(act.job_no)
                case _:
                    raise AssertionError(f"nobody performs {type(act).__name__}")

    def job(self, job_no: int) -> Job:
        """The job that the books have under this number."""
        job = self._by_no.get(job_no)
        if job is None:
            assert isinstance(self._books, SqlBooks)
            batch_id = self._books.db.execute("SELECT batch_id FROM batch WHERE batch_no = ?", (job_no,)).fetchone()[0]
            job = self._by_no[job_no] = self.jobs[batch_id]
        return job

    def _send_grant(self, act: ev.SendGrant) -> None:
        if act.lease_id not in self.scheduler.leases:
            return  # it ended within the same transaction
        job = self.job(act.job_no)
        checkpoints = self._books.checkpoints(act.job_no, act.with_checkpoint) if act.with_checkpoint else {}
        items = [wire.Item(line=line, body=job.bodies[line], checkpoint=checkpoints.get(line)) for line in act.lines]
        grant = wire.Grant(
            lease_id=act.lease_id,
            incarnation=act.incarnation,
            job_id=job.job_id,
            kind=act.kind,
            model=act.model,
            ttl_ms=act.ttl_ms,
            items=items,
            max_offline_ms=act.max_offline_ms,
            pay_input_micro=owner_pay(PRICE)[0],
            pay_output_micro=owner_pay(PRICE)[1],
            customer_class=CUSTOMER_CLASS,
        )
        try:
            data = wire.encode(grant)
        except TooLargeError:
            bare = [msgspec.structs.replace(item, checkpoint=None) for item in items]
            data = wire.encode(msgspec.structs.replace(grant, items=bare))
        self.send(act.vehicle_id, data)

    def _finish(self, job_no: int) -> None:
        """Write the files of a job, in a while; once for each process."""
        if job_no not in self._finishing:
            self._finishing.add(job_no)
            self._clock.after(50, self._write_files, self._life, job_no)

    def _write_files(self, life: int, job_no: int) -> None:
        if life != self._life:
            return
        try:
            status = self._books.finish(job_no, self.now_ms())
        except (sqlite3.Error, StoreError):
            self._books.roll_back()
            self._clock.after(RETRY_MS, self._write_files, life, job_no)
            return
        self._trace.add(self._clock.now_ms, f"job {job_no} {status}")
        job = self.job(job_no)
        self._watcher.ended(job, status)
        if isinstance(self._books, LightBooks):  # nothing asks for it again, and a long world has many
            del self.jobs[job.job_id], self._by_no[job_no]
