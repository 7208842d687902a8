from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest

from loadtest.errors import GeneratorFailed, LoadtestError
from loadtest.generator import Plan
from loadtest.images import SAMPLE, load_images
from loadtest.live_results import Terms
from loadtest.processes import measure_in_processes
from loadtest.recorder import Tally
from loadtest.report import Report
from loadtest.trace import Trace
from tests.loadtest.stalling_server import SERVICE_S, stalling_server

TERMS = Terms(warmup_s=0.0, timeout_s=10.0, grace_s=0.0)


def measured(url: str, trace: Trace, progress: Callable[[Tally], None], processes: int = 2) -> Report:
    plan = Plan(trace, "test", TERMS, seed=0)
    return measure_in_processes(url, plan, lambda labels: load_images(SAMPLE, labels), progress, processes)


def test_processes_when_they_share_a_schedule_then_it_is_offered_once_and_rows_stay_together() -> None:
    arrival_s = np.sort(np.random.default_rng(0).uniform(0, 1.0, 101))
    # A deadline below the time of the server is missed, one of 5 s is met: rows that got mixed up would show.
    hopeless = np.random.default_rng(1).uniform(size=101) < 0.3
    trace = Trace.of(arrival_s, deadline_s=np.where(hopeless, SERVICE_S / 2, 5.0))
    tallies: list[Tally] = []
    answered_s: list[float] = []
    with stalling_server(answered_s=answered_s) as url:
        report = measured(url, trace, tallies.append)
    assert len(answered_s) == report.offered == report.answered == 101
    assert report.missed_ratio == pytest.approx(hopeless.mean())
    assert report.live is not None
    assert not report.live.interrupted
    # Aligned: both started with the schedule, or one would have lagged by what the other took to start.
    assert report.live.send_lag_s.p50 is not None
    assert report.live.send_lag_s.p50 < 0.1
    assert sum(tally.finished for tally in tallies) == 101
    assert report.points[0].answers == 101
    assert not multiprocessing.active_children()


def test_processes_when_one_is_killed_then_the_run_ends_with_its_exit_code() -> None:
    def kill(tally: Tally) -> None:
        victim, *_ = multiprocessing.active_children()
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)

    with stalling_server() as url, pytest.raises(GeneratorFailed, match=r"process \d of 2 ended with exit code -9"):
        measured(url, Trace.of(np.arange(6000) / 100), kill)
    assert not multiprocessing.active_children()


def test_processes_when_interrupted_then_the_report_is_of_what_both_had_sent() -> None:
    done = False

    def interrupt(tally: Tally) -> None:
        nonlocal done
        if tally.finished and not done:
            done = True
            os.kill(os.getpid(), signal.SIGINT)

    with stalling_server() as url:
        report = measured(url, Trace.of(np.arange(6000) / 100), interrupt)
    assert report.live is not None
    assert report.live.interrupted
    assert 0 < report.offered < 3000
    assert report.answered == report.offered


def test_processes_when_the_gateway_lacks_a_budget_then_none_is_started() -> None:
    with stalling_server() as url, pytest.raises(LoadtestError, match="unknown budget 'gold'; the gateway has auto"):
        measured(url, Trace.of([0.0], [0], ("gold",)), lambda tally: None)
