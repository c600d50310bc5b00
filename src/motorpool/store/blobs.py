"""The bytes of files, in one local folder: written under a temporary name, made durable, then renamed into place.

A name exists if and only if its bytes are complete and on disk; a crash leaves at most a file in ``tmp/``, which
``sweep`` removes. Names come from us, never from a customer's file name.

Called by: ``server.openai`` (uploads, downloads, validation) and ``server.loop`` (input lines, output files), which
move slow calls to a thread. Must not: know who a file belongs to.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from motorpool.errors import StorageFullError, StoreError, TooLargeError

BUFFER_BYTES: Final = 256 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}(\.[a-z]{1,8})?")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

Opener = Callable[[str, int], int]


def open_private(path: str, flags: int) -> int:
    """Open a file that only this user may read; the default opener."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _translate(error: OSError) -> StoreError | StorageFullError:
    if error.errno in _FULL:
        return StorageFullError("the disk that holds the files is full: free some space, then try again")
    return StoreError(f"the file store failed: {os.strerror(error.errno) if error.errno else 'unknown error'}")


class BlobWriter:
    """One file on its way into the store. Use it as a context manager: without ``commit`` nothing is left behind.

    Raises TooLargeError past ``limit_bytes``, StorageFullError when the disk is full, StoreError for other failures.
    """

    def __init__(self, root: Path, opener: Opener, limit_bytes: int | None) -> None:
        self.written = 0
        self.limit_bytes = limit_bytes
        self._root = root
        self._path = root / "tmp" / secrets.token_hex(16)
        self._stream: BinaryIO | None = None
        try:
            fd = opener(str(self._path), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            self._stream = os.fdopen(fd, "wb", buffering=BUFFER_BYTES)
        except OSError as error:
            self.discard()
            raise _translate(error) from error

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``; on any error the temporary file is removed."""
        assert self._stream is not None, "write after commit or discard"
        self.written += len(data)
        if self.limit_bytes is not None and self.written > self.limit_bytes:
            self.discard()
            raise TooLargeError(f"the file is over the limit of {self.limit_bytes} bytes", code="file_too_large")
        try:
            self._stream.write(data)
        except OSError as error:
            self.discard()
            raise _translate(error) from error

    def commit(self, name: str) -> int:
        """Make the bytes durable under ``name``, replacing what was there; return how many they are."""
        assert self._stream is not None, "commit after commit or discard"
        target = self._root / _checked(name)
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None
            self._path.replace(target)
            _sync_folder(self._root)
        except OSError as error:
            self.discard()
            raise _translate(error) from error
        return self.written

    def discard(self) -> None:
        """Forget everything written so far. Does nothing after ``commit``."""
        stream, self._stream = self._stream, None
        if stream is not None:
            # Closing flushes what is buffered; on a full disk that fails again, and the bytes are unwanted anyway.
            with suppress(OSError):
                stream.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


class BlobStore:
    """Named, immutable byte strings in ``root``. ``opener`` opens files for writing, as in the built-in ``open``."""

    def __init__(self, root: Path, opener: Opener = open_private) -> None:
        self.root = root
        self._opener = opener
        try:
            (root / "tmp").mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise _translate(error) from error

    def writer(self, limit_bytes: int | None = None) -> BlobWriter:
        """Begin a new file of at most ``limit_bytes``; nothing is visible before its ``commit``."""
        return BlobWriter(self.root, self._opener, limit_bytes)

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; it stays readable when it is deleted meanwhile. Raises StoreError if missing."""
        try:
            return (self.root / _checked(name)).open("rb", buffering=0)
        except OSError as error:
            raise _translate(error) from error

    def map(self, name: str) -> mmap.mmap:
        """Map a file that is not empty into memory, for reading lines by offset. Close it when done."""
        with self.open(name) as stream:
            try:
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise StoreError("the file store failed: an empty or unreadable file cannot be mapped") from error

    def exists(self, name: str) -> bool:
        """Whether ``name`` is in the store."""
        return (self.root / _checked(name)).exists()

    def delete(self, name: str) -> None:
        """Remove a file; a missing one is fine, so that a repeated deletion changes nothing."""
        try:
            (self.root / _checked(name)).unlink(missing_ok=True)
        except OSError as error:
            raise _translate(error) from error

    def sweep(self, known: set[str]) -> int:
        """Remove what a crash left: unfinished files and names not in ``known``. Only before anything is written."""
        removed = 0
        try:
            for path in sorted((self.root / "tmp").iterdir()):
                path.unlink()
                removed += 1
            for path in sorted(self.root.iterdir()):
                if path.is_file() and path.name not in known:
                    path.unlink()
                    removed += 1
        except OSError as error:
            raise _translate(error) from error
        return removed


def _checked(name: str) -> str:
    assert _NAME.fullmatch(name), "names of files in the store are made by us"
    return name


def _sync_folder(path: Path) -> None:
    # A rename is durable only when the folder that holds the names is.
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
