"""The engine's process: it stops when told, ends when told, and never outlives its parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.engine_trial import DEADLINE_S, Trial, chat, work

from motorpool.agent.loop import GUARD_INTERVAL_MS
from motorpool.agent.main import AgentConfig
from motorpool.agent.runtime import Backend, EngineSpec, build_engine, cgroup, frames
from motorpool.agent.runtime.engine import Cancelled, Died, Engine, Finished, Progressed, Ready, Watched, Work
from motorpool.agent.runtime.frames import Unpacker
from motorpool.agent.runtime.host import LOOKS_A_SILENCE, LOOKS_TO_BE_SURE
from motorpool.agent.runtime.hosted import MAX_HELD, HostedEngine, Places
from motorpool.errors import CapacityError, EngineError, SetupError
from motorpool.types import Kind, Usage

BUSY: dict[str, Any] = {"rate_tokens_per_s": 400.0, "context_tokens": 100_000}


def null(**fields: Any) -> EngineSpec:
    return EngineSpec(backend=Backend.NULL, model="null", **fields)


def pid_of(engine: Engine) -> int:
    assert isinstance(engine, HostedEngine)
    assert engine.pid is not None
    return engine.pid


def cpu_ticks(pid: int) -> int:
    """Processor time of all threads so far, from the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def stands_still(pid: int) -> bool:
    """Stopped by a signal, or by the control group that it is in."""
    if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
        return True
    place = cgroup.find_place()
    group = Path(f"/proc/{pid}/cgroup").read_text().rsplit("0::", 1)[-1].strip()
    return place is not None and "frozen 1" in (place.parent / group.lstrip("/") / "cgroup.events").read_text()


def core_limits(pid: int) -> list[str]:
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line for line in limits if line.startswith("Max core file size")).split()[4:6]


async def other_work(t: Trial, key: str, tokens: int = 80) -> None:
    """Let time pass in which another engine does what a running one can do."""
    done = await t.ask(chat("meanwhile", max_tokens=tokens), key=key)
    assert done["usage"]["completion_tokens"] == tokens


async def frozen_uses_nothing(t: Trial) -> None:
    meanwhile = Trial(build_engine(null(hosted=False, rate_tokens_per_s=200.0)))
    await meanwhile.start()
    pid = pid_of(t.engine)
    busy = cpu_ticks(pid)
    await t.until(lambda: cpu_ticks(pid) > busy)  # it does compute before
    t.engine.freeze()
    await other_work(meanwhile, "arrives")
    before = (cpu_ticks(pid), len(t.events))
    await other_work(meanwhile, "passes")
    assert (cpu_ticks(pid), len(t.events)) == before
    assert stands_still(pid)
    t.engine.thaw()
    await t.until(lambda: len(t.events) > before[1])
    await meanwhile.engine.close()


def test_a_frozen_engine_uses_no_processor_time() -> None:
    async def run() -> None:
        t = Trial(build_engine(null(**BUSY)))
        await t.start()
        t.engine.submit([work(chat("long", max_tokens=20_000), key=f"k{i}", stream=True) for i in range(4)])
        await t.until(lambda: t.of(Progressed))
        await frozen_uses_nothing(t)
        await t.engine.close()

    asyncio.run(run())


@pytest.mark.llama
def test_a_frozen_llama_uses_no_processor_time_and_goes_on_with_the_same_answer(model_file: Path) -> None:
    async def run() -> None:
        spec = EngineSpec(backend=Backend.LLAMA, model="m", model_path=str(model_file), slots=1, idle_priority=False)
        t = Trial(build_engine(spec))
        await t.start()
        body = chat("Tell me about cars.", max_tokens=60, temperature=0)
        t.engine.submit([work(body, key="broken", stream=True)])
        await t.until(lambda: len(t.of(Progressed)) > 3)
        await frozen_uses_nothing(t)
        await t.until(lambda: t.of(Finished, "broken"))
        unbroken = await t.ask(body, key="unbroken")
        assert json.loads(t.of(Finished, "broken")[0].body)["choices"] == unbroken["choices"]
        await t.engine.close()

    asyncio.run(run())


