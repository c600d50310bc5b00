"""What a fleet would earn, before a single car is enrolled: tokens, deadlines, money, energy and wear, with bands.

Decides: how charging sessions become hours in which cars may work, and what follows from these hours. Must not: draw or
print (``sim.plan_page`` and ``cli.plan`` do), or judge a moment (``core.guard`` does, in the car).
Called by: ``cli.plan``.

How it reckons. Owners of a recording, or made-up ones, stand for the fleet. From each stay, what the owner's rules
leave is taken: charging comes first, the week has a budget of hours that goes along with time, and no hour is worked
that would cost the owner more than it brings. The fleet is then drawn again many times: owners with replacement, and a
week of the calendar with two weeks before and after it (some dozens of cars in one hour are not yet a fleet), so that
what a fleet does together (mornings, weekends, summers) stays together. Of all drawn weeks, the 10 %, 50 % and 90 %
bands are told. They hold what differs between weeks and between owners, and the doubt that comes from knowing few
owners; not whether your owners are like these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.core import carbon
from motorpool.core.departures import DAY_MS, EPOCH_WEEKDAY, HOUR_MS, WEEK_HOURS
from motorpool.core.economics import Hour, PayRates, Speed, Wear, project
from motorpool.core.energy import Power
from motorpool.core.pricing import Price, owner_pay
from motorpool.core.wear import weight_ppm
from motorpool.errors import SetupError
from motorpool.sim import generator
from motorpool.sim.recordings import BOULDER_SOURCE, Recording
from motorpool.sim.year import USUAL_CHARGER_W, Node

Floats = npt.NDArray[np.float64]
Tell = Callable[[float], None]

WEEK_MS: Final = 7 * DAY_MS
DEADLINES_H: Final = (1, 4, 12, 24)
QUANTILES: Final = (0.1, 0.5, 0.9)
MADE_UP: Final = (140, 30, 30)  # owners at home, at shared chargers, at work: 70, 15 and 15 of a hundred
MADE_UP_WEEKS: Final = 16
MADE_UP_KWH: Final = 12.0  # charged in a stay
MIN_OWNERS: Final = 5  # in a week, or it says nothing
AROUND_WEEKS: Final = 2
MIN_PART: Final = 0.5  # of the owners of the fullest week
MIN_WEEKS: Final = 4
COMPUTER_C: Final = 60.0  # the computer at work, for its wear
SOLD: Final = (0.25, 0.5, 0.75, 1.0)


class Stay(msgspec.Struct, frozen=True):
    """A stay at a charger in local time; charging takes its first ``charge_ms``."""

    begin_ms: int
    end_ms: int
    charge_ms: int


class Owners(msgspec.Struct, frozen=True, kw_only=True):
    """The owners that stand for the fleet: their stays by name, in order and apart; ``source`` is to be named."""

    stays: Mapping[str, Sequence[Stay]]
    source: str
    recorded: bool


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan assumes. Money in millionths of ``currency``.

    ``harvest``: part of the hours that cars may work which becomes results. ``sold``: part of the capacity that
    customers buy. ``vehicle_micro_year``: what a car costs the operator in a year.
    """

    fleet: int
    model: str
    price: Price
    node: Node
    harvest: float = 0.95
    sold: float = 1.0
    budget_h_week: float = 60.0
    vehicle_micro_year: int = 0
    region: str = ""
    currency: str = "USD"
    job_tokens: int = 1_000_000
    draws: int = 20
    seed: int = 0


class Band(msgspec.Struct, frozen=True):
    """One in ten weeks is below ``p10``, half are below ``p50``, nine in ten below ``p90``."""

    p10: float
    p50: float
    p90: float


