"""Reports of many vehicles in one message: a sheet of columns, as the relay of a fleet sends it.

Decides: whether bytes are a sheet of this version, with every value in its range. What is not is refused as a whole and
changes nothing. The format stands in ``docs/reference/vehicle-feed.md``. A report that columns cannot say (of a new
vehicle, a new incarnation, other leases) is in the sheet too, as the State that the vehicle would have sent itself,
with the row that it comes before: so a sheet is a list of reports in their order.

Called by: ``server.feed``, ``core.reporting``, and whoever writes a relay. Must not: know the cell's tables.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from motorpool.core.fleet import BIT_OF_REASON, NUMBER_OF_STATE, REASONS
from motorpool.errors import CallerError, TooLargeError
from motorpool.types import MAX_ITEMS_PER_MESSAGE, MAX_MESSAGE_BYTES
from motorpool.wire import MAX_SHEET_ROWS, MAX_SHEET_VEHICLES, Name, State, Total
from motorpool.wire import VERSION as LINK_VERSION

Rows = npt.NDArray[Any]  # of ROW

MAGIC: Final = b"MPVS"
VERSION: Final = 1
MAX_MODELS: Final = 256
MAX_REGIONS: Final = 64
MAX_SLOTS: Final = 1 << 12
MAX_TOTAL: Final = 1 << 50
MAX_MINUTES: Final = 0xFFFF
MAX_PERMIT_W: Final = 0xFFFF_FFFF
NO_MODEL: Final = 0xFFFF
NOT_KNOWN: Final = 0xFF  # of a risk
MARK_BYTES: Final = 6  # of a lease: the sum of those of 4,096 leases still fits 63 bits

HEAD: Final = struct.Struct("<4sHHIIQQ")  # magic, version, 0, rows, bytes of the tail, feed, number
# In this order behind the head, each column whole, little-endian.
COLUMNS: Final = (
    ("incarnation", "<u8"),  # the number of its sixteen hexadecimal digits; other words have no column
    ("seq", "<i8"),
    ("reasons", "<u8"),  # a bit for each code, in the order of ReasonCode
    ("held_mark", "<i8"),  # the sum of ``mark`` over the leases that the vehicle holds
    ("vehicle", "<u4"),  # the relay's number for it
    ("permit_w", "<u4"),
    ("held", "<u2"),  # how many leases
    ("slots", "<u2"),
    ("stay_min", "<u2"),  # 0: not known
    ("model", "<u2"),  # its place in the tail's list, or NO_MODEL
    ("state", "u1"),  # 1 denied, 2 starting, 3 ready, 4 working, 5 yielding
    ("region", "u1"),  # its place in the tail's list
    ("risk_pct", "u1"),  # or NOT_KNOWN
)
ROW_BYTES: Final = sum(np.dtype(kind).itemsize for _, kind in COLUMNS)
# The same as records; the last ones are numbers of the cell's own.
ROW: Final = np.dtype(
    [*((name, kind) for name, kind in COLUMNS), ("row", "<i4"), ("its_model", "<i4"),
     ("its_reasons", "<i4"), ("its_region", "<i4")],
    align=True,
)  # fmt: skip
_DRAWN: Final = re.compile("(?!0{16})[0-9a-f]{16}")  # what agents draw as their incarnation
_ALL_REASONS: Final = (1 << len(REASONS)) - 1


class Whole(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A report in full: before which row it comes, the relay's number for the vehicle from now on, and its State."""

    at: Annotated[int, Meta(ge=0, le=MAX_SHEET_ROWS)]
    number: Annotated[int, Meta(ge=0, lt=MAX_SHEET_VEHICLES)]
    vehicle_id: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
    state: State


class Tail(msgspec.Struct, frozen=True, kw_only=True):
    """What has names: MessagePack behind the columns. ``whole`` is in the order of ``at``."""

    models: Annotated[list[Name], Meta(max_length=MAX_MODELS)] = []
    regions: Annotated[list[Name], Meta(max_length=MAX_REGIONS)] = []
    whole: Annotated[list[Whole], Meta(max_length=MAX_SHEET_ROWS)] = []


