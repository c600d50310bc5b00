"""The accounts of one vehicle: energy, budgets, speed, pay and net; and what the guard has to remember over a restart.

Decides: which stretch of time counts as computing, and what of it goes to which account. Must not: judge
(``core.guard`` does, from ``budgets``), read a clock, or keep anything that names a job, a customer or a place.
Called by: ``agent.loop``, at each look of the guard and with each message that carries or settles work.

``accounts.json`` is written every few minutes and at the end, in one piece, with the version before it as
``accounts.json.old``. If neither can be read, nobody knows what was used up, and the guard is told so: the owner or a
workshop deletes both files to begin anew.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

import msgspec

from motorpool.agent.power.meter import Draw, PowerMeter
from motorpool.core.budgets import BudgetBook, Used
from motorpool.core.economics import UNKNOWN_TARIFF_MICRO_KWH, PayRates, SecondLook, Speed, Tariff, Wear
from motorpool.core.energy import EnergyMeter, EnergyModel, Increment
from motorpool.core.guard import Budgets, History
from motorpool.core.signals import Signals, value_of
from motorpool.core.wear import JunctionHours, WearPrices, weight_ppm
from motorpool.errors import MotorpoolError
from motorpool.trust.credentials import write_secret
from motorpool.wire import Answered, Grant, Open, Results, Statement, Tokens

ACCOUNTS_NAME: Final = "accounts.json"
OLD_SUFFIX: Final = ".old"
SAVE_MS: Final = 300_000  # three kilobytes every five minutes: less than a megabyte a day
MAX_FILE_BYTES: Final = 256 * 1024
MAX_LEASES: Final = 4_096
SPEED_HALF_MS: Final = 600_000  # of working time
SPEED_KNOWN_MS: Final = 30_000
TOKENS_PER_PRICE: Final = 1_000_000
log = logging.getLogger(__name__)


class AccountsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How energy and money are counted. ``awake_for_us``: a parked car without us would sleep.

    ``tariff`` None: the owner has told no price of electricity, and a dear one is assumed for the net.
    """

    energy: EnergyModel = EnergyModel()
    prices: WearPrices = WearPrices()
    tariff: Tariff | None = None
    awake_for_us: bool = True


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """What one message delivered, for the owner's log: for which class of customer, never for whom or what."""

    customer_class: str
    lines: int
    tokens: int
    energy_mwh: int
    measured: bool
    earned_micro: int
    electricity_micro: int | None
    wear_micro: int | None


class _Terms(msgspec.Struct, frozen=True):
    """What a lease or a live request pays, and the class of customer that the owner is told."""

    customer_class: str
    input_micro: int
    output_micro: int


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """The file."""

    v: int = 1
    book: msgspec.Raw
    suspended_ms: int | None = None
    fault_until_ms: int | None = None
    unfed_until_ms: int | None = None
    unfed_times: int = 0
    rates: PayRates | None = None
    speed: tuple[float, float, float] = (0.0, 0.0, 0.0)
    statement: Statement | None = None
    probes: tuple[tuple[int, int], ...] = ()


_decoder = msgspec.json.Decoder(_Kept)


