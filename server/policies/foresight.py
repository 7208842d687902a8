"""Foresight, the default: what a batch gains now against what its time costs everybody else soon.

**Objective.** Effective accuracy: the sum over requests of weight times the accuracy of the rung at which they are
answered in time, nothing for those that are late or shed.

**Candidates.** The first n requests of the queue, n in {1, 2, 4, ...} and all that fit, each at the rung `level` moved
into its own range, for every level of the ladder's frontier. A candidate must keep the promise of admission at the
q-quantile of the corrected latency (`View.fits`); floors, ceilings and pins are respected by construction.

**Score.** With L the median latency of the candidate, a(p) the value of rung p and w the weights,

    score = sum over i < n of w_i a(p_i)  +  V(N - n, T - L)

V is what the rest can still gain: the N - n requests that wait or arrive within the horizon h (`N = waiting + rate *
h`, the rate from a short window) in the time T - L that the workers have left of it (`T = h * workers * utilisation -`
what running batches still need). The queue is rolled forward as a fluid: the best use of time t for M requests is a
fractional knapsack over the steps of the ladder,

    V(M, t) = M * phi(t / M),   phi = concave envelope of (0, 0), (c_1, w a_1), ..., (c_P, w a_P)

averaged over the kinds of request in sight (each with its own floor and ceiling), with c_p the time per image in an
efficient batch. phi is steep where requests would be shed, flat where all can have their ceiling: its slope is the
price of time. An idle server pays nothing for accuracy, a saturated one gives every rung up, and between the two time
goes where it buys most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from server.policies.base import Kind, Proposal, Stateless, View


class ForesightConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # Tuned on the traces of `make bench-policy`, other seeds than those reported.
    horizon_deadlines: float = Field(
        default=1.0, gt=0, description="how far ahead, in deadlines of the strictest class"
    )
    utilisation: float = Field(default=1.0, gt=0, le=2, description="share of the workers' time that is planned")
    risk: float = Field(default=1.0, ge=0)


class Foresight(Stateless):
    name = "foresight"

    def __init__(self, config: ForesightConfig) -> None:
        self._config = config

    def decide(self, view: View) -> Proposal:
        most = min(len(view.deadlines), view.max_batch_size)
        sizes = _sizes(most)
        rungs, gains, medians = _candidates(view, view.kinds[:most], sizes)
        high = medians * np.array([view.latency.high_factor(n) for n in sizes])
        slack_s = view.deadlines[0] - view.now
        feasible = high <= np.where(sizes > 1, min(slack_s, view.batch_limit_s), slack_s)
        horizon_s = self._config.horizon_deadlines * 2 * view.batch_limit_s
        waiting, arriving, envelope = _rest(view, horizon_s)
        time_s = horizon_s * view.workers * self._config.utilisation
        time_s -= sum(end_s - view.now for end_s in view.busy_until_s)
        left_s = np.maximum(time_s - medians, 0.0)
        score = gains
        spread = self._config.risk * math.sqrt(3 * view.dispersion * arriving)
        few, many = max(arriving - spread, 0.0), arriving + spread
        for probability, arrivals in ((1 / 6, few), (2 / 3, arriving), (1 / 6, many)):
            rest = np.maximum(waiting + arrivals - sizes, 1e-9)
            score = score + probability * rest * np.interp(left_s / rest, *envelope)
        largest = feasible.sum(axis=1) - 1  # columns ascend, so do latencies
        best = [
            (float(score[level, column]), level, column) for level, column in enumerate(largest.tolist()) if column >= 0
        ]
        for _, level, column in sorted(best, reverse=True):
            for smaller in range(column, max(column - 3, -1), -1):
                candidate = rungs[level][: sizes[smaller]]
                if view.fits(candidate):
                    return Proposal(candidate)
        return Proposal([])


def _sizes(most: int) -> npt.NDArray[np.int64]:
    """Powers of two, and eighths of what waits: a batch that is a little too long need not shrink by half."""
    powers = [1 << i for i in range(most.bit_length())]
    eighths = [most - most * i // 8 for i in range(5)]
    return np.array(sorted({*powers, *eighths}), np.int64)


def _rest(view: View, horizon_s: float) -> tuple[float, float, tuple[list[float], list[float]]]:
    """Requests that wait, requests that arrive within the horizon, and phi as its corners."""
    counts = {kind: rate * horizon_s for kind, rate in view.arrival_rates_hz.items()}
    arriving = sum(counts.values())
    for kind, count in view.waiting.items():
        counts[kind] = counts.get(kind, 0.0) + count
    total = sum(counts.values())
    size = _efficient_size(view)
    steps: list[tuple[float, float]] = []  # (time, value) of one step of one kind, per request of any kind
    for kind, count in counts.items():
        share = count / total
        steps += [(share * time_s, share * kind.weight * value) for time_s, value in _hull(view, kind, size)]
    steps.sort(key=lambda step: -step[1] / step[0])
    times, values = [0.0], [0.0]
    for time_s, value in steps:
        times.append(times[-1] + time_s)
        values.append(values[-1] + value)
    return total - arriving, arriving, (times, values)


def _efficient_size(view: View) -> int:
    """The largest batch within the limit at the cheapest rung: what a backlog is served in."""
    rung = view.ladder.frontier[0]
    for size in range(view.max_batch_size, 1, -1):
        if view.latency.uniform_s(rung, size, high=True) <= view.batch_limit_s:
            return size
    return 1


def _hull(view: View, kind: Kind, size: int) -> list[tuple[float, float]]:
    """Steps (time, value) of the concave envelope from nothing over the kind's rungs, steepest first."""
    rungs = sorted({min(max(rung, kind.floor), kind.ceiling) for rung in view.ladder.frontier})
    points = [(0.0, 0.0)]
    for rung in rungs:
        point = (view.latency.uniform_s(rung, size) / size, view.ladder.values[rung])
        if point[1] <= points[-1][1]:
            continue
        while len(points) > 1 and _slope(points[-2], points[-1]) <= _slope(points[-2], point):
            points.pop()
        points.append(point)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(points)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / max(b[0] - a[0], 1e-12)


def _candidates(
    view: View, kinds: Sequence[Kind], sizes: npt.NDArray[np.int64]
) -> tuple[list[list[int]], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """For each level of the ladder: rungs of the first requests; gain and median latency of each batch size."""
    values, first = np.array(view.ladder.values), kinds[0]
    if kinds.count(first) == len(kinds):
        levels = sorted({min(max(rung, first.floor), first.ceiling) for rung in view.ladder.frontier})
        gains = first.weight * values[levels][:, None] * sizes
        medians = np.array([view.latency.median_s[level] for level in levels])[:, sizes]
        return [[level] * len(kinds) for level in levels], gains, medians
    floors, ceilings, weights = np.array([(kind.floor, kind.ceiling, kind.weight) for kind in kinds]).T
    rungs = np.clip(np.array(view.ladder.frontier)[:, None], floors, ceilings).astype(np.int64)
    rungs = np.unique(rungs, axis=0)
    gains = np.cumsum(values[rungs] * weights, axis=1)[:, sizes - 1]
    increments = view.latency.increments()
    medians = np.stack(
        [increments[-np.sort(-rungs[:, :size], axis=1), np.arange(1, size + 1)].sum(axis=1) for size in sizes], axis=1
    )
    return rungs.tolist(), gains, medians
