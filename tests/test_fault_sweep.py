"""Every part dies or hangs at every step of a lease, and the car ends as a normal car.

Real processes throughout: see ``fault_sweep_world``. A trial brings a vehicle to a step, strikes, looks at the engine's
processes from outside, has the owner come where somebody is left to see it, heals, and checks in the cell's books that
every line counts once. ``make test`` runs a seeded choice with every step and every fault in it;
``MOTORPOOL_SWEEP=all`` runs each fault at each step and prints a table.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec
import pytest
from tests.fault_sweep_world import Lane, a_lane, hosts_of, until

ALL: Final = os.environ.get("MOTORPOOL_SWEEP", "") == "all"
TIMES: Final = int(os.environ.get("MOTORPOOL_SWEEP_TIMES", "1"))
SEED: Final = int(os.environ.get("MOTORPOOL_SWEEP_SEED", "23"))
LANES: Final = 3
LATE_S: Final = 0.0 if ALL else 1.0  # of a test machine that has other things to do
AGENT_S: Final = 1.0  # from an agent that is gone to an engine that uses no processor time
GONE_S: Final = 2.0  # and to nothing that is left; also from the owner who leaves
SIGNALS_S: Final = 3.0  # greatest age of the owner's signals, and a second
OWNER_S: Final = 0.5  # from the owner's act; what it really takes is measured by ``make bench-yield``
WATCH_S: Final = 0.3  # how long it is watched that nothing computes
DRAIN_S: Final = 7.0  # from SIGTERM to the end of the agent, with nobody to take what it has
HOUR_S: Final = 3600.0


class Step(StrEnum):
    """Where in a lease the fault strikes."""

    NO_PERMIT = "before a permit"
    DWELL = "dwell"
    STARTING = "engine starting"
    LOADING = "engine loading"
    READY = "ready"
    GRANTED = "grant arrived"
    FIRST_TOKEN = "first token"  # a piece of text
    MIDDLE = "in the middle"
    GATHERED = "result gathered"
    PUBLISHING = "result on its way"
    FROZEN = "frozen"
    KILLED = "killed"
    THAWED = "thawed"
    STOPPING = "shutting down"


class Fault(StrEnum):
    """What happens."""

    AGENT_KILLED = "agent killed"
    AGENT_HANGS = "agent hangs"
    ENGINE_KILLED = "engine killed"
    ENGINE_HANGS = "engine hangs"
    BROKER_KILLED = "broker killed"
    BROKER_HANGS = "broker hangs"
    SERVER_KILLED = "message server killed"
    SERVER_HANGS = "message server hangs"
    NETWORK_CUT = "network cut"
    CLOCK_AHEAD = "clock an hour ahead"
    CLOCK_BACK = "clock an hour back"
    DISK_FULL = "disk full, network cut"


class Act(StrEnum):
    """How the owner comes."""

    DOOR = "open-door"
    PRECONDITION = "precondition"


AGENT_FAULTS: Final = frozenset({Fault.AGENT_KILLED, Fault.AGENT_HANGS})
BROKER_FAULTS: Final = frozenset({Fault.BROKER_KILLED, Fault.BROKER_HANGS})
ENGINE_FAULTS: Final = frozenset({Fault.ENGINE_KILLED, Fault.ENGINE_HANGS})
NO_ENGINE: Final = frozenset({Step.NO_PERMIT, Step.DWELL, Step.KILLED, Step.STOPPING})
OWNER_THERE: Final = frozenset({Step.NO_PERMIT, Step.FROZEN, Step.KILLED})
LOADED: Final = frozenset(Step) - NO_ENGINE - OWNER_THERE - {Step.STARTING, Step.LOADING}
PAIRS: Final = [(step, fault) for step in Step for fault in Fault if not (fault in ENGINE_FAULTS and step in NO_ENGINE)]


class Outcome(msgspec.Struct, kw_only=True):
    """What one trial came to. ``stopped_s``: from the fault, ``owner_s``: from the owner's act, until it rests."""

    step: Step
    fault: Fault
    violations: list[str]
    stopped_s: float | None = None
    owner_s: float | None = None
    took_s: float = 0.0


# -- the steps ---------------------------------------------------------------------------------------------------------


