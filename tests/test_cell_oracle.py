"""The bounds that schedulers are judged by: against brute force on tiny worlds, and against each other on real ones."""

from __future__ import annotations

from itertools import product

import msgspec
import numpy as np
import pytest
from bench import cell_baselines as baselines
from bench import cell_oracle as oracle
from bench.cell_oracle import Problem
from hypothesis import given, settings
from hypothesis import strategies as st

from motorpool.core.departures import HOUR_MS
from motorpool.sim import generator, scenario, world
from motorpool.sim.people import People


@pytest.fixture(scope="module")
def made_up() -> People:
    return generator.people(seed=3, users=(12, 5, 5), weeks=14)


def tiny(
    capacity: list[list[int]],
    may: list[list[int]],
    jobs: list[tuple[int, int, int, int]],
    cost: list[list[int]] | None = None,
) -> Problem:
    """Jobs are (sort, first slot, last slot, tokens)."""
    columns = np.array(jobs, np.int64).reshape(-1, 4)
    return Problem(
        slot_ms=HOUR_MS,
        capacity=np.array(capacity, np.float64),
        may=np.array(may, bool),
        micro_per_token=np.array(cost or np.zeros_like(capacity), np.float64),
        sort=columns[:, 0],
        begin=columns[:, 1],
        last=columns[:, 2],
        tokens=columns[:, 3].astype(np.float64),
    )


def brute(given: Problem) -> tuple[int, dict[int, float]]:
    """Every way to give each unit of capacity to a job or to nobody: most work, and the least cost of each amount."""
    places = [
        (group, slot)
        for group, slot in np.ndindex(given.capacity.shape)
        for _ in range(int(given.capacity[group, slot]))
    ]
    choices = [
        [None]
        + [
            job
            for job in range(len(given.tokens))
            if given.may[given.sort[job], group] and given.begin[job] <= slot <= given.last[job]
        ]
        for group, slot in places
    ]
    best: dict[tuple[int, ...], float] = {}
    for pick in product(*choices):
        done = np.bincount([job for job in pick if job is not None], minlength=len(given.tokens))
        if (done > given.tokens).any():
            continue
        taken = [place for place, job in zip(places, pick, strict=True) if job is not None]
        cost = sum(float(given.micro_per_token[group, slot]) for group, slot in taken)
        key = tuple(done.tolist())
        best[key] = min(best.get(key, np.inf), cost)
    most = max(sum(key) for key in best)
    whole = tuple(int(tokens) for tokens in given.tokens)
    return most, {sum(whole): best[whole]} if whole in best else {}


problems = st.builds(
    tiny,
    st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=2, max_size=2),
    st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=2), min_size=2, max_size=2),
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 2), st.integers(1, 3)).map(
            lambda job: (job[0], min(job[1:3]), max(job[1:3]), job[3])
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.lists(st.integers(-3, 9), min_size=3, max_size=3), min_size=2, max_size=2),
)


def small_enough(given: Problem) -> bool:
    return bool(given.capacity.sum() <= 7)


@settings(max_examples=80, deadline=None)
@given(problems.filter(small_enough))
def test_no_way_to_share_out_the_time_does_more_than_u2_and_one_does_as_much(given: Problem) -> None:
    most, _ = brute(given)
    assert oracle.u2(given) == pytest.approx(most, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(problems.filter(small_enough))
def test_the_least_cost_is_the_least_of_all_ways(given: Problem) -> None:
    _, costs = brute(given)
    found = oracle.energy(given)
    assert found.least_micro <= found.asap_micro + 1e-6
    if sum(given.tokens) in costs and found.tokens == pytest.approx(given.tokens.sum()):
        assert found.least_micro == pytest.approx(costs[int(given.tokens.sum())], abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=4, max_size=6),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=6),
)
def test_on_one_computer_the_earliest_deadline_first_does_as_much_as_the_flow(
    capacity: list[int], jobs: list[tuple[int, int, int]]
) -> None:
    slots = len(capacity)
    rows = [(0, min(begin, slots - 1), min(begin + length, slots) - 1, tokens) for begin, length, tokens in jobs]
    rows = [(sort, begin, max(begin, last), tokens) for sort, begin, last, tokens in rows]
    given = tiny([capacity], [[1]], rows)
    done = oracle.edf(given.begin, given.last + 1, given.tokens, given.capacity[0])
    assert (done <= given.tokens).all()
    assert done.sum() == pytest.approx(oracle.u2(given), abs=1e-6)


