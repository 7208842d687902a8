"""The ONNX graph: equal to the PyTorch model at every operating point, for every image as if it were alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch

from exporter.parity import token_experts
from tests.exporter.models import SMALL, graph_of, pixels, random_checkpoint, session_of, with_moe
from vmoe.config import ModelConfig
from vmoe.preprocess import normalize

# Two float32 implementations of a model this small differ by a few 1e-6; the issue allows 1e-5 between batches.
TOLERANCE = 2e-5
CONFIGS = {
    "bpr": SMALL,
    "vanilla": with_moe(routing="vanilla"),
    "average pooling, fixed positions": replace(SMALL, classifier="gap", position_embedding="sincos2d"),
    "attention pooling, qk-norm": replace(SMALL, classifier="map", qk_norm=True),
    "no positions, pre_logits": replace(SMALL, position_embedding="none", representation_size=6),
    "groups of two images": with_moe(group_images=2),
    "groups of two images, vanilla": with_moe(group_images=2, routing="vanilla"),
    "normalised weights": with_moe(normalize_weights=True),
    "groups of two images, normalised weights": with_moe(group_images=2, normalize_weights=True),
    "every block": with_moe(layers=(0, 1, 2)),
    "dense last block": with_moe(layers=(0, 1)),
    "dense last block, qk-norm": replace(with_moe(layers=(0, 1)), qk_norm=True),
}
FIRST_PRODUCT = re.compile(r"blocks\.2\.mlp\..*(weight_in|linear_in\.weight)")  # of the last MLP, or of its experts


def random_points(config: ModelConfig, batch: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Slots (B, L), from none to more than there are tokens, and K (B, 1) from 1 to 3."""
    assert config.moe is not None
    random = np.random.default_rng(seed)
    slots = random.integers(0, config.tokens_per_image + 2, (batch, len(config.moe.layers)))
    selected = random.integers(1, 4, (batch, 1))
    stride = config.moe.group_images
    return slots[::stride].repeat(stride, 0), selected[::stride].repeat(stride, 0)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_every_output_for_images_at_mixed_operating_points_equals_pytorch(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    checkpoint = random_checkpoint(config)
    model = checkpoint.model()
    session = session_of(graph_of(checkpoint, max_selected_experts=3), tmp_path / "model.onnx")
    images = pixels(config, batch=6)
    for seed in range(10):
        slots, selected = random_points(config, 6, seed)
        feeds = {"images": images, "slots": slots, "num_selected_experts": selected}
        logits, kept, load, experts = session.run(None, feeds)
        inputs = torch.from_numpy(normalize(images, checkpoint.preprocessing))
        expected = model(inputs, torch.from_numpy(slots), torch.from_numpy(selected[:, 0]), with_statistics=True)
        assert expected.statistics is not None
        np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(kept, expected.statistics.kept.numpy(), rtol=1e-6)
        np.testing.assert_array_equal(load, expected.statistics.expert_load.numpy())
        np.testing.assert_array_equal(experts, token_experts(expected.statistics, 3).numpy())


@torch.inference_mode()
def test_dense_model_has_images_and_logits_alone_and_equals_pytorch(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(replace(SMALL, moe=None))
    session = session_of(graph_of(checkpoint), tmp_path / "model.onnx")
    images = pixels(SMALL, batch=3)
    assert [value.name for value in session.get_inputs()] == ["images"]
    (logits,) = session.run(None, {"images": images})
    expected = checkpoint.model()(torch.from_numpy(normalize(images, checkpoint.preprocessing)))
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "config",
    [SMALL, with_moe(layers=(0, 1)), with_moe(group_images=2), replace(SMALL, moe=None)],
    ids=["sparse", "dense last block", "groups of two images", "dense"],
)
def test_class_token_shortcut_changes_no_output_and_serves_the_class_tokens_alone(
    config: ModelConfig, tmp_path: Path
) -> None:
    checkpoint, batch = random_checkpoint(config), 4
    feeds: dict[str, npt.NDArray[np.generic]] = {"images": pixels(config, batch)}
    if config.moe is not None:
        feeds |= {"slots": np.full((batch, 2), 3), "num_selected_experts": np.full((batch, 1), 2)}
    found, rows = [], []
    for shortcut in ("yes", "no"):
        graph = graph_of(checkpoint, max_selected_experts=2, class_token_shortcut=shortcut)
        names = [value.name for value in graph.graph.outputs]
        products = [
            node.outputs[0]
            for node in graph.graph
            if node.op_type == "Gemm" and FIRST_PRODUCT.fullmatch(node.inputs[1].name)
        ]
        for number, product in enumerate(products):
            product.type, product.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([f"rows {number}", config.mlp_dim])
        graph.graph.outputs.extend(products)
        outputs = session_of(graph, tmp_path / f"{shortcut}.onnx").run(None, feeds)
        found.append(dict(zip(names, outputs, strict=False)))
        rows.append(sum(len(product) for product in outputs[len(names) :]))
    np.testing.assert_allclose(found[0]["logits"], found[1]["logits"], rtol=0, atol=1e-5)
    for name in found[1].keys() - {"logits"}:
        np.testing.assert_array_equal(found[0][name], found[1][name], name)
    sparse = config.moe is not None and 2 in config.moe.layers
    assert 0 < rows[0] <= batch * (2 if sparse else 1)
    assert rows[1] > 2 * rows[0]


def test_image_in_any_company_answers_as_alone_to_the_bit(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SMALL)
    session = session_of(graph_of(checkpoint, input_type="float32"), tmp_path / "model.onnx")
    mine = normalize(pixels(SMALL, batch=1), checkpoint.preprocessing)
    slots, selected = np.array([[2, 3]]), np.array([[2]])
    alone = session.run(["logits"], {"images": mine, "slots": slots, "num_selected_experts": selected})[0]
    hostile = {
        "not a number": np.full_like(mine, np.nan),
        "infinite": np.full_like(mine, np.inf),
        "huge": np.full_like(mine, 1e30),
        "the same image": mine,
        "noise": normalize(pixels(SMALL, batch=1, seed=1), checkpoint.preprocessing),
    }
    for name, mate in hostile.items():
        for mate_slots, mate_selected in (([[0, 0]], [[1]]), ([[9, 9]], [[2]])):
            for order in (slice(None), slice(None, None, -1)):  # before and behind the mate
                batch = {
                    "images": np.concatenate([mine, mate])[order],
                    "slots": np.concatenate([slots, mate_slots])[order],
                    "num_selected_experts": np.concatenate([selected, mate_selected])[order],
                }
                together = session.run(["logits"], batch)[0][order]
                np.testing.assert_array_equal(together[0], alone[0], f"batch mate: {name}")


def test_runs_on_several_threads_repeat_to_the_bit(tmp_path: Path) -> None:
    # A ScatterND that adds the rows of all experts to their tokens would be a data race here: 50 of 150 runs came
    # out wrong in a prototype. Ours writes to places that no two rows share.
    session = session_of(graph_of(random_checkpoint(SMALL)), tmp_path / "model.onnx", threads=4)
    feeds = {
        "images": pixels(SMALL, batch=16),
        "slots": np.full((16, 2), 7),
        "num_selected_experts": np.full((16, 1), 2),
    }
    first = session.run(["logits"], feeds)[0]
    for _ in range(100):
        np.testing.assert_array_equal(session.run(["logits"], feeds)[0], first)


@torch.inference_mode()
def test_tokens_with_equal_gates_are_served_by_position(tmp_path: Path) -> None:
    # Without positions and with a blank image all patches are alike: every gate ties, the lower index goes first.
    config = replace(SMALL, position_embedding="none", classifier="gap")
    session = session_of(graph_of(random_checkpoint(config)), tmp_path / "model.onnx")
    feeds = {
        "images": np.full((1, *config.image_size, 3), 90, np.uint8),
        "slots": np.array([[4, 4]]),
        "num_selected_experts": np.array([[1]]),
    }
    experts = session.run(["token_experts"], feeds)[0][0, 0, :, 0]
    assert (experts[:4] >= 0).all()
    assert (experts[4:] == -1).all()


def test_priorities_that_float32_cannot_tell_apart_are_refused() -> None:
    # 40 experts: a first gate is at least 1 / 40 > 2^-6, and a bit for rounding: 7 bits per choice, 126 there are.
    config = with_moe(num_experts=40)
    graph_of(random_checkpoint(config), max_selected_experts=18)
    with pytest.raises(ValueError, match="19 of 40 experts; priorities are told apart for K up to 18"):
        graph_of(random_checkpoint(config), max_selected_experts=19)


@torch.inference_mode()
def test_first_choices_come_before_second_ones_however_small_their_gates(tmp_path: Path) -> None:
    # Weak routers: all gates are near 1 / E, so that keys of neighbouring choices are as close as they get.
    config = replace(with_moe(num_experts=8), hidden_size=16)
    checkpoint = random_checkpoint(config)
    state = {name: value * 1e-3 if "router" in name else value for name, value in checkpoint.state.items()}
    checkpoint = replace(checkpoint, state=state)
    session = session_of(graph_of(checkpoint, max_selected_experts=8), tmp_path / "model.onnx")
    images, slots, selected = pixels(config, 4), np.full((4, 2), 3), np.full((4, 1), 8)
    (experts,) = session.run(["token_experts"], {"images": images, "slots": slots, "num_selected_experts": selected})
    inputs = torch.from_numpy(normalize(images, checkpoint.preprocessing))
    expected = checkpoint.model()(
        inputs, torch.from_numpy(slots), torch.from_numpy(selected[:, 0]), with_statistics=True
    ).statistics
    assert expected is not None
    np.testing.assert_array_equal(experts, token_experts(expected, 8).numpy())


def test_no_slots_in_any_layer_leaves_the_residual(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SMALL)
    session = session_of(graph_of(checkpoint), tmp_path / "model.onnx")
    silent = replace(checkpoint, state={k: v * 0 if "experts" in k else v for k, v in checkpoint.state.items()})
    without = session_of(graph_of(silent), tmp_path / "silent.onnx")
    images, selected = pixels(SMALL, batch=2), np.full((2, 1), 2)
    none = session.run(None, {"images": images, "slots": np.zeros((2, 2), int), "num_selected_experts": selected})
    full = without.run(["logits"], {"images": images, "slots": np.full((2, 2), 7), "num_selected_experts": selected})
    np.testing.assert_allclose(none[0], full[0], rtol=0, atol=1e-6)
    assert (none[1] == 0).all()
    assert (none[2] == 0).all()


def test_graph_uses_one_operator_of_the_runtime_beside_standard_ones_of_the_pinned_versions(tmp_path: Path) -> None:
    ir.save(graph_of(random_checkpoint(SMALL)), tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "model.onnx")
    assert model.ir_version == 10
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "com.microsoft": 1}
    assert {node.op_type for node in model.graph.node if node.domain} == {"Attention"}
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "batch"


