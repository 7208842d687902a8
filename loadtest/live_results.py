"""From the record of a live run to its report: what was sent after the warm-up, and whether it may be relied on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from loadtest import validity
from loadtest.batch_counts import BatchCounts
from loadtest.client import PointUsed, Target
from loadtest.outcomes import Outcome, Outcomes
from loadtest.recorder import Record
from loadtest.report import LatencyQuantiles, Live, PolicyUsed, Report, Setup, quantiles, summarise
from loadtest.trace import Trace
from server.ladder import Ladder, Rung
from vmoe.operating_point import OperatingPoint


@dataclass(frozen=True)
class Terms:
    """How a live run is judged; see `report.Live`."""

    warmup_s: float
    timeout_s: float
    grace_s: float
    percentile: float = 99.0


def live_report(
    record: Record,
    trace: Trace,
    terms: Terms,
    setup: Setup,
    counts: tuple[BatchCounts | None, BatchCounts | None],
    closed_users: int | None = None,
) -> Report:
    """The report.

    Arguments:
        trace: (N,) of the record's requests, warm-up included.
        counts: the gateway's counters before and after.
        closed_users: of a closed loop.
    """
    outcomes, ladder = _by_cost(record.outcomes, record.points)
    keep = record.sent & (record.due_s >= terms.warmup_s)
    kept = outcomes.part(keep)
    assert not (kept.outcome == Outcome.unfinished).any(), "a request was sent and has no outcome"
    is_open = closed_users is None
    lag_s = quantiles((record.sent_s - record.due_s)[keep]) if is_open else LatencyQuantiles()
    unlike = validity.unsettled(record.due_s[keep], kept.latency_s) if is_open else None
    reasons = validity.reasons(len(kept.outcome), terms.percentile, lag_s.p99, unlike)
    answered, met = kept.answered, kept.outcome == Outcome.met
    live = Live(
        valid=not reasons,
        invalid_reasons=reasons,
        interrupted=record.interrupted,
        closed_users=closed_users,
        warmup_s=terms.warmup_s,
        warmup_requests=int((record.sent & ~keep).sum()),
        timeout_s=terms.timeout_s,
        grace_s=terms.grace_s,
        percentile=terms.percentile,
        percentile_bound_s=validity.percentile_bound_s(kept.latency_s, terms.percentile),
        latency_from_send_s=quantiles(record.send_latency_s[keep]),
        send_lag_s=lag_s,
        failures=dict(Counter(why for index, why in record.failures if keep[index])),
        gateway_slo_attainment=_mean(record.gateway_met[keep]),
        labelled_answers=int((answered & kept.labelled).sum()),
        accuracy=_mean(kept.right[answered & kept.labelled]),
        effective_accuracy=_mean((kept.right & met)[kept.labelled]),
        client_cpu_s=record.cpu_s / max(int(record.sent.sum()), 1),
    )
    before, after = counts
    ran = None if before is None or after is None else after.since(before)
    return summarise(trace.part(keep, terms.warmup_s), kept, ladder, setup, live, ran)


def live_setup(target: Target, trace_name: str, trace: Trace, seed: int) -> Setup:
    """What was run, on what."""
    return Setup(
        kind="live",
        policy=PolicyUsed(name=target.policy, source=target.policy_source),
        bundle=f"{target.url} {target.model}",
        manifest_sha256=None,
        trace=trace_name,
        trace_sha256=trace.sha256,
        workers=target.workers,
        max_batch_size=target.max_batch_size,
        seed=seed,
    )


def _by_cost(outcomes: Outcomes, points: tuple[PointUsed, ...]) -> tuple[Outcomes, Ladder]:
    """The points that were used, from the cheapest on, and outcomes that refer to them."""
    order = sorted(range(len(points)), key=lambda place: points[place].relative_compute)
    places = np.array([*np.argsort(order), -1], np.int16)  # a rung of -1, no answer, reads the last
    rungs = []
    for used in (points[place] for place in order):
        factor, experts = used.capacity_factor, used.num_selected_experts
        point = None if factor is None or experts is None else OperatingPoint(factor, experts)
        rungs.append(Rung(point, used.slots, used.accuracy, used.accuracy or 0.0, None))
    return replace(outcomes, rung=places[outcomes.rung]), Ladder(rungs, range(len(rungs)))


def _mean(values: npt.NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None
