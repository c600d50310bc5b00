"""Attestation: is a vehicle's TPM 2.0 quote good enough for a job's key; bytes in, verdict out.

Decides: whether a quote was signed by the vehicle's own attestation key (AK), answers the challenge that the caller
made for it, in time, shows one of the expected measurements, and comes from a TPM whose counters did not go back.
Anything else (unreadable, too old, of other registers, rolled back) means no key.
Must not: draw nonces, keep state, or talk to anybody. The AK is pinned when the vehicle is enrolled; it has to be a
restricted signing key in the endorsement hierarchy, since a TPM veils its counters for any other. The caller keeps the
``Known`` of the last good verdict, and drops a challenge after its first use.
Called by: nothing in the running product yet; a library with its own tests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from enum import StrEnum
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

MAGIC: Final = 0xFF544347  # TPM_GENERATED_VALUE: a restricted key signs no outside data that begins so
QUOTE: Final = 0x8018  # TPM_ST_ATTEST_QUOTE
SHA256_BANK: Final = 0x000B  # TPM_ALG_SHA256
MAX_QUOTE_BYTES: Final = 2_048
MAX_SIGNATURE_BYTES: Final = 128
MAX_BANKS: Final = 16  # what TPML_PCR_SELECTION holds at most
MIN_NONCE_BYTES: Final = 16
NONCE_LIFETIME_MS: Final = 30_000
RAW_SIGNATURE_BYTES: Final = 64


class Refusal(StrEnum):
    """Why a quote gives no key."""

    UNREADABLE = "unreadable"  # not a TPMS_ATTEST of a quote, or cut short, or with more behind it
    SIGNATURE = "signature"  # not signed by the vehicle's attestation key
    NONCE = "nonce"  # answers another challenge
    STALE = "stale"  # the challenge is older than its lifetime, or dated ahead of the clock
    MEASUREMENT = "measurement"  # other registers, or other values in them, than expected
    ROLLED_BACK = "rolled_back"  # the TPM's clock or counters are behind what was seen before


class Bank(msgspec.Struct, frozen=True):
    """Which platform configuration registers (PCR) of one hash algorithm a quote covers, in rising order."""

    algorithm: int
    pcrs: tuple[int, ...]


class Measurement(msgspec.Struct, frozen=True):
    """One expected state of the software: which registers, and the digest over their values.

    The registers belong to it: a machine could bring some others, which it may reset at will, to the same values.
    """

    banks: tuple[Bank, ...]
    digest: bytes


class Challenge(msgspec.Struct, frozen=True, kw_only=True):
    """A nonce that the caller drew at random for one quote of one vehicle, and until when an answer counts."""

    nonce: bytes
    made_ms: int
    lifetime_ms: int = NONCE_LIFETIME_MS


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """The TPM's own count of time and of its starts, as last seen in a good quote."""

    clock_ms: int
    resets: int
    restarts: int  # since the last reset


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """What a TPMS_ATTEST of a quote says. ``clock_safe``: no higher clock was ever reported."""

    signer: bytes
    nonce: bytes
    known: Known
    clock_safe: bool
    firmware: int
    measurement: Measurement


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A quote that was read, and all that it is held against."""

    quote: Quote
    challenge: Challenge
    expected: Collection[Measurement]
    last: Known | None
    now_ms: int


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """``refusal`` is None for a good quote: then ``known`` is to be kept, and a key may go out before ``until_ms``."""

    refusal: Refusal | None
    known: Known | None = None
    until_ms: int = 0


class _Reader:
    """Takes big-endian fields from bytes; every step is checked against the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise ValueError("cut short")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        """A TPM2B: two bytes of length, then as many."""
        return self.take(self.number(2))

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError("more behind it")


def read_quote(data: bytes) -> Quote | None:
    """The fields of a TPMS_ATTEST of type quote; None if it is anything else. Says nothing of its signature."""
    if len(data) > MAX_QUOTE_BYTES:
        return None
    try:
        return _read(_Reader(data))
    except ValueError:
        return None


