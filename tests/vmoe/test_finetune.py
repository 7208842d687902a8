"""Fine-tuning: the head, positions at a new resolution, exact resume, and the command up to a served model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import exporter.cli
from exporter.bundle import Bundle
from tests.vmoe.test_cli import invoke, refused
from tests.vmoe.test_fewshot import shades
from tests.vmoe.tiny import CONFIG, PREPROCESSING, assert_same_state, images_of, model_of, write_idx
from vmoe.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vmoe.config import ModelConfig, PositionEmbedding
from vmoe.finetune import FINE_TUNING, for_task
from vmoe.model import VisionTransformer, sincos2d
from vmoe.positions import resize_positions
from vmoe.train import Trainer

LEARNED = replace(CONFIG, position_embedding="learned", classifier="token")
# A rate of 1e-12 leaves float32 weights where they are: what comes out is what the run started from.
STILL = ("--epochs", "1", "--batch-size", "8", "--learning-rate", "1e-12", "--warmup-steps", "0")


def checkpoint_of(config: ModelConfig) -> Checkpoint:
    return Checkpoint(config, dict(model_of(config).state_dict()), PREPROCESSING, ("a", "b", "c"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six shades, and a model of three other classes."""
    write_idx(tmp_path / "data", "train", shades(96, 0))
    write_idx(tmp_path / "data", "t10k", shades(48, 1))
    save_checkpoint(tmp_path / "source", checkpoint_of(LEARNED))
    return tmp_path


def finetune(root: Path, *more: str | Path) -> Result:
    common = ("--data", root / "data", "--output", root / "run", "--autocast", "none", "--device", "cpu")
    return invoke("finetune", root / "source", *common, *more)


def test_head_for_the_same_classes_is_kept_and_for_others_starts_at_zero() -> None:
    source = checkpoint_of(CONFIG)
    assert for_task(source, ("a", "b", "c")) is source
    other = for_task(source, ("x", "y"))
    with torch.inference_mode():
        output = other.model()(images_of(CONFIG, 2))
        features = source.model()(images_of(CONFIG, 2)).features
    assert torch.equal(output.logits, torch.zeros(2, 2))
    assert torch.equal(output.features, features)


def test_finetune_at_a_new_resolution_starts_from_interpolated_positions(root: Path) -> None:
    assert finetune(root, *STILL, "--image-size", "16x12").exit_code == 0
    source, tuned = load_checkpoint(root / "source"), load_checkpoint(root / "run" / "checkpoint")
    assert tuned.config.image_size == tuned.preprocessing.image_size == (16, 12)
    expected = resize_positions(source.state["position_embedding"].numpy(), (2, 2), (4, 3))
    np.testing.assert_allclose(tuned.state["position_embedding"].numpy(), expected, atol=1e-7)
    untouched = [name for name in source.state if "head" not in name and name != "position_embedding"]
    for name in untouched:
        torch.testing.assert_close(tuned.state[name], source.state[name], atol=1e-7, rtol=0)


@pytest.mark.parametrize("positions", ["sincos2d", "none"])
def test_finetune_at_a_new_resolution_computes_fixed_positions_for_it(root: Path, positions: PositionEmbedding) -> None:
    save_checkpoint(root / "source", checkpoint_of(replace(CONFIG, position_embedding=positions)))
    assert finetune(root, *STILL, "--image-size", "16", "--mean", "0.25").exit_code == 0
    tuned = load_checkpoint(root / "run" / "checkpoint")
    assert (tuned.preprocessing.mean, tuned.preprocessing.std) == ((0.25,), (0.5,))
    model = tuned.model()
    assert isinstance(model, VisionTransformer)
    assert model.config.grid == (4, 4)
    if positions == "sincos2d":
        assert torch.equal(model.sincos2d, sincos2d((4, 4), 8))


def test_finetuned_model_learns_the_new_classes_and_is_exported_and_served(root: Path) -> None:
    result = finetune(
        root, "--classes", "3-5", "--image-size", "12", "--capacity-factor", "1.5", "--num-selected-experts", "1",
        "--epochs", "30", "--batch-size", "8", "--learning-rate", "0.05", "--warmup-steps", "5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    tuned = load_checkpoint(root / "run" / "checkpoint")
    assert tuned.labels == ("3", "4", "5")
    assert tuned.config.moe is not None
    assert (tuned.config.moe.capacity_factor, tuned.config.moe.num_selected_experts) == (1.5, 1)
    last = json.loads((root / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["accuracy_(1.5, 1)"] > 0.9  # chance is 1/3

    arguments = ("--name", "tuned", "--out", root / "repository", "--images", root / "data", "--point", "1.5,1")
    exported = CliRunner().invoke(
        exporter.cli.app,
        [str(each) for each in (root / "run" / "checkpoint", *arguments, "--rounds", "0", "--threads", "1")],
    )
    assert exported.exit_code == 0, exported.output
    bundle = Bundle.load(root / "repository" / "tuned")
    assert bundle.manifest.points[0].accuracy == pytest.approx(last["accuracy_(1.5, 1)"])
    session = ort.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])
    bright = np.full((1, 12, 12, 1), 220, np.uint8)  # the shade of class 5
    feeds = {"images": bright, "slots": np.full((1, 2), 4), "num_selected_experts": np.ones((1, 1), np.int64)}
    assert session.run(["logits"], feeds)[0].argmax() == 2


def test_finetuning_that_is_resumed_ends_with_the_weights_of_a_whole_run(tmp_path: Path) -> None:
    start = for_task(checkpoint_of(CONFIG), tuple("012345"))

    def trainer() -> Trainer:
        settings = replace(FINE_TUNING, epochs=1, batch_size=8, autocast="none")
        return Trainer(start.config, settings, shades(48, 0), start.preprocessing, torch.device("cpu"))

    whole, first, second = trainer(), trainer(), trainer()
    for each in (whole, first):
        each.start_from(start.state)
    for _ in range(6):
        whole.run_step()
    for _ in range(3):
        first.run_step()
    first.save(tmp_path / "checkpoint")
    second.resume(tmp_path / "checkpoint", load_checkpoint(tmp_path / "checkpoint").state)
    for _ in range(3):
        second.run_step()
    assert_same_state(second.average, whole.average)
    assert_same_state(second.model.state_dict(), whole.model.state_dict())


def test_finetune_into_its_own_source_is_refused_and_leaves_it_alone(root: Path) -> None:
    (root / "run").mkdir()
    (root / "source").rename(root / "run" / "checkpoint")
    before = load_checkpoint(root / "run" / "checkpoint").state
    result = invoke("finetune", root / "run" / "checkpoint", "--data", root / "data", "--output", root / "run")
    assert "exists: --resume continues its run, another --output leaves it alone" in refused(result)
    assert_same_state(load_checkpoint(root / "run" / "checkpoint").state, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-size", "9"), "image_size (9, 9) is not a multiple of patch_size (4, 4)"),
        (("--num-selected-experts", "5"), "num_selected_experts must be between 1 and num_experts = 4, got 5"),
        (("--classes", "7-9"), "class 7 does not exist"),
        (("--mean", "0.5,0.5"), "mean and std need 1 values each, got (0.5, 0.5)"),
        (("--optimizer", "lion"), "optimizer must be 'adamw' or 'sgd', got 'lion'"),
    ],
)
def test_finetune_with_a_wrong_option_says_what_would_be_right(
    root: Path, arguments: tuple[str, str], message: str
) -> None:
    assert message in refused(finetune(root, *arguments))
    assert not (root / "run").exists()
