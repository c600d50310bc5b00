"""Transfers: every amount leaves one account and enters another, so that all accounts together are always zero.

Theory. Work is worth fractions of a millionth, transfers are whole millionths. What is below one is never rounded away:
it is kept, exactly, under the name of whoever owes it or is owed it, and becomes a transfer as soon as it is a whole
one. So nobody is ever charged or paid more than was worked, each is less than a millionth behind, and neither order,
repetition nor a restart changes a sum. A job has a rest of its own, so that its cost depends on its lines alone;
what is left of it at its end is not charged.

Decides: names of accounts and of transfers, what is due. A transfer's id is derived from what caused it, so that
posting it again is refused by the books. Must not: know what anything costs. Called by: ``core.scheduler``, ``server``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from motorpool.core.pricing import ATTO_PER_MICRO

PLATFORM: Final = "platform"


def customer(account: str) -> str:
    """The ledger account of a customer."""
    return f"customer:{account}"


def owner(vehicle_id: str) -> str:
    """The ledger account of a vehicle's owner."""
    return f"owner:{vehicle_id}"


def job(job_id: str) -> str:
    """Under which name the rest of a job is kept; no transfer names it."""
    return f"job:{job_id}"


def vehicle_of(account: str) -> str:
    """The vehicle whose owner has this ledger account."""
    return account.removeprefix(owner(""))


class Rests:
    """What is below a millionth, by name: of owners and customers for good, of jobs until their end.

    About 150 bytes for each name whose rest is not zero.
    """

    def __init__(self) -> None:
        self._atto: dict[str, int] = {}
        self._changed: dict[str, int] = {}

    def of(self, name: str) -> int:
        """Its rest, 0 to ATTO_PER_MICRO - 1."""
        return self._atto.get(name, 0)

    def add(self, name: str, atto: int) -> int:
        """So much more; returns the whole millionths that are due now."""
        before = self._atto.get(name, 0)
        due_micro, rest = divmod(before + atto, ATTO_PER_MICRO)
        if rest != before:
            self._changed[name] = rest
            if rest:
                self._atto[name] = rest
            else:
                del self._atto[name]
        return due_micro

    def add_each(self, name: str, attos: list[int]) -> list[int]:
        """The same of several amounts, one after another."""
        rest = self._atto.get(name, 0)
        due_micro: list[int] = []
        for atto in attos:
            due, rest = divmod(rest + atto, ATTO_PER_MICRO)
            due_micro.append(due)
        self.add(name, rest - self._atto.get(name, 0))
        return due_micro

    def changed(self) -> dict[str, int]:
        """The rests that were changed since the last call, as they are now: the books have to know them."""
        changed, self._changed = self._changed, {}
        return changed

    def restore(self, rests: Iterable[tuple[str, int]]) -> None:
        """Put back what the books know."""
        self._atto.update((name, atto) for name, atto in rests if atto)

    def drop(self, name: str) -> None:
        """Forget the rest of a job that has ended."""
        self._atto.pop(name, None)


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """``amount_micro`` millionths of the currency unit from ``debit`` to ``credit``; ``reference`` names the job."""

    transfer_id: str
    kind: str
    debit: str
    credit: str
    amount_micro: int
    reference: str


def settle(
    rests: Rests, *, cause_id: str, account: str, cost_micro: int, owners_atto: Mapping[str, int], reference: str
) -> list[Transfer]:
    """Charge a customer and pay owners, by vehicle, what is due to them now; amounts of zero leave no row."""
    transfers = []
    if cost_micro > 0:
        transfers.append(
            Transfer(
                transfer_id=f"{cause_id}/charge",
                kind="usage",
                debit=customer(account),
                credit=PLATFORM,
                amount_micro=cost_micro,
                reference=reference,
            )
        )
    for vehicle_id in sorted(owners_atto):
        due_micro = rests.add(owner(vehicle_id), owners_atto[vehicle_id])
        if due_micro > 0:
            transfers.append(
                Transfer(
                    transfer_id=f"{cause_id}/pay/{vehicle_id}",
                    kind="earning",
                    debit=PLATFORM,
                    credit=owner(vehicle_id),
                    amount_micro=due_micro,
                    reference=reference,
                )
            )
    return transfers
