"""A scenario: what a simulated fleet lives through, as a TOML file that a person can read and change.

Decides: which fields there are, their bounds, and what stands where a file says nothing (the mixed week). Must not:
draw anything; ``sim.world`` makes a world of a scenario, people and a seed.
Called by: ``sim.world``, ``sim.arrivals``, ``sim.prices``, the command line, benchmarks.

The scenarios that come with the package are the files beside this one in ``scenarios/``. Times of a scenario are hours
since its first Monday, 00:00 local time; shares are parts of one.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from motorpool.errors import SetupError

MAX_REGIONS: Final = 16  # bits of a job's region mask
MAX_MODELS: Final = 32  # bits of what a vehicle has on its disk
MAX_ZONES: Final = 64
SUFFIX: Final = ".toml"

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0, le=1e9)]
NotNegative = Annotated[float, Meta(ge=0.0, le=1e9)]
Hour = Annotated[float, Meta(ge=0.0, le=24.0 * 366)]
Text = Annotated[str, Meta(min_length=1, max_length=2000)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file. A field that it does not know is an error, not a comment."""


class People(_Part, frozen=True, kw_only=True):
    """Whose cars they are: weights of private chargers at home, shared ones in garages, and work places.

    ``jitter_min``: each vehicle lives a real week moved by one amount of at most so many minutes, so that what happens
    at one time in the real weeks still happens at about one time. ``silent_share`` of the departures are not announced:
    the cell hears nothing. ``settle_s`` after plugging in, and ``leave_s`` before unplugging, the guard says no.
    """

    home: NotNegative = 0.70
    shared: NotNegative = 0.15
    work: NotNegative = 0.15
    jitter_min: Annotated[float, Meta(ge=0.0, le=120.0)] = 10.0
    silent_share: Share = 1.0
    settle_s: Annotated[float, Meta(ge=0.0, le=3600.0)] = 120.0
    leave_s: Annotated[float, Meta(ge=0.0, le=3600.0)] = 20.0


class Region(_Part, frozen=True, kw_only=True):
    """A region of residency, by the code of its country, and its market's price of electricity.

    ``zones`` is into how many price zones it falls, ``price_micro_kwh`` the mean in millionths, ``solar`` how deep the
    sun presses the price and the carbon at noon.
    """

    code: Annotated[str, Meta(pattern="^[A-Z]{2}(-[A-Z0-9]{1,3})?$")]
    share: Positive
    zones: Annotated[int, Meta(ge=1, le=8)] = 1
    price_micro_kwh: Annotated[int, Meta(ge=0, le=2_000_000)] = 200_000
    solar: Share = 0.5


class Hardware(_Part, frozen=True, kw_only=True):
    """A class of computers in vehicles: memory for models, tokens a second over all its slots, watts at work."""

    name: Text
    share: Positive
    memory_gb: Annotated[int, Meta(ge=1, le=255)]
    tokens_s: Positive
    watts_w: Annotated[int, Meta(ge=1, le=10_000)]


class Model(_Part, frozen=True, kw_only=True):
    """A model: what it needs in memory, how big its file is, which part of the vehicles that could run it have it."""

    name: Text
    memory_gb: Annotated[int, Meta(ge=1, le=255)]
    file_gb: Positive
    on_disk_share: Share


class Tenant(_Part, frozen=True, kw_only=True):
    """A customer: its part of the jobs, and the weight that it has paid for."""

    name: Text
    demand: Positive = 1.0
    weight: Positive = 1.0


class Speed(_Part, frozen=True, kw_only=True):
    """How speeds scatter: log-normal around the class; ``slow_share`` are slower by a factor and do not say so."""

    sigma: Annotated[float, Meta(ge=0.0, le=2.0)] = 0.5
    slow_share: Share = 0.02
    slow_factor: Annotated[float, Meta(ge=1.0, le=100.0)] = 5.0
    link_mbps: Positive = 100.0


