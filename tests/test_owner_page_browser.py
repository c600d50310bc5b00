"""The owner's page in Chromium, on a phone's screen: pairing, a key of its own, every button, no car in reach."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.owner_world import OwnersCar, served

from motorpool.agent.enrolment import PRIVATE_NAME, PUBLIC_NAME
from motorpool.agent.owner import pairing
from motorpool.core.policy import Quiet, ReadyBy
from motorpool.core.signals import DriverMode

if TYPE_CHECKING:
    from playwright.async_api import BrowserContext, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
pytest.importorskip("playwright", reason="the playwright package is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
PHONE: Any = {"viewport": {"width": 360, "height": 740}}
PATIENCE_MS = 10_000

Trial = Callable[[OwnersCar, "Page", "BrowserContext"], Awaitable[None]]


def in_browser(folder: Path, trial: Trial, **options: Any) -> None:
    """Pair a phone with the car's page, and try something. Whatever goes wrong in the page fails the trial."""
    from playwright.async_api import async_playwright  # noqa: PLC0415  # it is not everywhere

    async def run() -> None:
        car = OwnersCar(folder)
        car.look()
        problems: list[str] = []
        async with served(car) as (page, _), async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            context = await browser.new_context(**{**PHONE, **options})
            context.set_default_timeout(PATIENCE_MS)
            tab = await context.new_page()
            tab.on("pageerror", lambda error: problems.append(str(error)))
            tab.on("console", lambda said: problems.append(said.text) if "Content Security" in said.text else None)
            await tab.goto(f"{page.url}/pair#{pairing.offer_pairing(folder, car.now_ms)}")
            await tab.click("#go")
            await tab.wait_for_selector("#log:not(:empty), #weeks tr")
            await trial(car, tab, context)
            await browser.close()
        assert problems == []

    asyncio.run(run())


async def allow(tab: Page) -> None:
    """Sign with what the form offers."""
    await tab.click("#allow")
    await tab.click("text=Sign and allow")
    await tab.wait_for_selector("#withdraw:visible")


def test_a_phone_makes_a_key_signs_stops_goes_on_and_takes_back(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, tab: Page, _: BrowserContext) -> None:
        assert "you have not allowed it" in await tab.inner_text("#now")
        assert not car.works
        await allow(tab)
        assert car.works
        assert not (tmp_path / PRIVATE_NAME).exists()
        assert len((tmp_path / PUBLIC_NAME).read_bytes()) == 32
        assert await tab.inner_text("#now") == "Your car works for others."
        await tab.click("#pause")
        await tab.wait_for_selector("#resume:visible")
        assert not car.works
        assert "you said: not now" in await tab.inner_text("#now")
        await tab.click("#resume")
        await tab.wait_for_selector("#pause:visible")
        assert car.works
        await tab.click("#need")
        await tab.wait_for_selector("#resume:visible")
        assert not car.works
        await tab.click("#resume")
        await tab.wait_for_selector("#need:visible")
        await tab.click("#withdraw")  # one tap, where giving takes two
        await tab.wait_for_selector("#allow:visible")
        assert not car.works
        assert "taken your consent back" in await tab.inner_text("#now")
        await allow(tab)
        assert car.works

    in_browser(tmp_path, trial)


def test_the_form_signs_every_limit_and_keeps_them_at_the_next_change(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, tab: Page, _: BrowserContext) -> None:
        await tab.click("#allow")
        await tab.fill("[name=watts]", "90")
        await tab.fill("[name=floor]", "45.5")
        await tab.fill("[name=hours]", "12")
        await tab.check("[name=share]")
        await tab.click("text=Add a time at which I need the car")
        await tab.fill("[name=at]", "06:45")
        await tab.fill("[name=target]", "90")
        await tab.click("text=Add quiet hours")
        await tab.click("text=Without the cable")
        await tab.fill("[name=battery_watts]", "40")
        await tab.click("text=Sign and allow")
        await tab.wait_for_selector("#change:visible")
        view = car.desk.consent(car.now_ms)
        assert (view.max_watts_w, view.floor_pct, view.limits.compute_h_week) == (90, 45.5, 12.0)
        assert (view.battery_watts_w, view.share_while_charging) == (40, True)
        assert view.schedule == (ReadyBy(weekdays=31, minute=405, target_pct=90.0),)
        assert view.quiet == (Quiet(weekdays=127, from_minute=1320, to_minute=360),)
        assert "90 % by 06:45, Mon, Tue, Wed, Thu, Fri" in await tab.inner_text("#limits")
        car.now_ms += 1_000
        await tab.click("#change")
        await tab.fill("[name=floor]", "60")
        await tab.click("[data-kind=quiet] >> text=Remove")
        await tab.click("text=Sign and allow")
        await tab.wait_for_selector("#change:visible")
        after = car.desk.consent(car.now_ms)
        assert (after.floor_pct, after.quiet, after.schedule) == (60.0, (), view.schedule)
        assert (after.max_watts_w, after.battery_watts_w, after.limits) == (90, 40, view.limits)

    in_browser(tmp_path, trial)


def test_after_a_valet_the_owner_confirms_with_one_tap(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, tab: Page, _: BrowserContext) -> None:
        await allow(tab)
        car.mode = DriverMode.VALET
        car.run(2_000)
        car.mode = DriverMode.OWNER
        car.run(2_000)
        await tab.click("#confirm")
        await tab.wait_for_selector("#confirm", state="hidden")
        assert car.works

    in_browser(tmp_path, trial)


