from __future__ import annotations

import pytest

from loadtest.errors import LoadtestError, UnsuitableBundle
from loadtest.tuner.objective import Goal, Objective, judge
from server.provenance import Expected

OBJECTIVE = Objective(Goal.effective_accuracy, p99_ms=100, max_shed=0.01)


def at(load: float, accuracy: float | None, p99_ms: float | None, shed: float) -> Expected:
    return Expected(load=load, effective_accuracy=accuracy, p99_ms=p99_ms, shed_ratio=shed)


def test_verdict_when_limits_hold_at_every_load_then_nothing_is_in_excess() -> None:
    verdict = judge(OBJECTIVE, [at(0.5, 0.92, 40, 0), at(1, 0.90, 100, 0.01)])
    assert verdict.holds
    assert (verdict.gain, verdict.p99_ms, verdict.shed_ratio) == (pytest.approx(0.91), 100, 0.01)


def test_verdict_when_one_load_breaks_both_limits_then_the_excess_adds_up() -> None:
    verdict = judge(OBJECTIVE, [at(0.5, 0.92, 40, 0), at(1.5, 0.8, 150, 0.06)])
    assert not verdict.holds
    assert verdict.excess == pytest.approx(0.5 + 0.05)  # 150 / 100 - 1, and 0.06 - 0.01


def test_rank_when_compared_then_holding_comes_before_gaining() -> None:
    breaks = judge(OBJECTIVE, [at(1, 0.99, 101, 0)])
    holds = judge(OBJECTIVE, [at(1, 0.80, 99, 0)])
    better = judge(OBJECTIVE, [at(1, 0.81, 99, 0)])
    assert sorted([breaks, holds, better], key=lambda each: each.rank) == [better, holds, breaks]


def test_verdict_when_everybody_was_refused_then_the_shed_ratio_says_so() -> None:
    assert judge(OBJECTIVE, [at(1, 0.0, None, 1.0)]).excess == pytest.approx(0.99)


def test_verdict_when_no_accuracy_was_measured_then_the_error_names_a_goal_that_is_known() -> None:
    with pytest.raises(UnsuitableBundle, match="exported without images; maximise slo_attainment"):
        judge(OBJECTIVE, [at(1, None, 50, 0)])


@pytest.mark.parametrize(
    ("p99_ms", "max_shed", "option"),
    [(0, 0.1, "--p99-ms"), (float("nan"), 0.1, "--p99-ms"), (9, 2, "--max-shed")],
)
def test_objective_when_a_limit_means_nothing_then_the_option_is_named(
    p99_ms: float, max_shed: float, option: str
) -> None:
    with pytest.raises(LoadtestError, match=option):
        Objective(Goal.mean_accuracy, p99_ms, max_shed)
