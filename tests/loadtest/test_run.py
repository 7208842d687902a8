"""`python -m loadtest run` against the gateway as users start it, with the commands of the README."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loadtest.cli import INVALID, app
from loadtest.report import Report

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 60.0


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz") as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "server", "--port", str(port), "--threads", "1"], cwd=ROOT)
    try:
        end_s = time.monotonic() + START_LIMIT_S
        while not is_ready(f"http://127.0.0.1:{port}"):
            assert process.poll() is None
            assert time.monotonic() < end_s, "the gateway was not ready in time"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def readme_commands(name: str) -> list[str]:
    """What follows `python -m loadtest` in the README, for one command."""
    (line,) = re.findall(rf"^\$ \.venv/bin/python -m loadtest ({name} .*)$", (ROOT / "README.md").read_text(), re.M)
    return shlex.split(line)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def replaced(command: list[str], **options: str | Path) -> list[str]:
    """The command with other values for some of its options."""
    found = command.copy()
    for name, value in options.items():
        found[found.index(f"--{name}") + 1] = str(value)
    return found


def test_run_when_called_as_in_the_readme_then_every_request_has_an_outcome_and_a_short_run_is_not_valid(
    url: str, tmp_path: Path
) -> None:
    out = tmp_path / "live.json"
    command = replaced(readme_commands("run"), url=url, duration="1", json=out, rate="50")
    result = invoke(*command, "--warmup", "0.5", "--seed", "4")
    assert result.exit_code == INVALID, result.output
    assert "NOT VALID" in result.output
    report = Report.model_validate_json(out.read_text())
    assert report.live is not None
    assert report.setup.kind == "live"
    assert report.setup.policy.name == "foresight"
    assert report.live.failures == {}
    # The rest of what was drawn for 1.5 s: 75 on average.
    assert 25 < report.offered < 80
    shares = (report.slo_attainment, report.missed_ratio, report.shed_ratio)
    assert sum(share or 0.0 for share in shares) == pytest.approx(1.0)
    # Whatever the load, the sample is an ankle boot to every operating point.
    assert report.live.accuracy == 1.0
    bins = report.timeline
    assert bins is not None
    assert sum(bins.labelled) == report.offered
    assert sum(bins.right) == sum(bins.labelled_answers) == report.answered
    assert all(inference_s for inference_s, answers in zip(bins.inference_s, bins.answered, strict=True) if answers)
    assert report.live.latency_from_send_s.p99 is not None
    # Nobody else asks this gateway; the warm-up is in its counters, too.
    assert report.mean_batch_size is not None
    answers = report.answered + report.live.warmup_requests
    assert report.answered <= report.decisions * report.mean_batch_size <= answers + 0.5
    assert report.mean_decision_s is not None
    assert 0 < report.mean_decision_s < 1
    assert (report.setup.workers, report.setup.max_batch_size) == (1, 16)
    assert report.unknown == {}
    assert f"{report.decisions:,} batches of" in result.output


def test_run_when_a_gateway_is_asked_by_users_or_processes_then_its_batches_are_told_too(
    url: str, tmp_path: Path
) -> None:
    out = tmp_path / "live.json"
    open_loop = ("--arrivals", "poisson", "--rate", "20", "--processes", "2")
    for load in (("--closed", "2"), open_loop):
        result = invoke("run", "--url", url, *load, "--duration", "0.5", "--warmup", "0", "--json", out)
        assert result.exit_code == INVALID, result.output
        report = Report.model_validate_json(out.read_text())
        assert report.mean_batch_size is not None
        # An image that came too late for an answer ran all the same.
        assert report.answered - 0.5 <= report.decisions * report.mean_batch_size <= report.offered + 0.5
        assert (report.setup.workers, report.setup.max_batch_size) == (1, 16)


def test_run_when_asked_to_predict_then_the_report_compares_with_the_simulator(url: str, tmp_path: Path) -> None:
    out = tmp_path / "live.json"
    bundle = ROOT / "model_repository" / "vmoe-fashion-mnist"
    load = ("--arrivals", "poisson", "--rate", "10", "--duration", "1", "--warmup", "0.5", "--deadline-ms", "5000")
    result = invoke("run", "--url", url, *load, "--predict", bundle, "--json", out)
    assert result.exit_code == INVALID, result.output  # too short to be valid
    assert "how well the simulator predicted" in result.output
    report = Report.model_validate_json(out.read_text())
    assert report.prediction is not None
    found = report.prediction
    assert (found.slo_attainment.measured, found.p50_s.measured) == (report.slo_attainment, report.latency_s.p50)
    # 10 a second with 5 s each: nothing is refused or late on any machine that runs tests, live or simulated.
    assert found.shed_ratio.predicted == found.shed_ratio.measured == 0
    assert found.slo_attainment.difference == 0
    assert found.crowd_hz > 0
    assert found.surroundings.front_s > 0


def test_run_when_the_bundle_to_predict_is_none_then_it_is_said_before_anything_is_sent(url: str) -> None:
    load = ("--arrivals", "poisson", "--rate", "40", "--duration", "1")
    result = invoke("run", "--url", url, *load, "--predict", "nowhere")
    assert result.exit_code == 1
    assert "is nowhere a bundle?" in result.output


def test_run_when_a_closed_loop_is_to_be_predicted_then_it_is_refused(url: str) -> None:
    result = invoke("run", "--url", url, "--closed", "2", "--duration", "1", "--predict", "nowhere")
    assert result.exit_code == 1
    assert "--predict compares runs of one schedule" in result.output


def test_generate_and_simulate_when_called_as_in_the_readme_then_a_report_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    trace = tmp_path / "trace.csv"
    generated = invoke(*replaced(readme_commands("generate"), duration="2", out=trace))
    assert generated.exit_code == 0, generated.output
    result = invoke(*replaced(readme_commands("simulate"), trace=trace))
    assert result.exit_code == 0, result.output
    assert "foresight" in result.output


def test_compare_when_called_as_in_the_readme_then_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace.csv"
    assert invoke(*replaced(readme_commands("generate"), duration="2", out=trace)).exit_code == 0
    bundle = ROOT / "model_repository" / "vmoe-fashion-mnist"
    for policy, report in (("fixed", "before.json"), ("foresight", "after.json")):
        arguments = ("--trace", trace, "--policy", policy, "--json", tmp_path / report)
        assert invoke("simulate", "--bundle", bundle, *arguments).exit_code == 0
    monkeypatch.chdir(tmp_path)
    result = invoke(*readme_commands("compare"))
    assert result.exit_code == 0, result.output
    assert "<h2>after against before</h2>" in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give one of --arrivals KIND with --rate and --duration, --trace FILE, and --closed USERS"),
        (("--closed", "2"), "--closed needs --duration"),
        (("--closed", "2", "--trace", "trace.csv"), "give one of"),
        (("--closed", "2", "--duration", "nan"), "--duration must be finite and above 0, got nan"),
        (("--closed", "2", "--duration", "1", "--window", "1:2"), "change a --trace, and there is none"),
        (("--trace", "trace.csv", "--rate", "5"), "a trace has its own rate and duration: use --rate-scale"),
        (("--arrivals", "poisson", "--p99-ms", "5"), "--p99-ms is an objective of --find-max"),
        (("--closed", "2", "--processes", "2"), "--closed runs in one process, got --processes 2"),
        (("--closed", "2", "--duration", "1", "--find-max"), "--find-max needs --arrivals and --p99-ms"),
        (("--arrivals", "poisson"), "--arrivals needs --rate and --duration"),
        (("--arrivals", "poisson", "--rate", "10", "--duration", "1"), "does not answer as a gateway"),
        (("--arrivals", "poisson", "--rate", "0", "--duration", "1"), "--rate must be finite and above 0"),
        (("--trace", "nowhere.csv"), "cannot read nowhere.csv"),
    ],
)
def test_run_when_it_cannot_start_then_one_line_says_what_would_be_right(
    options: tuple[str, ...], message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = invoke("run", "--url", f"http://127.0.0.1:{port}", *options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_run_when_the_gateway_lacks_a_budget_of_the_trace_then_it_is_named(url: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,budget\n0.0,gold\n")
    result = invoke("run", "--url", url, "--trace", trace)
    assert result.exit_code == 1
    assert "unknown budget 'gold'; the gateway has" in result.output
