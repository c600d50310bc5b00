"""A plan adds up: hours, energy and money; its bands are in order; its page needs nothing from outside."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from motorpool.cli.plan import plan as command
from motorpool.core.economics import Tariff
from motorpool.core.pricing import Price
from motorpool.core.wear import WearPrices
from motorpool.errors import SetupError
from motorpool.sim import plan_page
from motorpool.sim.plan import (
    Band,
    Owners,
    Plan,
    Stay,
    Terms,
    even_rate,
    made_up,
    make,
    of_recording,
    supply_and_harvest,
)
from motorpool.sim.recordings import load
from motorpool.sim.year import Node

HOUR = 3_600_000
MONDAY_MS = 4 * 24 * HOUR  # 1970-01-05
HEAD = '"location";"user_id";"session_id";"plugin_time";"plugout_time";"connection_time";"energy_session"\n'
PRICE = Price(input_micro=30_000, output_micro=60_000)
ALL_PAY = [True] * 24


def terms(**changes: Any) -> Terms:
    usual: dict[str, Any] = {"fleet": 1_000, "model": "m", "price": PRICE, "node": Node(), "draws": 5}
    return Terms(**(usual | changes))


def nightly(owners: int = 8, weeks: int = 6, charge_h: float = 2.0) -> Owners:
    """Everybody is plugged in from 18:00 to 08:00; ``charge_h`` of it goes to charging."""
    stays = {
        f"o{number}": [
            Stay(
                MONDAY_MS + day * 24 * HOUR + 18 * HOUR,
                MONDAY_MS + (day + 1) * 24 * HOUR + 8 * HOUR,
                int(charge_h * HOUR),
            )
            for day in range(-1, weeks * 7)
        ]
        for number in range(owners)
    }
    return Owners(stays=stays, source="nights", recorded=True)


@pytest.fixture(scope="module")
def usual() -> Plan:
    return make(made_up(1, owners=(30, 6, 6), weeks=8), terms(fleet=50_000, vehicle_micro_year=1_000_000))


# -- hours -------------------------------------------------------------------------------------------------------------


def test_hours_are_what_the_rules_leave() -> None:
    supply = supply_and_harvest(nightly(), terms(budget_h_week=168.0), ALL_PAY, 0.9)
    assert supply.useful == 0.9
    week = supply.plugged[0].reshape(-1, 7, 24)[1]
    assert week.sum() == pytest.approx(7 * 14)
    worked = supply.worked[0].reshape(-1, 7, 24)[1]
    assert worked.sum() == pytest.approx(7 * 12)
    assert not worked[:, 8:20].any()  # away, and then charging
    assert worked[:, 20:].all()


def test_no_seven_days_have_more_work_than_the_budget() -> None:
    worked = supply_and_harvest(nightly(), terms(budget_h_week=60.0), ALL_PAY, 1.0).worked
    so_far = np.concatenate([[0.0], np.cumsum(worked[0], dtype=np.float64)])
    assert (so_far[168:] - so_far[:-168]).max() <= 60.0 + 1e-4
    assert worked[0].sum() / (worked.shape[1] / 168) == pytest.approx(60.0, abs=0.5)


def test_hours_that_would_cost_the_owner_money_are_not_worked() -> None:
    dear = tuple(1_000_000 if 20 <= hour < 24 else 100_000 for hour in range(24))
    found = make(nightly(), terms(node=Node(tariff=Tariff.hourly(dear))))
    assert found.idle_hours_of_day == [20, 21, 22, 23]
    assert all(band.p90 == 0 for band in found.by_hour_of_day[20:])
    assert found.by_hour_of_day[0].p10 > 0
    assert found.owner_net_micro_year.p10 > 0
    nothing = make(nightly(), terms(node=Node(tariff=Tariff.flat(2_000_000))))
    assert len(nothing.idle_hours_of_day) == 24
    assert nothing.ledgers[2].customers_micro == 0
    assert nothing.ledgers[2].socket_wh == 0
    assert b"<svg" in plan_page.render(nothing)


def test_what_all_owners_do_is_certain_and_is_what_one_reckons_by_hand() -> None:
    found = make(nightly(), terms(budget_h_week=168.0, harvest=0.9))
    tokens = 1_000 * 12 * 283.0 * 3600 * 0.9
    assert found.tokens_day.p10 == pytest.approx(tokens)
    assert found.tokens_day.p90 == pytest.approx(tokens)
    week = found.ledgers[1]
    assert week.vehicle_h == pytest.approx(7 * 12 * 1_000)
    assert week.output_tokens == pytest.approx(7 * tokens, rel=1e-9)
    assert week.customers_micro == pytest.approx(7 * tokens * (60_000 + 3 * 30_000) / 1e6, rel=1e-9)


def test_too_few_sessions_are_told() -> None:
    for owners, text in (
        (nightly(weeks=2), "whole weeks"),
        (nightly(owners=3), "owners or more"),
        (Owners(stays={}, source="", recorded=True), "no stay"),
    ):
        with pytest.raises(SetupError, match=text):
            make(owners, terms())


# -- sums --------------------------------------------------------------------------------------------------------------


def test_money_and_energy_add_up(usual: Plan) -> None:
    node = usual.terms.node
    assert len(usual.ledgers) == 3
    for week in usual.ledgers:
        assert week.owners_micro + week.operator_share_micro == week.customers_micro
        assert week.owners_net_micro == week.owners_micro - week.electricity_micro - week.wear_micro
        assert week.operator_net_micro == week.operator_share_micro - week.operator_cost_micro
        assert week.owners_micro == week.customers_micro * PRICE.owner_share_bp // 10_000
        assert week.computer_wh == pytest.approx(week.vehicle_h * node.watts_w, rel=1e-6)
        on_dc = week.computer_wh / 0.92 + week.vehicle_h * node.awake_w / 0.92
        assert week.socket_wh == pytest.approx((on_dc + week.vehicle_h * 200) / 0.94, rel=1e-4)
        assert week.electricity_micro == pytest.approx(week.socket_wh / 1000 * 120_000, rel=1e-4)
        assert week.operator_cost_micro == pytest.approx(50_000 * 1e6 * 7 / 365, rel=1e-9)
        assert week.co2_g == pytest.approx(week.socket_wh / 1000 * 480, rel=1e-6)
    assert usual.ledgers[0].output_tokens <= usual.ledgers[1].output_tokens <= usual.ledgers[2].output_tokens
    assert usual.hour.net_micro == usual.hour.pay_micro - usual.hour.electricity_micro - usual.hour.wear_micro
    assert usual.ledgers[1].output_tokens / 7 == pytest.approx(usual.tokens_day.p50, rel=0.02)


def test_wear_is_paid_for() -> None:
    found = make(nightly(), terms(node=Node(prices=WearPrices(silicon_micro_h=20_000))))
    assert found.ledgers[1].wear_micro > 0
    assert found.ledgers[1].wear_micro == pytest.approx(found.ledgers[1].vehicle_h * found.hour.wear_micro, rel=1e-6)


def bands_in(value: Any) -> list[Band]:
    if isinstance(value, Band):
        return [value]
    if isinstance(value, list):
        return [band for each in value for band in bands_in(each)]
    if isinstance(value, msgspec.Struct):
        return [band for name in value.__struct_fields__ for band in bands_in(getattr(value, name))]
    return []


def test_bands_are_in_order(usual: Plan) -> None:
    bands = bands_in(usual)
    assert len(bands) > 200
    assert all(band.p10 <= band.p50 <= band.p90 for band in bands)
    assert len(usual.by_hour_of_day) == 24
    assert len(usual.by_hour_of_week) == 168
    assert sum(band.p50 for band in usual.by_hour_of_day) == pytest.approx(usual.tokens_day.p50, rel=0.05)
    assert usual.worked_h_week.p50 <= min(usual.plugged_h_week.p50, usual.terms.budget_h_week)


def test_half_the_customers_are_half_of_everything_but_the_operators_costs(usual: Plan) -> None:
    by_part = {part: (owners, operator) for part, owners, operator in usual.sold_net_micro}
    assert by_part[0.5][0] == pytest.approx(by_part[1.0][0] / 2, rel=1e-6)
    cost = usual.ledgers[1].operator_cost_micro
    assert by_part[0.5][1] + cost == pytest.approx((by_part[1.0][1] + cost) / 2, rel=1e-6)
    assert by_part[1.0] == (usual.ledgers[1].owners_net_micro, usual.ledgers[1].operator_net_micro)


def test_a_longer_deadline_never_promises_less(usual: Plan) -> None:
    for one, other in zip(usual.deadlines, usual.deadlines[1:], strict=False):
        assert one.hours < other.hours
        for q in ("p10", "p50", "p90"):
            assert getattr(one.tokens_day, q) <= getattr(other.tokens_day, q) * (1 + 1e-9)
            assert getattr(one.largest_tokens, q) <= getattr(other.largest_tokens, q)
    assert usual.deadlines[-1].part.p90 <= 1.0 + 1e-9


@pytest.mark.parametrize("hours", [1, 4, 12, 24])
def test_what_a_plan_promises_is_kept_minute_by_minute_and_hardly_more_would_be(hours: int) -> None:
    """Work that comes in evenly at the rate of the plan and is done in its order: who is served later than promised?"""
    draw = np.random.default_rng(hours)
    week = 1e6 * (1.2 + np.cos(np.arange(168) * 2 * np.pi / 24)) * draw.uniform(0.8, 1.2, 168)
    rate = even_rate(np.concatenate([[0.0], np.cumsum(np.tile(week, 3))]), hours)
    capacity = np.repeat(np.tile(week, 4), 60) / 60

    def late(tokens_h: float) -> float:
        """The most tokens that have not been served when their time is over."""
        waits, served, most = 0.0, 0.0, 0.0
        for minute, can in enumerate(capacity):
            waits += tokens_h / 60
            done = min(waits, can)
            waits, served = waits - done, served + done
            most = max(most, (minute + 1 - hours * 60) * tokens_h / 60 - served)
        return most

    assert late(rate * 0.999) < 0.01 * rate
    assert late(rate * 1.05) > 0.01 * rate


# -- the same again ----------------------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_plan_and_another_is_another() -> None:
    owners = made_up(2, owners=(12, 2, 2), weeks=7)
    first = make(owners, terms())
    assert make(owners, terms()) == first
    assert plan_page.render(make(owners, terms())) == plan_page.render(first)
    assert make(owners, terms(seed=9)).tokens_day != first.tokens_day
    heard: list[float] = []
    make(owners, terms(), heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


# -- the page ----------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """What a page consists of; notes tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_needs_nothing_from_outside_and_is_well_formed(usual: Plan) -> None:
    page = plan_page.render(usual).decode()
    seen = Seen()
    seen.feed(page)
    assert seen.wrong == []
    assert seen.open == []
    assert not seen.tags & {"script", "link", "img", "iframe", "image", "use", "object", "embed"}
    assert not {name for name, _ in seen.attributes} & {"src", "href", "xlink:href", "srcset", "onload", "action"}
    assert not re.search(r"https?://|url\(|@import|//[a-z]", page)
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower().replace("finance", "")
    assert page.count("<svg") == 5


