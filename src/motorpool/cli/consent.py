"""``motorpool consent``: the owner gives consent, takes it back, and sees what holds.

Decides: nothing; the paper is signed with the owner's key and judged in the vehicle. Must not: go over the network.
Called by: ``cli.main``; ``cli.owner_cmd`` finds the vehicle in the same way.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import click

from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME, ConsentFile, give_consent, take_consent_back
from motorpool.agent.owner import words
from motorpool.cli.output import Number
from motorpool.cli.owner import vehicle_folder
from motorpool.cli.running import CREDENTIALS_NAME
from motorpool.core.policy import MINUTES_A_DAY
from motorpool.errors import SetupError
from motorpool.trust.consent import ConsentLimits
from motorpool.trust.credentials import load_credentials

DAY_MS: Final = 86_400_000


def place(vehicle: str | None, data: Path | None, folder: Path | None) -> tuple[Path, str]:
    """The agent's folder and the vehicle's id. Raises SetupError when nothing is enrolled there.

    A folder is enough; where a vehicle is named as well, it has to be that one.
    """
    if folder is None and vehicle is None:
        raise click.UsageError("name a vehicle of a running `motorpool dev`, or the agent's folder with --dir")
    agent_dir = folder if folder is not None else vehicle_folder(str(vehicle), data)
    vehicle_id = load_credentials(agent_dir / CREDENTIALS_NAME).vehicle_id
    if folder is not None and vehicle is not None and vehicle != vehicle_id:
        raise SetupError(f"{folder} belongs to the vehicle {vehicle_id}, not to {vehicle}", code="other_vehicle")
    return agent_dir, vehicle_id


def minute_of_day(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """``07:30`` as a minute of the day; a usage error for anything else."""
    if value is None:
        return None
    hours, colon, minutes = value.partition(":")
    if not (colon and hours.isdecimal() and minutes.isdecimal() and int(minutes) < 60):
        raise click.BadParameter("a time looks like 07:30")
    minute = int(hours) * 60 + int(minutes)
    if minute >= MINUTES_A_DAY:
        raise click.BadParameter("a time looks like 07:30")
    return minute


def tell(agent_dir: Path, vehicle_id: str) -> None:
    """Print what holds now, judged as the vehicle judges it."""
    view = ConsentFile(agent_dir / CONSENT_NAME, agent_dir / PUBLIC_NAME, vehicle_id).view(clock_ms())
    click.echo(f"{vehicle_id}: {words.consent(view)}")


def clock_ms() -> int:
    """Now, by the clock of this computer."""
    return time.time_ns() // 1_000_000


def _of_a_vehicle(command: Any) -> Any:
    folder = click.Path(path_type=Path, file_okay=False)
    command = click.option("--data", type=folder, help="Data folder of the `motorpool dev`.")(command)
    command = click.option("--dir", "folder", type=folder, help="The agent's folder, where no `motorpool dev` runs.")(
        command
    )
    return click.argument("vehicle")(command)


@click.group()
def consent() -> None:
    """The owner's consent to computing in a vehicle: give it, take it back, show it. Without it nothing ever runs.

    \b
    Examples:
      motorpool consent withdraw 2
      motorpool consent give 2 --watts 150 --floor 40 --ready-by 07:30 --target 80
      motorpool consent show car-7 --dir /var/lib/motorpool-agent
    """


@consent.command()
@_of_a_vehicle
def show(*, vehicle: str, data: Path | None, folder: Path | None) -> None:
    """Say whether the owner's consent holds, and within which limits.

    \b
    Example:
      motorpool consent show 2
    """
    tell(*place(vehicle, data, folder))


@consent.command()
@_of_a_vehicle
@click.option("--watts", default=150, show_default=True, type=click.IntRange(1), help="Power that may be drawn.")
@click.option("--floor", default=30.0, show_default=True, type=Number(0, 100), help="No work below this charge, in %.")
@click.option("--ready-by", callback=minute_of_day, help="When the car is needed each day (local time, as 07:30).")
@click.option("--target", default=80.0, show_default=True, type=Number(0, 100), help="Charge by then, in percent.")
@click.option("--days", default=365, show_default=True, type=click.IntRange(1, 3660), help="For how long.")
def give(
    *,
    vehicle: str,
    data: Path | None,
    folder: Path | None,
    watts: int,
    floor: float,
    ready_by: int | None,
    target: float,
    days: int,
) -> None:
    """Sign a consent with the owner's key; it replaces an earlier one.

    \b
    Example:
      motorpool consent give 2 --watts 150 --floor 40 --ready-by 07:30
    """
    agent_dir, vehicle_id = place(vehicle, data, folder)
    limits = ConsentLimits(max_watts_w=watts, floor_pct=floor, ready_by_minute=ready_by, target_pct=target)
    now_ms = clock_ms()
    give_consent(agent_dir, vehicle_id, limits, now_ms=now_ms, expires_ms=now_ms + days * DAY_MS)
    tell(agent_dir, vehicle_id)


@consent.command()
@_of_a_vehicle
def withdraw(*, vehicle: str, data: Path | None, folder: Path | None) -> None:
    """Take every consent given so far back, for good; the vehicle stops within a second, with or without a network.

    \b
    Example:
      motorpool consent withdraw 2
    """
    agent_dir, vehicle_id = place(vehicle, data, folder)
    take_consent_back(agent_dir, vehicle_id, now_ms=clock_ms())
    tell(agent_dir, vehicle_id)