class Faults(_Part, frozen=True, kw_only=True):
    """What goes wrong in a vehicle: its engine dies so often, its network is gone so often and for so long on average.

    A vehicle without network works on; one whose engine has died has lost what it was doing and needs ``restart_s``.
    """

    crash_per_h: Annotated[float, Meta(ge=0.0, le=60.0)] = 0.01
    restart_s: NotNegative = 60.0
    outage_per_h: Annotated[float, Meta(ge=0.0, le=60.0)] = 0.3
    outage_mean_min: Annotated[float, Meta(gt=0.0, le=1440.0)] = 3.0


class Trust(_Part, frozen=True, kw_only=True):
    """Shares of new vehicles, proven ones, and ones whose computer can attest itself; and of those that cheat.

    ``cheater_share`` always give bad results, ``sleeper_share`` begin after a while, ``liar_share`` claim to be
    ``lie_factor`` times as fast as they are.
    """

    new: NotNegative = 0.2
    proven: NotNegative = 0.6
    attested: NotNegative = 0.2
    cheater_share: Share = 0.0
    sleeper_share: Share = 0.0
    liar_share: Share = 0.0
    lie_factor: Positive = 3.0


class Site(_Part, frozen=True, kw_only=True):
    """Car parks: vehicles of these kinds share a transformer; ``site_w`` is what it gives to computing."""

    vehicles: Annotated[int, Meta(ge=2, le=5000)] = 40
    watts_w: Annotated[int, Meta(ge=100, le=10_000_000)] = 6_000


