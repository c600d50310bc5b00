"""Watts: counters of the processor, the vehicle's signal, the model, and a permit's watts in threads and duty."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.agent.power.meter import PowerMeter, RaplGauge
from motorpool.agent.power.model import (
    MIN_DUTY,
    Burner,
    PowerModel,
    SignalGauge,
    Source,
    Timing,
    calibrate,
    declared,
    plan,
)
from motorpool.agent.power.rapl import Rapl
from motorpool.core.energy import Limits
from motorpool.core.signals import MAX_AGE_MS, Reading
from motorpool.errors import CallerError

RANGE_UJ = 262_143_328_850  # of a processor of today


class Counters:
    """A folder that looks like /sys/class/powercap, and the processor behind it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.zones: dict[str, Path] = {}
        self.values: dict[str, int] = {}

    def add(self, zone: str, name: str, *, value: int = 0, range_uj: int = RANGE_UJ) -> Counters:
        folder = self.root / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
        self.zones[zone] = folder / "energy_uj"
        self.set(zone, value)
        return self

    def set(self, zone: str, value: int) -> None:
        self.values[zone] = value
        self.zones[zone].write_text(f"{value}\n")

    def use(self, zone: str, joules: float, range_uj: int = RANGE_UJ) -> None:
        self.set(zone, (self.values[zone] + round(joules * 1e6)) % range_uj)


def laptop(tmp_path: Path) -> Counters:
    counters = Counters(tmp_path).add("intel-rapl:0", "package-0", value=5_000_000)
    counters.add("intel-rapl:0:0", "core").add("intel-rapl:0:1", "uncore").add("intel-rapl:0:2", "dram")
    return counters.add("intel-rapl:1", "psys").add("intel-rapl-mmio:0", "package-0")


# -- counters ----------------------------------------------------------------------------------------------------------


def test_packages_and_memory_are_counted_and_their_parts_are_not_counted_twice(tmp_path: Path) -> None:
    counters = laptop(tmp_path)
    rapl = Rapl(tmp_path)
    assert rapl.available
    assert rapl.read(1_000) is None  # the first look compares with nothing
    for zone, joules in (("0", 20), ("0:0", 15), ("0:1", 3), ("0:2", 4), ("1", 30)):
        counters.use(f"intel-rapl:{zone}", joules)
    counters.use("intel-rapl-mmio:0", 20)  # the same package, by another way
    assert rapl.read(3_000) == pytest.approx(12.0)  # (20 + 4) J in 2 s
    assert rapl.read(4_000) == 0.0


def test_a_counter_that_starts_again_loses_nothing(tmp_path: Path) -> None:
    counters = Counters(tmp_path).add("intel-rapl:0", "package-0", value=RANGE_UJ - 10_000_000)
    rapl = Rapl(tmp_path)
    rapl.read(0)
    counters.use("intel-rapl:0", 25)
    assert counters.values["intel-rapl:0"] < 25_000_000
    assert rapl.read(1_000) == pytest.approx(25.0)


@given(
    uses=st.lists(st.tuples(st.integers(1, 5_000), st.floats(0, 900)), max_size=30), value=st.integers(0, RANGE_UJ - 1)
)
def test_power_times_time_is_the_energy_whatever_the_counter_shows(
    tmp_path_factory: pytest.TempPathFactory, uses: list[tuple[int, float]], value: int
) -> None:
    root = tmp_path_factory.mktemp("rapl")
    counters = Counters(root).add("intel-rapl:0", "package-0", value=value)
    rapl = Rapl(root)
    rapl.read(0)
    now_ms = 0
    for passed_ms, watts_w in uses:
        now_ms += passed_ms
        counters.use("intel-rapl:0", watts_w * passed_ms / 1000)
        assert rapl.read(now_ms) == pytest.approx(watts_w, abs=0.01)


def test_a_counter_that_was_set_back_says_nothing(tmp_path: Path) -> None:
    counters = Counters(tmp_path).add("intel-rapl:0", "package-0", value=200_000_000)
    rapl = Rapl(tmp_path)
    rapl.read(0)
    counters.set("intel-rapl:0", 0)  # the computer slept
    assert rapl.read(1_000) is None
    counters.use("intel-rapl:0", 7)
    assert rapl.read(2_000) == pytest.approx(7.0)