async def away(lane: Lane) -> None:
    """The owner comes so that nothing of ours stays in memory."""
    lane.sampler.forbid(time.monotonic() + OWNER_S + LATE_S)
    await lane.owner(Act.PRECONDITION)
    await until(lambda: lane.agent.state.startswith("denied preconditioning"), "the guard's no")
    await until(lambda: not lane.sampler.alive(), "the end of the engine", GONE_S + LATE_S)


async def door(lane: Lane) -> None:
    """The owner opens a door."""
    lane.sampler.forbid(time.monotonic() + OWNER_S + LATE_S)
    await lane.owner(Act.DOOR)


async def peace(lane: Lane) -> None:
    """The owner goes away again."""
    lane.sampler.allow()
    for action in ("precondition-off", "lock"):
        await lane.owner(action)


async def no_permit(lane: Lane) -> None:
    await away(lane)


async def dwell(lane: Lane) -> None:
    await away(lane)
    await peace(lane)
    await until(lambda: lane.agent.state == "denied dwell", "the dwell")


async def starting(lane: Lane) -> None:
    await away(lane)
    await peace(lane)
    await until(lane.sampler.engines, "an engine")


async def loading(lane: Lane) -> None:
    await away(lane)
    await peace(lane)
    await until(lane.sampler.watched, "an engine with its watcher")


async def ready(lane: Lane) -> None:
    await until(lambda at=lane: at.agent.state.strip() == "ready", "an engine that is ready")  # type: ignore[misc]


async def at_work(lane: Lane, word: str, times: int = 1) -> str:
    """Hand a batch in, and wait until the agent has said this so often."""
    since = len(lane.agent.said)
    batch = await lane.batch()
    await until(lambda: lane.agent.count(word, since) >= times, word)
    return batch


async def publishing(lane: Lane) -> str:
    """The stream has a result, and the vehicle does not know it."""
    batch = await at_work(lane, "token", 5)
    lane.way.hold()
    await until(lambda: lane.world.completed(batch) > 0, "a result in the books")
    return batch


async def frozen(lane: Lane) -> str:
    batch = await at_work(lane, "token", 10)
    await door(lane)
    await until(lambda: lane.agent.state.startswith("yielding"), "the freeze")
    return batch


async def killed(lane: Lane) -> str:
    batch = await at_work(lane, "token", 10)
    lane.sampler.forbid(time.monotonic() + OWNER_S + LATE_S)
    await lane.owner(Act.PRECONDITION)
    await until(lambda: lane.agent.state.startswith("denied preconditioning"), "the guard's no")
    return batch


async def thawed(lane: Lane) -> str:
    batch = await frozen(lane)
    await peace(lane)
    await until(lambda: lane.agent.state.startswith(("ready", "working")), "the thaw")
    return batch


async def stopping(lane: Lane) -> str:
    batch = await at_work(lane, "token", 10)
    lane.sampler.forbid(time.monotonic() + AGENT_S + LATE_S)
    lane.agent.signal(signal.SIGTERM)
    await until(lambda: lane.agent.count("stopping"), "the agent's leave")
    return batch


STEPS: Final[dict[Step, Callable[[Lane], Awaitable[str | None]]]] = {
    Step.NO_PERMIT: no_permit,
    Step.DWELL: dwell,
    Step.STARTING: starting,
    Step.LOADING: loading,
    Step.READY: ready,
    Step.GRANTED: lambda lane: at_work(lane, "grant"),
    Step.FIRST_TOKEN: lambda lane: at_work(lane, "token"),
    Step.MIDDLE: lambda lane: at_work(lane, "token", 30),
    Step.GATHERED: lambda lane: at_work(lane, "gathered"),
    Step.PUBLISHING: publishing,
    Step.FROZEN: frozen,
    Step.KILLED: killed,
    Step.THAWED: thawed,
    Step.STOPPING: stopping,
}


# -- the faults --------------------------------------------------------------------------------------------------------


def set_clock(lane: Lane, by_s: float) -> None:
    """An agent follows its wall clock forward and not back: an hour ahead is one more than it ever was."""
    lane.ahead_s = by_s + (lane.most_ahead_s if by_s > 0 else lane.ahead_s)
    lane.most_ahead_s = max(lane.most_ahead_s, lane.ahead_s)
    lane.agent.tell(str(lane.ahead_s))


