"""What the scheduler decides, as values: a request is refused, or runs in a batch at some rung, for a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from server.deadline_queue import Request

ShedReason = Literal["deadline", "share", "queue_full", "queue_bytes", "backend", "decoding", "too_short"]
ServeReason = Literal["ceiling", "slack", "load", "pinned", "fallback"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that is not admitted.

    Attributes:
        reason: a label of the metrics.
        retry_after_s: when the backlog will have room, should nobody else come. None where no backlog is the cause: an
            idle gateway would refuse it, too.
        detail: for people.
    """

    reason: ShedReason
    retry_after_s: float | None
    detail: str


@dataclass(eq=False, slots=True)
class Batch:
    """Requests that run together.

    Attributes:
        requests: in order of deadlines.
        rungs: where each is served.
        reasons: why there and not better.
        started_s: when.
        median_s, high_s: predicted latency, median and q-quantile.
    """

    requests: list[Request]
    rungs: list[int]
    reasons: list[ServeReason]
    started_s: float
    median_s: float
    high_s: float