def test_what_a_user_names_is_text_on_the_page() -> None:
    found = make(nightly(), terms(model="<script>x</script>", currency="A&B"))
    page = plan_page.render(found).decode()
    assert "<script" not in page
    assert "A&amp;B" in page


def test_large_numbers_have_words() -> None:
    told = [plan_page.large(value) for value in (0, 12, 1_500, 999_600, 2.5e6, 176e9, 3e12)]
    assert told == ["0", "12", "1.5 thousand", "1,000 thousand", "2.5 million", "176 billion", "3 trillion"]


# -- the command -------------------------------------------------------------------------------------------------------


def reports(folder: Path, owners: int = 7, days: int = 50) -> Path:
    rows = []
    for number in range(owners):
        for day in range(days):
            home = datetime(2020, 3, 2, 17, 30, tzinfo=ZoneInfo("Europe/Oslo")) + timedelta(days=day)
            away = home + timedelta(hours=14)
            user = f"ASK_{number}"
            rows.append(f'"ASK";"{user}";"{user}_{day}";{home:%Y-%m-%d %H:%M:%S};{away:%Y-%m-%d %H:%M:%S};14,0;12,5')
    path = folder / "tiny_Dataset1.csv"
    path.write_text(HEAD + "\n".join(rows) + "\n")
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def test_the_command_writes_a_page_and_tells_its_result(tmp_path: Path) -> None:
    out = tmp_path / "p.html"
    asked = ("--fleet", "500", "--sessions", str(reports(tmp_path)), "--draws", "3", "--out", str(out))
    done = run(*asked, "--region", "NO", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["owners"] == 7
    assert told["ledgers"][1]["owners_net_micro"] > 0
    assert out.read_bytes().startswith(b"<!doctype html>")
    first = out.read_bytes()
    shown = run(*asked, "--region", "NO")
    assert "500 cars" in shown.stdout
    assert out.read_bytes() == first


def test_local_time_is_the_owners(tmp_path: Path) -> None:
    owners = of_recording(load(reports(tmp_path)))
    begins = {stay.begin_ms % (24 * HOUR) for rows in owners.stays.values() for stay in rows}
    assert begins == {17 * HOUR + HOUR // 2}  # in winter as in summer


def test_prices_by_the_hour_can_come_from_a_file(tmp_path: Path) -> None:
    prices = tmp_path / "prices.txt"
    prices.write_text("\n".join(["0.10"] * 12 + ["9.00"] * 12))
    asked = ("--fleet", "10", "--sessions", str(reports(tmp_path)), "--draws", "2", "--no-page", "--json")
    told = json.loads(run(*asked, "--electricity", str(prices)).stdout)
    assert told["idle_hours_of_day"] == list(range(12, 24))
    line = ",".join(["0.10"] * 12 + ["9.00"] * 12)
    assert json.loads(run(*asked, "--electricity", line).stdout) == told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--fleet"),
        (("--fleet", "0"), "--fleet"),
        (("--fleet", "5", "--sessions", "/nowhere"), "does not exist"),
        (("--fleet", "5", "--electricity", "cheap"), "neither a price"),
        (("--fleet", "5", "--electricity", "0.1,0.2"), "one price or 24"),
        (("--fleet", "5", "--electricity", "nan"), "neither a price"),
        (("--fleet", "5", "--electricity", "-0.1"), "kilowatt-hour"),
        (("--fleet", "5", "--out", "plan.pdf"), ".html"),
        (("--fleet", "5", "--region", "XX"), "country code"),
        (("--fleet", "5", "--sold", "1.5"), "--sold"),
        (("--fleet", "5", "--price", "1"), "--price"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.output


def test_the_examples_of_the_page_in_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "planning.md").read_text("utf-8")
    examples = re.findall(r"^    motorpool plan (.*)$", text, re.MULTILINE)
    assert len(examples) >= 3
    data = reports(tmp_path)
    monkeypatch.chdir(tmp_path)
    for example in examples:
        done = run(*example.replace("DATA", str(data)).split())
        assert done.exit_code == 0, done.output
    assert (tmp_path / "plan.html").exists()
    assert (tmp_path / "dear.html").exists()


def test_an_unknown_model_needs_a_price() -> None:
    done = run("--fleet", "5", "--model", "no-such")
    assert isinstance(done.exception, SetupError)
    assert "--price" in str(done.exception)