def judge_quote(
    data: bytes,
    signature: bytes,
    attestation_key: bytes,
    *,
    challenge: Challenge,
    expected: Collection[Measurement],
    last: Known | None,
    now_ms: int,
) -> Verdict:
    """Judge a quote at ``now_ms``; never raises on what a vehicle may send.

    ``attestation_key`` is the point on P-256 (X9.62) pinned for this vehicle; ``signature`` is ECDSA over SHA-256, as
    r and s of 32 bytes each or as DER. ``last`` is what the vehicle's last good verdict gave, None for the first.
    """
    if len(data) > MAX_QUOTE_BYTES:
        return Verdict(refusal=Refusal.UNREADABLE)
    if not _signed(data, signature, attestation_key):
        return Verdict(refusal=Refusal.SIGNATURE)
    quote = read_quote(data)
    if quote is None:
        return Verdict(refusal=Refusal.UNREADABLE)
    case = Case(quote=quote, challenge=challenge, expected=expected, last=last, now_ms=now_ms)
    for refusal, holds in CHECKS:
        if not holds(case):
            return Verdict(refusal=refusal)
    return Verdict(refusal=None, known=quote.known, until_ms=challenge.made_ms + challenge.lifetime_ms)


def release_key(verdict: Verdict, key: bytes, now_ms: int) -> bytes | None:
    """The job's key for a good verdict that has not run out; None for any other."""
    good = verdict.refusal is None and verdict.known is not None and now_ms < verdict.until_ms
    return key if good else None


def _answers(case: Case) -> bool:
    """Does it answer this challenge. A short nonce could be guessed or met by chance."""
    return len(case.challenge.nonce) >= MIN_NONCE_BYTES and case.quote.nonce == case.challenge.nonce


def _in_time(case: Case) -> bool:
    return 0 <= case.now_ms - case.challenge.made_ms < case.challenge.lifetime_ms


def _measures_up(case: Case) -> bool:
    return case.quote.measurement in case.expected


def _goes_on(case: Case) -> bool:
    """A reset begins the restarts anew; the clock goes on over resets and restarts alike."""
    now, last = case.quote.known, case.last
    return last is None or (
        now.clock_ms >= last.clock_ms and (now.resets, now.restarts) >= (last.resets, last.restarts)
    )


CHECKS: Final[tuple[tuple[Refusal, Callable[[Case], bool]], ...]] = (
    (Refusal.NONCE, _answers),
    (Refusal.STALE, _in_time),
    (Refusal.MEASUREMENT, _measures_up),
    (Refusal.ROLLED_BACK, _goes_on),
)


def _signed(data: bytes, signature: bytes, attestation_key: bytes) -> bool:
    """Did this key sign these bytes. 64 bytes may be either form, so each that fits is tried."""
    if len(signature) > MAX_SIGNATURE_BYTES:
        return False
    forms = [signature]
    if len(signature) == RAW_SIGNATURE_BYTES:
        half = RAW_SIGNATURE_BYTES // 2
        forms.append(encode_dss_signature(*(int.from_bytes(n, "big") for n in (signature[:half], signature[half:]))))
    try:
        key = EllipticCurvePublicKey.from_encoded_point(SECP256R1(), attestation_key)
    except ValueError:
        return False
    return any(_verifies(key, form, data) for form in forms)


def _verifies(key: EllipticCurvePublicKey, der: bytes, data: bytes) -> bool:
    try:
        key.verify(der, data, ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def _read(reader: _Reader) -> Quote:
    if (reader.number(4), reader.number(2)) != (MAGIC, QUOTE):
        raise ValueError("not a quote")
    signer, nonce = reader.sized(), reader.sized()
    clock_ms, resets, restarts, safe, firmware = struct.unpack(">QIIBQ", reader.take(25))
    if safe > 1:
        raise ValueError("neither yes nor no")
    banks = _read_banks(reader)
    digest = reader.sized()
    reader.end()
    return Quote(
        signer=signer,
        nonce=nonce,
        known=Known(clock_ms=clock_ms, resets=resets, restarts=restarts),
        clock_safe=bool(safe),
        firmware=firmware,
        measurement=Measurement(banks, digest),
    )


def _read_banks(reader: _Reader) -> tuple[Bank, ...]:
    count = reader.number(4)
    if count > MAX_BANKS:
        raise ValueError("too many banks")
    banks = []
    for _ in range(count):
        algorithm, bits = reader.number(2), reader.take(reader.number(1))
        pcrs = tuple(8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1)
        banks.append(Bank(algorithm, pcrs))
    return tuple(banks)