def test_after_so_long_that_the_counter_may_have_gone_round_twice_nothing_is_known(tmp_path: Path) -> None:
    counters = Counters(tmp_path).add("intel-rapl:0", "package-0", range_uj=65_000_000_000)
    rapl = Rapl(tmp_path)
    rapl.read(0)
    counters.use("intel-rapl:0", 3, 65_000_000_000)
    assert rapl.read(70_000) is None
    counters.use("intel-rapl:0", 3, 65_000_000_000)
    assert rapl.read(71_000) == pytest.approx(3.0)
    assert rapl.read(70_500) is None  # a clock that went back


def test_two_looks_in_the_same_millisecond_lose_no_energy(tmp_path: Path) -> None:
    counters = Counters(tmp_path).add("intel-rapl:0", "package-0")
    rapl = Rapl(tmp_path)
    rapl.read(0)
    counters.use("intel-rapl:0", 5)
    assert rapl.read(0) is None
    assert rapl.read(1_000) == pytest.approx(5.0)


@pytest.mark.parametrize("damage", ["gone", "text", "negative"])
def test_one_counter_that_cannot_be_read_makes_the_whole_unknown(tmp_path: Path, damage: str) -> None:
    counters = laptop(tmp_path)
    rapl = Rapl(tmp_path)
    rapl.read(0)
    if damage == "gone":  # as for a user who may not read it
        counters.zones["intel-rapl:0:2"].unlink()
    else:
        counters.zones["intel-rapl:0:2"].write_text("nonsense" if damage == "text" else "-5")
    assert not rapl.available
    assert rapl.read(1_000) is None
    counters.set("intel-rapl:0:2", 0)
    assert rapl.read(2_000) is None  # there is nothing to compare with
    assert rapl.read(3_000) == 0.0


def test_a_computer_without_counters_has_none(tmp_path: Path) -> None:
    assert not Rapl(tmp_path / "nothing").available
    assert Rapl(tmp_path).read(0) is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert not Rapl(tmp_path).available


# -- plan --------------------------------------------------------------------------------------------------------------

MODELS = st.builds(
    PowerModel,
    idle_w=st.floats(0, 100),
    per_core_w=st.floats(0.05, 200),
    cores=st.integers(1, 128),
    source=st.sampled_from(Source),
)
WATTS = st.integers(0, 20_000) | st.floats(0, 20_000)
CORES = st.integers(1, 128)
SLOTS = st.integers(1, 64)


@given(MODELS, WATTS, CORES, SLOTS)
def test_what_is_expected_never_exceeds_the_permit(model: PowerModel, watts_w: float, cores: int, slots: int) -> None:
    limits = plan(model, watts_w, cores=cores, slots=slots)
    if limits is None:
        assert watts_w < 1 or MIN_DUTY * model.per_core_w > watts_w - 1 - 0.01 * model.per_core_w
        return
    assert 0 <= limits.expected_w <= limits.watts_w <= watts_w
    assert 1 <= limits.threads <= min(cores, model.cores)
    assert MIN_DUTY <= limits.duty <= 1.0
    assert 1 <= limits.slots <= slots
    # The expectation is what the same model says of the processor time that these settings allow.
    assert limits.expected_w == pytest.approx(model.draw_w(round(limits.threads * limits.duty * 1000), 1000))
    assert limits.duty == 1.0 or limits.threads == 1


@given(MODELS, WATTS, WATTS, CORES, SLOTS)
def test_more_watts_never_mean_less_work(
    model: PowerModel, one_w: float, other_w: float, cores: int, slots: int
) -> None:
    low = plan(model, min(one_w, other_w), cores=cores, slots=slots)
    high = plan(model, max(one_w, other_w), cores=cores, slots=slots)
    if low is None:
        return
    assert high is not None
    assert low.threads * low.duty <= high.threads * high.duty
    assert low.expected_w <= high.expected_w
    assert low.slots <= high.slots


@given(MODELS, st.integers(1, 20_000), CORES)
def test_no_thread_more_would_fit(model: PowerModel, watts_w: int, cores: int) -> None:
    limits = plan(model, watts_w, cores=cores, slots=4)
    if limits is not None and limits.duty == 1.0 and limits.threads < min(cores, model.cores):
        assert (limits.threads + 1) * model.per_core_w > watts_w


