"""The vehicle's accounts: what counts as computing, what it costs, and what outlives the agent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from motorpool.agent.accounts import ACCOUNTS_NAME, SAVE_MS, Accounts, AccountsConfig
from motorpool.agent.power.meter import PowerMeter
from motorpool.agent.power.model import declared
from motorpool.agent.signals.source import AlwaysParked
from motorpool.core.budgets import Used
from motorpool.core.economics import Tariff
from motorpool.core.energy import EnergyModel
from motorpool.core.guard import History
from motorpool.types import Kind, Usage
from motorpool.wire import Answered, Grant, ResultItem, Results, Statement

START_MS = 1_790_000_000_000
LOSSLESS = EnergyModel(dcdc_bp=10_000, awake_w=50.0, charger_on_w=0.0, charger_bp=10_000)
MODEL = declared(node_idle_w=10.0, node_max_w=110.0, cores=2)  # 50 W a core


def accounts(folder: Path, **config: object) -> Accounts:
    settings = msgspec.structs.replace(AccountsConfig(energy=LOSSLESS), **config)
    return Accounts(folder, settings, PowerMeter(MODEL))


class Drive:
    """Looks four times a second; the engine uses one core while it computes."""

    def __init__(self, of: Accounts) -> None:
        self.of = of
        self.now_ms = START_MS
        self.cpu_ms = 0
        self.run(0)

    def run(self, for_ms: int, *, engine_on: bool = True, computing: bool = True, grid_fed: bool = True) -> None:
        for _ in range(max(1, for_ms // 250)):
            passed_ms = 250 if for_ms else 0
            self.now_ms += passed_ms
            self.cpu_ms += passed_ms if computing else 0
            self.of.advance(
                self.now_ms,
                AlwaysParked().read(self.now_ms),
                engine_on=engine_on,
                computing=computing,
                grid_fed=grid_fed,
                cpu_ms=self.cpu_ms,
            )


def test_energy_is_the_whole_vehicles_increment_while_the_engine_is_on(tmp_path: Path) -> None:
    drive = Drive(accounts(tmp_path))
    drive.run(3_600_000)
    assert drive.of.drawn_mws == pytest.approx((50 + 50) * 3_600_000, rel=1e-6)
    drive.run(3_600_000, computing=False)  # ready, and the car awake for us
    assert drive.of.drawn_mws == pytest.approx((150) * 3_600_000, rel=1e-6)
    drive.run(3_600_000, engine_on=False, computing=False)
    assert drive.of.drawn_mws == pytest.approx((150) * 3_600_000, rel=1e-6)
    assert not drive.of.is_measured


def test_only_computing_uses_up_the_hours_and_the_battery_only_when_it_feeds(tmp_path: Path) -> None:
    drive = Drive(accounts(tmp_path))
    drive.run(1_800_000)
    drive.run(1_800_000, computing=False)
    used = drive.of.used
    assert used.compute_ms == 1_800_000
    assert 0 < used.weighted_ms < used.compute_ms, "at 40 Celsius an hour wears less than one at 85"
    assert used.battery_mwh == 0
    drive.run(3_600_000, grid_fed=False)
    assert drive.of.used.battery_mwh >= 100_000


GRANT = Grant(
    lease_id="l1",
    incarnation="i",
    job_id="j",
    kind=Kind.CHAT,
    model="m",
    ttl_ms=1,
    items=[],
    pay_input_micro=1_000_000,
    pay_output_micro=4_000_000,
    customer_class="batch documents",
)


def results(completion: int, carried: int = 0, energy_mwh: int = 0) -> Results:
    item = ResultItem(
        line=0, status=200, body=b"", prompt_tokens=10, completion_tokens=completion, carried_tokens=carried
    )
    return Results(incarnation="i", message_id="m", lease_id="l1", job_id="j", items=[item], energy_mwh=energy_mwh)


def test_a_delivery_says_what_was_earned_and_what_the_electricity_cost(tmp_path: Path) -> None:
    mine = accounts(tmp_path, tariff=Tariff.flat(250_000))
    mine.granted(GRANT)
    delivery = mine.delivered(results(100, carried=60, energy_mwh=4_000), START_MS, 0)
    assert delivery is not None
    assert (delivery.customer_class, delivery.lines, delivery.tokens) == ("batch documents", 1, 40)
    assert delivery.earned_micro == 10 * 1 + 40 * 4
    assert delivery.electricity_micro == 1_000  # 4 Wh at a quarter for a kilowatt-hour
    unknown = accounts(tmp_path / "other")
    assert (unknown.delivered(results(1), START_MS, 0) or delivery).electricity_micro is None


def test_an_error_and_a_part_of_a_stream_settle_nothing(tmp_path: Path) -> None:
    mine = accounts(tmp_path)
    failed = Answered(request_id="r", attempt=0, status=400, body=b"", usage=Usage(prompt_tokens=3))
    assert mine.delivered(failed, START_MS, 0) is None
    assert mine.delivered(msgspec.structs.replace(failed, status=200), START_MS, 0) is not None


@pytest.mark.parametrize(("pay_micro", "worth_it"), [(10_000_000, True), (1_000, False)])
def test_the_net_is_projected_from_pay_measured_speed_and_power(tmp_path: Path, pay_micro: int, worth_it: bool) -> None:
    mine = accounts(tmp_path, tariff=Tariff.flat(300_000))
    mine.granted(msgspec.structs.replace(GRANT, pay_output_micro=pay_micro, pay_input_micro=0))
    drive = Drive(mine)

    def net() -> int | None:
        signals = AlwaysParked().read(drive.now_ms)
        return mine.budgets(drive.now_ms, signals, working=True, grid_fed=True, utc_offset_min=0).net_micro_h

    assert net() is None, "no speed is known yet"
    for _ in range(60):
        drive.run(1_000)
        mine.delivered(results(20), drive.now_ms, 0)
    found = net()
    assert found is not None
    # 20 tokens a second; 100 W at 0.30 are 30,000 millionths an hour
    assert found == pytest.approx(20 * 3600 * pay_micro / 1e6 - 30_000, rel=0.1)
    assert (found >= 0) == worth_it


def test_what_must_not_be_forgotten_outlives_the_agent(tmp_path: Path) -> None:
    first = accounts(tmp_path)
    Drive(first).run(60_000)
    first.granted(GRANT)
    first.wrote(500, START_MS)
    first.remember(History(suspended_ms=START_MS, unfed_times=2, unfed_until_ms=START_MS + 5))
    first.close()
    again = accounts(tmp_path)
    assert again.history == History(suspended_ms=START_MS, unfed_times=2, unfed_until_ms=START_MS + 5)
    again.advance(START_MS, AlwaysParked().read(START_MS), engine_on=False, computing=False, grid_fed=True, cpu_ms=0)
    assert again.used.compute_ms == 60_000
    assert again.used.flash_bytes == 500


def test_it_is_written_seldom_but_at_once_when_somebody_else_had_the_car(tmp_path: Path) -> None:
    mine = accounts(tmp_path)
    path = tmp_path / ACCOUNTS_NAME

    async def keep() -> None:
        drive = Drive(mine)
        await mine.keep(drive.now_ms)
        first = path.read_bytes()
        drive.run(1_000)
        await mine.keep(drive.now_ms)
        assert path.read_bytes() == first
        mine.remember(History(suspended_ms=drive.now_ms))
        await mine.keep(drive.now_ms)
        assert path.read_bytes() != first
        second = path.read_bytes()
        drive.run(SAVE_MS)
        await mine.keep(drive.now_ms)
        assert path.read_bytes() != second

    asyncio.run(keep())
    assert mine.used.flash_bytes > 0, "its own writing counts"


def used(of: Accounts) -> Used:
    signals = AlwaysParked().read(START_MS)
    return of.budgets(START_MS + 60_000, signals, working=False, grid_fed=True, utc_offset_min=0).used


def test_a_damaged_file_falls_back_to_the_one_before_and_two_of_them_to_unknown(tmp_path: Path) -> None:
    first = accounts(tmp_path)
    Drive(first).run(60_000)
    first.close()
    first.close()
    path = tmp_path / ACCOUNTS_NAME
    path.write_bytes(b"{")
    assert used(accounts(tmp_path)).compute_ms == 60_000
    path.with_name(path.name + ".old").write_bytes(b"nothing")
    lost = accounts(tmp_path)
    assert used(lost).unknown
    lost.close()
    assert path.read_bytes() == b"{", "what somebody may still want to look at stays"
    assert not used(accounts(tmp_path / "new")).unknown


def test_of_two_statements_the_later_one_holds(tmp_path: Path) -> None:
    mine = accounts(tmp_path)
    mine.stated(Statement(as_of_ms=2, earned_micro=20))
    mine.stated(Statement(as_of_ms=1, earned_micro=10))
    assert mine.statement is not None
    assert mine.statement.earned_micro == 20
