"""Invariant 24: nothing that a cell can say makes a car do more, and the owner can read every change of the rules."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.invariant_world import EXAMPLES, many
from tests.judged_vehicle import MODEL, JudgedVehicle, asked, grant
from tests.test_agent_loop import Sent

from motorpool import wire
from motorpool.agent.enrolment import CONSENT_NAME, GRANTED_NAME, PUBLIC_NAME, WITHDRAWAL_NAME, ConsentFile
from motorpool.agent.loop import AgentLoop, Clock, Link
from motorpool.agent.owner.acts import ACTS_NAME, need_car, pause
from motorpool.agent.owner.desk import OwnerDesk
from motorpool.agent.owner.entries import LOG_DIR, Entry, EntryKind, log_files
from motorpool.agent.owner.heard import OwnerEar
from motorpool.agent.owner.log import OwnerLog
from motorpool.agent.owner.reading import LogReader
from motorpool.agent.parts import Parts, PartsConfig
from motorpool.agent.runtime.engine import OnEvents, Ready, Work
from motorpool.agent.runtime.null import InlineNullEngine
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.signals.source import AlwaysParked
from motorpool.core.guard import ConsentView, Policy, Reading, Signals
from motorpool.core.policy import Ladder
from motorpool.core.signals import NetworkClass
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import LimitEngine, VehicleConfig
from motorpool.errors import MotorpoolError
from motorpool.trust.consent import (
    PURPOSE_COMPUTE,
    ConsentGrant,
    ConsentLimits,
    ConsentWithdrawal,
    OwnerKey,
    create_owner_key,
    grant_consent,
    withdraw_consent,
)
from motorpool.trust.owneraccess import Resume, sign_resume
from motorpool.types import Kind

NOW_MS = 1_790_000_000_000
DAY_MS = 86_400_000
OWNER, STRANGER = create_owner_key(), create_owner_key()
LIMITS = ConsentLimits(max_watts_w=60, floor_pct=40.0)
WIDE = ConsentLimits(max_watts_w=500, floor_pct=0.0, battery_watts_w=500, battery_floor_pct=0.0)
POLICY = Policy(watts_w=100, dwell_ms=0, network=NetworkClass.UNMETERED)


def paper(key: OwnerKey, at_ms: int, limits: ConsentLimits, *, vehicle: str = "v1", for_ms: int = 9 * DAY_MS) -> bytes:
    return grant_consent(
        key,
        ConsentGrant(
            vehicle_id=vehicle,
            purposes=(PURPOSE_COMPUTE,),
            limits=limits,
            granted_ms=at_ms,
            expires_ms=at_ms + for_ms,
        ),
    )


GRANT = paper(OWNER, NOW_MS, LIMITS)
WITHDRAWAL = withdraw_consent(OWNER, ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=NOW_MS + 1))
OLD = paper(OWNER, NOW_MS - DAY_MS, WIDE)
RESUMED_MS = NOW_MS - DAY_MS  # the owner's one end of a pause that the cell has kept back
# Everything that a cell may have or make up: it has no key of the owner's, but whatever the owner ever signed.
PAPERS: tuple[bytes, ...] = (
    b"",
    b"{}",
    OLD,
    paper(OWNER, NOW_MS + 1, WIDE, vehicle="v2"),
    paper(OWNER, NOW_MS - DAY_MS, WIDE, for_ms=DAY_MS - 1),
    paper(OWNER, NOW_MS + DAY_MS, WIDE),
    paper(STRANGER, NOW_MS + 1, WIDE),
    GRANT.replace(b"60", b"99"),
    msgspec.json.encode({"document": msgspec.json.decode(GRANT)["document"], "signature": ""}),
    msgspec.json.encode({"document": msgspec.json.decode(GRANT)["document"]}),
    withdraw_consent(STRANGER, ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=NOW_MS)),
    sign_resume(OWNER, Resume(vehicle_id="v1", resumed_ms=RESUMED_MS)),
    sign_resume(OWNER, Resume(vehicle_id="v2", resumed_ms=NOW_MS + 5_000)),
    sign_resume(OWNER, Resume(vehicle_id="v1", resumed_ms=NOW_MS + DAY_MS)),
    sign_resume(STRANGER, Resume(vehicle_id="v1", resumed_ms=NOW_MS + 5_000)),
)

total = st.one_of(st.integers(0, 1 << 50), st.integers(NOW_MS - DAY_MS, NOW_MS + 9 * DAY_MS))
name = st.sampled_from(("inc", "other", "l1", "l2", "r1", "", "x" * 256))
real = st.one_of(
    st.builds(
        grant,
        name,
        st.integers(0, 5),
        incarnation=name,
        model=st.sampled_from((MODEL, "other")),
        ttl_ms=total,
        max_offline_ms=total,
        pay_input_micro=total,
        pay_output_micro=total,
        customer_class=name,
    ),
    st.builds(grant, st.sampled_from(("l1", "l2", "l3"))),
    st.builds(asked, name),
    st.builds(
        wire.Open,
        request_id=name,
        attempt=total,
        kind=st.sampled_from(Kind),
        model=st.just(MODEL),
        stream=st.booleans(),
        body=st.binary(max_size=9),
        checkpoint=st.none() | st.binary(max_size=9),
    ),
    st.builds(wire.Revoke, lease_id=name, lines=st.none() | st.just([0, 1]), keep_running=st.booleans()),
    st.builds(wire.Close, request_id=name),
    st.just(wire.Sync()),
    st.builds(wire.Statement, as_of_ms=total, earned_micro=total),
    st.builds(wire.OwnerDocument, document=st.sampled_from(PAPERS) | st.binary(max_size=200)),
    st.builds(wire.OwnerAsked, act=st.sampled_from(wire.OwnerAct), asked_ms=total, until_ms=total),
)
# Words that there are not, and halves of those that there are.
made_up = st.sampled_from(
    ("permit", "allow", "policy", "consent", "resume", "thaw", "start", "verdict", "grant")
).flatmap(
    lambda tag: st.builds(
        lambda watts: msgspec.msgpack.encode(
            {"t": tag, "v": 1, "watts_w": watts, "until_ms": 1 << 50, "permit": {"watts_w": watts}, "floor_pct": 0}
        ),
        st.integers(0, 1 << 40),
    )
)
raw = st.one_of(
    real.map(wire.encode),
    real.map(wire.encode),
    real.map(wire.encode),
    made_up,
    st.binary(max_size=64),
    st.builds(lambda message, cut: wire.encode(message)[:cut], real, st.integers(0, 60)),
)
messages = st.lists(raw, min_size=1, max_size=10)


class Car(AlwaysParked):
    """All is well but what a denial changes."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(soc_pct=45.0)
        self._changes = changes

    def read(self, now_ms: int) -> Signals:
        changed = {field: None if value is None else Reading(value, now_ms) for field, value in self._changes.items()}
        return msgspec.structs.replace(super().read(now_ms), **changed)