def test_a_job_that_may_run_nowhere_is_not_done() -> None:
    assert oracle.u2(tiny([[5, 5]], [[0]], [(0, 0, 1, 3)])) == 0.0
    assert oracle.u2(tiny([[0, 0]], [[1]], [(0, 0, 1, 3)])) == 0.0
    assert oracle.u2(tiny([[5, 5]], [[1]], [])) == 0.0
    # Work that is bound to the scarce class, and work that is not, share as best they can.
    assert oracle.u2(tiny([[2], [3]], [[1, 0], [1, 1]], [(0, 0, 0, 2), (1, 0, 0, 3)])) == pytest.approx(5.0)


def test_asap_takes_what_is_there_and_the_least_waits_for_the_cheap_hour() -> None:
    given = tiny([[4, 4]], [[1]], [(0, 0, 1, 4)], cost=[[10, 1]])
    found = oracle.energy(given)
    assert found.asap_micro == pytest.approx(40.0)
    assert found.least_micro == pytest.approx(4.0)
    assert found.saving == pytest.approx(0.9)
    urgent = oracle.energy(tiny([[4, 4]], [[1]], [(0, 0, 0, 4)], cost=[[10, 1]]))
    assert urgent.saving == pytest.approx(0.0)


def test_u0_is_all_seconds_times_speed(made_up: People) -> None:
    found = world.build(scenario.load("s1"), made_up, 300, seed=1)
    seconds = np.add.reduceat(np.append(found.end_ms - found.start_ms, 0), found.first[:-1]) / 1000.0
    seconds[np.diff(found.first) == 0] = 0.0
    assert oracle.u0(found) == pytest.approx(float((seconds * found.speed).sum()), rel=1e-6)


def test_bounds_of_a_real_world_are_in_order(made_up: People) -> None:
    found = world.build(scenario.load("s1"), made_up, 600, seed=1)
    with_all, deadlines = oracle.problem(found), oracle.problem(found, best_effort=False)
    assert with_all.capacity.sum() == pytest.approx(oracle.u0(found), rel=1e-9)
    assert with_all.tokens.sum() == pytest.approx(found.jobs.tokens.sum())
    all_of_it, on_time = oracle.u2(with_all), oracle.u2(deadlines)
    assert on_time <= all_of_it <= oracle.u0(found)
    assert all_of_it > 0.97 * oracle.u0(found)  # there always is something to do
    # Finer slots know better when a job may not run yet.
    assert oracle.u2(deadlines) <= oracle.u2(oracle.problem(found, slot_ms=HOUR_MS, best_effort=False)) * (1 + 1e-6)


def test_in_an_overload_not_all_can_be_done(made_up: People) -> None:
    found = world.build(scenario.load("s11"), made_up, 400, seed=1)
    given = oracle.problem(found, slot_ms=HOUR_MS)
    assert oracle.u2(given) < given.tokens.sum() * 0.9


def test_waiting_for_cheap_hours_saves_less_when_there_is_more_to_do(made_up: People) -> None:
    savings = []
    for load in (0.3, 0.8):
        setup = scenario.load("s9")
        light = msgspec.structs.replace(
            setup, load=load, days=2, price_events=(), streams=(msgspec.structs.replace(setup.streams[0], jobs=60),)
        )
        found = world.build(light, made_up, 200, seed=1)
        given = oracle.problem(found, slot_ms=HOUR_MS, best_effort=False, by_price=True)
        savings.append(oracle.energy(given).saving)
    assert savings[0] > savings[1] > 0.0


# -- what other schedulers make of the same worlds ---------------------------------------------------------------------


