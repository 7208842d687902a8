"""A model for another task, from the command that makes it to the gateway's answer, which is PyTorch's."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import exporter.cli
import vmoe.cli
from exporter.bundle import Bundle
from server.backends.ort import OrtBackend
from tests.server.conftest import serving
from tests.vmoe.test_fewshot import shades
from tests.vmoe.tiny import CONFIG, PREPROCESSING, model_of, write_idx
from vmoe.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import fit, normalize

POINTS = (OperatingPoint(0.5, 1), OperatingPoint(1.0, 2))
CLASSES = ("3", "4", "5")  # of six shades; the model that is transferred has other ones


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Waiting for a second thread at every operator of so small a model takes most of the time on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Data of six shades, 8 x 8 pixels, and a model of that size that knows none of them."""
    write_idx(tmp_path / "data", "train", shades(96, 0))
    write_idx(tmp_path / "data", "t10k", shades(48, 1))
    save_checkpoint(
        tmp_path / "source", Checkpoint(CONFIG, dict(model_of().state_dict()), PREPROCESSING, ("a", "b", "c"))
    )
    return tmp_path


def call(command: str, *arguments: str | Path) -> None:
    """A line of `python -m vmoe` or `python -m exporter`."""
    app = {"vmoe": vmoe.cli.app, "exporter": exporter.cli.app}[command]
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output


def export(root: Path, checkpoint: str) -> Bundle:
    points = [part for point in POINTS for part in ("--point", f"{point.capacity_factor},{point.num_selected_experts}")]
    quick = ("--threads", "1", "--rounds", "0", "--parity-images", "8")
    call("exporter", root / checkpoint, "--name", "model", "--out", root / "served", *points, *quick)
    return Bundle.load(root / "served" / "model")


def expected_probabilities(checkpoint: Checkpoint, images: list[Image.Image]) -> list[npt.NDArray[np.float32]]:
    """PyTorch's, (images, classes) for each of `POINTS`."""
    model, preprocessing = checkpoint.model(), checkpoint.preprocessing
    inputs = torch.from_numpy(normalize(np.stack([fit(image, preprocessing) for image in images]), preprocessing))
    with torch.inference_mode():
        answers = [model(inputs, *model.operating_point_tensors(point, len(images))).logits for point in POINTS]
    return [logits.softmax(-1).numpy() for logits in answers]


def assert_served_as_pytorch_answers(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Twelve images by HTTP, at every operating point."""
    images = [Image.fromarray(pixels[..., 0]) for pixels in shades(12, 2).images]
    expected = expected_probabilities(checkpoint, images)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # or the operating point would not be tested
    files = [("image", (f"{number}.png", png(image), "image/png")) for number, image in enumerate(images)]
    with serving(bundle, OrtBackend(bundle, threads=1)) as client:
        for point, probabilities in zip(POINTS, expected, strict=True):
            query = {
                "capacity_factor": point.capacity_factor,
                "num_selected_experts": point.num_selected_experts,
                "top": len(CLASSES),
                "deadline_ms": 10_000,
            }
            response = client.post("/classify", params=query, files=files)
            assert response.status_code == 200, response.text
            answers = [result["predictions"] for result in response.json()["results"]]
            found = [{each["label"]: each["probability"] for each in answer} for answer in answers]
            served = np.array([[answer[label] for label in CLASSES] for answer in found])
            # Logits of two float32 implementations differ by about 1e-6 here, probabilities by less.
            np.testing.assert_allclose(served, probabilities, rtol=0, atol=1e-5)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_head_that_fewshot_saved_is_served_as_pytorch_answers(root: Path) -> None:
    call(
        "vmoe", "fewshot", root / "source", "--data", root / "data", "--classes", "3-5", "--shots", "5",
        "--seeds", "1", "--validation", "5", "--save", root / "few", "--device", "cpu",
    )  # fmt: skip
    assert_served_as_pytorch_answers(export(root, "few"), load_checkpoint(root / "few"))


def test_model_recovered_from_a_bundle_and_finetuned_at_another_size_is_served_as_pytorch_answers(root: Path) -> None:
    export(root, "source")
    call("exporter", "recover", root / "served" / "model", "--output", root / "recovered")
    call(
        "vmoe", "finetune", root / "recovered", "--data", root / "data", "--output", root / "run", "--classes", "3-5",
        "--image-size", "16x12", "--epochs", "5", "--batch-size", "8", "--learning-rate", "0.05",
        "--warmup-steps", "5", "--autocast", "none", "--device", "cpu",
    )  # fmt: skip
    bundle, tuned = export(root, "run/checkpoint"), load_checkpoint(root / "run" / "checkpoint")
    assert bundle.manifest.architecture.image_size == (16, 12)
    assert_served_as_pytorch_answers(bundle, tuned)
