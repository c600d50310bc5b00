"""``motorpool dev``: a message server, the control plane and vehicles on one machine, each a process, until Ctrl-C.

Decides: what is started in which order, and what is remembered in the data folder. Must not: do any of their work.
Called by: ``cli.main``, ``cli.demo`` and the tests.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import click
import msgspec
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text

from motorpool.agent.enrolment import CONSENT_NAME, enrol_owner, give_consent
from motorpool.bus import EmbeddedNats, answers
from motorpool.cli import display, owner
from motorpool.cli.folders import private_files, take
from motorpool.cli.keys import make_key
from motorpool.cli.modelfiles import load_catalogue
from motorpool.cli.models import ensure_model
from motorpool.cli.operator import AdminClient
from motorpool.cli.output import Number, print_json, say, stderr_console, write_whole
from motorpool.cli.running import DEV_FILE, SERVE_LOCK, Running, data_flag, default_data
from motorpool.cli.supervise import Child, until
from motorpool.cli.watch import watch
from motorpool.errors import MotorpoolError, SetupError
from motorpool.server.main import admin_key, clock_ms, identity_path
from motorpool.trust.consent import ConsentLimits
from motorpool.trust.credentials import load_identity, save_credentials

NULL: Final = "null"
MESSAGES: Final = "message server"
CONTROL: Final = "control plane"
HOST: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 60.0
CONSENT_MS: Final = 365 * 24 * 3600 * 1000
CONSENT_WATTS_W: Final = 400
KEY_FILE: Final = "dev-api.key"


class DevConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What runs. ``port`` 0 takes a free one. ``null_rate`` is tokens per second of each slot of a null engine."""

    data: Path
    vehicles: int = 3
    model: str = NULL
    port: int = 0
    slots: int = 4
    threads: int = 1
    null_rate: float = 40.0


