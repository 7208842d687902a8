from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loadtest.calibration import BatchSeen, Calibration
from loadtest.cli import app
from loadtest.errors import LoadtestError
from loadtest.generator import Plan
from loadtest.html import page
from loadtest.live_results import Terms
from loadtest.prediction import Predictor, policy_in_force
from loadtest.report import Report
from loadtest.report_file import read_report
from loadtest.runs import Run
from loadtest.subject import Subject
from loadtest.surroundings import Surroundings
from loadtest.tables import print_report
from loadtest.trace import write_trace
from server.answer import describe_policy
from server.policy_file import POLICY_NAMES, ActivePolicy, parse_policy
from server.schemas import PolicyBody
from tests.loadtest.conftest import SHIPPED, poisson_trace

SIZE = 16


def said(subject: Subject, active: ActivePolicy) -> PolicyBody:
    """What a gateway with this policy says, as it arrives."""
    body = describe_policy(active, subject.scheduler(active, max_batch_size=SIZE), 0.0)
    return PolicyBody.model_validate_json(body.model_dump_json())


def predictor(
    subject: Subject, policy: str = "foresight", batches: tuple[BatchSeen, ...] = (), slowdown: float = 1.5
) -> Predictor:
    costs = Surroundings(front_s=1e-4, answer_s=2e-4, way_s=5e-4, contention=1.0)
    return Predictor(subject, subject.policy(policy), Calibration(costs, slowdown, 1.0, 300.0, batches), SIZE, 1)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_policy_when_the_gateway_describes_it_then_it_is_built_again(subject: Subject, policy: str) -> None:
    text = f'policy = "{policy}"\nquantile = 0.8\n[budgets.auto]\ndeadline_ms = 300\nfloor = "0.25,1"\nweight = 2.5\n'
    active = parse_policy(text, subject.manifest, subject.ladder, "somewhere")
    found = policy_in_force(said(subject, active), subject)
    assert (found.config.policy, found.config.quantile) == (policy, 0.8)
    assert (found.parameters, found.budgets, found.source) == (active.parameters, active.budgets, "somewhere")
    assert type(found.build()) is type(active.build())


def test_policy_when_a_parameter_is_not_the_default_then_it_is_kept(subject: Subject) -> None:
    active = parse_policy('policy = "foresight"\n[foresight]\nslack = 0.7\n', subject.manifest, subject.ladder, "test")
    assert policy_in_force(said(subject, active), subject).config.foresight.slack == 0.7


def test_policy_when_it_names_a_point_that_the_bundle_lacks_then_it_is_refused(subject: Subject) -> None:
    body = said(subject, subject.policy("fixed"))
    auto = body.budgets["auto"]
    assert auto.floor is not None
    strange = auto.model_copy(update={"floor": auto.floor.model_copy(update={"capacity_factor": 7.0})})
    with pytest.raises(LoadtestError, match=r"capacity_factor=7\.0.*does not have: give the bundle that it serves"):
        policy_in_force(body.model_copy(update={"budgets": {"auto": strange}}), subject)


def test_prediction_when_a_run_was_measured_then_it_is_of_the_same_requests_and_says_by_how_much_it_differs(
    subject: Subject,
) -> None:
    trace = poisson_trace(300, 3.0, 1)
    plan = Plan(trace, "trace", Terms(1.0, 5.0, 0.0, 99.0), 3)
    measured = predictor(subject, "fixed").predict(plan)
    after = int((trace.arrival_s >= 1.0).sum())
    assert measured.offered == after
    # As if the run had been stopped by hand 50 requests before its end.
    report = predictor(subject).beside(measured.model_copy(update={"offered": after - 50}), plan)
    assert predictor(subject).predict(plan, after - 50).offered == after - 50
    assert report.prediction is not None
    for name in ("slo_attainment", "effective_accuracy", "shed_ratio", "p50_s", "p99_s"):
        each = getattr(report.prediction, name)
        assert each.difference == pytest.approx(each.predicted - each.measured)
    assert report.prediction.p50_s.measured == measured.latency_s.p50
    again = type(report).model_validate_json(report.model_dump_json())
    assert again.prediction == report.prediction


