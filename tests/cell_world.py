"""A whole cell for tests: a real NATS server, real books, the API, and vehicles; the cell can be killed and come back.

``Agents`` are the product's own agents with null engines in this process. ``HandPlayed`` is a vehicle whose every
message a test writes itself. Nothing sleeps: ``World.until`` looks again after each transaction of the cell.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from motorpool import wire
from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME, enrol_owner, give_consent
from motorpool.agent.main import AgentConfig, run_many
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.agent.signals.car import CarSpec
from motorpool.bus import CellLink, EmbeddedNats, VehicleLink
from motorpool.catalogue import Catalogue, Model
from motorpool.core.guard import Policy
from motorpool.core.pricing import ATTO_PER_MICRO
from motorpool.server.admin.app import Admin
from motorpool.server.cell import LiveAnswer, LiveRequest, LiveTokens
from motorpool.server.entries import Entry
from motorpool.server.loop import CellLoop
from motorpool.server.openai.app import Api, build_app
from motorpool.server.openai.keys import create_key
from motorpool.store.blobs import BlobStore
from motorpool.store.database import Database
from motorpool.trust.consent import ConsentLimits
from motorpool.trust.credentials import CellIdentity, load_credentials
from motorpool.types import Kind, VehicleState

MODEL = "null"
DEADLINE_S = 30.0
DAY_MS = 86_400_000
ADMIN_KEY = "operator"
ENDED = ("completed", "failed", "expired", "cancelled")
CATALOGUE = Catalogue([Model(id=MODEL, input_micro=1_000_000, output_micro=2_000_000)])


class WatchedLoop(CellLoop):
    """The cell's loop, which says when a transaction is over."""

    changed: asyncio.Event

    async def _transact(self, entries: list[Entry]) -> None:
        try:
            await super()._transact(entries)
        finally:
            self.changed.set()


