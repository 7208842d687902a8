from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.calibration import BatchSeen, Phase, Probe, batches_of, calibrate
from loadtest.client import Answered, Failed, PointUsed, Reply, Shed
from loadtest.errors import LoadtestError
from loadtest.subject import Subject

MS = 1e-3
SIZE = 16


def answered(subject: Subject, inference_s: float, rung: int | None = None) -> Answered:
    found = subject.ladder.rungs[subject.ladder.full if rung is None else rung]
    assert found.point is not None
    point = PointUsed(found.point.capacity_factor, found.num_selected_experts, found.slots, found.accuracy, 1.0)
    return Answered(point, 0, "ceiling", True, 0.0, inference_s, decode_s=0.1 * MS, total_s=1.0)


def probe_of(subject: Subject, contention: float, slowdown: float = 2.0) -> Probe:
    """As a machine would show it that takes 0.2 ms per refusal, and per answer 0.5 ms alone and 0.3 in the crowd."""
    latency = subject.latency(SIZE)
    alone_s = slowdown * latency.uniform_s(subject.ladder.full, 1)
    alone: list[tuple[Reply, float, float]] = [
        (answered(subject, alone_s), alone_s + 2 * MS, 0.01 * place) for place in range(20)
    ]
    # Four batches of 16 that took different times.
    crowd: list[tuple[Reply, float, float]] = [
        (answered(subject, (20 + batch) * MS), 50 * MS, 0.02 * (batch + 1) + 0.0001 * row)
        for batch in range(4)
        for row in range(SIZE)
    ]
    # batch_s = (0.5 - 0.3) / (1 - 4 / 64) = 0.21333, so an answer takes 0.3 - 0.21333 / 16 = 0.286667, decoding 0.1.
    beside_s = 64 * (0.286667 + 0.1) * MS
    inference_s = 4 * latency.uniform_s(subject.ladder.full, SIZE)
    elapsed_s = 4 * 0.213333 * MS + slowdown * inference_s + contention * beside_s
    refused: list[tuple[Reply, float, float]] = [(Shed("deadline"), 1 * MS, 0.001 * place) for place in range(10)]
    return Probe(
        Phase(alone, 0.2, 20 * 0.5 * MS), Phase(crowd, elapsed_s, 64 * 0.3 * MS), Phase(refused, 0.01, 10 * 0.2 * MS)
    )


@pytest.mark.parametrize("contention", [0.0, 0.5, 1.0])
def test_calibration_when_a_machine_was_probed_then_its_costs_are_found(subject: Subject, contention: float) -> None:
    found = calibrate(probe_of(subject, contention), subject, SIZE)
    costs = found.surroundings
    # Half of a refusal's 0.2 each; the answer has the rest of 0.286667; 2 ms alone less all stages is the way.
    assert costs.front_s == pytest.approx(0.1 * MS)
    assert costs.refuse_s == pytest.approx(0.1 * MS)
    assert costs.decode_s == pytest.approx(0.1 * MS)
    assert costs.batch_s == pytest.approx(0.213333 * MS, rel=1e-4)
    assert costs.answer_s == pytest.approx(0.186667 * MS, rel=1e-4)
    assert costs.way_s == pytest.approx(1.4 * MS)
    assert costs.contention == pytest.approx(contention, abs=1e-3)
    assert found.slowdown == pytest.approx(2.0, rel=1e-3)
    assert found.noise == 0
    assert [len(batch.rungs) for batch in found.batches] == [SIZE] * 4


def test_calibration_when_the_crowd_was_slower_than_contention_explains_then_the_machine_is(subject: Subject) -> None:
    found = calibrate(probe_of(subject, contention=3.0), subject, SIZE)
    assert found.surroundings.contention == 1
    # What is left of contention 3 must be inference: 2 * 64 * 0.386667 ms over all batches.
    excess = 2 * 64 * 0.386667 * MS / (4 * subject.latency(SIZE).uniform_s(subject.ladder.full, SIZE))
    assert found.slowdown == pytest.approx(2 + excess, rel=1e-3)


def test_calibration_when_some_hopeless_requests_were_answered_then_a_refusal_costs_what_an_answer_does(
    subject: Subject,
) -> None:
    probe = probe_of(subject, 0.5)
    fast = Phase([*probe.refused.replies, (answered(subject, 0.5 * MS), 1 * MS, 0.1)], 0.01, 1 * MS)
    costs = calibrate(replace(probe, refused=fast), subject, SIZE).surroundings
    assert costs.front_s + costs.refuse_s == pytest.approx(0.286667 * MS, rel=1e-4)


def test_calibration_when_nothing_was_answered_then_it_says_so(subject: Subject) -> None:
    probe = probe_of(subject, 0.5)
    down: list[tuple[Reply, float, float]] = [(Failed("500"), 1.0, 0.1)]
    with pytest.raises(LoadtestError, match="got 0 answers alone and 64 in the crowd, 20 are needed"):
        calibrate(replace(probe, alone=Phase(down, 1.0, 0.0)), subject, SIZE)


def test_batches_when_two_took_equally_long_then_they_are_told_apart_by_when_they_ended(subject: Subject) -> None:
    cheap = answered(subject, 4 * MS, rung=0)
    dear = answered(subject, 4 * MS)
    answers = [(cheap, 1.0, 1.0), (dear, 1.0, 1.001), (cheap, 1.0, 1.0055)]
    full = subject.ladder.full
    assert batches_of(answers, subject, SIZE) == (BatchSeen((0, full), 4 * MS), BatchSeen((0,), 4 * MS))


def test_batches_when_more_share_a_time_than_fit_then_they_are_several(subject: Subject) -> None:
    answers = [(answered(subject, 4 * MS), 1.0, 1.0)] * 5
    assert [len(batch.rungs) for batch in batches_of(answers, subject, 2)] == [2, 2, 1]


def test_batches_when_a_point_is_not_the_bundles_then_it_is_named(subject: Subject) -> None:
    stranger = replace(answered(subject, 4 * MS), point=PointUsed(9.0, 3, (1, 2), None, 1.0))
    with pytest.raises(LoadtestError, match=r"at K 3 with \[1, 2\] slots, which is no operating point of"):
        batches_of([(stranger, 1.0, 1.0)], subject, SIZE)
