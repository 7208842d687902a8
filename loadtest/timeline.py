"""A run over time: the figures of the report again, one of each per bin.

Requests count in the bin of their arrival, so that every ratio of a bin is over what was offered in it and bins add up
to the whole. `finished` alone counts answers in the bin in which they were given, the rate that clients see; the
last bins may hold answers to earlier requests and no offer. A bin in which a figure has no meaning holds null.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from loadtest import histogram
from loadtest.outcomes import Outcome, Outcomes
from loadtest.trace import Trace

# Chosen, not tuned: a second is short against bursts that policies meet, and 300 bins are as many as a plot can show.
_BIN_S: Final = (1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_MOST_BINS: Final = 300

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Timeline(BaseModel):
    """B bins of `bin_s`, the first from 0.

    Attributes:
        offered, answered, in_time, shed, missed: as in the report; failed: those of `missed` that got no answer and
            were not dropped from the queue.
        finished: answers given during the bin, whenever their requests came.
        answers_by_point: (points of the report, B).
        mean_accuracy, effective_accuracy: by the measured accuracy of the operating points.
        labelled, labelled_answers, right, right_in_time: requests whose image has a known label, those of them that
            were answered, rightly, rightly and in time; 0 in a simulated run.
        live_accuracy: right answers over labelled answers.
        queue_s, inference_s: means over answers.
        latency_p50_s, latency_p99_s: as `latency_s` of the report.
        latency_histogram: of the same latencies; see `loadtest.histogram`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bin_s: float = Field(gt=0)
    offered: list[int]
    answered: list[int]
    finished: list[int]
    in_time: list[int]
    shed: list[int]
    missed: list[int]
    failed: list[int]
    answers_by_point: list[list[int]]
    mean_accuracy: list[float | None]
    effective_accuracy: list[float | None]
    labelled: list[int]
    labelled_answers: list[int]
    right: list[int]
    right_in_time: list[int]
    live_accuracy: list[float | None]
    queue_s: list[float | None]
    inference_s: list[float | None]
    latency_p50_s: list[float | None]
    latency_p99_s: list[float | None]
    latency_histogram: list[histogram.Encoded]

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        for name, value in self:
            rows = [] if name == "bin_s" else value if name == "answers_by_point" else [value]
            for row in rows:
                if len(row) != len(self.offered):
                    raise ValueError(f"{name} must have a value for each of {len(self.offered)} bins, got {len(row)}")
        return self

    def __len__(self) -> int:
        return len(self.offered)


def timeline(trace: Trace, outcomes: Outcomes, accuracies: Floats | None, rungs: Sequence[int]) -> Timeline:
    """Of a run.

    Arguments:
        accuracies: (P + 1,) of each rung, and 0 for no answer; None where they are unknown.
        rungs: those of the points of the report.
    """
    answered, met = outcomes.answered, outcomes.outcome == Outcome.met
    answer_s = (trace.arrival_s + outcomes.latency_s)[answered]
    end_s = max(trace.duration_s, float(answer_s.max(initial=0.0)))
    bin_s = next((step_s for step_s in _BIN_S if end_s / step_s < _MOST_BINS), None) or _BIN_S[-1] * float(
        np.ceil(end_s / _BIN_S[-1] / _MOST_BINS)
    )
    size = int(end_s // bin_s) + 1 if len(trace) else 0
    place = (trace.arrival_s // bin_s).astype(np.int64)

    def count(chosen: npt.NDArray[np.bool_]) -> Ints:
        return np.bincount(place[chosen], minlength=size)

    def total(chosen: npt.NDArray[np.bool_], values: Floats) -> Floats:
        return np.bincount(place[chosen], values[chosen], minlength=size).astype(np.float64)

    offered, num_answered = count(np.ones(len(trace), np.bool_)), count(answered)
    labelled_answers, right = count(outcomes.labelled & answered), count(outcomes.right & answered)
    edges = np.concatenate([[0], np.cumsum(offered)])
    latencies = [outcomes.latency_s[start:stop] for start, stop in pairwise(edges.tolist())]
    nothing: list[float | None] = [None] * size
    gained = None if accuracies is None else accuracies[outcomes.rung]
    return Timeline(
        bin_s=bin_s,
        offered=offered.tolist(),
        answered=num_answered.tolist(),
        finished=np.bincount((answer_s // bin_s).astype(np.int64), minlength=size).tolist(),
        in_time=count(met).tolist(),
        shed=count(outcomes.outcome >= Outcome.SHED).tolist(),
        missed=count(np.isin(outcomes.outcome, (Outcome.late, Outcome.expired, Outcome.failed))).tolist(),
        failed=count(outcomes.outcome == Outcome.failed).tolist(),
        answers_by_point=[count(outcomes.rung == rung).tolist() for rung in rungs],
        mean_accuracy=nothing if gained is None else _ratios(total(answered, gained), num_answered),
        effective_accuracy=nothing if gained is None else _ratios(total(met, gained), offered),
        labelled=count(outcomes.labelled).tolist(),
        labelled_answers=labelled_answers.tolist(),
        right=right.tolist(),
        right_in_time=count(outcomes.right & met).tolist(),
        live_accuracy=_ratios(right, labelled_answers),
        queue_s=_ratios(total(answered, outcomes.queue_s), num_answered),
        inference_s=_ratios(total(answered, outcomes.inference_s), num_answered),
        latency_p50_s=_percentiles(latencies, 50),
        latency_p99_s=_percentiles(latencies, 99),
        latency_histogram=[histogram.encode(part) for part in latencies],
    )


def _ratios(parts: Floats | Ints, wholes: Ints) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)]


def _percentiles(latencies: Sequence[Floats], percent: float) -> list[float | None]:
    known = [part[~np.isnan(part)] for part in latencies]
    return [float(np.percentile(part, percent)) if len(part) else None for part in known]