class World:
    """One data folder, one message server, and the cell that runs on them at the moment."""

    def __init__(self, folder: Path, nats: EmbeddedNats, identity: CellIdentity) -> None:
        self.folder = folder
        self.nats = nats
        self.identity = identity
        self.ahead_ms = 0
        self.key = ""
        self.cell: WatchedLoop
        self.api: Api
        self.client: httpx.AsyncClient
        self.operator: httpx.AsyncClient
        self.agents: list[Agent] = []
        self._hands: list[HandPlayed] = []

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms

    # -- the cell ------------------------------------------------------------------------------------------------------

    async def start_cell(self) -> None:
        database = Database(self.folder / "cell.db")
        blobs = BlobStore(self.folder / "files")
        self.cell = WatchedLoop(database=database, blobs=blobs, catalogue=CATALOGUE, clock=self.now_ms)
        self.cell.changed = asyncio.Event()
        if not self.key:
            self.key, _ = create_key(database.writer, "acme", "test", self.now_ms())
        await self.cell.start(await CellLink.connect([self.nats.url], self.identity, self.cell.on_link))
        self.api = build_app(self.cell)
        self.api.resume()
        admin = Admin(self.cell, self.identity, [self.nats.url], ADMIN_KEY, "EUR").app()
        self.client = _client(self.api, self.key)
        self.operator = _client(admin, ADMIN_KEY)

    async def kill_cell(self) -> None:
        """End it in the middle of whatever it does; only what is committed stays."""
        await self.api.close()
        await self.client.aclose()
        await self.operator.aclose()
        for task in self.cell._tasks:
            task.cancel()
        await asyncio.gather(*self.cell._tasks, return_exceptions=True)
        await self.cell.stop()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self.cell.changed.clear()
                await self.cell.changed.wait()
                self.cell.check()

    def one(self, query: str, *values: object) -> Any:
        return self.cell.reader.execute(query, values).fetchone()[0]

    def all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.cell.reader.execute(query, values)]

    # -- customers -----------------------------------------------------------------------------------------------------

    async def upload(self, data: bytes) -> httpx.Response:
        return await self.client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", data)})

    async def batch(self, bodies: list[dict[str, Any]], window: str = "24h") -> str:
        """Hand in a batch; returns its id."""
        file = (await self.upload(b"".join(line(number, body) for number, body in enumerate(bodies)))).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": window}
        response = await self.client.post("/v1/batches", json=asked)
        assert response.status_code == 200, response.text
        batch_id: str = response.json()["id"]
        return batch_id

    def status(self, batch_id: str) -> str:
        return str(self.one("SELECT status FROM batch WHERE batch_id = ?", batch_id))

    def completed(self, batch_id: str) -> int:
        return int(self.one("SELECT completed FROM batch WHERE batch_id = ?", batch_id))

    async def ended(self, batch_id: str) -> dict[str, Any]:
        """The batch at its end."""
        await self.until(lambda: self.status(batch_id) in ENDED)
        shown: dict[str, Any] = (await self.client.get(f"/v1/batches/{batch_id}")).json()
        return shown

    async def rows(self, file_id: str | None) -> dict[str, dict[str, Any]]:
        """The lines of an output or error file by custom_id; each stands there once."""
        if file_id is None:
            return {}
        response = await self.client.get(f"/v1/files/{file_id}/content")
        assert response.status_code == 200
        lines = [json.loads(each) for each in response.content.splitlines()]
        found = {each["custom_id"]: each for each in lines}
        assert len(found) == len(lines), "a line stands twice"
        return found

    def check_money(self, batch_id: str) -> None:
        """A batch costs its lines and nothing else, and the books as a whole are exact."""
        number, cost = self.all("SELECT batch_no, cost_micro FROM batch WHERE batch_id = ?", batch_id)[0]
        lines = self.all(
            "SELECT sum(cost_micro), sum(prompt_tokens), sum(completion_tokens) FROM result"
            " WHERE line_key >= ? AND line_key < ? AND status < 400",
            number << 32,
            (number + 1) << 32,
        )
        sums = [int(each or 0) for each in lines[0]]
        charged = self.one(
            "SELECT coalesce(sum(amount_micro), 0) FROM transfer WHERE reference = ? AND kind = 'usage'", batch_id
        )
        price = self.all("SELECT input_micro, output_micro FROM batch WHERE batch_id = ?", batch_id)[0]
        exact = sums[1] * price[0] + sums[2] * price[1]
        assert sums[0] == cost == charged == exact // 1_000_000, "down to the whole millionth, in the customer's favour"
        self.check_ledger()

    def check_ledger(self) -> None:
        """All that was ever worked is owed to owners to the last bit, and the whole millionths of it are paid."""
        worked = 0
        for number, price, output, share in self.all(
            "SELECT batch_no, input_micro, output_micro, owner_share_bp FROM batch WHERE input_micro IS NOT NULL"
        ):
            query = (
                "SELECT coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) FROM result"
                " WHERE line_key >= ? AND line_key < ? AND status < 400"
            )
            prompt, completion = self.all(query, number << 32, (number + 1) << 32)[0]
            worked += (prompt * price + completion * output) * share * ATTO_PER_MICRO // 10**10
        live = self.one(
            "SELECT coalesce(sum(amount_micro), 0) FROM transfer WHERE kind = 'usage'"
            " AND reference NOT IN (SELECT batch_id FROM batch)"
        )
        rest = self.one("SELECT coalesce(sum(atto), 0) FROM rest WHERE name LIKE 'customer:%'")
        worked += (live * ATTO_PER_MICRO + rest) * 7 // 10
        earned = owed = 0
        for vehicle_id, micro, day in self.all(
            "SELECT vehicle_id, earned_micro, (SELECT coalesce(sum(earned_micro), 0) FROM vehicle_day AS d"
            " WHERE d.vehicle_id = v.vehicle_id) FROM vehicle AS v"
        ):
            query = "SELECT coalesce(sum(amount_micro), 0) FROM transfer WHERE credit = ?"
            assert micro == day == self.one(query, f"owner:{vehicle_id}")
            earned += micro
        owed = self.one("SELECT coalesce(sum(atto), 0) FROM rest WHERE name LIKE 'owner:%'")
        assert earned * ATTO_PER_MICRO + owed == worked
        kept = dict(self.all("SELECT name, atto FROM rest WHERE atto > 0"))
        assert {name: self.cell.scheduler.rests.of(name) for name in kept} == kept, "a restart changes no rest"

    def request(self, text: str, tokens: int, *, stream: bool) -> LiveRequest:
        name = f"req_{text.replace(' ', '_')}_{self.cell.now_ms()}"
        return LiveRequest(
            request_id=name, response_id=f"chatcmpl-{name}", account="acme", kind=Kind.CHAT, model=MODEL,
            stream=stream, choices=1, body=json.dumps(chat(text, tokens)).encode(), created_s=0,
        )  # fmt: skip

    # -- vehicles ------------------------------------------------------------------------------------------------------

    async def enrol(self, vehicle_id: str, owner_key: str = "") -> bytes:
        """Its credentials, as the operator gets them."""
        response = await self.operator.post("/v1/vehicles", json={"vehicle_id": vehicle_id, "owner_key": owner_key})
        assert response.status_code == 201, response.text
        return response.content

    async def agent(self, vehicle_id: str, *, rate: float = 0.0, slots: int = 4, car: CarSpec | None = None) -> Agent:
        """Enrol a vehicle, start its agent and wait until it is ready."""
        agent = Agent(self._config(vehicle_id, await self.enrol(vehicle_id), rate, slots, car))
        self.agents.append(agent)
        await self.ready(vehicle_id)
        return agent

    async def ready(self, vehicle_id: str) -> None:
        await self.until(lambda: vehicle_id in self.cell.scheduler.vehicles)
        vehicle = self.cell.scheduler.vehicles[vehicle_id]
        await self.until(lambda: vehicle.usable(self.now_ms()))

    def _config(self, vehicle_id: str, credentials: bytes, rate: float, slots: int, car: CarSpec | None) -> AgentConfig:
        folder = self.folder / vehicle_id
        folder.mkdir()
        (folder / "credentials.json").write_bytes(credentials)
        enrol_owner(folder)
        now = time.time_ns() // 1_000_000
        give_consent(folder, vehicle_id, ConsentLimits(max_watts_w=150), now_ms=now, expires_ms=now + DAY_MS)
        return AgentConfig(
            agent_dir=folder,
            credentials_path=folder / "credentials.json",
            consent_path=folder / CONSENT_NAME,
            owner_public_key_path=folder / PUBLIC_NAME,
            engine=EngineSpec(backend=Backend.NULL, model=MODEL, slots=slots, rate_tokens_per_s=rate, hosted=False),
            policy=Policy(dwell_ms=50, watts_w=120),
            car=car,
            state_interval_ms=300,
            freeze_grace_ms=300,
        )

    async def hand_played(
        self, vehicle_id: str, *, slots: int = 4, region: str = "local", owner_key: str = ""
    ) -> HandPlayed:
        """Enrol a vehicle that the test plays itself; it has reported that it is ready."""
        path = self.folder / f"{vehicle_id}.json"
        path.write_bytes(await self.enrol(vehicle_id, owner_key))
        hand = HandPlayed(vehicle_id, slots, region)
        await hand.connect(path)
        self._hands.append(hand)
        hand.report()
        await self.ready(vehicle_id)
        return hand

    async def close(self) -> None:
        for agent in self.agents:
            await agent.stop()
        for hand in self._hands:
            await hand.link.close()
        await self.kill_cell()