def test_a_frozen_engine_can_be_killed() -> None:
    async def run() -> None:
        t = Trial(build_engine(null(**BUSY)))
        await t.start()
        t.engine.submit([work(chat("long", max_tokens=20_000), stream=True)])
        await t.until(lambda: t.of(Progressed))
        pid = pid_of(t.engine)
        t.engine.freeze()
        await t.engine.close()
        assert not psutil.pid_exists(pid)
        assert not t.of(Died)

    asyncio.run(run())


def test_an_engine_that_dies_says_so_and_can_be_started_again() -> None:
    async def run() -> None:
        t = Trial(build_engine(null(**BUSY)))
        await t.start()
        t.engine.submit([work(chat("long", max_tokens=20_000), stream=True)])
        await t.until(lambda: t.of(Progressed))
        os.kill(pid_of(t.engine), signal.SIGKILL)
        await t.until(lambda: t.of(Died))
        assert t.of(Died)[0].exit_code == -signal.SIGKILL
        with pytest.raises(EngineError):
            t.engine.submit([work(chat("x"))])
        t.events.clear()
        await t.start()
        assert (await t.ask(chat("x", max_tokens=1), key="again"))["usage"]["completion_tokens"] == 1
        await t.engine.close()

    asyncio.run(run())


PARENT = """
import asyncio, sys
from motorpool.agent.runtime import Backend, EngineSpec, build_engine

async def main():
    engine = build_engine(EngineSpec(backend=Backend.NULL, model="null", rate_tokens_per_s=10.0, silence_s=1.0))
    ready = asyncio.Event()
    await engine.start(lambda events: ready.set())
    while not ready.is_set():
        engine.beat()
        await asyncio.sleep(0.1)
    if sys.argv[1] == "frozen":
        engine.freeze()
    print(engine.pid, flush=True)
    while sys.argv[1] != "silent":
        engine.beat()
        await asyncio.sleep(0.1)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["running", "frozen"])
def test_an_engine_does_not_outlive_its_parent(state: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    assert engine.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    # Whoever inherits the orphan may take its time to collect it; a zombie uses nothing any more.
    deadline = time.monotonic() + DEADLINE_S
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        psutil.wait_procs([engine], timeout=0.05)


@pytest.mark.parametrize("state", ["running", "silent"])
def test_an_engine_does_not_compute_on_for_a_parent_that_hangs(state: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    try:
        engine = psutil.Process(int(parent.stdout.readline()))
        if state == "running":
            parent.send_signal(signal.SIGSTOP)  # it lives, and can stop nobody
        deadline = time.monotonic() + DEADLINE_S
        while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            psutil.wait_procs([engine], timeout=0.05)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_being_frozen_is_not_taken_for_a_silent_parent() -> None:
    async def run() -> None:
        t = Trial(build_engine(null(silence_s=0.3, **BUSY)))
        meanwhile = Trial(build_engine(null(hosted=False, rate_tokens_per_s=50.0)))
        await meanwhile.start()
        assert isinstance(t.engine, Watched)

        async def alive_until(condition: Callable[[], Any]) -> None:
            while not condition():
                assert isinstance(t.engine, Watched)
                t.engine.beat()
                await other_work(meanwhile, f"a moment {time.monotonic()}", tokens=1)
                assert not t.of(Died)

        await t.engine.start(t._on_events)
        await alive_until(lambda: t.of(Ready))
        t.engine.submit([work(chat("long", max_tokens=1_000), key="a")])
        await alive_until(lambda: t.of(Progressed))
        t.engine.freeze()
        await other_work(meanwhile, "more than a second")
        t.engine.beat()
        t.engine.thaw()
        await alive_until(lambda: t.of(Finished))
        await t.engine.close()

    asyncio.run(run())


def test_an_engine_that_gets_no_processor_time_does_not_take_that_for_silence() -> None:
    """What the agent says lies in memory, so that it counts although nobody has had the time to read it."""
    descriptor = frames.Lifeline.make()
    agents, engines = frames.Lifeline(descriptor), frames.Lifeline(descriptor)
    os.close(descriptor)
    assert engines.over  # nobody has said anything yet
    agents.extend(60.0)
    assert not engines.over
    agents.extend(-1.0)
    assert engines.over
    agents.close()
    engines.close()


def test_an_engine_without_a_word_of_its_agent_ends_before_the_agents_permit_does(tmp_path: Path) -> None:
    for interval_ms in (250, 1_000):
        config = AgentConfig(
            agent_dir=tmp_path,
            credentials_path=tmp_path,
            consent_path=tmp_path,
            owner_public_key_path=tmp_path,
            engine=null(),
            guard_interval_ms=interval_ms,
        )
        (spec,) = config.engine_specs().values()
        silence_ms = spec.silence_s * 1_000
        assert silence_ms >= 2 * interval_ms, "one look that comes late is no silence"
        surely_ms = silence_ms * (1 + (LOOKS_TO_BE_SURE + 1) / LOOKS_A_SILENCE)
        assert surely_ms < config.guard_policy().permit_ms
        if interval_ms == GUARD_INTERVAL_MS:
            assert surely_ms <= 900, "the rest of the second is for the end itself"


def test_loading_is_work_and_waiting_is_not() -> None:
    async def run() -> None:
        t = Trial(build_engine(null()))
        await t.start()
        loading_ms = t.engine.busy_ms()
        assert loading_ms > 0
        await t.ask(chat("at once", max_tokens=1))
        meanwhile = Trial(build_engine(null(hosted=False, rate_tokens_per_s=200.0)))
        await meanwhile.start()
        before_ms = t.engine.busy_ms()
        await other_work(meanwhile, "takes a while")
        assert t.engine.busy_ms() == before_ms
        await t.engine.close()

    asyncio.run(run())


def test_a_frozen_engine_with_a_full_pipe_blocks_nobody() -> None:
    async def run() -> None:
        t = Trial(build_engine(null(**BUSY)))
        await t.start()
        pid = pid_of(t.engine)
        t.engine.freeze()
        body = b"x" * 4_000_000
        t.engine.submit([Work(key=str(n), kind=Kind.CHAT, body=body, response_id="r", created_s=1) for n in range(20)])
        meanwhile = Trial(build_engine(null(hosted=False)))
        await meanwhile.start()
        await other_work(meanwhile, "is done")
        assert stands_still(pid)
        await t.engine.close()
        assert not psutil.pid_exists(pid)

    asyncio.run(run())


def test_closing_waits_for_every_engine_that_was_killed_before() -> None:
    async def run() -> None:
        engine = build_engine(null())
        pids = []
        for _ in range(3):
            t = Trial(engine)
            await t.start()
            pids.append(pid_of(engine))
            engine.kill()
        await engine.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)

    asyncio.run(run())


@pytest.mark.llama
def test_an_engine_that_is_killed_while_it_loads_leaves_nothing_behind(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spec = EngineSpec(backend=Backend.LLAMA, model="m", model_path=str(model_file), slots=1, idle_priority=False)

    def left_by_the_child() -> list[Path]:
        return list(tmp_path.glob("*/*"))  # the place of the model's socket

    def left_behind() -> list[Path]:
        return list(tmp_path.iterdir())

    async def run() -> None:
        t = Trial(HostedEngine(spec, Places(groups=cgroup.find_place(), memory=())))
        await t.engine.start(t._on_events)
        async with asyncio.timeout(DEADLINE_S):
            while not left_by_the_child():  # noqa: ASYNC110  # no event tells: the engine is in the middle of loading
                await asyncio.sleep(0)
        t.engine.kill()
        await t.engine.close()
        assert not left_behind()
        await t.start()
        assert not left_by_the_child()
        await t.engine.close()
        assert not left_behind()

    asyncio.run(run())


def test_an_engine_whose_parent_is_another_one_ends_at_once() -> None:
    command = [sys.executable, "-m", "motorpool.agent.runtime.host", "0", str(os.getpid() + 1), "0"]
    assert subprocess.run(command, check=False).returncode == 3


def test_an_engine_leads_a_group_of_its_own_and_leaves_no_core_dump() -> None:
    async def run() -> None:
        t = Trial(build_engine(null()))
        await t.start()
        pid = pid_of(t.engine)
        assert core_limits(pid) == ["0", "0"]
        assert os.getpgid(pid) == pid != os.getpgid(0)
        await t.engine.close()

    asyncio.run(run())


def autogroup_nice(text: str) -> str:
    """What the kernel says of a session's group. It says nothing of a process that it puts into none."""
    return text.rsplit(maxsplit=1)[-1] if text.strip() else "none"


