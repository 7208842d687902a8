"""How long will this batch take? The manifest's profile, corrected online by what batches really took. No clock.

Axes: P rungs of the ladder, N the largest batch, B the batch sizes of the profile.

**Mixed batches.** The profile knows batches of one rung, T[p][n]. In a batch of several, images are put in descending
order of cost and the i-th adds what it would add to a batch of its own rung:

    latency = sum over i = 1..n of  T[p_i][i] - T[p_i][i - 1],    p_1 >= p_2 >= ... >= p_n,   T[p][0] = 0

The costliest image pays what a batch costs at all, every other one its own share of work (measured:
`python -m tests.benchmarks.mixed_batches`, figures in docs/scheduling.md). Increments are kept non-negative and
non-decreasing in p, so that lowering or removing an image never makes the prediction longer: admission relies on that.

**Correction.** r = ln(measured / predicted median) of a batch moves a scale common to all cells (the machine is slower,
or has a noisy neighbour) by a Huber step and, more slowly, the cells of the batch's rungs at the profiled sizes around
n. A clipped step makes one outlier worth at most `SCALE_STEP * CLIP`; a machine at half speed is followed within
20 batches. The q-quantile is the median times exp(z * sigma[n]): sigma comes from the profile's p99, and z follows the
residuals r / sigma by quantile tracking (z += step * (q - [r / sigma <= z]); Robbins and Monro 1951).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from exporter.bundle import Point

# Chosen by what tests/server/test_latency_model.py asks for: half the speed is followed within 20 batches, a recovery
# within 40, and one stall of 50x moves predictions by less than 7 %.
CLIP = 0.25
SCALE_STEP = 0.2
CELL_STEP = 0.05
QUANTILE_STEP = 0.1
_MAX_CELL = math.log(2)
_MAX_SCALE = math.log(1000)
_MAX_Z = 20.0
_P99 = NormalDist().inv_cdf(0.99)
# Below this, timer resolution and the scheduler of the operating system decide, not the model. Above, one stall did.
_MIN_SIGMA, _MAX_SIGMA = 0.02, 0.5


class LatencyModel:
    """Predicts and learns. Holds nothing that outlives the process.

    Arguments:
        median_s: (P, B) seconds of a batch of one rung.
        sigma: (B,) standard deviation of ln(latency).
        batch_sizes: (B,) of the profile, ascending, from 1.
        max_batch_size: N; beyond the profile's largest batch, time grows as it did last.
        quantile: of `predict(high=True)`.
    """

    def __init__(
        self,
        median_s: npt.ArrayLike,
        sigma: npt.ArrayLike,
        batch_sizes: Sequence[int],
        max_batch_size: int,
        quantile: float = 0.9,
    ) -> None:
        self._profile = np.asarray(median_s, np.float64)
        self._sizes = np.asarray(batch_sizes, np.int64)
        if self._profile.shape != (len(self._profile), len(self._sizes)) or self._sizes[0] != 1:
            raise ValueError(
                f"a latency profile needs one row per rung and one column per batch size from 1, got "
                f"{self._profile.shape} for batch sizes {list(batch_sizes)}"
            )
        if not (np.isfinite(self._profile).all() and (self._profile > 0).all()):
            raise ValueError(f"latencies must be finite and above 0, got {self._profile.tolist()}")
        self.max_batch_size, self.quantile = max_batch_size, quantile
        self._interpolation = _interpolation(self._sizes, max_batch_size)  # (B, N + 1)
        self._steps = np.diff(self._interpolation, axis=1, prepend=0.0)  # (B, N + 1): interpolates increments
        sigma_by_size = np.clip(np.asarray(sigma, np.float64), _MIN_SIGMA, _MAX_SIGMA) @ self._interpolation
        self._sigmas = np.clip(sigma_by_size, _MIN_SIGMA, _MAX_SIGMA)
        self.sigma: list[float] = self._sigmas.tolist()
        self._scale = 0.0
        self._cells = np.zeros_like(self._profile)
        self._z = NormalDist().inv_cdf(quantile)
        self.median_s: list[list[float]] = []
        self._rebuild()

    @classmethod
    def of(cls, points: Sequence[Point], max_batch_size: int, quantile: float = 0.9) -> LatencyModel | None:
        """From a manifest; None where it holds no profile (`--rounds 0`, a dense model)."""
        if not points or any(not point.latency for point in points):
            return None
        sizes = [entry.batch_size for entry in points[0].latency]
        if sizes[0] != 1 or any([entry.batch_size for entry in point.latency] != sizes for point in points):
            return None
        median = [[entry.median_s for entry in point.latency] for point in points]
        tail = [[entry.p99_s / entry.median_s for entry in point.latency] for point in points]
        return cls(median, np.log(np.median(tail, axis=0)) / _P99, sizes, max_batch_size, quantile)

    @classmethod
    def guess(
        cls, costs: Sequence[float], single_s: float, full_batch_s: float, max_batch_size: int, quantile: float = 0.9
    ) -> LatencyModel:
        """Without a profile: the full rung measured alone and in a full batch, the others by relative compute.

        Arguments:
            costs: (P,) relative compute of each rung.
        """
        sizes = (1, max_batch_size) if max_batch_size > 1 else (1,)
        times = (single_s, max(single_s, full_batch_s))[: len(sizes)]
        return cls(np.outer(costs, times), np.full(len(sizes), 0.1), sizes, max_batch_size, quantile)

    @property
    def scale(self) -> float:
        """This machine's time over the profile's, as of now."""
        return math.exp(self._scale)

    def aim_at(self, quantile: float) -> None:
        """Changes the quantile; what was learned about the spread is kept."""
        normal = NormalDist()
        self._z = min(max(self._z + normal.inv_cdf(quantile) - normal.inv_cdf(self.quantile), 0.0), _MAX_Z)
        self.quantile = quantile
        self._rebuild()

    def uniform_s(self, rung: int, size: int, *, high: bool = False) -> float:
        """A batch of `size` images at one rung: the median, or the q-quantile."""
        median = self.median_s[rung][size]
        return median * self._high[size] if high else median

    def predict_s(self, rungs: Sequence[int], *, high: bool = False) -> float:
        """A batch of one image per entry of `rungs`, in any order."""
        size = len(rungs)
        median, placed = 0.0, 0
        for rung in sorted(set(rungs), reverse=True):
            row, start = self.median_s[rung], placed
            placed += rungs.count(rung)
            median += row[placed] - row[start]
        return median * self._high[size] if high else median

    def high_factor(self, size: int) -> float:
        """q-quantile over median of a batch of `size` images."""
        return self._high[size]

    @property
    def high_factors(self) -> npt.NDArray[np.float64]:
        """(N + 1,) q-quantile over median of a batch of n images."""
        return self._high_factors

    @property
    def table_s(self) -> npt.NDArray[np.float64]:
        """(P, N + 1) median of a batch of n images of one rung."""
        return self._table_s

    def observe(self, rungs: Sequence[int], measured_s: float) -> None:
        """Learns from a batch that took `measured_s`."""
        size = len(rungs)
        residual = math.log(max(measured_s, 1e-9) / self.predict_s(rungs))
        z = residual / self.sigma[size]
        self._z += QUANTILE_STEP * (self.quantile - (z <= self._z))
        self._z = min(max(self._z, 0.0), _MAX_Z)
        clipped = min(max(residual, -CLIP), CLIP)
        self._scale = min(max(self._scale + SCALE_STEP * clipped, -_MAX_SCALE), _MAX_SCALE)
        weights = self._interpolation[:, size]
        for rung in set(rungs):
            step = CELL_STEP * clipped * rungs.count(rung) / size
            self._cells[rung] += step * weights
        np.maximum(self._cells, -_MAX_CELL, out=self._cells)  # half the time of np.clip, once per batch
        np.minimum(self._cells, _MAX_CELL, out=self._cells)
        self._rebuild()

    def _rebuild(self) -> None:
        cells = self._profile * np.exp(self._scale + self._cells)
        increments = cells @ self._steps  # (P, N + 1)
        np.maximum(increments, 0.0, out=increments)
        np.maximum.accumulate(increments, axis=0, out=increments)
        self._table_s = increments.cumsum(axis=1)
        self.median_s = self._table_s.tolist()
        self._high_factors = np.exp(self._z * self._sigmas)
        self._high: list[float] = self._high_factors.tolist()


def _interpolation(sizes: npt.NDArray[np.int64], max_batch_size: int) -> npt.NDArray[np.float64]:
    """(B, N + 1) weights that interpolate linearly between profiled sizes, and extend the last segment beyond them."""
    weights = np.zeros((len(sizes), max_batch_size + 1))
    for n in range(1, max_batch_size + 1):
        right = min(int(np.searchsorted(sizes, n)), len(sizes) - 1)
        if len(sizes) == 1:  # one profiled size: time grows in proportion
            weights[0, n] = n
        elif sizes[right] == n:
            weights[right, n] = 1.0
        else:
            left = right - 1
            share = (n - sizes[left]) / (sizes[right] - sizes[left])
            weights[left, n], weights[right, n] = 1.0 - share, share
    return weights
