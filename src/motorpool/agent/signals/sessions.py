"""Recorded charging sessions: the files of two published data sets, parsed into one type.

Decides: what a row means, and which rows are usable. Must not: keep names of places or people beyond the data set's own
pseudonyms, or guess what is missing: NA stays None.
Called by: ``agent.signals.replay``, the simulator.

The Norwegian files (Sørensen et al., Zenodo 13896176) have ``;``, a decimal comma and NA; the Boulder file is plain CSV
with a byte-order mark. Norway gives local times without a zone, taken as Europe/Oslo; a local time that a change of
clocks makes doubtful is taken with the offset from before the change. Boulder's times are UTC, as the "+00" behind them
says; the column beside them names the zone of the place, MST or MDT. (Read as local times, hardly anybody would plug in
between five and ten in the morning, and many at midnight.)
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar
from zoneinfo import ZoneInfo

import msgspec

from motorpool.errors import SetupError

NORWAY: Final = ZoneInfo("Europe/Oslo")
BOULDER: Final = ZoneInfo("America/Denver")
BOULDER_ZONES: Final = frozenset(("MST", "MDT"))
R = TypeVar("R")


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One car at one charging point, from plug-in to plug-out. None is what the data set does not say."""

    user: str
    plug_in_ms: int
    plug_out_ms: int
    energy_kwh: float
    soc_start_pct: float | None = None
    charger_w: float | None = None
    capacity_wh: float | None = None


class _Row:
    """One row of a file, which can say where it stands."""

    def __init__(self, file: str, line: int, fields: dict[str, str]) -> None:
        self._file = file
        self._line = line
        self._fields = fields

    def bad(self, column: str, what: str) -> SetupError:
        """The error for a field; it does not repeat the field."""
        return SetupError(f"{self._file}, line {self._line}, column {column}: {what}", code="bad_session_file")

    def text(self, column: str) -> str:
        value = self._fields[column].strip()
        if not value or value == "NA":
            raise self.bad(column, "is empty")
        return value

    def missing(self, column: str) -> bool:
        return self._fields[column].strip() in {"", "NA"}

    def number(self, column: str) -> float | None:
        """A number with a decimal comma or point; None for NA and for nothing."""
        if self.missing(column):
            return None
        try:
            value = float(self._fields[column].strip().replace(",", "."))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.bad(column, "is not a number")
        return value

    def moment(self, column: str, layout: str) -> datetime:
        """A local time, still without a zone."""
        try:
            return datetime.strptime(self.text(column), layout)  # noqa: DTZ007  # the caller knows the zone
        except ValueError as error:
            raise self.bad(column, f"is not a time like {layout}") from error


def norway(reports: Path, users: Path | None = None, predictions: Path | None = None) -> list[Session]:
    """Dataset1, with charger and battery from Dataset2 and the charge at plug-in from Dataset3 where they are given.

    Sessions without a plug-out, without energy, or that end before they begin are left out. Raises SetupError that
    names file, line and column.
    """
    capable = {} if users is None else dict(_read(users, ";", _user))
    charged = {} if predictions is None else dict(_read(predictions, ";", _prediction))
    sessions = []
    for session_id, session in _read(reports, ";", _report):
        if session is None:
            continue
        charger_w, capacity_wh = capable.get(session.user, (None, None))
        sessions.append(
            msgspec.structs.replace(
                session,
                soc_start_pct=charged.get((session.user, session_id)),
                charger_w=charger_w,
                capacity_wh=capacity_wh,
            )
        )
    return sorted(sessions, key=lambda session: (session.plug_in_ms, session.user))


def boulder(path: Path) -> list[Session]:
    """The municipal sessions of Boulder. They name no users: each station counts as one."""
    sessions = [session for session in _read(path, ",", _station) if session is not None]
    return sorted(sessions, key=lambda session: (session.plug_in_ms, session.user))


