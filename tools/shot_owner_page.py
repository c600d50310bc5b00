"""Writes docs/owner-page.png: the owner's page on a phone, of a car with a made-up week behind it.

Run it where Chromium and the playwright package are: ``.venv/bin/python tools/shot_owner_page.py``.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.owner_world import MONDAY_MS, OwnersCar, served  # noqa: E402  # they lie beside this folder
from tests.test_owner_page_browser import CHROMIUM, FLAGS  # noqa: E402

from motorpool.agent.enrolment import give_consent  # noqa: E402
from motorpool.agent.owner.pairing import offer_pairing  # noqa: E402
from motorpool.core.policy import ReadyBy  # noqa: E402
from motorpool.trust.consent import ConsentLimits  # noqa: E402

PAGE = ROOT / "docs" / "owner-page.png"
HOUR_MS = 3_600_000
SIZE: Any = {"width": 390, "height": 1180}


def week(folder: Path) -> OwnersCar:
    """Three weeks of evenings, each with some work, and a drive every day."""
    start_ms = MONDAY_MS - 14 * 24 * HOUR_MS
    limits = ConsentLimits(max_watts_w=150, floor_pct=40.0, schedule=(ReadyBy(weekdays=31, minute=450),))
    give_consent(folder, "v1", limits, now_ms=start_ms, expires_ms=start_ms + 300 * 24 * HOUR_MS)
    car = OwnersCar(folder, start_ms)
    car.look()
    for day in range(17):
        car.now_ms = start_ms + day * 24 * HOUR_MS + 6 * HOUR_MS
        car.speed_kmh = 60.0
        car.run(1_800_000)
        car.speed_kmh = 0.0
        car.now_ms = start_ms + day * 24 * HOUR_MS + 20 * HOUR_MS
        car.run(3 * HOUR_MS)
        amounts = {"earned_micro": 410_000, "electricity_micro": 96_000, "wear_micro": 3_000}
        car.log.worked("batch", car.now_ms, lines=1_900, tokens=410_000, energy_mwh=320_000, measured=True, **amounts)
        car.run(60_000)
    return car


async def shoot() -> None:
    """Pair a phone with the page and take its picture."""
    from playwright.async_api import async_playwright  # noqa: PLC0415  # a tool for the maintainers' machines

    assert CHROMIUM is not None, "Chromium is not installed"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        car = week(folder)
        async with served(car) as (page, _), async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            phone = await browser.new_page(viewport=SIZE, device_scale_factor=1)
            await phone.goto(f"{page.url}/pair#{offer_pairing(folder, car.now_ms)}")
            await phone.click("#go")
            await phone.wait_for_selector("#log li")
            await phone.screenshot(path=PAGE)
            await browser.close()


if __name__ == "__main__":
    asyncio.run(shoot())
