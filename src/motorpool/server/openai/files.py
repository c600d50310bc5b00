"""Files: uploaded, listed, shown, downloaded, deleted, and removed when their time is over.

Called by: ``app`` for the routes; ``server.main`` calls ``expire_files`` now and then and ``sweep_blobs`` at start.
Must not: hold a file in memory, or read one that belongs to another account.
"""

from __future__ import annotations

import asyncio
import secrets
from sqlite3 import Connection
from typing import Final, Literal
from urllib.parse import quote

import msgspec

from motorpool.errors import CallerError, ConflictError
from motorpool.server.cell import Cell
from motorpool.server.openai.decoding import whole_number
from motorpool.server.openai.exchange import Attendance, Exchange
from motorpool.server.openai.settings import DAY_S, MAX_EXPIRY_S, MAX_FILES_PAGE, MIN_EXPIRY_S, ApiSettings
from motorpool.server.openai.uploads import MAX_FORM_OVERHEAD_BYTES, Upload
from motorpool.store import customer
from motorpool.store.customer import FileRow

PURPOSES: Final = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
DOWNLOAD_BYTES: Final = 256 * 1024
MAX_EXPIRED_AT_ONCE: Final = 500


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file as a customer sees it; times in seconds since 1970 (UTC)."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


def file_object(row: FileRow) -> FileObject:
    """The customer's view of a row."""
    return FileObject(
        id=row.file_id,
        bytes=row.bytes,
        created_at=row.created_ms // 1000,
        expires_at=None if row.expires_ms is None else row.expires_ms // 1000,
        filename=row.filename,
        purpose=row.purpose,
    )