def test_threads_go_first_then_time_then_nothing() -> None:
    model = declared(node_idle_w=20.0, node_max_w=100.0, cores=8)  # 10 W for each core

    def settings(watts_w: float) -> tuple[int, float, int] | None:
        limits = plan(model, watts_w, cores=8, slots=8)
        return None if limits is None else (limits.threads, limits.duty, limits.slots)

    assert settings(500) == settings(80) == (8, 1.0, 8)
    assert settings(79) == (7, 1.0, 8)
    assert settings(10) == (1, 1.0, 8)
    assert settings(5) == (1, 0.5, 4)
    assert settings(1) == (1, 0.1, 1)
    assert settings(0) is None
    assert settings(float("nan")) is None
    dear = declared(node_idle_w=0.0, node_max_w=100.0, cores=1)
    assert plan(dear, 4, cores=1, slots=1) is None
    assert plan(dear, 5, cores=1, slots=1) == Limits(watts_w=5, threads=1, duty=0.05, slots=1, expected_w=5.0)


def test_memory_is_handed_through() -> None:
    limits = plan(declared(node_idle_w=1, node_max_w=9, cores=2), 8, cores=2, slots=2, memory_bytes=1 << 30)
    assert limits is not None
    assert limits.memory_bytes == 1 << 30


@pytest.mark.parametrize(
    ("idle_w", "max_w", "cores"), [(10, 10, 4), (-1, 10, 4), (1, float("nan"), 4), (1, float("inf"), 4), (1, 10, 0)]
)
def test_a_declaration_that_cannot_be_is_refused(idle_w: float, max_w: float, cores: int) -> None:
    with pytest.raises(CallerError):
        declared(node_idle_w=idle_w, node_max_w=max_w, cores=cores)


@given(MODELS, st.integers(0, 10**7), st.integers(0, 10**5))
def test_modelled_power_is_never_negative_and_no_more_than_all_cores(
    model: PowerModel, cpu_ms: int, wall_ms: int
) -> None:
    assert 0 <= model.draw_w(cpu_ms, wall_ms) <= model.per_core_w * model.cores


# -- calibration -------------------------------------------------------------------------------------------------------


class Computer:
    """A computer on a clock of its own: 20 W idle, 12 W for the first core and 8 W for each further one."""

    def __init__(self) -> None:
        self.now_ms = 50_000
        self.busy = 0
        self.used_uj = 0.0
        self.stopped_at_ms: list[int] = []
        self.allowed: Callable[[], bool] = lambda: True
        self.signal_every_ms = 1_000
        self.sees_work = True

    @property
    def watts_w(self) -> float:
        busy = self.busy if self.sees_work else 0
        return 20.0 + (12.0 + 8.0 * (busy - 1) if busy else 0.0)

    def sleep(self, seconds: float) -> None:
        passed_ms = max(1, round(seconds * 1000))
        self.used_uj += self.watts_w * passed_ms * 1000
        self.now_ms += passed_ms

    def clock(self) -> int:
        return self.now_ms

    def burst(self, threads: int) -> Computer:
        assert self.allowed()
        assert self.busy == 0
        self.busy = threads
        return self

    def stop(self) -> None:
        self.busy = 0
        self.stopped_at_ms.append(self.now_ms)

    def signal(self, now_ms: int) -> Reading[float] | None:
        at_ms = now_ms // self.signal_every_ms * self.signal_every_ms
        return Reading(value=self.watts_w, at_ms=at_ms) if now_ms - at_ms <= 5_000 else None

    def calibrate(self, gauges: list[SignalGauge | Energy], cores: int = 4) -> PowerModel | None:
        fallback = declared(node_idle_w=5.0, node_max_w=65.0, cores=cores)
        return calibrate(
            gauges,
            fallback,
            permitted=self.allowed,
            burst=self.burst,
            margin=1.25,
            clock_ms=self.clock,
            sleep_s=self.sleep,
        )


