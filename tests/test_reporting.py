"""Sheets of reports: the same tables and the same commands as the reports one by one; and bytes that are no sheet."""

from __future__ import annotations

import importlib.util
import random
import re
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.test_cell_scheduler import started
from tests.test_docs import ROOT

from motorpool import wire
from motorpool.core import events as ev
from motorpool.core.reporting import as_reported
from motorpool.core.scheduler import Scheduler
from motorpool.core.sheets import (
    COLUMNS,
    HEAD,
    ROW,
    ROW_BYTES,
    SheetTaken,
    SheetWriter,
    Tail,
    Whole,
    decode,
    decode_answer,
    encode,
    encode_answer,
    mark_of,
)
from motorpool.errors import CallerError, MotorpoolError, TooLargeError
from motorpool.types import MAX_ITEMS_PER_MESSAGE, Reason, ReasonCode, ReturnReason, VehicleState

VEHICLES = ("v1", "v2", "v3", "v4")
DRAWN = ("00000000000000a1", "ffffffffffffffff")
CODES = (ReasonCode.DOOR_OPEN, ReasonCode.CONSENT_WITHDRAWN, ReasonCode.DWELL)
FEED = 7
NEEDS_NUMBA = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the extra `fleet` is not installed")


def state(seq: int = 1, **changes: Any) -> wire.State:
    fields: dict[str, Any] = {
        "incarnation": DRAWN[0], "state": VehicleState.READY, "region": "DE", "model": "m", "slots": 2, "permit_w": 100,
    }  # fmt: skip
    return wire.State(seq=seq, **(fields | changes))


# -- the same as one by one --------------------------------------------------------------------------------------------

change = st.one_of(
    st.tuples(st.just("state"), st.sampled_from([*VehicleState, VehicleState.READY, VehicleState.WORKING])),
    st.tuples(st.just("state"), st.sampled_from([VehicleState.READY, VehicleState.WORKING])),
    st.tuples(st.just("reasons"), st.lists(st.sampled_from(CODES), max_size=2)),
    st.tuples(st.just("region"), st.sampled_from(["DE", "DE", "FR"])),
    st.tuples(st.just("model"), st.sampled_from(["m", "m", "n", None, "new"])),
    st.tuples(st.just("slots"), st.sampled_from([0, 1, 2, 9])),
    st.tuples(st.just("permit_w"), st.sampled_from([0, 100, 100, 250, 70_000, 1 << 33])),
    st.tuples(st.just("stay_bound_ms"), st.sampled_from([None, 300_000, 359_999, 1 << 50])),
    st.tuples(st.just("risk_15min"), st.sampled_from([None, 0.0, 0.02, 0.554, 1.0])),
    st.tuples(st.just("incarnation"), st.sampled_from([DRAWN[0], DRAWN[0], DRAWN[1], "hand"])),
    st.tuples(st.just("memory_gb"), st.sampled_from([None, 16])),
    st.tuples(st.just("models_on_disk"), st.sampled_from([None, ["m", "n"]])),
    st.tuples(st.just("ahead"), st.sampled_from([2, 0, -1])),
)  # fmt: skip
usual = st.one_of(st.just({}), st.just({}), st.builds(lambda pair: dict([pair]), change))
report = st.tuples(st.sampled_from(VEHICLES), usual, st.sampled_from(["same"] * 5 + ["all"] * 3 + ["none", "alien"]))
sheet_step = st.tuples(st.just("sheet"), st.lists(report, min_size=3, max_size=12))
steps = st.one_of(
    sheet_step,
    sheet_step,
    sheet_step,
    st.tuples(st.just("wait"), st.sampled_from([50, 1_000, 4_000, 16_000, 25_000])),
    st.tuples(st.just("pass"), st.sampled_from([900, 2_000, 4_000])),
    st.tuples(st.just("job"), st.sampled_from([("m", 3), ("m", 400), ("n", 30)])),
    st.tuples(st.just("results"), st.integers(0, 50)),
    st.tuples(st.just("returned"), st.integers(0, 50)),
    st.tuples(st.just("refused"), st.integers(0, 50)),
    st.tuples(st.just("owner"), st.tuples(st.sampled_from(VEHICLES), st.booleans(), st.sampled_from([0, 5_000]))),
    st.tuples(st.just("site"), st.tuples(st.sampled_from([0, 150, 300]), st.sampled_from([0, 1, 2]))),
    st.tuples(st.just("park"), st.tuples(st.sampled_from(VEHICLES), st.sampled_from(["", "north"]), st.booleans())),
    st.tuples(st.just("live"), st.sampled_from(VEHICLES)),
    st.tuples(st.just("strike"), st.sampled_from(VEHICLES[:2])),
)  # fmt: skip


