from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from loadtest.arrivals import on_off
from loadtest.errors import ReportError
from loadtest.html import page
from loadtest.report import (
    Compared,
    LatencyQuantiles,
    Live,
    Oracle,
    PolicyUsed,
    Prediction,
    Report,
    Setup,
    oracle_report,
    summarise,
)
from loadtest.runs import Run, read_runs
from loadtest.search import Search, Trial
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from loadtest.surroundings import Surroundings
from loadtest.trace import Trace

EVIL = '"><script>document.title = "hacked"</script><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def simulated(subject: Subject) -> Callable[[str], Report]:
    """A report of a policy under bursts that overload it, with two budgets."""
    arrival_s = on_off(600.0, 4.0, np.random.default_rng(0))
    trace = Trace.of(arrival_s, np.arange(len(arrival_s)) % 2, ("auto", "low"))

    @cache
    def run(policy: str, name: str = "trace.csv") -> Report:
        active = subject.policy(policy)
        outcomes = simulate(trace, subject.scheduler(active), active, Machine(subject.latency()))
        setup = Setup(
            kind="simulated",
            policy=PolicyUsed(name=policy, source="default"),
            bundle="bundle",
            manifest_sha256=subject.manifest_sha256,
            trace=name,
            trace_sha256=trace.sha256,
            workers=1,
            max_batch_size=32,
        )
        return summarise(trace, outcomes, subject.ladder, setup)

    return run


def live(*reasons: str) -> Live:
    return Live(
        valid=not reasons,
        invalid_reasons=list(reasons),
        interrupted=False,
        warmup_s=2.0,
        warmup_requests=10,
        timeout_s=10.0,
        grace_s=0.0,
        percentile=99.0,
        percentile_bound_s=0.03,
        latency_from_send_s=LatencyQuantiles(p50=0.01, p99=0.02),
        send_lag_s=LatencyQuantiles(p50=0.001, p99=0.002),
        failures={},
        gateway_slo_attainment=0.9,
        labelled_answers=10,
        accuracy=0.9,
        effective_accuracy=0.8,
        client_cpu_s=1e-4,
    )