def let_write(lane: Lane, bytes_left: int) -> None:
    if lane.agent.alive:
        resource.prlimit(lane.agent.process.pid, resource.RLIMIT_FSIZE, (bytes_left, resource.RLIM_INFINITY))


async def strike(lane: Lane, fault: Fault) -> None:
    """Let it happen."""
    nats = lane.world.nats.process
    assert nats is not None
    if fault in AGENT_FAULTS:
        lane.agent.signal(signal.SIGKILL if fault is Fault.AGENT_KILLED else signal.SIGSTOP)
    elif fault in ENGINE_FAULTS:
        for engine in lane.sampler.engines():
            os.killpg(engine, signal.SIGKILL if fault is Fault.ENGINE_KILLED else signal.SIGSTOP)
    elif fault is Fault.BROKER_KILLED:
        await lane.broker.end()
    elif fault is Fault.BROKER_HANGS:
        lane.broker.signal(signal.SIGSTOP)
    elif fault is Fault.SERVER_KILLED:
        nats.kill()
        await nats.wait()
    elif fault is Fault.SERVER_HANGS:
        nats.send_signal(signal.SIGSTOP)
    elif fault in {Fault.CLOCK_AHEAD, Fault.CLOCK_BACK}:
        set_clock(lane, HOUR_S if fault is Fault.CLOCK_AHEAD else -HOUR_S)
    else:
        if fault is Fault.DISK_FULL:
            let_write(lane, 0)
        await lane.way.cut()


async def heal(lane: Lane, fault: Fault, engines: list[int]) -> None:
    """Start what died, and let go on what hung."""
    nats = lane.world.nats.process
    assert nats is not None
    if fault is Fault.AGENT_KILLED:
        await lane.agent.end()
        await lane.start_agent()
    elif fault is Fault.AGENT_HANGS:
        lane.agent.signal(signal.SIGCONT)
    elif fault is Fault.ENGINE_HANGS:
        for engine in set(engines) & set(lane.sampler.engines()):
            os.killpg(engine, signal.SIGCONT)
    elif fault is Fault.BROKER_KILLED:
        await lane.start_broker()
    elif fault is Fault.BROKER_HANGS:
        lane.broker.signal(signal.SIGCONT)
    elif fault is Fault.SERVER_KILLED:
        await lane.world.nats.start()
    elif fault is Fault.SERVER_HANGS:
        nats.send_signal(signal.SIGCONT)
    elif fault in {Fault.NETWORK_CUT, Fault.DISK_FULL}:
        let_write(lane, resource.RLIM_INFINITY)
        await lane.way.open()


# -- one trial ---------------------------------------------------------------------------------------------------------


async def passes(lane: Lane, until_s: float) -> None:
    """Watch until then; the sampler notes what must not be."""
    await until(lambda: time.monotonic() >= until_s, "the time")
    assert not lane.sampler.violations, lane.sampler.violations


async def nothing_left(lane: Lane, agent_pid: int, since_s: float, *, watched: bool) -> None:
    """No engine and no watcher; nor, if there was a watcher, what they had of the machine."""
    within_s = max(0.1, since_s + GONE_S + LATE_S - time.monotonic())
    await until(lambda: not lane.sampler.alive(), "the end of the engine", within_s)
    assert hosts_of(agent_pid) == []
    if watched:
        within_s = max(0.1, since_s + GONE_S + LATE_S - time.monotonic())
        await until(lambda: not lane.left(agent_pid), f"the end of {lane.left(agent_pid)}", within_s)


async def stays_normal(lane: Lane, outcome: Outcome, struck_s: float, engines: list[int], watched: bool) -> None:
    """What must be true while the fault lasts."""
    step, fault, sampler = outcome.step, outcome.fault, lane.sampler
    if fault in AGENT_FAULTS:
        sampler.forbid(struck_s + AGENT_S + LATE_S)
        if not (
            fault is Fault.AGENT_HANGS and step is Step.FROZEN
        ):  # what is frozen waits for longer, and computes not
            await nothing_left(lane, lane.agent.process.pid, struck_s, watched=watched)
        await passes(lane, max(time.monotonic(), struck_s + AGENT_S + LATE_S) + WATCH_S)
        outcome.stopped_s = max(0.0, sampler.active_s - struck_s)
    elif fault in BROKER_FAULTS:
        sampler.forbid(struck_s + SIGNALS_S + LATE_S)
        await passes(lane, struck_s + SIGNALS_S + LATE_S + WATCH_S)
        outcome.stopped_s = max(0.0, sampler.active_s - struck_s)
    elif fault is Fault.CLOCK_AHEAD and step in LOADED:
        said = len(lane.agent.said)
        await until(lambda: lane.agent.count("state yielding", max(0, said - 3)), "the freeze of a blind guard", 3.0)


