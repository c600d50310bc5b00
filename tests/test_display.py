"""What the live display says, drawn to text."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console, RenderableType

from motorpool.cli import display
from motorpool.server.admin.views import BatchView, StatusView, VehicleView
from motorpool.types import Reason, ReasonCode

WORKING = VehicleView(
    vehicle_id="car-1",
    name="vehicle 1",
    state="working",
    reasons=[],
    permit_w=900,
    model="smollm2-135m-instruct",
    engine="llama.cpp b1 q4",
    slots=4,
    running=4,
    queued=2,
    tokens_per_s=31.4,
    tokens_generated=1200,
    lines_done=21,
    tokens_handed_on=0,
    tokens_taken_over=57,
    energy_mwh=1234,
    energy_is_measured=False,
    earned_micro=1234,
    soc_pct=71.0,
    plugged=True,
    seen_ms_ago=400,
    leases=1,
)
BATCH = BatchView(
    batch_id="batch_1",
    status="in_progress",
    model="smollm2-135m-instruct",
    total=64,
    completed=30,
    failed=1,
    leased=12,
    tokens_generated=1500,
    tokens_carried=57,
    cost_micro=2000,
    created_ms=0,
    expires_ms=1,
    left_ms=None,
)


def vehicle(**changes: Any) -> VehicleView:
    return msgspec.structs.replace(WORKING, **changes)


def frame(vehicles: list[VehicleView], **changes: Any) -> display.Frame:
    status = StatusView(now_ms=0, currency="EUR", tokens_per_s=31.4, vehicles=vehicles, batches=[BATCH])
    made = display.Frame(title="demo", elapsed_s=65, status=status, batch_id="batch_1", total=64, left_s=42)
    return msgspec.structs.replace(made, **changes)


def drawn(what: RenderableType, width: int = 110) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=False)
    console.print(what)
    return console.export_text()


def test_a_working_vehicle_is_shown_with_all_that_counts() -> None:
    text = drawn(display.picture(frame([WORKING])))
    for piece in ("vehicle 1", "working", "yes, 900 W", "31", "21", "57", "0.001234", "1:05"):
        assert piece in text


def test_a_vehicle_without_permit_says_why() -> None:
    reasons = [Reason(code=ReasonCode.DOOR_OPEN), Reason(code=ReasonCode.NOT_PLUGGED_IN)]
    text = drawn(display.picture(frame([vehicle(state="denied", permit_w=0, reasons=reasons)])))
    assert "no: door open, not" in text


def test_many_reasons_are_cut_short_with_the_most_telling_first() -> None:
    codes = [ReasonCode.UNLOCKED, ReasonCode.IGNITION_ON, ReasonCode.MOVING, ReasonCode.NOT_PLUGGED_IN]
    assert display.reasons([Reason(code=code) for code in codes]) == "driving, unlocked, ignition on and 1 more"


def test_it_fits_into_eighty_columns() -> None:
    text = drawn(display.picture(frame([WORKING])), width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "yes, 900 W" in text
    assert "…" not in text
    assert "0.001234" in text


def test_a_silent_vehicle_is_not_said_to_have_a_permit() -> None:
    assert "not heard from" in drawn(display.picture(frame([vehicle(state="offline")])))


@pytest.mark.parametrize("code", list(ReasonCode))
def test_every_reason_has_words(code: ReasonCode) -> None:
    assert display.REASON_WORDS[code]


def test_the_bar_shows_progress_failures_and_time_left() -> None:
    text = drawn(display.progress_line(frame([WORKING])))
    assert "31/64 lines, 1 failed · in_progress · 0:42 left · 57 tokens carried over" in text


def test_without_an_answer_yet_the_picture_still_stands() -> None:
    text = drawn(display.picture(frame([], status=None, batch_id=None, left_s=None)))
    assert "0/64 lines · preparing · ? left" in text


def test_only_the_last_happenings_are_shown_in_order() -> None:
    events = [display.Happening(at_s=n, text=f"event {n}") for n in range(20)]
    text = drawn(display.happenings(events))
    assert "event 9" not in text
    assert text.index("event 18") < text.index("event 19")


def test_a_line_for_logs() -> None:
    line = display.plain_line(frame([WORKING]))
    assert line == "1:05 31/64 lines, 31 tokens/s, 0:42 left | vehicle 1 working 21 lines"


def test_the_summary_names_every_number() -> None:
    summary = display.Summary(
        handed_in=64,
        completed=64,
        failed=0,
        lost=0,
        duplicated=0,
        tokens_generated=2890,
        tokens_carried=57,
        energy_mwh=2345,
        energy_is_measured=False,
        cost_micro=4100,
        currency="EUR",
        earnings_micro={"vehicle 1": 1500, "vehicle 2": 900},
        seconds=131,
        output="demo-output/results.jsonl",
    )
    text = drawn(display.summary_table(summary))
    for piece in ("64", "2890", "57", "2.35 Wh (modelled)", "0.0041 EUR", "vehicle 2", "0.0009 EUR", "results.jsonl"):
        assert piece in text


def test_details_hold_the_details_of_reasons() -> None:
    reason = Reason(code=ReasonCode.BELOW_FLOOR, detail="28 % of 30 %")
    text = drawn(display.vehicle_details(vehicle(state="denied", reasons=[reason]), "EUR"))
    assert "below the owner's floor (below_floor): 28 % of 30 %" in text
    assert "71 %, plugged in" in text


@pytest.mark.parametrize(
    ("micro", "words"), [(0, "0.0000 EUR"), (1, "0.000001 EUR"), (1_500_000, "1.5000 EUR"), (-20, "-0.00002 EUR")]
)
def test_small_amounts_keep_their_digits(micro: int, words: str) -> None:
    assert display.money(micro, "EUR") == words


@pytest.mark.parametrize(("seconds", "words"), [(None, "?"), (0, "0:00"), (61.4, "1:01"), (3661, "1:01:01")])
def test_durations(seconds: float | None, words: str) -> None:
    assert display.duration(seconds) == words
