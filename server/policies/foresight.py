"""Foresight, the default: what a batch gains now against what its time costs everybody else soon.

**Objective.** Effective accuracy: the sum over requests of weight times the accuracy of the rung at which they are
answered in time, nothing for those that are late or shed.

**Price of time.** The queue is rolled forward as a fluid. Over a horizon h the requests to serve are N = waiting +
arriving, the time to do it T = utilisation * h * workers + slack - what running batches still need, where slack is the
part of a deadline for which work may be left over. The best use of t seconds per request is a fractional knapsack over
the steps of the ladder, the concave envelope phi of

    (0, 0), (c_1, w a_1), ..., (c_P, w a_P)

averaged over the kinds of request in sight (each with its own floor, ceiling and weight w; a_p the accuracy of rung p,
c_p its time per image in an efficient batch). Its slope at t = T / N is what one more second would be worth. N is
uncertain: with a normal distribution of the measured arrival rate and dispersion, slopes s_1 > ... > s_J and corners
t_1 < ... < t_J of phi, the expected price is

    mu = sum over j of (s_j - s_(j+1)) * P(N t_j > T),     s_(J+1) = 0

s_1 is the price where requests get shed, 0 where all can have their ceiling. Two horizons are looked at, one deadline
(a burst) and ten (a load that lasts), each with an arrival rate measured over a time in proportion; the higher price
counts.

**Score.** Candidates are batches of the first n requests, each at a level of the ladder moved into its own range, for
every level and the largest n that keeps the promise of admission at the q-quantile of corrected latency (`View.fits`,
then smaller n). With L the candidate's median latency and v_i the most that a request can gain at that price later on,

    score = sum over i < n of (w_i a(p_i) - v_i)  -  mu L,     v_i = max over p of (w_i a(p) - mu c_p)

An idle server pays nothing for accuracy, a saturated one gives every rung up, and between the two time goes where it
buys most. Floors, ceilings and pins are respected by construction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from server.floor_plan import largest_within
from server.policies.base import Forecast, Kind, Proposal, Stateless, View


class ForesightConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # Tuned by `make bench-policy` on other seeds than those reported.
    slack: float = Field(default=0.5, ge=0, le=1, description="work that may be left at the horizon, in deadlines")
    utilisation: float = Field(default=0.9, gt=0, le=1, description="share of the workers' time that is planned")
    caution: float = Field(default=1.0, ge=0, description="factor on the standard deviation of arrivals")


class Foresight(Stateless):
    name = "foresight"

    def __init__(self, config: ForesightConfig) -> None:
        self._config = config

    def decide(self, view: View) -> Proposal:
        most = min(len(view.deadlines), view.max_batch_size)
        sizes = _sizes(most)
        size = _efficient_size(view)
        hulls = {kind: _hull(view, kind, size) for kind in {*view.waiting, *view.arrival_rates_hz}}
        price = max(self._price(view, forecast, hulls) for forecast in view.forecasts)
        kinds = view.kinds[:most]
        # Where time is worth less than the last step of the ladder, the ceilings win, and nothing need be compared.
        if price < min((hulls[kind][-1][1] / hulls[kind][-1][0] for kind in set(kinds)), default=0.0):
            ceilings = [kind.ceiling for kind in kinds]
            if view.fits(ceilings):
                return Proposal(ceilings)
        rungs, gains, medians = _candidates(view, kinds, sizes, hulls, price)
        high = medians * view.latency.high_factors[sizes]
        slack_s = view.deadlines[0] - view.now
        feasible = high <= np.where(sizes > 1, min(slack_s, view.batch_limit_s), slack_s)
        score = gains - price * medians
        columns = (feasible.sum(axis=1) - 1).tolist()  # columns ascend, so do latencies
        scored = [(float(score[level, column]), level, column) for level, column in enumerate(columns) if column >= 0]
        for _, level, column in sorted(scored, reverse=True):
            for smaller in range(column, max(column - 3, -1), -1):
                candidate = rungs[level, : sizes[smaller]].tolist()
                if view.fits(candidate):
                    return Proposal(candidate)
        return Proposal([])

    def _price(self, view: View, forecast: Forecast, hulls: Mapping[Kind, list[tuple[float, float]]]) -> float:
        """mu over one horizon."""
        waiting = sum(view.waiting.values())
        known_hz = sum(view.arrival_rates_hz.values())
        counts: dict[Kind, float] = dict(view.waiting)
        for kind, rate_hz in view.arrival_rates_hz.items():
            counts[kind] = counts.get(kind, 0.0) + forecast.mean * rate_hz / known_hz
        total = sum(counts.values())
        steps = [
            (count / total * time_s, count / total * value)
            for kind, count in counts.items()
            for time_s, value in hulls[kind]
        ]
        steps.sort(key=lambda step: -step[1] / step[0])
        time_s = self._config.utilisation * forecast.horizon_s * view.workers
        time_s += self._config.slack * 2 * view.batch_limit_s * view.workers
        time_s -= sum(end_s - view.now for end_s in view.busy_until_s)
        deviation = self._config.caution * math.sqrt(forecast.variance)
        slopes = [value / step_s for step_s, value in steps] + [0.0]
        corner_s, price = 0.0, 0.0
        for (step_s, _), (slope, lower) in zip(steps, pairwise(slopes), strict=True):
            corner_s += step_s
            price += (slope - lower) * _exceeds(max(time_s, 0.0) / corner_s - waiting, forecast.mean, deviation)
        return price


def _exceeds(bound: float, mean: float, deviation: float) -> float:
    """P(X > bound) for a normal X."""
    if deviation <= 0:
        return float(mean > bound)
    return 0.5 * math.erfc((bound - mean) / (deviation * math.sqrt(2)))


def _sizes(most: int) -> npt.NDArray[np.int64]:
    """Powers of two, and eighths of what waits: a batch that is a little too long need not shrink by half."""
    powers = [1 << i for i in range(most.bit_length())]
    eighths = [most - most * i // 8 for i in range(5)]
    return np.array(sorted({*powers, *eighths}), np.int64)


def _efficient_size(view: View) -> int:
    """What a backlog is served in: the largest batch within the limit at the cheapest rung."""
    return largest_within(view.latency, view.ladder.frontier[0], view.batch_limit_s, view.max_batch_size)


def _hull(view: View, kind: Kind, size: int) -> list[tuple[float, float]]:
    """Steps (time, value) of the concave envelope from nothing over the kind's rungs, steepest first."""
    rungs = sorted({min(max(rung, kind.floor), kind.ceiling) for rung in view.ladder.frontier})
    points = [(0.0, 0.0)]
    for rung in rungs:
        point = (view.latency.uniform_s(rung, size) / size, kind.weight * view.ladder.values[rung])
        if point[1] <= points[-1][1]:
            continue
        while len(points) > 1 and _slope(points[-2], points[-1]) <= _slope(points[-2], point):
            points.pop()
        points.append(point)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(points)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / max(b[0] - a[0], 1e-12)


