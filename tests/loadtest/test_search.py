from __future__ import annotations

import math
from collections.abc import Collection

import pytest

from loadtest.search import Objective, Phase, Search, Trial, find_max

OBJECTIVE = Objective(p99_s=0.1, max_shed=0.001)


def searched(
    start_hz: float,
    capacity_hz: dict[int, float] | float,
    interrupted_after: int = 1000,
    invalid: Collection[int] = (),
) -> Search:
    """Against a machine that holds every rate up to its capacity, which may differ by seed."""
    count = 0

    def run(phase: Phase, rate_hz: float, seed: int) -> Trial:
        nonlocal count
        count += 1
        limit = capacity_hz.get(seed, math.inf) if isinstance(capacity_hz, dict) else capacity_hz
        return Trial(
            phase=phase,
            rate_hz=rate_hz,
            seed=seed,
            offered=1000,
            p99_s=0.05,
            unanswered=0.0,
            effective_accuracy=0.9,
            missed=[] if rate_hz <= limit else ["too slow"],
            invalid=["the generator fell behind"] if count in invalid else [],
            interrupted=count > interrupted_after,
        )

    return find_max(start_hz, 0, OBJECTIVE, run)


@pytest.mark.parametrize("start_hz", [1.0, 100.0, 131.0, 2000.0])
def test_find_max_when_the_capacity_is_known_then_the_rate_is_within_the_tolerance_below_it(start_hz: float) -> None:
    search = searched(start_hz, 130.0)
    assert search.rate_hz is not None
    assert 130 / 1.05 <= search.rate_hz <= 130
    phases = [trial.phase for trial in search.trials]
    assert phases == sorted(phases, key=("doubling", "bisection", "confirmation").index)
    assert [trial.seed for trial in search.trials if trial.phase == "confirmation"] == [1, 2, 3]
    # Every trial once: none is repeated with the same rate and seed.
    assert len({(trial.rate_hz, trial.seed) for trial in search.trials}) == len(search.trials)


def test_find_max_when_another_seed_does_not_hold_then_a_lower_rate_is_confirmed() -> None:
    search = searched(100.0, {0: 130.0, 1: 200.0, 2: 121.0, 3: 200.0})
    assert search.rate_hz is not None
    assert 121 / 1.05 <= search.rate_hz <= 121
    assert any(not trial.held and trial.phase == "confirmation" for trial in search.trials)


def test_find_max_when_a_trial_is_not_valid_then_it_is_made_again() -> None:
    search = searched(100.0, 130.0, invalid=(1, 4))
    assert search.rate_hz is not None
    assert 130 / 1.05 <= search.rate_hz <= 130
    assert (search.trials[0].rate_hz, search.trials[1].rate_hz) == (100.0, 100.0)


def test_find_max_when_trials_are_never_valid_then_they_do_not_hold() -> None:
    search = searched(100.0, 130.0, invalid=range(1000))
    assert search.rate_hz is None
    # 100 to 6.25, three times each; a trial that missed its objectives would not be made again.
    assert len(search.trials) == 5 * 3


def test_find_max_when_no_rate_holds_then_there_is_none() -> None:
    search = searched(10.0, 0.0)
    assert search.rate_hz is None
    assert all(trial.phase == "doubling" for trial in search.trials)
    assert search.trials[-1].rate_hz == 10 / 16


def test_find_max_when_confirmation_never_holds_then_there_is_none() -> None:
    assert searched(100.0, {0: 130.0, 1: 1.0}).rate_hz is None


def test_find_max_when_stopped_by_hand_then_the_trials_so_far_are_reported() -> None:
    search = searched(1.0, 130.0, interrupted_after=3)
    assert (search.rate_hz, len(search.trials)) == (None, 4)


def test_objective_when_missed_then_the_measured_and_the_allowed_value_are_named() -> None:
    assert OBJECTIVE.missed(0.1, 0.001) == []
    assert OBJECTIVE.missed(0.1234, 0.05) == [
        "p99 123.4 ms, at most 100 ms",
        "5.00 % without an answer, at most 0.1 %",
    ]
    assert OBJECTIVE.missed(None, 1.0)[0] == "p99 unknown, at most 100 ms"
