"""A year of one owner, from recorded charging sessions: the same car with Motorpool and without it, side by side.

Decides: what the owner does (the recording says when) and what the physics make of it. Must not: judge; whether the car
works in a minute is said by ``core.guard``, with real budgets, energy, wear and prices, and whether a promise to the
owner was broken by ``sim.witness``, which shares nothing with the guard.
Called by: the command line (``motorpool sim year``), ``sim.owners``, ``tests``.

Both cars get the same plug-ins, drives and plug-outs. Work is taken to be there at any time, so what is shown is what
the owner's rules leave. The guard looks once a minute and at each act of the owner, where a real one looks four times
a second: what it learns a minute late counts against it. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Final
from zoneinfo import ZoneInfo

import msgspec

from motorpool.agent.signals import physics
from motorpool.agent.signals.car import Action, CarSpec, SimulatedCar
from motorpool.agent.signals.sessions import NORWAY, Session
from motorpool.core.budgets import BudgetBook, Used
from motorpool.core.economics import PayRates, SecondLook, SessionBook, Speed, Statement, Tariff, Wear
from motorpool.core.energy import EnergyMeter, EnergyModel
from motorpool.core.guard import Budgets, ConsentView, History, Policy, Verdict, decide
from motorpool.core.policy import ReadyBy
from motorpool.core.signals import NetworkClass
from motorpool.core.wear import JunctionHours, Rainflow, WearPrices, weight_ppm
from motorpool.errors import SetupError
from motorpool.sim.witness import Promises, Violation, Witness
from motorpool.types import Permit

MINUTE_MS: Final = 60_000
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000
WEEK_MS: Final = 7 * DAY_MS
YEAR_MS: Final = 365 * DAY_MS
LOOK_MS: Final = MINUTE_MS
LEAVE_MS: Final = 20_000  # from the first touch of the door to driving away
AWAY_STEP_S: Final = 3_600.0
MIN_SESSIONS: Final = 50
LIMIT_PCT: Final = 95.0  # where the recordings' own model of the battery ends
USUAL_CAPACITY_WH: Final = 60_000.0  # where the recording names none
USUAL_CHARGER_W: Final = 6_500.0
FLOOR_PCT: Final = 30.0
READY_BY: Final = ReadyBy(minute=7 * 60, target_pct=80.0)
Tell = Callable[[float], None]


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """The computer in the car, what its work is paid, and what electricity costs. Less power is less speed.

    The defaults are those of the planning figures: a module of 130 W at most that generates 283 tokens a second in
    eight requests at once, and the owner's 70 % of $0.03 and $0.06 for a million tokens in and out.
    """

    watts_w: int = 130
    tokens_s: float = 283.0
    input_per_output: float = 3.0
    rates: PayRates = PayRates(input_micro=21_000, output_micro=42_000)
    load_ms: int = 20_000
    awake_w: float = 40.0
    prices: WearPrices = WearPrices()
    tariff: Tariff = Tariff(micro_kwh=(120_000,))

    def energy(self) -> EnergyModel:
        """The stated losses: those of the simulated car, so that its books can be compared with its meter."""
        return EnergyModel(
            dcdc_bp=round(physics.DCDC_SHARE * 10_000),
            awake_w=self.awake_w / physics.DCDC_SHARE,
            charger_on_w=physics.CHARGER_FIXED_W,
            charger_bp=round((1 - physics.CHARGER_SHARE) * 10_000),
        )

    def speed(self, watts_w: float) -> Speed:
        """Tokens a second at this power."""
        output_s = self.tokens_s * watts_w / self.watts_w
        return Speed(input_tokens_s=output_s * self.input_per_output, output_tokens_s=output_s)

    def promises(self) -> Promises:
        """What the owner was promised, for the witness."""
        paid = self.input_per_output * self.rates.input_micro + self.rates.output_micro
        return Promises(
            watts_w=self.watts_w,
            floor_pct=FLOOR_PCT,
            pay_per_watt_h=self.tokens_s * 3600 / 1e6 * paid / 1e6 / self.watts_w,
            awake_w=self.awake_w,
            wear_per_h=self.prices.silicon_micro_h / 1e6,
        )


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """One departure: the charge as the owner sees it at the first touch of the door, with us and without us."""

    at_ms: int
    arrived_pct: float
    with_pct: float
    without_pct: float
    plugged_ms: int
    worked_ms: int


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """One ready-by time at which the car was plugged in."""

    at_ms: int
    with_pct: float
    without_pct: float


class Week(msgspec.Struct, frozen=True, kw_only=True):
    """Seven days, counted from the first plug-in. Money in millionths."""

    plugged_ms: int
    worked_ms: int
    pay_micro: int
    electricity_micro: int
    wear_micro: int

    @property
    def net_micro(self) -> int:
        """Pay less electricity less wear."""
        return self.pay_micro - self.electricity_micro - self.wear_micro


class Year(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.

    ``why_ms`` is how long each reason stood against work while plugged in; of several the first in the guard's order
    counts, so that they and ``worked_ms`` add up to ``plugged_ms``. ``worked_by_hour_ms`` is Monday to Sunday, each 24
    hours of local time. ``cars_wh`` is what both cars' own meters at the socket differ by, ``statement.grid_mws`` what
    the books say. ``violations`` counts by kind, ``examples`` are the first ones.
    """

    user: str
    zone: str
    from_ms: int
    to_ms: int
    capacity_wh: float
    charger_w: float
    departures: list[Departure]
    ready_by: list[Moment]
    worked_ms: int
    plugged_ms: int
    why_ms: dict[str, int]
    worked_by_hour_ms: list[list[int]]
    budget_h_week: float
    weeks: list[Week]
    statement: Statement
    computer_wh: float
    with_us_wh: float
    without_us_wh: float
    cars_wh: float
    with_us_cycles: float
    without_us_cycles: float
    tokens: int
    violations: dict[str, int]
    examples: list[Violation]
    looks: int
    permits_checked: int
    least_any_pct: float

    @property
    def least_pct(self) -> float:
        """The worst departure: charge with us less charge without us, in percentage points."""
        return min((departure.with_pct - departure.without_pct for departure in self.departures), default=0.0)

    @property
    def before_full(self) -> int:
        """Departures before the battery was at its limit: where a loss of charge would show."""
        return sum(1 for departure in self.departures if departure.without_pct < LIMIT_PCT - 0.05)

    @property
    def our_cycles(self) -> float:
        """Equivalent full cycles of the battery that are ours."""
        return self.with_us_cycles - self.without_us_cycles

    @property
    def books_wh(self) -> float:
        """What we drew at the socket, by the books."""
        return self.statement.grid_mws / 3_600_000


