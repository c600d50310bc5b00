"""Starts a cell: its books, its files, the vehicle link, the customers' API and the operator's address.

Called by: ``motorpool serve``. Must not: read the environment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import uvicorn

from motorpool.bus import BusError, CellLink, EmbeddedNats
from motorpool.catalogue import Catalogue
from motorpool.errors import MotorpoolError, SetupError
from motorpool.server.admin.app import Admin
from motorpool.server.fallback import FallbackSettings, PaidEndpoint
from motorpool.server.feed import FedCell
from motorpool.server.loop import CellLoop
from motorpool.server.openai.app import build_app
from motorpool.server.openai.files import expire_files, sweep_blobs
from motorpool.server.openai.heads import BoundedProtocol
from motorpool.server.openai.settings import ApiSettings
from motorpool.store.blobs import BlobStore
from motorpool.store.database import Database
from motorpool.trust.credentials import load_identity, write_secret
from motorpool.trust.relays import FOLDER as RELAYS

log = logging.getLogger(__name__)

FILE_SWEEP_S: Final = 600
CONNECT_PAUSE_S: Final = 0.25
CONNECT_PATIENCE_S: Final = 30
DRAIN_S: Final = 2


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a cell is told at its start. Port 0: any free one; no ``nats_urls``: an embedded server."""

    data_dir: str
    catalogue: Catalogue
    host: str = "127.0.0.1"
    port: int = 0
    admin_host: str = "127.0.0.1"
    admin_port: int = 0
    nats_urls: list[str] = []
    vehicle_urls: list[str] = []  # what vehicles are told, when it differs from nats_urls
    currency: str = "EUR"
    fallback: FallbackSettings | None = None  # a paid endpoint for live requests that no vehicle can serve


class ServerReady(msgspec.Struct, frozen=True, kw_only=True):
    """Where a cell that has started can be reached. ``admin_key`` is secret."""

    base_url: str
    admin_url: str
    admin_key: str
    nats_url: str
    pid: int


def clock_ms() -> int:
    """The wall clock, in milliseconds since 1970 (UTC)."""
    return time.time_ns() // 1_000_000


def running_ms() -> int:
    """Milliseconds since the machine started, sleep included; nobody can set it."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1_000_000


class MonotonicClock:
    """The wall clock, made never to go back and never to stand still: when it is set back, time goes on from there."""

    def __init__(self, wall_ms: Callable[[], int] = clock_ms, running_ms: Callable[[], int] = running_ms) -> None:
        self._wall_ms = wall_ms
        self._running_ms = running_ms
        self._behind_ms = wall_ms() - running_ms()

    def __call__(self) -> int:
        """Milliseconds since 1970 (UTC)."""
        running = self._running_ms()
        self._behind_ms = max(self._behind_ms, self._wall_ms() - running)
        return running + self._behind_ms


def listen(host: str, port: int, what: str) -> socket.socket:
    """A listening socket; raises SetupError that says what to do when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        server.listen(2048)
    except OSError as error:
        server.close()
        raise SetupError(
            f"port {port} on {host} for {what} cannot be used ({os.strerror(error.errno or 0)}): "
            "stop what listens there or choose another one",
            code="port_in_use",
            param="port",
        ) from error
    return server


def prepare_folder(name: str) -> Path:
    """The data folder, made if it is missing; raises SetupError if it cannot be written."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SetupError(f"the data folder {name} cannot be made: {error.strerror}", param="data") from error
    return folder


def identity_path(data_dir: Path) -> Path:
    """Where the cell's identities are."""
    return data_dir / "identity.json"


def database_path(data_dir: Path) -> Path:
    """Where the books are."""
    return data_dir / "motorpool.db"


def admin_key(data_dir: Path) -> str:
    """The operator's key, made at the first start and kept in ``admin.key`` (mode 0600)."""
    path = data_dir / "admin.key"
    if not path.exists():
        write_secret(path, f"mp-admin-{secrets.token_urlsafe(24)}".encode())
    return path.read_text("utf-8").strip()


