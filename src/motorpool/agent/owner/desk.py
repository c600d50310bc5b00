"""The owner's desk in the agent: what the owner said goes to the guard, what the guard said goes to the owner.

Decides: what becomes an entry of the owner's log. Must not: wait or write in the guard's turn; judge a consent.
Called by: ``agent.loop`` (``consent``, ``judged``, ``worked``), ``agent.main`` (the rest), ``agent.owner.page``.

The log is written by ``run`` in a thread of its own, so that no slow disk keeps the guard from looking.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from motorpool.agent.enrolment import ConsentFile
from motorpool.agent.owner import words
from motorpool.agent.owner.acts import Acts, ActsFile, car_was_driven
from motorpool.agent.owner.entries import LOG_DIR, EntryKind
from motorpool.agent.owner.log import OwnerLog
from motorpool.core.guard import Verdict
from motorpool.core.policy import ConsentView, Policy
from motorpool.core.signals import Signals
from motorpool.trust.credentials import write_secret
from motorpool.types import Permit, ReasonCode, VehicleState

log = logging.getLogger(__name__)

POLICY_NAME: Final = "policy-seen.json"
FLUSH_S: Final = 2.0
WEEK_MS: Final = 7 * 86_400_000
WEEKS: Final = 8
DRIVING_KMH: Final = 3.0


class OwnerDesk:
    """Between one vehicle and its owner. ``look_now`` makes the guard look at once after an act."""

    def __init__(
        self,
        agent_dir: Path,
        vehicle_id: str,
        papers: ConsentFile,
        owner_log: OwnerLog,
        clock: Callable[[], int],
        *,
        look_now: Callable[[], None] | None = None,
    ) -> None:
        self.agent_dir = agent_dir
        self.vehicle_id = vehicle_id
        self.log = owner_log
        self.clock = clock
        self.look_now = look_now or (lambda: None)
        self._papers = papers
        self._acts_file = ActsFile(agent_dir)
        self._acts = self._acts_file()
        self._view: ConsentView | None = None
        self._driven_ms = 0
        self._verdict: Verdict = ()
        self._judged_ms = 0
        self._working = False
        self._soc_pct: float | None = None
        self._plugged: bool | None = None

    @property
    def papers_view(self) -> ConsentView | None:
        """What the consent said at the latest look; None before the first."""
        return self._view

    @property
    def acts(self) -> Acts:
        """What the owner said, as it stands now."""
        return self._acts_file()

    # -- the guard's side ----------------------------------------------------------------------------------------------

    def consent(self, now_ms: int) -> ConsentView:
        """What the guard asks at every look. A change of it is an entry of the log."""
        view = self._papers.view(now_ms)
        said = self._acts_file()
        if view is not self._view:
            self._note_consent(view, now_ms)
            self._view = view
        if said is not self._acts:
            self._note_acts(said, now_ms)
            self._acts = said
        return view

    def judged(self, verdict: Verdict, signals: Signals, state: VehicleState, now_ms: int) -> None:
        """What the guard has just decided, and upon which signals."""
        self._verdict, self._judged_ms = verdict, now_ms
        self._working = state is VehicleState.WORKING
        soc, plugged, speed = signals.soc_displayed_pct, signals.cable_connected, signals.speed_kmh
        self._soc_pct = None if soc is None else round(soc.value, 1)
        self._plugged = None if plugged is None else plugged.value
        self.log.verdict(verdict, now_ms, working=self._working)
        needed_ms = self._acts.need_car_ms
        if needed_ms and speed is not None and abs(speed.value) >= DRIVING_KMH and speed.at_ms >= needed_ms:
            self._driven_ms = needed_ms

    def _keep_driven(self) -> None:
        """Note beyond this process that the car was driven; until that succeeds, it keeps resting."""
        acts = self._acts
        if acts.need_car_ms and acts.need_car_ms == self._driven_ms:
            try:
                car_was_driven(self.agent_dir, acts)
            except OSError as error:
                log.warning("that the car was driven could not be kept: %s", error.strerror)

    def _note_consent(self, view: ConsentView, now_ms: int) -> None:
        before = self._view
        if before is not None and msgspec.structs.replace(before, paused_until_ms=view.paused_until_ms) == view:
            return
        if before is None and view.refusal is ReasonCode.CONSENT_MISSING:
            return
        if view.refusal is ReasonCode.CONSENT_WITHDRAWN:
            what = "the consent was taken back"
        elif view.refusal is ReasonCode.CONSENT_MISSING:
            what = "the consent is gone: its file was removed"
        elif view.refusal is not None:
            what = f"the consent does not hold: {words.WHY[view.refusal]}"
        elif before is not None and before.refusal is None and _limits(before) == _limits(view):
            what = "the consent was confirmed"
        else:
            what = words.consent(view)
        self.log.tell(EntryKind.CONSENT, what, now_ms, by="owner")

    def _note_acts(self, said: Acts, now_ms: int) -> None:
        told = words.acts(said, now_ms)
        if told is None and words.acts(self._acts, now_ms) is not None:
            driven = self._acts.need_car_ms != 0 and self._acts.need_car_ms == self._driven_ms
            told = "the car was driven: it may work again when it is parked" if driven else "you said: go on"
        if told is not None:
            self.log.tell(EntryKind.ACT, told, now_ms, by="owner")

    # -- the agent's side ----------------------------------------------------------------------------------------------

    def configured(self, policy: Policy, now_ms: int, *, by: str = "operator") -> None:
        """Compare the configuration with that of the last start, and note every change. Called once at the start."""
        path = self.agent_dir / LOG_DIR / POLICY_NAME
        now: dict[str, Any] = msgspec.to_builtins(policy)
        try:
            before = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            before = None
        now = msgspec.json.decode(msgspec.json.encode(now))
        if before == now:
            return
        if before is None:
            self.log.policy(f"power up to {policy.watts_w} W, floor {policy.floor_pct:g} %", now_ms, by=by)
        else:
            for name in sorted({*before, *now}):
                old, new = before.get(name), now.get(name)
                if old != new:
                    self.log.policy(f"{name}: {old} became {new}", now_ms, by=by)
        self.log.flush()
        if not self.log.waiting:  # else the next start notes it once more, rather than nobody ever
            write_secret(path, msgspec.json.encode(now))

    async def run(self) -> None:
        """Write what there is to write every few seconds, in a thread, until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await asyncio.to_thread(self.keep)

    def keep(self) -> None:
        """Write what waits. It may take as long as the disk takes."""
        self._keep_driven()
        self.log.flush()

    # -- the owner's side ----------------------------------------------------------------------------------------------

    def state(self, now_ms: int) -> dict[str, Any]:
        """How the car stands, for the page and the command line. Holds no location and no trip."""
        acts, view = self._acts_file(), self._papers.view(now_ms)
        verdict = self._verdict
        reasons = () if isinstance(verdict, Permit) else verdict
        return {
            "now_ms": now_ms,
            "judged_ms": self._judged_ms,
            "vehicle_id": self.vehicle_id,
            "working": self._working,
            "allowed": isinstance(verdict, Permit),
            "watts_w": verdict.watts_w if isinstance(verdict, Permit) else 0,
            "battery_fed": isinstance(verdict, Permit) and verdict.battery_fed,
            "sentence": self._sentence(),
            "why": [{"code": r.code.value, "words": words.WHY[r.code], "detail": r.detail} for r in reasons],
            "soc_pct": self._soc_pct,
            "plugged": self._plugged,
            "acts": {
                "paused_until_ms": acts.paused_until_ms if acts.paused_until_ms > now_ms else 0,
                "need_car": acts.need_car_ms != 0,
                "unreadable": acts.unreadable,
                "words": words.acts(acts, now_ms),
            },
            "consent": as_consent(view),
        }

    def _sentence(self) -> str:
        verdict = self._verdict
        if self._judged_ms == 0:
            return "The car has just started and has not looked yet."
        if isinstance(verdict, Permit):
            source = " from the battery, as you allowed" if verdict.battery_fed else ""
            what = "works for others" if self._working else "may work and waits for something to do"
            return f"Your car {what}{source}."
        return f"Your car does not work: {words.WHY[verdict[0].code]}." if verdict else "Your car does not work."

    def statement(self, now_ms: int, weeks: int = WEEKS) -> list[dict[str, Any]]:
        """The weeks' earnings, this week first. Reads files: call it in a thread."""
        self.log.flush()
        monday_ms = local_monday_ms(now_ms)
        times = [(monday_ms - week * WEEK_MS, monday_ms - (week - 1) * WEEK_MS) for week in range(weeks)]
        return [words.as_statement(summary) for summary in self.log.reader.summaries(times)]

    def entries(self, since_ms: int, limit: int) -> list[dict[str, Any]]:
        """The latest entries of the log, each with its words. Reads files: call it in a thread."""
        self.log.flush()
        return [
            {**msgspec.to_builtins(entry), "words": words.entry(entry)}
            for entry in self.log.reader.entries(since_ms, limit)
        ]


def as_consent(view: ConsentView) -> dict[str, Any]:
    """The consent for a program: what was refused, or the limits."""
    told: dict[str, Any] = msgspec.to_builtins(view)
    told["words"] = words.consent(view)
    return told


def local_monday_ms(now_ms: int) -> int:
    """The last midnight before a Monday, by the clock of this computer."""
    local = time.localtime(now_ms / 1000)
    midnight = (local.tm_year, local.tm_mon, local.tm_mday - local.tm_wday, 0, 0, 0, 0, 0, -1)
    return round(time.mktime(midnight) * 1000)


def _limits(view: ConsentView) -> ConsentView:
    return msgspec.structs.replace(view, granted_ms=0, paused_until_ms=0)
