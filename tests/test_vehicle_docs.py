"""The owner's guide knows every reason and every act, and the diagram of the vehicle's states is the table's."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_docs import ROOT, tool

from motorpool.agent.main import AgentConfig
from motorpool.agent.runtime.hosted import MAX_LOG_BYTES
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.signals.car import ACTIONS
from motorpool.core.guard import Policy
from motorpool.core.pricing import Price
from motorpool.core.vehicle_events import VehicleConfig
from motorpool.types import ReasonCode

OWNER = (ROOT / "docs" / "owner.md").read_text("utf-8")
MACHINE = Path("docs") / "reference" / "vehicle-machine.md"


def test_the_page_of_the_vehicles_states_is_the_table() -> None:
    page = (ROOT / MACHINE).read_text("utf-8")
    assert page == tool("vehicle_machine").render(), "run tools/vehicle_machine.py"


def test_the_owners_guide_explains_every_reason_and_no_other() -> None:
    rows = re.findall(r"^\| `([a-z0-9_]+)` \| (.+) \|$", OWNER, re.MULTILINE)
    assert [code for code, _ in rows] == [code.value for code in ReasonCode]
    assert all(len(sentence) > 10 and sentence.endswith(".") for _, sentence in rows)


def test_the_owners_guide_names_acts_that_there_are() -> None:
    named = set(re.findall(r"motorpool car \d ([a-z-]+)", OWNER)) - {"show"}
    assert named <= {action.value for action in ACTIONS}
    assert len(named) >= 6


def test_the_numbers_of_the_owners_guide_are_the_programs() -> None:
    policy, config = Policy(), VehicleConfig(model="any")
    spec = AgentConfig(
        agent_dir=ROOT,
        credentials_path=ROOT,
        consent_path=ROOT,
        owner_public_key_path=ROOT,
        engine=EngineSpec(backend=Backend.NULL, model="any"),
    ).engine_specs()["any"]
    assert (policy.dwell_ms, policy.battery_drain_grace_ms, policy.overdue_ms) == (3_000, 10_000, 2 * 3_600_000)
    assert (policy.battery_drain_wait_ms, policy.battery_drain_wait_max_ms) == (10 * 60_000, 4 * 3_600_000)
    assert (policy.watts_w, policy.permit_ms) == (100, 2_000)
    assert (config.freeze_grace_ms, spec.silence_s, MAX_LOG_BYTES) == (5_000, 0.6, 1024 * 1024)
    assert Price(input_micro=1, output_micro=1).owner_share_bp == 7_000
    times = ("three seconds", "ten seconds", "two hours", "five seconds", "one second", "two seconds")
    for said in (*times, "ten minutes", "four hours", "100 W", "70 %"):
        assert said in OWNER