def load(path: Path) -> list[Session]:
    """Sessions from a folder with the Norwegian files, or from one file of either data set, by its header.

    Raises SetupError that says what was expected.
    """
    if path.is_dir():
        found = {number: _only(path, f"*Dataset{number}*.csv") for number in (1, 2, 3)}
        if found[1] is None:
            raise SetupError(f"{path.name} holds no file like *Dataset1*.csv; name a CSV file", code="bad_session_file")
        return norway(found[1], found[2], found[3])
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        text = f"cannot read {path.name}: {type(error).__name__}; name a CSV file of charging sessions"
        raise SetupError(text, code="bad_session_file") from error
    if "plugin_time" in header:
        return norway(path)
    if "Station_Name" in header:
        return boulder(path)
    raise SetupError(
        f"{path.name} is neither the Norwegian reports (plugin_time) nor Boulder's (Station_Name)",
        code="bad_session_file",
    )


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise SetupError(f"{folder.name} holds {len(found)} files like {pattern}: name one", code="bad_session_file")
    return found[0] if found else None


def _read(path: Path, delimiter: str, parse: Callable[[_Row], R]) -> Iterator[R]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(rows, [])]
            for fields in rows:
                if len(fields) != len(header):
                    text = f"{path.name}, line {rows.line_num}: has {len(fields)} columns, the header {len(header)}"
                    raise SetupError(text, code="bad_session_file")
                try:
                    yield parse(_Row(path.name, rows.line_num, dict(zip(header, fields, strict=True))))
                except KeyError as error:
                    text = f"{path.name}, line 1: column {error.args[0]} is missing"
                    raise SetupError(text, code="bad_session_file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        text = f"cannot read {path.name}: {type(error).__name__}; name a CSV file of charging sessions"
        raise SetupError(text, code="bad_session_file") from error


def _report(row: _Row) -> tuple[str, Session | None]:
    session_id = row.text("session_id")
    energy_kwh = row.number("energy_session")
    if row.missing("plugin_time") or row.missing("plugout_time") or energy_kwh is None:
        return session_id, None
    layout = "%Y-%m-%d %H:%M:%S"
    start, end = (_norway_ms(row.moment(column, layout)) for column in ("plugin_time", "plugout_time"))
    return session_id, _session(row.text("user_id"), start, end, energy_kwh)


def _norway_ms(moment: datetime) -> int:
    return int(moment.replace(tzinfo=NORWAY).timestamp() * 1000)


def _user(row: _Row) -> tuple[str, tuple[float | None, float | None]]:
    power_kw, capacity_kwh = row.number("charging_power"), row.number("battery_capacity")
    return row.text("user_id"), (_kilo(power_kw), _kilo(capacity_kwh))


def _kilo(value: float | None) -> float | None:
    return None if value is None else value * 1000.0


def _prediction(row: _Row) -> tuple[tuple[str, str], float | None]:
    soc = row.number("SoC_start")
    if soc is not None and not 0.0 <= soc <= 100.0:
        soc = None  # modelled by the authors, who sometimes end up outside of a battery
    return (row.text("user_id"), row.text("session_id")), soc


def _station(row: _Row) -> Session | None:
    if row.missing("Start_Date___Time") or row.missing("End_Date___Time"):
        return None
    times = []
    for column, zone_column in (("Start_Date___Time", "Start_Time_Zone"), ("End_Date___Time", "End_Time_Zone")):
        if not row.missing(zone_column) and row.text(zone_column) not in BOULDER_ZONES:
            raise row.bad(zone_column, "is neither MST nor MDT")
        utc = row.moment(column, "%Y/%m/%d %H:%M:%S+00").replace(tzinfo=UTC)
        times.append(int(utc.timestamp() * 1000))
    energy_kwh = row.number("Energy__kWh_")
    return None if energy_kwh is None else _session(row.text("Station_Name"), times[0], times[1], energy_kwh)


def _session(user: str, start_ms: int, end_ms: int, energy_kwh: float) -> Session | None:
    if end_ms <= start_ms or energy_kwh < 0:
        return None
    return Session(user=user, plug_in_ms=start_ms, plug_out_ms=end_ms, energy_kwh=energy_kwh)
