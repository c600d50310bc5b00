"""Keys, files and batches as customers see them: the rows, and every SQL statement that reads or changes them.

Each function takes a connection and is quick; those that write run inside a transaction that the caller opened. Times
are milliseconds since 1970 (UTC). Money and lines are in ``books``.

Called by: ``server.openai``, ``server.loop``, the ``motorpool keys`` command.
"""

from __future__ import annotations

from enum import StrEnum
from sqlite3 import Connection
from typing import Final

import msgspec

from motorpool.errors import CallerError, NotFoundError


class BatchStatus(StrEnum):
    """Where a batch stands; the words are OpenAI's."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class KeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """One API key, without the key itself."""

    key_id: str
    account: str
    name: str
    hash: bytes
    hint: str
    created_ms: int
    revoked_ms: int | None = None


class FileRow(msgspec.Struct, frozen=True, kw_only=True):
    """One file; ``blob`` is its name in the object store."""

    file_id: str
    account: str
    purpose: str
    filename: str
    bytes: int
    blob: str
    created_ms: int
    expires_ms: int | None = None
    deleted_ms: int | None = None


class BatchRow(msgspec.Struct, frozen=True, kw_only=True):
    """One batch. ``metadata`` and ``errors`` are JSON texts; counts and tokens are of finished lines."""

    batch_no: int
    batch_id: str
    account: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str
    created_ms: int
    expires_ms: int
    model: str | None = None
    input_micro: int | None = None
    output_micro: int | None = None
    owner_share_bp: int | None = None
    metadata: str | None = None
    output_expires_s: int | None = None
    errors: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    carried_tokens: int = 0
    cost_micro: int = 0
    energy_uwh: int = 0
    measured_uwh: int = 0
    co2_ug: int = 0
    in_progress_ms: int | None = None
    finalizing_ms: int | None = None
    completed_ms: int | None = None
    failed_ms: int | None = None
    expired_ms: int | None = None
    cancelling_ms: int | None = None
    cancelled_ms: int | None = None


# -- keys --------------------------------------------------------------------------------------------------------------


def insert_key(connection: Connection, row: KeyRow) -> None:
    """Add a key."""
    connection.execute(
        "INSERT INTO api_key (key_id, account, name, hash, hint, created_ms) VALUES (?, ?, ?, ?, ?, ?)",
        (row.key_id, row.account, row.name, row.hash, row.hint, row.created_ms),
    )


def list_keys(connection: Connection) -> list[KeyRow]:
    """Every key, revoked ones too, oldest first."""
    rows = connection.execute("SELECT * FROM api_key ORDER BY created_ms, key_id")
    return [KeyRow(**dict(row)) for row in rows]


def account_of_key(connection: Connection, digest: bytes) -> str | None:
    """The account of a key that is not revoked, by its SHA-256; None if there is none."""
    row = connection.execute("SELECT account FROM api_key WHERE hash = ? AND revoked_ms IS NULL", (digest,)).fetchone()
    return None if row is None else str(row[0])


def revoke_key(connection: Connection, key_id: str, now_ms: int) -> KeyRow:
    """Revoke a key; revoking it again changes nothing. Raises NotFoundError ``key_not_found``."""
    connection.execute("UPDATE api_key SET revoked_ms = ? WHERE key_id = ? AND revoked_ms IS NULL", (now_ms, key_id))
    row = connection.execute("SELECT * FROM api_key WHERE key_id = ?", (key_id,)).fetchone()
    if row is None:
        raise NotFoundError("there is no key with this id: see motorpool keys list", code="key_not_found")
    return KeyRow(**dict(row))


# -- files -------------------------------------------------------------------------------------------------------------


def insert_file(connection: Connection, row: FileRow) -> None:
    """Add a file whose bytes are already in the object store. Repeating it with the same id changes nothing."""
    connection.execute(
        "INSERT INTO file (file_id, account, purpose, filename, bytes, blob, created_ms, expires_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (file_id) DO NOTHING",
        (
            row.file_id,
            row.account,
            row.purpose,
            row.filename,
            row.bytes,
            row.blob,
            row.created_ms,
            row.expires_ms,
        ),
    )


def find_file(connection: Connection, file_id: str) -> FileRow | None:
    """A file by its id, whoever owns it, deleted or not: for the loop and the validation, which hold it for a batch."""
    row = connection.execute("SELECT * FROM file WHERE file_id = ?", (file_id,)).fetchone()
    return None if row is None else FileRow(**dict(row))


def customers_file(connection: Connection, account: str, file_id: str, now_ms: int) -> FileRow:
    """A file that ``account`` may see. Raises NotFoundError ``file_not_found``, also once it is deleted or expired."""
    row = connection.execute(
        "SELECT * FROM file WHERE file_id = ? AND account = ? AND deleted_ms IS NULL"
        " AND (expires_ms IS NULL OR expires_ms > ?)",
        (file_id, account, now_ms),
    ).fetchone()
    if row is None:
        raise NotFoundError("there is no file with this id, or it was deleted or has expired", code="file_not_found")
    return FileRow(**dict(row))


_FILES_NEWEST: Final = (
    "SELECT * FROM file WHERE account = :account AND deleted_ms IS NULL"
    " AND (expires_ms IS NULL OR expires_ms > :now_ms) AND (:purpose IS NULL OR purpose = :purpose)"
    " AND (:after_ms IS NULL OR (created_ms, file_id) < (:after_ms, :after_id))"
    " ORDER BY created_ms DESC, file_id DESC LIMIT :count"
)
_FILES_OLDEST: Final = (
    "SELECT * FROM file WHERE account = :account AND deleted_ms IS NULL"
    " AND (expires_ms IS NULL OR expires_ms > :now_ms) AND (:purpose IS NULL OR purpose = :purpose)"
    " AND (:after_ms IS NULL OR (created_ms, file_id) > (:after_ms, :after_id))"
    " ORDER BY created_ms, file_id LIMIT :count"
)


def list_files(
    connection: Connection,
    account: str,
    *,
    now_ms: int,
    limit: int,
    after: str | None = None,
    purpose: str | None = None,
    newest_first: bool = True,
) -> tuple[list[FileRow], bool]:
    """One page of files and whether more follow. Raises CallerError when ``after`` is no file of this account."""
    after_ms = _place(
        connection, "SELECT created_ms FROM file WHERE file_id = ? AND account = ?", (after, account), after
    )
    values = {
        "account": account,
        "now_ms": now_ms,
        "purpose": purpose,
        "after_ms": after_ms,
        "after_id": after,
        "count": limit + 1,
    }
    rows = connection.execute(_FILES_NEWEST if newest_first else _FILES_OLDEST, values).fetchall()
    return [FileRow(**dict(row)) for row in rows[:limit]], len(rows) > limit


def file_in_use(connection: Connection, file_id: str) -> bool:
    """Whether a batch that has not ended reads this file."""
    found = connection.execute(
        "SELECT 1 FROM batch WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
        " AND input_file_id = ? LIMIT 1",
        (file_id,),
    ).fetchone()
    return found is not None


def delete_file(connection: Connection, file_id: str, now_ms: int) -> None:
    """Mark a file as deleted; its bytes may be removed once this is committed."""
    connection.execute("UPDATE file SET deleted_ms = ? WHERE file_id = ? AND deleted_ms IS NULL", (now_ms, file_id))


def expired_files(connection: Connection, now_ms: int, limit: int) -> list[FileRow]:
    """Files whose time is over and that no open batch reads, those that expired first first."""
    rows = connection.execute(
        "SELECT * FROM file WHERE deleted_ms IS NULL AND expires_ms IS NOT NULL AND expires_ms <= ?"
        " AND NOT EXISTS (SELECT 1 FROM batch WHERE input_file_id = file.file_id"
        " AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling'))"
        " ORDER BY expires_ms LIMIT ?",
        (now_ms, limit),
    )
    return [FileRow(**dict(row)) for row in rows]


def live_blobs(connection: Connection) -> set[str]:
    """The names in the object store that belong to a file."""
    return {str(row[0]) for row in connection.execute("SELECT blob FROM file WHERE deleted_ms IS NULL")}


# -- batches -----------------------------------------------------------------------------------------------------------


def insert_batch(connection: Connection, row: BatchRow) -> BatchRow:
    """Add a batch in ``validating``; ``row.batch_no`` is replaced by the next free number in what is returned."""
    batch_no = int(connection.execute("SELECT coalesce(max(batch_no), 0) + 1 FROM batch").fetchone()[0])
    connection.execute(
        "INSERT INTO batch (batch_no, batch_id, account, endpoint, input_file_id, completion_window, status, metadata,"
        " output_expires_s, created_ms, expires_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            batch_no,
            row.batch_id,
            row.account,
            row.endpoint,
            row.input_file_id,
            row.completion_window,
            row.status,
            row.metadata,
            row.output_expires_s,
            row.created_ms,
            row.expires_ms,
        ),
    )
    return msgspec.structs.replace(row, batch_no=batch_no)


def find_batch(connection: Connection, batch_no: int) -> BatchRow | None:
    """A batch by its number."""
    row = connection.execute("SELECT * FROM batch WHERE batch_no = ?", (batch_no,)).fetchone()
    return None if row is None else BatchRow(**dict(row))


def customers_batch(connection: Connection, account: str, batch_id: str) -> BatchRow:
    """A batch that ``account`` may see. Raises NotFoundError ``batch_not_found``."""
    row = connection.execute("SELECT * FROM batch WHERE batch_id = ? AND account = ?", (batch_id, account)).fetchone()
    if row is None:
        raise NotFoundError("there is no batch with this id", code="batch_not_found")
    return BatchRow(**dict(row))


def list_batches(
    connection: Connection, account: str, *, limit: int, after: str | None = None
) -> tuple[list[BatchRow], bool]:
    """One page of batches, newest first, and whether more follow. Raises CallerError when ``after`` is unknown."""
    after_ms = _place(
        connection, "SELECT created_ms FROM batch WHERE batch_id = ? AND account = ?", (after, account), after
    )
    rows = connection.execute(
        "SELECT * FROM batch WHERE account = :account"
        " AND (:after_ms IS NULL OR (created_ms, batch_id) < (:after_ms, :after_id))"
        " ORDER BY created_ms DESC, batch_id DESC LIMIT :count",
        {"account": account, "after_ms": after_ms, "after_id": after, "count": limit + 1},
    ).fetchall()
    return [BatchRow(**dict(row)) for row in rows[:limit]], len(rows) > limit


def validating_batches(connection: Connection) -> list[BatchRow]:
    """Every batch whose input file is still to be checked, oldest first."""
    rows = connection.execute("SELECT * FROM batch WHERE status = 'validating' ORDER BY batch_no")
    return [BatchRow(**dict(row)) for row in rows]


def fail_validation(connection: Connection, batch_no: int, errors: str, now_ms: int) -> bool:
    """``validating`` to ``failed`` with a JSON array of errors; False if the batch was no longer validating."""
    changed = connection.execute(
        "UPDATE batch SET status = 'failed', errors = ?, failed_ms = ? WHERE batch_no = ? AND status = 'validating'",
        (errors, now_ms, batch_no),
    )
    return changed.rowcount == 1


def cancel_validation(connection: Connection, batch_no: int, now_ms: int) -> bool:
    """``validating`` to ``cancelled``, no line having run; False if the batch was no longer validating."""
    changed = connection.execute(
        "UPDATE batch SET status = 'cancelled', cancelling_ms = ?, cancelled_ms = ?"
        " WHERE batch_no = ? AND status = 'validating'",
        (now_ms, now_ms, batch_no),
    )
    return changed.rowcount == 1


def _place(connection: Connection, query: str, values: tuple[str | None, str], after: str | None) -> int | None:
    """When the row that a page follows was made."""
    if after is None:
        return None
    row = connection.execute(query, values).fetchone()
    if row is None:
        raise CallerError("after must be the id of an object in this list", code="invalid_value", param="after")
    return int(row[0])
