"""What the owner says by way of the cell: signed papers count, wishes only restrict, no repeat undoes anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME, ConsentFile, enrol_owner, give_consent
from motorpool.agent.owner.acts import ACTS_NAME, load_acts, pause, resume
from motorpool.agent.owner.heard import OwnerEar
from motorpool.errors import TrustError
from motorpool.trust.consent import (
    PURPOSE_COMPUTE,
    ConsentGrant,
    ConsentLimits,
    ConsentWithdrawal,
    create_owner_key,
    grant_consent,
    withdraw_consent,
)
from motorpool.trust.owneraccess import Resume, sign_resume
from motorpool.wire import OwnerAct, OwnerAsked, OwnerDocument

NOW_MS = 1_790_000_000_000
HOUR_MS = 3_600_000


def asked(at_ms: int, *, act: OwnerAct = OwnerAct.PAUSE, for_ms: int = HOUR_MS) -> OwnerAsked:
    return OwnerAsked(act=act, asked_ms=at_ms, until_ms=at_ms + for_ms)


def dated(folder: Path, at_ms: int) -> None:
    """The acts' file as if it had been written then."""
    os.utime(folder / ACTS_NAME, ns=(at_ms * 1_000_000, at_ms * 1_000_000))


def grant(at_ms: int, watts: int = 90) -> ConsentGrant:
    return ConsentGrant(
        vehicle_id="v1",
        purposes=(PURPOSE_COMPUTE,),
        limits=ConsentLimits(max_watts_w=watts),
        granted_ms=at_ms,
        expires_ms=at_ms + 10**10,
    )


def test_a_pause_is_done_once_and_its_repetition_does_not_undo_what_came_after(tmp_path: Path) -> None:
    ear = OwnerEar(tmp_path, "v1")
    assert ear.hear(asked(NOW_MS), NOW_MS)
    assert load_acts(tmp_path).paused_until_ms == NOW_MS + HOUR_MS
    resume(tmp_path, NOW_MS + 1)  # "go on", in the car
    assert not ear.hear(asked(NOW_MS), NOW_MS + 2)
    assert not OwnerEar(tmp_path, "v1").hear(asked(NOW_MS), NOW_MS + 2), "after a restart as well"
    assert load_acts(tmp_path).stopped_until_ms(NOW_MS + 2) == 0
    assert ear.hear(asked(NOW_MS + 3, act=OwnerAct.NEED_CAR), NOW_MS + 3)
    assert load_acts(tmp_path).need_car_ms


def test_a_wish_that_is_nearly_over_changes_nothing(tmp_path: Path) -> None:
    assert not OwnerEar(tmp_path, "v1").hear(asked(NOW_MS), NOW_MS + HOUR_MS - 59_000)
    assert not (tmp_path / ACTS_NAME).exists()


def test_the_end_of_a_pause_needs_the_owners_signature_and_a_later_date(tmp_path: Path) -> None:
    key, stranger = enrol_owner(tmp_path), create_owner_key()
    ear = OwnerEar(tmp_path, "v1")
    ear.hear(asked(NOW_MS), NOW_MS)
    forged = sign_resume(stranger, Resume(vehicle_id="v1", resumed_ms=NOW_MS + 5))
    with pytest.raises(TrustError):
        ear.hear(OwnerDocument(document=forged), NOW_MS + 5)
    early = sign_resume(key, Resume(vehicle_id="v1", resumed_ms=NOW_MS - 5))
    assert not ear.hear(OwnerDocument(document=early), NOW_MS + 5)
    assert load_acts(tmp_path).paused_until_ms
    good = OwnerDocument(document=sign_resume(key, Resume(vehicle_id="v1", resumed_ms=NOW_MS + 5)))
    assert ear.hear(good, NOW_MS + 5)
    assert load_acts(tmp_path).paused_until_ms == 0
    # whoever keeps the paper and plays it again later ends no other pause
    pause(tmp_path, NOW_MS + 6)
    dated(tmp_path, NOW_MS + 6)
    assert not ear.hear(good, NOW_MS + 7)
    later = OwnerDocument(document=sign_resume(key, Resume(vehicle_id="v1", resumed_ms=NOW_MS + 7)))
    assert ear.hear(later, NOW_MS + 7)


def test_signed_papers_are_put_in_place_and_others_change_nothing(tmp_path: Path) -> None:
    key = enrol_owner(tmp_path)
    give_consent(tmp_path, "v1", ConsentLimits(max_watts_w=50), now_ms=NOW_MS, expires_ms=NOW_MS + 10**10)
    papers = ConsentFile(tmp_path / CONSENT_NAME, tmp_path / PUBLIC_NAME, "v1")
    ear = OwnerEar(tmp_path, "v1")
    for bad in (b"", b"{}", grant_consent(create_owner_key(), grant(NOW_MS + 1))):
        with pytest.raises(TrustError):
            ear.hear(OwnerDocument(document=bad), NOW_MS + 1)
    assert papers.view(NOW_MS + 1).max_watts_w == 50
    ear.hear(OwnerDocument(document=grant_consent(key, grant(NOW_MS + 2))), NOW_MS + 2)
    assert papers.view(NOW_MS + 2).max_watts_w == 90
    gone = withdraw_consent(key, ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=NOW_MS + 3))
    ear.hear(OwnerDocument(document=gone), NOW_MS + 3)
    assert papers.view(NOW_MS + 3).refusal is not None
