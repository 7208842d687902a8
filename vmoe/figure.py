"""Figures of the experiments, drawn with matplotlib, which is imported only when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmoe.extras import install_command

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
            f"a plot needs matplotlib, which is part of the extra 'export': {install_command('export')}"
        ) from error
    return Figure(figsize=size, layout="constrained")


Point = tuple[float, float, float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        series: by name (x, y, half the length of the error bar).
        logarithmic: of the x axis.
    """

    x_label: str
    series: Mapping[str, Sequence[Point]]
    logarithmic: bool = False


def save_panels(path: Path, panels: Sequence[Panel], *, y_label: str) -> None:
    """Draws lines with error bars, side by side with one y axis.

    Arguments:
        path: its suffix fixes the format.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure((1 + 5 * len(panels), 4))
    every_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(every_axes, panels, strict=True):
        for name, points in panel.series.items():
            x, y, bar = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, yerr=bar, marker="o", markersize=4, capsize=3, label=name)
        if panel.logarithmic:
            axes.set_xscale("log")
        axes.set_xlabel(panel.x_label)
        axes.grid(alpha=0.3)
        axes.legend()
    every_axes[0].set_ylabel(y_label)
    figure.savefig(path, dpi=110)
