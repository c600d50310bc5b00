"""``motorpool plan``: what a fleet would earn, before a single car is enrolled, as one page that opens offline.

Decides: what is asked and how it is told. Must not: reckon (``sim.plan`` does).
Called by: ``cli.main``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from motorpool.cli import output
from motorpool.cli.modelfiles import load_catalogue
from motorpool.core.carbon import GRAMS_PER_KWH
from motorpool.core.economics import Tariff
from motorpool.core.pricing import Price
from motorpool.core.wear import WearPrices
from motorpool.errors import SetupError
from motorpool.sim import plan as plans
from motorpool.sim.plan_page import large, money, render
from motorpool.sim.recordings import load
from motorpool.sim.year import Node

MICRO: Final = 1_000_000
PAGE: Final = Path("plan.html")
MAX_TARIFF_BYTES: Final = 10_000


class Electricity(click.ParamType[Tariff]):
    """A price of a kilowatt-hour, 24 of them by commas, or a file with 24."""

    name = "PRICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Tariff:
        """The tariff."""
        if isinstance(value, Tariff):
            return value
        text = str(value)
        path = Path(text)
        if path.is_file():
            try:
                if path.stat().st_size > MAX_TARIFF_BYTES:
                    self.fail(f"{path.name} is too large to be 24 prices", param, ctx)
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                self.fail(f"{path.name} cannot be read as 24 prices", param, ctx)
        words = text.replace(",", " ").replace(";", " ").split()
        try:
            micro = tuple(round(float(word) * MICRO) for word in words)
        except (ValueError, OverflowError):
            self.fail(f"{value} is neither a price, nor 24 by commas, nor a file with 24", param, ctx)
        if len(micro) not in (1, 24):
            self.fail(f"one price or 24 are wanted, not {len(micro)}", param, ctx)
        try:
            return Tariff(micro_kwh=micro).check()
        except Exception as error:
            words_of_error = output.describe(error)
            if words_of_error is None:
                raise
            self.fail(words_of_error, param, ctx)


@click.command("plan")
@click.option("--fleet", type=click.IntRange(1, 100_000_000), required=True, help="How many cars.")
@click.option(
    "--sessions",
    type=click.Path(path_type=Path, exists=True),
    help="Recorded charging sessions of owners like yours: the folder of the Norwegian files, one CSV file of theirs, "
    "or Boulder's. Without it, made-up owners with published habits.",
)
@click.option(
    "--model", default="smollm2-135m-instruct", show_default=True, help="The model, for its prices and its name."
)
@click.option(
    "--price",
    nargs=2,
    type=output.Number(0, 1e6),
    metavar="IN OUT",
    help="What customers pay for a million tokens read and written; without it the model's prices.",
)
@click.option(
    "--electricity",
    type=Electricity(),
    default="0.12",
    show_default=True,
    help="Price of a kilowatt-hour: one, 24 by commas (the first from midnight), or a file with 24.",
)
@click.option(
    "--owner-share", type=output.Number(0, 100), default=70.0, show_default=True, help="Percent that owners get."
)
@click.option("--watts", type=click.IntRange(10, 5_000), default=130, show_default=True, help="Power of the computer.")
@click.option(
    "--tokens-per-s",
    type=output.Number(0, 1e6),
    default=283.0,
    show_default=True,
    help="What a car's computer generates at that power, with several requests at once.",
)
@click.option(
    "--awake-watts",
    type=output.Number(0, 2_000),
    default=40.0,
    show_default=True,
    help="What the rest of the car draws while it is awake for the work.",
)
@click.option(
    "--silicon",
    type=output.Number(0, 100),
    default=0.0,
    show_default=True,
    help="What an hour at 85 Celsius wears of the computer, in money.",
)
@click.option(
    "--budget-hours",
    type=output.Number(0, 168),
    default=60.0,
    show_default=True,
    help="Most hours of work of a car in any seven days.",
)
@click.option(
    "--vehicle-cost",
    type=output.Number(0, 1e6),
    default=0.0,
    show_default=True,
    help="What a car costs the operator in a year.",
)
@click.option(
    "--harvest",
    type=output.Number(0.01, 1),
    default=0.95,
    show_default=True,
    help="Part of the hours worked that becomes results.",
)
@click.option(
    "--sold",
    type=output.Number(0, 1),
    default=1.0,
    show_default=True,
    help="Part of the capacity that customers buy.",
)
@click.option(
    "--job-tokens",
    type=click.IntRange(1, 10**12),
    default=1_000_000,
    show_default=True,
    help="Tokens of answers of one job.",
)
@click.option("--region", default="", help="Country code for grams of CO2, such as NO or US; else the world's mean.")
@click.option("--currency", default="USD", show_default=True, help="What amounts are called.")
@click.option("--draws", type=click.IntRange(1, 1_000), default=20, show_default=True, help="Fleets that are drawn.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="For the same result.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=PAGE,
    show_default=True,
    help="The page.",
)
@click.option("--no-page", is_flag=True, help="Write none.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def plan(
    *,
    sessions: Path | None,
    model: str,
    price: tuple[float, float] | None,
    out: Path,
    no_page: bool,
    as_json: bool,
    **terms: Any,
) -> int:
    """What a fleet would do and earn, before a car is enrolled.

    Tokens by hour, jobs that can be promised by deadline, revenue, energy, wear, and what is left for owners and
    operator, with bands: one week in ten is below, half, nine in ten. It takes some ten seconds and writes plan.html
    here, one page that opens offline and prints.

    \b
    Examples (DATA is a folder with the files of Zenodo 10.5281/zenodo.13896176):
      motorpool plan --fleet 50000
      motorpool plan --fleet 50000 --sessions DATA --region NO
      motorpool plan --fleet 2000 --price 0.05 0.20 --electricity 0.30 --awake-watts 300 --out dear.html
      motorpool plan --fleet 50000 --electricity prices.txt --sold 0.5 --no-page --json
    """
    if not no_page and out.suffix.lower() not in {".html", ".htm"}:
        raise click.BadParameter(f"{out.name} has to end in .html", param_hint="--out")
    asked = _terms(model, price, terms)
    with _bar(f"a plan for {asked.fleet:,} cars") as tell:
        recording = None if sessions is None else load(sessions)
        owners = plans.made_up(asked.seed) if recording is None else plans.of_recording(recording)
        found = plans.make(owners, asked, tell)
    if not no_page:
        output.write_whole(out, render(found))
    if as_json:
        output.print_json(as_plain(found))
    else:
        _print(found, None if no_page else out)
    return 0


def _terms(model: str, price: tuple[float, float] | None, options: dict[str, Any]) -> plans.Terms:
    known = load_catalogue().models.get(model)
    if known is None and price is None:
        text = (
            f"there is no model {model[:128]!r} in the catalogue: name one of `motorpool models list`, or its --price"
        )
        raise SetupError(text, code="model_not_found")
    region = str(options["region"]).upper()
    if region and region.split("-", 1)[0] not in GRAMS_PER_KWH:
        raise click.BadParameter(
            f"{options['region']!r} is no country code with a known figure, such as NO", param_hint="--region"
        )
    if price is not None:
        read, written = (round(each * MICRO) for each in price)
    else:
        assert known is not None
        read, written = known.input_micro, known.output_micro
    return plans.Terms(
        fleet=options["fleet"],
        model=model,
        price=Price(input_micro=read, output_micro=written, owner_share_bp=round(options["owner_share"] * 100)),
        node=Node(
            watts_w=options["watts"],
            tokens_s=options["tokens_per_s"],
            awake_w=options["awake_watts"],
            prices=WearPrices(silicon_micro_h=round(options["silicon"] * MICRO)),
            tariff=options["electricity"],
        ),
        harvest=options["harvest"],
        sold=options["sold"],
        budget_h_week=options["budget_hours"],
        vehicle_micro_year=round(options["vehicle_cost"] * MICRO),
        region=region,
        currency=options["currency"],
        job_tokens=options["job_tokens"],
        draws=options["draws"],
        seed=options["seed"],
    )


@contextmanager
def _bar(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar with the time left, where a person is watching."""
    console = output.stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def as_plain(found: plans.Plan) -> dict[str, Any]:
    """The plan with what follows from it, for programs."""
    plain: dict[str, Any] = msgspec.to_builtins(found)
    for row, ledger in zip(plain["ledgers"], found.ledgers, strict=True):
        row["owners_net_micro"] = ledger.owners_net_micro
        row["operator_net_micro"] = ledger.operator_net_micro
    return plain


