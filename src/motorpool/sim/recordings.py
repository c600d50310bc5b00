"""Which recording a path is: a folder with the Norwegian files, one of them, or the file of Boulder.

Decides: the data set, by the names of files and by headers, and the time zone in which its owners live. Must not: parse
rows (``agent.signals.sessions`` does).
Called by: ``cli.sim``.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo

import msgspec

from motorpool.agent.signals.sessions import BOULDER, NORWAY, Session, boulder, norway
from motorpool.errors import SetupError

NORWAY_SOURCE: Final = "Sørensen et al. 2024, Zenodo 10.5281/zenodo.13896176, CC BY 4.0"
BOULDER_SOURCE: Final = "City of Boulder open data, CC0"
_REPORTS, _USERS, _PREDICTIONS = "dataset1", "dataset2", "dataset3"


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """The sessions of a data set, where its owners live, and whom to name as its source."""

    sessions: list[Session]
    zone: ZoneInfo
    source: str


def load(path: Path) -> Recording:
    """Read a recording; raises SetupError that names file, line and column, or says what is expected."""
    if path.is_dir():
        reports = _in_folder(path, _REPORTS)
        if reports is None:
            text = f"{path.name or path} holds no CSV file of charging reports with Dataset1 in its name"
            raise SetupError(f"{text}; name the folder of the data set, or one CSV file", code="no_sessions")
        found = norway(reports, _in_folder(path, _USERS), _in_folder(path, _PREDICTIONS))
    else:
        header = _header(path)
        if "Station_Name" in header:
            return _usable(path, boulder(path), BOULDER, BOULDER_SOURCE)
        if "plugin_time" not in header:
            text = f"{path.name}, line 1: neither a column plugin_time (Norway) nor Station_Name (Boulder)"
            raise SetupError(f"{text}; name a file of charging sessions", code="bad_session_file")
        found = norway(path)
    return _usable(path, found, NORWAY, NORWAY_SOURCE)


def _usable(path: Path, sessions: list[Session], zone: ZoneInfo, source: str) -> Recording:
    if not sessions:
        raise SetupError(f"{path.name} holds no usable charging session", code="no_sessions")
    return Recording(sessions=sessions, zone=zone, source=source)


def _in_folder(folder: Path, name: str) -> Path | None:
    found = sorted(file for file in folder.iterdir() if name in file.name.lower() and file.suffix.lower() == ".csv")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise SetupError(f"more than one file with {name} in its name: {names}", code="bad_session_file")
    return found[0] if found else None


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            line = file.readline(10_000)
    except (OSError, UnicodeDecodeError) as error:
        text = f"cannot read {path.name}: {type(error).__name__}; name a folder or a CSV file of charging sessions"
        raise SetupError(text, code="bad_session_file") from error
    delimiter = ";" if ";" in line else ","
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
