"""Prices of electricity and carbon by the hour, for each price zone of a scenario: made up, with the shape of markets.

Decides: the shape of a day (two peaks, a dip where there is sun), how days differ, and what a scenario's events do to
it. Must not: be taken for a forecast. Means are the scenario's; grams of CO2 are around ``core.carbon``'s yearly means.
Called by: ``sim.world``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from motorpool.core.carbon import grams_per_kwh
from motorpool.sim.scenario import Scenario

MAX_MICRO_KWH: Final = 100_000_000
DAY_SIGMA: Final = 0.12  # days differ by so much, as a part of the mean
# A weekday's price by hour as a part of its mean, without sun: night, morning peak, evening peak.
DAY_SHAPE: Final = (
    0.78, 0.74, 0.72, 0.72, 0.76, 0.86, 1.02, 1.20, 1.26, 1.16, 1.06, 1.00,
    0.96, 0.94, 0.94, 0.98, 1.08, 1.26, 1.38, 1.36, 1.24, 1.08, 0.96, 0.86,
)  # fmt: skip
# How the sun presses it, in parts of the mean at a share of 1: 08:00 to 18:00, most at 13:00.
SUN_FROM_H: Final = 8
SUN_TO_H: Final = 18
SUN_DEPTH: Final = 1.1
SUN_CARBON: Final = 0.7
WEEKEND: Final = 0.88


def zone_regions(scenario: Scenario) -> NDArray[np.uint8]:
    """The region of each price zone, in the order of zones."""
    counts = [region.zones for region in scenario.regions]
    return np.repeat(np.arange(len(counts), dtype=np.uint8), counts)


def hourly(scenario: Scenario, draw: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Price in millionths a kilowatt-hour, and grams of CO2 a kilowatt-hour, both by zone and hour.

    Prices can be below zero; carbon cannot. The hours are those of the scenario, from its first Monday.
    """
    hours = scenario.days * 24
    hour = np.arange(hours) % 24
    weekend = np.arange(hours) // 24 % 7 >= 5
    shape = np.array(DAY_SHAPE)
    shape = (shape / shape.mean())[hour] * np.where(weekend, WEEKEND, 1.0)
    sun = np.clip(np.sin(np.pi * (hour + 0.5 - SUN_FROM_H) / (SUN_TO_H - SUN_FROM_H)), 0.0, None)
    sun[(hour < SUN_FROM_H) | (hour >= SUN_TO_H)] = 0.0
    prices, carbon = [], []
    for index in zone_regions(scenario):
        region = scenario.regions[int(index)]
        days = 1.0 + DAY_SIGMA * draw.standard_normal(scenario.days)
        weather = np.clip(1.0 + 0.35 * draw.standard_normal(scenario.days), 0.0, 2.0)
        pressed = region.solar * sun * np.repeat(weather, 24)
        course = shape * np.repeat(np.clip(days, 0.5, 1.5), 24) - SUN_DEPTH * pressed
        # The dip makes the day cheaper: lift all of it, so that the mean stays what the scenario says.
        course += 1.0 - course.mean()
        prices.append(course * region.price_micro_kwh)
        dirty = np.clip(1.0 + 0.25 * (shape - 1.0) - SUN_CARBON * pressed, 0.1, None)
        carbon.append(dirty / dirty.mean() * grams_per_kwh(region.code))
    price = np.array(prices)
    for event in scenario.price_events:
        at = _hours_of(event.from_h, event.hours, hours)
        mask = scenario.region_mask(event.regions)
        for zone, index in enumerate(zone_regions(scenario)):
            if mask >> int(index) & 1:
                price[zone, at] = price[zone, at] * event.factor + event.add_micro_kwh
    limited = np.clip(price, -MAX_MICRO_KWH, MAX_MICRO_KWH)
    return np.rint(limited).astype(np.int32), np.rint(np.array(carbon)).astype(np.int32)


def _hours_of(from_h: float, hours: float, count: int) -> slice:
    return slice(min(int(from_h), count), min(int(np.ceil(from_h + hours)), count))