class Energy:
    """A gauge like the processor's counters."""

    source = Source.RAPL

    def __init__(self, computer: Computer, *, works: bool = True) -> None:
        self._computer = computer
        self._works = works
        self._last: tuple[int, float] | None = None

    def available(self, now_ms: int) -> bool:
        return self._works

    def read(self, now_ms: int) -> float | None:
        last, self._last = self._last, (now_ms, self._computer.used_uj)
        if last is None or now_ms == last[0]:
            return None
        return (self._computer.used_uj - last[1]) / (now_ms - last[0]) / 1000


def test_the_dearest_core_counts_for_all_so_that_the_line_lies_above_the_truth() -> None:
    computer = Computer()
    model = computer.calibrate([Energy(computer)])
    assert model is not None
    assert [model.idle_w, model.per_core_w] == pytest.approx([20.0, 15.0])
    assert (model.cores, model.source) == (4, Source.RAPL)
    for busy in range(5):
        computer.busy = busy
        assert model.idle_w + model.draw_w(busy * 1000, 1000) >= computer.watts_w - 1e-6
    assert "measured (rapl)" in model.line()


def test_a_signal_that_comes_every_few_seconds_is_waited_for() -> None:
    computer = Computer()
    computer.signal_every_ms = 4_000
    model = computer.calibrate([SignalGauge(computer.signal)])
    assert model is not None
    assert model.source is Source.VEHICLE
    assert model.per_core_w == pytest.approx(15.0)


def test_without_a_gauge_the_configuration_is_the_model_and_nothing_is_burnt() -> None:
    computer = Computer()
    model = computer.calibrate([Energy(computer, works=False)])
    assert model is not None
    assert model.source is Source.DECLARED
    assert model.per_core_w == 15.0
    assert computer.stopped_at_ms == []


def test_a_gauge_that_does_not_see_the_work_is_not_believed() -> None:
    computer = Computer()
    computer.sees_work = False
    model = computer.calibrate([Energy(computer)])
    assert model is not None
    assert model.source is Source.DECLARED


@given(st.integers(0, 4_000))
def test_calibration_stops_at_once_when_it_is_not_permitted_any_more(after_ms: int) -> None:
    computer = Computer()
    end_ms = computer.now_ms + after_ms
    computer.allowed = lambda: computer.now_ms < end_ms
    model = computer.calibrate([Energy(computer)])
    assert computer.busy == 0
    if model is None:
        assert computer.now_ms <= end_ms + Timing().step_ms
        assert all(at_ms <= end_ms + Timing().step_ms for at_ms in computer.stopped_at_ms)
    else:
        assert computer.now_ms <= end_ms


def test_without_leave_no_burst_begins() -> None:
    computer = Computer()
    computer.allowed = lambda: False
    assert computer.calibrate([Energy(computer)]) is None
    assert computer.stopped_at_ms == []


def test_a_burst_works_until_it_is_stopped_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    worked = threading.Semaphore(0)
    real = hashlib.blake2b

    def counted(data: bytes) -> object:
        worked.release()
        return real(data)

    monkeypatch.setattr(hashlib, "blake2b", counted)
    before = threading.active_count()
    burner = Burner(2)
    for _ in range(6):
        assert worked.acquire(timeout=30)
    burner.stop()
    assert threading.active_count() == before


# -- meter -------------------------------------------------------------------------------------------------------------


class Script:
    """Counters that say what they are told."""

    def __init__(self, *values: float | None) -> None:
        self._values = list(values)

    def read(self, now_ms: int) -> float | None:
        return self._values.pop(0) if self._values else None


MODEL = PowerModel(idle_w=20.0, per_core_w=10.0, cores=4, source=Source.DECLARED)
BY_RAPL = PowerModel(idle_w=20.0, per_core_w=10.0, cores=4, source=Source.RAPL)
BY_CAR = PowerModel(idle_w=20.0, per_core_w=10.0, cores=4, source=Source.VEHICLE)


def test_without_a_meter_the_processor_time_says_it() -> None:
    meter = PowerMeter(MODEL)
    meter.read(0, cpu_ms=0)
    draw = meter.read(2_000, cpu_ms=3_000)
    assert (draw.watts_w, draw.measured, draw.source) == (15.0, False, Source.DECLARED)