def _paused(folder: Path) -> None:
    pause(folder, NOW_MS, 6 * DAY_MS)
    os.utime(folder / ACTS_NAME, ns=(NOW_MS * 1_000_000, NOW_MS * 1_000_000))


def _needed(folder: Path) -> None:
    need_car(folder, NOW_MS)
    os.utime(folder / ACTS_NAME, ns=(NOW_MS * 1_000_000, NOW_MS * 1_000_000))


def _withdrawn(folder: Path) -> None:
    (folder / CONSENT_NAME).write_bytes(WITHDRAWAL)
    (folder / WITHDRAWAL_NAME).write_bytes(WITHDRAWAL)


def _expired(folder: Path) -> None:
    (folder / CONSENT_NAME).write_bytes(paper(OWNER, NOW_MS, LIMITS, for_ms=1))


def _unchanged(_folder: Path) -> None:
    """The signals alone are against work."""


# Why the guard says no: what is done to the folder, and what the car says.
DENIALS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "never allowed": (lambda folder: (folder / CONSENT_NAME).unlink(), {}),
    "withdrawn": (_withdrawn, {}),
    "expired": (_expired, {}),
    "paused": (_paused, {}),
    "needed": (_needed, {}),
    "door open": (_unchanged, {"doors_open": True}),
    "unlocked": (_unchanged, {"locked": False}),
    "moving": (_unchanged, {"speed_kmh": 30.0}),
    "unplugged": (_unchanged, {"cable_connected": False, "grid_power_available": False}),
    "below the floor": (_unchanged, {"soc_displayed_pct": 39.0}),
    "too hot": (_unchanged, {"computer_temp_c": 95.0}),
    "no signal": (_unchanged, {"seat_occupied": None}),
    "mobile data": (_unchanged, {"network": NetworkClass.METERED}),
}