def _candidates(
    view: View,
    kinds: Sequence[Kind],
    sizes: npt.NDArray[np.int64],
    hulls: Mapping[Kind, list[tuple[float, float]]],
    price: float,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """For each level of the ladder: rungs of the first requests; gain over waiting and median latency of each size.

    Works on the few kinds that occur, not on every request. Axes: U kinds, P rungs.
    """
    index = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    codes = np.array([index[kind] for kind in kinds])
    present = np.cumsum(codes[:, None] == np.arange(len(index)), axis=0)[sizes - 1]  # (sizes, U)
    floors, ceilings, weights = np.array(list(index)).T
    later = [sum(max(value - price * time_s, 0.0) for time_s, value in hulls[kind]) for kind in index]
    rungs = np.clip(np.array(view.ladder.frontier)[:, None], floors, ceilings).astype(np.int64)  # (levels, U)
    gains = (np.array(view.ladder.values)[rungs] * weights - later) @ present.T
    # The formula of `server.latency`, rung by rung: those at rung p fill the places after all that are costlier.
    every = np.arange(len(view.ladder))
    counts = present @ (rungs[:, :, None] == every)  # (levels, sizes, P)
    until = np.cumsum(counts[..., ::-1], axis=-1)[..., ::-1]
    table_s = view.latency.table_s
    medians = (table_s[every, until] - table_s[every, until - counts]).sum(axis=-1)
    return rungs[:, codes], gains, medians
