from __future__ import annotations

import math

import numpy as np
import pytest

from loadtest.errors import LoadtestError
from loadtest.rescale import Rescaling
from loadtest.trace import Trace

TRACE = Trace.of([0.0, 1.0, 2.0, 4.0], [0, 1, 0, 1], ("auto", "low"), [0.05, np.nan, 0.1, 0.2], [0, -1, 0, 0], ("a",))


def applied(trace: Trace, window: str | None = None, time_scale: float = 1.0, rate_scale: float = 1.0) -> Trace:
    return Rescaling.parse(window, time_scale, rate_scale).applied(trace, np.random.default_rng(0))


def test_window_when_given_then_its_start_is_the_new_0_and_its_end_is_left_out() -> None:
    part = applied(TRACE, "1:4")
    assert part.arrival_s.tolist() == [0.0, 1.0]
    assert part.deadline_s[1] == 0.1
    assert applied(TRACE, "2:").arrival_s.tolist() == [0.0, 2.0]
    assert applied(TRACE, ":1").arrival_s.tolist() == [0.0]


def test_time_scale_when_below_1_then_the_same_requests_come_faster() -> None:
    fast = applied(TRACE, time_scale=0.5)
    assert fast.arrival_s.tolist() == [0.0, 0.5, 1.0, 2.0]
    assert np.array_equal(fast.budget, TRACE.budget)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 3.5])
def test_rate_scale_when_given_then_every_part_of_the_trace_scales_with_its_wishes(scale: float) -> None:
    generator = np.random.default_rng(1)
    times = np.sort(np.concatenate([generator.uniform(0, 10, 1000), generator.uniform(10, 20, 9000)]))
    trace = Trace.of(times, (times >= 10).astype(np.int32), ("auto", "low"))
    scaled = applied(trace, rate_scale=scale)
    assert (np.diff(scaled.arrival_s) >= 0).all()
    # Binomial fractions of 1000 and 9000: standard deviations of at most 16 and 48.
    assert (scaled.arrival_s < 10).sum() == pytest.approx(1000 * scale, abs=64)
    assert (scaled.arrival_s >= 10).sum() == pytest.approx(9000 * scale, abs=192)
    # A copy asks for what its original asked for, and stays in its burst: only those of the last request before 10 s
    # may come after it.
    assert ((scaled.arrival_s >= 10) != (scaled.budget == 1)).sum() <= math.ceil(scale)
    # As random as the original: a trace of copies at one instant would have gaps of 0.
    assert (np.diff(scaled.arrival_s) > 0).all()


def test_rescaling_when_nothing_is_asked_then_the_trace_stays() -> None:
    assert applied(TRACE).sha256 == TRACE.sha256
    assert str(Rescaling.parse(None, 1.0, 1.0)) == ""
    assert str(Rescaling.parse("5:", 0.5, 2.0)) == ", window 5:inf s, time scale 0.5, rate scale 2"


def test_rescaling_when_the_window_holds_nobody_then_the_trace_is_empty() -> None:
    assert len(applied(TRACE, "2.5:3", rate_scale=2.0)) == 0


@pytest.mark.parametrize("window", ["5", "5:3", "-1:3", "a:b", "3:3"])
def test_window_when_it_means_nothing_then_the_error_says_what_would_be_right(window: str) -> None:
    with pytest.raises(LoadtestError, match=f"--window must be FROM:TO in seconds.* got '{window}'"):
        Rescaling.parse(window, 1.0, 1.0)


def test_scale_when_not_positive_then_it_is_named() -> None:
    with pytest.raises(LoadtestError, match="--rate-scale must be finite and above 0, got 0"):
        Rescaling.parse(None, 1.0, 0.0)