class FileRoutes:
    """The routes under /v1/files."""

    def __init__(self, cell: Cell, settings: ApiSettings) -> None:
        self._cell = cell
        self._settings = settings

    async def upload(self, exchange: Exchange, _: str) -> None:
        """POST /v1/files."""
        exchange.refuse_length_over(
            self._limit({}), "the file", "file_too_large", param="file", overhead_bytes=MAX_FORM_OVERHEAD_BYTES
        )
        upload = Upload(exchange, self._cell.blobs, self._limit)
        try:
            writer = await upload.read()
            purpose = self._purpose(upload.fields)
            now_ms = self._cell.now_ms()
            expires_ms = self._expires_ms(upload.fields, purpose, now_ms)
            file_id = "file-" + secrets.token_hex(12)
            size = await asyncio.to_thread(writer.commit, file_id)
        finally:
            if upload.writer is not None:
                upload.writer.discard()
        row = FileRow(
            file_id=file_id,
            account=exchange.account,
            purpose=purpose,
            filename=upload.filename or "upload",
            bytes=size,
            blob=file_id,
            created_ms=now_ms,
            expires_ms=expires_ms,
        )
        try:
            await self._cell.write(lambda connection: customer.insert_file(connection, row))
        except Exception:
            # Without its row nobody could ever ask for these bytes. (When cancelled, the row may yet be committed.)
            self._cell.blobs.delete(file_id)
            raise
        await exchange.answer_object(file_object(row))

    def _limit(self, fields: dict[str, str]) -> int:
        """How large the file may be as far as is known yet."""
        if "purpose" not in fields:
            return max(self._settings.max_file_bytes, self._settings.max_batch_bytes)
        purpose = self._purpose(fields)
        return self._settings.max_batch_bytes if purpose == "batch" else self._settings.max_file_bytes

    @staticmethod
    def _purpose(fields: dict[str, str]) -> str:
        purpose = fields.get("purpose")
        if purpose is None:
            raise CallerError("purpose is missing", code="missing_required_parameter", param="purpose")
        if purpose not in PURPOSES:
            raise CallerError(f"purpose must be one of {', '.join(PURPOSES)}", code="invalid_value", param="purpose")
        return purpose

    def _expires_ms(self, fields: dict[str, str], purpose: str, now_ms: int) -> int | None:
        seconds = fields.get("expires_after[seconds]")
        anchor = fields.get("expires_after[anchor]")
        if seconds is None and anchor is None:
            return now_ms + self._settings.batch_file_days * DAY_S * 1000 if purpose == "batch" else None
        if anchor != "created_at":
            raise CallerError(
                "expires_after.anchor must be created_at", code="invalid_value", param="expires_after.anchor"
            )
        kept_s = None if seconds is None else whole_number(seconds, MIN_EXPIRY_S, MAX_EXPIRY_S)
        if kept_s is None:
            raise CallerError(
                f"expires_after.seconds must be {MIN_EXPIRY_S} to {MAX_EXPIRY_S}",
                code="invalid_value",
                param="expires_after.seconds",
            )
        return now_ms + kept_s * 1000

    async def page(self, exchange: Exchange, _: str) -> None:
        """GET /v1/files."""
        query = exchange.query()
        order = query.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise CallerError("order must be asc or desc", code="invalid_value", param="order")
        rows, more = customer.list_files(
            self._cell.reader,
            exchange.account,
            now_ms=self._cell.now_ms(),
            limit=page_limit(query, MAX_FILES_PAGE, MAX_FILES_PAGE),
            after=query.get("after"),
            purpose=query.get("purpose"),
            newest_first=order == "desc",
        )
        data = [file_object(row) for row in rows]
        await exchange.answer_object(
            FileList(
                data=data,
                first_id=data[0].id if data else None,
                last_id=data[-1].id if data else None,
                has_more=more,
            )
        )

    async def show(self, exchange: Exchange, file_id: str) -> None:
        """GET /v1/files/{file_id}."""
        await exchange.answer_object(file_object(self._row(exchange, file_id)))

    async def delete(self, exchange: Exchange, file_id: str) -> None:
        """DELETE /v1/files/{file_id}; a batch that has not ended keeps its input file."""
        now_ms = self._cell.now_ms()

        def change(connection: Connection) -> FileRow:
            row = customer.customers_file(connection, exchange.account, file_id, now_ms)
            if customer.file_in_use(connection, file_id):
                raise ConflictError(
                    "a batch that has not ended reads this file: cancel the batch or wait for its end",
                    code="file_in_use",
                )
            customer.delete_file(connection, file_id, now_ms)
            return row

        row = await self._cell.write(change)
        await asyncio.to_thread(self._cell.blobs.delete, row.blob)
        await exchange.answer_object(Deleted(id=file_id))

    async def content(self, exchange: Exchange, file_id: str) -> None:
        """GET /v1/files/{file_id}/content."""
        row = self._row(exchange, file_id)
        stream = await asyncio.to_thread(self._cell.blobs.open, row.blob)
        try:
            await exchange.start(
                200,
                b"application/octet-stream",
                (
                    (b"content-length", b"%d" % row.bytes),
                    (b"content-disposition", b"attachment; filename*=UTF-8''" + quote(row.filename, safe="").encode()),
                    (b"x-content-type-options", b"nosniff"),
                ),
            )
            left = row.bytes
            async with Attendance(exchange):
                while left > 0:
                    piece = await asyncio.to_thread(stream.read, min(DOWNLOAD_BYTES, left))
                    if not piece:
                        # Shorter than its row says: ending now breaks the connection, so that the client notices.
                        return
                    left -= len(piece)
                    await exchange.send(piece, more=True)
            await exchange.send(b"", more=False)
        finally:
            stream.close()

    def _row(self, exchange: Exchange, file_id: str) -> FileRow:
        return customer.customers_file(self._cell.reader, exchange.account, file_id, self._cell.now_ms())


def page_limit(query: dict[str, str], default: int, maximum: int) -> int:
    """The ``limit`` of a list; raises CallerError outside 1 to ``maximum``."""
    text = query.get("limit")
    if text is None:
        return default
    limit = whole_number(text, 1, maximum)
    if limit is None:
        raise CallerError(f"limit must be 1 to {maximum}", code="invalid_value", param="limit")
    return limit


async def expire_files(cell: Cell) -> int:
    """Remove files whose time is over, at most 500 in one call; return how many. Open batches keep their input."""
    now_ms = cell.now_ms()
    if not customer.expired_files(cell.reader, now_ms, 1):
        return 0

    def change(connection: Connection) -> list[FileRow]:
        rows = customer.expired_files(connection, now_ms, MAX_EXPIRED_AT_ONCE)
        for row in rows:
            customer.delete_file(connection, row.file_id, now_ms)
        return rows

    rows = await cell.write(change)
    for row in rows:
        await asyncio.to_thread(cell.blobs.delete, row.blob)
    return len(rows)


def sweep_blobs(cell: Cell) -> int:
    """Remove bytes that a crash left without a row; return how many. Once, before anything is served or written."""
    return cell.blobs.sweep(customer.live_blobs(cell.reader))
