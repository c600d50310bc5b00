"""``motorpool models``: which models there are, whether their files are here, and fetching them.

Decides: nothing. Must not: use a file whose hash is not right.
Called by: ``cli.main``, ``cli.demo``.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from motorpool.catalogue import Model, model_path, pull, verify
from motorpool.cli.modelfiles import load_catalogue, models_folder
from motorpool.cli.output import print_json, say, stderr_console


def ensure_model(model: Model, console: Console, *, force: bool = False) -> Path | None:
    """Make sure that a model's file is here and right, with a progress bar while it is fetched; None: it needs none.

    Raises ModelFileError, StorageFullError or SetupError that says what to do.
    """
    folder = models_folder()
    path = model_path(model, folder)
    if path is None or (path.exists() and not force):
        return verify(model, folder) if path is not None else None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(model.id, total=model.size_bytes or None)
        return pull(model, folder, lambda done, total: bar.update(task, completed=done, total=total), force=force)


@click.group()
def models() -> None:
    """See which models there are, and fetch them.

    \b
    Examples:
      motorpool models list
      motorpool models pull smollm2-135m-instruct
    """


def _state(model: Model, folder: Path) -> str:
    path = model_path(model, folder)
    if path is None:
        return "needs no file"
    if not path.exists():
        return "not fetched"
    whole = not model.size_bytes or path.stat().st_size == model.size_bytes
    return "here" if whole else "damaged: pull it again with --force"


@models.command("list")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), help="Also the models.toml of this data folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the models as one line of JSON.")
def list_command(*, data: Path | None, as_json: bool) -> None:
    """List the models of the catalogue, and whether their files are here.

    \b
    Example:
      motorpool models list
    """
    found = load_catalogue(data).models
    folder = models_folder()
    if as_json:
        print_json([{"model": found[name], "state": _state(found[name], folder)} for name in sorted(found)])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("model", "size", "context", "licence", "file"):
        table.add_column(title)
    for name in sorted(found):
        model = found[name]
        size = f"{model.size_bytes / 1_000_000:.0f} MB" if model.size_bytes else "-"
        table.add_row(name, size, str(model.context_tokens), model.licence or "-", _state(model, folder))
    Console(highlight=False).print(table)


@models.command("pull")
@click.argument("model_id", metavar="MODEL")
@click.option("--force", is_flag=True, help="Fetch it again, even if it is here.")
@click.option("--quiet-if-present", is_flag=True, help="Say nothing when the right file is here already.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), help="Also the models.toml of this data folder."
)
def pull_command(*, model_id: str, force: bool, quiet_if_present: bool, data: Path | None) -> None:
    """Fetch a model's file and check its hash.

    \b
    Examples:
      motorpool models pull smollm2-135m-instruct
      MOTORPOOL_MODELS=/srv/models motorpool models pull smollm2-135m-instruct --force
    """
    model = load_catalogue(data).get(model_id)
    path = model_path(model, models_folder())
    present = path is None or (path.exists() and not force)
    if not present:
        say(f"Fetching the model {model.id} ({model.size_bytes / 1_000_000:.0f} MB)")
    where = ensure_model(model, stderr_console(), force=force)
    if not (present and quiet_if_present):
        say(f"The model {model.id} is here, with the right hash: {where}" if where else f"{model.id} needs no file")
