"""``motorpool jobs``: how batches stand with the scheduler, for the operator.

Decides: nothing. Must not: read the books directly. Called by: ``cli.main``.
"""

from __future__ import annotations

from pathlib import Path

import click

from motorpool.cli import display
from motorpool.cli.operator import LAST, AdminClient, tell
from motorpool.cli.output import print_json
from motorpool.cli.running import admin_options, resolve_admin
from motorpool.server.admin.views import BatchWhy


@click.group()
def jobs() -> None:
    """See why a batch of any customer runs, or waits.

    \b
    Example:
      motorpool jobs why batch_0123456789abcdef01234567
    """


@jobs.command("why")
@click.argument("job")
@admin_options
@click.option("--json", "as_json", is_flag=True, help="Print the answer as one line of JSON.")
def why_command(*, job: str, admin_url: str | None, admin_key: str | None, data: Path | None, as_json: bool) -> None:
    """Say how a batch stands: lines, time to spare, soonest end, and what keeps vehicles from it.

    \b
    Examples:
      motorpool jobs why batch_0123456789abcdef01234567
      motorpool jobs why batch_0123456789abcdef01234567 --json
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        found, story, now_ms = client.batch_why(job), client.batch_story(job), client.status().now_ms
    if as_json:
        print_json(found)
        return
    for line in in_words(found, now_ms):
        click.echo(line)
    click.echo("\nWhat happened last:")
    tell(story, last=LAST)


def in_words(found: BatchWhy, now_ms: int) -> list[str]:
    """How a batch stands, line by line."""
    lines = [f"{found.batch_id} ({found.status}): {found.words}", *(f"  {error}" for error in found.errors)]
    why = found.why
    if why is None:
        return lines
    lines.append(f"  lines: {why.done} of {why.total} done, {why.held} with {why.holders} vehicles, {why.waiting} wait")
    left = display.duration((why.expires_ms - now_ms) / 1000)
    if why.best_effort:
        promise = "nothing was promised: it gets what others leave"
    elif why.slack_ms is None:
        promise = "not planned yet"
    elif why.behind:
        promise = f"BEHIND: it would be {display.duration(-why.slack_ms / 1000)} late at this speed, with the margin"
    else:
        promise = f"{display.duration(why.slack_ms / 1000)} to spare" + (", so it may wait" if why.relaxed else "")
    lines.append(f"  time: its window closes in {left}; {promise}")
    if why.finish_ms is None:
        lines.append("  soonest end: not known, for nothing moves")
    else:
        lines.append(f"  soonest end at this speed: in {display.duration(max(0, why.finish_ms - now_ms) / 1000)}")
    if why.place is not None:
        lines.append(f"  order: {why.place} of {why.jobs_in_order} jobs for {why.model}")
    if why.regions or why.min_trust:
        lines.append(f"  asked for: regions {', '.join(why.regions) or 'any'}, trust {why.min_trust} or more")
    about = "" if why.asked == why.vehicles else f" (from {why.asked} of them that were asked)"
    lines.append(f"  of {why.vehicles} vehicles{about}:")
    return lines + [f"    {each.vehicles:>8}  {each.hint} ({each.code})" for each in why.reasons]
