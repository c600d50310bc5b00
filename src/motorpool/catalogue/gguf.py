"""GGUF, the file format of llama.cpp's models: writing one, and reading what one says of itself.

Decides: nothing. Must not: know what a model is for; ``bert`` does. The package ``gguf`` writes the same format, with
four packages behind it that a vehicle has no other use for. A file written here has the same bytes for ever, so that
the catalogue can name its hash.

Called by: ``bert``, ``agent.runtime.llama``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Final

import msgspec

from motorpool.errors import ModelFileError

MAGIC: Final = b"GGUF"
VERSION: Final = 3
ALIGNMENT: Final = 32
F32: Final = 0
F16: Final = 1
ITEM_BYTES: Final = {F32: 4, F16: 2}
MAX_ENTRIES: Final = 10_000
MAX_STRING_BYTES: Final = 1 << 24
MAX_ARRAY_ITEMS: Final = 1 << 22
_U32, _F32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", _U32: "<I", 5: "<i", _F32: "<f", _BOOL: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip

Value = bool | int | float | str | list[str] | list[int]


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor: ``shape`` outermost first, ``kind`` F32 or F16, and where its bytes, in order, come from."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: Callable[[], Iterable[bytes]]

    @property
    def size_bytes(self) -> int:
        """Bytes without padding."""
        size = ITEM_BYTES[self.kind]
        for length in self.shape:
            size *= length
        return size


def write(out: IO[bytes], entries: dict[str, Value], tensors: list[Tensor]) -> None:
    """Write a whole file. Whole numbers become uint32, other numbers float32."""
    out.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(entries)))
    for name, value in entries.items():
        out.write(_string(name) + _typed(value))
    offset = 0
    for tensor in tensors:
        shape = tensor.shape[::-1]  # the format begins with the innermost
        out.write(_string(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.kind, offset))
        offset += _aligned(tensor.size_bytes)
    out.write(bytes(_aligned(out.tell()) - out.tell()))
    for tensor in tensors:
        written = 0
        for piece in tensor.data():
            out.write(piece)
            written += len(piece)
        assert written == tensor.size_bytes, f"{tensor.name}: its shape and its bytes differ"
        out.write(bytes(_aligned(written) - written))


def read_entries(file: IO[bytes], wanted: Iterable[str]) -> dict[str, Any]:
    """The entries of a file whose names end in one of ``wanted``; raise ModelFileError if it is no GGUF file."""
    endings = tuple(wanted)
    try:
        return dict(_entries(file, endings))
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
        raise ModelFileError("this is no whole GGUF file") from error


def _entries(file: IO[bytes], endings: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if file.read(4) != MAGIC:
        raise ModelFileError("this is no GGUF file")
    _, _, count = _unpack(file, "<IQQ")
    if count > MAX_ENTRIES:
        raise ModelFileError(f"this GGUF file has more than {MAX_ENTRIES} entries")
    for _ in range(count):
        name = _read_string(file)
        (kind,) = _unpack(file, "<I")
        value = _read_value(file, kind)
        if name.endswith(endings):
            yield name, value


def _read_value(file: IO[bytes], kind: int) -> Any:
    if kind == _STRING:
        return _read_string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    inner, length = _unpack(file, "<IQ")
    if length > MAX_ARRAY_ITEMS:
        raise ModelFileError(f"this GGUF file has a list of more than {MAX_ARRAY_ITEMS} items")
    if inner == _STRING:
        return [_read_string(file) for _ in range(length)]
    form = _SCALARS[inner]
    return list(struct.unpack(f"<{length}{form[1]}", _exactly(file, length * struct.calcsize(form))))


def _read_string(file: IO[bytes]) -> str:
    (length,) = _unpack(file, "<Q")
    if length > MAX_STRING_BYTES:
        raise ModelFileError(f"this GGUF file has a text of more than {MAX_STRING_BYTES} bytes")
    return _exactly(file, length).decode("utf-8", "replace")


def _unpack(file: IO[bytes], form: str) -> tuple[Any, ...]:
    return struct.unpack(form, _exactly(file, struct.calcsize(form)))


def _exactly(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise ModelFileError("this GGUF file ends too early")
    return data


def _typed(value: Value) -> bytes:
    if isinstance(value, bool):  # before int, which it is as well
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if value and isinstance(value[0], str):
        head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        return head + b"".join(_string(str(item)) for item in value)
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, 5, len(value), *value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