class DevCluster:
    """Everything on this machine. ``say`` gets a line whenever a process dies and comes back."""

    def __init__(self, config: DevConfig, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._children: dict[str, Child] = {}
        self._running: Running | None = None
        self._lock: IO[str] | None = None

    @property
    def running(self) -> Running:
        """Addresses, keys and process ids."""
        assert self._running is not None, "start first"
        return msgspec.structs.replace(self._running, pids=self.pids())

    def pids(self) -> dict[str, int]:
        """The process of each part that runs now."""
        return {name: child.pid for name, child in self._children.items() if child.pid is not None}

    @staticmethod
    def vehicle_id(number: int) -> str:
        """The id of the vehicle that people call by its number."""
        return f"car-{number}"

    def vehicle_dir(self, vehicle_id: str) -> Path:
        """The folder of a vehicle's agent."""
        return self._config.data / "vehicles" / vehicle_id

    async def start(self) -> Running:
        """Start everything and wait until every vehicle has reported. Raises SetupError that says what went wrong."""
        config = self._config
        self._lock = take(config.data, "dev.lock", "`motorpool dev`", "give another folder with --data")
        take(config.data, SERVE_LOCK, "control plane", "give another folder with --data").close()  # its child takes it
        port = await self._port(config.port)
        admin_port = free_port()
        nats = EmbeddedNats(config.data / "nats", load_identity(identity_path(config.data), clock_ms() // 1000))
        await self._start_child(MESSAGES, nats.command())
        messages = self._children[MESSAGES]
        await until(lambda: answers(nats.port), timeout_s=START_TIMEOUT_S, what=f"the {MESSAGES}", child=messages)
        serve = ["serve", "--data", str(config.data), "--host", HOST, "--port", str(port)]
        serve += ["--admin-port", str(admin_port), "--nats-url", nats.url]
        await self._start_child(CONTROL, motorpool(*serve))
        with await self._admin(f"http://{HOST}:{admin_port}") as admin:
            numbers = range(1, config.vehicles + 1)
            await asyncio.gather(*(self._start_vehicle(admin, number) for number in numbers))
            await self._vehicles_report(admin)
        self._running = Running(
            base_url=f"http://{HOST}:{port}/v1",
            api_key=await asyncio.to_thread(self._api_key),
            admin_url=f"http://{HOST}:{admin_port}",
            admin_key=admin_key(config.data),
            data=str(config.data),
            pids=self.pids(),
            vehicles={
                name: str(self.vehicle_dir(name)) for name in map(self.vehicle_id, range(1, config.vehicles + 1))
            },
        )
        write_whole(config.data / DEV_FILE, msgspec.json.encode(self._running) + b"\n", mode=0o600)
        return self.running

    async def play(self, vehicle_id: str, action: str) -> str:
        """Let the owner of a vehicle do something, once there is time for it; return the car in words.

        Raises MotorpoolError if the car cannot do it now, or does not run.
        """
        return owner.in_words(await owner.play(self.vehicle_dir(vehicle_id), action))

    async def stop(self) -> None:
        """End everything, vehicles first."""
        ordered = sorted(self._children.items(), key=lambda item: not item[0].startswith("car-"))
        vehicles = [child for name, child in ordered if name.startswith("car-")]
        await asyncio.gather(*(child.stop() for child in vehicles))
        for _, child in ordered[len(vehicles) :]:
            if child is not self._children.get(MESSAGES):
                await child.stop()
        if MESSAGES in self._children:
            await self._children[MESSAGES].stop()
        if self._lock is not None:  # else the folder belongs to another one
            (self._config.data / DEV_FILE).unlink(missing_ok=True)
            self._lock.close()

    async def _start_child(self, name: str, command: list[str]) -> None:
        log = self._config.data / "logs" / f"{name.replace(' ', '-')}.log"
        child = self._children[name] = Child(name, command, log, self._say)
        await child.start()

    async def _port(self, wanted: int) -> int:
        if wanted == 0:
            return free_port()
        if await answers(wanted):
            raise SetupError(
                f"port {wanted} is in use: choose another one with --port, or stop the program that has it",
                code="port_in_use",
                param="port",
            )
        return wanted

    async def _admin(self, url: str) -> AdminClient:
        """A client of the operator's interface, once that answers."""
        client = AdminClient(url, admin_key(self._config.data))

        async def ready() -> bool:
            try:
                await asyncio.to_thread(client.status)
            except SetupError:
                return False
            return True

        child = self._children[CONTROL]
        try:
            await until(ready, timeout_s=START_TIMEOUT_S, what=f"the {CONTROL}", child=child)
        except BaseException:
            client.close()
            raise
        return client

    async def _start_vehicle(self, admin: AdminClient, number: int) -> None:
        config = self._config
        vehicle_id = self.vehicle_id(number)
        folder = self.vehicle_dir(vehicle_id)
        folder.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(self._enrol, admin, vehicle_id, number, folder)
        command = ["agent", "--dir", str(folder), "--model", config.model, "--slots", str(config.slots), "--simulated"]
        command += ["--threads", str(config.threads), "--null-rate", str(config.null_rate)]
        command += ["--tariff", "0", "--awake-watts", "0"]  # a simulated car charges for nothing, and never sleeps
        await self._start_child(vehicle_id, motorpool(*command))

    async def _vehicles_report(self, admin: AdminClient) -> None:
        async def all_there() -> bool:
            states = {view.vehicle_id: view.state for view in await asyncio.to_thread(admin.vehicles)}
            wanted = map(self.vehicle_id, range(1, self._config.vehicles + 1))
            return all(states.get(name, "offline") != "offline" for name in wanted)

        first = self._children.get(self.vehicle_id(1))
        await until(all_there, timeout_s=START_TIMEOUT_S, what="the vehicles", child=first)

    def _enrol(self, admin: AdminClient, vehicle_id: str, number: int, folder: Path) -> None:
        """The owner's key and consent, and credentials that open this vehicle's subjects alone."""
        key = enrol_owner(folder)
        if not (folder / CONSENT_NAME).exists():  # what its owner has said since the first start stands
            limits = ConsentLimits(max_watts_w=CONSENT_WATTS_W)
            now_ms = clock_ms()
            give_consent(folder, vehicle_id, limits, now_ms=now_ms, expires_ms=now_ms + CONSENT_MS)
        credentials = folder / "credentials.json"
        if not credentials.exists():
            save_credentials(credentials, admin.enrol(vehicle_id, f"vehicle {number}", key.public.hex()))

    def _api_key(self) -> str:
        """The key of this data folder: made at the first start, and kept for the next ones."""
        path = self._config.data / KEY_FILE
        if not path.exists():
            write_whole(path, make_key(self._config.data, "dev", "motorpool dev").encode(), mode=0o600)
        return path.read_text("utf-8")


def motorpool(*arguments: str) -> list[str]:
    """The command line of another motorpool process, run by this Python."""
    return [sys.executable, "-m", "motorpool.cli.main", *arguments]


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Dev:
    """The command: a cluster until somebody stops it, with a live picture or one line of JSON."""

    def __init__(self, config: DevConfig, *, as_json: bool) -> None:
        self._as_json = as_json
        self._config = config
        self._happenings: list[display.Happening] = []
        self._started_s = time.monotonic()
        self._cluster = DevCluster(config, self._tell)
        self._live = False

    def _tell(self, text: str) -> None:
        self._happenings.append(display.Happening(at_s=time.monotonic() - self._started_s, text=text, style="red"))
        del self._happenings[: -display.EVENTS_SHOWN]
        if not self._live:
            say(text)

    async def run(self) -> None:
        """Run until SIGINT or SIGTERM, or until something cannot be started."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop.set)
        starting = asyncio.create_task(self._cluster.start())
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                await self._show(await starting, stop)
        finally:
            starting.cancel()
            stopped.cancel()
            await asyncio.gather(starting, stopped, return_exceptions=True)
            await self._cluster.stop()

    async def _show(self, running: Running, stop: asyncio.Event) -> None:
        if self._as_json:
            print_json(running)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            await self._watch(running, stop)
        else:
            say(f"Ready: export OPENAI_BASE_URL={running.base_url} OPENAI_API_KEY={running.api_key}")
            say(f"The operator's address is {running.admin_url}; the data folder is {running.data}")
            flag = data_flag(self._config.data)
            say(f"Play an owner with `motorpool car 2 drive-off{flag}`; Ctrl-C ends everything")
        await stop.wait()

    async def _watch(self, running: Running, stop: asyncio.Event) -> None:
        admin = AdminClient(running.admin_url, running.admin_key)

        async def picture() -> RenderableType:
            try:
                status = await asyncio.to_thread(admin.status)
            except SetupError:
                return Panel(Text("the control plane does not answer for a moment", style="red"))
            return display.fleet(
                status, running.base_url, running.api_key, time.monotonic() - self._started_s, self._happenings
            )

        async def play(number: str, action: str) -> str:
            try:
                car = await self._cluster.play(DevCluster.vehicle_id(int(number)), action)
            except MotorpoolError as error:
                return f"vehicle {number}: {error.message}"
            return f"vehicle {number}, {action}: {car}"

        self._live = True
        try:
            await watch(Console(highlight=False), picture, play, stop)
        finally:
            self._live = False
            admin.close()


@click.command()
@click.option("--vehicles", default=3, show_default=True, type=click.IntRange(0, 64), help="How many vehicles.")
@click.option(
    "--model", default="smollm2-135m-instruct", show_default=True, help="A model of `motorpool models list`, or null."
)
@click.option(
    "--port",
    default=8080,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port of the API; 0 takes a free one.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Data folder.",
    show_default="~/.local/share/motorpool/dev",
)
@click.option(
    "--slots", default=4, show_default=True, type=click.IntRange(1, 256), help="Requests at once in each vehicle."
)
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1, 64), help="Threads of each vehicle's engine."
)
@click.option(
    "--null-rate",
    default=40.0,
    show_default=True,
    type=Number(min=0, max=1e9),
    help="Tokens a second of each slot of the null engine; 0: no limit.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one line of JSON when ready: base_url, api_key, admin address, pids."
)
def dev(
    *,
    vehicles: int,
    model: str,
    port: int,
    data: Path | None,
    slots: int,
    threads: int,
    null_rate: float,
    as_json: bool,
) -> None:
    """Run everything on this machine until Ctrl-C: message server, control plane, vehicles.

    In a terminal it shows the fleet, and what you type plays the owners: `2 drive-off`, `2 come-back`, `2 plug-in`.
    From another terminal: `motorpool car 2 drive-off`. The other commands find a running `motorpool dev` by themselves.

    \b
    Examples:
      motorpool dev
      motorpool dev --vehicles 8 --model null --null-rate 100
      motorpool dev --port 0 --data /tmp/mp --json
    """
    config = DevConfig(
        data=(data or default_data()).absolute(),
        vehicles=vehicles,
        model=model,
        port=port,
        slots=slots,
        threads=threads,
        null_rate=null_rate,
    )
    ensure_model(load_catalogue(config.data).get(model), stderr_console())
    with private_files():
        asyncio.run(Dev(config, as_json=as_json).run())
