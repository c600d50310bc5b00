"""Receipts: whatever is repeated, forged, altered or out of order, the books are those of the genuine ones in order."""

from __future__ import annotations

import base64
from collections.abc import Callable

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from tests.invariant_world import many

from motorpool.errors import TrustError
from motorpool.trust import receipts
from motorpool.trust.receipts import (
    FIRST,
    PLATFORM,
    Book,
    Keys,
    Outcome,
    Receipt,
    check_receipt,
    countersign,
    digest_of,
    settle,
    sign_receipt,
)


def private() -> tuple[bytes, bytes]:
    key = Ed25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


SERVER, SERVER_PUBLIC = private()
VEHICLE, VEHICLE_PUBLIC = private()
STRANGER, STRANGER_PUBLIC = private()
KEYS = Keys(server=SERVER_PUBLIC, vehicles={"v1": VEHICLE_PUBLIC, "v2": STRANGER_PUBLIC})


def chain(count: int) -> list[tuple[Receipt, bytes]]:
    made: list[tuple[Receipt, bytes]] = []
    previous = FIRST
    for number in range(1, count + 1):
        receipt = Receipt(
            vehicle_id="v1",
            number=number,
            previous=previous,
            lease_id=f"l{number}",
            account="acme",
            ended_ms=number,
            tokens=10,
            energy_mwh=3,
            charge_micro=100 + number,
            pay_micro=70,
        )
        signed = sign_receipt(VEHICLE, receipt)
        made.append((receipt, countersign(SERVER, signed, VEHICLE_PUBLIC)))
        previous = digest_of(receipt)
    return made


CHAIN = chain(6)


def forged() -> list[bytes]:
    """Richer receipts: signed by one side alone, by a stranger, or with the signatures of another; and no receipts."""
    made: list[bytes] = [b"", b"{}", b"\xff", b"[" * 2_000, b'{"document":"\xed\xa0\x80","vehicle":""}']
    for receipt, data in CHAIN:
        richer = msgspec.structs.replace(receipt, charge_micro=10**9, pay_micro=10**9)
        half = sign_receipt(VEHICLE, richer)
        genuine = msgspec.json.decode(data)
        made += [
            half,
            countersign(STRANGER, half, VEHICLE_PUBLIC),
            countersign(SERVER, sign_receipt(STRANGER, richer), STRANGER_PUBLIC),
            msgspec.json.encode({**genuine, "document": msgspec.json.encode(richer).decode()}),
        ]
    return made


FORGED = forged()


def balances(count: int) -> dict[str, int]:
    charged = sum(100 + number for number in range(1, count + 1))
    if not count:
        return {}
    return {"customer:acme": -charged, "owner:v1": 70 * count, PLATFORM: charged - 70 * count}


@many
@given(st.lists(st.integers(0, 5) | st.integers(100, 127), max_size=30))
def test_invariant_16_only_genuine_receipts_in_their_order_move_a_balance_and_each_once(order: list[int]) -> None:
    book, expected = Book(), 0
    for pick in order:
        data = CHAIN[pick][1] if pick < 100 else FORGED[(pick - 100) % len(FORGED)]
        before = book
        book, outcome = settle(book, data, KEYS)
        if pick < 100 and pick == expected:
            expected += 1
            assert outcome is Outcome.ACCEPTED
        else:
            assert outcome is not Outcome.ACCEPTED
            assert book == before
        assert sum(book.balances.values()) == 0
    assert dict(book.balances) == balances(expected)


