"""Checks the input files of new batches in the background, a little at a time, so that live requests are not held up.

A batch is in ``validating`` from its creation until here it is found good and handed to the cell, found wrong and
``failed`` with the lines at fault, or cancelled. A crash leaves it in ``validating``: ``resume`` begins again.

Called by: ``batches`` and ``app``. Must not: hold a file in memory; it keeps 16 bytes a line and a digest of each
custom_id.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from array import array
from hashlib import blake2b
from typing import Final

import msgspec
import numpy as np

from motorpool.catalogue import Catalogue
from motorpool.errors import CallerError, MotorpoolError, NotFoundError
from motorpool.server.cell import Cell, ValidBatch
from motorpool.server.openai.embeddings import EmbeddingRequest, check_line_size, check_model
from motorpool.server.openai.lines import (
    LINE_OVERHEAD_BYTES,
    RESPONSES,
    Asked,
    Endpoint,
    check_line,
    endpoint_of,
    inside,
    kind_of,
    too_large,
)
from motorpool.server.openai.responses.request import CreateRequest
from motorpool.server.openai.settings import ApiSettings
from motorpool.store import customer
from motorpool.store.blobs import BlobStore
from motorpool.store.customer import BatchRow

READ_BYTES: Final = 128 * 1024
LINES_A_TURN: Final = 500
RESPONSES_A_TURN: Final = 100  # each takes six times as long
MAX_BLANK_LINES: Final = 1000
_BOM: Final = b"\xef\xbb\xbf"
_log = logging.getLogger(__name__)
FAIL_WAIT_S: Final = 1.0
MAX_FAIL_WAIT_S: Final = 60.0


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """One thing wrong with a batch file; ``line`` counts from 1, None if it is about the whole file."""

    code: str
    message: str
    param: str | None
    line: int | None


class Inspection:
    """The check of one file, line by line; pure, except that it remembers.

    ``done`` is true once nothing that follows can matter: too many errors, or too many lines. ``longest`` is how many
    bytes a line may have to be looked at, ``lines_a_turn`` how many lines are looked at before others have their turn.
    """

    def __init__(self, endpoint: Endpoint, catalogue: Catalogue, settings: ApiSettings) -> None:
        self.errors: list[LineError] = []
        self.done = False
        self.model: str | None = None
        self.offsets = array("Q")
        self.lengths = array("I")
        self.limits = array("I")
        self._context_tokens = 0
        self._endpoint = endpoint
        self._catalogue = catalogue
        self._settings = settings
        self._seen: dict[bytes, int] = {}
        self._number = 0
        self._offset = 0
        self._first_blank = 0
        self.longest = settings.max_body_bytes + LINE_OVERHEAD_BYTES
        self.lines_a_turn = RESPONSES_A_TURN if endpoint == RESPONSES else LINES_A_TURN

    def line(self, data: bytes) -> None:
        """Check the next line, given without its line feed."""
        self._number += 1
        offset = self._offset
        self._offset += len(data) + 1
        if self._number == 1 and data.startswith(_BOM):
            data = data[len(_BOM) :]
            offset += len(_BOM)
        if not data or data.isspace():
            self._blank()
            return
        self._count()
        if self.done:
            return
        try:
            if len(data) > self.longest:
                raise too_large(self._settings.max_body_bytes)
            custom_id, request = check_line(self._endpoint, data, self._settings.max_body_bytes)
            self._check_model(request.model)
            if isinstance(request, EmbeddingRequest):
                self._check_embedding(request)
            self._check_unique(custom_id)
            self.limits.append(self._limit(request))
        except CallerError as error:
            self._note(error.code, error.message, error.param, self._number)
        self.offsets.append(offset)
        self.lengths.append(len(data))

    def _limit(self, request: Asked) -> int:
        """How many tokens the answer may have over all choices: no vehicle is paid for more."""
        if isinstance(request, EmbeddingRequest):
            return 0
        if isinstance(request, CreateRequest):
            return min(request.max_output_tokens or self._context_tokens, self._context_tokens)
        return min(request.limit_tokens or self._context_tokens, self._context_tokens) * request.choices

    def oversized(self, length: int) -> None:
        """The next line is ``length`` bytes long, too many to be looked at."""
        self._number += 1
        self._offset += length + 1
        self._count()
        error = too_large(self._settings.max_body_bytes)
        self._note(error.code, error.message, error.param, self._number)

    def end(self) -> None:
        """The file ends here. Blank lines at the end are allowed."""
        if not self.errors and not self.offsets:
            self._note("empty_file", "the file has no lines: write one JSON object a line", None, None)

    def _blank(self) -> None:
        if not self._first_blank:
            self._first_blank = self._number
        if self._number - self._first_blank >= MAX_BLANK_LINES:
            self._note("blank_line", f"more than {MAX_BLANK_LINES} blank lines", None, self._first_blank)
            self.done = True

    def _count(self) -> None:
        if self._first_blank:
            self._note("blank_line", "a blank line is allowed only at the end of the file", None, self._first_blank)
            self._first_blank = 0
        if len(self.offsets) >= self._settings.max_batch_lines:
            self.done = True
            self._note(
                "too_many_lines",
                f"the file has more than {self._settings.max_batch_lines} lines: split it",
                None,
                self._number,
            )

    def _check_model(self, model: str) -> None:
        if model == self.model:
            return
        if self.model is not None:
            raise CallerError(
                "all lines of a file must name the same model", code="mismatched_model", param="body.model"
            )
        self.model = model
        try:
            self._context_tokens = self._catalogue.get(model).context_tokens
        except NotFoundError as error:
            raise CallerError(error.message, code=error.code, param="body.model") from None

    def _check_embedding(self, request: EmbeddingRequest) -> None:
        model = self._catalogue.models.get(request.model)
        if model is None:
            return  # told on the first line
        try:
            check_model(request, model)
        except CallerError as error:
            raise inside(error) from None
        check_line_size(request, model)

    def _check_unique(self, custom_id: str) -> None:
        # 128 bits of digest: two different ids meet less often than the memory holding them fails.
        digest = blake2b(custom_id.encode(), digest_size=16).digest()
        earlier = self._seen.setdefault(digest, self._number)
        if earlier != self._number:
            raise CallerError(
                f"custom_id is already used on line {earlier}", code="duplicate_custom_id", param="custom_id"
            )

    def _note(self, code: str, message: str, param: str | None, line: int | None) -> None:
        self.errors.append(LineError(code=code, message=message, param=param, line=line))
        if len(self.errors) >= self._settings.max_batch_errors:
            self.done = True


async def inspect(blobs: BlobStore, blob: str, inspection: Inspection) -> None:
    """Run a stored file through ``inspection``, giving way to others every few milliseconds. Raises StoreError."""
    stream = blobs.open(blob)  # not in a thread: whoever is cancelled meanwhile would leave the file open
    try:
        rest = b""
        skipped = 0  # bytes of a line that is too long, whose end has not come yet
        while chunk := await asyncio.to_thread(stream.read, READ_BYTES):
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            if skipped and lines:
                inspection.oversized(skipped + len(lines.pop(0)))
                skipped = 0
            for start in range(0, len(lines), inspection.lines_a_turn):
                for line in lines[start : start + inspection.lines_a_turn]:
                    inspection.line(line)
                    if inspection.done:
                        return
                await asyncio.sleep(0)
            if skipped or len(rest) > inspection.longest:
                skipped += len(rest)
                rest = b""
        if skipped:
            inspection.oversized(skipped)
        elif rest:
            inspection.line(rest)
        inspection.end()
    finally:
        stream.close()


class _Check(msgspec.Struct, kw_only=True):
    """One batch that is being checked. Once ``handing_over``, it is the cell's and can no longer be stopped here."""

    batch: BatchRow
    task: asyncio.Task[None]
    handing_over: bool = False


