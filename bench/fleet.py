"""Many vehicles in one process, each with its own credentials, consent, connection and null engine.

They are the product's own agents (``motorpool.agent.main.run_many``), enrolled over the operator's address; only that
they share a process differs from vehicles on the road. Called by: ``product.running``, as a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path

import httpx
import msgspec
import uvloop

from motorpool.agent.enrolment import CONSENT_NAME, PUBLIC_NAME, enrol_owner, give_consent
from motorpool.agent.main import AgentConfig, run_many
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.trust.consent import ConsentLimits
from motorpool.trust.credentials import VehicleCredentials, save_credentials

AT_ONCE = 16  # enrolments
HOUR_MS = 3_600_000
WATTS_W = 400
MODEL = "null"


async def enrol(admin: httpx.AsyncClient, folder: Path, vehicle_id: str, engine: EngineSpec) -> AgentConfig:
    """The owner's key and consent, and credentials from the operator."""
    await asyncio.to_thread(folder.mkdir, parents=True)
    key = enrol_owner(folder)
    # A benchmark measures real time, and a consent of the hour needs to know which hour it is.
    now_ms = time.time_ns() // 1_000_000
    give_consent(folder, vehicle_id, ConsentLimits(max_watts_w=WATTS_W), now_ms=now_ms, expires_ms=now_ms + HOUR_MS)
    asked = {"vehicle_id": vehicle_id, "name": vehicle_id, "owner_key": key.public.hex()}
    response = await admin.post("/v1/vehicles", json=asked)
    response.raise_for_status()
    credentials = folder / "credentials.json"
    save_credentials(credentials, msgspec.json.decode(response.content, type=VehicleCredentials))
    return AgentConfig(
        agent_dir=folder,
        credentials_path=credentials,
        consent_path=folder / CONSENT_NAME,
        owner_public_key_path=folder / PUBLIC_NAME,
        engine=engine,
        car=None,
    )


async def main(options: argparse.Namespace) -> None:
    """Enrol all, then run all until SIGINT."""
    engine = EngineSpec(backend=Backend.NULL, model=MODEL, slots=options.slots, hosted=False)
    if options.engine_url:
        engine = EngineSpec(
            backend=Backend.REMOTE, model=MODEL, remote_model=MODEL, slots=options.slots, url=options.engine_url
        )
    headers = {"Authorization": f"Bearer {os.environ['MOTORPOOL_BENCH_ADMIN_KEY']}"}
    limit = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=options.admin_url, headers=headers, timeout=60, trust_env=False) as admin:

        async def one(number: int) -> AgentConfig:
            async with limit:
                vehicle_id = f"bench-{number:04d}"
                return await enrol(admin, options.dir / vehicle_id, vehicle_id, engine)

        configs = await asyncio.gather(*(one(number) for number in range(options.vehicles)))
    await run_many(list(configs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--vehicles", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--admin-url", required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--engine-url", default="")
    uvloop.run(main(parser.parse_args()))
