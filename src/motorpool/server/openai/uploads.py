"""Reads a multipart upload as it arrives: small fields to memory, the file straight to disk.

Fields may come in any order. Nothing is kept of an upload that fails, breaks off or is over its limit. A customer's
file name is kept to be shown again; it never becomes a path.

Called by: ``files``. Must not: know which purposes or expiries are allowed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from motorpool.errors import CallerError, TooLargeError
from motorpool.server.openai.exchange import Exchange, MediaTypeError
from motorpool.store.blobs import BlobStore, BlobWriter

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FLUSH_BYTES: Final = 1024 * 1024  # how much of a file is gathered in memory before it is written
MAX_FIELDS: Final = 32
MAX_FIELD_BYTES: Final = 4096
MAX_FILENAME_CHARS: Final = 255
MAX_FORM_OVERHEAD_BYTES: Final = 256 * 1024  # what a request may be longer than its file
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Upload:
    """One multipart body. After ``read``: ``fields``, ``filename`` and the file's bytes in ``writer``.

    ``limit`` says how large the file may be, given the fields that have come so far; it may raise a CallerError to end
    the upload early.
    """

    def __init__(self, exchange: Exchange, blobs: BlobStore, limit: Callable[[dict[str, str]], int]) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.writer: BlobWriter | None = None
        self.ended = False
        self._exchange = exchange
        self._blobs = blobs
        self._limit = limit
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._field: str | None = None
        self._value = bytearray()
        self._in_file = False
        self._parts = 0

    async def read(self) -> BlobWriter:
        """Read the body to its end; return the writer, to be committed. Raises CallerError, TooLargeError, StoreError.

        The caller discards the writer when anything goes wrong.
        """
        parser = MultipartParser(self._boundary(), self._callbacks())
        read_bytes = 0
        while (piece := await self._exchange.chunk()) is not None:
            # All of the body counts: what stands before, between and behind the fields is read and kept by nobody.
            read_bytes += len(piece)
            limit = self._limit(self.fields)
            if read_bytes > limit + MAX_FORM_OVERHEAD_BYTES:
                raise _too_large(limit)
            if self.ended:
                continue  # the parser would log every piece that comes behind the form
            try:
                parser.write(piece)
            except MultipartParseError:
                raise CallerError("the multipart body is malformed", code="invalid_multipart") from None
            if self._pending_bytes >= FLUSH_BYTES:
                await self._flush()
        if not self.ended:
            raise CallerError("the multipart body ends before its closing boundary", code="invalid_multipart")
        if self.writer is None:
            raise CallerError("file is missing", code="missing_required_parameter", param="file")
        await self._flush()
        return self.writer

    def _boundary(self) -> bytes:
        kind, options = parse_options_header(self._exchange.header(b"content-type"))
        if kind != b"multipart/form-data":
            raise MediaTypeError("send the file as multipart/form-data")
        boundary = options.get(b"boundary", b"")
        if not 1 <= len(boundary) <= 256:
            raise CallerError("the content-type names no boundary", code="invalid_multipart")
        return boundary

    def _callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_text,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    # -- what the parser calls

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise CallerError(f"the form has more than {MAX_FIELDS} fields", code="invalid_multipart")
        self._headers = {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_text(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self._in_file = name == "file"
        if not self._in_file:
            self._field = name
            self._value = bytearray()
            return
        if self.writer is not None:
            raise CallerError("file was sent twice", code="invalid_value", param="file")
        self.filename = shown_name(options.get(b"filename", b"").decode("utf-8", "replace"))
        self.writer = self._blobs.writer()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            assert self.writer is not None
            self._pending.append(data[start:end] if end - start < len(data) else data)
            self._pending_bytes += end - start
            self._check_size()
        else:
            if len(self._value) + end - start > MAX_FIELD_BYTES:
                raise TooLargeError(
                    f"a field of the form is over the limit of {MAX_FIELD_BYTES} bytes", code="field_too_large"
                )
            self._value += data[start:end]

    def _part_end(self) -> None:
        if not self._in_file and self._field is not None:
            self.fields[self._field] = self._value.decode("utf-8", "replace")
            self._check_size()

    def _end(self) -> None:
        self.ended = True

    def _check_size(self) -> None:
        limit = self._limit(self.fields)
        if self.writer is not None and self.writer.written + self._pending_bytes > limit:
            raise _too_large(limit)

    async def _flush(self) -> None:
        if self._pending and self.writer is not None:
            pieces, self._pending, self._pending_bytes = self._pending, [], 0
            await asyncio.to_thread(_write_all, self.writer, pieces)


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(
        f"the file is over the limit of {limit} bytes for this purpose", code="file_too_large", param="file"
    )


def _write_all(writer: BlobWriter, pieces: list[bytes]) -> None:
    for piece in pieces:
        writer.write(piece)


def shown_name(filename: str) -> str:
    """A customer's file name as it is shown again: its last part, without control characters, not too long."""
    name = _CONTROL.sub("", filename.replace("\\", "/").rsplit("/", 1)[-1]).strip()
    return name[:MAX_FILENAME_CHARS] or "upload"
