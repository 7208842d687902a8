from __future__ import annotations

import numpy as np
import pytest

from server.arrival_rate import ArrivalRate


def feed(rate: ArrivalRate[str], gaps: np.ndarray, kind: str = "a", start_s: float = 0.0) -> float:
    now = start_s
    for gap in gaps:
        now += float(gap)
        rate.arrived(kind, now)
    return now


def test_rate_when_arrivals_are_steady_then_it_is_theirs() -> None:
    rate: ArrivalRate[str] = ArrivalRate(0.5)
    now = feed(rate, np.full(2000, 0.005))
    assert rate.rate_hz(now) == pytest.approx(200, rel=0.01)


def test_rate_when_the_load_triples_then_one_window_shows_most_of_it() -> None:
    rate: ArrivalRate[str] = ArrivalRate(0.1)
    now = feed(rate, np.full(400, 0.005))
    now = feed(rate, np.full(60, 0.005 / 3), start_s=now)  # 0.1 s at 600 Hz
    # 600 - 400 / e = 453
    assert rate.rate_hz(now) == pytest.approx(453, rel=0.02)


def test_rate_when_nobody_comes_then_it_fades_without_being_told() -> None:
    rate: ArrivalRate[str] = ArrivalRate(0.1)
    now = feed(rate, np.full(400, 0.005))
    assert rate.rate_hz(now + 1.0) == pytest.approx(200 * np.exp(-10), rel=0.05)


def test_kinds_when_one_is_not_seen_any_more_then_it_is_forgotten() -> None:
    rate: ArrivalRate[str] = ArrivalRate(0.1)
    now = feed(rate, np.full(10, 0.01), "old")
    now = feed(rate, np.full(400, 0.01), "new", now)
    assert set(rate.by_kind(now)) == {"new"}


@pytest.mark.parametrize("seed", range(5))
def test_dispersion_when_arrivals_are_poisson_then_it_is_about_1(seed: int) -> None:
    rate: ArrivalRate[str] = ArrivalRate(0.1)
    feed(rate, np.random.default_rng(seed).exponential(0.002, 5000))
    assert rate.dispersion < 2


@pytest.mark.parametrize("seed", range(5))
def test_dispersion_when_arrivals_come_in_clumps_then_it_is_large(seed: int) -> None:
    # Gamma with a coefficient of variation of 4: the index of dispersion tends to 16 in long bins.
    rate: ArrivalRate[str] = ArrivalRate(0.1)
    feed(rate, np.random.default_rng(seed).gamma(1 / 16, 0.002 * 16, 5000))
    assert rate.dispersion > 5


def test_dispersion_when_the_load_moves_to_another_level_then_it_is_soon_small_again() -> None:
    rate: ArrivalRate[str] = ArrivalRate(0.1)
    generator = np.random.default_rng(0)
    now = feed(rate, generator.exponential(0.02, 200))
    feed(rate, generator.exponential(0.001, 6000), start_s=now)
    assert rate.dispersion < 2


def test_forecast_when_the_window_is_short_then_its_own_uncertainty_counts() -> None:
    rate: ArrivalRate[str] = ArrivalRate(0.1)
    now = feed(rate, np.full(400, 0.005))
    forecast = rate.forecast(now, 0.4, dispersion=2.0)
    # 80 arrivals; variance 2 * 80 * (1 + 0.4 / 0.2)
    assert (forecast.mean, forecast.variance) == pytest.approx((80, 480), rel=0.03)