class Sheet(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One message. ``feed`` is a random number that the relay draws at its start: its numbers of vehicles hold as long.

    ``number`` counts the relay's sheets and stands in the answer.
    """

    feed: Total
    number: Total
    rows: Rows
    tail: Tail


class SheetTaken(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="sheet_taken"):
    """The cell's answer. ``wanted``: numbers of vehicles of which it needs the next report in full.

    ``taken`` counts reports that were applied, ``refused`` are numbers of vehicles for which the relay may not speak.
    ``error`` is a stable code, ``message`` says what is wrong; nothing of such a sheet was applied.
    """

    v: int = LINK_VERSION
    feed: int = 0
    number: int = 0
    taken: int = 0
    wanted: list[int] = []
    refused: list[int] = []
    error: str = ""
    message: str = ""


_tails: Final = msgspec.msgpack.Decoder(Tail)
_answers: Final = msgspec.msgpack.Decoder(SheetTaken)
_encoder: Final = msgspec.msgpack.Encoder()


def mark(lease_id: str) -> int:
    """A number of 48 bits for a lease: what two ends compare instead of its name."""
    return int.from_bytes(hashlib.blake2b(lease_id.encode(), digest_size=MARK_BYTES).digest(), "little")


def mark_of(held: Iterable[str]) -> int:
    """The same for what a vehicle holds, in whatever order."""
    return sum(mark(lease_id) for lease_id in held)


def encode(feed: int, number: int, rows: Rows, tail: Tail) -> bytes:
    """The bytes of a sheet; raise TooLargeError beyond MAX_SHEET_ROWS or MAX_MESSAGE_BYTES."""
    if len(rows) > MAX_SHEET_ROWS or len(tail.whole) > MAX_SHEET_ROWS:
        raise TooLargeError(f"a sheet has at most {MAX_SHEET_ROWS} rows, and as many reports in full")
    behind = _encoder.encode(tail)
    parts = [HEAD.pack(MAGIC, VERSION, 0, len(rows), len(behind), feed, number)]
    parts += [np.ascontiguousarray(rows[name], np.dtype(kind)).tobytes() for name, kind in COLUMNS]
    data = b"".join((*parts, behind))
    if len(data) > MAX_MESSAGE_BYTES:
        raise TooLargeError(f"a sheet is at most {MAX_MESSAGE_BYTES} bytes, not {len(data)}")
    return data


def decode(data: bytes) -> Sheet:
    """Check bytes and take them apart; raise CallerError or TooLargeError that says what is wrong with them."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise TooLargeError(f"a sheet is at most {MAX_MESSAGE_BYTES} bytes, not {len(data)}")
    if len(data) < HEAD.size or data[:4] != MAGIC:
        raise _wrong("this is no sheet: it does not begin with its head")
    _, version, reserved, count, behind, feed, number = HEAD.unpack_from(data)
    if version != VERSION:
        raise CallerError(f"version {version} of a sheet is not known here; {VERSION} is", code="unsupported_version")
    if count > MAX_SHEET_ROWS:
        raise TooLargeError(f"a sheet has at most {MAX_SHEET_ROWS} rows, not {count}")
    expected = HEAD.size + count * ROW_BYTES + behind
    if reserved or len(data) != expected:
        raise _wrong(f"a sheet of {count} rows and {behind} bytes behind them has {expected} bytes, not {len(data)}")
    if feed > MAX_TOTAL or number > MAX_TOTAL:
        raise _wrong(f"the numbers of a feed and of its sheets are at most {MAX_TOTAL}")
    tail = _tail(data[expected - behind :])
    rows = np.zeros(count, ROW)
    at = HEAD.size
    for name, kind in COLUMNS:
        column: npt.NDArray[Any] = np.frombuffer(data, np.dtype(kind), count, at)
        rows[name] = column
        at += column.nbytes
    _check(rows, tail)
    return Sheet(feed=feed, number=number, rows=rows, tail=tail)


def _tail(data: bytes) -> Tail:
    try:
        tail = _tails.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong("what stands behind the rows of a sheet is not its tail") from error
    if any(whole.state.v != LINK_VERSION for whole in tail.whole):
        raise CallerError(f"a report in full is of version {LINK_VERSION}", code="unsupported_version")
    return tail


def _check(rows: Rows, tail: Tail) -> None:
    """Every value is in its range: kernels and tables rely on it."""
    ats = [whole.at for whole in tail.whole]
    if ats != sorted(ats) or (ats and ats[-1] > len(rows)):
        raise _wrong("reports in full stand in the order of their rows, the last one behind the last row at most")
    model, risk = rows["model"], rows["risk_pct"]
    faults = (
        ("incarnation", rows["incarnation"] == 0),
        ("seq", (rows["seq"] < 0) | (rows["seq"] > MAX_TOTAL)),
        ("reasons", rows["reasons"] > np.uint64(_ALL_REASONS)),
        ("held_mark", (rows["held_mark"] < 0) | ((rows["held"] == 0) & (rows["held_mark"] != 0))),
        ("vehicle", rows["vehicle"] >= MAX_SHEET_VEHICLES),
        ("held", rows["held"] > MAX_ITEMS_PER_MESSAGE),
        ("slots", rows["slots"] > MAX_SLOTS),
        ("model", (model >= len(tail.models)) & (model != NO_MODEL)),
        ("state", (rows["state"] == 0) | (rows["state"] > len(NUMBER_OF_STATE))),
        ("region", rows["region"] >= len(tail.regions)),
        ("risk_pct", (risk > 100) & (risk != NOT_KNOWN)),
    )
    for name, wrong in faults:
        if wrong.any():
            raise _wrong(f"{name} of row {int(wrong.argmax())} of a sheet is out of its range", param=name)


def _wrong(message: str, *, param: str | None = None) -> CallerError:
    return CallerError(message, code="invalid_sheet", param=param)


def encode_answer(answer: SheetTaken) -> bytes:
    """The bytes of an answer."""
    return _encoder.encode(answer)


def decode_answer(data: bytes) -> SheetTaken:
    """For relays: what the cell said; raise CallerError if it is no answer."""
    try:
        return _answers.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CallerError("not an answer to a sheet", code="invalid_message") from error


class _Known(msgspec.Struct, frozen=True):
    """What the cell was told last in full of a vehicle: only what columns cannot say."""

    incarnation: str
    held: list[str]
    memory_gb: int | None
    models_on_disk: list[str] | None


class SheetWriter:
    """A relay's end: it takes States as vehicles send them, and says in full what columns cannot say.

    ``feed`` is a random number, drawn anew at each start. A vehicle keeps the number that it is given here first.
    """

    def __init__(self, feed: int) -> None:
        self.feed = feed
        self._numbers: dict[str, int] = {}
        self._known: dict[int, _Known] = {}
        self._count = 0
        self._begin()

    def _begin(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._whole: list[Whole] = []
        self._models: dict[str, int] = {}
        self._regions: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows) + len(self._whole)

    def add(self, vehicle_id: str, state: State) -> None:
        """One report more. Take the sheet before it has MAX_SHEET_ROWS of them."""
        number = self._numbers.setdefault(vehicle_id, len(self._numbers))
        known = _Known(state.incarnation, state.held, state.memory_gb, state.models_on_disk)
        model = NO_MODEL if state.model is None else self._place(self._models, state.model, MAX_MODELS)
        region = self._place(self._regions, state.region, MAX_REGIONS)
        if known != self._known.get(number) or model is None or region is None or not _has_columns(state):
            self._known[number] = known
            self._whole.append(Whole(at=len(self._rows), number=number, vehicle_id=vehicle_id, state=state))
            return
        risk = NOT_KNOWN if state.risk_15min is None else round(state.risk_15min * 100)
        self._rows.append(
            (
                int(state.incarnation, 16),
                state.seq,
                sum(BIT_OF_REASON[code] for code in {reason.code for reason in state.reasons}),
                mark_of(state.held),
                number,
                state.permit_w,
                len(state.held),
                state.slots,
                0 if state.stay_bound_ms is None else min(state.stay_bound_ms // 60_000, MAX_MINUTES),
                model,
                NUMBER_OF_STATE[state.state],
                region,
                risk,
                0,
                0,
                0,
                0,
            )
        )

    @staticmethod
    def _place(places: dict[str, int], name: str, most: int) -> int | None:
        if name not in places and len(places) >= most:
            return None
        return places.setdefault(name, len(places))

    def forget(self, numbers: Sequence[int]) -> None:
        """The cell wants the next report of these vehicles in full."""
        for number in numbers:
            self._known.pop(number, None)

    def take(self) -> bytes:
        """The sheet so far; a new one begins."""
        self._count += 1
        tail = Tail(models=list(self._models), regions=list(self._regions), whole=self._whole)
        data = encode(self.feed, self._count, np.array(self._rows, ROW), tail)
        self._begin()
        return data


def _has_columns(state: State) -> bool:
    return bool(_DRAWN.fullmatch(state.incarnation)) and state.permit_w <= MAX_PERMIT_W
