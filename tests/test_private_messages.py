"""Location, VIN and trips stay in the car: whatever a vehicle can say to its cell stands here, with the reason why.

A new field of a message fails these tests until somebody has put it into ``ALLOWED`` with its type and a reason. The
books of the cell have no place for what must not be known.
"""

from __future__ import annotations

import enum
import re
import sqlite3
import types
import typing
from pathlib import Path

import msgspec
import pytest
from tests.test_docs import ROOT
from tests.vehicle_trial import CONFIG

from motorpool import wire
from motorpool.agent.forecast import HABITS_NAME
from motorpool.core.departures import Outlook
from motorpool.core.outside import DETAIL_MAY_LEAVE
from motorpool.core.signals import Signals
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import LinkChanged, PublishState, VerdictGiven
from motorpool.store.database import SCHEMA_FILES
from motorpool.types import Reason, ReasonCode

SOURCE = ROOT / "src" / "motorpool"
VERSION = {"v": ("int", "version of the link")}
TOKENS = {
    "prompt_tokens": ("int", "for the bill"),
    "completion_tokens": ("int", "for the bill"),
    "cached_tokens": ("int", "for the bill"),
    "carried_tokens": ("int", "for the bill: what another vehicle generated"),
}
ENERGY = {
    "energy_uwh": ("int", "for the books: energy of this answer"),
    "energy_is_measured": ("bool", "for the books: measured or modelled"),
}

