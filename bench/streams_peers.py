"""Gateways in front of several upstreams, each with its documented settings for failing ones.

Called by: ``run_streams``. The upstreams are null servers behind proxies (``streams_fleet``), the same for all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from bench import env, gateways, load, product
from bench.gateways import Gateway


class Peer(Gateway):
    """One with the id of its process."""

    @property
    def leader(self) -> int:
        """The process that was started; others of its session belong to it."""
        assert self._process is not None
        return self._process.pid


# A worker that fails is noticed within a second or two, and comes back as soon.
_ROUTER: Final = [
    "--policy", "round_robin", "--log-level", "error", "--health-check-interval-secs", "1",
    "--health-check-timeout-secs", "1", "--health-failure-threshold", "1", "--health-success-threshold", "1",
]  # fmt: skip


@contextlib.contextmanager
def _router(name: str, command: list[str], folder: Path, urls: list[str]) -> Iterator[Peer]:
    port, metrics = gateways.free_port(), gateways.free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls, *_ROUTER]
    target = load.Target(name=name, base_url=f"http://127.0.0.1:{port}/v1")
    log = folder / f"{name}.log"
    with product.ended([*command, *options, "--prometheus-port", str(metrics)], log) as process:
        gateways.wait(target, process, log)
        yield Peer(target, process)


@contextlib.contextmanager
def vllm_router(folder: Path, urls: list[str]) -> Iterator[Peer]:
    """Retries and circuit breaker as they come, health checks each second."""
    command = [str(env.python_of("vllm-router").parent / "vllm-router")]
    with _router("vllm-router", command, folder, urls) as gateway:
        yield gateway


@contextlib.contextmanager
def sglang_router(folder: Path, urls: list[str]) -> Iterator[Peer]:
    """The same."""
    command = [str(env.python_of("sglang-router")), "-m", "sglang_router.launch_router"]
    with _router("sglang-router", command, folder, urls) as gateway:
        yield gateway


@contextlib.contextmanager
def litellm(folder: Path, urls: list[str]) -> Iterator[Peer]:
    """One deployment for each upstream, two retries on others, a limit for the first token, a short cool-down."""
    port = gateways.free_port()
    config = json.loads(json.dumps(gateways.LITELLM_CONFIG))
    (one,) = config["model_list"]
    config["model_list"] = [
        one | {"litellm_params": one["litellm_params"] | {"api_base": f"{url}/v1", "stream_timeout": 2}} for url in urls
    ]
    config["litellm_settings"] |= {"num_retries": 2, "request_timeout": 30}
    config["router_settings"] = {
        "num_retries": 2, "allowed_fails": 1, "cooldown_time": 2, "routing_strategy": "simple-shuffle",
    }  # fmt: skip
    path = folder / "litellm.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    bin_folder = env.python_of("litellm").parent
    command = [str(bin_folder / "litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
    variables = {
        "LITELLM_MASTER_KEY": gateways.LITELLM_KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }
    target = load.Target(name="LiteLLM proxy", base_url=f"http://127.0.0.1:{port}/v1", api_key=gateways.LITELLM_KEY)
    with product.ended([*command, "--num_workers", "1", "--run_granian"], folder / "litellm.log", variables) as process:
        gateways.wait(target, process, folder / "litellm.log")
        yield Peer(target, process)


Start = Callable[[Path, list[str]], contextlib.AbstractContextManager[Peer]]
PEERS: Final[dict[str, Start]] = {
    "vllm-router": vllm_router,
    "sglang-router": sglang_router,
    "LiteLLM proxy": litellm,
}
