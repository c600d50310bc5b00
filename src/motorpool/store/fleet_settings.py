"""What operators set and what a cell has learnt: sites, trust, reserves, shares of customers, the forecast.

Every function works inside the caller's transaction. Called by: ``server.loop``, ``server.admin``, ``server.quotes``.
"""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec

MAX_SITES: Final = 10_000
MAX_LEARNT_BYTES: Final = 32 * 1024 * 1024


class VehicleSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is set for a vehicle: where it stands ("" for nowhere in particular), its tier of trust, reserve or not."""

    vehicle_id: str
    site: str = ""
    trust: int = 0
    reserve: bool = False


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """A place with a limit of its own: watts that the vehicles at work there may draw together, and how many; 0: none.

    ``vehicles`` is how many stand there.
    """

    name: str
    limit_w: int = 0
    limit_vehicles: int = 0
    vehicles: int = 0


class Customer(msgspec.Struct, frozen=True, kw_only=True):
    """The share of a customer, relative to those of others."""

    account: str
    weight: float = 1.0


def vehicle_settings(row: sqlite3.Row) -> VehicleSettings:
    """Of a row of the table of vehicles."""
    return VehicleSettings(
        vehicle_id=row["vehicle_id"], site=row["site"], trust=row["trust"], reserve=bool(row["reserve"])
    )


def find_vehicle_settings(db: sqlite3.Connection, vehicle_id: str) -> VehicleSettings | None:
    """What is set for a vehicle that is enrolled; None if there is none of that name."""
    row = db.execute("SELECT * FROM vehicle WHERE vehicle_id = ? AND revoked_ms IS NULL", (vehicle_id,)).fetchone()
    return None if row is None else vehicle_settings(row)


def save_vehicle_settings(db: sqlite3.Connection, settings: VehicleSettings) -> None:
    """Set them."""
    db.execute(
        "UPDATE vehicle SET site = ?, trust = ?, reserve = ? WHERE vehicle_id = ?",
        (settings.site, settings.trust, int(settings.reserve), settings.vehicle_id),
    )


def list_sites(db: sqlite3.Connection) -> list[Site]:
    """All sites by name."""
    rows = db.execute(
        "SELECT s.name, s.limit_w, s.limit_vehicles, coalesce(v.here, 0) FROM site s LEFT JOIN"
        " (SELECT site, count(*) AS here FROM vehicle WHERE revoked_ms IS NULL GROUP BY site) v ON v.site = s.name"
        " ORDER BY s.name"
    )
    return [Site(name=row[0], limit_w=row[1], limit_vehicles=row[2], vehicles=row[3]) for row in rows]


def find_site(db: sqlite3.Connection, name: str) -> Site | None:
    """One site; ``vehicles`` is not counted."""
    row = db.execute("SELECT name, limit_w, limit_vehicles FROM site WHERE name = ?", (name,)).fetchone()
    return None if row is None else Site(name=row[0], limit_w=row[1], limit_vehicles=row[2])


def count_sites(db: sqlite3.Connection) -> int:
    """How many there are."""
    return int(db.execute("SELECT count(*) FROM site").fetchone()[0])


def save_site(db: sqlite3.Connection, site: Site) -> None:
    """Add a site, or set its limits."""
    db.execute("INSERT OR REPLACE INTO site VALUES (?, ?, ?)", (site.name, site.limit_w, site.limit_vehicles))


def remove_site(db: sqlite3.Connection, name: str) -> bool:
    """Forget a site; False if a vehicle stands there."""
    if db.execute("SELECT 1 FROM vehicle WHERE site = ? AND revoked_ms IS NULL LIMIT 1", (name,)).fetchone():
        return False
    db.execute("UPDATE vehicle SET site = '' WHERE site = ?", (name,))  # those that are struck off and may come back
    db.execute("DELETE FROM site WHERE name = ?", (name,))
    return True


def list_customers(db: sqlite3.Connection) -> list[Customer]:
    """Every account that has a key or a share, by name; without a share of its own it has 1."""
    rows = db.execute(
        "SELECT account, coalesce(weight_milli, 1000)"
        " FROM (SELECT account FROM api_key UNION SELECT account FROM customer)"
        " LEFT JOIN customer USING (account) ORDER BY account"
    )
    return [Customer(account=row[0], weight=row[1] / 1000) for row in rows]


def shares(db: sqlite3.Connection) -> list[Customer]:
    """The customers that have a share of their own."""
    rows = db.execute("SELECT account, weight_milli FROM customer")
    return [Customer(account=row[0], weight=row[1] / 1000) for row in rows]


def save_customer(db: sqlite3.Connection, customer: Customer) -> None:
    """Set a customer's share."""
    db.execute(
        "INSERT OR REPLACE INTO customer VALUES (?, ?)", (customer.account, max(1, round(customer.weight * 1000)))
    )


def read_learnt(db: sqlite3.Connection, name: str) -> bytes | None:
    """What was learnt under this name; None if nothing was."""
    row = db.execute("SELECT data FROM learnt WHERE name = ?", (name,)).fetchone()
    return None if row is None else bytes(row[0])


def save_learnt(db: sqlite3.Connection, name: str, data: bytes, now_ms: int) -> None:
    """Keep it in place of what was there."""
    assert len(data) <= MAX_LEARNT_BYTES
    db.execute("INSERT OR REPLACE INTO learnt VALUES (?, ?, ?)", (name, data, now_ms))
