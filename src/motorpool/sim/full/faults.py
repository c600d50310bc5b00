"""What goes wrong in a simulated world: a plan that follows from the seed, and who carries it out.

Decides: which faults strike when, for how long, and whom; what liars say. Must not: soften what follows.
Called by: ``sim.full.run``.

Each kind of fault draws from a stream of its own, so a world without one kind is otherwise the same: a failure can be
made smaller by leaving kinds out.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final

import msgspec

from motorpool import wire
from motorpool.agent.signals.car import Action
from motorpool.errors import MotorpoolError
from motorpool.sim.full.books import SqlBooks
from motorpool.sim.full.cell import Cell
from motorpool.sim.full.clock import Clock, Draws, Trace
from motorpool.sim.full.network import Network, Weather
from motorpool.sim.full.vehicle import Vehicle
from motorpool.types import ReturnReason, VehicleState

SECOND_MS: Final = 1_000


class Kind(StrEnum):
    """The kinds of faults."""

    DROPS = "drops"
    DOUBLES = "doubles"
    DELAYS = "delays"
    REORDERS = "reorders"
    PARTITIONS = "partitions"
    OUTAGES = "outages"  # the message server is gone for everybody
    CLOCKS = "clocks"  # vehicles' clocks are wrong, jump ahead, and so does the cell's
    CELL_CRASHES = "cell-crashes"
    AGENT_CRASHES = "agent-crashes"
    AGENT_HANGS = "agent-hangs"
    ENGINE_DEATHS = "engine-deaths"
    ENGINE_HANGS = "engine-hangs"
    FULL_DISKS = "full-disks"
    FULL_SPOOLS = "full-spools"
    OWNERS = "owners"  # no fault, but what cars are for
    LIARS = "liars"
    CHEATS = "cheats"
    POISON = "poison"  # lines that kill engines


ALL: Final = tuple(Kind)


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that goes wrong: from ``at_ms`` of the world for ``for_ms``. ``whom`` is a vehicle, empty for none."""

    kind: Kind
    at_ms: int
    for_ms: int = 0
    whom: str = ""
    what: str = ""
    value: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that goes wrong in one world until ``heal_ms``."""

    heal_ms: int
    weather: Weather
    faults: tuple[Fault, ...]
    skews_ms: dict[str, int]
    liars: frozenset[str] = frozenset()
    cheats: frozenset[str] = frozenset()
    spool_bytes: int = 1 << 24


OWNER_ACTS: Final = ("door", "drive", "power", "heat", "metered", "fault", "update", "pause", "withdraw")


def make_plan(seed: int, vehicle_ids: list[str], kinds: frozenset[Kind]) -> Plan:
    """The plan of a seed. About half of all kinds strike in each world."""
    choose = Draws(seed, "kinds")
    struck = {kind for kind in ALL if choose.chance(0.5)} & kinds
    length = Draws(seed, "length")
    heal_ms = length.between(25, 70) * SECOND_MS
    faults: list[Fault] = []
    for kind, make in _MAKERS.items():
        if kind in struck:
            faults += make(Draws(seed, kind.value), heal_ms, vehicle_ids)
    weather = Draws(seed, "weather")
    shares = {kind: weather.pick((0.02, 0.1, 0.3)) for kind in (Kind.DROPS, Kind.DOUBLES, Kind.DELAYS, Kind.REORDERS)}
    skew = Draws(seed, "skew")
    skews = {vehicle_id: skew.between(-3_600, 3_600) * SECOND_MS for vehicle_id in vehicle_ids}
    untrue = Draws(seed, "liars")
    most = max(1, (len(vehicle_ids) - 1) // 2)  # some honest vehicles are left
    picked = sorted(vehicle_ids, key=lambda _: untrue.bits())
    return Plan(
        heal_ms=heal_ms,
        weather=Weather(
            drops=shares[Kind.DROPS] if Kind.DROPS in struck else 0.0,
            doubles=shares[Kind.DOUBLES] if Kind.DOUBLES in struck else 0.0,
            delays=shares[Kind.DELAYS] if Kind.DELAYS in struck else 0.0,
            reorders=shares[Kind.REORDERS] if Kind.REORDERS in struck else 0.0,
            late_ms=weather.pick((300, 2_000, 8_000)),
        ),
        faults=tuple(sorted(faults, key=lambda fault: (fault.at_ms, fault.kind, fault.whom))),
        skews_ms=skews if Kind.CLOCKS in struck else dict.fromkeys(vehicle_ids, 0),
        liars=frozenset(picked[: untrue.between(1, most)]) if Kind.LIARS in struck else frozenset(),
        cheats=frozenset(picked[-1:]) if Kind.CHEATS in struck and len(picked) > 2 else frozenset(),
        spool_bytes=400 if Kind.FULL_SPOOLS in struck else 1 << 24,
    )


Maker = Callable[[Draws, int, list[str]], list[Fault]]


def _each(kind: Kind, most: int, longest_ms: int, *, whom: bool = True) -> Maker:
    def make(draws: Draws, heal_ms: int, vehicle_ids: list[str]) -> list[Fault]:
        return [
            Fault(
                kind=kind,
                at_ms=draws.below(heal_ms),
                for_ms=draws.between(200, longest_ms),
                whom=draws.pick(vehicle_ids) if whom else "",
                value=draws.below(1 << 16),
            )
            for _ in range(draws.between(1, most))
        ]

    return make


def _owners(draws: Draws, heal_ms: int, vehicle_ids: list[str]) -> list[Fault]:
    return [
        Fault(
            kind=Kind.OWNERS,
            at_ms=draws.below(heal_ms),
            for_ms=draws.between(500, 25_000),
            whom=draws.pick(vehicle_ids),
            what=draws.pick(OWNER_ACTS),
        )
        for _ in range(draws.between(1, 2 * len(vehicle_ids)))
    ]


_MAKERS: Final[dict[Kind, Maker]] = {
    Kind.PARTITIONS: _each(Kind.PARTITIONS, 5, 45_000),
    Kind.OUTAGES: _each(Kind.OUTAGES, 2, 30_000, whom=False),
    Kind.CLOCKS: _each(Kind.CLOCKS, 3, 3_600_000),
    Kind.CELL_CRASHES: _each(Kind.CELL_CRASHES, 3, 25_000, whom=False),
    Kind.AGENT_CRASHES: _each(Kind.AGENT_CRASHES, 4, 20_000),
    Kind.AGENT_HANGS: _each(Kind.AGENT_HANGS, 3, 30_000),
    Kind.ENGINE_DEATHS: _each(Kind.ENGINE_DEATHS, 5, 1_000),
    Kind.ENGINE_HANGS: _each(Kind.ENGINE_HANGS, 2, 1_000),
    Kind.FULL_DISKS: _each(Kind.FULL_DISKS, 2, 8_000, whom=False),
    Kind.OWNERS: _owners,
}


class Gremlin:
    """Carries a plan out. After ``heal`` nothing is wrong any more, and everybody is honest."""

    def __init__(
        self,
        *,
        plan: Plan,
        clock: Clock,
        trace: Trace,
        network: Network,
        cell: Cell,
        books: SqlBooks,
        vehicles: dict[str, Vehicle],
        seed: int,
    ) -> None:
        self._plan = plan
        self._clock = clock
        self._trace = trace
        self._network = network
        self._cell = cell
        self._books = books
        self._vehicles = vehicles
        self._begin_ms = clock.now_ms
        self._healed = False
        self._full = 0
        self._phoned: set[str] = set()
        self._liars = {name: Liar(name, Draws(seed, "liar", name), network) for name in sorted(plan.liars)}
        for name in sorted(plan.cheats - plan.liars):
            self._liars[name] = Cheat(name, Draws(seed, "cheat", name), network)
        self._act: dict[Kind, Callable[[Fault], None]] = {
            Kind.PARTITIONS: self._partition,
            Kind.OUTAGES: self._outage,
            Kind.CLOCKS: self._clock_jumps,
            Kind.CELL_CRASHES: self._cell_crash,
            Kind.AGENT_CRASHES: self._agent_crash,
            Kind.AGENT_HANGS: lambda fault: self._vehicles[fault.whom].hang(fault.for_ms),
            Kind.ENGINE_DEATHS: lambda fault: self._vehicles[fault.whom].engine.die(9),
            Kind.ENGINE_HANGS: self._engine_hang,
            Kind.FULL_DISKS: self._full_disk,
            Kind.OWNERS: self._owner,
        }

    def begin(self) -> None:
        """Everything of the plan will happen."""
        self._network.weather = self._plan.weather
        for name, liar in self._liars.items():
            self._vehicles[name].tamper = liar.tamper
            self._clock.after(1_000, self._lie, liar)
        for fault in self._plan.faults:
            self._clock.at(self._begin_ms + fault.at_ms, self._strike, fault)

    def _strike(self, fault: Fault) -> None:
        if not self._healed:
            self._trace.add(self._clock.now_ms, f"fault {fault.kind} {fault.whom} {fault.what} {fault.for_ms} ms")
            self._act[fault.kind](fault)

    def _lie(self, liar: Liar) -> None:
        if not self._healed:
            liar.speak(self._vehicles)
            self._clock.after(liar.every_ms, self._lie, liar)

    # -- what strikes --------------------------------------------------------------------------------------------------

    def _partition(self, fault: Fault) -> None:
        self._network.cut(fault.whom)
        self._clock.after(fault.for_ms, self._network.mend, fault.whom)

    def _outage(self, fault: Fault) -> None:
        for name in self._vehicles:
            self._network.cut(name)
            self._clock.after(fault.for_ms, self._network.mend, name)
        self._network.stream.read(reading=False)
        self._clock.after(fault.for_ms, self._server_back)

    def _server_back(self) -> None:
        if self._cell.up and not self._network.stream.reading:
            self._network.stream.read(reading=True)
            self._cell.ask_all()

    def _clock_jumps(self, fault: Fault) -> None:
        self._vehicles[fault.whom].skew_ms += fault.for_ms

    def _cell_crash(self, fault: Fault) -> None:
        if not self._cell.up:
            return
        if fault.value % 2:
            self._cell.dies_after_commit = True
        else:
            self._cell.crash()
        self._clock.after(fault.for_ms, self._cell_back, fault.value % 7 - 3)

    def _cell_back(self, skew_s: int) -> None:
        self._cell.dies_after_commit = False
        if not self._cell.up:
            self._cell.skew_ms = skew_s * 10_000 if Kind.CLOCKS in {fault.kind for fault in self._plan.faults} else 0
            self._cell.start()

    def _agent_crash(self, fault: Fault) -> None:
        vehicle = self._vehicles[fault.whom]
        if vehicle.machine is not None:
            vehicle.crash()
            self._clock.after(min(fault.for_ms, 15_000), self._agent_back, vehicle)

    def _agent_back(self, vehicle: Vehicle) -> None:
        if vehicle.machine is None:
            vehicle.start()

    def _engine_hang(self, fault: Fault) -> None:
        self._vehicles[fault.whom].engine.hang()

    def _full_disk(self, fault: Fault) -> None:
        self._full += 1
        if self._cell.up:
            self._books.limit(fault.value % 3)
        self._clock.after(fault.for_ms, self._disk_empty)

    def _disk_empty(self) -> None:
        self._full -= 1
        if not self._full:
            self._books.limit(None)

    # -- owners --------------------------------------------------------------------------------------------------------

    def _owner(self, fault: Fault) -> None:
        vehicle, after_ms = self._vehicles[fault.whom], fault.for_ms
        if fault.what == "pause":
            self._phoned.add(fault.whom)
            self._cell.owner_says(fault.whom, "pause", self._cell.now_ms() + after_ms)
            return
        if fault.what == "withdraw":
            self._phoned.add(fault.whom)
            self._cell.owner_says(fault.whom, "withdraw")
            self._clock.after(after_ms + 5_000, self._cell.owner_says, fault.whom, "grant")
            return
        self._car(vehicle, DOES[fault.what])
        for number, action in enumerate(UNDOES[fault.what]):
            self._clock.after(after_ms + 8_000 * (number + 1), self._car, vehicle, action)

    def _car(self, vehicle: Vehicle, action: Action) -> None:
        if vehicle.act(action):
            self._trace.add(self._clock.now_ms, f"{vehicle.vehicle_id} owner: {action.value}")

    # -- the end -------------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Nothing is lost or late any more, every part is up, every car stands where it can work."""
        self._healed = True
        self._trace.add(self._clock.now_ms, "the world heals")
        self._network.weather = Weather()
        self._books.limit(None)
        for liar in self._liars.values():
            self._vehicles[liar.vehicle_id].tamper = None
        if not self._cell.up:
            self._cell_back(0)
        for name, vehicle in self._vehicles.items():
            if vehicle.machine is None:
                vehicle.start()
            self._clock.after(45_000, self._back_home, vehicle)
            if name in self._phoned:
                self._cell.owner_says(name, "grant")

    def _back_home(self, vehicle: Vehicle) -> None:
        for action in HOME:
            self._car(vehicle, action)
        self._clock.after(15_000, self._plug_in, vehicle)

    def _plug_in(self, vehicle: Vehicle) -> None:
        for action in (Action.LOCK, Action.PLUG_IN):
            self._car(vehicle, action)


