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
    confirm_consent,
    enrol_owner,
    enrol_public_key,
    give_consent,
    place_consent,
    take_consent_back,
)
from motorpool.agent.enrolment import papers as told_papers
from motorpool.core.budgets import BudgetLimits
from motorpool.core.policy import MAX_WISHES, ConsentView, Quiet, ReadyBy
from motorpool.errors import ConflictError, SetupError, TrustError
from motorpool.trust.consent import (
    DOMAIN,
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


# -- limits ------------------------------------------------------------------------------------------------------------

FULL = ConsentLimits(
    max_watts_w=150,
    schedule=(ReadyBy(weekdays=31, minute=450, target_pct=80.0), ReadyBy(weekdays=96, minute=600, target_pct=60.0)),
    quiet=(Quiet(weekdays=127, from_minute=1320, to_minute=360),),
    share_while_charging=True,
    battery_watts_w=60,
    battery_floor_pct=55.0,
    budgets=BudgetLimits(compute_h_week=20.0, metered_bytes_month=5_000_000),
)


def signed_text(text: str) -> bytes:
    """A paper that says ``text``, signed by the owner, as another program might have made it."""
    signature = Ed25519PrivateKey.from_private_bytes(KEY.private).sign(DOMAIN + text.encode())
    return msgspec.json.encode({"document": text, "signature": base64.b64encode(signature).decode()})


def with_limits(**limits: Any) -> bytes:
    document = msgspec.to_builtins(GRANT)
    document["limits"] |= limits
    return signed_text(msgspec.json.encode(document).decode())


def test_every_limit_reaches_the_guard() -> None:
    view = check_consent(changed(limits=FULL), KEY.public, "v1", NOW_MS).view()
    assert view == ConsentView(
        refusal=None,
        granted_ms=NOW_MS,
        expires_ms=NOW_MS + 1_000,
        max_watts_w=150,
        floor_pct=30.0,
        ready_by_minute=None,
        target_pct=80.0,
        schedule=FULL.schedule,
        quiet=FULL.quiet,
        share_while_charging=True,
        battery_watts_w=60,
        battery_floor_pct=55.0,
        limits=FULL.budgets,
    )


def test_a_paper_of_an_earlier_version_holds_with_the_careful_defaults() -> None:
    text = (
        '{"type":"grant","vehicle_id":"v1","purposes":["compute"],"limits":{"max_watts_w":100,"floor_pct":40.0,'
        f'"ready_by_minute":null,"target_pct":80.0}},"granted_ms":{NOW_MS},"expires_ms":{NOW_MS + 1000}}}'
    )
    view = check_consent(signed_text(text), KEY.public, "v1", NOW_MS).view()
    assert (view.refusal, view.floor_pct, view.battery_watts_w, view.share_while_charging) == (None, 40.0, 0, False)
    assert (view.schedule, view.quiet, view.limits) == ((), (), BudgetLimits())


ODD: list[dict[str, Any]] = [
    {"max_watts_w": -5},
    {"max_watts_w": 1 << 40},
    {"floor_pct": 101},
    {"floor_pct": -1},
    {"target_pct": 1e300},
    {"ready_by_minute": 1440},
    {"ready_by_minute": -1},
    {"battery_watts_w": -1},
    {"battery_floor_pct": 200},
    {"schedule": [{"weekdays": 0, "minute": 1, "target_pct": 1}]},
    {"schedule": [{"weekdays": 128, "minute": 1, "target_pct": 1}]},
    {"schedule": [{"weekdays": 1, "minute": 2000, "target_pct": 1}]},
    {"schedule": [{"weekdays": 1, "minute": 1, "target_pct": 101}]},
    {"schedule": [{"weekdays": 1, "minute": 1}] * (MAX_WISHES + 1)},
    {"quiet": [{"weekdays": 1, "from_minute": 1, "to_minute": 1440}]},
    {"budgets": {"compute_h_week": 169}},
    {"budgets": {"battery_wh_week": -0.5}},
    {"budgets": {"flash_bytes_month": 1 << 60}},
    {"max_watts_w": None},
    {"floor_pct": None},  # what NaN becomes in JSON
]


@pytest.mark.parametrize("limits", ODD, ids=str)
def test_a_signed_limit_that_makes_no_sense_is_no_consent(limits: dict[str, Any]) -> None:
    assert refusal(with_limits()) is None
    assert refusal(with_limits(**limits)) == ReasonCode.CONSENT_INVALID


@pytest.mark.parametrize(
    "limits",
    [
        {"cabin_limit_c": 30},
        {"budgets": {"rides_week": 3}},
        {"schedule": [{"minute": 1, "season": "winter"}]},
        {"quiet": [{"from_minute": 1, "to_minute": 2, "loudness": 3}]},
    ],
    ids=str,
)
def test_a_bound_that_this_program_does_not_know_is_not_passed_over(limits: dict[str, Any]) -> None:
    assert refusal(with_limits(**limits)) == ReasonCode.CONSENT_INVALID


@pytest.mark.parametrize("field", ["floor_pct", "target_pct", "battery_floor_pct"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 100.5])
def test_a_limit_that_makes_no_sense_is_not_signed(field: str, value: float) -> None:
    with pytest.raises(TrustError, match="must be from 0 to 100"):
        changed(limits=msgspec.structs.replace(FULL, **{field: value}))


def test_a_grant_that_holds_back_a_class_of_data_which_leaves_the_car_does_not_hold() -> None:
    document = msgspec.to_builtins(GRANT)
    document["data_classes"] = ["energy"]
    assert refusal(signed_text(msgspec.json.encode(document).decode())) == ReasonCode.CONSENT_INVALID


@given(
    limits=st.builds(
        ConsentLimits,
        max_watts_w=st.integers(-10, 200_000),
        floor_pct=st.floats(),
        target_pct=st.floats(),
        ready_by_minute=st.none() | st.integers(-2, 1500),
        battery_watts_w=st.integers(-10, 10),
        battery_floor_pct=st.floats(),
    )
)
def test_what_can_be_signed_can_be_read_and_holds(limits: ConsentLimits) -> None:
    try:
        data = changed(limits=limits)
    except TrustError:
        return
    assert check_consent(data, KEY.public, "v1", NOW_MS).grant == msgspec.structs.replace(GRANT, limits=limits)


# -- the newest word counts --------------------------------------------------------------------------------------------


def test_an_older_grant_with_wider_limits_does_not_follow_a_newer_one(tmp_path: Path) -> None:
    enrol_owner(tmp_path)
    papers = papers_of(tmp_path)
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 10_000)
    wide = (tmp_path / CONSENT_NAME).read_bytes()
    assert papers.view(NOW_MS).floor_pct == 25.0
    narrow = msgspec.structs.replace(LIMITS, floor_pct=70.0)
    give_consent(tmp_path, "v1", narrow, now_ms=NOW_MS + 1, expires_ms=NOW_MS + 10_000)
    assert papers.view(NOW_MS + 2).floor_pct == 70.0
    newest = (tmp_path / CONSENT_NAME).read_bytes()
    (tmp_path / CONSENT_NAME).write_bytes(wide)  # somebody puts it back, to lower the floor
    assert papers.view(NOW_MS + 3).refusal == ReasonCode.CONSENT_INVALID
    assert papers_of(tmp_path).view(NOW_MS + 3).refusal == ReasonCode.CONSENT_INVALID  # after a restart as well
    (tmp_path / CONSENT_NAME).write_bytes(newest)
    assert papers.view(NOW_MS + 4).floor_pct == 70.0


