"""The figure of a sweep: accuracy against C, a panel per model and group size, dense models as horizontal lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vmoe.config import Routing
from vmoe.figure import new_figure
from vmoe.sweep import SweepPoint

_STYLES: dict[Routing, str] = {"bpr": "-", "vanilla": "--"}


def save_sweep_figure(path: Path, sweeps: Mapping[str, Sequence[SweepPoint]]) -> None:
    """Draws sweeps by name; bands are the bootstrap intervals.

    Raises:
        ValueError: no sweep is of a sparse model, the suffix of the path is no format, or matplotlib is not installed.
    """
    dense = {name: points[0] for name, points in sweeps.items() if points[0].point is None}
    sparse = {name: points for name, points in sweeps.items() if name not in dense}
    if not sparse:
        raise ValueError("a plot of accuracy against C needs at least one sparse model, all of these are dense")
    groups = sorted({point.group_images for points in sparse.values() for point in points})
    figure = new_figure((3.6 * len(sparse), 2.9 * len(groups)))
    panels = figure.subplots(len(groups), len(sparse), sharex=True, sharey=True, squeeze=False)
    for row, group in zip(panels, groups, strict=True):
        for axes, (name, points) in zip(row, sparse.items(), strict=True):
            for (routing, selected), curve in _curves(points, group).items():
                x = [point.point.capacity_factor for point in curve if point.point]
                colour = f"C{selected - 1}"
                y, low, high = (
                    [100 * value for value in values]
                    for values in zip(*((p.accuracy.mean, p.accuracy.low, p.accuracy.high) for p in curve), strict=True)
                )
                axes.plot(x, y, _STYLES[routing], color=colour, linewidth=1.2, label=f"{routing}, K = {selected}")
                axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            for index, (dense_name, point) in enumerate(dense.items()):
                shade = str(0.2 + 0.5 * index / len(dense))
                axes.axhline(100 * point.accuracy.mean, color=shade, linewidth=0.9, label=dense_name)
            axes.set_title(f"{name}, {group} image{'s' * (group > 1)} per group", fontsize=9)
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("capacity factor C")
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy, %")
    panels[0, -1].legend(fontsize=6, loc="lower right")
    figure.savefig(path, dpi=72)


def _curves(points: Sequence[SweepPoint], group: int) -> dict[tuple[Routing, int], list[SweepPoint]]:
    curves: dict[tuple[Routing, int], list[SweepPoint]] = {}
    for point in points:
        if point.group_images == group and point.routing is not None and point.point is not None:
            curves.setdefault((point.routing, point.point.num_selected_experts), []).append(point)
    return {
        key: sorted(curve, key=lambda p: p.point.capacity_factor if p.point else 0) for key, curve in curves.items()
    }
