"""Confidence intervals of differences between two runs, from the bins of their timelines.

**Why blocks.** Requests of a run are not independent: they share a queue, a burst hits neighbours together, and what is
in the queue at the end of a bin is there at the start of the next. Intervals from single requests, as if they were
independent, come out several times too narrow. The bootstrap of blocks resamples stretches of consecutive bins, which
keep what is between neighbours (Kuensch 1989; circular: Politis and Romano 1992). Blocks grow with the cube root of the
number of bins (Hall, Horowitz and Jing 1995).

**Expanded percentiles.** Quantiles of resampled differences are too close together where blocks are few; they are taken
further out, as Student's t is wider than the normal distribution (Hesterberg 2015, "What Teachers Should Know About the
Bootstrap", section 4.3): at Phi(-sqrt(k / (k - 1)) t), t Student's quantile with k - 1 degrees of freedom, k blocks.

**Pairing.** Two runs of one trace see the same bursts: drawing the same blocks from both leaves what the bursts do to
both alike out of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 2000  # the 2.5 % quantile then lies within 0.7 % of itself, as a share; chosen, not tuned
# Four blocks. With fewer the expanded quantiles leave what can be resampled.
LEAST_BINS: Final = 12

Floats = npt.NDArray[np.float64]
# (R, B) how often each bin was drawn -> (R,) the figure of each resampled run; NaN where it has none.
Statistic = Callable[[Floats], Floats]


def block_length(bins: int) -> int:
    """Bins in a block."""
    return math.ceil(math.cbrt(bins) - 1e-9)


def draw_weights(bins: int, generator: np.random.Generator, resamples: int = RESAMPLES) -> Floats:
    """(R, B) how often each bin is drawn when blocks are, until there are as many bins as in the run."""
    length = block_length(bins)
    starts = generator.integers(0, bins, (resamples, -(-bins // length)))
    drawn = ((starts[:, :, None] + np.arange(length)) % bins).reshape(resamples, -1)[:, :bins]
    rows = np.arange(resamples)[:, None] * bins
    return np.bincount((rows + drawn).ravel(), minlength=resamples * bins).reshape(resamples, bins).astype(np.float64)


def interval(differences: Floats, blocks: float, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """(low, high) of resampled differences, (R,); None where none of them is known.

    Arguments:
        blocks: in a run.
    """
    known = differences[~np.isnan(differences)]
    if not len(known):
        return None
    tail = (1 - confidence) / 2
    share = NormalDist().cdf(-math.sqrt(blocks / (blocks - 1)) * _student(1 - tail, blocks - 1))
    low, high = np.quantile(known, (share, 1 - share)).tolist()
    return low, high


def ratio(parts: Floats, wholes: Floats) -> Statistic:
    """The sum of some (B,) parts over the sum of some (B,) wholes."""

    def statistic(weights: Floats) -> Floats:
        whole = weights @ wholes
        shares: Floats = np.divide(weights @ parts, whole, out=np.full(len(whole), np.nan), where=whole > 0)
        return shares

    return statistic


def quantile(values: Floats, counts: Floats, share: float) -> Statistic:
    """A quantile of what the bins hold.

    Arguments:
        values: (V,) ascending; counts: (B, V) of each in each bin.
    """

    def statistic(weights: Floats) -> Floats:
        upto = np.cumsum(weights @ counts, axis=1)
        total = upto[:, -1:] if upto.shape[1] else np.zeros((len(weights), 1))
        if not len(values):
            return np.full(len(weights), np.nan)
        place = (upto >= share * total).argmax(axis=1)
        return np.where(total[:, 0] > 0, values[place], np.nan)

    return statistic


def _student(share: float, freedom: float) -> float:
    """Student's quantile by the expansion in powers of 1 / freedom (Abramowitz and Stegun 26.7.5).

    With 3 degrees of freedom, the fewest here, it gives 3.16 in place of 3.18 at 97.5 %.
    """
    z = NormalDist().inv_cdf(share)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
