"""Reports of records that were noted by hand: no clock, no socket."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from rich.console import Console

from loadtest.batch_counts import BatchCounts
from loadtest.client import Answered, Expired, Failed, PointUsed, Reply, Shed
from loadtest.live_results import Terms, live_report
from loadtest.outcomes import Outcomes
from loadtest.progress import LiveProgress
from loadtest.recorder import Record, Recorder, interleaved
from loadtest.report import Report, Setup
from loadtest.trace import Trace

CHEAP = PointUsed(0.25, 1, (2,), 0.8, 0.5)
FULL = PointUsed(1.0, 2, (13,), 0.9, 1.0)
DEADLINE_S = 0.1
BEFORE = """# HELP vmoe_batch_size Images per batch.
vmoe_batch_size_bucket{le="1.0"} 3.0
vmoe_batch_size_count 10.0
vmoe_batch_size_sum 15.0
vmoe_decision_seconds_count 10.0
vmoe_decision_seconds_sum 0.001
"""
AFTER = """vmoe_batch_size_count 14.0
vmoe_batch_size_sum 25.0
vmoe_decision_seconds_count 15.0
vmoe_decision_seconds_sum 2.0e-03
"""
COUNTS = (BatchCounts.read(BEFORE), BatchCounts.read(AFTER))


def answer(point: PointUsed = FULL, index: int = 0) -> Reply:
    return Answered(point, index, "ceiling", True, queue_s=0.001, inference_s=0.002, decode_s=0.0005, total_s=0.004)


def noted(arrival_s: np.ndarray, latency_s: np.ndarray, replies: list[Reply], labels: list[int]) -> Recorder:
    """Everything sent 1 ms late, and answered after its latency from the schedule."""
    recorder = Recorder(grace_s=0.0)
    recorder.expect(arrival_s, np.full(len(arrival_s), DEADLINE_S), labels)
    for index, (due_s, taken_s, reply) in enumerate(zip(arrival_s, latency_s, replies, strict=True)):
        recorder.sent(index, due_s + 0.001)
        recorder.ended(index, reply, due_s + taken_s)
    return recorder


def report(recorder: Recorder, arrival_s: np.ndarray, setup: Setup, **terms: float) -> Report:
    judged = Terms(**({"warmup_s": 0.0, "timeout_s": 10.0, "grace_s": 0.0} | terms))
    return live_report(recorder.record(0.0, 1.0, interrupted=False), Trace.of(arrival_s), judged, setup, COUNTS)


@pytest.mark.parametrize(("first_half", "reason"), [(0.02, None), (0.08, "the warm-up was too short")])
def test_live_report_when_the_first_half_is_slower_then_it_is_not_valid(
    setup: Setup, first_half: float, reason: str | None
) -> None:
    arrival_s = np.arange(1000) / 100
    latency_s = np.where(arrival_s < 5, first_half, 0.02)
    found = report(noted(arrival_s, latency_s, [answer()] * 1000, [0] * 1000), arrival_s, setup)
    assert found.live is not None
    assert found.live.valid == (reason is None)
    assert [text.startswith(str(reason)) for text in found.live.invalid_reasons] == [True] * (reason is not None)
    assert found.live.percentile_bound_s == pytest.approx(first_half)


@pytest.mark.parametrize(("percentile", "least"), [(90.0, 64), (99.0, 662), (99.9, 6636)])
def test_live_report_when_a_percentile_is_asked_then_the_count_of_requests_is_held_against_it(
    setup: Setup, percentile: float, least: int
) -> None:
    arrival_s = np.arange(least - 1) / 100
    recorder = noted(arrival_s, np.full(least - 1, 0.02), [answer()] * (least - 1), [0] * (least - 1))
    found = report(recorder, arrival_s, setup, percentile=percentile)
    assert found.live is not None
    assert found.live.invalid_reasons == [
        f"{least - 1} requests after the warm-up are too few for a {percentile:g}th percentile: {least:,}"
    ]
    assert found.live.percentile_bound_s is None


def test_live_report_when_points_were_met_in_any_order_then_they_go_from_the_cheapest_on(setup: Setup) -> None:
    arrival_s = np.arange(4) / 100
    replies = [answer(FULL), answer(CHEAP), Shed("deadline"), answer(CHEAP)]
    found = report(noted(arrival_s, np.full(4, 0.02), replies, [0] * 4), arrival_s, setup)
    assert [(point.capacity_factor, point.answers) for point in found.points] == [(0.25, 2), (1.0, 1)]
    assert found.effective_accuracy == pytest.approx((0.9 + 2 * 0.8) / 4)


def test_live_report_when_the_gateway_counts_its_batches_then_they_are_those_of_the_run(setup: Setup) -> None:
    found = report(noted(np.zeros(1), np.full(1, 0.02), [answer()], [0]), np.zeros(1), setup)
    # 4 batches of 10 images ended, 5 were chosen in 1 ms.
    assert (found.mean_batch_size, found.decisions, found.mean_decision_s) == (2.5, 5, pytest.approx(2e-4))
    assert "mean_batch_size" not in found.unknown


@pytest.mark.parametrize(
    "counts", [(None, COUNTS[1]), (COUNTS[0], None), (COUNTS[1], COUNTS[0])], ids=["no start", "no end", "restarted"]
)
def test_live_report_when_the_counters_tell_nothing_then_it_says_so(
    setup: Setup, counts: tuple[BatchCounts | None, BatchCounts | None]
) -> None:
    recorder = noted(np.zeros(1), np.full(1, 0.02), [answer()], [0])
    record = recorder.record(0.0, 1.0, interrupted=False)
    found = live_report(record, Trace.of(np.zeros(1)), Terms(0.0, 10.0, 0.0), setup, counts)
    assert (found.mean_batch_size, found.mean_decision_s, found.decisions) == (None, None, 0)
    assert "could not be read" in found.unknown["mean_batch_size"]


def test_batch_counts_when_a_series_is_missing_then_there_are_none() -> None:
    assert BatchCounts.read(AFTER.replace("vmoe_batch_size_sum", "other_sum")) is None


def test_live_report_when_some_were_not_sent_then_they_do_not_count(setup: Setup) -> None:
    arrival_s = np.arange(4) / 100
    recorder = noted(arrival_s[:3], np.full(3, 0.02), [answer(), Failed("timeout"), Expired()], [0, 0, -1])
    recorder.expect(arrival_s[3:], [DEADLINE_S], [0])
    found = report(recorder, arrival_s, setup, warmup_s=0.005)
    assert found.live is not None
    assert (found.offered, found.live.warmup_requests) == (2, 1)
    assert found.live.failures == {"timeout": 1}
    # Who waits in vain waits at least the deadline.
    assert found.latency_s.p50 == DEADLINE_S


def test_interleaved_when_processes_met_points_in_another_order_then_every_row_keeps_its_own() -> None:
    arrival_s = np.arange(5) / 100
    replies = [answer(FULL), answer(CHEAP), Failed("timeout"), Shed("share"), answer(CHEAP, 1)]
    latency_s = np.array([0.01, 0.02, 0.03, 0.0, 0.5])
    labels = [0, -1, 0, 0, 1]
    parts = [noted(arrival_s[r::2], latency_s[r::2], replies[r::2], labels[r::2]) for r in range(2)]
    both = interleaved([part.record(7.0, 1.5, interrupted=r == 1) for r, part in enumerate(parts)])
    one = noted(arrival_s, latency_s, replies, labels).record(7.0, 3.0, interrupted=True)
    for each in fields(Record):
        if each.name not in ("outcomes", "points"):
            assert np.array_equal(getattr(both, each.name), getattr(one, each.name), equal_nan=each.name.endswith("_s"))
    for each in fields(Outcomes):
        if each.name != "rung":
            column, expected = getattr(both.outcomes, each.name), getattr(one.outcomes, each.name)
            assert np.array_equal(column, expected, equal_nan=each.name.endswith("_s")), each.name
    met = [None if rung < 0 else both.points[rung] for rung in both.outcomes.rung]
    assert met == [FULL, CHEAP, None, None, CHEAP]


def test_progress_when_requests_ended_then_rate_p99_shed_and_both_accuracies_are_shown() -> None:
    arrival_s = np.arange(4) / 100
    replies = [answer(FULL, 0), answer(CHEAP, 1), Shed("deadline"), answer(CHEAP)]
    recorder = noted(arrival_s, np.array([0.02, 0.02, 0.0, 0.5]), replies, [0, 0, 0, -1])
    console = Console(force_terminal=True, width=200, record=True)
    with LiveProgress(8, console) as progress:
        progress.update(recorder.take_tally())
        progress.update(recorder.take_tally())  # nothing more
    text = console.export_text()
    assert "4/8" in text
    # The 99th percentile of 20, 20 and 500 ms: 2 % below the largest, of the way from the second largest.
    assert "p99 490 ms  shed 25.0 %  in time 50.0 %  eff. acc. 42.5 %  right 50.0 %" in text