@torch.inference_mode()
def test_float16_storage_halves_the_weights_and_equals_the_rounded_model(tmp_path: Path) -> None:
    config = replace(SMALL, qk_norm=True, hidden_size=64, mlp_dim=128)
    checkpoint = random_checkpoint(config)
    checkpoint.round_to(torch.float16)
    session = session_of(graph_of(checkpoint, weight_type="float16"), tmp_path / "half.onnx")
    ir.save(graph_of(checkpoint), tmp_path / "full.onnx")
    num_weights = sum(value.numel() for value in checkpoint.state.values())
    saved = (tmp_path / "full.onnx").stat().st_size - (tmp_path / "half.onnx").stat().st_size
    assert saved == pytest.approx(2 * num_weights, rel=0.05)
    assert (tmp_path / "full.onnx").stat().st_size < 4 * num_weights * 1.2  # every weight once
    images, slots, selected = pixels(config, 4), np.full((4, 2), 3), np.full((4, 1), 2)
    logits = session.run(["logits"], {"images": images, "slots": slots, "num_selected_experts": selected})[0]
    inputs = torch.from_numpy(normalize(images, checkpoint.preprocessing))
    expected = checkpoint.model()(inputs, torch.from_numpy(slots), torch.from_numpy(selected[:, 0])).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * 10)  # 64 wide: sums four times as long
