"""What is offered when: traces drawn from the options of the command line. The same seed gives the same trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    ramp = "ramp"
    step = "step"


@dataclass(frozen=True)
class Mix:
    """Wishes of requests, by share. A trace's own stay where a field is empty.

    Attributes:
        budgets: names and shares that sum to 1.
        deadlines_s: from the arrival, and shares that sum to 1; independent of the budgets.
    """

    budgets: tuple[tuple[str, float], ...] = ()
    deadlines_s: tuple[tuple[float, float], ...] = ()

    @classmethod
    def parse(cls, budget: Sequence[str] = (), deadline_ms: Sequence[str] = ()) -> Mix:
        """From NAME=SHARE and MILLISECONDS=SHARE; a share that is left out is 1, shares are made to sum to 1.

        Raises:
            LoadtestError: a text is neither.
        """
        deadlines = []
        for text, share in _shares("--deadline-ms", "MILLISECONDS", deadline_ms):
            number = _positive(text)
            if number is None:
                raise LoadtestError(f"--deadline-ms must be finite and above 0, got {text}")
            deadlines.append((number / 1000, share))
        return cls(tuple(_shares("--budget", "NAME", budget)), tuple(deadlines))

    def applied(self, trace: Trace, generator: np.random.Generator) -> Trace:
        """The trace with budgets and deadlines drawn by their shares."""
        codes, names, deadline_s = trace.budget, trace.budgets, trace.deadline_s
        if self.budgets:
            names = tuple(name for name, _ in self.budgets)
            shares = [share for _, share in self.budgets]
            codes = generator.choice(len(names), size=len(trace), p=shares).astype(np.int32)
        if self.deadlines_s:
            values, shares = map(list, zip(*self.deadlines_s, strict=True))
            deadline_s = generator.choice(values, size=len(trace), p=shares)
        return Trace.of(trace.arrival_s, codes, names, deadline_s, trace.image, trace.images)


def draw(
    kind: Kind,
    rate_hz: float,
    duration_s: float,
    *,
    seed: int,
    cv: float = 4.0,
    factor: float | None = None,
    levels: int = 2,
    mix: Mix | None = None,
) -> Trace:
    """A trace of one arrival process.

    Arguments:
        cv: gamma: coefficient of variation of the gaps.
        factor: on-off, spike: height of a burst; ramp, step: the last rate over the first; by default 5, 10, 10 and 4.
        levels: step: rates of equal length.
        mix: all of the default budget, with its deadline, where it is None.

    Raises:
        LoadtestError: an option makes no trace.
    """
    positive = {"--rate": rate_hz, "--duration": duration_s, "--cv": cv, "--factor": factor}
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise LoadtestError(f"{name} must be finite and above 0, got {value}")
    generator = np.random.default_rng(seed)
    times = _times(kind, rate_hz, duration_s, cv, factor, levels, generator)
    return (mix or Mix()).applied(Trace.of(times, budgets=(DEFAULT_BUDGET,)), generator)


def _times(
    kind: Kind,
    rate_hz: float,
    duration_s: float,
    cv: float,
    factor: float | None,
    levels: int,
    generator: np.random.Generator,
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
        case Kind.ramp:
            return arrivals.ramp(rate_hz, duration_s, generator, factor=10.0 if factor is None else factor)
        case Kind.step:
            return arrivals.step(
                rate_hz, duration_s, generator, factor=4.0 if factor is None else factor, levels=levels
            )


def _shares(option: str, what: str, texts: Sequence[str]) -> list[tuple[str, float]]:
    """What stands before each =, and shares that sum to 1."""
    shares: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        share = _positive(number or "1")
        if not name or share is None:
            raise LoadtestError(f"{option} must be {what}=SHARE with a number above 0, got {text!r}")
        shares[name] = share
    total = sum(shares.values())
    return [(name, share / total) for name, share in shares.items()]


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
