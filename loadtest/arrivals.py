"""Arrival processes. Pure: a seeded generator in, seconds from the start out, (N,) ascending, below the duration.

`rate_hz` is always the mean over the whole duration, so that processes of one rate differ in their shape alone. Times
of changing rate are drawn by thinning (Lewis and Shedler 1979): a Poisson process at the highest rate, of which each
arrival is kept with probability rate(t) / highest rate. Where the cumulative rate has an inverse in closed form, ramp
and step, they are drawn by it: given their number, arrivals are independent with the cumulative rate as distribution.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


def constant(rate_hz: float, duration_s: float) -> Times:
    """Evenly spaced, from 0."""
    return np.arange(round(rate_hz * duration_s)) / rate_hz


def poisson(rate_hz: float, duration_s: float, generator: np.random.Generator) -> Times:
    """Independent arrivals: a Poisson number of them, uniform over the duration."""
    return np.sort(generator.uniform(0.0, duration_s, generator.poisson(rate_hz * duration_s)))


def gamma(rate_hz: float, duration_s: float, cv: float, generator: np.random.Generator) -> Times:
    """Gaps with a Gamma distribution.

    Arguments:
        cv: coefficient of variation of a gap; 1 is Poisson, above it arrivals clump.
    """
    if cv <= 0:
        raise ValueError(f"the coefficient of variation must be above 0, got {cv}")
    shape = 1 / cv**2
    pieces: list[Times] = []
    end_s = 0.0
    while end_s < duration_s:
        gaps = generator.gamma(shape, 1 / (rate_hz * shape), max(round(rate_hz * duration_s / 4), 64))
        pieces.append((end_s + np.cumsum(gaps)).astype(np.float64))
        end_s = float(pieces[-1][-1])
    times = np.concatenate(pieces)
    return times[times < duration_s]


def on_off(
    rate_hz: float,
    duration_s: float,
    generator: np.random.Generator,
    *,
    on_s: float = 0.5,
    off_s: float = 2.5,
    factor: float = 5.0,
) -> Times:
    """Poisson: pauses of `off_s`, from the start on, each before a burst of `on_s` at `factor` times their rate."""
    period_s = off_s + on_s

    def shape(times: Times) -> Times:
        return np.where(times % period_s >= off_s, factor, 1.0)

    return thinned(shape, factor, rate_hz, duration_s, generator)


def diurnal(
    rate_hz: float,
    duration_s: float,
    generator: np.random.Generator,
    *,
    period_s: float | None = None,
    amplitude: float = 0.8,
) -> Times:
    """A day that starts at its quietest: a rate of 1 - amplitude * cos(2 pi t / period) times the mean.

    Arguments:
        period_s: one day; the duration where it is None.
        amplitude: 0 to 1.
    """
    if not 0 <= amplitude <= 1:
        raise ValueError(f"the amplitude must lie between 0 and 1, got {amplitude}")
    day_s = duration_s if period_s is None else period_s

    def shape(times: Times) -> Times:
        return 1.0 - amplitude * np.cos(2 * np.pi * times / day_s)

    return thinned(shape, 1.0 + amplitude, rate_hz, duration_s, generator)


def spike(
    rate_hz: float,
    duration_s: float,
    generator: np.random.Generator,
    *,
    start_s: float | None = None,
    length_s: float = 2.0,
    factor: float = 10.0,
) -> Times:
    """Poisson, with `factor` times as much for `length_s` from `start_s` on, by default a third into the trace."""
    first_s = duration_s / 3 if start_s is None else start_s

    def shape(times: Times) -> Times:
        return np.where((times >= first_s) & (times < first_s + length_s), factor, 1.0)

    return thinned(shape, factor, rate_hz, duration_s, generator)


def ramp(rate_hz: float, duration_s: float, generator: np.random.Generator, *, factor: float = 10.0) -> Times:
    """Poisson, at a rate that changes evenly until it is `factor` times the first; below 1 it falls."""
    if factor <= 0:
        raise ValueError(f"the factor must be above 0, got {factor}")
    # With x = t / duration and a mean of 1: rate a + (b - a) x, a = 2 / (1 + factor), b = a factor. Its integral
    # a x + (b - a) x^2 / 2 is solved for x in the form that also holds where a = b.
    first = 2 / (1 + factor)
    shares = _shares(rate_hz, duration_s, generator)
    return duration_s * 2 * shares / (first + np.sqrt(first**2 + 2 * first * (factor - 1) * shares))


def step(
    rate_hz: float, duration_s: float, generator: np.random.Generator, *, factor: float = 4.0, levels: int = 2
) -> Times:
    """Poisson, at `levels` constant rates of equal length, evenly spaced up to `factor` times the first."""
    if factor <= 0 or levels < 2:
        raise ValueError(f"steps need a factor above 0 and at least 2 levels, got {factor} and {levels}")
    cumulative = np.concatenate([[0.0], np.cumsum(np.linspace(1.0, factor, levels))])
    times_s = np.linspace(0.0, duration_s, levels + 1)
    shares = _shares(rate_hz, duration_s, generator)
    return np.interp(shares, cumulative / cumulative[-1], times_s).astype(np.float64)


def _shares(rate_hz: float, duration_s: float, generator: np.random.Generator) -> Times:
    """(N,) ascending in [0, 1): values of the normalised cumulative rate at the arrivals of a Poisson process."""
    return poisson(rate_hz * duration_s, 1.0, generator)


def thinned(
    shape: Callable[[Times], Times],
    highest: float,
    rate_hz: float,
    duration_s: float,
    generator: np.random.Generator,
) -> Times:
    """A Poisson process whose rate follows `shape`, scaled to a mean of `rate_hz`.

    Arguments:
        shape: relative rate at (N,) times, between 0 and `highest`.
    """
    # The mean of the shape by the midpoint rule. Its steps need not fall on the grid: 1e-5 of the duration is far below
    # the Poisson noise of any trace that fits into memory.
    grid = np.arange(0.5, 100_000.0) * (duration_s / 100_000)
    mean = float(shape(grid).mean())
    times = poisson(rate_hz * highest / mean, duration_s, generator)
    return times[generator.uniform(0.0, highest, len(times)) < shape(times)]
