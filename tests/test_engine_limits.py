"""What an engine is held to: its duty cycle never continues a frozen one, and less is really less."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.engine_trial import Trial, chat, work

from motorpool.agent.runtime import Backend, EngineSpec, build_engine
from motorpool.agent.runtime.build import SwitchableEngine, build_engines
from motorpool.agent.runtime.engine import Cancelled, Died, Engine, Finished, Progressed, Watched
from motorpool.agent.runtime.hosted import HostedEngine, Places
from motorpool.agent.runtime.limits import (
    DUTY_PERIOD_S,
    STALE_S,
    By,
    Gate,
    MemoryFolder,
    cpu_ms_of,
    has_swap,
    idle_disk,
    in_memory,
    memory_folders,
)
from motorpool.agent.runtime.meter import BusyMeter
from motorpool.core.energy import Limits
from motorpool.errors import EngineError, SetupError

BARE = Places(groups=None, memory=(Path("/dev/shm"),))  # what there is without control groups
OTHER_UID = 54_321  # of nobody on this machine


def null(**fields: Any) -> EngineSpec:
    given: dict[str, Any] = {"slots": 4, "rate_tokens_per_s": 400.0, "context_tokens": 100_000, **fields}
    return EngineSpec(backend=Backend.NULL, model="null", **given)


def limits(**fields: Any) -> Limits:
    given: dict[str, Any] = {"watts_w": 50, "threads": 1, "duty": 1.0, "slots": 4, **fields}
    return Limits(**given)


# -- the gate ----------------------------------------------------------------------------------------------------------


class FakeProcess:
    """What the kernel would make of the calls."""

    def __init__(self) -> None:
        self.stopped = self.locked = self.dead = False
        self.after_death: list[str] = []

    @property
    def runs(self) -> bool:
        return not (self.stopped or self.locked or self.dead)

    def _do(self, name: str) -> None:
        if self.dead:
            self.after_death.append(name)

    def halt(self) -> None:
        self._do("halt")
        self.stopped = True

    def go_on(self) -> None:
        self._do("go on")
        self.stopped = False

    def lock(self) -> None:
        self._do("lock")
        self.locked = True

    def unlock(self) -> None:
        self._do("unlock")
        self.locked = False

    def end(self) -> None:
        self._do("end")
        self.dead = True


DUTIES = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0, 2.0, -1.0, float("nan"), float("inf")])


class GateInAnyOrder(RuleBasedStateMachine):
    """Owner, duty cycle and late timers in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.process = FakeProcess()
        self.gate = Gate(self.process, self.now_s)
        self.frozen = self.ended = False
        self.duty = 1.0

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.03, 0.05, 0.1, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def freeze(self) -> None:
        self.gate.freeze()
        self.frozen = True
        assert not self.process.runs

    @rule()
    def thaw(self) -> None:
        self.gate.thaw(self.now_s)
        self.frozen = False

    @rule(duty=DUTIES)
    def limit(self, duty: float) -> None:
        self.gate.hold_to(duty, self.now_s)
        self.duty = duty

    @rule()
    def tick(self) -> None:
        self.gate.tick(self.now_s)

    @rule()
    def tick_in_time(self) -> None:
        self.now_s += self.gate.wait_s(self.now_s) or 0.0
        self.gate.tick(self.now_s)

    @rule()
    def kill(self) -> None:
        self.gate.end()
        self.ended = True

    @invariant()
    def a_frozen_or_ended_engine_never_runs(self) -> None:
        if self.frozen or self.ended:
            assert not self.process.runs
            assert self.gate.wait_s(self.now_s) is None

    @invariant()
    def nothing_is_done_to_one_that_has_ended(self) -> None:
        assert self.process.after_death == []
        assert self.process.dead == self.ended

    @invariant()
    def it_runs_exactly_when_nothing_holds_it(self) -> None:
        assert self.process.runs == self.gate.running

    @invariant()
    def one_without_a_limit_is_not_held_and_one_without_any_time_is(self) -> None:
        if not (self.frozen or self.ended):
            if 1.0 <= self.duty < float("inf"):
                assert self.process.runs
            if not 0.02 <= self.duty < float("inf"):
                assert not self.process.runs
            elif not self.process.runs:
                assert self.gate.wait_s(self.now_s) is not None  # it will go on