def choose(sessions: Iterable[Session], user: str | None = None) -> tuple[str, list[Session]]:
    """The sessions of one owner's fullest year; without a name, of the owner with the median number of them."""
    by_user: dict[str, list[Session]] = {}
    for session in sessions:
        by_user.setdefault(session.user, []).append(session)
    if user is not None:
        found = fullest_year(by_user.get(user, []))
        if len(found) < 2:
            known = "is not in these files" if user not in by_user else "has fewer than 2 usable sessions"
            raise SetupError(f"the owner {user} {known}; leave the name out to take a usual one", code="no_such_owner")
        return user, found
    years = full_years(by_user)
    if not years:
        raise SetupError(
            f"no owner in these files has {MIN_SESSIONS} sessions in a year; name one with --user", code="no_sessions"
        )
    order = sorted(years, key=lambda name: (len(years[name]), name))
    usual = order[len(order) // 2]
    return usual, years[usual]


def full_years(by_user: dict[str, list[Session]]) -> dict[str, list[Session]]:
    """The fullest year of each owner who has ``MIN_SESSIONS`` sessions in it, by name."""
    years = {name: fullest_year(by_user[name]) for name in sorted(by_user)}
    return {name: found for name, found in years.items() if len(found) >= MIN_SESSIONS}


def fullest_year(sessions: list[Session]) -> list[Session]:
    """The stretch of 365 days with the most sessions, none of which overlaps the one before."""
    clean: list[Session] = []
    for session in sorted(sessions, key=lambda each: (each.plug_in_ms, each.plug_out_ms)):
        if not clean or session.plug_in_ms > clean[-1].plug_out_ms + 10 * MINUTE_MS:
            clean.append(session)
    best: list[Session] = []
    begin = 0
    for end, session in enumerate(clean):
        while session.plug_out_ms - clean[begin].plug_in_ms > YEAR_MS:
            begin += 1
        if end + 1 - begin > len(best):
            best = clean[begin : end + 1]
    return best


def simulate(
    user: str,
    sessions: list[Session],
    node: Node,
    *,
    zone: ZoneInfo = NORWAY,
    ready_by: ReadyBy | None = READY_BY,
    tell: Tell | None = None,
) -> Year:
    """Live through the sessions; ``tell`` hears how much of it is over, from 0 to 1."""
    plugged_ms = sum(session.plug_out_ms - session.plug_in_ms for session in sessions)
    life = _Life(sessions[0], node, zone, ready_by)
    over_ms = 0
    for number, session in enumerate(sessions):
        life.session(session)
        if number + 1 < len(sessions):
            life.drive(sessions[number + 1])
        over_ms += session.plug_out_ms - session.plug_in_ms
        if tell is not None:
            tell(over_ms / plugged_ms)
    return life.year(user, sessions[-1].plug_out_ms)


class _Local:
    """Local time: its offset from UTC, and the times at which the owner wants the car."""

    def __init__(self, zone: ZoneInfo, ready_by: ReadyBy | None) -> None:
        self._zone = zone
        self._ready_by = ready_by
        self._offsets: dict[int, int] = {}

    def offset_min(self, now_ms: int) -> int:
        """Minutes ahead of UTC. Clocks change at a full hour."""
        hour = now_ms // HOUR_MS
        found = self._offsets.get(hour)
        if found is None:
            offset = datetime.fromtimestamp(hour * 3600, tz=self._zone).utcoffset() or timedelta()
            found = self._offsets[hour] = int(offset.total_seconds()) // 60
        return found

    def next_ready_ms(self, now_ms: int) -> int:
        """The next moment, after this one, at which the owner wants the car."""
        wish = self._ready_by
        if wish is not None:
            today = datetime.fromtimestamp(now_ms / 1000, tz=self._zone).date()
            for number in range(9):
                day = today + timedelta(days=number)
                hour, minute = divmod(wish.minute, 60)
                at = datetime(day.year, day.month, day.day, hour, minute, tzinfo=self._zone)
                at_ms = int(at.timestamp() * 1000)
                if at_ms > now_ms and wish.weekdays >> day.weekday() & 1:
                    return at_ms
        return 1 << 62


class _Life:
    """Two cars, one guard, the books, and a witness."""

    def __init__(self, first: Session, node: Node, zone: ZoneInfo, ready_by: ReadyBy | None) -> None:
        self._node = node
        self._zone = zone
        self._local = _Local(zone, ready_by)
        self._begin_ms = first.plug_in_ms
        charger_w = first.charger_w or USUAL_CHARGER_W
        self._spec = CarSpec(
            soc_pct=50.0,
            charge_limit_pct=LIMIT_PCT,
            capacity_wh=first.capacity_wh or USUAL_CAPACITY_WH,
            charger_ac_w=charger_w,
            circuit_w=max(CarSpec().circuit_w, charger_w),
            battery_accepts_w=charger_w,
            plugged=False,
            awake_w=node.awake_w,
            driving_speedup=1.0,
            regions=(),  # no work here is bound to a region
        )
        self._drawn_w = 0.0
        self._ours = SimulatedCar(self._spec, first.plug_in_ms - HOUR_MS, drawn_w=lambda: self._drawn_w)
        self._other = SimulatedCar(self._spec, first.plug_in_ms - HOUR_MS)
        self._cars = (self._ours, self._other)
        self._policy = Policy(
            watts_w=node.watts_w,
            min_watts_w=max(10, node.watts_w // 2),  # less than half is not worth the overhead
            floor_pct=FLOOR_PCT,
            blind_ms=10 * MINUTE_MS,
            network=NetworkClass.UNMETERED,
        )
        self._consent = ConsentView(
            refusal=None,
            expires_ms=1 << 53,
            max_watts_w=node.watts_w,
            floor_pct=FLOOR_PCT,
            schedule=() if ready_by is None else (ready_by,),
        )
        self._history = History()
        self._book = BudgetBook()
        self._added = 0
        self._used_at = (-1, 0)
        self._used_now = Used()
        self._energy = node.energy()
        self._meter = EnergyMeter(self._energy, max_gap_ms=10 * MINUTE_MS)
        self._junction = JunctionHours()
        self._second_look = SecondLook()
        self._money = SessionBook(node.prices)
        promises = msgspec.structs.replace(node.promises(), circuit_w=self._spec.circuit_w)
        self._witness = Witness(promises, self._ours, self._other)
        self._cycles = (Rainflow(), Rainflow())
        self._seen_w: float | None = None  # the power of the latest work: its speed is known
        self._battery_mws = 0
        self._working_since_ms: int | None = None
        self._departures: list[Departure] = []
        self._moments: list[Moment] = []
        self._why_ms: dict[str, int] = {}
        self._grid = [[0] * 24 for _ in range(7)]
        self._marks = [(0, 0, Statement())]  # at the beginning of each week: time plugged in, at work, and money so far
        self._gap_wh = 0.0
        self._worked_ms = self._plugged_ms = self._looks = 0
        self._tokens = self._pay = 0.0

    # -- the owner's life ----------------------------------------------------------------------------------------------

    def session(self, session: Session) -> None:
        """Plugged in from the beginning to the owner's return."""
        worked_ms = self._worked_ms
        self._arrive(session)
        arrived_pct = self._ours.soc_pct
        now_ms = session.plug_in_ms
        leave_ms = max(now_ms + MINUTE_MS, session.plug_out_ms - LEAVE_MS)
        ready_ms = self._local.next_ready_ms(now_ms)
        while now_ms < leave_ms:
            verdict = self._look(now_ms)
            next_ms = min(now_ms + LOOK_MS, leave_ms, ready_ms)
            self._pass(verdict, now_ms, next_ms)
            now_ms = next_ms
            if now_ms == ready_ms:
                with_pct, without_pct = self._witness.charge(now_ms, "a ready-by time")
                self._moments.append(Moment(at_ms=now_ms, with_pct=with_pct, without_pct=without_pct))
                ready_ms = self._local.next_ready_ms(now_ms)
        for car in self._cars:
            car.do(Action.OPEN_DOOR, now_ms)
        self._look(now_ms)
        self._drawn_w = 0.0
        with_pct, without_pct = self._witness.charge(now_ms, "a departure")
        self._departures.append(
            Departure(
                at_ms=now_ms,
                arrived_pct=arrived_pct,
                with_pct=with_pct,
                without_pct=without_pct,
                plugged_ms=now_ms - session.plug_in_ms,
                worked_ms=self._worked_ms - worked_ms,
            )
        )
        self._gap_wh = self._other.energy_wh - self._ours.energy_wh
        gone_ms = now_ms + LEAVE_MS
        for car in self._cars:
            car.do(Action.DRIVE_OFF, now_ms)
            car.advance(gone_ms)
        self._look(gone_ms)
        self._working_since_ms = None

    def _arrive(self, session: Session) -> None:
        """Both come home from the same drive, and are plugged in. What one had less before, it still has less."""
        at_ms = session.plug_in_ms
        start_pct = session.soc_start_pct
        if start_pct is None:
            start_pct = LIMIT_PCT - session.energy_kwh * 1000 / self._spec.capacity_wh * 100
        start_wh = min(LIMIT_PCT, max(8.0, start_pct)) / 100 * self._spec.capacity_wh
        for car, wear in zip(self._cars, self._cycles, strict=True):
            car.advance(at_ms - 5_000, AWAY_STEP_S)
            if car.away:
                car.do(Action.COME_BACK, at_ms - 5_000)
            car.advance(at_ms)
            car.energy_wh = start_wh - (self._gap_wh if car is self._ours else 0.0)
            car.do(Action.PLUG_IN, at_ms)
            wear.add(car.soc_pct)

    def drive(self, after: Session) -> None:
        """On the road until the next plug-in; the drive itself is told by the charge with which it ends."""
        for car in self._cars:
            car.advance(after.plug_in_ms - MINUTE_MS, AWAY_STEP_S)
        self._meter.advance(after.plug_in_ms, 0.0, awake_for_us=False, grid_fed=False, measured=False)

    # -- a minute ------------------------------------------------------------------------------------------------------

    def _look(self, now_ms: int) -> Verdict:
        """One look of the guard, as in a car; the witness is told of every permit."""
        node = self._node
        offset_min, next_min = self._local.offset_min(now_ms), self._local.offset_min(now_ms + DAY_MS)
        if (offset_min, next_min) != (self._policy.utc_offset_min, self._policy.utc_offset_next_min):
            self._policy = msgspec.structs.replace(
                self._policy, utc_offset_min=offset_min, utc_offset_next_min=next_min
            )
        signals = self._ours.read(now_ms)
        seen_w = self._seen_w
        price = node.tariff.at(now_ms, offset_min)
        net = self._second_look.net_for_guard(
            now_ms,
            rates=node.rates,
            speed=None if seen_w is None else node.speed(seen_w),
            power=None if seen_w is None else self._energy.power(seen_w, awake_for_us=True, grid_fed=True),
            tariff_micro_kwh=price,
            wear=Wear(prices=node.prices, junction_ppm=weight_ppm(self._ours.computer_c)),
            working=self._drawn_w > 0,
        )
        budgets = Budgets(used=self._used(now_ms), net_micro_h=net)
        verdict, self._history = decide(self._policy, self._consent, signals, budgets, self._history, now_ms)
        self._looks += 1
        if isinstance(verdict, Permit):
            self._witness.permitted(now_ms, verdict.watts_w, price / 1e6)
        return verdict

    def _used(self, now_ms: int) -> Used:
        """What the book of budgets says: it changes with what is added, and as whole hours leave its windows."""
        now = (now_ms // HOUR_MS, self._added)
        if now != self._used_at:
            self._used_at, self._used_now = now, self._book.used(now_ms)
        return self._used_now

    def _pass(self, verdict: Verdict, now_ms: int, next_ms: int) -> None:
        """Let the time until the next look pass, at work or not."""
        for_ms = next_ms - now_ms
        self._turn_weeks(now_ms)
        self._plugged_ms += for_ms
        watts_w = verdict.watts_w if isinstance(verdict, Permit) else 0
        self._drawn_w = float(watts_w)
        for car, wear in zip(self._cars, self._cycles, strict=True):
            car.advance(next_ms, 60.0)
            wear.add(car.soc_pct)
        grid_fed = self._ours.battery_power_w >= -1.0
        energy = self._meter.advance(
            next_ms, self._drawn_w, awake_for_us=watts_w > 0, grid_fed=grid_fed, measured=False
        )
        if isinstance(verdict, Permit):
            self._work(watts_w, now_ms, for_ms)
            self._money.drew(energy, self._node.tariff.at(now_ms, self._local.offset_min(now_ms)))
            self._through_battery(energy.battery_mws, next_ms)
        else:
            self._working_since_ms = None
            why = verdict[0].code.value
            self._why_ms[why] = self._why_ms.get(why, 0) + for_ms
        self._witness.passed(next_ms, for_ms, working=watts_w > 0)

    def _work(self, watts_w: int, now_ms: int, for_ms: int) -> None:
        node = self._node
        self._seen_w = float(watts_w)
        if self._working_since_ms is None:
            self._working_since_ms = now_ms + node.load_ms
        useful_ms = min(for_ms, max(0, now_ms + for_ms - self._working_since_ms))
        tokens = node.speed(watts_w).output_tokens_s * useful_ms / 1000
        paid_before = int(self._pay)
        paid = node.input_per_output * node.rates.input_micro + node.rates.output_micro
        self._pay += tokens * paid / 1_000_000
        self._tokens += tokens
        self._money.earned(int(self._pay) - paid_before)
        weighted_ms = self._junction.add(for_ms, self._ours.computer_c)
        self._added += 1
        self._book.add(now_ms + for_ms, compute_ms=for_ms, weighted_ms=weighted_ms)
        self._money.wore(compute_ms=for_ms, weighted_ms=weighted_ms)
        self._worked_ms += for_ms
        local_ms = now_ms + self._local.offset_min(now_ms) * MINUTE_MS
        self._grid[(local_ms // DAY_MS + 3) % 7][local_ms % DAY_MS // HOUR_MS] += for_ms

    def _through_battery(self, battery_mws: int, now_ms: int) -> None:
        self._battery_mws += battery_mws
        if self._battery_mws >= 3_600:
            self._added += 1
            self._book.add(now_ms, battery_mwh=self._battery_mws // 3_600)
            self._battery_mws %= 3_600

    def _turn_weeks(self, now_ms: int) -> None:
        week = (now_ms - self._begin_ms) // WEEK_MS
        if len(self._marks) <= week:
            mark = (self._plugged_ms, self._worked_ms, self._money.statement())
            self._marks.extend([mark] * (week + 1 - len(self._marks)))

    # -- the end -------------------------------------------------------------------------------------------------------

    def year(self, user: str, to_ms: int) -> Year:
        """Everything that was seen."""
        statement = self._money.statement()
        with_us_wh, without_us_wh = self._ours.grid_wh, self._other.grid_wh
        # What is missing in the battery at the end was not drawn at the socket, but will be.
        cars_wh = with_us_wh - without_us_wh + self._gap_wh / (1 - physics.CHARGER_SHARE)
        # Awake for us, our car also fills its 12 V battery, which the other one does at other times.
        standby_wh = physics.STANDBY_W * self._plugged_ms / HOUR_MS / physics.DCDC_SHARE / (1 - physics.CHARGER_SHARE)
        self._witness.energy(to_ms, statement.grid_mws / 3_600_000, cars_wh, standby_wh)
        with_us, without_us = (wear.cycles().equivalent_full for wear in self._cycles)
        return Year(
            user=user,
            zone=self._zone.key,
            from_ms=self._begin_ms,
            to_ms=to_ms,
            capacity_wh=self._spec.capacity_wh,
            charger_w=self._spec.charger_ac_w,
            departures=self._departures,
            ready_by=self._moments,
            worked_ms=self._worked_ms,
            plugged_ms=self._plugged_ms,
            why_ms=dict(sorted(self._why_ms.items(), key=lambda item: (-item[1], item[0]))),
            worked_by_hour_ms=self._grid,
            budget_h_week=self._policy.budgets.tightest(self._consent.limits).compute_h_week,
            weeks=self._weeks(statement),
            statement=statement,
            computer_wh=self._meter.total.computer_mws / 3_600_000,
            with_us_wh=with_us_wh,
            without_us_wh=without_us_wh,
            cars_wh=cars_wh,
            with_us_cycles=with_us,
            without_us_cycles=without_us,
            tokens=int(self._tokens),
            violations=self._witness.counts,
            examples=self._witness.examples,
            looks=self._looks,
            permits_checked=self._witness.checks,
            least_any_pct=self._witness.least_pct,
        )

    def _weeks(self, statement: Statement) -> list[Week]:
        marks = [*self._marks, (self._plugged_ms, self._worked_ms, statement)]
        return [
            Week(
                plugged_ms=now[0] - then[0],
                worked_ms=now[1] - then[1],
                pay_micro=now[2].pay_micro - then[2].pay_micro,
                electricity_micro=now[2].electricity_micro - then[2].electricity_micro,
                wear_micro=now[2].wear_micro - then[2].wear_micro,
            )
            for then, now in pairwise(marks)
        ]


def local_time(zone: str, at_ms: int) -> str:
    """A moment as the owner would write it."""
    return datetime.fromtimestamp(at_ms / 1000, tz=ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M")
