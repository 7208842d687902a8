"""The tables of a page: reports in, HTML out. Numbers stand in `<data value="...">` with all their digits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Final

from loadtest.compare import Comparison
from loadtest.plots import COLOURS
from loadtest.report import Figures, Live, Prediction, Report
from loadtest.runs import Run
from loadtest.search import Search
from loadtest.tables import (
    SEARCH_HEAD,
    comparison_row,
    milliseconds,
    percent,
    prediction_rows,
    search_result,
    trial_row,
)

_FIGURES: Final = (
    "offered", "in time %", "effective acc. %", "accuracy %", "degraded %", "missed %", "shed %",
    "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms",
)  # fmt: skip


def overview(runs: Sequence[Run]) -> str:
    """One row per run, and why figures are unknown."""
    rows = [
        (f'<i class="solid" style="color:var(--c{place % COLOURS})"></i>{escape(run.name)}', run.report)
        for place, run in enumerate(runs)
    ]
    unknown = sorted({(name, reason) for run in runs for name, reason in run.report.unknown.items()})
    listed = "".join(f"<li>{escape(name)} is unknown: {escape(reason)}</li>" for name, reason in unknown)
    return _table(("run", *_FIGURES), [[name, *_figures(each)] for name, each in rows]) + (
        f'<ul class="unknown">{listed}</ul>' if listed else ""
    )


def comparison_table(comparison: Comparison) -> str:
    """One row per figure, and how the intervals came about."""
    rows = []
    for each in comparison.differences:
        name, first, second, difference, interval = comparison_row(each)
        verdict = "" if each.verdict == "open" else f'<span class="{each.verdict}">{each.verdict}</span>'
        rows.append(
            [
                escape(name),
                _data(each.first, first),
                _data(each.second, second),
                _data(each.difference, difference),
                interval,
                verdict,
            ]
        )
    head = ("figure", comparison.first, comparison.second, "difference", "95 % interval", "")
    return f'{_table(head, rows)}<p class="note">{escape(comparison.how)}</p>'


def budgets_table(report: Report) -> str:
    """One row each, and all of them together."""
    rows = [[escape(name), _deadline(each), *_figures(each)] for name, each in report.budgets.items()]
    return _table(("budget", "deadline ms", *_FIGURES), [*rows, ["all", _deadline(report), *_figures(report)]])


def _deadline(figures: Figures) -> str:
    found = figures.deadline_s
    if found.min is None or found.max is None:
        return "-"
    return f"{1000 * found.min:g}" if found.min == found.max else f"{1000 * found.min:g} to {1000 * found.max:g}"


def _figures(figures: Figures) -> list[str]:
    latency = figures.latency_s
    ratios = (
        figures.slo_attainment,
        figures.effective_accuracy,
        figures.mean_accuracy,
        figures.degraded_ratio,
        figures.missed_ratio,
        figures.shed_ratio,
    )
    return [
        _data(figures.offered, f"{figures.offered:,}"),
        *(_data(ratio, percent(ratio)) for ratio in ratios),
        *(
            _data(seconds, milliseconds(seconds))
            for seconds in (latency.p50, latency.p90, latency.p99, latency.p999, latency.max)
        ),
    ]


def _data(value: float | None, text: str) -> str:
    return text if value is None else f'<data value="{value!r}">{text}</data>'


def points_table(report: Report) -> str:
    """One row per operating point that was used."""
    rows = [
        [
            "-" if point.capacity_factor is None else f"{point.capacity_factor:g}",
            "-" if point.num_selected_experts is None else str(point.num_selected_experts),
            _data(point.accuracy, percent(point.accuracy)),
            _data(point.answers, f"{point.answers:,}"),
            _data(point.share, percent(point.share)),
        ]
        for point in report.points
    ]
    return _table(("C", "K", "accuracy %", "answers", "share %"), rows)


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already, the head is text. The first column names the row."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def side_by_side(runs: Sequence[Run], describe: Callable[[Report], dict[str, str]]) -> str:
    """One column per run."""
    described = [describe(run.report) for run in runs]
    keys = dict.fromkeys(key for each in described for key in each)
    rows = [[escape(key), *(escape(each.get(key, "-")) for each in described)] for key in keys]
    return '<div class="words">' + _table(("", *(run.name for run in runs)), rows) + "</div>"


def setup_of(report: Report) -> dict[str, str]:
    """What was run, by name; what is unknown is left out."""
    setup = report.setup
    found: dict[str, object] = {
        "kind": setup.kind,
        "policy": f"{setup.policy.name}, from {setup.policy.source}",
        "bundle": setup.bundle,
        "manifest SHA-256": setup.manifest_sha256,
        "trace": setup.trace,
        "trace SHA-256": setup.trace_sha256,
        "seed": setup.seed,
        "workers": setup.workers,
        "largest batch": setup.max_batch_size,
        "noise": setup.noise,
        "slowdown": setup.slowdown,
        "batches": report.decisions or None,
        "mean batch": None if report.mean_batch_size is None else f"{report.mean_batch_size:.2f}",
        "bound": None if report.oracle is None else report.oracle.method,
    }
    if report.live is not None:
        found |= _live(report.live)
    return {name: str(value) for name, value in found.items() if value is not None}


def _live(live: Live) -> dict[str, object]:
    lag, from_send = live.send_lag_s, live.latency_from_send_s
    bound_s, users = live.percentile_bound_s, live.closed_users
    return {
        "users, closed loop": users,
        f"p{live.percentile:g} at most": None
        if bound_s is None
        else f"{milliseconds(bound_s)} ms, with 99 % confidence",
        "warm-up, cut": f"{live.warmup_s:g} s, {live.warmup_requests:,} requests",
        "time-out": f"{live.timeout_s:g} s",
        "grace": f"{1000 * live.grace_s:g} ms",
        "latency from send": f"p50 {milliseconds(from_send.p50)}, p99 {milliseconds(from_send.p99)} ms",
        "sent late by": f"p50 {milliseconds(lag.p50)}, p99 {milliseconds(lag.p99)} ms",
        "in time by the gateway": f"{percent(live.gateway_slo_attainment)} %",
        "live accuracy": f"{percent(live.accuracy)} % of {live.labelled_answers:,} answers to labelled images",
        "right and in time": f"{percent(live.effective_accuracy)} % of labelled images",
        "failures": ", ".join(f"{count:,} x {why}" for why, count in live.failures.items()) or "none",
        "processor per request": f"{1e6 * live.client_cpu_s:.0f} us, of the generator",
    }


def environment_of(report: Report) -> dict[str, str]:
    """Machine and versions, by name."""
    found = report.environment
    return {
        "processor": found.cpu,
        "cores": str(found.cores),
        "platform": found.platform,
        "Python": found.python,
    } | found.versions


def search_table(search: Search) -> str:
    """Trials of `--find-max`, and what they found."""
    rows = [[escape(cell) for cell in trial_row(trial)] for trial in search.trials]
    return f'{_table(SEARCH_HEAD, rows)}<p class="note">{escape(search_result(search))}</p>'


def prediction_table(prediction: Prediction) -> str:
    """How well the simulator predicted the run."""
    rows = [
        [escape(name), *(_data(value, text(value)) for value in (each.measured, each.predicted, each.difference))]
        for name, each, text in prediction_rows(prediction)
    ]
    return _table(("figure", "measured", "predicted", "difference"), rows)