async def owner_comes(lane: Lane, outcome: Outcome, act: Act) -> None:
    """While the fault lasts the owner comes, and the engine stops."""
    if outcome.fault in BROKER_FAULTS or outcome.step in OWNER_THERE or outcome.step is Step.STOPPING:
        return
    act_s = time.monotonic()
    if outcome.fault not in AGENT_FAULTS:
        lane.sampler.forbid(act_s + OWNER_S + LATE_S)
    await lane.owner(act)
    if outcome.fault in AGENT_FAULTS:
        return
    if act is Act.PRECONDITION:
        await nothing_left(lane, lane.agent.process.pid, act_s, watched=True)
    await passes(lane, act_s + OWNER_S + LATE_S + WATCH_S)
    outcome.owner_s = max(0.0, lane.sampler.active_s - act_s)


async def owner_is_still_there(lane: Lane, outcome: Outcome) -> None:
    """An agent that is back finds the owner in the car."""
    if outcome.fault not in AGENT_FAULTS or outcome.step is Step.STOPPING:
        return
    if outcome.fault is Fault.AGENT_HANGS:  # it goes on where it was, and has to hear of the owner first
        lane.sampler.allow()
        lane.sampler.forbid(time.monotonic() + OWNER_S + LATE_S)
    words = ("door_open", "preconditioning")
    await until(lambda: any(word in lane.agent.state for word in words), "the guard's no")
    await passes(lane, time.monotonic() + WATCH_S)


async def ends(lane: Lane, outcome: Outcome) -> None:
    """An agent that was asked to stop does so, and leaves nothing."""
    pid, code = lane.agent.process.pid, 0
    await until(lambda: not lane.agent.alive, "the end of the agent", DRAIN_S + LATE_S)
    if outcome.fault not in AGENT_FAULTS:
        assert lane.agent.process.returncode == code
        assert not lane.left(pid)
    assert hosts_of(pid) == []
    await passes(lane, time.monotonic() + WATCH_S)


async def run_trial(lane: Lane, step: Step, fault: Fault, act: Act) -> Outcome:
    """One fault at one step."""
    outcome = Outcome(step=step, fault=fault, violations=[])
    began_s = time.monotonic()
    lane.sampler.label = f"{fault}, {step}"
    lane.sampler.violations.clear()
    batch = await STEPS[step](lane)
    engines = lane.sampler.engines()
    watched = bool(lane.sampler.watched()) or step in {Step.FROZEN}
    struck_s = time.monotonic()
    await strike(lane, fault)
    lane.way.let_go()
    await stays_normal(lane, outcome, struck_s, engines, watched)
    await owner_comes(lane, outcome, act)
    if fault in AGENT_FAULTS and not (step is Step.STOPPING and fault is Fault.AGENT_KILLED):
        await heal(lane, fault, engines)
        await owner_is_still_there(lane, outcome)
    if step is Step.STOPPING:
        await ends(lane, outcome)
    if step is not Step.STOPPING and fault not in AGENT_FAULTS | BROKER_FAULTS:
        await peace(lane)
    lane.sampler.allow()
    if fault not in AGENT_FAULTS:
        await heal(lane, fault, engines)
    if step is Step.STOPPING:
        await lane.agent.end()
        await lane.start_agent()
    await peace(lane)
    await lane.finished(batch or await lane.batch())
    await until(lambda: lane.agent.state.strip() == "ready" and lane.sampler.watched(), "an engine that is ready")
    assert lane.writes + lane.broker.count("wrote") == 0, "the agent wrote a signal of the car"
    outcome.took_s = time.monotonic() - began_s
    return outcome


# -- the sweep ---------------------------------------------------------------------------------------------------------