def test_the_vehicles_signal_comes_before_the_counters_and_these_before_the_model() -> None:
    meter = PowerMeter(BY_RAPL, Script(None, 50.0, 50.0))
    meter.read(0, cpu_ms=0)
    draw = meter.read(1_000, cpu_ms=1_000, computer_power=Reading(value=45.0, at_ms=900))
    assert (draw.watts_w, draw.measured, draw.source) == (45.0, True, Source.VEHICLE)  # its idle part is not known
    draw = meter.read(2_000, cpu_ms=2_000)
    assert (draw.watts_w, draw.measured, draw.source) == (30.0, True, Source.RAPL)
    draw = meter.read(3_000, cpu_ms=3_000)
    assert (draw.watts_w, draw.measured) == (10.0, False)


def test_what_the_computer_draws_anyway_is_taken_off_where_the_same_source_measured_it() -> None:
    meter = PowerMeter(BY_CAR)
    meter.read(0, cpu_ms=0)
    assert meter.read(1_000, cpu_ms=500, computer_power=Reading(value=45.0, at_ms=900)).watts_w == 25.0
    assert meter.read(2_000, cpu_ms=900, computer_power=Reading(value=5.0, at_ms=1_900)).watts_w == 0.0


@pytest.mark.parametrize(
    "reading",
    [
        Reading(value=45.0, at_ms=60_000 - MAX_AGE_MS["computer_power_w"] - 1),
        Reading(value=float("nan"), at_ms=60_000),
        Reading(value=-3.0, at_ms=60_000),
        Reading(value=45.0, at_ms=58_900),  # from before the engine began to work
    ],
)
def test_a_reading_that_is_old_or_impossible_or_of_another_time_does_not_count(reading: Reading[float]) -> None:
    meter = PowerMeter(MODEL)
    meter.read(59_000, cpu_ms=0)
    draw = meter.read(60_000, cpu_ms=1_000, computer_power=reading)
    assert (draw.watts_w, draw.measured) == (10.0, False)


def test_an_engine_that_used_no_processor_time_drew_nothing_whatever_else_the_computer_does() -> None:
    meter = PowerMeter(BY_RAPL, Script(None, 90.0, 90.0))
    meter.read(0, cpu_ms=500)
    assert meter.read(1_000, cpu_ms=500).watts_w == 0.0
    assert meter.read(2_000, cpu_ms=600).watts_w == 70.0


def test_after_a_clock_that_was_set_back_power_is_known_again() -> None:
    meter = PowerMeter(MODEL)
    meter.read(1_000_000, cpu_ms=0)
    assert meter.read(0, cpu_ms=500).watts_w == 0.0
    assert meter.read(1_000, cpu_ms=1_500).watts_w == 10.0


def test_a_new_engine_counts_from_its_beginning() -> None:
    meter = PowerMeter(MODEL)
    meter.read(0, cpu_ms=5_000)
    assert meter.read(1_000, cpu_ms=400).watts_w == pytest.approx(4.0)


@given(
    st.lists(
        st.tuples(
            st.integers(-1_000, 5_000),
            st.integers(0, 10**6),
            st.none() | st.floats(),
            st.none() | st.floats(min_value=0, max_value=1e4),
        ),
        max_size=40,
    )
)
def test_a_meter_always_says_a_number_that_is_not_negative(
    steps: list[tuple[int, int, float | None, float | None]],
) -> None:
    meter = PowerMeter(BY_RAPL, Script(*(counted for _, _, _, counted in steps)))
    now_ms = 100_000
    for passed_ms, cpu_ms, signal_w, _ in steps:
        now_ms += passed_ms
        reading = None if signal_w is None else Reading(value=signal_w, at_ms=now_ms)
        draw = meter.read(now_ms, cpu_ms=cpu_ms, computer_power=reading)
        assert 0 <= draw.watts_w < float("inf")


def test_the_counters_as_a_gauge_for_calibration(tmp_path: Path) -> None:
    counters = Counters(tmp_path).add("intel-rapl:0", "package-0")
    gauge = RaplGauge(Rapl(tmp_path))
    assert gauge.available(0)
    assert gauge.read(0) is None
    counters.use("intel-rapl:0", 9)
    assert gauge.read(1_000) == pytest.approx(9.0)
