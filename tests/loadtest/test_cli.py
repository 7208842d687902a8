from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner, Result

from exporter.bundle import Bundle, write_manifest
from loadtest.cli import app
from loadtest.report import Report
from tests.loadtest.conftest import SHIPPED

SAMPLES = Path(__file__).parents[1] / "data" / "traces"


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    result = invoke("generate", "poisson", "--rate", 700, "--duration", 1, "--seed", 1, "--out", path)
    assert result.exit_code == 0
    return path


def unprofiled(tmp_path: Path) -> Path:
    """The shipped bundle as `--rounds 0` would have exported it."""
    directory = tmp_path / "unprofiled"
    shutil.copytree(SHIPPED, directory)
    manifest = Bundle.load(directory).manifest
    points = tuple(point.model_copy(update={"latency": ()}) for point in manifest.points)
    write_manifest(directory, manifest.model_copy(update={"points": points, "profile": None}))
    return directory


def test_simulate_when_run_on_the_shipped_bundle_then_the_report_is_printed_and_written(
    trace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    result = invoke("simulate", "--bundle", SHIPPED, "--trace", trace, "--policy", "foresight", "--json", out)
    assert result.exit_code == 0, result.output
    assert "foresight" in result.output
    report = json.loads(out.read_text())
    keys = ("slo_attainment", "mean_accuracy", "effective_accuracy", "shed_ratio", "latency_s")
    assert all(report[key] is not None for key in keys)
    assert report["latency_s"]["p50"] < report["latency_s"]["p999"]
    assert report["setup"]["kind"] == "simulated"


def test_simulate_when_piped_then_no_figure_is_cut(trace: Path) -> None:
    program = [sys.executable, "-m", "loadtest", "simulate", "--bundle", str(SHIPPED), "--trace", str(trace)]
    done = subprocess.run(program, check=True, capture_output=True, text=True, env=os.environ | {"COLUMNS": "40"})
    assert "…" not in done.stdout
    assert "slack" in done.stdout or "%" in done.stdout


def test_html_when_given_reports_then_the_page_shows_them_as_html_of_simulate_does(trace: Path, tmp_path: Path) -> None:
    reports = []
    for policy in ("foresight", "fixed"):
        report, own = tmp_path / f"{policy}.json", tmp_path / f"{policy}.html"
        arguments = ("--trace", trace, "--policy", policy, "--json", report, "--html", own)
        assert invoke("simulate", "--bundle", SHIPPED, *arguments).exit_code == 0
        assert f"<h1>Load test: {policy}</h1>" in own.read_text()
        reports.append(report)
    page = tmp_path / "page.html"
    result = invoke("html", *reports, "--out", page)
    assert result.exit_code == 0, result.output
    assert "<h1>Load test: foresight | fixed</h1>" in page.read_text()
    result = invoke("html", trace, "--out", page)
    assert result.exit_code == 1
    assert f"cannot read the report {trace}" in result.output


def test_simulate_when_repeated_with_the_same_seed_then_only_the_decision_time_differs(
    trace: Path, tmp_path: Path
) -> None:
    reports = []
    for number in range(2):
        out = tmp_path / f"{number}.json"
        assert invoke("simulate", "--bundle", SHIPPED, "--trace", trace, "--seed", 3, "--json", out).exit_code == 0
        reports.append(Report.model_validate_json(out.read_text()).model_copy(update={"mean_decision_s": None}))
    assert reports[0] == reports[1]


def test_simulate_when_the_policy_is_the_oracle_then_the_bound_and_its_method_are_reported(
    trace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    result = invoke("simulate", "--bundle", SHIPPED, "--trace", trace, "--policy", "oracle", "--json", out)
    assert result.exit_code == 0, result.output
    report = Report.model_validate_json(out.read_text())
    assert report.oracle is not None
    assert report.effective_accuracy == report.oracle.effective_accuracy
    assert report.oracle.method in result.output


def test_simulate_when_a_policy_file_is_given_then_it_is_named_in_the_report(trace: Path, tmp_path: Path) -> None:
    policy, out = tmp_path / "policy.toml", tmp_path / "report.json"
    policy.write_text('policy = "aimd"\n')
    result = invoke("simulate", "--bundle", SHIPPED, "--trace", trace, "--policy", policy, "--json", out)
    assert result.exit_code == 0, result.output
    assert Report.model_validate_json(out.read_text()).setup.policy.source == str(policy)


def test_simulate_when_the_bundle_has_no_profile_then_the_error_says_how_to_get_one(
    trace: Path, tmp_path: Path
) -> None:
    directory = unprofiled(tmp_path)
    result = invoke("simulate", "--bundle", directory, "--trace", trace)
    assert result.exit_code == 1
    assert f"python -m exporter --profile-only --name unprofiled --out {tmp_path}" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "best"), "policy must be one of foresight, fixed"),
        (("--bundle", "nowhere"), "is nowhere a bundle?"),
        (("--trace", "nowhere.csv"), "cannot read nowhere.csv"),
        (("--max-batch-size", "64"), "max_batch_size must be from 1 to 32"),
        (("--slowdown", "0"), "slowdown above 0"),
        (("--json", "/nowhere/report.json"), "cannot write /nowhere/report.json"),
        (("--html", "/nowhere/page.html"), "cannot write /nowhere/page.html"),
    ],
)
def test_simulate_when_asked_for_the_impossible_then_one_line_says_what_would_be_right(
    trace: Path, options: tuple[str, str], message: str
) -> None:
    arguments = {"--bundle": SHIPPED, "--trace": trace, options[0]: options[1]}
    result = invoke("simulate", *(part for pair in arguments.items() for part in pair))
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("kind", ["constant", "poisson", "gamma", "on-off", "diurnal", "spike", "ramp", "step"])
def test_generate_when_repeated_with_the_same_seed_then_the_file_is_the_same(kind: str, tmp_path: Path) -> None:
    texts = []
    for number in range(2):
        out = tmp_path / f"{number}.csv"
        result = invoke(
            "generate", kind, "--rate", 100, "--duration", 3, "--seed", 2, "--out", out, "--budget", "auto=3",
            "--budget", "low=1", "--deadline-ms", 80,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        texts.append(out.read_text())
    assert texts[0] == texts[1]
    assert texts[0].startswith("arrival_s,budget,deadline_ms\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", "0"), "--rate must be finite and above 0, got 0"),
        (("--budget", "low=much"), "NAME=SHARE with a number above 0, got 'low=much'"),
        (("--budget", "low=-1"), "NAME=SHARE with a number above 0, got 'low=-1'"),
        (("--deadline-ms", "soon"), "--deadline-ms must be finite and above 0, got soon"),
        (("--deadline-ms", "50=most"), "MILLISECONDS=SHARE with a number above 0, got '50=most'"),
    ],
)
def test_generate_when_options_make_no_trace_then_the_error_says_why(
    options: tuple[str, str], message: str, tmp_path: Path
) -> None:
    arguments = {"--rate": "10", "--duration": "1", "--out": str(tmp_path / "t.csv"), options[0]: options[1]}
    result = invoke("generate", "poisson", *(part for pair in arguments.items() for part in pair))
    assert result.exit_code == 1
    assert message in result.output


