"""``motorpool agent``: a command line becomes a frozen configuration, and the agent of one vehicle runs.

Decides: which engine a model needs. Must not: hold any policy of its own.
Called by: ``cli.main``; ``motorpool dev`` starts one process for each vehicle.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME
from motorpool.agent.main import AgentConfig, run_agent
from motorpool.agent.runtime.host import leave_no_core_dump
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.signals.car import CarSpec
from motorpool.catalogue import NULL_MODEL
from motorpool.cli.folders import private_files, take
from motorpool.cli.modelfiles import fetched, load_catalogue
from motorpool.cli.output import Number
from motorpool.cli.process import run
from motorpool.cli.running import CREDENTIALS_NAME
from motorpool.core.guard import Policy


@click.command()
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
    region: str,
    simulated: bool,
    state_interval: float,
) -> None:
    """Run the agent of one vehicle until Ctrl-C. Its folder holds credentials.json, the owner's key and consent.

    \b
    Examples:
      motorpool agent --dir /var/lib/motorpool-agent --model smollm2-135m-instruct --threads 2
      motorpool agent --dir car-7 --model llama-3b --url http://127.0.0.1:11434/v1 --remote-model llama3.2
    """
    found = load_catalogue(folder).get(model)
    backend = Backend.REMOTE if url else (Backend.NULL if model == NULL_MODEL else Backend.LLAMA)
    path = fetched(found) if backend is Backend.LLAMA else None
    spec = EngineSpec(
        backend=backend,
        model=found.id,
        model_path=str(path or ""),
        model_sha256=found.sha256,
        slots=slots,
        threads=threads,
        context_tokens=found.context_tokens,
        rate_tokens_per_s=null_rate,
        url=url,
        remote_model=remote_model or found.id,
        api_key_env=api_key_env,
        log_path=str(folder / "engine.log"),
        idle_priority=not simulated,  # a computer that plays vehicles is no vehicle: it would starve them
    )
    config = AgentConfig(
        agent_dir=folder,
        credentials_path=folder / CREDENTIALS_NAME,
        consent_path=folder / CONSENT_NAME,
        owner_public_key_path=folder / PUBLIC_NAME,
        engine=spec,
        policy=Policy(watts_w=watts, floor_pct=floor, utc_offset_min=time.localtime().tm_gmtoff // 60),
        car=CarSpec() if simulated else None,
        region=region,
        state_interval_ms=round(state_interval * 1000),
    )
    leave_no_core_dump()
    with private_files(), take(folder, "agent.lock", "agent", "give this one a folder of its own with --dir"):
        run(run_agent(config))
