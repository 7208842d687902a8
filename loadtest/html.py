"""A report, or several beside each other, as one page that needs no network and runs no script.

Names of traces, budgets and files are other people's input: every text passes `escape`, here and in `loadtest.plot`,
and the page's own policy forbids scripts and requests, should one slip through. Numbers stand in `<data value="...">`
with all their digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Final

from loadtest.compare import Comparison
from loadtest.errors import LoadtestError
from loadtest.plot import draw
from loadtest.plots import COLOURS, plots
from loadtest.report import Figures, Live, Prediction, Report
from loadtest.runs import Run
from loadtest.tables import comparison_row, milliseconds, percent, prediction_rows

_FIGURES: Final = (
    "offered", "in time %", "effective acc. %", "accuracy %", "degraded %", "missed %", "shed %",
    "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms",
)  # fmt: skip


def write_page(path: Path, runs: Sequence[Run], comparisons: Sequence[Comparison] = ()) -> None:
    """Raises `LoadtestError` where the file cannot be written."""
    try:
        path.write_text(page(runs, comparisons), encoding="utf-8")
    except OSError as error:
        raise LoadtestError(f"cannot write {path}: {error.strerror}") from error


def page(runs: Sequence[Run], comparisons: Sequence[Comparison] = ()) -> str:
    """The page of one run, or of several with other names each and of comparisons between them."""
    title = runs[0].name if len(runs) == 1 else " | ".join(run.name for run in runs)
    style = files("loadtest").joinpath("page.css").read_text(encoding="utf-8")
    sections = [
        *(_verdict(run, len(runs) > 1) for run in runs),
        _section("Figures", _overview(runs)),
        *(_section(f"{each.second} against {each.first}", _comparison(each)) for each in comparisons),
        *(
            _section(_of("Predicted by the simulator", run, runs), _prediction(run.report.prediction))
            for run in runs
            if run.report.prediction is not None
        ),
        '<section class="plots">' + "".join(draw(plot) for plot in plots(runs)) + "</section>",
        *(_section(_of("Budgets", run, runs), _budgets(run.report)) for run in runs if run.report.budgets),
        *(_section(_of("Operating points", run, runs), _points(run.report)) for run in runs if run.report.points),
        _section("What was run", _side_by_side(runs, _setup)),
        _section("Machine and versions", _side_by_side(runs, _environment)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # without, a browser asks the server for one
        f"<title>Load test: {escape(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>Load test: {escape(title)}</h1>{_subtitle(runs[0].report)}</header>"
        f"<main>{''.join(sections)}</main>"
        f"<footer>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by python -m loadtest. "
        "What the figures mean: docs/reports.md.</footer></body></html>\n"
    )


def _subtitle(report: Report) -> str:
    rate = "" if report.rate_hz is None else f", {report.rate_hz:,.0f} requests/s on average"
    return (
        f"<p>{escape(report.setup.bundle)}; {escape(report.setup.trace)}; "
        f"{report.offered:,} requests in {report.duration_s:,.1f} s{rate}</p>"
    )


def _verdict(run: Run, several: bool) -> str:
    """Whether the figures may be relied on."""
    live, name = run.report.live, f"{run.name}: " if several else ""
    if live is None:
        words = "an upper bound, no run" if run.report.oracle is not None else "simulated, no request was sent"
        return _banner("neutral", f"{name}{words}", [])
    stopped = ["stopped by hand: the report is of what had been sent"] if live.interrupted else []
    if live.valid:
        return _banner("valid", f"{name}a valid live run", stopped)
    return _banner("invalid", f"{name}NOT VALID, do not rely on these figures", [*live.invalid_reasons, *stopped])


def _banner(kind: str, words: str, reasons: Sequence[str]) -> str:
    listed = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f'<div class="banner {kind}">{escape(words)}{f"<ul>{listed}</ul>" if listed else ""}</div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _of(title: str, run: Run, runs: Sequence[Run]) -> str:
    return title if len(runs) == 1 else f"{title}: {run.name}"


def _overview(runs: Sequence[Run]) -> str:
    rows = [
        (f'<i class="solid" style="color:var(--c{place % COLOURS})"></i>{escape(run.name)}', run.report)
        for place, run in enumerate(runs)
    ]
    unknown = sorted({(name, reason) for run in runs for name, reason in run.report.unknown.items()})
    listed = "".join(f"<li>{escape(name)} is unknown: {escape(reason)}</li>" for name, reason in unknown)
    return _table(("run", *_FIGURES), [[name, *_figures(each)] for name, each in rows]) + (
        f'<ul class="unknown">{listed}</ul>' if listed else ""
    )


def _comparison(comparison: Comparison) -> str:
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


def _prediction(prediction: Prediction) -> str:
    rows = [
        [escape(name), *(_data(value, text(value)) for value in (each.measured, each.predicted, each.difference))]
        for name, each, text in prediction_rows(prediction)
    ]
    return _table(("figure", "measured", "predicted", "difference"), rows)


def _budgets(report: Report) -> str:
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


def _points(report: Report) -> str:
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


def _side_by_side(runs: Sequence[Run], describe: Callable[[Report], dict[str, str]]) -> str:
    """One column per run."""
    described = [describe(run.report) for run in runs]
    keys = dict.fromkeys(key for each in described for key in each)
    rows = [[escape(key), *(escape(each.get(key, "-")) for each in described)] for key in keys]
    return '<div class="words">' + _table(("", *(run.name for run in runs)), rows) + "</div>"


def _setup(report: Report) -> dict[str, str]:
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


def _environment(report: Report) -> dict[str, str]:
    found = report.environment
    return {
        "processor": found.cpu,
        "cores": str(found.cores),
        "platform": found.platform,
        "Python": found.python,
    } | found.versions