def test_a_confirmation_is_the_same_consent_with_a_newer_date(tmp_path: Path) -> None:
    enrol_owner(tmp_path)
    give_consent(tmp_path, "v1", FULL, now_ms=NOW_MS, expires_ms=NOW_MS + 10_000)
    before = papers_of(tmp_path).view(NOW_MS)
    confirm_consent(tmp_path, "v1", now_ms=NOW_MS + 500)
    after = papers_of(tmp_path).view(NOW_MS + 500)
    assert after == msgspec.structs.replace(before, granted_ms=NOW_MS + 500)
    with pytest.raises(ConflictError, match="no consent to confirm"):
        confirm_consent(tmp_path, "v1", now_ms=NOW_MS + 10_000)


def test_a_grant_from_the_future_does_not_keep_the_owner_from_giving_a_right_one(tmp_path: Path) -> None:
    enrol_owner(tmp_path)
    year_ms = 365 * 86_400_000
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS + year_ms, expires_ms=NOW_MS + 2 * year_ms)
    assert papers_of(tmp_path).view(NOW_MS).refusal == ReasonCode.CONSENT_INVALID
    give_consent(tmp_path, "v1", LIMITS, now_ms=NOW_MS, expires_ms=NOW_MS + 1_000)
    assert papers_of(tmp_path).view(NOW_MS).refusal is None


