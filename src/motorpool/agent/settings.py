"""The configuration file of an agent: TOML in, checked settings out, with words that name the file and the field.

Decides: which fields there are and which values make sense. Must not: hold a secret (the file names files that do), or
say more than an option of ``motorpool agent`` can: what the command line says beside it goes first.
Called by: ``cli.agent`` for ``--config``.
"""

from __future__ import annotations

import math
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from motorpool.errors import SetupError

MAX_SETTINGS_BYTES: Final = 64 * 1024
_Count = Annotated[int, Meta(ge=1, le=1024)]
_Megabytes = Annotated[int, Meta(ge=0, le=1 << 24)]
_Watts = Annotated[float, Meta(ge=0, le=100_000)]
_Name = Annotated[str, Meta(min_length=1, max_length=256)]


class Source(StrEnum):
    """Where the car's signals come from. ``none``: nowhere, so that the car never works."""

    NONE = "none"
    KUKSA = "kuksa"
    SIMULATED = "simulated"


class AgentSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The agent and its engine. ``region`` is a code, never a place; ``unmetered``: a network without price a byte."""

    dir: _Name | None = None
    model: _Name | None = None
    small_model: _Name | None = None
    slots: _Count | None = None
    threads: Annotated[int, Meta(ge=1, le=256)] | None = None
    url: Annotated[str, Meta(pattern="^https?://")] | None = None
    remote_model: _Name | None = None
    api_key_env: _Name | None = None
    region: Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")] | None = None
    unmetered: bool | None = None


class SignalsSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The source of signals; address and files are those of a KUKSA databroker."""

    source: Source = Source.NONE
    address: Annotated[str, Meta(pattern="^.+:[0-9]{1,5}$")] | None = None
    token_file: _Name | None = None
    ca_file: _Name | None = None


class LimitsSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The most that the computer may take; the owner's consent can only narrow it."""

    watts: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    floor_pct: Annotated[float, Meta(ge=0, le=100)] | None = None
    memory_mb: _Megabytes | None = None
    spool_mb: _Megabytes | None = None


class PowerSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the computer draws with nothing to do and with all cores at work, and what being awake takes of the car."""

    idle_w: _Watts | None = None
    most_w: _Watts | None = None
    awake_w: _Watts | None = None
    calibrate: bool | None = None


class TariffSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The owner's price of a kilowatt-hour: one, or 24 from midnight, in the currency of the account."""

    prices_kwh: list[float]


class PageSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the owner's page is served."""

    host: _Name = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8710


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. What is not in it has the default of the command line."""

    agent: AgentSection = AgentSection()
    signals: SignalsSection = SignalsSection()
    limits: LimitsSection = LimitsSection()
    power: PowerSection = PowerSection()
    tariff: TariffSection | None = None
    page: PageSection | None = None

    def options(self) -> dict[str, Any]:
        """The same as defaults of ``motorpool agent``, by the names of its parameters; what is not said is left out."""
        agent, signals, limits, power = self.agent, self.signals, self.limits, self.power
        kuksa = signals.source is Source.KUKSA
        said: dict[str, Any] = {
            "folder": agent.dir,
            **{name: getattr(agent, name) for name in AgentSection.__struct_fields__ if name != "dir"},
            "simulated": True if signals.source is Source.SIMULATED else None,
            "kuksa": signals.address if kuksa else None,
            "kuksa_token": signals.token_file if kuksa else None,
            "kuksa_ca": signals.ca_file if kuksa else None,
            "watts": limits.watts,
            "floor": limits.floor_pct,
            "memory": limits.memory_mb,
            "spool": limits.spool_mb,
            "node_watts": None if power.most_w is None else (power.idle_w or 0.0, power.most_w),
            "awake_watts": power.awake_w,
            "calibrate": power.calibrate,
            "tariff": None if self.tariff is None else ",".join(repr(price) for price in self.tariff.prices_kwh),
            "page": None if self.page is None else f"{self.page.host}:{self.page.port}",
        }
        return {name: value for name, value in said.items() if value is not None}


def load_settings(path: Path) -> AgentSettings:
    """Read and check a file; raise SetupError with the file, the field, and what to do."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SETTINGS_BYTES + 1)
    except OSError as error:
        raise SetupError(f"cannot read the settings {path}: {error.strerror}", code="settings_unreadable") from error
    return parse_settings(data, str(path))


def parse_settings(data: bytes, name: str) -> AgentSettings:
    """The same for the bytes of a file called ``name``."""
    if len(data) > MAX_SETTINGS_BYTES:
        raise _wrong(name, f"is longer than {MAX_SETTINGS_BYTES} bytes")
    try:
        found = msgspec.convert(tomllib.loads(data.decode("utf-8")), AgentSettings)
    except UnicodeDecodeError as error:
        raise _wrong(name, "is no text in UTF-8") from error
    except RecursionError as error:
        raise _wrong(name, "is nested too deeply") from error
    except tomllib.TOMLDecodeError as error:
        raise _wrong(name, f"is no TOML: {error}") from error
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        field = where.strip("`").removeprefix("$").removeprefix(".")
        raise _wrong(name, f"{field}: {what}" if field else what) from error
    odd = _oddity(found)
    if odd is not None:
        raise _wrong(name, odd)
    return found


def _oddity(settings: AgentSettings) -> str | None:
    """What does not fit together, with its field; None when all of it does."""
    signals, power = settings.signals, settings.power
    if signals.source is Source.KUKSA and signals.address is None:
        return 'signals.address: a KUKSA databroker needs its address, as "127.0.0.1:55555"'
    if signals.source is not Source.KUKSA:
        for name in ("address", "token_file", "ca_file"):
            if getattr(signals, name) is not None:
                return f'signals.{name}: this is for source = "kuksa" alone'
    if power.idle_w is not None and power.most_w is None:
        return "power.most_w: with idle_w, say what the computer draws with all cores at work as well"
    if power.most_w is not None and power.most_w <= (power.idle_w or 0.0):
        return "power.most_w: this has to be more than idle_w"
    if settings.tariff is not None:
        prices = settings.tariff.prices_kwh
        if len(prices) not in {1, 24} or not all(map(math.isfinite, prices)):
            return "tariff.prices_kwh: give one price, or 24 of them from midnight"
    return None


def _wrong(name: str, what: str) -> SetupError:
    return SetupError(f"the settings {name} cannot be used: {what}", code="settings_invalid")
