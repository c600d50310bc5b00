"""The scenes of the benchmark of streams: faults in mid-stream, announced departures, a silent machine, a crowd.

Decides: what is done to which machine, and when. Must not: judge; ``run_streams`` sums up. A scene runs against any
gateway in front of any machines. Called by: ``run_streams``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

import httpx
import msgspec
import psutil

from bench import gateways, product
from bench.env import BIN
from bench.load import Target
from bench.streams_client import Heard, listen, request
from bench.streams_fleet import FAULTS, Car, Machine, Proxy, Server, enrol_car, mark, serving

MODEL: Final = "null"
READY_S: Final = 60.0
LIMIT_S: Final = 10.0  # a client waits so long for a whole stream, which takes a second
SLOW_LIMIT_S: Final = 60.0  # the same with the demo model
OUTAGE_S: Final = 2.0  # what was struck stays away so long after its stream has ended
SEED: Final = 1
_numbers = itertools.count(1)


class Trial(msgspec.Struct, kw_only=True):
    """One stream with one event: what was heard, what is heard without it, and after which token it was struck."""

    fault: str
    heard: Heard
    expected: str
    struck_at: int = 0

    @property
    def same(self) -> bool:
        """Whether the client got the very text of the unbroken run."""
        return self.heard.whole and self.heard.text == self.expected

    @property
    def largest_gap_ms(self) -> float:
        """The longest silence between two pieces of text."""
        return max(self.heard.gaps_s, default=0.0) * 1e3


class System:
    """A gateway with its machines."""

    def __init__(self, target: Target, machines: Sequence[Machine], pid: int, limit_s: float = LIMIT_S) -> None:
        self.target = target
        self.limit_s = limit_s
        self.machines = list(machines)
        self.pid = pid  # of the process that serves the API

    async def ready(self) -> None:
        """Wait until every machine serves again."""
        raise NotImplementedError


class Ours(System):
    """Our control plane with cars."""

    def __init__(self, cell: product.Cell, cars: list[Car], model: str) -> None:
        target = Target(name="Motorpool", base_url=cell.base_url, api_key=cell.api_key, model=model)
        limit_s = LIMIT_S if model == MODEL else SLOW_LIMIT_S
        super().__init__(target, cars, cell.pids[product.CONTROL], limit_s)
        self._cell = cell

    async def ready(self) -> None:
        """As the operator sees it; nothing is left that runs, as llama.cpp reckons a little otherwise in company."""
        end_s = time.monotonic() + READY_S
        while True:
            states = await asyncio.to_thread(self._cell.vehicle_states)
            back = all(machine.is_ready for machine in self.machines if isinstance(machine, Car))
            if back and states.count("ready") >= len(self.machines):
                return
            if time.monotonic() > end_s:
                raise product.ProductError(f"vehicles are not back after {READY_S:g} s: {states}")
            await asyncio.sleep(0.1)


class Theirs(System):
    """Another gateway in front of null servers."""

    async def ready(self) -> None:
        """Each of them answers, and the gateway has had a second to notice."""
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            for machine in self.machines:
                end_s = time.monotonic() + READY_S
                while True:
                    with contextlib.suppress(httpx.HTTPError):
                        if (await client.get(f"http://127.0.0.1:{machine.proxy.port}/health")).status_code == 200:
                            break
                    if time.monotonic() > end_s:
                        raise product.ProductError(f"{machine.name} is not back after {READY_S:g} s")
                    await asyncio.sleep(0.1)
        await asyncio.sleep(2.5)


@contextlib.asynccontextmanager
async def ours(
    folder: Path, cars: int, *, options: list[str], model: str = MODEL, together: int = 0
) -> AsyncIterator[Ours]:
    """A control plane and ``cars`` processes of one vehicle each, or one of ``together`` vehicles."""
    await asyncio.to_thread(folder.mkdir, parents=True)
    command = [str(BIN / "motorpool"), "dev", "--vehicles", "0", "--model", model, "--json", "--port", "0"]
    command += ["--data", str(folder / "data")]
    async with contextlib.AsyncExitStack() as stack:
        child = stack.enter_context(product.ended(command, folder / "dev.log"))
        line = await asyncio.to_thread(product.first_line, child, folder / "dev.log")
        cell = msgspec.json.decode(line, type=product.Cell)
        key = {"Authorization": f"Bearer {cell.admin_key}"}
        admin = await stack.enter_async_context(
            httpx.AsyncClient(base_url=cell.admin_url, headers=key, timeout=60, trust_env=False)
        )

        async def enrol(name: str, public: str) -> bytes:
            asked = {"vehicle_id": name, "name": name, "owner_key": public}
            response = await admin.post("/v1/vehicles", json=asked)
            response.raise_for_status()
            return response.content

        nats_port = await _nats_port(cell)
        made: list[Car] = []
        for number in range(together or cars):
            name = f"car-{number}"
            car = await enrol_car(name, folder / name, nats_port, enrol, ["--model", model, *options], _now_ms())
            made.append(car)
            stack.push_async_callback(car.proxy.close)
        if together:
            command = [sys.executable, "-m", "bench.streams_car", *(str(car.folder) for car in made)]
            made = [Car.of_many("cars", made[0], [*command, "--model", model, *options])]
        for car in made:
            await car.start()
            stack.push_async_callback(car.kill)
        system = Ours(cell, made, model)
        await _vehicles(cell, together or cars)
        yield system


async def _vehicles(cell: product.Cell, count: int) -> None:
    await asyncio.to_thread(product.wait_for_vehicles, cell, count)


async def _nats_port(cell: product.Cell) -> int:
    """Where the message server of this cell listens: the credentials of a vehicle say so."""
    key = {"Authorization": f"Bearer {cell.admin_key}"}
    async with httpx.AsyncClient(base_url=cell.admin_url, headers=key, timeout=30, trust_env=False) as admin:
        response = await admin.post("/v1/vehicles", json={"vehicle_id": "probe", "name": "probe", "owner_key": ""})
        response.raise_for_status()
        await admin.delete("/v1/vehicles/probe")
    url: str = response.json()["urls"][0]
    return int(url.rsplit(":", 1)[1])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@contextlib.asynccontextmanager
async def servers(folder: Path, count: int, *, rate: float) -> AsyncIterator[list[Server]]:
    """Null servers behind proxies, for other gateways."""
    await asyncio.to_thread(folder.mkdir, parents=True)
    made: list[Server] = []
    async with contextlib.AsyncExitStack() as stack:
        for number in range(count):
            port = gateways.free_port()
            proxy = Proxy(port)
            await proxy.start()
            stack.push_async_callback(proxy.close)
            module = ["-m", "motorpool.agent.runtime.null_server", "--rate", str(rate), "--port", str(port)]
            server = Server(f"server-{number}", [sys.executable, *module], proxy, folder / f"server-{number}.log")
            await server.start()
            stack.push_async_callback(server.kill)
            made.append(server)
        yield made


# -- scenes ------------------------------------------------------------------------------------------------------------


async def faults(
    system: System, *, count: int, tokens: int, at_once: int, kinds: Sequence[str] = FAULTS, latest: int | None = None
) -> list[Trial]:
    """``count`` streams with one event each, at a token that the seed says, to the machine that has the stream.

    ``latest``: the last token that may be that one; ten before the end if not said.
    """
    dice = random.Random(SEED)
    plans = [(kinds[number % len(kinds)], dice.randrange(5, latest or tokens - 10)) for number in range(count)]
    limit = asyncio.Semaphore(at_once)

    async def one(fault: str, at: int) -> Trial:
        async with limit:
            return await _fault(system, fault, at, tokens)

    return list(await asyncio.gather(*(one(fault, at) for fault, at in plans)))


async def _fault(system: System, fault: str, at: int, tokens: int) -> Trial:
    number = next(_numbers)
    asked = request(system.target, f"{mark(number)} Tell me something long.", max_tokens=tokens)
    unbroken = await listen(system.target, asked, limit_s=system.limit_s)
    striking: list[asyncio.Task[None]] = []
    struck: list[Machine] = []

    async def strike() -> None:
        machine = serving(system.machines, number)
        if machine is not None:
            struck.append(machine)
            await machine.strike(fault)

    def heard(count: int) -> None:
        if count == at:
            striking.append(asyncio.get_running_loop().create_task(strike()))

    found = await listen(system.target, asked, limit_s=system.limit_s, on_piece=heard)
    await asyncio.gather(*striking)
    if struck and fault not in ("nothing", "announce"):
        await asyncio.sleep(OUTAGE_S)
    for machine in struck:
        await machine.heal()
    await system.ready()
    return Trial(fault=fault, heard=found, expected=unbroken.text, struck_at=at if struck else 0)


async def silent(system: System, *, count: int, tokens: int, at_once: int, limit_s: float) -> list[Heard]:
    """One of two machines takes requests and says nothing; it was well until just before."""
    limit = asyncio.Semaphore(at_once)

    async def one() -> Heard:
        async with limit:
            asked = request(system.target, f"{mark(next(_numbers))} Say a word.", max_tokens=tokens)
            return await listen(system.target, asked, limit_s=limit_s)

    await asyncio.gather(*(one() for _ in range(max(60, count // 2))))  # so that it is known what is usual
    await system.machines[0].strike("freeze")
    try:
        return list(await asyncio.gather(*(one() for _ in range(count))))
    finally:
        await system.machines[0].heal()


class Crowd(msgspec.Struct, kw_only=True):
    """Many streams at once: tokens a second, how late tokens came, and what the gateway's process took for it."""

    streams: int
    whole: int
    errors: list[str]
    tokens_per_s: float
    late_p99_ms: float
    late_median_ms: float
    cpu_us_per_token: float
    memory_kb_per_stream: float


