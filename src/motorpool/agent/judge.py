"""Each look of the guard, with all that goes into it: signals, consent, budgets, the owner's times.

Decides: nothing; ``core.guard`` does. Gathers what a verdict depends on, and tells the accounts, the owner's desk and
the forecast afterwards, so that none of them delays a freeze.
Must not: touch the engine or the machine, or wait for anything.
Called by: ``agent.loop`` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from motorpool.agent.accounts import Accounts
from motorpool.agent.accounts import Delivery as Delivered
from motorpool.agent.forecast import Departures, local_offset_min
from motorpool.agent.ocpp import merged
from motorpool.agent.signals.source import SignalSource
from motorpool.core.departures import AWAY, Outlook
from motorpool.core.guard import Budgets, ConsentView, History, Policy, Verdict, decide
from motorpool.core.policy import ReadyBy
from motorpool.core.signals import NetworkClass, Signals, value_of
from motorpool.core.vehicle_events import VerdictGiven
from motorpool.types import Permit, ReasonCode, VehicleState
from motorpool.wire import Answered, Grant, Open, Results, Tokens

DAY_MS: Final = 86_400_000
NO_REGION: Final = "unknown"
OFFSETS_MS: Final = 60_000  # between two looks at the local time
_COMPUTING: Final = frozenset({VehicleState.STARTING, VehicleState.WORKING})
_ENGINE_ON: Final = _COMPUTING | {VehicleState.READY}


class Desk(Protocol):
    """The owner's desk, as the guard's side sees it (``agent.owner.desk``)."""

    def judged(self, verdict: Verdict, signals: Signals, state: VehicleState, now_ms: int) -> None:
        """What was decided."""

    def worked(self, delivered: Delivered, now_ms: int) -> None:
        """What was delivered."""


class Needs(Protocol):
    """What the charging point was told (``agent.ocpp``)."""

    def read(self, now_ms: int) -> Signals:
        """Two hints, all else missing."""


class Judge:
    """One vehicle's looks. Every part but the first three may be missing, as in benchmarks of everything else."""

    def __init__(
        self,
        source: SignalSource,
        consent: Callable[[int], ConsentView],
        policy: Policy,
        *,
        accounts: Accounts | None = None,
        desk: Desk | None = None,
        forecast: Departures | None = None,
        needs: Needs | None = None,
        offset_min: Callable[[int], int] = local_offset_min,
        alive: Callable[[int], None] | None = None,
    ) -> None:
        self._source = source
        self._consent = consent
        self._policy = policy
        self._desk = desk
        self._forecast = forecast
        self._needs = needs
        self._offset_min = offset_min
        self._alive = alive
        self._offsets_ms: int | None = None
        self._history = History() if accounts is None else accounts.history
        self._signals = Signals()
        self._view = ConsentView()
        self._verdict: Verdict = ()
        self._outlook: Outlook = AWAY
        self.accounts = accounts
        self._finds_region = False
        self.may_send = True

    @property
    def drawn_mws(self) -> int | None:
        """What the vehicle has drawn for us so far; None without accounts."""
        return None if self.accounts is None else self.accounts.drawn_mws

    @property
    def is_measured(self) -> bool:
        """Whether the latest part of it was measured."""
        return self.accounts is not None and self.accounts.is_measured

    @property
    def signals(self) -> Signals:
        """What the latest look saw."""
        return self._signals

    def permits(self, now_ms: int) -> bool:
        """Whether the latest permit still holds. From any thread: it ends by the clock, even if nobody looks again."""
        verdict = self._verdict
        return isinstance(verdict, Permit) and now_ms < verdict.until_ms

    def at_least(self, watts_w: int) -> None:
        """Permit no less than this: the engine cannot be held to less."""
        if watts_w > self._policy.min_watts_w:
            self._policy = msgspec.structs.replace(self._policy, min_watts_w=watts_w)

    def look(self, now_ms: int, state: VehicleState, cpu_ms: Callable[[], int]) -> VerdictGiven:
        """Judge. ``cpu_ms`` tells the engine's processor time so far."""
        self._tell_time(now_ms)
        view = self._view = self._consent(now_ms)
        signals = self._source.read(now_ms)
        if self._needs is not None:
            signals = merged(signals, self._needs.read(now_ms), now_ms)
        self._signals = signals
        budgets = self._budgets(now_ms, signals, state, cpu_ms)
        verdict, self._history = decide(self._policy, view, signals, budgets, self._history, now_ms)
        self._verdict = verdict
        permit = verdict if isinstance(verdict, Permit) else None
        reasons = () if isinstance(verdict, Permit) else verdict
        self.may_send = not any(reason.code is ReasonCode.METERED_NETWORK for reason in reasons)
        soc, plugged = signals.soc_displayed_pct, signals.cable_connected
        outlook = self._outlook
        return VerdictGiven(
            permit=permit,
            reasons=reasons,
            soc_pct=None if soc is None else round(soc.value, 1),
            plugged=None if plugged is None else plugged.value,
            stay_bound_ms=outlook.stay_bound_ms,
            risk_15min=None if outlook is AWAY else outlook.risk_15min,
            region=self._region(signals, now_ms),
            drawn_mws=self.drawn_mws,
            is_measured=self.is_measured,
        )

    def _region(self, signals: Signals, now_ms: int) -> str | None:
        """The region that the car has found; one that once found one and does so no more is in none."""
        found = value_of("region", signals.region, now_ms)
        self._finds_region = self._finds_region or found is not None
        return (found or NO_REGION) if self._finds_region else None

    def afterwards(self, now_ms: int, state: VehicleState) -> None:
        """Tell everybody else what was decided; ``state`` is what it has led to."""
        if self._alive is not None:
            self._alive(now_ms)
        if self.accounts is not None:
            self.accounts.remember(self._history)
        if self._desk is not None:
            self._desk.judged(self._verdict, self._signals, state, now_ms)
        if self._forecast is not None:
            self._forecast.observe(self._signals, now_ms, self._policy.utc_offset_min)
            self._outlook = self._forecast.outlook(now_ms, self._times())

    def _times(self) -> list[ReadyBy]:
        """When the owner wants the car, by the consent and by the vehicle's profile."""
        times = list(self._view.schedule)
        minutes = (self._view.ready_by_minute, self._policy.ready_by_minute)
        return times + [ReadyBy(minute=minute) for minute in minutes if minute is not None]

    def _tell_time(self, now_ms: int) -> None:
        """Follow the local time: now, and a day from now."""
        if self._offsets_ms is not None and 0 <= now_ms - self._offsets_ms < OFFSETS_MS:
            return
        self._offsets_ms = now_ms
        now_min, next_min = self._offset_min(now_ms), self._offset_min(now_ms + DAY_MS)
        if (now_min, next_min) != (self._policy.utc_offset_min, self._policy.utc_offset_next_min):
            self._policy = msgspec.structs.replace(self._policy, utc_offset_min=now_min, utc_offset_next_min=next_min)

    def _budgets(self, now_ms: int, signals: Signals, state: VehicleState, cpu_ms: Callable[[], int]) -> Budgets:
        accounts = self.accounts
        if accounts is None:
            return Budgets()
        plugged = signals.cable_connected is not None and signals.cable_connected.value is True
        live = signals.grid_power_available is not None and signals.grid_power_available.value is True
        grid_fed = plugged and live and self._history.draining_since_ms is None
        accounts.advance(
            now_ms,
            signals,
            engine_on=state in _ENGINE_ON,
            computing=state in _COMPUTING,
            grid_fed=grid_fed,
            cpu_ms=cpu_ms(),
        )
        return accounts.budgets(
            now_ms,
            signals,
            working=state is VehicleState.WORKING,
            grid_fed=grid_fed,
            utc_offset_min=self._policy.utc_offset_min,
        )

    # -- what goes over the link ---------------------------------------------------------------------------------------

    def granted(self, message: Grant | Open) -> None:
        """Work has come in."""
        if self.accounts is not None:
            self.accounts.granted(message)

    def delivered(self, message: Results | Tokens | Answered, now_ms: int) -> None:
        """Work goes out."""
        if self.accounts is None:
            return
        delivered = self.accounts.delivered(message, now_ms, self._policy.utc_offset_min)
        if delivered is not None and self._desk is not None:
            self._desk.worked(delivered, now_ms)

    def passed(self, count: int, now_ms: int) -> None:
        """So many bytes went over the network, one way or the other."""
        if self.accounts is None:
            return
        network = value_of("network", self._signals.network, now_ms) or self._policy.network
        if network not in {NetworkClass.UNMETERED, NetworkClass.NONE}:
            self.accounts.sent_metered(count, now_ms)