# To add a field: put it under its message as ``"name": ("type", "why the cell has to know it")``. The failing test
# prints the line. Texts and bytes need the sharpest look: what can stand in them, and who writes it?
ALLOWED: dict[str, dict[str, tuple[str, str]]] = {
    "State": VERSION
    | {
        "incarnation": ("str", "random name of this run of the agent"),
        "seq": ("int", "order of the messages"),
        "state": ("VehicleState", "whether it can work"),
        "region": ("str", "code of the region, for residency; found in the car"),
        "permit_w": ("int", "how much it can do"),
        "reasons": ("list[Reason]", "why it does not work, for its operator"),
        "model": ("str | None", "what is loaded"),
        "slots": ("int", "how much it can do"),
        "running": ("int", "how much it does"),
        "queued": ("int", "how much it does"),
        "held": ("list[str]", "ids of leases"),
        "tokens_generated": ("int", "how much it did"),
        "tokens_per_s": ("float", "speed of the computer"),
        "energy_mwh": ("int", "for the books"),
        "energy_is_measured": ("bool", "for the books"),
        "engine": ("str", "name, build and model of the engine: whose answers are alike"),
        "soc_pct": ("float | None", "charge, rounded down to 5 % so that it does not tell how long a drive was"),
        "plugged": ("bool | None", "whether it can work"),
        "tier": ("ModelTier", "which model it can run"),
        "battery_fed": ("bool", "how much it can do"),
        "stay_bound_ms": ("int | None", "how long it stays at least, rounded down to 5 minutes"),
        "risk_15min": ("float | None", "risk that it leaves soon, to 0.01"),
        "memory_gb": ("int | None", "which models fit its computer"),
        "models_on_disk": ("list[str] | None", "which models of the catalogue it can load"),
    },
    "Reason": {
        "code": ("ReasonCode", "one of a fixed list"),
        "detail": ("str", "name of a signal or a limit; empty where it could hold the owner's times, see core.outside"),
    },
    "Progress": VERSION
    | {
        "incarnation": ("str", "random name of this run of the agent"),
        "lease_id": ("str", "the cell's own id"),
        "job_id": ("str", "the cell's own id"),
        "items": ("list[ProgressItem]", "what was generated so far"),
    },
    "ProgressItem": {
        "line": ("int", "which request"),
        "tokens": ("int", "how much was generated"),
        "checkpoint": ("bytes", "what was generated: a customer's text, not the owner's"),
    },
    "Results": VERSION
    | {
        "incarnation": ("str", "random name of this run of the agent"),
        "message_id": ("str", "so that a repeated one counts once"),
        "lease_id": ("str", "the cell's own id"),
        "job_id": ("str", "the cell's own id"),
        "items": ("list[ResultItem]", "the answers"),
        "energy_mwh": ("int", "for the books"),
        "energy_is_measured": ("bool", "for the books"),
        "media_type": ("str", "form of the answers"),
    },
    "ResultItem": TOKENS
    | {
        "line": ("int", "which request"),
        "status": ("int", "HTTP status for the customer"),
        "body": ("bytes", "the answer: a customer's text, not the owner's"),
    },
    "Returned": VERSION
    | {
        "incarnation": ("str", "random name of this run of the agent"),
        "message_id": ("str", "so that a repeated one counts once"),
        "lease_id": ("str", "the cell's own id"),
        "job_id": ("str", "the cell's own id"),
        "reason": ("ReturnReason", "one of a fixed list"),
        "items": ("list[ReturnItem]", "what goes back"),
    },
    "ReturnItem": {
        "line": ("int", "which request"),
        "tokens": ("int", "how much was generated"),
        "checkpoint": ("bytes | None", "what was generated: a customer's text, not the owner's"),
        "started": ("bool", "whether it has cost anything"),
    },
    "Tokens": VERSION
    | {
        "request_id": ("str", "the cell's own id"),
        "attempt": ("int", "which vehicle's turn"),
        "seq": ("int", "order of the messages"),
        "deltas": ("list[Delta]", "new text"),
        "usage": ("Usage | None", "for the bill"),
        "engine": ("str", "name, build and model of the engine"),
    },
    "Delta": {
        "index": ("int", "which choice"),
        "text": ("str", "a customer's text, not the owner's"),
        "token_ids": ("list[int]", "the same text"),
        "logprobs": ("bytes", "the same text"),
        "finish_reason": ("str | None", "why the answer ended"),
        "calls": ("bytes", "tool calls: a customer's text, not the owner's"),
    },
    "Usage": TOKENS | ENERGY,
    "Answered": VERSION
    | {
        "request_id": ("str", "the cell's own id"),
        "attempt": ("int", "which vehicle's turn"),
        "status": ("int", "HTTP status for the customer"),
        "body": ("bytes", "the answer: a customer's text, not the owner's"),
        "usage": ("Usage", "for the bill"),
        "media_type": ("str", "form of the answer"),
    },
    "Broken": VERSION
    | ENERGY
    | {
        "request_id": ("str", "the cell's own id"),
        "attempt": ("int", "which vehicle's turn"),
        "reason": ("ReturnReason", "one of a fixed list"),
        "checkpoint": ("bytes | None", "what was generated: a customer's text, not the owner's"),
    },
}

# Words that must not be a part of any name that leaves the car or stands in the cell's books.
PRIVATE_WORDS = set(
    re.findall(
        r"\w+",
        """
        place: accuracy address altitude bearing city coordinate coordinates elevation geo geohash gps heading home lat
            latitude lng location locations lon longitude parking place places plate pos position postcode street
        trip: arrival calendar departure departures destination direction distance drive driver drives driving journey
            journeys km mileage miles odometer route schedule speed timezone trips tz waypoint weekday weekdays
        identity: licence license vin
        habit: habits hazard hazards
        """,
    )
)


def messages_of(*unions: object) -> dict[str, dict[str, object]]:
    """Every struct that can be a part of these messages, with its fields and their types."""
    found: dict[str, dict[str, object]] = {}
    waiting = list(unions)
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if kind.__name__ not in found:
                hints = typing.get_type_hints(kind)
                found[kind.__name__] = {name: hints[name] for name in kind.__struct_fields__}
                waiting.extend(found[kind.__name__].values())
        else:
            waiting.extend(typing.get_args(kind))
    return found


