"""Ranges for 8 bits: from the tokens that products really read, clipped where that loses least."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.calibration import BINS, CalibrationError, WatchedProducts, calibrate, clip
from exporter.int8 import Range
from exporter.profiling import default_points, make_points
from exporter.session import run
from tests.exporter.models import SMALL, graph_of, pixels, random_checkpoint, session_of
from vmoe.checkpoint import Checkpoint

POINTS = make_points(SMALL, default_points(SMALL))


def ranges_of(checkpoint: Checkpoint, num_images: int = 16, batch_size: int = 16) -> dict[str, Range]:
    watching = WatchedProducts()
    graph = graph_of(checkpoint, products=watching)
    images = pixels(SMALL, num_images)
    return calibrate(graph, watching.watched, images, POINTS, batch_size=batch_size, threads=1)


def test_ranges_do_not_depend_on_the_batches() -> None:
    checkpoint = random_checkpoint(SMALL)
    whole, parts = ranges_of(checkpoint), ranges_of(checkpoint, batch_size=5)
    assert whole == parts
    # 3 blocks: qkv, attention's output, and what both products of MLP or experts read
    assert len(whole) == 3 * 4
    # GELU is never below -0.17, LayerNorm's output is around 0
    assert all(-0.18 < whole[name].low < 0 for name in whole if "hidden" in name or "linear_out" in name)
    assert all(each.low < 0 < each.high for each in whole.values())


def test_experts_count_with_the_tokens_that_they_serve(tmp_path: Path) -> None:
    watching = WatchedProducts()
    graph = graph_of(random_checkpoint(SMALL), products=watching, class_token_shortcut="no")
    read = watching.watched["blocks.1.mlp.experts.input"]
    for value in read:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        graph.graph.outputs.append(value)
    session = session_of(graph, tmp_path / "model.onnx")
    for point in POINTS:
        load, rows = run(session, pixels(SMALL, 4), point, ["expert_load", str(read[0].name)])
        assert len(rows) == np.asarray(load)[:, 0].sum()


def test_flat_histogram_keeps_its_range_and_lone_outlier_is_clipped() -> None:
    flat = clip(np.full(BINS, 100), -2.0, 6.0)
    assert flat.low == pytest.approx(-2.0, abs=0.05)
    assert flat.high == pytest.approx(6.0, abs=0.05)
    # A million values in 0..1 and one at 100: with the outlier, steps are 100 times as wide, and rounding costs
    # 1e6 * (100 / 255)^2 / 12 = 1.3e4; without, the outlier costs (100 - 1)^2 = 9.8e3 and rounding next to nothing.
    counts = np.zeros(BINS, np.int64)
    counts[: BINS // 100] = 10**6 // (BINS // 100)
    counts[-1] = 1
    assert clip(counts, 0.0, 100.0).high < 50
    # With a thousand such values clipping would cost a thousand times as much.
    counts[-1] = 1000
    assert clip(counts, 0.0, 100.0).high > 95


def test_zero_is_a_step_of_every_range() -> None:
    for values in (Range(0.0, 3.0), Range(-0.17, 3.0), Range(-2.0, 0.0), Range(-5.0, 1e-4)):
        assert 0 <= values.zero_point <= 255
        assert (0 - values.zero_point) * values.scale == pytest.approx(values.low, abs=float(values.scale))


def test_without_images_there_are_no_ranges() -> None:
    with pytest.raises(CalibrationError, match="needs images, got none"):
        ranges_of(random_checkpoint(SMALL), num_images=0)


def test_activation_that_is_not_finite_is_named() -> None:
    checkpoint = random_checkpoint(SMALL)
    state = dict(checkpoint.state)
    state["blocks.1.attention_norm.bias"] = state["blocks.1.attention_norm.bias"] * float("nan")
    with pytest.raises(CalibrationError, match=r"blocks\.1\.attention\.qkv ranges from nan to nan on 16 images"):
        ranges_of(replace(checkpoint, state=state))
