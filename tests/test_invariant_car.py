"""Invariants 3 and 8: without consent the car is the car that it was, and no work changes anything about it."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import grpc
import grpc.aio
import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tests.invariant_world import CONSENT, START_MS, many
from tests.judged_vehicle import WORK, JudgedVehicle, asked, grant
from tests.test_signals_kuksa import DOOR, READS, World

from motorpool.agent import ocpp
from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME, ConsentFile
from motorpool.agent.owner import page as page_module
from motorpool.agent.signals import kuksa
from motorpool.agent.signals.broker import Scope, point
from motorpool.agent.signals.car import Action, CarSpec, SimulatedCar
from motorpool.agent.signals.kuksa import KuksaSource
from motorpool.agent.signals.kuksa_proto import types_pb2, val_pb2
from motorpool.agent.signals.source import SignalSource
from motorpool.cli.consent import consent as consent_group
from motorpool.cli.main import cli
from motorpool.cli.owner_cmd import owner as owner_group
from motorpool.core.guard import ConsentView, Policy, Signals
from motorpool.errors import ConflictError
from motorpool.trust.credentials import CellIdentity, save_credentials
from motorpool.types import ReasonCode

POLICY = Policy(watts_w=100, dwell_ms=1_000)
LOOK_MS = 500
NO_CONSENT = (
    ReasonCode.CONSENT_MISSING,
    ReasonCode.CONSENT_WITHDRAWN,
    ReasonCode.CONSENT_INVALID,
    ReasonCode.CONSENT_EXPIRED,
)
SPECS = (
    CarSpec(),
    CarSpec(soc_pct=60.0),
    CarSpec(soc_pct=80.0, sleeps_when_full=True),
    CarSpec(soc_pct=50.0, charge_from_minute=900, charge_for_min=30),
)
# What the owner does, or plans (a number: to leave in so many seconds), and how long it takes until the next act.
day = st.lists(
    st.tuples(
        st.sampled_from((*Action, 700, 3_000, None)),
        st.sampled_from((0, 400, 1_500, 6_000, 15_000)),
    ),
    min_size=1,
    max_size=8,
)
# The only things that follow from power drawn: the rest of the car has to stay as it was.
PHYSICS = frozenset(
    {
        "energy_wh",
        "battery_power_w",
        "ac_power_w",
        "grid_wh",
        "pack_c",
        "computer_c",
        "dcdc_c",
        "low_voltage_share",
    }
)
PHYSICAL_SIGNALS = frozenset(
    {
        "battery_power_w",
        "soc_displayed_pct",
        "time_to_complete_s",
        "pack_temp_c",
        "computer_temp_c",
        "dcdc_temp_c",
        "low_voltage_v",
        "ac_power_w",
    }
)


def inside(car: SimulatedCar, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """All that a car consists of, but who listens to it and what tells the computer's draw."""
    return {name: value for name, value in vars(car).items() if name not in {"_drawn_w", "_callbacks", *without}}


