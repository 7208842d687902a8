from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest import histogram
from loadtest.errors import ReportError
from loadtest.outcomes import SERVE_REASONS, SHED_REASONS, Outcome, Outcomes
from loadtest.report import (
    NO_ACCURACY,
    NO_ANSWERS,
    NO_REQUESTS,
    Oracle,
    Report,
    Setup,
    oracle_report,
    summarise,
)
from loadtest.report_file import read_report
from loadtest.trace import Trace
from server.ladder import Ladder, Rung
from vmoe.operating_point import OperatingPoint


def ladder(*accuracies: float | None) -> Ladder:
    rungs = [
        Rung(OperatingPoint(1.0 + index, 1), (index + 1,), accuracy, 0.5, None)
        for index, accuracy in enumerate(accuracies)
    ]
    return Ladder(rungs, range(len(rungs)))


SHED = int(Outcome.SHED) + SHED_REASONS.index("deadline")


def outcomes() -> Outcomes:
    """Two in time, one late, one expired, one shed; the second of those in time was degraded under load."""
    nan = float("nan")
    ceiling, load = SERVE_REASONS.index("ceiling"), SERVE_REASONS.index("load")
    return Outcomes(
        outcome=np.array([Outcome.met, Outcome.met, Outcome.late, Outcome.expired, SHED], np.uint8),
        deadline_s=np.array([0.1, 0.05, 0.1, 0.2, 0.05]),
        rung=np.array([1, 0, 1, -1, -1], np.int16),
        reason=np.array([ceiling, load, ceiling, 0, 0], np.uint8),
        queue_s=np.array([0.0, 0.01, 0.05, 0.2, nan]),
        latency_s=np.array([0.01, 0.02, 0.13, 0.2, nan]),
        inference_s=np.array([0.01, 0.01, 0.08, nan, nan]),
        labelled=np.array([True, True, False, True, False]),
        right=np.array([True, False, False, False, False]),
        batch_size=np.array([1, 2], np.uint16),
        decision_s=np.array([1e-4, 3e-4], np.float32),
    )


TRACE = Trace.of([0.0, 0.0, 1.0, 1.0, 2.0], [0, 1, 0, 1, 1], ("auto", "low"))


def test_report_when_answers_are_late_expired_or_shed_then_each_counts_where_it_belongs(setup: Setup) -> None:
    report = summarise(TRACE, outcomes(), ladder(0.8, 0.9), setup)
    assert (report.offered, report.answered) == (5, 3)
    assert report.slo_attainment == 2 / 5
    assert report.mean_accuracy == pytest.approx((0.9 + 0.8 + 0.9) / 3)
    assert report.effective_accuracy == pytest.approx((0.9 + 0.8) / 5)
    assert (report.shed_ratio, report.missed_ratio) == (1 / 5, 2 / 5)
    assert report.degraded_ratio == 1 / 3
    assert report.shed_by_reason == dict.fromkeys(SHED_REASONS, 0) | {"deadline": 1}
    assert report.mean_batch_size == 1.5
    assert report.decisions == 2
    assert report.mean_decision_s == pytest.approx(2e-4)
    assert (report.duration_s, report.rate_hz) == (2.0, 2.5)
    assert report.unknown == {}


def test_report_when_a_request_expired_then_its_wait_counts_among_the_latencies(setup: Setup) -> None:
    latency = summarise(TRACE, outcomes(), ladder(0.8, 0.9), setup).latency_s
    # Of 0.01, 0.02, 0.13, 0.2: the median lies between the middle two.
    assert latency.p50 == pytest.approx(0.075)
    assert latency.max == pytest.approx(0.2)
    assert latency.mean == pytest.approx(0.09)


def test_report_when_there_are_budgets_then_their_figures_add_up_to_the_whole(setup: Setup) -> None:
    report = summarise(TRACE, outcomes(), ladder(0.8, 0.9), setup)
    auto, low = report.budgets["auto"], report.budgets["low"]
    assert (auto.offered, low.offered) == (2, 3)
    assert (auto.answered, low.answered) == (2, 1)
    assert auto.slo_attainment == 1 / 2
    # Of budget low there are 0.05, 0.2 and 0.05.
    assert (low.deadline_s.min, low.deadline_s.p50, low.deadline_s.max) == (0.05, 0.05, 0.2)
    assert low.effective_accuracy == pytest.approx(0.8 / 3)
    assert (low.shed_ratio, low.missed_ratio) == (1 / 3, 1 / 3)


def test_report_when_points_were_used_then_each_has_its_share(setup: Setup) -> None:
    report = summarise(TRACE, outcomes(), ladder(0.8, 0.9, 0.95), setup)
    assert [(point.capacity_factor, point.answers) for point in report.points] == [(1.0, 1), (2.0, 2)]
    assert sum(point.share for point in report.points) == pytest.approx(1)


