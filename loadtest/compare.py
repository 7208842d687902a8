"""Two runs beside each other: the difference of every figure, with the interval in which it lies.

Reports in, `Comparison` out; `loadtest.tables` prints it and `loadtest.html` shows it. How the intervals come about is
in `loadtest.bootstrap`. Runs are paired where both were offered the same trace, bin by bin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from loadtest import histogram
from loadtest.bootstrap import LEAST_BINS, Floats, Statistic, block_length, draw_weights, interval, quantile, ratio
from loadtest.report import Report
from loadtest.runs import Run
from loadtest.timeline import Timeline

Verdict = Literal["better", "worse", "open"]


@dataclass(frozen=True)
class _Figure:
    """What is compared.

    Attributes:
        value: as the report has it.
        statistic: of resampled bins; None where the timeline does not have it.
    """

    name: str
    unit: Literal["points", "ms"]
    higher_is_better: bool
    value: Callable[[Report], float | None]
    statistic: Callable[[_Bins], Statistic | None]


@dataclass(frozen=True)
class Difference:
    """The second run's figure less the first's.

    Attributes:
        unit: percentage points, or milliseconds; first, second, low and high are ratios or seconds.
        low, high: of the interval of the difference; None where nothing can be said.
        verdict: of the second run; open where the interval holds 0, or is unknown.
    """

    name: str
    unit: Literal["points", "ms"]
    first: float | None
    second: float | None
    low: float | None
    high: float | None
    verdict: Verdict

    @property
    def difference(self) -> float | None:
        return None if self.first is None or self.second is None else self.second - self.first


@dataclass(frozen=True)
class Comparison:
    """Of two runs.

    Attributes:
        how: one sentence on how the intervals came about, or why there are none.
    """

    first: str
    second: str
    paired: bool
    how: str
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class _Bins:
    """The columns of a timeline that are resampled, without the last bins, in which nothing was offered."""

    bins: Timeline
    size: int

    @classmethod
    def of(cls, report: Report) -> _Bins | None:
        bins = report.timeline
        offered = [] if bins is None else [place for place, count in enumerate(bins.offered) if count]
        return None if bins is None or not offered else cls(bins, offered[-1] + 1)

    def column(self, values: Sequence[float | None]) -> Floats:
        """(B,) with 0 where a value is unknown."""
        return np.array([value or 0.0 for value in values[: self.size]])

    @property
    def offered(self) -> Floats:
        return self.column(self.bins.offered)

    def share(self, parts: Sequence[int]) -> Statistic:
        return ratio(self.column(parts), self.offered)

    def latency(self, share: float) -> Statistic:
        found = [histogram.decode(text) for text in self.bins.latency_histogram[: self.size]]
        values = np.unique(np.concatenate([values_s for values_s, _ in found]))
        counts = np.zeros((self.size, len(values)))
        for place, (values_s, count) in enumerate(found):
            counts[place, np.searchsorted(values, values_s)] = count
        return quantile(values, counts, share)

    def accuracy(self, means: Sequence[float | None], counts: Sequence[int]) -> Statistic | None:
        if all(value is None for value in means):
            return None
        return ratio(self.column(means) * self.column(counts), self.column(counts))

    def live(self, right: Sequence[int], labelled: Sequence[int]) -> Statistic | None:
        return ratio(self.column(right), self.column(labelled)) if any(labelled) else None


_FIGURES: Final = (
    _Figure("in time", "points", True, lambda r: r.slo_attainment, lambda b: b.share(b.bins.in_time)),
    _Figure(
        "effective accuracy",
        "points",
        True,
        lambda r: r.effective_accuracy,
        lambda b: b.accuracy(b.bins.effective_accuracy, b.bins.offered),
    ),
    _Figure(
        "accuracy of answers",
        "points",
        True,
        lambda r: r.mean_accuracy,
        lambda b: b.accuracy(b.bins.mean_accuracy, b.bins.answered),
    ),
    _Figure(
        "live: right and in time",
        "points",
        True,
        lambda r: None if r.live is None else r.live.effective_accuracy,
        lambda b: b.live(b.bins.right_in_time, b.bins.labelled),
    ),
    _Figure(
        "live: right answers",
        "points",
        True,
        lambda r: None if r.live is None else r.live.accuracy,
        lambda b: b.live(b.bins.right, b.bins.labelled_answers),
    ),
    _Figure("missed", "points", False, lambda r: r.missed_ratio, lambda b: b.share(b.bins.missed)),
    _Figure("shed", "points", False, lambda r: r.shed_ratio, lambda b: b.share(b.bins.shed)),
    _Figure("latency p50", "ms", False, lambda r: r.latency_s.p50, lambda b: b.latency(0.5)),
    _Figure("latency p99", "ms", False, lambda r: r.latency_s.p99, lambda b: b.latency(0.99)),
)


def compare(first: Run, second: Run, *, seed: int = 0) -> Comparison:
    """Every figure that both have. The same seed gives the same intervals."""
    generator = np.random.default_rng(seed)
    ours, theirs = _Bins.of(first.report), _Bins.of(second.report)
    paired = _paired(first.report, second.report, ours, theirs)
    if ours is None or theirs is None or min(ours.size, theirs.size) < LEAST_BINS:
        how = f"no intervals: both runs need a timeline of at least {LEAST_BINS} bins"
        return Comparison(first.name, second.name, paired, how, tuple(_differences(first.report, second.report, {})))
    weights = draw_weights(ours.size, generator)
    others = weights if paired else draw_weights(theirs.size, generator)
    blocks = min(bins.size / block_length(bins.size) for bins in (ours, theirs))
    found = {}
    for figure in _FIGURES:
        here, there = figure.statistic(ours), figure.statistic(theirs)
        if here is not None and there is not None:
            found[figure.name] = interval(there(others) - here(weights), blocks)
    how = (
        f"95 % intervals, bootstrap of blocks of {block_length(ours.size) * ours.bins.bin_s:g} s, seed {seed}, "
        f"{'paired: both were offered the same trace' if paired else 'not paired: other traces'}"
    )
    return Comparison(first.name, second.name, paired, how, tuple(_differences(first.report, second.report, found)))


def _paired(first: Report, second: Report, ours: _Bins | None, theirs: _Bins | None) -> bool:
    """A trace of one hash may have been cut by other warm-ups, so the bins decide too."""
    return (
        ours is not None
        and theirs is not None
        and first.setup.trace_sha256 == second.setup.trace_sha256
        and ours.bins.bin_s == theirs.bins.bin_s
        and np.array_equal(ours.offered, theirs.offered)
    )


def _differences(first: Report, second: Report, found: dict[str, tuple[float, float] | None]) -> list[Difference]:
    differences = []
    for figure in _FIGURES:
        one, other = figure.value(first), figure.value(second)
        if one is None and other is None:
            continue
        low, high = (found.get(figure.name) if one is not None and other is not None else None) or (None, None)
        verdict: Verdict = "open"
        if low is not None and high is not None and (low > 0 or high < 0):
            verdict = "better" if (low > 0) == figure.higher_is_better else "worse"
        differences.append(Difference(figure.name, figure.unit, one, other, low, high, verdict))
    return differences