def seen(car: SimulatedCar, now_ms: int, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    signals = car.read(now_ms)
    return {name: getattr(signals, name) for name in Signals.__struct_fields__ if name not in without}


def twin_of(car: SimulatedCar, spec: CarSpec, now_ms: int) -> SimulatedCar:
    """The same car as it stands now, without an agent in it."""
    twin = SimulatedCar(spec, now_ms)
    vars(twin).update(inside(car))
    vars(twin)["_script"] = list(car._script)
    return twin


def act(car: SimulatedCar, what: Action | int | None, now_ms: int) -> str:
    """Do it; what the car says where it is not possible."""
    if what is None or not isinstance(what, Action):
        car.advance(now_ms)
        car.plan_departure(None if what is None else now_ms + what * 1_000)
        return ""
    try:
        car.do(what, now_ms)
    except ConflictError as error:
        return error.code
    return ""


class Pair:
    """One car with an agent in it and one without, which both live through the same day."""

    def __init__(self, spec: CarSpec, consent: Callable[[int], ConsentView]) -> None:
        self.spec = spec
        self.now_ms = START_MS
        self.with_agent = SimulatedCar(spec, START_MS, drawn_w=lambda: float(self.vehicle.machine.watts_now_w))
        self.vehicle = JudgedVehicle(self.with_agent, consent, POLICY)
        self.alone = SimulatedCar(spec, START_MS)
        self.leases = 0

    def run(self, for_ms: int, check: Callable[[], None]) -> None:
        """Look every half second, and offer work all the time."""
        for _ in range(1 + for_ms // LOOK_MS):
            self.vehicle.look(self.now_ms)
            self.alone.read(self.now_ms)
            self.leases += 1
            self.vehicle.say(grant(f"lease-{self.leases}"))
            self.vehicle.say(asked(f"request-{self.leases}"))
            check()
            self.now_ms += LOOK_MS

    def act(self, what: Action | int | None) -> None:
        """Both owners do the same, and the cars answer the same."""
        assert act(self.with_agent, what, self.now_ms) == act(self.alone, what, self.now_ms)

    def leave_alone(self) -> None:
        """From now on, compare with this very car as it would go on without an agent."""
        self.alone = twin_of(self.with_agent, self.spec, self.now_ms)

    def identical(self) -> None:
        assert inside(self.with_agent) == inside(self.alone)
        assert seen(self.with_agent, self.now_ms) == seen(self.alone, self.now_ms)
        assert self.with_agent.view(self.now_ms) == self.alone.view(self.now_ms)

    def unchanged(self) -> None:
        """All but what follows from the power drawn."""
        assert inside(self.with_agent, without=PHYSICS) == inside(self.alone, without=PHYSICS)
        mine = seen(self.with_agent, self.now_ms, without=PHYSICAL_SIGNALS)
        assert mine == seen(self.alone, self.now_ms, without=PHYSICAL_SIGNALS)


@many
@given(st.sampled_from(SPECS), st.sampled_from(NO_CONSENT), day)
def test_invariant_03_without_consent_nothing_about_the_car_tells_that_there_is_an_agent(
    spec: CarSpec, refusal: ReasonCode, acts: list[tuple[Action | int | None, int]]
) -> None:
    pair = Pair(spec, lambda _: ConsentView(refusal=refusal))
    pair.run(2_000, pair.identical)
    for what, then_ms in acts:
        pair.act(what)
        pair.run(then_ms, pair.identical)
    assert pair.vehicle.work == []


@many
@given(st.sampled_from(SPECS), st.integers(0, 12_000), day)
def test_invariant_03_from_the_withdrawal_on_the_car_goes_on_as_if_there_were_no_agent(
    spec: CarSpec, worked_ms: int, acts: list[tuple[Action | int | None, int]]
) -> None:
    views = [CONSENT]
    pair = Pair(spec, lambda _: views[-1])
    pair.run(worked_ms, lambda: None)
    views.append(ConsentView(refusal=ReasonCode.CONSENT_WITHDRAWN))
    pair.vehicle.look(pair.now_ms)
    pair.leave_alone()
    work = len(pair.vehicle.work)
    for what, then_ms in acts:
        pair.act(what)
        pair.run(then_ms, pair.identical)
    assert len(pair.vehicle.work) == work


@many
@given(st.sampled_from([spec for spec in SPECS if not spec.sleeps_when_full]), day)
def test_invariant_08_computing_changes_no_limit_timer_lock_door_gear_or_mode(
    spec: CarSpec, acts: list[tuple[Action | int | None, int]]
) -> None:
    pair = Pair(spec, lambda _: CONSENT)
    pair.run(2_000, pair.unchanged)
    for what, then_ms in acts:
        pair.act(what)
        pair.run(then_ms, pair.unchanged)


def test_a_car_that_computes_can_be_told_from_one_that_does_not() -> None:
    """Otherwise the properties above would hold of nothing."""
    pair = Pair(CarSpec(), lambda _: CONSENT)
    pair.run(60_000, pair.unchanged)
    assert [command for command in pair.vehicle.work if isinstance(command, WORK)]
    assert pair.with_agent.computer_c > pair.alone.computer_c + 1
    assert pair.with_agent.grid_wh > pair.alone.grid_wh
    with pytest.raises(AssertionError):
        pair.identical()


# -- no way to write ---------------------------------------------------------------------------------------------------


def public(kind: type) -> set[str]:
    names = {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")}
    return names - {name for name, _ in inspect.getmembers(object, callable)}


def test_invariant_08_what_the_agent_reads_a_real_car_by_has_no_way_to_write() -> None:
    assert public(SignalSource) == {"read", "on_change"}
    assert public(KuksaSource) == {"read", "on_change"}
    assert public(ocpp.ChargingNeedsFile) == {"read"}
    assert public(kuksa._Reader) == {"paths", "value", "values", "changes"}


def test_invariant_08_the_source_of_a_real_car_names_four_calls_that_read_and_no_other() -> None:
    tree = ast.parse(inspect.getsource(kuksa))
    messages = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "val_pb2"
    }
    assert {name.removesuffix("Request") for name in messages if name.endswith("Request")} == READS
    assert all(name.removesuffix("Request").removesuffix("Response") in READS for name in messages)
    calls = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and "_unary" in node.attr}
    calls |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and "_stream" in node.attr}
    assert calls == {"unary_unary", "unary_stream"}, "no call in which a client sends more than one question"
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named = {text for text in texts if re.fullmatch(r"(Publish|Actuate|Batch|Open|Set|Update|Register)\w*", text)}
    assert named == set()
    imports = {name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
    assert "val_pb2_grpc" not in imports, "the stub would bring every call"


def test_invariant_08_a_token_of_scope_read_is_refused_every_write() -> None:
    writes: dict[str, Any] = {
        "PublishValue": val_pb2.PublishValueRequest(
            signal_id=types_pb2.SignalID(path=DOOR), data_point=point(False, 1)
        ),
        "Actuate": val_pb2.ActuateRequest(signal_id=types_pb2.SignalID(path=DOOR)),
        "BatchActuate": val_pb2.BatchActuateRequest(
            actuate_requests=[val_pb2.ActuateRequest(signal_id=types_pb2.SignalID(path=DOOR))]
        ),
    }

    async def scenario() -> None:
        world = World(tokens={"reader": Scope.READ})
        await world.broker.start()
        before = inside(world.car)
        async with grpc.aio.insecure_channel(world.broker.address) as channel:
            for name, request in writes.items():
                call = channel.unary_unary(f"{kuksa.SERVICE}{name}", request_serializer=type(request).SerializeToString)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call(request, metadata=(("authorization", "Bearer reader"),))
                assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert inside(world.car) == before
        await world.broker.stop()

    asyncio.run(scenario())


# -- taking back is no harder than giving ------------------------------------------------------------------------------


def required(command: click.Command) -> list[str]:
    return [str(parameter.name) for parameter in command.params if parameter.required]


@pytest.mark.parametrize(
    ("group", "give", "take"), [(owner_group, "grant", "withdraw"), (consent_group, "give", "withdraw")]
)
def test_invariant_03_taking_back_asks_for_no_more_than_giving(group: click.Group, give: str, take: str) -> None:
    giving, taking = group.commands[give], group.commands[take]
    assert set(required(taking)) <= set(required(giving))
    assert len(taking.params) <= len(giving.params)
    prompts = [p for p in taking.params if isinstance(p, click.Option) and (p.prompt or p.confirmation_prompt)]
    assert prompts == [], "nobody is asked whether it was meant"


def test_invariant_03_one_command_gives_and_one_as_short_takes_back(tmp_path: Path) -> None:
    save_credentials(tmp_path / "credentials.json", CellIdentity.generate(0).enrol("v1", ["nats://127.0.0.1:1"], 0))
    papers = ConsentFile(tmp_path / CONSENT_NAME, tmp_path / PUBLIC_NAME, "v1")
    runner = CliRunner()
    giving, taking = ["owner", "grant", "--dir", str(tmp_path)], ["owner", "withdraw", "--dir", str(tmp_path)]
    assert len(taking) <= len(giving)
    before = papers.view(0).refusal
    assert before is ReasonCode.CONSENT_MISSING
    given_now = runner.invoke(cli, giving, input="")
    assert given_now.exit_code == 0, given_now.output
    granted = msgspec.json.decode((tmp_path / CONSENT_NAME).read_bytes())
    now_ms = msgspec.json.decode(granted["document"])["granted_ms"] + 1
    assert papers.view(now_ms).refusal is None
    taken = runner.invoke(cli, taking, input="")
    assert taken.exit_code == 0, taken.output
    assert papers.view(now_ms).refusal is ReasonCode.CONSENT_WITHDRAWN


def test_invariant_03_on_the_page_one_tap_takes_back() -> None:
    script = (page_module.STATIC / "app.js").read_text("utf-8")
    page = (page_module.STATIC / "index.html").read_text("utf-8")
    assert re.search(r'<button[^>]*id="withdraw"', page), "a button of the first view, in no form"
    at_once = r'\$\("withdraw"\)\.addEventListener\("click", \(\) => act\(\{ act: "withdraw" \}'
    assert re.search(at_once, script), "a tap is the act itself"