@contextmanager
def owned() -> Iterator[Path]:
    """The folder of an agent whose owner is enrolled and has consented; the owner's key is elsewhere."""
    with tempfile.TemporaryDirectory(prefix="motorpool-test-") as folder:
        path = Path(folder)
        (path / PUBLIC_NAME).write_bytes(OWNER.public)
        (path / CONSENT_NAME).write_bytes(GRANT)
        (path / GRANTED_NAME).write_bytes(GRANT)
        yield path


class Agent:
    """Guard and machine of a vehicle, and what the agent does with bytes that come from the cell."""

    def __init__(self, folder: Path, car: Car) -> None:
        self.papers = ConsentFile(folder / CONSENT_NAME, folder / PUBLIC_NAME, "v1")
        self.ear = OwnerEar(folder, "v1")
        self.views: list[ConsentView] = []
        self.vehicle = JudgedVehicle(car, self._consent, POLICY)

    def _consent(self, now_ms: int) -> ConsentView:
        self.views.append(self.papers.view(now_ms))
        return self.views[-1]

    def hear(self, data: bytes, now_ms: int) -> int:
        """What the agent does with it; the date of a wish that the car rests, if it was done."""
        try:
            message = wire.decode(wire.DOWN, data)
            if isinstance(message, wire.OwnerDocument | wire.OwnerAsked):
                done = self.ear.hear(message, now_ms)
                return message.asked_ms if done and isinstance(message, wire.OwnerAsked) else 0
        except MotorpoolError:
            return 0
        if not isinstance(message, wire.Statement):
            self.vehicle.say(message)
        return 0


@many
@given(st.sampled_from(sorted(DENIALS)), messages)
def test_invariant_24_no_message_of_a_cell_starts_work_against_a_no(why: str, said: list[bytes]) -> None:
    prepare, changes = DENIALS[why]
    with owned() as folder:
        prepare(folder)
        agent = Agent(folder, Car(**changes))
        now_ms = NOW_MS + 10
        agent.vehicle.look(now_ms)
        for data in said:
            agent.hear(data, now_ms)
            now_ms += 250
            assert agent.vehicle.look(now_ms).permit is None
        assert agent.vehicle.work == []


@many
@given(messages)
def test_invariant_24_no_message_of_a_cell_gives_more_than_without_it(said: list[bytes]) -> None:
    with owned() as folder, owned() as quiet:
        agent, undisturbed = Agent(folder, Car()), Agent(quiet, Car())
        now_ms = NOW_MS + 10
        rested_ms = 0  # the date of the latest wish that the car rests
        for data in (b"", *said):
            rested_ms = max(rested_ms, agent.hear(data, now_ms))
            now_ms += 250
            with_it, without = agent.vehicle.look(now_ms).permit, undisturbed.vehicle.look(now_ms).permit
            assert without is not None
            assert with_it is None or with_it == without, "another permit: longer, or with more watts"
            if rested_ms and with_it is not None:
                assert rested_ms <= RESUMED_MS, "only the owner's own signature ends a rest, and only an older one"
            rested_ms = rested_ms if with_it is None else 0
            now, then = agent.views[-1], undisturbed.views[-1]
            assert msgspec.structs.replace(now, paused_until_ms=0) == then, "the owner's limits are the owner's"
        limits = [c.watts_w for step in agent.vehicle.steps for c in step.commands if isinstance(c, LimitEngine)]
        assert max(limits) == LIMITS.max_watts_w


@pytest.mark.parametrize("said_here", [_paused, _needed])
def test_invariant_24_what_the_owner_said_in_the_car_is_not_made_older_by_a_wish_of_the_cells(
    said_here: Callable[[Path], None],
) -> None:
    """The cell passes on a wish with an old date, and then an end of a pause that it has kept back since then."""
    with owned() as folder:
        said_here(folder)
        agent = Agent(folder, Car())
        dated_back = wire.OwnerAsked(act=wire.OwnerAct.PAUSE, asked_ms=1, until_ms=NOW_MS + DAY_MS)
        kept_back = sign_resume(OWNER, Resume(vehicle_id="v1", resumed_ms=RESUMED_MS))
        for message in (dated_back, wire.OwnerDocument(document=kept_back)):
            agent.hear(wire.encode(message), NOW_MS + 10)
            assert agent.vehicle.look(NOW_MS + 20).permit is None