def test_without_the_car_it_opens_says_how_old_it_is_and_claims_nothing(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, tab: Page, context: BrowserContext) -> None:
        await allow(tab)
        await tab.evaluate("navigator.serviceWorker.ready")
        await context.set_offline(True)
        await tab.reload()
        await tab.wait_for_selector("#offline:visible")
        assert "This is how it was on" in await tab.inner_text("#offline")
        assert await tab.inner_text("#now") == "Your car works for others."
        await tab.click("#need")
        await tab.wait_for_selector("#told:visible")
        assert "unlock the car, open a door or pull the charging cable" in await tab.inner_text("#told")
        assert car.works
        await context.set_offline(False)
        await tab.wait_for_selector("#offline", state="hidden")
        car.look()
        assert car.works  # nothing that was tapped came later

    in_browser(tmp_path, trial)


def test_the_key_cannot_be_taken_out_of_the_phone(tmp_path: Path) -> None:
    async def trial(_: OwnersCar, tab: Page, _context: BrowserContext) -> None:
        await allow(tab)
        told = await tab.evaluate(
            """async () => {
              const { loadKey } = await import("/key.js");
              const pair = await loadKey();
              const taken = await crypto.subtle.exportKey("pkcs8", pair.privateKey).catch((error) => error.name);
              return [pair.privateKey.extractable, taken, document.cookie];
            }"""
        )
        assert told == [False, "InvalidAccessError", ""]

    in_browser(tmp_path, trial)


def test_a_second_phone_can_stop_but_not_allow(tmp_path: Path) -> None:
    async def trial(car: OwnersCar, tab: Page, context: BrowserContext) -> None:
        await allow(tab)
        assert context.browser is not None
        other = await (await context.browser.new_context(**PHONE)).new_page()
        await other.goto(f"{tab.url}pair#{pairing.offer_pairing(tmp_path, car.now_ms)}")
        await other.click("#go")
        await other.wait_for_selector("#withdraw:visible")
        assert not await other.is_visible("#change")
        assert "on another phone" in await other.inner_text("#key-words")
        await other.click("#withdraw")
        await other.wait_for_selector("#withdraw", state="hidden")
        assert not car.works
        assert not await other.is_visible("#allow")

    in_browser(tmp_path, trial)


def test_it_can_be_installed(tmp_path: Path) -> None:
    async def trial(_: OwnersCar, tab: Page, context: BrowserContext) -> None:
        await tab.evaluate("navigator.serviceWorker.ready")
        session = await context.new_cdp_session(tab)
        manifest = await session.send("Page.getAppManifest")
        assert manifest["errors"] == []
        assert '"standalone"' in manifest["data"]
        problems = await session.send("Page.getInstallabilityErrors")
        left = {problem["errorId"] for problem in problems["installabilityErrors"]} - {"in-incognito"}
        assert left == set()

    in_browser(tmp_path, trial)


CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (at) => {
    while (at && getComputedStyle(at).backgroundColor === "rgba(0, 0, 0, 0)") at = at.parentElement;
    return getComputedStyle(at).backgroundColor;
  };
  const poor = [];
  const texts = "h1, h2, p, li, th, td, button, caption, label, label span, legend, summary";
  for (const at of document.querySelectorAll(texts)) {
    if (!at.checkVisibility() || !at.textContent.trim()) continue;
    const [one, two] = [light(getComputedStyle(at).color), light(ground(at))];
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (ratio < 4.5) poor.push(`${at.tagName} ${at.textContent.slice(0, 20)} ${ratio.toFixed(1)}`);
  }
  return poor;
}"""
SMALL = """() => [...document.querySelectorAll("button, input, summary")]
  .filter((at) => at.checkVisibility())
  .filter((at) => (at.closest(".tick") ?? at).getBoundingClientRect().height < 44)
  .map((at) => at.textContent || at.name)"""
NAMELESS = """() => [...document.querySelectorAll("input")]
  .filter((at) => ![...at.labels].some((label) => label.textContent.trim())).map((at) => at.name)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_and_tap_it(tmp_path: Path, scheme: str) -> None:
    async def trial(_: OwnersCar, tab: Page, _context: BrowserContext) -> None:
        await allow(tab)
        await tab.click("#change")
        await tab.click("text=Add a time at which I need the car")
        await tab.click("text=Without the cable")
        assert await tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert await tab.evaluate(CONTRAST) == []
        assert await tab.evaluate(SMALL) == []
        assert await tab.evaluate(NAMELESS) == []
        assert await tab.evaluate("document.querySelectorAll('h1').length") == 1
        await tab.keyboard.press("Tab")
        assert await tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"

    in_browser(tmp_path, trial, color_scheme=scheme)


def test_a_link_that_was_used_says_what_to_do(tmp_path: Path) -> None:
    async def trial(_: OwnersCar, tab: Page, _context: BrowserContext) -> None:
        await tab.goto(f"{tab.url}pair#used")
        await tab.click("#go")
        await tab.wait_for_selector("#go", state="hidden")
        assert "make a new one" in await tab.inner_text("#told")

    in_browser(tmp_path, trial)
