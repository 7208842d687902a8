"""`python -m loadtest tune` as users call it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import threading
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from exporter.bundle import Bundle
from loadtest.cli import app
from loadtest.trace import Trace, read_trace, write_trace
from server.ladder import Ladder
from server.policy_source import PolicySource
from tests.loadtest.conftest import SHIPPED
from tests.loadtest.test_run import ROOT, readme_commands, replaced


@pytest.fixture
def trace(bursty: Trace, tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    write_trace(path, bursty)
    return path


def tune(trace: Path, out: Path, *arguments: str | Path) -> Result:
    """Objectives that hold, unless the arguments say otherwise; the last of an option counts."""
    options = ("--p99-ms", 200, "--max-shed", 0.5, "--trials", 8, "--noise-seeds", 1, "--seed", 4)
    command = ("tune", "--bundle", SHIPPED, "--trace", trace, "--out", out, *options, *arguments)
    return CliRunner().invoke(app, [str(argument) for argument in command])


def test_tune_when_the_objective_holds_then_the_gateway_takes_the_file_and_it_says_where_it_comes_from(
    trace: Path, tmp_path: Path
) -> None:
    out, page = tmp_path / "policy.toml", tmp_path / "front.html"
    result = tune(trace, out, "--load", "0.5,1", "--plot", page)
    assert result.exit_code == 0, result.output
    assert "trial 0: foresight quantile=0.9 slack=0.5" in result.output
    bundle = Bundle.load(SHIPPED)
    active = PolicySource(str(out), bundle, Ladder.of(bundle.manifest), 10).load()  # refuses another manifest
    provenance = active.config.provenance
    assert provenance is not None
    assert (provenance.trace_sha256, provenance.seed, provenance.trials) == (read_trace(trace).sha256, 4, 8)
    assert provenance.versions.keys() >= {"vmoe-serving", "python", "numpy", "optuna"}
    assert [each.load for each in provenance.expected] == [0.5, 1.0]
    assert all((each.p99_ms or 1e9) <= 200 and (each.shed_ratio or 0) <= 0.5 for each in provenance.expected)
    assert out.read_text().startswith("# Tuned: maximise effective_accuracy with p99 <= 200 ms and shed <= 50 %.\n")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert "load 0.5, front" in page.read_text()


def test_tune_when_called_as_in_the_readme_then_a_policy_is_written(trace: Path, tmp_path: Path) -> None:
    command = replaced(readme_commands("tune"), bundle=SHIPPED, trace=trace, out=tmp_path / "policy.toml")
    command += ["--trials", "1", "--max-shed", "0.5"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (tmp_path / "policy.toml").exists()


def test_tune_when_called_as_in_the_docs_then_the_example_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = (ROOT / "docs" / "tuning.md").read_text().partition("## An example")[2].replace("\\\n", "")
    generate, tune = (shlex.split(line) for line in re.findall(r"^\$ python -m loadtest (.*)$", example, re.M))
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, replaced(generate, duration="3")).exit_code == 0
    result = CliRunner().invoke(app, [*replaced(tune, bundle=SHIPPED, trials="1"), "--max-shed", "0.5"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"trace.csv", "policy.toml", "front.html"}


def test_tune_when_repeated_with_the_same_seed_then_the_file_is_the_same_byte_for_byte(
    trace: Path, tmp_path: Path
) -> None:
    texts = []
    for name in ("one.toml", "two.toml"):
        assert tune(trace, tmp_path / name, "--trials", "10").exit_code == 0
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1]


def test_tune_when_called_with_the_command_of_the_file_then_the_file_comes_out_again(
    trace: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "policy.toml", tmp_path / "again.toml"
    base = tmp_path / "base.toml"
    base.write_text("[budgets.auto]\ndeadline_ms = 90.0\n")
    assert tune(trace, out, "--policy", base, "--maximise", "slo_attainment", "--held-out", "0").exit_code == 0
    command = tomllib.loads(out.read_text())["provenance"]["command"].split()
    assert command[:4] == ["python", "-m", "loadtest", "tune"]
    assert CliRunner().invoke(app, [*command[3:], "--out", str(again)]).exit_code == 0
    assert again.read_bytes() == out.read_bytes()
    assert "deadline_ms = 90.0" in out.read_text()


def test_tune_when_the_objective_is_out_of_reach_then_it_says_so_and_writes_nothing_but_on_request(
    trace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "policy.toml"
    out.write_text("old")
    result = tune(trace, out, "--p99-ms", "0.5")
    assert result.exit_code == 1
    assert "out of reach: maximise effective_accuracy with p99 <= 0.5 ms" in result.output
    assert "--best-effort" in result.output
    assert out.read_text() == "old"
    result = tune(trace, out, "--p99-ms", "0.5", "--best-effort")
    assert result.exit_code == 0, result.output
    assert "# THE OBJECTIVE IS OUT OF REACH; this is the nearest.\n" in out.read_text()


def test_tune_when_interrupted_then_it_goes_on_with_the_best_so_far(trace: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        while signal.getsignal(signal.SIGINT) is before:  # the search has not begun
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = tune(trace, tmp_path / "policy.toml", "--trials", "100000")
    thread.join()
    assert result.exit_code == 0, result.output
    assert "of 100000 trials: going on with the best so far" in result.output
    assert tomllib.loads((tmp_path / "policy.toml").read_text())["provenance"]["trials"] < 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--load", "1,much"), "--load must be numbers above 0, separated by commas, got '1,much'"),
        (("--p99-ms", "-1"), "--p99-ms must be finite and above 0, got -1"),
        (("--out", "/nowhere/policy.toml"), "cannot write /nowhere/policy.toml: it must be a file in a directory"),
        (("--plot", "/nowhere/front.html"), "cannot write /nowhere/front.html"),
        (("--bundle", "nowhere"), "is nowhere a bundle?"),
        (("--trace", "nowhere.csv"), "cannot read nowhere.csv"),
        (("--url", "http://127.0.0.1:9", "--trials", "1"), "http://127.0.0.1:9 does not answer"),
    ],
)
def test_tune_when_asked_for_the_impossible_then_one_line_says_what_would_be_right(
    trace: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = tune(trace, tmp_path / "policy.toml", *options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "policy.toml").exists()