def chosen(seed: int) -> list[tuple[Step, Fault]]:
    """Every step and every fault at least once, in as few trials as that takes."""
    rng = random.Random(seed)
    while True:
        steps = rng.sample(list(Step), len(Step))
        faults = [*Fault, *rng.sample(list(Fault), len(Step) - len(Fault))]
        pairs = list(zip(steps, faults, strict=True))
        if all(pair in PAIRS for pair in pairs):
            return pairs


async def follow(queue: list[tuple[Step, Fault, Act]], folder: Path, outcomes: list[Outcome], model: str) -> None:
    """Run trials of the queue one after the other; after one that failed, with a new vehicle."""
    number = 0
    while queue:
        number += 1
        async with AsyncExitStack() as entered:
            lane = await entered.enter_async_context(a_lane(folder / str(number), model))
            await until(lambda at=lane: at.agent.state.strip() == "ready", "an engine that is ready")  # type: ignore[misc]
            await lane.finished(await lane.batch())
            while queue:
                step, fault, act = queue.pop(0)
                try:
                    outcomes.append(await run_trial(lane, step, fault, act))
                except Exception as error:  # noqa: BLE001  # whatever it was, it is what this looks for
                    text = f"{fault}, {step}, {act}: {type(error).__name__}: {error}; {lane.sampler.violations}"
                    outcomes.append(Outcome(step=step, fault=fault, violations=[text, lane.agent.state]))
                    print(text, lane.folder, file=sys.stderr, flush=True)  # noqa: T201  # of a long run
                    break


async def sweep(pairs: list[tuple[Step, Fault]], folder: Path, seed: int, model: str = "") -> list[Outcome]:
    """All of these trials, on a few vehicles at a time."""
    rng = random.Random(seed)
    queue = [(step, fault, rng.choice(list(Act))) for step, fault in pairs]
    outcomes: list[Outcome] = []
    lanes = min(LANES, len(queue))
    await asyncio.gather(*(follow(queue, folder / f"lane{number}", outcomes, model) for number in range(lanes)))
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Trials and violations by fault, with the longest times until the engine was at rest."""
    rows: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.fault].append(outcome)
    lines = [
        "| fault | trials | violations | engine at rest, worst ms | after the owner's act, worst ms |",
        "| --- " * 5 + "|",
    ]
    for fault, found in rows.items():
        times = []
        for name in ("stopped_s", "owner_s"):
            seconds = [value for one in found if (value := getattr(one, name)) is not None]
            times.append(f"{max(seconds) * 1000:.0f}" if seconds else "")
        wrong = sum(bool(one.violations) for one in found)
        lines.append(f"| {fault} | {len(found)} | {wrong} | {times[0]} | {times[1]} |")
    wrong = sum(bool(one.violations) for one in outcomes)
    return "\n".join([*lines, f"{len(outcomes)} trials, {wrong} violations"])


def test_invariant_23_every_part_may_die_or_hang_at_every_step_and_the_car_ends_as_a_normal_car(tmp_path: Path) -> None:
    pairs = PAIRS * TIMES if ALL else chosen(SEED)
    random.Random(SEED).shuffle(pairs)
    only = os.environ.get("MOTORPOOL_SWEEP_ONLY", "")
    if only:
        pairs = [pair for pair in PAIRS if f"{pair[1]}, {pair[0]}" in only.split(";")]
    outcomes = asyncio.run(sweep(pairs, tmp_path, SEED))
    print("\n" + table(outcomes))  # noqa: T201
    assert len(outcomes) == len(pairs)
    assert [one.violations for one in outcomes if one.violations] == []


@pytest.mark.skipif(not ALL, reason="part of the long run")
@pytest.mark.llama
def test_the_same_with_a_real_model(tmp_path: Path, model_file: Path) -> None:
    faults = (Fault.AGENT_KILLED, Fault.AGENT_HANGS, Fault.ENGINE_KILLED, Fault.BROKER_HANGS, Fault.NETWORK_CUT)
    pairs = [(step, fault) for step in (Step.LOADING, Step.MIDDLE) for fault in faults]
    outcomes = asyncio.run(sweep(pairs, tmp_path, SEED, str(model_file)))
    print("\n" + table(outcomes))  # noqa: T201
    assert [one.violations for one in outcomes if one.violations] == []