def test_an_engine_steps_back_behind_everybody_else() -> None:
    script = (
        "import os\n"
        "from pathlib import Path\n"
        "from motorpool.agent.runtime.host import step_back\n"
        "step_back(idle_priority=True)\n"
        "stepped = os.sched_getscheduler(0)\n"
        "try:\n"
        "    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
        "except PermissionError:\n"
        "    stepped = os.SCHED_IDLE\n"
        "print(os.nice(0), stepped == os.SCHED_IDLE)\n"
        "group = Path('/proc/self/autogroup')\n"
        "print(group.read_text() if group.exists() else '')\n"
    )
    group = Path("/proc/self/autogroup")
    ours = group.read_text() if group.exists() else ""
    for own_session, of_group in ((True, "19" if group.exists() else "none"), (False, autogroup_nice(ours))):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, check=True, text=True, start_new_session=own_session
        )
        priority, _, of_its_group = done.stdout.partition("\n")
        assert [*priority.split(), autogroup_nice(of_its_group)] == ["19", "True", of_group]


def test_a_full_engine_refuses_more() -> None:
    async def run() -> None:
        t = Trial(build_engine(null(rate_tokens_per_s=1.0, slots=1)))
        await t.start()
        with pytest.raises(CapacityError):
            t.engine.submit([work(chat("x"), key=str(number)) for number in range(MAX_HELD + 1)])
        await t.engine.close()

    asyncio.run(run())


