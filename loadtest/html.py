"""A report, or several beside each other, as one page that needs no network and runs no script.

Names of traces, budgets and files are other people's input: every text passes `escape`, here, in `loadtest.html_tables`
and in `loadtest.plot`, and the page's own policy forbids scripts and requests, should one slip through.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from loadtest.compare import Comparison
from loadtest.errors import LoadtestError
from loadtest.html_tables import (
    budgets_table,
    comparison_table,
    environment_of,
    overview,
    points_table,
    prediction_table,
    search_table,
    setup_of,
    side_by_side,
)
from loadtest.plot import draw
from loadtest.plots import plots
from loadtest.report import Report
from loadtest.runs import Run


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
        _section("Figures", overview(runs)),
        *(_section(f"{each.second} against {each.first}", comparison_table(each)) for each in comparisons),
        '<section class="plots">' + "".join(draw(plot) for plot in plots(runs)) + "</section>",
        *(_section(_of("Budgets", run, runs), budgets_table(run.report)) for run in runs if run.report.budgets),
        *(_section(_of("Operating points", run, runs), points_table(run.report)) for run in runs if run.report.points),
        *(
            _section(_of("Predicted by the simulator", run, runs), prediction_table(run.report.prediction))
            for run in runs
            if run.report.prediction is not None
        ),
        *(
            _section(_of("Search of the highest rate", run, runs), search_table(run.report.search))
            for run in runs
            if run.report.search is not None
        ),
        _section("What was run", side_by_side(runs, setup_of)),
        _section("Machine and versions", side_by_side(runs, environment_of)),
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