async def run_server(config: ServerConfig, on_ready: Callable[[ServerReady], None]) -> None:
    """Run a cell until SIGTERM or SIGINT; raises SetupError or StoreError when it cannot start."""
    data_dir = prepare_folder(config.data_dir)
    api_socket = listen(config.host, config.port, "the API")
    admin_socket = listen(config.admin_host, config.admin_port, "the operator's address")
    clock = MonotonicClock()
    identity = load_identity(identity_path(data_dir), clock() // 1000)
    nats: EmbeddedNats | None = None
    urls = config.nats_urls
    if not urls:
        nats = EmbeddedNats(data_dir / "nats", identity)
        await nats.start()
        urls = [nats.url]
    database = Database(database_path(data_dir))
    cell = FedCell(
        relays=data_dir / RELAYS,
        database=database,
        blobs=BlobStore(data_dir / "files"),
        catalogue=config.catalogue,
        clock=clock,
        currency=config.currency,
    )
    if config.fallback is not None:
        cell.desk.fallback = PaidEndpoint(config.fallback)
    sweep_blobs(cell)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        link = await connect_patiently(lambda: CellLink.connect(urls, identity, cell.on_link), stop)
        if link is None:
            return
        await cell.start(link)
        await cell.listen_to_relays(urls, identity)
        key = admin_key(data_dir)
        base_url = f"http://{address(api_socket)}/v1"
        admin = Admin(cell, identity, config.vehicle_urls or urls, key, config.currency, api_url=base_url)
        api = build_app(cell, ApiSettings(currency=config.currency))
        servers = [serve(api, api_socket), serve(admin.app(), admin_socket)]
        api.resume()
        sweeping = asyncio.create_task(sweep(cell))
        on_ready(
            ServerReady(
                base_url=base_url,
                admin_url=f"http://{address(admin_socket)}",
                admin_key=key,
                nats_url=urls[0],
                pid=os.getpid(),
            )
        )
        await watch(cell, nats, stop)
        for server, task in servers:
            server.should_exit = True
            await task
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
        await api.close()
    finally:
        await cell.stop()
        if cell.desk.fallback is not None:
            await cell.desk.fallback.close()
        if nats is not None:
            await nats.stop()


async def connect_patiently(connect: Callable[[], Awaitable[CellLink]], stop: asyncio.Event) -> CellLink | None:
    """The message server may still be starting: try for a while; None when told to stop meanwhile."""
    deadline = asyncio.get_running_loop().time() + CONNECT_PATIENCE_S
    stopped = asyncio.ensure_future(stop.wait())
    said = False
    try:
        while True:
            trying = asyncio.ensure_future(connect())
            await asyncio.wait({trying, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                trying.cancel()
                await asyncio.gather(trying, return_exceptions=True)
                return None
            try:
                return trying.result()
            except BusError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                if not said:
                    log.warning("%s; trying on for %.0f s", error.message, CONNECT_PATIENCE_S)
                    said = True
            await asyncio.wait({stopped}, timeout=CONNECT_PAUSE_S)
    finally:
        stopped.cancel()


def address(server: socket.socket) -> str:
    """Host and port of a listening socket, as they stand in a URL."""
    host, port = server.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(app: object, listener: socket.socket) -> tuple[uvicorn.Server, asyncio.Task[None]]:
    """Serve an ASGI application on a socket that listens already."""
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=BoundedProtocol,
        loop="none",
        lifespan="off",
        ws="none",
        proxy_headers=False,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
        backlog=2048,
    )
    server = uvicorn.Server(config)
    # Signals are ours: uvicorn would catch them and then raise them again.
    task = asyncio.create_task(server._serve([listener]))  # noqa: SLF001
    return server, task


async def watch(cell: CellLoop, nats: EmbeddedNats | None, stop: asyncio.Event) -> None:
    """Wait for the end; a loop that has failed ends the process, so that a supervisor starts it anew.

    An embedded message server that has ended is started again here: everybody reconnects by themselves.
    """
    while not stop.is_set():
        cell.check()
        if nats is not None and nats.ended:
            log.error("the message server has ended: it is started again")
            await nats.start()
        try:
            async with asyncio.timeout(1):
                await stop.wait()
        except TimeoutError:
            continue


async def sweep(cell: CellLoop) -> None:
    """Delete files whose time has come, now and then."""
    while True:
        try:
            await expire_files(cell)
        except (MotorpoolError, sqlite3.Error) as error:
            log.warning("files that have expired could not be removed yet: %s", type(error).__name__)
        await asyncio.sleep(FILE_SWEEP_S)