class Deadline(msgspec.Struct, frozen=True, kw_only=True):
    """Work that has so many hours from hand-in.

    ``tokens_day``: so many tokens a day can be promised if all work is of this class and comes in evenly. ``jobs_day``:
    the same in jobs. ``part``: of all that the fleet can do. ``largest_tokens``: the largest single job that fits
    whenever in the week it comes.
    """

    hours: int
    tokens_day: Band
    jobs_day: Band
    part: Band
    largest_tokens: Band


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """A week of the fleet. Money in millionths; every sum is exact: customers = owners + operator, and what follows."""

    vehicle_h: float
    output_tokens: int
    input_tokens: int
    customers_micro: int
    owners_micro: int
    electricity_micro: int
    wear_micro: int
    operator_share_micro: int
    operator_cost_micro: int
    socket_wh: int
    computer_wh: int
    co2_g: int

    @property
    def owners_net_micro(self) -> int:
        """What is left for all owners after electricity and wear."""
        return self.owners_micro - self.electricity_micro - self.wear_micro

    @property
    def operator_net_micro(self) -> int:
        """What is left for the operator."""
        return self.operator_share_micro - self.operator_cost_micro


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found. Hours of the week begin on Monday at 00:00 local time.

    ``ledgers`` are three weeks as they were drawn: of the least, the middle and the most tokens (10, 50, 90 %).
    ``by_week`` is tokens a day in each week of the calendar. ``sold_net_micro``: part sold, and what is left in the
    middle week for owners and operator. ``owner_net_micro_year`` is what a year leaves one owner: a tenth of the owners
    is below ``p10``. ``hour`` is an hour of work at its dearest electricity, and ``idle_hours_of_day`` are those in
    which it would cost the owner more than it brings.
    """

    terms: Terms
    owners: int
    weeks: int
    source: str
    recorded: bool
    plugged_h_week: Band
    worked_h_week: Band
    tokens_day: Band
    by_hour_of_day: list[Band]
    by_hour_of_week: list[Band]
    by_week: list[Band]
    deadlines: list[Deadline]
    ledgers: list[Ledger]
    sold_net_micro: list[tuple[float, int, int]]
    owner_net_micro_year: Band
    hour: Hour
    power: Power
    idle_hours_of_day: list[int]


class Supply(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Hours of each owner's car [owners, weeks * 168], as parts of an hour; ``active`` [owners, weeks]: is in the data.

    ``useful`` is the part of the worked hours that becomes results.
    """

    plugged: npt.NDArray[np.float32]
    worked: npt.NDArray[np.float32]
    active: npt.NDArray[np.bool_]
    useful: float


# -- owners ------------------------------------------------------------------------------------------------------------


def of_recording(recording: Recording) -> Owners:
    """The owners of recorded sessions; a station with several plugs counts as one car for each."""
    local = _local_clock(recording)
    rows: dict[str, list[Stay]] = {}
    for each in recording.sessions:
        begin_ms, end_ms = local(each.plug_in_ms), local(each.plug_out_ms)
        if end_ms > begin_ms:
            charge_ms = int(each.energy_kwh * 1000 / (each.charger_w or USUAL_CHARGER_W) * HOUR_MS)
            rows.setdefault(each.user, []).append(Stay(begin_ms, end_ms, min(charge_ms, end_ms - begin_ms)))
    stays: dict[str, Sequence[Stay]] = {}
    for user, found in rows.items():
        lanes: list[list[Stay]] = []
        for stay in sorted(found, key=lambda row: (row.begin_ms, row.end_ms)):
            lane = next((lane for lane in lanes if lane[-1].end_ms <= stay.begin_ms), None)
            if lane is None:
                lanes.append(lane := [])
            lane.append(stay)
        if recording.source != BOULDER_SOURCE:
            lanes = lanes[:1]  # one owner's stays that overlap are an error of the recording, not a second car
        stays.update({f"{user}#{number}": lane for number, lane in enumerate(lanes)})
    return Owners(stays=stays, source=recording.source, recorded=True)


def made_up(seed: int, owners: tuple[int, int, int] = MADE_UP, weeks: int = MADE_UP_WEEKS) -> Owners:
    """Owners of the built-in generator, from its published figures, for those who have no sessions of their own."""
    charge_ms = int(MADE_UP_KWH * 1000 / USUAL_CHARGER_W * HOUR_MS)
    stays: dict[str, Sequence[Stay]] = {}
    for kind, maker in enumerate((generator.home, generator.shared, generator.work)):
        for number in range(owners[kind]):
            found = maker(seed, number, weeks)
            stays[f"{kind}-{number}"] = [
                Stay(row.begin_ms, row.end_ms, min(charge_ms, row.end_ms - row.begin_ms)) for row in found
            ]
    return Owners(stays=stays, source=generator.SOURCE, recorded=False)


def _local_clock(recording: Recording) -> Callable[[int], int]:
    offsets: dict[int, int] = {}

    def shifted(at_ms: int) -> int:
        hour = at_ms // HOUR_MS
        if hour not in offsets:
            offset = datetime.fromtimestamp(hour * 3600, recording.zone).utcoffset()
            assert offset is not None
            offsets[hour] = int(offset.total_seconds()) * 1000
        return at_ms + offsets[hour]

    return shifted


