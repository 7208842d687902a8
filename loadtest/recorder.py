"""Notes what became of every request of a live run, as it happens; at its end `Outcomes`, the ladder and `Live`.

Times are seconds from the start of the schedule, by one monotonic clock of this process.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.client import Answered, Expired, Failed, PointUsed, Reply, Shed
from loadtest.outcomes import SERVE_REASONS, SHED_REASONS, Outcome, Outcomes
from loadtest.report import LatencyQuantiles, Live, quantiles
from loadtest.trace import Trace
from server.ladder import Ladder, Rung
from vmoe.operating_point import OperatingPoint

# Chosen, not tuned: a tenth of the shortest default deadline. Timers wake up to 1 ms late.
MAX_SEND_LAG_S = 0.01
# Chosen, not tuned: the 99th percentile is read off the 1 % above it; of fewer than 10 such requests it says little.
LEAST_REQUESTS = 1000
_RECENT = 1000  # requests behind the percentiles of the progress bar

_REASON_CODES = {reason: code for code, reason in enumerate(SERVE_REASONS)}
_SHED_CODES = {reason: int(Outcome.SHED) + code for code, reason in enumerate(SHED_REASONS)}


@dataclass(frozen=True)
class Terms:
    """How a live run is judged; see `report.Live`."""

    warmup_s: float
    timeout_s: float
    grace_s: float


class Recorder:
    """Columns of a live run.

    Arguments:
        trace: the whole schedule, warm-up included.
        deadline_s: (N,) from the scheduled arrival.
        labels: (N,) class index of the image sent, -1 where it is unknown.
    """

    def __init__(
        self, trace: Trace, deadline_s: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], terms: Terms
    ) -> None:
        size = len(trace)
        self._trace, self._terms = trace, terms
        self._due_s: list[float] = trace.arrival_s.tolist()
        self._deadline_s: list[float] = deadline_s.tolist()
        self._labels = labels
        self._out = Outcomes.empty(size)
        self._out.labelled[:] = labels >= 0
        self._sent_s = np.full(size, np.nan)
        self._send_latency_s = np.full(size, np.nan)
        self._gateway_met = np.zeros(size, np.bool_)
        self._failures: list[tuple[int, str]] = []
        self._points: dict[PointUsed, int] = {}
        self.num_sent = 0
        self.finished = 0
        self.recent: deque[tuple[float, Outcome, float]] = deque(maxlen=_RECENT)  # latency, outcome, gained accuracy

    def sent(self, index: int, now: float) -> None:
        """Request `index` is about to be written to its connection."""
        self._sent_s[index] = now
        self.num_sent += 1

    def ended(self, index: int, reply: Reply, now: float) -> None:
        """`reply` was there at `now`."""
        out, latency_s = self._out, now - self._due_s[index]
        deadline_s, gained = self._deadline_s[index] + self._terms.grace_s, 0.0
        match reply:
            case Answered():
                outcome = Outcome.met if latency_s <= deadline_s else Outcome.late
                out.rung[index] = self._points.setdefault(reply.point, len(self._points))
                out.reason[index] = _REASON_CODES[reply.reason]
                out.queue_s[index], out.inference_s[index] = reply.queue_s, reply.inference_s
                # An answer never has the index of an unknown label, -1.
                out.right[index] = reply.index == self._labels[index]
                self._gateway_met[index] = reply.deadline_met
                gained = reply.point.accuracy or 0.0 if outcome is Outcome.met else 0.0
            case Shed():
                outcome = Outcome.SHED
                out.outcome[index] = _SHED_CODES[reply.reason]
            case Expired():
                outcome = Outcome.expired
            case Failed():
                outcome = Outcome.failed
                self._failures.append((index, reply.why))
        if outcome is not Outcome.SHED:
            out.outcome[index] = outcome
            if outcome in (Outcome.expired, Outcome.failed):
                latency_s = max(latency_s, deadline_s)
            out.latency_s[index] = latency_s
            self._send_latency_s[index] = latency_s - (float(self._sent_s[index]) - self._due_s[index])
        self.finished += 1
        self.recent.append((latency_s if outcome is not Outcome.SHED else math.nan, outcome, gained))

    def results(self, client_cpu_s: float, *, interrupted: bool) -> tuple[Trace, Outcomes, Ladder, Live]:
        """Of the requests that were sent after the warm-up.

        Arguments:
            client_cpu_s: processor time of the generator during the run.
        """
        warmup_s = self._terms.warmup_s
        keep = slice(int(np.searchsorted(self._trace.arrival_s, warmup_s)), self.num_sent)
        outcomes = self._out.part(keep)
        assert not (outcomes.outcome == Outcome.unfinished).any(), "a request was sent and has no outcome"
        lag_s = quantiles((self._sent_s - self._trace.arrival_s)[keep])
        answered, met = outcomes.answered, outcomes.outcome == Outcome.met
        labelled, right = outcomes.labelled, outcomes.right
        live = Live(
            valid=not (reasons := _invalid(len(outcomes.outcome), lag_s)),
            invalid_reasons=reasons,
            interrupted=interrupted,
            warmup_s=warmup_s,
            warmup_requests=min(keep.start, self.num_sent),
            timeout_s=self._terms.timeout_s,
            grace_s=self._terms.grace_s,
            latency_from_send_s=quantiles(self._send_latency_s[keep]),
            send_lag_s=lag_s,
            failures=dict(Counter(why for index, why in self._failures if index >= keep.start)),
            gateway_slo_attainment=_mean(self._gateway_met[keep]),
            labelled_answers=int((answered & labelled).sum()),
            accuracy=_mean(right[answered & labelled]),
            effective_accuracy=_mean((right & met)[labelled]),
            client_cpu_s=client_cpu_s / max(self.num_sent, 1),
        )
        trace = self._trace.part(keep, warmup_s)
        return trace, self._ordered(outcomes), self._ladder(), live

    def _ladder(self) -> Ladder:
        """The points that were used, from the cheapest on."""
        rungs = []
        for used in sorted(self._points, key=lambda point: point.relative_compute):
            factor, experts = used.capacity_factor, used.num_selected_experts
            point = None if factor is None or experts is None else OperatingPoint(factor, experts)
            rungs.append(Rung(point, used.slots, used.accuracy, used.accuracy or 0.0, None))
        return Ladder(rungs, range(len(rungs)))

    def _ordered(self, outcomes: Outcomes) -> Outcomes:
        """With the rungs of `_ladder` in place of the order in which points were met."""
        met = list(self._points)
        order = sorted(range(len(met)), key=lambda place: met[place].relative_compute)
        places = np.array([*np.argsort(order), -1], np.int16)
        outcomes.rung[:] = places[outcomes.rung]
        return outcomes


def _invalid(requests: int, lag_s: LatencyQuantiles) -> list[str]:
    """Why the figures may not be relied on."""
    reasons = []
    if requests < LEAST_REQUESTS:
        reasons.append(f"{requests} requests after the warm-up are too few for a 99th percentile: {LEAST_REQUESTS}")
    if lag_s.p99 is not None and lag_s.p99 > MAX_SEND_LAG_S:
        reasons.append(
            f"the generator fell behind: 1 % of requests were sent more than {1000 * lag_s.p99:.1f} ms late, "
            f"at most {1000 * MAX_SEND_LAG_S:g} ms are allowed"
        )
    return reasons


def _mean(values: npt.NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None
