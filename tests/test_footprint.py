"""What an agent at rest does not carry: the packages of the control plane, of customers, and of parts that are off."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from motorpool import natslib, wire
from motorpool.bus import CellLink, EmbeddedNats
from motorpool.trust.credentials import CellIdentity, save_credentials
from motorpool.types import VehicleState

DEADLINE_S = 20.0
NEVER = (
    "aiohttp", "anyio", "google", "grpc", "httpcore", "httptools", "httpx", "numpy", "openai", "pydantic",
    "pygments", "python_multipart", "rich", "segno", "starlette", "tuf", "uvicorn", "xllamacpp", "zoneinfo",
    "motorpool.server", "motorpool.store", "motorpool.sim", "motorpool.core.scheduler",
)  # fmt: skip
PROGRAM = """
import json, sys
from motorpool.cli.main import run

code = run(["agent", "--dir", sys.argv[1], "--simulated"])
print(json.dumps([code, sorted(sys.modules)]))
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE)


def children_of(agent: subprocess.Popen[bytes]) -> list[str]:
    return Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text("utf-8").split()


async def modules_of_an_agent(folder: Path, identity: CellIdentity, url: str) -> list[str]:
    """Start an agent without consent, wait for its first report, end it, and have it say what it had loaded."""
    save_credentials(folder / "credentials.json", identity.enrol("v1", [url], 0))
    link = await CellLink.connect([url], identity, lambda _: None)
    reported: asyncio.Future[wire.State] = asyncio.get_running_loop().create_future()

    def on_state(_vehicle: str, data: bytes) -> None:
        message = wire.decode(wire.UP_STATE, data)
        if isinstance(message, wire.State) and not reported.done():
            reported.set_result(message)

    await link.listen(on_state, lambda _vehicle, _data: None)
    agent = start(folder)
    try:
        state = await asyncio.wait_for(reported, DEADLINE_S)
        assert state.state is VehicleState.DENIED
        assert not children_of(agent)
        agent.terminate()
        output, _ = await asyncio.to_thread(agent.communicate, timeout=DEADLINE_S)
        code, modules = json.loads(output)
        assert code == 0
        return list(modules)
    finally:
        agent.kill()
        agent.wait(DEADLINE_S)
        await link.close()


def test_an_agent_at_rest_has_loaded_no_package_that_it_does_not_use(tmp_path: Path) -> None:
    async def scenario() -> list[str]:
        identity = CellIdentity.generate(0)
        nats = EmbeddedNats(tmp_path / "nats", identity)
        await nats.start()
        try:
            folder = tmp_path / "v1"
            folder.mkdir()
            return await modules_of_an_agent(folder, identity, nats.url)
        finally:
            await nats.stop()

    modules = asyncio.run(scenario())
    assert {"nats", "cryptography", "motorpool.agent.loop", "motorpool.core.guard"} <= set(modules)
    loaded = [name for name in modules if any(name == it or name.startswith(f"{it}.") for it in NEVER)]
    assert not loaded


def test_websockets_get_what_the_message_client_was_loaded_without() -> None:
    program = """
import sys
from motorpool import natslib
import nats.aio.transport as transport
assert transport.aiohttp is None and "aiohttp" not in sys.modules
natslib.prepare(["nats://127.0.0.1:4222"])
assert transport.aiohttp is None
natslib.prepare(["nats://127.0.0.1:4222", "wss://example.org"])
assert transport.aiohttp is sys.modules["aiohttp"] and transport.multidict is sys.modules["multidict"]
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_websockets_without_their_package_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = sys.modules
    monkeypatch.setitem(modules, "aiohttp", None)
    with pytest.raises(ModuleNotFoundError) as raised:
        natslib.prepare(["ws://127.0.0.1:4222"])
    assert raised.value.name == "aiohttp"
