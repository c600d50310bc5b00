"""Puts the agent of one vehicle together from its configuration, and runs it until it is asked to stop.

Decides: which parts work together. Must not: read the environment, or hold policy.
Called by: the command line (``motorpool agent``, ``motorpool dev``), benchmarks (``run_many``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from motorpool import wire
from motorpool.agent.enrolment import ConsentFile
from motorpool.agent.loop import GUARD_INTERVAL_MS, AgentLoop, Clock, Link
from motorpool.agent.notify import Notifier
from motorpool.agent.parts import Parts, PartsConfig
from motorpool.agent.runtime.spec import REMOTE_SILENCE_S, Backend, EngineSpec
from motorpool.agent.signals.car import CarSpec, SimulatedCar
from motorpool.agent.signals.owner_port import OwnerPort
from motorpool.agent.signals.source import AlwaysParked, NoSignals, SignalSource
from motorpool.bus import VehicleLink
from motorpool.catalogue import Catalogue, model_path
from motorpool.core.guard import Policy
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import VehicleConfig
from motorpool.trust.credentials import load_credentials

log = logging.getLogger(__name__)

CONNECTING_AT_ONCE: Final = 32  # of many vehicles in one process
PARKED_GUARD_INTERVAL_MS: Final = 1_000
STALL_MS: Final = 300_000  # without a sign of life from an engine that holds attempts: a starved one is no use either
REMOTE_STALL_MS: Final = round(REMOTE_SILENCE_S * 1000) + 60_000  # it bounds the silence of its server by itself
LOOKS_A_PERMIT: Final = 8  # a permit outlives this many looks of the guard that did not come
SILENCE_S: Final = 0.6  # with the time to be sure, an engine whose agent hangs has ended within a second
LOOKS_A_SILENCE: Final = 2.4  # where the guard looks more seldom
GB: Final = 10**9
MAX_MEMORY_GB: Final = 255


# From the agent's clock and what the computer draws: a source, which may have to be entered as a context.
SourceFactory = Callable[[Callable[[], int], Callable[[], float]], SignalSource]


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one agent needs.

    ``small`` is the engine of the lowest rung of the thermal ladder. ``car`` is the simulated car that it is in. None
    and no ``source`` (of a real car, or of a recording) is a vehicle without signals: ``run_agent`` then never gets a
    permit, while ``run_many`` takes it for one that is always parked and plugged in. ``models_on_disk`` are those that
    lie here beside those of its engines, see ``on_disk``.
    """

    agent_dir: Path
    credentials_path: Path
    consent_path: Path
    owner_public_key_path: Path
    engine: EngineSpec
    small: EngineSpec | None = None
    policy: Policy = Policy()
    parts: PartsConfig = PartsConfig()
    car: CarSpec | None = CarSpec()
    source: SourceFactory | None = None
    region: str = "local"
    models_on_disk: tuple[str, ...] = ()
    state_interval_ms: int = 5_000
    guard_interval_ms: int = GUARD_INTERVAL_MS
    freeze_grace_ms: int = 5_000

    def machine_config(self) -> VehicleConfig:
        """The bounds and times of the vehicle machine.

        A server elsewhere computes on while our end of the connection is frozen, and stops only when that is closed: a
        remote engine is killed at once.
        """
        remote = self.engine.backend is Backend.REMOTE
        return VehicleConfig(
            model=self.engine.model,
            small_model=None if self.small is None else self.small.model,
            region=self.region,
            state_interval_ms=self.state_interval_ms,
            freeze_grace_ms=0 if remote else self.freeze_grace_ms,
            stall_ms=REMOTE_STALL_MS if remote else STALL_MS,
            memory_gb=None if remote else memory_gb(self.parts.memory_bytes),
            models_on_disk=self._models(),
        )

    def _models(self) -> tuple[str, ...]:
        """What the cell is told that this vehicle can load: its own models, and then the others."""
        own = [self.engine.model, *([] if self.small is None else [self.small.model])]
        others = () if self.engine.backend is Backend.REMOTE else self.models_on_disk
        return tuple(dict.fromkeys((*own, *others)))[: wire.MAX_ON_DISK]

    def guard_policy(self) -> Policy:
        """The owner's policy, with permits that outlive a few looks of the guard."""
        permit_ms = max(self.policy.permit_ms, LOOKS_A_PERMIT * self.guard_interval_ms)
        return msgspec.structs.replace(self.policy, permit_ms=permit_ms, has_small_model=self.small is not None)

    def engine_specs(self) -> dict[str, EngineSpec]:
        """The engine, and the small one if there is one; each ends itself when it hears nothing from the agent."""
        silence_s = max(SILENCE_S, LOOKS_A_SILENCE * self.guard_interval_ms / 1000)
        specs = [self.engine, *([] if self.small is None else [self.small])]
        return {spec.model: msgspec.structs.replace(spec, silence_s=silence_s) for spec in specs}


