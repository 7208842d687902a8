"""Short-window estimate of the arrival rate, per kind of request. Pure: the caller passes `now`.

An arrival counts exp(-age / window): the estimate reacts within one window and needs no list of the past.

Burstiness is the index of dispersion, variance over mean of the counts n_i in consecutive bins of one window; 1 for a
Poisson process. It is pi / 2 times the square of the average, over about `_BINS` bins, of

    |n_i - n_(i-1)| / sqrt(n_i + n_(i-1))

which is exact for normal counts. Differences of neighbours, each over its own mean and not squared: a load that moves
to another level does not count as bursty for long.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Generic, TypeVar

from server.policies.base import Forecast

Kind = TypeVar("Kind", bound=Hashable)

_BINS = 30  # chosen: a few seconds of windows of 0.1 s
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
        self._bin_end_s: float | None = None
        self._bin_count = self._last_count = self._num_bins = 0
        self._jump = 0.0

    def arrived(self, kind: Kind, now: float) -> None:
        self._decay(now)
        self._bin(now)
        self._counts[kind] = self._counts.get(kind, 0.0) + 1.0

    @property
    def dispersion(self) -> float:
        """Variance over mean of the counts per window, at least 1."""
        return max(1.0, math.pi / 2 * self._jump**2)

    def forecast(self, now: float, horizon_s: float, dispersion: float) -> Forecast:
        """Arrivals within the next `horizon_s` at the present rate.

        The variance is that of the arrivals and that of the estimate, which averages over two windows.
        """
        mean = self.rate_hz(now) * horizon_s
        return Forecast(horizon_s, mean, dispersion * mean * (1 + horizon_s / (2 * self._window_s)))

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
        if self._bin_end_s is None:
            self._bin_end_s = now + self._window_s
        elif now >= self._bin_end_s:
            empty = min(int((now - self._bin_end_s) / self._window_s), _BINS)
            for count in [self._bin_count] + [0] * empty:
                if self._num_bins and (both := count + self._last_count):
                    jump = abs(count - self._last_count) / math.sqrt(both)
                    self._jump += (jump - self._jump) / self._num_bins
                self._num_bins = min(self._num_bins + 1, _BINS)
                self._last_count = count
            self._bin_count, self._bin_end_s = 0, now + self._window_s
        self._bin_count += 1