def test_report_when_an_accuracy_is_unknown_then_accuracies_are_null_with_the_reason(setup: Setup) -> None:
    report = summarise(TRACE, outcomes(), ladder(0.8, None), setup)
    assert (report.mean_accuracy, report.effective_accuracy) == (None, None)
    assert report.budgets["auto"].effective_accuracy is None
    assert report.unknown == {"effective_accuracy": NO_ACCURACY, "mean_accuracy": NO_ACCURACY}
    assert report.slo_attainment == 2 / 5  # what needs no accuracy is still known


def test_report_when_nothing_was_answered_then_effective_accuracy_is_zero_and_mean_accuracy_unknown(
    setup: Setup,
) -> None:
    nothing = Outcomes.empty(1)
    nothing.outcome[:] = SHED
    report = summarise(Trace.of([1.0]), nothing, ladder(0.8, 0.9), setup)
    assert report.effective_accuracy == 0.0
    assert report.unknown == {
        "mean_accuracy": NO_ANSWERS,
        "degraded_ratio": NO_ANSWERS,
        "latency_s": "nobody was admitted",
    }
    assert report.latency_s.p99 is None


def test_report_when_the_trace_is_empty_then_ratios_are_null_and_the_reason_is_given(setup: Setup) -> None:
    report = summarise(Trace.of([]), Outcomes.empty(0), ladder(0.8, 0.9), setup)
    assert (report.offered, report.slo_attainment, report.rate_hz) == (0, None, None)
    assert report.unknown["effective_accuracy"] == NO_REQUESTS


def test_report_when_written_and_read_then_it_is_the_same(setup: Setup) -> None:
    report = summarise(TRACE, outcomes(), ladder(0.8, 0.9), setup)
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_oracle_report_when_accuracy_is_unknown_then_there_is_no_bound(setup: Setup) -> None:
    bound = Oracle(effective_accuracy=0.9, method="fluid")
    assert oracle_report(TRACE, bound, setup).effective_accuracy == 0.9
    empty = oracle_report(TRACE, None, setup)
    assert empty.effective_accuracy is None
    assert empty.unknown["effective_accuracy"] == NO_ACCURACY


def test_report_when_summarised_then_its_timeline_and_histogram_add_up_to_its_figures(setup: Setup) -> None:
    report = summarise(TRACE, outcomes(), ladder(0.8, 0.9), setup)
    bins = report.timeline
    assert bins is not None
    assert sum(bins.offered) == report.offered
    assert sum(bins.answered) == sum(bins.finished) == report.answered
    assert [sum(row) for row in bins.answers_by_point] == [point.answers for point in report.points]
    assert (sum(bins.labelled), sum(bins.labelled_answers), sum(bins.right), sum(bins.right_in_time)) == (3, 2, 1, 1)
    values_s, counts = histogram.decode(report.latency_histogram)
    assert np.repeat(values_s, counts) == pytest.approx([0.01, 0.02, 0.13, 0.2], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"schema_version": 1}, "is a report of schema 1, this version reads schema 2"),
        (lambda content: {"slo_attainment": 1.0}, "it has no schema_version"),
        (lambda content: [content], "it has no schema_version"),
        (
            lambda content: content | {"offered": "many"},
            "is a damaged report: offered: Input should be a valid integer",
        ),
        (
            lambda content: content | {"latency_histogram": "HIST"},
            "is a damaged report: latency_histogram: Value error",
        ),
        (lambda content: content | {"points": []}, "answers_by_point must have one list for each of 0 points, got 2"),
        (
            lambda content: content | {"timeline": content["timeline"] | {"shed": [1]}},
            "is a damaged report: timeline: Value error, shed must have a value for each of 3 bins, got 1",
        ),
        (lambda content: content | {"speed": 1}, "is a damaged report: speed: Extra inputs are not permitted"),
    ],
)
def test_read_report_when_the_file_holds_something_else_then_the_error_says_what(
    setup: Setup, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "report.json"
    content = summarise(TRACE, outcomes(), ladder(0.8, 0.9), setup).model_dump(mode="json")
    path.write_text(json.dumps(content))
    assert read_report(path).model_dump(mode="json") == content
    path.write_text(json.dumps(change(content)))
    with pytest.raises(ReportError, match=re.escape(message)) as caught:
        read_report(path)
    assert str(path) in str(caught.value)


def test_read_report_when_there_is_no_json_then_the_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(ReportError, match="cannot read the report"):
        read_report(path)
    path.write_text("{")
    with pytest.raises(ReportError, match="cannot read the report"):
        read_report(path)
