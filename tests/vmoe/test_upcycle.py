"""Sparse upcycling: when the new model answers as the dense one, what it costs otherwise, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from exporter.bundle import Bundle
from exporter.cli import app as exporter_app
from tests.vmoe.test_cli import invoke, refused
from tests.vmoe.test_sources import timm_forward, timm_state
from tests.vmoe.tiny import DENSE, PREPROCESSING, images_of, model_of
from vmoe.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vmoe.config import ConfigError, MoeConfig
from vmoe.errors import CheckpointError
from vmoe.preprocess import Preprocessing
from vmoe.upcycle import parse_layers, upcycle

# 4 patches; 4 experts with C = E / K have a slot for every token, so that nothing is dropped.
EXPERTS, IMAGES = 4, images_of(DENSE, 6)
DENSE_CHECKPOINT = Checkpoint(DENSE, dict(model_of(DENSE).state_dict()), PREPROCESSING, ("a", "b", "c"))


@torch.inference_mode()
def logits_of(moe: MoeConfig | None) -> Tensor:
    checkpoint = DENSE_CHECKPOINT if moe is None else upcycle(DENSE_CHECKPOINT, moe)
    return checkpoint.model()(IMAGES).logits


def moe_of(selected: int, capacity_factor: float | None = None, *, normalize: bool) -> MoeConfig:
    factor = EXPERTS / selected if capacity_factor is None else capacity_factor
    return MoeConfig(EXPERTS, (0, 1), selected, factor, normalize_weights=normalize)


@pytest.mark.parametrize(
    "moe",
    [
        moe_of(4, normalize=False),  # a softmax over all experts sums to 1
        moe_of(1, normalize=True),
        moe_of(2, normalize=True),
        replace(moe_of(2, normalize=True), routing="vanilla", group_images=2),
    ],
    ids=["K=E", "K=1 normalised", "K=2 normalised", "vanilla groups normalised"],
)
def test_upcycled_model_whose_weights_sum_to_one_answers_as_the_dense_one(moe: MoeConfig) -> None:
    torch.testing.assert_close(logits_of(moe), logits_of(None), atol=1e-5, rtol=1e-5)


def test_upcycled_model_without_normalisation_serves_a_share_of_about_k_over_e() -> None:
    dense = DENSE_CHECKPOINT.model()
    sparse = upcycle(DENSE_CHECKPOINT, moe_of(2, normalize=False)).model()
    tokens = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    slots, selected = torch.full((3,), 4), torch.full((3,), 2)
    with torch.inference_mode():
        share = sparse.blocks[0].mlp(tokens, slots, selected, 2).hidden / dense.blocks[0].mlp(tokens)
    # Router weights of 0.02 on 8 features: logits of about 0.06, so that 2 of 4 gates sum to hardly more than 1/2.
    assert 0.5 < share.min() < share.max() < 0.56
    assert (logits_of(moe_of(2, normalize=False)) - logits_of(None)).abs().max() > 0.1


def test_upcycled_model_that_drops_tokens_differs_from_the_dense_one() -> None:
    assert (logits_of(moe_of(2, 0.5, normalize=True)) - logits_of(None)).abs().max() > 0.1


def test_experts_are_copies_and_routers_differ_between_seeds_and_layers() -> None:
    sparse = upcycle(DENSE_CHECKPOINT, moe_of(2, normalize=True))
    experts = sparse.state["blocks.1.mlp.experts.weight_in"]
    assert all(torch.equal(expert, DENSE_CHECKPOINT.state["blocks.1.mlp.linear_in.weight"].T) for expert in experts)
    routers = [sparse.state[f"blocks.{layer}.mlp.router.weight"] for layer in (0, 1)]
    other = upcycle(DENSE_CHECKPOINT, moe_of(2, normalize=True), seed=1).state["blocks.0.mlp.router.weight"]
    assert not torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], other)
    assert torch.cat(routers).std().item() == pytest.approx(0.02, rel=0.4)


def test_upcycling_a_sparse_model_is_refused() -> None:
    sparse = upcycle(DENSE_CHECKPOINT, moe_of(2, normalize=True))
    with pytest.raises(CheckpointError, match=r"starts from a dense model, this one has experts in blocks \[0, 1\]"):
        upcycle(sparse, moe_of(2, normalize=True))


@pytest.mark.parametrize(("text", "expected"), [("last-2", (5, 7)), ("every-4", (3, 7)), ("1,3", (1, 3))])
def test_layers_are_named_by_placement_or_number(text: str, expected: tuple[int, ...]) -> None:
    assert parse_layers(text, 8) == expected


@pytest.mark.parametrize("text", ["", "first-2", "last-x", "1;3"])
def test_layers_named_otherwise_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="names no blocks, expected last-2, every-2 or numbers such as 1,3"):
        parse_layers(text, 8)


def test_upcycle_command_writes_a_checkpoint_that_is_exported_with_the_dense_models_answers(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "dense", DENSE_CHECKPOINT)
    result = invoke(
        "upcycle", tmp_path / "dense", "--output", tmp_path / "sparse", "--num-experts", "4", "--moe-layers", "every-2",
        "--capacity-factor", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    loaded = load_checkpoint(tmp_path / "sparse")
    assert loaded.config.moe == MoeConfig(4, (1,), 2, 2.0, normalize_weights=True)
    exported = invoke_exporter(tmp_path / "sparse", "--point", "2,2", "--point", "4,1")
    assert exported == 0
    bundle = Bundle.load(tmp_path / "repository" / "sparse")
    session = ort.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    inputs = (torch.from_numpy(images).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        expected = DENSE_CHECKPOINT.model()(inputs).logits.numpy()
    for selected in (1, 2):
        feeds = {"images": images, "slots": np.full((5, 1), 4), "num_selected_experts": np.full((5, 1), selected)}
        np.testing.assert_allclose(session.run(["logits"], feeds)[0], expected, atol=1e-5)


def invoke_exporter(checkpoint: Path, *arguments: str) -> int:
    out = str(checkpoint.parent / "repository")
    common = ["--name", "sparse", "--out", out, "--rounds", "0", "--threads", "1"]
    return CliRunner().invoke(exporter_app, [str(checkpoint), *common, *arguments]).exit_code


def test_upcycle_command_takes_the_state_of_a_timm_model(tmp_path: Path) -> None:
    state = timm_state(torch.Generator().manual_seed(0))
    save_file(state, tmp_path / "vit.safetensors")
    arguments = ["--num-experts", "3", "--moe-layers", "1", "--num-selected-experts", "1", "--capacity-factor", "3"]
    arguments += ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]  # most of timm's models
    result = invoke("upcycle", tmp_path / "vit.safetensors", "--output", tmp_path / "sparse", *arguments)
    assert result.exit_code == 0, result.output
    loaded = load_checkpoint(tmp_path / "sparse")
    assert loaded.preprocessing == Preprocessing((32, 32), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = images_of(loaded.config, 2)
    with torch.inference_mode():
        logits = loaded.model()(images).logits
    torch.testing.assert_close(logits, timm_forward(state, images.permute(0, 3, 1, 2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--moe-layers", "7"), "moe.layers [7] must lie within the 2 blocks"),
        (("--moe-layers", "last-9"), "'last 9' of 2 blocks"),
        (("--num-experts", "1"), "num_selected_experts must be between 1 and num_experts = 1, got 2"),
    ],
)
def test_upcycle_command_that_does_not_fit_the_model_is_refused_and_writes_nothing(
    tmp_path: Path, arguments: tuple[str, str], message: str
) -> None:
    save_checkpoint(tmp_path / "dense", DENSE_CHECKPOINT)
    assert message in refused(invoke("upcycle", tmp_path / "dense", "--output", tmp_path / "sparse", *arguments))
    assert not (tmp_path / "sparse").exists()


def test_upcycle_command_replaces_a_checkpoint_only_when_told_and_nothing_else_ever(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "dense", DENSE_CHECKPOINT)
    save_checkpoint(tmp_path / "sparse", DENSE_CHECKPOINT)
    command = ("upcycle", tmp_path / "dense", "--moe-layers", "1", "--output")
    assert "sparse exists: --overwrite replaces it" in refused(invoke(*command, tmp_path / "sparse"))
    assert load_checkpoint(tmp_path / "sparse").config.moe is None
    result = invoke(*command, tmp_path / "sparse", "--overwrite")
    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "sparse").config.moe is not None
    # The folder above has checkpoints in it, but is none.
    assert "replaces checkpoints, and" in refused(invoke(*command, tmp_path, "--overwrite"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]
    (tmp_path / "empty").mkdir()
    assert invoke(*command, tmp_path / "empty").exit_code == 0
