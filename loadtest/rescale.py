"""Fits a recorded trace to the machine at hand: a part of it, faster or slower, with more or fewer requests."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from loadtest.errors import LoadtestError
from loadtest.trace import Trace


@dataclass(frozen=True)
class Rescaling:
    """What to change, in this order.

    Attributes:
        from_s, to_s: the part of the trace that is kept; its clock starts at `from_s`.
        time_scale: length of the result over that of the trace; below 1 the same requests come faster.
        rate_scale: requests of the result over those of the trace, in the same time.
    """

    from_s: float = 0.0
    to_s: float = math.inf
    time_scale: float = 1.0
    rate_scale: float = 1.0

    @classmethod
    def parse(cls, window: str | None, time_scale: float, rate_scale: float) -> Rescaling:
        """From the options of the command line; a window is FROM:TO in seconds, either may be left out.

        Raises:
            LoadtestError: an option means nothing.
        """
        for name, value in (("--time-scale", time_scale), ("--rate-scale", rate_scale)):
            if not (math.isfinite(value) and value > 0):
                raise LoadtestError(f"{name} must be finite and above 0, got {value}")
        start, separator, end = (window or ":").partition(":")
        try:
            from_s, to_s = float(start or 0.0), float(end or math.inf)
        except ValueError:
            from_s = to_s = math.nan
        if not (separator and 0 <= from_s < to_s):
            raise LoadtestError(f"--window must be FROM:TO in seconds, FROM before TO and at least 0, got {window!r}")
        return cls(from_s, to_s, time_scale, rate_scale)

    def __str__(self) -> str:
        """What was changed, for the report; empty where nothing was."""
        window = "" if (self.from_s, self.to_s) == (0.0, math.inf) else f", window {self.from_s:g}:{self.to_s:g} s"
        scales = (("time", self.time_scale), ("rate", self.rate_scale))
        return window + "".join(f", {name} scale {value:g}" for name, value in scales if value != 1)

    def applied(self, trace: Trace, generator: np.random.Generator) -> Trace:
        """The part, scaled."""
        first, last = np.searchsorted(trace.arrival_s, (self.from_s, self.to_s)).tolist()
        trace = trace.part(slice(first, last), self.from_s)
        # Copies of the last request come within a second of it: there is no next one.
        length_s = min(self.to_s - self.from_s, trace.duration_s + 1.0)
        if self.rate_scale != 1:
            trace = _copied(trace, self.rate_scale, length_s, generator)
        return replace(trace, arrival_s=trace.arrival_s * self.time_scale)


def _copied(trace: Trace, scale: float, end_s: float, generator: np.random.Generator) -> Trace:
    """Every request `scale` times on average. A copy comes between its original and the next one, so that the rate of
    every moment scales, and a burst does not turn into requests at the same instant."""
    counts = np.floor(scale) + (generator.uniform(size=len(trace)) < scale % 1)
    places = np.repeat(np.arange(len(trace)), counts.astype(np.intp))
    gap_s = np.diff(trace.arrival_s, append=end_s)
    is_copy = np.diff(places, prepend=-1) == 0
    arrival_s = trace.arrival_s[places] + gap_s[places] * generator.uniform(size=len(places)) * is_copy
    order = np.argsort(arrival_s, kind="stable")
    return replace(trace.part(places[order]), arrival_s=arrival_s[order])
