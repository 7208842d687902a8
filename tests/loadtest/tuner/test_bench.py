from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loadtest.errors import LoadtestError
from loadtest.subject import Subject
from loadtest.trace import Trace
from loadtest.tuner.bench import Bench, Benches, benches, side_by_side

OPTIONS: dict[str, Any] = {"seed": 3, "noise_seeds": 2, "held_out": 0.25, "workers": 1, "max_batch_size": None}


def test_parts_when_a_quarter_is_held_out_then_no_request_is_in_both(subject: Subject, bursty: Trace) -> None:
    steps = benches(subject, bursty, (1.0,), **OPTIONS)
    searched, rest = steps.searched.traces[1.0], steps.held_out.traces[1.0]
    cut_s = 0.75 * bursty.duration_s
    assert np.concatenate([searched.arrival_s, rest.arrival_s + cut_s]) == pytest.approx(bursty.arrival_s)
    assert searched.duration_s <= cut_s
    assert steps.compared.traces is steps.searched.traces


def test_seeds_when_drawn_then_no_step_sees_the_noise_of_another_and_loads_ascend(
    subject: Subject, bursty: Trace
) -> None:
    steps = benches(subject, bursty, (1.5, 0.5), **OPTIONS)
    seeds = [*steps.searched.seeds, *steps.compared.seeds, *steps.held_out.seeds]
    assert len(set(seeds)) == 6
    assert list(steps.searched.traces) == [0.5, 1.5]
    half, more = (len(trace) for trace in steps.searched.traces.values())
    # Three times as many: binomial thinning of some 1,000 requests, whose standard deviation is below 20.
    assert more == pytest.approx(3 * half, rel=0.1)


def test_parts_when_nothing_is_held_out_then_the_trace_is_searched_whole_and_the_noise_still_differs(
    subject: Subject, bursty: Trace
) -> None:
    steps = benches(subject, bursty, (1.0,), **OPTIONS | {"held_out": 0.0})
    assert steps.searched.traces[1.0].sha256 == steps.held_out.traces[1.0].sha256 == bursty.sha256
    assert not set(steps.searched.seeds) & set(steps.held_out.seeds)


def test_figures_when_simulated_again_then_they_are_the_same_and_a_higher_load_is_no_faster(
    subject: Subject, bench: Bench
) -> None:
    low, high = bench.figures(subject.policy("foresight"))
    assert (low, high) == bench.figures(subject.policy("foresight"))
    assert (low.load, high.load) == (0.5, 1.0)
    assert low.p99_ms is not None
    assert high.p99_ms is not None
    assert low.p99_ms < high.p99_ms
    assert low.effective_accuracy is not None
    assert 0.9 < low.effective_accuracy < 1


def test_figures_when_simulated_side_by_side_then_they_are_those_of_one_by_one(subject: Subject, bench: Bench) -> None:
    active = subject.policy("foresight")
    with side_by_side(2) as run_all:
        assert bench.figures(active, run_all) == bench.figures(active)


def test_figures_when_nobody_can_be_served_then_latency_is_unknown_and_accuracy_nought(
    subject: Subject, steps: Benches
) -> None:
    impossible = Trace.of([0.0, 0.1], deadline_s=[1e-6, 1e-6])
    (found,) = Bench(subject, {1.0: impossible}, steps.searched.seeds).figures(subject.policy("foresight"))
    assert (found.p99_ms, found.mean_accuracy, found.effective_accuracy, found.shed_ratio) == (None, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("loads", "held_out", "message"),
    [
        ((1.0,), 1.0, "--held-out is a share"),
        ((0.0,), 0.3, "--load must be finite and above 0, got 0"),
        ((1.0, 1.0), 0.3, "--load must name each load once, got 1, 1"),
        ((1.0,), 0.999999, "the part of the trace that is searched holds no requests at load 1"),
        ((1e-9,), 0.3, "holds no requests at load 1e-09"),
    ],
)
def test_benches_when_an_option_means_nothing_then_the_error_says_why(
    subject: Subject, bursty: Trace, loads: tuple[float, ...], held_out: float, message: str
) -> None:
    with pytest.raises(LoadtestError, match=message):
        benches(subject, bursty, loads, **OPTIONS | {"held_out": held_out})