@pytest.mark.parametrize("check", ["_signed", "_vehicle_signed"])
def test_without_the_check_of_signatures_a_forged_receipt_counts(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    yes: Callable[..., bool] = lambda *_: True  # noqa: E731
    half = countersign(SERVER, sign_receipt(STRANGER, CHAIN[0][0]), STRANGER_PUBLIC)
    alone = sign_receipt(VEHICLE, CHAIN[0][0])
    data = half if check == "_vehicle_signed" else alone
    assert settle(Book(), data, KEYS)[1] is Outcome.FORGED
    monkeypatch.setattr(receipts, check, yes)
    assert settle(Book(), data, KEYS)[1] is Outcome.ACCEPTED


@many
@given(st.lists(st.tuples(st.integers(0, 2_000), st.integers(1, 255)), min_size=1, max_size=3))
def test_invariant_16_an_altered_receipt_moves_nothing_or_what_was_signed(flips: list[tuple[int, int]]) -> None:
    """What the signatures are written as may vary, by bits that base64 does not use; what is signed may not."""
    data = bytearray(CHAIN[0][1])
    for at, flip in flips:
        data[at % len(data)] ^= flip
    book, outcome = settle(Book(), bytes(data), KEYS)
    assert dict(book.balances) == balances(1 if outcome is Outcome.ACCEPTED else 0)
    assert outcome in (Outcome.ACCEPTED, Outcome.FORGED)


@pytest.mark.parametrize("order", [[0, 0], [1], [0, 1, 0], [0, 2]])
def test_without_the_check_of_the_order_a_repeated_or_early_receipt_counts(
    order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcomes() -> list[Outcome]:
        book, found = Book(), []
        for pick in order:
            book, outcome = settle(book, CHAIN[pick][1], KEYS)
            found.append(outcome)
        return found

    assert outcomes()[-1] in (Outcome.OLD, Outcome.OUT_OF_ORDER)
    monkeypatch.setattr(receipts, "_place", lambda *_: Outcome.ACCEPTED)
    assert outcomes()[-1] is Outcome.ACCEPTED


def test_another_predecessor_is_another_history() -> None:
    book = settle(Book(), CHAIN[0][1], KEYS)[0]
    other = msgspec.structs.replace(CHAIN[1][0], previous="f" * 64)
    data = countersign(SERVER, sign_receipt(VEHICLE, other), VEHICLE_PUBLIC)
    assert settle(book, data, KEYS) == (book, Outcome.FORKED)


def test_the_vehicles_have_chains_of_their_own() -> None:
    book = settle(Book(), CHAIN[0][1], KEYS)[0]
    other = msgspec.structs.replace(CHAIN[0][0], vehicle_id="v2")
    data = countersign(SERVER, sign_receipt(STRANGER, other), STRANGER_PUBLIC)
    book, outcome = settle(book, data, KEYS)
    assert outcome is Outcome.ACCEPTED
    assert settle(book, CHAIN[1][1], KEYS)[1] is Outcome.ACCEPTED
    assert book.balances["owner:v2"] == book.balances["owner:v1"] == 70
    assert sum(book.balances.values()) == 0


def test_another_history_of_a_vehicle_is_told_from_a_repetition() -> None:
    book = settle(Book(), CHAIN[0][1], KEYS)[0]
    other = msgspec.structs.replace(CHAIN[0][0], lease_id="another")
    data = countersign(SERVER, sign_receipt(VEHICLE, other), VEHICLE_PUBLIC)
    assert settle(book, data, KEYS)[1] is Outcome.FORKED
    assert settle(book, CHAIN[0][1], KEYS)[1] is Outcome.OLD
    assert settle(book, CHAIN[2][1], KEYS)[1] is Outcome.OUT_OF_ORDER


def test_no_receipt_pays_more_than_it_charges() -> None:
    greedy = msgspec.structs.replace(CHAIN[0][0], pay_micro=10**6)
    with pytest.raises(TrustError):
        sign_receipt(VEHICLE, greedy)
    text = msgspec.json.encode(greedy)
    signature = Ed25519PrivateKey.from_private_bytes(VEHICLE).sign(receipts.VEHICLE_DOMAIN + text)
    own = {"document": text.decode(), "vehicle": base64.b64encode(signature).decode()}
    by_hand = countersign(SERVER, msgspec.json.encode(own), VEHICLE_PUBLIC)
    assert settle(Book(), by_hand, KEYS) == (Book(), Outcome.FORGED)
    assert check_receipt(CHAIN[0][1], KEYS) is not None
