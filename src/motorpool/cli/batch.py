"""``motorpool batch``: hand documents in, come back for the results, look at batches and cancel them.

Decides: what is shown, and the exit code. Must not: hold state beyond the state file beside the output.
Called by: ``cli.main``.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any, Final

import click
import openai
from openai.types import Batch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from motorpool.cli import batchrun, documents, output
from motorpool.cli.display import duration
from motorpool.cli.output import print_json, say
from motorpool.cli.running import api_options, data_flag, resolve_api
from motorpool.errors import SetupError

PLAIN_EVERY_S: Final = 10.0
RETRIES = 4  # of the client, each after a longer wait
MAX_REGIONS: Final = 32
MAX_REGION_CHARS: Final = 32
MAX_TRUST: Final = 3
_REGION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


def make_client(base_url: str, api_key: str) -> openai.OpenAI:
    """The official client, pointed at a cell."""
    return openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=RETRIES)


@click.group()
def batch() -> None:
    """Run documents through a model as a batch, and look after batches.

    \b
    Examples:
      motorpool batch run letters/ --model smollm2-135m-instruct --prompt "Summarise." -o out.jsonl
      motorpool batch list
    """


class Progressing:
    """Shows how a batch gets on: a bar for people, a line now and then for logs."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._estimate = batchrun.Estimate()
        self._plain_at_s: float | None = None
        self._said = ""
        self._bar: Progress | None = None
        if output.is_terminal():
            columns = (
                TextColumn("{task.description:>11}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[words]}"),
            )
            self._bar = Progress(*columns, console=output.stderr_console(), transient=False)
            self._task = self._bar.add_task("", total=total, words="")

    def __enter__(self) -> Progressing:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def outage(self) -> None:
        """The server does not answer."""
        click.echo("the server does not answer; still trying, for a minute", err=True)

    def show(self, batch: Batch) -> None:
        """One answer of the server."""
        counts = batch.request_counts
        done = counts.completed + counts.failed if counts else 0
        total = (counts.total if counts else 0) or self._total
        now_s = time.monotonic()
        left = self._estimate.left_s(now_s, done, total)
        words = f"{done}/{total} lines"
        if counts and counts.failed:
            words += f", {counts.failed} failed"
        if batch.status == "in_progress":
            words += f", {duration(left)} left"
            if batchrun.waits(batch):
                terms = batchrun.terms_of(batch).words
                words += f", waiting: no vehicle may run {batch.model} now" + (f" ({terms})" if terms else "")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=batch.status, words=words)
        elif self._plain_at_s is None or now_s - self._plain_at_s >= PLAIN_EVERY_S or batch.status != self._said:
            self._plain_at_s, self._said = now_s, batch.status
            click.echo(f"{batch.id} {batch.status}: {words}", err=True)