class Pair:
    """Two schedulers that live through the same: one hears single reports, the other sheets."""

    def __init__(self, *, fast: bool = False) -> None:
        self.one = Scheduler()
        self.many = Scheduler(fast=fast)
        self.writer = SheetWriter(FEED)
        self.now_ms = 1_000_000
        self.jobs = 0
        self.seq = dict.fromkeys(VEHICLES, 0)
        self.held: dict[str, list[str]] = {vehicle: [] for vehicle in VEHICLES}
        self.last: dict[str, dict[str, Any]] = {vehicle: {} for vehicle in VEHICLES}
        self.applied = 0
        self.whole = 0
        for scheduler in (self.one, self.many):  # a vehicle that says again what it has on its disk says nothing new
            for name in ("m", "n"):
                scheduler.cell.model(name)

        everybody: list[tuple[str, dict[str, Any], str]] = [(vehicle, {}, "all") for vehicle in VEHICLES]
        self.step("sheet", everybody)
        self.step("job", ("m", 400))
        self.step("sheet", everybody)  # they hold what they were given
        self.step("sheet", everybody)
        assert (self.applied, self.whole) == (12, 8)

    def both(self, event: ev.SchedulerEvent) -> None:
        assert self.one.handle(event, self.now_ms) == self.many.handle(event, self.now_ms)

    def sheet(self, reports: list[tuple[str, dict[str, Any], str]]) -> None:
        commands: list[ev.Command] = []
        for vehicle, changes, holds in reports:
            made = self._state(vehicle, dict(changes), holds)
            single = ev.VehicleReported(cause_id="c", vehicle_id=vehicle, state=made)
            commands += self.one.handle(single, self.now_ms)
            self.writer.add(vehicle, made)
        arrived = ev.SheetArrived(cause_id="c", relay="r", sheet=decode(self.writer.take()))
        *found, taken = self.many.handle(arrived, self.now_ms)
        assert isinstance(taken, ev.SheetTaken)
        assert not taken.wanted
        assert found == commands
        self.applied += taken.taken
        self.whole += len(taken.whole)

    def _state(self, vehicle: str, changes: dict[str, Any], holds: str) -> wire.State:
        self.seq[vehicle] = max(0, self.seq[vehicle] + changes.pop("ahead", 1))
        reasons = [Reason(code=code) for code in changes.pop("reasons", [])]
        once = {name: changes.pop(name, None) for name in ("memory_gb", "models_on_disk")}
        self.last[vehicle] |= changes  # what a vehicle does not say anew it says again
        known = self.one.vehicles.get(vehicle)
        ours = [] if known is None else [self.one.lease_id(row) for row in known.leases]
        held = {"all": ours, "same": self.held[vehicle], "none": [], "alien": [*ours, "batch_9-0-1-1"]}[holds]
        self.held[vehicle] = held
        return state(self.seq[vehicle], reasons=reasons, held=held, **self.last[vehicle], **once)

    def step(self, what: str, how: Any) -> None:
        self.now_ms += 200
        match what:
            case "sheet":
                self.sheet(how)
            case "wait":
                self.now_ms += how
                self.both(ev.Ticked(cause_id="t"))
            case "pass":
                self.now_ms += how
            case "job":
                self.jobs += 1
                event = started(how[1], expires_ms=self.now_ms + 3_600_000)
                self.both(msgspec.structs.replace(event, job_no=self.jobs, job_id=f"batch_{self.jobs}", model=how[0]))
            case "results" | "returned" | "refused":
                self._ended(what, how)
            case "owner":
                until_ms = self.now_ms + how[2] if how[2] else 0
                self.both(
                    ev.OwnerSpoke(cause_id="o", vehicle_id=how[0], withdrawn=how[1], paused_until_ms=until_ms, what="w")
                )
            case "site":
                self.both(ev.SiteConfigured(cause_id="o", site="north", limit_w=how[0], limit_vehicles=how[1]))
            case "park":
                self.both(ev.VehicleConfigured(cause_id="o", vehicle_id=how[0], site=how[1], trust=0, reserve=how[2]))
            case "live":
                for scheduler in (self.one, self.many):
                    scheduler.live_began(how)
            case "strike":
                self.both(ev.VehicleRevoked(cause_id="o", vehicle_id=how))
                self.writer.forget(range(len(VEHICLES)))  # as the cell's answer would say

    def _ended(self, what: str, which: int) -> None:
        rows = [int(row) for row in self.one.cell.all_leases()]
        if not rows:
            return
        row = rows[which % len(rows)]
        lease_id, job = self.one.lease_id(row), self.one.job_of(row)
        vehicle = self.one.cell.ids.name(int(self.one.cell.t.leases["vehicle"][row]))
        lines = job.lines_of(row)
        n = len(lines)
        if what == "results":
            self.both(
                ev.ResultsArrived(
                    cause_id="c", vehicle_id=vehicle, lease_id=lease_id, job_id=job.job_id, message_id="m", lines=lines,
                    statuses=[200] * n, prompt_tokens=[10] * n, completion_tokens=[5] * n, cached_tokens=[0] * n,
                    carried_tokens=[0] * n, energy_mwh=0,
                )
            )  # fmt: skip
            return
        reason = ReturnReason.GUARD if what == "returned" else ReturnReason.REFUSED
        self.both(
            ev.WorkReturned(
                cause_id="c", vehicle_id=vehicle, lease_id=lease_id, job_id=job.job_id, reason=reason, lines=lines,
                tokens=[0] * n, sizes=[0] * n, started=[False] * n,
            )
        )  # fmt: skip

    def check(self) -> None:
        """Every table, and every name, is the same."""
        one, many = self.one.cell, self.many.cell
        for name, table in one.t._asdict().items():
            other = getattr(many.t, name)
            assert table.shape == other.shape
            for column in table.dtype.names or (None,):
                mine, theirs = (table, other) if column is None else (table[column], other[column])
                assert np.array_equal(mine, theirs), f"{name}.{column}"
        for names in ("model_names", "region_names", "site_names", "reason_sets", "other_incarnations"):
            assert getattr(one, names) == getattr(many, names), names
        assert [one.ids.name(v) for v in one.ids] == [many.ids.name(v) for v in many.ids]
        for job_no, job in self.one.jobs.items():
            assert bytes(job.state) == bytes(self.many.jobs[job_no].state)
        assert self.one.jobs.keys() == self.many.jobs.keys()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, min_size=2, max_size=25))
