from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loadtest.arrivals import on_off
from loadtest.errors import LoadtestError
from loadtest.outcomes import Outcome, Outcomes
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from loadtest.surroundings import Surroundings
from loadtest.trace import Trace
from server.policy_file import parse_policy
from tests.loadtest.conftest import poisson_trace

MS = 1e-3
COSTS = Surroundings(
    front_s=0.2 * MS, decode_s=0.1 * MS, batch_s=0.3 * MS, answer_s=0.15 * MS, refuse_s=0.12 * MS, way_s=0.4 * MS
)


def run(
    subject: Subject,
    trace: Trace,
    surroundings: Surroundings | None,
    policy: str = "fixed",
    workers: int = 1,
    *,
    noise: float = 0.0,
    slowdown: float = 1.0,
    grace_s: float = 0.0,
) -> Outcomes:
    active = subject.policy(policy)
    machine = Machine(subject.latency(), noise=noise, slowdown=slowdown, surroundings=surroundings)
    return simulate(trace, subject.scheduler(active, workers=workers), active, machine, grace_s=grace_s)


def alone_s(subject: Subject) -> float:
    return subject.latency().uniform_s(subject.ladder.full, 1)


@pytest.mark.parametrize(("policy", "workers"), [("foresight", 1), ("slackfit", 3), ("aimd", 1)])
def test_surroundings_when_they_cost_nothing_then_the_run_is_that_without_them_to_the_bit(
    subject: Subject, policy: str, workers: int
) -> None:
    arrival_s = on_off(600.0 * workers, 1.5, np.random.default_rng(5), on_s=0.3, off_s=0.7)
    budgets = ("auto", "max", "low", "high")
    trace = Trace.of(arrival_s, np.random.default_rng(6).integers(0, 4, len(arrival_s)), budgets)
    free, without = (run(subject, trace, each, policy, workers, noise=1.0) for each in (Surroundings(), None))
    assert (without.outcome >= Outcome.SHED).any()
    for column in ("outcome", "rung", "reason", "queue_s", "latency_s", "batch_size"):
        assert np.array_equal(getattr(free, column), getattr(without, column), equal_nan=True), column


@pytest.mark.parametrize("contention", [0.0, 1.0])
def test_surroundings_when_a_request_is_alone_then_its_latency_is_the_sum_of_all_stages(
    subject: Subject, contention: float
) -> None:
    outcomes = run(subject, Trace.of([1.0]), replace(COSTS, contention=contention))
    # way 0.4 + front 0.2 + decode 0.1 + batch 0.3 + answer 0.15; loop and inference never work at the same time.
    assert outcomes.latency_s == pytest.approx([1.15 * MS + alone_s(subject)])
    assert outcomes.queue_s == pytest.approx([0])


def test_surroundings_when_two_come_at_once_then_the_loop_serves_them_one_after_the_other(subject: Subject) -> None:
    # Two workers, so that nobody waits for one. The loop: front A, front B, decode A, decode B. A starts after 0.5 ms,
    # B after 0.6; nothing else is to be done until they end.
    outcomes = run(subject, Trace.of([1.0, 1.0]), COSTS, workers=2)
    first_s = (0.2 + 0.5 + 0.3 + 0.15 + 0.2) * MS + alone_s(subject)
    # The end of B comes 0.1 ms after that of A, while the loop notes A (0.3): then note B (0.3), but A's answer is
    # behind it in the queue, for it is written when A has been noted: note A, note B, answer A, answer B.
    assert outcomes.latency_s == pytest.approx([first_s + 0.3 * MS, first_s + (0.3 + 0.15) * MS])


