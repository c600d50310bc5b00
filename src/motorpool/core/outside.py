"""What a vehicle's state may say outside the car: less than the guard knows.

Decides: which reasons keep their detail, and how coarse the charge is. Must not: change what the car itself shows its
owner, or any decision. Called by: ``core.vehicle``, when it puts a state message together.

A detail may hold the owner's own times ("80 % by 07:30", quiet hours) or say who has the car; the code alone is enough
for an operator. A charge to the tenth of a percent before and after a drive tells how long the drive was: a tenth of a
60 kWh battery is 400 metres. To the next lower 5 % it tells twenty kilometres at best.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from motorpool.types import Reason, ReasonCode

CHARGE_STEP_PCT: Final = 5
# Their details name a signal, a limit of the machine or a wait. A new code is silent until it is put here.
DETAIL_MAY_LEAVE: Final = frozenset(
    {
        ReasonCode.CONSENT_INVALID,
        ReasonCode.SIGNAL_MISSING,
        ReasonCode.SIGNAL_STALE,
        ReasonCode.NO_GRID_POWER,
        ReasonCode.CHARGING_FIRST,
        ReasonCode.CIRCUIT_LIMIT,
        ReasonCode.TOO_HOT,
        ReasonCode.FAULT,
        ReasonCode.BUDGET_USED_UP,
        ReasonCode.BUDGET_UNKNOWN,
        ReasonCode.METERED_NETWORK,
        ReasonCode.DWELL,
    }
)


def reasons_outside(reasons: Iterable[Reason]) -> list[Reason]:
    """The reasons with the details that may leave the car."""
    return [reason if reason.code in DETAIL_MAY_LEAVE else Reason(code=reason.code) for reason in reasons]


def charge_outside_pct(soc_pct: float | None) -> float | None:
    """The charge rounded down to 5 %."""
    return None if soc_pct is None else float(math.floor(soc_pct / CHARGE_STEP_PCT) * CHARGE_STEP_PCT)
