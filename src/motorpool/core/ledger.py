"""Transfers: every amount leaves one account and enters another, so that all accounts together are always zero.

Decides: names of accounts and of transfers. A transfer's id is derived from what caused it, so that posting it again is
refused by the books. Called by: ``core.scheduler``, ``server``.
"""

from __future__ import annotations

from typing import Final

import msgspec

PLATFORM: Final = "platform"


def customer(account: str) -> str:
    """The ledger account of a customer."""
    return f"customer:{account}"


def owner(vehicle_id: str) -> str:
    """The ledger account of a vehicle's owner."""
    return f"owner:{vehicle_id}"


def vehicle_of(account: str) -> str:
    """The vehicle whose owner has this ledger account."""
    return account.removeprefix(owner(""))


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """``amount_micro`` millionths of the currency unit from ``debit`` to ``credit``; ``reference`` names the job."""

    transfer_id: str
    kind: str
    debit: str
    credit: str
    amount_micro: int
    reference: str


def settle(cause_id: str, account: str, cost: int, owners: dict[str, int], reference: str) -> list[Transfer]:
    """Charge a customer and pay owners for one accepted message of results; amounts of zero leave no row."""
    transfers = []
    if cost > 0:
        transfers.append(
            Transfer(
                transfer_id=f"{cause_id}/charge",
                kind="usage",
                debit=customer(account),
                credit=PLATFORM,
                amount_micro=cost,
                reference=reference,
            )
        )
    transfers.extend(
        Transfer(
            transfer_id=f"{cause_id}/pay/{vehicle_id}",
            kind="earning",
            debit=PLATFORM,
            credit=owner(vehicle_id),
            amount_micro=owners[vehicle_id],
            reference=reference,
        )
        for vehicle_id in sorted(owners)
        if owners[vehicle_id] > 0
    )
    return transfers