@pytest.mark.parametrize(("contention", "slower"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_contention_when_the_loop_works_during_a_batch_then_the_batch_takes_as_much_longer_as_its_share_of_that_work(
    subject: Subject, contention: float, slower: float
) -> None:
    # The second request comes while the first is inferred: 0.3 ms of loop work (front, decode) beside it.
    costs = Surroundings(front_s=0.2 * MS, decode_s=0.1 * MS, contention=contention)
    assert alone_s(subject) > 1 * MS
    outcomes = run(subject, Trace.of([1.0, 1.0 + 0.5 * MS]), costs)
    first_s = 0.3 * MS + alone_s(subject) + slower * 0.3 * MS
    # The second starts when the first has ended, with nothing beside it.
    assert outcomes.latency_s == pytest.approx([first_s, first_s + alone_s(subject) - 0.5 * MS])


def test_contention_when_one_processor_is_shared_then_a_busy_period_lasts_as_long_as_all_its_work(
    subject: Subject,
) -> None:
    count = 200
    costs = replace(COSTS, way_s=0.0, contention=1.0)
    # At once, with time enough: all are answered, and the processor never idles until the last answer.
    trace = Trace.of(np.zeros(count), deadline_s=np.full(count, 9.0))
    outcomes = run(subject, trace, costs)
    assert (outcomes.outcome == Outcome.met).all()
    sizes = outcomes.batch_size.tolist()
    inference_s = sum(subject.latency().uniform_s(subject.ladder.full, size) for size in sizes)
    loop_s = count * (costs.front_s + costs.decode_s + costs.answer_s) + len(sizes) * costs.batch_s
    assert outcomes.latency_s.max() == pytest.approx(inference_s + loop_s, rel=1e-9)


@pytest.mark.parametrize("policy", ["foresight", "slackfit", "aimd"])
def test_surroundings_when_overloaded_then_every_request_has_exactly_one_outcome_and_fewer_are_in_time(
    subject: Subject, full_rate_hz: float, policy: str
) -> None:
    trace = poisson_trace(1.5 * full_rate_hz, 2.0, 1, "auto", "low", "max")
    outcomes, without = (
        run(subject, trace, each, policy, noise=1.0) for each in (replace(COSTS, contention=1.0), None)
    )
    assert not (outcomes.outcome == Outcome.unfinished).any()
    assert outcomes.batch_size.sum() == outcomes.answered.sum()
    assert np.array_equal(outcomes.answered, outcomes.rung >= 0)
    shed = outcomes.outcome >= Outcome.SHED
    assert np.isnan(outcomes.latency_s[shed]).all()
    assert (outcomes.latency_s[~shed] >= outcomes.queue_s[~shed]).all()
    answered = outcomes.answered
    assert (outcomes.latency_s >= outcomes.queue_s + outcomes.inference_s)[answered].all()
    assert np.isnan(outcomes.inference_s[~answered]).all()
    met, met_without = ((each.outcome == Outcome.met).mean() for each in (outcomes, without))
    # 0.45 ms of loop work beside about 1.5 ms of inference per image.
    assert met < met_without - 0.05


def test_grace_when_the_way_eats_the_deadline_then_it_decides_what_the_client_calls_in_time(subject: Subject) -> None:
    deadline_s = 5 * alone_s(subject)
    trace = Trace.of([1.0], deadline_s=[deadline_s])
    far = Surroundings(way_s=deadline_s)  # the gateway's own deadline runs from the upload on, and is met
    late, met = (run(subject, trace, far, grace_s=grace_s) for grace_s in (0.0, deadline_s))
    assert late.outcome.tolist() == [Outcome.late]
    assert met.outcome.tolist() == [Outcome.met]
    assert late.latency_s == met.latency_s == pytest.approx([deadline_s + alone_s(subject)])


def test_surroundings_when_a_batch_stalls_then_those_behind_it_expire_and_cost_an_answer(subject: Subject) -> None:
    trace = Trace.of([0.0, 0.001, 0.002])
    outcomes = run(subject, trace, COSTS, slowdown=100.0)
    assert outcomes.outcome.tolist() == [Outcome.late, Outcome.expired, Outcome.expired]
    # Both leave when the first is noted; the loop tells them so one after the other, before it writes the answer.
    told_s = trace.arrival_s + outcomes.latency_s
    assert np.diff(told_s[[1, 2, 0]]) == pytest.approx([0.15 * MS, 0.15 * MS])


def test_surroundings_when_refusals_flood_the_loop_then_answers_wait_for_them(subject: Subject) -> None:
    costs = Surroundings(front_s=0.1 * MS, refuse_s=1 * MS)
    active = parse_policy('policy = "fixed"\n', subject.manifest, subject.ladder, "test")
    # While the first is inferred ten come that cannot be in time: each takes the loop 1.1 ms.
    arrival_s = np.array([0.0] + 10 * [0.5 * MS])
    trace = Trace.of(arrival_s, deadline_s=np.array([1.0] + 10 * [0.01 * MS]))
    machine = Machine(subject.latency(), noise=0.0, surroundings=costs)
    outcomes = simulate(trace, subject.scheduler(active), active, machine)
    assert (outcomes.outcome[1:] >= Outcome.SHED).all()
    # Fronts first, then refusals, then what became ready meanwhile: the end of the batch.
    assert alone_s(subject) < 11 * MS
    assert outcomes.latency_s[0] == pytest.approx(0.5 * MS + 11 * MS)


def test_surroundings_when_a_cost_is_negative_then_it_is_named() -> None:
    with pytest.raises(LoadtestError, match=r"answer_s of the surroundings must be finite and at least 0, got -1"):
        Surroundings(answer_s=-1.0)
