"""The parts around one agent's loop: engine and its limits, accounts, the owner's desk, forecast, spool.

Decides: which parts a configuration asks for, and how a permit's watts become settings of the engine. Must not: judge,
or touch the machine.
Called by: ``agent.main``.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import msgspec

from motorpool import wire
from motorpool.agent.accounts import Accounts, AccountsConfig, Delivery
from motorpool.agent.enrolment import ConsentFile
from motorpool.agent.forecast import HABITS_NAME, Departures
from motorpool.agent.judge import Judge
from motorpool.agent.notify import Notifier
from motorpool.agent.ocpp import ChargingNeedsFile
from motorpool.agent.owner.desk import OwnerDesk
from motorpool.agent.owner.entries import LOG_DIR
from motorpool.agent.owner.heard import OwnerEar
from motorpool.agent.owner.log import OwnerLog
from motorpool.agent.power.meter import PowerMeter, RaplGauge
from motorpool.agent.power.model import MIN_DUTY, Gauge, PowerModel, SignalGauge, calibrate, declared, plan
from motorpool.agent.power.rapl import Rapl
from motorpool.agent.runtime.build import build_engine, build_engines
from motorpool.agent.runtime.engine import Engine
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.signals.source import SignalSource
from motorpool.agent.spool import KEY_NAME, SPOOL_NAME, DiskSpool, Spool, kept_key
from motorpool.core.energy import Limits
from motorpool.core.guard import Policy, Verdict
from motorpool.core.signals import Reading, Signals, value_of
from motorpool.errors import MotorpoolError
from motorpool.types import VehicleState

if TYPE_CHECKING:
    from motorpool.agent.owner.page import OwnerPage, PageSpec  # a web server, for those who want one

KEEP_S: Final = 5.0  # between two looks for something to write
CALIBRATE_S: Final = 60.0  # between two tries
OTHER_WORK: Final = "other"
log = logging.getLogger(__name__)


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The computer: what it draws with nothing to do and with all cores at work; None: what the policy allows.

    ``calibrated``: measure it at the start where the machine can.
    """

    idle_w: float = 0.0
    max_w: float | None = None
    calibrated: bool = False


class PartsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which parts there are. Without any, the loop is alone: a benchmark of everything else."""

    accounts: AccountsConfig | None = None
    node: NodeConfig = NodeConfig()
    owner_desk: bool = False
    forecast: bool = False
    page: PageSpec | None = None  # needs the desk
    spool_bytes: int = 0  # on disk, encrypted; 0 keeps what waits in memory
    memory_bytes: int | None = None  # of the engine


class Desk:
    """The owner's desk as the guard's side sees it."""

    def __init__(self, desk: OwnerDesk) -> None:
        self._desk = desk

    def judged(self, verdict: Verdict, signals: Signals, state: VehicleState, now_ms: int) -> None:
        """What was decided."""
        self._desk.judged(verdict, signals, state, now_ms)

    def worked(self, delivered: Delivery, now_ms: int) -> None:
        """What was delivered: for which class of customer, never for whom."""
        kind = delivered.customer_class or OTHER_WORK
        done = {name: getattr(delivered, name) for name in delivered.__struct_fields__ if name != "customer_class"}
        try:
            self._desk.log.worked(kind, now_ms, **done)
        except MotorpoolError:  # a class that is no short name of small letters
            self._desk.log.worked(OTHER_WORK, now_ms, **done)


class Parts:
    """Made from the configuration; an asynchronous context that keeps what has to be kept."""

    def __init__(
        self,
        *,
        config: PartsConfig,
        agent_dir: Path,
        vehicle_id: str,
        papers: ConsentFile,
        policy: Policy,
        specs: dict[str, EngineSpec],
        source: SignalSource,
        clock: Callable[[], int],
        state: Callable[[], VehicleState],
        notifier: Notifier | None = None,
    ) -> None:
        self._config = config
        self._agent_dir = agent_dir
        self._vehicle_id = vehicle_id
        self._clock = clock
        self._notifier = notifier
        self._state = state
        self._source = source
        self._default = next(iter(specs))
        self._spec = specs[self._default]
        self._model = _declared(config.node, policy, self._spec)
        self._limited_w: int | None = None
        policy = msgspec.structs.replace(policy, min_watts_w=max(policy.min_watts_w, self._least_w()))
        self.engine: Engine = build_engine(self._spec) if len(specs) == 1 else build_engines(specs, self._default)
        self._rapl = Rapl() if config.node.calibrated else None
        self._meter = PowerMeter(self._model, self._rapl)
        self.accounts = None if config.accounts is None else Accounts(agent_dir, config.accounts, self._meter)
        self.desk: OwnerDesk | None = None
        if config.owner_desk:
            self.desk = OwnerDesk(agent_dir, vehicle_id, papers, OwnerLog(agent_dir / LOG_DIR), clock)
            self.desk.configured(policy, clock())
        self._forecast = Departures(agent_dir / HABITS_NAME) if config.forecast else None
        self.judge = Judge(
            source,
            papers.view if self.desk is None else self.desk.consent,
            policy,
            accounts=self.accounts,
            desk=None if self.desk is None else Desk(self.desk),
            forecast=self._forecast,
            needs=ChargingNeedsFile(agent_dir) if config.forecast else None,
            alive=None if notifier is None else notifier.alive,
        )
        self.spool: Spool | None = None
        if config.spool_bytes:
            self.spool = DiskSpool(
                agent_dir / SPOOL_NAME, kept_key(agent_dir / KEY_NAME), config.spool_bytes, on_written=self._on_written
            )
        self.page: OwnerPage | None = None
        self._ear = OwnerEar(agent_dir, vehicle_id)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._look_now: Callable[[], None] = lambda: None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- power ---------------------------------------------------------------------------------------------------------

    def _least_w(self) -> int:
        """The smallest setting of the engine: less cannot be permitted."""
        return math.ceil(self._model.per_core_w * MIN_DUTY) + 1

    def limit(self, watts_w: int) -> None:
        """Hold the engine to ``watts_w``."""
        self._limited_w = watts_w
        spec, memory_bytes = self._spec, self._config.memory_bytes
        limits = plan(self._model, watts_w, cores=spec.threads, slots=spec.slots, memory_bytes=memory_bytes)
        if limits is None:  # a permit from before a calibration that found more
            limits = Limits(watts_w=watts_w, threads=1, duty=MIN_DUTY, slots=1, memory_bytes=memory_bytes)
        self.engine.limit(limits)

    async def _calibrate(self) -> None:
        """Measure the computer once, in a quiet moment in which work would be allowed."""

        def read(now_ms: int) -> Reading[float] | None:
            reading = self.judge.signals.computer_power_w  # what the loop has seen: this is another thread
            return reading if value_of("computer_power_w", reading, now_ms) is not None else None

        def permitted() -> bool:
            return self._state() is VehicleState.READY and self.judge.permits(self._clock())

        gauges: list[Gauge] = [SignalGauge(read), RaplGauge(Rapl())]
        while True:
            await asyncio.sleep(CALIBRATE_S)
            if not permitted():
                continue
            found = await asyncio.to_thread(calibrate, gauges, self._model, permitted=permitted, clock_ms=self._clock)
            if found is not None:
                self._take_model(found)
                return

    def _take_model(self, found: PowerModel) -> None:
        """Count and plan by another model from now on; an engine that is on is held to it at once."""
        self._model = self._meter.model = found
        self.judge.at_least(self._least_w())
        if self._limited_w is not None:
            self.limit(self._limited_w)
        log.info("%s: power model: %s", self._vehicle_id, found.line())

    # -- the owner, by way of the cell ---------------------------------------------------------------------------------

    def look_now(self, look: Callable[[], None]) -> None:
        """What makes the guard look at once."""
        self._look_now = look
        if self.desk is not None:
            self.desk.look_now = look

    def on_owner(self, message: wire.Statement | wire.OwnerDocument | wire.OwnerAsked) -> None:
        """Something for the owner, or from the owner, has come by the cell."""
        if isinstance(message, wire.Statement):
            if self.accounts is not None:
                self.accounts.stated(message)
            return
        self._spawn(self._obey(message))

    async def _obey(self, message: wire.OwnerDocument | wire.OwnerAsked) -> None:
        """Put a signed paper in place, or rest. What does not hold changes nothing."""
        try:
            await asyncio.to_thread(self._ear.hear, message, self._clock())
        except (MotorpoolError, OSError) as error:
            log.warning("%s: what came for the owner was not done: %s", self._vehicle_id, type(error).__name__)
        self._look_now()

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _on_written(self, count: int) -> None:
        """From a worker thread of the spool."""
        if self._loop is not None and self.accounts is not None:
            self._loop.call_soon_threadsafe(self._wrote, count)

    def _wrote(self, count: int) -> None:
        assert self.accounts is not None
        self.accounts.wrote(count, self._clock())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """None of these fails by design, and none that does stops the car from yielding; but it is said."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("%s: a part of the agent has ended: %s", self._vehicle_id, type(error).__name__)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        log.info("%s: power model: %s", self._vehicle_id, self._model.line())
        self._spawn(self._keep())
        if self.desk is not None:
            self._spawn(self.desk.run())
            if self._config.page is not None:
                await self._serve_page(self.desk, self._config.page)
        if self._config.node.calibrated:
            self._spawn(self._calibrate())
        if self._notifier is not None:
            self._notifier.ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._notifier is not None:
            self._notifier.stopping()
        if self.page is not None:
            await self.page.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.accounts is not None:
            self.accounts.close()
        if self._forecast is not None:
            self._forecast.close()
        if self.desk is not None:
            self.desk.log.close(self._clock())

    async def _serve_page(self, desk: OwnerDesk, spec: PageSpec) -> None:
        """The owner's page; without it the car works all the same."""
        from motorpool.agent.owner.page import OwnerPage  # noqa: PLC0415

        self.page = OwnerPage(desk, spec)
        await self.page.start()
        log.info("%s: the owner's page is at %s", self._vehicle_id, self.page.url)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(KEEP_S)
            now_ms = self._clock()
            if self.accounts is not None:
                await self.accounts.keep(now_ms)
            if self._forecast is not None:
                await self._forecast.keep(now_ms)


def _declared(node: NodeConfig, policy: Policy, spec: EngineSpec) -> PowerModel:
    """The power model of the configuration. A remote engine draws elsewhere: all of it while it has work."""
    most_w = node.idle_w + policy.watts_w if node.max_w is None else node.max_w
    cores = 1 if spec.backend is Backend.REMOTE else spec.threads
    return declared(node_idle_w=node.idle_w, node_max_w=most_w, cores=cores)
