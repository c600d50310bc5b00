"""The scenarios that come with the package: each loads and builds, and a wrong file says what is wrong with it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec
import numpy as np
import pytest

from motorpool.core.departures import HOUR_MS
from motorpool.errors import SetupError
from motorpool.sim import generator, scenario, world
from motorpool.sim.people import People
from motorpool.sim.scenario import Scenario

HEAD = 'title = "a"\nwhy = "b"\n'


@pytest.fixture(scope="module")
def made_up() -> People:
    return generator.people(seed=3, users=(12, 5, 5), weeks=14)


def test_there_are_fourteen_in_order() -> None:
    assert [name.split("_")[0] for name in scenario.names()] == [f"s{number}" for number in range(1, 15)]


@pytest.mark.parametrize("name", scenario.names())
def test_each_loads_by_name_number_and_path_and_builds(name: str, made_up: People) -> None:
    found = scenario.load(name)
    assert found == scenario.load(name.split("_", maxsplit=1)[0])
    with resources.as_file(resources.files("motorpool.sim") / "scenarios" / f"{name}.toml") as path:
        assert scenario.load(path) == found
    built = world.build(found, made_up, 500, seed=1)
    assert len(built) == 500
    assert built.horizon_ms == found.days * 24 * HOUR_MS
    assert (built.end_ms > built.start_ms).all()
    jobs = built.jobs
    assert len(jobs) >= sum(stream.jobs for stream in found.streams)
    assert jobs.deadline_ms.max() <= built.horizon_ms
    assert jobs.lines.min() >= 1
    assert built.heat.shape == (len(found.regions), found.days * 24)
    assert built.price_micro_kwh.shape == built.carbon_g_kwh.shape == (found.zones, found.days * 24)
    # Some vehicle can run every job.
    for row in range(len(jobs)):
        may = (jobs.region_mask[row] >> built.region & 1 == 1) & (built.memory_gb >= jobs.memory_gb[row])
        assert (may & (built.trust >= jobs.min_trust[row])).any()


def test_what_makes_each_different_is_in_its_world(made_up: People) -> None:
    def built(name: str) -> world.World:
        return world.build(scenario.load(name), made_up, 300, seed=1)

    usual = built("s1")
    assert usual.heat.min() == 1.0
    assert not len(usual.brownout_from_ms)
    assert not len(usual.control_from_ms)
    assert usual.silent.all()
    assert built("s3").scenario.hardware[2].share == 0.05
    brown = built("s4")
    assert len(brown.brownout_from_ms) == 14
    assert (np.diff(brown.brownout_from_ms) >= 0).all()
    assert set(brown.brownout_regions.tolist()) == {15, 1}
    control = built("s5")
    assert control.control_kind.tolist() == [world.CRASH, world.PARTITION, world.CRASH, world.PARTITION, world.CRASH]
    assert control.control_to_ms[0] - control.control_from_ms[0] == 60_000
    assert built("s8").heat.min() == pytest.approx(0.6)
    assert built("s9").price_micro_kwh.min() < 0
    assert (np.diff(built("s10").table_hour.astype(int)) % 168 == 1).all()
    assert scenario.load("s12").vehicles == 1_000_000
    assert not built("s14").silent.all()


def test_the_file_of_the_mixed_week_says_what_the_defaults_are() -> None:
    named = scenario.load("s1")
    assert named == Scenario(title=named.title, why=named.why)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("lod = 0.8", "lod"),
        ("load = -1.0", "load"),
        ('load = "much"', "load"),
        ("[people]\nhom = 1.0", "people.hom"),
        ("[people]\nhome = -1.0", "people.home"),
        ("[people]\nhome = 0\nshared = 0\nwork = 0", "people"),
        ("[trust]\nnew = 0\nproven = 0\nattested = 0", "trust"),
        ("[trust]\ncheater_share = 0.7\nliar_share = 0.7", "trust"),
        ("regions = []", "regions"),
        ('[[regions]]\ncode = "DE"\nshare = 1.0\n[[regions]]\ncode = "DE"\nshare = 1.0', "regions"),
        ('[[regions]]\ncode = "germany"\nshare = 1.0', "regions[0].code"),
        ('[[heat]]\nregions = ["US"]', "heat[0].regions"),
        ('[[streams]]\nname = "a"\njobs = 5\nlocked_region = "US"', "streams[0].locked_region"),
        ('[[streams]]\nname = "a"\njobs = 5\nshare = 0.5', "streams"),
        ('[[streams]]\nname = "a"\njobs = 5\ndeadlines_h = [1]', "streams[0].deadline_weights"),
        ('[[streams]]\nname = "a"\njobs = 5\ndeadlines_h = [200]\ndeadline_weights = [1]', "streams[0].deadlines_h"),
        ('[[streams]]\nname = "a"\njobs = 5\nmodel_weights = [1]', "streams[0].model_weights"),
        ('[[streams]]\nname = "a"\njobs = 5\nfrom_h = 500', "streams[0].from_h"),
        ('[[streams]]\nname = "a"\njobs = 5\ntokens_per_line = [9, 1]', "streams[0].tokens_per_line"),
        ('[[streams]]\nname = "a"\njobs = 5\ndue_clock = "25:00"', "streams[0].due_clock"),
        ("[[grid_events]]\nzone = 9\nfrom_h = 1\nhours = 1", "grid_events[0].zone"),
        (
            '[[models]]\nname = "a"\nmemory_gb = 200\nfile_gb = 1\non_disk_share = 1\n'
            '[[streams]]\nname = "a"\njobs = 5\nmodel_weights = [1]',
            "models[0].memory_gb",
        ),
    ],
)
def test_a_wrong_field_is_named(text: str, field: str) -> None:
    with pytest.raises(SetupError) as caught:
        scenario.parse(HEAD + text, "mine.toml")
    assert caught.value.param == field
    assert caught.value.message.startswith("mine.toml")
    assert field in caught.value.message


def test_a_file_that_is_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="is not TOML"):
        scenario.parse("title =", "mine.toml")
    with pytest.raises(SetupError, match="s1_mixed_week"):
        scenario.load(tmp_path / "no.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SetupError, match="cannot read"):
        scenario.load(tmp_path / "bytes.toml")


def test_regions_are_bits() -> None:
    usual = scenario.load("s1")
    assert usual.region_mask(()) == 0b1111
    assert usual.region_mask(["NO", "DE"]) == 0b0101
    assert usual.zones == 6


def test_a_changed_field_changes_the_world(made_up: People) -> None:
    light = world.build(scenario.parse(HEAD + "load = 0.2\nbest_effort = 0.0", "x"), made_up, 300, seed=1)
    heavy = world.build(scenario.parse(HEAD + "load = 0.4\nbest_effort = 0.0", "x"), made_up, 300, seed=1)
    assert heavy.jobs.tokens.sum() == pytest.approx(2 * light.jobs.tokens.sum(), rel=1e-3)
    assert msgspec.structs.asdict(light.scenario) != msgspec.structs.asdict(heavy.scenario)
