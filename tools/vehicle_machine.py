"""Writes docs/reference/vehicle-machine.md: the states of a vehicle, from the table that the program runs by.

Run it after changing the table: ``.venv/bin/python tools/vehicle_machine.py``. A test compares the page with the table.
"""

from __future__ import annotations

from pathlib import Path

from motorpool.core.vehicle_events import VehicleConfig
from motorpool.core.vehicle_states import LEAVING, TRANSITIONS, Trigger
from motorpool.types import VehicleState
from motorpool.wire import MAX_OFFLINE_MS

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "vehicle-machine.md"
HEAD = """# The states of a vehicle

This page is written by `tools/vehicle_machine.py` from the transition table in `core/vehicle_states.py`, and compared
with it by a test. What is not in the table cannot happen: meeting it is a bug, and fails an assertion.
"""
STATES: dict[VehicleState, str] = {
    VehicleState.DENIED: "The guard says no, and there is no engine process: its memory is the owner's.",
    VehicleState.STARTING: "The guard says yes. The engine loads its model, or waits for its next try after a crash.",
    VehicleState.READY: "The engine holds its model and has nothing to do.",
    VehicleState.WORKING: "Attempts run in the engine.",
    VehicleState.YIELDING: "The guard has said no. The engine is frozen, its work has gone back; it waits for its end.",
}
TRIGGERS: dict[Trigger, str] = {
    Trigger.PERMITTED: "the guard says yes",
    Trigger.DENIED: "the guard says no, perhaps for a moment: the door is open, say",
    Trigger.LEAVING: "the guard says no, and the owner goes away or takes the consent back, or the agent is to end",
    Trigger.LOADED: "the engine has loaded its model",
    Trigger.DIED: "the engine ended by itself, or gave no sign of life for too long and was killed",
    Trigger.GRACE_OVER: "a frozen engine has waited long enough",
    Trigger.BUSY: "the engine has got attempts",
    Trigger.IDLE: "the engine has none left",
    Trigger.SWITCH: "the permit allows another model: the small one alone when it is hot, the full one again when not",
}


def render() -> str:
    """The whole page."""
    arrows: dict[tuple[VehicleState, VehicleState], list[str]] = {}
    for (state, trigger), following in TRANSITIONS.items():
        arrows.setdefault((state, following), []).append(trigger.value)
    lines = [HEAD, "```mermaid", "stateDiagram-v2", f"  [*] --> {VehicleState.DENIED.value}"]
    lines += [f"  {old.value} --> {new.value}: {', '.join(names)}" for (old, new), names in arrows.items()]
    lines += ["```", "", "| state | what it means |", "| --- | --- |"]
    lines += [f"| `{state.value}` | {STATES[state]} |" for state in VehicleState]
    lines += ["", "| trigger | when |", "| --- | --- |"]
    lines += [f"| `{trigger.value}` | {TRIGGERS[trigger]} |" for trigger in Trigger]
    config = VehicleConfig(model="any")
    codes = ", ".join(f"`{code.value}`" for code in sorted(LEAVING))
    lines += [
        "",
        "| from | on | to |",
        "| --- | --- | --- |",
        *(f"| `{old.value}` | `{trigger.value}` | `{new.value}` |" for (old, trigger), new in TRANSITIONS.items()),
        "",
        f'A "no" is `leaving` when one of its reasons is {codes}; any other is `denied`.',
        "",
        "What is bounded in time, unless the agent is told otherwise:",
        "",
        f"- A frozen engine is killed after {config.freeze_grace_ms / 1000:g} s. `leaving` kills it at once.",
        f"- When it is cool again, a small model that still has work makes room for the full one after "
        f"{config.switch_back_ms / 60_000:g} min, an idle one at once.",
        f"- An engine that holds attempts and gives no sign of life for {config.stall_ms / 1000:g} s counts as died.",
        f"- A dead engine starts again after {config.restart_min_ms / 1000:g} s, then after twice as long each time, "
        f"up to {config.restart_max_ms / 1000:g} s.",
        f"- Without a link the work goes on; what a lease has not finished after {MAX_OFFLINE_MS / 3_600_000:g} h "
        "(or the time that it names) is given up. What is finished is kept until it is delivered.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
