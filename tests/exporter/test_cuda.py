"""The graph for CUDA devices, on the CPU: its float32 form says what the ragged graph says, float16 rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.cuda import HalfProducts, PaddedLayers
from exporter.graph import build_graph
from exporter.moe_graph import MoeLayers
from exporter.products import Products
from tests.exporter.models import SMALL, pixels, random_checkpoint, session_of, with_moe
from tests.exporter.test_graph import random_points
from vmoe.config import ModelConfig

CONFIGS = {
    "bpr": SMALL,
    "vanilla": with_moe(routing="vanilla"),
    "experts choose": with_moe(router="items_per_expert", num_selected_experts=1),
    "attention pooling": replace(SMALL, classifier="map", qk_norm=True),
    "groups of two images": with_moe(group_images=2),
    "dense last block": with_moe(layers=(0, 1)),
}
WAITS = {"Compress", "NonZero", "Unique"}  # operators whose result's shape depends on values


def written(config: ModelConfig, layers: type[MoeLayers], products: Products | None = None) -> ir.Model:
    checkpoint = random_checkpoint(config)
    state = {name: value.numpy() for name, value in checkpoint.state.items()}
    return build_graph(
        config, state, checkpoint.preprocessing, max_selected_experts=3, moe_layers=layers, products=products
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_slots_in_float32_give_every_output_of_the_ragged_graph(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    ragged, padded = (
        session_of(written(config, layers), tmp_path / f"{layers.__name__}.onnx")
        for layers in (MoeLayers, PaddedLayers)
    )
    for seed in range(5):
        slots, selected = random_points(config, 6, seed)
        feeds = {"images": pixels(config, 6), "slots": slots, "num_selected_experts": selected}
        for found, expected in zip(padded.run(None, feeds), ragged.run(None, feeds), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_image_with_a_mate_that_is_no_number_answers_as_alone_in_padded_slots(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SMALL)
    state = {name: value.numpy() for name, value in checkpoint.state.items()}
    graph = build_graph(SMALL, state, checkpoint.preprocessing, input_type="float32", moe_layers=PaddedLayers)
    session = session_of(graph, tmp_path / "model.onnx")
    mine = pixels(SMALL, 1).astype(np.float32) / 255
    mine = np.concatenate([mine, np.full_like(mine, np.nan)])
    points = {"slots": np.array([[2, 3], [7, 1]]), "num_selected_experts": np.array([[2], [1]])}
    together = session.run(["logits"], {"images": mine, **points})[0]
    alone = session.run(["logits"], {"images": mine[:1], **{name: value[:1] for name, value in points.items()}})[0]
    np.testing.assert_array_equal(together[0], alone[0])


def test_no_shape_on_the_way_to_the_logits_depends_on_the_routing() -> None:
    graph = written(SMALL, PaddedLayers).graph
    waiting, found = [graph.outputs[0]], set()
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            waiting += [value for value in node.inputs if value is not None]
    kinds = {node.op_type for node in found}
    assert "MatMul" in kinds
    assert not kinds & WAITS
    # Sizes of a Split would come from the routing, too: only numbers of equal parts are left.
    assert all(len(node.inputs) == 1 for node in found if node.op_type == "Split")


def test_large_products_read_float16_and_logits_keep_three_digits(tmp_path: Path) -> None:
    # A float16 has 11 bits: sums of 16 to 24 rounded products of numbers near 1 are off by a few 1e-3. All slots are
    # granted, so that a router which sees rounded rows drops nobody for it.
    half = written(SMALL, PaddedLayers, HalfProducts())
    products = [node for node in half.graph if node.op_type == "Gemm"]
    assert {node.inputs[1].dtype for node in products} == {ir.DataType.FLOAT16}
    feeds = {
        "images": pixels(SMALL, 6),
        "slots": np.full((6, 2), 7),
        "num_selected_experts": np.full((6, 1), 3),
    }
    found = session_of(half, tmp_path / "half.onnx").run(["logits"], feeds)[0]
    expected = session_of(written(SMALL, MoeLayers), tmp_path / "full.onnx").run(["logits"], feeds)[0]
    error = np.abs(found - expected)
    assert found.dtype == np.float32
    assert 0 < np.median(error) < 5e-3 * expected.std()
