"""What is offered when: traces drawn from the options of the command line. The same seed gives the same trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from loadtest import arrivals
from loadtest.errors import LoadtestError
from loadtest.trace import Trace
from server.budgets import DEFAULT_BUDGET


class Kind(StrEnum):
    """Arrival processes."""

    constant = "constant"
    poisson = "poisson"
    gamma = "gamma"
    on_off = "on-off"
    diurnal = "diurnal"
    spike = "spike"


def draw(
    kind: Kind,
    rate_hz: float,
    duration_s: float,
    *,
    seed: int,
    cv: float = 4.0,
    factor: float | None = None,
    budget: Sequence[str] = (),
    deadline_ms: float | None = None,
) -> Trace:
    """A trace of one arrival process.

    Arguments:
        cv: gamma: coefficient of variation of the gaps.
        factor: on-off, spike: height of a burst; by default 5 and 10.
        budget: NAME=SHARE of each; all of the default budget where there is none.
        deadline_ms: of every request; the budget's where it is None.

    Raises:
        LoadtestError: an option makes no trace.
    """
    positive = {
        "--rate": rate_hz,
        "--duration": duration_s,
        "--cv": cv,
        "--factor": factor,
        "--deadline-ms": deadline_ms,
    }
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise LoadtestError(f"{name} must be finite and above 0, got {value}")
    generator = np.random.default_rng(seed)
    times = _times(kind, rate_hz, duration_s, cv, factor, generator)
    names, shares = _shares(budget or [f"{DEFAULT_BUDGET}=1"])
    codes = generator.choice(len(names), size=len(times), p=shares)
    deadlines = None if deadline_ms is None else np.full(len(times), deadline_ms / 1000)
    return Trace.of(times, codes, names, deadlines)


def _times(
    kind: Kind, rate_hz: float, duration_s: float, cv: float, factor: float | None, generator: np.random.Generator
) -> arrivals.Times:
    match kind:
        case Kind.constant:
            return arrivals.constant(rate_hz, duration_s)
        case Kind.poisson:
            return arrivals.poisson(rate_hz, duration_s, generator)
        case Kind.gamma:
            return arrivals.gamma(rate_hz, duration_s, cv, generator)
        case Kind.on_off:
            return arrivals.on_off(rate_hz, duration_s, generator, factor=5.0 if factor is None else factor)
        case Kind.diurnal:
            return arrivals.diurnal(rate_hz, duration_s, generator)
        case Kind.spike:
            return arrivals.spike(rate_hz, duration_s, generator, factor=10.0 if factor is None else factor)


def _shares(texts: Sequence[str]) -> tuple[list[str], list[float]]:
    """Names and shares that sum to 1."""
    shares: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            shares[name] = float(number or 1)
        except ValueError as error:
            raise LoadtestError(f"--budget must be NAME=SHARE with a number above 0, got {text!r}") from error
        if not (name and math.isfinite(shares[name]) and shares[name] > 0):
            raise LoadtestError(f"--budget must be NAME=SHARE with a number above 0, got {text!r}")
    total = sum(shares.values())
    return list(shares), [share / total for share in shares.values()]