def name_of(kind: object) -> str:
    """A type as it is written."""
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " | ".join("None" if part is type(None) else name_of(part) for part in parts)
    if parts:
        return f"{typing.get_origin(kind).__name__}[{', '.join(map(name_of, parts))}]"  # type: ignore[union-attr]
    return getattr(kind, "__name__", str(kind))


def words_of(name: str) -> set[str]:
    """The words of a field's, a column's or a class's name."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)}


UP = messages_of(wire.UpState, wire.UpWork, wire.UpLive)


@pytest.mark.parametrize("message", sorted(UP.keys() | ALLOWED.keys()))
def test_a_vehicle_says_what_is_listed_and_nothing_else(message: str) -> None:
    said = {name: name_of(kind) for name, kind in UP.get(message, {}).items()}
    listed = {name: kind for name, (kind, _) in ALLOWED.get(message, {}).items()}
    new = [f'"{name}": ("{kind}", "WHY"),' for name, kind in said.items() if listed.get(name) != kind]
    assert not new, f"{message} says more than is listed. If the cell must know it, add to ALLOWED: " + " ".join(new)
    gone = sorted(listed.keys() - said.keys())
    assert not gone, f"{message} does not say {', '.join(gone)} any more: take it out of ALLOWED"


def test_every_message_from_a_vehicle_was_looked_at() -> None:
    """The walk finds the messages by itself: the three unions, and all that they hold."""
    ways = {"UpState", "UpWork", "UpLive"}
    assert ways == {name for name in vars(wire) if name.startswith("Up")}
    assert {"State", "Reason", "Results", "ResultItem", "Tokens", "Delta", "Usage", "Broken"} <= UP.keys()


def test_each_reason_says_something() -> None:
    for fields in ALLOWED.values():
        for _, why in fields.values():
            assert len(why) >= 8


@pytest.mark.parametrize("message", sorted(UP))
def test_no_field_is_a_place_a_vin_or_a_trip(message: str) -> None:
    for name in (message, *UP[message]):
        assert not words_of(name) & PRIVATE_WORDS, f"{message}.{name}"


@pytest.mark.parametrize("message", sorted(UP))
def test_no_field_can_hold_two_coordinates_or_anything_at_all(message: str) -> None:
    """No pairs or lists of fractions, no open types: only names, counts, fixed lists and the customers' bytes."""
    for name, kind in UP[message].items():
        stack: list[tuple[object, bool]] = [(kind, False)]
        while stack:
            part, inside = stack.pop()
            arguments = typing.get_args(part)
            union = isinstance(part, types.UnionType) or typing.get_origin(part) is typing.Union
            if isinstance(part, type) and not arguments:
                closed = part in {int, float, str, bool, bytes, type(None)}
                closed = closed or issubclass(part, enum.Enum | msgspec.Struct)
                assert closed, f"{message}.{name} can hold anything: {part}"
                assert not (inside and part is float), f"{message}.{name} holds several fractions"
            else:
                assert union or typing.get_origin(part) is list, f"{message}.{name} is a {part}"
                stack.extend((argument, inside or not union) for argument in arguments)


def test_a_state_has_the_two_numbers_of_the_forecast_and_no_other() -> None:
    assert Outlook.__struct_fields__ == ("stay_bound_ms", "risk_15min")
    assert set(Outlook.__struct_fields__) <= UP["State"].keys()


def test_the_signals_inside_the_car_have_no_place_either() -> None:
    """A place is turned into a region's code before anything of the agent's loop sees it."""
    allowed = {"speed_kmh": {"speed"}, "driver_mode": {"driver"}, "departure_ms": {"departure"}}
    for name in Signals.__struct_fields__:
        assert words_of(name) & PRIVATE_WORDS == allowed.get(name, set()), name


# -- the cell's books --------------------------------------------------------------------------------------------------


