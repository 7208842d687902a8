"""Paired comparisons: who is ahead of whom, how surely, and whether two rankings agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

_RESAMPLES, _CONFIDENCE = 10_000, 0.95
Verdict = Literal["agree", "opposite", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A mean, and its bootstrap confidence interval of 95 %."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """0 where the interval contains 0."""
        return int(self.low > 0) - int(self.high < 0)


def interval(values: npt.ArrayLike, seed: int = 0) -> Interval:
    """Of the mean, by the percentiles of means of resamples (Efron 1979)."""
    found = np.asarray(values, np.float64)
    picked = np.random.default_rng(seed).integers(0, len(found), (_RESAMPLES, len(found)))
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(found[picked].mean(axis=1), (tail, 1 - tail))
    return Interval(float(found.mean()), float(low), float(high))


def verdict(live: Interval, simulated: Interval) -> Verdict:
    """Of one pair; undecided where either interval contains 0."""
    if not live.sign * simulated.sign:
        return "undecided"
    return "agree" if live.sign == simulated.sign else "opposite"


def kendall_tau(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Share of pairs in the same order less that of pairs in the opposite one (tau-a; Kendall 1938)."""
    pairs: Sequence[tuple[str, str]] = list(combinations(first, 2))
    return float(np.mean([np.sign(first[a] - first[b]) * np.sign(second[a] - second[b]) for a, b in pairs]))