def test_a_cell_can_ask_for_rest_and_for_work_that_is_allowed() -> None:
    """Otherwise the properties above would hold of an agent that is deaf."""
    with owned() as folder:
        agent = Agent(folder, Car())
        agent.vehicle.look(NOW_MS + 10)
        agent.vehicle.look(NOW_MS + 20)
        agent.hear(wire.encode(grant("l1")), NOW_MS + 30)
        assert agent.vehicle.in_engine
        wish = wire.OwnerAsked(act=wire.OwnerAct.PAUSE, asked_ms=NOW_MS + 30, until_ms=NOW_MS + DAY_MS)
        agent.hear(wire.encode(wish), NOW_MS + 30)
        assert agent.vehicle.look(NOW_MS + 40).permit is None
        assert not agent.vehicle.computing


# -- the same at the real loop -----------------------------------------------------------------------------------------


class Recorder(InlineNullEngine):
    """An engine that keeps what gives it processor time."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.calls: list[str] = []

    async def start(self, on_events: OnEvents) -> None:
        self.calls.append("start")
        on_events([Ready(model=MODEL, slots=2, context_tokens=1, fingerprint="f")])

    def submit(self, work: list[Work]) -> None:
        self.calls.append(f"submit {len(work)}")

    def thaw(self) -> None:
        self.calls.append("thaw")


class Heard(Sent):
    """A link that tells when something is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = asyncio.Event()

    def publish_state(self, data: bytes) -> None:
        super().publish_state(data)
        self.sent.set()


class Running:
    """A real agent loop with its parts, without a message server."""

    def __init__(self, folder: Path, car: Car) -> None:
        clock = Clock()
        begun_ms = clock()
        self.spec = EngineSpec(backend=Backend.NULL, model=MODEL, hosted=False)
        self.machine = VehicleMachine(VehicleConfig(model=MODEL), "inc")
        self.parts = Parts(
            config=PartsConfig(owner_desk=True),
            agent_dir=folder,
            vehicle_id="v1",
            papers=ConsentFile(folder / CONSENT_NAME, folder / PUBLIC_NAME, "v1"),
            policy=POLICY,
            specs={MODEL: self.spec},
            source=car,
            clock=lambda: clock() - begun_ms + NOW_MS + 10,
            state=lambda: self.machine.state,
        )
        self.engine = Recorder(self.spec)
        self.link = Heard()
        self.loop = AgentLoop(
            name="v1",
            machine=self.machine,
            engine=self.engine,
            source=car,
            judge=self.parts.judge,
            clock=lambda: clock() - begun_ms + NOW_MS + 10,
            on_owner=self.parts.on_owner,
        )
        self.parts.look_now(self.loop.look_now)
        self._hand: Callable[[bytes], None] | None = None

    async def _connect(self, on_down: Callable[[bytes], None], _on_link: Callable[[bool], None]) -> Link:
        self._hand = on_down
        return self.link

    async def hear(self, said: list[bytes]) -> None:
        """Hand all of it in, and wait until everything that follows from it is done."""
        async with asyncio.timeout(20):
            while self._hand is None:
                await self._reported()
            for data in (*said, wire.encode(wire.Sync())):
                self._hand(data)
            while self.loop._messages_waiting:
                await self._reported()
            await asyncio.gather(*self.parts._tasks)
            self.loop.look_now()
            self._hand(wire.encode(wire.Sync()))
            while self.loop._messages_waiting:
                await self._reported()

    async def _reported(self) -> None:
        self.link.sent.clear()
        await self.link.sent.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.loop.run(self._connect))
        try:
            yield
        finally:
            self.loop.stop()
            await asyncio.wait_for(task, 20)
            assert self.parts.desk is not None
            self.parts.desk.log.close(NOW_MS)