class Agent:
    """One agent in this process."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(run_many([config], self._stop))

    async def stop(self) -> None:
        """Ask it to stop; returns when everything is handed back and delivered."""
        self._stop.set()
        async with asyncio.timeout(DEADLINE_S):
            await self._task

    def again_in(self, world: World) -> Agent:
        """The same vehicle's agent, started anew."""
        agent = Agent(self.config)
        world.agents.append(agent)
        return agent


class HandPlayed:
    """A vehicle that says what the test wants it to say."""

    def __init__(self, vehicle_id: str, slots: int, region: str) -> None:
        self.vehicle_id = vehicle_id
        self.slots = slots
        self.region = region
        self.incarnation = "hand"
        self.link: VehicleLink
        self._seq = 0
        self._received: asyncio.Queue[wire.Down] = asyncio.Queue()

    async def connect(self, credentials_path: Path) -> None:
        self.link = await VehicleLink.connect(
            load_credentials(credentials_path),
            lambda data: self._received.put_nowait(wire.decode(wire.DOWN, data)),
            lambda up: None,
        )

    def report(self, held: list[str] | None = None, state: VehicleState = VehicleState.READY, **fields: Any) -> None:
        self._seq += 1
        message = wire.State(
            incarnation=self.incarnation, seq=self._seq, state=state, model=MODEL, slots=self.slots, held=held or [],
            region=self.region, **fields,
        )  # fmt: skip
        self.link.publish_state(wire.encode(message))

    async def next(self, kind: type[Any]) -> Any:
        """The next message of this kind from the cell; others are passed over."""
        async with asyncio.timeout(DEADLINE_S):
            while not isinstance(message := await self._received.get(), kind):
                pass
        return message

    def heard(self) -> list[wire.Down]:
        """What has come from the cell and was not looked at."""
        return [self._received.get_nowait() for _ in range(self._received.qsize())]

    async def finish(
        self, grant: wire.Grant, lines: list[int], message_id: str, *, energy_mwh: int = 0, measured: bool = False,
        **changes: Any,
    ) -> None:  # fmt: skip
        """Publish results for these lines."""
        fields: dict[str, Any] = {"status": 200, "body": b'{"by":"hand"}', "prompt_tokens": 3, "completion_tokens": 5}
        items = [wire.ResultItem(line=number, **(fields | changes)) for number in lines]
        message = wire.Results(
            incarnation=self.incarnation, message_id=message_id, lease_id=grant.lease_id, job_id=grant.job_id,
            items=items, energy_mwh=energy_mwh, energy_is_measured=measured,
        )  # fmt: skip
        await self.link.publish_work(wire.encode(message), f"{message_id}-{lines}")

    def say(self, message: wire.UpLive) -> None:
        self.link.publish_live(wire.encode(message))


def chat(text: str, tokens: int) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}


def line(number: int, body: dict[str, Any]) -> bytes:
    whole = {"custom_id": f"n{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(whole).encode() + b"\n"


def _client(app: Any, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://cell", headers={"Authorization": f"Bearer {key}"},
        timeout=DEADLINE_S,
    )  # fmt: skip


@asynccontextmanager
async def a_world(folder: Path) -> AsyncIterator[World]:
    identity = CellIdentity.generate(0)
    nats = EmbeddedNats(folder / "nats", identity)
    await nats.start()
    world = World(folder, nats, identity)
    try:
        await world.start_cell()
        yield world
    finally:
        await world.close()
        await nats.stop()


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await test

    asyncio.run(bounded())


async def answer(
    cell: CellLoop, request: LiveRequest, seen: Callable[[str], None] = lambda text: None
) -> tuple[str, Any]:
    """The whole text of a live request, and its usage or the answer."""
    text = ""
    async for item in cell.live(request):
        if isinstance(item, LiveAnswer):
            return text, item
        assert isinstance(item, LiveTokens)
        text += "".join(delta.text for delta in item.deltas)
        seen(text)
        if item.usage is not None:
            return text, item.usage
    raise AssertionError("it ended without an end")
