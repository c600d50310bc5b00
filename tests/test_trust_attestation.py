"""Invariant 21, the attestation: a job's key goes to a fresh, expected and unexpired quote alone."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from tests.invariant_world import many

from motorpool.trust import attestation
from motorpool.trust.attestation import (
    CHECKS,
    SHA256_BANK,
    Bank,
    Challenge,
    Known,
    Measurement,
    Quote,
    Refusal,
    Verdict,
    judge_quote,
    read_quote,
    release_key,
)

NOW_MS = 1_790_000_000_000
JOB_KEY = b"the key of a job, 32 bytes long."
PCRS = (0, 2, 4, 7, 10, 23)
AK, STRANGER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())


def point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def digest_of(software: bytes) -> bytes:
    return hashlib.sha256(b"".join(hashlib.sha256(software + bytes([pcr])).digest() for pcr in PCRS)).digest()


GOOD, OLDER = (Measurement((Bank(SHA256_BANK, PCRS),), digest_of(name)) for name in (b"v2", b"v1"))
EXPECTED = frozenset({GOOD, OLDER})
CHALLENGE = Challenge(nonce=hashlib.sha256(b"drawn at random").digest(), made_ms=NOW_MS - 5_000)
LAST = Known(clock_ms=80_000_000, resets=7, restarts=3)
FIELDS: dict[str, Any] = {
    "magic": 0xFF544347,
    "kind": 0x8018,
    "signer": b"\x00\x0b" + hashlib.sha256(b"the AK's name").digest(),
    "nonce": CHALLENGE.nonce,
    "clock_ms": LAST.clock_ms + 60_000,
    "resets": LAST.resets,
    "restarts": LAST.restarts,
    "safe": 1,
    "firmware": 0x2020_0312_0012_8000,
    "banks": ((SHA256_BANK, PCRS),),
    "digest": GOOD.digest,
}
POINT, STRANGERS_POINT = point(AK), point(STRANGER)
SMALL_QUOTE = struct.pack(">IH", 0xFF544347, 0x8018)


def packed(**changes: Any) -> bytes:
    """A TPMS_ATTEST as the TPM 2.0 Library, part 2, lays it out."""
    said = FIELDS | changes
    out = struct.pack(">IH", said["magic"], said["kind"])
    for sized in (said["signer"], said["nonce"]):
        out += struct.pack(">H", len(sized)) + sized
    out += struct.pack(">QIIB", said["clock_ms"], said["resets"], said["restarts"], said["safe"])
    out += struct.pack(">QI", said["firmware"], len(said["banks"]))
    for algorithm, pcrs in said["banks"]:
        bits = sum(1 << pcr for pcr in pcrs)
        out += struct.pack(">HB", algorithm, 3) + bits.to_bytes(3, "little")
    return out + struct.pack(">H", len(said["digest"])) + bytes(said["digest"])


def signed(data: bytes, key: ec.EllipticCurvePrivateKey = AK, *, der: bool = False) -> bytes:
    signature = key.sign(data, ec.ECDSA(SHA256()))
    if der:
        return signature
    return b"".join(number.to_bytes(32, "big") for number in utils.decode_dss_signature(signature))


QUOTE = packed()
SIGNATURES = signed(QUOTE), signed(QUOTE, der=True)


def judged(data: bytes = QUOTE, signature: bytes | None = None, key: bytes = POINT, **changes: Any) -> Verdict:
    wanted: dict[str, Any] = {"challenge": CHALLENGE, "expected": EXPECTED, "last": LAST, "now_ms": NOW_MS} | changes
    return judge_quote(data, signed(data) if signature is None else signature, key, **wanted)


def key_of(verdict: Verdict, now_ms: int = NOW_MS) -> bytes | None:
    return release_key(verdict, JOB_KEY, now_ms)


def test_a_quote_is_read_field_by_field() -> None:
    assert read_quote(QUOTE) == Quote(
        signer=FIELDS["signer"],
        nonce=CHALLENGE.nonce,
        known=Known(clock_ms=80_060_000, resets=7, restarts=3),
        clock_safe=True,
        firmware=FIELDS["firmware"],
        measurement=GOOD,
    )


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("last", [None, LAST])
def test_a_good_quote_gives_the_key_until_its_challenge_runs_out(signature: bytes, last: Known | None) -> None:
    verdict = judged(signature=signature, last=last)
    assert verdict == Verdict(
        refusal=None, known=Known(clock_ms=80_060_000, resets=7, restarts=3), until_ms=NOW_MS + 25_000
    )
    assert key_of(verdict, NOW_MS + 24_999) == JOB_KEY
    assert key_of(verdict, NOW_MS + 25_000) is None


def test_every_expected_measurement_is_good_and_a_compressed_key_too() -> None:
    compressed = AK.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    assert key_of(judged(packed(digest=OLDER.digest), key=compressed)) == JOB_KEY


def test_a_reset_begins_the_restarts_anew() -> None:
    assert key_of(judged(packed(resets=8, restarts=0))) == JOB_KEY


def test_a_verdict_that_says_nothing_gives_no_key() -> None:
    assert key_of(Verdict(refusal=None, until_ms=NOW_MS + 1)) is None


def test_each_verdict_is_the_state_that_the_next_one_is_held_against() -> None:
    first = judged()
    earlier = packed(clock_ms=FIELDS["clock_ms"] - 1)
    assert key_of(judged(earlier)) == JOB_KEY
    assert judged(earlier, last=first.known).refusal is Refusal.ROLLED_BACK


# What a vehicle's owner who holds the AK, but no other software, could have it sign; and what must be said of it.
SIGNED_BUT_WRONG: tuple[tuple[Refusal, dict[str, Any]], ...] = (
    (Refusal.UNREADABLE, {"magic": 0xFF544348}),
    (Refusal.UNREADABLE, {"kind": 0x8017}),
    (Refusal.UNREADABLE, {"safe": 2}),
    (Refusal.UNREADABLE, {"banks": ((SHA256_BANK, PCRS),) * 17}),
    (Refusal.NONCE, {"nonce": b""}),
    (Refusal.NONCE, {"nonce": CHALLENGE.nonce[:-1]}),
    (Refusal.NONCE, {"nonce": hashlib.sha256(b"another").digest()}),
    (Refusal.MEASUREMENT, {"digest": digest_of(b"own")}),
    (Refusal.MEASUREMENT, {"digest": b""}),
    (Refusal.MEASUREMENT, {"banks": ((SHA256_BANK, (16, *PCRS[1:])),)}),  # 16 may be reset at will
    (Refusal.MEASUREMENT, {"banks": ((0x0004, PCRS),)}),  # SHA-1
    (Refusal.MEASUREMENT, {"banks": ()}),
    (Refusal.ROLLED_BACK, {"clock_ms": LAST.clock_ms - 1}),
    (Refusal.ROLLED_BACK, {"clock_ms": LAST.clock_ms - 1, "resets": 8, "safe": 0}),
    (Refusal.ROLLED_BACK, {"resets": LAST.resets - 1, "restarts": 9}),
    (Refusal.ROLLED_BACK, {"restarts": LAST.restarts - 1}),
)
WRONG_QUOTES = tuple((refusal, data, signed(data)) for refusal, data in ((r, packed(**c)) for r, c in SIGNED_BUT_WRONG))
LATE = tuple(
    (Refusal.STALE, msgspec.structs.replace(CHALLENGE, made_ms=NOW_MS - age_ms)) for age_ms in (30_000, 10**9, -1)
)


@pytest.mark.parametrize(("refusal", "data", "signature"), WRONG_QUOTES)
def test_a_wrong_quote_of_the_right_key_gets_its_own_refusal(refusal: Refusal, data: bytes, signature: bytes) -> None:
    verdict = judged(data, signature)
    assert verdict == Verdict(refusal=refusal)
    assert key_of(verdict) is None


@pytest.mark.parametrize(("refusal", "challenge"), LATE)
def test_a_late_answer_gets_no_key(refusal: Refusal, challenge: Challenge) -> None:
    assert judged(challenge=challenge) == Verdict(refusal=refusal)


def test_a_challenge_that_could_be_guessed_is_answered_by_nothing() -> None:
    short = msgspec.structs.replace(CHALLENGE, nonce=b"15 bytes, no mo")
    assert judged(packed(nonce=short.nonce), challenge=short).refusal is Refusal.NONCE


@pytest.mark.parametrize("key", [b"", b"\x04" * 65, bytes(33), STRANGERS_POINT])
def test_a_wrong_or_useless_key_verifies_nothing(key: bytes) -> None:
    assert judged(key=key) == Verdict(refusal=Refusal.SIGNATURE)


@pytest.mark.parametrize("signature", [b"", bytes(64), b"\xff" * 64, b"\x30" * 72, bytes(10_000)])
def test_a_useless_signature_verifies_nothing(signature: bytes) -> None:
    assert judged(signature=signature) == Verdict(refusal=Refusal.SIGNATURE)


@pytest.mark.parametrize("left_out", [refusal for refusal, _ in CHECKS])
def test_each_check_is_needed(monkeypatch: pytest.MonkeyPatch, left_out: Refusal) -> None:
    """Without it, some quote that must be refused would get the key."""
    kept = tuple(check for check in CHECKS if check[0] is not left_out)
    monkeypatch.setattr(attestation, "CHECKS", kept)
    wrong = [judged(data, signature) for refusal, data, signature in WRONG_QUOTES if refusal is left_out]
    wrong += [judged(challenge=challenge) for refusal, challenge in LATE if refusal is left_out]
    assert wrong
    assert all(verdict.refusal is None for verdict in wrong)


def test_the_check_of_the_signature_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    forged = signed(QUOTE, STRANGER)
    assert key_of(judged(signature=forged)) is None
    monkeypatch.setattr(attestation, "_verifies", lambda *_: True)
    assert key_of(judged(signature=forged)) == JOB_KEY


@pytest.mark.parametrize("size", range(len(QUOTE)))
def test_a_quote_that_is_cut_short_is_unreadable(size: int) -> None:
    assert read_quote(QUOTE[:size]) is None


@pytest.mark.parametrize("more", [b"\0", QUOTE, bytes(4_000)])
def test_a_quote_with_more_behind_it_is_unreadable(more: bytes) -> None:
    assert read_quote(QUOTE + more) is None
    assert judged(QUOTE + more).refusal is Refusal.UNREADABLE


Attack = tuple[bytes, bytes, bytes, dict[str, Any]]  # quote, signature, key, and what the caller holds it against


def _flipped(data: bytes) -> st.SearchStrategy[bytes]:
    """The same bytes with one of them altered, cut, doubled, or with more behind."""
    at = st.integers(0, len(data) - 1)
    return st.one_of(
        st.builds(lambda i, bits: data[:i] + bytes([data[i] ^ bits]) + data[i + 1 :], at, st.integers(1, 255)),
        st.builds(lambda i: data[:i], at),
        st.builds(lambda i: data[:i] + data[i : i + 1] + data[i:], at),
        st.builds(lambda tail: data + tail, st.binary(min_size=1, max_size=8)),
    )


def _altered(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """One field that says something else, where any other value must be refused although the key signed it."""
    low, high = {"magic": (0, 2**32 - 1), "kind": (0, 2**16 - 1), "safe": (2, 255)}.get(name, (0, 0))
    below = {"clock_ms": LAST.clock_ms, "resets": LAST.resets, "restarts": LAST.restarts}
    values: st.SearchStrategy[Any]
    if name in below:
        values = st.integers(0, below[name] - 1)
    elif name == "banks":
        values = st.lists(
            st.tuples(st.sampled_from((4, 11, 12)), st.sets(st.integers(0, 23)).map(lambda s: tuple(sorted(s)))),
            max_size=3,
        ).map(tuple)
    elif name in ("nonce", "digest"):
        values = st.binary(max_size=64) | _flipped(FIELDS[name])
    else:
        values = st.integers(low, high)
    return values.filter(lambda value: value != FIELDS[name]).map(lambda value: {name: value})


def _resigned(change: dict[str, Any]) -> Attack:
    data = packed(**change)
    return data, signed(data), POINT, {}


_signature = st.sampled_from(SIGNATURES)
attacks: st.SearchStrategy[Attack] = st.one_of(
    st.sampled_from(("magic", "kind", "nonce", "clock_ms", "resets", "restarts", "safe", "banks", "digest"))
    .flatmap(_altered)
    .map(_resigned),
    st.tuples(_flipped(QUOTE), _signature, st.just(POINT), st.just({})),
    st.tuples(st.just(QUOTE), _signature.flatmap(_flipped), st.just(POINT), st.just({})),
    st.tuples(st.just(QUOTE), _signature, _flipped(POINT) | st.just(STRANGERS_POINT), st.just({})),
    st.tuples(st.just(QUOTE), st.just(signed(QUOTE, STRANGER)), st.just(POINT), st.just({})),
    st.tuples(st.binary(max_size=200).map(lambda tail: SMALL_QUOTE + tail), _signature, st.just(POINT), st.just({})),
    st.builds(
        lambda change: (QUOTE, SIGNATURES[0], POINT, change),
        st.one_of(
            (st.integers(25_000, 10**10) | st.integers(-(10**10), -5_001)).map(lambda d: {"now_ms": NOW_MS + d}),
            st.binary(max_size=40).map(lambda nonce: {"challenge": msgspec.structs.replace(CHALLENGE, nonce=nonce)}),
            st.integers(1, 2**40).map(
                lambda d: {"last": msgspec.structs.replace(LAST, clock_ms=FIELDS["clock_ms"] + d)}
            ),
            st.integers(1, 2**20).map(lambda d: {"last": msgspec.structs.replace(LAST, resets=LAST.resets + d)}),
            st.sampled_from((frozenset(), frozenset({OLDER}))).map(lambda expected: {"expected": expected}),
        ),
    ),
)


@many
@given(attacks)
def test_invariant_21_nothing_but_the_unaltered_quote_gets_the_key(attack: Attack) -> None:
    data, signature, key, changes = attack
    verdict = judged(data, signature, key, **changes)
    assert verdict.refusal is not None
    assert verdict.known is None
    assert key_of(verdict) is None
    assert key_of(judged(signature=SIGNATURES[0])) == JOB_KEY


@many
@given(st.integers(0, 2**40), st.integers(0, 1_000), st.integers(0, 1_000), st.integers(0, 24_999), st.booleans())
def test_invariant_21_a_tpm_that_goes_on_gets_the_key_in_time(
    later_ms: int, resets: int, restarts: int, wait_ms: int, safe: bool
) -> None:
    count = LAST.restarts + restarts if resets == 0 else restarts
    data = packed(clock_ms=LAST.clock_ms + later_ms, resets=LAST.resets + resets, restarts=count, safe=int(safe))
    assert key_of(judged(data, now_ms=NOW_MS + wait_ms), NOW_MS + wait_ms) == JOB_KEY


@many
@given(st.binary(max_size=300) | _flipped(QUOTE), st.binary(max_size=80), st.binary(max_size=70))
def test_invariant_21_garbage_is_refused_and_nothing_is_raised(data: bytes, signature: bytes, key: bytes) -> None:
    quote = read_quote(data)
    assert quote is None or packed_again(quote, data)
    assert judged(data, signature, key).refusal is Refusal.SIGNATURE


def packed_again(quote: Quote, data: bytes) -> bool:
    """Whatever was read stands in the bytes: nothing was made up."""
    return all(part in data for part in (quote.signer, quote.nonce, quote.measurement.digest))
