"""What became of every request of a trace, as columns. Live and simulated runs fill it, reports read it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, get_args

import numpy as np
import numpy.typing as npt

from server.decision import ServeReason, ShedReason

SERVE_REASONS: Final[tuple[ServeReason, ...]] = get_args(ServeReason)
SHED_REASONS: Final[tuple[ShedReason, ...]] = get_args(ShedReason)


class Outcome(IntEnum):
    """How a request ended. From `SHED` on it was refused on arrival, the rest is an index into `SHED_REASONS`.

    met: answered in time.
    late: answered after its deadline.
    expired: admitted, and dropped from the queue when no answer could be in time any more.
    failed: no answer for another reason: no connection, a time-out of the client, an error that is no refusal.
    unfinished: no outcome; a run that ends with one has lost a request.
    """

    met = 0
    late = 1
    expired = 2
    failed = 3
    unfinished = 4
    SHED = 5


REASON_CODES: Final[dict[ServeReason, int]] = {reason: code for code, reason in enumerate(SERVE_REASONS)}
SHED_CODES: Final[dict[ShedReason, int]] = {
    reason: int(Outcome.SHED) + code for code, reason in enumerate(SHED_REASONS)
}


@dataclass(frozen=True, eq=False)
class Outcomes:
    """N requests in order of arrival, M batches in order of their start.

    Attributes:
        outcome: (N,) uint8 `Outcome`.
        deadline_s: (N,) from the arrival; NaN until the run knows it.
        rung: (N,) int16 of the ladder; -1 where there was no answer.
        reason: (N,) uint8 index into `SERVE_REASONS`; of answers only.
        queue_s: (N,) from the arrival until its batch started or it was dropped; NaN where it was refused.
        latency_s: (N,) from the arrival to the answer. An expired or failed request counts at least its deadline: who
            waits for an answer that does not come waits no shorter than for one that is late. NaN where it was refused.
        inference_s: (N,) from the start of its batch to its end; NaN where there was no answer.
        labelled: (N,) bool, the right class is known; never in a simulated run.
        right: (N,) bool, labelled and answered with that class.
        batch_size: (M,) uint16.
        decision_s: (M,) time that each decision took on this machine's clock.
    """

    outcome: npt.NDArray[np.uint8]
    deadline_s: npt.NDArray[np.float64]
    rung: npt.NDArray[np.int16]
    reason: npt.NDArray[np.uint8]
    queue_s: npt.NDArray[np.float64]
    latency_s: npt.NDArray[np.float64]
    inference_s: npt.NDArray[np.float64]
    labelled: npt.NDArray[np.bool_]
    right: npt.NDArray[np.bool_]
    batch_size: npt.NDArray[np.uint16]
    decision_s: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, size: int) -> Outcomes:
        """Room for `size` requests, none finished."""
        return cls(
            np.full(size, Outcome.unfinished, np.uint8),
            np.full(size, np.nan),
            np.full(size, -1, np.int16),
            np.zeros(size, np.uint8),
            np.full(size, np.nan),
            np.full(size, np.nan),
            np.full(size, np.nan),
            np.zeros(size, np.bool_),
            np.zeros(size, np.bool_),
            np.zeros(0, np.uint16),
            np.zeros(0, np.float32),
        )

    def part(self, keep: slice | npt.NDArray[np.bool_]) -> Outcomes:
        """Some of the requests; what is known of batches only is dropped, for a batch may hold others."""
        return Outcomes(
            self.outcome[keep],
            self.deadline_s[keep],
            self.rung[keep],
            self.reason[keep],
            self.queue_s[keep],
            self.latency_s[keep],
            self.inference_s[keep],
            self.labelled[keep],
            self.right[keep],
            np.zeros(0, np.uint16),
            np.zeros(0, np.float32),
        )

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        """(N,) in time or not."""
        return self.outcome <= Outcome.late