def test_convert_when_given_a_public_trace_then_our_own_columns_are_written(tmp_path: Path) -> None:
    source, out = SAMPLES / "azure_functions_2021.txt", tmp_path / "trace.csv"
    wishes = ("--budget", "low", "--deadline-ms", "50")
    result = invoke("convert", source, "--out", out, "--window", "0.5:2", "--time-scale", 2, *wishes)
    assert result.exit_code == 0, result.output
    # Arrivals at 0, 0.5, 1 and 2.125 s.
    assert out.read_text() == "arrival_s,budget,deadline_ms\n0.000000000,low,50\n1.000000000,low,50\n"


def test_convert_when_nothing_is_left_then_the_error_names_the_window(tmp_path: Path) -> None:
    out = tmp_path / "trace.csv"
    result = invoke("convert", SAMPLES / "azure_llm_2023.csv", "--window", "50:", "--out", out)
    assert result.exit_code == 1
    assert "azure_llm_2023.csv, window 50:inf s holds no requests" in result.output
    assert not out.exists()


def test_simulate_when_the_trace_is_a_public_one_then_the_report_says_what_was_changed(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = ("--rate-scale", 100, "--window", ":1", "--json", out)
    result = invoke("simulate", "--bundle", SHIPPED, "--trace", SAMPLES / "burst_gpt_3.csv", *options)
    assert result.exit_code == 0, result.output
    report = Report.model_validate_json(out.read_text())
    assert report.offered == 100
    assert report.setup.trace.endswith("burst_gpt_3.csv, window 0:1 s, rate scale 100")


def test_loadtest_when_imported_then_torch_and_matplotlib_are_not() -> None:
    code = "import sys, loadtest.cli; print(sorted({'torch', 'matplotlib', 'onnxruntime'} & set(sys.modules)))"
    # In a process of its own: other tests of this one import them.
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["run", "generate", "convert"])
def test_docs_when_a_command_has_an_option_then_it_is_described(command: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "loadtest.md").read_text()
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    options = [name for each in group.commands[command].params for name in each.opts if name.startswith("--")]
    assert len(options) > 5
    assert [name for name in options if f"`{name}" not in text and f" {name}" not in text] == []
