"""The report: one schema for live and simulated runs. JSON on disk; `loadtest.tables` prints it.

A figure that cannot be known is null, and `unknown` says why under the same name: the accuracy of a bundle that was
exported without images, everything but the bound in a report of the oracle.

    accuracy of an answer   measured accuracy of its operating point, whatever the image
    effective accuracy      that accuracy where the answer was in time, 0 where not or where none came, over all offered
    slo_attainment          answered in time, over all offered
    missed_ratio            admitted and then late, dropped or failed, over all offered
    shed_ratio              refused on arrival, over all offered
    degraded_ratio          answered below the ceiling of the budget, over all answers
    latency_s               of admitted requests, from the arrival; a dropped or failed one counts at least its deadline

In a live run the arrival is the scheduled one, and in time means by the client's clock. `live` has what only a live run
knows. Percentiles are numpy's, of every single latency: a schedule fits into memory, so they need no histogram and
lose no digit. The whole distribution, for plots and comparisons, is a histogram. docs/reports.md explains every field.
"""

from __future__ import annotations

from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, model_validator

from loadtest import histogram
from loadtest.batch_counts import BatchCounts
from loadtest.environment import Environment
from loadtest.outcomes import SERVE_REASONS, SHED_REASONS, Outcome, Outcomes
from loadtest.search import Search
from loadtest.surroundings import Surroundings
from loadtest.timeline import Timeline, timeline
from loadtest.trace import Trace
from server.ladder import Ladder

