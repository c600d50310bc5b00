"""``motorpool car``: play the owner of a simulated vehicle on this machine.

Decides: nothing; the car decides whether an act is possible. Must not: go over the network.
Called by: ``cli.main``; ``cli.dev`` and ``cli.demo`` play the owner through the same port.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, Final

import click

from motorpool.agent.signals.owner_port import OWNER_ACTIONS, play_owner
from motorpool.cli.output import print_json
from motorpool.cli.running import default_data, load_running
from motorpool.errors import ConflictError, SetupError

BUSY: Final = "owner_busy"
POLL_S: Final = 0.2
PATIENCE_S: Final = 15.0
ACTION_LIST: Final = "\n".join(f"  {name:<16} {what}" for name, what in OWNER_ACTIONS.items())


async def play(folder: Path, action: str) -> dict[str, Any]:
    """Do ``action`` in the vehicle whose agent has ``folder``, once its owner has time; return the car as it stands.

    Raises ConflictError when the car cannot do it now, SetupError when no such vehicle runs.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        answer = await play_owner(folder, action)
        if answer.get("ok"):
            car: dict[str, Any] = answer["car"]
            return car
        if answer.get("code") != BUSY or time.monotonic() > deadline_s:
            raise ConflictError(str(answer.get("error")), code=str(answer.get("code")))
        await asyncio.sleep(POLL_S)


def vehicle_folder(vehicle: str, data: Path | None) -> Path:
    """The folder of a vehicle of a running ``motorpool dev``; ``2`` means ``car-2``. Raises SetupError if unknown."""
    running = load_running(data)
    if running is None:
        raise SetupError(
            f"no `motorpool dev` runs in {data or default_data()}: start it, or name its folder with --data",
            code="not_running",
        )
    name = f"car-{vehicle}" if vehicle.isdigit() else vehicle
    folder = running.vehicles.get(name)
    if folder is None:
        raise SetupError(f"there is no vehicle {vehicle}: there are {', '.join(sorted(running.vehicles))}")
    return Path(folder)


def in_words(car: dict[str, Any]) -> str:
    """The car as its owner sees it, in one line."""
    at = "coming or going, " if car.get("busy") else ""
    where = "on the road" if car.get("away") else "parked"
    plug = "plugged in" if car.get("plugged") else "not plugged in"
    doors = "door open" if car.get("door_open") else ("locked" if car.get("locked") else "unlocked")
    return f"{at}{where}, {plug}, {doors}, battery {car.get('soc_pct', 0):.0f} %"


EXAMPLES: Final = "  motorpool car 2 drive-off\n  motorpool car car-2 show --json"


@click.command(epilog=f"\b\nActions:\n{ACTION_LIST}\n\n\b\nExamples:\n{EXAMPLES}")
@click.argument("vehicle")
@click.argument("action", type=click.Choice(list(OWNER_ACTIONS)), metavar="ACTION")
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), help="Data folder of the `motorpool dev`.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder of an agent with a simulated car, where no `motorpool dev` runs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the car as one line of JSON.")
def car(*, vehicle: str, action: str, data: Path | None, folder: Path | None, as_json: bool) -> None:
    """Play the owner of a vehicle of a running `motorpool dev`: open the door, drive off, come back, plug in."""
    state = asyncio.run(play(folder or vehicle_folder(vehicle, data), action))
    if as_json:
        print_json(state)
    else:
        click.echo(f"{vehicle}: {in_words(state)}")