def columns() -> dict[str, list[tuple[str, str]]]:
    """Tables of the newest version of the books, with names and types of their columns."""
    with sqlite3.connect(":memory:") as database:
        for name in SCHEMA_FILES:
            database.executescript((SOURCE / "store" / name).read_text("utf-8"))
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {
            table: [(row[1], row[2]) for row in database.execute(f"PRAGMA table_info({table})")] for table in tables
        }
    database.close()
    return found


def test_the_books_have_no_column_for_a_place_a_vin_or_a_trip() -> None:
    tables = columns()
    assert "vehicle" in tables
    for table, found in tables.items():
        assert not words_of(table) & PRIVATE_WORDS, table
        for name, kind in found:
            assert not words_of(name) & PRIVATE_WORDS, f"{table}.{name}"
            assert kind in {"TEXT", "INTEGER", "BLOB"}, f"{table}.{name} can hold a coordinate"


def test_the_books_keep_nothing_of_the_forecast_or_the_charge() -> None:
    said = {"stay_bound_ms", "risk_15min", "soc_pct", "plugged"}
    assert said <= UP["State"].keys()
    for table, found in columns().items():
        assert not said & {name for name, _ in found}, table


# -- what the car itself knows -----------------------------------------------------------------------------------------


def test_what_was_learnt_of_the_week_is_read_and_written_by_the_forecast_alone() -> None:
    users = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if re.search(rf"\bHabits\b|\bHABITS_NAME\b|{re.escape(HABITS_NAME)}", path.read_text("utf-8"))
    }
    # agent.parts names the file, and a simulated owner learns from recordings, never from a car.
    assert users - {"agent/parts.py", "sim/people.py"} == {"core/departures.py", "agent/forecast.py"}
    text = (SOURCE / "agent" / "forecast.py").read_text("utf-8")
    imported = set(re.findall(r"^(?:from|import) (motorpool[\w.]*)", text, re.MULTILINE))
    assert imported == {
        "motorpool.core.departures",
        "motorpool.core.departures_fleet",
        "motorpool.core.signals",
        "motorpool.trust.credentials",
    }


def test_what_charging_points_tell_stays_in_the_agent() -> None:
    users = [path for path in SOURCE.rglob("*.py") if "agent.ocpp" in path.read_text("utf-8")]
    assert all(Path("agent") == path.relative_to(SOURCE).parents[-2] for path in users)


def said_by(reasons: tuple[Reason, ...], soc_pct: float) -> tuple[wire.State, bytes]:
    """The state message of the real machine after this verdict, and its bytes."""
    machine = VehicleMachine(CONFIG, "i")
    commands = machine.handle(LinkChanged(up=True), 0)
    commands += machine.handle(VerdictGiven(permit=None, reasons=reasons, soc_pct=soc_pct, plugged=True), 1)
    states = [command.message for command in commands if isinstance(command, PublishState)]
    last = states[-1]
    assert isinstance(last, wire.State)
    return last, wire.encode(last)


@pytest.mark.parametrize("code", sorted(set(ReasonCode) - DETAIL_MAY_LEAVE))
def test_the_owners_times_stay_in_the_car(code: ReasonCode) -> None:
    state, data = said_by((Reason(code=code, detail="80 % by 07:30"),), 70.0)
    assert [reason.code for reason in state.reasons] == [code]
    assert b"07:30" not in data


def test_the_name_of_a_missing_signal_is_told() -> None:
    state, _ = said_by((Reason(code=ReasonCode.SIGNAL_MISSING, detail="speed_kmh"),), 70.0)
    assert state.reasons[0].detail == "speed_kmh"


def test_the_charge_is_too_coarse_for_the_length_of_a_trip() -> None:
    assert said_by((Reason(code=ReasonCode.MOVING),), 79.9)[1] == said_by((Reason(code=ReasonCode.MOVING),), 75.0)[1]
    assert said_by((), 100.0)[0].soc_pct == 100.0