def test_a_spec_that_cannot_run_is_refused() -> None:
    for spec in (
        EngineSpec(backend=Backend.LLAMA, model="m"),
        EngineSpec(backend=Backend.LLAMA, model="m", model_path="x", hosted=False),
        EngineSpec(backend=Backend.REMOTE, model="m", url="ftp://x"),
        null(slots=0),
    ):
        with pytest.raises(SetupError):
            build_engine(spec)


def test_starting_twice_is_an_error() -> None:
    async def run() -> None:
        for hosted in (False, True):
            t = Trial(build_engine(null(hosted=hosted)))
            await t.start()
            with pytest.raises(EngineError):
                await t.engine.start(lambda _events: None)
            await t.engine.close()

    asyncio.run(run())


def test_messages_survive_any_cutting() -> None:
    messages = [b"", b"a", b"b" * 300]
    stream = b"".join(len(message).to_bytes(4, "big") + message for message in messages)
    for size in (1, 2, 3, 5, 7, len(stream)):
        unpacker = Unpacker()
        out = [m for at in range(0, len(stream), size) for m in unpacker.feed(stream[at : at + size])]
        assert out == messages
    with pytest.raises(EngineError):
        Unpacker().feed(b"\xff\xff\xff\xff")


def test_large_attempts_go_in_several_messages() -> None:
    big = [Work(key=str(n), kind=Kind.CHAT, body=b"x" * 4_000_000, response_id="r", created_s=1) for n in range(40)]
    packed = frames.pack_work(big)
    assert len(packed) == 3
    assert all(len(data) < frames.MAX_WORK_BYTES + 10_000 for data in packed)
    unpacked = [frames.TO_ENGINE.decode(message) for data in packed for message in Unpacker().feed(data)]
    assert [one.key for message in unpacked if isinstance(message, frames.Submit) for one in message.work] == [
        str(n) for n in range(40)
    ]


def test_an_event_that_fits_into_no_message_gives_its_own_attempt_up_alone() -> None:
    events: list[frames.FromEngine] = [
        Finished(key=str(n), status=200, body=b"x" * (5_000 if n == 3 else 50), usage=Usage()) for n in range(600)
    ]
    packed = frames.pack_events(events, max_bytes=2_000)
    out = [
        event for data in packed for message in Unpacker().feed(data) for event in frames.FROM_ENGINE.decode(message)
    ]
    assert out == [Cancelled(key="3") if n == 3 else event for n, event in enumerate(events)]