def test_a_sheet_is_its_reports_one_by_one(happened: list[tuple[str, Any]]) -> None:
    pair = Pair()
    for what, how in happened:
        pair.step(what, how)
        pair.check()


def long_life(pair: Pair, seed: int, rounds: int) -> None:
    """Mostly vehicles that report, as they do, and now and then something that happens."""
    draw = random.Random(seed)
    happenings: list[tuple[str, Any]] = [
        ("wait", 1_000), ("wait", 25_000), ("job", ("m", 400)), ("job", ("n", 30)), ("live", "v2"),
        ("owner", ("v1", False, 5_000)), ("owner", ("v3", True, 0)), ("owner", ("v3", False, 0)),
        ("site", (150, 0)), ("site", (300, 2)), ("site", (0, 0)), ("strike", "v2"),
        *(("park", (vehicle, where, False)) for vehicle in VEHICLES for where in ("north", "")),
    ]  # fmt: skip
    says: list[dict[str, Any]] = [
        {"state": VehicleState.WORKING}, {"state": VehicleState.READY}, {"permit_w": 140}, {"permit_w": 90},
        {"state": VehicleState.DENIED, "reasons": [ReasonCode.DOOR_OPEN]}, {"risk_15min": 0.07}, {"slots": 4},
        {"model": "n"}, {"model": "m"}, {"region": "FR"}, {"region": "DE"}, {"incarnation": DRAWN[1]}, {"ahead": 0},
    ]  # fmt: skip
    for _ in range(rounds):
        what = draw.choices(["sheet", "ended", "pass", "other"], [12, 6, 2, 1])[0]
        if what == "sheet":
            reports = [
                (vehicle, draw.choice(says) if draw.random() < 0.1 else {}, draw.choices(["same", "all"], [1, 3])[0])
                for vehicle in draw.sample(VEHICLES, draw.randint(1, 4))
                for _ in range(draw.randint(1, 2))
            ]
            pair.step("sheet", reports)
        elif what == "ended":
            pair.step(draw.choice(["results", "results", "returned"]), draw.randrange(50))
        elif what == "pass":
            pair.step("pass", draw.choice([900, 2_500]))
        else:
            pair.step(*draw.choice(happenings))
        pair.check()


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=NEEDS_NUMBA)])
def test_so_it_is_through_a_long_life(fast: bool) -> None:
    pair = Pair(fast=fast)
    long_life(pair, 1, 1_500)
    assert pair.applied - pair.whole > pair.whole, "most of it went through columns"


