"""Tolerances: a Poisson count of mean m has standard deviation sqrt(m); 4 of them hold for all seeds here."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from loadtest import arrivals

RATE_HZ, DURATION_S = 500.0, 60.0
SEEDS = range(5)

Draw = Callable[[np.random.Generator], arrivals.Times]
RANDOM: dict[str, Draw] = {
    "poisson": lambda generator: arrivals.poisson(RATE_HZ, DURATION_S, generator),
    "gamma": lambda generator: arrivals.gamma(RATE_HZ, DURATION_S, 1.5, generator),
    "on-off": lambda generator: arrivals.on_off(RATE_HZ, DURATION_S, generator),
    "diurnal": lambda generator: arrivals.diurnal(RATE_HZ, DURATION_S, generator),
    "spike": lambda generator: arrivals.spike(RATE_HZ, DURATION_S, generator),
    "ramp": lambda generator: arrivals.ramp(RATE_HZ, DURATION_S, generator),
    "step": lambda generator: arrivals.step(RATE_HZ, DURATION_S, generator, levels=3),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RANDOM)
def test_arrivals_when_drawn_then_they_ascend_within_the_duration_at_the_mean_rate(name: str, seed: int) -> None:
    times = RANDOM[name](np.random.default_rng(seed))
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < DURATION_S
    expected = RATE_HZ * DURATION_S
    spread = 1.5 if name == "gamma" else 1.0  # the count of a renewal process varies CV times as much
    assert len(times) == pytest.approx(expected, abs=4 * spread * math.sqrt(expected))


@pytest.mark.parametrize("name", RANDOM)
def test_arrivals_when_the_seed_is_the_same_then_so_are_the_times(name: str) -> None:
    first, second, other = (RANDOM[name](np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gamma_when_cv_is_given_then_gaps_have_it(cv: float, seed: int) -> None:
    gaps = np.diff(arrivals.gamma(RATE_HZ, 20 * DURATION_S, cv, np.random.default_rng(seed)))
    # 600,000 gaps; with CV 4 the fourth moment is heavy: 2 % is about 4 standard deviations of the estimate.
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.02)


@pytest.mark.parametrize("seed", SEEDS)
def test_poisson_when_counted_in_bins_then_variance_equals_mean(seed: int) -> None:
    counts, _ = np.histogram(arrivals.poisson(RATE_HZ, DURATION_S, np.random.default_rng(seed)), 600, (0, DURATION_S))
    # The variance of 600 counts has a relative standard deviation of sqrt(2 / 600) = 0.06.
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.24)


@pytest.mark.parametrize("seed", SEEDS)
def test_on_off_when_drawn_then_bursts_have_their_multiple_of_the_pauses_rate(seed: int) -> None:
    times = arrivals.on_off(RATE_HZ, DURATION_S, np.random.default_rng(seed), on_s=0.5, off_s=2.5, factor=5)
    burst = times % 3.0 >= 2.5
    # Mean 1 = (2.5 x + 0.5 * 5 x) / 3: pauses at x = 0.6 of 500/s for 50 s, bursts at 5 x = 3 for 10 s; 15,000 each.
    assert burst.sum() == pytest.approx(15_000, abs=4 * math.sqrt(15_000))
    assert (~burst).sum() == pytest.approx(15_000, abs=4 * math.sqrt(15_000))


@pytest.mark.parametrize("seed", SEEDS)
def test_diurnal_when_drawn_then_it_is_quiet_at_the_ends_and_busy_in_the_middle(seed: int) -> None:
    times = arrivals.diurnal(RATE_HZ, DURATION_S, np.random.default_rng(seed), amplitude=0.8)
    middle = ((times >= DURATION_S / 4) & (times < 3 * DURATION_S / 4)).sum()
    # Integral of 1 - 0.8 cos(2 pi t) from 1/4 to 3/4: 1/2 + 0.8 / pi = 0.7546 of all.
    expected = RATE_HZ * DURATION_S * (0.5 + 0.8 / math.pi)
    assert middle == pytest.approx(expected, abs=4 * math.sqrt(expected))


@pytest.mark.parametrize("seed", SEEDS)
def test_spike_when_drawn_then_it_lies_a_third_into_the_trace(seed: int) -> None:
    times = arrivals.spike(RATE_HZ, DURATION_S, np.random.default_rng(seed))
    spike = ((times >= 20) & (times < 22)).sum()
    # Mean 1 = (58 x + 2 * 10 x) / 60: x = 60 / 78, so the spike holds 500 * 2 * 10 * 60 / 78 = 7692.
    assert spike == pytest.approx(7692, abs=4 * math.sqrt(7692))


def ramp_share(times_s: np.ndarray, factor: float) -> np.ndarray:
    """Of the arrivals until then: the integral of a rate that goes from 2 / (1 + factor) to `factor` times that."""
    x = times_s / DURATION_S
    return (2 * x + (factor - 1) * x**2) / (1 + factor)


def step_share(times_s: np.ndarray, factor: float) -> np.ndarray:
    """The same for two levels, 1 and `factor`."""
    x = times_s / DURATION_S
    return np.where(x < 0.5, x, 0.5 + factor * (x - 0.5)) / (0.5 + factor / 2)


@pytest.mark.parametrize("factor", [0.2, 1.0, 10.0])
@pytest.mark.parametrize(("process", "share"), [(arrivals.ramp, ramp_share), (arrivals.step, step_share)])
def test_ramp_and_step_when_drawn_on_many_seeds_then_arrivals_follow_the_cumulative_rate(
    process: Callable[..., arrivals.Times], share: Callable[..., np.ndarray], factor: float
) -> None:
    passed = []
    for seed in range(100):
        times = process(RATE_HZ / 10, DURATION_S, np.random.default_rng(seed), factor=factor)
        ranks = np.arange(len(times) + 1) / len(times)
        expected = share(times, factor)
        distance = max(np.abs(expected - ranks[1:]).max(), np.abs(expected - ranks[:-1]).max())
        passed.append(math.sqrt(len(times)) * distance < 1.358)  # Kolmogorov-Smirnov, 5 %
    # Binomial(100, 0.95): standard deviation 2.2, so 86 is 4 of them below its mean, and 100 may happen.
    assert sum(passed) > 86


@pytest.mark.parametrize("seed", SEEDS)
def test_step_when_it_has_three_levels_then_each_holds_its_share(seed: int) -> None:
    times = arrivals.step(RATE_HZ, DURATION_S, np.random.default_rng(seed), factor=4, levels=3)
    counts, _ = np.histogram(times, 3, (0, DURATION_S))
    # Levels 1, 2.5 and 4 of 7.5: 4000, 10,000 and 16,000 of 30,000.
    for count, expected in zip(counts, (4_000, 10_000, 16_000), strict=True):
        assert count == pytest.approx(expected, abs=4 * math.sqrt(expected))


def test_constant_when_drawn_then_gaps_are_equal() -> None:
    assert arrivals.constant(4, 1).tolist() == [0, 0.25, 0.5, 0.75]


def test_arrivals_when_parameters_make_no_process_then_the_message_says_what_would() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        arrivals.gamma(1, 1, 0, generator)
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        arrivals.diurnal(1, 1, generator, amplitude=2)
    with pytest.raises(ValueError, match="factor must be above 0, got -1"):
        arrivals.ramp(1, 1, generator, factor=-1)
    with pytest.raises(ValueError, match="at least 2 levels, got 4 and 1"):
        arrivals.step(1, 1, generator, factor=4, levels=1)
