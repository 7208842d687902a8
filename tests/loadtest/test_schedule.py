"""Tolerances: a share s of n requests has standard deviation sqrt(s (1 - s) / n); 4 of them hold for the seeds here."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loadtest.schedule import Kind, Mix, draw
from loadtest.trace import Trace


@pytest.mark.parametrize("seed", range(5))
def test_mix_when_deadlines_and_budgets_have_shares_then_requests_have_them_independently(seed: int) -> None:
    mix = Mix.parse(["auto=3", "low=1"], ["50=0.3", "200=0.7"])
    trace = draw(Kind.poisson, 1000, 20, seed=seed, mix=mix)
    tolerance = 4 * math.sqrt(0.25 / len(trace))
    low, urgent = trace.budget == trace.budgets.index("low"), trace.deadline_s == 0.05
    assert low.mean() == pytest.approx(0.25, abs=tolerance)
    assert urgent.mean() == pytest.approx(0.3, abs=tolerance)
    assert (trace.deadline_s[~urgent] == 0.2).all()
    assert (low & urgent).mean() == pytest.approx(0.25 * 0.3, abs=tolerance)


def test_mix_when_one_deadline_has_no_share_then_it_is_everybodys() -> None:
    assert (draw(Kind.constant, 10, 1, seed=0, mix=Mix.parse((), ["80"])).deadline_s == 0.08).all()


def test_mix_when_empty_then_the_traces_own_wishes_stay() -> None:
    trace = Trace.of([0.0, 1.0], [1, 0], ("auto", "low"), [0.05, np.nan], [0, -1], ("shirt.png",))
    assert Mix().applied(trace, np.random.default_rng(0)).sha256 == trace.sha256
    other = Mix.parse(["high"]).applied(trace, np.random.default_rng(0))
    assert other.budgets == ("high",)
    assert other.deadline_s[0] == 0.05
    assert other.images == trace.images