def test_a_permit_that_rises_over_what_a_site_bears_gives_the_lines_to_others() -> None:
    pair = Pair()
    pair.step("site", (200, 0))
    for vehicle in VEHICLES[:2]:
        pair.step("park", (vehicle, "north", False))
    everybody: list[tuple[str, dict[str, Any], str]] = [(vehicle, {}, "all") for vehicle in VEHICLES]
    pair.step("sheet", everybody)
    assert int(pair.many.cell.t.sites["used_w"][1]) == 200
    whole = pair.whole
    pair.step("sheet", [("v2", {"permit_w": 150}, "all"), *everybody])
    pair.check()
    assert pair.whole == whole + 1, "only that v2 holds nothing any more is said in full"
    assert int(pair.many.cell.t.sites["used_w"][1]) == 100
    assert not pair.many.vehicles["v2"].outstanding


# -- what is wanted in full --------------------------------------------------------------------------------------------


def taken(scheduler: Scheduler, data: bytes, now_ms: int = 1_000, relay: str = "r") -> ev.SheetTaken:
    answer = scheduler.handle(ev.SheetArrived(cause_id="c", relay=relay, sheet=decode(data)), now_ms)[-1]
    assert isinstance(answer, ev.SheetTaken)
    return answer


def of_reports(writer: SheetWriter, *reports: tuple[str, wire.State]) -> bytes:
    for vehicle, each in reports:
        writer.add(vehicle, each)
    return writer.take()


def test_numbers_hold_for_one_relay_and_one_start_of_it() -> None:
    scheduler, writer = Scheduler(), SheetWriter(FEED)
    assert taken(scheduler, of_reports(writer, ("v1", state(1)), ("v2", state(1)))).taken == 2
    again = of_reports(writer, ("v1", state(2)), ("v2", state(2)))
    assert len(decode(again).rows) == 2
    assert taken(scheduler, again, relay="another").wanted == [0, 1]
    assert taken(scheduler, again).taken == 2
    other = SheetWriter(FEED + 1)
    other.add("v2", state(3))
    assert taken(scheduler, other.take()).taken == 1
    assert taken(scheduler, of_reports(other, ("v2", state(4)))).taken == 1
    answer = taken(scheduler, of_reports(writer, ("v1", state(5)), ("v2", state(5))))
    assert (answer.taken, answer.wanted) == (0, [0, 1]), "the relay has started anew in between"
    scheduler.handle(ev.FeedEnded(cause_id="o", relay="r"), 2_000)
    other.forget([0])
    assert taken(scheduler, of_reports(other, ("v2", state(6)))).taken == 1


