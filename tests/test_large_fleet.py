"""A cell with a large fleet takes the compiled kernels when it starts, and does the same with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from motorpool.core import kernels
from motorpool.core.scheduler import Scheduler
from motorpool.server import loop
from motorpool.store.database import Database


@pytest.mark.parametrize(("vehicles", "there", "fast"), [(3, True, False), (4, True, True), (4, False, False)])
def test_compiled_kernels_are_for_large_fleets_and_where_they_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vehicles: int, there: bool, fast: bool
) -> None:
    monkeypatch.setattr(loop, "LARGE_FLEET", 4)
    if not there:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    database = Database(tmp_path / "cell.db")
    for number in range(vehicles):
        database.writer.execute(
            "INSERT INTO vehicle (vehicle_id, name, enrolled_ms) VALUES (?, 'car', 1)", (f"v{number}",)
        )
    assert loop._is_large(database.writer) is fast
    database.close()


def test_without_a_large_fleet_kernels_are_plain_functions() -> None:
    assert Scheduler().cell.k is kernels
