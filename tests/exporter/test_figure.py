"""The picture of a bundle's operating points, and the command that draws it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from exporter.bundle import Bundle, BundleError
from exporter.cli import app
from exporter.figure import draw_points

SHIPPED = Path(__file__).parents[2] / "model_repository" / "vmoe-fashion-mnist"


def test_every_point_lies_at_its_accuracy_and_its_latency_over_the_full_points() -> None:
    points = Bundle.load(SHIPPED).manifest.points
    one, eight = draw_points(Bundle.load(SHIPPED).manifest).axes
    for axes, size in ((one, 1), (eight, 8)):
        drawn = {tuple(np.ravel(line.get_xydata())) for line in axes.lines if len(line.get_xydata()) == 1}
        median = [next(entry.median_s for entry in point.latency if entry.batch_size == size) for point in points]
        assert drawn == {
            (latency / median[-1], 100 * (point.accuracy or 0)) for latency, point in zip(median, points, strict=True)
        }
        assert {text.get_text() for text in axes.texts} == {f"{point.capacity_factor:g}" for point in points}


def test_a_bundle_without_accuracies_or_latencies_is_refused_with_what_would_measure_them() -> None:
    manifest = Bundle.load(SHIPPED).manifest
    for change in ({"accuracy": None}, {"latency": ()}):
        bare = manifest.model_copy(update={"points": tuple(p.model_copy(update=change) for p in manifest.points)})
        with pytest.raises(BundleError, match="--profile-only --images DIR"):
            draw_points(bare)


def test_command_writes_the_picture_and_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["plot", str(SHIPPED), "--output", str(tmp_path / "points.png")]).exit_code == 0
    assert (tmp_path / "points.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(app, ["plot", str(tmp_path), "--output", str(tmp_path / "other.png")])
    assert refused.exit_code == 1
    assert "manifest.json" in refused.output
    assert not (tmp_path / "other.png").exists()
