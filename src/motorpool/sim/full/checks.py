"""What must always hold, checked after every event of a simulated world, from outside.

Decides: whether a promise of the design was broken. Keeps a mirror of its own, built from the commands alone, and looks
at cars, engines and books rather than at anybody's word. Must not: steer anything, or share code with what it checks,
except that it asks each state machine for its own invariants too.
Called by: ``sim.full.cell`` and ``sim.full.vehicle``, at each event; ``sim.full.run`` at the end.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from motorpool import wire
from motorpool.core import events as ev
from motorpool.core.vehicle_events import (
    Command,
    Event,
    FreezeEngine,
    PublishWork,
    StartEngine,
    SubmitAttempts,
    ThawEngine,
    VerdictGiven,
)
from motorpool.server.entries import Entry
from motorpool.sim.full.clock import Clock, Trace
from motorpool.sim.full.vehicle import WATTS_W, Vehicle
from motorpool.sim.full.work import PRICE, Fate, Job, answer_body, answer_text
from motorpool.sim.witness import Promises, Witness
from motorpool.types import VehicleState

LINE_BITS: Final = 32
_WORK: Final = (StartEngine, ThawEngine, SubmitAttempts)  # commands that need a permit
WORKS: Final = frozenset({VehicleState.READY, VehicleState.WORKING})
ENDED: Final = frozenset({"completed", "expired", "cancelled", "failed"})
PRICE_TOP: Final = 1_000_000


class InvariantError(AssertionError):
    """A promise was broken. ``kind`` names it, ``at_ms`` is the true time."""

    def __init__(self, kind: str, detail: str, at_ms: int) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.at_ms = at_ms


class _Lease:
    """A lease as the commands tell of it."""

    __slots__ = ("keys", "vehicle_id")

    def __init__(self, vehicle_id: str, keys: frozenset[int]) -> None:
        self.vehicle_id = vehicle_id
        self.keys = keys


class Checks:
    """One world's checks. ``sample`` validates the states' own invariants at every so many events."""

    def __init__(
        self, clock: Clock, trace: Trace, *, sample: int = 4, liars: frozenset[str] = frozenset(), books: bool = True
    ) -> None:
        self._clock = clock
        self._trace = trace
        self._sample = sample
        self._books = books
        self.liars = liars
        self.scheduler: Callable[[], Any] = lambda: None
        self.job_of: Callable[[int], Job]
        self.ended_jobs: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self._events = 0
        # the mirror, with what undoes the transaction that is not committed yet
        self._leases: dict[str, _Lease] = {}
        self._holders: dict[int, frozenset[str]] = {}
        self._ever: dict[int, frozenset[str]] = {}
        self._done: dict[int, str | None] = {}
        self._transfers: dict[str, tuple[str, str, int]] = {}
        self._charged: dict[str, int] = {}
        self._completed: dict[int, int] = {}
        self._undo: list[tuple[dict[Any, Any], Any, Any]] = []
        self._touched: set[int] = set()
        self._takes: dict[type, Callable[[Any, ev.Event | None, int], None]] = {
            ev.SaveLease: self._lease,
            ev.DropLease: self._dropped,
            ev.SaveResults: self._results,
            ev.SaveFailures: self._failures,
            ev.PostTransfers: self._post,
            ev.SaveWithdrawal: self._withdrawal,
            ev.SaveJobCounts: self._counted,
            ev.AssembleFiles: self._may_end,
        }
        # what vehicles said and what their owners said, as the cell has heard it
        self._said: dict[str, wire.State] = {}
        self._told_not_to: dict[str, tuple[bool, int]] = {}
        # vehicles
        self._granted: dict[str, set[tuple[str, int]]] = {}
        self._given_back: dict[str, Counter[tuple[str, int]]] = {}
        self._witnesses: dict[str, tuple[Witness, int]] = {}

    def broken(self, kind: str, detail: str = "") -> InvariantError:
        """A promise was broken."""
        return InvariantError(kind, detail, self._clock.now_ms)

    def _due(self) -> bool:
        self._events += 1
        return self._events % self._sample == 0

    # -- the cell ------------------------------------------------------------------------------------------------------

    def begun(self) -> None:
        """A transaction has begun."""
        self._undo.clear()

    def undone(self) -> None:
        """Nothing of it is in the books."""
        for table, key, before in reversed(self._undo):
            if before is _NOTHING:
                table.pop(key, None)
            else:
                table[key] = before
        self._undo.clear()
        self._touched.clear()
        self._said.clear()

    def committed(self) -> None:
        """All of it is."""
        self._undo.clear()

    def restored(self) -> None:
        """A new scheduler was built: it knows nothing of what vehicles said."""
        self._said.clear()

    def _set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        if self._books:  # light ones never undo anything
            self._undo.append((table, key, table.get(key, _NOTHING)))
        table[key] = value

    def _drop(self, table: dict[Any, Any], key: Any) -> None:
        if key in table:
            before = table.pop(key)
            if self._books:
                self._undo.append((table, key, before))

    def decided(self, entry: Entry, commands: Sequence[ev.Command], now_ms: int) -> None:
        """The scheduler has handled an event."""
        event = entry.event
        if isinstance(event, ev.JobStarted):
            self.counts["jobs"] += 1
        elif isinstance(event, ev.VehicleReported):
            self._report(event)
        elif isinstance(event, ev.OwnerSpoke):
            self._set(self._told_not_to, event.vehicle_id, (event.withdrawn, event.paused_until_ms))
        takes = self._takes
        for command in commands:
            take = takes.get(type(command))
            if take is not None:
                take(command, event, now_ms)
        for key in self._touched:
            holders = self._holders.get(key, frozenset())
            if len({self._leases[lease_id].vehicle_id for lease_id in holders}) < len(holders) or len(holders) > 2:
                raise self.broken("a line has too many holders", f"{_name(key)}: {', '.join(sorted(holders))}")
            if holders and key in self._done:
                raise self.broken("a finished line is leased", _name(key))
        self._touched.clear()
        if self._due():
            self.scheduler().validate()

    def _report(self, event: ev.VehicleReported) -> None:
        """The latest word of a vehicle; one that comes late is none."""
        said, state = self._said.get(event.vehicle_id), event.state
        if said is None or said.incarnation != state.incarnation or state.seq > said.seq:
            self._said[event.vehicle_id] = state

    def _failures(self, command: ev.SaveFailures, _event: ev.Event | None, _now_ms: int) -> None:
        if not command.code or not command.message:
            raise self.broken("a line was given up without a reason", str(command.lines))
        for line in command.lines:
            self._end(_key(command.job_no, line), None)

    def _withdrawal(self, command: ev.SaveWithdrawal, _event: ev.Event | None, _now_ms: int) -> None:
        if not command.seen:
            paused_until_ms = self._told_not_to.get(command.vehicle_id, (False, 0))[1]
            self._set(self._told_not_to, command.vehicle_id, (False, paused_until_ms))

    def _lease(self, command: ev.SaveLease, _event: ev.Event | None, now_ms: int) -> None:
        keys = frozenset(_key(command.job_no, line) for line in command.lines)
        known = self._leases.get(command.lease_id)
        if known is None:
            if len(keys) < len(command.lines):
                raise self.broken("a lease names a line twice", command.lease_id)
            self._may_work(command.vehicle_id, now_ms)
            for key in keys:
                self._set(self._ever, key, self._ever.get(key, frozenset()) | {command.vehicle_id})
        else:
            if not keys <= known.keys or command.vehicle_id != known.vehicle_id:
                raise self.broken("a lease has grown or moved", command.lease_id)
            self._release(command.lease_id)
        for key in keys:
            self._set(self._holders, key, self._holders.get(key, frozenset()) | {command.lease_id})
        self._touched |= keys
        self._set(self._leases, command.lease_id, _Lease(command.vehicle_id, keys))

    def _may_work(self, vehicle_id: str, now_ms: int) -> None:
        """New work goes only to a vehicle that says that it may, and whose owner has said nothing against it."""
        if vehicle_id in self.liars:
            return  # whatever it may, it says something else
        said = self._said.get(vehicle_id)
        if said is None or said.state not in WORKS:
            state = "unheard" if said is None else said.state.value
            raise self.broken("work for a vehicle without a permit", f"{vehicle_id} is {state}")
        withdrawn, paused_until_ms = self._told_not_to.get(vehicle_id, (False, 0))
        if withdrawn or now_ms < paused_until_ms:
            raise self.broken("work against the owner's word", vehicle_id)

    def _dropped(self, command: ev.DropLease, _event: ev.Event | None, _now_ms: int) -> None:
        self._release(command.lease_id)

    def _release(self, lease_id: str) -> None:
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        for key in lease.keys:
            left = self._holders.get(key, frozenset()) - {lease_id}
            self._set(self._holders, key, left)
        self._touched |= lease.keys
        self._drop(self._leases, lease_id)

    def _end(self, key: int, vehicle_id: str | None) -> None:
        if key in self._done:
            raise self.broken("a line counts twice", _name(key))
        self._set(self._done, key, vehicle_id)
        for lease_id in self._holders.get(key, frozenset()):
            lease = self._leases[lease_id]
            self._set(self._leases, lease_id, _Lease(lease.vehicle_id, lease.keys - {key}))
        self._set(self._holders, key, frozenset())

    def _results(self, command: ev.SaveResults, event: ev.Event | None, _now_ms: int) -> None:
        assert isinstance(event, ev.ResultsArrived)
        job = self.job_of(command.job_no)
        for place, cost in zip(command.picks, command.costs_micro, strict=True):
            line = event.lines[place]
            key = _key(command.job_no, line)
            if command.vehicle_id not in self._ever.get(key, frozenset()):
                raise self.broken(
                    "a result of a vehicle that never held the line", f"{_name(key)} {command.vehicle_id}"
                )
            self._end(key, command.vehicle_id)
            prompt = min(event.prompt_tokens[place], len(job.bodies[line]) + 4_096)
            tokens = min(event.completion_tokens[place], job.limits[line])
            top = (prompt * PRICE.input_micro + tokens * PRICE.output_micro) // PRICE_TOP + 1
            if not 0 <= cost <= top:
                raise self.broken("a line costs more than it can", f"{_name(key)}: {cost}")

    def _post(self, command: ev.PostTransfers, _event: ev.Event | None, _now_ms: int) -> None:
        for transfer in command.transfers:
            if transfer.transfer_id in self._transfers:
                raise self.broken("a transfer is posted twice", transfer.transfer_id)
            if transfer.amount_micro <= 0 or transfer.debit == transfer.credit:
                raise self.broken("a transfer moves nothing", transfer.transfer_id)
            if self._books:
                row = (transfer.debit, transfer.credit, transfer.amount_micro)
                self._set(self._transfers, transfer.transfer_id, row)
            if transfer.kind == "usage":
                charged = self._charged.get(transfer.reference, 0) + transfer.amount_micro
                self._set(self._charged, transfer.reference, charged)

    def _counted(self, command: ev.SaveJobCounts, _event: ev.Event | None, _now_ms: int) -> None:
        done = self._completed.get(command.job_no, 0) + command.completed + command.failed
        self._set(self._completed, command.job_no, done)

    def _may_end(self, command: ev.AssembleFiles, _event: ev.Event | None, now_ms: int) -> None:
        """A job ends when its last line has, when its window closes, or when its customer cancels it."""
        job_no = command.job_no
        job = self.job_of(job_no)
        done = sum(1 for line in range(len(job.lines)) if _key(job_no, line) in self._done)
        closed = now_ms >= job.expires_ms or job.cancel_ms is not None
        if done < len(job.lines) and not closed:
            raise self.broken("a job ends before its lines", f"{job.job_id}: {done} of {len(job.lines)}")

    def ended(self, job: Job, status: str) -> None:
        """A job has its last status."""
        if self.ended_jobs.get(job.job_no, status) != status:
            raise self.broken("a job ends twice", f"{job.job_id}: {status}")
        self.ended_jobs[job.job_no] = status
        if not self._books:  # nobody audits these at the end, and a long world has many lines
            for line in range(len(job.lines)):
                key = _key(job.job_no, line)
                self._done.pop(key, None)
                self._ever.pop(key, None)
                self._holders.pop(key, None)
            self._completed.pop(job.job_no, None)
            self._charged.pop(job.job_id, None)

    # -- vehicles ------------------------------------------------------------------------------------------------------

    def started(self, vehicle: Vehicle) -> None:
        """A new incarnation holds nothing."""
        self._granted[vehicle.vehicle_id] = set()
        self._given_back[vehicle.vehicle_id] = Counter()

    def arrived(self, vehicle: Vehicle, grant: wire.Grant) -> None:
        """A grant is about to be handed in."""
        self._granted[vehicle.vehicle_id].update((grant.lease_id, item.line) for item in grant.items)

    def handled(self, vehicle: Vehicle, event: Event, commands: Sequence[Command]) -> None:
        """The machine has taken an event."""
        now_ms = self._clock.now_ms
        for number, command in enumerate(commands):
            if isinstance(command, _WORK):
                if now_ms >= vehicle.permit_until_ms:
                    raise self.broken("work without a permit", f"{vehicle.vehicle_id}: {type(command).__name__}")
            elif isinstance(command, PublishWork):
                self._given(vehicle, command.message)
            elif isinstance(command, FreezeEngine) and number:
                raise self.broken("something came before the freeze", vehicle.vehicle_id)
        if self._due():
            assert vehicle.machine is not None
            vehicle.machine.validate()
        if self._books:
            self._trace.add(now_ms, f"{vehicle.vehicle_id} {type(event).__name__} {len(commands)}")

    def _given(self, vehicle: Vehicle, message: wire.Results | wire.Returned) -> None:
        """Every line of a lease ends once, in a result or on its way back."""
        granted, given = self._granted[vehicle.vehicle_id], self._given_back[vehicle.vehicle_id]
        for item in message.items:
            key = (message.lease_id, item.line)
            if key not in granted:
                raise self.broken("a vehicle speaks of a line that it never had", f"{vehicle.vehicle_id} {key}")
            given[key] += 1
            if given[key] > 1:
                raise self.broken("a line of a lease ends twice", f"{vehicle.vehicle_id} {key}")

    def computed(self, vehicle: Vehicle, from_ms: int, to_ms: int) -> None:
        """The engine used the processor: there must have been a permit for all of it."""
        if to_ms > vehicle.permit_until_ms:
            detail = f"{vehicle.vehicle_id}: {to_ms - from_ms} ms up to {to_ms - vehicle.permit_until_ms} ms after it"
            raise self.broken("computing without a permit", detail)
        self.counts["busy_ms"] += to_ms - from_ms

    def judged(self, vehicle: Vehicle, verdict: VerdictGiven, now_ms: int) -> None:
        """The guard has looked: would the owner agree."""
        if vehicle.twin is None:
            return
        witness, since_ms = self._witnesses.get(vehicle.vehicle_id, (None, now_ms))
        if witness is None:
            promises = Promises(watts_w=WATTS_W, pay_per_watt_h=1.0)
            witness = Witness(promises, vehicle.car, vehicle.twin)
        before = sum(witness.counts.values())
        working = vehicle.engine.on and not vehicle.engine.frozen
        if now_ms > since_ms:
            fed = vehicle.car.grid and vehicle.car.plugged  # a cut is seen at its end
            witness.passed(now_ms, now_ms - since_ms, working=working and fed)
        if verdict.permit is not None:
            witness.permitted(now_ms, verdict.permit.watts_w, 0.0)
        elif working:
            witness.charge(now_ms, "the end of a permit")
        self._witnesses[vehicle.vehicle_id] = witness, now_ms
        if sum(witness.counts.values()) > before:
            found = witness.examples[-1]
            raise self.broken(f"the owner: {found.kind}", f"{vehicle.vehicle_id} {found.detail}")

    # -- the books -----------------------------------------------------------------------------------------------------

    def audit(self, db: sqlite3.Connection) -> None:
        """The books say the same as everything that was decided."""
        rows = {row[0]: row for row in db.execute("SELECT * FROM result")}
        if rows.keys() != self._done.keys():
            differ = sorted(rows.keys() ^ self._done.keys())[:3]
            raise self.broken("the books lost or made a line", ", ".join(_name(key) for key in differ))
        transfers = {row[0]: (row[2], row[3], row[4]) for row in db.execute("SELECT * FROM transfer")}
        if transfers != self._transfers:
            raise self.broken("the books lost or made a transfer")
        balances: Counter[str] = Counter()
        for debit, credit, amount in transfers.values():
            balances[debit] -= amount
            balances[credit] += amount
        if sum(balances.values()):
            raise self.broken("the ledger does not sum to zero", str(sum(balances.values())))
        for row in db.execute("SELECT vehicle_id, earned_micro FROM vehicle"):
            if row[1] != balances[f"owner:{row[0]}"]:
                raise self.broken("an owner's earnings are not the transfers", row[0])
        leases = {row[0] for row in db.execute("SELECT lease_id FROM lease")}
        if leases != self._leases.keys():
            raise self.broken("the books lost or made a lease", str(sorted(leases ^ self._leases.keys())[:3]))
        self._audit_jobs(db, rows)

    def _audit_jobs(self, db: sqlite3.Connection, rows: dict[int, sqlite3.Row]) -> None:
        by_job: dict[int, list[sqlite3.Row]] = {}
        for key, row in rows.items():
            by_job.setdefault(key >> LINE_BITS, []).append(row)
        for batch in db.execute("SELECT * FROM batch"):
            found = by_job.get(batch["batch_no"], [])
            answered = [row for row in found if 0 < row["status"] < 400]
            names = ("prompt_tokens", "completion_tokens")
            sums = [len(answered), len(found) - len(answered), sum(row["cost_micro"] for row in found)]
            sums += [sum(row[name] for row in answered) for name in names]
            said = [batch[name] for name in ("completed", "failed", "cost_micro", *names)]
            # A line that a liar has overstated stands in the books as it was said, and was billed for what is possible.
            if sums[:3] != said[:3] or (not self.liars and sums != said):
                raise self.broken("a job's totals are not its lines", f"{batch['batch_id']}: {said} is not {sums}")
            if self._charged.get(batch["batch_id"], 0) != said[2]:
                raise self.broken("a customer was charged something else", batch["batch_id"])

    def audit_answers(self, db: sqlite3.Connection) -> None:
        """Tokens billed are tokens delivered, and each answer is the right one. For lines that no liar ever held."""
        for row in db.execute("SELECT * FROM result WHERE status > 0"):
            key = row["line_key"]
            job, number = self.job_of(key >> LINE_BITS), key & ((1 << LINE_BITS) - 1)
            line = job.lines[number]
            if self._ever.get(key, frozenset()) & self.liars:
                continue
            if line.fate == Fate.BAD:
                if row["status"] != 400 or row["cost_micro"]:
                    raise self.broken("a customer's mistake is billed", _name(key))
                continue
            text = answer_text(line.job, line.line, line.tokens)
            if row["status"] != 200 or row["body"] != answer_body(line, text):
                raise self.broken("an answer is not the right one", f"{_name(key)}: status {row['status']}")
            if (row["prompt_tokens"], row["completion_tokens"]) != (line.prompt, line.tokens):
                raise self.broken("tokens billed are not tokens delivered", _name(key))

    def all_ended(self, db: sqlite3.Connection) -> None:
        """Every job ended, in results or in named reasons, and no lease is left."""
        for batch in db.execute("SELECT batch_no, batch_id, status, total, completed, failed FROM batch"):
            if batch["status"] not in ENDED:
                left = batch["total"] - batch["completed"] - batch["failed"]
                raise self.broken("a job does not end", f"{batch['batch_id']} is {batch['status']}, {left} lines left")
            if batch["status"] == "completed" and batch["completed"] + batch["failed"] != batch["total"]:
                raise self.broken("a completed job lacks lines", batch["batch_id"])
        if db.execute("SELECT count(*) FROM lease").fetchone()[0]:
            raise self.broken("a lease outlives its job")


_NOTHING: Final = object()


def _key(job_no: int, line: int) -> int:
    return job_no << LINE_BITS | line


def _name(key: int) -> str:
    return f"line {key & ((1 << LINE_BITS) - 1)} of job {key >> LINE_BITS}"
