"""The Markdown of a sweep, line by line."""

from __future__ import annotations

from vmoe.config import Routing
from vmoe.operating_point import OperatingPoint
from vmoe.sweep import Interval, SweepPoint
from vmoe.sweep_report import sweep_markdown


def point_of(
    c: float, k: int, accuracy: float, minus_full: float, routing: Routing = "bpr", group: int = 1
) -> SweepPoint:
    around = [Interval(mean, mean - 0.01, mean + 0.02) for mean in (accuracy, minus_full)]
    return SweepPoint(routing, group, OperatingPoint(c, k), 1, (1.0,), *around, 100)


def test_sweep_markdown_has_what_low_capacity_costs_and_every_accuracy() -> None:
    nothing = Interval(0, 0, 0)
    sweeps = {
        "sparse": [
            point_of(0.25, 1, 0.8, -0.05),
            point_of(1.0, 1, 0.84, -0.01),
            point_of(0.25, 1, 0.7, -0.15, group=8),
        ],
        "dense": [SweepPoint(None, 1, None, 0, (), Interval(0.83, 0.8, 0.86), nothing, 100)],
    }
    assert sweep_markdown(sweeps).splitlines() == [
        "| model | queue | accuracy as configured | (0.25, 1) minus that | (0.5, 1) minus that | (1, 1) minus that |",
        "|---|---|---|---|---|---|",
        "| `sparse` | bpr | 85.00 | -5.00 (-6.00 to -3.00) |  | -1.00 (-2.00 to +1.00) |",
        "| `dense` | dense | 83.00 |  |  |  |",
        "",
        "`sparse`, 1 image per group",
        "",
        "| C | bpr, K = 1 |",
        "|---|---|",
        "| 0.25 | 80.00 |",
        "| 1 | 84.00 |",
        "",
        "`sparse`, 8 images per group",
        "",
        "| C | bpr, K = 1 |",
        "|---|---|",
        "| 0.25 | 70.00 |",
    ]
