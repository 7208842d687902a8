"""Bounds against the exhaustive optimum of small traces, and against every policy on the shipped bundle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.batch_bound import batch_bound
from loadtest.oracle import Demand, fluid_bound, oracle
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from loadtest.trace import Trace
from server.latency import LatencyModel
from server.policy_file import POLICY_NAMES, default_policy
from tests.loadtest.conftest import machine_model, poisson_trace
from tests.loadtest.exhaustive import Ask, optimum

TOLERANCE = 1e-9  # sums of a few floats in another order


@st.composite
def machines(draw: st.DrawFn) -> LatencyModel:
    """2 or 3 rungs, batches up to 3; fixed and marginal cost of each rung at random, not in order of anything."""
    rungs = draw(st.integers(2, 3))
    cost = st.floats(0.2, 3.0)
    rows = [np.cumsum([draw(cost) for _ in range(3)]) / 1000 for _ in range(rungs)]
    return LatencyModel(np.maximum.accumulate(rows), np.full(3, 0.05), (1, 2, 3), 3)


arrival_times = st.lists(st.floats(0, 0.012), min_size=1, max_size=5).map(sorted)
worths = st.lists(st.floats(0.1, 1.0), min_size=3, max_size=3)


def demands_of(asks: list[Ask]) -> list[Demand]:
    return [Demand(np.array([arrival]), np.array([due]), rungs) for arrival, due, rungs in asks]


@settings(max_examples=150, deadline=None)
@given(machines(), arrival_times, worths, st.floats(0.001, 0.02))
def test_bounds_when_there_is_one_worker_and_one_class_then_no_schedule_exceeds_them(
    model: LatencyModel, times: list[float], worth: list[float], deadline_s: float
) -> None:
    rungs, values = tuple(range(len(model.median_s))), np.array(worth[: len(model.median_s)])
    asks: list[Ask] = [(arrival, arrival + deadline_s, rungs) for arrival in times]
    best = optimum(asks, worth, model)
    arrivals = np.array(times)
    demand = Demand(arrivals, arrivals + deadline_s, rungs)
    assert fluid_bound([demand], values, np.array(model.median_s), 1) >= best - TOLERANCE
    assert batch_bound(arrivals, deadline_s, rungs, values, np.array(model.median_s)) >= best - TOLERANCE


@settings(max_examples=100, deadline=None)
@given(
    machines(),
    st.lists(st.tuples(st.floats(0, 0.012), st.floats(0.001, 0.02), st.integers(0, 1)), min_size=1, max_size=4),
    worths,
    st.integers(1, 2),
)
def test_fluid_bound_when_classes_and_workers_differ_then_no_schedule_exceeds_it(
    model: LatencyModel, requests: list[tuple[float, float, int]], worth: list[float], workers: int
) -> None:
    last = len(model.median_s) - 1
    asks: list[Ask] = [
        (arrival, arrival + deadline_s, tuple(range(floor, last + 1))) for arrival, deadline_s, floor in requests
    ]
    best = optimum(asks, worth, model, workers)
    values = np.array(worth[: len(model.median_s)])
    assert fluid_bound(demands_of(asks), values, np.array(model.median_s), workers) >= best - TOLERANCE


def test_batch_bound_when_the_grid_is_fine_then_it_meets_the_optimum_of_small_traces() -> None:
    """Tightness, over seeds: the bound may exceed the optimum only by the rounding of a grid of 400 steps per batch."""
    model = machine_model()
    values = np.array([0.90, 0.91, 0.92])
    for seed in range(20):
        generator = np.random.default_rng(seed)
        arrivals = np.sort(generator.uniform(0, 0.02, 6))
        deadline_s = float(generator.uniform(0.004, 0.012))
        asks: list[Ask] = [(float(arrival), float(arrival) + deadline_s, (0, 1, 2)) for arrival in arrivals]
        best = optimum(asks, values.tolist(), model)
        bound = batch_bound(arrivals, deadline_s, (0, 1, 2), values, np.array(model.median_s), steps_per_batch=400)
        # 6 requests, whose rungs differ by 0.02; a window that rounding opens would show as 0.9 more.
        assert best - TOLERANCE <= bound <= best + 6 * 0.02


def test_fluid_bound_when_mates_share_the_fixed_cost_then_a_cheap_image_is_charged_its_share_only() -> None:
    """A full image pays the start of the batch, cheap ones ride along: dearer to forbid than to allow for.

    Rung 0: 10 ms + 1 ms per image; rung 1: 11 ms per image. One full and two cheap: 11 + 1 + 1 = 13 ms, while
    T[1](n) / n + 2 T[0](n) / n = 11 + 2 * 13 / 3 = 19.7 ms would not fit into a window of 14 ms.
    """
    model = LatencyModel([[0.011, 0.012, 0.013], [0.011, 0.022, 0.033]], np.full(3, 0.05), (1, 2, 3), 3)
    asks: list[Ask] = [(0.0, 0.014, (1,)), (0.0, 0.014, (0,)), (0.0, 0.014, (0,))]
    assert optimum(asks, [0.5, 1.0], model) == 2.0
    assert fluid_bound(demands_of(asks), np.array([0.5, 1.0]), np.array(model.median_s), 1) >= 2.0 - TOLERANCE


@pytest.mark.parametrize("load", [0.7, 1.5])
def test_oracle_when_there_is_no_noise_then_no_policy_exceeds_it(
    subject: Subject, full_rate_hz: float, load: float
) -> None:
    trace = poisson_trace(load * full_rate_hz, 4.0, 7)
    machine = Machine(subject.latency(), noise=0.0)
    actives = {name: default_policy(subject.manifest, subject.ladder, name) for name in POLICY_NAMES}
    bound = oracle(trace, actives["foresight"], subject.ladder, machine, workers=1)
    assert bound is not None
    accuracy = np.array([*(rung.accuracy for rung in subject.ladder.rungs), 0.0], np.float64)
    for active in actives.values():
        outcomes = simulate(trace, subject.scheduler(active), active, machine)
        reached = accuracy[outcomes.rung][outcomes.outcome == 0].sum() / len(trace)
        assert reached <= bound.effective_accuracy + TOLERANCE


def test_oracle_when_budgets_and_workers_differ_then_the_fluid_bound_holds_for_foresight(
    subject: Subject, full_rate_hz: float
) -> None:
    trace = poisson_trace(2.5 * full_rate_hz, 3.0, 8, "low", "medium", "max", "auto")
    machine = Machine(subject.latency(), noise=0.0)
    active = default_policy(subject.manifest, subject.ladder)
    bound = oracle(trace, active, subject.ladder, machine, workers=2)
    assert bound is not None
    assert bound.method.startswith("fluid")
    outcomes = simulate(trace, subject.scheduler(active, workers=2), active, machine)
    accuracy = np.array([*(rung.accuracy for rung in subject.ladder.rungs), 0.0], np.float64)
    assert accuracy[outcomes.rung][outcomes.outcome == 0].sum() / len(trace) <= bound.effective_accuracy + TOLERANCE


def test_oracle_when_the_machine_is_slower_than_profiled_then_less_can_be_reached(
    subject: Subject, full_rate_hz: float
) -> None:
    trace = poisson_trace(1.5 * full_rate_hz, 2.0, 9)
    active = default_policy(subject.manifest, subject.ladder)
    fast, slow, slow_for_a_while = (
        oracle(trace, active, subject.ladder, machine, workers=1, steps_per_batch=None)
        for machine in (
            Machine(subject.latency()),
            Machine(subject.latency(), slowdown=2.0),
            Machine(subject.latency(), slowdown=2.0, slow_from_s=1.0),
        )
    )
    assert fast is not None
    assert slow is not None
    assert slow_for_a_while is not None
    assert slow.effective_accuracy < 0.7 * fast.effective_accuracy
    assert slow_for_a_while == fast  # a bound for the faster stretch holds for the slower one


def test_oracle_when_nobody_can_be_in_time_then_it_is_zero(subject: Subject) -> None:
    trace = Trace.of([0.0, 1.0], deadline_s=[1e-4, 1e-4])
    active = default_policy(subject.manifest, subject.ladder)
    bound = oracle(trace, active, subject.ladder, Machine(subject.latency()), workers=1)
    assert bound is not None
    assert bound.effective_accuracy == 0.0


def test_oracle_when_every_request_has_its_own_deadline_then_the_bound_is_the_same_as_one_by_one(
    subject: Subject,
) -> None:
    generator = np.random.default_rng(11)
    arrivals = np.sort(generator.uniform(0, 0.5, 300))
    trace = Trace.of(arrivals, deadline_s=generator.uniform(0.002, 0.1, 300))
    active = default_policy(subject.manifest, subject.ladder)
    machine = Machine(subject.latency())
    bound = oracle(trace, active, subject.ladder, machine, workers=1)
    assert bound is not None
    rungs = tuple(range(len(subject.ladder)))
    asks = [(float(a), float(a + d), rungs) for a, d in zip(arrivals, trace.deadline_s, strict=True)]
    values = np.array(subject.ladder.values)
    single = fluid_bound(demands_of(asks), values, np.array(machine.latency.median_s), 1) / len(trace)
    assert bound.effective_accuracy == pytest.approx(single)
