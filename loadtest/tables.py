"""Reports for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest.compare import Comparison, Difference
from loadtest.report import Compared, Figures, Live, Prediction, Report
from loadtest.search import Search, Trial

SEARCH_HEAD: Final = ("trial", "rate/s", "seed", "p99 ms", "unanswered %", "eff. acc. %", "held")


def print_report(report: Report, console: Console) -> None:
    """Summary, budgets where there are several, and operating points."""
    if report.oracle is not None:
        console.print(f"oracle: effective accuracy at most {percent(report.oracle.effective_accuracy)} %")
        console.print(report.oracle.method, soft_wrap=True)
    else:
        console.print(_budgets(report))
        console.print(_points(report))
    for name, reason in report.unknown.items():
        if report.oracle is None:
            console.print(f"{name} is unknown: {reason}")
    if report.live is not None:
        _print_live(report.live, console)
    if report.prediction is not None:
        console.print(_predicted(report.prediction))
    if report.search is not None:
        _print_search(report.search, console)
    if report.mean_decision_s is not None and report.mean_batch_size is not None:
        console.print(
            f"{report.decisions:,} batches of {report.mean_batch_size:.1f} images, "
            f"{1e6 * report.mean_decision_s:.0f} us per decision"
        )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """One row per figure."""
    table = Table(
        "", escape(comparison.first), escape(comparison.second), "difference", "95 % interval", "", box=SIMPLE
    )
    for each in comparison.differences:
        table.add_row(*comparison_row(each), "" if each.verdict == "open" else each.verdict)
    console.print(table)
    console.print(comparison.how, markup=False)


def comparison_row(each: Difference) -> tuple[str, str, str, str, str]:
    """Name, both figures, difference and interval, as text."""
    show = milliseconds if each.unit == "ms" else percent
    unit = "ms" if each.unit == "ms" else "%"
    return (
        f"{each.name} {unit}",
        show(each.first),
        show(each.second),
        _signed(each.difference, show),
        "-" if each.low is None or each.high is None else f"{_signed(each.low, show)} to {_signed(each.high, show)}",
    )


def _signed(value: float | None, show: Callable[[float | None], str]) -> str:
    text = show(value)
    if value is None:
        return text
    if float(text) == 0:
        return text.removeprefix("-")
    return f"+{text}" if value > 0 else text


def _print_search(search: Search, console: Console) -> None:
    table = Table(*SEARCH_HEAD, box=SIMPLE)
    for trial in search.trials:
        table.add_row(*trial_row(trial))
    console.print(table)
    console.print(search_result(search), style="bold" if search.rate_hz is None else None)


def trial_row(trial: Trial) -> tuple[str, ...]:
    """Under `SEARCH_HEAD`, as text."""
    cells = (milliseconds(trial.p99_s), percent(trial.unanswered), percent(trial.effective_accuracy))
    held = "yes" if trial.held else "; ".join(trial.missed + trial.invalid)
    return trial.phase, f"{trial.rate_hz:,.1f}", str(trial.seed), *cells, held


def search_result(search: Search) -> str:
    """The rate that was found, if one was."""
    objective = f"p99 at most {milliseconds(search.p99_s)} ms, unanswered at most {percent(search.max_shed)} %"
    if search.rate_hz is None:
        return f"no rate was confirmed: {objective}"
    return f"highest rate that holds: {search.rate_hz:,.1f} requests/s ({objective})"


def _print_live(live: Live, console: Console) -> None:
    lag, from_send = live.send_lag_s, live.latency_from_send_s
    if live.closed_users is not None:
        console.print(
            f"CLOSED LOOP of {live.closed_users} users, who wait for their answers: when the gateway is slow they send "
            "less, so these latencies hide overload. Measure without --closed to see it."
        )
    if live.percentile_bound_s is not None:
        console.print(
            f"p{live.percentile:g} is at most {milliseconds(live.percentile_bound_s)} ms, with 99 % confidence"
        )
    if live.closed_users is None:
        console.print(
            f"latency counts from the schedule; from send p50 {milliseconds(from_send.p50)}, "
            f"p99 {milliseconds(from_send.p99)} ms; "
            f"sent late by p50 {milliseconds(lag.p50)}, p99 {milliseconds(lag.p99)} ms"
        )
    console.print(
        f"by the gateway's own clock {percent(live.gateway_slo_attainment)} % in time; "
        f"grace {1000 * live.grace_s:g} ms; {1e6 * live.client_cpu_s:.0f} us of processor per request here"
    )
    if live.labelled_answers:
        console.print(
            f"of {live.labelled_answers:,} answers to labelled images {percent(live.accuracy)} % were right; "
            f"right and in time, of all sent: {percent(live.effective_accuracy)} %"
        )
    for why, count in live.failures.items():
        console.print(f"failed: {count:,} x {why}", markup=False)
    if live.interrupted:
        console.print("stopped by hand: the report is of what had been sent")
    console.print(f"warm-up: {live.warmup_s:g} s, {live.warmup_requests:,} requests, cut")
    for reason in live.invalid_reasons:
        console.print(f"[bold]NOT VALID[/bold]: {reason}")


def _budgets(report: Report) -> Table:
    setup = report.setup
    rate = "" if report.rate_hz is None else f", {report.rate_hz:,.0f} requests/s"
    table = Table(
        "budget",
        "offered",
        "in time %",
        "eff. acc. %",
        "acc. %",
        "degraded %",
        "missed %",
        "shed %",
        "p50 ms",
        "p99 ms",
        box=SIMPLE,  # ten columns in 80 characters
        title=f"{setup.policy.name} on {setup.bundle}: {report.duration_s:,.1f} s{rate}",
    )
    if len(report.budgets) > 1:
        for name, figures in report.budgets.items():
            table.add_row(*_row(name, figures))
        table.add_section()
    table.add_row(*_row("all", report))
    return table


def _row(name: str, figures: Figures) -> tuple[str, ...]:
    return (
        name,
        f"{figures.offered:,}",
        percent(figures.slo_attainment),
        percent(figures.effective_accuracy),
        percent(figures.mean_accuracy),
        percent(figures.degraded_ratio),
        percent(figures.missed_ratio),
        percent(figures.shed_ratio),
        milliseconds(figures.latency_s.p50),
        milliseconds(figures.latency_s.p99),
    )


def _points(report: Report) -> Table:
    table = Table("C", "K", "accuracy %", "answers", "share %", box=SIMPLE)
    for point in report.points:
        table.add_row(
            "-" if point.capacity_factor is None else f"{point.capacity_factor:g}",
            "-" if point.num_selected_experts is None else str(point.num_selected_experts),
            percent(point.accuracy),
            f"{point.answers:,}",
            percent(point.share),
        )
    return table


def _predicted(prediction: Prediction) -> Table:
    """One row per figure."""
    table = Table("", "measured", "predicted", "difference", box=SIMPLE, title="how well the simulator predicted")
    for name, each, text in prediction_rows(prediction):
        table.add_row(name, text(each.measured), text(each.predicted), text(each.difference))
    return table


def prediction_rows(
    prediction: Prediction,
) -> tuple[tuple[str, Compared, Callable[[float | None], str]], ...]:
    """Of each figure that is compared: its name, its values, and how they are written."""
    return (
        ("in time %", prediction.slo_attainment, percent),
        ("effective accuracy %", prediction.effective_accuracy, percent),
        ("shed %", prediction.shed_ratio, percent),
        ("p50 ms", prediction.p50_s, milliseconds),
        ("p99 ms", prediction.p99_s, milliseconds),
    )


def percent(ratio: float | None) -> str:
    """Two digits behind the point; a dash for what is unknown, as in the next."""
    return "-" if ratio is None else f"{100 * ratio:.2f}"


def milliseconds(seconds: float | None) -> str:
    """One digit behind the point."""
    return "-" if seconds is None else f"{1000 * seconds:.1f}"
