"""Figures of the experiments, drawn with matplotlib, which is imported only when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of so many inches (width, height).

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # the class, not pyplot: no global state, no display
    except ImportError as error:
        raise ValueError(
            "a plot needs matplotlib, which is part of the extra 'export': pip install 'vmoe-serving[export]'"
        ) from error
    return Figure(figsize=size, layout="constrained")


def save_error_bars(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = True,
) -> None:
    """Draws lines with error bars.

    Arguments:
        path: its suffix fixes the format.
        series: by name (x, y, half the length of the bar).
        logarithmic: of the x axis.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure((6, 4))
    axes = figure.subplots()
    for name, points in series.items():
        x, y, bar = zip(*points, strict=True)
        axes.errorbar(x, y, yerr=bar, marker="o", markersize=4, capsize=3, label=name)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
