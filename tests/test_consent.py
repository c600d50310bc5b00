"""The owner's consent: what holds, and everything that must not."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from motorpool.agent.enrolment import (
    CONSENT_NAME,
    PRIVATE_NAME,
    PUBLIC_NAME,
    WITHDRAWAL_NAME,
    ConsentFile,
    enrol_owner,
    give_consent,
    take_consent_back,
)
from motorpool.errors import SetupError, TrustError
from motorpool.trust.consent import (
    MAX_DOCUMENT_BYTES,
    ConsentGrant,
    ConsentLimits,
    ConsentWithdrawal,
    check_consent,
    create_owner_key,
    grant_consent,
    owner_key,
    withdraw_consent,
)
from motorpool.types import ReasonCode

NOW_MS = 1_790_000_000_000
KEY = create_owner_key()
LIMITS = ConsentLimits(max_watts_w=150, floor_pct=25.0, ready_by_minute=450, target_pct=80.0)
GRANT = ConsentGrant(
    vehicle_id="v1", purposes=("compute",), limits=LIMITS, granted_ms=NOW_MS, expires_ms=NOW_MS + 1_000
)
SIGNED = grant_consent(KEY, GRANT)


def refusal(data: bytes | None, now_ms: int = NOW_MS, **options: Any) -> ReasonCode | None:
    return check_consent(data, KEY.public, "v1", now_ms, **options).refusal


def changed(**changes: Any) -> bytes:
    return grant_consent(KEY, msgspec.structs.replace(GRANT, **changes))


def test_a_genuine_grant_holds_until_its_end_and_carries_its_limits() -> None:
    verdict = check_consent(SIGNED, KEY.public, "v1", NOW_MS)
    assert verdict.valid
    assert verdict.grant == GRANT
    view = verdict.view()
    assert (view.refusal, view.max_watts_w, view.floor_pct) == (None, 150, 25.0)
    assert (view.ready_by_minute, view.target_pct, view.expires_ms) == (450, 80.0, NOW_MS + 1_000)
    assert refusal(SIGNED, NOW_MS + 999) is None
    assert refusal(SIGNED, NOW_MS + 1_000) == ReasonCode.CONSENT_EXPIRED


def test_nothing_is_missing_consent() -> None:
    assert refusal(None) == ReasonCode.CONSENT_MISSING
    assert check_consent(SIGNED, None, "v1", NOW_MS).refusal == ReasonCode.CONSENT_MISSING
    assert check_consent(None, KEY.public, "v1", NOW_MS).view().max_watts_w == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"null",
        b"\xff\xfe",
        b'{"document":"{}","signature":""}',
        b'{"document":"{}","signature":"***"}',
        SIGNED + b" " * MAX_DOCUMENT_BYTES,
        changed(vehicle_id="v2"),
        changed(purposes=("marketing",)),
        changed(granted_ms=NOW_MS + 61_000, expires_ms=NOW_MS + 99_000),
        grant_consent(create_owner_key(), GRANT),
    ],
)
def test_what_is_not_the_owners_own_word_for_this_vehicle_is_invalid(data: bytes) -> None:
    assert refusal(data) == ReasonCode.CONSENT_INVALID


def test_a_grant_that_could_never_hold_is_not_signed() -> None:
    for changes in ({"expires_ms": NOW_MS}, {"limits": ConsentLimits(max_watts_w=0)}, {"purposes": ()}):
        with pytest.raises(TrustError):
            changed(**changes)


def test_a_withdrawal_takes_back_earlier_grants_for_good() -> None:
    withdrawn = withdraw_consent(KEY, ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=NOW_MS + 10))
    verdict = check_consent(withdrawn, KEY.public, "v1", NOW_MS + 10)
    assert (verdict.refusal, verdict.withdrawn_ms) == (ReasonCode.CONSENT_WITHDRAWN, NOW_MS + 10)
    assert refusal(SIGNED, NOW_MS + 20, withdrawn_ms=NOW_MS + 10) == ReasonCode.CONSENT_WITHDRAWN
    assert refusal(changed(granted_ms=NOW_MS + 11), NOW_MS + 20, withdrawn_ms=NOW_MS + 10) is None


def test_a_signature_is_for_a_consent_alone() -> None:
    document = msgspec.json.decode(SIGNED)["document"]
    bare = Ed25519PrivateKey.from_private_bytes(KEY.private).sign(document.encode())
    forged = msgspec.json.encode({"document": document, "signature": base64.b64encode(bare).decode()})
    assert refusal(forged) == ReasonCode.CONSENT_INVALID


@given(at=st.integers(0, len(SIGNED) - 1), bit=st.integers(0, 7))
def test_no_changed_bit_makes_another_consent(at: int, bit: int) -> None:
    data = bytearray(SIGNED)
    data[at] ^= 1 << bit
    verdict = check_consent(bytes(data), KEY.public, "v1", NOW_MS)
    assert verdict.refusal == ReasonCode.CONSENT_INVALID or verdict.grant == GRANT


@given(data=st.binary(max_size=400))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    assert refusal(data) == ReasonCode.CONSENT_INVALID


def test_keys_are_checked_and_never_shown() -> None:
    assert owner_key(KEY.private) == KEY
    with pytest.raises(TrustError):
        owner_key(b"short")
    assert KEY.private.hex() not in repr(KEY)
    assert str(KEY.private) not in repr(KEY)


def test_the_papers_in_the_agents_folder(tmp_path: Path) -> None:
    key = enrol_owner(tmp_path)
    assert enrol_owner(tmp_path) == key
    assert (tmp_path / PRIVATE_NAME).stat().st_mode & 0o777 == 0o600
    papers = ConsentFile(tmp_path / CONSENT_NAME, tmp_path / PUBLIC_NAME, "v1")
    assert papers.view(NOW_MS).refusal == ReasonCode.CONSENT_MISSING
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 1_000)
    assert papers.view(NOW_MS).refusal is None
    assert papers.view(NOW_MS + 1_000).refusal == ReasonCode.CONSENT_EXPIRED
    granted = (tmp_path / CONSENT_NAME).read_bytes()
    take_consent_back(tmp_path, "v1", now_ms=NOW_MS + 10)
    assert papers.view(NOW_MS + 20).refusal == ReasonCode.CONSENT_WITHDRAWN
    (tmp_path / CONSENT_NAME).write_bytes(granted)  # somebody puts the old grant back
    assert papers.view(NOW_MS + 20).refusal == ReasonCode.CONSENT_WITHDRAWN
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS + 30, expires_ms=NOW_MS + 1_000)
    assert papers.view(NOW_MS + 40).refusal is None
    (tmp_path / CONSENT_NAME).unlink()
    assert papers.view(NOW_MS + 40).refusal == ReasonCode.CONSENT_MISSING


def test_an_enrolment_that_was_cut_off_between_its_files_is_finished_by_the_next_one(tmp_path: Path) -> None:
    key = enrol_owner(tmp_path)
    (tmp_path / PUBLIC_NAME).unlink()
    assert enrol_owner(tmp_path) == key
    assert (tmp_path / PUBLIC_NAME).read_bytes() == key.public
    (tmp_path / PUBLIC_NAME).unlink()
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 1_000)
    assert papers_of(tmp_path).view(NOW_MS).refusal is None


def papers_of(folder: Path) -> ConsentFile:
    """As an agent that has just been started reads them."""
    return ConsentFile(folder / CONSENT_NAME, folder / PUBLIC_NAME, "v1")


@pytest.mark.parametrize("signed_on", ["this machine", "another device"])
def test_a_grant_that_was_taken_back_stays_so_when_the_agent_is_started_again(tmp_path: Path, signed_on: str) -> None:
    key = enrol_owner(tmp_path)
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 10_000)
    granted = (tmp_path / CONSENT_NAME).read_bytes()
    if signed_on == "this machine":  # perhaps while no agent ran
        take_consent_back(tmp_path, "v1", now_ms=NOW_MS + 10)
    else:
        document = withdraw_consent(key, ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=NOW_MS + 10))
        (tmp_path / CONSENT_NAME).write_bytes(document)
        assert papers_of(tmp_path).view(NOW_MS + 10).refusal == ReasonCode.CONSENT_WITHDRAWN
    (tmp_path / CONSENT_NAME).write_bytes(granted)  # somebody puts the old grant back
    assert papers_of(tmp_path).view(NOW_MS + 20).refusal == ReasonCode.CONSENT_WITHDRAWN
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS + 30, expires_ms=NOW_MS + 10_000)
    assert papers_of(tmp_path).view(NOW_MS + 40).refusal is None


def test_only_the_owner_can_leave_a_withdrawal_behind(tmp_path: Path) -> None:
    enrol_owner(tmp_path)
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 10_000)
    stranger = withdraw_consent(create_owner_key(), ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=NOW_MS + 10))
    for data in (stranger, b"", b"not a paper", (tmp_path / CONSENT_NAME).read_bytes()):
        (tmp_path / WITHDRAWAL_NAME).write_bytes(data)
        assert papers_of(tmp_path).view(NOW_MS + 20).refusal is None


def test_an_older_withdrawal_does_not_replace_a_newer_one(tmp_path: Path) -> None:
    key = enrol_owner(tmp_path)
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS + 20, expires_ms=NOW_MS + 10_000)
    granted = (tmp_path / CONSENT_NAME).read_bytes()
    take_consent_back(tmp_path, "v1", now_ms=NOW_MS + 30)
    older = withdraw_consent(key, ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=NOW_MS + 10))
    (tmp_path / CONSENT_NAME).write_bytes(older)
    assert papers_of(tmp_path).view(NOW_MS + 40).refusal == ReasonCode.CONSENT_WITHDRAWN
    (tmp_path / CONSENT_NAME).write_bytes(granted)
    assert papers_of(tmp_path).view(NOW_MS + 50).refusal == ReasonCode.CONSENT_WITHDRAWN


def test_a_clock_that_was_set_back_neither_spares_a_grant_nor_spoils_the_next_one(tmp_path: Path) -> None:
    enrol_owner(tmp_path)
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 10_000)
    granted = (tmp_path / CONSENT_NAME).read_bytes()
    take_consent_back(tmp_path, "v1", now_ms=NOW_MS - 500)
    (tmp_path / CONSENT_NAME).write_bytes(granted)
    assert papers_of(tmp_path).view(NOW_MS).refusal == ReasonCode.CONSENT_WITHDRAWN
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS - 400, expires_ms=NOW_MS + 10_000)
    assert papers_of(tmp_path).view(NOW_MS).refusal is None


def test_a_folder_that_cannot_be_written_does_not_stop_a_withdrawal(tmp_path: Path) -> None:
    key = enrol_owner(tmp_path)
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 10_000)
    papers = papers_of(tmp_path)
    (tmp_path / (WITHDRAWAL_NAME + ".part")).mkdir()  # stands for a full or read-only disk, for root as well
    document = withdraw_consent(key, ConsentWithdrawal(vehicle_id="v1", withdrawn_ms=NOW_MS + 10))
    (tmp_path / CONSENT_NAME).write_bytes(document)
    assert papers.view(NOW_MS + 20).refusal == ReasonCode.CONSENT_WITHDRAWN


def test_an_owner_may_be_enrolled_while_the_agent_runs(tmp_path: Path) -> None:
    papers = papers_of(tmp_path)
    assert papers.view(NOW_MS).refusal == ReasonCode.CONSENT_MISSING
    enrol_owner(tmp_path)
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 10_000)
    assert papers.view(NOW_MS).refusal is None


def test_an_owner_whose_key_is_elsewhere_is_not_replaced(tmp_path: Path) -> None:
    enrol_owner(tmp_path)
    (tmp_path / PRIVATE_NAME).unlink()
    with pytest.raises(SetupError, match="owner's device"):
        enrol_owner(tmp_path)
