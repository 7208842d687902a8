from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from loadtest.bootstrap import LEAST_BINS
from loadtest.cli import app
from loadtest.compare import Comparison, compare
from loadtest.html import page
from loadtest.outcomes import Outcome, Outcomes
from loadtest.report import Oracle, Report, Setup, oracle_report, summarise
from loadtest.runs import Run
from loadtest.tables import print_comparison
from loadtest.trace import Trace
from server.ladder import Ladder, Rung
from vmoe.operating_point import OperatingPoint

LADDER = Ladder([Rung(OperatingPoint(1.0, 1), (1,), 0.9, 1.0, None)], range(1))
RATE_HZ = 200


def report(setup: Setup, missed: float, *, trace: int = 0, seconds: int = 40, scale: float = 1.0) -> Report:
    """A run in which a share of requests is late, at random, and latencies are lognormal around `scale` times 20 ms."""
    arrival_s = np.arange(seconds * RATE_HZ) / RATE_HZ
    generator = np.random.default_rng([trace, round(1000 * missed), round(100 * scale)])
    outcomes = Outcomes.empty(len(arrival_s))
    outcomes.outcome[:] = np.where(generator.random(len(arrival_s)) < missed, Outcome.late, Outcome.met)
    outcomes.rung[:], outcomes.deadline_s[:] = 0, 0.1
    outcomes.latency_s[:] = scale * 0.02 * generator.lognormal(0, 0.3, len(arrival_s))
    outcomes.queue_s[:] = outcomes.inference_s[:] = outcomes.latency_s / 2
    return summarise(Trace.of(arrival_s), outcomes, LADDER, setup.model_copy(update={"trace_sha256": str(trace)}))


def by_name(comparison: Comparison, name: str) -> tuple[float, float, float, str]:
    (found,) = (each for each in comparison.differences if each.name == name)
    assert found.difference is not None
    assert found.low is not None
    assert found.high is not None
    return found.difference, found.low, found.high, found.verdict


def test_compare_when_one_run_misses_more_then_the_difference_is_shown_with_its_interval(setup: Setup) -> None:
    first, second = report(setup, 0.05), report(setup, 0.10, scale=1.2)
    comparison = compare(Run("a", first), Run("b", second))
    assert comparison.paired
    difference, low, high, verdict = by_name(comparison, "missed")
    assert second.missed_ratio is not None
    assert first.missed_ratio is not None
    assert difference == second.missed_ratio - first.missed_ratio
    assert low < difference < high
    # Binomial: 2 sqrt(0.05 * 0.95 / 8000 + 0.1 * 0.9 / 8000) = 0.0083 on either side, and bins are independent here.
    assert high - low == pytest.approx(0.0166, rel=0.4)
    assert verdict == "worse"
    assert by_name(comparison, "in time")[3] == by_name(comparison, "effective accuracy")[3] == "worse"
    assert by_name(comparison, "latency p99")[3] == "worse"
    difference, low, high, verdict = by_name(comparison, "latency p50")
    assert low < 0.004 < high  # 1.2 * 20 - 20 ms


def test_compare_when_turned_round_then_better_is_worse(setup: Setup) -> None:
    first, second = Run("a", report(setup, 0.05)), Run("b", report(setup, 0.10))
    assert by_name(compare(first, second), "missed")[3] == "worse"
    assert by_name(compare(second, first), "missed")[3] == "better"


def test_compare_when_runs_are_equal_then_no_difference_is_claimed(setup: Setup) -> None:
    run = report(setup, 0.05)
    comparison = compare(Run("a", run), Run("b", run))
    for each in comparison.differences:
        assert (each.difference, each.low, each.high, each.verdict) == (0, 0, 0, "open")
    # Accuracy of answers has one value here; there is no live run, so live figures are left out.
    assert {each.name for each in comparison.differences}.isdisjoint({"live: right answers"})


def test_compare_when_traces_differ_then_it_is_not_paired(setup: Setup) -> None:
    first = Run("a", report(setup, 0.05))
    assert not compare(first, Run("b", report(setup, 0.05, trace=1))).paired
    longer = report(setup, 0.05, seconds=50)  # one hash, and another part of the trace: the warm-up was shorter
    assert not compare(first, Run("b", longer)).paired


def test_compare_when_repeated_with_a_seed_then_the_intervals_are_the_same_and_with_another_they_are_not(
    setup: Setup,
) -> None:
    first, second = Run("a", report(setup, 0.05)), Run("b", report(setup, 0.10))
    assert compare(first, second, seed=1) == compare(first, second, seed=1)
    assert (
        by_name(compare(first, second, seed=1), "missed")[1:3] != by_name(compare(first, second, seed=2), "missed")[1:3]
    )


def test_compare_when_a_run_is_short_or_the_oracles_then_there_are_differences_without_intervals(setup: Setup) -> None:
    short = report(setup, 0.05, seconds=LEAST_BINS - 1)
    oracle = oracle_report(Trace.of([0.0]), Oracle(effective_accuracy=0.9, method="fluid"), setup)
    for other in (short, oracle):
        comparison = compare(Run("a", report(setup, 0.05)), Run("b", other))
        assert f"at least {LEAST_BINS} bins" in comparison.how
        assert all(each.low is None and each.verdict == "open" for each in comparison.differences)
        assert any(each.difference is not None for each in comparison.differences)


def test_comparison_when_printed_and_on_a_page_then_the_numbers_and_names_are_the_same(setup: Setup) -> None:
    first, second = Run("<b>one</b>[red]", report(setup, 0.05)), Run("two", report(setup, 0.10))
    comparison = compare(first, second)
    difference, low, high, _ = by_name(comparison, "missed")
    interval = f"+{100 * low:.2f} to +{100 * high:.2f}"
    console = Console(file=io.StringIO(), width=200)
    print_comparison(comparison, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert f"+{100 * difference:.2f}" in printed
    assert interval in printed
    assert "<b>one</b>[red]" in printed
    text = page([first, second], [comparison])
    assert "<h2>two against &lt;b&gt;one&lt;/b&gt;[red]</h2>" in text
    row = re.search(r'<th scope="row">missed %</th>.*?</tr>', text)
    assert row is not None
    assert f'<data value="{difference!r}">+{100 * difference:.2f}</data>' in row[0]
    assert f"<td>{interval}</td>" in row[0]
    assert '<span class="worse">worse</span>' in row[0]


def test_compare_command_when_given_reports_then_each_is_held_against_the_first(setup: Setup, tmp_path: Path) -> None:
    paths = []
    for name, missed in (("full", 0.1), ("cheap", 0.02), ("default", 0.05)):
        paths.append(str(tmp_path / f"{name}.json"))
        Path(paths[-1]).write_text(report(setup, missed).model_dump_json())
    html = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["compare", *paths, "--html", str(html)])
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"(?:in time|missed) % .* better", result.output)) == 2 * 2  # of two runs
    assert re.findall(r"<h2>(\w+ against \w+)</h2>", html.read_text()) == ["cheap against full", "default against full"]
    alone = CliRunner().invoke(app, ["compare", paths[0]])
    assert alone.exit_code == 1
    assert "comparing needs two reports or more, got 1" in alone.output
