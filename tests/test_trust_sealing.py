"""Sealed jobs: what is bound to a region opens in that region, for that vehicle and that job alone."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from tests.invariant_world import many

from motorpool.errors import TrustError
from motorpool.trust import sealing
from motorpool.trust.sealing import AttestedRegion, Job, attest_region, may_hold, open_region, open_sealed, seal

NOW_MS = 1_790_000_000_000
_VEHICLES = [X25519PrivateKey.generate() for _ in range(2)]
PRIVATE = [key.private_bytes_raw() for key in _VEHICLES]
PUBLIC = [key.public_key().public_bytes_raw().hex() for key in _VEHICLES]
_VERIFIER = Ed25519PrivateKey.generate()
VERIFIER, VERIFIER_PUBLIC = _VERIFIER.private_bytes_raw(), _VERIFIER.public_key().public_bytes_raw()
REGIONS = ("DE", "FR", "", "de", None)
TEXT = b"a document"


def paper(region: str | None, vehicle: int = 0, until_ms: int = NOW_MS + 1_000) -> AttestedRegion:
    return AttestedRegion(vehicle_key=PUBLIC[vehicle], region=region, issued_ms=NOW_MS - 1_000, expires_ms=until_ms)


@many
@given(
    residency=st.sampled_from(["DE", "FR", None]),
    sealed_in=st.sampled_from(REGIONS),
    opened_in=st.sampled_from(REGIONS),
    vehicle=st.integers(0, 1),
    job_id=st.sampled_from(["job", "other"]),
    claimed=st.sampled_from(["DE", "FR", None]),
    later_ms=st.sampled_from([0, 999, 1_000, 10**9]),
)
def test_invariant_20_what_is_bound_to_a_region_opens_there_alone(
    residency: str | None,
    sealed_in: str | None,
    opened_in: str | None,
    vehicle: int,
    job_id: str,
    claimed: str | None,
    later_ms: int,
) -> None:
    job = Job(job_id="job", residency=residency)
    if residency is not None and sealed_in != residency:
        with pytest.raises(TrustError):
            seal(TEXT, job, paper(sealed_in), NOW_MS)
        return
    sealed = seal(TEXT, job, paper(sealed_in), NOW_MS)
    as_told = Job(job_id=job_id, residency=claimed)
    opened = open_sealed(sealed, PRIVATE[vehicle], as_told, paper(opened_in, vehicle), NOW_MS + later_ms)
    right = vehicle == 0 and as_told == job and later_ms < 1_000 and (residency is None or opened_in == residency)
    assert opened == (TEXT if right else None)


@many
@given(at=st.integers(0, 200), flip=st.integers(1, 255))
def test_invariant_20_an_altered_byte_opens_nothing(at: int, flip: int) -> None:
    job = Job(job_id="job", residency="DE")
    sealed = bytearray(seal(TEXT, job, paper("DE"), NOW_MS))
    sealed[at % len(sealed)] ^= flip
    assert open_sealed(bytes(sealed), PRIVATE[0], job, paper("DE"), NOW_MS) is None


def test_a_paper_counts_only_with_the_verifiers_signature_and_in_its_time() -> None:
    signed = attest_region(VERIFIER, paper("DE"))
    assert open_region(signed, VERIFIER_PUBLIC, NOW_MS) == paper("DE")
    assert open_region(signed, VERIFIER_PUBLIC, NOW_MS + 1_000) is None
    assert open_region(signed, VERIFIER_PUBLIC, NOW_MS - 1_001) is None
    stranger = Ed25519PrivateKey.generate()
    assert open_region(attest_region(stranger.private_bytes_raw(), paper("DE")), VERIFIER_PUBLIC, NOW_MS) is None
    altered = signed.replace(b"DE", b"FR")
    assert altered != signed
    for bad in (None, b"", b"{}", altered, signed[:-2], b"[" * 3_000):
        assert open_region(bad, VERIFIER_PUBLIC, NOW_MS) is None


def test_nothing_is_held_without_a_paper_or_by_a_key_that_is_none() -> None:
    job = Job(job_id="job")
    assert not may_hold(job, None, NOW_MS)
    with pytest.raises(TrustError):
        seal(TEXT, job, None, NOW_MS)
    nobody = msgspec.structs.replace(paper("DE"), vehicle_key="00" * 32)
    with pytest.raises(TrustError):
        seal(TEXT, job, nobody, NOW_MS)


def test_without_the_check_of_the_region_a_job_opens_across_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(job_id="job", residency="DE")
    sealed = seal(TEXT, job, paper("DE"), NOW_MS)
    for region in ("FR", None):
        assert open_sealed(sealed, PRIVATE[0], job, paper(region), NOW_MS) is None
    monkeypatch.setattr(sealing, "may_hold", lambda *_: True)
    assert open_sealed(sealed, PRIVATE[0], job, paper("FR"), NOW_MS) == TEXT


def test_what_was_sealed_for_another_purpose_or_cut_short_opens_nothing() -> None:
    job = Job(job_id="job", residency="DE")
    key = _VEHICLES[0].public_key()
    context = sealing.context(job, key.public_bytes_raw())
    assert open_sealed(sealing.SUITE.encrypt(TEXT, key, context), PRIVATE[0], job, paper("DE"), NOW_MS) == TEXT
    elsewhere = sealing.SUITE.encrypt(TEXT, key, context.removeprefix(sealing.DOMAIN))
    sealed = seal(TEXT, job, paper("DE"), NOW_MS)
    for bad in (elsewhere, b"", sealed[:10], sealed[:-1], sealed + b"0", bytes(32) + sealed[32:]):
        assert open_sealed(bad, PRIVATE[0], job, paper("DE"), NOW_MS) is None
