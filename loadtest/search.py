"""The highest rate at which objectives hold. Pure: whoever calls it makes the trials.

    doubling       from the first rate up while trials hold, or down by half until one does, at most to a sixteenth
    bisection      between the last that held and the first that did not, on a logarithmic scale
    confirmation   trials of other seeds at the rate found; where one fails, the next lower rate is tried

One trial says little near the limit, which is why the rate must hold again with arrivals of other seeds. A trial in
which the objectives hold and which is not valid, for instance because the generator hung for a moment, is made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

Phase = Literal["doubling", "bisection", "confirmation"]

# All chosen, not tuned. A machine that others use too does not repeat itself more closely.
TOLERANCE: Final = 0.05
_CONFIRMATIONS: Final = 3
_ATTEMPTS: Final = 3
_MOST_LOWERED: Final = 5
_LOWEST: Final = 1 / 16  # of the first rate: below, a trial with requests enough takes long


@dataclass(frozen=True)
class Objective:
    """What must hold.

    Attributes:
        p99_s: of latency, from the schedule, at most.
        max_shed: share of requests without an answer, refused, dropped or failed, at most.
    """

    p99_s: float
    max_shed: float

    def missed(self, p99_s: float | None, unanswered: float) -> list[str]:
        """Why it does not hold."""
        found = []
        if p99_s is None or p99_s > self.p99_s:
            measured = "unknown" if p99_s is None else f"{1000 * p99_s:.1f} ms"
            found.append(f"p99 {measured}, at most {1000 * self.p99_s:g} ms")
        if unanswered > self.max_shed:
            found.append(f"{100 * unanswered:.2f} % without an answer, at most {100 * self.max_shed:g} %")
        return found


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Trial(_Model):
    """One run.

    Attributes:
        unanswered: share of requests.
        missed: objectives that did not hold; invalid: why the run may not be relied on. It held where both are empty.
        interrupted: stopped by hand.
    """

    phase: Phase
    rate_hz: float
    seed: int
    offered: int
    p99_s: float | None
    unanswered: float
    effective_accuracy: float | None
    missed: list[str]
    invalid: list[str]
    interrupted: bool = False

    @property
    def held(self) -> bool:
        return not self.missed and not self.invalid


class Search(_Model):
    """What was found.

    Attributes:
        rate_hz: the highest that held and was confirmed; null where none was.
        p99_s, max_shed: the objectives.
    """

    rate_hz: float | None
    p99_s: float
    max_shed: float
    trials: list[Trial]


class _Stopped(Exception):
    """By hand."""


def find_max(
    start_hz: float,
    seed: int,
    objective: Objective,
    run: Callable[[Phase, float, int], Trial],
    tolerance: float = TOLERANCE,
) -> Search:
    """Makes trials until the rate is known.

    Arguments:
        run: a trial of this phase, rate and seed.
        tolerance: between the highest rate that holds and the lowest that does not, as a share.
    """
    trials: list[Trial] = []

    def holds(phase: Phase, rate_hz: float, trial_seed: int) -> bool:
        for _ in range(_ATTEMPTS):
            trials.append(run(phase, rate_hz, trial_seed))
            if trials[-1].interrupted:
                raise _Stopped
            if trials[-1].missed or not trials[-1].invalid:
                break
        return trials[-1].held

    def found(rate_hz: float | None) -> Search:
        return Search(rate_hz=rate_hz, p99_s=objective.p99_s, max_shed=objective.max_shed, trials=trials)

    try:
        low, high = 0.0, math.inf
        rate_hz = start_hz
        while rate_hz >= _LOWEST * start_hz and (low == 0 or high == math.inf):
            if holds("doubling", rate_hz, seed):
                low, rate_hz = rate_hz, 2 * rate_hz
            else:
                high, rate_hz = rate_hz, rate_hz / 2
        while low and high > low * (1 + tolerance):
            rate_hz = math.sqrt(low * high)
            low, high = (rate_hz, high) if holds("bisection", rate_hz, seed) else (low, rate_hz)
        for _ in range(_MOST_LOWERED if low else 0):
            if all(holds("confirmation", low, seed + other) for other in range(1, _CONFIRMATIONS + 1)):
                return found(low)
            low /= 1 + tolerance
    except _Stopped:
        pass
    return found(None)
