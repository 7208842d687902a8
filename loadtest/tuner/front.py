"""What the search found, for people: a table and a plot of accuracy against latency against load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import plotly.graph_objects as go
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.errors import LoadtestError
from loadtest.tuner.objective import Goal, Objective
from loadtest.tuner.search import Candidate, front
from server.provenance import Expected

_SHORT: Final = {Goal.effective_accuracy: "eff. acc.", Goal.mean_accuracy: "acc.", Goal.slo_attainment: "in time"}
_ROWS: Final = 8  # policies in the table; the plot has all
_COLOURS: Final = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Tol's, told apart by all


def print_front(candidates: Sequence[Candidate], objective: Objective, console: Console) -> None:
    """The Pareto front and, where it is not on it, the default policy: a row per load, then what they are."""
    table = _table(objective, str(objective))
    found = front(candidates)
    shown = found[:_ROWS]
    if candidates[0] not in shown:
        shown = [*shown, candidates[0]]
    for each in shown:
        _add(table, each, each.figures, objective, holds=each.verdict.holds)
    console.print(table)
    for each in shown:
        console.print(f"trial {each.number}: {describe(each)}", soft_wrap=True, highlight=False)
    if len(found) > _ROWS:
        console.print(f"and {len(found) - _ROWS} more that trade {objective.goal} for latency")


def finalist_table(
    finalists: Sequence[tuple[Candidate, Sequence[Expected], bool]], objective: Objective, title: str = "held out"
) -> Table:
    """Figures of each, one per load, and whether the objective holds there."""
    table = _table(objective, title)
    for each, figures, holds in finalists:
        _add(table, each, figures, objective, holds=holds)
    return table


def describe(each: Candidate) -> str:
    """Name and parameters."""
    active = each.active
    parameters = {"quantile": active.config.quantile} | active.parameters
    return f"{active.config.policy} " + " ".join(f"{name}={value:g}" for name, value in parameters.items())


def write_plot(path: Path, candidates: Sequence[Candidate], objective: Objective) -> None:
    """A page that needs nothing else: one colour per load, the front as a line, the limit of latency dashed.

    Raises:
        LoadtestError: it cannot be written.
    """
    figure = go.Figure()
    on_front = {each.number for each in front(candidates)}
    for index, load in enumerate(figures.load for figures in candidates[0].figures):
        colour = _COLOURS[index % len(_COLOURS)]
        for chosen, name in ((False, "tried"), (True, "front")):
            points = [(each.figures[index], each) for each in candidates if (each.number in on_front) == chosen]
            points.sort(key=lambda point: point[0].p99_ms or 0.0)
            figure.add_scatter(
                x=[figures.p99_ms for figures, _ in points],
                y=[getattr(figures, objective.goal) for figures, _ in points],
                text=[f"trial {each.number}: {describe(each)}" for _, each in points],
                mode="lines+markers" if chosen else "markers",
                name=f"load {load:g}, {name}",
                legendgroup=f"{load:g}",
                marker={"color": colour, "size": 9 if chosen else 5, "opacity": 1 if chosen else 0.4},
            )
    figure.add_vline(x=objective.p99_ms, line_dash="dash", annotation_text="limit")
    figure.update_layout(
        title=str(objective), xaxis_title="p99 of latency, ms", yaxis_title=objective.goal.replace("_", " ")
    )
    try:
        figure.write_html(path, div_id="front")
    except OSError as error:
        raise LoadtestError(f"cannot write {path}: {error.strerror}") from error


def _table(objective: Objective, title: str) -> Table:
    return Table(
        "trial", "policy", "load", f"{_SHORT[objective.goal]} %", "p99 ms", "shed %", "holds", box=SIMPLE, title=title
    )


def _add(table: Table, each: Candidate, figures: Sequence[Expected], objective: Objective, *, holds: bool) -> None:
    for row, at_load in enumerate(figures):
        table.add_row(
            str(each.number) if row == 0 else "",
            each.active.config.policy if row == 0 else "",
            *_cells(at_load, objective),
            ("yes" if holds else "no") if row == 0 else "",
        )


def _cells(figures: Expected, objective: Objective) -> tuple[str, ...]:
    gain = getattr(figures, objective.goal)
    return (
        f"{figures.load:g}",
        "-" if gain is None else f"{100 * gain:.2f}",
        "-" if figures.p99_ms is None else f"{figures.p99_ms:.1f}",
        "-" if figures.shed_ratio is None else f"{100 * figures.shed_ratio:.3f}",
    )
