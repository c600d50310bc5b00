"""Writes the output and error files of a batch whose lines have all ended, from the books, a few megabytes at a time.

Everything it does can be done again: a crash between the files and the books leaves files that nobody names yet, and
the next try writes them anew under the same names. Called by: ``server.loop``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sqlite3
from functools import partial
from typing import BinaryIO, Final

import msgspec
import numpy as np

from motorpool.errors import CallerError
from motorpool.server.cell import Cell, LiveAnswer
from motorpool.server.openai.footprints import with_footprint
from motorpool.server.openai.lines import RESPONSES, custom_id_of, endpoint_of, parse_line
from motorpool.server.openai.responses.lines import response_id_of, told_as_response
from motorpool.store import books
from motorpool.store.blobs import BlobWriter

CHUNK_LINES: Final = 1_000
CHUNK_RESPONSES: Final = 100  # which are told anew, and take longer
CHUNK_BYTES: Final = 2 * 1024 * 1024  # of input, and of answers; a single line may be longer
FILE_LIFE_S: Final = 30 * 24 * 3600  # as OpenAI's: output files are kept for 30 days
UNFINISHED: Final = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed because the batch was cancelled."),
}
INPUT_LOST: Final = {
    "code": "input_file_lost",
    "message": "the bytes of the input file are gone from the file store: upload it and hand the batch in again",
    "param": "input_file_id",
}
_encode = msgspec.json.encode
log = logging.getLogger(__name__)


class OutputFile:
    """One of the two files: nothing is made before its first line."""

    def __init__(self, cell: Cell, name: str) -> None:
        self._cell = cell
        self.name = name
        self._writer: BlobWriter | None = None
        self.file_id: str | None = None
        self.blob = ""
        self.size = 0

    def write(self, lines: list[bytes]) -> None:
        """Append lines."""
        if self._writer is None:
            self._writer = self._cell.blobs.writer()
            self.file_id = f"file-{secrets.token_hex(12)}"
            self.blob = f"{self.name}.jsonl"
        for line in lines:
            self._writer.write(line)

    async def commit(self) -> None:
        """Make the file durable under its name."""
        if self._writer is not None:
            self.size = await asyncio.get_running_loop().run_in_executor(None, self._writer.commit, self.blob)

    def discard(self) -> None:
        """Leave nothing of an unfinished file."""
        if self._writer is not None:
            self._writer.discard()


async def assemble(cell: Cell, batch_no: int) -> None:
    """Write the files, then the final status, and forget what stands in the files; raises what the store raises."""
    if books.is_open(cell.reader, batch_no):
        await _write_files(cell, batch_no)
    # Answers now stand in the customer's file and nowhere else.
    first: int | None = 0
    while first is not None:
        first = await cell.write(partial(books.drop_line_data, batch_no=batch_no, first=first, max_bytes=CHUNK_BYTES))


async def _write_files(cell: Cell, batch_no: int) -> None:
    row = cell.reader.execute("SELECT * FROM batch WHERE batch_no = ?", (batch_no,)).fetchone()
    source = cell.reader.execute("SELECT blob FROM file WHERE file_id = ?", (row["input_file_id"],)).fetchone()
    if source is None or not cell.blobs.exists(source["blob"]):
        now_ms = cell.now_ms()
        await cell.write(lambda db: books.fail_batch(db, batch_no, now_ms, **INPUT_LOST))
        return
    if row["cancelling_ms"] is not None:
        final = "cancelled"
    else:
        final = "completed" if row["completed"] + row["failed"] == row["total"] else "expired"
    output, errors = OutputFile(cell, f"{row['batch_id']}-output"), OutputFile(cell, f"{row['batch_id']}-error")
    try:
        with cell.blobs.open(source["blob"]) as stream:
            await _write_lines(cell, row, final, stream, output=output, errors=errors)
        await output.commit()
        await errors.commit()
    finally:
        output.discard()
        errors.discard()

    def finish(db: sqlite3.Connection) -> None:
        if not books.is_open(db, batch_no):
            return  # the try before this one was committed after all
        now = cell.now_ms()
        for file, name in ((output, "output"), (errors, "errors")):
            if file.file_id is not None:
                life_s = row["output_expires_s"] or FILE_LIFE_S
                db.execute(
                    "INSERT INTO file (file_id, account, purpose, filename, bytes, blob, created_ms, expires_ms)"
                    " VALUES (?, ?, 'batch_output', ?, ?, ?, ?, ?)",
                    (file.file_id, row["account"], f"{row['batch_id']}_{name}.jsonl", file.size, file.blob, now,
                     now + life_s * 1000),
                )  # fmt: skip
        db.execute(
            "UPDATE batch SET output_file_id = ?, error_file_id = ? WHERE batch_no = ?",
            (output.file_id, errors.file_id, batch_no),
        )
        books.set_status(db, batch_no, final, now)

    await cell.write(finish)


async def _write_lines(
    cell: Cell, row: sqlite3.Row, final: str, stream: BinaryIO, *, output: OutputFile, errors: OutputFile
) -> None:
    index = books.read_index(cell.reader, row["batch_no"])
    offsets, lengths = index.offsets, index.lengths
    stem = row["batch_id"].removeprefix("batch_").encode()
    are_responses = endpoint_of(row["endpoint"]) == RESPONSES
    chunk_lines = CHUNK_RESPONSES if are_responses else CHUNK_LINES
    tier = "flex" if books.terms_of(cell.reader, row["batch_no"]).best_effort else "default"
    ends = offsets + lengths
    first = 0
    while first < len(lengths):
        start = int(offsets[first])
        within = int(np.searchsorted(ends[first : first + chunk_lines], start + CHUNK_BYTES, side="right"))
        rows, last = books.results_between(
            cell.reader, row["batch_no"], first, first + max(1, within), max_bytes=CHUNK_BYTES
        )
        data = os.pread(stream.fileno(), int(ends[last - 1]) - start, start)
        finished = {row.line: row for row in rows}
        lines: tuple[list[bytes], list[bytes]] = ([], [])  # of the output and of the error file
        for number in range(first, last):
            at = int(offsets[number]) - start
            source = data[at : at + int(lengths[number])]
            found = finished.get(number)
            if are_responses and found is not None and found.status > 0:
                found = _as_response(row["batch_id"], source, found, tier)
            line, is_error = output_line(stem, number, _encode(custom_id_of(source)), found, final)
            lines[is_error].append(line)
        for file, written in zip((output, errors), lines, strict=True):
            if written:
                file.write(written)
        first = last
        await asyncio.sleep(0)  # let others use the loop between two chunks


def _as_response(batch_id: str, source: bytes, found: books.DoneLine, tier: str) -> books.DoneLine:
    """What a vehicle answered to a line of ``/v1/responses``, as the customer asked for it."""
    answer = LiveAnswer(status=found.status, body=found.body, footprint=found.footprint)
    try:
        body = told_as_response(parse_line(source)[1], answer, response_id_of(batch_id, found.line), tier)
    except CallerError as error:
        # An earlier version took this line. What was answered is paid, and told as it came rather than not at all.
        log.warning("%s: line %d is not taken any more: %s", batch_id, found.line, error.code)
        return found
    return books.DoneLine(found.line, found.status, body)


def output_line(
    stem: bytes, number: int, custom_id: bytes, found: books.DoneLine | None, final: str
) -> tuple[bytes, bool]:
    """One line of the output or (True) of the error file, as OpenAI lays it out."""
    head = b'{"id":"batch_req_%s_%d","custom_id":%s,"response":' % (stem, number, custom_id)
    if found is not None and found.status > 0:
        answer = b'{"status_code":%d,"request_id":"req_%s_%d","body":' % (found.status, stem, number)
        body = with_footprint(found.body, found.footprint)
        return head + answer + body + b'},"error":null}\n', found.status >= 400
    if found is not None:
        return head + b'null,"error":' + found.body + b"}\n", True
    code, message = UNFINISHED.get(final, ("batch_failed", "This request was not executed."))
    return head + b'null,"error":' + _encode({"code": code, "message": message}) + b"}\n", True