def check_regions(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> list[str]:
    """The regions, each once; a usage error that names the one at fault: a residency that is misspelt is none."""
    for region in given:
        if len(region) > MAX_REGION_CHARS or not _REGION.fullmatch(region):
            raise click.BadParameter(
                f"{region!r} is no region: 1 to {MAX_REGION_CHARS} letters, digits, '.', '_' or '-', one each time, as "
                "vehicles report them (`motorpool vehicles list`)",
                ctx=context,
                param=parameter,
            )
    regions = list(dict.fromkeys(given))
    if len(regions) > MAX_REGIONS:
        raise click.BadParameter(f"at most {MAX_REGIONS} regions", ctx=context, param=parameter)
    return regions


@batch.command("run")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILES-OR-FOLDER...")
@click.option("--model", required=True, help="The model, as `motorpool models list` names it.")
@click.option("--prompt", required=True, help="What to do with each document; it becomes the system message.")
@click.option(
    "-o", "--output", "target", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Results."
)
@click.option(
    "--schema", type=click.Path(path_type=Path, dir_okay=False), help="JSON schema that each answer must follow."
)
@click.option("--window", default="24h", show_default=True, help="Time by which it must be done, 15m to 7d.")
@click.option(
    "--max-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Longest answer, in tokens."
)
@click.option(
    "--region",
    "regions",
    multiple=True,
    metavar="CODE",
    callback=check_regions,
    help="Run only on vehicles that are in this region, such as DE; give it again for more. Else anywhere.",
)
@click.option(
    "--min-trust",
    default=0,
    show_default=True,
    type=click.IntRange(0, MAX_TRUST),
    help="The least tier of trust that the operator has given a vehicle.",
)
@click.option(
    "--flex",
    is_flag=True,
    help="Take what others leave: nothing is promised and nothing refused; it may wait for cheaper hours.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts and the terms as one line of JSON at the end.")
@api_options
@click.pass_context
def run(
    context: click.Context,
    *,
    sources: tuple[Path, ...],
    model: str,
    prompt: str,
    target: Path,
    schema: Path | None,
    window: str,
    max_tokens: int,
    regions: list[str],
    min_trust: int,
    flex: bool,
    as_json: bool,
    base_url: str | None,
    api_key: str | None,
    data: Path | None,
) -> None:
    """Run every document through a model and write one line of JSON for each to the output.

    A folder gives its .txt and .md files; a .jsonl or .csv file gives its rows that have a `text`. Stop it with Ctrl-C:
    the batch goes on, and the same command comes back to it. Nothing is ever handed in twice.

    With --region no document goes to a vehicle that is elsewhere, and what one sends after it has left is not
    taken. A batch whose window cannot be met is refused with the soonest one that can; with --flex it is not.

    \b
    Exit codes: 0 every line is there and was answered; 1 something is wrong, see the message; 2 bad usage;
    3 some lines failed; 4 lines are missing; 5 lines came twice; 6 the batch failed, expired or was cancelled;
    130 stopped with Ctrl-C (the batch goes on).

    \b
    Examples:
      motorpool batch run recalls/ --model smollm2-135m-instruct --prompt "Summarise in one sentence." -o out.jsonl
      motorpool batch run a.txt b.md --model llama-3b --prompt "Translate to German." -o out.jsonl --window 4h
      motorpool batch run mail.csv --model llama-3b --prompt "Sort this." --schema answer.json -o out.jsonl
      motorpool batch run a.txt --model llama-3b --prompt "Sum up." -o out.jsonl --region DE --region FR --min-trust 2
      motorpool batch run letters/ --model llama-3b --prompt "Sum up." -o out.jsonl --window 7d --flex
    """
    found = documents.read_documents(sources)
    wanted = documents.read_schema(schema) if schema is not None else None
    task = documents.Task(model=model, prompt=prompt, max_tokens=max_tokens, schema=wanted)
    lines = documents.batch_lines(found, task)
    check_output(target)
    names = [document.name for document in found]
    with make_client(*resolve_api(base_url, api_key, data)) as client:
        terms = batchrun.Terms(regions=regions, min_trust=min_trust, priority="flex" if flex else "standard")
        started, again = batchrun.hand_in(client, lines, target, window=window, documents=len(found), terms=terms)
        how = f", to run {terms.words}" if terms.words else ""
        say(f"{'Back to' if again else 'Handed in'} {len(found)} documents as batch {started.id}{how}")
        try:
            with Progressing(len(found)) as progress:
                ended = batchrun.follow(client, started, progress.show, on_outage=progress.outage)
        except KeyboardInterrupt:
            flags = data_flag(data) + (f" --base-url {shlex.quote(base_url)}" if base_url else "")
            say(f"Batch {started.id} goes on without this terminal. Run the same command again to come back to it,")
            say(f"or `motorpool batch cancel {started.id}{flags}` to stop it.")
            context.exit(output.EXIT_INTERRUPTED)
        code = collect(client, ended, names, target, parse=wanted is not None, as_json=as_json)
    context.exit(code)


def check_output(target: Path) -> None:
    """Find out now, not after an hour of work, that the output cannot be written. Raises SetupError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise SetupError(f"{target.parent} cannot be written to: choose another -o", code="output_not_writable")


def collect(client: openai.OpenAI, ended: Batch, names: list[str], target: Path, *, parse: bool, as_json: bool) -> int:
    """Download and join the results of a batch that has ended, say what came of it, and return the exit code."""
    results, tally = batchrun.join(names, batchrun.result_lines(client, ended), parse=parse)
    if results:
        batchrun.write_results(target, results)
    if as_json:
        extra = batchrun.told(ended)
        terms = {name: extra.get(name) for name in ("regions", "min_trust", "priority", "quote")}
        print_json({"batch": ended.id, "status": ended.status, "output": str(target), "counts": tally, "terms": terms})
    said = f"{tally.completed} of {tally.handed_in} lines completed, {tally.failed} failed"
    say(f"Batch {ended.id} {ended.status}: {said}, {tally.missing} missing, {tally.doubled} doubled")
    for problem in (ended.errors.data or [] if ended.errors else [])[:5]:
        line = f"line {problem.line}: " if problem.line else ""
        output.print_error(f"{line}{problem.message}")
    for result in [item for item in results if item.error][:5]:
        error: dict[str, Any] = result.error or {}
        output.print_error(f"{result.document}: {error.get('message') or error.get('code')}")
    if results:
        say(f"The results are in {target}")
    code = exit_code(ended.status, tally)
    if code and not batchrun.nothing_ran(ended):
        say(f"To hand these documents in once more, delete {batchrun.state_path(target)} and run the same command")
    return code


def exit_code(status: str, tally: batchrun.Tally) -> int:
    """What the shell gets to see; the worst finding wins."""
    if tally.doubled or tally.unknown:
        return output.EXIT_LINES_DOUBLED
    if status != "completed":
        return output.EXIT_NOT_COMPLETED
    if tally.missing:
        return output.EXIT_LINES_MISSING
    return output.EXIT_LINES_FAILED if tally.failed else 0


def as_row(batch: Batch) -> dict[str, Any]:
    """A batch as programs read it: OpenAI's own object."""
    return batch.model_dump(mode="json")


@batch.command("list")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000), help="How many, newest first.")
@click.option("--json", "as_json", is_flag=True, help="Print the batches as one line of JSON.")
@api_options
def list_command(*, limit: int, as_json: bool, base_url: str | None, api_key: str | None, data: Path | None) -> None:
    """List your batches, newest first.

    \b
    Example:
      motorpool batch list --limit 5
    """
    with make_client(*resolve_api(base_url, api_key, data)) as client:
        found = list(itertools.islice(client.batches.list(limit=min(limit, 100)), limit))
    if as_json:
        print_json([as_row(item) for item in found])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("batch", "status", "lines", "failed", "window"):
        table.add_column(title)
    for item in found:
        counts = item.request_counts
        lines = f"{counts.completed + counts.failed}/{counts.total}" if counts else "-"
        table.add_row(item.id, item.status, lines, str(counts.failed) if counts else "-", item.completion_window)
    Console(highlight=False).print(table if found else "no batches yet")


@batch.command("show")
@click.argument("batch_id")
@click.option("--json", "as_json", is_flag=True, help="Print OpenAI's batch object as one line of JSON.")
@api_options
def show_command(*, batch_id: str, as_json: bool, base_url: str | None, api_key: str | None, data: Path | None) -> None:
    """Show one batch.

    \b
    Example:
      motorpool batch show batch_123 --json
    """
    with make_client(*resolve_api(base_url, api_key, data)) as client:
        found = client.batches.retrieve(batch_id)
    if as_json:
        print_json(as_row(found))
        return
    for name, value in as_row(found).items():
        if value is not None and name != "object":
            click.echo(f"{name:>18}  {value}")


@batch.command("cancel")
@click.argument("batch_id")
@api_options
def cancel_command(*, batch_id: str, base_url: str | None, api_key: str | None, data: Path | None) -> None:
    """Cancel a batch. What is finished stays finished, is paid for, and can be downloaded.

    \b
    Example:
      motorpool batch cancel batch_123
    """
    with make_client(*resolve_api(base_url, api_key, data)) as client:
        found = client.batches.cancel(batch_id)
    say(f"Batch {found.id} is {found.status}")