def small(name: str, made_up: People, **changes: object) -> world.World:
    setup = scenario.load(name)
    stream = msgspec.structs.replace(setup.streams[0], jobs=40, deadlines_h=(1.0, 4.0), deadline_weights=(1.0, 1.0))
    short = msgspec.structs.replace(setup, days=2, streams=(stream,), **changes)
    return world.build(short, made_up, 40, seed=2)


@pytest.mark.parametrize("policy", baselines.POLICIES)
def test_no_other_scheduler_does_more_than_can_be_done(policy: str, made_up: People) -> None:
    found = small("s1", made_up)
    outcome = baselines.run(found, policy, fast=False)
    assert 0.5 * outcome.available < outcome.useful <= oracle.u2(oracle.problem(found)) * (1 + 1e-6)
    computed = outcome.useful + outcome.lost + outcome.doubled + outcome.late
    assert computed <= outcome.available * (1 + 1e-6)
    assert outcome.useful <= found.jobs.tokens.sum()
    assert 0.0 <= outcome.lines_missed_share <= 1.0
    assert outcome == baselines.run(found, policy, fast=False)
    assert outcome.jobs == 40


def test_who_commits_each_request_loses_less(made_up: People) -> None:
    found = small("s1", made_up)
    whole, streamed = (baselines.run(found, policy, fast=False) for policy in ("fifo", "fifo_streaming"))
    assert streamed.lost < whole.lost / 2
    assert streamed.useful > whole.useful


def test_without_faults_and_haste_the_earliest_deadline_first_misses_nothing(made_up: People) -> None:
    setup = scenario.load("s1")
    anybody = msgspec.structs.replace(
        setup.streams[0],
        jobs=40,
        deadlines_h=(4.0,),
        deadline_weights=(1.0,),
        locked_share=0.0,
        trust_weights=(1.0, 0.0, 0.0),
        model_weights=(1.0, 0.0, 0.0),
    )
    calm = msgspec.structs.replace(
        setup,
        days=2,
        load=0.2,
        best_effort=0.0,
        streams=(anybody,),
        faults=scenario.Faults(crash_per_h=0.0, outage_per_h=0.0),
        people=scenario.People(silent_share=0.0),
        speed=scenario.Speed(slow_share=0.0),
    )
    found = world.build(calm, made_up, 80, seed=2)
    outcome = baselines.run(found, "edf", fast=False)
    assert outcome.jobs_missed == 0
    assert outcome.useful == pytest.approx(found.jobs.tokens.sum())
    assert outcome.doubled == 0.0


def test_nobody_notices_what_cheats_make_up(made_up: People) -> None:
    trust = scenario.Trust(cheater_share=0.3)
    assert baselines.run(small("s1", made_up), "random", fast=False).bad == 0.0
    outcome = baselines.run(small("s1", made_up, trust=trust), "random", fast=False)
    assert 0.1 < outcome.bad / outcome.useful < 0.6


def test_a_car_park_never_draws_more_than_its_transformer_gives(made_up: People) -> None:
    narrow = scenario.Site(vehicles=40, watts_w=200)
    wide = scenario.Site(vehicles=40, watts_w=100_000)
    owners = scenario.People(home=0.0, shared=0.5, work=0.5)
    energy_kwh = [
        baselines.run(small("s1", made_up, sites=sites, people=owners), "fifo", fast=False).energy_kwh
        for sites in (narrow, wide)
    ]
    assert energy_kwh[0] < energy_kwh[1]


def test_a_vehicle_that_is_cut_off_waits_for_its_network(made_up: People) -> None:
    calm = scenario.Faults(crash_per_h=0.0, outage_per_h=0.0)
    gone = (scenario.BrownOut(from_h=20.0, minutes=240.0, share=1.0),)
    before = baselines.run(small("s1", made_up, faults=calm), "fifo_streaming", fast=False)
    after = baselines.run(small("s1", made_up, faults=calm, brownouts=gone), "fifo_streaming", fast=False)
    assert after.useful < before.useful * 0.97
