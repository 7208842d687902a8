"""What is asked for, and how far a policy is from it.

gain     the figure to maximise, mean over the loads
p99_ms   the largest of the loads; so is shed_ratio
excess   max(p99_ms / limit - 1, 0) + max(shed_ratio - limit, 0): 0 where the objective holds at every load
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from loadtest.errors import LoadtestError, UnsuitableBundle
from server.provenance import Expected


class Goal(StrEnum):
    """Figures that can be maximised; `loadtest.report` says what they mean."""

    effective_accuracy = "effective_accuracy"
    mean_accuracy = "mean_accuracy"
    slo_attainment = "slo_attainment"


@dataclass(frozen=True)
class Objective:
    """Maximise `goal` while the 99th percentile of latency and the share of refused requests stay within limits.

    Raises:
        LoadtestError: a limit means nothing.
    """

    goal: Goal
    p99_ms: float
    max_shed: float

    def __post_init__(self) -> None:
        if not 0 < self.p99_ms < float("inf"):
            raise LoadtestError(f"--p99-ms must be finite and above 0, got {self.p99_ms}")
        if not 0 <= self.max_shed <= 1:
            raise LoadtestError(f"--max-shed is a share and must be from 0 to 1, got {self.max_shed}")

    def __str__(self) -> str:
        return f"maximise {self.goal} with p99 <= {self.p99_ms:g} ms and shed <= {100 * self.max_shed:g} %"


@dataclass(frozen=True)
class Verdict:
    """An objective against the figures of a policy."""

    gain: float
    p99_ms: float
    shed_ratio: float
    excess: float

    @property
    def holds(self) -> bool:
        return self.excess == 0

    @property
    def rank(self) -> tuple[float, float]:
        """Ascending from the best."""
        return self.excess, -self.gain


def judge(objective: Objective, figures: Sequence[Expected]) -> Verdict:
    """Arguments:
        figures: one per load.

    Raises:
        UnsuitableBundle: the goal is an accuracy, and none was measured.
    """
    gains = [getattr(each, objective.goal) for each in figures]
    if None in gains:
        raise UnsuitableBundle(
            f"{objective.goal} is unknown: the bundle was exported without images; maximise {Goal.slo_attainment}"
        )
    # Where nobody was admitted there is no latency, and nothing to gain: the shed ratio says all.
    p99_ms = max(each.p99_ms or 0.0 for each in figures)
    shed_ratio = max(each.shed_ratio or 0.0 for each in figures)
    excess = max(p99_ms / objective.p99_ms - 1, 0.0) + max(shed_ratio - objective.max_shed, 0.0)
    return Verdict(sum(gains) / len(gains), p99_ms, shed_ratio, excess)
