"""Short-window estimate of the arrival rate, per kind of request. Pure: the caller passes `now`.

An arrival counts exp(-age / window): the estimate reacts within one window and needs no list of the past. Burstiness is
the index of dispersion, variance over mean of the counts in consecutive bins of one window, both averaged over about
`_BINS` bins; 1 for a Poisson process.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Generic, TypeVar

Kind = TypeVar("Kind", bound=Hashable)

_BINS = 50  # chosen: a few seconds of windows of 0.1 s
# A kind that has fallen below this share of one arrival is forgotten, which bounds what clients can make us remember.
_FORGOTTEN = 1e-3


class ArrivalRate(Generic[Kind]):
    """Decayed counts.

    Arguments:
        window_s: time constant of the decay.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._counts: dict[Kind, float] = {}
        self._since_s = 0.0
        self._bin_end_s = 0.0
        self._bin_count = 0
        self._mean: float | None = None
        self._variance = 0.0

    def arrived(self, kind: Kind, now: float) -> None:
        self._decay(now)
        self._bin(now)
        self._counts[kind] = self._counts.get(kind, 0.0) + 1.0

    @property
    def dispersion(self) -> float:
        """Variance over mean of the counts per window, at least 1."""
        return max(1.0, self._variance / self._mean) if self._mean else 1.0

    def rate_hz(self, now: float) -> float:
        """Arrivals per second of all kinds."""
        return sum(self._counts.values()) * self._decayed(now) / self._window_s

    def by_kind(self, now: float) -> dict[Kind, float]:
        """Arrivals per second of each kind that was seen lately."""
        factor = self._decayed(now) / self._window_s
        return {kind: count * factor for kind, count in self._counts.items()}

    def _decayed(self, now: float) -> float:
        return math.exp((self._since_s - now) / self._window_s)

    def _decay(self, now: float) -> None:
        """Counts are kept as of `since_s` and brought forward once in a while: one exponential, not one per kind."""
        factor = self._decayed(now)
        self._since_s = now
        for kind, count in list(self._counts.items()):
            if (count := count * factor) < _FORGOTTEN:
                del self._counts[kind]
            else:
                self._counts[kind] = count

    def _bin(self, now: float) -> None:
        """Closes the bins that have ended, empty ones included."""
        if now >= self._bin_end_s:
            empty = min(int((now - self._bin_end_s) / self._window_s), 4 * _BINS)
            for count in [self._bin_count] + [0] * empty:
                if self._mean is None:
                    self._mean = float(count)
                off = count - self._mean
                self._mean += off / _BINS
                self._variance += (off * off - self._variance) / _BINS
            self._bin_count, self._bin_end_s = 0, now + self._window_s
        self._bin_count += 1
