"""``motorpool agent``: a command line becomes a frozen configuration, and the agent of one vehicle runs.

Decides: which engine a model needs. Must not: hold any policy of its own.
Called by: ``cli.main``; ``motorpool dev`` starts one process for each vehicle.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from motorpool.agent.accounts import AccountsConfig
from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME
from motorpool.agent.main import AgentConfig, SourceFactory, on_disk, run_agent
from motorpool.agent.notify import Notifier
from motorpool.agent.parts import NodeConfig, PartsConfig
from motorpool.agent.runtime.host import leave_no_core_dump
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.settings import load_settings
from motorpool.agent.signals.car import CarSpec
from motorpool.catalogue import NULL_MODEL
from motorpool.cli.folders import private_files, take
from motorpool.cli.modelfiles import fetched, load_catalogue, models_folder
from motorpool.cli.output import Number
from motorpool.cli.process import run
from motorpool.cli.running import CREDENTIALS_NAME
from motorpool.core.economics import Tariff
from motorpool.core.energy import EnergyModel
from motorpool.core.guard import Policy
from motorpool.core.signals import NetworkClass
from motorpool.errors import CallerError

if TYPE_CHECKING:
    from motorpool.agent.owner.page import PageSpec


MB: Final = 1024 * 1024
DEFAULT_ENERGY: Final = EnergyModel()


def tariff_of(_context: click.Context, _option: click.Parameter, value: str | None) -> Tariff | None:
    """One price, or 24, of the currency for a kilowatt-hour; a usage error for anything else."""
    if value is None:
        return None
    try:
        prices = tuple(round(float(part) * 1_000_000) for part in value.split(","))
    except (ValueError, OverflowError) as error:
        raise click.BadParameter("a tariff is a price like 0.29, or 24 of them with commas between") from error
    try:
        return Tariff(micro_kwh=prices).check()
    except CallerError as error:
        raise click.BadParameter(error.message) from error


def page_of(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, int] | None:
    """``127.0.0.1:8710`` as host and port; a usage error for anything else."""
    if value is None:
        return None
    host, colon, port = value.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 65_536):
        raise click.BadParameter("an address looks like 127.0.0.1:8710")
    return host.strip("[]"), int(port)


def _page(address: tuple[str, int] | None) -> PageSpec | None:
    if address is None:
        return None
    from motorpool.agent.owner.page import PageSpec  # noqa: PLC0415  # a web server, for those who want one

    return PageSpec(host=address[0], port=address[1])


def _source(
    *, kuksa: str | None, token: Path | None, ca: Path | None, replay: Path | None, user: str, speed: float
) -> SourceFactory | None:
    if kuksa is not None:
        return _kuksa(kuksa, token, ca)
    if replay is None:
        return None
    from motorpool.agent.signals.replay import ReplaySource, of_user  # noqa: PLC0415
    from motorpool.agent.signals.sessions import load  # noqa: PLC0415

    sessions = load(replay)
    mine = of_user(sessions, user or (sessions[0].user if sessions else ""))
    return lambda clock, drawn_w: ReplaySource(mine, clock(), speed=speed, drawn_w=drawn_w, clock=clock)


def _kuksa(address: str, token: Path | None, ca: Path | None) -> SourceFactory:
    from motorpool.agent.signals.kuksa import KuksaConfig, KuksaSource  # noqa: PLC0415  # gRPC, for those who need it

    config = KuksaConfig(address=address, token_path=token, ca_path=ca)
    return lambda clock, _drawn_w: KuksaSource(config, clock)


def _engine(
    folder: Path, model: str, *, url: str, slots: int, threads: int, rate: float, simulated: bool
) -> EngineSpec:
    """The engine that runs a model of the catalogue."""
    found = load_catalogue(folder).get(model)
    backend = Backend.REMOTE if url else (Backend.NULL if model == NULL_MODEL else Backend.LLAMA)
    path = fetched(found) if backend is Backend.LLAMA else None
    return EngineSpec(
        backend=backend,
        model=found.id,
        model_path=str(path or ""),
        model_sha256=found.sha256,
        slots=slots,
        threads=threads,
        context_tokens=found.context_tokens,
        rate_tokens_per_s=rate,
        url=url,
        log_path=str(folder / "engine.log"),
        idle_priority=not simulated,  # a computer that plays vehicles is no vehicle: it would starve them
    )


def configured(context: click.Context, _option: click.Parameter, value: Path | None) -> None:
    """Take what the file says for everything that the command line does not say."""
    if value is not None:
        context.default_map = {**(context.default_map or {}), **load_settings(value).options()}


@click.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=configured,
    help="Settings in TOML, as packaging/etc/agent.toml; options beside it go first.",
)
@click.option(
    "--dir", "folder", required=True, type=click.Path(path_type=Path, file_okay=False), help="The agent's folder."
)
@click.option("--model", default=NULL_MODEL, show_default=True, help="A model of `motorpool models list`, or null.")
@click.option("--url", default="", help="Run the model on this OpenAI-compatible server instead.")
@click.option("--remote-model", default="", help="What that server calls the model.")
@click.option("--api-key-env", default="", help="Name of the environment variable with that server's key.")
@click.option("--slots", default=4, show_default=True, type=click.IntRange(1, 1024), help="Requests at once.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 256), help="Threads of the engine.")
@click.option(
    "--null-rate",
    default=40.0,
    show_default=True,
    type=Number(min=0, max=1e9),
    help="Tokens a second of each slot of the null engine; 0: no limit.",
)
@click.option(
    "--watts", default=100, show_default=True, type=click.IntRange(1), help="Power that the computer may draw."
)
@click.option(
    "--floor",
    default=30.0,
    show_default=True,
    type=Number(0, 100),
    help="The owner's floor: no work below this charge, in percent.",
)
@click.option("--small-model", default="", help="A smaller model for the hottest hours; without one nothing runs then.")
@click.option(
    "--node-watts",
    default=(0.0, 0.0),
    type=(Number(0, 1e5), Number(0, 1e5)),
    metavar="IDLE MOST",
    help="What the computer draws with nothing to do and with all cores at work; else --watts is taken for the most.",
)
@click.option("--calibrate", is_flag=True, help="Measure that once, where the processor or the car counts watts.")
@click.option(
    "--awake-watts",
    default=DEFAULT_ENERGY.awake_w + DEFAULT_ENERGY.charger_on_w,
    show_default=True,
    type=Number(0, 1e5),
    help="What the car draws to be awake for the computer, its charger included; 0 if it is awake anyway.",
)
@click.option(
    "--tariff",
    callback=tariff_of,
    metavar="PRICES",
    help="The owner's price of a kilowatt-hour, as 0.29, or 24 of them from midnight with commas between.",
)
@click.option(
    "--memory", default=0, type=click.IntRange(0), metavar="MB", help="Most memory of the engine; 0: no limit."
)
@click.option(
    "--spool",
    default=64,
    show_default=True,
    type=click.IntRange(0),
    metavar="MB",
    help="Room on the disk, encrypted, for results that wait for a network; 0 keeps them in memory.",
)
@click.option("--page", callback=page_of, metavar="HOST:PORT", help="Serve the owner's page there, as 127.0.0.1:8710.")
@click.option("--kuksa", metavar="HOST:PORT", help="Take the car's signals from this KUKSA databroker.")
@click.option(
    "--kuksa-token", type=click.Path(path_type=Path, dir_okay=False), help="File with its token of scope read."
)
@click.option(
    "--kuksa-ca", type=click.Path(path_type=Path, dir_okay=False), help="Certificate of its authority, for TLS."
)
@click.option(
    "--replay",
    type=click.Path(path_type=Path, exists=True),
    help="Live through recorded charging sessions: a CSV file, or a folder of them.",
)
@click.option("--replay-user", default="", help="Whose sessions; else those of the first one in the file.")
@click.option(
    "--replay-speed", default=1.0, show_default=True, type=Number(0.001, 1e5), help="Recorded seconds in one."
)
@click.option("--unmetered", is_flag=True, help="The network of this car costs nothing by the byte.")
@click.option("--region", default="local", show_default=True, help="Region code; never a place.")
@click.option("--simulated", is_flag=True, help="Drive a simulated car; `motorpool car --dir` plays its owner.")
@click.option(
    "--state-interval",
    default=1.0,
    show_default=True,
    type=Number(0.05, 10),
    help="Longest silence towards the cell, in seconds.",
)
def agent(
    *,
    folder: Path,
    model: str,
    url: str,
    remote_model: str,
    api_key_env: str,
    slots: int,
    threads: int,
    null_rate: float,
    watts: int,
    floor: float,
    small_model: str,
    node_watts: tuple[float, float],
    calibrate: bool,
    awake_watts: float,
    tariff: Tariff | None,
    memory: int,
    spool: int,
    page: tuple[str, int] | None,
    kuksa: str | None,
    kuksa_token: Path | None,
    kuksa_ca: Path | None,
    replay: Path | None,
    replay_user: str,
    replay_speed: float,
    unmetered: bool,
    region: str,
    simulated: bool,
    state_interval: float,
) -> None:
    """Run the agent of one vehicle until Ctrl-C. Its folder holds credentials.json, the owner's key and consent.

    \b
    Examples:
      motorpool agent --dir /var/lib/motorpool-agent --model smollm2-135m-instruct --threads 2
      motorpool agent --dir car-7 --model llama-3b --url http://127.0.0.1:11434/v1 --remote-model llama3.2
      motorpool agent --dir car-7 --model qwen --kuksa 127.0.0.1:55555 --tariff 0.29 --page 192.168.4.1:8710
    """
    spec = _engine(folder, model, url=url, slots=slots, threads=threads, rate=null_rate, simulated=simulated)
    if url:
        spec = msgspec.structs.replace(spec, remote_model=remote_model or spec.model, api_key_env=api_key_env)
    small = None
    if small_model:
        small = _engine(folder, small_model, url="", slots=slots, threads=threads, rate=null_rate, simulated=simulated)
    idle_w, most_w = node_watts
    if most_w and most_w <= idle_w:
        raise click.BadParameter("the second number has to be the larger one", param_hint="--node-watts")
    if sum((simulated, kuksa is not None, replay is not None)) > 1:
        raise click.UsageError("a car has one source of signals: --simulated, --kuksa or --replay")
    energy = msgspec.structs.replace(DEFAULT_ENERGY, awake_w=awake_watts, charger_on_w=0.0)
    config = AgentConfig(
        agent_dir=folder,
        credentials_path=folder / CREDENTIALS_NAME,
        consent_path=folder / CONSENT_NAME,
        owner_public_key_path=folder / PUBLIC_NAME,
        engine=spec,
        small=small,
        policy=Policy(
            watts_w=watts,
            floor_pct=floor,
            network=NetworkClass.UNMETERED if unmetered else NetworkClass.UNKNOWN,
        ),
        parts=PartsConfig(
            accounts=AccountsConfig(energy=energy, tariff=tariff),
            node=NodeConfig(idle_w=idle_w, max_w=most_w or None, calibrated=calibrate and not simulated),
            owner_desk=True,
            forecast=True,
            page=_page(page),
            spool_bytes=spool * MB,
            memory_bytes=memory * MB or None,
        ),
        car=CarSpec() if simulated else None,
        source=_source(
            kuksa=kuksa, token=kuksa_token, ca=kuksa_ca, replay=replay, user=replay_user, speed=replay_speed
        ),
        region=region,
        models_on_disk=on_disk(load_catalogue(folder), models_folder()),
        state_interval_ms=round(state_interval * 1000),
    )
    leave_no_core_dump()
    with private_files(), take(folder, "agent.lock", "agent", "give this one a folder of its own with --dir"):
        run(run_agent(config, notifier=Notifier.of(os.environ, os.getpid())))