SCHEMA_VERSION: Final = 2
NO_ACCURACY = "the bundle was exported without images: no accuracy was measured"
NO_ANSWERS = "nothing was answered"
NO_REQUESTS = "nothing was offered"
_DEGRADED = [code for code, reason in enumerate(SERVE_REASONS) if reason in ("slack", "load")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LatencyQuantiles(_Model):
    """Seconds; null where nobody was admitted."""

    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p999: float | None = None
    mean: float | None = None
    max: float | None = None


class Deadlines(_Model):
    """Seconds from the arrival; null where nothing was offered, and in a report of the oracle."""

    min: float | None = None
    p50: float | None = None
    max: float | None = None


class Figures(_Model):
    """Of all requests, or of one budget; see the module for what each means."""

    offered: int
    answered: int
    slo_attainment: float | None
    mean_accuracy: float | None
    effective_accuracy: float | None
    shed_ratio: float | None
    missed_ratio: float | None
    degraded_ratio: float | None
    deadline_s: Deadlines
    latency_s: LatencyQuantiles
    shed_by_reason: dict[str, int]


class PointShare(_Model):
    """Answers at one operating point; C and K are null for a dense model."""

    capacity_factor: float | None
    num_selected_experts: int | None
    accuracy: float | None
    answers: int
    share: float


class PolicyUsed(_Model):
    """Name, and where its parameters came from."""

    name: str
    source: str


class Oracle(_Model):
    """An upper bound on the effective accuracy, and how it was obtained (`loadtest.oracle`)."""

    effective_accuracy: float
    method: str


class Setup(_Model):
    """What was run, on what.

    Attributes:
        kind: how.
        bundle: directory, or URL and name of the model; manifest_sha256: of its manifest.
        manifest_sha256: null in a live run, the gateway does not tell.
        workers, max_batch_size: null in a live run against something that is no gateway.
        trace: file or description; trace_sha256: of its content.
        seed: of the simulated noise, or of the live schedule; noise, slowdown, surroundings: of the simulated machine.
    """

    kind: Literal["simulated", "live"]
    policy: PolicyUsed
    bundle: str
    manifest_sha256: str | None
    trace: str
    trace_sha256: str
    workers: int | None
    max_batch_size: int | None
    seed: int | None = None
    noise: float | None = None
    slowdown: float | None = None
    surroundings: Surroundings | None = None


class Live(_Model):
    """What only a live run knows.

    Attributes:
        valid, invalid_reasons: whether the figures may be relied on, and why not.
        interrupted: stopped by hand; the report is of what had been sent.
        closed_users: of a closed loop, who each send when they have their last answer; null in an open loop.
        warmup_s, warmup_requests: sent first, cut from every figure.
        timeout_s: after which a request without an answer counts as failed.
        grace_s: beyond the deadline, for the way there and back: an answer within both is in time.
        percentile: of latency, in per cent, that was asked for; percentile_bound_s: what it does not exceed, with 99 %
            confidence (`loadtest.validity`), null where the requests are too few to say.
        latency_from_send_s: as `latency_s`, from the moment the request was sent. It leaves out the time for which a
            request was due and not sent; shown for comparison.
        send_lag_s: sent after it was due.
        failures: by what went wrong.
        gateway_slo_attainment: `slo_attainment` by the gateway's clock: end of upload to end of inference.
        labelled_answers: to images with a known label.
        accuracy: of those answers that were right; effective_accuracy: right and in time, over all labelled images.
        client_cpu_s: of the generator's process, per request.
    """

    valid: bool
    invalid_reasons: list[str]
    interrupted: bool
    closed_users: int | None = None
    warmup_s: float
    warmup_requests: int
    timeout_s: float
    grace_s: float
    percentile: float
    percentile_bound_s: float | None
    latency_from_send_s: LatencyQuantiles
    send_lag_s: LatencyQuantiles
    failures: dict[str, int]
    gateway_slo_attainment: float | None
    labelled_answers: int
    accuracy: float | None
    effective_accuracy: float | None
    client_cpu_s: float


class Compared(_Model):
    """Of one figure: simulated, live, and simulated less live."""

    predicted: float | None
    measured: float | None
    difference: float | None


class Prediction(_Model):
    """What the simulator says of the same trace and policy (`loadtest.prediction`).

    Attributes:
        slowdown, noise, surroundings: of the simulated machine, from a probe before the run.
        crowd_hz: answers per second in that probe.
        p50_s, p99_s: of `latency_s`.
    """

    slowdown: float
    noise: float
    surroundings: Surroundings
    crowd_hz: float
    slo_attainment: Compared
    effective_accuracy: Compared
    shed_ratio: Compared
    p50_s: Compared
    p99_s: Compared


class Report(Figures):
    """One run.

    Attributes:
        latency_histogram: of the latencies behind `latency_s`; see `loadtest.histogram`.
        decisions, mean_decision_s, mean_batch_size: in a live run by the gateway's counters, warm-up included.
        timeline: null in a report of the oracle.
        search: of `--find-max`, whose last run this is.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    setup: Setup
    duration_s: float
    rate_hz: float | None
    budgets: dict[str, Figures]
    points: list[PointShare]
    timeline: Timeline | None
    latency_histogram: histogram.Encoded
    mean_batch_size: float | None
    decisions: int
    mean_decision_s: float | None
    oracle: Oracle | None = None
    live: Live | None = None
    search: Search | None = None
    prediction: Prediction | None = None
    unknown: dict[str, str]
    environment: Environment

    @model_validator(mode="after")
    def _every_point_over_time(self) -> Self:
        if self.timeline is not None and len(self.timeline.answers_by_point) != len(self.points):
            found = len(self.timeline.answers_by_point)
            raise ValueError(f"answers_by_point must have one list for each of {len(self.points)} points, got {found}")
        return self


def summarise(
    trace: Trace,
    outcomes: Outcomes,
    ladder: Ladder,
    setup: Setup,
    live: Live | None = None,
    ran: BatchCounts | None = None,
) -> Report:
    """The report of a run.

    Arguments:
        ran: the batches of a live run; None where they are unknown, and of a simulated one, whose outcomes have them.
    """
    everybody = np.ones(len(trace), np.bool_)
    figures = _figures(outcomes, ladder, everybody)
    counts = np.bincount(outcomes.rung[outcomes.answered], minlength=len(ladder)).tolist()
    used = [rung for rung, count in enumerate(counts) if count]
    accuracies = _accuracies(ladder)
    unknown = _unknown(figures, accuracies is not None)
    if live is None:
        decision_s = outcomes.decision_s
        ran = BatchCounts(
            len(outcomes.batch_size),
            int(outcomes.batch_size.sum()),
            len(decision_s),
            float(decision_s.sum(dtype=float)),
        )
    elif ran is None:
        reason = "the gateway's counters could not be read before and after the run"
        unknown |= dict.fromkeys(("mean_batch_size", "mean_decision_s"), reason)
    return Report(
        **dict(figures),
        setup=setup,
        duration_s=trace.duration_s,
        rate_hz=len(trace) / trace.duration_s if trace.duration_s else None,
        budgets={name: _figures(outcomes, ladder, trace.budget == code) for code, name in enumerate(trace.budgets)},
        points=[_point_share(ladder, rung, counts[rung], figures.answered) for rung in used],
        timeline=timeline(trace, outcomes, accuracies, used),
        latency_histogram=histogram.encode(outcomes.latency_s),
        mean_batch_size=None if ran is None else _ratio(ran.images, ran.batches),
        decisions=0 if ran is None else ran.decisions,
        mean_decision_s=None if ran is None else _ratio(ran.decision_s, ran.decisions),
        live=live,
        unknown=unknown,
        environment=Environment.here(),
    )


def oracle_report(trace: Trace, bound: Oracle | None, setup: Setup) -> Report:
    """A report that holds a bound and nothing else: what the best schedule looks like is not known."""
    nothing = "the oracle bounds the effective accuracy; it is no schedule"
    names = ("slo_attainment", "mean_accuracy", "shed_ratio", "missed_ratio", "degraded_ratio", "latency_s", "answered")
    unknown = dict.fromkeys(names, nothing)
    if bound is None:
        unknown["effective_accuracy"] = NO_ACCURACY
    return Report(
        offered=len(trace),
        answered=0,
        slo_attainment=None,
        mean_accuracy=None,
        effective_accuracy=None if bound is None else bound.effective_accuracy,
        shed_ratio=None,
        missed_ratio=None,
        degraded_ratio=None,
        deadline_s=Deadlines(),
        latency_s=LatencyQuantiles(),
        shed_by_reason={},
        setup=setup,
        duration_s=trace.duration_s,
        rate_hz=len(trace) / trace.duration_s if trace.duration_s else None,
        budgets={},
        points=[],
        timeline=None,
        latency_histogram=histogram.encode(np.zeros(0)),
        mean_batch_size=None,
        decisions=0,
        mean_decision_s=None,
        oracle=bound,
        unknown=unknown,
        environment=Environment.here(),
    )


def _figures(outcomes: Outcomes, ladder: Ladder, mask: npt.NDArray[np.bool_]) -> Figures:
    """Of the requests in `mask`, (N,)."""
    outcome, offered = outcomes.outcome[mask], int(mask.sum())
    answered, met = outcome <= Outcome.late, outcome == Outcome.met
    num_answered = int(answered.sum())
    accuracies = _accuracies(ladder)
    mean_accuracy = effective_accuracy = None
    if accuracies is not None:
        gained = accuracies[outcomes.rung[mask]]  # rung -1 of the unanswered reads the last entry, which is 0
        effective_accuracy = _ratio(float(gained[met].sum()), offered)
        mean_accuracy = _ratio(float(gained.sum()), num_answered)
    shed = np.bincount(outcome[outcome >= Outcome.SHED] - int(Outcome.SHED), minlength=len(SHED_REASONS)).tolist()
    missed = int(np.isin(outcome, (Outcome.late, Outcome.expired, Outcome.failed)).sum())
    degraded = int(np.isin(outcomes.reason[mask][answered], _DEGRADED).sum())
    return Figures(
        offered=offered,
        answered=num_answered,
        slo_attainment=_ratio(int(met.sum()), offered),
        mean_accuracy=mean_accuracy,
        effective_accuracy=effective_accuracy,
        shed_ratio=_ratio(sum(shed), offered),
        missed_ratio=_ratio(missed, offered),
        degraded_ratio=_ratio(degraded, num_answered),
        deadline_s=_deadlines(outcomes.deadline_s[mask]),
        latency_s=quantiles(outcomes.latency_s[mask]),
        shed_by_reason=dict(zip(SHED_REASONS, shed, strict=True)),
    )


def _unknown(figures: Figures, accuracies_known: bool) -> dict[str, str]:
    """Why each figure that is null is so."""
    nothing = NO_ANSWERS if figures.offered else NO_REQUESTS
    reasons = {name: nothing for name, value in figures if value is None}
    if not accuracies_known:
        reasons |= dict.fromkeys(("mean_accuracy", "effective_accuracy"), NO_ACCURACY)
    if figures.latency_s.p50 is None:
        reasons["latency_s"] = "nobody was admitted" if figures.offered else NO_REQUESTS
    return reasons


def _accuracies(ladder: Ladder) -> npt.NDArray[np.float64] | None:
    """(P + 1,) of each rung, and 0 for no answer; None where one is unknown: a mean over the others would mislead."""
    known = [rung.accuracy for rung in ladder.rungs if rung.accuracy is not None]
    return np.array([*known, 0.0]) if len(known) == len(ladder) else None


def quantiles(latency_s: npt.NDArray[np.float64]) -> LatencyQuantiles:
    """Of those that are not NaN."""
    admitted = latency_s[~np.isnan(latency_s)]
    if not len(admitted):
        return LatencyQuantiles()
    p50, p90, p95, p99, p999 = np.percentile(admitted, (50, 90, 95, 99, 99.9)).tolist()
    return LatencyQuantiles(
        p50=p50, p90=p90, p95=p95, p99=p99, p999=p999, mean=float(admitted.mean()), max=float(admitted.max())
    )


def _deadlines(deadline_s: npt.NDArray[np.float64]) -> Deadlines:
    if not len(deadline_s):
        return Deadlines()
    middle = float(np.percentile(deadline_s, 50, method="lower"))  # one that somebody had
    return Deadlines(min=float(deadline_s.min()), p50=middle, max=float(deadline_s.max()))


def _point_share(ladder: Ladder, rung: int, answers: int, total: int) -> PointShare:
    point = ladder.rungs[rung].point
    return PointShare(
        capacity_factor=None if point is None else point.capacity_factor,
        num_selected_experts=None if point is None else point.num_selected_experts,
        accuracy=ladder.rungs[rung].accuracy,
        answers=answers,
        share=answers / total,
    )


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None