class Validation:
    """The batches that are being checked, one file at a time."""

    def __init__(self, cell: Cell, settings: ApiSettings) -> None:
        self._cell = cell
        self._settings = settings
        self._checks: dict[int, _Check] = {}
        self.turn = asyncio.Semaphore(1)

    @property
    def under_way(self) -> int:
        """How many batches are being checked, or wait for it."""
        return len(self._checks)

    def begin(self, batch: BatchRow) -> None:
        """Check a batch in the background; one that is being checked already goes on."""
        if batch.batch_no not in self._checks:
            task = asyncio.create_task(self._run(batch))
            self._checks[batch.batch_no] = _Check(batch=batch, task=task)
            # Not at the end of ``_run``, which never begins if it is cancelled before its first turn.
            task.add_done_callback(lambda _: self._checks.pop(batch.batch_no, None))

    def resume(self) -> int:
        """Begin again with the batches that a stop left in ``validating``; return how many."""
        left = customer.validating_batches(self._cell.reader)
        for row in left:
            self.begin(row)
        return len(left)

    async def cancel(self, batch_no: int) -> bool:
        """Cancel a batch while it is validating; False when it is no longer, and is for the cell to cancel.

        One that is being handed over may wait long for room on a full disk, so nobody waits for that here: the two
        transactions come one after the other, and the later one finds that it came too late.
        """
        check = self._checks.get(batch_no)
        stopped = check if check is not None and not check.handing_over else None
        if stopped is not None:
            stopped.task.cancel()
            await asyncio.wait([stopped.task])
        now_ms = self._cell.now_ms()
        try:
            return await self._cell.write(lambda connection: customer.cancel_validation(connection, batch_no, now_ms))
        except MotorpoolError:
            if stopped is not None:
                self.begin(stopped.batch)  # it is validating still, and nobody else would go on with it
            raise

    async def close(self) -> None:
        """Stop checking; what is not finished is resumed at the next start."""
        tasks = [check.task for check in self._checks.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, batch: BatchRow) -> None:
        try:
            async with self.turn:
                errors = await self._check(batch)
        except MotorpoolError as error:
            errors = [LineError(code=error.code, message=error.message, param=error.param, line=None)]
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the customer must hear of it
            _log_failure(batch, "validation", error)
            message = "internal error: hand the batch in again, and report its id if that fails too"
            errors = [LineError(code="internal_error", message=message, param=None, line=None)]
        if errors:
            await self._fail_surely(batch, errors)

    async def _check(self, batch: BatchRow) -> list[LineError]:
        file = customer.find_file(self._cell.reader, batch.input_file_id)
        if file is None or file.deleted_ms is not None:
            return [LineError(code="file_not_found", message="the input file is gone", param=None, line=None)]
        inspection = Inspection(endpoint_of(batch.endpoint), self._cell.catalogue, self._settings)
        await inspect(self._cell.blobs, file.blob, inspection)
        if inspection.errors or inspection.model is None:
            return inspection.errors
        self._checks[batch.batch_no].handing_over = True
        await self._cell.start_batch(
            ValidBatch(
                batch_no=batch.batch_no,
                kind=kind_of(batch.endpoint),
                model=inspection.model,
                offsets=np.array(inspection.offsets, dtype=np.uint64),
                lengths=np.array(inspection.lengths, dtype=np.uint32),
                limits=np.array(inspection.limits, dtype=np.uint32),
            )
        )
        return []

    async def _fail_surely(self, batch: BatchRow, errors: list[LineError]) -> None:
        """Write the end down, for as long as it takes: no batch stays in ``validating`` for ever."""
        wait_s = FAIL_WAIT_S
        while True:
            try:
                await self._fail(batch, errors)
            except Exception as error:  # noqa: BLE001 - the books cannot be written now
                _log_failure(batch, "writing down the end of validation", error)
            else:
                return
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_FAIL_WAIT_S)

    async def _fail(self, batch: BatchRow, errors: list[LineError]) -> None:
        text = msgspec.json.encode(errors).decode()
        now_ms = self._cell.now_ms()
        await self._cell.write(lambda connection: customer.fail_validation(connection, batch.batch_no, text, now_ms))


def _log_failure(batch: BatchRow, what: str, error: Exception) -> None:
    # The text of a foreign error may hold a customer's data; its type and place do not.
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s: %s failed: %s\n%s", batch.batch_id, what, type(error).__name__, frames)
