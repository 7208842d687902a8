"""`make loadtest-demo`, shorter: real gateways, real load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from loadtest.demo import bursts, gateway, main
from loadtest.errors import TargetError
from loadtest.runs import read_runs
from loadtest.trace import read_trace

ROOT = Path(__file__).parents[2]


def test_demo_when_run_then_three_policies_were_offered_the_same_bursts_and_a_page_compares_them(
    tmp_path: Path,
) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(
        app,
        ["--out", str(tmp_path), "--model-repository", str(ROOT / "model_repository"), "--duration", "3",
         "--calibration", "1"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    runs = read_runs([tmp_path / f"{name}.json" for name in ("default", "fixed-full", "fixed-cheapest")])
    reports = [run.report for run in runs]
    assert len({report.setup.trace_sha256 for report in reports}) == 1
    assert reports[0].setup.trace_sha256 == read_trace(tmp_path / "trace.csv").sha256
    assert [report.setup.policy.name for report in reports] == ["foresight", "fixed", "fixed"]
    full, cheapest = ([point.capacity_factor for point in report.points] for report in reports[1:])
    assert (full, cheapest) == ([1.0], [0.125])  # of the shipped model
    page = (tmp_path / "index.html").read_text()
    assert "<h2>fixed full against default</h2>" in page
    assert "<h2>fixed cheapest against default</h2>" in page


def test_bursts_when_drawn_then_they_ask_for_more_than_the_full_point_holds_and_the_rest_for_less() -> None:
    arrival_s = bursts(1000.0, 32.0, 0).arrival_s
    offered = np.bincount(arrival_s.astype(int), minlength=32)
    assert arrival_s.max() < 32
    burst = np.arange(32) % 10 >= 7
    # Poisson: 500 and 1250 a second, over 23 and 9 seconds: four standard errors are 19 and 47.
    assert offered[~burst].mean() == pytest.approx(500, abs=19)
    assert offered[burst].mean() == pytest.approx(1250, abs=47)


def test_gateway_when_its_policy_is_bad_then_the_error_names_the_command(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('policy = "best"\n')
    with (
        pytest.raises(TargetError, match=r"did not get ready.*-m server.*policy\.toml"),
        gateway(policy, ROOT / "model_repository"),
    ):
        pass
