"""What a finished line costs its customer and pays its owners.

Decides: rounding and shares. Must not: know accounts or store anything. Called by: ``core.scheduler``.
"""

from __future__ import annotations

from typing import Final

import msgspec

TOKENS_PER_PRICE: Final = 1_000_000


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Millionths of the currency unit for a million tokens, and the owners' part in hundredths of a percent."""

    input_micro: int
    output_micro: int
    owner_share_bp: int = 7000


def owner_pay(price: Price) -> tuple[int, int]:
    """What owners get for a million prompt and a million generated tokens, so that a vehicle can reckon with it."""
    return price.input_micro * price.owner_share_bp // 10_000, price.output_micro * price.owner_share_bp // 10_000


Shares = list[tuple[str, int]]  # which vehicle generated how many tokens, in the order in which it happened


def cost_micro(price: Price, prompt_tokens: int, completion_tokens: int) -> int:
    """What the customer pays for one line, rounded half up."""
    exact = prompt_tokens * price.input_micro + completion_tokens * price.output_micro
    return (exact + TOKENS_PER_PRICE // 2) // TOKENS_PER_PRICE


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


def split(price: Price, cost: int, prompt_tokens: int, finisher: str, shares: Shares) -> dict[str, int]:
    """How the owners' part of ``cost`` is divided, in millionths: by the value of what each vehicle did.

    The vehicle that finished the line counts for the prompt; each counts for the tokens that it generated. What
    rounding leaves goes to the finisher, so the parts add up to the owners' part exactly.
    """
    pool = cost * price.owner_share_bp // 10_000
    weights: dict[str, int] = {finisher: prompt_tokens * price.input_micro}
    for vehicle_id, tokens in shares:
        weights[vehicle_id] = weights.get(vehicle_id, 0) + tokens * price.output_micro
    total = sum(weights.values())
    if total == 0 or len(weights) == 1:
        return {finisher: pool}
    parts = {vehicle_id: pool * weight // total for vehicle_id, weight in weights.items()}
    parts[finisher] += pool - sum(parts.values())
    return parts