class Accounts:
    """One vehicle's accounts. The first call of ``advance`` starts their time."""

    def __init__(self, folder: Path, config: AccountsConfig, meter: PowerMeter) -> None:
        self._path = folder / ACCOUNTS_NAME
        self._config = config
        self._meter = meter
        self._energy = EnergyMeter(config.energy)
        self._junction = JunctionHours()
        self._last_ms: int | None = None
        self._battery_mws = 0  # through the battery, not yet a whole milliwatt-hour
        self._worn: dict[str, int] = {}  # all wear since the agent began, as ``WearPrices.cost_micro`` names it
        self._worn_told_micro = 0
        self._watts_w = 0.0  # of the computer, lately and at work
        self._terms: dict[str, _Terms] = {}
        self._second_look = SecondLook()
        self._rates: PayRates | None = None
        self._unpaid = 0  # of what was delivered: millionths of a millionth that are no whole millionth yet
        self._speed = (0.0, 0.0, 0.0)  # input tokens, output tokens, working milliseconds; older ones count less
        self._unknown = False
        self._book = BudgetBook()
        self._kept_history: tuple[int | None, ...] = ()
        self._saved_ms: int | None = None
        self._writing = False
        self.statement: Statement | None = None
        self.is_measured = False
        self.history = History()
        self._load()

    # -- each look of the guard ----------------------------------------------------------------------------------------

    def advance(
        self,
        now_ms: int,
        signals: Signals,
        *,
        engine_on: bool,
        computing: bool,
        grid_fed: bool,
        cpu_ms: int,
    ) -> Increment:
        """Count the stretch since the last call. ``engine_on``: the car is awake for us; ``computing``: it works."""
        passed_ms = 0 if self._last_ms is None else max(0, now_ms - self._last_ms)
        self._last_ms = now_ms
        draw = self._meter.read(now_ms, cpu_ms=cpu_ms, computer_power=signals.computer_power_w)
        if not engine_on:
            self._energy.advance(now_ms, 0.0, awake_for_us=False, grid_fed=grid_fed, measured=draw.measured)
            return Increment()
        energy = self._energy.advance(
            now_ms, draw.watts_w, awake_for_us=self._config.awake_for_us, grid_fed=grid_fed, measured=draw.measured
        )
        self.is_measured = draw.measured
        if computing:
            self._worked(now_ms, min(passed_ms, 60_000), signals, draw)
        self._wear(battery_mws=energy.battery_mws)
        self._battery_mws += energy.battery_mws
        if self._battery_mws >= 3_600:
            self._book.add(now_ms, battery_mwh=self._battery_mws // 3_600)
            self._battery_mws %= 3_600
        return energy

    def _worked(self, now_ms: int, passed_ms: int, signals: Signals, draw: Draw) -> None:
        temp_c = value_of("computer_temp_c", signals.computer_temp_c, now_ms)
        weighted_ms = self._junction.add(passed_ms, temp_c)
        self._book.add(now_ms, compute_ms=passed_ms, weighted_ms=weighted_ms)
        self._wear(compute_ms=passed_ms, weighted_ms=weighted_ms)
        self._watts_w += (draw.watts_w - self._watts_w) * min(1.0, passed_ms / 10_000)
        input_tokens, output_tokens, busy_ms = self._speed
        keep = 0.5 ** (passed_ms / SPEED_HALF_MS)
        self._speed = (input_tokens * keep, output_tokens * keep, busy_ms * keep + passed_ms)

    def _wear(self, **more: int) -> None:
        for name, amount in more.items():
            self._worn[name] = self._worn.get(name, 0) + amount

    def _wear_untold_micro(self) -> int:
        """What wear has cost since the last delivery: work that brought none is part of the next."""
        worn = {"battery_mws": 0, "compute_ms": 0, "weighted_ms": 0, "flash_bytes": 0, **self._worn}
        cost_micro = self._config.prices.cost_micro(**worn)
        untold, self._worn_told_micro = cost_micro - self._worn_told_micro, cost_micro
        return untold

    @property
    def drawn_mws(self) -> int:
        """What the whole vehicle has drawn at the socket for us, in milliwatt-seconds, since the agent began."""
        return self._energy.total.grid_mws

    def budgets(self, now_ms: int, signals: Signals, *, working: bool, grid_fed: bool, utc_offset_min: int) -> Budgets:
        """What the guard has to know."""
        if self._unknown:
            return Budgets(used=Used(unknown=True))
        config = self._config
        power = config.energy.power(self._watts_w, awake_for_us=config.awake_for_us, grid_fed=grid_fed)
        temp_c = value_of("computer_temp_c", signals.computer_temp_c, now_ms)
        net = self._second_look.net_for_guard(
            now_ms,
            rates=self._rates,
            speed=self._known_speed(),
            power=power,
            tariff_micro_kwh=self._tariff_micro_kwh(now_ms, utc_offset_min),
            wear=Wear(prices=config.prices, junction_ppm=weight_ppm(temp_c)),
            working=working,
        )
        return Budgets(used=self._book.used(now_ms), net_micro_h=net)

    def _tariff_micro_kwh(self, now_ms: int, utc_offset_min: int) -> int:
        tariff = self._config.tariff
        return UNKNOWN_TARIFF_MICRO_KWH if tariff is None else tariff.at(now_ms, utc_offset_min)

    def _known_speed(self) -> Speed | None:
        input_tokens, output_tokens, busy_ms = self._speed
        if busy_ms < SPEED_KNOWN_MS:
            return None
        return Speed(input_tokens_s=input_tokens / busy_ms * 1000, output_tokens_s=output_tokens / busy_ms * 1000)

    def remember(self, history: History) -> None:
        """Take the guard's memory; what has to outlive this process goes to the disk soon."""
        self.history = history

    def wrote(self, count: int, now_ms: int) -> None:
        """Bytes were written to the flash memory."""
        self._book.add(now_ms, flash_bytes=count)
        self._wear(flash_bytes=count)

    def sent_metered(self, count: int, now_ms: int) -> None:
        """Bytes went over a network that costs money."""
        self._book.add(now_ms, metered_bytes=count)

    @property
    def used(self) -> Used:
        """What was used in the windows that end at the latest look."""
        return self._book.used(self._last_ms or 0)

    # -- work and pay --------------------------------------------------------------------------------------------------

    def granted(self, message: Grant | Open) -> None:
        """Remember what this work pays."""
        key = message.lease_id if isinstance(message, Grant) else message.request_id
        terms = _Terms(message.customer_class, message.pay_input_micro, message.pay_output_micro)
        self._terms.pop(key, None)
        self._terms[key] = terms
        while len(self._terms) > MAX_LEASES:
            del self._terms[next(iter(self._terms))]
        if terms.input_micro or terms.output_micro:
            self._rates = PayRates(input_micro=terms.input_micro, output_micro=terms.output_micro)

    def delivered(self, message: Results | Tokens | Answered, now_ms: int, utc_offset_min: int) -> Delivery | None:
        """Settle what a message delivers: None for one that brings no answer to its end."""
        if isinstance(message, Results):
            prompt = sum(item.prompt_tokens for item in message.items)
            new = sum(max(0, item.completion_tokens - item.carried_tokens) for item in message.items)
            lines, key, energy_mwh = len(message.items), message.lease_id, message.energy_mwh
            measured = message.energy_is_measured
        else:
            usage = message.usage
            if usage is None or (isinstance(message, Answered) and message.status >= 400):
                return None
            prompt, new = usage.prompt_tokens, max(0, usage.completion_tokens - usage.carried_tokens)
            lines, key, energy_mwh = 1, message.request_id, usage.energy_uwh // 1000
            measured = usage.energy_is_measured
        terms = self._terms.get(key) or _Terms("", 0, 0)
        self._speed = (self._speed[0] + prompt, self._speed[1] + new, self._speed[2])
        price = self._tariff_micro_kwh(now_ms, utc_offset_min)
        pay = self._unpaid + prompt * terms.input_micro + new * terms.output_micro
        earned_micro, self._unpaid = divmod(pay, TOKENS_PER_PRICE)
        return Delivery(
            customer_class=terms.customer_class,
            lines=lines,
            tokens=new,
            energy_mwh=energy_mwh,
            measured=measured,
            earned_micro=earned_micro,
            electricity_micro=None if self._config.tariff is None else -(-energy_mwh * price // 1_000_000),
            wear_micro=self._wear_untold_micro(),
        )

    def stated(self, statement: Statement) -> None:
        """The cell says what was earned in all; of two statements the later one holds."""
        if self.statement is None or statement.as_of_ms > self.statement.as_of_ms:
            self.statement = statement

    # -- the disk ------------------------------------------------------------------------------------------------------

    async def keep(self, now_ms: int) -> None:
        """Write if the last time is long ago, or if the guard has learnt something that must not be forgotten."""
        urgent = self._lasting() != self._kept_history
        due = self._saved_ms is None or not 0 <= now_ms - self._saved_ms < SAVE_MS
        if self._unknown or self._writing or not (urgent or due):
            return
        self._writing = True
        data = self._dump()
        self._saved_ms, self._kept_history = now_ms, self._lasting()
        try:
            await asyncio.to_thread(self._write, data)
        finally:
            self._writing = False
        self.wrote(len(data), now_ms)

    def close(self) -> None:
        """Write, for the next start."""
        if not self._unknown and self._last_ms is not None:
            self._write(self._dump())

    def _lasting(self) -> tuple[int | None, ...]:
        history = self.history
        return history.suspended_ms, history.unfed_times, history.fault_until_ms and history.fault_until_ms // 60_000

    def _dump(self) -> bytes:
        history = self.history
        kept = _Kept(
            book=msgspec.Raw(self._book.dump()),
            suspended_ms=history.suspended_ms,
            fault_until_ms=history.fault_until_ms,
            unfed_until_ms=history.unfed_until_ms,
            unfed_times=history.unfed_times,
            rates=self._rates,
            speed=self._speed,
            statement=self.statement,
            probes=self._second_look.stretches,
        )
        return msgspec.json.encode(kept)

    def _write(self, data: bytes) -> None:
        try:
            if self._path.exists():
                self._path.replace(self._old)
            write_secret(self._path, data)
        except OSError as error:
            log.warning("the accounts of this vehicle could not be kept: %s", error.strerror)

    @property
    def _old(self) -> Path:
        return self._path.with_name(ACCOUNTS_NAME + OLD_SUFFIX)

    def _load(self) -> None:
        there = [path for path in (self._path, self._old) if path.exists()]
        for path in there:
            try:
                with path.open("rb") as file:
                    kept = _decoder.decode(file.read(MAX_FILE_BYTES))  # a longer one ends in the middle
                self._book = BudgetBook.load(bytes(kept.book))
            except (OSError, msgspec.DecodeError, MotorpoolError, UnicodeDecodeError, RecursionError):
                log.warning("%s cannot be read", path.name)
                continue
            self._rates, self.statement = kept.rates, kept.statement
            self._speed = kept.speed
            self._second_look = SecondLook(stretches=kept.probes)
            self.history = History(
                suspended_ms=kept.suspended_ms,
                fault_until_ms=kept.fault_until_ms,
                unfed_until_ms=kept.unfed_until_ms,
                unfed_times=kept.unfed_times,
            )
            self._kept_history = self._lasting()
            return
        self._unknown = bool(there)
