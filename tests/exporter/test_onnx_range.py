"""The shipped graph in the oldest ONNX Runtime that may serve it, installed from PyPI into a directory of its own.

Triton images carry an older ONNX Runtime than PyPI's newest. IR version 10 bounds the range below: 1.17.3 refuses it
("Unsupported model IR version: 10, max supported IR version: 9"), 1.18.0 reads it. docs/triton.md has the images.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.bundle import Bundle, frontier
from exporter.measure import labelled_images, sample_images
from exporter.session import open_session
from exporter.tensors import graph_outputs

SHIPPED = Path(__file__).parents[2] / "model_repository" / "vmoe-fashion-mnist"
DATASET = Path("/usr/share/datasets/fashion-mnist")
# 1.18 has wheels up to Python 3.12, for numpy 1; the oldest for 3.13 is 1.20.
OLDEST = ("onnxruntime==1.18.0", "numpy==1.26.4") if sys.version_info < (3, 13) else ("onnxruntime==1.20.0",)
OUTPUTS = [tensor.name for tensor in graph_outputs(Bundle.load(SHIPPED).manifest)]

SCRIPT = """
import sys, numpy, onnxruntime
model, inputs, outputs, *names = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
answers = session.run(names, dict(numpy.load(inputs)))
numpy.savez(outputs, version=onnxruntime.__version__, **dict(zip(names, answers)))
"""


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site directory with the oldest runtime; `make test` has reached PyPI before, so failing to is a failure."""
    directory = tmp_path_factory.mktemp("onnxruntime")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory), *OLDEST]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert installed.returncode == 0, f"{' '.join(command)} failed:\n{installed.stderr}"
    return directory


def test_shipped_graph_answers_the_same_in_the_oldest_supported_runtime(oldest: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(SHIPPED)
    manifest = bundle.manifest
    images = sample_images(
        manifest.preprocessing, labelled_images(DATASET, manifest.preprocessing, manifest.labels), 64
    )[:32]
    ladder = frontier(manifest.points)
    points = [ladder[index % len(ladder)] for index in range(len(images))]
    inputs = {
        "images": images,
        "slots": np.array([point.slots for point in points], np.int64),
        "num_selected_experts": np.array([[point.num_selected_experts] for point in points], np.int64),
    }
    np.savez(tmp_path / "inputs.npz", **inputs)  # type: ignore[arg-type]
    files = [bundle.model_path, tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
    environment = os.environ | {"PYTHONPATH": str(oldest)}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, files), *OUTPUTS],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    found = np.load(tmp_path / "outputs.npz")
    assert f"onnxruntime=={found['version']}" == OLDEST[0]
    expected = dict(zip(OUTPUTS, open_session(bundle.model_path, 1).run(OUTPUTS, inputs), strict=True))
    # The same float32 arithmetic in another order of additions; the tolerance is that of the export's parity check.
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-4)
    for name in ("kept", "expert_load", "token_experts"):  # no two gates of these images are that close
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
