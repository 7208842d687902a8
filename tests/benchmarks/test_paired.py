from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.paired import Interval, interval, kendall_tau, verdict


def test_interval_when_values_are_normal_then_it_holds_the_mean_about_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(1)
    found = [interval(generator.normal(3.0, 1.0, 30), seed) for seed in range(200)]
    held = sum(each.low <= 3.0 <= each.high for each in found)
    # 190 expected, a little less for a percentile bootstrap of 30 values; standard deviation 3.
    assert 175 <= held <= 199
    # 2 * 1.96 / sqrt(30)
    assert np.mean([each.high - each.low for each in found]) == pytest.approx(0.716, rel=0.1)


def test_interval_when_all_values_are_one_then_it_is_that_value() -> None:
    assert interval([0.5] * 4) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("live", "simulated", "expected"),
    [
        ((1, 3), (2, 4), "agree"),
        ((-3, -1), (-4, -2), "agree"),
        ((1, 3), (-4, -2), "opposite"),
        ((-1, 3), (2, 4), "undecided"),
        ((1, 3), (0, 4), "undecided"),
    ],
)
def test_verdict_when_intervals_are_given_then_it_follows_from_their_signs(
    live: tuple[float, float], simulated: tuple[float, float], expected: str
) -> None:
    first, second = (Interval((low + high) / 2, low, high) for low, high in (live, simulated))
    assert verdict(first, second) == expected


def test_kendall_tau_when_one_pair_of_three_is_swapped_then_it_is_a_third() -> None:
    first = {"a": 3.0, "b": 2.0, "c": 1.0}
    # Two of three pairs in the same order: (2 - 1) / 3.
    assert kendall_tau(first, {"a": 2.0, "b": 3.0, "c": 1.0}) == pytest.approx(1 / 3)
    assert kendall_tau(first, first) == 1
    assert kendall_tau(first, {"a": 1.0, "b": 2.0, "c": 3.0}) == -1