class Outline(HTMLParser):
    """Tags that are open at the end, all tags seen, and every `data` element's value and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.data: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "data":
            self.data.append((dict(attrs)["value"] or "", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            self.data[-1] = (self.data[-1][0], data)


def test_page_when_made_then_every_tag_is_closed_and_nothing_comes_from_elsewhere(
    simulated: Callable[[str], Report],
) -> None:
    text = page([Run("foresight", simulated("foresight"))])
    outline = Outline(text)
    assert outline.open == []
    assert outline.tags.isdisjoint({"script", "img", "iframe", "object"})
    assert not re.search(r"(?:src|href)=\"(?!data:,)|url\(|@import|https?:", text)
    assert len(text) < 250_000


def test_page_when_made_then_its_figures_are_those_of_the_report_with_all_digits(
    simulated: Callable[[str], Report],
) -> None:
    report = simulated("foresight")
    outline = Outline(page([Run("foresight", report)]))
    found = dict(outline.data)
    for ratio in (
        report.slo_attainment,
        report.effective_accuracy,
        report.shed_ratio,
        report.budgets["low"].missed_ratio,
    ):
        assert ratio is not None
        assert found[repr(ratio)] == f"{100 * ratio:.2f}"
    assert report.latency_s.p999 is not None
    assert found[repr(report.latency_s.p999)] == f"{1000 * report.latency_s.p999:.1f}"
    assert found[str(report.offered)] == f"{report.offered:,}"


def test_page_when_there_are_several_runs_then_each_is_in_every_common_plot(
    simulated: Callable[[str], Report],
) -> None:
    text = page([Run("one", simulated("foresight")), Run("two", simulated("fixed"))])
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles == [
        "Latency", "Latency over time", "Offered and answered", "Accuracy", "Shed and missed",
        "Operating points: one", "Operating points: two", "Queue and inference: one", "Queue and inference: two",
    ]  # fmt: skip
    # CDF 2; p50 and p99 of 2; offered once, for it is the same, and answered of 2; accuracies 4; shed and missed 4.
    assert text.count('<path class="line"') == 2 + 4 + 3 + 4 + 4
    assert len(re.findall(r'<path class="(?:line|area)"[^>]* d=""', text)) == 0


def test_page_when_names_are_hostile_then_they_are_text(simulated: Callable[[str], Report]) -> None:
    report = simulated("foresight", EVIL)
    hostile = report.model_copy(update={"budgets": {EVIL: report.budgets["auto"]}, "live": live(EVIL)})
    outline = Outline(page([Run(EVIL, hostile), Run("other", hostile)]))
    assert outline.tags.isdisjoint({"script", "img"})
    assert outline.open == []


def test_page_when_a_live_run_is_not_valid_then_the_banner_gives_the_reasons(
    simulated: Callable[[str], Report],
) -> None:
    report = simulated("foresight")
    invalid = page([Run("a", report.model_copy(update={"live": live("the generator fell behind")}))])
    assert re.search(r'banner invalid">NOT VALID[^<]*<ul><li>the generator fell behind</li>', invalid)
    assert 'banner valid">a valid live run' in page([Run("a", report.model_copy(update={"live": live()}))])
    assert 'banner neutral">simulated' in page([Run("a", report)])


def test_page_when_there_is_a_prediction_or_a_search_then_it_has_a_table_of_each(
    simulated: Callable[[str], Report],
) -> None:
    compared = Compared(predicted=0.95, measured=0.9, difference=0.05)
    prediction = Prediction(
        slowdown=1.0,
        noise=1.0,
        surroundings=Surroundings(),
        crowd_hz=500.0,
        slo_attainment=compared,
        effective_accuracy=compared,
        shed_ratio=compared,
        p50_s=compared,
        p99_s=compared,
    )
    trial = Trial(
        phase="doubling",
        rate_hz=123.0,
        seed=7,
        offered=1000,
        p99_s=0.05,
        unanswered=0.0,
        effective_accuracy=0.9,
        missed=[EVIL],
        invalid=[],
    )
    search = Search(rate_hz=None, p99_s=0.1, max_shed=0.001, trials=[trial])
    report = simulated("foresight").model_copy(update={"prediction": prediction, "search": search})
    text = page([Run("a", report)])
    assert re.search(
        r"<h2>Predicted by the simulator</h2>.*?>90.00</data></td><td>.*?>95.00</data></td><td>.*?>5.00</data></td>",
        text,
    )
    assert re.search(r"<h2>Search of the highest rate</h2>.*?<td>123.0</td><td>7</td><td>50.0</td>", text)
    assert "no rate was confirmed: p99 at most 100.0 ms" in text
    assert Outline(text).tags.isdisjoint({"script", "img"})


def test_page_when_the_report_is_the_oracles_or_empty_then_it_has_no_plots_and_says_what_is_unknown(
    setup: Setup, subject: Subject
) -> None:
    bound = Oracle(effective_accuracy=0.9, method="fluid")
    text = page([Run("oracle", oracle_report(Trace.of([0.0, 1.0]), bound, setup))])
    assert "<h3>" not in text
    assert "latency_s is unknown: the oracle bounds" in text
    active = subject.policy("fixed")
    empty = Trace.of([])
    nothing = simulate(empty, subject.scheduler(active), active, Machine(subject.latency()))
    assert "<h3>" not in page([Run("empty", summarise(empty, nothing, subject.ladder, setup))])


def test_page_when_everything_was_refused_then_it_is_written_all_the_same(subject: Subject, setup: Setup) -> None:
    trace = replace(Trace.of(np.arange(5.0)), deadline_s=np.full(5, 1e-6))  # nobody can answer within a microsecond
    active = subject.policy("foresight")
    outcomes = simulate(trace, subject.scheduler(active), active, Machine(subject.latency()))
    report = summarise(trace, outcomes, subject.ladder, setup)
    assert report.shed_ratio == 1
    text = page([Run("refused", report)])
    assert Outline(text).open == []
    assert "nan" not in text


def test_runs_when_files_have_one_name_then_folders_tell_them_apart(
    simulated: Callable[[str], Report], tmp_path: Path
) -> None:
    content = simulated("fixed").model_dump_json()
    paths = [tmp_path / folder / "report.json" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(content)
    assert [run.name for run in read_runs(paths[:1])] == ["report"]
    assert [run.name for run in read_runs(paths)] == ["a/report", "b/report"]
    with pytest.raises(ReportError, match="every report may stand once"):
        read_runs([paths[0], paths[0]])
