"""``motorpool relays``: credentials for those who speak for many vehicles, and for which ones each may.

Works on the data folder of a cell, which may be stopped or running; a running one looks at it every few seconds.

Decides: nothing. Must not: show a secret. Called by: ``cli.main``.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from motorpool import wire
from motorpool.cli.keys import data_option
from motorpool.cli.output import say
from motorpool.cli.running import default_data
from motorpool.errors import NotFoundError, SetupError
from motorpool.server.main import identity_path
from motorpool.trust.credentials import load_identity
from motorpool.trust.relays import FOLDER, RelayPaper, enrol_relay, paper_path, save_paper, save_relay_credentials

MAX_LIST_BYTES = 256 * 1024 * 1024

vehicles_option = click.option(
    "--vehicles",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="File with the ids of its vehicles, one on a line.",
)
every_option = click.option("--every", is_flag=True, help="It may speak for every vehicle that is enrolled here.")


@click.group()
def relays() -> None:
    """Let the vehicle cloud of a fleet report for its vehicles, in sheets of thousands.

    \b
    Examples:
      motorpool relays enrol telematics --vehicles fleet.txt -o telematics.json
      motorpool relays set telematics --vehicles fleet.txt
      motorpool relays revoke telematics
    """


@relays.command("enrol")
@click.argument("relay")
@data_option
@vehicles_option
@every_option
@click.option("--nats-url", multiple=True, help="Where it reaches the message server; else the cell's own.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Where the credentials go."
)
def enrol_command(
    *, relay: str, data: Path | None, vehicles: Path | None, every: bool, nats_url: tuple[str, ...], output: Path
) -> None:
    """Make the credentials of a relay, and write down for which vehicles it may speak.

    \b
    Example:
      motorpool relays enrol telematics --data /var/lib/motorpool --vehicles fleet.txt -o telematics.json
    """
    folder = _folder(data)
    paper = _paper(relay, vehicles, every=every)
    now_s = int(time.time())
    identity = load_identity(identity_path(folder), now_s)
    urls = list(nats_url) or [_own_url(folder)]
    save_relay_credentials(output, enrol_relay(identity, relay, urls, now_s))
    save_paper(folder / FOLDER, paper)
    say(f"{relay} may speak for {_of(paper)}; its credentials are in {output}: keep them secret")


@relays.command("set")
@click.argument("relay")
@data_option
@vehicles_option
@every_option
def set_command(*, relay: str, data: Path | None, vehicles: Path | None, every: bool) -> None:
    """Change for which vehicles a relay may speak; works within five seconds.

    \b
    Example:
      motorpool relays set telematics --vehicles fleet.txt
    """
    folder = _folder(data) / FOLDER
    _known(folder, relay)
    paper = _paper(relay, vehicles, every=every)
    save_paper(folder, paper)
    say(f"{relay} may speak for {_of(paper)}")


@relays.command("revoke")
@click.argument("relay")
@data_option
def revoke_command(*, relay: str, data: Path | None) -> None:
    """Take nothing from a relay any more; works within five seconds.

    \b
    Example:
      motorpool relays revoke telematics
    """
    folder = _folder(data) / FOLDER
    _known(folder, relay).unlink()
    say(f"{relay} may speak for no vehicle any more")


def _folder(data: Path | None) -> Path:
    folder = data or default_data()
    if not identity_path(folder).exists():
        raise SetupError(
            f"{folder} is no data folder of a cell: give that of `motorpool serve` or `motorpool dev` with --data",
            code="no_cell",
        )
    return folder


def _known(folder: Path, relay: str) -> Path:
    path = paper_path(folder, relay)
    if not path.exists():
        raise NotFoundError(f"there is no relay {relay} here", code="relay_not_found", param="relay")
    return path


def _paper(relay: str, vehicles: Path | None, *, every: bool) -> RelayPaper:
    wire.check_id(relay, "relay")
    if every == (vehicles is not None):
        raise click.UsageError("say for which vehicles it may speak: --vehicles FILE, or --every")
    names: frozenset[str] = frozenset()
    if vehicles is not None:
        with vehicles.open("rb") as file:
            text = file.read(MAX_LIST_BYTES + 1)
        if len(text) > MAX_LIST_BYTES:
            raise SetupError(f"{vehicles} is longer than {MAX_LIST_BYTES} bytes")
        names = frozenset(wire.check_id(name, "vehicle_id") for name in text.decode("utf-8", "replace").split())
    return RelayPaper(relay_id=relay, vehicles=names, every=every)


def _of(paper: RelayPaper) -> str:
    return "every vehicle that is enrolled here" if paper.every else f"{len(paper.vehicles)} of the vehicles"


def _own_url(folder: Path) -> str:
    path = folder / "nats" / "port"
    port = path.read_text("utf-8").strip() if path.exists() else ""
    if not port.isdecimal():
        raise SetupError("the cell has no message server of its own: say with --nats-url where the relay reaches one")
    return f"nats://127.0.0.1:{port}"
