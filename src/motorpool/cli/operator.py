"""``motorpool vehicles``: the operator's interface from the command line, and the client that the display uses.

Decides: nothing. Must not: read the books directly; everything comes from the admin address.
Called by: ``cli.main``, ``cli.dev``, ``cli.demo``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

import click
import httpx
import msgspec
from rich.console import Console

from motorpool.cli import display
from motorpool.cli.output import print_json, say
from motorpool.cli.running import admin_options, resolve_admin
from motorpool.errors import ErrorEnvelope, MotorpoolError, SetupError
from motorpool.server.admin.views import BatchWhy, StatusView, StoryEntry, VehicleReasons, VehicleView
from motorpool.store.fleet_settings import Customer, Site, VehicleSettings
from motorpool.trust.credentials import VehicleCredentials, save_credentials

T = TypeVar("T")
MAX_NAMED: Final = 20  # vehicles that an error lists
WHY_TIMEOUT_S: Final = 120  # of a very large fleet the first answer takes its time
LAST: Final = 10  # entries of a story that are told with the reasons


class AdminClient:
    """Speaks to the admin address of a cell. Raises SetupError when it cannot be reached or answers with an error."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"}
        # The admin address is the machine's own; a proxy from the environment has no business in between.
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=10, trust_env=False)

    def status(self) -> StatusView:
        """Vehicles and batches."""
        return self._call("GET", "/v1/status", StatusView)

    def vehicles(self) -> list[VehicleView]:
        """All vehicles."""
        return self._call("GET", "/v1/vehicles", list[VehicleView])

    def vehicle(self, vehicle_id: str) -> VehicleView:
        """One vehicle."""
        return self._call("GET", f"/v1/vehicles/{vehicle_id}", VehicleView)

    def id_of(self, word: str) -> str:
        """The id of a vehicle that somebody calls by its id, its name or, as in ``2``, its number.

        Raises SetupError that names the vehicles there are.
        """
        views = self.vehicles()
        for meant in (word, f"car-{word}"):
            if any(view.vehicle_id == meant for view in views):
                return meant
        named = [view.vehicle_id for view in views if view.name == word]
        if len(named) == 1:
            return named[0]
        there = ", ".join(view.vehicle_id for view in views[:MAX_NAMED]) + (", ..." if len(views) > MAX_NAMED else "")
        raise SetupError(
            f"there is no vehicle {word}: there are {there}"
            if views
            else f"there is no vehicle {word}: none is enrolled",
            code="vehicle_not_found",
        )

    def story(self, vehicle_id: str) -> list[StoryEntry]:
        """What happened to a vehicle or batch."""
        return self._call("GET", f"/v1/vehicles/{vehicle_id}/story", list[StoryEntry])

    def vehicle_why(self, vehicle_id: str) -> VehicleReasons:
        """Why a vehicle gets nothing now."""
        return self._call("GET", f"/v1/vehicles/{vehicle_id}/why", VehicleReasons)

    def batch_why(self, batch_id: str) -> BatchWhy:
        """How a batch stands."""
        return self._call("GET", f"/v1/batches/{quote(batch_id, safe='')}/why", BatchWhy)

    def batch_story(self, batch_id: str) -> list[StoryEntry]:
        """What happened to a batch."""
        return self._call("GET", f"/v1/batches/{quote(batch_id, safe='')}/story", list[StoryEntry])

    def set_vehicle(self, vehicle_id: str, change: dict[str, Any]) -> VehicleSettings:
        """Set what is in ``change`` for a vehicle: ``site``, ``trust``, ``reserve``."""
        return self._call("PATCH", f"/v1/vehicles/{vehicle_id}", VehicleSettings, change)

    def sites(self) -> list[Site]:
        """All sites."""
        return self._call("GET", "/v1/sites", list[Site])

    def set_site(self, name: str, change: dict[str, int]) -> Site:
        """Make a site, or set its limits: ``limit_w``, ``limit_vehicles``."""
        return self._call("PUT", f"/v1/sites/{quote(name, safe='')}", Site, change)

    def remove_site(self, name: str) -> None:
        """Forget a site where no vehicle stands."""
        self._send("DELETE", f"/v1/sites/{quote(name, safe='')}", None)

    def customers(self) -> list[Customer]:
        """The accounts and their shares."""
        return self._call("GET", "/v1/customers", list[Customer])

    def set_customer(self, account: str, weight: float) -> Customer:
        """Set the share of a customer."""
        return self._call("PUT", f"/v1/customers/{quote(account, safe='')}", Customer, {"weight": weight})

    def enrol(self, vehicle_id: str, name: str, owner_key: str) -> VehicleCredentials:
        """Make credentials for a vehicle; ``owner_key`` is the owner's public key, empty if there is none yet."""
        body = {"vehicle_id": vehicle_id, "name": name, "owner_key": owner_key}
        return self._call("POST", "/v1/vehicles", VehicleCredentials, body)

    def revoke(self, vehicle_id: str) -> None:
        """Give a vehicle no more work, and accept nothing from it."""
        self._send("DELETE", f"/v1/vehicles/{vehicle_id}", None)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, path: str, answer: type[T], body: Any = None) -> T:
        response = self._send(method, path, body)
        try:
            return msgspec.json.decode(response.content, type=answer)
        except msgspec.MsgspecError as error:
            raise MotorpoolError(f"{self.url} answers nonsense: is it Motorpool's admin address?") from error

    def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        try:
            timeout = WHY_TIMEOUT_S if path.endswith("/why") else httpx.USE_CLIENT_DEFAULT
            response = self._http.request(method, path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise SetupError(
                f"cannot reach the admin address {self.url}: is the control plane running? "
                "Start everything on this machine with `motorpool dev`, or set --admin-url",
                code="server_not_running",
            ) from error
        if response.status_code == 401:
            raise SetupError(f"{self.url} does not accept this admin key: give the right one with --admin-key")
        if response.status_code >= 400:
            raise SetupError(_message(response), code="admin_refused")
        return response


def _message(response: httpx.Response) -> str:
    try:
        return msgspec.json.decode(response.content, type=ErrorEnvelope).error.message
    except msgspec.MsgspecError:
        return f"the admin address answered {response.status_code}"


@click.group()
def vehicles() -> None:
    """See the fleet: every vehicle, whether it may work, and why not.

    \b
    Examples:
      motorpool vehicles list
      motorpool vehicles show car-2
      motorpool vehicles why car-2
      motorpool vehicles set car-2 --site north --trust 2
    """


@vehicles.command("list")
@admin_options
@click.option("--json", "as_json", is_flag=True, help="Print the vehicles as one line of JSON.")
def list_command(*, admin_url: str | None, admin_key: str | None, data: Path | None, as_json: bool) -> None:
    """List the vehicles with their state, permit and work.

    \b
    Example:
      motorpool vehicles list --json
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        status = client.status()
    if as_json:
        print_json(status.vehicles)
        return
    console = Console(highlight=False)
    console.print(display.vehicle_table(status, ids=True) if status.vehicles else "no vehicles are enrolled yet")


@vehicles.command("show")
@click.argument("vehicle")
@admin_options
@click.option("--json", "as_json", is_flag=True, help="Print the vehicle as one line of JSON.")
def show_command(
    *, vehicle: str, admin_url: str | None, admin_key: str | None, data: Path | None, as_json: bool
) -> None:
    """Show everything about one vehicle, with the reasons if it may not work.

    \b
    Example:
      motorpool vehicles show car-2
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        view = client.vehicle(client.id_of(vehicle))
        currency = client.status().currency
    if as_json:
        print_json(view)
        return
    Console(highlight=False).print(display.vehicle_details(view, currency))


@vehicles.command("story")
@click.argument("vehicle")
@admin_options
@click.option("--json", "as_json", is_flag=True, help="Print the story as one line of JSON.")
def story_command(
    *, vehicle: str, admin_url: str | None, admin_key: str | None, data: Path | None, as_json: bool
) -> None:
    """Tell what happened to a vehicle, oldest first.

    \b
    Example:
      motorpool vehicles story car-2
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        entries = client.story(vehicle) or client.story(client.id_of(vehicle))
    if as_json:
        print_json(entries)
        return
    tell(entries)


def tell(entries: list[StoryEntry], *, last: int | None = None) -> None:
    """Print a story, or its last entries."""
    first_ms = entries[0].at_ms if entries else 0
    for entry in entries[-last:] if last else entries:
        click.echo(f"+{(entry.at_ms - first_ms) / 1000:9.1f} s  {entry.what}  [{entry.cause_id}]")
    if not entries:
        click.echo("nothing has happened yet")


@vehicles.command("why")
@click.argument("vehicle")
@admin_options
@click.option("--json", "as_json", is_flag=True, help="Print the answer as one line of JSON.")
def why_command(
    *, vehicle: str, admin_url: str | None, admin_key: str | None, data: Path | None, as_json: bool
) -> None:
    """Say why a vehicle gets no work now: what stands in the way of each job, and what happened last.

    \b
    Examples:
      motorpool vehicles why car-2
      motorpool vehicles why car-2 --json
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        vehicle_id = client.id_of(vehicle)
        found, story = client.vehicle_why(vehicle_id), client.story(vehicle_id)
        now_ms = client.status().now_ms
    if as_json:
        print_json(found)
        return
    for line in in_words(found, now_ms):
        click.echo(line)
    click.echo("\nWhat happened last:")
    tell(story, last=LAST)


def in_words(found: VehicleReasons, now_ms: int) -> list[str]:
    """Why a vehicle gets nothing, line by line."""
    lines = [f"{found.vehicle_id}: {found.words}"]
    lines += [
        f"  its guard: {display.REASON_WORDS.get(reason.code, reason.code.value)}"
        + (f" ({reason.detail})" if reason.detail else "")
        for reason in found.reasons
    ]
    why = found.why
    if why is None:
        return lines
    for until_ms, what in ((why.blocked_until_ms, "waits after a failure"), (why.paused_until_ms, "paused")):
        if until_ms is not None:
            lines.append(f"  {what}: {display.duration((until_ms - now_ms) / 1000)} more")
    speed = f"{why.speed:.0f} tokens/s measured" if why.speed else "not measured yet"
    lines.append(f"  speed: {speed}; {why.failures} failures since its last result")
    place = f"region {why.region or 'unknown'}, trust {why.trust}, model {why.model or 'none'}"
    place += (f", site {why.site}" if why.site else "") + (", reserve" if why.reserve else "")
    lines.append(f"  it has: {place}")
    held = ", ".join(f"{each.lines} lines of {each.job_id}" for each in why.holds) or "nothing"
    queue = f", {why.queue_ms / 1000:.0f} s of work" if why.holds and why.queue_ms else ""
    lines.append(f"  it holds: {held}{queue}")
    lines += [f"  {each.job_id}: {each.words}" for each in why.jobs]
    if why.other_jobs:
        lines.append(f"  {why.other_jobs} other jobs are for other models, or have no lines that wait")
    return lines


@vehicles.command("set")
@click.argument("vehicle")
@click.option("--site", help="The site where it stands, made with `motorpool sites set`; none: an empty one.")
@click.option("--trust", type=click.IntRange(0, 3), help="Its tier of trust: customers may ask for a least one.")
@click.option("--reserve/--no-reserve", default=None, help="Let it work only on what would be late without it.")
@admin_options
def set_command(
    *,
    vehicle: str,
    site: str | None,
    trust: int | None,
    reserve: bool | None,
    admin_url: str | None,
    admin_key: str | None,
    data: Path | None,
) -> None:
    """Set the site of a vehicle, its tier of trust, or make it a reserve. It acts at once; what is left out stays.

    \b
    Examples:
      motorpool vehicles set car-2 --site north --trust 2
      motorpool vehicles set car-2 --site "" --no-reserve
    """
    given = {"site": site, "trust": trust, "reserve": reserve}
    change = {name: value for name, value in given.items() if value is not None}
    if not change:
        raise click.UsageError("say what to set: --site, --trust or --reserve", click.get_current_context())
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        now = client.set_vehicle(client.id_of(vehicle), change)
    where = f"at site {now.site}" if now.site else "at no site"
    say(f"{now.vehicle_id} is {where}, trust {now.trust}, {'a reserve' if now.reserve else 'no reserve'}")


@vehicles.command("enrol")
@click.argument("vehicle")
@click.option("--name", help="What people call it; its id if not given.")
@click.option("--owner-key", default="", help="The owner's public key: the content of owner.pub in the agent's folder.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the credentials to this file."
)
@admin_options
def enrol_command(
    *,
    vehicle: str,
    name: str | None,
    owner_key: str,
    output: Path | None,
    admin_url: str | None,
    admin_key: str | None,
    data: Path | None,
) -> None:
    """Enrol a vehicle: make the credentials that open its own subjects and no others.

    \b
    Example:
      motorpool vehicles enrol car-7 --name "van 7" -o car-7/credentials.json
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        credentials = client.enrol(vehicle, name or vehicle, owner_key)
    if output is None:
        print_json(credentials)
        return
    save_credentials(output, credentials)
    say(f"{vehicle} is enrolled; its credentials are in {output}: keep them secret")


@vehicles.command("revoke")
@click.argument("vehicle")
@admin_options
def revoke_command(*, vehicle: str, admin_url: str | None, admin_key: str | None, data: Path | None) -> None:
    """Revoke a vehicle: it gets no more work, and nothing that it sends is accepted.

    \b
    Example:
      motorpool vehicles revoke car-7
    """
    with AdminClient(*resolve_admin(admin_url, admin_key, data)) as client:
        vehicle_id = client.id_of(vehicle)
        client.revoke(vehicle_id)
    say(f"{vehicle_id} is revoked")