def test_prediction_when_it_is_shown_then_table_and_page_have_every_figure(subject: Subject) -> None:
    plan = Plan(poisson_trace(300, 2.0, 1), "trace", Terms(0.5, 5.0, 0.0, 99.0), 3)
    measured = predictor(subject, "fixed").predict(plan)
    report = predictor(subject).beside(measured, plan)
    found = report.prediction
    assert found is not None
    console = Console(record=True, width=120, file=io.StringIO())
    print_report(report, console)
    table, shown = console.export_text(), page([Run("run", report)])
    assert "how well the simulator predicted" in table
    assert "Predicted by the simulator" in shown
    assert "Predicted by the simulator" not in page([Run("run", measured)])
    for each, scale, digits in ((found.slo_attainment, 100, 2), (found.p50_s, 1000, 1), (found.p99_s, 1000, 1)):
        for value in (each.measured, each.predicted, each.difference):
            assert value is not None
            text = f"{scale * value:.{digits}f}"
            assert text in table
            assert f'<data value="{value!r}">{text}</data>' in shown


def test_simulate_when_given_the_machine_of_a_report_then_it_has_the_costs_that_were_found(
    subject: Subject, tmp_path: Path
) -> None:
    trace = poisson_trace(450, 2.0, 1)
    write_trace(tmp_path / "trace.csv", trace)
    plan = Plan(trace, "trace", Terms(0.0, 5.0, 0.0, 99.0), 3)
    measured = predictor(subject).predict(plan)
    reports = {"run": predictor(subject).beside(measured, plan), "bare": measured}
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(report.model_dump_json())

    def simulated(*options: str) -> Report:
        out = tmp_path / "out.json"
        command = ["simulate", "--bundle", str(SHIPPED), "--trace", str(tmp_path / "trace.csv"), "--json", str(out)]
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 0, result.output
        return read_report(out)

    found = reports["run"].prediction
    assert found is not None
    with_costs = simulated("--machine", str(tmp_path / "run.json"))
    assert (with_costs.setup.surroundings, with_costs.setup.slowdown) == (found.surroundings, found.slowdown)
    without = simulated("--slowdown", str(found.slowdown))
    assert with_costs.latency_s.p50 is not None
    assert without.latency_s.p50 is not None
    # At least the way and one request's work, 0.8 ms.
    assert with_costs.latency_s.p50 > without.latency_s.p50 + 0.0008
    command = ["simulate", "--bundle", str(SHIPPED), "--trace", str(tmp_path / "trace.csv")]
    refused = CliRunner().invoke(app, [*command, "--machine", str(tmp_path / "bare.json")])
    assert refused.exit_code == 1
    assert "says nothing of a machine to simulate: make it with `run --predict`" in refused.output


def test_prediction_when_the_probe_saw_batches_then_the_simulated_gateway_has_learned_from_them(
    subject: Subject,
) -> None:
    # The machine is 3 times slower than profiled. At the first moment, a scheduler that knows it refuses a deadline
    # just beyond the profile's high quantile; one that has the profile admits it, to be late.
    full, slowdown = subject.ladder.full, 3.0
    latency = subject.latency(SIZE)
    deadline_s = 1.1 * latency.uniform_s(full, 1, high=True)
    alone_s = slowdown * latency.uniform_s(full, 1)
    assert alone_s > deadline_s
    trace = poisson_trace(300, 0.01, 1)
    assert len(trace)
    plan = Plan(type(trace).of([0.0], deadline_s=[deadline_s]), "trace", Terms(0.0, 5.0, 0.0, 99.0), 3)
    seen = tuple(BatchSeen((full,), alone_s) for _ in range(40))
    assert predictor(subject, "fixed", slowdown=slowdown).predict(plan).missed_ratio == 1
    assert predictor(subject, "fixed", seen, slowdown).predict(plan).shed_ratio == 1
