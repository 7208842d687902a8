from __future__ import annotations

import math

import numpy as np
import pytest

from loadtest.errors import LoadtestError, UnsuitableBundle
from loadtest.outcomes import SERVE_REASONS, Outcome, Outcomes
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from loadtest.trace import Trace
from server.policy_file import POLICY_NAMES, PolicyName, default_policy, parse_policy
from tests.loadtest.conftest import poisson_trace


def run(subject: Subject, trace: Trace, policy: str = "foresight", workers: int = 1, **machine: float) -> Outcomes:
    active = subject.policy(policy)
    true = Machine(subject.latency(), **machine)  # type: ignore[arg-type]
    return simulate(trace, subject.scheduler(active, workers=workers), active, true)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("workers", [1, 3])
def test_simulation_when_overloaded_then_every_request_has_exactly_one_outcome(
    subject: Subject, full_rate_hz: float, policy: PolicyName, workers: int
) -> None:
    trace = poisson_trace(2 * workers * full_rate_hz, 1.5, 1, "auto", "low", "max")
    outcomes = run(subject, trace, policy, workers)
    assert not (outcomes.outcome == Outcome.unfinished).any()
    answered = outcomes.answered
    assert outcomes.batch_size.sum() == answered.sum()
    assert np.array_equal(answered, outcomes.rung >= 0)
    shed = outcomes.outcome >= Outcome.SHED
    assert shed.any()
    assert np.isnan(outcomes.latency_s[shed]).all()
    assert (outcomes.latency_s[~shed] >= outcomes.queue_s[~shed]).all()
    assert outcomes.latency_s[answered] == pytest.approx((outcomes.queue_s + outcomes.inference_s)[answered])
    assert np.isnan(outcomes.inference_s[~answered]).all()
    assert not outcomes.labelled.any()
    assert (outcomes.queue_s[~shed] >= 0).all()


def test_simulation_when_budgets_differ_then_every_answer_lies_in_its_range(
    subject: Subject, full_rate_hz: float
) -> None:
    trace = poisson_trace(1.2 * full_rate_hz, 2.0, 2, "low", "medium", "high", "max", "auto")
    outcomes = run(subject, trace)
    budgets = default_policy(subject.manifest, subject.ladder).budgets
    for code, name in enumerate(trace.budgets):
        rungs = outcomes.rung[(trace.budget == code) & outcomes.answered]
        assert len(rungs)
        assert rungs.min() >= budgets[name].floor
        assert rungs.max() <= budgets[name].ceiling


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_simulation_when_run_twice_then_it_is_the_same_to_the_bit(
    subject: Subject, full_rate_hz: float, policy: PolicyName
) -> None:
    trace = poisson_trace(1.3 * full_rate_hz, 1.5, 3)
    first, second, other = (run(subject, trace, policy, seed=seed) for seed in (5, 5, 6))
    for column in ("outcome", "rung", "reason", "queue_s", "latency_s", "batch_size"):
        assert np.array_equal(getattr(first, column), getattr(second, column), equal_nan=True)
    assert not np.array_equal(first.latency_s, other.latency_s, equal_nan=True)


def test_simulation_when_alone_then_latency_is_that_of_one_image_at_the_ceiling(subject: Subject) -> None:
    outcomes = run(subject, Trace.of([0.5, 2.0]), "fixed", noise=0.0)
    alone_s = subject.latency().uniform_s(subject.ladder.full, 1)
    assert outcomes.latency_s == pytest.approx([alone_s, alone_s])
    assert outcomes.queue_s.tolist() == [0, 0]
    assert outcomes.outcome.tolist() == [Outcome.met, Outcome.met]
    assert [SERVE_REASONS[code] for code in outcomes.reason] == ["ceiling", "ceiling"]


def test_simulation_when_two_arrive_at_once_then_two_workers_take_one_each(subject: Subject) -> None:
    trace = Trace.of([1.0, 1.0])
    alone_s = subject.latency().uniform_s(subject.ladder.full, 1)
    assert run(subject, trace, "fixed", 2, noise=0.0).latency_s == pytest.approx([alone_s, alone_s])
    # The live engine starts a batch when the first comes, before it knows of the second.
    assert run(subject, trace, "fixed", 1, noise=0.0).latency_s == pytest.approx([alone_s, 2 * alone_s])


def test_simulation_when_a_batch_ends_as_a_request_comes_then_the_worker_is_free_for_it(subject: Subject) -> None:
    alone_s = subject.latency().uniform_s(subject.ladder.full, 1)
    outcomes = run(subject, Trace.of([0.0, alone_s]), "fixed", noise=0.0)
    assert outcomes.queue_s.tolist() == [0, 0]


