"""One process at a time in a folder of data: a lock that the kernel drops when its holder ends in any way.

Decides: whether a folder is free. Must not: wait for it. Called by: ``cli.dev``, ``cli.serve``, ``cli.agent``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from motorpool.errors import SetupError


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """What is made meanwhile, the books and logs of a cell or an agent, only this user may read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def take(folder: Path, name: str, what: str, advice: str) -> IO[str]:
    """Take ``folder`` for this process, until the returned stream is closed; raise SetupError if another one has it.

    ``name`` is that of the lock file; who needs different locks can work side by side.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stream = (folder / name).open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        stream.close()
        raise SetupError(
            f"another {what} (process {holder}) works in {folder}: stop it, or {advice}", code="already_running"
        ) from error
    stream.truncate(0)
    stream.write(str(os.getpid()))
    stream.flush()
    return stream
