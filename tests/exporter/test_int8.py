"""The graph in 8 bits: near the float32 graph, exact in its sums, and an image's answer is its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from exporter.bundle import Point
from exporter.calibration import WatchedProducts, calibrate
from exporter.int8 import WEIGHT_MAX, WEIGHT_MIN, Int8Products, Range, column_scales, quantise
from exporter.profiling import default_points, make_points
from exporter.session import run
from exporter.tape import Tape
from tests.exporter.models import SMALL, graph_of, pixels, random_checkpoint, session_of, with_moe
from vmoe.checkpoint import Checkpoint
from vmoe.config import ModelConfig

CONFIGS = {
    "sparse": SMALL,
    "dense last block": with_moe(layers=(0, 1)),
    "attention pooling, qk-norm": replace(SMALL, classifier="map", qk_norm=True),
    "groups of two images": with_moe(group_images=2),
    "dense": replace(SMALL, moe=None),
}


def points_of(config: ModelConfig) -> tuple[Point, ...]:
    return () if config.moe is None else make_points(config, default_points(config))


def int8_graph(checkpoint: Checkpoint, **options: str) -> ir.Model:
    watching = WatchedProducts()
    graph = graph_of(checkpoint, products=watching)
    images, points = pixels(checkpoint.config, 32, seed=7), points_of(checkpoint.config)
    ranges = calibrate(graph, watching.watched, images, points, batch_size=16, threads=1)
    return graph_of(checkpoint, products=Int8Products(ranges), **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_in_8_bits_are_near_those_in_float32(name: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(CONFIGS[name])
    exact = session_of(graph_of(checkpoint), tmp_path / "float32.onnx")
    coarse = session_of(int8_graph(checkpoint), tmp_path / "int8.onnx")
    images = pixels(checkpoint.config, 64)
    for point in points_of(checkpoint.config) or (None,):
        expected, found = (run(session, images, point, ["logits"])[0] for session in (exact, coarse))
        # Steps of 1/255 of a range and of 1/126 of a column, in nine products one after the other: a few per cent of
        # what images differ by. More where a token goes to another expert, so the median image counts. Wrong scales or
        # zero points give more than 1.
        error = np.sqrt(np.square(np.subtract(found, expected)).mean(axis=1)) / np.std(expected, axis=0).mean()
        assert 0 < np.median(error) < 0.1


def test_image_in_8_bits_answers_as_alone_to_the_bit_in_batches_of_any_size(tmp_path: Path) -> None:
    session = session_of(int8_graph(random_checkpoint(SMALL)), tmp_path / "model.onnx")
    random, images = np.random.default_rng(0), pixels(SMALL, batch=9)
    images[0] = 255  # mates from which a scale of the whole batch would differ
    images[1] = 0
    slots, selected = random.integers(0, 8, (9, 2)), random.integers(1, 3, (9, 1))

    def logits(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        feeds = {"images": images[rows], "slots": slots[rows], "num_selected_experts": selected[rows]}
        return np.asarray(session.run(["logits"], feeds)[0])

    alone = np.concatenate([logits(np.array([row])) for row in range(9)])
    for size in range(2, 10):
        rows = random.permutation(9)[:size]
        np.testing.assert_array_equal(logits(rows), alone[rows])


def test_every_product_of_the_blocks_is_one_kernel_of_8_bits(tmp_path: Path) -> None:
    # Two products of attention in each of 3 blocks, of which the last is dense and asks for the class token's query
    # apart; the embedding; two for each of 4 experts in 2 layers; two of the dense MLP.
    path, fused = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    ir.save(int8_graph(random_checkpoint(with_moe(layers=(0, 1)))), path)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(fused)
    options.log_severity_level = 3  # it warns that the file is for this machine
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(fused).graph.node]
    assert kinds.count("QGemm") == 3 * 2 + 1 + 1 + 2 * 4 * 2 + 2
    assert kinds.count("Gemm") == 1  # the head
    assert "DequantizeLinear" not in kinds


def test_graph_in_8_bits_has_standard_operators_and_a_byte_per_weight(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(replace(SMALL, hidden_size=64, mlp_dim=256))
    ir.save(graph_of(checkpoint), tmp_path / "float32.onnx")
    ir.save(int8_graph(checkpoint), tmp_path / "int8.onnx")
    onnx.checker.check_model(tmp_path / "int8.onnx", full_check=True)
    assert {node.domain for node in onnx.load(tmp_path / "int8.onnx").graph.node} == {""}
    assert (tmp_path / "int8.onnx").stat().st_size < 0.4 * (tmp_path / "float32.onnx").stat().st_size


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_numbers_do_not_saturate(sign: int, tmp_path: Path) -> None:
    # 255 * 64 * 2 = 32640 fits into 16 bits; with 8-bit weights, 255 * 127 * 2 = 64770 would not.
    weight = np.full((96, 8), sign * 0.5, np.float32)
    tape = Tape({}, "float32", Int8Products({"x": Range(0.0, 255.0)}))
    rows = ir.val("x", ir.DataType.FLOAT, ["rows", 96])
    product = tape.affine(tape.operand(rows, "x"), "x", ("weight", weight), ("bias", np.zeros(8, np.float32)))
    product.name, product.type, product.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", 8])
    session = session_of(ir.Model(tape.graph([rows], [product], 20), ir_version=10), tmp_path / "model.onnx")
    # 96 terms of 255 * 0.5, each rounded to 1 / 63 of the largest weight: exact but for float32.
    found = session.run(None, {"x": np.full((5, 96), 255, np.float32)})[0]
    np.testing.assert_allclose(found, np.full((5, 8), sign * 96 * 255 * 0.5), rtol=1e-6)


def test_columns_get_the_scales_that_lose_least() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((512, 3)).astype(np.float32) * np.array([1, 10, 0], np.float32)
    # Clipped at 0.95 * 20 it would be off by 1, squared 1; the other 511 numbers lose 511 * (20 / 63)^2 / 12 = 4.3 at
    # the full scale and a tenth less at 0.95 of it: less than 1. The column keeps its scale; the bell beside it does
    # not.
    weight[0, 0] = 20.0
    bias = np.array([0, 0, 3], np.float32)
    scales = column_scales(weight, bias)
    quantised = quantise(weight, scales)
    assert quantised.min() >= WEIGHT_MIN
    assert quantised.max() <= WEIGHT_MAX
    widest = np.abs(weight).max(axis=0) / WEIGHT_MAX
    assert scales[0] == pytest.approx(widest[0])
    assert 0.7 * widest[1] < scales[1] < widest[1]
    kept, whole = (
        np.square(quantise(weight[:, 1], scale) * scale - weight[:, 1]).sum() for scale in (scales[1], widest[1])
    )
    assert kept < whole
    assert (quantised[:, 2] == 0).all()
    assert np.rint(bias[2] / scales[2]) < 2**31  # a column of zeros leaves its bias, in int32 steps
    np.testing.assert_allclose(np.rint(bias[2] / scales[2]) * scales[2], 3.0, rtol=1e-6)
