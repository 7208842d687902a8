"""What the live benchmarks write, from figures that are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.calibration import BatchSeen, Calibration
from loadtest.surroundings import Surroundings
from tests.benchmarks import agreement
from tests.benchmarks.agreement import COMPARED, LOADS, Figures, Run
from tests.benchmarks.live_gateway import POLICIES, median_of
from tests.benchmarks.live_policies import KINDS, TRACES, Block, Kind, lead, markdown


def run(
    attainment: float, p50_s: float, load: str = "Poisson 0.3x", policy: str = "foresight", lag_s: float = 0.0
) -> Run:
    """Measured 90 % in time and a p50 of 20 ms."""
    measured, predicted = Figures(0.9, 0.8, 0.1, 0.02, 0.1), Figures(attainment, 0.8, 0.1, p50_s, 0.1)
    return Run(load, policy, 1, measured, predicted, lag_s, 0)


@pytest.mark.parametrize(
    ("attainment", "p50_s", "expected"),
    [(0.915, 0.0225, True), (0.885, 0.0175, True), (0.925, 0.02, False), (0.9, 0.0235, False), (0.9, 0.0165, False)],
)
def test_run_when_attainment_is_within_2_points_and_p50_within_15_percent_then_it_agrees(
    attainment: float, p50_s: float, expected: bool
) -> None:
    assert run(attainment, p50_s).agrees is expected


def test_agreement_when_one_run_is_off_and_its_generator_fell_behind_then_both_are_counted() -> None:
    runs = [run(0.9, 0.02, load, policy) for load in LOADS for policy in COMPARED]
    text = agreement.markdown([*runs, run(0.7, 0.02, lag_s=0.05)])
    assert "Of 11 runs 10 agree" in text
    assert "Attainment is within its bound in 10, p50 in 11." in text
    assert "Of the 10 runs in which the generator kept up 10 agree." in text
    # The largest difference stands beside the means, (90 + 70) / 2.
    assert "| Poisson 0.3x | 90.0 / 80.0 |" in text
    assert "| -20.0 points | +0 % | 1 of 2 |" in text


def blocks(effective: dict[Kind, dict[str, float]]) -> list[Block]:
    """Three repetitions, a point apart from each other."""
    return [
        Block(kind, trace, seed, policy, effective[kind][policy] + seed / 100, 0.9, 0.1, 0.0, 0.92, 0.02, 0.2)
        for kind in KINDS
        for trace in TRACES
        for seed in range(3)
        for policy in POLICIES
    ]


def test_ranking_when_live_swaps_two_policies_then_that_pair_is_opposite_and_named() -> None:
    simulated = {policy: 0.8 - 0.05 * place for place, policy in enumerate(POLICIES)}
    first, second, *_ = POLICIES
    live = simulated | {first: simulated[second], second: simulated[first]}
    found = blocks({"live": live, "simulated": simulated})
    trace = next(iter(TRACES))
    # Repetitions move all policies alike: paired differences do not spread.
    assert lead(found, "live", trace, first, second).high == pytest.approx(-0.05)
    text = markdown(found)
    assert f"Of 10 pairs 9 agree, 1 are opposite ({first} and {second}), 0 undecided." in text
    # 9 pairs of 10 in the same order: (9 - 1) / 10.
    assert text.count("Kendall's tau 0.80") == len(TRACES)


def test_ranking_when_a_lead_changes_its_sign_between_repetitions_then_the_pair_is_undecided() -> None:
    simulated = {policy: 0.8 - 0.05 * place for place, policy in enumerate(POLICIES)}
    found = blocks({"live": simulated, "simulated": simulated})
    first, second, *_ = POLICIES
    swapped = [
        replace(each, effective_accuracy=each.effective_accuracy + 0.2)
        if (each.kind, each.policy, each.seed) == ("live", second, 2)
        else each
        for each in found
    ]
    text = markdown(swapped)
    assert f"| {first} - {second} |" in text
    assert "undecided |" in text.split(f"| {first} - {second} |")[1].splitlines()[0]


def test_median_when_one_probe_was_disturbed_then_it_does_not_count() -> None:
    probes = [
        Calibration(Surroundings(front_s=front_s), slowdown, 1.0, hz, (BatchSeen((0,), hz),))
        for front_s, slowdown, hz in ((0.001, 1.1, 300.0), (0.009, 7.0, 80.0), (0.002, 1.2, 310.0))
    ]
    found = median_of(probes)
    assert (found.surroundings.front_s, found.slowdown, found.crowd_hz) == (0.002, 1.2, 300.0)
    assert found.batches == probes[-1].batches