def test_leases_that_the_cell_cannot_know_are_asked_for() -> None:
    scheduler, writer = Scheduler(), SheetWriter(FEED)
    taken(scheduler, of_reports(writer, ("v1", state(1, held=["a"]))))
    data = of_reports(writer, ("v1", state(2, held=["a"])))
    assert len(decode(data).rows) == 1
    revoked = scheduler.handle(ev.SheetArrived(cause_id="c", relay="r", sheet=decode(data)), 1_000)
    assert [command.lease_id for command in revoked if isinstance(command, ev.SendRevoke)] == ["a"]
    rows = decode(data).rows.copy()
    rows["held_mark"] += 1
    rows["seq"] = 3
    answer = taken(scheduler, encode(FEED, 9, rows, Tail(models=["m"], regions=["DE"])))
    assert (answer.taken, answer.wanted) == (0, [0])
    assert scheduler.vehicles["v1"].seq == 2


def test_a_mark_is_a_sum_that_knows_no_order_and_has_room() -> None:
    held = [f"batch_{number}-1-1-1" for number in range(MAX_ITEMS_PER_MESSAGE)]
    assert mark_of(held) == mark_of(reversed(held)) < 1 << 62
    assert mark_of(held[:1]) != mark_of(held[1:2])
    assert mark_of([]) == 0


def test_what_is_shown_of_a_vehicle_is_what_columns_said_last() -> None:
    scheduler, writer = Scheduler(), SheetWriter(FEED)
    first = state(1, reasons=[Reason(code=ReasonCode.DWELL, detail="for long enough")], soc_pct=40.0)
    taken(scheduler, of_reports(writer, ("v1", first)))
    assert as_reported(scheduler.cell, "v1", first) is first
    codes = [Reason(code=ReasonCode.DOOR_OPEN), Reason(code=ReasonCode.DWELL)]
    second = state(2, reasons=codes, state=VehicleState.DENIED, model=None, risk_15min=0.5, stay_bound_ms=60_000)
    taken(scheduler, of_reports(writer, ("v1", second)))
    shown = as_reported(scheduler.cell, "v1", first)
    assert msgspec.structs.replace(shown, reasons=codes, soc_pct=None) == second
    assert (shown.reasons[1].detail, shown.soc_pct) == ("for long enough", 40.0)
    assert as_reported(scheduler.cell, "v2", first) is first


# -- bytes -------------------------------------------------------------------------------------------------------------

GOOD = of_reports(SheetWriter(FEED), *(("v1", state(seq)) for seq in range(1, 4)))


def rebuilt(**columns: Any) -> bytes:
    sheet = decode(GOOD)
    rows = sheet.rows.copy()
    for name, value in columns.items():
        rows[name][1] = value
    return encode(FEED, 1, rows, sheet.tail)


def with_tail(*whole: Whole, models: int = 1, regions: int = 1) -> bytes:
    tail = Tail(models=["m"] * models, regions=["DE"] * regions, whole=list(whole))
    return encode(FEED, 1, decode(GOOD).rows, tail)


def headed(**changes: int) -> bytes:
    names = ("version", "zero", "rows", "tail", "feed", "number")
    magic, *values = HEAD.unpack_from(GOOD)
    head = dict(zip(names, values, strict=True)) | changes
    return HEAD.pack(magic, *(head[name] for name in names)) + GOOD[HEAD.size :]


