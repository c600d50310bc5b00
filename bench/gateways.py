"""The gateways that are measured beside ours, each started in its own environment with its documented settings.

Called by: ``run_gateway``. All of them forward to one engine behind HTTP, whose address they get.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from bench import env, load, product

START_S = 90.0
BARE_LINK = "uvicorn + NATS, bare loop"
LITELLM_KEY = "sk-bench-0123456789abcdef"
WORKERS = os.cpu_count() or 2
# Its production page: no database, no spend logs, errors alone in the log; two workers under Granian, which was the
# fastest of uvicorn and Granian with one and two workers. It refuses to start without a key.
LITELLM_CONFIG = {
    "model_list": [{"model_name": "null", "litellm_params": {"model": "openai/null", "api_key": "none"}}],
    "litellm_settings": {"request_timeout": 60, "num_retries": 0, "set_verbose": False, "json_logs": False},
    "general_settings": {"disable_spend_logs": True, "disable_error_logs": True},
    "router_settings": {"num_retries": 0},
}


class Gateway:
    """A process tree with an address."""

    def __init__(self, target: load.Target, process: subprocess.Popen[bytes] | None) -> None:
        self.target = target
        self._process = process

    def last_words(self) -> str:
        """What its log says in the end, in brackets; nothing where it is no use."""
        return ""

    def peak_mb(self) -> float:
        """The sum over the processes of its session of what each held at its highest, in MB (10^6 bytes)."""
        assert self._process is not None
        return sum(product.peak_mb(pid) for pid in product.session(self._process.pid))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def engine(folder: Path, *, stand_in: bool) -> Iterator[load.Target]:
    """The null engine behind HTTP; ``stand_in`` takes a server with a fixed answer instead."""
    port = free_port()
    module = ["bench.echo"] if stand_in else ["motorpool.agent.runtime.null_server", "--rate", "0"]
    command = [sys.executable, "-m", *module, "--port", str(port)]
    target = load.Target(name="direct", base_url=f"http://127.0.0.1:{port}/v1")
    with product.ended(command, folder / "engine.log") as process:
        wait(target, process, folder / "engine.log")
        yield target


@contextlib.contextmanager
def echo(folder: Path) -> Iterator[load.Target]:
    """The cheapest server, to see what the load generator itself costs."""
    with engine(folder, stand_in=True) as target:
        yield target


@contextlib.contextmanager
def vllm_router(folder: Path, upstream: load.Target) -> Iterator[Gateway]:
    """One router process, one worker address, no choice to make: round robin."""
    port, metrics = free_port(), free_port()
    command = [str(env.python_of("vllm-router").parent / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", upstream.base_url.removesuffix("/v1"), "--policy", "round_robin"]
    command += ["--log-level", "error", "--prometheus-port", str(metrics)]
    target = load.Target(name="vllm-router", base_url=f"http://127.0.0.1:{port}/v1")
    with product.ended(command, folder / "vllm-router.log") as process:
        wait(target, process, folder / "vllm-router.log")
        yield Gateway(target, process)


@contextlib.contextmanager
def bare_link(folder: Path) -> Iterator[Gateway]:
    """A limit, not a peer: uvicorn and NATS with nothing in between; see ``bench.bare_link``."""
    port = free_port()
    target = load.Target(name=BARE_LINK, base_url=f"http://127.0.0.1:{port}/v1")
    log = folder / "bare-link.log"
    with product.ended([sys.executable, "-m", "bench.bare_link", "--port", str(port)], log) as process:
        wait(target, process, log)
        yield Gateway(target, process)


@contextlib.contextmanager
def litellm(folder: Path, upstream: load.Target) -> Iterator[Gateway]:
    """The proxy with two workers."""
    port = free_port()
    config = json.loads(json.dumps(LITELLM_CONFIG))
    config["model_list"][0]["litellm_params"]["api_base"] = upstream.base_url
    path = folder / "litellm.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    bin_folder = env.python_of("litellm").parent
    command = [str(bin_folder / "litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--num_workers", str(WORKERS), "--run_granian"]
    variables = {
        "LITELLM_MASTER_KEY": LITELLM_KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }
    target = load.Target(name="LiteLLM proxy", base_url=f"http://127.0.0.1:{port}/v1", api_key=LITELLM_KEY)
    with product.ended(command, folder / "litellm.log", variables) as process:
        wait(target, process, folder / "litellm.log")
        yield Gateway(target, process)


def wait(target: load.Target, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a whole chat completion comes back; raise MissingEnvError with one line if it does not."""

    end = time.monotonic() + START_S
    said = "nothing answered"
    body = {"model": target.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    with httpx.Client(headers={"Authorization": f"Bearer {target.api_key}"}, timeout=10, trust_env=False) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise env.MissingEnvError(f"{target.name} ended: {product.last_line(log)}")
            try:
                response = client.post(f"{target.base_url}/chat/completions", json=body)
            except httpx.HTTPError as error:
                said = str(error)
            else:
                if response.status_code == 200:
                    return
                said = f"{response.status_code} {response.text[:150]}"
            time.sleep(0.1)
    raise env.MissingEnvError(f"{target.name} does not serve: {said}")
