"""``motorpool sites`` and ``motorpool customers``: limits of places, and shares of customers.

Decides: nothing. Must not: read the books directly. Called by: ``cli.main``.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from motorpool.cli.operator import AdminClient
from motorpool.cli.output import Number, print_json, say
from motorpool.cli.running import admin_options, resolve_admin
from motorpool.store.fleet_settings import Site

MAX_LIMIT = 2_000_000_000


@click.group()
def sites() -> None:
    """See and set the sites: car parks whose transformer or uplink bears only so much.

    \b
    Examples:
      motorpool sites set north --limit-w 20000 --limit-vehicles 40
      motorpool vehicles set car-2 --site north
    """


@sites.command("list")
@admin_options
@click.option("--json", "as_json", is_flag=True, help="Print the sites as one line of JSON.")
def list_command(*, admin_url: str | None, admin_key: str | None, data: Path | None, as_json: bool) -> None:
    """List the sites with their limits and how many vehicles stand there.

    \b
    Example:
      motorpool sites list --json
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        found = client.sites()
    if as_json:
        print_json(found)
        return
    table = Table(box=None, pad_edge=False)
    for title in ("site", "watts", "at work", "vehicles"):
        table.add_column(title)
    for site in found:
        table.add_row(site.name, _limit(site.limit_w), _limit(site.limit_vehicles), str(site.vehicles))
    Console(highlight=False).print(table if found else "there are no sites yet: make one with `motorpool sites set`")


@sites.command("set")
@click.argument("name")
@click.option("--limit-w", type=click.IntRange(0, MAX_LIMIT), help="Watts for all vehicles at work there; 0: no limit.")
@click.option(
    "--limit-vehicles", type=click.IntRange(0, 10_000_000), help="How many may be at work at a time; 0: no limit."
)
@admin_options
def set_command(
    *,
    name: str,
    limit_w: int | None,
    limit_vehicles: int | None,
    admin_url: str | None,
    admin_key: str | None,
    data: Path | None,
) -> None:
    """Make a site, or set its limits. They act at once: what is over them is taken back. What is left out stays.

    \b
    Example:
      motorpool sites set north --limit-w 20000 --limit-vehicles 40
    """
    given = {"limit_w": limit_w, "limit_vehicles": limit_vehicles}
    change = {key: value for key, value in given.items() if value is not None}
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        say(_said(client.set_site(name, change)))


@sites.command("remove")
@click.argument("name")
@admin_options
def remove_command(*, name: str, admin_url: str | None, admin_key: str | None, data: Path | None) -> None:
    """Forget a site where no vehicle stands any more.

    \b
    Example:
      motorpool sites remove north
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        client.remove_site(name)
    say(f"Site {name} is forgotten")


@click.group()
def customers() -> None:
    """See and set the shares of customers, which count where the work of several waits.

    \b
    Examples:
      motorpool customers list
      motorpool customers set acme --weight 2
    """


@customers.command("list")
@admin_options
@click.option("--json", "as_json", is_flag=True, help="Print the customers as one line of JSON.")
def customers_command(*, admin_url: str | None, admin_key: str | None, data: Path | None, as_json: bool) -> None:
    """List the accounts with their shares.

    \b
    Example:
      motorpool customers list --json
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        found = client.customers()
    if as_json:
        print_json(found)
        return
    table = Table(box=None, pad_edge=False)
    for title in ("account", "share"):
        table.add_column(title)
    for customer in found:
        table.add_row(customer.account, f"{customer.weight:g}")
    Console(highlight=False).print(table if found else "there are no customers yet: see `motorpool keys create`")


@customers.command("set")
@click.argument("account")
@click.option(
    "--weight",
    type=Number(0.001, 1_000),
    required=True,
    help="Its share relative to those of others, which is 1 if none was set.",
)
@admin_options
def customer_command(
    *, account: str, weight: float, admin_url: str | None, admin_key: str | None, data: Path | None
) -> None:
    """Set the share of a customer: with 2 it gets twice what one with 1 gets, while work of both waits.

    \b
    Example:
      motorpool customers set acme --weight 2
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        customer = client.set_customer(account, weight)
    say(f"{customer.account} has the share {customer.weight:g}")


def _limit(number: int) -> str:
    return str(number) if number else "no limit"


def _said(site: Site) -> str:
    return f"Site {site.name}: watts {_limit(site.limit_w)}, vehicles at work {_limit(site.limit_vehicles)}"