@pytest.mark.parametrize(
    "columns",
    [
        {"incarnation": 0}, {"seq": -1}, {"seq": (1 << 50) + 1}, {"reasons": 1 << 63}, {"held_mark": 5},
        {"held_mark": -1}, {"held": 5_000}, {"vehicle": wire.MAX_SHEET_VEHICLES}, {"slots": 5_000}, {"model": 1},
        {"state": 0}, {"state": 6}, {"region": 1}, {"risk_pct": 101},
    ],
)  # fmt: skip
def test_a_value_out_of_its_range_refuses_the_sheet_and_names_it(columns: dict[str, int]) -> None:
    with pytest.raises(CallerError) as refused:
        decode(rebuilt(**columns))
    (name,) = columns
    assert (refused.value.code, refused.value.param) == ("invalid_sheet", name)
    assert refused.value.message == f"{name} of row 1 of a sheet is out of its range"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_sheet"),
        (GOOD[:-1], "invalid_sheet"),
        (GOOD + b"\0", "invalid_sheet"),
        (b"x" + GOOD[1:], "invalid_sheet"),
        (headed(version=2), "unsupported_version"),
        (headed(version=0), "unsupported_version"),
        (headed(zero=1), "invalid_sheet"),
        (headed(rows=1), "invalid_sheet"),
        (headed(rows=wire.MAX_SHEET_ROWS + 1), "body_too_large"),
        (headed(rows=(1 << 32) - 1, tail=(1 << 32) - 1), "body_too_large"),
        (headed(feed=1 << 63), "invalid_sheet"),
        (headed(tail=0), "invalid_sheet"),
        (with_tail(models=0), "invalid_sheet"),
        (with_tail(regions=65), "invalid_sheet"),
        (with_tail(Whole(at=5, number=0, vehicle_id="v1", state=state())), "invalid_sheet"),
        (
            with_tail(
                Whole(at=2, number=0, vehicle_id="v1", state=state()),
                Whole(at=1, number=0, vehicle_id="v1", state=state()),
            ),
            "invalid_sheet",
        ),
        (with_tail(Whole(at=0, number=0, vehicle_id="a b", state=state())), "invalid_sheet"),
        (with_tail(Whole(at=0, number=-1, vehicle_id="v1", state=state())), "invalid_sheet"),
        (with_tail(Whole(at=0, number=0, vehicle_id="v1", state=state(v=2))), "unsupported_version"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_sheet_of_this_version_are_refused(data: bytes, code: str) -> None:
    with pytest.raises(CallerError) as refused:
        decode(data)
    assert refused.value.code == code
    assert refused.value.message


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=300).map(lambda tail: GOOD[: HEAD.size] + tail),
        st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)).map(
            lambda hit: GOOD[: hit[0]] + bytes([hit[1]]) + GOOD[hit[0] + 1 :]
        ),
        st.tuples(st.integers(0, len(GOOD)), st.binary(max_size=8)).map(
            lambda cut: GOOD[: cut[0]] + cut[1] + GOOD[cut[0] :]
        ),
    )
)
def test_hostile_bytes_are_refused_or_are_reports(data: bytes) -> None:
    scheduler = Scheduler()
    scheduler.handle(ev.SheetArrived(cause_id="c", relay="r", sheet=decode(GOOD)), 1_000)
    try:
        sheet = decode(data)
    except MotorpoolError:
        return
    scheduler.handle(ev.SheetArrived(cause_id="c", relay="r", sheet=sheet), 2_000)
    scheduler.validate()


def test_bounds_of_what_is_written() -> None:
    assert ROW_BYTES == sum(np.dtype(kind).itemsize for _, kind in COLUMNS) == 51
    with pytest.raises(TooLargeError):
        encode(FEED, 1, np.zeros(wire.MAX_SHEET_ROWS + 1, ROW), Tail())
    big = state(held=["x" * 256] * 1_000)
    whole = [Whole(at=0, number=0, vehicle_id="v1", state=big)] * 40
    with pytest.raises(TooLargeError):
        encode(FEED, 1, np.zeros(0, ROW), Tail(regions=["DE"], whole=whole))
    answer = SheetTaken(feed=1, number=2, taken=3, wanted=[4])
    assert decode_answer(encode_answer(answer)) == answer
    with pytest.raises(CallerError):
        decode_answer(b"\xc1")


def test_the_bits_of_reasons_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "reference" / "vehicle-feed.md").read_text("utf-8")
    listed = re.findall("`([a-z0-9_]+)`", page.partition("From bit 0:")[2].partition("##")[0])
    assert listed == [code.value for code in ReasonCode], (
        "a new code comes last: relays know the others by their places"
    )


@pytest.mark.parametrize("incarnation", ["", "hand", "0" * 16, "A" * 16, "a" * 17, "\uff41" * 16])
def test_an_incarnation_that_is_no_number_goes_in_full(incarnation: str) -> None:
    writer = SheetWriter(FEED)
    for seq in (1, 2):
        data = of_reports(writer, ("v1", state(seq, incarnation=incarnation)))
        assert len(decode(data).rows) == 0
        assert len(decode(data).tail.whole) == 1