# -- supply ------------------------------------------------------------------------------------------------------------


def supply_and_harvest(owners: Owners, terms: Terms, hour_pays: Sequence[bool], harvest: float) -> Supply:
    """The hours in which the owners' cars stand plugged in, and those that their rules leave for work.

    ``hour_pays``: for each hour of the day, whether work leaves the owner something. ``harvest``: part of the worked
    hours that becomes results. Raises SetupError if the stays are too few.
    """
    names = sorted(name for name, rows in owners.stays.items() if rows)
    if not names:
        raise SetupError("these sessions hold no stay at a charger", code="no_sessions")
    begins = [owners.stays[name][0].begin_ms for name in names]
    ends = [owners.stays[name][-1].end_ms for name in names]
    first_ms = _monday_after(min(begins))
    weeks = (max(ends) - first_ms) // WEEK_MS
    if weeks < MIN_WEEKS:
        raise SetupError(f"these sessions cover fewer than {MIN_WEEKS} whole weeks", code="no_sessions")
    hours = weeks * WEEK_HOURS
    plugged = np.zeros((len(names), hours), np.float32)
    may = np.zeros_like(plugged)
    for row, name in enumerate(names):
        stays = owners.stays[name]
        plugged[row] = _by_hour([(stay.begin_ms, stay.end_ms) for stay in stays], first_ms, hours)
        may[row] = _by_hour([(stay.begin_ms + stay.charge_ms, stay.end_ms) for stay in stays], first_ms, hours)
    starts = first_ms + np.arange(weeks) * WEEK_MS
    active = (np.array(begins)[:, None] <= starts) & (np.array(ends)[:, None] >= starts + WEEK_MS)
    may *= np.tile(np.array(hour_pays, np.float32), hours // 24)
    worked = _within_budget(may, terms.budget_h_week)
    there = active.sum(axis=0)
    enough = there >= max(MIN_OWNERS, MIN_PART * int(there.max()))
    if enough.sum() < MIN_WEEKS:
        text = f"fewer than {MIN_WEEKS} weeks of these sessions have {MIN_OWNERS} owners or more: name more sessions"
        raise SetupError(text, code="no_sessions")
    keep = np.repeat(enough, WEEK_HOURS)
    return Supply(plugged=plugged[:, keep], worked=worked[:, keep], active=active[:, enough], useful=harvest)


def _monday_after(local_ms: int) -> int:
    shift_ms = EPOCH_WEEKDAY * DAY_MS
    return -(-(local_ms + shift_ms) // WEEK_MS) * WEEK_MS - shift_ms


def _by_hour(spans: Iterable[tuple[int, int]], first_ms: int, hours: int) -> Floats:
    """Parts of each hour that the spans cover."""
    times = np.clip((np.array(list(spans), np.float64).reshape(-1, 2) - first_ms) / HOUR_MS, 0, hours)
    grid = np.arange(hours + 1)

    def so_far(moments: Floats) -> Floats:
        ordered = np.sort(moments)
        count = np.searchsorted(ordered, grid)
        found: Floats = grid * count - np.concatenate([[0.0], np.cumsum(ordered)])[count]
        return found

    covered: Floats = np.clip(np.diff(so_far(times[:, 0]) - so_far(times[:, 1])), 0.0, 1.0)
    return covered


def _within_budget(may: npt.NDArray[np.float32], budget_h: float) -> npt.NDArray[np.float32]:
    """What the budget of any seven days leaves, hour after hour, for all owners at once."""
    worked = np.zeros_like(may)
    used = np.zeros(len(may), np.float64)
    for hour in range(may.shape[1]):
        if hour >= WEEK_HOURS:
            used -= worked[:, hour - WEEK_HOURS]
        worked[:, hour] = np.minimum(may[:, hour], np.maximum(budget_h - used, 0.0))
        used += worked[:, hour]
    return worked


# -- the plan ----------------------------------------------------------------------------------------------------------


def make(owners: Owners, terms: Terms, tell: Tell | None = None) -> Plan:
    """Reckon it all; ``tell`` hears how much of it is over, from 0 to 1. The same arguments give the same plan."""
    told = tell or (lambda _: None)
    power = terms.node.energy().power(terms.node.watts_w, awake_for_us=True, grid_fed=True)
    by_clock = _hours(terms, power)
    pays = [hour.net_micro >= 0 for hour in by_clock]
    supply = supply_and_harvest(owners, terms, pays, terms.harvest)
    told(0.15)
    samples, plugged = _draw(supply, terms, told)
    capacity = samples * terms.fleet * terms.node.tokens_s * 3600 * supply.useful  # output tokens [draws * weeks, 168]
    totals = capacity.sum(axis=1)
    order = np.argsort(totals, kind="stable")
    three = [int(order[min(int(q * len(order)), len(order) - 1)]) for q in QUANTILES]
    ledgers = [
        _ledger(samples[row], terms, by_clock, power=power, useful=supply.useful, sold=terms.sold) for row in three
    ]
    middle = samples[three[1]]
    by_sold = [(part, _ledger(middle, terms, by_clock, power=power, useful=supply.useful, sold=part)) for part in SOLD]
    deadlines = _deadlines(capacity, terms, told)
    weeks = supply.active.shape[1]
    told(1.0)
    return Plan(
        terms=terms,
        owners=len(supply.worked),
        weeks=weeks,
        source=owners.source,
        recorded=owners.recorded,
        plugged_h_week=_band(plugged.sum(axis=1)),
        worked_h_week=_band(samples.sum(axis=1)),
        tokens_day=_band(totals / 7),
        by_hour_of_day=[_band(hour) for hour in capacity.reshape(-1, 7, 24).mean(axis=1).T],
        by_hour_of_week=[_band(hour) for hour in capacity.T],
        by_week=[_band(week) for week in totals.reshape(terms.draws, weeks).T / 7],
        deadlines=deadlines,
        ledgers=ledgers,
        sold_net_micro=[(part, week.owners_net_micro, week.operator_net_micro) for part, week in by_sold],
        owner_net_micro_year=_band(_owners_net(supply, terms, by_clock)),
        hour=min(by_clock, key=lambda hour: hour.net_micro),
        power=power,
        idle_hours_of_day=[clock for clock, ok in enumerate(pays) if not ok],
    )


def _hours(terms: Terms, power: Power) -> list[Hour]:
    """What an hour of work brings the owner, by hour of the day; what is lost on the way is not paid."""
    node = terms.node
    paid_input, paid_output = owner_pay(terms.price)
    whole = node.speed(node.watts_w)
    speed = Speed(
        input_tokens_s=whole.input_tokens_s * terms.harvest, output_tokens_s=whole.output_tokens_s * terms.harvest
    )
    rates = PayRates(input_micro=paid_input, output_micro=paid_output)
    wear = Wear(prices=node.prices, junction_ppm=weight_ppm(COMPUTER_C))
    found = [project(rates, speed, power, node.tariff.at(clock * HOUR_MS), wear) for clock in range(24)]
    return [hour for hour in found if hour is not None]


def _draw(supply: Supply, terms: Terms, tell: Tell) -> tuple[Floats, Floats]:
    """Weeks of fleets drawn again from the owners: hours worked and plugged in for each car [draws * weeks, 168]."""
    draw = np.random.Generator(np.random.Philox(key=[terms.seed, 4]))
    owners, weeks = supply.active.shape
    worked: list[Floats] = []
    plugged: list[Floats] = []
    here = np.repeat(supply.active, WEEK_HOURS, axis=1)
    both = [np.where(here, part, 0.0) for part in (supply.worked, supply.plugged)]
    for number in range(terms.draws):
        times = np.bincount(draw.integers(0, owners, owners), minlength=owners).astype(np.float64)
        cars = np.maximum(_around(times @ supply.active), 1.0)  # [weeks]; a week that draws nobody has no hours
        for found, part in zip((worked, plugged), both, strict=True):
            found.append(_around((times @ part).reshape(weeks, WEEK_HOURS)) / cars[:, None])
        tell(0.15 + 0.45 * (number + 1) / terms.draws)
    return np.concatenate(worked), np.concatenate(plugged)


def _around(weekly: Floats) -> Floats:
    """Sums over each week and its neighbours."""
    weeks = np.arange(len(weekly))
    so_far = np.concatenate([np.zeros_like(weekly[:1]), np.cumsum(weekly, axis=0)])
    found: Floats = (
        so_far[np.minimum(weeks + AROUND_WEEKS + 1, len(weekly))] - so_far[np.maximum(weeks - AROUND_WEEKS, 0)]
    )
    return found


def _deadlines(capacity: Floats, terms: Terms, tell: Tell) -> list[Deadline]:
    """What can be promised in each class, over all drawn weeks. The week is taken as one of many that are alike."""
    sold = capacity * terms.sold
    rates = np.zeros((len(DEADLINES_H), len(sold)))
    largest = np.zeros_like(rates)
    for row, week in enumerate(sold):
        so_far = np.concatenate([[0.0], np.cumsum(np.tile(week, 3))])
        for number, hours in enumerate(DEADLINES_H):
            rates[number, row] = even_rate(so_far, hours)
            largest[number, row] = (so_far[hours : WEEK_HOURS + hours] - so_far[:WEEK_HOURS]).min()
        if row % 64 == 0:
            tell(0.6 + 0.38 * row / len(sold))
    means = np.maximum(sold.mean(axis=1), 1e-9)
    return [
        Deadline(
            hours=hours,
            tokens_day=_band(rates[number] * 24),
            jobs_day=_band(rates[number] * 24 / terms.job_tokens),
            part=_band(rates[number] / means),
            largest_tokens=_band(largest[number]),
        )
        for number, hours in enumerate(DEADLINES_H)
    ]


def even_rate(so_far: Floats, hours: int) -> float:
    """The most tokens an hour that may come in evenly, if each has to be done within ``hours`` of coming in.

    ``so_far``: cumulated capacity by hour over three weeks that are alike. What comes in during any stretch of n hours
    has that stretch and ``hours`` more; by the theory of earliest deadline first, nothing else has to hold, and over
    many weeks no more can be done than there is.
    """
    starts = np.arange(WEEK_HOURS)[:, None]
    stretch = np.arange(1, WEEK_HOURS + 1)
    room = so_far[starts + np.minimum(stretch + hours, 2 * WEEK_HOURS)] - so_far[starts]
    return float(min((room / stretch).min(), so_far[WEEK_HOURS] / WEEK_HOURS))


def _ledger(
    week: Floats, terms: Terms, by_clock: Sequence[Hour], *, power: Power, useful: float, sold: float
) -> Ledger:
    """The books of one week, from hours worked by each car and hour of the week [168]."""
    node = terms.node
    hours = week * terms.fleet * sold
    total_h = float(hours.sum())
    output = int(total_h * node.tokens_s * 3600 * useful)
    read = int(output * node.input_per_output)
    customers = (output * terms.price.output_micro + read * terms.price.input_micro) // 1_000_000
    owners = customers * terms.price.owner_share_bp // 10_000
    clock = hours.reshape(7, 24).sum(axis=0)
    socket_wh = round(total_h * power.grid_mw / 1000)
    electricity = sum(round(float(count) * hour.electricity_micro) for count, hour in zip(clock, by_clock, strict=True))
    return Ledger(
        vehicle_h=total_h,
        output_tokens=output,
        input_tokens=read,
        customers_micro=customers,
        owners_micro=owners,
        electricity_micro=electricity,
        wear_micro=sum(round(float(count) * hour.wear_micro) for count, hour in zip(clock, by_clock, strict=True)),
        operator_share_micro=customers - owners,
        operator_cost_micro=round(terms.vehicle_micro_year * terms.fleet * 7 / 365),
        socket_wh=socket_wh,
        computer_wh=round(total_h * power.computer_mw / 1000),
        co2_g=round(socket_wh / 1000 * carbon.grams_per_kwh(terms.region)),
    )


def _owners_net(supply: Supply, terms: Terms, by_clock: Sequence[Hour]) -> Floats:
    """What a year leaves each owner, in millionths, for owners with some weeks in the data."""
    here = np.repeat(supply.active, WEEK_HOURS, axis=1)
    weeks = supply.active.sum(axis=1)
    seen = weeks >= MIN_WEEKS
    a_week = np.where(here, supply.worked, 0.0).reshape(len(weeks), -1, 24).sum(axis=1)[seen] / weeks[seen, None]
    net = np.array([hour.net_micro for hour in by_clock], np.float64)
    found: Floats = a_week @ net * terms.sold * 365 / 7
    return found


def _band(values: Floats) -> Band:
    low, middle, high = np.quantile(values, QUANTILES)
    return Band(float(low), float(middle), float(high))