@settings(many, max_examples=max(20, EXAMPLES // 10))
@given(st.sampled_from(sorted(DENIALS)), messages)
def test_invariant_24_no_bytes_at_all_make_a_real_agent_work_against_a_no(why: str, said: list[bytes]) -> None:
    prepare, changes = DENIALS[why]

    async def scenario(folder: Path) -> None:
        agent = Running(folder, Car(**changes))
        async with agent.running():
            await agent.hear(said)
            assert agent.engine.calls == []

    with owned() as folder:
        prepare(folder)
        asyncio.run(scenario(folder))


def test_the_same_agent_does_work_where_nothing_is_against_it() -> None:
    async def scenario(folder: Path) -> None:
        agent = Running(folder, Car())
        async with agent.running():
            await agent.hear([])
            await agent.hear([wire.encode(grant("l1"))])
            assert agent.engine.calls == ["start", "submit 2"]
            wish = wire.OwnerAsked(act=wire.OwnerAct.NEED_CAR, asked_ms=NOW_MS + 1, until_ms=NOW_MS + DAY_MS)
            await agent.hear([wire.encode(wish), wire.encode(grant("l2"))])
            assert agent.engine.calls == ["start", "submit 2"]

    with owned() as folder:
        asyncio.run(scenario(folder))


# -- what the owner can read -------------------------------------------------------------------------------------------

changes = st.fixed_dictionaries(
    {},
    optional={
        "watts_w": st.integers(1, 1_000),
        "floor_pct": st.floats(0, 100),
        "dwell_ms": st.integers(0, 10_000),
        "permit_ms": st.integers(1, 10_000),
        "computer": st.builds(Ladder, reduced_c=st.just(1.0), small_c=st.just(2.0), off_c=st.floats(50, 100)),
        "lacks": st.sets(st.sampled_from(("driver_mode", "dcdc_temp_c"))).map(frozenset),
        "network": st.sampled_from(NetworkClass),
        "circuit_limit_w": st.none() | st.integers(0, 99_999),
    },
)


def start(folder: Path, policy: Policy, now_ms: int) -> OwnerLog:
    """What a start of the agent does with its configuration; the agent is killed a moment later."""
    log = OwnerLog(folder / LOG_DIR)
    papers = ConsentFile(folder / CONSENT_NAME, folder / PUBLIC_NAME, "v1")
    OwnerDesk(folder, "v1", papers, log, lambda: now_ms).configured(policy, now_ms)
    return log


def let_go(log: OwnerLog) -> None:
    """As the kernel does for a process that was killed: locks go, and nothing more is written."""
    log._pending.clear()
    log.close(NOW_MS)


def policies(folder: Path) -> list[Entry]:
    return [entry for entry in LogReader(folder / LOG_DIR).entries(0, 10_000) if entry.kind is EntryKind.POLICY]


@many
@given(st.lists(changes, min_size=1, max_size=4))
def test_invariant_24_every_change_of_the_rules_between_two_starts_stands_in_the_owners_log(
    starts: list[dict[str, Any]],
) -> None:
    with owned() as folder:
        policy = Policy()
        let_go(start(folder, policy, NOW_MS))
        for number, changed in enumerate(starts, 1):
            before = {entry.n for entry in policies(folder)}
            after = msgspec.structs.replace(policy, **changed)
            let_go(start(folder, after, NOW_MS + number))
            new = [entry for entry in policies(folder) if entry.n not in before]
            differ = {field for field in changed if getattr(after, field) != getattr(policy, field)}
            assert {entry.what.partition(":")[0] for entry in new} == differ
            assert all((entry.by, entry.at_ms) == ("operator", NOW_MS + number) for entry in new)
            policy = after
        assert LogReader(folder / LOG_DIR).verify().whole


def test_invariant_24_a_change_that_could_not_be_written_is_noted_at_the_next_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with owned() as folder:
        let_go(start(folder, Policy(), NOW_MS))

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            let_go(start(folder, Policy(watts_w=500), NOW_MS + 1))
        assert not [entry for entry in policies(folder) if "watts_w" in entry.what]
        let_go(start(folder, Policy(watts_w=500), NOW_MS + 2))
        assert "watts_w: 100 became 500" in [entry.what for entry in policies(folder)]


@many
@given(st.data())
def test_invariant_24_an_entry_that_was_removed_or_altered_shows(data: st.DataObject) -> None:
    with owned() as folder:
        for number, watts_w in enumerate((100, 200, 300, 400)):
            let_go(start(folder, Policy(watts_w=watts_w), NOW_MS + number))
        (path,) = log_files(folder / LOG_DIR)
        lines = path.read_bytes().splitlines(keepends=True)
        at = data.draw(st.integers(0, len(lines) - 1))
        if data.draw(st.booleans()):
            changed = [*lines[:at], *lines[at + 1 :]]
        else:
            digit = data.draw(st.integers(0, len(lines[at]) - 2))
            flipped = bytes([lines[at][digit] ^ data.draw(st.sampled_from((1, 2, 4)))])
            changed = [*lines[:at], lines[at][:digit] + flipped + lines[at][digit + 1 :], *lines[at + 1 :]]
        assert LogReader(folder / LOG_DIR).verify().whole
        path.write_bytes(b"".join(changed))
        assert not LogReader(folder / LOG_DIR).verify().whole
