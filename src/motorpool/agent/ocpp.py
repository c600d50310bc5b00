"""What a charging point was told: OCPP messages in, the two hints that the guard and the forecast use out.

Decides: which messages count, and the cautious reading of each: the earliest departure, the lowest limit. Must not:
talk to a charging point or a network, change a charging plan, or log what a message says.
Called by: ``agent.signals``, through ``ChargingNeedsFile``.

An adapter beside the agent (a local charging station, or a home's energy manager) hands messages over as the file
``charging-needs.json`` in the agent's folder, replaced whole at each change::

    {"ocpp": "2.1", "messages": [[2, "id", "NotifyEVChargingNeeds", {"evseId": 1, "chargingNeeds": {...}}], ...]}

``NotifyEVChargingNeeds`` (OCPP 2.0.1 and 2.1) carries the departure that the car told the station over ISO 15118.
``SetChargingProfile`` carries a limit of the charging point. A departure can only shorten a stay. A limit is believed
as the car's own would be, so only who may write into the agent's folder can give one; of two the lower counts.

With the extra ``ocpp`` installed a message has to obey the published JSON schema in full; without it the fields that
are used are checked here all the same.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from motorpool.core.signals import MAX_CHARGE_W, Reading, Signals, is_young
from motorpool.errors import CallerError

NEEDS_NAME: Final = "charging-needs.json"
NEEDS: Final = "NotifyEVChargingNeeds"
PROFILE: Final = "SetChargingProfile"
VERSIONS: Final = ("2.0.1", "2.1")
CALL: Final = 2  # the first element of an OCPP-J request
MAX_FILE_BYTES: Final = 256 * 1024
MAX_MESSAGES: Final = 64
MAX_PERIODS: Final = 1024
PHASE_V: Final = 230.0
MAX_AGE_MS: Final = 48 * 3_600_000  # a departure that an older file states is of another day
# The purposes that limit the whole charging point; the others shape one charging plan, which the car itself follows.
CIRCUIT_PURPOSES: Final = ("ChargingStationExternalConstraints", "ChargingStationMaxProfile")
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
RFC3339: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
N = TypeVar("N", int, float)
log = logging.getLogger(__name__)


class Hints(msgspec.Struct, frozen=True, kw_only=True):
    """What the messages say now; None: nothing."""

    departure_ms: int | None = None
    circuit_limit_w: float | None = None


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: list[Any]
    ocpp: str = "2.1"


def departure_ms(payload: object, version: str = "2.1") -> int | None:
    """The departure in a ``NotifyEVChargingNeeds`` request, in Unix milliseconds; None if it states none.

    Raises CallerError that names the field at fault.
    """
    _check_schema(NEEDS, payload, version)
    request = _object(payload, NEEDS)
    _number(request.get("evseId"), f"{NEEDS}.evseId")
    needs = _object(request.get("chargingNeeds"), f"{NEEDS}.chargingNeeds")
    if not isinstance(needs.get("requestedEnergyTransfer"), str):
        raise _wrong(f"{NEEDS}.chargingNeeds.requestedEnergyTransfer", "must be a text")
    text = needs.get("departureTime")
    return None if text is None else _time_ms(text, f"{NEEDS}.chargingNeeds.departureTime")


def circuit_limit_w(payload: object, now_ms: int, version: str = "2.1") -> float | None:
    """The limit that a ``SetChargingProfile`` request puts on the charging point now; None if it puts none.

    A plan whose place in time is not stated (relative, recurring) counts with its lowest period. Amperes without a
    number of phases count for one phase. Raises CallerError that names the field at fault.
    """
    _check_schema(PROFILE, payload, version)
    field = f"{PROFILE}.chargingProfile"
    profile = _object(_object(payload, PROFILE).get("chargingProfile"), field)
    if profile.get("chargingProfilePurpose") not in CIRCUIT_PURPOSES:
        return None
    begin, end = profile.get("validFrom"), profile.get("validTo")
    if begin is not None and now_ms < _time_ms(begin, f"{field}.validFrom"):
        return None
    if end is not None and now_ms >= _time_ms(end, f"{field}.validTo"):
        return None
    schedules = _array(profile.get("chargingSchedule"), f"{field}.chargingSchedule", 3)
    fixed = profile.get("chargingProfileKind") == "Absolute"
    limits = [
        _schedule_w(schedule, f"{field}.chargingSchedule[{index}]", now_ms if fixed else None)
        for index, schedule in enumerate(schedules)
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def read_hints(data: bytes, now_ms: int) -> Hints:
    """The hints of a whole file. Raises CallerError that names the field at fault; then nothing in it counts."""
    if len(data) > MAX_FILE_BYTES:
        raise _wrong(NEEDS_NAME, f"must be at most {MAX_FILE_BYTES} bytes")
    try:
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _wrong(NEEDS_NAME, 'must be {"ocpp": VERSION, "messages": [MESSAGE, ...]}') from None
    if document.ocpp not in VERSIONS:
        raise _wrong("ocpp", f"must be one of {', '.join(VERSIONS)}")
    if len(document.messages) > MAX_MESSAGES:
        raise _wrong("messages", f"must be at most {MAX_MESSAGES}")
    departures: list[int] = []
    limits: list[float] = []
    for index, message in enumerate(document.messages):
        action, payload = _call(message, f"messages[{index}]")
        if action == NEEDS and (leaves_ms := departure_ms(payload, document.ocpp)) is not None:
            departures.append(leaves_ms)
        if action == PROFILE and (limit_w := circuit_limit_w(payload, now_ms, document.ocpp)) is not None:
            limits.append(limit_w)
    return Hints(departure_ms=min(departures, default=None), circuit_limit_w=min(limits, default=None))


def merged(signals: Signals, told: Signals, now_ms: int) -> Signals:
    """The car's own signals with what the charging point was told: the earlier departure, the lower limit.

    Of two readings one that is too old does not count.
    """
    departure = _lower("departure_ms", signals.departure_ms, told.departure_ms, now_ms)
    limit = _lower("circuit_limit_w", signals.circuit_limit_w, told.circuit_limit_w, now_ms)
    return msgspec.structs.replace(signals, departure_ms=departure, circuit_limit_w=limit)


def _lower(name: str, own: Reading[N] | None, told: Reading[N] | None, now_ms: int) -> Reading[N] | None:
    if told is None or not is_young(name, told, now_ms):
        return own
    if own is None or not is_young(name, own, now_ms):
        return told
    return min(own, told, key=lambda reading: reading.value)


class ChargingNeedsFile:
    """The file of an adapter. ``read`` is cheap: the file is looked at, and read only when it has changed."""

    def __init__(self, agent_dir: Path) -> None:
        _validators()  # now, because loading the schemas' library later would hold the event loop up
        self._path = agent_dir / NEEDS_NAME
        self._seen: tuple[int, ...] | None = None
        self._data: bytes | None = None
        self._written_ms = 0
        self._hints = Hints()
        self._parsed_ms: int | None = None

    def read(self, now_ms: int) -> Signals:
        """``departure_ms`` and ``circuit_limit_w``, all else missing.

        A departure holds until it is replaced, for two days at most. A limit is as old as the file, so that an adapter
        which has died does not vouch for it: it has to write the file again every half minute.
        """
        try:
            stat = self._path.stat()
        except OSError:
            self._seen = None
            return Signals()
        seen = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
        if seen != self._seen:
            self._seen, self._parsed_ms = seen, None
            self._written_ms = stat.st_mtime_ns // 1_000_000
            self._data = self._load()
        # A plan moves on without a change of the file, so it is read anew twice a minute.
        if self._parsed_ms is None or not 0 <= now_ms - self._parsed_ms < 30_000:
            self._parse(now_ms)
        if now_ms - self._written_ms > MAX_AGE_MS:
            return Signals()
        leaves_ms, limit_w = self._hints.departure_ms, self._hints.circuit_limit_w
        return Signals(
            departure_ms=None if leaves_ms is None else Reading(leaves_ms, now_ms),
            circuit_limit_w=None if limit_w is None else Reading(limit_w, self._written_ms),
        )

    def _load(self) -> bytes | None:
        try:
            with self._path.open("rb") as file:
                return file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            log.warning("%s cannot be read: %s", NEEDS_NAME, error.strerror)
            return None

    def _parse(self, now_ms: int) -> None:
        self._parsed_ms, self._hints = now_ms, Hints()
        if self._data is None:
            return
        try:
            self._hints = read_hints(self._data, now_ms)
        except CallerError as error:
            self._data = None  # said once for each file
            log.warning("%s is left out: %s", NEEDS_NAME, error.message)


# -- the parts of a message --------------------------------------------------------------------------------------------


def _schedule_w(schedule: object, field: str, now_ms: int | None) -> float | None:
    """The limit of one plan now; of its lowest period when ``now_ms`` is None. None: it puts no limit now."""
    plan = _object(schedule, field)
    unit = plan.get("chargingRateUnit")
    if not isinstance(unit, str) or unit not in {"W", "A"}:
        raise _wrong(f"{field}.chargingRateUnit", "must be W or A")
    periods = _array(plan.get("chargingSchedulePeriod"), f"{field}.chargingSchedulePeriod", MAX_PERIODS)
    starts: list[tuple[float, float | None]] = []
    for index, entry in enumerate(periods):
        name = f"{field}.chargingSchedulePeriod[{index}]"
        period = _object(entry, name)
        starts.append((_number(period.get("startPeriod"), f"{name}.startPeriod"), _period_w(period, name, unit)))
    stated = plan.get("startSchedule")
    if now_ms is None or stated is None:
        return min((limit for _, limit in starts if limit is not None), default=None)
    passed_s = (now_ms - _time_ms(stated, f"{field}.startSchedule")) / 1000
    duration = plan.get("duration")
    if passed_s < 0 or (duration is not None and passed_s >= _number(duration, f"{field}.duration")):
        return None
    begun = [(start_s, index) for index, (start_s, _) in enumerate(starts) if start_s <= passed_s]
    return starts[max(begun)[1]][1] if begun else None


def _period_w(period: dict[str, Any], field: str, unit: str) -> float | None:
    if period.get("evseSleep") is True:
        return 0.0
    limit = period.get("limit")
    if limit is None:
        return None
    phases = period.get("numberPhases", 1)
    if isinstance(phases, bool) or not isinstance(phases, int | float) or phases not in {1, 2, 3}:
        raise _wrong(f"{field}.numberPhases", "must be 1, 2 or 3")
    watts_w = _number(limit, f"{field}.limit") * (PHASE_V * phases if unit == "A" else 1.0)
    return min(watts_w, MAX_CHARGE_W)


def _call(message: object, field: str) -> tuple[str, object]:
    """Action and payload of an OCPP-J request."""
    if not isinstance(message, list) or len(message) != 4 or message[0] != CALL or not isinstance(message[2], str):
        raise _wrong(field, f"must be an OCPP request: [{CALL}, ID, ACTION, PAYLOAD]")
    return message[2], message[3]


def _object(value: object, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(field, "must be an object")
    return value


def _array(value: object, field: str, longest: int) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= longest:
        raise _wrong(field, f"must be an array of 1 to {longest} elements")
    return value


def _number(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e15:
        raise _wrong(field, "must be a number, 0 or more")
    return float(value)


def _time_ms(text: object, field: str) -> int:
    """A date and time with its offset from UTC, as RFC 3339 has it."""
    moment = None
    if isinstance(text, str) and RFC3339.fullmatch(text):
        try:
            moment = datetime.fromisoformat(text.upper())
        except ValueError:
            moment = None  # the 31st of February
    if moment is None:
        raise _wrong(field, "must be a date and time as RFC 3339, like 2030-12-31T07:30:00Z")
    return (moment - EPOCH) // timedelta(milliseconds=1)


def _wrong(field: str, what: str) -> CallerError:
    return CallerError(f"{field} {what}", code="invalid_ocpp", param=field)


def _check_schema(action: str, payload: object, version: str) -> None:
    """Hold a message to the published schema, if the extra is there."""
    if version not in VERSIONS:
        raise _wrong("ocpp", f"must be one of {', '.join(VERSIONS)}")
    validator_of = _validators()
    if validator_of is None:
        return
    first = min(
        validator_of(CALL, action, version).iter_errors(payload),
        key=lambda error: len(error.absolute_path),
        default=None,
    )
    if first is not None:
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first.absolute_path)
        if first.validator == "required":
            field += "." + next(name for name in first.validator_value if name not in first.instance)
        # The validator's own text quotes the value, which may tell where somebody goes and when.
        raise _wrong(action + field, f"breaks the rule {first.validator!r} of the schema of OCPP {version}")


def _validators() -> Callable[[int, str, str], Any] | None:
    try:
        found: Callable[[int, str, str], Any] = importlib.import_module("ocpp.messages").get_validator
    except ImportError:
        return None
    return found
