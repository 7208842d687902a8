from __future__ import annotations

import math

import numpy as np
import pytest

from loadtest import arrivals
from loadtest.validity import least_requests, percentile_bound_s, reasons, unsettled

RATE_HZ, DURATION_S = 100.0, 30.0


@pytest.mark.parametrize(("percentile", "least"), [(50, 11), (90, 64), (99, 662), (99.9, 6636)])
def test_least_requests_when_a_percentile_is_asked_then_it_is_the_smallest_count_of_mlperfs_rule(
    percentile: float, least: int
) -> None:
    tail = 1 - percentile / 100

    def at_most_one_over(requests: int) -> float:
        return sum(math.comb(requests, over) * tail**over * (1 - tail) ** (requests - over) for over in (0, 1))

    assert least_requests(percentile) == least
    assert at_most_one_over(least) <= 0.01 < at_most_one_over(least - 1)


@pytest.mark.parametrize("size", [662, 3000])
def test_percentile_bound_when_drawn_on_many_seeds_then_it_covers_the_truth_in_99_of_100_runs(size: int) -> None:
    covered, bounds = 0, []
    for seed in range(500):
        latency_s = np.random.default_rng(seed).exponential(size=size)
        bound_s = percentile_bound_s(latency_s, 99)
        assert bound_s is not None
        covered += bound_s >= math.log(100)  # the 99th percentile of a unit exponential
        bounds.append(bound_s)
    # Binomial(500, >= 0.99): mean 495, standard deviation 2.2; no fewer than 4 of them below.
    assert covered >= 486
    # No wider than it must be: for 662 the second largest, whose mean is the 662nd harmonic number less 1, 6.07.
    assert np.mean(bounds) < 6.3


def test_percentile_bound_when_requests_are_too_few_or_refused_then_there_is_none() -> None:
    assert percentile_bound_s(np.ones(661), 99) is None
    assert percentile_bound_s(np.concatenate([np.ones(661), [np.nan]]), 99) is None
    assert percentile_bound_s(np.arange(662.0), 99) == 660.0  # the second largest


def poisson(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals, and latencies that do not change."""
    generator = np.random.default_rng(seed)
    arrival_s = arrivals.poisson(RATE_HZ, DURATION_S, generator)
    return arrival_s, generator.gamma(2.0, 0.01, len(arrival_s))


@pytest.mark.parametrize("seed", range(20))
def test_unsettled_when_latency_does_not_change_then_nothing_is_found(seed: int) -> None:
    assert unsettled(*poisson(seed)) is None


@pytest.mark.parametrize("seed", range(5))
def test_unsettled_when_the_first_half_is_slower_at_like_load_then_the_warm_up_was_too_short(seed: int) -> None:
    arrival_s, latency_s = poisson(seed)
    found = unsettled(arrival_s, latency_s * np.where(arrival_s < 0.45 * DURATION_S, 3.0, 1.0))
    assert found is not None
    assert found.startswith("the warm-up was too short: at like load the median was")


@pytest.mark.parametrize("seed", range(5))
def test_unsettled_when_a_queue_grows_all_the_time_then_latency_did_not_settle(seed: int) -> None:
    arrival_s, latency_s = poisson(seed)
    found = unsettled(arrival_s, latency_s + 0.05 * arrival_s)
    assert found is not None
    assert found.startswith("latency did not settle")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["ramp", "step", "spike", "on_off", "diurnal"])
def test_unsettled_when_only_the_load_changes_then_nothing_is_found(name: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    arrival_s = getattr(arrivals, name)(RATE_HZ, DURATION_S, generator)
    counts, edges = np.histogram(arrival_s, 100)
    load = counts[np.clip(np.searchsorted(edges, arrival_s, "right") - 1, 0, 99)]
    assert unsettled(arrival_s, generator.gamma(2.0, 0.0001 * load)) is None


def test_unsettled_when_a_second_in_the_middle_stalls_then_nothing_is_found() -> None:
    arrival_s, latency_s = poisson(0)
    assert unsettled(arrival_s, latency_s + np.where((arrival_s > 12) & (arrival_s < 13), 13 - arrival_s, 0)) is None


def test_unsettled_when_requests_are_few_or_all_refused_then_nothing_can_be_said() -> None:
    assert unsettled(np.array([]), np.array([])) is None
    assert unsettled(np.arange(50.0), np.linspace(1.0, 0.01, 50)) is None
    assert unsettled(np.arange(1000.0), np.full(1000, np.nan)) is None


def test_reasons_when_nothing_is_wrong_then_there_are_none_and_otherwise_each_is_named() -> None:
    assert reasons(662, 99, 0.01, None) == []
    assert reasons(662, 99, None, None) == []
    found = reasons(661, 99, 0.0102, "the warm-up was too short")
    assert found == [
        "661 requests after the warm-up are too few for a 99th percentile: 662",
        "the generator fell behind: 1 % of requests were sent more than 10.2 ms late, at most 10 ms are allowed",
        "the warm-up was too short",
    ]
