"""A bundle's operating points as a picture: accuracy against latency."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.bundle import BundleError, Manifest, Point
from vmoe.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH_SIZES = (1, 8)
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")  # K = 1, 2, 3, 4 and more


def draw_points(manifest: Manifest) -> Figure:
    """One panel for each of `BATCH_SIZES` that was measured: median latency over the full point's, a line for every K.

    Points that are dominated are hollow.

    Raises:
        BundleError: accuracies or latencies are not in the manifest.
        ValueError: matplotlib is not installed.
    """
    points = [point for point in manifest.points if point.accuracy is not None]
    sizes = [size for size in BATCH_SIZES if points and all(_median_s(point, size) for point in points)]
    if not sizes:
        raise BundleError(
            f"{manifest.name} has no point with both accuracy and latency: --profile-only --images DIR measures them"
        )
    full = points[-1]
    figure = new_figure((1 + 5 * len(sizes), 4))
    every_axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(every_axes, sizes, strict=True):
        for selected in sorted({point.num_selected_experts for point in points}):
            row = [point for point in points if point.num_selected_experts == selected]
            latency = [_median_s(point, size) / _median_s(full, size) for point in row]
            accuracy = [100 * (point.accuracy or 0) for point in row]
            colour = COLOURS[min(selected, len(COLOURS)) - 1]
            axes.plot(latency, accuracy, color=colour, linewidth=1, label=f"K = {selected}")
            for x, y, point in zip(latency, accuracy, row, strict=True):
                axes.plot(x, y, "o", color=colour, markerfacecolor="white" if point.dominated else colour)
                axes.annotate(f"{point.capacity_factor:g}", (x, y), (4, -11), textcoords="offset points", fontsize=8)
        axes.set_xlabel(
            f"latency of {size} image{'s' * (size > 1)}, over {1000 * _median_s(full, size):.1f} ms of the full point"
        )
        axes.grid(alpha=0.3)
        axes.legend(title="numbers are C", loc="lower right")
    every_axes[0].set_ylabel("accuracy, %")
    return figure


def _median_s(point: Point, batch_size: int) -> float:
    """0 where it was not measured."""
    return next((entry.median_s for entry in point.latency if entry.batch_size == batch_size), 0.0)
