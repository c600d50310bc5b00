"""A vehicle with its owner for tests: a desk, a guard that looks when asked, and the page on a free port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME, ConsentFile
from motorpool.agent.owner.desk import OwnerDesk
from motorpool.agent.owner.entries import LOG_DIR
from motorpool.agent.owner.log import OwnerLog
from motorpool.agent.owner.page import HEADER, OwnerPage, PageSpec
from motorpool.agent.owner.pairing import offer_pairing
from motorpool.agent.signals.source import AlwaysParked
from motorpool.core.guard import Budgets, History, Policy, decide
from motorpool.core.signals import DriverMode, Reading, Signals
from motorpool.types import Permit, VehicleState

NOW_MS = 1_790_000_000_000
MONDAY_MS = 1_789_948_800_000


class OwnersCar:
    """A parked car with which all is well, its guard and its owner's desk. Time passes when told."""

    def __init__(self, folder: Path, now_ms: int = NOW_MS) -> None:
        self.folder = folder
        self.now_ms = now_ms
        self.papers = ConsentFile(folder / CONSENT_NAME, folder / PUBLIC_NAME, "v1")
        self.log = OwnerLog(folder / LOG_DIR)
        self.desk = OwnerDesk(folder, "v1", self.papers, self.log, lambda: self.now_ms, look_now=self.look)
        self.history = History()
        self.mode = DriverMode.OWNER
        self.speed_kmh = 0.0
        self.policy = Policy(dwell_ms=0)

    def signals(self) -> Signals:
        """What the car tells now."""
        return msgspec.structs.replace(
            AlwaysParked().read(self.now_ms),
            driver_mode=Reading(self.mode, self.now_ms),
            speed_kmh=Reading(self.speed_kmh, self.now_ms),
        )

    def look(self) -> None:
        """What the agent's loop does at each look."""
        view, signals = self.desk.consent(self.now_ms), self.signals()
        verdict, self.history = decide(self.policy, view, signals, Budgets(), self.history, self.now_ms)
        state = VehicleState.WORKING if isinstance(verdict, Permit) else VehicleState.DENIED
        self.desk.judged(verdict, signals, state, self.now_ms)

    def run(self, ms: int) -> None:
        """Let time pass, with a look every second."""
        for _ in range(ms // 1_000):
            self.now_ms += 1_000
            self.look()

    @property
    def works(self) -> bool:
        """May the car work, by its latest look."""
        return bool(self.desk.state(self.now_ms)["allowed"])


class Phone:
    """A browser's side of the page, without a browser."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        """A status, and what was said: JSON where it is, else bytes."""
        async with self.session.get(self.url + path, **options) as answer:
            return answer.status, await _said(answer)

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """The same, for a change, with the header of the page unless another one is given."""
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        sent = {HEADER: "1", **{name.replace("_", "-"): value for name, value in headers.items()}}
        async with self.session.post(self.url + path, data=data, headers=sent) as answer:
            return answer.status, await _said(answer)

    async def pair(self, folder: Path, now_ms: int = NOW_MS) -> None:
        """As by the link."""
        assert await self.post("/api/pair", {"secret": offer_pairing(folder, now_ms)}) == (200, {"paired": True})


async def _said(answer: aiohttp.ClientResponse) -> Any:
    data = await answer.read()
    return msgspec.json.decode(data) if answer.content_type == "application/json" else data


@asynccontextmanager
async def served(car: OwnersCar, **spec: Any) -> AsyncIterator[tuple[OwnerPage, Phone]]:
    """The page of a car, and a phone that is not paired yet."""
    page = OwnerPage(car.desk, PageSpec(**{"port": 0, **spec}))
    await page.start()
    try:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
            yield page, Phone(session, page.url.replace("localhost", "127.0.0.1"))
    finally:
        await page.close()
        await asyncio.to_thread(car.log.close, car.now_ms)


def with_page(
    folder: Path, trial: Callable[[OwnersCar, Phone], Awaitable[None]], *, car: OwnersCar | None = None
) -> None:
    """Run a trial with a served page."""

    async def run() -> None:
        own = car or OwnersCar(folder)
        own.look()
        async with served(own) as (_, phone):
            await trial(own, phone)

    asyncio.run(run())
