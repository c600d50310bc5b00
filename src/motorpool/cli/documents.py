"""Reads what a customer points at (files and folders) into named documents, and makes the lines of a batch of them.

Decides: which files are documents, their names, and the body of each request. Must not: speak to any server.
Called by: ``cli.batch`` and ``cli.demo``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from motorpool.errors import CallerError, SetupError
from motorpool.types import MAX_BATCH_BYTES, MAX_BATCH_LINES, MAX_BODY_BYTES, MAX_CUSTOM_ID_CHARS, Kind

TEXT_SUFFIXES: Final = (".txt", ".md")
TABLE_SUFFIXES: Final = (".jsonl", ".csv")


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """One document. ``name`` is unique in a batch and comes back with the result."""

    name: str
    text: str


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done with every document: the same prompt, model, limit and, if wanted, the form of the answer.

    ``examples`` are pairs of a document and the answer to it, shown to the model before each document.
    """

    model: str
    prompt: str
    max_tokens: int
    schema: dict[str, Any] | None = None
    temperature: float = 0.0
    examples: tuple[tuple[str, str], ...] = ()


def read_documents(paths: Iterable[Path]) -> list[Document]:
    """Read files and folders; raise SetupError that names the file if one cannot be used.

    A folder gives its ``.txt`` and ``.md`` files, at any depth, by name. A ``.jsonl`` or ``.csv`` file gives a document
    for each row with a ``text`` (named by its ``id`` if it has one); any other file is one document.
    """
    found: list[Document] = []
    taken: dict[str, int] = {}
    for path in paths:
        for name, text in _read(path):
            if not text.strip():
                raise SetupError(f"the document {name} is empty: take it out, or fill it", code="document_empty")
            count = taken[name] = taken.get(name, 0) + 1
            unique = name if count == 1 else f"{name}#{count}"
            found.append(Document(name=unique[-MAX_CUSTOM_ID_CHARS:], text=text))
    if not found:
        raise SetupError("there is no document: name .txt or .md files, or a folder that has some", code="no_documents")
    if len(found) > MAX_BATCH_LINES:
        raise SetupError(
            f"{len(found)} documents are too many for one batch: hand in at most {MAX_BATCH_LINES} at a time"
        )
    return found


def _read(path: Path) -> Iterator[tuple[str, str]]:
    if not path.exists():
        raise SetupError(f"{path} does not exist", code="file_missing")
    if path.is_dir():
        for child in sorted(path.rglob("*")):
            if child.is_file() and child.suffix.lower() in TEXT_SUFFIXES:
                yield child.relative_to(path).as_posix(), _text(child)
    elif path.suffix.lower() in TABLE_SUFFIXES:
        yield from _rows(path)
    else:
        yield path.name, _text(path)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # spreadsheets put a byte order mark first
    except UnicodeDecodeError as error:
        raise SetupError(f"{path} is not UTF-8 text (byte {error.start}): convert it first", code="not_text") from error


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    text = _text(path)
    rows: Iterable[Any]
    if path.suffix.lower() == ".csv":
        rows = _csv_rows(path, text)
    else:
        # Only a line feed ends a line: other separators may stand inside a string.
        rows = (_json_row(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise SetupError(f"{path}: row {number} has no text in a field named 'text'", code="row_without_text")
        yield f"{path.name}:{row.get('id') or number}", row["text"]


def _csv_rows(path: Path, text: str) -> Iterator[Any]:
    csv.field_size_limit(MAX_BODY_BYTES)
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except csv.Error as error:
        raise SetupError(f"{path} is not CSV that can be read: {error}", code="not_csv") from error


def _json_row(path: Path, number: int, line: str) -> Any:
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise SetupError(f"{path}: line {number} is not JSON", code="not_json") from error


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema from a file; raise SetupError if it is not an object of JSON."""
    try:
        schema = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise SetupError(f"{path} is not a JSON schema: it must hold one JSON object", code="schema_invalid") from error
    return schema


def batch_lines(documents: Iterable[Document], task: Task) -> bytes:
    """The input file of a batch: one chat completion a document, in order. Raises CallerError beyond the bound."""
    lines = [_encoded(document, task) for document in documents]
    data = b"\n".join(lines) + b"\n"
    if len(data) > MAX_BATCH_BYTES:
        raise CallerError(
            f"the documents make {len(data)} bytes of batch input; at most {MAX_BATCH_BYTES} go into one batch"
        )
    return data


def _encoded(document: Document, task: Task) -> bytes:
    line = msgspec.json.encode(_line(document, task))
    if len(line) > MAX_BODY_BYTES:
        raise CallerError(
            f"the document {document.name} makes a request of {len(line)} bytes, over the limit of {MAX_BODY_BYTES}: "
            "split it",
            code="body_too_large",
        )
    return line


def _line(document: Document, task: Task) -> dict[str, Any]:
    messages = [{"role": "system", "content": task.prompt}]
    for asked, answered in task.examples:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": document.text})
    body: dict[str, Any] = {
        "model": task.model,
        "messages": messages,
        "max_completion_tokens": task.max_tokens,
        "temperature": task.temperature,
    }
    if task.schema is not None:
        named = {"name": "answer", "strict": True, "schema": task.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return {"custom_id": document.name, "method": "POST", "url": Kind.CHAT.url, "body": body}
