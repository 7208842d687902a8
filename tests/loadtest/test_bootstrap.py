from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.bootstrap import Floats, block_length, draw_weights, interval, quantile, ratio
from loadtest.bootstrap import _student as student

TRIALS = 200
# Two standard errors of a share of 0.95 in 200 trials are 0.031; blocks of few bins cover a little less than 0.95.
LEAST_COVERED = 0.89


def correlated(bins: int, correlation: float, spread: float, generator: np.random.Generator) -> Floats:
    """An autoregressive process: bins that resemble their neighbours."""
    noise = generator.normal(0, spread * math.sqrt(1 - correlation**2), bins)
    values = np.empty(bins)
    values[0] = generator.normal(0, spread)
    for place in range(1, bins):
        values[place] = correlation * values[place - 1] + noise[place]
    return values


class Runs:
    """Two runs whose shares of answers in time are 0.80 and 0.77 on average.

    Arguments:
        paired: one trace: what it does to a bin it does to both.
        correlation: of a bin with the next one.
    """

    truth = -0.03

    def __init__(self, seed: int, *, paired: bool, bins: int = 60, correlation: float = 0.4) -> None:
        self.bins = bins
        self.generator = generator = np.random.default_rng([seed, paired])
        self.offered = generator.poisson(200, bins)
        others = self.offered if paired else generator.poisson(200, bins)
        shared = correlated(bins, correlation, 0.05, generator)
        own = correlated(bins, correlation, 0.02, generator) + shared if paired else None
        other = correlated(bins, correlation, 0.05, generator) if own is None else own
        self.first = generator.binomial(self.offered, np.clip(0.80 + shared, 0, 1))
        self.second = generator.binomial(others, np.clip(0.77 + other, 0, 1))
        self.others = others

    def interval(self, *, paired: bool) -> tuple[float, float]:
        weights = draw_weights(self.bins, self.generator, 500)
        again = weights if paired else draw_weights(self.bins, self.generator, 500)
        found = ratio(self.second, self.others)(again) - ratio(self.first, self.offered)(weights)
        limits = interval(found, self.bins / block_length(self.bins))
        assert limits is not None
        return limits

    def of_single_requests(self) -> tuple[float, float]:
        """As if requests were independent."""
        first, second = self.first.sum() / self.offered.sum(), self.second.sum() / self.others.sum()
        variance = first * (1 - first) / self.offered.sum() + second * (1 - second) / self.others.sum()
        return second - first - 1.96 * math.sqrt(variance), second - first + 1.96 * math.sqrt(variance)


@pytest.mark.parametrize("paired", [False, True])
def test_interval_when_bins_resemble_their_neighbours_then_it_holds_the_truth_as_often_as_it_says(
    paired: bool,
) -> None:
    limits = [Runs(seed, paired=paired).interval(paired=paired) for seed in range(TRIALS)]
    covered = np.mean([low <= Runs.truth <= high for low, high in limits])
    assert LEAST_COVERED <= covered <= 0.985


def test_interval_when_requests_are_taken_for_independent_then_it_misses_the_truth_half_the_time() -> None:
    limits = [Runs(seed, paired=False).of_single_requests() for seed in range(TRIALS)]
    assert np.mean([low <= Runs.truth <= high for low, high in limits]) < 0.6


def test_interval_when_runs_are_paired_then_it_is_narrower_than_without() -> None:
    widths = {
        paired: np.mean([np.ptp(Runs(seed, paired=True).interval(paired=paired)) for seed in range(20)])
        for paired in (False, True)
    }
    assert widths[True] < 0.7 * widths[False]


def test_interval_when_a_percentile_differs_then_it_holds_the_true_difference_as_often_as_it_says() -> None:
    bins, per_bin, covered = 40, 100, []
    # A lognormal's 90 % quantile is its median times exp(1.2816 sigma); sigma is 0.3 within bins and 0.1 between.
    true = (0.024 - 0.02) * math.exp(1.2816 * math.hypot(0.3, 0.1))
    for seed in range(80):
        generator = np.random.default_rng(seed)
        found = []
        for median_s in (0.02, 0.024):
            scale = np.exp(correlated(bins, 0.4, 0.1, generator))
            latency_s = np.sort(median_s * scale[:, None] * generator.lognormal(0, 0.3, (bins, per_bin)), axis=1)
            grid = np.geomspace(0.003, 0.2, 300)
            counts = np.array([np.histogram(part, np.append(grid, 1.0))[0] for part in latency_s], np.float64)
            found.append(quantile(grid, counts, 0.9)(draw_weights(bins, generator, 300)))
        limits = interval(found[1] - found[0], bins / block_length(bins))
        assert limits is not None
        covered.append(limits[0] <= true <= limits[1])
    # Two standard errors of a share of 0.95 in 80 trials are 0.05, and half of a grid step of 1.4 % blurs both ends.
    assert np.mean(covered) >= 0.87


@settings(max_examples=30, deadline=None)
@given(bins=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_weights_when_drawn_then_every_resample_has_as_many_bins_as_the_run(bins: int, seed: int) -> None:
    weights = draw_weights(bins, np.random.default_rng(seed), 50)
    assert weights.shape == (50, bins)
    assert (weights.sum(axis=1) == bins).all()
    # Unbiased: the blocks go round, so that every bin is drawn equally often; a mean of 50 stays within 1 of 1 easily.
    assert weights.mean() == pytest.approx(1)


def test_quantile_when_every_bin_is_drawn_once_then_it_is_that_of_all_values() -> None:
    counts = np.array([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    statistic = quantile(np.array([1.0, 2.0, 3.0]), counts, 0.5)
    # 1, 2, 2, 3; and with the second bin alone 2, 2, 2, 2; and with nothing drawn nothing is known.
    assert statistic(np.array([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])).tolist() == pytest.approx(
        [2, 2, np.nan], nan_ok=True
    )


def test_interval_when_nothing_is_known_then_there_is_none() -> None:
    assert interval(np.full(5, np.nan), 4) is None
    assert np.isnan(ratio(np.zeros(3), np.zeros(3))(np.ones((1, 3)))).all()


@pytest.mark.parametrize(("freedom", "expected"), [(3, 3.182), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_student_when_asked_for_975_per_mille_then_it_is_that_of_the_tables(freedom: int, expected: float) -> None:
    assert student(0.975, freedom) == pytest.approx(expected, rel=0.008)
