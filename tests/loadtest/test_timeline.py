from __future__ import annotations

import numpy as np
import pytest

from loadtest import histogram
from loadtest.outcomes import SHED_REASONS, Outcome, Outcomes
from loadtest.timeline import timeline
from loadtest.trace import Trace

SHED = int(Outcome.SHED) + SHED_REASONS.index("deadline")
ACCURACIES = np.array([0.8, 0.9, 0.0])  # of two rungs, and of no answer


def outcomes() -> Outcomes:
    """First second: one in time, one late, answered in the third. Second: one refused, one failed. Third: nothing."""
    out = Outcomes.empty(4)
    out.outcome[:] = (Outcome.met, Outcome.late, SHED, Outcome.failed)
    out.rung[:] = (0, 1, -1, -1)
    out.queue_s[:] = (0.1, 0.3, np.nan, np.nan)
    out.inference_s[:] = (0.1, 1.6, np.nan, np.nan)
    out.latency_s[:] = (0.2, 1.9, np.nan, 0.1)
    out.labelled[:] = (True, True, True, False)
    out.right[:] = (False, True, False, False)
    return out


TRACE = Trace.of([0.1, 0.5, 1.2, 1.3])


def test_timeline_when_outcomes_differ_then_each_counts_in_the_second_of_its_arrival() -> None:
    found = timeline(TRACE, outcomes(), ACCURACIES, [0, 1])
    assert found.bin_s == 1.0
    assert found.offered == [2, 2, 0]
    assert found.answered == [2, 0, 0]
    assert found.in_time == [1, 0, 0]
    assert found.shed == [0, 1, 0]
    assert found.missed == [1, 1, 0]
    assert found.failed == [0, 1, 0]
    assert found.answers_by_point == [[1, 0, 0], [1, 0, 0]]
    assert (found.labelled, found.labelled_answers) == ([2, 1, 0], [2, 0, 0])
    assert (found.right, found.right_in_time) == ([1, 0, 0], [0, 0, 0])
    assert found.live_accuracy == [0.5, None, None]


def test_timeline_when_an_answer_comes_later_then_it_is_finished_in_the_second_in_which_it_was_given() -> None:
    assert timeline(TRACE, outcomes(), ACCURACIES, [0, 1]).finished == [1, 0, 1]


def test_timeline_when_a_second_has_no_answers_then_its_means_are_null() -> None:
    found = timeline(TRACE, outcomes(), ACCURACIES, [0, 1])
    assert found.mean_accuracy == [pytest.approx(0.85), None, None]
    assert found.effective_accuracy == [pytest.approx(0.8 / 2), 0.0, None]
    assert found.queue_s == [pytest.approx(0.2), None, None]
    assert found.inference_s == [pytest.approx(0.85), None, None]
    assert found.latency_p50_s == [pytest.approx(1.05), pytest.approx(0.1), None]


def test_timeline_when_accuracies_are_unknown_then_only_what_needs_them_is_null() -> None:
    found = timeline(TRACE, outcomes(), None, [0, 1])
    assert found.mean_accuracy == found.effective_accuracy == [None, None, None]
    assert found.in_time == [1, 0, 0]


@pytest.mark.parametrize(
    ("last_s", "bin_s"), [(0.5, 1.0), (299.0, 1.0), (300.0, 2.0), (3600.0, 15.0), (86_400.0, 300.0), (3e6, 10_800.0)]
)
def test_timeline_when_the_run_is_long_then_bins_are_coarser_and_at_most_300(last_s: float, bin_s: float) -> None:
    empty = Outcomes.empty(2)
    empty.outcome[:] = SHED
    found = timeline(Trace.of([0.0, last_s]), empty, ACCURACIES, [])
    assert found.bin_s == bin_s
    assert len(found) == int(last_s // bin_s) + 1 <= 300
    assert sum(found.offered) == sum(found.shed) == 2


def test_timeline_when_nothing_was_offered_then_it_has_no_bins() -> None:
    assert len(timeline(Trace.of([]), Outcomes.empty(0), ACCURACIES, [])) == 0


def test_timeline_when_its_histograms_are_added_then_they_are_that_of_the_run() -> None:
    found = timeline(TRACE, outcomes(), ACCURACIES, [0, 1])
    parts = [histogram.decode(text) for text in found.latency_histogram]
    values_s = np.sort(np.concatenate([np.repeat(values, counts) for values, counts in parts]))
    assert values_s == pytest.approx([0.1, 0.2, 1.9], rel=1e-3)
