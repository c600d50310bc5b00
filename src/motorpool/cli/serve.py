"""``motorpool serve``: a command line becomes a frozen configuration, and the control plane runs.

Decides: nothing. Must not: hold any policy of its own.
Called by: ``cli.main``; ``motorpool dev`` starts it as a process.
"""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from motorpool.cli.folders import private_files, take
from motorpool.cli.modelfiles import load_catalogue
from motorpool.cli.output import print_json, say, write_whole
from motorpool.cli.process import run
from motorpool.cli.running import CELL_FILE, SERVE_LOCK, RunningCell
from motorpool.server.fallback import read_settings
from motorpool.server.main import ServerConfig, ServerReady, run_server


@click.command()
@click.option(
    "--data", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of books and files."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where customers reach the API.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Its port; 0: a free one.")
@click.option("--admin-host", default="127.0.0.1", show_default=True, help="Where the operator's interface listens.")
@click.option(
    "--admin-port", default=8081, show_default=True, type=click.IntRange(0, 65535), help="Its port; 0: a free one."
)
@click.option("--nats-url", "nats_urls", multiple=True, help="Message server, may be repeated; none: an embedded one.")
@click.option(
    "--vehicle-url", "vehicle_urls", multiple=True, help="What vehicles are told to connect to, if it differs."
)
@click.option(
    "--fallback",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSON file of a paid OpenAI-compatible endpoint for live requests that no vehicle can serve: url, api_key, "
    "models.",
)
@click.option("--currency", default="EUR", show_default=True, help="Unit of prices and earnings.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
def serve(
    *,
    data: Path,
    host: str,
    port: int,
    admin_host: str,
    admin_port: int,
    nats_urls: tuple[str, ...],
    vehicle_urls: tuple[str, ...],
    fallback: Path | None,
    currency: str,
    as_json: bool,
) -> None:
    """Run the control plane of one cell until Ctrl-C: the API, the operator's interface and the scheduler.

    \b
    Examples:
      motorpool serve --data /var/lib/motorpool
      motorpool serve --data /var/lib/motorpool --host 0.0.0.0 --nats-url nats://mq1:4222 --nats-url nats://mq2:4222
    """
    config = ServerConfig(
        data_dir=str(data),
        catalogue=load_catalogue(data),
        host=host,
        port=port,
        admin_host=admin_host,
        admin_port=admin_port,
        nats_urls=list(nats_urls),
        vehicle_urls=list(vehicle_urls),
        currency=currency,
        fallback=None if fallback is None else read_settings(fallback.read_bytes()),
    )

    def ready(found: ServerReady) -> None:
        running = RunningCell(base_url=found.base_url, admin_url=found.admin_url, admin_key=found.admin_key)
        write_whole(data / CELL_FILE, msgspec.json.encode(running) + b"\n", mode=0o600)
        if as_json:
            print_json(found)
        else:
            say(f"The API is {found.base_url}, the operator's address {found.admin_url} (its key: {data}/admin.key)")

    with private_files(), take(data, SERVE_LOCK, "control plane", "give this one a folder of its own with --data"):
        try:
            run(run_server(config, ready))
        finally:
            (data / CELL_FILE).unlink(missing_ok=True)
