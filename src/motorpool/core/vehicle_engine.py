"""What the vehicle machine knows of its engine: whether it runs, with which model, how limited, and since when.

Decides: when an engine that died may start again, which sign of life is overdue, and that an engine is told each change
of its watts once. Must not: decide whether an engine may run; that is ``core.vehicle``, which alone calls this room.
"""

from __future__ import annotations

from typing import Final

from motorpool.core.vehicle_events import (
    CancelAttempts,
    Command,
    EngineReady,
    FreezeEngine,
    KillEngine,
    LimitEngine,
    StartEngine,
    ThawEngine,
    VehicleConfig,
)
from motorpool.core.vehicle_outbox import Meter

HEALTHY_MS: Final = 60_000  # an engine that lived this long starts the restart times over


class EngineRecord:
    """The engine as the machine sees it. Appends its commands to ``out``.

    ``loading`` is the model that the running engine was started with, ``model`` the name it gave once it was ready.
    ``ghosts`` are attempts that were handed back while it was frozen: they are cancelled before it thaws.
    """

    def __init__(self, config: VehicleConfig, meter: Meter, out: list[Command]) -> None:
        self._config = config
        self._meter = meter
        self._out = out
        self.on = False
        self.loading: str | None = None
        self.model: str | None = None
        self.fingerprint = ""
        self.slots = 0
        self.start_at_ms = 0
        self.kill_at_ms = 0
        self.quiet_since_ms: int | None = None  # it owes us a sign of life since then
        self.ghosts: list[str] = []
        self._limited_w: int | None = None
        self._restart_ms = config.restart_min_ms
        self._ready_since_ms = 0

    def start(self, model: str, watts_w: int) -> None:
        """Begin to load a model."""
        self._out.append(StartEngine(model=model))
        self.on = True
        self.loading = model
        self._limited_w = None
        self._meter.engine_started()
        self.limit(watts_w)

    def limit(self, watts_w: int) -> None:
        """Hold it to the permit's watts; the same again is not told."""
        if self.on and watts_w != self._limited_w:
            self._limited_w = watts_w
            self._out.append(LimitEngine(watts_w=watts_w))

    def loaded(self, event: EngineReady, now_ms: int) -> bool:
        """It says that it is ready. False: this speaks of an engine that was killed meanwhile."""
        others = {self._config.model, self._config.small_model} - {self.loading}
        if not self.on or event.model in others:
            return False
        self.model = event.model
        self.slots = max(1, event.slots)
        self.fingerprint = event.fingerprint
        self._ready_since_ms = now_ms
        return True

    def freeze(self, ghosts: list[str], now_ms: int) -> None:
        """Take its processor time; it keeps its memory for a while."""
        self._out.append(FreezeEngine())
        self.ghosts = ghosts
        self.kill_at_ms = now_ms + self._config.freeze_grace_ms

    def thaw(self, watts_w: int) -> None:
        """Let it go on, without what was handed back, and with no more than the new permit's watts."""
        if self.ghosts:
            self._out.append(CancelAttempts(keys=self.ghosts))
            self.ghosts = []
        self.limit(watts_w)
        self._out.append(ThawEngine())

    def kill(self) -> None:
        """End it, if there is one."""
        if self.on:
            self._out.append(KillEngine())
        self.gone()

    def gone(self) -> None:
        """There is no engine any more."""
        self.on = False
        self.loading = self.model = None
        self.quiet_since_ms = None
        self.ghosts = []
        self.slots = 0

    def died(self, now_ms: int, *, was_up: bool) -> None:
        """It ended by itself: the next one starts later, and later each time unless it was well for a while."""
        if was_up and now_ms - self._ready_since_ms >= HEALTHY_MS:
            self._restart_ms = self._config.restart_min_ms
        self.gone()
        self.start_at_ms = now_ms + self._restart_ms
        self._restart_ms = min(self._restart_ms * 2, self._config.restart_max_ms)

    def heard(self) -> None:
        """It gave a sign of life."""
        self.quiet_since_ms = None

    def is_silent(self, now_ms: int) -> bool:
        """Whether it holds attempts and has given no sign of life for too long."""
        return self.quiet_since_ms is not None and now_ms - self.quiet_since_ms >= self._config.stall_ms
