"""Closed loops and searches against a server whose capacity is known."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loadtest.cli import INVALID, app
from loadtest.live_results import Terms
from loadtest.live_session import Session
from loadtest.report import Report
from loadtest.schedule import Kind, Mix, draw
from loadtest.search import Objective
from loadtest.trace import Trace
from tests.loadtest.stalling_server import queueing_server, stalling_server

SERVICE_S = 0.02


def session(url: str, percentile: float = 50.0) -> Session:
    terms = Terms(warmup_s=0.0, timeout_s=10.0, grace_s=0.0, percentile=percentile)
    return Session(url, None, terms, 0, Console(file=io.StringIO()))


def test_closed_loop_when_users_wait_for_answers_then_throughput_is_theirs_and_no_overload_shows() -> None:
    with queueing_server(SERVICE_S, most_waiting=10) as url:
        report = session(url).run_closed(4, 1.0, Mix())
    assert report.live is not None
    assert report.live.closed_users == 4
    assert report.setup.trace == "closed loop, 4 users, 1 s, seed 0"
    # 50 a second is what the server can do, whatever the users want; each waits for 4 services.
    assert 25 < report.offered <= 4 + 50
    assert report.shed_ratio == 0
    assert report.latency_s.p50 == pytest.approx(4 * SERVICE_S, rel=0.5)
    assert report.live.send_lag_s.p99 is None


def test_closed_loop_when_users_are_refused_then_they_pause() -> None:
    with queueing_server(0.5, most_waiting=0) as url:
        report = session(url).run_closed(3, 1.0, Mix())
    # One is served for 0.5 s while two ask every 0.1 s, at most: 22 requests and those of the start.
    assert 0 < report.offered <= 27
    assert report.shed_by_reason["deadline"] > 0


def test_closed_loop_when_interrupted_then_the_report_is_of_what_had_been_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def interrupt(self: object, tally: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("loadtest.progress.LiveProgress.update", interrupt)
    with stalling_server() as url:
        report = session(url).run_closed(2, 60.0, Mix())
    assert report.live is not None
    assert report.live.interrupted


def test_find_max_when_the_servers_capacity_is_known_then_it_is_found_and_every_trial_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # This server cares little about lag, and the machine of the tests may be busy.
    monkeypatch.setattr("loadtest.validity.MAX_SEND_LAG_S", 0.2)

    def constant(rate_hz: float, total_s: float, seed: int) -> tuple[str, Trace]:
        return f"{rate_hz:g}/s", draw(Kind.constant, rate_hz, min(total_s, 0.8), seed=seed)

    with queueing_server(SERVICE_S, most_waiting=3) as url:
        report = session(url).find_max(40.0, 0.8, Objective(p99_s=0.5, max_shed=0.05), constant)
    search = report.search
    assert search is not None
    # It can do 50 a second. In 0.8 s, 5 % and 3 waiting add (0.05 * 40 + 3) / 0.8 = 6 a second at most.
    assert search.rate_hz is not None
    assert 40 <= search.rate_hz < 57
    assert {trial.phase for trial in search.trials} == {"doubling", "bisection", "confirmation"}
    assert [trial.held for trial in search.trials[-3:]] == [True] * 3
    assert all(trial.missed[-1].endswith("at most 5 %") for trial in search.trials if not trial.held)
    assert report.setup.trace == f"{search.rate_hz:g}/s"


def test_run_when_closed_then_it_says_that_overload_is_hidden_and_the_report_is_written(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = ["--closed", "2", "--duration", "1", "--warmup", "0", "--percentile", "50", "--json", str(out)]
    with stalling_server() as url:
        result = CliRunner().invoke(app, ["run", "--url", url, *options])
    assert result.exit_code == 0, result.output
    assert "CLOSED LOOP of 2 users" in result.output
    assert "hide overload" in result.output
    assert Report.model_validate_json(out.read_text()).offered > 10


def test_run_when_find_max_finds_no_rate_then_the_trials_are_printed_and_it_exits_as_not_valid() -> None:
    options = ["--arrivals", "constant", "--rate", "200", "--duration", "0.3", "--warmup", "0", "--percentile", "50"]
    with stalling_server(answer=(b"503 Service Unavailable", b'{"code": "overloaded"}')) as url:
        result = CliRunner().invoke(app, ["run", "--url", url, *options, "--find-max", "--p99-ms", "100"])
    assert result.exit_code == INVALID, result.output
    assert "no rate was confirmed" in result.output
    assert "doubling" in result.output
