"""Grams of CO2 by country."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from motorpool.core.carbon import DEFAULT_G_KWH, GRAMS_PER_KWH, grams, grams_per_kwh, micrograms


def test_every_number_can_be_that_of_a_country() -> None:
    assert all(re.fullmatch("[A-Z]{2}", code) for code in GRAMS_PER_KWH)
    assert all(1 <= value <= 1_400 for value in GRAMS_PER_KWH.values())
    assert len(GRAMS_PER_KWH) > 100


def test_a_part_of_a_country_has_its_number_and_case_does_not_matter() -> None:
    assert grams_per_kwh("us-ca") == grams_per_kwh("US") == GRAMS_PER_KWH["US"]
    assert grams_per_kwh("NO") < grams_per_kwh("DE") < grams_per_kwh("PL")


@given(st.text(max_size=12))
def test_an_unknown_region_has_the_default(region: str) -> None:
    known = region.split("-", 1)[0].upper() in GRAMS_PER_KWH
    assert known or grams_per_kwh(region) == DEFAULT_G_KWH
    assert known or grams_per_kwh(region, 123) == 123


@given(st.lists(st.integers(0, 10**9), max_size=20))
def test_grams_of_the_parts_add_up(parts: list[int]) -> None:
    assert sum(micrograms(part, "DE") for part in parts) == micrograms(sum(parts), "DE")


def test_a_kilowatt_hour_has_the_grams_of_the_table() -> None:
    assert grams(1_000_000, "FR") == GRAMS_PER_KWH["FR"]
