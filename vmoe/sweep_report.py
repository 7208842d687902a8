"""The tables of a sweep in Markdown, for docs/experiments/sweep.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vmoe.operating_point import OperatingPoint
from vmoe.sweep import Interval, SweepPoint

# What the comparison of training recipes looks at: the cheapest that serving uses, half, and all slots of one choice.
SUMMARY = (OperatingPoint(0.25, 1), OperatingPoint(0.5, 1), OperatingPoint(1.0, 1))


def sweep_markdown(sweeps: Mapping[str, Sequence[SweepPoint]]) -> str:
    """What low capacity costs each model, then the accuracy at every point, in percent."""
    blocks = [_summary(sweeps)]
    for name, points in sweeps.items():
        for group in dict.fromkeys(point.group_images for point in points if point.point is not None):
            title = f"`{name}`, {group} image{'s' * (group > 1)} per group"
            blocks.append(f"{title}\n\n{_accuracies([point for point in points if point.group_images == group])}")
    return "\n\n".join(blocks) + "\n"


def _summary(sweeps: Mapping[str, Sequence[SweepPoint]]) -> str:
    """One image per group: a row per model and queue order, differences from the model as it was configured."""
    lines = [
        "| model | queue | accuracy as configured | " + " | ".join(f"{point} minus that" for point in SUMMARY) + " |",
        "|---|---|---|" + "---|" * len(SUMMARY),
    ]
    for name, points in sweeps.items():
        alone = [point for point in points if point.group_images == 1]
        for routing in dict.fromkeys(point.routing for point in alone):
            found = {point.point: point for point in alone if point.routing == routing}
            any_point = next(iter(found.values()))
            full = 100 * (any_point.accuracy.mean - any_point.minus_full.mean)
            cells = [_interval(found[point].minus_full) if point in found else "" for point in SUMMARY]
            lines.append(f"| `{name}` | {routing or 'dense'} | {full:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _accuracies(points: Sequence[SweepPoint]) -> str:
    """A row per C, a column per queue order and K."""
    columns: dict[str, dict[float, str]] = {}
    for point in points:
        if point.point is not None:
            column = columns.setdefault(f"{point.routing}, K = {point.point.num_selected_experts}", {})
            column[point.point.capacity_factor] = f"{100 * point.accuracy.mean:.2f}"
    lines = ["| C | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for capacity_factor in dict.fromkeys(c for column in columns.values() for c in column):
        cells = " | ".join(column[capacity_factor] for column in columns.values())
        lines.append(f"| {capacity_factor:g} | {cells} |")
    return "\n".join(lines)


def _interval(interval: Interval) -> str:
    return f"{100 * interval.mean:+.2f} ({100 * interval.low:+.2f} to {100 * interval.high:+.2f})"
