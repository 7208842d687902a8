"""The benchmark of 8 bits runs, and leaves what its page shows."""

from __future__ import annotations

import json
from pathlib import Path

from exporter.bundle import Bundle
from tests.benchmarks.int8_speed import SHIPPED, main, shipped_table


def test_one_round_of_the_shipped_model_leaves_table_and_record(tmp_path: Path) -> None:
    main(tmp_path, rounds=1, models=["shipped"], threads=1)
    results = json.loads((tmp_path / "int8_speed.json").read_text())["results"]
    assert [each["model"] for each in results] == ["product", *["shipped"] * 4]
    assert all(each["float32_s"] > 0 and each["int8_s"] > 0 for each in results)
    page = (tmp_path / "int8_speed.md").read_text()
    assert page.count("| shipped | batch ") == 4


def test_bundles_are_compared_point_by_point() -> None:
    exact = Bundle.load(SHIPPED).manifest
    points = [
        point.model_copy(
            update={
                "accuracy": (point.accuracy or 0) - 0.001,
                "latency": tuple(
                    entry.model_copy(update={"median_s": entry.median_s / entry.batch_size / 2})
                    for entry in point.latency
                ),
            }
        )
        for point in reversed(exact.points)
    ]
    rows = shipped_table(exact, exact.model_copy(update={"points": tuple(points)})).splitlines()[-len(points) :]
    full = exact.points[-1]
    accuracy = 100 * (full.accuracy or 0)
    assert rows[-1] == f"| 1 | 2 | {accuracy:.2f} % | {accuracy - 0.1:.2f} % | 0.10 | 2.00 | 16.00 |"
    assert len({row[:12] for row in rows}) == len(points)
