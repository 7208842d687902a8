"""May the figures of a live run be relied on? Pure: columns in, reasons against it out.

    too few requests       for the percentile asked, by MLPerf's rule of early stopping (below)
    generator fell behind  what was sent late was not the load that the report names
    not settled            latency at like load differs between the halves of what was counted

MLPerf Inference (github.com/mlcommons/inference_policies, inference_rules.adoc, "Early Stopping Criterion") asks how
many queries make the p-quantile of latency known with 99 % confidence. The number X of n requests that take longer
than the true quantile is Binomial(n, 1 - p). A run must be so long that P(X <= 1) <= 1 %: 64 requests for p90, 662
for p99, 6,636 for p99.9. Then the second largest latency is an upper bound of the quantile, and a longer run has a
closer one: the (t + 1)-th largest, of the largest t for which P(X <= t) <= 1 %. The older rule of a fixed count,
262,742 queries for a p99 whose share of 1 % is known to a twentieth, would take most gateways here the better part of
an hour.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]

CONFIDENCE: Final = 0.99
# Chosen, not tuned: a tenth of the shortest default deadline. Timers wake up to 1 ms late.
MAX_SEND_LAG_S: Final = 0.01
# All chosen, not tuned. 20 bins are enough to find like load in bursts and few enough to have a median each. A gateway
# on a machine that others use too changes by tens of per cent, one that still warms up or whose queue grows by more.
_BINS, _LEAST_IN_BIN, _LEAST_PAIRS = 20, 5, 5
_LIKE_LOAD, _UNLIKE_LATENCY, _AGREEING = 0.25, 1.5, 0.8


def least_requests(percentile: float) -> int:
    """How many requests a run needs for this percentile, in per cent, for instance 99."""
    rank = percentile / 100

    def enough(requests: int) -> bool:
        return (rank + requests * (1 - rank)) * rank ** (requests - 1) <= 1 - CONFIDENCE  # P(X <= 1)

    most = 2
    while not enough(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most


def percentile_bound_s(latency_s: Seconds, percentile: float) -> float | None:
    """What the percentile does not exceed, with 99 % confidence; None where the requests are too few to say.

    Arguments:
        latency_s: NaN of those that were refused.
    """
    admitted = latency_s[~np.isnan(latency_s)]
    size, rank = len(admitted), percentile / 100
    if size < least_requests(percentile):
        return None
    over = np.arange(1, math.ceil(size * (1 - rank)) + 1)
    # log P(X = t) from t to t + 1: (n - t) / (t + 1) * (1 - p) / p
    log_pmf = size * math.log(rank) + np.concatenate(
        [[0.0], np.cumsum(np.log((size - over + 1) / over) + math.log((1 - rank) / rank))]
    )
    log_cdf = np.logaddexp.accumulate(log_pmf)
    place = int(np.searchsorted(log_cdf, math.log(1 - CONFIDENCE), side="right"))  # t + 1
    return float(np.partition(admitted, size - place)[size - place])


def reasons(requests: int, percentile: float, send_lag_p99_s: float | None, unlike: str | None) -> list[str]:
    """Why the figures may not be relied on.

    Arguments:
        requests: sent after the warm-up.
        percentile: asked for.
        send_lag_p99_s: None in a closed loop, where nothing is due.
        unlike: what `unsettled` found.
    """
    found = []
    if requests < (least := least_requests(percentile)):
        found.append(f"{requests} requests after the warm-up are too few for a {percentile:g}th percentile: {least:,}")
    if send_lag_p99_s is not None and send_lag_p99_s > MAX_SEND_LAG_S:
        found.append(
            f"the generator fell behind: 1 % of requests were sent more than {1000 * send_lag_p99_s:.1f} ms late, "
            f"at most {1000 * MAX_SEND_LAG_S:g} ms are allowed"
        )
    return found + ([unlike] if unlike else [])


def unsettled(arrival_s: Seconds, latency_s: Seconds) -> str | None:
    """How the first half differs from the second at like load; None where it does not or where nothing can be said.

    The run is cut into 20 bins of equal length. Each bin of the first half is paired with one of the second in which
    about as many requests arrived, so that a ramp is no warm-up and a burst is compared with a burst. The halves
    differ where the medians of latency do, by a factor of 1.5 in the median pair and in the same direction in four of
    five pairs.

    Arguments:
        arrival_s: (N,) ascending, of what is counted.
        latency_s: (N,) NaN of those that were refused.
    """
    if len(arrival_s) < 2:
        return None
    edges = np.linspace(arrival_s[0], arrival_s[-1], _BINS + 1)
    cuts = np.searchsorted(arrival_s, edges[1:-1])
    offered = [len(part) for part in np.split(arrival_s, cuts)]
    admitted = [part[~np.isnan(part)] for part in np.split(latency_s, cuts)]
    medians = [float(np.median(part)) if len(part) >= _LEAST_IN_BIN else math.nan for part in admitted]
    pairs = np.array([(medians[first], medians[second]) for first, second in _like(offered, medians)])
    if len(pairs) < _LEAST_PAIRS:
        return None
    ratios = pairs[:, 0] / np.maximum(pairs[:, 1], 1e-9)
    before_ms, after_ms = 1000 * np.median(pairs, axis=0)
    halves = f"at like load the median was {before_ms:.3g} ms in the first half and {after_ms:.3g} ms in the second"
    if np.median(ratios) > _UNLIKE_LATENCY and (ratios > 1).mean() >= _AGREEING:
        return f"the warm-up was too short: {halves}"
    if np.median(ratios) < 1 / _UNLIKE_LATENCY and (ratios < 1).mean() >= _AGREEING:
        return f"latency did not settle: {halves}; it depends on how long the run lasts"
    return None


def _like(offered: list[int], medians: list[float]) -> list[tuple[int, int]]:
    """Pairs of bins, one of each half, with medians and about as many requests; each bin once."""
    half = _BINS // 2
    rest = {place for place in range(half, _BINS) if not math.isnan(medians[place])}
    pairs = []
    for first in range(half):
        if not rest or math.isnan(medians[first]):
            continue
        second = min(rest, key=lambda place: (abs(offered[place] - offered[first]), place))
        if abs(offered[second] - offered[first]) <= _LIKE_LOAD * max(offered[first], offered[second]):
            rest.remove(second)
            pairs.append((first, second))
    return pairs
