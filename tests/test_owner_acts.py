"""What the owner says on the spot: it stops at once, survives a restart, and only "go on" or a drive ends it."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME, ConsentFile, confirm_consent, give_consent
from motorpool.agent.owner import acts
from motorpool.agent.owner.acts import ACTS_NAME, DRIVEN_NAME, FOREVER_MS, HOUR_MS, Acts, ActsFile, load_acts
from motorpool.agent.signals.source import AlwaysParked
from motorpool.core.guard import Budgets, History, Policy, decide
from motorpool.errors import CallerError
from motorpool.trust.consent import ConsentLimits
from motorpool.types import Permit, ReasonCode

NOW_MS = 1_790_000_000_000
LIMITS = ConsentLimits(max_watts_w=100)


def consented(folder: Path) -> ConsentFile:
    give_consent(folder, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 100 * HOUR_MS)
    return ConsentFile(folder / CONSENT_NAME, folder / PUBLIC_NAME, "v1")


def codes(papers: ConsentFile, now_ms: int) -> set[str]:
    """Why the guard says no to a car with which all else is well; empty for a permit."""
    view, history = papers.view(now_ms), History()
    policy = Policy(dwell_ms=0)
    verdict, _ = decide(policy, view, AlwaysParked().read(now_ms), Budgets(), history, now_ms)
    return set() if isinstance(verdict, Permit) else {reason.code for reason in verdict}


def test_a_pause_holds_for_its_time_and_no_longer(tmp_path: Path) -> None:
    papers = consented(tmp_path)
    assert codes(papers, NOW_MS) == set()
    acts.pause(tmp_path, NOW_MS)
    assert papers.view(NOW_MS).paused_until_ms == NOW_MS + HOUR_MS
    assert codes(papers, NOW_MS + HOUR_MS - 1) == {ReasonCode.PAUSED}
    assert codes(papers, NOW_MS + HOUR_MS) == set()


def test_a_second_pause_lengthens_and_never_shortens(tmp_path: Path) -> None:
    acts.pause(tmp_path, NOW_MS, 5 * HOUR_MS)
    assert acts.pause(tmp_path, NOW_MS, HOUR_MS).paused_until_ms == NOW_MS + 5 * HOUR_MS
    assert acts.pause(tmp_path, NOW_MS, 6 * HOUR_MS).paused_until_ms == NOW_MS + 6 * HOUR_MS


@pytest.mark.parametrize("for_ms", [0, -HOUR_MS, 59_999, 7 * 86_400_000 + 1])
def test_a_pause_has_bounds(tmp_path: Path, for_ms: int) -> None:
    with pytest.raises(CallerError, match="a minute to 7 days"):
        acts.pause(tmp_path, NOW_MS, for_ms)
    assert not (tmp_path / ACTS_NAME).exists()


def test_i_need_the_car_holds_until_go_on_across_a_restart(tmp_path: Path) -> None:
    papers = consented(tmp_path)
    acts.need_car(tmp_path, NOW_MS)
    assert codes(papers, NOW_MS + 99 * HOUR_MS) == {ReasonCode.PAUSED}
    assert codes(consented(tmp_path), NOW_MS + 99 * HOUR_MS) == {ReasonCode.PAUSED}
    acts.resume(tmp_path, NOW_MS)
    assert codes(papers, NOW_MS) == set()


def test_i_need_the_car_is_over_once_it_was_driven_and_can_be_said_again(tmp_path: Path) -> None:
    papers = consented(tmp_path)
    said = acts.need_car(tmp_path, NOW_MS)
    acts.car_was_driven(tmp_path, said)
    assert codes(papers, NOW_MS) == set()
    assert load_acts(tmp_path) == Acts()
    acts.need_car(tmp_path, NOW_MS)  # even in the same millisecond
    assert codes(papers, NOW_MS) == {ReasonCode.PAUSED}


def test_a_drive_does_not_end_a_pause(tmp_path: Path) -> None:
    acts.pause(tmp_path, NOW_MS)
    acts.car_was_driven(tmp_path, acts.need_car(tmp_path, NOW_MS))
    assert load_acts(tmp_path) == Acts(paused_until_ms=NOW_MS + HOUR_MS)


def test_go_on_lifts_the_owners_own_pause_and_nothing_else(tmp_path: Path) -> None:
    papers = consented(tmp_path)
    acts.pause(tmp_path, NOW_MS)
    acts.withdraw_here(tmp_path, NOW_MS + 1)
    acts.resume(tmp_path, NOW_MS + 2)
    assert codes(papers, NOW_MS + 2) == {ReasonCode.CONSENT_WITHDRAWN}
    acts.need_car(tmp_path, NOW_MS + 3)
    assert codes(papers, NOW_MS + 3) == {ReasonCode.CONSENT_WITHDRAWN, ReasonCode.PAUSED}


@given(data=st.binary(max_size=200))
def test_a_file_of_acts_that_cannot_be_read_is_a_pause(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ACTS_NAME).write_bytes(data)
        assert load_acts(folder).stopped_until_ms(NOW_MS) == FOREVER_MS


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b'{"\xff":1}',
        b"{}x",
        b'{"paused_until_ms":-1}',
        b'{"unknown":1}',
        b'{"paused_until_ms":0}' + b" " * 5_000,
        b"[1]",
    ],
)
def test_after_a_damaged_file_the_owner_has_to_sign_again(tmp_path: Path, data: bytes) -> None:
    papers = consented(tmp_path)
    (tmp_path / ACTS_NAME).write_bytes(data)
    assert codes(papers, NOW_MS) == {ReasonCode.PAUSED}
    acts.pause(tmp_path, NOW_MS)  # a further act does not make it readable
    assert codes(papers, NOW_MS + 2 * HOUR_MS) == {ReasonCode.PAUSED}
    acts.resume(tmp_path, NOW_MS + 5)
    assert codes(papers, NOW_MS + 6) == {ReasonCode.CONSENT_WITHDRAWN}
    confirm_consent(tmp_path, "v1", now_ms=NOW_MS + 7)
    assert codes(papers, NOW_MS + 8) == set()


def test_a_damaged_word_of_a_drive_keeps_the_car_at_rest(tmp_path: Path) -> None:
    acts.need_car(tmp_path, NOW_MS)
    (tmp_path / DRIVEN_NAME).write_bytes(b"{")
    assert load_acts(tmp_path).need_car_ms == NOW_MS


def test_the_file_is_read_anew_only_when_it_has_changed(tmp_path: Path) -> None:
    look = ActsFile(tmp_path)
    first = look()
    assert look() is first
    acts.pause(tmp_path, NOW_MS)
    second = look()
    assert second.paused_until_ms == NOW_MS + HOUR_MS
    assert look() is second


def test_acts_of_two_programs_at_one_time_are_both_kept(tmp_path: Path) -> None:
    def pauses() -> None:
        for minutes in range(1, 40):
            acts.pause(tmp_path, NOW_MS, minutes * 60_000)

    def needs() -> None:
        for at_ms in range(40):
            acts.need_car(tmp_path, NOW_MS + at_ms)

    threads = [threading.Thread(target=work) for work in (pauses, needs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_acts(tmp_path) == Acts(paused_until_ms=NOW_MS + 39 * 60_000, need_car_ms=NOW_MS + 39)


def test_what_the_owner_says_while_it_is_paused_reaches_the_guard_in_one_view(tmp_path: Path) -> None:
    papers = consented(tmp_path)
    acts.pause(tmp_path, NOW_MS)
    first = papers.view(NOW_MS)
    assert papers.view(NOW_MS + 1) is first  # nothing is made anew four times a second
    assert first.refusal is None
    assert first.max_watts_w == 100
