"""Keeps undelivered messages safe while there is no link: in memory, or encrypted on disk, by the owner's policy.

Decides: how a message lies on disk, and when there is no room for more. Must not: decide which messages are kept; that
is ``agent.delivery``, which alone calls this room, in a thread: it may take as long as a disk does.

Each message is a file of its own, sealed with ChaCha20-Poly1305 under a random nonce and bound to its id, written
beside its place, synced and then renamed, so that a power cut leaves a whole message or none. What cannot be opened
(damaged, or of another key) is dropped with one line in the log: the cell has its line computed again. The key lies
beside the spool unless the caller brings one: it keeps results from whoever gets the spool without the key, and a key
that a TPM releases keeps them from whoever gets the disk.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from motorpool.trust.credentials import write_secret

log = logging.getLogger(__name__)

SPOOL_NAME: Final = "spool"
KEY_NAME: Final = "spool.key"
KEY_BYTES: Final = 32
BLOCK_BYTES: Final = 4096  # flash is written and counted in blocks
_NONCE_BYTES: Final = 12
_MAGIC: Final = b"MPS1"
_SUFFIX: Final = ".msg"
_PART: Final = ".part"
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,200}")


class Spool(Protocol):
    """Where messages wait for a link, by their ids."""

    def put(self, message_id: str, data: bytes) -> bool:
        """Keep a message; False: there is no room for it. Twice is once."""

    def read(self, message_id: str) -> bytes | None:
        """A message that is kept; None if there is none, or none that can be read any more."""

    def remove(self, message_id: str) -> None:
        """Forget a message; an unknown one is ignored."""

    def waiting(self) -> list[str]:
        """The ids of all messages that are kept, the oldest first."""


class MemorySpool:
    """Messages that are kept as long as the process lives, ``max_bytes`` of them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[str, bytes] = {}
        self._bytes = 0

    def put(self, message_id: str, data: bytes) -> bool:
        """Keep a message; False: there is no room for it."""
        if message_id in self._kept:
            return True
        if self._bytes + len(data) > self._max_bytes:
            return False
        self._kept[message_id] = data
        self._bytes += len(data)
        return True

    def read(self, message_id: str) -> bytes | None:
        """A message that is kept."""
        return self._kept.get(message_id)

    def remove(self, message_id: str) -> None:
        """Forget a message."""
        self._bytes -= len(self._kept.pop(message_id, b""))

    def waiting(self) -> list[str]:
        """The ids of all messages that are kept, the oldest first."""
        return list(self._kept)


def kept_key(path: Path) -> Callable[[], bytes]:
    """A key that is made when it is first needed, and kept in a file that only its owner can read."""

    def key() -> bytes:
        try:
            kept = path.read_bytes()
        except FileNotFoundError:
            kept = b""
        if len(kept) == KEY_BYTES:
            return kept
        if kept:
            log.warning("%s held no key: a new one takes its place, and what the old one sealed is lost", path.name)
        fresh = secrets.token_bytes(KEY_BYTES)
        write_secret(path, fresh)
        return fresh

    return key


class DiskSpool:
    """Messages that outlive the process, sealed in files of a folder, ``max_bytes`` of whole blocks.

    ``on_written`` hears of every byte that the flash takes, in the thread that wrote. Nothing is written, not even the
    key, before there is a message to keep.
    """

    def __init__(
        self,
        folder: Path,
        key: Callable[[], bytes],
        max_bytes: int,
        on_written: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._folder = folder
        self._key = key
        self._max_bytes = max_bytes
        self._on_written = on_written
        self._lock = threading.Lock()
        self._cipher: ChaCha20Poly1305 | None = None
        self._sizes: dict[str, int] = self._found()
        self._bytes = sum(self._sizes.values())

    # -- what is called ------------------------------------------------------------------------------------------------

    def put(self, message_id: str, data: bytes) -> bool:
        """Keep a message; False: there is no room for it, or the disk does not take it. Twice is once."""
        if not _ID.fullmatch(message_id):
            log.warning("a message was not kept: its id cannot name a file")
            return False
        with self._lock:
            if message_id in self._sizes:
                return True
            size = _blocks(len(_MAGIC) + _NONCE_BYTES + len(data) + 16)
            if self._bytes + size > self._max_bytes:
                return False
            try:
                self._write(message_id, data)
            except OSError as error:
                log.warning("a message could not be kept on disk: %s", error.strerror)
                return False
            self._sizes[message_id] = size
            self._bytes += size
            self._on_written(size + BLOCK_BYTES)  # and the folder's entry
            return True

    def read(self, message_id: str) -> bytes | None:
        """A message that is kept; None if there is none. One that cannot be read is dropped."""
        with self._lock:
            if message_id not in self._sizes:
                return None
            try:
                sealed = self._path(message_id).read_bytes()
                return self._open(message_id, sealed)
            except OSError as error:
                why = error.strerror
            except (InvalidTag, ValueError):
                why = "it is damaged, or was sealed with another key"
            log.warning("a message that was kept on disk is dropped: %s", why)
            self._drop(message_id)
            return None

    def remove(self, message_id: str) -> None:
        """Forget a message; an unknown one is ignored."""
        with self._lock:
            if message_id in self._sizes:
                self._drop(message_id)

    def waiting(self) -> list[str]:
        """The ids of all messages that are kept, the oldest first."""
        with self._lock:
            return list(self._sizes)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _path(self, message_id: str) -> Path:
        return self._folder / (message_id + _SUFFIX)

    def _found(self) -> dict[str, int]:
        """What an earlier process left here; half a message, or what is none, is cleared away."""
        found: list[tuple[int, str, int]] = []
        try:
            entries = sorted(self._folder.iterdir())
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("what was kept on disk cannot be read: %s", error.strerror)
            return {}
        for path in entries:
            if path.suffix == _SUFFIX and _ID.fullmatch(path.stem) and path.is_file() and not path.is_symlink():
                stat = path.stat()
                found.append((stat.st_mtime_ns, path.stem, _blocks(stat.st_size)))
            elif path.is_symlink() or not path.is_dir():
                if path.suffix != _PART:
                    log.warning("%s is no message of ours and is dropped from the spool", path.name)
                path.unlink(missing_ok=True)
        return {name: size for _, name, size in sorted(found)}

    def _write(self, message_id: str, data: bytes) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = _MAGIC + nonce + self._seal().encrypt(nonce, data, message_id.encode())
        write_secret(self._path(message_id), sealed)
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)  # or the name could be lost with the power
        finally:
            os.close(descriptor)

    def _open(self, message_id: str, sealed: bytes) -> bytes:
        start = len(_MAGIC)
        if sealed[:start] != _MAGIC:
            raise ValueError("not a sealed message")
        nonce, rest = sealed[start : start + _NONCE_BYTES], sealed[start + _NONCE_BYTES :]
        return self._seal().decrypt(nonce, rest, message_id.encode())

    def _seal(self) -> ChaCha20Poly1305:
        if self._cipher is None:
            self._cipher = ChaCha20Poly1305(self._key())
        return self._cipher

    def _drop(self, message_id: str) -> None:
        self._bytes -= self._sizes.pop(message_id)
        try:
            self._path(message_id).unlink(missing_ok=True)
        except OSError as error:
            log.warning("a message that was delivered could not be deleted: %s", error.strerror)
        self._on_written(BLOCK_BYTES)


def _blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
