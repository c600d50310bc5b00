"""Receipts of what a vehicle did: signed by vehicle and server, each one chained to the one before.

Decides: whether bytes are the next receipt of a vehicle, and what they move in the books. Anything else (a repeat, an
older one, one that is out of order or names another predecessor, one with a signature that is missing or wrong) moves
nothing. Every receipt moves what a customer pays to the owner and to the platform: all balances together are zero.
Must not: keep state (the book comes in and goes out), read clocks or files, or raise on what somebody else has sent.
This is a library: the books of the running cell are settled by ``store.books``, which does not ask it yet.

The vehicle signs the document; the server signs the document and the vehicle's signature. So the server's signature is
checked first, with the one key that is known beforehand, and nothing of a document is read that it has not signed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from motorpool.errors import TrustError

VEHICLE_DOMAIN: Final = b"motorpool receipt v1\n"  # no signature for another purpose can be used here
SERVER_DOMAIN: Final = b"motorpool receipt countersigned v1\n"
MAX_RECEIPT_BYTES: Final = 4 * 1024
MAX_NUMBER: Final = 1 << 53
PLATFORM: Final = "platform"
FIRST: Final = "0" * 64  # stands for the predecessor of a vehicle's first receipt
_Count = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
_Id = Annotated[str, Meta(min_length=1, max_length=128)]


class Receipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one lease came to. ``previous`` is the digest of the receipt before it, FIRST for number 1."""

    vehicle_id: _Id
    number: Annotated[int, Meta(ge=1, le=MAX_NUMBER)]
    previous: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    lease_id: _Id
    account: _Id
    ended_ms: _Count
    tokens: _Count
    energy_mwh: _Count
    charge_micro: _Count
    pay_micro: _Count


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    document: str
    vehicle: str
    server: str = ""


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """The public halves, 32 bytes each: the server's, and each vehicle's by its id."""

    server: bytes
    vehicles: Mapping[str, bytes]


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a vehicle's chain."""

    number: int = 0
    digest: str = FIRST


class Book(msgspec.Struct, frozen=True, kw_only=True):
    """Chains and balances. The sum of all balances is zero."""

    heads: Mapping[str, Head] = {}
    balances: Mapping[str, int] = {}

    def head(self, vehicle_id: str) -> Head:
        """Where a vehicle's next receipt goes on."""
        return self.heads.get(vehicle_id, Head())


class Outcome(StrEnum):
    """What became of a receipt. Only the first of them changes a book."""

    ACCEPTED = "accepted"
    OLD = "old"  # this number is in the book already
    OUT_OF_ORDER = "out_of_order"  # one before it is missing
    FORKED = "forked"  # two histories of one vehicle: somebody is lying
    FORGED = "forged"  # not signed by both, or no receipt at all


def sign_receipt(vehicle_private: bytes, receipt: Receipt) -> bytes:
    """The vehicle's half; raises TrustError for a receipt by which an owner would get more than the customer pays."""
    if receipt.pay_micro > receipt.charge_micro:
        raise TrustError("this receipt pays more than it charges", code="receipt_odd")
    text = msgspec.json.encode(receipt)
    signature = Ed25519PrivateKey.from_private_bytes(vehicle_private).sign(VEHICLE_DOMAIN + text)
    return msgspec.json.encode(_Envelope(document=text.decode(), vehicle=base64.b64encode(signature).decode()))


def countersign(server_private: bytes, data: bytes, vehicle_public: bytes) -> bytes:
    """Add the server's half to a vehicle's receipt; raises TrustError if the vehicle has not signed it."""
    envelope = _open(data)
    if envelope is None or not _vehicle_signed(envelope, vehicle_public):
        raise TrustError("this receipt is not signed by its vehicle", code="receipt_forged")
    signature = Ed25519PrivateKey.from_private_bytes(server_private).sign(_server_text(envelope))
    return msgspec.json.encode(msgspec.structs.replace(envelope, server=base64.b64encode(signature).decode()))


def check_receipt(data: bytes, keys: Keys) -> tuple[Receipt, str] | None:
    """The receipt and its digest, if both have signed it and it makes sense."""
    envelope = _open(data)
    if envelope is None or not _signed(keys.server, envelope.server, _server_text(envelope)):
        return None
    try:
        receipt = msgspec.json.decode(envelope.document.encode(), type=Receipt)
    except (msgspec.DecodeError, RecursionError):
        return None
    vehicle = keys.vehicles.get(receipt.vehicle_id)
    if vehicle is None or not _vehicle_signed(envelope, vehicle) or receipt.pay_micro > receipt.charge_micro:
        return None
    return receipt, digest(envelope.document)


def digest(document: str) -> str:
    """What the next receipt calls this one. Signatures are not in it: they can be made anew, the document cannot."""
    return hashlib.sha256(VEHICLE_DOMAIN + document.encode()).hexdigest()


def digest_of(receipt: Receipt) -> str:
    """The same for a receipt that is about to be signed."""
    return digest(msgspec.json.encode(receipt).decode())


def settle(book: Book, data: bytes, keys: Keys) -> tuple[Book, Outcome]:
    """Put a receipt into the book. Whatever comes again, late, early or forged leaves the book as it was."""
    found = check_receipt(data, keys)
    if found is None:
        return book, Outcome.FORGED
    receipt, own = found
    outcome = _place(book.head(receipt.vehicle_id), receipt, own)
    if outcome is not Outcome.ACCEPTED:
        return book, outcome
    balances = dict(book.balances)
    for account, amount in (
        (f"customer:{receipt.account}", -receipt.charge_micro),
        (f"owner:{receipt.vehicle_id}", receipt.pay_micro),
        (PLATFORM, receipt.charge_micro - receipt.pay_micro),
    ):
        balances[account] = balances.get(account, 0) + amount
    heads = {**book.heads, receipt.vehicle_id: Head(number=receipt.number, digest=own)}
    return Book(heads=heads, balances=balances), Outcome.ACCEPTED


def _place(head: Head, receipt: Receipt, own: str) -> Outcome:
    """Where a genuine receipt stands in its vehicle's chain: it is accepted as the very next one alone."""
    if receipt.number <= head.number:
        same = receipt.number < head.number or own == head.digest
        return Outcome.OLD if same else Outcome.FORKED
    if receipt.number > head.number + 1:
        return Outcome.OUT_OF_ORDER
    return Outcome.ACCEPTED if receipt.previous == head.digest else Outcome.FORKED


def _open(data: bytes) -> _Envelope | None:
    if len(data) > MAX_RECEIPT_BYTES:
        return None
    try:
        return msgspec.json.decode(data, type=_Envelope)
    except (msgspec.DecodeError, RecursionError, ValueError):  # ValueError: bytes that are no UTF-8
        return None


def _server_text(envelope: _Envelope) -> bytes:
    return SERVER_DOMAIN + msgspec.json.encode([envelope.document, envelope.vehicle])


def _vehicle_signed(envelope: _Envelope, public: bytes) -> bool:
    return _signed(public, envelope.vehicle, VEHICLE_DOMAIN + envelope.document.encode())


def _signed(public: bytes, signature: str, text: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(base64.b64decode(signature, validate=True), text)
    except (binascii.Error, InvalidSignature, ValueError):
        return False
    return True
