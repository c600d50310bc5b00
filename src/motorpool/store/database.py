"""Opens the SQLite database of a cell, applies its schema, and hands out one writing and one reading connection.

WAL mode lets the API read while the loop commits. Only the loop writes, one transaction at a time; the reading
connection sees what is committed and nothing else. ``synchronous=FULL`` makes a commit survive a power cut.

Called by: ``server.loop`` and the commands that work on a stopped or running cell's books (``motorpool keys``).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from importlib import resources
from pathlib import Path
from typing import Final

from motorpool.errors import StorageFullError, StoreError

SCHEMA_VERSION: Final = 6
# What leads to version 1, 2, ...
SCHEMA_FILES: Final = ("schema.sql", *(f"schema_{version}.sql" for version in range(2, SCHEMA_VERSION + 1)))
BUSY_TIMEOUT_MS: Final = 5000


class Database:
    """The books of one cell in one SQLite file.

    ``writer`` never begins a transaction by itself (``isolation_level=None``): whoever writes says BEGIN IMMEDIATE and
    COMMIT. Raises StoreError when the file cannot be opened or was written by a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.writer = self._open()
            self._migrate()
            self.reader = self._open()
            self.reader.execute("PRAGMA query_only = ON")
        except sqlite3.Error as error:
            raise translate(error, path) from error
        except OSError as error:
            raise StoreError(f"{path} cannot be made: {error.strerror}") from error

    def _open(self) -> sqlite3.Connection:
        # SQLite gives its other files the mode of this one, and all of them hold what customers asked and got.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        # The commit runs in another thread while the loop waits for it: never two threads at once.
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_MS / 1000
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA cache_size = -16000")
        return connection

    def _migrate(self) -> None:
        self.writer.execute("BEGIN IMMEDIATE")
        version = int(self.writer.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            self.writer.execute("ROLLBACK")
            raise StoreError(
                f"{self.path.name} was written by a newer Motorpool (schema {version}, not {SCHEMA_VERSION}): "
                "install that version or use another data folder"
            )
        for name in SCHEMA_FILES[version:]:
            for statement in statements(resources.files(__package__).joinpath(name).read_text("utf-8")):
                self.writer.execute(statement)
        self.writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self.writer.execute("COMMIT")

    def close(self) -> None:
        """Close both connections; an open transaction is rolled back."""
        self.reader.close()
        self.writer.close()


def statements(script: str) -> list[str]:
    """Split an SQL script into its statements, so that they run inside one transaction."""
    found: list[str] = []
    pending = ""
    for line in script.splitlines():
        pending += line + "\n"
        if sqlite3.complete_statement(pending):
            found.append(pending)
            pending = ""
    return found


def translate(error: sqlite3.Error, path: Path) -> StoreError | StorageFullError:
    """SQLite's error in our words: a full disk is the operator's to mend, the rest is ours."""
    code = getattr(error, "sqlite_errorname", "") or ""
    if code.startswith("SQLITE_FULL"):
        return StorageFullError(f"the disk of {path.name} is full: free some space, then try again")
    return StoreError(f"the database {path.name} failed: {error}")
