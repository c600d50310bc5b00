"""The environments of the peers: one each, from a locked requirement file with hashes, made when first needed.

Called by: the benchmarks, and ``python -m bench.env [NAME ...]`` to make them beforehand. Must not: touch the product's
own environment, except to use the uv in it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
ENVS = BENCH / ".envs"
REQUIREMENTS = BENCH / "requirements"
BIN = ROOT / ".venv" / "bin"
NAMES = ("celery", "dask", "jetstream", "litellm", "postgres", "procrastinate", "ray", "sglang-router", "vllm-router")


class MissingEnvError(Exception):
    """An environment could not be made; the text says why, in one line."""


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, which is made first if it is missing or its lock has changed."""
    lock = REQUIREMENTS / f"{name}.txt"
    place = ENVS / name
    python = place / "bin" / "python"
    stamp = place / ".ready"
    wanted = hashlib.sha256(lock.read_bytes() + str(Path(sys.executable).resolve()).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"==> Making the environment of {name} (once)", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    ENVS.mkdir(exist_ok=True)
    run([str(BIN / "uv"), "venv", "--quiet", "--python", sys.executable, str(place)], name)
    install = ["pip", "sync", "--quiet", "--python", str(python), "--require-hashes", str(lock)]
    try:
        run([str(BIN / "uv"), *install], name)
    except MissingEnvError as error:
        # uv does not read pip's configuration; where a proxy or mirror is set only there, pip itself does the work.
        print(f"==> uv could not install {name}, trying pip: {error}", flush=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        run([*pip, "--require-hashes", "-r", str(lock)], name)
    stamp.write_text(wanted)
    return python


def run(command: list[str], name: str) -> None:
    """Run one step; raise MissingEnvError with the last line of what it said."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise MissingEnvError(f"{name}: {said[-1].strip()}")


def version_of(name: str, package: str) -> str:
    """The locked version of a package."""
    for line in (REQUIREMENTS / f"{name}.txt").read_text().splitlines():
        if line.startswith(f"{package}=="):
            return line.removeprefix(f"{package}==").split()[0]
    raise KeyError(package)


def lock() -> None:
    """Renew the locked requirement files."""
    for name in NAMES:
        source = f"bench/requirements/{name}.in"
        command = [str(BIN / "uv"), "pip", "compile", source, "--universal", "--generate-hashes", "--python-version"]
        command += ["3.11", "--no-emit-index-url", "--no-annotate", "--custom-compile-command", "make bench-lock"]
        subprocess.run([*command, "--upgrade", "-q", "-o", source.replace(".in", ".txt")], check=True, cwd=ROOT)


if __name__ == "__main__":
    if sys.argv[1:] == ["--lock"]:
        lock()
    else:
        for each in sys.argv[1:] or NAMES:
            print(f"{each}: {python_of(each)}")
