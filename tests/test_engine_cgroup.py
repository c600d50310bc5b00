"""The engine's control group: what is written where, on a folder that looks like one and on the real thing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.engine_trial import Trial, chat, work

from motorpool.agent.runtime import Backend, EngineSpec
from motorpool.agent.runtime.cgroup import LEAF, PREFIX, Group, Place, find_place
from motorpool.agent.runtime.engine import Progressed
from motorpool.agent.runtime.hosted import HostedEngine, Places
from motorpool.agent.runtime.limits import By, cpu_ms_of
from motorpool.core.energy import Limits

V1 = "9:name=systemd:/\n4:memory:/elsewhere\n"
NOBODY = 65_534
GONE_PID = 2**30  # more than the kernel hands out


def fake_proc(folder: Path, mount: Path, own: str, root: str = "/") -> Path:
    """A /proc that says where the tree is mounted and where we are in it."""
    (folder / "self").mkdir(parents=True)
    (folder / "self" / "cgroup").write_text(f"{V1}0::{own}\n")
    (folder / "self" / "mountinfo").write_text(
        "31 20 0:25 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "40 31 0:37 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
        f"41 31 0:38 {root} {mount} rw,relatime - cgroup2 cgroup2 rw\n"
    )
    return folder


def fake_tree(folder: Path, controllers: str = "cpuset cpu io memory pids") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.controllers").write_text(f"{controllers}\n")
    (folder / "cgroup.procs").write_text("")
    (folder / "cgroup.subtree_control").write_text("")
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Place:
    tree = fake_tree(tmp_path / "tree")
    return Place(parent=tree, home=tree)


def said(group: Group, name: str) -> str:
    return (group.path / name).read_text()


# -- whose place it is -------------------------------------------------------------------------------------------------


def test_the_root_that_we_see_is_ours_also_beside_groups_of_the_first_version(tmp_path: Path) -> None:
    tree = fake_tree(tmp_path / "tree")
    assert find_place(fake_proc(tmp_path / "proc", tree, "/")) == Place(parent=tree, home=tree)


def test_a_group_that_nobody_gave_us_is_not_ours(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    fake_tree(tree / "system.slice/some.service")
    assert find_place(fake_proc(tmp_path / "proc", tree, "/system.slice/some.service")) is None


def test_a_group_that_systemd_delegated_is_ours(tmp_path: Path) -> None:
    service = fake_tree(tmp_path / "tree/system.slice/motorpool-agent.service")
    try:
        os.setxattr(service, "user.delegate", b"1")
    except OSError:
        pytest.skip("the file system of the tests keeps no marks on folders")
    proc = fake_proc(tmp_path / "proc", tmp_path / "tree", "/system.slice/motorpool-agent.service")
    assert find_place(proc) == Place(parent=service, home=service)
    leaf = service / LEAF  # where systemd or an earlier start has put the agent
    leaf.mkdir()
    again = fake_proc(tmp_path / "proc2", tmp_path / "tree", f"/system.slice/motorpool-agent.service/{LEAF}")
    assert find_place(again) == Place(parent=service, home=leaf)


def test_a_service_group_that_belongs_to_our_user_is_ours_and_one_of_a_desktop_session_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    for number, (own, ours) in enumerate({"/system.slice/m.service": True, "/user.slice/m.service": False}.items()):
        group = fake_tree(tmp_path / "tree" / own.lstrip("/"))
        if os.geteuid() == NOBODY:
            os.chown(group, NOBODY, NOBODY)
        found = find_place(fake_proc(tmp_path / f"proc{number}", tmp_path / "tree", own))
        assert (found is not None) == ours


@pytest.mark.parametrize(("own", "root"), [("/", "/part"), ("/a (deleted)", "/"), ("/../b", "/")])
def test_a_tree_that_shows_only_a_part_is_left_alone(tmp_path: Path, own: str, root: str) -> None:
    assert find_place(fake_proc(tmp_path / "proc", fake_tree(tmp_path / "tree"), own, root)) is None


def test_a_machine_without_such_a_tree_has_no_place(tmp_path: Path) -> None:
    assert find_place(tmp_path) is None
    assert find_place(fake_proc(tmp_path / "proc", tmp_path / "nowhere", "/")) is None


def test_a_place_that_was_prepared_for_us_is_taken(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    service = fake_tree(tree / "system.slice/some.service")
    prepared = fake_tree(tree / "motorpool.slice")
    found = find_place(fake_proc(tmp_path / "proc", tree, "/system.slice/some.service"), prepared)
    assert found == Place(parent=prepared, home=service)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_group_holds_memory_swap_tasks_and_priority(place: Place) -> None:
    group = Group.make(place)
    assert group is not None
    assert (place.parent / "cgroup.subtree_control").read_text() == "+memory +cpu +pids"
    assert group.controllers == {"memory", "cpu", "pids"}
    holds = group.confine(memory_bytes=500_000_000, tasks=70, idle=True)
    expected = {
        "memory.max": "500000000",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "70",
        "cpu.weight": "1",
        "cpu.idle": "1",
    }
    assert holds == set(expected)
    assert {name: said(group, name) for name in expected} == expected


def test_what_is_not_asked_for_is_not_written(place: Place) -> None:
    group = Group.make(place)
    assert group is not None
    assert group.confine(memory_bytes=0, tasks=0, idle=False) == {"memory.swap.max", "memory.oom.group"}
    assert sorted(path.name for path in group.path.iterdir()) == ["memory.oom.group", "memory.swap.max"]


def test_what_the_kernel_refuses_does_not_count(place: Place) -> None:
    group = Group.make(place)
    assert group is not None
    (group.path / "memory.swap.max").mkdir()  # no file that takes a value
    assert "memory.swap.max" not in group.confine(memory_bytes=1, tasks=1, idle=False)


def test_limits_that_are_not_offered_are_not_claimed(tmp_path: Path) -> None:
    tree = fake_tree(tmp_path / "tree", controllers="hugetlb")
    group = Group.make(Place(parent=tree, home=tree))
    assert group is not None
    assert group.confine(memory_bytes=1, tasks=1, idle=True) == frozenset()
    assert not group.limit_processor(1.0)


@pytest.mark.parametrize(
    ("cores", "text"), [(None, "max 100000"), (2.0, "200000 100000"), (0.5, "50000 100000"), (0.0001, "1000 100000")]
)
def test_processor_time_is_held_in_periods(place: Place, cores: float | None, text: str) -> None:
    group = Group.make(place)
    assert group is not None
    assert group.limit_processor(cores)
    assert said(group, "cpu.max") == text


def test_the_agent_steps_aside_where_its_own_group_cannot_share_out(place: Place) -> None:
    switch = place.parent / "cgroup.subtree_control"
    switch.unlink()
    switch.mkdir()  # takes no value, as the kernel's does while there are processes in the group
    group = Group.make(place)
    assert group is not None
    assert (place.parent / LEAF / "cgroup.procs").read_text() == str(os.getpid())
    assert place.home_now() == place.parent / LEAF
    assert group.controllers == frozenset()


def test_what_dead_agents_left_is_removed_and_what_living_ones_have_is_not(place: Place) -> None:
    dead = place.parent / f"{PREFIX}{GONE_PID}-0"
    alive = place.parent / f"{PREFIX}{os.getppid()}-0"
    dead.mkdir()
    alive.mkdir()
    assert Group.make(place) is not None
    assert not dead.exists()
    assert alive.exists()


def test_a_group_that_cannot_be_made_is_none(place: Place) -> None:
    nowhere = place.parent / "cgroup.procs" / "below"
    assert Group.make(Place(parent=nowhere, home=nowhere)) is None


def test_processor_time_is_still_known_when_the_group_is_gone(place: Place) -> None:
    group = Group.make(place)
    assert group is not None
    assert group.cpu_ms() == 0
    (group.path / "cpu.stat").write_text("usage_usec 1234567\nuser_usec 1\n")
    assert group.cpu_ms() == 1234
    (group.path / "cpu.stat").unlink()
    assert group.remove()
    assert group.remove()  # twice is once
    assert group.cpu_ms() == 1234


# -- an engine in one --------------------------------------------------------------------------------------------------


def null(**fields: Any) -> EngineSpec:
    return EngineSpec(backend=Backend.NULL, model="null", slots=2, rate_tokens_per_s=400.0, **fields)


def test_an_engine_is_put_in_and_held_and_stopped_and_ended_through_it(place: Place) -> None:
    async def run() -> None:
        engine = HostedEngine(null(memory_bytes=10**9, silence_s=600.0), Places(groups=place, memory=()))
        engine.limit(Limits(watts_w=20, threads=1, duty=0.5, slots=1, memory_bytes=7 * 10**8))
        t = Trial(engine)
        await t.start()
        (folder,) = place.parent.glob(f"{PREFIX}*")
        assert (folder / "cgroup.procs").read_text() == str(engine.pid)
        assert (folder / "memory.max").read_text() == str(7 * 10**8)  # the smaller one
        assert (folder / "cpu.max").read_text() == "50000 100000"
        assert not (folder / "cpu.idle").exists()  # the null engine gives way to nobody
        engine.limit(Limits(watts_w=20, threads=1, duty=0.25, slots=1))
        assert (folder / "cpu.max").read_text() == "25000 100000"
        isolation = engine.isolation
        assert isolation is not None
        assert isolation.memory is isolation.swap is isolation.processor is isolation.stopping is By.CGROUP
        assert "memory: control group" in isolation.line()
        engine.freeze()
        assert (folder / "cgroup.freeze").read_text() == "1"
        engine.thaw()
        assert (folder / "cgroup.freeze").read_text() == "0"
        await t.ask(chat("it runs", max_tokens=3))
        engine.kill()
        assert (folder / "cgroup.kill").read_text() == "1"
        await engine.close()

    asyncio.run(run())


def test_a_duty_of_nothing_stops_an_engine_that_the_kernel_would_let_run_a_little(place: Place) -> None:
    async def run() -> None:
        engine = HostedEngine(null(), Places(groups=place, memory=()))
        t = Trial(engine)
        await t.start()
        assert engine.pid is not None
        engine.limit(Limits(watts_w=0, threads=1, duty=0.0, slots=1))
        process = psutil.Process(engine.pid)
        meanwhile = Trial(HostedEngine(null(), Places(groups=None, memory=())))
        await meanwhile.start()
        await meanwhile.ask(chat("time passes", max_tokens=20))
        assert process.status() == psutil.STATUS_STOPPED
        engine.limit(Limits(watts_w=9, threads=1, duty=1.0, slots=1))
        await t.ask(chat("it runs", max_tokens=3))
        await engine.close()
        await meanwhile.engine.close()

    asyncio.run(run())


# -- the real thing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Iterator[Place]:
    found = find_place()
    if found is None:
        pytest.skip("no control groups here that are ours to divide; the tests above have shown what is written")
    yield found
    assert not list(found.parent.glob(f"{PREFIX}{os.getpid()}-*"))


SPIN = "setsid sh -c 'while :; do :; done' & echo $!; while :; do :; done"


def test_freezing_and_ending_reach_what_has_left_the_process_group(real: Place) -> None:
    group = Group.make(real)
    assert group is not None
    shell = subprocess.Popen(["sh", "-c", "read go; " + SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert shell.stdin is not None
    assert shell.stdout is not None
    try:
        assert group.add(shell.pid)
        shell.stdin.write(b"go\n")
        shell.stdin.flush()
        strayed = psutil.Process(int(shell.stdout.readline()))
        while cpu_ms_of(strayed.pid) < 50:
            psutil.wait_procs([strayed], timeout=0.02)
        os.killpg(os.getpgid(strayed.pid), signal.SIGCONT)  # it is in a group of its own
        assert os.getpgid(strayed.pid) != os.getpgid(shell.pid)
        assert group.freeze(True)
        events = group.path / "cgroup.events"
        while "frozen 1" not in events.read_text():
            psutil.wait_procs([strayed], timeout=0.01)
        before = (cpu_ms_of(shell.pid), cpu_ms_of(strayed.pid))
        psutil.wait_procs([strayed], timeout=0.3)
        assert (cpu_ms_of(shell.pid), cpu_ms_of(strayed.pid)) == before
        assert group.cpu_ms() >= 50
        assert group.kill()  # frozen or not
        assert shell.wait(10) == -signal.SIGKILL
        while strayed.is_running() and strayed.status() != psutil.STATUS_ZOMBIE:
            psutil.wait_procs([strayed], timeout=0.01)
        while not group.remove():
            psutil.wait_procs([strayed], timeout=0.01)
    finally:
        group.kill()
        shell.kill()
        shell.wait()
        shell.stdin.close()
        shell.stdout.close()


def test_an_engine_lives_in_a_group_of_its_own_and_its_watcher_does_not(real: Place) -> None:
    async def run() -> None:
        engine = HostedEngine(null(silence_s=600.0), Places(groups=real, memory=()))
        t = Trial(engine)
        await t.start()
        assert engine.pid is not None
        (folder,) = real.parent.glob(f"{PREFIX}{os.getpid()}-*")
        assert (folder / "cgroup.procs").read_text().split() == [str(engine.pid)]
        (watcher,) = psutil.Process(engine.pid).children()
        assert os.getpgid(watcher.pid) != os.getpgid(engine.pid)
        engine.submit([work(chat("long", max_tokens=1_000), stream=True)])
        await t.until(lambda: t.of(Progressed))
        engine.freeze()
        while "frozen 1" not in (folder / "cgroup.events").read_text():  # noqa: ASYNC110  # the kernel tells nobody
            await asyncio.sleep(0)
        seen = len(t.events)
        engine.thaw()
        await t.until(lambda: len(t.events) > seen)
        engine.freeze()
        pid = engine.pid
        await engine.close()
        assert not psutil.pid_exists(pid)
        assert not folder.exists()

    asyncio.run(run())
