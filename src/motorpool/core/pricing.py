"""What finished work costs its customer and pays its owners, exactly: nothing is rounded here.

Decides: prices and shares. Amounts are ``_atto``, 10^-18 of the currency unit: a token is worth whole numbers of them
whatever the price is, and so is the owners' part of it. ``core.ledger`` makes millionths of them. Must not: know
accounts or store anything. Called by: ``core.scheduler``.
"""

from __future__ import annotations

from typing import Final

import msgspec

TOKENS_PER_PRICE: Final = 1_000_000
ATTO_PER_MICRO: Final = 10**12
WHOLE_BP: Final = 10_000
_ATTO: Final = ATTO_PER_MICRO // TOKENS_PER_PRICE  # in one millionth for a million tokens, for each token
_ATTO_BP: Final = _ATTO // WHOLE_BP


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Millionths of the currency unit for a million tokens, and the owners' part in hundredths of a percent."""

    input_micro: int
    output_micro: int
    owner_share_bp: int = 7000


def owner_pay(price: Price) -> tuple[int, int]:
    """What owners get for a million prompt and a million generated tokens, so that a vehicle can reckon with it."""
    return price.input_micro * price.owner_share_bp // WHOLE_BP, price.output_micro * price.owner_share_bp // WHOLE_BP


Shares = list[tuple[str, int]]  # which vehicle generated how many tokens, in the order in which it happened


def cost_atto(price: Price, prompt_tokens: int, completion_tokens: int) -> int:
    """What the customer owes for one answer."""
    return (prompt_tokens * price.input_micro + completion_tokens * price.output_micro) * _ATTO


def trim(shares: Shares, tokens: int) -> Shares:
    """The shares of the first ``tokens`` tokens."""
    kept: Shares = []
    for vehicle_id, count in shares:
        take = min(count, tokens)
        if take > 0:
            kept.append((vehicle_id, take))
            tokens -= take
    return kept


def extend(shares: Shares, vehicle_id: str, tokens: int) -> Shares:
    """``shares`` and ``tokens`` more by ``vehicle_id``."""
    if tokens <= 0:
        return shares
    if shares and shares[-1][0] == vehicle_id:
        return [*shares[:-1], (vehicle_id, shares[-1][1] + tokens)]
    return [*shares, (vehicle_id, tokens)]


def split_atto(price: Price, prompt_tokens: int, finisher: str, shares: Shares) -> dict[str, int]:
    """What is owed to the owner of each vehicle for one answer: its tokens are those of ``shares``.

    The vehicle that finished it has read the prompt; each has generated its share. Together it is the owners' part of
    ``cost_atto``, to the last one.
    """
    worth = {finisher: prompt_tokens * price.input_micro}
    for vehicle_id, tokens in shares:
        worth[vehicle_id] = worth.get(vehicle_id, 0) + tokens * price.output_micro
    return {vehicle_id: each * price.owner_share_bp * _ATTO_BP for vehicle_id, each in worth.items()}