async def crowd(target: Target, pids: list[int], *, streams: int, tokens: int, rate: float) -> Crowd:
    """``streams`` at once, each of ``tokens`` at ``rate`` a second; they begin within a second."""
    await listen(target, request(target, "warm", max_tokens=2), limit_s=LIMIT_S)
    processes = [psutil.Process(pid) for pid in pids]
    before_cpu_s, before_rss = _cpu_s(processes), sum(each.memory_info().rss for each in processes)
    peak_rss = before_rss
    running = True

    async def watch() -> None:
        nonlocal peak_rss
        while running:
            peak_rss = max(peak_rss, sum(each.memory_info().rss for each in processes))
            await asyncio.sleep(0.25)

    async def one(number: int) -> Heard:
        await asyncio.sleep(number / streams)
        asked = request(target, f"{mark(next(_numbers))} Go on and on.", max_tokens=tokens)
        return await listen(target, asked, limit_s=tokens / rate * 4 + 30)

    watching = asyncio.create_task(watch())
    begun_s = time.perf_counter()
    heard = await asyncio.gather(*(one(number) for number in range(streams)))
    took_s = time.perf_counter() - begun_s
    running = False
    await watching
    count = sum(len(each.at_s) for each in heard)
    late = sorted(
        max(0.0, at_s - each.at_s[0] - place / rate) * 1e3 for each in heard for place, at_s in enumerate(each.at_s)
    )
    return Crowd(
        streams=streams,
        whole=sum(each.whole for each in heard),
        errors=sorted({each.error or "no end" for each in heard if not each.whole}),
        tokens_per_s=count / took_s,
        late_p99_ms=late[int(len(late) * 0.99)] if late else 0.0,
        late_median_ms=statistics.median(late) if late else 0.0,
        cpu_us_per_token=(_cpu_s(processes) - before_cpu_s) / max(1, count) * 1e6,
        memory_kb_per_stream=max(0, peak_rss - before_rss) / streams / 1e3,
    )


def _cpu_s(processes: list[psutil.Process]) -> float:
    return float(sum(times.user + times.system for times in (each.cpu_times() for each in processes)))