class Stream(_Part, frozen=True, kw_only=True):
    """Jobs of one sort: ``share`` of the work that has deadlines, cut into so many ``jobs``.

    ``deadlines_h`` are drawn by ``deadline_weights``. ``due_clock`` (``"07:30"``): due at that time of a day, handed in
    one deadline before. ``arrivals``: at any time, or mostly in office hours, when few vehicles are there. ``from_h``
    and ``hours``: only handed in then. Sizes are log-normal and grow with the deadline to the power ``size_exponent``;
    a job that may run on a part of the fleet only is smaller in that proportion, and none is more than ``max_part`` of
    what the fleet can do until its deadline. ``locked_share`` may run in one region only. ``trust_weights`` are for
    jobs that take any vehicle, proven, or attested ones; ``model_weights`` in the order of the models. ``value`` is the
    price of a million tokens.
    """

    name: Text
    jobs: Count
    share: Share = 1.0
    deadlines_h: tuple[Annotated[float, Meta(gt=0.0, le=24.0 * 31)], ...] = (1.0, 4.0, 12.0, 24.0)
    deadline_weights: tuple[NotNegative, ...] = (1.0, 1.0, 1.0, 1.0)
    due_clock: Annotated[str, Meta(pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")] | None = None
    weekdays_only: bool = False
    arrivals: Literal["office", "flat"] = "flat"
    from_h: Hour = 0.0
    hours: Hour | None = None
    size_sigma: Annotated[float, Meta(ge=0.0, le=3.0)] = 0.8
    size_exponent: Annotated[float, Meta(ge=0.0, le=2.0)] = 0.5
    max_part: Annotated[float, Meta(gt=0.0, le=10.0)] = 0.1
    locked_share: Share = 0.5
    locked_region: str | None = None
    trust_weights: tuple[NotNegative, ...] = (0.7, 0.25, 0.05)
    model_weights: tuple[NotNegative, ...] = (0.6, 0.3, 0.1)
    tokens_per_line: tuple[Positive, Positive] = (100.0, 800.0)
    value: NotNegative = 0.06


class Rounds(_Part, frozen=True, kw_only=True):
    """Rounds of federated training: all of a unit on one vehicle in one go, or nothing.

    Each round wants ``vehicles_share`` of the fleet for ``unit_s`` seconds of work on a vehicle of middle speed, plus
    ``transfer_s`` for getting and giving weights, within ``window_min``; ``quorum`` of the units is enough.
    """

    count: Count
    vehicles_share: Share = 0.05
    unit_s: Positive = 600.0
    transfer_s: NotNegative = 60.0
    window_min: Positive = 60.0
    quorum: Share = 0.9
    from_h: Hour = 0.0
    hours: Hour | None = None
    value: NotNegative = 0.1


class Heat(_Part, frozen=True, kw_only=True):
    """A heat wave: in these regions (none named: all) speed is times ``factor`` between two times of each day."""

    regions: tuple[str, ...] = ()
    from_h: Hour = 0.0
    hours: Hour = 168.0
    clock_from_h: Annotated[float, Meta(ge=0.0, le=24.0)] = 11.0
    clock_to_h: Annotated[float, Meta(ge=0.0, le=24.0)] = 21.0
    factor: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.6


class BrownOut(_Part, frozen=True, kw_only=True):
    """Networks of ``share`` of the vehicles are gone for ``minutes``; ``times`` times, ``every_min`` apart."""

    from_h: Hour
    minutes: Positive = 10.0
    share: Share = 0.2
    regions: tuple[str, ...] = ()
    times: Annotated[int, Meta(ge=1, le=1000)] = 1
    every_min: Positive = 30.0


class PriceEvent(_Part, frozen=True, kw_only=True):
    """The price of some regions (none named: all) is times ``factor`` plus ``add_micro_kwh`` for some hours."""

    from_h: Hour
    hours: Positive
    regions: tuple[str, ...] = ()
    factor: Annotated[float, Meta(ge=-100.0, le=100.0)] = 1.0
    add_micro_kwh: Annotated[int, Meta(ge=-10_000_000, le=10_000_000)] = 0


class GridEvent(_Part, frozen=True, kw_only=True):
    """Vehicles of one price zone feed the grid: ``share`` of them may not compute for some hours."""

    zone: Annotated[int, Meta(ge=0, lt=MAX_ZONES)]
    from_h: Hour
    hours: Positive
    share: Share = 1.0


class Calendar(_Part, frozen=True, kw_only=True):
    """Days on which people live as on a Sunday (0 is the first Monday), and a change of clocks.

    From 02:00 of ``clock_change_day`` on people come and go ``clock_change_min`` earlier than the cell's clock says
    (60 in spring, -60 in autumn). ``vehicles_know``: the vehicles' forecasts follow the new time.
    """

    holidays: tuple[Annotated[int, Meta(ge=0, le=366)], ...] = ()
    clock_change_day: Annotated[int, Meta(ge=0, le=366)] | None = None
    clock_change_min: Annotated[int, Meta(ge=-120, le=120)] = 60
    vehicles_know: bool = True


class ControlFault(_Part, frozen=True, kw_only=True):
    """The cell itself: it crashes and starts again, or is cut off from ``share`` of the vehicles, for ``seconds``."""

    kind: Literal["crash", "partition"]
    from_h: Hour
    seconds: Positive = 60.0
    share: Share = 1.0


REGIONS: Final = (
    Region(code="DE", share=0.35, zones=2, price_micro_kwh=220_000, solar=0.7),
    Region(code="FR", share=0.25, price_micro_kwh=180_000, solar=0.4),
    Region(code="NO", share=0.2, zones=2, price_micro_kwh=90_000, solar=0.05),
    Region(code="GB", share=0.2, price_micro_kwh=230_000, solar=0.3),
)


HARDWARE: Final = (
    Hardware(name="16 GB", share=0.35, memory_gb=16, tokens_s=110.0, watts_w=55),
    Hardware(name="32 GB", share=0.5, memory_gb=32, tokens_s=283.0, watts_w=130),
    Hardware(name="64 GB", share=0.15, memory_gb=64, tokens_s=420.0, watts_w=190),
)


MODELS: Final = (
    Model(name="small", memory_gb=6, file_gb=2.5, on_disk_share=0.95),
    Model(name="middle", memory_gb=12, file_gb=8.0, on_disk_share=0.6),
    Model(name="large", memory_gb=28, file_gb=18.0, on_disk_share=0.4),
)


TENANTS: Final = (
    Tenant(name="a", demand=0.5),
    Tenant(name="b", demand=0.3),
    Tenant(name="c", demand=0.2, weight=2.0),
)
STREAMS: Final = (Stream(name="documents", jobs=800),)


class Scenario(_Part, frozen=True, kw_only=True):
    """A whole scenario. ``load`` is all work that has a deadline, as a part of what the fleet can do in that time.

    ``best_effort`` is work without a deadline, in the same measure: 0.5 and a load of 0.8 mean that there always is
    something to do. ``vehicles`` is how many unless the caller says otherwise.
    """

    title: Text
    why: Text
    days: Annotated[int, Meta(ge=1, le=366)] = 7
    vehicles: Annotated[int, Meta(ge=1, le=2_000_000)] = 5_000
    load: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.8
    best_effort: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.5
    people: People = People()
    regions: tuple[Region, ...] = REGIONS
    hardware: tuple[Hardware, ...] = HARDWARE
    models: tuple[Model, ...] = MODELS
    tenants: tuple[Tenant, ...] = TENANTS
    streams: tuple[Stream, ...] = STREAMS
    speed: Speed = Speed()
    faults: Faults = Faults()
    trust: Trust = Trust()
    sites: Site = Site()
    calendar: Calendar = Calendar()
    rounds: Rounds | None = None
    heat: tuple[Heat, ...] = ()
    brownouts: tuple[BrownOut, ...] = ()
    price_events: tuple[PriceEvent, ...] = ()
    grid_events: tuple[GridEvent, ...] = ()
    control_faults: tuple[ControlFault, ...] = ()

    @property
    def zones(self) -> int:
        """How many price zones there are over all regions."""
        return sum(region.zones for region in self.regions)

    def region_mask(self, codes: Iterable[str]) -> int:
        """Bits of these regions; of all of them when none is named."""
        places = [region.code for region in self.regions]
        return sum(1 << places.index(code) for code in codes) or (1 << len(places)) - 1


def names() -> list[str]:
    """The scenarios of the package, in order: ``s1_mixed_week`` and so on."""
    found = [item.name.removesuffix(SUFFIX) for item in _folder().iterdir() if item.name.endswith(SUFFIX)]
    return sorted(found, key=lambda name: (int(name[1 : name.index("_")]), name))


def load(name_or_path: str | Path) -> Scenario:
    """A scenario of the package by its name or number (``s1``), or a file of one's own.

    Raises SetupError that names the field at fault, or says which scenarios there are.
    """
    text = str(name_or_path)
    known = names()
    chosen = [name for name in known if text in {name, name.split("_", 1)[0]}]
    if chosen:
        return parse((_folder() / f"{chosen[0]}{SUFFIX}").read_text("utf-8"), chosen[0])
    path = Path(name_or_path)
    if not path.is_file():
        text = f"there is no scenario {text}: name a TOML file or one of {', '.join(known)}"
        raise SetupError(text, code="no_scenario")
    try:
        return parse(path.read_text("utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read {path.name}: {type(error).__name__}", code="bad_scenario") from error


def parse(text: str, name: str) -> Scenario:
    """The scenario of a file's text; ``name`` is for the error."""
    try:
        found = msgspec.convert(tomllib.loads(text), Scenario)
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"{name} is not TOML: {error}", code="bad_scenario") from error
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        parts = [where.strip("`").removeprefix("$").lstrip(".")]
        if "unknown field" in what:
            parts.append(what.split("`")[1])
        field = ".".join(part for part in parts if part) or None
        text = f"{name}: {what}" + (f" (in {field})" if field else "")
        raise SetupError(text, code="bad_scenario", param=field) from error
    for field, what in _contradictions(found):
        raise SetupError(f"{name}: {field} {what}", code="bad_scenario", param=field)
    return found


def _folder() -> Traversable:
    return resources.files("motorpool.sim") / "scenarios"


def _contradictions(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """What no single field can say: the field, and what is wrong with it."""
    codes = [region.code for region in scenario.regions]
    for field, count, most in (
        ("regions", len(codes), MAX_REGIONS),
        ("hardware", len(scenario.hardware), 255),
        ("models", len(scenario.models), MAX_MODELS),
        ("tenants", len(scenario.tenants), 65_535),
    ):
        if not 1 <= count <= most:
            yield field, f"must be 1 to {most} entries, not {count}"
            return
    if len(set(codes)) < len(codes):
        yield "regions", "name a code twice"
    if scenario.zones > MAX_ZONES:
        yield "regions", f"have more than {MAX_ZONES} zones together"
    yield from _weight_contradictions(scenario)
    for field, code in _named_regions(scenario):
        if code not in codes:
            yield field, f"names a region that is not in the scenario: one of {', '.join(codes)}"
    for at, event in enumerate(scenario.grid_events):
        if event.zone >= scenario.zones:
            yield f"grid_events[{at}].zone", f"must be below {scenario.zones}"
    biggest = max(hardware.memory_gb for hardware in scenario.hardware)
    for at, model in enumerate(scenario.models):
        if model.memory_gb > biggest:
            yield f"models[{at}].memory_gb", "fits on no hardware of the scenario"
    for at, stream in enumerate(scenario.streams):
        yield from _stream_contradictions(scenario, stream, f"streams[{at}]")


def _weight_contradictions(scenario: Scenario) -> Iterator[tuple[str, str]]:
    people, trust = scenario.people, scenario.trust
    if people.home + people.shared + people.work <= 0.0:
        yield "people", "have no weight above 0"
    if trust.new + trust.proven + trust.attested <= 0.0:
        yield "trust", "has no weight above 0"
    if trust.cheater_share + trust.sleeper_share + trust.liar_share > 1.0:
        yield "trust", "has shares that are more than 1 together"
    shares = sum(stream.share for stream in scenario.streams if stream.jobs)
    if scenario.load > 0.0 and not math.isclose(shares, 1.0, abs_tol=1e-6):
        yield "streams", f"have shares that add up to {shares:g}, not to 1"


def _named_regions(scenario: Scenario) -> Iterator[tuple[str, str]]:
    for field in ("heat", "brownouts", "price_events"):
        for at, part in enumerate(getattr(scenario, field)):
            for code in part.regions:
                yield f"{field}[{at}].regions", code
    for at, stream in enumerate(scenario.streams):
        if stream.locked_region is not None:
            yield f"streams[{at}].locked_region", stream.locked_region


def _stream_contradictions(scenario: Scenario, stream: Stream, field: str) -> Iterator[tuple[str, str]]:
    horizon_h = scenario.days * 24.0
    for part, weights, count in (
        ("deadline_weights", stream.deadline_weights, len(stream.deadlines_h)),
        ("trust_weights", stream.trust_weights, 3),
        ("model_weights", stream.model_weights, len(scenario.models)),
    ):
        if not count or len(weights) != count or sum(weights) <= 0.0:
            yield f"{field}.{part}", f"must be {count} numbers, not all 0"
    if max(stream.deadlines_h, default=0.0) > horizon_h:
        yield f"{field}.deadlines_h", "has one that is longer than the scenario"
    if stream.from_h >= horizon_h:
        yield f"{field}.from_h", "is after the end of the scenario"
    if stream.tokens_per_line[0] > stream.tokens_per_line[1]:
        yield f"{field}.tokens_per_line", "must be the least and the most"