TestGateInAnyOrder = GateInAnyOrder.TestCase
TestGateInAnyOrder.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def ran_part(duty: float, late_s: list[float]) -> float:
    """The part of the time in which an engine ran whose timer came late by these times, in turn."""
    now_s, ran_s = 0.0, 0.0
    gate = Gate(FakeProcess(), now_s)
    gate.hold_to(duty, now_s)
    for late in late_s:
        wait_s = gate.wait_s(now_s)
        assert wait_s is not None
        ran_s += (wait_s + late) if gate.running else 0.0
        now_s += wait_s + late
        gate.tick(now_s)
    return ran_s / now_s


@given(duty=st.floats(0.05, 0.95))
def test_an_engine_runs_for_the_part_of_the_time_that_it_may(duty: float) -> None:
    assert abs(ran_part(duty, [0.0] * 400) - duty) < 0.01


@given(duty=st.floats(0.2, 0.95), late_s=st.lists(st.floats(0.0, 1.0), min_size=20, max_size=60))
def test_a_late_agent_makes_an_engine_run_less_but_never_more(duty: float, late_s: list[float]) -> None:
    pairs = late_s[: len(late_s) // 2 * 2]  # whole cycles
    assert ran_part(duty, pairs) <= duty + 1e-6


def test_an_engine_that_ran_freely_before_does_not_rest_for_that() -> None:
    gate = Gate(FakeProcess(), 0.0)
    gate.hold_to(0.5, 1_000.0)
    assert gate.running
    gate.tick(1_000.05)
    assert gate.resting
    assert gate.wait_s(1_000.05) == pytest.approx(0.05)


def test_a_period_is_as_long_as_the_kernels_own() -> None:
    gate = Gate(FakeProcess(), 0.0)
    gate.hold_to(0.5, 0.0)
    assert gate.wait_s(0.0) == DUTY_PERIOD_S / 2 == 0.05


# -- real processes ----------------------------------------------------------------------------------------------------


class Spinner:
    """A real child that computes without end, behind a gate that a real event loop drives."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
        self.gate = Gate(self, time.monotonic())

    def halt(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def lock(self) -> None:
        """There is no second means."""

    unlock = lock

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)

    def wanted_s(self) -> float:
        """The time in which it ran or would have, had others not been before it."""
        ran_ns, waited_ns, _ = Path(f"/proc/{self.process.pid}/schedstat").read_text().split()
        return (int(ran_ns) + int(waited_ns)) / 1e9

    async def part(self, for_s: float) -> float:
        """The part of a time that it runs or wants to."""
        loop = asyncio.get_running_loop()
        before_s, since_s = self.wanted_s(), time.monotonic()
        while time.monotonic() - since_s < for_s:
            wait_s = self.gate.wait_s(time.monotonic())
            over = loop.create_future()
            loop.call_later(min(for_s, for_s if wait_s is None else wait_s), over.set_result, None)
            await over
            self.gate.tick(time.monotonic())
        return (self.wanted_s() - before_s) / (time.monotonic() - since_s)


def test_half_the_duty_is_half_the_processor() -> None:
    async def run() -> None:
        spinner = Spinner()
        try:
            while spinner.wanted_s() < 0.1:  # noqa: ASYNC110  # it begins to compute
                await asyncio.sleep(0)
            whole = await spinner.part(1.0)
            spinner.gate.hold_to(0.5, time.monotonic())
            half = await spinner.part(2.0)
            spinner.gate.hold_to(0.2, time.monotonic())
            fifth = await spinner.part(2.0)
            spinner.gate.freeze()
            assert await spinner.part(0.5) < 0.02
            spinner.gate.hold_to(1.0, time.monotonic())
            assert await spinner.part(0.5) == 0.0
        finally:
            spinner.gate.end()
            spinner.process.wait()
        assert whole > 0.8
        assert 0.25 < half / whole < 0.65
        assert 0.05 < fifth / whole < 0.35

    asyncio.run(run())


@pytest.mark.llama
def test_a_permit_of_fewer_watts_makes_a_real_model_use_less_of_the_processor(model_file: Path) -> None:
    async def run() -> None:
        spec = llama(model_file, slots=1)
        engine = HostedEngine(spec, BARE)
        meanwhile = Trial(build_engine(null(hosted=False, rate_tokens_per_s=50.0)))
        await meanwhile.start()
        t = Trial(engine)
        await t.start()
        engine.submit([work(chat("Tell me everything about cars.", max_tokens=1900), key=f"k{n}") for n in range(8)])

        async def part(name: str) -> float:
            cpu_ms, busy_ms, since_s = engine.cpu_ms(), engine.busy_ms(), time.monotonic()
            await other_work(meanwhile, name, tokens=75)
            passed_ms = (time.monotonic() - since_s) * 1000
            busy.append((engine.busy_ms() - busy_ms) / passed_ms)
            return (engine.cpu_ms() - cpu_ms) / passed_ms

        busy: list[float] = []
        whole = half = 0.0
        for turn in range(2):  # in turns, as others use the machine too
            engine.limit(limits(duty=1.0))
            whole += await part(f"whole {turn}")
            engine.limit(limits(duty=0.4))
            half += await part(f"part {turn}")
        assert 0.1 < half / whole < 0.75
        assert all(0.9 < part <= 1.05 for part in busy[::2])
        assert all(0.2 < part < 0.6 for part in busy[1::2])  # what it was stopped is not busy
        await engine.close()
        await meanwhile.engine.close()

    asyncio.run(run())


def llama(model_file: Path, **fields: Any) -> EngineSpec:
    given: dict[str, Any] = {"model_path": str(model_file), "idle_priority": False, **fields}
    return EngineSpec(backend=Backend.LLAMA, model="m", **given)


async def other_work(t: Trial, key: str, tokens: int = 20) -> None:
    """Let time pass in which another engine does what a running one can do."""
    done = await t.ask(chat("meanwhile", max_tokens=tokens), key=key)
    assert done["usage"]["completion_tokens"] == tokens


def test_no_limit_continues_a_frozen_engine() -> None:
    async def run() -> None:
        engine = HostedEngine(null(), BARE)
        t = Trial(engine)
        await t.start()
        meanwhile = Trial(build_engine(null(hosted=False, rate_tokens_per_s=100.0)))
        await meanwhile.start()
        engine.limit(limits(duty=0.5))
        engine.submit([work(chat("long", max_tokens=20_000), key=f"k{n}", stream=True) for n in range(4)])
        await t.until(lambda: t.of(Progressed))
        assert engine.pid is not None
        engine.freeze()
        await other_work(meanwhile, "arrives")
        before = (cpu_ms_of(engine.pid), len(t.events), engine.busy_ms())
        for number, duty in enumerate((1.0, 0.5, 0.0, 0.9)):
            engine.limit(limits(duty=duty))
            await other_work(meanwhile, f"passes {number}")
            assert psutil.Process(engine.pid).status() == psutil.STATUS_STOPPED
        assert (cpu_ms_of(engine.pid), len(t.events), engine.busy_ms()) == before
        engine.thaw()
        await t.until(lambda: len(t.events) > before[1])
        engine.kill()
        engine.thaw()
        engine.limit(limits(duty=1.0))
        await engine.close()

    asyncio.run(run())


def mode_of(folder: Path) -> int | None:
    return stat.S_IMODE(folder.stat().st_mode) if folder.exists() else None


def test_an_engine_that_is_frozen_before_it_has_begun_is_ended_instead() -> None:
    """It could not end with its agent yet, and would stay stopped for ever."""

    async def run() -> None:
        engine = HostedEngine(null(), BARE)
        t = Trial(engine)
        await engine.start(t._on_events)
        pid = engine.pid
        assert pid is not None
        engine.freeze()
        engine.limit(limits(duty=0.5))
        await t.until(lambda: t.of(Died))
        assert "had not begun" in t.of(Died)[0].message
        engine.thaw()
        assert not psutil.pid_exists(pid)
        t.events.clear()
        await t.start()
        await engine.close()

    asyncio.run(run())


def test_an_engine_at_rest_is_killed_at_once_and_leaves_no_folder() -> None:
    async def run() -> None:
        engine = HostedEngine(null(), BARE)
        t = Trial(engine)
        await t.start()
        pid = engine.pid
        assert pid is not None
        folder = Path(psutil.Process(pid).environ()["TMPDIR"])
        assert mode_of(folder) == 0o700
        assert in_memory(folder) == in_memory(Path("/dev/shm"))
        engine.limit(limits(duty=0.0))
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110  # the kernel tells nobody
            await asyncio.sleep(0)
        since_s = time.monotonic()
        engine.kill()
        await engine.close()
        assert time.monotonic() - since_s < 2.0
        assert not psutil.pid_exists(pid)
        assert mode_of(folder) is None
        assert not t.of(Died)

    asyncio.run(run())


def test_the_kernels_count_of_processor_time_outlives_the_engine() -> None:
    async def run() -> None:
        engine = HostedEngine(null(), BARE)
        assert engine.cpu_ms() == 0
        t = Trial(engine)
        await t.start()
        assert engine.pid is not None
        seen_ms = engine.cpu_ms()
        assert 0 < seen_ms <= cpu_ms_of(engine.pid)
        engine.submit([work(chat("long", max_tokens=20_000), key=f"k{n}", stream=True) for n in range(4)])
        await t.until(lambda: engine.cpu_ms() > seen_ms)
        seen_ms = engine.cpu_ms()
        os.kill(engine.pid, signal.SIGKILL)
        await t.until(lambda: t.of(Died))
        assert seen_ms <= engine.cpu_ms() < seen_ms + 5_000
        t.events.clear()
        await t.start()
        assert engine.cpu_ms() > 0  # of the new one
        engine.kill()
        assert engine.cpu_ms() > 0
        await engine.close()

    asyncio.run(run())


# -- slots, memory, threads --------------------------------------------------------------------------------------------


async def runs_one_at_a_time_until_more_are_allowed(engine: Engine) -> None:
    engine.limit(limits(slots=1))
    t = Trial(engine)
    assert (await t.start()).slots == 4
    body = chat("Count.", max_tokens=30, temperature=0)
    engine.submit([work(body, key=key, stream=True) for key in "ab"])
    await t.until(lambda: t.of(Progressed, "b"))
    assert t.of(Finished, "a")  # the second had to wait for it
    await t.until(lambda: t.of(Finished, "b"))
    long = chat("Count.", max_tokens=1_500, temperature=0)
    engine.submit([work(long, key=key, stream=True) for key in "cd"])
    await t.until(lambda: t.of(Progressed, "c"))
    assert not t.of(Progressed, "d")
    engine.limit(limits(slots=2))
    await t.until(lambda: t.of(Progressed, "d"))
    assert not t.of(Finished, "c")
    engine.limit(limits(slots=1))  # what runs comes to its end
    engine.submit([work(body, key="e", stream=True)])
    engine.cancel(["c"])
    await t.until(lambda: t.of(Cancelled, "c"))
    assert not t.of(Progressed, "e")
    engine.cancel(["d"])
    await t.until(lambda: t.of(Finished, "e"))
    await engine.close()


@pytest.mark.parametrize("hosted", [True, False])
def test_fewer_slots_run_fewer_attempts(hosted: bool) -> None:
    spec = null(hosted=hosted, rate_tokens_per_s=200.0)
    asyncio.run(runs_one_at_a_time_until_more_are_allowed(build_engine(spec)))


@pytest.mark.llama
def test_fewer_slots_run_fewer_attempts_of_a_real_model(model_file: Path) -> None:
    engine = build_engine(llama(model_file, slots=4))
    asyncio.run(runs_one_at_a_time_until_more_are_allowed(engine))


def limit_of(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line for line in lines if line.startswith(name)).removeprefix(name).split()[1]


def test_without_control_groups_the_process_holds_itself_to_its_memory_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        engine = HostedEngine(null(memory_bytes=2 * 10**9), BARE)
        engine.limit(limits(memory_bytes=10**9))
        t = Trial(engine)
        with caplog.at_level("INFO", "motorpool.agent.runtime.hosted"):
            await t.start()
            engine.kill()
            t.events.clear()
            await t.start()
        assert engine.pid is not None
        assert limit_of(engine.pid, "Max data size") == str(10**9)
        isolation = engine.isolation
        assert isolation is not None
        assert isolation.memory is By.RLIMIT
        assert isolation.processor is By.DUTY_CYCLE
        assert isolation.stopping is By.SIGNALS
        assert isolation.swap is (By.NOTHING if has_swap() else By.NO_SWAP)
        assert [record.getMessage() for record in caplog.records] == [
            f"what holds the engine to its limits: {isolation.line()}"
        ]
        await engine.close()

    asyncio.run(run())


@pytest.mark.llama
def test_a_model_that_needs_more_memory_than_it_may_have_is_refused_in_words(model_file: Path) -> None:
    async def run() -> None:
        t = Trial(HostedEngine(llama(model_file, slots=4, memory_bytes=120 * 2**20), BARE))
        await t.engine.start(t._on_events)
        await t.until(lambda: t.of(Died))
        said = t.of(Died)[0].message  # llama.cpp tells us, or gives up by itself
        assert "125829120 bytes" in said
        assert "smaller model" in said
        await t.engine.close()

    asyncio.run(run())


@pytest.mark.llama
def test_threads_and_cores_are_those_of_the_limits(model_file: Path) -> None:
    async def run() -> None:
        engine = HostedEngine(llama(model_file, slots=1, threads=64, idle_priority=True), BARE)
        engine.limit(limits(threads=1))
        t = Trial(engine)
        await t.start()
        assert engine.pid is not None
        process = psutil.Process(engine.pid)
        assert len(process.cpu_affinity()) == 1
        assert process.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
        assert len(process.threads()) < 64
        await engine.close()

    asyncio.run(run())


def test_an_engine_at_idle_priority_lets_others_go_first_at_the_disk() -> None:
    script = (
        "import psutil\n"
        "from motorpool.agent.runtime.limits import idle_disk\n"
        "print(idle_disk(), psutil.Process().ionice().ioclass == psutil.IOPRIO_CLASS_IDLE)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    known = platform.machine() in {"x86_64", "aarch64", "riscv64"}
    assert done.stdout.split() == [str(known), str(known)]
    assert callable(idle_disk)


def test_a_user_who_is_not_root_may_start_a_bounded_number_of_threads() -> None:
    script = (
        "import os, resource, threading\n"
        "from motorpool.agent.runtime.limits import Confine, confine, threads_of_user\n"
        "if os.getuid() == 0:\n"
        f"    os.setresuid(*[{OTHER_UID}] * 3)\n"
        "before = threads_of_user(os.getuid())\n"
        "confine(Confine(tasks=5))\n"
        "over = threading.Event()\n"
        "threads = [threading.Thread(target=over.wait) for _ in range(2_000)]\n"
        "try:\n"
        "    for thread in threads:\n"
        "        thread.start()\n"
        "except RuntimeError:\n"
        "    pass\n"
        "print(before, sum(thread.is_alive() for thread in threads))\n"
        "over.set()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    before, started = (int(number) for number in done.stdout.split())
    assert before >= 1
    assert 5 < started < 1_000


# -- temporary files ---------------------------------------------------------------------------------------------------


def test_a_folder_in_memory_is_told_from_one_on_a_disk(tmp_path: Path) -> None:
    kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    assert in_memory(Path("/dev/shm")) == (kinds.get("/dev/shm") == "tmpfs")
    assert not in_memory(Path("/proc"))
    assert not in_memory(tmp_path / "missing")
    both = {"XDG_RUNTIME_DIR": "/run/user/7", "RUNTIME_DIRECTORY": "/run/motorpool-agent:/run/other"}
    expected = ["/run/motorpool-agent", "/run/other", "/run/user/7", "/dev/shm"]
    assert memory_folders(both) == tuple(Path(name) for name in expected)
    assert memory_folders({"XDG_RUNTIME_DIR": "run"}) == memory_folders({}) == (Path("/dev/shm"),)


def test_without_a_place_in_memory_the_folder_says_so_and_is_private_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stale, locked, young = (tmp_path / f"motorpool-engine-{name}" for name in ("stale", "locked", "young"))
    for folder in (stale, young):
        folder.mkdir()
        (folder / "file").write_text("x")
    kept = MemoryFolder(())
    kept.path.rename(locked)
    kept.path = locked
    for folder in (stale, locked):
        os.utime(folder, (0, time.time() - STALE_S - 1))
    made = MemoryFolder(())
    assert not made.in_memory
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    assert sorted(tmp_path.iterdir()) == sorted([made.path, locked, young])
    for folder_of in (made, kept):
        folder_of.remove()
        folder_of.remove()
    assert list(tmp_path.iterdir()) == [young]


# -- one of two models -------------------------------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def two_models() -> SwitchableEngine:
    specs = {"full": null(rate_tokens_per_s=0), "small": null(rate_tokens_per_s=0, hosted=False)}
    named = {name: EngineSpec(backend=Backend.NULL, model=name, hosted=spec.hosted) for name, spec in specs.items()}
    return build_engines(named, "full")


def test_an_engine_with_two_models_loads_the_one_that_was_selected() -> None:
    async def run() -> None:
        engine = two_models()
        assert isinstance(engine, Watched)
        engine.limit(limits(duty=0.5))
        t = Trial(engine)
        assert (await t.start()).model == "full"
        assert engine.isolation is not None
        engine.select("small")  # from the next start
        assert (await t.ask(chat("x", max_tokens=1)))["model"] == "full"
        engine.beat()
        with pytest.raises(EngineError):
            await engine.start(lambda _events: None)
        engine.freeze()
        engine.thaw()
        cpu_ms = engine.cpu_ms()
        assert cpu_ms > 0
        engine.kill()
        assert (await t.start()).model == "small"
        assert engine.model == "small"
        assert engine.isolation is None
        assert (await t.ask(chat("x", max_tokens=1), key="b"))["model"] == "small"
        engine.cancel(["unknown"])
        assert engine.busy_ms() >= 0
        await engine.close()

    asyncio.run(run())


def test_an_engine_with_two_models_can_start_again_after_one_has_died() -> None:
    async def run() -> None:
        engine = two_models()
        t = Trial(engine)
        await t.start()
        (pid,) = children_of(os.getpid())
        os.kill(pid, signal.SIGKILL)
        await t.until(lambda: t.of(Died))
        t.events.clear()
        await t.start()
        await engine.close()

    asyncio.run(run())


def test_models_that_are_not_there_are_refused() -> None:
    with pytest.raises(EngineError, match="it has: full, small"):
        two_models().select("none")
    with pytest.raises(SetupError):
        build_engines({"full": null()}, "small")
    with pytest.raises(SetupError):
        build_engine(null(memory_bytes=-1))


# -- what counts as busy -----------------------------------------------------------------------------------------------


def test_what_is_stopped_is_not_busy_and_a_share_counts_as_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    meter = BusyMeter(4)
    meter.load()
    now_s[0] += 1.0
    assert meter.busy_ms() == 1_000  # loading is all slots' work
    meter.run()
    meter.add(2)
    now_s[0] += 1.0
    assert meter.busy_ms() == 1_500
    meter.pause(paused=True)
    now_s[0] += 9.0
    meter.pause(paused=False)
    assert meter.busy_ms() == 1_500
    meter.hold_to(slots=2, share=0.5)
    now_s[0] += 1.0
    assert meter.busy_ms() == 2_000
