"""What a call to Triton can fail of, and what follows. No I/O, no clock.

Inference has no effect but its answer, so any failure that is the endpoint's and not the batch's may be tried again:
once, elsewhere, and only while an answer would still be in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Reason = Literal["refused", "connection", "hung", "not_ready", "mismatch", "queue_full", "timeout", "model"]
REASONS: Final[tuple[Reason, ...]] = (
    "refused",
    "connection",
    "hung",
    "not_ready",
    "mismatch",
    "queue_full",
    "timeout",
    "model",
)

# Statuses by which Triton's HTTP service names gRPC's, and those of a proxy in between that gets no answer.
_OF_HTTP: Final = {
    "404": "NOT_FOUND",
    "499": "CANCELLED",
    "502": "UNAVAILABLE",
    "503": "UNAVAILABLE",
    "504": "DEADLINE_EXCEEDED",
}

_ELSEWHERE: Final = frozenset({"refused", "connection", "hung", "not_ready", "mismatch", "queue_full"})
_FOR_CERTAIN: Final = frozenset({"refused", "hung", "not_ready", "mismatch"})
_OVERLOAD: Final = frozenset({"queue_full", "timeout"})


@dataclass(frozen=True)
class Failure:
    """Attributes:
    reason: a label of the metrics: `refused` to connect; `connection` lost; `hung`, probes got no answer; `not_ready`,
        the server has not loaded the model; `mismatch`, it serves another one; `queue_full`; `timeout`, no answer by
        the deadline; `model`, the model failed on the batch.
    detail: for logs; names hosts.
    """

    reason: Reason
    detail: str

    @property
    def elsewhere(self) -> bool:
        """Another endpoint may do better."""
        return self.reason in _ELSEWHERE

    @property
    def for_certain(self) -> bool:
        """The endpoint's next batch would fail, too."""
        return self.reason in _FOR_CERTAIN

    @property
    def overload(self) -> bool:
        """The endpoint got more than it can do."""
        return self.reason in _OVERLOAD


class CallFailed(Exception):
    """A call to an endpoint did not succeed."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.failure = Failure(reason, detail)


def classify(status: str | None, message: str) -> Reason:
    """From a status, for which one code means many things, and the message of Triton or gRPC (2.51, 1.67).

    Arguments:
        status: such as `StatusCode.UNAVAILABLE` of gRPC, or `503` of HTTP.
    """
    code, text = (status or "").removeprefix("StatusCode."), message.lower()
    code = _OF_HTTP.get(code, code)
    if code == "DEADLINE_EXCEEDED" or "request timeout expired" in text:
        return "timeout"
    if "exceeds maximum queue size" in text:
        return "queue_full"
    if code == "NOT_FOUND" or "not ready" in text or "unknown model" in text or "no available versions" in text:
        return "not_ready"
    if "failed to connect" in text or "connection refused" in text:
        return "refused"
    if code in ("UNAVAILABLE", "CANCELLED", "UNKNOWN"):
        return "connection"
    return "model"


def may_retry(failure: Failure, now: float, deadline_s: float, expected_s: float) -> bool:
    """Is a second and last try worth it?

    Arguments:
        deadline_s: after which nobody in the batch wants the answer.
        expected_s: how long the batch takes on the other endpoint.
    """
    return failure.elsewhere and now + expected_s <= deadline_s
