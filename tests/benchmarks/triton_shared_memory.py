"""What does `triton_shared_memory` save where images are large? `python -m tests.benchmarks.triton_shared_memory`.

A model of two narrow blocks with random weights and inputs of 384 x 384 x 3 bytes: computing is cheap, so that moving
the images shows. It is exported, served by a real Triton, and asked by the gateway's backend in turns as in
`triton_overhead`, which does it with the shipped model. What is saved in milliseconds holds for any model with such
images; the ratio is the best case. Takes minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from exporter.bundle import Bundle
from exporter.measure import sample_images
from tests.benchmarks.triton_overhead import SIZES, shared_inputs
from tests.triton_server import TritonServer, python_repository
from vmoe.checkpoint import Checkpoint, save_checkpoint
from vmoe.config import ModelConfig, MoeConfig
from vmoe.model import VisionTransformer
from vmoe.preprocess import Preprocessing

CONFIG = ModelConfig((384, 384), (32, 32), 10, 64, 2, 128, 2, channels=3, moe=MoeConfig(4, (1,)))


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        bundle = export(Path(directory))
        images = sample_images(bundle.manifest.preprocessing, None, max(SIZES))
        with TritonServer(python_repository(bundle.directory, Path(directory) / "triton")) as server:
            Console().print(shared_inputs(bundle, images, server.grpc_url))


def export(directory: Path) -> Bundle:
    """A bundle of `CONFIG`, compared with PyTorch and hardly profiled."""
    torch.manual_seed(0)
    preprocessing = Preprocessing(CONFIG.image_size, CONFIG.channels, (0.5,) * 3, (0.5,) * 3)
    labels = tuple(f"class {index}" for index in range(CONFIG.num_classes))
    checkpoint = Checkpoint(CONFIG, VisionTransformer(CONFIG).state_dict(), preprocessing, labels)
    save_checkpoint(directory / "checkpoint", checkpoint)
    quick = ["--rounds", "1", "--parity-images", "2", "--threads", "1"]
    out = ["--out", str(directory / "bundles"), "--name", "large-images"]
    subprocess.run([sys.executable, "-m", "exporter", str(directory / "checkpoint"), *out, *quick], check=True)
    return Bundle.load(directory / "bundles" / "large-images")


if __name__ == "__main__":
    main()