# -- an owner whose key is on a phone ----------------------------------------------------------------------------------


def test_a_phones_key_is_enrolled_once_and_its_papers_are_taken(tmp_path: Path) -> None:
    phone, stranger = create_owner_key(), create_owner_key()
    enrol_public_key(tmp_path, phone.public)
    enrol_public_key(tmp_path, phone.public)
    with pytest.raises(ConflictError, match="has an owner already"):
        enrol_public_key(tmp_path, stranger.public)
    with pytest.raises(TrustError):
        enrol_public_key(tmp_path, b"short")
    assert (tmp_path / PUBLIC_NAME).read_bytes() == phone.public
    place_consent(tmp_path, "v1", grant_consent(phone, GRANT), now_ms=NOW_MS)
    assert papers_of(tmp_path).view(NOW_MS).refusal is None
    for refused in (
        grant_consent(stranger, GRANT),
        grant_consent(phone, msgspec.structs.replace(GRANT, vehicle_id="v2")),
        grant_consent(phone, msgspec.structs.replace(GRANT, granted_ms=NOW_MS - 1)),
        b"nothing",
    ):
        with pytest.raises(TrustError, match="does not hold"):
            place_consent(tmp_path, "v1", refused, now_ms=NOW_MS)
    assert papers_of(tmp_path).view(NOW_MS).refusal is None  # what was in place stays


def test_taking_back_needs_no_key_and_only_a_new_signature_undoes_it(tmp_path: Path) -> None:
    phone = create_owner_key()
    enrol_public_key(tmp_path, phone.public)
    place_consent(tmp_path, "v1", grant_consent(phone, GRANT), now_ms=NOW_MS)
    papers = papers_of(tmp_path)
    assert papers.view(NOW_MS).refusal is None
    take_consent_back(tmp_path, "v1", now_ms=NOW_MS - 50)  # by a clock that is behind
    assert papers.view(NOW_MS + 1).refusal == ReasonCode.CONSENT_WITHDRAWN
    assert papers_of(tmp_path).view(NOW_MS + 1).refusal == ReasonCode.CONSENT_WITHDRAWN
    with pytest.raises(TrustError):
        place_consent(tmp_path, "v1", grant_consent(phone, GRANT), now_ms=NOW_MS + 1)
    newer = msgspec.structs.replace(GRANT, granted_ms=NOW_MS + 2)
    place_consent(tmp_path, "v1", grant_consent(phone, newer), now_ms=NOW_MS + 2)
    assert papers.view(NOW_MS + 2).refusal is None


def test_what_a_signing_device_is_told_lets_it_sign_a_paper_that_holds(tmp_path: Path) -> None:
    phone = create_owner_key()
    assert told_papers(tmp_path, "v1", NOW_MS)["public"] is None
    enrol_public_key(tmp_path, phone.public)
    place_consent(tmp_path, "v1", grant_consent(phone, GRANT), now_ms=NOW_MS)
    take_consent_back(tmp_path, "v1", now_ms=NOW_MS + 5)
    told = told_papers(tmp_path, "v1", NOW_MS + 5)
    assert told["public"] == base64.b64encode(phone.public).decode()
    assert (told["key_in_car"], told["next_grant_ms"]) == (False, NOW_MS + 6)
    grant = msgspec.convert(told["grant"], ConsentGrant)
    newer = msgspec.structs.replace(grant, granted_ms=told["next_grant_ms"])
    assert place_consent(tmp_path, "v1", grant_consent(phone, newer), now_ms=NOW_MS + 6).valid
