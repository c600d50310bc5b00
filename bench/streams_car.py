"""Vehicles for the benchmark of streams, in a process that can be killed, frozen and cut off: our own agents.

``python -m bench.streams_car DIR [DIR ...]``: one folder is one vehicle with a simulated car whose owner can be played;
several are as many vehicles in one process, always parked. SIGUSR1 makes the vehicle announce that it will leave, and
SIGUSR2 that it will not: its forecast is overruled in what it reports, as no car here has habits to be learnt from.

Called by: ``streams_fleet``, which enrols the vehicles.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

import msgspec
import uvloop

from motorpool import wire
from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME
from motorpool.agent.main import AgentConfig, run_agent, run_many
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.signals.car import CarSpec
from motorpool.bus import VehicleLink
from motorpool.core.guard import Policy
from motorpool.types import VehicleState

WATTS_W = 120
ANNOUNCED = 0.95


READY_NAME = "ready"  # a file that says that the vehicle has reported itself ready since its start


class Announcement:
    """What the vehicle says of its risk of leaving, instead of what its forecast says."""

    def __init__(self, folder: Path) -> None:
        self.risk = 0.0
        self._ready = folder / READY_NAME

    def install(self) -> None:
        """Stand between the agent and its link."""
        publish = VehicleLink.publish_state
        said = self

        def publish_state(link: VehicleLink, data: bytes) -> None:
            message = wire.decode(wire.UP_STATE, data)
            if isinstance(message, wire.State):
                data = wire.encode(msgspec.structs.replace(message, risk_15min=said.risk))
            publish(link, data)
            if isinstance(message, wire.State) and message.state is VehicleState.READY:
                said._ready.touch()

        VehicleLink.publish_state = publish_state  # type: ignore[method-assign, assignment]

    def listen(self) -> None:
        """Change with the signals."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: setattr(self, "risk", ANNOUNCED))
        loop.add_signal_handler(signal.SIGUSR2, lambda: setattr(self, "risk", 0.0))


def config(folder: Path, engine: EngineSpec, *, alone: bool) -> AgentConfig:
    """The agent of one folder."""
    return AgentConfig(
        agent_dir=folder,
        credentials_path=folder / "credentials.json",
        consent_path=folder / CONSENT_NAME,
        owner_public_key_path=folder / PUBLIC_NAME,
        engine=engine,
        policy=Policy(dwell_ms=50, watts_w=WATTS_W),
        car=CarSpec() if alone else None,
        state_interval_ms=300 if alone else 5_000,
        freeze_grace_ms=300,
    )


async def main(options: argparse.Namespace) -> None:
    """Run until SIGINT or SIGTERM."""
    announcement = Announcement(options.dirs[0])
    announcement.install()
    announcement.listen()
    fields = {"model": options.model, "slots": options.slots}
    if options.model_path:
        engine = EngineSpec(backend=Backend.LLAMA, model_path=options.model_path, threads=1, **fields)
    else:
        engine = EngineSpec(backend=Backend.NULL, rate_tokens_per_s=options.rate, hosted=False, **fields)
    alone = len(options.dirs) == 1
    configs = [config(folder, engine, alone=alone) for folder in options.dirs]
    await (run_agent(configs[0]) if alone else run_many(configs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dirs", type=Path, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-path", default="")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--rate", type=float, default=0.0)
    uvloop.run(main(parser.parse_args()))