DOES: Final = {
    "door": Action.OPEN_DOOR,
    "drive": Action.DRIVE_OFF,
    "power": Action.POWER_CUT,
    "heat": Action.HEAT_WAVE,
    "metered": Action.NETWORK_METERED,
    "fault": Action.FAULT,
    "update": Action.START_UPDATE,
}
UNDOES: Final = {
    "door": (Action.LOCK,),
    "drive": (Action.COME_BACK, Action.PLUG_IN),
    "power": (Action.POWER_BACK,),
    "heat": (Action.COOL_DOWN,),
    "metered": (Action.NETWORK_FREE,),
    "fault": (Action.FAULT_CLEARED,),
    "update": (Action.END_UPDATE,),
}
HOME: Final = (
    Action.POWER_BACK,
    Action.COOL_DOWN,
    Action.NETWORK_FREE,
    Action.FAULT_CLEARED,
    Action.END_UPDATE,
    Action.COME_BACK,
)


class Liar:
    """A vehicle whose agent sends what it likes, under its own name: the server lets nobody use another's."""

    def __init__(self, vehicle_id: str, draws: Draws, network: Network) -> None:
        self.vehicle_id = vehicle_id
        self.every_ms = 700
        self._draws = draws
        self._network = network
        self._heard: list[bytes] = []  # what it sent itself, to be sent again
        self._number = 0

    def tamper(self, way: str, data: bytes) -> bytes:
        """What is really sent in the place of an honest message."""
        if len(self._heard) < 50:
            self._heard.append(data)
        if not self._draws.chance(0.4):
            return data
        try:
            message: Any = wire.decode(wire.UP_WORK if way == "work" else wire.UP_STATE, data)
        except MotorpoolError:
            return data
        if isinstance(message, wire.Results):
            results = [self._overstate(each) for each in message.items]
            return wire.encode(msgspec.structs.replace(message, items=results))
        if isinstance(message, wire.State):
            return wire.encode(self._false_state(message))
        if isinstance(message, wire.Progress):
            items = [
                wire.ProgressItem(line=each.line, tokens=self._draws.below(500), checkpoint=self._checkpoint())
                for each in message.items
            ]
            return wire.encode(msgspec.structs.replace(message, items=items))
        items_back = [msgspec.structs.replace(each, tokens=self._draws.below(400)) for each in message.items]
        return wire.encode(msgspec.structs.replace(message, items=items_back))

    def _overstate(self, item: wire.ResultItem) -> wire.ResultItem:
        draws = self._draws
        return msgspec.structs.replace(
            item,
            status=draws.pick((200, 200, 200, 500, 503, 404)),
            prompt_tokens=draws.pick((0, item.prompt_tokens, 1 << 20, 1 << 24)),
            completion_tokens=draws.pick((0, item.completion_tokens, 1 << 24)),
            carried_tokens=draws.pick((0, 5, 1 << 24)),
            body=draws.pick((item.body, b"{}", b"no json", b"\xff\x00", b'{"a":\n1}')),
        )

    def _false_state(self, state: wire.State) -> wire.State:
        draws = self._draws
        return msgspec.structs.replace(
            state,
            state=draws.pick((VehicleState.READY, VehicleState.WORKING, state.state)),
            slots=draws.pick((state.slots, 0, 1 << 12)),
            held=draws.pick((state.held, [], [*state.held, "batch_0001-1-1", "batch_0001-1-2"])),
            seq=draws.pick((state.seq, state.seq, 0, 1 << 50)),
            incarnation=draws.pick((state.incarnation, state.incarnation, "", "\x00", "é" * 100)),
            region=draws.pick((state.region, "", "elsewhere", f"region-{draws.below(1 << 30)}")),
            stay_bound_ms=draws.pick((None, 0, 1 << 50)),
            risk_15min=draws.pick((None, 0.0, 1.0)),
            permit_w=draws.pick((0, state.permit_w, 1 << 50)),
            tokens_per_s=draws.pick((1e308, -1.0, 0.0)),
            model=draws.pick((state.model, "m", "s")),
            energy_mwh=1 << 50,
        )

    def _checkpoint(self) -> bytes:
        if self._draws.chance(0.3):
            return b"no checkpoint"
        count = self._draws.below(40)
        return wire.encode_checkpoint(wire.Checkpoint(text="x" * count, tokens=count, token_ids=[120] * count))

    def speak(self, vehicles: dict[str, Vehicle]) -> None:
        """Say something that is not so, or repeat what was said before."""
        draws = self._draws
        if not self._network.connected(self.vehicle_id):
            return
        choice = draws.below(6)
        if choice == 0 and self._heard:
            self._send(draws.pick(self._heard))
        elif choice <= 3:
            self._send(wire.encode(self._claim(vehicles)))
        elif choice == 4:
            self._network.up(self.vehicle_id, bytes(draws.below(256) for _ in range(draws.below(40))))
        else:
            lease = self._lease(vehicles)
            items = [
                wire.ProgressItem(line=draws.below(60), tokens=draws.below(80), checkpoint=self._checkpoint())
                for _ in range(draws.between(1, 8))
            ]
            progress = wire.Progress(incarnation="x", lease_id=lease, job_id=self._job(), items=items)
            self._network.up(self.vehicle_id, wire.encode(progress))

    def _claim(self, vehicles: dict[str, Vehicle]) -> wire.Results | wire.Returned:
        """Lines that it does not hold, of a lease that may be another's; some of them twice."""
        draws = self._draws
        lines = [draws.below(60) for _ in range(draws.between(1, 20))]
        self._number += 1
        lease_id, job_id, message_id = self._lease(vehicles), self._job(), f"{self.vehicle_id}-lie-{self._number}"
        if draws.chance(0.3):
            back = [
                wire.ReturnItem(line=line, tokens=draws.below(50), checkpoint=self._checkpoint(), started=True)
                for line in lines
            ]
            return wire.Returned(
                incarnation="x",
                message_id=message_id,
                lease_id=lease_id,
                job_id=job_id,
                reason=draws.pick(tuple(ReturnReason)),
                items=back,
            )
        done = [
            wire.ResultItem(
                line=line,
                status=draws.pick((200, 200, 500, 400)),
                body=b'{"line":0,"text":"a lie"}',
                prompt_tokens=draws.below(1 << 24),
                completion_tokens=draws.below(1 << 24),
                carried_tokens=draws.below(1 << 10),
            )
            for line in lines
        ]
        return wire.Results(
            incarnation="x",
            message_id=message_id,
            lease_id=lease_id,
            job_id=job_id,
            items=done,
            energy_mwh=1 << 50,
        )

    def _job(self) -> str:
        return self._draws.pick(("batch_0001", "batch_0002", "batch_0003", "batch_9999", ""))

    def _lease(self, vehicles: dict[str, Vehicle]) -> str:
        """A lease that somebody holds, or none at all."""
        held = [
            lease
            for name in sorted(vehicles)
            if (machine := vehicles[name].machine) is not None
            for lease in machine.held
        ]
        return self._draws.pick(held) if held and self._draws.chance(0.8) else f"no-lease-{self._draws.below(9)}"

    def _send(self, data: bytes) -> None:
        self._number += 1
        self._network.publish(self.vehicle_id, f"{self.vehicle_id}-lie-{self._number}", data)


class Cheat(Liar):
    """A vehicle that answers at once with rubbish of the right form, and says nothing else that is untrue."""

    def tamper(self, way: str, data: bytes) -> bytes:
        """Another answer than the engine's."""
        if way == "state":
            return data
        message: Any = wire.decode(wire.UP_WORK, data)
        if isinstance(message, wire.Returned):
            items = [
                wire.ResultItem(line=each.line, status=200, body=b'{"text":"rubbish"}', completion_tokens=5)
                for each in message.items
            ]
            return wire.encode(
                wire.Results(
                    incarnation=message.incarnation,
                    message_id=message.message_id,
                    lease_id=message.lease_id,
                    job_id=message.job_id,
                    items=items,
                )
            )
        items = [msgspec.structs.replace(each, body=b'{"text":"rubbish"}') for each in message.items]
        return wire.encode(msgspec.structs.replace(message, items=items))

    def speak(self, vehicles: dict[str, Vehicle]) -> None:
        """It keeps quiet."""