def _print(found: plans.Plan, page: Path | None) -> None:
    console = Console(highlight=False)
    currency, fleet = found.terms.currency, found.terms.fleet
    table = Table(box=box.SIMPLE_HEAD, title=f"{fleet:,} cars, model {found.terms.model}", title_justify="left")
    for title in ("", "10 %", "50 %", "90 %"):
        table.add_column(title, justify="right" if title else "left")
    bands = [
        ("tokens of answers a day", found.tokens_day, large),
        ("hours of work a car and week", found.worked_h_week, lambda value: f"{value:.1f}"),
        *((f"promised within {each.hours} h, tokens a day", each.tokens_day, large) for each in found.deadlines),
    ]
    for name, band, words in bands:
        table.add_row(name, words(band.p10), words(band.p50), words(band.p90))
    rows: list[tuple[str, list[int]]] = [
        ("customers pay a week", [each.customers_micro for each in found.ledgers]),
        ("electricity a week", [each.electricity_micro for each in found.ledgers]),
        ("wear a week", [each.wear_micro for each in found.ledgers]),
        ("left for all owners a week", [each.owners_net_micro for each in found.ledgers]),
        ("left for the operator a week", [each.operator_net_micro for each in found.ledgers]),
    ]
    for name, amounts in rows:
        table.add_row(name, *(money(amount, currency) for amount in amounts))
    year = found.owner_net_micro_year
    table.add_row(
        "left for an owner a year, by owners", *(money(each, currency) for each in (year.p10, year.p50, year.p90))
    )
    console.print(table)
    if len(found.idle_hours_of_day) == 24:
        console.print("At these prices no hour leaves the owner anything, so no car would work.", style="bold red")
    elif found.idle_hours_of_day:
        console.print(f"No work in {len(found.idle_hours_of_day)} hours of the day: it would cost the owner money.")
    console.print(f"{found.owners:,} owners, {found.weeks:,} weeks. Sessions: {found.source}.", style="dim")
    if page is not None:
        console.print(f"Page: {page}")
