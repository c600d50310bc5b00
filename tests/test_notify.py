"""What systemd hears from the agent, at a socket of our own in its place."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from motorpool.agent.notify import Notifier

PID = 4242


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as ear:
        ear.bind(str(tmp_path / "notify"))
        yield ear


def address(ear: socket.socket) -> str:
    name = ear.getsockname()
    assert isinstance(name, str)
    return name


def heard(ear: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(ear.recv(4096))
        except BlockingIOError:
            return found


def test_it_says_ready_alive_and_stopping(systemd: socket.socket) -> None:
    told = {"NOTIFY_SOCKET": address(systemd), "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(PID), "HOME": "/"}
    notifier = Notifier.of(told, PID)
    assert told == {"HOME": "/"}  # no child speaks in its name
    notifier.ready()
    notifier.alive(1_000)
    notifier.stopping()
    assert heard(systemd) == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


def test_alive_comes_well_within_the_time_and_no_more_often(systemd: socket.socket) -> None:
    notifier = Notifier(address(systemd), watchdog_ms=10_000)
    times = []
    for now_ms in range(0, 60_000, 250):
        notifier.alive(now_ms)
        times += [now_ms] * len(heard(systemd))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert set(gaps) == {2_500}


def test_a_clock_that_is_set_back_delays_no_word(systemd: socket.socket) -> None:
    notifier = Notifier(address(systemd), watchdog_ms=10_000)
    notifier.alive(1_000_000)
    notifier.alive(5_000)
    assert heard(systemd) == [b"WATCHDOG=1"] * 2


@pytest.mark.parametrize(
    "told",
    [{}, {"WATCHDOG_USEC": "10000000"}, {"NOTIFY_SOCKET": "vsock:2:1234"}, {"NOTIFY_SOCKET": "relative"}],
    ids=["nothing", "no socket", "a socket of a kind that is not meant", "no address"],
)
def test_without_systemd_nothing_happens(told: dict[str, str]) -> None:
    notifier = Notifier.of(told, PID)
    notifier.ready()
    notifier.alive(0)
    notifier.stopping()


@pytest.mark.parametrize("told", [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "7"}])
def test_a_watchdog_that_is_off_or_somebody_elses_hears_nothing(systemd: socket.socket, told: dict[str, str]) -> None:
    notifier = Notifier.of(told | {"NOTIFY_SOCKET": address(systemd)}, PID)
    notifier.alive(0)
    assert heard(systemd) == []


def test_an_abstract_address_is_one_of_the_kernels() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as ear:
        ear.bind("")  # the kernel chooses an abstract one
        name = ear.getsockname()
        Notifier("@" + name[1:].decode()).ready()
        assert heard(ear) == [b"READY=1"]


def test_a_systemd_that_does_not_listen_holds_nobody_up(tmp_path: Path, systemd: socket.socket) -> None:
    Notifier(str(tmp_path / "nobody")).ready()
    notifier = Notifier(address(systemd), watchdog_ms=4)
    for now_ms in range(10_000):  # far more than its queue holds
        notifier.alive(now_ms)
    assert len(heard(systemd)) < 10_000
