"""What arrives, shed requests included, and what policies are told to expect: a burst, and a load that lasts. Pure."""

from __future__ import annotations

from typing import Final

from server.arrival_rate import ArrivalRate
from server.policies.base import Forecast, Kind

# The rate of a burst is measured over this share of a horizon. A whole one notices bursts too late, an eighth is noise
# (simulated with `make bench-policy`'s traces on other seeds).
BURST_WINDOW: Final = 0.25
# A load that lasts is told from a burst over this many horizons. Chosen, not tuned.
LONG_HORIZON: Final = 10


class OfferedLoad:
    """Arrival rates over a short and a long window.

    Arguments:
        horizon_s: how far ahead a burst is foreseen.
    """

    def __init__(self, horizon_s: float) -> None:
        self.horizon_s = horizon_s
        self._burst: ArrivalRate[None] = ArrivalRate(BURST_WINDOW * horizon_s)
        self._lasting: ArrivalRate[Kind] = ArrivalRate(LONG_HORIZON * horizon_s)

    def arrived(self, kind: Kind, now: float) -> None:
        self._burst.arrived(None, now)
        self._lasting.arrived(kind, now)

    def rate_hz(self, now: float) -> float:
        """Requests per second, over the long window."""
        return self._lasting.rate_hz(now)

    def by_kind(self, now: float) -> dict[Kind, float]:
        """The same of each kind that was seen lately."""
        return self._lasting.by_kind(now)

    def forecasts(self, now: float) -> list[Forecast]:
        """A burst and a load that lasts; how bursty arrivals are is measured over the short bins, which are many."""
        dispersion = self._burst.dispersion
        burst = max(
            self._burst.forecast(now, self.horizon_s, dispersion),
            self._lasting.forecast(now, self.horizon_s, dispersion),  # a lull between two bursts is no promise
            key=lambda forecast: forecast.mean,
        )
        return [burst, self._lasting.forecast(now, LONG_HORIZON * self.horizon_s, dispersion)]
