"""What became of every request of a trace, as columns. Live and simulated runs fill it, reports read it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, get_args

import numpy as np
import numpy.typing as npt

from server.scheduler import ServeReason, ShedReason

SERVE_REASONS: Final[tuple[ServeReason, ...]] = get_args(ServeReason)
SHED_REASONS: Final[tuple[ShedReason, ...]] = get_args(ShedReason)


class Outcome(IntEnum):
    """How a request ended. From `SHED` on it was refused on arrival, the rest is an index into `SHED_REASONS`.

    met: answered in time.
    late: answered after its deadline.
    expired: admitted, and dropped from the queue when no answer could be in time any more.
    unfinished: no outcome; a run that ends with one has lost a request.
    """

    met = 0
    late = 1
    expired = 2
    unfinished = 3
    SHED = 4


@dataclass(frozen=True, eq=False)
class Outcomes:
    """N requests in order of arrival, M batches in order of their start.

    Attributes:
        outcome: (N,) uint8 `Outcome`.
        rung: (N,) int16 of the ladder; -1 where there was no answer.
        reason: (N,) uint8 index into `SERVE_REASONS`; of answers only.
        queue_s: (N,) from the arrival until its batch started or it was dropped; NaN where it was refused.
        latency_s: (N,) from the arrival to the answer. An expired request counts at least its deadline: who waits for
            an answer that does not come waits no shorter than for one that is late. NaN where it was refused.
        batch_size: (M,) uint16.
        decision_s: (M,) time that each decision took on this machine's clock.
    """

    outcome: npt.NDArray[np.uint8]
    rung: npt.NDArray[np.int16]
    reason: npt.NDArray[np.uint8]
    queue_s: npt.NDArray[np.float64]
    latency_s: npt.NDArray[np.float64]
    batch_size: npt.NDArray[np.uint16]
    decision_s: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, size: int) -> Outcomes:
        """Room for `size` requests, none finished."""
        return cls(
            np.full(size, Outcome.unfinished, np.uint8),
            np.full(size, -1, np.int16),
            np.zeros(size, np.uint8),
            np.full(size, np.nan),
            np.full(size, np.nan),
            np.zeros(0, np.uint16),
            np.zeros(0, np.float32),
        )

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        """(N,) in time or not."""
        return self.outcome <= Outcome.late
