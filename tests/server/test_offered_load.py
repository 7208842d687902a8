"""What policies are told to expect, from arrivals at known times."""

from __future__ import annotations

import math

import pytest

from server.offered_load import OfferedLoad
from server.policies.base import Kind

HORIZON_S = 0.1  # so windows of 0.025 s for a burst, and of 1 s for a load that lasts
KIND = Kind(floor=0, ceiling=1, weight=1.0)


def load_of(count: int) -> OfferedLoad:
    """So many arrivals at time 0."""
    load = OfferedLoad(HORIZON_S)
    for _ in range(count):
        load.arrived(KIND, 0.0)
    return load


def test_forecasts_when_many_have_just_come_then_the_short_window_tells_of_a_burst() -> None:
    burst, lasting = load_of(10).forecasts(0.0)
    # 10 / 0.025 s = 400 Hz over 0.1 s; 10 / 1 s = 10 Hz over ten horizons.
    assert (burst.horizon_s, burst.mean) == (HORIZON_S, pytest.approx(40))
    assert (lasting.horizon_s, lasting.mean) == (pytest.approx(1.0), pytest.approx(10))


def test_forecasts_when_a_burst_is_over_then_a_lull_is_no_promise() -> None:
    load = load_of(10)
    burst, lasting = load.forecasts(0.25)
    # Ten short windows later the short one has forgotten: exp(-10) of 40. The long one says 10 exp(-0.25) Hz.
    rate_hz = 10 * math.exp(-0.25)
    assert burst.mean == pytest.approx(rate_hz * HORIZON_S)
    assert lasting.mean == pytest.approx(rate_hz)
    assert load.rate_hz(0.25) == pytest.approx(rate_hz)
    assert load.by_kind(0.25) == {KIND: pytest.approx(rate_hz)}
