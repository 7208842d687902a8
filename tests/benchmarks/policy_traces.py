"""The traces on which policies are compared: seeded, 60 s each, rates as multiples of the full-accuracy capacity.

Capacity is the largest batch over its time at the full point: what one worker holds without degrading anybody. The
rates of the shaped traces are chosen, not tuned: calm stretches can be served at the full point and bursts cannot be at
any.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loadtest import arrivals
from loadtest.trace import Trace

DURATION_S = 60.0

Draw = Callable[[float, np.random.Generator], arrivals.Times]


def _poisson(load: float) -> Draw:
    return lambda capacity_hz, generator: arrivals.poisson(load * capacity_hz, DURATION_S, generator)


TRACES: dict[str, Draw] = {
    "Poisson 0.5x": _poisson(0.5),
    "Poisson 0.9x": _poisson(0.9),
    "Poisson 1.2x": _poisson(1.2),
    "Poisson 2x": _poisson(2.0),
    # Mean 0.7x; a gap of CV 4 has an index of dispersion of 16.
    "Gamma CV 4": lambda capacity_hz, generator: arrivals.gamma(0.7 * capacity_hz, DURATION_S, 4.0, generator),
    # 0.5 s at 2x, 2.5 s at 0.4x: mean 2/3.
    "on-off 1:5": lambda capacity_hz, generator: arrivals.on_off(2 / 3 * capacity_hz, DURATION_S, generator),
    # From 0.16x to 1.44x and back.
    "diurnal": lambda capacity_hz, generator: arrivals.diurnal(0.8 * capacity_hz, DURATION_S, generator),
    # 0.5x, and 5x for 2 s: mean 0.5 * (58 + 20) / 60.
    "spike 10x": lambda capacity_hz, generator: arrivals.spike(0.65 * capacity_hz, DURATION_S, generator),
}


def draw(name: str, capacity_hz: float, seed: int) -> Trace:
    """One of `TRACES`; each has its own stream of the seed."""
    stream = list(TRACES).index(name)
    return Trace.of(TRACES[name](capacity_hz, np.random.default_rng([seed, stream])))