def memory_gb(limit_bytes: int | None) -> int:
    """What an engine may have at most, in 10^9 bytes: its limit, or all that the computer has."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min((there if limit_bytes is None else min(limit_bytes, there)) // GB, MAX_MEMORY_GB)


def on_disk(catalogue: Catalogue, folder: Path) -> tuple[str, ...]:
    """The models of a catalogue whose files lie in ``folder``, with the size that they must have; none is read.

    What is in a file is checked before it is loaded.
    """
    found = []
    for model in catalogue.models.values():
        path = model_path(model, folder)
        try:
            if path is not None and path.stat().st_size == model.size_bytes:
                found.append(model.id)
        except OSError:
            continue  # it is not here
    return tuple(found)


async def run_agent(config: AgentConfig, stop: asyncio.Event | None = None, notifier: Notifier | None = None) -> None:
    """Run one agent until ``stop`` is set, or until SIGTERM or SIGINT if there is none.

    Raises SetupError or TrustError when its credentials cannot be read.
    """
    with _stopping(stop) as stopped:
        await _run_one(config, stopped, NoSignals(), None, notifier)


async def run_many(configs: list[AgentConfig], stop: asyncio.Event | None = None) -> None:
    """Run many agents in this process, each with its own connection; for benchmarks and simulated fleets.

    A vehicle that is always parked is looked at once a second at most: nothing about it can change but its consent.
    """
    gate = asyncio.Semaphore(CONNECTING_AT_ONCE)
    with _stopping(stop) as stopped:
        async with asyncio.TaskGroup() as group:
            for config in configs:
                group.create_task(_run_one(_looked_at_seldom(config), stopped, AlwaysParked(), gate))


def _looked_at_seldom(config: AgentConfig) -> AgentConfig:
    if config.car is not None:
        return config
    interval_ms = max(config.guard_interval_ms, PARKED_GUARD_INTERVAL_MS)
    return msgspec.structs.replace(config, guard_interval_ms=interval_ms)


async def _run_one(
    config: AgentConfig,
    stopped: asyncio.Event,
    without_car: SignalSource,
    gate: asyncio.Semaphore | None,
    notifier: Notifier | None = None,
) -> None:
    credentials = load_credentials(config.credentials_path)
    clock = Clock()
    machine = VehicleMachine(config.machine_config(), incarnation=secrets.token_hex(8))
    source = without_car
    port: OwnerPort | None = None
    if config.car is not None:
        car = SimulatedCar(config.car, clock(), drawn_w=lambda: float(machine.watts_now_w))
        source = car
        port = OwnerPort(config.agent_dir, car, clock)
        await port.start()
    elif config.source is not None:
        source = config.source(clock, lambda: float(machine.watts_now_w))
    papers = ConsentFile(config.consent_path, config.owner_public_key_path, credentials.vehicle_id)
    parts = Parts(
        config=config.parts,
        agent_dir=config.agent_dir,
        vehicle_id=credentials.vehicle_id,
        papers=papers,
        policy=config.guard_policy(),
        specs=config.engine_specs(),
        source=source,
        clock=clock,
        state=lambda: machine.state,
        notifier=notifier,
    )
    loop = AgentLoop(
        name=credentials.vehicle_id,
        machine=machine,
        engine=parts.engine,
        source=source,
        judge=parts.judge,
        clock=clock,
        guard_interval_ms=config.guard_interval_ms,
        spool=parts.spool,
        limit=parts.limit,
        on_owner=parts.on_owner,
    )
    parts.look_now(loop.look_now)

    async def connect(on_down: Callable[[bytes], None], on_link: Callable[[bool], None]) -> Link:
        if gate is None:
            return await VehicleLink.connect(credentials, on_down, on_link)
        async with gate:
            return await VehicleLink.connect(credentials, on_down, on_link)

    async def wait_for_stop() -> None:
        await stopped.wait()
        loop.stop()

    waiting = asyncio.create_task(wait_for_stop())
    try:
        async with AsyncExitStack() as entered:
            if isinstance(source, AbstractAsyncContextManager):
                await entered.enter_async_context(source)
            await entered.enter_async_context(parts)
            await loop.run(connect)
    finally:
        waiting.cancel()
        if port is not None:
            await port.close()


@contextmanager
def _stopping(stop: asyncio.Event | None) -> Iterator[asyncio.Event]:
    """The event that ends the agent: the caller's, or one that SIGTERM and SIGINT set."""
    if stop is not None:
        yield stop
        return
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stopped.set)
    try:
        yield stopped
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