def test_simulation_when_noise_is_on_then_its_mean_is_one_and_its_spread_the_profiles(subject: Subject) -> None:
    # One request a second: every batch holds one image and nothing waits.
    trace = Trace.of(np.arange(4000.0))
    ratio = run(subject, trace, "fixed").latency_s / subject.latency().uniform_s(subject.ladder.full, 1)
    sigma = subject.latency().sigma[1]
    # Standard error of the mean: sigma / sqrt(4000); of the deviation of the logarithm: sigma / sqrt(8000).
    assert ratio.mean() == pytest.approx(1, abs=4 * sigma / math.sqrt(4000))
    assert np.log(ratio).std() == pytest.approx(sigma, abs=4 * sigma / math.sqrt(8000))


def test_simulation_when_the_machine_becomes_slow_then_batches_from_then_on_take_longer(subject: Subject) -> None:
    outcomes = run(
        subject, Trace.of([0.0, 1.0, 2.0]), "fixed", noise=0.0, slowdown=2.0, slow_from_s=1.0, slow_until_s=2.0
    )
    alone_s = subject.latency().uniform_s(subject.ladder.full, 1)
    assert outcomes.latency_s == pytest.approx([alone_s, 2 * alone_s, alone_s])


def test_simulation_when_a_stall_outlasts_deadlines_then_waiting_requests_expire_at_their_deadline_or_later(
    subject: Subject,
) -> None:
    # The first batch takes 100 times as long as predicted; whoever was admitted behind it waits in vain.
    trace = Trace.of([0.0, 0.001, 0.002])
    outcomes = run(subject, trace, "fixed", noise=0.0, slowdown=100.0, slow_until_s=0.0005)
    assert outcomes.outcome.tolist() == [Outcome.late, Outcome.expired, Outcome.expired]
    deadline_s = default_policy(subject.manifest, subject.ladder).budgets["auto"].deadline_s
    assert (outcomes.latency_s >= deadline_s).all()


def test_simulation_when_a_request_has_its_own_deadline_then_it_counts_instead_of_the_budgets(subject: Subject) -> None:
    outcomes = run(subject, Trace.of([0.0, 1.0], deadline_s=[1e-4, 10.0]), noise=0.0)
    assert outcomes.outcome[0] >= Outcome.SHED  # nothing is done in 0.1 ms
    assert outcomes.outcome[1] == Outcome.met


def test_simulation_when_the_trace_is_empty_then_nothing_happens(subject: Subject) -> None:
    outcomes = run(subject, Trace.of([]))
    assert len(outcomes.outcome) == len(outcomes.batch_size) == 0


def test_simulation_when_progress_is_asked_for_then_it_ends_at_all_requests(subject: Subject) -> None:
    active = subject.policy("fixed")
    seen: list[int] = []
    simulate(Trace.of([0.0, 1.0]), subject.scheduler(active), active, Machine(subject.latency()), seen.append)
    assert seen == [0, 2]


def test_simulation_when_a_budget_is_unknown_then_the_error_names_those_that_exist(subject: Subject) -> None:
    with pytest.raises(LoadtestError, match="unknown budget 'gold' in the trace; the policy has low, medium"):
        run(subject, Trace.of([0.0], budgets=("gold",)))


def test_machine_when_slowdown_is_zero_then_it_is_refused(subject: Subject) -> None:
    with pytest.raises(LoadtestError, match=r"slowdown above 0, got noise 1\.0 and slowdown 0"):
        Machine(subject.latency(), slowdown=0)


def test_scheduler_when_batches_are_smaller_than_the_bundles_then_they_stay_so(
    subject: Subject, full_rate_hz: float
) -> None:
    active = subject.policy("fixed")
    scheduler = subject.scheduler(active, max_batch_size=4)
    outcomes = simulate(poisson_trace(full_rate_hz, 1.0, 4), scheduler, active, Machine(subject.latency(4)))
    assert outcomes.batch_size.max() == 4
    with pytest.raises(UnsuitableBundle, match="from 1 to 32, the bundle's, got 64"):
        subject.latency(64)


def test_policy_when_pinned_to_a_point_then_all_answers_are_there(subject: Subject, full_rate_hz: float) -> None:
    text = 'policy = "fixed"\n[budgets.auto]\nfloor = "0.5,1"\nceiling = "0.5,1"\n'
    active = parse_policy(text, subject.manifest, subject.ladder, "test")
    trace = poisson_trace(full_rate_hz, 0.5, 5)
    outcomes = simulate(trace, subject.scheduler(active), active, Machine(subject.latency()))
    assert set(outcomes.rung[outcomes.answered].tolist()) == {active.budgets["auto"].ceiling}
